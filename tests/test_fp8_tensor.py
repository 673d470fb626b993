"""Tests of snippets/fp8/tensor.py: parameters that are held in codes only."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snippets import fp8 as te

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
    initial: Tensor = weight.get_high_precision_init_val()  # type: ignore[attr-defined]
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
    weight.clear_high_precision_init_val()  # type: ignore[attr-defined]
    assert weight.get_high_precision_init_val() is None  # type: ignore[attr-defined]


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
