"""Name the module and the operation that made the first NaN or Inf of a step.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

`FirstBadModule` is a ``with`` block around forward and backward;
`find_first_bad_module` runs both on one batch and leaves the model as it was.

    Guide:   guide/find_first_bad_module
    Tests:   tests/test_find_first_bad_module.py
    Sources: IEEE 754-2019, section 7 (which operations make NaN and Inf);
             PyTorch 2.13, 2026, torch/utils/_python_dispatch.py and
             docs/source/notes/autograd.md (what is seen of forward and backward).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import itertools
import linecache
import math
import random
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

__all__ = ["BadModule", "FirstBadModule", "TensorRange", "find_first_bad_module"]

_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "contextlib", "functools"}
# A mask is given to these, and a row that is masked whole is theirs to report.
_MASKED = ("softmax", "attention", "logsumexp")


@dataclass(frozen=True)
class TensorRange:
    """What a tensor held: its finite range, and how many values are not finite."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    low: float = math.nan  # smallest finite value; NaN where there is none
    high: float = math.nan
    nan: int = 0
    posinf: int = 0
    neginf: int = 0

    def __str__(self) -> str:
        counts = {"NaN": self.nan, "+Inf": self.posinf, "-Inf": self.neginf}
        parts = [f"{n} {name}" for name, n in counts.items() if n]
        if not math.isnan(self.low):
            parts.insert(0, f"{self.low:.4g} to {self.high:.4g}")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {list(self.shape)} {', '.join(parts)}"


@dataclass(frozen=True)
class BadModule:
    """Where the first NaN or Inf that did harm came from.

    Attributes:
        module: Path of the module, "" for the model, "(outside)" for none. In backward
            it is the module whose forward operation is differentiated.
        module_type: Its class, as ``Linear``; "" where none ran.
        operation: As ``aten.addmm``; or what held the value before the block.
        phase: "forward", "backward" or "step" (the optimizer's); "input" or "parameter"
            (buffers, older gradients) where the value was there before the block.
        inputs: Ranges of the operation's floating-point tensors before it ran.
        output: Range of its first result that is not finite.
        backward_of: In backward, the forward operation that is differentiated.
        line: Where your program called the (forward) operation.
        in_wider_dtype: Largest magnitude of that result if computed in float32 (float64
            for a float32 one) from the same inputs; None where that cannot be told.
        message: All this in words.
    """

    module: str
    module_type: str
    operation: str
    phase: str
    inputs: tuple[TensorRange, ...]
    output: TensorRange
    backward_of: str = ""
    line: str = ""
    in_wider_dtype: float | None = None
    message: str = ""

    def __str__(self) -> str:
        return self.message


