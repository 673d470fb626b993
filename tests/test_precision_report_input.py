"""What snippets/precision_report takes and refuses, as read in its guide."""

import dataclasses
import math
from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD

from snippets.precision_report import precision_report


def data(*shape: int) -> Tensor:
    """Draw the same normal numbers every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def mlp() -> nn.Sequential:
    """Make a network for `data`, the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


X = data(64, 32)
Y = X.roll(1, 1) * 0.5


# --------------------------------------------------------------------- what it takes


@dataclasses.dataclass
class Output:
    """What some models return."""

    logits: Tensor
    loss: Tensor | None = None


class Returns(nn.Module):
    """Returns its loss in a dataclass; takes keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        """Run."""
        y = self.linear(x)
        return Output(y, None if labels is None else F.mse_loss(y, labels))


def test_batches_and_losses_of_every_form() -> None:
    """Tuples, dicts, a tensor; a loss of output and target, batch, model, or none."""
    x, y = data(6, 8), data(6, 4)
    model, linear = Returns(), nn.Linear(8, 4)
    wanted = F.mse_loss(model.linear(x), y).item()
    losses = [
        precision_report(model, {"x": x, "labels": y}),
        precision_report(model, UserDict(x=x, labels=y)),  # transformers' batches
        precision_report(model, (x, y)),
        precision_report(
            model, (x, y), lambda out, target: F.mse_loss(out.logits, target)
        ),
        precision_report(
            model, [x, y], lambda out, batch: F.mse_loss(out.logits, batch[1])
        ),
        precision_report(model, {"x": x}, lambda out: F.mse_loss(out.logits, y)),
        precision_report(model, (x, y), lambda model, batch: model(*batch).loss),
        precision_report(model.linear, (x, y), nn.MSELoss()),
    ]

    assert [r.loss for r in losses] == pytest.approx([wanted] * 8)
    assert precision_report(linear, x, torch.sum).loss == pytest.approx(
        linear(x).sum().item()
    )


# --------------------------------------------------------------------------- bad input


def bad_input() -> dict[str, tuple[Any, Any, Any, dict[str, Any], str]]:
    """Return arguments that are wrong, and what is said."""
    model, mse, good = mlp(), F.mse_loss, (X, Y)
    frozen, half = mlp().requires_grad_(requires_grad=False), mlp().bfloat16()
    meta, lazy = nn.Linear(2, 2, device="meta"), nn.LazyLinear(3)
    fp8 = {"formats": ["float8_e4m3"]}
    return {
        "batch": (model, (data(3, 5), Y), mse, {}, "`0` raises RuntimeError: mat1"),
        "keywords": (model, {"a": X}, mse, {}, "the model raises TypeError"),
        "target": (model, (X, Y[:3, :3]), mse, {}, "does not fit"),
        "shape": (model, good, lambda a, b: a - b, {}, r"scalar, got shape \(64, 32\)"),
        "number": (model, good, lambda a, b: 1.0, {}, "scalar tensor, got float"),
        "whole": (model, good, lambda a, b: (a > b).sum(), {}, r"torch\.int64"),
        "detached": (model, good, lambda a, b: a.detach().sum(), {}, "no gradients"),
        "half": (half, good, mse, {}, r"already: 0\.weight is torch\.bfloat16"),
        "frozen": (frozen, good, mse, {}, "no gradients: no parameter"),
        "none": (nn.ReLU(), good, mse, {}, "no gradients: no parameter"),
        "lazy": (lazy, good, mse, {}, "run a lazy model once"),
        "meta": (meta, good, mse, {}, "weight has no numbers yet"),
        "format": (model, good, mse, fp8, "did you mean 'float8_e4m3fn'"),
        "no format": (model, good, mse, {"formats": []}, "at least one"),
        "other": (
            model,
            good,
            mse,
            {"optimizer": SGD(mlp().parameters())},
            "no parameter",
        ),
        "closure": (
            model,
            good,
            mse,
            {"optimizer": LBFGS(model.parameters())},
            "LBFGS cannot step on its own",
        ),
        "lr": (model, good, mse, {"lr": math.nan}, "positive and finite, got nan"),
        "zero": (model, good, mse, {"lr": 0.0}, "lr must be positive"),
    }


@pytest.mark.parametrize("what", bad_input())
def test_bad_input_is_one_clear_error(what: str) -> None:
    """ValueError, in words; models are as they were (see the test of traces)."""
    model, batch, loss, options, words = bad_input()[what]
    with pytest.raises(ValueError, match=words):
        precision_report(model, batch, loss, **options)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_is_no_model_or_optimizer_is_refused() -> None:
    """TypeError."""
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        precision_report(lambda x: x, (X, Y), F.mse_loss)  # type: ignore[arg-type]
    traced: nn.Module = torch.jit.trace(mlp(), X)  # type: ignore[no-untyped-call]
    for scripted in (traced, nn.Sequential(torch.jit.script(mlp()))):
        with pytest.raises(TypeError, match="model is scripted or traced"):
            precision_report(scripted, (X, Y), F.mse_loss)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got float"):
        precision_report(mlp(), (X, Y), F.mse_loss, optimizer=0.1)  # type: ignore[arg-type]
