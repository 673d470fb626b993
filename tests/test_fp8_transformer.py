"""Tests of the norms, attention and transformer layer in snippets/fp8."""

import ast
import functools
import inspect
import itertools
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from snippets import fp8 as te
from snippets.fp8.activations import ACTIVATIONS, FUSED_BACKWARD, activate
from snippets.fp8.base import TransformerEngineBaseModule
from snippets.fp8.linear_function import linear
from snippets.fp8.slots import DelayedScalingState
from tests import te_source

RECIPES: dict[str, Callable[[], te.Recipe]] = {
    "delayed": te.DelayedScaling,
    "current": te.Float8CurrentScaling,
    "block": te.Float8BlockScaling,
    "mxfp8": te.MXFP8BlockScaling,
    "nvfp4": lambda: te.NVFP4BlockScaling(disable_stochastic_rounding=True),
}
BF16, FP32 = torch.bfloat16, torch.float32
# A Hadamard transform takes bfloat16 only.
CASES = [
    (name, t) for name in RECIPES for t in (FP32, BF16) if (name, t) != ("nvfp4", FP32)
]
HIDDEN, FFN, HEADS, BATCH, LENGTH = 64, 96, 4, 4, 32


def region(recipe: te.Recipe | None) -> te.autocast:
    """Return the region of ``recipe``, or one that quantizes nothing."""
    return te.autocast(enabled=recipe is not None, recipe=recipe)


def randomized(module: nn.Module) -> Any:  # noqa: ANN401 - the same module
    """Return ``module`` with parameters of norms and biases that matter."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            spread = torch.randn_like(parameter) * 0.3
            one = name.endswith("weight")
            parameter.data.copy_(spread + one)
        else:
            nn.init.normal_(parameter.data, std=0.1)
    return module


def batch(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return an input whose columns have different sizes."""
    torch.manual_seed(2)
    x = torch.randn(*(shape or (LENGTH, BATCH, HIDDEN)))
    return (x * torch.logspace(-1, 1, x.shape[-1])).to(dtype).requires_grad_()


