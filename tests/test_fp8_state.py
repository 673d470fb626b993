"""Tests of snippets/fp8/state.py against Transformer Engine's own state machine.

``pytorch/quantization.py`` of its wheel runs here with the compiled part stood in for:
regions, flags and the order of updates are its own Python. What a test asserts of both
runs on both.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snippets import fp8
from tests import te_source
from tests.ranks import needs_gloo, run_ranks

ROOT = Path(__file__).parents[1]
OURS: Any = fp8
THEIRS: Any = te_source.load("pytorch.quantization")
each = pytest.mark.parametrize("engine", [OURS, THEIRS], ids=["ours", "theirs"])
CAPABILITIES = [(7, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
RECIPES = [
    "DelayedScaling",
    "Float8CurrentScaling",
    "Float8BlockScaling",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
]


@contextlib.contextmanager
def their_device(capability: tuple[int, int]) -> Iterator[None]:
    """Let their checks find a GPU of this capability, with recent libraries."""
    caches = [
        f"_{kind}_SUPPORT" for kind in ("FP8", "MXFP8", "NVFP4", "FP8_BLOCK_SCALING")
    ]
    with pytest.MonkeyPatch.context() as patch:
        for cache in caches:
            patch.setattr(THEIRS, cache, None)
        patch.setattr(THEIRS, "get_device_compute_capability", lambda: capability)
        patch.setattr(THEIRS.tex, "get_cublasLt_version", lambda: 130100)
        patch.setattr(torch.version, "cuda", "13.0")
        yield


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test starts and ends outside any region; their device is a Hopper."""
    torch.manual_seed(0)
    for engine in (OURS, THEIRS):
        engine.FP8GlobalStateManager.reset()
    with their_device((9, 0)):
        yield
    OURS.FP8GlobalStateManager.reset()


def flags(engine: Any) -> tuple[object, ...]:  # noqa: ANN401 - a module
    """What a region sets."""
    state = engine.FP8GlobalStateManager.quantization_state
    return (
        state.fp8_enabled,
        state.fp8_calibration,
        state.fp8_recipe,
        state.fp8_distributed_group,
        state.is_first_fp8_module,
        state.autocast_depth,
        state.fp8_parameters,
        state.high_precision_init_val,
    )


def layer(rows: int = 16) -> Any:  # noqa: ANN401 - its state has no static type
    """Return a small linear layer."""
    return fp8.Linear(16, rows, device="cpu")


def step(module: Any, x: Tensor, recipe: Any = None, **options: Any) -> Tensor:  # noqa: ANN401
    """Run one region and its backward."""
    with fp8.autocast(recipe=recipe, **options):
        out: Tensor = module(x)
    torch.autograd.backward(out.sum())
    return out


# -------------------------------------------------------------------------- regions


@each
def test_a_region_that_is_active_cannot_be_entered(engine: Any) -> None:  # noqa: ANN401
    """The same object, again; one after the other is fine."""
    region = engine.autocast()
    with region:
        inside = flags(engine)
        with pytest.raises(
            RuntimeError,
            match=r"^autocast context manager cannot be entered more than once "
            "concurrently$",
        ):
            region.__enter__()
        assert flags(engine) == inside
    with region:
        assert engine.FP8GlobalStateManager.is_fp8_enabled()
    assert flags(engine)[5] == 0


@each
def test_regions_nest_and_restore_the_one_around(engine: Any) -> None:  # noqa: ANN401
    """Enabled, disabled inside, enabled again inside that."""
    manager = engine.FP8GlobalStateManager
    outer, inner = engine.DelayedScaling(margin=1), engine.DelayedScaling(margin=2)
    before = flags(engine)
    with engine.autocast(recipe=outer):
        in_outer = flags(engine)
        assert manager.get_fp8_recipe() is outer
        with engine.autocast(enabled=False, calibrating=True):
            assert not manager.is_fp8_enabled()
            assert manager.is_fp8_calibration()
            with engine.autocast(recipe=inner, amax_reduction_group="group"):
                assert manager.get_fp8_recipe() is inner
                assert manager.get_fp8_group() == "group"
                assert not manager.is_fp8_calibration()
            assert manager.is_fp8_calibration()
        assert flags(engine) == in_outer
    assert flags(engine) == before


