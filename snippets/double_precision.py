"""Compute in float64 throughout, and find what stayed in float32.

Copy this file into your project; it needs only ``torch``, and ``lightning`` for one
class, `DoublePrecision`, which is left out where Lightning is not installed.

`double_precision` makes new tensors float64, `to_double` widens a model with all that
belongs to it, `find_single` lists what is stored in fewer bits and `trace_single` what
is computed in fewer; `DoublePrecision` is a Fabric plugin whose outputs stay float64.

    Guide:   guide/double_precision
    Tests:   tests/test_double_precision.py
    Sources: IEEE 754-2019, sections 3.3 and 5.4.2 (binary64, conversions); Lightning AI
             2026, Lightning 2.6.6, ``DoublePrecision`` of the Trainer and of Fabric,
             which this completes.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: ANN401 - a batch or a state may be anything

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["MixedOp", "double_precision", "find_single", "to_double", "trace_single"]

M = TypeVar("M", bound=nn.Module)

_WIDE = {
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex128,
}
# Step counts of optimizers: integers, exact in float32 up to 2**24, and float32 by
# contract in fused optimizers. torch's own load_state_dict leaves them alone as well.
_LEFT_ALONE = frozenset({"step", "params"})
_FUSED = "_fused_"
# Where nn.Module keeps what named_parameters() and the like already list.
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_INSIDE = (str(Path(torch.__file__).parent / "_")[:-1], __file__)


class MixedOp(NamedTuple):
    """An operation in which float64 met fewer bits; see :func:`trace_single`."""

    op: str
    """Its name in ATen, such as ``mul.Tensor``."""
    dtypes: str
    """What went in and what came out: ``float64, float32 -> float64``."""
    where: str
    """File and line, the innermost outside of torch; for backward, of its call."""


@contextmanager
def double_precision() -> Iterator[None]:
    """Create new tensors as float64 and complex128; also works as a decorator.

    It sets torch's default dtype, which is one for the whole process, all its threads
    included, and restores it on leaving, by an exception too. Tensors that exist are
    not converted. A worker process that is spawned starts with float32 again.

    Example:
        >>> with double_precision():
        ...     torch.tensor(0.1).item(), torch.nn.Linear(1, 1).weight.dtype
        (0.1, torch.float64)
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def to_double(module: M, *optimizers: Optimizer) -> M:
    """Widen a model in place: to float64, and what is complex to complex128.

    Parameters, buffers and gradients, and with ``optimizers`` their whole state and the
    tensors in their groups, are widened, which is exact. Integers and booleans stay as
    they are, and so do step counts. Parameters keep their identity, so optimizers and
    tied weights need nothing. Tensors that are plain attributes are out of reach;
    :func:`find_single` lists them.

    Args:
        module: Any module, with parameters of 16 bits or more.
        optimizers: Those that train it, if they have stepped already. Each may hold
            parameters of ``module`` only.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: An argument is of another type, or a tensor is in 8 bits or fewer,
            where the values alone do not say what they mean.
        ValueError: An optimizer holds parameters that are not in ``module``, or the
            device has no float64. Nothing has been changed.

    Example:
        >>> model = torch.nn.Linear(1, 1, dtype=torch.complex64)
        >>> to_double(model).weight.dtype  # model.double() leaves complex64
        torch.complex128
    """  # noqa: DOC502 - raised by _check
    _check(module, optimizers)
    for name, t in _named(module, optimizers).items():
        _check_tensor(name, t)
    module._apply(_widen)  # type: ignore[no-untyped-call] # as module.double() does
    for optimizer in optimizers:
        for entry in [*optimizer.state.values(), *optimizer.param_groups]:
            for key in entry.keys() - _LEFT_ALONE:
                entry[key] = tree_map_only(Tensor, _widen, entry[key])
    return module


def find_single(module: nn.Module, *optimizers: Optimizer) -> dict[str, str]:
    """List what a model and its optimizers store in fewer bits than float64.

    Looks at parameters, gradients, buffers, tensors that are plain attributes of a
    module (also in lists, tuples and dicts), and the state and groups of optimizers.
    Two kinds are found: a dtype that is too narrow, and a float64 constant, which is
    anything but a parameter, a gradient or optimizer state, whose values are all
    float32 values with more than 16 significant bits among them: it was rounded before
    it was widened. Values that are short anyway, such as 0.5 or 1024, are not reported,
    and neither are integers, booleans and step counts.

    Args:
        module: Any module.
        optimizers: Those that train it.

    Returns:
        What is where, as ``{"buffer pi": "float64 with float32 values"}``; empty if
        all is float64.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An optimizer holds parameters that are not in ``module``.

    Example:
        >>> model = torch.nn.Module()
        >>> model.register_buffer("pi", torch.tensor(3.141592653589793))
        >>> find_single(model.double())
        {'buffer pi': 'float64 with float32 values'}
    """  # noqa: DOC502 - raised by _check
    _check(module, optimizers)
    found = {}
    for name, t in _named(module, optimizers).items():
        if _bits(t) not in (None, 64):
            found[name] = str(t.dtype).removeprefix("torch.")
        elif name.startswith(("buffer", "attribute", "group")) and _was_rounded(t):
            found[name] = f"{str(t.dtype).removeprefix('torch.')} with float32 values"
    return found


