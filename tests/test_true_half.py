"""Tests of snippets/true_half.py, as read in guide/true_half."""

import copy
import io
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.plugins import HalfPrecision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from snippets import true_half
from snippets.true_half import TrueHalfAdamW, convert_for_inference, lost_updates

HALF = [torch.bfloat16, torch.float16]
REMEDIES = ["main_params", "stochastic_rounding", "kahan"]
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}

each_dtype = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
each_remedy = pytest.mark.parametrize("remedy", REMEDIES)


def all_numbers(dtype: torch.dtype) -> Tensor:
    """The 65,536 values of a 16-bit dtype, NaNs included."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def all_normal(dtype: torch.dtype) -> Tensor:
    """The positive normal numbers of a 16-bit dtype, in order."""
    numbers = all_numbers(dtype)
    return numbers[numbers.isfinite() & (numbers >= torch.finfo(dtype).tiny)]


def spacing(w: Tensor) -> Tensor:
    """2**(e - m) with 2**e <= |w| < 2**(e + 1): the page's formula, in float64."""
    e = w.double().abs().log2().floor()
    return torch.exp2(e - MANTISSA_BITS[w.dtype])


def stay(w: Tensor, update: Tensor) -> Tensor:
    """Where torch's own in-place arithmetic leaves ``w`` as it is."""
    return w.clone().add_(update.float()) == w  # float32 inside, rounded once


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradients between 1e-4 and 1 in magnitude, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(shape, generator=generator) for _ in range(steps)]
    return [(d * 10 ** (-(i % 5) / 1.0)).to(dtype) for i, d in enumerate(draws)]


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of one parameter."""
    return dict(optimizer.state[p])


# Exact laws: the prediction.


@each_dtype
def test_half_the_spacing_is_where_updates_start_to_count(dtype: torch.dtype) -> None:
    """|u| < s/2 is lost and |u| > s/2 kept, at every normal number, away from zero."""
    w = all_normal(dtype)[:-1]  # one step above the largest is Inf
    half = spacing(w) / 2

    assert stay(w, half * (1 - 2**-10)).all()
    assert not stay(w, half * (1 + 2**-10)).any()
    even = w.view(torch.int16) % 2 == 0
    assert torch.equal(stay(w, half), even)


@each_dtype
def test_toward_zero_a_power_of_two_needs_only_a_quarter(dtype: torch.dtype) -> None:
    """Below 2**e the numbers are twice as dense; elsewhere nothing changes."""
    w = all_normal(dtype)[1:]  # below the smallest normal number the spacing stays
    power = w.double().log2() % 1 == 0
    bound = spacing(w) / torch.where(power, 4, 2)

    assert stay(w, -bound * (1 - 2**-10)).all()
    assert not stay(w, -bound * (1 + 2**-10)).any()


@each_dtype
def test_the_rule_of_thumb_brackets_the_threshold(dtype: torch.dtype) -> None:
    """s/2 is more than |w| * 2**-(m + 2) and at most |w| * 2**-(m + 1)."""
    w, m = all_normal(dtype), MANTISSA_BITS[dtype]
    half = spacing(w) / 2

    assert (w.double() * 2.0 ** -(m + 2) < half).all()
    assert (half <= w.double() * 2.0 ** -(m + 1)).all()


@each_dtype
@pytest.mark.parametrize("lr", [0.0, 1e-7, 1e-4, 3e-3, 0.1, 100.0])
def test_the_prediction_is_the_rule(dtype: torch.dtype, lr: float) -> None:
    """For every finite number, predicted equals what the formula in float64 says."""
    w = all_numbers(dtype)
    w = w[w.isfinite()]
    tiny, exact = torch.finfo(dtype).tiny, w.double().abs()
    outward = spacing(exact.clamp(min=tiny).to(dtype)) / 2
    power = (exact.log2() % 1 == 0) & (exact > tiny)
    inward = torch.where(power, outward / 2, outward)
    lost = (lr < outward).int() + (lr < inward).int()

    for name, part in {"negative": w.signbit(), "positive": ~w.signbit()}.items():
        share = lost[part].sum().item() / (2 * int(part.sum()))
        assert lost_updates([(name, w[part])], lr) == {name: share}


def test_the_prediction_matches_the_first_step_of_adamw() -> None:
    """The first update of AdamW is 1: what it moves is what was predicted to move."""
    network = make_network().to(torch.bfloat16)
    predicted = lost_updates(network, lr=1e-4)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0).step()

    for name, p in network.named_parameters():
        stayed = (p == before[name]).float().mean().item()
        # One direction of the two; they differ at powers of two only.
        assert stayed == pytest.approx(predicted[name], abs=0.02)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3fn", "e5m2"]
)
def test_eight_bits_are_predicted_too(dtype: torch.dtype) -> None:
    """Above 1 the spacing is eps, below it half of that; ties go to the even 1."""
    eps = torch.finfo(dtype).eps
    weights = [("w", torch.ones(2).to(dtype))]
    assert lost_updates(weights, eps / 4) == {"w": 1.0}
    assert lost_updates(weights, eps / 2) == {"w": 0.5}
    assert lost_updates(weights, 0.75 * eps, dtype=dtype) == {"w": 0.0}
    assert lost_updates([("w", torch.ones(2))], 0.75 * eps, dtype=dtype) == {"w": 0.0}


def test_prediction_edges() -> None:
    """Empty tensors lose nothing, Inf and NaN all; ``update`` scales ``lr``."""
    inf = torch.tensor([float("inf"), float("nan"), 1.0])
    assert lost_updates([("e", torch.zeros(0))], 1e-3) == {"e": 0.0}
    assert lost_updates([("x", inf)], 1e-3)["x"] == pytest.approx(2 / 3)
    one = [("w", torch.ones(1))]
    assert lost_updates(one, 1e-2, update=0.1, dtype=torch.bfloat16) == {"w": 1.0}
    assert lost_updates(one, 1e-1, update=0.1, dtype=torch.bfloat16) == {"w": 0.0}
    assert lost_updates(one, 2**-26) == {"w": 1.0}
    assert lost_updates(one, 2**-23) == {"w": 0.0}


@each_dtype
def test_a_factor_this_close_to_one_changes_no_number(dtype: torch.dtype) -> None:
    """1 - q leaves every normal number when q <= 2**-(m + 2), and some beyond not."""
    w, m = all_normal(dtype), MANTISSA_BITS[dtype]
    q = 2.0 ** -(m + 2)

    assert torch.equal(w * (1 - q), w)
    assert not torch.equal(w * (1 - 1.01 * q), w)


def test_second_moment_cannot_fall_in_bfloat16() -> None:
    """AdamW of torch keeps exp_avg_sq at its value through 1,000 zero gradients."""
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    plain.step()
    first = plain.state[p]["exp_avg_sq"].clone()
    p.grad = torch.zeros_like(p)
    for _ in range(1000):
        plain.step()

    assert torch.equal(plain.state[p]["exp_avg_sq"], first)


def test_the_gradient_below_which_float16_adamw_divides_by_zero() -> None:
    """exp_avg_sq is 0 after one step exactly when |g| <= sqrt(2**-25 / 0.001)."""
    g = all_normal(torch.float16)
    g = g[g < 100]
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g
    plain = torch.optim.AdamW([p], foreach=False)
    plain.step()

    bound = (2**-25 / (1 - 0.999)) ** 0.5
    assert bound == pytest.approx(0.0055, abs=5e-5)
    assert torch.equal(plain.state[p]["exp_avg_sq"] == 0, g.double() <= bound)
    assert torch.equal(p.isinf(), g.double() <= bound)


# Exact laws: the optimizer.


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64], ids=str
)
@each_remedy
def test_wide_parameters_are_torch_adamw_bit_for_bit(
    dtype: torch.dtype, remedy: str
) -> None:
    """Whatever the remedy, a parameter that needs none gets torch's own AdamW."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(50, dtype=dtype))
    theirs = nn.Parameter(ours.detach().clone())
    a = TrueHalfAdamW([ours], lr=1e-2, weight_decay=0.1, remedy=remedy)
    b = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    for _ in range(20):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()

    assert torch.equal(ours, theirs)
    assert state_of(a, ours).keys() == state_of(b, theirs).keys()
    for name, value in state_of(b, theirs).items():
        assert torch.equal(state_of(a, ours)[name], value)
        assert state_of(a, ours)[name].dtype == value.dtype


