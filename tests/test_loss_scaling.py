"""Tests of snippets/loss_scaling.py, as read in guide/loss_scaling."""

import copy
import io
import itertools
import json
import math
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import lightning.fabric.plugins
import lightning.pytorch.plugins
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.utils.data import DataLoader, TensorDataset

from snippets.loss_scaling import DynamicLossScaler
from snippets.mixed_precision import MixedPrecisionStep
from tests.ranks import needs_gloo, run_ranks

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
BAD = (math.inf, -math.inf, math.nan)


Scaler = DynamicLossScaler | torch.amp.GradScaler


def torch_scaler(
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> torch.amp.GradScaler:
    """PyTorch's scaler, ready: it wants a loss before it tells its state."""
    scaler = torch.amp.GradScaler(
        "cpu", init_scale, growth_factor, backoff_factor, growth_interval
    )
    scaler.scale(torch.zeros(()))
    return scaler


def parameter(
    *values: float, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Parameter:
    """A parameter with these values."""
    return nn.Parameter(torch.tensor(values, dtype=dtype, device=device))


def iterate(
    scaler: Scaler, optimizer: Optimizer, *scaled_gradients: Sequence[float]
) -> float:
    """One iteration on gradients that are given as they are after backward."""
    scaler.scale(torch.zeros(()))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for weight, values in zip(parameters, scaled_gradients, strict=True):
        weight.grad = torch.tensor(values, dtype=weight.dtype)
    scaler.step(optimizer)
    scaler.update()
    return float(scaler.get_scale())


def scales(scaler: Scaler, bad: Iterable[bool]) -> list[float]:
    """The scale after each iteration, of which some are bad."""
    optimizer = SGD([parameter(0.0)], lr=1.0)
    return [iterate(scaler, optimizer, [math.nan if b else 1.0]) for b in bad]


def bits(*parameters: Tensor) -> list[int]:
    """The bit patterns of float32 parameters, so that NaN equals itself."""
    return [b for p in parameters for b in p.detach().view(torch.int32).tolist()]


def network() -> nn.Sequential:
    """The same 64-32-10 network each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn, shuffled once, pixels in [0, 1]."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.manual_seed(0))
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    return x, torch.tensor(data.target)[order]


# Exact laws.


@pytest.mark.parametrize("exponent", [-14, -1, 0, 1, 16, 32, 100])
def test_unscaling_is_exact_for_every_float16_value(exponent: int) -> None:
    """All 63,488 finite patterns are divided without rounding."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.float16).float()
    values = values[values.isfinite()]
    weight = parameter(*[0.0] * len(values))
    weight.grad = values.clone()
    scaler = DynamicLossScaler(init_scale=2.0**exponent)
    scaler.scale(torch.zeros(()))

    scaler.unscale_(SGD([weight], lr=1.0))

    assert len(values) == 63488
    # Down to the subnormals of float32, which a scale of 2**100 and 2**-24 reaches.
    exact = (values.double() * 2.0**-exponent).float()
    assert torch.equal(weight.grad, exact)
    assert exponent == 100 or torch.equal(exact.double(), values.double() / 2**exponent)


@pytest.mark.parametrize("exponent", [0, 10, 16, 32])
def test_scaling_moves_the_window_of_float16(exponent: int) -> None:
    """A power of two g survives float16 iff 2**-25 < s g < 65520, and then exactly."""
    scale = 2.0**exponent
    for gradient in (2.0**e for e in range(-70, 20)):
        weight = parameter(0.0)
        scaler = DynamicLossScaler(scale)
        torch.autograd.backward(scaler.scale((weight.half().float() * gradient).sum()))
        assert weight.grad is not None
        scaler.unscale_(SGD([weight], lr=1.0))
        if 2.0**-25 < scale * gradient < 65520:
            assert weight.grad.item() == gradient
        else:
            assert weight.grad.item() == (0.0 if scale * gradient < 1 else math.inf)


def test_every_float16_pattern_that_is_not_finite_skips() -> None:
    """Both infinities and all 2,046 NaN, wherever they stand."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.float16).float()
    values = values[~values.isfinite()]
    assert len(values) == 2 + 2046
    for index, value in enumerate(values):
        weight = parameter(*[1.0] * 5)
        scaler = DynamicLossScaler()
        scaler.scale(torch.zeros(()))
        weight.grad = torch.zeros(5)
        weight.grad[index % 5] = value

        scaler.step(SGD([weight], lr=1.0))
        scaler.update()

        assert scaler.found_inf
        assert bits(weight) == bits(torch.ones(5))


@pytest.mark.parametrize("values", [0.0, -0.0, 2.0**-149, 3.4028234e38])
def test_zeros_subnormals_and_the_largest_value_are_ordinary(values: float) -> None:
    """They count as good."""
    scaler = DynamicLossScaler(growth_interval=1)
    assert iterate(scaler, SGD([parameter(1.0)], lr=0.0), [values]) == 2.0**17


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scaling_multiplies_gradients_and_keeps_the_structure(
    dtype: torch.dtype, device: str
) -> None:
    """A float16 scalar cannot overflow; lists, tuples and named tuples stay such."""

    class Losses(NamedTuple):
        a: Tensor
        b: list[Tensor]

    scaler = DynamicLossScaler(init_scale=2.0**16)
    weight = parameter(3.0, device=device)
    loss = weight.sum().to(dtype)

    losses = scaler.scale(Losses(loss, [loss, loss]))

    assert isinstance(losses, Losses)
    assert losses.a.item() == 3 * 2**16  # above the range of float16
    assert [value.item() for value in losses.b] == [3 * 2**16] * 2
    assert isinstance(scaler.scale((loss, loss)), tuple)
    torch.autograd.backward(scaler.scale(weight.sum()))
    assert weight.grad is not None
    assert weight.grad.item() == 2**16
    assert scaler.scale(torch.ones(2, dtype=dtype)).dtype == dtype
    assert scaler.scale(torch.tensor(1j)).item() == 2**16 * 1j


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", BAD)
def test_a_skipped_step_leaves_no_trace(value: float, fused: bool) -> None:
    """Parameters, moments and hooks: as if step had not been called."""
    weight = parameter(1.0, 2.0)
    optimizer = AdamW([weight], lr=0.1, fused=fused)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scaler = DynamicLossScaler(growth_interval=1)
    iterate(scaler, optimizer, [1.0, -1.0])
    before = copy.deepcopy(optimizer.state_dict()["state"]), bits(weight)

    iterate(scaler, optimizer, [1.0, value])

    after = optimizer.state_dict()["state"], bits(weight)
    assert str(before) == str(after)
    assert calls == [1]
    assert scaler.found_inf
    iterate(scaler, optimizer, [1.0, 1.0])
    assert calls == [1, 1]
    assert not scaler.found_inf


def test_step_passes_arguments_and_result_on() -> None:
    """What the optimizer takes and returns is none of the scaler's business."""

    class Echo(SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            return args, kwargs

    echo = Echo([parameter(1.0)], lr=1.0)
    for scaler in (DynamicLossScaler(), DynamicLossScaler(enabled=False)):
        scaler.scale(torch.zeros(()))
        echo.param_groups[0]["params"][0].grad = torch.ones(1)
        assert scaler.step(echo, 1, flag=None) == ((1,), {"flag": None})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str
)
def test_gradients_of_every_wide_dtype_are_unscaled_together(
    dtype: torch.dtype,
) -> None:
    """One optimizer may hold several dtypes; the bad one of any skips all."""
    for bad in (False, True):
        one, other = parameter(1.0), parameter(1.0, dtype=dtype)
        scaler = DynamicLossScaler(init_scale=8.0)
        iterate(scaler, SGD([one, other], lr=1.0), [8.0], [math.inf if bad else 4.0])
        assert (one.item(), other.item()) == ((1.0, 1.0) if bad else (0.0, 0.5))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    """Libraries set another while they make a model, programs in float64 for good."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float32))
    sgd = torch.optim.SGD([weight], lr=1.0)
    scaler = DynamicLossScaler(init_scale=4.0)
    torch.set_default_dtype(default)
    try:
        for factor in (0.25, math.inf):
            loss: Any = scaler.scale((factor * weight).sum())
            loss.backward()
            scaler.step(sgd)
            scaler.update()
            sgd.zero_grad()
    finally:
        torch.set_default_dtype(torch.float32)
    assert weight.tolist() == [0.75, 0.75]
    assert (scaler.found_inf, scaler.get_scale()) == (True, 2.0)


def test_gradients_accumulate_scaled_and_are_divided_once() -> None:
    """Two micro-batches with gradient 1 give 2."""
    weight = parameter(0.0)
    optimizer = SGD([weight], lr=1.0)
    scaler = DynamicLossScaler()
    for _ in range(2):
        torch.autograd.backward(scaler.scale(weight.sum()))
    scaler.unscale_(optimizer)
    assert weight.grad is not None
    assert weight.grad.item() == 2.0
    scaler.step(optimizer)
    assert weight.item() == -2.0


def test_clipping_after_unscale_acts_on_true_gradients() -> None:
    """Norm 5, clipped to 1: a step of length 1, whatever the scale."""
    for exponent in (0, 16, 32):
        weight = parameter(0.0, 0.0)
        optimizer = SGD([weight], lr=1.0)
        scaler = DynamicLossScaler(init_scale=2.0**exponent)
        torch.autograd.backward(scaler.scale(weight @ torch.tensor([3.0, 4.0])))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        assert norm.item() == 5.0
        # The factor 1 / (5 + 1e-6) is torch's; it and the products round in float32.
        assert abs(weight.detach().norm().item() - 1) <= 1e-6 / 5 + 4 * 2**-24


def test_growth_stops_at_the_largest_float32() -> None:
    """The scale stays finite, and is the trace of torch's, up to the last doubling."""
    ours = DynamicLossScaler(init_scale=2.0**125, growth_interval=1)
    theirs = torch_scaler(init_scale=2.0**125, growth_interval=1)
    good = [False] * 5
    assert scales(ours, good) == [2.0**126] + [2.0**127] * 4 == scales(theirs, good)


@pytest.mark.parametrize("exponent", range(8))
def test_the_floor_holds(exponent: int) -> None:
    """The scale falls to min_scale and no further, and rises from there."""
    scaler = DynamicLossScaler(
        2.0**5, growth_interval=1, min_scale=2.0 ** (exponent - 3)
    )
    fall = scales(scaler, [True] * 20)
    assert fall == [max(2.0 ** (4 - i), 2.0 ** (exponent - 3)) for i in range(20)]
    assert scales(scaler, [False]) == [2.0 ** (exponent - 2)]


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("gradient", [2.0**-10, 0.3, 1.0, 1.5, 700.0])
@pytest.mark.parametrize("exponent", [16, 24, 32])
def test_the_search_costs_a_step_for_each_halving(
    exponent: int, gradient: float, hysteresis: int
) -> None:
    """It takes k = floor(log2(s g / 65520)) + h skipped steps, in real float16."""
    skipped, scale = search(
        DynamicLossScaler(2.0**exponent, hysteresis=hysteresis), gradient, 40
    )
    steps = math.floor(math.log2(2.0**exponent * gradient / 65520)) + hysteresis
    too_high = 2.0**exponent * gradient >= 65520
    assert skipped == list(range(steps if too_high else 0))
    assert scale * gradient < 65520
    assert not too_high or 2 * scale * gradient >= 65520


@pytest.mark.parametrize("hysteresis", [1, 2, 5])
@pytest.mark.parametrize("interval", [1, 3, 10])
def test_each_growth_costs_the_hysteresis(interval: int, hysteresis: int) -> None:
    """Once the scale is found, h of n + h iterations are skipped."""
    scaler = DynamicLossScaler(2.0**15, growth_interval=interval, hysteresis=hysteresis)
    period = interval + hysteresis
    skipped, _ = search(scaler, 1.0, 20 * period)
    assert [i % period for i in skipped] == list(range(interval, period)) * 20


def search(
    scaler: DynamicLossScaler, gradient: float, iterations: int
) -> tuple[list[int], float]:
    """The skipped iterations with a constant gradient that passes through float16."""
    weight = parameter(0.0)
    optimizer = SGD([weight], lr=1.0)
    skipped = []
    for number in range(iterations):
        half = weight.half()
        torch.autograd.backward(scaler.scale((half.float() * gradient).sum()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.found_inf:
            skipped.append(number)
    return skipped, scaler.get_scale()


def test_hysteresis_is_refilled_by_growth_only() -> None:
    """Good iterations between the bad ones do not help, as in Megatron's code."""
    scaler = DynamicLossScaler(16.0, growth_interval=3, hysteresis=2)
    bad = [True, False, False, True, True, False, False, False, True, True]
    assert scales(scaler, bad) == [16, 16, 16, 8, 4, 4, 4, 8, 8, 4]


def test_update_before_step_shows_the_new_scale_to_the_step() -> None:
    """The scales after each iteration are the same; a hook sees the difference."""
    dice = random.Random(0)
    bad = [dice.random() < 0.3 for _ in range(200)]
    seen: dict[bool, list[float]] = {False: [], True: []}
    after = {}
    for before in (False, True):
        scaler = DynamicLossScaler(growth_interval=2, update_before_step=before)
        optimizer = SGD([parameter(0.0)], lr=1.0)
        optimizer.register_step_pre_hook(
            lambda *_, seen=seen[before], scaler=scaler: seen.append(scaler.get_scale())
        )
        after[before] = [
            iterate(scaler, optimizer, [math.inf if b else 1.0]) for b in bad
        ]
    assert after[False] == after[True]
    old = [2.0**16, *after[False]]
    assert seen[False] == [old[i] for i, b in enumerate(bad) if not b]
    assert seen[True] == [old[i + 1] for i, b in enumerate(bad) if not b]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_optimizers_are_judged_apart_or_together(
    order: tuple[int, int],
) -> None:
    """PyTorch's order skips the bad one, Megatron's all; the scale moves once."""
    for before, expected in ((False, [0.0, 1.0]), (True, [1.0, 1.0])):
        weights = [parameter(1.0), parameter(1.0)]
        optimizers = [SGD([weight], lr=1.0) for weight in weights]
        scaler = DynamicLossScaler(init_scale=4.0, update_before_step=before)
        scaler.scale(torch.zeros(()))
        weights[0].grad, weights[1].grad = torch.tensor([4.0]), torch.tensor([math.inf])
        for index in order:
            scaler.unscale_(optimizers[index])
        for index in order:
            scaler.step(optimizers[index])
        scaler.update()
        assert [weight.item() for weight in weights] == expected
        assert scaler.get_scale() == 2.0


def test_disabled_is_a_pass_through() -> None:
    """As torch's: nothing is scaled, checked, counted or stored."""
    ours = DynamicLossScaler(enabled=False)
    theirs = torch.amp.GradScaler("cpu", enabled=False)
    for scaler in (ours, theirs):
        weight = parameter(0.0)
        optimizer = SGD([weight], lr=1.0)
        loss = weight.sum()
        assert scaler.scale(loss) is loss
        torch.autograd.backward(loss)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scaler.load_state_dict({"scale": 3.0})
        assert weight.item() == -1.0
        assert (scaler.get_scale(), scaler.state_dict()) == (1.0, {})
        assert not scaler.is_enabled()
    assert DynamicLossScaler().is_enabled()


def test_a_new_scale_replaces_the_old_and_keeps_the_counts() -> None:
    """As torch's, from a number and from a tensor."""
    for new in (3.0, torch.tensor(3.0)):
        ours, theirs = (
            DynamicLossScaler(growth_interval=3),
            torch_scaler(growth_interval=3),
        )
        for scaler in (ours, theirs):
            scales(scaler, [False, False])
            scaler.update(new)
        assert ours.state_dict() == theirs.state_dict()
        assert ours.get_scale() == 3.0
        assert scales(ours, [False]) == [6.0]


def test_a_new_scale_does_not_hide_what_was_found() -> None:
    """``found_inf`` tells of the iteration that the new scale ends."""
    weight = parameter(1.0)
    optimizer = SGD([weight], lr=1.0)
    scaler = DynamicLossScaler()
    for value in (math.nan, 1.0):
        scaler.scale(torch.zeros(()))
        weight.grad = torch.tensor([value])
        scaler.step(optimizer)
        scaler.update(4.0)
        assert scaler.found_inf == math.isnan(value)


def test_the_scale_is_a_float32_value() -> None:
    """A number that float32 cannot hold is rounded at once, as in torch's tensor."""
    for value in (0.1, 65537.123456789, 1e-40):
        rounded = torch.tensor(value).item()
        scaler = DynamicLossScaler(value)
        assert scaler.get_scale() == rounded
        scaler.load_state_dict(scaler.state_dict() | {"scale": value})
        assert scaler.get_scale() == rounded
    scaler = DynamicLossScaler(min_scale=0.1)
    assert scales(scaler, [True] * 30)[-1] == torch.tensor(0.1).item()


def test_copies_go_their_own_way() -> None:
    """Pickle and deepcopy carry the whole state between iterations."""
    scaler = DynamicLossScaler.megatron(growth_interval=5)
    scales(scaler, [True, False, False])
    for copied in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert copied.state_dict() == scaler.state_dict()
        bad = [False, False, False, True]
        assert scales(copied, bad) == [2.0**32] * 2 + [2.0**33] * 2
    assert scaler.get_scale() == 2.0**32


# Oracle: torch.amp.GradScaler.


@pytest.mark.parametrize(
    ("init_scale", "growth_factor", "backoff_factor", "growth_interval", "chance"),
    [
        (2.0**16, 2.0, 0.5, 2000, 0.0005),
        (2.0**16, 2.0, 0.5, 100, 0.01),
        (2.0**16, 2.0, 0.5, 7, 0.1),
        (2.0**16, 2.0, 0.5, 2, 0.3),
        (2.0**16, 2.0, 0.5, 1, 0.5),
        (1.0, 2.0, 0.5, 1, 0.02),  # grows to the ceiling of float32
        (3.7, 1.5, 0.9, 3, 0.2),
        (0.1, 1.1, 0.7, 1, 0.3),
        (2.0**-10, 4.0, 0.25, 5, 0.2),
        (12345.678, 1.001, 0.999, 1, 0.5),
    ],
)
def test_the_trace_is_that_of_torch(
    init_scale: float,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    chance: float,
) -> None:
    """Over 10,000 iterations each, scales, skips, parameters and states agree bitwise.

    Gradients spread over 80 powers of two. A scale that falls below 2**-100 is replaced
    in both: below 2**-127 they part on purpose.
    """
    settings: dict[str, Any] = {
        "init_scale": init_scale,
        "growth_factor": growth_factor,
        "backoff_factor": backoff_factor,
        "growth_interval": growth_interval,
    }
    dice = random.Random(str(settings))
    bad = [dice.random() < chance for _ in range(10_000)]
    values = torch.tensor([
        dice.choice(BAD) if b else dice.gauss(0, 1) * 2.0 ** dice.randint(-40, 40)
        for b in bad
    ])

    def run(scaler: Scaler) -> list[tuple[float, ...]]:
        weight = parameter(0.0)
        optimizer = Descent([weight])
        loss = torch.zeros(())
        trace = []
        for value in values:
            weight.grad = value.clone().reshape(1)
            scaler.scale(loss)
            scaler.step(optimizer)
            scaler.update()
            trace.append((scaler.get_scale(), optimizer.steps, *bits(weight)))
            if scaler.get_scale() < 2.0**-100:
                scaler.update(65536.0)
        return trace

    ours, theirs = DynamicLossScaler(**settings), torch_scaler(**settings)
    trace = run(ours)

    assert trace == run(theirs)
    assert ours.state_dict() == theirs.state_dict()
    # And it is worth comparing.
    assert trace[-1][1] == bad.count(False) < len(bad)
    assert any(b > a for (a, *_), (b, *_) in itertools.pairwise(trace))


class Descent(Optimizer):
    """SGD without the costs of SGD, with a memory of its steps."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        (self.weight,), self.steps = parameters, 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the one parameter by its gradient."""
        assert self.weight.grad is not None
        self.weight.data.sub_(self.weight.grad)
        self.steps += 1


@pytest.mark.parametrize("seed", range(3))
def test_the_trace_of_two_optimizers_is_that_of_torch(seed: int) -> None:
    """Each skips on its own gradients, the scale moves by both; some clip, some not."""
    dice = random.Random(seed)
    script = [
        (
            [
                dice.choice(BAD) if dice.random() < 0.1 else dice.gauss(0, 9)
                for _ in "ab"
            ],
            dice.random() < 0.5,
            dice.random() < 0.8,
        )
        for _ in range(1000)
    ]
    results = []
    for scaler in (
        DynamicLossScaler(growth_interval=3),
        torch_scaler(growth_interval=3),
    ):
        weights = [parameter(0.0), parameter(0.0)]
        optimizers: list[Optimizer] = [
            SGD(weights[:1], lr=0.1),
            Adam(weights[1:], lr=0.1),
        ]
        trace = []
        for values, clips, both in script:
            scaler.scale(torch.zeros(()))
            for weight, value in zip(weights, values, strict=True):
                weight.grad = torch.tensor([value * 1e5])
            for optimizer, weight in list(zip(optimizers, weights, strict=True))[
                : 1 + both
            ]:
                if clips:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_([weight], 1.0)
                scaler.step(optimizer)
            scaler.update()
            trace.append((scaler.get_scale(), bits(*weights)))
        results.append(trace)
    assert results[0] == results[1]
    assert len({scale for scale, _ in results[0]}) > 3


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.5), SparseAdam])
def test_sparse_gradients_are_those_of_torch(
    make: Callable[[list[Tensor]], Optimizer],
) -> None:
    """Repeated indices, a bad value among them, and the sparse layout is kept."""
    results = []
    for scaler in (
        DynamicLossScaler(growth_interval=2),
        torch_scaler(growth_interval=2),
    ):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = make(list(table.parameters()))
        trace = []
        for factor in (1.0, 2.0, math.inf, 3.0, math.nan, 1.0, 1.0):
            loss = (table(torch.tensor([1, 3, 1, 1])) * factor).sum()
            torch.autograd.backward(scaler.scale(loss))
            assert table.weight.grad is not None
            assert table.weight.grad.is_sparse
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            trace.append((scaler.get_scale(), bits(table.weight.flatten())))
        results.append(trace)
    assert results[0] == results[1]


@pytest.mark.parametrize("seed", range(5))
def test_states_are_interchangeable_in_mid_run(seed: int) -> None:
    """Ten hand-overs, each from one class to the other, leave the trace as it was."""
    dice = random.Random(seed)
    bad = [dice.random() < 0.1 for _ in range(300)]
    settings: dict[str, Any] = {
        "growth_factor": 4.0,
        "backoff_factor": 0.25,
        "growth_interval": 6,
    }
    expected = scales(torch_scaler(**settings), bad)
    scaler: Any = DynamicLossScaler(**settings)
    trace = []
    for part in range(10):
        trace += scales(scaler, bad[30 * part : 30 * part + 30])
        following: Any = torch_scaler() if part % 2 == 0 else DynamicLossScaler()
        following.load_state_dict(scaler.state_dict())
        assert following.state_dict() == scaler.state_dict()
        scaler = following
    assert trace == expected


def test_torch_continues_from_a_megatron_state() -> None:
    """It takes its five entries and ignores the three others."""
    megatron = DynamicLossScaler.megatron(growth_interval=5)
    scales(megatron, [True, True, False, False])
    theirs = torch_scaler()
    theirs.load_state_dict(megatron.state_dict())
    assert theirs.state_dict() == dict(list(megatron.state_dict().items())[:5])
    assert len(megatron.state_dict()) == 8
    bad = [False, False, False, True]
    assert scales(theirs, bad) == [2.0**31, 2.0**31, 2.0**32, 2.0**31]


def test_a_megatron_state_resumes_with_its_hysteresis() -> None:
    """Through torch.save with weights only, into a scaler built differently."""
    megatron = DynamicLossScaler.megatron(init_scale=4.0, growth_interval=3)
    scales(megatron, [True, False])
    file = io.BytesIO()
    torch.save(megatron.state_dict(), file)
    file.seek(0)
    plain = DynamicLossScaler()
    plain.load_state_dict(torch.load(file, weights_only=True))
    bad = [True, True, True, False, False, False, True]
    assert scales(plain, bad) == scales(megatron, bad) == [2, 1, 1, 1, 1, 2, 2]


def test_a_torch_state_keeps_this_policy_with_a_full_hysteresis() -> None:
    """Five entries say nothing of hysteresis and floor: those given here hold."""
    megatron = DynamicLossScaler.megatron()
    scales(megatron, [True])
    megatron.load_state_dict(torch_scaler(init_scale=2.0).state_dict())
    assert scales(megatron, [True, True, True]) == [2.0, 1.0, 1.0]
    assert (megatron.growth_interval, megatron.hysteresis) == (2000, 2)


def test_loading_forgets_the_iteration_under_way() -> None:
    """As after an exception in the middle of a step."""
    weight = parameter(0.0)
    optimizer = SGD([weight], lr=1.0)
    scaler = DynamicLossScaler()
    state = scaler.state_dict()
    scaler.scale(torch.zeros(()))
    weight.grad = torch.tensor([math.inf])
    scaler.unscale_(optimizer)

    scaler.load_state_dict(state)

    assert iterate(scaler, optimizer, [1.0]) == 2.0**16
    assert scaler.state_dict() == state | {"_growth_tracker": 1}


# Oracle: the rules of Megatron-LM, written down once more.


def megatron_rules(
    bad: Iterable[bool], scale: float, window: int, hysteresis: int, floor: float
) -> Iterable[float]:
    """After its options' documentation and grad_scaler.py, counting upwards.

    Yields:
        The scale after each iteration.
    """
    run = count = 0
    for is_bad in bad:
        run, count = (0, count + 1) if is_bad else (run + 1, count)
        if is_bad and count >= hysteresis:
            scale = max(scale / 2, floor)
        if run == window:
            run, count, scale = 0, 0, scale * 2
        yield scale


@pytest.mark.parametrize("seed", range(20))
def test_megatron_follows_its_rules(seed: int) -> None:
    """Over 1,000 iterations with windows, hysteresis and floors drawn at random."""
    dice = random.Random(seed)
    floor = 2.0 ** dice.randint(-6, 0)
    init = 2.0 ** dice.randint(0, 20)
    window, hysteresis = dice.choice([1, 2, 5, 20]), dice.randint(1, 4)
    chance = max(dice.choice([0.02, 0.1, 0.3, 0.6]), 0.6 / window)
    bad = [dice.random() < chance for _ in range(1000)]
    expected = list(megatron_rules(bad, init, window, hysteresis, floor))
    # Up to the ceiling, which only this scaler has.
    expected = list(itertools.takewhile(lambda scale: scale < 2.0**127, expected))
    scaler = DynamicLossScaler.megatron(
        init_scale=init, growth_interval=window, hysteresis=hysteresis, min_scale=floor
    )

    assert len(expected) >= 100
    assert scales(scaler, bad[: len(expected)]) == expected


def test_megatron_has_the_defaults_of_its_config() -> None:
    """OptimizerConfig: 2**32, window 1000, hysteresis 2, floor 1; factors 2 and 1/2."""
    scaler = DynamicLossScaler.megatron()
    assert scaler.update_before_step
    assert scaler.state_dict() == {
        "scale": 2.0**32,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 1000,
        "_growth_tracker": 0,
        "hysteresis": 2,
        "min_scale": 1.0,
        "_hysteresis_tracker": 2,
    }
    assert not DynamicLossScaler.megatron(enabled=False).is_enabled()


def test_the_defaults_are_those_of_torch() -> None:
    """Both states are equal before anything happened."""
    assert DynamicLossScaler().state_dict() == torch_scaler().state_dict()


# Where it leaves torch's trace, on purpose.


def test_a_collapsed_scale_ruins_the_weight_in_torch_and_stops_here() -> None:
    """At 2**-128 the reciprocal is infinite: torch multiplies by it, unchecked."""
    results = {}
    for name, scaler in (
        ("torch", torch_scaler()),
        ("ours", DynamicLossScaler()),
        ("floor", DynamicLossScaler(min_scale=1.0)),
    ):
        weight = parameter(1.0)
        optimizer = SGD([weight], lr=2.0**-4)
        for _ in range(144):
            iterate(scaler, optimizer, [math.nan])
        results[name] = scaler.get_scale()
        torch.autograd.backward(scaler.scale(weight.sum()), inputs=[weight])
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(weight.sum()))
        if name == "ours":
            with pytest.raises(FloatingPointError, match=r"fell to 2\.93874e-39"):
                scaler.step(optimizer)
            assert weight.item() == 1.0
            assert weight.grad is not None
            assert weight.grad.item() == 2.0**-128  # not touched either
        else:
            scaler.step(optimizer)
            assert weight.item() == (-math.inf if name == "torch" else 1 - 2.0**-4)
    assert results == {"torch": 2.0**-128, "ours": 2.0**-128, "floor": 1.0}


