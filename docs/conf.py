"""How Sphinx builds the site: `make docs`."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "pymend"
author = "the pymend authors"
release = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]  # type: ignore[index]
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"pymend {release}"
html_show_copyright = False
html_copy_source = False
html_baseurl = ""
exclude_patterns = ["_build"]
myst_heading_anchors = 4
pygments_style = "friendly"
pygments_dark_style = "monokai"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = True
napoleon_numpy_docstring = False


class Public(SphinxDirective):
    """An entry for every name in ``pymend.__all__``, so that none can be forgotten."""

    def run(self) -> list[nodes.Node]:
        import pymend

        lines = [line for name in pymend.__all__ for line in entry(name, getattr(pymend, name))]
        found = nodes.section(document=self.state.document)
        self.state.nested_parse(StringList(lines, "pymend.__all__"), self.content_offset, found)
        return found.children


class SettingsOf(SphinxDirective):
    """A table of the fields of a configuration: flag, default, meaning."""

    required_arguments, optional_arguments = 1, 1  # the second: plain, names without "--"

    def run(self) -> list[nodes.Node]:
        from pymend import config

        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 25 20 55", ""]
        sign = "" if self.arguments[1:] == ["plain"] else "--"
        rows = [("flag" if sign else "setting", "default", "")]
        for field in dataclasses.fields(getattr(config, self.arguments[0])):
            default = " ".join(field.default) if field.type.startswith("tuple") else field.default
            shown = f"``{default}``" if default != "" else ""
            name = field.name.replace("_", "-") if sign else field.name
            rows.append((f"``{sign}{name}``", shown, field.metadata["help"]))
        for row in rows:
            lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
        found = nodes.section(document=self.state.document)
        where = f"pymend.config.{self.arguments[0]}"
        self.state.nested_parse(StringList(lines, where), self.content_offset, found)
        return found.children


def entry(name: str, value: Any) -> list[str]:
    """The directive that documents a public name."""
    if isinstance(value, type):
        return [f".. autoclass:: pymend.{name}", "   :members:", "   :inherited-members:", ""]
    if callable(value):
        return [f".. autofunction:: pymend.{name}", ""]
    return [f".. py:data:: pymend.{name}", f"   :type: {type(value).__name__}", ""]


def whole_returns(_app: Sphinx, _what: str, _name: str, *rest: Any) -> None:
    """Napoleon would take the text before a colon in "Returns" for a type; ours is in the hint."""
    lines = rest[-1]
    for i in range(1, len(lines)):
        if lines[i - 1].strip() == "Returns:":
            lines[i] = re.sub(r"^(\s*)", r"\1: ", lines[i])


def stands_alone(app: Sphinx, page: str, source: list[str]) -> None:
    """The pages of the single tables are reached from the page of results, not by the menu."""
    if re.fullmatch(r"results/[^/]+/[^/]+", page):
        source[0] = f"---\norphan: true\n---\n{source[0]}"


def setup(app: Sphinx) -> dict[str, bool]:
    """What this project adds to Sphinx."""
    app.add_directive("public-names", Public)
    app.add_directive("settings-of", SettingsOf)
    app.connect("source-read", stands_alone)
    app.connect("autodoc-process-docstring", whole_returns, priority=400)  # before Napoleon
    return {"parallel_read_safe": True}
