"""Make the virtual environment of this project, or say in one line why not.

``make venv`` calls this file with the system's Python. It needs only the standard
library and parses on Python 3.6, so that an old Python hears what is wrong with it.

    python3 _ext/install.py                    .venv with requirements.txt
    python3 _ext/install.py --gpu --venv DIR   and Transformer Engine's compiled part

A second call does nothing while requirements.txt stays the same. What venv and pip
say goes to the log; what they fail on is named in one line on the standard error.

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Optional, TextIO

OLDEST_PYTHON = (3, 11)

# Measured on Linux with the CPU build of torch: 1.9 GB of files, and 0.4 GB of wheels
# that pip may keep twice on the way.
NEEDED_GB = 3
# Estimated, not measured: CUDA's libraries, and Transformer Engine while it compiles.
NEEDED_GB_FOR_A_GPU = 12

_STAMP = "requirements.installed"  # written last; says what is there
_UNFINISHED = "requirements.unfinished"  # there from pip's start to its good end

# What venv and pip say, and what it means to the reader. The first that matches counts.
_CAUSES = (
    (
        r"No space left on device|Disk quota exceeded",
        "the disk is full: free about {needed} GB, then run it again",
    ),
    (
        r"Read-only file system|Permission denied",
        "a file cannot be written: see the log, and check who owns this folder",
    ),
    (
        r"ensurepip is not available|No module named '?(?:venv|ensurepip)",
        "{python} cannot make virtual environments: install its venv package"
        " (python3-venv on Debian and Ubuntu), or set PYTHON=... to another Python",
    ),
    (
        r"Connection refused|Name or service not known|nodename nor servname"
        r"|Temporary failure in name resolution|Network is unreachable"
        r"|No route to host|Failed to establish|Failed to resolve|[Tt]imed out"
        r"|ProxyError|SSLError|CERTIFICATE_VERIFY|RemoteDisconnected",
        "the package index cannot be reached: check the network, the proxy and pip's"
        " settings (pip config list)",
    ),
    (
        r"HTTP error (\d+)|\b([45]\d\d) (?:Client|Server) Error",
        "the package index answered with error {found}: try later, or check pip's"
        " settings (pip config list)",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "a downloaded package is not the one that the index promised: empty pip's"
        " cache (pip cache purge), then run it again",
    ),
    (
        r"satisfies the requirement (\S+) \(from versions: none\)",
        "the package index has no {found} that {python} can use on this machine: set"
        " PYTHON=... to another Python, or check pip's settings (pip config list)",
    ),
    (
        r"satisfies the requirement (\S+) \(from versions",
        "the package index has {found} for other Pythons or machines, not for {python}"
        " on this one: set PYTHON=... to another Python",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the pinned packages contradict each other on {python}: the log says which",
    ),
    (
        r"Failed building wheel for (\S+)",
        "{found} has no ready wheel for {python} on this machine, and building it"
        " failed: the log says why",
    ),
    (
        r"metadata-generation-failed|subprocess-exited-with-error",
        "a package has no ready wheel for {python} on this machine, and building it"
        " failed: the log says why",
    ),
)


class Failure(Exception):  # noqa: N818 - it is what the user reads, not a bug
    """What went wrong, in one sentence without a full stop."""


def explain(said: str, needed: int = NEEDED_GB) -> str:
    """Name the cause of a failed installation.

    Args:
        said: What venv or pip wrote.
        needed: Gigabytes that the installation takes.

    Returns:
        One sentence without a full stop; the last error line if no cause is known.
    """
    python = "Python {}.{}".format(*sys.version_info[:2])
    for pattern, meaning in _CAUSES:
        match = re.search(pattern, said)
        if match:
            found = next((group for group in match.groups() if group), "")
            return meaning.format(found=found, needed=needed, python=python)
    errors = re.findall(r"(?im)^error: *(.+)$", said)
    lines = errors or said.split("\n") if said.strip() else ["it did not say why"]
    return "pip failed: " + lines[-1].strip().rstrip(".")


def main(arguments: Optional[List[str]] = None) -> int:
    """Install what is missing; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--requirements", type=Path, default=Path("requirements.txt"))
    parser.add_argument("--log", type=Path, default=Path("build/install.log"))
    parser.add_argument("--name", default="python3", help="how this Python was called")
    parser.add_argument(
        "--chosen",
        action="store_true",
        help="the user asked for this Python: replace an environment of another one",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="add transformer-engine[pytorch], which is compiled on this machine",
    )
    options = parser.parse_args(arguments)
    try:
        _install(options)
    except Failure as failure:
        message = str(failure)
    except OSError as error:
        message = _describe(error)
    except KeyboardInterrupt:
        message = "interrupted: run it again"
    else:
        return 0
    print(f"Half the Bits: {message}.", file=sys.stderr)
    return 1


def _install(options: argparse.Namespace) -> None:
    venv: Path = options.venv
    wanted = _describe_environment(options)
    if _is_complete(venv, wanted, any_python=not options.chosen):
        return
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        version = sys.version.split(" ", 1)[0]
        raise Failure(
            f"it needs Python {oldest} or newer, and {options.name} is {version}:"
            " set PYTHON=... to a newer one (make html PYTHON=python3.12)"
        )
    needed = NEEDED_GB_FOR_A_GPU if options.gpu else NEEDED_GB
    options.log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with options.log.open("w", encoding="utf-8") as log:
        if not is_usable(venv, any_python=not options.chosen):
            if venv.is_symlink():
                raise Failure(
                    f"{venv} is a link to {os.path.realpath(str(venv))}, which a new"
                    " environment would empty: remove the link"
                )
            _check_disk(venv, needed)
            _run([sys.executable, "-m", "venv", "--clear", str(venv)], log, needed)
        (venv / _UNFINISHED).touch()
        _remove(venv / _STAMP)
        print(
            f"Installing {options.requirements} into {venv}: the first time takes"
            f" minutes and about {needed} GB. Log: {options.log}",
            flush=True,
        )
        _pip(options, log, needed, ["-r", str(options.requirements)])
        if options.gpu:
            _add_transformer_engine(options, log, needed)
    (venv / _STAMP).write_text(wanted, encoding="utf-8")
    _remove(venv / _UNFINISHED)
    print(f"Installed in {time.monotonic() - began:.0f} s.", flush=True)