def test_a_scale_of_zero_is_refused_too() -> None:
    """A backoff can pass the smallest float32 in one go."""
    scaler = DynamicLossScaler(init_scale=1e-30, backoff_factor=1e-30)
    assert scales(scaler, [True]) == [0.0]
    with pytest.raises(FloatingPointError, match="fell to 0"):
        scales(scaler, [False])


def test_a_fused_optimizer_runs_on_skipped_steps_in_torch_and_not_here() -> None:
    """Torch lets the optimizer skip, whose hooks then count steps not taken."""
    calls = []
    for scaler in (torch_scaler(), DynamicLossScaler()):
        optimizer = AdamW([parameter(1.0)], lr=0.1, fused=True)
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        iterate(scaler, optimizer, [math.inf])
        assert optimizer.param_groups[0]["params"][0].item() == 1.0
        assert len(calls) == 1  # torch's, and none after it


def test_update_between_two_steps_is_wrong_in_torch_and_stops_here() -> None:
    """The second optimizer would divide by a scale that its gradients never saw."""
    for scaler in (
        torch_scaler(growth_interval=1),
        DynamicLossScaler(growth_interval=1),
    ):
        weights = [parameter(1.0), parameter(1.0)]
        first, second = (SGD([weight], lr=1.0) for weight in weights)
        torch.autograd.backward(scaler.scale(weights[0].sum() + weights[1].sum()))
        scaler.step(first)
        scaler.update()
        if isinstance(scaler, DynamicLossScaler):
            with pytest.raises(RuntimeError, match="no loss was scaled"):
                scaler.step(second)
            assert weights[1].item() == 1.0
        else:
            scaler.step(second)
            assert weights[1].item() == 0.5  # by 0.5, not by 1


