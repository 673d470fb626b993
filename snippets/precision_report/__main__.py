"""The command line: report on what a function of a script builds."""

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from . import ALIASES, FORMATS, MODES, PrecisionReport, precision_report
from .formats import DEFAULT
from .report import suggest

_BUILT = ("model", "batch", "loss_fn", "optimizer")
_USAGE = """\
my_script:build is a function without arguments in my_script.py, here or on Python's
path. It returns (model, batch, loss_fn), with an optimizer as a fourth if you have one,
or a dict, a dataclass or a NamedTuple with these names. It sees no arguments, and what
it prints goes to stderr.
"""
_EXIT = """\
exit status: 0, and 1 if a required mode is unsafe, 2 if there is no report
"""


class _UsageError(Exception):
    """What the reader has to change, in words."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status.

    Args:
        arguments: Those of the shell if None.
    """
    options = _parse(arguments)
    progress = _Progress()
    try:
        with _alone(options.build, progress):
            report = precision_report(
                **_build(options.build, progress),
                formats=options.formats,
                lr=options.lr,
                progress=progress,
            )
        progress.clear()
        text = json.dumps(report.to_dict(), indent=2) if options.json else str(report)
        _tell(text)
        if options.plot:
            _plot(report, options.plot)
    except (_UsageError, TypeError, ValueError, ModuleNotFoundError) as error:
        progress.clear()
        sys.stderr.write(f"precision_report: error: {error}\n")
        return 2
    except (Exception, SystemExit) as error:  # as in backward; 1 would say unsafe
        progress.clear()
        sys.stderr.write(f"precision_report: error: {_raised('the step', error)}\n")
        return 2
    unsafe = [m for m in options.require if not report.verdicts[m].is_safe]
    for mode in unsafe:
        sys.stderr.write(f"precision_report: required, but {report.verdicts[mode]}\n")
    return 1 if unsafe else 0


def _tell(text: str) -> None:
    with suppress(BrokenPipeError):  # of head, which has read enough
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    package = (__package__ or "precision_report").removesuffix(".__main__")
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        description="Tell from one FP32 step what each lower precision would do.",
        epilog=_USAGE + _EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("build", help="where the model comes from: my_script:build")
    parser.add_argument(
        "--formats", default=DEFAULT, type=_formats, metavar="A,B",
        help=f"of {', '.join(FORMATS)}; default {','.join(DEFAULT)}",
    )  # fmt: skip
    parser.add_argument(
        "--lr", default=1e-3, type=float,
        help="learning rate of AdamW if there is no optimizer; default 0.001",
    )  # fmt: skip
    parser.add_argument(
        "--require", action="append", default=[], type=_mode, metavar="MODE",
        help=f"exit with 1 if it is unsafe; may be repeated; of {', '.join(MODES)}",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw a figure: .png, .svg, .pdf"
    )
    options = parser.parse_args(arguments)
    needed = {f for mode in options.require for f in MODES[mode].formats}
    options.formats = tuple(dict.fromkeys([*options.formats, *sorted(needed)]))
    return options


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.replace(",", " ").split() if name)
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(suggest("format", name, FORMATS))
    if not names:
        raise argparse.ArgumentTypeError("name at least one format")
    return names


def _mode(name: str) -> str:
    mode = ALIASES.get(name, name)
    if mode not in MODES:
        raise argparse.ArgumentTypeError(suggest("mode", name, [*MODES, *ALIASES]))
    return mode


@contextmanager
def _alone(where: str, progress: "_Progress") -> Iterator[None]:
    """Let a script see no arguments of ours, and print to stderr.

    What C code or another process prints goes there as well.
    """
    name = where.partition(":")[0]
    path = name if name.endswith(".py") else f"{name.replace('.', '/')}.py"
    arguments, sys.argv = sys.argv, [path]
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    printed: Any = _Printed(progress)
    try:
        with redirect_stdout(printed):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        sys.argv = arguments


