"""Tests of snippets/fp8/recipe.py against Transformer Engine's own recipes.

Theirs are pydantic dataclasses and run on any machine. Where ours differ on purpose,
the test asserts both sides.
"""

import copy
import dataclasses
import enum
import importlib.util
import itertools
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from snippets import fp8
from tests import te_source

THEIRS: Any = te_source.load("common.recipe")
OURS: Any = fp8
NAMES = [
    "DelayedScaling",
    "Float8CurrentScaling",
    "Float8BlockScaling",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
    "CustomRecipe",
]
each_recipe = pytest.mark.parametrize("name", NAMES)


def factory(role: object) -> None:
    """Stands for a CustomRecipe's own."""


def plain(value: object) -> object:
    """Turn what belongs to one of the two modules into something comparable."""
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, dataclasses.asdict(value))
    return value


def contents(recipe: object) -> dict[str, object]:
    """All that a recipe says: its fields and what is derived from them."""
    names = {name for name in dir(recipe) if name.startswith(("fp4_", "fp8_"))}
    names |= {field.name for field in dataclasses.fields(recipe)}  # type: ignore[arg-type]
    return {name: plain(getattr(recipe, name)) for name in sorted(names)}


def make(module: Any, name: str, **options: Any) -> Any:  # noqa: ANN401 - both modules
    """Return a recipe of ``module``; a CustomRecipe gets the function it needs."""
    if name == "CustomRecipe":
        options.setdefault("qfactory", factory)
    translated = {
        key: getattr(module.Format, value.name)
        if isinstance(value, enum.Enum)
        else value
        for key, value in options.items()
    }
    for key, value in translated.items():
        if isinstance(value, fp8.MMParams):
            translated[key] = module.MMParams(**dataclasses.asdict(value))
    return getattr(module, name)(**translated)


# ----------------------------------------------------------------- fields and defaults


@each_recipe
def test_fields_their_order_and_their_defaults_are_transformer_engine_s(
    name: str,
) -> None:
    """So positional arguments mean the same, too."""
    ours = [f.name for f in dataclasses.fields(getattr(OURS, name)) if f.init]
    theirs = [f.name for f in dataclasses.fields(getattr(THEIRS, name)) if f.init]
    assert ours == theirs
    assert contents(make(OURS, name)) == contents(make(THEIRS, name))


def test_every_recipe_of_transformer_engine_is_here() -> None:
    """And the classes that they are made of."""
    public = {
        name
        for name, value in vars(THEIRS).items()
        if isinstance(value, type)
        and value.__module__ == THEIRS.__name__
        and not name.startswith("_")
    }
    assert public == set(fp8.recipe.__all__)
    for name in ("MMParams", "QParams"):
        assert plain(getattr(OURS, name)()) == plain(getattr(THEIRS, name)())


def test_formats_have_the_same_members_and_maxima() -> None:
    """``max_fwd`` and ``max_bwd`` of each."""
    assert {f.name: tuple(f.value) for f in fp8.Format} == {
        f.name: tuple(f.value) for f in THEIRS.Format
    }
    assert fp8.Format.HYBRID.value.max_bwd == torch.finfo(torch.float8_e5m2).max


@each_recipe
def test_questions_about_the_kind_have_the_same_answers(name: str) -> None:
    """Asked of the class and of the object."""
    questions = (
        "custom",
        "delayed",
        "float8_block_scaling",
        "float8_current_scaling",
        "float8_per_tensor_scaling",
        "mxfp8",
        "nvfp4",
    )
    ours, theirs = make(OURS, name), make(THEIRS, name)
    for question in questions:
        answer = getattr(theirs, question)()
        assert getattr(ours, question)() is answer
        assert getattr(type(ours), question)() is answer


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (
            "NVFP4BlockScaling",
            ("disable_rht", "disable_stochastic_rounding", "disable_2d_quantization"),
        ),
        ("MXFP8BlockScaling", ("enable_2d_quantization", "fp8_dpa", "fp8_mha")),
    ],
)
def test_what_is_derived_from_flags_is_the_same(
    name: str, flags: tuple[str, ...]
) -> None:
    """All combinations."""
    for values in itertools.product((False, True), repeat=len(flags)):
        options = dict(zip(flags, values, strict=True))
        assert contents(make(OURS, name, **options)) == contents(
            make(THEIRS, name, **options)
        )


