"""Transformer Engine's ``LayerNorm`` and ``RMSNorm``, and where their results round.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/layernorm.py``,
    ``rmsnorm.py`` and ``pytorch/ops/basic`` (Apache-2.0): signatures, initialization,
    errors; ``pytorch/csrc/extensions/normalization.cpp``, ``activation.cpp`` and
    ``common/normalization``: what a fused kernel rounds, and which recipe has one.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import resolve_device
from .linear_function import Call
from .numerics import compute_amax
from .quantizers import Float8CurrentScalingQuantizer, Float8Quantizer

__all__ = ["LayerNorm", "RMSNorm"]


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: str,
    zero_centered_gamma: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return the normalized ``x`` before its last rounding, in float32.

    ``(x - mean) / sqrt(variance + eps) * gamma + bias``, or without mean and bias for
    ``"RMSNorm"``; ``gamma`` is the weight, plus one if it is centered at zero.

    Args:
        x: [..., *weight.shape].
        weight: scale.
        bias: shift, None for ``"RMSNorm"``.
        eps: added to the variance, or to the mean square.
        kind: ``"LayerNorm"`` or ``"RMSNorm"``.
        zero_centered_gamma: add one to the weight, in float32.
        dtype: that ``x``, ``weight`` and ``bias`` are rounded to first.

    Returns:
        float32, the shape of ``x``.
    """
    with torch.autocast(x.device.type, enabled=False):
        # Contiguous, as kernels take it: the order of sums follows the strides.
        values = x.to(dtype).float().contiguous()
        gamma = weight.to(dtype).float()
        if zero_centered_gamma:
            gamma = gamma + 1.0
        if kind == "RMSNorm":
            return F.rms_norm(values, weight.shape, gamma, eps)
        beta = None if bias is None else bias.to(dtype).float()
        return F.layer_norm(values, weight.shape, gamma, beta, eps)


def feed(values: Tensor, call: Call, dtype: torch.dtype, fused: bool) -> Tensor:
    """Return float32 results of a kernel as the product of ``call`` takes them.

    Transformer Engine's kernel of delayed scaling quantizes its own float32 results.
    That of current scaling takes their amax, but quantizes them after they were rounded
    to ``dtype``. The other recipes see rounded results only.

    Args:
        values: float32, of a norm or an activation function.
        call: of the product that follows; its ``input_amax`` may be set.
        dtype: of activations.
        fused: the module gives its quantizer to the kernel at all.

    Returns:
        float32 (not rounded) or ``dtype``.
    """
    fused = fused and call.backward_override is None and values.dtype != dtype
    if fused and isinstance(call.input_quantizer, Float8Quantizer):
        return values
    if fused and isinstance(call.input_quantizer, Float8CurrentScalingQuantizer):
        call.input_amax = compute_amax(values)
    return values.to(dtype)


def _margins(margin: int | dict[str, int]) -> dict[str, int]:
    each = margin if isinstance(margin, dict) else dict.fromkeys(_STAGES, margin)
    return {
        stage: int(os.getenv(f"NVTE_{name}_LAYERNORM_SM_MARGIN", each.get(stage, 0)))
        for stage, name in _STAGES.items()
    }


_STAGES = {"forward": "FWD", "backward": "BWD", "inference": "INF"}


