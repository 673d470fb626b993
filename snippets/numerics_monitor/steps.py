"""What a step is: one that an optimizer takes, or that a loss scaler skips."""

import weakref
from collections.abc import Callable, Container
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as hooks

from .rules import NumericsError, NumericsWarning


class Steps:
    """Call ``begin`` and ``end`` around each step of any optimizer of some parameters.

    Args:
        parameters: Their ids. Optimizers without any of them are left alone.
        begin: Called with the optimizer, its number and whether the step is skipped,
            when its gradients are ready and its weights are as they were.
        end: Called when the step is done, or was skipped.
    """

    def __init__(
        self,
        parameters: Container[int],
        begin: Callable[[Optimizer, int, bool], None],
        end: Callable[[], None],
    ) -> None:
        self.parameters, self.begin, self.end = parameters, begin, end
        self.stepping: Optimizer | None = None
        self.count = 0
        # Optimizers, numbered as they come.
        self.numbers: weakref.WeakKeyDictionary[Optimizer, int] = (
            weakref.WeakKeyDictionary()
        )

    def watch(self, scaler: Any) -> list[Any]:  # noqa: ANN401 - None, or a scaler
        """Hook into all optimizers, and a scaler; return the handles."""
        handles: list[Any] = [
            hooks.register_optimizer_step_pre_hook(self._before),
            hooks.register_optimizer_step_post_hook(self._after),
        ]
        if scaler is not None:
            handles.append(Patch(scaler, "step", self._scaler_step))
        return handles

    def _is_mine(self, optimizer: Optimizer) -> bool:
        if optimizer not in self.numbers:
            params = [p for g in optimizer.param_groups for p in g["params"]]
            if not any(id(p) in self.parameters for p in params):
                return False
            taken = {*self.numbers.values()}  # by those that are alive
            free = (n for n in range(len(taken) + 1) if n not in taken)
            self.numbers[optimizer] = next(free)
        return self.stepping is None  # not within the step of another

    def _begin(self, optimizer: Optimizer, *, skipped: bool) -> None:
        self.stepping = optimizer
        try:
            self.begin(optimizer, self.numbers[optimizer], skipped)
        except (NumericsError, NumericsWarning):  # not taken, and yet recorded
            self._end()
            raise

    def _end(self) -> None:
        self.stepping = None
        self.count += 1
        self.end()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        if not self._is_mine(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._begin(optimizer, skipped=_found_inf(optimizer))
            return None

        def then_begin() -> Any:  # noqa: ANN401
            result = closure()
            if self.stepping is None:  # else a later call within the same step
                self._begin(optimizer, skipped=False)
            return result

        if "closure" in kwargs:
            return args, kwargs | {"closure": then_begin}
        return (args[0], then_begin, *args[2:]), kwargs

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer is self.stepping:
            self._end()

    def _scaler_step(self, original: Any, optimizer: Any, *args: Any, **kw: Any) -> Any:  # noqa: ANN401
        """Stand in for the scaler's: a step that it skips reaches no optimizer."""
        inner = getattr(optimizer, "optimizer", optimizer)  # of a wrapper
        count, result = self.count, original(optimizer, *args, **kw)
        if self.count == count and self._is_mine(inner):
            self._begin(inner, skipped=True)
            self._end()
        return result


class Patch:
    """A method of one object, replaced until `remove`."""

    def __init__(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:  # noqa: ANN401
        self.owner, self.name = owner, name
        self.had = vars(owner).get(name)
        setattr(owner, name, partial(wrapper, getattr(owner, name)))

    def remove(self) -> None:
        """Put back what was there."""
        if self.had is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.had)


def _found_inf(optimizer: Optimizer) -> bool:  # left by the scaler for a fused step
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())
