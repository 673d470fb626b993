"""Tests of snippets/precision_names.py, as read in guide/precision_names."""

import ast
import importlib.util
import inspect
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import DeepSpeedPrecision, FSDPPrecision
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.deepspeed import (
    DeepSpeedStrategy,
    _format_precision_config,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import GradBucket, HashStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from snippets.precision_names import (
    FRAMEWORKS,
    NAMES,
    SCALERS,
    InexactTranslation,
    Name,
    NoEquivalent,
    Precision,
    explain,
    lookup,
    main,
    translate,
)

ROOT = Path(__file__).parents[1]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}
# Lightning's advice on workers, and a name of torch's that it still uses.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning"
)


def spellings(framework: str) -> set[str]:
    """Every name and alias of one framework."""
    rows = [row for row in NAMES if row.framework == framework]
    return {s for row in rows for s in (row.name, *row.aliases)}


def row_id(row: Name) -> str:
    """Name a row in pytest's report."""
    return f"{row.framework}:{row.name}"


def closest(row: Name, to: str) -> Name:
    """What translate() gives, or its error names."""
    try:
        name = translate(row.name, to=to, framework=row.framework, exact=True)
        return lookup(name, to)[0]
    except NoEquivalent as error:
        return error.nearest


def installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def needs(package: str) -> pytest.MarkDecorator:
    """Skip a test where a framework is not installed."""
    return pytest.mark.skipif(not installed(package), reason=f"needs {package}")


each_row = pytest.mark.parametrize("row", NAMES, ids=row_id)


# Exact laws


def test_there_is_something_to_look_up() -> None:
    """The laws below run over every row; each framework has some."""
    assert len(NAMES) >= 90
    assert {row.framework for row in NAMES} == set(FRAMEWORKS)


def test_a_spelling_stands_for_one_thing_in_one_framework() -> None:
    """No framework has the same spelling in two rows."""
    for framework in FRAMEWORKS:
        rows = [row for row in NAMES if row.framework == framework]
        given = [s for row in rows for s in (row.name, *row.aliases)]

        assert len(given) == len(set(given)), framework


@each_row
def test_every_field_of_a_row_is_a_known_word(row: Name) -> None:
    """Storage, reduce and optimizer state are dtypes of torch, or said in words."""
    words = {"yours", "none", "FP8", "FP4", "8 bits", "24 bits"}
    fields = asdict(row.precision)

    assert fields.pop("scaler") in SCALERS
    compute = fields.pop("compute")
    assert compute.startswith(("FP8 ", "FP4 ")) or hasattr(torch, compute)
    for value in fields.values():
        assert value in words or isinstance(getattr(torch, value), torch.dtype)
    hardware = r"any( but MPS| GPU)?|CUDA(, MPS)?|sm\d+(, CUDA 12.9|, not sm120)?"
    assert re.fullmatch(hardware, row.hardware)


@each_row
def test_every_spelling_leads_to_its_row(row: Name) -> None:
    """lookup() finds a row by its name and by each of its aliases."""
    for spelling in (row.name, *row.aliases):
        assert lookup(spelling, row.framework) == (row,)
        if not FRAMEWORKS[row.framework].special:
            assert row in lookup(spelling)


@each_row
def test_a_translation_is_the_same_precision_or_an_error(row: Name) -> None:
    """Equal in all six fields; and where there is nothing equal, the error says so."""
    for to in FRAMEWORKS:
        there = [n for n in NAMES if n.framework == to]
        equal = [n.name for n in there if n.precision == row.precision]
        if equal:
            assert translate(row.name, to=to, framework=row.framework) == equal[0]
            continue
        with pytest.raises(NoEquivalent, match=re.escape(row.name)) as caught:
            translate(row.name, to=to, framework=row.framework, exact=True)
        assert caught.value.source == row
        assert caught.value.nearest.framework == to
        for field, (old, new) in caught.value.differences.items():
            assert getattr(row.precision, field) == old
            assert getattr(caught.value.nearest.precision, field) == new
            assert old != new
            assert f"{field} is {new}, not {old}" in str(caught.value)


