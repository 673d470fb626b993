"""Tests of _ext/install.py: what a first visitor meets when something is wrong.

Each runs the installer as ``make venv`` does, with a real pip and a real virtual
environment. The package is a tiny one made here, so no test needs a package index.
"""

import os
import shutil
import socket
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import install
import pip
import pytest

ROOT = Path(__file__).parents[1]
INSTALLER = ROOT / "_ext/install.py"


def run_installer(
    folder: Path,
    *arguments: str,
    requirements: str = "half-a-bit==1.0\n",
    python: str = sys.executable,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Call the installer in ``folder``; pip looks for packages nowhere else."""
    (folder / "requirements.txt").write_text(requirements, "utf-8")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE"))}
    return subprocess.run(
        [python, str(INSTALLER), *arguments],
        cwd=folder,
        env={**kept, "PIP_CONFIG_FILE": os.devnull, **offline, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def write_wheel(folder: Path) -> None:
    """Make the package ``half-a-bit`` 1.0."""
    about = "half_a_bit-1.0.dist-info"
    with zipfile.ZipFile(folder / "half_a_bit-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("half_a_bit.py", "VALUE = 0.5\n")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: half-a-bit\nVersion: 1.0"
        )
        wheel.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\n"
            "Tag: py3-none-any\n",
        )
        wheel.writestr(f"{about}/RECORD", "")


def write_package_whose_build_fails(folder: Path, error: str) -> None:
    """Make a source of ``half-a-bit`` 1.0 whose build raises ``error``."""
    source = folder / "half-a-bit"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\n"
        "build-backend = 'backend'\nbackend-path = ['.']\n"
    )
    (source / "backend.py").write_text(
        f"""
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, settings=None):
    about = Path(folder, "half_a_bit-1.0.dist-info")
    about.mkdir()
    text = "Metadata-Version: 2.1\\nName: half-a-bit\\nVersion: 1.0"
    (about / "METADATA").write_text(text)
    return about.name

def build_wheel(*arguments, **settings):
    raise {error}
"""
    )


def make_environment(folder: Path) -> Path:
    """Make an empty ``.venv`` in a moment: its pip is borrowed from the one at work."""
    made = folder / ".venv"
    venv.create(made, symlinks=True)
    (packages,) = made.glob("lib/python3*/site-packages")
    borrowed = Path(pip.__file__).parent
    (packages / "pip").symlink_to(borrowed, target_is_directory=True)
    return made


def said_in_one_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return what a failed installation said: one line, and not a traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    return line


def old_pythons() -> list[str]:
    """Find interpreters of this machine that are too old for the project."""
    minors = range(6, install.OLDEST_PYTHON[1])
    managed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python3.{minor}") for minor in minors]
    found += [str(p) for m in minors for p in managed.glob(f"3.{m}.*/bin/python")]
    return sorted({
        python
        for python in found
        if python
        and subprocess.run(
            [python, "-c", ""], check=False, capture_output=True
        ).returncode
        == 0
    })


def test_it_installs_once(tmp_path: Path) -> None:
    """What is pinned can be imported; a second call finds nothing left to do."""
    write_wheel(tmp_path)
    stamp = tmp_path / ".venv/requirements.installed"

    first = run_installer(tmp_path)
    written = stamp.stat().st_mtime_ns
    second = run_installer(tmp_path)

    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    subprocess.run(
        [tmp_path / ".venv/bin/python", "-c", "import half_a_bit"], check=True
    )
    assert second.stdout == ""
    assert stamp.stat().st_mtime_ns == written


def test_changed_requirements_are_installed(tmp_path: Path) -> None:
    """Another requirements.txt is installed into the environment that is there."""
    write_wheel(tmp_path)
    made = make_environment(tmp_path)
    (made / "mine").touch()
    assert run_installer(tmp_path, requirements="").returncode == 0

    assert run_installer(tmp_path).returncode == 0

    subprocess.run([made / "bin/python", "-c", "import half_a_bit"], check=True)
    assert (made / "mine").exists()


def test_what_was_stopped_half_way_is_made_anew(tmp_path: Path) -> None:
    """A failed installation never counts as one, and nothing of it is kept."""
    made = make_environment(tmp_path)
    (made / "leftover").touch()
    failed = run_installer(tmp_path)  # there is no wheel yet
    write_wheel(tmp_path)

    again = run_installer(tmp_path)

    assert failed.returncode == 1
    assert again.returncode == 0, again.stderr
    assert not (made / "leftover").exists()
    subprocess.run([made / "bin/python", "-c", "import half_a_bit"], check=True)


def test_broken_environment_is_seen(tmp_path: Path) -> None:
    """An environment whose Python is gone, that lost pip or was moved, is not used."""
    (tmp_path / "here").mkdir()
    made = make_environment(tmp_path / "here")
    assert install.is_usable(made, any_python=True)

    moved = (tmp_path / "here").rename(tmp_path / "there") / ".venv"
    assert not install.is_usable(moved, any_python=True)

    made = make_environment(tmp_path)
    (borrowed,) = made.glob("lib/python3*/site-packages/pip")
    borrowed.unlink()
    assert not install.is_usable(made, any_python=True)

    (made / "bin/python").unlink()
    (made / "bin/python").symlink_to(tmp_path / "gone")
    assert not install.is_usable(made, any_python=True)


def test_another_python_replaces_the_environment_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHON=... counts; a ``python3`` that happens to be another one does not."""
    made = make_environment(tmp_path)
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))

    assert install.is_usable(made, any_python=True)
    assert not install.is_usable(made, any_python=False)


