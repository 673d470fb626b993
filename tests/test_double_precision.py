"""Tests of snippets/double_precision.py, as read in guide/double_precision."""

import copy
import json
import logging
import math
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import DoublePrecision as FabricDoublePrecision
from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.double_precision import ALLOWED_RATIO, RECORD, WORK
from snippets import double_precision as snippet
from snippets.double_precision import (
    DoublePrecision,
    double_precision,
    find_single,
    to_double,
    trace_single,
)

F32, F64 = torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128
WIDE = {
    torch.float16: F64,
    torch.bfloat16: F64,
    F32: F64,
    F64: F64,
    torch.complex32: C128,
    C64: C128,
    C128: C128,
}
KEPT = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": optim.AdamW,
    "AdamW fused": lambda p: optim.AdamW(p, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, foreach=True),
    "Adam amsgrad": lambda p: optim.Adam(p, amsgrad=True),
    "Adafactor": optim.Adafactor,
    "Adagrad": optim.Adagrad,
    "Adadelta": optim.Adadelta,
    "Adamax": optim.Adamax,
    "ASGD": optim.ASGD,
    "LBFGS": optim.LBFGS,
    "LBFGS search": lambda p: optim.LBFGS(p, line_search_fn="strong_wolfe"),
    "Muon": optim.Muon,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": optim.Rprop,
}
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 4), (2, 4)),
    "LSTM": (lambda: nn.LSTM(4, 4), (2, 3, 4)),
    "Transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8), (2, 3, 4)),
    "Conv2d": (lambda: nn.Conv2d(2, 2, 3), (1, 2, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 2, 3), (2, 4, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (2, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (2, 4)),
    "PReLU": (nn.PReLU, (3, 4)),
    "GELU": (nn.GELU, (3, 4)),
    "Dropout": (nn.Dropout, (3, 4)),
}

each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
each_precision = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
lightning_uses_a_deprecated_name = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated"
)
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
few_workers = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def name(dtype: torch.dtype) -> str:
    """Return a name for a tensor that no method of a module has."""
    return f"a_{str(dtype)[6:]}"


class Mixed(nn.Module):
    """One tensor of each dtype, as parameter or buffer, and two that are neither."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in WIDE:
            values = torch.full((3,), 0.1, dtype=dtype)
            self.register_parameter(name(dtype), nn.Parameter(values))
        for dtype in KEPT:
            self.register_buffer(name(dtype), torch.ones(3, dtype=dtype))
        self.plain = torch.ones(2)
        self.nested = {"a": [torch.ones(2), (torch.ones(2, dtype=F64),)]}


class Affine(nn.Linear):
    """A layer with a constant that is made in ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale the result by new tensors."""
        return super().forward(x) * torch.linspace(0.1, 1, self.out_features)


@pytest.fixture(autouse=True)
def default_dtype_is_left_as_it_was() -> Iterator[None]:
    """No test, and nothing in the file, may leave another default dtype behind."""
    assert torch.get_default_dtype() == F32
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(F32)
    assert left == F32


@pytest.fixture(autouse=True)
def quiet_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's advice is not what is tested."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def fabric(plugin: FabricDoublePrecision | None = None) -> Fabric:
    """Return a Fabric on the CPU, Lightning's own 64-true unless a plugin is given."""
    plugins = plugin or FabricDoublePrecision()
    return Fabric(accelerator="cpu", devices=1, plugins=plugins)


def trainer(**settings: Any) -> lightning.Trainer:  # noqa: ANN401
    """Return a silent Trainer on the CPU with 64-true."""
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def run(model: nn.Module, optimizer: Optimizer, steps: int, seed: int = 0) -> None:
    """Train on random numbers, in the dtype of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(5, 3, generator=generator).to(dtype)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().sum()
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


def linear(dtype: torch.dtype = F32) -> nn.Linear:
    """Return a layer without bias, which Muon refuses; the same at every call."""
    torch.manual_seed(0)
    return nn.Linear(3, 4, bias=False).to(dtype)


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter and buffer."""
    return {name: t.dtype for name, t in model.state_dict().items()}


# Exact laws: the context.