# -------------------------------------------------------------------- values refused

_FORMAT = fp8.Format
_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("DelayedScaling", {"fp8_format": _FORMAT.E5M2}, "Pure E5M2 training is not"),
    ("Float8CurrentScaling", {"fp8_format": _FORMAT.E5M2}, "Pure E5M2 training is not"),
    ("Float8BlockScaling", {"fp8_format": _FORMAT.E5M2}, "Pure E5M2 training is not"),
    ("MXFP8BlockScaling", {"fp8_format": _FORMAT.E5M2}, "Pure E5M2 training is not"),
    ("DelayedScaling", {"fp8_format": "HYBRID"}, "fp8_format"),
    ("DelayedScaling", {"margin": 1.5}, "margin"),
    ("DelayedScaling", {"margin": None}, "margin"),
    ("DelayedScaling", {"amax_history_len": "many"}, "amax_history_len"),
    ("DelayedScaling", {"amax_compute_algo": "mean"}, "amax_compute_algo"),
    ("DelayedScaling", {"scaling_factor_compute_algo": "max"}, "scaling_factor"),
    ("DelayedScaling", {"reduce_amax": 2}, "reduce_amax"),
    (
        "DelayedScaling",
        {"backward_override": "high_precision"},
        "Delayed scaling only supports backward_override=None",
    ),
    ("Float8CurrentScaling", {"backward_override": "fp8"}, "high_precision"),
    ("Float8BlockScaling", {"backward_override": "fp8"}, "high_precision"),
    ("MXFP8BlockScaling", {"backward_override": "fp8"}, "high_precision"),
    ("NVFP4BlockScaling", {"backward_override": "fp8"}, "high_precision"),
    (
        "Float8BlockScaling",
        {"x_block_scaling_dim": 3},
        "Only 1D or 2D blocks supported",
    ),
    (
        "Float8BlockScaling",
        {"w_block_scaling_dim": 0},
        "Only 1D or 2D blocks supported",
    ),
    ("Float8BlockScaling", {"grad_block_scaling_dim": 4}, "Only 1D or 2D blocks"),
    ("Float8BlockScaling", {"x_block_scaling_dim": 2}, "2D by 2D block gemm not"),
    ("Float8BlockScaling", {"grad_block_scaling_dim": 2}, "2D by 2D block gemm not"),
    *(
        (
            "Float8BlockScaling",
            {f"fp8_gemm_{product}": fp8.MMParams(use_split_accumulator=False)},
            f"Split accumulator required for {product}",
        )
        for product in ("fprop", "dgrad", "wgrad")
    ),
    ("Float8BlockScaling", {"fp8_dpa": True}, "FP8 attention is not supported for"),
    ("Float8BlockScaling", {"fp8_mha": True}, "FP8 attention is not supported for"),
    ("NVFP4BlockScaling", {"fp4_format": _FORMAT.E4M3}, "Only E2M1 is supported"),
    ("NVFP4BlockScaling", {"fp8_format": _FORMAT.HYBRID}, "Only E4M3 is supported"),
    ("NVFP4BlockScaling", {"nvfp4_4over6": "some"}, "'none', 'weights'"),
    ("NVFP4BlockScaling", {"nvfp4_4over6_e4m3_use_256": "no"}, "'none', 'weights'"),
    ("NVFP4BlockScaling", {"nvfp4_4over6_err_mode": "RMS"}, "'MAE', 'MSE'"),
    ("CustomRecipe", {"quantization_alignment": 0}, "alignment must be positive"),
    ("CustomRecipe", {"quantization_alignment": -16}, "alignment must be positive"),
    ("CustomRecipe", {"qfactory": 3}, "qfactory"),
]


@pytest.mark.parametrize(("name", "options", "words"), _REFUSED)
def test_what_transformer_engine_refuses_is_refused(
    name: str, options: dict[str, Any], words: str
) -> None:
    """With the same words where they are its own; pydantic's error is a ValueError."""
    for module in (OURS, THEIRS):
        with pytest.raises(ValueError, match=words):
            make(module, name, **options)


def test_a_custom_recipe_needs_its_function() -> None:
    """The only field without a default: ours is Python's error, theirs pydantic's."""
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        OURS.CustomRecipe()
    with pytest.raises(ValueError, match="qfactory"):
        THEIRS.CustomRecipe()


