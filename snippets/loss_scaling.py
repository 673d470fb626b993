"""Loss scaling: keep FP16 gradients above zero with a scale that adjusts itself.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

    Guide:   guide/loss_scaling
    Tests:   tests/test_loss_scaling.py
    Sources: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2 (loss scaling);
             PyTorch 2.13, torch/amp/grad_scaler.py (names, defaults and policy);
             Megatron-LM d98e8a64, megatron/core/optimizer/grad_scaler.py (hysteresis
             and floor) and optimizer.py (ChainedOptimizer: all step or none).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import ctypes
import difflib
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["DynamicLossScaler"]

Outputs = TypeVar("Outputs", Tensor, list[Any], tuple[Any, ...])

# Without float16: divided by the scale in it, a gradient would underflow again.
_GRADIENT_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_FLOAT32_MAX = torch.finfo(torch.float32).max
# The state of torch.amp.GradScaler, and what hysteresis and a floor add to it.
_TORCH_KEYS = (
    "scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "_growth_tracker",
)
_MORE_KEYS = ("hysteresis", "min_scale", "_hysteresis_tracker")


class DynamicLossScaler:
    """Scale the loss, unscale the gradients, skip bad steps, move the scale.

    Has the methods of ``torch.amp.GradScaler`` and, with the default arguments, its
    trace bit for bit: scales, skipped steps, parameters, state dict. ``hysteresis`` and
    ``min_scale`` add Megatron's policy (see :meth:`megatron`). One iteration is
    :meth:`scale` and backward for every loss, :meth:`step` for every optimizer (each
    after an optional :meth:`unscale_`), then one :meth:`update`.

    NaN and ±infinity in a gradient skip the step and count against the scale; zeros and
    subnormals are ordinary values. Where ``torch.distributed`` is initialized, one bad
    rank makes every rank skip. The scale is a float32 value and never becomes infinite:
    growth that would overflow is left out.

    Args:
        init_scale: First scale, positive and finite in float32.
        growth_factor: Multiplies the scale after ``growth_interval`` good iterations in
            a row. Above 1; a power of two keeps scaling free of rounding.
        backoff_factor: Multiplies the scale after a bad iteration. Between 0 and 1.
        growth_interval: Good iterations in a row until the scale grows, at least 1.
        hysteresis: Bad iterations until the scale falls, at least 1. They need not
            follow each other: only growth starts the count again.
        min_scale: The scale never falls below this; None for no floor.
        update_before_step: Move the scale in the first :meth:`step` of an iteration,
            before any optimizer runs, and then let all optimizers step or none.
            :meth:`update` must still end the iteration.
        process_group: Ranks that decide together; None for all of them.
        enabled: False makes every method a plain pass-through, for float32 and
            bfloat16 runs of the same loop.

    Attributes:
        found_inf: Whether the last completed iteration met a NaN or an infinity. This
            is how to see a skipped step: with a hysteresis or at a floor the scale
            does not tell.

    Raises:
        ValueError: An argument is not a number in its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> scaler = DynamicLossScaler(init_scale=4.0)
        >>> for factor in (2.0**-30, math.inf):
        ...     scaler.scale((factor * weight).sum()).backward()
        ...     scaler.step(sgd)
        ...     scaler.update()
        ...     sgd.zero_grad()
        ...     print(weight.item() * 2**30, scaler.found_inf, scaler.get_scale())
        -1.0 False 4.0
        -1.0 True 2.0
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        min_scale: float | None = None,
        *,
        update_before_step: bool = False,
        process_group: dist.ProcessGroup | None = None,
        enabled: bool = True,
    ) -> None:
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self.min_scale = min_scale
        self.update_before_step = update_before_step
        self.process_group = process_group
        self.found_inf = False
        self._enabled = enabled
        _check_scale("init_scale", init_scale, min_scale)
        _check_policy(growth_factor, backoff_factor, growth_interval, hysteresis)
        self._scale = _float32(init_scale)
        self._growth_tracker = 0  # good iterations in a row
        self._hysteresis_tracker = hysteresis  # bad iterations left before a backoff
        self._start_iteration()

    @classmethod
    def megatron(
        cls,
        *,
        init_scale: float = 2.0**32,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        min_scale: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
        enabled: bool = True,
    ) -> "DynamicLossScaler":
        """Build the policy of Megatron-LM's ``DynamicGradScaler``, with its defaults.

        Megatron's options are ``initial_loss_scale``, ``loss_scale_window``,
        ``hysteresis`` and ``min_loss_scale``; its factors are 2 and 0.5, fixed.
        """
        return cls(
            init_scale=init_scale,
            growth_interval=growth_interval,
            hysteresis=hysteresis,
            min_scale=min_scale,
            update_before_step=True,
            process_group=process_group,
            enabled=enabled,
        )

    def scale(self, outputs: Outputs) -> Outputs:
        """Multiply a loss, or each of several, by the scale.

        Args:
            outputs: A floating-point or complex tensor of any shape, or a list or tuple
                of such, nested as you like. A float16 scalar becomes float32 here, so
                that it cannot overflow; other tensors keep their dtype and can.

        Returns:
            The same structure; ``outputs`` itself if disabled.

        Raises:
            TypeError: ``outputs`` holds something else, or an integer tensor.
        """  # noqa: DOC502 - raised by _check_outputs
        if not self._enabled:
            return outputs
        _check_outputs(outputs)
        self._scaled = True
        return _multiply(outputs, self._scale)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of ``optimizer`` by the scale, and check them.

        Call it to clip or to look at true gradients before :meth:`step`, which calls it
        otherwise. All gradients must be complete: what is accumulated later is still
        scaled. Sparse gradients are unscaled value by value, sharded ones (``DTensor``)
        shard by shard. Does not wait for the device.

        Raises:
            TypeError: ``optimizer`` has no ``param_groups``.
            ValueError: A gradient is not float32, float64 or bfloat16; or gradients lie
                on several devices, or were already unscaled for another optimizer.
            RuntimeError: Called out of order, or no parameter has a gradient.
            FloatingPointError: The scale has fallen so low that its reciprocal is
                infinite in float32.
        """  # noqa: DOC502 - the first two are raised by _gradients
        if not self._enabled:
            return
        grads = self._gradients(optimizer)
        inv_scale = _float32(1 / self._scale) if self._scale else math.inf
        if math.isinf(inv_scale):
            raise FloatingPointError(
                f"the scale fell to {self._scale:g}, whose reciprocal is infinite in "
                "float32: the gradients stayed NaN or infinite all the way down. Look "
                "for NaN in the data and for overflow in the forward pass, which no "
                "scale can cure"
            )
        groups = optimizer.param_groups
        tensors = grads or [p for group in groups for p in group["params"]]
        device = tensors[0].device if tensors else torch.device("cpu")
        # found_inf, has gradients; float32 whatever the default dtype is
        flags = torch.zeros(2, dtype=torch.float32, device=device)
        flags[1] = len(grads) > 0
        local = [_local_values(grad) for grad in grads]
        with torch.no_grad():
            for dtype in {values.dtype for values in local}:
                torch._amp_foreach_non_finite_check_and_unscale_(
                    [values for values in local if values.dtype == dtype],
                    flags[0],
                    torch.full((), inv_scale, dtype=torch.float32, device=device),
                )
        # A rank without gradients takes part too, or the others would wait for it.
        if self.process_group is not None or _is_distributed():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.process_group)
        if not grads and not flags[1].item():
            raise RuntimeError(
                "no parameter of the optimizer has a gradient: call backward first, on "
                "a loss that depends on these parameters"
            )
        self._checks[optimizer] = _Check(grads, flags)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run ``optimizer.step(*args, **kwargs)`` unless a gradient is NaN or infinite.

        A skipped step leaves parameters and optimizer state untouched and runs none of
        the optimizer's hooks, fused optimizers included. Waits for the device.

        Returns:
            What the optimizer returns; None if the step was skipped.

        Raises:
            RuntimeError: Called twice without :meth:`update`, or with a closure, whose
                gradients would be neither scaled nor checked. Besides, what
                :meth:`unscale_` raises.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if any(callable(argument) for argument in (*args, *kwargs.values())):
            raise RuntimeError(
                "step() takes no closure: its gradients would be neither scaled nor "
                "checked"
            )
        if optimizer not in self._checks:
            self.unscale_(optimizer)
        check = self._checks[optimizer]
        if check.stepped:
            raise RuntimeError(
                "step() was already called for this optimizer since the last update()"
            )
        if self.update_before_step:
            self._move_scale()
            skip = self.found_inf
        else:
            skip = check.found_inf
        result = None if skip else optimizer.step(*args, **kwargs)
        check.stepped = True
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """End the iteration: move the scale by what all its optimizers found.

        Args:
            new_scale: Take this scale instead, a number or a tensor with one element.
                The counts of good and bad iterations stay as they are.

        Raises:
            RuntimeError: No gradient was checked since the last update.
            ValueError: ``new_scale`` is not a positive number, finite in float32, or is
                below ``min_scale``.
        """  # noqa: DOC502 - the last is raised by _check_scale
        if not self._enabled:
            return
        if new_scale is not None:
            if isinstance(new_scale, Tensor) and new_scale.numel() == 1:
                new_scale = new_scale.item()
            _check_scale("new_scale", new_scale, self.min_scale)
            self.found_inf = any(check.found_inf for check in self._checks.values())
            self._scale = _float32(float(new_scale))
        elif self._checks:
            self._move_scale()
        else:
            raise RuntimeError("no gradient was checked since the last update()")
        self._start_iteration()

    def get_scale(self) -> float:
        """Return the factor for the next loss; 1.0 if disabled."""
        return self._scale if self._enabled else 1.0

    def is_enabled(self) -> bool:
        """Return whether losses are scaled and gradients checked."""
        return self._enabled

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, which PyTorch's scaler loads as well.

        With ``hysteresis=1`` and no floor these are the five entries of
        ``torch.amp.GradScaler``, otherwise three more, which that class ignores. Empty
        if disabled. Call it after :meth:`update`.
        """
        if not self._enabled:
            return {}
        more = self.hysteresis > 1 or self.min_scale is not None
        keys = _TORCH_KEYS + (_MORE_KEYS if more else ())
        return {key: getattr(self, _attribute(key)) for key in keys}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state of this class or of ``torch.amp.GradScaler``.

        Everything is checked before anything is changed. A state of five entries leaves
        ``hysteresis`` and ``min_scale`` as they are, and the hysteresis full. An
        iteration under way is forgotten: its gradients have another scale, so zero
        them. Does nothing if disabled.

        Raises:
            TypeError: ``state_dict`` is not a mapping.
            ValueError: A key is missing or unknown, or a value is not a number in its
                range.
        """  # noqa: DOC502 - raised by _check_keys and the checks after it
        if not self._enabled:
            return
        _check_keys(state_dict)
        state = {
            "hysteresis": self.hysteresis,
            "min_scale": self.min_scale,
            "_hysteresis_tracker": self.hysteresis,
        } | dict(state_dict)
        _check_scale("scale", state["scale"], state["min_scale"])
        _check_policy(
            state["growth_factor"],
            state["backoff_factor"],
            state["growth_interval"],
            state["hysteresis"],
        )
        highest = state["growth_interval"] - 1
        _check_whole("_growth_tracker", state["_growth_tracker"], 0, highest)
        highest = state["hysteresis"]
        _check_whole("_hysteresis_tracker", state["_hysteresis_tracker"], 0, highest)
        for key, value in state.items():
            setattr(self, _attribute(key), value)
        self._scale = _float32(self._scale)
        self._start_iteration()

    def _start_iteration(self) -> None:
        self._checks: dict[Optimizer, _Check] = {}
        self._scaled = False  # whether a loss passed through scale()
        self._moved = False  # whether the policy was applied

    def _move_scale(self) -> None:
        if self._moved:
            return
        self._moved = True
        self.found_inf = any(check.found_inf for check in self._checks.values())
        if self.found_inf:
            self._growth_tracker = 0
            self._hysteresis_tracker = max(self._hysteresis_tracker - 1, 0)
            if self._hysteresis_tracker == 0:
                lowered = self._scale * self.backoff_factor
                self._scale = _float32(max(lowered, self.min_scale or 0.0))
            return
        self._growth_tracker += 1
        if self._growth_tracker == self.growth_interval:
            self._growth_tracker = 0
            self._hysteresis_tracker = self.hysteresis
            raised = _float32(self._scale * self.growth_factor)
            self._scale = raised if math.isfinite(raised) else self._scale

    def _gradients(self, optimizer: Optimizer) -> list[Tensor]:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"expected an optimizer, got {type(optimizer).__name__}")
        if optimizer in self._checks:
            raise RuntimeError(
                "the gradients of this optimizer were already unscaled since the last "
                "update(): accumulate first, then call unscale_() once"
            )
        if self._moved:
            raise RuntimeError(
                "with update_before_step the scale has moved since backward: call "
                "unscale_() for every optimizer before the first step()"
            )
        if not self._scaled:
            raise RuntimeError(
                "no loss was scaled since the last update(): call "
                "scale(loss).backward(), and update() once, after the last optimizer"
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        taken = {id(grad) for check in self._checks.values() for grad in check.grads}
        for grad in grads:
            if grad.dtype not in _GRADIENT_DTYPES:
                raise ValueError(
                    f"a gradient of shape {tuple(grad.shape)} is {grad.dtype}, allowed "
                    f"are {', '.join(map(str, _GRADIENT_DTYPES))}: keep trainable "
                    "parameters in torch.float32, autocast casts for each operation"
                )
            if id(grad) in taken:
                raise ValueError(
                    f"a gradient of shape {tuple(grad.shape)} was already unscaled for "
                    "another optimizer: no parameter may belong to both"
                )
        devices = sorted({str(grad.device) for grad in grads})
        if len(devices) > 1:
            raise ValueError(
                f"gradients lie on {devices}: give each device its own optimizer, one "
                "scaler serves them all"
            )
        return grads


class _Check:
    """What unscaling the gradients of one optimizer found."""

    def __init__(self, grads: list[Tensor], flags: Tensor) -> None:
        self.grads = grads  # kept, so that no other tensor gets their id
        self.flags = flags
        self.stepped = False

    @cached_property
    def found_inf(self) -> bool:  # waits for the device
        return bool(self.flags[0].item())


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def _attribute(key: str) -> str:
    return "_scale" if key == "scale" else key


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _local_values(grad: Tensor) -> Tensor:
    if hasattr(grad, "to_local"):
        grad = grad.to_local()
    return grad._values() if grad.is_sparse else grad


def _multiply(outputs: Outputs, scale: float) -> Outputs:
    if isinstance(outputs, Tensor):
        # A tensor, not a number: only with it does a float16 scalar become float32.
        factor = torch.full((), scale, dtype=torch.float32, device=outputs.device)
        return outputs * factor
    make = getattr(type(outputs), "_make", type(outputs))  # of a named tuple
    scaled: Outputs = make([_multiply(output, scale) for output in outputs])
    return scaled


def _check_outputs(outputs: object) -> None:
    if isinstance(outputs, (list, tuple)):
        for output in outputs:
            _check_outputs(output)
    elif not isinstance(outputs, Tensor):
        raise TypeError(
            "scale() takes a tensor, or a list or tuple of tensors, got "
            f"{type(outputs).__name__}"
        )
    elif not (outputs.is_floating_point() or outputs.is_complex()):
        raise TypeError(
            f"scale() takes floating-point tensors, got {outputs.dtype} of shape "
            f"{tuple(outputs.shape)}"
        )


def _check_number(
    name: str, value: object, allowed: str, is_allowed: Callable[[Any], bool]
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not is_allowed(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _check_scale(name: str, scale: object, min_scale: object) -> None:
    def is_scale(value: float) -> bool:
        return 0 < value <= _FLOAT32_MAX and _float32(value) > 0

    _check_number(name, scale, "a positive number, finite in float32", is_scale)
    if min_scale is not None:
        allowed = "None or a positive number, finite in float32"
        _check_number("min_scale", min_scale, allowed, is_scale)
        allowed = f"at least min_scale={min_scale}"
        _check_number(name, scale, allowed, lambda value: value >= min_scale)


def _check_policy(
    growth_factor: object,
    backoff_factor: object,
    growth_interval: object,
    hysteresis: object,
) -> None:
    _check_number(
        "growth_factor",
        growth_factor,
        "a finite number above 1",
        lambda value: 1 < value < math.inf,
    )
    _check_number(
        "backoff_factor",
        backoff_factor,
        "a number between 0 and 1",
        lambda value: 0 < value < 1,
    )
    _check_whole("growth_interval", growth_interval, 1)
    _check_whole("hysteresis", hysteresis, 1)


def _check_whole(
    name: str, value: object, lowest: int, highest: float = math.inf
) -> None:
    _check_number(
        name,
        value,
        f"a whole number from {lowest}" + f" to {highest}" * (highest < math.inf),
        lambda value: lowest <= value <= highest and isinstance(value, int),
    )


def _check_keys(state: object) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"a state dict is a mapping, got {type(state).__name__}")
    if not state:
        raise ValueError("the state dict is empty: it was saved by a disabled scaler")
    known = _TORCH_KEYS + _MORE_KEYS
    for key in state.keys() - set(known):
        nearest = difflib.get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown key {key!r} in the state dict{hint}")
    needed = known if state.keys() & set(_MORE_KEYS) else _TORCH_KEYS
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"the state dict lacks {missing}, it has {sorted(state)}")