# Other owners of the loop.


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_fabric_trains_to_the_same_bits_as_with_torchs_scaler() -> None:
    """Lightning only calls methods: Inf at the start, growth, clipping, save, load."""
    x, y = digits()
    results = []
    for make in (DynamicLossScaler, torch_scaler):
        scaler: Any = make(init_scale=2.0**24, growth_interval=5)
        plugin = lightning.fabric.plugins.MixedPrecision(
            "16-mixed", device="cpu", scaler=scaler
        )
        fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
        net = network()
        model, optimizer = fabric.setup(net, AdamW(net.parameters(), lr=0.01))
        trace = []
        for i in range(30):
            fabric.backward(F.cross_entropy(model(x[i * 32 :][:32]), y[i * 32 :][:32]))
            fabric.clip_gradients(
                model, optimizer, max_norm=0.5, error_if_nonfinite=False
            )
            optimizer.step()
            optimizer.zero_grad()
            trace.append(scaler.get_scale())
        results.append((trace, bits(*(p.flatten() for p in net.parameters()))))
    assert results[0] == results[1]
    assert results[0][0][0] < 2.0**24


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:DeprecationWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_trainer_trains_to_the_same_bits_as_with_torchs_scaler(
    fused: bool, tmp_path: Path
) -> None:
    """And keeps the state in its checkpoint, Megatron's included."""
    x, y = digits()

    class Digits(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.parameters(), lr=0.01, fused=fused)

    def fit(scaler: Scaler) -> tuple[L.Trainer, list[int]]:
        module = Digits()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=None if fused else 0.5,
            plugins=[
                lightning.pytorch.plugins.MixedPrecision(
                    "16-mixed", device="cpu", scaler=cast(Any, scaler)
                )
            ],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(x[:960], y[:960]), 32))
        return trainer, bits(*(p.flatten() for p in module.parameters()))

    _, ours = fit(DynamicLossScaler(init_scale=2.0**24, growth_interval=5))
    _, theirs = fit(torch_scaler(init_scale=2.0**24, growth_interval=5))
    assert ours == theirs
    megatron = DynamicLossScaler.megatron()
    trainer, _ = fit(megatron)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["MixedPrecision"]
    assert saved == megatron.state_dict()
    assert saved["scale"] < 2.0**32