@contextmanager
def trace_single() -> Iterator[list[MixedOp]]:
    """Record the operations in which float64 meets fewer bits, as they run.

    An operation is recorded, once for each line, if among its operands and results are
    both float64 (or complex128) and a narrower floating-point dtype. That covers what
    no dtype of a result shows: ``x * torch.tensor(0.1)`` is float64, and its factor is
    off by 1.5e-8. The backward pass is seen if it runs inside, integers are ignored,
    and so are fused optimizer steps, whose step counts are float32.

    Every operation goes through Python meanwhile: trace one step, not a run. Code that
    is compiled is not seen.

    Yields:
        The list that is being filled.

    Example:
        >>> x = torch.ones(3, dtype=torch.float64)
        >>> with trace_single() as found:
        ...     total = (x * torch.tensor(0.1)).sum().float()
        >>> for mixed in found:
        ...     print(mixed.op, mixed.dtypes, sep=": ")
        mul.Tensor: float64, float32 -> float64
        _to_copy.default: float64 -> float32
    """
    mode = _Trace()
    with mode:
        yield mode.found


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[MixedOp] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        before = [t for t in _leaves([args, kwargs]) if _bits(t)]
        sizes = {_bits(t) for t in before}
        result = func(*args, **(kwargs or {}))
        after = [t for t in _leaves(result) if _bits(t)]
        sizes |= {_bits(t) for t in after}
        name = str(func).removeprefix("aten.")
        if 64 in sizes and len(sizes) > 1 and not name.startswith(_FUSED):
            mixed = MixedOp(name, f"{_dtypes(before)} -> {_dtypes(after)}", _line())
            if mixed not in self.found:
                self.found.append(mixed)
        return result


def _named(module: nn.Module, optimizers: tuple[Optimizer, ...]) -> dict[str, Tensor]:
    """Return everything but step counts, by names that begin with what it is."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    found: dict[str, Tensor] = {}
    for p, name in names.items():
        found[f"parameter {name}"] = p
        if p.grad is not None:
            found[f"gradient {name}"] = p.grad
    found |= {f"buffer {name}": t for name, t in module.named_buffers()}
    for prefix, owner in module.named_modules():
        for key, value in vars(owner).items():
            loose = [] if key in _REGISTRIES else _leaves(value)
            for i, t in enumerate(loose):
                if t not in names:  # nn.LSTM keeps its parameters in a list, too
                    name = f"attribute {prefix}{'.' * bool(prefix)}{key}"
                    found[name + f"[{i}]" * (len(loose) > 1)] = t
    for number, optimizer in enumerate(optimizers):
        owner_name = type(optimizer).__name__ + f"[{number}]" * (len(optimizers) > 1)
        for p, entry in optimizer.state.items():
            for key, value in entry.items():
                for i, t in enumerate(_leaves(value) if key not in _LEFT_ALONE else []):
                    name = f"state {owner_name} {key} of {names.get(p)}"
                    found[name + f"[{i}]" * (not isinstance(value, Tensor))] = t
        for i, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, Tensor):
                    found[f"group {owner_name} {key} of group {i}"] = value
    return found


def _leaves(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _widen(t: Tensor) -> Tensor:
    return t.to(_WIDE.get(t.dtype, t.dtype))


def _bits(t: Tensor) -> int | None:
    """Return the bits of a real number in ``t``; None for integers and booleans."""
    is_number = t.is_floating_point() or t.is_complex()
    return torch.finfo(t.dtype).bits if is_number else None


def _was_rounded(t: Tensor) -> bool:
    if _bits(t) != 64 or t.is_meta:
        return False
    values = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    values = values[values.isfinite()]
    single = values.float()
    long = (single.view(torch.int32) & 0xFF).any()  # of 24 bits the last 8
    return bool(torch.equal(single.double(), values) and long)


def _dtypes(tensors: list[Tensor]) -> str:
    names = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors)
    return ", ".join(names)


def _line() -> str:
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _check(module: object, optimizers: tuple[object, ...]) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {_type(module)}")
    own = set(module.parameters())
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizers must be torch's, got {_type(optimizer)}")
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if foreign := [tuple(p.shape) for p in held if p not in own]:
            msg = f"{_type(optimizer)} holds parameters that are not in the module"
            raise ValueError(f"{msg}, of shapes {foreign}")


def _check_tensor(name: str, t: Tensor) -> None:
    if name.startswith("attribute") or _bits(t) is None:
        return  # not converted
    if t.dtype not in _WIDE:
        raise TypeError(f"{name} is {t.dtype}: dequantize it first, with its scale")
    if t.device.type == "mps":
        raise ValueError(f"{name} is on MPS, which has no float64: use the CPU")


def _type(value: object) -> str:
    return type(value).__name__


if find_spec("lightning"):
    from lightning.fabric.plugins import DoublePrecision as _FabricDoublePrecision
    from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]

    __all__ += ["DoublePrecision"]

    class DoublePrecision(_FabricDoublePrecision):
        """Fabric's ``"64-true"``, with outputs that stay float64, and complex128.

        Fabric's own casts what ``forward`` returns to torch's default dtype, so to
        float32, and leaves complex64 parameters and inputs as they are. The Trainer
        does not cast back and needs no plugin for that.

        Example:
            >>> from lightning.fabric import Fabric
            >>> fabric = Fabric(accelerator="cpu", plugins=DoublePrecision())
            >>> model = fabric.setup(torch.nn.Linear(1, 1))
            >>> model(torch.ones(1)).dtype
            torch.float64
        """

        def convert_module(self, module: nn.Module) -> nn.Module:
            """Widen it in place, as `to_double` does."""
            return to_double(module)

        def convert_input(self, data: Any) -> Any:
            """Widen floating-point and complex tensors, in any collection."""
            return apply_to_collection(data, Tensor, _widen)

        def convert_output(self, data: Any) -> Any:
            """Return ``data`` as it is."""
            return data
