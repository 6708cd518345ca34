"""Archives of the paper's code become editors that compute the same edits; nothing in them is run.

The archives are made here, in the layout of that code, from an editor's own state or from the
recorded tensors of the official implementation.
"""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_mend import parity, recorded_model, recorded_rows, under
from tiny import (
    FAMILY,
    VARIANTS,
    assert_close,
    facts,
    llama,
    official_name,
    seasoned_mend,
    tokenizer,
)
from torch import Tensor, nn
from transformers import PretrainedConfig

from pymend.algorithms.mend.mend import Mend
from pymend.commands import main
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.interop.official import load_official

families = pytest.mark.parametrize("family", FAMILY)
UNTOLD = ("norm", "init", "n_edits")  # what an archive does not tell


def archive_of(mend: Mend) -> dict[str, Any]:
    """What the paper's code saves for this editor, with a configuration object as it has one."""
    state: OrderedDict[str, Any] = OrderedDict(edit_lrs=-mend.editor.alpha.detach())
    for key, net in mend.editor.nets.items():
        name = str((net.a, net.b)) if mend.config.shared else key
        for own, p in net.named_parameters():
            if own.split(".")[0] in ("joint", "u_side", "delta_side"):
                state[f"mend.{name}.{official_name(own)}"] = p.detach()
        m = net.moments
        count = m.count if m.count else torch.tensor(2)
        for side, mean, m2 in zip("uv", m.mean.split([net.a, net.b]), m.m2.split([net.a, net.b]),
                                  strict=True):  # fmt: skip
            state[f"mend.{name}.{side}_mean"] = mean.float()
            state[f"mend.{name}.{side}_std"] = (m2 / (count - 1)).sqrt().float()
            state[f"mend.{name}.{side}_s"] = m2.float()
        state[f"mend.{name}.k"] = count.float().view(1)
    return whole(state)


def whole(state: OrderedDict[str, Any]) -> dict[str, Any]:
    """An archive around ``model``, with an optimiser whose state is of no interest."""
    state["model_config"] = PretrainedConfig(dtype="float32")
    weight = nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([weight])
    weight.sum().backward()
    adam.step()
    return {"model": state, "opt": adam.state_dict(), "lr_opt": None, "step": 7, "val_stats": {}}


def saved(archive: Any, folder: Path) -> Path:
    torch.save(archive, folder / "archive")
    return folder / "archive"


def names_of(mend: Mend) -> list[str]:
    return [w.name for w in mend.weights]


def assert_same_edit(mend: Mend, other: Mend, model: Any) -> None:
    edit, again = (m.edit(model, tokenizer(), facts(1)[0]) for m in (mend, other))
    for name, f in edit.factors.items():
        g = again.factors[name]
        assert_close(g.u, f.u, f"u~ of {name}", 1e-6)
        assert_close(g.delta, f.delta, f"d~ of {name}", 1e-6)
        assert torch.equal(g.alpha, f.alpha), f"alpha of {name}"


