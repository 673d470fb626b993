"""Multiply quantized matrices with exact products and float32 sums, or as Hopper does.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

FP8 numbers, also times a power of two, and E2M1 numbers times an E4M3 scale are exact
in bfloat16, and a product of two is exact in float32. So the matrix product of decoded
codes has the tensor core's products, summed in float32 in another order, and oneDNN may
take what is fastest for it. Measured for the three products of a linear layer, 2048 x
512 x 2048, on one thread with AVX512-BF16: float32 matrices under `bf16_products` take
21, 22 and 23 ms (as they lie, no copies), plain float32 ones 46 ms; bfloat16 matrices
10 ms, but with a result in bfloat16.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_gemm.py
    Sources: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2 (Hopper's accumulator);
             Khattak & Mikaitis 2026, arXiv:2512.07004 (aligned, truncated sums);
             NVIDIA Transformer Engine 2.20, tests/pytorch/references/
             blockwise_fp8_gemm_reference.py and
             pytorch/custom_recipes/reference_nvfp4.py (order of the scales).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codes import FP8_MAX, decode_fp4, decode_fp8
from .numerics import block_of, dequantize

__all__ = ["Operand", "bf16_products", "decode_operand", "scaled_matmul"]

_ACCUMULATORS = ("fp32", "hopper")
_OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 128
# oneDNN shares a sum of 2048 or more out among threads where the left matrix is
# transposed in memory, and its bits then depend on their number.
_LONGEST = 1024
_NVFP4_DIVISOR = 2688.0  # 6 * 448, both operands' in Transformer Engine's alpha
# Of the tensor core: products in a step, fraction bits that it keeps, and the exponent
# of the smallest normal number of a format, below which it does not normalize.
_STEP, _FRACTION = 32, 13
_MIN_EXPONENT = {torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}
_LOWEST = -60  # below all that products of normal FP8 numbers leave in the sum
_PRODUCTS = 1 << 20  # held at once


class Operand(NamedTuple):
    """A quantized matrix [rows, K], decoded for `scaled_matmul`.

    It stands for ``values * factor``, or ``values * tiles * factor`` where the scales
    of its 128-blocks stay outside.
    """

    values: Tensor  # [rows, K], float32, exact in bfloat16
    factor: Tensor | None  # float32, one element
    tiles: Tensor | None  # float32, [rows or rows / 128, K / 128]
    source: torch.dtype  # of the codes; what is not quantized has its own dtype
    folded: bool = False  # scales of blocks are in the values

    @property
    def T(self) -> "Operand":  # noqa: N802 - as of a tensor
        """The transposed matrix; its tensors are views."""
        tiles = None if self.tiles is None else self.tiles.T
        return self._replace(values=self.values.T, tiles=tiles)


@contextmanager
def bf16_products() -> Iterator[None]:
    """Let float32 matrix products of this thread's code run on bfloat16 units.

    Exact for numbers that are exact in bfloat16. The setting is torch's global one
    (``torch.backends.mkldnn.matmul.fp32_precision``) and is restored at the exit.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # torch before 2.9, which is merely slower
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def decode_operand(
    codes: Tensor,
    inv_scale: Tensor,
    amax: Tensor | None = None,
    *,
    fold: bool = True,
) -> Operand:
    """Return what `scaled_matmul` takes for the codes and scales of a quantizer.

    Scales of blocks that are powers of two go into the values, relative to the largest
    of them, which is the factor: exact unless it is 2**110 times another. E4M3 scales
    of NVFP4 go into the values, too. Other scales stay outside.

    Args:
        codes: From a quantizer, [..., K], seen as a matrix [rows, K].
        inv_scale: What it came with.
        amax: Of the whole tensor, for NVFP4.
        fold: Put powers of two into the values. ``False`` leaves 128-blocks' scales
            outside, which is what the accumulator ``"hopper"`` takes.

    Returns:
        The operand; its values are float32, for torch multiplies bfloat16 matrices to
        bfloat16 only.
    """
    codes = codes.reshape(prod(codes.shape[:-1]), codes.shape[-1])
    factor: Tensor | None = inv_scale
    tiles: Tensor | None = None
    folded = False
    if amax is not None:
        values = decode_fp4(codes)
        blocks = values.view(*inv_scale.shape, 16)
        blocks.mul_(decode_fp8(inv_scale)[..., None])
        factor, folded = amax, True
    elif inv_scale.dtype == torch.float32 and inv_scale.numel() == 1:
        values = decode_fp8(codes)
    elif inv_scale.dtype == torch.float32 and not (fold and _powers_of_2(inv_scale)):
        values, factor, tiles = decode_fp8(codes), None, inv_scale
    else:
        block = block_of(codes, inv_scale)
        inv_scale = inv_scale.float()
        factor = inv_scale.max() if inv_scale.numel() else inv_scale.new_ones(())
        values, folded = dequantize(codes, inv_scale / factor, block=block), True
    return Operand(values, factor, tiles, codes.dtype, folded)


