"""Tests of what every module of snippets/fp8 does: regions, caches, recomputation."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snippets import fp8 as te
from snippets.fp8.base import TransformerEngineBaseModule
from snippets.fp8.checkpoint import (
    in_fp8_activation_recompute_phase,
    is_fp8_activation_recompute_enabled,
)
from snippets.fp8.slots import DelayedScalingState

BF16, FP32 = torch.bfloat16, torch.float32
RECIPES: dict[str, Callable[[], te.Recipe]] = {
    "delayed": te.DelayedScaling,
    "current": te.Float8CurrentScaling,
    "block": te.Float8BlockScaling,
    "mxfp8": te.MXFP8BlockScaling,
    "nvfp4": lambda: te.NVFP4BlockScaling(disable_stochastic_rounding=True),
}
WIDTH = 64
Module = te.Linear | te.LayerNormLinear | te.LayerNormMLP
MODULES: dict[str, Callable[..., Module]] = {
    "Linear": lambda **kw: te.Linear(WIDTH, WIDTH, **kw),
    "LayerNormLinear": lambda **kw: te.LayerNormLinear(WIDTH, WIDTH, **kw),
    "LayerNormMLP": lambda **kw: te.LayerNormMLP(WIDTH, 2 * WIDTH, **kw),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    te.FP8GlobalStateManager.reset()
    yield
    te.FP8GlobalStateManager.reset()


def made(make: Callable[..., Module], **options: object) -> Module:
    """Return a module in bfloat16 that is the same each time."""
    torch.manual_seed(0)
    return make(params_dtype=options.pop("params_dtype", BF16), **options)


def batch(rows: int = 32, scale: float = 1.0, seed: int = 1) -> Tensor:
    """Return an input in bfloat16."""
    torch.manual_seed(seed)
    return (torch.randn(rows, WIDTH) * scale).to(BF16).requires_grad_()


def value(out: object) -> Tensor:
    """Return the first result of a module."""
    found = out[0] if isinstance(out, tuple) else out
    assert isinstance(found, Tensor)
    return found


def backward(out: object) -> None:
    """Run the backward of a fixed function of a module's result."""
    y = value(out)
    torch.manual_seed(9)
    torch.autograd.backward(y, (torch.randn(y.shape) * 1e-2).to(y.dtype))


def step(module: nn.Module, recipe: te.Recipe | None, x: Tensor, **kw: bool) -> Tensor:
    """Run a forward and backward in one region; return the output."""
    with te.autocast(enabled=recipe is not None, recipe=recipe):
        out = module(x, **kw)
    backward(out)
    return value(out).detach()


def states(module: nn.Module) -> list[Tensor]:
    """Return scales and histories of a module, all."""
    found: list[Tensor] = []
    for part in module.modules():
        if isinstance(part, TransformerEngineBaseModule):
            for key in ("scaling_fwd", "scaling_bwd"):
                state: DelayedScalingState | None = part.fp8_meta.get(key)
                if state is not None:
                    found += [state.scale.clone(), state.amax_history.clone()]
    return found


