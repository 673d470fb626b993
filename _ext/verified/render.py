"""Say on the page where each block ran: a line under it, and the status page."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from .blocks import pages, status_pages
from .results import State
from .session import Session

__all__ = ["Status", "VerificationStatus", "on_resolved", "outdated"]

_MARKS = {"passed": "✓", "failed": "✗", "stale": "↻", "waiting": "○"}
_ORDER = ("failed", "stale", "waiting", "passed")
_WORDS = {
    "passed": "passed",
    "failed": "failed",
    "stale": "changed since it ran",
    "waiting": "not yet run",
}


class Status(nodes.General, nodes.Element):
    """Where the status page's tables go."""


class VerificationStatus(SphinxDirective):
    """``.. verification-status::``: every block, by page, with totals."""

    def run(self) -> list[nodes.Node]:
        """Leave a place to be filled when all results are known."""
        status_pages(self.env).add(self.env.docname)
        return [Status()]


# -- Which pages must be written again -------------------------------------------------


def outdated(app: Sphinx, env: BuildEnvironment, session: Session) -> list[str]:
    """Return the pages whose status lines differ from those last written."""
    now = {
        name: _digest(session.states[b.id].text for b in page.blocks)
        for name, page in pages(env).items()
    }
    lines = [f"{s.block.file}:{s.block.line}" for s in session.states.values()]
    tables = _digest([*sorted(now.values()), *lines, _environments(session)])
    now.update(dict.fromkeys(status_pages(env), tables))
    path = Path(app.outdir, ".verified.json")
    before: dict[str, str] = {}
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now), "utf-8")
    return [name for name in now if before.get(name) != now[name]]


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _environments(session: Session) -> str:
    return json.dumps([run.environment for run in session.everywhere])


# -- The line under a block ------------------------------------------------------------


def on_resolved(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put a line under each block, and fill the status page."""
    session: Session = app.verified  # type: ignore[attr-defined]
    for place in list(doctree.findall(Status)):
        place.replace_self(_tables(app, session, docname) if session.states else [])
    tests = [n for n in doctree.findall(nodes.Element) if "testnodetype" in n]
    outputs: dict[str, nodes.Element] = {}
    for node in tests:
        outputs.update(dict.fromkeys(node.get("verified_output_of", []), node))
    for node in tests:
        ids: list[str] = node.get("verified_ids", [])
        states = [session.states[i] for i in ids if i in session.states]
        if not states or isinstance(node, nodes.comment):
            continue
        worst = min(states, key=lambda s: _ORDER.index(s.kind))
        last = node
        for ident in ids:
            output = outputs.get(ident)
            if output is not None and not isinstance(output, nodes.comment):
                last = output if _follows(node, output) else last
        parent, at = _outermost(last)
        parent.insert(at + 1, _line(worst))


def _outermost(node: nodes.Element) -> tuple[nodes.Element, int]:
    parent = node.parent
    while "literal-block-wrapper" in parent.get("classes", ()):
        node, parent = parent, parent.parent
    assert isinstance(parent, nodes.Element)
    return parent, parent.index(node)


def _follows(code: nodes.Element, output: nodes.Element) -> bool:
    (here, at), (there, then) = _outermost(code), _outermost(output)
    return here is there and then == at + 1


def _line(state: State) -> nodes.container:
    mark = nodes.inline("", _MARKS[state.kind], classes=["verified-mark"])
    mark["aria-hidden"] = "true"
    text = nodes.inline("", state.text, classes=["verified-text"])
    line = nodes.paragraph("", "", mark, nodes.Text(" "), text)
    return nodes.container(
        "", line, classes=["verified", f"verified-{state.kind}"], is_div=True
    )


# -- The status page -------------------------------------------------------------------


def _tables(app: Sphinx, session: Session, docname: str) -> list[nodes.Node]:
    states = list(session.states.values())
    count = Counter(state.kind for state in states)
    shown: list[nodes.Node] = [
        nodes.paragraph(
            "",
            f"{len(states)} blocks on {len({s.block.page for s in states})} pages: "
            + ", ".join(f"{count[k]} {w}" for k, w in _WORDS.items() if count[k])
            + ".",
        )
    ]
    shown += [_section("Environments", _runs(session))]
    gates = Counter(s.missing for s in states if s.missing and s.kind != "passed")
    if gates:
        counts = [[why, str(number)] for why, number in sorted(gates.items())]
        table = _table(["Skipped on this machine because it", "Blocks"], counts)
        shown.append(_section("Skipped blocks", table))
    for name, page in sorted(pages(app.env).items()):
        if not page.blocks:
            continue
        found = [session.states[block.id] for block in page.blocks]
        # Grouped by state, the ones to act upon first; in page order within a state.
        found.sort(key=lambda state: _ORDER.index(state.kind))
        rows = [
            [
                _link(
                    app, docname, name, state.block.anchor, f"line {state.block.line}"
                ),
                _state(state.kind),
                state.text,
            ]
            for state in found
        ]
        title = app.env.titles[name].astext()
        path = nodes.paragraph("", "", nodes.literal("", page.blocks[0].file))
        table = _table(["Block", "State", "Where"], rows)
        ident = f"blocks-{nodes.make_id(name)}"
        shown.append(_section(title, path, table, ident=ident))
    return shown


def _runs(session: Session) -> nodes.table:
    names = [
        ("device", "Device"),
        ("date", "Last run"),
        ("python", "Python"),
        ("torch", "torch"),
        ("lightning", "lightning"),
        ("transformer-engine", "Transformer Engine"),
        ("cuda", "CUDA"),
        ("driver", "Driver"),
    ]
    runs = [run for run in session.everywhere if run.records]
    used = [(k, title) for k, title in names if any(k in r.environment for r in runs)]
    rows = []
    for run in runs:
        current = sum(
            run.get(state.block, "passed") is not None
            for state in session.states.values()
        )
        cells = [run.environment.get(key, "-") for key, _title in used]
        cells[1] = cells[1][:10]
        cells.append(str(current))
        rows.append(cells)
    return _table(
        [title for _, title in used] + ["Blocks passed as they are now"], rows
    )


def _state(kind: str) -> nodes.inline:
    words = f"{_MARKS[kind]} {_WORDS.get(kind, kind)}"
    return nodes.inline("", words, classes=[f"verified-{kind}"])


def _link(app: Sphinx, here: str, page: str, anchor: str, text: str) -> nodes.reference:
    uri = app.builder.get_relative_uri(here, page)
    return nodes.reference("", text, refuri=f"{uri}#{anchor}", internal=True)


def _section(title: str, *content: nodes.Node, ident: str = "") -> nodes.section:
    section = nodes.section(ids=[ident or nodes.make_id(title)])
    section += nodes.title("", title)
    section += list(content)
    return section


def _table(head: list[str], rows: list[list[Any]]) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead("", _row(head))
    group += nodes.tbody("", *(_row(row) for row in rows))
    return nodes.table("", group, classes=["verification"])


def _row(cells: Iterable[Any]) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        content = cell if isinstance(cell, nodes.Node) else nodes.Text(str(cell))
        row += nodes.entry("", nodes.paragraph("", "", content))
    return row
