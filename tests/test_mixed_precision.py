"""Tests of snippets/mixed_precision.py, as read in guide/mixed_precision."""

import io
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import lightning.fabric.plugins
import lightning.pytorch.plugins
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from snippets.mixed_precision import MixedPrecisionStep, StepResult

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def digits(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn, shuffled once, pixels in [0, 1]."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.manual_seed(0))
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    return x.to(device), torch.tensor(data.target)[order].to(device)


def network(device: str = "cpu") -> nn.Sequential:
    """The same 64-32-10 network each time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return net.to(device)


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, Tensor]]:
    """Copies of every parameter and every tensor of the optimizer's state."""
    tensors = list(model.state_dict().items())
    for index, entry in optimizer.state_dict()["state"].items():
        tensors += [(f"{index}.{name}", value) for name, value in entry.items()]
    return [(name, value.clone()) for name, value in tensors]


def assert_same(a: list[tuple[str, Tensor]], b: list[tuple[str, Tensor]]) -> None:
    """Both have the same names and the same bits."""
    assert [name for name, _ in a] == [name for name, _ in b]
    for (name, left), (_, right) in zip(a, b, strict=True):
        assert torch.equal(left, right), name


class FloorScaler(torch.amp.GradScaler):
    """A scale that never falls below 1, so that its fall cannot reveal a skip."""

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Update, then raise the scale to 1."""
        super().update(new_scale)
        assert self._scale is not None
        self._scale.clamp_(min=1.0)


# Exact laws.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hand_written_grad_scaler_loop_gives_the_same_bits(
    dtype: torch.dtype, window: int, device: str
) -> None:
    """Over 30 batches, with skips, growth and clipping, every trace is equal."""
    x, y = digits(device)

    def batch(i: int) -> tuple[Tensor, Tensor]:
        # Batch 10 overflows float16 in the first layer's gradient, not in the forward.
        factor = 3e4 if i == 10 else 1.0
        return factor * x[16 * i : 16 * i + 16], y[16 * i : 16 * i + 16]

    def make() -> tuple[nn.Module, AdamW, LambdaLR, torch.amp.GradScaler]:
        model = network(device)
        optimizer = AdamW(model.parameters(), lr=0.01)
        scheduler = LambdaLR(optimizer, lambda n: 0.9**n)
        scaler = torch.amp.GradScaler(
            device,
            init_scale=2.0**22,
            growth_interval=4,
            enabled=dtype == torch.float16,
        )
        return model, optimizer, scheduler, scaler

    model, optimizer, scheduler, scaler = make()
    by_hand: list[tuple[bool, float, float]] = []
    for i in range(30):
        inputs, targets = batch(i)
        with torch.autocast(
            device, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=True
        ):
            loss = F.cross_entropy(model(inputs), targets)
        torch.autograd.backward(scaler.scale(loss))
        if (i + 1) % window:
            continue
        scaler.unscale_(optimizer)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= window
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        ran: list[bool] = []
        hook = optimizer.register_step_post_hook(lambda *_, ran=ran: ran.append(True))
        scaler.step(optimizer)
        hook.remove()
        scaler.update()
        optimizer.zero_grad()
        if ran:
            scheduler.step()
        by_hand.append((
            bool(ran),
            float(scheduler.get_last_lr()[0]),
            scaler.get_scale(),
        ))
        assert bool(ran) == math.isfinite(norm.item())
    expected = state_of(model, optimizer)

    model, optimizer, scheduler, scaler = make()
    step = MixedPrecisionStep(
        optimizer,
        dtype=dtype,
        accumulate_grad_batches=window,
        max_norm=0.5,
        scheduler=scheduler,
        scaler=scaler if dtype == torch.float16 else None,
    )
    ours: list[tuple[bool, float, float]] = []
    for i in range(30):
        inputs, targets = batch(i)
        with step.autocast():
            loss = F.cross_entropy(model(inputs), targets)
        result = step(loss)
        if result.stepped or result.skipped:
            ours.append((result.stepped, float(scheduler.get_last_lr()[0]), step.scale))

    assert ours == by_hand
    assert_same(state_of(model, optimizer), expected)
    # The trace is worth comparing: in float16 it holds skips and growth.
    if dtype == torch.float16:
        assert step.skipped_steps > 0
        scales = [scale for _, _, scale in ours]
        assert any(b > a for a, b in itertools.pairwise(scales))


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (8, 4, 4), (2, 6, 8)], ids=str)
def test_a_window_is_one_big_batch(sizes: tuple[int, ...]) -> None:
    """Where float32 arithmetic is exact, the update equals that of the whole batch.

    Small integers in, integer weights, and divisions by powers of two only: nothing
    rounds, so that the order of the sums does not matter.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (16, 8), generator=generator).float()
    start = torch.randint(-2, 3, (1, 8), generator=generator).float()

    def update(parts: tuple[int, ...]) -> Tensor:
        layer = nn.Linear(8, 1, bias=False)
        layer.weight.data.copy_(start)
        step = MixedPrecisionStep(
            SGD(layer.parameters(), lr=1.0),
            dtype=torch.float32,
            accumulate_grad_batches=len(parts),
        )
        for part in torch.split(x, list(parts)):
            with step.autocast():
                loss = layer(part).square().mean()
            result = step(loss, weight=len(part) / 4)
        assert result.stepped
        return layer.weight.detach()

    assert torch.equal(update(sizes), update((16,)))


