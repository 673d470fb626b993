"""Train half-precision weights with any ``torch.optim`` optimizer, in float32.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

`MainParams` keeps a float32 copy of each half-precision parameter, its *main param*,
lets the optimizer work on the copies, and rounds them into the model after each step:
what Megatron does for ``bf16-mixed`` and ``16-mixed``, on one process.

    Guide:   guide/main_params
    Tests:   tests/test_main_params.py
    Sources: Micikevicius et al. 2018, arXiv:1710.03740, section 3.1 (float32 copy);
             Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1 (bytes);
             Megatron-LM d98e8a64, megatron/core/optimizer/optimizer.py (order of a
             step) and docs/user-guide/features/dist_optimizer.md (bytes).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import LBFGS, Optimizer

__all__ = ["MainParams"]

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (*_HALF, torch.float32, torch.float64)
# Some of torch.amp.GradScaler's methods: what has them has the others.
_SCALER_METHODS = ("scale", "unscale_", "step", "update", "state_dict")
_STATE_KEYS = ("optimizer", "state", "param_groups", "scaler")


class MainParams(Optimizer):
    """Run an optimizer on float32 main params instead of half-precision parameters.

    One :meth:`step` copies the gradients up to float32, unscales them and looks for
    NaN and Inf, clips, lets the optimizer step on the main params, and rounds these
    into the parameters. A gradient that is not finite, or with ``clip_grad`` a norm
    that is not, skips the step: parameters, main params and optimizer state stay. Main
    params are those of ``optimizer`` on a float32 model, bit for bit, where gradients
    are. A float16 weight is Inf where its main param is beyond 65504.

    It is an optimizer itself: ``param_groups`` are the groups of the one inside, so a
    scheduler acts on either. A main param is made when its parameter first has a
    gradient, so frozen parameters cost nothing, and follows it where it was changed
    from outside (loaded, masked). float32 and float64 parameters are handed through.

    Args:
        optimizer: Any optimizer of ``torch.optim`` but ``LBFGS``, over the model's
            parameters, all on one device. What it has as state already is widened.
        scaler: A ``torch.amp.GradScaler``, or an object with its methods; for float16.
            It is this object's alone: :meth:`step` also updates it.
        clip_grad: Clip the norm of the unscaled float32 gradients to this, > 0; Inf
            only measures it. None for neither.
        grad_dtype: ``torch.float32`` accumulates ``p.grad`` in float32, which is then
            the main gradient too. None leaves it in the parameter's dtype.

    Attributes:
        inner: The optimizer given.
        main_params: Parameter -> main param, for those that have one.
        found_inf: Whether the last step was skipped.
        grad_norm: Norm in the last step before clipping; None without ``clip_grad``.

    Raises:
        TypeError: ``optimizer``, ``scaler`` or a parameter's dtype is not allowed.
        ValueError: A setting is out of range, a parameter is there twice, or the
            parameters lie on several devices or have a gradient already.
        RuntimeError: This torch is too old for ``grad_dtype``.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = MainParams(torch.optim.SGD([weight], lr=1e-3))
        >>> for _ in range(100):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.item()  # SGD alone leaves it at 1.0
        0.8984375
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scaler: Any = None,  # noqa: ANN401 - any class with these methods
        clip_grad: float | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        is_optimizer = isinstance(optimizer, Optimizer)
        if not is_optimizer or isinstance(optimizer, (LBFGS, MainParams)):
            name = type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch one, not LBFGS, got {name}")
        missing = [m for m in _SCALER_METHODS if not callable(getattr(scaler, m, None))]
        if scaler is not None and missing:
            name = type(scaler).__name__
            raise TypeError(f"scaler must have the methods {missing}, got {name}")
        if clip_grad is not None and not _is_positive(clip_grad):
            raise ValueError(f"clip_grad must be > 0 or None, got {clip_grad!r}")
        if grad_dtype not in (None, torch.float32):
            allowed = "None or torch.float32"
            raise ValueError(f"grad_dtype must be {allowed}, got {grad_dtype}")
        if grad_dtype is not None and not hasattr(Tensor, "grad_dtype"):
            raise RuntimeError(f"torch {torch.__version__} has no Tensor.grad_dtype")
        _check_params(_params(optimizer), grad_dtype)
        self.inner = optimizer
        self.main_params: dict[Tensor, Tensor] = {}
        self.scaler = scaler
        self.clip_grad = clip_grad
        self.grad_dtype = grad_dtype
        self.found_inf = False
        self.grad_norm: float | None = None
        # Not __init__ of Optimizer: groups and state are those of the inner one.
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        # Without hooks, as torch does, and without the step that a scheduler patched.
        return {k: v for k, v in vars(self).items() if k[0] != "_" and k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # adds what hooks and profiler need
        self._request_grad_dtype()

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's own defaults."""
        return self.inner.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's own groups, which hold the model's parameters."""
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """Parameter -> the inner optimizer's own state for it; a new dict each time."""
        owners = {main: p for p, main in self.main_params.items()}
        return {owners.get(p, p): entry for p, entry in self.inner.state.items()}

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Multiply the loss for backward; without a scaler return it as it is."""
        scaled: Tensor = loss if self.scaler is None else self.scaler.scale(loss)
        return scaled

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as to any optimizer; refuses what the constructor refuses."""
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        added = [item[1] if isinstance(item, tuple) else item for item in given]
        _check_params([*_params(self), *added], self.grad_dtype)
        self.inner.add_param_group({**param_group, "params": given})
        self._request_grad_dtype()

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch writes two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take one step on the main params; parameters without a gradient stay.

        With a scaler, gradients come from ``scale_loss(loss).backward()``. Those that
        are float32 already are unscaled and clipped in place.

        Args:
            closure: Runs backward and returns the loss; called once, first.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse, or a parameter changed its dtype, shape
                or device since its main param was made. Nothing has been changed.
        """  # noqa: DOC502 - raised by _check_gradient
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for p in _params(self) if p.grad is not None]
        for p in params:
            self._check_gradient(p)
        mains = [self._main_param(p) for p in params]
        pairs = [(p, m) for p, m in zip(params, mains, strict=True) if m is not p]
        is_scaled = self.scaler is not None  # a disabled one passes everything on
        try:
            for p, main in pairs:
                main.grad = None if p.grad is None else p.grad.to(main.dtype)
            with self._inner_on(self.main_params):
                if is_scaled:
                    self.scaler.unscale_(self.inner)
                grads = [m.grad for m in mains if m.grad is not None and m.numel()]
                norm = get_total_norm(grads, 2.0 if self.clip_grad else math.inf)
                finite = bool(norm.isfinite())  # waits for the device
                if finite and self.clip_grad:
                    clip_grads_with_norm_(mains, self.clip_grad, norm)
                if finite:
                    self.scaler.step(self.inner) if is_scaled else self.inner.step()
                if is_scaled:
                    self.scaler.update()
        finally:
            for _, main in pairs:
                main.grad = None
        for p, main in pairs:
            p.copy_(main)
        # A scaler may have skipped for what another rank found.
        self.found_inf = not finite or bool(getattr(self.scaler, "found_inf", False))
        self.grad_norm = norm.item() if self.clip_grad else None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state with ``main_param`` in each entry.

        Besides ``state`` and ``param_groups`` it holds the inner ``optimizer``'s name
        and, if there is one, the ``scaler``'s state. Save the model's as well. Hooks on
        saving and loading run as with any optimizer.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self._inner_on(self.main_params):
            saved: dict[str, Any] = self.inner.state_dict()
        saved["state"] = {index: dict(entry) for index, entry in saved["state"].items()}
        for index, p in enumerate(_params(self)):
            if p in self.main_params:
                saved["state"].setdefault(index, {})["main_param"] = self.main_params[p]
        saved["optimizer"] = type(self.inner).__name__
        if self.scaler is not None:
            saved["scaler"] = self.scaler.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, saved)
            saved = saved if changed is None else changed
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state of this class, or of a plain optimizer like the inner.

        A plain one has no main params: they are made from the parameters, and its half
        state is widened. Everything is checked before anything is changed.

        Raises:
            TypeError: ``state_dict`` is not a mapping.
            ValueError: It was saved around another optimizer, for other parameters, or
                with a scaler where there is none (or the other way round).
        """  # noqa: DOC502 - raised by _check_state
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed: Mapping[str, Any] | None = before(self, dict(state_dict))
            state_dict = state_dict if changed is None else changed
        _check_state(state_dict, self)
        groups = state_dict["param_groups"]
        state = {index: dict(entry) for index, entry in state_dict["state"].items()}
        mains: dict[Tensor, Tensor] = {}
        ids = chain(*(group["params"] for group in groups))
        for index, p in zip(ids, _params(self), strict=True):
            if index in state and p.dtype in _HALF:
                main = state[index].pop("main_param", p.detach())
                mains[p] = main.to(p.device, torch.float32, copy=True)
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict["scaler"])
        with self._inner_on(mains):
            self.inner.load_state_dict({"state": state, "param_groups": groups})
        self.main_params = mains
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @contextmanager
    def _inner_on(self, mains: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Put main params into the groups, where only the inner optimizer sees them."""
        lists = [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = [mains.get(p, p) for p in group["params"]]
        try:
            yield
        finally:  # loading has made new groups
            for group, params in zip(self.param_groups, lists, strict=True):
                group["params"] = params

    def _main_param(self, p: Tensor) -> Tensor:
        if p.dtype not in _HALF:
            return p
        main = self.main_params.get(p)
        if main is None:
            main = self.main_params[p] = p.detach().float()
            if p in self.inner.state:  # in half precision, made at construction say
                entry = self.inner.state.pop(p)
                self.inner.state[main] = {
                    key: value.float() if getattr(value, "dtype", 0) in _HALF else value
                    for key, value in entry.items()
                }
            return main
        # Otherwise a weight loaded or masked since the last step would come back.
        return main.copy_(torch.where(main.to(p.dtype) != p, p.float(), main))

    def _check_gradient(self, p: Tensor) -> None:
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError("MainParams does not support sparse gradients")
        main = self.main_params.get(p)
        if main is None:
            return
        if p.dtype not in _HALF or p.shape != main.shape or p.device != main.device:
            now = f"{p.dtype} of shape {tuple(p.shape)} on {p.device}"
            raise RuntimeError(f"a parameter that has a main param has become {now}")

    def _request_grad_dtype(self) -> None:
        for p in _params(self):
            if self.grad_dtype is not None and p.dtype != torch.float64:
                p.grad_dtype = self.grad_dtype


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0  # also refuses NaN


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_params(params: Sequence[object], grad_dtype: torch.dtype | None) -> None:
    tensors = [p for p in params if isinstance(p, Tensor)]  # torch refuses the others
    for p in tensors:
        if p.dtype not in _DTYPES:
            raise TypeError(f"parameters must be one of {_DTYPES}, got {p.dtype}")
        if grad_dtype and p.grad is not None and p.grad.dtype != grad_dtype:
            raise ValueError(f"there is a {p.grad.dtype} gradient: call zero_grad()")
    if len({id(p) for p in tensors}) < len(tensors):
        raise ValueError("a parameter is in the groups twice: give tied weights once")
    devices = sorted({str(p.device) for p in tensors})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(f"parameters must lie on one real device, got {devices}")


def _check_state(state_dict: object, optimizer: MainParams) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict is a mapping, got {type(state_dict).__name__}")
    keys = state_dict.keys()
    if keys - set(_STATE_KEYS) or not {"state", "param_groups"} <= keys:
        raise ValueError(f"a state dict has the keys {_STATE_KEYS}, got {sorted(keys)}")
    if not isinstance(state_dict["state"], Mapping):
        kind = type(state_dict["state"]).__name__
        raise ValueError(f"'state' of a state dict is a mapping, got {kind}")
    mine = type(optimizer.inner).__name__
    if (saved := state_dict.get("optimizer", mine)) != mine:
        raise ValueError(f"saved around {saved}, this is around {mine}")
    if "scaler" in keys and optimizer.scaler is None:
        raise ValueError("saved with a scaler: construct with scaler=... to load it")
    if optimizer.scaler is not None and "scaler" not in keys:
        raise ValueError("saved without a scaler: add a 'scaler' state to load it")
    ids = [list(group["params"]) for group in state_dict["param_groups"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != (saved := [len(group) for group in ids]):
        raise ValueError(f"saved for groups of {saved} parameters, here are {sizes}")
    for index, p in zip(chain(*ids), _params(optimizer), strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if key == "main_param" and p.dtype not in _HALF:
                raise ValueError(f"parameter {index} was half, here it is {p.dtype}")
            if key == "main_param" and not isinstance(value, Tensor):
                kind = type(value).__name__
                raise ValueError(f"{key} of parameter {index} is {kind}, not a tensor")
            if isinstance(value, Tensor) and not _fits(key, value, p):
                got, want = tuple(value.shape), tuple(p.shape)
                raise ValueError(f"{key} of parameter {index} is {got}, not {want}")


def _fits(key: str, value: Tensor, p: Tensor) -> bool:
    if value.shape == p.shape or key == "main_param":
        return value.shape == p.shape
    if value.ndim == 0 or p.ndim < 2:
        return value.ndim == 0
    # Adafactor keeps a row and a column of the parameter's shape.
    pairs = zip(value.shape, p.shape, strict=False)
    return value.ndim == p.ndim and all(v in (1, n) for v, n in pairs)
