"""Take any float format of deep learning apart: its codes, values, steps and edges.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

A format is a few integers, a `FloatFormat`; `FORMATS` has them by torch's and
ml_dtypes' names. All is integer arithmetic on the 64 bits of a float64, which holds
every value of every format: written to check others against, not for speed.

    Guide:   background/number_formats
    Tests:   tests/test_number_formats.py
    Sources: IEEE 754-2019, sections 3.4 and 4.3 (binary formats, roundings);
             Micikevicius et al. 2022, arXiv:2209.05433, section 3 (E4M3, E5M2);
             Noune et al. 2022, arXiv:2206.02915 (the fnuz forms);
             Open Compute Project 2023, Microscaling Formats 1.0, sections 5 and 6;
             NVIDIA Transformer Engine 2.20, common/cast/nvfp4/core_nvfp4.cuh.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from types import SimpleNamespace
from typing import NamedTuple, TypeVar

import torch
from torch import Generator, Tensor

__all__ = ["BLOCK_FORMATS", "FORMATS", "BlockFormat", "Blocks", "FloatFormat"]
__all__ += ["decode", "dequantize_blocks", "encode", "finfo", "neighbours"]
__all__ += ["quantize_blocks", "round_to", "table", "ulp"]

_ROUNDINGS = ("nearest", "toward_zero", "up", "down", "stochastic")
_NANS = ("ieee", "all_ones", "negative_zero", None)
_MANTISSA, _BIAS = 52, 1023  # of float64
_FRACTION = 62  # bits that say where between two neighbors a number lies
_PART = 1 << 15  # elements at a time: what is between the steps stays in the cache
_Format = TypeVar("_Format", "FloatFormat", "BlockFormat")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _choose(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    meant = re.sub("^fp", "float", str(value).lower())
    close = get_close_matches(meant, list(filter(None, allowed)), n=1, cutoff=0.45)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    _need(value in allowed, f"{name} must be one of {allowed}, got {value!r}{hint}")


def _named(fmt: _Format | str, known: dict[str, _Format]) -> _Format:
    if isinstance(fmt, str) or type(fmt) not in set(map(type, known.values())):
        _choose("fmt", fmt, tuple(known))
        return known[str(fmt)]
    return fmt


def _by_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    size = _PART if x.device.type == "cpu" else max(x.numel(), 1)
    return torch.cat([function(part) for part in torch.split(x.flatten(), size)], -1)


@dataclass(frozen=True)
class FloatFormat:
    """A binary float format; ValueError if it contradicts itself or exceeds float64.

    A code is, from the top, the sign, the exponent field ``e`` and the mantissa field
    ``m``; its value is ``2**(e - bias) * (1 + m / 2**mantissa_bits)``, and where ``e``
    is 0 the subnormal ``2**(1 - bias) * m / 2**mantissa_bits``.
    """

    name: str
    exponent_bits: int  # 2 to 11
    mantissa_bits: int  # as stored, without the leading 1; 0 to 52
    bias: int
    has_inf: bool = False  # exactly where NaN is "ieee"
    # The codes of NaN. "ieee": all with a full exponent field but Inf; "all_ones":
    # those full in both fields; "negative_zero": what would be -0; None: no code.
    nan_encoding: str | None = None
    has_sign: bool = True
    has_zero: bool = True  # zero and subnormals; without, e = 0 is as any other

    def __post_init__(self) -> None:
        _choose("nan_encoding", self.nan_encoding, _NANS)
        ieee, no_sign = self.has_inf, not (self.has_sign and self.has_zero)
        counts = self.exponent_bits, self.mantissa_bits, self.bias
        _need(all(type(n) is int for n in counts), f"bits and bias are int: {self}")
        for needed, there in {
            "2 to 11 exponent bits": 2 <= self.exponent_bits <= 11,
            "0 to 52 mantissa bits": 0 <= self.mantissa_bits <= _MANTISSA,
            "has_inf for 'ieee', and only then": ieee == (self.nan_encoding == "ieee"),
            "a mantissa with Inf": self.mantissa_bits != 0 or not ieee,
            "a -0 to be NaN": self.nan_encoding != "negative_zero" or not no_sign,
        }.items():
            _need(there, f"a format needs {needed}: {self}")
        low, high = self.min_exponent, self.max_exponent
        _need(low > -_BIAS and high <= _BIAS, f"float64 does not hold {self}")

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return self.has_sign + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return self.has_zero - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number: ``emax`` in the OCP's rules."""
        last = self.max_code + self.first_rank
        return self.min_exponent + (last >> self.mantissa_bits) - 1

    @property
    def max_code(self) -> int:
        """Code of the largest finite number; the next is that of Inf, if there is."""
        ones = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        specials = {"ieee": 1 << self.mantissa_bits, "all_ones": 1}
        return ones - specials.get(self.nan_encoding or "", 0)

    @property
    def nan_code(self) -> int:
        """Code that `encode` gives NaN, its sign aside; a quiet NaN in IEEE 754."""
        if self.nan_encoding == "negative_zero":
            return 1 << (self.bits - 1)
        quiet = 1 << self.mantissa_bits >> 1 if self.has_inf else 0
        return (self.max_code + 1) | quiet

    @property
    def first_rank(self) -> int:
        """Rank of code 0: 0 has rank 0, and each number one more than the last."""
        return 0 if self.has_zero else 1 << self.mantissa_bits


