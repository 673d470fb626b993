"""Laws of ``snippets/number_formats.py``, and their oracles.

Oracles: ``ml_dtypes`` and NumPy for every format they have, torch's own casts, a search
in the table of values, fractions, the FP8 emulator's numerics, torchao, and values that
microxcaling gave.

SPDX-License-Identifier: Apache-2.0
"""

import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from snippets.fp8 import numerics
from snippets.fp8.codes import decode_fp4
from snippets.number_formats import (
    BLOCK_FORMATS,
    FORMATS,
    BlockFormat,
    Blocks,
    FloatFormat,
    decode,
    dequantize_blocks,
    encode,
    finfo,
    neighbours,
    quantize_blocks,
    round_to,
    table,
    ulp,
)
from tests.quiet import quiet_import

RECORDS = Path(__file__).parents[1] / "benchmarks"
MICROXCALING = RECORDS / "number_formats_microxcaling.json"
INF, NAN = math.inf, math.nan
F64 = torch.float64
# Formats that no one here named, to see that formats are data.
OTHERS = {
    fmt.name: fmt
    for fmt in (
        FloatFormat("float8_e3m4", 3, 4, 3, True, "ieee"),
        FloatFormat("float8_e4m3", 4, 3, 7, True, "ieee"),
        FloatFormat("float8_e4m3b11fnuz", 4, 3, 11, False, "negative_zero"),
    )
}
SHORT = {k: f for k, f in (FORMATS | OTHERS).items() if f.bits <= 16}
SIGNED = [name for name, fmt in SHORT.items() if fmt.has_sign]
NARROW = [name for name, fmt in SHORT.items() if fmt.bits <= 8]
ML = {n: getattr(ml_dtypes, n, getattr(np, n, None)) for n in SHORT}
MX = [name for name in BLOCK_FORMATS if name != "nvfp4"]
# Of the releases 2.13 is the first whose cast to E4M3 saturates.
NEWER = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 13)
TORCH = ["float16", "bfloat16", *(n for n in FORMATS if "float8" in n)]


def codes_of(fmt: FloatFormat) -> Tensor:
    """Return all codes of a format."""
    return torch.arange(1 << fmt.bits)


def values_of(fmt: FloatFormat) -> Tensor:
    """Return all finite values, sorted, each once."""
    values = table(fmt)
    finite: Tensor = torch.unique(values[values.isfinite()])
    return finite + 0.0  # of both zeros, +0


def step(x: Tensor, toward: float) -> Tensor:
    """Return the next float64."""
    return torch.nextafter(x, torch.full_like(x, toward))


def probes(fmt: FloatFormat) -> Tensor:
    """Return every value, every halfway point, the edges, and one step either side."""
    values = values_of(fmt)
    info = finfo(fmt)
    last = torch.tensor([info.max], dtype=F64)
    edges = [last + ulp(last, fmt) / 2, last + ulp(last, fmt), 2 * last, 1e30 * last]
    tiny = torch.tensor([0.5, 0.25, 1e-30], dtype=F64) * info.smallest_subnormal
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, *edges, tiny])
    points = torch.cat([points, step(points, -INF), step(points, INF)])
    return torch.cat([points, -points, torch.tensor([0.0, -0.0, INF, -INF])])


def ml_codes(x: Tensor, name: str) -> Tensor:
    """Return the codes that ml_dtypes or NumPy gives float64 numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = x.numpy().astype(ML[name])
    integer = np.uint16 if found.itemsize == 2 else np.uint8
    return torch.from_numpy(found.view(integer).astype(np.int64))


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether values and signs of zeros agree, and NaN is NaN."""
    a, b = a.double(), b.double()
    signs = torch.equal(a.signbit()[~a.isnan()], b.signbit()[~b.isnan()])
    return signs and torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5))


# Exact laws.


@pytest.mark.parametrize("name", SHORT)
def test_every_code_is_the_code_of_its_value(name: str) -> None:
    """Encode inverts decode for all codes, the rest of the NaN codes aside."""
    fmt = SHORT[name]
    codes, values = codes_of(fmt), table(fmt)
    overflow = "saturate" if fmt.nan_encoding is None else "ieee"
    for rounding in ("nearest", "toward_zero", "up", "down", "stochastic"):
        back = encode(values[~values.isnan()], fmt, rounding, overflow)
        assert torch.equal(back, codes[~values.isnan()])
    nans = {"ieee": 2 * (2**fmt.mantissa_bits - 1), "all_ones": 1 + fmt.has_sign}
    wanted = nans.get(fmt.nan_encoding or "", fmt.nan_encoding == "negative_zero")
    assert int(values.isnan().sum()) == wanted


@pytest.mark.parametrize("name", SHORT)
def test_fields_spell_the_value(name: str) -> None:
    """(-1)**s * 2**(e - bias) * (1 + m / 2**p), in fractions, for every finite code."""
    fmt = SHORT[name]
    p = fmt.mantissa_bits
    for code, value in enumerate(table(fmt).tolist()):
        if not math.isfinite(value):
            continue
        e, m = (code >> p) % 2**fmt.exponent_bits, Fraction(code % 2**p, 2**p)
        sign = -1 if fmt.has_sign and code >> (fmt.bits - 1) else 1
        if e == 0 and fmt.has_zero:
            wanted = sign * Fraction(2) ** (1 - fmt.bias) * m
        else:
            wanted = sign * Fraction(2) ** (e - fmt.bias) * (1 + m)
        assert Fraction(value) == wanted


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero", "up", "down"])
def test_rounding_is_a_search_in_the_table(name: str, rounding: str) -> None:
    """Each probe goes to the neighbor that a search in the sorted values finds."""
    fmt = SHORT[name]
    values, info = values_of(fmt), finfo(fmt)
    x = probes(fmt)
    x = x[(x >= info.min) & (x <= info.max)]
    low = values[torch.searchsorted(values, x, right=True) - 1]
    high = values[torch.searchsorted(values, x)]
    far = (
        Fraction(h) + Fraction(v) - 2 * Fraction(t)
        for v, h, t in zip(low.tolist(), high.tolist(), x.tolist(), strict=True)
    )
    side = torch.tensor([(f > 0) - (f < 0) for f in far])
    even = encode(low, fmt) & 1 == 0 if fmt.mantissa_bits else low < 0
    nearest = torch.where((side > 0) | ((side == 0) & even), low, high)
    inward = torch.where(x > 0, low, high)
    wanted = {"nearest": nearest, "toward_zero": inward, "up": high, "down": low}
    assert torch.equal(round_to(x, fmt, rounding), wanted[rounding])


