"""Tests of snippets/nemo_recipes.py, as read in guide/nemo_recipes."""

import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import snippets.nemo_recipes as ours
from snippets.loss_scaling import DynamicLossScaler
from snippets.nemo_recipes import (
    MIXED_PRECISION_RECIPES,
    NEMO2_NAMES,
    MixedPrecisionConfig,
    get_mixed_precision_config,
    register,
)

PAGE = Path(__file__).parents[1] / "source/guide/nemo_recipes.md"
DEFAULTS: dict[str, Any] = {
    "fp32": False,
    "fp16": False,
    "bf16": False,
    "params_dtype": None,
    "pipeline_dtype": None,
    "autocast_dtype": None,
    "autocast_enabled": False,
    "grad_reduce_in_fp32": True,
    "fp8": None,
    "fp8_recipe": "tensorwise",
    "first_last_layers_bf16": False,
    "fp8_margin": 0,
    "fp8_amax_history_len": 1,
    "fp8_amax_compute_algo": "most_recent",
    "fp8_wgrad": True,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "fp8_param": False,  # None until fp8_param_gather is set, which __init__ does
    "fp8_param_gather": False,
    "fp4": None,
    "fp4_recipe": "nvfp4",
    "fp4_param": False,
    "fp4_param_gather": False,
    "loss_scale": None,
    "initial_loss_scale": 2**32,
    "min_loss_scale": 1.0,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "num_layers_at_start_in_bf16": 0,
    "num_layers_at_end_in_bf16": 0,
    "reuse_grad_buf_for_mxfp8_param_ag": False,
}
# Written from Megatron-Bridge v0.6.0, recipe by recipe, beside what their half sets.
FP8_PARAM = {"fp8_param": True, "fp8_param_gather": True}
FP4_PARAM = {"fp4_param": True, "fp4_param_gather": True}
DELAYED = {
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
} | FP8_PARAM


