"""Every check that CI runs: ``nox -l`` lists them, ``nox -s tests`` runs one.

``make test`` runs the default list. The tools come from ``.venv``, which ``make venv``
keeps equal to requirements.txt, and Sphinx is called by the Makefile only: nothing is
installed twice, and no flag is written in two places. What follows ``--`` is handed
on: ``nox -s doctest -- guide/true_half``, ``nox -s tests -- -k rounding``.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
BIN = ROOT / ".venv/bin"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# How names are spelled in prose; code has its own spelling, in backquotes or blocks.
NAMES = {
    "Bfloat16": "bfloat16 or BF16",
    "Cuda": "CUDA",
    "Fp8": "FP8",
    "fp8": "FP8",
    "Github": "GitHub",
    "NVidia": "NVIDIA",
    "Nvidia": "NVIDIA",
    "Numpy": "NumPy",
    "PyTorch-Lightning": "Lightning",
    "Pytorch": "PyTorch",
    "pytorch-lightning": "Lightning",
}

nox.options.default_venv_backend = "none"
nox.options.reuse_venv = "yes"
nox.options.sessions = [
    "lint",
    "types",
    "tests",
    "static",
    "doctest",
    "html",
    "browser",
    "sphinx-versions",
]


def make(session: nox.Session, *targets: str) -> None:
    """Call the Makefile, which knows how Sphinx is called."""
    session.run("make", "--no-print-directory", *targets, external=True)


def run(session: nox.Session, tool: str, *arguments: str) -> None:
    """Call a tool of ``.venv``, which is made or brought up to date first."""
    session.run("make", "--no-print-directory", "venv", external=True, log=False)
    # Tools start each other: pytest starts Sphinx, Sphinx starts ty.
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    session.run(str(BIN / tool), *arguments, env={"PATH": path}, external=True)


def pytest(session: nox.Session, name: str, *arguments: str) -> None:
    """Call pytest and leave its results in build/NAME.junit.xml."""
    results = f"--junitxml=build/{name}.junit.xml"
    run(session, "pytest", results, *arguments, *session.posargs)


def misspelled_names() -> list[str]:
    """Find product names in prose that are not spelled as NAMES says."""
    prose = [*ROOT.glob("*.md"), *ROOT.glob("source/**/*.md")]
    prose += ROOT.glob("source/**/*.rst")
    code = re.compile(
        r"^ *(?P<fence>```+).*?^ *(?P=fence)|(?P<tick>`+).+?(?P=tick)"
        r"|^\.\. (?:testcode|testoutput|doctest|code-block)::[^\n]*(?:\n+ [^\n]*)*"
        r"|^\([\w-]+\)=|\]\([^)]*\)|https?://\S+",
        re.M | re.S,
    )
    names = re.compile(rf"(?<![\w./-])({'|'.join(NAMES)})(?![\w/-]|\.\w)")
    found = []
    for page in sorted(prose):
        # Blanks in place of code keep the line numbers.
        text = code.sub(lambda m: re.sub(r"\S", " ", m[0]), page.read_text("utf-8"))
        found += [
            f"{page.relative_to(ROOT)}:{number}: {name[0]}: write {NAMES[name[0]]}"
            for number, line in enumerate(text.splitlines(), 1)
            for name in names.finditer(line)
        ]
    return found


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, spelling and names in code and prose, and every service's file."""
    fix = "--fix" in session.posargs
    workflows = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(".github/*/*.yml"))
    schema = "--builtin-schema=vendor"
    commands = [
        ["ruff", "check", *(["--fix"] if fix else [])],
        ["ruff", "format", *([] if fix else ["--check"])],
        ["codespell"],
        ["sphinx-lint", "source"],
        ["check-jsonschema", f"{schema}.github-workflows", *workflows],
        ["check-jsonschema", f"{schema}.readthedocs", ".readthedocs.yaml"],
        ["pre-commit", "validate-config"],
    ]
    failed = misspelled_names()
    for command in commands:
        try:
            run(session, *command)
        except CommandFailed:  # go on: one run shows all that there is to mend
            failed.append(" ".join(command))
    if failed:
        session.error("\n  ".join(["to mend:", *failed]))


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of snippets, extensions and tests with mypy --strict."""
    run(session, "mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, and the examples in the snippets' docstrings."""
    pytest(session, "tests", "-m", "not site and not browser")


