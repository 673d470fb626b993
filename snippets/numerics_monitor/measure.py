"""The measurements at an interval: what gradients lose, and what updates change."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tensors import or_none, sampled


def gradients(
    params: Iterable[tuple[str, Tensor]], scale: float, format: torch.dtype, sample: int
) -> dict[str, Any]:
    """Return the shares of gradients that are 0, and that ``format`` rounds to 0.

    Args:
        params: With their modules' names. Each has a gradient.
        scale: The gradients were divided by it, and are judged as they were before.
        format: A float dtype.
        sample: Values of each gradient that are read.
    """
    # Half of the smallest subnormal number is the last that rounds to zero.
    edge = torch.finfo(format).smallest_normal * torch.finfo(format).eps / 2
    zeros, lost, count, worst = 0.0, 0.0, 0, ("", 0.0)
    for module, p in params:
        grad = sampled(p.grad, sample)
        alive = grad != 0
        here = (alive & ((grad.double() * scale).abs() <= edge)).sum().item()
        living = int(alive.sum())
        share = p.numel() / len(grad)
        zeros += share * (len(grad) - living)
        lost += share * here
        count += p.numel()
        if living and here / living > worst[1]:
            worst = module, here / living
    return {
        "format": str(format).removeprefix("torch."),
        "zero": zeros / max(count, 1),
        "underflow": lost / max(count - zeros, 1),
        "worst": worst[0],
    }


def is_short(dtypes: Iterable[torch.dtype]) -> bool:
    """Tell whether one ends far above float32, as float16 does, and bfloat16 not."""
    end = torch.finfo(torch.float32).smallest_normal
    return any(torch.finfo(dtype).smallest_normal > end for dtype in dtypes)


def all_zero(params: Iterable[Tensor]) -> bool:
    """Tell whether each value of each gradient, of at least one, is 0."""
    values = [sampled(p.grad, p.numel()) for p in params]
    return bool(values) and not any(bool((v != 0).any()) for v in values)


class Before(NamedTuple):
    """Values of a parameter before its step, and which of them have a gradient."""

    param: Tensor
    values: Tensor
    alive: Tensor


def before(param: Tensor, sample: int) -> Before:
    """Copy a sample of a parameter with a gradient, to compare it after the step."""
    alive = sampled(param.grad, sample) != 0
    return Before(param, sampled(param, sample).clone(), alive)


def updates(weights: list[Before], sample: int) -> dict[str, float | None]:
    """Return the size of an update, and the share of those that changed nothing."""
    change = norm = 0.0
    lost, total = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}  # in 16 bits or not
    for p, values, alive in weights:
        after, share = sampled(p, sample), p.numel() / len(values)
        change += share * float((after.double() - values.double()).square().sum())
        norm += share * float(values.double().square().sum())
        is_half = p.dtype.itemsize <= 2
        lost[is_half] += share * int((alive & (after == values)).sum())
        total[is_half] += share * int(alive.sum())
    return {
        "update_ratio": or_none(math.sqrt(change / norm) if norm else math.inf),
        "half_ulp": max(torch.finfo(p.dtype).eps for p, *_ in weights) / 2,
        "lost": sum(lost.values()) / max(sum(total.values()), 1),
        "lost_in_half": lost[True] / max(total[True], 1),
    }
