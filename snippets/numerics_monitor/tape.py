"""What a forward and a backward pass leave: where NaN or Inf began, dtypes, amax."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .amax import Amax
from .tensors import all_finite, finite, floats, total

# Modules that make no NaN and no Inf of finite values: not looked at.
_PASSIVE = {
    nn.Dropout, nn.Flatten, nn.GELU, nn.Identity, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Tanh,
}  # fmt: skip


class Tape:
    """A sum of each output of each module, and of its gradient, in order of time.

    A sum is finite where all values are. Nothing is asked of it until the step is over:
    on a GPU an answer would be waited for.

    Args:
        model: Modules are named as in it.
        is_due: Tells whether amax of FP8 tensors is wanted in this step.
    """

    def __init__(self, model: nn.Module, is_due: Callable[[], bool]) -> None:
        self.model, self.is_due = model, is_due
        self.usual: set[str] = set()  # modules that make infinities in healthy steps
        self.dtypes: dict[torch.dtype, int] = {}  # of outputs
        self.clear()

    def clear(self) -> None:
        """Begin the tape of the next step."""
        self.sums: list[tuple[str, str, Tensor]] = []  # kind, module, sum
        self.makers: dict[int, tuple[Any, str, int]] = {}  # of tensors, and versions
        self.readers: dict[str, list[str]] = {}  # of modules' outputs
        self.amax = Amax()

    def watch(self) -> list[Any]:
        """Hook into modules with parameters, and into leaves; return the handles."""
        handles = []
        for name, module in self.model.named_modules():
            own = any(True for _ in module.parameters(recurse=False))
            is_leaf = not any(True for _ in module.children())
            if own or (is_leaf and type(module) not in _PASSIVE):
                hook = partial(self._forward, name, hasattr(module, "fp8_meta"))
                handles.append(module.register_forward_hook(hook))
        return handles

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
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return  # a transform of torch.func, whose tensors cannot be read
        if is_fp8 and self.is_due():
            self.amax.see(f"{name}.input", args)
        for x in floats(args):
            maker = self.makers.get(id(x))
            if maker is not None and maker[0]() is x:
                self.readers.setdefault(maker[1], []).append(name)
        for y in floats(output):
            self.sums.append(("output", name, total(y)))
            self.dtypes[y.dtype] = self.dtypes.get(y.dtype, 0) + 1
            known = self.makers.get(id(y))
            if known is not None and known[0]() is y and known[2] == y._version:
                continue  # passed on as it came: from a module within, or an identity
            if y.requires_grad:
                self.makers[id(y)] = weakref.ref(y), name, y._version
                y.register_hook(partial(self._backward, name, is_fp8))  # type: ignore[no-untyped-call]

    def _backward(self, name: str, is_fp8: bool, grad: Tensor) -> None:
        self.sums.append(("grad_output", name, total(grad)))
        if is_fp8 and self.is_due():
            self.amax.see(f"{name}.grad_output", grad)

    def narrowest(self) -> torch.dtype:
        """Return the dtype of outputs with the fewest bits; of two, the usual one."""
        dtypes = sorted(self.dtypes, key=lambda d: (d.itemsize, -self.dtypes[d]))
        return (dtypes or [torch.float32])[0]

    def learn(self) -> None:
        """Take this step as healthy: infinities in it are meant, as in a mask."""
        flags = list(self._flags())
        self.usual -= {name for _, name, _ in flags}  # not others, of another optimizer
        self.usual |= {name for _, name, is_fine in flags if not is_fine}

    def first_bad(self, suspects: list[str]) -> tuple[str, str]:
        """Name the module and the phase where the first value was not finite.

        Of several modules that read the tensor whose gradient is bad, it is the last of
        the ``suspects``, modules with a parameter whose gradient is bad; else those
        without parameters that train, which could not be suspects; else any of all.
        """
        last = ""
        for kind, name, is_fine in self._flags():
            if is_fine or name in self.usual:
                last = name if kind == "grad_output" else ""
            elif kind == "output":  # of good weights?
                own = self.model.get_submodule(name).parameters(recurse=False)
                return name, "forward" if all_finite(own) else "weights"
            else:  # what made it is between this output and the gradient before it
                readers = self.readers.get(name, []) or [last or f"(after {name})"]
                told = [reader for reader in readers if reader in suspects][-1:]
                told = told or [r for r in readers if not self._trains(r)] or readers
                return " or ".join(dict.fromkeys(told)), "backward"
        found, dist = [*suspects[-1:]], torch.distributed
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            found.append("another rank")  # whose gradients were added to ours
        return " or ".join(found) or "(unknown)", "backward"

    def _trains(self, name: str) -> bool:
        own = dict(self.model.named_modules()).get(name, nn.Identity())
        return any(p.requires_grad for p in own.parameters(recurse=False))

    def _flags(self) -> Iterator[tuple[str, str, bool]]:
        flags = finite([value for _, _, value in self.sums])
        for (kind, name, _), is_fine in zip(self.sums, flags, strict=True):
            yield kind, name, is_fine