@each_dtype
def test_main_params_are_float32_adamw_rounded_once(dtype: torch.dtype) -> None:
    """The copies equal torch's AdamW on float32, the parameters are their rounding."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(1000).to(dtype))
    reference = nn.Parameter(ours.detach().float())
    a = TrueHalfAdamW([ours], lr=1e-4, weight_decay=0.1)
    b = torch.optim.AdamW([reference], lr=1e-4, weight_decay=0.1, foreach=False)
    for grad in gradients((1000,), 50, dtype):
        ours.grad, reference.grad = grad, grad.float()
        a.step()
        b.step()
        assert torch.equal(a.state[ours]["main_param"], reference)
        assert torch.equal(ours, reference.to(dtype))

    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(a.state[ours][name], b.state[reference][name])


@each_dtype
def test_kahan_is_off_by_at_most_the_last_bit_of_the_compensation(
    dtype: torch.dtype,
) -> None:
    """Each step, w + c is the exact w + c + u within 2**-10 of the spacing."""
    torch.manual_seed(0)
    p = nn.Parameter((torch.rand(5000) + 0.5).to(dtype))
    optimizer = TrueHalfAdamW([p], lr=1e-4, remedy="kahan")
    for grad in gradients((5000,), 30, dtype):
        c = optimizer.state[p].get("compensation", torch.zeros(5000))
        exact = nn.Parameter(p.detach().float() + c.float())
        reference = torch.optim.AdamW([exact], lr=1e-4, foreach=False)
        if optimizer.state[p]:
            reference.state[exact] = {
                k: optimizer.state[p][k].clone()
                for k in ("step", "exp_avg", "exp_avg_sq")
            }
        p.grad, exact.grad = grad, grad.float()
        optimizer.step()
        reference.step()

        c = optimizer.state[p]["compensation"]
        assert c.dtype == torch.bfloat16
        assert torch.equal(p, exact.to(dtype))
        assert (c.double().abs() <= spacing(p) / 2).all()
        error = (p.double() + c.double() - exact.double()).abs()
        assert (error <= 2**-10 * spacing(p)).all()


@each_dtype
@pytest.mark.parametrize("remedy", ["kahan", "main_params"])
def test_a_thousand_small_updates_add_up(dtype: torch.dtype, remedy: str) -> None:
    """1,000 steps of 1e-4 from 1 end at 0.9 within the rounding errors."""
    p = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = TrueHalfAdamW([p], lr=1e-4, weight_decay=0.0, remedy=remedy)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()

    s = torch.finfo(dtype).eps / 2  # the spacing below 1
    assert abs(p.item() - 0.9) <= s / 2 + 1000 * 2**-10 * s


@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.bfloat16, 17), (torch.float16, 20)], ids=["bf16", "fp16"]
)
def test_kahan_has_a_threshold_512_times_lower(dtype: torch.dtype, last: int) -> None:
    """A steady update moves a weight of 1 at 2**(-m - 10) and not at half of it."""
    assert last == MANTISSA_BITS[dtype] + 10

    def moves(lr: float) -> bool:
        p = nn.Parameter(torch.ones(1, dtype=dtype))
        optimizer = TrueHalfAdamW([p], lr=lr, weight_decay=0.0, remedy="kahan")
        for _ in range(1200):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        return p.item() > 1

    assert moves(1.1 * 2.0**-last)
    assert not moves(1.1 * 2.0 ** (-last - 1))


@each_dtype
def test_stochastic_rounding_keeps_every_half_number(dtype: torch.dtype) -> None:
    """All 65,536 values, subnormals, infinities and NaNs included, come back."""
    numbers = all_numbers(dtype)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rounded = true_half._round_stochastic(numbers.float(), dtype, generator)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.isnan(), numbers.isnan())
        keep = ~numbers.isnan()
        assert torch.equal(rounded[keep], numbers[keep])


def test_stochastic_rounding_keeps_a_number_at_a_draw_of_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One draw in 2**24 is exactly 0: it rounds up what lies above, and only that."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    x = torch.tensor([1.0, 1.0 + 2**-23])

    rounded = true_half._round_stochastic(x, torch.bfloat16, None)

    assert rounded.tolist() == [1.0, 1.0078125]


@each_dtype
def test_stochastic_rounding_goes_to_a_neighbor(dtype: torch.dtype) -> None:
    """Between two numbers a and b, subnormal or not, the result is a or b."""
    numbers = all_numbers(dtype)
    a = numbers[~numbers.signbit() & numbers.isfinite()][:-1]
    b = (a.view(torch.int16) + 1).view(dtype)
    for share in (0.01, 0.5, 0.99):
        x = torch.lerp(a.float(), b.float(), share)
        for sign in (1, -1):
            rounded = sign * true_half._round_stochastic(sign * x, dtype, None)
            assert ((rounded == a) | (rounded == b)).all()


@each_dtype
@each_remedy
def test_state_is_float32_and_the_bytes_are_as_told(
    dtype: torch.dtype, remedy: str
) -> None:
    """Moments are float32; weight, gradient and state take 16, 12 and 14 bytes."""
    p = nn.Parameter(torch.ones(10, dtype=dtype))
    p.grad = torch.ones_like(p)
    optimizer = TrueHalfAdamW([p], remedy=remedy)
    optimizer.step()
    state = state_of(optimizer, p)

    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert p.dtype == dtype
    step = state.pop("step")
    assert step.shape == ()
    stored = 4 + sum(t.element_size() for t in state.values())
    assert stored == {"main_params": 16, "stochastic_rounding": 12, "kahan": 14}[remedy]


@each_remedy
def test_a_weight_changed_from_outside_stays_changed(remedy: str) -> None:
    """A checkpoint or a mask between two steps is not undone by a hidden copy."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = TrueHalfAdamW([p], lr=1e-6, weight_decay=0.0, remedy=remedy)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p.copy_(torch.tensor([1.0, 5.0, -3.0, 1.0]))
    optimizer.step()

    expected = torch.tensor([1.0, 5.0, -3.0, 1.0])
    assert ((p.float() - expected).abs() <= 2**-7 * expected.abs()).all()