@pytest.mark.parametrize("name", FORMATS)
def test_neighbors_ulp_and_limits_belong_together(name: str) -> None:
    """Neighbors enclose, nothing lies between, and the step is their distance."""
    fmt, info = FORMATS[name], finfo(name)
    generator = torch.Generator().manual_seed(0)
    exponent = torch.empty(2000, dtype=F64)
    exponent.uniform_(
        math.log2(info.smallest_normal), math.log2(info.max), generator=generator
    )
    x = torch.exp2(exponent).clamp(max=info.max)
    below, above = neighbours(x, fmt)
    inside = above.isfinite()
    assert bool((below < x).all() & (above[inside] > x[inside]).all())
    exact = round_to(x, fmt, "down") == x
    enclosed = inside & ~exact
    assert torch.equal(round_to(x, fmt, "down")[~exact], below[~exact])
    assert torch.equal(round_to(x, fmt, "up")[enclosed], above[enclosed])
    assert torch.equal((above - below)[enclosed], ulp(x, fmt)[enclosed])
    assert torch.equal(
        neighbours(above[inside], fmt)[0], round_to(x, fmt, "down")[inside]
    )
    if fmt.has_sign:
        assert same(neighbours(-x, fmt)[1], -below)
        assert same(neighbours(-x, fmt)[0], -above)


@pytest.mark.parametrize("name", SHORT)
def test_neighbors_are_those_of_the_table(name: str) -> None:
    """For every value, and at the ends Inf where there is one, NaN otherwise."""
    fmt = SHORT[name]
    values = values_of(fmt)
    end = torch.tensor([INF if fmt.has_inf else NAN], dtype=F64)
    start = -end if fmt.has_sign else torch.tensor([NAN], dtype=F64)
    below, above = neighbours(values, fmt)
    assert same(below, torch.cat([start, values[:-1]]))
    assert same(above, torch.cat([values[1:], end]))
    ends = neighbours(torch.tensor([INF, -INF, NAN, 1e300, -1e300], dtype=F64), fmt)
    low = values[0].item()
    top = values[-1].item()
    minus, plus = (-INF, INF) if fmt.has_inf else (NAN, NAN)
    assert same(ends[0], torch.tensor([top, NAN, NAN, top, minus]))
    assert same(ends[1], torch.tensor([NAN, low, NAN, plus, low]))


def test_ulp_at_the_edges() -> None:
    """At 0, in the subnormals, at powers of two, at and past the last number."""
    x = torch.tensor([0.0, -0.0, 2.0**-9, 2.0**-6, 1.0, 0.99, 448, 1e9, INF, NAN])
    steps = [-9, -9, -9, -9, -3, -4, 5, 5, 5]
    assert ulp(x, "float8_e4m3fn")[:-1].log2().tolist() == steps
    assert ulp(x, "float8_e4m3fn")[-1].isnan()
    assert ulp(2.0**127, "float8_e8m0fnu").item() == 2.0**127
    floats = torch.tensor([5e-324, 2.0**-1022, 1.0, math.pi, 1.7e308], dtype=F64)
    floats = torch.cat([floats, floats.new_tensor([torch.finfo(F64).max])])
    assert ulp(floats, "float64").tolist() == [math.ulp(v) for v in floats.tolist()]


@pytest.mark.parametrize("name", ["float32", "tf32", "float64"])
def test_wide_formats_round_in_fractions(name: str) -> None:
    """Random bits, halfway points and subnormals: nearest, with ties to even."""
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**63), 2**63 - 1, (3000,), generator=generator)
    x = bits.view(F64)
    x = torch.cat([x[x.isfinite()], torch.rand(500, dtype=F64) * 2.0**-126])
    short = x.float().double()
    half = short + 2.0 ** (short.abs().log2().floor() - fmt.mantissa_bits - 1)
    x = torch.cat([x, half[half.isfinite()]])
    x = x[x.abs() <= finfo(fmt).max]
    unit = [
        Fraction(2) ** max(math.frexp(v)[1] - 1, fmt.min_exponent) for v in x.tolist()
    ]
    for value, one, got in zip(
        x.tolist(), unit, round_to(x, fmt).tolist(), strict=True
    ):
        quantum = one / 2**fmt.mantissa_bits
        assert Fraction(got) == round(Fraction(value) / quantum) * quantum


