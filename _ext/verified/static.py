"""Type-check every block, those for a GPU first of all, without running any.

The blocks of a page and group become one Python file in which each line has its own
number on the page, so that the checker's messages can name it. Transformer Engine's
base wheel holds its whole Python source, which is all that a checker needs.
"""

import ast
import doctest
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import deprecated
from .blocks import Block, trees
from .outputs import expected_exception

__all__ = ["Finding", "check"]

# Concise output: file, line, column, severity with the rule in brackets, message.
_MESSAGE = re.compile(
    r"^(?P<file>.+?):(?P<line>\d+):(?P<column>\d+): "
    r"\w+\[(?P<rule>[\w-]+)\]:? (?P<text>.*)$"
)


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
    "invalid-method-override",
    "lost-keyword-for-regular-parameter",
)


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one block."""

    block: Block
    line: int
    rule: str
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
) -> dict[str, list[Block]]:
    """Write one file a group; return its blocks by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    made = {}
    for (page, group), blocks in groups.items():
        by_file: dict[str, list[Block]] = {}
        for block in blocks:
            by_file.setdefault(block.file, []).append(block)
        # An included file has lines of its own, so it is a module of its own.
        for number, (_file, own) in enumerate(sorted(by_file.items())):
            name = re.sub(r"\W", "_", f"{page}__{group}__{number}") + ".py"
            (folder / name).write_text(_source(own), "utf-8")
            made[name] = own
    return made


def _source(blocks: Iterable[Block]) -> str:
    lines: list[str] = []
    for block in blocks:
        for at, code in _parts(block):
            lines += [""] * (at - 1 - len(lines))
            lines[at - 1 :] = code.rstrip("\n").split("\n")
    return "\n".join(lines) + "\n"


def _parts(block: Block) -> list[tuple[int, str]]:
    """Return (line, code); code whose point is its exception is left out."""
    if next(trees(block), None) is None:
        return []  # it does not parse, which is a fault of its own
    if block.kind == "testcode":
        return [] if expected_exception(block.want) else [(block.line, block.code)]
    return [
        (block.line + example.lineno, example.source)
        for example in doctest.DocTestParser().get_examples(block.code, block.file)
        if not example.exc_msg
    ]


# -- The checks ------------------------------------------------------------------------


def _type_check(
    files: Mapping[str, list[Block]], folder: Path, root: Path
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
        raise RuntimeError(msg)
    found = []
    for text in done.stdout.splitlines():
        match = _MESSAGE.match(text)
        if match and not _beyond_annotations(match, folder):
            line = int(match["line"])
            blocks = files[Path(match["file"]).name]
            block = max(
                (b for b in blocks if b.line <= line),
                key=lambda b: b.line,
                default=blocks[0],
            )
            found.append(Finding(block, line, match["rule"], match["text"]))
    return found


def _beyond_annotations(message: re.Match[str], folder: Path) -> bool:
    """Tell whether a message comes from what annotations cannot say."""
    if _LIMITS.search(message["text"]):
        return True
    # To the checker each value of an unpacked dict has the type of all its values.
    lines = Path(folder, message["file"]).read_text("utf-8").splitlines()
    code = lines[int(message["line"]) - 1][int(message["column"]) - 1 :]
    return code.startswith("**") and message["rule"] == "invalid-argument-type"


def _deprecated(blocks: list[Block]) -> list[Finding]:
    found = []
    # One pass for the aliases of the whole group, one report for each block.
    everything: list[tuple[int, ast.Module]] = []
    owners: list[tuple[int, Block]] = []
    for block in blocks:
        for line, tree in trees(block):
            everything.append((line, tree))
            owners.append((line, block))
    for line, text in deprecated.find(everything):
        block = max((o for o in owners if o[0] <= line), key=lambda o: o[0])[1]
        found.append(Finding(block, line, "deprecated", text))
    return found


def version() -> str:
    """Return the checker's name and version."""
    done = subprocess.run(
        [sys.executable, "-m", "ty", "--version"],
        check=False,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "ty"
