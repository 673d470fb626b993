"""Tests of snippets/precision_report, as read in guide/precision_report."""

import copy
import dataclasses
import json
import math
import random
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adadelta, Adagrad, AdamW, Optimizer, RMSprop
from torch.utils.checkpoint import checkpoint

from snippets import fp8 as te
from snippets import number_formats as nf
from snippets.precision_report import (
    FORMATS,
    PrecisionReport,
    Row,
    precision_report,
)
from snippets.precision_report.formats import round_, scales
from snippets.precision_report.judge import _FIXES
from snippets.true_half import lost_updates

ROOT = Path(__file__).parents[1]
FP16, BF16 = torch.float16, torch.bfloat16
Batch = tuple[Any, ...]
Loss = Callable[[Any, Any], Tensor]


# ----------------------------------------------------------- training in a precision


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """What a run needs; ``score`` is what counts, where that is not the loss."""

    model: nn.Module
    batch: Batch
    loss: Loss = F.mse_loss
    optimizer: Callable[[Any], Optimizer] | None = None  # AdamW with lr
    lr: float = 1e-2
    score: Loss | None = None
    steps: int = 30

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Make the optimizer over what trains."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        return (self.optimizer or (lambda p: AdamW(p, self.lr)))(parameters)

    def report(self, **options: Any) -> PrecisionReport:  # noqa: ANN401
        """Ask about this case."""
        optimizer = self.make_optimizer(self.model) if self.optimizer else None
        return precision_report(
            self.model,
            self.batch,
            self.loss,
            lr=self.lr,
            optimizer=optimizer,
            **options,
        )


def in_fp8(model: nn.Module) -> nn.Module:
    """Put the emulator's linear layers in the place of torch's, with their weights."""
    for name, child in model.named_children():
        fits = isinstance(child, nn.Linear) and not any(
            n % 32 for n in child.weight.shape
        )
        if isinstance(child, nn.Linear) and fits:
            linear = te.Linear(
                child.in_features, child.out_features, bias=child.bias is not None,
                params_dtype=torch.float32, device="cpu",
            )  # fmt: skip
            linear.load_state_dict(child.state_dict(), strict=False)
            for mine, theirs in zip(
                linear.parameters(), child.parameters(), strict=True
            ):
                mine.requires_grad_(theirs.requires_grad)
            setattr(model, name, linear)
        else:
            in_fp8(child)
    return model


RECIPES: dict[str, Callable[[], te.Recipe]] = {
    "fp8-delayed": te.DelayedScaling,
    "fp8-current": te.Float8CurrentScaling,
    "mxfp8": te.MXFP8BlockScaling,
}


def train(case: Case, mode: str, scale: float | None = None) -> float:
    """Really train in a mode; return by what share of FP32's first score it fell.

    NaN where a number of the way is NaN or Inf. ``scale`` is the first loss scale.
    """
    torch.manual_seed(1)
    model, batch = copy.deepcopy(case.model), case.batch
    context: Callable[[], Any] = nullcontext
    if mode.endswith("mixed"):
        dtype = FP16 if mode == "16-mixed" else BF16
        context = lambda: torch.autocast("cpu", dtype)  # noqa: E731
    elif mode.endswith("-true") and mode != "32-true":
        dtype = FP16 if mode == "16-true" else BF16
        model = model.to(dtype)
        batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
    elif mode in RECIPES:
        model, recipe = in_fp8(model), RECIPES[mode]()
        context = lambda: te.autocast(enabled=True, recipe=recipe)  # noqa: E731
    optimizer = case.make_optimizer(model)
    scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    score = case.score or case.loss
    with torch.no_grad():
        first = score(case.model(*case.batch[:-1]), case.batch[-1]).item()
    scores = []
    for _ in range(case.steps):
        optimizer.zero_grad()
        with context():
            output = model(*batch[:-1])
            loss = case.loss(output, batch[-1])
        scores.append(score(output, batch[-1]).item())
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
    if not all(map(math.isfinite, scores)):
        return math.nan
    return 1 - min(scores[-5:]) / first


@cache
def trained_in_fp32(case: Case) -> float:
    """Train once, however many modes are compared with it."""
    return train(case, "32-true")


def works(case: Case, mode: str, scale: float | None = None) -> bool:
    """Whether training in a mode gets four fifths of what FP32 gets."""
    try:
        got = train(case, mode, scale=scale)
    except RuntimeError:  # an operation refuses a number that the dtype has not
        return False
    wanted = trained_in_fp32(case)
    assert wanted > 0.2, f"FP32 itself learns nothing: {wanted}"
    return got > 0.8 * wanted


def fails(case: Case, mode: str, scale: float | None = None) -> bool:
    """Whether training in a mode gets less than half of what FP32 gets, or NaN."""
    try:
        got = train(case, mode, scale=scale)
    except RuntimeError:
        return True
    return not got > 0.5 * trained_in_fp32(case)


def data(*shape: int) -> Tensor:
    """Draw the same normal numbers every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def mlp(width: int = 32) -> nn.Sequential:
    """Make a network for `data`, the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32))


X = data(64, 32)
Y = X.roll(1, 1) * 0.5


# ------------------------------------------------------------------- planted faults


class Loud(nn.Module):
    """An activation beyond 65504, which a norm after it makes small again."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = (
            nn.Linear(32, 64),
            nn.LayerNorm(64),
            nn.Linear(64, 32),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = self.head(self.norm(self.body(x) * 3e5))
        return y


class Ids(nn.Module):
    """Numbers of words that come as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(2048, 16), nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Look words up."""
        y: Tensor = self.head(self.table(ids.long()))
        return y


class Normalized(nn.Module):
    """Rows divided by their sum plus 1e-8; rows of padding are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = self.head(8 * x / (x.abs().mean(-1, keepdim=True) + 1e-8))
        return y


class Masked(nn.Module):
    """Attention whose mask is -1e9."""

    def __init__(self, mask: float = -1e9) -> None:
        super().__init__()
        self.qkv, self.head, self.mask = nn.Linear(32, 96), nn.Linear(32, 32), mask

    def forward(self, x: Tensor) -> Tensor:
        """Attend to what came before."""
        q, k, v = self.qkv(x.view(8, 8, 32)).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 32**0.5
        future = torch.ones(8, 8, dtype=torch.bool).triu(1)
        y: Tensor = self.head(scores.masked_fill(future, self.mask).softmax(-1) @ v)
        return y.flatten(0, 1) + x


class Outlier(nn.Module):
    """A frozen layer one of whose inputs is ten million times the others."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(256, 64).requires_grad_(False)
        self.frozen.weight[:, 0] *= 1e-7
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = self.head(self.body(self.frozen(x)).relu())
        return y


class TwoHeads(nn.Module):
    """Two tasks in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = self.both(x)
        return y


