"""Which quantizer each slot of a module gets from its recipe.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_quantizers.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/quantization.py`` (recipe
             states), Apache-2.0: names, arguments and semantics.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .quantizers import (
    DType,
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    Quantizer,
    TE_DType,
)
from .recipe import (
    CustomRecipe,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)
from .state import fp8_max_of

__all__ = [
    "DelayedScalingRequest",
    "DelayedScalingState",
    "QuantizerRequest",
    "QuantizerRole",
    "make_quantizers",
]


@dataclasses.dataclass(frozen=True)
class QuantizerRole:
    """What a quantizer of a ``CustomRecipe`` is for."""

    module_type: str = ""
    tensor_type: str = ""
    name: str = ""

    def __str__(self) -> str:
        """Name what is known of the slot."""
        known = [f"{name}={value}" for name, value in vars(self).items() if value]
        return "|".join(known) or "QuantizerRole()"


@dataclasses.dataclass(frozen=True)
class QuantizerRequest:
    """Asks, from a ``CustomRecipe``, for a quantizer with a state (not emulated)."""


@dataclasses.dataclass(frozen=True)
class DelayedScalingRequest(QuantizerRequest):
    """Asks for one of delayed scaling (not emulated)."""

    fp8_format: Format = Format.HYBRID
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable[..., Any] = "max"
    scaling_factor_compute_algo: Callable[..., Any] | None = None
    reduce_amax: bool = True


class DelayedScalingState:
    """Scales and amax history of a module's tensors in one pass.

    Attributes:
        scale: [tensors] float32, ones at first.
        amax_history: [length, tensors] float32, zeros at first; row 0 is the step's.
    """

    def __init__(
        self, recipe: DelayedScaling, forward: bool, count: int, device: torch.device
    ) -> None:
        """Make the state of ``count`` tensors."""
        self.forward = forward
        self.scale = torch.ones(count, dtype=torch.float32, device=device)
        self.amax_history = torch.zeros(
            recipe.amax_history_len, count, dtype=torch.float32, device=device
        )

    def resize(self, length: int) -> None:
        """Cut the history, or add zeros at its end, to ``length`` rows."""
        history = self.amax_history
        if length <= len(history):
            self.amax_history = history[:length].clone()
        else:
            more = history.new_zeros(length - len(history), history.shape[1])
            self.amax_history = torch.cat([history, more])

    def quantizers(self, dtype: DType | torch.dtype) -> list[Quantizer]:
        """Return a quantizer for each tensor, viewing this state."""
        return [
            Float8Quantizer(self.scale[i], self.amax_history[0, i], dtype)
            for i in range(len(self.scale))
        ]


def get_fp8_torch_dtype(fp8_recipe: Recipe, fprop_tensor: bool = True) -> torch.dtype:
    """Return the element format of forward tensors, or of gradients."""
    e4m3 = fp8_max_of(fp8_recipe, fprop_tensor) == torch.finfo(torch.float8_e4m3fn).max
    return torch.float8_e4m3fn if e4m3 else torch.float8_e5m2


def get_fp8_te_dtype(fp8_recipe: Recipe, fprop_tensor: bool = True) -> DType:
    """Return the tag of :func:`get_fp8_torch_dtype`."""
    return TE_DType[get_fp8_torch_dtype(fp8_recipe, fprop_tensor)]


def get_fp8_max(fp8_recipe: Recipe, fprop_tensor: bool = True) -> float:
    """Return the largest number of :func:`get_fp8_torch_dtype`."""
    return torch.finfo(get_fp8_torch_dtype(fp8_recipe, fprop_tensor)).max


def make_quantizers(
    recipe: Recipe,
    forward: bool,
    count: int,
    state: DelayedScalingState | None,
    roles: Sequence[QuantizerRole | None],
) -> list[Quantizer]:
    """Return the quantizers of a module's slots in one pass.

    Args:
        recipe: the active recipe.
        forward: slots [input, weight, output, ...], else [grad_output, grad_input].
        count: number of slots.
        state: the state of delayed scaling, else None.
        roles: one role a slot, for ``CustomRecipe``; None where it is not known.

    Raises:
        ValueError: a ``CustomRecipe`` returned no quantizer for a slot.
        NotImplementedError: an option of the recipe that is not emulated.
    """
    kinds = ("input", "weight", "output") if forward else ("grad_output", "grad_input")
    makers: list[tuple[type[Recipe], Callable[[Any, str, torch.dtype], Quantizer]]] = [
        (Float8CurrentScaling, _current),
        (Float8BlockScaling, _block),
        (MXFP8BlockScaling, _mxfp8),
        (NVFP4BlockScaling, _nvfp4),
    ]
    if recipe.fp8_dpa or recipe.fp8_mha:  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"{type(recipe).__name__}(fp8_dpa=..., fp8_mha=...): attention in FP8 is "
            "not emulated."
        )
    dtype = get_fp8_torch_dtype(recipe, forward)
    if isinstance(recipe, DelayedScaling):
        assert state is not None
        return state.quantizers(dtype)
    if isinstance(recipe, CustomRecipe):
        return [_custom(recipe, roles[i], i) for i in range(count)]
    for kind, make in makers:
        if isinstance(recipe, kind):
            return [make(recipe, kinds[i % len(kinds)], dtype) for i in range(count)]
    raise NotImplementedError(f"recipe {type(recipe).__name__} is not emulated.")


def _params(recipe: Any, prefix: str, kind: str) -> Any:
    name = {"weight": "fwd_weight", "grad_output": "bwd_grad", "grad_input": "bwd_grad"}
    return getattr(recipe, f"{prefix}_quant_{name.get(kind, 'fwd_inp')}")


def _current(recipe: Any, kind: str, dtype: torch.dtype) -> Quantizer:
    params = _params(recipe, "fp8", kind)
    return Float8CurrentScalingQuantizer(
        dtype,
        force_pow_2_scales=params.power_2_scale,
        amax_epsilon=params.amax_epsilon,
    )


def _block(recipe: Any, kind: str, dtype: torch.dtype) -> Quantizer:
    params = _params(recipe, "fp8", kind)
    name = {"weight": "w", "grad_output": "grad", "grad_input": "grad"}.get(kind, "x")
    return Float8BlockQuantizer(
        dtype,
        amax_epsilon=params.amax_epsilon,
        force_pow_2_scales=params.power_2_scale,
        block_scaling_dim=getattr(recipe, f"{name}_block_scaling_dim"),
    )


def _mxfp8(recipe: Any, kind: str, dtype: torch.dtype) -> Quantizer:
    return MXFP8Quantizer(
        dtype,
        with_2d_quantization=recipe.enable_2d_quantization and kind == "weight",
    )


def _nvfp4(recipe: Any, kind: str, dtype: torch.dtype) -> Quantizer:
    if recipe.nvfp4_4over6 != "none" or recipe.row_scaled_activation:
        raise NotImplementedError(
            "NVFP4BlockScaling(nvfp4_4over6=..., row_scaled_activation=...) is not "
            "emulated."
        )
    params = _params(recipe, "fp4", kind)
    return NVFP4Quantizer(
        with_rht=params.random_hadamard_transform,
        with_post_rht_amax=params.random_hadamard_transform,
        with_2d_quantization=params.fp4_2d_quantization,
        stochastic_rounding=params.stochastic_rounding,
    )


def _custom(recipe: CustomRecipe, role: QuantizerRole | None, slot: int) -> Quantizer:
    made = recipe.qfactory(role)
    if isinstance(made, QuantizerRequest):
        raise NotImplementedError(
            f"{type(made).__name__} from a CustomRecipe is not emulated."
        )
    if made is None:
        raise ValueError(
            f"CustomRecipe qfactory returned None for slot {slot} (role={role}). Every "
            "slot must return a Quantizer instance or a QuantizerRequest. For an "
            "intentional no-op (high-precision / unquantized) slot, return an "
            "IdentityQuantizer instead of None."
        )
    if not isinstance(made, Quantizer):
        raise TypeError(
            f"CustomRecipe qfactory returned {type(made).__name__} for slot {slot}, it "
            "must return a Quantizer."
        )
    return made
