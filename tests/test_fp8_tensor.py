"""Tests of snippets/fp8/tensor.py: parameters that are held in codes only."""

import ast
import copy
import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from snippets import fp8 as te
from snippets.fp8.codes import decode_fp4
from tests import te_source

RECIPES: dict[str, tuple[Callable[[], te.Recipe], int]] = {
    "delayed": (te.DelayedScaling, 1),
    "current": (te.Float8CurrentScaling, 1),
    "block": (te.Float8BlockScaling, 1),
    "mxfp8": (te.MXFP8BlockScaling, 2),  # columnwise codes are others
    "nvfp4": (te.NVFP4BlockScaling, 1),
}
each = pytest.mark.parametrize("name", RECIPES)


def made(name: str, *, preserve: bool = False, size: int = 128) -> te.Linear:
    """Return a layer whose weight is quantized."""
    torch.manual_seed(0)
    with te.quantized_model_init(
        recipe=RECIPES[name][0](), preserve_high_precision_init_val=preserve
    ):
        return te.Linear(size, size, bias=False, params_dtype=torch.bfloat16)


def weight_of(layer: te.Linear) -> te.QuantizedTensor:
    """Return the weight, which is quantized."""
    assert isinstance(layer.weight, te.QuantizedTensor)
    return layer.weight


@each
def test_a_weight_reads_as_the_rounded_initial_value(name: str) -> None:
    """Its dtype and shape are those asked for; the initial value can be kept."""
    layer = made(name, preserve=True)
    weight = weight_of(layer)
    initial: Tensor = weight.get_high_precision_init_val()
    torch.manual_seed(0)
    plain = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16).weight
    quantizer = layer.quantizers["scaling_fwd"][1]

    assert isinstance(weight, torch.nn.Parameter)
    assert (weight.dtype, weight.shape) == (torch.bfloat16, (128, 128))
    assert torch.equal(initial, plain)
    assert torch.equal(
        weight.dequantize(),
        quantizer.to_quantized(plain.detach()).dequantize(torch.bfloat16),
    )
    weight.clear_high_precision_init_val()
    assert weight.get_high_precision_init_val() is None


@each
def test_a_layer_computes_with_the_codes(name: str) -> None:
    """As a layer that holds the dequantized values and quantizes them again does.

    Rounding twice by one rule changes nothing where the second scale is the first:
    so with delayed scaling, whose scale here is one, and with powers of two.
    """
    recipe = RECIPES[name][0]()
    layer, plain = (
        made(name),
        te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16),
    )
    plain.weight.data.copy_(weight_of(layer).dequantize())
    x = torch.randn(32, 128, dtype=torch.bfloat16)
    with torch.no_grad(), te.autocast(recipe=recipe):
        a, b = layer(x), plain(x)

    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    if name in {"delayed", "block", "mxfp8"}:
        assert torch.equal(a, b)
    else:  # the second amax is the rounded first: within one more rounding
        assert (a - b).norm() < 0.1 * b.norm()


def test_an_update_below_half_a_step_is_lost() -> None:
    """And one above is not: why such parameters need main parameters."""
    weight = weight_of(made("mxfp8"))
    before = weight.dequantize()
    with torch.no_grad():
        weight.mul_(1 + 2**-6)  # E4M3 has three mantissa bits: half a step is 2**-4
    assert torch.equal(weight.dequantize(), before)
    with torch.no_grad():
        weight.mul_(1.25)
    assert not torch.equal(weight.dequantize(), before)


@each
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_update_it(
    name: str, foreach: bool, optimizer: type[torch.optim.Optimizer]
) -> None:
    """They read values, and what they write is rounded by the weight's quantizer."""
    layer = made(name, size=32 if name != "block" else 128)
    weight = weight_of(layer)
    before = weight.dequantize().float()
    made_one = optimizer(layer.parameters(), lr=0.5, foreach=foreach)  # type: ignore[call-arg]
    weight.grad = torch.full_like(before, 0.1, dtype=torch.bfloat16)
    made_one.step()
    expected = before - 0.5 * (0.1 if optimizer is torch.optim.SGD else 1.0)

    assert isinstance(layer.weight, te.QuantizedTensor)
    moved = (weight.dequantize().float() - expected).abs()
    # E4M3 is off by 2**-4 relatively, E2M1 by a quarter of the block's amax.
    bound = 0.3 if name == "nvfp4" else 2**-4 + 2**-8
    assert (moved <= bound * expected.abs().amax()).all()


