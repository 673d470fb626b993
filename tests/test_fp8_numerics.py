"""Laws of the scales and quantizers in ``snippets/fp8``, and their oracles.

Oracles: Transformer Engine's own Python (``te_source``), ``ml_dtypes`` for the casts,
``torchao`` for MXFP8, and where only a CUDA kernel has the rule, that rule written down
again, one element at a time.

SPDX-License-Identifier: Apache-2.0
"""

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snippets.fp8.codes import (
    FP8_MAX,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
)
from snippets.fp8.numerics import (
    compute_amax,
    compute_current_scale,
    compute_scale,
    dequantize,
    hadamard_transform,
    quantize_block,
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_tensor,
    update_amax_history,
    update_delayed_scaling,
)
from tests import te_source
from tests.quiet import quiet_import

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = (E4M3, E5M2)
ML = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLT_MAX = torch.finfo(torch.float32).max
INF, NAN = math.inf, math.nan
ONE = torch.ones(())
# Where amax and elements are unusual: zeros, subnormals, the largest, Inf, NaN.
ODD = [0.0, -0.0, 1e-45, 1.2e-38, 1e-30, 1.0, 447.9, 448.0, 3e38, FLT_MAX, INF, NAN]


def bits(x: Tensor) -> Tensor:
    """Return what distinguishes all floats, with one NaN."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    if x.dtype not in {torch.uint8, torch.float8_e8m0fnu}:
        x = x.clone()
        x.view(integer)[x.isnan()] = 255
    return x.view(integer)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether dtype, shape and all bits agree, NaN aside."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bf16_inputs() -> Tensor:
    """Return all 65,536 bfloat16 numbers."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def halfway(dtype: torch.dtype) -> Tensor:
    """Return what lies halfway between neighbors in ``dtype``, and both sides of it."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = codes[codes.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    ends = torch.tensor([FP8_MAX[dtype] * 1.04, -FP8_MAX[dtype] * 1.5])
    middle = torch.cat([middle, finite, ends])
    near = [middle.nextafter(torch.full_like(middle, s)) for s in (INF, -INF)]
    return torch.cat([middle, *near])


def by_ml_dtypes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the saturated cast of another implementation."""
    largest = FP8_MAX[dtype]
    clipped = x.float().numpy().clip(-largest, largest)
    with np.errstate(invalid="ignore"):  # of NaN
        codes = clipped.astype(ML[dtype])
    return torch.from_numpy(codes.view(np.uint8)).view(dtype)


def tensors() -> dict[str, Tensor]:
    """Return random, adversarial and real matrices, all float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heavy = normal(64, 256) / normal(64, 256).abs().clamp(min=1e-6)
    spread = normal(64, 128) * 2.0 ** torch.randint(
        -60, 60, (64, 1), generator=generator
    )
    spiked = normal(128, 128)
    spiked[5, 7] = 1e4
    digits = torch.tensor(load_digits().data[:512], dtype=torch.float32)  # [512, 64]
    target = torch.tensor(load_digits().target[:512])
    weight = normal(10, 64).mul_(0.1).requires_grad_()
    loss = torch.nn.functional.cross_entropy(digits @ weight.T, target)
    (gradient,) = torch.autograd.grad(loss, weight)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(16, 8)
    return {
        "normal": normal(256, 256),
        "uniform": torch.rand(128, 128, generator=generator),
        "heavy": heavy,
        "rows of other sizes": spread,
        "one spike": spiked,
        "sparse": normal(128, 128).relu() * (normal(128, 128) > 1.5),
        "ties": ties,
        "zeros": torch.zeros(32, 64),
        "tiny": normal(32, 64) * 1e-38,
        "subnormal": normal(32, 64) * 1e-41,
        "huge": normal(32, 64).clamp(-2, 2) * 1e38,
        "digits": digits,
        "gradient": torch.nn.functional.pad(gradient, (0, 0, 0, 6)),  # [16, 64]
    }


TENSORS = tensors()


@pytest.fixture(scope="module")
def current() -> ModuleType:
    """Return Transformer Engine's reference of current scaling."""
    return te_source.load("pytorch.custom_recipes.reference_current_scaling")


@pytest.fixture(scope="module")
def nvfp4() -> ModuleType:
    """Return Transformer Engine's reference of NVFP4."""
    return te_source.load("pytorch.custom_recipes.reference_nvfp4")


@pytest.fixture(scope="module")
def quantization() -> ModuleType:
    """Return the module with Transformer Engine's unfused scale update."""
    return te_source.load("pytorch.quantization")


# ------------------------------------------------------------------ casts: exact laws


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_code_decodes_to_its_number(dtype: torch.dtype) -> None:
    """256 codes, against ml_dtypes; alone, and in a tensor of several pieces."""
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = torch.from_numpy(codes.numpy().view(ML[dtype]).astype(np.float32))
    assert same(decode_fp8(codes.view(dtype)), wanted)
    many = codes.repeat(1100).view(dtype)
    assert same(decode_fp8(many), wanted.repeat(1100))


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_bfloat16_number_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """All 65,536, from bfloat16 and from float32, saturating, NaN to NaN."""
    x = bf16_inputs()
    wanted = by_ml_dtypes(x, dtype)
    assert same(encode_fp8(x, dtype, ONE), wanted)
    assert same(encode_fp8(x.float(), dtype, ONE), wanted)
    assert same(encode_fp8(x.repeat(3), dtype, ONE), wanted.repeat(3))  # pieces


@pytest.mark.parametrize("dtype", FORMATS)
def test_ties_and_their_neighbors_round_as_they_must(dtype: torch.dtype) -> None:
    """Halfway points of all neighbors, one float32 up and down, and beyond the end."""
    x = halfway(dtype)
    assert same(encode_fp8(x, dtype, ONE), by_ml_dtypes(x, dtype))
    half = x.half()
    assert same(encode_fp8(half, dtype, ONE), by_ml_dtypes(half, dtype))


