"""What every emulated module shares: its quantization state, checks and checkpoints.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_modules.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/base.py`` (Apache-2.0):
             attribute names, order of checks, words of errors, layout of
             ``_extra_state``.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import collections
import copy
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .extra_state import load_extra_state, save_extra_state
from .linear_function import Call
from .parallel import OneRank
from .quantized import Quantized
from .quantizers import Quantizer
from .recipe import DelayedScaling, Recipe
from .slots import DelayedScalingState, QuantizerRole, make_quantizers
from .state import FP8GlobalStateManager
from .tensor import QuantizedTensor

__all__ = [
    "TransformerEngineBaseModule",
    "resolve_device",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
InitMethod = Callable[[Tensor], Any]
_NOT_EMULATED = (
    "adjust_amax_history_length",
    "fast_setattr",
    "get_fp8_meta_tensors",
    "get_qkv_quantization_capabilities",
    "grad_output_preprocess",
    "init_fp8_meta_tensors",
    "onnx_forward",
    "prepare_forward_ctx",
    "register_wgrad_accumulation_and_reduce_hooks",
    "set_activation_dtype",
    "set_meta_tensor",
)


def resolve_device(device: torch.device | str) -> torch.device:
    """Return ``device``, or the CPU where it is ``"cuda"`` and there is no GPU.

    So that Transformer Engine's default, ``device="cuda"``, and code that passes it
    run on a laptop.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu")
    return device