def test_codes_of_the_wide_formats_are_their_bits() -> None:
    """float64's are a view; float32's and TF32's are the upper bits of torch's."""
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**63), 2**63 - 1, (5000,), generator=generator)
    x = torch.cat([
        bits.view(F64),
        torch.tensor([0.0, -0.0, INF, -INF, 5e-324], dtype=F64),
    ])
    x = x[~x.isnan()]
    assert torch.equal(encode(x, "float64", overflow="ieee"), x.view(torch.int64))
    assert same(decode(x.view(torch.int64), "float64"), x)
    single = torch.cat([x.float(), torch.tensor([1e-45, 3e38, -1e-40])])
    patterns = single.view(torch.int32).long() & 0xFFFFFFFF
    assert torch.equal(encode(single, "float32", overflow="ieee"), patterns)
    assert same(decode(patterns, "float32"), single)
    cut = encode(single, "tf32", "toward_zero", "ieee")
    assert torch.equal(cut, patterns >> 13)


def test_round_to_keeps_float32_where_it_can() -> None:
    """And gives float64 for everything else."""
    x = torch.tensor([0.3, 1e30])
    for name, fmt in FORMATS.items():
        wanted = F64 if name == "float64" else torch.float32
        assert round_to(x, fmt).dtype == wanted
        assert round_to(x.double(), fmt).dtype == F64
        assert round_to(x[:1].bfloat16(), fmt).dtype == F64
    wide = FloatFormat("e8m20_low", 8, 20, 140, True, "ieee")
    assert round_to(x, wide).dtype == F64


@pytest.mark.parametrize("name", SHORT)
def test_overflow_saturates_or_goes_where_ieee_sends_it(name: str) -> None:
    """At the threshold, one step either side, and at Inf, in every rounding."""
    fmt, info = SHORT[name], finfo(SHORT[name])
    last = torch.tensor([info.max], dtype=F64)
    tie = last + ulp(last, fmt) / 2
    x = torch.cat([last, step(last, INF), step(tie, 0), tie, step(tie, INF), last * 4])
    x = torch.cat([x, torch.tensor([INF])])
    for rounding in ("nearest", "toward_zero", "up", "down"):
        assert round_to(x, fmt, rounding).tolist() == [info.max] * 7
        if fmt.has_sign:
            assert round_to(-x, fmt, rounding).tolist() == [-info.max] * 7
    if fmt.nan_encoding is None:
        return
    beyond = INF if fmt.has_inf else NAN
    # The last significand is odd except in E4M3 and in formats without a mantissa.
    tied = info.max if name == "float8_e4m3fn" else beyond
    rows = {
        "nearest": [info.max] * 3 + [tied] + [beyond] * 3,
        "toward_zero": [info.max] * 6 + [beyond],
        "down": [info.max] * 6 + [beyond],
        "up": [info.max] + [beyond] * 6,
    }
    opposite = {"up": "down", "down": "up"}
    for rounding, wanted in rows.items():
        assert same(round_to(x, fmt, rounding, "ieee"), torch.tensor(wanted))
        if fmt.has_sign:
            mirrored = round_to(-x, fmt, opposite.get(rounding, rounding), "ieee")
            assert same(mirrored, -torch.tensor(wanted, dtype=F64))


def test_e8m0_has_neither_sign_nor_zero() -> None:
    """Negative numbers are NaN, what is below 2**-127 becomes that, ties go up."""
    x = torch.tensor([0.0, -0.0, 1e-300, 1.5, 3.0, -1.0, -INF, NAN], dtype=F64)
    for rounding in ("nearest", "toward_zero", "up", "down", "stochastic"):
        codes = encode(x, "float8_e8m0fnu", rounding).tolist()
        assert codes[:3] + codes[5:] == [0, 0, 0, 255, 255, 255]
    assert encode(x, "float8_e8m0fnu").tolist()[3:5] == [128, 129]
    assert neighbours(0.0, "float8_e8m0fnu")[1].item() == 2.0**-127
    assert neighbours(-5.0, "float8_e8m0fnu")[1].item() == 2.0**-127


@pytest.mark.parametrize("nan", ["ieee", "all_ones", None])
def test_a_format_without_a_sign_can_have_zero(nan: str | None) -> None:
    """It is the smallest number, and -0 becomes it; nothing else negative does."""
    fmt = FloatFormat("ue4m3", 4, 3, 7, nan == "ieee", nan, has_sign=False)
    values = table(fmt)
    info = finfo(fmt)
    assert info.min == values[values.isfinite()].min().item() == 0.0
    assert info.smallest_subnormal == 2.0**-9
    for rounding in ("nearest", "toward_zero", "up", "down", "stochastic"):
        assert encode(torch.tensor([0.0, -0.0]), fmt, rounding).tolist() == [0, 0]
        low = torch.tensor([-1.0, -INF, -5e-324], dtype=F64)
        if nan:
            assert encode(low, fmt, rounding).tolist() == [fmt.nan_code] * 3
            continue
        for x in low:
            with pytest.raises(ValueError, match="has neither a sign nor NaN"):
                encode(x, fmt, rounding)


# Stochastic rounding.


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float8_e4m3fn", "bfloat16"])
def test_stochastic_rounding_is_right_in_the_mean(name: str) -> None:
    """Both neighbors and no others, the upper as often as the distance says."""
    info, draws = finfo(name), 20_000
    points = [0.3, 1.0 + 0.15 * info.eps, info.smallest_subnormal / 4, 3.99, -0.7]
    for point in points:
        x = torch.full((draws,), point, dtype=F64)
        got = round_to(
            x, name, "stochastic", generator=torch.Generator().manual_seed(3)
        )
        low = round_to(point, name, "down").item()
        high = round_to(point, name, "up").item()
        assert set(got.tolist()) == {low, high}
        p = (point - low) / (high - low)
        share = (got == high).double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / draws)


