"""Find the blocks of a page, give each an id and a hash, and refuse what cannot be run.

The directives are those of ``sphinx.ext.doctest`` with options added, so that a page
stays readable to anyone who knows Sphinx. Everything that the stock extension drops
or overlooks in silence becomes a :class:`Fault`, which has the line of the page.
"""

import ast
import doctest
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.doctest import (
    DoctestDirective,
    TestcodeDirective,
    TestDirective,
    TestoutputDirective,
)

from .outputs import expected_exception, vague

__all__ = ["Block", "Fault", "Page", "pages", "status_pages"]

# Raise it when a change of this extension makes every earlier result worthless.
HASH_VERSION = "1"

_PYTHON = re.compile(
    r"(i?py|i?python|pycon)\d*(-?console)?|sage|numpy|testcode|testoutput|doctest"
)
# What Sphinx calls a block whose author named no language (``highlight_language``).
_UNNAMED = {"", "default", "none"}
_HIDDEN_FLAGS = ("SKIP", "IGNORE_EXCEPTION_DETAIL", "FAIL_FAST")
_EXAMPLE = doctest.DocTestParser._EXAMPLE_RE  # type: ignore[attr-defined]
# ``.. testcode:`` is a comment to reST, with all that is indented under it.
_MISTYPED = re.compile(r"(testcode|testoutput|doctest|code-block|literalinclude) ?:")


@dataclass(frozen=True)
class Fault:
    """Something that no page may have; ``kind`` is the warning's subtype."""

    kind: str
    file: str
    line: int
    text: str


@dataclass
class Block:
    """Code that a page shows and a runner runs.

    Attributes:
        id: ``page#n``, or ``page#name`` where the block has a name; ``@group`` is
            added if it runs in several groups.
        anchor: The HTML id of the block.
        file: The page's (or included file's) path, relative to the project.
        line: The line of ``file`` that holds the first line of the code.
        want: What the page shows as output; None for a ``testcode`` without any.
        flags: Doctest's option flags, by name, and whether each is on.
        requires: Capabilities without which it is skipped.
        wrong: Static findings that are the point of the block.
        digest: Hash of the global setup, the earlier blocks of the group, this code,
            its expected output and capabilities, and the project's files it imports.
    """

    id: str
    page: str
    group: str
    anchor: str
    kind: str
    file: str
    line: int
    code: str
    want: str | None
    flags: dict[str, bool]
    requires: tuple[str, ...]
    wrong: tuple[str, ...]
    digest: str = ""


@dataclass
class Page:
    """What one page holds."""

    blocks: list[Block] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def pages(env: BuildEnvironment) -> dict[str, Page]:
    """Return the pages read so far; kept in the environment from build to build."""
    if not hasattr(env, "verified_pages"):
        env.verified_pages = {}  # type: ignore[attr-defined]
    found: dict[str, Page] = env.verified_pages  # type: ignore[attr-defined]
    return found


def status_pages(env: BuildEnvironment) -> set[str]:
    """Return the pages that show the tables of ``verification-status``."""
    if not hasattr(env, "verified_status"):
        env.verified_status = set()  # type: ignore[attr-defined]
    found: set[str] = env.verified_status  # type: ignore[attr-defined]
    return found


# -- Directives -------------------------------------------------------------------


def _words(argument: str | None) -> tuple[str, ...]:
    return tuple((argument or "").replace(",", " ").split())


class _Located(TestDirective):
    """Keeps what the stock directive forgets: its options and its code's true line."""

    def run(self) -> list[nodes.Node]:
        (node,) = super().run()
        assert isinstance(node, nodes.Element)
        node["verified"] = {
            "stated": sorted(self.options),
            "requires": self.options.get("requires"),
            "wrong": self.options.get("wrong", ()),
            "name": self.options.get("name", ""),
            "at": self._at(),
        }
        return [node]

    def _at(self) -> tuple[str, int]:
        """Return the file and the line (from 1) of the first line of the content."""
        source, at = self.state_machine.get_source_and_line(self.lineno)
        file, line = str(source or self.env.doc2path(self.env.docname)), at or 1
        if self.content:
            source, offset = self.content.info(0)
            if source and Path(source).is_file() and offset is not None:
                file = source
                if offset + 1 > line:  # reST counts in the file, MyST in the block
                    return file, offset + 1
        return file, _search(Path(file), list(self.content), line)