@each
def test_an_exception_ends_a_region_as_its_end_does(engine: Any) -> None:  # noqa: ANN401
    """Nothing of the region stays."""
    before = flags(engine)
    region = engine.autocast(recipe=engine.DelayedScaling())
    with pytest.raises(KeyError), region, engine.autocast(enabled=False):
        dict[str, int]()["missing"]
    assert flags(engine) == before
    with region:
        pass


@each
def test_the_first_module_is_that_of_the_outermost_region(engine: Any) -> None:  # noqa: ANN401
    """Asked once it answers yes, then no; inner regions do not answer anew."""
    manager = engine.FP8GlobalStateManager
    for _ in range(2):
        with engine.autocast():
            with engine.autocast():
                assert manager.is_first_fp8_module()
                assert not manager.is_first_fp8_module()
            # Leaving the inner region restores the flag of before it.
            assert manager.is_first_fp8_module()
            with engine.autocast():
                assert not manager.is_first_fp8_module()


@each
def test_the_default_recipe_is_chosen_on_entry(engine: Any) -> None:  # noqa: ANN401
    """Delayed scaling on a Hopper (the emulator's default, too)."""
    manager = engine.FP8GlobalStateManager
    assert type(manager.get_fp8_recipe()) is engine.DelayedScaling
    with engine.autocast():
        assert manager.get_fp8_recipe() == engine.DelayedScaling()


@each
def test_quantized_model_init_sets_and_restores(engine: Any) -> None:  # noqa: ANN401
    """Also after an exception."""
    before = flags(engine)
    recipe = engine.Float8CurrentScaling()
    with pytest.raises(ZeroDivisionError):  # noqa: PT012, SIM117
        with engine.quantized_model_init(
            recipe=recipe, preserve_high_precision_init_val=True
        ):
            manager = engine.FP8GlobalStateManager
            assert manager.with_fp8_parameters()
            assert manager.with_high_precision_init_val()
            assert manager.get_fp8_recipe() is recipe
            assert not manager.is_fp8_enabled()
            assert 1 / len(())
    assert flags(engine) == before


@each
@pytest.mark.parametrize("name", ["fp8_autocast", "fp8_model_init"])
def test_deprecated_names_warn_and_work(engine: Any, name: str) -> None:  # noqa: ANN401
    """With Transformer Engine's words."""
    recipe = engine.DelayedScaling(margin=3)
    keyword = "fp8_recipe" if name == "fp8_autocast" else "recipe"
    words = f"^{name} is deprecated and will be removed in a"
    found = []
    with pytest.warns(DeprecationWarning, match=words) as caught:  # noqa: SIM117
        with getattr(engine, name)(enabled=True, **{keyword: recipe}):
            found.append(engine.FP8GlobalStateManager.get_fp8_recipe())
    assert found == [recipe]
    others = THEIRS if engine is OURS else OURS
    with pytest.warns(DeprecationWarning, match=words) as theirs:  # noqa: SIM117
        with getattr(others, name)():
            pass
    assert [str(w.message) for w in caught] == [str(w.message) for w in theirs]
    if engine is OURS:  # theirs names contextlib for fp8_model_init
        assert caught[0].filename == __file__


@each
def test_the_manager_answers_what_transformer_engine_s_does(engine: Any) -> None:  # noqa: ANN401
    """Names of states, availability, and the active region to save and restore."""
    manager = engine.FP8GlobalStateManager
    assert manager.get_meta_tensor_key() == "scaling_fwd"
    assert manager.get_meta_tensor_key(forward=False) == "scaling_bwd"
    assert manager.get_fwd_bwd_key(forward=True) == "forward"
    assert manager.get_fwd_bwd_key(forward=False) == "backward"
    assert manager.get_buffer_info() == "buffer_index_and_autocast_key"
    outside = manager.get_autocast_state()
    recipe = engine.Float8CurrentScaling()
    with engine.autocast(recipe=recipe):
        inside = manager.get_autocast_state()
        assert inside[:5] == (True, False, recipe, None, True)
        manager.set_autocast_state(outside)
        assert not manager.is_fp8_enabled()
        manager.set_autocast_state(inside)
        assert manager.is_fp8_enabled()
        assert manager.is_first_fp8_module()
    assert manager.get_autocast_state() == outside


def test_the_manager_tells_availability_with_its_reason() -> None:
    """Like the functions, always with the reason."""
    with fp8.emulated_device((9, 0)):
        manager = fp8.FP8GlobalStateManager
        assert manager.is_fp8_available() == fp8.is_fp8_available(return_reason=True)
        assert manager.is_fp8_block_scaling_available() == (True, "")
        mxfp8, nvfp4 = manager.is_mxfp8_available(), manager.is_nvfp4_available()
    assert (mxfp8[0], nvfp4[0]) == (False, False)
    assert "MXFP8" in mxfp8[1]
    assert "NVFP4" in nvfp4[1]
    assert not fp8.FP8GlobalStateManager.fp8_graph_capturing()


