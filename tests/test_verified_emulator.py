"""Tests of blocks that run on an emulator of what the machine lacks."""

from pathlib import Path

import pytest

from tests.verified_project import Project

# What a page imports as ``engine`` is real, absent, or made by ``motor.install()``.
MOTOR = """
import sys
import types

def install():
    engine = types.ModuleType("engine")
    engine.name = "emulated"
    sys.modules["engine"] = engine
"""
PAGE = """
Page
====

.. testcode::
   :requires: engine

   import engine
   print(len(engine.name) > 0)

.. testoutput::

   True

.. doctest:: bare
   :requires: gpu engine

   >>> print(1)
   1
"""
WAITING = """{"at_most": 1, "blocks": {"page#2": {
  "waits_for": ["gpu", "engine"], "since": "2026-11-22", "reason": "no GPU is at hand"
}}}"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A page for an engine that the machine lacks, and an emulator of it."""
    project = Project.make(tmp_path / "project", page__rst=PAGE)
    project.write("motor/__init__.py", MOTOR)
    project.write(
        "engine.py", 'name = ""\nif not name:\n    raise RuntimeError("empty")'
    )
    project.write("verification/waiting.json", WAITING)
    return project


def status(project: Project) -> dict[str, tuple[str, bool]]:
    """Say how each block ended, and whether on the emulator."""
    blocks = project.results()["blocks"]
    return {k: (b["status"], b["emulated"]) for k, b in blocks.items()}


def test_a_block_runs_on_the_emulator_and_says_so(project: Project) -> None:
    """Only a block all of whose missing capabilities are emulated does."""
    build = project.build("html")

    assert build.err == ""
    assert status(project) == {"page#1": ("passed", True), "page#2": ("skipped", False)}
    assert project.lines("page")[0].startswith("ran on CPU with the emulator · ")
    assert project.lines("page")[1].startswith("type-checked; not yet run on a GPU")


def test_the_real_thing_is_preferred_where_it_is(project: Project) -> None:
    """With the capability no emulator is started, and none is named."""
    project.write("gpu", "Imaginary 9000")
    project.write("engine.py", 'name = "real"')
    project.write("verification/waiting.json", '{"at_most": 1, "blocks": {}}')
    build = project.build("html")

    assert build.err == ""
    assert status(project) == {"page#1": ("passed", False), "page#2": ("passed", False)}
    assert project.lines("page")[0].startswith("ran on Imaginary 9000 · ")


def test_a_gpu_runner_does_not_emulate(project: Project) -> None:
    """There a block without the real thing is an error, not a pass."""
    build = project.build("doctest", strict=False, GUIDE_REQUIRE_GPU="1")

    assert build.code != 0
    assert status(project)["page#1"] == ("skipped", False)
    assert "skipped for lack of 'engine', which a GPU runner must have" in build.err


def test_an_emulator_that_fails_fails_its_blocks(project: Project) -> None:
    """It does not skip them."""
    project.write("motor/__init__.py", "def install():\n    raise OSError('no oil')\n")
    build = project.build("doctest", strict=False)

    assert build.code != 0
    assert status(project)["page#1"][0] == "failed"
    assert "the emulator failed: OSError: no oil" in build.err


def test_a_changed_emulator_runs_its_blocks_again(project: Project) -> None:
    """The hash of a block covers the files of what may run it, and no others."""
    project.build("doctest")
    before = project.results()["blocks"]
    project.write("motor/pistons.py", "count = 4")
    project.write("motor/__init__.py", f"from . import pistons\n{MOTOR}")
    project.write("other.py", "count = 5")
    project.build("doctest")
    after = project.results()["blocks"]

    assert before["page#1"]["hash"] != after["page#1"]["hash"]
    project.write("other.py", "count = 6")
    project.build("doctest")

    assert project.results()["blocks"]["page#1"]["hash"] == after["page#1"]["hash"]