def _search(path: Path, content: list[str], line: int) -> int:
    """Find ``content`` in a file, at any indentation, at or after ``line``."""
    wanted = [text.strip() for text in content]
    if not wanted or not path.is_file():
        return line
    lines = [text.strip().lstrip("> ") for text in path.read_text("utf-8").splitlines()]
    plain = [text.lstrip("> ") for text in wanted]
    for start in range(max(line - 1, 0), len(lines) - len(wanted) + 1):
        if lines[start : start + len(wanted)] == plain:
            return start + 1
    return line


_ADDED = {"requires": _words, "wrong": _words, "name": directives.unchanged_required}


class Testcode(_Located, TestcodeDirective):
    """``testcode`` with ``:requires:``, ``:wrong:`` and ``:name:``."""

    option_spec: ClassVar[Any] = {**TestcodeDirective.option_spec, **_ADDED}


class Doctest(_Located, DoctestDirective):
    """``doctest`` with ``:requires:``, ``:wrong:`` and ``:name:``."""

    option_spec: ClassVar[Any] = {**DoctestDirective.option_spec, **_ADDED}


class Testoutput(_Located, TestoutputDirective):
    """``testoutput``; a ``:requires:`` of its own must be that of its code."""

    option_spec: ClassVar[Any] = {
        **TestoutputDirective.option_spec,
        "requires": _words,
    }


# -- Reading a page ---------------------------------------------------------------


def on_doctree_read(app: Sphinx, doctree: nodes.document) -> None:
    """Collect the page's blocks and faults into the environment."""
    docname = app.env.docname
    reader = _Reader(app, docname)
    for node in doctree.findall(nodes.Element):
        if "testnodetype" in node:
            reader.test(node)
        elif isinstance(node, nodes.doctest_block):
            reader.shown(node, "a bare >>> paragraph is not run: use doctest")
        elif isinstance(node, nodes.literal_block):
            reader.literal(node)
        elif isinstance(node, nodes.comment):
            reader.comment(node)
    reader.finish()
    pages(app.env)[docname] = reader.page