@each_dtype
@each_remedy
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_does_what_it_does_in_torch(
    dtype: torch.dtype, remedy: str, bad: float
) -> None:
    """The weight becomes NaN, its neighbor does not, as in torch.optim.AdamW."""
    ours = nn.Parameter(torch.ones(2, dtype=dtype))
    theirs = nn.Parameter(torch.ones(2))
    ours.grad = torch.tensor([bad, 1.0], dtype=dtype)
    theirs.grad = ours.grad.float()
    TrueHalfAdamW([ours], remedy=remedy).step()
    torch.optim.AdamW([theirs]).step()

    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isnan().tolist() == [True, False]


@each_remedy
def test_float16_with_default_eps_stays_finite(remedy: str) -> None:
    """The zero and small gradients that break torch's AdamW in FP16 break nothing."""
    grad = torch.tensor([0.0, 1e-7, 1e-3, 1.0], dtype=torch.float16)
    plain, ours = (nn.Parameter(torch.ones(4, dtype=torch.float16)) for _ in range(2))
    plain.grad, ours.grad = grad, grad.clone()
    torch.optim.AdamW([plain]).step()
    TrueHalfAdamW([ours], remedy=remedy).step()

    assert plain.isfinite().tolist() == [False, False, False, True]
    assert ours.isfinite().tolist() == [True] * 4