def test_a_window_is_one_big_batch_up_to_rounding() -> None:
    """On real data both updates lie within the error bound of a float32 mean.

    The gradient of mean(x @ w) is the mean of x. Either order of summing n terms and
    dividing errs by at most (n + 2) u mean|x|, with u = 2**-24 the unit roundoff
    (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """
    x, _ = digits()
    x = x[:96] + 0.1

    def gradient(parts: int) -> Tensor:
        layer = nn.Linear(64, 1, bias=False)
        nn.init.zeros_(layer.weight)
        step = MixedPrecisionStep(
            SGD(layer.parameters(), lr=1.0),
            dtype=torch.float32,
            accumulate_grad_batches=parts,
        )
        for part in x.chunk(parts):
            step(layer(part).mean())
        return -layer.weight.detach().double()

    exact = x.double().mean(0)
    bound = (96 + 2) * 2**-24 * x.double().abs().mean(0)

    assert ((gradient(1) - exact).abs() <= bound).all()
    assert ((gradient(6) - exact).abs() <= bound).all()


def test_flush_divides_by_the_micro_batches_that_came() -> None:
    """Three of four micro-batches give the mean over three, exactly."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    step = MixedPrecisionStep(
        SGD(layer.parameters(), lr=1.0), dtype=torch.float32, accumulate_grad_batches=4
    )
    assert step.flush() is None
    for value in (1.0, 2.0, 6.0):
        result = step(layer(torch.tensor([[value]])).mean())
        assert result == StepResult(stepped=False, skipped=False, grad_norm=None)
    assert (step.micro_batches, layer.weight.item()) == (3, 0.0)

    assert step.flush() == StepResult(stepped=True, skipped=False, grad_norm=3.0)
    assert layer.weight.item() == -3.0
    assert (step.micro_batches, step.flush()) == (0, None)


@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**12])
def test_the_scale_does_not_change_the_update(scale: float) -> None:
    """A power of two that neither over- nor underflows leaves every bit as it is."""
    x, y = digits()
    # Every partial product must stay normal in float16 for this to be exact.
    x, y = (x[:4] > 0.5).float(), y[:4]

    def update(scale: float) -> list[tuple[str, Tensor]]:
        model = nn.Linear(64, 10)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        step = MixedPrecisionStep(
            optimizer, dtype=torch.float16, max_norm=0.25, scaler=scaler
        )
        with step.autocast():
            loss = F.cross_entropy(model(x), y)
        assert step(loss).stepped
        return state_of(model, optimizer)

    assert_same(update(scale), update(16.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_clipped_gradient_has_max_norm(dtype: torch.dtype) -> None:
    """The optimizer sees norm * max_norm / (norm + 1e-6); the result reports norm.

    The 1e-6 is torch's. The factor and each product round once in float32, and the
    norm of n numbers errs by at most (n / 2 + 2) u.
    """
    x, y = digits()
    model = network()
    # Two groups: the norm is that of both together.
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    optimizer = SGD(groups, lr=1.0)
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(
            p.grad.double() for p in model.parameters() if p.grad is not None
        )
    )
    step = MixedPrecisionStep(optimizer, dtype=dtype, max_norm=0.125)
    with step.autocast():
        loss = F.cross_entropy(model(x[:64]), y[:64])

    result = step(loss)

    count = sum(grad.numel() for grad in seen)
    norm = math.sqrt(sum(grad.square().sum().item() for grad in seen))
    assert result.grad_norm is not None
    assert result.grad_norm > 0.125
    expected = 0.125 * result.grad_norm / (result.grad_norm + 1e-6)
    assert abs(norm - expected) <= (count / 2 + 4) * 2**-24 * expected


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_skipped_step_leaves_no_trace(
    dtype: torch.dtype, bad: float, fused: bool
) -> None:
    """Parameters, moments, step counts and learning rate keep their bits."""
    x, y = digits()
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    scheduler = LambdaLR(optimizer, lambda n: 0.5**n)
    step = MixedPrecisionStep(
        optimizer,
        dtype=dtype,
        scheduler=scheduler,
        accumulate_grad_batches=2,
        max_norm=1.0,
    )

    def window(factor: float) -> StepResult:
        for part in range(2):
            with step.autocast():
                loss = F.cross_entropy(model(x[:32]), y[:32])
            result = step(loss * factor if part == 0 else loss)
        return result

    assert window(1.0).stepped
    before, rate, scale = (
        state_of(model, optimizer),
        scheduler.get_last_lr(),
        step.scale,
    )

    result = window(bad)

    assert (result.stepped, result.skipped) == (False, True)
    assert result.grad_norm is not None
    assert not math.isfinite(result.grad_norm)
    assert_same(state_of(model, optimizer), before)
    assert scheduler.get_last_lr() == rate
    assert step.scale == (scale / 2 if dtype == torch.float16 else 1.0)
    assert (step.optimizer_steps, step.skipped_steps, step.skips_in_a_row) == (1, 1, 1)
    assert all(p.grad is None for p in model.parameters())
    assert window(1.0).stepped
    assert (step.optimizer_steps, step.skipped_steps, step.skips_in_a_row) == (2, 1, 0)


def test_a_skip_is_seen_at_a_floor_of_the_scale() -> None:
    """Where the scale cannot fall, comparing it before and after sees no skip."""
    layer = nn.Linear(1, 1)
    optimizer = SGD(layer.parameters(), lr=1.0)
    scaler = FloorScaler("cpu", init_scale=1.0)
    step = MixedPrecisionStep(optimizer, dtype=torch.float16, scaler=scaler)

    result = step(layer(torch.tensor([[math.inf]])).mean())

    assert (result.skipped, step.scale) == (True, 1.0)


def test_scheduler_and_optimizer_count_the_same_steps() -> None:
    """However many steps overflow, the schedule moves once for each real one."""
    x, y = digits()
    model = network()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = LambdaLR(optimizer, lambda n: 1 / (1 + n))
    ran: list[bool] = []
    optimizer.register_step_post_hook(lambda *_: ran.append(True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)
    step = MixedPrecisionStep(
        optimizer, dtype=torch.float16, scheduler=scheduler, scaler=scaler
    )
    for i in range(20):
        with step.autocast():
            loss = F.cross_entropy(model(x[i * 32 :][:32]), y[i * 32 :][:32])
        step(loss)

    assert step.skipped_steps > 1
    assert step.optimizer_steps == len(ran) == 20 - step.skipped_steps
    assert scheduler.get_last_lr() == [1 / (1 + len(ran))]


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_has_the_same_bits(dtype: torch.dtype, stop: int) -> None:
    """Saved after any micro-batch, within a window too, as if never interrupted."""
    x, y = digits()

    def make() -> tuple[nn.Module, AdamW, LambdaLR, MixedPrecisionStep]:
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.01)
        scheduler = LambdaLR(optimizer, lambda n: 0.9**n)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
        step = MixedPrecisionStep(
            optimizer,
            dtype=dtype,
            accumulate_grad_batches=3,
            scheduler=scheduler,
            scaler=scaler if dtype == torch.float16 else None,
        )
        return model, optimizer, scheduler, step

    def train(parts: tuple[Any, ...], batches: range) -> None:
        model, *_, step = parts
        for i in batches:
            with step.autocast():
                loss = F.cross_entropy(model(x[i * 32 :][:32]), y[i * 32 :][:32])
            step(loss)

    whole = make()
    train(whole, range(16))
    first = make()
    train(first, range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = make()
    states = torch.load(file, weights_only=True)
    parts: tuple[Any, ...] = second
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    train(second, range(stop, 16))

    assert_same(state_of(*second[:2]), state_of(*whole[:2]))
    assert second[3].state_dict()["scaler"] == whole[3].state_dict()["scaler"]
    assert second[3].optimizer_steps == whole[3].optimizer_steps
    assert second[3].skipped_steps == whole[3].skipped_steps
    assert second[2].get_last_lr() == whole[2].get_last_lr()
    assert (whole[3].skipped_steps > 0) == (dtype == torch.float16)


def test_a_saved_state_does_not_change_with_the_run() -> None:
    """The gradients of an open window are copied out, and copied in."""
    layer = nn.Linear(1, 1, bias=False)
    step = MixedPrecisionStep(
        SGD(layer.parameters()), dtype=torch.float32, accumulate_grad_batches=4
    )
    step(layer(torch.ones(1, 1)).mean())
    state = step.state_dict()
    step(layer(torch.ones(1, 1)).mean())
    assert state["grads"][0].item() == 1.0

    step.load_state_dict(state)
    step(layer(torch.ones(1, 1)).mean())
    assert state["grads"][0].item() == 1.0


@pytest.mark.parametrize("enabled", [False, True])
def test_no_outer_autocast_keeps_old_weights(enabled: bool) -> None:
    """Each forward pass sees the weights of the last step, though autocast caches.

    The cache is emptied when the outermost autocast ends, a disabled one included.
    """
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    step = MixedPrecisionStep(SGD(layer.parameters(), lr=1.0), dtype=torch.bfloat16)
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        for _ in range(3):
            with step.autocast():
                loss = layer(torch.ones(1, 1)).mean()
            seen.append(loss.item())
            with torch.autocast("cpu", enabled=False):
                step(loss)

    assert seen == [1.0, 0.0, -1.0]


# Formulas of the page.


@pytest.mark.parametrize("shift", [0, 10, 16, 24])
def test_scaling_shifts_the_window_of_float16(shift: int) -> None:
    """Scaled by 2**k, g survives iff 2**(-25-k) < g < 65520 / 2**k (powers of two).

    2**-25 is half of the smallest float16, a tie that goes to zero; 65520 is halfway
    from the largest float16 to the next power of two.
    """
    for exponent in range(-60, 20):
        g = torch.tensor(2.0**exponent)
        through = (g * 2**shift).half().float() / 2**shift

        survives = bool(through == g)

        assert survives == (2.0 ** (-25 - shift) < g < 65520 / 2**shift)


# Oracle: the same run by Lightning's own plugin.


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_fabric_trains_to_the_same_bits(
    precision: Literal["16-mixed", "bf16-mixed"],
) -> None:
    """Fabric with Lightning's MixedPrecision plugin, clipping, and an overflow."""
    x, y = digits()
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16

    def scaler() -> torch.amp.GradScaler | None:
        if dtype == torch.bfloat16:
            return None
        return torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=4)

    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    plugin = lightning.fabric.plugins.MixedPrecision(precision, "cpu", scaler())
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    for i in range(20):
        loss = F.cross_entropy(wrapped(x[i * 32 :][:32]), y[i * 32 :][:32])
        fabric.backward(loss)
        fabric.clip_gradients(
            wrapped, wrapped_optimizer, max_norm=0.5, error_if_nonfinite=False
        )
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
    expected = state_of(model, optimizer)

    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    step = MixedPrecisionStep(optimizer, dtype=dtype, max_norm=0.5, scaler=scaler())
    for i in range(20):
        with step.autocast():
            loss = F.cross_entropy(model(x[i * 32 :][:32]), y[i * 32 :][:32])
        step(loss)

    assert_same(state_of(model, optimizer), expected)
    assert (step.skipped_steps > 0) == (dtype == torch.float16)


