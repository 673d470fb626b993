"""Train and serve weights stored in bfloat16 or float16 without losing the updates.

Copy this file into your project; it needs only ``torch``.

Three tools: `lost_updates` predicts which share of the updates a learning rate
loses to rounding, `TrueHalfAdamW` is AdamW with one of three remedies, and
`convert_for_inference` casts a trained model and refuses what would overflow.

    Guide:   guide/true_half
    Tests:   tests/test_true_half.py
    Sources: Kahan 1965, Communications of the ACM 8(1), p. 40 (compensated sum);
             Gupta et al. 2015, arXiv:1502.02551, section 3 (stochastic rounding);
             Micikevicius et al. 2018, arXiv:1710.03740, section 3.1 (main params);
             Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (AdamW);
             Zamirai et al. 2020, arXiv:2010.06192 (both, for BF16 weights).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Callable, Collection, Iterable
from copy import copy
from difflib import get_close_matches
from functools import partial
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module
from torch.optim.adamw import adamw

__all__ = ["TrueHalfAdamW", "convert_for_inference", "lost_updates"]

_HALF = (torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_REMEDIES = ("main_params", "stochastic_rounding", "kahan")
_SETTINGS = ("lr", "betas", "eps", "weight_decay")
# Optimizer-state dtypes of a half-precision parameter. The compensation is bfloat16
# for float16 weights too: what they cut off often underflows float16.
_STATE_DTYPES = {
    "exp_avg": torch.float32,
    "exp_avg_sq": torch.float32,
    "main_param": torch.float32,
    "compensation": torch.bfloat16,
}


def lost_updates(
    params: Module | Iterable[tuple[str, Tensor]],
    lr: float,
    *,
    update: float = 1.0,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Predict, per parameter, the share of updates that rounding throws away.

    A step of ``lr * update`` is tried on every weight, up and down, and rounded to
    nearest once. AdamW's update is near 1 while a gradient keeps its sign and smaller
    when it does not, so the default answers for the best case. (Optimizers that also
    round ``lr`` or the update to 16 bits, as torch's do, shift the limit by 1 %.)
    A weight that is Inf or NaN counts as lost: no update changes it.

    Args:
        params: A module, or pairs such as ``module.named_parameters()``; not changed.
        lr: Learning rate, finite, >= 0.
        update: Size of the update before the learning rate, finite, >= 0.
        dtype: Ask "what if the weights had this dtype?", one of 8 bits too; each one's
            own if None.

    Returns:
        Name -> share in [0, 1], in the order given.

    Raises:
        ValueError: ``lr`` or ``update`` is negative, not finite or no number.
        TypeError: A parameter or ``dtype`` is not real floating point.

    Example:
        >>> norm = torch.nn.LayerNorm(8)  # weights 1, biases 0
        >>> lost_updates(norm, lr=1e-3, dtype=torch.bfloat16)
        {'weight': 1.0, 'bias': 0.0}
    """
    for name, value in {"lr": lr, "update": update}.items():
        if not _is_number(value, math.inf):
            msg = f"{name} must be finite and >= 0, got {value!r}"
            raise ValueError(msg)
    named = params.named_parameters() if isinstance(params, Module) else params
    shares = {}
    for name, weight in named:
        stored = dtype or weight.dtype
        if not (weight.is_floating_point() and stored.is_floating_point):
            msg = f"{name} must be real floating point, got {weight.dtype} as {stored}"
            raise TypeError(msg)
        # As an operation on 16-bit tensors computes: in float32, rounded at the end.
        compute = torch.float32 if stored.itemsize <= 2 else stored
        w = weight.detach().to(stored).to(compute)
        new = [(w + sign * lr * update).to(stored) for sign in (1, -1)]
        steps = [v.to(compute) - w for v in new]
        lost = sum(int((~(step.abs() > 0)).sum()) for step in steps)
        shares[name] = lost / (2 * w.numel()) if w.numel() else 0.0
    return shares


