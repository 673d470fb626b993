"""Tests of what a build of the blocks records, repeats, and prints on the page."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from verified.results import Waiting

from tests.verified_project import WAITING, Project

# Two groups, and a note of each run in the file that @LEDGER@ names.
PAGE = """
Page
====

Some words.

.. testcode::

   number = 1
   with open("@LEDGER@", "a") as ledger:
       print("first", file=ledger)

.. testcode::

   print(number)
   with open("@LEDGER@", "a") as ledger:
       print("second", file=ledger)

.. testoutput::

   1

More words.

.. testcode:: other

   with open("@LEDGER@", "a") as ledger:
       print("other", file=ledger)

.. doctest:: gated
   :name: gated
   :requires: gpu

   >>> print(1)
   1
"""

MARKDOWN = """
# Markdown

```{testcode}
print("in Markdown")
```

```{testoutput}
in Markdown
```

```{testcode}
word = "not"
print(word)
```

Words between the code and its output.

```{testoutput}
not
```
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[[], list[str]]:
    """Return what ran since the last call."""
    path = tmp_path / "ledger"

    def read() -> list[str]:
        lines = path.read_text("utf-8").split() if path.exists() else []
        path.write_text("", "utf-8")
        return sorted(lines)

    return read


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project with a page in each markup."""
    page = PAGE.replace("@LEDGER@", str(tmp_path / "ledger"))
    project = Project.make(tmp_path / "project", page__rst=page, other__md=MARKDOWN)
    project.write("verification/waiting.json", json.dumps(WAITING))
    return project


# -- Records ---------------------------------------------------------------------------


def test_every_block_is_recorded(project: Project) -> None:
    """Id, file, true line, status, reason, seconds, date, environment."""
    build = project.build()
    assert build.err == ""
    here = project.results()

    lines = (project.root / "source/page.rst").read_text("utf-8").splitlines()
    assert [
        (b["id"], b["file"], lines[b["line"] - 1].strip(), b["status"], b["reason"])
        for b in here["blocks"].values()
        if b["id"].startswith("page")
    ] == [
        ("page#1", "source/page.rst", "number = 1", "passed", ""),
        ("page#2", "source/page.rst", "print(number)", "passed", ""),
        (
            "page#3",
            "source/page.rst",
            lines[here["blocks"]["page#3"]["line"] - 1].strip(),
            "passed",
            "",
        ),
        (
            "page#gated",
            "source/page.rst",
            ">>> print(1)",
            "skipped",
            "needs an imaginary GPU",
        ),
    ]
    for block in here["blocks"].values():
        assert re.fullmatch(r"[0-9a-f]{64}", block["hash"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", block["when"])
        assert 0 <= block["seconds"] < 60
    assert here["environment"]["device"] == "CPU"
    assert re.fullmatch(r"3\.\d+\.\d+\S*", here["environment"]["python"])
    assert here["environment"]["date"]
    assert build.tally == [
        "5 passed, 0 failed, 1 skipped",
        "  skipped: needs an imaginary GPU (1)",
    ]


def test_junit_has_a_case_for_each_block(project: Project) -> None:
    """What a CI service reads: counts, places, reasons, and the output of failures."""
    project.edit("source/page.rst", "   print(number)\n", "   print(2)\n")
    project.edit("source/other.md", '"not"', '"\\x1bnot"')
    build = project.build()
    assert build.kinds == ["failed", "failed"]
    suite = ET.parse(project.root / "build/verification/junit.xml").getroot()

    counts = {k: int(suite.attrib[k]) for k in ("tests", "failures", "errors")}
    assert counts == {"tests": 6, "failures": 2, "errors": 0}
    assert suite.attrib["skipped"] == "1"
    cases = {case.attrib["name"]: case for case in suite}
    assert cases["page#2"].attrib["file"] == "source/page.rst"
    assert cases["page#2"].attrib["line"] == "15"
    (failure,) = cases["page#2"]
    assert failure.tag == "failure"
    assert failure.attrib["message"].startswith("printed something else than the page")
    assert failure.text
    assert "Expected:\n    1\nGot:\n    2" in failure.text
    assert [child.tag for child in cases["page#gated"]] == ["skipped"]
    assert len(cases["page#1"]) == 0
    assert project.results()["blocks"]["page#2"]["output"] == failure.text


def test_standard_error_of_a_failed_block_is_kept(project: Project) -> None:
    """It is not compared, but a failure shows it."""
    code = 'import sys\n\nprint("a hint", file=sys.stderr)\nprint("wrong")\n'
    project.edit("source/other.md", 'print("in Markdown")\n', code)
    (failed, _not_run) = project.build().warnings

    assert "a hint" in failed.text
    assert failed.line == 5


def test_a_page_runs_alone_in_an_empty_folder(project: Project) -> None:
    """No other page's names or files; only what the page itself offers to download."""
    listing = """
Files
=====

:download:`data.csv` :download:`code.py`

.. testcode::

   import os
   from pathlib import Path

   print(sorted(os.listdir()), "number" in globals(), __name__)
   Path("left.txt").write_text("behind")

.. testoutput::

   ['data.csv'] False __main__

.. testcode:: again

   import os

   print(os.listdir())

.. testoutput:: again

   ['data.csv']
"""
    project.write("source/files.rst", listing)
    project.write("source/data.csv", "1\n")
    project.write("source/code.py", "x = 1\n")
    assert project.build().err.replace("\n", "") == ""