def test_what_is_no_recipe_is_refused_before_anything_changes() -> None:
    """Theirs takes anything and fails in the first layer."""
    before = flags(OURS)
    wrong: Any = "HYBRID"
    with (
        pytest.raises(
            TypeError, match=r"recipe=\.\.\.\) is a str, it must be a recipe"
        ),
        fp8.autocast(recipe=wrong),
    ):
        pass
    assert flags(OURS) == before
    with pytest.raises(NotImplementedError, match="CUDA graphs need a GPU"):
        fp8.autocast(_graph=True)


# --------------------------------------------------------------------------- devices


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_availability_is_that_of_the_emulated_device(
    capability: tuple[int, int],
) -> None:
    """All four questions of recipes, with reasons, and the default recipe."""
    questions = [n for n in fp8.__all__ if n.startswith("is_") and "available" in n]
    questions.remove("is_bf16_available")
    assert len(questions) == 4
    with their_device(capability), fp8.emulated_device(capability):
        for question in questions:
            ours, theirs = getattr(OURS, question), getattr(THEIRS, question)
            assert ours(return_reason=True) == theirs(return_reason=True)
            assert ours() == theirs() == ours(return_reason=True)[0]
        default, their_default = OURS.get_default_recipe(), THEIRS.get_default_recipe()
        assert type(default).__name__ == type(their_default).__name__
    assert all(getattr(fp8, q)(return_reason=True) == (True, "") for q in questions)


def outcome(make: Callable[[], Any]) -> tuple[str, str]:
    """The type and the words of what entering a region raises."""
    try:
        with make():
            return "", ""
    except (AssertionError, RuntimeError) as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("name", ["", *RECIPES])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_a_device_that_cannot_run_a_recipe_says_so_on_entry(
    capability: tuple[int, int], name: str
) -> None:
    """The same error as theirs, and no region is left half entered."""
    with their_device(capability), fp8.emulated_device(capability):
        recipe = getattr(OURS, name)() if name else None
        their_recipe = getattr(THEIRS, name)() if name else None
        before = flags(OURS)
        ours = outcome(lambda: fp8.autocast(recipe=recipe))
        assert flags(OURS) == before
        assert ours == outcome(lambda: THEIRS.autocast(recipe=their_recipe))
        # What is disabled is not checked.
        assert outcome(lambda: fp8.autocast(enabled=False, recipe=recipe)) == ("", "")


def test_an_emulated_device_ends_with_its_block() -> None:
    """And nests."""
    with fp8.emulated_device((8, 0)):
        with fp8.emulated_device((9, 0)):
            assert fp8.is_fp8_available()
        assert not fp8.is_fp8_available()
    assert fp8.is_fp8_available()


# ------------------------------------------------------------- the order of updates


def _amax(history: Tensor) -> Tensor:
    return history.amax(0)


def _scale(amax: Tensor, scale: Tensor, fp8_max: float, recipe: Any) -> Tensor:  # noqa: ANN401
    return torch.where(amax > 0, torch.div(fp8_max, amax) / 2**recipe.margin, scale)


class Theirs:
    """Their manager with modules that do what their `module/base.py` does with it."""

    def __init__(self, recipes: list[Any]) -> None:
        self.metas = [
            {
                "recipe": recipe,
                "fp8_group": None,
                **{
                    f"scaling_{mode[:3].replace('for', 'fwd').replace('bac', 'bwd')}": (
                        THEIRS.DelayedScalingRecipeState(
                            recipe, mode=mode, num_quantizers=count, device="cpu"
                        )
                    )
                    for mode, count in (("forward", 3), ("backward", 2))
                },
            }
            for recipe in recipes
        ]
        self.tape: list[tuple[int, float, bool]] = []

    def forward(self, number: int, x: float, weight: float, gradient: float) -> None:
        """Record the amax of the forward tensors, remember the backward."""
        manager = THEIRS.FP8GlobalStateManager
        meta: Any = self.metas[number]
        if not manager.is_fp8_enabled() and not manager.is_fp8_calibration():
            return
        if manager.is_fp8_enabled():
            manager.add_fp8_tensors_to_global_buffer(meta)
        history = meta["scaling_fwd"].amax_history[0]
        if manager.is_fp8_enabled():
            history.copy_(torch.maximum(history, torch.tensor([x, weight, 0])))
        else:  # Float8Quantizer.calibrate writes over what was there
            history[:2] = torch.tensor([x, weight])
        if manager.is_fp8_enabled() and torch.is_grad_enabled():
            self.tape.append((number, gradient, manager.is_first_fp8_module()))

    def backward(self) -> None:
        """Run what was remembered, the latest first."""
        for number, gradient, updates in reversed(self.tape):
            meta: Any = self.metas[number]
            history = meta["scaling_bwd"].amax_history[0]
            history.copy_(torch.maximum(history, torch.tensor([gradient, 0])))
            if updates:
                THEIRS.FP8GlobalStateManager.reduce_and_update_fp8_tensors(
                    forward=False
                )
        self.tape.clear()


