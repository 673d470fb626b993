"""Whence values come that are not finite, kept by the storage that they are in."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .report import BadModule, TensorRange
from .tensors import key_of


@dataclass(eq=False, slots=True)
class Origin:
    """Where values that are not finite came from."""

    order: int
    found: BadModule
    is_written: bool = False  # an infinity on purpose


@dataclass(eq=False, slots=True)
class Storage:
    """What is known of the values in a storage."""

    is_external: bool  # has values that no operation in the block has written
    origin: Origin | None = None
    is_read: bool = False  # by an operation since it was written
    is_first: bool = True  # not the second result of an operation, such as a logsumexp
    phase: str = ""
    order: int = -1
    ref: object = None  # calls back when the storage dies


class Storages(dict[int, Storage]):
    """Those that are alive, by `key_of` a tensor."""

    def see(self, tensor: Tensor, *, is_external: bool) -> Storage:
        """Return a tensor's storage, a new one if it was not seen before."""
        key = key_of(tensor)
        if key not in self:
            ref = weakref.ref(tensor.untyped_storage(), partial(self._freed, key))
            self[key] = Storage(is_external, ref=ref)
        return self[key]

    def _freed(self, key: int, _: object) -> None:
        self.pop(key, None)


def inherited(
    bad: list[Origin], inputs: Iterable[TensorRange], output: TensorRange
) -> Origin | None:
    """Return the origin that a result has from its inputs; None if it is new."""
    faults = [origin for origin in bad if not origin.is_written]
    if not faults and output.nan and not any(r.nan for r in inputs):
        return None
    return min(faults or bad, key=lambda o: o.order, default=None)
