"""Tests of snippets/selective_precision.py, as read in guide/selective_precision."""

import copy
import io
import logging
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn, optim
from torch.nn.utils.rnn import pack_sequence
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from snippets.main_params import MainParams
from snippets.selective_precision import (
    apply_precision_plan,
    remove_precision_plan,
    switch_precision,
)
from snippets.true_half import TrueHalfAdamW

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
IDS = torch.randint(50, (6, 5), generator=torch.Generator().manual_seed(0))
PLAN = {"": BF16, "embeddings": FP32, nn.LayerNorm: FP32, "layers.*.router": FP32}

Mode = Literal["32-true", "bf16-mixed", "bf16-true"]

each_autocast = pytest.mark.parametrize("autocast", [None, BF16, FP16], ids=str)


class Layer(nn.Module):
    """A gate in front of a linear layer, with a norm before both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.router = nn.Linear(8, 8, bias=False)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the layer finds to the residual stream."""
        h = self.norm(x)
        linear = self.linear(h)
        gated: Tensor = x + linear * self.router(h).softmax(-1)
        return gated


class Network(nn.Module):
    """Embeddings, two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores for each token."""
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(x)
        return scores


class ByHand(Network):
    """The casts of PLAN, written where they belong."""

    def forward(self, ids: Tensor) -> Tensor:
        """Scores for each token."""
        with torch.autocast("cpu", enabled=False):
            x = self.embeddings(ids)
            for layer in self.layers:
                assert isinstance(layer, Layer)
                x = x.to(BF16)
                h = layer.norm(x.to(FP32))
                y = layer.linear(h.to(BF16))
                x = x + y * layer.router(h.to(FP32)).softmax(-1)
            scores: Tensor = self.head(x.to(BF16))
            return scores


def network() -> Network:
    """The same at every call."""
    torch.manual_seed(0)
    return Network()


def autocasting(dtype: torch.dtype | None) -> Any:  # noqa: ANN401 - one of two contexts
    """Autocast on the CPU, or nothing."""
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def backward(loss: Tensor) -> None:
    """``loss.backward()``, which torch has not annotated."""
    torch.autograd.backward(loss)


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    """Take steps on batches that are the same at every call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        targets = torch.randint(10, (6, 5), generator=generator)
        backward(F.cross_entropy(model(IDS).float().flatten(0, 1), targets.flatten()))
        optimizer.step()
        model.zero_grad()


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Dtypes of all that is saved."""
    return {name: t.dtype for name, t in model.state_dict().items()}


def hooks(model: nn.Module) -> int:
    """How many hooks there are, in all the places where torch keeps them."""
    kinds = [f"_forward{k}" for k in ("_pre_hooks", "_hooks", "_hooks_with_kwargs")]
    kinds += ["_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"]
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def everything(model: nn.Module, optimizer: Optimizer | None = None) -> list[Any]:
    """Copies of all that a refused call must leave alone."""
    found: list[Any] = [t.clone() for t in model.state_dict().values()]
    for entry in (
        {} if optimizer is None else optimizer.state_dict()["state"]
    ).values():
        found += [torch.as_tensor(v).clone() for v in entry.values() if v is not None]
    return [*found, torch.tensor(hooks(model))]


def same(left: list[Any], right: list[Any]) -> bool:
    """Bit for bit, and of one dtype."""
    return len(left) == len(right) and all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(left, right, strict=True)
    )


# Exact laws: what a plan computes.


@each_autocast
@pytest.mark.parametrize("pair", [False, True], ids=["left alone", "returned in"])
def test_a_plan_is_the_casts_written_by_hand(
    autocast: torch.dtype | None, pair: bool
) -> None:
    """Output, gradients and ten steps of AdamW: the same bits, under any autocast."""
    planned, by_hand = network(), ByHand()
    for layer in by_hand.layers:
        assert isinstance(layer, Layer)
        layer.linear.to(BF16)
    by_hand.head.to(BF16)
    by_hand.load_state_dict(planned.state_dict())
    plan: dict[Any, Any] = dict(PLAN)
    if pair:  # nothing follows that would show the difference
        plan["head"] = (BF16, BF16)
    apply_precision_plan(planned, plan)
    optimizers = [optim.AdamW(m.parameters(), lr=1e-2) for m in (planned, by_hand)]
    for _ in range(10):
        outputs = []
        for model, optimizer in zip((planned, by_hand), optimizers, strict=True):
            optimizer.zero_grad()
            with autocasting(autocast):
                outputs.append(model(IDS))
            backward(outputs[-1].float().square().sum())
        grads = [[p.grad for p in m.parameters()] for m in (planned, by_hand)]
        assert same(*([output] for output in outputs))
        assert same(*grads)
        for optimizer in optimizers:
            optimizer.step()

    assert same(list(planned.parameters()), list(by_hand.parameters()))
    assert all(
        g is not None and g.dtype == p.dtype
        for g, p in zip(grads[0], planned.parameters(), strict=True)
    )


