"""What is read from tensors: whether all is finite, and a sample of the values."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Sums of these overflow, or PyTorch has none.
_NARROW = {torch.float16} | {
    d for d in vars(torch).values()
    if isinstance(d, torch.dtype) and d.is_floating_point and d.itemsize == 1
}  # fmt: skip


def floats(things: object) -> list[Tensor]:
    """Return the dense float tensors among a module's arguments or outputs."""
    if isinstance(things, Tensor):
        is_read = things.is_floating_point() and things.layout is torch.strided
        return [things] if is_read else []
    if isinstance(things, dict):
        things = [*things.values()]
    if isinstance(things, (list, tuple)):
        return [tensor for thing in things for tensor in floats(thing)]
    return []


def total(tensor: Any) -> Tensor:  # noqa: ANN401
    """Return a sum that is finite if all values are: float16 would overflow."""
    values: Tensor = tensor.detach() if tensor.requires_grad else tensor
    is_narrow = values.dtype in _NARROW
    return values.sum(dtype=torch.float32) if is_narrow else values.sum()


def finite(numbers: list[Tensor]) -> list[bool]:
    """Ask of numbers whether they are finite: once for each device and dtype."""
    alike: dict[Any, list[int]] = {}
    for i, number in enumerate(numbers):
        alike.setdefault((number.device, number.dtype), []).append(i)
    flags = [False] * len(numbers)
    for at in alike.values():
        answers = torch.stack([numbers[i] for i in at]).isfinite().tolist()
        for i, flag in zip(at, answers, strict=True):
            flags[i] = flag
    return flags


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Tell whether every value of every tensor is finite."""
    return all(finite([total(tensor) for tensor in tensors]))


def or_none(number: float) -> float | None:
    """Return a finite number; None else: JSON has no infinity and no NaN."""
    return number if math.isfinite(number) else None


def sampled(tensor: Any, sample: int) -> Tensor:  # noqa: ANN401
    """Return all values of a tensor, or about ``sample`` of a larger one's, evenly.

    They are a view where the tensor's layout has one.
    """
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.to_dense()
    elif type(values) is not Tensor and hasattr(values, "_make_wrapper_subclass"):
        values = values.dequantize()
    flat: Tensor = values.reshape(-1)[:: max(1, values.numel() // sample)]
    return flat
