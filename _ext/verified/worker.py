"""Run the blocks of one page in a process of their own.

Nothing here imports Sphinx. The parent sends a :class:`Job`; each block answers with
one :class:`Outcome` as soon as it is done, so that a page which kills its process
loses only the block that did it.
"""

import contextlib
import doctest
import io
import linecache
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .outputs import Checker, expected_exception, raised

__all__ = ["Code", "Job", "Outcome", "run"]


@dataclass
class Code:
    """What the worker must know of a block; see :class:`verified.blocks.Block`."""

    id: str
    kind: str
    file: str
    line: int
    code: str
    want: str | None
    flags: dict[int, bool]


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


@dataclass
class Outcome:
    """How one block ended."""

    id: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    output: str = field(default="", repr=False)


class _TooLong(BaseException):
    """The block's time is up; no ``except Exception`` of the page may catch it."""


def run(job: Job, answer: Connection) -> None:
    """Run ``job``; send ("start", id) and an Outcome for each block, then None."""
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        for file in job.files:
            shutil.copy(file, folder)
        os.chdir(folder)
        log = _silence(Path(folder, ".log"))
        try:
            _run(job, answer, log)
        finally:
            os.chdir(job.root)  # Windows and NFS keep a folder that is in use


def _silence(log: Path) -> Path:
    """Send what native code and child processes print to a file, not the console."""
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="replace")
    return log


def _run(job: Job, answer: Connection, log: Path) -> None:
    sys.path[:0] = [*job.paths, job.root]
    # The page is the main module, as in the file that a reader makes of it: classes
    # can be pickled, and warnings are attributed to it.
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    warnings.simplefilter("default")
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("error", category=category, module=r"__main__\Z")

    if said := _whole("<global setup>", job.setup, main.__dict__):
        for code in job.codes:
            answer.send(Outcome(code.id, "not run", f"the global setup {said}"))
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
        written = log.stat().st_size
        outcome = _block(job, code, main.__dict__)
        if outcome.status == "failed":
            broken = code
            with log.open("rb") as file:
                file.seek(written)
                errors = file.read().decode(errors="replace").strip()
            if errors:
                outcome.output += f"\nStandard error:\n{_indent(errors)}"
        answer.send(outcome)
    if said := _whole("<global cleanup>", job.cleanup, main.__dict__):
        answer.send(("cleanup", f"the global cleanup {said}"))
    answer.send(None)


def _whole(name: str, source: str, namespace: dict[str, Any]) -> str:
    """Run setup or cleanup code; say what was wrong with it."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(source, name, "exec", dont_inherit=True), namespace)
    except BaseException as error:
        return f"failed: {raised(error).strip()}"
    return f"printed {out.getvalue()!r}" if out.getvalue() else ""


def _block(job: Job, code: Code, namespace: dict[str, Any]) -> Outcome:
    _show_page_in_tracebacks(job.root, code.file)
    start = time.perf_counter()
    try:
        with _limit(job.time_limit):
            problem = _examples(job, code, namespace)
    except _TooLong:
        problem = f"took longer than its limit of {job.time_limit:g} s"
    except BaseException:
        problem = traceback.format_exc()
    seconds = time.perf_counter() - start
    if problem:
        return Outcome(code.id, "failed", problem.split("\n", 1)[0], seconds, problem)
    return Outcome(code.id, "passed", "", seconds)


def _show_page_in_tracebacks(root: str, file: str) -> None:
    if file not in linecache.cache:
        text = Path(root, file).read_text("utf-8")
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)


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


def _examples(job: Job, code: Code, namespace: dict[str, Any]) -> str:
    """Run a block; return what is wrong with it, or nothing."""
    flags = job.default_flags
    for flag, on in code.flags.items():
        flags = flags | flag if on else flags & ~flag
    if code.kind == "testcode":
        return _example(
            code.file, code.line, code.code, code.want or "", flags, namespace, "exec"
        )
    for example in doctest.DocTestParser().get_examples(code.code, code.file):
        own = flags
        for flag, on in example.options.items():
            own = own | flag if on else own & ~flag
        line = code.line + example.lineno
        if problem := _example(
            code.file, line, example.source, example.want, own, namespace, "single"
        ):
            return problem
    return ""


def _example(
    file: str,
    line: int,
    source: str,
    want: str,
    flags: int,
    namespace: dict[str, Any],
    mode: str,
) -> str:
    announced = expected_exception(want)
    out = io.StringIO()
    error: BaseException | None = None
    with contextlib.redirect_stdout(out):
        display, sys.displayhook = sys.displayhook, sys.__displayhook__
        try:
            # Blank lines put the code on its own lines of the page.
            padded = "\n" * (line - 1) + source
            exec(compile(padded, file, mode, dont_inherit=True), namespace)
        except _TooLong:
            raise
        except BaseException as caught:
            error = caught
        finally:
            sys.displayhook = display
    got = out.getvalue()
    check = Checker()
    if error is None:
        if announced is not None:
            return f"raised nothing, expected {announced.strip()}\n" + _printed(got)
        if check.check_output(want, got, flags):
            return ""
        if not want:
            return "printed something that the page does not show\n" + _printed(got)
        example = doctest.Example(source, want)
        return (
            "printed something else than the page shows"
            f" (code at {file}:{line})\n"
            + check.output_difference(example, got, flags).rstrip()
        )
    message = raised(error)
    if announced is None:
        return f"raised {message.strip()}\n{_traceback(error)}\n{_printed(got)}"
    if check.check_output(announced, message, flags):
        return ""
    return (
        "raised another exception than the page shows\n"
        f"Expected:\n{_indent(announced)}\nGot:\n{_indent(message)}\n"
        + _traceback(error)
    )


def _traceback(error: BaseException) -> str:
    # The first frame is this file's exec.
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def _printed(got: str) -> str:
    return f"It printed:\n{_indent(got)}" if got else ""


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
