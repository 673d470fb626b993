"""Tests of snippets/main_params.py, as read in guide/main_params."""

import copy
import gc
import io
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch._C._distributed_c10d import HashStore
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from snippets import main_params
from snippets.loss_scaling import DynamicLossScaler
from snippets.main_params import MainParams

BF16, FP16 = torch.bfloat16, torch.float16
MANTISSA_BITS = {BF16: 7, FP16: 10}
Make = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-4, weight_decay=0.1),
    "AdamW fused": lambda p: optim.AdamW(p, lr=1e-4, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=1e-4, foreach=True),
    "Adam": lambda p: optim.Adam(p, lr=1e-4, amsgrad=True, maximize=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-3),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-4, momentum=0.9, centered=True),
    "Adadelta": optim.Adadelta,
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "ASGD": optim.ASGD,
    "Rprop": optim.Rprop,
    "Adafactor": optim.Adafactor,
    "Muon": optim.Muon,
}
SCALERS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.amp.GradScaler("cpu", growth_interval=7),
    "dynamic": lambda: DynamicLossScaler(growth_interval=7),
    "megatron": lambda: DynamicLossScaler.megatron(init_scale=2**16, growth_interval=7),
}

each_dtype = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
each_scaler = pytest.mark.parametrize("make_scaler", SCALERS.values(), ids=SCALERS)
each_grad_dtype = pytest.mark.parametrize("grad_dtype", [None, torch.float32], ids=str)


def weight(dtype: torch.dtype = BF16, shape: tuple[int, ...] = (6, 5)) -> nn.Parameter:
    """A parameter, the same at every call."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(values.to(dtype))


def gradients(steps: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    """Gradients of many sizes for `weight`, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn((6, 5), generator=generator) for _ in range(steps)]
    return [(draw * 10.0 ** -(i % 4)).to(dtype) for i, draw in enumerate(draws)]


def everything(optimizer: MainParams) -> list[Tensor]:
    """Copies of all that a skipped or refused call must leave alone."""
    found: list[Tensor] = [p.detach().clone() for p in parameters(optimizer)]
    for entry in optimizer.state_dict()["state"].values():
        found += [torch.as_tensor(v).clone() for v in entry.values() if v is not None]
    return found


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters in the groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def backward(loss: Tensor) -> None:
    """``loss.backward()``, which torch has not annotated."""
    torch.autograd.backward(loss)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) and a.dtype == b.dtype
        for a, b in zip(left, right, strict=True)
    )


# Exact laws.


