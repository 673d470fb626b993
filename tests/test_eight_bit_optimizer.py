"""Tests of snippets/eight_bit_optimizer.py, as read in guide/eight_bit_optimizer.

Oracles: bitsandbytes' kernel for the CPU and its version in PyTorch, and torchao.
"""

import copy
import io
import logging
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from snippets import eight_bit_optimizer
from snippets.eight_bit_optimizer import (
    AdamW8bit,
    create_dynamic_map,
    dequantize_blockwise,
    quantize_blockwise,
)
from snippets.main_params import MainParams
from snippets.memory_ledger import MemoryLedger
from tests.quiet import quiet_import

bnb = quiet_import("bitsandbytes")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
MAPS = [create_dynamic_map(True), create_dynamic_map(False)]
SIZES = [64, 1000, 4096]


def draws(signed: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """40,001 numbers over ten decades, a block of zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_001, generator=generator)
    x *= 10 ** (-10 * torch.rand(x.shape, generator=generator))
    x[4096:12288] = 0
    x[20000] = 1e4
    x[30000:30256] *= 2.0**-140
    return (x if signed else x.abs()).to(dtype)


def edges(code: Tensor) -> Tensor:
    """Every value of a map, every middle and its neighbors, and a fine sweep."""
    middles = (code[1:] + code[:-1]) / 2
    up, down = (middles.nextafter(torch.tensor(to)) for to in (2.0, -2.0))
    low = 0 if code[0] >= 0 else -1
    sweep = torch.linspace(low, 1, 2**17)
    return torch.cat([torch.ones(1), code, middles, up, down, sweep])


def by_pytorch(x: Tensor, code: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Quantize as bitsandbytes does in PyTorch, which its kernel for CPUs hides."""
    op = torch.ops.bitsandbytes.quantize_blockwise.default
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    result: tuple[Tensor, Tensor] = op.redispatch(key, x, code, size)
    return result


def take_steps(
    optimizer: Optimizer, count: int, gradient: Callable[[Tensor, int], Tensor]
) -> None:
    """Step with made-up gradients, the same for optimizers over equal parameters."""
    for i in range(count):
        for group in optimizer.param_groups:
            for place, p in enumerate(group["params"]):
                torch.manual_seed(1000 * i + place)
                p.grad = gradient(p, i).to(p.dtype)
        optimizer.step()


def noisy(p: Tensor, _: int) -> Tensor:
    """Gradients over a few decades."""
    return torch.randn(p.shape) * torch.randn(p.shape).exp() + 0.1


def twins(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Two lists of equal parameters."""
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    return [[nn.Parameter(v.clone()) for v in values] for _ in range(2)]


def tensors(state: object) -> list[Tensor]:
    """All tensors in a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else []
    return [t for value in values for t in tensors(value)]


def moments(optimizer: Optimizer, p: Tensor) -> list[Tensor]:
    """Both moments of a parameter, as numbers."""
    state = optimizer.state[p]
    result = []
    for name, code in zip(("exp_avg", "exp_avg_sq"), MAPS, strict=True):
        absmax = state["absmax"][name]
        result.append(
            dequantize_blockwise(state[name], absmax, code, state["block_size"])
        )
    return result


# Exact laws


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_those_of_bitsandbytes_and_torchao(signed: bool) -> None:
    """Bit for bit."""
    ours = create_dynamic_map(signed)
    torchao = quiet_import("torchao.optim.quant_utils")
    assert ours.dtype == torch.float32
    assert torch.equal(ours, bnb.functional.create_dynamic_map(signed))
    assert ours.tolist() == torchao.create_dynamic_map(signed)


@pytest.mark.parametrize("signed", [True, False])
def test_a_map_is_read_off_the_bits_of_its_codes(signed: bool) -> None:
    """Zeros divide by ten, the fraction counts cells between a tenth and one."""
    width = 7 if signed else 8
    values = {Fraction(0), Fraction(1)}
    for bits in range(2**width):
        text = f"{bits:0{width}b}"
        zeros = len(text) - len(text.lstrip("0"))
        fraction = text[zeros + 1 :]
        if zeros + 1 + len(fraction) != width or zeros > 6:
            continue  # left for 0 and 1
        cells = 2 ** len(fraction)
        place = Fraction(2 * int(fraction or "0", 2) + 1, 2 * cells)
        value = (Fraction(1, 10) + Fraction(9, 10) * place) / 10**zeros
        values |= {value, -value} if signed else {value}
    exact = torch.tensor([float(v) for v in sorted(values)], dtype=torch.float64)
    ours = create_dynamic_map(signed).double()
    assert len(exact) == 256
    assert ((ours - exact).abs() <= 2**-22 * exact.abs()).all()


@pytest.mark.parametrize("code", MAPS, ids=["signed", "unsigned"])
def test_the_code_is_the_nearest_and_a_middle_goes_down(code: Tensor) -> None:
    """By brute force, and at each middle and one step to either side."""
    x = edges(code)
    codes, absmax = quantize_blockwise(x, code, x.numel())
    assert absmax.tolist() == [1.0]
    back = dequantize_blockwise(codes, absmax, code, x.numel())
    for part, found in zip(x.chunk(9), back.chunk(9), strict=True):
        error = (part[:, None].double() - code.double()).abs().amin(1)
        assert ((part.double() - found).abs() <= error + 2**-23 * part.abs()).all()
    n = len(code)
    at, up, down = codes[1 + n : 1 + n + 3 * (n - 1)].int().view(3, n - 1)
    assert codes[1 : 1 + n].tolist() == list(range(n))
    assert at.tolist() == down.tolist() == list(range(n - 1))
    assert up.tolist() == list(range(1, n))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_errors_are_half_a_gap_of_the_map(dtype: torch.dtype, size: int) -> None:
    """The widest gap is 9/640 of the block's largest magnitude, or half of it."""
    for signed, code in zip((True, False), MAPS, strict=True):
        x = draws(signed, dtype)
        codes, absmax = quantize_blockwise(x, code, size)
        back = dequantize_blockwise(codes, absmax, code, size)
        largest = absmax.repeat_interleave(size)[: x.numel()]
        gap = 9 / 640 if signed else 9 / 1280
        bound = (gap / 2 + 2**-22) * largest + 2**-149
        assert ((back - x.float()).abs() <= bound).all()
        assert (x.float().abs() <= largest).all()
        positive = x.float() == largest  # the largest itself is exact
        assert torch.equal(back[positive], x.float()[positive])


def test_shapes_strides_and_last_blocks() -> None:
    """Blocks are taken in logical order; the last may be short, or the only one."""
    x = draws()[: 48 * 50].view(48, 50)
    codes, absmax = quantize_blockwise(x.t(), None, 64)
    again, scales = quantize_blockwise(x.t().contiguous(), None, 64)
    assert codes.shape == (50, 48)
    assert absmax.shape == (38,)
    assert torch.equal(codes, again)
    assert torch.equal(absmax, scales)
    assert torch.equal(absmax[-1], x.t().flatten()[37 * 64 :].abs().max())
    back = dequantize_blockwise(codes.t().contiguous().t(), absmax, None, 64)
    assert torch.equal(back, dequantize_blockwise(again, scales, None, 64))
    whole = quantize_blockwise(x, None, 10**12)
    assert whole[1].shape == (1,)
    assert dequantize_blockwise(*whole, None, 10**12).shape == (48, 50)
    for shape in [(), (0,), (3, 0), (1, 1)]:
        codes, absmax = quantize_blockwise(torch.ones(shape))
        back = dequantize_blockwise(codes, absmax)
        assert torch.equal(back, torch.ones(shape))
        assert absmax.shape == (math.prod(shape),)


def test_zeros_subnormals_and_huge_values_come_back() -> None:
    """No block is lost because one over its largest magnitude would be Inf."""
    for scale in (0.0, 2.0**-149, 2.0**-140, 2.0**-127, 2.0**-100, 2.0**127):
        x = torch.tensor([1.0, 0.0, -1.0]) * scale
        codes, absmax = quantize_blockwise(x)
        assert absmax.item() == scale
        back = dequantize_blockwise(codes, absmax)
        assert back[0] == scale
        assert back[1] == 0
        assert (back[2] + scale).abs() <= (9 / 1280 + 2**-22) * scale + 2.0**-149


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lookup", ["nearest", "table"])
def test_what_is_not_finite_spoils_its_block_and_no_other(
    bad: float, lookup: str
) -> None:
    """The block comes back as NaN, so that nobody trains on."""
    x = torch.ones(600)
    x[300] = bad
    codes, absmax = quantize_blockwise(x, lookup=lookup)
    assert absmax.isnan().tolist() == [False, True, False]
    back = dequantize_blockwise(codes, absmax)
    assert back[256:512].isnan().all()
    assert back[:256].eq(1).all()
    assert back[512:].eq(1).all()


# Oracles


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_bitsandbytes_on_a_cpu(
    dtype: torch.dtype, size: int, signed: bool
) -> None:
    """Bit for bit with the table, absmax and all three dtypes back included."""
    code, x = MAPS[not signed], draws(signed, dtype)
    x = x[:30000] if dtype == torch.float32 else x  # its reciprocal of 2**-140 is Inf
    theirs, state = bnb.functional.quantize_blockwise(x, code=code, blocksize=size)
    codes, absmax = quantize_blockwise(x, code, size, lookup="table")
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, state.absmax)
    for out in FLOATS:
        state.dtype = out
        back = bnb.functional.dequantize_blockwise(theirs, state)
        assert torch.equal(
            dequantize_blockwise(codes, absmax, code, size, out), back.to(out)
        )


@pytest.mark.parametrize("code", MAPS, ids=["signed", "unsigned"])
def test_middles_are_bitsandbytes_on_a_cpu(code: Tensor) -> None:
    """Over a sweep that takes every step of its table, too."""
    x = edges(code)
    theirs, _ = bnb.functional.quantize_blockwise(x, code=code, blocksize=x.numel())
    assert torch.equal(
        quantize_blockwise(x, code, x.numel(), lookup="table")[0], theirs
    )
    assert torch.equal(
        quantize_blockwise(x, code, x.numel())[0], by_pytorch(x, code, x.numel())[0]
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_bitsandbytes_in_pytorch(
    dtype: torch.dtype, size: int, signed: bool
) -> None:
    """Bit for bit without the table, but for its blocks of less than 1e-38."""
    code, x = MAPS[not signed], draws(signed, dtype)
    x = x[: 30000 // size * size]  # in a short block it divides
    codes, absmax = quantize_blockwise(x, code, size)
    theirs, scales = by_pytorch(x, code, size)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, scales)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_torchaos_but_for_middles(signed: bool) -> None:
    """It divides, which may change the last bit, and rounds a middle up."""
    torchao = quiet_import("torchao.optim.quant_utils")
    code, x = MAPS[not signed], draws(signed)[: 117 * 256]
    codes, absmax = quantize_blockwise(x, code)
    scaled, scales = torchao.scale_tensor(x, 256)
    theirs = torchao.quantize_8bit_with_qmap(scaled, code)
    assert torch.equal(absmax.clamp(min=1e-12), scales)
    other = codes != theirs
    middle = (code[codes.int()] + code[theirs.int()])[other] / 2
    assert ((scaled[other] - middle).abs() <= 2**-22 * middle.abs()).all()
    assert other.sum() < 100


SHAPES = [(64, 100), (5000,), (3, 7), (70, 130)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_bitsandbytes_on_a_cpu_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, codes and scales after 40 steps, given its table."""
    by_table = partial(eight_bit_optimizer._quantize, by_table=True)
    monkeypatch.setattr(eight_bit_optimizer, "_quantize", by_table)
    mine, theirs = twins(*SHAPES, dtype=dtype)
    ours = AdamW8bit(mine, lr=1e-2, weight_decay=0.1)
    oracle = bnb.optim.AdamW8bit(theirs, lr=1e-2, weight_decay=0.1)
    for optimizer in (ours, oracle):
        take_steps(optimizer, 40, noisy)
    for p, q in zip(mine, theirs, strict=True):
        if p.numel() < 4096:
            continue
        assert torch.equal(p, q)
        saved = oracle.state[q]
        found = tensors(ours.state[p])
        names = "state1", "state2", "absmax1", "absmax2"
        for tensor, name in zip(found, names, strict=True):
            assert torch.equal(tensor, saved[name])


def test_one_step_is_torchaos_from_any_of_its_states() -> None:
    """But for float32's last bits, of which it has few in ``1 - 0.999**step``."""
    torchao = quiet_import("torchao.optim")
    mine, theirs = twins((64, 128))
    ours = AdamW8bit(mine, lr=1e-2, weight_decay=0.0)
    oracle = torchao.AdamW8bit(theirs, lr=1e-2, weight_decay=0.0)
    (p,), (q,) = mine, theirs
    with torch.compiler.set_stance("force_eager"):
        for step in range(1, 16):
            start = p.detach().clone()
            for optimizer in (oracle, ours):
                torch.manual_seed(step)
                optimizer.param_groups[0]["params"][0].grad = noisy(p, 0) / step
                optimizer.step()
            # Of float32(beta) ** step, which it subtracts from 1.
            corrections = 0.5 / (1 - 0.999**step) + 1 / (1 - 0.9**step)
            bound = (step + 2) * 2**-24 * corrections * (q - start).abs()
            bound += 2**-22 * q.abs()
            assert ((p - q).abs() <= bound).all()
            p.data.copy_(q)
            for name in ("exp_avg", "exp_avg_sq"):
                codes, saved = ours.state[p][name], oracle.state[q][name]
                if name == "exp_avg_sq":  # where ours does not become 0
                    assert (codes[saved.codes == 0] <= 1).all()
                    codes[saved.codes == 0] = 0
                apart = (codes.int() - saved.codes.int()).abs()
                assert apart.max() <= 1
                assert apart.sum() <= 4
                codes.copy_(saved.codes)
                ours.state[p]["absmax"][name].copy_(saved.scale)


@pytest.mark.parametrize("settings", [{"min_8bit_size": 10**6}, {"optim_bits": 32}])
def test_a_state_in_32_bits_is_torchs_bit_for_bit(settings: dict[str, int]) -> None:
    """By size, or by the group's choice."""
    mine, theirs = twins(*SHAPES)
    ours, oracle = AdamW8bit(mine, lr=1e-2, **settings), AdamW(theirs, lr=1e-2)  # type: ignore[arg-type]
    for optimizer in (ours, oracle):
        take_steps(optimizer, 50, noisy)
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["exp_avg_sq"], oracle.state[q]["exp_avg_sq"])


# Training


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of digits, in an order of their own."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, targets = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 16, dtype=torch.float32)[order]
    return images, torch.tensor(targets)[order]


def train(make: Callable[..., Optimizer], epochs: int = 5) -> tuple[float, int]:
    """Return the accuracy on 360 images unseen, and the bytes of the state."""
    images, labels = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = make(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.arange(1437).chunk(45):
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        hits = model(images[1437:]).argmax(1) == labels[1437:]
    states = [t for entry in optimizer.state.values() for t in tensors(entry)]
    return hits.double().mean().item(), sum(t.nbytes for t in states)


def test_accuracy_is_that_of_32_bits_with_a_quarter_of_the_state() -> None:
    """Images of digits; two standard errors of 360 draws at 0.97 are 0.018."""
    full, most = train(partial(AdamW, fused=True))
    ours, few = train(partial(AdamW8bit, min_8bit_size=0))
    theirs, _ = train(partial(bnb.optim.AdamW8bit, min_8bit_size=0))
    assert full > 0.95
    assert ours > full - 0.018
    assert theirs > full - 0.018
    sizes = [64 * 256, 256, 256 * 10, 10]
    assert most == sum(8 * n + 4 for n in sizes)
    assert few == sum(2 * n + 8 * -(-n // 256) for n in sizes)


def error_of_updates(
    codes: list[Tensor], size: int, scale: Tensor, steps: int = 400
) -> Tensor:
    """Store moments after each step; give the error of AdamW's update, per value.

    In units of the mean update. Gradients are noise of standard deviation ``scale``.
    """
    generator = torch.Generator().manual_seed(0)
    exact = [torch.zeros(len(scale)) for _ in codes]
    stored = [torch.zeros(len(scale)) for _ in codes]
    updates = []
    for _ in range(steps):
        g = torch.randn(len(scale), generator=generator) * scale
        for first, second in (exact, stored):
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.999).addcmul_(g, g, value=0.001)
        updates = [m / (v.sqrt() + 1e-8) for m, v in (exact, stored)]
        for i, code in enumerate(codes):
            new = quantize_blockwise(stored[i], code, size)
            stored[i] = dequantize_blockwise(*new, code, size)
    return (updates[1] - updates[0]).abs() / updates[0].abs().mean()


def test_an_outlier_spoils_its_block_instead_of_the_tensor() -> None:
    """Beside 1e4 the second moments are 1e-8 of the largest, and stored as 0."""
    scale = torch.ones(2048).index_fill(0, torch.tensor([77]), 1e4)
    blocks = error_of_updates(MAPS, 256, scale)
    whole = error_of_updates(MAPS, 2048, scale)
    assert blocks[256:].mean() < 0.05  # those in other blocks
    assert blocks[:77].mean() > 1
    assert whole[256:].mean() > 1


def test_a_linear_map_loses_small_values() -> None:
    """Of gradients over two decades, second moments over four: 255 steps have two."""
    torch.manual_seed(0)
    scale = 10 ** (-2 * torch.rand(2048))
    linear = [torch.linspace(-1, 1, 255), torch.linspace(0, 1, 256)]
    assert error_of_updates(MAPS, 256, scale).mean() < 0.1
    assert error_of_updates(linear, 256, scale).mean() > 1
    squares = scale.square()
    for code, least, most in ((MAPS[1], 0, 0), (linear[1], 500, 1000)):
        back = dequantize_blockwise(*quantize_blockwise(squares, code), code)
        assert least <= (back == 0).sum() <= most


def test_a_small_gradient_beside_a_large_one_takes_no_giant_step() -> None:
    """Its second moment, 1e-8 of the largest, is 0 for torchao, but not here.

    A step is at most ``lr`` times 0.1 / sqrt(0.001) for AdamW, so that thousands are
    none that it would ever take.
    """
    torchao = quiet_import("torchao.optim")
    last: dict[str, list[float]] = {}
    with torch.compiler.set_stance("force_eager"):
        for make in (AdamW, AdamW8bit, torchao.AdamW8bit):
            p, before = nn.Parameter(torch.zeros(4096)), torch.zeros(4096)
            gradient = torch.full((4096,), 1e-4)
            gradient[::256] = 1
            optimizer, steps = make([p], lr=1e-3, weight_decay=0.0), []
            for step in range(101):
                if step == 100:
                    gradient[1] = 0
                p.grad, before = gradient, p.detach().clone()
                optimizer.step()
                steps.append((before - p.detach())[1].item() / 1e-3)
            last[make.__module__.split(".")[0]] = steps
    assert max(abs(s - 1) for s in last["torch"][:100]) < 0.01
    assert max(last["torchao"][:100]) > 5
    assert last["torchao"][100] > 1000
    assert min(last["snippets"]) > 0
    assert max(last["snippets"]) < 1.1


def test_a_second_moment_is_stored_as_0_only_if_it_is() -> None:
    """And a state of torch's, too, where it is quantized to be taken over."""
    gradient = torch.zeros(512)
    gradient[[0, 1, 2, 300]] = torch.tensor([1.0, 1e-6, 1e-15, 1e-20])
    for make in (AdamW, partial(AdamW8bit, min_8bit_size=0)):
        p = nn.Parameter(torch.zeros(512))
        optimizer = make([p])
        p.grad = gradient
        optimizer.step()
        after = AdamW8bit([p], min_8bit_size=0)
        after.load_state_dict(optimizer.state_dict())
        stored = moments(after, p)[1].nonzero().flatten()
        assert stored.tolist() == [0, 1, 2, 300]


@pytest.mark.parametrize("make", [AdamW, partial(AdamW8bit, min_8bit_size=0)])
def test_a_second_moment_does_not_fall_relative_to_its_block(
    make: type[Optimizer],
) -> None:
    """A change of a thousandth is rounded back, as half a gap is more than that."""
    p = nn.Parameter(torch.zeros(256))
    optimizer = make([p])  # type: ignore[call-arg]
    gradient = torch.ones(256)
    for step in range(3000):
        if step == 100:
            gradient[1::2] = 0.01
        p.grad = gradient
        optimizer.step()
    if make is AdamW:
        stored = optimizer.state[p]["exp_avg_sq"]
        assert stored[1] < 0.01 * stored[0]
    else:
        stored = moments(optimizer, p)[1]
        assert stored[1] > 0.25 * stored[0]


# As an optimizer


def saved_and_loaded(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state through a file that holds no code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    result: dict[str, Any] = torch.load(file, weights_only=True)
    return result


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_run_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    """In 16 bits too, where torch casts codes and scales to the weight's dtype."""
    mine, theirs = twins(*SHAPES, dtype=dtype)
    groups: list[Any] = [{"params": mine[:2], "block_size": 128}, {"params": mine[2:]}]
    first = AdamW8bit(groups, lr=1e-3)
    take_steps(first, 5, noisy)
    first.param_groups[1]["block_size"] = 64  # for states that begin later
    for p, q in zip(mine, theirs, strict=True):
        q.data.copy_(p)
    again: list[Any] = [{"params": theirs[:2]}, {"params": theirs[2:]}]
    second = AdamW8bit(again, lr=1.0)
    saved = saved_and_loaded(first)
    second.load_state_dict(saved)
    assert second.param_groups[0]["block_size"] == 128
    for p, q in zip(mine, theirs, strict=True):
        for old, new in zip(
            tensors(first.state[p]), tensors(second.state[q]), strict=True
        ):
            assert old.dtype == new.dtype
            assert torch.equal(old, new)
            assert old.data_ptr() != new.data_ptr()
    for optimizer in (first, second):
        take_steps(optimizer, 5, noisy)
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


def test_torchs_own_loading_would_cast_the_codes() -> None:
    """What the override is for."""
    (mine, _) = twins((64, 64), dtype=torch.bfloat16)
    optimizer = AdamW8bit(mine)
    take_steps(optimizer, 1, noisy)
    saved = copy.deepcopy(optimizer.state_dict())
    Optimizer.load_state_dict(optimizer, saved)
    entry = optimizer.state[mine[0]]
    assert entry["exp_avg"].dtype == torch.bfloat16
    assert entry["absmax"]["exp_avg"].dtype == torch.bfloat16
    optimizer.load_state_dict(saved)
    assert optimizer.state[mine[0]]["exp_avg"].dtype == torch.uint8


def test_a_run_of_torchs_adamw_is_taken_over() -> None:
    """Its moments are quantized, its settings kept; the next steps stay close."""
    mine, theirs = twins((64, 64), (10,))
    before = AdamW(theirs, lr=1e-2, betas=(0.8, 0.99))
    take_steps(before, 20, noisy)
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q)
    after = AdamW8bit(mine)
    after.load_state_dict(saved_and_loaded(before))
    state, old = after.state[mine[0]], before.state[theirs[0]]
    assert (state["step"], after.param_groups[0]["betas"]) == (20, (0.8, 0.99))
    for moment, name in zip(
        moments(after, mine[0]), ("exp_avg", "exp_avg_sq"), strict=True
    ):
        bound = (9 / 1280 + 2**-22) * old[name].abs().max()
        assert ((moment - old[name]).abs() <= bound).all()
    assert torch.equal(
        after.state[mine[1]]["exp_avg"], before.state[theirs[1]]["exp_avg"]
    )
    start = theirs[0].detach().clone()
    for optimizer in (before, after):
        take_steps(optimizer, 10, noisy)
    moved, apart = (theirs[0] - start).norm(), (mine[0] - theirs[0]).norm()
    assert apart < 0.05 * moved
    assert torch.equal(mine[1], theirs[1])


def test_copies_and_hooks_work() -> None:
    """A deep copy goes on alike; a hook on loading may change the state."""
    mine, _ = twins((64, 64))
    optimizer = AdamW8bit(mine)
    take_steps(optimizer, 2, noisy)
    other = copy.deepcopy(optimizer)
    for each in (optimizer, other):
        take_steps(each, 2, noisy)
    (p,) = other.param_groups[0]["params"]
    assert torch.equal(p, mine[0])
    seen: list[str] = []

    def rename(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        entry = given["state"]["zero"]
        return {**given, "state": {0: entry}}

    saved = optimizer.state_dict()
    saved["state"] = {"zero": saved["state"][0]}
    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(saved)
    assert seen == ["pre"]
    new, old = other.state[p]["exp_avg"], optimizer.state[mine[0]]["exp_avg"]
    assert new.dtype == torch.uint8
    assert torch.equal(new, old)
    assert new.data_ptr() != old.data_ptr()


def test_pieces_of_a_parameter_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of blocks at a time gives the same bits; the last is short."""
    mine, theirs = twins((70, 130))
    take_steps(AdamW8bit(mine), 5, noisy)
    monkeypatch.setattr(eight_bit_optimizer, "_PIECE", 3 * 256)
    take_steps(AdamW8bit(theirs), 5, noisy)
    assert torch.equal(mine[0], theirs[0])


def test_strides_do_not_show() -> None:
    """Transposed and channels-last parameters keep their strides."""
    mine, theirs = twins((64, 100), (16, 32, 3, 3))
    mine[0].data = mine[0].data.t().contiguous().t()
    mine[1].data = mine[1].data.to(memory_format=torch.channels_last)
    strides = [p.stride() for p in mine]
    for params in (mine, theirs):
        take_steps(AdamW8bit(params), 5, noisy)
    assert [p.stride() for p in mine] == strides
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


def test_groups_gradients_and_closures() -> None:
    """What any optimizer does."""
    torch.manual_seed(0)
    a, b, c, frozen = (nn.Parameter(torch.randn(64, 64)) for _ in range(4))
    groups: list[Any] = [
        {"params": a, "lr": 0.5, "betas": (0.0, 0.5)},
        {"params": [("b", b)], "optim_bits": 32},
    ]
    optimizer = AdamW8bit(groups[:1], lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match="should be with/without names"):
        optimizer.add_param_group(groups[1])
    optimizer = AdamW8bit([{"params": [a], "lr": 0.5, "betas": (0.0, 0.5)}], lr=0.1)
    optimizer.add_param_group({"params": iter([b, frozen]), "optim_bits": 32})
    optimizer.add_param_group({"params": c, "block_size": 1024})
    empty = nn.Parameter(torch.empty(0, 5))
    optimizer.add_param_group({"params": [empty], "min_8bit_size": 0})
    before = a.detach().clone()
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(1)
        loss = sum((p.square().sum() for p in (a, b, c, empty)), torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    loss = optimizer.step(closure)
    assert calls == [1]
    assert isinstance(loss, float)
    assert frozen not in optimizer.state
    # First steps are lr * sign(gradient); a second moment of 0.5 of its square.
    expected = before * (1 - 0.5 * 1e-2) - 0.5 * before.sign()
    assert torch.allclose(a, expected, rtol=0, atol=1e-5)
    assert "absmax" not in optimizer.state[b]
    assert optimizer.state[c]["absmax"]["exp_avg"].shape == (4,)
    assert optimizer.state[empty]["exp_avg"].shape == (0, 5)
    optimizer.zero_grad()
    kept = a.detach().clone()
    assert optimizer.step() is None
    assert torch.equal(a, kept)
    assert optimizer.state[a]["step"] == 1
    assert not any(t.requires_grad for t in tensors(optimizer.state[a]))
    # A changed block size is for states that begin later.
    optimizer.param_groups[0]["block_size"] = 64
    take_steps(optimizer, 1, noisy)
    assert optimizer.state[a]["absmax"]["exp_avg"].shape == (16,)


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    """The weight is NaN at once, its block a step later, and no other block."""
    p = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([p])
    take_steps(
        optimizer,
        1,
        lambda *_: torch.ones(4096).index_fill(0, torch.tensor([300]), math.inf),
    )
    assert p.isnan().nonzero().flatten().tolist() == [300]
    take_steps(optimizer, 1, lambda *_: torch.ones(4096))
    assert p.isnan().nonzero().flatten().tolist() == list(range(256, 512))


def test_a_scaler_skips_the_step() -> None:
    """Where a scaled gradient is Inf the state stays as it was."""
    mine, _ = twins((64, 64))
    optimizer, scaler = AdamW8bit(mine), torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, math.inf, 1.0):
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        scaler.scale((mine[0] * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        same = str(optimizer.state_dict()) == str(before)
        assert same is (value == math.inf)
        assert mine[0].isfinite().all()
    assert optimizer.state[mine[0]]["step"] == 2


def test_half_weights_stall_and_main_params_do_not() -> None:
    """100 steps of 1e-4 from 1: BF16's neighbor below is 2**-8 away."""
    alone = nn.Parameter(torch.ones(64, 64).bfloat16())
    optimizer = AdamW8bit([alone], lr=1e-4, weight_decay=0.0)
    take_steps(optimizer, 100, lambda *_: torch.ones(64, 64))
    assert alone.eq(1).all()
    wrapped = nn.Parameter(torch.ones(64, 64).bfloat16())
    main = MainParams(AdamW8bit([wrapped], lr=1e-4, weight_decay=0.0))
    take_steps(main, 100, lambda *_: torch.ones(64, 64))
    assert wrapped.float().mean().item() == pytest.approx(0.99, abs=2**-8)
    other = nn.Parameter(wrapped.detach().clone())
    resumed = MainParams(AdamW8bit([other], lr=1e-4, weight_decay=0.0))
    resumed.load_state_dict(saved_and_loaded(main))
    for each in (main, resumed):
        take_steps(each, 50, noisy)
    assert torch.equal(
        *(m.main_params[p] for m, p in ((main, wrapped), (resumed, other)))
    )


def test_bytes_are_two_a_parameter_and_temporaries_have_a_bound() -> None:
    """By the ledger: of float32 moments there are never more than a piece's."""
    found = []
    for rows in (2048, 8192):
        p = nn.Linear(1024, rows, bias=False)
        optimizer = AdamW8bit(p.parameters())
        for _ in range(2):
            p.weight.grad = torch.ones_like(p.weight)
            with MemoryLedger(p, optimizer) as ledger:
                optimizer.step()
        n = 1024 * rows
        assert ledger.moments["end"]["optimizer"] == 2 * n + 8 * n // 256
        found.append(ledger.moments["step"]["other"])
    assert found[0] == found[1] < 40 * 2**20


def test_fake_tensors_have_a_state_too() -> None:
    """So a model can be measured before there is memory for it."""
    with FakeTensorMode():
        model = nn.Linear(2000, 5000)
        optimizer = AdamW8bit(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        held = sum(t.nbytes for s in optimizer.state.values() for t in tensors(s))
    assert held == 2 * 10**7 + 8 * -(-(10**7) // 256) + 2 * 5000 + 8 * 20


class Module(lightning.LightningModule):
    """One layer that is large enough."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.seen: list[torch.dtype] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Square the outputs."""
        loss: Tensor = self.layer(batch[0]).square().mean()
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Note the dtype of the codes."""
        states = self.trainer.optimizers[0].state
        self.seen.append(states[self.layer.weight]["exp_avg"].dtype)

    def configure_optimizers(self) -> AdamW8bit:
        """The one under test."""
        return AdamW8bit(self.parameters(), lr=1e-2)


@pytest.fixture
def quiet() -> Iterator[dict[str, Any]]:
    """Arguments of a Trainer that says nothing, and a quiet logger while it runs.

    Yields:
        The arguments.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    logger.setLevel(level)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_trainer_saves_and_resumes(
    precision: Literal["32-true", "bf16-true"], quiet: dict[str, Any], tmp_path: Path
) -> None:
    """Four epochs in one go, and in two, end with the same bits."""
    torch.manual_seed(0)
    start = Module().state_dict()
    data = DataLoader(TensorDataset(torch.randn(32, 64)), batch_size=8)

    def fit(epochs: int, file: object = None) -> Module:
        module = Module()
        module.load_state_dict(start)
        trainer = lightning.Trainer(
            precision=precision,
            max_epochs=epochs,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **quiet,
        )
        trainer.fit(module, data, ckpt_path=file, weights_only=True)  # type: ignore[arg-type]
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    whole = fit(4)
    fit(2)
    halves = fit(4, tmp_path / "last.ckpt")
    assert set(whole.seen + halves.seen) == {torch.uint8}
    assert len(halves.seen) == 8
    assert torch.equal(whole.layer.weight, halves.layer.weight)


def test_fabric_steps_and_saves(tmp_path: Path) -> None:
    """With a scaler on float16, and through Fabric's own files."""
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    layer = nn.Linear(64, 64)
    model, optimizer = fabric.setup(layer, AdamW8bit(layer.parameters(), lr=1e-2))
    for _ in range(3):
        fabric.backward(model(torch.ones(4, 64)).square().mean())
        optimizer.step()
    fabric.save(tmp_path / "state", {"model": model, "optimizer": optimizer})
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step()
    fabric.load(tmp_path / "state", {"model": model, "optimizer": optimizer})
    after = optimizer.state_dict()["state"]
    for old, new in zip(tensors(before), tensors(after), strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(old, new)


# Errors

ONE = torch.ones(10)
CODES, ABSMAX = quantize_blockwise(ONE)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"x": ONE.double()}, TypeError, "x must be torch.float32 or .* torch.float64"),
        ({"x": ONE.int()}, TypeError, "x must be .*, got torch.int32"),
        ({"x": ONE.to(torch.complex64)}, TypeError, "x must be .* torch.complex64"),
        ({"lookup": "nearst"}, ValueError, "got 'nearst'; did you mean 'nearest'"),
        ({"lookup": 7}, ValueError, r"lookup must be one of \(.*\), got 7$"),
        ({"block_size": 0}, ValueError, "block_size must be an integer >= 1, got 0"),
        ({"block_size": 2.5}, ValueError, "block_size must be an integer .* got 2.5"),
        ({"code": ONE.double()}, TypeError, "code must be torch.float32, got"),
        ({"code": ONE[:1]}, ValueError, r"code must be 2 to 256 values, got \(1,\)"),
        ({"code": ONE.view(2, 5)}, ValueError, r"code must be .*, got \(2, 5\)"),
        ({"code": torch.tensor([0.5, 0.0, 1.0])}, ValueError, "code must ascend"),
        ({"code": torch.tensor([0.0, 2.0])}, ValueError, "lie between -1 and 1"),
        ({"code": torch.tensor([0.0, math.nan, 1.0])}, ValueError, "must ascend"),
    ],
)
def test_bad_arguments_are_refused_in_words(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    """Each by its name, with what was given and what is allowed."""
    with pytest.raises(error, match=match):
        quantize_blockwise(**{"x": ONE, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"codes": CODES.int()}, TypeError, "codes must be torch.uint8, got"),
        ({"absmax": ABSMAX.double()}, TypeError, "absmax must be torch.float32, got"),
        ({"dtype": torch.int8}, TypeError, "dtype must be torch.float32 .* torch.int8"),
        ({"block_size": 4}, ValueError, r"3 blocks need absmax of shape \(3,\), got"),
        ({"block_size": -1}, ValueError, "block_size must be an integer >= 1, got -1"),
        ({"code": ONE[:1]}, ValueError, "code must be 2 to 256 values"),
    ],
)
def test_bad_codes_are_refused_in_words(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    """The same on the way back."""
    with pytest.raises(error, match=match):
        dequantize_blockwise(**{"codes": CODES, "absmax": ABSMAX, **arguments})


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be finite and >= 0, got nan"),
        ({"eps": math.inf}, "eps must be finite and >= 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"min_8bit_size": -1}, "min_8bit_size must be an integer >= 0, got -1"),
        ({"optim_bits": 4}, "optim_bits must be 8 or 32, got 4"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_words(setting: dict[str, Any], match: str) -> None:
    """By the constructor, and for a group, which is then not added."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=match):
        AdamW8bit([p], **setting)
    optimizer = AdamW8bit([p])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [q], **setting})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_and_sharded_tensors_are_refused(dtype: torch.dtype) -> None:
    """Before a group is added."""
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    with pytest.raises(TypeError, match=f"parameters must be .*, got {dtype}"):
        AdamW8bit([p])
    optimizer = AdamW8bit([("one", nn.Parameter(torch.ones(4)))])
    with pytest.raises(TypeError, match="parameters must be"):
        optimizer.add_param_group({"params": [("two", p)]})
    assert len(optimizer.param_groups) == 1
    sharded = nn.Parameter(torch.ones(4))
    sharded.to_local = lambda: sharded  # type: ignore[attr-defined]  # as a DTensor has
    with pytest.raises(TypeError, match="no DTensor"):
        AdamW8bit([sharded])
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW8bit([])


def test_a_model_that_became_float64_is_refused() -> None:
    """Its updates would be rounded to float32; float16 and bfloat16 go on."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = AdamW8bit(model.parameters(), min_8bit_size=0)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model.to(dtype).zero_grad()
        model(torch.ones(1, 8, dtype=dtype)).sum().backward()
        if dtype != torch.float64:
            optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"parameters must be .*, got torch\.float64"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {state["step"] for state in optimizer.state.values()} == {2}


def test_sparse_gradients_are_refused() -> None:
    """Before any parameter is changed."""
    p, table = nn.Parameter(torch.ones(4)), nn.Embedding(9, 3, sparse=True)
    optimizer = AdamW8bit([p, table.weight])
    (table(torch.tensor([1])).sum() + p.sum()).backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert p.eq(1).all()
    assert not optimizer.state


def test_states_that_do_not_fit_are_refused() -> None:
    """In words, and the state before is still there."""
    mine, theirs = twins((64, 64))
    optimizer = AdamW8bit(mine)
    take_steps(optimizer, 1, noisy)
    before = copy.deepcopy(optimizer.state_dict())

    def refused(saved: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)
        assert str(optimizer.state_dict()) == str(before)

    for make, match in (
        (partial(AdamW, amsgrad=True), "a state with amsgrad=True cannot be continued"),
        (partial(AdamW, maximize=True), "a state with maximize=True cannot"),
        (Adam, "a state with decoupled_weight_decay=False cannot"),
        (torch.optim.SGD, "parameter 0 needs state .*, got"),
        (bnb.optim.AdamW8bit, "parameter 0 needs state"),
    ):
        other = make(theirs)
        take_steps(other, 1, noisy)
        if make is torch.optim.SGD:
            other.state[theirs[0]]["momentum_buffer"] = torch.zeros(64, 64)
        refused(other.state_dict(), match)
    for shape in ((32, 128), (64, 65)):
        for make in (AdamW, AdamW8bit):
            q = nn.Parameter(torch.ones(shape))
            other = make([q])
            take_steps(other, 1, noisy)
            refused(other.state_dict(), r"exp_avg of parameter 0 is .*\(64, 64\)")
    cast = copy.deepcopy(before)
    cast["state"][0]["exp_avg"] = cast["state"][0]["exp_avg"].bfloat16()
    refused(cast, r"is torch.bfloat16 \(64, 64\), not torch.uint8 \(64, 64\)")
    fewer = copy.deepcopy(before)
    fewer["state"][0]["absmax"]["exp_avg_sq"] = torch.zeros(3)
    refused(fewer, r"exp_avg_sq of parameter 0 is torch.float32 \(3,\), not .* \(16,\)")
    for name, value, match in (
        ("step", -1, "step of parameter 0 must be >= 0, got -1"),
        ("step", math.nan, "step of parameter 0 must be >= 0, got nan"),
        ("block_size", 0, "block_size of parameter 0 must be an integer >= 1, got 0"),
        ("absmax", {}, r"absmax of parameter 0 must be of .*, got \[\]"),
    ):
        wrong = copy.deepcopy(before)
        wrong["state"][0][name] = value
        refused(wrong, match)
    refused({**before, "param_groups": before["param_groups"] * 2}, "different number")