def gradients(out: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    """Return the gradients of a fixed function of ``out``."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        parameter.grad = None
    x.grad = None
    grad = (torch.randn(out.shape) * 1e-2).to(out.dtype)
    torch.autograd.backward(out, grad)
    found = [x.grad, *(p.grad for p in module.parameters())]
    assert all(g is not None and g.abs().sum() > 0 for g in found)
    return [g.clone() for g in found if g is not None]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Assert that all bits are equal."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- signatures


@functools.cache
def tree(path: str) -> ast.Module:
    """Return the parsed source of a module of Transformer Engine."""
    return ast.parse((te_source.folder() / "pytorch" / path).read_text())


def definition(path: str, *names: str) -> ast.FunctionDef:
    """Return the last function of that name, perhaps in a class."""
    body: list[ast.stmt] = tree(path).body
    for name in names:
        found = [n for n in body if getattr(n, "name", None) == name][-1]
        assert isinstance(found, (ast.ClassDef, ast.FunctionDef))
        body = found.body
    assert isinstance(found, ast.FunctionDef)
    return found


def arguments(found: ast.FunctionDef) -> list[tuple[str, str]]:
    """Return the names and defaults of a function, in order."""
    of = found.args
    assert not of.posonlyargs
    assert of.vararg is None
    none = [None] * (len(of.args) - len(of.defaults))
    pairs = list(zip(of.args, [*none, *of.defaults], strict=True))
    pairs += zip(of.kwonlyargs, of.kw_defaults, strict=True)
    plain = [(a.arg, ast.unparse(d) if d else "") for a, d in pairs]
    return plain + ([(f"**{of.kwarg.arg}", "")] if of.kwarg else [])


CLASSES = {
    te.Linear: "module/linear.py",
    te.LayerNorm: "module/layernorm.py",
    te.RMSNorm: "module/rmsnorm.py",
    te.LayerNormLinear: "module/layernorm_linear.py",
    te.LayerNormMLP: "module/layernorm_mlp.py",
    te.DotProductAttention: (
        "attention/dot_product_attention/dot_product_attention.py"
    ),
    te.MultiheadAttention: "attention/multi_head_attention.py",
    te.TransformerLayer: "transformer.py",
    te.RotaryPositionEmbedding: "attention/rope.py",
}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (kind, method)
        for kind, method in itertools.product(CLASSES, ("__init__", "forward"))
        # Transformer Engine's norms inherit it from the class of fusible parts.
        if not (kind in {te.LayerNorm, te.RMSNorm} and method == "forward")
    ],
)
def test_signatures_are_transformer_engine_s(kind: type[Any], method: str) -> None:
    """The same names in the same order with the same defaults."""
    theirs = arguments(definition(CLASSES[kind], kind.__name__, method))
    ours = []
    for parameter in inspect.signature(getattr(kind, method)).parameters.values():
        kind_of = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        empty = parameter.default is parameter.empty
        ours.append((
            kind_of + parameter.name,
            "" if empty else repr(parameter.default),
        ))
    assert ours == theirs


def test_there_are_the_activation_functions_of_transformer_engine() -> None:
    """Each name of its table, and the fused backward of each that has one."""
    found = definition("module/layernorm_mlp.py", "_get_act_func_supported_list")
    tables = [n for n in ast.walk(found) if isinstance(n, ast.Dict)]
    keys = [[ast.literal_eval(k) for k in t.keys if k] for t in tables]
    assert all(names == list(ACTIVATIONS) for names in keys)
    fused = {
        ast.literal_eval(key)
        for key, value in zip(tables[1].keys, tables[1].values, strict=True)
        if key and isinstance(value, ast.Tuple) and ast.unparse(value.elts[2]) != "None"
    }
    assert fused == FUSED_BACKWARD


# --------------------------------------------------------------------------- norms


@pytest.mark.parametrize("kind", [te.LayerNorm, te.RMSNorm])
@pytest.mark.parametrize("centered", [False, True])
def test_norms_are_their_formula(kind: type[Any], centered: bool) -> None:
    """In float64 they are the formula up to rounding; in bfloat16 rounded once."""
    layer = kind(HIDDEN, eps=1e-3, zero_centered_gamma=centered)
    assert torch.equal(layer.weight, torch.full((HIDDEN,), 0.0 if centered else 1.0))
    randomized(layer)
    x = batch(FP32).detach()
    d, weight = x.double(), layer.weight.detach().double() + centered
    if kind is te.LayerNorm:
        d = d - d.mean(-1, keepdim=True)
    wanted = d / (d.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    if kind is te.LayerNorm:
        wanted += layer.bias.detach().double()
    # Sums of 64 terms and five operations: well below 2**-16 of what is added up.
    assert ((layer(x) - wanted).abs() <= 2**-16 * (1 + wanted.abs())).all()
    layer.to(BF16)
    exact = layer.float()(x.to(BF16).float()).to(BF16)
    assert torch.equal(layer.to(BF16)(x.to(BF16)), exact)
    with torch.autocast("cpu", BF16):
        assert layer.float()(x).dtype == BF16


@pytest.mark.parametrize("kind", [te.LayerNorm, te.RMSNorm])
def test_norms_take_any_strides(kind: type[Any]) -> None:
    """As contiguous numbers: no bit of a result or a gradient depends on strides."""
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).t()
    found = []
    for values in (x, x.contiguous()):
        norm, leaf = kind(128), values.detach().requires_grad_()
        y = norm(leaf)
        torch.autograd.backward(y, torch.ones_like(y))
        found.append([y, leaf.grad, *(p.grad for p in norm.parameters())])
    for strided, contiguous in zip(*found, strict=True):
        assert torch.equal(strided, contiguous)


def test_norms_take_deprecated_names() -> None:
    """``hidden_size`` with a warning, never two names at once, nothing unknown."""
    with pytest.warns(DeprecationWarning, match="renamed to `normalized_shape`"):
        assert te.LayerNorm(hidden_size=8).weight.shape == (8,)
    with pytest.raises(RuntimeError, match="Neither `normalized_shape`"):
        te.RMSNorm()
    with pytest.raises(RuntimeError, match="Both `normalized_shape`"):
        te.RMSNorm(8, hidden_size=8)
    with pytest.raises(RuntimeError, match="Both `dtype` and"):
        te.LayerNorm(8, params_dtype=FP32, dtype=FP32)
    with pytest.raises(TypeError, match="'elementwise_affine'"):
        te.LayerNorm(8, elementwise_affine=False)
    with pytest.raises(ValueError, match=r"shape=\(2, 4\).*not compatible"):
        te.LayerNorm(8)(torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        te.LayerNorm(8)(torch.ones(2, 8, dtype=torch.int64))


# ---------------------------------------------------------------------- activations


def _reference(x: Tensor, name: str) -> Tensor:
    """Return Transformer Engine's CUDA formulas (common/util/math.h) in float64."""
    act: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": lambda v: (
            v * (0.5 + 0.5 * torch.tanh(v * (0.79788456 + 0.03567741 * v * v)))
        ),
        "glu": torch.sigmoid,
        "qgelu": lambda v: v / (1 + torch.exp(-1.702 * v)),
        "relu": lambda v: v * (v > 0),
        "srelu": lambda v: v * v * (v > 0),
        "silu": lambda v: v / (1 + torch.exp(-v)),
    }
    plain = {
        "geglu": "gelu",
        "glu": "glu",
        "qgeglu": "qgelu",
        "reglu": "relu",
        "sreglu": "srelu",
        "swiglu": "silu",
    }
    if name in plain:
        half = x.shape[-1] // 2
        return act[plain[name]](x[..., :half]) * x[..., half:]
    if name == "clamped_swiglu":
        half = x.shape[-1] // 2
        argument = x[..., :half].clamp(max=7.0)
        gate = x[..., half:].clamp(-7.0, 7.0) + 1.0
        return argument / (1 + torch.exp(-1.702 * argument)) * gate
    return act[name](x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formula(name: str) -> None:
    """Up to the rounding of a few float32 operations, and so is the gradient."""
    x = torch.linspace(-12, 12, 4004).view(2, -1)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    got, wanted = activate(ours, name), _reference(theirs, name)
    bound = 2**-20 * (1 + wanted.abs())
    assert ((got - wanted).abs() <= bound).all()
    torch.autograd.backward([got.sum(), wanted.sum()])
    assert ours.grad is not None
    assert theirs.grad is not None
    kink = (x == 0) | (x.abs() == 7)
    bound = 2**-18 * (1 + theirs.grad.abs())
    assert (((ours.grad - theirs.grad).abs() <= bound) | kink).all()


def test_parameters_of_an_activation() -> None:
    """They are used, and those that there are not are refused."""
    params = {"limit": 2.0, "alpha": 1.0, "glu_linear_offset": 0.0}
    x = torch.tensor([[3.0, -5.0]])
    wanted = 2.0 * torch.sigmoid(torch.tensor(2.0)) * -2.0
    assert activate(x, "clamped_swiglu", params).item() == wanted.item()
    with pytest.raises(TypeError, match="no parameter 'beta', it has limit"):
        te.LayerNormMLP(
            16, 16, activation="clamped_swiglu", activation_params={"beta": 1}
        )
    with pytest.raises(NotImplementedError, match="Did you mean 'swiglu'"):
        te.LayerNormMLP(16, 16, activation="swigelu")


# -------------------------------------------------------------- norm, then a product


def _norm(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - two classes
    """Return the norm of a module's input in float32, by torch alone."""
    weight = module.layer_norm_weight.float() + module.zero_centered_gamma
    if module.normalization == "RMSNorm":
        return F.rms_norm(x.float(), weight.shape, weight, module.eps)
    bias = module.layer_norm_bias.float()
    return F.layer_norm(x.float(), weight.shape, weight, bias, module.eps)


def _product(
    module: TransformerEngineBaseModule,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gemm: int = 0,
    wide: bool = False,
) -> Tensor:
    """Return the product number ``gemm`` of a module, of float32 results before it.

    What Transformer Engine 2.20.2 does, in csrc/extensions/normalization.cpp and
    activation.cpp: FULLY_FUSED for delayed scaling, FUSED_..._AMAX_FP8 for current
    scaling, and the rounded values elsewhere.
    """
    dtype = module.activation_dtype
    assert dtype is not None
    call = module.make_call(gemm)
    recipe = module.fp8_meta.get("recipe") if module.fp8 else None
    if isinstance(recipe, te.Float8CurrentScaling):
        call.input_amax = values.detach().abs().max()
    if not isinstance(recipe, te.DelayedScaling):
        values = values.to(dtype)
    if wide:
        call.output_dtype = FP32
    return linear(values, weight, bias, call)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_layernorm_linear_is_a_norm_and_a_product(
    name: str, dtype: torch.dtype, kind: str
) -> None:
    """Outputs, gradients and amax have the same bits over two steps."""
    centered = kind == "LayerNorm"
    make = functools.partial(
        te.LayerNormLinear,
        HIDDEN,
        FFN,
        normalization=kind,
        zero_centered_gamma=centered,
        params_dtype=dtype,
    )
    ours, theirs = randomized(make()), randomized(make())
    x, recipe = batch(dtype), RECIPES[name]()
    for _ in range(2):
        with region(recipe):
            out = ours(x)
        got = [out, *gradients(out, x, ours)]
        with region(recipe):
            theirs.prepare_forward(x)
            out = _product(theirs, _norm(theirs, x), theirs.weight, theirs.bias)
        assert_equal(got, [out, *gradients(out, x, theirs)])
        for module in (ours, theirs):
            for parameter in module.parameters():
                parameter.data.sub_(parameter.grad)
    if name == "delayed":
        for key in ("scaling_fwd", "scaling_bwd"):
            states = [m.fp8_meta[key] for m in (ours, theirs)]
            assert torch.equal(states[0].amax_history, states[1].amax_history)
            assert torch.equal(states[0].scale, states[1].scale)


@pytest.mark.parametrize("name", RECIPES)
def test_layernorm_linear_is_layernorm_and_linear(name: str) -> None:
    """Without fused kernels: with the norm's result returned, or float32 throughout."""
    recipe, dtype = RECIPES[name](), BF16
    fused = randomized(
        te.LayerNormLinear(
            HIDDEN, FFN, return_layernorm_output=True, params_dtype=dtype
        )
    )
    norm = te.LayerNorm(HIDDEN, params_dtype=dtype)
    layer = te.Linear(HIDDEN, FFN, params_dtype=dtype)
    for mine, part, theirs in (
        ("layer_norm_weight", norm, "weight"),
        ("layer_norm_bias", norm, "bias"),
        ("weight", layer, "weight"),
        ("bias", layer, "bias"),
    ):
        getattr(part, theirs).data.copy_(getattr(fused, mine))
    x = batch(dtype)
    both = nn.ModuleList([norm, layer])
    with region(recipe):
        out, normed = fused(x)
    got = [out, normed, *gradients(out + normed.repeat(1, 1, 2)[..., :FFN], x, fused)]
    with region(recipe):
        normed = norm(x)
        out = layer(normed)
    theirs_too = gradients(out + normed.repeat(1, 1, 2)[..., :FFN], x, both)
    assert_equal(got, [out, normed, *theirs_too])


def test_delayed_scaling_quantizes_what_was_not_rounded() -> None:
    """The amax of a norm is that of its float32 result; rounding changes codes."""
    layer = randomized(te.LayerNormLinear(HIDDEN, FFN, params_dtype=BF16))
    x = batch(BF16)
    wanted = _norm(layer, x).detach()
    assert wanted.abs().max() != wanted.to(BF16).abs().max().float()
    with te.autocast(recipe=te.DelayedScaling()):
        out = layer(x)
        state: DelayedScalingState = layer.fp8_meta["scaling_fwd"]
        assert state.amax_history[0, 0] == wanted.abs().max()
    codes = wanted.to(torch.float8_e4m3fn)
    assert not torch.equal(codes.float(), wanted.to(BF16).to(codes.dtype).float())
    weight = layer.weight.detach().to(torch.float8_e4m3fn).double()
    exact = codes.double() @ weight.t() + layer.bias.detach().double()
    # An FP32 sum of 64 products, and one rounding to bfloat16.
    size = codes.double().abs() @ weight.t().abs() + 1
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + 2**-17 * size).all()


@pytest.mark.parametrize("name", ["delayed", "current", "block", "mxfp8"])
@pytest.mark.parametrize("override", ["high_precision", "dequantized"])
def test_backward_overrides_need_the_rounded_norm(name: str, override: str) -> None:
    """Then no kernel is fused, and the backward runs in high precision."""
    recipe: Any = {
        "delayed": te.DelayedScaling,
        "current": te.Float8CurrentScaling,
        "block": te.Float8BlockScaling,
        "mxfp8": te.MXFP8BlockScaling,
    }[name]
    if name == "delayed":
        with pytest.raises((ValueError, AssertionError)):
            recipe(backward_override=override)
        return
    layer = randomized(te.LayerNormLinear(HIDDEN, FFN, params_dtype=BF16))
    x = batch(BF16)
    with te.autocast(recipe=recipe(backward_override=override)):
        out = layer(x)
    got = gradients(out, x, layer)
    normed = _norm(layer, x).to(BF16)
    plain = F.linear(normed, layer.weight, layer.bias)
    wanted = gradients(plain, x, layer)
    if override == "high_precision":
        assert_equal(got, wanted)
    else:
        sizes = [
            float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)
        ]
        assert 0 < max(sizes) < 0.05
    mlp = te.LayerNormMLP(HIDDEN, FFN, params_dtype=BF16)
    with (
        te.autocast(recipe=recipe(backward_override=override)),
        pytest.raises(NotImplementedError, match=r"LayerNormLinear \+ Linear"),
    ):
        mlp(x)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "srelu"])