def test_old_python_is_told(tmp_path: Path) -> None:
    """Every Python from 3.6 on can read the file and says what is wanted instead."""
    for python in old_pythons():
        result = run_installer(tmp_path, "--name", "python3", python=python)

        line = said_in_one_line(result)
        assert "needs Python 3.11 or newer, and python3 is 3." in line
        assert "set PYTHON=" in line
        assert not (tmp_path / ".venv").exists()


def test_old_python_is_told_where_none_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same check, with this Python posing as one that is not new enough."""
    (tmp_path / "requirements.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(install, "OLDEST_PYTHON", (9, 0))

    assert install.main(["--name", "python3"]) == 1

    assert "needs Python 9.0 or newer, and python3 is 3." in capsys.readouterr().err


def test_unreachable_index(tmp_path: Path) -> None:
    """A closed port in place of the package index is named as the network's fault."""
    make_environment(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]

    result = run_installer(
        tmp_path,
        PIP_NO_INDEX="0",
        PIP_INDEX_URL=f"http://127.0.0.1:{port}/simple",
        PIP_RETRIES="1",
    )

    assert "the package index cannot be reached" in said_in_one_line(result)


def test_pin_that_the_index_does_not_have(tmp_path: Path) -> None:
    """A version that is not offered for this Python is named."""
    make_environment(tmp_path)
    write_wheel(tmp_path)

    result = run_installer(tmp_path, requirements="half-a-bit==2.0\n")

    line = said_in_one_line(result)
    assert "half-a-bit==2.0" in line
    assert "set PYTHON=" in line


def test_disk_that_fills_up_while_pip_works(tmp_path: Path) -> None:
    """Pip's "No space left on device" becomes the room to make."""
    make_environment(tmp_path)
    write_package_whose_build_fails(tmp_path, "OSError(28, 'No space left on device')")

    result = run_installer(tmp_path, requirements="./half-a-bit\n")

    assert "the disk is full: free about 3 GB" in said_in_one_line(result)
    assert not (tmp_path / ".venv/requirements.installed").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_disk_that_is_full(tmp_path: Path) -> None:
    """The kernel's own "no space left", on the first line that is written."""
    result = run_installer(tmp_path, "--log", "/dev/full")

    assert "the disk is full: free about 3 GB" in said_in_one_line(result)


def test_too_little_room_is_seen_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The space that is free is compared with what the packages take."""
    (tmp_path / "requirements.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(install, "NEEDED_GB", 10**9)

    assert install.main([]) == 1

    assert "the packages need about 1000000000 GB" in capsys.readouterr().err
    assert not (tmp_path / ".venv").exists()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The folder is named, and nothing else happens."""
    (tmp_path / "build").touch()  # not a folder: root, too, cannot write into it

    result = run_installer(tmp_path)

    assert "build" in said_in_one_line(result)
    assert not (tmp_path / ".venv").exists()


def test_build_that_fails_is_named(tmp_path: Path) -> None:
    """A package without a ready wheel whose build fails points to the log."""
    make_environment(tmp_path)
    write_package_whose_build_fails(tmp_path, "RuntimeError('no compiler')")

    result = run_installer(tmp_path, requirements="./half-a-bit\n")

    line = said_in_one_line(result)
    assert "half-a-bit has no ready wheel" in line
    assert "no compiler" in (tmp_path / "build/install.log").read_text("utf-8")


@pytest.mark.parametrize(
    ("said", "understood"),
    [
        (
            "The virtual environment was not created successfully because ensurepip is"
            " not available.  On Debian/Ubuntu systems, you need to install",
            "install its venv package",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
            "not the one that the index promised",
        ),
        ("ERROR: HTTP error 503 while getting x", "answered with error 503"),
        (
            "ERROR: ResolutionImpossible: for help visit the manual",
            "the pinned packages contradict each other",
        ),
        ("ERROR: a new kind of trouble.", "pip failed: a new kind of trouble"),
        ("", "pip failed: it did not say why"),
    ],
    ids=["no venv", "hash", "http", "conflict", "unknown", "silent"],
)
def test_words_of_pip_are_understood(said: str, understood: str) -> None:
    """Causes that cannot be brought about here, in the words of venv and pip."""
    assert understood in install.explain(said)


def test_make_names_a_missing_python() -> None:
    """``make`` itself says so when there is no Python to start the installer with."""
    result = subprocess.run(
        ["make", "venv", "PYTHON=no-such-python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode != 0
    assert "there is no no-such-python: install Python 3.11" in result.stderr


def test_what_a_link_leads_to_is_kept(tmp_path: Path) -> None:
    """A .venv that is a link is refused: making it anew would empty its target."""
    write_wheel(tmp_path)
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "kept").write_text("mine", "utf-8")
    (tmp_path / ".venv").symlink_to(target)

    result = run_installer(tmp_path)

    assert result.returncode == 1
    assert "is a link to" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (target / "kept").read_text("utf-8") == "mine"