@each_row
def test_an_inexact_translation_computes_the_same_and_warns(row: Name) -> None:
    """Unless exact, the nearest name with the same compute dtype; else an error."""
    for to in FRAMEWORKS:
        nearest = closest(row, to)
        differences = row.precision.differences(nearest.precision)
        if not differences:
            continue
        if "compute" in differences:
            with pytest.raises(NoEquivalent, match=re.escape(row.name)):
                translate(row.name, to=to, framework=row.framework)
            continue
        with pytest.warns(InexactTranslation) as told:
            name = translate(row.name, to=to, framework=row.framework)
        assert name == nearest.name
        for field, (old, new) in differences.items():
            assert f"{field} is {new}, not {old}" in str(told[0].message)


@each_row
def test_the_nearest_computes_in_the_same_dtype_if_any_does(row: Name) -> None:
    """Who asks for BF16 products is not sent to FP32 ones, nor from FP8 to 16 bits."""
    for to in FRAMEWORKS:
        computes = {n.precision.compute for n in NAMES if n.framework == to}
        nearest = closest(row, to)
        if row.precision.compute in computes:
            assert nearest.precision.compute == row.precision.compute
        elif any(c[:3] == row.precision.compute[:3] == "FP8" for c in computes):
            assert nearest.precision.compute.startswith("FP8")


def test_the_nearest_differs_least() -> None:
    """Of those that compute alike, the one with the fewest other differences."""
    for row in NAMES:
        for to in FRAMEWORKS:
            there = [n.precision for n in NAMES if n.framework == to]
            nearest = closest(row, to).precision
            counts = [
                len(row.precision.differences(other))
                for other in there
                if other.compute == nearest.compute
            ]
            assert len(row.precision.differences(nearest)) == min(counts)


def test_the_nearest_has_most_words_of_the_compute() -> None:
    """From FP8 in blocks to FP8 in blocks, where there are any; then per tensor."""
    for row in NAMES:
        wanted = row.precision.compute.split()
        for to in FRAMEWORKS:
            there = [n.precision.compute.split() for n in NAMES if n.framework == to]
            missed = [len({*w} ^ {*wanted}) for w in there if w[0] == wanted[0]]
            if missed:
                nearest = closest(row, to).precision.compute.split()
                assert len({*nearest} ^ {*wanted}) == min(missed)


def test_a_precision_differs_from_itself_in_nothing() -> None:
    """differences() is empty exactly for equals."""
    for a in {row.precision for row in NAMES}:
        for b in {row.precision for row in NAMES}:
            assert (a.differences(b) == {}) == (a == b)


# The oracle is PyTorch.


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the dtypes of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Look at the operands, and let the operation pass."""
        if func.overloadpacket in {torch.ops.aten.addmm, torch.ops.aten.mm}:
            self.seen |= {a.dtype for a in args if isinstance(a, Tensor)}
        return func(*args, **(kwargs or {}))


class Model(LightningModule):
    """One linear layer that notes what it computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.products: set[torch.dtype] = set()
        self.grad: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the one product, and watch it."""
        with Products() as products:
            y: Tensor = self.layer(x)
        self.products |= products.seen
        return y

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss is the mean."""
        loss: Tensor = self(batch[0]).mean()
        return loss

    def on_before_optimizer_step(self, _: torch.optim.Optimizer) -> None:
        """The gradient is complete here."""
        assert self.layer.weight.grad is not None
        self.grad = self.layer.weight.grad.dtype

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, whose state is what the registry speaks of."""
        return torch.optim.AdamW(self.parameters(), eps=1e-4)


def measure(
    model: Model, optimizer: torch.optim.Optimizer, scaler: object
) -> Precision:
    """Write down what a finished step has left, in the registry's words."""
    weight = model.layer.weight
    own = {id(p) for p in model.parameters()}
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    (compute,) = model.products
    values = {
        "storage": weight.dtype,
        "compute": compute,
        "reduce": model.grad,
        "optimizer_state": optimizer.state[weight]["exp_avg"].dtype,
    }
    words = {k: str(v).removeprefix("torch.") for k, v in values.items()}
    main_params = "none" if own == stepped else "float32"
    return Precision(
        **words, main_params=main_params, scaler="torch" if scaler else "none"
    )


def two_rows() -> Tensor:
    """A batch."""
    return torch.ones(2, 2)


def rows_of(framework: str) -> list[Name]:
    """The rows of one framework."""
    return [row for row in NAMES if row.framework == framework]


