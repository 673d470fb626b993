"""Small Sphinx projects for the tests of ``_ext/verified``, built as readers build.

Each build is a process of its own, as on a console; nothing of it is imitated.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from html import unescape
from pathlib import Path
from typing import Any, Self

EXTENSION = Path(__file__).parents[1] / "_ext"
TRAPS = Path(__file__).with_name("traps")

# Ours, docutils's and MyST's warnings; the first two digits of a path are no line.
_WARNING = re.compile(
    r"^(?P<file>[^\s:]+?)(?::(?P<line>\d+))?: (?:WARNING|ERROR): (?P<text>(?:.(?!^\S+: "
    r"(?:WARNING|ERROR): ))*?) \[(?P<kind>verified\.[\w-]+|docutils|myst\.[\w-]+)\]$",
    re.MULTILINE | re.DOTALL,
)
_UNLOCATED = re.compile(r"^WARNING: (.*) \[verified\.([\w-]+)\]$", re.MULTILINE)

# The list that lets page#gated wait.
WAITING = {
    "at_most": 1,
    "blocks": {
        "page#gated": {
            "waits_for": ["gpu"],
            "since": "2026-11-21",
            "reason": "no GPU is at hand",
        }
    },
}


@dataclass(frozen=True)
class Warned:
    """A warning: where, of which kind, and what it says."""

    file: str
    line: int
    kind: str
    text: str

    @property
    def place(self) -> tuple[str, int, str]:
        """Where it is, and of which kind."""
        return self.file, self.line, self.kind


@dataclass(frozen=True)
class Build:
    """How one build ended."""

    project: "Project"
    code: int
    out: str
    err: str

    @cached_property
    def warnings(self) -> list[Warned]:
        """The warnings, in order; those without a place are on line 0 of no file."""
        root = f"{self.project.root}/"
        located = [
            Warned(
                match["file"].removeprefix(root),
                int(match["line"] or 0),
                match["kind"].removeprefix("verified.").partition(".")[0],
                match["text"],
            )
            for match in _WARNING.finditer(self.err)
        ]
        return located + [
            Warned("", 0, match[2], match[1]) for match in _UNLOCATED.finditer(self.err)
        ]

    @property
    def places(self) -> Counter[tuple[str, int, str]]:
        """How often a kind of warning was given of each line."""
        return Counter(warned.place for warned in self.warnings)

    @property
    def kinds(self) -> list[str]:
        """The kinds of the warnings, in order."""
        return [warned.kind for warned in self.warnings]

    @property
    def tally(self) -> list[str]:
        """The closing lines that count blocks and reasons."""
        lines = self.out.split("\nblocks: ")[-1].splitlines()
        return [line for n, line in enumerate(lines) if not n or line.startswith("  ")]

    @property
    def read(self) -> str:
        """How many pages were read: "2 added, 0 changed, 0 removed"."""
        match = re.search(r"\d+ added, \d+ changed, \d+ removed", self.out)
        return match[0] if match else ""

    @property
    def written(self) -> set[str]:
        """The pages that were written."""
        return set(
            re.findall(r"^writing output\.\.\. \[ *\d+%\] (\S+)", self.out, re.M)
        )


@dataclass(frozen=True)
class Project:
    """A folder with a configuration, pages and, after a build, results."""

    root: Path

    @classmethod
    def make(cls, root: Path, **pages: str) -> Self:
        """Make a project of ``pages``: names are paths, with ``__`` for the dot."""
        project = cls(root)
        for file in TRAPS.glob("*.py"):
            project.write(file.name, file.read_text("utf-8"))
        for name, text in pages.items():
            project.write(f"source/{name.replace('__', '.')}", text)
        if not (root / "source/index.rst").exists():
            toctree = "Pages\n=====\n\n.. toctree::\n   :glob:\n\n   *\n"
            project.write("source/index.rst", toctree)
        return project

    @classmethod
    def copy(cls, source: Path, root: Path) -> Self:
        """Copy a folder of ``tests/traps``, with the configuration."""
        shutil.copytree(source, root)
        project = cls(root)
        for file in TRAPS.glob("*.py"):
            project.write(file.name, file.read_text("utf-8"))
        return project

    def write(self, name: str, text: str) -> Path:
        """Write a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return path

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text that a file has once."""
        text = (self.root / name).read_text("utf-8")
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
        self.write(name, text.replace(old, new))

    def build(
        self,
        builder: str = "doctest",
        *options: str,
        strict: bool = True,
        **environment: str,
    ) -> Build:
        """Build; ``options`` are ``name=value``, or flags such as ``-j2``."""
        flags = [
            part
            for option in options
            for part in ([option] if option.startswith("-") else ["-D", option])
        ]
        command = [sys.executable, "-m", "sphinx", "-b", builder, "-c", ".", "-n"]
        command += ["-W"] * strict + [
            "-d",
            "build/doctrees",
            *flags,
            "source",
            f"build/{builder}",
        ]
        inherited = {k: v for k, v in os.environ.items() if k != "GUIDE_REQUIRE_GPU"}
        done = subprocess.run(
            command,
            cwd=self.root,
            env={
                **inherited,
                "VERIFIED_EXTENSION": str(EXTENSION),
                "NO_COLOR": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return Build(self, done.returncode, done.stdout, done.stderr)

    def results(self, path: str = "build/verification/here.json") -> dict[str, Any]:
        """Read a results file; its blocks by id."""
        content: dict[str, Any] = json.loads((self.root / path).read_text("utf-8"))
        content["blocks"] = {block["id"]: block for block in content["blocks"]}
        return content

    def html(self, page: str) -> str:
        """Read a page that was written."""
        return (self.root / f"build/html/{page}.html").read_text("utf-8")

    def lines(self, page: str) -> list[str]:
        """Read the status lines of a page that was written, in order."""
        found = re.findall(
            r'class="[^"]*verified-text[^"]*">(.*?)</span>', self.html(page)
        )
        return [unescape(text).replace("\xa0", " ") for text in found]