def test_layernorm_mlp_is_its_four_parts(
    name: str, dtype: torch.dtype, activation: str
) -> None:
    """Norm, product, activation, product: the same bits over two steps."""
    make = functools.partial(
        te.LayerNormMLP, HIDDEN, FFN, activation=activation, params_dtype=dtype
    )
    ours, theirs = randomized(make()), randomized(make())
    x, recipe = batch(dtype), RECIPES[name]()
    for _ in range(2):
        with region(recipe):
            out = ours(x)
        got = [out, *gradients(out, x, ours)]
        wide = name == "delayed" and activation != "swiglu"
        with region(recipe):
            theirs.prepare_forward(x, num_gemms=2)
            normed = _norm(theirs, x)
            hidden = _product(
                theirs, normed, theirs.fc1_weight, theirs.fc1_bias, wide=wide
            )
            active = activate(hidden.float(), activation)
            out = _product(theirs, active, theirs.fc2_weight, theirs.fc2_bias, gemm=1)
        assert_equal(got, [out, *gradients(out, x, theirs)])
    if name == "delayed":
        for key in ("scaling_fwd", "scaling_bwd"):
            states = [m.fp8_meta[key] for m in (ours, theirs)]
            assert torch.equal(states[0].amax_history, states[1].amax_history)
            assert (states[0].amax_history != 0).any(0).sum() == (
                4 if key == "scaling_fwd" else 2
            )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_without_quantization_the_mlp_is_torch_s(activation: str, bias: bool) -> None:
    """In float32, bit for bit, with either road of the second bias."""
    several: list[dict[str, Any]] = [{}, {"return_bias": True}]
    for options in (*several, {"set_parallel_mode": True}):
        mlp = randomized(
            te.LayerNormMLP(HIDDEN, FFN, activation=activation, bias=bias, **options)
        )
        gated = ACTIVATIONS[activation][1]
        assert mlp.fc1_weight.shape == (FFN * (1 + gated), HIDDEN)
        x = batch(FP32)
        out = mlp(x)
        if options == {"return_bias": True}:
            out, returned = out
            assert returned is mlp.fc2_bias if bias else returned is None
        got = [out, *gradients(out + (mlp.fc2_bias if options and bias else 0), x, mlp)]
        fc1, fc2 = (mlp.fc1_bias, mlp.fc2_bias) if bias else (None, None)
        hidden = activate(F.linear(_norm(mlp, x), mlp.fc1_weight, fc1), activation)
        plain = F.linear(hidden, mlp.fc2_weight, None if options else fc2)
        shifted = plain + fc2 if options and fc2 is not None else plain
        out = plain if options == {"return_bias": True} else shifted
        extra = mlp.fc2_bias if options and bias else 0
        assert_equal(got, [out, *gradients(out + extra, x, mlp)])


