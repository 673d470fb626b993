"""Numbers of each tensor, gathered as a model runs, for `rounding` when it is done.

One pass over a tensor for its largest and smallest number, and a copy of at most 4,096
of its numbers, is all that the step waits for.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .report import Row

BLOCK, BLOCKS = 32, 128  # numbers in a line, and lines, in a sample
_CHANNELS = ("Conv", "BatchNorm", "GroupNorm", "InstanceNorm")
_PLAIN = {type(None), bool, int, float, str, torch.dtype, torch.device}
SMALL = 2**16  # numbers of which a copy is cheaper than a second pass
CALLS = 4  # of a module that are sampled; of all others the amax is taken


class Value:
    """What is known of the numbers in a tensor, which its views share."""

    __slots__ = ("cast", "index", "limits", "low", "source")

    def __init__(self, *, low: bool = False) -> None:
        self.low = low  # autocast would have made it in 16 bits
        self.cast = False  # or would cast it to 16 bits where it is used
        self.index = False  # turned into whole numbers, so more than a quantity
        self.source: Value | None = None  # what it is a copy of
        self.limits: dict[Any, int] = {}  # which of Samples.limits, for each view


class Samples:
    """The samples of one step."""

    def __init__(self) -> None:
        self.limits: list[Tensor] = []  # min and max of each tensor, in turn
        self.rows: dict[tuple[str, str, str], tuple[Row, Value, list[int]]] = {}
        self.picked: dict[int, Tensor] = {}  # a sample, by its limits
        self.peaks: dict[int, Tensor] = {}  # and the largest of each number's feature
        self.weights: list[tuple[Row, Tensor, Tensor]] = []  # with their updates
        self.followed: set[int] = set()  # which of them are gradients of outputs
        self.places: dict[tuple[int, torch.device], Tensor] = {}
        self.features: dict[Any, tuple[list[int], Tensor]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def limit(self, x: Tensor) -> int:
        """Take the smallest and the largest number; return where they are kept."""
        self.limits += torch.aminmax(_real(x))
        return len(self.limits) // 2 - 1

    def pick(self, x: Tensor) -> Tensor:
        """Copy pieces of a tensor: the same places for all tensors of one size."""
        x = _real(x)
        size = x.numel()
        if size <= BLOCK * BLOCKS:
            padded = x.new_zeros(-(-size // BLOCK), BLOCK)
            padded.view(-1)[:size] = x.reshape(-1)
            return padded
        if (size, x.device) not in self.places:
            places = torch.randint(size // BLOCK, (BLOCKS,), generator=self.generator)
            self.places[size, x.device] = places.to(x.device)
        rows = x.reshape(-1)[: size // BLOCK * BLOCK].view(-1, BLOCK)
        return rows.index_select(0, self.places[size, x.device])

    def peak(self, x: Tensor, row: Row, sample: Tensor) -> Tensor:
        """Return, for each number of a sample, the largest of its feature.

        A feature is a channel of a convolution, a neuron of a weight, else a place of
        the last dimension; of a weight's gradient each number is one.
        """
        if row.kind == "grad_weight" or x.dim() < 2 or x.is_complex():
            return sample.abs()
        is_channel = x.dim() == 4 or row.layer.startswith(_CHANNELS)
        dim = 0 if row.kind == "weight" else 1 if is_channel else x.dim() - 1
        key = x.shape, dim, x.device
        if key not in self.features:
            self.features[key] = self.feature(x, dim, len(sample))
        others, places = self.features[key]
        x = _real(x)
        if x.numel() <= SMALL:
            return x.abs().amax(others).take(places)
        return torch.maximum(x.amax(others), -x.amin(others)).take(places)

    def feature(self, x: Tensor, dim: int, lines: int) -> tuple[list[int], Tensor]:
        """Return the other dimensions, and which feature each number of a sample is."""
        line = torch.arange(lines, device=x.device)
        line = self.places.get((x.numel(), x.device), line)
        number = line[:, None] * BLOCK + torch.arange(BLOCK, device=x.device)
        others = [d for d in range(x.dim()) if d != dim]
        return others, number // math.prod(x.shape[dim + 1 :]) % x.shape[dim]

    def take(self, row: Row, x: Tensor, value: Value, limits: int) -> None:
        """Count a tensor for the row of its module, kind and name."""
        key = row.module, row.kind, row.tensor
        row, _, taken = self.rows.setdefault(key, (row, value, []))
        row.calls += 1
        taken.append(limits)
        if row.calls <= CALLS and limits not in self.picked:
            self.picked[limits] = self.pick(x)
            self.peaks[limits] = self.peak(x, row, self.picked[limits])
            if row.kind == "grad_output":
                self.followed.add(limits)
        if limits in self.picked:
            size = x.numel() * (2 if x.is_complex() else 1)
            row.sampled += min(size, self.picked[limits].numel())

    def sign(self, limits: int, size: float) -> int:
        """Keep the limits of a tensor's signs times a number; return where."""
        pair = [x.sign() * size for x in self.limits[2 * limits : 2 * limits + 2]]
        self.limits += pair if size > 0 else reversed(pair)
        return len(self.limits) // 2 - 1

    def update(self, row: Row, update: Tensor, weight: Tensor, limits: int) -> None:
        """Count a sampled update of a sampled weight."""
        self.picked[limits], self.peaks[limits] = update, update.abs()
        row.calls, row.sampled = 1, min(math.prod(row.shape), update.numel())
        self.rows[row.module, row.kind, row.tensor] = row, Value(), [limits]
        self.weights.append((row, weight, update))


def gather(tensors: list[Tensor]) -> Tensor:
    """Join tensors of any device on the CPU, in float64."""
    if len({t.device for t in tensors}) > 1:
        tensors = [t.cpu() for t in tensors]
    join = torch.cat if tensors[0].dim() else torch.stack
    return join(tensors).cpu().double()


def tensors_in(
    things: object, place: str = "", *, every: bool = False
) -> list[tuple[str, Tensor]]:
    """Return each tensor with fractions (or ``every``) in a nest, and its place.

    Of a sparse or nested (jagged) one it is the tensor of its values.
    """
    if isinstance(things, Tensor):
        if things.layout is torch.sparse_coo:
            things = things._values()
        elif things.is_nested or things.layout is not torch.strided:
            things = things.values()
        has_fraction = things.is_floating_point() or things.is_complex()
        is_taken = every or (has_fraction and things.numel() > 0)
        has_numbers = not (things.is_meta or things._is_zerotensor())
        return [(place, things)] if is_taken and has_numbers else []
    inner: Iterable[tuple[object, object]] = ()
    if type(things) in _PLAIN:
        return []
    if isinstance(things, (list, tuple)):
        inner = [("", things[0])] if len(things) == 1 else enumerate(things)
    elif isinstance(things, Mapping):
        inner = things.items()
    elif is_dataclass(things) and not isinstance(things, type):
        inner = [(f.name, getattr(things, f.name)) for f in fields(things)]
    found = []
    for key, thing in inner:
        if type(thing) not in _PLAIN:
            found += tensors_in(thing, f"{place}.{key}".strip("."), every=every)
    return found


def _real(x: Tensor) -> Tensor:
    x = x.detach() if x.layout is torch.strided else x.detach().to_dense()
    if x.dtype.itemsize == 1:  # FP8, for which PyTorch has little but casts
        return x.float()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
