"""Tests of snippets/fp8/quantizers.py: which quantizer each slot of a module gets."""

import ast
import inspect
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from snippets import fp8 as te
from snippets.fp8.quantized import Packed, matmul
from snippets.fp8.slots import DelayedScalingState, make_quantizers
from tests import te_source

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROLES = [te.QuantizerRole() for _ in range(6)]


def slots(recipe: te.Recipe, *, forward: bool) -> list[Any]:
    """Return the quantizers of a module with one product."""
    count = 3 if forward else 2
    state = (
        DelayedScalingState(recipe, forward, count, torch.device("cpu"))
        if isinstance(recipe, te.DelayedScaling)
        else None
    )
    return list(make_quantizers(recipe, forward, count, state, ROLES))


@pytest.mark.parametrize("fmt", [te.Format.HYBRID, te.Format.E4M3])
@pytest.mark.parametrize(
    "recipe",
    [
        te.DelayedScaling,
        te.Float8CurrentScaling,
        te.Float8BlockScaling,
        te.MXFP8BlockScaling,
    ],
)
def test_formats_of_both_passes(
    recipe: Callable[..., te.Recipe], fmt: te.Format
) -> None:
    """HYBRID is E4M3 forward and E5M2 backward; E4M3 is E4M3 in both."""
    made = recipe(fp8_format=fmt)

    assert [q.dtype for q in slots(made, forward=True)] == [te.DType.kFloat8E4M3] * 3
    hybrid = fmt is te.Format.HYBRID
    backward = te.DType.kFloat8E5M2 if hybrid else te.DType.kFloat8E4M3
    assert [q.dtype for q in slots(made, forward=False)] == [backward] * 2


def test_options_reach_the_slots_that_they_are_for() -> None:
    """Inputs, weights and gradients differ in blocks, transforms and rounding."""
    block = te.Float8BlockScaling()
    assert [q.block_scaling_dim for q in slots(block, forward=True)[:2]] == [1, 2]
    assert slots(block, forward=False)[0].block_scaling_dim == 1
    assert slots(block, forward=True)[0].force_pow_2_scales
    current = te.Float8CurrentScaling()
    current.fp8_quant_bwd_grad = te.QParams(power_2_scale=True, amax_epsilon=0.5)
    assert not slots(current, forward=True)[0].force_pow_2_scales
    assert slots(current, forward=False)[0].force_pow_2_scales
    assert slots(current, forward=False)[0].amax_epsilon == 0.5
    mx = te.MXFP8BlockScaling(enable_2d_quantization=True)
    assert [q.with_2d_quantization for q in slots(mx, forward=True)[:2]] == [0, 1]

    def nvfp4(**options: bool) -> list[tuple[bool, bool, bool]]:
        recipe = te.NVFP4BlockScaling(**options)  # type: ignore[arg-type]
        both = slots(recipe, forward=True)[:2] + slots(recipe, forward=False)[:1]
        return [
            (q.with_rht, q.with_2d_quantization, q.stochastic_rounding) for q in both
        ]

    assert nvfp4() == [
        (True, False, False),
        (False, True, False),
        (True, False, True),
    ]
    assert nvfp4(disable_rht=True, disable_2d_quantization=True) == [
        (False, False, False),
        (False, False, False),
        (False, False, True),
    ]
    assert nvfp4(disable_stochastic_rounding=True)[2] == (True, False, False)


