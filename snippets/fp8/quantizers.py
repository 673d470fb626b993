"""What each recipe does to one tensor: quantizers, and what they return.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_quantizers.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/quantization.py`` (recipe
             states) and ``pytorch/tensor/*`` (quantizers), Apache-2.0: names, arguments
             and semantics.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import copy
import enum
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .numerics import (
    compute_amax,
    compute_current_scale,
    quantize_block,
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_tensor,
)
from .quantized import Packed, Quantized
from .recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)

__all__ = [
    "DType",
    "Float8BlockQuantizer",
    "Float8CurrentScalingQuantizer",
    "Float8Quantizer",
    "IdentityQuantizer",
    "MXFP8Quantizer",
    "NVFP4Quantizer",
    "Quantizer",
]


class DType(enum.IntEnum):
    """Transformer Engine's tags of element types; quantizers take the last three."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10

    @classmethod
    def cast(cls, dtype: int) -> "DType":
        """Return the tag with this number.

        Raises:
            ValueError: there is none.
        """
        return cls(int(dtype))


TE_DType = {
    torch.uint8: DType.kByte,
    torch.float8_e4m3fn: DType.kFloat8E4M3,
    torch.float8_e5m2: DType.kFloat8E5M2,
    torch.int32: DType.kInt32,
    torch.float32: DType.kFloat32,
    torch.float16: DType.kFloat16,
    torch.bfloat16: DType.kBFloat16,
}
TE_DType_To_Torch = {tag: dtype for dtype, tag in TE_DType.items()}


def _tag(dtype: "DType | torch.dtype") -> DType:
    found = TE_DType.get(dtype) if isinstance(dtype, torch.dtype) else dtype
    if found not in (DType.kFloat8E4M3, DType.kFloat8E5M2):
        raise ValueError(
            f"fp8_dtype is {dtype!r}, it must be DType.kFloat8E4M3 or kFloat8E5M2."
        )
    return found


# ------------------------------------------------------------------------ quantizers


def no_attribute(thing: object, name: str, known: Sequence[str]) -> str:
    """Say that ``thing`` lacks a name; those in ``known`` are not emulated."""
    kind = type(thing).__name__
    if name in known:
        return f"{kind}.{name} is not emulated"
    return f"{kind!r} object has no attribute {name!r}"


_NOT_EMULATED = (
    "alloc_tensors",
    "create_metadata",
    "create_tensor_from_data",
    "get_columnwise_shape",
    "get_scale_shape",
    "inner_tensor_specs",
    "is_quantizable",
    "is_requantization_safe",
    "onnx_dequantize",
    "onnx_quantize",
    "quantize_impl",
    "storage_metadata",
    "supports_only_rowwise_all_gather",
)


