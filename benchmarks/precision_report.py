"""Measure what a precision report costs, in training steps of the same model.

Run from the top of the project; it prints a table and records it in
``benchmarks/precision_report.json``, which guide/precision_report reads::

    python -m benchmarks.precision_report

A step is forward, backward and AdamW in FP32, with one thread. Steps and reports take
turns, so that both find the caches as a training run leaves them; times are medians.

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: T201 - a table is what it is for

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from snippets.precision_report import precision_report

RECORD = Path(__file__).with_suffix(".json")
REPEATS = 15


class Recurrent(nn.Module):
    """An LSTM that classifies a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Judge by the last state."""
        scores: Tensor = self.head(self.lstm(x)[0][:, -1])
        return scores


class Transformer(nn.Module):
    """Layers that score the next of a thousand words."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Score."""
        scores: Tensor = self.head(self.body(self.words(x)))
        return scores.transpose(1, 2)


def mlp(width: int) -> nn.Module:
    """Make three linear layers."""
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutions() -> nn.Module:
    """Make two convolutions with batch norms."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def models() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Make each model and its batch."""
    torch.manual_seed(0)
    classes = torch.randint(10, (256,))
    words = torch.randint(1000, (2, 8, 64))
    return {
        "mlp 64": (mlp(64), torch.randn(64, 64), classes[:64]),
        "mlp 512": (mlp(512), torch.randn(256, 512), classes),
        "mlp 1024": (mlp(1024), torch.randn(256, 1024), classes),
        "cnn": (convolutions(), torch.randn(64, 3, 32, 32), classes[:64]),
        "lstm": (Recurrent(), torch.randn(32, 50, 64), classes[:32]),
        "transformer": (Transformer(256, 4), words[0], words[1]),
        "narrow": (Transformer(64, 6), words[0, :, :16], words[1, :, :16]),
    }


def measure(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Time steps and reports by turns, the first of each left out."""
    optimizer = AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step()

    def report() -> None:
        precision_report(model, (x, y), cross_entropy)

    times: dict[Callable[[], None], list[float]] = {step: [], report: []}
    for _ in range(1 + REPEATS):
        for call, taken in times.items():
            start = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - start))
    step_ms, report_ms = (statistics.median(taken[1:]) for taken in times.values())
    found = {"step_ms": step_ms, "report_ms": report_ms, "ratio": report_ms / step_ms}
    rows = len(precision_report(model, (x, y), cross_entropy).rows)
    return {"rows": rows} | {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    """Measure, print and record."""
    torch.set_num_threads(1)
    found = {}
    for name, (model, x, y) in models().items():
        found[name] = measure(model, x, y)
        print(f"{name:12}", found[name])
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "models": found,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
