"""Time the same work in float32 and in float64.

Run from the top of the project; it prints a table and records it in
``benchmarks/double_precision.json``, which guide/double_precision reads::

    python -m benchmarks.double_precision

One thread. A round times each piece of work in float32 and right after it in float64,
so that whatever else the machine does hits both; ratios are medians over the rounds.

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: T201 - a table is what it is for

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snippets.double_precision import to_double

ROUNDS = 100
ALLOWED_RATIO = 4.0  # of a training step; half the numbers in a register make it 2
RECORD = Path(__file__).with_suffix(".json")

Work = Callable[[], Any]


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the same random numbers for each dtype."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(dtype)


def training_step(dtype: torch.dtype) -> Work:
    """Return a step of AdamW on a network of three layers, with a batch of 128."""
    torch.manual_seed(0)
    layers = (nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    if dtype == torch.float64:
        to_double(model)
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = normal(128, 256, dtype=dtype), torch.arange(128) % 10

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()

    return step


def optimizer_step(dtype: torch.dtype) -> Work:
    """Return a step of AdamW on a million parameters."""
    weight = nn.Parameter(normal(1_000_000, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    step: Work = torch.optim.AdamW([weight]).step
    return step


def product(dtype: torch.dtype) -> Work:
    """Return the product of two matrices, limited by arithmetic."""
    x = normal(512, 512, dtype=dtype)
    return lambda: x @ x


def addition(dtype: torch.dtype) -> Work:
    """Return a sum of two tensors too large for a cache, limited by memory."""
    x = normal(4_000_000, dtype=dtype)
    out = torch.empty_like(x)
    return lambda: torch.add(x, x, out=out)


def exponential(dtype: torch.dtype) -> Work:
    """Return an exponential of a tensor that fits a cache."""
    x = normal(10_000, dtype=dtype)
    return x.exp


WORK: dict[str, Callable[[torch.dtype], Work]] = {
    "training step": training_step,
    "512 x 512 product": product,
    "exp, in cache": exponential,
    "addition, in memory": addition,
    "AdamW step": optimizer_step,
}


def milliseconds(work: Work) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def measure(name: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the medians for one piece of work."""
    single, double = (WORK[name](dtype) for dtype in (torch.float32, torch.float64))
    for work in (single, double):
        work()
    rows = [(milliseconds(single), milliseconds(double)) for _ in range(rounds)]
    return {
        "work": name,
        "float32_ms": round(statistics.median(row[0] for row in rows), 4),
        "float64_ms": round(statistics.median(row[1] for row in rows), 4),
        "ratio": round(statistics.median(row[1] / row[0] for row in rows), 2),
    }


def main() -> int:
    """Measure, print and record; return 1 if a training step takes too long."""
    torch.set_num_threads(1)
    rows = [measure(name) for name in WORK]
    print(f"{'work':20}{'float32':>12}{'float64':>12}   ratio")
    for row in rows:
        times = [f"{row[name]:10.4f}ms" for name in ("float32_ms", "float64_ms")]
        print(f"{row['work']:20}", *times, f"{row['ratio']:8.2f}", sep="")
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "work": rows,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return int(rows[0]["ratio"] > ALLOWED_RATIO)


if __name__ == "__main__":
    sys.exit(main())