@each_remedy
def test_a_constant_loss_scale_changes_no_step(remedy: str) -> None:
    """Gradients and eps times 2**16: every weight is the same, bit for bit."""
    ends = []
    for scale in (1.0, 2.0**16):
        p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
        generator = torch.Generator().manual_seed(0)
        optimizer = TrueHalfAdamW(
            [p], eps=1e-8 * scale, remedy=remedy, generator=generator
        )
        for grad in gradients((100,), 20, torch.bfloat16):
            p.grad = grad * scale
            optimizer.step()
        ends.append(p.detach().clone())

    assert torch.equal(*ends)
    assert not torch.equal(ends[0], torch.ones_like(ends[0]))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype for a while, as Lightning does in a step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@each_remedy
def test_the_default_dtype_does_not_matter(remedy: str) -> None:
    """Inside Lightning's half-precision context the step is the same, bit for bit."""
    ends = []
    for default in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
        generator = torch.Generator().manual_seed(0)
        optimizer = TrueHalfAdamW([p], remedy=remedy, generator=generator)
        for grad in gradients((100,), 5, torch.bfloat16):
            p.grad = grad
            with default_dtype(default):
                optimizer.step()
        ends.append(p.detach().clone())
        assert optimizer.state[p]["step"].dtype == torch.float32
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32

    assert torch.equal(*ends)


# The interface of an optimizer.


def test_groups_schedulers_and_closures() -> None:
    """Groups keep their own settings, a scheduler sets lr, a closure is called once."""
    a = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    b = nn.Parameter(torch.ones(1))
    groups = [{"params": [a], "remedy": "kahan"}, {"params": [b], "lr": 0.0}]
    optimizer = TrueHalfAdamW(groups, lr=0.5, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = a.float().sum() + b.sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure) == 2.0
    scheduler.step()
    assert calls == 1
    assert (a.item(), b.item()) == (0.5, 1.0)
    assert "compensation" in optimizer.state[a]
    assert "compensation" not in optimizer.state[b]
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.0]

    c = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer.add_param_group({"params": c, "remedy": "stochastic_rounding"})
    assert optimizer.param_groups[2]["weight_decay"] == 0.0
    assert optimizer.step() is None
    assert c.item() == 1.0  # no gradient yet
    named = TrueHalfAdamW(nn.Linear(1, 1).named_parameters())
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


def test_replicas_stay_equal_with_generators_of_one_seed() -> None:
    """And drift apart with the default ones, which differ from rank to rank."""

    def replica(rank: int, generator: torch.Generator | None) -> torch.Tensor:
        torch.manual_seed(rank)
        p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = TrueHalfAdamW(
            [p], remedy="stochastic_rounding", generator=generator
        )
        for grad in gradients((1000,), 3, torch.bfloat16):
            p.grad = grad
            optimizer.step()
        return p

    seeded = [replica(rank, torch.Generator().manual_seed(7)) for rank in range(2)]
    assert torch.equal(*seeded)
    assert not torch.equal(replica(0, None), replica(1, None))


def test_a_tensor_learning_rate_works() -> None:
    """The lr may be a tensor, as in torch."""
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    TrueHalfAdamW([p], lr=torch.tensor(0.5), weight_decay=0.0).step()

    assert p.item() == 0.5


@each_dtype
@each_remedy
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_a_resumed_run_is_the_same_bit_for_bit(
    dtype: torch.dtype, remedy: str, how: str
) -> None:
    """10 steps, a checkpoint through a file and 10 steps equal 20 steps."""
    grads = gradients((200,), 20, dtype)

    def fresh() -> tuple[nn.Parameter, nn.Parameter, TrueHalfAdamW]:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(200).to(dtype))
        norm = nn.Parameter(torch.ones(200))
        generator = torch.Generator().manual_seed(3)
        optimizer = TrueHalfAdamW(
            [p, norm], lr=1e-3, remedy=remedy, generator=generator
        )
        return p, norm, optimizer

    def advance(
        p: nn.Parameter, norm: nn.Parameter, optimizer: TrueHalfAdamW, part: slice
    ) -> None:
        for grad in grads[part]:
            p.grad, norm.grad = grad, grad.float()
            optimizer.step()

    p, norm, optimizer = fresh()
    advance(p, norm, optimizer, slice(0, 10))
    if how == "state_dict":
        q, norm2, resumed = fresh()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            q.copy_(p)
            norm2.copy_(norm)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    else:
        resumed = copy.deepcopy(optimizer)
        q, norm2 = resumed.param_groups[0]["params"]
    advance(p, norm, optimizer, slice(10, 20))
    advance(q, norm2, resumed, slice(10, 20))

    assert torch.equal(p, q)
    assert torch.equal(norm, norm2)
    for name, value in state_of(optimizer, p).items():
        assert torch.equal(value, state_of(resumed, q)[name])
        assert value.dtype == state_of(resumed, q)[name].dtype


