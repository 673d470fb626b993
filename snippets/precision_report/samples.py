"""Numbers of each tensor, gathered as a model runs and rounded all at once at the end.

One pass over a tensor for its largest and smallest number, and a copy of at most 4,096
of its numbers, is all that the step waits for.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .formats import FORMATS, Format, exponents, round_, scales
from .report import HIGH, KINDS, LOW, Row

BLOCK, BLOCKS = 32, 128  # numbers in a row, and rows, in a sample
_CHANNELS = ("Conv", "BatchNorm", "GroupNorm", "InstanceNorm")
GROUP = 16  # samples are rounded at once, half a megabyte: it fits in a cache
# A mask that asks finfo for its number does so in each dtype: as harmless as -Inf.
MASKS = tuple(torch.finfo(dtype).max for dtype in (torch.float32, torch.float64))
CALLS = 4  # of a module that are sampled; of all others the amax is taken


class Value:
    """What is known of the numbers in a tensor, which its views share."""

    __slots__ = ("cast", "index", "limits", "low", "numel")

    def __init__(self, *, low: bool = False) -> None:
        self.low = low  # autocast would have made it in 16 bits
        self.cast = False  # or would cast it to 16 bits where it is used
        self.index = False  # turned into whole numbers, so more than a quantity
        self.limits = self.numel = -1  # which of Samples.limits, and of how many


class Samples:
    """The samples of one step."""

    def __init__(self) -> None:
        self.limits: list[Tensor] = []  # min and max of each tensor
        self.rows: dict[tuple[str, str, str], tuple[Row, Value, list[int]]] = {}
        self.picked: dict[int, Tensor] = {}  # a sample, by its limits
        self.peaks: dict[int, Tensor] = {}  # and the largest of each number's feature
        self.weights: list[tuple[Row, Tensor, Tensor]] = []  # with their updates
        self.places: dict[tuple[int, torch.device], Tensor] = {}
        self.features: dict[tuple[torch.Size, int, torch.device], Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def limit(self, x: Tensor) -> int:
        """Take the smallest and the largest number; return where they are kept."""
        self.limits.append(torch.stack(torch.aminmax(_real(x))))
        return len(self.limits) - 1

    def pick(self, x: Tensor) -> Tensor:
        """Copy pieces of a tensor: the same places for all tensors of one size."""
        x = _real(x)
        size = x.numel()
        if size <= BLOCK * BLOCKS:
            padded = nn.functional.pad(x.reshape(-1), (0, -size % BLOCK))
            return padded.view(-1, BLOCK).clone()
        if (size, x.device) not in self.places:
            places = torch.randint(size // BLOCK, (BLOCKS,), generator=self.generator)
            self.places[size, x.device] = places.to(x.device)
        rows = x.reshape(-1)[: size // BLOCK * BLOCK].view(-1, BLOCK)
        return rows.index_select(0, self.places[size, x.device])

    def peak(self, x: Tensor, row: Row, sample: Tensor) -> Tensor:
        """Return, for each number of a sample, the largest of its feature.

        A feature is a channel of a convolution, a neuron of a weight, else a place of
        the last dimension; of a weight's gradient each number is one.
        """
        if row.kind == "grad_weight" or x.dim() < 2 or x.is_complex():
            return sample.abs()
        is_channel = x.dim() == 4 or row.layer.startswith(_CHANNELS)
        dim = 0 if row.kind == "weight" else 1 if is_channel else x.dim() - 1
        others = [d for d in range(x.dim()) if d != dim]
        x = _real(x)
        largest = torch.maximum(x.amax(others), -x.amin(others))
        key = x.shape, dim, x.device
        if key not in self.features:
            lines = torch.arange(len(sample), device=x.device)
            if x.numel() > BLOCK * BLOCKS:
                lines = self.places[x.numel(), x.device]
            numbers = lines[:, None] * BLOCK + torch.arange(BLOCK, device=x.device)
            inner = math.prod(x.shape[dim + 1 :])
            self.features[key] = numbers // inner % x.shape[dim]
        return largest[self.features[key]]

    def take(self, row: Row, x: Tensor, value: Value, limits: int) -> None:
        """Count a tensor for the row of its module, kind and name."""
        key = row.module, row.kind, row.tensor
        row, _, taken = self.rows.setdefault(key, (row, value, []))
        row.calls += 1
        taken.append(limits)
        if row.calls <= CALLS and limits not in self.picked:
            self.picked[limits] = self.pick(x)
            self.peaks[limits] = self.peak(x, row, self.picked[limits])

    def update(self, row: Row, update: Tensor, weight: Tensor) -> None:
        """Count a sampled update of a sampled weight."""
        limits = self.limit(update)
        self.picked[limits], self.peaks[limits] = update, update.abs()
        row.calls = 1
        self.rows[row.module, row.kind, row.tensor] = row, Value(), [limits]
        self.weights.append((row, weight, update))

    def close(self, formats: tuple[str, ...]) -> tuple[list[Row], list[list[float]]]:
        """Round all samples to all formats; return the rows, and all limits."""
        limits: list[list[float]] = gather(self.limits).tolist()
        places = {at: i for i, at in enumerate(self.picked)}
        parts: dict[str, list[Tensor]] = {}
        for i in range(0, len(places), GROUP):
            stats = _Statistics(self, list(places)[i : i + GROUP], limits)
            for name, table in stats.tables(formats).items():
                parts.setdefault(name, []).append(table)
        facts = torch.cat(parts.pop("facts")).tolist()
        own = [
            [places[at] for at in taken if at in places]
            for _, _, taken in self.rows.values()
        ]
        pairs = torch.tensor([(i, j) for i, mine in enumerate(own) for j in mine])
        sums = {name: _add(torch.cat(tables), pairs) for name, tables in parts.items()}
        for i, (row, value, taken) in enumerate(self.rows.values()):
            row.low = value.low or (
                value.cast and row.kind not in {"output", "grad_output"}
            )
            row.is_finite = all(math.isfinite(x) for at in taken for x in limits[at])
            others = [max(map(abs, limits[at])) for at in taken[CALLS:]]
            amaxes, least, is_integer = zip(*(facts[j] for j in own[i]), strict=True)
            row.amax = max([*amaxes, *filter(_is_number, others)])
            row.is_index, row.is_integer = value.index, all(is_integer)
            row.histogram, row.features = sums["histogram"][i], sums["features"][i]
            smallest = min(filter(None, least), default=1.0)
            row.range_log2 = math.log2(row.amax / smallest) if row.amax else 0.0
            for name in formats:
                row.formats[name] = _stats(FORMATS[name], row, sums[name][i])
        self._lose(formats)
        modules = dict.fromkeys(row.module for row, _, _ in self.rows.values())
        order = {name: i for i, name in enumerate(modules)}
        rows = [row for row, _, _ in self.rows.values()]
        rows.sort(key=lambda row: (order[row.module], KINDS.index(row.kind)))
        return rows, limits

    def _lose(self, formats: tuple[str, ...]) -> None:
        """Add each update to its weight, in each format that has no scale."""
        if not self.weights:
            return
        weight = gather([weight for _, weight, _ in self.weights])
        update = gather([update for _, _, update in self.weights])
        sizes = [len(update) for _, _, update in self.weights]
        moves = update != 0
        for name in formats:
            fmt = FORMATS[name]
            if fmt.block is None:
                start = round_(weight, fmt)
                lost = (round_(start + update, fmt) == start) & moves
                parts = torch.split(lost, sizes), torch.split(moves, sizes)
                for (row, _, _), a, b in zip(self.weights, *parts, strict=True):
                    row.formats[name]["lost"] = int(a.sum()) / max(int(b.sum()), 1)


class _Statistics:
    """Samples of tensors, 32 numbers a line, and what is true of them in any format."""

    def __init__(
        self, samples: Samples, group: list[int], limits: list[list[float]]
    ) -> None:
        picked = [samples.picked[at] for at in group]
        self.x = gather(picked).nan_to_num_(0.0, 0.0, 0.0)
        for mask in MASKS:
            self.x.masked_fill_(self.x.abs() == mask, 0.0)
        self.peaks = gather([samples.peaks[at] for at in group])
        self.peaks.nan_to_num_(0.0, MASKS[0])  # not lost, where it is masked at times
        self.count, sizes = len(group), torch.tensor([len(x) for x in picked])
        self.owner = torch.arange(self.count).repeat_interleave(sizes)
        self.magnitude, self.nonzero = self.x.abs(), self.x != 0
        self.line_amax = self.magnitude.amax(1)
        seen = self._reduce(self.line_amax, "amax")
        pairs = [max(map(abs, limits[at])) for at in group]  # of all numbers
        self.amax = [
            a if _is_number(a) else s for a, s in zip(pairs, seen, strict=True)
        ]
        self.peak = torch.tensor(self.amax, dtype=torch.float64)[self.owner]
        self.unit = self.peak.clamp(min=2.0**-1000)[:, None]  # no square underflows
        self.known = self.sum((self.x / self.unit).square_(), self.nonzero)
        least = self.magnitude.masked_fill(~self.nonzero, math.inf).amin(1)
        self.least = [
            min(x, a)
            for x, a in zip(self._reduce(least, "amin"), self.amax, strict=True)
        ]
        whole = self._reduce((self.x == self.x.round()).all(1).double(), "amin")
        # Above 2**23 FP32 has whole numbers only, so there it says nothing.
        self.is_integer = [
            bool(w) and 1 < a < 2**23 for w, a in zip(whole, self.amax, strict=True)
        ]

    def tables(self, formats: tuple[str, ...]) -> dict[str, Tensor]:
        """Return a line for each tensor: facts, histograms, and sums by format."""
        facts = torch.tensor(
            [self.amax, self.least, self.is_integer], dtype=torch.float64
        )
        return {
            "facts": facts.T,
            "histogram": self._count(self.x),
            "features": self._count(self.peaks),
            **{name: self.round(FORMATS[name]) for name in formats},
        }

    def _count(self, x: Tensor) -> Tensor:
        bins = HIGH - LOW + 1
        place = exponents(x).clamp_(LOW, HIGH) + (bins * self.owner[:, None] - LOW)
        weights = self.nonzero.double().view(-1)
        counted = torch.bincount(place.view(-1), weights, bins * self.count)
        return counted.view(self.count, bins).long()

    def _reduce(self, lines: Tensor, how: str) -> list[float]:
        start = lines.new_full((self.count,), 0.0 if how == "amax" else math.inf)
        reduced: list[float] = start.scatter_reduce_(0, self.owner, lines, how).tolist()
        return reduced

    def round(self, fmt: Format) -> Tensor:
        """Round all samples to one format; return its sums for each tensor."""
        if fmt.block is None:
            y = round_(self.x, fmt).clamp_(-fmt.max, fmt.max)
            over, peaks = self.magnitude >= fmt.overflow, self.peaks
        else:
            scale = scales(fmt, self.line_amax if fmt.block else self.peak)[:, None]
            y = round_(self.x * scale, fmt).clamp_(-fmt.max, fmt.max).div_(scale)
            over, peaks = torch.zeros_like(self.nonzero), self.peaks * scale
        zeroed, changed = (y == 0) & self.nonzero, y != self.x
        gone = (peaks <= fmt.zero) & self.nonzero
        noise = y.sub_(self.x).div_(self.unit).square_()
        sums = self.sum(noise, zeroed, gone, over, changed)
        return torch.cat([self.known, sums], 1)

    def sum(self, *columns: Tensor) -> Tensor:
        """Sum over the lines of each tensor."""
        lines = [
            c.sum(1) if c.is_floating_point() else c.count_nonzero(1) for c in columns
        ]
        table = torch.stack([x.double() for x in lines], 1)
        return table.new_zeros(self.count, len(lines)).index_add_(0, self.owner, table)


def _is_number(amax: float) -> bool:
    """Say whether it is no infinity, and no mask."""
    return math.isfinite(amax) and amax not in MASKS


def _add(x: Tensor, pairs: Tensor) -> list[list[Any]]:
    """Add up the lines of ``x`` for each row; ``pairs`` are of a row and a line."""
    row, line = pairs.T
    sums = x.new_zeros(len(row.unique()), x.shape[1])
    added: list[list[Any]] = sums.index_add_(0, row, x[line]).tolist()
    return added


def _stats(fmt: Format, row: Row, sums: list[float]) -> dict[str, float | None]:
    """Return the shares of a row from the sums of its tensors."""
    signal, nonzero, noise, zeroed, gone, over, changed = sums
    share, size = over / max(nonzero, 1), max(math.prod(row.shape), 1)
    if fmt.block is None and row.amax >= fmt.overflow:
        share = max(share, 1 / size)  # it need not be in the sample
    stats: dict[str, float | None] = {
        "underflow": zeroed / max(nonzero, 1),
        "features_lost": gone / max(nonzero, 1),
        "overflow": share,
        "sqnr_db": 10 * math.log10(signal / noise) if signal and noise else None,
    }
    if row.is_integer and row.kind in {"input", "output", "weight"}:
        stats["integers_lost"] = changed / max(nonzero, 1)
    return stats


def gather(tensors: list[Tensor]) -> Tensor:
    """Join tensors of any device on the CPU, in float64."""
    if len({(t.device, t.dtype) for t in tensors}) > 1:
        tensors = [t.cpu().double() for t in tensors]
    if tensors[0].dim() == 1:
        return torch.stack(tensors).cpu().double()
    return torch.cat(tensors).cpu().double()


def tensors_in(
    things: object, place: str = "", *, every: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor with fractions (or ``every``) in a nest, and its place.

    Of a sparse or nested (jagged) one it is the tensor of its values.
    """
    inner: Iterable[tuple[object, object]] = ()
    if isinstance(things, Tensor):
        if things.layout is torch.sparse_coo:
            things = things._values()
        elif things.is_nested or things.layout is not torch.strided:
            things = things.values()
        has_fraction = things.is_floating_point() or things.is_complex()
        if not things.is_meta and (every or (has_fraction and things.numel())):
            yield place, things
    elif isinstance(things, Mapping):
        inner = things.items()
    elif isinstance(things, (list, tuple)):
        inner = [("", things[0])] if len(things) == 1 else enumerate(things)
    elif is_dataclass(things) and not isinstance(things, type):
        inner = [(f.name, getattr(things, f.name)) for f in fields(things)]
    for key, thing in inner:
        yield from tensors_in(thing, f"{place}.{key}".strip("."), every=every)


def _real(x: Tensor) -> Tensor:
    x = x.detach()
    x = x.to_dense() if x.layout != torch.strided else x
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
