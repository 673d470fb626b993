"""Time ``HalfPrecisionForAudio.convert_input`` against Lightning's ``HalfPrecision``.

Run from the top of the project; it prints a table and records it in
``benchmarks/convert_input.json``, which guide/half_precision_for_audio reads::

    python -m benchmarks.convert_input

Both plugins convert the same batch, in turn, in one thread. A round times each of them
once; the ratio of a batch is the median over rounds of ours divided by Lightning's, so
that a slower moment of the machine falls on both.

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
from typing import Any, TypeAlias

import lightning
import torch
from lightning.pytorch.plugins import HalfPrecision

from snippets.half_precision_for_audio import HalfPrecisionForAudio

ROUNDS = 200
SECONDS_PER_TIMING = 1e-3
ALLOWED_RATIO = 1.1
RECORD = Path(__file__).with_suffix(".json")

Convert: TypeAlias = Callable[[Any], Any]


def batches() -> dict[str, Any]:
    """Return batches from nothing but overhead to nothing but casting."""
    ones, ints = torch.ones(2), torch.ones(2, dtype=torch.int64)
    waves, lengths = torch.zeros(16, 16_000), torch.full((16,), 16_000)
    utterance = {"speaker": torch.ones(8), "text": "he turned sharply", "id": 9}
    return {
        "one tensor of 2": ones,
        "dict of 5 tensors of 2": dict.fromkeys("abcde", ones),
        "dict of 5 integer tensors": dict.fromkeys("abcde", ints),
        "tuple of 4 tensors of 2": (ones, ints, ones, ints),
        "list of 16 dicts, texts": {"cuts": [utterance] * 16, "lengths": lengths},
        "16 x 16000, cast": {"features": waves, "lengths": lengths},
        "16 x 16000, kept": {"audio": waves, "lengths": lengths},
    }


def seconds(convert: Convert, batch: object, calls: int) -> float:
    """Return the seconds one call takes, averaged over ``calls``."""
    start = time.perf_counter()
    for _ in range(calls):
        convert(batch)
    return (time.perf_counter() - start) / calls


def compare(
    ours: Convert, theirs: Convert, batch: object, rounds: int
) -> tuple[float, float, float]:
    """Return the median seconds of ours and theirs, and the median of their ratio."""
    calls = max(1, round(SECONDS_PER_TIMING / min(seconds(theirs, batch, 20), 1e-3)))
    pairs = []
    for i in range(rounds):
        if i % 2:  # who goes first alternates
            first = seconds(ours, batch, calls)
            pairs.append((first, seconds(theirs, batch, calls)))
        else:
            first = seconds(theirs, batch, calls)
            pairs.append((seconds(ours, batch, calls), first))
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def main() -> int:
    """Measure, print and record; return 1 if a ratio is above the allowed one."""
    torch.set_num_threads(1)
    ours = HalfPrecisionForAudio("bf16-true").convert_input
    theirs = HalfPrecision("bf16-true").convert_input
    rows: list[dict[str, Any]] = []
    print(f"{'batch':28}{'ours':>10}{'Lightning':>12}{'ratio':>8}")
    for name, batch in batches().items():
        a, b, ratio = compare(ours, theirs, batch, ROUNDS)
        rows.append({
            "batch": name,
            "ours_us": round(a * 1e6, 2),
            "lightning_us": round(b * 1e6, 2),
            "ratio": round(ratio, 3),
        })
        print(f"{name:28}{a * 1e6:8.1f}us{b * 1e6:10.1f}us{ratio:8.2f}")
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "rounds": ROUNDS,
        "batches": rows,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    worst = max(row["ratio"] for row in rows)
    print(f"worst ratio {worst:.2f}, allowed {ALLOWED_RATIO}")
    return int(worst > ALLOWED_RATIO)


if __name__ == "__main__":
    sys.exit(main())
