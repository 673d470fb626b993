"""Turn float tensors into FP8 and FP4 codes and back, saturating, a cache at a time.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

What every recipe shares: the casts themselves. They saturate explicitly, whatever the
installed torch does (up to 2.12 its E4M3 cast gives NaN beyond 448; its E5M2 cast gives
Inf), and they run over pieces that fit the cache, which makes a quantization with its
inverse faster than torch's cast there and back.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_numerics.py
    Sources: Micikevicius et al. 2022, arXiv:2209.05433, section 3 (E4M3, E5M2);
             Rouhani et al. 2023, arXiv:2310.10537 (E8M0, E2M1);
             NVIDIA Transformer Engine 2.20, common/util/ptx.cuh (rounding of E2M1).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Iterator
from difflib import get_close_matches

import torch
from torch import Generator, Tensor

__all__ = ["FP4_MAX", "FP8_MAX", "decode_fp4", "decode_fp8", "encode_fp4", "encode_fp8"]

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
FP4_MAX = 6.0
_NAMES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)

# Elements handled at once: half a megabyte of float32 stays in a core's second cache.
_PIECE = 1 << 17
# E2M1 in the order of its codes; the upper eight codes are the negative ones.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp8_dtype(fmt: torch.dtype | str) -> torch.dtype:
    """Return the torch dtype that ``fmt`` names.

    Args:
        fmt: ``torch.float8_e4m3fn`` or ``"E4M3"``, ``torch.float8_e5m2`` or ``"E5M2"``.

    Returns:
        One of the two dtypes.

    Raises:
        ValueError: ``fmt`` is anything else.

    Example:
        >>> fp8_dtype("E4M3")
        torch.float8_e4m3fn
    """
    if isinstance(fmt, torch.dtype) and fmt in FP8_MAX:
        return fmt
    if isinstance(fmt, str) and fmt in _NAMES:
        return _NAMES[fmt]
    close = get_close_matches(str(fmt).upper(), _NAMES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    allowed = "torch.float8_e4m3fn, torch.float8_e5m2, 'E4M3' or 'E5M2'"
    msg = f"fmt must be {allowed}, got {fmt!r}{hint}"
    raise ValueError(msg)


def check_input(x: Tensor) -> Tensor:
    """Return ``x`` without its graph, if it is of a dtype that can be quantized.

    Raises:
        TypeError: ``x`` is no tensor, or not float32, bfloat16 or float16.
    """
    got = getattr(x, "dtype", type(x).__name__)
    if got not in _INPUTS:
        msg = f"x must be float32, bfloat16 or float16, got {got}"
        raise TypeError(msg)
    return x.detach()


def encode_fp8(
    x: Tensor, dtype: torch.dtype, scale: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return the nearest codes of ``x * scale``, ties to even, saturating.

    The product is rounded to float32 first. Beyond the largest finite number, Inf
    included, the code is that number's; NaN stays NaN; zeros keep their sign.

    Args:
        x: float32, bfloat16 or float16, any shape.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale: float32, one element, or as many dimensions as ``x`` and broadcastable.
        out: Where to store the codes: ``dtype``, the shape of ``x``, contiguous.

    Returns:
        ``dtype``, the shape of ``x``, contiguous.

    Example:
        >>> x = torch.tensor([1.0, 0.3, 1e6, -1e6])
        >>> encode_fp8(x, torch.float8_e4m3fn, torch.ones(())).tolist()
        [1.0, 0.3125, 448.0, -448.0]
    """
    largest = FP8_MAX[dtype]
    codes = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    buffer: Tensor | None = None
    for part, factor, stored in _pieces(x, scale, codes):
        if buffer is None:
            buffer = torch.empty(part.shape, dtype=torch.float32, device=x.device)
        product = buffer[: part.shape[0]]
        if part.dtype == torch.float32:
            torch.mul(part, factor, out=product)
        else:  # in float32, not in the 8 or 11 bits of x
            product.copy_(part).mul_(factor)
        stored.copy_(product.clamp_(-largest, largest))
    return codes


