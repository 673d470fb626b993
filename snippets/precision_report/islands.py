"""What a step in FP32 does not show: casts to FP32, and blocks without autocast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = {Tensor.float, Tensor.double, Tensor.to, Tensor.type}
_WIDE = {torch.float32, torch.float64}


class Casts(TorchFunctionMode):
    """Tells of each cast to FP32 that returns the tensor itself.

    Args:
        widen: Called with the tensor; returns what to use in its place.
    """

    def __init__(self, widen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.widen = widen

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if func not in _CASTS or result is not args[0]:
            return result
        asked = [*args[1:], *(kwargs or {}).values()]
        is_wide = func in {Tensor.float, Tensor.double}
        is_wide |= any(a in _WIDE for a in asked if isinstance(a, torch.dtype))
        return self.widen(result) if is_wide else result


class Islands:
    """Follows blocks of autocast; meanwhile all of them compute in FP32."""

    def __init__(self) -> None:
        self.open: list[tuple[Any, bool, bool]] = []  # block, island, was it enabled

    @property
    def inside(self) -> bool:
        """Whether the innermost block that is open has ``enabled=False``."""
        return bool(self.open) and self.open[-1][1]

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the blocks that begin in here."""
        kind: Any = torch.amp.autocast_mode.autocast
        names = ("__init__", "__enter__", "__exit__")
        init, enter, leave = own = [getattr(kind, name) for name in names]

        def make(block: Any, *args: Any, **kw: Any) -> None:  # noqa: ANN401
            init(block, *args, **kw)
            # A block for a device that is not there says that it is disabled.
            block._asked = kw.get("enabled", args[2] if len(args) > 2 else True)

        def begin(block: Any) -> Any:  # noqa: ANN401
            was = block._enabled
            asked = getattr(block, "_asked", was or block.device != "cpu")
            self.open.append((block, not asked, was))
            block._enabled = False
            return enter(block)

        def end(block: Any, *error: Any) -> Any:  # noqa: ANN401
            left = leave(block, *error)
            at = [i for i, entry in enumerate(self.open) if entry[0] is block]
            if at:  # it began in here
                block._enabled = self.open.pop(at[-1])[2]
            return left

        for name, wrapper in zip(names, (make, begin, end), strict=True):
            setattr(kind, name, wrapper)
        try:
            yield
        finally:
            for name, function in zip(names, own, strict=True):
                setattr(kind, name, function)
