"""Tests of snippets/stochastic_rounding.py, as read in guide/stochastic_rounding."""

import copy
import io
import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.stochastic_rounding import ALLOWED_DRAWS, measure
from snippets.stochastic_rounding import PureBF16AdamW, stochastic_round

INF, NAN = float("inf"), float("nan")
DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
WITH_INF = (torch.bfloat16, torch.float16, torch.float8_e5m2)
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
RANDOM_BITS = {torch.float32: 30, torch.float64: 62}
ROUNDINGS = ["stochastic", "kahan"]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_wide = pytest.mark.parametrize("wide", RANDOM_BITS, ids=["fp32", "fp64"])
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


def all_codes(dtype: torch.dtype) -> Tensor:
    """Every value of ``dtype``, NaNs included: 256 or 65,536."""
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    return torch.arange(2**16).to(torch.uint16).view(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, -0 and NaN included."""
    codes = torch.uint8 if a.dtype.itemsize == 1 else torch.uint16
    return a.dtype == b.dtype and torch.equal(a.view(codes), b.view(codes))


def grid(dtype: torch.dtype) -> Tensor:
    """The finite numbers >= 0 in order and the one that would follow, as float64."""
    numbers = all_codes(dtype).double()
    numbers = numbers[numbers.isfinite() & (numbers > 0)].sort().values
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, numbers, 2 * numbers[-1:] - numbers[-2:-1]])


def neighbors(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The grid's largest number <= |x| and smallest > |x|, found by bisection."""
    numbers = grid(dtype)
    above = torch.searchsorted(numbers, x.double().abs(), right=True)
    return numbers[above - 1], numbers[above]


def samples(
    dtype: torch.dtype, n: int, wide: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Numbers from far below the subnormals of ``dtype`` to beyond its largest."""
    generator = Generator().manual_seed(seed)
    numbers = grid(dtype)
    low, high = math.log2(numbers[1]) - 12, math.log2(numbers[-1])
    low = max(low, -149)  # the smallest float32
    exponent = torch.rand(n, generator=generator, dtype=torch.float64) * (high - low)
    x = torch.exp2(exponent + low)
    sign = torch.randint(2, (n,), generator=generator) * 2 - 1
    x = (x * sign).to(wide)
    return x[x.double().abs() < numbers[-1]]


def with_noise(
    monkeypatch: pytest.MonkeyPatch, noise: Tensor | int
) -> pytest.MonkeyPatch:
    """Let every random integer be the given one."""

    def randint(high: int, shape: torch.Size, **kwargs: object) -> Tensor:
        assert high in {2**bits for bits in RANDOM_BITS.values()}
        dtype = kwargs["dtype"]
        assert isinstance(dtype, torch.dtype)
        return torch.as_tensor(noise).to(dtype).expand(shape).clone()

    monkeypatch.setattr(torch, "randint", randint)
    return monkeypatch


# Exact laws: the rounding.


@each_dtype
@each_wide
def test_every_number_of_the_dtype_is_left_alone(
    dtype: torch.dtype, wide: torch.dtype
) -> None:
    """All codes come back bit for bit: subnormals, -0 and Inf too; NaN as a NaN."""
    codes = all_codes(dtype)
    nan = codes.double().isnan()
    for seed in range(5):
        generator = Generator().manual_seed(seed)
        for x in (codes.to(wide), codes):
            rounded = stochastic_round(x, dtype, generator)
            assert same_bits(rounded[~nan], codes[~nan])
            assert rounded.double()[nan].isnan().all()


@each_dtype
@each_wide
def test_no_draw_moves_a_number_of_the_dtype(
    dtype: torch.dtype, wide: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the smallest nor the largest random integer does."""
    codes = all_codes(dtype)
    codes = codes[codes.double().isfinite()]
    for noise in (0, 2 ** RANDOM_BITS[wide] - 1):
        with_noise(monkeypatch, noise)
        assert same_bits(stochastic_round(codes.to(wide), dtype), codes)


@each_dtype
@each_wide
def test_the_result_is_one_of_the_two_neighbors(
    dtype: torch.dtype, wide: torch.dtype
) -> None:
    """For magnitudes from far below the subnormals to the largest finite number."""
    x = samples(dtype, 50_000, wide)
    x = x[x.double().abs() <= grid(dtype)[-2]]
    lo, hi = neighbors(x, dtype)

    rounded = stochastic_round(x, dtype, Generator().manual_seed(0)).double()

    magnitude = rounded.abs()
    assert ((magnitude == lo) | (magnitude == hi)).all()
    assert (magnitude == lo).any()
    assert (magnitude == hi).any()
    nonzero = magnitude > 0
    assert torch.equal(rounded.signbit()[nonzero], x.signbit()[nonzero])


@each_dtype
@each_wide
def test_the_probability_is_exact_to_the_last_random_bit(
    dtype: torch.dtype, wide: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up in floor(2**k * (|x| - lo) / (hi - lo)) of 2**k draws: counted, not sampled.

    The result grows with the draw, so bisection finds the first draw that goes up.
    """
    k = RANDOM_BITS[wide]
    x = samples(dtype, 2000, wide, seed=1)
    lo, hi = neighbors(x, dtype)
    first = torch.full(x.shape, 2**k)  # the smallest draw that goes up, from above
    stays = torch.full(x.shape, -1)
    for _ in range(k + 1):
        middle = (first + stays) // 2
        with_noise(monkeypatch, middle.clamp(min=0))
        up = stochastic_round(x, dtype).double().abs() != lo  # Inf and NaN are up
        up &= middle >= 0
        first = torch.where(up, middle, first)
        stays = torch.where(up, stays, middle)

    share = (x.double().abs() - lo) / (hi - lo)  # exact: Sterbenz, and a power of two
    assert torch.equal(2**k - first, (share * 2.0**k).floor().long())

    # Nothing is cut off, and no bias left, down to 2**-9 times the smallest normal.
    tiny = torch.finfo(dtype).tiny
    exact = (share * 2.0**k) % 1 == 0
    assert exact[x.double().abs() >= 2**-9 * tiny].all()
    if dtype == torch.bfloat16 and wide == torch.float32:
        assert exact.all()
    bias = share - (2**k - first).double() / 2.0**k
    assert (bias >= 0).all()
    assert (bias < 2.0**-k).all()


@each_dtype
def test_a_draw_in_the_middle_is_torchs_own_cast(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the noise fixed at one half, all but ties round as ``x.to(dtype)``."""
    x = samples(dtype, 100_000, seed=2)
    x = x[x.double().abs() <= grid(dtype)[-2]]  # overflow differs, and with versions
    lo, hi = neighbors(x, dtype)
    x = x[(x.double().abs() - lo) / (hi - lo) != 0.5]

    with_noise(monkeypatch, 2**29)
    assert len(x) > 50_000
    assert same_bits(stochastic_round(x, dtype), x.to(dtype))


@each_dtype
@each_wide
def test_overflow_goes_to_infinity_or_nan_and_saturates_on_request(
    dtype: torch.dtype, wide: torch.dtype
) -> None:
    """Up from the largest number is Inf, or NaN without one; all beyond is that too."""
    largest, following = grid(dtype)[-2:].tolist()
    edge = (largest + following) / 2  # half of the draws go up
    x = torch.tensor([edge, -edge], dtype=wide).expand(500, 2)
    beyond = [following, 1e300, INF] if wide == torch.float64 else [following, INF]
    far = torch.tensor([*beyond, *(-b for b in beyond)], dtype=wide)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    over = INF if dtype in WITH_INF else NAN

    rounded = stochastic_round(x, dtype, Generator().manual_seed(0)).double() * sign
    up = rounded != largest
    assert 0.3 < up.double().mean() < 0.7
    expected = torch.full((int(up.sum()),), over, dtype=torch.float64)
    torch.testing.assert_close(rounded[up], expected, rtol=0, atol=0, equal_nan=True)
    rounded = stochastic_round(far, dtype).double() * far.sign().double()
    expected = torch.full(far.shape, over, dtype=torch.float64)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)

    for t in (x, far):
        rounded = stochastic_round(t, dtype, saturate=True).double()
        assert torch.equal(rounded, t.sign().double() * largest)
    assert stochastic_round(torch.tensor(NAN), dtype, saturate=True).double().isnan()


@each_dtype
def test_signed_zeros_and_nans(dtype: torch.dtype) -> None:
    """-0 stays -0, also by underflow, except in fnuz; NaNs of any payload are NaN."""
    numbers = grid(dtype)
    small = -float(numbers[1]) * 2.0**-40 if dtype != torch.bfloat16 else -0.0
    x = torch.tensor([0.0, -0.0, small], dtype=torch.float32)
    rounded = stochastic_round(x, dtype)
    assert rounded.double().tolist() == [0.0] * 3
    negative = dtype not in FNUZ
    assert rounded.double().signbit().tolist() == [False, negative, negative]

    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF])
    nans = payloads.to(torch.int32).view(torch.float32)
    assert nans.isnan().all()
    assert stochastic_round(nans, dtype).double().isnan().all()
    assert stochastic_round(nans.double(), dtype).double().isnan().all()