def test_no_folder_is_left_behind(project: Project, tmp_path: Path) -> None:
    """Not even by a page that ends its process."""
    project.edit("source/other.md", 'word = "not"', "import os; os._exit(0)")
    folder = tmp_path / "tmp"
    folder.mkdir()
    project.build("doctest", TMPDIR=str(folder))

    assert [path.name for path in folder.iterdir() if "page-" in path.name] == []


# -- What runs -------------------------------------------------------------------------


def test_the_second_build_runs_and_reads_nothing(
    project: Project, ledger: Callable[[], list[str]]
) -> None:
    """An unchanged project costs nothing; -b doctest runs all of it every time."""
    first = project.build("html")
    assert first.err == ""
    assert ledger() == ["first", "other", "second"]
    assert "5 passed" in first.tally[0]

    second = project.build("html")
    assert second.err == ""
    assert second.read == "0 added, 0 changed, 0 removed"
    assert second.written == set()
    assert "passed" not in second.out
    assert ledger() == []

    assert project.build("doctest").read == "0 added, 0 changed, 0 removed"
    assert ledger() == ["first", "other", "second"]


def test_a_failure_is_repeated_until_it_is_mended(project: Project) -> None:
    """A second build reads no page again, and fails again with the same words."""
    project.edit("source/page.rst", "More words.", "::\n\n   import os")
    project.edit("source/other.md", 'print("in Markdown")', 'print("elsewhere")')
    project.edit("source/other.md", "print(word)", "print(len(5))")
    first = project.build("html")
    second = project.build("html")

    assert sorted(first.kinds) == ["failed", "failed", "python-not-run", "static"]
    assert second.places == first.places
    assert second.read == "0 added, 0 changed, 0 removed"
    assert (first.code, second.code) == (1, 1)

    project.edit("source/page.rst", "::\n\n   import os", "More words.")
    project.edit("source/other.md", 'print("elsewhere")', 'print("in Markdown")')
    project.edit("source/other.md", "print(len(5))", "print(word)")
    assert project.build("html").err == ""


def test_prose_runs_nothing(project: Project, ledger: Callable[[], list[str]]) -> None:
    """Editing words reads their page again, and moves its lines."""
    project.build("html")
    ledger()
    project.edit("source/page.rst", "Some words.", "Some\n\nother words.")
    build = project.build("html")

    assert build.read == "0 added, 1 changed, 0 removed"
    assert "page" in build.written
    assert ledger() == []