@each_optimizer
@each_dtype
@each_grad_dtype
def test_main_params_are_the_optimizer_on_float32_bit_for_bit(
    make: Make, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    """Same gradients, same values and state; the weight is the value rounded once."""
    ours = weight(dtype)
    reference = nn.Parameter(ours.detach().float())
    a, b = MainParams(make([ours]), grad_dtype=grad_dtype), make([reference])
    for grad in gradients(20, grad_dtype or dtype):
        ours.grad, reference.grad = grad.clone(), grad.float()
        a.step()
        b.step()
        assert torch.equal(a.main_params[ours], reference)
        assert torch.equal(ours, reference.to(dtype))

    assert a.state[ours].keys() == b.state[reference].keys()
    for name, value in b.state[reference].items():
        assert same([torch.as_tensor(a.state[ours][name])], [torch.as_tensor(value)])
    assert ours.dtype == dtype


@each_dtype
def test_half_precision_swallows_the_updates_that_main_params_keep(
    dtype: torch.dtype,
) -> None:
    """s/4 down, 100 times: the weight alone stays, with a main param it is w - 25 s."""
    codes = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    numbers = codes.view(dtype)
    smallest = torch.finfo(dtype).tiny * 256  # so that the update is a number as well
    w = numbers[(numbers >= smallest) & (numbers <= torch.finfo(dtype).max)]
    s = torch.exp2(w.float().log2().floor() - MANTISSA_BITS[dtype])
    alone, kept = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    plain = optim.SGD([alone], lr=0.25)
    ours = MainParams(optim.SGD([kept], lr=0.25))
    for _ in range(100):
        alone.grad, kept.grad = s.to(dtype), s.to(dtype)
        plain.step()
        ours.step()

    assert len(w) > 20_000
    # Below a power of two the numbers are twice as dense, and s/4 is a tie: it stays.
    assert torch.equal(alone, w)
    assert torch.equal(kept.float(), w.float() - 25 * s)


@each_dtype
def test_the_weight_is_at_most_half_a_spacing_from_its_main_param(
    dtype: torch.dtype,
) -> None:
    """Rounding does not add up: after 300 steps the error is that of one rounding."""
    p = weight(dtype)
    optimizer = MainParams(optim.AdamW([p], lr=1e-5))
    for grad in gradients(300, dtype):
        p.grad = grad
        optimizer.step()

    main = optimizer.main_params[p]
    exponent = main.double().abs().log2().floor()
    spacing = torch.exp2(exponent - MANTISSA_BITS[dtype])
    assert ((p.double() - main.double()).abs() <= spacing / 2).all()


def test_the_order_of_a_step() -> None:
    """Copy up, unscale, check, clip, step, copy back: seen from inside the step."""
    seen: list[tuple[str, float, float]] = []
    p = nn.Parameter(torch.ones(1, dtype=FP16))
    inner = optim.SGD([p], lr=0.5)
    scaler = DynamicLossScaler.megatron(init_scale=4.0, growth_interval=1)
    optimizer = MainParams(inner, scaler=scaler, clip_grad=1.0)

    def look(name: str) -> Callable[..., None]:
        def hook(opt: Optimizer, *_: object) -> None:
            (main,) = parameters(opt)
            assert main is not p
            assert main.grad is not None
            assert main.dtype == main.grad.dtype == torch.float32
            seen.append((name, main.item(), round(main.grad.item(), 3)))
            seen.append(("weight", p.item(), scaler.get_scale()))

        return hook

    inner.register_step_pre_hook(look("before"))
    inner.register_step_post_hook(look("after"))
    backward(optimizer.scale_loss(2 * p.sum()))
    assert p.grad is not None
    assert p.grad.item() == 8.0
    optimizer.step()

    # Megatron's scaler has moved the scale when the optimizer runs.
    assert seen[:2] == [("before", 1.0, 1.0), ("weight", 1.0, 8.0)]
    assert seen[2:] == [("after", seen[2][1], 1.0), ("weight", 1.0, 8.0)]
    assert seen[2][1] == pytest.approx(0.5)
    assert p.item() == 0.5
    assert optimizer.grad_norm == 2.0
    assert p.grad.item() == 8.0  # ours to read until zero_grad
    assert optimizer.main_params[p].grad is None
    assert parameters(inner) == [p]


@each_scaler
@each_grad_dtype
def test_the_trace_of_scales_and_weights_is_that_of_a_float32_model(
    make_scaler: Callable[[], Any], grad_dtype: torch.dtype | None
) -> None:
    """300 FP16 steps, one in ten with Inf or NaN: scale, skips and values are equal."""
    ours = weight(FP16)
    reference = nn.Parameter(ours.detach().float())
    mine, theirs = make_scaler(), make_scaler()
    a = MainParams(
        optim.AdamW([ours], lr=1e-4), scaler=mine, clip_grad=0.5, grad_dtype=grad_dtype
    )
    b = optim.AdamW([reference], lr=1e-4)
    draw = torch.Generator().manual_seed(2)
    skips = 0
    for grad in gradients(300, FP16):
        bad = torch.rand((), generator=draw).item()
        scaled = grad.float() * mine.get_scale() * 2.0**-16
        scaled[0, 0] = math.inf if bad < 0.05 else scaled[0, 0]
        scaled[1, 1] = math.nan if bad > 0.95 else scaled[1, 1]
        scaled = scaled.to(FP16)  # the larger ones overflow by themselves
        mine.scale(torch.zeros(()))
        theirs.scale(torch.zeros(()))
        ours.grad = scaled.to(grad_dtype or FP16)
        reference.grad = scaled.float()
        a.step()
        theirs.unscale_(b)
        norm = nn.utils.clip_grad_norm_([reference], 0.5)
        theirs.step(b)
        theirs.update()
        assert mine.get_scale() == theirs.get_scale()
        assert torch.equal(a.main_params[ours], reference)
        assert same([torch.tensor(a.grad_norm)], [norm])
        assert a.found_inf == (not norm.isfinite())
        skips += a.found_inf

    assert 20 < skips < 100
    assert mine.state_dict() == theirs.state_dict()
    assert torch.equal(ours, reference.to(FP16))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("make_scaler", [*SCALERS.values(), lambda: None])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
@each_grad_dtype
def test_a_skipped_step_leaves_everything_untouched(
    bad: float,
    make_scaler: Callable[[], Any],
    clip_grad: float | None,
    grad_dtype: torch.dtype | None,
) -> None:
    """One bad element: no weight, no main param and no state of any group changes."""
    params = [weight(dtype) for dtype in (FP16, BF16, torch.float32)]
    groups: list[dict[str, Any]] = [
        {"params": params[:1]},
        {"params": params[1:], "lr": 0.1},
    ]
    scaler = make_scaler()
    optimizer = MainParams(
        optim.AdamW(groups), scaler=scaler, clip_grad=clip_grad, grad_dtype=grad_dtype
    )
    for factor in (1.0, bad):
        before = everything(optimizer)
        optimizer.zero_grad()
        loss = sum((p.float() * 1e-3).sum() for p in params)
        backward(optimizer.scale_loss(torch.as_tensor(loss)))
        assert params[0].grad is not None
        params[0].grad[2, 2] *= factor
        optimizer.step()
        assert optimizer.found_inf == (factor != 1.0)
        assert same(before, everything(optimizer)) == (factor != 1.0)

    if scaler is not None:  # megatron's hysteresis forgives the first
        assert scaler.get_scale() in (2.0**15, 2.0**16)
    if clip_grad:
        assert not math.isfinite(optimizer.grad_norm or 0.0)


def test_a_norm_beyond_float32_is_skipped_only_where_it_is_needed() -> None:
    """Gradients of 1e30 are finite, their norm is not: clipping would make them 0."""
    for clip_grad in (None, 1.0):
        p = nn.Parameter(torch.ones(4, dtype=BF16))
        optimizer = MainParams(optim.SGD([p], lr=1e-30), clip_grad=clip_grad)
        p.grad = torch.full_like(p, 1e30)
        optimizer.step()
        assert optimizer.found_inf == (clip_grad is not None)
        assert (p == 1).all().item() == (clip_grad is not None)


def test_clipping_is_that_of_torch_on_float32_gradients() -> None:
    """clip_grad_norm_ on float32 copies gives the same norm and the same step."""
    half, full = weight(FP16), weight(torch.float32)
    copies = [nn.Parameter(p.detach().float()) for p in (half, full)]
    a = MainParams(optim.SGD([half, full], lr=0.1), clip_grad=0.3)
    b = optim.SGD(copies, lr=0.1)
    grad = gradients(1, FP16)[0]
    half.grad, full.grad = grad, grad.float()
    for p in copies:
        p.grad = grad.float()
    norm = nn.utils.clip_grad_norm_(copies, 0.3)
    a.step()
    b.step()

    assert a.grad_norm == norm.item() > 0.3
    assert torch.equal(a.main_params[half], copies[0])
    assert torch.equal(full, copies[1])


def test_infinite_clip_grad_only_measures() -> None:
    """The step is the same as without, and the norm is known."""
    ends = []
    for clip_grad in (None, math.inf):
        p = weight()
        optimizer = MainParams(optim.SGD([p], lr=0.1), clip_grad=clip_grad)
        p.grad = gradients(1)[0]
        optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)
    norm = gradients(1)[0].float().norm().item()
    assert optimizer.grad_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_parameters_are_handed_through(dtype: torch.dtype) -> None:
    """They get no copy, and the step of the optimizer alone."""
    ours, theirs, empty = weight(dtype), weight(dtype), nn.Parameter(torch.zeros(0))
    a, b = MainParams(optim.AdamW([ours, empty])), optim.AdamW([theirs])
    empty.grad = torch.zeros(0)
    for grad in gradients(5, dtype):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()

    assert torch.equal(ours, theirs)
    assert a.main_params == {}