@pytest.mark.parametrize("given", DTYPES, ids=str)
@each_dtype
def test_a_narrow_input_is_rounded_as_the_float32_it_is(
    dtype: torch.dtype, given: torch.dtype
) -> None:
    """From every code of one dtype to another, the same draw gives the same result."""
    codes = all_codes(given)
    a = stochastic_round(codes, dtype, Generator().manual_seed(3))
    b = stochastic_round(codes.float(), dtype, Generator().manual_seed(3))
    assert same_bits(a, b)


@each_dtype
def test_float64_is_not_rounded_to_float32_first(dtype: torch.dtype) -> None:
    """A float64 just below 1 + 2**-30 goes up, rarely; via float32 it never would."""
    x = torch.full((1,), 1 + 2.0**-30, dtype=torch.float64)
    assert x.float() == 1
    patch = pytest.MonkeyPatch()
    with_noise(patch, 2**62 - 1)
    rounded = stochastic_round(x, dtype)
    patch.undo()
    assert rounded.double() > 1


def test_shapes_strides_and_draws() -> None:
    """Empty, 0-d, transposed, expanded: neither layout nor value changes a draw."""

    def round_(x: Tensor) -> Tensor:
        return stochastic_round(x, torch.bfloat16, Generator().manual_seed(0))

    x = torch.randn(5, 7, generator=Generator().manual_seed(1))
    assert round_(x[:0]).shape == (0, 7)
    assert round_(x[0, 0]).shape == ()
    assert torch.equal(round_(x.T), round_(x.T.contiguous()))
    assert torch.equal(round_(x[:, ::2]), round_(x[:, ::2].contiguous()))
    row = x[:1].expand(5, 7)
    assert torch.equal(round_(row), round_(row.contiguous()))
    four = torch.randn(2, 3, 4, 4, generator=Generator().manual_seed(1))
    last = four.contiguous(memory_format=torch.channels_last)
    assert torch.equal(round_(four), round_(last))
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert torch.equal(round_(negated), round_(-x))

    generator = Generator().manual_seed(0)
    stochastic_round(torch.zeros(6), torch.bfloat16, generator)
    special = Generator().manual_seed(0)
    stochastic_round(torch.tensor([INF, NAN, 1.1, 0, 1, -1]), torch.bfloat16, special)
    assert torch.equal(generator.get_state(), special.get_state())


