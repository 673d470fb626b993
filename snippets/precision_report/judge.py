"""Rules that turn what was measured into a verdict for each mode."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from .formats import FORMATS, MODES, Format, Mode, round_
from .report import (
    HIGH,
    LEVELS,
    Constant,
    Finding,
    PrecisionReport,
    Row,
    Verdict,
    percent,
)

# Rounding touches a tail of every distribution; what is lost beyond MANY is no tail.
SOME, MANY = 0.05, 0.25
FIRST = 16  # GradScaler begins at 2^16, and doubles after 2,000 steps
LOST = 0.5  # of all updates of a step: most weights stand still
FORWARD = ("input", "weight", "output", "inside")
GRADS = ("grad_output", "grad_weight")
_LINEAR = {"Linear", "NonDynamicallyQuantizableLinear"}  # the second is attention's

# What to do, and the page that explains.
_FIXES = {
    "overflow": ("keep it in FP32, or use BF16", "guide/selective_precision"),
    "underflow": ("rescale it, or keep it in FP32", "background/number_formats"),
    "gradients": ("scale the loss, or use BF16", "guide/loss_scaling"),
    "scale": ("begin with it, GradScaler(init_scale=...)", "guide/loss_scaling"),
    "updates": ("keep main params in FP32, or round stochastically", "guide/true_half"),
    "adam": ("use 16-mixed or bf16-mixed, or TrueHalfAdamW", "guide/true_half"),
    "integers": ("pass whole numbers as int64", "guide/mixed_precision"),
    "eps": ("choose it by torch.finfo(x.dtype)", "guide/selective_precision"),
    "mask": ("use torch.finfo(x.dtype).min", "failures/mask_value_overflows_half"),
    "fp8": ("keep this layer in BF16, or give scales to blocks", "guide/fp8"),
    "shape": ("pad it, or leave this layer in BF16", "guide/fp8"),
    "fp32": ("repair FP32 first", "guide/precision_report"),
}


def judge(report: PrecisionReport, name: str, optimizer: Optimizer | None) -> Verdict:
    """Return the verdict for one mode."""
    mode, scale = MODES[name], None
    judged = _Judge(report, name)
    if report.broken:
        judged.find(
            "unsafe", "fp32", f"FP32 itself makes NaN or Inf, first in {report.broken}"
        )
        return judged.verdict(None)
    judged.forward()
    if mode.stores:
        judged.gradients()
        judged.updates()
        judged.adam(optimizer)
    elif mode.compute == "float16":
        scale = judged.loss_scale()
    if mode.forward:
        judged.fp8()
    return judged.verdict(scale)


class _Judge:
    """The findings of one mode."""

    def __init__(self, report: PrecisionReport, name: str) -> None:
        self.report, self.name = report, name
        self.mode: Mode = MODES[name]
        self.fmt: Format = FORMATS[self.mode.compute]
        self.findings: list[Finding] = []
        self.noise = _noise(report.rows)

    def rows(self, *kinds: str) -> Iterator[Row]:
        """Yield the rows that this mode computes in 16 bits."""
        for row in self.report.rows:
            if row.kind in kinds and (row.low or self.mode.stores):
                yield row

    def find(
        self,
        level: str,
        what: str,
        text: str,
        row: Row | None = None,
        share: float = 0.0,
    ) -> None:
        """Note a finding."""
        at = (row.module, row.kind) if row else ("", "")
        self.findings.append(Finding(level, self.name, *at, text, *_FIXES[what], share))

    def underflow(self, row: Row, fmt: str, fix: str) -> None:
        """Note features that are lost; small numbers beside large ones harm nobody."""
        share = row.share(fmt, "features_lost")
        if share >= SOME:
            level = "unsafe" if share >= MANY else "caution"
            self.find(level, fix, f"{_at(row)} underflows {percent(share)}", row, share)

    def forward(self) -> None:
        """Look for what does not fit: numbers, whole numbers, constants."""
        compute = self.mode.compute
        noted, large = set(), set()
        for constant in self.constants():
            noted.add((constant.module, constant.operation))
            size = "zero" if abs(constant.value) < 1 else "infinite"
            size = "1" if _is_near_one(constant.value, self.fmt) else size
            level = "unsafe" if constant.bites else "caution"
            if constant.bites or self.mode.stores:
                what = "eps" if abs(constant.value) < 1 else "mask"
                self.find(level, what, f"{constant} is {size} in {compute}")
        for row in self.rows(*FORWARD):
            if (row.module, row.tensor) in noted:
                continue
            if row.share(compute, "overflow") and row.amax not in large:
                large.add(row.amax)  # the next module's input is the same tensor
                text = f"{_at(row)} overflows {compute}: {row.amax:.2g}"
                self.find("unsafe", "overflow", text, row, 1.0)
            self.underflow(row, compute, "underflow")
            lost = row.share(compute, "integers_lost")
            if (
                lost >= SOME
                and row.kind == "input"
                and (not row.module or row.is_index)
            ):
                level = "unsafe" if row.is_index else "caution"
                text = f"{_at(row)} changes whole numbers: {percent(lost)}"
                self.find(level, "integers", text, row, lost)

    def constants(self) -> Iterator[Constant]:
        """Yield the constants that this mode makes zero, one or infinite."""
        for constant in self.report.constants:
            size = abs(constant.value)
            fits = self.fmt.zero < size < self.fmt.overflow
            fits &= not _is_near_one(size, self.fmt)
            if not fits and (constant.low or self.mode.stores) and constant.bites:
                yield constant

    def gradients(self) -> None:
        """Look for gradients that do not fit, where nothing scales the loss."""
        for row in self.rows(*GRADS):
            if row.share(self.mode.compute, "overflow"):
                text = f"{_at(row)} overflows {self.mode.compute}: {row.amax:.2g}"
                self.find("unsafe", "gradients", text, row, 1.0)
            share = self.below(row)
            if share >= SOME:
                level = "unsafe" if share >= MANY else "caution"
                text = f"{_at(row)} underflows {percent(share)}"
                self.find(level, "gradients", text, row, share)

    def loss_scale(self) -> tuple[int, int] | None:
        """Look for loss scales with which the gradients fit; return their exponents."""
        rows = [row for row in self.rows(*GRADS) if row.amax]
        if not rows:
            return None
        largest = max(rows, key=lambda row: row.amax)
        high = math.floor(math.log2(self.fmt.max / largest.amax))
        worst = max(rows, key=self.needed)
        low = self.needed(worst)
        if low > high:
            text = (
                f"no loss scale fits: {_at(worst)} needs 2^{low}, "
                f"{_at(largest)} overflows above 2^{high}"
            )
            share = max(self.below(row, high) for row in rows)
            level = "unsafe" if share >= MANY else "caution"
            self.find(level, "gradients", text, worst, share)
            return None
        if low > FIRST and (share := self.below(worst, FIRST)) >= SOME:
            text = (
                f"{_at(worst)} underflows {percent(share)} at GradScaler's 2^{FIRST}, "
                f"from which it needs {2000 * (low - FIRST):,} steps to 2^{low}"
            )
            self.find("caution", "scale", text, worst, share)
        elif low > 0:
            share = self.below(worst)
            text = f"without loss scaling {_at(worst)} underflows {percent(share)}"
            self.find("safe", "gradients", text, worst, share)
        return low, high

    def signal(self, row: Row) -> dict[int, int]:
        """Return the histogram of a gradient's features, without FP32's own rounding.

        A weight's gradient is a sum. What is 2^-24 of its largest numbers can be the
        error of a zero, as the gradient of a key's bias in attention is one.
        """
        if row.kind != "grad_weight" or not row.amax:
            return row.features
        least = max(row.amax, self.noise.get(id(row), 0.0)) * 2.0**-24
        noise = math.floor(math.log2(least))
        return {e: n for e, n in row.histogram.items() if e >= noise}

    def below(self, row: Row, scale: int = 0) -> float:
        """Return the share of a gradient times 2^scale below the smallest number."""
        counts = self.signal(row)
        least = _least(self.fmt) - scale
        below = sum(n for e, n in counts.items() if e < least)
        return below / max(sum(counts.values()), 1)

    def needed(self, row: Row) -> int:
        """Return the smallest k for which less than SOME is below if scaled by 2^k."""
        counts = self.signal(row)
        below, allowed = 0, SOME * sum(counts.values())
        for exponent, count in sorted(counts.items()):
            below += count
            if below > allowed:
                return _least(self.fmt) - exponent
        return _least(self.fmt) - HIGH

    def updates(self) -> None:
        """Look for updates below half an ulp of their weights."""
        rows = list(self.rows("update"))
        shares = {id(r): r.share(self.mode.compute, "lost") for r in rows}
        total = sum(math.prod(r.shape) for r in rows)
        lost = sum(shares[id(r)] * math.prod(r.shape) for r in rows) / max(total, 1)
        if lost >= LOST:
            text = f"{percent(lost)} of all updates are lost"
            self.find("unsafe", "updates", text, None, lost)
        by_module: dict[str, list[Row]] = {}
        for row in rows:
            by_module.setdefault(row.module, []).append(row)
        for module, own in by_module.items():
            size = sum(math.prod(r.shape) for r in own)
            share = sum(shares[id(r)] * math.prod(r.shape) for r in own) / size
            if share >= SOME:
                text = f"{percent(share)} of updates lost in `{module or 'model'}`"
                self.find("caution", "updates", text, own[0], share)

    def adam(self, optimizer: Optimizer | None) -> None:
        """Look for squared gradients that are zero where Adam divides by their root."""
        groups: list[dict[str, Any]] = [{"eps": 1e-8, "betas": (0.9, 0.999), "lr": 0}]
        if optimizer:
            groups = [g for g in optimizer.param_groups if _decay(g) is not None]
            if not groups or not type(optimizer).__module__.startswith("torch.optim"):
                return  # others may keep their states in FP32
        name = "Adam" if "betas" in groups[0] else type(optimizer).__name__
        eps = min(group["eps"] for group in groups)
        beta = max(_decay(group) or 0.0 for group in groups)
        # exp_avg_sq is (1 - beta) * grad**2 after a step. Where that is 0, the update
        # is lr * grad / eps, so it hurts if grad is much larger than eps.
        least = _least(self.fmt)
        if eps > self.fmt.zero:
            least = max(least, math.ceil(math.log2(eps)) + 3)
        enough = math.floor(math.log2(self.fmt.zero / (1 - beta)) / 2)
        rows = list(self.rows("grad_weight"))
        exponents = [item for r in rows for item in r.histogram.items()]
        below = sum(n for e, n in exponents if least <= e < enough)
        total = sum(n for _, n in exponents)
        vanishes = eps <= self.fmt.zero
        if vanishes:  # 0 / 0 where the gradient itself is 0
            seen = sum(row.sampled for row in rows)
            below, total = below + max(seen - total, 0), max(seen, total)
        if below:
            share = below / total
            text = (
                f"{name} divides by eps={eps:g}, in {self.mode.compute} "
                f"{round_(torch.tensor(eps).double(), self.fmt).item():g}, where the "
                f"squared gradient is 0: {percent(share)}"
            )
            largest = max(float(g["lr"]) for g in groups) * 2.0**enough / eps
            harms = vanishes or largest > 1  # else it is a longer step
            self.find("unsafe" if harms else "caution", "adam", text, None, share)

    def fp8(self) -> None:
        """Look at what the linear layers multiply."""
        formats = dict.fromkeys(("input", "weight"), self.mode.forward)
        formats["grad_output"] = self.mode.grad
        linear = [r for r in self.report.rows if r.layer in _LINEAR]
        block = FORMATS[self.mode.forward].block or 16  # of sums over rows as well
        unfit = {}
        for row in linear:
            sizes = math.prod(row.shape[:-1]), row.shape[-1]
            is_operand = row.kind in {"input", "weight"} and row.tensor != "bias"
            if is_operand and any(size % block for size in sizes):
                numbers = " x ".join(map(str, sizes))
                text = f"`{row.module}` {row.kind} has {numbers} numbers"
                unfit[row.module] = f"{text}, FP8 needs multiples of {block}"
        for row in linear:
            if row.module not in unfit and row.kind in formats and row.tensor != "bias":
                self.underflow(row, formats[row.kind], "fp8")
        for text in unfit.values():
            self.find("safe", "shape", text)

    def verdict(self, scale: tuple[int, int] | None) -> Verdict:
        """Sum up."""
        self.findings.sort(key=lambda f: (-LEVELS.index(f.level), -f.share))
        level = max((f.level for f in self.findings), key=LEVELS.index, default="safe")
        worst = [f.text for f in self.findings if f.level == level != "safe"]
        text = level
        if worst:
            more = f"; and {len(worst) - 2} more" if len(worst) > 2 else ""
            text += f": {'; '.join(worst[:2])}{more}"
        if scale and level != "unsafe":
            text += f" with loss scaling ≥ 2^{scale[0]}" if scale[0] > 0 else ""
        return Verdict(self.name, level, text, self.findings, scale)


def _decay(group: dict[str, Any]) -> float | None:
    """Return by what an optimizer decays squared gradients whose root divides."""
    if "eps" not in group:
        return None
    if "betas" in group:
        return float(group["betas"][1])
    # RMSprop's alpha; Adagrad adds up. Adadelta has eps under the root, so no harm.
    return group.get("alpha", 0.0 if "initial_accumulator_value" in group else None)


def _is_near_one(number: float, fmt: Format) -> bool:
    """Whether it is rounded to 1, or -1, and is not."""
    size = abs(number)
    return size != 1 and round_(torch.tensor(size).double(), fmt).item() == 1


def _at(row: Row) -> str:
    which = f" ({row.tensor})" if row.tensor not in {"", "weight"} else ""
    return f"`{row.module or 'model'}` {row.kind}{which}"


def _noise(rows: Iterable[Row]) -> dict[int, float]:
    """Return by id of a bias's gradient the sum it is, if no two numbers cancel.

    They do, all of them, for the bias of attention's keys, or before a batch norm.
    """
    outputs = {row.module: row for row in rows if row.kind == "grad_output"}
    sums = {}
    for row in rows:
        output = outputs.get(row.module)
        if output and (row.kind, row.tensor) == ("grad_weight", "bias"):
            numbers = output.calls * math.prod(output.shape) / math.prod(row.shape)
            sums[id(row)] = output.amax * numbers
    return sums


def _least(fmt: Format) -> int:
    return fmt.min_exponent - fmt.mantissa_bits  # exponent of the smallest number