def _powers_of_2(inv_scale: Tensor) -> bool:
    return not (inv_scale.view(torch.int32) & 0x7FFFFF).any()


def scaled_matmul(
    a: Operand | Tensor,
    b: Operand | Tensor,
    *,
    alpha: float | Tensor | None = None,
    accumulator: str = "fp32",
    use_split_accumulator: bool = True,
    out_dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``alpha * a @ b.T + bias`` with float32 arithmetic, in ``out_dtype``.

    The factors of the operands are multiplied first, then the sum by them. Where the
    scales of 128-blocks are outside, the sum of each 128 products is multiplied by the
    scale of ``a``, then of ``b``, and added to the total.

    The same bits for any number of threads.

    Args:
        a: [M, K], may be transposed (``a.T``), like ``b``. A tensor is taken for what
            has not been quantized: the product is then that of float32 matrices.
        b: [N, K].
        alpha: Multiplies the factors; 1 if None.
        accumulator: ``"fp32"``, or ``"hopper"``: 32 products at a time and what they
            are added to are aligned to the largest exponent and cut off below 13
            fraction bits, and so is their sum.
        use_split_accumulator: Of ``"hopper"`` only: add to a float32 total, and start
            at zero again, after each 128 products.
        out_dtype: float32, bfloat16 or float16.
        bias: [N], added in float32.

    Returns:
        ``out_dtype``, [M, N].

    Raises:
        ValueError: The operands do not fit, ``accumulator`` is another, ``"hopper"``
            meets a format that Hopper does not have.
        TypeError: ``out_dtype`` is another dtype.
    """
    a, b = _operand(a), _operand(b)
    if a.values.shape[1] != b.values.shape[1]:
        shapes = f"{list(a.values.shape)} and {list(b.values.shape)}"
        msg = f"a must be [M, K] and b [N, K], got {shapes}"
        raise ValueError(msg)
    if accumulator not in _ACCUMULATORS:
        msg = f"accumulator must be one of {_ACCUMULATORS}, got {accumulator!r}"
        raise ValueError(msg)
    if out_dtype not in _OUTPUTS:
        msg = f"out_dtype must be one of {_OUTPUTS}, got {out_dtype}"
        raise TypeError(msg)
    if accumulator == "hopper":
        for operand in (a, b):
            if operand.source not in FP8_MAX or operand.folded:
                msg = (
                    "Hopper multiplies FP8 with a scale for the tensor, or for blocks "
                    "of 128 that were decoded with fold=False"
                )
                raise ValueError(msg)
    for operand in (a, b):
        columns = operand.values.shape[1]
        if operand.tiles is not None and operand.tiles.shape[1] != -(-columns // _TILE):
            shape = list(operand.tiles.shape)
            msg = (
                f"scales of shape {shape} do not cut {columns} columns into 128-blocks"
            )
            raise ValueError(msg)
    scale = _alpha(a, b, alpha)
    if a.tiles is not None or b.tiles is not None:
        y = _tiled(a, b, accumulator)
    elif accumulator == "hopper":
        y = _hopper(a, b, use_split_accumulator)
    else:
        y = _matmul(a, b)
    if scale is not None:
        y *= scale
    if bias is not None:
        y += bias
    return y.to(out_dtype)


def _operand(x: Operand | Tensor) -> Operand:
    return Operand(x, None, None, x.dtype) if isinstance(x, Tensor) else x


def _alpha(a: Operand, b: Operand, alpha: float | Tensor | None) -> Tensor | None:
    scale: Tensor | None = None
    for factor in (a.factor, b.factor):
        if factor is not None:
            scale = factor if scale is None else scale * factor
    packed = (a.source == torch.uint8) + (b.source == torch.uint8)
    if packed and scale is not None:
        scale = scale / _NVFP4_DIVISOR**packed
    if alpha is None:
        return scale
    return torch.as_tensor(alpha, device=a.values.device) * (
        1 if scale is None else scale
    )


def _matmul(left: Operand, right: Operand, out: Tensor | None = None) -> Tensor:
    """Return a @ b.T in float32, without scales."""
    a, b, depth = left.values.float(), right.values.float(), left.values.shape[1]
    step = depth if a.stride(1) == 1 else _LONGEST
    exact = all(op.source in {*FP8_MAX, torch.uint8} for op in (left, right))
    with bf16_products() if exact else nullcontext():
        y = torch.mm(a[:, :step], b[:, :step].T, out=out)
        for start in range(step, depth, max(1, step)):
            part = slice(start, start + step)
            y.addmm_(a[:, part], b[:, part].T)
    return y


def _tiled(a: Operand, b: Operand, accumulator: str) -> Tensor:
    (rows, depth), columns = a.values.shape, b.values.shape[0]
    y = torch.zeros(rows, columns, device=a.values.device)
    part = torch.empty_like(y)
    for k in range(-(-depth // _TILE)):
        here = slice(k * _TILE, (k + 1) * _TILE)
        left = a._replace(values=a.values[:, here])
        right = b._replace(values=b.values[:, here])
        if accumulator == "hopper":
            part = _hopper(left, right, split=False)
        else:
            part = _matmul(left, right, part)
        if a.tiles is not None:
            part *= _column(a.tiles, k, rows)[:, None]
        if b.tiles is not None:
            part *= _column(b.tiles, k, columns)
        y += part
    return y


def _column(tiles: Tensor, k: int, rows: int) -> Tensor:
    scale = tiles[:, k]
    if scale.shape[0] == rows:
        return scale
    return scale.repeat_interleave(_TILE)[:rows]


def _hopper(a: Operand, b: Operand, split: bool) -> Tensor:
    left, right = a.values.float(), b.values.float()
    (rows, depth), columns = left.shape, right.shape[0]
    y = torch.empty(rows, columns, device=left.device)
    missing = (0, -depth % _STEP)
    operands = []
    for values, source in ((left, a.source), (right, b.source)):
        finite = pad(values.nan_to_num(0.0, 0.0, 0.0), missing)
        exponent = _exponent(finite).clamp_(min=_MIN_EXPONENT[source])
        exponent.masked_fill_(finite == 0, -999)  # takes no part in the alignment
        operands += [finite, exponent]
    step = max(1, _PRODUCTS // max(1, columns * _STEP))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        here = (operands[0][part], operands[1][part], operands[2], operands[3])
        y[part] = _hopper_rows(*here, split)
    if not (left.isfinite().all() and right.isfinite().all()):
        plain = _matmul(a, b)  # of FP8 it overflows only where there is an Inf
        y = torch.where(plain.isfinite(), y, plain)
    return y


def _hopper_rows(
    a: Tensor, exponent_a: Tensor, b: Tensor, exponent_b: Tensor, split: bool
) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    acc = torch.zeros_like(total)
    for k in range(0, a.shape[1], _STEP):
        if split and k and k % _TILE == 0:
            total += acc
            acc.zero_()
        here = slice(k, k + _STEP)
        products = a[:, None, here] * b[None, :, here]  # [M, N, 32]
        exponents = exponent_a[:, None, here] + exponent_b[None, :, here]
        largest = torch.maximum(exponents.amax(-1), _exponent(acc))
        largest.clamp_(min=_LOWEST)
        unit, per_unit = _power(largest - _FRACTION), _power(_FRACTION - largest)
        # Whole numbers of less than 24 bits from here on: their sum is exact.
        terms = products.mul_(per_unit[:, :, None]).trunc_().sum(-1)
        acc = terms.add_(acc.mul_(per_unit).trunc_()).mul_(unit)
        bits = acc.view(torch.int32) & -(1 << (23 - _FRACTION))
        acc = bits.view(torch.float32)
    return total.add_(acc) if split else acc


def _exponent(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def _power(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)