def test_float64_gradients_stay_float64() -> None:
    """grad_dtype widens; it narrows nothing."""
    p = weight(torch.float64)
    optimizer = MainParams(optim.SGD([p], lr=1.0), grad_dtype=torch.float32)
    backward((p * 0.1).sum())
    optimizer.step()

    assert p.grad is not None
    assert p.grad.dtype == torch.float64
    assert torch.equal(p, weight(torch.float64) - 0.1)


# Bytes.


def live_bytes(ignore: set[int]) -> tuple[int, set[int]]:
    """The memory behind all tensors of this process, each storage once."""
    # Neither lazy, fake nor sparse ones that another test has left behind.
    tensors = [o for o in gc.get_objects() if type(o) in {Tensor, nn.Parameter}]
    tensors = [t for t in tensors if t.layout == torch.strided and not t.is_meta]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    sizes = {ptr: s for ptr, s in sizes.items() if ptr not in ignore}
    return sum(s.nbytes() for s in sizes.values()), set(sizes)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "in_step", "in_backward", "model_only"),
    [
        (FP16, None, 20, 16, 4),
        (BF16, None, 20, 16, 4),
        (BF16, torch.float32, 18, 18, 6),
        (FP16, torch.float32, 18, 18, 6),
        (torch.float32, None, 16, 16, 8),
    ],
)
def test_bytes_are_the_documented_ones(
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None,
    in_step: int,
    in_backward: int,
    model_only: int,
) -> None:
    """Measured over all live tensors, inside AdamW's step and after it.

    What is not the model's own can be shared by d ranks: Megatron's second column.
    """
    n = 100_000
    gc.collect()
    _, others = live_bytes(set())
    p = nn.Parameter(torch.ones(n, dtype=dtype))
    optimizer = MainParams(optim.AdamW([p]), grad_dtype=grad_dtype)
    inside = []
    optimizer.inner.register_step_pre_hook(
        lambda *_: inside.append(live_bytes(others)[0] / n)
    )
    for _ in range(2):  # the second step has state from its start
        optimizer.zero_grad()
        backward(p.sum())
        assert p.grad is not None
        assert p.grad.dtype == (grad_dtype or dtype)
        optimizer.step()

    assert inside[-1] == pytest.approx(in_step, abs=0.01)
    assert live_bytes(others)[0] / n == pytest.approx(in_backward, abs=0.01)
    b_w, b_g = p.element_size(), (grad_dtype or dtype).itemsize
    is_half = b_w == 2
    assert b_w + b_g == model_only
    assert in_step == b_w + b_g + 4 * is_half + 4 * (b_g == 2) + 8
    documented = {4: lambda d: 4 + 16 / d, 6: lambda d: 6 + 12 / d}
    for d in (1, 8, 64):
        formula = documented.get(model_only, lambda d: 8 + 8 / d)(d)
        assert model_only + (in_step - model_only) / d == formula


def test_float32_gradients_do_not_stall_while_they_accumulate() -> None:
    """1,024 micro-batches of 1/1024 are 0.25 in BF16 and 1 in float32."""
    found = []
    for grad_dtype in (None, torch.float32):
        p = nn.Parameter(torch.ones(1, dtype=BF16))
        MainParams(optim.SGD([p]), grad_dtype=grad_dtype)
        for _ in range(1024):
            backward(p.sum() / 1024)
        assert p.grad is not None
        found.append(p.grad.item())
    assert found == [0.25, 1.0]


# Parameters that come and go.


