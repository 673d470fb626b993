"""Switch quantization on, and keep what one training step shares between modules.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_state.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/quantization.py``
             (Apache-2.0): names, signatures, order of updates and the words of errors.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from .numerics import update_delayed_scaling
from .recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)

if TYPE_CHECKING:
    from .slots import DelayedScalingState

__all__ = [
    "FP8GlobalStateManager",
    "accumulator",
    "autocast",
    "emulated_device",
    "fp8_autocast",
    "fp8_model_init",
    "get_default_recipe",
    "get_device_compute_capability",
    "is_bf16_available",
    "is_fp8_available",
    "is_fp8_block_scaling_available",
    "is_mxfp8_available",
    "is_nvfp4_available",
    "quantized_model_init",
]

NOT_OF_TE = ("FP8GlobalStateManager", "accumulator", "emulated_device")  # te.<name>
Accumulator = Literal["fp32", "hopper"]
_Key = tuple[Any, ...]


@dataclasses.dataclass
class _State:
    """What is shared by all modules of the process."""

    fp8_enabled: bool = False
    fp8_calibration: bool = False
    fp8_recipe: Recipe | None = None
    fp8_distributed_group: Any = None
    is_first_fp8_module: bool = False
    fp8_parameters: bool = False
    high_precision_init_val: bool = False
    autocast_depth: int = 0
    region: int = 0  # counts outermost autocast regions
    recompute_enabled: bool = False
    recompute_phase: bool = False
    accumulator: Accumulator = "fp32"
    capability: tuple[int, int] | None = None  # None: every recipe runs


# ---------------------------------------------------------------- what "runs" here


@contextlib.contextmanager
def emulated_device(capability: tuple[int, int]) -> Iterator[None]:
    """Answer ``is_*_available`` as a GPU of this compute capability would.

    Without it the emulator runs every recipe. Not of Transformer Engine: a test uses
    it to see what a program does on another GPU.

    Args:
        capability: major and minor number, such as (8, 9) Ada or (9, 0) Hopper.

    Example:
        >>> with emulated_device((8, 0)):
        ...     is_fp8_available(return_reason=True)
        (False, 'Device compute capability 8.9 or higher required for FP8 execution.')
    """
    state = FP8GlobalStateManager.quantization_state
    before, state.capability = state.capability, capability
    try:
        yield
    finally:
        state.capability = before


@contextlib.contextmanager
def accumulator(kind: Accumulator) -> Iterator[None]:
    """Choose how the matrix products of quantized operands are summed.

    Args:
        kind: ``"fp32"`` (the default of the emulator), or ``"hopper"``: the tensor
            core's accumulator of 13 fraction bits, truncated, which obeys
            ``use_split_accumulator`` of the recipe. Slow.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("fp32", "hopper"):
        raise ValueError(f"accumulator is {kind!r}, it must be 'fp32' or 'hopper'.")
    state = FP8GlobalStateManager.quantization_state
    before, state.accumulator = state.accumulator, kind
    try:
        yield
    finally:
        state.accumulator = before


def _support(
    at_least: tuple[int, int], reason: str, below: tuple[int, int] | None = None
) -> tuple[bool, str]:
    capability = FP8GlobalStateManager.quantization_state.capability
    if capability is None:
        return True, ""
    if below is not None and capability >= below:
        return (
            False,
            "MXFP8 (for all gemm layouts) is not supported on 12.0+ architectures yet.",
        )
    return (True, "") if capability >= at_least else (False, reason)


def _fp8_support() -> tuple[bool, str]:
    return _support(
        (8, 9), "Device compute capability 8.9 or higher required for FP8 execution."
    )


def _mxfp8_support() -> tuple[bool, str]:
    return _support(
        (10, 0),
        "Device compute capability 10.0 or higher required for MXFP8 execution.",
        below=(12, 0),
    )


