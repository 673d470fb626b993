"""Scales and amax histories as the bytes that Transformer Engine puts in checkpoints.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_checkpoints.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/base.py``
             (``get_extra_state``, ``set_extra_state``) and ``pytorch/_extra_state.py``.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import importlib
import io
import os
import pickle
import pickletools
from typing import Any

import torch
from torch import Tensor

from . import recipe as recipes

__all__ = ["load_extra_state", "save_extra_state"]

_UNSAFE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_TE_RECIPES = "transformer_engine.common.recipe"
# What a checkpoint may name: the recipe and how torch rebuilds a CPU tensor.
_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("collections", "OrderedDict"),
}
_STATE = {"scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd"}
_NONE = {
    "CustomRecipe",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
}


def _load_storage(data: bytes) -> Any:
    """Read a storage as torch.storage does, but without running what it names."""
    return torch.load(io.BytesIO(data), weights_only=True)


def _holds_nothing(data: bytes) -> bool:
    """Say whether the pickle is one that a recipe without a state left, unread.

    As Transformer Engine decides it: it names no class and no scales, or such a recipe.
    """
    try:
        operations = list(pickletools.genops(data))
    except Exception:  # no pickle
        return False
    words = {
        word
        for _, text, _ in operations
        if isinstance(text, str)
        for word in text.split()  # a class is one string, "module name", or two
    }
    if words & _STATE:
        return False
    if not any(code.name in {"GLOBAL", "STACK_GLOBAL"} for code, _, _ in operations):
        return True
    return "recipe" in words and "DelayedScaling" not in words and bool(words & _NONE)


class _Unpickler(pickle.Unpickler):
    """Reads recipes and tensors, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in (_TE_RECIPES, recipes.__name__) and (
            name == "_FormatHelper" or not name.startswith("_")
        ):
            found = getattr(recipes, name, None)
            if found is not None:
                return found
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) in _ALLOWED:
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(
            f"the quantization state of a checkpoint names {module}.{name}, which is "
            "neither a recipe nor a tensor"
        )


def save_extra_state(fp8_meta: dict[str, Any]) -> Tensor:
    """Return the state of delayed scaling as a uint8 tensor.

    Args:
        fp8_meta: a module's, with ``recipe``, ``scaling_fwd`` and ``scaling_bwd``.
    """
    state: dict[str, Any] = {"recipe": fp8_meta["recipe"]}
    for key, suffix in (("scaling_fwd", "fwd"), ("scaling_bwd", "bwd")):
        state[f"scale_{suffix}"] = fp8_meta[key].scale.detach().cpu().clone()
        history = fp8_meta[key].amax_history
        state[f"amax_history_{suffix}"] = history.detach().cpu().clone()
    state["extra_fp8_variables"] = {
        name: value
        for name, value in fp8_meta.items()
        if isinstance(value, (bool, int, float, str, tuple, list))
    }
    # Under the name of Transformer Engine's module, which then can load it, too. Up to
    # protocol 3 a class is named in plain text, which no length precedes.
    mine = f"c{recipes.Recipe.__module__}\n".encode()
    data = pickle.dumps(state, protocol=3).replace(mine, f"c{_TE_RECIPES}\n".encode())
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def load_extra_state(state: Tensor, context: str = "a module") -> dict[str, Any] | None:
    """Return what :func:`save_extra_state` or Transformer Engine wrote.

    None for what older releases wrote for a recipe that has no state. The first ones
    wrote no recipe: theirs is delayed scaling.

    Transformer Engine refuses to read it, since it is a pickle, unless
    ``NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1``. This reader runs no code, and refuses
    only where that variable is 0: to rehearse it.

    Args:
        state: uint8, the bytes.
        context: whose state it is, for the message.

    Raises:
        RuntimeError: the bytes are no such state, or the variable is 0.
    """
    try:
        data = state.detach().cpu().contiguous().numpy().tobytes()
    except Exception:  # numpy is not needed by torch
        data = bytes(state.detach().cpu().tolist())
    if _holds_nothing(data):
        return None
    if os.getenv(_UNSAFE) == "0":
        raise RuntimeError(
            f"Refusing to load pickled Transformer Engine extra state for {context}. "
            "Delayed-scaling FP8 metadata can be stored as a Python pickle, and "
            "loading it can execute arbitrary code. Only enable unsafe loading if this "
            "checkpoint is from a trusted source. To load it anyway, set "
            f"{_UNSAFE}=1."
        )
    try:
        loaded = _Unpickler(io.BytesIO(data)).load()
        loaded["scale_fwd"], loaded["scale_bwd"]
        loaded["amax_history_fwd"], loaded["amax_history_bwd"]
        loaded.setdefault("extra_fp8_variables", {})
        loaded.setdefault("recipe", recipes.DelayedScaling())
    except Exception as error:
        raise RuntimeError(
            "the quantization state of this checkpoint cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    result: dict[str, Any] = loaded
    return result