@each_grad_dtype
def test_frozen_and_added_parameters_get_main_params_with_their_gradients(
    grad_dtype: torch.dtype | None,
) -> None:
    """Before the first gradient there is no copy; afterwards each has its own group."""
    a, b, c = weight(), weight(), weight(FP16)
    b.requires_grad_(False)
    optimizer = MainParams(optim.SGD([a, b], lr=1.0), grad_dtype=grad_dtype)

    def run(*trained: nn.Parameter) -> None:
        optimizer.zero_grad()
        backward(torch.stack([p.float().sum() for p in trained]).sum())
        optimizer.step()

    run(a)
    assert list(optimizer.main_params) == [a]
    b.requires_grad_()
    optimizer.add_param_group({"params": c, "lr": 0.5})
    run(a, b)
    assert list(optimizer.main_params) == [a, b]
    run(c)
    assert list(optimizer.main_params) == [a, b, c]
    a.requires_grad_(False)
    run(b, c)

    start = weight().float()
    assert torch.equal(optimizer.main_params[a], start - 1 - 1)
    assert torch.equal(optimizer.main_params[b], start - 1 - 1)
    assert torch.equal(optimizer.main_params[c], weight(FP16).float() - 0.5 - 0.5)
    expected = None if a.grad is None else a.grad.dtype
    assert expected is None
    assert c.grad is not None
    assert c.grad.dtype == (grad_dtype or FP16)


def test_groups_keep_their_settings() -> None:
    """Two groups, two learning rates and decays, as in the optimizer alone."""
    ours = [weight(), weight()]
    theirs = [nn.Parameter(p.detach().float()) for p in ours]

    def make(params: list[nn.Parameter]) -> Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": params[:1]},
            {"params": params[1:], "lr": 1e-2, "weight_decay": 0.5},
        ]
        return optim.AdamW(groups, lr=1e-4)

    a, b = MainParams(make(ours)), make(theirs)
    for grad in gradients(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad, q.grad = grad, grad.float()
        a.step()
        b.step()

    assert same([a.main_params[p] for p in ours], [q.detach() for q in theirs])
    assert not torch.equal(*ours)


def test_tied_weights_have_one_main_param_and_stay_tied() -> None:
    """Embedding and head share it: one step on the sum of both gradients."""
    table, head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, head).to(BF16)
    optimizer = MainParams(optim.SGD(model.parameters(), lr=1.0))
    start = table.weight.detach().float()
    backward(model(torch.tensor([1, 2])).float().sum())
    grad = table.weight.grad
    optimizer.step()

    assert head.weight is table.weight
    assert len(optimizer.main_params) == 1
    assert grad is not None
    assert torch.equal(optimizer.main_params[table.weight], start - grad.float())


def test_a_weight_changed_from_outside_takes_its_main_param_along() -> None:
    """A loaded checkpoint or a mask is not undone; the other elements keep theirs."""
    p = nn.Parameter(torch.ones(3, dtype=BF16))
    optimizer = MainParams(optim.SGD([p], lr=1e-4))
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p[1] = 5.0
        p[2] = math.nan
    optimizer.step()

    main = optimizer.main_params[p]
    assert main[0].item() == pytest.approx(1 - 2e-4)
    assert p[1].item() == 5.0
    assert main[1].item() == pytest.approx(5 - 1e-4)
    assert main[2].isnan()


def test_state_made_at_construction_or_in_half_precision_is_widened() -> None:
    """Adagrad's sum, and the moments of an AdamW that ran without main params."""
    p = weight()
    plain = optim.AdamW([p])
    p.grad = gradients(1)[0]
    plain.step()
    moment = plain.state[p]["exp_avg"].float()
    assert plain.state[p]["exp_avg"].dtype == BF16
    optimizer = MainParams(plain)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    widened = optimizer.state[p]["exp_avg"]
    assert widened.dtype == torch.float32
    assert torch.allclose(widened, 0.9 * moment)
    assert optimizer.state[p]["step"] == 2

    q = weight()
    optimizer = MainParams(optim.Adagrad([q], initial_accumulator_value=0.5))
    q.grad = torch.ones_like(q)
    optimizer.step()
    assert optimizer.state[q]["sum"].dtype == torch.float32
    assert (optimizer.state[q]["sum"] == 1.5).all()


# The interface of an optimizer.


@pytest.mark.parametrize("on", ["wrapper", "inner"])
def test_schedulers_work_on_either(on: str) -> None:
    """Both see the same groups; betas are cycled too."""
    p = weight()
    optimizer = MainParams(optim.AdamW([p], lr=0.1))
    target = optimizer if on == "wrapper" else optimizer.inner
    schedulers = [
        optim.lr_scheduler.StepLR(target, 1, gamma=0.5),
        optim.lr_scheduler.OneCycleLR(target, max_lr=1.0, total_steps=5),
    ]
    rates = []
    for grad in gradients(3):
        p.grad = grad
        optimizer.step()
        schedulers[1].step()
        rates.append((optimizer.param_groups[0]["lr"], optimizer.inner.defaults))
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    assert len({rate for rate, _ in rates}) == 3
    # Schedulers patch step with a local function, which cannot be pickled.
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.param_groups[0]["lr"] == rates[-1][0]


def test_a_closure_runs_once_with_gradients_enabled() -> None:
    """As the Trainer calls it; its loss comes back."""
    p = nn.Parameter(torch.ones(1, dtype=BF16))
    optimizer = MainParams(optim.SGD([p], lr=0.5))
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.float().sum()
        backward(loss)
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert calls == [True]
    assert p.item() == 0.5
    optimizer.zero_grad()
    assert p.grad is None
    assert optimizer.step() is None
    assert p.item() == 0.5