def test_generators() -> None:
    """The same state gives the same result, another another; None is the default."""
    x = torch.full((1000,), 1.003)

    def draw(seed: int) -> Tensor:
        return stochastic_round(x, torch.bfloat16, Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(0)
    assert torch.equal(stochastic_round(x, torch.bfloat16), draw(0))


def test_the_input_is_neither_changed_nor_differentiated() -> None:
    """``x`` keeps its values; the result has no history."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((100,), 1.003, dtype=dtype, requires_grad=True)
        before = x.detach().clone()
        rounded = stochastic_round(x, torch.float8_e4m3fn)
        assert torch.equal(x, before)
        assert not rounded.requires_grad


# Statistics: tolerances are derived; a correct file fails with the stated probability.


@each_dtype
def test_the_mean_is_right_in_every_dtype(dtype: torch.dtype) -> None:
    """2,000 values, 500 draws each: no value is biased, nor are all of them together.

    Bernstein: a sum of n centered bits of variance v = f (1 - f) exceeds t with
    probability below 2 exp(-t**2 / (2 n v + 2 t / 3)); t is chosen for 1e-6 in all.
    The total is within 5 standard deviations, sqrt(n sum v).
    """
    x = samples(dtype, 2000, seed=4)
    x = x[x.double().abs() <= grid(dtype)[-2]]
    lo, hi = neighbors(x, dtype)
    f = (x.double().abs() - lo) / (hi - lo)
    n = 500

    draws = stochastic_round(x.expand(n, -1), dtype, Generator().manual_seed(0))
    ups = (draws.double().abs() == hi).sum(0)

    v = f * (1 - f)
    level = math.log(2 * len(x) / 1e-6)
    t = level / 3 + (level**2 / 9 + 2 * n * v * level).sqrt()
    assert ((ups - n * f).abs() <= t).all()
    assert abs(float((ups - n * f).sum())) <= 5 * float((n * v).sum().sqrt())
    # The bound would notice a bias of a tenth of the spacing in all values together.
    assert 5 * float((n * v).sum().sqrt()) < 0.1 * n * len(x)


def test_the_error_of_a_sum_grows_with_the_root_of_its_length() -> None:
    """N additions to a number in [1, 2): to nearest it stalls, else it is unbiased.

    Each rounding adds an error of variance <= s**2 / 4 and mean zero, so the mean of
    m sums is within 5 s / 2 * sqrt(n / m).
    """
    n, m, term = 1000, 2000, 0.0005
    generator = Generator().manual_seed(0)
    plain, total = (torch.ones(m, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(n):
        plain = (plain.float() + term).bfloat16()
        total = stochastic_round(total.float() + term, torch.bfloat16, generator)

    assert torch.equal(plain, torch.ones_like(plain))
    spacing = 2**-7
    error = total.double() - (1 + n * term)
    assert abs(float(error.mean())) <= 5 * spacing / 2 * math.sqrt(n / m)
    # The variance of an addition is f (1 - f) s**2 with f = term / s, exactly; that of
    # the sample is within 5 sqrt(2 / m) of it, relatively, for a nearly normal error.
    f = term / spacing
    variance = n * f * (1 - f) * spacing**2
    assert float(error.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / m))


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_rounding_costs_a_few_random_draws(dtype: torch.dtype) -> None:
    """The benchmark's own measurement, on the machine at hand, with fewer rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert measure(dtype, rounds=40)["times_the_draw"] < ALLOWED_DRAWS
    finally:
        torch.set_num_threads(threads)


# Exact laws: the optimizer.


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of one parameter, copied."""
    return {name: t.clone() for name, t in optimizer.state[p].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_rounding
def test_wide_parameters_are_torch_adamw_bit_for_bit(
    dtype: torch.dtype, rounding: str
) -> None:
    """A parameter that needs no remedy gets torch's own AdamW."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(50, dtype=dtype))
    theirs = nn.Parameter(ours.detach().clone())
    a = PureBF16AdamW([ours], lr=1e-2, weight_decay=0.1, rounding=rounding)
    b = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    for _ in range(20):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()

    assert torch.equal(ours, theirs)
    assert state_of(a, ours).keys() == state_of(b, theirs).keys()
    for name, value in state_of(b, theirs).items():
        assert torch.equal(a.state[ours][name], value)
        assert a.state[ours][name].dtype == value.dtype


@each_rounding
def test_each_step_is_float32_adamw_rounded_once(rounding: str) -> None:
    """What is stored are neighbors of what torch's AdamW computes in float32.

    With Kahan the weight is its rounding to nearest, and the compensation the rest.
    """
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3000).bfloat16())
    optimizer = PureBF16AdamW([p], lr=1e-4, weight_decay=0.1, rounding=rounding)
    for i in range(20):
        p.grad = (torch.randn(3000) * 10.0 ** -(i % 5)).bfloat16()
        before = state_of(optimizer, p)
        carried = before.pop("compensation", torch.zeros_like(p)).float()
        exact = nn.Parameter(p.detach().float() + carried)
        exact.grad = p.grad.float()
        reference = torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.1, foreach=False)
        if before:
            reference.state[exact] = {
                name: t if name == "step" else t.float() for name, t in before.items()
            }
        optimizer.step()
        reference.step()

        stored = state_of(optimizer, p)
        wanted = reference.state[exact]
        pairs = [(stored[name], wanted[name]) for name in ("exp_avg", "exp_avg_sq")]
        if rounding == "kahan":
            assert torch.equal(p, exact.bfloat16())
            rest = (exact - p).bfloat16()
            assert torch.equal(stored["compensation"], rest)
        else:
            pairs.append((p.detach(), exact.detach()))
            assert "compensation" not in stored
        for rounded, value in pairs:
            lo, hi = neighbors(value, torch.bfloat16)
            magnitude = rounded.double().abs()
            assert ((magnitude == lo) | (magnitude == hi)).all()
            f = (value.double().abs() - lo) / (hi - lo)
            deviation = float((f * (1 - f)).sum().sqrt())
            assert abs(float((magnitude == hi).sum() - f.sum())) <= 5 * deviation
        assert stored["step"] == i + 1