def test_new_tensors_are_double_inside_and_float_outside() -> None:
    """Real and complex, in modules too, nested, and after an exception."""
    with double_precision():
        with double_precision():
            assert torch.tensor(0.1).item() == 0.1
        assert torch.tensor(1j).dtype == C128
        assert (torch.arange(3) / 3).dtype == F64
        assert nn.Linear(1, 1).weight.dtype == F64
        assert torch.ones(1, dtype=F32).dtype == F32
    assert torch.ones(1).dtype == F32
    with pytest.raises(ZeroDivisionError), double_precision():
        _ = 1 / 0
    assert torch.ones(1).dtype == F32


def test_context_restores_what_it_found_not_float32() -> None:
    """A default of bfloat16 comes back."""
    torch.set_default_dtype(torch.bfloat16)
    with double_precision():
        assert torch.ones(1).dtype == F64
    assert torch.ones(1).dtype == torch.bfloat16
    torch.set_default_dtype(F32)


def test_context_is_a_decorator() -> None:
    """Each call is inside, and the time between is not."""

    @double_precision()
    def make() -> Tensor:
        return torch.ones(1)

    assert [make().dtype, torch.ones(1).dtype, make().dtype] == [F64, F32, F64]


def test_context_reaches_threads_but_no_spawned_process() -> None:
    """The default dtype belongs to a process."""
    with double_precision():
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_default_dtype).result() == F64
        with multiprocessing.get_context("spawn").Pool(1) as processes:
            assert processes.apply(torch.get_default_dtype) == F32


# Exact laws: to_double.


def test_every_dtype_becomes_its_wide_one_and_integers_stay() -> None:
    """Real to float64, complex to complex128, and nothing else is touched."""
    model = Mixed()
    assert to_double(model) is model
    expected = {name(dtype): wide for dtype, wide in WIDE.items()}
    assert dtypes(model) == expected | {name(dtype): dtype for dtype in KEPT}
    assert model.plain.dtype == F32  # out of reach, as documented


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_widening_is_exact_for_all_numbers(dtype: torch.dtype) -> None:
    """All 65,536 codes, with NaN and both zeros, come back by rounding."""
    codes = torch.arange(2**16).to(torch.int16)
    model = nn.Module()
    model.register_buffer("numbers", codes.view(dtype))
    numbers = to_double(model).get_buffer("numbers")
    finite = ~numbers.isnan()
    assert torch.equal(numbers.to(dtype).view(torch.int16)[finite], codes[finite])
    assert torch.equal(numbers.isnan(), codes.view(dtype).isnan())


def test_parameters_stay_the_same_objects_tied_and_frozen() -> None:
    """An optimizer, a tie and requires_grad survive."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    before = [(id(p), p.requires_grad) for p in model.parameters()]
    to_double(model)
    assert [(id(p), p.requires_grad) for p in model.parameters()] == before
    assert model[0].weight is model[1].weight
    assert model[2].num_batches_tracked.dtype == torch.int64


def test_gradients_are_widened_too() -> None:
    """Accumulation goes on in float64 with what was there."""
    layer = nn.Linear(1, 1, bias=False, dtype=C64)
    layer(torch.ones(1, dtype=C64)).abs().sum().backward()
    assert layer.weight.grad is not None
    expected = layer.weight.grad.to(C128)
    to_double(layer)
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, expected)
    layer(torch.ones(1, dtype=C128)).abs().sum().backward()
    assert layer.weight.grad.dtype == C128


def test_calling_it_again_changes_nothing() -> None:
    """What is double stays the same storage."""
    model = to_double(linear())
    pointer = model.weight.data_ptr()
    assert to_double(model).weight.data_ptr() == pointer


@each_optimizer
def test_a_run_goes_on_as_if_its_state_had_been_loaded(make: Make) -> None:
    """Oracle: torch's load_state_dict of the same state around a float64 model."""
    ours = linear()
    optimizer = make(ours.parameters())
    run(ours, optimizer, steps=3)
    theirs = copy.deepcopy(ours).to(F64)
    reference = make(theirs.parameters())
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    to_double(ours, optimizer)

    assert find_single(ours, optimizer) == {}
    for _ in range(2):
        run(ours, optimizer, steps=3, seed=1)
        run(theirs, reference, steps=3, seed=1)
        assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.dtype == F64