@each
def test_saving_and_copying_keep_every_code(name: str) -> None:
    """Through state_dict, torch.save with weights_only, deepcopy, clone and detach."""
    layer = made(name)
    weight, values = weight_of(layer), weight_of(layer).dequantize()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = made(name)
    with torch.no_grad():
        weight_of(other).zero_()
    other.load_state_dict(torch.load(file))

    assert torch.equal(weight_of(other).dequantize(), values)
    copied = copy.deepcopy(layer)
    assert isinstance(copied.weight, te.QuantizedTensor)
    with torch.no_grad():
        copied.weight.zero_()
    assert torch.equal(weight.dequantize(), values), "a copy has codes of its own"
    for alike in (weight.clone(), weight.detach(), weight.to("cpu")):
        assert isinstance(alike, te.QuantizedTensor)
        assert torch.equal(alike.dequantize(), values)
    with torch.no_grad():
        weight.clone().zero_()
    assert torch.equal(weight.dequantize(), values), "so has a clone"
    with torch.no_grad():
        weight.detach().zero_()
    assert (weight.dequantize() == 0).all(), "a detached alias shares its codes"


@pytest.mark.parametrize(("name", "sets"), [(k, v[1]) for k, v in RECIPES.items()])
def test_bytes_of_a_weight(name: str, sets: int) -> None:
    """A byte an element (half of one for NVFP4) and the scales, for each direction."""
    quantized = weight_of(made(name)).quantized
    found = {t.data_ptr(): t.nbytes for t in quantized.tensors() if t is not None}
    elements = 128 * 128
    codes = elements // 2 if name == "nvfp4" else elements
    scales = {
        "delayed": 4,
        "current": 4,
        "block": 4,
        "mxfp8": elements // 32,
        "nvfp4": elements // 16 + 4,
    }[name]
    sets = 2 if name == "nvfp4" else sets

    assert sum(found.values()) == sets * (codes + scales)


def test_a_quantizer_that_replaces_another_warns() -> None:
    """In Transformer Engine's words: a history of another length brings a new one."""
    with te.quantized_model_init(recipe=te.DelayedScaling(amax_history_len=1024)):
        layer = te.Linear(32, 32)
    words = "Quantizer is being updated, this may affect model behavior"
    with (
        te.autocast(recipe=te.DelayedScaling(amax_history_len=1)),
        pytest.warns(UserWarning, match=words),
    ):
        layer(torch.randn(32, 32))
    assert weight_of(layer).quantizer is layer.quantizers["scaling_fwd"][1]


def test_each_recipe_has_its_class_of_tensors() -> None:
    """`isinstance` tells them apart as in Transformer Engine, after a load too."""
    kinds = {
        "delayed": te.Float8Tensor,
        "current": te.Float8Tensor,
        "block": te.Float8BlockwiseQTensor,
        "mxfp8": te.MXFP8Tensor,
        "nvfp4": te.NVFP4Tensor,
    }
    for name, kind in kinds.items():
        weight = weight_of(made(name))
        file = io.BytesIO()
        torch.save(weight.detach(), file)
        file.seek(0)
        for alike in (weight, weight.detach(), weight.clone(), torch.load(file)):
            assert type(alike.data) is kind, name
            assert isinstance(alike, te.QuantizedTensor)


def test_another_recipe_is_refused() -> None:
    """In Transformer Engine's words, before anything is computed."""
    layer = made("mxfp8")
    with (
        te.autocast(recipe=te.DelayedScaling()),
        pytest.raises(
            RuntimeError,
            match="Recipe mismatch for 'weight': tensor supports recipe "
            "MXFP8BlockScaling, but got DelayedScaling",
        ),
    ):
        layer(torch.randn(32, 128, dtype=torch.bfloat16))


