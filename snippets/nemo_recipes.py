"""Build and check the mixed-precision recipes of NeMo and Megatron-Bridge.

Copy this file into your project; it needs only ``torch``.

Names, fields, defaults and messages are those of Megatron-Bridge, so that a setting can
be checked on a laptop before a job waits for GPUs. Nothing here needs a GPU.

    Guide:   guide/nemo_recipes
    Tests:   tests/test_nemo_recipes.py
    Sources: NVIDIA-NeMo/Megatron-Bridge v0.6.0 (2026, 51885cf1), mixed_precision.py and
             config.py; NVIDIA/Megatron-LM (2026, d98e8a64), megatron/core: configs,
             fp8_utils.py, fp4_utils.py, optimizer (who reads a field, who refuses it);
             nemo-toolkit 2.7.3, the recipes of nemo.collections.llm.
    Changed: 2026-11-21

SPDX-License-Identifier: Apache-2.0
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch

__all__ = ["MIXED_PRECISION_RECIPES", "NEMO2_NAMES", "MixedPrecisionConfig"]
__all__ += ["get_mixed_precision_config", "register"]

# Recipe -> class in transformer_engine.common.recipe, and the field that Megatron hands
# to each of its arguments.
_DPA = {"fp8_dpa": "fp8_dot_product_attention"}
_DELAYED_ONLY = {
    "margin": "fp8_margin",
    "amax_history_len": "fp8_amax_history_len",
    "amax_compute_algo": "fp8_amax_compute_algo",
    "fp8_mha": "fp8_multi_head_attention",
}
_FP8_RECIPES: dict[str, tuple[str, dict[str, str]]] = {
    "tensorwise": ("Float8CurrentScaling", _DPA),
    "delayed": ("DelayedScaling", _DELAYED_ONLY | _DPA),
    "blockwise": ("Float8BlockScaling", {}),
    "mxfp8": ("MXFP8BlockScaling", _DPA),
}
_FP4_RECIPES = {"nvfp4": ("NVFP4BlockScaling", _DPA)}
_DYNAMIC = {"initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"}
_OUTER = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_DTYPES = ("params_dtype", "pipeline_dtype", "autocast_dtype")
_HALVES = (
    "Model config cannot have both bf16=True and fp16=True. "
    "Please set only one precision mode."
)
_REUSE = (
    "When fp8_param_gather=True and fp8_recipe='mxfp8', "
    "reuse_grad_buf_for_mxfp8_param_ag must be set to True"
)
_ONLY_FP8 = (
    "Float8CurrentScaling, MXFP8BlockScaling, Float8BlockwiseScaling and "
    "DelayedScaling are the only supported FP8 recipes."
)
_ONLY_FP4 = "NVFP4BlockScaling and custom are the only supported FP4 recipes."
_BOTH = "fp4 and fp8 cannot be used simultaneously. Please choose one."


@dataclass(kw_only=True)
class MixedPrecisionConfig:
    """What Megatron-Bridge copies into the model's, the optimizer's and DDP's config.

    ``fp8_param`` and ``fp8_param_gather`` follow each other, as ``fp4_param`` and
    ``fp4_param_gather`` do. Stricter than the original in two places: a field that does
    not exist cannot be assigned, and the constructor refuses ``fp8_param=True`` alone,
    which the original drops.

    Example:
        >>> config = MixedPrecisionConfig(bf16=True, fp8="hybrid", fp8_margin=1)
        >>> config.te_recipe()
        ('Float8CurrentScaling', {'fp8_format': 'HYBRID', 'fp8_dpa': False})
        >>> config.unread()
        ['fp8_margin']
    """

    fp32: bool = False
    fp16: bool = False
    bf16: bool = False
    params_dtype: torch.dtype | None = None
    pipeline_dtype: torch.dtype | None = None
    autocast_dtype: torch.dtype | None = None
    autocast_enabled: bool = False
    grad_reduce_in_fp32: bool = True
    fp8: str | None = None
    fp8_recipe: str = "tensorwise"
    first_last_layers_bf16: bool = False
    fp8_margin: int = 0
    fp8_amax_history_len: int = 1
    fp8_amax_compute_algo: str = "most_recent"
    fp8_wgrad: bool = True
    fp8_dot_product_attention: bool = False
    fp8_multi_head_attention: bool = False
    fp8_param: bool | None = None
    fp8_param_gather: bool = False
    fp4: str | None = None
    fp4_recipe: str = "nvfp4"
    fp4_param: bool | None = None
    fp4_param_gather: bool = False
    loss_scale: float | None = None
    initial_loss_scale: float | None = 4294967296
    min_loss_scale: float = 1.0
    loss_scale_window: float = 1000
    hysteresis: int = 2
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    reuse_grad_buf_for_mxfp8_param_ag: bool = False

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        if name not in (known := self.__dataclass_fields__):
            near = difflib.get_close_matches(name, known, 3, 0.0)
            raise AttributeError(f"no field {name!r}; nearest: {', '.join(near)}")
        gather = name.endswith("_param_gather")
        twin = name.removesuffix("_gather") if gather else f"{name}_gather"
        if twin in self.__dict__:
            given = self.__dict__[twin]
            if name not in self.__dict__ and given not in {None, value}:
                raise ValueError(f"{twin}={given}, {name}={value}: set {name} alone")
            object.__setattr__(self, twin, value)
        object.__setattr__(self, name, value)

    def finalize(self, te_version: str = "2.7.0") -> None:
        """Settle the pairs; refuse FP4 with FP8, or with an old Transformer Engine.

        Args:
            te_version: ``transformer_engine.__version__`` where this will run.

        Raises:
            ValueError: One of these, with Megatron-Bridge's message.
        """
        for name in ("fp8_param", "fp4_param"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self, f"{name}_gather"))
        if self.fp4 and self.fp8:
            raise ValueError(_BOTH)
        if self.fp4 and [int(n) for n in re.findall(r"\d+", te_version)] < [2, 7]:
            raise ValueError(
                "fp4 requires Transformer Engine >= 2.7.0.dev0 for NVFP4BlockScaling "
                f"support. Got {te_version}"
            )

    def validate(self, num_layers: int | None = None, pipeline_size: int = 1) -> None:
        """Refuse what Megatron-Bridge, Megatron Core or Transformer Engine would.

        Their messages are kept, and completed with the value. They raise a ValueError
        or an AssertionError, at several places between the start and the first step.

        Args:
            num_layers: Of the model; None leaves the numbers of layers unchecked.
            pipeline_size: The model's ``pipeline_model_parallel_size``.

        Raises:
            TypeError: A field is of another type than it is declared.
            ValueError: A field is out of range, or contradicts another.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = get_args(field.type) or (field.type,)
            kinds += (int,) if float in kinds else ()
            if type(value) not in kinds:
                names = " or ".join(getattr(kind, "__name__", "") for kind in kinds)
                raise TypeError(f"{field.name} must be {names}, got {value!r}")
        most = math.inf if num_layers is None else num_layers // pipeline_size
        for fault in self._faults(most):
            raise ValueError(fault)

    def _faults(self, most: float) -> Iterator[str]:
        fp8, fp4, outer = self.fp8, self.fp4, self.first_last_layers_bf16
        if self.fp16 and self.bf16:
            yield _HALVES
        if fp8 not in {None, "e4m3", "hybrid"}:
            yield f"E4M3 and HYBRID are the only supported FP8 formats. Got fp8={fp8!r}"
        if fp4 not in {None, "e2m1"}:
            yield f"fp4 must be None or 'e2m1', got {fp4!r}"
        if fp8 and self.fp8_recipe not in _FP8_RECIPES:
            yield f"{_ONLY_FP8} Got fp8_recipe={self.fp8_recipe!r}"
        if fp4 and self.fp4_recipe not in _FP4_RECIPES:
            yield f"{_ONLY_FP4} Got fp4_recipe={self.fp4_recipe!r}"
        if fp8 and outer and self.fp8_recipe == "delayed":
            yield "Delayed scaling does not support first / last layer in BF16."
        for name in _OUTER:
            n = getattr(self, name)
            if n < 0 or (fp8 and outer and n > most):
                limit = f"number of layers per pipeline stage ({most})."
                yield f"{name} ({n}) must be between 0 and {limit}"
        for name, on in ("fp8", fp8), ("fp4", fp4):
            if getattr(self, f"{name}_param") and not on:
                yield f"{name}_param must be used together with {name} mode."
        if fp4 and fp8:
            yield _BOTH
        gather, reuse = self.fp8_param_gather, self.reuse_grad_buf_for_mxfp8_param_ag
        if gather and self.fp8_recipe == "mxfp8" and not reuse:
            yield _REUSE
        if reuse and not gather:
            yield "Reuse grad buffer only when keeping params in MXFP8."
        if (algo := self.fp8_amax_compute_algo) not in {"max", "most_recent"}:
            yield f"fp8_amax_compute_algo must be 'max' or 'most_recent', got {algo!r}"
        for name in ("fp8_amax_history_len", "loss_scale", *sorted(_DYNAMIC)):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name} must be positive and finite, got {value}"
        first, floor = self.initial_loss_scale, self.min_loss_scale
        if self.fp16 and not self.loss_scale and (first is None or floor > first):
            yield f"initial_loss_scale must not be below {floor}, got {first}"
        for name in _DTYPES:
            dtype = getattr(self, name)
            if dtype is not None and not dtype.is_floating_point:
                yield f"{name} must be a floating-point dtype, got {dtype}"

    def setup(
        self,
        model_config: object,
        optimizer_config: object | None = None,
        ddp_config: object | None = None,
    ) -> dict[str, tuple[object, object]]:
        """Copy each field, default or not, to every config that has one of its name.

        Calls `finalize` and `validate` first: if they raise, no config has changed.
        Returns what was overwritten: ``"Class.field"`` to the old value and the new.
        """
        self.finalize()
        size = getattr(model_config, "pipeline_model_parallel_size", 1)
        self.validate(getattr(model_config, "num_layers", None), size)
        overwritten: dict[str, tuple[object, object]] = {}
        for config in (model_config, optimizer_config, ddp_config):
            for name in self.__dataclass_fields__:
                value = getattr(self, name)
                if (old := getattr(config, name, value)) != value:
                    setattr(config, name, value)
                    overwritten[f"{type(config).__name__}.{name}"] = (old, value)
        return overwritten

    def te_recipe(self) -> tuple[str, dict[str, Any]] | None:
        """Tell what Megatron Core makes of this for Transformer Engine.

        Returns:
            A class in ``transformer_engine.common.recipe`` and its arguments, the
            format by its name in ``Format``; None without FP8 and FP4.
        """
        if not self.fp8 and not self.fp4:
            return None
        self.validate()
        made = _FP8_RECIPES[self.fp8_recipe] if self.fp8 else _FP4_RECIPES["nvfp4"]
        arguments = {"fp8_format": self.fp8.upper()} if self.fp8 else {}
        return made[0], arguments | {k: getattr(self, v) for k, v in made[1].items()}

    def unread(self) -> list[str]:
        """List the fields that you changed and that nothing reads in this setting."""
        self.validate()
        dead = {"fp32", "autocast_enabled", "fp8_wgrad", "first_last_layers_bf16"}
        dead |= {*_OUTER, *_DPA.values(), *_DELAYED_ONLY.values(), *_DYNAMIC}
        if self.fp8 or self.fp4:
            made = _FP8_RECIPES[self.fp8_recipe] if self.fp8 else _FP4_RECIPES["nvfp4"]
            dead -= {"first_last_layers_bf16", *made[1].values()}
            dead -= {*_OUTER} if self.first_last_layers_bf16 else set()
        dead -= _DYNAMIC if self.fp16 and not self.loss_scale else set()
        return [
            field.name
            for field in fields(self)
            if field.name in dead and getattr(self, field.name) != field.default
        ]


