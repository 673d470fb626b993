"""Tests of snippets/memory_ledger.py, as read in guide/memory_ledger."""

import copy
import gc
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as hooks
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from snippets.main_params import MainParams
from snippets.memory_ledger import MemoryLedger
from snippets.true_half import TrueHalfAdamW

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LAYERS, WIDTH, ROWS = 4, 24, 10
NUMEL = LAYERS * WIDTH**2
STEPS = 4 * LAYERS  # AdamW counts its steps in a float32 number for each parameter


class Tied(nn.Module):
    """A weight that is used twice: to embed, and to score."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """Score token numbers made from x."""
        scores: Tensor = self.head(F.gelu(self.table((x.abs() * 9).long())))
        return scores


class Views(nn.Module):
    """One output, of which autograd saves three parts and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the parts."""
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed: Tensor = (q * k).softmax(-1) * v + (q.t() @ k).sum()
        return mixed


class Recurrent(nn.Module):
    """Two layers of LSTM, which is one operation to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Read rows as two time steps."""
        output: Tensor = self.lstm(x.view(-1, 2, 16))[0]
        return output


class Scaled(torch.autograd.Function):
    """An operation in Python, which saves its input and its output."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        """Square."""
        y = x * x
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        """Twice."""
        (x, _), (grad,) = ctx.saved_tensors, grads  # type: ignore[attr-defined]
        grad_input: Tensor = 2 * x * grad
        return grad_input


class InPython(nn.Module):
    """A layer around `Scaled`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Square a projection."""
        squares: Tensor = Scaled.apply(self.linear(x))  # type: ignore[no-untyped-call]
        return squares


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32), nn.Tanh()
    ),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)),
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    ),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 16)), nn.TransformerEncoderLayer(16, 2, 32)
    ),
    "tied": Tied,
    "lstm": Recurrent,
    "views": Views,
    "in Python": InPython,
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def backward(loss: Tensor, *, retain_graph: bool = False) -> None:
    """``loss.backward()``, which torch has not annotated."""
    torch.autograd.backward(loss, retain_graph=retain_graph)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 1) -> None:
    """Steps on batches that are made inside, so that all of it is allocated inside."""
    for _ in range(steps):
        loss = model(torch.randn(16, 32)).square().mean()
        backward(loss)
        optimizer.step()


def total(held: dict[str, int]) -> int:
    """All bytes of a moment."""
    return sum(held.values())


def stack(dtype: torch.dtype = FP32) -> nn.Sequential:
    """Linear layers without bias, with ReLU between: every byte has a formula."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


def walk(loss: Tensor, model: nn.Module) -> int:
    """Read what the graph says that it saved, node by node: no hook, no mode."""
    owned = [*model.parameters(), *model.buffers()]
    skip = {t.untyped_storage().data_ptr() for t in owned}
    seen, found, nodes = set(), {}, [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        names = [name for name in dir(node) if name.startswith("_saved_")]
        saved = [getattr(node, name) for name in names]
        saved += [list(getattr(node, "saved_tensors", ()))]
        for item in itertools.chain(
            *(s if isinstance(s, (list, tuple)) else [s] for s in saved)
        ):
            if isinstance(item, Tensor):
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in found.items() if pointer not in skip)


# Exact laws.


@pytest.mark.parametrize(
    ("name", "stored", "autocast"),
    [
        ("32-true", FP32, None),
        ("16-mixed", FP32, FP16),
        ("bf16-mixed", FP32, BF16),
        ("16-true", FP16, None),
        ("bf16-true", BF16, None),
        ("64-true", FP64, None),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, ROWS, 300])
