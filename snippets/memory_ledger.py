"""Count the bytes of a training step by what they are for, exactly, without a GPU.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

`MemoryLedger` is a ``with`` block around your training step. With fake tensors it needs
no memory either, for a model of any size.

    Guide:   guide/memory_ledger
    Tests:   tests/test_memory_ledger.py
    Sources: Rajbhandari et al. 2020, arXiv:1910.02054, section 3 (what is held);
             Chen et al. 2016, arXiv:1604.06174 (activations, and their recomputation).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["MemoryLedger"]

# What a storage is for, and its letter. Where several fit, the first does.
_LETTERS = {
    "parameters": "P", "buffers": "B", "main params": "M", "gradients": "G",
    "optimizer": "O", "casts": "C", "activations": "A", "recomputed": "R", "other": ".",
}  # fmt: skip
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class MemoryLedger:
    """Count what a training step holds in memory, by kind, moment and module.

    All that runs inside ``with`` is counted: a step, several, a part of one. A storage
    counts once and whole, however many views, tied parameters or saved tensors share
    it. Numbers, random state, gradients and model are as without the ledger.

    The kinds, by precedence: ``parameters``, ``buffers``, ``main params``,
    ``gradients``; ``optimizer``, all else in its state; ``casts``, copies of parameters
    in another dtype, such as autocast's; ``activations``, all else that is saved for
    backward, the batch among it; ``recomputed``, made in backward with gradients on,
    for a checkpoint; ``other``: the batch from its first use, outputs, temporaries, and
    a gradient before it is in ``.grad``.

    Not seen: what one operation allocates and frees. What an autograd function keeps as
    attributes, or other hooks on saved tensors keep, is ``other``.

    Args:
        model: Holds all parameters, on one device. Not compiled.
        optimizers: The optimizer, or several, over parameters of the model. Main params
            are what has the key ``main_param`` in their state, and the values of an
            attribute ``main_params``; set it where you keep your own.

    Attributes:
        moments: Bytes by kind at "start" and "end", and when most was held in "step"
            (after backward, until a module runs, and what runs without gradients
            outside of modules), in "backward", and in "forward", all the rest.
        by_module: Bytes of activations by the module that ran when they were saved, at
            the moment when most was saved. "" is the model, "(outside)" is no module.
        total_saved: Bytes that were saved for backward, freed since or not.

    Raises:
        TypeError: ``model`` is no module, or compiled, or an optimizer is none.
        ValueError: Parameters are none, lazy, on several devices, or not the model's.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())
        >>> with MemoryLedger(model) as ledger:
        ...     model(torch.ones(2, 8)).sum().backward()
        >>> ledger.by_module  # the batch for the first, its output for the second
        {'0': 64, '1': 64}
        >>> ledger.moments["end"]
        {'parameters': 256, 'gradients': 256}
    """

    def __init__(self, model: nn.Module, optimizers: Any = ()) -> None:  # noqa: ANN401
        several = optimizers if isinstance(optimizers, Iterable) else [optimizers]
        self._optimizers = list(several)
        self._model = model
        _check(model, self._optimizers)
        self._watch: _Watch | None = None
        self._stack = ExitStack()
        self.moments: dict[str, dict[str, int]] = {}
        self.by_module: dict[str, int] = {}
        self.total_saved = 0

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by kind at the moment when most was held; {} before a measurement."""
        return max(self.moments.values(), key=lambda h: sum(h.values()), default={})

    def __enter__(self) -> Self:
        if self._watch is not None:
            raise RuntimeError("this ledger is open already")
        watch, stack = _Watch(self._model, self._optimizers), ExitStack()
        stack.enter_context(saved_tensors_hooks(watch.pack, _Saved.unpack))
        stack.callback(hooks.register_module_forward_pre_hook(watch.enter).remove)
        after = hooks.register_module_forward_hook(watch.leave, always_call=True)
        stack.callback(after.remove)
        stack.enter_context(watch)
        self._watch, self._stack, self.moments = watch, stack, watch.moments
        self.moments["start"] = watch.held()
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401
        self._stack.__exit__(*error)
        if self._watch is not None:
            self._watch.mark()
            self.moments["end"] = self._watch.held()
            self._watch.storages.clear()  # and hear no more of them
            self.by_module = dict(self._watch.by_module)
            self.total_saved = self._watch.total_saved
        self._watch = None

    def __str__(self) -> str:
        peak = self.peak
        unit = [u for u in _UNITS if _UNITS[u] <= max(sum(peak.values()), 1)][-1]
        kinds = [k for k in _LETTERS if any(k in h for h in self.moments.values())]
        lines = ["  ".join([f"{unit:8}", *kinds, "   total"])]
        for moment, held in self.moments.items():
            row = {k: held.get(k, 0) for k in kinds} | {"   total": sum(held.values())}
            cells = (f"  {n / _UNITS[unit]:{len(k)}.1f}" for k, n in row.items())
            mark = "  peak" if held is peak else ""
            lines.append(f"{moment:8}{''.join(cells)}{mark}")
        return "\n".join(lines)

    def chart(self, width: int = 60) -> str:
        """Draw a bar for each moment, a letter for each kind; the peak fills ``width``.

        Raises:
            ValueError: ``width`` is less than 10.
        """
        if width < 10:
            raise ValueError(f"width must be at least 10, got {width}")
        top, lines = max(sum(self.peak.values()), 1), []
        for moment, held in self.moments.items():
            bar, seen = "", 0
            for kind, nbytes in held.items():
                seen += nbytes
                bar = bar.ljust(round(width * seen / top), _LETTERS[kind])
            lines.append(f"{moment:8}  {bar}")
        shown = {kind for held in self.moments.values() for kind in held}
        legend = (f"{_LETTERS[kind]} {kind}" for kind in _LETTERS if kind in shown)
        return "\n".join([*lines, f"{'':8}  {', '.join(legend)}"])


