"""Transformer Engine's ``LayerNormLinear``, on any device.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/layernorm_linear.py``
    (Apache-2.0): signature, defaults, initialization, order of results.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import InitMethod, TransformerEngineBaseModule, plain_weight, resolve_device
from .linear import normal_init, split_sizes, warn_unquantized, zero_init
from .linear_function import linear
from .norms import feed, normalize
from .parallel import refuse, refuse_parallel
from .state import FP8GlobalStateManager
from .tensor import QuantizedTensor

__all__ = ["LayerNormLinear"]


def add_norm_parameters(
    module: TransformerEngineBaseModule,
    features: int,
    *,
    normalization: str,
    zero_centered_gamma: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Register ``layer_norm_weight`` and ``layer_norm_bias`` (None for RMSNorm).

    Raises:
        ValueError: ``normalization`` is neither ``"LayerNorm"`` nor ``"RMSNorm"``.
    """
    if normalization not in {"LayerNorm", "RMSNorm"}:
        raise ValueError(
            f"Unsupported normalization type! It is {normalization!r}, it must be "
            "'LayerNorm' or 'RMSNorm'."
        )
    start = 0.0 if zero_centered_gamma else 1.0
    module.add_parameter(
        "layer_norm_weight",
        torch.empty(features, device=device, dtype=dtype),
        functools.partial(nn.init.constant_, val=start),
    )
    if normalization == "RMSNorm":
        module.register_parameter("layer_norm_bias", None)
        return
    module.add_parameter(
        "layer_norm_bias",
        torch.empty(features, device=device, dtype=dtype),
        zero_init,
    )


def reset_norm_parameters(module: TransformerEngineBaseModule) -> None:
    """Fill the norm's parameters anew, with Transformer Engine's warning."""
    warnings.warn(
        "This method will be deprecated in an upcoming release. Update your code to "
        f"use {type(module).__name__}.reset_parameters() instead.",
        DeprecationWarning,
        stacklevel=3,
    )
    for name in ("layer_norm_weight", "layer_norm_bias"):
        if (parameter := getattr(module, name)) is not None:
            module._init_methods[name][0](parameter)