@pytest.mark.parametrize("dtype", FORMATS)
def test_codes_survive_the_way_there_and_back(dtype: torch.dtype) -> None:
    """A code decodes to a number whose code it is; Inf becomes the largest."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = decode_fp8(codes)
    back = encode_fp8(values, dtype, ONE)
    assert same(back[values.isfinite()], codes[values.isfinite()])
    assert same(decode_fp8(back), values.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]))


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the largest magnitude that torch was asked to cast to FP8."""

    largest = dict.fromkeys(FORMATS, 0.0)
    casts = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Look at copies to FP8, and do what was to be done."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in {"copy_", "_to_copy"}:
            target = args[0].dtype if name == "copy_" else kwargs.get("dtype")
            source = args[1] if name == "copy_" else args[0]
            if target in FORMATS and source.numel():
                self.casts += 1
                size = source.float().nan_to_num(0.0, INF, -INF).abs().max().item()
                self.largest[target] = max(size, self.largest[target])
        return func(*args, **kwargs)


def test_no_cast_of_torch_sees_what_it_would_have_to_saturate() -> None:
    """Its E4M3 cast gives NaN up to torch 2.12, a number later; its E5M2 cast Inf."""
    x = torch.tensor([[1.0, -700.0, 1e6, INF, -INF, NAN, 0.0, 3.0] * 4])
    with Watch() as watch:  # type: ignore[no-untyped-call]
        for fmt in FORMATS:
            quantize_tensor(x, fmt, 1.0)
            quantize_tensor(x.half(), fmt, 7.0)
            quantize_block(x, fmt)
            quantize_mxfp8(x, fmt)
            quantize_mxfp8(x, fmt, rounding="floor")
        quantize_nvfp4(x)
    assert watch.casts >= 11
    assert watch.largest == FP8_MAX


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_product_is_rounded_to_float32_and_not_to_the_dtype_of_x(
    dtype: torch.dtype,
) -> None:
    """``x * scale`` in bfloat16 would lose the bits that decide a tie."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale = torch.tensor(61.7)
    codes, inv_scale = quantize_tensor(x, E4M3, scale)
    assert same(codes, by_ml_dtypes(x.float() * scale, E4M3))
    assert same(inv_scale, torch.tensor(1 / 61.7, dtype=torch.float64).float()) or (
        inv_scale == scale.reciprocal()
    )


def test_every_fp4_code_decodes_and_comes_back() -> None:
    """256 bytes; the low nibble is the first element."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers += [-v for v in numbers]
    wanted = [[numbers[c & 15], numbers[c >> 4]] for c in range(256)]
    values = decode_fp4(codes[:, None])
    assert same(values, torch.tensor(wanted))
    again = encode_fp4(values.view(-1, 16), ONE)
    assert torch.equal(again.view(-1), codes)


def test_fp4_rounds_as_transformer_engine_says(nvfp4: ModuleType) -> None:
    """Ties, their float32 neighbors and a grid; the two differ for NaN and -0.

    The kernels' conversion instruction gives +6 for NaN and keeps the sign of zero;
    the reference, which was written for comparisons of other values, gives 0 for both.
    """
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 6.5, 7.0])
    ties = torch.cat([ties, ties.nextafter(torch.tensor(INF)), torch.tensor([INF])])
    ties = torch.cat([ties, ties.nextafter(torch.tensor(-INF))]).abs()
    grid = torch.arange(-8 * 512, 8 * 512) / 512
    x = torch.cat([ties, -ties[ties != 0], grid])
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).view(-1, 16)
    assert torch.equal(encode_fp4(x, ONE), nvfp4.cast_to_fp4x2(x))
    odd = torch.tensor([-0.0, NAN, -NAN, INF, -INF, -1e-30] + [0.0] * 10)
    ours = encode_fp4(odd, ONE)
    assert [f"{c:02x}" for c in ours[:3].tolist()] == ["78", "77", "8f"]
    assert [f"{c:02x}" for c in nvfp4.cast_to_fp4x2(odd[None])[0, :3].tolist()] == [
        "00",
        "70",
        "8f",
    ]


# ------------------------------------------------------------------------ scales: exact


def kernel_scale(
    amax: float, old: float, largest: float, top: float = FLT_MAX
) -> float:
    """Return the kernels' scale in rational arithmetic, ``top`` for one of Inf."""
    if not (math.isfinite(amax) and amax > 0):
        return old
    scale = nearest(Fraction(largest) / Fraction(amax))
    return top if scale == INF else scale


def nearest(value: Fraction) -> float:
    """Return the float32 nearest to a positive rational, or Inf."""
    lowest = max(math.floor(math.log2(value)) - 24, -149)  # log2 may be one off
    grids = (Fraction(2) ** shift for shift in range(lowest, lowest + 3))
    rounded = [round(value / grid) * grid for grid in grids]  # to even
    digits = [r / Fraction(2) ** (lowest + i) for i, r in enumerate(rounded)]
    first = next(r for r, d in zip(rounded, digits, strict=True) if d <= 2**24)
    return INF if first >= 2**128 else float(first)


