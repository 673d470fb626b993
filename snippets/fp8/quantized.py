"""A matrix in low precision, and the product of two.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_quantizers.py, tests/test_fp8_linear.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/quantized_tensor.py``
             (Apache-2.0): rowwise and columnwise forms.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .gemm import Operand, decode_operand, scaled_matmul
from .numerics import dequantize
from .state import FP8GlobalStateManager

__all__ = ["Packed", "Quantized", "matmul"]


class Packed(NamedTuple):
    """One set of codes with its scales.

    Attributes:
        codes: float8, or uint8 with two codes a byte; the values themselves where a
            ``CustomRecipe`` leaves a tensor in high precision.
        inv_scale: what dequantized values are multiplied by; None for plain values.
        amax: of the whole tensor, for NVFP4.
        transposed: the codes are those of the transpose, quantized on its own.
    """

    codes: Tensor
    inv_scale: Tensor | None = None
    amax: Tensor | None = None
    transposed: bool = False

    def operand(self, columnwise: bool, fold: bool) -> Operand:
        """Return [outer, summed over] values for ``scaled_matmul``.

        Args:
            columnwise: sum along the first axis of what was quantized.
            fold: put powers of two into the values, see ``decode_operand``.
        """
        if self.inv_scale is None:
            found = Operand(self.codes.float(), None, None, self.codes.dtype)
        else:
            found = decode_operand(self.codes, self.inv_scale, self.amax, fold=fold)
        return found if self.transposed == columnwise else found.T

    def full(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized values, every scale applied."""
        if self.inv_scale is None:
            values = self.codes.to(dtype)
        else:
            values = dequantize(self.codes, self.inv_scale, self.amax, dtype=dtype)
        return values.t() if self.transposed else values

    def stored_codes(self, shape: Sequence[int], transposed: bool) -> Tensor:
        """Return the codes as Transformer Engine's tensors keep them.

        Args:
            shape: of the whole tensor, [..., columns].
            transposed: keep [columns, ...], not [..., columns].

        Returns:
            uint8, contiguous, two codes a byte for NVFP4; it shares the memory of the
            codes where they lie so.
        """
        codes = self.codes if self.transposed == transposed else self.codes.t()
        codes = codes.contiguous().view(torch.uint8)
        kept = [*shape[-1:], *shape[:-1]] if transposed else list(shape)
        if kept and self.codes.dtype == torch.uint8:
            kept[-1] //= 2
        return codes.reshape(kept)

    def stored_scales(self, columnwise: bool) -> Tensor:
        """Return ``inv_scale`` as Transformer Engine's tensors keep it.

        That is before it is swizzled for a kernel: E8M0 and E4M3 as uint8, and padded
        with zeros, as kernels take them.

        Returns:
            float32 [1] for one scale; uint8 [rows, blocks], padded to multiples of
            [128, 4], and [blocks, columns] of [4, 128] for MXFP8, [columns, blocks] of
            [128, 4] for NVFP4; float32 for blocks of 128: [blocks, rows] or
            [blocks, columns] where they are 1 x 128, [blocks, blocks] (transposed where
            ``columnwise``) where they are square, the last padded to a multiple of 4.
        """
        scale = self.inv_scale
        assert scale is not None
        if not scale.dim():
            return scale.reshape(1)
        if scale.dtype == torch.float32:
            if scale.shape[0] == self.codes.shape[0]:  # 1 x 128
                scale = scale.t()
            return _padded(scale, 1, 4)
        if scale.dtype == torch.float8_e4m3fn:
            return _padded(scale.view(torch.uint8), 128, 4)
        scale = scale.view(torch.uint8)
        if scale.shape[0] != self.codes.shape[0]:  # of 32 x 32: each stands 32 times
            scale = scale.repeat_interleave(32, 0)
        scale = scale.t() if self.transposed else scale
        return _padded(scale, 4, 128) if columnwise else _padded(scale, 128, 4)


def _padded(scale: Tensor, rows: int, columns: int) -> Tensor:
    missing = (0, -scale.shape[1] % columns, 0, -scale.shape[0] % rows)
    return pad(scale, missing).contiguous()