Recipe = Callable[[], MixedPrecisionConfig]
MIXED_PRECISION_RECIPES: dict[str, Recipe] = {}


def register(func: Recipe) -> Recipe:
    """Make a recipe known by its function's name, with underscores and with hyphens."""
    MIXED_PRECISION_RECIPES[func.__name__] = func
    MIXED_PRECISION_RECIPES[func.__name__.replace("_", "-")] = func
    return func


def get_mixed_precision_config(
    name: str | MixedPrecisionConfig,
) -> MixedPrecisionConfig:
    """Make the config of a recipe, new with every call; a config is handed through.

    Raises:
        ValueError: There is no such recipe; the message ends with the nearest.
    """
    if isinstance(name, MixedPrecisionConfig):
        return name
    key = str(name).replace("-", "_")
    if key in MIXED_PRECISION_RECIPES:
        return MIXED_PRECISION_RECIPES[key]()
    known = sorted(MIXED_PRECISION_RECIPES)
    near = NEMO2_NAMES.get(key) or difflib.get_close_matches(key, known, 1, 0)[0]
    raise ValueError(
        f"Unknown mixed-precision recipe '{key}'. Available recipes: "
        f"{', '.join(known)}. Nearest: {near}"
    )


def _recipe(*parts: dict[str, Any]) -> Recipe:
    settings = {name: value for part in parts for name, value in part.items()}
    return lambda: MixedPrecisionConfig(**settings)