def train(
    model: Model,
    forward: AbstractContextManager[object],
    scaler: torch.amp.GradScaler | None = None,
) -> torch.optim.Optimizer:
    """Take two steps: a scaler that starts at 2**16 may skip the first."""
    optimizer = model.configure_optimizers()
    for _ in range(2):
        with forward:
            loss = model(two_rows().to(model.layer.weight.dtype)).float().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        model.on_before_optimizer_step(optimizer)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("row", rows_of("torch"), ids=row_id)
def test_torch_does_what_the_row_says(row: Name) -> None:
    """The name is the code: two steps of it leave the dtypes of its row."""
    model, device = Model(), "cpu"
    code, *and_scaler = row.name.split(" + ")
    made = eval(code, {"torch": torch, "device": device, "model": model})
    forward = made if isinstance(made, torch.autocast) else nullcontext()
    scaler = torch.amp.GradScaler(device) if and_scaler else None

    optimizer = train(model, forward, scaler)

    assert and_scaler in ([], ["GradScaler(device)"])
    assert measure(model, optimizer, scaler) == row.precision


def test_the_scaler_of_torch_is_described_as_it_is() -> None:
    """SCALERS["torch"] gives GradScaler's own defaults."""
    state = torch.amp.GradScaler("cpu").state_dict()

    assert state["scale"] == 2.0**16
    assert state["growth_interval"] == 2000
    assert state["growth_factor"] == 2.0
    assert SCALERS["torch"] == "from 2**16, doubled after 2000 clean steps in a row"


# The oracle is Lightning.


def allowed(maker: Callable[..., object]) -> set[str]:
    """Let Lightning list what it takes: its error names every value."""
    with pytest.raises(ValueError, match="Allowed precision values") as caught:
        maker(accelerator="cpu", precision="?")
    values = ast.literal_eval(str(caught.value).split("values: ")[1])
    return {str(value) for value in values}


@pytest.mark.parametrize("maker", [Trainer, Fabric])
def test_lightning_takes_the_listed_strings_and_no_other(
    maker: Callable[..., object],
) -> None:
    """What its error lists is what the registry has: names, aliases and numbers."""
    assert allowed(maker) == spellings("lightning")


@pytest.mark.parametrize("maker", [Trainer, Fabric])
def test_lightning_refuses_every_name_of_the_others(
    maker: Callable[..., object],
) -> None:
    """A name that the registry does not give to Lightning is a ValueError there."""
    others = {s for row in NAMES for s in (row.name, *row.aliases)}
    for name in [*(others - spellings("lightning")), "BF16-mixed", " bf16-mixed", True]:
        with pytest.raises(ValueError, match="is invalid"):
            maker(accelerator="cpu", precision=name)


def precision_argument(row: Name, plugin: Callable[..., object]) -> dict[str, Any]:
    """How to get this row on a CPU, where the string 16-mixed would be replaced."""
    if row.name == "16-mixed":
        return {"plugins": [plugin("16-mixed", device="cpu")]}
    return {"precision": row.name}


on_cpu = pytest.mark.parametrize(
    "row", [row for row in rows_of("lightning") if "sm" not in row.hardware], ids=row_id
)