FORMATS = {
    name: FloatFormat(name, *data)
    for name, *data in (
        ("float64", 11, 52, 1023, True, "ieee"),
        ("float32", 8, 23, 127, True, "ieee"),
        ("tf32", 8, 10, 127, True, "ieee"),
        ("float16", 5, 10, 15, True, "ieee"),
        ("bfloat16", 8, 7, 127, True, "ieee"),
        ("float8_e4m3fn", 4, 3, 7, False, "all_ones"),
        ("float8_e5m2", 5, 2, 15, True, "ieee"),
        ("float8_e4m3fnuz", 4, 3, 8, False, "negative_zero"),
        ("float8_e5m2fnuz", 5, 2, 16, False, "negative_zero"),
        ("float6_e3m2fn", 3, 2, 3, False, None),
        ("float6_e2m3fn", 2, 3, 1, False, None),
        ("float4_e2m1fn", 2, 1, 1, False, None),
        ("float8_e8m0fnu", 8, 0, 127, False, "all_ones", False, False),
    )
}


def encode(
    x: Tensor | float,
    fmt: FloatFormat | str,
    rounding: str = "nearest",
    overflow: str = "saturate",
    generator: Generator | None = None,
) -> Tensor:
    """Return the codes of ``x``, int64: of the value itself, or of a neighbor of it.

    Zeros keep their sign, except in the fnuz formats, which have no -0. NaN becomes
    ``fmt.nan_code`` with its sign. In a format without a sign (E8M0) negative numbers
    are NaN, and what is below its smallest number, zeros included, becomes that. Codes
    of float64 fill an int64, so those of negative numbers are negative.

    Args:
        x: Of a floating-point dtype; a number counts as float64.
        fmt: A format, or its name in `FORMATS`.
        rounding: "nearest", ties to the even significand; "toward_zero"; "up" and
            "down", to +Inf and -Inf; "stochastic", with ``x`` as the mean, to 62 bits.
        overflow: Beyond the largest number, or where rounding leads there: "saturate"
            for the largest, for Inf as well; "ieee" for Inf, or NaN where there is no
            Inf, but the largest where the rounding is toward zero.
        generator: For "stochastic": one number an element is drawn, in logical order.

    A wrong dtype is a TypeError; unknown names, a ``generator`` without "stochastic",
    and "ieee", NaN or what becomes NaN in a format without one are a ValueError.

    Example:
        >>> encode(torch.tensor([1.0, 0.3, -1e6]), "float8_e4m3fn").tolist()
        [56, 42, 254]
    """
    fmt, x = _named(fmt, FORMATS), _float64(x)
    _choose("rounding", rounding, _ROUNDINGS)
    _choose("overflow", overflow, ("saturate", "ieee"))
    drawing = generator is None or rounding == "stochastic"
    _need(drawing, f"generator is for rounding='stochastic', not {rounding!r}")
    if fmt.nan_encoding is None:
        _need(overflow == "saturate", f"{fmt.name} has no Inf or NaN: use 'saturate'")
        _need(not x.isnan().any(), f"{fmt.name} has no NaN, but x has")
        fits = fmt.has_sign or not (x < 0).any()
        _need(fits, f"{fmt.name} has neither a sign nor NaN, but x is negative")

    def encode_part(x: Tensor) -> Tensor:
        nan, negative, (rank, fraction) = x.isnan(), x.signbit(), _place(x, fmt)
        if rounding == "nearest":
            half, p = 1 << (_FRACTION - 1), fmt.mantissa_bits
            odd = rank & 1 == 1 if p else rank > 0  # without a mantissa, 1 is all
            away = (fraction > half) | ((fraction == half) & odd)
        elif rounding == "stochastic":
            high, shape, device = 1 << _FRACTION, x.shape, x.device
            draw = torch.randint(high, shape, generator=generator, device=device)
            away = fraction > draw
        else:
            none = torch.zeros_like(negative)
            directions = {"up": ~negative, "down": negative, "toward_zero": none}
            away = directions[rounding] & (fraction > 0)
        codes = (rank + away).clamp(min=fmt.first_rank) - fmt.first_rank

        over = (codes > fmt.max_code) | x.isinf()
        codes = codes.clamp(max=fmt.max_code).masked_fill(over, fmt.max_code)
        if overflow == "ieee":
            if rounding in {"toward_zero", "up", "down"}:
                over &= x.isinf() | directions[rounding]
            codes.masked_fill_(over, fmt.max_code + 1 if fmt.has_inf else fmt.nan_code)
        if fmt.nan_encoding is not None:
            codes.masked_fill_(nan if fmt.has_sign else nan | (x < 0), fmt.nan_code)
        if fmt.nan_encoding == "negative_zero":
            negative &= codes != 0
        return codes | (negative & fmt.has_sign).long() << (fmt.bits - 1)

    return _by_parts(encode_part, x).view(x.shape)