def layers(start: int, end: int) -> dict[str, Any]:
    """The outer layers of a recipe."""
    return {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


MX = {"fp8": "e4m3", "fp8_recipe": "mxfp8"} | FP8_PARAM
MX["reuse_grad_buf_for_mxfp8_param_ag"] = True
ADDED: dict[str, dict[str, Any]] = {
    "bf16_mixed": {},
    "bf16_with_fp8_delayed_scaling_mixed": DELAYED,
    "bf16_with_mxfp8_mixed": MX,
    "bf16_with_fp8_current_scaling_mixed": {"fp8": "hybrid"} | FP8_PARAM | layers(1, 1),
    "bf16_with_fp8_subchannel_scaling_mixed": {
        "fp8": "hybrid",
        "fp8_recipe": "blockwise",
    },
}
ADDED |= {name.replace("bf16", "fp16"): added for name, added in ADDED.items()}
ADDED |= {
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": {"fp8": "hybrid"}
    | FP8_PARAM
    | layers(2, 2),
    "nanov2_bf16_with_fp8_current_scaling_mixed": {
        "fp8": "hybrid",
        "fp8_recipe": "blockwise",
    }
    | FP8_PARAM
    | layers(2, 2),
    "bf16_with_nvfp4_mixed": {"fp4": "e2m1"} | FP4_PARAM,
    "nemotron_3_super_bf16_with_nvfp4_mixed": {"fp4": "e2m1"}
    | FP4_PARAM
    | layers(0, 14),
}
HALVES: dict[str, dict[str, Any]] = {
    half: {half: True, "params_dtype": dtype, "pipeline_dtype": dtype}
    for half, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
}
HALVES["fp16"]["grad_reduce_in_fp32"] = False

# (field, value that nothing reads unless the settings say so, settings)
READ = [
    ("fp8_margin", 1, {"fp8": "hybrid", "fp8_recipe": "delayed"}),
    ("fp8_amax_history_len", 9, {"fp8": "hybrid", "fp8_recipe": "delayed"}),
    ("fp8_amax_compute_algo", "max", {"fp8": "hybrid", "fp8_recipe": "delayed"}),
    ("fp8_multi_head_attention", True, {"fp8": "hybrid", "fp8_recipe": "delayed"}),
    ("fp8_dot_product_attention", True, {"fp8": "hybrid"}),
    ("fp8_dot_product_attention", True, {"fp4": "e2m1"}),
    ("first_last_layers_bf16", True, {"fp4": "e2m1"}),
    ("num_layers_at_end_in_bf16", 1, {"fp8": "e4m3", "first_last_layers_bf16": True}),
    ("initial_loss_scale", 4.0, {"fp16": True}),
    ("hysteresis", 4, {"fp16": True}),
]

# Settings -> how Megatron's message (or ours where it has none) begins.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"fp16": True, "bf16": True},
        "Model config cannot have both bf16=True and fp16=True. "
        "Please set only one precision mode.",
    ),
    ({"fp8": "e5m2"}, "E4M3 and HYBRID are the only supported FP8 formats."),
    (
        {"fp8": "e4m3", "fp8_recipe": "rowwise"},
        "Float8CurrentScaling, MXFP8BlockScaling, Float8BlockwiseScaling and "
        "DelayedScaling are the only supported FP8 recipes.",
    ),
    (
        {"fp4": "e2m1", "fp4_recipe": "mxfp4"},
        "NVFP4BlockScaling and custom are the only supported FP4 recipes.",
    ),
    (
        {"fp8": "hybrid", "fp8_recipe": "delayed", "first_last_layers_bf16": True},
        "Delayed scaling does not support first / last layer in BF16.",
    ),
    (
        {"fp8": "hybrid"} | layers(9, 0),
        "num_layers_at_start_in_bf16 (9) must be between 0 and number of layers per "
        "pipeline stage (8).",
    ),
    (
        {"fp8": "hybrid"} | layers(0, 9),
        "num_layers_at_end_in_bf16 (9) must be between 0 and number of layers per "
        "pipeline stage (8).",
    ),
    ({"fp8_param_gather": True}, "fp8_param must be used together with fp8 mode."),
    ({"fp4_param_gather": True}, "fp4_param must be used together with fp4 mode."),
    (
        {"fp8": "hybrid", "fp4": "e2m1"},
        "fp4 and fp8 cannot be used simultaneously. Please choose one.",
    ),
    (
        {"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param_gather": True},
        "When fp8_param_gather=True and fp8_recipe='mxfp8', "
        "reuse_grad_buf_for_mxfp8_param_ag must be set to True",
    ),
    (
        {"reuse_grad_buf_for_mxfp8_param_ag": True},
        "Reuse grad buffer only when keeping params in MXFP8.",
    ),
]
OURS: list[tuple[dict[str, Any], str]] = [
    ({"fp4": "e4m3"}, "fp4 must be None or 'e2m1', got 'e4m3'"),
    ({"num_layers_at_end_in_bf16": -1}, "num_layers_at_end_in_bf16 (-1) must be"),
    ({"fp8_amax_compute_algo": "mean"}, "fp8_amax_compute_algo must be 'max' or"),
    ({"fp8_amax_history_len": 0}, "fp8_amax_history_len must be positive"),
    *(
        ({name: value}, f"{name} must be positive and finite, got {value}")
        for name in ("loss_scale", "initial_loss_scale", "min_loss_scale")
        for value in (0.0, -1.0, math.inf, math.nan)
    ),
    ({"hysteresis": 0}, "hysteresis must be positive and finite, got 0"),
    ({"loss_scale_window": 0}, "loss_scale_window must be positive"),
    ({"fp16": True, "min_loss_scale": 2.0**40}, "initial_loss_scale must not be below"),
    ({"fp16": True, "initial_loss_scale": None}, "initial_loss_scale must not be"),
    ({"params_dtype": torch.int8}, "params_dtype must be a floating-point dtype"),
    ({"pipeline_dtype": torch.complex64}, "pipeline_dtype must be a floating-point"),
]


def make(**settings: Any) -> MixedPrecisionConfig:  # noqa: ANN401
    """A config from settings that a test has as a dict."""
    return MixedPrecisionConfig(**settings)


