"""The whole of MEND in plain PyTorch: the float64 oracle, and the explanation.

Source: "Fast Model Editing at Scale", Mitchell, Lin, Bosselut, Finn, Manning, ICLR 2022. Dense and
slow on purpose; read it from top to bottom. Nothing here is used when the package runs.

Symbols. An edited weight W_l (l = 1..M, in the order of ``names``) maps a layer input u in R^a to
an output in R^b; delta in R^b is the gradient of the edit loss with respect to that output; t runs
over the kept token rows; D = a + b; r is the editor's rank. W is written [b, a] (``nn.Linear``);
a ``Conv1D`` of GPT-2 stores its transpose. A *batch* is a mapping with ``input_ids``,
``attention_mask`` and ``labels``, all int64 [B, T]; labels are the input ids with -100 where no
token is asked for, and everything but the labels goes to the model.

``official=True`` follows the numeric conventions of the paper's own code: the update is added, the
moments are float32 and divide by sigma + 1e-7 even where sigma is 0, the inner loss of k edits is
one token mean, and the locality loss is taken at all non-pad positions.

Precision: every function computes in the dtype it is given, at least float32. With a float64 model
and float64 editor parameters everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Params = dict[str, Tensor]  # of one editor network, by the official names
Key = tuple[int, int] | str  # of an editor network: (a, b) when shared, else the weight's name

IGNORED = -100  # label of a position that asks for no token
EPS = 1e-7  # added to sigma
CONSTANT = 1e-6  # a dimension whose deviation is below this share of its mean is constant


# ------------------------------------------------------------------------------ the base model


def owner(model: nn.Module, name: str) -> nn.Module:
    """The module that owns the weight ``name``.

    Raises:
        AttributeError: the model has no such module.
    """
    return model.get_submodule(name.rpartition(".")[0])


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether the weight is stored [a, b], as a ``Conv1D`` does, instead of [b, a].

    Raises:
        ValueError: the owning module is neither an ``nn.Linear`` nor a ``Conv1D``.
    """
    module = owner(model, name)
    if isinstance(module, nn.Linear):
        return False
    if hasattr(module, "nf"):  # a Conv1D knows its output width by this name
        return True
    raise ValueError(f"{name}: its module is {type(module).__name__}, not a Linear or Conv1D")


def layer_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """(a, b): input and output width of the layer that owns the weight ``name``."""
    rows, columns = model.get_parameter(name).shape
    return (rows, columns) if is_transposed(model, name) else (columns, rows)