def _build(where: str, progress: "_Progress") -> dict[str, Any]:
    """Import the script, call its function, and name what it returns.

    Raises:
        _UsageError: There is no such thing, or it fails, or it is something else.
    """
    name, colon, function = where.partition(":")
    if not (colon and name and function):
        raise _UsageError(
            f"name a script and its function, my_script:build, got {where!r}"
        )
    path = Path(name)
    folder = path.parent if path.suffix == ".py" else Path()
    module = path.stem if path.suffix == ".py" else name
    sys.path.insert(0, str(folder.resolve()))
    progress.show(f"importing {module}")
    try:
        script = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise _UsageError(
                f"{module} needs {error.name}, which is not there"
            ) from error
        at = folder.resolve()
        raise _UsageError(f"there is no {module}.py in {at} or on the path") from error
    except (Exception, SystemExit) as error:
        hint = ""
        if isinstance(error, SystemExit):
            hint = '; put what runs the script under if __name__ == "__main__":'
        raise _UsageError(_raised(module, error) + hint) from error
    build = getattr(script, function, None)
    if not callable(build):
        near = [n for n, thing in vars(script).items() if callable(thing)]
        raise _UsageError(f"in {module}: {suggest('function', function, near)}")
    progress.show(where)
    try:
        built = build()
    except (Exception, SystemExit) as error:
        raise _UsageError(_raised(where, error)) from error
    return _named(where, built)


def _named(where: str, built: Any) -> dict[str, Any]:  # noqa: ANN401
    if dataclasses.is_dataclass(built) and not isinstance(built, type):
        fields = dataclasses.fields(built)
        built = {field.name: getattr(built, field.name) for field in fields}
    if set(_BUILT) & set(getattr(built, "_fields", ())):
        built = built._asdict()  # a NamedTuple's order is its own
    if isinstance(built, tuple) and 2 <= len(built) <= 4:
        built = dict(zip(_BUILT, built, strict=False))
    got = type(built).__name__
    if isinstance(built, dict):
        if {"model", "batch"} <= built.keys() <= set(_BUILT):
            return built
        got = f"the names {', '.join(map(str, built))}"
    elif isinstance(built, tuple):
        got = f"a tuple of {len(built)}"
    raise _UsageError(f"{where} must return (model, batch, loss_fn), got {got}")


def _raised(where: str, error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"{where} calls sys.exit({error.code!r}), so there is no report"
    return f"{where} raises {type(error).__name__}: {error}"


def _plot(report: PrecisionReport, file: str) -> None:
    try:
        report.figure().savefig(file, dpi=150)
    except OSError as error:
        raise _UsageError(f"cannot write {file}: {error.strerror}") from error


class _Progress:
    """One line on a terminal; elsewhere a line now and then, if the work is long."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.is_shown = False

    def __call__(self, text: str) -> None:
        if time.monotonic() - self.said >= (0.1 if self.is_terminal else 10):
            self.write(text)

    def show(self, text: str) -> None:
        """Say at once, on a terminal, what may take long and calls nobody."""
        if self.is_terminal:
            self.write(text)

    def write(self, text: str) -> None:
        """Write the line."""
        self.said = time.monotonic()
        line = f"precision_report: {text}, {self.said - self.started:.0f} s"
        sys.stderr.write(f"\r\033[K{line}" if self.is_terminal else f"{line}\n")
        sys.stderr.flush()
        self.is_shown = True

    def clear(self) -> None:
        """Wipe the line."""
        if self.is_terminal and self.is_shown:
            sys.stderr.write("\r\033[K")
        self.is_shown = False


class _Printed:
    """Stderr for what the script prints, on lines of its own."""

    def __init__(self, progress: _Progress) -> None:
        self.progress = progress

    def write(self, text: str) -> int:
        """Wipe the progress first."""
        self.progress.clear()
        return sys.stderr.write(text)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(sys.stderr, name)


if __name__ == "__main__":
    status = main()
    os.dup2(2, 1)  # what the script prints at exit is not the report either
    sys.exit(status)
