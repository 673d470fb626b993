"""Watch all operations of one block: what they read, what they make, what did harm."""

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .calls import Call, Calls
from .origins import Origin, Storages, inherited
from .report import BadModule, made_by, why
from .tensors import is_finite, key_of, range_of, redo, tensors_in, written_by

# A mask is given to these, and a row that is masked whole is theirs to report.
_MASKED = ("softmax", "attention", "logsumexp")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The values that are not finite within one ``with`` block."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.clock = itertools.count()  # orders operations, origins and outputs
        self.calls = Calls(model, self.clock)
        self.storages = Storages()
        self.held: dict[int, tuple[str, str]] = {}  # storages: of what, and whose
        self.given_as: dict[int, str] = {}  # storages: which of the model's arguments
        self.harmed: list[Origin] = []  # the loss and gradients
        self.outputs: list[tuple[int, Origin]] = []  # of the model
        self.kept: list[Origin] = []  # running statistics
        for name, b in () if model is None else model.named_buffers():
            self.held[key_of(b)] = "buffer", name
        for name, p in () if model is None else model.named_parameters():
            self.held[key_of(p)] = "parameter", name
            if p.grad is not None:
                self.held[key_of(p.grad)] = "the gradient, from before, of", name

    # ------------------------------------------------------------- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        kwargs, order, call = kwargs or {}, next(self.clock), self.calls.of(func)
        inputs = list(tensors_in((args, kwargs)))
        bad = [origin for t in inputs if (origin := self.look_at(t, call))]
        changed = list(tensors_in(list(written_by(func, args, kwargs))))
        ranges = [range_of(t) for t in inputs] if bad or changed else []
        result = func(*args, **kwargs)
        made, name = changed or list(tensors_in(result)), call.name.partition(".")[2]
        if "batch_norm" in name and "backward" not in name:
            self.look_at_statistics(args, call)
        if "empty" in name or "resize" in name:  # not written yet
            for tensor in made:
                self.storages.see(tensor, is_external=False)
            return result
        if name == "ones_like" and inputs[:1] and not inputs[0].dim():
            self.harmed += bad  # a loss: backward starts so
        read = {key_of(t): self.storages[key_of(t)] for t in inputs}
        if not changed and any(key_of(t) in read for t in made):
            return result  # a view
        if made and not name.endswith("_like") and not name.startswith("new_"):
            for storage in read.values():
                storage.is_read = True
        for index, tensor in enumerate(made):
            storage = self.storages.see(tensor, is_external=False)
            storage.order, storage.phase, storage.is_read = order, call.phase, False
            storage.is_first = not index or bool(changed) or isinstance(result, list)
            if not is_finite(tensor):
                ranges = ranges or [range_of(t) for t in inputs]
                output = range_of(tensor)
                storage.origin = inherited(bad, ranges, output)
                if storage.origin is None:
                    report = made_by(self.owned(call, tensor), tuple(ranges), output)
                    storage.origin = self.born(report, func, (args, kwargs), bad)
            elif tensor.nbytes == tensor.untyped_storage().nbytes():
                storage.origin = None
        return result

    def look_at(self, tensor: Tensor, call: Call | None) -> Origin | None:
        """Return whence the values of a tensor are that are not finite."""
        storage = self.storages.see(tensor, is_external=True)
        is_known = storage.origin is None and not storage.is_external
        if is_known or is_finite(tensor):
            return None
        if storage.origin is None and call is not None:
            storage.origin = self.brought(tensor, call)
        return storage.origin

    def brought(self, tensor: Tensor, call: Call) -> Origin:
        """Make the origin of values from before the block."""
        found, key = range_of(tensor), key_of(tensor)
        kind, name = self.held.get(key, ("", self.given_as.get(key, "a tensor")))
        if kind:
            words = f"{kind} {name} holds NaN or Inf: {found}"
        elif key in self.given_as:
            words = f"the input batch holds NaN or Inf: {name}, {found}"
        else:
            before = "before the block"
            if _is_one_of_several():  # what it is sent, no operation writes
                before += " or from another rank"
            words = f"a tensor from {before} holds NaN or Inf: {found}"
            words += f", read by {call.name}"
            words += f" at {call.line}" if call.line else ""
        module = name.rpartition(".")[0] if kind else call.module[0]
        phase = "parameter" if kind else "input"
        report = BadModule(module, "", name, phase, (found,), found, message=words)
        is_mask = not found.nan and not found.posinf and kind != "parameter"
        return Origin(next(self.clock), report, is_mask)

    def born(
        self,
        report: BadModule,
        func: Any,  # noqa: ANN401
        given: tuple[tuple[Any, ...], dict[str, Any]],
        masks: list[Origin],
    ) -> Origin:
        """Make the origin of new values, and say why they are not finite."""
        for origin in masks if not any(m in report.operation for m in _MASKED) else ():
            if origin.found.phase in {"input", "parameter"}:
                return Origin(origin.order, origin.found)  # no mask: the cause itself
        numbers = [n for n in (*given[0], *given[1].values()) if isinstance(n, float)]
        is_written = not all(map(math.isfinite, numbers)) and not report.output.nan
        wider, reason = None, ""
        if is_written:
            reason = "; an infinity on purpose, which reached the loss or a gradient"
        elif masks:
            reason = f"; of the infinities of {masks[0].found.operation}"
        elif not func._schema.is_mutable:
            wider = redo(func, *given)
            reason = why(wider, report.output.dtype, report.phase)
        at = f"; called at {report.line}" if report.line else ""
        message = report.message + reason + at
        report = replace(report, in_wider_dtype=wider, message=message)
        return Origin(next(self.clock), report, is_written)

    def look_at_statistics(self, args: tuple[Any, ...], call: Call) -> None:
        """Look at what a batch norm keeps; its output hides it: x / sqrt(Inf) is 0."""
        for tensor in tensors_in(args[3:5]):
            storage = self.storages.see(tensor, is_external=True)
            if storage.origin is None and not is_finite(tensor):
                ranges = tuple(range_of(t) for t in tensors_in(args[:3]))
                report = made_by(self.owned(call, tensor), ranges, range_of(tensor))
                words = f"{report.message}, in its running statistics"
                words += f"; called at {report.line}"
                report = replace(report, message=words)
                storage.origin = Origin(next(self.clock), report)
            if storage.origin is not None:
                self.kept.append(storage.origin)

    def owned(self, call: Call, tensor: Tensor) -> Call:
        """Name the module whose tensor it is that an optimizer's step has written."""
        if call.phase != "step" or key_of(tensor) not in self.held:
            return call
        module = self.held[key_of(tensor)][1].rpartition(".")[0]
        return replace(call, module=(module, dict(self.calls.names.values())[module]))

    # ------------------------------------------------------ modules and gradients

    def hook(self) -> list[Any]:
        """Hook into the model's modules and parameters; return the handles."""
        if self.model is None:
            return []
        handles = [
            hooks.register_module_forward_pre_hook(self.calls.enter),
            hooks.register_module_forward_hook(self.leave, always_call=True),
            self.model.register_forward_pre_hook(self.given, with_kwargs=True),
        ]
        for p in self.model.parameters():
            if p.requires_grad and p.is_leaf:
                register: Any = p.register_post_accumulate_grad_hook
                handles.append(register(self.accumulated))
        return handles

    def given(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the model's arguments."""
        for name, thing in (*enumerate(args), *kwargs.items()):
            for tensor in tensors_in(thing):
                self.given_as[key_of(tensor)] = f"argument {name}"

    def leave(self, module: nn.Module, _: object, output: object) -> None:
        """Note the model's output."""
        self.calls.leave(module)
        if module is self.model:
            origins = self.origins(output)
            self.outputs += [(next(self.clock), origin) for origin in origins]

    def accumulated(self, parameter: Tensor) -> None:
        """Look at a gradient that is done."""
        self.harmed += self.origins(parameter.grad)

    def origins(self, things: object) -> list[Origin]:
        """Return the origins of what is not finite, outside of any operation."""
        with _disable_current_modes(), torch.no_grad():
            found = [self.look_at(t, None) for t in tensors_in(things)]
        return [origin for origin in found if origin is not None]

    # ------------------------------------------------------------- the verdict

    def verdict(self) -> BadModule | None:
        """Choose the first origin of what did harm."""
        last = self.calls.last_backward
        late = [o for n, o in self.outputs if n > last]
        for s in list(self.storages.values()):
            if s.origin and s.is_first and not s.is_read and s.phase == "backward":
                self.harmed.append(s.origin)
            elif s.origin and s.is_first and not s.is_read and s.order > last:
                late.append(s.origin)
        self.storages.clear()  # and hear no more of them
        late = [origin for origin in late if not origin.is_written]
        faults = [origin for origin in self.harmed if not origin.is_written]
        chosen = faults or self.harmed or late or self.kept
        return min(chosen, key=lambda o: o.order).found if chosen else None


def _is_one_of_several() -> bool:
    """Tell whether other processes work at the same step."""
    dist = torch.distributed
    is_on = dist.is_available() and dist.is_initialized()
    return is_on and dist.get_world_size() > 1
