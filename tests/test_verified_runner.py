"""Tests of _ext/verified/runner.py and worker.py: pages that fight their process."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from verified import runner
from verified.blocks import Block
from verified.runner import Runner
from verified.worker import Outcome


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder, in which a page is waited for no longer than it may take."""
    (tmp_path / "page.md").write_text("\n" * 20, "utf-8")
    monkeypatch.setattr(runner, "_GRACE", 1.0)
    return tmp_path


def run(root: Path, *codes: str, limit: float = 30.0, **block: object) -> list[Outcome]:
    """Run codes as the blocks of one page."""
    registry = "verified.capabilities:CAPABILITIES"
    engine = Runner(
        root=str(root), registry=registry, preload=[], jobs=1, time_limit=limit
    )
    made = {
        "kind": "testcode",
        "want": None,
        "flags": {},
        "requires": (),
        "wrong": (),
        **block,
    }
    blocks = [
        Block(
            id=f"page#{number}",
            page="page",
            group="default",
            anchor=f"block-{number}",
            file="page.md",
            line=number,
            code=code,
            **made,  # type: ignore[arg-type]
        )
        for number, code in enumerate(codes, 1)
    ]
    outcomes = engine.run({("page", "default"): blocks}, {}, {})
    return [outcomes[each.id] for each in blocks]


@contextlib.contextmanager
def faster_than(seconds: float) -> Iterator[None]:
    """Assert that something takes less."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_blocks_share_a_namespace_and_its_pickles(root: Path) -> None:
    """A class of the page can be pickled, as in the file that a reader makes of it."""
    outcomes = run(
        root,
        "import pickle\nclass Batch:\n    size = 3",
        "again = pickle.loads(pickle.dumps(Batch()))\nassert again.size == 3",
    )

    assert [outcome.status for outcome in outcomes] == ["passed", "passed"]


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "sum(range(10**12))",
        "import ctypes; ctypes.CDLL(None).pause()",
        "import signal; signal.alarm(0)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except: pass",
    ],
)
def test_a_block_that_takes_too_long_is_stopped(root: Path, code: str) -> None:
    """In Python, in C, and when it catches what should stop it."""
    with faster_than(30):
        before, outcome, after = run(root, "x = 1", code, "y = 1", limit=1.0)

    assert before.status == "passed"
    assert outcome.status == "failed"
    assert outcome.reason == "took longer than its limit of 1 s"
    assert after.status == "not run"


def test_a_stopped_block_shows_where_it_was(root: Path) -> None:
    """By the line of the page."""
    (outcome,) = run(root, "def wait():\n    while True: pass\n\nwait()", limit=1.0)

    assert 'File "page.md", line 4, in <module>' in outcome.output
    assert 'File "page.md", line 2, in wait' in outcome.output


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os._exit(0)", "exit status 0"),
        ("import os; os._exit(7)", "exit status 7"),
        ("import os; os.abort()", "signal SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "signal SIGSEGV"),
    ],
)
def test_a_block_that_ends_its_process_is_blamed(
    root: Path, code: str, reason: str
) -> None:
    """With the blocks before it passed, and those after it not run."""
    before, outcome, after = run(root, "x = 1", code, "y = 1")

    assert before.status == "passed"
    assert outcome.status == "failed"
    assert outcome.reason == f"ended the process that ran it ({reason})"
    assert (after.status, after.reason) == (
        "not run",
        "the process of its page had ended",
    )


def test_a_block_that_closes_every_file_is_blamed(root: Path) -> None:
    """The runner does not wait for a page that can no longer answer."""
    with faster_than(30):
        (outcome,) = run(root, "import os, time; os.closerange(3, 99); time.sleep(20)")

    assert outcome.status == "failed"


def test_a_page_that_leaves_a_thread_ends(root: Path) -> None:
    """What it started ends with it."""
    code = "import threading, time\nthreading.Timer(99, print).start()"
    with faster_than(30):
        (outcome,) = run(root, code)

    assert outcome.status == "passed"


def test_a_page_changes_nothing_for_the_next(root: Path) -> None:
    """Neither variables of the environment nor folders nor modules."""
    first = "import os, math; os.environ['LEFT'] = '1'; math.pi = 3; os.chdir('/')"
    second = "import os, math; assert 'LEFT' not in os.environ and math.pi > 3"
    here = Path.cwd()

    assert [run(root, code)[0].status for code in (first, second)] == ["passed"] * 2
    assert "LEFT" not in os.environ
    assert Path.cwd() == here


def test_the_folder_of_a_page_is_empty(root: Path) -> None:
    """And is not the project's."""
    (outcome,) = run(root, "import os; print(os.listdir())", want="[]\n")
    assert outcome.status == "passed", outcome.output


@pytest.mark.parametrize(
    "code",
    [
        "print('said')",
        "import sys; sys.stdout.write('said\\n')",
        "import sys; sys.__stdout__.write('said\\n')",
        "import sys; sys.stdout.buffer.write(b'said\\n'); sys.stdout.buffer.flush()",
        "import os; os.write(1, b'said\\n')",
        "import os; os.system('echo said')",
        "import subprocess; subprocess.run(['echo', 'said'])",
        "print('sa', end='', flush=True); import os; os.system('echo id')",
    ],
)
def test_all_that_reaches_the_terminal_is_compared(root: Path, code: str) -> None:
    """From Python, from native code and from other programs."""
    (outcome,) = run(root, code, want="said\n")
    assert outcome.status == "passed", outcome.output
    (outcome,) = run(root, code)
    assert outcome.reason == "printed something that the page does not show"
    assert outcome.output.endswith("It printed:\n    said")


def test_what_goes_to_standard_error_is_not_compared(root: Path) -> None:
    """Warnings of libraries differ from machine to machine."""
    code = "import sys, warnings; warnings.warn('mind'); print('said', file=sys.stderr)"
    (outcome,) = run(root, code)

    assert outcome.status == "passed"


def test_a_doctest_prints_what_it_returns(root: Path) -> None:
    """With the line of the example that differs."""
    code = ">>> 1 + 1\n2\n>>> None\n>>> 'a'\n'b'\n"
    (outcome,) = run(root, code, kind="doctest")

    assert outcome.output.splitlines()[0] == (
        "printed something else than the page shows (code at page.md:4)"
    )


def test_options_of_a_block_and_of_an_example_are_switched(root: Path) -> None:
    """An example's own flag wins over the block's."""
    code = ">>> 2 / 3\n0.67\n>>> 2 / 3  # doctest: -NUMBER\n0.67\n"
    (outcome,) = run(root, code, kind="doctest", flags={"NUMBER": True})

    assert outcome.status == "failed"
    assert "page.md:3" in outcome.output


def test_a_deprecation_in_a_library_is_not_the_page_s(root: Path) -> None:
    """Only what the page's own code does must change."""
    (root / "library.py").write_text(
        "import warnings\n\n\ndef call() -> None:\n"
        "    warnings.warn('old', DeprecationWarning, stacklevel=1)\n\n\n"
        "def blame() -> None:\n"
        "    warnings.warn('old', DeprecationWarning, stacklevel=2)\n",
        "utf-8",
    )
    inside, outside = run(
        root, "import library\nlibrary.call()", "library.blame()", limit=20.0
    )

    assert inside.status == "passed"
    assert outside.reason == "raised DeprecationWarning: old"
