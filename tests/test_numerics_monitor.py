"""Tests of snippets/numerics_monitor, as read in guide/monitor_a_run."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricMixed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as optim_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from snippets import fp8
from snippets.numerics_monitor import (
    RULES,
    NumericsError,
    NumericsMonitor,
    NumericsWarning,
)
from tests.ranks import needs_gloo, run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
MODES = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
STEPS, AT = 7, 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Let Lightning log errors only."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


class Explode(torch.autograd.Function):
    """The identity, whose backward overflows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """Return the same values."""
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        """Multiply beyond the end."""
        return (grads[0] + 1) * 1e30 * 1e30


class Fault(nn.Module):
    """Overflows in forward or in backward in one of its calls; else the identity."""

    def __init__(self, at: int = -1, phase: str = "forward") -> None:
        super().__init__()
        self.at, self.phase, self.calls = at, phase, 0

    def forward(self, x: Tensor) -> Tensor:
        """Fail at the call that was asked for."""
        self.calls += self.training
        if self.calls != self.at + 1:
            return x
        if self.phase == "forward":
            return (x + 1) * 1e30 * 1e30
        exploded: Tensor = Explode.apply(x)  # type: ignore[no-untyped-call]
        return exploded


def network(at: int = -1, phase: str = "forward", width: int = 16) -> nn.Sequential:
    """Make a network with a module, ``3``, that can fail."""
    first = (nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))
    last = (nn.Tanh() if phase == "backward" else nn.LeakyReLU(), nn.Linear(width, 1))
    return nn.Sequential(*first, Fault(at, phase), *last)


class Lit(lightning.LightningModule):
    """Regression with one optimizer."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.net, self.lr = network() if net is None else net, lr

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Fit zero."""
        loss: Tensor = self.net(batch[0]).float().square().mean()
        return loss

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Take plain SGD."""
        return SGD(self.parameters(), lr=self.lr)


class Adversarial(Lit):
    """Two optimizers in turn, of a generator and a critic."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 1)]))
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor]) -> None:  # type: ignore[override]
        """Step the first on what the second says, then the second."""
        parts: Any = self.net
        for number, optimizer in enumerate(self.optimizers()):
            x = parts[0](batch[0])
            loss = parts[1](x.detach() if number else x).float().square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        """Take one for each part; the second's steps are too small for bfloat16."""
        parts: Any = self.net
        return [SGD(parts[0].parameters(), 0.1), SGD(parts[1].parameters(), 1e-7)]


class Manual(Lit):
    """Two optimizers, stepped by hand, the second at every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
        """Step the first half of the network, and at times the second."""
        optimizers: Any = self.optimizers()
        loss = super().training_step(batch)
        self.manual_backward(loss)
        optimizers[0].step()
        if index % 2:
            optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[Optimizer]:
        """Take one for each half."""
        halves: Any = self.net
        return [Adam(halves[:3].parameters(), 0.01), SGD(halves[3:].parameters(), 0.01)]


def loader(batches: int = STEPS) -> DataLoader[Any]:
    """Make batches of two rows."""
    x = torch.randn(2 * batches, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=2)


def trainer(mode: str = "32-true", *callbacks: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Make a quiet Trainer; 16-mixed on a CPU needs its plugin."""
    precision: dict[str, Any] = {"precision": mode}
    if mode == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        precision = {"plugins": plugin}
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar"), False
    )
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    return lightning.Trainer(
        **(quiet | precision | {"callbacks": [*callbacks]} | kwargs)
    )


def fit(monitor: Any, mode: str, model: Any = None, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """Train with the Trainer."""
    torch.manual_seed(0)
    model = Lit() if model is None else model()
    callbacks = [] if monitor is None else [monitor]
    trainer(mode, *callbacks, **kwargs).fit(model, loader())
    return model  # type: ignore[no-any-return]


def run_fabric(monitor: Any, mode: str, net: Callable[[], nn.Module]) -> nn.Module:  # noqa: ANN401
    """Train with Fabric."""
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision: dict[str, Any] = {"precision": mode}
    if mode == "16-mixed":
        precision = {"plugins": FabricMixed("16-mixed", device="cpu", scaler=scaler)}
    callbacks = [] if monitor is None else [monitor]
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=callbacks, **precision)
    module = net()
    model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.05))
    for (x,) in loader():
        fabric.backward(model(x).float().square().mean())
        optimizer.step()
        optimizer.zero_grad()
    fabric.call("on_train_end")
    return module


def run_plain(monitor: Any, mode: str, net: Callable[[], nn.Module]) -> nn.Module:  # noqa: ANN401
    """Train with a loop of PyTorch's."""
    torch.manual_seed(0)
    module = net().to(torch.bfloat16 if mode == "bf16-true" else torch.float32)
    optimizer = SGD(module.parameters(), lr=0.05)
    is_half = mode == "16-mixed"
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=is_half)
    half = torch.float16 if is_half else torch.bfloat16
    if monitor is not None:
        monitor.attach(module, scaler=scaler)
    for (x,) in loader():
        with torch.autocast("cpu", half, enabled="mixed" in mode):
            loss = module(x.to(next(module.parameters()).dtype)).float().square().mean()
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.detach()
    return module


def run_trainer(monitor: Any, mode: str, net: Callable[[], nn.Module]) -> nn.Module:  # noqa: ANN401
    """Train with the Trainer, and return the network in the module."""
    model = fit(monitor, mode, lambda: Lit(net()))
    return model.net  # type: ignore[return-value]


RUNS = {"plain": run_plain, "fabric": run_fabric, "trainer": run_trainer}


def hooks(model: nn.Module) -> int:
    """Count the hooks that are left."""
    own = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )
    optim = (
        optim_hooks._global_optimizer_pre_hooks,
        optim_hooks._global_optimizer_post_hooks,
    )
    return own + len(optim[0]) + len(optim[1]) + len(module_hooks._global_forward_hooks)


# Runs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_the_same_bit_for_bit_and_healthy_runs_raise_no_alarm(
    run: str, mode: str
) -> None:
    """Weights with and without it are equal; no warning; every hook is gone."""
    quiet = {"max_lost": "ignore"} if mode == "bf16-true" else {}
    monitor = NumericsMonitor(interval=2, rules=quiet)

    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericsWarning)
        watched = RUNS[run](monitor, mode, network)
    plain = RUNS[run](None, mode, network)

    assert all(
        map(torch.equal, watched.state_dict().values(), plain.state_dict().values())
    )
    assert [r["step"] for r in monitor.records] == [0, 2, 4, 6]
    assert not any(r["skipped"] or r["nonfinite"] for r in monitor.records)
    scale = 2.0**10 if mode == "16-mixed" else 1.0
    assert {r["scale"] for r in monitor.records} == {scale}
    formats = {"32-true": "float32", "16-mixed": "float16"}
    assert {r["format"] for r in monitor.records} == {formats.get(mode, "bfloat16")}
    assert hooks(watched) == 0
    assert monitor.step == STEPS


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", RUNS)
def test_an_overflow_is_named_with_its_module_and_step(
    run: str, mode: str, phase: str
) -> None:
    """At step 4, in module 3: and under a scaler, the step is skipped."""
    quiet = {"max_lost": "ignore"}
    monitor = NumericsMonitor(interval=100, rules=quiet)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericsWarning)
        RUNS[run](monitor, mode, lambda: network(AT, phase))

    first = next(r for r in monitor.records if r["nonfinite"])
    where = first["nonfinite"]
    prefix = "net." if run == "trainer" else ""
    assert first["step"] == AT
    assert where == {"module": f"{prefix}3", "phase": phase}
    assert first["skipped"] == (mode == "16-mixed")
    told = [str(w.message) for w in caught if w.category is NumericsWarning]
    if mode == "16-mixed" and phase == "backward":  # the scaler's business
        assert told == []
    else:
        end = f"{phase} of '{prefix}3' at step {AT}"
        assert told == [f"nonfinite: NaN or Inf began in {end}"]