def _describe_environment(options: argparse.Namespace) -> str:
    """Say what a finished environment holds, where it lies and for which Python."""
    return "\n".join([
        hashlib.sha256(options.requirements.read_bytes()).hexdigest(),
        "with the GPU's packages" if options.gpu else "without a GPU's packages",
        # The scripts in bin/ carry this path: a moved checkout needs a new one.
        str(options.venv.absolute()),
        "Python {}.{}".format(*sys.version_info[:2]),
    ])


def _is_complete(venv: Path, wanted: str, *, any_python: bool) -> bool:
    try:
        there = (venv / _STAMP).read_text(encoding="utf-8")
    except OSError:
        return False
    if not (venv / "bin/python").exists():  # the Python that made it is gone
        return False
    if any_python:
        return there.split("\n")[:-1] == wanted.split("\n")[:-1]
    return there == wanted


def is_usable(venv: Path, *, any_python: bool) -> bool:
    """Tell whether pip can bring this environment up to date."""
    if not (venv / "bin/python").exists():
        return False
    if (venv / _UNFINISHED).exists():
        return False  # pip was stopped half-way; what it left cannot be trusted
    asked = subprocess.run(
        [
            str(venv / "bin/python"),
            "-I",
            "-c",
            "import pip, sys; print(*sys.version_info[:2])",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    version = tuple(map(int, asked.stdout.split()))
    if any_python and version < OLDEST_PYTHON:
        return False
    if not any_python and version != sys.version_info[:2]:
        return False
    # A copied environment works, but its scripts start the original's Python.
    activate = venv / "bin/activate"
    return activate.exists() and str(venv.absolute()) in activate.read_text("utf-8")


def _check_disk(venv: Path, needed: int) -> None:
    folder = venv.absolute().parent
    free = shutil.disk_usage(str(folder)).free
    if free < needed * 1e9:
        raise Failure(
            f"the packages need about {needed} GB, and {folder} has"
            f" {free / 1e9:.1f} GB free: make room, then run it again"
        )


def _add_transformer_engine(
    options: argparse.Namespace, log: TextIO, needed: int
) -> None:
    """Compile Transformer Engine's torch part against the torch that is there.

    Raises:
        Failure: requirements.txt names no version, or torch is a CPU build.
    """
    pins = options.requirements.read_text(encoding="utf-8")
    pin = re.search(r"(?m)^transformer-engine==(\S+)", pins)
    if pin is None:
        raise Failure(f"{options.requirements} pins no transformer-engine")
    python = str(options.venv / "bin/python")
    cuda = subprocess.run(
        [python, "-c", "import torch; print(torch.version.cuda or '')"],
        stdout=subprocess.PIPE,
        check=False,
    ).stdout.decode()
    if not cuda.strip():
        raise Failure(
            "the package index gave the CPU build of torch, and Transformer Engine"
            " needs the CUDA build: unset PIP_INDEX_URL and PIP_EXTRA_INDEX_URL"
        )
    # Its build imports torch, so it must see this environment.
    package = f"transformer-engine[pytorch]=={pin.group(1)}"
    print(
        f"Adding {package} for CUDA {cuda.strip()}: compiling it takes up to an hour.",
        flush=True,
    )
    _pip(options, log, needed, ["--no-build-isolation", package])


def _pip(
    options: argparse.Namespace, log: TextIO, needed: int, what: List[str]
) -> None:
    pip = [str(options.venv / "bin/python"), "-I", "-m", "pip"]
    plainly = ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    _run([*pip, "install", *plainly, *what], log, needed)


def _run(command: List[str], log: TextIO, needed: int) -> None:
    """Run a command and keep what it says in the log.

    Raises:
        Failure: The command failed; in one sentence, why.
    """
    log.write("$ {}\n".format(" ".join(command)))
    log.flush()
    # A user-wide PIP_USER would install beside the environment.
    environment = dict(os.environ, PIP_USER="0", PYTHONUNBUFFERED="1")
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    said = ""
    on_screen = sys.stdout.isatty()
    with started:
        for raw in started.stdout or ():
            line = raw.decode("utf-8", "replace")
            said += line
            log.write(line)
            step = re.match(
                r" *((Collecting|Downloading|Installing|Building) .+)", line
            )
            if step and on_screen:
                print(f"\r\033[K  {step.group(1)[:76]}", end="", flush=True)
    if on_screen:
        print("\r\033[K", end="", flush=True)
    if started.returncode < 0:
        raise Failure(
            f"pip was killed by signal {-started.returncode}, as happens when memory"
            " runs out: make room, then run it again"
        )
    if started.returncode:
        raise Failure(f"{explain(said, needed)} (log: {log.name})")


def _describe(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"the disk is full: free about {NEEDED_GB} GB, then run it again"
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        what = error.filename or "a file"
        return f"{what} cannot be written ({error.strerror}): check who owns it"
    return f"{error.filename or 'installing'}: {error.strerror}"


def _remove(path: Path) -> None:
    if path.exists():
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
