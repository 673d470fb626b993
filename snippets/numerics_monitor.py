"""Watch the numbers of a training run: scale, skipped steps, NaN, lost updates, amax.

Copy this file into your project; it needs only ``torch``, and ``lightning`` where it is
a callback. `NumericsMonitor.plot` needs matplotlib.

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

import json
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as optim_hooks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    from lightning.pytorch.callbacks import Callback as _Callback
except ModuleNotFoundError:  # no Trainer to be a callback of
    _Callback = object  # type: ignore[assignment, misc]

__all__ = ["RULES", "NumericsError", "NumericsMonitor", "NumericsWarning"]

# Rule -> limit and action. A rule breaks where the number passes its limit.
RULES: dict[str, tuple[float, str]] = {
    "nonfinite": (0, "warn"),  # NaN or Inf that no loss scaler is there to skip
    "min_scale": (1.0, "warn"),  # below it float16 reaches further than without a scale
    "max_consecutive_skips": (20, "warn"),  # of 2**16 the 20th half is 2**-4
    "max_lost": (0.9, "warn"),  # share of updates of 16-bit weights that change nothing
    "max_underflow": (0.5, "warn"),  # share of gradients that the format rounds to zero
}
_ACTIONS = ("raise", "warn", "ignore")
# What Transformer Engine's amax history holds for each matrix product.
_FP8 = {
    "scaling_fwd": ("input", "weight", "output"),
    "scaling_bwd": ("grad_output", "grad_input"),
}


# Modules that make no NaN and no Inf of finite values: not looked at.
_PASSIVE = {
    nn.Dropout, nn.Flatten, nn.GELU, nn.Identity, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Tanh,
}  # fmt: skip


class NumericsWarning(UserWarning):
    """A rule of a `NumericsMonitor` is broken."""


class NumericsError(RuntimeError):
    """A rule whose action is "raise" is broken."""


class NumericsMonitor(_Callback):
    """Watch every optimizer step of a run, and measure more at each ``interval`` th.

    A step is what an optimizer does, or a scaler skips, of the attached model: not a
    micro-batch. Steps count from 0, over all optimizers. Training is the same with it,
    bit for bit: it draws no random number, and its hooks are gone after `detach`.

    Args:
        path: JSON lines, one for each record, written as they come. A run that goes on
            from a checkpoint continues the file; a new run takes its place in
            `records`. None: kept in memory only.
        interval: Steps between measurements, from 1. In between only bad steps and new
            scales are recorded.
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
            ``amax`` (of FP8 tensors).

    Raises:
        TypeError: A rule is no limit and no action.
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
        if format is not None and not format.is_floating_point:
            raise ValueError(f"format must be a floating-point dtype, got {format}")
        self.path = None if path is None else Path(path)
        self.interval, self.sample, self.format = interval, sample, format
        self.rules = _rules(rules or {})
        self.records: list[dict[str, Any]] = []
        self.step = self.skips = self.consecutive_skips = 0
        self._streaks: dict[int, int] = {}  # skips in a row, by optimizer
        self._broken: set[str] = set()  # rules: told once until they hold again
        self._handles: list[Any] = []
        self._loggers: Callable[[dict[str, float], int], Any] | None = None
        self._model: nn.Module = nn.Identity()
        self._names: dict[int, str] = {}  # of parameters
        self._scaler: Any = None
        self._forget()

    # ------------------------------------------------------------- on and off

    def attach(
        self,
        model: nn.Module,
        *,
        scaler: Any = None,  # noqa: ANN401 - any class with these methods
        log: Callable[[dict[str, float], int], Any] | None = None,
    ) -> Self:
        """Watch a model and the optimizers over its parameters, also later ones.

        Use it as a ``with`` block, at whose end `detach` is called.

        Args:
            model: Modules and parameters are named as in it. Of a compiled one only
                gradients are watched.
            scaler: A ``torch.amp.GradScaler``, or an object with its methods.
            log: Called with numbers by name, and the step.

        Raises:
            TypeError: ``model`` is no module, or ``scaler`` lacks a method.
            RuntimeError: The monitor is attached already.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        names = ("step", "update", "get_scale")
        missing = [n for n in names if not callable(getattr(scaler, n, None))]
        if scaler is not None and missing:
            name = type(scaler).__name__
            raise TypeError(f"scaler must have the methods {missing}, got {name}")
        if self._handles:
            raise RuntimeError("the monitor is attached already: detach() it first")
        enabled = getattr(scaler, "is_enabled", lambda: True)()
        self._scaler, self._loggers = (scaler if enabled else None), log
        is_compiled = any(hasattr(m, "_orig_mod") for m in model.modules())
        self._model = getattr(model, "_orig_mod", model)
        self._names = {
            id(p): name for name, p in self._model.named_parameters() if p.requires_grad
        }
        self._start()
        for name, module in () if is_compiled else self._model.named_modules():
            own = any(True for _ in module.parameters(recurse=False))
            is_leaf = not any(True for _ in module.children())
            if own or (is_leaf and type(module) not in _PASSIVE):
                hook = partial(self._forward, name, hasattr(module, "fp8_meta"))
                self._handles.append(module.register_forward_hook(hook))
        before, after = (
            optim_hooks.register_optimizer_step_pre_hook,
            optim_hooks.register_optimizer_step_post_hook,
        )
        self._handles += [before(self._before_step), after(self._after_step)]
        if self._scaler is not None:
            self._handles.append(_Patch(self._scaler, "step", self._scaler_step))
            self._handles.append(_Patch(self._scaler, "update", self._scaler_update))
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

    def _forget(self) -> None:
        self._model, self._names, self._scaler = nn.Identity(), {}, None
        self._tape: list[tuple[str, str, Tensor]] = []  # kind, module, sum
        self._makers: dict[int, tuple[Any, str, int]] = {}  # of tensors, and versions
        self._readers: dict[str, list[str]] = {}  # of modules' outputs
        self._usual: set[str] = set()  # modules that make infinities in healthy steps
        self._dtypes: Counter[torch.dtype] = Counter()
        self._amax: dict[str, Tensor] = {}
        self._record: dict[str, Any] | None = None  # of the step that is under way
        self._weights: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, int] = (
            weakref.WeakKeyDictionary()
        )

    # ------------------------------------------------- Lightning, by its names

    def on_train_start(
        self,
        trainer: Any = None,  # noqa: ANN401 - Trainer's; none of them in Fabric
        pl_module: Any = None,  # noqa: ANN401
    ) -> None:
        """Attach to the Trainer's model, its scaler and its loggers."""
        if trainer is None:
            return

        def log(numbers: dict[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step)

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.detach()
        self.attach(pl_module, scaler=scaler, log=log)

    def on_after_setup(self, fabric: Any, module: Any) -> None:  # noqa: ANN401
        """Attach to what ``fabric.setup`` was called with, its scaler and loggers."""
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.detach()
        self.attach(module.module, scaler=scaler, log=fabric.log_dict)

    def on_train_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Detach; with Fabric, ``fabric.call("on_train_end")``."""
        self.detach()

    def on_exception(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Detach."""
        self.detach()

    def teardown(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Detach."""
        self.detach()

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
        if set(state_dict) != set(mine) or not all(
            isinstance(n, int) and n >= 0 for n in state_dict.values()
        ):
            raise ValueError(
                f"the state must have counts of {[*mine]}, got {state_dict}"
            )
        vars(self).update(state_dict)
        self._streaks = {0: self.consecutive_skips}
        if self._handles:
            self._start()

    # ---------------------------------------------------- what a step leaves

    def _forward(
        self,
        name: str,
        is_fp8: bool,
        module: nn.Module,
        args: object,
        output: object,
    ) -> None:
        if not (module.training or torch.is_grad_enabled()):
            return
        if is_fp8 and self._is_due:
            self._see_amax(f"{name}.input", args)
        for x in _floats(args):
            maker = self._makers.get(id(x))
            if maker is not None and maker[0]() is x:
                self._readers.setdefault(maker[1], []).append(name)
        for y in _floats(output):
            self._tape.append(("output", name, _sum(y)))
            self._dtypes[y.dtype] += 1
            known = self._makers.get(id(y))
            if known is not None and known[0]() is y and known[2] == y._version:
                continue  # passed on as it came: from a module within, or an identity
            if y.requires_grad:
                self._makers[id(y)] = weakref.ref(y), name, y._version
                _hook(y, partial(self._backward, name, is_fp8))

    def _backward(self, name: str, is_fp8: bool, grad: Tensor) -> None:
        self._tape.append(("grad_output", name, _sum(grad)))
        if is_fp8 and self._is_due:
            self._see_amax(f"{name}.grad_output", grad)

    def _see_amax(self, name: str, things: object) -> None:
        for tensor in list(_floats(things))[:1]:
            amax, before = tensor.detach().abs().amax(), self._amax.get(name)
            self._amax[name] = amax if before is None else torch.maximum(before, amax)

    @property
    def _is_due(self) -> bool:
        return self.step % self.interval == 0

    def _scaler_step(self, original: Any, optimizer: Any, *args: Any, **kw: Any) -> Any:  # noqa: ANN401
        """Stand in for the scaler's: a step that it skips reaches no optimizer."""
        inner = getattr(optimizer, "optimizer", optimizer)  # of a wrapper
        before, result = self.step, original(optimizer, *args, **kw)
        if self.step == before and self._is_mine(inner):
            self._begin(inner, skipped=True)
            self._finish()
        return result

    def _scaler_update(self, original: Any, *args: Any, **kw: Any) -> None:  # noqa: ANN401
        original(*args, **kw)
        scale, limit = self._scaler.get_scale(), self.rules["min_scale"][0]
        self._judge("min_scale", scale < limit, f"it is {scale:g} after step", -1)

    def _is_mine(self, optimizer: Optimizer) -> bool:
        if optimizer not in self._optimizers:
            params = [p for g in optimizer.param_groups for p in g["params"]]
            if not any(id(p) in self._names for p in params):
                return False
            self._optimizers[optimizer] = len(self._optimizers)
        return self._record is None  # not within the step of another

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        if not self._is_mine(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._begin(optimizer, skipped=_found_inf(optimizer))
            return None

        def then_begin() -> Any:  # noqa: ANN401
            result = closure()
            if self._record is None:
                self._begin(optimizer, skipped=False)
            return result

        if "closure" in kwargs:
            return args, kwargs | {"closure": then_begin}
        return (args[0], then_begin, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        record = self._record
        if record is None or self._optimizers.get(optimizer) != record["optimizer"]:
            return
        if self._weights:
            self._measure_updates(record)
        self._finish()

    # ------------------------------------------------------------- one record

    @torch.no_grad()
    def _begin(self, optimizer: Optimizer, skipped: bool) -> None:
        """Look at the gradients, which are ready."""
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        record: dict[str, Any] = {
            "step": self.step, "optimizer": self._optimizers[optimizer],
            "scale": scale, "skipped": skipped, "nonfinite": None,
        }  # fmt: skip
        self._record = record
        groups = [(g, p) for g in optimizer.param_groups for p in g["params"]]
        groups = [(g, p) for g, p in groups if id(p) in self._names]
        groups = [(g, p) for g, p in groups if p.grad is not None]
        is_checked = self._scaler is not None  # by the scaler
        is_bad = skipped or not (is_checked or _all_finite(p.grad for _, p in groups))
        self.skips += skipped
        streak = self._streaks.get(record["optimizer"], 0) + 1 if skipped else 0
        self._streaks[record["optimizer"]] = streak
        self.consecutive_skips = max(self._streaks.values())
        if is_bad:
            module, phase = self._first_bad([p for _, p in groups])
            record["nonfinite"] = {"module": module, "phase": phase}
            is_cured = skipped and phase == "backward"
            where = f"{phase} of {module!r}"
            self._judge(
                "nonfinite", not is_cured, f"NaN or Inf began in {where} at step"
            )
            limit, many = self.rules["max_consecutive_skips"][0], streak
            text = f"{many} in a row, the last for {where} at step"
            self._judge("max_consecutive_skips", many > limit, text)
        elif self._is_due:
            self._broken -= {"nonfinite", "max_consecutive_skips"}
            flags = _finite([value for _, _, value in self._tape])
            tape = zip(self._tape, flags, strict=True)
            self._usual = {name for (_, name, _), is_fine in tape if not is_fine}
            factor = getattr(optimizer, "grad_scale", None)  # fused: not unscaled yet
            self._measure_gradients(
                record, groups, 1.0 if factor is not None else scale
            )

    def _measure_gradients(
        self, record: dict[str, Any], groups: list[tuple[Any, Tensor]], scale: float
    ) -> None:
        dtypes = sorted(self._dtypes, key=lambda d: (d.itemsize, -self._dtypes[d]))
        target = self.format or (dtypes or [torch.float32])[0]
        # Half of the smallest subnormal number is the last that rounds to zero.
        edge = torch.finfo(target).smallest_normal * torch.finfo(target).eps / 2
        zeros, lost, count, worst = 0.0, 0.0, 0, ("", 0.0)
        for group, p in groups:
            grad = _sampled(_require(p.grad), self.sample)
            alive = grad != 0
            here = (alive & ((grad.double() * scale).abs() <= edge)).sum().item()
            living = int(alive.sum())
            share = p.numel() / len(grad)
            zeros += share * (len(grad) - living)
            lost += share * here
            count += p.numel()
            if living and here / living > worst[1]:
                worst = self._names[id(p)].rpartition(".")[0], here / living
            lr = group.get("lr", 1.0)
            if isinstance(lr, Tensor) or lr != 0:
                weights = _sampled(p, self.sample).clone()
                self._weights.append((p, weights, alive, p.dtype.itemsize <= 2))
        record["format"] = str(target).removeprefix("torch.")
        record["zero"] = zeros / max(count, 1)
        record["underflow"] = lost / max(count - zeros, 1)
        record["worst"] = worst[0]
        record["amax"] = {name: amax.item() for name, amax in self._amax.items()}
        record["amax"] |= dict(_amax_history(self._model))

    @torch.no_grad()
    def _measure_updates(self, record: dict[str, Any]) -> None:
        change = norm = 0.0
        counts = {True: [0.0, 0.0], False: [0.0, 0.0]}  # in 16 bits: lost, all
        for p, before, alive, is_half in self._weights:
            after, share = _sampled(p, self.sample), p.numel() / len(before)
            change += share * float((after.double() - before.double()).square().sum())
            norm += share * float(before.double().square().sum())
            counts[is_half][0] += share * int((alive & (after == before)).sum())
            counts[is_half][1] += share * int(alive.sum())
        eps = max(torch.finfo(p.dtype).eps for p, *_ in self._weights)
        lost, total = map(sum, zip(*counts.values(), strict=True))
        record["update_ratio"] = math.sqrt(change / norm) if norm else math.inf
        record["half_ulp"] = eps / 2
        record["lost"] = lost / max(total, 1)
        record["lost_in_half"] = counts[True][0] / max(counts[True][1], 1)

    def _finish(self) -> None:
        """Record, log, judge, and be ready for the next step."""
        record, self._record = _require(self._record), None
        last = self.records[-1]["scale"] if self.records else None
        is_told = self._is_due or record["nonfinite"] or record["scale"] != last
        self._tape, self._makers, self._readers = [], {}, {}
        self._weights, self._amax = [], {}
        step, self.step = self.step, self.step + 1
        if is_told:
            self.records.append(record)
            self._write(record)
            if self._loggers is not None and _is_first_rank():
                self._loggers(_numbers(record, self.skips), step)
        pairs = {"max_lost": "lost_in_half", "max_underflow": "underflow"}
        for rule, name in pairs.items():
            if name in record:
                share, limit = record[name], self.rules[rule][0]
                self._judge(rule, share > limit, f"{share:.1%} at step", -1)

    def _judge(self, rule: str, is_broken: bool, text: str, offset: int = 0) -> None:
        """Warn once until the rule holds again, or raise after the record is kept.

        Raises:
            NumericsError: The rule is broken, and its action is to raise.
        """
        action = self.rules[rule][1]
        if not is_broken:
            self._broken -= {rule} if rule != "nonfinite" else set()
        elif action != "ignore" and (action == "raise" or rule not in self._broken):
            self._broken.add(rule)
            message = f"{rule}: {text} {self.step + offset}"
            if action == "raise":
                if self._record is not None:
                    self._finish()
                raise NumericsError(message)
            warnings.warn(message, NumericsWarning, stacklevel=2)

    def _first_bad(self, params: list[Tensor]) -> tuple[str, str]:
        """Name the module and the phase where the first value was not finite."""
        modules = {}  # with a gradient that is not finite, the last first
        for p, is_fine in zip(
            params, _finite([_sum(p.grad) for p in params]), strict=True
        ):
            if not is_fine:
                modules[self._names[id(p)].rpartition(".")[0]] = True
        flags, last = _finite([value for _, _, value in self._tape]), ""
        for (kind, name, _), is_fine in zip(self._tape, flags, strict=True):
            if is_fine or name in self._usual:
                last = name if kind == "grad_output" else ""
            elif kind == "output":  # of good weights?
                own = self._model.get_submodule(name).parameters(recurse=False)
                return name, "forward" if _all_finite(own) else "weights"
            else:  # what made it is between this output and the gradient before it
                readers = self._readers.get(name, []) or [last or f"(after {name})"]
                told = [reader for reader in readers if reader in modules]
                return (told or readers)[-1], "backward"
        return next(reversed(modules), "(unknown)"), "backward"

    # ---------------------------------------------------------------- the file

    def _start(self) -> None:
        """Keep what an earlier part of this run has recorded, before this step."""
        if self.path is not None and self.path.exists():
            self.records = [r for r in _read(self.path) if r["step"] < self.step]
        else:
            self.records = [r for r in self.records if r["step"] < self.step]
        self._is_new = True

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is None or not _is_first_rank():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if self._is_new:
                if file.tell() and not _ends_a_line(file):  # killed while it wrote
                    file.write(b"\n")
                file.write(json.dumps({"start": record["step"]}).encode() + b"\n")
                self._is_new = False
            file.write(json.dumps(record).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return a monitor with the records of a file, to look at or to plot."""
        monitor = cls()
        monitor.records = _read(Path(path))
        return monitor

    def plot(self) -> "Figure":
        """Draw the records: scale and skips, gradients, updates, amax.

        Returns:
            A matplotlib figure: ``figure.savefig("run.png")``.

        Raises:
            ModuleNotFoundError: There is no matplotlib.
            ValueError: There is no record.
        """
        if not self.records:
            raise ValueError("no step is recorded yet: there is nothing to draw")
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415 - only this needs it
        except ModuleNotFoundError as error:
            text = "plot() needs matplotlib, which is not installed"
            raise ModuleNotFoundError(text, name="matplotlib") from error
        figure = Figure(figsize=(8, 9), layout="constrained")
        scale, grads, updates, amax = figure.subplots(4, sharex=True)
        steps, scales = _column(self.records, "scale")
        scale.step(steps, scales, where="post", label="loss scale")
        bad = [r for r in self.records if r["nonfinite"]]
        marks = [r["step"] for r in bad], [r["scale"] for r in bad]
        scale.plot(*marks, "x", color="tab:red", label="NaN or Inf")
        scale.set_yscale("log", base=2)
        for name in ("underflow", "zero"):
            grads.plot(*_column(self.records, name), ".-", label=f"gradients: {name}")
        updates.plot(
            *_column(self.records, "update_ratio"), ".-", label="update / weight"
        )
        updates.plot(*_column(self.records, "half_ulp"), "--", label="half an ulp")
        updates.set_yscale("symlog", linthresh=1e-8)
        grads.plot(*_column(self.records, "lost"), ".-", label="updates: lost")
        grads.set_ylim(-0.05, 1.05)
        for name in sorted({n for r in self.records for n in r.get("amax", {})}):
            rows = [r for r in self.records if name in r.get("amax", {})]
            values = [r["amax"][name] for r in rows]
            amax.plot([r["step"] for r in rows], values, ".-", label=name)
        amax.set_yscale("log", base=2)
        titles = ("Loss scale", "Shares", "Size of an update", "amax of FP8 tensors")
        for axes, title in zip((scale, grads, updates, amax), titles, strict=True):
            axes.set_title(title, loc="left", fontsize="medium")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="x-small", ncols=2)
        amax.set_xlabel("optimizer step")
        return figure


class _Patch:
    """A method of one object, replaced until `remove`."""

    def __init__(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:  # noqa: ANN401
        self.owner, self.name = owner, name
        self.had = vars(owner).get(name)
        setattr(owner, name, partial(wrapper, getattr(owner, name)))

    def remove(self) -> None:
        if self.had is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.had)


def _rules(given: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    rules = dict(RULES)
    for name, value in given.items():
        if name not in RULES:
            raise ValueError(f"unknown rule {name!r}, allowed are {[*RULES]}")
        limit, action = RULES[name]
        if isinstance(value, str):
            action = value
        elif isinstance(value, tuple) and len(value) == 2:
            limit, action = value
        else:
            limit = value
        if type(limit) not in {int, float}:
            raise TypeError(f"rule {name!r}: the limit must be a number, got {limit!r}")
        if not limit >= 0:  # also refuses NaN
            raise ValueError(f"rule {name!r}: the limit must be >= 0, got {limit}")
        if action not in _ACTIONS:
            raise ValueError(f"rule {name!r}: allowed are {_ACTIONS}, got {action!r}")
        rules[name] = limit, action
    return rules


def _require(value: Any) -> Any:  # noqa: ANN401
    assert value is not None
    return value


def _hook(tensor: Any, hook: Callable[[Tensor], None]) -> None:  # noqa: ANN401
    tensor.register_hook(hook)


def _floats(things: object) -> Iterator[Tensor]:
    if isinstance(things, Tensor):
        if things.is_floating_point() and things.layout is torch.strided:
            yield things
    elif isinstance(things, (list, tuple, dict)):
        for thing in things.values() if isinstance(things, dict) else things:
            yield from _floats(thing)


def _sum(tensor: Any) -> Tensor:  # noqa: ANN401
    """Return a sum that is finite if all values are: float16 would overflow."""
    values: Tensor = tensor.detach()
    wide = torch.float32 if values.dtype.itemsize == 1 else None
    return values.sum(dtype=torch.float32 if values.dtype == torch.float16 else wide)


def _finite(values: list[Tensor]) -> list[bool]:
    """Ask of numbers whether they are finite: once for each device and dtype."""
    alike: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        alike.setdefault((value.device, value.dtype), []).append(i)
    flags = [False] * len(values)
    for at in alike.values():
        answers = torch.stack([values[i] for i in at]).isfinite().tolist()
        for i, flag in zip(at, answers, strict=True):
            flags[i] = flag
    return flags


def _all_finite(grads: Iterable[Tensor | None]) -> bool:
    return all(_finite([_sum(grad) for grad in grads]))


def _sampled(tensor: Tensor, sample: int) -> Tensor:
    values: Any = tensor.detach()
    if values.layout is not torch.strided:
        values = values.to_dense()
    elif type(values) is not Tensor and hasattr(values, "_make_wrapper_subclass"):
        values = values.dequantize()
    flat: Tensor = values.reshape(-1)[:: max(1, values.numel() // sample)]
    return flat


def _found_inf(optimizer: Optimizer) -> bool:  # left by the scaler for a fused step
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


def _amax_history(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the newest amax of Transformer Engine's FP8 tensors, delayed scaling's."""
    for name, module in model.named_modules():
        for key, kinds in _FP8.items():
            meta = getattr(module, "fp8_meta", {})
            history = getattr(meta.get(key), "amax_history", None)
            if history is None:
                continue
            # Row 0 is being filled; once the scale is updated, the last row is newest.
            newest = torch.where(history[0] > 0, history[0], history[-1]).tolist()
            for i, amax in enumerate(newest):
                part = f"gemm{i // len(kinds)}." if len(newest) > len(kinds) else ""
                if amax:
                    yield f"{name}.{part}{kinds[i % len(kinds)]}", amax


def _numbers(record: dict[str, Any], skips: int) -> dict[str, float]:
    names = ("scale", "zero", "underflow", "lost", "update_ratio")
    numbers = {name: float(record[name]) for name in names if name in record}
    numbers |= {
        "skips": float(skips),
        "nonfinite": float(record["nonfinite"] is not None),
    }
    numbers |= {f"amax/{name}": amax for name, amax in record.get("amax", {}).items()}
    end = f"/{record['optimizer']}" if record["optimizer"] else ""
    return {f"numerics/{name}{end}": number for name, number in numbers.items()}


def _column(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    rows = [r for r in records if name in r]
    return [r["step"] for r in rows], [r[name] for r in rows]


def _is_first_rank() -> bool:
    dist = torch.distributed
    is_on = dist.is_available() and dist.is_initialized()
    return not is_on or dist.get_rank() == 0


def _ends_a_line(file: Any) -> bool:  # noqa: ANN401
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run: a later part replaces what it did again."""
    records: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # killed while it wrote
            continue
        if "start" in entry:
            records = [r for r in records if r["step"] < entry["start"]]
        else:
            records.append(entry)
    return records
