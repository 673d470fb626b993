"""Train a small GPT in FP32, BF16, FP8 and FP4, and record the losses.

Run from the top of the project; it prints a table and records it in
``benchmarks/fp8_training.json``, which background/why_fp8_works reads and checks::

    python -m benchmarks.fp8_training

The model reads the letters of this repository's LICENSE: two layers, 128 wide, 400
thousand weights, 300 steps of AdamW, three seeds (in FP4, whose emulation takes three
times as long, two). Runs of one seed begin with the same weights and see the same
letters, so they differ by their arithmetic alone. All of them run on the emulator.

Four tasks on scikit-learn's digits ask for small differences of large numbers, in two
pairs: pale scans as they are, and with the gray of the paper taken off; a recurrent
network whose state passes through FP8 at each step, and one that carries it beside.

What else the page draws is measured with them: how large the numbers of a trained model
are and how far its gradients are off, what an outlier does to the numbers around it,
and what is left of an error when it is averaged.

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: T201 - a table is what it is for

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from snippets import fp8 as te
from snippets.fp8.quantized import Quantized

SEEDS = (0, 1, 2)
SEEDS_FP4 = (0, 1)
STEPS = 300
POINT = 10  # steps of a point of a curve
LAST = 50  # steps whose mean is the result of a run
FIRST = 8  # losses recorded to the last bit
BATCH, LETTERS, WIDTH, DEPTH, HEADS = 8, 64, 128, 2, 4
VOCABULARY = 128  # ASCII
LARGE_BATCH = 256  # times as many letters would make gradients as much smaller
LOSS_SCALE = 2.0**13
PAPER = 236.0  # the gray of the paper of a pale scan; the darkest ink is 220
TENSORS = "tensors"
ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".json")


# ------------------------------------------------------------------------- the training


class CharLM(nn.Module):
    """A GPT over letters; its linear layers are Transformer Engine's."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.letter = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LETTERS, WIDTH)
        self.layers = nn.ModuleList(
            te.TransformerLayer(
                WIDTH,
                4 * WIDTH,
                HEADS,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                attn_input_format="bshd",
                params_dtype=torch.float32,
                device="cpu",
            )
            for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, letters: Tensor) -> Tensor:
        """Return the scores of the letters that may come next."""
        h = self.letter(letters) + self.place.weight
        for layer in self.layers:
            h = layer(h)
        scores: Tensor = self.head(self.norm(h))
        return scores


def batches(generator: torch.Generator) -> Iterator[Tensor]:
    """Yield pieces of the license, one letter longer than the model reads."""
    text = (ROOT / "LICENSE").read_text("ascii")
    codes = torch.tensor(list(text.encode("ascii")))
    while True:
        starts = torch.randint(len(codes) - LETTERS, (BATCH,), generator=generator)
        yield codes[starts[:, None] + torch.arange(LETTERS + 1)]


class Run(NamedTuple):
    """How one run computes.

    Attributes:
        recipe: None for no FP8.
        bf16: compute in BF16 where it is not FP8.
        loss_scale: what the loss is multiplied by, and the gradients divided by.
        store: keep weights in E4M3: round them after each step.
    """

    recipe: te.Recipe | None = None
    bf16: bool = True
    loss_scale: float = 1.0
    store: bool = False


def e5m2(_role: te.QuantizerRole) -> te.Quantizer:
    """Return a quantizer to E5M2, scaled, for any tensor: no recipe allows that."""
    return te.Float8CurrentScalingQuantizer(torch.float8_e5m2)


def unscaled(role: te.QuantizerRole) -> te.Quantizer:
    """Return a quantizer to E4M3, or for gradients E5M2, whose scale stays 1."""
    grad = role.tensor_type.startswith("grad")
    fmt = torch.float8_e5m2 if grad else torch.float8_e4m3fn
    return te.Float8Quantizer(torch.ones(()), torch.zeros(()), fmt)


def nvfp4(two_d: bool = True, hadamard: bool = True, stochastic: bool = True) -> Run:
    """Return a run in NVFP4 with some of its three techniques."""
    recipe = te.NVFP4BlockScaling(
        disable_2d_quantization=not two_d,
        disable_rht=not hadamard,
        disable_stochastic_rounding=not stochastic,
    )
    return Run(recipe)