def test_float32_embeddings_before_bf16_layers_work() -> None:
    """Cast alone they raise; with a plan, even if the head is not in it, they run."""
    model = network()
    model.layers.to(BF16)
    with pytest.raises(RuntimeError, match="dtype"):
        model(IDS)

    apply_precision_plan(model, {"embeddings": FP32, "layers.*": BF16})
    model(IDS).sum().backward()

    assert model(IDS).dtype == FP32
    grads = {str(p.grad.dtype) for p in model.layers.parameters() if p.grad is not None}
    assert grads == {"torch.bfloat16"}
    assert model.embeddings.weight.grad is not None
    assert model.embeddings.weight.grad.dtype == FP32


def test_a_plan_is_read_with_the_last_key_deciding() -> None:
    """Against the rule written down a second time, over all orders of some keys."""
    model = network()
    names = [name for name, _ in model.named_modules()]
    matched: dict[Any, set[str]] = {
        "": {""},
        "layers.*": {"layers.0", "layers.1"},
        "**.norm": {"layers.0.norm", "layers.1.norm"},
        "layers.1": {"layers.1"},
        nn.Linear: {n for n in names if n.endswith(("router", "linear", "head"))},
    }
    allowed = [FP32, BF16, FP16, FP64, FP32]
    ran = 0
    for seed in range(120):
        order = torch.randperm(
            5, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        keys = [list(matched)[i] for i in order[: 1 + seed % 5]]
        plan = {key: allowed[i] for i, key in zip(order, keys, strict=False)}
        expected: dict[str, torch.dtype] = {}
        decider: dict[str, object] = {}
        for name in names:
            for key in keys:
                roots = matched[key]
                if any(r in {name, ""} or name.startswith(r + ".") for r in roots):
                    expected[name], decider[name] = plan[key], key
        fresh = network()
        if set(decider.values()) == set(keys):
            assert apply_precision_plan(fresh, plan) == expected
            for name, p in fresh.named_parameters():
                assert p.dtype == expected.get(name.rpartition(".")[0], FP32)
            ran += 1
        else:
            with pytest.raises(ValueError, match="decides nothing"):
                apply_precision_plan(fresh, plan)
    assert 20 < ran < 110


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("*", ["embeddings", "layers", "layers.0", "layers.0.norm", "head"]),
        ("layers.*.norm", ["layers.0.norm"]),
        ("**.norm", ["layers.0.norm"]),
        ("**norm", ["layers.0.norm"]),
        ("**.head", ["head"]),
        ("h*d", ["head"]),
        ("layers.0.*", ["layers.0.norm"]),
        (nn.Embedding, ["embeddings"]),
    ],
)
def test_a_star_is_one_part_and_two_are_any(key: Any, expected: list[str]) -> None:  # noqa: ANN401
    """Of the names asked here, those expected are covered and no others."""
    asked = ["", "embeddings", "layers", "layers.0", "layers.0.norm", "head"]
    found = apply_precision_plan(network(), {key: BF16})
    assert [name for name in asked if name in found] == expected


@each_autocast
def test_what_no_key_covers_follows_autocast(autocast: torch.dtype | None) -> None:
    """With autocast on, everything but the island is what it is without a plan."""
    plain, planned = network(), network()
    seen: dict[str, list[torch.dtype]] = {}
    for name, model in {"plain": plain, "planned": planned}.items():
        for layer in [*model.layers.modules(), model.head]:
            if isinstance(layer, (nn.Linear, nn.LayerNorm)):

                def look(
                    _m: nn.Module, _i: object, out: Tensor, key: str = name
                ) -> None:
                    seen.setdefault(key, []).append(out.dtype)

                layer.register_forward_hook(look)
    apply_precision_plan(planned, {"layers.*.router": FP32})
    with autocasting(autocast):
        plain(IDS)
        planned(IDS)
        on = torch.is_autocast_enabled("cpu")

    wanted = list(seen["plain"])
    wanted[2] = wanted[5] = FP32  # the routers
    assert seen["planned"] == wanted
    assert on == (autocast is not None)