@pytest.mark.parametrize(
    "variant", [{}, {"shared": False}, *VARIANTS], ids=lambda v: " ".join(v) or "default"
)
@families
def test_an_archive_of_an_editor_is_that_editor(
    family: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    model = FAMILY[family]()
    mend = seasoned_mend(model, official=True, n_edits=1, **variant)
    given = {k: v for k, v in variant.items() if k in UNTOLD}
    imported = load_official(saved(archive_of(mend), tmp_path), model, names_of(mend), **given)
    assert imported.weights == mend.weights
    assert imported.config.official and imported.config.rank == mend.config.rank
    assert_same_edit(mend, imported, model)
    imported.save_pretrained(tmp_path / "editor")
    assert_same_edit(mend, Mend.from_pretrained(tmp_path / "editor"), model)


def test_the_order_of_names_gives_modes_and_step_sizes(tmp_path: Path) -> None:
    model = llama()
    mend = seasoned_mend(model, official=True)
    with torch.no_grad():
        mend.editor.alpha.mul_(torch.arange(1, 1 + len(mend.weights)))
    backwards = names_of(mend)[::-1]
    imported = load_official(saved(archive_of(mend), tmp_path), model, backwards)
    assert names_of(imported) == backwards
    assert torch.equal(imported.editor.alpha, mend.editor.alpha)
    for shape in {w.shape for w in mend.weights}:
        modes = [w.mode for w in imported.weights if w.shape == shape]
        assert modes == list(range(len(modes)))


def test_a_saturated_count_does_not_change_the_stored_deviation(tmp_path: Path) -> None:
    """float32 counts stop at 2^24 while the sums go on: u_s / (k - 1) is then too large."""
    model = llama()
    mend = seasoned_mend(model, official=True)
    archive = archive_of(mend)
    for name, value in archive["model"].items():
        if name.endswith(".k"):
            value.fill_(2**24)
    imported = load_official(saved(archive, tmp_path), model, names_of(mend))
    for net in imported.editor.nets.values():
        assert net.moments.count.dtype == torch.int64 and net.moments.count == 2**24
    assert_same_edit(mend, imported, model)


# ------------------------------------------------------------------------- recorded outputs


class Layers(nn.Module):
    """As many linear layers of one shape as the recorded network has modes."""

    def __init__(self, a: int, b: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for _ in range(count))


@pytest.mark.parametrize(
    "variant", ["default", "no_norm", "xavier", "separate", "one_sided", "x_only", "delta_only"]
)
def test_transform_parity_with_the_official_code(variant: str, tmp_path: Path) -> None:
    settings, tensors = parity(f"transform-{variant}")
    a, b, modes = (settings[k] for k in ("x_dim", "delta_dim", "n_modes"))
    state: OrderedDict[str, Any] = OrderedDict(edit_lrs=torch.full((modes,), 1e-4))
    last = f"train{len(settings['train_modes']) - 1}."
    parts = under(tensors, "param.") | {
        k: tensors[last + k] for k in ("k", "u_mean", "v_mean", "u_std", "v_std")
    }
    state.update({f"mend.({a}, {b}).{k}": v for k, v in parts.items()})
    mend = load_official(
        saved(whole(state), tmp_path),
        Layers(a, b, modes),
        ["layers.*.weight"],
        norm=settings["norm"],
        init=settings["init"],
    )
    u, delta = tensors["eval.u"][0], tensors["eval.delta"][0]
    live = u.any(-1) & delta.any(-1)
    u, delta = u[live], delta[live]
    mode = torch.full((len(u),), settings["eval_mode"])
    own = mend.editor.nets[f"{a}x{b}"]([u], [delta], [len(u)], mode)
    for kind, value in zip(("u", "delta"), own, strict=True):
        assert_close(value, tensors[f"eval.{kind}_out"], f"{kind}~", 1e-5)


@pytest.mark.parametrize("case", ["edit-gpt2", "edit-llama"])
def test_edit_parity_with_the_official_code(case: str, tmp_path: Path) -> None:
    """The last recorded step, for the last weight of each shape.

    That code normalises in training with the moments as they are when a weight's turn comes, so
    the stored ones are those of these weights.
    """
    settings, tensors = parity(case)
    model = recorded_model(settings["config"], under(tensors, "model."), torch.float32)
    state: OrderedDict[str, Any] = OrderedDict(edit_lrs=tensors["edit_lrs"])
    for prefix in ("editor.", "final."):
        state.update({f"mend.{k}": v for k, v in under(tensors, prefix).items()})
    mend = load_official(saved(whole(state), tmp_path), model, settings["inner_params"])
    step = under(tensors, f"step{settings['steps'] - 1}.")
    rows = recorded_rows(under(step, "inner."))
    with frozen(model):
        replay = Replay(model, mend.weights)
        replay.load(rows)
        edit = mend.compute(replay, rows, joint=True)
    edited = copy.deepcopy(model)
    edit.merge_(edited)
    last = {w.shape: w.name for w in mend.weights}.values()
    assert len(last) == 2
    for name in last:
        W, new = model.get_parameter(name), step[f"new_weight.{name}"]
        own = edited.get_parameter(name)
        assert_close(own, new, f"W' {name}", 1e-5)
        assert_close(own - W, new - W, f"W' - W of {name}", 1e-3)  # a difference of float32


# ------------------------------------------------------------------------- hostile and damaged


class Hostile:
    """Pickles as a call, as an attacker would write one."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def executed(path: Path) -> list[Any]:
    """Calls that leave a file behind if they are made."""
    text = f"open({str(path)!r}, 'w').close()"
    return [
        Hostile(exec, text),
        Hostile(eval, text),
        Hostile(Path.touch, path),
        Hostile(io.open, str(path), "w"),
        Hostile(getattr, Hostile(__import__, "os"), "system"),
        Hostile(map, exec, [text]),
    ]


@pytest.mark.parametrize("i", range(6))
def test_code_in_an_archive_is_not_run(i: int, tmp_path: Path) -> None:
    model = llama()
    mend = seasoned_mend(model, official=True)
    mark = tmp_path / "mark"
    archive = archive_of(mend)
    archive["model"]["model_config"] = executed(mark)[i]
    archive["opt"] = [executed(mark)[i], {"state": executed(mark)[i]}]
    imported = load_official(saved(archive, tmp_path), model, names_of(mend))
    assert not mark.exists()
    assert_same_edit(mend, imported, model)


def test_the_hostile_archive_would_run_code(tmp_path: Path) -> None:
    """What the test above is worth: the calls that the archive asks for leave the mark."""
    mark = tmp_path / "mark"
    function, arguments = executed(mark)[0].__reduce__()
    function(*arguments)
    assert mark.exists()


def test_a_hostile_pickle_in_the_place_of_the_model_is_refused(tmp_path: Path) -> None:
    for call in executed(tmp_path / "mark"):
        with pytest.raises(ValueError, match="cannot be read as an archive of the paper's code"):
            load_official(saved({"model": call}, tmp_path), llama(), ["*.mlp.*.weight"])
    assert not (tmp_path / "mark").exists()


def raw(pickled: bytes, folder: Path) -> Path:
    """A zip file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(folder / "archive", "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", bytes(16))
    return folder / "archive"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A pickle of {"model": {"edit_lrs": tensor}} whose storage holds four float32 values."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return "storage", torch.FloatStorage, "0", "cpu", 4
            return None

    rebuild = torch._utils._rebuild_tensor_v2
    call = Hostile(rebuild, Storage(), offset, size, stride, False, OrderedDict())
    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"model": {"edit_lrs": call}})
    return out.getvalue()