# ------------------------------------------------------------------------ attention


def _attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """Return attention in float64 over [batch, heads, length, channels]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1).double() for x in (k, v))
    scores = q.double() @ k.mT * scale
    if bias is not None:
        scores = scores + bias.double()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ v


def _te_mask(queries: int, keys: int, **kwargs: object) -> Tensor:
    """Return the mask of Transformer Engine's own function, run on this device."""

    class OnCPU:
        def __getattr__(self, name: str) -> object:
            value = getattr(torch, name)
            if name != "arange":
                return value

            def arange(length: int, dtype: torch.dtype, device: str) -> Tensor:
                assert device == "cuda"
                return torch.arange(length, dtype=dtype)

            return arange

    path = "attention/dot_product_attention/utils.py"
    found = ast.Module([definition(path, "get_full_mask")], type_ignores=[])
    names = {"torch": OnCPU(), "Tuple": tuple, "Union": typing.Union}
    exec(compile(found, path, "exec"), names)
    function: Any = names["get_full_mask"]
    mask: Tensor = function(queries, keys, **kwargs)[1]
    return mask


WINDOWS = [None, (3, 0), (2, 5)]


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize(
    ("kind", "window", "lengths"),
    [
        (kind, window, lengths)
        for kind, window, lengths in itertools.product(
            [
                "no_mask",
                "padding",
                "causal",
                "padding_causal",
                "causal_bottom_right",
                "padding_causal_bottom_right",
                "arbitrary",
            ],
            WINDOWS,
            [(8, 8), (6, 9)],
        )
        if not ("causal" in kind and window == (2, 5))
    ],
)
def test_masks_are_transformer_engine_s(
    layout: str, kind: str, window: tuple[int, int] | None, lengths: tuple[int, int]
) -> None:
    """Softmax over what its own function leaves, in float64, for each mask type."""
    torch.manual_seed(0)
    queries, keys = lengths
    cross = queries != keys
    q = torch.randn(2, queries, 4, 16)
    k, v = torch.randn(2, 2, keys, 2, 16)
    mask: Any = None
    if "padding" in kind:
        pads = [
            torch.arange(n).expand(2, n) >= torch.tensor([[n - 2], [n]])
            for n in lengths
        ]
        mask = tuple(pad[:, None, None, :] for pad in pads) if cross else pads[0]
        mask = mask if cross else mask[:, None, None, :]
    elif kind == "arbitrary":
        mask = torch.rand(2, 1, queries, keys) > 0.7
    layer = te.DotProductAttention(
        4,
        16,
        num_gqa_groups=2,
        qkv_format=layout,
        attn_mask_type=kind,
        window_size=window,
        attention_type="cross" if cross else "self",
    )
    inputs = [x.transpose(0, 1) if layout == "sbhd" else x for x in (q, k, v)]
    got = layer(*inputs, attention_mask=mask)
    got = got.transpose(0, 1) if layout == "sbhd" else got
    masked = _te_mask(
        queries,
        keys,
        attn_mask_type=kind,
        attention_mask=mask,
        window_size=window
        if window is not None
        else (-1, 0 if "causal" in kind else -1),
        attention_type="cross" if cross else "self",
        bottom_right_alignment=kind not in {"causal", "padding_causal"},
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wanted = _attention(q, k, v, ~masked, 0.25, None).transpose(1, 2).flatten(2)
    # Weighted means of values below 4, computed in float32.
    assert got.shape == wanted.shape
    assert ((got - wanted).abs() <= 2**-18).all()


@pytest.mark.parametrize("kind", ["pre_scale_bias", "post_scale_bias"])
def test_a_bias_is_added_to_the_scores(kind: str) -> None:
    """Before or after the scale."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, 4, 16)
    bias = torch.randn(1, 4, 8, 8)
    layer = te.DotProductAttention(4, 16, qkv_format="bshd", softmax_scale=0.5)
    got = layer(q, k, v, core_attention_bias_type=kind, core_attention_bias=bias)
    seen = torch.ones(8, 8, dtype=torch.bool).tril()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    factor = 0.5 if kind == "pre_scale_bias" else 1.0
    wanted = _attention(q, k, v, seen, 0.5, bias * factor).transpose(1, 2).flatten(2)
    assert ((got - wanted).abs() <= 2**-18).all()


def test_attention_stays_in_the_dtype_of_activations() -> None:
    """Under a recipe as without one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 8, 2, 4, 16, dtype=BF16)
    layer = te.DotProductAttention(4, 16)
    with te.autocast(recipe=te.DelayedScaling()):
        quantized = layer(q, k, v)
    assert quantized.dtype == BF16
    assert torch.equal(quantized, layer(q, k, v))
    options: Any = {"fp8_dpa": True}
    with (
        te.autocast(recipe=te.DelayedScaling(**options)),
        pytest.raises(NotImplementedError, match="attention in FP8"),
    ):
        te.DotProductAttention(4, 16)(q, k, v)


