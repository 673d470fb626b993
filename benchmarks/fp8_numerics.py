"""Time the FP8 quantizers against torch's own casts and torchao's emulation.

Run from the top of the project; it prints a table and records it in
``benchmarks/fp8_numerics.json``::

    python -m benchmarks.fp8_numerics

A job quantizes and dequantizes 16 million float32 numbers, on one thread and on two. A
round times, in turn, torch's cast to the format and back, ours, and where torchao has
the same thing, its; ratios are medians over the rounds. So are those of the products of
a linear layer, from codes to a float32 result, over the same product of float32
matrices.

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: T201 - a table is what it is for

import datetime
import importlib
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from snippets.fp8.gemm import decode_operand, scaled_matmul
from snippets.fp8.numerics import (
    compute_amax,
    compute_current_scale,
    dequantize,
    quantize_block,
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_tensor,
)

SIDE = 4096
ROUNDS = 7
LAYER = (2048, 512, 2048)  # tokens, features in, features out
ALLOWED = {"tensor": 1.5, "block": 2.5}
RECORD = Path(__file__).with_suffix(".json")
FORMATS = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}

Job = Callable[[], Any]


def torchao(name: str) -> ModuleType:
    """Return a module of torchao, imported without its talk."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"torchao.{name}")
    logging.disable(logging.NOTSET)
    return module


def seconds(work: Job) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def medians(jobs: dict[str, Job], rounds: int) -> dict[str, list[float]]:
    """Return the times of each job, taken in turn, after one call that counts not."""
    for job in jobs.values():
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    return times


def quantizers(x: Tensor, fmt: str) -> dict[str, Job]:
    """Return a round trip of each kind, torch's cast first."""
    dtype = FORMATS[fmt]
    largest = torch.finfo(dtype).max
    scale = compute_current_scale(compute_amax(x), largest)

    def current() -> Tensor:
        fresh = compute_current_scale(compute_amax(x), largest)
        return dequantize(*quantize_tensor(x, fmt, fresh))

    jobs: dict[str, Job] = {
        "cast": lambda: x.to(dtype).to(torch.float32),
        "tensor": lambda: dequantize(*quantize_tensor(x, fmt, scale)),
        "current scaling": current,
        "block 1x128": lambda: dequantize(*quantize_block(x, fmt)),
        "block 128x128": lambda: dequantize(*quantize_block(x, fmt, (128, 128))),
        "MXFP8": lambda: dequantize(*quantize_mxfp8(x, fmt)),
    }
    if fmt == "E4M3":
        jobs["NVFP4"] = lambda: dequantize(*quantize_nvfp4(x))
    return jobs


def rivals(x: Tensor, fmt: str) -> dict[str, Job]:
    """Return torchao's round trips, by the name of ours."""
    dtype = FORMATS[fmt]
    training = torchao("float8.float8_training_tensor")
    scaling = torchao("float8.float8_scaling_utils")
    mx = torchao("prototype.mx_formats.mx_tensor")
    role = training.GemmInputRole.INPUT
    config = training.LinearMMConfig()

    def current() -> Tensor:
        packed = scaling.hp_tensor_to_float8_dynamic(
            x, dtype, config, gemm_input_role=role
        )
        result: Tensor = packed.to_original_precision()
        return result

    def blocks() -> Tensor:
        mode = mx.ScaleCalculationMode.RCEIL
        packed = mx.MXTensor.to_mx(x, dtype, 32, mode)
        result: Tensor = packed.dequantize(torch.float32)
        return result

    return {"current scaling": current, "MXFP8": blocks}


def measure(fmt: str, threads: int) -> list[dict[str, Any]]:
    """Return a row for each kind of round trip."""
    torch.set_num_threads(threads)
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    jobs = quantizers(x, fmt)
    others = rivals(x, fmt)
    times = medians({**jobs, **{f"torchao {k}": v for k, v in others.items()}}, ROUNDS)
    rows = []
    for name in jobs:
        row: dict[str, Any] = {
            "format": fmt,
            "threads": threads,
            "kind": name,
            "ns_per_element": round(statistics.median(times[name]) * 1e9 / SIDE**2, 2),
            "times_the_cast": ratio(times[name], times["cast"]),
        }
        if name in others:
            row["torchao_times_the_cast"] = ratio(
                times[f"torchao {name}"], times["cast"]
            )
        rows.append(row)
    return rows


def ratio(ours: list[float], base: list[float]) -> float:
    """Return the median of the ratios of two times from the same round."""
    return round(
        statistics.median(a / b for a, b in zip(ours, base, strict=True)), 2
    )  # fmt: skip


def measure_products(threads: int) -> dict[str, Any]:
    """Return how many float32 products one of codes takes, with its decoding."""
    torch.set_num_threads(threads)
    tokens, inward, outward = LAYER
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inward, generator=generator)
    w = torch.randn(outward, inward, generator=generator)
    dy = torch.randn(tokens, outward, generator=generator)
    qx, qw = quantize_tensor(x, "E4M3", 60.0), quantize_tensor(w, "E4M3", 60.0)
    qdy = quantize_tensor(dy, "E5M2", 9000.0)

    def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], turn: str) -> Job:
        def work() -> Tensor:
            left, right = decode_operand(*a), decode_operand(*b)
            left = left.T if "a" in turn else left
            return scaled_matmul(left, right.T if "b" in turn else right)

        return work

    pairs: dict[str, tuple[Job, Job]] = {
        "output": (product(qx, qw, ""), lambda: x @ w.T),
        "grad_input": (product(qdy, qw, "b"), lambda: dy @ w),
        "grad_weight": (product(qdy, qx, "ab"), lambda: dy.T @ x),
    }
    result: dict[str, Any] = {"threads": threads, "shape": list(LAYER)}
    for name, (ours, plain) in pairs.items():
        times = medians({"ours": ours, "plain": plain}, ROUNDS)
        result[name] = ratio(times["ours"], times["plain"])
    return result


def main() -> int:
    """Measure, print and record; return 1 if a round trip takes too many casts."""
    rows = [row for n in (1, 2) for fmt in FORMATS for row in measure(fmt, n)]
    print(f"{'':26}{'ns':>8}{'casts':>8}{'torchao':>9}")
    for row in rows:
        name = f"{row['format']} {row['kind']}, {row['threads']}T"
        other = row.get("torchao_times_the_cast", "")
        print(
            f"{name:26}{row['ns_per_element']:8.2f}{row['times_the_cast']:8.2f}"
            f"{other:>9}"
        )
    products = [measure_products(n) for n in (1, 2)]
    for row in products:
        print("products over those of float32 matrices:", row)
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": platform.machine(),
        "avx512_bf16": bool(torch.cpu.get_capabilities().get("avx512_bf16", False)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "elements": SIDE**2,
        "rounds": ROUNDS,
        "allowed": ALLOWED,
        "round_trips": rows,
        "products": products,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    worst = {
        "tensor": max(r["times_the_cast"] for r in rows if r["kind"] == "tensor"),
        "block": max(r["times_the_cast"] for r in rows if "block" in r["kind"]),
    }
    return int(any(worst[kind] > ALLOWED[kind] for kind in ALLOWED))


if __name__ == "__main__":
    sys.exit(main())