@pytest.mark.parametrize(
    "place", [((5,), (1,)), ((4,), (1,), 1), ((2, 2), (100, 1)), ((4,), (1,), -1)], ids=str
)
def test_a_tensor_outside_of_its_storage_is_refused(place: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no MEND editor"):  # the tensor itself is fine
        load_official(raw(tensor((4,), (1,)), tmp_path), llama(), ["*.mlp.*.weight"])
    with pytest.raises(ValueError, match="cannot be read as an archive"):
        load_official(raw(tensor(*place), tmp_path), llama(), ["*.mlp.*.weight"])


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    model, names = llama(), ["*.mlp.*.weight"]
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "missing", model, names)
    (tmp_path / "text").write_text("no archive")
    (tmp_path / "empty.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    for name in ("text", "empty.zip"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an archive"):
            load_official(tmp_path / name, model, names)
    for value in ([1, 2], {"opt": {}}, {"model": [1]}):
        with pytest.raises(ValueError, match="cannot be read as an archive"):
            load_official(saved(value, tmp_path), model, names)
    for state in ({"edit_lrs": torch.ones(1)}, {"mend.(1, 2).k": torch.ones(1)}):
        with pytest.raises(ValueError, match="holds no MEND editor"):
            load_official(saved({"model": state}, tmp_path), model, names)
    cut = saved(archive_of(seasoned_mend(model, official=True)), tmp_path)
    cut.write_bytes(cut.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cannot be read as an archive"):
        load_official(cut, model, names)


def test_an_archive_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = llama()
    mend = seasoned_mend(model, official=True)
    names = names_of(mend)

    def refused(message: str, change: Any = None, used: list[str] = names) -> None:
        archive = archive_of(mend)
        state: dict[str, Tensor] = archive["model"]
        if change:
            change(state)
        with pytest.raises(ValueError, match=message):
            load_official(saved(archive, tmp_path), model, used)

    net = f"mend.{mend.weights[0].shape!s}"
    refused("name the inner_params it was trained with", used=["*.o_proj.weight"])
    refused("alpha is", used=names[:-1])
    refused(r"lacks u_std", lambda s: s.pop(f"{net}.u_std"))
    refused("lacks nets.*bias", lambda s: s.pop(f"{net}.mlp.layers.1.bias"))
    foreign = {f"{net}.mlp.layers.2.u": torch.ones(3, 3)}
    refused("foreign key nets.*joint.2.u", lambda s: s.update(foreign))
    refused("have not seen two rows", lambda s: s[f"{net}.k"].fill_(float("nan")))
    refused("have not seen two rows", lambda s: s[f"{net}.k"].fill_(1))
    refused("moments.mean is not finite", lambda s: s[f"{net}.u_mean"].fill_(float("inf")))
    refused("alpha is not finite", lambda s: s["edit_lrs"].fill_(float("nan")))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    mend = seasoned_mend(model, official=True, n_edits=3, norm=False)
    file, output = saved(archive_of(mend), tmp_path), tmp_path / "editor"
    words = ["--model", tmp_path / "model", "--edit", *names_of(mend), "--output", output]
    words += ["--n-edits", 3, "--no-norm"]
    assert main(["import", str(tmp_path / "missing"), *map(str, words)]) == 2
    assert "missing does not exist" in capsys.readouterr().err and not output.exists()
    assert main(["import", str(file), *map(str, words)]) == 0
    assert f"pymend edit --model {tmp_path / 'model'} --editor {output}" in capsys.readouterr().out
    imported = Mend.from_pretrained(output)
    assert imported.config.n_edits == 3 and not imported.config.norm and imported.chat is None
    assert main(["import", str(file), *map(str, words), "--no-chat"]) == 0
    assert Mend.from_pretrained(output).chat is False
    with pytest.warns(UserWarning, match="n_edits=3"):
        assert_same_edit(mend, imported, model)
