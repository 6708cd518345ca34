"""``pymend import``: an editor that the paper's code or EasyEdit saved, as one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pymend.commands.settings import Flag, Machine, Model
from pymend.commands.train import how_to_use
from pymend.config import MendConfig

HELP = {name: field.metadata["help"] for name, field in MendConfig.__dataclass_fields__.items()}


def imports(
    archive: Annotated[str, Flag("what that code, or EasyEdit, saved", "FILE", positional=True)],
    output: Annotated[str, Flag("receives the editor", "DIR")],
    edit: Annotated[tuple[str, ...], Flag("its inner_params, in their order", "NAME...")],
    model: Model,
    machine: Machine,
    norm: Annotated[bool, Flag(HELP["norm"])] = True,
    init: Annotated[Literal["id", "xavier"], Flag(HELP["init"])] = "id",
    n_edits: Annotated[int, Flag(HELP["n_edits"], least=1)] = 1,
) -> None:
    """Take an editor over from the paper's code."""
    from pymend.files import writable_dir
    from pymend.interop.official import load_official

    if not Path(archive).is_file():
        raise FileNotFoundError(f"archive {archive} does not exist")
    writable_dir(output, make=False)
    model = model.of()
    loaded, _ = machine.load(model.model)
    mend = load_official(archive, loaded, edit, norm=norm, init=init, n_edits=n_edits)
    mend.chat = model.template
    mend.save_pretrained(output)
    print(how_to_use(model.model, output))
