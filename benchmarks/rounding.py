"""Record what background/rounding draws: sums of ones, bias, sums and variances.

Run from the top of the project; it writes ``benchmarks/rounding.json``, which the page
draws. Each of the four parts is computed by a block of the page as well, which compares
it with the record, and ``tests/test_rounding.py`` tests the functions::

    python -m benchmarks.rounding

SPDX-License-Identifier: Apache-2.0
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from snippets.number_formats import decode, encode
from snippets.stochastic_rounding import stochastic_round

RECORD = Path(__file__).with_suffix(".json")
F64 = torch.float64
COUNTED = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
MOST, COPIES = 4096, 16


def ones() -> dict[str, list[float]]:
    """Return what is reached by adding 1, 2, 4 ... ones, one at a time."""
    powers = [2**k for k in range(13)]
    found: dict[str, list[float]] = {"added": [float(n) for n in powers]}
    for name in COUNTED:
        dtype = getattr(torch, name)
        total, reached = torch.zeros((), dtype=dtype), []
        for n in range(1, MOST + 1):
            total = (total.float() + 1).to(dtype)
            if n in powers:
                reached.append(total.item())
        found[name] = reached
    return found


def bias() -> dict[str, list[float]]:
    """Return the mean error, in steps, of numbers with d bits more than are kept."""
    bits = range(1, 9)
    found: dict[str, list[float]] = {"bits": [float(d) for d in bits]}
    found |= {"to even": [], "away from zero": [], "toward zero": []}
    for d in bits:
        x = 2 + torch.arange(2 ** (d + 1), dtype=F64) / 2**d  # between 2 and 4
        found["to even"].append((x.round() - x).mean().item())
        found["away from zero"].append(((x + 0.5).floor() - x).mean().item())
        found["toward zero"].append((x.floor() - x).mean().item())
    return found


def one_by_one(x: Tensor) -> Tensor:
    """Return the sum over the first dimension, in order, rounded at every addition."""
    total = torch.zeros_like(x[0])
    for term in x:
        total = total + term
    return total


def pairwise(x: Tensor) -> Tensor:
    """Return the sum over the first dimension: of pairs, of their sums, and so on."""
    while len(x) > 1:
        x = torch.cat([x[0::2][: len(x) // 2] + x[1::2], x[len(x) // 2 * 2 :]])
    return x[0]


def kahan(x: Tensor) -> Tensor:
    """Return the sum over the first dimension; what is cut off is added later."""
    total = cut = torch.zeros_like(x[0])
    for term in x:
        wanted = term - cut
        larger = total + wanted
        cut, total = (larger - total) - wanted, larger
    return total


def stochastic(x: Tensor) -> Tensor:
    """Return the sum over the first dimension with each addition rounded at random."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros_like(x[0])
    for term in x:
        wide = total.float() + term.float()
        total = stochastic_round(wide, x.dtype, generator)
    return total


def in_float32(x: Tensor) -> Tensor:
    """Return the sum over the first dimension as torch does it: rounded once."""
    return x.sum(0)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "one by one": one_by_one,
    "stochastic": stochastic,
    "pairwise": pairwise,
    "Kahan": kahan,
    "torch.sum": in_float32,
}


def sums() -> dict[str, list[float]]:
    """Return the mean relative error of sums of BF16 numbers between 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(MOST, COPIES, generator=generator).bfloat16()
    numbers = [2**k for k in range(1, 13)]
    found: dict[str, list[float]] = {"terms": [float(n) for n in numbers]}
    for way, add in WAYS.items():
        found[way] = []
        for n in numbers:
            exact = x[:n].double().sum(0)
            error = (add(x[:n]).double() - exact).abs() / exact
            found[way].append(float(f"{error.mean().item():.4g}"))
    return found


def variances() -> dict[str, list[float]]:
    """Return the mean relative error of variances around larger and larger means."""
    noise = torch.randn(MOST, COPIES, generator=torch.Generator().manual_seed(0))
    means = [2.0**k for k in range(14)]
    found: dict[str, list[float]] = {"means": means}
    found |= {"E[x²] - E[x]²": [], "two passes": [], "torch.var": []}
    for mean in means:
        x = noise + mean
        exact = x.double().var(0, correction=0)
        got = {
            "E[x²] - E[x]²": x.square().mean(0) - x.mean(0).square(),
            "two passes": (x - x.mean(0)).square().mean(0),
            "torch.var": x.var(0, correction=0),
        }
        for way, variance in got.items():
            error = ((variance.double() - exact) / exact).abs().mean().item()
            found[way].append(float(f"{error:.4g}"))
    return found


def to_odd(x: Tensor, name: str) -> Tensor:
    """Return ``x`` toward zero, with the last bit set where that changed it."""
    codes = encode(x, name, "toward_zero")
    return decode(codes | (decode(codes, name) != x), name)


def main() -> None:
    """Write the record."""
    torch.set_num_threads(1)
    record = {"ones": ones(), "bias": bias(), "sums": sums(), "variances": variances()}
    RECORD.write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