class FirstBadModule:
    """Find the operation that made the first NaN or Inf which did harm.

    What runs inside ``with`` is watched: each operation of forward, backward and step.
    A value *did harm* if it, or what was made of it, reached the loss or a gradient;
    or, after the last backward, the model's output or a tensor that is alive at the end
    and that no operation has read; or if a batch norm keeps it in its statistics.
    What an operation made finite again is forgotten, such as ``log(0)`` under a
    ``where``. An infinity on purpose (``masked_fill``, ``full``, a mask of -Inf from
    before the block) is a fault only in the loss or a gradient; where NaN is made of
    it, the operation that made it so is named.

    Numbers, random state, gradients and model are as without the block. Every result is
    checked: it is for a step that fails, not for a whole run.

    Args:
        model: Its modules are named. None: operations and lines only.

    Attributes:
        result: What was found, or None; from the end of the block, also if by an error.

    Raises:
        TypeError: ``model`` is no module, or compiled.
        RuntimeError: The block is entered within itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with FirstBadModule(model) as found:
        ...     loss = model(torch.ones(1, 2)).sub(9).sqrt().sum()
        ...     loss.backward()
        >>> found.result.module, found.result.operation
        ('(outside)', 'aten.sqrt')
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        given: object = model
        is_module = given is None or isinstance(given, nn.Module)
        if not is_module or hasattr(given, "_orig_mod"):
            name = type(given).__name__
            raise TypeError(f"model must be an nn.Module, and not compiled, got {name}")
        self._model = model
        self._stack: ExitStack | None = None
        self.result: BadModule | None = None

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise RuntimeError("this block is open already")
        self.result = None
        watch, stack, model = _Watch(self._model), ExitStack(), self._model
        stack.callback(lambda: setattr(self, "result", watch.verdict()))
        if model is not None:
            handles = [
                hooks.register_module_forward_pre_hook(watch.enter),
                hooks.register_module_forward_hook(watch.leave, always_call=True),
                model.register_forward_pre_hook(watch.given, with_kwargs=True),
            ]
            for p in model.parameters():
                if p.requires_grad and p.is_leaf:
                    register: Any = p.register_post_accumulate_grad_hook
                    handles.append(register(watch.accumulated))
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(watch)
        self._stack = stack
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(*error)

    def __bool__(self) -> bool:
        return self.result is not None

    def __str__(self) -> str:
        return str(self.result) if self.result else "no NaN or Inf did harm"


def find_first_bad_module(
    model: nn.Module,
    *inputs: Any,  # noqa: ANN401 - what the model takes
    loss_fn: Callable[[Any], Tensor] | None = None,
    scale: float = 1.0,
    **kwargs: Any,  # noqa: ANN401
) -> BadModule | None:
    """Run forward, and backward with ``loss_fn``; return where NaN or Inf began.

    Parameters, buffers, gradients and mode are left as they were; so are the random
    states (PyTorch's, Python's, NumPy's), from which the run draws: it drops out what
    your next step would. Call it under ``torch.autocast`` if you train under it. Where
    the model or ``loss_fn`` raises, a note to the error says what was found by then.

    Args:
        model: Not compiled.
        *inputs: What it is called with, and ``kwargs``.
        loss_fn: Makes the loss, one number, of the output. None: no backward.
        scale: The loss scale, as a GradScaler's; finite, > 0.
        **kwargs: For the model.

    Returns:
        None if no NaN or Inf did harm.

    Raises:
        TypeError: ``model`` is no module, or compiled; ``loss_fn`` is not callable.
        ValueError: The loss is not one number, or needs no gradient; ``scale`` is out
            of range.

    Example:
        >>> print(find_first_bad_module(nn.Linear(1, 1), torch.tensor([[math.nan]])))
        the input batch holds NaN or Inf: argument 0, float32 [1, 1] 1 NaN
    """
    found = FirstBadModule(model)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if not 0 < scale < math.inf:  # also refuses NaN
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    names = [(m, dict(m._buffers)) for m in model.modules()]
    refused = ""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numpys = numpy.random.get_state() if numpy else None
    devices = {p.device for p, _ in grads if p.device.type not in {"cpu", "meta"}}
    kind = next((d.type for d in devices), "cuda")
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            for p, _ in grads:
                p.grad = None
            with found:
                output = model(*inputs, **kwargs)
                if loss_fn is not None:
                    loss = loss_fn(output)
                    if not (refused := _refused(loss)):
                        torch.autograd.backward(loss * scale if scale != 1 else loss)
        except Exception as error:
            if found.result is not None:
                error.add_note(f"NaN or Inf before: {found.result}")
            raise
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(numpys)
            for module, own in names:
                module._buffers.clear()
                module._buffers.update(own)
            for p, grad in grads:
                p.grad = grad
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
    if refused:
        raise ValueError(refused)
    return found.result


@dataclass(eq=False, slots=True)
class _Origin:  # of values that are not finite
    order: int
    found: BadModule
    is_written: bool = False  # an infinity on purpose


@dataclass(eq=False, slots=True)
class _Storage:
    is_external: bool  # has values that no operation in the block has written
    origin: _Origin | None = None
    is_read: bool = False  # by an operation since it was written
    is_first: bool = True  # not the second result of an operation, such as a logsumexp
    phase: str = ""
    order: int = -1
    ref: object = None  # calls back when the storage dies


@dataclass(eq=False, slots=True)
class _Call:  # of an operation
    name: str
    phase: str = "forward"
    module: tuple[str, str] = ("(outside)", "")  # path, class
    place: tuple[str, int, str] = ("", 0, "")  # file, line, function
    backward_of: str = ""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The values that are not finite within one ``with`` block."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.names: dict[int, tuple[str, str]] = {}  # of modules
        self.held: dict[int, tuple[str, str]] = {}  # storages: of what, and whose
        self.given_as: dict[int, str] = {}  # storages: which of the model's arguments
        self.storages: dict[int, _Storage] = {}  # by the address of the C++ object
        self.running: list[tuple[tuple[str, str], int]] = []  # module, backward
        self.calls: dict[int, _Call] = {}  # by the number of the backward node
        self.orders = itertools.count()
        self.last_backward = -1
        self.harmed: list[_Origin] = []  # the loss and gradients
        self.outputs: list[tuple[int, _Origin]] = []  # of the model
        self.kept: list[_Origin] = []  # running statistics
        for name, module in () if model is None else model.named_modules():
            self.names[id(module)] = name, type(module).__name__
        for name, b in () if model is None else model.named_buffers():
            self.held[_key(b)] = "buffer", name
        for name, p in () if model is None else model.named_parameters():
            self.held[_key(p)] = "parameter", name
            if p.grad is not None:
                self.held[_key(p.grad)] = "the gradient, from before, of", name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        kwargs, order, call = kwargs or {}, next(self.orders), self.place(func)
        inputs = list(_tensors((args, kwargs)))
        bad = [origin for t in inputs if (origin := self.look_at(t, call))]
        changed = list(_tensors(list(_written(func, args, kwargs))))
        ranges = [_range(t) for t in inputs] if bad or changed else []
        result = func(*args, **kwargs)
        made, name = changed or list(_tensors(result)), call.name.partition(".")[2]
        if "batch_norm" in name and "backward" not in name:
            self.look_at_statistics(args, call)
        if "empty" in name or "resize" in name:  # not written yet
            for tensor in made:
                self.see(tensor, is_external=False)
            return result
        if name == "ones_like" and inputs[:1] and not inputs[0].dim():
            self.harmed += bad  # a loss: backward starts so
        read = {_key(t): self.storages[_key(t)] for t in inputs}
        if not changed and any(_key(t) in read for t in made):
            return result  # a view
        if made and not name.endswith("_like") and not name.startswith("new_"):
            for storage in read.values():
                storage.is_read = True
        for index, tensor in enumerate(made):
            storage = self.see(tensor, is_external=False)
            storage.order, storage.phase, storage.is_read = order, call.phase, False
            storage.is_first = not index or bool(changed) or isinstance(result, list)
            if not _is_finite(tensor):
                ranges = ranges or [_range(t) for t in inputs]
                output = _range(tensor)
                origin = _inherited(bad, ranges, output)
                if origin is None:
                    report = self.report(call, tensor, tuple(ranges), output)
                    origin = self.born(report, func, (args, kwargs), call, bad)
                storage.origin = origin
            elif tensor.nbytes == tensor.untyped_storage().nbytes():
                storage.origin = None
        return result

    def place(self, func: Any) -> _Call:  # noqa: ANN401
        """Say where the operation that comes now belongs, and note it for backward."""
        call, task = _Call(str(func.overloadpacket)), torch._C._current_graph_task_id()
        if self.running:
            call.module = self.running[-1][0]
        is_again = bool(self.running) and self.running[-1][1] == task  # a checkpoint
        if task != -1 and not is_again:
            call.phase, self.last_backward = "backward", next(self.orders)
            node: Any = torch._C._current_autograd_node()
            of = self.calls.get(node._sequence_nr()) if node is not None else None
            if of is not None:
                call.module, call.place, call.backward_of = of.module, of.place, of.name
            return call
        call.place = _place()
        # A node of the graph is for the first operation after it was made.
        self.calls.setdefault(torch._C._autograd._get_sequence_nr() - 1, call)
        is_late = self.last_backward >= 0 and not self.running
        if is_late and not torch.is_grad_enabled():
            call.phase = "step"
        return call

    def see(self, tensor: Tensor, is_external: bool) -> _Storage:
        key = _key(tensor)
        if key not in self.storages:
            ref = weakref.ref(tensor.untyped_storage(), partial(self.freed, key))
            self.storages[key] = _Storage(is_external, ref=ref)
        return self.storages[key]

    def freed(self, key: int, _: object) -> None:
        self.storages.pop(key, None)

    def look_at(self, tensor: Tensor, call: _Call | None) -> _Origin | None:
        """Return whence the values of a tensor are that are not finite."""
        storage = self.see(tensor, is_external=True)
        is_known = storage.origin is None and not storage.is_external
        if is_known or _is_finite(tensor):
            return None
        if storage.origin is None and call is not None:
            found, key = _range(tensor), _key(tensor)
            kind, name = self.held.get(key, ("", self.given_as.get(key, "a tensor")))
            words = f"{kind} {name} holds NaN or Inf: {found}"
            if not kind:
                words = f"the input batch holds NaN or Inf: {name}, {found}"
            if not kind and key not in self.given_as:
                words = f"a tensor from before the block holds NaN or Inf: {found}"
                words += f", read by {call.name} at {_words(call.place)}"
            module = name.rpartition(".")[0] if kind else call.module[0]
            phase = "parameter" if kind else "input"
            report = BadModule(module, "", name, phase, (found,), found, message=words)
            is_mask = not found.nan and not found.posinf and kind != "parameter"
            storage.origin = _Origin(next(self.orders), report, is_mask)
        return storage.origin

    def look_at_statistics(self, args: tuple[Any, ...], call: _Call) -> None:
        """Look at what a batch norm keeps; its output hides it: x / sqrt(Inf) is 0."""
        for tensor in _tensors(args[3:5]):
            storage = self.see(tensor, is_external=True)
            if storage.origin is None and not _is_finite(tensor):
                ranges = tuple(_range(t) for t in _tensors(args[:3]))
                report = self.report(call, tensor, ranges, _range(tensor))
                words = f"{report.message}, in its running statistics"
                words += f"; called at {report.line}"
                report = replace(report, message=words)
                storage.origin = _Origin(next(self.orders), report)
            if storage.origin is not None:
                self.kept.append(storage.origin)

    def report(
        self,
        call: _Call,
        tensor: Tensor,
        inputs: tuple[TensorRange, ...],
        output: TensorRange,
    ) -> BadModule:
        module, kind = call.module
        if call.phase == "step" and _key(tensor) in self.held:
            module = self.held[_key(tensor)][1].rpartition(".")[0]
            kind = dict(self.names.values())[module]
        counts = {"NaN": output.nan, "Inf": output.posinf + output.neginf}
        made = " and ".join(f"{n} {value}" for value, n in counts.items() if n)
        of = f" (backward of {call.backward_of})" if call.backward_of else ""
        where = f"{module!r}, {kind}" if kind else repr(module)
        given = "; ".join(map(str, inputs)) or "no floating-point tensor"
        message = f"{call.phase}: {call.name}{of} in {where}: made {made} of {given}"
        line = _words(call.place)
        return BadModule(
            module, kind, call.name, call.phase, inputs, output, call.backward_of, line,
            None, message,
        )  # fmt: skip

    def born(
        self,
        report: BadModule,
        func: Any,  # noqa: ANN401
        given: tuple[tuple[Any, ...], dict[str, Any]],
        call: _Call,
        masks: list[_Origin],
    ) -> _Origin:
        """Make the origin of new values, and say why they are not finite."""
        for origin in masks if not any(m in call.name for m in _MASKED) else ():
            if origin.found.phase in {"input", "parameter"}:
                return _Origin(origin.order, origin.found)  # no mask: the cause itself
        numbers = [n for n in (*given[0], *given[1].values()) if isinstance(n, float)]
        is_written = not all(map(math.isfinite, numbers)) and not report.output.nan
        wider, why = None, ""
        if is_written:
            why = "; an infinity on purpose, which reached the loss or a gradient"
        elif masks:
            why = f"; of the infinities of {masks[0].found.operation}"
        elif not func._schema.is_mutable:
            wider = _redo(func, *given)
            why = _why(wider, report.output.dtype, call.phase)
        at = f"; called at {report.line}" if report.line else ""
        message = report.message + why + at
        report = replace(report, in_wider_dtype=wider, message=message)
        return _Origin(next(self.orders), report, is_written)

    def enter(self, module: nn.Module, _: object) -> None:
        if id(module) in self.names:
            task = torch._C._current_graph_task_id()
            self.running.append((self.names[id(module)], task))

    def given(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, thing in (*enumerate(args), *kwargs.items()):
            for tensor in _tensors(thing):
                self.given_as[_key(tensor)] = f"argument {name}"

    def leave(self, module: nn.Module, _: object, output: object) -> None:
        if id(module) in self.names:
            self.running.pop()
        if module is self.model:
            origins = self.origins(output)
            self.outputs += [(next(self.orders), origin) for origin in origins]

    def accumulated(self, parameter: Tensor) -> None:
        self.harmed += self.origins(parameter.grad)

    def origins(self, things: object) -> list[_Origin]:
        with _disable_current_modes(), torch.no_grad():
            found = [self.look_at(t, None) for t in _tensors(things)]
        return [origin for origin in found if origin is not None]

    def verdict(self) -> BadModule | None:
        """Choose the first origin of what did harm."""
        late = [o for n, o in self.outputs if n > self.last_backward]
        for s in list(self.storages.values()):
            if s.origin and s.is_first and not s.is_read and s.phase == "backward":
                self.harmed.append(s.origin)
            elif s.origin and s.is_first and not s.is_read:
                late += [s.origin] if s.order > self.last_backward else []
        self.storages.clear()  # and hear no more of them
        late = [origin for origin in late if not origin.is_written]
        faults = [origin for origin in self.harmed if not origin.is_written]
        chosen = faults or self.harmed or late or self.kept
        return min(chosen, key=lambda o: o.order).found if chosen else None


def _inherited(
    bad: list[_Origin], inputs: Iterable[TensorRange], output: TensorRange
) -> _Origin | None:
    """Return the origin that a result has from its inputs; None if it is new."""
    faults = [origin for origin in bad if not origin.is_written]
    if not faults and output.nan and not any(r.nan for r in inputs):
        return None
    return min(faults or bad, key=lambda o: o.order, default=None)


def _why(wider: float | None, dtype: torch.dtype, phase: str) -> str:
    """Say whether the range of the dtype is the cause."""
    name, ends = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    other = "float32" if dtype.itemsize < 4 else "float64"
    if wider is None or dtype == torch.float64:
        return ""
    if not math.isfinite(wider):
        scale = "; no loss scale cures it" if phase == "backward" else ""
        return f"; in {other} it is not finite either{scale}"
    if wider <= ends:  # a divisor that is 0 in the narrow dtype, say
        return f"; in {other} it is finite, at most {wider:.4g}"
    scale = ""
    if phase == "backward" and dtype == torch.float16:  # it is linear in the scale
        times = 2 ** math.ceil(math.log2(wider / ends))
        scale = f"; a loss scale {times} times lower cures it"
    return f"; {name} ends at {ends:.5g}, in {other} the largest is {wider:.4g}{scale}"


def _redo(func: Any, args: Any, kwargs: Any) -> float | None:  # noqa: ANN401
    """Compute the same in a wider dtype; return the largest magnitude of the result."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    dtypes = [t.dtype for t in _tensors((args, kwargs))]
    dtypes += [v for v in kwargs.values() if isinstance(v, torch.dtype)]
    wide = torch.float32 if any(d.itemsize < 4 for d in dtypes) else torch.float64

    def widen(x: Any) -> Any:  # noqa: ANN401
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.to(wide, copy=True)  # batch norm writes to what it is given
        return wide if isinstance(x, torch.dtype) and x.is_floating_point else x

    try:
        result = func(*tree_map(widen, args), **tree_map(widen, kwargs))
        return max((float(t.abs().max()) for t in _tensors(result)), default=None)
    except (RuntimeError, TypeError, ValueError):
        return None  # an operation of other dtypes only


def _tensors(things: object) -> Iterator[Tensor]:
    """Yield the tensors with floating-point values that can be read."""
    if isinstance(things, Tensor) and things.is_nested:  # TransformerEncoder's in eval
        things = things.values()
    elif isinstance(things, Tensor) and things.layout is torch.sparse_coo:
        things = things._values()
    elif isinstance(things, Tensor) and things.layout is not torch.strided:
        things = things.values()
    if isinstance(things, Tensor):
        is_float = things.is_floating_point() or things.is_complex()
        if is_float and things.device.type != "meta" and things.numel():
            yield things
    elif isinstance(things, (dict, list, tuple)):
        for thing in things.values() if isinstance(things, dict) else things:
            yield from _tensors(thing)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[object]:  # noqa: ANN401
    """Yield the arguments that an operation writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _plain(tensor: Tensor) -> Tensor:  # float8 has few operations of its own
    values = tensor.detach()
    values = values.float() if values.dtype.itemsize == 1 else values
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _is_finite(tensor: Tensor) -> bool:
    values = _plain(tensor)
    total = values.sum(dtype=torch.float32 if values.dtype.itemsize < 4 else None)
    # A sum is the quick answer; it can overflow where no value is infinite.
    return math.isfinite(total.item()) or bool(values.isfinite().all())


def _range(tensor: Tensor) -> TensorRange:
    values = _plain(tensor)
    finite = values[values.isfinite()]
    low, high = map(float, finite.aminmax()) if finite.numel() else (math.nan, math.nan)
    counts = [
        int(n.sum()) for n in (values.isnan(), values.isposinf(), values == -math.inf)
    ]
    return TensorRange(tensor.dtype, tuple(tensor.shape), low, high, *counts)


def _place() -> tuple[str, int, str]:
    """Find the line of the caller's program."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in _LIBRARIES and module != __name__:
            return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return "", 0, ""


def _words(place: tuple[str, int, str]) -> str:
    file, number, function = place
    text = linecache.getline(file, number).strip()
    return f"{file}:{number} in {function}: {text}" if file else ""


def _refused(loss: object) -> str:
    """Say why this is no loss; nothing if it is one."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        return f"loss_fn must return one number in a tensor, got {shape}"
    if not loss.requires_grad:
        return "the loss needs no gradient: it depends on no parameter"
    return ""
