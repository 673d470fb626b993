"""Tests of snippets/fp8/linear_function.py: each product from its quantized parts."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from snippets import fp8 as te
from snippets.fp8.base import TransformerEngineBaseModule

# In NVFP4 the operands of wgrad pass a Hadamard transform, which takes bfloat16 only.
RECIPES: dict[str, Callable[..., te.Recipe]] = {
    "delayed": te.DelayedScaling,
    "delayed-e4m3": lambda **kw: te.DelayedScaling(fp8_format=te.Format.E4M3, **kw),
    "current": te.Float8CurrentScaling,
    "current-e4m3": lambda **kw: te.Float8CurrentScaling(
        fp8_format=te.Format.E4M3, **kw
    ),
    "block": te.Float8BlockScaling,
    "mxfp8": te.MXFP8BlockScaling,
    "mxfp8-hybrid": lambda **kw: te.MXFP8BlockScaling(
        fp8_format=te.Format.HYBRID, **kw
    ),
    "mxfp8-2d": lambda **kw: te.MXFP8BlockScaling(enable_2d_quantization=True, **kw),
    "nvfp4": lambda **kw: te.NVFP4BlockScaling(disable_stochastic_rounding=True, **kw),
}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROWS, IN, OUT = 256, 256, 384  # more than the 128 of a flush


def made(
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    save_original_input: bool = False,
) -> te.Linear:
    """Return a layer whose bias is not zero."""
    torch.manual_seed(0)
    layer = te.Linear(
        IN, OUT, params_dtype=dtype, bias=bias, save_original_input=save_original_input
    )
    if layer.use_bias:
        torch.nn.init.normal_(layer.bias)
    return layer


def batch(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Return an input and a gradient whose rows and columns differ by magnitudes.

    So that a scale for a row's block rounds otherwise than one for a column's, even
    where both are powers of two: some elements underflow under one of them.
    """
    torch.manual_seed(1)

    def uneven(rows: int, columns: int, size: float) -> Tensor:
        spread = 10.0 ** (torch.rand(rows, 1) * 3 + torch.rand(1, columns) * 4)
        return (torch.randn(rows, columns) * spread * size).to(dtype)

    return uneven(ROWS, IN, 1e-4).requires_grad_(), uneven(ROWS, OUT, 1e-7)