def test_raising_ends_the_run_before_the_weights_are_spoiled() -> None:
    """The error comes before the optimizer; the record is kept, the hooks are gone."""
    for run, wrap in RUNS.items():
        monitor = NumericsMonitor(rules={"nonfinite": "raise"})
        nets: list[nn.Module] = []

        def make(nets: list[nn.Module] = nets) -> nn.Module:
            nets.append(network(AT))
            return nets[0]

        with pytest.raises(NumericsError, match=f"forward of '.*3' at step {AT}"):
            wrap(monitor, "32-true", make)

        assert all(bool(p.isfinite().all()) for p in nets[0].parameters())
        last = monitor.records[-1]
        assert (last["step"], last["nonfinite"]["phase"]) == (AT, "forward")
        if run == "trainer":
            assert hooks(nets[0]) == 0
        with monitor:
            pass
        assert hooks(nets[0]) == 0


@pytest.mark.parametrize("run", RUNS)
def test_a_warning_that_was_made_an_error_ends_its_step(run: str) -> None:
    """As "raise" does: the step is recorded, and the steps after it are seen."""
    monitor = NumericsMonitor(interval=1)
    nets: list[nn.Module] = []

    def make() -> nn.Module:
        nets.append(network(AT))
        return nets[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericsWarning)
        with pytest.raises(NumericsWarning, match=f"forward of '.*3' at step {AT}"):
            RUNS[run](monitor, "32-true", make)
    monitor.detach()

    assert monitor.records[-1]["nonfinite"]["phase"] == "forward"
    assert monitor.step == AT + 1
    assert all(bool(p.isfinite().all()) for p in nets[0].parameters())


def test_a_loop_that_goes_on_after_an_error_is_watched_on() -> None:
    """An error that is caught, of a rule or a warning, leaves no step open."""
    for action in ("raise", "warn"):
        model, values = nn.Linear(2, 1), [1.0, math.nan, 1.0, 1.0]
        optimizer, errors = SGD(model.parameters(), lr=0.1), 0
        monitor = NumericsMonitor(interval=1, rules={"nonfinite": action})
        with warnings.catch_warnings(), monitor.attach(model):
            warnings.simplefilter("error", NumericsWarning)
            for value in values:
                optimizer.zero_grad()
                torch.autograd.backward(model(torch.full((1, 2), value)).sum())
                try:
                    optimizer.step()
                except (NumericsError, NumericsWarning):
                    errors += 1

        assert errors == 1
        assert [r["step"] for r in monitor.records] == [0, 1, 2, 3]
        assert ["lost" in r for r in monitor.records] == [True, False, True, True]


@pytest.mark.parametrize("run", RUNS)
def test_lost_updates_are_seen(run: str) -> None:
    """In bf16-true with a small step: the share is near 1, and one warning says so."""
    monitor = NumericsMonitor(interval=3)

    def small() -> nn.Module:
        net = network()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(p.sign())  # neighbors of 1 are 2**-8 and 2**-7 away
        return net

    with pytest.warns(NumericsWarning, match="max_lost: 100.0% at step 0") as caught:
        RUNS[run](monitor, "bf16-true", lambda: _scaled(small(), 1e-3))

    assert sum(w.category is NumericsWarning for w in caught) == 1
    assert [r["lost"] for r in monitor.records] == [1.0] * 3
    assert {r["half_ulp"] for r in monitor.records} == {2.0**-8}
    assert {r["update_ratio"] for r in monitor.records} == {0.0}


def _scaled(net: nn.Module, factor: float) -> nn.Module:
    """Make the loss, and so the gradients, small."""
    for p in net.parameters():
        p.register_hook(lambda grad: grad.clamp(-factor, factor))  # type: ignore[no-untyped-call]
    return net


def test_shares_are_exact() -> None:
    """Zeros, underflow, lost updates and ratio, against their definitions."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(1000).bfloat16())
    model = nn.ParameterList([weight])
    optimizer = SGD(model.parameters(), lr=1.0)
    monitor = NumericsMonitor(format=torch.float16, rules={"max_underflow": 1.0})
    grad = (torch.randn(1000) * 10.0 ** torch.randint(-12, 0, (1000,))).bfloat16()
    grad[::7] = 0
    before = weight.detach().clone()
    with monitor.attach(model):
        weight.grad = grad.clone()
        optimizer.step()
    record = monitor.records[0]

    alive = grad != 0
    after = weight.detach()
    assert record["zero"] == (~alive).sum() / 1000
    assert record["underflow"] == (grad[alive].half() == 0).sum() / alive.sum()
    assert record["lost"] == (alive & (after == before)).sum() / alive.sum()
    ratio = (after.double() - before.double()).norm() / before.double().norm()
    assert record["update_ratio"] == pytest.approx(ratio.item())
    assert record["half_ulp"] == 2.0**-8


def test_underflow_is_judged_at_the_scale() -> None:
    """Gradients of 2**-30 are gone in float16, and there with a scale of 2**10."""
    shares = []
    for scale in (1.0, 2.0**10):
        weight = nn.Parameter(torch.ones(4))
        model = nn.ParameterList([weight])
        optimizer = SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        rules = {"max_underflow": (0.5, "warn")}
        monitor = NumericsMonitor(format=torch.float16, rules=rules)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with monitor.attach(model, scaler=scaler):
                loss = weight.sum() * 2.0**-30
                torch.autograd.backward(scaler.scale(loss))
                scaler.step(optimizer)
                scaler.update()
        shares.append(monitor.records[0]["underflow"])
        assert len(caught) == (scale == 1)

    assert shares == [1.0, 0.0]


def tiny(
    factor: float, *, scale: float = 1.0, half: torch.dtype = torch.float16
) -> Any:  # noqa: ANN401
    """Train three steps with a loss so small; return the records and what is told."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    monitor = NumericsMonitor(interval=1, rules={"max_underflow": "ignore"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericsWarning)
        with monitor.attach(model, scaler=scaler):
            for _ in range(3):
                with torch.autocast("cpu", half):
                    loss = model(torch.randn(8, 4)).float().square().mean() * factor
                torch.autograd.backward(scaler.scale(loss))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return monitor.records, [str(w.message) for w in caught]