@each_rounding
def test_everything_is_bfloat16_and_the_bytes_are_as_told(rounding: str) -> None:
    """Weight and state take 6 or 8 bytes a parameter."""
    p = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = PureBF16AdamW([p], rounding=rounding)
    optimizer.step()

    kept = [p, *(t for name, t in optimizer.state[p].items() if name != "step")]
    assert {t.dtype for t in kept} == {torch.bfloat16}
    assert {t.shape for t in kept} == {p.shape}
    stored = sum(t.element_size() for t in kept)
    assert stored == {"stochastic": 6, "kahan": 8}[rounding]


def test_moments_follow_the_exact_averages_on_average() -> None:
    """The mean over 20,000 weights is the exact average, where torch's stays put.

    A moment is linear in its past, so that its mean obeys the exact recursion; each
    rounding adds a variance of at most s**2 / 4, which decays by beta**2 a step:
    all of it stays below s**2 / 4 / (1 - beta**2), for the largest spacing s.
    """
    n, steps = 20_000, 700
    ours, theirs = (nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for _ in range(2))
    a = PureBF16AdamW([ours], lr=0.0)
    b = torch.optim.AdamW([theirs], lr=0.0)
    exact = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    for i in range(steps):
        g = 1.0 if i < 50 else 0.0
        exact["exp_avg"] = 0.9 * exact["exp_avg"] + 0.1 * g
        exact["exp_avg_sq"] = 0.999 * exact["exp_avg_sq"] + 0.001 * g * g
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = torch.full_like(p, g)
            optimizer.step()

    for name, beta, largest in (("exp_avg", 0.9, 1.0), ("exp_avg_sq", 0.999, 0.06)):
        spacing = 2.0 ** (math.floor(math.log2(largest)) - 7)
        deviation = spacing / 2 / math.sqrt(1 - beta**2)
        moment = a.state[ours][name].double()
        assert abs(float(moment.mean()) - exact[name]) <= 5 * deviation / math.sqrt(n)
        assert float(moment.std()) <= deviation * (1 + 5 / math.sqrt(n))
    stuck = b.state[theirs]["exp_avg_sq"].double()
    assert float(stuck.mean()) > 1.5 * exact["exp_avg_sq"]


def test_weights_take_steps_far_below_their_spacing() -> None:
    """With updates of exactly lr, the mean of n weights is 1 - T lr.

    Each step adds an error of variance f (1 - f) s**2 <= lr s, with f = lr / s, at the
    largest spacing s = 2**-8 below 1: the mean of n is within 5 sqrt(T lr s / n).
    """
    n, steps, lr = 10_000, 400, 2.0**-14
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    optimizer = PureBF16AdamW([p], lr=lr, betas=(0.0, 0.0), weight_decay=0.0)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()

    bound = 5 * math.sqrt(steps * lr * 2**-8 / n)
    assert bound < 0.1 * steps * lr
    assert abs(float(p.detach().double().mean()) - (1 - steps * lr)) <= bound