class Quantizer:
    """Turns [rows, columns] tensors of high precision into :class:`Quantized` ones."""

    compatible_recipe: ClassVar[type[Recipe] | None] = None

    def __init__(self, *, rowwise: bool = True, columnwise: bool = True) -> None:
        """Choose the directions that a call makes by default."""
        self.rowwise_usage = rowwise
        self.columnwise_usage = columnwise

    def set_usage(
        self, *, rowwise: bool | None = None, columnwise: bool | None = None
    ) -> None:
        """Choose the directions that a call makes."""
        self.rowwise_usage = self.rowwise_usage if rowwise is None else rowwise
        self.columnwise_usage = (
            self.columnwise_usage if columnwise is None else columnwise
        )

    def to_quantized(
        self, x: Tensor, *, rowwise: bool = True, columnwise: bool = True
    ) -> Quantized:
        """Quantize ``x`` in the directions asked for.

        Args:
            x: [rows, columns], float32, bfloat16 or float16.
            rowwise: make the form that is summed over along the last axis.
            columnwise: make the form that is summed over along the first axis.

        Raises:
            NotImplementedError: a class of one's own, with Transformer Engine's
                ``quantize_impl``.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: quantizers with a quantize_impl of their own are "
            "not emulated; use or subclass one of those that are."
        )

    def quantize(
        self,
        tensor: Tensor,
        *,
        out: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return a quantized tensor, in the directions of :meth:`set_usage`.

        Its gradient is that of ``tensor``: rounding has none.

        Args:
            tensor: float32, bfloat16 or float16.
            out: a ``QuantizedTensor`` to write to, of the same shape.
            dtype: changes nothing, as in Transformer Engine.

        Returns:
            A ``QuantizedTensor`` of the shape of ``tensor``, or ``out``. It reads as
            the dtype of ``tensor``, or that which an ``IdentityQuantizer`` casts to.
        """
        if out is not None:
            return self.update_quantized(tensor, out)
        made: Tensor = _Quantize.apply(tensor, self)  # type: ignore[no-untyped-call]
        return made

    def __call__(self, tensor: Tensor) -> Tensor:
        """Do what :meth:`quantize` does."""
        return self.quantize(tensor)

    def update_quantized(
        self, src: Tensor, dst: Tensor, *, noop_flag: Tensor | None = None
    ) -> Tensor:
        """Write ``src``, quantized, to the ``QuantizedTensor`` ``dst``; return that.

        Args:
            src: plain or quantized.
            dst: of the same shape.
            noop_flag: float32, one element: where it is not 0, nothing is done.

        Raises:
            TypeError: ``dst`` is no ``QuantizedTensor``.
            ValueError: its shape is another.
        """
        from .tensor import QuantizedTensor  # noqa: PLC0415 - it needs this file

        if not isinstance(dst, QuantizedTensor):
            raise TypeError(
                f"dst must be a QuantizedTensor, it is a {type(dst).__name__}"
            )
        if noop_flag is not None and noop_flag.any():
            return dst
        return dst.rewrite(src, self)

    def make_empty(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        requires_grad: bool = False,
        pin_memory: bool = False,
    ) -> Tensor:
        """Return a ``QuantizedTensor`` to write to, in the directions of this object.

        Args:
            shape: of the tensor.
            dtype: that it reads as; float32, bfloat16 or float16.
            device: None is ``"cuda"``, which is the CPU where there is no GPU.
            requires_grad: of the tensor.
            pin_memory: changes nothing.

        Returns:
            Zeros; in Transformer Engine what the memory held.
        """
        from .tensor import QuantizedTensor  # noqa: PLC0415 - it needs this file

        where = torch.device("cuda" if device is None else device)
        if where.type == "cuda" and not torch.cuda.is_available():
            where = torch.device("cpu")
        zeros = torch.zeros(tuple(shape), dtype=dtype, device=where)
        made = self._without_effects().to_quantized(
            _as_matrix(zeros),
            rowwise=self.rowwise_usage,
            columnwise=self.columnwise_usage,
        )
        dtype = _dtype_of(made, dtype)
        return QuantizedTensor(made, dtype, self, requires_grad, shape=zeros.shape)

    def _without_effects(self) -> "Quantizer":
        """Return one of the same layout that records, reduces and draws nothing."""
        return self

    def multi_quantize(self, list_of_tensors: Sequence[Tensor]) -> list[Tensor]:
        """Quantize several tensors."""
        return [self.quantize(tensor) for tensor in list_of_tensors]

    def copy(self) -> "Quantizer":
        """Return another quantizer of the same settings and the same state."""
        return copy.copy(self)

    def get_usages(self) -> dict[str, bool]:
        """Return what :meth:`set_usage` has set."""
        return {"rowwise": self.rowwise_usage, "columnwise": self.columnwise_usage}

    def __getattr__(self, name: str) -> Any:
        """Say of Transformer Engine's other methods that they are not emulated.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(no_attribute(self, name, _NOT_EMULATED))

    def calibrate(self, x: Tensor) -> None:
        """Record what quantizing ``x`` would record, without quantizing it."""


def _as_matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1] if x.dim() else 1)


def _dtype_of(made: Quantized, dtype: torch.dtype) -> torch.dtype:
    """Return what a tensor of ``dtype`` reads as: itself, or an identity's cast."""
    packed = made.rowwise or made.columnwise
    if packed is None or packed.inv_scale is not None:
        return dtype
    return packed.codes.dtype


