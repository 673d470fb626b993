"""The three matrix products of a linear layer, each on quantized operands.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_linear.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/linear.py`` and
             ``pytorch/module/base.py`` (Apache-2.0): what is quantized when, in which
             direction, what is saved, dtypes of results.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .quantized import Quantized, matmul
from .quantizers import (
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    IdentityQuantizer,
    Quantizer,
    check_shape,
)
from .state import FP8GlobalStateManager
from .tensor import QuantizedTensor

__all__ = ["Call", "linear"]


@dataclasses.dataclass
class Call:
    """How one call of a linear layer computes.

    Attributes:
        activation_dtype: dtype of the output and of high-precision products.
        input_quantizer, weight_quantizer, grad_output_quantizer: None computes that
            product in high precision.
        calibrate: quantizers that only record amax (``autocast(calibrating=True)``).
        workspace: a weight quantized by an earlier micro-batch, or None.
        update_workspace: quantize the weight again although there is a workspace.
        split: ``use_split_accumulator`` of the forward, dgrad and wgrad products.
        backward_override: None, ``"high_precision"`` or ``"dequantized"``.
        save_original_input: keep the input instead of its codes for the backward.
        main_grad: the weight whose ``main_grad`` takes the weight gradient, or None.
        overwrite_main_grad: write to it instead of adding.
        updates_gradients: this layer's backward is the region's last.
        input_amax: of the input before it was rounded, for current scaling; None takes
            that of the input.
        output_dtype: dtype that the rounded output is held in (and its gradient comes
            in), if not ``activation_dtype``.
    """

    activation_dtype: torch.dtype
    input_quantizer: Quantizer | None = None
    weight_quantizer: Quantizer | None = None
    grad_output_quantizer: Quantizer | None = None
    calibrate: tuple[Quantizer, Quantizer] | None = None
    workspace: Quantized | None = None
    update_workspace: bool = True
    split: tuple[bool, bool, bool] = (False, True, True)
    backward_override: str | None = None
    save_original_input: bool = False
    main_grad: Tensor | None = None
    overwrite_main_grad: bool = False
    updates_gradients: bool = False
    new_workspace: Quantized | None = None
    input_amax: Tensor | None = None
    output_dtype: torch.dtype | None = None


def linear(inp: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """Return ``inp @ weight.T + bias``.

    Args:
        inp: [..., in_features]; float32, bfloat16 or float16.
        weight: [out_features, in_features], plain or a :class:`QuantizedTensor`.
        bias: [out_features] or None.
        call: how to compute; ``call.new_workspace`` is set to the quantized weight.

    Returns:
        [..., out_features] of ``call.activation_dtype``.

    Raises:
        ValueError: shapes that the kernels of the recipe cannot take.
    """
    if inp.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"GEMM not possible: input of shape {list(inp.shape)}, weight of shape "
            f"{list(weight.shape)}"
        )
    if call.input_quantizer is not None:
        assert call.weight_quantizer is not None
        check_shape(inp, call.input_quantizer)
        check_shape(weight, call.weight_quantizer)
        if torch.is_grad_enabled() and call.backward_override is None:
            _check_summed(inp, weight, call)
    out: Tensor = _Linear.apply(inp, weight, bias, call)  # type: ignore[no-untyped-call]
    return out


def _check_summed(inp: Tensor, weight: Tensor, call: Call) -> None:
    """Refuse rows that the backward's products could not sum over.

    Transformer Engine's own check lets multiples of 8 pass; its documentation asks for
    multiples of 16, and so do the FP8 kernels, in the backward. A product with a tensor
    that a ``CustomRecipe`` leaves in high precision is not one of theirs.

    Raises:
        ValueError: they are no multiple of 16.
    """
    rows, outputs = inp[..., 0].numel(), weight.shape[0]
    over_rows = "weight gradient sums over the rows of the input"
    over_outputs = "input gradient sums over the rows of the weight"
    for count, needed, quantizer, product in (
        (rows, weight.requires_grad, call.input_quantizer, over_rows),
        (outputs, inp.requires_grad, call.weight_quantizer, over_outputs),
    ):
        operands = (quantizer, call.grad_output_quantizer)
        if any(isinstance(operand, IdentityQuantizer) for operand in operands):
            continue
        if needed and count % 16:
            raise ValueError(
                f"FP8 training requires both dimensions to be divisible by 16: the "
                f"{product}, {count} of them (input {list(inp.shape)}, weight "
                f"{list(weight.shape)}). Pad them."
            )


def _plain_product(
    a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Return a @ b.T (+ bias) of plain tensors cast to ``dtype``."""
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(a.to(dtype), b.to(dtype), bias)


def _quantized_weight(weight: Tensor, call: Call) -> Quantized:
    assert call.weight_quantizer is not None
    if isinstance(weight, QuantizedTensor):
        return weight.quantized
    if call.workspace is not None and not call.update_workspace:
        return call.workspace
    return call.weight_quantizer.to_quantized(weight.detach())


