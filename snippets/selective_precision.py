"""Give each module of a model a precision of its own, and change it between phases.

Copy this file into your project; it needs only ``torch``.

`apply_precision_plan` stores and computes each module in the dtype that a plan names
and casts at the seams; `switch_precision` begins another plan and takes the state of
the optimizer along; `remove_precision_plan` undoes both.

    Guide:   guide/selective_precision
    Tests:   tests/test_selective_precision.py
    Sources: Fedus et al. 2022, arXiv:2101.03961, section 2.4 (routers in float32);
             Micikevicius et al. 2018, arXiv:1710.03740, section 3.3 (sums in float32);
             Megatron-LM d98e8a64 (2026), core/transformer/transformer_config.py.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import re
import threading
from collections.abc import Mapping
from copy import copy
from difflib import get_close_matches
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

__all__ = ["apply_precision_plan", "remove_precision_plan", "switch_precision"]

Precision = torch.dtype | tuple[torch.dtype, torch.dtype]
Plan = Mapping[Any, Precision]  # by name, pattern or class
_Pair = tuple[torch.dtype | None, torch.dtype | None]
_Dtypes = dict[str, torch.dtype]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = ("cpu", "cuda", "xpu", "mps")  # each with an autocast of its own
_SEAM = "_precision_seam"  # the attribute under which a module keeps its hooks
_suspended = threading.local()  # .calls: (module, devices with autocast), a stack


def apply_precision_plan(model: Module, plan: Plan) -> dict[str, torch.dtype]:
    """Store and compute each module in the dtype that the plan gives it, in place.

    A key is a name as in ``model.named_modules()``, where ``*`` stands for one part,
    ``**`` for any number of parts and ``""`` for the whole model; or a class of
    modules. It covers what it matches and everything inside. If several keys cover a
    module, the last one decides; one that decides nothing is an error.

    A covered module stores parameters and buffers in its dtype, casts the floating
    tensors it is called with, also in tuples, lists and dicts, and runs with autocast
    off. What it returns stays as it is, unless the value is a pair: then the modules
    that the key itself matches return the second dtype. One that no key covers keeps
    its dtype; if it has parameters, it casts its inputs to it where autocast is off.

    Integer, bool, complex and 8-bit float tensors are never touched. Parameters stay
    the same objects, ``state_dict()`` keeps its keys, copies and pickles keep the plan.

    Args:
        model: The module to change, before it is compiled or wrapped.
        plan: Key -> dtype, or (dtype, dtype returned); of ``float32``, ``bfloat16``,
            ``float16`` and ``float64``.

    Returns:
        Name of each covered module -> its dtype.

    Raises:
        TypeError: ``model``, ``plan``, a key or a value has a wrong type.
        ValueError: A key matches or decides nothing, a dtype is not allowed, a shared
            tensor or module would get two, a finite value would become Inf, a
            parameter has a gradient, or there is a plan. Nothing has been changed.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
        >>> apply_precision_plan(net, {"0": torch.float32, "1": torch.bfloat16})
        {'0': torch.float32, '1': torch.bfloat16}
        >>> net(torch.tensor([3])).dtype
        torch.bfloat16
    """  # noqa: DOC502 - the others are raised by what it calls
    _check_type("model", model, Module)
    if any(_SEAM in vars(m) for m in model.modules()):
        raise ValueError("the model has a plan already: call switch_precision")
    return _replace(model, plan, None)


def switch_precision(
    model: Module, optimizer: Optimizer, plan: Plan | torch.dtype
) -> dict[str, torch.dtype]:
    """Begin a phase in another precision: replace the plan, if any, and cast the state.

    The optimizer keeps its parameters, groups, hooks and schedulers. Its state goes
    through its own ``load_state_dict``; those of ``torch.optim`` cast moments to the
    dtype of the parameter. What rounding has cut off a weight comes back to it from a
    ``main_param`` or ``compensation`` there (`MainParams`, `TrueHalfAdamW`).

    Args:
        model: The module to change in place.
        optimizer: Over the model's parameters; if Fabric wrapped it, what Fabric gave.
        plan: As for `apply_precision_plan`; a dtype means ``{"": dtype}``.

    Returns:
        Name of each covered module -> its dtype.

    Raises:
        TypeError: As there, or ``optimizer`` is not an optimizer.
        ValueError: As there, or the optimizer has none of the model's parameters, or a
            number in its state would become 0 or Inf. Nothing has been changed.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> _ = switch_precision(net, optimizer, torch.bfloat16)
        >>> optimizer.state[net.weight]["exp_avg"].dtype
        torch.bfloat16
    """  # noqa: DOC502 - raised by what it calls
    _check_type("optimizer", optimizer, Optimizer)
    plan = {"": plan} if isinstance(plan, torch.dtype) else plan
    return _replace(model, plan, optimizer)


def remove_precision_plan(model: Module, optimizer: Optimizer | None = None) -> None:
    """Take off all casts, and store everything as before the first plan.

    Values keep the rounding they have had. Without a plan nothing happens. An optimizer
    that has taken a step comes along. Raises what `switch_precision` raises.
    """
    _replace(model, {}, optimizer)


class _Seam:
    """The hooks of one module, which are copied and pickled with it."""

    def __init__(self, module: Module, pair: _Pair, before: _Dtypes) -> None:
        self.dtype, self.output_dtype = pair
        self.before = before  # of the module's own tensors: what removal restores
        self.handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: Module, args: object, kwargs: object) -> tuple[Any, Any]:
        devices = _autocast_devices()
        dtype = self.dtype
        if dtype is None and devices:
            return args, kwargs  # autocast casts by itself
        for name, p in _own_tensors(module, buffers=False).items():
            dtype = dtype or p.dtype
            if p.dtype != dtype:
                msg = f"{name} of {type(module).__name__} is {p.dtype}, by the plan"
                raise RuntimeError(f"{msg} {dtype}: apply the plan after other casts")
        if self.dtype is not None:
            # Also where autocast is off: an entry that an interrupted call has left
            # must not be taken for this one's.
            calls = _suspended.__dict__.setdefault("calls", [])
            calls.append((module, devices))
            for device in devices:
                torch.set_autocast_enabled(device, False)
        return (_cast(args, dtype), _cast(kwargs, dtype)) if dtype else (args, kwargs)

    def leave(self, module: Module, _: object, output: object) -> object:
        # Also called if forward raises: checkpointing does that to stop early.
        calls = _suspended.__dict__.get("calls")
        if self.dtype is not None and calls and calls[-1][0] is module:
            for device in calls.pop()[1]:
                torch.set_autocast_enabled(device, True)
        return _cast(output, self.output_dtype) if self.output_dtype else None


def _replace(model: Module, plan: Plan, optimizer: Optimizer | None) -> _Dtypes:
    # Check everything, cast everything, put seams where the old ones were.
    _check_type("model", model, Module)
    _check_type("plan", plan, Mapping)
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs = _decide(modules, plan)
    before: dict[str, _Dtypes] = {}
    target: dict[str, tuple[Tensor, torch.dtype]] = {}
    owners: dict[int, tuple[str, object]] = {}
    for name, m in modules.items():
        known = vars(m)[_SEAM].before if _SEAM in vars(m) else {}
        own = _own_tensors(m)
        before[name] = {n: known.get(n, t.dtype) for n, t in own.items()}
        things = [(name, id(m), pairs[name][0])]
        for n, t in own.items():
            full = f"{name}.{n}".lstrip(".")
            dtype = pairs[name][0] or before[name][n]
            things.append((full, id(t), dtype))
            if t.dtype != dtype:
                target[full] = (t, dtype)
        for label, thing, wanted in things:
            first, its = owners.setdefault(thing, (label, wanted))
            if its != wanted:
                both = f"{its or 'not covered'} and {wanted or 'not covered'}"
                raise ValueError(f"{first!r} and {label!r} are the same, but {both}")
    _move(target, optimizer, {id(p) for p in model.parameters()})
    for name, m in model.named_modules():
        for handle in m.__dict__.pop(_SEAM).handles if _SEAM in vars(m) else ():
            handle.remove()
        dtypes = {p.dtype for p in _own_tensors(m, buffers=False).values()}
        if pairs[name][0] or (plan and len(dtypes) == 1):
            m.__dict__[_SEAM] = _Seam(m, pairs[name], before[name])
    return {name: dtype for name, (dtype, _) in pairs.items() if dtype}


def _decide(modules: Mapping[str, Module], plan: Plan) -> dict[str, _Pair]:
    decided: dict[str, tuple[object, _Pair]]
    decided = dict.fromkeys(modules, (None, (None, None)))
    for key, precision in plan.items():
        dtype, output_dtype = _pair(repr(key), precision)
        if isinstance(key, str):
            pattern = re.escape(key).replace(r"\*\*\.", r"(?:.*\.)?")
            pattern = pattern.replace(r"\*\*", ".*").replace(r"\*", "[^.]*")
            named = {name for name in modules if re.fullmatch(pattern, name)}
            named -= {""} if key == "*" else set()
        elif isinstance(key, type) and issubclass(key, Module):
            named = {name for name, m in modules.items() if isinstance(m, key)}
        else:
            raise TypeError(f"a key is a name or a Module class, got {key!r}")
        if not named:
            names = [*modules, *(re.sub(r"\b\d+\b", "*", name) for name in modules)]
            close = get_close_matches(str(key), dict.fromkeys(names), 2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"{key!r} matches no module{hint}")
        for name in modules:
            parts = name.split(".")
            outer = {".".join(parts[:n]) for n in range(len(parts))}  # "" is the model
            if name in named or outer & named:
                decided[name] = (key, (dtype, output_dtype if name in named else None))
    deciding = {key for key, _ in decided.values()}
    for key in (key for key in plan if key not in deciding):
        msg = f"{key!r} decides nothing: the last key decides"
        raise ValueError(f"{msg}, and later ones cover all of it")
    return {name: pair for name, (_, pair) in decided.items()}


def _pair(name: str, precision: object) -> _Pair:
    pair = precision if isinstance(precision, tuple) else (precision, precision)
    if len(pair) != 2 or not all(isinstance(dtype, torch.dtype) for dtype in pair):
        raise TypeError(f"{name} must be a dtype or a pair of them, got {precision!r}")
    for dtype in pair:
        if dtype not in _DTYPES:
            raise ValueError(f"{name} must be one of {_DTYPES}, got {dtype}")
    return pair if isinstance(precision, tuple) else (pair[0], None)


def _move(
    target: Mapping[str, tuple[Tensor, torch.dtype]],
    optimizer: Optimizer | None,
    in_model: set[int],
) -> None:
    # Cast tensors and state, or change nothing. The tensors stay the same objects.
    saved: dict[str, Any] = {} if optimizer is None else optimizer.state_dict()
    groups = [] if optimizer is None else optimizer.param_groups
    params = chain(*(group["params"] for group in groups))
    ids = chain(*(group["params"] for group in saved.get("param_groups", [])))
    index = {id(p): i for i, p in zip(ids, params, strict=True)}
    if optimizer is not None and not in_model & index.keys():
        raise ValueError("the optimizer has none of the model's parameters")
    state = {i: dict(entry) for i, entry in saved.get("state", {}).items()}
    old, new = {}, {}
    for name, (t, dtype) in target.items():
        if t.grad is not None:
            raise ValueError(f"{name} has a gradient: call model.zero_grad() first")
        entry = state.get(index.get(id(t)), {})
        source = t.detach()
        if (main := entry.get("main_param")) is not None:  # unless it is out of date
            source = torch.where(main.to(t.dtype) == t, main, source.to(main.dtype))
        if dtype.itemsize > 2:
            if "compensation" in entry:
                source = source.to(dtype) + entry["compensation"]
            entry.pop("main_param", entry.pop("compensation", None))
        old[name], new[name] = t.data, source.to(dtype, copy=True)
        if over := _lost(new[name], source, zero=False):
            msg = f"{over} of {t.numel()} values of {name} overflow {dtype}"
            raise ValueError(f"{msg}: give its module another dtype")

    def put(tensors: dict[str, Tensor]) -> None:
        for name, (t, _) in target.items():
            t.data = tensors[name]
        torch.clear_autocast_cache()  # it may hold a cast of what has gone

    put(new)
    if optimizer is None or not target:
        return
    try:
        optimizer.load_state_dict({**saved, "state": state})
    except Exception:
        put(old)
        raise
    for name, (t, _) in target.items():
        entry = state.get(index.get(id(t)), {})
        for key, value in optimizer.state.get(t, {}).items():
            if lost := _lost(value, entry.get(key), zero=True):
                put(old)
                optimizer.load_state_dict(saved)
                msg = f"{lost} of {value.numel()} values of {key} of {name} would"
                raise ValueError(f"{msg} become 0 or Inf in {value.dtype}")


def _lost(new: object, old: object, *, zero: bool) -> int:
    # Count finite values that have become Inf, and normal ones that have become 0.
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return 0
    if new.is_meta or new.dtype == old.dtype or new.shape != old.shape:
        return 0
    gone = (new == 0) & (old.float().abs() >= torch.finfo(torch.float32).tiny) & zero
    return int((gone | (new.isinf() & old.isfinite())).sum())


def _cast(value: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - whatever is passed
    # What holds nothing to cast comes back itself, so that a cache can be filled.
    if isinstance(value, Tensor):
        return value.to(dtype) if _castable(value) else value
    if isinstance(value, (tuple, list)):
        items = [_cast(v, dtype) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        made = {k: _cast(v, dtype) for k, v in value.items()}
        if any(made[k] is not value[k] for k in made):
            value = copy(value)  # of its own class
            value.update(made)
    return value


def _castable(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize > 1


def _autocast_devices() -> list[str]:
    return [device for device in _DEVICES if torch.is_autocast_enabled(device)]


def _own_tensors(module: Module, *, buffers: bool = True) -> dict[str, Tensor]:
    parameters = module.named_parameters(recurse=False)
    own = chain(parameters, module.named_buffers(recurse=False) if buffers else ())
    return {name: t for name, t in own if _castable(t)}


def _check_type(name: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted):
        got = type(value).__name__
        raise TypeError(f"{name} must be a {wanted.__name__}, got {got}")