def test_a_block_runs_its_group_again(
    project: Project, ledger: Callable[[], list[str]]
) -> None:
    """The blocks before it are needed, those of another group are not."""
    project.build("html")
    ledger()
    project.edit("source/page.rst", "   print(number)\n", "   print(number + 0)\n")
    assert project.build("html").err == ""
    assert ledger() == ["first", "second"]

    project.edit("source/page.rst", 'print("other", ', 'print("othertoo", ')
    assert project.build("html").err == ""
    assert ledger() == ["othertoo"]


def test_a_changed_snippet_runs_the_blocks_that_import_it(
    project: Project, ledger: Callable[[], list[str]]
) -> None:
    """A block depends on the project's own files that it imports."""
    project.write("snippets/__init__.py", "")
    project.write("snippets/half.py", "ONE = 1\n")
    project.edit(
        "source/page.rst", "number = 1", "from snippets.half import ONE as number"
    )
    assert project.build("html").err == ""
    ledger()
    project.write("snippets/half.py", "ONE = 1  # still\n")
    build = project.build("html")

    assert build.err == ""
    assert build.read == "0 added, 1 changed, 0 removed"
    assert ledger() == ["first", "second"]


def test_a_changed_download_runs_its_page(
    project: Project, ledger: Callable[[], list[str]]
) -> None:
    """A block depends on the data that its page offers."""
    project.edit("source/page.rst", "Some words.", "Take :download:`data.csv`.")
    project.write("source/data.csv", "1\n")
    assert project.build("html").err == ""
    ledger()
    project.write("source/data.csv", "2\n")

    assert project.build("html").err == ""
    assert ledger() == ["first", "other", "second"]


def test_results_of_other_versions_and_broken_ones_do_not_count(
    project: Project, ledger: Callable[[], list[str]]
) -> None:
    """After an upgrade, and after an accident under build/, everything runs again."""
    project.build("html")
    ledger()
    path = project.root / "build/verification/here.json"
    content = json.loads(path.read_text("utf-8"))
    content["environment"]["python"] = "3.0.0"
    for broken in (json.dumps(content), '{"schema": 1'):
        path.write_text(broken, "utf-8")
        assert project.build("html").err == ""
        assert ledger() == ["first", "other", "second"]


def test_blocks_can_be_left_alone(
    project: Project, ledger: Callable[[], list[str]]
) -> None:
    """With verified_run off the site is written, and says what is known."""
    build = project.build("html", "verified_run=0")

    assert build.err == ""
    assert ledger() == []
    assert project.lines("page")[0] == "parsed; not yet run"


# -- Hashes ----------------------------------------------------------------------------


def hashes(project: Project, *options: str) -> dict[str, str]:
    """Return the hash of each block."""
    project.build("static", *options)
    blocks = project.results("build/verification/static.json")["blocks"]
    return {key: block["hash"] for key, block in blocks.items()}


def test_a_hash_covers_what_a_result_depends_on(project: Project) -> None:
    """Earlier blocks of the group, the output, the gate and the setup; no more."""
    everything = hashes(project)

    def changed(*options: str) -> set[str]:
        now = hashes(project, *options)
        different = {key for key in now if now[key] != everything.get(key)}
        everything.update(now)
        return different

    assert changed() == set()
    project.edit("source/page.rst", "Some words.", "Some other words.")
    assert changed() == set(), "prose"
    project.edit("source/page.rst", "number = 1", "number = 1 + 0")
    assert changed() == {"page#1", "page#2"}, "the earlier block of a group"
    project.edit("source/page.rst", "   print(number)\n", "   print(number * 1)\n")
    assert changed() == {"page#2"}, "a later block"
    project.edit("source/page.rst", "   1\n\nMore", "   2\n\nMore")
    assert changed() == {"page#2"}, "the expected output"
    project.edit("source/page.rst", "   2\n\nMore", "   1\n\nMore")
    assert changed() == {"page#2"}
    project.edit("source/page.rst", ":requires: gpu", ":requires: gpu tensor-cores")
    assert changed() == {"page#gated"}, "the capabilities"
    project.edit(
        "source/page.rst",
        ".. testoutput::\n",
        ".. testoutput::\n   :options: +NUMBER\n",
    )
    assert changed() == {"page#2"}, "the flags of a comparison"
    assert changed("doctest_global_setup=x = 1") == set(everything), "the setup"
    assert changed("doctest_global_setup=x = 1", "doctest_default_flags=0") == set(
        everything
    ), "the flags of all comparisons"