def _amax(history: torch.Tensor) -> torch.Tensor:
    return history.amax(0)


def _scale(amax: torch.Tensor, *_: object) -> torch.Tensor:
    return 448 / amax


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DelayedScaling", {"margin": -3}),
        ("DelayedScaling", {"amax_history_len": 1, "fp8_format": _FORMAT.E4M3}),
        ("DelayedScaling", {"amax_compute_algo": "most_recent"}),
        (
            "DelayedScaling",
            {"amax_compute_algo": _amax, "scaling_factor_compute_algo": _scale},
        ),
        ("DelayedScaling", {"reduce_amax": False, "fp8_dpa": True, "fp8_mha": True}),
        ("DelayedScaling", {"fp8_format": _FORMAT.E2M1}),
        ("Float8CurrentScaling", {"backward_override": "dequantized"}),
        (
            "Float8CurrentScaling",
            {"fp8_gemm_fprop": fp8.MMParams(use_split_accumulator=True)},
        ),
        ("Float8BlockScaling", {"w_block_scaling_dim": 1, "x_block_scaling_dim": 2}),
        ("Float8BlockScaling", {"w_block_scaling_dim": 1}),
        ("MXFP8BlockScaling", {"fp8_format": _FORMAT.HYBRID, "margin": 1}),
        ("NVFP4BlockScaling", {"nvfp4_4over6": "weights", "disable_rht": True}),
        ("CustomRecipe", {"quantization_alignment": 1}),
    ],
)
def test_what_transformer_engine_takes_is_taken(
    name: str, options: dict[str, Any]
) -> None:
    """And means the same."""
    assert contents(make(OURS, name, **options)) == contents(
        make(THEIRS, name, **options)
    )


# ---------------------------------------------------------------- different on purpose


@each_recipe
def test_an_unknown_keyword_is_an_error_here_and_dropped_there(name: str) -> None:
    """A misspelt field would silently leave the default in force."""
    with pytest.raises(
        TypeError,
        match=rf"^{name} has no field 'fp8_formatt'. Did you mean 'fp8_format'\? Its "
        r"fields are: .*\(Transformer Engine ignores an unknown keyword silently.\)$",
    ):
        make(OURS, name, fp8_formatt=1)
    assert contents(make(THEIRS, name, fp8_formatt=1)) == contents(make(THEIRS, name))


@pytest.mark.parametrize("old", ["interval", "override_linear_precision"])
def test_fields_of_old_releases_are_unknown(old: str) -> None:
    """Old scripts pass them; no release since reads them."""
    with pytest.raises(TypeError, match=f"has no field '{old}'"):
        make(OURS, "DelayedScaling", **{old: 1})
    make(THEIRS, "DelayedScaling", **{old: 1})


def test_an_empty_history_is_an_error_here() -> None:
    """It has no row for the step's own amax."""
    for length in (0, -1):
        with pytest.raises(
            ValueError,
            match=rf"amax_history_len is {length}, it must be at least 1",
        ):
            make(OURS, "DelayedScaling", amax_history_len=length)
        make(THEIRS, "DelayedScaling", amax_history_len=length)


@pytest.mark.parametrize(
    ("options", "becomes"),
    [
        ({"margin": "2"}, 2),
        ({"margin": 2.0}, 2),
        ({"margin": True}, 1),
        ({"reduce_amax": "no"}, False),
        ({"reduce_amax": 0}, False),
    ],
)
def test_a_value_of_another_type_is_not_converted(
    options: dict[str, Any], becomes: object
) -> None:
    """Pydantic converts text and numbers that look like the type."""
    [(field, value)] = options.items()
    with pytest.raises(ValueError, match=f"DelayedScaling.{field} is {value!r}"):
        make(OURS, "DelayedScaling", **options)
    assert getattr(make(THEIRS, "DelayedScaling", **options), field) == becomes


