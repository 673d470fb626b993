"""Laws of ``source/background/rounding.md``, each in exact numbers where there are any.

Oracles: fractions, searches through all codes of a format, and PyTorch's own functions.

SPDX-License-Identifier: Apache-2.0
"""

import json
import math
from fractions import Fraction
from operator import add, mul, sub, truediv

import pytest
import torch
from torch import Tensor

from benchmarks import rounding
from benchmarks.rounding import kahan, one_by_one, pairwise, stochastic, to_odd
from snippets.number_formats import (
    FORMATS,
    finfo,
    neighbours,
    round_to,
    table,
    ulp,
)

F64 = torch.float64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = ["float8_e4m3fn", "float8_e5m2", "float6_e3m2fn", "float6_e2m3fn"]


def finite(name: str) -> Tensor:
    """Return all finite values of a format."""
    values: Tensor = table(name)
    numbers: Tensor = values[values.isfinite()]
    return numbers


def unit(name: str) -> float:
    """Return u, the largest relative error of one rounding."""
    return 2.0 ** -(FORMATS[name].mantissa_bits + 1)


def binade(bits: int) -> Tensor:
    """Return the numbers from 1 to 2 that have so many bits of mantissa."""
    numbers: Tensor = 1 + torch.arange(2**bits, dtype=F64) / 2**bits
    return numbers


# One rounding.


@pytest.mark.parametrize("name", DTYPES)
def test_each_operation_rounds_once(name: str) -> None:
    """What torch computes in float32 and rounds is the exact result, rounded once."""
    generator = torch.Generator().manual_seed(0)
    a, b = (1 + torch.rand(2, 200_000, generator=generator)).to(DTYPES[name])
    b *= torch.exp2(torch.randint(-3, 4, b.shape, generator=generator)).to(b.dtype)
    u = Fraction(unit(name))
    for operation in (add, sub, mul, truediv):
        got = operation(a, b)
        assert torch.equal(
            got.double(), round_to(operation(a.double(), b.double()), name)
        )
        for x, y, z in zip(a[:300].tolist(), b.tolist(), got.tolist(), strict=False):
            wanted = operation(Fraction(x), Fraction(y))
            assert abs(Fraction(z) - wanted) <= u * abs(wanted)
    values = finite(name)
    values = values[values >= 0]
    assert torch.equal(
        values.to(a.dtype).sqrt().double(), round_to(values.sqrt(), name)
    )


# Little and much.


@pytest.mark.parametrize("name", [*SHORT, "bfloat16"])
def test_less_than_half_a_step_is_absorbed(name: str) -> None:
    """And more is not; downward from a power of two the step is the smaller one."""
    values = finite(name)
    x = values[(values > 0) & (values < finfo(name).max)]
    for direction in (1.0, -1.0):
        below, above = neighbours(x, name)
        step = (above - x) if direction > 0 else (x - below)
        for part, moves in ((0.499, False), (0.501, True)):
            moved = round_to(x + direction * part * step, name)
            assert bool((moved == x).all()) != moves
            assert torch.equal(moved, (above if direction > 0 else below)) == moves
        # What the page says: half of ulp(x) suffices upward.
        if direction > 0:
            assert torch.equal(step, ulp(x, name))
        else:
            powers = torch.frexp(x)[0] == 0.5
            normal = x > finfo(name).smallest_normal
            half = powers & normal
            assert torch.equal(step[half], ulp(x, name)[half] / 2)
            assert torch.equal(step[~half], ulp(x, name)[~half])


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].has_zero])
def test_a_sum_of_ones_ends_there(name: str) -> None:
    """At 2**(p + 1), unless the largest number comes first, as in E2M3."""
    end = 2.0 ** (FORMATS[name].mantissa_bits + 1)
    before = torch.arange(max(0.0, end - 5000), end, dtype=F64)
    if finfo(name).max < end:
        assert name == "float6_e2m3fn"
        before = before[before < finfo(name).max - 1]
    else:
        # float64 holds the sum of float64 alone as a tie to even.
        assert round_to(torch.tensor(end, dtype=F64) + 1, name).item() == end
    assert torch.equal(round_to(before + 1, name), before + 1)


def test_torch_sums_in_float32_and_pairwise() -> None:
    """BF16 and FP16 sums are those of float32, rounded; float32's pass 2**24."""
    generator = torch.Generator().manual_seed(0)
    for name, dtype in DTYPES.items():
        x = torch.rand(5000, generator=generator).to(dtype)
        exact = sum(map(Fraction, x.tolist()), Fraction())
        assert abs(Fraction(x.sum().item()) - exact) <= Fraction(unit(name)) * exact * 2
    assert torch.ones(2**25).sum().item() == 2.0**25


# The order of additions.