class _Norm(nn.Module):
    """What both norms share: parameters, their checks and their initialization."""

    kind: str
    weight: nn.Parameter
    sequence_parallel: bool | None

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None,
        eps: float,
        sequence_parallel: bool | None,
        params_dtype: torch.dtype | None,
        zero_centered_gamma: bool,
        hidden_size: int | None,
        kwargs: dict[str, Any],
    ) -> None:
        name = type(self).__name__
        if normalized_shape is None:
            if hidden_size is None:
                raise RuntimeError(
                    "Neither `normalized_shape` nor `hidden_size` (deprecated) args "
                    "are provided"
                )
            warnings.warn(
                "`hidden_size` arg has been renamed to `normalized_shape` for "
                f"compatibility with `torch.nn.{name}`.",
                DeprecationWarning,
                stacklevel=3,
            )
            normalized_shape = hidden_size
        elif hidden_size is not None:
            raise RuntimeError(
                "Both `normalized_shape` and `hidden_size` (deprecated) args are "
                "provided"
            )
        if params_dtype is not None and "dtype" in kwargs:
            raise RuntimeError(
                "Both `dtype` and `params_dtype` (deprecated) kwargs are provided"
            )
        for key in kwargs:
            if key not in ("device", "dtype", "sm_margin"):
                raise TypeError(
                    f"{name}.__init__() got an unexpected keyword argument {key!r}; a "
                    "norm of Transformer Engine always has its parameters"
                )
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.sequence_parallel = sequence_parallel
        self._sm_margins = _margins(kwargs.get("sm_margin", 0))
        shape = (
            tuple(normalized_shape)
            if isinstance(normalized_shape, Iterable)
            else (normalized_shape,)
        )
        dtype = kwargs.get("dtype", params_dtype) or torch.get_default_dtype()
        device = kwargs.get("device") or "cuda"
        where = resolve_device(device)
        self.weight = nn.Parameter(torch.empty(shape, device=where, dtype=dtype))
        if self.kind == "LayerNorm":
            self.bias = nn.Parameter(torch.empty(shape, device=where, dtype=dtype))
        if where.type != "meta":
            self.reset_parameters()

    def reset_parameters(self, defer_init: bool | None = None) -> None:
        """Set the scale to one (zero if it is centered there) and the shift to zero."""
        if defer_init is not None:
            warnings.warn(
                "defer_init argument to reset_parameters function is deprecated. Set "
                'device to "meta" instead.',
                DeprecationWarning,
                stacklevel=2,
            )
            if defer_init:
                return
        for name, parameter in list(self.named_parameters(recurse=False)):
            values = parameter.detach()
            if values.device.type == "meta":
                values = torch.empty_like(values, device=resolve_device("cuda"))
            one = name == "weight" and not self.zero_centered_gamma
            values.fill_(1.0 if one else 0.0)
            made = nn.Parameter(values, parameter.requires_grad)
            if self.sequence_parallel is not None:
                marked: Any = made
                marked.sequence_parallel = self.sequence_parallel
            setattr(self, name, made)

    def forward(self, inp: Tensor) -> Tensor:
        """Normalize the last dimensions of ``inp``.

        Args:
            inp: [..., *normalized_shape]; rounded to the dtype of the parameters, or
                of ``torch.autocast`` inside it.

        Returns:
            That dtype, the shape of ``inp``.

        Raises:
            ValueError: the last dimensions are others.
            TypeError: ``inp`` is not of a floating dtype.
        """
        dims = tuple(self.weight.shape)
        if tuple(inp.shape[-len(dims) :]) != dims:
            raise ValueError(
                f"Input tensor (shape={tuple(inp.shape)}) and weight tensor "
                f"(shape={dims}) are not compatible"
            )
        if not inp.dtype.is_floating_point:
            raise TypeError(
                f"{type(self).__name__} got an input of {inp.dtype}, it must be of a "
                "floating dtype"
            )
        dtype = self.weight.dtype
        if torch.is_autocast_enabled(inp.device.type):
            dtype = torch.get_autocast_dtype(inp.device.type)
        return normalize(
            inp,
            self.weight,
            getattr(self, "bias", None),
            self.eps,
            kind=self.kind,
            zero_centered_gamma=self.zero_centered_gamma,
            dtype=dtype,
        ).to(dtype)

    def get_extra_state(self) -> Tensor:
        """Return no bytes: a norm has no quantizer of its own."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take what :meth:`get_extra_state` returned.

        Raises:
            RuntimeError: there are bytes, which a norm cannot use.
        """
        if isinstance(state, Tensor) and state.numel():
            raise RuntimeError(
                f"{type(self).__name__} has no quantization state, got "
                f"{state.numel()} bytes"
            )


class LayerNorm(_Norm):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, computed in float32.

    Args:
        normalized_shape: last dimensions of the input.
        eps: added to the variance.
        sequence_parallel: a mark on the parameters, which changes no number.
        params_dtype: deprecated name of ``dtype``.
        zero_centered_gamma: start the weight at zero and add one to it.
        hidden_size: deprecated name of ``normalized_shape``.
        **kwargs: ``device``, ``dtype`` and ``sm_margin`` (which changes no number).

    Raises:
        RuntimeError: ``normalized_shape`` or the dtype is missing or given twice.
        TypeError: another keyword: there is no ``elementwise_affine`` and no ``bias``.

    Example:
        >>> LayerNorm(2, eps=0.0)(torch.tensor([[1.0, 3.0]])).tolist()
        [[-1.0, 1.0]]
    """

    kind = "LayerNorm"

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the parameters."""
        super().__init__(
            normalized_shape,
            eps,
            sequence_parallel,
            params_dtype,
            zero_centered_gamma,
            hidden_size,
            kwargs,
        )

    def reset_layer_norm_parameters(self) -> None:
        """Do the same as `reset_parameters`; deprecated, as in Transformer Engine."""
        warnings.warn(
            "This method will be deprecated in an upcoming release. Update your code "
            "to use LayerNorm.reset_parameters() instead.",
            DeprecationWarning,
            stacklevel=2,
        )
        self.reset_parameters()


class RMSNorm(_Norm):
    """``x / sqrt(mean(x**2) + eps) * weight``, computed in float32.

    Args:
        normalized_shape: last dimensions of the input.
        eps: added to the mean square.
        sequence_parallel: a mark on the parameters, which changes no number.
        params_dtype: deprecated name of ``dtype``.
        zero_centered_gamma: start the weight at zero and add one to it.
        hidden_size: deprecated name of ``normalized_shape``.
        **kwargs: ``device``, ``dtype`` and ``sm_margin`` (which changes no number).

    Raises:
        RuntimeError: ``normalized_shape`` or the dtype is missing or given twice.
        TypeError: another keyword.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([[2.0, -2.0]])).tolist()
        [[1.0, -1.0]]
    """

    kind = "RMSNorm"

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the parameters."""
        super().__init__(
            normalized_shape,
            eps,
            sequence_parallel,
            params_dtype,
            zero_centered_gamma,
            hidden_size,
            kwargs,
        )

    def reset_rms_norm_parameters(self) -> None:
        """Do the same as `reset_parameters`; deprecated, as in Transformer Engine."""
        warnings.warn(
            "This method is deprecated and will be removed in an upcoming release. "
            "Update your code to use RMSNorm.reset_parameters() instead.",
            DeprecationWarning,
            stacklevel=2,
        )
        self.reset_parameters()