def test_linear_stack_is_counted_as_its_formula_says(
    name: str, stored: torch.dtype, autocast: torch.dtype | None, rows: int
) -> None:
    """It is n w w b of each kind; activations n r w b', casts 2 n w w.

    The output is none, and where the cache ends, one of the n casts goes with it.
    """
    model, inside = stack(stored), {}
    optimizer = AdamW(model.parameters())
    x = torch.randn(rows, WIDTH, dtype=stored)
    with MemoryLedger(model, optimizer) as ledger:
        with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
            y = model(x)
            inside = ledger._watch.held() if ledger._watch else {}
        outside = ledger._watch.held() if ledger._watch else {}
        backward(y.sum())
        optimizer.step()

    b, computed = stored.itemsize, (autocast or stored).itemsize
    casts = 2 * NUMEL if autocast else 0
    assert inside["parameters"] == NUMEL * b
    assert inside.get("activations", 0) == LAYERS * rows * WIDTH * computed
    assert inside.get("casts", 0) == casts
    # The first layer needs no gradient of its input: its cast was only cached.
    assert outside.get("casts", 0) == casts * (LAYERS - 1) // LAYERS
    assert ledger.moments["step"]["gradients"] == NUMEL * b
    assert ledger.moments["step"]["optimizer"] == 2 * NUMEL * b + STEPS
    assert ledger.total_saved == (
        inside.get("activations", 0) + outside.get("casts", 0)
    )


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "expected"),
    [
        (FP16, None, {"parameters": 2, "main params": 4, "gradients": 6}),
        (BF16, None, {"parameters": 2, "main params": 4, "gradients": 6}),
        (BF16, FP32, {"parameters": 2, "main params": 4, "gradients": 4}),
        (FP32, None, {"parameters": 4, "gradients": 4}),
    ],
)
def test_main_params_take_20_18_and_16_bytes(
    dtype: torch.dtype, grad_dtype: torch.dtype | None, expected: dict[str, int]
) -> None:
    """Megatron's documented sums, measured inside of the second step."""
    model = stack(dtype)
    optimizer = MainParams(AdamW(model.parameters()), grad_dtype=grad_dtype)
    seen: dict[str, int] = {}
    optimizer.inner.register_step_pre_hook(
        lambda *_: seen.update(ledger._watch.held() if ledger._watch else {})
    )
    for _ in range(2):
        optimizer.zero_grad()
        with MemoryLedger(model, optimizer) as ledger:
            backward(model(torch.ones(2, WIDTH, dtype=dtype)).sum())
            optimizer.step()

    assert {kind: seen[kind] for kind in expected} == {
        kind: size * NUMEL for kind, size in expected.items()
    }
    assert seen["optimizer"] == 8 * NUMEL + STEPS
    assert sum(expected.values()) + 8 == {FP16: 20, BF16: 20, FP32: 16}[dtype] - 2 * (
        grad_dtype is not None
    )


def test_main_params_are_found_in_states_and_in_an_attribute() -> None:
    """AdamW of true_half keeps them in its state; one's own are said to be there."""
    model = stack(BF16)
    theirs = TrueHalfAdamW(model.parameters(), remedy="main_params")
    with MemoryLedger(model, theirs) as ledger:
        backward(model(torch.ones(2, WIDTH, dtype=BF16)).sum())
        theirs.step()
    assert ledger.moments["end"]["main params"] == 4 * NUMEL
    assert ledger.moments["end"]["optimizer"] == 8 * NUMEL + STEPS

    mains = {p: p.detach().float() for p in model.parameters()}
    own: Any = SGD(list(mains.values()))
    with pytest.raises(ValueError, match="SGD holds parameters that are not the"):
        MemoryLedger(model, own)
    own.main_params = mains
    with MemoryLedger(model, own) as ledger:
        pass
    assert ledger.moments["end"]["main params"] == 4 * NUMEL
    assert ledger.moments["end"] == ledger.moments["start"]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("s", "b", "h", "a"), [(8, 2, 16, 2), (24, 3, 16, 4)])