class TinyWeights(nn.Module):
    """Weights of 1e-11 behind a gain of 1e9."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = nn.Linear(32, 32, bias=False)
        nn.init.normal_(self.tiny.weight, std=1e-11)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = self.tiny(x) * 1e9
        return y


def faint(output: Tensor, target: Tensor) -> Tensor:
    """Return a loss whose gradients are below 6e-8."""
    return 1e-6 * F.mse_loss(output, target)


def two_tasks(output: Tensor, target: Tensor) -> Tensor:
    """Weigh the second task by 1e-14."""
    first, second = (output - target).square().mean(0).chunk(2)
    return first.mean() + 1e-14 * second.mean()


def second_task(output: Tensor, target: Tensor) -> Tensor:
    """Return how far the second task is."""
    return (output.float() - target.float()).square().mean(0).chunk(2)[1].mean()


def sgd(lr: float) -> Callable[[Any], Optimizer]:
    """Make plain SGD, of which FP16 has no fear."""
    return lambda parameters: SGD(parameters, lr)


def faults() -> dict[str, tuple[Case, str, str, str]]:
    """Return each fault: a case, modes that fail and hold, words of the finding."""
    torch.manual_seed(0)
    ids = torch.arange(1025, 1153).float()
    parity = (torch.arange(128) % 2).long()
    padded = X * (torch.arange(64) % 8 > 0)[:, None]
    wide = data(64, 256)
    wide[:, 0] = 1e7
    small = lambda p: AdamW(p, 1e-2, eps=1e-30)  # noqa: E731
    return {
        "activations overflow": (
            Case(Loud(), (X, Y)), "16-mixed 16-true", "bf16-mixed fp8-current mxfp8",
            "`norm` input overflows float16",
        ),
        "updates are lost": (
            Case(mlp(), (X, Y), lr=1e-4, steps=400), "bf16-true", "bf16-mixed",
            "of all updates are lost",
        ),
        "whole numbers as floats": (
            Case(Ids(), (ids, parity), F.cross_entropy, sgd(5)), "bf16-true",
            "bf16-mixed 16-mixed", "changes whole numbers",
        ),
        "eps is zero": (
            Case(Normalized(), (padded, Y), optimizer=sgd(0.01)), "16-true",
            "16-mixed bf16-mixed", r"1e-08 in .*\(add.*is zero in float16",
        ),
        "mask is too large": (
            Case(Masked(), (X, Y), optimizer=sgd(0.5)), "16-mixed 16-true",
            "bf16-mixed bf16-true", r"-1e\+09 in .*\(masked_fill.*infinite in float16",
        ),
        "an outlier takes the scale": (
            Case(Outlier(), (wide, Y)), "fp8-current fp8-delayed", "bf16-mixed mxfp8",
            "`frozen` input underflows",
        ),
        "gradients are too far apart": (
            Case(TwoHeads(), (X, Y.repeat(1, 2)), two_tasks, small, score=second_task),
            "16-mixed fp8-current fp8-delayed", "bf16-mixed mxfp8",
            "no loss scale fits|grad_output underflows",
        ),
        "weights are too small": (
            Case(TinyWeights(), (X, Y), optimizer=lambda p: AdamW(p, 1e-10, eps=1e-30)),
            "16-mixed 16-true", "bf16-mixed bf16-true", "`tiny` weight underflows",
        ),
    }  # fmt: skip


FAULTS = faults()
SCALE = 2.0**16  # GradScaler's default


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told_and_its_training_fails(fault: str) -> None:
    """What the report calls unsafe fails when it is run; what it does not, holds."""
    case, unsafe, safe, words = FAULTS[fault]
    report = case.report()

    for mode in unsafe.split():
        verdict = report.verdicts[mode]
        assert verdict.level == "unsafe", str(report)
        worst = [f.text for f in verdict.findings if f.level == "unsafe"]
        assert any(re.search(words, text) for text in worst), str(report)
        assert fails(case, mode, SCALE if mode == "16-mixed" else None), mode
    for mode in safe.split():
        assert report.verdicts[mode].is_safe, f"{fault}, {mode}: {report}"
        assert works(case, mode, SCALE if mode == "16-mixed" else None), mode


@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_gradients_below_fp16_need_the_loss_scale_that_the_report_names(
    scale: float | None,
) -> None:
    """Nothing is learned without one; with one in the report's range, as in FP32."""
    case = Case(mlp(), (X, Y), faint, lambda p: AdamW(p, 1e-2, eps=1e-20))
    report = case.report()
    verdict = report.verdicts["16-mixed"]
    assert verdict.level == "safe"
    assert verdict.loss_scale is not None
    low, high = verdict.loss_scale

    assert 4 <= low < 16 <= high
    assert f"safe with loss scaling ≥ 2^{low}" in str(report)
    if scale:
        assert works(case, "16-mixed", scale)
        assert works(case, "16-mixed", 2.0**low)
    else:
        assert fails(case, "16-mixed")
        assert works(case, "bf16-mixed")


@pytest.mark.parametrize("dead", [False, True])
def test_adam_in_fp16_divides_zero_by_zero_for_a_dead_input(dead: bool) -> None:
    """All gradients are large, but for an input that is always 0: 0 / (0 + 0)."""
    model, x = nn.Linear(32, 4), X + 3
    nn.init.zeros_(model.weight)
    x[:, 0] *= not dead
    case = Case(model, (x, Y[:, :4] + 3))
    verdict = case.report().verdicts["16-true"]

    assert verdict.is_safe != dead, verdict
    assert (fails if dead else works)(case, "16-true")


def test_adam_in_fp16_becomes_nan_as_foretold() -> None:
    """A healthy network, AdamW's defaults, weights in FP16: NaN; SGD holds."""
    adam, plain = (
        Case(mlp(), (X, Y)),
        Case(mlp(), (X, Y), optimizer=lambda p: SGD(p, 1.0)),
    )

    assert adam.report().verdicts["16-true"].level == "unsafe"
    assert "Adam divides by eps=1e-08" in adam.report().verdicts["16-true"].text
    assert math.isnan(train(adam, "16-true"))
    assert plain.report().verdicts["16-true"].is_safe
    assert works(plain, "16-true")


OPTIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "RMSprop": (lambda p: RMSprop(p, 1e-3), "unsafe"),
    "Adagrad": (lambda p: Adagrad(p, 1e-2), "unsafe"),
    "AdamW, eps=1e-6": (lambda p: AdamW(p, 1e-2, eps=1e-6), "unsafe"),
    "RMSprop, eps=1e-4": (lambda p: RMSprop(p, 1e-3, eps=1e-4), "safe"),
    "AdamW, eps=1e-4": (lambda p: AdamW(p, 1e-2, eps=1e-4), "caution"),
    "Adadelta": (lambda p: Adadelta(p, 1.0), "safe"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_in_fp16_hold_or_not_as_foretold(name: str) -> None:
    """Whoever divides by a root plus eps fails as Adam does, unless eps is large."""
    make, level = OPTIMIZERS[name]
    x, kinds = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    case = Case(model, (x, kinds), F.cross_entropy, make)
    verdict = case.report().verdicts["16-true"]

    divides = [f for f in verdict.findings if " divides by eps=" in f.text]
    assert [f.level for f in divides] == ([level] if level != "safe" else [])
    if divides:
        assert divides[0].text.startswith(name.partition(",")[0].removesuffix("W"))
    assert verdict.is_safe == (level != "unsafe"), verdict
    assert (fails if level == "unsafe" else works)(case, "16-true")


@pytest.mark.parametrize("rows", [24, 32, 33])
@pytest.mark.parametrize("wide", [(32, 32), (32, 20), (48, 32), (20, 32)])
def test_shapes_that_fp8_refuses_are_noted(rows: int, wide: tuple[int, int]) -> None:
    """A note for each recipe that the emulator, as Transformer Engine, raises for."""
    model = nn.Linear(*wide)
    case = Case(nn.Sequential(model), (data(rows, wide[0]), data(rows, wide[1])))
    for mode, verdict in case.report().verdicts.items():
        if mode in RECIPES:
            noted = any("FP8 needs multiples" in f.text for f in verdict.findings)
            linear = te.Linear(*wide, params_dtype=torch.float32, device="cpu")
            refused: Any = pytest.raises(ValueError, match="divisible")
            with (
                refused if noted else nullcontext(),
                te.autocast(enabled=True, recipe=RECIPES[mode]()),
            ):
                torch.autograd.backward(linear(case.batch[0]).sum())


# ------------------------------------------------------------------ healthy models


class Tied(nn.Module):
    """A language model whose table embeds and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        nn.init.normal_(self.table.weight, std=0.1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """Score the next word."""
        y: Tensor = self.head(self.body(self.table(x)))
        return y.transpose(1, 2)


class Recurrent(nn.Module):
    """An LSTM that classifies a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Read, and judge by the last state."""
        y: Tensor = self.head(self.lstm(x)[0][:, -1])
        return y


class Residual(nn.Module):
    """Four blocks with norms around skips."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU())
            for _ in "abcd"
        ]
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.head(x)
        return y


class Bag(nn.Module):
    """Embeddings of words, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        y: Tensor = self.head(self.table(x).mean(1))
        return y


class Attention(nn.Module):
    """Multi-head attention with a causal mask of -Inf."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = (
            nn.MultiheadAttention(32, 4, batch_first=True),
            nn.Linear(32, 32),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        mask = torch.ones(8, 8, dtype=torch.bool).triu(1)
        y: Tensor = self.head(x + self.attention(x, x, x, attn_mask=mask)[0])
        return y


def healthy() -> dict[str, Case]:
    """Make ten networks as people train them."""
    torch.manual_seed(0)
    kinds = (X[:, :8].argmax(1) % 8).long()
    words = torch.randint(64, (32, 9), generator=torch.Generator().manual_seed(3))
    images, sequence = data(64, 1, 8, 8), data(32, 8, 32)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    return {
        "mlp": Case(mlp(), (X, kinds), F.cross_entropy),
        "regression": Case(mlp(64), (X, Y)),
        "cnn": Case(
            nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
                nn.Flatten(), nn.Linear(128, 32),
            ), (images, images.flatten(1).argmax(1) % 32), F.cross_entropy,
        ),
        "encoder": Case(
            nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False),
            (sequence, sequence.roll(1, 1) / 2),
        ),
        "lstm": Case(Recurrent(), (sequence, sequence[:, -1] / 2)),
        "autoencoder": Case(
            nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(),
                          nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), (X, X),
        ),
        "tied lm": Case(Tied(), (words[:, :-1], words[:, 1:]), F.cross_entropy),
        "residual": Case(Residual(), (X, Y)),
        "embeddings": Case(Bag(), (words, words[:, 0] % 32), F.cross_entropy),
        "attention": Case(Attention(), (sequence, sequence + sequence.mean(1, True))),
    }  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """Return 256 images of 64 pixels, and which digit each shows."""
    x, kinds = load_digits(return_X_y=True)
    return torch.tensor(x[:256] / 16).float(), torch.tensor(kinds[:256])


class Radial(nn.Module):
    """Features exp(-d**2), of which most are tiny in any one row."""

    def __init__(self, centers: Tensor) -> None:
        super().__init__()
        self.centers, self.head = nn.Parameter(centers.clone()), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Run, with the distances in FP32."""
        distances = torch.cdist(x.float(), self.centers.float())
        y: Tensor = self.head((-3 * distances.square()).exp())
        return y


class Sharp(nn.Module):
    """Loud logits: where the answer is right, softmax has a gradient of nearly 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 128), nn.Linear(128, 10)
        self.body.weight.data.mul_(60)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = self.head(F.gelu(self.body(x)))
        return y


class Hot(nn.Module):
    """A softmax inside, so sharp that most of its numbers are tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.body.weight.data.mul_(40)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = self.head(self.body(x).softmax(-1))
        return y


@pytest.mark.parametrize("kind", ["radial", "sharp", "hot"])
def test_small_numbers_beside_large_ones_are_no_alarm(kind: str) -> None:
    """Most of an input or a gradient underflows, of each feature the largest stays."""
    x, kinds = digits()
    torch.manual_seed(0)
    model = {"radial": lambda: Radial(x[:128]), "sharp": Sharp, "hot": Hot}[kind]()
    case = Case(model, (x, kinds), F.cross_entropy, lr=3e-2, steps=40)
    report = case.report()

    module, what = {
        "radial": ("head", "input"),
        "sharp": ("", "grad_output"),
        "hot": ("body", "grad_output"),
    }[kind]
    stats = find(report, module, what).formats
    assert (stats["float16"]["underflow"] or 0.0) > 0.25
    for mode, scale in (("16-mixed", SCALE), ("bf16-mixed", None)):
        assert report.verdicts[mode].is_safe, str(report)
        assert works(case, mode, scale), mode


@pytest.mark.parametrize("channels", [True, False])
def test_a_feature_that_is_lost_whole_is_an_alarm(channels: bool) -> None:
    """A third of the channels, or of the last places, are below FP16 in every row."""
    x = data(300, 24, 4, 4) if channels else data(300, 4, 96)
    third = x[:, :8] if channels else x[..., :32]
    third *= 1e-12
    model = nn.Conv2d(24, 8, 1) if channels else nn.Linear(96, 8)
    report = precision_report(model, x, lambda y: y.square().mean())
    stats = find(report, "", "input").formats["float16"]

    # 128 lines of 32 numbers are drawn: within three standard deviations.
    assert stats["features_lost"] == pytest.approx(1 / 3, abs=0.13)
    assert stats["underflow"] == stats["features_lost"]
    assert "`model` input underflows" in report.verdicts["16-mixed"].text


HEALTHY = healthy()
each_healthy = pytest.mark.parametrize("name", HEALTHY)


@each_healthy
def test_a_healthy_model_raises_no_alarm_and_trains(name: str) -> None:
    """Every mode but 16-true, AdamW's own fault, is safe; and training agrees."""
    case = HEALTHY[name]
    report = case.report()

    for mode, verdict in report.verdicts.items():
        if mode == "16-true":
            continue
        assert verdict.level in {"safe", "caution"}, f"{mode}: {report}"
        if mode != "bf16-true":
            assert verdict.level == "safe", f"{mode}: {report}"
        if (name, mode) != ("lstm", "16-mixed"):  # oneDNN has no LSTM in FP16
            assert works(case, mode, SCALE if mode == "16-mixed" else None), mode
    assert report.recommendation == "bf16-mixed"


