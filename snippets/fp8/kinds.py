"""The kinds of quantized tensors, with the names that Transformer Engine's have.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Programs read codes and scales as ``_data``, ``_rowwise_scale_inv`` and so on. The names
are private there, and the layouts are those of kernels; they are here for such programs
only. A padded scale is a copy: what is written to it is lost.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_tensor.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/tensor/storage`` (Apache-2.0):
             names and layouts.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import torch
from torch import Tensor

from .quantized import Packed
from .quantizers import DType, TE_DType, both_ways
from .tensor import QuantizedTensor

__all__ = [
    "Float8BlockwiseQTensor",
    "Float8Tensor",
    "IdentityTensor",
    "MXFP8Tensor",
    "NVFP4Tensor",
]


def _element_type(x: QuantizedTensor) -> DType:
    packed = x.quantized.rowwise or x.quantized.columnwise
    assert packed is not None
    return TE_DType[packed.codes.dtype]


class Float8Tensor(QuantizedTensor):
    """A tensor with one scale: of delayed or current scaling.

    As on Hopper, the columnwise direction is a transpose of its own, ``_transpose``.
    """

    _fp8_dtype = property(_element_type)

    @property
    def _data(self) -> Tensor | None:
        row = self.quantized.rowwise
        return None if row is None else row.stored_codes(self.shape, False)

    @property
    def _transpose(self) -> Tensor | None:
        column = self.quantized.columnwise
        return None if column is None else column.stored_codes(self.shape, True)

    @property
    def _transpose_invalid(self) -> bool:
        return self.quantized.columnwise is None

    @property
    def _scale_inv(self) -> Tensor:
        packed = self.quantized.rowwise or self.quantized.columnwise
        assert packed is not None
        return packed.stored_scales(False)

    def _columnwise_of(self, row: Packed) -> Packed:
        return row


class _BlockTensor(QuantizedTensor):
    """What the kinds with a scale for each block share."""

    _with_gemm_swizzled_scales = False
    _transposes_columns = True

    @property
    def _rowwise_data(self) -> Tensor | None:
        row = self.quantized.rowwise
        return None if row is None else row.stored_codes(self.shape, False)

    @property
    def _rowwise_scale_inv(self) -> Tensor | None:
        row = self.quantized.rowwise
        return None if row is None else row.stored_scales(False)

    @property
    def _columnwise_data(self) -> Tensor | None:
        column, transposed = self.quantized.columnwise, self._transposes_columns
        return None if column is None else column.stored_codes(self.shape, transposed)

    @property
    def _columnwise_scale_inv(self) -> Tensor | None:
        column = self.quantized.columnwise
        return None if column is None else column.stored_scales(True)


class Float8BlockwiseQTensor(_BlockTensor):
    """A tensor of ``Float8BlockScaling``."""

    _takes_requires_grad = False
    _fp8_dtype = property(_element_type)

    @property
    def _is_2D_scaled(self) -> bool:  # noqa: N802 - as in Transformer Engine
        packed = self.quantized.rowwise or self.quantized.columnwise
        assert packed is not None
        assert packed.inv_scale is not None
        return packed.inv_scale.shape[0] != packed.codes.shape[0]

    def _columnwise_of(self, row: Packed) -> Packed | None:
        if not self._is_2D_scaled:
            return None
        return both_ways(row, self.quantized.shape, True, True).columnwise


class MXFP8Tensor(_BlockTensor):
    """A tensor of ``MXFP8BlockScaling``."""

    _fp8_dtype = property(_element_type)
    _transposes_columns = False


class NVFP4Tensor(_BlockTensor):
    """A tensor of ``NVFP4BlockScaling``."""

    _fp4_dtype = DType.kFloat4E2M1

    @property
    def _amax_rowwise(self) -> Tensor | None:
        row = self.quantized.rowwise
        return None if row is None or row.amax is None else row.amax.reshape(1)

    @property
    def _amax_columnwise(self) -> Tensor | None:
        column = self.quantized.columnwise
        return None if column is None or column.amax is None else column.amax.reshape(1)


class IdentityTensor(QuantizedTensor):
    """A tensor that a ``CustomRecipe`` leaves in high precision."""

    @property
    def _hp_data(self) -> Tensor:
        return self.quantized.dequantize(self.dtype).reshape(self.shape)

    def get_usages(self) -> dict[str, bool]:
        """Return True for both: one tensor serves both directions."""
        return {"rowwise": True, "columnwise": True}

    def update_usage(
        self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None
    ) -> None:
        """Do nothing: one tensor serves both directions."""


def class_of(packed: Packed) -> type[QuantizedTensor]:
    """Return the kind that Transformer Engine's ``isinstance`` tells apart."""
    if packed.inv_scale is None:
        return IdentityTensor
    if packed.codes.dtype == torch.uint8:
        return NVFP4Tensor
    if packed.inv_scale.dtype == torch.float8_e8m0fnu:
        return MXFP8Tensor
    return Float8BlockwiseQTensor if packed.inv_scale.dim() else Float8Tensor