def test_float16_without_a_scaler_and_without_gradients_is_told() -> None:
    """Not if bfloat16 computes, nor under a scaler, nor of a gradient that is left."""
    records, told = tiny(1e-10)
    assert [r["zero"] for r in records] == [1.0] * 3
    text = "all gradients are 0, 2 measurements in a row, the last at step 1"
    assert told == [f"max_zero_steps: {text}"]

    assert tiny(1e-10, scale=2.0**20)[1] == []
    assert tiny(1e-4)[1] == []
    for settings in ({"half": torch.bfloat16}, {"scale": 2.0}):
        records, told = tiny(0.0, **settings)
        assert [r["zero"] for r in records] == [1.0] * 3
        assert told == []


def test_a_step_without_gradients_is_no_fault() -> None:
    """A loss of 0, a head that begins with 0 and has its own optimizer, an embedding.

    Of the embedding the sample has none of the rows that are read.
    """
    half = torch.autocast("cpu", torch.float16)
    monitor = NumericsMonitor(interval=1, sample=64, rules={"max_lost": "ignore"})
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4), nn.Linear(4, 1)
    nn.init.zeros_(head.weight)
    words = nn.Embedding(4096, 4)
    model = nn.ModuleList([body, head, words])
    optimizers = [SGD(part.parameters(), lr=0.1) for part in model]
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericsWarning)
        with monitor.attach(model):
            for factor in (1.0, 1.0, 0.0, 1.0, 0.0):
                with half:
                    h = head(
                        body(torch.randn(8, 4)) + words(torch.tensor([1, 2, 3, 5] * 2))
                    )
                torch.autograd.backward((h.float() - 1).square().mean() * factor)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

    zeros = [
        [r["zero"] for r in monitor.records if r["optimizer"] == i] for i in range(3)
    ]
    assert zeros[0] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert zeros[1][0] < 1
    assert zeros[2] == [1.0] * 5


@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_step_is_measured_as_another(fused: bool) -> None:
    """The scaler leaves it gradients that are scaled, which the measure allows for."""
    weight = nn.Parameter(torch.ones(4))
    model = nn.ParameterList([weight])
    optimizer = SGD(model.parameters(), lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    monitor = NumericsMonitor(format=torch.float16, rules={"max_underflow": "ignore"})
    factors = torch.tensor([0.0, 2.0**-40, 2.0**-30, 1.0])
    with monitor.attach(model, scaler=scaler):
        torch.autograd.backward(scaler.scale((weight * factors).sum()))
        scaler.step(optimizer)
        scaler.update()

    record = monitor.records[0]
    assert (record["zero"], record["underflow"]) == (1 / 4, 1 / 3)


def test_weights_that_are_meant_to_stay_are_not_lost() -> None:
    """At a learning rate of 0, as a warmup begins with, no update can be lost."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    first: dict[str, Any] = {"params": model[0].parameters(), "lr": 0.0}
    groups = [first, {"params": model[1].parameters()}]
    monitor = NumericsMonitor(interval=1, rules={"max_lost": "raise"})
    optimizer = SGD(groups, lr=1.0)
    with monitor.attach(model):
        for lr in (1.0, 0.0):
            optimizer.param_groups[1]["lr"] = lr
            torch.autograd.backward(model(torch.ones(2, 8).bfloat16()).sum())
            optimizer.step()

    assert monitor.records[0]["lost"] == 0
    assert "lost" not in monitor.records[1]


def test_a_collapsing_scale_is_told_once_by_each_rule() -> None:
    """NaN at each step: skips in a row, then a scale below its limit; told once."""
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    rules: dict[str, Any] = {
        "nonfinite": "ignore",
        "max_consecutive_skips": 3,
        "min_scale": 0.25,
    }
    monitor = NumericsMonitor(rules=rules)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with monitor.attach(model, scaler=scaler):
            for _ in range(9):
                loss = model(torch.full((1, 2), math.nan)).sum()
                torch.autograd.backward(scaler.scale(loss))
                scaler.step(optimizer)
                scaler.update()

    assert [str(w.message) for w in caught] == [
        "max_consecutive_skips: 4 in a row, the last for forward of '' at step 3",
        "min_scale: it is 0.125 after step 6",
    ]
    assert [r["scale"] for r in monitor.records] == [2.0**n for n in range(4, -5, -1)]
    assert all(r["skipped"] for r in monitor.records)
    assert (monitor.skips, monitor.consecutive_skips, monitor.step) == (9, 9, 9)
    assert "step" not in vars(scaler)


@pytest.mark.parametrize(
    ("rule", "bad"), [("max_lost", 2.0**-12), ("nonfinite", math.nan)]
)
def test_a_rule_is_told_again_once_it_has_held(rule: str, bad: float) -> None:
    """Bad, bad, good, bad: it is told at the first and at the last."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    model = nn.ParameterList([weight])
    optimizer = SGD(model.parameters(), lr=1.0)
    monitor = NumericsMonitor(interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericsWarning)
        with monitor.attach(model):
            for grad in (bad, bad, 0.5, bad):
                weight.data.fill_(1.0)
                weight.grad = torch.full_like(weight, grad)
                optimizer.step()

    told = [str(w.message) for w in caught]
    assert [(t.partition(":")[0], t[-6:]) for t in told] == [
        (rule, "step 0"),
        (rule, "step 3"),
    ]


def test_a_scale_that_is_set_before_any_step_is_judged() -> None:
    """It is of no optimizer, and told once of all."""
    model = nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))  # makes its tensor
    with (
        NumericsMonitor().attach(model, scaler=scaler),
        pytest.warns(NumericsWarning, match=r"min_scale: it is 0\.5 before step 0"),
    ):
        scaler.update(0.5)