def test_an_id_is_a_name_or_a_number(project: Project) -> None:
    """Names stay when a block is added before them; a block of two groups has two."""
    project.edit(
        "source/page.rst", ".. testcode:: other\n", ".. testcode:: other, more\n"
    )
    project.build()
    assert set(project.results()["blocks"]) == {
        *("other#1", "other#2", "page#1", "page#2"),
        *("page#3@other", "page#3@more", "page#gated"),
    }


# -- Which pages -----------------------------------------------------------------------


def test_pages_can_be_chosen(project: Project, ledger: Callable[[], list[str]]) -> None:
    """By name or by path; the others are neither run nor complained about."""
    build = project.build("doctest", "verified_pages=source/other.md")
    assert build.err == ""
    assert build.tally == ["2 passed, 0 failed, 0 skipped"]
    assert ledger() == []

    build = project.build("doctest", "verified_pages=other,page")
    assert build.err == ""
    assert build.tally[0] == "5 passed, 0 failed, 1 skipped"
    assert ledger() == ["first", "other", "second"]


def test_a_misspelled_page_is_not_a_success(project: Project) -> None:
    """It is answered with the nearest name, and runs nothing."""
    build = project.build("doctest", "verified_pages=othr")

    (warned,) = build.warnings
    assert (warned.kind, build.code) == ("empty", 1)
    assert warned.text == "there is no page 'othr'; did you mean other?"
    assert "passed" not in build.out


def test_one_page_of_two_misspelled_is_not_a_success(project: Project) -> None:
    """The other one is run."""
    build = project.build("doctest", "verified_pages=othr page")

    assert build.kinds == ["empty"]
    assert build.code == 1
    assert build.tally[0] == "3 passed, 0 failed, 1 skipped"


@pytest.mark.parametrize("builder", ["doctest", "static"])
def test_a_project_without_blocks_is_not_a_success(
    tmp_path: Path, builder: str
) -> None:
    """Zero tests are no proof."""
    project = Project.make(tmp_path, page__rst="Page\n====\n\nWords.\n")
    build = project.build(builder)

    assert build.kinds == ["empty"]
    assert build.code == 1


def test_a_project_of_skipped_blocks_is_not_a_success(project: Project) -> None:
    """Nothing was proved there either."""
    project.write(
        "source/page.rst", "Page\n====\n\n" + PAGE[PAGE.index(".. doctest") :]
    )
    build = project.build("doctest", "verified_pages=page")

    assert build.kinds == ["empty"]
    assert build.code == 1


def test_a_failure_fails_the_build_without_a_flag(project: Project) -> None:
    """Nobody has to remember a flag."""
    project.edit("source/page.rst", "   print(number)\n", "   print(2)\n")
    build = project.build("doctest", strict=False)

    assert build.kinds == ["failed"]
    assert build.code == 1
    assert project.build("static", strict=False).code == 0


# -- Setup -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setup", "text"),
    [
        ("1 / 0", "the global setup failed: ZeroDivisionError: division by zero"),
        ("print('hello')", "the global setup printed 'hello\\n'"),
    ],
)
def test_a_setup_that_fails_or_prints_is_told_of_each_block(
    project: Project, setup: str, text: str
) -> None:
    """No block is unaccounted for."""
    build = project.build("doctest", f"doctest_global_setup={setup}")

    assert build.kinds == ["failed"] * 5
    assert all(text in warned.text for warned in build.warnings)
    assert build.tally[0] == "0 passed, 0 failed, 1 skipped, 5 not run"


