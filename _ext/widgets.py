"""What the interactive parts of pages share: their place, data, script and style.

`place` makes the HTML of a widget; `connect` loads its files, ``_static/NAME.js`` and
``.css`` after ``widget.js`` and ``.css``, with the pages that have one and no other.
"""

import json
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

__all__ = ["connect", "has", "place"]


def place(name: str, data: object, hint: str, table: str = "") -> nodes.raw:
    """Return a widget's place: its data, what stands there without a script.

    Args:
        name: Of its class (``hb-NAME``) and its files.
        data: What its script reads, as JSON.
        hint: What those read who have no JavaScript.
        table: HTML that stands there in any case.
    """
    # A script ends at the first "</", wherever it stands.
    script = json.dumps(data, separators=(",", ":")).replace("</", r"<\/")
    html = (
        f'<script type="application/json">{script}</script>'
        f'<noscript><p class="hb-{name}__hint">{hint}</p></noscript>{table}'
    )
    return nodes.raw("", html, format="html", classes=["hb-widget", f"hb-{name}"])


def has(doctree: nodes.document, name: str) -> bool:
    """Whether a page has the widget."""
    return any(f"hb-{name}" in raw["classes"] for raw in doctree.findall(nodes.raw))


def connect(app: Sphinx, name: str) -> None:
    """Load a widget's script and style with the pages that have it."""

    def load(
        app: Sphinx,
        _pagename: str,
        _templatename: str,
        _context: dict[str, Any],
        doctree: nodes.document | None,
    ) -> None:
        if doctree is not None and has(doctree, name):
            for file in ("widget", name):
                app.add_js_file(f"{file}.js", loading_method="defer")
                app.add_css_file(f"{file}.css", priority=901)

    app.connect("html-page-context", load)