def test_rotary_embedding_is_transformer_engine_s() -> None:
    """Its own unfused function, in both layouts and ways to pair."""
    path = "attention/rope.py"
    names: dict[str, Any] = {"torch": torch}
    body: list[ast.stmt] = [
        definition(path, name)
        for name in ("_rotate_half", "_apply_rotary_pos_emb_base")
    ]
    exec(compile(ast.Module(body, []), path, "exec"), names)
    torch.manual_seed(0)
    for layout, interleaved in itertools.product(("sbhd", "bshd"), (False, True)):
        angles = te.RotaryPositionEmbedding(8, interleaved=interleaved)(12, offset=3)
        t = torch.randn(12, 12, 2, 16)  # a quarter of the channels is not turned
        theirs = names["_apply_rotary_pos_emb_base"](t, angles, layout, interleaved)
        ours = te.apply_rotary_pos_emb(t, angles, layout, interleaved=interleaved)
        assert torch.equal(ours, theirs)
    # Turning by position p and scoring depends on differences of positions only.
    q = torch.randn(1, 1, 1, 8).expand(12, 1, 1, 8)
    turned = te.apply_rotary_pos_emb(q, te.RotaryPositionEmbedding(8)(12))[:, 0, 0]
    scores = turned @ turned.t()
    # 2**-20 of a sum of eight products of numbers below 4
    assert torch.allclose(scores[0, :-1], scores[1, 1:], atol=2**-14)


# ---------------------------------------------------------------------- transformer