def test_a_cleanup_that_fails_is_told_of_the_last_block(project: Project) -> None:
    """It ran after that, and no page may end so."""
    build = project.build("doctest", "doctest_global_cleanup=1 / 0")

    assert set(build.kinds) == {"failed"}
    assert len(build.kinds) == 3
    assert "the global cleanup failed: ZeroDivisionError" in build.err


# -- The waiting list ------------------------------------------------------------------


def test_a_waiting_list_is_kept_in_order(project: Project) -> None:
    """It names blocks that wait, with a date and a reason, and can only shrink."""
    entry = {"waits_for": ["gpu"], "since": "2026-11-21", "reason": "no GPU is at hand"}
    blocks = {
        "page#gone": entry,
        "page#1": {**entry, "waits_for": []},
        "page#gated": {"waits_for": ["python"], "since": "soon"},
        "other#1": {**entry, "waits_for": [], "since": "2999-01-01"},
    }
    project.write(
        "verification/waiting.json", json.dumps({"at_most": 3, "blocks": blocks})
    )
    build = project.build()

    found = [w for w in build.warnings if w.kind == "waiting"]
    assert {w.file for w in found} == {"verification/waiting.json"}
    assert sorted(w.text for w in found) == [
        "4 blocks wait, at most 3 may",
        "other#1 waits but has passed: remove it",
        "other#1: since 2999-01-01 lies in the future",
        "page#1 waits but has passed: remove it",
        "page#gated: no reason is given",
        "page#gated: since is 'soon', not a date",
        "page#gated: waits_for differs from the block's :requires:",
        "page#gone waits but is no block: remove it",
    ]
    assert build.kinds == ["waiting"] * 8
    assert build.code == 1


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", "1", '{"at_most": 1}', '{"at_most": "x", "blocks": {}}'),
        '{"at_most": 1, "blocks": {"page#1": "gpu"}}',
    ],
)
def test_a_broken_waiting_list_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever is wrong with it."""
    path = tmp_path / "waiting.json"
    path.write_text(text, "utf-8")

    with pytest.raises(ValueError, match=r"^waiting\.json is not a waiting list: "):
        Waiting.read(path)


@pytest.mark.parametrize("builder", ["doctest", "html"])
def test_broken_files_are_located_errors(project: Project, builder: str) -> None:
    """What was proved elsewhere is not lost in silence, and nothing may wait."""
    project.write("verification/a.json", "{")
    project.write("verification/b.json", "[]")
    project.write("verification/c.json", '{"schema": 2}')
    project.write(
        "verification/d.json", '{"schema": 1, "environment": {}, "blocks": [{}]}'
    )
    project.write("verification/waiting.json", "{")
    build = project.build(builder)

    assert sorted((w.file, w.kind) for w in build.warnings) == [
        ("source/page.rst", "never"),
        *((f"verification/{name}.json", "results") for name in "abcd"),
        ("verification/waiting.json", "waiting"),
    ]
    assert build.code == 1


# -- On the page -----------------------------------------------------------------------

RAN = r"ran on CPU · (torch|Python) [\d.]+\S* · \d{4}-\d\d-\d\d · (< 0\.1|\d+\.\d) s"


def test_each_block_has_its_line(project: Project) -> None:
    """In both markups, after the output where that follows the code directly."""
    assert project.build("html").err == ""
    lines = project.lines("page")
    assert [bool(re.fullmatch(RAN, line)) for line in lines] == [True] * 3 + [False]
    assert lines[3] == "type-checked; not yet run on a GPU · needs an imaginary GPU"
    assert [bool(re.fullmatch(RAN, line)) for line in project.lines("other")] == [
        True
    ] * 2

    def order(page: str) -> str:
        html = project.html(page)
        marks = re.findall(
            r"(highlight-python|highlight-pycon|highlight-none|verified-text)\b", html
        )
        return "".join(
            {"python": "c", "pycon": "c", "none": "o", "text": "|"}[
                mark.partition("-")[2]
            ]
            for mark in marks
        )

    assert order("page") == "c|co|c|c|"
    assert order("other") == "co|c|o"


def test_a_failed_block_says_so_on_the_page(project: Project) -> None:
    """A build without -W still tells the reader."""
    project.edit("source/other.md", 'print("in Markdown")', 'print("elsewhere")')
    project.build("html")
    first, second = project.lines("other")

    assert first.startswith("fails on CPU: printed something else than the page shows")
    assert second.startswith("was not run on CPU: an earlier block of the page failed")


STATUS = """
Status
======

