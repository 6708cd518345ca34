"""Small models of five architectures that know the built-in facts: models to edit without a hub.

They are trained here, from random weights, and kept in the cache as ordinary transformers folders.
``bart-mini`` and ``t5-mini`` answer prompts and questions (closed book), ``bert-mini`` tells true
claims from false ones, ``gpt2-mini`` completes prompts and writes passages, and so does
``moe-mini``, whose blocks have eight experts. ``mini.json`` in the folder says how much a model
knows, and what each expert is sent. The same seed gives the same bits on the same processor with
the same versions and number of threads.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from pymend.engine.tokens import IGNORE, Batch, Encoder, Row
from pymend.files import cache_dir, install, is_complete, read_json, write_json
from pymend.progress import tqdm
from pymend.zoo.lessons import Course, Lesson, Taught, lessons
from pymend.zoo.recipes import RECIPES, Recipe

logger = logging.getLogger(__name__)

ASKED = 4  # wordings of a fact, at most, in the exam at the end


def folder(name: str, seed: int = 0) -> Path:
    """Where the model called ``name`` is kept.

    Raises:
        ValueError: no model is called so.
    """
    if name not in RECIPES:
        raise ValueError(f"no model is called {name!r}; choose one of {', '.join(RECIPES)}")
    return cache_dir() / (f"{name}-v{edition(name)}" + (f"-seed{seed}" if seed else ""))


def edition(name: str) -> int | None:
    """Of the recipe of the model called ``name``; None if no model made here is called so."""
    return RECIPES[name].edition if name in RECIPES else None


def make(name: str, seed: int = 0, progress: bool = True) -> Path:
    """The folder of a model, which is trained when it is not there yet: minutes on two cores.

    Args:
        seed: of the weights, and of the order and choice of what is read.

    Raises:
        ValueError: no model is called so.
        RuntimeError: the model knows less than its recipe asks for.
    """
    place = folder(name, seed)
    if not is_complete(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            ready = Path(scratch) / "ready"
            model, tokenizer, report = train(RECIPES[name], seed, progress)
            model.save_pretrained(ready)
            tokenizer.save_pretrained(ready)
            write_json(ready / "mini.json", {"model": name, **report})
            write_json(ready / "complete.json", {"source": f"pymend models make {name}"})
            install(ready, place)
    return place


def card(place: Path) -> dict[str, Any]:
    """What ``mini.json`` in a model's folder says."""
    return read_json(place / "mini.json")


def skeleton(name: str) -> PreTrainedModel:
    """The model called ``name`` on the meta device: names and shapes, and no memory."""
    recipe = RECIPES[name]
    with torch.device("meta"), no_init_weights():
        return _build(recipe, recipe.vocabulary)


def _build(recipe: Recipe, vocabulary: int) -> PreTrainedModel:
    config = AutoConfig.for_model(**recipe.config, vocab_size=vocabulary)
    model: PreTrainedModel = getattr(transformers, recipe.auto).from_config(config)
    return model