def float32s(count: int, seed: int = 0) -> list[float]:
    """Return float32 numbers with all exponents."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 0x7F800000, (count,), generator=generator)
    return [*drawn.to(torch.int32).view(torch.float32).tolist(), *ODD]


@pytest.mark.parametrize("margin", [0, 1, 2, -3, 7])
@pytest.mark.parametrize("fp8_max", [448.0, 57344.0])
def test_scale_is_one_true_division(fp8_max: float, margin: int) -> None:
    """Rounded once, against rational arithmetic; odd amax keep the old scale."""
    amax = float32s(2000)
    got = compute_scale(
        torch.tensor(amax), torch.full((len(amax),), 3.0), fp8_max, margin
    )
    largest = fp8_max * 2.0**-margin
    wanted = [kernel_scale(a, 3.0, largest) for a in amax]
    assert same(got, torch.tensor(wanted))


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("fp8_max", [448.0, 57344.0])
def test_current_scale_is_one_true_division(fp8_max: float, power_of_2: bool) -> None:
    """Zero, Inf and NaN give 1; too small an amax the largest float32; powers down."""
    amax = float32s(2000, seed=1)

    def wanted(a: float) -> float:
        scale = kernel_scale(a, 1.0, fp8_max)
        return 2.0 ** (math.frexp(scale)[1] - 1) if power_of_2 else scale

    got = compute_current_scale(torch.tensor(amax), fp8_max, power_of_2)
    assert same(got, torch.tensor([wanted(a) for a in amax]))


def test_epsilon_is_the_smallest_amax_in_use() -> None:
    """It replaces zero, too, but not NaN."""
    amax = torch.tensor([0.0, 1e-9, 1.0, NAN, INF])
    got = compute_current_scale(amax, 448.0, epsilon=0.5)
    assert got.tolist() == [896.0, 896.0, 448.0, 1.0, 1.0]


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", FORMATS)
def test_current_scale_equals_transformer_engine(
    current: ModuleType, dtype: torch.dtype, power_of_2: bool, epsilon: float
) -> None:
    """Bit for bit where amax is finite; the reference has no rule for Inf and NaN.

    It gives 0 and NaN there; the kernel (recipe_common.cuh) gives 1.
    """
    amax = torch.tensor([a for a in float32s(5000, seed=2) if math.isfinite(a)])
    scale, inv_scale, _ = current._scale_from_amax_tensor(
        torch.float32, amax, dtype, eps=epsilon, pow_2_scales=power_of_2
    )
    ours = compute_current_scale(amax, FP8_MAX[dtype], power_of_2, epsilon)
    assert same(ours, scale)
    assert same(ours.reciprocal(), inv_scale)


# -------------------------------------------------------------- delayed scaling: exact


def recipe(
    algo: str | Callable[[Tensor], Tensor] = "max",
    margin: int = 0,
    compute: Callable[..., Tensor] | None = None,
) -> SimpleNamespace:
    """Return what the update reads of a recipe."""
    return SimpleNamespace(
        margin=margin, amax_compute_algo=algo, scaling_factor_compute_algo=compute
    )


def histories(length: int, columns: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a history in which a third of the entries is odd, and scales."""
    generator = torch.Generator().manual_seed(seed)
    history = torch.rand(length, columns, generator=generator).mul_(20).exp_()
    odd = torch.tensor([0.0, 0.0, 1e-45, 1e-38, FLT_MAX, INF, NAN])
    pick = torch.randint(0, 7, history.shape, generator=generator)
    where = torch.rand(history.shape, generator=generator) < 1 / 3
    history = torch.where(where, odd[pick], history)
    return history, torch.rand(columns, generator=generator) + 0.5


def kernel_update(
    column: list[float], old: float, largest: float, algo: str
) -> tuple[list[float], float]:
    """Return a column and its scale as the fused kernel leaves them, step by step."""
    last, amax = column[0], 0.0
    if last != 0:  # so for NaN
        moved = [*column[1:], last]
        for value in moved:
            amax = amax if math.isnan(value) else max(amax, value)
        column = [0.0, *moved[1:]]
    if algo == "most_recent":
        amax = last
    return column, kernel_scale(amax, old, largest)


@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 3, 16])
@pytest.mark.parametrize(("fp8_max", "margin"), [(448.0, 0), (57344.0, 3)])
def test_update_follows_the_fused_kernel(
    length: int, algo: str, fp8_max: float, margin: int
) -> None:
    """Columns with zeros, Inf and NaN, against the kernel in a Python loop."""
    history, scale = histories(length)
    before = history.clone(), scale.clone()
    new_history, new_scale = update_delayed_scaling(
        history, scale, fp8_max, recipe(algo, margin)
    )
    wanted = [
        kernel_update(column, old, fp8_max * 2.0**-margin, algo)
        for column, old in zip(history.T.tolist(), scale.tolist(), strict=True)
    ]
    assert same(new_history, torch.tensor([w[0] for w in wanted]).T.contiguous())
    assert same(new_scale, torch.tensor([w[1] for w in wanted]))
    assert same(history, before[0])
    assert same(scale, before[1])


@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
def test_update_equals_transformer_engines_on_ordinary_columns(
    quantization: ModuleType, algo: str, margin: int
) -> None:
    """Histories equal; scales within one rounding, as it multiplies by 1 / amax."""
    generator = torch.Generator().manual_seed(3)
    history = torch.rand(8, 500, generator=generator).add_(0.01)
    scale = torch.ones(500)
    ours = update_delayed_scaling(history, scale, 448.0, recipe(algo, margin))
    quantization._amax_and_scale_update(history, scale, 448.0, recipe(algo, margin))
    assert same(ours[0], history)
    assert ((ours[1] - scale).abs() <= 2**-23 * scale).all()
    assert (ours[1] != scale).any()


