"""Tests of snippets/fp8/extra_state.py: checkpoints with scales and histories."""

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from snippets import fp8 as te
from snippets.fp8.extra_state import load_extra_state
from tests import te_source


def as_its_own(theirs: ModuleType) -> "mock._patch_dict":
    """Let pickle find Transformer Engine's recipes under their names."""
    name = "transformer_engine"
    parents = {key: ModuleType(key) for key in (name, f"{name}.common")}
    return mock.patch.dict(sys.modules, {**parents, f"{name}.common.recipe": theirs})


def same(a: Tensor, b: Tensor) -> bool:
    """Compare what two states hold: the bytes of a tensor's file name its address."""
    x, y = load_extra_state(a), load_extra_state(b)
    assert x is not None
    assert y is not None
    tensors = [key for key in x if isinstance(x[key], Tensor)]
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in tensors)


def trained(
    recipe: te.DelayedScaling, steps: int = 3, scale: float = 1.0
) -> tuple[te.Linear, list[Tensor]]:
    """Return a layer after some steps, and its last outputs."""
    torch.manual_seed(0)
    layer = te.Linear(32, 32)
    return layer, more(layer, recipe, steps, scale)


def more(
    layer: te.Linear, recipe: te.DelayedScaling, steps: int, scale: float = 1.0
) -> list[Tensor]:
    """Train on, with a generator of its own, and return the outputs."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for _ in range(steps):
        x = scale * torch.randn(16, 32, generator=generator)
        with te.autocast(recipe=recipe):
            y = layer(x)
        assert isinstance(y, Tensor)
        torch.autograd.backward(y.square().mean())
        outputs.append(y.detach())
    return outputs


@pytest.mark.parametrize("quantized", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(quantized: bool, tmp_path: Path) -> None:
    """Through a file read with weights_only; without the state it would not."""
    recipe = te.DelayedScaling(amax_history_len=4)
    with te.quantized_model_init(enabled=quantized, recipe=recipe):
        layer, _ = trained(recipe, scale=100.0)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    expected = more(layer, recipe, 3)

    def resumed(*, state: bool) -> list[Tensor]:
        saved = torch.load(tmp_path / "layer.pt")
        if not state:
            saved["_extra_state"] = torch.empty(0, dtype=torch.uint8)
        with te.quantized_model_init(enabled=quantized, recipe=recipe):
            fresh = te.Linear(32, 32)
        fresh.load_state_dict(saved)
        return more(fresh, recipe, 3)

    assert all(map(torch.equal, resumed(state=True), expected))
    assert not torch.equal(resumed(state=False)[0], expected[0])


def test_recipes_without_state_save_none() -> None:
    """Nor does a layer that never was in a region."""
    layer = te.Linear(32, 32)
    assert layer.get_extra_state().numel() == 0
    with te.autocast(recipe=te.Float8CurrentScaling()):
        layer(torch.randn(16, 32))
    assert layer.get_extra_state().numel() == 0
    te.Linear(32, 32).load_state_dict(layer.state_dict())


def test_transformer_engine_reads_what_is_written() -> None:
    """Its classes come out of our bytes, under its names, and its check knows them."""
    layer, _ = trained(te.DelayedScaling(margin=2, amax_history_len=8))
    data = bytes(layer.get_extra_state().tolist())
    theirs = te_source.load("common.recipe")
    with as_its_own(theirs):
        state = pickle.loads(data)
    forward = layer.fp8_meta["scaling_fwd"]

    assert type(state["recipe"]) is theirs.DelayedScaling
    assert state["recipe"].fp8_format is theirs.Format.HYBRID
    assert (state["recipe"].margin, state["recipe"].amax_history_len) == (2, 8)
    assert torch.equal(state["scale_fwd"], forward.scale)
    assert torch.equal(state["amax_history_fwd"], forward.amax_history)
    assert state["extra_fp8_variables"]["num_gemms"] == 1
    classify = te_source.load("pytorch._extra_state")._classify_extra_state_pickle
    assert classify(data).name == "UNSAFE_LOAD", "what it says of its own"


def test_what_transformer_engine_writes_is_read() -> None:
    """Its layout: a recipe of its class, tensors, and plain values."""
    theirs = te_source.load("common.recipe")
    written = {
        "recipe": theirs.DelayedScaling(amax_history_len=2, margin=1),
        "scale_fwd": torch.tensor([2.0, 4.0, 1.0]),
        "amax_history_fwd": torch.arange(6.0).reshape(2, 3),
        "scale_bwd": torch.tensor([8.0, 1.0]),
        "amax_history_bwd": torch.arange(4.0).reshape(2, 2),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True},
    }
    with as_its_own(theirs):
        data = pickle.dumps(written)
    layer = te.Linear(32, 32)
    layer.set_extra_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    assert layer.fp8_meta["scaling_fwd"].scale.tolist() == [2.0, 4.0, 1.0]
    assert layer.fp8_meta["scaling_bwd"].amax_history.tolist() == [[0, 1], [2, 3]]
    assert isinstance(layer.fp8_meta["recipe"], te.DelayedScaling)
    assert layer.fp8_meta["recipe"].margin == 1


class _Attack:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (eval, ("__import__('os').abort()",))


def storage_with_an_attack() -> bytes:
    """Return a pickle whose tensor's bytes hold the attack."""
    inner = io.BytesIO()
    torch.save(_Attack(), inner)

    class Inner:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
            return (torch.storage._load_from_bytes, (inner.getvalue(),))

    return pickle.dumps({"recipe": None, "scale_fwd": Inner()})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"no pickle", "UnpicklingError"),
        (pickle.dumps({"scale_fwd": 1.0}), "KeyError: 'scale_bwd'"),
        (pickle.dumps({"recipe": _Attack()}), "names builtins.eval, which is neither"),
        (storage_with_an_attack(), "weights_only|Weights only"),
    ],
    ids=["noise", "empty", "code", "code in a tensor"],
)
def test_bytes_that_are_no_state(data: bytes, match: str) -> None:
    """One error, nothing runs, and the module is as before."""
    layer, _ = trained(te.DelayedScaling())
    before = layer.get_extra_state()
    with pytest.raises(RuntimeError, match=f"cannot be read: .*(?:{match})"):
        layer.set_extra_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="Unsupported checkpoint format"):
        layer.set_extra_state({"scale": 1})

    assert same(layer.get_extra_state(), before)