@pytest.mark.parametrize(
    "recipe",
    [
        te.DelayedScaling(fp8_dpa=True),
        te.Float8CurrentScaling(fp8_mha=True),
        te.NVFP4BlockScaling(nvfp4_4over6="all"),
        te.NVFP4BlockScaling(row_scaled_activation=True),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_options_that_are_not_emulated(recipe: te.Recipe) -> None:
    """They raise at the first call, and leave the module as it was."""
    layer = te.Linear(16, 16)
    with (
        te.autocast(recipe=recipe),
        pytest.raises(NotImplementedError, match=r"not\s+emulated"),
    ):
        layer(torch.randn(16, 16))

    assert "recipe" not in layer.fp8_meta
    with te.autocast():
        layer(torch.randn(16, 16))


def test_amax_grows_within_a_region_and_ignores_nan() -> None:
    """The staging row keeps the largest of several casts."""
    state = DelayedScalingState(te.DelayedScaling(), True, 3, torch.device("cpu"))
    quantizer = state.quantizers(E4M3)[1]
    for value in (1.0, float("nan"), 3.0, 2.0):
        quantizer.to_quantized(torch.tensor([[value, -0.5]]))

    assert state.amax_history[0].tolist() == [0.0, 3.0, 0.0]
    assert (state.amax_history[1:] == 0).all()


def test_calibration_overwrites_what_was_recorded() -> None:
    """As Transformer Engine's: the last call counts, and a NaN is recorded."""
    state = DelayedScalingState(te.DelayedScaling(), True, 1, torch.device("cpu"))
    quantizer = state.quantizers(E4M3)[0]
    for value, expected in ((3.0, 3.0), (-2.0, 2.0)):
        quantizer.calibrate(torch.tensor([[value, 0.5]]))
        assert state.amax_history[0].tolist() == [expected]
    quantizer.calibrate(torch.empty(0, 2))
    assert state.amax_history[0].tolist() == [2.0]
    quantizer.calibrate(torch.tensor([[float("nan"), 1.0]]))
    assert state.amax_history[0].isnan().all()


def test_a_history_is_cut_or_padded_at_its_end() -> None:
    """Row 0 is the newest in both."""
    recipe = te.DelayedScaling(amax_history_len=4)
    state = DelayedScalingState(recipe, True, 1, torch.device("cpu"))
    state.amax_history.copy_(torch.arange(4.0)[:, None])
    state.resize(6)
    assert state.amax_history[:, 0].tolist() == [0, 1, 2, 3, 0, 0]
    state.resize(2)
    assert state.amax_history[:, 0].tolist() == [0, 1]


def custom(role: te.QuantizerRole | None) -> te.Quantizer:
    """Return FP8 for weights and inputs, and leave gradients as they are."""
    if role is None or role.tensor_type.startswith("grad"):
        return te.IdentityQuantizer()
    return te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3)


def test_a_custom_recipe_chooses_by_role() -> None:
    """Each slot gets what the function returns; high precision is one choice."""
    torch.manual_seed(0)
    layer, x, dy = (
        te.Linear(32, 48, name="fc1"),
        torch.randn(16, 32),
        torch.randn(16, 48),
    )
    x.requires_grad_()
    seen: list[te.QuantizerRole | None] = []

    def factory(role: te.QuantizerRole | None) -> te.Quantizer:
        seen.append(role)
        return custom(role)

    with te.autocast(recipe=te.CustomRecipe(qfactory=factory)):
        y = layer(x)
    torch.autograd.backward(y, dy)

    def rounded(t: Tensor) -> Tensor:
        scale = te.compute_current_scale(t.abs().amax(), 448.0)
        return te.dequantize(*te.quantize_tensor(t, E4M3, scale))

    w = rounded(layer.weight.detach())
    assert seen == [
        te.QuantizerRole("linear", "input", "fc1"),
        te.QuantizerRole("linear", "weight", "fc1"),
        None,  # the output: who takes it is not known
        te.QuantizerRole("linear", "grad_output", "fc1"),
        None,
    ]
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, rounded(x.detach()) @ w.t())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dy @ w)


def their_roles(path: str, cls: str) -> Callable[..., Any]:
    """Return a module's `get_quantizer_roles`, executed from its source."""
    tree = ast.parse((te_source.folder() / path).read_text())
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls]
    (function,) = (
        n
        for n in classes[0].body
        if isinstance(n, ast.FunctionDef) and n.name == "get_quantizer_roles"
    )
    source = "from __future__ import annotations\n" + ast.unparse(function)
    space: dict[str, Any] = {"QuantizerRole": te.QuantizerRole}
    exec(source, space)
    return cast("Callable[..., Any]", space["get_quantizer_roles"])


@pytest.mark.parametrize("boundaries", [False, True], ids=["unknown", "said"])
@pytest.mark.parametrize("name", [None, "layer"])
@pytest.mark.parametrize(
    ("path", "make", "gemms"),
    [
        ("module/linear", lambda n: te.Linear(16, 16, name=n), 1),
        ("module/layernorm_linear", lambda n: te.LayerNormLinear(16, 16, name=n), 1),
        ("module/layernorm_mlp", lambda n: te.LayerNormMLP(16, 16, name=n), 2),
        (
            "attention/dot_product_attention/dot_product_attention",
            lambda n: te.DotProductAttention(1, 16, name=n),
            3,
        ),
    ],
)
def test_roles_are_transformer_engines(
    path: str, make: Callable[..., Any], gemms: int, name: str | None, boundaries: bool
) -> None:
    """Slot by slot; None where a module cannot know who takes its result."""
    module = make(name)
    roles = [te.QuantizerRole("x", "y", "z"), te.QuantizerRole("u")]
    if boundaries:
        module.output_quantizer_role, module.grad_input_quantizer_role = roles
    wanted = roles if boundaries else [None, None]
    theirs = their_roles(f"pytorch/{path}.py", type(module).__name__)
    fake = SimpleNamespace(
        name=name,
        _output_quantizer_role=wanted[0],
        _grad_input_quantizer_role=wanted[1],
    )
    for fwd, each in ((True, 3), (False, 2)):
        found = module.get_quantizer_roles(fwd=fwd, num_quantizers=each * gemms)
        assert found == theirs(fake, fwd=fwd, num_quantizers=each * gemms)
    assert [module.output_quantizer_role, module.grad_input_quantizer_role] == wanted