def _block_support() -> tuple[bool, str]:
    return _support(
        (9, 0),
        "FP8 block scaled GEMM requires compute capability 9.0 or higher and "
        "CUDA >= 12.9.",
    )


def _nvfp4_support() -> tuple[bool, str]:
    return _support(
        (10, 0),
        "Device compute capability 10.0 or higher required for NVFP4 execution.",
    )


def is_fp8_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    """Say whether per-tensor FP8 runs, with the reason if it does not."""
    return _fp8_support() if return_reason else _fp8_support()[0]


def is_mxfp8_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    """Say whether the MXFP8 recipe runs, with the reason if it does not."""
    return _mxfp8_support() if return_reason else _mxfp8_support()[0]


def is_fp8_block_scaling_available(
    return_reason: bool = False,
) -> bool | tuple[bool, str]:
    """Say whether block scaling runs, with the reason if it does not."""
    return _block_support() if return_reason else _block_support()[0]


def is_nvfp4_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    """Say whether the NVFP4 recipe runs, with the reason if it does not."""
    return _nvfp4_support() if return_reason else _nvfp4_support()[0]


def get_device_compute_capability() -> tuple[int, int]:
    """Return that of the :func:`emulated_device`, without one Hopper's."""
    return FP8GlobalStateManager.quantization_state.capability or (9, 0)


def is_bf16_compatible() -> bool:
    """Say whether bfloat16 runs: from compute capability 8.0."""
    return get_device_compute_capability() >= (8, 0)


def is_bf16_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    """Say whether bfloat16 runs, with the reason if it does not."""
    good = is_bf16_compatible()
    reason = "BF16 support requires a GPU with compute capability 8.0 or higher."
    return (good, "" if good else reason) if return_reason else good


def get_align_size_for_quantization(recipe: Recipe) -> int:
    """Return what the rows of a group must be a multiple of."""
    if recipe.custom():
        alignment: int = recipe.quantization_alignment  # type: ignore[attr-defined]
        return alignment
    return 32 if recipe.mxfp8() else 128 if recipe.nvfp4() else 16


def get_default_recipe() -> Recipe:
    """Return the recipe of ``autocast(recipe=None)``: delayed scaling, as on Hopper.

    Under :func:`emulated_device` it is what that GPU would get.
    """
    capability = FP8GlobalStateManager.quantization_state.capability
    if capability is not None and capability >= (12, 0):
        return Float8CurrentScaling()
    if capability is not None and capability >= (10, 0):
        return MXFP8BlockScaling()
    return DelayedScaling()


def _check_recipe_support(recipe: Recipe | None, enabled: bool) -> None:
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(
            f"autocast(recipe=...) is a {type(recipe).__name__}, it must be a recipe "
            "such as DelayedScaling()."
        )
    if enabled and recipe is not None:
        check_recipe_support(recipe)


def check_recipe_support(recipe: Recipe) -> None:
    """Do nothing if the recipe runs.

    Raises:
        RuntimeError: it does not, and why.
    """
    if torch.compiler.is_compiling() and isinstance(recipe, DelayedScaling):
        raise RuntimeError(
            "DelayedScaling is not supported under torch.compile. Please use other "
            "recipes instead."
        )
    good, reason = True, ""
    if isinstance(recipe, (DelayedScaling, Float8CurrentScaling)):
        good, reason = _fp8_support()
    elif isinstance(recipe, Float8BlockScaling):
        good, reason = _block_support()
    elif isinstance(recipe, MXFP8BlockScaling):
        good, reason = _mxfp8_support()
    if not good:
        raise RuntimeError(reason)


# ---------------------------------------------------------------------- the manager