def test_a_loaded_state_is_a_copy() -> None:
    """Stepping the resumed optimizer leaves the state dict as it was."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = TrueHalfAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    optimizer.step()

    for name in ("exp_avg", "exp_avg_sq", "main_param"):
        assert torch.equal(saved["state"][0][name], kept["state"][0][name])


def test_torch_casts_the_state_that_we_keep() -> None:
    """Oracle of the reason to override: torch rounds a float32 state on loading."""
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    kept = {}
    for cls in (torch.optim.AdamW, TrueHalfAdamW):
        optimizer = cls([p])
        optimizer.step()
        state = optimizer.state_dict()
        state["state"][0]["exp_avg"] = torch.tensor([0.12345])
        optimizer.load_state_dict(state)
        kept[cls] = optimizer.state[p]["exp_avg"].item()

    assert kept[torch.optim.AdamW] != pytest.approx(0.12345, rel=1e-5)
    assert kept[TrueHalfAdamW] == pytest.approx(0.12345, rel=1e-7)


@each_remedy
def test_a_plain_adamw_checkpoint_can_be_continued(remedy: str) -> None:
    """Its 16-bit moments are widened, the remedy is ours, and it keeps stepping."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    plain.step()
    saved = plain.state_dict()
    optimizer = TrueHalfAdamW([p], remedy=remedy)
    optimizer.load_state_dict(saved)

    assert "remedy" not in saved["param_groups"][0]
    assert optimizer.param_groups[0]["remedy"] == remedy
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert torch.equal(optimizer.state[p]["exp_avg"], plain.state[p]["exp_avg"].float())
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 2


