"""Tables that are made from a snippet's data while the site is built.

.. code-block:: rst

   .. precision-names:: lightning

makes one row for each name that ``snippets/precision_names.py`` has for a framework.
Two words stand for other tables: ``frameworks``, what each one's names were checked
against, and ``equivalents``, one row for each precision that has several names.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from snippets import precision_names
from snippets.precision_names import FRAMEWORKS, NAMES, Precision

__all__ = ["PrecisionNames", "setup"]

Cell = Sequence[nodes.Node]


class PrecisionNames(SphinxDirective):
    """One of the tables; an unknown argument is an error of the build."""

    required_arguments = 1
    option_spec: ClassVar = {"class": directives.class_option}

    def run(self) -> list[nodes.Node]:
        """Make the table; the page is made again when the data or this file changes."""
        for file in (precision_names.__file__, __file__):
            self.env.note_dependency(str(Path(file)))
        which = self.arguments[0]
        if which == "frameworks":
            head, rows = _frameworks()
        elif which == "equivalents":
            head, rows = _equivalents()
        elif which in FRAMEWORKS:
            head, rows = _names(which)
        else:
            known = ", ".join(["frameworks", "equivalents", *FRAMEWORKS])
            raise self.error(f"precision-names takes one of {known}; got {which!r}")
        table = _table(head, rows)
        table["classes"] += ["hb-precision-names", *self.options.get("class", [])]
        return [table]


def _names(framework: str) -> tuple[list[str], list[list[Cell]]]:
    """Two rows for a name: the name and what it runs on, across; then its fields."""
    head = [field.replace("_", " ") for field in Precision.__dataclass_fields__]
    rows: list[list[Cell]] = []
    for row in NAMES:
        if row.framework == framework:
            note = f"; {row.note}" if row.note else ""
            about = _text(f": on {row.hardware}{note}")
            spelled = [nodes.strong("", "", *_list([row.name, *row.aliases], " = "))]
            fields = asdict(row.precision).values()
            rows.append([[*spelled, *about]])
            rows.append([[_value(value)] for value in fields])
    return head, rows


def _frameworks() -> tuple[list[str], list[list[Cell]]]:
    head = ["framework", "what you write", "checked against"]
    rows: list[list[Cell]] = []
    for key, framework in FRAMEWORKS.items():
        written = framework.setting.format("NAME")
        checked = [nodes.Text(framework.checked)]
        rows.append([_list([key]), _list([written]), checked])
    return head, rows


def _equivalents() -> tuple[list[str], list[list[Cell]]]:
    head = ["precision", "is called"]
    rows: list[list[Cell]] = []
    for precision in dict.fromkeys(row.precision for row in NAMES):
        equal = [row for row in NAMES if row.precision == precision]
        if len({row.framework for row in equal}) < 2:
            continue
        said = [
            f"{field.replace('_', ' ')} {value}"
            for field, value in asdict(precision).items()
            if value != "none"
        ]
        names = nodes.bullet_list()
        for framework in dict.fromkeys(row.framework for row in equal):
            here = [row.name for row in equal if row.framework == framework]
            content = [nodes.Text(f"{framework} "), *_list(here)]
            names += nodes.list_item("", nodes.paragraph("", "", *content))
        rows.append([[nodes.Text(", ".join(said))], [names]])
    return head, rows


def _value(value: str) -> nodes.Node:
    """A dtype of torch as code, other words as words."""
    is_dtype = value.rstrip("0123456789") in {"float", "bfloat"}
    return nodes.literal("", value) if is_dtype else nodes.Text(value)


def _text(said: str) -> list[nodes.Node]:
    """Text with its flags as code: else a dash would be made of their two hyphens."""
    parts = re.split(r"(--[\w-]+)", said)
    return [
        nodes.literal("", part) if part.startswith("--") else nodes.Text(part)
        for part in parts
    ]


def _list(spellings: Iterable[str], between: str = ", ") -> list[nodes.Node]:
    made: list[nodes.Node] = []
    for spelling in spellings:
        made += [nodes.Text(between)] if made else []
        made.append(nodes.literal("", spelling))
    return made


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    words: list[Cell] = [[nodes.Text(word)] for word in head]
    group += nodes.thead("", _row(words, len(head)))
    group += nodes.tbody("", *(_row(cells, len(head)) for cells in rows))
    return nodes.table("", group)


def _row(cells: Sequence[Cell], columns: int) -> nodes.row:
    """A row; a single cell goes across all columns, and the style sheet may know."""
    if len(cells) == columns:
        return nodes.row("", *(_entry(cell, {}) for cell in cells))
    across = _entry(cells[0], {"morecols": columns - 1})
    return nodes.row("", across, classes=["hb-across"])


def _entry(cell: Cell, attributes: dict[str, int]) -> nodes.entry:
    if any(isinstance(node, nodes.bullet_list) for node in cell):
        return nodes.entry("", *cell, **attributes)
    return nodes.entry("", nodes.paragraph("", "", *cell), **attributes)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directive."""
    app.add_directive("precision-names", PrecisionNames)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