@dataclass(eq=False, slots=True)
class _Storage:
    """The account of one storage while it lives."""

    made_as: str  # "casts", "recomputed" or "other"
    owned_as: str = ""  # one of the kinds before those, while it is that
    saved: int = 0  # how many times it is saved for backward at present
    module: str = ""  # that ran when it was saved
    nbytes: int = 0
    ref: object = None  # calls back when the storage dies

    @property
    def kind(self) -> str:
        if self.owned_as or self.made_as == "casts" or not self.saved:
            return self.owned_as or self.made_as
        return "activations"


class _Saved:  # stands in for a tensor, and dies when autograd lets go of it
    def __init__(self, watch: "_Watch", tensor: Tensor) -> None:
        self.watch = watch
        self.tensor = tensor.detach()  # the tensor itself would be a cycle
        self.version = tensor._version
        self.storages = watch.see(tensor)

    def unpack(self) -> Tensor:  # autograd leaves this check to hooks
        if self.tensor._version != self.version:
            raise RuntimeError("a saved tensor was modified by an inplace operation")
        return self.tensor

    def __del__(self) -> None:
        self.watch.let_go(self.storages)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The accounts of one ``with`` block, noted at the end of each rise."""

    def __init__(self, model: nn.Module, optimizers: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.optimizers = model, optimizers
        self.names = {id(m): name for name, m in model.named_modules()}
        self.moments: dict[str, dict[str, int]] = {}
        self.by_module: Counter[str] = Counter()
        self.storages: dict[int, _Storage] = {}  # by the address of the C++ object
        self.running: list[str] = []  # modules
        self.phase = "forward"
        self.total = self.total_saved = 0
        self.grew = self.saved_more = False  # since the last mark
        self.dying: _Storage | None = None  # its owner has dropped it already
        self.is_packing = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        self.follow()
        inputs = self.see((args, kwargs))
        result = func(*args, **(kwargs or {}))
        again = self.phase == "backward" and torch.is_grad_enabled()
        made_as = "recomputed" if again else "other"
        if func is torch.ops.aten._to_copy.default:
            made_as = "casts" if inputs[0].owned_as == "parameters" else made_as
        self.see(result, made_as)
        return result

    def see(self, things: object, made_as: str = "other") -> list[_Storage]:
        found = []
        for tensor in _tensors(things):
            real = tensor.untyped_storage()
            key, nbytes = real._cdata, real.nbytes()
            if key not in self.storages:
                storage = self.storages[key] = _Storage(made_as)
                storage.ref = weakref.ref(real, partial(self.freed, key))
            storage = self.storages[key]
            self.grew |= nbytes > storage.nbytes  # new, or resized
            self.total += nbytes - storage.nbytes
            storage.nbytes = nbytes
            found.append(storage)
        return found

    def freed(self, key: int, _: object) -> None:
        if self.storages:  # the block has not ended
            self.dying = self.storages[key]
            self.follow()
            self.mark()
            self.total -= self.storages.pop(key).nbytes
            self.dying = None

    def pack(self, tensor: Tensor) -> _Saved:
        self.is_packing = True  # autograd has turned gradients off for this
        self.follow()
        saved = _Saved(self, tensor)
        self.is_packing = False
        for storage in saved.storages:
            if not storage.saved:
                storage.module = self.running[-1] if self.running else "(outside)"
                self.total_saved += 0 if storage.owned_as else storage.nbytes
            storage.saved += 1
        self.saved_more = True
        return saved

    def let_go(self, storages: list[_Storage]) -> None:
        if self.storages:
            self.follow()
            self.mark()
        for storage in storages:
            storage.saved -= 1

    def enter(self, module: nn.Module, *_: object) -> None:
        if id(module) in self.names:
            self.running.append(self.names[id(module)])

    def leave(self, module: nn.Module, *_: object) -> None:
        if id(module) in self.names:
            self.running.pop()

    def follow(self) -> None:
        phase = self.phase
        if torch._C._current_graph_task_id() != -1:
            phase = "backward"
        elif self.running or self.is_packing:
            phase = "forward"
        elif phase == "backward" or not torch.is_grad_enabled():
            phase = "step"
        if phase != self.phase:
            self.mark()
            self.phase = phase
            self.grew = True  # the start of a phase is a moment of it

    def mark(self) -> None:
        """Note what is held, if it is the most of this phase or of all activations."""
        most = sum(self.moments.get(self.phase, {}).values())
        if not (self.saved_more or (self.grew and self.total >= most)):
            return
        held = self.held()
        if self.total >= most:
            self.moments[self.phase] = held
        if held.get("activations", 0) > sum(self.by_module.values()):
            self.by_module.clear()
            for storage in list(self.storages.values()):
                if storage.kind == "activations":
                    self.by_module[storage.module] += storage.nbytes

    def held(self) -> dict[str, int]:
        """Sum the storages by what they are now to the model and the optimizers."""
        params = list(self.model.parameters())
        states = [state for o in self.optimizers for state in o.state.values()]
        mains = [state["main_param"] for state in states if "main_param" in state]
        for optimizer in self.optimizers:
            mains += getattr(optimizer, "main_params", {}).values()
        grads = [t.grad for t in (*params, *mains)]
        owners = (params, list(self.model.buffers()), mains, grads, states)
        owned: dict[_Storage, str] = {}
        for kind, owner in zip(_LETTERS, owners, strict=False):
            for storage in self.see(owner):
                owned.setdefault(storage, kind)
        sums: Counter[str] = Counter()
        for storage in list(self.storages.values()):
            if storage is not self.dying:
                storage.owned_as = owned.get(storage, "")
            sums[storage.kind] += storage.nbytes
        self.grew = self.saved_more = False
        return {kind: sums[kind] for kind in _LETTERS if sums[kind]}


def _tensors(things: object) -> Iterator[Tensor]:
    if hasattr(things, "__tensor_flatten__"):  # made of other tensors
        things = [getattr(things, name) for name in things.__tensor_flatten__()[0]]
    elif isinstance(things, Tensor) and things.is_sparse:
        things = [things._indices(), things._values()]
    if isinstance(things, Tensor):
        yield things
    elif isinstance(things, (dict, list, tuple)):
        for thing in things.values() if isinstance(things, dict) else things:
            yield from _tensors(thing)


def _check(model: object, optimizers: list[Any]) -> None:
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        name = type(model).__name__
        raise TypeError(f"model must be an nn.Module, and not compiled, got {name}")
    params = list(model.parameters())
    if not params or any(is_lazy(p) for p in params):
        raise ValueError("model has no parameters, or lazy ones: run it once before")
    if len(devices := sorted({str(p.device) for p in params})) > 1:
        raise ValueError(f"parameters must lie on one device, got {devices}")
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizers must be of torch.optim, got {name}")
        mains = getattr(optimizer, "main_params", {}).values()
        known = {id(p) for p in (*params, *mains)}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(p) not in known for p in held):
            raise ValueError(f"{name} holds parameters that are not the model's")
