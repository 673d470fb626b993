"""Laws of the matrix products in ``snippets/fp8/gemm.py``, and their oracles.

Oracles: sums in rational or float64 arithmetic, Transformer Engine's reference of the
NVFP4 product (``te_source``), and ``mmaemu``, which replays recordings of an H100.

SPDX-License-Identifier: Apache-2.0
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product

import mmaemu
import pytest
import torch
from torch import Tensor

from snippets.fp8.gemm import (
    Operand,
    bf16_products,
    decode_operand,
    scaled_matmul,
)
from snippets.fp8.numerics import (
    dequantize,
    quantize_block,
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_tensor,
)
from tests import te_source

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ONE = torch.ones(())
MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

Quantizer = Callable[[Tensor], tuple[Tensor, ...]]
KINDS: dict[str, Quantizer] = {
    "E4M3": lambda x: quantize_tensor(x, E4M3, 37.0),
    "E5M2": lambda x: quantize_tensor(x, E5M2, 900.0),
    "1 x 128": lambda x: quantize_block(x, E4M3),
    "128 x 128": lambda x: quantize_block(x, E4M3, (128, 128)),
    "1 x 128 float32": lambda x: quantize_block(x, E4M3, power_of_2=False),
    "128 x 128 float32": lambda x: quantize_block(
        x, E5M2, (128, 128), power_of_2=False
    ),
    "MXFP8": lambda x: quantize_mxfp8(x, E4M3),
    "MXFP8 E5M2": lambda x: quantize_mxfp8(x, E5M2),
    "NVFP4": quantize_nvfp4,
    "NVFP4 2d": lambda x: quantize_nvfp4(x, two_d=True),
}


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def float64_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a @ b.T and what bounds the error of its float32 sum, by its length."""
    a, b = a.double(), b.double()
    return a @ b.T, a.abs() @ b.abs().T


# ----------------------------------------------------------------------- float32 sums


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_values_are_exact_in_bfloat16(kind: str) -> None:
    """So a product of two is exact in float32, whatever unit multiplies."""
    for x in (
        normal(128, 256),
        normal(128, 256) * 2.0 ** torch.linspace(-50, 50, 128).round()[:, None],
    ):
        operand = decode_operand(*KINDS[kind](x))
        assert torch.equal(operand.values.bfloat16().float(), operand.values)


@pytest.mark.parametrize(("left", "right"), list(product(KINDS, ["E4M3", "128 x 128"])))
def test_product_is_that_of_the_dequantized_matrices(left: str, right: str) -> None:
    """Within the error bound of a float32 sum of K products, plus three roundings."""
    x, w = normal(48, 384), normal(40, 384, seed=1)
    a, b = KINDS[left](x), KINDS[right](w)
    exact, size = float64_product(dequantize(*a), dequantize(*b))
    y = scaled_matmul(decode_operand(*a), decode_operand(*b))
    # Rounding of the dequantized matrices themselves, two for each product, included.
    assert ((y - exact).abs() <= (384 + 8) * 2**-24 * size).all()
    assert y.dtype == torch.float32
    assert y.is_contiguous()