@pytest.mark.parametrize("tell", ["input", "output"])
def test_a_norm_that_no_key_covers_gets_what_autocast_gives_it(tell: str) -> None:
    """Its 16-bit input is widened where autocast is off, and only there."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    seen: list[torch.dtype] = []

    def look(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen.append((args[0] if tell == "input" else output).dtype)

    model[1].register_forward_hook(look)
    with autocasting(BF16):
        model(torch.ones(1, 4))
    apply_precision_plan(model, {"0": (BF16, BF16)})
    with autocasting(BF16):
        model(torch.ones(1, 4))
    model(torch.ones(1, 4))
    assert seen[0] == seen[1]
    assert seen[2] == FP32


def test_a_pair_is_for_the_modules_that_the_key_matches() -> None:
    """What is inside them returns what it computes."""
    inner = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(inner), nn.Linear(4, 4))
    seen: list[torch.dtype] = []
    apply_precision_plan(model, {"0": (BF16, FP64), "1": FP32})
    for module in (inner, model[0]):
        module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    model(torch.ones(1, 4))
    assert seen == [BF16, FP64]


def test_the_residual_stream_is_the_callers_choice() -> None:
    """Megatron's fp32_residual_connection: BF16 inside, FP32 between the layers."""
    for plan, stream in (
        ({"": FP32, "layers.*.router": BF16, "layers.*.linear": BF16}, FP32),
        (PLAN, BF16),
    ):
        model = network()
        seen = []
        apply_precision_plan(model, plan)
        layer = model.layers[0]
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))  # noqa: B023
        model(IDS)
        assert seen == [stream]


class Batch(NamedTuple):
    """A batch that is a tuple."""

    x: Tensor
    ids: Tensor


class Echo(nn.Module):
    """Keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.got: Any = None

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return it too."""
        self.got = args, kwargs
        return args, kwargs


def test_floating_tensors_are_cast_in_every_container() -> None:
    """Positional and by keyword, nested; what is not floating stays the same object."""
    model = Echo()
    apply_precision_plan(model, {"": (BF16, FP16)})
    x, ids = torch.ones(2), torch.tensor([1, 300])
    untouched: list[Any] = [
        ids, torch.tensor([True]), torch.ones(2, dtype=torch.complex64),
        torch.ones(2).to(torch.float8_e4m3fn), "text", None, 3.5, torch.Size([2]),
        [ids, {"a": ids}], Batch(ids, ids),
    ]  # fmt: skip
    cache: list[object] = []
    ordered = OrderedDict(b=x, a=ids)
    packed = pack_sequence([x])
    args, kwargs = model(
        x,
        [x, (x, ids)],
        Batch(x, ids),
        cache,
        *untouched,
        packed,
        x=x,
        d={"k": [x.double()]},
        o=ordered,
    )
    (x1, nested, batch, got_cache, *rest), got_kwargs = model.got

    assert x1.dtype == nested[0].dtype == nested[1][0].dtype == batch.x.dtype == BF16
    assert isinstance(batch, Batch)
    assert batch.ids is nested[1][1] is ids
    assert got_cache is cache
    assert all(a is b for a, b in zip(rest[:-1], untouched, strict=True))
    assert rest[-1].data.dtype == BF16
    assert rest[-1].batch_sizes.dtype == torch.int64
    assert got_kwargs["x"].dtype == got_kwargs["d"]["k"][0].dtype == BF16
    assert isinstance(got_kwargs["o"], OrderedDict)
    assert list(got_kwargs["o"]) == ["b", "a"]
    assert got_kwargs["o"]["b"].dtype == BF16
    assert ordered["b"] is x  # the caller's is not changed
    assert args[0].dtype == args[1][1][0].dtype == kwargs["d"]["k"][0].dtype == FP16
    assert args[1][1][1] is ids


def test_gradients_come_back_in_the_callers_dtype() -> None:
    """A float64 input gets a float64 gradient, each parameter one of its own dtype."""
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    apply_precision_plan(model, {"0": FP32, "1": BF16, "2": FP16})
    x = torch.randn(3, 4, dtype=FP64, requires_grad=True)
    backward(model(x).sum())

    assert x.grad is not None
    assert x.grad.dtype == FP64
    assert all(
        p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters()
    )


def test_integer_complex_and_eight_bit_tensors_stay() -> None:
    """Parameters and buffers; a floating buffer follows its module."""
    model = nn.BatchNorm1d(2)
    model.codes = nn.Parameter(torch.tensor([70_001]), requires_grad=False)
    model.phase = nn.Parameter(torch.tensor([1 + 2j]))
    model.small = nn.Parameter(torch.ones(1).to(torch.float8_e5m2), requires_grad=False)
    before = dtypes(model)
    apply_precision_plan(model, {"": BF16})

    assert {n for n, d in dtypes(model).items() if d != before[n]} == {
        "weight", "bias", "running_mean", "running_var"
    }  # fmt: skip
    assert model.phase.tolist() == [1 + 2j]
    assert model.codes.tolist() == [70_001]
    remove_precision_plan(model)
    assert dtypes(model) == before


# Exact laws: what a plan leaves as it was.