def on_purge(_app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Forget a page that is removed or read again."""
    pages(env).pop(docname, None)
    status_pages(env).discard(docname)


def on_merge(
    _app: Sphinx, env: BuildEnvironment, docnames: set[str], other: BuildEnvironment
) -> None:
    """Take over the pages that a parallel reader has read."""
    pages(env).update((name, pages(other)[name]) for name in docnames)
    status_pages(env).update(status_pages(other) & docnames)


class _Reader:
    """Walks one page."""

    def __init__(self, app: Sphinx, docname: str) -> None:
        self.app, self.env, self.docname = app, app.env, docname
        self.root = Path(app.confdir)
        self.page = Page()
        self.count = 0
        self.names: set[str] = set()
        self.last: dict[str, nodes.Element | None] = {}
        self.of: dict[int, list[Block]] = {}

    def fault(self, kind: str, node: nodes.Element, text: str, line: int = 0) -> None:
        file, at = self._where(node)
        self.page.faults.append(Fault(kind, file, line or at, text))

    def _where(self, node: nodes.Element) -> tuple[str, int]:
        about = node.get("verified")
        if about:
            return self._relative(about["at"][0]), about["at"][1]
        source, line = node.source, node.line
        path = source if source and Path(source).is_file() else None
        path = path or str(self.env.doc2path(self.docname))
        # The line known is that of the directive, if that: in MyST it may be 1.
        line = _search(Path(path), node.astext().splitlines(), line or 1)
        return self._relative(path), line

    def _relative(self, path: str) -> str:
        try:
            return Path(path).resolve().relative_to(self.root.resolve()).as_posix()
        except ValueError:
            return path

    # -- Code that is shown but not run --

    def shown(self, node: nodes.Element, text: str) -> None:
        self.fault("python-not-run", node, text)

    def literal(self, node: nodes.literal_block) -> None:
        language = _language(node)
        text = node.astext()
        if source := node.get("source"):  # an included file
            path = Path(source).resolve()
            if (self.root / "snippets").resolve() in path.parents:
                return
            if _PYTHON.fullmatch(language) or path.suffix in {".py", ".pyi"}:
                text = "this included Python is not tested: only files of snippets/ are"
                self.shown(node, text)
                return
        if _PYTHON.fullmatch(language):
            self.shown(node, "this Python is shown but never run: use testcode")
        elif re.search(r"^\s*>>> ", text, re.MULTILINE):
            self.shown(node, "this >>> example is shown but never run: use doctest")
        elif language in _UNNAMED and _reads_as_python(text):
            self.shown(
                node,
                "this literal block reads as Python but is never run: use testcode,"
                " or name its language",
            )

    def comment(self, node: nodes.comment) -> None:
        if match := _MISTYPED.match(node.astext()):
            text = f"this is a comment, which nobody sees: write {match[1]}::"
            file, _ = self._where(node)
            lines = Path(self.root, file).read_text("utf-8").splitlines()[: node.line]
            written = node.astext().partition("\n")[0]  # and node.line is the end
            at = max(n for n, line in enumerate(lines, 1) if written in line)
            self.fault("hidden", node, text, at)

    # -- Blocks --

    def test(self, node: nodes.Element) -> None:
        kind = node["testnodetype"]
        about = node.get("verified")
        if kind in ("testsetup", "testcleanup"):
            text = f"{kind} is hidden from the reader, and is not run: use testcode"
            self.fault("hidden", node, text)
            return
        if about is None:
            return  # made by code, not by a directive
        self._check_options(node, kind, about)
        if kind == "testoutput":
            self._output(node, about)
        else:
            self._code(node, kind, about)

    def _check_options(self, node: nodes.Element, kind: str, about: Any) -> None:
        stated = about["stated"]
        if "hide" in stated:
            text = "the reader cannot see this block, so cannot repeat the page"
            self.fault("hidden", node, text)
        if any(isinstance(up, addnodes.only) for up in _ancestors(node)):
            text = "a block inside `only` is run even where it is not shown"
            self.fault("hidden", node, text)
        for option in ("skipif", "pyversion"):
            if option in stated:
                text = f":{option}: skips without a trace: use :requires:"
                self.fault("skip", node, text)
        for option in ("trim-doctest-flags", "no-trim-doctest-flags"):
            if option in stated and kind != "doctest":
                self.fault("option", node, f"{kind} ignores :{option}:")
        for flag in _HIDDEN_FLAGS:
            on = node["options"].get(doctest.OPTIONFLAGS_BY_NAME[flag])
            if on and not (flag == "SKIP" and "pyversion" in stated):
                self.fault("skip", node, f"+{flag} hides what happens")

    def _emulators(self, block: Block) -> list[str]:
        registry = self.app.verified_registry  # type: ignore[attr-defined]
        known = [registry[name] for name in block.requires if name in registry]
        return [c.emulator.partition(":")[0] for c in known if c.emulator]

    def _code(self, node: nodes.Element, kind: str, about: Any) -> None:
        self.count += 1
        code = node.get("test", node.astext())
        file, line = self._where(node)
        registry = self.app.verified_registry  # type: ignore[attr-defined]
        requires = tuple(about["requires"] or ())
        for name in requires:
            if name not in registry:
                text = f"unknown capability {name!r}; known: {', '.join(registry)}"
                self.fault("gate", node, text)
        if "requires" in about["stated"] and not requires:
            self.fault("gate", node, ":requires: names no capability")
        if "wrong" in about["stated"] and not about["wrong"]:
            self.fault("option", node, ":wrong: names no finding")
        self._check_code(node, kind, code, line)
        key = about["name"] or str(self.count)
        if about["name"] and not re.fullmatch(r"[A-Za-z][\w-]*", key):
            text = f"the name {key!r} is not letters, digits, '-' and '_'"
            self.fault("option", node, text)
        if key in self.names:
            self.fault("option", node, f"the name {key!r} is taken on this page")
        self.names.add(key)
        groups = list(dict.fromkeys(node["groups"]))
        if "*" in groups:
            text = "the group '*' would run this block where no reader sees it"
            self.fault("hidden", node, text)
        self.of[id(node)] = made = []
        for group in groups:
            block = Block(
                id=f"{self.docname}#{key}" + (f"@{group}" if len(groups) > 1 else ""),
                page=self.docname,
                group=group,
                anchor=f"block-{key}",
                kind=kind,
                file=file,
                line=line,
                code=code,
                want=None,
                flags=_named(node["options"]),
                requires=requires,
                wrong=tuple(about["wrong"]),
            )
            made.append(block)
            self.page.blocks.append(block)
            self.last[group] = node
        node["ids"].append(f"block-{key}")
        node["verified_ids"] = [block.id for block in made]

    def _output(self, node: nodes.Element, about: Any) -> None:
        want = node.astext()
        if not want.strip(". \n"):
            text = "any output would match: show what is printed"
            self.fault("output", node, text)
        for group in dict.fromkeys(node["groups"]):
            code = self.last.get(group)
            if code is None:
                text = f"this output belongs to no testcode (group {group!r})"
                self.fault("output", node, text)
                continue
            if code["testnodetype"] == "doctest":
                text = "this output follows a doctest, and is compared with nothing"
                self.fault("output", node, text)
                continue
            blocks = [b for b in self.of[id(code)] if b.group == group]
            if blocks[0].want is not None:
                text = "a second output for one testcode would replace the first"
                self.fault("output", node, text)
                continue
            stated = about["requires"]
            if stated is not None and set(stated) != set(blocks[0].requires):
                text = (
                    "the output's :requires: differs from its code's"
                    f" ({' '.join(blocks[0].requires) or 'none'}): leave it out"
                )
                self.fault("gate", node, text)
            announced = expected_exception(want)
            if announced and vague(announced):
                self.fault("exception", node, "any message would match: write it out")
            for block in blocks:
                block.want = want + "\n"
                block.flags = _named(node["options"])
            node["verified_output_of"] = [block.id for block in blocks]

    def _check_code(self, node: nodes.Element, kind: str, code: str, line: int) -> None:
        if kind == "testcode":
            self._compile(node, code, "exec", line)
            if not any(map(_is_code, code.splitlines())):
                self.fault("syntax", node, "this block holds no code")
            return
        try:
            examples = doctest.DocTestParser().get_examples(code, self.docname)
        except ValueError as error:
            match = re.search(r"line (\d+)", str(error))
            at = line + int(match[1]) - 1 if match else line
            text = re.sub(r"line \d+ of the doc\w+ for \S+ ", "", str(error))
            self.fault("syntax", node, f"invalid doctest: {text}", at)
            return
        if not examples:
            self.fault("syntax", node, "this doctest has no >>> prompt: nothing runs")
            return
        for example in examples:
            self._example(node, example, line + example.lineno)
        for at in _unattached(code):
            text = "this text belongs to no example: a blank line ended the output"
            self.fault("output", node, text, line + at)

    def _example(self, node: nodes.Element, example: doctest.Example, at: int) -> None:
        for flag in _HIDDEN_FLAGS:
            if example.options.get(doctest.OPTIONFLAGS_BY_NAME[flag]):
                self.fault("skip", node, f"+{flag} hides what happens", at)
        if example.exc_msg and vague(example.exc_msg):
            text = "any message would match: write it out"
            self.fault("exception", node, text, at)
        if not (example.exc_msg or "").startswith("SyntaxError"):
            self._compile(node, example.source, "single", at)

    def _compile(self, node: nodes.Element, code: str, mode: str, line: int) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # "\d", x is 1
                compile(code, "page", mode, dont_inherit=True)
        except SyntaxError as error:
            text = f"this code does not compile: {error.msg}"
            self.fault("syntax", node, text, line + (error.lineno or 1) - 1)
        except ValueError as error:  # a null byte
            self.fault("syntax", node, f"this code does not compile: {error}")

    # -- Hashes --

    def finish(self) -> None:
        for name, (docnames, _target) in sorted(self.env.dlfiles.items()):
            if self.docname in docnames and not str(name).endswith(".py"):
                self.page.files.append(str(Path(self.env.srcdir, name).resolve()))
        config = self.app.config
        start = _hash(
            HASH_VERSION,
            config.doctest_global_setup,
            config.doctest_global_cleanup,
            str(config.doctest_default_flags),
            *(_content(Path(path)) for path in self.page.files),
        )
        chains: dict[str, str] = {}
        for block in self.page.blocks:
            imported = imports(block, self.root, self._emulators(block))
            for path in imported:
                self.env.note_dependency(str(path), docname=self.docname)
            block.digest = _hash(
                chains.get(block.group, start),
                block.kind,
                block.code,
                repr(block.want),
                repr(sorted(block.flags.items())),
                " ".join(sorted(block.requires)),
                *(_content(path) for path in imported),
            )
            chains[block.group] = block.digest


def _ancestors(node: nodes.Node) -> Iterator[nodes.Node]:
    while node.parent is not None:
        node = node.parent
        yield node


def _language(node: nodes.literal_block) -> str:
    """Return the block's language, in lower case; ``include`` keeps it in a class."""
    classes: list[str] = node.get("classes", [])
    stated = classes[1] if classes[:1] == ["code"] and len(classes) > 1 else ""
    return str(stated or node.get("language") or "").lower()


def _named(flags: dict[int, bool]) -> dict[str, bool]:
    # A flag's number depends on who registered one first in this process.
    return {
        name: flags[bit]
        for name, bit in doctest.OPTIONFLAGS_BY_NAME.items()
        if bit in flags
    }


def _unattached(code: str) -> Iterator[int]:
    """Yield the first line of each text that a doctest shows and never compares."""
    end = 0
    matches = list(_EXAMPLE.finditer(code))
    for start, after in [*((m.start(), m.end()) for m in matches), (len(code), 0)]:
        if text := code[end:start].strip():
            yield code.count("\n", 0, code.index(text, end))
        end = after


def _is_code(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _reads_as_python(text: str) -> bool:
    """Tell whether a block without a language is a program, not a word or a path."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    telling = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    calls = (isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) for s in body)
    return any(isinstance(s, telling) for s in body) or any(calls)


def trees(block: Block) -> Iterator[tuple[int, ast.Module]]:
    """Yield (line of the page, syntax tree) of each part of a block that parses."""
    parts: Iterable[tuple[int, str]] = [(block.line, block.code)]
    if block.kind == "doctest":
        try:
            examples = doctest.DocTestParser().get_examples(block.code, block.file)
        except ValueError:
            return
        parts = [(block.line + e.lineno, e.source) for e in examples]
    for line, source in parts:
        try:
            yield line, ast.parse(source)
        except SyntaxError:
            continue


def imports(block: Block, root: Path, emulators: Iterable[str] = ()) -> list[Path]:
    """Return the project's own files that a block depends on.

    They are the snippets that it imports, and the ``emulators`` that may run it.
    """
    found = {
        file
        for package in emulators
        for file in root.joinpath(*package.split(".")).rglob("*.py")
    }
    for _line, tree in trees(block):
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names.append(node.module)
            for name in names:
                path = root.joinpath(*name.split("."))
                if path.with_suffix(".py").is_file():
                    found.add(path.with_suffix(".py"))
                elif (path / "__init__.py").is_file():
                    found.update(path.rglob("*.py") if path.parent != root else ())
    return sorted(found)


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"


def _hash(*parts: str) -> str:
    joined = "\0".join(part.replace("\0", "\\0") for part in parts)
    return hashlib.sha256(joined.encode()).hexdigest()