def test_writes_that_cannot_be() -> None:
    """Another shape, or a tensor from a file that no module holds."""
    layer = made("current")
    weight = weight_of(layer)
    with pytest.raises(ValueError, match=r"shape \(3, 3\).*shape \(128, 128\)"):
        weight.quantize_(torch.zeros(3, 3))
    file = io.BytesIO()
    torch.save(weight.detach(), file)
    file.seek(0)
    loaded = torch.load(file)
    with pytest.raises(RuntimeError, match="has no quantizer"):
        loaded.zero_()


def test_without_quantized_compute_it_warns() -> None:
    """The layer then computes with the dequantized weight."""
    layer = made("current")
    x = torch.randn(16, 128, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="quantized weights without quantized compute"):
        y = layer(x)

    assert torch.equal(y, x @ weight_of(layer).dequantize().t())


def test_what_is_printed() -> None:
    """The kind, not a wall of values."""
    assert repr(weight_of(made("delayed")).detach()) == (
        "Float8Tensor(codes=torch.float8_e4m3fn, dtype=torch.bfloat16, "
        "shape=(128, 128))"
    )


QUANTIZERS: dict[str, Callable[[], te.Quantizer]] = {
    "delayed": lambda: te.Float8Quantizer(
        torch.tensor([3.5]), torch.zeros(1), te.DType.kFloat8E4M3
    ),
    "current": lambda: te.Float8CurrentScalingQuantizer(te.DType.kFloat8E5M2),
    "block 1D": lambda: te.Float8BlockQuantizer(
        te.DType.kFloat8E4M3, block_scaling_dim=1
    ),
    "block 2D": lambda: te.Float8BlockQuantizer(te.DType.kFloat8E4M3),
    "mxfp8": lambda: te.MXFP8Quantizer(te.DType.kFloat8E4M3),
    "mxfp8 2D": lambda: te.MXFP8Quantizer(
        te.DType.kFloat8E4M3, with_2d_quantization=True
    ),
    "nvfp4": te.NVFP4Quantizer,
    "nvfp4 2D": lambda: te.NVFP4Quantizer(with_2d_quantization=True),
    "nvfp4 hadamard": lambda: te.NVFP4Quantizer(with_rht=True),
}
each_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
SHAPES = [(160, 96), (5, 32, 64)]


def quantized(quantizer: te.Quantizer, x: Tensor) -> te.QuantizedTensor:
    """Return what the quantizer makes."""
    made = quantizer(x)
    assert isinstance(made, te.QuantizedTensor)
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return bfloat16 numbers whose rows differ in size."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.exp2(torch.arange(shape[-2]) % 7 - 3.0)[:, None]).bfloat16()


def decoded(x: te.QuantizedTensor, columnwise: bool) -> Tensor:
    """Return the numbers of one direction."""
    packed = x.quantized.columnwise if columnwise else x.quantized.rowwise
    assert packed is not None
    return packed.full()


