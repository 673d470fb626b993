"""The gallery's index: every failure is found by what is seen, and by its cause."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from failures import CAUSES, SYMPTOMS, read

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "source/failures"
PAGES = sorted(page for page in GALLERY.glob("*.md") if page.stem != "index")

CONF = f"""
import sys
sys.path.insert(0, {str(ROOT / "_ext")!r})
extensions = ["myst_parser", "failures"]
"""
ABOUT = {
    "symptom": "[loss-is-nan, works-in-fp32]",
    "cause": "overflow",
    "seen_as": "the loss is `nan`, at | step 1",
}


def page(**about: str) -> str:
    """Write a page of the gallery that says ``about`` of itself."""
    said = "\n".join(f"{k}: {v}" for k, v in {**ABOUT, **about}.items() if v)
    return f"---\n{said}\n---\n\n# A title\n\nText.\n"


def build(folder: Path, key: str, **pages: str) -> tuple[str, str]:
    """Build an index of one table over ``pages``; return it and what was said."""
    source = folder / "source"
    source.mkdir()
    (source / "conf.py").write_text(CONF, "utf-8")
    for name, text in pages.items():
        (source / f"{name}.md").write_text(text, "utf-8")
    index = f"# I\n\n```{{failures}} {key}\n```\n\n```{{toctree}}\n:glob:\n*\n```\n"
    (source / "index.md").write_text(index, "utf-8")
    sphinx = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-b", "html", source, folder / "html"],
        capture_output=True,
        text=True,
        check=False,
    )
    html = folder / "html/index.html"
    table = re.search(r"(?s)<table.+</table>", html.read_text("utf-8"))
    return re.sub(r"<[^>]+>|\s+", " ", table[0]) if table else "", sphinx.stderr


@pytest.mark.parametrize("key", ["loss-is-nan", "works-in-fp32", "overflow"])
def test_a_failure_is_found_by_each_of_its_symptoms_and_by_its_cause(
    tmp_path: Path, key: str
) -> None:
    """A row says what is seen, marks and bars included, and links the page."""
    other = page(symptom="[other-error]", cause="casts", seen_as="something else")

    table, said = build(tmp_path, key, one=page(), two=other)

    assert not said
    words = " ".join(table.split())
    assert words == "What you see The failure the loss is nan , at | step 1 A title"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"symptom": "[loss-is-nam]"}, "symptom is a list of loss-is-nan, "),
        ({"symptom": "loss-is-nan"}, "symptom is a list of"),
        ({"symptom": "[]"}, "symptom is a list of"),
        ({"cause": "overflows"}, "cause is one of overflow, underflow, "),
        ({"seen_as": ""}, "needs symptom, cause and seen_as; it has "),
    ],
)
def test_a_wrong_word_is_an_error_of_the_build(
    tmp_path: Path, about: dict[str, str], message: str
) -> None:
    """It names the page, what it says, and what is allowed."""
    _, said = build(tmp_path, "overflow", one=page(**about))

    assert f"one.md: {message}" in said or f"one.md {message}" in said, said


def test_a_heading_of_the_index_without_a_failure_is_an_error(tmp_path: Path) -> None:
    """An empty table would promise what is not there."""
    _, said = build(tmp_path, "rounding", one=page())

    assert "no page has the symptom or cause 'rounding'; there are loss-is-nan" in said


def test_the_index_names_every_symptom_and_every_cause_once() -> None:
    """With the directive's own check, each page is in two lists at least."""
    keys = re.findall(r"{failures} (\S+)", (GALLERY / "index.md").read_text("utf-8"))

    assert sorted(keys) == sorted(SYMPTOMS + CAUSES)


def test_there_are_thirty_failures_or_more() -> None:
    """As many as users met and could be repeated here."""
    assert len(PAGES) >= 30


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_failure_is_shown_in_both_halves(path: Path) -> None:
    """It fails, and is fixed: each in a block with an output that is compared."""
    text = path.read_text("utf-8")
    failing, fixed = (
        re.search(rf"(?ms)^## {title}\n(.+?)(?=^## |\Z)", text)
        for title in ("See it fail", "The fix")
    )

    assert read(path).name == path.stem
    assert failing
    assert fixed
    for half in (failing[1], fixed[1]):
        assert re.search(r"{testoutput}|^>>> ", half, re.M), half
    assert "\n## Why\n" in text
    assert "\n## Detect it\n" in text
    assert re.search(r"\n## Where it was reported\n", text)
    assert f"(failures-{path.stem.replace('_', '-')})=" in text