def test_a_plan_and_its_removal_keep_objects_and_keys() -> None:
    """Parameters stay the same objects; then dtypes and hooks are as they were."""
    model = network().bfloat16()
    model.head.float()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    objects, before = list(model.parameters()), dtypes(model)
    state = model.state_dict()
    keys, parts = list(state), list(vars(model))
    apply_precision_plan(model, {"": FP32, "head": FP16})
    switch_precision(model, optimizer, {"layers": FP64})
    switch_precision(model, optimizer, PLAN)

    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert hooks(model) > 0
    model.load_state_dict(state)
    remove_precision_plan(model)
    assert dtypes(model) == before
    assert hooks(model) == 0
    assert list(vars(model)) == parts
    remove_precision_plan(model)  # nothing to do


def test_widening_and_removal_lose_nothing() -> None:
    """BF16 to FP64 and back: every bit, NaN, Inf, -0 and subnormals included."""
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    model = nn.Linear(256, 256, bias=False)
    model.weight = nn.Parameter(codes.view(BF16).view(256, 256).clone())
    apply_precision_plan(model, {"": FP64})
    assert model.weight.dtype == FP64
    remove_precision_plan(model)
    bits, finite = (
        model.weight.detach().view(torch.int16).flatten(),
        ~codes.view(BF16).isnan(),
    )
    assert torch.equal(bits[finite], codes[finite])
    assert model.weight.isnan().sum() == (~finite).sum()


def test_a_checkpoint_of_another_precision_loads() -> None:
    """load_state_dict rounds into the plan's dtypes, and the model still runs."""
    model, wide = network(), network()
    apply_precision_plan(model, PLAN)
    planned = dtypes(model)
    nn.init.constant_(wide.head.weight, 1 + 2**-10)
    model.load_state_dict(wide.state_dict())
    assert dtypes(model) == planned
    assert (model.head.weight == 1).all()
    wide.load_state_dict(model.state_dict())
    assert wide.head.weight.dtype == FP32


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved(m)],  # noqa: PLW0108
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_and_pickles_keep_the_plan(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    """They compute the same, and taking the plan off one leaves the other alone."""
    model = network()
    apply_precision_plan(model, PLAN)
    twin = duplicate(model)
    with autocasting(FP16):
        assert torch.equal(twin(IDS), model(IDS))
    remove_precision_plan(twin)

    assert hooks(twin) == 0
    assert set(dtypes(twin).values()) == {FP32}
    assert dtypes(model)["head.weight"] == BF16
    with autocasting(FP16):
        assert model(IDS).dtype == BF16


def saved(model: nn.Module) -> nn.Module:
    """Save the whole module and load it."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


# Dynamo asks the output for its .grad where it traces the model's own hooks.
dynamo_asks = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


@dynamo_asks
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_planned_model_compiles_whole(backend: str) -> None:
    """One graph with and without autocast, the same bits; AOT adds in another order."""
    model = network()
    apply_precision_plan(model, PLAN | {"head": (FP32, BF16)})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for autocast in (None, FP16) if backend == "eager" else (FP16,):
        outputs, grads = [], []
        for run in (model, compiled):
            model.zero_grad()
            with autocasting(autocast):
                outputs.append(run(IDS))
                assert torch.is_autocast_enabled("cpu") == (autocast is not None)
            backward(outputs[-1].float().square().sum())
            grads.append([p.grad for p in model.parameters()])
        assert same([outputs[0]], [outputs[1]])
        assert same(*grads) or backend != "eager"
        torch.testing.assert_close(grads[0], grads[1], rtol=2**-5, atol=2**-5)


@dynamo_asks
def test_a_plan_after_compiling_is_noticed() -> None:
    """The guards on hooks and dtypes fail, and it is compiled again."""
    model = network()
    compiled = torch.compile(model, backend="eager")
    assert compiled(IDS).dtype == FP32
    apply_precision_plan(model, PLAN)
    assert torch.equal(compiled(IDS), model(IDS))
    assert compiled(IDS).dtype == BF16


@each_autocast
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(
    autocast: torch.dtype | None, reentrant: bool
) -> None:
    """Activation checkpointing recomputes in the same dtypes; autocast stays as set."""
    grads = []
    for recompute in (False, True):
        model = network()
        apply_precision_plan(model, {"layers.*": BF16, nn.LayerNorm: FP32})
        with autocasting(autocast):
            x = model.embeddings(IDS)
            for layer in model.layers:
                x = (
                    checkpoint(layer, x, use_reentrant=reentrant)
                    if recompute
                    else layer(x)
                )
            assert torch.is_autocast_enabled("cpu") == (autocast is not None)
            loss = model.head(x).float().square().sum()
        backward(loss)
        assert not torch.is_autocast_enabled("cpu")
        grads.append([p.grad for p in model.parameters()])
    assert same(*grads)


class Failing(nn.Module):
    """Raises what it is given, once."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def forward(self, x: Tensor) -> Tensor:
        """Raise, or return the input."""
        error, self.error = self.error, None
        if error is not None:
            raise error
        return x


def test_autocast_is_back_after_an_error_inside() -> None:
    """Also where islands are nested, and where another hook raises before ours."""
    model = nn.Sequential(nn.Sequential(Failing(ValueError("planned"))))
    apply_precision_plan(model, {"": BF16, "0": FP32})
    with autocasting(FP16):
        with pytest.raises(ValueError, match="planned"):
            model(torch.ones(2))
        assert torch.is_autocast_enabled("cpu")
        assert model(torch.ones(2)).dtype == FP32
        assert torch.is_autocast_enabled("cpu")


def test_an_interrupt_inside_does_not_turn_autocast_on_later() -> None:
    """Ctrl-C skips all hooks; the next call without autocast stays without it."""
    model = Failing(KeyboardInterrupt())
    apply_precision_plan(model, {"": FP32})
    with pytest.raises(KeyboardInterrupt), autocasting(FP16):
        model(torch.ones(2))
    model(torch.ones(2))
    assert not torch.is_autocast_enabled("cpu")


def test_threads_do_not_mix_their_autocast() -> None:
    """One thread with autocast and one without, in the same module at the same time."""
    inside = threading.Barrier(2, timeout=10)
    seen: dict[str, set[bool]] = {}

    class Wait(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.wait()
            return x

    model = Wait()
    apply_precision_plan(model, {"": FP32})

    def call(name: str, dtype: torch.dtype | None) -> None:
        with autocasting(dtype):
            for _ in range(20):
                model(torch.ones(1))
                seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))

    threads = [
        threading.Thread(target=call, args=a) for a in (("on", BF16), ("off", None))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"on": {True}, "off": {False}}


