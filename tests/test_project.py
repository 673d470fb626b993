"""The laws of the house: what no page, snippet or command can break by accident."""

import ast
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "source"
WAITING = ROOT / "verification/waiting.json"
PAGES = sorted(p for p in SOURCE.rglob("*") if p.suffix in {".md", ".rst"})
# A snippet is a file, or a folder where one file would be too long.
SNIPPETS = sorted(
    p
    for p in (ROOT / "snippets").iterdir()
    if p.name[0] not in "_." and (p.suffix == ".py" or (p / "__init__.py").exists())
)
SERVICES = sorted(ROOT.glob(".github/workflows/*.yml"))


def docname(page: Path) -> str:
    """Name a page as Sphinx does: ``guide/true_half``."""
    return str(page.relative_to(SOURCE).with_suffix(""))


def modules(snippet: Path) -> list[Path]:
    """List the files of a snippet, the one with its header first."""
    if snippet.is_file():
        return [snippet]
    first = snippet / "__init__.py"
    return [first, *(p for p in sorted(snippet.rglob("*.py")) if p != first)]


def packages(snippet: Path, *, optional: bool = False) -> set[str]:
    """Find what a snippet imports, itself and the standard library left out.

    What only a function, a method or a type checker imports is optional: the copy works
    without it.
    """
    names = set()
    for module in modules(snippet):
        tree = ast.parse(module.read_text("utf-8"))
        inner = {
            id(node)
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef)
            or (
                isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test)
            )
            for node in ast.walk(outer)
        }
        for node in ast.walk(tree):
            if (id(node) in inner) != optional:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                assert snippet.is_dir(), f"{snippet.name} imports a neighbor"
    return names - sys.stdlib_module_names - {snippet.stem}


def kept_files() -> list[Path]:
    """List the project's own files: neither vendored, nor what .gitignore names."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    ignored |= {".git", "vendor"}
    kept = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(set(folders) - ignored)
        kept += [Path(folder, name) for name in sorted(names)]
    return kept


def kept_text() -> Iterator[tuple[str, str]]:
    """Yield each of the project's text files by its path, and what it says."""
    for path in kept_files():
        try:
            yield str(path.relative_to(ROOT)), path.read_text("utf-8")
        except UnicodeDecodeError:
            assert path.suffix in {".wav", ".png", ".woff2", ".ico"}, path


def matches(pattern: str) -> list[str]:
    """Find ``pattern`` in the project's text files, as path:line: what was found."""
    return [
        f"{path}:{number}: {found[0]}"
        for path, text in kept_text()
        for number, line in enumerate(text.splitlines(), 1)
        if (found := re.search(pattern, line))
    ]


# Snippets, pages and tests


def test_there_is_something_to_keep() -> None:
    """The laws below run over snippets, pages and workflows: none of these is empty."""
    assert len(SNIPPETS) >= 3
    assert len(PAGES) >= 8
    assert len(SERVICES) == 3


def own_page(snippet: Path) -> str:
    """Read from a snippet's header which page is about it: ``guide/true_half``."""
    found = re.search(r"(?m)^ +Guide: +(\S+)$", modules(snippet)[0].read_text("utf-8"))
    assert found, f"{snippet.name} names no page"
    return found[1]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda p: p.stem)
def test_snippet_has_one_page_and_one_test(snippet: Path) -> None:
    """snippets/X, the page of its ``Guide:`` line, and tests/test_X.py.

    The page has the snippet's name, or the task's where that says more, and shows the
    code. A page of the snippet's name is no other's.
    """
    page = own_page(snippet)
    named = [docname(p) for p in PAGES if p.stem == snippet.stem]

    assert re.fullmatch(r"(guide|background)/\w+", page)
    assert named in ([], [page])
    text = (SOURCE / f"{page}.md").read_text("utf-8")
    shown = {str(module.relative_to(ROOT)) for module in modules(snippet)}
    assert shown & set(re.findall(r"{literalinclude} \.\./\.\./(\S+)", text))
    assert (ROOT / f"tests/test_{snippet.stem}.py").is_file()
    assert re.fullmatch(r"[a-z_]+|fp8", snippet.stem)