@pytest.mark.parametrize("length", [1, 2, 16])
@pytest.mark.parametrize("which", ["amax", "scale", "both"])
def test_functions_take_the_unfused_road(
    quantization: ModuleType, which: str, length: int
) -> None:
    """Bit for bit Transformer Engine's, whatever is in the history."""

    def mean(history: Tensor) -> Tensor:
        return history.nanmean(0)

    def constant(amax: Tensor, scale: Tensor, fp8_max: float, _: object) -> Tensor:
        scale *= 2  # as a function may
        return torch.where(amax > 1, fp8_max / amax / 4, scale)

    for algo in ("max", "most_recent"):
        own = recipe(
            mean if which != "scale" else algo, 1, constant if which != "amax" else None
        )
        history, scale = histories(length, seed=4)
        ours = update_delayed_scaling(history, scale, 448.0, own)
        quantization._amax_and_scale_update(history, scale, 448.0, own)
        assert same(ours[0], history)
        assert same(ours[1], scale)


def test_history_moves_only_where_there_was_data() -> None:
    """Row 0 is this step, 1 the oldest, L - 1 the newest; zero moves nothing."""
    history = torch.tensor([[5.0, 0.0, NAN], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    wanted = torch.tensor([[0.0, 0.0, 0.0], [2.0, 1.0, 2.0], [5.0, 2.0, NAN]])
    assert same(update_amax_history(history), wanted)
    assert update_amax_history(torch.tensor([[7.0]])).tolist() == [[0.0]]


@pytest.mark.parametrize(("algo", "steps"), [("max", 4), ("most_recent", 1)])
def test_infinity_freezes_the_scale_for_as_long_as_it_counts(
    algo: str, steps: int
) -> None:
    """L steps under max, one under most_recent."""
    history, scale = torch.zeros(4, 1), torch.ones(1)
    frozen = 0
    for amax in (7.0, INF, *[14.0] * 6):
        history[0] = amax
        history, scale = update_delayed_scaling(history, scale, 448.0, recipe(algo))
        frozen += amax == INF or (amax == 14.0 and scale.item() == 64.0)
    assert frozen == steps
    assert scale.item() == 32.0


# -------------------------------------------------------------------------- quantizers


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("power_of_2", [False, True])
def test_current_scaling_equals_transformer_engine(
    current: ModuleType, name: str, dtype: torch.dtype, power_of_2: bool
) -> None:
    """Codes and inverse scales, from float32 and bfloat16."""
    for x in (TENSORS[name], TENSORS[name].bfloat16()):
        reference = current.CurrentScalingQuantizerRef(dtype, pow_2_scales=power_of_2)
        wanted = reference.quantize(x)
        amax = compute_amax(x)
        if x.dtype == torch.bfloat16 and 0 < amax < FP8_MAX[dtype] / FLT_MAX:
            continue  # the reference's largest scale is then that of bfloat16
        scale = compute_current_scale(amax, FP8_MAX[dtype], power_of_2)
        codes, inv_scale = quantize_tensor(x, dtype, scale)
        assert same(codes, wanted.data)
        assert same(inv_scale.view(1), wanted.scale)
        assert same(
            dequantize(codes, inv_scale), reference.dequantize(codes, wanted.scale)
        )


def slow_blocks(
    x: Tensor, dtype: torch.dtype, block: tuple[int, int], power_of_2: bool
) -> tuple[Tensor, Tensor]:
    """Quantize block by block, with rational numbers for the scales."""
    codes = torch.empty(x.shape, dtype=dtype)
    (rows, columns), (height, width) = x.shape, block
    scales = torch.empty(-(-rows // height), -(-columns // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            down = slice(i * height, (i + 1) * height)
            here = (down, slice(j * width, (j + 1) * width))
            amax = compute_amax(x[here]).item()
            top = torch.finfo(x.dtype).max
            scale = kernel_scale(amax, 1.0, FP8_MAX[dtype], top)
            if power_of_2:
                scale = 2.0 ** (math.frexp(scale)[1] - 1)
            codes[here], scales[i, j] = quantize_tensor(x[here], dtype, scale)
    return codes, scales


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1), (3, 5)])
@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("dtype", FORMATS)
def test_blocks_are_quantized_each_by_itself(
    dtype: torch.dtype, power_of_2: bool, block: tuple[int, int]
) -> None:
    """Ragged edges, odd values, three dtypes, against a loop over blocks."""
    x = torch.randn(140, 200, generator=torch.Generator().manual_seed(5))
    x *= 2.0 ** torch.randint(-140, 120, (140, 1), generator=torch.Generator())
    x[0, :12] = torch.tensor(ODD)
    x[7], x[9] = NAN, 0.0
    x[11, 150:] = 1e-44
    for y in (x, x.bfloat16(), x.half()):
        codes, inv_scale = quantize_block(y, dtype, block, power_of_2)
        wanted = slow_blocks(y, dtype, block, power_of_2)
        assert same(inv_scale, wanted[1])
        assert same(codes, wanted[0])


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("power_of_2", [True, False])
def test_block_scales_equal_transformer_engine(
    current: ModuleType, name: str, power_of_2: bool
) -> None:
    """Its function for scales, over the amax of 1 x 128 blocks with zeros beyond."""
    x = TENSORS[name]
    for dtype in FORMATS:
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 128))
        tiles = padded.view(x.shape[0], -1, 128)
        scale, inv_scale, _ = current._scale_from_amax_tensor(
            x.dtype, tiles.abs().amax(-1), dtype, eps=0.0, pow_2_scales=power_of_2
        )
        ours = quantize_block(x, dtype, power_of_2=power_of_2)
        assert same(ours[1], inv_scale)
        wanted = by_ml_dtypes(tiles * scale[..., None], dtype)
        assert same(ours[0], wanted.flatten(1)[:, : x.shape[1]].contiguous())