def runs() -> dict[str, Run]:
    """Return the runs by name; recipes are made anew, for they may hold state."""
    return {
        "FP32": Run(bf16=False),
        "BF16": Run(),
        "delayed": Run(te.DelayedScaling(amax_history_len=16)),
        "current": Run(te.Float8CurrentScaling()),
        "blockwise": Run(te.Float8BlockScaling()),
        "MXFP8": Run(te.MXFP8BlockScaling()),
        "E5M2 only": Run(te.CustomRecipe(qfactory=e5m2)),
        "no scales": Run(
            te.CustomRecipe(qfactory=unscaled), loss_scale=1 / LARGE_BATCH
        ),
        "loss scale only": Run(
            te.CustomRecipe(qfactory=unscaled), loss_scale=LOSS_SCALE
        ),
        "no main weights": Run(te.Float8CurrentScaling(), store=True),
        "NVFP4": nvfp4(),
        "NVFP4, no Hadamard": nvfp4(hadamard=False),
        "NVFP4, no stochastic": nvfp4(stochastic=False),
        "NVFP4, rounding only": nvfp4(False, False, False),
    }


def store_in_e4m3(model: nn.Module) -> None:
    """Round the weights of linear layers as they would be stored without others."""
    for weight in model.parameters():
        if weight.dim() == 2:
            scale = te.compute_current_scale(weight.detach().abs().amax(), 448.0)
            codes, inv_scale = te.quantize_tensor(weight.detach(), "E4M3", scale)
            weight.data.copy_(te.dequantize(codes, inv_scale))