@pytest.mark.parametrize("left", [E4M3, E5M2])
def test_sums_that_fit_float32_are_exact(left: torch.dtype) -> None:
    """Small integers: nothing is rounded, in any layout."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-3, 4, (96, 2304), generator=generator).float()
    w = torch.randint(-3, 4, (80, 2304), generator=generator).float()
    a = decode_operand(*quantize_tensor(x, left, 1.0))
    b = decode_operand(*quantize_tensor(w, E4M3, 1.0))
    assert torch.equal(scaled_matmul(a, b).double(), x.double() @ w.double().T)
    turned = [op._replace(values=op.values.T.contiguous().T) for op in (a, b)]
    for p, q in product((a, turned[0]), (b, turned[1])):
        assert torch.equal(scaled_matmul(p, q).double(), x.double() @ w.double().T)


def test_the_three_products_of_a_layer_take_views() -> None:
    """Forward, grad_input and grad_weight from one decoding of each operand."""
    x, w, dy = normal(64, 96), normal(48, 96, seed=1), normal(64, 48, seed=2)
    qx, qw = quantize_tensor(x, E4M3, 20.0), quantize_tensor(w, E4M3, 30.0)
    qdy = quantize_tensor(dy, E5M2, 1000.0)
    a, b, c = (decode_operand(*q) for q in (qx, qw, qdy))
    hx, hw, hdy = (dequantize(*q).double() for q in (qx, qw, qdy))
    for got, exact in (
        (scaled_matmul(a, b), hx @ hw.T),
        (scaled_matmul(c, b.T), hdy @ hw),
        (scaled_matmul(c.T, a.T), hdy.T @ hx),
    ):
        assert torch.allclose(got.double(), exact, rtol=0, atol=2e-5)
    assert b.T.values.data_ptr() == b.values.data_ptr()


def test_a_transposed_block_operand_keeps_its_scales() -> None:
    """Columns cut into 128: the operand of a gradient, as it lies in memory."""
    x, dy = normal(256, 32), normal(256, 48, seed=1)
    for power_of_2 in (True, False):
        qx = quantize_block(x, E4M3, (128, 1), power_of_2)
        qdy = quantize_block(dy, E5M2, (128, 1), power_of_2)
        y = scaled_matmul(decode_operand(*qdy).T, decode_operand(*qx).T)
        exact, size = float64_product(dequantize(*qdy).T, dequantize(*qx).T)
        assert ((y - exact).abs() <= (256 + 8) * 2**-24 * size).all()


def test_factor_alpha_and_bias_are_float32_and_the_result_rounds_once() -> None:
    """``(factor_a * factor_b * alpha) * sum + bias``, then the dtype."""
    x, w = normal(32, 64), normal(24, 64, seed=1)
    a = decode_operand(*quantize_tensor(x, E4M3, 37.0))
    b = decode_operand(*quantize_tensor(w, E4M3, 41.0))
    assert a.factor is not None
    assert b.factor is not None
    raw = scaled_matmul(a._replace(factor=None), b._replace(factor=None))
    bias = normal(24, seed=2)
    wanted = raw * (a.factor * b.factor)
    assert torch.equal(scaled_matmul(a, b), wanted)
    assert torch.equal(scaled_matmul(a, b, bias=bias), wanted + bias)
    for dtype in (torch.bfloat16, torch.float16):
        y = scaled_matmul(a, b, bias=bias, out_dtype=dtype)
        assert torch.equal(y, (wanted + bias).to(dtype))
    for alpha in (3.0, torch.tensor(3.0)):
        y = scaled_matmul(a, b, alpha=alpha)
        assert torch.equal(y, raw * (a.factor * b.factor * 3.0))
    plain = scaled_matmul(a._replace(factor=None), b._replace(factor=None), alpha=3.0)
    assert torch.equal(plain, raw * 3.0)


def test_what_is_not_quantized_keeps_its_precision() -> None:
    """A plain tensor may not be rounded to bfloat16 on the way."""
    x, w = normal(32, 512), normal(32, 512, seed=1)
    exact, size = float64_product(x, w)
    assert ((scaled_matmul(x, w) - exact).abs() <= 520 * 2**-24 * size).all()
    b = decode_operand(*quantize_tensor(w, E4M3, 37.0))
    exact, size = float64_product(x, dequantize(*quantize_tensor(w, E4M3, 37.0)))
    assert ((scaled_matmul(x, b) - exact).abs() <= 520 * 2**-24 * size).all()
    y = scaled_matmul(x.bfloat16(), w.bfloat16(), out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 32, 16), (16, 32, 0), (16, 0, 16)])
def test_empty_products(shape: tuple[int, int, int]) -> None:
    """No rows, no columns; a sum of nothing is zero."""
    rows, depth, columns = shape
    for kind in KINDS.values():
        a = decode_operand(*kind(torch.empty(rows, depth)))
        b = decode_operand(*kind(torch.empty(columns, depth)))
        assert torch.equal(scaled_matmul(a, b), torch.zeros(rows, columns))


def test_infinity_and_nan_pass_through() -> None:
    """As in a float32 product, with both accumulators."""
    x, w = normal(16, 64), normal(16, 64, seed=1)
    x[2, 3], w[5, 7] = torch.nan, torch.nan
    a = decode_operand(*quantize_tensor(x, E4M3, 1.0))
    codes, inv_scale = quantize_tensor(w, E5M2, 1.0)
    codes.view(torch.uint8)[9, 0] = 0x7C  # Inf: no quantizer returns it
    b = decode_operand(codes, inv_scale)
    wanted = a.values.double() @ b.values.double().T
    for accumulator in ("fp32", "hopper"):
        y = scaled_matmul(a, b, accumulator=accumulator)
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y[:, 9].nan_to_num(), wanted[:, 9].float().nan_to_num())


@pytest.mark.parametrize("kind", ["1 x 128", "MXFP8"])
def test_far_apart_power_of_two_scales_are_exact(kind: str) -> None:
    """2**100 between blocks: each product is the one that it should be."""
    x = torch.ones(2, 256)
    x[0] *= 2.0**50
    x[1] *= 2.0**-50
    operand = decode_operand(*KINDS[kind](x))
    assert operand.tiles is None
    y = scaled_matmul(operand, decode_operand(*KINDS["E4M3"](torch.ones(1, 256))))
    assert (y[0] / y[1]).item() == 2.0**100


def test_float32_scales_stay_outside_and_are_applied_by_tile() -> None:
    """``total += (sum of 128 * scale of a) * scale of b``, as the reference's."""
    x, w = normal(24, 300), normal(200, 300, seed=1)
    qa = quantize_block(x, E4M3, power_of_2=False)
    qb = quantize_block(w, E4M3, (128, 128), power_of_2=False)
    a, b = decode_operand(*qa), decode_operand(*qb)
    assert a.factor is None
    assert a.tiles is qa[1]
    total = torch.zeros(24, 200)
    for k in range(3):
        here = slice(128 * k, 128 * k + 128)
        part = scaled_matmul(
            a._replace(values=a.values[:, here], tiles=None),
            b._replace(values=b.values[:, here], tiles=None),
        )
        scale_b = qb[1][:, k].repeat_interleave(128)[:200]
        total += (part * qa[1][:, k, None]) * scale_b
    assert torch.equal(scaled_matmul(a, b), total)


