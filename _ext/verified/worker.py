"""Run the blocks of one page in a process of their own.

Nothing here imports Sphinx. The parent sends a :class:`Job`; each block answers with
one :class:`Outcome` as soon as it is done, so that a page which kills its process
loses only the block that did it.
"""

import contextlib
import doctest
import linecache
import os
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .outputs import Checker, expected_exception, raised

__all__ = ["Code", "Job", "Outcome", "run", "start"]


@dataclass
class Code:
    """What the worker must know of a block; see :class:`verified.blocks.Block`."""

    id: str
    kind: str
    file: str
    line: int
    code: str
    want: str | None
    flags: dict[str, bool]
    emulated: bool = False


@dataclass
class Job:
    """The blocks of one group of one page, in order."""

    page: str
    root: str
    codes: list[Code]
    setup: str
    cleanup: str
    paths: list[str]
    files: list[str]
    default_flags: int
    time_limit: float
    emulators: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """How one block ended."""

    id: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    output: str = field(default="", repr=False)
    emulated: bool = False


class _TooLong(BaseException):
    """The block's time is up; no ``except Exception`` of the page may catch it."""


class _Tape:
    """Records a standard stream: what Python writes, native code and child processes.

    Replacing ``sys.stdout`` alone would miss the last two, which a reader sees.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives with the process
        self._at = 0
        os.dup2(self._file.fileno(), descriptor)
        self._stream = os.fdopen(
            descriptor, "w", buffering=1, encoding="utf-8", closefd=False
        )
        setattr(sys, name, self._stream)
        setattr(sys, f"__{name}__", self._stream)

    def take(self) -> str:
        """Return what was written since the last call."""
        self._stream.flush()
        end = os.fstat(self._file.fileno()).st_size
        new = os.pread(self._file.fileno(), end - self._at, self._at)
        self._at = end
        return new.decode(errors="replace")


def run(job: Job, folder: str, answer: Connection) -> None:
    """Run ``job`` in ``folder``; send ("start", id), an Outcome a block, then None."""
    os.chdir(folder)
    _run(job, answer, _Tape("stdout", 1), _Tape("stderr", 2))


def start(
    target: Callable[..., None], args: tuple[Any, ...], answer: Connection
) -> None:
    """Call ``target(*args, answer)``; what a dying process prints goes nowhere."""
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    target(*args, answer)


def _run(job: Job, answer: Connection, printed: _Tape, errors: _Tape) -> None:
    sys.path[:0] = [*job.paths, job.root]
    # The page is the main module, as in the file that a reader makes of it: classes
    # can be pickled, and warnings are attributed to it.
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    warnings.simplefilter("default")
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("error", category=category, module=r"__main__\Z")

    if said := _whole("<global setup>", job.setup, main.__dict__, printed):
        for code in job.codes:
            answer.send(Outcome(code.id, "not run", f"the global setup {said}"))
        answer.send(None)
        return
    for emulator in job.emulators:
        module, _, function = emulator.partition(":")
        start = f"import {module}\n{module}.{function}()"
        if said := _whole("<emulator>", start, {}, printed):
            for code in job.codes:
                answer.send(Outcome(code.id, "failed", f"the emulator {said}"))
            answer.send(None)
            return
    broken: Code | None = None
    for code in job.codes:
        if broken is not None:
            where = f"{broken.file}:{broken.line}"
            why = f"an earlier block of the page failed ({where})"
            answer.send(Outcome(code.id, "not run", why))
            continue
        answer.send(("start", code.id))
        outcome = _block(job, code, main.__dict__, printed)
        outcome.emulated = code.emulated
        complaints = errors.take().strip()
        if outcome.status == "failed":
            broken = code
            if complaints:
                outcome.output += f"\nStandard error:\n{_indent(complaints)}"
        answer.send(outcome)
    if said := _whole("<global cleanup>", job.cleanup, main.__dict__, printed):
        answer.send(("cleanup", f"the global cleanup {said}"))
    answer.send(None)


def _whole(name: str, source: str, namespace: dict[str, Any], printed: _Tape) -> str:
    """Run setup or cleanup code; say what was wrong with it."""
    try:
        exec(compile(source, name, "exec", dont_inherit=True), namespace)
    except BaseException as error:
        return f"failed: {raised(error).strip()}"
    got = printed.take()
    return f"printed {got!r}" if got else ""


def _block(job: Job, code: Code, namespace: dict[str, Any], printed: _Tape) -> Outcome:
    began = time.perf_counter()
    too_long = f"took longer than its limit of {job.time_limit:g} s"
    try:
        with _limit(job.time_limit):
            problem = _examples(job, code, namespace, printed)
    except _TooLong as error:
        problem = f"{too_long}\n{_traceback(error, code.file)}"
    except BaseException as error:
        problem = f"could not be run: {raised(error)}{traceback.format_exc()}"
    seconds = time.perf_counter() - began
    if not problem and seconds > job.time_limit:  # it caught what should stop it
        problem = too_long
    if problem:
        return Outcome(code.id, "failed", problem.split("\n", 1)[0], seconds, problem)
    return Outcome(code.id, "passed", "", seconds)


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: types.FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _examples(job: Job, code: Code, namespace: dict[str, Any], printed: _Tape) -> str:
    """Run a block; return what is wrong with it, or nothing."""
    flags = _switch(
        job.default_flags,
        {doctest.OPTIONFLAGS_BY_NAME[name]: on for name, on in code.flags.items()},
    )
    if code.kind == "testcode":
        flags |= doctest.DONT_ACCEPT_BLANKLINE  # the page would show the word itself
        example = doctest.Example(code.code, code.want or "")
        return _example(job, code, example, flags, "exec", namespace, printed)
    for example in doctest.DocTestParser().get_examples(code.code, code.file):
        own = _switch(flags, example.options)
        if problem := _example(job, code, example, own, "single", namespace, printed):
            return problem
    return ""


def _switch(flags: int, changes: dict[int, bool]) -> int:
    for flag, on in changes.items():
        flags = flags | flag if on else flags & ~flag
    return flags


def _example(
    job: Job,
    code: Code,
    example: doctest.Example,
    flags: int,
    mode: str,
    namespace: dict[str, Any],
    printed: _Tape,
) -> str:
    line = code.line + example.lineno
    announced = expected_exception(example.want)
    error: BaseException | None = None
    _quote(job.root, code.file, line, example.source)
    display, sys.displayhook = sys.displayhook, sys.__displayhook__
    try:
        # Blank lines put the code on its own lines of the page.
        padded = "\n" * (line - 1) + example.source
        exec(compile(padded, code.file, mode, dont_inherit=True), namespace)
    except _TooLong:
        raise
    except BaseException as caught:
        error = caught
    finally:
        sys.displayhook = display
    got = printed.take()
    check = Checker()
    if error is None:
        if announced is not None:
            return f"raised nothing, expected {announced.strip()}\n" + _printed(got)
        if check.check_output(example.want, got, flags):
            return ""
        if not example.want:
            return "printed something that the page does not show\n" + _printed(got)
        return (
            "printed something else than the page shows"
            f" (code at {code.file}:{line})\n"
            + check.output_difference(example, got, flags).rstrip()
        )
    message = raised(error)
    if announced is None:
        shown = _traceback(error, code.file)
        return f"raised {message.strip()}\n{shown}\n{_printed(got)}"
    if not check.check_output(announced, message, flags):
        return (
            "raised another exception than the page shows\n"
            f"Expected:\n{_indent(announced)}\nGot:\n{_indent(message)}\n"
            + _traceback(error, code.file)
        )
    if got:
        return "printed something before it raised\n" + _printed(got)
    return ""


def _quote(root: str, file: str, line: int, source: str) -> None:
    # Tracebacks quote the page, with this code as Python sees it, so that the
    # markers under a line fit: not indented, without prompts.
    if file not in linecache.cache:
        text = Path(root, file).read_text("utf-8")
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    lines = linecache.getlines(file)
    code = source.splitlines(True)
    lines[line - 1 : line - 1 + len(code)] = code


def _traceback(error: BaseException, file: str) -> str:
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename != file:
        frames = frames.tb_next  # the worker's own
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def _printed(got: str) -> str:
    return f"It printed:\n{_indent(got)}" if got else ""


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