def test_hooks_names_and_representation() -> None:
    """What every optimizer has, this one has as well."""
    model = nn.Linear(2, 2).to(BF16)
    optimizer = MainParams(optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    inside: list[list[Tensor]] = []
    optimizer.inner.register_step_post_hook(
        lambda *_: inside.append(list(optimizer.state))
    )
    backward(model(torch.ones(1, 2, dtype=BF16)).sum())
    optimizer.step()

    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert repr(optimizer).startswith("MainParams (\nParameter Group 0\n")
    for seen in (list(optimizer.state), *inside):
        assert [id(p) for p in seen] == [id(model.weight), id(model.bias)]
    assert optimizer.state[model.bias]["momentum_buffer"].dtype == torch.float32
    assert optimizer.defaults["lr"] == 0.1


def test_hooks_on_saving_and_loading_run() -> None:
    """In torch's order, with this object and its whole state, and may replace it."""
    optimizer = MainParams(optim.SGD([weight()], lr=0.1))
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(f"save {id(o)}"))
    optimizer.register_state_dict_post_hook(lambda _, s: {**s, "note": "mine"})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, s: {key: value for key, value in s.items() if key != "note"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(f"{id(o)} on"))
    saved = optimizer.state_dict()
    assert list(saved) == ["state", "param_groups", "optimizer", "note"]
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert calls == [f"save {id(optimizer)}", f"{id(optimizer)} on"]


def test_float32_gradients_let_one_scaler_serve_from_outside() -> None:
    """GradScaler unscales them itself, which it refuses for half gradients."""
    p, q = weight(FP16), nn.Parameter(weight(FP16).detach().float())
    scalers = [torch.amp.GradScaler("cpu") for _ in range(2)]
    a = MainParams(optim.SGD([p], lr=0.1), grad_dtype=torch.float32)
    b = optim.SGD([q], lr=0.1)
    for _ in range(5):
        a.zero_grad()
        b.zero_grad()
        backward(scalers[0].scale((p.float() * p.float()).sum()))
        backward(scalers[1].scale((q.half().float() * q.half().float()).sum()))
        for scaler, optimizer in zip(scalers, (a, b), strict=True):
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(p, q.half())
    assert scalers[0].state_dict() == scalers[1].state_dict()

    half = weight(FP16)
    optimizer = MainParams(optim.SGD([half]))
    backward(scalers[0].scale(half.sum()))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scalers[0].step(optimizer)


def test_a_disabled_scaler_is_none() -> None:
    """The loop of an FP16 run does BF16 as well."""
    p = nn.Parameter(torch.ones(1, dtype=BF16))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = MainParams(optim.SGD([p], lr=0.5), scaler=scaler)
    backward(optimizer.scale_loss(p.sum()))
    optimizer.step()
    assert p.item() == 0.5
    optimizer.load_state_dict(optimizer.state_dict())


# Checkpoints.


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Save and load it, with the loader that runs no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@each_optimizer
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_resumed_run_is_the_same_bit_for_bit(make: Make, how: str) -> None:
    """8 steps, a checkpoint, 8 steps equal 16; the scale and its count included."""
    grads = gradients(16, FP16)
    grads[3][0, 0] = math.nan

    def fresh() -> MainParams:
        scaler = DynamicLossScaler(init_scale=4.0, growth_interval=5)
        return MainParams(make([weight(FP16)]), scaler=scaler)

    def advance(optimizer: MainParams, part: slice) -> None:
        for grad in grads[part]:
            (p,) = parameters(optimizer)
            optimizer.scale_loss(torch.zeros(()))
            p.grad = grad * optimizer.scaler.get_scale()
            optimizer.step()

    through, first = fresh(), fresh()
    advance(through, slice(0, 16))
    advance(first, slice(0, 8))
    resumed = fresh()
    if how == "state_dict":
        saved = through_a_file(first.state_dict())
        with torch.no_grad():
            parameters(resumed)[0].copy_(parameters(first)[0])
        resumed.load_state_dict(saved)
    else:
        for p in parameters(first):
            p.grad = None
        resumed = (
            copy.deepcopy(first)
            if how == "deepcopy"
            else pickle.loads(pickle.dumps(first))
        )
    advance(resumed, slice(8, 16))

    assert same(everything(resumed), everything(through))
    assert resumed.scaler.state_dict() == through.scaler.state_dict()


def test_grad_dtype_survives_a_copy() -> None:
    """Torch does not copy the attribute of the parameter; the optimizer asks again."""
    p = weight()
    optimizer = MainParams(optim.SGD([p]), grad_dtype=torch.float32)
    clone, model = copy.deepcopy((optimizer, p))
    backward(model.sum())
    assert parameters(clone)[0] is model
    assert model.grad is not None
    assert model.grad.dtype == torch.float32


def test_a_main_param_is_loaded_exactly_and_not_shared() -> None:
    """The 16 bits that the weight lacks come from the file; two runs do not meet."""
    a, b = weight(), weight()
    first, second = MainParams(optim.SGD([a], lr=1e-4)), MainParams(optim.SGD([b]))
    a.grad = torch.ones_like(a)
    first.step()
    second.load_state_dict(first.state_dict())

    assert torch.equal(second.main_params[b], first.main_params[a])
    assert not torch.equal(second.main_params[b], a.float())
    assert second.main_params[b] is not first.main_params[a]
    assert second.param_groups[0]["lr"] == 1e-4
    assert parameters(second) == [b]


