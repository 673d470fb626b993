"""Statistics of all samples, many at once, when the step is over."""

import math

import torch
from torch import Tensor

from .formats import FORMATS, Pages, exponents, round_, scales
from .report import HIGH, LOW, Row
from .samples import BLOCK, Samples, gather

LINES = 384  # are rounded at once, to five formats: they fit in a cache
BINS = HIGH - LOW + 1
EXACT = 280.0  # dB; beyond is the error of float64, of numbers that the format has
# A mask that asks finfo for its number does so in each dtype: as harmless as -Inf.
MASKS = tuple(torch.finfo(dtype).max for dtype in (torch.float32, torch.float64))


def fill(samples: Samples, formats: tuple[str, ...]) -> list[list[float]]:
    """Fill in the rows of all samples.

    Returns:
        The smallest and the largest number of each tensor.
    """
    limits = gather(samples.limits).view(-1, 2)
    amax = limits.abs().nan_to_num_(math.inf)
    for mask in MASKS:
        amax[amax == mask] = math.inf
    is_spoilt = amax.isinf().any(1)
    amax = torch.where(amax.isinf(), 0.0, amax).amax(1)
    picked = list(samples.picked)
    table = _Table(samples, amax[picked], is_spoilt[picked], formats)

    # A row has a tensor for each call; of the first calls it has a line in the table.
    entries = list(samples.rows.values())
    calls = [(i, at) for i, (_, _, taken) in enumerate(entries) for at in taken]
    lines = {at: line for line, at in enumerate(samples.picked)}
    sampled = [(i, lines[at]) for i, at in calls if at in lines]
    (owner, call), (row, line) = torch.tensor(calls).T, torch.tensor(sampled).T
    count, both = len(entries), torch.cat([row, owner])
    largest = torch.cat([table.amax[line], amax[call]])
    is_finite = limits.isfinite().all(1).double()

    def add(x: Tensor) -> Tensor:
        return x.new_zeros(count, x.shape[1]).index_add_(0, row, x[line])

    facts = zip(
        entries,
        _reduce(both, largest, count, "amax").tolist(),
        _reduce(row, table.least[line], count, "amin").tolist(),
        _reduce(row, table.is_integer.double()[line], count, "amin").tolist(),
        _reduce(owner, is_finite[call], count, "amin").tolist(),
        _counts(add(table.magnitudes)),
        _counts(add(table.features)),
        strict=True,
    )
    for (own, value, _), most, least, whole, finite, *histograms in facts:
        own.amax, own.is_finite, own.is_integer = most, finite == 1, whole == 1
        own.range_log2 = math.log2(most / min(least, most)) if most else 0.0
        own.histogram, own.features = histograms
        own.is_index, made_here = value.index, own.kind in {"output", "grad_output"}
        own.low = value.low or (value.cast and not made_here)
    rows = [own for own, _, _ in entries]
    signal, nonzero, *columns = add(table.sums).unbind(1)
    for i, name in enumerate(formats):
        noise, *counts = columns[i :: len(formats)]
        shares = [count / nonzero.clamp(min=1) for count in counts]
        _tell(rows, name, 10 * torch.log10(signal / noise), shares)
    _lose(samples, formats)
    pairs: list[list[float]] = limits.tolist()
    return pairs


class _Table:
    """What is true of each sampled tensor, a line for each.

    Attributes:
        amax: As given, or that of the sample where it is more.
        least: Of what is not zero; Inf if there is none.
        is_integer: Whole numbers only.
        sums: Signal, numbers that are not zero; then for each format the noise, for
            each what it makes zero, and so on.
        magnitudes: How many numbers that are not zero have which exponent.
        features: Of gradients, the same of the largest number of each one's feature.
    """

    def __init__(
        self, samples: Samples, amax: Tensor, is_spoilt: Tensor, names: tuple[str, ...]
    ) -> None:
        """Round; Inf, NaN and masks count as zero where there are any."""
        picked, formats = list(samples.picked.values()), [FORMATS[n] for n in names]
        x, peaks = gather(picked), gather(list(samples.peaks.values()))
        if is_spoilt.any():
            x.nan_to_num_(0.0, 0.0, 0.0)
            for mask in MASKS:
                x[x.abs() == mask] = 0.0
            peaks.nan_to_num_(0.0, MASKS[0])  # not lost, where it is masked at times
        sizes = torch.tensor([len(sample) for sample in picked])
        owner = torch.arange(len(picked)).repeat_interleave(sizes)
        line_amax = torch.maximum(x.amax(1), -x.amin(1))
        seen = _reduce(owner, line_amax, len(picked), "amax")
        self.amax = torch.maximum(amax, seen)
        peak = self.amax[owner]
        by_format = [scales(fmt, line_amax if fmt.block else peak) for fmt in formats]
        scale, pages = torch.stack(by_format)[..., None], Pages.of(formats)
        nearest, parts = [], []
        for i in range(0, len(x), LINES):
            at = slice(i, i + LINES)
            is_zero = x[at] == 0
            nearest.append(torch.where(is_zero, math.inf, x[at].abs()).amin(1))
            feature = torch.where(is_zero, math.inf, peaks[at])
            parts.append(_sums(x[at], feature, peak[at], scale[:, at], pages))
        self.least = _reduce(owner, torch.cat(nearest), len(picked), "amin")
        table = torch.cat(parts)
        table = table.new_zeros(len(picked), table.shape[1]).index_add_(0, owner, table)
        fractions, self.sums = table[:, 0], table[:, 1:]
        # Above 2**23 FP32 has whole numbers only, so there it says nothing.
        has_integers = (self.amax > 1) & (self.amax < 2**23)
        self.is_integer = (fractions == 0) & (self.amax.frac() == 0) & has_integers
        self.magnitudes = _histogram(x, owner, len(picked))
        followed = torch.tensor([at in samples.followed for at in samples.picked])
        lines = followed[owner]
        feature = torch.where(x[lines] == 0, 0.0, peaks[lines])
        self.features = _histogram(feature, owner[lines], len(picked))


