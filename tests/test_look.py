"""The look: formulas, drawn bits, repository buttons, addresses and dates."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CONF = f"""
import sys
sys.path.insert(0, {str(ROOT / "_ext")!r})
project = "Half the Bits"
extensions = ["myst_parser", "sphinx_copybutton", "look"]
myst_enable_extensions = ["dollarmath"]
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
templates_path = [{str(ROOT / "_templates")!r}]
"""

Build = Callable[..., tuple[Path, str]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that builds a site of one page."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "conf.py").write_text(CONF, "utf-8")
    (source / "_static").symlink_to(ROOT / "_static")
    set_by_ci = ("GITHUB_REPOSITORY", "GITHUB_BASE_REF", "READTHEDOCS_CANONICAL_URL")
    outside = {k: v for k, v in os.environ.items() if k not in set_by_ci}

    def run(text: str, **environment: str) -> tuple[Path, str]:
        if text:
            (source / "index.md").write_text(text, "utf-8")
        html = tmp_path / "html"
        sphinx = subprocess.run(
            [sys.executable, "-m", "sphinx", "-q", "-b", "html", source, html],
            env={**outside, **environment, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return html, sphinx.stderr

    return run


def git(folder: Path, *arguments: str) -> None:
    """Run git as a fixed author on a fixed day."""
    day = "2026-02-03T12:00:00+0000"
    person = {"NAME": "A", "EMAIL": "a@example.org", "DATE": day}
    environment = {
        f"GIT_{role}_{key}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in person.items()
    }
    subprocess.run(["git", *arguments], cwd=folder, check=True, env=environment)


def test_formulas_are_mathml(build: Build) -> None:
    """A formula is written as MathML, an index stays an index, a fence its height."""
    html, _ = build("# T\n\n$\\hat{v}_t$ and $\\lfloor x \\rfloor$\n\n$$|x|$$ (eq)\n")
    text = "".join((html / "index.html").read_text("utf-8").split())

    assert "munderover" not in text
    assert '<msub><moveraccent="true"><mi>v</mi>' in text
    assert '<mostretchy="false">⌊</mo>' in text
    assert '<mathxmlns="http://www.w3.org/1998/Math/MathML"display="block">' in text
    assert '<spanclass="eqno">(1)' in text
    assert not re.search("<script[^>]*mathjax", text)


def test_a_formula_that_cannot_be_written_is_a_located_warning(build: Build) -> None:
    """The warning names the page, its line and the formula."""
    _, warnings = build("# T\n\nText $\\nosuchmacro{x}$ text.\n")

    assert "index.md:3: WARNING: cannot write" in warnings
    assert "nosuchmacro" in warnings


def test_bits_are_drawn_by_field(build: Build) -> None:
    """Cells carry their field, the rest is dropped, the label is there to be read."""
    html, warnings = build(
        "# T\n\n```{bits} 01001\n:fields: 1 2\n:label: five <bits>\n```\n"
    )
    text = (html / "index.html").read_text("utf-8")

    assert not warnings
    assert 'role="img" aria-label="five &lt;bits&gt;"' in text
    assert '<b class="sign">0</b><b class="exponent">1</b>' in text
    assert text.count('<b class="dropped">') == 2


def test_bits_that_make_no_sense_are_refused(build: Build) -> None:
    """A wrong digit, too many bits or fields, and a missing label are errors."""
    senseless = [
        "01021\n:fields: 1 2\n:label: a wrong digit",
        "0101\n:fields: 3 2\n:label: more bits in the fields than there are",
        "0101\n:fields: 1 1 1 1\n:label: more fields than a number has",
        "0101\n:fields: 1 2",
    ]
    _, warnings = build(
        "# T\n" + "".join(f"\n```{{bits}} {block}\n```\n" for block in senseless)
    )

    complaint = "not a bit pattern with these fields"
    for line, text in ((3, complaint), (8, complaint), (13, complaint), (18, "label")):
        assert re.search(rf"index.md:{line}: ERROR: .*{text}", warnings), warnings


def test_repository_buttons_need_a_repository(build: Build) -> None:
    """No button without a known repository: there is nothing to lead to."""
    html, _ = build("# T\n")

    assert "github.com" not in (html / "index.html").read_text("utf-8")


def test_repository_buttons_lead_to_the_repository(build: Build) -> None:
    """In CI the repository is known: edit, issue and source lead to it."""
    html, _ = build("# T\n", GITHUB_REPOSITORY="someone/guide")
    text = (html / "index.html").read_text("utf-8")

    assert "https://github.com/someone/guide/edit/main/source/index.md" in text
    assert "https://github.com/someone/guide/issues/new" in text


def test_the_404_page_finds_home_from_any_depth(build: Build) -> None:
    """Its links begin at the site's root, which the canonical address tells."""
    html, _ = build("# T\n", READTHEDOCS_CANONICAL_URL="https://x.org/en/latest/")

    assert 'href="/en/latest/index.html"' in (html / "404.html").read_text("utf-8")
    text = (html / "index.html").read_text("utf-8")
    assert '<link rel="canonical" href="https://x.org/en/latest/index.html"' in text


def test_a_page_is_dated_by_its_last_commit(tmp_path: Path, build: Build) -> None:
    """The date is that of the page's own last change, not of the build."""
    page = tmp_path / "source" / "index.md"
    page.write_text("# T\n", "utf-8")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "source")
    git(tmp_path, "commit", "--quiet", "--message", "Begin")
    html, _ = build("")

    assert "Last updated on 2026-02-03" in (html / "index.html").read_text("utf-8")


def test_an_uncommitted_page_has_no_date(build: Build) -> None:
    """Without history nothing is known, so nothing is said."""
    html, _ = build("# T\n")

    assert "Last updated" not in (html / "index.html").read_text("utf-8")