def test_successive_steps_and_parameters_draw_independent_numbers() -> None:
    """One weight, 1,500 steps, halfway between two numbers: a fair coin each time.

    Heads, and agreements with the step before and with a second parameter, are sums of
    n fair bits: within 5 sqrt(n) / 2 of n / 2.
    """
    n = 1500
    a, b = (nn.Parameter(torch.zeros((), dtype=torch.bfloat16)) for _ in range(2))
    optimizer = PureBF16AdamW([a, b], lr=2**-8, betas=(0.0, 0.0), weight_decay=0.0)
    rows = []
    for _ in range(n):
        for p in (a, b):
            p.data.fill_(1.0)
            p.grad = -torch.ones_like(p)  # to 1 + 2**-8, between 1 and 1 + 2**-7
        optimizer.step()
        rows.append([a.item() > 1, b.item() > 1])

    up = torch.tensor(rows)
    counts = [
        up[:, 0].sum(),
        up[:, 1].sum(),
        (up[1:, 0] == up[:-1, 0]).sum(),
        (up[:, 0] == up[:, 1]).sum(),
    ]
    for count in counts:
        assert abs(count.item() - n / 2) <= 5 * math.sqrt(n) / 2 + 1


def test_kahan_is_off_by_at_most_the_last_bit_of_the_compensation() -> None:
    """Each step, w + c is the exact w + c + u within 2**-10 of the spacing of w."""
    torch.manual_seed(0)
    p = nn.Parameter((torch.rand(5000) + 1).bfloat16())  # spacing 2**-7
    optimizer = PureBF16AdamW(
        [p], lr=1e-4, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, rounding="kahan"
    )
    total = p.detach().double()
    for i in range(1, 101):
        p.grad = torch.ones_like(p)  # the update is 1, exactly
        optimizer.step()
        total -= 1e-4
        c = optimizer.state[p]["compensation"].double()
        inside = p.detach() > 1
        assert (c.abs() <= 2**-8).all()
        error = (p.detach().double() + c - total).abs()
        # and float32 rounds the sum itself, to a multiple of 2**-24
        assert (error[inside] <= i * (2**-10 * 2**-7 + 2**-24)).all()
        assert inside.double().mean() > 0.9


def test_kahan_has_a_threshold_and_stochastic_rounding_none() -> None:
    """1,200 steady updates of 2**-18 move a weight of 1 by 2**-9 and stop there."""

    def moved(rounding: str, lr: float, n: int) -> float:
        p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
        optimizer = PureBF16AdamW(
            [p], lr=lr, betas=(0.0, 0.0), weight_decay=0.0, rounding=rounding
        )
        for _ in range(1200):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        rest = optimizer.state[p].get("compensation", torch.zeros(()))
        return float((p.detach().double() + rest.double()).mean()) - 1

    lr, n = 1.1 * 2.0**-18, 5000
    assert moved("kahan", lr, 1) == 2**-9
    assert 1 <= moved("kahan", 2 * lr, 1) / (1200 * 2 * lr) < 2  # rounded up, mostly
    # variance f (1 - f) s**2 <= lr s for a step, as above
    bound = 5 * math.sqrt(1200 * lr * 2**-7 / n)
    assert bound < 0.1 * 1200 * lr
    assert abs(moved("stochastic", lr, n) - 1200 * lr) <= bound


@each_rounding
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_gradient_does_what_it_does_in_torch(rounding: str, bad: float) -> None:
    """The weight becomes NaN, its neighbor does not, as in torch.optim.AdamW."""
    ours = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    theirs = nn.Parameter(torch.ones(2))
    ours.grad = torch.tensor([bad, 1.0], dtype=torch.bfloat16)
    theirs.grad = ours.grad.float()
    a, b = PureBF16AdamW([ours], rounding=rounding), torch.optim.AdamW([theirs])
    a.step()
    b.step()

    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isnan().tolist() == [True, False]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(a.state[ours][name].isnan(), b.state[theirs][name].isnan())


@each_rounding
def test_frozen_parameters_groups_names_and_closures(rounding: str) -> None:
    """No gradient, no change; each group has its settings; the closure runs once."""
    still, fast, slow = (
        nn.Parameter(torch.ones(50, dtype=torch.bfloat16)) for _ in range(3)
    )
    optimizer = PureBF16AdamW([("still", still), ("fast", fast)], lr=0.5)
    optimizer.add_param_group({
        "params": [("slow", slow)],
        "lr": torch.tensor(2.0**-3),
        "rounding": rounding,
    })
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        for p in (fast, slow):
            p.grad = torch.ones_like(p)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert calls == [True]
    assert torch.equal(still, torch.ones_like(still))
    assert not optimizer.state[still]
    assert fast.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert slow.float().mean().item() == pytest.approx(0.875, abs=0.02)


# Replicas and checkpoints.


def run(
    optimizer: PureBF16AdamW, p: nn.Parameter, steps: int, start: int = 0
) -> Tensor:
    """Take steps with gradients that depend on the step number only."""
    for i in range(start, start + steps):
        p.grad = torch.randn(p.shape, generator=Generator().manual_seed(i)).to(p.dtype)
        optimizer.step()
    return p.detach().clone()


def fresh(rounding: str, seed: int = 0) -> tuple[PureBF16AdamW, nn.Parameter]:
    """A parameter of 300 numbers and its optimizer."""
    p = nn.Parameter(torch.linspace(-2, 2, 300).bfloat16())
    return PureBF16AdamW([p], lr=1e-3, rounding=rounding, seed=seed), p