def _sums(
    x: Tensor, feature: Tensor, peak: Tensor, scale: Tensor, pages: Pages
) -> Tensor:
    """Round lines of numbers to all formats; return the columns for each line."""
    unit = peak.clamp(min=2.0**-1000)[:, None]  # so that no square underflows
    nonzero = x.bool().count_nonzero(1)
    fractions = (x != x.round()).count_nonzero(1)
    scaled = x * scale
    over = changed = torch.zeros_like(scale[..., 0])
    if peak.max() >= pages.overflow.min():
        over = (x.abs() >= pages.overflow).count_nonzero(2)
        scaled.clamp_(-(2.0**900), 2.0**900)  # of float64
    y = round_(scaled, pages).clamp_(max=pages.max).clamp_(min=-pages.max)
    if ((fractions == 0) & (peak > 1)).any():
        changed = (y / scale != x).count_nonzero(2)
    zeroed = nonzero - y.bool().count_nonzero(2)
    kept = (feature * scale).sub_(pages.zero).clamp_(min=0.0)
    gone = BLOCK - kept.bool().count_nonzero(2)
    noise = torch.linalg.vector_norm(y.sub_(scaled).div_(unit * scale), dim=2).square_()
    signal = torch.linalg.vector_norm(x / unit, dim=1).square_()
    one = torch.stack([fractions.double(), signal, nonzero.double()])
    return torch.cat([one, noise, zeroed, gone, over, changed]).T


def _histogram(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """Count the exponents, from `LOW` to `HIGH`, of what is not zero of each owner."""
    table = torch.zeros(count, BINS, dtype=torch.int64)
    for i in range(0, len(x), LINES):
        lines, own = x[i : i + LINES], owner[i : i + LINES]
        first, last = int(own[0]), int(own[-1])
        place = exponents(lines).clamp_(LOW, HIGH).sub_(LOW)
        place += BINS * (own - first)[:, None]
        counts = torch.bincount(place.view(-1), minlength=BINS * (last - first + 1))
        table[first : last + 1] += counts.view(-1, BINS)
        zeros = (lines == 0).count_nonzero(1)
        table[:, 0].index_add_(0, own, zeros, alpha=-1)  # zero has the lowest exponent
    return table


def _reduce(owner: Tensor, x: Tensor, count: int, how: str) -> Tensor:
    """Return the largest or the smallest of each owner's numbers."""
    start = x.new_full((count,), -math.inf if how == "amax" else math.inf)
    return start.scatter_reduce_(0, owner, x, how)


def _counts(table: Tensor) -> list[dict[int, int]]:
    """Return how many numbers have which exponent, for each line of a table."""
    counts: list[dict[int, int]] = [{} for _ in range(len(table))]
    places = table.nonzero(as_tuple=True)
    found = [x.tolist() for x in (*places, table[places])]
    for line, place, n in zip(*found, strict=True):
        counts[line][place + LOW] = n
    return counts


def _tell(rows: list[Row], name: str, sqnr: Tensor, shares: list[Tensor]) -> None:
    """Tell each row what a format would do to it."""
    overflow = FORMATS[name].overflow
    columns = [column.tolist() for column in (sqnr, *shares)]
    for row, db, zeroed, gone, over, changed in zip(rows, *columns, strict=True):
        row.formats[name] = {
            "underflow": zeroed,
            "features_lost": gone,
            "overflow": over,
            "sqnr_db": db if -math.inf < db < EXACT else None,
        }
        if row.amax >= overflow:  # it need not be in the sample
            least = 1 / max(math.prod(row.shape), 1)
            row.formats[name]["overflow"] = max(over, least)
        if row.is_integer and row.kind in {"input", "output", "weight"}:
            row.formats[name]["integers_lost"] = changed


def _lose(samples: Samples, formats: tuple[str, ...]) -> None:
    """Add each update to its weight, in each format that has no scale."""
    if not samples.weights:
        return
    weight = gather([weight for _, weight, _ in samples.weights])
    update = gather([update for _, _, update in samples.weights])
    sizes = torch.tensor([len(update) for _, _, update in samples.weights])
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)

    def count(x: Tensor) -> Tensor:
        lines = x.count_nonzero(1)
        return torch.zeros_like(sizes).index_add_(0, owner, lines)

    moves = update != 0
    for name in formats:
        fmt = FORMATS[name]
        if fmt.block is None:
            start = round_(weight, fmt)
            lost = (round_(start + update, fmt) == start) & moves
            shares = (count(lost) / count(moves).clamp(min=1)).tolist()
            for (row, _, _), share in zip(samples.weights, shares, strict=True):
                row.formats[name]["lost"] = share
