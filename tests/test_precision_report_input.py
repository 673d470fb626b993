"""What snippets/precision_report takes and refuses, as read in its guide."""

import dataclasses
import math
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
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


class Wrapped(nn.Module):
    """Returns something else of what a model returns."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401
        """Run."""
        return self.change(self.model(x))


def test_batches_and_losses_of_every_form() -> None:
    """Tuples, dicts, a tensor; a loss of output and target, batch, model, or none."""
    x, y = data(6, 8), data(6, 4)
    model, linear = Returns(), nn.Linear(8, 4)

    def second(output: Output) -> Tensor:
        return F.mse_loss(output.logits, y)

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
        precision_report(model, (x, y), lambda model, batch: model(*batch)),
        precision_report(  # as Lightning's training_step
            model, (x, y), lambda out, target: {"loss": F.mse_loss(out.logits, target)}
        ),
        precision_report(model, {"x": x}, lambda out: Output(y, second(out))),
    ]

    assert [r.loss for r in losses] == pytest.approx([wanted] * len(losses))
    assert precision_report(linear, x, torch.sum).loss == pytest.approx(
        linear(x).sum().item()
    )


def wrapped(kind: str, model: nn.Module, tmp_path: Path) -> nn.Module:
    """Wrap a model as training does; a parallel one counts what it sends."""
    if kind == "Fabric":
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        setup: nn.Module = fabric.setup(model)
        return setup
    if kind == "compile, DataParallel":
        compiled: Any = torch.compile(model, backend="eager")
        return nn.DataParallel(compiled)
    if kind == "DataParallel":
        return nn.DataParallel(model)
    distributed.init_process_group(
        "gloo", f"file://{tmp_path}/store", rank=0, world_size=1
    )
    return DistributedDataParallel(model)


@pytest.mark.parametrize(
    "kind", ["Fabric", "DataParallel", "compile, DataParallel", "DDP"]
)
def test_a_wrapped_model_is_reported_as_the_model_within(
    kind: str, tmp_path: Path
) -> None:
    """The same rows by the same names, in FP32; no rank waits for another.

    The optimizer of the wrapper is the model's. Afterward the wrapper trains.
    """
    plain = precision_report(mlp(), (X, Y), F.mse_loss)
    model, sent = mlp(), []

    def send(
        _: object,
        bucket: distributed.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        sent.append(bucket.index())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    try:
        whole = wrapped(kind, model, tmp_path)
        if isinstance(whole, DistributedDataParallel):
            whole.register_comm_hook(None, send)
        optimizer = SGD(whole.parameters())
        report = precision_report(whole, (X, Y), F.mse_loss)
        stepped = precision_report(whole, (X, Y), F.mse_loss, optimizer=optimizer)

        assert report.to_dict() == plain.to_dict()
        assert stepped.hypothesis == "the next step of this SGD"
        assert not sent
        if kind == "DDP":
            F.mse_loss(whole(X), Y).backward()  # type: ignore[no-untyped-call]
            assert sent
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


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
        "whole": (model, good, lambda a, b: (a > b).sum(), {}, r"torch\.int64$"),
        "complex": (
            model,
            good,
            lambda a, b: (torch.complex(a, b) ** 2).mean(),
            {},
            r"a real number, got torch\.complex64: take abs",
        ),
        "no numbers": (
            model,
            good,
            lambda a, b: a[:0],
            {},
            r"\(0, 32\), which is empty",
        ),
        "pair": (
            model,
            good,
            lambda a, b: (mse(a, b), a),
            {},
            r"got tuple \(Tensor, Tensor\): let loss_fn return the loss alone, or",
        ),
        "pair of the model": (
            Wrapped(model, lambda y: (y.mean(), y)),
            X,
            None,
            {},
            r"got tuple \(Tensor, Tensor\): pick it by loss_fn, as in lambda output: ",
        ),
        "another name": (
            model,
            good,
            lambda a, b: {"mse": mse(a, b), "logits": a},
            {},
            r"got dict \(mse, logits\): let loss_fn return .* dict with 'loss'",
        ),
        "no return": (model, good, lambda a, b: None, {}, "returns None: has it a ret"),
        "no labels": (
            Returns(),
            {"x": data(6, 8)},
            None,
            {},
            "does the batch have lab",
        ),
        "empty": (model, (X[:0], Y[:0]), mse, {}, r"is empty: .* \(0, 32\), \(0, 32\)"),
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


def mse_of_boxes(output: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Add the boxes of a batch."""
    return F.mse_loss(output, target["y"]) + target["boxes"].sum()


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


@pytest.mark.parametrize("lr", ["1e-3", None, True, 1e-3j, [1e-3]])
def test_a_learning_rate_that_is_no_number_is_refused(lr: Any) -> None:  # noqa: ANN401
    """A text is not read, as one of a configuration; of NumPy or PyTorch it may be."""
    with pytest.raises(TypeError, match=r"lr must be a number such as 1e-3, got "):
        precision_report(mlp(), (X, Y), F.mse_loss, lr=lr)
    for number in (np.float32(0.5), torch.tensor(0.5)):
        report = precision_report(mlp(), (X, Y), F.mse_loss, lr=number)  # type: ignore[arg-type]
        assert report.hypothesis == "AdamW's first step with lr=0.5"


def test_a_tensor_without_numbers_is_no_empty_batch() -> None:
    """An image without boxes beside images that have numbers is usual."""
    boxes = torch.zeros(0, 4)
    report = precision_report(mlp(), (X, {"y": Y, "boxes": boxes}), mse_of_boxes)
    assert report.loss > 0
