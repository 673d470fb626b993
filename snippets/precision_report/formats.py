"""Formats and modes by name, and rounding to a format."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """A float format, and how many numbers share a scale: None for none, 0 for all."""

    mantissa_bits: int
    min_exponent: int  # of the smallest normal number
    max: float
    block: int | None = None

    @property
    def overflow(self) -> float:
        """Half a step beyond the largest number: from here it is Inf, with no scale."""
        if self.block is not None:
            return math.inf
        return self.max + 2.0 ** (math.frexp(self.max)[1] - 2 - self.mantissa_bits)

    @property
    def zero(self) -> float:
        """The largest number that rounds to zero."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits - 1)

    @property
    def normal(self) -> float:
        """The smallest normal number."""
        return 2.0**self.min_exponent

    @property
    def large(self) -> float:
        """Times a power of two a number beside whose ulp the last bit kept is one."""
        return 1.5 * 2.0 ** (52 - self.mantissa_bits)

    @property
    def integers(self) -> int:
        """Up to here all whole numbers are numbers of the format."""
        return 1 << (self.mantissa_bits + 1)


class Mode(NamedTuple):
    """What a precision computes in; FP8 is for linear layers, the rest is in BF16."""

    compute: str
    forward: str = ""  # FP8 format of inputs and weights of linear layers
    grad: str = ""  # and of grad_output
    stores: bool = False  # weights and optimizer states in `compute` as well

    @property
    def formats(self) -> set[str]:
        """All formats that it needs."""
        return {self.compute, self.forward, self.grad} - {""}


FORMATS = {
    "float16": Format(10, -14, 65504.0),
    "bfloat16": Format(7, -126, 255 * 2.0**120),
    "tf32": Format(10, -126, (2 - 2.0**-10) * 2.0**127),
    "float8_e4m3fn": Format(3, -6, 448.0, 0),
    "float8_e5m2": Format(2, -14, 57344.0, 0),
    "float8_e4m3fnuz": Format(3, -7, 240.0, 0),
    "float8_e5m2fnuz": Format(2, -15, 57344.0, 0),
    "mxfp8_e4m3": Format(3, -6, 448.0, 32),
    "mxfp8_e5m2": Format(2, -14, 57344.0, 32),
    "mxfp6_e3m2": Format(2, -2, 28.0, 32),
    "mxfp6_e2m3": Format(3, 0, 7.5, 32),
    "mxfp4": Format(1, 0, 6.0, 32),
}
DEFAULT = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "mxfp8_e4m3")
MODES = {  # the names are Lightning's; FP8's, which it has not, are of the recipes
    "bf16-mixed": Mode("bfloat16"),
    "16-mixed": Mode("float16"),
    "bf16-true": Mode("bfloat16", stores=True),
    "16-true": Mode("float16", stores=True),
    "fp8-delayed": Mode("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    "fp8-current": Mode("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    "mxfp8": Mode("bfloat16", "mxfp8_e4m3", "mxfp8_e4m3"),
}
ALIASES = {
    "bf16": "bf16-mixed",
    "16": "16-mixed",
    "transformer-engine": "fp8-delayed",
    "DelayedScaling": "fp8-delayed",
    "Float8CurrentScaling": "fp8-current",
    "MXFP8BlockScaling": "mxfp8",
}


def exponents(x: Tensor) -> Tensor:
    """Return floor(log2(abs(x))) of float64 as int64; -1023 for zeros."""
    return (x.view(torch.int64) >> 52).bitwise_and_(2047).sub_(1023)


class Pages(NamedTuple):
    """Properties of several formats, to meet a page of lines of numbers for each."""

    normal: Tensor
    large: Tensor
    zero: Tensor
    max: Tensor
    overflow: Tensor

    @classmethod
    def of(cls, formats: Iterable[Format]) -> "Pages":
        """Gather the properties."""
        values = [[getattr(fmt, name) for name in cls._fields] for fmt in formats]
        return cls(*torch.tensor(values, dtype=torch.float64).T[:, :, None, None])


def round_(x: Tensor, fmt: Format | Pages) -> Tensor:
    """Round float64 to nearest, ties to even, as if there were no largest number.

    Beside a number so much larger float64 has no bits below the last that the format
    keeps, so it rounds the sum there. That one must fit: ``x`` is less than 2**900.
    """
    power = (x.view(torch.int64) & 2047 << 52).view(torch.float64)  # mantissa is 0
    large = power.clamp_(fmt.normal).mul_(fmt.large)
    return (x + large).sub_(large)


def scales(fmt: Format, amax: Tensor) -> Tensor:
    """Return what to multiply with: amax becomes the largest number, or MX's power."""
    if fmt.block is None:
        return torch.ones_like(amax)
    amax = amax.clamp(min=2.0**-1000)
    if not fmt.block:
        return fmt.max / amax
    top = math.frexp(fmt.max)[1] - 1  # emax; X = 2**(floor(log2(amax)) - emax)
    return torch.exp2((top - exponents(amax)).clamp(max=127).double())
