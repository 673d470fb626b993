"""What is asked of tensors and of operations: finite or not, ranges, a wider dtype."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .report import TensorRange


def tensors_in(things: object) -> Iterator[Tensor]:
    """Yield the tensors with floating-point values that can be read."""
    if isinstance(things, Tensor) and things.is_nested:  # TransformerEncoder's in eval
        things = things.values()
    elif isinstance(things, Tensor) and things.layout is torch.sparse_coo:
        things = things._values()
    elif isinstance(things, Tensor) and things.layout is not torch.strided:
        things = things.values()
    if isinstance(things, Tensor):
        is_float = things.is_floating_point() or things.is_complex()
        # The second are forward mode's tangents: zeros that have no memory.
        has_values = not (things.is_meta or things._is_zerotensor())
        if is_float and has_values and things.numel():
            yield things
    elif isinstance(things, (dict, list, tuple)):
        for thing in things.values() if isinstance(things, dict) else things:
            yield from tensors_in(thing)


def written_by(func: Any, args: Any, kwargs: Any) -> Iterator[object]:  # noqa: ANN401
    """Yield the arguments that an operation writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


def key_of(tensor: Tensor) -> int:
    """Return the address of its storage, which its views share."""
    return int(tensor.untyped_storage()._cdata)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite."""
    values = _plain(tensor)
    total = values.sum(dtype=torch.float32 if values.dtype.itemsize < 4 else None)
    # A sum is the quick answer; it can overflow where no value is infinite.
    return math.isfinite(total.item()) or bool(values.isfinite().all())


def range_of(tensor: Tensor) -> TensorRange:
    """Return what a tensor holds."""
    values = _plain(tensor)
    finite = values[values.isfinite()]
    low, high = map(float, finite.aminmax()) if finite.numel() else (math.nan, math.nan)
    counts = [
        int(n.sum()) for n in (values.isnan(), values.isposinf(), values == -math.inf)
    ]
    return TensorRange(tensor.dtype, tuple(tensor.shape), low, high, *counts)


def redo(func: Any, args: Any, kwargs: Any) -> float | None:  # noqa: ANN401
    """Compute the same in a wider dtype; return the largest magnitude of the result."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    dtypes = [t.dtype for t in tensors_in((args, kwargs))]
    dtypes += [v for v in kwargs.values() if isinstance(v, torch.dtype)]
    wide = torch.float32 if any(d.itemsize < 4 for d in dtypes) else torch.float64

    def widen(x: Any) -> Any:  # noqa: ANN401
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.to(wide, copy=True)  # batch norm writes to what it is given
        return wide if isinstance(x, torch.dtype) and x.is_floating_point else x

    try:
        result = func(*tree_map(widen, args), **tree_map(widen, kwargs))
        return max((float(t.abs().max()) for t in tensors_in(result)), default=None)
    except (RuntimeError, TypeError, ValueError):
        return None  # an operation of other dtypes only


def _plain(tensor: Tensor) -> Tensor:  # float8 has few operations of its own
    values = tensor.detach()
    values = values.float() if values.dtype.itemsize == 1 else values
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