# ---------------------------------------------------------------------- nothing stays


class Everything(nn.Module):
    """All that is hard: norms, dropout, buffers, attributes, frozen and idle parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.block = nn.Sequential(
            nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.2)
        )
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.idle = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(1))
        self.last = self.first
        self.calls, self.way = 0, "none"
        self.history: list[int] = []
        self.cache: dict[str, Tensor] = {}
        self.running = torch.zeros(3)

    def forward(self, x: Tensor, mode: str = "plain") -> dict[str, Any]:
        """Run, and leave traces everywhere."""
        self.calls += 1
        self.seen = self.seen + 1
        self.history.append(self.calls)
        self.cache["x"] = x
        self.running += 1
        self.first.register_forward_hook(lambda *_: None)
        self.frozen.weight.data.mul_(0.5)
        _ = random.random(), np.random.rand()  # noqa: NPY002 - the state that has to stay
        x = self.dropout(self.norm(self.first(x)))
        if self.way != "none":
            x = checkpoint(self.block, x, use_reentrant=self.way == "reentrant")
        else:
            x = self.block(x)
        x = self.twice(self.twice(self.frozen(x)))
        return {"out": (x, [x * 2]), "name": mode}


def everything_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Take one of the outputs."""
    loss: Tensor = model(batch)["out"][0].square().mean()
    return loss


def state(model: nn.Module, x: Tensor) -> list[Any]:
    """List all that must not change, bit for bit."""

    def bits(t: Tensor | None) -> Any:  # noqa: ANN401
        return None if t is None else (id(t), t.detach().numpy().tobytes())

    return [
        [(n, bits(p), bits(p.grad)) for n, p in model.named_parameters()],
        [(n, bits(b)) for n, b in model.named_buffers()],
        [(m.training, *m.__dict__, len(m._forward_hooks)) for m in model.modules()],
        getattr(model, "calls", 0), bits(x), bits(x.grad),
        [*getattr(model, "history", ())], [*getattr(model, "cache", ())],
        getattr(model, "running", torch.zeros(0)).tolist(),
        torch.get_rng_state().tolist(), random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),  # noqa: NPY002
        [
            len(value)
            for name, value in vars(torch.nn.modules.module).items()
            if name.startswith("_global_") and isinstance(value, dict)
        ],
        torch.is_grad_enabled(), torch.get_default_dtype(),
    ]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["none", "reentrant", "new"])
@pytest.mark.parametrize("ends", ["well", "in the model", "in the loss", "in backward"])
def test_the_report_leaves_no_trace(training: bool, way: str, ends: str) -> None:
    """Parameters, gradients, buffers, attributes, modes, hooks, RNG, the batch."""
    model = Everything().train(training)
    x = data(16, 8).requires_grad_()
    torch.autograd.backward(everything_loss(model, x))
    model.way = way
    before = state(model, x)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        loss = everything_loss(model, batch)
        if ends == "in the loss":
            raise KeyError("no such thing")
        if ends == "in backward":
            loss.register_hook(lambda _: 1 / 0)  # type: ignore[no-untyped-call]
        return loss[None, None].expand(2, 2) if ends == "in the model" else loss

    expected: Any = nullcontext()
    if ends == "in backward":
        expected = pytest.raises(ZeroDivisionError)
    elif ends != "well":
        expected = pytest.raises(ValueError, match=r"loss must be a scalar|KeyError")
    with expected:
        precision_report(model, x, loss_fn)

    assert state(model, x) == before


def test_hooks_of_the_reader_do_not_step_an_optimizer() -> None:
    """What runs when a gradient has arrived, such as a step, is left out."""
    model = mlp()
    optimizer, called = SGD(model.parameters(), 1.0), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda _: called.append(optimizer.step())
        )
    before = copy.deepcopy(model.state_dict())

    precision_report(model, (X, Y), F.mse_loss)

    assert not called
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    torch.autograd.backward(F.mse_loss(model(X), Y))
    changed = next(model.parameters())
    assert not torch.equal(changed, before["0.weight"]), "and is there again"


@pytest.mark.parametrize("make", [lambda p: AdamW(p, 1e-3), lambda p: SGD(p, 0.1, 0.9)])
def test_an_optimizers_next_step_is_foretold_and_not_taken(
    make: Callable[[Any], Optimizer],
) -> None:
    """The amax of an update is that of the step that follows, with its schedule."""
    model = mlp()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(model(X), Y))
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    before, weights = (
        copy.deepcopy(optimizer.state_dict()),
        copy.deepcopy(model.state_dict()),
    )

    report = precision_report(model, (X, Y), F.mse_loss, optimizer=optimizer)

    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    assert f"the next step of this {type(optimizer).__name__}" == report.hypothesis
    torch.autograd.backward(F.mse_loss(model(X), Y))
    optimizer.step()
    for name, parameter in model.named_parameters():
        step = parameter - weights[name]
        row = find(report, name.split(".")[0], "update", name.split(".")[1])
        assert row.amax == pytest.approx(step.abs().max().item(), rel=1e-5)


# --------------------------------------------------------------------- what it counts


def find(report: PrecisionReport, module: str, kind: str, tensor: str = "") -> Row:
    """Return one row."""
    (row,) = [
        r for r in report.rows if (r.module, r.kind, r.tensor) == (module, kind, tensor)
    ]
    return row


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_that_of_the_number_formats(name: str) -> None:
    """Every format against snippets.number_formats, over its range and around it."""
    fmt = FORMATS[name]
    known = nf.FORMATS.get(name) or nf.BLOCK_FORMATS[name].element
    info = nf.finfo(known)
    magnitudes = torch.exp2(
        torch.linspace(math.log2(fmt.zero) - 3, math.log2(fmt.max), 4001).double()
    )
    x = torch.cat([magnitudes, -magnitudes, torch.zeros(1).double()])
    x = torch.cat([x, nf.round_to(x, known), nf.neighbours(x, known)[0]])
    x = x[x.isfinite()]

    rounded = round_(x, fmt)

    assert torch.equal(rounded.clamp(-fmt.max, fmt.max), nf.round_to(x, known))
    assert (fmt.max, fmt.mantissa_bits) == (info.max, known.mantissa_bits)
    assert fmt.min_exponent == math.log2(info.smallest_normal)
    zero = torch.tensor([fmt.zero, fmt.zero * 1.01]).double()
    assert nf.round_to(zero, known).count_nonzero() == 1
    over = torch.tensor([fmt.overflow]).double()
    if fmt.block is None:
        assert round_(over, fmt) > fmt.max >= round_(over * (1 - 2**-40), fmt)


def test_scales_of_blocks_are_those_of_the_number_formats() -> None:
    """MX: the same powers of two, for blocks from 2^-30 to 2^30 and for zeros."""
    x = data(64, 32) * torch.exp2(torch.linspace(-30, 30, 64))[:, None]
    x[5] = 0
    for name, fmt in FORMATS.items():
        if fmt.block:
            blocks = nf.quantize_blocks(x, name)
            wanted = nf.decode(blocks.scales, nf.BLOCK_FORMATS[name].scale)
            mine = scales(fmt, x.abs().amax(1).double())
            torch.testing.assert_close(1 / mine, wanted[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(7,), (33, 5), (64, 64), (300, 200)])
