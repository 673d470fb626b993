"""Describe the machine that runs the blocks."""

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

from . import capabilities

__all__ = ["PACKAGES", "load", "probe", "slug", "versions"]

PACKAGES = ("torch", "lightning", "transformer-engine")


def load(path: str) -> Mapping[str, capabilities.Capability]:
    """Import a capability registry named ``"module:NAME"``."""
    module, _, name = path.partition(":")
    registry: Mapping[str, capabilities.Capability] = getattr(
        importlib.import_module(module), name
    )
    return registry


def versions() -> dict[str, str]:
    """Return the versions that a result depends on; imports none of the packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "transformer-engine" in found and not _installed("transformer-engine-torch"):
        found["transformer-engine"] += " (source only)"  # the base wheel
    return found


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def probe(path: str, names: set[str], answer: Connection) -> None:
    """Send the capabilities and the device of this machine; runs in a child."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    registry = load(path)
    known = {name for name in names if name in registry}
    answer.send((capabilities.probe(registry, known), device()))


def device() -> dict[str, str]:
    """Return the device; of a GPU also the ``cuda`` and ``driver`` versions."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return {"device": "CPU"}
    if not torch.cuda.is_available():
        return {"device": "CPU"}
    about = {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    if driver := _driver():
        about["driver"] = driver
    return about


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return out.stdout.split("\n", 1)[0].strip() if out.returncode == 0 else ""


def slug(name: str) -> str:
    """Make a file name of a device's name: "NVIDIA H100 80GB" → "nvidia-h100-80gb"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