def recipes() -> list[str]:
    """Every recipe's name, once."""
    return [name for name in MIXED_PRECISION_RECIPES if "-" not in name]


def megatron(module: str) -> ModuleType:
    """A real module of Megatron, where there is one."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError):
        pytest.skip(f"needs {module}")


# Exact laws


def test_fields_and_defaults_are_megatron_bridges() -> None:
    """Thirty-one fields, in its order, with its defaults."""
    assert asdict(MixedPrecisionConfig()) == DEFAULTS
    assert [field.name for field in fields(MixedPrecisionConfig)] == list(DEFAULTS)


@pytest.mark.parametrize("name", ADDED)
def test_recipe_sets_what_megatron_bridges_does(name: str) -> None:
    """Every field of every recipe."""
    half = HALVES["fp16" if "fp16" in name else "bf16"]

    assert asdict(get_mixed_precision_config(name)) == DEFAULTS | half | ADDED[name]


def test_registry_is_complete_and_spelled_twice() -> None:
    """Each name with underscores and with hyphens gives the same function."""
    assert set(recipes()) == set(ADDED)
    assert len(MIXED_PRECISION_RECIPES) == 28
    for name in recipes():
        assert MIXED_PRECISION_RECIPES[name.replace("_", "-")] is getattr(ours, name)
        assert getattr(ours, name).__name__ == name


def test_a_recipe_is_made_anew_with_every_call() -> None:
    """What one caller changes, the next does not see."""
    get_mixed_precision_config("bf16-mixed").fp8_margin = 3

    assert get_mixed_precision_config("bf16-mixed").fp8_margin == 0


def test_a_config_is_handed_through() -> None:
    """As Megatron-Bridge does."""
    config = MixedPrecisionConfig(bf16=True)

    assert get_mixed_precision_config(config) is config


def test_a_recipe_of_your_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under both spellings."""
    monkeypatch.setattr(ours, "MIXED_PRECISION_RECIPES", MIXED_PRECISION_RECIPES.copy())

    @register
    def my_mixed() -> MixedPrecisionConfig:
        return MixedPrecisionConfig(bf16=True, fp8="hybrid")

    assert get_mixed_precision_config("my-mixed") == my_mixed()
    assert get_mixed_precision_config("my_mixed") == my_mixed()


@pytest.mark.parametrize("pair", ["fp8_param", "fp4_param"])
def test_the_fields_of_a_pair_follow_each_other(pair: str) -> None:
    """In both directions, and None is settled by finalize."""
    config = make(**{f"{pair}_gather": True})
    assert getattr(config, pair) is True
    setattr(config, pair, False)
    assert getattr(config, f"{pair}_gather") is False
    setattr(config, f"{pair}_gather", True)
    assert getattr(config, pair) is True
    config.__dict__[pair] = None
    config.finalize()
    assert getattr(config, pair) is True


def test_megatrons_loss_scaling_is_the_loss_scalers() -> None:
    """The four numbers that snippets/loss_scaling.py has."""
    scaler = DynamicLossScaler.megatron()
    config = get_mixed_precision_config("fp16_mixed")

    theirs = [scaler.get_scale(), scaler.min_scale]
    assert theirs == [config.initial_loss_scale, config.min_loss_scale]
    assert scaler.growth_interval == config.loss_scale_window
    assert scaler.hysteresis == config.hysteresis


def test_nemo2_names_lead_to_recipes() -> None:
    """Twelve names, of which two changed; both old ones are functions here."""
    changed = {old: new for old, new in NEMO2_NAMES.items() if old != new}

    assert len(NEMO2_NAMES) == 12
    assert set(NEMO2_NAMES.values()) <= set(recipes())
    assert changed == {
        f"{half}_with_fp8_mixed": f"{half}_with_fp8_delayed_scaling_mixed"
        for half in HALVES
    }
    for old, new in changed.items():
        assert getattr(ours, old) is getattr(ours, new)