def gamma(k: int, name: str) -> float:
    """Return the bound on the relative error of k roundings in a row."""
    return k * unit(name) / (1 - k * unit(name))


@pytest.mark.parametrize(("name", "n"), [("bfloat16", 128), ("float16", 1024)])
def test_sums_keep_their_bounds(name: str, n: int) -> None:
    """Of numbers of one sign and of both, and of the worst that is known."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 400, generator=generator).to(DTYPES[name])
    x[:, :200] = x[:, :200].abs()
    x[:, 0] = 1.0 + 0.99 * 2 * unit(name)
    for way, roundings in ((one_by_one, n - 1), (pairwise, (n - 1).bit_length())):
        error = (way(x).double() - x.double().sum(0)).abs()
        bound = gamma(roundings, name) * x.double().abs().sum(0)
        assert bool((error <= bound).all())
    odd = x[: n - 27]
    error = (pairwise(odd).double() - odd.double().sum(0)).abs()
    bound = gamma((n - 28).bit_length(), name) * odd.double().abs().sum(0)
    assert bool((error <= bound).all())


def test_kahans_sum_does_not_depend_on_n() -> None:
    """2u, and no more than half as much again where n * u is below 1/16."""
    generator = torch.Generator().manual_seed(0)
    for name, n in (("float16", 128), ("float32", 4096)):
        x = torch.randn(n, 200, generator=generator).to(getattr(torch, name))
        x[:, :100] = x[:, :100].abs()
        assert n * unit(name) <= 1 / 16
        error = (kahan(x).double() - x.double().sum(0)).abs()
        assert bool((error <= 3 * unit(name) * x.double().abs().sum(0)).all())
    x = torch.full((4096, 1), 0.7).bfloat16()
    exact = x.double().sum(0)
    assert abs((kahan(x).double() - exact) / exact).item() <= 3 * unit("bfloat16")
    assert (one_by_one(x).double() / exact).item() < 0.1


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float8_e5m2", "bfloat16"])
def test_stochastic_rounding_has_this_mean_and_variance(name: str) -> None:
    """E = x and Var = (x - x_)(x+ - x), in five standard errors of 40,000 draws."""
    generator = torch.Generator().manual_seed(0)
    draws = 40_000
    for point in (1.1, 0.3, 2.9, -1.7):
        x = torch.full((draws,), point, dtype=F64)
        got = round_to(x, name, "stochastic", generator=generator)
        low, high = (round_to(point, name, way).item() for way in ("down", "up"))
        variance = (point - low) * (high - point)
        assert variance <= ulp(point, name).item() ** 2 / 4
        assert abs(got.mean().item() - point) < 5 * math.sqrt(variance / draws)
        p = (point - low) / (high - low)
        # Of a variable with two values the variance is known but for p's error.
        spread = 5 * math.sqrt(p * (1 - p) / draws) * (high - low) ** 2
        assert abs(got.var().item() - variance) < spread


def test_stochastic_sums_grow_with_the_root_of_n() -> None:
    """The root mean square is at most sqrt(n) / 2 steps at the largest sum."""
    for n in (64, 1024):
        x = torch.rand(n, 1, generator=torch.Generator().manual_seed(0)).bfloat16()
        copies = x.expand(n, 4000)
        error = stochastic(copies).double() - copies.double().sum(0)
        step = ulp(1.1 * x.double().sum().item(), "bfloat16").item()
        root_mean_square = error.square().mean().sqrt().item()
        assert root_mean_square <= math.sqrt(n) / 2 * step
        assert abs(error.mean().item()) < 5 * root_mean_square / math.sqrt(4000)
        assert root_mean_square > 0.05 * math.sqrt(n) / 2 * step


# What is nearly equal.


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_textbook_variance_loses_this_much(name: str) -> None:
    """At most 4 u kappa**2, in fractions, and over a twentieth of that somewhere."""
    u, share = Fraction(unit(name)), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        mean = 2.0 ** float(torch.rand((), generator=generator) * 6)
        x = mean + torch.randn(20, dtype=F64, generator=generator)
        exact = [Fraction(v) for v in round_to(x, name).tolist()]
        first = sum(exact, Fraction()) / len(exact)
        second = sum((v * v for v in exact), Fraction()) / len(exact)
        variance = second - first**2
        m = Fraction(round_to(float(first), name).item())
        squares = Fraction(round_to(float(second), name).item())
        square = Fraction(round_to(float(m * m), name).item())
        error = abs(squares - square - variance) / variance
        kappa = second / variance
        assert error <= 4 * u * kappa * (1 + 2 * u)
        share.append(error / (4 * u * kappa))
    assert max(share) > Fraction(1, 20)


def test_two_passes_and_torch_lose_nothing() -> None:
    """However large the mean; the formula of the textbook goes below zero."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) + 8192
    exact = x.double().var(0, correction=0)
    for got in ((x - x.mean(0)).square().mean(0), x.var(0, correction=0)):
        assert bool(((got - exact).abs() < 1e-6 * exact).all())
    assert bool((x.square().mean(0) - x.mean(0).square() < 0).any())