@each_remedy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("number", [int, float])
def test_a_step_count_that_is_a_plain_number_is_continued(
    number: type, dtype: torch.dtype, remedy: str
) -> None:
    """PyTorch before 1.12 saved it so; its AdamW takes it as well."""
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    plain = torch.optim.AdamW([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    plain.step()
    saved = plain.state_dict()
    saved["state"][0]["step"] = number(saved["state"][0]["step"])
    optimizer = TrueHalfAdamW([p], remedy=remedy)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 2
    assert optimizer.state[p]["step"].dtype == torch.float32


def test_pre_hooks_are_honored() -> None:
    """What another pre-hook makes of a state is what is loaded."""
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = TrueHalfAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()

    def hook(_: torch.optim.Optimizer, state: dict[str, object]) -> dict[str, object]:
        changed = copy.deepcopy(state)
        changed["state"][0]["exp_avg"].fill_(0.7)  # type: ignore[index]
        return changed

    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(optimizer.state_dict())

    assert optimizer.state[p]["exp_avg"].item() == pytest.approx(0.7)


# Statistics.


@each_dtype
@pytest.mark.parametrize(
    "scale", [1.0, 2.0**-15, 2.0**-20], ids=["1", "2^-15", "2^-20"]
)
def test_stochastic_rounding_is_right_on_average(
    dtype: torch.dtype, scale: float
) -> None:
    """The mean of many roundings is the input within 5 standard errors."""
    n, share = 200_000, 0.3
    # For float16 the two small scales lie among the subnormals, spaced 2**-24.
    low = torch.tensor(1.5 * scale).to(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    gap = (high.double() - low.double()).item()
    x = (low.double() + share * gap).float()
    exact = (x.double() - low.double()).item() / gap
    generator = torch.Generator().manual_seed(0)

    rounded = true_half._round_stochastic(x.expand(n).clone(), dtype, generator)

    error = rounded.double().mean().item() - x.double().item()
    assert abs(error) < 5 * gap * (exact * (1 - exact) / n) ** 0.5


# Training.


images, labels = load_digits(return_X_y=True)
ORDER = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
X = torch.tensor(images / 16, dtype=torch.float32)[ORDER]
Y = torch.tensor(labels)[ORDER]
X_TRAIN, Y_TRAIN, X_TEST, Y_TEST = X[:1400], Y[:1400], X[1400:], Y[1400:]
BATCHES = [(X_TRAIN[i : i + 100], Y_TRAIN[i : i + 100]) for i in range(0, 1400, 100)]


def make_network() -> nn.Sequential:
    """The page's network, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)
    )


def accuracy(network: nn.Module) -> float:
    """Share of unseen digits that are told right."""
    dtype = next(network.parameters()).dtype
    with torch.no_grad():
        scores = network(X_TEST.to(dtype)).float()
    return float((scores.argmax(1) == Y_TEST).float().mean())


def train(dtype: torch.dtype, remedy: str | None) -> float:
    """Accuracy after 30 passes at lr=1e-4."""
    network = make_network().to(dtype)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(network.parameters(), lr=1e-4)
        if remedy is None
        else TrueHalfAdamW(network.parameters(), lr=1e-4, remedy=remedy)
    )
    for _ in range(30):
        for x, y in BATCHES:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(x.to(dtype)).float(), y))
            optimizer.step()
    return accuracy(network)


@pytest.fixture(scope="module")
def full() -> float:
    """Accuracy of float32 training."""
    return train(torch.float32, None)


def test_plain_half_precision_fails_on_digits(full: float) -> None:
    """At a learning rate at which float32 learns, bfloat16 stalls and FP16 is NaN."""
    assert full > 0.8
    assert train(torch.bfloat16, None) < full - 0.3
    assert train(torch.float16, None) < 0.2


@each_dtype
@each_remedy
def test_each_remedy_learns_the_digits(
    full: float, dtype: torch.dtype, remedy: str
) -> None:
    """Each remedy ends within two points of float32."""
    assert abs(train(dtype, remedy) - full) < 0.02


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_fabric_and_trainer_learn_the_digits(full: float) -> None:
    """The precision string casts the weights; the optimizer needs nothing else."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    network = make_network()
    model, optimizer = fabric.setup(
        network, TrueHalfAdamW(network.parameters(), lr=1e-4)
    )
    for _ in range(30):
        for x, y in BATCHES:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
    assert network[0].weight.dtype == torch.bfloat16
    assert abs(accuracy(network) - full) < 0.02

    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = make_network()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]).float(), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return TrueHalfAdamW(self.parameters(), lr=1e-4, remedy="kahan")

    digits = Digits()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-true",
        max_epochs=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(digits, DataLoader(TensorDataset(X_TRAIN, Y_TRAIN), batch_size=100))
    assert digits.network[0].weight.dtype == torch.bfloat16
    assert abs(accuracy(digits.network) - full) < 0.02


# Inference.


class Mixed(nn.Module):
    """Every kind of tensor that a module may hold."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.phase = nn.Parameter(torch.tensor([1 + 2j]))
        self.register_buffer("index", torch.tensor([70001]))
        self.register_buffer("flag", torch.tensor([True]))
        self.register_buffer("wide", torch.ones(2, dtype=torch.float64))
        self.register_buffer("codes", torch.ones(2).to(torch.float8_e4m3fn))
        self.register_buffer("hidden", torch.ones(2), persistent=False)


@each_dtype
def test_conversion_is_lightnings_where_lightning_loses_nothing(
    dtype: torch.dtype,
) -> None:
    """Oracle: bit for bit what Lightning's plugin makes of an ordinary network."""
    ours, theirs = make_network(), make_network()
    report = convert_for_inference(ours, dtype)
    plugin = HalfPrecision("bf16-true" if dtype == torch.bfloat16 else "16-true")
    plugin.convert_module(theirs)

    assert report == dict.fromkeys(ours.state_dict(), 0)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


@each_dtype
def test_conversion_keeps_what_a_cast_would_destroy(dtype: torch.dtype) -> None:
    """Integers, bools, complex and 8-bit floats stay; ties and identities too."""
    module = Mixed()
    shared, index = module.head.weight, module.index
    module.head(torch.ones(1, 4)).sum().backward()
    report = convert_for_inference(module, dtype)

    dtypes = {n: t.dtype for n, t in module.named_buffers()}
    assert module.head.weight is module.embedding.weight is shared
    assert module.index is index
    assert shared.dtype == dtype
    assert shared.grad is None
    assert module.phase.tolist() == [1 + 2j]
    assert dtypes["index"] == torch.int64
    assert dtypes["flag"] == torch.bool
    assert dtypes["codes"] == torch.float8_e4m3fn
    assert dtypes["norm.num_batches_tracked"] == torch.int64
    assert {dtypes[n] for n in ("wide", "hidden", "norm.running_var")} == {dtype}
    assert set(report) == {
        "embedding.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "wide",
        "hidden",
    }
    assert module.training


def test_conversion_counts_what_becomes_zero() -> None:
    """Nonzero values that round to zero are counted, zeros and subnormals are not."""
    net = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 1e-8, -(2.0**-25), 2.0**-24]]))

    assert convert_for_inference(net, torch.float16) == {"weight": 2}
    assert net.weight.tolist() == [[0.0, 0.0, -0.0, 2.0**-24]]


