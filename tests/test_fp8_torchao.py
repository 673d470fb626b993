"""Tests of snippets/fp8 against torchao's emulated FP8 training.

Two of torchao's recipes have a counterpart: ``tensorwise`` is current scaling, and
``rowwise``, a power of two for each row along the summed axis, is blocks of 1 x 128 as
long as no axis is longer than 128. torchao divides in float64, so a scale that is no
power of two may differ in its last bit, and with it a rounding here and there.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from snippets import fp8 as te
from tests.quiet import quiet_import

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP32 = torch.bfloat16, torch.float32
Step = dict[str, Tensor]


def tensorwise(role: te.QuantizerRole | None) -> te.Quantizer:
    """Return a quantizer of the hybrid formats whose scale is a power of two."""
    fmt = E5M2 if role is not None and role.tensor_type == "grad_output" else E4M3
    return te.Float8CurrentScalingQuantizer(fmt, force_pow_2_scales=True)


def rowwise(_role: te.QuantizerRole | None) -> te.Quantizer:
    """Return a quantizer to E4M3 with a power of two for each row of up to 128."""
    return te.Float8BlockQuantizer(E4M3, block_scaling_dim=1)


OURS: dict[str, Callable[[], te.Recipe]] = {
    "tensorwise": te.Float8CurrentScaling,
    "tensorwise, powers of 2": lambda: te.CustomRecipe(qfactory=tensorwise),
    "rowwise": lambda: te.CustomRecipe(qfactory=rowwise),
}


def to_torchao(model: nn.Module, name: str) -> nn.Module:
    """Return a copy whose linear layers are torchao's emulated ones."""
    float8 = quiet_import("torchao.float8")
    options: dict[str, Any] = {"emulate": True}
    if name == "rowwise":
        made = float8.Float8LinearConfig.from_recipe_name(name)
        for key in ("input", "weight", "grad_output"):
            options[f"cast_config_{key}"] = getattr(made, f"cast_config_{key}")
    options["round_scales_to_power_of_2"] = name != "tensorwise"
    config = float8.Float8LinearConfig(**options)
    converted: nn.Module = float8.convert_to_float8_training(
        copy.deepcopy(model), config=config
    )
    return converted


def to_emulator(model: nn.Sequential) -> nn.Sequential:
    """Return a copy whose linear layers are the emulator's."""
    layers = []
    for old in copy.deepcopy(model):
        new = old
        if isinstance(old, nn.Linear):
            new = te.Linear(
                old.in_features,
                old.out_features,
                bias=old.bias is not None,
                params_dtype=old.weight.dtype,
            )
            new.load_state_dict(old.state_dict(), strict=False)
        layers.append(new)
    return nn.Sequential(*layers)


def one_step(model: nn.Module, recipe: te.Recipe | None, x: Tensor, dy: Tensor) -> Step:
    """Return the output and all gradients of one forward and backward."""
    x = x.clone().requires_grad_()
    with te.autocast(enabled=recipe is not None, recipe=recipe):
        y = model(x)
    torch.autograd.backward(y, dy)
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return found


def uneven(rows: int, columns: int, size: float, dtype: torch.dtype) -> Tensor:
    """Return numbers whose rows and columns differ by magnitudes."""
    spread = 10.0 ** (torch.rand(rows, 1) * 2 + torch.rand(1, columns) * 2)
    return (torch.randn(rows, columns) * spread * size).to(dtype)


SIZES = [(16, 16, 16), (64, 128, 96), (128, 32, 128), (256, 256, 384)]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [(n, s) for n in OURS for s in SIZES if n != "rowwise" or max(s) <= 128],
)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_layer_is_close_to_torchao_s(
    name: str, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """In BF16 99 of 100 results are equal; in FP32 sums of another order are not.

    Together they differ by less than a tenth of a BF16 step, and FP8 by percents.
    """
    rows, inputs, outputs = sizes
    torch.manual_seed(rows + inputs)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False, dtype=dtype))
    x, dy = uneven(rows, inputs, 1e-2, dtype), uneven(rows, outputs, 1e-5, dtype)
    theirs = one_step(to_torchao(model, name), None, x, dy)
    ours = one_step(to_emulator(model), OURS[name](), x, dy)
    exact = one_step(model, None, x, dy)

    for key, value in theirs.items():
        norm = value.float().norm()
        assert (ours[key] - value).float().norm() < 0.1 * 2**-8 * norm, key
        assert (exact[key] - value).float().norm() > 0.02 * norm, key
        if dtype is BF16:
            assert (ours[key] == value).float().mean() > 0.99, key


STEPS, ROWS = 12, 64


def train(model: nn.Module, recipe: te.Recipe | None) -> list[float]:
    """Return the losses of a classifier of digits."""
    pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for rows in torch.arange(STEPS * ROWS).view(STEPS, ROWS):
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            scores = model((pixels[rows] / 16).float())
        loss = cross_entropy(scores, digits[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OURS)
def test_a_stack_trains_as_torchao_s(name: str) -> None:
    """Whole steps of four layers: the same losses and weights, and not those of FP32.

    With scales that are powers of two every bit was equal when this was written; sums
    in another order may change some. AdamW makes a whole step of a gradient whose sign
    one rounding turns, so weights drift apart where a scale's last bit differs.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(64, 128, bias=False), nn.ReLU()),
        *(nn.Linear(128, 128, bias=False), nn.GELU()),
        *(nn.Linear(128, 96, bias=False), nn.LayerNorm(96)),
        nn.Linear(96, 16, bias=False),
    )
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    recipes = {"theirs": None, "ours": OURS[name](), "FP32": None}
    models = {
        "theirs": to_torchao(model, name),
        "ours": to_emulator(model),
        "FP32": model,
    }
    losses = {key: train(models[key], recipe) for key, recipe in recipes.items()}
    ends = {
        key: nn.utils.parameters_to_vector(m.parameters()).detach() - start
        for key, m in models.items()
    }
    apart = {
        key: ((ends[key] - ends["theirs"]).norm() / ends["theirs"].norm()).item()
        for key in ("ours", "FP32")
    }

    assert losses["theirs"][-1] < 0.7 * losses["theirs"][0]
    assert apart["ours"] < apart["FP32"] / (2 if name == "tensorwise" else 10)
    for ours, theirs in zip(losses["ours"], losses["theirs"], strict=True):
        assert abs(ours / theirs - 1) < (2**-6 if name == "tensorwise" else 2**-9)