@pytest.mark.parametrize("two_d", [False, True])
def test_nvfp4_product_equals_transformer_engines(two_d: bool) -> None:
    """Its reference multiplies 16 at a time; the bound is that of a float32 sum."""
    reference = te_source.load("pytorch.custom_recipes.reference_nvfp4")
    formats = reference.reference_utils.Fp4Formats
    x, w = normal(32, 128), normal(48, 128, seed=1)
    maker = reference.NVFP4QuantizerRef(formats.E2M1)
    weights = reference.NVFP4QuantizerRef(
        formats.E2M1, quant_tile_shape=(16, 16) if two_d else (1, 16)
    )
    qx, qw = maker.quantize(x), weights.quantize(w)
    wanted = maker.qgemm(
        qx.data,
        qw.data,
        None,
        torch.float32,
        qx.scale,
        qw.scale,
        qresult_x=qx,
        qresult_w=qw,
    )
    a, b = quantize_nvfp4(x), quantize_nvfp4(w, two_d)
    y = scaled_matmul(decode_operand(*a), decode_operand(*b))
    _, size = float64_product(dequantize(*a), dequantize(*b))
    assert ((y - wanted).abs() <= 2 * 136 * 2**-24 * size).all()
    mixed = scaled_matmul(decode_operand(*a), decode_operand(*KINDS["E4M3"](w)))
    exact, size = float64_product(dequantize(*a), dequantize(*KINDS["E4M3"](w)))
    assert ((mixed - exact).abs() <= 136 * 2**-24 * size).all()


# --------------------------------------------------------------- setting and threads


def test_the_setting_is_restored_after_success_and_failure() -> None:
    """Whatever it was before; within, oneDNN may use bfloat16."""
    before = MATMUL.fp32_precision
    a = decode_operand(*quantize_tensor(normal(16, 32), E4M3, 1.0))
    scaled_matmul(a, a)
    assert MATMUL.fp32_precision == before
    with bf16_products():
        assert MATMUL.fp32_precision == "bf16"
    for setting in ("ieee", "tf32", "bf16", before):
        MATMUL.fp32_precision = setting
        with pytest.raises(RuntimeError, match="cannot be multiplied"), bf16_products():
            torch.mm(a.values, a.values)
        assert MATMUL.fp32_precision == setting
    assert MATMUL.fp32_precision == before


