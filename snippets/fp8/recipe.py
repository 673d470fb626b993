"""Transformer Engine's quantization recipes, with its fields, defaults and checks.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_recipe.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``common/recipe/__init__.py``
             (Apache-2.0): field names, order, defaults, environment variables and the
             words of the checks.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses
import difflib
import enum
import functools
import os
import typing
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

__all__ = [
    "CustomRecipe",
    "DelayedScaling",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "Format",
    "MMParams",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
    "QParams",
    "Recipe",
]

BackwardOverride = Literal["high_precision", "dequantized"] | None
Scope = Literal["none", "weights", "activations", "all"]
_T = TypeVar("_T", bound=type)


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    """Which element format forward and backward tensors take; ``value`` has maxima.

    ``HYBRID`` is E4M3 in the forward pass and E5M2 for gradients.
    """

    E2M1 = _FormatHelper(max_fwd=6, max_bwd=6)
    E4M3 = _FormatHelper(max_fwd=448, max_bwd=448)
    E5M2 = _FormatHelper(max_fwd=57344, max_bwd=57344)
    HYBRID = _FormatHelper(max_fwd=448, max_bwd=57344)


_CHECKED_FIELDS: set[str] = set()  # not those that a user's subclass adds


def _on(variable: str) -> bool:
    return os.getenv(variable, "0") == "1"


def _checked(cls: _T) -> _T:
    """Make ``cls`` refuse unknown keywords and values of another type.

    Transformer Engine's recipes are pydantic dataclasses, which drop a misspelt
    keyword without a word; here it is a ``TypeError`` that names the nearest field.
    A wrong value is a ``ValueError`` in both (pydantic's error is a ``ValueError``).
    """
    made: Callable[..., None] = vars(cls)["__init__"]
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    _CHECKED_FIELDS.update(names)

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"{cls.__name__} has no field {name!r}.{hint} Its fields are: "
                    + ", ".join(names)
                    + ". (Transformer Engine ignores an unknown keyword silently.)"
                )
        made(self, *args, **kwargs)

    cls.__init__ = functools.wraps(made)(checked)  # type: ignore[misc]
    return cls


def _require(value: bool, message: str) -> None:
    if not value:
        raise ValueError(message)


def _check_types(recipe: Any) -> None:
    hints = typing.get_type_hints(type(recipe))
    for field in dataclasses.fields(recipe):
        if field.name not in _CHECKED_FIELDS:
            continue
        value, hint = getattr(recipe, field.name), hints[field.name]
        choices = [
            choice
            for arm in (hint, *typing.get_args(hint))
            if typing.get_origin(arm) is Literal
            for choice in typing.get_args(arm)
        ]
        if choices:
            more = " or a callable" if "max" in choices else ""
            none = type(None) in typing.get_args(hint)
            good = any(value == choice for choice in choices)
            good = good or (bool(more) and callable(value)) or (none and value is None)
            allowed = ", ".join(repr(c) for c in choices) + more
            allowed += ", None" if none else ""
        elif hint is bool:
            good, allowed = isinstance(value, bool), "True or False"
        elif hint is int:
            good = isinstance(value, int) and not isinstance(value, bool)
            allowed = "an integer"
        elif hint is Format:
            good = isinstance(value, Format)
            allowed = "a member of Format, such as Format.HYBRID"
        elif hint is MMParams:
            good, allowed = isinstance(value, MMParams), "an MMParams"
        else:
            good = callable(value) or (
                value is None and type(None) in typing.get_args(hint)
            )
            allowed = "a callable" + (
                " or None" if type(None) in typing.get_args(hint) else ""
            )
        if not good:
            raise ValueError(
                f"{type(recipe).__name__}.{field.name} is {value!r}, it must be "
                f"{allowed}."
            )


@dataclasses.dataclass(frozen=True)
class MMParams:
    """Options of one of the three matrix products of a layer.

    Attributes:
        use_split_accumulator: add partial sums in FP32 every 128 products, instead
            of leaving all of them in the tensor core's shorter accumulator.
    """

    use_split_accumulator: bool = True


@dataclasses.dataclass(frozen=True)
class QParams:
    """How one kind of tensor is quantized (see the recipe that holds it)."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


class Recipe:
    """What every recipe shares: questions about its kind."""

    fp8_format: Format
    backward_override: BackwardOverride
    # Set by the recipes that have them; no arguments, as in Transformer Engine.
    fp8_quant_fwd_inp: QParams
    fp8_quant_fwd_weight: QParams
    fp8_quant_bwd_grad: QParams

    def __post_init__(self) -> None:
        """Check every field once, when the recipe is made.

        Raises:
            ValueError: a field has a value that its type does not allow.
        """
        _check_types(self)
        _require(self.fp8_format != Format.E5M2, "Pure E5M2 training is not supported.")

    @classmethod
    def delayed(cls) -> bool:
        """Say whether scales come from the amax history of earlier steps."""
        return issubclass(cls, DelayedScaling)

    @classmethod
    def float8_current_scaling(cls) -> bool:
        """Say whether each tensor is scaled by its own amax."""
        return issubclass(cls, Float8CurrentScaling)

    @classmethod
    def float8_per_tensor_scaling(cls) -> bool:
        """Say whether a tensor has one scale."""
        return issubclass(cls, (DelayedScaling, Float8CurrentScaling))

    @classmethod
    def float8_block_scaling(cls) -> bool:
        """Say whether scales belong to 1x128 and 128x128 blocks."""
        return issubclass(cls, Float8BlockScaling)

    @classmethod
    def mxfp8(cls) -> bool:
        """Say whether scales are E8M0, one for 32 elements."""
        return issubclass(cls, MXFP8BlockScaling)

    @classmethod
    def nvfp4(cls) -> bool:
        """Say whether elements are E2M1 with E4M3 scales for 16 of them."""
        return issubclass(cls, NVFP4BlockScaling)

    @classmethod
    def custom(cls) -> bool:
        """Say whether quantizers come from a function of the user's."""
        return issubclass(cls, CustomRecipe)


def _set_quantization(recipe: Any, field: str, value: bool, variable: str) -> None:
    """Set the three ``fp8_quant_*`` from ``variable``, as Transformer Engine does."""
    followed = _on(variable)
    if value != followed:
        warnings.warn(
            f"{type(recipe).__name__}({field}={value}) changes nothing, here as in "
            f"Transformer Engine 2.20: the scales follow the environment variable "
            f"{variable}. Set recipe.fp8_quant_fwd_inp, fp8_quant_fwd_weight and "
            "fp8_quant_bwd_grad to QParams(power_2_scale=...).",
            stacklevel=5,
        )
    power_2 = followed if field == "use_power_2_scales" else not followed
    recipe.fp8_quant_fwd_inp = QParams(power_2_scale=power_2)
    recipe.fp8_quant_fwd_weight = QParams(power_2_scale=power_2)
    recipe.fp8_quant_bwd_grad = QParams(power_2_scale=power_2)


def _override() -> Any:
    return dataclasses.field(
        default_factory=lambda: os.getenv("NVTE_BACKWARD_OVERRIDE", None)
    )


@_checked
@dataclasses.dataclass
class DelayedScaling(Recipe):
    """One scale a tensor, from the amax of earlier steps.

    Args:
        margin: the scale is divided by ``2**margin``.
        fp8_format: ``Format.HYBRID`` or ``Format.E4M3``.
        amax_history_len: steps that the history remembers, at least 1.
        amax_compute_algo: ``"max"`` of the history, ``"most_recent"``, or a function
            ``f(amax_history) -> amax`` of a [length, tensors] float32 tensor.
        scaling_factor_compute_algo: ``None``, or a function
            ``f(amax, old_scale, fp8_max, recipe) -> scale``.
        reduce_amax: take the largest amax of all ranks of the group.
        fp8_dpa, fp8_mha: attention in FP8 (not emulated: a model raises).
        backward_override: only ``None``.
    """

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] | Callable[..., Any] = "max"
    scaling_factor_compute_algo: Callable[..., Any] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: BackwardOverride = _override()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is not allowed; pure E5M2; an empty history.
        """
        super().__post_init__()
        _require(
            self.amax_history_len >= 1,
            f"DelayedScaling.amax_history_len is {self.amax_history_len}, "
            "it must be at least 1.",
        )
        _require(
            self.backward_override is None,
            "Delayed scaling only supports backward_override=None.",
        )


@_checked
@dataclasses.dataclass
class Float8CurrentScaling(Recipe):
    """One scale a tensor, from the tensor's own amax.

    ``fp8_quant_fwd_inp``, ``fp8_quant_fwd_weight`` and ``fp8_quant_bwd_grad`` hold
    what the scales obey. As in Transformer Engine they follow the environment
    variable and not the argument ``use_power_2_scales``: set them for scales that
    are rounded down to powers of two. Here the argument that does nothing warns.
    """

    use_power_2_scales: bool = dataclasses.field(
        default_factory=lambda: _on("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES")
    )
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=False)
    fp8_gemm_dgrad: MMParams = MMParams(use_split_accumulator=True)
    fp8_gemm_wgrad: MMParams = MMParams(use_split_accumulator=True)
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: BackwardOverride = _override()

    def __post_init__(self) -> None:
        """Check the fields and set how each kind of tensor is quantized.

        Raises:
            ValueError: a field has a value that its type does not allow.
        """
        super().__post_init__()
        _set_quantization(
            self,
            "use_power_2_scales",
            self.use_power_2_scales,
            "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES",
        )


@_checked
@dataclasses.dataclass
class MXFP8BlockScaling(Recipe):
    """E8M0 scales, one for 32 elements along the dimension that is summed over.

    ``margin`` is accepted and unused, as in Transformer Engine.
    ``enable_2d_quantization`` scales weights by 32x32 blocks.
    """

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: BackwardOverride = _override()
    enable_2d_quantization: bool = False


@_checked
@dataclasses.dataclass
class Float8BlockScaling(Recipe):
    """FP32 scales, powers of two by default: 1x128 for activations, 128x128 weights.

    ``fp8_quant_*`` hold what the scales obey. As in Transformer Engine they follow the
    environment variable and not the argument ``use_f32_scales``, which warns here.
    """

    use_f32_scales: bool = dataclasses.field(
        default_factory=lambda: _on("NVTE_FP8_BLOCK_SCALING_FP32_SCALES")
    )
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=True)
    fp8_gemm_dgrad: MMParams = MMParams(use_split_accumulator=True)
    fp8_gemm_wgrad: MMParams = MMParams(use_split_accumulator=True)
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: BackwardOverride = _override()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is not allowed, or a combination that no kernel has.
        """
        super().__post_init__()
        dims = {
            name: getattr(self, f"{name}_block_scaling_dim")
            for name in ("x", "w", "grad")
        }
        for name, dim in dims.items():
            _require(dim in (1, 2), f"Only 1D or 2D blocks supported for {name}")
        _require(list(dims.values()).count(2) < 2, "2D by 2D block gemm not supported.")
        for product in ("fprop", "dgrad", "wgrad"):
            _require(
                getattr(self, f"fp8_gemm_{product}").use_split_accumulator,
                f"Split accumulator required for {product}.",
            )
        _require(
            not self.fp8_dpa and not self.fp8_mha,
            "FP8 attention is not supported for Float8BlockScaling.",
        )
        _set_quantization(
            self,
            "use_f32_scales",
            self.use_f32_scales,
            "NVTE_FP8_BLOCK_SCALING_FP32_SCALES",
        )


