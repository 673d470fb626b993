"""Compute a forward pass again in the backward pass, with the scales of the first time.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_modules.py
Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/distributed.py``
    (``checkpoint``, ``activation_recompute_forward``), Apache-2.0;
    Chen et al. 2016, arXiv:1604.06174 (the method).
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn

from .base import TransformerEngineBaseModule
from .parallel import refuse
from .state import FP8GlobalStateManager, autocast

__all__ = [
    "checkpoint",
    "in_fp8_activation_recompute_phase",
    "is_fp8_activation_recompute_enabled",
]


def is_fp8_activation_recompute_enabled() -> bool:
    """Say whether an enabled ``autocast`` is active inside :func:`checkpoint`."""
    state = FP8GlobalStateManager.quantization_state
    return state.recompute_enabled and state.fp8_enabled


def in_fp8_activation_recompute_phase() -> bool:
    """Say whether this is the second run, in the backward pass."""
    return FP8GlobalStateManager.quantization_state.recompute_phase


@contextlib.contextmanager
def _recomputing(phase: bool) -> Iterator[None]:
    """Tell modules to keep (or, in the second phase, to take back) scales and amax."""
    state = FP8GlobalStateManager.quantization_state
    before = (state.recompute_enabled, state.recompute_phase)
    state.recompute_enabled, state.recompute_phase = True, phase
    try:
        yield
    finally:
        state.recompute_enabled, state.recompute_phase = before


def _as_in_forward() -> Callable[[], contextlib.ExitStack]:
    """Return what enters again the regions that are active now."""
    state = FP8GlobalStateManager.quantization_state
    enabled = FP8GlobalStateManager.is_fp8_enabled()
    recipe = FP8GlobalStateManager.get_fp8_recipe() if enabled else None
    group = state.fp8_distributed_group
    cache = torch.is_autocast_cache_enabled()
    amp = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if kind == "cpu" or torch.cuda.is_available()
    ]

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for kind, on, dtype in amp:
            stack.enter_context(
                torch.autocast(kind, enabled=on, dtype=dtype, cache_enabled=cache)
            )
        stack.enter_context(_recomputing(phase=True))
        stack.enter_context(
            autocast(enabled=enabled, recipe=recipe, amax_reduction_group=group)
        )
        return stack

    return enter


class _Reentrant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Any],
        contexts: tuple[Any, Any],
        kwargs: dict[str, Any],
        *args: Any,
    ) -> Any:
        ctx.function, ctx.kwargs, ctx.context = function, kwargs, contexts[1]
        ctx.random = _random_state()
        ctx.enter = _as_in_forward()
        needed = any(ctx.needs_input_grad)
        again = _recomputing(phase=False) if needed else contextlib.nullcontext()
        with torch.no_grad(), contexts[0], again:
            results = function(*args, **kwargs)
        ctx.inputs = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not torch.autograd._is_checkpoint_valid():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "Checkpointing is not compatible with .grad(), please use .backward() "
                "if possible"
            )
        inputs = [
            arg if saved is None else saved.detach().requires_grad_(saved.requires_grad)
            for saved, arg in zip(ctx.saved_tensors, ctx.inputs, strict=True)
        ]
        now = _random_state()
        _set_random_state(ctx.random)
        try:
            with torch.enable_grad(), ctx.context, ctx.enter():
                results = ctx.function(*inputs, **ctx.kwargs)
        finally:
            _set_random_state(now)
        if isinstance(results, Tensor):
            results = (results,)
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=True)
            if isinstance(result, Tensor) and result.requires_grad
        ]
        if not pairs:
            raise RuntimeError(
                "none of output has requires_grad=True, this checkpoint() is not "
                "necessary"
            )
        torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])
        found = (x.grad if isinstance(x, Tensor) else None for x in inputs)
        return (None, None, None, *found)


def _random_state() -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _has_modules(function: Callable[..., Any]) -> bool:
    if not isinstance(function, nn.Module):
        return True  # it may call one
    return any(isinstance(m, TransformerEngineBaseModule) for m in function.modules())


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``function``, and again in the backward pass instead of keeping activations.

    The second run has the random state, the ``torch.autocast`` and the FP8 region of
    the first; modules under delayed scaling quantize with the scales that they had, and
    what it records is forgotten. So the gradients are those without checkpointing, bit
    for bit.

    Args:
        function: a module, or a function that calls modules.
        *args: given to it.
        **kwargs: given to it, but for: ``use_reentrant`` (True by default; False
            allows ``torch.autograd.grad`` and inputs in nested structures),
            ``context_fn`` (returns contexts for the two runs), ``determinism_check``
            and ``debug`` (of torch's checkpoint, for a function without modules of this
            emulator). Of ``distribute_saved_activations``, ``get_rng_state_tracker``
            and ``tp_group`` only the defaults are emulated.

    Returns:
        What ``function`` returns.

    Raises:
        NotImplementedError: an option that is not emulated.

    Example:
        >>> layer, x = nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
        >>> torch.equal(checkpoint(layer, x), layer(x))
        True
    """
    reentrant = kwargs.pop("use_reentrant", True)
    refuse(
        "checkpoint",
        distribute_saved_activations=(
            kwargs.pop("distribute_saved_activations", False),
            False,
        ),
        get_rng_state_tracker=(kwargs.pop("get_rng_state_tracker", None), None),
        tp_group=(kwargs.pop("tp_group", None), None),
    )
    context_fn = kwargs.pop("context_fn", torch_checkpoint.noop_context_fn)
    determinism_check = kwargs.pop("determinism_check", "default")
    debug = kwargs.pop("debug", False)
    if not _has_modules(function):
        return torch_checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=reentrant,
            context_fn=context_fn,
            determinism_check=determinism_check,
            debug=debug,
            **kwargs,
        )
    contexts = context_fn()
    if not torch.is_grad_enabled():
        with contexts[0]:
            return function(*args, **kwargs)
    if reentrant:
        return _Reentrant.apply(function, contexts, kwargs, *args)  # type: ignore[no-untyped-call]
    enter = _as_in_forward()

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        with contexts[0], _recomputing(phase=False):
            yield

    @contextlib.contextmanager
    def second() -> Iterator[None]:
        with contexts[1], enter():
            yield

    # A run that stops early would leave scales of the first one behind.
    with torch_checkpoint.set_checkpoint_early_stop(False):
        return torch_checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=False,
            context_fn=lambda: (first(), second()),
            **kwargs,
        )
