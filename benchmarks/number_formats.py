"""Record what background/number_formats draws: values, errors, ranges, gradients.

Run from the top of the project; it writes ``benchmarks/number_formats.json``, which the
page draws. Each of the four parts is computed by a block of the page as well, which
compares it with the record::

    python -m benchmarks.number_formats

SPDX-License-Identifier: Apache-2.0
"""

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from snippets.number_formats import finfo, round_to, table

RECORD = Path(__file__).with_suffix(".json")
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
        found[name] = every[(every >= 0) & (every <= 8)].tolist()
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


def main() -> None:
    """Write the record."""
    record = {
        "values": values(),
        "errors": errors(),
        "ranges": ranges(),
        "gradients": gradients(),
    }
    RECORD.write_text(json.dumps(record) + "\n", "utf-8")


if __name__ == "__main__":
    main()