class Classifier(L.LightningModule):
    """The network of these tests, for Lightning's Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of one batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> AdamW:
        """AdamW, as in the other tests."""
        return AdamW(self.parameters(), lr=0.01)


# Lightning suggests more workers and calls torch's own renamed pytree class.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    ("precision", "window"), [("16-mixed", 1), ("bf16-mixed", 1), ("bf16-mixed", 2)]
)
def test_trainer_trains_to_the_same_bits(
    precision: Literal["16-mixed", "bf16-mixed"], window: int
) -> None:
    """Trainer divides the loss by the window before backward; in bfloat16 by 2 exactly.

    In float16 that division can round a subnormal gradient, hence only window 1.
    """
    x, y = digits()
    data = torch.utils.data.TensorDataset(x[:640], y[:640])
    loader = torch.utils.data.DataLoader(data, batch_size=32)
    half = precision == "16-mixed"
    dtype = torch.float16 if half else torch.bfloat16

    def scaler() -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler("cpu", init_scale=2.0**22) if half else None

    module = Classifier()
    plugin = lightning.pytorch.plugins.MixedPrecision(precision, "cpu", scaler())
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        plugins=[plugin],
        gradient_clip_val=0.5,
        accumulate_grad_batches=window,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module, loader)

    model = network()
    step = MixedPrecisionStep(
        AdamW(model.parameters(), lr=0.01),
        dtype=dtype,
        max_norm=0.5,
        accumulate_grad_batches=window,
        scaler=scaler(),
    )
    for inputs, targets in loader:
        with step.autocast():
            loss = F.cross_entropy(model(inputs), targets)
        step(loss)

    assert_same(list(module.net.state_dict().items()), list(model.state_dict().items()))
    assert (step.skipped_steps > 0) == half


# Training.


def test_float16_without_a_scaler_loses_what_it_keeps_with_one() -> None:
    """With a loss that is normalized by 2**24 samples, only the scaler trains digits.

    Without it at most half of the held-out digits are right (guessing: a tenth), with
    it at least nine tenths, and as many as in float32 give or take one in fifty.
    """
    x, y = digits()
    total = 2**24

    def accuracy(train: Callable[[nn.Module, SGD], Callable[[Tensor], Any]]) -> float:
        model = network()
        # The loss is total / 128 times smaller than a mean: so much larger the rate.
        optimizer = SGD(model.parameters(), lr=0.5 * total / 128)
        one_step = train(model, optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(120):
            one_step(torch.randint(1437, (128,), generator=generator))
        with torch.no_grad():
            hits = model(x[1437:]).argmax(1) == y[1437:]
        return float(hits.double().mean())

    def plain(model: nn.Module, optimizer: SGD) -> Callable[[Tensor], None]:
        def one_step(rows: Tensor) -> None:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(x[rows]), y[rows], reduction="sum") / total
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        return one_step

    def scaled(
        dtype: torch.dtype,
    ) -> Callable[[nn.Module, SGD], Callable[[Tensor], None]]:
        def train(model: nn.Module, optimizer: SGD) -> Callable[[Tensor], None]:
            step = MixedPrecisionStep(optimizer, dtype=dtype)

            def one_step(rows: Tensor) -> None:
                with step.autocast():
                    logits = model(x[rows])
                    loss = F.cross_entropy(logits, y[rows], reduction="sum") / total
                step(loss)

            return one_step

        return train

    reference = accuracy(scaled(torch.float32))

    assert accuracy(plain) < 0.5
    assert reference > 0.9
    assert abs(accuracy(scaled(torch.float16)) - reference) < 0.02
    assert abs(accuracy(scaled(torch.bfloat16)) - reference) < 0.02


# Errors.


def sgd(dtype: torch.dtype = torch.float32) -> SGD:
    """An optimizer of one parameter."""
    return SGD([nn.Parameter(torch.ones(2, dtype=dtype))], lr=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16", None])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    """What autocast cannot compute in, and what is not a dtype at all."""
    with pytest.raises(ValueError, match=r"dtype must be one of \(torch\.float16, "):
        MixedPrecisionStep(sgd(), dtype=dtype)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_must_be_float32(stored: torch.dtype) -> None:
    """Half the storage is another technique; a frozen half parameter is fine."""
    with pytest.raises(TypeError, match=rf"shape \(2,\) is {stored}; mixed precision"):
        MixedPrecisionStep(sgd(dtype=stored), dtype=torch.float16)

    frozen = nn.Parameter(torch.ones(2, dtype=stored), requires_grad=False)
    optimizer = SGD([nn.Parameter(torch.ones(2)), frozen], lr=1.0)
    assert MixedPrecisionStep(optimizer, dtype=torch.bfloat16).device_type == "cpu"


def test_parameters_must_share_a_device() -> None:
    """Autocast acts on one type of device."""
    mixed = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))]
    with pytest.raises(
        ValueError, match=r"one type of device, found \['cpu', 'meta'\]"
    ):
        MixedPrecisionStep(SGD(mixed), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["accumulate_grad_batches", "max_consecutive_skips"])
@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None])
def test_counts_start_at_one(name: str, count: int) -> None:
    """Nothing is rounded on the way."""
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1"):
        MixedPrecisionStep(
            sgd(),
            dtype=torch.bfloat16,
            accumulate_grad_batches=count if name[0] == "a" else 1,
            max_consecutive_skips=count if name[0] == "m" else 1,
        )


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, "1"])
def test_max_norm_is_positive(max_norm: float) -> None:
    """A norm of 0 would stop the training without a word."""
    with pytest.raises(ValueError, match="max_norm must be positive or None"):
        MixedPrecisionStep(sgd(), dtype=torch.bfloat16, max_norm=max_norm)


def test_optimizers_and_schedulers_that_need_more_are_refused() -> None:
    """A closure, a metric, another optimizer's schedule; what is no optimizer."""
    optimizer = sgd()
    with pytest.raises(TypeError, match=r"optimizer must be of .*, got list"):
        MixedPrecisionStep([], dtype=torch.float16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS computes the loss several times"):
        MixedPrecisionStep(
            torch.optim.LBFGS([nn.Parameter(torch.ones(1))]), dtype=torch.float16
        )
    with pytest.raises(TypeError, match="ReduceLROnPlateau needs a metric"):
        MixedPrecisionStep(
            optimizer, dtype=torch.float16, scheduler=ReduceLROnPlateau(optimizer)
        )
    with pytest.raises(ValueError, match="scheduler belongs to another optimizer"):
        MixedPrecisionStep(
            optimizer, dtype=torch.float16, scheduler=LambdaLR(sgd(), lambda _: 1.0)
        )


def test_a_scaler_goes_with_float16_and_is_enabled() -> None:
    """A scaler in bfloat16 and one that switched itself off are both mistakes."""
    with pytest.raises(ValueError, match=r"bfloat16 has the range of float32"):
        MixedPrecisionStep(
            sgd(), dtype=torch.bfloat16, scaler=torch.amp.GradScaler("cpu")
        )
    with pytest.raises(ValueError, match=r"scaler is disabled.*GradScaler\('cpu'\)"):
        MixedPrecisionStep(
            sgd(),
            dtype=torch.float16,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
        )


def test_a_call_within_autocast_changes_nothing() -> None:
    """Backward in autocast is refused before it runs."""
    layer = nn.Linear(1, 1)
    step = MixedPrecisionStep(SGD(layer.parameters()), dtype=torch.bfloat16)
    with step.autocast():
        loss = layer(torch.ones(1, 1)).mean()
        with pytest.raises(RuntimeError, match="called inside autocast"):
            step(loss)

    assert (layer.weight.grad, step.micro_batches) == (None, 0)
    assert step(loss).stepped


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (1.0, "float"),
        (None, "NoneType"),
        (torch.ones(2), r"shape \(2,\)"),
        (torch.ones(0), r"shape \(0,\)"),
    ],
)
def test_a_loss_is_one_number(loss: Any, got: str) -> None:  # noqa: ANN401
    """Anything else is told with its shape or type, before the backward pass."""
    step = MixedPrecisionStep(sgd(), dtype=torch.float16)
    with pytest.raises(ValueError, match=f"a tensor of one element, got {got}"):
        step(loss)
    assert step.micro_batches == 0