class FP8GlobalStateManager:
    """State of the process: is quantization on, with which recipe, what to update.

    Delayed-scaling states register once and for good: a module keeps the margin, the
    format and the group of the first region that it ran in, whatever recipe comes
    later (only ``amax_history_len`` follows), as in Transformer Engine.
    """

    quantization_state = _State()
    _recipes: ClassVar[dict[_Key, tuple[DelayedScaling, Any]]] = {}
    _registered: ClassVar[
        dict[tuple[bool, _Key], "list[weakref.ref[DelayedScalingState]]"]
    ] = {}

    @classmethod
    def reset(cls) -> None:
        """Forget everything: regions, registered modules, the chosen accumulator."""
        cls.quantization_state = _State()
        cls._recipes.clear()
        cls._registered.clear()

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        """Say whether FP8 runs, and why not; the next three say it of a recipe."""
        return _fp8_support()

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        """Say whether the MXFP8 recipe runs, and why not."""
        return _mxfp8_support()

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        """Say whether block scaling runs, and why not."""
        return _block_support()

    @classmethod
    def is_nvfp4_available(cls) -> tuple[bool, str]:
        """Say whether the NVFP4 recipe runs, and why not."""
        return _nvfp4_support()

    @staticmethod
    def get_meta_tensor_key(forward: bool = True) -> str:
        """Return the key of a module's state of one pass in its ``fp8_meta``."""
        return "scaling_fwd" if forward else "scaling_bwd"

    @staticmethod
    def get_fwd_bwd_key(forward: bool = True) -> str:
        """Return the name of a pass."""
        return "forward" if forward else "backward"

    @classmethod
    def get_buffer_info(cls) -> str:
        """Return the key that a graphed module has in ``fp8_meta``; here none has."""
        return "buffer_index_and_autocast_key"

    @classmethod
    def fp8_graph_capturing(cls) -> bool:
        """Return False: there are no CUDA graphs here."""
        return False

    @classmethod
    def get_autocast_state(cls) -> tuple[Any, ...]:
        """Return what :meth:`set_autocast_state` takes to go back to this region."""
        state = cls.quantization_state
        return (
            state.fp8_enabled,
            state.fp8_calibration,
            state.fp8_recipe,
            state.fp8_distributed_group,
            state.is_first_fp8_module,
            False,  # Transformer Engine's fp8_graph_capturing
        )

    @classmethod
    def set_autocast_state(cls, state: tuple[Any, ...]) -> None:
        """Restore what :meth:`get_autocast_state` returned."""
        now = cls.quantization_state
        (
            now.fp8_enabled,
            now.fp8_calibration,
            now.fp8_recipe,
            now.fp8_distributed_group,
            now.is_first_fp8_module,
            _,
        ) = state

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Say whether an enabled ``autocast`` is active."""
        return cls.quantization_state.fp8_enabled

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        """Say whether statistics are recorded without quantizing."""
        return cls.quantization_state.fp8_calibration

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        """Say whether new modules store quantized parameters."""
        return cls.quantization_state.fp8_parameters

    @classmethod
    def with_high_precision_init_val(cls) -> bool:
        """Say whether new quantized parameters keep their initial value."""
        return cls.quantization_state.high_precision_init_val

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        """Return the active recipe, or the default one outside any region."""
        return cls.quantization_state.fp8_recipe or get_default_recipe()

    @classmethod
    def get_fp8_group(cls) -> Any:
        """Return the process group over which amax is reduced."""
        return cls.quantization_state.fp8_distributed_group

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        """Return True once in each outermost region, to its first module."""
        first = cls.quantization_state.is_first_fp8_module
        cls.quantization_state.is_first_fp8_module = False
        return first

    @classmethod
    def register(
        cls, state: "DelayedScalingState", recipe: DelayedScaling, group: Any
    ) -> None:
        """Add a delayed-scaling state to those that the end of a region updates."""
        key = _key(recipe, group)
        cls._recipes.setdefault(key, (recipe, group))
        cls._registered.setdefault((state.forward, key), []).append(weakref.ref(state))

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        """Reduce amax over the group, rotate histories and compute new scales.

        Called at the end of the outermost region for forward tensors, and at the end
        of the backward of that region's first module for gradients.
        """
        for (is_forward, key), refs in cls._registered.items():
            if is_forward != forward:
                continue
            states = [state for ref in refs if (state := ref()) is not None]
            refs[:] = [ref for ref in refs if ref() is not None]
            if not states:
                continue
            recipe, group = cls._recipes[key]
            if (
                recipe.reduce_amax
                and torch.distributed.is_available()
                and torch.distributed.is_initialized()
                and torch.distributed.get_world_size(group=group) > 1
            ):
                amax = torch.cat([state.amax_history[0] for state in states])
                torch.distributed.all_reduce(
                    amax, op=torch.distributed.ReduceOp.MAX, group=group
                )
                for state, part in zip(
                    states,
                    torch.split(amax, [s.scale.numel() for s in states]),
                    strict=True,
                ):
                    state.amax_history[0].copy_(part)
            fp8_max = fp8_max_of(recipe, forward)
            lengths = {len(state.amax_history) for state in states}
            for length in lengths:  # one update for all states of one length
                group_of = [s for s in states if len(s.amax_history) == length]
                history, scale = update_delayed_scaling(
                    torch.cat([s.amax_history for s in group_of], dim=1),
                    torch.cat([s.scale for s in group_of]),
                    fp8_max,
                    recipe,
                )
                sizes = [s.scale.numel() for s in group_of]
                for state, h, sc in zip(
                    group_of,
                    torch.split(history, sizes, dim=1),
                    torch.split(scale, sizes),
                    strict=True,
                ):
                    state.amax_history.copy_(h)
                    state.scale.copy_(sc)

    @classmethod
    def autocast_enter(
        cls,
        enabled: bool = False,
        calibrating: bool = False,
        fp8_recipe: Recipe | None = None,
        fp8_group: Any = None,
    ) -> None:
        """Enter a region (called by :class:`autocast`).

        Raises:
            AssertionError: the emulated device cannot run the recipe.
        """
        recipe = get_default_recipe() if fp8_recipe is None else fp8_recipe
        if enabled:
            for needed, (good, reason) in (
                (Recipe, _fp8_support()),
                (MXFP8BlockScaling, _mxfp8_support()),
                (Float8BlockScaling, _block_support()),
                (NVFP4BlockScaling, _nvfp4_support()),
            ):
                if not good and isinstance(recipe, needed):
                    raise AssertionError(reason)
        if isinstance(recipe, DelayedScaling):
            cls._recipes[_key(recipe, fp8_group)] = (recipe, fp8_group)
        state = cls.quantization_state
        state.fp8_enabled = enabled
        state.fp8_calibration = calibrating
        state.fp8_recipe = recipe
        state.fp8_distributed_group = fp8_group
        if state.autocast_depth == 0:
            state.is_first_fp8_module = True
            state.region += 1
        state.autocast_depth += 1

    @classmethod
    def autocast_exit(cls, enabled: bool) -> None:
        """Leave a region; the outermost one updates the scales of forward tensors."""
        cls.quantization_state.autocast_depth -= 1
        if (
            enabled
            and cls.quantization_state.autocast_depth == 0
            and torch.is_grad_enabled()
        ):
            cls.reduce_and_update_fp8_tensors(forward=True)


def _key(recipe: DelayedScaling, group: Any) -> tuple[Any, ...]:
    """Name a kind of region: the two functions of a recipe are not part of it."""
    return (
        recipe.margin,
        recipe.fp8_format,
        recipe.amax_history_len,
        recipe.reduce_amax,
        recipe.fp8_dpa,
        recipe.fp8_mha,
        None if group is None else id(group),
    )


def fp8_max_of(recipe: Recipe, forward: bool) -> float:
    """Return the largest finite value of the recipe's format in that pass."""
    maxima = recipe.fp8_format.value
    return float(maxima.max_fwd if forward else maxima.max_bwd)