def test_mixed_precision_step_takes_it() -> None:
    """The sibling snippet's step runs with Megatron's policy and resumes it."""
    x, y = digits()
    scaler: Any = DynamicLossScaler.megatron(init_scale=2.0**24)
    net = network()
    step = MixedPrecisionStep(
        AdamW(net.parameters(), lr=0.01),
        dtype=torch.float16,
        max_norm=1.0,
        scaler=scaler,
    )
    for i in range(20):
        with step.autocast():
            loss = F.cross_entropy(net(x[i * 32 :][:32]), y[i * 32 :][:32])
        result = step(loss)
        assert result.skipped == scaler.found_inf
    assert step.optimizer_steps > 0
    assert step.skipped_steps > 1
    assert step.state_dict()["scaler"] == scaler.state_dict()


# Several ranks, over gloo, in processes of their own.

RANK = """
import json, math, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD
from snippets.loss_scaling import DynamicLossScaler

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
out = {}

def run(factor, **kwargs):
    weight = nn.Parameter(torch.ones(1))
    other = nn.Parameter(torch.ones(1))
    scaler = DynamicLossScaler(4.0, **kwargs)
    used = other if factor is None else weight
    torch.autograd.backward(scaler.scale((used * (factor or 1.0)).sum()))
    try:
        scaler.step(SGD([weight], lr=1.0))
        scaler.update()
    except RuntimeError as error:
        return str(error).split(":")[0]
    return [weight.item(), scaler.get_scale(), scaler.found_inf]

own = [dist.new_group([0]), dist.new_group([1])][rank]
out["good"] = run(1.0)
out["bad on 1"] = run(math.nan if rank else 1.0)
out["bad on 0"] = run(1.0 if rank else -math.inf)
out["megatron"] = run(math.nan if rank else 1.0, hysteresis=2, update_before_step=True)
out["own group"] = run(math.nan if rank else 1.0, process_group=own)
out["none on 0"] = run(math.inf if rank else None)
out["none at all"] = run(None)

from torch.distributed.fsdp import fully_shard

def sharded(scaler):
    torch.manual_seed(0)
    net = nn.Linear(4, 2, bias=False)
    start = net.weight.detach().clone()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(net, mesh=mesh)
    plain = nn.Parameter(torch.zeros(1))
    optimizer = SGD([plain, *net.parameters()], lr=1.0, foreach=False)
    moved = []
    # The gradient of row 1, which only rank 1 holds, overflows in the second iteration.
    for factors in ([1.0, 1.0], [1.0, math.inf]):
        outputs = net(torch.ones(1, 4)) * torch.tensor(factors)
        scaler.scale(outputs.sum() + plain.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        rows = (start - net.weight.full_tensor()).round()
        moved.append([-plain.item(), *rows.flatten().tolist()])
    return moved, scaler.get_scale()

out["sharded"] = sharded(DynamicLossScaler(4.0))
dist.barrier()
print(json.dumps(out), flush=True)
os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes print."""
    outputs = run_ranks(RANK, tmp_path_factory.mktemp("ranks"))
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@needs_gloo
def test_ranks_decide_together(ranks: list[dict[str, Any]]) -> None:
    """A NaN or an infinity on any rank skips on both and halves both scales."""
    for out in ranks:
        assert out["good"] == [0.0, 4.0, False]
        assert out["bad on 1"] == out["bad on 0"] == [1.0, 2.0, True]
        assert out["megatron"] == [1.0, 4.0, True]