def _outer(start: int, end: int) -> dict[str, Any]:
    return dict(zip(_OUTER, (start, end), strict=True), first_last_layers_bf16=True)


# What each part of a recipe's name sets.
_BF16 = {"bf16": True, **dict.fromkeys(_DTYPES[:2], torch.bfloat16)}
_FP16 = {"fp16": True, **dict.fromkeys(_DTYPES[:2], torch.half)}
_FP16 |= {"grad_reduce_in_fp32": False}
_HYBRID: dict[str, Any] = {"fp8": "hybrid", "fp8_param_gather": True}
_DELAYED = _HYBRID | {"fp8_recipe": "delayed"}
_DELAYED |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
_BLOCKS = _HYBRID | {"fp8_recipe": "blockwise"}
_SUBCHANNEL = _BLOCKS | {"fp8_param_gather": False}
_MX = _HYBRID | {"fp8": "e4m3", "fp8_recipe": "mxfp8"}
_MX |= {"reuse_grad_buf_for_mxfp8_param_ag": True}
_NVFP4 = {"fp4": "e2m1", "fp4_param_gather": True}

bf16_mixed = _recipe(_BF16)
fp16_mixed = _recipe(_FP16)
bf16_with_fp8_delayed_scaling_mixed = _recipe(_BF16, _DELAYED)
fp16_with_fp8_delayed_scaling_mixed = _recipe(_FP16, _DELAYED)
bf16_with_fp8_current_scaling_mixed = _recipe(_BF16, _HYBRID, _outer(1, 1))
fp16_with_fp8_current_scaling_mixed = _recipe(_FP16, _HYBRID, _outer(1, 1))
bf16_with_fp8_subchannel_scaling_mixed = _recipe(_BF16, _SUBCHANNEL)
fp16_with_fp8_subchannel_scaling_mixed = _recipe(_FP16, _SUBCHANNEL)
bf16_with_mxfp8_mixed = _recipe(_BF16, _MX)
fp16_with_mxfp8_mixed = _recipe(_FP16, _MX)
bf16_with_nvfp4_mixed = _recipe(_BF16, _NVFP4)
nemotron_h_bf16_with_fp8_current_scaling_mixed = _recipe(_BF16, _HYBRID, _outer(2, 2))
nanov2_bf16_with_fp8_current_scaling_mixed = _recipe(_BF16, _BLOCKS, _outer(2, 2))
nemotron_3_super_bf16_with_nvfp4_mixed = _recipe(_BF16, _NVFP4, _outer(0, 14))
for _name, _made in [*globals().items()]:
    if _name.endswith("_mixed"):
        _made.__name__ = _made.__qualname__ = _name
        register(_made)

# NeMo 2's name -> Megatron-Bridge's. NeMo 2 has no recipe for NVFP4.
NEMO2_NAMES = {
    name.replace("_delayed_scaling", ""): name
    for name in MIXED_PRECISION_RECIPES
    if "-" not in name and "nvfp4" not in name
}
bf16_with_fp8_mixed = bf16_with_fp8_delayed_scaling_mixed
fp16_with_fp8_mixed = fp16_with_fp8_delayed_scaling_mixed