# --------------------------------------------------------------------- the contexts


class autocast:
    """Quantize the matrix products of Transformer Engine modules in this region.

    Scales of delayed scaling change when the outermost region ends (forward tensors,
    if gradients are enabled) and when the backward of the region's first module ends
    (gradients). Calling a module twice in one region is an error then, as its amax
    would be lost in the reduction: use one region a call, or ``reduce_amax=False``.

    Args:
        enabled: False runs in high precision.
        calibrating: with ``enabled=False``, record amax without quantizing.
        recipe: default :func:`get_default_recipe`.
        amax_reduction_group: process group of the amax reduction, default all ranks.

    Raises:
        RuntimeError: the same object is entered twice at once; the emulated device
            cannot run the recipe.
        TypeError: ``recipe`` is no recipe.
    """

    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Recipe | None = None,
        amax_reduction_group: Any = None,
        _graph: bool = False,
    ) -> None:
        """Remember the arguments; nothing changes before the region is entered."""
        if _graph:
            raise NotImplementedError("autocast(_graph=True): CUDA graphs need a GPU.")
        self._enabled = enabled
        self._calibrating = calibrating
        self._recipe = recipe
        self._group = amax_reduction_group
        self._saved: tuple[Any, ...] | None = None

    def __enter__(self) -> "autocast":
        """Enter the region.

        Raises:
            RuntimeError: this object is active already.
        """
        if self._saved is not None:
            raise RuntimeError(
                "autocast context manager cannot be entered more than once concurrently"
            )
        _check_recipe_support(self._recipe, self._enabled)
        saved = FP8GlobalStateManager.get_autocast_state()
        FP8GlobalStateManager.autocast_enter(
            self._enabled, self._calibrating, self._recipe, self._group
        )
        self._saved = saved
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the region and restore the one around it."""
        saved, self._saved = self._saved, None
        assert saved is not None
        FP8GlobalStateManager.set_autocast_state(saved)
        FP8GlobalStateManager.autocast_exit(self._enabled)


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> autocast:
    """Return :class:`autocast`: the deprecated name, with its warning."""
    warnings.warn(
        "fp8_autocast is deprecated and will be removed in a future release. "
        "Use autocast(enabled=..., calibrating=..., recipe=..., group=..., "
        "_graph=...) instead.",
        category=DeprecationWarning,
        stacklevel=2,
    )
    return autocast(
        enabled=enabled,
        calibrating=calibrating,
        recipe=fp8_recipe,
        amax_reduction_group=fp8_group,
        _graph=_graph,
    )


@contextlib.contextmanager
def quantized_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> Iterator[None]:
    """Store the weights of modules made in this region in the recipe's format only.

    Args:
        enabled: False stores them in high precision.
        recipe: default :func:`get_default_recipe`.
        preserve_high_precision_init_val: keep the initial value on the CPU, for
            ``weight.get_high_precision_init_val()``, which main weights start from;
            free it with ``weight.clear_high_precision_init_val()``.
    """
    _check_recipe_support(recipe, enabled)
    state = FP8GlobalStateManager.quantization_state
    saved = (state.fp8_parameters, state.fp8_recipe, state.high_precision_init_val)
    state.fp8_parameters = enabled
    state.fp8_recipe = get_default_recipe() if recipe is None else recipe
    state.high_precision_init_val = preserve_high_precision_init_val
    try:
        yield
    finally:
        (state.fp8_parameters, state.fp8_recipe, state.high_precision_init_val) = saved


@contextlib.contextmanager
def fp8_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> Iterator[None]:
    """Do :func:`quantized_model_init`: the deprecated name, with its warning."""
    warnings.warn(
        "fp8_model_init is deprecated and will be removed in a future release. "
        "Use quantized_model_init("
        "enabled=..., recipe=..., preserve_high_precision_init_val=...) instead.",
        category=DeprecationWarning,
        stacklevel=3,
    )
    with quantized_model_init(enabled, recipe, preserve_high_precision_init_val):
        yield