def test_the_state_of_a_plain_optimizer_is_taken_over() -> None:
    """Its half moments are widened and the main params made from the weights."""
    p, q = weight(), weight()
    plain = optim.AdamW([p], lr=1e-2)
    p.grad = gradients(1)[0]
    plain.step()
    optimizer = MainParams(optim.AdamW([q]))
    optimizer.load_state_dict(through_a_file(plain.state_dict()))

    assert torch.equal(optimizer.main_params[q], q.float())
    assert optimizer.state[q]["exp_avg"].dtype == torch.float32
    assert torch.equal(optimizer.state[q]["exp_avg"], plain.state[p]["exp_avg"].float())
    assert optimizer.param_groups[0]["lr"] == 1e-2


def good_state() -> dict[str, Any]:
    """A state for `refusing`, before it is spoiled."""
    p, q = weight(), weight(torch.float32)
    optimizer = MainParams(
        optim.AdamW([{"params": [p]}, {"params": [q]}]), scaler=DynamicLossScaler()
    )
    backward(optimizer.scale_loss(p.sum() + q.sum()))
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def spoil(path: str, value: object) -> dict[str, Any]:
    """Set, or with ``...`` delete, one place of a good state."""
    state: Any = good_state()
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = state
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    result: dict[str, Any] = state
    return result


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("optimizer", "SGD", "saved around SGD, this is around AdamW"),
        ("scaler", ..., "saved without a scaler"),
        ("scaler.scale", -1.0, "scale must be a positive number"),
        ("stat", {}, r"has the keys .*'state'.*, got .*'stat'"),
        ("state", ..., "has the keys"),
        ("param_groups", ..., "has the keys"),
        ("param_groups.1", ..., r"groups of \[1\] parameters, here are \[1, 1\]"),
        ("param_groups.1.params", [1, 2], r"of \[1, 2\] parameters, here are \[1, 1\]"),
        ("state.0.main_param", torch.zeros(5, 6), r"main_param .* \(5, 6\), not \(6"),
        ("state", None, "'state' of a state dict is a mapping, got NoneType"),
        ("state.0.main_param", None, "main_param of parameter 0 is NoneType, not a te"),
        ("state.0.main_param", torch.zeros(()), r"main_param of parameter 0 is \(\)"),
        ("state.0.main_param", torch.zeros(1, 5), r"main_param .* \(1, 5\)"),
        ("state.0.exp_avg", torch.zeros(30), r"exp_avg of parameter 0 is \(30,\)"),
        ("state.1.exp_avg_sq", torch.zeros(6, 4), r"exp_avg_sq of parameter 1"),
        ("state.1.main_param", torch.zeros(6, 5), "1 was half, here it is torch.float"),
    ],
)
def test_a_wrong_state_is_refused_before_anything_changes(
    path: str, value: object, match: str
) -> None:
    """Whatever is wrong, weights, main params, state, groups and scale stay."""
    p, q = weight(), weight(torch.float32)
    groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [q]}]
    scaler = DynamicLossScaler(init_scale=8.0)
    optimizer = MainParams(optim.AdamW(groups, lr=0.5), scaler=scaler)
    backward(optimizer.scale_loss(p.sum() * 2 + q.sum()))
    optimizer.step()
    before = everything(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(spoil(path, value))

    assert same(before, everything(optimizer))
    assert optimizer.scaler.get_scale() == 8.0
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.load_state_dict(good_state())


def test_a_state_with_a_scaler_needs_one_and_a_mapping() -> None:
    """The two errors that need another optimizer or another type."""
    optimizer = MainParams(optim.AdamW([weight()]))
    with pytest.raises(ValueError, match="construct with scaler="):
        optimizer.load_state_dict(good_state())
    with pytest.raises(TypeError, match="a state dict is a mapping, got list"):
        optimizer.load_state_dict([])  # type: ignore[arg-type]


# Lightning.


def make_network() -> nn.Sequential:
    """A small classifier of digits, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10)
    )


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's scanned digits, shuffled."""
    images, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images / 16, dtype=torch.float32)[order]
    return x, torch.tensor(targets)[order]


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Equal parts of both, in order."""
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


@pytest.mark.parametrize("when", ["before setup", "after setup"])
@each_grad_dtype
def test_fabric_gives_the_same_weights_as_the_plain_loop(
    when: str, grad_dtype: torch.dtype | None, digits: tuple[Tensor, Tensor]
) -> None:
    """Made before or after the cast, the optimizer works, attributes included."""
    x, y = digits[0][:200], digits[1][:200]
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    ours, theirs = make_network(), make_network().to(BF16)

    def make(model: nn.Module) -> MainParams:
        inner = optim.AdamW(model.parameters(), lr=1e-3)
        return MainParams(inner, clip_grad=1.0, grad_dtype=grad_dtype)

    if when == "before setup":
        model, a = fabric.setup(ours, make(ours))
    else:
        model = fabric.setup_module(ours)
        a = fabric.setup_optimizers(make(ours))
    b = make(theirs)
    for images, targets in batches(x, y, 50):
        a.zero_grad()
        b.zero_grad()
        fabric.backward(F.cross_entropy(model(images), targets))
        backward(F.cross_entropy(theirs(images.to(BF16)).float(), targets))
        a.step()
        b.step()
        assert a.grad_norm == b.grad_norm is not None

    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(a.main_params[p], b.main_params[q])


class Digits(lightning.LightningModule):
    """The digits, for the Trainer."""

    def __init__(self, grad_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network = make_network()
        self.grad_dtype = grad_dtype
        self.norms: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.network(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - as in Lightning
        """The optimizer and a schedule on it."""
        inner = optim.AdamW(self.parameters(), lr=1e-3)
        self.optimizer = MainParams(
            inner, clip_grad=math.inf, grad_dtype=self.grad_dtype
        )
        return [self.optimizer], [optim.lr_scheduler.StepLR(self.optimizer, 1)]

    def on_train_batch_end(self, *_: object) -> None:
        """Collect what the optimizer measured."""
        assert self.optimizer.grad_norm is not None
        self.norms.append(self.optimizer.grad_norm)


@pytest.fixture
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


# Lightning 2.6.6 looks at a tree specification in a way that torch 2.13 deprecates,
# and its loader for few CPUs is on purpose one without workers.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists.*:UserWarning")
@pytest.mark.usefixtures("_quiet")
@each_grad_dtype
def test_the_trainer_trains_clips_saves_and_resumes(
    grad_dtype: torch.dtype | None, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """gradient_clip_val reaches the gradients; the checkpoint holds the main params."""
    x, y = digits[0][:200], digits[1][:200]
    data = DataLoader(TensorDataset(x, y), batch_size=50)

    def fit(epochs: int, resume: Path | None = None) -> tuple[Digits, Path]:
        model = Digits(grad_dtype)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            precision="bf16-true",
            max_epochs=epochs,
            gradient_clip_val=0.01,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, data, ckpt_path=resume)
        path = tmp_path / f"{epochs}.ckpt"
        trainer.save_checkpoint(path)
        return model, path

    one, path = fit(1)
    assert one.norms == pytest.approx([0.01] * 4, rel=0.02)
    assert len(one.optimizer.main_params) == 6
    resumed, _ = fit(2, resume=path)
    through, _ = fit(2)
    mine = [resumed.optimizer.main_params[p] for p in resumed.parameters()]
    theirs = [through.optimizer.main_params[p] for p in through.parameters()]
    assert same(mine, theirs)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_a_rank_skips_for_what_another_rank_found() -> None:
    """Two threads as ranks, one with Inf: both skip, and both say so."""
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = HashStore()

    def rank(number: int) -> tuple[float, bool]:
        group: Any = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=30))
        scaler = DynamicLossScaler(init_scale=4.0, process_group=group)
        shard = nn.Parameter(torch.ones(1, dtype=FP16))
        optimizer = MainParams(optim.SGD([shard], lr=1.0), scaler=scaler)
        factor = math.inf if number == 1 else 1.0
        backward(optimizer.scale_loss((factor * shard).sum()))
        optimizer.step()
        return shard.item(), optimizer.found_inf

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(rank, (0, 1))) == [(1.0, True), (1.0, True)]


def test_ddp_refuses_float32_gradients_of_half_weights(tmp_path: Path) -> None:
    """It reduces in the dtype of the weights, and says so instead of rounding."""
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    url = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=url, rank=0, world_size=1)
    try:
        for grad_dtype in (None, torch.float32):
            model = nn.Linear(2, 2).to(BF16)
            optimizer = MainParams(optim.SGD(model.parameters()), grad_dtype=grad_dtype)
            parallel = nn.parallel.DistributedDataParallel(model)
            loss = parallel(torch.ones(1, 2, dtype=BF16)).sum()
            if grad_dtype is None:
                backward(loss)
                optimizer.step()
                continue
            with pytest.raises(RuntimeError, match="Expected BFloat16, got Float"):
                backward(loss)
    finally:
        dist.destroy_process_group()


# Training.


def test_small_learning_rates_stall_in_half_precision_and_not_with_main_params(
    digits: tuple[Tensor, Tensor],
) -> None:
    """SGD at a rate that BF16 loses: alone it fails, with main params it is float32."""
    x, y = digits

    def accuracy(dtype: torch.dtype, wrap: Callable[[Optimizer], Optimizer]) -> float:
        model = make_network().to(dtype)
        optimizer = wrap(optim.AdamW(model.parameters(), lr=1e-4))
        for _ in range(15):
            for images, targets in batches(x[:1400], y[:1400], 50):
                optimizer.zero_grad()
                backward(F.cross_entropy(model(images.to(dtype)).float(), targets))
                optimizer.step()
        hits: Tensor = model(x[1400:].to(dtype)).argmax(1) == y[1400:]
        return hits.double().mean().item()

    full = accuracy(torch.float32, lambda inner: inner)
    assert full > 0.7
    assert accuracy(BF16, lambda inner: inner) < full - 0.2
    assert accuracy(BF16, MainParams) == pytest.approx(full, abs=0.03)


@each_scaler
def test_small_gradients_need_the_scaler_besides(
    make_scaler: Callable[[], Any],
) -> None:
    """A gradient of 2**-26 is zero in FP16: main params alone do not bring it back."""
    moved = []
    for scaler in (None, make_scaler()):
        p = nn.Parameter(torch.ones(1, dtype=FP16))
        optimizer = MainParams(optim.SGD([p], lr=2.0**20), scaler=scaler)
        for _ in range(4):
            optimizer.zero_grad()
            backward(optimizer.scale_loss((p.float() * 2.0**-26).sum()))
            optimizer.step()
        moved.append(1 - p.item())
    assert moved == [0.0, 4 * 2.0**-6]


# Errors.


def closed(**settings: Any) -> Callable[[], MainParams]:  # noqa: ANN401
    """A constructor call with one bad setting."""
    return lambda: MainParams(optim.SGD([weight()]), **settings)


def with_gradient() -> MainParams:
    """Ask for float32 gradients when there is a half one."""
    p = weight()
    p.grad = torch.ones_like(p)
    return MainParams(optim.SGD([p]), grad_dtype=torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: MainParams(weight()), TypeError, "a torch one, not .*, got Parameter"),  # type: ignore[arg-type]
        (lambda: MainParams(optim.LBFGS([weight()])), TypeError, "got LBFGS"),
        (lambda: MainParams(closed()()), TypeError, "got MainParams"),
        (closed(scaler=2.0**16), TypeError, r"\['scale', .*\], got float"),
        (closed(clip_grad=0.0), ValueError, "clip_grad must be > 0 or None, got 0.0"),
        (closed(clip_grad=-1.0), ValueError, "got -1.0"),
        (closed(clip_grad=math.nan), ValueError, "got nan"),
        (closed(clip_grad="1"), ValueError, "clip_grad must be > 0 or None, got '1'"),
        (closed(grad_dtype=BF16), ValueError, "torch.float32, got torch.bfloat16"),
        (closed(grad_dtyp=BF16), TypeError, "grad_dtyp"),
        (lambda: MainParams(optim.SGD([])), ValueError, "empty parameter list"),
        (
            lambda: MainParams(optim.SGD([torch.zeros(2, dtype=torch.int64)])),
            TypeError,
            "one of .*, got torch.int64",
        ),
        (
            lambda: MainParams(optim.SGD([torch.zeros(2).to(torch.float8_e4m3fn)])),
            TypeError,
            "got torch.float8_e4m3fn",
        ),
        (
            lambda: MainParams(optim.SGD([weight(), torch.zeros(2, device="meta")])),
            ValueError,
            r"one real device, got \['cpu', 'meta'\]",
        ),
        (
            lambda: MainParams(optim.SGD([torch.zeros(2, device="meta")])),
            ValueError,
            "got .'meta'.",
        ),
        (with_gradient, ValueError, "there is a torch.bfloat16 gradient: call zero"),
    ],
)
def test_bad_settings_are_refused(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    """Each with the value received."""
    with pytest.raises(error, match=match):
        call()


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_a_parameter_twice_in_a_group_is_refused() -> None:
    """Torch only warns, and would step twice."""
    p = weight()
    with pytest.raises(ValueError, match="twice: give tied weights once"):
        MainParams(optim.SGD([p, p]))


def test_an_old_torch_has_no_grad_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting an unknown attribute would be silent."""
    monkeypatch.setattr(main_params, "Tensor", object)
    with pytest.raises(RuntimeError, match=r"torch 2.* has no Tensor.grad_dtype"):
        closed(grad_dtype=torch.float32)()


