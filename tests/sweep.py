"""Every architecture of transformers through pymend, into a table of the docs.

    python tests/sweep.py             # all that is not done yet, then docs/architectures.md
    python tests/sweep.py llama t5    # these anew, shown and not written

What is done stays in build/architectures until the sources of pymend or of the trial change. Every
case has a process and a time limit of its own, since a model can take its process down.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from architectures import CASES, MAPPINGS, build, full_size
from trial import Trial

from pymend.models.structure import EditedWeight, find_weights

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results/architectures.json"
PAGE = ROOT / "docs/architectures.md"
KEPT = ROOT / "build/architectures"
LIMIT = 240  # seconds
MEMORY = 12 << 30  # bytes
# What is worst comes first; the first three are faults of this package.
VERDICTS = ("wrong", "crash", "unclear", "refused", "not built", "passed")
FAULTS = VERDICTS[:3]
Result = dict[str, Any]
Finding = tuple[str, str, str]  # step, verdict, text


# -- one case --------------------------------------------------------------------------------------


def examine(kind: str, name: str, at: Callable[[str], None]) -> Result:
    """Run one case in this process; ``at`` is told every step that begins."""
    result: Result = {"kind": kind, "name": name}
    at("building")
    try:
        model = build(kind, name)
        Trial(kind, model, at=at).check_plain()
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        return result | {"verdict": "not built", "reason": f"{type(error).__name__}: {line[:200]}"}
    trial, findings = _tried(kind, model, at)
    if any(what == "wrong" for _, what, _ in findings):
        at("in float64")
        _, exact = _tried(kind, _double(build(kind, name)), at)
        faults = {step for step, what, _ in exact if what in FAULTS}
        # What float64 does not have was rounding.
        findings = [f for f in findings if f[1] != "wrong" or f[0] in faults]
    edits = _short(trial.weights)
    at("full size")
    try:
        full = full_size(kind, name)
    except Exception:  # defaults that do not fit together
        full = model
    real = _short(find_weights(full)) if edits else edits
    if not findings and not {*real} <= {*edits}:
        text = f"{', '.join(real)} are edited at full size, tried were {', '.join(edits)}"
        findings.append(("weights", "wrong", text))
    result |= {"verdict": "passed", "reason": "", "edits": real}
    result |= {"prefix": trial.prefix, "texts": trial.texts, "peft": trial.peft}
    if findings:
        step, what, text = min(findings, key=lambda f: VERDICTS.index(f[1]))
        result |= {"verdict": what, "reason": text if what == "refused" else f"{step}: {text}"}
    return result


def _tried(kind: str, model: Any, at: Callable[[str], None]) -> tuple[Trial, list[Finding]]:
    """The trial of a model's default weights, and what that of others found too."""
    trial = Trial(kind, model, at=at).run()
    findings = list(trial.findings)
    experts = any(w.experts for w in trial.weights)
    for asked in ("all", "shared") if experts else ("all",):
        others = Trial(kind, model, (asked,), at=at).run(brief=True).findings
        # A refusal is an answer here: these weights were asked for.
        findings += [(f"{asked}: {step}", w, text) for step, w, text in others if w in FAULTS]
    return trial, findings


def _double(model: Any) -> Any:
    """``model`` in float64, its experts in plain products: the grouped ones know no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def _short(weights: Iterable[EditedWeight]) -> list[str]:
    """The names of weights below their block, each once; experts of a list are one."""
    found = [re.sub(r"^.*?\.\d+\.|\.weight$", "", w.name) for w in weights]
    return list(dict.fromkeys(re.sub(r"\.(expert_)?\d+\.", r".*.", name) for name in found))


# -- a process for each ----------------------------------------------------------------------------


def run(kind: str, name: str) -> Result:
    """:func:`examine` in a process of its own; what takes that down is a crash in its last step."""
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYMEND_KERNELS": "all",  # as in all tests
        "HF_HUB_OFFLINE": "1",
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sweep"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, name, theirs))
    process.start()
    theirs.close()
    step, end, found = "", time.monotonic() + LIMIT, None
    try:
        while found is None and ours.poll(max(0.0, end - time.monotonic())):
            said = ours.recv()
            step, found = (said, None) if isinstance(said, str) else (step, said)
        died = "took longer than its time"
    except EOFError:
        process.join()
        died = f"the process ended with {process.exitcode}"
    if found is None:
        process.kill()
    process.join()
    lost = {"kind": kind, "name": name, "verdict": "crash", "reason": f"{step}: {died}"}
    return lost if found is None else found


def _child(kind: str, name: str, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # models print
    os.dup2(1, 2)
    torch.set_num_threads(1)
    try:
        found = examine(kind, name, connection.send)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        found = {"kind": kind, "name": name, "verdict": "crash", "reason": reason}
    connection.send(found)


def stamp() -> str:
    """A digest of what a result depends on."""
    files = sorted((ROOT / "pymend").rglob("*.py"))
    files += [ROOT / f"tests/{name}.py" for name in ("architectures", "tiny", "trial", "sweep")]
    whole = hashlib.sha256(f"{version('transformers')} {torch.__version__}".encode())
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()


def kept(kind: str, name: str, now: str) -> Result:
    """The result of a case, from the last run if nothing has changed since."""
    path = KEPT / f"{kind}-{name}.json"
    if path.exists() and (found := json.loads(path.read_text())).pop("stamp") == now:
        return found
    found = run(kind, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | {"stamp": now}))
    return found


# -- the page --------------------------------------------------------------------------------------

HEAD = """# Architectures

