"""Write ``tests/fixtures``: inputs and outputs of ``pymend/reference.py``, computed in float64.

They guard the numerics of every back end without any file from outside the repository. Run it
only when the reference changed on purpose: ``python tools/make_fixtures.py``.

* ``transform.safetensors``, ``transform-official.safetensors``: the gradient transform alone, in
  its default variant, with the default and with the official moments.
  ``train{i}.*``: training calls in order, with the moments after each; ``eval.*``: one evaluation
  call with cotangents and the gradient of every parameter.
* ``step-<case>.safetensors``: whole training steps on a tiny model whose weights are included
  (``model.*``). ``step{i}.inner.*``, ``.outer{j}.*``, ``.loc.*``: the batches; the rest is named as
  in the result of ``reference.train_step``, and ``step{i}.moments.*`` are the moments after it.

All values of inputs are exact in float32, and the weights of models and editors in
``step-*`` are stored so; widen them to float64. Outputs are float64. ``fixtures.json`` holds the
settings of every case. Editor tensors carry the official names; ``(a, b)`` is a network's key.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pymend import reference as ref  # noqa: E402

FOLDER = ROOT / "tests" / "fixtures"
A, B, RANK, N_MODES = 7, 9, 4, 2
CALLS: dict[str, Any] = {"train_modes": [0, 1, 0], "eval_mode": 1}

TRANSFORM: dict[str, dict[str, Any]] = {
    "transform": {"official": False},
    "transform-official": {"official": True},
}

GPT2 = {
    "model_type": "gpt2",
    "n_embd": 8,
    "n_inner": 12,
    "n_head": 2,
    "n_layer": 3,
    "n_positions": 16,
    "vocab_size": 29,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "max_position_embeddings": 16,
    "vocab_size": 29,
    "tie_word_embeddings": True,
}
GPT2_NAMES = [f"transformer.h.{i}.mlp.{m}.weight" for i in (1, 2) for m in ("c_fc", "c_proj")]
LLAMA_NAMES = [
    f"model.layers.{i}.mlp.{m}.weight"
    for i in (1, 2)
    for m in ("gate_proj", "up_proj", "down_proj")
]
STEPS: dict[str, dict[str, Any]] = {
    # two edits at once with padding, both outer losses, locality on answers only
    "step-gpt2": {"config": GPT2, "names": GPT2_NAMES, "official": False},
    "step-llama": {"config": LLAMA, "names": LLAMA_NAMES, "official": False},
    "step-gpt2-official": {"config": GPT2, "names": GPT2_NAMES, "official": True},
}
C_EDIT, C_LOC, N_STEPS = 0.1, 1.0, 2


def rounded(x: Tensor) -> Tensor:
    """``x`` in float64 with a value that float32 stores exactly."""
    return x.float().double()


def off_start(start: ref.Params, generator: torch.Generator) -> ref.Params:
    """An editor away from its ``start``, where every parameter has a gradient."""
    noise = {name: torch.randn(p.shape, generator=generator) for name, p in start.items()}
    return {name: rounded(p + 0.1 * noise[name]) for name, p in start.items()}


def moments_tensors(moments: ref.Moments) -> dict[str, Tensor]:
    """The state of ``moments`` under the official names (``v`` means delta)."""
    return {
        "k": moments.k.reshape(1).double(),
        "u_mean": moments.u_mean.clone(),
        "u_std": moments.u_std,
        "v_mean": moments.delta_mean.clone(),
        "v_std": moments.delta_std,
    }


def transform_case(official: bool) -> dict[str, Tensor]:
    """Three training calls and one evaluation call of the default variant."""
    g = torch.Generator().manual_seed(1)
    start = ref.init_params(A, B, RANK, N_MODES, generator=g, dtype=torch.float64)
    params = off_start(start, g)
    out = {f"param.{name}": p.clone() for name, p in params.items()}
    moments = ref.Moments(A, B, official=official)

    for i, mode in enumerate(CALLS["train_modes"]):
        u = rounded(torch.randn(2, 4, A, generator=g))
        delta = rounded(0.1 * torch.randn(2, 4, B, generator=g))
        delta[0, :2] = 0  # positions that no label depends on
        u[1, 3] = 0  # padding
        u[..., 0] = torch.where(u[..., 0] == 0, 0.0, 0.5)  # a dimension that never moves
        rows = ref.kept_rows(u, delta)
        moments.update(*rows)
        u_out, delta_out = ref.editor_forward(*rows, params, moments, mode)
        call = {"u": u, "delta": delta, "u_out": u_out, "delta_out": delta_out}
        out |= {f"train{i}.{k}": v for k, v in (call | moments_tensors(moments)).items()}

    leaves = {name: p.requires_grad_() for name, p in params.items()}
    u = rounded(torch.randn(3, A, generator=g))
    u[:, 0] = 0.5  # official moments amplify any other value by 1e7
    delta = rounded(0.1 * torch.randn(3, B, generator=g))
    cot_u = rounded(torch.randn(3, A, generator=g))
    cot_delta = rounded(torch.randn(3, B, generator=g))
    u_out, delta_out = ref.editor_forward(u, delta, leaves, moments, CALLS["eval_mode"])
    total = (u_out * cot_u).sum() + (delta_out * cot_delta).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    call = {"u": u, "delta": delta, "cot_u": cot_u, "cot_delta": cot_delta}
    call |= {"u_out": u_out.detach(), "delta_out": delta_out.detach()}
    call |= {f"grad.{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return out | {f"eval.{k}": v for k, v in call.items()}


def tiny_model(config: dict[str, Any]) -> PreTrainedModel:
    """A float64 model in evaluation mode with weights large enough for an edit to matter."""
    torch.manual_seed(2)
    config = dict(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.double().eval()


def make_batch(lengths: list[int], answers: list[int], g: torch.Generator) -> dict[str, Tensor]:
    """Random rows padded on the right; the last ``answers[i]`` tokens of row i carry labels."""
    longest = max(lengths)
    ids = torch.randint(1, 29, (len(lengths), longest), generator=g)
    position = torch.arange(longest)
    length, answer = torch.tensor(lengths)[:, None], torch.tensor(answers)[:, None]
    mask = position < length
    asked = mask & (position >= length - answer)
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~asked, ref.IGNORED),
    }


def step_case(config: dict[str, Any], names: list[str], official: bool) -> dict[str, Tensor]:
    """Training steps whose moments build on each other."""
    model = tiny_model(config)
    g = torch.Generator().manual_seed(3)
    start, _, moments = ref.init_editor(model, names, RANK, official=official, generator=g)
    params = {key: off_start(net, g) for key, net in start.items()}
    alphas = rounded(0.003 * torch.randn(len(names), generator=g))

    out = {f"model.{k}": p.detach().float() for k, p in model.named_parameters()}
    out |= {f"editor.{key}.{k}": p.float() for key, net in params.items() for k, p in net.items()}
    out["alpha"] = alphas.float()
    for i in range(N_STEPS):
        inner = make_batch([7, 5], [3, 1], g)
        outers = [inner, make_batch([6, 8], [3, 1], g)]
        loc = make_batch([6, 5], [2, 0], g)
        r = ref.train_step(
            model, names, params, alphas, moments, inner, outers, loc,
            c_edit=C_EDIT, c_loc=C_LOC, official=official,
        )  # fmt: skip
        step: dict[str, Tensor] = {"nll": r["nll"], "kl": r["kl"], "total": r["total"]}
        for label, batch in (("inner", inner), ("outer1", outers[1]), ("loc", loc)):
            step |= {f"{label}.{k}": v for k, v in batch.items()}
        for name in names:
            step[f"u.{name}"], step[f"delta.{name}"] = r["factors"][name]
            step[f"u_tilde.{name}"], step[f"delta_tilde.{name}"] = r["tilde"][name]
            step[f"edited.{name}"] = r["edited"][name]
        for key, net in r["grads"].items():
            step |= {f"grad.{key}.{k}": v for k, v in net.items()}
            step |= {f"moments.{key}.{k}": v for k, v in moments_tensors(moments[key]).items()}
        step |= {"grad.alpha": r["alpha_grads"], "loc_logits": r["loc_logits"]}
        out |= {f"step{i}.{k}": v for k, v in step.items()}
    return out


def main() -> None:
    """Compute every case, write it, and print the size of every file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    cases = {name: transform_case(**case) for name, case in TRANSFORM.items()}
    cases |= {name: step_case(**case) for name, case in STEPS.items()}
    for name, tensors in cases.items():
        save_file(
            {k: v.detach().contiguous().clone() for k, v in tensors.items()},
            FOLDER / f"{name}.safetensors",
        )
    about = {
        "source": "pymend/reference.py in float64; written by tools/make_fixtures.py",
        "rank": RANK,
        "transform": {
            name: {**case, "a": A, "b": B, "n_modes": N_MODES, **CALLS}
            for name, case in TRANSFORM.items()
        },
        "step": {
            name: {**case, "steps": N_STEPS, "c_edit": C_EDIT, "c_loc": C_LOC,
                   "outer": ["inner", "outer1"]}
            for name, case in STEPS.items()
        },
    }  # fmt: skip
    (FOLDER / "fixtures.json").write_text(json.dumps(about, indent=1) + "\n")
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
