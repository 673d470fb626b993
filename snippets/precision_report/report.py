"""What a report is made of, and its forms: text, plain data, DataFrame, figure."""

import dataclasses
import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from .formats import FORMATS

KINDS = ("input", "weight", "output", "inside", "grad_output", "grad_weight", "update")
LEVELS = ("safe", "caution", "unsafe")
LOW, HIGH = -160, 130  # exponents of a histogram; those of FP32 are -149 to 127


@dataclass
class Row:
    """One tensor: its range, and by format what rounding would do to it.

    Attributes:
        module: Name of the module; "" is the model, "(loss)" what runs after it.
        kind: "input", "weight" (parameters and buffers), "output", "inside" (made by an
            operation in between, and beyond FP16), "grad_output", "grad_weight",
            "update".
        tensor: Which of several: a parameter's name, an argument's place, an operation.
        shape: As at the first call.
        amax: Largest finite magnitude, of all numbers and calls.
        range_log2: log2 of amax over the smallest sampled number that is not zero.
        calls: How often the module ran.
        is_finite: No Inf and no NaN.
        is_integer: Whole numbers only.
        is_index: The model turns them into integers, so each of them counts.
        low: Autocast would have it in 16 bits.
        formats: By format the shares, of what is not zero, "underflow" and "overflow",
            "features_lost" where the largest number of a channel, neuron or place of
            the last dimension is zero too, of an update "lost", of whole numbers
            "integers_lost"; and "sqnr_db", None without an error.
        histogram: How many of the sampled numbers that are not zero, by exponent.
        features: Of grad_output, the same of the largest number of each one's feature.
        sampled: How many numbers these shares and SQNR are of.
        layer: Class of the module.
    """

    module: str
    kind: str
    tensor: str
    shape: tuple[int, ...]
    amax: float = 0.0
    range_log2: float = 0.0
    calls: int = 0
    is_finite: bool = True
    is_integer: bool = False
    is_index: bool = False
    low: bool = False
    formats: dict[str, dict[str, float | None]] = field(default_factory=dict)
    histogram: dict[int, int] = field(default_factory=dict, repr=False)
    features: dict[int, int] = field(default_factory=dict, repr=False)
    sampled: int = field(default=0, repr=False)
    layer: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """The module and the tensor, for a table."""
        return f"{self.module} {self.tensor}".strip() or "(model)"

    def share(self, fmt: str, what: str) -> float:
        """Return a share of ``formats``; 0 if it has none."""
        return self.formats.get(fmt, {}).get(what) or 0.0


@dataclass(frozen=True)
class Constant:
    """A number in the code that 16 bits make zero, one or infinite."""

    value: float
    module: str
    operation: str
    where: str  # file:line, "" if it is not in sight
    low: bool  # autocast would compute with it in 16 bits
    bites: bool  # float16 would spoil a result of this very step

    def __str__(self) -> str:
        at = f", {self.where}" if self.where else ""
        return f"{self.value:.8g} in `{self.module or 'model'}` ({self.operation}{at})"


@dataclass(frozen=True)
class Finding:
    """What one precision does to one tensor, what to do, and the page that explains."""

    level: str
    mode: str
    module: str
    kind: str
    text: str
    advice: str
    page: str
    share: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """One precision: "safe", "caution" or "unsafe", and why.

    ``loss_scale`` has the exponents of the smallest and the largest that fit.
    """

    mode: str
    level: str
    text: str
    findings: list[Finding]
    loss_scale: tuple[int, int] | None = None

    @property
    def is_safe(self) -> bool:
        """Whether the level is not "unsafe"."""
        return self.level != "unsafe"

    def __str__(self) -> str:
        return f"{self.mode}: {self.text}"