def test_stochastic_rounding_draws_in_logical_order() -> None:
    """The same generator gives the same codes for any layout, and each its own."""
    x = torch.linspace(-3, 3, 600, dtype=F64).view(20, 30)

    def codes(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        return encode(x, "float8_e5m2", "stochastic", generator=generator)

    assert torch.equal(codes(x), codes(x.mT.contiguous().mT))
    assert not torch.equal(codes(x), codes(x.flip(0)).flip(0))


def test_long_tensors_are_rounded_as_if_at_once() -> None:
    """Parts that fit the cache change no code, no value and no draw."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(3, 50_001, generator=generator)
    name = "float8_e5m2"

    def stochastic(*parts: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        codes = [encode(p, name, "stochastic", generator=generator) for p in parts]
        return torch.cat(codes)

    assert torch.equal(stochastic(x), stochastic(x[:1], x[1:2], x[2:]))
    for function in (encode, round_to, ulp, lambda x, f: torch.stack(neighbours(x, f))):
        whole = function(x.mT, name)
        assert whole.shape[-2:] == (50_001, 3)
        assert torch.equal(whole[..., 40_000:, 1], function(x[1, 40_000:], name))


# Oracles.


@pytest.mark.parametrize("name", SHORT)
def test_every_code_means_what_ml_dtypes_says(name: str) -> None:
    """All codes, NaN and the signs of zeros included."""
    fmt = SHORT[name]
    integer = np.uint16 if fmt.bits == 16 else np.uint8
    bits = np.arange(1 << fmt.bits).astype(integer)
    with np.errstate(invalid="ignore"):  # signaling NaNs
        theirs = bits.view(ML[name]).astype(np.float64)
    assert same(table(fmt), torch.from_numpy(theirs))


def probes32(fmt: FloatFormat) -> Tensor:
    """Return the probes that float32 holds, and one float32 either side of each."""
    x = probes(fmt).float()
    up, down = (torch.full_like(x, end) for end in (INF, -INF))
    x = torch.cat([x, torch.nextafter(x, up), torch.nextafter(x, down)])
    return torch.cat([x, torch.tensor([-0.0])])


@pytest.mark.parametrize("name", SIGNED)
def test_encoding_equals_ml_dtypes(name: str) -> None:
    """Every value, halfway point and edge, and one float32 either side of each."""
    fmt = SHORT[name]
    x = probes32(fmt)
    ours = encode(x, fmt, overflow="saturate" if fmt.nan_encoding is None else "ieee")
    assert x[ours != ml_codes(x, name)].tolist() == []


def test_encoding_float64_equals_numpy_and_not_ml_dtypes() -> None:
    """One float64 either side of each: ml_dtypes rounds to float32 before."""
    x = probes(FORMATS["float16"])
    ours = encode(x, "float16", overflow="ieee")
    assert torch.equal(ours, ml_codes(x, "float16"))
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=F64)
    assert round_to(x, "bfloat16").item() == 1 + 2.0**-7
    assert encode(x.float(), "bfloat16").item() == ml_codes(x, "bfloat16").item()
    assert encode(x, "bfloat16").item() != ml_codes(x, "bfloat16").item()


def rounded_up(x: Tensor) -> Tensor:
    """Return where torch and ml_dtypes give E8M0 the upper neighbor, not the nearest.

    Between 2**-127 and 1.5 * 2**-127, which are subnormal in float32.
    """
    return (x.abs() > 2.0**-127) & (x.abs() < 1.5 * 2.0**-127)


def test_encoding_e8m0_equals_ml_dtypes_except_for_zero() -> None:
    """ml_dtypes makes zero NaN; here it underflows, as in torch."""
    x = probes32(FORMATS["float8_e8m0fnu"])
    x = x[~rounded_up(x)]
    ours = encode(x, "float8_e8m0fnu", overflow="ieee")
    theirs = ml_codes(x, "float8_e8m0fnu")
    assert torch.equal(ours[x != 0], theirs[x != 0])
    assert set(ours[x == 0].tolist()) == {0}
    assert set(theirs[x == 0].tolist()) == {255}


@pytest.mark.parametrize("name", SIGNED)
def test_nan_is_one_code_whatever_its_payload(name: str) -> None:
    """With its sign, where the format has a NaN of each; as in ml_dtypes."""
    fmt = SHORT[name]
    payloads = torch.tensor([
        0x7FF8 << 48,
        0x7FF0 << 48 | 1,
        0x7FFF << 48,
        -1,
        -(8 << 48),
    ])
    x = payloads.view(F64)
    assert bool(x.isnan().all())
    if fmt.nan_encoding is None:
        with pytest.raises(ValueError, match=f"{name} has no NaN, but x has"):
            encode(x, fmt)
        return
    sign = 0 if fmt.nan_encoding == "negative_zero" else 1 << (fmt.bits - 1)
    wanted = [fmt.nan_code] * 3 + [fmt.nan_code | sign] * 2
    assert encode(x, fmt).tolist() == encode(x, fmt, "up", "ieee").tolist() == wanted
    if name != "float16":  # NumPy keeps the upper bits of the payload
        assert ml_codes(x, name).tolist() == wanted


def torch_codes(x: Tensor, name: str) -> Tensor:
    """Return the codes of torch's own cast."""
    cast = x.to(getattr(torch, name))
    if cast.element_size() == 1:
        return cast.view(torch.uint8).long()
    return cast.view(torch.int16).long() & 0xFFFF


@pytest.mark.parametrize("name", TORCH)
def test_torch_casts_float32_like_this(name: str) -> None:
    """All probes that float32 holds; E4M3 saturates, Inf included, the others do not.

    E8M0 is for magnitudes only: torch drops the sign.
    """
    fmt = FORMATS[name]
    x = probes32(fmt)
    if name == "float8_e8m0fnu":
        x = x[~rounded_up(x)]
    overflow = "saturate" if name == "float8_e4m3fn" and NEWER else "ieee"
    mine = x if fmt.has_sign else x.abs()
    assert torch.equal(encode(mine, fmt, overflow=overflow), torch_codes(x, name))


@pytest.mark.parametrize("name", [n for n in TORCH if "float8" in n])
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_torch_casts_half_precision_like_this(name: str, source: torch.dtype) -> None:
    """All 65,536 codes but NaN's, which `test_torch_casts_that_differ` has."""
    x = torch.arange(1 << 16).to(torch.uint16).view(source)
    x = x[~x.isnan()]
    fmt = FORMATS[name]
    if name == "float8_e8m0fnu":
        x = x[~rounded_up(x.double())]
    overflow = "saturate" if name == "float8_e4m3fn" and NEWER else "ieee"
    mine = x if fmt.has_sign else x.abs()
    assert torch.equal(encode(mine, fmt, overflow=overflow), torch_codes(x, name))


@pytest.mark.parametrize("name", TORCH)
def test_torch_decodes_like_this(name: str) -> None:
    """All codes."""
    fmt = FORMATS[name]
    integer = torch.uint8 if fmt.bits == 8 else torch.int16
    theirs = codes_of(fmt).to(integer).view(getattr(torch, name)).float()
    assert same(table(fmt), theirs)


def test_torch_casts_that_differ() -> None:
    """NaN in E5M2, the sign in E8M0, and float64, which torch rounds twice."""
    e5m2, e8m0 = "float8_e5m2", "float8_e8m0fnu"
    nan = torch.tensor([NAN])
    assert (torch_codes(nan, e5m2).item(), encode(nan, e5m2).item()) == (0x7F, 0x7E)
    assert ml_codes(nan, e5m2).item() == 0x7E
    minus = torch.tensor([-2.0])
    assert (torch_codes(minus, e8m0).item(), encode(minus, e8m0).item()) == (128, 255)
    for least in torch.tensor([1.25, 1.4999]) * 2.0**-127:
        x = least.view(1)
        assert encode(x, e8m0).item() == 0
        assert torch_codes(x, e8m0).item() == ml_codes(x, e8m0).item() == 1
    # To float32 first, which drops what lies above the halfway point.
    for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"):
        x = torch.tensor([1 + finfo(name).eps / 2 + 2.0**-40], dtype=F64)
        ours = round_to(x, name).item()
        assert ours == 1 + finfo(name).eps
        twice = x.to(getattr(torch, name)).double().item()
        assert twice == round_to(x.float(), name).item() == 1.0, name


def test_limits_are_those_of_torch_but_for_one() -> None:
    """torch.finfo says that float8_e5m2fnuz's eps is half of what it is."""
    names = ["bits", "eps", "max", "min", "smallest_normal"]
    for name in [n for n in FORMATS if hasattr(torch, n)]:
        theirs, ours = torch.finfo(getattr(torch, name)), finfo(name)
        for field in names:
            got, wanted = getattr(ours, field), getattr(theirs, field)
            if (name, field) == ("float8_e5m2fnuz", "eps"):
                wanted *= 2
            if (name, field) == ("float8_e8m0fnu", "min"):
                wanted = 2.0**-127
            assert got == wanted, (name, field)
    for name, fmt in SHORT.items():
        info, ours = ml_dtypes.finfo(ML[name]), finfo(fmt)  # type: ignore[no-untyped-call]
        assert float(info.max) == ours.max
        assert float(info.smallest_subnormal) == ours.smallest_subnormal
        assert float(info.eps) == ours.eps


# Block formats.


def draws(seed: int = 0) -> Tensor:
    """Return numbers of many sizes, zeros, subnormal numbers and float32's largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 128, generator=generator)
    x *= torch.exp2(torch.randint(-30, 30, (64, 1), generator=generator).float())
    x[1] = 0.0
    x[2, ::3] *= 1e-45 / x[2, ::3].abs()
    x[3] = x[3] / x[3].abs().max() * 3e38
    x[4] = x[4] / x[4].abs().max() * 2.0**-127
    return x


@pytest.mark.parametrize("name", MX)
def test_mx_is_the_specifications_conversion(name: str) -> None:
    """One block after the other: largest powers of two in fractions, then rounding."""
    fmt = BLOCK_FORMATS[name]
    x = draws()
    blocks = quantize_blocks(x, name)
    top = Fraction(finfo(fmt.element).max)
    emax = max(k for k in range(-20, 20) if Fraction(2) ** k <= top)
    values = dequantize_blocks(blocks, name)
    for row, scales, out in zip(x, blocks.scales, values, strict=True):
        parts = zip(row.split(32), scales.tolist(), out.split(32), strict=True)
        for block, scale, got in parts:
            amax = block.abs().max().item()
            power = math.frexp(amax)[1] - 1 - emax if amax else -127
            assert scale == min(max(power, -127), 127) + 127
            factor = 2.0 ** (scale - 127)
            assert torch.equal(
                round_to(block.double() / factor, fmt.element) * factor, got
            )


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2"])
def test_mxfp8_equals_the_emulators_floor(name: str) -> None:
    """The FP8 emulator has the specification's rule as rounding="floor"."""
    x, dtype = draws(1), getattr(torch, BLOCK_FORMATS[name].element.name)
    codes, scales = numerics.quantize_mxfp8(x, dtype, rounding="floor")
    ours = quantize_blocks(x, name)
    assert torch.equal(ours.codes, codes.view(torch.uint8).long())
    assert torch.equal(ours.scales, scales.view(torch.uint8).long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_equals_the_emulator(dtype: torch.dtype) -> None:
    """Codes, scales, amax, and what comes back, bit for bit."""
    for x in (
        draws(2).to(dtype),
        torch.zeros(2, 32, dtype=dtype),
        draws(3)[2:3].to(dtype),
    ):
        codes, scales, amax = numerics.quantize_nvfp4(x)
        ours = quantize_blocks(x, "nvfp4")
        assert torch.equal(
            decode(ours.codes, "float4_e2m1fn"), decode_fp4(codes).double()
        )
        assert torch.equal(ours.scales, scales.view(torch.uint8).long())
        assert ours.amax is not None
        assert torch.equal(ours.amax, amax)
        back = numerics.dequantize(codes, scales, amax)
        assert same(dequantize_blocks(ours, "nvfp4"), back)


def test_nvfp4_overflows_where_scale_times_amax_does() -> None:
    """As in Transformer Engine's kernel, which multiplies from the left."""
    last = torch.finfo(torch.float32).max / 448
    for factor, finite in ((1 - 2.0**-20, True), (1 + 2.0**-20, False)):
        x = torch.full((16,), last * factor)
        blocks = quantize_blocks(x, "nvfp4")
        assert decode(blocks.scales, "float8_e4m3fn").item() == 448
        back = dequantize_blocks(blocks, "nvfp4")
        assert bool(back.isfinite().all()) == finite
        assert same(back, numerics.dequantize(*numerics.quantize_nvfp4(x)))


def test_nvfp4_scales_at_ties_equal_the_emulators() -> None:
    """Where a block's scale is halfway in E4M3, the order of operations decides."""
    scales = values_of(FORMATS["float8_e4m3fn"])
    ties = ((scales[1:] + scales[:-1]) / 2)[scales[1:] > 0].float() / 448
    for amax in torch.linspace(1.0, 2.0, 50):
        x = torch.cat([torch.ones(1), ties])[:, None] * torch.full((16,), amax.item())
        codes, inv_scale, _ = numerics.quantize_nvfp4(x)
        ours = quantize_blocks(x, "nvfp4")
        assert torch.equal(ours.scales, inv_scale.view(torch.uint8).long())
        values = decode(ours.codes, "float4_e2m1fn")
        assert torch.equal(values, decode_fp4(codes).double())


def below_powers() -> Tensor:
    """Return blocks whose largest number is the last float32 before a power of two."""
    powers = torch.exp2(torch.arange(-100, 128, dtype=F64)).float()
    largest = torch.nextafter(powers, torch.zeros(1))
    return largest[:, None] * torch.linspace(1.0, -0.5, 32)


@pytest.mark.parametrize("name", MX)
def test_mx_equals_torchao(name: str) -> None:
    """Its FLOOR is the specification's rule, in FP8, FP6 and FP4.

    But its scales end at 2**-126, a normal float32, where E8M0's end at 2**-127.
    """
    mx = quiet_import("torchao.prototype.mx_formats.mx_tensor")
    x = torch.cat([draws(4).view(-1, 32), below_powers()])
    element = BLOCK_FORMATS[name].element
    dtype = {
        "float6_e3m2fn": mx.DTYPE_FP6_E3M2,
        "float6_e2m3fn": mx.DTYPE_FP6_E2M3,
        "float4_e2m1fn": torch.float4_e2m1fn_x2,
    }.get(element.name) or getattr(torch, element.name)
    scales, codes = mx.to_mx(x, dtype, 32, mx.ScaleCalculationMode.FLOOR)
    ours = quantize_blocks(x, name)
    wide = scales.view(torch.uint8).long().view(ours.scales.shape)
    assert torch.equal(ours.scales, wide)
    theirs = codes.view(torch.uint8).long()
    if name == "mxfp4":
        theirs = torch.stack([theirs & 15, theirs >> 4], -1).flatten(1)
    clamped = (ours.scales == 0).squeeze(-1)
    assert torch.equal(ours.codes[~clamped], theirs[~clamped])
    assert bool((x[clamped] != 0).any())
    values = encode(x[clamped].double() * 2.0**126, element)
    assert torch.equal(values, theirs[clamped])


@pytest.mark.parametrize("name", MX)
def test_mx_equals_microxcaling(name: str) -> None:
    """Its round="even", on blocks of every size, ties among them, bit for bit.

    Not where the largest number is barely below a power of two: it takes the logarithm
    in float32, which rounds it up, so that its scale is twice the specification's.
    """
    record = json.loads(MICROXCALING.read_text("utf-8"))
    x, theirs = (torch.tensor(record[key], dtype=F64) for key in ("x", name))
    ours = dequantize_blocks(quantize_blocks(x, name), name)
    differ = (ours != theirs).any(1)
    significand, power = torch.frexp(x.abs().amax(1))
    assert torch.equal(differ, (significand >= 1 - 2.0**-23) & (power.abs() > 1))
    assert 0 < int(differ.sum()) < len(x) // 4
    # With twice the scale, which a larger first number gives, the rest agrees.
    nudged = torch.where(differ[:, None] & (x.abs() == x.abs().amax(1, True)), 2, 1) * x
    again = dequantize_blocks(quantize_blocks(nudged, name), name)
    kept = differ[:, None] & (nudged == x)
    assert torch.equal(again[kept].float(), theirs[kept].float())  # one is 2**128


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_block_with_inf_or_nan_is_nan_and_no_other(name: str) -> None:
    """The scale is NaN; the other blocks are as without it."""
    size = BLOCK_FORMATS[name].block_size
    x = torch.linspace(-3, 5, 4 * size).view(2, -1)
    clean = dequantize_blocks(quantize_blocks(x, name), name)
    for bad in (INF, -INF, NAN):
        broken = x.clone()
        broken[0, 3] = bad
        got = dequantize_blocks(quantize_blocks(broken, name), name)
        assert bool(got[0, :size].isnan().all())
        assert torch.equal(got[0, size:], clean[0, size:])
        assert torch.equal(got[1], clean[1])


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_of_every_shape(name: str) -> None:
    """Empty, one block, more dimensions, strides, all zeros; rounding is passed on."""
    size = BLOCK_FORMATS[name].block_size
    for shape in ((0,), (3, 0), (0, size), (size,), (2, 3, 2 * size)):
        x = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        blocks = quantize_blocks(x, name)
        assert blocks.codes.shape == x.shape
        assert blocks.scales.shape == (*shape[:-1], shape[-1] // size)
        assert dequantize_blocks(blocks, name).shape == x.shape
    zeros = quantize_blocks(torch.zeros(size), name)
    assert zeros.scales.tolist() == [0]
    assert dequantize_blocks(zeros, name).tolist() == [0.0] * size
    x = torch.rand(4, size)
    low, high = (
        dequantize_blocks(quantize_blocks(x, name, r), name) for r in ("down", "up")
    )
    assert bool(((low <= x.double()) | (low == low.amax(-1, keepdim=True))).all())
    assert bool((low < high).any())
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    one, two = (quantize_blocks(x, name, "stochastic", g).codes for g in generators)
    assert torch.equal(one, two)
    assert torch.equal(
        quantize_blocks(x.mT.contiguous().mT, name).codes,
        quantize_blocks(x, name).codes,
    )


# Errors.


def call(function: Callable[..., Any], *args: Any, **more: Any) -> Callable[[], Any]:  # noqa: ANN401
    """Return a call to make later."""
    return lambda: function(*args, **more)


X = torch.ones(32)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (call(encode, X, "float8_e4m3f"), ValueError, "did you mean 'float8_e4m3fn'"),
        (call(encode, X, "BFloat16"), ValueError, "did you mean 'bfloat16'"),
        (
            call(decode, X.long(), "int7"),
            ValueError,
            "fmt must be one of .*, got 'int7'$",
        ),
        (call(encode, X, "fp32"), ValueError, "did you mean 'float32'"),
        (call(encode, X, "e4m3"), ValueError, "did you mean 'float8_e4m3fn'"),
        (call(encode, X, "tf32", "nearst"), ValueError, "mean 'nearest'"),
        (call(encode, X, "tf32", overflow="ieeee"), ValueError, "mean 'ieee'"),
        (call(encode, X, None), ValueError, "got None"),
        (
            call(encode, X.long(), "tf32"),
            TypeError,
            "floats or a number, got torch.int64",
        ),
        (call(encode, [1.0], "tf32"), TypeError, "got list"),
        (call(encode, True, "tf32"), TypeError, "got bool"),
        (call(ulp, "1", "tf32"), TypeError, "got str"),
        (
            call(encode, X[:4].byte().view(torch.float4_e2m1fn_x2), "float4_e2m1fn"),
            TypeError,
            "got torch.float4_e2m1fn_x2",
        ),
        (call(neighbours, X.bool(), "tf32"), TypeError, "got torch.bool"),
        (
            call(encode, X, "float4_e2m1fn", overflow="ieee"),
            ValueError,
            "use 'saturate'",
        ),
        (call(encode, NAN, "float6_e3m2fn"), ValueError, "float6_e3m2fn has no NaN"),
        (
            call(encode, X, "tf32", generator=torch.Generator()),
            ValueError,
            "generator is for rounding='stochastic', not 'nearest'",
        ),
        (call(decode, X, "tf32"), TypeError, "integers, got torch.float32"),
        (call(decode, 3, "tf32"), TypeError, "integers, got int"),
        (call(decode, X.bool(), "tf32"), TypeError, "integers, got torch.bool"),
        (call(decode, X * 1j, "tf32"), TypeError, "integers, got torch.complex64"),
        (
            call(decode, torch.tensor([3, 256]), "float8_e5m2"),
            ValueError,
            r"codes of float8_e5m2 are from 0 to 255, got \[256\]",
        ),
        (call(decode, torch.tensor([-1]), "float8_e5m2"), ValueError, r"got \[-1\]"),
        (call(table, "float32"), ValueError, r"float32 has 2\*\*32 codes"),
        (call(quantize_blocks, X, "mxfp5"), ValueError, "did you mean 'mxfp4'"),
        (call(quantize_blocks, X[:31], "mxfp4"), ValueError, r"32, got shape \[31\]"),
        (call(quantize_blocks, 1.0, "mxfp4"), ValueError, r"got shape \[\]"),
        (call(quantize_blocks, X.double(), "nvfp4"), ValueError, "cast x"),
        (call(quantize_blocks, X.long(), "mxfp4"), TypeError, "got torch.int64"),
        (
            call(dequantize_blocks, Blocks(X.long(), X.long()), "mxfp4"),
            ValueError,
            r"not blocks of mxfp4: codes \[32\], scales \[32\]",
        ),
        (
            call(dequantize_blocks, quantize_blocks(X, "mxfp4"), "nvfp4"),
            ValueError,
            "not blocks of nvfp4",
        ),
        (
            call(
                dequantize_blocks, quantize_blocks(X, "mxfp4")._replace(amax=X), "mxfp4"
            ),
            ValueError,
            "not blocks of mxfp4",
        ),
        (
            call(
                dequantize_blocks,
                Blocks(torch.tensor(1), torch.tensor(1)),
                "mxfp4",
            ),
            ValueError,
            r"not blocks of mxfp4: codes \[\], scales \[\]",
        ),
        # One amax an element fits by broadcasting, and is not of this format.
        (
            call(
                dequantize_blocks,
                quantize_blocks(X[:16], "nvfp4")._replace(amax=X[:16]),
                "nvfp4",
            ),
            ValueError,
            "not blocks of nvfp4",
        ),
        (call(encode, X, BLOCK_FORMATS["mxfp4"]), ValueError, "got BlockFormat"),
        (call(quantize_blocks, X, FORMATS["tf32"]), ValueError, "got FloatFormat"),
        (call(encode, X, torch.bfloat16), ValueError, "did you mean 'bfloat16'"),
        (
            call(
                quantize_blocks,
                X,
                BlockFormat("own", FORMATS["float16"])._replace(block_size=0),
            ),
            ValueError,
            "a block has at least one element",
        ),
        (
            call(
                dequantize_blocks,
                Blocks(X.long(), X.long()),
                BlockFormat("own", FORMATS["float16"], FORMATS["float4_e2m1fn"]),
            ),
            ValueError,
            "a scale needs a NaN",
        ),
        (
            call(
                quantize_blocks,
                X,
                BlockFormat(
                    "own",
                    FORMATS["float16"],
                    FloatFormat("e4m0", 4, 0, 7, False, "all_ones"),
                ),
            ),
            ValueError,
            "either a mantissa or no zero",
        ),
        (
            call(
                quantize_blocks,
                X,
                BlockFormat("own", FORMATS["float16"], FORMATS["bfloat16"]),
            ),
            ValueError,
            "float32 does not hold the largest element times scale",
        ),
        (
            call(
                encode,
                torch.tensor([1.0, -1.0]),
                FloatFormat("ue3m3", 3, 3, 3, has_sign=False),
            ),
            ValueError,
            "ue3m3 has neither a sign nor NaN, but x is negative",
        ),
        (call(FloatFormat, "x", 4, 3, 7.5), ValueError, "bits and bias are int"),
        (call(FloatFormat, "x", "4", 3, 7), ValueError, "bits and bias are int"),
        (call(FloatFormat, "x", 1, 2, 3), ValueError, "needs 2 to 11 exponent bits"),
        (call(FloatFormat, "x", 12, 2, 3), ValueError, "needs 2 to 11 exponent bits"),
        (call(FloatFormat, "x", 4, -1, 3), ValueError, "needs 0 to 52 mantissa bits"),
        (call(FloatFormat, "x", 4, 53, 3), ValueError, "needs 0 to 52 mantissa bits"),
        (call(FloatFormat, "x", 4, 3, 7, True), ValueError, "has_inf for 'ieee'"),
        (
            call(FloatFormat, "x", 4, 3, 7, False, "ieee"),
            ValueError,
            "has_inf for 'ieee'",
        ),
        (
            call(FloatFormat, "x", 4, 0, 7, True, "ieee"),
            ValueError,
            "needs a mantissa with Inf",
        ),
        (
            call(FloatFormat, "x", 4, 3, 7, False, "negative_zero", False),
            ValueError,
            "a -0 to be NaN",
        ),
        (call(FloatFormat, "x", 4, 3, 7, False, "all_one"), ValueError, "'all_ones'"),
        (call(FloatFormat, "x", 11, 3, 0), ValueError, "float64 does not hold"),
        (call(FloatFormat, "x", 5, 3, 1024), ValueError, "float64 does not hold"),
    ],
)
def test_bad_input_is_one_clear_error(
    bad: Callable[[], Any], error: type[Exception], match: str
) -> None:
    """With the value received, and the nearest name."""
    with pytest.raises(error, match=match):
        bad()


def test_an_own_format_with_nvfp4s_two_scales_uses_its_range() -> None:
    """The largest block has the largest scale and the largest element, as 448 and 6."""
    x = draws(7)[5:]
    for element in ("float6_e2m3fn", "float8_e4m3fn"):
        own = BlockFormat("own", FORMATS[element], FORMATS["float8_e4m3fn"], 16)
        blocks = quantize_blocks(x, own)
        assert int(blocks.scales.max()) == own.scale.max_code
        largest = blocks.codes[x.abs() == x.abs().max()]
        assert (largest & 0x7F & (2 ** (own.element.bits - 1) - 1)).tolist() == [
            own.element.max_code
        ]
        # In each block, since its scale is within a sixteenth of what it should be.
        sizes = decode(blocks.codes, own.element).abs().view(*blocks.scales.shape, 16)
        normal = decode(blocks.scales, own.scale) >= finfo(own.scale).smallest_normal
        assert int(normal.sum()) > 10
        assert bool((sizes.amax(-1)[normal] >= 0.9 * finfo(own.element).max).all())
        row = x[x.abs().amax(1) == x.abs().max()].double()
        back = dequantize_blocks(quantize_blocks(row.float(), own), own)
        assert bool((back - row).norm() < 0.04 * row.norm())


def test_codes_of_every_integer_dtype_and_own_formats() -> None:
    """uint8 and uint16 views decode as they are; a BlockFormat can be one's own."""
    half = torch.tensor([1.0, -2.5], dtype=torch.float16)
    assert decode(half.view(torch.uint16), "float16").tolist() == [1.0, -2.5]
    own = BlockFormat("own", OTHERS["float8_e3m4"], block_size=4)
    x = torch.tensor([1.0, 2.0, 3.0, -30.0])
    assert dequantize_blocks(quantize_blocks(x, own), own).tolist() == x.tolist()
    for a, b in itertools.pairwise(table(OTHERS["float8_e4m3"])[:120].tolist()):
        assert a < b