@on_cpu
def test_trainer_does_what_the_row_says(row: Name) -> None:
    """A fit of two steps leaves the dtypes of the row, and its scaler."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = Model()
    trainer = Trainer(**QUIET, max_steps=2, **precision_argument(row, MixedPrecision))

    trainer.fit(model, DataLoader(TensorDataset(two_rows().repeat(2, 1)), batch_size=2))

    (optimizer,) = trainer.optimizers
    assert trainer.precision == row.name
    assert measure(model, optimizer, trainer.scaler) == row.precision


@on_cpu
def test_fabric_reduces_in_the_dtype_of_the_row(
    row: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP hands its buckets over as they go to the other ranks; their dtype is reduce.

    One process is enough for that: DDP fills its buckets all the same.
    """
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(key, value)
    strategy = DDPStrategy(process_group_backend="gloo")
    fabric = Fabric(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        **precision_argument(row, FabricMixedPrecision),
    )
    reduced = set()

    def hook(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        reduced.add(bucket.buffer().dtype)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        fabric.launch()
        model = Model()
        module, optimizer = fabric.setup(model, model.configure_optimizers())
        module._forward_module.register_comm_hook(None, hook)
        for _ in range(2):
            fabric.backward(module(two_rows()).mean())
            model.on_before_optimizer_step(optimizer)
            optimizer.step()
    finally:
        distributed.destroy_process_group()

    (dtype,) = reduced
    assert str(dtype) == f"torch.{row.precision.reduce}"
    scaler = getattr(fabric._precision, "scaler", None)
    assert measure(model, optimizer.optimizer, scaler) == row.precision


@pytest.mark.parametrize("row", rows_of("lightning"), ids=row_id)
def test_an_alias_is_its_name(row: Name) -> None:
    """Trainer reports the name for each alias, and for the number."""
    for alias in row.aliases:
        for given in [alias, *([int(alias)] if alias.isdecimal() else [])]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer = Trainer(**{**QUIET, "precision": given})
            told = " ".join(str(w.message) for w in caught)
            assert ("historical reasons" in told) == (alias in {"16", "bf16"})
            expected = "bf16-mixed" if row.name == "16-mixed" else row.name
            assert trainer.precision == expected


def test_on_a_cpu_16_mixed_becomes_bf16_mixed() -> None:
    """With a warning, and without a scaler: the note of the row."""
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        trainer = Trainer(**QUIET, precision="16-mixed")

    assert trainer.precision == "bf16-mixed"
    assert trainer.scaler is None
    assert lookup("16-mixed", "lightning")[0].note == "a CPU trains in bf16-mixed"


def test_a_number_that_is_no_whole_number_is_not_a_name() -> None:
    """16.0 equals 16, and Lightning lets it in, only to find nothing: we refuse it."""
    with pytest.raises(RuntimeError, match="No precision set"):
        Trainer(**{**QUIET, "precision": 64.0})
    with pytest.raises(TypeError, match=re.escape("got 64.0")):
        lookup(64.0)  # type: ignore[arg-type]


def test_the_strategies_take_the_listed_names() -> None:
    """FSDP and DeepSpeed: five names each, after the aliases are replaced."""
    plugins: dict[str, Callable[..., object]] = {
        "lightning-fsdp": FSDPPrecision,
        "lightning-deepspeed": DeepSpeedPrecision,
    }
    for framework, plugin in plugins.items():
        with pytest.raises(ValueError, match="must be one of") as caught:
            plugin("64-true")
        listed = ast.literal_eval(str(caught.value).split("one of: ")[1].rstrip("."))
        assert set(listed) == spellings(framework) - {"16", "32", "bf16"}


@pytest.mark.filterwarnings("ignore:FSDP with .* enables computation in lower")
@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled, but CUDA")
@pytest.mark.parametrize("row", rows_of("lightning-fsdp"), ids=row_id)
def test_fsdp_is_configured_as_the_row_says(row: Name) -> None:
    """The plugin gives FSDP its compute and reduce dtypes, and casts the module."""
    make: Callable[..., FSDPPrecision] = FSDPPrecision
    plugin = make(row.name)
    config = plugin.mixed_precision_config
    module = nn.Linear(2, 2)
    plugin.convert_module(module)
    optimizer = torch.optim.AdamW(module.parameters())
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()

    words = {
        "storage": module.weight.dtype,
        "compute": config.param_dtype,
        "reduce": config.reduce_dtype,
        "optimizer_state": optimizer.state[module.weight]["exp_avg"].dtype,
    }
    assert Precision(
        **{k: str(v).removeprefix("torch.") for k, v in words.items()},
        main_params="none",
        scaler="torch" if isinstance(plugin.scaler, torch.amp.GradScaler) else "none",
    ) == (row.precision)


def scaler_in_words(power: int, window: int, hysteresis: int) -> str:
    """Say a scaler's defaults as SCALERS does."""
    clean = f"doubled after {window} clean steps"
    return f"from 2**{power}, {clean}, hysteresis {hysteresis}"


@pytest.mark.parametrize("row", rows_of("lightning-deepspeed"), ids=row_id)
def test_deepspeed_is_configured_as_the_row_says(row: Name) -> None:
    """Lightning turns on DeepSpeed's fp16 or bf16 block, -mixed and -true alike."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(DeepSpeedStrategy).parameters.items()
    }
    keys = "loss_scale loss_scale_window min_loss_scale initial_scale_power hysteresis"
    scale = {key: defaults[key] for key in keys.split()}
    for name in {row.name, *row.aliases} - {"16", "32", "bf16"}:
        config: dict[str, Any] = {}
        _format_precision_config(config, name, **scale)
        block = {"float16": ["fp16"], "bfloat16": ["bf16"], "float32": []}
        assert list(config) == block[row.precision.storage]
        if row.precision.scaler == "DeepSpeed":
            fp16 = config["fp16"]
            assert fp16["loss_scale"] == 0  # dynamic
            assert SCALERS["DeepSpeed"] == scaler_in_words(
                fp16["initial_scale_power"],
                fp16["loss_scale_window"],
                fp16["hysteresis"],
            )
    assert translate(row.name, framework="lightning-deepspeed", to="deepspeed") in {
        "neither fp16 nor bf16",
        *config,
    }


# Oracles: Transformer Engine's recipes, and Lightning's use of them. Their wheel lets
# the Python part be imported without a GPU, for its own build, behind this variable.

RECIPES = """
import warnings
warnings.simplefilter("ignore")
import torch
import transformer_engine.common.recipe as te
from lightning.fabric.plugins import TransformerEnginePrecision
for dtype in (torch.bfloat16, torch.float16):
    plugin = TransformerEnginePrecision(weights_dtype=dtype)
    recipe = plugin.recipe
    print(dtype, type(recipe).__name__, recipe.fp8_format.name)
for name in NAMES:
    recipe = getattr(te, name)()
    format = getattr(recipe, "fp4_format", recipe.fp8_format).name
    print(name, format, getattr(recipe, "amax_history_len", ""),
          getattr(recipe, "amax_compute_algo", ""))
others = [n for n, c in vars(te).items() if isinstance(c, type)
          and issubclass(c, te.Recipe) and c is not te.Recipe]
print(*others)
"""


@needs("transformer_engine")
def test_the_recipes_have_the_listed_formats() -> None:
    """Each name is a class of the installed wheel, and its default format is compute's.

    Lightning builds DelayedScaling for both of its strings.
    """
    rows = rows_of("transformer-engine")
    program = RECIPES.replace("NAMES", repr([row.name for row in rows]))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NVTE_PROJECT_BUILDING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bf16, fp16, *recipes, others = done.stdout.splitlines()

    assert bf16 == "torch.bfloat16 DelayedScaling HYBRID"
    assert fp16 == "torch.float16 DelayedScaling HYBRID"
    for row, line in zip(rows, recipes, strict=True):
        name, own, *amax = line.split()
        assert name == row.name
        _, listed = row.precision.compute.split(",")[0].split()
        assert own == listed.upper()
        if name == "DelayedScaling":  # Megatron-Bridge's recipe sets the same two
            assert amax == ["1024", "max"]
    assert set(others.split()) - {row.name for row in rows} == {"CustomRecipe"}


# Oracles: frameworks that the requirements leave out. Where one is installed, its rows
# are compared with it; the page says what was read instead.


@needs("accelerate")
@pytest.mark.parametrize("name", ["no", "bf16", "fp16"])
def test_accelerate_does_what_the_row_says(name: str) -> None:
    """On a CPU fp16 is not fp16: no autocast, no scaler, no word about it."""
    accelerate = importlib.import_module("accelerate")
    (row,) = lookup(name, "accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision=row.name, cpu=True)
    model = Model()
    inner, optimizer = accelerator.prepare(model, model.configure_optimizers())
    accelerator.backward(inner(two_rows()).mean())
    model.on_before_optimizer_step(optimizer)
    optimizer.step()

    measured = measure(model, optimizer.optimizer, accelerator.scaler)
    if row.name == "fp16":
        assert measured == lookup("no", "accelerate")[0].precision
    else:
        assert measured == row.precision


@needs("accelerate")
def test_accelerate_takes_the_listed_names_and_no_other() -> None:
    """Its error lists them."""
    accelerate = importlib.import_module("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="Choose between") as caught:
        accelerate.Accelerator(mixed_precision="FP16", cpu=True)

    assert set(ast.literal_eval(str(caught.value).split("between ")[1])) == spellings(
        "accelerate"
    )


CORE = "megatron.bridge.training.mixed_precision"
GATHERED = {"fp8_param_gather": "FP8", "fp4_param_gather": "FP4"}
SCALING = {
    "delayed": "delayed scaling",
    "tensorwise": "current scaling",
    "blockwise": "blocks of 128",
    "mxfp8": "MX blocks of 32",
}


def in_words(config: Any) -> Precision:  # noqa: ANN401 - two classes, one shape
    """Say what a configuration of Megatron Core does, in the registry's words."""
    half = "bfloat16" if config.bf16 else "float16"
    storage, compute = half, half
    if config.fp8:
        name = config.fp8 if config.fp8 == "hybrid" else config.fp8.upper()
        compute = f"FP8 {name}, {SCALING[config.fp8_recipe]}"
    if getattr(config, "fp4", None):
        compute = "FP4 E2M1, NVFP4 blocks of 16"
    if config.first_last_layers_bf16:
        first = config.num_layers_at_start_in_bf16
        compute += f", {first} + {config.num_layers_at_end_in_bf16} layers in 16 bits"
    for field, gathered in GATHERED.items():
        if getattr(config, field, False):
            storage = gathered
    reduce = "float32" if config.grad_reduce_in_fp32 else half
    scaler = "none" if config.bf16 else "Megatron"
    return Precision(storage, compute, reduce, "float32", "float32", scaler)


@needs("megatron.bridge")
def test_megatron_bridge_has_the_listed_recipes() -> None:
    """Every registered recipe has a row with its fields, and every row a recipe."""
    bridge = importlib.import_module(CORE)
    recipes = bridge.MIXED_PRECISION_RECIPES

    assert set(recipes) == spellings("megatron-bridge")
    for name, recipe in recipes.items():
        config = recipe()
        (row,) = lookup(name, "megatron-bridge")
        assert in_words(config) == row.precision, name
        power = int(math.log2(config.initial_loss_scale))
        window = config.loss_scale_window
        assert SCALERS["Megatron"] == scaler_in_words(power, window, config.hysteresis)


@needs("nemo.collections.llm")
def test_nemo_framework_has_the_listed_recipes() -> None:
    """Every function of its recipes module has a row with its fields."""
    module = "nemo.collections.llm.recipes.precision.mixed_precision"
    recipes = importlib.import_module(module)
    plugins = importlib.import_module("nemo.lightning.pytorch.plugins.mixed_precision")
    functions = {
        name: function
        for name, function in inspect.getmembers(recipes, inspect.isfunction)
        if function.__module__ == module
    }

    listed = {s for s in spellings("nemo-framework") if "_" in s}
    assert set(functions) == listed
    for name, function in functions.items():
        config = function().__arguments__
        plugin = plugins.MegatronMixedPrecision(**config)
        made = in_words(plugin.dtype_config)
        assert made == lookup(name, "nemo-framework")[0].precision, name
    for name in spellings("nemo-framework") - listed:
        dtypes = plugins.MegatronMixedPrecision(name).dtype_config
        (row,) = lookup(name, "nemo-framework")
        if row.precision.storage == "float32":
            assert (dtypes.fp16, dtypes.bf16) == (False, False)
        else:
            assert in_words(dtypes) == row.precision
    taken_for_32 = plugins.MegatronMixedPrecision("bf16-true").dtype_config
    assert (taken_for_32.fp16, taken_for_32.bf16) == (False, False)


@needs("nemo.utils.trainer_utils")
def test_nemo_replaces_the_listed_names_and_passes_on_the_rest() -> None:
    """Four names and two aliases get a plugin of NeMo's; the rest go to Lightning."""
    omegaconf = importlib.import_module("omegaconf")
    utils = importlib.import_module("nemo.utils.trainer_utils")
    own = {"fp16-true", "bf16-true", "fp16-flash", "bf16-flash"}
    pairs = [(row, s) for row in rows_of("nemo") for s in (row.name, *row.aliases)]
    for row, spelling in pairs:
        config = omegaconf.OmegaConf.create({"precision": spelling})
        made = utils.resolve_trainer_cfg(config)
        if row.name in own:
            (plugin,) = made["plugins"]
            assert "precision" not in made
            assert type(plugin).__name__ == (
                "FlashPrecision" if "flash" in row.name else "HalfPrecisionForAudio"
            )
            dtype = str(plugin._desired_input_dtype)
            assert dtype == f"torch.{row.precision.storage}"
            batch = {"audio": torch.ones(1), "text": torch.ones(1)}
            converted = plugin.convert_input(batch)
            assert converted["audio"].dtype == torch.float32
            assert str(converted["text"].dtype) == dtype
        else:
            assert made == {"precision": spelling}
            assert spelling in spellings("lightning")


# Errors


def test_what_is_no_name_is_told_with_the_nearest() -> None:
    """Unknown, misspelt, in capitals, with blanks, or from elsewhere."""
    for name, nearest in {
        "BF16-mixed": "'bf16-mixed'",
        " bf16-true ": "'bf16-true'",
        "bf16-tru": "'bf16-true'",
        "16mixed": "'16-mixed'",
        "bfloat": "'bfloat16'",
        "bf16_with_fp8_curent_scaling": "'bf16_with_fp8_current_scaling_mixed'",
    }.items():
        with pytest.raises(ValueError, match="is no precision name; nearest: ") as told:
            lookup(name)
        assert repr(name) in str(told.value)
        assert nearest in str(told.value)
    with pytest.raises(ValueError, match=re.escape("what it is in nemo is '16-true'")):
        lookup("fp16-true", "lightning")
    with pytest.raises(ValueError, match="'fp4x' is no precision name in nemo; near"):
        translate("fp4x", to="lightning", framework="nemo")


@each_row
def test_one_wrong_letter_is_found_out(row: Name) -> None:
    """Any name without its last letter leads back to that name, or is another name."""
    misspelt = row.name[:-1].upper()
    with pytest.raises(ValueError, match="nearest: ") as told:
        lookup(misspelt, row.framework)

    assert repr(row.name) in str(told.value)


@pytest.mark.parametrize("name", [None, True, False, 16.0, b"16", ["16"], torch.half])
def test_what_is_neither_text_nor_a_number_is_refused(name: object) -> None:
    """A bool is an int to Python, but no precision."""
    calls: list[Callable[..., object]] = [
        lookup,
        explain,
        partial(translate, to="nemo"),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=re.escape(f"got {name!r}")):
            call(name)


@pytest.mark.parametrize("framework", ["Lightning", "nemo_rl", "", 3, ["nemo"]])
def test_an_unknown_framework_is_told_with_all(framework: object) -> None:
    """For both arguments; the list is short enough to print."""
    with pytest.raises(ValueError, match="framework must be one of torch, lightning"):
        lookup("bf16-mixed", framework)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"to must be one of .* got ") as told:
        translate("bf16-mixed", to=framework)  # type: ignore[arg-type]
    assert repr(framework) in str(told.value)
    assert "; nearest: " in str(told.value)