def test_power_of_two_scales_never_saturate() -> None:
    """Rounded down: the largest of a block lands in the upper half of the range."""
    x = torch.randn(1000, 128, generator=torch.Generator().manual_seed(6))
    for dtype in FORMATS:
        for codes, _ in (quantize_block(x, dtype), quantize_mxfp8(x, dtype)):
            size = codes.float().view(-1, 32).abs().amax(1)
            assert size.max() <= FP8_MAX[dtype]
        top = quantize_block(x, dtype)[0].float().abs().amax(1)
        assert (top >= FP8_MAX[dtype] / 2).all()


# ------------------------------------------------------------------------------- MXFP8


def e8m0_up(value: float) -> int:
    """Return the code of the smallest power of two that is not below ``value``."""
    if value == INF:
        return 254
    code = 0
    while code < 254 and Fraction(2) ** (code - 127) < Fraction(value):
        code += 1
    return code


@pytest.mark.parametrize("dtype", FORMATS)
def test_mx_scales_are_rounded_up(dtype: torch.dtype) -> None:
    """Every exponent, at the mantissas where it changes, after amax * (1 / max)."""
    third = struct.unpack("f", struct.pack("f", 1.0 / FP8_MAX[dtype]))[0]
    mantissas = (0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x600001)
    patterns = [(e << 23) | m for e in range(255) for m in (*mantissas, 0x7FFFFF)]
    amax = torch.tensor([*patterns, 0x7F800000], dtype=torch.int32).view(torch.float32)
    x = torch.zeros(len(amax), 32)
    x[:, 3] = -amax
    codes, inv_scale = quantize_mxfp8(x, dtype)
    product = (amax.double() * third).float()  # one rounding: exact in float64
    wanted = [e8m0_up(v) for v in product.tolist()]
    assert inv_scale.view(torch.uint8).view(-1).tolist() == wanted
    scale = [2.0 ** (127 - w) for w in wanted]  # subnormal for 254
    reached = (-amax.double() * torch.tensor(scale, dtype=torch.float64)).float()
    assert same(codes[:, 3], by_ml_dtypes(reached, dtype))