def train(
    recipe: Recipe, seed: int = 0, progress: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """A model and its tokenizer, made from nothing, and its card.

    Raises:
        RuntimeError: the model knows less than ``recipe.bar`` of the seen wordings it is asked.
    """
    begin, begin_cpu = time.perf_counter(), time.process_time()
    facts = lessons(recipe.wordings, recipe.subjects)
    tokenizer = train_tokenizer(recipe, facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(recipe, len(tokenizer))
    encoder = Encoder.for_model(model, tokenizer)
    course = Course(encoder, facts, recipe.batch, recipe.passages, seed)
    steps = _teach(model, course, recipe, progress)
    exams = {
        "seen": course.exam(wordings=ASKED),
        "held_out": course.exam(held_out=True, wordings=ASKED),
    }
    known = {name: exact_match(model, rows) for name, rows in exams.items()}
    if known["seen"] < recipe.bar:
        raise RuntimeError(
            f"after {steps} steps with seed {seed} the model knows {known['seen']:.1%} of the seen "
            f"wordings it was asked, less than {recipe.bar:.0%}; try another seed"
        )
    report: dict[str, Any] = {
        "known": known,
        "rows": {name: len(rows) for name, rows in exams.items()},
        "facts": len(facts),
        "relations": len({fact.relation.name for fact in facts}),
        "steps": steps,
        "batch": recipe.batch,
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - begin_cpu, 1),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
    }
    if hasattr(model.config, "num_experts_per_tok"):
        report["load"] = load_of_experts(model, course.exam(wordings=1))
    return model, tokenizer, report


def train_tokenizer(recipe: Recipe, facts: Sequence[Lesson]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of what is shown of the facts, in the frame of the model's family.

    Not BERT's word pieces for ``bert-mini``: their trainer numbers its tokens at random.
    """
    special = list(dict.fromkeys(recipe.special.values()))
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # An encoder-decoder's answer has no space in front.
    texts = (text for f in facts for text in (f.truth, *f.sentences()))
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(
        recipe.frame, special_tokens=[(token, inner.token_to_id(token)) for token in special]
    )
    roles = {f"{role}_token": token for role, token in recipe.special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def _teach(model: PreTrainedModel, course: Course, recipe: Recipe, progress: bool) -> int:
    """Train until enough is known; returns the steps taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), fused=True)

    def rate(step: int) -> float:
        falling = (1 + math.cos(math.pi * step / recipe.steps)) / 2
        return min(1.0, (step + 1) / recipe.warmup) * falling

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    quick = course.exam(wordings=1)
    model.train()
    with tqdm(total=recipe.steps, desc="teach", disable=not progress) as bar:
        for step in range(1, recipe.steps + 1):
            loss = _loss(model, course.batch(step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % recipe.check == 0:
                known = exact_match(model, quick)
                bar.set_postfix(loss=f"{loss.item():.3f}", known=f"{known:.3f}", refresh=False)
                if known >= recipe.enough:
                    break
    model.eval()
    return step


def _loss(model: PreTrainedModel, taught: Sequence[Taught]) -> Tensor:
    """Cross entropy at the label positions, and of the hints where there are any.

    A classifier learns nothing from its one bit a claim for as long as it does not know what object
    to expect. So its first token has to name the true object in false claims, one block below the
    top, where the last block can compare it with the object that is said.
    """
    batch = Batch.of([x.row for x in taught])
    hints = torch.tensor([x.hint for x in taught])
    hinted = hints != IGNORE
    output = model(**batch.inputs, output_hidden_states=bool(hinted.any()))
    loss = cross_entropy(_at_labels(output.logits, batch), batch.target)
    if hinted.any():
        embeddings: Any = model.get_input_embeddings()
        named = output.hidden_states[-2][hinted, 0] @ embeddings.weight.t()
        loss = loss + cross_entropy(named, hints[hinted])
    return loss


def _at_labels(logits: Tensor, batch: Batch) -> Tensor:
    """The logits [labels, classes] that count; one output z stands for the classes' (0, z)."""
    if logits.ndim == 3:
        return logits[batch.row, batch.position]
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


@torch.inference_mode()
def exact_match(model: PreTrainedModel, rows: Sequence[Row], size: int = 256) -> float:
    """Share of ``rows`` whose label positions are all predicted right, teacher-forced."""
    right = 0
    ordered = sorted(rows, key=lambda row: len(row.prefix))
    for i in range(0, len(rows), size):
        batch = Batch.of(ordered[i : i + size])
        wrong = batch.row[_at_labels(model(**batch.inputs).logits, batch).argmax(1) != batch.target]
        right += len(batch.rows) - len(wrong.unique())
    return right / len(rows)


@torch.inference_mode()
def load_of_experts(
    model: PreTrainedModel, rows: Sequence[Row], size: int = 256
) -> list[list[float]]:
    """Share of the tokens of ``rows``, of each as often as it is sent, that an expert gets.

    A list for every block, which sums to 1; to three digits.
    """
    sent = torch.tensor(0)
    for i in range(0, len(rows), size):
        inputs = Batch.of(rows[i : i + size]).inputs
        scores = torch.stack(model(**inputs, output_router_logits=True).router_logits)
        read = scores[:, inputs["attention_mask"].flatten().bool()]  # [blocks, tokens, experts]
        chosen = read.topk(model.config.num_experts_per_tok).indices
        sent = sent + one_hot(chosen, read.shape[2]).sum((1, 2))
    shares = (sent / sent.sum(1, keepdim=True)).tolist()
    return [[round(share, 3) for share in block] for block in shares]
