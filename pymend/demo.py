"""``pymend demo``: train an editor on the built-in facts, edit held-out ones, undo them, measure.

The output folder belongs to the demo as far as its own files go (``MADE``). Run again with the same
model and training settings, it is continued or, when finished, used as it is; with other settings
its files are replaced. Other files stay, and a folder in which something else left an editor is
refused.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pymend.algorithms.mend.mend import Mend
from pymend.config import EditRequest, MendConfig, TrainConfig, to_json
from pymend.engine.generate import greedy
from pymend.engine.tokens import Chat, Encoder, settled
from pymend.evaluation import evaluate
from pymend.evaluation.metrics import RecordScores
from pymend.files import read_json, writable_dir, write_json
from pymend.models.structure import weight_of
from pymend.progress import tqdm
from pymend.report.plots import learning_curves
from pymend.report.tables import metrics_table, table
from pymend.training.trainer import Trainer
from pymend.zoo.smollm2 import NOTE


@dataclass(frozen=True)
class Settings:
    """How much the demo does."""

    train: TrainConfig
    mend: MendConfig
    test_records: int  # held-out facts that are measured
    shown: int  # of these, edited by name
    searched: int  # at most, for each kind of wrong generalisation
    tokens: int = 8  # length of an answer


FULL = Settings(
    train=TrainConfig(
        steps=400,
        batch_size=8,
        lr=3e-5,
        alpha_lr=3e-5,
        c_edit=0.3,
        schedule="cosine",
        warmup=30,
        eval_every=100,
        eval_records=64,
        save_every=100,
        keep="last",
    ),
    mend=MendConfig(rank=512),
    test_records=60,
    shown=6,
    searched=6,
)
QUICK = Settings(
    train=TrainConfig(
        steps=24,
        batch_size=4,
        lr=5e-4,
        alpha_lr=1e-4,
        eval_every=12,
        eval_records=8,
        save_every=24,
    ),
    mend=MendConfig(rank=64),
    test_records=8,
    shown=3,
    searched=1,
)

# Subject and true answer of the facts to edit, all from the test split.
BY_NAME = (
    ("Poland", "Warsaw"),
    ("Hamlet", "William Shakespeare"),
    ("the Louvre", "Paris"),
    ("Mount Fuji", "Japan"),
    ("Pablo Casals", "cello"),
    ("elephant", "mammals"),
)

MARK = "demo.json"  # says whose the other files are, so it is removed last
MADE = (
    "editor.json",
    "editor.safetensors",
    "metrics.jsonl",
    "metrics.json",
    "curves.png",
    "checkpoints",
    MARK,
)


@dataclass(frozen=True)
class Answer:
    """What the model says to one prompt before an edit, after it, and after its undo."""

    kind: str  # edited prompt, paraphrase, same relation, other relation
    prompt: str
    before: str
    after: str
    undone: str
    verdict: str  # took, missed; kept, changed


@dataclass(frozen=True)
class Example:
    """One edit and the answers around it."""

    subject: str | None
    truth: str | None
    target: str
    weights_restored: bool  # bit for bit, after the undo
    answers: tuple[Answer, ...]


def run(
    model: PreTrainedModel,
    tokenizer: Any,
    train: Sequence[EditRequest],
    validation: Sequence[EditRequest],
    test: Sequence[EditRequest],
    output: str | Path,
    settings: Settings = FULL,
    name: str = "model",
    chat: Chat = None,
) -> dict[str, Any]:
    """Run the demo, print it, and leave ``MADE`` in ``output``.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        FileExistsError: ``output`` holds an editor that no demo made.
    """
    begin = time.perf_counter()
    folder = writable_dir(output)
    mend = _train(model, tokenizer, train, validation, folder, settings, chat)
    learning_curves(folder / "metrics.jsonl", folder / "curves.png", f"{name}, built-in facts")

    measured = list(test[: settings.test_records])
    print(f"\nMeasuring {len(measured)} held-out facts, each edited alone", flush=True)
    result = evaluate(mend, model, tokenizer, measured, chat=chat)

    ask = _Interview(mend, model, tokenizer, settings.tokens, chat)
    named = sorted(test, key=lambda r: (r.subject, r.ground_truth) not in BY_NAME)
    examples = [
        ask(request, _few_prompts(request))
        for request in tqdm(named[: settings.shown], "edit by name")
    ]
    over, under = _wrong_generalisation(ask, measured, result.records, settings.searched)

    seconds = {"training": _training_seconds(folder), "this run": time.perf_counter() - begin}
    metrics = {
        **result.to_dict(),
        "model": NOTE if name == "smollm2" else name,
        "settings": asdict(settings),
        "demo_seconds": seconds,
        "examples": [asdict(e) for e in examples],
        "over_generalisation": None if over is None else asdict(over),
        "under_generalisation": None if under is None else asdict(under),
    }
    write_json(folder / "metrics.json", metrics)

    for i, example in enumerate(examples, 1):
        print(f"\n{i}. {_describe(example)}")
    print("\nOver-generalisation: an unrelated answer changed with the edit")
    print("none found" if over is None else _describe(over))
    print("\nUnder-generalisation: the edit took, a paraphrase did not follow")
    print("none found" if under is None else _describe(under))
    print(f"\n{metrics['model']}: {metrics['protocol']}")
    rows = [(f"{what}, seconds", f"{value:.0f}") for what, value in seconds.items()]
    print(metrics_table(metrics, rows))
    print(f"\nResults: {folder / 'metrics.json'}   curves: {folder / 'curves.png'}")
    print(f"Edit on: pymend edit --model {name} --editor {folder} --prompt ... --target ...")
    return metrics


# -- training --------------------------------------------------------------------------------


def _train(
    model: PreTrainedModel,
    tokenizer: Any,
    train: Sequence[EditRequest],
    validation: Sequence[EditRequest],
    folder: Path,
    settings: Settings,
    chat: Chat,
) -> Mend:
    """The editor of this demo: trained now, or what is left to train of it."""
    torch.manual_seed(settings.train.seed)
    mend = Mend.from_config(model, settings.mend)
    identity = {
        "model": mend.model_fingerprint,
        "train": to_json(settings.train),
        "mend": to_json(settings.mend),
        "records": [len(train), len(validation)],
        "chat": settled(chat),
    }
    _claim(folder, identity)
    trainer = Trainer(
        mend,
        model,
        tokenizer,
        train,
        validation,
        config=settings.train,
        output=folder,
        resume=True,
        chat=chat,
    )
    steps = settings.train.steps
    if trainer.step == steps:
        print(f"Using the editor in {folder}; delete the folder to train it again", flush=True)
    else:
        todo = f"from step {trainer.step} " if trainer.step else ""
        print(f"Training an editor on {len(train)} facts, {todo}to step {steps}", flush=True)
    return trainer.train()


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make ``folder`` the place of the demo ``identity``; drop the files of another demo.

    Raises:
        FileExistsError: it holds such files, and no demo wrote them.
    """
    mark = folder / MARK
    found = [name for name in MADE if (folder / name).exists()]
    if mark.exists():
        if read_json(mark) == identity:
            return
        print(f"{folder} holds a demo with other settings; replacing its files", flush=True)
        for path in (folder / name for name in found):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif found:
        raise FileExistsError(
            f"{folder} holds {found[0]}, which no demo wrote; choose another output folder"
        )
    write_json(mark, identity)


