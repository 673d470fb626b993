"""Time quantizing and decoding against bitsandbytes and torchao.

Run from the top of the project on a quiet machine; it prints a table and records it in
``benchmarks/quantized_linear.json``::

    python -m benchmarks.quantized_linear

A job works on 16 million numbers, on one thread and on two. In a round each way of the
job runs once, in turn; times are medians over the rounds, and a ratio is the median of
the ratios of each round, to the fastest of the others. torchao's NF4 always quantizes
its absmax too. The record has the load average before the start: where it is not near
zero, two threads had less than two cores.

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: T201 - a table is what it is for

import datetime
import importlib
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snippets.quantized_linear import (
    dequantize_4bit,
    dequantize_int8,
    quantize_4bit,
    quantize_int8,
)

SIDE = 4096
ROUNDS = 9
ALLOWED_RATIO = 1.5  # to the fastest of the others
RECORD = Path(__file__).with_suffix(".json")

Job = Callable[[], object]


def quiet(name: str) -> Any:  # noqa: ANN401 - a module
    """Return a module that talks while it is imported."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    logging.disable(logging.NOTSET)
    return module


def jobs(side: int) -> dict[str, dict[str, Job]]:
    """Return what is timed: by the job, and by who does it, ours first."""
    bnb = quiet("bitsandbytes.functional")
    nf4 = quiet("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").NF4Tensor
    ao = quiet("torchao.quantization.quant_primitives")
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    codes, absmax = quantize_4bit(x)
    state = bnb.quantize_4bit(x, quant_type="nf4")[1]
    packed = nf4.from_tensor(x, 64, 256)
    x8, rows, _ = quantize_int8(x)
    block, zero = (1, side), torch.zeros(side, 1)

    def row_scales() -> Tensor:
        return x.abs().amax(1, keepdim=True) / 127

    def whole(dtype: torch.dtype) -> dict[str, Job]:
        y = x.to(dtype)
        return {
            "ours": lambda: quantize_int8(y),
            "bitsandbytes": lambda: bnb.int8_vectorwise_quant(y),
        }

    scales = row_scales()
    return {
        "NF4 quantize": {
            "ours": lambda: quantize_4bit(x),
            "bitsandbytes": lambda: bnb.quantize_4bit(x, quant_type="nf4"),
            "torchao": lambda: nf4.from_tensor(x, 64, 256),
        },
        "NF4 decode": {
            "ours": lambda: dequantize_4bit(codes, absmax, (side, side)),
            "bitsandbytes": lambda: bnb.dequantize_4bit(codes, state),
            "torchao": packed.get_original_weight,
        },
        "int8 quantize": whole(torch.float32)
        | {
            "torchao": lambda: ao.quantize_affine(
                x, block, row_scales(), zero, torch.int8, -127, 127
            )
        },
        "int8 quantize, float16": whole(torch.float16),
        "int8 decode": {
            "ours": lambda: dequantize_int8(x8, rows),
            "bitsandbytes": lambda: bnb.int8_vectorwise_dequant(x8, rows),
            "torchao": lambda: ao.dequantize_affine(
                x8, block, scales, zero, torch.int8, -127, 127
            ),
        },
    }


def seconds(job: Job) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure(threads: int, side: int = SIDE, rounds: int = ROUNDS) -> list[Any]:
    """Return a row for each job."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    for name, ways in jobs(side).items():
        for job in ways.values():
            job()
        times = [
            {who: seconds(job) for who, job in ways.items()} for _ in range(rounds)
        ]
        ns = {w: statistics.median(t[w] for t in times) * 1e9 / side**2 for w in ways}
        fastest = min((w for w in ways if w != "ours"), key=lambda w: ns[w])
        ratio = statistics.median(t["ours"] / t[fastest] for t in times)
        found.append({
            "job": name,
            "threads": threads,
            "ns_per_value": {who: round(n, 2) for who, n in ns.items()},
            "ratio": round(ratio, 2),
            "to": fastest,
        })  # fmt: skip
    torch.set_num_threads(before)
    return found


def main() -> int:
    """Measure, print and record; return 1 if a job takes too long."""
    load = os.getloadavg()[0]
    rows = [row for threads in (1, 2) for row in measure(threads)]
    for row in rows:
        print(
            f"{row['job']:24}{row['threads']}  {row['ratio']:5.2f}", row["ns_per_value"]
        )
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "values": SIDE**2,
        "rounds": ROUNDS,
        "load": round(load, 1),
        "allowed": ALLOWED_RATIO,
        "jobs": rows,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return int(any(row["ratio"] > ALLOWED_RATIO for row in rows))


if __name__ == "__main__":
    sys.exit(main())
