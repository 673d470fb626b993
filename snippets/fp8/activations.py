"""The activation functions of Transformer Engine's ``LayerNormMLP``, in float32.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/layernorm_mlp.py`` (names),
    ``common/util/math.h`` and ``common/util/vectorized_pointwise.h`` (Apache-2.0):
    formulas, which half is the gate, what is clamped.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "FUSED_BACKWARD", "activate", "check_activation"]


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _qgelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _srelu(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Name: the function, and whether a second half of the features is multiplied to it.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (_gelu, False),
    "geglu": (_gelu, True),
    "glu": (torch.sigmoid, True),
    "qgelu": (_qgelu, False),
    "qgeglu": (_qgelu, True),
    "relu": (F.relu, False),
    "reglu": (F.relu, True),
    "srelu": (_srelu, False),
    "sreglu": (_srelu, True),
    "silu": (F.silu, False),
    "swiglu": (F.silu, True),
    "clamped_swiglu": (F.silu, True),
}
# Delayed scaling has a kernel that quantizes the gradient of these in float32.
FUSED_BACKWARD = frozenset({"gelu", "qgelu", "relu", "srelu", "silu"})
_CLAMPED = {"limit": 7.0, "alpha": 1.702, "glu_linear_offset": 1.0}


def check_activation(name: str, params: dict[str, Any] | None) -> None:
    """Refuse an activation function, or a parameter of one, that does not exist.

    Raises:
        NotImplementedError: no such function.
        TypeError: no such parameter.
    """
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(str(name), ACTIVATIONS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise NotImplementedError(
            f"Activation type {name} is not supported!{hint} There are: "
            + ", ".join(ACTIVATIONS)
        )
    allowed = _CLAMPED if name == "clamped_swiglu" else {}
    for key in params or {}:
        if key not in allowed:
            raise TypeError(
                f"activation {name!r} has no parameter {key!r}, it has "
                + (", ".join(allowed) or "none")
            )


def activate(x: Tensor, name: str, params: dict[str, Any] | None = None) -> Tensor:
    """Return the activation function ``name`` of ``x``.

    Of a gated one, the first half of the last dimension is the function's argument and
    the second is multiplied to the result.

    Args:
        x: float32, [..., features], or twice the features.
        name: one of ``ACTIVATIONS``.
        params: ``limit``, ``alpha`` and ``glu_linear_offset`` of ``"clamped_swiglu"``.

    Returns:
        float32, [..., features].

    Example:
        >>> activate(torch.tensor([[-1.0, 3.0, 5.0, 2.0]]), "reglu").tolist()
        [[0.0, 6.0]]
    """
    function, gated = ACTIVATIONS[name]
    if not gated:
        return function(x)
    argument, gate = torch.chunk(x, 2, dim=-1)
    if name == "clamped_swiglu":
        given = {**_CLAMPED, **(params or {})}
        limit, alpha, offset = (float(given[key]) for key in _CLAMPED)
        argument, gate = argument.clamp(max=limit), gate.clamp(-limit, limit) + offset
        return argument * torch.sigmoid(alpha * argument) * gate
    return function(argument) * gate