def _training_seconds(folder: Path) -> float:
    """Seconds spent in training steps, over all runs that took part."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(float(json.loads(line).get("seconds", 0)) for line in lines)


# -- edits by name ---------------------------------------------------------------------------


class _Interview:
    """Edits one fact in the model's weights, asks before, after and after the undo."""

    def __init__(
        self, mend: Mend, model: PreTrainedModel, tokenizer: Any, tokens: int, chat: Chat
    ) -> None:
        self.mend, self.model, self.tokenizer, self.chat = mend, model, tokenizer, chat
        self.tokens = tokens
        self.encoder = Encoder.for_model(model, tokenizer, chat)

    def __call__(self, request: EditRequest, prompts: Sequence[tuple[str, str]]) -> Example:
        """Ask the ``prompts``, pairs of kind and text, around the edit of ``request``."""
        texts = [text for _, text in prompts]
        weights = [weight_of(self.model, w) for w in self.mend.weights]
        kept = [w.detach().clone() for w in weights]
        edit = self.mend.edit(self.model, self.tokenizer, request, chat=self.chat)
        before = self._answers(texts)
        edit.merge_(self.model)
        try:
            after = self._answers(texts)
        finally:
            edit.unmerge_(self.model)
        undone = self._answers(texts)
        restored = all(torch.equal(a, b) for a, b in zip(kept, weights, strict=True))
        answers = [
            Answer(kind, text, b, a, u, _verdict(kind, request.target, b, a))
            for (kind, text), b, a, u in zip(prompts, before, after, undone, strict=True)
        ]
        return Example(
            request.subject, request.ground_truth, request.target, restored, tuple(answers)
        )

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        return greedy(self.model, self.encoder, prompts, self.tokens)