def logits_of(model: nn.Module, batch: Batch, edited: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits [B, T, V] of ``batch``, with the weights in ``edited`` in place of the model's."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    out = torch.func.functional_call(model, dict(edited or {}), kwargs=inputs)
    logits: Tensor = out.logits if hasattr(out, "logits") else out
    return logits


# ----------------------------------------------------------------------------------- the losses


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of every asked token, 0 elsewhere, and the mask of asked tokens; both [B, T - 1].

    Logits at position t predict the label at t + 1.

    Raises:
        ValueError: an example asks for no token.
    """
    mask = labels[:, 1:] != IGNORED
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"example {empty[0]} of the batch has no label to learn")
    log_p = _at_least_float32(logits[:, :-1]).log_softmax(-1)
    target = labels[:, 1:].masked_fill(~mask, 0)
    return -log_p.gather(-1, target[..., None])[..., 0] * mask, mask


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood, the mean over all asked tokens of the batch (Eq. 4, L_e).

    Args:
        logits: [B, T, V]; labels: int64 [B, T].

    Raises:
        ValueError: an example asks for no token.
    """
    losses, mask = _token_nll(logits, labels)
    return losses.sum() / mask.sum()


def edit_loss(logits: Tensor, labels: Tensor, official: bool = False) -> Tensor:
    """The loss whose gradient is edited: the token mean per example, summed over examples.

    So the delta of an example does not depend on its batch mates, and k edits are the sum of k
    single ones. ``official``: one token mean over the batch, which shrinks delta like 1 / k.
    """
    if official:
        return nll(logits, labels)
    losses, mask = _token_nll(logits, labels)
    return (losses.sum(1) / mask.sum(1)).sum()


def kl(base_logits: Tensor, edited_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(base || edited), the mean over the positions in ``mask`` (Eq. 4, L_loc); no shift.

    Args:
        base_logits, edited_logits: [B, T, V]; mask: [B, T], non-zero where a position counts.
            The base side is a constant. A token whose p is 0 adds nothing.
    """
    log_p = _at_least_float32(base_logits.detach()).log_softmax(-1)
    log_q = _at_least_float32(edited_logits).log_softmax(-1)
    p = log_p.exp()
    per_position = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    mask = mask.to(per_position.dtype)
    return (per_position * mask).sum() / mask.sum()


def locality_mask(batch: Batch, official: bool = False) -> Tensor:
    """Where the locality loss looks, bool [B, T]: at the positions that predict an answer token.

    An example without labels, and every example when ``official``: all its non-pad positions.
    """
    not_pad = batch["attention_mask"].bool()
    if official or "labels" not in batch:
        return not_pad
    answers = torch.zeros_like(not_pad)
    answers[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return torch.where(answers.any(1, keepdim=True), answers, not_pad)


def exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the examples whose every asked token is the argmax (teacher forced; Eq. 1)."""
    mask = labels[:, 1:] != IGNORED
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return (right | ~mask).all(1).double().mean()


# ---------------------------------------------------------------------------------- the gradient


def kept_rows(u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over batch and time, [..., a] and [..., b] -> [n, a] and [n, b], without the dead ones.

    A row is dead when its u or its delta is zero everywhere: padding, and positions that no label
    depends on. It would add nothing to the gradient. This is the only masking.
    """
    u, delta = u.flatten(0, -2), delta.flatten(0, -2)
    alive = (u != 0).any(-1) & (delta != 0).any(-1)
    return u[alive], delta[alive]


def capture(
    model: nn.Module, names: Sequence[str], batch: Batch, official: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of the edit gradient of every weight: dL/dW_l = sum_t delta_t u_t^T (Eq. 2).

    The model is left as it was. Dropout acts if the model is in training mode.

    Returns:
        name -> (u [n, a], delta [n, b]), detached, at least float32. A module that is called
        several times gives the rows of all calls (``official``: of the last one).

    Raises:
        ValueError: an example has no label, or a weight is not of a Linear or Conv1D.
        RuntimeError: a named module takes no part in the forward pass.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            u = args[0] if args else next(iter(kwargs.values()))
            calls[name].append((u.detach(), output))

        return record

    for name in names:
        layer_shape(model, name)  # refuses a weight that cannot be edited
    weights = [model.get_parameter(name) for name in names]
    flags = [w.requires_grad for w in weights]
    handles = [owner(model, n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    try:
        for w in weights:
            w.requires_grad_(True)  # so that the outputs of a frozen model have a graph
        with torch.enable_grad():
            loss = edit_loss(logits_of(model, batch), batch["labels"], official)
        for name, made in calls.items():
            if not made:
                raise RuntimeError(f"{name}: its module takes no part in the forward pass")
        outputs = [y for made in calls.values() for _, y in made]
        deltas = iter(torch.autograd.grad(loss, outputs, materialize_grads=True))
    finally:
        for handle in handles:
            handle.remove()
        for w, flag in zip(weights, flags, strict=True):
            w.requires_grad_(flag)

    factors = {}
    for name, made in calls.items():
        pairs = [kept_rows(_at_least_float32(u), _at_least_float32(next(deltas))) for u, _ in made]
        pairs = pairs[-1:] if official else pairs
        factors[name] = (torch.cat([u for u, _ in pairs]), torch.cat([d for _, d in pairs]))
    return factors


# --------------------------------------------------------------------------------- normalisation


class Moments:
    """Running mean and standard deviation of u and of delta, per dimension (section 3.2).

    Welford's recurrence, row by row. The state is float64 with an int64 count; ``official``: all
    float32. ``dtype`` overrides the float type.

    Attributes:
        k: rows seen. u_mean, u_s [a] and delta_mean, delta_s [b]: mean and sum of squared
            deviations.
    """

    def __init__(
        self,
        a: int,
        b: int,
        *,
        official: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        dtype = dtype or (torch.float32 if official else torch.float64)
        self.official = official
        self.k = torch.zeros((), dtype=torch.float32 if official else torch.int64, device=device)
        self.u_mean = torch.zeros(a, dtype=dtype, device=device)
        self.u_s = torch.zeros_like(self.u_mean)
        self.delta_mean = torch.zeros(b, dtype=dtype, device=device)
        self.delta_s = torch.zeros_like(self.delta_mean)

    def update(self, u: Tensor, delta: Tensor) -> None:
        """Take in the rows u [n, a] and delta [n, b], in order."""
        u, delta = u.detach().to(self.u_mean.dtype), delta.detach().to(self.u_mean.dtype)
        for u_t, delta_t in zip(u, delta, strict=True):
            self.k = self.k + 1
            self.u_mean, self.u_s = self._welford(self.u_mean, self.u_s, u_t)
            self.delta_mean, self.delta_s = self._welford(self.delta_mean, self.delta_s, delta_t)

    def _welford(self, mean: Tensor, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new_mean = mean + (x - mean) / self.k
        return new_mean, s + (x - mean) * (x - new_mean)

    @property
    def u_std(self) -> Tensor:
        """Sample standard deviation of u, [a]."""
        return self._std(self.u_s)

    @property
    def delta_std(self) -> Tensor:
        """Sample standard deviation of delta, [b]."""
        return self._std(self.delta_s)

    def _std(self, s: Tensor) -> Tensor:
        return (s / (self.k - 1).clamp(min=1)).sqrt()

    def normalise(self, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(x - mean) / (sigma + 1e-7) for u [n, a] and delta [n, b], in their own dtype.

        A dimension that never moved normalises to 0 (``official``: it is divided by 1e-7).
        """
        return (
            self._normalise(u, self.u_mean, self.u_s),
            self._normalise(delta, self.delta_mean, self.delta_s),
        )

    def _normalise(self, x: Tensor, mean: Tensor, s: Tensor) -> Tensor:
        x_bar = (x - mean) / (self._std(s) + EPS)
        if not self.official:
            constant = (s == 0) | (s <= self.k * (CONSTANT * mean.abs()) ** 2)
            x_bar = x_bar.masked_fill(constant, 0)
        return x_bar.to(x.dtype)


# ---------------------------------------------------------------------------- the editor network


def nets_of(
    a: int,
    b: int,
    *,
    combine: bool = True,
    one_sided: bool = False,
    x_only: bool = False,
    delta_only: bool = False,
) -> dict[str, int]:
    """The networks of one editor and their widths: ``mlp``, or ``mlp1`` on u, ``mlp2`` on delta.

    ``one_sided`` keeps the narrower side, u when both are equal.
    """
    if combine:
        return {"mlp": a + b}
    on_u = not delta_only and not (one_sided and a > b)
    on_delta = not x_only and not (one_sided and a <= b)
    return ({"mlp1": a} if on_u else {}) | ({"mlp2": b} if on_delta else {})


def init_params(
    a: int,
    b: int,
    rank: int,
    n_modes: int | None,
    *,
    init: str = "id",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    **sides: bool,
) -> Params:
    """Start of one editor: per layer U [D, r], V [r, D], bias [D], and per mode scale and shift.

    ``init="id"``: U = 0 and V ~ N(0, 1), so the network is the identity. ``"xavier"``: no identity
    (section 5.3, ablation). ``rank`` is cut to D. ``n_modes=None``: no scale and shift.
    ``sides``: as in ``nets_of``.
    """
    params: Params = {}
    for net, width in nets_of(a, b, **sides).items():
        r = min(rank, width)
        for i in range(2):
            u, v = torch.zeros(width, r, dtype=dtype), torch.empty(r, width, dtype=dtype)
            if init == "id":
                nn.init.normal_(v, generator=generator)
            else:
                nn.init.xavier_uniform_(u, gain=math.sqrt(2), generator=generator)
                nn.init.xavier_uniform_(v, generator=generator)
            layer = {"u": u, "v": v, "bias": torch.zeros(width, dtype=dtype)}
            if n_modes is not None:
                layer["mode_scale.weight"] = torch.ones(n_modes, width, dtype=dtype)
                layer["mode_shift.weight"] = torch.zeros(n_modes, width, dtype=dtype)
            params |= {f"{net}.layers.{i}.{name}": value for name, value in layer.items()}
    return params


def layers_of(params: Params, net: str) -> list[Params]:
    """The two layers of the network ``net`` with the prefix taken off their names."""
    prefixes = [f"{net}.layers.{i}." for i in range(2)]
    return [{k[len(p) :]: v for k, v in params.items() if k.startswith(p)} for p in prefixes]


def transform(
    z: Tensor, layers: Sequence[Params], mode: int | None, residual: bool = True
) -> Tensor:
    """The editor network g (Eq. 3a, 3b), applied to every row of z [n, D].

    Per layer: p = s * (U V x + b) + o with the scale s and shift o of this weight's mode, then
    y = x + max(p, 0). ``residual=False``: y = max(p, 0).
    """
    for layer in layers:
        p = z @ layer["v"].T @ layer["u"].T + layer["bias"]
        if mode is not None:
            p = layer["mode_scale.weight"][mode] * p + layer["mode_shift.weight"][mode]
        # clamp, not relu: its derivative at 0 is 1, and at the identity start p is 0 everywhere
        z = z + p.clamp(min=0) if residual else p.clamp(min=0)
    return z


def editor_forward(
    u: Tensor,
    delta: Tensor,
    params: Params,
    moments: Moments | None,
    mode: int | None,
    *,
    combine: bool = True,
    one_sided: bool = False,
    x_only: bool = False,
    delta_only: bool = False,
    norm: bool = True,
    init: str = "id",
) -> tuple[Tensor, Tensor]:
    """(u_t, delta_t) -> (u~_t, d~_t) for the kept rows u [n, a] and delta [n, b] of one weight.

    A side without a network passes through as its normalised value. The result is not
    de-normalised. ``norm=False`` skips the normalisation (``moments`` may be None then).
    """
    a, b = u.shape[-1], delta.shape[-1]
    nets = nets_of(a, b, combine=combine, one_sided=one_sided, x_only=x_only, delta_only=delta_only)
    residual = init == "id"
    if norm:
        assert moments is not None
        u, delta = moments.normalise(u, delta)
    if combine:
        y = transform(torch.cat([u, delta], -1), layers_of(params, "mlp"), mode, residual)
        return y[:, :a], y[:, a:]
    if "mlp1" in nets:
        u = transform(u, layers_of(params, "mlp1"), mode, residual)
    if "mlp2" in nets:
        delta = transform(delta, layers_of(params, "mlp2"), mode, residual)
    return u, delta


# --------------------------------------------------------------------------------------- the edit


def rank_update(
    W: Tensor, u: Tensor, delta: Tensor, alpha: Tensor | float, transposed: bool = False
) -> Tensor:
    """W - alpha * sum_t delta_t u_t^T, a new tensor in W's dtype (section 3.1).

    Args:
        W: [b, a], or [a, b] when ``transposed``; u: [n, a]; delta: [n, b].
    """
    gradient = torch.einsum("tb,ta->ba", delta, u)
    return (W - alpha * (gradient.T if transposed else gradient)).to(W.dtype)


def adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step number ``step`` (from 1) of Adam (Kingma & Ba 2015, Algorithm 1), the outer optimiser.

    Returns:
        The new param, exp_avg and exp_avg_sq.
    """
    exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient**2
    mean, mean_square = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    return param - lr * mean / (mean_square.sqrt() + eps), exp_avg, exp_avg_sq


def nets_for(
    model: nn.Module, names: Sequence[str], shared: bool = True
) -> list[tuple[Key, int | None]]:
    """The editor network of every weight, and the weight's mode in it.

    Shared: one network per (a, b), the mode is the position among the weights of that shape. Not
    shared: one per weight, without modes.
    """
    if not shared:
        return [(name, None) for name in names]
    seen: dict[tuple[int, int], int] = {}
    nets: list[tuple[Key, int | None]] = []
    for name in names:
        shape = layer_shape(model, name)
        nets.append((shape, seen.get(shape, 0)))
        seen[shape] = seen.get(shape, 0) + 1
    return nets


def init_editor(
    model: nn.Module,
    names: Sequence[str],
    rank: int,
    *,
    alpha: float = 1e-4,
    shared: bool = True,
    official: bool = False,
    generator: torch.Generator | None = None,
    **variant: Any,
) -> tuple[dict[Key, Params], Tensor, dict[Key, Moments]]:
    """An untrained editor for the weights ``names``: parameters, alphas [M] and moments.

    All in the dtype of the first weight, at least float32, on the CPU. ``variant``: the keyword
    arguments of ``init_params``.
    """
    nets = nets_for(model, names, shared)
    modes = dict(nets)  # the last mode of each network
    shapes = {key: layer_shape(model, n) for (key, _), n in zip(nets, names, strict=True)}
    n_modes = {key: None if mode is None else mode + 1 for key, mode in modes.items()}
    dtype = torch.promote_types(model.get_parameter(names[0]).dtype, torch.float32)
    start = {"generator": generator, "dtype": dtype, **variant}
    params = {key: init_params(a, b, rank, n_modes[key], **start) for key, (a, b) in shapes.items()}
    moments = {key: Moments(a, b, official=official) for key, (a, b) in shapes.items()}
    return params, torch.full((len(names),), alpha, dtype=dtype), moments


def edited_weights(
    model: nn.Module,
    names: Sequence[str],
    params: Mapping[Key, Params],
    alphas: Tensor,
    moments: Mapping[Key, Moments],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    train: bool = False,
    official: bool = False,
    **variant: Any,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Algorithm 1 after the capture: factors -> pseudo-factors -> edited weights.

    ``train``: the factors first enter the moments, weight by weight in the order of ``names``, so
    weights that share moments see those of the weights before them. ``official``: adds the update.

    Returns:
        name -> (u~ [n, a], d~ [n, b]) and name -> W' in the layout of W. Differentiable in
        ``params`` and ``alphas``.
    """
    tilde, edited = {}, {}
    nets = nets_for(model, names, shared=names[0] not in params)
    for (key, mode), name, alpha in zip(nets, names, alphas, strict=True):
        u, delta = factors[name]
        if train:
            moments[key].update(u, delta)
        tilde[name] = editor_forward(u, delta, params[key], moments[key], mode, **variant)
        W = model.get_parameter(name).detach()
        step = -alpha if official else alpha
        edited[name] = rank_update(W, *tilde[name], step, is_transposed(model, name))
    return tilde, edited


def train_step(
    model: nn.Module,
    names: Sequence[str],
    params: Mapping[Key, Params],
    alphas: Tensor,
    moments: Mapping[Key, Moments],
    edit_inner: Batch,
    edit_outer: Batch | Sequence[Batch],
    loc: Batch,
    *,
    c_edit: float = 0.1,
    c_loc: float = 1.0,
    official: bool = False,
    **variant: Any,
) -> dict[str, Any]:
    """One episode of training (Algorithm 2): edit, then c_edit * NLL + c_loc * KL and its gradient.

    Only ``moments`` changes, in place. B independent episodes are B calls. Several ``edit_outer``
    batches give the mean of their NLLs. ``variant``: the keyword arguments of ``editor_forward``.

    Args:
        params, moments: by (a, b), or by weight name when not shared; alphas: [M].

    Returns:
        ``factors`` and ``tilde``: name -> pair; ``edited``: name -> W'; ``base_logits``,
        ``loc_logits`` [B, T, V], ``outer_logits``: a list; ``nll``, ``kl``, ``total``: scalars;
        ``grads``: key -> name -> gradient, ``alpha_grads`` [M]. All detached.

    Raises:
        ValueError, RuntimeError: as ``capture``.
    """
    outers = [edit_outer] if isinstance(edit_outer, Mapping) else list(edit_outer)
    leaves = {
        key: {name: p.detach().requires_grad_() for name, p in net.items()}
        for key, net in params.items()
    }
    alphas = alphas.detach().requires_grad_()

    with torch.no_grad():
        base_logits = logits_of(model, loc)
    factors = capture(model, names, edit_inner, official)
    with torch.enable_grad():
        tilde, edited = edited_weights(
            model, names, leaves, alphas, moments, factors, train=True, official=official, **variant
        )
        outer_logits = [logits_of(model, outer, edited) for outer in outers]
        loc_logits = logits_of(model, loc, edited)
        losses = [nll(y, o["labels"]) for y, o in zip(outer_logits, outers, strict=True)]
        l_e = torch.stack(losses).mean()
        l_loc = kl(base_logits, loc_logits, locality_mask(loc, official))
        total = c_edit * l_e + c_loc * l_loc

    flat = [(key, name) for key, net in leaves.items() for name in net]
    targets = [leaves[key][name] for key, name in flat] + [alphas]
    gradients = torch.autograd.grad(total, targets, materialize_grads=True)
    grads: dict[Key, Params] = {key: {} for key in leaves}
    for (key, name), gradient in zip(flat, gradients[:-1], strict=True):
        grads[key][name] = gradient
    return {
        "factors": factors,
        "tilde": {name: (u.detach(), d.detach()) for name, (u, d) in tilde.items()},
        "edited": {name: W.detach() for name, W in edited.items()},
        "base_logits": base_logits,
        "outer_logits": [y.detach() for y in outer_logits],
        "loc_logits": loc_logits.detach(),
        "nll": l_e.detach(),
        "kl": l_loc.detach(),
        "total": total.detach(),
        "grads": grads,
        "alpha_grads": gradients[-1],
    }