class TrueHalfAdamW(torch.optim.Optimizer):
    """AdamW whose half-precision parameters receive small updates too.

    The step is ``torch.optim``'s own arithmetic on float32 values, so the moments are
    float32 and ``eps`` cannot underflow. What differs is how the result gets back into
    the 16-bit parameter (bytes per parameter count weight, gradient and state):

    - ``"main_params"``: a float32 copy is updated and rounded into the weight (16 B).
      Where a weight was changed from outside (loaded, masked), the copy follows it.
    - ``"stochastic_rounding"``: no copy; right on average, noisy each time (12 B).
    - ``"kahan"``: what rounding cut off is kept in bfloat16 and added again (14 B).

    A float32, float64 or complex parameter is treated as `torch.optim.AdamW` treats it,
    bit for bit. A NaN or Inf gradient also does what it does there: the weight and its
    state become NaN. A float16 weight pushed beyond 65504 becomes Inf.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer.
        lr: Learning rate, finite, >= 0; a float or a tensor.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the root of the second moment, finite, >= 0.
        weight_decay: Finite, >= 0: each step multiplies by ``1 - lr * weight_decay``.
        remedy: One of the three; groups may differ.
        generator: Random numbers for ``"stochastic_rounding"``, on the parameters'
            device; saved by `state_dict`. If None, the device's default generator,
            which `state_dict` does not hold. Replicas of a weight, such as the ranks of
            DDP, need one each with the same seed, or they drift apart.

    Raises:
        ValueError: A setting is out of range or ``remedy`` is unknown.
        TypeError: A parameter has another dtype, for example one of 8 bits.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = TrueHalfAdamW([weight], lr=1e-3, weight_decay=0.0)
        >>> for _ in range(100):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.item()  # torch.optim.AdamW leaves it at 1.0
        0.8984375
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        remedy: str = "main_params",
        generator: Generator | None = None,
    ) -> None:
        self.generator = generator
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"remedy": remedy})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose missing settings are the optimizer's own.

        Raises:
            ValueError: A setting is out of range or ``remedy`` is unknown.
            TypeError: A parameter has another dtype, for example one of 8 bits.
        """
        group = self.defaults | param_group
        _check_settings(group)
        if group["remedy"] not in _REMEDIES:
            hint = _nearest(group["remedy"], _REMEDIES)
            msg = f"remedy must be one of {_REMEDIES}, got {group['remedy']!r}{hint}"
            raise ValueError(msg)
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        for item in given:
            p = item[1] if isinstance(item, tuple) else item
            if isinstance(p, Tensor) and p.dtype not in _HALF + _WIDE:
                msg = f"parameters must be one of {_HALF + _WIDE}, got {p.dtype}"
                raise TypeError(msg)
        super().add_param_group({**param_group, "params": given})

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch writes two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take one step; parameters without a gradient stay as they are.

        Args:
            closure: Computes the loss again and returns it; called once, first.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse; no parameter has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        if any(p.grad is not None and p.grad.is_sparse for p, _ in pairs):
            msg = "TrueHalfAdamW does not support sparse gradients"
            raise RuntimeError(msg)
        for p, group in pairs:
            if p.grad is not None:
                self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, half = self.state[p], p.dtype in _HALF
        remedy = group["remedy"] if half else None
        if "step" not in state:
            wide = torch.float32 if half else p.dtype
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
        if remedy == "main_params" and "main_param" not in state:
            state["main_param"] = p.float()
        if remedy == "kahan" and "compensation" not in state:
            state["compensation"] = torch.zeros_like(p, dtype=torch.bfloat16)

        target = p.float() if half else p  # what torch's arithmetic works on
        if remedy == "main_params":
            # Otherwise a weight loaded or masked since the last step would come back.
            main = state["main_param"]
            stale = main.to(p.dtype) != p
            target = main.copy_(torch.where(stale, target, main))
        elif remedy == "kahan":
            target += state["compensation"]

        adamw(
            [target],
            [grad.to(target.dtype)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if remedy == "stochastic_rounding":
            p.copy_(_round_stochastic(target, p.dtype, self.generator))
        elif half:
            p.copy_(target)
        if remedy == "kahan":
            state["compensation"].copy_(target - p)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with ``generator_state`` if there is a generator."""
        state = super().state_dict()
        if self.generator is not None:
            state["generator_state"] = self.generator.get_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state and keep its float32 tensors, which torch would cast to 16 bits.

        The state of a `torch.optim.AdamW` is accepted: its moments are widened and the
        remedies stay as constructed.

        Raises:
            ValueError: The state was saved with another ``remedy``, with ``amsgrad`` or
                ``maximize``, with a generator that is missing here, by an optimizer
                with other state or with weight decay in the gradient, for parameters of
                another number or shape, or has a setting out of range or steps below 0.
                Nothing has been changed.
        """  # noqa: DOC502 - raised by check
        final: dict[str, Any] = {}  # what the pre-hooks make of it, ours being the last

        def check(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            groups = [{**group} for group in state["param_groups"]]
            for mine, saved in zip(self.param_groups, groups, strict=False):
                if saved.setdefault("remedy", mine["remedy"]) != mine["remedy"]:
                    msg = (
                        f"saved with remedy={saved['remedy']!r}, not {mine['remedy']!r}"
                    )
                    raise ValueError(msg)
                if saved.get("amsgrad") or saved.get("maximize"):
                    msg = (
                        "a state with amsgrad or maximize set cannot be continued here"
                    )
                    raise ValueError(msg)
                for name in _SETTINGS:
                    saved.setdefault(name, mine[name])
                _check_settings(saved)
                if saved["weight_decay"] and not saved.get("decoupled_weight_decay", 1):
                    msg = f"saved by Adam with weight_decay={saved['weight_decay']} in "
                    msg += "the gradient, where this one decays the weight: not the "
                    msg += "same run"
                    raise ValueError(msg)
                for key, p in zip(saved["params"], mine["params"], strict=False):
                    _check_state(key, state["state"].get(key, {}), p)
            if "generator_state" in state and self.generator is None:
                msg = "saved with a generator: construct with generator=... to load it"
                raise ValueError(msg)
            final.update(state, param_groups=groups)
            return final

        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        ids = chain.from_iterable(group["params"] for group in final["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, p in zip(ids, params, strict=True):
            for key, value in final["state"].get(saved_id, {}).items():
                if key in _STATE_DTYPES and p.dtype in _HALF:
                    dtype = _STATE_DTYPES[key]
                    self.state[p][key] = value.to(p.device, dtype, copy=True)
                if key == "step" and not isinstance(value, Tensor):
                    # torch before 1.12 saved plain numbers
                    step = torch.tensor(float(value), dtype=torch.float32)
                    self.state[p][key] = step
        if self.generator is not None and "generator_state" in final:
            self.generator.set_state(final["generator_state"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator}


def convert_for_inference(
    module: Module, dtype: torch.dtype, *, keep: Collection[str] = ()
) -> dict[str, int]:
    """Cast a trained module to 16 bits in place, and count what the cast destroys.

    Parameters and buffers of 16 to 64 bits are cast; integer, bool, complex and 8-bit
    float ones stay (``module.to(dtype)`` would drop imaginary parts). Tied weights stay
    tied, Inf and NaN pass, gradients are dropped, and the mode is not changed: call
    ``module.eval()`` yourself.

    A submodule named in ``keep`` stays as it is. It gets hooks that cast the floating
    tensors among its inputs, and inside their tuples, lists and dicts, of a class of
    their own too, to its own dtype, and those among its outputs to ``dtype``.

    Args:
        module: The module to change.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        keep: Names of submodules, as in ``module.named_modules()``, to leave alone.

    Returns:
        Name of each tensor cast -> how many of its nonzero values became zero.

    Raises:
        ValueError: ``dtype`` is another one, ``keep`` names no submodule or one that
            shares a tensor with a module outside, or a finite value would become Inf.
            Nothing has been changed.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 1e-8)
        >>> convert_for_inference(net, torch.float16)
        {'weight': 2}
    """
    if dtype not in _HALF:
        msg = f"dtype must be one of {_HALF}, got {dtype}"
        raise ValueError(msg)
    modules = {name: m for name, m in module.named_modules() if name}
    roots = {keep} if isinstance(keep, str) else set(keep)
    for name in sorted(roots - set(modules)):
        msg = f"keep must name submodules, got {name!r}{_nearest(name, modules)}"
        raise ValueError(msg)
    roots -= {k for k in roots if any(k.startswith(f"{r}.") for r in roots)}
    inside = {id(m) for name in roots for m in modules[name].modules()}
    kept = {id(t) for name in roots for _, t in _tensors(modules[name])}
    for owner, m in module.named_modules():
        for name, t in _tensors(m, recurse=False):
            if id(m) not in inside and id(t) in kept:
                msg = f"keep shares {owner}.{name} with a module outside: keep both"
                raise ValueError(msg)

    todo = [(n, t) for n, t in _tensors(module) if id(t) not in kept and _castable(t)]
    lost = {}
    for name, t in todo:
        values = t.detach()._values() if t.is_sparse else t.detach()
        cast = values.to(dtype)
        over = values[cast.isinf() & values.isfinite()].abs()
        if over.numel():
            msg = (
                f"{over.numel()} of {t.numel()} values of {name} overflow {dtype}, "
                f"the largest is {over.max().item():.6g}: keep its module"
            )
            raise ValueError(msg)
        lost[name] = int(((cast == 0) & (values != 0)).sum())

    for _, t in todo:
        t.grad = None
        t.data = t.data.to(dtype)
    for m in (modules[name] for name in roots):
        own = next((t.dtype for _, t in _tensors(m) if _castable(t)), dtype)
        m.register_forward_pre_hook(partial(_cast_inputs, own), with_kwargs=True)
        m.register_forward_hook(partial(_cast_outputs, dtype))
    return lost


def _is_number(value: object, below: float) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return isinstance(value, Real) and 0 <= float(value) < below  # also refuses NaN


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not _is_number(group[name], math.inf):
            msg = f"{name} must be finite and >= 0, got {group[name]!r}"
            raise ValueError(msg)
    betas = list(group["betas"]) if isinstance(group["betas"], Iterable) else []
    if len(betas) != 2 or not all(_is_number(beta, 1) for beta in betas):
        msg = f"betas must be two numbers in [0, 1), got {group['betas']!r}"
        raise ValueError(msg)


def _check_state(key: int, state: dict[str, Any], p: Tensor) -> None:
    needed = {"step", "exp_avg", "exp_avg_sq"}
    if state and not needed <= state.keys() <= needed | _STATE_DTYPES.keys():
        msg = f"parameter {key} needs state {sorted(needed)}, got {sorted(state)}"
        raise ValueError(msg)
    if state and not _is_number(state["step"], math.inf):
        msg = f"step of parameter {key} must be >= 0, got {state['step']}"
        raise ValueError(msg)
    for name in sorted(state.keys() - {"step"}):
        shape = getattr(state[name], "shape", None)
        if shape != p.shape:
            got, wanted = shape and tuple(shape), tuple(p.shape)
            msg = f"{name} of parameter {key} has shape {got}, but its weight {wanted}"
            raise ValueError(msg)


def _nearest(name: object, allowed: Iterable[str]) -> str:
    close = get_close_matches(str(name), allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _round_stochastic(
    x: Tensor, dtype: torch.dtype, generator: Generator | None
) -> Tensor:
    """Round float32 up or down at random, with the mean ``x``."""
    info = torch.finfo(dtype)
    # |x| = mantissa * 2**exponent, mantissa in [0.5, 1): the spacing of the 16-bit
    # numbers around x is eps * 2**(exponent - 1), and below ``tiny`` what it is there.
    tiny = torch.full_like(x, info.tiny)
    spacing = torch.ldexp(
        torch.full_like(x, info.eps / 2), torch.frexp(x.abs().maximum(tiny)).exponent
    )
    steps = x / spacing  # exact: the spacing is a power of two
    below = steps.floor()
    noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return ((below + (noise < steps - below)) * spacing).to(dtype)


def _tensors(module: Module, *, recurse: bool = True) -> list[tuple[str, Tensor]]:
    parameters = module.named_parameters(recurse=recurse)
    return [*parameters, *module.named_buffers(recurse=recurse)]


def _castable(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize > 1


def _cast(value: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - whatever is passed
    if isinstance(value, Tensor):
        return value.to(dtype) if _castable(value) else value
    if isinstance(value, (tuple, list)):
        items = [_cast(v, dtype) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        made = {k: _cast(v, dtype) for k, v in value.items()}
        if any(made[k] is not value[k] for k in made):
            value = copy(value)  # of its own class
            value.update(made)
    return value


def _cast_inputs(dtype: torch.dtype, _: Module, *inputs: object) -> object:
    return _cast(inputs, dtype)  # (args, kwargs)


def _cast_outputs(
    dtype: torch.dtype, _: Module, args: object, output: object
) -> object:
    return _cast(output, dtype)