def decode(codes: Tensor, fmt: FloatFormat | str) -> Tensor:
    """Return the float64 values of integer codes, exactly; NaN for every NaN code."""
    fmt = _named(fmt, FORMATS)
    codes = _codes(codes, fmt)

    def decode_part(codes: Tensor) -> Tensor:
        magnitude = codes & ((1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1)
        values = _value(magnitude + fmt.first_rank, fmt)
        values.masked_fill_(magnitude > fmt.max_code, torch.nan)
        if fmt.has_inf:
            values.masked_fill_(magnitude == fmt.max_code + 1, torch.inf)
        if fmt.nan_encoding == "negative_zero":
            values.masked_fill_(codes == fmt.nan_code, torch.nan)
        return torch.where(codes == magnitude, values, -values)

    return _by_parts(decode_part, codes).view(codes.shape)


def round_to(
    x: Tensor | float,
    fmt: FloatFormat | str,
    rounding: str = "nearest",
    overflow: str = "saturate",
    generator: Generator | None = None,
) -> Tensor:
    """Return ``x`` rounded to values of a format: `encode`, whose rules hold, decoded.

    float32 stays float32 if it holds every value of the format; else it is float64.
    """
    fmt = _named(fmt, FORMATS)
    values = decode(encode(x, fmt, rounding, overflow, generator), fmt)
    fits = fmt.mantissa_bits <= 23 and fmt.max_exponent <= 127
    fits &= fmt.min_exponent - fmt.mantissa_bits >= -149
    narrow = isinstance(x, Tensor) and x.dtype == torch.float32
    return values.float() if narrow and fits else values


def neighbours(x: Tensor | float, fmt: FloatFormat | str) -> tuple[Tensor, Tensor]:
    """Return the largest value of a format below ``x`` and the smallest above, float64.

    Infinities count where the format has them. NaN where there is none, and for NaN.
    """
    fmt, x = _named(fmt, FORMATS), _float64(x)
    last = fmt.max_code + fmt.first_rank
    top = last + fmt.has_inf
    lowest = -top if fmt.has_sign else fmt.first_rank

    def value(rank: Tensor, x: Tensor) -> Tensor:
        values = _value(rank.abs().clamp(max=last), fmt)
        values.masked_fill_(rank.abs() > last, torch.inf)
        values = torch.where(rank < 0, -values, values)
        return values.masked_fill(x.isnan() | (rank < lowest) | (rank > top), torch.nan)

    def both_of_part(x: Tensor) -> Tensor:
        infinite, (rank, fraction) = x.isinf(), _place(x, fmt)
        between = (((fraction > 0) | (rank > last)) & ~infinite).long()
        rank = rank.clamp(max=last) + infinite.long()
        # Ranks below zero are those of the negative numbers.
        floor = torch.where(x.signbit(), -rank - between, rank)
        below, above = floor - 1 + between, (floor + 1).clamp(min=lowest)
        return torch.stack([value(below, x), value(above, x)])

    below, above = _by_parts(both_of_part, x).view(2, *x.shape)
    return below, above


def ulp(x: Tensor | float, fmt: FloatFormat | str) -> Tensor:
    """Return the step from ``x`` away from zero, as float64; at most the last one."""
    fmt, x = _named(fmt, FORMATS), _float64(x)
    # Without a mantissa each step is larger than the last; float64 ends with its last.
    last = fmt.max_code + fmt.first_rank - (fmt.mantissa_bits > 0)

    def step_of_part(x: Tensor) -> Tensor:
        rank = _place(x, fmt)[0].clamp(fmt.first_rank, last)
        step = _value(rank + 1, fmt) - _value(rank, fmt)
        return step.masked_fill(x.isnan(), torch.nan)

    return _by_parts(step_of_part, x).view(x.shape)


def finfo(fmt: FloatFormat | str) -> SimpleNamespace:
    """Return the limits of a format by torch's names; ``eps`` is the step up from 1."""
    fmt = _named(fmt, FORMATS)
    last = fmt.max_code + fmt.first_rank
    ranks = [last, 1 << fmt.mantissa_bits, max(fmt.first_rank, 1)]
    largest, normal, least = _value(torch.tensor(ranks), fmt).tolist()
    info = SimpleNamespace(bits=fmt.bits, eps=2.0**-fmt.mantissa_bits, max=largest)
    info.min = -largest if fmt.has_sign else 0.0 if fmt.has_zero else least
    info.smallest_normal, info.smallest_subnormal = normal, least
    return info


def table(fmt: FloatFormat | str) -> Tensor:
    """Return the value of every code in order; above 20 bits it is a ValueError."""
    fmt = _named(fmt, FORMATS)
    _need(fmt.bits <= 20, f"{fmt.name} has 2**{fmt.bits} codes, a table at most 2**20")
    return decode(torch.arange(1 << fmt.bits), fmt)


class BlockFormat(NamedTuple):
    """Elements in one format, and a scale in another for ``block_size`` of them.

    A scale that has no zero, like E8M0, is a power of two as in MX. Any other is used
    as in NVFP4, beside a float32 of the tensor.
    """

    name: str
    element: FloatFormat
    scale: FloatFormat = FORMATS["float8_e8m0fnu"]
    block_size: int = 32


_E2M1, _E4M3 = FORMATS["float4_e2m1fn"], FORMATS["float8_e4m3fn"]
BLOCK_FORMATS = {
    "mxfp8_e4m3": BlockFormat("mxfp8_e4m3", _E4M3),
    "mxfp8_e5m2": BlockFormat("mxfp8_e5m2", FORMATS["float8_e5m2"]),
    "mxfp6_e3m2": BlockFormat("mxfp6_e3m2", FORMATS["float6_e3m2fn"]),
    "mxfp6_e2m3": BlockFormat("mxfp6_e2m3", FORMATS["float6_e2m3fn"]),
    "mxfp4": BlockFormat("mxfp4", _E2M1),
    "nvfp4": BlockFormat("nvfp4", _E2M1, _E4M3, 16),
}


class Blocks(NamedTuple):
    """Codes [..., K], codes of scales [..., K / block_size]; NVFP4's float32 amax."""

    codes: Tensor
    scales: Tensor
    amax: Tensor | None = None


def quantize_blocks(
    x: Tensor,
    fmt: BlockFormat | str,
    rounding: str = "nearest",
    generator: Generator | None = None,
) -> Blocks:
    """Return codes and scales of ``x`` in blocks along its last dimension.

    MX follows the OCP specification: a block's scale is ``X = 2**(floor(log2(amax)) -
    emax)``, with the ``emax`` of the elements, in the range of E8M0, the smallest for
    zeros; its codes are those of ``x / X``, saturating. NVFP4 follows Transformer
    Engine, each operation in float32: ``S = 2688 / amax`` of the tensor, the scale
    ``s`` the E4M3 of ``amax_block * (S * (1 / 6))``, the codes those of ``x * (1 / (s *
    (1 / S)))``. A block with Inf or NaN, which the specification leaves open, has the
    scale NaN and the codes 0, and does not count for the tensor's amax. A format of
    your own has its own largest numbers for NVFP4's 6, 448, and 2688 = 6 * 448.

    ``x`` is of a floating-point dtype, [..., K]; ``rounding`` and ``generator`` are for
    the elements, as in `encode`. A ValueError are a K that the block size does not
    divide, a format that is none, and float64 for NVFP4.
    """
    fmt, given = _named(fmt, BLOCK_FORMATS), getattr(x, "dtype", None)
    values, nvfp4, (top, reach) = _float64(x), fmt.scale.has_zero, _limits(fmt)
    narrow = not nvfp4 or given != torch.float64
    _need(narrow, f"{fmt.name} is defined in float32: cast x")
    fits = values.dim() > 0 and values.shape[-1] % fmt.block_size == 0
    got = f"multiple of {fmt.block_size}, got shape {list(values.shape)}"
    _need(fits, f"the last dimension for {fmt.name} must be a {got}")
    count = values.shape[-1] // fmt.block_size
    tiles = values.reshape(*values.shape[:-1], count, fmt.block_size)
    bad = ~tiles.isfinite().all(-1, keepdim=True)
    tiles = tiles.masked_fill(bad, 0.0)
    amax, largest = None, tiles.abs().amax(-1, keepdim=True)  # [..., count, 1]
    if nvfp4:
        largest, limit = largest.float(), torch.finfo(torch.float32).max
        amax = largest.amax() if largest.numel() else largest.new_zeros(())
        total = torch.div(largest.new_tensor(reach), amax).clamp(max=limit)
        scales = encode(largest * (total * largest.new_tensor(1 / top)), fmt.scale)
        divisor = decode(scales, fmt.scale).float() * total.reciprocal()
        scaled = tiles.float() * divisor.reciprocal().clamp(max=limit)
    else:
        power = _exponent(largest) - fmt.element.max_exponent
        scales = (power + fmt.scale.bias).clamp(0, fmt.scale.max_code)
        scaled = tiles / decode(scales, fmt.scale)
    codes = encode(scaled, fmt.element, rounding, generator=generator)
    scales = scales.masked_fill(bad, fmt.scale.nan_code).squeeze(-1)
    return Blocks(codes.reshape(values.shape), scales, amax)


def dequantize_blocks(blocks: Blocks, fmt: BlockFormat | str) -> Tensor:
    """Return what `quantize_blocks` made of a tensor, as float64.

    Element times scale, exactly; in NVFP4 ``element * (scale * amax * (1 / 2688))``,
    in float32, which is Inf where ``scale * amax`` is, as in Transformer Engine: an
    amax above 7.6e35 is too much for the largest scale, 448. Codes, scales and amax
    that do not belong together are a ValueError.
    """
    fmt, (codes, scales, amax) = _named(fmt, BLOCK_FORMATS), blocks
    reach = _limits(fmt)[1]
    shape = [*scales.shape[:-1], *(k * fmt.block_size for k in scales.shape[-1:])]
    fits = scales.dim() > 0 and shape == [*codes.shape]
    got = f"codes {[*codes.shape]}, scales {[*scales.shape]}, amax {amax}"
    single = isinstance(amax, Tensor) and amax.numel() == 1
    fits &= single if fmt.scale.has_zero else amax is None
    _need(fits, f"these are not blocks of {fmt.name}: {got}")
    tiles = decode(codes, fmt.element).reshape(*scales.shape, fmt.block_size)
    factor = decode(scales, fmt.scale).unsqueeze(-1)
    if amax is not None:
        factor = factor.float() * amax * amax.new_tensor(1 / reach)
        tiles = tiles.float()
    return (tiles * factor).double().reshape(codes.shape)


def _limits(fmt: BlockFormat) -> tuple[float, float]:
    """Check a format; return its largest element, and that times the largest scale."""
    top, scale = finfo(fmt.element).max, fmt.scale
    reach = top * finfo(scale).max
    _need(fmt.block_size > 0, f"a block has at least one element: {fmt}")
    _need(scale.nan_encoding is not None, f"a scale needs a NaN: {fmt}")
    powers = scale.mantissa_bits == 0
    _need(powers != scale.has_zero, f"a scale has either a mantissa or no zero: {fmt}")
    fits = powers or reach <= torch.finfo(torch.float32).max
    _need(fits, f"float32 does not hold the largest element times scale: {fmt}")
    return top, reach


def _place(x: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Return the rank of the value at or below |x|, and how far on |x| is, in 2**-62.

    Each power of two has ``2**mantissa_bits`` values, so that ranks are codes: the
    leading 1, added to the exponent field, makes that one larger. They go on beyond the
    last value. The distance is 0 only for ``x`` in the format.
    """
    bits, exponent = x.view(torch.int64) & torch.iinfo(torch.int64).max, _exponent(x)
    leading = (bits >> _MANTISSA > 0).long() << _MANTISSA
    significand = leading + (bits & ((1 << _MANTISSA) - 1))
    # How many of its bits the format has no place for: more in subnormal numbers.
    drop = _MANTISSA - fmt.mantissa_bits + (fmt.min_exponent - exponent).clamp(min=0)
    shift, left = drop.clamp(max=63), _FRACTION - drop
    kept = significand >> shift
    rest = significand - (kept << shift)
    fraction = (rest << left.clamp(min=0)) >> (-left).clamp(0, 63)
    rank = kept + ((exponent - fmt.min_exponent).clamp(min=0) << fmt.mantissa_bits)
    return rank, fraction.maximum((rest > 0).long())


def _value(rank: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the float64 of a rank: the inverse of `_place`."""
    p = fmt.mantissa_bits
    exponent, mantissa = rank >> p, rank & ((1 << p) - 1)
    biased = exponent - 1 + fmt.min_exponent + _BIAS
    normal = (biased << _MANTISSA) + (mantissa << (_MANTISSA - p))
    subnormal = mantissa.double() * 2.0 ** (fmt.min_exponent - p)
    return torch.where(exponent > 0, normal.view(torch.float64), subnormal)


def _exponent(x: Tensor) -> Tensor:
    """Return floor(log2(|x|)) of float64, at least -1022; 1024 of Inf and NaN."""
    return ((x.view(torch.int64) >> _MANTISSA) & 0x7FF).clamp(min=1) - _BIAS


def _float64(x: Tensor | float) -> Tensor:
    packed = getattr(torch, "float4_e2m1fn_x2", None)  # two codes in a byte
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != packed:
        return x.detach().double().contiguous()
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be a tensor of floats or a number, got {got}")
    return torch.tensor(x, dtype=torch.float64)


def _codes(codes: Tensor, fmt: FloatFormat) -> Tensor:
    got = getattr(codes, "dtype", type(codes).__name__)
    whole = isinstance(got, torch.dtype) and not got.is_floating_point
    if not whole or got == torch.bool or codes.is_complex():
        raise TypeError(f"codes must be a tensor of integers, got {got}")
    codes = codes.long()
    bad = codes[(codes >> min(fmt.bits, 63) != 0) & (fmt.bits < 64)].tolist()
    limit = f"codes of {fmt.name} are from 0 to {(1 << fmt.bits) - 1}"
    _need(not bad, f"{limit}, got {bad[:1]}")
    return codes