def test_overflow_is_refused_before_anything_changes() -> None:
    """65520 rounds to Inf in float16 and 65519 does not; an old Inf may stay."""
    last = nn.Linear(3, 1)
    net = nn.Sequential(nn.Linear(2, 1), last)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[65519.0, 65520.0, float("inf")]]))
    before = copy.deepcopy(net.state_dict())

    message = "1 of 3 values of 1.weight overflow torch.float16, the largest is 65520"
    with pytest.raises(ValueError, match=message):
        convert_for_inference(net, torch.float16)
    for key, value in net.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])
    convert_for_inference(net, torch.float16, keep="1")
    assert net[0].weight.dtype == torch.float16
    assert net[1].weight.dtype == torch.float32


def test_kept_modules_cast_at_their_border() -> None:
    """A network with a kept part runs, and the part computes in its own dtype."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    expected = net(x)
    seen = []
    net.norm1.register_forward_hook(lambda m, i, o: seen.append((i[0].dtype, o.dtype)))
    net.train()  # eval takes a fused path that never calls the submodules
    net.dropout.p = net.dropout1.p = net.dropout2.p = 0.0
    net.self_attn.dropout = 0.0
    keep = ["norm1", "self_attn"]
    convert_for_inference(net, torch.bfloat16, keep=keep)
    output = net(x.bfloat16())

    assert net.self_attn.out_proj.weight.dtype == torch.float32
    assert net.linear1.weight.dtype == output.dtype == torch.bfloat16
    assert seen == [(torch.float32, torch.float32)]  # our hook runs after this one
    assert (output.float() - expected).abs().max() < 2**-4


def test_a_kept_module_inside_a_kept_module_has_no_border() -> None:
    """Naming both is naming the outer one: inside it nothing is cast down."""
    inner = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net = nn.Sequential(inner, nn.Linear(1, 1))
    convert_for_inference(net, torch.bfloat16, keep=["0.0", "0"])

    assert net(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert inner[0](torch.ones(1)).dtype == torch.float32


def test_kept_modules_cast_nested_values_and_keywords() -> None:
    """Tensors in tuples, lists, dicts and keyword arguments are cast, ints are not."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, a: Tensor, *, b: dict[str, list[Tensor]]) -> object:
            assert a.dtype == b["x"][0].dtype == torch.float32
            return (a * self.scale, b, "text")

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, a: Tensor, b: dict[str, list[Tensor]]) -> object:
            return self.part(a, b=b)

    whole = Whole()
    convert_for_inference(whole, torch.float16, keep="part")
    ids = torch.tensor([3])
    half = torch.ones(1, dtype=torch.float16)
    out, nested, text = whole(half, {"x": [half, ids]})

    assert out.dtype == nested["x"][0].dtype == torch.float16
    assert nested["x"][1] is ids
    assert text == "text"


class Pair(NamedTuple):
    """What a recurrent layer may take and give."""

    hidden: Tensor
    length: int


class Output(OrderedDict[str, Tensor]):
    """What models of Hugging Face return, in short."""


def test_kept_modules_cast_in_containers_of_a_class_of_their_own() -> None:
    """Named tuples and subclasses of dict are rebuilt as what they are."""

    class Part(nn.Linear):
        def forward(self, pair: Pair) -> Output:  # type: ignore[override]
            assert pair.hidden.dtype == torch.float32
            return Output(hidden=super().forward(pair.hidden))

    part = Part(2, 2)
    net = nn.Sequential(part)
    convert_for_inference(net, torch.bfloat16, keep="0")
    given = Pair(torch.ones(1, 2, dtype=torch.bfloat16), 1)
    out = net(given)

    assert type(out) is Output
    assert out["hidden"].dtype == torch.bfloat16
    assert given.hidden.dtype == torch.bfloat16