class Quantized:
    """A [rows, columns] tensor in low precision, in the directions asked for.

    ``rowwise`` is summed over along the last axis, ``columnwise`` along the first.
    Formats with one scale a tensor keep one set of codes for both.
    """

    __slots__ = ("columnwise", "rowwise", "shape")

    def __init__(
        self,
        shape: Sequence[int],
        rowwise: Packed | None,
        columnwise: Packed | None,
    ) -> None:
        """Hold what a quantizer made."""
        self.shape = torch.Size(shape)
        self.rowwise = rowwise
        self.columnwise = columnwise

    def operand(self, columnwise: bool, *, fold: bool = True) -> Operand:
        """Return [outer, summed over] values along the direction asked for.

        Raises:
            RuntimeError: the tensor was not quantized in that direction.
        """
        packed = self.columnwise if columnwise else self.rowwise
        if packed is None:
            raise RuntimeError(
                f"the {'columnwise' if columnwise else 'rowwise'} form of a tensor of "
                f"shape {tuple(self.shape)} was not made"
            )
        return packed.operand(columnwise, fold)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values as ``dtype``, from the rowwise form if there is one."""
        packed = self.rowwise or self.columnwise
        assert packed is not None
        return packed.full(dtype)

    def keep(self, rowwise: bool, columnwise: bool) -> "Quantized":
        """Return the same tensor with only the directions still needed."""
        return Quantized(
            self.shape,
            self.rowwise if rowwise else None,
            self.columnwise if columnwise else None,
        )

    def tensors(self) -> list[Tensor | None]:
        """Return what autograd must save, in the order :meth:`rebuild` takes."""
        saved: list[Tensor | None] = []
        for packed in (self.rowwise, self.columnwise):
            if packed is None:
                saved += [None, None, None]
            else:
                saved += [packed.codes, packed.inv_scale, packed.amax]
        return saved

    def without_tensors(self) -> "Quantized":
        """Return the same tensor with every tensor left out (see :meth:`rebuild`)."""
        none: Any = None
        return Quantized(
            self.shape,
            self.rowwise
            and self.rowwise._replace(codes=none, inv_scale=None, amax=None),
            self.columnwise
            and self.columnwise._replace(codes=none, inv_scale=None, amax=None),
        )

    def rebuild(self, saved: Sequence[Tensor | None]) -> "Quantized":
        """Return this tensor with the tensors of :meth:`tensors` put back."""
        parts: list[Packed | None] = []
        for packed, (codes, inv_scale, amax) in zip(
            (self.rowwise, self.columnwise), (saved[:3], saved[3:]), strict=True
        ):
            if packed is None or codes is None:
                parts.append(None)
            else:
                parts.append(
                    packed._replace(codes=codes, inv_scale=inv_scale, amax=amax)
                )
        return Quantized(self.shape, parts[0], parts[1])


def matmul(
    a: Quantized,
    a_columnwise: bool,
    b: Quantized,
    b_columnwise: bool,
    *,
    use_split_accumulator: bool,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``a @ b.T`` over the chosen directions, as the recipe's kernel sums it.

    Args:
        a: quantized tensor.
        a_columnwise: sum along its first axis instead of the last.
        b: quantized tensor.
        b_columnwise: sum along its first axis instead of the last.
        use_split_accumulator: see :class:`MMParams`; matters for ``"hopper"`` only.
        out_dtype: dtype of the result, to which the FP32 sum is rounded once.
        bias: [outer of b], added before that rounding.

    Returns:
        [outer of a, outer of b] tensor.
    """
    accumulator = FP8GlobalStateManager.quantization_state.accumulator
    fold = accumulator == "fp32"  # Hopper applies the scales of blocks to its sums
    left = a.operand(a_columnwise, fold=fold)
    right = b.operand(b_columnwise, fold=fold)
    return scaled_matmul(
        left,
        right,
        accumulator=accumulator,
        use_split_accumulator=use_split_accumulator,
        out_dtype=out_dtype,
        bias=bias,
    )