def test_the_setting_is_on_during_the_product_of_codes_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A high-precision operand must not be rounded to bfloat16 by it."""
    seen: list[str] = []
    real = torch.mm

    def mm(*args: Tensor, **options: Tensor | None) -> Tensor:
        seen.append(MATMUL.fp32_precision)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "mm", mm)
    a = decode_operand(*quantize_tensor(normal(16, 32), E4M3, 1.0))
    scaled_matmul(a, a)
    scaled_matmul(a, normal(16, 32))
    assert seen == ["bf16", MATMUL.fp32_precision]
    assert MATMUL.fp32_precision != "bf16"


LAYOUTS = ("rows", "left turned", "right turned", "both turned")
SHAPES = [(16, 2048, 16), (64, 4096, 48), (512, 2048, 64), (256, 1000, 300)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_threads_does_not_change_a_bit(
    shape: tuple[int, int, int], layout: str
) -> None:
    """OneDNN shares a long sum out among threads if the left matrix is transposed."""
    rows, depth, columns = shape
    a = decode_operand(*quantize_tensor(normal(rows, depth), E4M3, 50.0))
    b = decode_operand(*quantize_tensor(normal(columns, depth, seed=1), E5M2, 50.0))
    if layout in {"left turned", "both turned"}:
        a = a._replace(values=a.values.T.contiguous().T)
    if layout in {"right turned", "both turned"}:
        b = b._replace(values=b.values.T.contiguous().T)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(scaled_matmul(a, b))
    assert all(torch.equal(y, results[0]) for y in results)


def test_a_processor_without_bfloat16_units_gets_the_right_result() -> None:
    """The same bound, in a process whose oneDNN is limited to AVX2."""
    code = (
        "import torch\n"
        "from snippets.fp8.gemm import decode_operand, scaled_matmul\n"
        "from snippets.fp8.numerics import quantize_tensor\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x, w = torch.randn(64, 256, generator=g), torch.randn(48, 256, generator=g)\n"
        "a, b = (decode_operand(*quantize_tensor(t, 'E4M3', 37.0)) for t in (x, w))\n"
        "y = scaled_matmul(a, b) / (a.factor * b.factor)\n"
        "exact = a.values.double() @ b.values.double().T\n"
        "size = a.values.double().abs() @ b.values.double().abs().T\n"
        "assert ((y - exact).abs() <= 260 * 2**-24 * size).all()\n"
    )
    environment = os.environ | {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --------------------------------------------------------------- Hopper's accumulator


def oracle(a: Tensor, b: Tensor, split: bool) -> Tensor:
    """Return mmaemu's accumulator of an H100, without splitting K among blocks."""
    y: Tensor = mmaemu.accumulate(
        a, b, use_fast_accum=not split, profile="hopper", splitk=1
    )
    return y


PAIRS = [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)]
INPUTS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda k, seed: normal(16, k, seed=seed),
    "uniform": lambda k, seed: normal(16, k, seed=seed).abs() % 1,
    "large": lambda k, seed: normal(16, k, seed=seed) * 300,
    "subnormal": lambda k, seed: normal(16, k, seed=seed) * 2**-8,
    "all exponents": lambda k, seed: (
        normal(16, k, seed=seed) * 2.0 ** (normal(16, k, seed=seed + 9) * 5)
    ),
    "sparse": lambda k, seed: (
        normal(16, k, seed=seed).relu() * (torch.arange(k) % 7 == 0)
    ),
    "cancelling": lambda k, seed: (
        normal(16, k, seed=seed) * (1 - 2 * (torch.arange(k) % 2))
    ).sort(1).values,
    "one huge": lambda k, seed: torch.where(
        torch.arange(k) == k // 2, 448.0, normal(16, k, seed=seed) * 2**-6
    ),
    "zeros": lambda k, seed: normal(16, k, seed=seed) * 0,
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_hopper_accumulator_equals_mmaemu(
    pair: tuple[torch.dtype, torch.dtype], name: str
) -> None:
    """Bit for bit, with and without split accumulation, whole tiles and ragged."""
    for depth in (16, 112, 128, 144, 512):
        a, _ = quantize_tensor(INPUTS[name](depth, 0), pair[0], 1.0)
        b, _ = quantize_tensor(INPUTS[name](depth, 1), pair[1], 1.0)
        left, right = decode_operand(a, ONE), decode_operand(b, ONE)
        for split in (True, False):
            y = scaled_matmul(
                left, right, accumulator="hopper", use_split_accumulator=split
            )
            assert torch.equal(y, oracle(a, b, split))
            assert torch.equal(y.signbit(), oracle(a, b, split).signbit())


