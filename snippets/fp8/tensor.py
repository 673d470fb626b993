"""A tensor, or a parameter, that is stored in a low-precision format only.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_tensor.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/quantized_tensor.py`` and
             ``pytorch/tensor/float8_tensor.py`` (Apache-2.0): names and behaviour.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .quantized import Packed, Quantized
from .quantizers import IdentityQuantizer, Quantizer, no_attribute

__all__ = ["QuantizedTensor"]

_aten = torch.ops.aten
_data: Any = torch.Tensor.data  # PyTorch's own, which knows no codes
_NOT_EMULATED = (
    "clear",
    "copy_from_storage",
    "fsdp_assign_gathered",
    "fsdp_buffer_fields",
    "fsdp_extract_buffers",
    "fsdp_post_all_gather",
    "fsdp_pre_all_gather",
    "get_data_tensors",
    "get_metadata",
    "make_like",
    "prepare_for_saving",
    "remove_caches",
    "restore_from_saved",
    "to_dtype",
)


class QuantizedTensor(torch.Tensor):
    """A tensor that reads as float32, bfloat16 or float16 and is held in codes.

    An operation reads the dequantized values, and gives a plain tensor; only a view
    that leaves the columns alone is quantized. An operation that writes, such as an
    optimizer's, quantizes the result again with the tensor's own quantizer (and with
    the scale that it has then); between two writes the codes do not change. So a
    training run that updates such a parameter in place loses every update below half
    a step of the format: keep FP32 main parameters (``guide/main_params``).

    Codes and scales can be read under Transformer Engine's names, such as
    ``_rowwise_data``, in its layouts; they cannot be assigned.

    Attributes:
        quantized: the codes and scales.
        quantizer: what rounds a write; None after loading from a file.
    """

    _cell: list[Quantized]
    _takes_requires_grad = True
    quantizer: Quantizer | None

    @staticmethod
    def __new__(  # noqa: D102
        cls: type["QuantizedTensor"],
        quantized: Quantized | None = None,
        dtype: torch.dtype = torch.float32,
        quantizer: Quantizer | None = None,
        requires_grad: bool = False,
        cell: list[Quantized] | None = None,
        shape: torch.Size | None = None,
        **_: Any,
    ) -> "QuantizedTensor":
        if not isinstance(quantized, Quantized):
            raise NotImplementedError(
                f"{cls.__name__}(...) of codes and scales is not emulated; let a "
                "quantizer make it."
            )
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
        """Return the values as a plain tensor of ``dtype`` (default: its own).

        Its gradient is that of this tensor.
        """
        dtype = self.dtype if dtype is None else dtype
        if not (self.requires_grad and torch.is_grad_enabled()):
            return self.quantized.dequantize(dtype).reshape(self.shape)
        values: Tensor = _Dequantize.apply(self, dtype)  # type: ignore[no-untyped-call]
        return values

    def quantize_(
        self, tensor: Tensor, *, noop_flag: Tensor | None = None
    ) -> "QuantizedTensor":
        """Replace the values by those of ``tensor``, rounded by this one's quantizer.

        Args:
            tensor: of the same shape, plain or quantized.
            noop_flag: float32, one element: where it is not 0, nothing is done.

        Raises:
            ValueError: another shape.
            RuntimeError: this tensor was loaded from a file and has no quantizer yet.
        """
        self._get_quantizer().update_quantized(tensor, self, noop_flag=noop_flag)
        return self

    def copy_quantized(self, values: Tensor) -> "QuantizedTensor":
        """Do what ``copy_`` does: take the codes of a tensor of the same kind.

        Raises:
            ValueError: another shape.
            RuntimeError: as :meth:`quantize_`, for what must be rounded.
        """
        self._check(values)
        if isinstance(values, QuantizedTensor) and _kind(values) == _kind(self):
            self._cell[0] = _copied(values.quantized, self.device)
            return self
        return self.quantize_(values)

    def rewrite(self, values: Tensor, quantizer: Quantizer) -> "QuantizedTensor":
        """Replace the values by ``values``, rounded by ``quantizer``.

        The directions stay those that there are.

        Raises:
            ValueError: another shape.
        """
        self._check(values)
        if isinstance(values, QuantizedTensor):
            values = values.dequantize()
        before = self.quantized
        made = quantizer.to_quantized(
            values.detach().reshape(before.shape),
            rowwise=before.rowwise is not None,
            columnwise=before.columnwise is not None,
        )
        identity = isinstance(quantizer, IdentityQuantizer)  # it returns its argument
        self._cell[0] = _copied(made) if identity else made
        return self

    def _get_quantizer(self) -> Quantizer:
        if self.quantizer is None:
            raise RuntimeError(
                "this quantized tensor has no quantizer: use it as a module's parameter"
            )
        return self.quantizer

    def update_quantizer(self, quantizer: Quantizer) -> None:
        """Let ``quantizer`` round later writes; warn if it is another.

        Raises:
            RuntimeError: there is none to replace.
        """
        if self.quantizer is None:
            raise RuntimeError("To be updated, quantizer must be set")
        if self.quantizer is not quantizer:
            warnings.warn(
                "Quantizer is being updated, this may affect model behavior",
                stacklevel=2,
            )
            self.quantizer = quantizer

    def get_usages(self) -> dict[str, bool]:
        """Return which directions there are, ``"rowwise"`` and ``"columnwise"``."""
        return {
            "rowwise": self.quantized.rowwise is not None,
            "columnwise": self.quantized.columnwise is not None,
        }

    def update_usage(
        self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None
    ) -> None:
        """Keep or drop codes, for this tensor and its detached aliases.

        The columnwise direction is made of the rowwise one where that is exact: with
        one scale, and with square FP8 blocks.

        Args:
            rowwise_usage: keep what is summed over along the last axis; None leaves it.
            columnwise_usage: keep what is summed over along the first axis.

        Raises:
            RuntimeError: a direction that there is not, or neither.
        """
        value = self.quantized
        row, column = value.rowwise, value.columnwise
        if column is None and columnwise_usage and rowwise_usage is not False:
            column = None if row is None else self._columnwise_of(row)
        for packed, wanted, name in (
            (row, rowwise_usage, "row"),
            (column, columnwise_usage, "column"),
        ):
            if wanted and packed is None:
                raise RuntimeError(
                    f"Requested {name}-wise usage, but {type(self).__name__} is "
                    f"missing {name}-scaled data"
                )
        row = None if rowwise_usage is False else row
        column = None if columnwise_usage is False else column
        if row is None and column is None:
            raise RuntimeError("Must retain some data either columnwise or rowwise")
        self._cell[0] = Quantized(value.shape, row, column)

    def _columnwise_of(self, row: Packed) -> Packed | None:
        """Return the same numbers for the other direction, None if it has others."""
        return None

    def __getattr__(self, name: str) -> Any:
        """Say of Transformer Engine's other methods that they are not emulated.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(no_attribute(self, name, _NOT_EMULATED))

    @property
    def _quantizer(self) -> Quantizer | None:
        return self.quantizer

    @property
    def _dtype(self) -> torch.dtype:
        return self.dtype

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

    @property
    def data(self) -> Tensor:
        """This tensor without its gradient; what is set is quantized.

        A tensor of the same kind is taken as it is, with its quantizer; another is
        rounded by this one's, which then asks for gradients if that tensor does, here
        as in Transformer Engine: setting a plain tensor freezes a parameter (but not
        one in blocks of 128).

        Setting it raises a RuntimeError where there is no quantizer.
        """
        return _data.__get__(self)  # type: ignore[no-any-return]

    @data.setter
    def data(self, values: Tensor) -> None:
        with torch.no_grad():
            if _is_of_class_of(self, values):
                self._take(values)
                return
            self._take(self._get_quantizer().quantize(values.to(self.device)))
            if self._takes_requires_grad:
                self.requires_grad_(values.requires_grad)

    def _take(self, other: Any) -> None:
        _data.__set__(self, other.detach())
        self._cell = other._cell
        self.quantizer = other.quantizer or self.quantizer

    def _alias(
        self,
        cell: list[Quantized],
        dtype: torch.dtype,
        shape: torch.Size | None = None,
    ) -> "QuantizedTensor":
        shape = self.shape if shape is None else shape
        return type(self)(cell[0], dtype, self.quantizer, cell=cell, shape=shape)

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
        if func is _aten.view.default and isinstance(args[0], QuantizedTensor):
            shape = torch.empty(args[0].shape, device="meta").view(args[1]).shape
            if shape[-1:] == args[0].shape[-1:]:  # the codes are [rows, columns]
                return args[0]._alias(args[0]._cell, args[0].dtype, shape)
        if func is _aten.copy_.default and isinstance(args[0], QuantizedTensor):
            return args[0].copy_quantized(args[1])
        return _on_values(func, args, kwargs)


class _Dequantize(torch.autograd.Function):
    """Hands the gradient of the values through."""

    @staticmethod
    def forward(_: Any, x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        return x.quantized.dequantize(dtype).reshape(x.shape)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _class_of(packed: Packed) -> type[QuantizedTensor]:
    from .kinds import class_of  # noqa: PLC0415 - it needs this file

    return class_of(packed)


def _is_of_class_of(x: QuantizedTensor, other: Tensor) -> bool:
    packed = x.quantized.rowwise or x.quantized.columnwise
    assert packed is not None
    return isinstance(other, _class_of(packed))


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
    plain = (row or column or Packed(torch.empty(0))).inv_scale is None
    quantizer = IdentityQuantizer() if plain else None
    made = Quantized(shape, row, column)
    return QuantizedTensor(made, dtype, quantizer, shape=full)


# torch.load(weights_only=True), the default, may then read such a parameter.
torch.serialization.add_safe_globals([_rebuild])
