"""Transformer Engine's ``Linear``, on any device.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_modules.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/linear.py``
             (Apache-2.0): signature, defaults, initialization and the words of errors.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import InitMethod, TransformerEngineBaseModule, plain_weight, resolve_device
from .linear_function import linear
from .parallel import refuse, refuse_parallel
from .state import FP8GlobalStateManager
from .tensor import QuantizedTensor

__all__ = ["Linear"]


def init_method_normal(sigma: float) -> InitMethod:
    """Return what fills a weight with N(0, sigma)."""

    def init_(tensor: Tensor) -> Tensor:
        return torch.nn.init.normal_(tensor, mean=0.0, std=sigma)

    return init_


def scaled_init_method_normal(sigma: float, num_layers: int) -> InitMethod:
    """Return what fills a weight with N(0, sigma / sqrt(2 num_layers))."""
    return init_method_normal(sigma / math.sqrt(2.0 * num_layers))


def init_method_constant(val: float) -> InitMethod:
    """Return what fills a weight with ``val``."""

    def init_(tensor: Tensor) -> Tensor:
        return torch.nn.init.constant_(tensor, val)

    return init_


def get_default_init_method() -> InitMethod:
    """Return what fills a weight if nothing is said: N(0, 0.023)."""
    return init_method_normal(0.023)


normal_init = get_default_init_method()
zero_init = init_method_constant(0.0)  # the default of biases


def split_sizes(
    parameters_split: Sequence[str] | Mapping[str, int] | None, out_features: int
) -> dict[str, int]:
    """Return the prefix of each part of a weight and its rows.

    Raises:
        ValueError: no parts, or parts that do not add up to ``out_features``.
        TypeError: names that are no strings.
    """
    if parameters_split is None:
        return {"": out_features}
    if not parameters_split:
        raise ValueError("Cannot split weight buffer into 0 parameters")
    if isinstance(parameters_split, Mapping):
        sizes = {f"{n.rstrip('_')}_": s for n, s in parameters_split.items()}
    elif all(isinstance(name, str) for name in parameters_split):
        rows = out_features // len(parameters_split)
        sizes = {f"{name.rstrip('_')}_": rows for name in parameters_split}
    else:
        raise TypeError("Invalid configuration for parameters split")
    if sum(sizes.values()) != out_features:
        raise ValueError(
            f"Trying to split weight buffer ({out_features=}) "
            f"with split sizes {list(sizes.values())}"
        )
    return sizes


class Linear(TransformerEngineBaseModule):
    """``y = x @ weight.T + bias``; inside ``autocast`` its three products are in FP8.

    Weights start as N(0, 0.023) and biases as zero, not as those of
    ``torch.nn.Linear``. With FP32 activations the bias of an FP8 product is rounded to
    bfloat16, since cuBLAS takes no FP32 bias there.

    Args:
        in_features, out_features: sizes.
        bias: add a bias.
        init_method: fills the weight in place; default N(0, 0.023).
        return_bias: return ``(output, bias)`` and leave adding it to the caller.
        params_dtype: dtype of the parameters, default ``torch.get_default_dtype()``.
        parallel_mode: ``None``, ``"column"`` or ``"row"``; with one rank they differ
            only in where the bias is added.
        parameters_split: names (and rows) of the parts that the weight is made of.
        fuse_wgrad_accumulation: add weight gradients to ``weight.main_grad``.
        save_original_input: keep the input, not its codes, for the backward.
        device: where parameters live; ``"cuda"`` is the CPU where there is no GPU.
        name: of the module, given to a ``CustomRecipe``.
        tp_group, tp_size: only one rank is emulated.
        sequence_parallel, ub_*, symmetric_ar_type: with one rank they change nothing,
            as in Transformer Engine; nor does ``rng_tracker_name`` with no tracker.
        get_rng_state_tracker, delay_wgrad_compute: only their defaults are emulated.

    Raises:
        NotImplementedError: an option that is not emulated.
        ValueError: sizes below 1, or a split that does not add up.
    """

    weight: nn.Parameter
    bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Sequence[str] | Mapping[str, int] | None = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        """Make and fill the parameters.

        Raises:
            RuntimeError: quantized parameters cannot be split.
            ValueError: sizes below 1, or no such ``parallel_mode``.
        """
        refuse_parallel("Linear", tp_size, tp_group)
        refuse(
            "Linear",
            get_rng_state_tracker=(get_rng_state_tracker, None),
            delay_wgrad_compute=(delay_wgrad_compute, False),
        )
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"Linear({in_features=}, {out_features=}): both must be at least 1."
            )
        if parallel_mode not in (None, "column", "row"):
            raise ValueError(f"parallel_mode {parallel_mode} not supported")
        sizes = split_sizes(parameters_split, out_features)
        if len(sizes) > 1 and FP8GlobalStateManager.with_fp8_parameters():
            raise RuntimeError(
                "Splitting QuantizedTensor into multiple params is not supported"
            )
        super().__init__(name)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.parallel_mode = parallel_mode
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.save_original_input = save_original_input
        self.gemm_bias_unfused_add = parallel_mode == "row" and self.apply_bias
        dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        where = resolve_device(device)
        self.bias_names = [f"{prefix}bias" for prefix in sizes]
        for prefix, rows in sizes.items():
            self.add_parameter(
                f"{prefix}weight",
                torch.empty(rows, in_features, device=where, dtype=dtype),
                init_method or normal_init,
                fp8_meta_index=1,
            )
        self.weight_names = [f"{prefix}weight" for prefix in sizes]
        for prefix, rows in sizes.items():
            if bias:
                self.add_parameter(
                    f"{prefix}bias",
                    torch.empty(rows, device=where, dtype=dtype),
                    zero_init,
                )
            else:
                setattr(
                    self, f"{prefix}bias", torch.empty(0, device=where, dtype=dtype)
                )
        if self.primary_weights_in_fp8:
            self.init_fp8_metadata()
        self.reset_parameters(defer_init=where.type == "meta")

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Apply the layer.

        Args:
            inp: [..., in_features].
            is_first_microbatch: with several micro-batches a step: True quantizes the
                weight and keeps the codes, False uses those, None does neither.
            fp8_output: only False is emulated.
            fp8_grad: only False is emulated.

        Returns:
            [..., out_features]; with ``return_bias`` also the bias.

        Raises:
            TypeError: a dtype that the layer cannot take.
            ValueError: a shape that FP8 kernels cannot take.
        """
        refuse("Linear", fp8_output=(fp8_output, False), fp8_grad=(fp8_grad, False))
        inp = self.prepare_forward(inp)
        try:
            weights = [getattr(self, name) for name in self.weight_names]
            if not self.fp8 and any(isinstance(w, QuantizedTensor) for w in weights):
                warn_unquantized()
            weight = plain_weight(weights)
            bias = (
                plain_weight([getattr(self, name) for name in self.bias_names])
                if self.use_bias
                else None
            )
            call = self.make_call(
                is_first_microbatch=is_first_microbatch,
                workspace="weight",
                weight=weights[0],
                fuse_wgrad_accumulation=self.fuse_wgrad_accumulation,
                save_original_input=self.save_original_input,
                operands=(inp, weight, bias),
            )
            fused = self.apply_bias and not self.gemm_bias_unfused_add
            out = linear(inp, weight, bias if fused else None, call)
            self.keep_workspace("weight", call, is_first_microbatch)
        finally:
            self.end_forward()
        if self.gemm_bias_unfused_add:
            assert bias is not None
            out = out + bias.to(call.activation_dtype)
        if self.return_bias:
            return out, None if bias is None else bias.to(call.activation_dtype)
        return out


def warn_unquantized() -> None:
    warnings.warn(
        "You are using quantized weights without quantized compute. "
        "Please make sure this is intentional.",
        stacklevel=3,
    )