def test_shared_tensors_and_modules_get_one_dtype() -> None:
    """Two dtypes for one thing are refused, covered or not; one is applied once."""
    model = network()
    model.head = nn.Linear(8, 50)
    model.head.weight = model.embeddings.weight
    before = everything(model)
    message = (
        "'embeddings.weight' and 'head.weight' are the same, but torch.float32 and"
    )
    for plan in ({"": BF16, "embeddings": FP32}, {"head": BF16}):
        with pytest.raises(ValueError, match=re.escape(message)):
            apply_precision_plan(model, plan)
    assert same(before, everything(model))
    apply_precision_plan(model, {"embeddings": BF16, "head": BF16})
    assert model.head.weight is model.embeddings.weight
    assert model(IDS).dtype == BF16

    relu = nn.ReLU()
    twice = nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu)
    message = "'1' and '3' are the same, but torch.float32 and torch.bfloat16"
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_precision_plan(twice, {"": BF16, "1": FP32})
    apply_precision_plan(twice, {"": BF16, nn.ReLU: FP32})
    assert hooks(relu) == 4  # two hooks, each known in two places


# Exact laws: phases.


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, amsgrad=True),
    "AdamW": optim.AdamW,
    "AdamW fused": lambda p: optim.AdamW(p, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, foreach=True),
    "Adagrad": optim.Adagrad,
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Adafactor": optim.Adafactor,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("plan", [BF16, PLAN, FP64], ids=["bf16", "plan", "fp64"])
def test_a_switch_is_a_resume_in_the_new_dtype(
    make: Callable[[Any], Optimizer],
    plan: Any,  # noqa: ANN401
) -> None:
    """There and back, against new models and optimizers that load the state."""
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    for phase in (plan, FP32):
        fresh = network()
        fresh_optimizer = make(fresh.parameters())
        fresh.load_state_dict(model.state_dict())
        apply_precision_plan(
            fresh, {"": phase} if isinstance(phase, torch.dtype) else phase
        )
        fresh_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        objects = list(model.parameters())
        switch_precision(model, optimizer, phase)
        for _ in range(2):
            assert same(
                everything(model, optimizer), everything(fresh, fresh_optimizer)
            )
            train(model, optimizer, 3)
            train(fresh, fresh_optimizer, 3)
        groups = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(a is b for a, b in zip(objects, groups, strict=True))
        for p in groups:
            for key, value in optimizer.state[p].items():
                assert value.dtype == p.dtype or key == "step" or value.ndim == 0


def test_casting_the_model_alone_breaks_the_optimizer() -> None:
    """What the switch is for: AdamW raises, SGD keeps momentum in the old dtype."""
    model = network()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    model.to(BF16)
    with pytest.raises(RuntimeError, match="expected dtype float for `end`"):
        train(model, optimizer, 1)
    model = network()
    sgd = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, 1)
    model.to(BF16)
    train(model, sgd, 1)
    assert sgd.state[model.head.weight]["momentum_buffer"].dtype == FP32