@pytest.mark.parametrize("bad", ["integer", "meta", "again"])
def test_a_bad_group_is_refused_before_it_is_added(bad: str) -> None:
    """The groups are as before, and so are the ones inside."""
    p = weight()
    optimizer = MainParams(optim.SGD([p]))
    added = {
        "integer": torch.zeros(2, dtype=torch.int64),
        "meta": torch.zeros(2, device="meta"),
        "again": p,
    }[bad]
    with pytest.raises((TypeError, ValueError), match=r"int64|meta|twice"):
        optimizer.add_param_group({"params": [added]})
    assert len(optimizer.inner.param_groups) == 1


def test_bad_gradients_are_refused_before_the_step() -> None:
    """A sparse one, and one of a parameter that was cast after its first step."""
    table = nn.Embedding(4, 2, sparse=True, dtype=BF16)
    p = weight()
    optimizer = MainParams(optim.SGD([p, table.weight], lr=1.0))
    p.grad = gradients(1)[0]
    backward(table(torch.tensor([1])).sum())
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert same(before, everything(optimizer))

    model = nn.Linear(2, 2).to(BF16)
    optimizer = MainParams(optim.SGD(model.parameters()))
    backward(model(torch.ones(1, 2, dtype=BF16)).sum())
    optimizer.step()
    model.float()
    with pytest.raises(RuntimeError, match=r"has become torch.float32 of .* on cpu"):
        optimizer.step()

    first, grown = weight(), weight()
    optimizer = MainParams(optim.SGD([first, grown], lr=1.0))
    first.grad, grown.grad = torch.ones_like(first), torch.ones_like(grown)
    optimizer.step()
    grown.grad = None
    grown.data = torch.zeros(7, 5, dtype=BF16)
    grown.grad = torch.ones_like(grown)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=r"become torch.bfloat16 of shape \(7, 5\)"):
        optimizer.step()
    assert same(before, everything(optimizer))


def test_a_failing_step_puts_the_groups_back() -> None:
    """An exception inside the optimizer leaves the model's parameters in the groups."""
    p = weight()
    optimizer = MainParams(optim.SGD([p]))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    optimizer.inner.register_step_pre_hook(fail)
    p.grad = torch.ones_like(p)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert parameters(optimizer)[0] is p
    assert optimizer.main_params[p].grad is None
    assert torch.equal(p, weight())


@each_scaler
def test_a_step_without_gradients(make_scaler: Callable[[], Any]) -> None:
    """Without a scaler it does nothing, like any optimizer; a scaler complains."""
    p = weight()
    MainParams(optim.SGD([p])).step()
    optimizer = MainParams(optim.SGD([p]), scaler=make_scaler())
    optimizer.scale_loss(torch.zeros(()))
    with pytest.raises((AssertionError, RuntimeError), match=r"No inf checks|no param"):
        optimizer.step()
    assert torch.equal(p, weight())