def step(layer: te.Linear, recipe: te.Recipe, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the output and the gradients of one forward and backward."""
    x, dy = batch(dtype)
    layer.zero_grad()
    with te.autocast(recipe=recipe):
        y = layer(x)
    assert isinstance(y, Tensor)
    torch.autograd.backward(y, dy)
    assert x.grad is not None
    assert isinstance(layer.weight.grad, Tensor)
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad}


def rounded(name: str, x: Tensor, kind: str, columnwise: bool) -> Tensor:
    """Quantize and dequantize a tensor as the recipe's specification has it.

    Args:
        name: The recipe.
        x: [rows, columns].
        kind: "x", "w" or "dy".
        columnwise: The product sums over the rows of ``x``.
    """
    hybrid = name in {"delayed", "current", "mxfp8-hybrid"}
    fmt = E5M2 if hybrid and kind == "dy" else E4M3
    source = x.t() if columnwise else x
    if name.startswith("current"):
        amax = x.abs().amax().float()
        scale = te.compute_current_scale(amax, torch.finfo(fmt).max)
        values = te.dequantize(*te.quantize_tensor(source, fmt, scale))
    elif name.startswith("delayed"):  # the first step: scales are still one
        values = te.dequantize(*te.quantize_tensor(source, fmt, torch.tensor(1.0)))
    elif name == "block":
        block = (128, 128) if kind == "w" else (1, 128)
        values = te.dequantize(*te.quantize_block(source, fmt, block))
    elif name == "mxfp8-2d" and kind == "w":
        values = te.dequantize(*te.quantize_mxfp8(source, fmt, axis=None))
    elif name.startswith("mxfp8"):
        values = te.dequantize(*te.quantize_mxfp8(source, fmt))
    else:
        hadamard = columnwise and kind != "w"
        codes, scale, amax = te.quantize_nvfp4(
            source, two_d=kind == "w", hadamard=hadamard
        )
        values = te.dequantize(codes, scale, amax)
    return values.double()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in RECIPES
        for dtype in (torch.bfloat16, torch.float32)
        if (name, dtype) != ("nvfp4", torch.float32)
    ],
)
def test_each_product_is_that_of_its_quantized_operands(
    name: str, dtype: torch.dtype
) -> None:
    """The products are y = q(x) q(w)^T + b, dx = q(dy) q(w) and dw = q(dy)^T q(x).

    Against float64 sums of independently quantized operands. A float32 sum of K exact
    products is off by at most K * 2**-24 of the sum of their magnitudes, and the
    result is rounded once to its dtype.
    """
    layer = made(dtype)
    found = step(layer, RECIPES[name](), dtype)
    (x, dy), w = batch(dtype), layer.weight.detach()
    bias = layer.bias.detach().bfloat16().double()
    none = torch.zeros((), dtype=torch.float64)
    products = {
        "y": ((x.detach(), "x", False), (w, "w", False), bias),
        "dx": ((dy, "dy", False), (w, "w", True), none),
        "dw": ((dy, "dy", True), (x.detach(), "x", True), none),
    }
    for key, (left, right, added) in products.items():
        a, b = rounded(name, *left), rounded(name, *right)
        exact = a @ b.t() + added
        size = a.abs() @ b.abs().t() + added.abs()
        # Scales are applied after the sum and rounded, too: three more roundings.
        bound = (a.shape[1] + 3) * 2**-24 * size
        bound += torch.finfo(dtype).eps / 2 * (exact.abs() + bound)

        assert found[key].dtype == dtype
        assert ((found[key].double() - exact).abs() <= bound).all(), key


def test_the_bound_tells_formats_apart() -> None:
    """The test above fails if, say, a gradient is rounded to E4M3 instead of E5M2."""
    hybrid = step(made(), te.Float8CurrentScaling(), torch.bfloat16)
    e4m3 = step(made(), RECIPES["current-e4m3"](), torch.bfloat16)

    assert torch.equal(hybrid["y"], e4m3["y"]), "the forward is E4M3 in both"
    relative = (e4m3["dx"] - hybrid["dx"]).norm() / hybrid["dx"].norm()
    assert relative > 2**-6


@pytest.mark.parametrize("name", ["current", "block", "mxfp8", "nvfp4"])
def test_backward_overrides(name: str) -> None:
    """The forward stays quantized; the backward takes what the recipe says."""
    normal = step(made(), RECIPES[name](), torch.bfloat16)
    layer = made()
    high = step(
        layer, RECIPES[name](backward_override="high_precision"), torch.bfloat16
    )
    (x, dy), w = batch(), layer.weight.detach()

    assert torch.equal(high["y"], normal["y"])
    assert torch.equal(high["dx"], dy @ w)
    assert torch.equal(high["dw"], dy.t() @ x.detach())

    layer = made()
    low = step(layer, RECIPES[name](backward_override="dequantized"), torch.bfloat16)
    x_lp = rounded(name, x.detach(), "x", columnwise=False).bfloat16()
    w_lp = rounded(name, w, "w", columnwise=False).bfloat16()

    assert torch.equal(low["y"], normal["y"])
    assert torch.equal(low["dx"], dy @ w_lp)
    assert torch.equal(low["dw"], dy.t() @ x_lp)


@pytest.mark.parametrize("name", ["current", "block", "mxfp8"])
def test_keeping_the_original_input_changes_no_bit(name: str) -> None:
    """It is quantized in the backward instead; delayed scaling refuses it."""
    saved = step(made(save_original_input=True), RECIPES[name](), torch.bfloat16)
    normal = step(made(), RECIPES[name](), torch.bfloat16)

    assert all(torch.equal(saved[key], normal[key]) for key in normal)
    with pytest.raises(ValueError, match="not supported with save_original_input"):
        step(made(save_original_input=True), te.DelayedScaling(), torch.bfloat16)


def test_activations_are_kept_in_one_byte() -> None:
    """What autograd saves of an FP8 layer: codes of x and w, the weight, scales."""
    layer, (x, _dy) = made(bias=False), batch()
    sizes: list[int] = []

    def count(saved: Tensor) -> Tensor:
        sizes.append(saved.nbytes)
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved),
        te.autocast(),
    ):
        layer(x)

    codes_x, codes_w, weight = ROWS * IN, IN * OUT, IN * OUT * 2
    assert sum(sizes) == codes_x + codes_w + weight + 2 * 4


def test_needs_decide_what_is_computed() -> None:
    """A frozen weight gets no gradient, an input that needs none neither."""
    layer, (x, dy) = made(), batch()
    layer.weight.requires_grad = False
    with te.autocast():
        torch.autograd.backward(layer(x), dy)
    assert layer.weight.grad is None
    assert x.grad is not None
    layer.weight.requires_grad = True
    with te.autocast():
        torch.autograd.backward(layer(x.detach()), dy)
    assert isinstance(layer.weight.grad, Tensor)


@pytest.mark.parametrize(
    "shape", [(16, 16), (2, 8, 16), (0, 16)], ids=["2d", "3d", "empty"]
)
def test_leading_dimensions_are_rows(shape: tuple[int, ...]) -> None:
    """Any number of them, and none of their elements, too."""
    layer = te.Linear(16, 32)
    x = torch.randn(*shape, requires_grad=True)
    with te.autocast():
        y = layer(x)
    assert isinstance(y, Tensor)
    torch.autograd.backward(y.sum())

    assert y.shape == (*shape[:-1], 32)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()


def test_rows_that_only_the_backward_refuses() -> None:
    """Eight rows run in inference; a gradient sums over them and needs sixteen."""
    layer, x = te.Linear(16, 24), torch.randn(8, 16)
    with te.autocast(), torch.no_grad():
        assert isinstance(layer(x), Tensor)
    with (
        te.autocast(),
        pytest.raises(ValueError, match=r"weight gradient .* 8 of them"),
    ):
        layer(x)
    x = torch.randn(16, 16, requires_grad=True)
    with (
        te.autocast(),
        pytest.raises(ValueError, match=r"input gradient .* 24 of them"),
    ):
        layer(x)
    with te.autocast():
        layer(x.detach())


def recipes_and_shapes() -> list[tuple[te.Recipe, tuple[int, int], str]]:
    """List shapes that kernels refuse."""
    each = "divisible by 8 and the last dimension to be divisible by 16"
    plain = [te.DelayedScaling(), te.Float8CurrentScaling()]
    return [
        *itertools.product(plain, [(12, 16), (16, 24)], [each]),
        (te.MXFP8BlockScaling(), (16, 32), "divisible by 32"),
        (te.NVFP4BlockScaling(), (8, 16), "divisible by 16"),
    ]


@pytest.mark.parametrize(("recipe", "shape", "match"), recipes_and_shapes())
def test_shapes_that_kernels_cannot_take(
    recipe: te.Recipe, shape: tuple[int, int], match: str
) -> None:
    """One error, with the shape, and the module is as before."""
    layer = te.Linear(shape[1], 32, params_dtype=torch.bfloat16)
    with te.autocast(recipe=recipe), pytest.raises(ValueError, match=match) as error:
        layer(torch.randn(*shape, dtype=torch.bfloat16))

    assert str(list(shape)) in str(error.value) or str(shape) in str(error.value)
    assert all((q.amax == 0).all() for q in quantizers(layer) if hasattr(q, "amax"))


def quantizers(module: TransformerEngineBaseModule) -> list[Any]:
    """Return those of both passes."""
    return [q for made in module.quantizers.values() for q in made]


def test_the_hadamard_transform_takes_bfloat16_only() -> None:
    """As Transformer Engine's kernel; without it, float32 is taken."""
    layer, x = te.Linear(16, 16), torch.randn(16, 16)
    with (
        te.autocast(recipe=te.NVFP4BlockScaling()),
        pytest.raises(TypeError, match="bfloat16"),
    ):
        layer(x)
    layer = te.Linear(16, 16)
    with te.autocast(recipe=te.NVFP4BlockScaling(disable_rht=True)):
        assert isinstance(layer(x), Tensor)


def test_values_that_are_not_finite() -> None:
    """NaN is left out of amax, Inf keeps the scale; neither destroys the state."""
    layer = made()
    x, _dy = batch()
    recipe = te.DelayedScaling(amax_history_len=2)
    with te.autocast(recipe=recipe):
        layer(x)
    before = layer.fp8_meta["scaling_fwd"].scale.clone()
    bad = x.detach().clone()
    bad[0, 0], bad[1, 1] = float("nan"), float("inf")
    with te.autocast(recipe=recipe):
        y = layer(bad)
    after = layer.fp8_meta["scaling_fwd"].scale

    assert isinstance(y, Tensor)
    assert y[0].isnan().all(), "the row of the NaN"
    assert y[1:].isfinite().all(), "Inf saturates"
    assert torch.equal(before[:1], after[:1]), "an infinite amax keeps the scale"
    assert after.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_do_not_depend_on_threads(threads: int) -> None:
    """Same seed, same bits."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = step(made(), te.DelayedScaling(), torch.bfloat16)
        torch.set_num_threads(3 - threads)
        again = step(made(), te.DelayedScaling(), torch.bfloat16)
    finally:
        torch.set_num_threads(before)

    assert all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize("product", ["fprop", "dgrad", "wgrad"])
def test_each_product_has_its_own_split_accumulator(product: str) -> None:
    """Turning one off changes the bits of that product, and of no other."""
    keys = {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}
    recipe = te.Float8CurrentScaling(fp8_gemm_fprop=te.MMParams())
    with te.accumulator("hopper"):
        split = step(made(), recipe, torch.bfloat16)
        setattr(recipe, f"fp8_gemm_{product}", te.MMParams(use_split_accumulator=False))
        short = step(made(), recipe, torch.bfloat16)

    changed = {key for key in split if not torch.equal(split[key], short[key])}
    assert changed == {keys[product]}


@pytest.mark.parametrize("name", ["delayed", "current", "block"])
def test_hopper_sums_every_recipe_of_hopper(name: str) -> None:
    """Within what 13 fraction bits lose; the recipes of Blackwell are refused."""
    exact = step(made(), RECIPES[name](), torch.bfloat16)
    with te.accumulator("hopper"):
        short = step(made(), RECIPES[name](), torch.bfloat16)
    for key, value in exact.items():
        assert 0 < (short[key] - value).norm() < 2**-7 * value.norm(), key
    with te.accumulator("hopper"), pytest.raises(ValueError, match="Hopper multiplies"):
        step(made(), te.MXFP8BlockScaling(), torch.bfloat16)


def test_hopper_obeys_the_split_accumulator() -> None:
    """Float8CurrentScaling's forward is summed in the short accumulator only."""
    x = torch.rand(16, 4096, dtype=torch.bfloat16)

    def error(split: bool) -> float:
        torch.manual_seed(0)
        layer = te.Linear(4096, 16, bias=False, params_dtype=torch.bfloat16)
        torch.nn.init.uniform_(layer.weight)
        recipe = te.Float8CurrentScaling(
            fp8_gemm_fprop=te.MMParams(use_split_accumulator=split)
        )
        with torch.no_grad(), te.autocast(recipe=recipe):
            exact = layer(x)
            with te.accumulator("hopper"):
                short = layer(x)
        assert isinstance(exact, Tensor)
        assert isinstance(short, Tensor)
        return float(((short - exact).float() / exact.float()).mean())

    assert error(split=False) < -0.01  # truncation loses, always downward
    assert abs(error(split=True)) < 0.005


def test_a_product_in_high_precision_takes_any_number_of_rows() -> None:
    """Where a ``CustomRecipe`` leaves one of its operands as it is."""

    def leaving(*kinds: str) -> te.CustomRecipe:
        def factory(role: te.QuantizerRole | None) -> te.Quantizer:
            if role is None or role.tensor_type in kinds:
                return te.IdentityQuantizer()
            return te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3)

        return te.CustomRecipe(qfactory=factory)

    x = torch.ones(8, 32, requires_grad=True)
    for recipe in (leaving("grad_output"), leaving("input", "weight")):
        with te.autocast(recipe=recipe):
            te.Linear(32, 32)(x)
    with (
        te.autocast(recipe=leaving("weight")),
        pytest.raises(ValueError, match="divisible by 16: the weight gradient"),
    ):
        te.Linear(32, 32)(x)