def test_rules_of_a_scaler_are_told_again_once_they_have_held() -> None:
    """Skipped, skipped, taken, taken, skipped: each is told at the first and last."""
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    rules: dict[str, Any] = {"max_consecutive_skips": 0, "min_scale": 3.0}
    monitor = NumericsMonitor(interval=1, rules={**rules, "nonfinite": "ignore"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericsWarning)
        with monitor.attach(model, scaler=scaler):
            for value in (math.nan, math.nan, 1.0, 1.0, math.nan):
                loss = model(torch.full((1, 2), value)).sum()
                torch.autograd.backward(scaler.scale(loss))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    assert [r["scale"] for r in monitor.records] == [4.0, 2.0, 1.0, 2.0, 4.0]
    told = [str(w.message) for w in caught]
    assert [(t.partition(":")[0], t[-6:]) for t in told] == [
        ("max_consecutive_skips", "step 0"),
        ("min_scale", "step 0"),
        ("max_consecutive_skips", "step 4"),
        ("min_scale", "step 4"),
    ]


def test_skips_in_a_row_are_counted_for_each_optimizer() -> None:
    """The other optimizer's healthy steps do not end the row."""
    sick, fine = nn.Linear(2, 1), nn.Linear(2, 1)
    model = nn.ModuleList([sick, fine])
    optimizers = [SGD(m.parameters(), lr=0.1) for m in (sick, fine)]
    scaler = torch.amp.GradScaler("cpu")
    monitor = NumericsMonitor(rules={"nonfinite": "ignore"})
    with monitor.attach(model, scaler=scaler):
        for _ in range(3):
            loss = sick(torch.full((1, 2), math.nan)) + fine(torch.ones(1, 2)).detach()
            torch.autograd.backward(scaler.scale(loss.sum()))
            torch.autograd.backward(scaler.scale(fine(torch.ones(1, 2)).sum()))
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()

    assert (monitor.skips, monitor.consecutive_skips, monitor.step) == (3, 3, 6)


def test_only_real_steps_count_under_accumulation() -> None:
    """Three micro-batches make one step, with the Trainer and by hand."""
    monitor = NumericsMonitor(interval=1)
    fit(monitor, "16-mixed", accumulate_grad_batches=3)

    assert [r["step"] for r in monitor.records] == [0, 1, 2]  # 3 + 3 + 1 batches


def test_a_fault_in_a_micro_batch_is_found_at_its_step() -> None:
    """The overflow is in the second of three micro-batches of step 1."""
    monitor = NumericsMonitor(interval=100, rules={"nonfinite": "ignore"})
    fit(monitor, "32-true", lambda: Lit(network(4)), accumulate_grad_batches=3)

    first = next(r for r in monitor.records if r["nonfinite"])
    assert (first["step"], first["nonfinite"]["module"]) == (1, "net.3")


@pytest.mark.parametrize("mode", ["32-true", "16-mixed"])
def test_several_optimizers_and_manual_optimization(mode: str) -> None:
    """Each step of each optimizer has its record."""
    monitor = NumericsMonitor(interval=1)
    fit(monitor, mode, Manual)

    order = [0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert [r["optimizer"] for r in monitor.records] == order
    assert [r["step"] for r in monitor.records] == list(range(10))


def test_each_of_two_optimizers_in_turn_is_measured_and_told() -> None:
    """The second never has a step that is a multiple of an even interval."""
    monitor = NumericsMonitor(interval=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericsWarning)
        fit(monitor, "bf16-true", Adversarial)

    measured = [(r["step"], r["optimizer"]) for r in monitor.records if "lost" in r]
    assert measured == [
        (0, 0),
        (1, 1),
        (4, 0),
        (5, 1),
        (8, 0),
        (9, 1),
        (12, 0),
        (13, 1),
    ]
    told = [str(w.message) for w in caught if w.category is NumericsWarning]
    assert told == ["max_lost: 100.0% at step 1, optimizer 1"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_rule_is_told_once_of_each_optimizer(number: int) -> None:
    """That the other one's steps are healthy ends no row, and hides no fault."""
    rules = {"max_consecutive_skips": 0}
    scaler = torch.amp.GradScaler("cpu")
    for is_scaled in (False, True):
        model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
        optimizers = [SGD(part.parameters(), lr=0.1) for part in model]
        monitor = NumericsMonitor(interval=1, rules=rules)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NumericsWarning)
            with monitor.attach(model, scaler=scaler if is_scaled else None):
                for _ in range(3):
                    for i, optimizer in enumerate(optimizers):
                        value = math.nan if i == number else 1.0
                        loss = model[i](torch.full((1, 2), value)).sum()
                        optimizer.zero_grad()
                        if is_scaled:
                            torch.autograd.backward(scaler.scale(loss))
                            scaler.step(optimizer)
                            scaler.update()
                        else:
                            torch.autograd.backward(loss)
                            optimizer.step()
        told = [str(w.message) for w in caught]
        end = f"forward of '{number}' at step {number}" + ", optimizer 1" * number
        expected = [f"nonfinite: NaN or Inf began in {end}"]
        if is_scaled:
            expected.append(f"max_consecutive_skips: 1 in a row, the last for {end}")
        assert told == expected


def test_a_bad_step_puts_a_measurement_off_to_the_next_good_one() -> None:
    """And no further: the one after it comes when it would have."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = SGD([weight], lr=0.1)
    monitor = NumericsMonitor(interval=4, rules={"nonfinite": "ignore"})
    with monitor.attach(nn.ParameterList([weight])):
        for step in range(10):
            value = math.nan if step in (4, 5) else 1.0
            weight.grad = torch.full_like(weight, value)
            if step not in (4, 5):
                weight.data.fill_(1.0)
            optimizer.step()

    assert [r["step"] for r in monitor.records if "lost" in r] == [0, 6, 8]


def test_a_run_that_goes_on_is_measured_where_it_would_have_been() -> None:
    """From step 6 of a run that is measured at each 4th, for both optimizers."""
    monitor = NumericsMonitor(interval=4, rules={"max_lost": "ignore"})
    monitor.load_state_dict({"step": 6, "skips": 0, "consecutive_skips": 0})
    fit(monitor, "32-true", Adversarial)

    at = [8, 9, 12, 13, 16, 17]
    assert [r["step"] for r in monitor.records if "lost" in r] == at


def test_an_optimizer_that_has_ended_is_not_waited_for() -> None:
    """Else the amax of all later steps would be taken, for a measurement to come."""
    first, second = fp8.Linear(16, 16), fp8.Linear(16, 16)
    model = nn.ModuleList([first, second])
    optimizers = [SGD(part.parameters(), lr=1e-3) for part in model]
    x, wanted = torch.randn(16, 16), []
    with NumericsMonitor(interval=4).attach(model) as monitor:
        for step in range(16):
            part, optimizer = model[step > 2], optimizers[step > 2]
            with fp8.autocast(enabled=True, recipe=fp8.Float8CurrentScaling()):
                out = part(x)
            torch.autograd.backward(out.float().square().mean())
            wanted.append(bool(monitor._tape.amax.seen))
            optimizer.step()
            optimizer.zero_grad()

    measured = [r["step"] for r in monitor.records if "lost" in r]
    assert measured == [0, 3, 4, 8, 12]
    # The second's first step came unforeseen, and the first was waited for till 8.
    assert [i for i, is_wanted in enumerate(wanted) if is_wanted] == [
        0,
        *range(4, 9),
        12,
    ]


def test_a_number_is_of_one_living_optimizer() -> None:
    """One that is made anew for each step keeps it, beside another that stays."""
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    with NumericsMonitor(interval=1).attach(model) as monitor:
        staying = SGD(model[1].parameters(), lr=0.1)
        for _ in range(3):
            passing = SGD(model[0].parameters(), lr=0.1)
            torch.autograd.backward(
                (model[0](x := torch.ones(1, 2)) + model[1](x)).sum()
            )
            passing.step()
            staying.step()

    assert [r["optimizer"] for r in monitor.records] == [0, 1] * 3


def test_what_is_usual_for_one_optimizer_stays_so_for_it() -> None:
    """A mask of -Inf in the first's graph is not forgotten at the second's step."""

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.eye(8).bool(), -math.inf)

    fault = Fault(2)
    first = nn.Sequential(nn.Linear(8, 8), Mask(), nn.Softmax(-1), fault)
    model = nn.ModuleList([first, nn.Linear(8, 8)])
    optimizers = [SGD(part.parameters(), lr=0.1) for part in model]
    with NumericsMonitor(rules={"nonfinite": "ignore"}).attach(model) as monitor:
        for _ in range(3):
            for part, optimizer in zip(model, optimizers, strict=True):
                torch.autograd.backward(part(torch.ones(8, 8)).square().sum())
                optimizer.step()
                optimizer.zero_grad()

    found = [r["nonfinite"] for r in monitor.records]
    assert found == [None, None, {"module": "0.3", "phase": "forward"}]


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
def test_fused_and_foreach_optimizers_under_a_scaler(options: dict[str, bool]) -> None:
    """A fused step is called even if it skips; it is recorded as skipped."""
    torch.manual_seed(0)
    model = network(1, "backward")
    optimizer = AdamW(model.parameters(), lr=1e-3, **options)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monitor = NumericsMonitor(interval=1)
    with monitor.attach(model, scaler=scaler):
        for (x,) in loader(3):
            torch.autograd.backward(scaler.scale(model(x).square().mean()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    assert [r["skipped"] for r in monitor.records] == [False, True, False]
    assert monitor.records[1]["nonfinite"] == {"module": "3", "phase": "backward"}
    assert (monitor.skips, monitor.consecutive_skips) == (1, 0)


def test_closures_are_seen_before_the_update() -> None:
    """With LBFGS, gradients are those of its closure, and it steps once."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x = next(iter(loader()))[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        torch.autograd.backward(loss)
        return loss

    monitor = NumericsMonitor(interval=1)
    step: Any = optimizer.step
    with monitor.attach(model):
        step(closure)
        step(closure=closure)

    assert [r["step"] for r in monitor.records] == [0, 1]
    assert monitor.records[0]["update_ratio"] > 0


def test_a_parameter_without_values_is_left_out() -> None:
    """As a rank has where there are fewer values than ranks: also if it is alone."""
    full, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
    cases: tuple[list[Tensor], ...] = [full, empty], [empty]
    for params in cases:
        model = nn.ParameterList(params)
        optimizer = SGD(model.parameters(), lr=0.5)
        optimizer.zero_grad()
        with NumericsMonitor().attach(model) as monitor:
            torch.autograd.backward(torch.cat(params).sum())
            optimizer.step()
        record = monitor.records[0]
        assert (record["zero"], record["underflow"]) == (0, 0)
        assert record.get("update_ratio") == (0.5 if len(params) > 1 else None)


def test_a_closure_that_is_called_again_begins_no_other_step() -> None:
    """Of several calls the first one's weights and gradients count."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.LBFGS([weight], lr=0.25, max_iter=3, tolerance_change=0)
    step: Any = optimizer.step

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (weight - 3).square().sum()
        torch.autograd.backward(loss)
        return loss

    with NumericsMonitor(interval=1).attach(nn.ParameterList([weight])) as monitor:
        step(closure)

    assert optimizer.state[weight]["func_evals"] > 1
    change = weight.item() - 1
    assert monitor.records[0]["update_ratio"] == pytest.approx(change)


def test_an_optimizer_within_another_makes_no_step_of_its_own() -> None:
    """A wrapper's step that calls another's, over the same weights, is one step."""

    class Wrapper(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
            inner.step(closure)

    model = nn.Linear(2, 1)
    inner, outer = SGD(model.parameters(), lr=0.1), Wrapper(model.parameters(), lr=0.1)
    with NumericsMonitor(interval=1).attach(model) as monitor:
        for _ in range(2):
            torch.autograd.backward(model(torch.ones(1, 2)).sum())
            outer.step()

    assert [(r["step"], r["optimizer"]) for r in monitor.records] == [(0, 0), (1, 0)]


def test_functional_code_and_checkpoints_are_located() -> None:
    """Between two modules: the later; after the last: said so; in a checkpoint."""

    class Between(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.a, self.b, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how
            self.inner = network(0)

        def forward(self, x: Tensor) -> Any:  # noqa: ANN401
            h = self.a(x)
            if self.how == "between":
                h = (h * 0).sqrt()  # its derivative is infinite
            h = self.b(h)
            if self.how == "after":
                h = (h * 0).sqrt()
            if self.how == "checkpoint":
                h = checkpoint(self.inner, h, use_reentrant=False)
            return h

    found = {}
    for how in ("between", "after", "checkpoint"):
        model = Between(how)
        monitor = NumericsMonitor(rules={"nonfinite": "ignore"})
        optimizer = SGD(model.parameters(), lr=0.1)
        with monitor.attach(model):
            torch.autograd.backward(model(torch.ones(2, 8)).sum())
            optimizer.step()
        found[how] = tuple(monitor.records[0]["nonfinite"].values())

    assert found == {
        "between": ("b", "backward"),
        "after": ("(after b)", "backward"),
        "checkpoint": ("inner.3", "forward"),
    }


def test_weights_that_an_optimizer_spoiled_are_told_from_a_bad_forward() -> None:
    """Adam's eps is 0 in float16, and so the gradients that are 0 become 0 / 0."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).half()
    optimizer = torch.optim.Adam(model.parameters())
    monitor = NumericsMonitor(rules={"nonfinite": "ignore", "max_underflow": "ignore"})
    with monitor.attach(model):
        for _ in range(2):
            torch.autograd.backward(model(torch.zeros(2, 8).half()).sum())
            optimizer.step()
            optimizer.zero_grad()

    found = {"module": "0", "phase": "weights"}
    assert [r["nonfinite"] for r in monitor.records] == [None, found]


def test_of_two_readers_the_one_with_bad_weights_is_named() -> None:
    """A residual stream is read twice; the branch whose backward overflows is named."""

    class Sick(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            explode: Any = Explode.apply
            return nn.functional.linear(explode(x), explode(self.weight))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fine = nn.Linear(8, 8), nn.Linear(8, 8)
            self.sick = Sick(8, 8, bias=False)

        def forward(self, x: Tensor) -> Any:  # noqa: ANN401
            h = self.stem(x)
            return self.sick(h) + self.fine(h)

    model = Residual()
    monitor = NumericsMonitor(rules={"nonfinite": "ignore"})
    optimizer = SGD(model.parameters(), lr=0.1)
    with monitor.attach(model):
        torch.autograd.backward(model(torch.ones(2, 8)).sum())
        optimizer.step()

    assert monitor.records[0]["nonfinite"] == {"module": "sick", "phase": "backward"}


@pytest.mark.parametrize("is_first", [False, True])
def test_of_two_readers_with_good_weights_the_one_without_is_named(
    is_first: bool,
) -> None:
    """Whatever their order: weights that train would have bad gradients too.

    Weights that do not train say nothing: either reader may be it.
    """

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.detach()).clamp(min=0).sqrt()

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fine = nn.Linear(8, 8), nn.Linear(8, 8)
            self.root = Root()

        def forward(self, x: Tensor) -> Any:  # noqa: ANN401
            h = self.stem(x)
            return (
                self.root(h) + self.fine(h) if is_first else self.fine(h) + self.root(h)
            )

    either = "root or fine" if is_first else "fine or root"
    for freeze, name in ((False, "root"), (True, either)):
        model = Residual()
        model.fine.requires_grad_(not freeze)
        monitor = NumericsMonitor(rules={"nonfinite": "ignore"})
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with monitor.attach(model):
            torch.autograd.backward(model(torch.ones(2, 8)).sum())
            optimizer.step()

        assert monitor.records[0]["nonfinite"] == {"module": name, "phase": "backward"}


def test_of_two_readers_that_could_both_be_it_both_are_named() -> None:
    """Two layers whose weights train and are fine; the fault lies in one's input."""

    class Sick(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            explode: Any = Explode.apply
            return super().forward(explode(x))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.sick = nn.Linear(8, 8), Sick(8, 8)
            self.fine = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:  # noqa: ANN401
            h = self.stem(x)
            return self.sick(h) + self.fine(h)

    model = Residual()
    optimizer = SGD(model.parameters(), lr=0.1)
    with NumericsMonitor(rules={"nonfinite": "ignore"}).attach(model) as monitor:
        torch.autograd.backward(model(torch.ones(2, 8)).sum())
        optimizer.step()

    found = {"module": "sick or fine", "phase": "backward"}
    assert monitor.records[0]["nonfinite"] == found


def test_a_module_that_writes_in_place_is_named() -> None:
    """The derivative of a root at 0 is infinite, though it is the stem's tensor."""

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt_()

    model = nn.Sequential(nn.Linear(8, 8), Root(), nn.LeakyReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        for p in model[0].parameters():
            p.zero_()
    optimizer = SGD(model.parameters(), lr=0.1)
    with NumericsMonitor(rules={"nonfinite": "ignore"}).attach(model) as monitor:
        torch.autograd.backward(model(torch.ones(2, 8)).sum())
        optimizer.step()

    assert monitor.records[0]["nonfinite"] == {"module": "1", "phase": "backward"}


def test_a_module_whose_infinities_are_usual_is_not_named() -> None:
    """A mask of -Inf is there in healthy steps too; the fault is after it."""

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.eye(8).bool(), -math.inf)

    model = nn.Sequential(nn.Linear(8, 8), Mask(), nn.Softmax(-1), Fault(2))
    optimizer = SGD(model.parameters(), lr=0.1)
    with NumericsMonitor(rules={"nonfinite": "ignore"}).attach(model) as monitor:
        for _ in range(3):
            torch.autograd.backward(model(torch.ones(8, 8)).square().sum())
            optimizer.step()
            optimizer.zero_grad()

    found = [r["nonfinite"] for r in monitor.records]
    assert found == [None, {"module": "3", "phase": "forward"}]


def test_a_module_is_usual_only_while_it_makes_infinities() -> None:
    """Infinite in the first measurement, not in the second: then it is a fault."""

    class Scale(nn.Module):
        def forward(self, x: Tensor, factor: float) -> Tensor:
            return x * factor

    model = nn.ModuleList([nn.Linear(2, 1), Scale()])
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = NumericsMonitor(interval=1, rules={"nonfinite": "ignore"})
    with monitor.attach(model):
        for factor in (math.inf, 1.0, math.inf):
            is_bad = monitor.step == 2
            y = model[0](torch.ones(1, 2))
            scaled = model[1](y, factor)
            torch.autograd.backward((scaled if is_bad else y).sum())
            optimizer.step()
            optimizer.zero_grad()

    found = [r["nonfinite"] for r in monitor.records]
    assert found == [None, None, {"module": "1", "phase": "forward"}]


def test_without_modules_that_run_the_last_parameter_is_named() -> None:
    """Backward comes to it first; all that is known is whose gradients are bad."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))

    model = Functional()
    optimizer = SGD(model.parameters(), lr=0.1)
    with NumericsMonitor(rules={"nonfinite": "ignore"}).attach(model) as monitor:
        h = torch.ones(2, 8) @ model.a.weight @ model.b.weight
        torch.autograd.backward((((h * 0).sqrt()) @ model.c.weight).sum())
        optimizer.step()

    assert monitor.records[0]["nonfinite"] == {"module": "b", "phase": "backward"}


RANK = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from snippets.numerics_monitor import NumericsMonitor

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)

class Fault(nn.Module):
    def __init__(self, sick):
        super().__init__()
        self.sick = sick
    def forward(self, x):
        return x * 1e30 * 1e30 if rank in self.sick else x

found = []
for sick in ([1], [0, 1], []):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Fault(sick), nn.Linear(4, 1))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    path = f"{len(sick)} of {rank}.jsonl"
    monitor = NumericsMonitor(path, rules={"nonfinite": "ignore"})
    with monitor.attach(model):
        ddp(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    found.append(monitor.records[-1]["nonfinite"])
dist.barrier()
print(json.dumps(found), flush=True)
os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down
"""


@needs_gloo
def test_a_fault_of_another_rank_is_told_as_such(tmp_path: Path) -> None:
    """Under DDP gradients are bad on both, and only one knows why and tells where."""
    outputs = run_ranks(RANK, tmp_path)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]

    here = {"module": "1", "phase": "forward"}
    there = {"module": "2 or another rank", "phase": "backward"}
    assert found == [[there, here, None], [here, here, None]]
    written = {path.name for path in tmp_path.glob("*.jsonl")}
    assert written == {f"{count} of 0.jsonl" for count in (0, 1, 2)}


# FP8


class Transformed(nn.Module):
    """Runs its second layer within a transform of torch.func."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.inner, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        x = self.first(x)
        if self.way == "vmap":
            y: Tensor = torch.func.vmap(self.inner)(x)
        else:
            y = torch.func.grad(lambda z: self.inner(z).square().sum())(x)
        return y


@pytest.mark.parametrize("way", ["vmap", "grad"])
def test_transforms_of_torch_func_are_looked_around(way: str) -> None:
    """Their tensors cannot be read; a fault in there is told where it comes out."""
    torch.manual_seed(0)
    model, x = Transformed(way), torch.randn(4, 8)
    optimizer = SGD(model.parameters(), 1e-3)
    monitor = NumericsMonitor(interval=1, rules={"nonfinite": "ignore"})
    with monitor.attach(model):
        for step in range(3):
            if step == 2:
                torch.nn.init.constant_(model.inner.weight, math.inf)
            optimizer.zero_grad()
            torch.autograd.backward(model(x).mean())
            optimizer.step()
    healthy, _, bad = (record["nonfinite"] for record in monitor.records)
    assert healthy is None
    assert bad == {"module": "(after first)", "phase": "backward"}


def test_a_module_that_only_passes_on_what_another_made_is_not_named() -> None:
    """A DropPath that keeps all returns the sick layer's own tensor."""

    class Keep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Sick(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            explode: Any = Explode.apply
            return super().forward(explode(x))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.sick, self.keep = nn.Linear(8, 8), Sick(8, 8), Keep()

        def forward(self, x: Tensor) -> Any:  # noqa: ANN401
            return self.keep(self.sick(self.stem(x).tanh()))

    model = Block()
    optimizer = SGD(model.parameters(), lr=0.1)
    with NumericsMonitor(rules={"nonfinite": "ignore"}).attach(model) as monitor:
        torch.autograd.backward(model(torch.ones(2, 8)).sum())
        optimizer.step()

    assert monitor.records[0]["nonfinite"] == {"module": "sick", "phase": "backward"}


def test_amax_of_fp8_tensors_is_recorded() -> None:
    """Delayed scaling: what the history holds; current scaling: what went in."""
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    for recipe in (fp8.DelayedScaling(amax_history_len=4), fp8.Float8CurrentScaling()):
        model = nn.Sequential(fp8.Linear(32, 16), fp8.Linear(16, 16))
        optimizer = SGD(model.parameters(), lr=1e-3)
        monitor = NumericsMonitor(interval=1)
        weights = model.get_parameter("0.weight").detach().abs().amax()
        with monitor.attach(model):
            for factor in (1.0, 2.0):
                with fp8.autocast(enabled=True, recipe=recipe):
                    out = model(x * factor)
                torch.autograd.backward(out.float().square().mean())
                optimizer.step()
                optimizer.zero_grad()
        first, second = (r["amax"] for r in monitor.records)

        assert first["0.input"] == pytest.approx(x.abs().amax().item(), rel=1e-6)
        assert second["0.input"] == pytest.approx(2 * first["0.input"], rel=1e-6)
        assert {"0.grad_output", "1.input", "1.grad_output"} <= set(first)
        if recipe.delayed():
            assert first["0.weight"] == pytest.approx(weights.item(), rel=1e-6)


def test_amax_of_a_step_is_that_of_its_largest_micro_batch() -> None:
    """Whichever comes first; what comes in between measurements does not count."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    model = fp8.Linear(32, 16)
    optimizer = SGD(model.parameters(), lr=1e-3)
    with NumericsMonitor(interval=2).attach(model) as monitor:
        for factors in ((4.0, 1.0), (8.0,), (1.0, 2.0)):
            for factor in factors:
                with fp8.autocast(enabled=True, recipe=fp8.Float8CurrentScaling()):
                    out = model(x * factor)
                torch.autograd.backward(out.float().square().mean())
            optimizer.step()
            optimizer.zero_grad()

    largest = x.abs().amax().item()
    amax = [r["amax"][".input"] for r in monitor.records]
    assert amax == [4 * largest, 2 * largest]


@pytest.mark.filterwarnings("ignore:fp8_autocast is deprecated")  # Lightning's
def test_the_trainers_transformer_engine_plugin_is_watched() -> None:
    """precision="transformer-engine", on the emulator: Linears become FP8's."""

    class Wide(Lit):
        def __init__(self) -> None:
            super().__init__(
                nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
            )

    with fp8.installed():
        monitor = NumericsMonitor(interval=1, rules={"max_lost": "ignore"})
        runner = trainer("transformer-engine", monitor, max_steps=3)
        x = torch.randn(48, 16)
        runner.fit(Wide(), DataLoader(TensorDataset(x), batch_size=16))

    assert [r["step"] for r in monitor.records] == [0, 1, 2]
    assert {"net.0.input", "net.0.weight", "net.2.grad_output"} <= set(
        monitor.records[-1]["amax"]
    )


# The record


def test_an_interrupted_run_keeps_and_continues_its_file(tmp_path: Path) -> None:
    """Killed in a line, then resumed: the later part replaces the lost one."""
    path = tmp_path / "deep" / "run.jsonl"

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
            if trainer.global_step == 5:
                raise OSError("the machine is gone")

    first = NumericsMonitor(path, interval=1)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="at{step}")
    runner = trainer("16-mixed", first, keep, Stop(), enable_checkpointing=True)
    with pytest.raises(OSError, match="the machine is gone"):
        runner.fit(Lit(), loader())
    steps = [json.loads(line).get("step") for line in path.read_text().splitlines()]
    assert steps == [None, 0, 1, 2, 3, 4]
    with path.open("a") as file:
        file.write('{"step": 5, "sca')

    second = NumericsMonitor(path, interval=1)
    trainer("16-mixed", second).fit(
        Lit(), loader(), ckpt_path=tmp_path / "atstep=3.ckpt", weights_only=False
    )

    assert [r["step"] for r in second.records] == [0, 1, 2, 3, 4, 5, 6]
    assert second.records[:3] == first.records[:3]
    assert NumericsMonitor.load(path).records == second.records
    assert len(path.read_text("utf-8").splitlines()) == 1 + 5 + 1 + 1 + 4

    fresh = NumericsMonitor(path, interval=1)
    trainer("32-true", fresh, max_steps=1).fit(Lit(), loader())
    assert [r["step"] for r in NumericsMonitor.load(path).records] == [0]


def test_records_are_on_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    """Every line is there when the step is over, not when the run is."""
    path = tmp_path / "run.jsonl"
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    with NumericsMonitor(path, interval=1).attach(model):
        for step in range(3):
            torch.autograd.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            lines = path.read_text("utf-8").splitlines()
            assert [json.loads(x).get("step") for x in lines[1:]] == list(
                range(step + 1)
            )


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    """Weights that are all 0 have no ratio: JSON, loggers and picture do without."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    path, seen = tmp_path / "run.jsonl", []
    model = fp8.Linear(16, 16)
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = NumericsMonitor(path, interval=1)
    with monitor.attach(model, log=lambda numbers, _: seen.append(numbers)):
        for value in (1.0, math.inf):
            with fp8.autocast(enabled=True, recipe=fp8.Float8CurrentScaling()):
                out = model(torch.full((16, 16), 1.0))
            monitor._tape.amax.see(".input", torch.tensor(value))
            torch.autograd.backward(out.float().sum())
            optimizer.step()

    lines = path.read_text("utf-8").splitlines()
    strict = [json.loads(line, parse_constant=refuse) for line in lines[1:]]
    assert strict == monitor.records == NumericsMonitor.load(path).records
    assert [r["update_ratio"] is None for r in strict] == [True, False]
    assert [r["amax"][".input"] for r in strict] == [1.0, None]
    assert ["numerics/update_ratio" in n for n in seen] == [False, True]
    assert ["numerics/amax/.input" in n for n in seen] == [True, False]
    figure = monitor.plot()
    drawn = {
        str(line.get_label()): [*line.get_xdata()]  # type: ignore[misc]
        for axes in figure.axes
        for line in axes.lines
    }
    assert (drawn["update / weight"], drawn[".input"]) == ([1], [0])
    figure.savefig(tmp_path / "run.png")


def test_counts_that_come_after_the_setup_continue_the_file(tmp_path: Path) -> None:
    """As with Fabric, which attaches before it loads."""
    path = tmp_path / "run.jsonl"

    def train(monitor: NumericsMonitor, steps: int) -> None:
        model = nn.Linear(2, 1)
        optimizer = SGD(model.parameters(), lr=0.1)
        with monitor.attach(model):
            if steps == 1:
                monitor.load_state_dict({"step": 2, "skips": 1, "consecutive_skips": 0})
            for _ in range(steps):
                torch.autograd.backward(model(torch.ones(1, 2)).sum())
                optimizer.step()

    train(NumericsMonitor(path, interval=1), 4)
    second = NumericsMonitor(path, interval=1)
    train(second, 1)

    assert [r["step"] for r in second.records] == [0, 1, 2]
    assert NumericsMonitor.load(path).records == second.records


def test_only_the_first_rank_writes_and_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank keeps its records; one file and one line in a log are enough."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for rank, steps in seen.items():
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        model = nn.Linear(2, 1)
        monitor = NumericsMonitor(tmp_path / f"{rank}.jsonl")

        def log(_: dict[str, float], step: int, steps: list[int] = steps) -> None:
            steps.append(step)

        with monitor.attach(model, log=log):
            torch.autograd.backward(model(torch.ones(1, 2)).sum())
            SGD(model.parameters(), lr=0.1).step()
        assert len(monitor.records) == 1

    assert seen == {0: [0], 1: []}
    assert [path.name for path in tmp_path.iterdir()] == ["0.jsonl"]


def test_fabric_checkpoints_carry_the_counts(tmp_path: Path) -> None:
    """It is stateful: fabric.save takes it as it takes a model."""
    monitor = NumericsMonitor()
    run_fabric(monitor, "16-mixed", network)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "f.ckpt", {"monitor": monitor})
    other = NumericsMonitor()
    fabric.load(tmp_path / "f.ckpt", {"monitor": other})

    assert other.state_dict() == monitor.state_dict()
    assert other.step == STEPS


def test_numbers_go_to_the_loggers(tmp_path: Path) -> None:
    """CSVLogger of Trainer and Fabric, and a function of yours."""
    logger = CSVLogger(tmp_path)
    fit(NumericsMonitor(interval=3), "16-mixed", logger=logger)
    text = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert "numerics/scale" in text[0]
    assert len(text) == 1 + 3

    seen: list[tuple[int, float]] = []
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = NumericsMonitor(interval=2)
    with monitor.attach(model, log=lambda m, s: seen.append((s, m["numerics/lost"]))):
        for _ in range(4):
            torch.autograd.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
    assert seen == [(0, 0.0), (2, 0.0)]

    fabric_logger = CSVLogger(tmp_path / "fabric")
    fabric = Fabric(
        accelerator="cpu", devices=1, loggers=fabric_logger, callbacks=NumericsMonitor()
    )
    linear = nn.Linear(2, 1)
    setup, stepper = fabric.setup(linear, SGD(linear.parameters(), lr=0.1))
    fabric.backward(setup(torch.ones(1, 2)).sum())
    stepper.step()
    fabric.call("on_train_end")
    fabric_logger.save()
    assert "numerics/scale" in Path(fabric_logger.log_dir, "metrics.csv").read_text()


def test_plot_draws_the_run(tmp_path: Path) -> None:
    """Four panels with the records' points; no record: an error."""
    path = tmp_path / "run.jsonl"
    monitor = NumericsMonitor(path, interval=1)
    fit(monitor, "16-mixed", lambda: Lit(network(2, "backward")))
    loaded = NumericsMonitor.load(path)

    figure = loaded.plot()
    figure.savefig(tmp_path / "run.png")

    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "Loss scale",
        "Shares",
        "Size of an update",
        "amax of FP8 tensors",
    ]
    scale, bad = figure.axes[0].lines[:2]
    assert list(scale.get_ydata()) == [r["scale"] for r in monitor.records]  # type: ignore[arg-type]
    assert list(bad.get_xdata()) == [2]  # type: ignore[arg-type]
    assert (tmp_path / "run.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no step is recorded yet"):
        NumericsMonitor().plot()


# Errors


def test_wrong_arguments_are_refused() -> None:
    """One clear error each, before a hook is set."""
    model = nn.Linear(2, 1)
    for name in ("interval", "sample"):
        for bad in (0, -1, 1.5, "2"):
            with pytest.raises(
                ValueError, match=f"{name} must be a whole number from 1"
            ):
                NumericsMonitor(**{name: bad})  # type: ignore[arg-type]
    for bad_format in (torch.int8, "fp16", 16):
        text = f"format must be a floating-point dtype, got {bad_format!r}"
        with pytest.raises(ValueError, match=text):
            NumericsMonitor(format=bad_format)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path must be a path or None, got 3"):
        NumericsMonitor(3)  # type: ignore[arg-type]
    for bad_rules in ("raise", 0):
        text = rf"rules must be a mapping of .*'max_lost'.*, got {bad_rules!r}"
        with pytest.raises(TypeError, match=text):
            NumericsMonitor(rules=bad_rules)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown rule 'min_scal', allow"):
        NumericsMonitor(rules={"min_scal": 1.0})
    with pytest.raises(ValueError, match=r"allowed are .*got 'stop'"):
        NumericsMonitor(rules={"max_lost": "stop"})
    with pytest.raises(ValueError, match="rule 'max_lost': the limit must be >= 0"):
        NumericsMonitor(rules={"max_lost": math.nan})
    with pytest.raises(TypeError, match="rule 'max_lost': the limit must be a number"):
        NumericsMonitor(rules={"max_lost": None})  # type: ignore[dict-item]
    monitor = NumericsMonitor()
    with pytest.raises(TypeError, match=r"nn\.Module, got int"):
        monitor.attach(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scaler must have the methods"):
        monitor.attach(model, scaler=3)
    with pytest.raises(TypeError, match="log must be callable, got 'csv'"):
        monitor.attach(model, log="csv")  # type: ignore[arg-type]
    negative = {"step": -1, "skips": 0, "consecutive_skips": 0}
    states: list[Any] = [{}, {"step": 1}, negative, 3, "step"]
    for state in states:
        with pytest.raises(ValueError, match="the state must have counts of"):
            monitor.load_state_dict(state)
    with (
        monitor.attach(model),
        pytest.raises(RuntimeError, match="attached already"),
    ):
        monitor.attach(model)
    assert hooks(model) == 0
    assert set(monitor.rules) == set(RULES)


def test_a_run_that_begins_ends_the_one_before() -> None:
    """A model that is set up second, or trained, takes the place of the first."""
    monitor = NumericsMonitor(interval=1, rules={"max_lost": "ignore"})
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=monitor)
    first, second, lit = nn.Linear(2, 1), nn.Linear(2, 1), Lit()
    for module in (first, second):
        fabric.setup(module, SGD(module.parameters(), lr=0.1))
    assert not first._forward_hooks
    assert second._forward_hooks
    trainer("32-true", monitor).fit(lit, loader(2))

    assert hooks(second) == hooks(lit) == 0
    assert len(monitor.records) == 2


def test_optimizers_of_other_models_are_left_alone() -> None:
    """Only steps over the attached model's parameters count."""
    mine, other = nn.Linear(2, 1), nn.Linear(2, 1)
    monitor = NumericsMonitor(interval=1)
    with monitor.attach(mine):
        for model in (other, mine, other):
            torch.autograd.backward(model(torch.ones(1, 2)).sum())
            SGD(model.parameters(), lr=0.1).step()

    assert len(monitor.records) == 1