def test_a_role_that_is_set_makes_quantizers_anew() -> None:
    """A second region with the same recipe asks again, once."""
    seen: list[te.QuantizerRole | None] = []

    def factory(role: te.QuantizerRole | None) -> te.Quantizer:
        seen.append(role)
        return te.IdentityQuantizer()

    layer, recipe = te.Linear(16, 16), te.CustomRecipe(qfactory=factory)
    role = te.QuantizerRole("dpa", "qkv")
    for known in (None, role, role):
        layer.output_quantizer_role = known
        with te.autocast(recipe=recipe):
            layer(torch.ones(16, 16))
    assert [r for i, r in enumerate(seen) if i % 5 == 2] == [None, role]


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (None, ValueError, "returned None for slot 0"),
        (3, TypeError, "returned int for slot 0"),
        (te.DelayedScalingRequest(), NotImplementedError, "not emulated"),
    ],
)
def test_what_a_custom_recipe_may_not_return(
    returned: object, error: type[Exception], match: str
) -> None:
    """One error, before the module has changed."""
    layer = te.Linear(16, 16)
    recipe = te.CustomRecipe(qfactory=lambda role: returned)
    with te.autocast(recipe=recipe), pytest.raises(error, match=match):
        layer(torch.randn(16, 16))
    assert "recipe" not in layer.fp8_meta


def test_element_types() -> None:
    """Named as in Transformer Engine; others than those of a format are refused."""
    theirs = te_source.load("pytorch.constants").DType
    assert [kind.name for kind in te.DType] == list(theirs.__members__)
    # transformer_engine.h, NVTEDType: their numbers, which checkpoints hold
    assert [int(kind) for kind in te.DType] == [0, 2, 4, 5, 6, 7, 8, 10]
    assert te.DType.cast(7) is te.DType.kFloat8E4M3
    with pytest.raises(ValueError, match=r"must be DType\.kFloat8E4M3 or"):
        te.MXFP8Quantizer(te.DType.kFloat4E2M1)
    with pytest.raises(ValueError, match="must be kFloat4E2M1"):
        te.NVFP4Quantizer(te.DType.kFloat8E4M3)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("float8_blockwise_tensor", "Float8BlockQuantizer"),
        ("float8_tensor", "Float8CurrentScalingQuantizer"),
        ("float8_tensor", "Float8Quantizer"),
        ("identity_tensor", "IdentityQuantizer"),
        ("mxfp8_tensor", "MXFP8Quantizer"),
        ("nvfp4_tensor", "NVFP4Quantizer"),
    ],
)
def test_quantizers_take_the_arguments_of_transformer_engine_s(
    module: str, name: str
) -> None:
    """Names, order and defaults (the wheel's source)."""
    path = te_source.folder() / "pytorch" / "tensor" / f"{module}.py"
    tree = ast.parse(path.read_text())
    (their_class,) = (
        n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name
    )
    (init,) = (
        n
        for n in their_class.body
        if isinstance(n, ast.FunctionDef) and n.name == "__init__"
    )
    positional = [a.arg for a in init.args.args[1:]]
    names = positional + [a.arg for a in init.args.kwonlyargs]
    defaults = dict(
        zip(reversed(positional), reversed(init.args.defaults), strict=False)
    ) | dict(
        zip((a.arg for a in init.args.kwonlyargs), init.args.kw_defaults, strict=True)
    )
    ours = inspect.signature(getattr(te, name)).parameters

    assert list(ours) == names
    for argument, default in defaults.items():
        if isinstance(default, ast.Constant):
            assert ours[argument].default == default.value, argument
        elif default is not None:
            assert ast.unparse(default) == f"DType.{ours[argument].default.name}"