def test_every_guide_has_its_snippet() -> None:
    """A how-to page gives a file to copy; other pages are background/ or start/.

    One guide is a path through the others and has no file.
    """
    guides = [docname(p) for p in PAGES if p.parent.name == "guide"]
    owned = [page for page in map(own_page, SNIPPETS) if page.startswith("guide/")]

    assert sorted(owned) == sorted(set(guides) - {"guide/debug_nan"})


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda p: p.stem)
def test_snippet_stands_alone(snippet: Path, tmp_path: Path) -> None:
    """A copy in an empty folder imports, with nothing of this repository in reach."""
    assert packages(snippet) <= {"torch", "lightning"}
    assert packages(snippet, optional=True) <= {"torch", "matplotlib", "pandas"}
    if snippet.is_dir():
        shutil.copytree(snippet, tmp_path / snippet.name)
    else:
        shutil.copy(snippet, tmp_path)

    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import {snippet.stem} as copied
assert copied.__file__.startswith({str(tmp_path)!r}), copied.__file__
assert "snippets" not in sys.modules
for name in copied.__all__:
    getattr(copied, name)
"""
    copied = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert copied.returncode == 0, copied.stderr


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda p: p.stem)
def test_snippet_carries_its_papers(snippet: Path) -> None:
    """The docstring says what a copy must tell, in one order, and what it says is true.

    The effect in a sentence; what the copy needs; guide, tests, sources, the date of
    the last change; the license.
    """
    text = ast.get_docstring(ast.parse(modules(snippet)[0].read_text("utf-8"))) or ""

    found = re.fullmatch(
        r"(?P<effect>[^\n]+\.)\n\n"
        r"Copy this (?:file|folder) into your project; it needs only (?P<needs>[^.;]+)"
        r"[.;](?s:.*?)\n\n"
        r" +Guide: +(?P<guide>\S+)\n"
        r" +Tests: +(?P<tests>\S+)\n"
        r" +Sources: +(?P<sources>(?s:.+?))\n"
        r" +Changed: +(?P<changed>\d{4}-\d\d-\d\d)\n\n"
        r"SPDX-License-Identifier: Apache-2\.0",
        text.strip(),
    )

    assert found, text
    assert set(re.findall(r"``(\w+)``", found["needs"])) == packages(snippet)
    assert found["guide"] in {docname(page) for page in PAGES}
    assert found["tests"] == f"tests/test_{snippet.stem}.py"
    assert re.search(r"\b(19|20)\d\d\b", found["sources"]), "a source has a year"
    datetime.date.fromisoformat(found["changed"])


def test_changelog_says_when_a_copy_is_out_of_date() -> None:
    """Entries stand under dates, newest first, and open with a snippet or page.

    Each snippet's ``Changed:`` has its entry, so a reader can compare a copy with it.
    """
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    known = {s.stem for s in SNIPPETS} | {p.stem for p in PAGES}
    known |= {docname(p) for p in PAGES}
    dates = re.findall(r"(?m)^## (.+)$", text)
    dated = dict(zip(dates, re.split(r"(?m)^## .+$", text)[1:], strict=True))

    assert dates == sorted(
        map(str, map(datetime.date.fromisoformat, dates)), reverse=True
    )
    entries = re.findall(r"(?m)^- (.*)$", text)
    unnamed = [
        entry
        for entry in entries
        if not (name := re.match(r"`([\w/]+)`: ", entry)) or name[1] not in known
    ]
    assert entries
    assert not unnamed
    for snippet in SNIPPETS:
        header = modules(snippet)[0].read_text("utf-8")
        changed = re.search(r"Changed: +(\S+)", header)
        assert changed, snippet
        assert f"- `{snippet.stem}`: " in dated.get(changed[1], ""), (
            f"{snippet.stem} changed on {changed[1]}: the changelog does not say how"
        )


def test_tree_in_contributing_is_the_real_one() -> None:
    """CONTRIBUTING prints the root, source/ and _ext/ as they are."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    block = re.search(r"(?s)```text\n(.+?)```", text)
    assert block
    printed, folder = set(), ""
    for line in block[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        folder = folder if indent else name
        printed.add(folder + name if indent else name)

    real = set()
    for path in kept_files():
        parts = path.relative_to(ROOT).parts
        real.add(parts[0] + "/" * (len(parts) > 1))
        if parts[0] in {"source", "_ext"}:
            real.add(f"{parts[0]}/{parts[1]}" + "/" * (len(parts) > 2))

    assert printed == real


# What may not be there


def test_no_file_names_a_path_of_one_machine() -> None:
    """What works only where it was written works nowhere else."""
    assert matches(r"(?<![\w.~$}/-])/(?:tmp|work|root|home|farm|Users)/") == []


def test_no_file_names_a_package_registry() -> None:
    """Packages come from where pip is told to look, not from an address in here."""
    hosts = r"pypi\.org|pythonhosted\.org|npmjs\.|deb\.debian|download\.pytorch|conda\."
    assert matches(hosts) == []


def test_nothing_is_left_unfinished() -> None:
    """Work that is not done is an issue, not a mark in a file."""
    assert matches(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b") == []


# Requirements, commands, runners


def test_requirements_are_pinned() -> None:
    """Every package has one version; Sphinx a range: its newest needs a new Python."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]

    loose = [line for line in packages if not re.fullmatch(r"[\w-]+==[\w.]+", line)]

    assert loose == ["sphinx>=9.0,<10"]


def nox(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> tuple[int, str]:
    """Call nox; return its status and what it said."""
    result = subprocess.run(
        [sys.executable, "-m", "nox", "--nocolor", *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


def test_every_session_is_described_and_run_by_a_runner() -> None:
    """`make test` runs nox's default list; the rest have workflows of their own.

    Measurements have none: a shared machine's times say nothing.
    """
    status, listed = nox("--list", "--json")
    assert status == 0, listed
    described = {row["name"]: row["description"] for row in json.loads(listed)}
    _, plain = nox("--list")
    default = set(re.findall(r"(?m)^\* ([\w-]+)", plain))

    assert all(described.values())
    checks = "lint types tests static doctest html browser sphinx-versions"
    assert default == set(checks.split())
    workflows = "\n".join(path.read_text("utf-8") for path in SERVICES)
    for name in set(described) - default - {"bench"}:
        assert f"nox -s {name}\n" in workflows, f"{name} is run nowhere"


def test_ci_calls_make_test_and_nothing_else() -> None:
    """CI, the workflow and a desk run the same checks."""
    ci = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    commands = [line for line in ci if line and not line.startswith("#")]
    makefile = (ROOT / "Makefile").read_text("utf-8")

    assert commands == [
        "set -euo pipefail",
        'cd "$(dirname "$0")/.."',
        "exec make test",
    ]
    assert re.search(r"(?m)^test:.*\n\t@\$\(VENV\)/bin/python -m nox$", makefile)
    docs = (ROOT / ".github/workflows/docs.yml").read_text("utf-8")
    assert re.findall(r"(?m)^ +- run: (.+)$", docs) == ["bash .ci/run"]


def test_sphinx_is_called_by_the_makefile_only() -> None:
    """Its flags stand in one place, so no runner can be laxer than a desk."""
    runners = [".ci/run", "noxfile.py", ".readthedocs.yaml", ".pre-commit-config.yaml"]
    for path in [*(ROOT / runner for runner in runners), *SERVICES]:
        flags = r"sphinx-build|-m sphinx -|--nitpicky|--keep-going|SPHINXOPTS"
        assert not re.search(flags, path.read_text("utf-8")), path
    assert (
        "SPHINXOPTS ?= -W --keep-going --nitpicky\n" in (ROOT / "Makefile").read_text()
    )


def test_a_pull_request_reaches_a_gpu_only_by_label_and_without_secrets() -> None:
    """One label approves one commit, and the job that runs it can write nothing."""
    text = (ROOT / ".github/workflows/gpu.yml").read_text("utf-8")
    test_job, write_job = text.split("\n  propose:\n")

    assert "types: [labeled, unlabeled]" in text
    assert "github.event.label.name == 'run-gpu'" in test_job
    assert "ref: ${{ github.event.pull_request.head.sha || github.sha }}" in test_job
    assert "persist-credentials: false" in test_job
    assert "write" not in test_job.split("jobs:")[1]
    assert "github.event_name != 'pull_request'" in write_job
    for path in SERVICES:
        assert not re.search(r"pull_request_target|secrets\.", path.read_text("utf-8"))
        assert "\npermissions:\n  contents: read\n" in path.read_text("utf-8"), path


# The GPU's session, with and without a GPU


def write_script(path: Path, text: str) -> None:
    """Write a shell script that can be called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


NO_DRIVER = "echo NVIDIA-SMI has failed; exit 9"


def test_without_a_gpu_its_session_is_skipped_in_words(tmp_path: Path) -> None:
    """It lists what waits for a GPU, says why it stops, and installs nothing."""
    write_script(tmp_path / "nvidia-smi", NO_DRIVER)
    path = f"{tmp_path}:{os.environ['PATH']}"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "GUIDE_REQUIRE_GPU": "", "PATH": path}
    was_there = (ROOT / ".nox/gpu").exists()

    status, said = nox("-s", "doctest-gpu", env=hidden)

    assert status == 0, said
    assert "blocks wait for" in said
    assert re.search(r"Session doctest-gpu skipped: no \w.* GPU", said), said
    assert (ROOT / ".nox/gpu").exists() == was_there


def test_without_a_gpu_its_session_fails_where_there_must_be_one(
    tmp_path: Path,
) -> None:
    """GUIDE_REQUIRE_GPU=1: a broken driver cannot go green."""
    write_script(tmp_path / "nvidia-smi", NO_DRIVER)
    path = f"{tmp_path}:{os.environ['PATH']}"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "GUIDE_REQUIRE_GPU": "1", "PATH": path}

    status, said = nox("-s", "doctest-gpu", env=hidden)

    assert status == 1, said
    assert "GUIDE_REQUIRE_GPU=1, but no " in said


