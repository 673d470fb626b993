"""Describe the machine that runs the blocks."""

import importlib
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection

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
    """Send the capabilities and the device of this machine; runs in a child.

    The registry's module knows both: it has ``device()`` beside the capabilities.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    registry = load(path)
    known = {name for name in names if name in registry}
    device = importlib.import_module(path.partition(":")[0]).device
    answer.send((capabilities.probe(registry, known), device()))


def slug(name: str) -> str:
    """Make a file name of a device's name: "NVIDIA H100 80GB" → "nvidia-h100-80gb"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
