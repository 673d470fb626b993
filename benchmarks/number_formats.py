"""Record what background/number_formats draws: values, errors, ranges, gradients.

Run from the top of the project; it writes ``benchmarks/number_formats.json``, which the
page draws. Each of the four parts is computed by a block of the page as well, which
compares it with the record::

    python -m benchmarks.number_formats

With the folder of a copy of Microsoft's microxcaling, which no package index has, it
writes ``benchmarks/number_formats_microxcaling.json`` instead: what that makes of some
blocks, for ``tests/test_number_formats.py``. The record is of commit 7bc41952 (2024)::

    python -m benchmarks.number_formats ../microxcaling

SPDX-License-Identifier: Apache-2.0
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from snippets.number_formats import BLOCK_FORMATS, finfo, round_to, table

RECORD = Path(__file__).with_suffix(".json")
MICROXCALING = RECORD.with_stem("number_formats_microxcaling")
F64 = torch.float64
SHORT = ["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"]
SHORT += ["float8_e4m3fn", "float8_e5m2"]
COMPARED = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
RANGED = ["float32", *COMPARED[:2], "float8_e5m2", "float8_e4m3fn", "float4_e2m1fn"]


def values() -> dict[str, list[float]]:
    """Return the values from 0 to 8 of each short format."""
    found = {}
    for name in SHORT:
        every = table(name)
        found[name] = every[(every >= 0) & (every <= 8) & ~every.signbit()].tolist()
    return found


def errors() -> dict[str, list[float]]:
    """Return the largest relative error from each power of two to the next."""
    powers = torch.arange(-28, 19, dtype=F64)
    x = torch.exp2(powers)[:, None] * (1 + torch.arange(4096, dtype=F64) / 4096)
    found = {"powers": torch.exp2(powers).tolist()}
    for name in COMPARED:
        worst = ((round_to(x, name) - x).abs() / x).amax(1)
        found[name] = worst.tolist()
    return found


def ranges() -> dict[str, list[float]]:
    """Return the powers of two of each format."""
    powers = [2.0**k for k in range(-149, 128)]
    found = {}
    for name in RANGED:
        info = finfo(name)
        low, high = info.smallest_subnormal, info.max
        found[name] = [power for power in powers if low <= power <= high]
    return found


def gradients() -> dict[str, list[float]]:
    """Return how log2 of the gradients of a small network is distributed."""
    pixels, targets = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(targets)
    torch.manual_seed(0)
    hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        part = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x[part]), y[part]))
        optimizer.step()
    every = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    sizes = torch.cat(every).abs()
    sizes = sizes[sizes > 0].log2()
    counts = torch.histc(sizes, bins=28, min=-28, max=0) / len(sizes)
    return {
        "edges": list(range(-28, 1)),
        "share": [round(c, 4) for c in counts.tolist()],
    }


def blocks() -> torch.Tensor:
    """Return blocks of 32: ties of each element format, many sizes, and the edges."""
    found = []
    for fmt in BLOCK_FORMATS.values():
        every = table(fmt.element)
        values = torch.unique(every[every.isfinite() & (every >= 0)])
        ties = (values[1:] + values[:-1]) / 2
        ties = torch.cat([ties, ties.new_zeros(-len(ties) % 31)]).view(-1, 31)
        first = torch.full_like(ties[:, :1], 2.0**fmt.element.max_exponent)
        found.append(torch.cat([first, ties], 1))
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([-120.0, -60, -8, 0, 7, 50, 110, 125], dtype=F64)
    noise = torch.randn(len(sizes), 32, dtype=F64, generator=generator)
    powers = torch.exp2(torch.tensor([-90.0, -1, 0, 12])).float()
    below = torch.nextafter(powers, torch.zeros(1)).double()
    edges = torch.tensor([0.0, 2.0**-149, 2.0**-126, torch.finfo(torch.float32).max])
    ramp = torch.linspace(1, -0.5, 32, dtype=F64)
    found += [noise * torch.exp2(sizes)[:, None], below[:, None] * ramp]
    found.append(edges[:, None].double() * ramp)
    # Two formats may have the same ties.
    distinct: torch.Tensor = torch.unique(torch.cat(found).float(), dim=0)
    return distinct


def microxcaling(folder: str) -> dict[str, object]:
    """Return what its CPU code makes of the blocks, rounding ties to even."""
    sys.path.insert(0, folder)
    quantize = importlib.import_module("mx.mx_ops")._quantize_mx
    x = blocks()
    record: dict[str, object] = {
        "source": "https://github.com/microsoft/microxcaling, commit 7bc41952 (MIT)",
        "x": x.tolist(),
    }
    names = [name for name in BLOCK_FORMATS if name.startswith("mx")]
    for name in names:
        theirs = name.removeprefix("mx").replace("fp4", "fp4_e2m1")
        settings = {"axes": [-1], "block_size": 32, "round": "even"}
        record[name] = quantize(x.clone(), 8, theirs, **settings).tolist()
    return record


def main() -> None:
    """Write the record."""
    if len(sys.argv) > 1:
        MICROXCALING.write_text(json.dumps(microxcaling(sys.argv[1])) + "\n", "utf-8")
        return
    record = {
        "values": values(),
        "errors": errors(),
        "ranges": ranges(),
        "gradients": gradients(),
    }
    RECORD.write_text(json.dumps(record) + "\n", "utf-8")


if __name__ == "__main__":
    main()
