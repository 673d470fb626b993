"""Round to BF16, FP16 or FP8 up or down at random, so that the mean is exact.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

Two tools: `stochastic_round` rounds a tensor, and `PureBF16AdamW` is AdamW whose
weights and moments are all bfloat16 and still receive the smallest updates.

    Guide:   guide/stochastic_rounding
    Tests:   tests/test_stochastic_rounding.py
    Sources: Gupta et al. 2015, arXiv:1502.02551, section 3 (stochastic rounding);
             Kahan 1965, Communications of the ACM 8(1), p. 40 (compensated sum);
             Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (AdamW);
             Zamirai et al. 2020, arXiv:2010.06192 (both, for BF16 weights);
             Micikevicius et al. 2022, arXiv:2209.05433, section 3 (E4M3, E5M2).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from numbers import Real
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Generator, Tensor
from torch.optim.adamw import adamw

__all__ = ["PureBF16AdamW", "stochastic_round"]


class _Format(NamedTuple):
    mantissa_bits: int
    min_exponent: int  # of the smallest normal number
    max_code: int  # of the largest finite number; the next code is Inf, or else NaN
    nan_code: int


# Not from torch.finfo: its eps of float8_e5m2fnuz is 0.125 where the spacing is 0.25.
_FORMATS = {
    torch.bfloat16: _Format(7, -126, 0x7F7F, 0x7FC0),
    torch.float16: _Format(10, -14, 0x7BFF, 0x7E00),
    torch.float8_e4m3fn: _Format(3, -6, 0x7E, 0x7F),
    torch.float8_e5m2: _Format(2, -14, 0x7B, 0x7F),
    torch.float8_e4m3fnuz: _Format(3, -7, 0x7F, 0x80),
    torch.float8_e5m2fnuz: _Format(2, -15, 0x7F, 0x80),
}
# Integer dtype, stored mantissa bits, exponent bias, and random bits for one element:
# as many as leave the sum of a random number and a significand positive.
_WIDE = {
    torch.float32: (torch.int32, 23, 127, 30),
    torch.float64: (torch.int64, 52, 1023, 62),
}
_NO_NEGATIVE_ZERO = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_INPUTS = (torch.float64, torch.float32, *_FORMATS)

_ROUNDINGS = ("stochastic", "kahan")
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "rounding", "seed")
_PLAIN: dict[str, Any] = {"foreach": False, "amsgrad": False, "maximize": False}
_PARAMETERS = (torch.bfloat16, torch.float32, torch.float64)


def stochastic_round(
    x: Tensor,
    dtype: torch.dtype,
    generator: Generator | None = None,
    *,
    saturate: bool = False,
) -> Tensor:
    """Round ``x`` to one of its two neighbors in ``dtype``, with ``x`` as the mean.

    Between neighbors ``lo`` and ``hi`` the result is ``hi`` with probability
    ``(x - lo) / (hi - lo)``, and what ``dtype`` can represent is never moved. The
    probability has 30 random bits (62 from float64), which makes it exact down to 2**-9
    times the smallest normal number of ``dtype``, and for all float32 to bfloat16. From
    there to zero the one that leads away from zero is less than 2**-30 too small.

    Zeros keep their sign; the two fnuz dtypes have no -0 and give 0. NaN stays NaN, its
    payload is lost. Beyond the largest finite number the upper neighbor is the number
    that would follow, stored as Inf, or as NaN in a dtype without Inf; so is what lies
    beyond that, Inf included. ``saturate`` stores the largest finite number instead.

    One random integer is drawn for each element, in logical order, whatever its value:
    the same generator state gives the same result for any memory layout.

    Args:
        x: Any shape and strides; float64, float32, or one of the dtypes below.
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float8_e4m3fn``,
            ``torch.float8_e5m2``, or one of the latter two's fnuz variants.
        generator: On the device of ``x``; the device's default one if None.
        saturate: Never give Inf, nor NaN but for NaN.

    Returns:
        ``dtype``, the shape and device of ``x``. Not differentiable.

    Raises:
        TypeError: ``x`` or ``dtype`` is another dtype, or ``x`` is sparse, nested or a
            DTensor.
        ValueError: ``generator`` is on another device than ``x``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.full((1000,), 1.001)
        >>> x.bfloat16().double().mean().item()
        1.0
        >>> rounded = stochastic_round(x, torch.bfloat16, generator)
        >>> rounded.unique().tolist(), round(rounded.double().mean().item(), 3)
        ([1.0, 1.0078125], 1.001)
    """
    given = getattr(x, "dtype", type(x).__name__)
    if given not in _INPUTS:
        msg = f"x must be one of {_INPUTS}, got {given}"
        raise TypeError(msg)
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else x.layout
        msg = f"x must be a dense tensor, got a {kind} one: round its values"
        raise TypeError(msg)
    if dtype not in _FORMATS:
        msg = f"dtype must be one of {tuple(_FORMATS)}, got {dtype}"
        raise TypeError(msg)
    if hasattr(x, "to_local"):
        msg = "x is a DTensor: round x.to_local(), which is this rank's part"
        raise TypeError(msg)
    if generator is not None and generator.device.type != x.device.type:
        msg = f"generator is on {generator.device}, but x is on {x.device}"
        raise ValueError(msg)
    target = _FORMATS[dtype]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    integer, stored, bias, random_bits = _WIDE[wide]

    value = x.detach().to(wide).resolve_neg()
    bits = value.view(integer)
    # The wide number as a fixed-point one: `position` >> `dropped` is the code of the
    # target, rounded toward zero.
    position = bits & torch.iinfo(integer).max
    dropped: int | Tensor = stored - target.mantissa_bits
    first = target.min_exponent + bias  # exponent field of its smallest normal number
    if first > 1:
        # Below it the spacing stays the same, so that more bits are dropped, down to
        # nothing: numbers which are subnormal already have no hidden bit, but vanish.
        significand = (position & ((1 << stored) - 1)) | (1 << stored)
        below = (first - (position >> stored)).clamp_(min=0)
        position = torch.maximum(position - ((first - 1) << stored), significand)
        dropped = below + dropped
        position >>= (dropped - random_bits).clamp_(0, stored + 1)
        dropped.clamp_(max=random_bits)
    code = torch.randint(
        1 << random_bits, x.shape, dtype=integer, device=x.device, generator=generator
    )
    # Noise below the cut carries into the code with the probability of what is cut off.
    code >>= random_bits - dropped
    code += position
    code >>= dropped
    code.clamp_(max=target.max_code + (not saturate))
    code.masked_fill_(value.isnan(), target.nan_code)

    width = 8 * dtype.itemsize
    sign = (bits >> (torch.iinfo(integer).bits - 1)) & (1 << (width - 1))
    if dtype in _NO_NEGATIVE_ZERO:
        sign *= code > 0
    code |= sign
    return code.to(torch.uint8 if width == 8 else torch.uint16).view(dtype)


class PureBF16AdamW(torch.optim.Optimizer):
    """AdamW with weights and state in bfloat16, 6 or 8 bytes a parameter.

    Each step widens one parameter and its moments to float32, does ``torch.optim``'s
    own arithmetic there, and stores the results in bfloat16 again:

    - the moments stochastically: to nearest, the second could grow but never fall;
    - with ``rounding="stochastic"`` the weight too (6 bytes for weight and moments);
    - with ``rounding="kahan"`` the weight to nearest, while what that cut off is kept
      in bfloat16 and added at the next step (8 bytes).

    The random numbers depend on ``seed``, the parameter's place in the optimizer and
    its step count only: replicas stay equal, and a run resumes bit for bit.

    A float32 or float64 parameter gets the step of `torch.optim.AdamW`, bit for bit. A
    NaN or Inf gradient makes the weight and its state NaN, as there.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer.
        lr: Learning rate, finite, >= 0; a float or a tensor.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the root of the second moment, finite, >= 0.
        weight_decay: Finite, >= 0: each step multiplies by ``1 - lr * weight_decay``.
        rounding: ``"stochastic"`` or ``"kahan"``; groups may differ.
        seed: Of the random numbers, >= 0. The same on every replica of a weight; under
            FSDP2 it may differ from rank to rank.

    Raises:
        ValueError: A setting is out of range, or there are no parameters.
        TypeError: A parameter has another dtype.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        >>> optimizer = PureBF16AdamW([weight], lr=1e-3, weight_decay=0.0)
        >>> for _ in range(100):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> round(weight.double().mean().item(), 2)  # torch.optim.AdamW: 1.0
        0.9
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"rounding": rounding, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose missing settings are the optimizer's own.

        A setting out of range is a ValueError; nothing has been added then.

        Raises:
            TypeError: A parameter has another dtype; nothing has been added.
        """
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        _check_settings(self.defaults | param_group)
        for item in given:
            p = item[1] if isinstance(item, tuple) else item
            if isinstance(p, Tensor) and p.dtype not in _PARAMETERS:
                msg = f"parameters must be one of {_PARAMETERS}, got {p.dtype}"
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
            msg = "PureBF16AdamW does not support sparse gradients"
            raise RuntimeError(msg)
        for place, (p, group) in enumerate(pairs):
            if p.grad is not None:
                self._update(p, p.grad, group, place)
        return loss

    def _update(
        self, p: Tensor, grad: Tensor, group: dict[str, Any], place: int
    ) -> None:
        state, narrow = self.state[p], p.dtype == torch.bfloat16
        kahan = narrow and group["rounding"] == "kahan"
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        if kahan and "compensation" not in state:
            state["compensation"] = torch.zeros_like(p)

        # A sharded parameter's own part: the arithmetic is element by element.
        stored = [_local(t) for t in (p, state["exp_avg"], state["exp_avg_sq"])]
        exact = [t.float() for t in stored] if narrow else stored
        if kahan:
            exact[0] += _local(state["compensation"])
        weight, exp_avg, exp_avg_sq = ([t] for t in exact)
        grads, steps = [_local(grad).to(exact[0].dtype)], [state["step"]]
        settings = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        adamw(weight, grads, exp_avg, exp_avg_sq, [], steps, **_PLAIN, **settings)
        if not narrow:
            return
        # A hash, since CPU generators read only 32 bits of their seed.
        key = f"{group['seed']}/{place}/{state['step'].item():.0f}"
        generator = Generator(p.device).manual_seed(crc32(key.encode()))
        if kahan:
            stored[0].copy_(exact[0])
            _local(state["compensation"]).copy_(exact[0] - stored[0])
        for t, value in list(zip(stored, exact, strict=True))[kahan:]:
            t.copy_(stochastic_round(value, torch.bfloat16, generator))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; that of a `torch.optim.AdamW` is taken over.

        Its moments are rounded to nearest; ``rounding`` and ``seed`` stay as they are.

        Raises:
            ValueError: The state was saved with another ``rounding``, with ``amsgrad``
                or ``maximize``, by an optimizer with other state or with weight decay
                in the gradient, for parameters of another number or shape, or has a
                setting out of range or steps below 0. Nothing has been changed.
        """
        groups = [{**group} for group in state_dict["param_groups"]]
        for own, saved in zip(self.param_groups, groups, strict=False):
            for name in _SETTINGS:
                saved.setdefault(name, own[name])
            if saved["rounding"] != own["rounding"]:
                msg = "saved with rounding={!r}, not {!r}"
                raise ValueError(msg.format(saved["rounding"], own["rounding"]))
            if saved.get("amsgrad") or saved.get("maximize"):
                msg = "a state with amsgrad or maximize set cannot be continued here"
                raise ValueError(msg)
            _check_settings(saved)
            if saved["weight_decay"] and not saved.get("decoupled_weight_decay", True):
                msg = f"saved by Adam with weight_decay={saved['weight_decay']} in the "
                msg += "gradient, where this one decays the weight: not the same run"
                raise ValueError(msg)
            for key, p in zip(saved["params"], own["params"], strict=False):
                _check_state(key, state_dict["state"].get(key, {}), p)
        super().load_state_dict({**state_dict, "param_groups": groups})
        for state in self.state.values():  # torch before 1.12 saved plain numbers
            if "step" in state and not isinstance(state["step"], Tensor):
                state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)


def _local(t: Tensor) -> Tensor:
    part: Tensor = t.to_local() if hasattr(t, "to_local") else t  # of a DTensor
    return part


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
    if group["rounding"] not in _ROUNDINGS:
        close = get_close_matches(str(group["rounding"]), _ROUNDINGS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        msg = f"rounding must be one of {_ROUNDINGS}, got {group['rounding']!r}{hint}"
        raise ValueError(msg)
    if not (isinstance(group["seed"], int) and group["seed"] >= 0):
        msg = f"seed must be an integer >= 0, got {group['seed']!r}"
        raise ValueError(msg)


def _check_state(key: int, state: dict[str, Any], p: Tensor) -> None:
    needed = {"step", "exp_avg", "exp_avg_sq"}
    if state and not needed <= state.keys() <= needed | {"compensation"}:
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
