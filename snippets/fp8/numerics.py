"""Quantize tensors to Transformer Engine's codes and scales, bit for bit, and back.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

The quantizers return ``(codes, inv_scale)``, one byte an element or less, and
`dequantize` inverts each of them. The scales are in ``scaling.py``, the casts in
``codes.py``; all that is public can be imported from here.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_numerics.py
    Sources: NVIDIA Transformer Engine 2.20, common/transpose/
             quantize_transpose_vector_blockwise.cu (blocks),
             common/util/ptx.cuh (E8M0),
             common/cast/nvfp4/core_nvfp4.cuh (two-level scales),
             pytorch/custom_recipes/reference_nvfp4.py (Hadamard transform);
             Micikevicius et al. 2022, arXiv:2209.05433, section 3 (E4M3, E5M2);
             Open Compute Project 2023, Microscaling Formats 1.0, section 6.3 ("floor");
             NVIDIA 2025, arXiv:2509.25149, section 4 (NVFP4).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math

import torch
from torch import Generator, Tensor

from .codes import (
    FP4_MAX,
    FP8_MAX,
    block_amax,
    check_input,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    fp8_dtype,
)
from .scaling import (
    FLOAT32_MAX,
    compute_amax,
    compute_current_scale,
    compute_scale,
    scale_of_amax,
    update_amax_history,
    update_delayed_scaling,
)

__all__ = [
    "compute_amax",
    "compute_current_scale",
    "compute_scale",
    "dequantize",
    "hadamard_transform",
    "quantize_block",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "quantize_tensor",
    "update_amax_history",
    "update_delayed_scaling",
]

_NVFP4_RANGE = FP4_MAX * FP8_MAX[torch.float8_e4m3fn]
_MX_BLOCK = 32
_NVFP4_BLOCK = 16
# dtype of inv_scale: the block length it is stored with where nothing else is said.
_BLOCKS = {
    torch.float32: 128,
    torch.float8_e8m0fnu: _MX_BLOCK,
    torch.float8_e4m3fn: _NVFP4_BLOCK,
}
# Of the randomized transform, fixed in Transformer Engine's kernels: 1 is a minus.
_SIGNS = 0b1101011111101000
_ROUNDINGS = ("up", "floor")


def quantize_tensor(
    x: Tensor,
    fmt: torch.dtype | str,
    scale: Tensor | float,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return FP8 codes of ``x * scale``, and ``1 / scale``.

    The product is rounded to float32, then to nearest with ties to even; what is
    larger than the format's largest number, Inf included, becomes that number. NaN
    stays NaN, zeros keep their sign.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        fmt: ``torch.float8_e4m3fn`` or ``"E4M3"``, ``torch.float8_e5m2`` or ``"E5M2"``.
        scale: One number, or a float32 tensor of one element.
        out: Where to store the codes: contiguous, the shape of ``x``.

    Returns:
        codes: The dtype of ``fmt``, the shape of ``x``, contiguous.
        inv_scale: float32, the shape of ``scale``.

    Any other dtype of ``x`` is a TypeError.

    Raises:
        ValueError: ``fmt`` is another format, or ``scale`` has several elements.

    Example:
        >>> codes, inv_scale = quantize_tensor(torch.tensor([0.5, 7.0]), "E4M3", 64.0)
        >>> codes.tolist(), inv_scale.item()
        ([32.0, 448.0], 0.015625)
    """
    x, dtype = check_input(x), fp8_dtype(fmt)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device).detach()
    if scale.numel() != 1:
        msg = f"scale must have one element, got shape {list(scale.shape)}"
        raise ValueError(msg)
    return encode_fp8(x, dtype, scale, out), scale.reciprocal()