# Twice.


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("bfloat16", "float8_e4m3fn"),
        ("bfloat16", "float8_e5m2"),
        ("float16", "float8_e4m3fn"),
        ("float16", "bfloat16"),
        ("float8_e4m3fn", "float8_e5m2"),
        ("float8_e4m3fn", "float4_e2m1fn"),
    ],
)
def test_double_rounding_goes_wrong_this_often(first: str, last: str) -> None:
    """2**-(q - p + 1) of all numbers with many more bits, exactly."""
    x = binade(16)
    wrong = round_to(round_to(x, first), last) != round_to(x, last)
    q, p = FORMATS[first].mantissa_bits, FORMATS[last].mantissa_bits
    assert q > p
    # The interval's one end is a tie of the first rounding, and may go either way.
    odds = len(x) * 2.0 ** -(q - p + 1)
    assert abs(int(wrong.sum()) - odds) <= 2**p


@pytest.mark.parametrize("last", [*SHORT, "float4_e2m1fn"])
@pytest.mark.parametrize("first", ["bfloat16", "float16"])
def test_double_rounding_is_harmless_with_enough_bits(last: str, first: str) -> None:
    """For +, -, *, / of all pairs if q >= 2p + 3; BF16 is too short for E4M3."""
    values = finite(last)
    a, b = values[:, None], values[None]
    q, p = FORMATS[first].mantissa_bits, FORMATS[last].mantissa_bits
    wrong = 0
    for operation in (add, sub, mul, truediv):
        exact = operation(a, b)
        exact = exact[exact.isfinite()]
        twice = round_to(round_to(exact, first), last)
        wrong += int((twice != round_to(exact, last)).sum())
    if q >= 2 * p + 3:
        assert wrong == 0
    else:  # and E2M3 ends before it could happen
        assert first == "bfloat16"
        assert (wrong > 0) == (last == "float8_e4m3fn")


def test_rounding_to_odd_first_is_harmless() -> None:
    """If q >= p + 2: any number, either sign, subnormal numbers included."""
    x = torch.cat([binade(16), binade(16) * 2.0**-8, binade(16) * 2.0**-10])
    x = torch.cat([x, -x])
    for first, last in (
        ("bfloat16", "float8_e4m3fn"),
        ("float8_e4m3fn", "float4_e2m1fn"),
    ):
        assert torch.equal(
            round_to(to_odd(x, first), last),
            round_to(x.clamp(-448, 448), last)
            if "e4m3" in first
            else round_to(x, last),
        )
    values = finite("bfloat16")
    assert torch.equal(to_odd(values, "bfloat16"), values)


# Ties.


@pytest.mark.parametrize("d", range(1, 9))
def test_ties_away_and_cutting_off_have_a_bias(d: int) -> None:
    """0, 2**-(d + 1) and -(1 - 2**-d) / 2 steps, in fractions."""
    x = [Fraction(2) + Fraction(k, 2**d) for k in range(2 ** (d + 1))]
    even = sum((round(v) - v for v in x), Fraction()) / len(x)
    away = sum((math.floor(v + Fraction(1, 2)) - v for v in x), Fraction()) / len(x)
    cut = sum((math.floor(v) - v for v in x), Fraction()) / len(x)
    assert even == 0
    assert away == Fraction(1, 2 ** (d + 1))
    assert cut == -(1 - Fraction(1, 2**d)) / 2
    # BF16 has the first and the last of them.
    step = 2.0 ** -FORMATS["bfloat16"].mantissa_bits
    y = 1 + (torch.tensor([float(v) for v in x], dtype=F64) - 2) * step
    for way, wanted in (("nearest", even), ("toward_zero", cut)):
        error = (round_to(y, "bfloat16", way) - y) / step
        assert error.mean().item() == float(wanted)


# The record that the page draws.


def test_the_record_is_what_the_functions_give() -> None:
    """Exactly, where nothing depends on the processor."""
    record = json.loads(rounding.RECORD.read_text("utf-8"))
    assert record["ones"] == rounding.ones()
    assert record["bias"] == rounding.bias()
    for part, found in (
        ("sums", rounding.sums()),
        ("variances", rounding.variances()),
    ):
        assert record[part].keys() == found.keys()
        for name, values in found.items():
            for drawn, value in zip(record[part][name], values, strict=True):
                assert drawn / 3 <= value <= drawn * 3