def test_every_field_is_explained_on_the_page() -> None:
    """In the table, where rows start with the names of fields."""
    rows = [row.split("|")[1] for row in PAGE.read_text().splitlines() if "|" in row]
    named = {name for row in rows for name in row.replace("`", "").split(", ")}

    assert set(DEFAULTS) <= {name.strip() for name in named}


# What reads a field


@pytest.mark.parametrize("name", ADDED)
def test_a_recipe_sets_nothing_in_vain(name: str) -> None:
    """Each field that a recipe changes is read."""
    assert get_mixed_precision_config(name).unread() == []


@pytest.mark.parametrize(("field", "value", "settings"), READ)
def test_a_field_is_unread_unless_its_setting_is_there(
    field: str, value: object, settings: dict[str, Any]
) -> None:
    """Named without the setting, not named with it."""
    assert make(**{field: value}).unread() == [field]
    assert make(**settings, **{field: value}).unread() == []


@pytest.mark.parametrize("field", ["fp32", "autocast_enabled", "fp8_wgrad"])
@pytest.mark.parametrize("name", ADDED)
def test_some_fields_are_never_read(name: str, field: str) -> None:
    """Whatever the recipe."""
    config = get_mixed_precision_config(name)
    setattr(config, field, not getattr(config, field))

    assert config.unread() == [field]


def test_a_constant_loss_scale_silences_the_dynamic_one() -> None:
    """FP16 alone reads the window."""
    config = MixedPrecisionConfig(fp16=True, loss_scale_window=9, loss_scale=8.0)

    assert config.unread() == ["loss_scale_window"]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_only_delayed_scaling_has_a_history(recipe: str) -> None:
    """The amax fields do nothing for the others."""
    config = MixedPrecisionConfig(
        fp8="e4m3", fp8_recipe=recipe, fp8_amax_history_len=1024, fp8_margin=1
    )

    assert config.unread() == ["fp8_margin", "fp8_amax_history_len"]


def test_blockwise_scaling_leaves_attention_alone() -> None:
    """Megatron hands fp8_dot_product_attention to the other recipes only."""
    config = MixedPrecisionConfig(
        fp8="e4m3", fp8_recipe="blockwise", fp8_dot_product_attention=True
    )

    assert config.unread() == ["fp8_dot_product_attention"]
    assert config.te_recipe() == ("Float8BlockScaling", {"fp8_format": "E4M3"})


# setup


@dataclass
class Model:
    """Some fields of a model's config, and one of its own."""

    num_layers: int = 4
    pipeline_model_parallel_size: int = 2
    bf16: bool = False
    fp8: str | None = "hybrid"
    hidden_size: int = 64


@dataclass
class Buffers:
    """A field of DDP's config."""

    grad_reduce_in_fp32: bool = False


def test_setup_copies_what_has_the_same_name_and_tells() -> None:
    """Defaults too; other fields stay."""
    model, ddp = Model(), Buffers()

    told = MixedPrecisionConfig(bf16=True).setup(model, None, ddp)

    assert (model, ddp) == (Model(bf16=True, fp8=None), Buffers(True))
    assert told == {
        "Model.bf16": (False, True),
        "Model.fp8": ("hybrid", None),
        "Buffers.grad_reduce_in_fp32": (False, True),
    }


@pytest.mark.parametrize(
    "settings", [{"fp8": "e5m2"}, {"fp8": "hybrid"} | layers(3, 0), {"bf16": 1}]
)
def test_setup_changes_nothing_if_it_raises(settings: dict[str, Any]) -> None:
    """The model's layers a stage (2) are checked before anything is copied."""
    model, ddp = Model(), Buffers()

    with pytest.raises((TypeError, ValueError), match=r"must be|only supported"):
        make(**settings).setup(model, None, ddp)

    assert (model, ddp) == (Model(), Buffers())


# Oracles


