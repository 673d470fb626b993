"""Time and weigh a training step of a transformer under emulated FP8.

Run from the top of the project; it prints tables and records them in
``benchmarks/fp8_transformer.json``::

    python -m benchmarks.fp8_transformer

Four layers of width 512, 8 sequences of 256 tokens, AdamW; with one thread, then with
as many as there are cores. A round times a
step of each kind in turn: plain torch in FP32, the emulator's layers under delayed
scaling, and, beside them, plain torch under BF16 autocast and with the emulated FP8
layers of torchao. Ratios to FP32 are medians over the rounds. Peak memory is that of a
process of its own for each kind (``resource.getrusage``), less what it had before the
model was made.

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: T201 - a table is what it is for

import contextlib
import datetime
import io
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snippets import fp8 as te

LAYERS, WIDTH, HEADS, BATCH, LENGTH = 4, 512, 8, 8, 256
ROUNDS = 5
STEPS = 3  # of a process that is weighed
KINDS = ("fp32", "fp8", "bf16 autocast", "torchao fp8")
RECORD = Path(__file__).with_suffix(".json")


class Block(nn.Module):
    """The layer that ``te.TransformerLayer`` is, of plain torch modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and MLP: [batch, length, width]."""
        mixed = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, HEADS, -1)
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(context.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.fc1(self.norms[1](x)), approximate="tanh")
        out: Tensor = x + self.fc2(hidden)
        return out


def emulated() -> te.TransformerLayer:
    """Return a layer of the emulator, without dropout."""
    return te.TransformerLayer(
        WIDTH,
        4 * WIDTH,
        HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        fuse_qkv_params=True,
        attn_input_format="bshd",
    )


def with_torchao(model: nn.Module) -> nn.Module:
    """Replace the linear layers of ``model`` by torchao's emulated FP8 ones."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        # Only where it is measured: its import warns of libraries that a CPU lacks.
        from torchao.float8 import (  # type: ignore[import-untyped]  # noqa: PLC0415
            Float8LinearConfig,
            convert_to_float8_training,
        )
    logging.disable(logging.NOTSET)
    config = Float8LinearConfig(emulate=True)
    converted: nn.Module = convert_to_float8_training(model, config=config)
    return converted


def stepper(kind: str) -> Callable[[], None]:
    """Return a training step of that kind, with a model and optimizer of its own."""
    torch.manual_seed(0)
    make = emulated if kind == "fp8" else Block
    model: nn.Module = nn.Sequential(*(make() for _ in range(LAYERS)))
    if kind == "torchao fp8":
        model = with_torchao(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    recipe = te.DelayedScaling()

    def region() -> contextlib.AbstractContextManager[Any]:
        if kind == "fp8":
            return te.autocast(recipe=recipe)
        return torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16 autocast")

    def step() -> None:
        with region():
            y = model(x)
        torch.autograd.backward(y.float().square().mean())
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak() -> float:
    """Return the largest resident set of this process until now, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def weigh(kind: str, threads: int) -> float:
    """Return the MiB that steps of that kind take, in a process of their own."""
    name = "benchmarks.fp8_transformer"
    command = [sys.executable, "-m", name, "--weigh", kind, str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def seconds(step: Callable[[], None]) -> float:
    """Return how long one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(memory: list[float], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Return times, memory and their ratios to FP32 for each kind."""
    steps = [stepper(kind) for kind in KINDS]
    for step in steps:
        step()  # AdamW makes its state, delayed scaling its first scales
    rows = [[seconds(step) for step in steps] for _ in range(rounds)]
    return [
        {
            "kind": kind,
            "step_s": round(statistics.median(row[i] for row in rows), 3),
            "peak_mib": round(memory[i]),
            "times_fp32": round(statistics.median(r[i] / r[0] for r in rows), 2),
            "memory_of_fp32": round(memory[i] / memory[0], 2),
        }
        for i, kind in enumerate(KINDS)
    ]


def main() -> int:
    """Measure, print and record; return 1 if FP8 takes more than FP32."""
    if sys.argv[1:2] == ["--weigh"]:
        torch.set_num_threads(int(sys.argv[3]))
        before = peak()
        step = stepper(sys.argv[2])
        for _ in range(STEPS):
            step()
        print(peak() - before)
        return 0
    by_threads: dict[int, list[dict[str, Any]]] = {}
    counts = sorted({1, os.cpu_count() or 1})
    # First: a process starts with the peak of the one that it is forked from.
    weights = {threads: [weigh(kind, threads) for kind in KINDS] for threads in counts}
    for threads in counts:
        torch.set_num_threads(threads)
        rows = by_threads[threads] = measure(weights[threads])
        print(f"{threads} threads       a step      peak   ratios to FP32")
        for row in rows:
            print(
                f"{row['kind']:16}{row['step_s']:8.2f}s{row['peak_mib']:6} MiB"
                f"{row['times_fp32']:7.2f}{row['memory_of_fp32']:6.2f}"
            )
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "layers": LAYERS,
        "width": WIDTH,
        "batch": BATCH,
        "length": LENGTH,
        "rounds": ROUNDS,
        "kinds_by_threads": by_threads,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    ours = [row for rows in by_threads.values() for row in rows if row["kind"] == "fp8"]
    missed = any(r["times_fp32"] > 1.0 or r["memory_of_fp32"] > 1.0 for r in ours)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