def decode_fp8(
    codes: Tensor, scale: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return the values of ``codes``, times ``scale``, in float32.

    E4M3 in the upper half of a float16 is the same number times 2**-8: three integer
    operations and a conversion that the processor has, where torch's takes 3 ns each.

    Args:
        codes: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``, any shape.
        scale: float32, one element, or as many dimensions as ``codes`` and
            broadcastable; 1 if None.
        out: Where to store the values: float32, the shape of ``codes``, contiguous.

    Returns:
        float32, the shape of ``codes``, contiguous. NaN and Inf codes are NaN and Inf.

    Example:
        >>> codes = torch.tensor([1.0, -0.0, 448.0]).to(torch.float8_e4m3fn)
        >>> decode_fp8(codes, torch.tensor(0.5)).tolist()
        [0.5, -0.0, 224.0]
    """
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    one = torch.ones((), device=codes.device) if scale is None else scale
    wide: Tensor | None = None
    for part, factor, values in _pieces(codes, one, out):
        if part.dtype == torch.float8_e5m2:
            values.copy_(part)
        else:
            if wide is None:
                wide = torch.empty(part.shape, dtype=torch.int16, device=codes.device)
            bits = wide[: part.shape[0]].copy_(part.view(torch.int8))
            bits.mul_(128).bitwise_and_(~0x4000)  # the sign is copied into bit 14, too
            values.copy_(bits.view(torch.float16)).mul_(256.0)
            magnitude = part.view(torch.uint8) & 0x7F
            if magnitude.numel() and magnitude.max() == 0x7F:
                values.masked_fill_(magnitude == 0x7F, torch.nan)
        if scale is not None:
            values.mul_(factor)
    return out


def encode_fp4(
    x: Tensor,
    scale: Tensor,
    stochastic: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Return the E2M1 codes of ``x * scale``, two a byte, element 0 in the low nibble.

    The product is rounded to float32 first. Then to nearest with ties to even, or, if
    ``stochastic``, up or down at random with the product as the mean: ``u * step`` is
    added to the magnitude, with ``u`` one of the 256 multiples of 1/256 in [0, 1), and
    the sum is cut off. Beyond 6 the code is that of 6 and NaN is +6, since E2M1 has
    neither Inf nor NaN; zeros keep their sign.

    Args:
        x: float32, bfloat16 or float16, the last dimension a multiple of 16.
        scale: float32, one element, or as many dimensions as ``x`` and broadcastable.
        stochastic: Round at random.
        generator: Of the random bits, 8 an element, drawn in logical order.

    Returns:
        uint8, the shape of ``x`` with half the last dimension.

    Example:
        >>> encode_fp4(torch.tensor([0.5, -6.0] * 8), torch.ones(())).tolist()[0]
        241
    """
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    largest = torch.tensor(FP4_MAX, device=x.device)
    for part, factor, stored in _pieces(x, scale, codes):
        product = part.float() * factor
        sign = (product.view(torch.int32) >> 28).to(torch.uint8).bitwise_and_(8)
        sign.masked_fill_(product.isnan(), 0)
        # fmin also makes NaN 6. Steps are 1/2 below 2, 1 below 4, and then 2.
        size = torch.fmin(product.abs_(), largest)
        if stochastic:
            words = torch.empty(size.numel() // 8, dtype=torch.int64, device=x.device)
            words.random_(-(2**63), None, generator=generator)
            u = words.view(torch.uint8).view(size.shape).float()
            size += u.mul_(_power(size).mul_(2.0**-9))  # half the power is the step
        else:
            # Adding 2**23 steps and a half of that leaves no room for a fraction.
            magic = _power(size).mul_(0.75 * 2.0**23)
            size = size.add_(magic).sub_(magic)
        power = _power(size).view(torch.int32)
        inverse = (0x7F800000 - power).view(torch.float32)  # one over the step
        code = size.mul_(inverse).to(torch.uint8)
        # Each step upward is two codes further on.
        code += (power >> 22).to(torch.uint8) + 2
        stored.copy_(code.bitwise_or_(sign))
    pairs = codes.view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def decode_fp4(codes: Tensor) -> Tensor:
    """Return the values of E2M1 codes that lie two a byte.

    Args:
        codes: uint8, as `encode_fp4` returns them.

    Returns:
        float32, the shape of ``codes`` with twice the last dimension.

    Example:
        >>> decode_fp4(torch.tensor([241], dtype=torch.uint8)).tolist()
        [0.5, -6.0]
    """
    values = [*_E2M1, *(-v for v in _E2M1)]
    pairs = [(low, high) for high in values for low in values]
    table = torch.tensor(pairs, device=codes.device)  # [256, 2]
    picked = table.index_select(0, codes.reshape(-1).int())
    return picked.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def block_amax(tiles: Tensor) -> Tensor:
    """Return the largest magnitude of each block, NaN left out, as `fmaxf` does.

    Args:
        tiles: [R, block rows, C, block columns].

    Returns:
        float32, [R, C]; 0 where all elements are NaN.
    """
    rows, _, columns, _ = tiles.shape
    amax = torch.empty(rows, columns, device=tiles.device)
    if not amax.numel():
        return amax
    step = max(1, _PIECE // max(1, tiles[0].numel()))
    for start in range(0, rows, step):
        part = tiles[start : start + step]
        size = _reduce(part.abs())
        if size.isnan().any():
            size = _reduce(part.abs().nan_to_num_(nan=0.0, posinf=torch.inf))
        amax[start : start + step] = size
    return amax


def _reduce(size: Tensor) -> Tensor:
    width = size.shape[3]
    if width == 16:  # torch reduces short rows slowly
        while width > 1:
            width //= 2
            size = torch.maximum(size[..., :width], size[..., width:])
    return size.amax((1, 3))


def _power(size: Tensor) -> Tensor:
    """Return the power of two at or below ``size``, at least 1."""
    bits = size.view(torch.int32) & 0x7F800000
    return bits.clamp_(min=0x3F800000).view(torch.float32)


def _pieces(
    source: Tensor, scale: Tensor, target: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if scale.numel() == 1:
        source, target = source.reshape(-1), target.view(-1)
        scale = scale.reshape(())
    if not source.numel():
        return
    step = max(1, _PIECE // source[0].numel())
    for start in range(0, source.shape[0], step):
        part = slice(start, start + step)
        broadcast = scale.dim() == 0 or scale.shape[0] == 1
        yield source[part], scale if broadcast else scale[part], target[part]