@dataclass
class PrecisionReport:
    """What `precision_report` found; print it, or take it apart.

    Attributes:
        rows: A `Row` for each module, kind and tensor, in the order of the first use.
        constants: What FP16 makes 0 or Inf.
        formats: Those asked for.
        loss: Of the step.
        hypothesis: Where the updates come from.
        notes: What else the reader should know.
        broken: Where FP32 itself makes the first NaN or Inf; "" if it does not.
        verdicts: By mode.
    """

    rows: list[Row]
    constants: list[Constant]
    formats: tuple[str, ...]
    loss: float
    hypothesis: str
    notes: list[str]
    broken: str = ""
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """All findings, the worst first."""
        found = [f for verdict in self.verdicts.values() for f in verdict.findings]
        return sorted(found, key=lambda f: (-LEVELS.index(f.level), -f.share))

    @property
    def recommendation(self) -> str:
        """The first safe precision in the order of `MODES`, else one with a caution."""
        for level in LEVELS[:2]:
            for mode, verdict in self.verdicts.items():
                if verdict.level == level:
                    return mode
        return "32-true"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, fit for JSON: None for NaN and Inf."""
        data = dataclasses.asdict(self) | {"recommendation": self.recommendation}
        for row in data["rows"]:
            del row["histogram"], row["features"]
        plain: dict[str, Any] = _plain(data)
        return plain

    def to_dataframe(self) -> Any:  # noqa: ANN401 - pandas need not be there
        """Return a pandas DataFrame with a line for each tensor and format."""
        lines = []
        for row in self.to_dict()["rows"]:
            by_format = row.pop("formats")
            lines += [row | {"format": f} | stats for f, stats in by_format.items()]
        return _needed("pandas", "to_dataframe").DataFrame(lines)

    def table(self, rows: int | None = None) -> str:
        """Draw the rows as text, all or the ``rows`` with most trouble.

        A cell has the shares in % that underflow and overflow and the SQNR in dB, that
        of an update the share in % that is lost.
        """
        worst = sorted(self.rows, key=_trouble, reverse=True)[:rows]
        kept = {id(row) for row in worst}
        shown = [row for row in self.rows if id(row) in kept]
        wide = max([6, *(len(row.name) for row in shown)])
        head = [f"{'module':{wide}}", f"{'kind':11}", f"{'amax':>8}", " range"]
        lines = ["  ".join([*head, *(f"{name:>13}" for name in self.formats)])]
        for row in shown:
            cells = [f"{row.name:{wide}}", f"{row.kind:11}", f"{row.amax:8.2g}"]
            cells += [f"{f'2^{row.range_log2:.0f}':>6}"]
            cells += [f"{_cell(row, name):>13}" for name in self.formats]
            lines.append("  ".join(cells))
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"loss {self.loss:.4g}; updates: {self.hypothesis}", *self.notes, ""]
        lines += [self.table(12), "(% underflow / % overflow / dB; update: % lost)", ""]
        lines += [str(verdict) for verdict in self.verdicts.values()]
        if self.findings:
            lines.append("")
        alike: dict[tuple[str, str, str, str], dict[str, None]] = {}
        for f in self.findings:
            alike.setdefault((f.mode, f.level, f.advice, f.page), {})[f.text] = None
        modes: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = {}
        for (mode, *words), found in alike.items():
            level, advice, page = words
            modes.setdefault((level, advice, page, tuple(found)), []).append(mode)
        for (level, advice, page, texts), names in modes.items():
            start = "note" if level == "safe" else level
            lines.append(f"{start} on {', '.join(names)}: {advice} (see {page})")
            lines += [f"    {text}" for text in texts[:3]]
            lines += [f"    and {len(texts) - 3} more"] * (len(texts) > 3)
        harmless = [constant for constant in self.constants if not constant.bites]
        lines += [f"not felt in this step, 0 in float16: {c}" for c in harmless]
        return "\n".join([*lines, "", f"recommended: {self.recommendation}"])

    def figure(self, kinds: Sequence[str] = KINDS) -> Any:  # noqa: ANN401
        """Draw where each tensor's magnitudes lie, and where formats end.

        Args:
            kinds: Which tensors, a panel for each.

        Returns:
            A matplotlib Figure, not shown and not saved.

        Raises:
            ValueError: There are no tensors of these kinds.
        """
        figures = _needed("matplotlib.figure", "figure")
        all_panels = {
            kind: [r for r in self.rows if r.kind == kind and r.histogram]
            for kind in kinds
        }
        panels = {kind: rows for kind, rows in all_panels.items() if rows}
        if not panels:
            raise ValueError(f"there are no tensors of the kinds {tuple(kinds)}")
        heights = [max(len(rows), 2) for rows in panels.values()]
        figure = figures.Figure((9, 1.5 + 0.2 * sum(heights) + 0.5 * len(panels)))
        figure.set_layout_engine("constrained")
        ratios = {"height_ratios": heights}
        axes = figure.subplots(
            len(panels), sharex=True, squeeze=False, gridspec_kw=ratios
        )
        used = [-25, 16]
        for axis, (kind, rows) in zip(axes[:, 0], panels.items(), strict=True):
            shares = [_dense(r.histogram) for r in rows]
            axis.imshow(
                [[share**0.5 for share in line] for line in shares],
                cmap="Greys",
                aspect="auto",
                interpolation="nearest",
                extent=(LOW - 0.0, HIGH + 1.0, len(rows) - 0.5, -0.5),
            )
            axis.set_yticks(range(len(rows)), [r.name for r in rows], fontsize=7)
            axis.set_title(kind.replace("_", " "), loc="left", fontsize=9)
            for name, color in (("float16", "tab:red"), ("bfloat16", "tab:blue")):
                fmt = FORMATS[name]
                for end in (fmt.zero, fmt.overflow):
                    axis.axvline(math.log2(end), color=color, linewidth=1)
            used += [exponent for r in rows for exponent in r.histogram]
        axes[-1, 0].set_xlim(min(used) - 1, max(used) + 2)
        axes[-1, 0].set_xlabel("log2 of the magnitude; float16 ends at the red lines")
        return figure


def _dense(histogram: dict[int, int]) -> list[float]:
    """Return the share of each exponent."""
    total = sum(histogram.values())
    return [histogram.get(e, 0) / total for e in range(LOW, HIGH + 1)]


def percent(share: float) -> str:
    """Write a share as people say it."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def suggest(what: str, name: object, known: Iterable[str]) -> str:
    """Say that a name is not known, and which one is near."""
    names = list(known)
    close = get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no {what} {name!r}, only {', '.join(names) or 'none'}{hint}"


def _trouble(row: Row) -> float:
    stats = row.formats.values()
    shares = [s.get(k) or 0.0 for s in stats for k in ("overflow", "underflow", "lost")]
    return sum(shares) + len([s for s in stats if s.get("overflow")])


def _cell(row: Row, fmt: str) -> str:
    stats = row.formats.get(fmt, {})
    if row.kind == "update" or not stats:
        lost = stats.get("lost")
        return "" if lost is None else f"lost {100 * lost:.0f}"
    shares = [100 * (stats[k] or 0) for k in ("underflow", "overflow")]
    known = stats["sqnr_db"] is not None
    return "/".join([
        *(f"{s:.0f}" for s in shares),
        f"{stats['sqnr_db']:.0f}" if known else "-",
    ])


def _plain(data: Any) -> Any:  # noqa: ANN401
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _needed(module: str, by: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        message = f"{by}() needs {package}: install it, or use to_dict()"
        raise ModuleNotFoundError(message, name=package) from error
