"""Tiny models, a toy tokenizer, and the bridge between the engine and ``pymend.reference``."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pymend import reference as ref
from pymend.algorithms.mend.mend import Mend
from pymend.config import EditRequest, MendConfig, Probe
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Batch, Row
from pymend.training.episodes import Episode

WORDS = tuple(f"{c}{v}" for c in "bdfgklmnprst" for v in "aeiou")[:57]
VOCAB = 4 + len(WORDS)  # 61, with <pad>, <unk>, <s> and </s>
# With these widths no tensor of the engine has the size of an edited weight by chance.
HIDDEN, INNER, CONTEXT = 22, 38, 32


def tokenizer(
    bos: bool = False, padding_side: str = "right", end: bool = False
) -> PreTrainedTokenizerFast:
    """Words between spaces are tokens; ``bos`` puts ``<s>`` in front, ``end`` ``</s>`` behind."""
    names = ["<pad>", "<unk>", "<s>", "</s>", *WORDS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", 2), ("</s>", 3)]
    frame = "<s> " * bos + "$A" + " </s>" * end
    inner.post_processor = processors.TemplateProcessing(frame, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side=padding_side,
    )


def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **kw: Any) -> Any:
    """A model with random weights large enough that its logits differ from token to token."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model(
        model_type, **{"vocab_size": VOCAB, "initializer_range": 0.3, **ids, **kw}
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def gpt2(layers: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """GPT-2, whose matrices are stored [in, out]."""
    sizes = {"n_embd": HIDDEN, "n_inner": INNER, "n_head": 2, "n_layer": layers}
    return build("gpt2", dtype, seed, n_positions=CONTEXT, **sizes)


def llama(layers: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Llama, whose MLP has three matrices of two shapes."""
    model = build(
        "llama",
        dtype,
        seed,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        num_hidden_layers=layers,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    return exact_norms(model) if dtype == torch.float64 else model


def exact_norms(model: Any) -> Any:
    """RMS norms in the model's own precision: those of transformers round to float32."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


FAMILY = {"gpt2": gpt2, "llama": llama}
# Of the editor's networks, as settings of MEND.
VARIANTS: list[dict[str, Any]] = [
    {"combine": False},
    {"combine": False, "one_sided": True},
    {"combine": False, "x_only": True},
    {"combine": False, "delta_only": True},
    {"norm": False},
    {"init": "xavier"},
]


def random_row(rng: random.Random, length: int, answer: int) -> Row:
    """``length`` random tokens; the last ``answer`` of them are labels; 0: no answer."""
    ids = tuple(rng.randrange(4, VOCAB) for _ in range(length))
    return Row(ids, length - answer - 1) if answer else Row(ids, 0, answer=False)


def random_episodes(count: int, edits: int = 1, seed: int = 0) -> list[Episode]:
    """Episodes of rows of different lengths; every other locality row has no answer."""
    rng = random.Random(seed)

    def rows() -> tuple[Row, ...]:
        return tuple(random_row(rng, rng.randint(5, 9), rng.randint(1, 3)) for _ in range(edits))

    def kept(answer: int) -> tuple[Row, ...]:
        return tuple(random_row(rng, rng.randint(4, 8), answer) for _ in range(edits))

    return [Episode(rows(), rows(), kept(2 if i % 2 else 0)) for i in range(count)]


def facts(count: int, seed: int = 0, locality: bool = True, old: bool = True) -> list[EditRequest]:
    """Made-up facts; a record's target, rephrases and locality prompts are random words."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        subject = f"{WORDS[i % len(WORDS)]} {WORDS[(i // len(WORDS) + 3 * i) % len(WORDS)]}"
        a, b, c, *rest = rng.sample(WORDS, 8)
        probes = (Probe(f"{rest[0]} {a}", rest[1]), Probe(f"{rest[2]} {rest[3]} {b}"))
        records.append(
            EditRequest(
                prompt=f"{a} {subject}",
                target=" ".join(rng.sample(WORDS, 1 + i % 2)),
                ground_truth=rest[4] if old else None,
                subject=subject,
                rephrases=(f"{b} {c} {subject}", f"{subject} {c}"),
                locality=probes if locality else (),
            )
        )
    return records


def tiny_mend(model: nn.Module, moved: float = 0.05, **config: Any) -> Mend:
    """An editor whose parameters lie off their start by ``moved``, in the model's precision."""
    torch.manual_seed(1)
    mend = Mend.from_config(model, MendConfig(**{"rank": 7, "alpha": 0.01, **config}))
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    mend.editor.nets.to(dtype)
    for net in mend.editor.nets.values():
        net.moments.to(torch.float32 if mend.config.official else torch.float64)
    with torch.no_grad():
        for p in mend.editor.nets_parameters():
            p += moved * torch.randn_like(p)
        mend.editor.alpha.data = mend.editor.alpha.data.to(dtype)
    return mend


def seasoned_mend(model: nn.Module, **config: Any) -> Mend:
    """A ``tiny_mend`` whose running moments have seen some rows, so that it can edit."""
    mend = tiny_mend(model, **config)
    season(mend, model)
    return mend


def season(mend: Mend, model: nn.Module) -> None:
    """Let the running moments see a few random rows."""
    rng = random.Random(5)
    rows = [random_row(rng, 8, 2) for _ in range(12)]
    with frozen(model), torch.no_grad():
        replay = Replay(model, mend.weights)
        replay.load(rows)
        mend.factors(mend.capture(replay, rows, len(rows)), merge=True)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every parameter and buffer has its former bits, and its former shape and dtype."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        now = after[name]
        assert now.dtype == value.dtype and now.shape == value.shape, name
        assert bits(now).equal(bits(value)), f"{name} changed"


def bits(x: Tensor) -> Tensor:
    """The bytes of ``x``, so that NaN equals itself and 0 does not equal -0."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


@contextmanager
def traceless(model: nn.Module) -> Iterator[None]:
    """Weights, flags, hooks, ``forward`` methods and ``use_cache`` are the same afterwards.

    The model goes in with mixed flags, so that setting them all alike shows.
    """
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.Dropout | nn.ModuleList)).training = False
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
    before, state = snapshot(model), _traces(model)
    yield
    assert_same_bits(model, before)
    assert _traces(model) == state
    model.eval()
    model.requires_grad_(False)


def _traces(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "forward": ["forward" in m.__dict__ for m in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
    }


@torch.no_grad()
def logits_of(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Plain logits [rows, tokens, vocabulary] of a right-padded batch."""
    batch = Batch.of(rows)
    # A cache makes some attentions multiply tensors of other strides, which other bits come from.
    return model(**batch.inputs, use_cache=False).logits


def replayed_logits(replay: Replay, batch: Batch) -> Tensor:
    """Logits [labels, vocabulary] from what ``replay`` hands to the losses."""
    rows = replay.label_rows(batch)
    return rows.values if rows.head is None else rows.head(rows.values)


# ------------------------------------------------------------------- the reference's view of it


def reference_batch(rows: Iterable[Row]) -> dict[str, Tensor]:
    """Rows as the reference takes them: right-padded, labels -100 where nothing is asked."""
    rows = list(rows)
    # The reference reads whole rows, the engine leaves out an answer's last token.
    batch = Batch.of([Row(row.ids, answer=False) for row in rows])
    labels = torch.full_like(batch.inputs["input_ids"], ref.IGNORED)
    for i, row in enumerate(rows):
        if row.answer:
            labels[i, row.first + 1 : len(row.ids)] = torch.tensor(row.ids[row.first + 1 :])
    return {**batch.inputs, "labels": labels}


def official_name(name: str) -> str:
    """A parameter of an ``EditorNet`` by the name the reference and the paper's code give it."""
    net, layer, part = name.split(".")
    net = {"joint": "mlp", "u_side": "mlp1", "delta_side": "mlp2"}[net]
    part = {"scale": "mode_scale.weight", "shift": "mode_shift.weight"}.get(part, part)
    return f"{net}.layers.{layer}.{part}"


def reference_key(mend: Mend, key: str) -> ref.Key:
    """How the reference calls the network ``key`` of the engine."""
    first = mend.editor.groups[key][0]
    return first.shape if mend.config.shared else first.name


def reference_params(mend: Mend) -> dict[ref.Key, ref.Params]:
    """Copies of the editor's parameters as the reference wants them."""
    return {
        reference_key(mend, key): {
            official_name(n): p.detach().clone() for n, p in net.named_parameters()
        }
        for key, net in mend.editor.nets.items()
    }


def reference_moments(mend: Mend) -> dict[ref.Key, ref.Moments]:
    """What the moments of every network have seen, as moments of the reference."""
    copies = {}
    for key, net in mend.editor.nets.items():
        moments, own = ref.Moments(net.a, net.b, official=mend.config.official), net.moments
        moments.k = own.count.detach().to(moments.k.dtype)
        for side, values in (("mean", own.mean), ("s", own.m2)):
            u, delta = values.detach().to(moments.u_mean.dtype).split([net.a, net.b])
            setattr(moments, f"u_{side}", u.clone())
            setattr(moments, f"delta_{side}", delta.clone())
        copies[reference_key(mend, key)] = moments
    return copies


def load_reference_params(mend: Mend, params: dict[ref.Key, ref.Params]) -> None:
    """The inverse of :func:`reference_params`."""
    with torch.no_grad():
        for key, net in mend.editor.nets.items():
            given = params[reference_key(mend, key)]
            own = dict(net.named_parameters())
            assert {official_name(n) for n in own} == given.keys()
            for name, p in own.items():
                p.copy_(given[official_name(name)])


def rel_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; absolute where expected is 0."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} for {expected.shape}"
    difference = (actual.detach().double() - expected.detach().double()).norm().item()
    scale = expected.detach().double().norm().item()
    return difference / scale if scale else difference


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    """Relative Euclidean error at most ``tolerance``."""
    error = rel_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_moments(
    net: nn.Module, expected: ref.Moments | dict[str, Tensor], what: str, tolerance: float
) -> None:
    """Moments of an ``EditorNet`` against the reference's or recorded ones (v means delta)."""
    if isinstance(expected, ref.Moments):
        e = expected
        expected = {"k": e.k, "u_mean": e.u_mean, "u_std": e.u_std}
        expected |= {"v_mean": e.delta_mean, "v_std": e.delta_std}
    own = net.moments
    assert own.count.item() == expected["k"].item(), f"{what}: rows seen"
    mean = own.mean.split([net.a, net.b])
    std = (own.m2 / (own.count - 1).clamp(min=1)).sqrt().split([net.a, net.b])
    for i, side in enumerate("uv"):
        assert_close(mean[i], expected[f"{side}_mean"], f"{what} {side} mean", tolerance)
        assert_close(std[i], expected[f"{side}_std"], f"{what} {side} std", tolerance)