def test_transformer_layer_saves_34_sbh_and_5_a_s_s_b(
    dtype: torch.dtype, s: int, b: int, h: int, a: int
) -> None:
    """Korthikanti et al.'s formula, and 8 sb for the two norms' mean and deviation.

    ``F.dropout`` on a CPU keeps its masks in half precision, not in bytes.
    """

    def bytewise(x: Tensor) -> Tensor:
        dropped: Tensor = torch.native_dropout(x, 0.1, True)[0]
        return dropped

    class Layer(nn.Module):
        def __init__(self, dropout: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.dropout = dropout
            self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
            self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
            self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(self.norm1(x)).view(b, s, 3, a, -1).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind()  # [b, a, s, h / a]
            scores = q @ k.transpose(2, 3) / math.sqrt(h // a)
            mixed = self.dropout(scores.softmax(-1)) @ v
            x = x + self.dropout(self.proj(mixed.transpose(1, 2).reshape(b, s, h)))
            mlp = self.down(F.gelu(self.up(self.norm2(x))))
            out: Tensor = x + self.dropout(mlp)
            return out

    formula, masks = 34 * s * b * h + 5 * a * s * s * b, 2 * s * b * h + a * s * s * b
    for dropout, extra in ((bytewise, 0), (partial(F.dropout, p=0.1), masks)):
        model = Layer(dropout).to(dtype)
        with MemoryLedger(model) as ledger:
            model(torch.randn(b, s, h, dtype=dtype)).sum()
        assert sum(ledger.by_module.values()) == formula + extra + 8 * s * b


@pytest.mark.parametrize(("s", "b", "h", "a"), [(8, 2, 16, 2), (24, 3, 32, 4)])
def test_attention_in_one_operation_saves_no_scores(
    s: int, b: int, h: int, a: int
) -> None:
    """PyTorch's own layer: 32 sbh + 8 sb + 4 asb, or 38 sbh + 8 sb + 4 assb if not.

    4 asb is the float32 logarithm that the backward pass makes the scores from again.
    """
    layer = nn.TransformerEncoderLayer(h, a, 4 * h, 0.0, "gelu", batch_first=True)
    saved = {}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernel), MemoryLedger(layer.to(BF16)) as ledger:
            layer(torch.randn(b, s, h, dtype=BF16)).sum()
        saved[kernel] = sum(ledger.by_module.values())
    assert (
        saved[SDPBackend.FLASH_ATTENTION] == 32 * s * b * h + 8 * s * b + 4 * a * s * b
    )
    assert saved[SDPBackend.MATH] == 38 * s * b * h + 8 * s * b + 4 * a * s * s * b


def test_a_storage_counts_once_however_many_hold_it() -> None:
    """Views, a tensor that is saved five times, a tied weight: one storage each."""
    x = torch.ones(4, 8)
    model = nn.ParameterList([torch.ones(4, 8)])
    with MemoryLedger(model) as ledger:
        y = model[0] * 1.0 + x
        held = [y * y, y.view(8, 4) * x.view(8, 4), y[:1] * y[1:2], y.t() @ x]
        assert len(held) == 4
    # x, y and what the parameter was multiplied with, which is a number: not saved.
    assert ledger.by_module == {"(outside)": 2 * 4 * 8 * 4}

    tied = Tied()
    assert MemoryLedger(tied).peak == {}
    with MemoryLedger(tied) as ledger:
        backward(tied(torch.ones(2, 3)).sum())
    assert ledger.moments["end"] == {
        "parameters": 50 * 32 * 4,
        "gradients": 50 * 32 * 4,
    }


def test_a_part_keeps_the_whole_storage() -> None:
    """One row that is saved keeps all rows in memory, and so it counts."""
    model = nn.Linear(8, 8, bias=False)
    with MemoryLedger(model) as ledger:
        rows = torch.randn(100, 8)
        y = model(rows[:1])
        del rows
        assert ledger._watch is not None
        assert ledger._watch.held()["activations"] == 100 * 8 * 4
    assert y.shape == (1, 8)


@each_model
def test_parameters_and_buffers_are_not_activations(make: Callable[[], Any]) -> None:
    """They stay what they are, saved or not, in each moment."""
    model = make()
    own = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    with MemoryLedger(model) as ledger:
        backward(model(torch.randn(16, 32)).sum())
    for held in ledger.moments.values():
        assert held["parameters"] == own
        assert held.get("buffers", 0) == buffers


@pytest.mark.parametrize("ending", ["backward", "retain", "drop"])
def test_activations_are_freed_when_backward_ends(ending: str) -> None:
    """Or when the loss is dropped; retain_graph keeps them, and saves nothing new."""
    model = stack()
    with MemoryLedger(model) as ledger:
        loss = model(torch.randn(ROWS, WIDTH)).sum()
        if ending != "drop":
            backward(loss, retain_graph=ending == "retain")
        if ending != "retain":
            del loss
    kept = LAYERS * ROWS * WIDTH * 4 if ending == "retain" else 0
    assert ledger.moments["end"].get("activations", 0) == kept
    assert ledger.total_saved == LAYERS * ROWS * WIDTH * 4
    assert sum(ledger.by_module.values()) == ledger.total_saved


def test_modules_are_known_by_their_names_to_any_depth() -> None:
    """The innermost one that runs; what runs between them is their parent's."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": stack(), "b": nn.Tanh()})

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner["b"](self.inner["a"](x))
            return y * y.exp()

    model = Outer()
    with MemoryLedger(model) as ledger:
        loss = model(torch.randn(ROWS, WIDTH)).sigmoid().sum()
    size = ROWS * WIDTH * 4
    # A ReLU's output and the next layer's input are one tensor: the ReLU saves it.
    names = ["inner.a.0", "inner.a.1", "inner.a.3", "inner.a.5", "inner.b", ""]
    assert ledger.by_module == dict.fromkeys([*names, "(outside)"], size)
    assert loss.ndim == 0


def test_a_module_that_raises_is_left() -> None:
    """What is saved after a caught error is not put down to the module that raised."""

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no")

    model = nn.Sequential(nn.Linear(2, 2), Fails())
    with MemoryLedger(model) as ledger:
        with pytest.raises(KeyError):
            model(torch.ones(1, 2))
        y = torch.ones(3, requires_grad=True).exp()
    assert ledger.by_module["(outside)"] == y.nbytes


def test_checkpoints_save_their_input_and_recompute_the_rest() -> None:
    """Of n layers in k parts, k inputs are saved; a part comes back at a time."""
    model, size = stack(), ROWS * WIDTH * 4
    found: dict[bool | None, tuple[MemoryLedger, MemoryLedger]] = {}
    for use_reentrant in (None, False, True):
        forward, rest = MemoryLedger(model), MemoryLedger(model)
        with forward:
            y = torch.randn(ROWS, WIDTH, requires_grad=True)
            for part in (model[:4], model[4:]):
                if use_reentrant is None:
                    y = part(y)
                else:
                    y = checkpoint(part, y, use_reentrant=use_reentrant)
        with rest:
            backward(y.sum())
        found[use_reentrant] = forward, rest
    plain = found[None]
    assert plain[0].moments["end"]["activations"] == LAYERS * size
    assert "recomputed" not in plain[1].moments["backward"]
    for forward, rest in (found[False], found[True]):
        assert forward.moments["end"]["activations"] == 2 * size
        assert total(rest.moments["end"]) == total(plain[1].moments["end"])
    assert found[False][1].moments["backward"]["recomputed"] >= size
    # A checkpoint of the older kind runs a backward of its own, which saves again.
    assert sum(found[True][1].by_module.values()) >= 2 * size


def test_accumulation_holds_the_activations_of_one_micro_batch() -> None:
    """The total is that of the whole batch, the most at a time that of a part."""
    model, size = stack(), LAYERS * WIDTH * 4
    with MemoryLedger(model) as ledger:
        for _ in range(5):
            backward(model(torch.randn(ROWS, WIDTH)).sum())
    assert ledger.total_saved == 5 * ROWS * size
    assert sum(ledger.by_module.values()) == ROWS * size
    assert ledger.moments["forward"]["gradients"] == 4 * NUMEL


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_set_to_none_are_not_there_in_forward(set_to_none: bool) -> None:
    """With zeros in their place they are, and forward's most is more by as much."""
    model = stack()
    optimizer = AdamW(model.parameters())
    train_on = torch.randn(ROWS, WIDTH)
    for _ in range(2):
        with MemoryLedger(model, optimizer) as ledger:
            backward(model(train_on).sum())
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    kept = 0 if set_to_none else 4 * NUMEL
    assert ledger.moments["forward"].get("gradients", 0) == kept
    assert ledger.moments["end"].get("gradients", 0) == kept


def test_foreach_needs_a_copy_of_all_and_a_loop_of_one() -> None:
    """AdamW's temporaries: fused none; a loop 1 parameter's; foreach those of all."""
    model, most = stack(), {}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for way in ("fused", "loop", "foreach"):
        optimizer = AdamW(
            model.parameters(), foreach=way == "foreach", fused=way == "fused"
        )
        optimizer.step()
        with MemoryLedger(model, optimizer) as ledger:
            optimizer.step()
        most[way] = ledger.moments["step"].get("other", 0)
    one = 4 * WIDTH**2
    assert most["fused"] == 0
    assert most["loop"] == 3 * one  # a root, its quotient, and the last one's quotient
    assert LAYERS * one <= most["foreach"] < LAYERS * one + 64 * LAYERS


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_autocasts_cache_makes_one_cast_of_a_weight(cache_enabled: bool) -> None:
    """Without it, each of five uses makes and saves a copy of its own."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    with MemoryLedger(layer) as ledger:
        y = torch.randn(ROWS, WIDTH, requires_grad=True)
        with torch.autocast("cpu", BF16, cache_enabled=cache_enabled):
            for _ in range(5):
                y = layer(y)
    copies = 1 if cache_enabled else 5
    assert ledger.moments["forward"]["casts"] == copies * 2 * WIDTH**2
    assert ledger.moments["end"]["casts"] == copies * 2 * WIDTH**2
    del y


def test_a_gradient_that_is_replaced_was_one_until_it_died() -> None:
    """At the moment of the exchange there are two, as on a swap for a clone."""
    model = nn.Linear(8, 8, bias=False)
    model.weight.grad = torch.ones(8, 8)
    with MemoryLedger(model) as ledger:
        model.weight.grad = model.weight.grad.clone()
    assert ledger.moments["forward"] == {"parameters": 256, "gradients": 512}
    assert ledger.moments["end"] == {"parameters": 256, "gradients": 256}


def test_sparse_gradients_count_by_their_parts() -> None:
    """Three int64 indices and three rows."""
    table = nn.Embedding(100, 8, sparse=True)
    with MemoryLedger(table) as ledger:
        backward(table(torch.tensor([1, 2, 3])).sum())
    assert ledger.moments["end"]["gradients"] == 3 * 8 + 3 * 8 * 4


def test_what_runs_between_backward_and_the_model_is_the_steps() -> None:
    """Unscaling, or the user's own tensors: not put down to forward or backward."""
    model = stack()
    optimizer = SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with MemoryLedger(model, optimizer) as ledger:
        for _ in range(2):
            backward(scaler.scale(model(torch.ones(1, WIDTH)).sum()))
            extra = torch.zeros(10_000)
            scaler.step(optimizer)
            del extra
            scaler.update()
            optimizer.zero_grad()
    assert "gradients" not in ledger.moments["forward"]
    assert "activations" not in ledger.moments["step"]
    assert ledger.moments["step"]["gradients"] == 4 * NUMEL
    assert (
        ledger.moments["step"]["other"] >= 40_000 > ledger.moments["backward"]["other"]
    )


def test_what_is_saved_is_forwards_outside_of_modules_as_well() -> None:
    """Autograd turns gradients off while it saves; that is no optimizer's step."""
    model = nn.Linear(8, 8)
    with MemoryLedger(model) as ledger:
        with torch.no_grad():
            x = torch.ones(100, 8) + 1
        y = model.weight.sum() * x
        assert y.ndim == 2
    assert ledger.moments["forward"]["activations"] == x.nbytes
    assert "activations" not in ledger.moments["step"]


def test_a_tensor_that_is_saved_and_let_go_of_was_an_activation() -> None:
    """Though nothing is freed by it: all tensors of the graph live on."""
    model, x = nn.Linear(8, 8), torch.ones(100, 8)
    with MemoryLedger(model) as ledger:
        total_weight = model.weight.sum()
        y = total_weight * x
        kept = y.detach()
        del y
    assert ledger.by_module == {"(outside)": x.nbytes}
    assert ledger.moments["forward"]["activations"] == x.nbytes
    assert "activations" not in ledger.moments["end"]
    assert ledger.moments["end"]["other"] == 4 + x.nbytes + kept.nbytes


def test_a_storage_that_grows_counts_at_its_new_size() -> None:
    """Resized in place, to more and to less."""
    with MemoryLedger(nn.Linear(1, 1)) as ledger:
        x = torch.zeros(10)
        x.resize_(1000)
        passing = torch.zeros(2)
        del passing  # a size that only its storage knows of is seen at the next event
        x.untyped_storage().resize_(40)
        x.resize_(10).zero_()
    assert ledger.moments["forward"]["other"] == 4008
    assert ledger.moments["end"]["other"] == 40


# Oracles: the allocator, PyTorch's own tracker, the graph itself, fake tensors.


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Each thread of an operation may take memory of its own inside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@each_model
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:.*profiler:UserWarning")
def test_totals_are_the_allocators_to_the_byte(
    make: Callable[[], nn.Module], autocast: bool
) -> None:
    """What the CPU's allocator handed out minus what it got back, after three steps.

    Its peak may be higher, by what operations use inside themselves, and never lower.
    """
    model = make()
    optimizer = AdamW(model.parameters())
    ledger = MemoryLedger(model, optimizer)
    train(model, optimizer)  # libraries set themselves up
    optimizer.zero_grad()
    gc.collect()
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof,
        ledger,
        torch.autocast("cpu", BF16, enabled=autocast),
    ):
        train(model, optimizer, steps=3)
    assert prof.profiler is not None
    events = prof.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    running = list(itertools.accumulate(n for _, n in sorted(sizes)))
    before = total(ledger.moments["start"])
    assert total(ledger.moments["end"]) - before == running[-1]
    inside = max(running) - (total(ledger.peak) - before)
    assert inside >= 0
    if not (autocast or isinstance(model, Recurrent)):
        assert inside < 128  # numbers that an operation makes of Python's