@needs_gloo
def test_a_group_decides_for_its_own_ranks(ranks: list[dict[str, Any]]) -> None:
    """With a group for each rank, they part."""
    assert [out["own group"] for out in ranks] == [[0.0, 4.0, False], [1.0, 2.0, True]]


@needs_gloo
def test_a_rank_without_gradients_takes_part(ranks: list[dict[str, Any]]) -> None:
    """It follows the others; without any gradient anywhere, all ranks raise."""
    assert [out["none on 0"] for out in ranks] == [[1.0, 2.0, True]] * 2
    message = "no parameter of the optimizer has a gradient"
    assert [out["none at all"] for out in ranks] == [message] * 2


@needs_gloo
def test_fully_sharded_parameters_skip_together(ranks: list[dict[str, Any]]) -> None:
    """An infinity in the shard of one rank keeps all in place, plain ones beside."""
    step = [1.0] * 9
    assert [out["sharded"] for out in ranks] == [[[step, step], 2.0]] * 2


# Training.


def test_small_gradients_train_in_float16_with_it_and_not_without() -> None:
    """Each loss is a micro-batch's share in a mean over 2**24 samples.

    Unscaled, the gradient of each logit is at most 2**-24, the smallest float16 value,
    and most round to zero. Guessing hits a tenth of the held-out digits.
    """
    x, y = digits()

    def accuracy(scaler: DynamicLossScaler) -> float:
        net = network()
        optimizer = AdamW(net.parameters(), lr=0.01, eps=1e-16)
        for _ in range(5):
            for i in range(0, 1437, 64):
                with torch.autocast("cpu", dtype=torch.float16):
                    losses = F.cross_entropy(
                        net(x[i : i + 64]), y[i : i + 64], reduction="sum"
                    )
                torch.autograd.backward(scaler.scale(losses / 2**24))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        with torch.no_grad():
            hits = net(x[1437:]).argmax(1) == y[1437:]
        return float(hits.double().mean())

    assert accuracy(DynamicLossScaler(enabled=False)) < 0.5
    assert accuracy(DynamicLossScaler()) > 0.9
    assert accuracy(DynamicLossScaler.megatron(init_scale=2.0**48)) > 0.9