def shapes_in_transformer_engine(
    quantizer: te.Quantizer, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of codes and scales, by the methods of its source."""
    kind = type(quantizer).__name__
    file = {"MXFP8Quantizer": "mxfp8", "NVFP4Quantizer": "nvfp4"}
    path = f"pytorch/tensor/{file.get(kind, 'float8_blockwise')}_tensor.py"
    tree = ast.parse((te_source.folder() / path).read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind)
    space: dict[str, Any] = {
        "math": math,
        "MXFP8_BLOCK_SCALING_SIZE": 32,
        "NVFP4_BLOCK_SCALING_SIZE": 16,
        "round_up_to_nearest_multiple": lambda n, to: -(-n // to) * to,
    }
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith((
            "get_scale_shape",
            "get_columnwise_shape",
            "convert_shape",
        )):
            node.decorator_list = []
            source = "from __future__ import annotations\n" + ast.unparse(node)
            exec(source, space)
    made = SimpleNamespace(
        block_scaling_dim=getattr(quantizer, "block_scaling_dim", None), block_len=128
    )
    if kind == "NVFP4Quantizer":
        columns = space["get_columnwise_shape"](shape)
        codes = [space["convert_shape_for_fp4"](s) for s in (shape, columns)]
    else:
        codes = [shape, tuple(space["get_columnwise_shape"](made, shape))]
    return {
        "_rowwise_data": tuple(codes[0]),
        "_columnwise_data": tuple(codes[1]),
        "_rowwise_scale_inv": space["get_scale_shape"](made, shape, False),
        "_columnwise_scale_inv": space["get_scale_shape"](made, shape, True),
    }


def values_of(x: te.QuantizedTensor, columnwise: bool) -> Tensor:
    """Return the numbers of one direction, from Transformer Engine's layouts alone."""
    way = "columnwise" if columnwise else "rowwise"
    codes: Tensor = getattr(x, f"_{way}_data")
    scale: Tensor = getattr(x, f"_{way}_scale_inv")
    columns = x.shape[-1]
    rows = x.numel() // columns
    if isinstance(x, te.NVFP4Tensor):
        values = decode_fp4(codes.reshape(-1, (rows if columnwise else columns) // 2))
        amax: Tensor = getattr(x, f"_amax_{way}")
        factor = scale.view(torch.float8_e4m3fn).float() * amax * torch.tensor(1 / 2688)
        wide = factor.repeat_interleave(16, 1)[: values.shape[0], : values.shape[1]]
        values = values * wide
        return values.t() if columnwise else values
    fmt = torch.float8_e4m3fn
    transposed = columnwise and isinstance(x, te.Float8BlockwiseQTensor)
    shape = (columns, rows) if transposed else (rows, columns)
    values = codes.view(fmt).reshape(shape).float()
    if isinstance(x, te.MXFP8Tensor):
        factor = scale.view(torch.float8_e8m0fnu).float()
        wide = factor.repeat_interleave(32, 0 if columnwise else 1)
    elif x._is_2D_scaled:
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:  # [blocks along the sum, rows]
        wide = scale.t().repeat_interleave(128, 1)
    values = values * wide[: shape[0], : shape[1]]
    return values.t() if transposed else values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n[:7] not in RECIPES])
def test_codes_and_scales_have_transformer_engines_names_and_layouts(
    name: str, shape: tuple[int, ...]
) -> None:
    """Shapes are those of its source; decoded by hand, they give the same numbers."""
    quantizer = QUANTIZERS[name]()
    x = quantized(quantizer, normal(*shape))
    for field, wanted in shapes_in_transformer_engine(quantizer, shape).items():
        stored = getattr(x, field)
        assert stored.is_contiguous(), field
        assert tuple(stored.shape) == wanted, field
        assert stored.dtype == (
            torch.float32
            if "scale" in field and name.startswith("block")
            else torch.uint8
        )
    for columnwise in (False, True):
        assert torch.equal(values_of(x, columnwise), decoded(x, columnwise))
    assert x._with_gemm_swizzled_scales is False
    if name.startswith("nvfp4"):
        assert x._fp4_dtype == quantizer.dtype
        assert not hasattr(x, "_fp8_dtype")
    else:
        assert x._fp8_dtype == quantizer.dtype


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("name", ["delayed", "current"])
def test_one_scale_has_transformer_engines_names(
    name: str, shape: tuple[int, ...]
) -> None:
    """``_data``, its transpose with the last dimension first, and ``_scale_inv``."""
    quantizer = QUANTIZERS[name]()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = quantized(quantizer, values)
    fmt = torch.float8_e4m3fn if name == "delayed" else torch.float8_e5m2

    assert x._data.dtype == torch.uint8
    assert x._data.shape == x.shape == shape
    assert x._scale_inv.shape == (1,)
    values = x._data.view(fmt).float() * x._scale_inv
    assert torch.equal(values.reshape(shape), x.dequantize())
    moved = x._data.movedim(-1, 0) if shape else x._data
    assert torch.equal(x._transpose, moved)
    assert x._transpose.is_contiguous()
    assert not x._transpose_invalid
    assert x._fp8_dtype == quantizer.dtype
    assert x._quantizer is x._get_quantizer() is quantizer
    x._data.zero_()
    assert (x.dequantize() == 0).all(), "the codes themselves, not a copy"
    with pytest.raises(AttributeError, match="_data"):
        x._data = None  # type: ignore[attr-defined]


@each_quantizer
def test_an_empty_tensor_is_one_to_write_to(name: str) -> None:
    """What is written to it is what a call returns; no random number is drawn."""
    quantizer, x = QUANTIZERS[name](), normal(128, 128)
    state = torch.get_rng_state()
    empty: Any = quantizer.make_empty(x.shape, dtype=x.dtype, requires_grad=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert (empty.shape, empty.dtype, empty.requires_grad) == (x.shape, x.dtype, True)

    for way in ({"rowwise": False}, {"rowwise": True, "columnwise": False}):
        quantizer.set_usage(**way)
        one: Any = quantizer.make_empty(x.shape, dtype=x.dtype)
        with torch.no_grad():
            quantizer.update_quantized(x, one)
        assert one.get_usages() == quantizer.get_usages()
        assert torch.equal(one.dequantize(), quantized(quantizer, x).dequantize())

    noisy = te.NVFP4Quantizer(with_rht=True, stochastic_rounding=True)
    noisy.make_empty((32, 32))  # float32, which the transform refuses
    assert torch.equal(torch.get_rng_state(), state)


@each_quantizer
def test_directions_are_dropped_and_made(name: str) -> None:
    """The columnwise one is made again only where it holds the same numbers."""
    x = quantized(QUANTIZERS[name](), normal(128, 128))
    column = decoded(x, True)
    assert x.get_usages() == {"rowwise": True, "columnwise": True}
    x.update_usage(columnwise_usage=False)
    assert x.get_usages() == {"rowwise": True, "columnwise": False}
    if name in {"delayed", "current", "block 2D"}:
        x.update_usage(True, True)
        assert torch.equal(decoded(x, True), column)
        x.update_usage(rowwise_usage=False)
        assert torch.equal(x.dequantize(), column.to(x.dtype))
        with pytest.raises(RuntimeError, match=r"row-wise usage, but .* missing row"):
            x.update_usage(rowwise_usage=True)
    else:
        with pytest.raises(RuntimeError, match=r"column-wise .* missing column-scaled"):
            x.update_usage(columnwise_usage=True)
    with pytest.raises(RuntimeError, match="Must retain some data"):
        x.update_usage(False, False)


@each_quantizer
def test_a_flag_skips_a_write(name: str) -> None:
    """Not 0 leaves codes, scales and what the quantizer records as they were."""
    quantizer, x = QUANTIZERS[name](), normal(128, 128)
    made = quantized(quantizer, x)
    before = made.dequantize()
    amax = getattr(quantizer, "amax", torch.zeros(1)).clone()
    made.quantize_(4 * x, noop_flag=torch.ones(1))
    assert torch.equal(made.dequantize(), before)
    assert torch.equal(getattr(quantizer, "amax", amax), amax)
    made.quantize_(4 * x, noop_flag=torch.zeros(1))
    assert torch.equal(made.dequantize(), quantized(quantizer, 4 * x).dequantize())


def test_dequantizing_hands_the_gradient_through() -> None:
    """To the tensor before it was rounded, whatever the dtype asked for."""
    x = normal(32, 32).requires_grad_()
    made = quantized(QUANTIZERS["mxfp8"](), x)
    values = 2 * made.dequantize(dtype=torch.float32)
    torch.autograd.backward(values.sum())
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2))
    with torch.no_grad():
        assert made.dequantize().grad_fn is None


