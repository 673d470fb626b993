"""Watch the numbers of a training run: scale, skipped steps, NaN, lost updates, amax.

Copy this folder into your project; it needs only ``torch``, and ``lightning`` where it
is a callback. `NumericsMonitor.plot` needs matplotlib.

`NumericsMonitor` is a callback for Lightning's Trainer and Fabric, and works alone
around any loop in PyTorch; what it sees it logs, keeps in a file, and judges by rules.

    Guide:   guide/monitor_a_run
    Tests:   tests/test_numerics_monitor.py
    Sources: Micikevicius et al. 2018, arXiv:1710.03740, section 3 (updates and
             gradients that are lost); PyTorch 2.13, 2026, torch/amp/grad_scaler.py;
             Transformer Engine 2.20.2, 2026, pytorch/quantization.py (amax history).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import measure
from .callback import LightningCallback, Log
from .plot import draw
from .record import is_first_rank, numbers, read, write
from .rules import RULES, NumericsError, NumericsWarning, complete
from .steps import Patch, Steps
from .tape import Tape
from .tensors import all_finite, finite, total

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RULES", "NumericsError", "NumericsMonitor", "NumericsWarning"]


class NumericsMonitor(LightningCallback):
    """Watch every optimizer step of a run, and measure more at each ``interval`` th.

    A step is what an optimizer does, or a scaler skips, of the attached model: not a
    micro-batch. Steps count from 0, over all optimizers. Training is the same with it,
    bit for bit: it draws no random number, and its hooks are gone after `detach`.

    Args:
        path: JSON lines, one for each record, written as they come. A run that goes on
            from a checkpoint continues the file; a new run takes its place in
            `records`. None: kept in memory only.
        interval: Steps between measurements, from 1; of several optimizers each is
            measured, at its first good step from there. In between only bad steps and
            new scales are recorded.
        rules: Name -> (limit, action), a limit, or an action ("raise", "warn",
            "ignore"), for names in `RULES`; the others stay as there.
        format: The dtype that gradients must survive. None: the narrowest dtype among
            the modules' outputs, so the compute dtype.
        sample: Values of each parameter that are measured; > 0.

    Attributes:
        rules: All rules, with limit and action.
        records: Of this run, oldest first. Each has ``step``, ``optimizer``, ``scale``,
            ``skipped``, ``nonfinite`` (None, or the module and the phase where NaN or
            Inf began: "forward", "backward", or "weights" that were so before), and if
            measured ``zero`` (share of gradients that are 0), ``underflow`` (share of
            the others that `format` rounds to 0 at this scale), ``worst`` (module with
            the most), ``update_ratio`` (norm of the change by norm of the weights),
            ``half_ulp`` (of the weights' dtype, by the weight, at most), ``lost``
            (share of weights with a gradient that the step left as they were) and
            ``amax`` (of FP8 tensors). A ratio or an amax that is not finite is None,
            such as the ratio to weights that are all 0.

    Raises:
        TypeError: ``path`` is no path, ``rules`` no mapping, or a rule no limit and no
            action.
        ValueError: An argument is out of range, or a rule unknown.

    Example:
        >>> model = nn.Linear(4, 1).bfloat16()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        >>> with NumericsMonitor(rules={"max_lost": "ignore"}).attach(model) as monitor:
        ...     model(torch.ones(1, 4).bfloat16()).sum().backward()
        ...     optimizer.step()
        >>> monitor.records[0]["skipped"], monitor.records[0]["half_ulp"]
        (False, 0.00390625)
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        interval: int = 50,
        rules: Mapping[str, float | str | tuple[float, str]] | None = None,
        format: torch.dtype | None = None,
        sample: int = 4096,
    ) -> None:
        counts: dict[str, Any] = {"interval": interval, "sample": sample}
        for name, number in counts.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(
                    f"{name} must be a whole number from 1, got {number!r}"
                )
        if format is not None and not getattr(format, "is_floating_point", False):
            raise ValueError(f"format must be a floating-point dtype, got {format!r}")
        if not isinstance(path, str | PathLike | None):
            raise TypeError(f"path must be a path or None, got {path!r}")
        self.path = None if path is None else Path(path)
        self.interval, self.sample, self.format = interval, sample, format
        self.rules = complete({} if rules is None else rules)
        self.records: list[dict[str, Any]] = []
        self.step = self.skips = self.consecutive_skips = 0
        # By optimizer:
        self._streaks: dict[int, int] = {}  # skips in a row
        self._zeros: dict[int, int] = {}  # measurements of zeros in a row
        self._due: dict[int, int] = {}  # the step from which on it is measured next
        self._first_due = 0  # of one that has not stepped yet
        self._told: set[tuple[str, int]] = set()  # broken rules, until they hold again
        self._handles: list[Any] = []
        self._forget()

    def _forget(self) -> None:
        self._scaler: Any = None
        self._log: Log | None = None
        self._owners: dict[int, str] = {}  # of parameters: their modules' names
        self._tape = Tape(nn.Identity(), self._is_one_due)
        self._record: dict[str, Any] = {}  # of the step that is under way
        self._weights: list[measure.Before] = []

    # ------------------------------------------------------------- on and off

    def attach(
        self,
        model: nn.Module,
        *,
        scaler: Any = None,  # noqa: ANN401 - any class with these methods
        log: Log | None = None,
    ) -> Self:
        """Watch a model and the optimizers over its parameters, also later ones.

        Use it as a ``with`` block, at whose end `detach` is called.

        Args:
            model: Modules and parameters are named as in it. Of a compiled one only
                gradients are watched.
            scaler: A ``torch.amp.GradScaler``, or an object with its methods.
            log: Called with numbers by name, and the step.

        Raises:
            TypeError: ``model`` is no module, ``scaler`` lacks a method, or ``log`` is
                not callable.
            RuntimeError: The monitor is attached already.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        names = ("step", "update", "get_scale")
        missing = [n for n in names if not callable(getattr(scaler, n, None))]
        if scaler is not None and missing:
            name = type(scaler).__name__
            raise TypeError(f"scaler must have the methods {missing}, got {name}")
        if log is not None and not callable(log):
            raise TypeError(f"log must be callable, got {log!r}")
        if self._handles:
            raise RuntimeError("the monitor is attached already: detach() it first")
        enabled = getattr(scaler, "is_enabled", lambda: True)()
        self._scaler, self._log = (scaler if enabled else None), log
        is_compiled = any(hasattr(m, "_orig_mod") for m in model.modules())
        model = getattr(model, "_orig_mod", model)
        self._owners = {
            id(p): name.rpartition(".")[0]
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self._resume()
        self._tape = Tape(model, self._is_one_due)
        if not is_compiled:
            self._handles += self._tape.watch()
        self._handles += Steps(self._owners, self._begin, self._end).watch(self._scaler)
        if self._scaler is not None:
            self._handles.append(Patch(self._scaler, "update", self._scaler_update))
        return self

    def detach(self) -> None:
        """Remove every hook; what was recorded stays. Calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    # ------------------------------------------------------ a run that goes on

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, so that a run that goes on counts on."""
        names = ("step", "skips", "consecutive_skips")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the counts of a run that goes on.

        Raises:
            ValueError: It is not such a state.
        """
        mine = self.state_dict()
        given: Any = state_dict
        if not (
            isinstance(given, Mapping)
            and set(given) == set(mine)
            and all(isinstance(n, int) and n >= 0 for n in given.values())
        ):
            raise ValueError(f"the state must have counts of {[*mine]}, got {given!r}")
        vars(self).update(given)
        self._streaks, self._zeros, self._due = {0: self.consecutive_skips}, {}, {}
        self._first_due = -(-self.step // self.interval) * self.interval  # rounded up
        if self._handles:
            self._resume()

    def _resume(self) -> None:
        """Keep what an earlier part of this run has recorded, before this step."""
        if self.path is not None and self.path.exists():
            self.records = read(self.path)
        self.records = [r for r in self.records if r["step"] < self.step]
        self._is_new = True  # nothing is written yet

    # ---------------------------------------------------------------- one step

    def _is_one_due(self) -> bool:
        """Tell whether the step to come may be measured, whosever it is.

        An optimizer without a step for a whole interval is not waited for, and the
        first step of one that begins after another comes unforeseen.
        """
        due = self._due.values() or [self._first_due]
        return any(0 <= self.step - at <= self.interval for at in due)

    def _begin(self, optimizer: Optimizer, number: int, skipped: bool) -> None:
        """Look at the gradients, which are ready."""
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        self._record = {
            "step": self.step, "optimizer": number,
            "scale": scale, "skipped": skipped, "nonfinite": None,
        }  # fmt: skip
        params = [
            (p, group)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._owners and p.grad is not None and p.numel()
        ]
        self.skips += skipped
        self._streaks[number] = self._streaks.get(number, 0) + 1 if skipped else 0
        self.consecutive_skips = max(self._streaks.values())
        is_checked = self._scaler is not None  # by the scaler
        is_bad = skipped or not (is_checked or all_finite(p.grad for p, _ in params))
        is_due = self._due.get(number, self._first_due) <= self.step
        if is_due:  # of optimizers in turn, some have no step at the interval itself
            interval = 1 if is_bad else self.interval
            self._due[number] = (self.step // interval + 1) * interval
        if is_bad:
            self._locate([p for p, _ in params])
        elif is_due:
            self._judge("nonfinite", False)
            self._judge("max_consecutive_skips", False)
            self._tape.learn()
            is_scaled = getattr(optimizer, "grad_scale", None) is not None  # fused
            self._measure(params, 1.0 if is_scaled else scale)

    def _locate(self, params: list[Tensor]) -> None:
        """Find where NaN or Inf began, and judge it."""
        flags = finite([total(p.grad) for p in params])
        pairs = zip(params, flags, strict=True)
        bad = dict.fromkeys(self._owners[id(p)] for p, is_fine in pairs if not is_fine)
        module, phase = self._tape.first_bad([*bad])
        self._record["nonfinite"] = {"module": module, "phase": phase}
        where = f"{phase} of {module!r} at step {self.step}"
        if not (self._record["skipped"] and phase == "backward"):  # not the scaler's
            self._judge("nonfinite", True, f"NaN or Inf began in {where}")
        skips = self._streaks[self._record["optimizer"]]
        limit, _ = self.rules["max_consecutive_skips"]
        text = f"{skips} in a row, the last for {where}"
        self._judge("max_consecutive_skips", skips > limit, text)

    def _measure(self, params: list[tuple[Tensor, Any]], scale: float) -> None:
        """Read gradients and amax, and keep weights for after the step."""
        owned = [(self._owners[id(p)], p) for p, _ in params]
        target = self.format or self._tape.narrowest()
        self._record |= measure.gradients(owned, scale, target, self.sample)
        self._record["amax"] = self._tape.amax.read(self._tape.model)
        self._judge_zeros([p for p, _ in params])
        for p, group in params:
            lr = group.get("lr", 1.0)
            if isinstance(lr, Tensor) or lr != 0:
                self._weights.append(measure.before(p, self.sample))

    def _judge_zeros(self, params: list[Tensor]) -> None:
        """Judge gradients that are all 0 where float16 has no scale to prevent it.

        Once is no fault: of weights below a head that begins with zeros they are 0.
        """
        number, (limit, _) = self._record["optimizer"], self.rules["max_zero_steps"]
        is_zero = (
            self._scaler is None
            and self._record["zero"] > 0.99  # of the sample; then look at all
            and measure.is_short({*self._tape.dtypes, *(p.dtype for p in params)})
            and measure.all_zero(params)
        )
        self._zeros[number] = self._zeros.get(number, 0) + 1 if is_zero else 0
        text = f"all gradients are 0, {self._zeros[number]} measurements in a row,"
        text += f" the last at step {self.step}"
        self._judge("max_zero_steps", self._zeros[number] > limit, text)

    def _end(self) -> None:
        """Record, log, judge, and be ready for the next step."""
        record = self._record
        if self._weights:
            record |= measure.updates(self._weights, self.sample)
        last = self.records[-1]["scale"] if self.records else None
        is_measured = "zero" in record
        is_told = is_measured or record["nonfinite"] or record["scale"] != last
        self._tape.clear()
        self._weights = []
        self.step += 1
        if is_told:
            self.records.append(record)
            if is_first_rank():
                self._tell(record)
        shares = {"max_lost": "lost_in_half", "max_underflow": "underflow"}
        for rule, name in shares.items():
            if name in record:
                text = f"{record[name]:.1%} at step {record['step']}"
                self._judge(rule, record[name] > self.rules[rule][0], text)

    def _tell(self, record: dict[str, Any]) -> None:
        """Write and log a record."""
        if self.path is not None:
            write(self.path, record, is_first=self._is_new)
            self._is_new = False
        if self._log is not None:
            self._log(numbers(record, self.skips), record["step"])

    def _scaler_update(self, original: Any, *args: Any, **kw: Any) -> None:  # noqa: ANN401
        """Stand in for the scaler's, which sets the scale."""
        original(*args, **kw)
        scale, (limit, _) = self._scaler.get_scale(), self.rules["min_scale"]
        when = f"after step {self.step - 1}" if self.step else "before step 0"
        self._judge("min_scale", scale < limit, f"it is {scale:g} {when}")

    def _judge(self, rule: str, is_broken: bool, text: str = "") -> None:
        """Warn once for each optimizer until the rule holds again, or raise.

        Raises:
            NumericsError: The rule is broken, and its action is to raise.
        """
        action = self.rules[rule][1]
        number = 0 if rule == "min_scale" else self._record["optimizer"]
        text = f"{rule}: {text}" + (f", optimizer {number}" if number else "")
        if not is_broken:
            self._told.discard((rule, number))
        elif action == "raise":
            raise NumericsError(text)
        elif action == "warn" and (rule, number) not in self._told:
            self._told.add((rule, number))
            warnings.warn(text, NumericsWarning, stacklevel=2)

    # ------------------------------------------------------------ the records

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return a monitor with the records of a file, to look at or to plot."""
        monitor = cls()
        monitor.records = read(Path(path))
        return monitor

    def plot(self) -> "Figure":
        """Draw the records: scale and skips, gradients, updates, amax.

        It needs matplotlib.

        Returns:
            A matplotlib figure: ``figure.savefig("run.png")``.

        Raises:
            ValueError: There is no record.
        """
        if not self.records:
            raise ValueError("no step is recorded yet: there is nothing to draw")
        return draw(self.records)