class TransformerEngineBaseModule(OneRank, nn.Module):
    """Base of the modules: holds ``fp8_meta``, quantizers and cached weights.

    Attributes:
        fp8_meta: ``recipe``, ``num_gemms``, ``fp8_group`` and, for delayed scaling,
            the states ``scaling_fwd`` and ``scaling_bwd``.
        quantizers: lists by ``"scaling_fwd"`` and ``"scaling_bwd"``; for each matrix
            product [input, weight, output] and [grad_output, grad_input].
    """

    def __init__(self, name: str | None = None) -> None:
        """Start with no quantization state: the first call makes it."""
        super().__init__()
        self.name = name
        self.fp8 = False
        self.fp8_calibration = False
        self.fp8_initialized = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "fp8_group": None}
        self.quantizers: dict[str, list[Quantizer]] = {
            "scaling_fwd": [],
            "scaling_bwd": [],
        }
        self.primary_weights_in_fp8 = FP8GlobalStateManager.with_fp8_parameters()
        self.preserve_high_precision_init_val = (
            FP8GlobalStateManager.with_high_precision_init_val()
        )
        self.activation_dtype: torch.dtype | None = None
        self.weight_names: list[str] = []
        self._fp8_workspaces: dict[str, Quantized] = {}
        self._boundary_roles: tuple[QuantizerRole | None, ...] = (None, None)
        self._init_methods: dict[str, tuple[InitMethod, int | None]] = {}
        self._registered = False
        self._last_region = 0
        self._stash: collections.deque[tuple[Tensor, Tensor]] = collections.deque()

    def __getattr__(self, name: str) -> Any:
        """Say of Transformer Engine's other methods that they are not emulated.

        Raises:
            AttributeError: there is no such name.
        """
        if name in _NOT_EMULATED:
            raise AttributeError(f"{type(self).__name__}.{name} is not emulated")
        return super().__getattr__(name)

    def need_backward_dw(self) -> bool:
        """Return False: the gradient of a weight is never delayed."""
        return False

    def backward_dw(self) -> None:
        """Do nothing, as Transformer Engine where no gradient was delayed."""

    # ------------------------------------------------------------------ parameters

    def add_parameter(
        self,
        name: str,
        parameter: Tensor,
        init_method: InitMethod,
        fp8_meta_index: int | None = None,
    ) -> None:
        """Register a parameter with what initializes it and its quantizer's slot."""
        self.register_parameter(name, nn.Parameter(parameter))
        self._init_methods[name] = (init_method, fp8_meta_index)

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Initialize every parameter; quantize those that are stored quantized.

        Args:
            defer_init: do nothing (parameters on the meta device).
        """
        if defer_init:
            return
        for name, old in list(self.named_parameters(recurse=False)):
            init_method, index = self._init_methods[name]
            values: Tensor = old.detach()
            if isinstance(values, QuantizedTensor):
                values = values.dequantize()
            if values.device.type == "meta":
                values = torch.empty_like(values, device=resolve_device("cuda"))
            init_method(values)
            if not (self.primary_weights_in_fp8 and index is not None):
                setattr(self, name, nn.Parameter(values, old.requires_grad))
                continue
            quantizer = self.quantizers["scaling_fwd"][index]
            quantized = QuantizedTensor(
                quantizer.to_quantized(values), values.dtype, quantizer
            )
            parameter = nn.Parameter(quantized, old.requires_grad)
            if self.preserve_high_precision_init_val:
                _attach_init_val(parameter, values.cpu())
            setattr(self, name, parameter)

    # --------------------------------------------------------- quantization state

    @property
    def output_quantizer_role(self) -> QuantizerRole | None:
        """What the output is for, if a caller has said it; else None.

        A module does not know who takes its output, or the gradient of its input. The
        function of a ``CustomRecipe`` gets None for these slots, here as in Transformer
        Engine; setting a role makes the quantizers anew.
        """
        return self._boundary_roles[0]

    @output_quantizer_role.setter
    def output_quantizer_role(self, role: QuantizerRole | None) -> None:
        self._set_boundary_roles(role, self._boundary_roles[1])

    @property
    def grad_input_quantizer_role(self) -> QuantizerRole | None:
        """What the gradient of the input is for: as :attr:`output_quantizer_role`."""
        return self._boundary_roles[1]

    @grad_input_quantizer_role.setter
    def grad_input_quantizer_role(self, role: QuantizerRole | None) -> None:
        self._set_boundary_roles(self._boundary_roles[0], role)

    def _set_boundary_roles(self, *roles: QuantizerRole | None) -> None:
        recipe = self.fp8_meta.get("recipe")
        if roles != self._boundary_roles and recipe is not None and recipe.custom():
            self.quantizers = {"scaling_fwd": [], "scaling_bwd": []}
        self._boundary_roles = roles

    def get_quantizer_roles(
        self, *, fwd: bool, num_quantizers: int
    ) -> list[QuantizerRole | None]:
        """Return what each slot is for; ``CustomRecipe`` functions get it.

        Args:
            fwd: slots [input, weight, output], else [grad_output, grad_input].
            num_quantizers: of slots; with several products the pattern is repeated.
        """
        name = self.name or ""
        kinds = ("input", "weight") if fwd else ("grad_output",)
        roles = [QuantizerRole("linear", kind, name) for kind in kinds]
        pattern = [*roles, self._boundary_roles[0 if fwd else 1]]
        return [pattern[i % len(pattern)] for i in range(num_quantizers)]

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Make the state of the active recipe, or keep it if there already is one."""
        fp8 = FP8GlobalStateManager.is_fp8_enabled()
        calibrating = FP8GlobalStateManager.is_fp8_calibration()
        parameters = FP8GlobalStateManager.with_fp8_parameters()
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        if fp8 or calibrating or parameters:
            self._set_recipe(recipe, num_gemms)
        self.fp8, self.fp8_calibration = fp8, calibrating
        self.fp8_meta["fp8_checkpoint"] = fp8 or calibrating
        if not (fp8 or calibrating):
            self.fp8_initialized = False
            return
        self.fp8_meta["fp8_group"] = FP8GlobalStateManager.get_fp8_group()
        self.fp8_initialized = True

    def _set_recipe(self, recipe: Recipe, num_gemms: int) -> None:
        old = self.fp8_meta.get("recipe")
        if old is recipe and self.quantizers["scaling_fwd"]:
            self._follow_history_length(recipe)
            return
        same_kind = isinstance(old, type(recipe)) or (
            old is not None and isinstance(recipe, type(old))
        )
        if (
            old is not None
            and same_kind
            and self.quantizers["scaling_fwd"]
            and not recipe.custom()
        ):
            # As in Transformer Engine: a live module keeps what its first recipe made.
            if recipe != old:
                self._warn_kept(old, recipe)
            self.fp8_meta["recipe"] = recipe
            self._follow_history_length(recipe)
            return
        made: dict[str, tuple[DelayedScalingState | None, list[Quantizer]]] = {}
        weights = [w for n in self.weight_names if (w := getattr(self, n)) is not None]
        device = next((w.device for w in weights), torch.device("cpu"))
        if device.type == "meta":
            device = resolve_device("cuda")
        for key, forward in (("scaling_fwd", True), ("scaling_bwd", False)):
            count = num_gemms * (3 if forward else 2)
            state = (
                DelayedScalingState(recipe, forward, count, device)
                if isinstance(recipe, DelayedScaling)
                else None
            )
            roles = self.get_quantizer_roles(fwd=forward, num_quantizers=count)
            made[key] = (
                state,
                make_quantizers(recipe, forward, count, state, roles),
            )
        if old is not None and not same_kind:
            warnings.warn(
                f"Recipe type changed from {type(old).__name__} to "
                f"{type(recipe).__name__}. This may affect model behavior.",
                stacklevel=2,
            )
            self._fp8_workspaces.clear()
        for key, (state, quantizers) in made.items():
            self.fp8_meta.pop(key, None)
            if state is not None:
                self.fp8_meta[key] = state
            self.quantizers[key] = quantizers
        self._registered = False
        self.fp8_meta["recipe"] = recipe
        self.fp8_meta["num_gemms"] = num_gemms

    def _warn_kept(self, old: Recipe, new: Recipe) -> None:
        names = [
            name
            for name in vars(new)
            if getattr(new, name) != getattr(old, name, None)
            and name not in {"amax_history_len", "backward_override"}
            and not name.startswith("fp8_gemm_")  # read at every call
            and not name.endswith("_algo")
        ]
        if names:
            warnings.warn(
                f"{type(self).__name__} keeps the recipe of its first region: "
                f"the new {', '.join(sorted(names))} changes nothing for it, here as "
                "in Transformer Engine 2.20. Make a new module to change the recipe.",
                stacklevel=2,
            )

    def _follow_history_length(self, recipe: Recipe) -> None:
        if not isinstance(recipe, DelayedScaling):
            return
        for key in ("scaling_fwd", "scaling_bwd"):
            state: DelayedScalingState = self.fp8_meta[key]
            if len(state.amax_history) == recipe.amax_history_len:
                continue
            state.resize(recipe.amax_history_len)
            self.quantizers[key] = state.quantizers(self.quantizers[key][0].dtype)
            if key == "scaling_fwd":
                self._renew_weight_quantizers(warn=True)

    def _renew_weight_quantizers(self, warn: bool = False) -> None:
        for name in self.weight_names:
            weight, index = getattr(self, name), self._init_methods[name][1]
            if isinstance(weight, QuantizedTensor) and index is not None:
                if warn and weight.quantizer is not None:
                    warnings.warn(
                        "Quantizer is being updated, this may affect model behavior",
                        stacklevel=2,
                    )
                weight.quantizer = self.quantizers["scaling_fwd"][index]

    # ------------------------------------------------------------------- one call

    def prepare_forward(
        self,
        inp: Tensor,
        num_gemms: int = 1,
        allow_different_data_and_param_types: bool = False,
    ) -> Tensor:
        """Check the input and make the module ready; return it contiguous.

        Raises:
            TypeError: the input is not float32, bfloat16 or float16, or (outside
                ``torch.autocast``) not of the parameters' dtype.
            RuntimeError: the parameters are stored in another recipe's format; the
                module is called twice in one delayed-scaling region.
        """
        state = FP8GlobalStateManager.quantization_state
        if self.fp8 and state.recompute_phase:
            self._replay()
            return inp.contiguous()
        dtype = self._activation_dtype(inp, allow_different_data_and_param_types)
        self._check_recipe_of_weights()
        self._check_first_call(state)
        self.init_fp8_metadata(num_gemms)
        self.activation_dtype = dtype
        recipe = self.fp8_meta.get("recipe")
        if self.fp8 and isinstance(recipe, DelayedScaling):
            self._last_region = state.region
            if not self._registered:
                for key in ("scaling_fwd", "scaling_bwd"):
                    FP8GlobalStateManager.register(
                        self.fp8_meta[key], recipe, self.fp8_meta["fp8_group"]
                    )
                self._registered = True
            if state.recompute_enabled:
                forward: DelayedScalingState = self.fp8_meta["scaling_fwd"]
                self._stash.append((
                    forward.amax_history.clone(),
                    forward.scale.clone(),
                ))
        return inp.contiguous()

    def end_forward(self) -> None:
        """Put the state back that a recomputation had replaced."""
        if self.fp8 and FP8GlobalStateManager.quantization_state.recompute_phase:
            latest = self.__dict__.pop("_latest", None)
            if latest is not None:
                state: DelayedScalingState = self.fp8_meta["scaling_fwd"]
                state.amax_history.copy_(latest[0])
                state.scale.copy_(latest[1])

    def _replay(self) -> None:
        if "scaling_fwd" not in self.fp8_meta or not self._stash:
            return
        state: DelayedScalingState = self.fp8_meta["scaling_fwd"]
        self.__dict__["_latest"] = (state.amax_history.clone(), state.scale.clone())
        history, scale = self._stash.popleft()
        state.amax_history.copy_(history)
        state.scale.copy_(scale)

    def _activation_dtype(self, inp: Tensor, mixed: bool) -> torch.dtype:
        if inp.dtype not in _FLOATS:
            raise TypeError(
                f"{type(self).__name__} got an input of {inp.dtype}, it must be "
                "torch.float32, torch.bfloat16 or torch.float16."
            )
        if torch.is_autocast_enabled(inp.device.type):
            return torch.get_autocast_dtype(inp.device.type)
        if not mixed:
            for name, parameter in self.named_parameters():
                if parameter.dtype != inp.dtype:
                    raise TypeError(
                        "Data types for parameters must match when outside of "
                        f"autocasted region. Found input dtype: {inp.dtype} and "
                        f"{name!r} dtype: {parameter.dtype}"
                    )
        return inp.dtype

    def _check_first_call(self, state: Any) -> None:
        recipe = state.fp8_recipe
        if (
            state.fp8_enabled
            and isinstance(recipe, DelayedScaling)
            and recipe.reduce_amax
            and self._registered
            and self._last_region == state.region
            and torch.is_grad_enabled()
        ):
            raise RuntimeError(
                f"{type(self).__name__} is called more than once in one autocast "
                "region with DelayedScaling(reduce_amax=True), which Transformer "
                "Engine does not support: the amax of the first call would be lost. "
                "Use one region a call, or reduce_amax=False."
            )

    def _check_recipe_of_weights(self) -> None:
        state = FP8GlobalStateManager.quantization_state
        if not (state.fp8_enabled or state.fp8_calibration):
            return
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        for name in self.weight_names:
            weight = getattr(self, name)
            if not isinstance(weight, QuantizedTensor) or weight.quantizer is None:
                continue
            supports = weight.quantizer.compatible_recipe
            if supports is not None and not isinstance(recipe, supports):
                raise RuntimeError(
                    f"Recipe mismatch for '{name}': tensor supports recipe "
                    f"{supports.__name__}, but got {type(recipe).__name__}. Please "
                    "check the recipes assigned during quantized_model_init() and "
                    "autocast() calls."
                )

    def make_call(
        self,
        gemm: int = 0,
        *,
        is_first_microbatch: bool | None = None,
        workspace: str | None = None,
        weight: Tensor | None = None,
        fuse_wgrad_accumulation: bool = False,
        save_original_input: bool = False,
        operands: Sequence[Tensor | None] | None = None,
    ) -> Call:
        """Return how the product number ``gemm`` of this call computes.

        Args:
            gemm: 0 for the first matrix product of the module, 1 for the second.
            is_first_microbatch: None quantizes the weight at every call; True does and
                keeps it; False uses the one kept.
            workspace: the name under which it is kept.
            weight: the parameter with ``main_grad`` (for fused accumulation).
            fuse_wgrad_accumulation: add the weight gradient to ``weight.main_grad``.
            save_original_input: keep the input itself for the backward.
            operands: of the module's backward: where none requires a gradient it is
                not the region's first module.

        Raises:
            RuntimeError: fused accumulation without ``main_grad``, and the weight
                needs a gradient.
        """
        assert self.activation_dtype is not None
        call = Call(self.activation_dtype)
        trains = weight is not None and weight.requires_grad
        if fuse_wgrad_accumulation and trains and torch.is_grad_enabled():
            call.main_grad = getattr(weight, "main_grad", None)
            if call.main_grad is None:
                raise RuntimeError(
                    "fuse_wgrad_accumulation=True needs a tensor weight.main_grad to "
                    "accumulate into"
                )
            call.overwrite_main_grad = bool(is_first_microbatch) or bool(
                getattr(weight, "overwrite_main_grad", False)
            )
        forward, backward = (
            self.quantizers["scaling_fwd"],
            self.quantizers["scaling_bwd"],
        )
        if not self.fp8:
            if self.fp8_calibration:
                call.calibrate = (forward[3 * gemm], forward[3 * gemm + 1])
            return call
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        call.input_quantizer = forward[3 * gemm]
        call.weight_quantizer = forward[3 * gemm + 1]
        call.grad_output_quantizer = backward[2 * gemm]
        call.split = tuple(  # type: ignore[assignment]
            params.use_split_accumulator if params is not None else default
            for default, params in (
                (False, getattr(recipe, "fp8_gemm_fprop", None)),
                (True, getattr(recipe, "fp8_gemm_dgrad", None)),
                (True, getattr(recipe, "fp8_gemm_wgrad", None)),
            )
        )
        call.backward_override = recipe.backward_override
        call.save_original_input = save_original_input
        if is_first_microbatch is not None and workspace is not None:
            call.workspace = self._fp8_workspaces.get(workspace)
            call.update_workspace = is_first_microbatch
        differentiates = operands is None or any(
            x is not None and x.requires_grad for x in operands
        )
        if (
            torch.is_grad_enabled()
            and differentiates
            and recipe.backward_override is None
        ):
            state = FP8GlobalStateManager.quantization_state
            first = state.is_first_fp8_module
            call.updates_gradients = FP8GlobalStateManager.is_first_fp8_module()
            if state.recompute_phase:
                state.is_first_fp8_module = first
        return call

    def keep_workspace(
        self, name: str, call: Call, is_first_microbatch: bool | None
    ) -> None:
        """Remember the quantized weight of ``call`` for the next micro-batches."""
        if is_first_microbatch is not None and call.new_workspace is not None:
            self._fp8_workspaces[name] = call.new_workspace
        call.new_workspace = call.workspace = None  # autograd keeps the call alive

    # ----------------------------------------------------------------- checkpoints

    def get_extra_state(self) -> Tensor:
        """Return scales and histories as bytes, empty where the recipe has none."""
        saves = self.fp8_meta["fp8_checkpoint"] or self.fp8 or self.fp8_calibration
        recipe = self.fp8_meta.get("recipe")
        if not saves or not isinstance(recipe, DelayedScaling):
            return torch.empty(0, dtype=torch.uint8)
        return save_extra_state(self.fp8_meta)

    def set_extra_state(self, state: Any) -> None:
        """Load what :meth:`get_extra_state` returned.

        Raises:
            RuntimeError: no such bytes.
            ValueError: the state of a module with other tensors.
        """
        if state is None:
            return
        if not isinstance(state, Tensor):
            raise RuntimeError("Unsupported checkpoint format.")
        if state.numel() == 0:
            return
        loaded = load_extra_state(state, type(self).__name__)
        if loaded is None:
            return
        recipe = loaded["recipe"]
        num_gemms = loaded["scale_fwd"].numel() // 3
        mine = self.fp8_meta.get("num_gemms", num_gemms)
        if num_gemms < 1 or num_gemms != mine:
            raise ValueError(
                f"the saved state has scales for {num_gemms} matrix products, "
                f"{type(self).__name__} has {mine}"
            )
        self._set_recipe(recipe, num_gemms)
        for key, suffix in (("scaling_fwd", "fwd"), ("scaling_bwd", "bwd")):
            target: DelayedScalingState = self.fp8_meta[key]
            target.scale.copy_(loaded[f"scale_{suffix}"])
            target.amax_history.copy_(loaded[f"amax_history_{suffix}"])
        self.fp8_meta.update(loaded["extra_fp8_variables"])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Quantized parameters are rounded with their scale: load the scale first.
        key = f"{prefix}_extra_state"
        if self.primary_weights_in_fp8 and key in state_dict:
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reset_fp8_meta_tensors(self) -> None:
        """Set all scales to one and all histories to zero."""
        for key in ("scaling_fwd", "scaling_bwd"):
            if key in self.fp8_meta:
                self.fp8_meta[key].scale.fill_(1.0)
                self.fp8_meta[key].amax_history.zero_()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TransformerEngineBaseModule":
        """Copy with a quantization state of its own, registered at its next call."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        new._registered = False
        for key in ("scaling_fwd", "scaling_bwd"):
            state = new.fp8_meta.get(key)
            if isinstance(state, DelayedScalingState):
                new.quantizers[key] = state.quantizers(new.quantizers[key][0].dtype)
        new._renew_weight_quantizers()
        return new


def _attach_init_val(parameter: nn.Parameter, values: Tensor) -> None:
    def get(self: Any) -> Tensor | None:
        return getattr(self, "_high_precision_init_val", None)

    def clear(self: Any) -> None:
        if hasattr(self, "_high_precision_init_val"):
            del self._high_precision_init_val

    held: Any = parameter
    held._high_precision_init_val = values
    held.get_high_precision_init_val = types.MethodType(get, parameter)
    held.clear_high_precision_init_val = types.MethodType(clear, parameter)


def plain_weight(weights: Sequence[Tensor]) -> Tensor:
    """Return the parts of a weight as one [out_features, in_features] tensor."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
