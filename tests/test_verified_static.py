"""Tests of the checks that run no block: deprecated names and the type checker."""

import ast
import re
from pathlib import Path

import pytest
from verified import deprecated

from tests.verified_project import Project


def found(*blocks: str) -> list[tuple[int, int, str]]:
    """Return (block, line, what is deprecated) for blocks of one line each and more."""
    parts = [(10 * number, ast.parse(code)) for number, code in enumerate(blocks, 1)]
    return [
        (number, line, text.partition(" is deprecated: write ")[0])
        for number, line, text in deprecated.find(parts)
    ]


# -- Deprecated names ------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(deprecated._NAMES))
def test_each_name_is_found_however_it_is_written(name: str) -> None:
    """Imported whole, in part, under another name, in an earlier block, or deeper."""
    package, _, last = name.rpartition(".")
    first = name.partition(".")[0]
    expected = (0, 11, name)

    assert found(f"\nimport {name}") == [expected]
    assert found(f"\nimport {name} as other") == [expected]
    assert found(f"\nfrom {name} import thing") == [expected]
    assert found(f"\nimport {first}\nvalue = {name}.thing(1)")[-1][1:] == (12, name)
    assert found(f"import {first} as x", f"\nx{name.removeprefix(first)}.thing")[
        -1
    ] == (1, 21, name)
    if package:
        assert found(f"\nfrom {package} import {last}") == [expected]
        assert found(f"\nfrom {package} import {last} as z\n\nz.thing()") == [
            expected,
            (0, 13, name),
        ]
        assert found(f"import {package} as y", f"\nwith y.{last}():\n    pass") == [
            (1, 21, name)
        ]


@pytest.mark.parametrize("called", sorted(deprecated._TAKE_ARGUMENTS))
def test_each_argument_is_found_at_its_line(called: str) -> None:
    """Whatever the object is called with, and wherever it comes from."""
    for argument in deprecated._TAKE_ARGUMENTS[called]:
        values, _ = deprecated._ARGUMENTS[argument]
        for value in values or ("anything", 1):
            expected = [(0, 12, f"{argument}={value!r}")]
            assert found(f"\n{called}(\n    {argument}={value!r})") == expected
            assert found(f"\nmodule.{called}(\n    {argument}={value!r})") == expected


@pytest.mark.parametrize(
    "code",
    [
        "import torch\nscaler = torch.amp.GradScaler('cuda')",
        "import torch\nwith torch.autocast('cuda', dtype=torch.bfloat16):\n    pass",
        "from lightning.pytorch.plugins import MixedPrecision, HalfPrecision",
        "import lightning.pytorch as pl\npl.Trainer(precision='16-mixed')",
        "Trainer(precision='bf16-true')",
        "Trainer(precision=precision)",
        "Fabric(precision=None)",
        "round_(x, precision=16)",
        "import transformer_engine.pytorch as te\nwith te.autocast(recipe=recipe): ...",
        "import pytorch_lightning_bolts",
        "torch.cuda.amplitude()",
        "text = 'torch.cuda.amp'",
        "from nemo.collections import asr",
        "from . import amp",
    ],
)
def test_current_names_are_not_found(code: str) -> None:
    """Nor what only looks like a deprecated one."""
    assert found(code) == []


def test_each_name_says_what_to_write() -> None:
    """A message that only forbids helps nobody."""
    for old in deprecated._NAMES:
        ((_, _, text),) = deprecated.find([(1, ast.parse(f"import {old}"))])
        assert re.fullmatch(rf"{old} is deprecated: write .{{5,}}", text)


# -- The type checker ------------------------------------------------------------------

PAGE = """
Page
====

.. testcode::

   number = 1

.. testcode:: other

   size = len(number)
"""


def test_groups_are_checked_apart(tmp_path: Path) -> None:
    """A name of another group is not there, as when the page runs."""
    project = Project.make(tmp_path, page__rst=PAGE)
    build = project.build("static")

    (warned,) = build.warnings
    assert warned.place == ("source/page.rst", 11, "static")
    assert warned.text.endswith("[unresolved-reference]")
    assert build.code == 1
    assert not (tmp_path / "build/verification/here.json").exists(), "nothing is run"


def test_pages_of_like_names_are_all_checked(tmp_path: Path) -> None:
    """The files that the checker reads must not overwrite each other."""
    pages = {"a-b__rst": PAGE, "a_b__rst": PAGE}
    build = Project.make(tmp_path, **pages).build("static")

    assert sorted(w.file for w in build.warnings) == [
        "source/a-b.rst",
        "source/a_b.rst",
    ]


def test_a_finding_of_one_block_says_nothing_of_the_next(tmp_path: Path) -> None:
    """Lines of a long block, of a doctest, and after an omitted exception."""
    page = """
# Page

```{testcode}
raise ValueError("left out: it is not checked")
```

```{testoutput}
Traceback (most recent call last):
    ...
ValueError: left out: it is not checked
```

```{doctest}
>>> len(5)
Traceback (most recent call last):
    ...
TypeError: object of type 'int' has no len()
>>> def twice(number: int) -> int:
...     return 2 * number
>>> twice("a")
'aa'
```

```{testcode}
def half(number: int) -> float:

    return number / 2

half("a")  # type: ignore
value = [
    1,
    half(None),
]
```
"""
    build = Project.make(tmp_path, page__md=page).build("static")

    assert [warned.line for warned in build.warnings] == [21, 33]


def test_a_static_build_repeats_its_findings(tmp_path: Path) -> None:
    """Also when nothing has changed."""
    project = Project.make(tmp_path, page__rst=PAGE)

    assert project.build("static").places == project.build("static").places


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise SystemExit(2)", "ty ended with status 2:"),
        ("print('warning[rule] Something new')", "not about a block: warning[rule]"),
    ],
)
def test_a_checker_that_does_not_work_fails_the_build(
    tmp_path: Path, code: str, text: str
) -> None:
    """Silence of a checker that did not run is no proof."""
    project = Project.make(tmp_path / "project", page__rst=PAGE)
    project.write("ty/__init__.py", "")
    project.write("ty/__main__.py", code)
    build = project.build("static", PYTHONPATH=str(project.root))

    assert build.code != 0
    assert text in build.err