All {count} model types that transformers {transformers} knows for three tasks, tried on {date} with
torch {torch}. Each is a tiny model with random weights: five blocks or six, float32, a padding id
that is not 0. `make architectures` makes this page anew.

What is held against the plain model, text by text: captured gradients, edits applied, merged and
undone, one by one and side by side, saved and loaded, as an adapter in PEFT, generation with a
cache, two steps of training, and that nothing is left behind. `--edit all` and, of experts,
`shared` were tried too.

* **edited**: the matrices of the last blocks that are edited where nobody says which.
* **prefix**: whether the blocks below are run once only; if not, every pass runs the whole model.
* **texts**: which can be edited at once; padding, or a text beside them, changes what some models
  say.
* **PEFT**: whether an edit can be written as an adapter; if not, merge it.

A model that is **refused** gives an error that says why, and what else can be edited. One that was
**not built** says nothing about pymend: it needs more than text, another package, or settings that
no default gives.
"""
TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoders",
    "classification": "Classifiers of text",
}


def page(results: dict[str, Any]) -> str:
    """The text of the page."""
    models = results["models"]
    text = HEAD.format(count=len(models), **results)
    for kind, title in TITLES.items():
        own = sorted((r for r in models if r["kind"] == kind), key=lambda r: r["name"])
        counts = Counter(r["verdict"] for r in own)
        text += f"\n## {title}\n{len(own)}: "
        text += ", ".join(f"{counts[v]} {v}" for v in reversed(VERDICTS) if counts[v]) + ".\n\n"
        text += _table(
            ("model type", "edited", "prefix", "texts", "PEFT"),
            [
                (
                    f"`{r['name']}`",
                    ", ".join(f"`{x}`" for x in r["edits"]),
                    "yes" if r["prefix"] else "no",
                    r["texts"],
                    "yes" if r["peft"] else "refused",
                )
                for r in own
                if r["verdict"] == "passed"
            ],
        )
        rest = [r for r in own if r["verdict"] != "passed"]
        if rest:
            lines = [(f"`{r['name']}`", r["verdict"], _cell(r["reason"])) for r in rest]
            text += "\n" + _table(("model type", "", "why"), lines)
    return text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"([|*_<>\[\]`$])", r"\\\1", " ".join(text.split()))


def main(names: Sequence[str]) -> int:
    """The command line; exit status 1 where there is a fault."""
    now, found = stamp(), []
    for kind, name in CASES:
        if not names:
            found.append(kept(kind, name, now))
        elif name in names:
            found.append(run(kind, name))
            print(json.dumps(found[-1], indent=1))
        else:
            continue
        print(f"{kind} {name}: {found[-1]['verdict']}", flush=True)
    if not names:
        head = {"transformers": version("transformers"), "torch": torch.__version__}
        results = {**head, "date": time.strftime("%Y-%m-%d"), "models": found}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")
    for kind in MAPPINGS:
        print(kind, dict(Counter(r["verdict"] for r in found if r["kind"] == kind)))
    faults = [r for r in found if r["verdict"] in FAULTS]
    for r in faults:
        print(f"{r['kind']} {r['name']}: {r['verdict']}: {r['reason']}")
    return bool(faults)


if __name__ == "__main__":
    # Under its own name, by which a child finds what it is to run.
    import sweep

    sys.exit(sweep.main(sys.argv[1:]))