@pytest.mark.parametrize("rounding", ["up", "floor"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", TENSORS)
def test_mxfp8_equals_torchao(name: str, dtype: torch.dtype, rounding: str) -> None:
    """RCEIL is Transformer Engine's rule, FLOOR that of the OCP specification."""
    x = TENSORS[name]
    mx = quiet_import("torchao.prototype.mx_formats.mx_tensor")
    modes = mx.ScaleCalculationMode
    mode = modes.RCEIL if rounding == "up" else modes.FLOOR
    scale, codes = mx.to_mx(x, dtype, 32, mode)
    ours = quantize_mxfp8(x, dtype, rounding=rounding)
    assert torch.equal(ours[1].view(torch.uint8), scale.view(torch.uint8))
    if name not in {"subnormal", "tiny"}:  # torchao lets the smallest scale be 2**-126
        assert same(ours[0], codes.view(x.shape))


def test_mx_directions_agree_with_each_other() -> None:
    """Columns are the rows of the transposed; a square has the largest of its rows."""
    x = TENSORS["heavy"]
    down, across = quantize_mxfp8(x, E4M3, -2), quantize_mxfp8(x.mT, E4M3)
    assert same(down[0], across[0].mT.contiguous())
    assert same(down[1].view(torch.uint8), across[1].view(torch.uint8).mT.contiguous())
    square = quantize_mxfp8(x, E4M3, None)
    rows = quantize_mxfp8(x, E4M3)[1].view(torch.uint8)
    assert torch.equal(
        square[1].view(torch.uint8), rows.view(2, 32, -1).amax(1, keepdim=False)
    )
    assert same(square[0].mT.contiguous(), quantize_mxfp8(x.mT, E4M3, None)[0])


def test_mx_leaves_nan_out_and_stores_the_largest_for_infinity() -> None:
    """A NaN does not enter the scale of its block; zeros have the smallest scale."""
    x = torch.zeros(3, 32)
    x[0, 0], x[0, 1], x[1, 0], x[1, 1] = NAN, 448.0, INF, 1.0
    codes, inv_scale = quantize_mxfp8(x, E4M3)
    assert inv_scale.view(torch.uint8).view(-1).tolist() == [127, 254, 0]
    assert codes[0, :2].tolist()[1] == 448.0
    assert codes[0, 0].isnan()
    assert codes[1, :2].tolist() == [448.0, 0.0]
    values = dequantize(codes, inv_scale)
    assert values[1, 0] == INF  # 448 * 2**127
    assert values[2].tolist() == [0.0] * 32


def test_floor_saturates_a_sixth_of_normal_blocks() -> None:
    """Where amax has a significand above 1.75; P = 0.169 from the distribution of amax.

    The share is an average of 50,000 independent indicators: six standard deviations
    are 0.0101.
    """
    x = torch.randn(50_000, 32, generator=torch.Generator().manual_seed(7))
    amax = x.abs().amax(1)
    scale = quantize_mxfp8(x, E4M3, rounding="floor")[1].float().view(-1)
    assert abs((amax > 448 * scale).float().mean().item() - 0.169) < 0.0101
    assert not (amax > 448 * quantize_mxfp8(x, E4M3)[1].float().view(-1)).any()


# ------------------------------------------------------------------------------- NVFP4


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("two_d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_equals_transformer_engine(
    nvfp4: ModuleType, name: str, two_d: bool, dtype: torch.dtype
) -> None:
    """Codes, scales and amax in both directions, 1 x 16 and 16 x 16."""
    x = TENSORS[name].to(dtype) + 0.0  # no -0, which the reference forgets
    reference = nvfp4.NVFP4QuantizerRef(
        nvfp4.reference_utils.Fp4Formats.E2M1,
        quant_tile_shape=(16, 16) if two_d else (1, 16),
    ).quantize(x)
    for y, data, scale, amax in (
        (x, reference.data, reference.scale, reference.global_amax_row),
        (x.mT, reference.data_t, reference.scale_t, reference.global_amax_col),
    ):
        ours = quantize_nvfp4(y, two_d)
        assert torch.equal(ours[0], data)
        assert same(ours[1], scale)
        assert same(ours[2].view(1), amax)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("name", sorted(TENSORS.keys() - {"tiny", "subnormal"}))
def test_nvfp4_with_hadamard_equals_transformer_engine(
    nvfp4: ModuleType, name: str, signs: bool
) -> None:
    """It is applied to the transposed only, and amax is taken after it.

    On a processor with bfloat16 units the reference takes subnormals for zero.
    """
    x = TENSORS[name].bfloat16() + 0.0
    if name == "huge":
        x = x / 64  # sums overflow, in the reference too
    reference = nvfp4.NVFP4QuantizerRef(
        nvfp4.reference_utils.Fp4Formats.E2M1,
        with_rht=True,
        with_random_sign_mask=signs,
    ).quantize(x)
    ours = quantize_nvfp4(x.mT, hadamard=True, random_signs=signs)
    assert torch.equal(ours[0], reference.data_t)
    assert same(ours[1], reference.scale_t)
    assert same(ours[2].view(1), reference.global_amax_col)


def test_hadamard_transform_is_a_rotation() -> None:
    """Its rows are orthogonal, and all elements 1/4 or -1/4."""
    matrix = hadamard_transform(torch.eye(16, dtype=torch.bfloat16)).float()
    assert torch.equal(matrix.abs(), torch.full((16, 16), 0.25))
    assert torch.equal(matrix @ matrix.T, torch.eye(16))
    assert matrix[0, 0] > 0
    assert matrix[3, 0] < 0


def test_nvfp4_of_odd_tensors() -> None:
    """NaN is left out of both amax and becomes +6; Inf has a scale of one."""
    x = torch.ones(2, 16)
    x[0, 0] = -NAN
    codes, inv_scale, amax = quantize_nvfp4(x)
    assert amax == 1.0
    assert codes[0, 0] & 15 == 7
    assert inv_scale.tolist() == [[448.0], [448.0]]
    x[0, 0] = -INF
    codes, inv_scale, amax = quantize_nvfp4(x)
    assert amax == INF
    assert inv_scale[0, 0] == 448.0
    assert codes[0, 0] & 15 == 15
    codes, inv_scale, amax = quantize_nvfp4(torch.zeros(2, 16))
    assert (codes == 0).all()
    assert (inv_scale.float() == 0).all()
    assert amax == 0


@pytest.mark.parametrize("name", ["normal", "heavy", "gradient"])
def test_nvfp4_dequantizes_as_transformer_engine(name: str) -> None:
    """``codes * (scale * amax * (1 / 2688))``, each product rounded."""
    x = TENSORS[name]
    codes, inv_scale, amax = quantize_nvfp4(x)
    scale = inv_scale.float() * amax * torch.tensor(1 / 2688)
    wanted = decode_fp4(codes).view(len(x), -1, 16) * scale[..., None]
    assert same(dequantize(codes, inv_scale, amax), wanted.view(x.shape))


# -------------------------------------------------------------- stochastic: statistics


def test_stochastic_rounding_has_the_exact_law_of_eight_bits() -> None:
    """Over all 256 values of u the mean is x to 1/256 of a step, and never past 6.

    With 16 * 65,536 draws for each x the frequency of the upper neighbor is within six
    standard deviations, ``6 * sqrt(p * (1 - p) / n)``, of ``p = k / 256``.
    """
    generator = torch.Generator().manual_seed(8)
    n = 1 << 16
    for x, low, step in (
        (0.1, 0, 0.5),
        (0.75, 0.5, 0.5),
        (1.9, 1.5, 0.5),
        (2.25, 2.0, 1.0),
        (3.7, 3.0, 1.0),
        (5.0, 4.0, 2.0),
    ):
        for sign in (1, -1):
            block = torch.full((n, 16), sign * x)
            values = decode_fp4(encode_fp4(block, ONE, True, generator)) * sign
            assert set(values.flatten().tolist()) == {low, low + step}
            up = (values > low).float().mean().item()
            k = sum(Fraction(x) + Fraction(u, 256) * Fraction(step) >= low + step
                    for u in range(256))  # fmt: skip
            p = k / 256
            assert abs(up - p) <= 6 * math.sqrt(p * (1 - p) / (16 * n))
            assert abs(low + p * step - x) <= step / 256


def test_stochastic_rounding_keeps_what_is_representable_and_saturates() -> None:
    """All codes stay; above 6 it is 6; NaN is +6; the sign of zero stays."""
    generator = torch.Generator().manual_seed(9)
    values = decode_fp4(torch.arange(256, dtype=torch.uint8)[:, None]).view(-1, 16)
    again = encode_fp4(values, ONE, True, generator)
    assert torch.equal(again, encode_fp4(values, ONE))
    odd = torch.tensor([6.5, -100.0, INF, -INF, NAN, -0.0] + [0.0] * 10)
    got = decode_fp4(encode_fp4(odd, ONE, True, generator))[:6]
    assert got.tolist() == [6.0, -6.0, 6.0, -6.0, 6.0, -0.0]
    assert got.signbit().tolist() == [False, True, False, True, False, True]


def test_stochastic_rounding_is_unbiased_where_nearest_is_not() -> None:
    """The mean over 400 draws: the sum of independent errors, each below one step."""
    x = torch.full((16, 64), 0.2)
    x[:, 0] = 6.0  # fixes the scale of each row's first block
    generator = torch.Generator().manual_seed(10)
    draws = [
        dequantize(*quantize_nvfp4(x, stochastic=True, generator=generator))
        for _ in range(400)
    ]
    error = (torch.stack(draws)[..., 1:16] - 0.2).mean().abs().item()
    nearest_error = (dequantize(*quantize_nvfp4(x))[..., 1:16] - 0.2).mean().abs()
    n = 400 * 16 * 15
    assert error <= 0.5 / 256 + 6 * math.sqrt(0.4 * 0.6 * 0.25 / n)
    assert nearest_error == pytest.approx(0.2)


def test_the_generator_decides_the_codes() -> None:
    """Same seed, same codes, for any number of pieces; another seed, others."""
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(11))

    def codes(seed: int, y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return encode_fp4(y, ONE.expand(1, 1), True, generator)

    assert torch.equal(codes(1, x), codes(1, x))
    assert not torch.equal(codes(1, x), codes(2, x))
    assert torch.equal(codes(1, x), codes(1, x.view(600, 256)).view(300, 256))
    torch.manual_seed(3)
    first = quantize_nvfp4(x, stochastic=True)[0]
    torch.manual_seed(3)
    assert torch.equal(first, quantize_nvfp4(x, stochastic=True)[0])


# ------------------------------------------------------------------- shapes and layout

QUANTIZERS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "tensor": lambda x: quantize_tensor(x, E4M3, 3.0),
    "e5m2": lambda x: quantize_tensor(x, E5M2, torch.tensor([3.0])),
    "1 x 128": lambda x: quantize_block(x, E4M3),
    "128 x 128": lambda x: quantize_block(x, E4M3, (128, 128)),
    "128 x 1": lambda x: quantize_block(x, E5M2, (128, 1), power_of_2=False),
    "mx rows": lambda x: quantize_mxfp8(x, E4M3),
    "mx columns": lambda x: quantize_mxfp8(x, E5M2, -2),
    "mx squares": lambda x: quantize_mxfp8(x, E4M3, None),
    "nvfp4": quantize_nvfp4,
    "nvfp4 2d": lambda x: quantize_nvfp4(x, two_d=True),
}
# Error of an element over the amax of its block: half the last place of the largest,
# twice that where the scale is rounded to a power of two, or has 3 bits itself.
ERRORS = {"e5m2": 2**-3, "128 x 1": 2**-3, "mx columns": 2**-3}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_dequantize_inverts_each_quantizer(kind: str) -> None:
    """Within the format's error, in the shape and layout of x, for three dtypes."""
    x = torch.randn(2, 96, 256, generator=torch.Generator().manual_seed(12)).clamp(
        -9, 9
    )
    bound = ERRORS.get(kind, 0.3 if kind.startswith("nvfp4") else 2**-4)
    for y in (x, x.bfloat16(), x.half(), x.mT.contiguous().mT):
        packed = QUANTIZERS[kind](y)
        assert packed[0].element_size() == 1
        back = dequantize(*packed)
        assert back.shape == x.shape
        assert back.is_contiguous()
        assert back.dtype == torch.float32
        assert ((back - y.float()).abs() <= bound * y.float().abs().max()).all()
        out = torch.full_like(back, 7.0)
        assert dequantize(*packed, out=out) is out
        assert same(out, back)
        assert same(dequantize(*packed, dtype=torch.bfloat16), back.bfloat16())


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_layout_and_threads_do_not_change_a_bit(kind: str) -> None:
    """Transposed and sliced views, and one thread or two or three."""
    big = torch.randn(576, 1024, generator=torch.Generator().manual_seed(13))
    view = big.view(576, 512, 2)[..., 0].T.contiguous().T
    wanted = QUANTIZERS[kind](view.contiguous())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = QUANTIZERS[kind](view)
            for a, b in zip(got, wanted, strict=True):
                assert same(a, b)
            assert same(dequantize(*got), dequantize(*wanted))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_empty_tensors_pass(kind: str) -> None:
    """An expert may receive no tokens."""
    for shape in ((0, 256), (2, 0, 256), (32, 0)):
        packed = QUANTIZERS[kind](torch.empty(shape))
        assert packed[0].numel() == 0
        assert dequantize(*packed).shape == shape


def test_whole_tensors_may_have_any_shape() -> None:
    """None, one and four dimensions; and out= receives the codes."""
    for shape in ((), (5,), (2, 3, 4, 5)):
        x = torch.randn(shape)
        out = torch.empty(shape, dtype=E4M3)
        codes, inv_scale = quantize_tensor(x, "E4M3", 2.0, out=out)
        assert codes is out
        assert codes.shape == dequantize(codes, inv_scale).shape == shape
    assert inv_scale.shape == ()


def test_one_dimension_is_a_row() -> None:
    """Blocks of a vector."""
    x = torch.randn(64)
    assert quantize_block(x, E4M3)[1].shape == (1, 1)
    assert quantize_mxfp8(x, E4M3)[1].shape == (1, 2)
    assert quantize_nvfp4(x)[0].shape == (32,)
    for packed in (quantize_block(x, E4M3), quantize_mxfp8(x, E4M3)):
        assert dequantize(*packed).shape == (64,)
    assert dequantize(*quantize_nvfp4(x)).shape == (64,)


def test_no_gradient_enters_and_nothing_given_is_changed() -> None:
    """Quantizing is not differentiable; it leaves x and scale alone."""
    x = torch.randn(32, 128, requires_grad=True)
    before, scale = x.detach().clone(), torch.tensor(2.0, requires_grad=True)
    for packed in (
        *(q(x) for q in QUANTIZERS.values()),
        quantize_tensor(x, E4M3, scale),
    ):
        assert not any(t.requires_grad for t in packed)
        assert not dequantize(*packed).requires_grad
    assert not compute_amax(x).requires_grad
    assert same(x.detach(), before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_amax_leaves_nan_out(dtype: torch.dtype) -> None:
    """As fmaxf does; Inf counts, an empty tensor has 0."""
    x = torch.tensor([1.0, -3.0, 2.0], dtype=dtype)
    assert compute_amax(x).item() == 3.0
    assert compute_amax(torch.tensor([NAN, -3.0], dtype=dtype)).item() == 3.0
    assert compute_amax(torch.tensor([NAN, -INF], dtype=dtype)).item() == INF
    assert compute_amax(torch.tensor([NAN], dtype=dtype)).item() == 0.0
    assert compute_amax(torch.empty(0, dtype=dtype)).item() == 0.0
    assert compute_amax(x).dtype == torch.float32


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64, E4M3])
def test_other_dtypes_are_refused(kind: str, dtype: torch.dtype) -> None:
    """One TypeError that names them."""
    x = torch.zeros(32, 128).to(dtype)
    with pytest.raises(TypeError, match=f"float32, bfloat16 or float16, got {dtype}"):
        QUANTIZERS[kind](x)


