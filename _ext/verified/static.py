"""Type-check every block, those for a GPU first of all, without running any.

The blocks of a page and group become one Python file, of which each line is known to
come from a line of the page, so that messages can name that. Transformer Engine's base
wheel holds its whole Python source, which is all that a checker needs.
"""

import doctest
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sphinx.errors import SphinxError

from . import deprecated
from .blocks import Block, trees
from .outputs import expected_exception

__all__ = ["Finding", "check"]

# Concise output: file, line, column, severity with the rule in brackets, message.
_MESSAGE = re.compile(
    r"^(?P<file>.+?):(?P<line>\d+):(?P<column>\d+): "
    r"\w+\[(?P<rule>[\w-]+)\]:? (?P<text>.*)$"
)
_SUMMARY = re.compile(r"Found \d+ diagnostics?|All checks passed!")

# What torch's annotations cannot say: an attribute of a module is Tensor | Module to
# them, so a submodule can be neither called nor indexed; and a data set is a Dataset,
# though a list does.
_LIMITS = re.compile(
    "^Object of type `Tensor` is not callable$"
    "|^Cannot subscript object of type `Module`"
    r"|^Argument to `DataLoader.__init__` is incorrect: Expected `Dataset\[.*`list\["
)
_IGNORED = (
    "unused-ignore-comment",
    "missing-union-attribute",  # p.grad is Tensor | None; the block's run tells which
    # Each forward() takes what its own model takes.
    "incompatible-method-override",
    "lost-keyword-for-regular-parameter",
)


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one block."""

    block: Block
    line: int
    rule: str
    text: str


class _Line(NamedTuple):
    """A line of an extracted file, and where it comes from."""

    block: Block
    line: int
    text: str


def check(
    groups: Mapping[tuple[str, str], list[Block]], folder: Path, root: Path
) -> list[Finding]:
    """Check every group; return what is wrong that ``:wrong:`` does not announce."""
    files = _extract(groups, folder)
    found: list[Finding] = []
    if files:
        found += _type_check(files, folder, root)
    for blocks in groups.values():
        found += _deprecated(blocks)
    return _unannounced(groups, found)


def _unannounced(
    groups: Mapping[tuple[str, str], list[Block]], found: list[Finding]
) -> list[Finding]:
    left = [f for f in found if f.rule not in f.block.wrong]
    made = {(f.block.id, f.rule) for f in found}
    for blocks in groups.values():
        for block in blocks:
            for rule in block.wrong:
                if (block.id, rule) not in made:
                    text = f":wrong: announces {rule!r}, which is not found"
                    left.append(Finding(block, block.line, "wrong", text))
    return left


# -- Extraction ------------------------------------------------------------------------


def _extract(
    groups: Mapping[tuple[str, str], list[Block]], folder: Path
) -> dict[str, list[_Line]]:
    """Write one file a group; return the lines of each by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    made = {}
    for number, ((page, group), blocks) in enumerate(groups.items()):
        name = re.sub(r"\W", "_", f"{page}__{group}__{number}") + ".py"
        lines = [line for block in blocks for line in _lines(block)]
        (folder / name).write_text("".join(f"{line.text}\n" for line in lines), "utf-8")
        made[name] = lines
    return made


def _lines(block: Block) -> Iterator[_Line]:
    """Yield a block's code, without the parts whose point is their exception."""
    parts = [(block.line, block.code, expected_exception(block.want))]
    if block.kind == "doctest":
        try:
            examples = doctest.DocTestParser().get_examples(block.code, block.file)
        except ValueError:
            return  # which is a fault of its own
        parts = [(block.line + e.lineno, e.source, e.exc_msg) for e in examples]
    for start, code, exception in parts:
        if not exception:
            for number, text in enumerate(code.rstrip("\n").split("\n"), start):
                yield _Line(block, number, text)


# -- The checks ------------------------------------------------------------------------


def _type_check(
    files: Mapping[str, list[_Line]], folder: Path, root: Path
) -> list[Finding]:
    command = [
        *(sys.executable, "-m", "ty", "check", "--output-format", "concise"),
        *("--python", sys.prefix, "--extra-search-path", str(root), "--no-progress"),
        *("--color", "never", "--exit-zero"),
        *(part for rule in _IGNORED for part in ("--ignore", rule)),
        *sorted(files),
    ]
    done = subprocess.run(
        command, check=False, cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        msg = f"ty ended with status {done.returncode}: {done.stderr.strip()}"
        raise SphinxError(msg)
    found = []
    for text in done.stdout.splitlines():
        if match := _MESSAGE.match(text):
            at = files[Path(match["file"]).name][int(match["line"]) - 1]
            if not _no_finding(match, at.text):
                found.append(Finding(at.block, at.line, match["rule"], match["text"]))
        elif not _SUMMARY.fullmatch(text):
            msg = f"ty says something that is not about a block: {text}"
            raise SphinxError(msg)
    return found


def _no_finding(message: re.Match[str], code: str) -> bool:
    """Tell whether a message says nothing, or what annotations cannot say."""
    if _LIMITS.search(message["text"]):
        return True
    if message["rule"] == "invalid-syntax":  # found already, when the page was read
        return True
    # To the checker each value of an unpacked dict has the type of all its values.
    unpacked = code[int(message["column"]) - 1 :].startswith("**")
    return unpacked and message["rule"] == "invalid-argument-type"


def _deprecated(blocks: list[Block]) -> list[Finding]:
    # All blocks of the group together: one imports what another uses.
    parts = [(block, *part) for block in blocks for part in trees(block)]
    return [
        Finding(parts[number][0], line, "deprecated", text)
        for number, line, text in deprecated.find([part[1:] for part in parts])
    ]


def version() -> str:
    """Return the checker's name and version."""
    done = subprocess.run(
        [sys.executable, "-m", "ty", "--version"],
        check=False,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "ty"