def _layer(
    layer: Any,  # noqa: ANN401 - its parts have parts
    x: Tensor,
    encoded: Tensor | None = None,
) -> Tensor:
    """Return what a float32 TransformerLayer computes, by torch alone."""

    def attend(name: str, x: Tensor, other: Tensor | None = None) -> list[Tensor]:
        part = getattr(layer, name)
        heads, groups = part.num_attention_heads, part.num_gqa_groups
        if other is None:
            first = part.layernorm_qkv if part.input_layernorm else part.qkv
        else:
            first = part.layernorm_query
        normed = _norm(first, x) if part.input_layernorm else x
        if other is not None:
            names, sources = ("query", "key", "value"), (normed, other, other)
            owners = (first, part.key_value, part.key_value)
        else:
            names, sources, owners = (
                ("query", "key", "value"),
                (normed,) * 3,
                (first,) * 3,
            )
        q, k, v = (
            F.linear(s, getattr(o, f"{n}_weight"), getattr(o, f"{n}_bias"))
            for n, s, o in zip(names, sources, owners, strict=True)
        )
        q, k, v = (
            t.view(*t.shape[:-1], h, -1).permute(1, 2, 0, 3)
            for t, h in ((q, heads), (k, groups), (v, groups))
        )
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=other is None, enable_gqa=heads != groups
        )
        context = context.permute(2, 0, 1, 3).flatten(2)
        return [F.linear(context, part.proj.weight), part.proj.bias, normed]

    def mlp(x: Tensor) -> list[Tensor]:
        part = layer.layernorm_mlp
        normed = _norm(part, x)
        hidden = activate(
            F.linear(normed, part.fc1_weight, part.fc1_bias), part.activation
        )
        return [F.linear(hidden, part.fc2_weight), part.fc2_bias, normed]

    if layer.parallel_attention_mlp:
        one, two = (
            attend("self_attention", x),
            mlp(x),
        )
        # Both add their own bias.
        return x + ((one[0] + one[1]) + (two[0] + two[1]))
    after = layer.apply_residual_connection_post_layernorm
    out = attend("self_attention", x)
    x = (out[2] if after else x) + (out[0] + out[1])
    if encoded is not None:
        out = attend("inter_attention", x, encoded)
        x = (out[2] if after else x) + (out[0] + out[1])
    out = mlp(x)
    x = (out[2] if after else x) + (out[0] + out[1])
    if layer.output_layernorm:
        norm = layer.layernorm
        x = F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return x


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "post-norm residual": {"apply_residual_connection_post_layernorm": True},
    "output norm": {"output_layernorm": True},
    "parallel": {"parallel_attention_mlp": True},
    "rms": {"normalization": "RMSNorm", "activation": "swiglu"},
    "decoder": {"layer_type": "decoder"},
    "decoder, post-norm": {
        "layer_type": "decoder",
        "apply_residual_connection_post_layernorm": True,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_quantization_a_layer_is_torch_s(options: dict[str, Any]) -> None:
    """In float32 up to the order of a few sums; gradients reach every parameter."""
    layer = te.TransformerLayer(
        HIDDEN, FFN, HEADS, hidden_dropout=0.0, attention_dropout=0.0, **options
    )
    randomized(layer)
    x = batch(FP32)
    encoded = None
    if options.get("layer_type") == "decoder":
        torch.manual_seed(5)
        encoded = torch.randn(LENGTH // 2, BATCH, HIDDEN)
    out = layer(x, encoder_output=encoded)
    got = [out, *gradients(out, x, layer)]
    plain = _layer(layer, x, encoded)
    wanted = [plain, *gradients(plain, x, layer)]
    names = ["out", "x", *(n for n, _ in layer.named_parameters())]
    for name, a, b in zip(names, got, wanted, strict=True):
        # Two roads of some thousand float32 operations; the largest counts.
        assert (a - b).abs().max() <= 2**-14 * b.abs().max() + 2**-24, name


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_layer_is_its_parts(name: str, dtype: torch.dtype) -> None:
    """Under a recipe, bit for bit: the parts in order, residuals added after bias."""
    recipe = RECIPES[name]()
    options: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    ours, theirs = (
        randomized(
            te.TransformerLayer(HIDDEN, FFN, HEADS, params_dtype=dtype, **options)
        )
        for _ in range(2)
    )
    x = batch(dtype)
    for _ in range(2):
        with region(recipe):
            out = ours(x)
        got = [out, *gradients(out, x, ours)]
        part = theirs.self_attention
        with region(recipe):
            mixed = part.layernorm_qkv(x)
            q, k, v = (
                t.reshape(*t.shape[:-1], HEADS, -1) for t in mixed.chunk(3, dim=-1)
            )
            attended, bias = part.proj(part.core_attention(q, k, v))
            middle = x + (attended + bias)
            value, bias = theirs.layernorm_mlp(middle)
            out = middle + (value + bias)
        assert_equal(got, [out, *gradients(out, x, theirs)])
    kept = [m.fp8 for m in ours.modules() if isinstance(m, TransformerEngineBaseModule)]
    assert kept == [True] * 4


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("interleaved", [True, False])
def test_fused_projections_hold_the_same_heads(groups: int, interleaved: bool) -> None:
    """One weight for queries, keys and values is a permutation of three."""
    options: dict[str, Any] = {
        "num_gqa_groups": groups,
        "attention_dropout": 0.0,
        "qkv_format": "bshd",
        "bias": False,
    }
    split = te.MultiheadAttention(HIDDEN, HEADS, **options)
    fused = te.MultiheadAttention(
        HIDDEN,
        HEADS,
        fuse_qkv_params=True,
        qkv_weight_interleaved=interleaved,
        **options,
    )
    size, each = HIDDEN // HEADS, HEADS // groups
    q, k, v = (
        getattr(split.qkv, f"{n}_weight").detach() for n in ("query", "key", "value")
    )
    assert q.shape[0] == HIDDEN
    assert k.shape[0] == v.shape[0] == groups * size
    if interleaved:  # by group: its queries, in order, its key and its value
        parts = (t.view(groups, -1, size, HIDDEN) for t in (q, k, v))
        weight = torch.cat(tuple(parts), dim=1).flatten(0, 2)
        assert (
            weight.view(groups, each + 2, size, HIDDEN)[:, :each].numel() == q.numel()
        )
    else:
        weight = torch.cat([q, k, v])
    fused.qkv.weight.data.copy_(weight)
    fused.proj.weight.data.copy_(split.proj.weight)
    x = batch(FP32, BATCH, LENGTH, HIDDEN)
    # The same products in another order.
    assert torch.allclose(fused(x), split(x), rtol=2**-14, atol=2**-14)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_names_of_parameters(options: dict[str, Any]) -> None:
    """As in checkpoints of Transformer Engine."""
    fused = options.get("parallel_attention_mlp", False)
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, fuse_qkv_params=fused, **options)
    bias = ["bias"] if options.get("normalization") != "RMSNorm" else []
    norm = [f"layer_norm_{n}" for n in ("weight", *bias)]
    kinds = [""] if fused else ["query_", "key_", "value_"]
    first = "qkv" if options.get("output_layernorm") else "layernorm_qkv"
    names = [] if first == "qkv" else [f"self_attention.{first}.{n}" for n in norm]
    names += [
        f"self_attention.{first}.{k}{n}" for n in ("weight", "bias") for k in kinds
    ]
    names += ["self_attention.proj.weight", "self_attention.proj.bias"]
    if options.get("layer_type") == "decoder":
        names += [f"inter_attention.layernorm_query.{n}" for n in norm]
        for part, some in (("layernorm_query", kinds[:1]), ("key_value", kinds[1:])):
            names += [
                f"inter_attention.{part}.{k}{n}"
                for n in ("weight", "bias")
                for k in some
            ]
        names += ["inter_attention.proj.weight", "inter_attention.proj.bias"]
    names += [f"layernorm_mlp.{n}" for n in norm]
    names += [f"layernorm_mlp.fc{i}_{n}" for i in (1, 2) for n in ("weight", "bias")]
    if options.get("output_layernorm"):
        names += ["layernorm.weight", "layernorm.bias"]
    assert [n for n, _ in layer.named_parameters()] == names
    extra = [
        k.rpartition(".")[0] for k in layer.state_dict() if k.endswith("_extra_state")
    ]
    assert "self_attention.core_attention" in extra
    for key, value in layer.state_dict().items():
        std = 0.023 if key.endswith("weight") and "norm_" not in key else None
        if std is not None and value.dim() == 2:
            # Of at least 1024 values: four standard errors.
            assert abs(value.std() / std - 1) < 4 / math.sqrt(2 * value.numel())


def test_dropout_is_torch_s() -> None:
    """The mask of the random state, in training only."""
    layer = te.TransformerLayer(
        HIDDEN, FFN, HEADS, hidden_dropout=0.5, attention_dropout=0.0
    )
    x = batch(FP32).detach()
    torch.manual_seed(7)
    got = layer(x)
    part = layer.self_attention
    torch.manual_seed(7)
    attended, bias = part(x)
    x = x + F.dropout(attended + bias, 0.5)
    value, bias = layer.layernorm_mlp(x)
    assert torch.equal(got, x + F.dropout(value + bias, 0.5))
    layer.eval()
    x = batch(FP32).detach()
    assert torch.equal(layer(x), layer(x))
    attention = te.DotProductAttention(4, 16, attention_dropout=0.5)
    q = torch.randn(8, 2, 4, 16)
    assert not torch.equal(attention(q, q, q), attention(q, q, q))
    attention.eval()
    assert torch.equal(attention(q, q, q), attention(q, q, q))


def test_drop_path_drops_whole_slices() -> None:
    """Each is kept, and doubled, or left out, in training only."""
    layer = te.TransformerLayer(
        HIDDEN,
        FFN,
        HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        drop_path_rate=0.5,
    )
    x = batch(FP32).detach()
    value = torch.ones_like(x)
    torch.manual_seed(0)
    added = layer._add(value, None, torch.zeros_like(x), drop_path=True)
    assert set(added.flatten().tolist()) == {0.0, 2.0}
    assert all(len(set(row.flatten().tolist())) == 1 for row in added)
    layer.eval()
    plain = te.TransformerLayer(HIDDEN, FFN, HEADS, hidden_dropout=0.0)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain.eval()(x))