@nox.session
def static(session: nox.Session) -> None:
    """Type-check every block of every page, those for a GPU too, and run none."""
    make(session, "static")


@nox.session
def doctest(session: nox.Session) -> None:
    """Run every block, or those of the pages named after ``--``."""
    make(session, "doctest", f"PAGES={' '.join(session.posargs)}")


@nox.session
def html(session: nox.Session) -> None:
    """Build the site without a warning, then check what was built: links, weight."""
    make(session, "html")
    pytest(session, "site", "-m", "site")


@nox.session
def browser(session: nox.Session) -> None:
    """Open the built site in a real browser: light, dark, and as narrow as a phone."""
    if not any(map(shutil.which, CHROMIUMS)):
        session.skip("there is no Chromium or Chrome on this machine to open pages in")
    make(session, "html")
    pytest(session, "browser", "-m", "browser")


@nox.session(name="sphinx-versions", venv_backend="venv")
def sphinx_versions(session: nox.Session) -> None:
    """Try the traps on the oldest Sphinx that is allowed; `tests` has the newest."""
    oldest = re.sub(r">=([\d.]+).*", r"==\1.0", pin("sphinx"))
    needed = map(pin, ["myst-parser", "pytest", "ty"])
    session.install("--quiet", oldest, *needed)
    session.run("python", "-m", "sphinx", "--version")
    results = "--junitxml=build/sphinx-versions.junit.xml"
    traps = "tests/test_verified_traps.py"
    # conftest.py needs a browser's driver, which this environment is without.
    options = ["--noconftest", results, *session.posargs]
    session.run("python", "-m", "pytest", *options, traps)


def pin(package: str) -> str:
    """Look up a package's line in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return next(line for line in lines if re.match(rf"{package}\b[^-]", line))


def why_no_gpu() -> str:
    """Say in a sentence why this machine can run no GPU block; empty if it can."""
    if (smi := shutil.which("nvidia-smi")) and "GPU " in ask([smi, "-L"]).stdout:
        return ""  # .venv may hold the CPU build of torch, so nvidia-smi goes first
    asked = ask([str(BIN / "python"), "-m", "verified.gpu"])
    return asked.stdout.strip() if asked.returncode else ""


def ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with the extension in reach and keep what it says."""
    return subprocess.run(
        command,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "_ext")},
    )


@nox.session(name="doctest-gpu", default=False)
def doctest_gpu(session: nox.Session) -> None:
    """Run every block on this machine's GPU and record it in verification/.

    Installs transformer-engine[pytorch] in an environment of its own. Without a GPU
    nothing is installed: it lists what waits for one and is skipped, or is an error
    where GUIDE_REQUIRE_GPU=1 says that there must be one.
    """
    make(session, "venv")
    if reason := why_no_gpu():
        session.log(ask([str(BIN / "python"), "-m", "verified.waiting"]).stdout)
        if os.environ.get("GUIDE_REQUIRE_GPU") == "1":
            session.error(f"GUIDE_REQUIRE_GPU=1, but {reason}")
        session.skip(reason)
    make(session, "venv", "GPU=1")
    # A driver that answers and a torch that cannot use it would only record skips.
    session.run(".nox/gpu/bin/python", "-m", "verified.gpu", env={"PYTHONPATH": "_ext"})
    make(session, "doctest", "GPU=1", f"PAGES={' '.join(session.posargs)}")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure ratios of time and memory, and record them: on a quiet machine, by hand.

    ``nox -s bench -- fp8_transformer`` runs one file of benchmarks/.
    """
    known = sorted(path.stem for path in ROOT.glob("benchmarks/*.py"))
    if unknown := sorted(set(session.posargs) - set(known)):
        session.error(f"no benchmark {', '.join(unknown)}; there are {known}")
    for name in session.posargs or known:
        run(session, "python", "-m", f"benchmarks.{name}")


@nox.session(default=False)
def linkcheck(session: nox.Session) -> None:
    """Follow every link to other sites; it needs the web, so it runs weekly."""
    make(session, "linkcheck")
