"""Name the module and the operation that made the first NaN or Inf of a step.

Copy this folder into your project; it needs only ``torch`` (2.6 or newer).

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

import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor, nn

from .report import BadModule, TensorRange
from .watch import Watch

__all__ = ["BadModule", "FirstBadModule", "TensorRange", "find_first_bad_module"]


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
        watch, stack = Watch(self._model), ExitStack()
        stack.callback(lambda: setattr(self, "result", watch.verdict()))
        for handle in watch.hook():
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
    given: Any = scale
    is_number = isinstance(given, Real) or (
        isinstance(given, Tensor) and not given.dim()
    )
    if not is_number or not 0 < scale < math.inf:  # also refuses NaN
        raise ValueError(f"scale must be finite and > 0, got {scale!r}")
    refused = ""
    with _unchanged(model):
        try:
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
    if refused:
        raise ValueError(refused)
    return found.result


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Take the gradients away; put them, buffers and random states back at the end."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    names = [(m, dict(m._buffers)) for m in model.modules()]
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numpys = numpy.random.get_state() if numpy else None
    devices = {p.device for p, _ in grads if p.device.type not in {"cpu", "meta"}}
    kind = next((d.type for d in devices), "cuda")
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            for p, _ in grads:
                p.grad = None
            yield
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


def _refused(loss: object) -> str:
    """Say why this is no loss; nothing if it is one."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        return f"loss_fn must return one number in a tensor, got {shape}"
    if not loss.requires_grad:
        return "the loss needs no gradient: it depends on no parameter"
    return ""
