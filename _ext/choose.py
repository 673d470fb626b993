"""The precision chooser: all answers of ``snippets/choose_a_precision.py``, as data.

.. code-block:: md

   ```{precision-chooser} h100 lightning 7e9 pretrain
   ```

asks `recommend_precision` for every device, framework and task and writes the answers
into the page as JSON, each once; ``_static/choose.js`` looks them up, and multiplies
the bytes of a parameter by the parameters. The four words are what it opens with.
``tests/test_choose.py`` checks that it shows what Python answers.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata
from widgets import connect, place

from snippets import choose_a_precision as rules
from snippets.choose_a_precision import (
    FRAMEWORKS,
    HARDWARE,
    KINDS,
    SHARD,
    TASKS,
    NoRecommendation,
    Note,
    recommend_precision,
)

__all__ = ["PrecisionChooser", "answers", "setup"]

_NAME, _EMPTY = "choose", "hb-choose-empty"
_WORDS = ("hardware", "framework", "parameters", "task")


def answers() -> dict[str, Any]:
    """Ask every question there is; what repeats is written once and numbered.

    Returns:
        ``table`` has, by device, framework and task in the order of their lists, the
        number of an answer in ``answers``: name, setting, number of the note that says
        why, bytes of a parameter by kind, numbers of warnings, and alternatives with
        name, setting, note and bytes; or of a refusal: a note, and the device and the
        framework that are nearest.
    """
    notes: dict[Note, int] = {}
    found: dict[str, int] = {}

    def number(note: Note) -> int:
        return notes.setdefault(note, len(notes))

    def ask(hardware: str, framework: str, task: str) -> list[Any]:
        try:  # one parameter fits on any device, so that no warning is about its size
            answer = recommend_precision(hardware, framework, 1, task)
        except NoRecommendation as refusal:
            nearest = refusal.nearest
            return [number(refusal.why), nearest.hardware, nearest.framework]
        others = [
            [other.name, other.setting, number(other.why), other.bytes_per_parameter]
            for other in answer.alternatives
        ]
        warnings = [number(note) for note in answer.warnings]
        each = answer.bytes_per_parameter
        why = number(answer.why)
        return [answer.name, answer.setting, why, each, warnings, others]

    table = [
        found.setdefault(json.dumps(ask(*question)), len(found))
        for question in product(HARDWARE, FRAMEWORKS, TASKS)
    ]
    return {
        "hardware": {
            key: [device.device, device.capability, device.memory]
            for key, device in HARDWARE.items()
        },
        "frameworks": list(FRAMEWORKS),
        "tasks": TASKS,
        "kinds": KINDS,
        "shard": [SHARD, "guide/memory_ledger"],
        "notes": [[note.text, note.page] for note in notes],
        "answers": [json.loads(answer) for answer in found],
        "table": table,
    }


class PrecisionChooser(SphinxDirective):
    """The chooser; a word that the rules do not know is an error of the build."""

    required_arguments = 4

    def run(self) -> list[nodes.Node]:
        """Return a place for the chooser, which `_fill` fills in HTML."""
        for file in (rules.__file__, __file__):
            self.env.note_dependency(str(Path(file)))
        usual = dict(zip(_WORDS, self.arguments, strict=True))
        try:
            recommend_precision(
                usual["hardware"],
                usual["framework"],
                float(usual["parameters"]),
                usual["task"],
            )
        except ValueError as error:
            msg = f"precision-chooser: {error}"
            raise self.error(msg) from error
        # The titles of pages that are read later are not known yet.
        return [nodes.raw("", "", format="html", classes=[_EMPTY], usual=usual)]


def _fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Write the answers into the page, with links to the pages that explain them."""
    if app.builder.format != "html":
        return
    for empty in list(doctree.findall(nodes.raw)):
        if _EMPTY not in empty["classes"]:
            continue
        data = {"usual": empty["usual"], **answers()}
        pages = {page for _, page in (*data["notes"], data["shard"])}
        data["pages"] = {}
        for page in sorted(pages):
            if page not in app.env.titles:
                logging.getLogger(__name__).warning(
                    "the rules name a page that there is not: %s",
                    page,
                    location=docname,
                )
                continue
            uri = app.builder.get_relative_uri(docname, page)
            data["pages"][page] = [uri, app.env.titles[page].astext()]
        hint = (
            "To choose here, switch JavaScript on: the chooser is a script of this"
            " site. The table and the function below give the same answers without it."
        )
        empty.replace_self(place(_NAME, data, hint))


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directive."""
    app.add_directive("precision-chooser", PrecisionChooser)
    app.connect("doctree-resolved", _fill)
    connect(app, _NAME)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
