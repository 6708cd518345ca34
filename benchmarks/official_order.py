"""The rival: dense MEND in the order of work of the paper's own code.

Written for this project from a description of what that code computes, in which order and with
which copies (``eric-mitchell/mend``, commit e04fdb9); no line of it is taken over. It gives the
numbers of ``reference.train_step(official=True)`` (a test says so) and spends what the original
spends, so that a benchmark against it is a benchmark against the method as published:

1.  a base forward on the locality batch, at full length with the full head;
2.  a forward on the edit batch and ``loss.backward()`` into *all* base parameters;
3.  the moments in a Python loop over rows, and the editor network once per matrix;
4.  dense true and pseudo gradients, and six logged diagnostics per matrix, each read with
    ``.item()``;
5.  dense edited weights, and a functional copy of the model with its full parameter dictionary;
6.  two more full forwards (outer, locality) through the copy, every activation kept;
7.  log-softmax once for the loss, again for the accuracy, again for the log; the model computes
    its own unused loss as well, since it is given the labels;
8.  per-tensor NaN and Inf tests and ``+= g / accumulate`` into dense gradients;
9.  after ``accumulate`` micro-steps, the norm clip and an unfused Adam.

Left out, in the rival's favour: tokenising inside the step, the dead second optimiser of the edit
learning rates, and the bookkeeping of the library that made the functional copy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pymend import reference as ref

Batch = Mapping[str, Tensor]


class OfficialOrder:
    """Dense training and editing of ``names`` in ``model``, one edit at a time.

    The base model is not changed, except that its parameters require a gradient, as in the
    original. Everything runs where the model lives; the model must be in evaluation mode.

    Args:
        model: called with a batch's tensors as keywords; gives ``logits``.
        names: edited weights, in mode order.
        rank: of the editor; ``alpha`` is the start of the edit learning rates (which are added).
        lr, c_edit, c_loc, accumulate, clip: the original's settings.
        seed: of the editor's start.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        rank: int = 1920,
        *,
        alpha: float = 1e-4,
        lr: float = 1e-6,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        accumulate: int = 10,
        clip: float = 100.0,
        seed: int = 0,
    ) -> None:
        self.model = model.requires_grad_(True)
        self.names = list(names)
        self.c_edit, self.c_loc = c_edit, c_loc
        self.accumulate, self.clip = accumulate, clip
        self.nets = ref.nets_for(model, names)
        self.transposed = [ref.is_transposed(model, name) for name in names]

        device = model.get_parameter(self.names[0]).device
        generator = torch.Generator().manual_seed(seed)
        params, alphas, _ = ref.init_editor(model, names, rank, alpha=alpha, generator=generator)
        self.params = {
            key: {k: p.to(device).requires_grad_() for k, p in net.items()}
            for key, net in params.items()
        }
        self.moments = {key: ref.Moments(*key, official=True, device=device) for key in params}
        self.alphas = alphas.to(device).requires_grad_()
        self.optimiser = torch.optim.Adam(
            self.outer_parameters(), lr=lr, foreach=False, fused=False
        )
        self.skipped = 0

    def outer_parameters(self) -> list[Tensor]:
        """What is trained: every editor network and the edit learning rates."""
        return [p for net in self.params.values() for p in net.values()] + [self.alphas]

    def _edited_weights(
        self, batch: Batch, train: bool
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Steps 2 to 5: the dense edited weights of ``batch``, and the diagnostics to log."""
        inputs: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        handles = []
        for name in self.names:

            def forward(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
                inputs[name] = args[0].detach()

            def backward(
                module: nn.Module, grad_input: tuple, grad_output: tuple, name: str = name
            ) -> None:
                deltas[name] = grad_output[0]

            module = ref.owner(self.model, name)
            handles.append(module.register_forward_hook(forward))
            handles.append(module.register_full_backward_hook(backward))
        try:
            loss = ref.nll(self.model(**batch).logits, batch["labels"])
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()

        edited: dict[str, Tensor] = {}
        log: dict[str, float] = {}
        for (key, mode), name, alpha, transposed in zip(
            self.nets, self.names, self.alphas, self.transposed, strict=True
        ):
            u, delta = ref.kept_rows(inputs[name].float(), deltas[name].float())
            if train:
                self.moments[key].update(u, delta)
            u, delta = ref.editor_forward(u, delta, self.params[key], self.moments[key], mode)
            pseudo = torch.einsum("ta,tb->ab" if transposed else "ta,tb->ba", u, delta)
            W = self.model.get_parameter(name)
            assert W.grad is not None
            log |= self._diagnostics(name, W.grad, pseudo)
            edited[name] = W + alpha * pseudo
        self.model.zero_grad()
        return edited, log

    @staticmethod
    def _diagnostics(name: str, true: Tensor, pseudo: Tensor) -> dict[str, float]:
        """The six numbers that the original logs per matrix, one device read each."""
        true, pseudo = true.detach().float(), pseudo.detach()
        cosine = (true * pseudo).sum() / (true.norm() * pseudo.norm() + 1e-10)
        return {
            f"{name}/true_norm": true.norm().item(),
            f"{name}/true_std": true.std().item(),
            f"{name}/pseudo_norm": pseudo.norm().item(),
            f"{name}/pseudo_std": pseudo.std().item(),
            f"{name}/difference": (pseudo - true).norm().item(),
            f"{name}/cosine": cosine.item(),
        }

    def micro_step(self, edit: Batch, outer: Batch, loc: Batch) -> dict[str, float]:
        """One episode; adds its gradient / ``accumulate`` to the outer parameters' ``.grad``.

        An episode with a NaN or Inf gradient is dropped and counted in ``skipped``.

        Returns:
            The log: losses, accuracies and the diagnostics of every matrix.
        """
        with torch.no_grad():
            base_logits = self.model(**loc).logits
        edited, log = self._edited_weights(edit, train=True)
        weights = {**dict(self.model.named_parameters()), **edited}
        outer_logits = torch.func.functional_call(self.model, weights, kwargs=dict(outer)).logits
        loc_logits = torch.func.functional_call(self.model, weights, kwargs=dict(loc)).logits

        l_e = ref.nll(outer_logits, outer["labels"])
        l_loc = ref.kl(base_logits, loc_logits, loc["attention_mask"])
        total = self.c_edit * l_e + self.c_loc * l_loc
        self._backward(total)

        with torch.no_grad():
            log |= {"total": total.item(), "nll": l_e.item(), "kl": l_loc.item()}
            for name, logits, labels in (
                ("outer", outer_logits, outer["labels"]),
                ("loc/base", base_logits, loc["labels"]),
                ("loc/edited", loc_logits, loc["labels"]),
            ):
                log[f"{name}/nll"] = ref.nll(logits, labels).item()
                log[f"{name}/acc"] = ref.exact_match(logits.log_softmax(-1), labels).item()
        return log

    def _backward(self, total: Tensor) -> None:
        parameters = self.outer_parameters()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        bad = False
        for g in gradients:
            if g is not None:
                bad |= bool(g.isnan().any().item())
                bad |= bool(g.isinf().any().item())
        if bad:
            self.skipped += 1
            return
        for p, g in zip(parameters, gradients, strict=True):
            if g is None:
                continue
            if p.grad is None:
                p.grad = g / self.accumulate
            else:
                p.grad += g / self.accumulate

    def optimiser_step(self) -> float:
        """Clip the accumulated gradient, step Adam, clear; the gradient norm before the clip."""
        norm = nn.utils.clip_grad_norm_(self.outer_parameters(), self.clip, foreach=False)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return norm.item()

    def edit(self, batch: Batch) -> nn.Module:
        """The dense edit that gives a usable model: a copy of the model with edited weights.

        The moments are frozen and the graph through the editor is built, as in the original.
        """
        edited, _ = self._edited_weights(batch, train=False)
        copied = copy.deepcopy(self.model)
        state = copied.state_dict()
        state.update({name: W.detach() for name, W in edited.items()})
        copied.load_state_dict(state)
        return copied