def test_learning_rate_in_a_tensor_is_widened_and_reported() -> None:
    """It was rounded when it was made, which only a new value mends."""
    layer = linear()
    optimizer = optim.AdamW(layer.parameters(), lr=torch.tensor(0.1), foreach=False)
    assert find_single(layer, optimizer)["group AdamW lr of group 0"] == "float32"
    to_double(layer, optimizer)
    found = {"group AdamW lr of group 0": "float64 with float32 values"}
    assert find_single(layer, optimizer) == found
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=F64)
    assert find_single(layer, optimizer) == {}


# Exact laws: find_single.


def test_everything_narrow_is_found_by_name() -> None:
    """Parameters, gradients, buffers, loose tensors and optimizer state."""
    model = nn.Sequential(Mixed(), nn.LSTM(2, 2), linear())
    layer = model[2]
    optimizer = optim.SGD(layer.parameters(), momentum=0.9)
    run(layer, optimizer, 1)
    found = find_single(model, optimizer)
    narrow = [d for d, wide in WIDE.items() if d is not wide]
    lstm = {f"parameter 1.{key}": "float32" for key in nn.LSTM(1, 1).state_dict()}
    mixed = {f"parameter 0.{name(d)}": str(d)[6:] for d in narrow}
    assert found == {
        **lstm,
        **mixed,
        "attribute 0.plain": "float32",
        "attribute 0.nested[0]": "float32",
        "parameter 2.weight": "float32",
        "gradient 2.weight": "float32",
        "state SGD momentum_buffer of 2.weight": "float32",
    }


def test_state_in_lists_and_several_optimizers_are_told_apart() -> None:
    """LBFGS keeps lists; two optimizers get a number."""
    layer = linear()
    lbfgs, adam = optim.LBFGS(layer.parameters()), optim.AdamW(layer.parameters())
    run(layer, lbfgs, 2)
    run(layer, adam, 1)
    found = find_single(layer, lbfgs, adam)
    assert "state LBFGS[0] old_dirs of weight[0]" in found
    assert "state LBFGS[0] H_diag of weight" in found
    assert "state AdamW[1] exp_avg of weight" in found
    assert not any("step of" in name for name in found)


def test_a_constant_that_was_rounded_is_found_and_a_true_one_is_not() -> None:
    """Float64 values are float32 values only by rounding, or if they are short."""

    def reported(values: Tensor) -> bool:
        model = nn.Module()
        model.register_buffer("values", values)
        return bool(find_single(model))

    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1000, dtype=F64, generator=generator)
    for value in exact:
        assert not reported(value)
    assert reported(exact.float().double())
    assert reported(torch.complex(exact, exact).to(C64).to(C128))
    assert not reported(torch.complex(exact, exact))
    assert not reported(torch.cat([exact.float().double(), exact[:1]]))
    assert reported(torch.tensor([0.1, math.inf, math.nan]).double())
    for short in (torch.arange(2**16), torch.arange(2**16) / 2**30, torch.zeros(0)):
        assert not reported(short.double())
    assert reported(torch.tensor(2.0**16 + 1).double())
    assert not reported(torch.ones(2, dtype=F64, device="meta"))


def test_rounded_values_of_parameters_are_no_fault() -> None:
    """Initial weights have no digits to lose."""
    assert find_single(linear().double()) == {}


def test_weights_that_a_module_keeps_twice_are_listed_once() -> None:
    """nn.LSTM holds its parameters in a list as well."""
    names = list(find_single(nn.LSTM(2, 2)))
    assert len(names) == 4
    assert all(name.startswith("parameter") for name in names)


# Exact laws: trace_single.