def test_a_name_of_several_meanings_needs_its_framework() -> None:
    """The error lists who means what, in the fields that differ and in no other."""
    with pytest.raises(ValueError, match="'bf16-mixed' means different things") as told:
        translate("bf16-mixed", to="accelerate")

    meanings = str(told.value).split("say framework=: ")[1].split("; ")
    assert meanings == [
        "lightning has storage float32, main_params none",
        "nemo has storage float32, main_params none",
        "nemo-framework has storage bfloat16, main_params float32",
        "megatron-bridge has storage bfloat16, main_params float32",
    ]
    assert translate("bf16-mixed", to="accelerate", framework="lightning") == "bf16"


def test_special_frameworks_do_not_make_a_name_ambiguous() -> None:
    """16-mixed under DeepSpeed is another thing, told only to who asks for it."""
    ordinary = lookup("16-true")
    assert {row.framework for row in ordinary} == {"lightning", "nemo"}
    (deepspeed,) = lookup("16-true", "lightning-deepspeed")

    assert deepspeed.precision.main_params == "float32"
    assert {row.precision.main_params for row in ordinary} == {"none"}
    assert translate("16-true", to="nemo") == "fp16-true"


# What is printed


@each_row
def test_an_explanation_has_all_of_the_row(row: Name) -> None:
    """Fields, what to write, what it runs on, the note, who checked, the equals."""
    text = explain(row.name, row.framework)

    fields = asdict(row.precision).items()
    assert [line.split(None, 1) for line in text.splitlines()[1:6]] == [
        list(field) for field in fields
    ][:5]
    assert f"{row.precision.scaler}, {SCALERS[row.precision.scaler]}" in text
    for fact in (str(row), row.hardware, row.note, FRAMEWORKS[row.framework].checked):
        assert fact in text
    listed = re.findall(r"(?m)^  same in (.+)$", text)
    assert listed == [
        f"{other.framework}: {other.name}"
        for other in NAMES
        if other != row and other.precision == row.precision
    ]


