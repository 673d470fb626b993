"""Tests of blocks that need what this machine lacks, on an imaginary GPU.

``tests/traps/pretend.py`` is the registry of an imaginary machine: it has a GPU when
the file ``gpu`` lies beside it. Everything else is what runs on a real one.
"""

import json
import re
import shutil
from datetime import date
from pathlib import Path

import pytest

from tests.verified_project import WAITING, Project

H100 = "NVIDIA H100 80GB HBM3"

PAGE = """
Page
====

.. testcode::

   number = 1

.. testcode:: gated
   :name: gated
   :requires: gpu

   print("on the GPU")

.. testoutput:: gated

   on the GPU
"""

PLAIN = """
# Another page

```{testcode}
number = 1
```
"""

STATUS = """
Status
======

.. verification-status::
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project on a machine without a GPU."""
    pages = {"page__rst": PAGE, "plain__md": PLAIN, "status__rst": STATUS}
    project = Project.make(tmp_path / "cpu", **pages)
    project.write("verification/waiting.json", json.dumps(WAITING))
    return project


def with_gpu(project: Project) -> Project:
    """Return a copy of the project on a machine with a GPU."""
    there = Project(project.root.with_name("gpu"))
    shutil.rmtree(there.root, ignore_errors=True)
    shutil.copytree(project.root, there.root, ignore=shutil.ignore_patterns("build"))
    there.write("gpu", f"{H100}\n")
    return there


def saved_by(project: Project) -> Path:
    """Return the one results file that a project has saved."""
    folder = project.root / "verification"
    (path,) = (path for path in folder.iterdir() if path.name != "waiting.json")
    return path


def gated_line(project: Project) -> str:
    """Return the status line of the gated block."""
    return project.lines("page")[1]


# -- One machine -----------------------------------------------------------------------


def test_a_machine_without_a_gpu_skips_with_a_sentence(project: Project) -> None:
    """The reason is words, in the tally and in the record."""
    build = project.build()

    assert build.err == ""
    assert build.tally == [
        "2 passed, 0 failed, 1 skipped",
        "  skipped: needs an imaginary GPU (1)",
    ]
    assert project.results()["blocks"]["page#gated"]["status"] == "skipped"


def test_a_machine_with_a_gpu_runs_and_saves(project: Project) -> None:
    """The file is named after the device; what passed is off the waiting list."""
    there = with_gpu(project)
    build = there.build("doctest", "verified_save=verification")

    assert build.err == ""
    assert build.tally == ["3 passed, 0 failed, 0 skipped"]
    path = saved_by(there)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    saved = there.results(f"verification/{path.name}")
    assert saved["environment"]["device"] == H100
    assert (saved["environment"]["cuda"], saved["environment"]["driver"]) == (
        "13.0",
        "580",
    )
    assert saved["blocks"]["page#gated"]["status"] == "passed"
    waiting = json.loads((there.root / "verification/waiting.json").read_text("utf-8"))
    assert waiting == {"at_most": 0, "blocks": {}}


def test_a_pass_that_is_not_saved_must_be(project: Project) -> None:
    """A list that names what passed is out of date."""
    build = with_gpu(project).build()

    assert [(w.kind, w.text) for w in build.warnings] == [
        ("waiting", "page#gated waits but has passed: remove it")
    ]


def test_a_machine_without_a_gpu_saves_under_its_python(project: Project) -> None:
    """Skips are not saved: they say nothing about the block."""
    assert project.build("doctest", "verified_save=verification").err == ""
    (path,) = (project.root / "verification").glob("cpu-*.json")

    assert re.fullmatch(r"cpu-python3\.\d+\.\d+\S*\.json", path.name)
    saved = project.results(f"verification/{path.name}")
    assert sorted(saved["blocks"]) == ["page#1", "plain#1"]


def test_an_output_follows_the_gate_of_its_code(project: Project) -> None:
    """On the GPU the inherited output is compared."""
    there = with_gpu(project)
    there.edit("source/page.rst", "   on the GPU\n", "   elsewhere\n")
    build = there.build()

    assert build.kinds == ["failed"]
    assert "Expected:\n    elsewhere\nGot:\n    on the GPU" in build.err


# -- A runner that must have a GPU -----------------------------------------------------


def test_a_required_gpu_that_is_missing_is_an_error(project: Project) -> None:
    """A broken driver cannot turn a GPU runner green."""
    build = project.build("doctest", GUIDE_REQUIRE_GPU="1")

    (warned,) = build.warnings
    line = project.results()["blocks"]["page#gated"]["line"]
    assert warned.place == ("source/page.rst", line, "gate")
    assert "skipped for lack of 'gpu', which a GPU runner must have" in warned.text
    assert build.code == 1