@each
def test_setting_data_quantizes(name: str) -> None:
    """As in Transformer Engine, which also takes whether it asks for gradients."""
    layer, other = made(name), made(name)
    weight, values = weight_of(layer), normal(128, 128, seed=1)
    quantizer = layer.quantizers["scaling_fwd"][1]
    weight.data = values
    assert weight is weight_of(layer)
    assert torch.equal(weight.dequantize(), quantized(quantizer, values).dequantize())
    assert weight.requires_grad == (name == "block")

    weight.data = weight_of(other).data  # the same kind: its codes
    assert torch.equal(weight.dequantize(), weight_of(other).dequantize())
    with torch.no_grad():
        weight_of(other).zero_()
    assert not weight.dequantize().any(), "shared, as tensors' data is"
    assert weight_of(layer.float()) is weight
    assert weight.dtype == torch.float32


def test_a_copy_takes_codes_and_quantize_rounds_again() -> None:
    """``copy_`` of the same kind changes no code; what it copies stays its own."""

    def made(scale: float) -> te.QuantizedTensor:
        state = torch.tensor([scale]), torch.zeros(1)
        return quantized(
            te.Float8Quantizer(*state, torch.float8_e4m3fn), normal(64, 64)
        )

    copied, rounded, other = made(4.0), made(4.0), made(5.0)
    values = other.dequantize()
    copied.copy_(other)
    rounded.quantize_(other)
    other._data.zero_()
    assert torch.equal(copied.dequantize(), values)
    assert torch.equal(
        rounded.dequantize(), quantized(rounded._get_quantizer(), values).dequantize()
    )
    assert not torch.equal(rounded.dequantize(), values)