def _factory(role: object) -> te.Quantizer:
    return te.IdentityQuantizer()


@pytest.mark.parametrize("protocol", [2, 4])  # a class is one string, or two
@pytest.mark.parametrize(
    "state",
    [
        {},
        {"extra_fp8_variables": {"num_gemms": 1}},
        *(
            {"recipe": recipe, "extra_fp8_variables": {}}
            for recipe in (
                te.Float8CurrentScaling(),
                te.Float8BlockScaling(),
                te.MXFP8BlockScaling(),
                te.NVFP4BlockScaling(),
                te.CustomRecipe(qfactory=_factory),
            )
        ),
    ],
    ids=lambda state: type(state.get("recipe")).__name__,
)
def test_a_state_that_holds_none_is_left_alone(
    state: dict[str, Any], protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older releases wrote one for every recipe; it needs no permission either."""
    with te.installed():
        data = pickle.dumps(state, protocol)
    ignored = te_source.load("pytorch._extra_state").should_load_extra_state_pickle
    assert not ignored(data, "layer")
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "0")
    layer = te.Linear(16, 16)
    layer.set_extra_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    assert "recipe" not in layer.fp8_meta


def test_a_state_of_the_first_releases_is_one_of_delayed_scaling() -> None:
    """It names no recipe, and holds the reciprocals of its scales, too."""
    state = {
        f"{name}_{key}": torch.full((*shape, size), 2.0)
        for key, size in (("fwd", 3), ("bwd", 2))
        for name, shape in (("scale", ()), ("scale_inv", ()), ("amax_history", (1024,)))
    }
    data = pickle.dumps({**state, "extra_fp8_variables": {}})
    layer = te.Linear(16, 16)
    layer.set_extra_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    assert layer.fp8_meta["recipe"] == te.DelayedScaling()
    assert layer.fp8_meta["scaling_bwd"].scale.tolist() == [2.0, 2.0]


def test_the_state_of_another_module_is_refused() -> None:
    """That of two products does not fit one."""
    layer, _ = trained(te.DelayedScaling())
    state = load_extra_state(layer.get_extra_state())
    assert state is not None
    state["scale_fwd"] = state["scale_fwd"].repeat(2)
    data = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    before = layer.get_extra_state()
    with pytest.raises(ValueError, match="2 matrix products, Linear has 1"):
        layer.set_extra_state(data)

    assert same(layer.get_extra_state(), before)


def test_transformer_engine_s_refusal_can_be_rehearsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads no such state unless the variable is 1; here, unless it is 0."""
    layer, _ = trained(te.DelayedScaling())
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    advisory = te_source.load("pytorch._extra_state").extra_state_pickle_advisory
    for value in (None, "1"):
        if value is not None:
            monkeypatch.setenv(name, value)
        te.Linear(32, 32).load_state_dict(layer.state_dict())
    monkeypatch.setenv(name, "0")
    with pytest.raises(RuntimeError) as error:
        te.Linear(32, 32).load_state_dict(layer.state_dict())

    assert str(error.value) == advisory("Linear")


def test_another_recipe_after_loading_warns() -> None:
    """The loaded scales are for delayed scaling; current scaling needs none."""
    layer, _ = trained(te.DelayedScaling())
    other = te.Linear(32, 32)
    other.load_state_dict(layer.state_dict())
    with (
        te.autocast(recipe=te.Float8CurrentScaling()),
        pytest.warns(UserWarning, match="Recipe type changed from DelayedScaling to "),
    ):
        other(torch.randn(16, 32))