def _verdict(kind: str, target: str, before: str, after: str) -> str:
    if kind in ("edited prompt", "paraphrase"):
        return "took" if after.lower().startswith(target.lower()) else "missed"
    return "kept" if after == before else "changed"


def _all_prompts(request: EditRequest) -> list[tuple[str, str]]:
    """The edit prompt, all paraphrases, and all prompts whose answers should stay."""
    paraphrases = [("paraphrase", text) for text in request.rephrases]
    unrelated = [("unrelated", probe.prompt) for probe in request.locality]
    return [("edited prompt", request.prompt), *paraphrases, *unrelated]


def _few_prompts(request: EditRequest) -> list[tuple[str, str]]:
    """One paraphrase, and the first and last locality prompt: same relation and another one."""
    prompts = [("edited prompt", request.prompt)]
    prompts += [("paraphrase", text) for text in request.rephrases[-1:]]
    prompts += [("same relation", p.prompt) for p in request.locality[:1]]
    return prompts + [("other relation", p.prompt) for p in request.locality[1:][-1:]]


def _wrong_generalisation(
    ask: _Interview, records: Sequence[EditRequest], scores: Sequence[RecordScores], limit: int
) -> tuple[Example | None, Example | None]:
    """An edit that reached too far and one that did not reach far enough, if there are any.

    The worst scores are looked at first, ``limit`` records of each kind.
    """
    locality = [1.0 if s.locality is None else s.locality for s in scores]
    reach = [1.0 if s.generality is None else s.generality for s in scores]
    order = range(len(records))
    too_far = sorted((i for i in order if locality[i] < 1), key=lambda i: locality[i])
    too_short = sorted((i for i in order if reach[i] < 1), key=lambda i: reach[i])
    found: list[Example | None] = []
    for candidates, wanted in ((too_far, "changed"), (too_short, "missed")):
        example = None
        took = [i for i in candidates if scores[i].edit_success == 1][:limit]
        for i in tqdm(took, f"search for {wanted} answers", leave=False):
            whole = ask(records[i], _all_prompts(records[i]))
            edited, *others = whole.answers
            bad = [a for a in others if a.verdict == wanted]
            if edited.verdict == "took" and bad:
                # An answer that became the new target says most.
                bad.sort(key=lambda a: whole.target.lower() not in a.after.lower())
                example = Example(
                    whole.subject,
                    whole.truth,
                    whole.target,
                    whole.weights_restored,
                    (edited, bad[0]),
                )
                break
        found.append(example)
    return found[0], found[1]


def _describe(example: Example) -> str:
    rows = []
    for a in example.answers:
        said = [text or "(nothing)" for text in (a.before, a.after, a.undone)]
        rows.append((a.kind, a.prompt, *said, a.verdict))
    headers = ("", "prompt", "before", "after", "after undo", "verdict")
    weights = "the weights are back, bit for bit" if example.weights_restored else "NOT restored"
    title = f"{example.subject}: {example.truth} -> {example.target}   (after undo {weights})"
    return f"{title}\n{table(headers, rows)}"