@each_model
@pytest.mark.parametrize("has_state", [False, True])
def test_peak_is_that_of_pytorchs_tracker(
    make: Callable[[], nn.Module], has_state: bool
) -> None:
    """torch.distributed's MemTracker, written by others, finds the same total."""
    peaks = []
    for is_ours in (True, False):
        torch.manual_seed(0)
        model = make()
        optimizer = AdamW(model.parameters())
        if has_state:
            train(model, optimizer)
            optimizer.zero_grad()
        if is_ours:
            with MemoryLedger(model, optimizer) as ledger:
                train(model, optimizer)
            peaks.append(total(ledger.peak))
        else:
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                train(model, optimizer)
            snapshots = tracker.get_tracker_snapshot("peak").values()
            peaks.append(sum(snapshot["Total"] for snapshot in snapshots))
    assert peaks[0] == peaks[1]


@each_model
@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_what_the_graph_says_it_saved(
    make: Callable[[], nn.Module], autocast: bool
) -> None:
    """Walked from the loss, node by node, on a graph that no ledger has seen."""
    found = []
    for is_counted in (True, False):
        torch.manual_seed(0)
        model = make()
        ledger = MemoryLedger(model)
        with (
            ledger if is_counted else nullcontext(),
            torch.autocast("cpu", BF16, enabled=autocast),
        ):
            x = torch.randn(16, 32)
            loss = model(x).square().mean()
        end = ledger.moments.get("end", {})
        found.append(
            end.get("activations", 0) + end.get("casts", 0)
            if is_counted
            else walk(loss, model)
        )
    assert found[0] == found[1] > 0


