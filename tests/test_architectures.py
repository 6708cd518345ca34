"""Every architecture of transformers is edited right, or refused by name; and the page says so."""

from __future__ import annotations

import json
import re

import pytest
import sweep
import transformers
from architectures import CASES

RESULTS = json.loads(sweep.RESULTS.read_text(encoding="utf-8"))
KNOWN = {(r["kind"], r["name"]): r for r in RESULTS["models"]}
OURS = RESULTS["transformers"] == transformers.__version__


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_architecture_is_edited_right_or_refused_by_name(kind: str, name: str) -> None:
    found = sweep.run(kind, name)
    assert found["verdict"] not in sweep.FAULTS, found["reason"]
    if OURS and found["verdict"] != "not built":  # which depends on what else is installed
        assert found == KNOWN[kind, name]


def test_the_page_shows_the_results() -> None:
    assert sweep.PAGE.read_text(encoding="utf-8") == sweep.page(RESULTS)


def test_the_results_are_of_every_architecture() -> None:
    if not OURS:
        pytest.skip(f"the page is of transformers {RESULTS['transformers']}")
    assert sorted(KNOWN) == sorted(CASES)


def test_there_is_no_fault() -> None:
    assert not [r for r in RESULTS["models"] if r["verdict"] in sweep.FAULTS]


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("gpt_oss", "mlp.experts."),
        ("qwen3_5_moe_text", "mlp.shared_expert."),
        ("minimax_m2", "mlp.experts."),
        ("qwen3_next", "mlp.shared_expert."),
        ("glm4_moe", "mlp.shared_experts."),
        ("modernbert-decoder", "mlp."),
        ("jamba", "feed_forward."),
    ],
)
def test_known_models_are_edited_in_experts_or_mlp(name: str, inside: str) -> None:
    edits = KNOWN["causal", name]["edits"]
    assert edits and all(edit.startswith(inside) for edit in edits)


def test_attention_is_edited_nowhere_unasked() -> None:
    attention = re.compile(r"attn|attention|query|key|value|[qkvo]_proj")
    passed = {name: r for (_, name), r in KNOWN.items() if r["verdict"] == "passed"}
    # RWKV's way up is a key, and its way down a value.
    asked = {name: [e for e in r["edits"] if "feed_forward" not in e] for name, r in passed.items()}
    odd = [name for name, edits in asked.items() if any(map(attention.search, edits))]
    assert odd == ["mobilebert"]  # whose values have the shape of its ways up