@each_rounding
def test_replicas_with_one_seed_stay_equal(rounding: str) -> None:
    """Whatever the default generator did; another seed gives other weights."""
    first = run(*fresh(rounding), 10)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(run(*fresh(rounding), 10), first)
    assert not torch.equal(run(*fresh(rounding, seed=1), 10), first)


@each_rounding
def test_a_resumed_run_is_the_same_bit_for_bit(rounding: str) -> None:
    """Through a file, and by deepcopy; moments, compensation and seed are restored."""
    straight = run(*fresh(rounding, seed=5), 20)
    optimizer, p = fresh(rounding, seed=5)
    run(optimizer, p, 8)
    file = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin_p, twin = copy.deepcopy((p, optimizer))
    assert torch.equal(run(twin, twin_p, 12, start=8), straight)

    optimizer, p = fresh(rounding, seed=0)
    p.data.copy_(saved["p"])
    optimizer.load_state_dict(saved["optimizer"])

    assert optimizer.param_groups[0]["seed"] == 5
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(run(optimizer, p, 12, start=8), straight)


def pickle_twice(optimizer: PureBF16AdamW) -> PureBF16AdamW:
    """Return what a pickle of a pickle holds."""
    for _ in range(2):
        optimizer = pickle.loads(pickle.dumps(optimizer))
    return optimizer


@each_rounding
def test_the_state_of_torch_adamw_is_taken_over(rounding: str) -> None:
    """Its float32 moments are rounded to bfloat16; rounding and seed stay."""
    theirs = nn.Parameter(torch.linspace(-2, 2, 300))
    source = torch.optim.AdamW([theirs], lr=3e-4)
    theirs.grad = torch.randn(300, generator=Generator().manual_seed(0))
    source.step()
    saved = source.state_dict()

    optimizer, p = fresh(rounding, seed=3)
    optimizer.load_state_dict(saved)

    group = optimizer.param_groups[0]
    assert (group["rounding"], group["seed"], group["lr"]) == (rounding, 3, 3e-4)
    moment = source.state[theirs]["exp_avg"]
    assert torch.equal(optimizer.state[p]["exp_avg"], moment.bfloat16())
    assert saved["param_groups"][0].get("rounding") is None
    run(optimizer, p, 1)
    assert optimizer.state[p]["step"] == 2


@each_rounding
@pytest.mark.parametrize("number", [int, float])
def test_step_counts_that_are_plain_numbers_are_taken_over(
    number: type, rounding: str
) -> None:
    """PyTorch before 1.12 saved them so; its AdamW takes them as well."""
    optimizer, p = fresh(rounding)
    run(optimizer, p, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    other, q = fresh(rounding)
    q.data.copy_(p)
    saved["state"][0]["step"] = number(3)
    other.load_state_dict(saved)

    assert torch.equal(run(other, q, 3, start=3), run(optimizer, p, 3, start=3))


@each_rounding
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle_twice])
def test_a_state_can_be_loaded_again(
    duplicate: Callable[[PureBF16AdamW], PureBF16AdamW], rounding: str
) -> None:
    """Into an optimizer that was loaded before, or copied, which torch treats alike."""
    optimizer, p = fresh(rounding)
    run(optimizer, p, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(saved))
    twin = duplicate(optimizer)
    twin.load_state_dict(saved)

    [q] = twin.param_groups[0]["params"]
    assert torch.equal(run(twin, q, 3, start=2), run(optimizer, p, 3, start=2))


def unchanged(optimizer: PureBF16AdamW, p: Tensor, load: Callable[[], None]) -> None:
    """Call ``load``, which must raise, and compare what was there."""
    before, groups = state_of(optimizer, p), copy.deepcopy(optimizer.param_groups)
    try:
        load()
    finally:
        after = state_of(optimizer, p)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        for now, old in zip(optimizer.param_groups, groups, strict=True):
            assert {**now, "params": None} == {**old, "params": None}


def test_states_that_cannot_be_continued_are_refused() -> None:
    """One clear error each, before anything has changed."""
    optimizer, p = fresh("stochastic")
    run(optimizer, p, 3)
    good = optimizer.state_dict()

    def refused(message: str, change: Callable[[dict[str, object]], object]) -> None:
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises(ValueError, match=message):
            unchanged(optimizer, p, lambda: optimizer.load_state_dict(bad))

    def group(**new: object) -> Callable[[dict[str, object]], object]:
        return lambda s: s["param_groups"][0].update(new)  # type: ignore[index]

    def state(**new: object) -> Callable[[dict[str, object]], object]:
        return lambda s: s["state"][0].update(new)  # type: ignore[index]

    refused("saved with rounding='kahan', not 'stochastic'", group(rounding="kahan"))
    refused("amsgrad or maximize", group(amsgrad=True))
    refused("amsgrad or maximize", group(maximize=True))
    refused("lr must be finite and >= 0, got nan", group(lr=math.nan))
    refused(r"betas must be two numbers in \[0, 1\)", group(betas=(0.9, 1.0)))
    refused("seed must be an integer >= 0, got -1", group(seed=-1))
    refused("step of parameter 0 must be >= 0, got -1", state(step=torch.tensor(-1.0)))
    refused(
        r"exp_avg of parameter 0 has shape \(3,\), but its weight \(300,\)",
        state(exp_avg=torch.zeros(3)),
    )
    refused(
        r"parameter 0 needs state \['exp_avg', 'exp_avg_sq', 'step'\], got "
        r"\['exp_avg', 'exp_avg_sq', 'main_param', 'step'\]",
        state(main_param=torch.zeros(300)),
    )
    refused(
        r"needs state .* got \['momentum_buffer'\]",
        lambda s: s.update(state={0: {"momentum_buffer": torch.zeros(300)}}),
    )
    refused("step of parameter 0 must be >= 0, got one", state(step="one"))
    refused("exp_avg of parameter 0 has shape None, but", state(exp_avg=[0.0] * 300))
    refused(
        "saved by Adam with weight_decay=0.01 in the gradient",
        group(decoupled_weight_decay=False),
    )
    refused("different number of parameter groups", lambda s: s.update(param_groups=[]))
    refused("doesn't match the size", group(params=[0, 1]))