class _Quantize(torch.autograd.Function):
    """Quantizes, and hands the gradient through."""

    @staticmethod
    def forward(_: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        from .tensor import QuantizedTensor  # noqa: PLC0415 - it needs this file

        made = quantizer.to_quantized(
            _as_matrix(x.detach()),
            rowwise=quantizer.rowwise_usage,
            columnwise=quantizer.columnwise_usage,
        )
        dtype = _dtype_of(made, x.dtype)
        return QuantizedTensor(made, dtype, quantizer, shape=x.shape)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class IdentityQuantizer(Quantizer):
    """Leaves a tensor in high precision, for a slot of a ``CustomRecipe``.

    Args:
        dtype: what to cast a tensor to; None leaves it as it is.
        rowwise, columnwise: directions of a call.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype | None = None,
        rowwise: bool = True,
        columnwise: bool = True,
    ) -> None:
        """Choose the dtype."""
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.dtype = dtype

    def to_quantized(
        self, x: Tensor, *, rowwise: bool = True, columnwise: bool = True
    ) -> Quantized:
        """Return ``x`` itself, or its cast, in both directions."""
        packed = Packed(x if self.dtype is None else x.to(self.dtype))
        return Quantized(
            x.shape, packed if rowwise else None, packed if columnwise else None
        )


class _OneScale(Quantizer):
    dtype: DType

    def _pack(
        self, x: Tensor, scale: Tensor, rowwise: bool, columnwise: bool
    ) -> Quantized:
        codes, inv_scale = quantize_tensor(x, TE_DType_To_Torch[self.dtype], scale)
        packed = Packed(codes, inv_scale)
        return Quantized(
            x.shape, packed if rowwise else None, packed if columnwise else None
        )


class Float8Quantizer(_OneScale):
    """Delayed scaling: the scale is given, and amax is recorded for later scales.

    Args:
        scale: float32, 0-dimensional or one element: a view of the module's scales.
        amax: float32, the view of row 0 of the history; grows to max |x| (NaN ignored).
        fp8_dtype: element format.
        rowwise, columnwise: directions of a call.
    """

    compatible_recipe = DelayedScaling

    def __init__(
        self,
        scale: Tensor,
        amax: Tensor,
        fp8_dtype: DType | torch.dtype,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
    ) -> None:
        """Hold views of the module's state."""
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.scale = scale
        self.amax = amax
        self.dtype = _tag(fp8_dtype)

    def to_quantized(
        self, x: Tensor, *, rowwise: bool = True, columnwise: bool = True
    ) -> Quantized:
        """Record amax, then scale by the scale of earlier steps and round."""
        amax = compute_amax(x).reshape_as(self.amax)
        self.amax.copy_(torch.maximum(self.amax, amax))
        return self._pack(x, self.scale.reshape(()), rowwise, columnwise)

    def calibrate(self, x: Tensor) -> None:
        """Record the amax of ``x`` instead of what was recorded; NaN makes it NaN."""
        if x.numel():
            low, high = torch.aminmax(x)
            self.amax.copy_(torch.maximum(-low, high).reshape_as(self.amax))


class Float8CurrentScalingQuantizer(_OneScale):
    """Current scaling: the scale comes from the tensor itself."""

    compatible_recipe = Float8CurrentScaling

    def __init__(
        self,
        fp8_dtype: DType | torch.dtype,
        device: torch.device | str | None = None,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
        use_existing_amax: bool = False,
        with_amax_reduction: bool = False,
        amax_reduction_group: Any = None,
        force_pow_2_scales: bool = False,
        amax_epsilon: float = 0.0,
        scale: Tensor | None = None,
        amax: Tensor | None = None,
    ) -> None:
        """Choose the format and how the scale is made.

        ``device``, ``use_existing_amax``, ``scale`` and ``amax`` change nothing, here
        as in Transformer Engine, which warns of the last three.
        """
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        if use_existing_amax or scale is not None or amax is not None:
            warnings.warn(
                "Float8CurrentScalingQuantizer ignores `use_existing_amax`, `scale`, "
                "and `amax`; kept for backward compatibility and will be removed.",
                DeprecationWarning,
                stacklevel=2,
            )
        self.dtype = _tag(fp8_dtype)
        self.with_amax_reduction = with_amax_reduction
        self.amax_reduction_group = amax_reduction_group
        self.force_pow_2_scales = force_pow_2_scales
        self.amax_epsilon = amax_epsilon

    def _without_effects(self) -> Quantizer:
        alone = copy.copy(self)
        alone.with_amax_reduction = False
        return alone

    def to_quantized(
        self,
        x: Tensor,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
        amax: Tensor | None = None,
    ) -> Quantized:
        """Scale ``x`` so that its amax becomes the format's maximum, and round.

        A kernel that computed ``x`` may hand over the ``amax`` that it had before
        ``x`` was rounded to its dtype.
        """
        amax = compute_amax(x) if amax is None else amax.clone()
        if self.with_amax_reduction and torch.distributed.is_initialized():
            torch.distributed.all_reduce(
                amax,
                op=torch.distributed.ReduceOp.MAX,
                group=self.amax_reduction_group,
            )
        scale = compute_current_scale(
            amax,
            torch.finfo(TE_DType_To_Torch[self.dtype]).max,
            power_of_2=self.force_pow_2_scales,
            epsilon=self.amax_epsilon,
        )
        return self._pack(x, scale, rowwise, columnwise)


class Float8BlockQuantizer(Quantizer):
    """Scales for 1x128 blocks along the summed axis, or for 128x128 blocks."""

    compatible_recipe = Float8BlockScaling

    def __init__(
        self,
        fp8_dtype: DType | torch.dtype,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
        amax_epsilon: float = 0.0,
        force_pow_2_scales: bool = True,
        block_scaling_dim: int = 2,
    ) -> None:
        """Choose the format and the blocks."""
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.dtype = _tag(fp8_dtype)
        self.amax_epsilon = amax_epsilon
        self.force_pow_2_scales = force_pow_2_scales
        self.block_scaling_dim = block_scaling_dim

    def _pack(self, x: Tensor, block: tuple[int, int], transposed: bool) -> Packed:
        codes, inv_scale = quantize_block(
            x,
            TE_DType_To_Torch[self.dtype],
            block,
            power_of_2=self.force_pow_2_scales,
            epsilon=self.amax_epsilon,
        )
        return Packed(codes, inv_scale, transposed=transposed)

    def to_quantized(
        self, x: Tensor, *, rowwise: bool = True, columnwise: bool = True
    ) -> Quantized:
        """Quantize each direction from the high-precision values."""
        if self.block_scaling_dim == 2:
            return both_ways(
                self._pack(x, (128, 128), False), x.shape, rowwise, columnwise
            )
        return Quantized(
            x.shape,
            self._pack(x, (1, 128), False) if rowwise else None,
            self._pack(x.t(), (1, 128), True) if columnwise else None,
        )


def both_ways(
    packed: Packed, shape: torch.Size, rowwise: bool, columnwise: bool
) -> Quantized:
    """Use square blocks for both directions: transposing them is exact."""
    assert packed.inv_scale is not None
    transpose = packed._replace(
        codes=packed.codes.t(), inv_scale=packed.inv_scale.t(), transposed=True
    )
    return Quantized(
        shape, packed if rowwise else None, transpose if columnwise else None
    )


class MXFP8Quantizer(Quantizer):
    """E8M0 scales, one for 32 elements along the summed axis (or for 32x32)."""

    compatible_recipe = MXFP8BlockScaling

    def __init__(
        self,
        fp8_dtype: DType | torch.dtype,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
        with_2d_quantization: bool = False,
    ) -> None:
        """Choose the format."""
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.dtype = _tag(fp8_dtype)
        self.with_2d_quantization = with_2d_quantization

    def to_quantized(
        self, x: Tensor, *, rowwise: bool = True, columnwise: bool = True
    ) -> Quantized:
        """Quantize each direction from the high-precision values."""
        fmt = TE_DType_To_Torch[self.dtype]
        if self.with_2d_quantization:
            square = Packed(*quantize_mxfp8(x, fmt, axis=None))
            return both_ways(square, x.shape, rowwise, columnwise)

        def pack(values: Tensor, transposed: bool) -> Packed:
            codes, inv_scale = quantize_mxfp8(values, fmt)
            return Packed(codes, inv_scale, transposed=transposed)

        return Quantized(
            x.shape,
            pack(x, False) if rowwise else None,
            pack(x.t(), True) if columnwise else None,
        )


class NVFP4Quantizer(Quantizer):
    """E2M1 elements, E4M3 scales for 16 of them, one FP32 scale for the tensor."""

    compatible_recipe = NVFP4BlockScaling

    def __init__(
        self,
        fp4_dtype: DType = DType.kFloat4E2M1,
        rowwise: bool = True,
        columnwise: bool = True,
        with_amax_reduction: bool = False,
        amax_reduction_group: Any = None,
        with_rht: bool = False,
        with_post_rht_amax: bool = False,
        with_2d_quantization: bool = False,
        stochastic_rounding: bool = False,
        row_scaled_nvfp4: bool = False,
        nvfp4_use_4over6: bool = False,
        nvfp4_e4m3_max: int = 448,
        nvfp4_4over6_err_mode: str = "MAE",
        with_random_sign_mask: bool = True,
    ) -> None:
        """Choose what is done on the way.

        With ``with_rht`` amax is that of the transformed tensor, whatever
        ``with_post_rht_amax`` says: Transformer Engine has no kernel for the other.
        ``nvfp4_e4m3_max`` and ``nvfp4_4over6_err_mode`` belong to 4-over-6, and
        ``amax_reduction_group`` to the reduction; neither is emulated.

        Raises:
            ValueError: another format than E2M1.
            NotImplementedError: an option that is not emulated.
        """
        for name, value, default in (
            ("with_amax_reduction", with_amax_reduction, False),
            ("row_scaled_nvfp4", row_scaled_nvfp4, False),
            ("nvfp4_use_4over6", nvfp4_use_4over6, False),
        ):
            if value != default:
                raise NotImplementedError(
                    f"NVFP4Quantizer({name}={value}) is not emulated; leave it at "
                    f"{default}."
                )
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        if fp4_dtype != DType.kFloat4E2M1:
            raise ValueError(f"fp4_dtype is {fp4_dtype!r}, it must be kFloat4E2M1.")
        self.with_rht = with_rht
        self.with_post_rht_amax = with_post_rht_amax
        self.with_random_sign_mask = with_random_sign_mask
        self.with_2d_quantization = with_2d_quantization
        self.stochastic_rounding = stochastic_rounding
        self.dtype = DType(fp4_dtype)

    def _without_effects(self) -> Quantizer:
        plain = copy.copy(self)
        plain.with_rht = plain.stochastic_rounding = False
        return plain

    def to_quantized(
        self, x: Tensor, *, rowwise: bool = True, columnwise: bool = True
    ) -> Quantized:
        """Quantize each direction; only the columnwise one is Hadamard-transformed."""

        def pack(values: Tensor, transposed: bool) -> Packed:
            codes, inv_scale, amax = quantize_nvfp4(
                values,
                two_d=self.with_2d_quantization,
                hadamard=self.with_rht and transposed,
                stochastic=self.stochastic_rounding,
                random_signs=self.with_random_sign_mask,
            )
            return Packed(codes, inv_scale, amax, transposed)

        return Quantized(
            x.shape,
            pack(x, False) if rowwise else None,
            pack(x.t(), True) if columnwise else None,
        )


def check_shape(x: Tensor, quantizer: Quantizer) -> None:
    """Refuse a tensor that the kernels of the quantizer cannot take.

    Raises:
        ValueError: leading dimensions or the last one do not divide as they must.
    """
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    if rows % 8 != 0 or columns % 16 != 0:
        raise ValueError(
            "FP8 execution requires the product of all dimensions except the last to be"
            " divisible by 8 and the last dimension to be divisible by 16, but got "
            f"tensor with dims={list(x.shape)} (product of leading dims = {rows}, last "
            f"dim = {columns})"
        )
    if isinstance(quantizer, MXFP8Quantizer) and (rows % 32 or columns % 32):
        raise ValueError(
            "MXFP8 requires tensor dims that are divisible by 32 "
            f"(got shape={tuple(x.shape)})"
        )
    if isinstance(quantizer, NVFP4Quantizer) and (rows % 16 or columns % 16):
        raise ValueError(
            "NVFP4 requires tensor dims that are divisible by 16 "
            f"(got shape={tuple(x.shape)})"
        )