def test_what_is_no_tensor_is_refused() -> None:
    """Not an AttributeError from inside."""
    with pytest.raises(TypeError, match="got list"):
        compute_amax([1.0])  # type: ignore[arg-type]


def test_formats_are_named_and_typos_get_a_hint() -> None:
    """Two dtypes, two strings."""
    x = torch.zeros(32, 32)
    assert quantize_tensor(x, "E5M2", 1.0)[0].dtype == E5M2
    with pytest.raises(ValueError, match=r"got 'e4m3fn'; did you mean 'E4M3'\?"):
        quantize_tensor(x, "e4m3fn", 1.0)
    with pytest.raises(ValueError, match=r"fmt must be .* got torch.float16"):
        quantize_block(x, torch.float16)
    with pytest.raises(ValueError, match="got 'HYBRID'"):
        quantize_mxfp8(x, "HYBRID")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: quantize_tensor(x, E4M3, torch.ones(2)),
            r"one element, got .*\[2\]",
        ),
        (
            lambda x: quantize_block(x, E4M3, (0, 128)),
            r"positive integers, got \(0, 128",
        ),
        (
            lambda x: quantize_block(x, E4M3, (True, 1)),
            r"positive integers, got \(True",
        ),
        (lambda x: quantize_block(x[0, 0], E4M3), "at least one dimension"),
        (lambda x: quantize_mxfp8(x, E4M3, 2), "axis must be .* got 2"),
        (lambda x: quantize_mxfp8(x, E4M3, rounding="ceil"), "rounding .* got 'ceil'"),
        (lambda x: quantize_mxfp8(x[:, :40], E4M3), r"by 32 \(got shape=\[32, 40\]\)"),
        (lambda x: quantize_mxfp8(x[:31], E4M3, -2), r"by 32 \(got shape=\[31, 64\]\)"),
        (lambda x: quantize_nvfp4(x[:, :8]), r"by 16 \(got shape=\[32, 8\]\)"),
        (lambda x: quantize_nvfp4(x[:8], two_d=True), r"by 16 \(got shape=\[8, 64\]\)"),
    ],
)
def test_quantizers_refuse_what_they_cannot_cut(
    call: Callable[[Tensor], Any], message: str
) -> None:
    """One clear error each, with Transformer Engine's words where it has some."""
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(32, 64))