@each_model
def test_fake_tensors_are_counted_like_real_ones(
    make: Callable[[], nn.Module],
) -> None:
    """All moments, kinds and modules, with nothing allocated.

    But for the LSTM: how much oneDNN saves for it, only oneDNN knows.
    """
    found = []
    for mode in (nullcontext(), FakeTensorMode()):
        with mode:
            model = make()
            optimizer = AdamW(model.parameters())
            with MemoryLedger(model, optimizer) as ledger:
                train(model, optimizer, steps=2)
            found.append((ledger.moments, ledger.by_module, ledger.total_saved))
    if make is Recurrent:
        assert found[0][2] > found[1][2] > 0
    else:
        assert found[0] == found[1]


# Nothing is changed.


@each_model
@pytest.mark.parametrize("scaled", [False, True])
def test_training_is_the_same_bit_for_bit(
    make: Callable[[], nn.Module], scaled: bool
) -> None:
    """Weights, gradients, states, random numbers; with FP16 and a skipped step, too."""
    dtype = BF16 if make is Recurrent else FP16  # a CPU has no LSTM in FP16
    found = []
    for is_counted in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = AdamW(model.parameters())
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            with MemoryLedger(model, optimizer) if is_counted else nullcontext():
                with torch.autocast("cpu", dtype, enabled=scaled):
                    loss = model(torch.randn(16, 32)).square().mean()
                optimizer.zero_grad()
                backward(scaler.scale(loss))
                scaler.step(optimizer)
                scaler.update()
        states = [s for entry in optimizer.state.values() for s in entry.values()]
        grads = [p.grad for p in model.parameters()]
        rest = [loss, torch.get_rng_state(), *model.state_dict().values()]
        found.append([*states, *grads, *rest])
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(7e7), theirs.nan_to_num(7e7))