def test_every_code_takes_part_in_hoppers_accumulator_as_in_mmaemus() -> None:
    """All pairs of finite E4M3 codes, added to one."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    a = torch.zeros(len(codes), 32, dtype=torch.uint8)
    a[:, 0], a[:, 5] = codes, 0x38  # 0x38 is one
    b = a.clone()
    b[:, 5] = 0x38
    left, right = a.view(E4M3), b.view(E4M3)
    y = scaled_matmul(
        decode_operand(left, ONE),
        decode_operand(right, ONE),
        accumulator="hopper",
        use_split_accumulator=False,
    )
    assert torch.equal(y, oracle(left, right, split=False))


def test_split_accumulation_buys_two_decimals() -> None:
    """U[0, 1), K = 4096: without it the sum is short by percents, with it by 0.1 %."""
    x = torch.rand(16, 4096, generator=torch.Generator().manual_seed(3))
    w = torch.rand(16, 4096, generator=torch.Generator().manual_seed(4))
    a = decode_operand(*quantize_tensor(x, E4M3, 448.0))
    b = decode_operand(*quantize_tensor(w, E4M3, 448.0))
    exact = scaled_matmul(a, b)
    short = {
        split: (
            scaled_matmul(
                a, b, accumulator="hopper", use_split_accumulator=split
            )
            / exact
            - 1
        )
        for split in (True, False)
    }  # fmt: skip
    assert (short[False] < -0.04).all()
    assert (short[True].abs() < 0.001).all()


def test_hopper_with_128_blocks_scales_each_tile() -> None:
    """Its tiles are the kernel's: each a chain of its own, then scaled, then added."""
    x, w = normal(16, 320), normal(136, 320, seed=1)
    for power_of_2 in (True, False):
        qa = quantize_block(x, E4M3, power_of_2=power_of_2)
        qb = quantize_block(w, E4M3, (128, 128), power_of_2=power_of_2)
        y = scaled_matmul(
            decode_operand(*qa, fold=False),
            decode_operand(*qb, fold=False),
            accumulator="hopper",
        )
        total = torch.zeros(16, 136)
        for k in range(3):
            here = slice(128 * k, 128 * k + 128)
            left, right = qa[0][:, here].contiguous(), qb[0][:, here].contiguous()
            scale_b = qb[1][:, k].repeat_interleave(128)[:136]
            total += (oracle(left, right, False) * qa[1][:, k, None]) * scale_b
        assert torch.equal(y, total)


@pytest.mark.usefixtures("threads")
def test_hopper_does_not_depend_on_threads_or_pieces() -> None:
    """More rows than are held at once give the rows' own results."""
    a, _ = quantize_tensor(normal(300, 256), E4M3, 50.0)
    b, _ = quantize_tensor(normal(260, 256, seed=1), E4M3, 50.0)
    left, right = decode_operand(a, ONE), decode_operand(b, ONE)
    torch.set_num_threads(1)
    whole = scaled_matmul(left, right, accumulator="hopper")
    torch.set_num_threads(2)
    assert torch.equal(whole, scaled_matmul(left, right, accumulator="hopper"))
    row = left._replace(values=left.values[299:])
    assert torch.equal(whole[299:], scaled_matmul(row, right, accumulator="hopper"))


# ------------------------------------------------------------------------------ errors


def operand(kind: str, columns: int = 128) -> Operand:
    """Return a small operand."""
    return decode_operand(*KINDS[kind](normal(16, columns)))


def test_shapes_must_agree() -> None:
    """The dimension that is summed over is the last one of both."""
    with pytest.raises(ValueError, match=r"\[M, K\].* got \[16, 128\] and \[16, 64\]"):
        scaled_matmul(operand("E4M3"), operand("E4M3", 64))
    turned = decode_operand(*KINDS["1 x 128 float32"](normal(256, 256))).T
    with pytest.raises(ValueError, match=r"\[2, 256\] do not cut 256 columns into 128"):
        scaled_matmul(turned, operand("E4M3", 256))


def test_settings_are_refused_by_name() -> None:
    """A typo does not become the default."""
    a = operand("E4M3")
    with pytest.raises(ValueError, match=r"\('fp32', 'hopper'\), got 'Hopper'"):
        scaled_matmul(a, a, accumulator="Hopper")
    with pytest.raises(TypeError, match=r"out_dtype must be .* got torch.float64"):
        scaled_matmul(a, a, out_dtype=torch.float64)


@pytest.mark.parametrize("kind", ["1 x 128", "MXFP8", "NVFP4"])
def test_hopper_refuses_what_it_cannot_multiply(kind: str) -> None:
    """Scales inside the values, four bits, and what is not quantized."""
    with pytest.raises(ValueError, match=r"Hopper multiplies FP8 .* fold=False"):
        scaled_matmul(operand("E4M3"), operand(kind), accumulator="hopper")
    with pytest.raises(ValueError, match="Hopper multiplies FP8"):
        scaled_matmul(normal(16, 128), operand("E4M3"), accumulator="hopper")


def test_scales_that_do_not_fit_are_refused() -> None:
    """Before anything is multiplied."""
    codes, inv_scale = quantize_mxfp8(normal(64, 64), E4M3)
    with pytest.raises(ValueError, match=r"\[64, 1\] does not fit 64 x 64 codes"):
        decode_operand(codes, inv_scale[:, :1])
