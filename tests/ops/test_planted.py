"""Faults planted in the plain-torch forms: the checks of the op tests must fail on each.

Kernels are held to a multiple of eager's error, so a wrong ``eager`` would hide a wrong kernel.
"""

from __future__ import annotations

import pytest
import torch
from ops import (
    test_editor_mlp,
    test_factored_adam,
    test_head_losses,
    test_moments,
    test_rank_update,
    test_side_path,
    test_token_losses,
)

F32 = torch.float32


def sample(module, name, backend="eager"):
    return lambda: module.assert_right(backend, module.samples(F32)[name])


def changed(module, name, change):
    """``module.op``'s function ``name`` with its arguments changed before the call."""
    right = getattr(module.op, name)
    return lambda *of: right(*change(*of))


def kl_times_one_and_a_half(patch):
    right = test_token_losses.op.eager

    def wrong(*of):
        losses = right(*of)
        return losses._replace(kl=1.5 * losses.kl)

    patch.setattr(test_token_losses.op, "eager", wrong)


def bias_correction_of_the_next_step(patch):
    wrong = changed(test_factored_adam, "eager", lambda *of: (*of[:-1], of[-1] + 1))
    patch.setattr(test_factored_adam.op, "eager", wrong)


def shift_ignored(patch):
    """In eager and in the form that runs where the kernels are off."""

    def unshifted(layer):
        return layer._replace(shift=None if layer.shift is None else torch.zeros_like(layer.shift))

    op = test_editor_mlp.op
    patch.setenv("PYMEND_KERNELS", "off")
    eager = changed(test_editor_mlp, "eager", lambda x, ls, m: (x, [*map(unshifted, ls)], m))
    under = changed(test_editor_mlp, "_under_max", lambda p, layer, m: (p, unshifted(layer), m))
    patch.setattr(op, "eager", eager)
    patch.setattr(op, "_under_max", under)


def dead_rows_counted(patch):
    def all_live(u, delta):
        return torch.ones(len(u), dtype=torch.bool)

    patch.setattr(test_moments.op, "_live_rows", all_live)


def update_without_alpha(patch):
    wrong = changed(
        test_rank_update, "eager", lambda w, u, d, a, *of: (w, u, d, torch.ones_like(a), *of)
    )
    patch.setattr(test_rank_update.op, "eager", wrong)


def side_path_added(patch):
    wrong = changed(test_side_path, "eager", lambda x, u, d, alpha: (x, u, d, -alpha))
    patch.setattr(test_side_path.op, "eager", wrong)


FAULTS = {
    kl_times_one_and_a_half: [
        sample(test_token_losses, "plain"),
        sample(test_token_losses, "no target"),
        lambda: test_token_losses.test_by_hand("eager"),
        lambda: test_head_losses.assert_right(test_head_losses.make_case(F32, 3)),
    ],
    bias_correction_of_the_next_step: [
        sample(test_factored_adam, "one"),
        sample(test_factored_adam, "one", "cpu"),
        lambda: test_factored_adam.test_by_hand("eager"),
        lambda: test_factored_adam.test_agrees_with_torch_over_several_steps("eager", F32, True),
    ],
    shift_ignored: [
        sample(test_editor_mlp, "modes"),
        sample(test_editor_mlp, "modes", "cpu"),
        lambda: test_editor_mlp.test_by_hand("eager"),
        lambda: test_editor_mlp.test_by_hand("cpu"),
    ],
    dead_rows_counted: [
        sample(test_moments, "dead rows"),
        sample(test_moments, "all dead"),
        sample(test_moments, "only normalised"),
    ],
    update_without_alpha: [
        sample(test_rank_update, "one"),
        sample(test_rank_update, "one", "cpu"),
        lambda: test_rank_update.test_by_hand("eager"),
    ],
    side_path_added: [
        sample(test_side_path, "one edit"),
        sample(test_side_path, "one edit", "cpu"),
        lambda: test_side_path.test_by_hand("eager"),
    ],
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_check_fails(fault, monkeypatch):
    for check in FAULTS[fault]:
        check()  # right without the fault
    fault(monkeypatch)
    for check in FAULTS[fault]:
        with pytest.raises(AssertionError):
            check()
