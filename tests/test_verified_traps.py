"""Every fault planted in tests/traps/faulty is reported, where it is; nothing else is.

A comment ``FAULT kind +3`` in a page says that three lines further down there is a
fault of that kind. The pages of tests/traps/clean are the same without the faults.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.verified_project import TRAPS, Build, Project

_FAULT = re.compile(r"FAULT ([\w -]+) \+(\d+)")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The faulty pages, after one build."""
    project = Project.copy(
        TRAPS / "faulty", tmp_path_factory.mktemp("traps") / "faulty"
    )
    return project.build("doctest", "verified_jobs=4", "verified_time_limit=2")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Their twins, after one build."""
    project = Project.copy(TRAPS / "clean", tmp_path_factory.mktemp("traps") / "clean")
    return project.build("doctest")


def planted(root: Path) -> Counter[tuple[str, int, str]]:
    """Read what the pages say about their own faults."""
    found: Counter[tuple[str, int, str]] = Counter()
    for path in sorted(root.glob("source/*/*.*")):
        name = path.relative_to(root).as_posix()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if match := _FAULT.search(line):
                at = number + int(match[2])
                found.update((name, at, kind) for kind in match[1].split())
    return found


def titles(path: Path) -> list[str]:
    """Return the titles of a page in either markup."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return re.findall(r"^## (.*)$", text, re.M)
    return re.findall(r"^(.*)\n--+$", text, re.M)


def test_every_planted_fault_is_reported_at_its_line_and_nothing_else(
    faulty: Build,
) -> None:
    """The set of (file, line, kind) is exactly that of the planted faults."""
    expected = planted(faulty.project.root)

    assert faulty.places - expected == Counter(), "reported, but not planted"
    assert expected - faulty.places == Counter(), "planted, but not reported"
    assert faulty.code != 0


@pytest.mark.parametrize("markup", ["rst", "md"])
def test_both_markups_have_the_same_traps(markup: str) -> None:
    """Each markup has more than 25 faults, of every kind, and a twin of each page."""
    expected = planted(TRAPS / "faulty")
    here = [place for place in expected if place[0].startswith(f"source/{markup}/")]
    assert len(here) >= 90
    assert {kind for _, _, kind in here} >= {
        *("python-not-run", "hidden", "skip", "option", "output", "gate", "syntax"),
        *("exception", "failed", "never", "static", "deprecated", "docutils"),
    }

    for path in (TRAPS / "faulty/source" / markup).iterdir():
        twin = TRAPS / "clean/source" / markup / path.name
        assert titles(path) == titles(twin), path


def test_the_clean_twin_builds_silently(clean: Build) -> None:
    """What is right is not reported: no warning, no problem, exit status 0."""
    assert clean.err == ""
    assert clean.code == 0
    assert not planted(clean.project.root)
    assert re.fullmatch(r"\d\d\d passed, 0 failed, \d\d skipped", clean.tally[0])


def test_skips_are_counted_with_their_reason(clean: Build) -> None:
    """The tally, the records and the reasons agree."""
    blocks = clean.project.results()["blocks"].values()
    skipped = [block for block in blocks if block["status"] == "skipped"]

    assert {block["reason"] for block in skipped} == {"needs an imaginary GPU"}
    assert clean.tally[1] == f"  skipped: needs an imaginary GPU ({len(skipped)})"
    assert f"{len(blocks) - len(skipped)} passed" in clean.tally[0]


@pytest.mark.parametrize("page", ["rst/failing.rst", "md/failing.md"])
def test_a_traceback_names_every_line_of_the_page(faulty: Build, page: str) -> None:
    """The call and the frame inside it are at the page's lines, and quoted."""
    lines = (TRAPS / "faulty/source" / page).read_text("utf-8").splitlines()
    inner = next(n for n, text in enumerate(lines, 1) if "return 1 / number" in text)
    outer = next(n for n, text in enumerate(lines, 1) if "divide(0)" in text)

    here = (w.text for w in faulty.warnings if w.file == f"source/{page}")
    (text,) = (text for text in here if "in divide" in text)
    assert f'File "source/{page}", line {outer}, in <module>' in text
    assert f'File "source/{page}", line {inner}, in divide' in text
    assert "    return 1 / number\n           ~~^~~~~~~~" in text
    assert "_ext" not in text