class LayerNormLinear(TransformerEngineBaseModule):
    """A norm, then a :class:`Linear`; the norm's result is what is quantized.

    Under delayed scaling the kernel of the norm quantizes its float32 result; under
    current scaling it takes the amax of that, but quantizes what it has rounded to the
    dtype of activations; under other recipes only the rounded result counts. With FP32
    activations the three are one.

    Args:
        in_features, out_features: sizes.
        eps: added to the variance, or mean square.
        bias: add a bias.
        normalization: ``"LayerNorm"`` or ``"RMSNorm"``.
        init_method: fills the weight in place; default N(0, 0.023).
        return_bias: return the bias and leave adding it to the caller.
        params_dtype: dtype of the parameters, default ``torch.get_default_dtype()``.
        parallel_mode: ``None`` or ``"column"``, which are one with one rank.
        return_layernorm_output: return the norm's result, too; it is then rounded to
            the dtype of activations before it is quantized, whatever the recipe.
        return_layernorm_output_gathered: with one rank there is nothing to gather.
        parameters_split: names (and rows) of the parts that the weight is made of.
        zero_centered_gamma: start the norm's weight at zero and add one to it.
        fuse_wgrad_accumulation: add weight gradients to ``weight.main_grad``.
        device: where parameters live; ``"cuda"`` is the CPU where there is no GPU.
        name: of the module, given to a ``CustomRecipe``.
        tp_group, tp_size: only one rank is emulated.
        sequence_parallel, ub_*, symmetric_ar_type: with one rank they change nothing,
            as in Transformer Engine.
        get_rng_state_tracker, delay_wgrad_compute: only their defaults are emulated.

    Raises:
        NotImplementedError: an option that is not emulated, or ``"row"``.
        ValueError: sizes below 1, a split that does not add up, another normalization.
    """

    layer_norm_weight: Tensor
    layer_norm_bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Sequence[str] | Mapping[str, int] | None = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        """Make and fill the parameters.

        Raises:
            NotImplementedError: ``parallel_mode="row"``.
            RuntimeError: quantized parameters cannot be split.
            ValueError: sizes below 1, or no such ``parallel_mode``.
        """
        refuse_parallel("LayerNormLinear", tp_size, tp_group)
        refuse(
            "LayerNormLinear",
            get_rng_state_tracker=(get_rng_state_tracker, None),
            delay_wgrad_compute=(delay_wgrad_compute, False),
        )
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"LayerNormLinear({in_features=}, {out_features=}): both must be at "
                "least 1."
            )
        if parallel_mode == "row":
            raise NotImplementedError(
                "Normalization does not support tensor-parallel distribution."
            )
        if parallel_mode not in {None, "column"}:
            raise ValueError(f"parallel_mode {parallel_mode} not supported")
        sizes = split_sizes(parameters_split, out_features)
        if len(sizes) > 1 and FP8GlobalStateManager.with_fp8_parameters():
            raise RuntimeError(
                "Splitting QuantizedTensor into multiple params is not supported"
            )
        super().__init__(name)
        self.in_features = in_features
        self.out_features = out_features
        self.eps = eps
        self.normalization = normalization
        self.zero_centered_gamma = zero_centered_gamma
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = (
            return_layernorm_output and return_layernorm_output_gathered
        )
        self.parallel_mode = parallel_mode
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        where = resolve_device(device)
        add_norm_parameters(
            self,
            in_features,
            normalization=normalization,
            zero_centered_gamma=zero_centered_gamma,
            device=where,
            dtype=dtype,
        )
        self.weight_names = [f"{prefix}weight" for prefix in sizes]
        self.bias_names = [f"{prefix}bias" for prefix in sizes]
        for prefix, rows in sizes.items():
            self.add_parameter(
                f"{prefix}weight",
                torch.empty(rows, in_features, device=where, dtype=dtype),
                init_method or normal_init,
                fp8_meta_index=1,
            )
        for prefix, rows in sizes.items():
            name_of_bias = f"{prefix}bias"
            if bias:
                value = torch.empty(rows, device=where, dtype=dtype)
                self.add_parameter(name_of_bias, value, zero_init)
            else:
                setattr(self, name_of_bias, torch.empty(0, device=where, dtype=dtype))
        if self.primary_weights_in_fp8:
            self.init_fp8_metadata()
        self.reset_parameters(defer_init=where.type == "meta")

    def reset_layer_norm_parameters(self) -> None:
        """Fill the norm's parameters anew; deprecated, as in Transformer Engine."""
        reset_norm_parameters(self)

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Apply the norm and the layer.

        Args:
            inp: [..., in_features].
            is_first_microbatch: with several micro-batches a step: True quantizes the
                weight and keeps the codes, False uses those, None does neither.
            fp8_output: only False is emulated.
            fp8_grad: only False is emulated.

        Returns:
            [..., out_features]; with ``return_bias`` then the bias, with
            ``return_layernorm_output`` then the norm's result.

        Raises:
            ValueError: a shape that the layer or FP8 kernels cannot take.
        """
        refuse(
            "LayerNormLinear",
            fp8_output=(bool(fp8_output), False),
            fp8_grad=(bool(fp8_grad), False),
        )
        if inp.shape[-1] != self.in_features:
            raise ValueError(
                f"GEMM not possible: input of shape {list(inp.shape)}, "
                f"in_features {self.in_features}"
            )
        inp = self.prepare_forward(inp)
        assert self.activation_dtype is not None
        dtype = self.activation_dtype
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
            norm = (self.layer_norm_weight, self.layer_norm_bias)
            call = self.make_call(
                is_first_microbatch=is_first_microbatch,
                workspace="weight",
                weight=weights[0],
                fuse_wgrad_accumulation=self.fuse_wgrad_accumulation,
                operands=(inp, *norm, weight, bias),
            )
            values = normalize(
                inp,
                *norm,
                self.eps,
                kind=self.normalization,
                zero_centered_gamma=self.zero_centered_gamma,
                dtype=dtype,
            )
            normed = feed(values, call, dtype, not self.return_layernorm_output)
            out = linear(normed, weight, bias if self.apply_bias else None, call)
            self.keep_workspace("weight", call, is_first_microbatch)
        finally:
            self.end_forward()
        results: list[Tensor | None] = [out]
        if self.return_bias:
            results.append(None if bias is None else bias.to(dtype))
        if self.return_layernorm_output:
            results.append(normed)
        return out if len(results) == 1 else tuple(results)