@each_quantizer
def test_a_view_that_leaves_the_columns_alone_is_quantized(name: str) -> None:
    """It shares codes, and hands its gradient through; others are plain."""
    x = normal(128, 128).requires_grad_()
    made = quantized(QUANTIZERS[name](), x)
    view = made.view(4, -1, 128)
    assert type(view) is type(made)
    assert view.shape == (4, 32, 128)
    assert torch.equal(view.dequantize(), made.dequantize().view(4, 32, 128))
    torch.autograd.backward(view, torch.ones(4, 32, 128, dtype=x.dtype))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not isinstance(made.view(-1), te.QuantizedTensor)
    with torch.no_grad():
        view.detach().zero_()
    assert not made.dequantize().any()


def test_a_subclass_of_a_users_stays_one() -> None:
    """After detach, clone, and as a parameter."""
    x = quantized(QUANTIZERS["current"](), normal(32, 32))
    derived = cast("type[te.Float8Tensor]", type("Derived", (te.Float8Tensor,), {}))
    x.__class__ = derived
    for alike in (x.detach(), x.clone(), torch.nn.Parameter(x)):
        assert type(alike) is derived


def test_a_plain_tensor_is_an_identity_tensor_of_the_dtype_asked_for() -> None:
    """It reads as what it was cast to, and needs no directions."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    made = quantized(te.IdentityQuantizer(dtype=torch.bfloat16), x)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made._hp_data, x.bfloat16())
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded.add_(1).dequantize(), made.dequantize() + 1)
    empty = te.IdentityQuantizer(dtype=torch.bfloat16).make_empty((4, 4))
    assert empty.dtype == torch.bfloat16
    source = torch.ones(4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        made.copy_(source)
        source.zero_()
    assert (made.dequantize() == 1).all(), "it has what was written, not its memory"
    made.update_usage(False, False)
    assert made.get_usages() == {"rowwise": True, "columnwise": True}


def test_what_a_tensor_has_not_is_refused() -> None:
    """By name, as not emulated, or as unknown."""
    x = quantized(QUANTIZERS["mxfp8"](), normal(32, 32))
    with pytest.raises(
        AttributeError, match=r"MXFP8Tensor\.get_metadata is not emulated"
    ):
        x.get_metadata()
    with pytest.raises(AttributeError, match="has no attribute '_data'"):
        _ = x._data
    with pytest.raises(NotImplementedError, match=r"MXFP8Tensor\(\.\.\.\) of codes"):
        te.MXFP8Tensor(shape=(32, 32), rowwise_data=torch.zeros(32, 32))
    loaded = x.detach()
    assert isinstance(loaded, te.QuantizedTensor)
    loaded.quantizer = None
    with pytest.raises(RuntimeError, match="quantizer must be set"):
        loaded.update_quantizer(QUANTIZERS["mxfp8"]())
    with pytest.warns(UserWarning, match="Quantizer is being updated"):
        x.update_quantizer(QUANTIZERS["mxfp8"]())