def test_sparse_buffers_are_converted_by_their_values() -> None:
    """And refused by their values."""
    net = nn.Linear(1, 1, bias=False)
    net.register_buffer(
        "adjacency", torch.tensor([[1e-9, 0.0], [0.0, 2.0]]).to_sparse()
    )
    lost = convert_for_inference(net, torch.float16)
    assert lost == {"weight": 0, "adjacency": 1}
    adjacency = net.get_buffer("adjacency")
    assert adjacency.dtype == torch.float16
    assert adjacency.to_dense().tolist() == [[0.0, 0.0], [0.0, 2.0]]

    net.register_buffer("adjacency", torch.tensor([1e6]).to_sparse())
    with pytest.raises(ValueError, match="1 of 1 values of adjacency overflow"):
        convert_for_inference(net, torch.float16)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remedy": "kahn"}, "got 'kahn'; did you mean 'kahan'"),
        ({"remedy": "fp8"}, r"must be one of \('main_params', .*\), got 'fp8'$"),
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite and >= 0, got nan"),
        ({"lr": float("inf")}, "lr must be finite and >= 0, got inf"),
        ({"lr": "1e-3"}, "lr must be finite and >= 0, got '1e-3'"),
        ({"lr": torch.ones(2)}, r"lr must be finite and >= 0, got tensor\(\[1., 1.\]"),
        ({"eps": -1e-8}, "eps must be finite and >= 0, got -1e-08"),
        ({"eps": None}, "eps must be finite and >= 0, got None"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"betas": ("0.9", 0.9)}, r"betas must be two numbers in \[0, 1\), got"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], message: str) -> None:
    """At construction and when a group is added, which then is not."""
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=message):
        TrueHalfAdamW([p], **options)  # type: ignore[arg-type]
    optimizer = TrueHalfAdamW([p])
    group = {"params": [nn.Parameter(torch.ones(1))], **options}
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_other_dtypes_are_refused() -> None:
    """An 8-bit parameter has no remedy here."""
    codes = nn.Parameter(torch.ones(1).to(torch.float8_e5m2))
    with pytest.raises(TypeError, match=r"got torch\.float8_e5m2"):
        TrueHalfAdamW([codes])


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    """Also when the sparse gradient is not the first."""
    dense = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    dense.grad = torch.ones_like(dense)
    embedding = nn.Embedding(4, 2, sparse=True, dtype=torch.bfloat16)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = TrueHalfAdamW([dense, embedding.weight], lr=1.0)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert dense.item() == 1.0
    assert not optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remedy": "kahan"}, "saved with remedy='kahan', not 'main_params'"),
        ({"amsgrad": True}, "amsgrad or maximize"),
        ({"maximize": True}, "amsgrad or maximize"),
        ({"eps": float("nan")}, "eps must be finite and >= 0, got nan"),
        ({"betas": (0.9, 2.0)}, r"betas must be two numbers in \[0, 1\), got"),
        ({"decoupled_weight_decay": False}, "saved by Adam with weight_decay=0.01 in"),
        (None, "saved with a generator: construct with generator="),
    ],
)
def test_a_foreign_state_is_refused_before_anything_changes(
    change: dict[str, object] | None, message: str
) -> None:
    """The optimizer continues as if nothing had been tried."""
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = TrueHalfAdamW([p], lr=0.25)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    if change is None:
        saved["generator_state"] = torch.Generator().get_state()
    else:
        saved["param_groups"][0].update(change, lr=9.0)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.state[p]["step"].item() == 1
    assert not optimizer._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg": torch.ones(4)}, r"exp_avg of .* has shape \(4,\), but .* \(3,\)"),
        ({"exp_avg_sq": torch.ones(1)}, r"exp_avg_sq of .* has shape \(1,\)"),
        ({"main_param": torch.ones(3, 1)}, r"main_param of parameter 0 has shape"),
        ({"exp_avg": [1.0, 1.0, 1.0]}, "exp_avg of parameter 0 has shape None"),
        ({"step": torch.tensor(-1.0)}, "step of parameter 0 must be >= 0, got -1"),
        ({"step": "one"}, "step of parameter 0 must be >= 0, got one"),
        ({"sum": torch.ones(3)}, "needs state .* got .*'sum'"),
    ],
)
def test_a_state_of_other_parameters_is_refused_before_anything_changes(
    change: dict[str, object], message: str
) -> None:
    """It would fail, or broadcast, only at the next step."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = TrueHalfAdamW([p], lr=0.25)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[p])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(before[key], optimizer.state[p][key]) for key in before)


def test_a_state_without_its_moments_is_refused() -> None:
    """Such as that of SGD with momentum."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    sgd.step()
    optimizer = TrueHalfAdamW([p])
    with pytest.raises(ValueError, match=r"needs state .* got \['momentum_buffer'\]"):
        optimizer.load_state_dict(sgd.state_dict())
    assert not optimizer.state


def test_predictions_that_make_no_sense_are_refused() -> None:
    """Negative or NaN sizes and dtypes that cannot hold a weight."""
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="lr must be finite and >= 0, got -1"):
        lost_updates(net, -1)
    with pytest.raises(ValueError, match="lr must be finite and >= 0, got '1e-3'"):
        lost_updates(net, "1e-3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="update must be finite and >= 0, got nan"):
        lost_updates(net, 1, update=float("nan"))
    with pytest.raises(TypeError, match="weight must be real floating point"):
        lost_updates(net, 1, dtype=torch.int8)
    with pytest.raises(TypeError, match="phase must be real floating point"):
        lost_updates([("phase", torch.tensor([1j]))], 1)


@pytest.mark.parametrize(
    ("dtype", "keep", "message"),
    [
        (torch.float64, [], r"dtype must be one of .* got torch.float64"),
        (torch.float16, ["nrm"], "keep must name submodules, got 'nrm'; did you mean"),
        (torch.float16, [""], "keep must name submodules, got ''"),
        (torch.float16, ["head"], "keep shares embedding.weight with a module outside"),
    ],
)
def test_bad_conversions_are_refused_before_anything_changes(
    dtype: torch.dtype, keep: list[str], message: str
) -> None:
    """Every tensor keeps its dtype and no hook is left behind."""
    module = Mixed()
    with pytest.raises(ValueError, match=message):
        convert_for_inference(module, dtype, keep=keep)
    assert module.embedding.weight.dtype == module.norm.weight.dtype == torch.float32
    assert not module.head._forward_hooks