def grads(module: nn.Module) -> list[Tensor]:
    """Return the gradients of all parameters, which all have one."""
    found = [p.grad for p in module.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Say whether two lists of tensors have the same bits."""
    assert len(a) == len(b) > 0
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------- regions


@each_module
def test_a_disabled_region_changes_nothing(make: Callable[..., Module]) -> None:
    """Alone, inside an enabled one, and after one."""
    module, x = made(make), batch()
    plain = value(module(x)).detach()
    with te.autocast(enabled=False):
        assert torch.equal(value(module(x)), plain)
    with te.autocast(recipe=te.Float8CurrentScaling()):
        quantized = value(module(x)).detach()
        with te.autocast(enabled=False):
            assert torch.equal(value(module(x)), plain)
        assert torch.equal(value(module(x)), quantized)
    assert not torch.equal(plain, quantized)
    assert torch.equal(value(module(x)), plain)


@each_module
def test_scales_change_at_the_end_of_the_outermost_region(
    make: Callable[..., Module],
) -> None:
    """And those of gradients at the end of the backward of its first module."""
    module, x = made(make), batch(scale=8.0)
    with te.autocast(recipe=te.DelayedScaling()):
        with te.autocast(recipe=te.DelayedScaling()):
            out = module(x)
        forward: DelayedScalingState = module.fp8_meta["scaling_fwd"]
        gradient: DelayedScalingState = module.fp8_meta["scaling_bwd"]
        assert (forward.scale == 1).all()
        assert forward.amax_history[0].any()
    assert (forward.scale != 1).sum() == (forward.amax_history[-1] != 0).sum() > 0
    assert not forward.amax_history[0].any()
    assert (gradient.scale == 1).all()
    backward(out)
    assert (gradient.scale != 1).sum() == (gradient.amax_history[-1] != 0).sum() > 0


def test_the_first_module_that_has_a_backward_updates_gradients() -> None:
    """A frozen one before it, which autograd skips, does not take its place."""
    frozen, trained = made(MODULES["Linear"]), made(MODULES["Linear"])
    frozen.requires_grad_(False)
    x = batch().detach()
    with te.autocast(recipe=te.DelayedScaling()):
        out = trained(frozen(x))
    backward(out)
    assert (trained.fp8_meta["scaling_bwd"].scale[0] != 1).item()


@each_module
def test_used_twice_in_a_region_is_an_error(make: Callable[..., Module]) -> None:
    """Where amax would be lost; not with ``reduce_amax=False``, nor in inference."""
    module, x = made(make), batch()
    recipe = te.DelayedScaling()
    step(module, recipe, x)
    with te.autocast(recipe=recipe):
        module(x)
        with pytest.raises(RuntimeError, match="more than once in one autocast region"):
            module(x)
    step(module, recipe, x)
    with torch.no_grad(), te.autocast(recipe=recipe):
        assert torch.equal(value(module(x)), value(module(x)))
    module = made(make)
    with te.autocast(recipe=te.DelayedScaling(reduce_amax=False)):
        module(batch(scale=2.0))
        module(batch(scale=1.0))
        history = module.fp8_meta["scaling_fwd"].amax_history
        if make is MODULES["Linear"]:  # the larger of the two
            assert history[0, 0] == batch(scale=2.0).abs().max().float()


@each_module
def test_calibration_records_and_does_not_quantize(
    make: Callable[..., Module],
) -> None:
    """The output is that of high precision, the amax that of quantization."""
    module, x = made(make), batch(scale=4.0)
    with te.autocast(enabled=False, calibrating=True, recipe=te.DelayedScaling()):
        out = value(module(x))
        assert torch.equal(out, value(made(make)(x)))
    recorded = module.fp8_meta["scaling_fwd"].amax_history.amax(0)
    with te.autocast(recipe=te.DelayedScaling()):
        other = made(make)
        other(x)
    quantized = other.fp8_meta["scaling_fwd"].amax_history.amax(0)
    assert (recorded > 0).tolist() == (quantized > 0).tolist()
    # A norm's result is rounded to bfloat16 before it is seen, and the second layer's
    # input was computed from codes.
    assert torch.allclose(recorded, quantized, rtol=2**-3)
    assert torch.equal(recorded[1], quantized[1])


# ----------------------------------------------------------- micro-batches, main_grad


@each_module
@each_recipe
def test_micro_batches_share_a_quantized_weight(
    make: Callable[..., Module], recipe: Callable[[], te.Recipe]
) -> None:
    """True quantizes and keeps it, False uses it, None does neither."""
    module, chosen = made(make), recipe()
    x = batch()
    first = step(module, chosen, x, is_first_microbatch=True)
    kept = step(module, chosen, x, is_first_microbatch=False)
    if not chosen.delayed():
        assert torch.equal(first, kept)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(2.0)
    again = step(module, chosen, x, is_first_microbatch=False)
    if not chosen.delayed():
        assert torch.equal(again, first)
    fresh = step(module, chosen, x, is_first_microbatch=True)
    assert not torch.equal(fresh, again)
    without = copy.deepcopy(module)
    if not chosen.delayed():
        assert torch.equal(step(without, chosen, x), fresh)


@each_module
@pytest.mark.parametrize("name", [None, "delayed", "current"])
def test_weight_gradients_can_go_to_main_grad(
    make: Callable[..., Module], name: str | None
) -> None:
    """In float32: added, or written by the first micro-batch; ``grad`` stays None."""
    plain, fused = made(make), made(make, fuse_wgrad_accumulation=True)
    recipe = None if name is None else RECIPES[name]()
    with (
        te.autocast(enabled=name is not None, recipe=recipe),
        pytest.raises(RuntimeError, match=r"needs a tensor weight\.main_grad"),
    ):
        fused(batch())
    weights = [(n, getattr(fused, n)) for n in fused.weight_names]
    for _, weight in weights:
        weight.main_grad = torch.full(weight.shape, 3.0)
    x = batch()
    step(plain, recipe, x)
    step(fused, recipe, x, is_first_microbatch=True)
    for at, weight in weights:
        assert weight.grad is None
        wanted = getattr(plain, at).grad
        assert weight.main_grad.dtype == FP32
        assert torch.equal(weight.main_grad.to(BF16), wanted)
    before = [w.main_grad.clone() for _, w in weights]
    step(fused, recipe, x, is_first_microbatch=False)
    for (_, weight), old in zip(weights, before, strict=True):
        # Of delayed scaling the second step has other scales.
        assert torch.allclose(
            weight.main_grad, 2 * old, rtol=0.3, atol=old.std().item()
        )
        weight.grad_added_to_main_grad = False
    step(fused, recipe, x)
    for _, weight in weights:
        assert weight.grad_added_to_main_grad
        assert not weight.grad.any()


@each_module
def test_a_frozen_weight_needs_no_main_grad(make: Callable[..., Module]) -> None:
    """It has no gradient; the input's is that of a layer that fuses nothing."""
    plain, fused = made(make), made(make, fuse_wgrad_accumulation=True)
    grads = []
    for module in (plain, fused):
        for name in module.weight_names:
            getattr(module, name).requires_grad_(False)
        x = batch().requires_grad_()
        step(module, te.Float8CurrentScaling(), x)
        assert x.grad is not None
        grads.append(x.grad)

    assert grads[0].equal(grads[1])


# -------------------------------------------------------------- options of a module


@pytest.mark.parametrize("make", [te.Linear, te.LayerNormLinear])
def test_a_weight_can_be_several_parameters(make: Any) -> None:  # noqa: ANN401 - a class
    """Named and sized as asked for; the layer computes as with one."""
    parts = {"query_": 48, "key": 16}
    split = make(WIDTH, WIDTH, parameters_split=parts, params_dtype=BF16)
    names = [n for n, _ in split.named_parameters() if "norm" not in n]
    assert names == ["query_weight", "key_weight", "query_bias", "key_bias"]
    assert [split.query_weight.shape[0], split.key_bias.shape[0]] == [48, 16]
    one = make(WIDTH, WIDTH, params_dtype=BF16)
    one.weight.data.copy_(torch.cat([split.query_weight, split.key_weight]))
    x = batch()
    for recipe in (None, te.DelayedScaling(), te.MXFP8BlockScaling()):
        outs = []
        for module in (split, one):
            module.zero_grad()
            outs.append(step(module, recipe, x))
        assert torch.equal(*outs)
        joined = torch.cat([split.query_weight.grad, split.key_weight.grad])
        assert torch.equal(joined, one.weight.grad)
        split, one = copy.deepcopy(split), copy.deepcopy(one)
        split.fp8_meta.pop("recipe", None)
        one.fp8_meta.pop("recipe", None)
    even = make(WIDTH, WIDTH, parameters_split=("a", "b"))
    assert even.a_weight.shape == even.b_weight.shape == (32, WIDTH)
    for wrong, match in (
        ((), "0 parameters"),
        ({"a": 3}, r"split sizes \[3\]"),
        (("a", "b", "c"), "split weight buffer"),
    ):
        with pytest.raises(ValueError, match=match):
            make(WIDTH, WIDTH, parameters_split=wrong)
    with pytest.raises(TypeError, match="Invalid configuration"):
        make(WIDTH, WIDTH, parameters_split=(1, 2))
    with te.quantized_model_init(), pytest.raises(RuntimeError, match="Splitting"):
        make(WIDTH, WIDTH, parameters_split=("a", "b"))


@each_module
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_can_be_left_to_the_caller(
    make: Callable[..., Module], bias: bool
) -> None:
    """Then the output lacks it."""
    module = made(make, return_bias=True, bias=bias)
    whole = made(make, bias=bias)
    if bias:
        last = "fc2_bias" if isinstance(module, te.LayerNormMLP) else "bias"
        for m in (module, whole):
            torch.nn.init.ones_(getattr(m, last))
    out = module(batch())
    assert isinstance(out, tuple)
    y, returned = out
    assert isinstance(y, Tensor)
    if bias:
        assert isinstance(returned, Tensor)
        # The sum is rounded twice here, once there.
        difference = (y + returned - value(whole(batch()))).abs()
        assert (difference <= 2**-7 * (y.abs() + 2)).all()
    else:
        assert returned is None
        assert torch.equal(y, value(whole(batch())))


@each_module
def test_without_quantization_it_is_torch_s(make: Callable[..., Module]) -> None:
    """Bit for bit in float32; parameters and gradients have the dtype asked for."""
    module = made(make, params_dtype=FP32)
    x = batch().detach().float()
    parts: Any = module
    y = x
    if not isinstance(module, te.Linear):
        y = F.layer_norm(y, (WIDTH,), parts.layer_norm_weight, parts.layer_norm_bias)
    if isinstance(module, te.LayerNormMLP):
        y = F.gelu(F.linear(y, parts.fc1_weight, parts.fc1_bias), approximate="tanh")
        y = F.linear(y, parts.fc2_weight, parts.fc2_bias)
    else:
        y = F.linear(y, parts.weight, parts.bias)
    assert torch.equal(value(module(x)), y)
    step(module, te.DelayedScaling(), x)
    assert {g.dtype for g in grads(module)} == {FP32}
    with torch.autocast("cpu", BF16):
        assert value(module(x)).dtype == BF16


@each_module
def test_the_meta_device_defers_initialization(make: Callable[..., Module]) -> None:
    """Until ``reset_parameters`` is called."""
    module = make(device="meta")
    assert {p.device.type for p in module.parameters()} == {"meta"}
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    assert same(list(module.parameters()), list(make().parameters()))


# ------------------------------------------------------------------- copies and files


@each_module
@each_recipe
def test_a_copy_goes_its_own_way(
    make: Callable[..., Module], recipe: Callable[[], te.Recipe]
) -> None:
    """Equal to the original at first, and no state is shared."""
    module, chosen = made(make), recipe()
    step(module, chosen, batch())
    other = copy.deepcopy(module)
    module.zero_grad()
    other.zero_grad()
    x = batch(scale=16.0)
    before = states(module)
    assert torch.equal(step(other, chosen, x), step(copy.deepcopy(module), chosen, x))
    assert not before or same(states(module), before)
    assert torch.equal(step(module, chosen, x), value(step(other, chosen, x))) or before
    if chosen.delayed():
        assert not same(states(other), before)


@each_module
@each_recipe
def test_a_state_dict_holds_all_that_a_run_needs(
    make: Callable[..., Module], recipe: Callable[[], te.Recipe]
) -> None:
    """A module that loads it goes on with the same bits, scales included."""
    module, chosen = made(make), recipe()
    for scale in (1.0, 4.0):
        step(module, chosen, batch(scale=scale))
    saved = module.state_dict()
    extra = saved["_extra_state"]
    assert extra.dtype == torch.uint8
    assert (extra.numel() > 0) == chosen.delayed()
    torch.manual_seed(5)
    other = make(params_dtype=BF16)
    other.load_state_dict(saved)
    for m in (module, other):
        m.zero_grad()
    x = batch(scale=2.0)
    assert torch.equal(step(module, chosen, x), step(other, chosen, x))
    assert same(grads(module), grads(other))
    if chosen.delayed():
        assert same(states(module), states(other))


@each_module
@each_recipe
def test_weights_can_be_held_in_a_recipe_s_format(
    make: Callable[..., Module], recipe: Callable[[], te.Recipe]
) -> None:
    """A step gives the bits of a module whose weights have the rounded values."""
    chosen = recipe()
    with te.quantized_model_init(recipe=chosen):
        module = made(make)
    plain = made(make)
    for name in module.weight_names:
        weight = getattr(module, name)
        assert isinstance(weight, te.QuantizedTensor)
        original = getattr(plain, name)
        error = (weight.dequantize() - original).norm() / original.norm()
        # 2**-4 of a number in E4M3; of E2M1 the steps are coarser.
        assert 0 < error < (0.2 if chosen.nvfp4() else 0.04)
        original.data.copy_(weight.dequantize())
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, te.QuantizedTensor) == (
            name in module.weight_names
        )
    x = batch()
    if not chosen.nvfp4():  # whose blocks have other scales the second time
        assert torch.equal(step(module, chosen, x), step(plain, chosen, x))
    else:
        step(module, chosen, x)
    assert all(g.isfinite().all() for g in grads(module))
    with pytest.warns(UserWarning, match="quantized weights without quantized compute"):
        module(x)
    for name in module.weight_names:
        with te.quantized_model_init(
            recipe=chosen, preserve_high_precision_init_val=True
        ):
            kept: Any = getattr(made(make), name)
        wanted = getattr(made(make), name)
        assert torch.equal(kept.get_high_precision_init_val(), wanted)
        kept.clear_high_precision_init_val()
        assert kept.get_high_precision_init_val() is None


