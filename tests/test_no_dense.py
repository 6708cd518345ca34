"""Nothing of a weight's size is formed on MEND's path, besides the frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import FAMILY, facts, random_episodes, reference_batch, tiny_mend, tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pymend import evaluate
from pymend import reference as ref
from pymend.algorithms.mend.mend import Mend
from pymend.config import TrainConfig
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.models.structure import EditedWeight, weight_of
from pymend.training.episodes import run_episodes
from pymend.training.optim import EditorOptimizer


class NoDense(TorchDispatchMode):
    """Fails when an op returns a tensor as large as an edited weight that is no view of a weight.

    Shapes are looked at through the element count, so a transposed or flattened one counts too.
    """

    def __init__(self, model: nn.Module, weights: Sequence[EditedWeight]) -> None:
        super().__init__()
        self.sizes = {weight_of(model, w).numel(): w.name for w in weights}
        self.storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.seen += 1
                name = self.sizes.get(x.numel())
                if name and x.untyped_storage().data_ptr() not in self.storages:
                    raise AssertionError(f"{func} made {tuple(x.shape)}, the size of {name}")
        return result


@contextmanager
def no_dense(model: nn.Module, mend: Mend) -> Iterator[None]:
    with NoDense(model, mend.weights) as mode:
        yield
    assert mode.seen > 100, "the mode saw the work"


@pytest.fixture(params=FAMILY)
def model(request: pytest.FixtureRequest) -> Any:
    return FAMILY[request.param]()


def test_sizes_do_not_collide_with_the_editor(model: Any) -> None:
    mend = tiny_mend(model)
    sizes = {weight_of(model, w).numel() for w in mend.weights}
    assert not sizes & {x.numel() for x in mend.editor.state_dict().values()}


def test_capture_and_edit(model: Any) -> None:
    mend = tiny_mend(model, n_edits=3)
    rows = [row for e in random_episodes(3) for row in e.edits]
    with no_dense(model, mend), frozen(model):
        replay = Replay(model, mend.weights)
        replay.load(rows)
        captured = mend.capture(replay, rows, 3)
        mend.factors(captured, merge=True)
    text = tokenizer()
    with no_dense(model, mend):
        edit = mend.edit(model, text, facts(3))
        many = mend.edit_many(model, text, facts(3))
    with no_dense(model, mend), torch.no_grad(), edit.applied(model), many[1].applied(model):
        for _ in range(3):
            model(input_ids=torch.tensor([rows[0].ids]))


@pytest.mark.parametrize("edits", [1, 2])
def test_training_step(model: Any, edits: int) -> None:
    mend = tiny_mend(model, n_edits=edits)
    optimizer = EditorOptimizer(mend, TrainConfig(lr=1e-3))
    before = [p.detach().clone() for p in mend.editor.parameters()]
    with no_dense(model, mend), frozen(model):
        replay = Replay(model, mend.weights)
        for step in range(2):
            scores = run_episodes(mend, replay, random_episodes(3, edits, step), "both", merge=True)
            (0.1 * scores.nll + scores.kl).mean().backward()
            assert optimizer.step(step) > 0
    after = list(mend.editor.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), (
        "the step was taken"
    )


def test_evaluation(model: Any) -> None:
    mend = tiny_mend(model)
    rows = [row for e in random_episodes(3) for row in e.edits]
    with frozen(model):
        replay = Replay(model, mend.weights)
        replay.load(rows)
        mend.factors(mend.capture(replay, rows, 3), merge=True)
    with no_dense(model, mend):
        text = " ".join(f"{r.prompt} {r.target}" for r in facts(4))
        evaluate(mend, model, tokenizer(), facts(5), batch_size=3, progress=False, ppl_text=text)


def test_the_mode_catches_the_dense_reference(model: Any) -> None:
    mend = tiny_mend(model)
    names = [w.name for w in mend.weights]
    params, alphas, moments = ref.init_editor(model, names, 7)
    (episode,) = random_episodes(1)
    batches = [reference_batch(rows) for rows in (episode.edits, episode.rephrases)]
    loc = reference_batch(list(episode.locality))
    with (
        pytest.raises(AssertionError, match="the size of"),
        NoDense(model, mend.weights),
    ):
        ref.train_step(model, names, params, alphas, moments, *batches, loc)


def test_the_mode_catches_a_weight_gradient(model: Any) -> None:
    mend = tiny_mend(model)
    model.requires_grad_(True)
    with (
        pytest.raises(AssertionError, match="the size of"),
        NoDense(model, mend.weights),
    ):
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()


def test_the_mode_lets_views_of_weights_pass(model: Any) -> None:
    mend = tiny_mend(model)
    weight = weight_of(model, mend.weights[0]).detach()
    with NoDense(model, mend.weights):
        weight.t().reshape(weight.t().shape)
        weight[:, :5].clone()
        with pytest.raises(AssertionError):
            weight.clone()