def test_groups_hooks_and_schedulers_outlive_a_switch() -> None:
    """The schedule goes on, the hook is called, each group keeps its settings."""
    model = network()
    groups: list[dict[str, Any]] = [{"params": model.layers.parameters(), "lr": 0.1}]
    groups += [{"params": model.head.parameters()}]
    optimizer = optim.AdamW(groups, lr=0.01)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, 1)
    scheduler.step()
    switch_precision(model, optimizer, BF16)
    train(model, optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.0025]
    assert len(calls) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda p: MainParams(optim.AdamW(p, lr=1e-5)),
        lambda p: MainParams(optim.SGD(p, lr=1e-4, momentum=0.9), grad_dtype=FP32),
        lambda p: TrueHalfAdamW(p, lr=1e-5),
        lambda p: TrueHalfAdamW(p, lr=1e-5, remedy="kahan"),
    ],
    ids=["MainParams", "MainParams grad_dtype", "TrueHalfAdamW", "Kahan"],
)
def test_the_way_back_gives_weights_what_rounding_cut_off(
    make: Callable[[Any], Optimizer],
) -> None:
    """FP32, BF16, FP32: the weights are the main params, and the run goes on."""
    model = network()
    optimizer = make(model.parameters())
    switch_precision(model, optimizer, BF16)
    train(model, optimizer, 20)
    w = model.head.weight
    entry = optimizer.state[w]
    if isinstance(optimizer, MainParams):
        wanted = optimizer.main_params[w].clone()
    else:
        wanted = entry.get("main_param", w.detach().float()).clone()
        wanted += entry.get("compensation", torch.zeros_like(wanted))
    assert not torch.equal(w.float(), wanted)
    switch_precision(model, optimizer, FP32)

    assert torch.equal(w, wanted)
    assert not {"main_param", "compensation"} & set(optimizer.state[w])
    train(model, optimizer, 3)
    switch_precision(model, optimizer, BF16)
    train(model, optimizer, 3)
    assert w.dtype == BF16
    moments = [v for v in optimizer.state[w].values() if v.ndim and v.dtype == FP32]
    assert moments


def test_a_main_param_that_is_out_of_date_is_not_brought_back() -> None:
    """A weight set by hand in the BF16 phase stays set."""
    model = network()
    optimizer = MainParams(optim.SGD(model.parameters(), lr=1e-5))
    switch_precision(model, optimizer, BF16)
    train(model, optimizer, 2)
    with torch.no_grad():
        model.head.weight[0] = 3.0
    switch_precision(model, optimizer, FP32)
    assert (model.head.weight[0] == 3.0).all()
    assert not torch.equal(model.head.weight, model.head.weight.bfloat16().float())


def test_a_scaler_left_on_grows_out_of_reach() -> None:
    """200 BF16 steps at an interval of 10 make 2**36; FP16 then skips 21 steps."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=10)
    skipped = []
    for dtype in [BF16] * 200 + [FP16] * 30:
        before = scaler.get_scale()
        backward(scaler.scale(weight.to(dtype).sum().float()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped.append(scaler.get_scale() < before)
    assert not any(skipped[:200])
    assert all(skipped[200:221])
    assert not any(skipped[221:230])


def test_a_switch_inside_autocast_is_not_hidden_by_its_cache() -> None:
    """The cache of cast weights is cleared with them."""
    model = nn.Linear(4, 4)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with autocasting(BF16):
        model(torch.ones(1, 4))
        nn.init.zeros_(model.weight)
        switch_precision(model, optimizer, FP64)
        remove_precision_plan(model, optimizer)
        assert torch.equal(model(torch.ones(1, 4))[0], model.bias.to(BF16))


# Statistics


@pytest.mark.parametrize("size", [1.0, 5.0, 20.0, 60.0])
def test_rounding_logits_moves_a_probability_by_at_most_e_to_the_spacing(
    size: float,
) -> None:
    """exp(-s) <= p_hat / p <= exp(s), s the BF16 spacing at the largest logit."""
    z = (
        torch.randn(200, 64, dtype=FP64, generator=torch.Generator().manual_seed(0))
        * size
    )
    largest = z.abs().amax(-1, keepdim=True)
    s = torch.exp2(largest.log2().floor() - 7)
    assert (s <= 2**-7 * largest).all()
    moved = (z.bfloat16().double().log_softmax(-1) - z.log_softmax(-1)).abs()
    slack = 1e-9  # of float64 itself
    assert (moved <= s + slack).all()
    assert (moved > s / 4).any()  # the bound is not idle


def test_a_router_in_bf16_sends_tokens_elsewhere_and_an_island_does_not() -> None:
    """The same weights and inputs; in between, the island's 0 is exact."""
    torch.manual_seed(0)
    reference = nn.Linear(32, 64, bias=False)
    x = torch.randn(4096, 32)
    chosen = reference(x).argmax(-1)
    routed = {}
    for dtype in (BF16, FP32):
        router = copy.deepcopy(reference)
        apply_precision_plan(router, {"": dtype})
        with autocasting(BF16):
            routed[dtype] = int((router(x).argmax(-1) != chosen).sum())
    assert routed[BF16] > 10
    assert routed[FP32] == 0


# Training