def test_nothing_is_left_behind_on_a_way_out() -> None:
    """No hook on modules, tensors or autograd, and no mode, after an error as well."""
    model = stack()
    before = [copy.copy(vars(m)) for m in model.modules()]
    counts = [len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)]
    ledger = MemoryLedger(model)
    with pytest.raises(ZeroDivisionError), ledger:
        model(torch.ones(1, WIDTH)).sum().item() / 0
    assert [vars(m) for m in model.modules()] == before
    assert [
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_pre_hooks),
    ] == counts
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert "end" in ledger.moments
    with ledger:  # and it can be used again, from nothing
        pass
    assert ledger.moments.keys() == {"start", "end"}


def test_a_graph_outlives_its_ledger_and_counts_in_no_other() -> None:
    """Backward after the block works, and a second block does not see the first's."""
    model, x = stack(), torch.randn(ROWS, WIDTH)
    ledger = MemoryLedger(model)
    with ledger:
        loss = model(x).sum()
    first = ledger.moments["end"]
    backward(loss)
    assert ledger.moments["end"] == first
    assert "backward" not in ledger.moments
    with ledger:
        del loss, x
        gc.collect()
    assert "activations" not in ledger.moments["end"]


def test_autograd_still_sees_a_tensor_that_was_changed_in_place() -> None:
    """Its error is the same; second derivatives are, too."""
    model = nn.Linear(3, 3)
    with MemoryLedger(model):
        y = model(torch.ones(1, 3)).exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(y.sum())
        x = torch.tensor([2.0], requires_grad=True)
        (slope,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), x)
    assert curve.item() == 12