def test_an_ambiguous_name_is_explained_once_for_each_meaning() -> None:
    """A paragraph for a meaning, whoever shares it."""
    paragraphs = explain("bf16-mixed").split("\n\n")

    assert [p.splitlines()[0] for p in paragraphs] == ["bf16-mixed"] * 2
    assert "in lightning: " in paragraphs[0]
    assert "in nemo: " in paragraphs[0]
    assert "in megatron-bridge: " in paragraphs[1]


def test_the_command_answers_and_fails_as_the_functions_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An answer on stdout, an error on stderr with status 2."""
    main(["16-true", "--to", "nemo"])
    assert capsys.readouterr().out == "fp16-true\n"
    main(["bf16-mixed", "--framework", "lightning"])
    assert capsys.readouterr().out == explain("bf16-mixed", "lightning") + "\n"

    main(["bf16-true", "--to", "nemo-rl"])
    told = capsys.readouterr()
    assert told.out == "bfloat16\n"
    assert "nemo-rl has no equivalent of 'bf16-true'" in told.err

    with pytest.raises(SystemExit, match="2"):
        main(["bf16-true", "--to", "nemo-rl", "--exact"])
    told = capsys.readouterr()
    assert told.out == ""
    assert "nemo-rl has no equivalent of 'bf16-true'" in told.err


# The tables of the site


def test_the_reference_page_has_a_table_for_every_framework() -> None:
    """And the two that are about all of them."""
    page = ROOT / "source/reference/precision_names_table.rst"
    made = re.findall(r"(?m)^\.\. precision-names:: (\S+)$", page.read_text("utf-8"))

    assert sorted(made) == sorted([*FRAMEWORKS, "frameworks", "equivalents"])


# Sphinx curls the quotation marks of prose.
STRAIGHT = str.maketrans({"\u2019": "'", "\u201c": '"', "\u201d": '"'})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[ET.Element, str]:
    """A site of one page with every table and a misspelt one, and its complaints."""
    folder = tmp_path_factory.mktemp("site")
    asked = [*FRAMEWORKS, "equivalents", "lighting"]
    tables = "".join(f".. precision-names:: {which}\n\n" for which in asked)
    (folder / "index.rst").write_text(f"Title\n=====\n\n{tables}", "utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "_ext")])
    command = [sys.executable, "-m", "sphinx", "-qC", "-b", "xml", "-D"]
    done = subprocess.run(
        [*command, "extensions=tables", str(folder), str(folder / "out")],
        env={**os.environ, "PYTHONPATH": path, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return ET.parse(folder / "out/index.xml").getroot(), done.stderr


def test_a_table_shows_every_row_of_its_framework(
    site: tuple[ET.Element, str],
) -> None:
    """Two rows for a name: spellings, hardware and note, and then the six fields."""
    tables = site[0].findall(".//table")
    for framework, table in zip(FRAMEWORKS, tables, strict=False):
        body = table.findall(".//tbody/row")
        names = rows_of(framework)
        assert len(body) == 2 * len(names)
        for row, across, fields in zip(names, body[::2], body[1::2], strict=True):
            spelled = [literal.text for literal in across.findall(".//strong/*")]
            assert spelled == [row.name, *row.aliases]
            said = "".join(across.itertext()).strip().translate(STRAIGHT)
            assert said.endswith(row.hardware + (f"; {row.note}" if row.note else ""))
            shown = ["".join(entry.itertext()).strip() for entry in fields]
            assert shown == list(asdict(row.precision).values())


def test_the_table_of_equivalents_shows_what_translates(
    site: tuple[ET.Element, str],
) -> None:
    """One row for each precision of several frameworks, with the names of each."""
    table = site[0].findall(".//table")[-1]
    shared = {}
    for row in NAMES:
        equal = [n for n in NAMES if n.precision == row.precision]
        if len({n.framework for n in equal}) > 1:
            shared[row.precision] = [f"{n.framework} {n.name}" for n in equal]
    shown = table.findall(".//tbody/row")

    assert len(shown) == len(shared)
    for names, cells in zip(shared.values(), shown, strict=True):
        listed = []
        for item in cells.iter("list_item"):
            framework = "".join(item.itertext()).split()[0]
            listed += [
                f"{framework} {literal.text}" for literal in item.iter("literal")
            ]
        assert sorted(listed) == sorted(names)


def test_an_unknown_table_is_an_error_of_the_build(
    site: tuple[ET.Element, str],
) -> None:
    """A page cannot ask without a word for what is not there."""
    assert re.search(r"index.rst:\d+: ERROR: precision-names takes one of fr", site[1])
    assert "got 'lighting'" in site[1]