# Training: plain bfloat16 stalls, and neither remedy does.


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images in [0, 1] and what they show, shuffled."""
    pixels, target = load_digits(return_X_y=True)
    order = torch.randperm(len(target), generator=Generator().manual_seed(0))
    x = torch.tensor(pixels / 16, dtype=torch.float32)[order]
    return x, torch.tensor(target)[order]


def make_network() -> nn.Sequential:
    """64 pixels to 10 scores, with the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)
    )


def test_plain_bfloat16_stalls_and_this_follows_float32() -> None:
    """15 passes at 1e-4; the losses on the training data are compared."""
    x, y = digits()

    def train(
        dtype: torch.dtype, make: Callable[..., torch.optim.Optimizer]
    ) -> tuple[float, float]:
        network = make_network().to(dtype)
        optimizer = make(network.parameters(), lr=1e-4)
        for _ in range(15):
            for i in range(0, 1400, 100):
                optimizer.zero_grad()
                scores = network(x[i : i + 100].to(dtype)).float()
                torch.autograd.backward(F.cross_entropy(scores, y[i : i + 100]))
                optimizer.step()
        with torch.no_grad():
            scores = network.float()(x)
        right = scores.argmax(1) == y
        loss = F.cross_entropy(scores[:1400], y[:1400]).item()
        return loss, right[1400:].float().mean().item()

    full, accuracy = train(torch.float32, torch.optim.AdamW)
    plain, stalled = train(torch.bfloat16, torch.optim.AdamW)
    assert accuracy > 0.6
    assert stalled < accuracy - 0.3
    assert plain > full + 0.5
    for rounding in ROUNDINGS:
        loss, reached = train(
            torch.bfloat16,
            lambda params, lr, rounding=rounding: PureBF16AdamW(
                params, lr=lr, rounding=rounding
            ),
        )
        assert abs(loss - full) < 0.1 * (plain - full)
        assert abs(reached - accuracy) < 0.03