def test_hadamard_transform_takes_what_transformer_engine_takes() -> None:
    """bfloat16, sixteen columns at a time."""
    with pytest.raises(
        TypeError, match=r"only supported for bfloat16 input, got torch.float32"
    ):
        quantize_nvfp4(torch.zeros(16, 16), hadamard=True)
    with pytest.raises(ValueError, match=r"multiple of 16 columns, got shape=\[4, 8\]"):
        hadamard_transform(torch.zeros(4, 8, dtype=torch.bfloat16))


def test_dequantize_refuses_what_does_not_fit() -> None:
    """Codes, scales and amax that cannot belong together."""
    x = torch.randn(256, 256)
    codes, inv_scale = quantize_block(x, E4M3)
    with pytest.raises(ValueError, match=r"\[256, 3\] does not fit 256 x 256 codes"):
        dequantize(codes, torch.ones(256, 3))
    with pytest.raises(ValueError, match=r"\[256, 2\].* in blocks of 1 x 64"):
        dequantize(codes, inv_scale, block=(1, 64))
    with pytest.raises(ValueError, match=r"\[2\] does not fit"):
        dequantize(codes, torch.ones(2))
    with pytest.raises(ValueError, match="amax is for NVFP4"):
        dequantize(codes, inv_scale, torch.tensor(1.0))
    with pytest.raises(ValueError, match="amax is for NVFP4"):
        dequantize(*quantize_nvfp4(x)[:2])
    with pytest.raises(TypeError, match=r"codes must be .* got torch.float32"):
        dequantize(x, inv_scale)
    with pytest.raises(ValueError, match=r"inv_scale must be one of .* torch.bfloat16"):
        dequantize(codes, inv_scale.bfloat16())


def test_delayed_scaling_refuses_another_algorithm_or_shape() -> None:
    """Rather than treat any string as most_recent, as Transformer Engine would."""
    history, scale = torch.zeros(4, 3), torch.ones(3)
    with pytest.raises(ValueError, match="'max' or 'most_recent', got 'mean'"):
        update_delayed_scaling(history, scale, 448.0, recipe("mean"))
    with pytest.raises(ValueError, match=r"got \[4, 3\] and \[2\]"):
        update_delayed_scaling(history, scale[:2], 448.0, recipe())
    with pytest.raises(ValueError, match=r"got \[0, 3\] and \[3\]"):
        update_delayed_scaling(history[:0], scale, 448.0, recipe())