def test_norm_weights_stand_still_in_bf16_and_move_on_an_island() -> None:
    """AdamW's default 1e-3 is less than half the spacing below 1, which is 2**-9."""
    for plan, moves in (({"": BF16}, False), ({"": BF16, nn.LayerNorm: FP32}, True)):
        model = network()
        apply_precision_plan(model, plan)
        train(model, optim.AdamW(model.parameters(), lr=1e-3), 20)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            assert bool((layer.norm.weight != 1).all()) == moves
            assert bool((layer.norm.weight == 1).all()) == (not moves)


@pytest.fixture
def quiet() -> Iterator[dict[str, Any]]:
    """Arguments for a Trainer that says nothing.

    Yields:
        Keyword arguments.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    off = (
        "logger",
        "enable_checkpointing",
        "enable_progress_bar",
        "enable_model_summary",
    )
    yield {"accelerator": "cpu", "devices": 1, **dict.fromkeys(off, False)}
    logger.setLevel(level)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fabric_trains_with_a_plan(precision: Mode) -> None:
    """The dtypes of the plan hold to the end, the optimizer steps, phases change."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = network()
    wrapped, optimizer = fabric.setup(model, optim.AdamW(model.parameters()))
    apply_precision_plan(model, PLAN)
    for phase in (PLAN, FP32, PLAN):
        switch_precision(model, optimizer, phase)
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            loss = F.cross_entropy(
                wrapped(IDS).float().flatten(0, 1), IDS.flatten() % 10
            )
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert not any(map(torch.equal, before, model.parameters()))
    planned = network()
    apply_precision_plan(planned, PLAN)
    assert dtypes(model) == dtypes(planned)
    moments = {optimizer.state[p]["exp_avg"].dtype for p in model.parameters()}
    assert moments == {FP32, BF16}


def test_fabric_bf16_true_after_the_plan_is_named() -> None:
    """Its setup casts the islands; the next call says so, and fails there."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    model = network()
    apply_precision_plan(model, PLAN)
    wrapped = fabric.setup(model)
    with pytest.raises(
        RuntimeError, match=r"by the plan torch\.float32: apply the plan after"
    ):
        wrapped(IDS)


class Lit(lightning.LightningModule):
    """Trains the network in phases by epoch."""

    def __init__(self, phases: dict[int, Any], late: bool) -> None:
        super().__init__()
        self.network, self.phases, self.late = network(), phases, late
        self.seen: list[torch.dtype] = []
        if not late:
            apply_precision_plan(self.network, PLAN)

    def on_fit_start(self) -> None:
        """Plan after "bf16-true" has cast."""
        if self.late:
            apply_precision_plan(self.network, PLAN)

    def on_train_epoch_start(self) -> None:
        """Begin a phase."""
        optimizer = self.trainer.optimizers[0]
        optimizer.zero_grad()
        if self.current_epoch in self.phases:
            switch_precision(self.network, optimizer, self.phases[self.current_epoch])
        self.seen.append(self.network.head.weight.dtype)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Learn the last digit of an id."""
        scores = self.network(batch[0]).float()
        return F.cross_entropy(scores.flatten(0, 1), batch[0].flatten() % 10)

    def configure_optimizers(self) -> Optimizer:
        """AdamW has state to carry."""
        return optim.AdamW(self.parameters())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_trainer_trains_in_phases(
    quiet: dict[str, Any],
    precision: Mode,
    tmp_path: Path,
) -> None:
    """FP32, the plan, FP32; a checkpoint loads into a model without a plan."""
    module = Lit({0: FP32, 1: PLAN, 2: FP32}, late=precision == "bf16-true")
    trainer = lightning.Trainer(**quiet, precision=precision, max_epochs=3)
    trainer.fit(module, DataLoader(TensorDataset(IDS), batch_size=3))

    assert module.seen == [FP32, BF16, FP32]
    moments = {
        trainer.optimizers[0].state[p]["exp_avg"].dtype for p in module.parameters()
    }
    assert moments == {FP32}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=False)["state_dict"]
    plain = network()
    plain.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    module.zero_grad()
    remove_precision_plan(module.network)
    if precision != "bf16-true":  # which is what removal restores
        assert torch.equal(plain(IDS), module.network(IDS))


# Errors