def _quantized_input(x: Tensor, columnwise: bool, call: Call) -> Quantized:
    quantizer = call.input_quantizer
    assert quantizer is not None
    if call.input_amax is not None:
        assert isinstance(quantizer, Float8CurrentScalingQuantizer)
        return quantizer.to_quantized(x, columnwise=columnwise, amax=call.input_amax)
    return quantizer.to_quantized(x, columnwise=columnwise)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inp: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> Tensor:
        x = inp.reshape(-1, inp.shape[-1])
        needs_x = weight.requires_grad
        dtype = call.activation_dtype
        with torch.autocast(inp.device.type, enabled=False):
            if call.input_quantizer is None:
                values = (
                    weight.dequantize()
                    if isinstance(weight, QuantizedTensor)
                    else weight
                )
                out = _plain_product(x, values, dtype, bias)
                if call.calibrate is not None:
                    call.calibrate[0].calibrate(x)
                    call.calibrate[1].calibrate(values)
                saved_x, saved_w = x if needs_x else None, None
                call.new_workspace = None
            else:
                original = call.backward_override == "high_precision"
                original = original or call.save_original_input
                if original and isinstance(call.input_quantizer, Float8Quantizer):
                    raise ValueError(
                        "DelayedScaling recipe is not supported with "
                        "save_original_input"
                    )
                only_rows = original or call.backward_override is not None
                quantized_x = _quantized_input(x, needs_x and not only_rows, call)
                quantized_w = _quantized_weight(weight, call)
                call.new_workspace = quantized_w
                # FP8 kernels add no FP32 bias: cuBLAS takes it as BF16.
                bias_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
                out = matmul(
                    quantized_x,
                    False,
                    quantized_w,
                    False,
                    use_split_accumulator=call.split[0],
                    out_dtype=dtype,
                    bias=None if bias is None else bias.to(bias_dtype),
                )
                saved_x, saved_w = x if original and needs_x else None, None
                # The backward sums over the other axis, or takes what the forward had.
                rows = call.backward_override == "dequantized"
                if call.backward_override != "high_precision":
                    saved_w = quantized_w.keep(rows, not rows)
                if needs_x and not original:
                    ctx.x = quantized_x.keep(rows, not rows)
        ctx.call = call
        ctx.shape = inp.shape
        ctx.bias = bias is not None and bias.requires_grad
        codes: list[Tensor | None] = []
        if "x" in ctx.__dict__:
            codes += ctx.x.tensors()
            ctx.x = ctx.x.without_tensors()
        else:
            ctx.x = None
        if saved_w is not None and inp.requires_grad:
            codes += saved_w.tensors()
            ctx.w = saved_w.without_tensors()
        else:
            ctx.w = None
        ctx.save_for_backward(saved_x, weight, *codes)
        out = out.to(call.output_dtype or dtype)
        return out.reshape(*inp.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        call: Call = ctx.call
        saved_x, weight, *codes = ctx.saved_tensors
        quantized_x = None
        if ctx.x is not None:
            quantized_x, codes = ctx.x.rebuild(codes[:6]), codes[6:]
        quantized_w = None if ctx.w is None else ctx.w.rebuild(codes)
        dy = grad_output.reshape(-1, grad_output.shape[-1])
        needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        with torch.autocast(dy.device.type, enabled=False):
            db = dy.sum(0, dtype=torch.float32).to(dy.dtype) if ctx.bias else None
            if call.input_quantizer is None or call.backward_override is not None:
                dx, dw = _plain_backward(
                    call,
                    dy,
                    weight,
                    saved_x if quantized_x is None else quantized_x.dequantize(),
                    quantized_w,
                    (needs_dx, needs_dw),
                )
            else:
                dx, dw = _quantized_backward(
                    call, dy, saved_x, quantized_x, quantized_w, (needs_dx, needs_dw)
                )
        if dx is not None:
            dx = dx.reshape(ctx.shape)
        if dw is not None and call.main_grad is not None:
            dw = _into_main_grad(call, weight, dw)
        if call.updates_gradients:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return dx, dw, db, None


def _grad_weight_dtype(call: Call) -> torch.dtype:
    if call.main_grad is not None:
        return call.main_grad.dtype
    return call.activation_dtype


def _plain_backward(
    call: Call,
    dy: Tensor,
    weight: Tensor,
    x: Tensor | None,
    quantized_w: Quantized | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    dtype = call.activation_dtype
    dx = dw = None
    if needs[0]:
        if call.backward_override == "dequantized" and quantized_w is not None:
            weight = quantized_w.dequantize(dtype)
        elif isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        dx = _plain_product(dy, weight.t(), dtype)
    if needs[1]:
        assert x is not None
        dw = _plain_product(dy.t(), x.t(), dtype).to(_grad_weight_dtype(call))
    return dx, dw


def _quantized_backward(
    call: Call,
    dy: Tensor,
    saved_x: Tensor | None,
    quantized_x: Quantized | None,
    quantized_w: Quantized | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    assert call.grad_output_quantizer is not None
    grad = call.grad_output_quantizer.to_quantized(
        dy, rowwise=needs[0], columnwise=needs[1]
    )
    dx = dw = None
    if needs[0]:
        assert quantized_w is not None
        dx = matmul(
            grad,
            False,
            quantized_w,
            True,
            use_split_accumulator=call.split[1],
            out_dtype=call.activation_dtype,
        )
    if needs[1]:
        if quantized_x is None:
            assert saved_x is not None
            assert call.input_quantizer is not None
            quantized_x = call.input_quantizer.to_quantized(saved_x, rowwise=False)
        dw = matmul(
            grad,
            True,
            quantized_x,
            True,
            use_split_accumulator=call.split[2],
            out_dtype=_grad_weight_dtype(call),
        )
    return dx, dw


def _into_main_grad(call: Call, weight: Tensor, dw: Tensor) -> Tensor | None:
    """Put a weight gradient into ``main_grad``; return what autograd then gets."""
    assert call.main_grad is not None
    if call.overwrite_main_grad:
        call.main_grad.copy_(dw)
    else:
        call.main_grad.add_(dw)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
        return torch.zeros_like(weight)
    return None