# -------------------------------------------------------------------- recomputation


def layers(dropout: float = 0.0) -> nn.Sequential:
    """Return a layer of each kind; they are the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        te.Linear(WIDTH, WIDTH, params_dtype=BF16),
        te.TransformerLayer(
            WIDTH,
            WIDTH,
            4,
            params_dtype=BF16,
            hidden_dropout=dropout,
            attention_dropout=0.0,
        ),
        te.LayerNormMLP(WIDTH, WIDTH, params_dtype=BF16),
    )


@each_recipe
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_changes_no_bit(
    recipe: Callable[[], te.Recipe], reentrant: bool, dropout: float
) -> None:
    """Outputs, gradients, scales and histories are those without, step by step."""
    plain, again = layers(dropout), layers(dropout)
    chosen = (recipe(), recipe())
    for number in range(3):
        found = []
        for model, mine in zip((plain, again), chosen, strict=True):
            x = batch(scale=2.0**number).detach().view(16, 2, WIDTH).requires_grad_()
            model.zero_grad()
            torch.manual_seed(number)
            with te.autocast(recipe=mine):
                y = model[0](x)
                if model is plain:
                    y = model[2](model[1](y))
                else:
                    y = te.checkpoint(
                        lambda h, m=model: m[2](m[1](h)), y, use_reentrant=reentrant
                    )
            drawn = torch.rand(1)
            backward(y)
            assert x.grad is not None
            found.append([y.detach(), x.grad, drawn, *grads(model), *states(model)])
        assert same(*found)
    assert te.FP8GlobalStateManager.quantization_state.recompute_phase is False
    assert te.FP8GlobalStateManager.quantization_state.recompute_enabled is False
    for part in again.modules():
        if isinstance(part, TransformerEngineBaseModule):
            assert not part._stash


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_function_can_open_its_own_region(reentrant: bool) -> None:
    """And then replays the scales that it had there."""
    plain, again = (made(MODULES["LayerNormLinear"]) for _ in range(2))
    recipe = te.DelayedScaling()

    def run(module: Module, x: Tensor) -> Tensor:
        with te.autocast(recipe=recipe):
            return value(module(x))

    for number in range(3):
        found = []
        for module in (plain, again):
            x = batch(scale=4.0**number)
            module.zero_grad()
            if module is plain:
                y = run(module, x)
            else:
                y = te.checkpoint(run, module, x, use_reentrant=reentrant)
            backward(y)
            assert x.grad is not None
            found.append([y.detach(), x.grad, *grads(module)])
        assert same(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_function_can_ask_where_it_is(reentrant: bool) -> None:
    """Is it an FP8 region, and the second run; both only inside of a checkpoint."""
    layer, asked = te.Linear(WIDTH, WIDTH, params_dtype=BF16), []

    def ask() -> tuple[bool, bool]:
        enabled = is_fp8_activation_recompute_enabled()
        return enabled, in_fp8_activation_recompute_phase()

    def run(x: Tensor) -> Tensor:
        asked.append(ask())
        with te.autocast(recipe=te.DelayedScaling()):
            asked.append(ask())
            return value(layer(x))

    backward(te.checkpoint(run, batch(), use_reentrant=reentrant))
    assert asked == [(False, False), (True, False), (False, True), (True, True)]
    with te.autocast():
        assert ask() == (False, False)


def test_checkpoint_passes_the_rest_on() -> None:
    """Keywords, several results, inference, autocast; foreign modules go to torch."""
    linear = te.Linear(WIDTH, WIDTH)

    def run(x: Tensor, *, factor: float) -> tuple[Tensor, Tensor]:
        y = linear(x)
        assert isinstance(y, Tensor)
        return y * factor, x

    x = batch().detach().float().requires_grad_()
    with torch.autocast("cpu", BF16):
        y, same_x = te.checkpoint(run, x, factor=2.0)
    assert y.dtype == BF16
    assert torch.equal(same_x, x)
    backward(y)
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(te.checkpoint(linear, x), linear(x))
    plain = nn.Linear(WIDTH, WIDTH)
    x.grad = None
    y = te.checkpoint(plain, x, use_reentrant=False)
    assert torch.equal(y, plain(x))
    backward(y)
    for option in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        with pytest.raises(NotImplementedError, match=option):
            te.checkpoint(linear, x, **{option: True})
    with pytest.raises(RuntimeError, match=r"not compatible with \.grad"):
        torch.autograd.grad(te.checkpoint(linear, x).sum(), x)


# ----------------------------------------------------------------------- bad input


@each_module
def test_inputs_that_cannot_be(make: Callable[..., Module]) -> None:
    """One clear error each; afterwards the module works as a fresh one."""
    module = made(make, params_dtype=FP32)
    recipe = te.DelayedScaling()
    bad: list[tuple[Tensor, type[Exception], str]] = [
        (torch.ones(8, WIDTH, dtype=torch.int64), TypeError, r"torch\.int64"),
        (torch.ones(8, WIDTH, dtype=torch.complex64), TypeError, r"torch\.complex64"),
        (torch.ones(8, WIDTH, dtype=torch.float64), TypeError, r"torch\.float64"),
        (torch.ones(8, WIDTH, dtype=BF16), TypeError, "Data types for parameters"),
        (torch.ones(8, WIDTH + 16), ValueError, "GEMM not possible"),
        (torch.ones(12, WIDTH), ValueError, "divisible by 8"),
    ]
    for x, error, match in bad:
        with te.autocast(recipe=recipe), pytest.raises(error, match=match):
            module(x)
    with te.autocast(recipe=te.MXFP8BlockScaling()):
        other = made(make)
        with pytest.raises(ValueError, match="divisible by 32"):
            other(batch(rows=8))
    x = batch().detach().float()
    fresh = made(make, params_dtype=FP32)
    assert torch.equal(step(module, recipe, x), step(fresh, recipe, x))
    assert same(states(module), states(fresh))
    assert te.FP8GlobalStateManager.quantization_state.autocast_depth == 0


@each_module
@each_recipe
def test_an_empty_batch_has_an_empty_result(
    make: Callable[..., Module], recipe: Callable[[], te.Recipe]
) -> None:
    """And zero gradients."""
    module = made(make)
    x = batch()[:0]
    with te.autocast(recipe=recipe()):
        out = value(module(x))
    assert out.shape == (0, WIDTH)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert all(not g.any() for g in grads(module))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_in_their_row(bad: float) -> None:
    """And scales stay usable."""
    module, recipe = made(MODULES["Linear"]), te.DelayedScaling()
    x = batch().detach()
    x[3, 5] = bad
    with te.autocast(recipe=recipe):
        out = value(module(x))
    rest = [i for i in range(len(x)) if i != 3]
    assert out[rest].isfinite().all()
    assert out[3].isnan().all() if bad != bad else out[3].isfinite().all()  # noqa: PLR0124
    scale = module.fp8_meta["scaling_fwd"].scale
    assert scale.isfinite().all()
    assert (scale > 0).all()
    with te.autocast(recipe=recipe):
        assert value(module(batch())).isfinite().all()


@each_module
@pytest.mark.parametrize(
    "options",
    [
        {"tp_size": 2},
        {"get_rng_state_tracker": print},
        {"delay_wgrad_compute": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_are_not_emulated_are_refused(
    make: Callable[..., Module], options: dict[str, object]
) -> None:
    """By name and value."""
    name = next(iter(options))
    with pytest.raises(NotImplementedError, match=rf"\({name}=.*not emulated"):
        make(**options)


def test_one_clear_warning_when_the_recipe_changes() -> None:
    """To another kind: a warning, and the module computes by the new one."""
    module, x = made(MODULES["Linear"]), batch()
    step(module, te.DelayedScaling(), x)
    with pytest.warns(UserWarning, match="Recipe type changed from DelayedScaling"):
        changed = step(module, te.MXFP8BlockScaling(), x)
    assert torch.equal(
        changed, step(made(MODULES["Linear"]), te.MXFP8BlockScaling(), x)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(module, te.MXFP8BlockScaling(), x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_that_saves_nothing_is_recomputed_too(reentrant: bool) -> None:
    """Or the scales kept for it would be taken for those of a later step."""
    module, aside = made(MODULES["Linear"]), made(MODULES["Linear"])
    aside.requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        y = value(module(x))
        aside(y.detach())
        return y

    with te.autocast(recipe=te.DelayedScaling()):
        out = te.checkpoint(run, batch(), use_reentrant=reentrant)
    assert len(aside._stash) == 1
    backward(out)
    assert not aside._stash


def test_recomputations_take_their_scales_in_the_order_of_the_forwards() -> None:
    """As a pipeline does: two forwards, then their backwards, the earlier first."""
    recipe = te.DelayedScaling(amax_history_len=4)

    def gradients(*, recompute: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer = te.Linear(32, 32)
        inputs = [torch.randn(16, 32) * size for size in (1.0, 100.0, 0.1)]
        outputs = []
        for x in inputs:
            with te.autocast(recipe=recipe):
                x.requires_grad_()
                y = te.checkpoint(layer, x) if recompute else layer(x)
            outputs.append(y)
        for y in outputs:
            torch.autograd.backward(y.square().sum())
        found = [x.grad for x in inputs]
        assert layer.weight.grad is not None
        return [g for g in found if g is not None] + [layer.weight.grad]

    kept, recomputed = gradients(recompute=False), gradients(recompute=True)

    assert len(kept) == 4
    assert all(map(torch.equal, kept, recomputed))


def test_what_a_module_has_not_is_refused() -> None:
    """By name, as not emulated, or as unknown; nothing waits for ``backward_dw``."""
    layer = te.Linear(WIDTH, WIDTH, params_dtype=BF16)
    with pytest.raises(
        AttributeError, match=r"Linear\.set_meta_tensor is not emulated"
    ):
        layer.set_meta_tensor(fwd=True, recipe=te.DelayedScaling())
    with pytest.raises(AttributeError, match="no attribute 'set_metatensor'"):
        layer.set_metatensor()
    assert not hasattr(layer, "fast_setattr")
    backward(value(layer(batch())))
    found = [g.clone() for g in grads(layer)]
    assert not layer.need_backward_dw()
    layer.backward_dw()
    assert same(found, grads(layer))