@each_rounding
def test_fabric_saves_and_resumes(rounding: str, tmp_path: Path) -> None:
    """Under bf16-true, from a checkpoint in mid-run, to the same bits."""
    x, y = digits()
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")

    def setup() -> tuple[nn.Module, torch.optim.Optimizer]:
        network = make_network()
        optimizer = PureBF16AdamW(network.parameters(), lr=1e-4, rounding=rounding)
        model, optimizer = fabric.setup(network, optimizer)
        return model, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> None:
        for i in range(14)[part]:
            batch = slice(100 * i, 100 * i + 100)
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x[batch]), y[batch]))
            optimizer.step()

    model, optimizer = setup()
    train(model, optimizer, slice(0, 7))
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    train(model, optimizer, slice(7, 14))
    straight = [p.detach().clone() for p in model.parameters()]

    model, optimizer = setup()
    fabric.load(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    train(model, optimizer, slice(7, 14))

    assert all(map(torch.equal, model.parameters(), straight))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Digits(lightning.LightningModule):
    """The digits' network with the optimizer under test."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.network(images).float(), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer under test."""
        return PureBF16AdamW(self.parameters(), lr=1e-4)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")
def test_trainer_trains_as_the_plain_loop(tmp_path: Path) -> None:
    """Two passes under bf16-true give the plain loop's weights, bit for bit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x, y = digits()
    loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=100)
    model = Digits()
    trainer = lightning.Trainer(
        precision="bf16-true",
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, loader)

    plain = make_network().bfloat16()
    optimizer = PureBF16AdamW(plain.parameters(), lr=1e-4)
    for _ in range(2):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(images.bfloat16()).float(), labels)
            torch.autograd.backward(loss)
            optimizer.step()
    assert all(map(torch.equal, model.network.parameters(), plain.parameters()))


# Two ranks, over gloo, in processes of their own.

RANK = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from snippets.stochastic_rounding import PureBF16AdamW

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
for seed in (7, rank):
    torch.manual_seed(rank)
    network = nn.Linear(64, 64).bfloat16()
    model = nn.parallel.DistributedDataParallel(network)
    optimizer = PureBF16AdamW(model.parameters(), lr=1e-3, seed=seed)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 64).bfloat16()).float().square().mean().backward()
        optimizer.step()
    both = [torch.empty_like(network.weight) for _ in range(2)]
    dist.all_gather(both, network.weight.detach())
    print(torch.equal(*both), flush=True)

from torch.distributed.fsdp import fully_shard

mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
weights = []
for shard in (False, True):
    torch.manual_seed(0)
    network = nn.Linear(64, 3).bfloat16()  # 2 rows and 1, bias 2 and 1
    if shard:
        fully_shard(network, mesh=mesh)
    optimizer = PureBF16AdamW(
        network.parameters(), lr=1e-4, betas=(0.0, 0.0), rounding="kahan"
    )
    for _ in range(50):
        for p in network.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    moment = optimizer.state[network.weight]["exp_avg"]
    full = network.weight.full_tensor() if shard else network.weight
    weights.append((full.detach(), moment.to_local().shape if shard else None))
print(torch.equal(weights[0][0], weights[1][0]), list(weights[1][1]), flush=True)
os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down
"""


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="torch.distributed with gloo is missing",
)
def test_ranks_of_ddp_stay_equal_and_of_fsdp_step_their_part(tmp_path: Path) -> None:
    """DDP: different data, one seed, the same weights; a seed for each rank, others.

    FSDP2: with Kahan and exact moments the weights are those of one process.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "ranks")],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]

    lines = [out.splitlines() for out, _ in said]
    assert lines[0] == ["True", "False", "True [2, 64]"], said
    assert lines[1] == ["True", "False", "True [1, 64]"], said


# Errors.


def test_round_refuses_other_dtypes_and_generators() -> None:
    """Integers, complex numbers, unknown targets; a generator of another device."""
    x = torch.ones(2)
    for bad in (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.cfloat)):
        with pytest.raises(TypeError, match=f"x must be one of .*, got {bad.dtype}"):
            stochastic_round(bad, torch.bfloat16)
    for target in (torch.float32, torch.int8, torch.float8_e8m0fnu):
        with pytest.raises(TypeError, match=f"dtype must be one of .*, got {target}"):
            stochastic_round(x, target)
    for loose in (1.001, [1.001], None):
        with pytest.raises(TypeError, match=f"got {type(loose).__name__}"):
            stochastic_round(loose, torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dense tensor, got a torch\.sparse_coo one"):
        stochastic_round(torch.eye(2).to_sparse(), torch.bfloat16)
    nested = torch.nested.nested_tensor([x, torch.ones(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match="dense tensor, got a nested one"):
        stochastic_round(nested, torch.bfloat16)
    sharded = torch.ones(2)
    sharded.to_local = lambda: x  # type: ignore[attr-defined]  # as a DTensor has
    with pytest.raises(TypeError, match=r"x is a DTensor: round x\.to_local\(\)"):
        stochastic_round(sharded, torch.bfloat16)
    with pytest.raises(ValueError, match="generator is on cpu, but x is on meta"):
        stochastic_round(x.to("meta"), torch.bfloat16, Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"lr": NAN}, "lr must be finite and >= 0, got nan"),
        ({"lr": torch.tensor(INF)}, r"lr must be finite and >= 0, got tensor\(inf\)"),
        ({"lr": torch.ones(2)}, r"lr must be finite and >= 0, got tensor\(\[1., 1.\]"),
        ({"lr": "1e-3"}, "lr must be finite and >= 0, got '1e-3'"),
        ({"eps": None}, "eps must be finite and >= 0, got None"),
        ({"eps": -1e-8}, "eps must be finite and >= 0, got -1e-08"),
        ({"weight_decay": INF}, "weight_decay must be finite and >= 0, got inf"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got"),
        ({"betas": (NAN, 0.9)}, r"betas must be two numbers in \[0, 1\), got"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"betas": ("0.9", 0.9)}, r"betas must be two numbers in \[0, 1\), got"),
        ({"rounding": "kahn"}, "got 'kahn'; did you mean 'kahan'"),
        ({"rounding": "zzz"}, r"rounding must be one of .*, got 'zzz'$"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 0.5}, "seed must be an integer >= 0, got 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, object], message: str
) -> None:
    """In the constructor and in a later group, which then has not been added."""
    p, q = (nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        PureBF16AdamW([p], **settings)  # type: ignore[arg-type]
    optimizer = PureBF16AdamW([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [q], **settings})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float8_e4m3fn, torch.int32, torch.cfloat], ids=str
)
def test_parameters_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    """FP16 too: it cannot hold a second moment."""
    p = nn.Parameter(torch.ones(2).to(dtype), requires_grad=False)
    for params in ([p], [("name", p)], [{"params": p}]):
        with pytest.raises(TypeError, match=f"parameters must be .*, got {dtype}"):
            PureBF16AdamW(params)


def test_no_parameters_and_sparse_gradients_are_refused() -> None:
    """The second before any parameter has changed."""
    with pytest.raises(ValueError, match="empty parameter list"):
        PureBF16AdamW([])
    dense = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    dense.grad = torch.ones_like(dense)
    table = nn.Embedding(4, 2, sparse=True, dtype=torch.bfloat16)
    table(torch.tensor([1])).sum().backward()
    optimizer = PureBF16AdamW([dense, table.weight])
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.ones_like(dense))