def test_transformer_engine_takes_what_te_recipe_hands_over() -> None:
    """Its real recipe classes keep each argument; fp8_wgrad's has gone.

    The base wheel has their source; the variable lets it be imported without the
    compiled part.
    """
    code = """
import json, sys, warnings
warnings.simplefilter("ignore")
from transformer_engine.common import recipe
for name, arguments in json.load(sys.stdin):
    given = dict(arguments)
    if "fp8_format" in given:
        given["fp8_format"] = recipe.Format[given["fp8_format"]]
    made = getattr(recipe, name)(**given)
    assert all(getattr(made, key) == given[key] for key in given), (name, given)
    print(name)
made = recipe.DelayedScaling(override_linear_precision=(False, False, True))
print(hasattr(made, "override_linear_precision"))
"""
    made = [get_mixed_precision_config(name).te_recipe() for name in recipes()]
    handed = [recipe for recipe in made if recipe is not None]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(handed),
        env=os.environ | {"NVTE_PROJECT_BUILDING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert len(handed) == 12
    assert done.stdout.split() == [*(name for name, _ in handed), "False"]


def test_megatron_bridge_agrees_in_every_field_of_every_recipe() -> None:
    """Names, order, defaults, values, unknown names: its own module decides."""
    theirs = megatron("megatron.bridge.training.mixed_precision")
    names = [field.name for field in fields(theirs.MixedPrecisionConfig)]

    assert names == list(DEFAULTS)
    assert set(theirs.MIXED_PRECISION_RECIPES) == set(MIXED_PRECISION_RECIPES)
    for name in MIXED_PRECISION_RECIPES:
        config = theirs.get_mixed_precision_config(name)
        mine = get_mixed_precision_config(name)
        assert asdict(mine) == {key: getattr(config, key) for key in names}
    with pytest.raises(ValueError, match="Unknown") as error:
        theirs.get_mixed_precision_config("bf16-with-fp8-mixed")
    with pytest.raises(ValueError, match="Unknown") as mine_too:
        get_mixed_precision_config("bf16-with-fp8-mixed")
    assert str(mine_too.value).startswith(str(error.value))


def test_megatron_bridge_drops_what_this_class_refuses() -> None:
    """A field that does not exist, and fp8_param in the constructor."""
    theirs = megatron("megatron.bridge.training.mixed_precision")
    config = theirs.bf16_mixed()
    config.fp8_params = True

    assert config.fp8_param is False
    assert theirs.MixedPrecisionConfig(fp8="hybrid", fp8_param=True).fp8_param is False


def test_megatron_core_refuses_the_same() -> None:
    """The model's config or DDP's raises it; five are raised elsewhere."""
    core = megatron("megatron.core.transformer.transformer_config")
    ddp = megatron("megatron.core.distributed").DistributedDataParallelConfig
    model: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4}
    model |= {"num_layers": 32, "pipeline_model_parallel_size": 4}
    model |= {"pipeline_dtype": torch.bfloat16}
    silent = []
    for settings, message in REFUSED:
        config = asdict(make(**settings))
        changed = {("fp8_recipe", config["fp8_recipe"])}  # Core's default is another
        changed |= config.items() - DEFAULTS.items()
        said = []
        for kind, given in (core.TransformerConfig, model), (ddp, {}):
            names = inspect.signature(kind).parameters
            try:
                kind(**given, **{k: v for k, v in changed if k in names})
            except (AssertionError, ValueError) as error:
                said.append(str(error))
        if not any(each.startswith(message) for each in said):
            silent.append(message)

    # When a recipe is made of it, or by Megatron-Bridge.
    elsewhere = ("Model config", "E4M3", "Float8", "NVFP4", "When")
    assert len(silent) == len(elsewhere)
    for message, start in zip(silent, elsewhere, strict=True):
        assert message.startswith(start)


# Errors


@pytest.mark.parametrize(("settings", "message"), REFUSED + OURS)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    """With Megatron's words where it has some."""
    config = make(**settings)

    with pytest.raises(ValueError, match="^" + re.escape(message)):
        config.validate(num_layers=32, pipeline_size=4)