def fused(
    amax: Tensor,
    histories: list[Tensor],
    scales: list[Tensor],
    *options: Any,  # noqa: ANN401
) -> None:
    """Stand in for their kernel: the numerics are not what is tested here."""
    algorithm, dtype, margin = options
    recipe = fp8.DelayedScaling(margin=margin, amax_compute_algo=algorithm)
    fp8_max = 448.0 if dtype == THEIRS.DType.kFloat8E4M3 else 57344.0
    parts = torch.split(amax, [scale.numel() for scale in scales])
    for part, history, scale in zip(parts, histories, scales, strict=True):
        history[0] = part
        new = fp8.update_delayed_scaling(
            history.clone(), scale.clone(), fp8_max, recipe
        )
        history.copy_(new[0])
        scale.copy_(new[1])


@pytest.mark.parametrize("algorithm", ["callable", "max", "most_recent"])
@pytest.mark.parametrize("seed", range(12))
def test_any_program_updates_what_theirs_updates_when_theirs_does(
    seed: int, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random programs of regions, modules, backward passes; every state, every event.

    Nested, disabled and calibrating regions, three recipes, evaluation without
    gradients, several backward passes of one region, calls of a module in two regions.
    """
    monkeypatch.setattr(
        THEIRS.tex, "fused_amax_and_scale_update_after_reduction", fused
    )
    rng = random.Random(seed)
    options: list[dict[str, Any]] = [
        {"amax_history_len": 3},
        {"amax_history_len": 4, "margin": 1, "fp8_format": "E4M3"},
        {"amax_history_len": 1, "reduce_amax": False},
    ]
    for option in options:
        option["amax_compute_algo"] = _amax if algorithm == "callable" else algorithm
        if algorithm == "callable":
            option["scaling_factor_compute_algo"] = _scale

    def recipes(engine: Any) -> list[Any]:  # noqa: ANN401 - a module
        made = []
        for option in options:
            name = option.get("fp8_format", "HYBRID")
            new = {**option, "fp8_format": getattr(engine.Format, name)}
            made.append(engine.DelayedScaling(**new))
        return made

    our_recipes, their_recipes = recipes(OURS), recipes(THEIRS)
    layers = [layer() for _ in range(5)]
    kind = [0, 1, 2, 0, 1]
    theirs = Theirs([their_recipes[k] for k in kind])
    losses: list[Tensor] = []
    called: set[int] = set()

    def compare() -> None:
        for ours, meta in zip(layers, theirs.metas, strict=True):
            for key, count in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                state: Any = meta[key]
                mine = ours.fp8_meta.get(key)
                if mine is None:
                    assert torch.equal(state.scale, torch.ones(count))
                    continue
                assert torch.equal(mine.scale, state.scale)
                assert torch.equal(mine.amax_history, state.amax_history)

    def call(number: int) -> None:
        reduces = our_recipes[kind[number]].reduce_amax
        if reduces and number in called:
            return
        called.add(number)
        x = torch.randn(16, 16) * rng.choice([0.1, 1, 30])
        gradient = torch.randn(16, 16) * rng.choice([1e-3, 1.0])
        amax = [t.abs().max().item() for t in (x, layers[number].weight, gradient)]
        out = layers[number](x)
        if torch.is_grad_enabled() and fp8.FP8GlobalStateManager.is_fp8_enabled():
            losses.append((out * gradient).sum())
        theirs.forward(number, *amax)
        compare()

    def region(depth: int) -> None:
        number = rng.randrange(len(layers))
        enabled = rng.random() < 0.8
        calibrating = rng.random() < 0.3
        common = {"enabled": enabled, "calibrating": calibrating}
        chosen = kind[number]
        with (
            fp8.autocast(recipe=our_recipes[chosen], **common),
            THEIRS.autocast(recipe=their_recipes[chosen], **common),
        ):
            for _ in range(rng.randint(0, 3)):
                if depth < 3 and rng.random() < 0.5:
                    region(depth + 1)
                else:
                    call(rng.choice([n for n in range(5) if kind[n] == chosen]))
        compare()

    for _ in range(12):
        called.clear()
        with torch.set_grad_enabled(rng.random() < 0.8):
            region(0)
        if losses and rng.random() < 0.8:
            # One pass, the latest call first, as autograd orders them.
            torch.autograd.backward(losses)
            losses.clear()
            theirs.backward()
            compare()


def test_forward_scales_change_at_the_end_of_the_outermost_region() -> None:
    """And those of gradients at the end of the backward of its first module."""
    first, second = layer(), layer()
    x = torch.full((16, 16), 7.0)
    with fp8.autocast(recipe=fp8.DelayedScaling()):
        with fp8.autocast(recipe=fp8.DelayedScaling()):
            out = second(first(x))
        state = first.fp8_meta["scaling_fwd"]
        assert state.scale[0] == 1
        assert state.amax_history[0, 0] == 7
    assert state.scale[0] == 448 / 7
    assert state.amax_history[0, 0] == 0
    assert state.amax_history[-1, 0] == 7
    seen: list[float] = []
    gradients = second.fp8_meta["scaling_bwd"]
    out.register_hook(lambda g: seen.append(gradients.scale[0].item()))
    first.weight.register_hook(lambda g: seen.append(gradients.scale[0].item()))
    torch.autograd.backward((out * 2.0**-10).sum())
    assert seen[0] == 1
    assert gradients.scale[0] == 57344 * 2**10
    assert first.fp8_meta["scaling_bwd"].scale[0] > 1


def test_evaluation_never_updates() -> None:
    """Without gradients amax is staged and no scale changes, however often."""
    module = layer()
    with torch.no_grad():
        for size in (1.0, 5.0, 3.0):
            with fp8.autocast(recipe=fp8.DelayedScaling(amax_history_len=4)):
                module(torch.full((16, 16), size))
    state = module.fp8_meta["scaling_fwd"]
    assert torch.equal(state.scale, torch.ones(3))
    assert state.amax_history[0, 0] == 5
    assert not state.amax_history[1:].any()


def test_calibration_records_without_quantizing() -> None:
    """Outputs are those of high precision; the next enabled region has the amax."""
    module, x = layer(), torch.randn(16, 16)
    with fp8.autocast(enabled=False, calibrating=True, recipe=fp8.DelayedScaling()):
        out = module(x)
    assert torch.equal(out, module(x))
    state = module.fp8_meta["scaling_fwd"]
    assert state.amax_history[0, 0] == x.abs().max()
    assert state.amax_history[0, 1] == module.weight.abs().max()
    assert torch.equal(state.scale, torch.ones(3))
    step(module, 0 * x, fp8.DelayedScaling())
    assert state.scale[0] == torch.div(448, x.abs().max())


def test_a_module_called_twice_in_a_region_is_refused() -> None:
    """Its amax would be lost in the reduction; the state stays as it was."""
    module, x = layer(), torch.ones(16, 16)
    words = "Linear is called more than once in one autocast region"
    with fp8.autocast(recipe=fp8.DelayedScaling()):
        module(x)
        with pytest.raises(RuntimeError, match=words):
            module(3 * x)
    assert module.fp8_meta["scaling_fwd"].scale[0] == 448
    step(module, x, fp8.DelayedScaling())  # and it goes on
    alone = layer()
    with fp8.autocast(recipe=fp8.DelayedScaling(reduce_amax=False)):
        alone(x)
        alone(3 * x)
    assert alone.fp8_meta["scaling_fwd"].scale[0] == 448 / 3
    with torch.no_grad(), fp8.autocast(recipe=fp8.DelayedScaling()):
        module(x)
        module(x)


def test_another_kind_of_recipe_on_a_live_module_warns_and_starts_anew() -> None:
    """The words are Transformer Engine's."""
    module, x = layer(), torch.randn(16, 16)
    step(module, x, fp8.DelayedScaling())
    with pytest.warns(
        UserWarning,
        match="^Recipe type changed from DelayedScaling to Float8CurrentScaling. "
        "This may affect model behavior.$",
    ):
        out = step(module, x, fp8.Float8CurrentScaling())
    assert "scaling_fwd" not in module.fp8_meta
    fresh = layer()
    fresh.load_state_dict(
        {
            name: value
            for name, value in module.state_dict().items()
            if not name.endswith("_extra_state")
        },
        strict=False,
    )
    assert torch.equal(out, step(fresh, x, fp8.Float8CurrentScaling()))


def test_the_same_kind_of_recipe_keeps_the_first_one_s_settings() -> None:
    """As in Transformer Engine; only the length of the history follows."""
    module, x = layer(), torch.ones(16, 16)
    step(module, x, fp8.DelayedScaling(margin=1, amax_history_len=2))
    assert module.fp8_meta["scaling_fwd"].scale[0] == 224
    with pytest.warns(UserWarning, match="the new margin changes nothing for it"):
        step(module, x, fp8.DelayedScaling(margin=5, amax_history_len=4))
    state = module.fp8_meta["scaling_fwd"]
    assert state.scale[0] == 224
    assert state.amax_history.shape == (4, 3)


def test_an_error_in_a_layer_leaves_the_region_usable() -> None:
    """A wrong shape, then a right one."""
    module = layer()
    before = flags(OURS)
    with pytest.raises(ValueError, match="divisible by 8"):
        step(module, torch.ones(3, 16), fp8.DelayedScaling())
    assert flags(OURS) == before
    step(module, torch.ones(16, 16), fp8.DelayedScaling())
    assert module.fp8_meta["scaling_fwd"].scale[0] == 448


def test_modules_that_are_gone_are_forgotten() -> None:
    """The registered states do not keep a model alive, nor do they pile up."""
    for _ in range(3):
        step(layer(), torch.ones(16, 16), fp8.DelayedScaling())
    last = layer()
    step(last, torch.ones(16, 16), fp8.DelayedScaling())
    registered = fp8.FP8GlobalStateManager._registered
    alive = [r for refs in registered.values() for r in refs if r() is not None]
    assert len(alive) == 2  # forward and backward of the one that is left


# ---------------------------------------------------------------------- two processes

_RANK = """
import os
import sys

import torch
import torch.distributed as dist

from snippets import fp8

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
own = [dist.new_group([0]), dist.new_group([1])][rank]
x = torch.full((16, 16), 2.0 + rank)


def scales(group=None, **options):
    torch.manual_seed(0)
    layer = fp8.Linear(16, 16, device="cpu")
    recipe = fp8.DelayedScaling(**options)
    with fp8.autocast(recipe=recipe, amax_reduction_group=group):
        out = layer(x)
    (out * (1 + rank)).sum().backward()
    states = layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"]
    last = states[0].amax_history[-1, 0].item()
    fp8.FP8GlobalStateManager.reset()
    return [states[0].scale[0].item(), states[1].scale[0].item(), last]


# The larger amax of both ranks: 3 forward, 2 backward.
assert scales() == [torch.div(448, torch.tensor(3.0)).item(), 57344 / 2, 3.0]
# Each its own: not reduced, or reduced over a group of one.
mine = [torch.div(448, torch.tensor(2.0 + rank)).item(), 57344 / (1 + rank), 2.0 + rank]
assert scales(reduce_amax=False) == mine
assert scales(group=own) == mine
# Two groups in one region: each module is reduced over its own.
recipe, both, alone = fp8.DelayedScaling(), *(
    fp8.Linear(16, 16, device="cpu") for _ in range(2)
)
with fp8.autocast(recipe=recipe):
    both(x)
    with fp8.autocast(recipe=recipe, amax_reduction_group=own):
        alone(x)
found = [m.fp8_meta["scaling_fwd"].amax_history[-1, 0].item() for m in (both, alone)]
assert found == [3.0, 2.0 + rank]
# Evaluation on one rank only does not wait for the other.
if rank == 0:
    with torch.no_grad(), fp8.autocast(recipe=fp8.DelayedScaling()):
        fp8.Linear(16, 16, device="cpu")(x)
dist.barrier()
print("done", flush=True)
os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down
"""


@needs_gloo
def test_amax_is_reduced_over_the_processes_of_the_group(tmp_path: Path) -> None:
    """Two gloo processes end with one scale, or with their own where they should."""
    assert all("done" in output for output in run_ranks(_RANK, tmp_path))