@pytest.mark.parametrize("exponent", [0, 10, 16])
def test_the_scale_does_not_cure_divergence(exponent: int) -> None:
    """A learning rate of 3 on w**2 / 2 doubles the weight at every scale."""
    weight = parameter(1.0)
    optimizer = SGD([weight], lr=3.0)
    scaler = DynamicLossScaler(init_scale=2.0**exponent)
    path = []
    for _ in range(5):
        torch.autograd.backward(scaler.scale((weight.square() / 2).sum()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        path.append(weight.item())
    assert path == [-2.0, 4.0, -8.0, 16.0, -32.0]


# Errors.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_scale": "cuda"}, "init_scale must be a positive number.*got 'cuda'"),
        ({"init_scale": 0.0}, "init_scale must be a positive number"),
        ({"init_scale": -1.0}, "init_scale must be a positive number"),
        ({"init_scale": math.nan}, "init_scale must be a positive number.*got nan"),
        ({"init_scale": math.inf}, "finite in float32, got inf"),
        ({"init_scale": 1e39}, "finite in float32, got 1e"),
        ({"init_scale": 1e-60}, "init_scale must be a positive number"),
        ({"init_scale": 10**400}, "finite in float32, got 10000"),
        ({"init_scale": True}, "init_scale must be a positive number.*got True"),
        ({"init_scale": torch.tensor(1.0)}, "init_scale must be a positive number"),
        ({"growth_factor": 1.0}, "growth_factor must be a finite number above 1"),
        ({"growth_factor": math.inf}, "growth_factor must be a finite number above 1"),
        ({"growth_factor": math.nan}, "growth_factor must be a finite number above 1"),
        ({"growth_factor": None}, "growth_factor must be a finite number above 1"),
        ({"backoff_factor": 0.0}, "backoff_factor must be a number between 0 and 1"),
        ({"backoff_factor": 1.0}, "backoff_factor must be a number between 0 and 1"),
        ({"backoff_factor": math.nan}, "backoff_factor must be a number between"),
        ({"growth_interval": 0}, "growth_interval must be a whole number from 1"),
        ({"growth_interval": 2.5}, "growth_interval must be a whole number from 1"),
        ({"growth_interval": 2.0}, "growth_interval must be a whole number from 1"),
        ({"growth_interval": True}, "growth_interval must be a whole number from 1"),
        ({"hysteresis": 0}, "hysteresis must be a whole number from 1, got 0"),
        ({"hysteresis": 1.5}, "hysteresis must be a whole number from 1"),
        ({"min_scale": 0.0}, "min_scale must be None or a positive number"),
        ({"min_scale": math.nan}, "min_scale must be None or a positive number"),
        ({"min_scale": "1"}, "min_scale must be None or a positive number"),
        ({"min_scale": 2.0**17}, "init_scale must be at least min_scale=131072.0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """In the constructor, and in a state dict before anything is changed."""
    with pytest.raises(ValueError, match=message):
        DynamicLossScaler(**settings)
    scaler = DynamicLossScaler.megatron()
    before = scaler.state_dict()
    names = {"init_scale": "scale"}
    state = {"scale": 2.0**16} | {names.get(k, k): v for k, v in settings.items()}
    with pytest.raises(ValueError, match=message.replace("init_scale", "scale")):
        scaler.load_state_dict(before | state)
    assert scaler.state_dict() == before


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, "the state dict is empty"),
        ([1.0], TypeError, "a state dict is a mapping, got list"),
        (None, TypeError, "a state dict is a mapping, got NoneType"),
        ({"scale": 1.0}, ValueError, r"lacks \['growth_factor', 'backoff_factor'"),
        ({"growth_tracker": 0}, ValueError, "did you mean '_growth_tracker'"),
        ({1: 0}, ValueError, "unknown key 1 in the state dict$"),
        (
            {"hysteresis": 2},
            ValueError,
            r"lacks \['min_scale', '_hysteresis_tracker'\]",
        ),
        ({"_growth_tracker": -1}, ValueError, "_growth_tracker must be .* to 1999"),
        ({"_growth_tracker": 2000}, ValueError, "_growth_tracker must be .* to 1999"),
        ({"_growth_tracker": 0.0}, ValueError, "_growth_tracker must be a whole"),
        (
            {"scale": torch.full((1,), 2.0)},
            ValueError,
            "scale must be a positive number",
        ),
        (
            {"hysteresis": 2, "min_scale": None, "_hysteresis_tracker": 3},
            ValueError,
            "_hysteresis_tracker must be a whole number from 0 to 2, got 3",
        ),
    ],
    ids=str,
)
def test_states_that_do_not_fit_are_refused(
    state: object, error: type[Exception], message: str
) -> None:
    """Each names what is wrong, and the scaler goes on as it was."""
    scaler = DynamicLossScaler()
    scales(scaler, [True, False])
    before = scaler.state_dict()
    if isinstance(state, dict) and state and state.get("scale") != 1.0:
        state = before | state
    with pytest.raises(error, match=message):
        scaler.load_state_dict(cast(Any, state))
    assert scaler.state_dict() == before


def test_a_state_below_the_floor_is_refused() -> None:
    """It would rise without a reason."""
    scaler = DynamicLossScaler.megatron()
    with pytest.raises(
        ValueError, match=r"scale must be at least min_scale=1\.0, got 0"
    ):
        scaler.load_state_dict(torch_scaler(init_scale=0.5).state_dict())
    assert scaler.get_scale() == 2.0**32


@pytest.mark.parametrize(
    "new",
    [0.0, -1.0, math.nan, math.inf, 1e39, "2", torch.ones(2), torch.tensor(0.0), 0.5],
)
def test_a_bad_new_scale_is_refused(new: object) -> None:
    """Before the iteration is ended: the right one can still be given."""
    scaler = DynamicLossScaler(min_scale=1.0)
    with pytest.raises(ValueError, match="new_scale must be"):
        scaler.update(cast(Any, new))
    assert scaler.get_scale() == 2.0**16


@pytest.mark.parametrize(
    ("dtype", "error"),
    [
        (
            torch.float16,
            "is torch.float16, allowed are torch.float32, torch.float64, t",
        ),
        (torch.complex64, "is torch.complex64, allowed are"),
        (torch.int64, "is torch.int64, allowed are"),
        (torch.float8_e5m2, "is torch.float8_e5m2, allowed are"),
    ],
    ids=str,
)
def test_gradients_of_a_narrow_dtype_are_refused(
    dtype: torch.dtype, error: str
) -> None:
    """Before any is changed. For float16 torch raises a ValueError as well."""
    good = parameter(1.0)
    bad = nn.Parameter(torch.ones(1, 2).to(dtype), requires_grad=False)
    good.grad, bad.grad = torch.ones(1), torch.ones(1, 2).to(dtype)
    optimizer = SGD([good, bad], lr=1.0)
    scaler = DynamicLossScaler()
    scaler.scale(torch.zeros(()))
    with pytest.raises(ValueError, match=r"a gradient of shape \(1, 2\) " + error):
        scaler.unscale_(optimizer)
    assert good.grad.item() == 1.0
    if dtype == torch.float16:
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            torch_scaler().unscale_(optimizer)
    bad.grad = None
    scaler.step(optimizer)  # the optimizer is not counted as unscaled
    assert good.item() == 1 - 2.0**-16


def test_mixed_devices_are_refused() -> None:
    """Before any gradient is changed; two optimizers may lie on two devices."""
    weights = [parameter(1.0), nn.Parameter(torch.ones(1, device="meta"))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    scaler = DynamicLossScaler()
    scaler.scale(torch.zeros(()))
    with pytest.raises(ValueError, match=r"gradients lie on \['cpu', 'meta'\]"):
        scaler.unscale_(SGD(weights))
    assert weights[0].grad is not None
    assert weights[0].grad.item() == 1.0


def test_a_parameter_of_two_optimizers_is_refused() -> None:
    """It would be divided twice. After a new backward pass it may be used again."""
    weight = parameter(1.0)
    first, second = SGD([weight], lr=1.0), SGD([weight], lr=1.0)
    scaler = DynamicLossScaler()
    torch.autograd.backward(scaler.scale(weight.sum()))
    scaler.step(first)
    with pytest.raises(ValueError, match="already unscaled for another optimizer"):
        scaler.step(second)
    assert weight.item() == 0.0
    first.zero_grad()
    torch.autograd.backward(scaler.scale(weight.sum()))
    scaler.step(second)
    assert weight.item() == -1.0


def test_calls_out_of_order_are_refused() -> None:
    """Each with its own words, and without touching the gradient."""
    weight = parameter(1.0)
    optimizer = SGD([weight], lr=1.0)
    scaler = DynamicLossScaler()
    with pytest.raises(
        RuntimeError, match="no gradient was checked since the last upd"
    ):
        scaler.update()
    with pytest.raises(RuntimeError, match="no loss was scaled since the last update"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="no loss was scaled since the last update"):
        scaler.step(optimizer)
    scaler.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match="no parameter of the optimizer has a grad"):
        scaler.step(optimizer)
    for last in ([], [weight]):  # an optimizer may have groups without parameters
        groups: list[dict[str, Any]] = [{"params": []}, {"params": last}]
        with pytest.raises(RuntimeError, match="no parameter of the optimizer has a g"):
            scaler.step(SGD(groups, lr=1.0))
    weight.grad = torch.ones(1)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already unscaled since the last update"):
        scaler.unscale_(optimizer)
    for closure in ({"closure": lambda: 0.0}, {}):
        args = () if closure else (lambda: 0.0,)
        with pytest.raises(RuntimeError, match="takes no closure"):
            scaler.step(optimizer, *args, **closure)
    assert weight.item() == 1.0
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="was already called for this optimizer"):
        scaler.step(optimizer)
    assert weight.item() == 1 - 2.0**-16
    with pytest.raises(RuntimeError, match="already unscaled since the last update"):
        scaler.unscale_(optimizer)
    scaler.update()
    with pytest.raises(
        RuntimeError, match="no gradient was checked since the last upd"
    ):
        scaler.update()
    with pytest.raises(RuntimeError, match="no loss was scaled since the last update"):
        scaler.step(optimizer)


def test_unscaling_after_the_scale_has_moved_is_refused() -> None:
    """With update_before_step every optimizer comes before the first step."""
    weights = [parameter(1.0), parameter(1.0)]
    first, second = (SGD([weight], lr=1.0) for weight in weights)
    scaler = DynamicLossScaler.megatron()
    torch.autograd.backward(scaler.scale(weights[0].sum() + weights[1].sum()))
    scaler.step(first)
    with pytest.raises(
        RuntimeError, match=r"unscale_\(\) for every optimizer before the"
    ):
        scaler.step(second)
    assert weights[1].item() == 1.0


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (torch.tensor(3), r"floating-point tensors, got torch.int64 of shape \(\)"),
        ([torch.ones(2, dtype=torch.bool)], r"got torch.bool of shape \(2,\)"),
        (3.0, "or a list or tuple of tensors, got float"),
        ({"loss": torch.tensor(1.0)}, "or a list or tuple of tensors, got dict"),
        ([torch.tensor(1.0), [None]], "or a list or tuple of tensors, got NoneType"),
    ],
    ids=str,
)
def test_what_is_not_a_loss_is_refused(outputs: object, message: str) -> None:
    """Before anything is scaled."""
    scaler = DynamicLossScaler()
    with pytest.raises(TypeError, match=message):
        scaler.scale(cast(Any, outputs))
    with pytest.raises(RuntimeError, match="no loss was scaled"):
        scaler.step(SGD([parameter(1.0)]))


def test_what_is_not_an_optimizer_is_refused() -> None:
    """The model, for example."""
    scaler = DynamicLossScaler()
    model: Any = nn.Linear(1, 1)
    for call in (scaler.unscale_, scaler.step):
        with pytest.raises(TypeError, match="expected an optimizer, got Linear"):
            call(model)