BAD_PLANS: list[tuple[Any, type[Exception], str]] = [
    ({"embedding": FP32}, ValueError, "no module; did you mean 'embeddings'?"),
    ({"layer.*": FP32}, ValueError, "did you mean 'layers.*'"),
    ({"head.weight": FP32}, ValueError, "did you mean 'head'"),
    ({"zzz": FP32}, ValueError, "'zzz' matches no module"),
    ({"*.norm": FP32}, ValueError, "'*.norm' matches no module"),
    ({"l*m": FP32}, ValueError, "'l*m' matches no module"),
    ({nn.Conv2d: FP32}, ValueError, "Conv2d'> matches no module"),
    ({"head": FP32, "": BF16}, ValueError, "'head' decides nothing"),
    ({"layers.0": FP32, "layers.*": BF16}, ValueError, "'layers.0' decides nothing"),
    ({"head": torch.int8}, ValueError, "'head' must be one of (torch.float32"),
    ({"head": torch.complex64}, ValueError, "got torch.complex64"),
    ({"head": torch.float8_e4m3fn}, ValueError, "got torch.float8_e4m3fn"),
    ({"head": (FP32, torch.bool)}, ValueError, "got torch.bool"),
    ({"head": "bf16"}, TypeError, "must be a dtype or a pair of them, got 'bf16'"),
    ({"head": (FP32,)}, TypeError, "a dtype or a pair"),
    ({"head": (FP32, None)}, TypeError, "a dtype or a pair"),
    ({3: FP32}, TypeError, "a key is a name or a Module class, got 3"),
    ({int: FP32}, TypeError, "a name or a Module class, got <class 'int'>"),
    ([("head", FP32)], TypeError, "plan must be a Mapping, got list"),
    ({"embeddings": FP16}, ValueError, "1 of 400 values of embeddings.weight overflow"),
]


@pytest.mark.parametrize(("plan", "error", "message"), BAD_PLANS)
@pytest.mark.parametrize("switch", [False, True], ids=["apply", "switch"])
def test_a_bad_plan_changes_nothing(
    plan: dict[str, torch.dtype], error: type[Exception], message: str, switch: bool
) -> None:
    """One clear error before the first cast, from both functions that take a plan."""
    model = network()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    with torch.no_grad():
        model.embeddings.weight[0, 0] = 1e5
    before = everything(model, optimizer)
    call = partial(switch_precision, model, optimizer)
    with pytest.raises(error, match=re.escape(message)):
        (call if switch else partial(apply_precision_plan, model))(plan)
    assert same(before, everything(model, optimizer))
    assert hooks(model) == 0


def test_other_bad_calls_are_refused() -> None:
    """A second plan, a gradient, something that is no model or no optimizer."""
    model = network()
    optimizer = optim.AdamW(model.parameters())
    wrong: Any = [model]
    with pytest.raises(TypeError, match="model must be a Module, got list"):
        apply_precision_plan(wrong, PLAN)
    with pytest.raises(TypeError, match="model must be a Module, got list"):
        remove_precision_plan(wrong)
    with pytest.raises(TypeError, match="optimizer must be a Optimizer, got list"):
        switch_precision(model, wrong, PLAN)
    other = optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match="none of the model's parameters"):
        switch_precision(model, other, PLAN)
    model(IDS).sum().backward()
    message = r"layers\.0\.linear\.weight has a gradient: call model\.zero_grad"
    with pytest.raises(ValueError, match=message):
        apply_precision_plan(model, PLAN)
    with pytest.raises(ValueError, match=message):
        switch_precision(model, optimizer, PLAN)
    assert hooks(model) == 0
    model.zero_grad()
    apply_precision_plan(model, PLAN)
    with pytest.raises(ValueError, match="has a plan already: call switch_precision"):
        apply_precision_plan(model, PLAN)
    with pytest.raises(ValueError, match="has a plan already"):
        apply_precision_plan(nn.Sequential(model), {"": FP32})


def test_state_that_float16_cannot_hold_is_refused() -> None:
    """Adam's moments underflow in FP16; weights, state and plan stay as they were."""
    model = network()
    optimizer = optim.AdamW(model.parameters())
    apply_precision_plan(model, PLAN)
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    with pytest.raises(
        ValueError, match=r"values of exp_avg(_sq)? of .* would become 0 or Inf"
    ):
        switch_precision(model, optimizer, FP16)
    assert same(before, everything(model, optimizer))
    train(model, optimizer, 1)


def test_an_optimizer_that_refuses_its_state_leaves_everything() -> None:
    """Its own error comes through, and the weights have not been cast."""

    class Stubborn(optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:  # noqa: ANN401
            raise NotImplementedError("not here")

    model = network()
    optimizer = Stubborn(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    before = everything(model, optimizer)
    with pytest.raises(NotImplementedError, match="not here"):
        switch_precision(model, optimizer, BF16)
    assert same(before, everything(model, optimizer))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_a_cast_behind_the_plans_back_is_named(
    cast: Callable[[nn.Module], Any],
) -> None:
    """The call says which parameter, which dtype, and what to do; then it works."""
    model = network()
    apply_precision_plan(model, {"head": FP32})
    cast(model)
    with pytest.raises(
        RuntimeError, match=r"weight of Linear is .* by the plan torch\.float32"
    ):
        model(IDS)
    remove_precision_plan(model)
    apply_precision_plan(model, {"head": FP32})
    assert model(IDS).dtype == FP32
