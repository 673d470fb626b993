"""What a block can ask for with ``:requires:``, and how to find out if it is there.

A probe does the thing: it imports the package, asks the device. Package metadata
lies (the base wheel of Transformer Engine is "installed" and cannot be imported),
so no probe reads it. A probe answers True or False; one that raises is a mistake in
the probe, and is reported at each block that asked.
"""

import importlib
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CAPABILITIES", "Capability", "Findings", "device", "probe", "reason"]


@dataclass(frozen=True)
class Capability:
    """One thing that a machine has or lacks.

    Attributes:
        needs: What the reader sees after "needs", such as "an NVIDIA GPU".
        probe: Answers whether this machine has it.
        gpu_runner: Every GPU runner must have it: with ``GUIDE_REQUIRE_GPU=1`` a
            block that is skipped for lack of it is an error.
        implies: Capabilities that it includes, which a reason need not repeat.
        emulator: ``"package:function"`` of this project, called before the blocks of
            a page that need the capability where it is missing: they run on the
            emulator, and their pages say so.
    """

    needs: str
    probe: Callable[[], bool]
    gpu_runner: bool = False
    implies: tuple[str, ...] = ()
    emulator: str = ""


Findings = dict[str, bool | str]  # a string is the message of a probe that raised


def _imports(module: str) -> bool:
    # A package without its compiled part fails with RuntimeError (Transformer
    # Engine's base wheel) or OSError (a shared library that is missing).
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _compute_capability(major: int, minor: int) -> Callable[[], bool]:
    def probe() -> bool:
        import torch

        return _cuda() and torch.cuda.get_device_capability() >= (major, minor)

    return probe


def _bf16_gpu() -> bool:
    import torch

    # Emulated bfloat16 (V100, T4) answers True without this argument.
    return _cuda() and torch.cuda.is_bf16_supported(including_emulation=False)


def _gloo() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_gloo_available()


def _browser() -> bool:
    names = ("chromium", "chromium-browser", "google-chrome")
    return any(shutil.which(name) for name in names)


CAPABILITIES: dict[str, Capability] = {
    "cuda": Capability("an NVIDIA GPU", _cuda, gpu_runner=True),
    "bf16-gpu": Capability(
        "an NVIDIA GPU with native bfloat16",
        _bf16_gpu,
        gpu_runner=True,
        implies=("cuda",),
    ),
    "sm80": Capability(
        "an Ampere GPU or newer (compute capability 8.0)",
        _compute_capability(8, 0),
        gpu_runner=True,
        implies=("cuda", "bf16-gpu"),
    ),
    "sm89": Capability(
        "an Ada GPU or newer (compute capability 8.9)",
        _compute_capability(8, 9),
        gpu_runner=True,
        implies=("cuda", "bf16-gpu", "sm80"),
    ),
    "sm90": Capability(
        "a Hopper GPU or newer (compute capability 9.0)",
        _compute_capability(9, 0),
        implies=("cuda", "bf16-gpu", "sm80", "sm89"),
    ),
    "sm100": Capability(
        "a Blackwell GPU or newer (compute capability 10.0)",
        _compute_capability(10, 0),
        implies=("cuda", "bf16-gpu", "sm80", "sm89", "sm90"),
    ),
    "transformer-engine": Capability(
        "Transformer Engine with its PyTorch part",
        lambda: _cuda() and _imports("transformer_engine.pytorch"),
        gpu_runner=True,
        emulator="snippets.fp8:install",
    ),
    "bitsandbytes": Capability("bitsandbytes", lambda: _imports("bitsandbytes")),
    "gloo": Capability("torch.distributed with gloo", _gloo),
    "omegaconf": Capability("OmegaConf", lambda: _imports("omegaconf")),
    "scikit-learn": Capability("scikit-learn", lambda: _imports("sklearn")),
    "chromium": Capability("a Chromium browser", _browser),
}


def probe(registry: Mapping[str, Capability], names: set[str]) -> Findings:
    """Probe each of ``names``, all of them in ``registry``."""
    found: Findings = {}
    for name in sorted(names):
        try:
            found[name] = bool(registry[name].probe())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def reason(registry: Mapping[str, Capability], missing: list[str]) -> str:
    """Say what is missing, for a reader: "needs an NVIDIA GPU and bitsandbytes"."""
    implied = {other for name in missing for other in registry[name].implies}
    named = [name for name in missing if name not in implied]
    return "needs " + " and ".join(registry[name].needs for name in named)


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