def test_shares_are_those_of_a_cast(size: tuple[int, ...]) -> None:
    """Underflow, overflow, SQNR and amax of an input; exact if small, else sampled."""
    x = data(*size) * torch.exp2(30 * torch.rand(size) - 20).clamp(max=2.0**17)
    model = nn.Linear(size[-1], 1)
    report = precision_report(model, x, lambda y: y.abs().sqrt().mean())
    row = find(report, "", "input")
    # A share p of n samples, in blocks that are drawn at random.
    error = 0.0 if x.numel() <= 4096 else 5 / (2 * 4096**0.5)

    assert row.amax == x.abs().max()
    for fmt, dtype in (("float16", FP16), ("bfloat16", BF16)):
        cast = x.to(dtype).float()
        stats = row.formats[fmt]
        limit = torch.finfo(dtype).max
        assert stats["underflow"] == pytest.approx(
            ((cast == 0) & (x != 0)).double().mean().item(), abs=error
        )
        assert stats["overflow"] == pytest.approx(
            cast.isinf().double().mean().item(), abs=error
        )
        noise = (cast.clamp(-limit, limit) - x).double().square().sum()
        sqnr = 10 * torch.log10(x.double().square().sum() / noise).item()
        assert stats["sqnr_db"] == pytest.approx(sqnr, abs=0.001 if not error else 6)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_shares_change_at_the_very_number_where_a_cast_does(name: str) -> None:
    """The largest that is cast to zero, the smallest that is cast to Inf; and next."""
    model, fmt, dtype = nn.Linear(64, 1), FORMATS[name], getattr(torch, name)
    nn.init.zeros_(model.weight)
    for end, what in ((fmt.zero, "underflow"), (fmt.overflow, "overflow")):
        for toward in (0.0, end, math.inf):
            x = torch.nextafter(torch.tensor(end), torch.tensor(toward)).expand(80, 64)
            cast = x[0, 0].to(dtype)
            there = cast == 0 if what == "underflow" else cast.isinf()
            report = precision_report(model, x, torch.mean, [name])
            stats = find(report, "", "input").formats[name]
            assert stats[what] == there.item(), (what, toward)
            assert stats["features_lost"] == (cast == 0).item(), (what, toward)


class Heads(nn.Module):
    """Normalizes two views of one tensor, as attention does with queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(16, 32, bias=False)
        self.query, self.key = nn.LayerNorm(16), nn.LayerNorm(16)
        self.both.weight.data[16:] *= 1e6

    def forward(self, x: Tensor) -> Tensor:
        """Compare."""
        query, key = self.both(x).chunk(2, -1)
        scores: Tensor = self.query(query) * self.key(key)
        return scores


def test_each_view_of_a_tensor_has_its_own_numbers() -> None:
    """Parts of one output, and two weights in one storage, are told apart."""
    model, x = Heads(), data(8, 16)
    report = precision_report(model, x, torch.mean)
    query, key = model.both(x).chunk(2, -1)
    assert find(report, "query", "input").amax == query.abs().max()
    assert find(report, "key", "input").amax == key.abs().max()
    assert find(report, "query", "input").share("float16", "overflow") == 0
    assert find(report, "key", "input").share("float16", "overflow") > 0

    flat = torch.cat([torch.full((16,), 3.0), torch.full((16,), 1e-9)]).view(2, 4, 4)
    twins = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)))
    for layer, weight in zip(twins, flat, strict=True):
        layer.weight = nn.Parameter(weight)
    report = precision_report(twins, data(4, 4), torch.mean)
    for name, lost in (("0", 1.0), ("1", 0.0)):
        assert find(report, name, "weight", "weight").amax == flat[int(name)].max()
        assert find(report, name, "update", "weight").share("bfloat16", "lost") == lost


@pytest.mark.parametrize("make", [None, lambda p: AdamW(p, 1e-3, weight_decay=0)])
def test_amax_is_of_all_numbers_and_not_of_the_sample(
    make: Callable[[Any], Optimizer] | None,
) -> None:
    """One row of an embedding moves; one number lies beside a mask; one is a half."""
    model = nn.Sequential(nn.Embedding(4096, 64), nn.Linear(64, 1))
    optimizer = make(model.parameters()) if make else None
    report = precision_report(
        model, torch.tensor([7]), lambda y: y.mean(), lr=1e-3, optimizer=optimizer
    )
    row = find(report, "0", "update", "weight")
    assert row.amax == pytest.approx(1e-3, rel=1e-3)
    assert row.sampled == 4096

    x = torch.ones(300, 300)
    x[17, 19], x[20, 20] = 7.5, torch.finfo(torch.float32).min
    report = precision_report(nn.Linear(300, 1), x, lambda y: y.clamp(-1, 1).mean())
    assert find(report, "", "input").amax == 7.5
    x[20, 20] = 1
    report = precision_report(nn.Linear(300, 1), x, lambda y: y.mean())
    assert not find(report, "", "input").is_integer


@pytest.mark.parametrize(("like", "error"), [(1, 0.0078), (32, 0.0442)])
def test_a_share_is_off_by_what_the_page_says(like: int, error: float) -> None:
    """One standard error: of 4,096 numbers, and of 128 lines of 32 that are alike."""
    model, off = nn.Linear(32, 1), []
    for size in range(400, 440):  # each size is sampled in places of its own
        is_small = torch.rand(size * 32 // like) < 0.5
        x = torch.where(is_small, 1e-9, 1.0).repeat_interleave(like).view(size, 32)
        row = find(precision_report(model, x, torch.mean, "float16"), "", "input")
        share = is_small.double().mean().item()
        off.append(row.share("float16", "underflow") - share)
    rms = torch.tensor(off).square().mean().sqrt().item()
    assert 0.6 * error < rms < 1.4 * error


def test_numbers_that_a_format_has_leave_no_error() -> None:
    """Not even float64's own, which a scale makes; and none is too large for it."""
    x = torch.full((8, 8), 0.1)
    row = find(precision_report(nn.Linear(8, 1), x, torch.mean), "", "input")
    assert row.formats["float8_e4m3fn"]["sqnr_db"] is None
    assert row.formats["float16"]["sqnr_db"] == pytest.approx(
        -20 * math.log10(abs(0.1 - float(torch.tensor(0.1).half())) / 0.1), abs=1e-3
    )

    model, huge = nn.Linear(8, 1).double(), torch.ones(8, 8).double() * 1e300
    report = precision_report(model, huge, lambda y: y.sigmoid().mean())
    row = find(report, "", "input")
    assert row.amax == 1e300
    assert row.formats["bfloat16"]["overflow"] == 1
    assert row.formats["float8_e5m2"]["underflow"] == 0
    assert row.histogram == {130: 64}  # 130 is the last


