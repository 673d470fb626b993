"""The index of the failures, made from what each page says of itself.

A page in ``source/failures/`` begins with

.. code-block:: yaml

   symptom: [loss-is-nan, works-in-fp32]
   cause: overflow
   seen_as: the loss is `nan` at step 1

and in the index

.. code-block:: md

   ```{failures} overflow
   ```

makes one row for each page with that symptom or cause: what is seen, and the page. The
two vocabularies are below; a word that is not in them stops the build, and so does a
word of the index that no page has.
"""

import re
from pathlib import Path
from typing import NamedTuple

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

__all__ = ["CAUSES", "SYMPTOMS", "Failure", "Failures", "read", "setup"]

SYMPTOMS = (
    *("loss-is-nan", "loss-stopped-falling", "nothing-trains", "scale-fell-to-zero"),
    *("scheduler-warning", "works-in-fp32", "out-of-memory", "resume-changes-loss"),
    *("wrong-dtype-error", "slower-than-fp32", "other-error", "wrong-numbers"),
)
CAUSES = (
    *("overflow", "underflow", "rounding", "scaler-order", "autocast-rules", "casts"),
    *("state", "communication", "scaling-recipe", "framework", "hardware"),
)


class Failure(NamedTuple):
    """What a page of the gallery says of itself above its title."""

    name: str
    symptom: list[str]
    cause: str
    seen_as: str


def read(page: Path) -> Failure:
    """Read a page's own words.

    Raises:
        ValueError: They lack one of the three, or it is not of its vocabulary; it
            names the page.

    """
    found = re.match(r"---\n(.+?)\n---\n", page.read_text("utf-8"), re.S)
    matter = yaml.safe_load(found[1]) if found else {}
    if set(matter) != {"symptom", "cause", "seen_as"}:
        raise ValueError(
            f"{page.name} needs symptom, cause and seen_as; it has {sorted(matter)}"
        )
    symptoms, cause = matter["symptom"], matter["cause"]
    if not isinstance(symptoms, list) or not symptoms or set(symptoms) - {*SYMPTOMS}:
        raise ValueError(
            f"{page.name}: symptom is a list of {', '.join(SYMPTOMS)}; got {symptoms!r}"
        )
    if cause not in CAUSES:
        raise ValueError(
            f"{page.name}: cause is one of {', '.join(CAUSES)}; got {cause!r}"
        )
    return Failure(page.stem, symptoms, cause, matter["seen_as"])


class Failures(SphinxDirective):
    """The failures of one symptom or one cause."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Make the table; the index is read again whenever a page came or changed."""
        self.env.note_reread()
        key = self.arguments[0]
        folder = Path(self.env.doc2path(self.env.docname)).parent
        pages = sorted(p for p in folder.glob("*.md") if p.stem != "index")
        try:
            failures = [read(page) for page in pages]
        except ValueError as error:
            raise self.error(str(error)) from None
        here = [f for f in failures if key in f.symptom or key == f.cause]
        if not here:
            had = {word for f in failures for word in [*f.symptom, f.cause]}
            raise self.error(
                f"no page has the symptom or cause {key!r}; there are"
                f" {', '.join(sorted(had)) or 'none'}"
            )
        rows = [
            f"| {f.seen_as.replace('|', chr(92) + '|')} | {{doc}}`{f.name}` |"
            for f in here
        ]
        lines = ["| What you see | The failure |", "|---|---|", *rows]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directive."""
    app.add_directive("failures", Failures)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