# Frameworks, text, errors.


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
def test_fabric_and_trainer_steps_can_be_counted() -> None:
    """Their wrapped optimizers are taken, and the precision shows in the bytes."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    network = stack()
    model, optimizer = fabric.setup(network, AdamW(network.parameters()))
    with MemoryLedger(network, optimizer) as ledger:
        fabric.backward(model(torch.ones(ROWS, WIDTH)).sum())
        optimizer.step()
    end = ledger.moments["end"]
    assert [end["parameters"], end["gradients"]] == [2 * NUMEL, 2 * NUMEL]
    assert end["optimizer"] == 4 * NUMEL + STEPS

    network = stack()
    mains = MainParams(AdamW(network.parameters()))
    model, optimizer = fabric.setup(network, mains)
    mains.load_state_dict(mains.state_dict())
    with MemoryLedger(network, optimizer) as ledger:
        fabric.backward(model(torch.ones(ROWS, WIDTH)).sum())
        optimizer.step()
    assert ledger.moments["end"]["main params"] == 4 * NUMEL

    class Counts(lightning.Callback):
        def on_train_batch_start(
            self,
            trainer: lightning.Trainer,
            pl_module: lightning.LightningModule,
            *_: object,
        ) -> None:
            self.ledger = MemoryLedger(pl_module, trainer.optimizers)
            self.ledger.__enter__()

        def on_train_batch_end(self, *_: object) -> None:
            self.ledger.__exit__(None, None, None)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = stack()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            loss: Tensor = self.network(batch[0]).sum()
            return loss

        def configure_optimizers(self) -> AdamW:
            return AdamW(self.parameters())

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    counts = Counts()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[counts],
    )
    data = TensorDataset(torch.ones(2 * ROWS, WIDTH))
    trainer.fit(Module(), DataLoader(data, batch_size=ROWS))
    step = counts.ledger.moments["step"]
    assert [step["parameters"], step["gradients"]] == [8 * NUMEL, 8 * NUMEL]
    assert step["optimizer"] == 16 * NUMEL + STEPS
    assert "network.1" in counts.ledger.by_module


def test_table_and_chart_show_the_moments() -> None:
    """A column for each kind there is; bars as long as the bytes; one peak."""
    model = stack()
    optimizer = SGD(model.parameters())
    ledger = MemoryLedger(model, optimizer)
    assert "peak" not in str(ledger)
    assert ledger.chart().strip() == ""
    with ledger:
        backward(model(torch.ones(ROWS, WIDTH)).sum())
        optimizer.step()
    head, *rows = str(ledger).splitlines()
    kinds = ["parameters", "gradients", "activations", "other", "total"]
    assert head.split() == ["KiB", *kinds]
    assert [row.split()[0] for row in rows] == list(ledger.moments)
    assert [row.endswith("peak") for row in rows].count(True) == 1
    for row, held in zip(rows, ledger.moments.values(), strict=True):
        assert row.split()[5] == f"{total(held) / 1024:.1f}"

    *bars, legend = ledger.chart(width=40).splitlines()
    letters = {"P": "parameters", "G": "gradients", "A": "activations", ".": "other"}
    assert legend.strip() == ", ".join(f"{k} {v}" for k, v in letters.items())
    for bar, held in zip(bars, ledger.moments.values(), strict=True):
        drawn = Counter(bar[10:])
        assert sum(drawn.values()) == round(40 * total(held) / total(ledger.peak))
        for letter, kind in letters.items():
            share = 40 * held.get(kind, 0) / total(ledger.peak)
            assert abs(drawn[letter] - share) <= 1


def test_bad_input_is_refused_in_words() -> None:
    """Before anything is hooked."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    anything: Any = model
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, and not"):
        MemoryLedger(anything.parameters())
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(TypeError, match="not compiled, got OptimizedModule"):
        MemoryLedger(compiled)
    for empty in (nn.ReLU(), nn.LazyLinear(2)):
        with pytest.raises(
            ValueError, match="no parameters, or lazy ones: run it once"
        ):
            MemoryLedger(empty)
    with pytest.raises(ValueError, match=r"lie on one device, got \['cpu', 'meta'\]"):
        MemoryLedger(nn.Sequential(model, nn.Linear(2, 2, device="meta")))
    for wrong, name in ((0.1, "float"), (model.parameters(), "Parameter")):
        with pytest.raises(TypeError, match=f"must be of torch.optim, got {name}"):
            MemoryLedger(model, wrong)
    for foreign in (other.parameters(), [*model.parameters(), other.weight]):
        with pytest.raises(ValueError, match="SGD holds parameters that are not the"):
            MemoryLedger(model, [SGD(foreign)])
    ledger = MemoryLedger(model)
    with pytest.raises(ValueError, match="width must be at least 10, got 9"):
        ledger.chart(9)
    with ledger, pytest.raises(RuntimeError, match="this ledger is open already"):
        ledger.__enter__()
    blocked = torch.autograd.graph.disable_saved_tensors_hooks("not here")
    with blocked, pytest.raises(RuntimeError, match="not here"), ledger:
        pass
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