def test_its_own_operations_are_not_the_models() -> None:
    """All that is beyond FP16 here goes into or out of a module: nothing is inside."""
    report = precision_report(Loud(), (X * 1e6, Y), F.mse_loss)

    assert find(report, "norm", "input").amax > 65504
    assert not [row for row in report.rows if row.kind == "inside"], str(report)


def test_fp8_shares_are_the_emulators() -> None:
    """Per-tensor current scaling of an input, as the emulator does it."""
    x = data(64, 64) * torch.exp2(40 * torch.rand(64, 64) - 30)
    row = find(precision_report(nn.Linear(64, 1), x, lambda y: y.mean()), "", "input")

    for name, dtype in (
        ("float8_e4m3fn", torch.float8_e4m3fn),
        ("float8_e5m2", torch.float8_e5m2),
    ):
        quantizer = te.Float8CurrentScalingQuantizer(dtype)
        there = quantizer(x).dequantize()
        share = ((there == 0) & (x != 0)).double().mean().item()
        assert row.formats[name]["underflow"] == pytest.approx(share, abs=1 / 4096)
        assert share > 0.01


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_lost_updates_are_those_of_true_half(dtype: torch.dtype) -> None:
    """Up and down, as snippets.true_half.lost_updates counts, on one known gradient."""
    model = nn.Linear(50, 60, bias=False)
    report = precision_report(model, data(4, 50), lambda y: y.sum() * 0.5, lr=1e-3)
    weight, name = model.weight.detach(), str(dtype).removeprefix("torch.")
    update = -1e-3 * data(4, 50).sum(0).sign()
    low = weight.to(dtype)
    lost = ((low.float() + update).to(dtype) == low).float().mean().item()

    row = find(report, "", "update", "weight")

    assert row.formats[name]["lost"] == pytest.approx(lost)
    both = lost_updates(model, 1e-3, dtype=dtype)["weight"]
    assert row.formats[name]["lost"] == pytest.approx(both, abs=0.05)


def test_a_loss_scale_is_the_power_that_keeps_all_but_a_twentieth() -> None:
    """One gradient of known exponents: the smallest power, and the largest, by hand."""
    model = nn.Linear(100, 1, bias=False)
    x = torch.exp2(-torch.arange(100).double() / 8).float()[None]  # 1 to 2^-12.4
    report = precision_report(model, x, lambda y: y.sum() * 2.0**-10)
    verdict = report.verdicts["16-mixed"]
    assert verdict.loss_scale is not None
    low, high = verdict.loss_scale
    grad = x * 2.0**-10

    def lost(k: int) -> float:
        return ((grad * 2.0**k) < 2.0**-24).double().mean().item()

    assert lost(low) <= 0.05 < lost(low - 1)
    assert (grad * 2.0**high).max() <= 65504 < (grad * 2.0 ** (high + 1)).max()


def test_rows_have_every_kind_and_module() -> None:
    """Tied weights once, frozen ones without gradients, idle ones in the notes."""
    model = Everything()
    report = precision_report(model, data(16, 8), everything_loss)
    kinds = {(r.module, r.kind) for r in report.rows}

    for kind in ("input", "output", "grad_output", "weight", "grad_weight", "update"):
        assert ("twice", kind) in kinds
    assert find(report, "twice", "input", "").calls == 2
    assert ("frozen", "weight") in kinds
    assert ("frozen", "grad_output") in kinds
    assert ("frozen", "update") not in kinds
    assert ("idle", "grad_weight") not in kinds
    assert sum("idle" in note for note in report.notes) == 2
    assert find(report, "norm", "weight", "running_var").amax > 0
    lm = HEALTHY["tied lm"].report()
    tied = [row.module for row in lm.rows if row.kind == "weight"]
    assert "table" in tied
    assert "head" not in tied


@pytest.mark.parametrize("way", ["reentrant", "new"])
def test_a_checkpointed_block_is_as_it_is_without(way: str) -> None:
    """The same rows, one by one, for both kinds of checkpoint."""
    x = data(16, 8).requires_grad_()
    model = Everything().eval()
    plain = precision_report(model, x, everything_loss)
    model.way = way
    again = precision_report(model, x, everything_loss)

    keys = [(r.module, r.kind, r.tensor) for r in plain.rows]
    assert keys == [(r.module, r.kind, r.tensor) for r in again.rows]
    for one, two in zip(plain.rows, again.rows, strict=True):
        assert one.formats == two.formats, one
        assert (one.low, one.calls) == (two.low, two.calls), one


def test_fp32_that_is_broken_is_named_with_its_place() -> None:
    """log(0) in the forward pass, sqrt at 0 in the backward pass."""

    class Broken(nn.Module):
        def __init__(self, where: str) -> None:
            super().__init__()
            self.body, self.bad, self.where = nn.Linear(8, 8), nn.ReLU(), where

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.bad(self.body(x)) * 0
            return (y.log() * 0 if self.where == "forward" else y.sqrt()).sum()

    forward = precision_report(Broken("forward"), data(4, 8))
    backward = precision_report(Broken("backward"), data(4, 8))

    assert forward.broken == "`model` (mul)"
    assert re.match("`bad` .grad_output", backward.broken)
    for report in (forward, backward):
        assert {v.level for v in report.verdicts.values()} == {"unsafe"}
        assert "FP32 itself makes NaN or Inf" in str(report)
        assert report.recommendation == "32-true"
        json.dumps(report.to_dict(), allow_nan=False)