def train(run: Run, seed: int, steps: int = STEPS) -> tuple[list[float], CharLM]:
    """Return the losses of a run, and the trained model."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of stochastic rounding
    model = CharLM()
    for weight in model.parameters():
        if weight.dim() == 2:
            start = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(0.02 * start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _, letters in zip(range(steps), batches(generator), strict=False):
        loss = loss_of(model, letters, run)
        torch.autograd.backward(loss * run.loss_scale)
        for weight in model.parameters():
            assert weight.grad is not None
            weight.grad /= run.loss_scale
        optimizer.step()
        optimizer.zero_grad()
        if run.store:
            store_in_e4m3(model.layers)
        losses.append(loss.item())
    return losses, model


def loss_of(model: nn.Module, letters: Tensor, run: Run) -> Tensor:
    """Return the mean loss of a letter."""
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=run.bf16),
        te.autocast(enabled=run.recipe is not None, recipe=run.recipe),
    ):
        scores = model(letters[:, :-1])
    return cross_entropy(scores.float().flatten(0, 1), letters[:, 1:].flatten())


def measure(name: str) -> dict[str, Any]:
    """Return the record of one run: for each seed, and its first losses exactly."""
    began = time.perf_counter()
    seeds = SEEDS_FP4 if name.startswith("NVFP4") else SEEDS
    losses = [train(runs()[name], seed)[0] for seed in seeds]
    pieces = range(0, STEPS, POINT)
    return {
        "first": losses[0][:FIRST],
        "last": [round(statistics.fmean(one[-LAST:]), 5) for one in losses],
        "seeds": [
            [round(statistics.fmean(one[i : i + POINT]), 5) for i in pieces]
            for one in losses
        ],
        "seconds": round(time.perf_counter() - began, 1),
    }


def compare(record: dict[str, Any], exact: dict[str, Any]) -> None:
    """Add to a record what it has more than FP32, in percent: points, and results."""
    ratios = [
        [a / b for a, b in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(record["seeds"], exact["seeds"], strict=False)
    ]
    record["more"] = [
        round(100 * (statistics.fmean(point) - 1), 3)
        for point in zip(*ratios, strict=True)
    ]
    record["percent"] = [
        round(100 * (a / b - 1), 3)
        for a, b in zip(record["last"], exact["last"], strict=False)
    ]


# ------------------------------------------------- small differences of large numbers


def linear(inputs: int, outputs: int) -> te.Linear:
    """Return a layer without a bias."""
    return te.Linear(
        inputs, outputs, bias=False, params_dtype=torch.float32, device="cpu"
    )


class Scans(nn.Sequential):
    """A classifier of digits, 8 x 8 pixels, pale ink on paper that is not white.

    Args:
        centered: take the gray of the paper off, as is done everywhere.
    """

    def __init__(self, centered: bool) -> None:
        """Make two layers and a head."""
        super().__init__(
            *(linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()),
            *(linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()),
            nn.Linear(64, 10),
        )
        self.centered = centered

    def forward(self, ink: Tensor) -> Tensor:
        """Return the scores of the digits for ink from 0 to 16."""
        x = -ink / 16 if self.centered else (PAPER - ink) / 255
        for layer in self:
            x = layer(x)
        return x


class Recurrent(nn.Module):
    """Reads a digit in 16 pieces of four pixels, and adds what it reads to its state.

    The weight of the state starts as the identity (Le, Jaitly, Hinton 2015, "A Simple
    Way to Initialize Recurrent Networks of Rectified Linear Units", arXiv:1504.00941).

    Args:
        residual: carry the state beside the product, whose weight then starts as zero.
            It is the same function of the same numbers.
    """

    def __init__(self, residual: bool) -> None:
        """Make the three layers."""
        super().__init__()
        self.read, self.head = nn.Linear(4, 64), nn.Linear(64, 10)
        self.turn = linear(64, 64)
        self.residual = residual
        (nn.init.zeros_ if residual else nn.init.eye_)(self.turn.weight)

    def forward(self, ink: Tensor) -> Tensor:
        """Return the scores of the digits for ink from 0 to 16."""
        pieces = self.read(ink.view(-1, 16, 4) / 8 - 1)
        state = torch.zeros_like(pieces[:, 0])
        for i in range(16):
            new = self.turn(state) + pieces[:, i]
            state = torch.relu(state + new if self.residual else new)
        scores: Tensor = self.head(state)
        return scores


class Task(NamedTuple):
    """How digits are learned.

    Attributes:
        model: makes the network.
        steps: of Adam.
        rate: its learning rate.
        decay: lower it to zero on the way.
        recipes: the runs, by their names in `runs`.
    """

    model: Callable[[], nn.Module]
    steps: int
    rate: float
    decay: bool
    recipes: tuple[str, ...]


ALL = ("FP32", "BF16", "delayed", "current", "blockwise", "MXFP8", "E5M2 only")
# Delayed scaling has one history a layer, and a recurrent layer is called many times.
SOME = ("FP32", "BF16", "current", "E5M2 only")
TASKS = {
    "pale scans": Task(lambda: Scans(False), 150, 3e-3, False, ALL),
    "pale scans, centered": Task(lambda: Scans(True), 150, 3e-3, False, ALL),
    "recurrent": Task(lambda: Recurrent(False), 400, 1e-3, True, SOME),
    "recurrent, residual": Task(lambda: Recurrent(True), 400, 1e-3, True, SOME),
}


def learn(
    task: Task, run: Run, seed: int, stop: int | None = None
) -> tuple[list[float], list[float]]:
    """Return the loss of each step, and which part of its images was recognized."""
    ink, digits = (torch.tensor(x) for x in load_digits(return_X_y=True))
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=task.rate)
    generator = torch.Generator().manual_seed(seed)
    losses, right = [], []
    for step in range(task.steps if stop is None else stop):
        rate = task.rate * min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / task.steps) if task.decay else rate
        rows = torch.randint(len(ink), (128,), generator=generator)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=run.bf16),
            te.autocast(enabled=run.recipe is not None, recipe=run.recipe),
        ):
            scores = model(ink[rows].float())
        loss = cross_entropy(scores.float(), digits[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        right.append((scores.argmax(-1) == digits[rows]).float().mean().item())
    return losses, right


def measure_task(name: str) -> dict[str, Any]:
    """Return the record of one task: a curve for each recipe and seed, and the end.

    ``right`` is the percentage of images recognized in the last 50 steps; ``percent``
    how much more the loss is there than FP32's.
    """
    task = TASKS[name]
    made: dict[str, Any] = {}
    for key in task.recipes:
        found = [learn(task, runs()[key], seed) for seed in SEEDS]
        last = [statistics.fmean(losses[-LAST:]) for losses, _ in found]
        made[key] = {
            "seeds": [
                [
                    round(statistics.fmean(losses[i : i + POINT]), 4)
                    for i in range(0, task.steps, POINT)
                ]
                for losses, _ in found
            ],
            "last": [round(value, 5) for value in last],
            "right": [
                round(100 * statistics.fmean(right[-LAST:]), 2) for _, right in found
            ],
        }
    for one in made.values():
        one["percent"] = [
            round(100 * (a / b - 1), 2)
            for a, b in zip(one["last"], made["FP32"]["last"], strict=True)
        ]
    return {"steps": list(range(POINT, task.steps + 1, POINT)), "runs": made}


# ------------------------------------------------------------------------- the tensors


class Recorder(te.IdentityQuantizer):
    """Changes nothing, and counts the magnitudes of what it sees, by powers of two."""

    def __init__(self, counts: Tensor, low: int) -> None:
        """Count into a tensor, whose first element is for 2**low."""
        super().__init__()
        self.counts, self.low = counts, low

    def to_quantized(
        self, x: Tensor, *, rowwise: bool = True, columnwise: bool = True
    ) -> Quantized:
        """Count, and return what came."""
        place = torch.frexp(x.float())[1][x != 0] - 1 - self.low
        place = place.long().clamp(0, len(self.counts) - 1)
        self.counts += torch.bincount(place, minlength=len(self.counts))
        return super().to_quantized(x, rowwise=rowwise, columnwise=columnwise)


def magnitudes(model: nn.Module, low: int = -40, high: int = 8) -> dict[str, Any]:
    """Return which part of each kind of tensor lies between which powers of two."""
    kinds = {"input": "activations", "weight": "weights", "grad_output": "gradients"}
    counts = {name: torch.zeros(high - low, dtype=torch.long) for name in kinds}
    unused = torch.zeros(high - low, dtype=torch.long)

    def watch(role: te.QuantizerRole) -> te.Quantizer:
        return Recorder(counts.get(role.tensor_type, unused), low)

    letters = next(batches(torch.Generator().manual_seed(99)))
    watched = Run(te.CustomRecipe(qfactory=watch))
    torch.autograd.backward(loss_of(model, letters, watched))
    record: dict[str, Any] = {"edges": list(range(low, high + 1))}
    for kind, name in kinds.items():
        part = 100 * counts[kind].double() / counts[kind].sum()
        record[name] = [round(value, 3) for value in part.tolist()]
    return record


def zeros(counted: dict[str, Any]) -> dict[str, list[float]]:
    """Return how much of each kind becomes zero, in percent.

    In E4M3 and E5M2, each without a scale and with one for all that was counted: what
    is below half of the smallest number.
    """
    edges, found = counted["edges"], {}
    for kind in counted.keys() - {"edges"}:
        parts = dict(zip(edges[:-1], counted[kind], strict=True))
        top = max(power for power, part in parts.items() if part)
        found[kind] = [
            round(
                sum(part for power, part in parts.items() if power + shift < lowest), 3
            )
            for highest, lowest in ((8, -10), (15, -17))
            for shift in (0, highest - 1 - top)
        ]
    return {kind: found[kind] for kind in counted if kind in found}


def noise(trained: nn.Module, pieces: int = 8) -> dict[str, Any]:
    """Return what each arithmetic does to one model, in percent.

    ``off``: how far the gradients of a batch are from BF16's; ``along``: how much
    longer or shorter they are along those; ``loss``: how much more the loss is.
    "another batch" is BF16 with other letters.
    """
    letters = [
        x for _, x in zip(range(pieces + 1), batches(torch.Generator()), strict=False)
    ]
    exact = gradients(trained, letters, runs()["BF16"])
    record: dict[str, Any] = {}
    for name, run in runs().items():
        if run.store:
            continue
        found = gradients(trained, letters, run)
        record[name] = against(found[:pieces], exact[:pieces])
    record["another batch"] = against(exact[1:], exact[:pieces])
    return record


Gradients = list[tuple[float, Tensor]]


def gradients(trained: nn.Module, letters: list[Tensor], run: Run) -> Gradients:
    """Return the loss and the gradient of each batch, as a new model sees them."""
    model = CharLM()
    for ours, theirs in zip(model.parameters(), trained.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    weights = [w for w in model.layers.parameters() if w.dim() == 2]
    found: Gradients = []
    for piece in (*letters[:2], *letters):  # delayed scaling learns its scales of two
        loss = loss_of(model, piece, run)
        torch.autograd.backward(loss * run.loss_scale)
        flat = [
            w.grad.flatten() / run.loss_scale for w in weights if w.grad is not None
        ]
        found.append((loss.item(), torch.cat(flat)))
        model.zero_grad()
    return found[2:]


def against(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Return the mean differences, in percent."""
    pairs = list(zip(found, exact, strict=True))
    off = [((a - b).norm() / b.norm()).item() for (_, a), (_, b) in pairs]
    along = [(a @ b / (b @ b)).item() - 1 for (_, a), (_, b) in pairs]
    loss = [a / b - 1 for (a, _), (b, _) in pairs]
    parts = {"off": off, "along": along, "loss": loss}
    return {key: round(100 * statistics.fmean(part), 3) for key, part in parts.items()}


def outliers() -> dict[str, Any]:
    """Return the error of normal numbers beside one that is 2**k times larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 512, generator=generator)
    powers = list(range(25))
    errors: dict[str, list[float]] = {
        name: []
        for name in ("INT8", "E4M3", "E5M2", "E4M3, blocks of 128", "MXFP8", "NVFP4")
    }
    for power in powers:
        x[0, 0] = 2.0**power
        for name, column in errors.items():
            error = (quantized(x, name) - x).flatten()[1:].norm() / x.flatten()[
                1:
            ].norm()
            column.append(round(100 * error.item(), 3))
    return {"powers": powers, **errors}


def quantized(x: Tensor, name: str) -> Tensor:
    """Return ``x`` as it comes back from a format."""
    amax = x.abs().amax()
    if name == "INT8":
        return (x * (127 / amax)).round() * (amax / 127)
    if name in {"E4M3", "E5M2"}:
        largest = 448.0 if name == "E4M3" else 57344.0
        scale = te.compute_current_scale(amax, largest)
        return te.dequantize(*te.quantize_tensor(x, name, scale))
    if name == "MXFP8":
        return te.dequantize(*te.quantize_mxfp8(x, "E4M3"))
    if name == "NVFP4":
        return te.dequantize(*te.quantize_nvfp4(x))
    return te.dequantize(*te.quantize_block(x, "E4M3"))


def averages(most: int = 1024) -> dict[str, Any]:
    """Return the relative error of the mean of n quantized copies of one tensor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator)
    record: dict[str, Any] = {"draws": [], "nearest": [], "stochastic": []}
    total = torch.zeros_like(x)
    nearest = (te.dequantize(*te.quantize_nvfp4(x)) - x).norm() / x.norm()
    for n in range(1, most + 1):
        total += te.dequantize(
            *te.quantize_nvfp4(x, stochastic=True, generator=generator)
        )
        if n & (n - 1) == 0:
            error = (total / n - x).norm() / x.norm()
            record["draws"].append(n)
            record["nearest"].append(round(100 * nearest.item(), 3))
            record["stochastic"].append(round(100 * error.item(), 3))
    return record