def test_qk_norms() -> None:
    """They change the scores to those of vectors of one length."""
    for kind in ("L2Normalization", "RMSNorm", "LayerNorm"):
        for before in (False, True):
            part = te.MultiheadAttention(
                HIDDEN, HEADS, qk_norm_type=kind, qk_norm_before_rope=before
            )
            x = batch(FP32).detach()
            q = x.view(*x.shape[:-1], HEADS, -1)
            angles = te.RotaryPositionEmbedding(HIDDEN // HEADS)(LENGTH)
            turned, _ = part._position(q, q, angles)
            plain = te.apply_rotary_pos_emb(q, angles)
            d = plain.double() if not before else q.double()
            if kind == "LayerNorm":
                d = d - d.mean(-1, keepdim=True)
            squares = d.square()
            total = squares.sum(-1, keepdim=True)
            size = total if kind == "L2Normalization" else total / squares.shape[-1]
            wanted = d / (size + 1e-6).sqrt()
            if before:
                wanted = te.apply_rotary_pos_emb(wanted, angles)
            assert torch.allclose(turned.double(), wanted.double(), atol=2**-18)
    with pytest.raises(ValueError, match="Unsupported QK norm type: L1"):
        te.MultiheadAttention(HIDDEN, HEADS, qk_norm_type="L1")


def test_core_attention_can_be_recomputed() -> None:
    """With dropout: the same output and gradients."""
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, attention_dropout=0.3)
    x = batch(FP32)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        out = layer(x, checkpoint_core_attention=again)
        found.append([out, *gradients(out, x, layer)])
    assert_equal(*found)


# ----------------------------------------------------------------------- bad input

REFUSED: list[tuple[type[Any], tuple[int, ...], dict[str, Any]]] = [
    (kind, sizes, {name: value})
    for kind, sizes, options in (
        (
            te.LayerNormLinear,
            (64, 64),
            {
                "tp_size": 2,
                "delay_wgrad_compute": True,
                "get_rng_state_tracker": print,
                "parallel_mode": "row",
            },
        ),
        (te.LayerNormMLP, (64, 64), {"checkpoint": True, "tp_size": 2}),
        (
            te.DotProductAttention,
            (4, 16),
            {
                "tp_size": 2,
                "softcap": 30.0,
                "softmax_type": "learnable",
                "qkv_format": "thd",
                "cp_group": 1,
                "return_max_logit": True,
            },
        ),
        (te.MultiheadAttention, (64, 4), {"softcap": 1.0, "tp_size": 2}),
        (
            te.TransformerLayer,
            (64, 64, 4),
            {
                "softcap": 1.0,
                "tp_size": 2,
                "attn_input_format": "thd",
            },
        ),
    )
    for name, value in options.items()
]


@pytest.mark.parametrize(("kind", "sizes", "options"), REFUSED)
def test_what_is_not_emulated_is_refused(
    kind: type[Any], sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    """With an error that says so."""
    with pytest.raises(NotImplementedError, match=r"not emulated|does not support"):
        kind(*sizes, **options)


UB = {f"ub_{name}": True for name in ("overlap_ag", "overlap_rs", "overlap_rs_dgrad")}
UB |= {"ub_bulk_dgrad": True, "ub_bulk_wgrad": True, "sequence_parallel": True}
NAMED = UB | {"ub_name": "qkv", "symmetric_ar_type": "one_shot"}
PARALLEL: list[tuple[type[Any], tuple[int, ...], dict[str, Any]]] = [
    (te.Linear, (64, 64), NAMED | {"rng_tracker_name": "a"}),
    (te.LayerNormLinear, (64, 64), NAMED),
    (te.LayerNormMLP, (64, 64), UB | {"symmetric_ar_type": "one_shot"}),
    (te.DotProductAttention, (4, 16), {"sequence_parallel": True}),
    (te.MultiheadAttention, (64, 4), UB),
    (te.TransformerLayer, (64, 64, 4), UB | {"ub_tp_comm_overlap": True}),
]


@pytest.fixture
def ranks() -> Iterator[Callable[[int], dist.ProcessGroup]]:
    """Make this process one of several ranks, of which no others exist.

    Yields:
        a function that takes the number of ranks.
    """

    def start(size: int) -> dist.ProcessGroup:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        group = dist.group.WORLD
        assert group is not None
        return group

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("kind", "sizes", "options"), PARALLEL)
@pytest.mark.parametrize("parallel", [{}, {"tp_size": 1}, {"tp_group": True}])
def test_with_one_rank_options_of_parallelism_change_nothing(
    kind: type[Any],
    sizes: tuple[int, ...],
    options: dict[str, Any],
    parallel: dict[str, Any],
    ranks: Callable[[int], dist.ProcessGroup],
) -> None:
    """Transformer Engine ignores them there, so the same bits come out."""
    if "tp_group" in parallel:
        parallel = {"tp_group": ranks(1), "tp_size": 8}  # the group has the size
    x = torch.randn(16, 2, 64, dtype=torch.bfloat16)
    inputs = [x] if kind is not te.DotProductAttention else [x.view(16, 2, 4, 16)] * 3
    found = []
    for given in ({}, options | parallel):
        torch.manual_seed(0)
        module = kind(*sizes, **given).to(torch.bfloat16)
        with te.autocast(recipe=te.Float8CurrentScaling()):
            found.append([module(*inputs)])
    assert_equal(*found)