@pytest.mark.parametrize(
    ("name", "field", "power_2"),
    [
        ("Float8CurrentScaling", "use_power_2_scales", False),
        ("Float8BlockScaling", "use_f32_scales", True),
    ],
)
def test_an_argument_that_changes_nothing_warns_here(
    name: str, field: str, power_2: bool
) -> None:
    """The scales follow the environment variable, in both; ours says so."""
    with pytest.warns(UserWarning, match=rf"{name}\({field}=True\) changes nothing"):
        ours = make(OURS, name, **{field: True})
    theirs = make(THEIRS, name, **{field: True})
    assert contents(ours) == contents(theirs)
    assert ours.fp8_quant_fwd_inp.power_2_scale is power_2
    # The way that works, in both.
    for module, recipe in ((OURS, ours), (THEIRS, theirs)):
        recipe.fp8_quant_fwd_inp = module.QParams(power_2_scale=not power_2)
    assert contents(ours) == contents(theirs)


# --------------------------------------------------------------- environment variables


def theirs_with_environment() -> ModuleType:
    """Their module, which reads the variables when it is imported."""
    path = te_source.folder() / "common" / "recipe" / "__init__.py"
    spec = importlib.util.spec_from_file_location("recipes_with_environment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module


@pytest.mark.parametrize(
    ("variable", "value", "names"),
    [
        (
            "NVTE_BACKWARD_OVERRIDE",
            "dequantized",
            [n for n in NAMES if "Delay" not in n],
        ),
        ("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES", "1", ["Float8CurrentScaling"]),
        ("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1", ["Float8BlockScaling"]),
        ("NVTE_NVFP4_DISABLE_RHT", "1", ["NVFP4BlockScaling"]),
        ("NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING", "1", ["NVFP4BlockScaling"]),
        ("NVTE_NVFP4_DISABLE_2D_QUANTIZATION", "1", ["NVFP4BlockScaling"]),
        ("NVTE_NVFP4_ROW_SCALED_ACTIVATION", "1", ["NVFP4BlockScaling"]),
        ("NVTE_NVFP4_4OVER6", "weights", ["NVFP4BlockScaling"]),
        ("NVTE_NVFP4_4OVER6_E4M3_USE_256", "none", ["NVFP4BlockScaling"]),
        ("NVTE_NVFP4_4OVER6_ERR_MODE", "mse", ["NVFP4BlockScaling"]),
    ],
)
def test_environment_variables_set_the_same_defaults(
    variable: str, value: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours are read when a recipe is made, theirs when the module is imported."""
    before = {name: contents(make(OURS, name)) for name in names}
    monkeypatch.setenv(variable, value)
    theirs = theirs_with_environment()
    for name in names:
        ours = contents(make(OURS, name))
        assert ours == contents(make(theirs, name))
        assert ours != before[name]


@each_recipe
def test_a_variable_with_a_wrong_value_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a recipe is made, in both."""
    monkeypatch.setenv("NVTE_BACKWARD_OVERRIDE", "fp8")
    for module in (OURS, theirs_with_environment()):
        with pytest.raises(ValueError, match="high_precision"):
            make(module, name)


# ----------------------------------------------------------------------- as dataclasses


@each_recipe
def test_recipes_are_compared_copied_replaced_and_pickled_as_dataclasses(
    name: str,
) -> None:
    """Equal by value, not hashable, assignable without a check: as theirs are."""
    for module in (OURS, THEIRS):
        recipe = make(module, name)
        assert recipe == make(module, name)
        assert copy.deepcopy(recipe) == recipe
        with pytest.raises(TypeError, match="unhashable"):
            hash(recipe)
        other = dataclasses.replace(recipe, fp8_dpa=False)
        assert other == recipe
        other.fp8_format = "anything"
        assert other != recipe
    recipe = make(OURS, name)
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_positional_arguments() -> None:
    """In the order of the fields."""
    recipe = fp8.DelayedScaling(1, fp8.Format.E4M3, 16, "most_recent")
    assert recipe == fp8.DelayedScaling(
        margin=1,
        fp8_format=fp8.Format.E4M3,
        amax_history_len=16,
        amax_compute_algo="most_recent",
    )


def test_a_subclass_is_a_recipe_of_its_parent_s_kind() -> None:
    """With fields of its own, too."""

    @dataclasses.dataclass
    class Mine(fp8.DelayedScaling):
        note: str = ""

    assert Mine(margin=1, note="a").delayed()
    with pytest.raises(ValueError, match="Pure E5M2"):
        Mine(fp8_format=fp8.Format.E5M2)
