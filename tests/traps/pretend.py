"""The capabilities of an imaginary machine; the file ``gpu`` beside it is its GPU."""

import os
from pathlib import Path

from verified.capabilities import Capability

_GPU = Path(__file__).with_name("gpu")


def device() -> dict[str, str]:
    """Return the GPU that the file names, or the CPU."""
    if not _GPU.is_file():
        return {"device": "CPU"}
    return {"device": _GPU.read_text("utf-8").strip(), "cuda": "13.0", "driver": "580"}


def _raise() -> bool:
    msg = "the driver is of another version"
    raise OSError(msg)


def _die() -> bool:
    os._exit(3)


CAPABILITIES = {
    "python": Capability("Python", lambda: True),
    "gpu": Capability("an imaginary GPU", _GPU.is_file, gpu_runner=True),
    "tensor-cores": Capability("imaginary tensor cores", lambda: False),
    "engine": Capability(
        "an imaginary engine", _GPU.is_file, gpu_runner=True, emulator="motor:install"
    ),
    "broken": Capability("a probe that works", _raise),
    "deadly": Capability("a probe that returns", _die),
}
