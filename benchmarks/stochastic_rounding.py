"""Time ``stochastic_round`` against torch's cast, and ``PureBF16AdamW`` against AdamW.

Run from the top of the project; it prints a table and records it in
``benchmarks/stochastic_rounding.json``, which guide/stochastic_rounding reads::

    python -m benchmarks.stochastic_rounding

One thread, a tensor that fits the cache. A round times, in turn, the rounding, the cast
``x.to(dtype)`` and one draw of a 30-bit integer for each element, which no stochastic
rounding with these random numbers can do without; ratios are medians over the rounds.
Steps of the optimizers, on as many parameters, are timed in turn as well.

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

from snippets.stochastic_rounding import PureBF16AdamW, stochastic_round

ELEMENTS = 10_000
ROUNDS = 300
CALLS = 5
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
ALLOWED_DRAWS = 6
RECORD = Path(__file__).with_suffix(".json")


def nanoseconds(work: Callable[[], Any]) -> float:
    """Return the nanoseconds ``work`` takes for an element, averaged over calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - start) * 1e9 / (CALLS * ELEMENTS)


def measure(dtype: torch.dtype, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the medians for one dtype."""
    x = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    jobs: tuple[Callable[[], Any], ...] = (
        lambda: stochastic_round(x, dtype),
        lambda: x.to(dtype),
        lambda: torch.randint(2**30, x.shape, dtype=torch.int32),
    )
    rows = [[nanoseconds(job) for job in jobs] for _ in range(rounds)]
    ours, cast, draw = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "ours_ns": round(ours, 2),
        "cast_ns": round(cast, 3),
        "draw_ns": round(draw, 2),
        "times_the_cast": round(statistics.median(r[0] / r[1] for r in rows), 1),
        "times_the_draw": round(statistics.median(r[0] / r[2] for r in rows), 2),
    }


def measure_steps(rounds: int = ROUNDS) -> dict[str, float]:
    """Return how many float32 AdamW steps of torch one step of ours takes."""

    def optimizer(make: Callable[..., Any], dtype: torch.dtype) -> Callable[[], Any]:
        weight = torch.nn.Parameter(torch.ones(ELEMENTS, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        step: Callable[[], Any] = make([weight]).step
        return step

    def kahan(params: list[torch.Tensor]) -> PureBF16AdamW:
        return PureBF16AdamW(params, rounding="kahan")

    jobs = (
        optimizer(torch.optim.AdamW, torch.float32),
        optimizer(PureBF16AdamW, torch.bfloat16),
        optimizer(kahan, torch.bfloat16),
    )
    rows = [[nanoseconds(job) for job in jobs] for _ in range(rounds)]
    return {
        name: round(statistics.median(row[i] / row[0] for row in rows), 1)
        for i, name in ((1, "stochastic"), (2, "kahan"))
    }


def main() -> int:
    """Measure, print and record; return 1 if a rounding takes too many draws."""
    torch.set_num_threads(1)
    rows = [measure(dtype) for dtype in DTYPES]
    print(f"{'dtype':16}{'ours':>9}{'cast':>9}{'draw':>9}   ratios")
    for row in rows:
        times = [f"{row[name]:7.2f}ns" for name in ("ours_ns", "cast_ns", "draw_ns")]
        ratios = f"{row['times_the_cast']:6.1f}{row['times_the_draw']:6.2f}"
        print(f"{row['dtype']:16}", *times, ratios, sep="")
    steps = measure_steps()
    print("a step takes, in steps of torch.optim.AdamW in float32:", steps)
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "elements": ELEMENTS,
        "rounds": ROUNDS,
        "dtypes": rows,
        "steps": steps,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return int(max(row["times_the_draw"] for row in rows) > ALLOWED_DRAWS)


if __name__ == "__main__":
    sys.exit(main())