@pytest.mark.parametrize(("kind", "sizes", "options"), PARALLEL)
def test_a_group_of_two_ranks_is_refused(
    kind: type[Any],
    sizes: tuple[int, ...],
    options: dict[str, Any],
    ranks: Callable[[int], dist.ProcessGroup],
) -> None:
    """Whatever is asked for beside it, and by its size."""
    words = rf"{kind.__name__}\(tp_group=...\) of 2 ranks is not emulated"
    with pytest.raises(NotImplementedError, match=words):
        kind(*sizes, tp_group=ranks(2), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"alibi_slopes": torch.ones(4)},
        {"cu_seqlens_q": torch.ones(3)},
        {"inference_params": object()},
        {"softcap": 2.0},
        {"core_attention_bias_type": "alibi"},
        {"thd_attention_policies": [{}]},
        {"pad_between_seqs": True},
    ],
)
def test_calls_that_are_not_emulated_are_refused(options: dict[str, Any]) -> None:
    """By the layer as by its attention."""
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS)
    with pytest.raises(NotImplementedError, match="not emulated"):
        layer(batch(FP32), **options)


@pytest.mark.parametrize(
    ("kind", "sizes", "options", "match"),
    [
        (te.LayerNormLinear, (0, 16), {}, "at least 1"),
        (te.LayerNormLinear, (16, 16), {"normalization": "L2"}, "'LayerNorm' or"),
        (te.LayerNormLinear, (16, 16), {"parallel_mode": "both"}, "not supported"),
        (te.LayerNormLinear, (16, 16), {"parameters_split": ()}, "0 parameters"),
        (te.LayerNormMLP, (16, -1), {}, "at least 1"),
        (te.DotProductAttention, (4, 16), {"num_gqa_groups": 3}, "GQA groups"),
        (te.DotProductAttention, (4, 16), {"attn_mask_type": "c"}, "'no_mask'"),
        (te.DotProductAttention, (4, 16), {"attention_type": "x"}, "not supported"),
        (
            te.DotProductAttention,
            (4, 16),
            {"window_size": (-3, 0)},
            "window_size should",
        ),
        (te.MultiheadAttention, (64, 4), {"layer_number": 0}, "positive integer"),
        (te.TransformerLayer, (64, 64, 4), {"layer_type": "both"}, "'encoder'"),
        (
            te.TransformerLayer,
            (64, 64, 4),
            {"fuse_wgrad_accumulation": True},
            "requires fuse_qkv_params=True",
        ),
        (
            te.TransformerLayer,
            (64, 64, 4),
            {"parallel_attention_mlp": True, "output_layernorm": True},
            "not supported simultaneously",
        ),
    ],
)
def test_options_that_cannot_be(
    kind: type[Any], sizes: tuple[int, ...], options: dict[str, Any], match: str
) -> None:
    """One error that names what is allowed."""
    with pytest.raises(ValueError, match=match):
        kind(*sizes, **options)


def test_windows_that_do_not_fit_a_mask_warn() -> None:
    """And become the nearest that does, as in Transformer Engine."""
    with pytest.warns(UserWarning, match="window_size should be"):
        assert te.DotProductAttention(4, 16, window_size=(-1, -1)).window_size == (
            -1,
            0,
        )
    with pytest.warns(UserWarning, match="window_size should be"):
        layer = te.DotProductAttention(
            4, 16, attn_mask_type="no_mask", window_size=(-1, 0)
        )
    assert layer.window_size == (-1, -1)


def test_inputs_that_cannot_be() -> None:
    """Shapes, dtypes and masks, each with one error; then the layer still works."""
    attention = te.DotProductAttention(4, 16)
    q = torch.randn(8, 2, 4, 16)
    for arguments_, options, error, match in (
        ((q, q, q[..., 0]), {}, ValueError, "4D tensors"),
        ((q, q.double(), q), {}, TypeError, "same data type"),
        ((q, q[:4], q), {}, ValueError, "same batch size, sequence length"),
        ((q[:, :, :2], q, q), {}, ValueError, "Heads and channels"),
        ((q, q, q), {"attn_mask_type": "padding"}, ValueError, "attention_mask"),
        ((q, None, q), {}, ValueError, "must be given"),
        (
            (q, q, q),
            {"attn_mask_type": "arbitrary", "attention_mask": torch.ones(8, 8)},
            TypeError,
            "boolean",
        ),
        (
            (q, q, q),
            {"core_attention_bias_type": "post_scale_bias"},
            ValueError,
            "should not be None",
        ),
    ):
        with pytest.raises(error, match=match):
            attention(*arguments_, **options)
    assert attention(q, q, q).shape == (8, 2, 64)
    for layer in (te.LayerNormLinear(64, 32), te.LayerNormMLP(64, 32)):
        wrong: list[tuple[Tensor, type[Exception], str]] = [
            (torch.ones(8, 32), ValueError, "GEMM not possible"),
            (torch.ones(8, 64, dtype=torch.float64), TypeError, r"torch\.float64"),
            (torch.ones(8, 64, dtype=torch.complex64), TypeError, r"torch\.complex64"),
            (torch.ones(8, 64, dtype=BF16), TypeError, "Data types for parameters"),
            (torch.ones(7, 64), ValueError, "divisible by 8"),
            (torch.ones(8, 64), ValueError, "divisible by 16"),
        ]
        for x, kind, words in wrong:
            with (
                te.autocast(recipe=te.DelayedScaling()),
                pytest.raises(kind, match=words),
            ):
                layer(x)
        with te.autocast(recipe=te.DelayedScaling()):
            assert layer(torch.randn(16, 64)).isfinite().all()
        with te.autocast(recipe=te.DelayedScaling()):
            assert layer(torch.ones(0, 64)).shape[0] == 0
            assert not layer.fp8_meta["scaling_fwd"].amax_history.isnan().any()