@pytest.mark.parametrize(
    "option",
    [
        {"row_scaled_nvfp4": True},
        {"nvfp4_use_4over6": True},
        {"with_amax_reduction": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_a_quantizer_that_are_not_emulated(option: dict[str, bool]) -> None:
    """Refused by name, rather than left out of the numbers."""
    with pytest.raises(NotImplementedError, match=f"{next(iter(option))}=.* emulated"):
        te.NVFP4Quantizer(**option)  # type: ignore[arg-type]


def test_options_that_transformer_engine_ignores() -> None:
    """With its warning."""
    with pytest.warns(DeprecationWarning, match="ignores `use_existing_amax`"):
        te.Float8CurrentScalingQuantizer(E4M3, "cpu", use_existing_amax=True)


def test_an_identity_quantizer_may_cast() -> None:
    """To its dtype, or to none."""
    x = torch.randn(16, 16)
    cast = te.IdentityQuantizer(dtype=torch.bfloat16).to_quantized(x)

    assert cast.rowwise is not None
    assert cast.rowwise.codes.equal(x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (32, 64), (2, 32, 64)])
def test_a_call_returns_a_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of the shape and dtype of what it was called with, whose gradient it has."""
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    quantizer = te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, "cpu")
    made = quantizer(x)
    values = quantizer.to_quantized(x.detach().reshape(-1, shape[-1])).dequantize(dtype)

    assert isinstance(made, te.Float8Tensor)
    assert (made.shape, made.dtype) == (x.shape, dtype)
    assert made.dequantize().equal(values.reshape(shape))
    assert (made.detach() + 1).equal(values.reshape(shape) + 1)
    (grad,) = torch.autograd.grad((made * 2).sum(), x)
    assert grad.equal(torch.full_like(x, 2))
    file = io.BytesIO()
    torch.save(made.detach(), file)
    file.seek(0)
    assert torch.load(file).dequantize().equal(made.dequantize())
    with torch.no_grad():
        assert made.detach().clone().zero_().dequantize().equal(torch.zeros_like(x))


def test_a_direction_that_was_not_made_is_an_error() -> None:
    """Not the other one, silently."""
    x = torch.randn(32, 32)
    rows = te.MXFP8Quantizer(E4M3).to_quantized(x, columnwise=False)
    with pytest.raises(RuntimeError, match=r"columnwise form .* \(32, 32\)"):
        matmul(rows, True, rows, False, use_split_accumulator=True, out_dtype=x.dtype)


def test_plain_values_are_not_rounded() -> None:
    """A product of unquantized operands is that of their float32 values."""
    x = torch.randn(16, 16)
    plain = te.IdentityQuantizer().to_quantized(x)
    found = matmul(
        plain, False, plain, False, use_split_accumulator=True, out_dtype=x.dtype
    )

    torch.testing.assert_close(found, x @ x.t())
    assert Packed(x).full().equal(x)


@pytest.mark.parametrize("signs", [True, False])
def test_signs_of_the_hadamard_transform_are_an_option(signs: bool) -> None:
    """Of the columnwise direction, which alone is transformed."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantizer = te.NVFP4Quantizer(with_rht=True, with_random_sign_mask=signs)
    made = quantizer.to_quantized(x)
    assert made.rowwise is not None
    assert made.columnwise is not None
    for packed, wanted in (
        (made.rowwise, te.quantize_nvfp4(x)),
        (
            made.columnwise,
            te.quantize_nvfp4(x.t(), hadamard=True, random_signs=signs),
        ),
    ):
        assert torch.equal(packed.codes, wanted[0])
        assert packed.amax is not None
        assert torch.equal(packed.amax, wanted[2])


def test_quantizers_have_transformer_engines_methods() -> None:
    """A call is `quantize`, `out` is written in place, and a copy shares the state."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    quantizer: Any = te.Float8Quantizer(torch.tensor([2.0]), torch.zeros(1), E4M3)
    first, second = quantizer.multi_quantize([x, 2 * x])
    assert torch.equal(first.dequantize(), quantizer(x).dequantize())
    assert quantizer.quantize(2 * x, out=first) is first
    assert torch.equal(first.dequantize(), second.dequantize())
    assert quantizer.update_quantized(x, first) is first
    assert torch.equal(first.dequantize(), quantizer(x).dequantize())

    quantizer.set_usage(columnwise=False)
    copied = quantizer.copy()
    assert copied.get_usages() == {"rowwise": True, "columnwise": False}
    copied.set_usage(columnwise=True)
    assert quantizer.get_usages() == {"rowwise": True, "columnwise": False}
    assert copied.scale is quantizer.scale


def test_what_a_quantizer_has_not_is_refused() -> None:
    """By name, as not emulated, or as unknown; a wrong `out` is left as it was."""
    quantizer: Any = te.MXFP8Quantizer(E4M3)
    out = quantizer(torch.ones(32, 64))
    with pytest.raises(AttributeError, match=r"MXFP8Quantizer\.quantize_impl is not"):
        quantizer.quantize_impl((32, 64))
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        quantizer.quantise(torch.ones(32, 64))
    with pytest.raises(ValueError, match=r"shape \(64, 64\) to a quantized tensor of"):
        quantizer.quantize(torch.zeros(64, 64), out=out)
    with pytest.raises(TypeError, match="must be a QuantizedTensor, it is a Tensor"):
        quantizer.quantize(torch.ones(32, 64), out=torch.ones(32, 64))
    assert torch.equal(out.dequantize(), torch.ones(32, 64))

    class Mine(te.Quantizer):
        """As Transformer Engine has it written."""

        def quantize_impl(self, tensor: Tensor) -> Tensor:
            return tensor

    with pytest.raises(NotImplementedError, match="Mine: quantizers with a quantize_i"):
        Mine()(torch.ones(32, 64))