def quantize_block(
    x: Tensor,
    fmt: torch.dtype | str,
    block: tuple[int, int] = (1, 128),
    power_of_2: bool = True,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return FP8 codes of ``x`` with a float32 scale for each block.

    The scale of a block is that of `compute_current_scale` for its amax, NaN left out;
    where the quotient is Inf it is the largest number of the dtype of ``x``. A block
    at the edge has the scale of the elements that exist.

    Args:
        x: float32, bfloat16 or float16, [..., K], seen as a matrix [rows, K].
        fmt: ``torch.float8_e4m3fn`` or ``"E4M3"``, ``torch.float8_e5m2`` or ``"E5M2"``.
        block: Rows and columns of a block: (1, 128) for activations and gradients,
            (128, 128) for weights. A transposed quantization is that of ``x.mT``.
        power_of_2: Round scales down to powers of two.
        epsilon: Smallest amax to use.

    Returns:
        codes: The dtype of ``fmt``, the shape of ``x``.
        inv_scale: float32, [ceil(rows / block[0]), ceil(K / block[1])], the logical
            order. (Transformer Engine stores 1 x 128 scales transposed, rows padded to
            a multiple of four.)

    Any other dtype of ``x`` is a TypeError.

    Raises:
        ValueError: ``fmt`` is another format, ``x`` has no dimensions, or ``block`` is
            not two positive integers.

    Example:
        >>> codes, inv_scale = quantize_block(torch.ones(2, 256), "E4M3")
        >>> codes[0, 0].item(), inv_scale.tolist()
        (256.0, [[0.00390625, 0.00390625], [0.00390625, 0.00390625]])
    """
    x, dtype = check_input(x), fp8_dtype(fmt)
    if [type(n) is int and n > 0 for n in block] != [True, True]:
        msg = f"block must be two positive integers, got {block!r}"
        raise ValueError(msg)
    tiles = _tiles(x, block)
    amax, largest = block_amax(tiles), torch.finfo(x.dtype).max
    scale = scale_of_amax(amax, FP8_MAX[dtype], power_of_2, epsilon, largest)
    return _encode_tiles(x, tiles, dtype, scale), scale.reciprocal()


def quantize_mxfp8(
    x: Tensor, fmt: torch.dtype | str, axis: int | None = -1, rounding: str = "up"
) -> tuple[Tensor, Tensor]:
    """Return FP8 codes of ``x`` with an E8M0 scale for each 32 elements: MXFP8.

    ``inv_scale`` is ``amax * (1 / fp8_max)`` rounded up to a power of two, so that
    nothing saturates; the codes are those of ``x / inv_scale``. NaN is left out of
    amax. An Inf makes it 2**127, and is stored as the largest number. A block of zeros
    has 2**-127, the smallest, for E8M0 has no zero.

    Args:
        x: float32, bfloat16 or float16, [..., K], seen as a matrix [rows, K].
        fmt: ``torch.float8_e4m3fn`` or ``"E4M3"``, ``torch.float8_e5m2`` or ``"E5M2"``.
        axis: -1 for blocks along a row, -2 for blocks along a column, None for blocks
            of 32 by 32 (Transformer Engine's ``enable_2d_quantization``).
        rounding: ``"up"``, or ``"floor"`` for the rule of the OCP specification,
            2**(floor(log2(amax)) - floor(log2(fp8_max))): the largest elements of some
            blocks saturate.

    Returns:
        codes: The dtype of ``fmt``, the shape of ``x``.
        inv_scale: ``torch.float8_e8m0fnu``, [rows, K / 32], [rows / 32, K], or
            [rows / 32, K / 32].

    Any other dtype of ``x`` is a TypeError.

    Raises:
        ValueError: ``fmt``, ``axis`` or ``rounding`` is another, or a dimension that is
            cut into blocks is no multiple of 32.

    Example:
        >>> codes, inv_scale = quantize_mxfp8(torch.full((1, 32), 3.0), "E4M3")
        >>> codes[0, 0].item(), inv_scale.float().item()
        (384.0, 0.0078125)
    """
    x, dtype = check_input(x), fp8_dtype(fmt)
    blocks = {-1: (1, 32), -2: (32, 1), 0: (32, 1), 1: (1, 32), None: (32, 32)}
    if axis not in blocks:
        msg = f"axis must be -1 (rows), -2 (columns) or None (32 x 32), got {axis!r}"
        raise ValueError(msg)
    if rounding not in _ROUNDINGS:
        msg = f"rounding must be one of {_ROUNDINGS}, got {rounding!r}"
        raise ValueError(msg)
    block = blocks[axis]
    if any(n % size for n, size in zip(_matrix(x), block, strict=True)):
        dims = list(x.shape)
        msg = f"MXFP8 requires tensor dims that are divisible by 32 (got shape={dims})"
        raise ValueError(msg)
    tiles = _tiles(x, block)
    amax = block_amax(tiles)
    if rounding == "up":
        exponent = _exponent_up(amax * (1.0 / FP8_MAX[dtype]))
    else:
        exponent = amax.view(torch.int32) >> 23
        exponent -= math.frexp(FP8_MAX[dtype])[1] - 1
        exponent.clamp_(0, 254)
    # The reciprocal, by its bits: that of 2**127 is subnormal.
    bits = torch.where(exponent == 254, 0x00400000, (254 - exponent) << 23)
    codes = _encode_tiles(x, tiles, dtype, bits.view(torch.float32))
    return codes, exponent.to(torch.uint8).view(torch.float8_e8m0fnu)


def _exponent_up(value: Tensor) -> Tensor:
    bits = value.view(torch.int32)
    exponent, rest = bits >> 23, bits & 0x7FFFFF
    up = (rest > 0) & ((exponent > 0) | (rest > 0x400000))
    return (exponent + up.int()).clamp_(max=254)


def hadamard_transform(x: Tensor, random_signs: bool = True) -> Tensor:
    """Return ``x`` with each 16 elements of a row rotated by one orthogonal matrix.

    ``x @ diag(signs) @ H / 4``, with Sylvester's Hadamard matrix ``H`` of order 16 and
    Transformer Engine's fixed signs: an outlier is spread over 16 elements, and the
    product of two matrices transformed along their common dimension is unchanged.

    Args:
        x: bfloat16, as in Transformer Engine, [..., K], K a multiple of 16.
        random_signs: Multiply by the signs; else ``H`` alone.

    Returns:
        bfloat16, the shape of ``x``.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: K is no multiple of 16.

    Example:
        >>> x = torch.zeros(16, dtype=torch.bfloat16)
        >>> x[0] = 4.0
        >>> hadamard_transform(x).unique().tolist()
        [1.0]
    """
    if x.dtype != torch.bfloat16:
        msg = f"RHT is only supported for bfloat16 input, got {x.dtype}"
        raise TypeError(msg)
    if not x.dim() or x.shape[-1] % _NVFP4_BLOCK:
        dims = list(x.shape)
        msg = f"the Hadamard transform needs a multiple of 16 columns, got shape={dims}"
        raise ValueError(msg)
    place = torch.arange(_NVFP4_BLOCK)
    both = place[:, None] & place
    # Minus where the two places have an odd number of common bits, or the sign is one.
    signs = _SIGNS if random_signs else 0
    odd = sum((both >> bit) & 1 for bit in range(4)) + ((signs >> place[:, None]) & 1)
    matrix = (0.25 - 0.5 * (odd % 2)).to(x.device)
    # In float32: bfloat16 units of processors take subnormals for zero.
    return (x.reshape(-1, _NVFP4_BLOCK).float() @ matrix).to(x.dtype).view(x.shape)


def quantize_nvfp4(
    x: Tensor,
    two_d: bool = False,
    hadamard: bool = False,
    stochastic: bool = False,
    generator: Generator | None = None,
    *,
    random_signs: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return FP4 codes of ``x`` with an E4M3 scale for each 16 and one for the tensor.

    With ``S = 2688 / amax`` for the tensor, the scale of a block is ``s =
    E4M3(amax_block * (S * (1 / 6)))``, and its codes are those of ``x * (1 / (s * (1 /
    S)))``, where each operation is rounded to float32. NaN is left out of both amax
    and becomes +6; Inf makes ``S`` 1, and a tensor of zeros does.

    Args:
        x: float32, bfloat16 or float16, [..., K], seen as a matrix [rows, K].
        two_d: Blocks of 16 by 16 instead of 1 by 16, for weights: the transposed
            tensor then has the same codes.
        hadamard: Apply `hadamard_transform` first: for the operands of the weight's
            gradient, which are passed transposed. bfloat16 only.
        stochastic: Round the codes at random, for gradients.
        generator: Of the random numbers, 8 bits an element, drawn in logical order.
        random_signs: Of the Hadamard transform.

    Returns:
        codes: uint8, [..., K / 2], element 0 in the low nibble.
        inv_scale: ``torch.float8_e4m3fn``, [rows, K / 16]; with ``two_d`` each scale
            stands in 16 rows.
        amax: float32, no dimensions.

    Any other dtype of ``x`` is a TypeError.

    Raises:
        ValueError: K, or with ``two_d`` the number of rows, is no multiple of 16.

    Example:
        >>> x = torch.tensor([[0.0, 0.5, 1.0, 6.0] * 4])
        >>> codes, inv_scale, amax = quantize_nvfp4(x)
        >>> codes[0, :2].tolist(), inv_scale.item(), amax.item()
        ([16, 114], 448.0, 6.0)
    """
    x = check_input(x)
    rows, columns = _matrix(x)
    if columns % _NVFP4_BLOCK or (two_d and rows % _NVFP4_BLOCK):
        dims = list(x.shape)
        msg = f"NVFP4 requires tensor dims that are divisible by 16 (got shape={dims})"
        raise ValueError(msg)
    if hadamard:
        x = hadamard_transform(x, random_signs)
    amax = compute_amax(x)
    tiles = _tiles(x, (_NVFP4_BLOCK if two_d else 1, _NVFP4_BLOCK))
    largest = torch.tensor(_NVFP4_RANGE, device=x.device)
    total = torch.div(largest, amax).clamp_(max=FLOAT32_MAX)
    total = torch.where((amax == 0) | (total == 0), 1.0, total)
    sixth = torch.tensor(1.0 / FP4_MAX, device=x.device)
    wanted = block_amax(tiles) * (total * sixth)
    e4m3 = torch.float8_e4m3fn
    inv_scale = wanted.clamp_(max=FP8_MAX[e4m3]).to(e4m3)
    scale = (decode_fp8(inv_scale) * total.reciprocal()).reciprocal_()
    scale.clamp_(max=FLOAT32_MAX)
    codes = encode_fp4(tiles, scale[:, None, :, None], stochastic, generator)
    codes = codes.view(*x.shape[:-1], columns // 2)
    if two_d:
        inv_scale = inv_scale.repeat_interleave(_NVFP4_BLOCK, 0)
    return codes, inv_scale, amax


def dequantize(
    codes: Tensor,
    inv_scale: Tensor,
    amax: Tensor | None = None,
    *,
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Return the numbers that codes and scales stand for.

    ``codes * inv_scale``, rounded to float32; for NVFP4, which has uint8 codes,
    ``codes * (inv_scale * amax * (1 / 2688))``. Then rounded to ``dtype``.

    Args:
        codes: From any of the quantizers.
        inv_scale: What it came with.
        amax: Of the whole tensor, for NVFP4.
        block: Rows and columns of a block. If None it is read off the shapes: along
            each dimension 1 where ``inv_scale`` is as long as ``codes``, and otherwise
            128 for float32, 32 for E8M0 and 16 for E4M3 scales.
        dtype: Of the result: float32, bfloat16 or float16.
        out: Where to store a float32 result: contiguous, the shape of the result.

    Returns:
        ``dtype``, the shape of what was quantized, contiguous. A Hadamard transform is
        not undone.

    Raises:
        TypeError: ``codes`` is of a dtype that no quantizer returns.
        ValueError: ``inv_scale`` does not fit ``codes``, or ``amax`` is missing or
            superfluous.

    Example:
        >>> codes, inv_scale = quantize_tensor(torch.tensor([0.5, 7.1]), "E4M3", 64.0)
        >>> dequantize(codes, inv_scale).tolist()
        [0.5, 7.0]
    """
    if codes.dtype not in {*FP8_MAX, torch.uint8}:
        allowed = "torch.float8_e4m3fn, torch.float8_e5m2 or, for NVFP4, torch.uint8"
        msg = f"codes must be {allowed}, got {codes.dtype}"
        raise TypeError(msg)
    if (codes.dtype == torch.uint8) != (amax is not None):
        msg = "amax is for NVFP4, which has uint8 codes, and needed there"
        raise ValueError(msg)
    if amax is not None:
        values = decode_fp4(codes)
        values = values if out is None else out.copy_(values)
        scale = decode_fp8(inv_scale) * amax * torch.tensor(1.0 / _NVFP4_RANGE)
        tiles = _tiles(values, block_of(values, inv_scale, block))
        tiles.mul_(scale[:, None, :, None])
        return values.to(dtype)
    if inv_scale.dtype == torch.float32 and inv_scale.numel() == 1 and block is None:
        return decode_fp8(codes, inv_scale, out).to(dtype)
    if inv_scale.dtype not in _BLOCKS:
        msg = f"inv_scale must be one of {tuple(_BLOCKS)}, got {inv_scale.dtype}"
        raise ValueError(msg)
    block = block_of(codes, inv_scale, block)
    tiles, scale = _tiles(codes, block), inv_scale.float()[:, None, :, None]
    whole = tiles.numel() == codes.numel()
    target = out.view(tiles.shape) if out is not None and whole else None
    values = _crop(decode_fp8(tiles, scale, target), codes.shape)
    if out is not None:
        values = out if whole else out.copy_(values)
    return values.to(dtype)


def _matrix(x: Tensor) -> tuple[int, int]:
    if not x.dim():
        msg = "x must have at least one dimension, got a number"
        raise ValueError(msg)
    return math.prod(x.shape[:-1]), x.shape[-1]


def _tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return [..., K] as [R, block[0], C, block[1]], zeros beyond its edges."""
    rows, columns = _matrix(x)
    height, width = block
    tall, wide = -(-rows // height), -(-columns // width)
    x = x.reshape(rows, columns)
    if (tall * height, wide * width) != (rows, columns):
        padded = x.new_zeros(tall * height, wide * width)
        padded[:rows, :columns] = x
        x = padded
    return x.view(tall, height, wide, width)


def _crop(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Return what `_tiles` made of a tensor of ``shape`` in that shape again."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    height, width = tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3]
    matrix = tiles.view(height, width)
    return matrix[:rows, :columns].reshape(shape)


def _encode_tiles(
    x: Tensor, tiles: Tensor, dtype: torch.dtype, scale: Tensor
) -> Tensor:
    return _crop(encode_fp8(tiles, dtype, scale[:, None, :, None]), x.shape)


def block_of(
    codes: Tensor, inv_scale: Tensor, block: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return rows and columns of a block, as `dequantize` reads them off the shapes.

    Raises:
        ValueError: ``inv_scale`` does not fit ``codes``.
    """
    shape, have = _matrix(codes), tuple(inv_scale.shape)
    if block is None and len(have) == 2:
        usual = _BLOCKS[inv_scale.dtype]
        height, width = (
            1 if n == count else usual for n, count in zip(shape, have, strict=True)
        )
        block = (height, width)
    if block is not None:
        want = tuple(-(-n // size) for n, size in zip(shape, block, strict=True))
        if have == want:
            return block
    rows, columns = shape
    said = "" if block is None else f" in blocks of {block[0]} x {block[1]}"
    msg = f"inv_scale of shape {list(have)} does not fit {rows} x {columns} codes{said}"
    raise ValueError(msg)