def test_sparse_gradients_are_refused_before_the_step() -> None:
    """Torch computes no norm of them."""
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.clone()
    step = MixedPrecisionStep(SGD(table.parameters(), lr=1.0), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="a gradient is sparse, and has no norm"):
        step(table(torch.tensor([1])).sum())
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan, "1"])
def test_weights_are_positive_and_finite(weight: float) -> None:
    """And refused before the backward pass."""
    layer = nn.Linear(1, 1)
    step = MixedPrecisionStep(SGD(layer.parameters()), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="weight must be positive and finite"):
        step(layer(torch.ones(1, 1)).mean(), weight=weight)
    assert (layer.weight.grad, step.micro_batches) == (None, 0)


def test_a_loss_from_elsewhere_is_refused() -> None:
    """Another device, as after moving the model; another model."""
    layer = nn.Linear(1, 1)
    step = MixedPrecisionStep(sgd(), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="loss is on 'meta', but the parameters"):
        step(torch.zeros((), device="meta"))
    with pytest.raises(RuntimeError, match="no parameter of the optimizer received"):
        step(layer(torch.ones(1, 1)).mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_endless_skipping_ends(dtype: torch.dtype) -> None:
    """NaN data raise at the limit, with the parameters as they were."""
    layer = nn.Linear(1, 1)
    before = layer.weight.clone()
    step = MixedPrecisionStep(
        SGD(layer.parameters(), lr=1.0), dtype=dtype, max_consecutive_skips=3
    )

    def batch(value: float) -> StepResult:
        with step.autocast():
            loss = layer(torch.tensor([[value]])).mean() * 2**-10
        return step(loss)

    assert [batch(math.nan).skipped, batch(math.nan).skipped] == [True, True]
    with pytest.raises(
        FloatingPointError, match=rf"3 steps in a row .* forward pass in {dtype}"
    ):
        batch(math.nan)

    assert torch.equal(layer.weight, before)
    assert batch(1.0).stepped


def test_a_scale_of_zero_harms_nothing() -> None:
    """At a scale of 0 torch divides 0 by 0 and takes the step; this one is skipped."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=0.0)
    torch.autograd.backward(scaler.scale(weight.sum()))
    scaler.step(optimizer)
    assert weight.isnan().all()

    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=0.0)
    step = MixedPrecisionStep(optimizer, dtype=torch.float16, scaler=scaler)
    assert step(weight.sum()).skipped
    assert weight.item() == 1.0


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    """Wrong dtype, window, parameters or keys: an error, and the old state."""
    layer = nn.Linear(2, 1)

    def make(dtype: torch.dtype = torch.float16, window: int = 2) -> MixedPrecisionStep:
        return MixedPrecisionStep(
            SGD(layer.parameters()), dtype=dtype, accumulate_grad_batches=window
        )

    step = make()
    step(layer(torch.ones(1, 2)).mean())
    state = step.state_dict()
    other = make()
    before = other.state_dict()

    with pytest.raises(ValueError, match=r"torch\.bfloat16 run, this step is torch\.f"):
        other.load_state_dict(make(dtype=torch.bfloat16).state_dict())
    with pytest.raises(ValueError, match=r"state lacks \['grads', 'skipped_steps'\]"):
        other.load_state_dict({
            k: v for k, v in state.items() if k not in {"grads", "skipped_steps"}
        })
    with pytest.raises(ValueError, match="skipped_steps must be a number from 0, got "):
        other.load_state_dict(state | {"skipped_steps": -1})
    with pytest.raises(ValueError, match="window_weight must be a number from 0, got "):
        other.load_state_dict(state | {"window_weight": math.nan})
    with pytest.raises(ValueError, match=r"the scaler's state lacks .*'growth_factor'"):
        other.load_state_dict(state | {"scaler": {"scale": 1.0}})
    with pytest.raises(ValueError, match="state holds gradients of other parameters"):
        other.load_state_dict(state | {"grads": state["grads"][:1]})
    with pytest.raises(ValueError, match="state holds gradients of other parameters"):
        other.load_state_dict(state | {"grads": state["grads"][::-1]})
    layer.zero_grad()
    with pytest.raises(ValueError, match="within a window of 2 micro-batches, this "):
        make(window=4).load_state_dict(state)

    assert other.state_dict() == before
    assert layer.weight.grad is None
