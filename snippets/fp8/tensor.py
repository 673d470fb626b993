"""A parameter that is stored in a low-precision format only.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_tensor.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/quantized_tensor.py`` and
             ``pytorch/tensor/float8_tensor.py`` (Apache-2.0): names and behaviour.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .quantized import Packed, Quantized
from .quantizers import Quantizer

__all__ = [
    "Float8BlockwiseQTensor",
    "Float8Tensor",
    "IdentityTensor",
    "MXFP8Tensor",
    "NVFP4Tensor",
    "QuantizedTensor",
]

_aten = torch.ops.aten


class QuantizedTensor(torch.Tensor):
    """A tensor that reads as float32, bfloat16 or float16 and is held in codes.

    An operation reads the dequantized values. An operation that writes, such as an
    optimizer's, quantizes the result again with the tensor's own quantizer (and with
    the scale that it has then); between two writes the codes do not change. So a
    training run that updates such a parameter in place loses every update below half
    a step of the format: keep FP32 main parameters (``guide/main_params``).

    Attributes:
        quantized: the codes and scales.
        quantizer: what rounds a write; None after loading from a file.
    """

    _cell: list[Quantized]
    quantizer: Quantizer | None

    @staticmethod
    def __new__(  # noqa: D102
        cls: type["QuantizedTensor"],
        quantized: Quantized,
        dtype: torch.dtype,
        quantizer: Quantizer | None,
        requires_grad: bool = False,
        cell: list[Quantized] | None = None,
        shape: torch.Size | None = None,
    ) -> "QuantizedTensor":
        packed = quantized.rowwise or quantized.columnwise
        assert packed is not None
        if cls is QuantizedTensor:
            cls = _class_of(packed)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            quantized.shape if shape is None else shape,
            dtype=dtype,
            device=packed.codes.device,
            requires_grad=requires_grad,
        )
        made._cell = [quantized] if cell is None else cell
        made.quantizer = quantizer
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``__new__`` has done it."""

    @property
    def quantized(self) -> Quantized:
        """The codes and scales, shared by detached aliases."""
        return self._cell[0]

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values as a plain tensor of ``dtype`` (default: its own)."""
        values = self.quantized.dequantize(self.dtype if dtype is None else dtype)
        return values.reshape(self.shape)

    def quantize_(self, values: Tensor) -> "QuantizedTensor":
        """Replace the values by ``values``, rounded by the tensor's quantizer.

        Args:
            values: tensor of the same shape, plain or quantized.

        Raises:
            ValueError: another shape.
            RuntimeError: the tensor was loaded from a file and has no quantizer yet.
        """
        self._check(values)
        if isinstance(values, QuantizedTensor) and _kind(values) == _kind(self):
            self._cell[0] = values.quantized
            return self
        if self.quantizer is None:
            raise RuntimeError(
                "this quantized tensor has no quantizer: use it as a module's parameter"
            )
        return self.rewrite(values, self.quantizer)

    def rewrite(self, values: Tensor, quantizer: Quantizer) -> "QuantizedTensor":
        """Replace the values by ``values``, rounded by ``quantizer``.

        Raises:
            ValueError: another shape.
        """
        self._check(values)
        if isinstance(values, QuantizedTensor):
            values = values.dequantize()
        self._cell[0] = quantizer.to_quantized(
            values.detach().reshape(self.quantized.shape)
        )
        return self

    def _check(self, values: Tensor) -> None:
        if values.shape != self.shape:
            raise ValueError(
                f"cannot write a tensor of shape {tuple(values.shape)} to a quantized "
                f"tensor of shape {tuple(self.shape)}"
            )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name the kind, the dtype and the shape."""
        packed = self.quantized.rowwise or self.quantized.columnwise
        assert packed is not None
        shape = tuple(self.shape)
        codes = packed.codes.dtype
        return f"{type(self).__name__}({codes=}, dtype={self.dtype}, {shape=})"

    def _alias(self, cell: list[Quantized], dtype: torch.dtype) -> "QuantizedTensor":
        return QuantizedTensor(
            cell[0], dtype, self.quantizer, cell=cell, shape=self.shape
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle codes and scales; the module that loads them has the quantizer."""
        value = self.quantized
        return (
            _rebuild,
            (
                tuple(value.shape),
                None if value.rowwise is None else tuple(value.rowwise),
                None if value.columnwise is None else tuple(value.columnwise),
                self.dtype,
                tuple(self.shape),
            ),
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Read dequantized values, write quantized ones."""
        kwargs = kwargs or {}
        if func is _aten.detach.default or func is _aten.alias.default:
            return args[0]._alias(args[0]._cell, args[0].dtype)
        if func is _aten.clone.default:
            return args[0]._alias([_copied(args[0].quantized)], args[0].dtype)
        if func is _aten._to_copy.default:
            moved = _copied(args[0].quantized, kwargs.get("device"))
            return args[0]._alias([moved], kwargs.get("dtype") or args[0].dtype)
        if func is _aten.copy_.default and isinstance(args[0], QuantizedTensor):
            return args[0].quantize_(args[1])
        return _on_values(func, args, kwargs)


class Float8Tensor(QuantizedTensor):
    """A tensor with one scale: of delayed or current scaling."""


class Float8BlockwiseQTensor(QuantizedTensor):
    """A tensor of ``Float8BlockScaling``."""


class MXFP8Tensor(QuantizedTensor):
    """A tensor of ``MXFP8BlockScaling``."""


class NVFP4Tensor(QuantizedTensor):
    """A tensor of ``NVFP4BlockScaling``."""


class IdentityTensor(QuantizedTensor):
    """A tensor that a ``CustomRecipe`` leaves in high precision."""


def _class_of(packed: Packed) -> type[QuantizedTensor]:
    """Return the kind that Transformer Engine's ``isinstance`` tells apart."""
    if packed.inv_scale is None:
        return IdentityTensor
    if packed.codes.dtype == torch.uint8:
        return NVFP4Tensor
    if packed.inv_scale.dtype == torch.float8_e8m0fnu:
        return MXFP8Tensor
    return Float8BlockwiseQTensor if packed.inv_scale.dim() else Float8Tensor


def _on_values(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run ``func`` on dequantized values, then quantize what it wrote."""
    written: list[tuple[QuantizedTensor, Tensor]] = []

    def read(x: Any) -> Any:
        if not isinstance(x, QuantizedTensor):
            return x
        values = x.dequantize()
        written.append((x, values))
        return values

    result = func(*tree_map(read, args), **tree_map(read, kwargs))
    schema = func._schema  # type: ignore[attr-defined]
    if any(
        a.alias_info is not None and a.alias_info.is_write for a in schema.arguments
    ):
        owners = {id(values): x for x, values in written}
        targets = [
            value
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        flat = [
            t
            for target in targets
            for t in (target if isinstance(target, (list, tuple)) else [target])
        ]
        for x, values in written:
            if any(x is target for target in flat):
                x.quantize_(values)
        return tree_map(
            lambda out: owners.get(id(out), out) if isinstance(out, Tensor) else out,
            result,
        )
    return result


def _kind(x: QuantizedTensor) -> tuple[Any, ...]:
    """Say what two tensors share if the codes of one may stand in the other."""
    return tuple(
        None
        if packed is None
        else (
            packed.codes.dtype,
            None if packed.inv_scale is None else packed.inv_scale.shape,
        )
        for packed in (x.quantized.rowwise, x.quantized.columnwise)
    )


def _copied(value: Quantized, device: Any = None) -> Quantized:
    def copy(packed: Packed | None) -> Packed | None:
        if packed is None:
            return None
        return packed._replace(**{
            name: tensor.to(device, copy=True)
            for name in ("codes", "inv_scale", "amax")
            if (tensor := getattr(packed, name)) is not None
        })

    row = copy(value.rowwise)
    same = value.rowwise is value.columnwise
    return Quantized(value.shape, row, row if same else copy(value.columnwise))


def _rebuild(
    shape: tuple[int, ...],
    rowwise: tuple[Any, ...] | None,
    columnwise: tuple[Any, ...] | None,
    dtype: torch.dtype,
    whole: tuple[int, ...] | None = None,  # None: written before there was one
) -> QuantizedTensor:
    row = None if rowwise is None else Packed(*rowwise)
    column = None if columnwise is None else Packed(*columnwise)
    full = None if whole is None else torch.Size(whole)
    return QuantizedTensor(Quantized(shape, row, column), dtype, None, shape=full)


# torch.load(weights_only=True), the default, may then read such a parameter.
torch.serialization.add_safe_globals([_rebuild])