def add(runs_made: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Add to the recorded numbers, in the order of `runs`, and return all of them."""
    old: dict[str, Any] = {"runs": {}}
    if RECORD.exists():
        old = json.loads(RECORD.read_text("utf-8"))
    known = old["runs"] | runs_made
    ordered = {name: known[name] for name in runs() if name in known}
    for one in ordered.values():
        compare(one, ordered.get("FP32", one))
    others = ("noise", "magnitudes", "zeros", "outliers", "averages", *TASKS)
    kept = {key: old[key] for key in others if key in old}
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steps": [n + POINT for n in range(0, STEPS, POINT)],
        "runs": ordered,
        **(kept | tensors),
    }
    RECORD.write_text(dumps(record) + "\n")
    return record


def main(names: list[str]) -> int:
    """Measure what is named, or everything; return 1 if FP8 lost two percent.

    Names are those of `runs` and `TASKS`, and "tensors" for all else.
    """
    torch.set_num_threads(1)
    for name in names or [*runs(), *TASKS, TENSORS]:
        if name in TASKS:
            task = measure_task(name)
            add({}, {name: task})
            print(name)
            for key, one in task["runs"].items():
                said = "".join(f"{value:+8.1f} %" for value in one["percent"])
                right = "".join(f"{value:8.1f} %" for value in one["right"])
                print(f"  {key:20} loss{said}, right{right}", flush=True)
        elif name == TENSORS:
            _, trained = train(runs()["BF16"], SEEDS[0])
            counted = magnitudes(trained)
            tensors = {
                "noise": noise(trained),
                "magnitudes": counted,
                "zeros": zeros(counted),
                "outliers": outliers(),
                "averages": averages(),
            }
            add({}, tensors)
        else:
            one = add({name: measure(name)}, {})["runs"][name]
            said = "".join(f"{value:+8.2f} %" for value in one["percent"])
            print(f"{name:22}{one['seconds']:7.1f} s {said}", flush=True)
    made = add({}, {})["runs"]
    scaled = {"delayed", "current", "blockwise", "MXFP8"} & made.keys()
    return int(any(max(made[name]["percent"]) > 2 for name in scaled))


def dumps(record: dict[str, Any]) -> str:
    """Write JSON with each list of numbers on one line."""
    parts = []
    for key, value in record.items():
        if isinstance(value, dict):
            inner = dumps(value).replace("\n", "\n  ")
            parts.append(f"  {json.dumps(key)}: {inner}")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