@pytest.mark.parametrize("works", [True, False], ids=["works", "torch cannot use it"])
def test_with_a_gpu_its_session_installs_and_runs(tmp_path: Path, works: bool) -> None:
    """The calls that a GPU's machine would make, seen by scripts in their place.

    A driver that answers is not enough: nothing is recorded unless torch can use it.
    """
    shutil.copy(ROOT / "noxfile.py", tmp_path)
    write_script(tmp_path / "bin/nvidia-smi", "echo 'GPU 0: NVIDIA H100 80GB HBM3'")
    write_script(tmp_path / "bin/make", 'echo "$@" >> calls')
    probe = "echo NVIDIA H100" if works else "echo the GPU does not work; exit 1"
    write_script(tmp_path / ".nox/gpu/bin/python", probe)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    status, said = nox(
        "-s", "doctest-gpu", "--", "guide/x", cwd=tmp_path, env={"PATH": path}
    )

    calls = (tmp_path / "calls").read_text().replace("--no-print-directory ", "")
    installed = ["venv", "venv GPU=1"]
    if works:
        assert status == 0, said
        assert calls.splitlines() == [*installed, "doctest GPU=1 PAGES=guide/x"]
    else:
        assert status == 1
        assert calls.splitlines() == installed


# The blocks that wait