def test_masks_that_adapt_are_no_alarm() -> None:
    """torch.finfo(x.dtype).min, and -Inf, are what a mask should be."""
    for mask in (torch.finfo(torch.float32).min, -math.inf):
        report = precision_report(Masked(mask), (X, Y), F.mse_loss)
        assert report.verdicts["16-mixed"].level == "safe", str(report)
        assert not report.constants


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -math.inf])
def test_a_mask_that_goes_into_a_module_is_no_alarm(mask: float) -> None:
    """It is no overflow, and the scores of a column that it hides at times are kept."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.softmax = nn.Linear(32, 96), nn.Softmax(-1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.view(8, 8, 32)).chunk(3, -1)
            future = torch.ones(8, 8, dtype=torch.bool).triu(1)
            scores = (q @ k.mT / 32**0.5).masked_fill(future, mask)
            y: Tensor = self.softmax(scores) @ v
            return y.flatten(0, 1)

    report = precision_report(Module(), (X, Y), F.mse_loss)
    row = find(report, "softmax", "input")
    assert 0 < row.amax < 100
    assert row.share("float16", "features_lost") == 0
    assert {v.level for n, v in report.verdicts.items() if n != "16-true"} == {"safe"}


def test_a_bias_whose_gradient_is_only_rounding_needs_no_loss_scale() -> None:
    """One of keys moves all scores of a row alike, so softmax gives it no gradient."""

    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x.view(8, 8, 32)) for layer in (self.q, self.k, self.v))
            y: Tensor = (q @ k.mT / 32**0.5).softmax(-1) @ v
            return y.flatten(0, 1)

    torch.manual_seed(0)
    report = precision_report(Keys(), (X, Y), lambda y, x: F.mse_loss(y, x) / 256)
    bias = next(
        r
        for r in report.rows
        if (r.module, r.kind, r.tensor) == ("k", "grad_weight", "bias")
    )
    assert 0 < bias.amax < 64 * 2**-24 * find(report, "k", "grad_output").amax
    verdict = report.verdicts["16-mixed"]
    needed = [f for f in verdict.findings if f.module == "k"]
    assert verdict.level == "safe"
    assert not any("(bias)" in finding.text for finding in needed)


def test_what_is_asked_for_in_float32_is_not_in_16_bits() -> None:
    """A running maximum of -1e38, in FP32 by name, fits; one like the scores not."""

    class Running(nn.Module):
        def __init__(self, dtype: torch.dtype | None) -> None:
            super().__init__()
            self.layer, self.dtype = nn.Linear(32, 32), dtype

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y.maximum(torch.zeros_like(y, dtype=self.dtype) - 1e38)

    for dtype, level in ((torch.float32, "safe"), (None, "unsafe")):
        report = precision_report(Running(dtype), (X, Y), F.mse_loss)
        assert report.verdicts["16-mixed"].level == level


class Island(nn.Module):
    """A block whose numbers are beyond FP16, in one way or another kept in FP32."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.loud, self.quiet = way, nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 16)
        nn.init.normal_(self.loud.weight, std=4e4)
        self.decorated = torch.autocast("cpu", enabled=False)(self.inner)

    def inner(self, x: Tensor) -> Tensor:
        """Make large numbers small again."""
        y: Tensor = self.quiet(self.loud(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        if self.way == "none":
            y = self.inner(x)
        elif self.way == "decorator":
            y = self.decorated(x.float())
        elif self.way == "a device that is absent":
            with torch.autocast("cuda", enabled=False):
                y = self.inner(x.float())
        elif self.way == "left again":
            with torch.autocast("cpu", enabled=False), torch.autocast("cpu", FP16):
                y = self.inner(x)
        else:
            with torch.autocast("cpu", enabled=False):
                y = self.inner(x.float())
        out: Tensor = self.head(y)
        return out


@pytest.mark.parametrize(
    ("way", "holds"),
    [("none", False), ("left again", False), ("block", True), ("decorator", True)],
)
def test_blocks_without_autocast_are_seen(way: str, holds: bool) -> None:
    """FP16 by autocast is finite where the report says that it is safe."""
    torch.manual_seed(0)
    model, x = Island(way), data(8, 16)
    verdict = precision_report(model, x, lambda y: y.mean()).verdicts["16-mixed"]
    with torch.autocast("cpu", FP16):
        output = model(x)
    assert verdict.is_safe == holds == bool(output.isfinite().all()), str(verdict)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_of_the_reader_is_followed_and_left_as_it_was() -> None:
    """The step is in FP32; a block for a GPU that is absent is no island; no trace."""
    kind: Any = torch.amp.autocast_mode.autocast
    before = dict(vars(kind)), dict(vars(Tensor))
    seen = []

    def step(device: str) -> Callable[[nn.Module, Any], Tensor]:
        def run(model: nn.Module, batch: Tensor) -> Tensor:
            with torch.autocast(device, BF16):
                output = model(batch)
            seen.append(output.dtype)
            loss: Tensor = output.float().mean()
            return loss

        return run

    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        report = precision_report(Island("none"), data(8, 16), step(device))
        assert not report.verdicts["16-mixed"].is_safe
        absent = Island("a device that is absent")
        assert (
            precision_report(absent, data(8, 16), step(device))
            .verdicts["16-mixed"]
            .is_safe
        )
    assert set(seen) == {torch.float32}
    assert (dict(vars(kind)), dict(vars(Tensor))) == before
    block = torch.autocast("cpu", BF16)
    with pytest.raises(ValueError, match="does not fit"), block:
        precision_report(Island("block"), data(8, 5), step("cpu"))
    assert dict(vars(kind)) == before[0]
    with block:
        assert (data(2, 2) @ data(2, 2)).dtype == BF16


class Norm(nn.Module):
    """A root mean square by hand, of numbers whose squares are beyond FP16."""

    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.cast = nn.Linear(16, 16), cast

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        y = self.cast(self.linear(x) * 300)
        z: Tensor = y * (y * y).mean(-1, keepdim=True).add(1e-6).rsqrt()
        return z


@pytest.mark.parametrize(
    ("cast", "holds"),
    [
        (lambda x: x, False),
        (lambda x: x.to("cpu"), False),
        (lambda x: x.float(), True),
        (lambda x: x.to(torch.float32), True),
        (lambda x: x.to(dtype=torch.float32), True),
        (lambda x: x.type(torch.float32), True),
    ],
)
def test_a_cast_to_fp32_is_seen(cast: Callable[[Tensor], Tensor], holds: bool) -> None:
    """It does nothing in FP32, and keeps the squares from Inf in FP16."""
    torch.manual_seed(0)
    model, x = Norm(cast), data(8, 16)
    verdict = precision_report(model, x, lambda y: y.mean()).verdicts["16-mixed"]
    with torch.autocast("cpu", FP16):
        output = model(x)
    is_right = torch.allclose(output.float(), model(x), atol=0.05)
    assert verdict.is_safe == holds == is_right, str(verdict)


class Odds(nn.Module):
    """A probability that is kept from 0 and 1, for a logarithm."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.linear, self.eps = nn.Linear(8, 4), eps

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = (self.linear(x) * 20).sigmoid().clamp(self.eps, 1 - self.eps)
        return y


@pytest.mark.parametrize("eps", [1e-7, 1e-3, 1e-2])
def test_a_bound_that_becomes_one_is_told(eps: float) -> None:
    """1 - 1e-3 is 1 in BF16, and not in FP16: log(1 - p) is NaN as the report says."""
    torch.manual_seed(0)
    model, x, y = Odds(eps), data(64, 8), (data(64, 4) < 0).float()

    def loss_fn(p: Tensor, y: Tensor) -> Tensor:
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()

    report = precision_report(model, (x, y), loss_fn)
    for mode, dtype in (("16-mixed", FP16), ("bf16-mixed", BF16)):
        with torch.autocast("cpu", dtype):
            loss = loss_fn(model(x), y)
        verdict = report.verdicts[mode]
        assert verdict.is_safe == bool(loss.isfinite()), (eps, str(verdict))
        if not verdict.is_safe:
            assert f"{1 - eps:g}" in verdict.text
            assert f"is 1 in {str(dtype).removeprefix('torch.')}" in verdict.text


def test_a_loss_scale_far_above_gradscalers_first_is_a_caution() -> None:
    """At 2^16 nothing moves, and 2^30 is 28,000 steps away."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batch = data(64, 8), data(64, 4)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output.float(), target) * 1e-13

    verdict = precision_report(model, batch, loss_fn).verdicts["16-mixed"]
    assert verdict.loss_scale is not None
    power = verdict.loss_scale[0]
    assert verdict.level == "caution"
    assert f"needs {2000 * (power - 16):,} steps to 2^{power}" in verdict.text
    moved = {}
    for start in (16, power):
        twin = copy.deepcopy(model)
        optimizer, scaler = SGD(twin.parameters(), 1e12), GradScaler("cpu", 2.0**start)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", FP16):
                loss = loss_fn(twin(batch[0]), batch[1])
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        moved[start] = sum(int((a != b).sum()) for a, b in pairs)
    assert moved[16] == 0 < moved[power]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_mask_before_a_softmax_hides_where_no_row_is_hidden_whole(
    hidden: bool,
) -> None:
    """-9e15 becomes -Inf in FP16, of which softmax makes a zero; NaN of a whole row."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(8, 8)
            self.edges = torch.eye(8) > hidden

        def forward(self, x: Tensor) -> Tensor:
            scores = self.score(x)
            y: Tensor = torch.where(self.edges, scores, -9e15 * torch.ones_like(scores))
            return y.softmax(-1)

    torch.manual_seed(0)
    model, x = Graph(), data(8, 8)
    report = precision_report(model, x, lambda y: y.square().mean())
    output = model.half()(x.half())
    assert report.verdicts["16-mixed"].is_safe == bool(output.isfinite().all())
    assert report.verdicts["16-mixed"].is_safe != hidden


def test_what_is_copied_before_it_is_cast_is_cast() -> None:
    """A linear layer copies a transpose; autocast casts the copy: its input counts."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x.transpose(1, 2))
            return y

    x = data(2, 8, 4) * 1e5
    report = precision_report(Turned(), x, lambda y: y.mean())
    assert find(report, "linear", "input").low
    assert not report.verdicts["16-mixed"].is_safe


class ToFloat8(nn.Module):
    """Casts, as layers that are trained for FP8 do."""

    def forward(self, x: Tensor) -> Tensor:
        """Cast."""
        return x.to(torch.float8_e4m3fn)


class StraightThrough(nn.Module):
    """Rounds to FP8; the gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cast = nn.Linear(16, 16), ToFloat8()

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y: Tensor = self.linear(x)
        rounded: Tensor = self.cast(y).float()
        return y + (rounded - y).detach()


def test_tensors_in_fp8_are_read() -> None:
    """Their rows have the numbers that they hold."""
    model, x = StraightThrough(), data(8, 16)
    row = find(precision_report(model, x, torch.mean), "cast", "output")
    y = model.cast(model.linear(x)).float()
    assert row.amax == y.abs().max()
    assert row.formats["float16"]["sqnr_db"] is None  # FP16 has all of these


def test_a_loss_that_calls_the_model_by_another_name_is_told_the_right_one() -> None:
    """It gets the output in its place, which is not callable."""
    with pytest.raises(ValueError, match=r"has a first parameter `model`$"):
        precision_report(mlp(), (X, Y), lambda net, batch: net(batch[0]).mean())


class Slope(nn.Module):
    """Uses a transform of torch.func around a layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.inner, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        x = self.first(x)
        if self.way == "vmap":
            y: Tensor = torch.func.vmap(lambda r: self.inner(r).float())(x)
        elif self.way == "grad":
            y = torch.func.grad(lambda z: self.inner(z).float().square().sum())(x)
        else:
            y = torch.func.jvp(self.inner, (x,), (torch.ones_like(x),))[1]
        return y


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # jvp's
@pytest.mark.parametrize("way", ["vmap", "grad", "jvp"])
def test_a_transform_of_torch_func_is_noted_and_looked_around(way: str) -> None:
    """Its tensors cannot be read; what goes into the layer before can."""
    report = precision_report(Slope(way), data(4, 8) * 1e6, lambda y: y.mean())
    assert any("torch.func" in note and "inner" in note for note in report.notes)
    assert find(report, "first", "input").share("float16", "overflow") > 0
    assert find(report, "inner", "grad_weight", "weight").amax > 0
    assert not [r for r in report.rows if (r.module, r.kind) == ("inner", "input")]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_sparse_and_nested_tensors_are_read() -> None:
    """A graph in a sparse layout has its dense verdict; ragged rows are read."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            y: Tensor = edges @ self.layer(x)
            return y

    edges, model = torch.eye(64).roll(1, 0) * 1e5, Graph()
    texts = []
    for layout in (edges, edges.to_sparse(), edges.to_sparse_csr()):
        before = layout.to_dense().clone()
        report = precision_report(model, (X, layout, Y), F.mse_loss)
        texts.append(report.verdicts["16-mixed"].text)
        assert torch.equal(layout.to_dense(), before)
    assert texts[0].startswith("unsafe: `model` input (1) overflows")
    assert texts == texts[:1] * 3

    rows = torch.nested.nested_tensor([X[:3], X[:5]], layout=torch.jagged)
    layer = nn.Linear(32, 32)
    report = precision_report(layer, rows, lambda y: y.values().square().mean())
    assert find(report, "", "input").shape == (8, 32)
    assert find(report, "", "input").amax == X[:5].abs().max()
    json.dumps(report.to_dict(), allow_nan=False)


def test_every_finding_leads_to_a_page_that_is_there() -> None:
    """No link of a report is dead."""
    for _, page in _FIXES.values():
        assert (ROOT / "source" / f"{page}.md").is_file(), page


# --------------------------------------------------------------------------- the forms


def test_forms_agree() -> None:
    """Text, dict, DataFrame and figure of one report."""
    report = precision_report(mlp(), (X, Y), F.mse_loss)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    frame = report.to_dataframe()

    assert len(frame) == len(report.rows) * len(report.formats)
    assert plain["verdicts"]["bf16-mixed"]["level"] == "safe"
    assert plain["recommendation"] == report.recommendation == "bf16-mixed"
    share = frame[
        (frame.module == "0") & (frame.kind == "update") & (frame.tensor == "weight")
    ]
    row = find(report, "0", "update", "weight")
    assert (
        share[share.format == "bfloat16"].lost.item() == row.formats["bfloat16"]["lost"]
    )
    text = str(report)
    assert all(str(verdict) in text for verdict in report.verdicts.values())
    assert len(report.table().splitlines()) == 1 + len(report.rows)
    figure = report.figure()
    assert len(figure.axes) == len({r.kind for r in report.rows if sum(r.histogram)})
    with pytest.raises(ValueError, match="no tensors of the kinds"):
        report.figure(["inside"])


def test_without_pandas_or_matplotlib_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All else works."""
    report = precision_report(mlp(), (X, Y), F.mse_loss)
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ModuleNotFoundError, match=r"to_dataframe\(\) needs pandas"):
        report.to_dataframe()
    with pytest.raises(ModuleNotFoundError, match=r"figure\(\) needs matplotlib"):
        report.figure()


def test_formats_choose_the_verdicts() -> None:
    """A verdict needs all formats of its mode; any format has a column."""
    only = precision_report(mlp(), (X, Y), F.mse_loss, ["bfloat16"])
    other = precision_report(
        mlp(), (X, Y), F.mse_loss, ("mxfp4", "float8_e5m2fnuz", "tf32")
    )

    assert list(only.verdicts) == ["bf16-mixed", "bf16-true"]
    assert not other.verdicts
    assert all(
        set(r.formats) == {"mxfp4", "float8_e5m2fnuz", "tf32"} for r in other.rows
    )