@pytest.mark.parametrize("start", [0, 8])
def test_as_many_outer_layers_as_a_stage_has_are_allowed(start: int) -> None:
    """The bound is inclusive, and holds for FP8 alone."""
    MixedPrecisionConfig(fp8="hybrid", **layers(start, 8)).validate(32, 4)
    MixedPrecisionConfig(fp4="e2m1", **layers(0, 14)).validate(32, 4)
    MixedPrecisionConfig(fp8="hybrid", **layers(99, 99)).validate()


@pytest.mark.parametrize("name", ADDED)
def test_recipes_are_valid(name: str) -> None:
    """As they are, for a model of ordinary depth."""
    config = get_mixed_precision_config(name)
    config.finalize()
    config.validate(num_layers=32, pipeline_size=4)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_value_of_the_wrong_type_is_refused(name: str) -> None:
    """The message has the field, what it takes and what it got."""
    wrongs: list[object] = [[], "yes", 2]
    for wrong in wrongs:
        config = MixedPrecisionConfig()
        config.__dict__[name] = wrong
        kind = str(MixedPrecisionConfig.__dataclass_fields__[name].type)
        if (wrong == 2 and ("int" in kind or "float" in kind)) or (
            wrong == "yes" and "str" in kind
        ):
            continue
        with pytest.raises(TypeError, match=f"^{name} must be .*, got ") as error:
            config.validate()
        assert str(error.value).endswith(repr(wrong))


def test_a_flag_is_not_a_number() -> None:
    """True is an int to Python, not to a margin."""
    with pytest.raises(TypeError, match="fp8_margin must be int, got True"):
        MixedPrecisionConfig(fp8_margin=True).validate()


def test_a_field_that_does_not_exist_cannot_be_set() -> None:
    """The error has the nearest ones; the constructor refuses it as Python does."""
    config = MixedPrecisionConfig()
    with pytest.raises(AttributeError, match="'fp8_params'; nearest: fp8_param, "):
        config.fp8_params = True
    with pytest.raises(TypeError, match="unexpected keyword argument 'fp8_params'"):
        MixedPrecisionConfig(fp8_params=True)  # type: ignore[call-arg]
    assert asdict(config) == DEFAULTS


@pytest.mark.parametrize("pair", ["fp8_param", "fp4_param"])
def test_the_constructor_refuses_half_a_pair(pair: str) -> None:
    """Megatron-Bridge's drops it."""
    message = f"{pair}=True, {pair}_gather=False: set {pair}_gather alone"
    with pytest.raises(ValueError, match=message):
        make(**{pair: True})


def test_finalize_refuses_fp4_with_fp8_and_with_an_old_transformer_engine() -> None:
    """2.7.0.dev0 is the first that will do."""
    config = get_mixed_precision_config("bf16_with_nvfp4_mixed")
    for good in ("2.7.0.dev0", "2.7", "2.20.2", "10.0"):
        config.finalize(te_version=good)
    for old in ("2.6.0", "1.14.0", "0.0.0"):
        with pytest.raises(ValueError, match=r"fp4 requires .* >= 2.7.0.dev0 .* Got "):
            config.finalize(te_version=old)
    with pytest.raises(ValueError, match="cannot be used simultaneously"):
        MixedPrecisionConfig(fp8="hybrid", fp4="e2m1").finalize()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("bf16_with_fp8_mixed", "bf16_with_fp8_delayed_scaling_mixed"),
        ("fp16-with-fp8-mixed", "fp16_with_fp8_delayed_scaling_mixed"),
        ("16-mixed", "fp16_mixed"),
        ("fp16", "fp16_mixed"),
        ("bf16", "bf16_mixed"),
        ("bf16_with_mxfp8", "bf16_with_mxfp8_mixed"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    """After Megatron-Bridge's message, which lists all."""
    key = name.replace("-", "_")
    with pytest.raises(ValueError, match="Unknown mixed-precision recipe") as error:
        get_mixed_precision_config(name)

    assert str(error.value) == (
        f"Unknown mixed-precision recipe '{key}'. Available recipes: "
        f"{', '.join(sorted(MIXED_PRECISION_RECIPES))}. Nearest: {nearest}"
    )