def test_list_of_waiting_blocks_is_complete_and_dated() -> None:
    """Each block that ran nowhere yet says since when, for what, and why."""
    waiting = json.loads(WAITING.read_text("utf-8"))

    assert set(waiting) == {"at_most", "blocks"}
    assert len(waiting["blocks"]) <= waiting["at_most"]
    for key, block in waiting["blocks"].items():
        assert re.fullmatch(r"[\w/]+#\S+", key)
        assert key.partition("#")[0] in {docname(page) for page in PAGES}
        assert set(block) == {"since", "waits_for", "reason"}
        datetime.date.fromisoformat(block["since"])
        assert block["waits_for"], key
        assert block["reason"], key


def git(*arguments: str) -> str:
    """Ask git about this checkout; an empty answer where there is none."""
    result = subprocess.run(
        ["git", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout if result.returncode == 0 else ""


def test_list_of_waiting_blocks_only_shrinks() -> None:
    """`at_most` was never smaller than it is now, in all of the file's history."""
    path = str(WAITING.relative_to(ROOT))
    commits = git("log", "--format=%H", "--", path).split()
    if not commits:
        pytest.skip("needs the git history of verification/waiting.json")
    limits = [
        json.loads(text)["at_most"]
        for commit in reversed(commits)
        if (text := git("show", f"{commit}:{path}"))
    ]
    limits.append(json.loads(WAITING.read_text("utf-8"))["at_most"])

    assert limits == sorted(limits, reverse=True)