.. verification-status::
"""


def test_the_status_page_counts_every_block(project: Project) -> None:
    """Totals, environments, skip reasons, and a link to each block."""
    project.write("source/status.rst", STATUS)
    assert project.build("html").err == ""
    html = project.html("status")

    assert "6 blocks on 2 pages: 5 passed, 1 not yet run." in html
    assert "needs an imaginary GPU" in html
    for page in ("page", "other"):
        anchors = re.findall(rf'href="{page}\.html#([\w-]+)"', html)
        assert len(anchors) == (4 if page == "page" else 2)
        assert all(f'id="{anchor}"' in project.html(page) for anchor in anchors)
    environments = html[html.index("Environments") : html.index("Skipped")]
    assert "CPU" in environments
    assert ">5<" in environments


def test_the_status_page_follows_its_blocks(project: Project) -> None:
    """It is written again when a line number changes, and not otherwise."""
    project.write("source/status.rst", STATUS)
    project.build("html")
    assert project.build("html").written == set()
    project.edit("source/page.rst", "Some words.", "Some\n\nother words.")

    assert "status" in project.build("html").written
    assert "line 17" in project.html("status")


def test_a_status_page_without_blocks_is_empty(tmp_path: Path) -> None:
    """The first page of a new project."""
    project = Project.make(tmp_path, status__rst=STATUS)

    assert project.build("html").err == ""


@pytest.mark.parametrize("builder", ["dirhtml", "singlehtml", "text"])
def test_other_builders_write_the_pages(project: Project, builder: str) -> None:
    """The status lines and tables stop none of them."""
    project.write("source/status.rst", STATUS)
    project.edit(
        "source/index.rst", "   :glob:\n\n   *\n", "   page\n   other\n   status\n"
    )
    build = project.build(builder)

    assert build.err == ""
    assert build.code == 0


def test_pages_read_and_written_in_parallel_are_the_same(
    project: Project, tmp_path: Path
) -> None:
    """Two processes find the same faults, blocks and lines as one."""
    shutil.copytree(project.root, tmp_path / "parallel")
    both = (project, Project(tmp_path / "parallel"))
    builds = []
    for each, jobs in zip(both, ("-j1", "-j2"), strict=True):
        each.write("source/status.rst", STATUS)
        for number in range(8):
            each.write(f"source/more{number}.md", MARKDOWN)
        each.edit("source/more3.md", '"not"', '"wrong"')
        each.edit("source/more5.md", "Words between", "```python\nx = 1\n```\n\nWords")
        builds.append(each.build("html", jobs))

    one, two = builds
    assert one.places == two.places
    assert len(one.places) == 2
    assert "more7" in project.html("status")
    kinds = re.compile(r"verified-(?:passed|failed|waiting|stale)")
    for page in ("page", "more3", "status"):
        pages = [kinds.findall(each.html(page)) for each in both]
        assert pages[0] == pages[1]

    project = both[1]
    project.edit("source/more3.md", '"wrong"', '"not"')
    assert project.build("html").written - {"index"} == {"more3", "status"}