@_checked
@dataclasses.dataclass
class NVFP4BlockScaling(Recipe):
    """E2M1 elements, E4M3 scales for 16 of them, one FP32 scale a tensor.

    Inputs and gradients of the weight-gradient product pass through a random
    Hadamard transform, gradients are rounded stochastically, weights are scaled by
    16x16 blocks; each ``disable_*`` turns one off.
    """

    disable_rht: bool = dataclasses.field(
        default_factory=lambda: _on("NVTE_NVFP4_DISABLE_RHT")
    )
    disable_stochastic_rounding: bool = dataclasses.field(
        default_factory=lambda: _on("NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING")
    )
    disable_2d_quantization: bool = dataclasses.field(
        default_factory=lambda: _on("NVTE_NVFP4_DISABLE_2D_QUANTIZATION")
    )
    row_scaled_activation: bool = dataclasses.field(
        default_factory=lambda: _on("NVTE_NVFP4_ROW_SCALED_ACTIVATION")
    )
    nvfp4_4over6: Scope = dataclasses.field(
        default_factory=lambda: typing.cast(
            Scope, os.getenv("NVTE_NVFP4_4OVER6", "none")
        )
    )
    nvfp4_4over6_e4m3_use_256: Scope = dataclasses.field(
        default_factory=lambda: typing.cast(
            Scope, os.getenv("NVTE_NVFP4_4OVER6_E4M3_USE_256", "all")
        )
    )
    nvfp4_4over6_err_mode: Literal["MAE", "MSE"] = dataclasses.field(
        default_factory=lambda: typing.cast(
            Literal["MAE", "MSE"],
            os.getenv("NVTE_NVFP4_4OVER6_ERR_MODE", "MAE").upper(),
        )
    )
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: BackwardOverride = _override()

    def __post_init__(self) -> None:
        """Check the fields and derive how each kind of tensor is quantized.

        Raises:
            ValueError: a field is not allowed; another format than E2M1 and E4M3.
        """
        super().__post_init__()
        _require(
            self.fp4_format == Format.E2M1, "Only E2M1 is supported for NVFP4 scaling"
        )
        _require(
            self.fp8_format == Format.E4M3, "Only E4M3 is supported for NVFP4 scaling"
        )
        self.fp4_quant_fwd_inp = QParams(random_hadamard_transform=not self.disable_rht)
        self.fp4_quant_fwd_weight = QParams(
            fp4_2d_quantization=not self.disable_2d_quantization
        )
        self.fp4_quant_bwd_grad = QParams(
            random_hadamard_transform=not self.disable_rht,
            stochastic_rounding=not self.disable_stochastic_rounding,
        )


@_checked
@dataclasses.dataclass
class CustomRecipe(Recipe):
    """Quantizers from ``qfactory(role)``; ``role`` is a ``QuantizerRole``.

    It is None for a module's output and the gradient of its input, whose user a module
    does not know; the function must return a quantizer for these, too.

    Raises:
        ValueError: ``quantization_alignment`` is not positive.
    """

    qfactory: Callable[..., Any]
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: BackwardOverride = _override()
    quantization_alignment: int = 128

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field is not allowed, or no positive alignment.
        """
        super().__post_init__()
        _require(
            self.quantization_alignment > 0,
            "CustomRecipe quantization_alignment must be positive.",
        )
