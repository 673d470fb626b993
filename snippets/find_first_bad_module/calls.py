"""Where an operation belongs: phase, module, forward operation, line of the program."""

import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "contextlib", "functools"}


@dataclass(eq=False, slots=True)
class Call:
    """A call of an operation."""

    name: str
    phase: str = "forward"
    module: tuple[str, str] = ("(outside)", "")  # path, class
    place: tuple[str, int, str] = ("", 0, "")  # file, line, function
    backward_of: str = ""

    @property
    def line(self) -> str:
        """The line of the program in words; empty if there is none."""
        file, number, function = self.place
        text = linecache.getline(file, number).strip()
        return f"{file}:{number} in {function}: {text}" if file else ""


class Calls:
    """The calls of one ``with`` block, and the modules that run.

    Args:
        model: Its modules are named.
        clock: Gives numbers that grow.
    """

    def __init__(self, model: nn.Module | None, clock: Iterator[int]) -> None:
        self.names: dict[int, tuple[str, str]] = {}  # of modules: path, class
        self.running: list[tuple[tuple[str, str], int]] = []  # module, backward
        self.by_node: dict[int, Call] = {}  # by the number of the backward node
        self.clock, self.last_backward = clock, -1
        for name, module in () if model is None else model.named_modules():
            self.names[id(module)] = name, type(module).__name__

    def enter(self, module: nn.Module, _: object) -> None:
        """Note that a module begins to run."""
        if id(module) in self.names:
            task = torch._C._current_graph_task_id()
            self.running.append((self.names[id(module)], task))

    def leave(self, module: nn.Module) -> None:
        """Note that it has run."""
        if id(module) in self.names:
            self.running.pop()

    def of(self, func: Any) -> Call:  # noqa: ANN401
        """Say where the operation that comes now belongs, and note it for backward."""
        call, task = Call(str(func.overloadpacket)), torch._C._current_graph_task_id()
        if self.running:
            call.module = self.running[-1][0]
        is_again = bool(self.running) and self.running[-1][1] == task  # a checkpoint
        if task != -1 and not is_again:
            call.phase, self.last_backward = "backward", next(self.clock)
            node: Any = torch._C._current_autograd_node()
            of = self.by_node.get(node._sequence_nr()) if node is not None else None
            if of is not None:
                call.module, call.place, call.backward_of = of.module, of.place, of.name
            return call
        call.place = _place()
        # A node of the graph is for the first operation after it was made.
        self.by_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, call)
        is_late = self.last_backward >= 0 and not self.running
        if is_late and not torch.is_grad_enabled():
            call.phase = "step"
        return call


def _place() -> tuple[str, int, str]:
    """Find the line of the caller's program."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        is_own = frame.f_globals.get("__package__") == __package__
        if module.partition(".")[0] not in _LIBRARIES and not is_own:
            return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return "", 0, ""
