"""The laws that the pages on number formats state, checked against PyTorch's casts."""

import pytest
import torch
from torch import Tensor

NARROW = [torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn]
HALF = [torch.bfloat16, torch.float16]


def fields(dtype: torch.dtype) -> tuple[int, int]:
    """Return ``exponent_bits`` and ``mantissa_bits`` as the page derives them."""
    info = torch.finfo(dtype)
    mantissa_bits = 0
    while 2.0 ** -(mantissa_bits + 1) >= info.eps:
        mantissa_bits += 1
    return info.bits - 1 - mantissa_bits, mantissa_bits


def every_value(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return all codes of a format as int64, and their values as float64."""
    bits = torch.finfo(dtype).bits
    codes = torch.arange(2**bits)
    integer = {8: torch.uint8, 16: torch.uint16}[bits]
    return codes, codes.to(integer).view(dtype).double()


def ulp(x: Tensor, mantissa_bits: int) -> Tensor:
    """Return the step of the format at ``x``: float64, normal range only."""
    _, exponent = torch.frexp(x.abs())  # |x| = f * 2**exponent with 1/2 <= f < 1
    return torch.ldexp(torch.ones_like(x), exponent - 1 - mantissa_bits)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_bits_spell_the_value(dtype: torch.dtype) -> None:
    """Every finite code is ``(-1)^s 2^(e-b) (1 + m 2^-p)``, or subnormal at e = 0."""
    w, p = fields(dtype)
    codes, values = every_value(dtype)
    s, e, m = codes >> (w + p), (codes >> p) & (2**w - 1), codes & (2**p - 1)
    bias = 2 ** (w - 1) - 1
    sign = 1.0 - 2.0 * s
    normal = sign * torch.exp2((e - bias).double()) * (1 + m * 2.0**-p)
    subnormal = sign * 2.0 ** (1 - bias) * (m * 2.0**-p)
    spelled = torch.where(e > 0, normal, subnormal)
    finite = values.isfinite()

    assert torch.equal(spelled[finite], values[finite])
    # IEEE formats give the whole last exponent to infinities and NaNs; E4M3 one code.
    special = 2 if dtype == torch.float8_e4m3fn else 2 * 2**p
    assert int((~finite).sum()) == special


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_is_off_by_at_most_half_a_step(dtype: torch.dtype) -> None:
    """``|fl(x) - x| <= ulp(x) / 2 <= 2^-(p+1) |x|``, and a tie reaches the bound."""
    _, p = fields(dtype)
    torch.manual_seed(0)
    low, high = (-14, 15) if dtype == torch.float16 else (-126, 127)
    x = torch.exp2(torch.empty(200_000, dtype=torch.float64).uniform_(low, high))
    x = torch.cat([x, -x]).float().double()  # one rounding, not two
    error = (x.float().to(dtype).double() - x).abs()

    assert bool((error <= ulp(x, p) / 2).all())
    assert bool((ulp(x, p) / 2 <= 2.0 ** -(p + 1) * x.abs()).all())
    tie = torch.tensor(1 + 2.0 ** -(p + 1))
    assert abs(tie.to(dtype).item() - tie.item()) == 2.0 ** -(p + 1)


def test_update_below_half_a_step_is_lost() -> None:
    """A bfloat16 weight keeps its value under any update below half its inner step."""
    _, p = fields(torch.bfloat16)
    _, values = every_value(torch.bfloat16)
    info = torch.finfo(torch.bfloat16)
    # The update is a bfloat16 as well: no weight so small that it would be subnormal.
    large_enough = values.abs() >= 2 ** (p + 2) * info.smallest_normal
    w = values[values.isfinite() & large_enough]
    # Toward zero the step of a power of two is the smaller one of the values below it.
    mantissa, _ = torch.frexp(w.abs())
    step = torch.where(mantissa == 0.5, ulp(w, p) / 2, ulp(w, p))
    weight = w.bfloat16()
    for fraction, moves in ((0.49, False), (0.51, True)):
        update = (fraction * step * w.sign()).bfloat16()
        moved = weight - update != weight

        assert bool(moved.all()) is moves
        assert bool(moved.any()) is moves
