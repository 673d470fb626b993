"""Compute scales and amax histories as Transformer Engine's kernels do, bit for bit.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

The fused CUDA kernels differ from the textbook where amax is zero, tiny, Inf or NaN,
and so do these functions. None changes what it is given.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_numerics.py
    Sources: NVIDIA Transformer Engine 2.20, common/recipe/delayed_scaling.cu,
             current_scaling.cu and recipe_common.cuh, and pytorch/quantization.py
             (functions as algorithms);
             Micikevicius et al. 2022, arXiv:2209.05433, section 3 (scaling factors).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .codes import check_input

__all__ = [
    "DelayedScalingRecipe",
    "compute_amax",
    "compute_current_scale",
    "compute_scale",
    "update_amax_history",
    "update_delayed_scaling",
]

FLOAT32_MAX = torch.finfo(torch.float32).max


class DelayedScalingRecipe(Protocol):
    """What `update_delayed_scaling` reads of a recipe."""

    margin: int
    amax_compute_algo: Any  # "max", "most_recent" or a function of the history
    scaling_factor_compute_algo: Callable[..., Tensor] | None


def compute_amax(x: Tensor) -> Tensor:
    """Return the largest magnitude in ``x``, NaN left out.

    Args:
        x: float32, bfloat16 or float16, any shape.

    Returns:
        float32, no dimensions; 0 for an empty tensor, Inf if there is one.

    Any other dtype of ``x`` is a TypeError.

    Example:
        >>> compute_amax(torch.tensor([1.0, -3.0, float("nan")]))
        tensor(3.)
    """
    x = check_input(x)
    if not x.numel():
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x)
    amax = torch.maximum(-low, high).abs()  # not -0
    if amax.isnan():
        amax = x.abs().nan_to_num(nan=0.0, posinf=torch.inf).max()
    return amax.float()


def update_amax_history(history: Tensor) -> Tensor:
    """Return the history with this step's amax moved to the end and a free first row.

    Row 0 is where the current step collects its amax, rows 1 (oldest) to L - 1 (newest)
    are past steps: ``new[0] = 0``, ``new[i] = history[i + 1]``, ``new[L - 1] =
    history[0]``. A column whose row 0 is zero saw no data and stays as it is; NaN is
    not zero.

    Args:
        history: float32, [L, n], or [L].

    Returns:
        A new tensor, the shape of ``history``.

    Example:
        >>> update_amax_history(torch.tensor([4.0, 1.0, 2.0, 3.0])).tolist()
        [0.0, 2.0, 3.0, 4.0]
    """
    rolled = history.roll(-1, 0)
    rolled[0] = 0.0
    return torch.where(history[0] == 0, history, rolled)


def compute_scale(
    amax: Tensor, scale: Tensor, fp8_max: float, margin: int = 0
) -> Tensor:
    """Return the scale that maps ``amax`` to ``fp8_max / 2**margin``, or the old one.

    ``fp8_max * 2**-margin / amax``, divided once in float32. Where amax is zero, Inf or
    NaN the old scale stays; where the quotient is Inf it is the largest float32.

    Args:
        amax: float32, any shape.
        scale: float32, the shape of ``amax``: what stays where amax says nothing.
        fp8_max: 448 for E4M3, 57344 for E5M2.
        margin: Powers of two to leave free below ``fp8_max``.

    Returns:
        A new tensor, float32, the shape of ``amax``.

    Example:
        >>> amax = torch.tensor([0.0, 7.0, float("inf")])
        >>> compute_scale(amax, torch.ones(3), 448.0).tolist()
        [1.0, 64.0, 1.0]
    """
    largest = torch.tensor(fp8_max * 2.0**-margin, device=amax.device)
    # torch.div: a Python number over a tensor would multiply by the reciprocal.
    fresh = torch.div(largest, amax)
    scale = torch.where(amax.isfinite() & (amax > 0), fresh, scale)
    return scale.clamp(max=FLOAT32_MAX)


def update_delayed_scaling(
    history: Tensor, scale: Tensor, fp8_max: float, recipe: DelayedScalingRecipe
) -> tuple[Tensor, Tensor]:
    """Return history and scale after a step of delayed scaling.

    ``amax`` is the largest of the whole history ("max"), NaN left out, or this step's
    ("most_recent"); then `compute_scale` and `update_amax_history`. A column without
    data in this step keeps both its history and its scale. An Inf keeps the old scale
    for as long as it counts: L steps under "max", one under "most_recent".

    A function as ``amax_compute_algo`` or ``scaling_factor_compute_algo`` takes the
    road that Transformer Engine takes for it, written in PyTorch rather than CUDA:
    every column is moved, "max" is NaN where there is one, and the default scale is
    ``(1 / amax * fp8_max) / 2**margin``, rounded at each step.

    Args:
        history: float32, [L, n], L >= 1: row 0 is this step's amax.
        scale: float32, [n].
        fp8_max: 448 for E4M3, 57344 for E5M2.
        recipe: Has ``margin``, ``amax_compute_algo`` ("max", "most_recent" or a
            function of the history that returns [n]) and
            ``scaling_factor_compute_algo`` (None, or a function of amax, scale, fp8_max
            and the recipe).

    Returns:
        New tensors, in the shapes of ``history`` and ``scale``.

    Raises:
        ValueError: ``amax_compute_algo`` is another string, or the shapes disagree.
    """
    if history.dim() < 1 or not history.shape[0] or history.shape[1:] != scale.shape:
        got = f"{list(history.shape)} and {list(scale.shape)}"
        msg = f"history must be [L, n] with L >= 1 and scale [n], got {got}"
        raise ValueError(msg)
    algo, compute = recipe.amax_compute_algo, recipe.scaling_factor_compute_algo
    if not callable(algo) and algo not in {"max", "most_recent"}:
        msg = f"amax_compute_algo must be 'max' or 'most_recent', got {algo!r}"
        raise ValueError(msg)
    if callable(algo) or compute is not None:
        return _update_unfused(history, scale, fp8_max, recipe)
    amax = history[0]
    if algo == "max":
        seen = history.nan_to_num(nan=0.0, posinf=torch.inf).amax(0)
        amax = torch.where(amax == 0, 0.0, seen)
    scale = compute_scale(amax, scale, fp8_max, recipe.margin)
    return update_amax_history(history), scale


def _update_unfused(
    history: Tensor, scale: Tensor, fp8_max: float, recipe: DelayedScalingRecipe
) -> tuple[Tensor, Tensor]:
    algo, compute = recipe.amax_compute_algo, recipe.scaling_factor_compute_algo
    history, scale = history.clone(), scale.clone()  # a function may write to them
    if callable(algo):
        amax = algo(history)
    else:
        amax = history.amax(0) if algo == "max" else history[0].clone()
    rolled = history.roll(-1, 0)
    rolled[0] = 0.0
    if compute is not None:
        return rolled, compute(amax, scale, fp8_max, recipe).clone()
    return rolled, _default_sf_compute(amax, scale, fp8_max, recipe.margin)


def _default_sf_compute(
    amax: Tensor, scale: Tensor, fp8_max: float, margin: int
) -> Tensor:
    """Write the new scale to ``scale`` and return it, as a callable of a recipe may."""
    fresh = amax.reciprocal() * fp8_max / 2**margin
    fresh = torch.where(amax.isfinite() & (amax > 0), fresh, scale)
    return scale.copy_(torch.where(fresh.isinf(), FLOAT32_MAX, fresh))


def compute_current_scale(
    amax: Tensor, fp8_max: float, power_of_2: bool = False, epsilon: float = 0.0
) -> Tensor:
    """Return the scale that maps ``amax`` to ``fp8_max``, or 1 where there is none.

    ``fp8_max / max(amax, epsilon)``, divided once in float32; 1 where that amax is
    zero, Inf or NaN. Where the quotient is Inf it is the largest float32.
    ``power_of_2`` rounds it down to a power of two.

    Args:
        amax: float32, any shape, >= 0.
        fp8_max: 448 for E4M3, 57344 for E5M2.
        power_of_2: Round down.
        epsilon: Smallest amax to use.

    Returns:
        A new tensor, float32, the shape of ``amax``.

    Example:
        >>> amax = torch.tensor([0.0, 3.0])
        >>> compute_current_scale(amax, 448.0, power_of_2=True).tolist()
        [1.0, 128.0]
    """
    return scale_of_amax(amax, fp8_max, power_of_2, epsilon, FLOAT32_MAX)


def scale_of_amax(
    amax: Tensor, fp8_max: float, power_of_2: bool, epsilon: float, largest: float
) -> Tensor:
    """Return `compute_current_scale`, with ``largest`` where the quotient is Inf."""
    amax = torch.where(amax < epsilon, epsilon, amax)
    scale = torch.div(torch.tensor(fp8_max, device=amax.device), amax)
    scale = torch.where(scale.isinf(), largest, scale)
    if power_of_2:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return torch.where(amax.isfinite() & (amax != 0), scale, 1.0)