def test_a_required_gpu_that_is_there_is_no_error(project: Project) -> None:
    """Nor is the lack of what only some runners have."""
    there = with_gpu(project)
    rare = PAGE.replace("gated", "rare").replace("gpu", "gpu tensor-cores")
    there.write("source/rare.rst", rare)
    entry = {**WAITING["blocks"]["page#gated"], "waits_for": ["gpu", "tensor-cores"]}  # type: ignore[index]
    listed = {"at_most": 1, "blocks": {"rare#rare": entry}}
    there.write("verification/waiting.json", json.dumps(listed))
    build = there.build("doctest", "verified_save=verification", GUIDE_REQUIRE_GPU="1")

    assert build.err == ""
    assert build.tally[1] == "  skipped: needs imaginary tensor cores (1)"


@pytest.mark.parametrize("value", ["", "0"])
def test_no_gpu_is_required_by_default(project: Project, value: str) -> None:
    """An empty variable and 0 say no."""
    assert project.build("doctest", GUIDE_REQUIRE_GPU=value).err == ""


# -- Results from elsewhere ------------------------------------------------------------


def test_results_from_a_gpu_reach_the_page_and_leave_it(project: Project) -> None:
    """A results file writes its pages again, reads none, and is not missed twice.

    The whole life of a block: waiting, run elsewhere, changed, run again, forgotten.
    """
    assert project.build("html").err == ""
    assert gated_line(project) == (
        "type-checked; not yet run on a GPU · needs an imaginary GPU"
    )

    # The GPU runner proposes its file; the waiting list shrinks with it.
    there = with_gpu(project)
    there.build("doctest", "verified_pages=page", "verified_save=verification")
    saved = saved_by(there)
    committed = f"verification/{saved.name}"
    for path in (saved, saved.with_name("waiting.json")):
        project.write(f"verification/{path.name}", path.read_text("utf-8"))
    build = project.build("html")
    assert build.err == ""
    assert build.read == "0 added, 0 changed, 0 removed"
    assert build.written - {"index"} == {"page", "status"}, "not the other page"
    assert re.fullmatch(
        rf"ran on {H100} · (torch|Python) \S+ · {date.today()} · <\s0.1\ss",
        gated_line(project),
    )
    assert H100 in project.html("status")
    assert ">580<" in project.html("status")

    # The block is edited: what ran was another one.
    project.edit("source/page.rst", 'print("on', 'print("on" + "')
    build = project.build("html")
    assert build.kinds == ["never"]
    assert build.warnings[0].file == "source/page.rst"
    assert f"changed since it ran on {H100}" in gated_line(project)

    # Neither edit nor file: never run, and reported again at each build.
    project.edit("source/page.rst", 'print("on" + "', 'print("on')
    assert project.build("html").err == ""
    (project.root / committed).unlink()
    for _ in range(2):
        build = project.build("html")
        assert build.kinds == ["never"]
        assert build.read == "0 added, 0 changed, 0 removed"
    assert "not yet run on a GPU" in gated_line(project)


def test_an_ungated_block_names_the_gpu_and_what_changed(project: Project) -> None:
    """The highest rung is the GPU; after an edit the CPU, with a note."""
    there = with_gpu(project)
    there.build("doctest", "verified_save=verification")
    saved = saved_by(there)
    project.write(f"verification/{saved.name}", saved.read_text("utf-8"))
    (project.root / "verification/waiting.json").unlink()
    assert project.build("html").err == ""
    assert project.lines("plain")[0].startswith(f"ran on {H100} · ")

    project.edit("source/plain.md", "number = 1", "number = 2")
    assert project.build("html").err == ""
    line = project.lines("plain")[0]
    assert line.startswith("ran on CPU · ")
    assert line.endswith(f"changed since it ran on {H100}")


def test_a_failure_elsewhere_is_a_failure(project: Project) -> None:
    """What fails on a GPU is wrong, whatever a CPU says."""
    there = with_gpu(project)
    there.edit("source/page.rst", "   on the GPU\n", "   elsewhere\n")
    there.build("doctest", "verified_save=verification")
    saved = saved_by(there)
    project.edit("source/page.rst", "   on the GPU\n", "   elsewhere\n")
    project.write(f"verification/{saved.name}", saved.read_text("utf-8"))
    build = project.build("html")

    assert build.kinds == ["failed"]
    assert gated_line(project).startswith(
        f"fails on {H100}: printed something else than the page shows"
    )


# -- Probes ----------------------------------------------------------------------------


def test_a_probe_that_ends_its_process_is_told_of_each_block(project: Project) -> None:
    """A driver that crashes is no reason to stop without a line."""
    project.edit("source/page.rst", ":requires: gpu", ":requires: deadly")
    waiting = json.dumps(WAITING).replace('["gpu"]', '["deadly"]')
    project.write("verification/waiting.json", waiting)
    build = project.build()

    (warned,) = build.warnings
    assert (warned.file, warned.kind) == ("source/page.rst", "gate")
    assert "ended the process that ran it (exit status 3)" in warned.text
    assert build.tally[0] == "2 passed, 0 failed, 1 skipped"
