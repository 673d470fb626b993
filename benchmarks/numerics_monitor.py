"""Time training steps with `NumericsMonitor` against the same steps without it.

Run from the top of the project; it prints a table and records it in
``benchmarks/numerics_monitor.json``, which guide/monitor_a_run reads::

    python -m benchmarks.numerics_monitor

Two copies of a transformer take their steps in turn, one of them watched at the default
interval, so that what else the machine does falls on both; CPU time is counted. Which
goes first changes at each pair. The ratio is the median of those of the pairs between
two measurements, and to it comes what the median measurement adds, by the interval.

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: T201 - a table is what it is for

import copy
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

from snippets.numerics_monitor import NumericsMonitor

LAYERS, BATCH, TOKENS = 4, 8, 128
WIDTHS = (256, 512)
INTERVALS = 3
ALLOWED = 1.03
MODES = ("32-true", "bf16-mixed")  # float16 products are emulated on most CPUs
RECORD = Path(__file__).with_suffix(".json")


def make_step(model: nn.Module, mode: str, width: int) -> Callable[[], float]:
    """Return a training step that returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(BATCH, TOKENS, width, generator=torch.Generator().manual_seed(0))

    def step() -> float:
        start = time.thread_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode != "32-true"):
            loss = model(x).float().square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return time.thread_time() - start

    return step


def measure(mode: str, width: int, intervals: int = INTERVALS) -> dict[str, Any]:
    """Return the ratio for one mode and width."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    watched = copy.deepcopy(plain)
    monitor = NumericsMonitor()
    jobs = [make_step(model, mode, width) for model in (plain, watched)]
    usual, measured = [], []
    with monitor.attach(watched):
        for job in jobs:
            job()
        for pair in range(intervals * monitor.interval):
            pairs = usual if monitor.step % monitor.interval else measured
            times = {i: jobs[i]() for i in ((0, 1) if pair % 2 else (1, 0))}
            pairs.append((times[0], times[1]))
    between = statistics.median(w / p for p, w in usual)
    with_measurement = statistics.median(w / p for p, w in measured)
    return {
        "mode": mode,
        "width": width,
        "step_ms": round(1e3 * statistics.median(p for p, _ in usual), 1),
        "ratio": round(between + (with_measurement - between) / monitor.interval, 3),
    }


def main() -> int:
    """Measure, print and record; return 1 if a ratio is above what is allowed."""
    torch.set_num_threads(1)
    rows = [measure(mode, width) for width in WIDTHS for mode in MODES]
    for row in rows:
        what = f"width {row['width']}, {row['mode']}"
        print(f"{what:24}{row['step_ms']:8.1f} ms a step{row['ratio']:8.3f}")
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "interval": NumericsMonitor().interval,
        "model": f"{LAYERS} layers, {BATCH} x {TOKENS} tokens",
        "modes": rows,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return int(max(row["ratio"] for row in rows) > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