@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_a_step_in_float64_has_no_mixed_operation(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Forward, backward and every optimizer, fused ones included: no false alarm."""
    model = to_double(make())
    x = torch.ones(shape, dtype=F64)
    makers = [m for name, m in OPTIMIZERS.items() if name != "Muon"]
    optimizers = [m(model.parameters()) for m in makers if list(model.parameters())]

    def loss() -> Tensor:
        model.zero_grad()
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        total: Tensor = nn.functional.mse_loss(0.3 * out, out.exp() / 7)
        if total.requires_grad:
            torch.autograd.backward(total)
        return total

    with trace_single() as found:
        loss()
        for optimizer in optimizers:
            optimizer.step(loss)  # type: ignore[arg-type]
    assert found == []


def test_each_way_of_meeting_fewer_bits_is_recorded() -> None:
    """Promotion, rounding, writing into, comparing, complex, half, lists, backward."""
    x = torch.ones(3, dtype=F64, requires_grad=True)
    y = torch.ones(3)
    z = x.detach()
    cases: dict[str, Callable[[], Any]] = {
        "mul.Tensor float64, float32 -> float64": lambda: z * torch.tensor(0.1),
        "_to_copy.default float64 -> float32": z.float,
        "_to_copy.default float32 -> float64": y.double,
        "copy_.default float32, float64 -> float32": lambda: y.copy_(z),
        "gt.Tensor float64, float32 -> ": lambda: z > y,
        "mul.Tensor complex64, float64 -> complex128": lambda: torch.ones(3) * 1j * z,
        "cat.default float64, float32 -> float64": lambda: torch.cat([z, y]),
        "_to_copy.default float64 -> bfloat16": z.bfloat16,
        "add.out float64, float32 -> float32": lambda: torch.add(z, z, out=y),
    }
    for expected, work in cases.items():
        with trace_single() as found:
            work()
        assert [f"{m.op} {m.dtypes}" for m in found] == [expected]
    rounded = x.float().sum()
    with trace_single() as found:
        torch.autograd.backward(rounded)
    assert [f"{m.op} {m.dtypes}" for m in found] == [
        "_to_copy.default float32 -> float64"
    ]


def test_where_is_the_line_of_the_model() -> None:
    """Not one of torch or of the tracer; the same line is listed once."""
    model, x = Affine(2, 2).double(), torch.ones(2, dtype=F64)
    with trace_single() as found:
        for _ in range(3):
            model(x)
    (mixed,) = found
    code = Affine.forward.__code__
    assert mixed.where == f"{Path(__file__).name}:{code.co_firstlineno + 2}"


def test_what_has_nothing_to_do_with_float64_is_not_recorded() -> None:
    """A float32 step, and integers beside float64."""
    layer = linear()
    with trace_single() as found:
        run(layer, optim.AdamW(layer.parameters()), 1)
        torch.ones(3, dtype=F64)[torch.tensor([0])] * torch.arange(1)
    assert found == []


def test_tracing_ends_with_its_block() -> None:
    """By an exception too."""
    x = torch.ones(3, dtype=F64)
    with pytest.raises(RuntimeError, match="size"), trace_single() as found:
        x.float() + torch.ones(2)
    x.float()
    assert len(found) == 1


# The plugin, and what Lightning's own ones do.


def test_plugin_computes_what_plain_float64_computes() -> None:
    """Outputs, gradients and weights after a step, bit for bit."""
    plain = Affine(3, 4)
    wrapped = fabric(DoublePrecision())
    ours, optimizer = wrapped.setup(
        model := copy.deepcopy(plain), optim.SGD(model.parameters(), lr=0.1)
    )
    x = torch.randn(5, 3)
    out = ours(x)
    wrapped.backward(out.square().sum())
    optimizer.step()
    with double_precision():
        reference = optim.SGD(plain.double().parameters(), lr=0.1)
        expected = plain(x.double())
        expected.square().sum().backward()
        reference.step()
    assert out.dtype == F64
    assert torch.equal(out, expected)
    assert torch.equal(model.weight, plain.weight)


@dataclass
class Batch:
    """A batch of the reader's own."""

    x: Tensor
    ids: Tensor


def test_plugin_widens_inputs_in_any_collection_and_leaves_outputs() -> None:
    """Complex ones too; integers and booleans stay the same objects."""
    plugin = DoublePrecision()
    ids, mask = torch.arange(2), torch.ones(2, dtype=torch.bool)
    data = ([torch.ones(2)], {"z": torch.ones(2, dtype=C64)}, Batch(torch.ones(2), ids))
    (x,), named, batch = plugin.convert_input(data)
    assert (x.dtype, named["z"].dtype, batch.x.dtype) == (F64, C128, F64)
    assert batch.ids is ids
    assert plugin.convert_input(mask) is mask
    assert plugin.convert_output(data) is data
    assert plugin.precision == "64-true"


@pytest.mark.parametrize("inside", [False, True], ids=["setup", "init_module"])
def test_fabric_complex_parameters_by_plugin(inside: bool) -> None:
    """complex128 under init_module unless a dtype is named; ours always."""

    def make() -> nn.Module:
        model = nn.Module()
        model.free = nn.Parameter(torch.tensor(1j))
        model.named = nn.Parameter(torch.tensor(1j, dtype=C64))
        return model

    for plugin, named in ((FabricDoublePrecision(), C64), (DoublePrecision(), C128)):
        wrapper = fabric(plugin)
        if inside:
            with wrapper.init_module():
                model = make()
        else:
            model = make()
        wrapper.setup(model)
        free = C128 if inside else named
        assert dtypes(model) == {"free": free, "named": named}


def test_fabric_casts_back_to_the_default_dtype_outside() -> None:
    """To float32, unless the call is made inside of float64; its gradient as well."""
    wrapper = fabric()
    model = wrapper.setup(nn.Linear(2, 2))
    x = torch.ones(2, requires_grad=True)
    assert model(x).dtype == F32
    with double_precision():
        assert model(x).dtype == F64
    with wrapper.autocast():
        assert model(x).dtype == F64
    with trace_single() as found:
        model(x)
    assert found[-1].dtypes == "float64 -> float32"
    assert not torch.autograd.gradcheck(
        lambda x: model(x).double(),
        x.detach().double().requires_grad_(),
        eps=1e-8,
        raise_exception=False,
    )
    ours = fabric(DoublePrecision()).setup(nn.Linear(2, 2))
    assert torch.autograd.gradcheck(ours, x.detach().double().requires_grad_())


def test_fabric_converts_forward_only() -> None:
    """Another method gets its arguments as they are, marked or not."""

    class Model(nn.Linear):
        def look(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
            return x.dtype, torch.ones(1).dtype

    for mark in (False, True):
        model = fabric().setup(Model(1, 1))
        if mark:
            model.mark_forward_method("look")
        assert model.look(torch.ones(1)) == (F32, F32)


class Probe(lightning.LightningModule):
    """Write down what each hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[torch.dtype]] = {}
        self.early = nn.Linear(2, 1)
        self.wave = nn.Parameter(torch.tensor(1j))
        self.look("__init__", self.early.weight)

    def look(self, where: str, *tensors: Tensor) -> None:
        """Write down the default dtype and those given."""
        self.seen[where] = [t.dtype for t in (torch.ones(1), *tensors)]

    def setup(self, stage: str) -> None:
        """Look before the weights are converted."""
        self.look("setup", self.early.weight)

    def configure_model(self) -> None:
        """Make a layer where Lightning wants it."""
        self.late = nn.Linear(2, 1)
        self.look("configure_model", self.late.weight)

    def configure_optimizers(self) -> Optimizer:
        """Choose one that keeps state in the default dtype."""
        self.look("configure_optimizers", self.early.weight)
        return optim.NAdam(self.parameters())

    def on_train_batch_start(self, batch: list[Tensor], _: int) -> None:
        """Look at a batch outside of a step."""
        self.look("on_train_batch_start", *batch)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Look inside, and in the backward pass."""
        self.look("training_step", *batch)
        loss = self.early(batch[0]).sum() + self.late(batch[0]).sum()
        loss.register_hook(lambda g: self.look("backward", g))
        return loss  # type: ignore[no-any-return]


@few_workers
@lightning_uses_a_deprecated_name
def test_trainer_changes_the_default_dtype_in_steps_and_configure_model() -> None:
    """Inputs are widened, integers and complex numbers are not, outputs stay."""
    data = TensorDataset(torch.ones(2, 2), torch.arange(2), torch.ones(2, dtype=C64))
    module = Probe()
    fitted = trainer(max_steps=1)
    fitted.fit(module, DataLoader(data))
    assert module.seen == {
        "__init__": [F32, F32],
        "setup": [F32, F32],
        "configure_model": [F64, F64],
        "configure_optimizers": [F32, F64],
        "on_train_batch_start": [F32, F64, torch.int64, C64],
        "training_step": [F64, F64, torch.int64, C64],
        "backward": [F32, F64],
    }
    assert module.early.weight.dtype == F64
    assert module.wave.dtype == C64
    found = find_single(module, *fitted.optimizers)
    assert found["state NAdam mu_product of early.weight"] == "float32"
    with double_precision():
        module = to_double(Probe())
        fitted = trainer(max_steps=1)
        fitted.fit(module, DataLoader(data))
    assert find_single(module, *fitted.optimizers) == {}


class Recomputed(nn.Module):
    """Activation checkpointing around a block that makes a tensor."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = Affine(2, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block now, and again in the backward pass."""
        out: Tensor = checkpoint(
            self.inner, x.requires_grad_(), use_reentrant=self.use_reentrant
        )
        return out.square().sum()


def test_checkpointing_recomputes_in_another_dtype() -> None:
    """The error of one kind, the wrong gradient of the other, and the cure of both."""
    for plugin in (FabricDoublePrecision(), DoublePrecision()):
        wrapper = fabric(plugin)
        model = wrapper.setup(Recomputed(use_reentrant=False))
        loss = model(torch.ones(2))
        with pytest.raises(CheckpointError, match="different metadata"):
            wrapper.backward(loss)

    def gradient(inside: bool, recompute: bool) -> Tensor:
        wrapper = fabric(DoublePrecision())
        torch.manual_seed(0)
        module = Recomputed(use_reentrant=True)
        inner = module.inner
        model = wrapper.setup(module if recompute else inner)
        if inside:
            with double_precision():
                loss = (
                    model(torch.ones(2))
                    if recompute
                    else model(torch.ones(2)).square().sum()
                )
                wrapper.backward(loss)
        else:
            wrapper.backward(model(torch.ones(2)))
        assert inner.weight.grad is not None
        return inner.weight.grad

    right = gradient(inside=True, recompute=False)
    assert torch.equal(gradient(inside=True, recompute=True), right)
    off = (gradient(inside=False, recompute=True) / right - 1).abs().max().item()
    assert 2**-53 * 100 < off < 2**-22


@few_workers
@lightning_uses_a_deprecated_name
def test_checkpointing_in_the_trainer_needs_the_context() -> None:
    """The same error there."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Recomputed(use_reentrant=False)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            out: Tensor = self.model(batch[0])
            return out

        def configure_optimizers(self) -> Optimizer:
            return optim.SGD(self.parameters())

    data = DataLoader(TensorDataset(torch.ones(1, 2)))
    with pytest.raises(CheckpointError, match="different metadata"):
        trainer(max_steps=1).fit(Module(), data)
    with double_precision():
        trainer(max_steps=1).fit(Module(), data)


@pytest.mark.parametrize("precision", [FSDPPrecision, DeepSpeedPrecision])
def test_sharded_strategies_refuse_64_true(precision: Callable[[str], Any]) -> None:
    """Their plugins do not know the name."""
    with pytest.raises(ValueError, match="64-true"):
        precision("64-true")


# What torch does.


def test_the_casts_of_torch_leave_these_behind() -> None:
    """.double() keeps complex64; .to(float64) discards imaginary parts."""
    with pytest.warns(UserWarning, match="discards the imaginary part"):
        real = Mixed().to(F64)
    assert real.get_parameter("a_complex64").dtype == F64
    doubled = Mixed().double()
    assert doubled.get_parameter("a_complex64").dtype == C64
    assert doubled.plain.dtype == F32


def test_double_leaves_optimizer_state_behind() -> None:
    """SGD goes on in float32, AdamW stops."""
    layer = linear()
    optimizer: Optimizer = optim.SGD(layer.parameters(), momentum=0.9)
    run(layer, optimizer, 2)
    run(layer.double(), optimizer, 2)
    assert optimizer.state[layer.weight]["momentum_buffer"].dtype == F32
    layer = linear()
    optimizer = optim.AdamW(layer.parameters())
    run(layer, optimizer, 2)
    with pytest.raises(RuntimeError, match="dtype"):
        run(layer.double(), optimizer, 1)


@pytest.mark.parametrize(
    ("make", "keys"),
    [(optim.NAdam, {"mu_product"}), (optim.ASGD, {"eta", "mu"})],
)
def test_some_optimizers_keep_state_in_the_default_dtype(
    make: Make, keys: set[str]
) -> None:
    """Whatever the dtype of the parameters."""

    def found() -> set[str]:
        layer = linear(F64)
        optimizer = make(layer.parameters())
        run(layer, optimizer, 1)
        return {name.split()[2] for name in find_single(layer, optimizer)}

    assert found() == keys
    with double_precision():
        assert found() == set()


# When it pays.


def relative_error_of_fit(origin: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the error of the parabola's coefficient, and the condition number."""
    years = torch.arange(1947, 1963, dtype=dtype)
    t = years - origin
    x = torch.stack([torch.ones_like(t), t, t.square()], dim=1)
    y = (years - 1955).square()
    found = torch.linalg.lstsq(x, y[:, None]).solution[2].item()
    return abs(found - 1), torch.linalg.cond(x.double()).item()


def test_the_error_of_a_fit_is_within_the_condition_number() -> None:
    """It is at most kappa * u; where that exceeds 1 nothing is right."""
    for origin, kappa in ((0, 8e11), (1955, 44)):
        for dtype, u in ((F32, 2.0**-24), (F64, 2.0**-53)):
            error, condition = relative_error_of_fit(origin, dtype)
            assert condition == pytest.approx(kappa, rel=0.05)
            assert error < kappa * u
    assert relative_error_of_fit(0, F32)[0] > 0.99
    assert relative_error_of_fit(0, F64)[0] < 1e-9


def test_central_differences_err_by_the_two_thirds_power() -> None:
    """The best step of 2**-k leaves about u**(2/3), for float32 and float64."""
    for dtype, u in ((F32, 2.0**-24), (F64, 2.0**-53)):
        x = torch.linspace(1, 2, 1000, dtype=dtype)
        derivative = x.double().cos()
        errors = {}
        for k in range(1, 40):
            h = 2.0**-k
            difference = ((x + h).sin() - (x - h).sin()) / (2 * h)
            errors[h] = (difference.double() - derivative).abs().max().item()
        best = min(errors, key=errors.__getitem__)
        assert u ** (2 / 3) / 8 < errors[best] < u ** (2 / 3) * 8
        assert u ** (1 / 3) / 8 < best < u ** (1 / 3) * 8


def test_a_bit_buys_a_step_of_the_logistic_map() -> None:
    """The median over 999 starts is 29 ln 2 / lambda later, with lambda = ln 2."""

    def steps(dtype: torch.dtype) -> float:
        one = other = torch.linspace(0.1, 0.4, 999, dtype=dtype)
        total, together = torch.zeros(999), torch.ones(999, dtype=torch.bool)
        for _ in range(80):
            one, other = 4 * one * (1 - one), 4 * other - 4 * other * other
            together &= (one - other).abs() < 0.1
            total += together
        return total.median().item()

    assert steps(F64) - steps(F32) == pytest.approx(29, abs=2)


def test_var_is_right_where_the_textbook_formula_cancels() -> None:
    """Beyond a mean of 2**(bits / 2) the difference of squares is noise."""
    for dtype, mean in ((F32, 1e4), (F64, 1e9)):
        x = torch.tensor([mean, mean + 1, mean + 2], dtype=dtype)
        assert x.var(correction=0).item() == pytest.approx(2 / 3, rel=1e-6)
        textbook = (x.square().mean() - x.mean().square()).item()
        assert abs(textbook - 2 / 3) > 0.5


@each_precision
def test_gradcheck_and_cholesky_need_float64(dtype: torch.dtype) -> None:
    """Both fail in float32 and pass in float64."""
    x = torch.linspace(0, 1, 50, dtype=dtype)
    kernel = (-12.5 * (x[:, None] - x).square()).exp()
    factor = torch.linalg.cholesky_ex(kernel + 1e-8 * torch.eye(50, dtype=dtype))
    assert (factor.info.item() == 0) == (dtype is F64)
    points = x[:5].clone().requires_grad_()
    check = torch.autograd.gradcheck
    if dtype is F64:
        assert check(nn.functional.gelu, points)
    else:
        with pytest.warns(UserWarning, match="not a double precision"):
            assert not check(nn.functional.gelu, points, raise_exception=False)


def test_second_order_training_stalls_wherever_32_bits_are_left() -> None:
    """The gradient of L-BFGS vanishes in float64, unless Fabric casts back."""
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels[:500] / 16), torch.tensor(classes[:500])

    def largest_gradient(model: nn.Module, x: Tensor) -> float:
        (weight,) = model.parameters()
        optimizer = optim.LBFGS(
            [weight], max_iter=120, tolerance_grad=0, tolerance_change=0
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = nn.functional.cross_entropy(model(x), y)
            loss = loss + 0.1 * weight.square().sum()
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        return weight.grad.abs().max().item()

    start = nn.Linear(64, 10, bias=False)
    nn.init.zeros_(start.weight)
    floor = largest_gradient(to_double(copy.deepcopy(start)), x)
    single = largest_gradient(copy.deepcopy(start), x.float())
    theirs = largest_gradient(fabric().setup(copy.deepcopy(start)), x)
    ours = fabric(DoublePrecision()).setup(copy.deepcopy(start))
    assert largest_gradient(ours, x) == floor < 1e-13
    assert min(single, theirs) > 1e-11


# Its price.


def test_bytes_double_exactly() -> None:
    """Weight, gradient and moments: 16 and 32 bytes a parameter with AdamW."""
    counts = []
    for dtype in (F32, F64):
        layer = linear(dtype)
        optimizer = optim.AdamW(layer.parameters())
        run(layer, optimizer, 1)
        moments = [t for t in optimizer.state[layer.weight].values() if t.ndim > 0]
        assert layer.weight.grad is not None
        tensors = [layer.weight, layer.weight.grad, *moments]
        counts.append(sum(t.nbytes for t in tensors) / layer.weight.numel())
    assert counts == [16, 32]


def test_time_is_what_the_record_says() -> None:
    """Each kind of work takes longer, and no more than a training step may."""
    record = json.loads(RECORD.read_text("utf-8"))
    assert [row["work"] for row in record["work"]] == list(WORK)
    assert all(1 < row["ratio"] < ALLOWED_RATIO for row in record["work"])


# The copy, and errors.


def test_without_lightning_all_but_the_plugin_is_there(tmp_path: Path) -> None:
    """A plain PyTorch user needs torch alone."""
    assert snippet.__file__
    shutil.copy(snippet.__file__, tmp_path / "copied.py")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.modules["lightning"] = None
import copied, torch
with copied.double_precision():
    model = copied.to_double(torch.nn.Linear(1, 1))
assert copied.find_single(model) == {{}}
assert "DoublePrecision" not in {{*copied.__all__, *dir(copied)}}
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def state(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Return all dtypes that a refused call must leave alone."""
    entries = [list(entry.values()) for entry in optimizer.state.values()]
    return [dtypes(model), [getattr(v, "dtype", v) for e in entries for v in e]]


def test_bad_arguments_are_refused_before_anything_changes() -> None:
    """Wrong types, foreign parameters, quantized tensors."""
    layer = linear()
    optimizer = optim.SGD(layer.parameters(), momentum=0.9)
    run(layer, optimizer, 1)
    before = state(layer, optimizer)
    foreign = optim.SGD(nn.Linear(2, 1).parameters())
    wrong: Any = "sgd"
    for function in (to_double, find_single):
        with pytest.raises(TypeError, match=r"module must be .*Module, got Parameter"):
            function(layer.weight)  # type: ignore[arg-type, type-var]
        with pytest.raises(TypeError, match="optimizers must be torch's, got str"):
            function(layer, optimizer, wrong)
        with pytest.raises(
            ValueError, match=r"SGD holds .* shapes \[\(1, 2\), \(1,\)\]"
        ):
            function(layer, optimizer, foreign)
        assert state(layer, optimizer) == before
    layer.register_buffer("codes", torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"buffer codes is torch\.float8_e4m3fn"):
        to_double(layer, optimizer)
    assert find_single(layer)["buffer codes"] == "float8_e4m3fn"
    del layer.codes
    optimizer.state[layer.weight]["quantized"] = torch.zeros(1).to(torch.float8_e5m2)
    with pytest.raises(TypeError, match=r"state SGD quantized of weight is .*e5m2"):
        to_double(layer, optimizer)
    del optimizer.state[layer.weight]["quantized"]
    assert state(layer, optimizer) == before


def test_mps_is_refused_in_words() -> None:
    """It has no float64; a fake tensor stands in for one there."""
    with FakeTensorMode():
        model = nn.Module()
        model.register_buffer("steps", torch.ones(1, dtype=torch.int64, device="mps"))
        assert to_double(model) is model
        model.register_buffer("scale", torch.ones(1, device="mps"))
        with pytest.raises(ValueError, match="buffer scale is on MPS"):
            to_double(model)


def test_loose_tensors_are_not_converted_so_they_are_not_refused() -> None:
    """An attribute in 8 bits is none of its business."""
    layer = linear()
    layer.codes = torch.zeros(2, dtype=torch.float8_e5m2)
    assert find_single(to_double(layer)) == {"attribute codes": "float8_e5m2"}
