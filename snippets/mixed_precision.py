"""Mixed precision: one training step in FP16 or BF16 that knows when it was skipped.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

    Guide:   guide/mixed_precision
    Tests:   tests/test_mixed_precision.py
    Sources: Micikevicius et al. 2018, arXiv:1710.03740, sections 3.1 (float32 main
             weights) and 3.2 (loss scaling); PyTorch, "Automatic Mixed Precision
             examples", section "Working with Unscaled Gradients".
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["MixedPrecisionStep", "StepResult"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PROGRESS = (
    "optimizer_steps",
    "skipped_steps",
    "skips_in_a_row",
    "micro_batches",
    "window_weight",
)


class StepResult(NamedTuple):
    """What one call did. Both flags are False while a window is still open."""

    stepped: bool  # the optimizer ran, and the scheduler after it
    skipped: bool  # the gradient was not finite: parameters and states are untouched
    grad_norm: float | None  # true norm before clipping; None while the window is open


class MixedPrecisionStep:
    """Backpropagate, accumulate, unscale, clip, step, and report what happened.

    The parameters, their gradients and the optimizer's state stay in float32; only
    what runs inside :meth:`autocast` computes in ``dtype``. In float16 the loss is
    scaled. A window of ``accumulate_grad_batches`` calls ends in one optimizer step on
    the weighted mean of the window's gradients. If the norm of that mean is NaN or
    infinite, the step is skipped, whatever the ``dtype``: parameters, optimizer state
    and learning rate stay as they are.

    Args:
        optimizer: Holds float32 parameters in any number of groups, on one type of
            device, where autocast will act: build this object after moving the model.
            The gradients belong to this object, which clears them after each window.
        dtype: ``torch.float16``, ``torch.bfloat16``, or ``torch.float32`` for the same
            step without autocast, as a reference.
        accumulate_grad_batches: Number of calls in a window, at least 1.
        max_norm: Clip the norm of the unscaled gradient to this; None to only report.
        scheduler: Stepped once after each optimizer step, never after a skipped one.
        scaler: Replaces the ``torch.amp.GradScaler`` made for float16; not shared.
        max_consecutive_skips: Give up at this many skips in a row. The default takes a
            scale of 2**16 down to 2**-16: a gradient that is still not finite is no
            matter of scale.

    Attributes:
        optimizer_steps: Number of steps that the optimizer took.
        skipped_steps: Number of windows that ended without a step.
        skips_in_a_row: Number of those since the last step.
        micro_batches: Number of calls in the open window, 0 between windows.
        window_weight: Sum of their weights.

    Raises:
        TypeError: A trainable parameter is not float32, or ``optimizer`` is none or
            needs a closure, or the scheduler needs a metric.
        ValueError: Any other argument is out of range or contradicts another.

    Example:
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> step = MixedPrecisionStep(sgd, dtype=torch.float16)
        >>> for _ in range(2):  # scaled by 2**16, the first gradient is infinite
        ...     with step.autocast():
        ...         loss = layer(torch.ones(1, 1)).mean()
        ...     step(loss)
        StepResult(stepped=False, skipped=True, grad_norm=inf)
        StepResult(stepped=True, skipped=False, grad_norm=1.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        dtype: torch.dtype,
        accumulate_grad_batches: int = 1,
        max_norm: float | None = None,
        scheduler: LRScheduler | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_consecutive_skips: int = 32,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {dtype!r}")
        for name, count in (
            ("accumulate_grad_batches", accumulate_grad_batches),
            ("max_consecutive_skips", max_consecutive_skips),
        ):
            if not _is_number(count, 1) or count % 1:
                raise ValueError(f"{name} must be a whole number from 1, got {count!r}")
        if max_norm is not None and not (_is_number(max_norm, 0) and max_norm):
            raise ValueError(f"max_norm must be positive or None, got {max_norm!r}")
        if not hasattr(optimizer, "param_groups"):
            got = type(optimizer).__name__
            raise TypeError(f"optimizer must be of torch.optim, got {got}")
        if isinstance(optimizer, LBFGS):
            raise TypeError("LBFGS computes the loss several times a step: not for it")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError("ReduceLROnPlateau needs a metric: step it yourself")
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError("scheduler belongs to another optimizer")
        self.optimizer = optimizer
        self.dtype = dtype
        self.device_type = _check_parameters(_parameters(optimizer))
        self.accumulate_grad_batches = accumulate_grad_batches
        self.max_norm = max_norm
        self.scheduler = scheduler
        self.scaler = _check_scaler(scaler, dtype, self.device_type)
        self.max_consecutive_skips = max_consecutive_skips
        self.optimizer_steps = self.skipped_steps = self.skips_in_a_row = 0
        self.micro_batches, self.window_weight = 0, 0.0

    @property
    def scale(self) -> float:
        """The factor that the next loss is multiplied by; 1.0 unless in float16."""
        return self.scaler.get_scale() if self.scaler else 1.0

    def autocast(self) -> torch.autocast:
        """The context for the forward pass and the loss, and for nothing else."""
        if self.dtype == torch.float32:
            return torch.autocast(self.device_type, enabled=False)
        return torch.autocast(self.device_type, dtype=self.dtype)

    def __call__(self, loss: Tensor, *, weight: float = 1.0) -> StepResult:
        """Backpropagate one micro-batch, and step if it completes the window.

        Args:
            loss: The mean loss of the micro-batch, one element. NaN and infinity are
                allowed: the window is then skipped.
            weight: The micro-batch's share in the mean over the window. Where sizes
                differ, ``len(x) / batch_size`` makes it the mean over all samples.
                Keep it near 1: in float16 it multiplies the scaled loss.

        Returns:
            What happened; ``grad_norm`` once the window is complete.

        Raises:
            RuntimeError: Called inside autocast, or ``loss`` is on another type of
                device than the parameters were, or no parameter has a gradient, or one
                has a sparse gradient.
            ValueError: ``loss`` is not a tensor of one element, or ``weight`` is not
                positive and finite.
            FloatingPointError: ``max_consecutive_skips`` windows in a row had a
                gradient that was not finite.
        """  # noqa: DOC502 - the last is raised by _close_window
        if torch.is_autocast_enabled(self.device_type):
            raise RuntimeError("called inside autocast: leave it once you have a loss")
        shape = getattr(loss, "shape", None)
        if shape is None or math.prod(shape) != 1:
            got = type(loss).__name__ if shape is None else f"shape {tuple(shape)}"
            raise ValueError(f"loss must be a tensor of one element, got {got}")
        if loss.device.type != self.device_type:
            raise RuntimeError(
                f"loss is on {loss.device.type!r}, but the parameters were on "
                f"{self.device_type!r}: move the model before building the step"
            )
        if not (_is_number(weight, 0) and 0 < weight < math.inf):
            raise ValueError(f"weight must be positive and finite, got {weight!r}")
        if weight != 1:
            loss = loss * weight
        if self.scaler:
            loss = self.scaler.scale(loss)
        torch.autograd.backward(loss)
        self.micro_batches += 1
        self.window_weight += weight
        if self.micro_batches < self.accumulate_grad_batches:
            return StepResult(stepped=False, skipped=False, grad_norm=None)
        return self._close_window()

    def flush(self) -> StepResult | None:
        """Step on an incomplete window, at the end of an epoch; None if none is open.

        The gradient is the mean over the micro-batches that came, not over
        ``accumulate_grad_batches``. Raises what a call raises.
        """
        return self._close_window() if self.micro_batches else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical resume needs beside three other states.

        Those are the model's, the optimizer's and the scheduler's. Within a window the
        gradients so far are included. Safe for ``torch.load(weights_only=True)``.
        """
        grads = [p.grad for p in _parameters(self.optimizer)]
        return {
            "dtype": str(self.dtype),
            "accumulate_grad_batches": self.accumulate_grad_batches,
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "grads": [None if g is None else g.detach().clone() for g in grads]
            if self.micro_batches
            else [],
        } | {name: getattr(self, name) for name in _PROGRESS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; everything is checked before it is changed.

        Args:
            state: Saved with the same ``dtype`` and, within a window, with the same
                ``accumulate_grad_batches`` and parameters.

        Raises:
            ValueError: A key is missing, a count is not a number from 0, or one of
                these conditions is not met.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"state lacks {sorted(missing)}, it has {sorted(state)}")
        if state["dtype"] != str(self.dtype):
            raise ValueError(
                f"state is of a {state['dtype']} run, this step is {self.dtype}: build "
                "it with that dtype, or load only model, optimizer and scheduler"
            )
        for name in _PROGRESS:
            if not _is_number(state[name], 0):
                raise ValueError(f"{name} must be a number from 0, got {state[name]!r}")
        own = self.scaler.state_dict() if self.scaler else {}
        if missing := own.keys() - state["scaler"].keys():
            raise ValueError(f"the scaler's state lacks {sorted(missing)}")
        parameters, grads = _parameters(self.optimizer), state["grads"]
        window = state["accumulate_grad_batches"]
        if grads and window != self.accumulate_grad_batches:
            raise ValueError(
                f"state is within a window of {window} micro-batches, this step has "
                f"accumulate_grad_batches={self.accumulate_grad_batches}"
            )
        pairs = list(zip(parameters, grads, strict=False))
        if len(grads) not in {0, len(parameters)} or any(
            g is not None and g.shape != p.shape for p, g in pairs
        ):
            raise ValueError("state holds gradients of other parameters")
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        for name in _PROGRESS:
            setattr(self, name, state[name])
        self.optimizer.zero_grad()
        for parameter, grad in pairs:
            if grad is not None:
                parameter.grad = grad.to(parameter.device, copy=True)

    def _close_window(self) -> StepResult:
        parameters = _parameters(self.optimizer)
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            raise RuntimeError("no parameter of the optimizer received a gradient")
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError(
                "a gradient is sparse, and has no norm in torch: build its embedding "
                "with sparse=False"
            )
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.window_weight != 1:
            torch._foreach_div_(grads, self.window_weight)
        total_norm = torch.nn.utils.get_total_norm(grads)
        # Waits for the device. The norm itself decides: a scale that fell, or did not,
        # says nothing in bfloat16, nor at a floor.
        grad_norm = total_norm.item()
        stepped = math.isfinite(grad_norm)
        if stepped:
            if self.max_norm is not None:
                clip_ = torch.nn.utils.clip_grads_with_norm_
                clip_(parameters, self.max_norm, total_norm)
            if self.scaler:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step()
            if self.scheduler:
                self.scheduler.step()
            # Within any outer autocast, a disabled one too, the cast weights live on.
            torch.clear_autocast_cache()
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad()
        self.micro_batches, self.window_weight = 0, 0.0
        self.optimizer_steps += stepped
        self.skipped_steps += not stepped
        self.skips_in_a_row = 0 if stepped else self.skips_in_a_row + 1
        if self.skips_in_a_row >= self.max_consecutive_skips:
            raise FloatingPointError(
                f"{self.skips_in_a_row} steps in a row had a gradient that was not "
                f"finite (scale {self.scale:g}): look for NaN in the data, or for an "
                f"overflow in the forward pass in {self.dtype}"
            )
        return StepResult(stepped=stepped, skipped=not stepped, grad_norm=grad_norm)


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, (int, float)) and value >= least  # also refuses NaN


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_parameters(parameters: list[Tensor]) -> str:
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise TypeError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; "
                "mixed precision keeps trainable parameters in torch.float32: leave "
                "out .half() and .bfloat16(), autocast casts for each operation"
            )
    types = sorted({parameter.device.type for parameter in parameters})
    if len(types) != 1:
        raise ValueError(f"parameters must be on one type of device, found {types}")
    return types[0]


def _check_scaler(
    scaler: torch.amp.GradScaler | None, dtype: torch.dtype, device_type: str
) -> torch.amp.GradScaler | None:
    if scaler is None:
        return torch.amp.GradScaler(device_type) if dtype == torch.float16 else None
    if dtype != torch.float16:
        raise ValueError(f"{dtype} has the range of float32 and takes no scaler")
    if not scaler.is_enabled():
        raise ValueError(
            "scaler is disabled, as GradScaler('cuda') is where CUDA is missing: "
            f"use GradScaler({device_type!r})"
        )
    return scaler
