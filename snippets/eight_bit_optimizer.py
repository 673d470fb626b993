"""Train with AdamW whose state takes 2 bytes a parameter instead of 8.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

`AdamW8bit` is bitsandbytes' optimizer of that name, in PyTorch alone and so for any
device: each moment is stored as 8-bit codes, with one float32 scale for 256 of them.
`quantize_blockwise`, `dequantize_blockwise` and `create_dynamic_map` are its parts.

    Guide:   guide/eight_bit_optimizer
    Tests:   tests/test_eight_bit_optimizer.py
    Sources: Dettmers et al. 2022, arXiv:2110.02861, sections 1 and 2 (the method);
             Dettmers 2016, arXiv:1511.04561 (the dynamic map);
             Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (AdamW);
             Li et al. 2023, arXiv:2309.01507 (zeros in the second moment);
             bitsandbytes 0.50.2, backends/cpu/ops.py, csrc/cpu_ops.cpp (arithmetic).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "AdamW8bit",
    "create_dynamic_map",
    "dequantize_blockwise",
    "quantize_blockwise",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LOOKUPS = ("nearest", "table")
_TABLE_STEPS = 65535  # of bitsandbytes' table, from -1 to 1
_TINY = 2.0**-100  # a block below this is scaled up first, since 1 / 2**-129 is Inf
_PIECE = 2**20  # values of a parameter whose moments are float32 at one time
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Settings of torch's optimizers which change what their state means.
_PLAIN = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}


def create_dynamic_map(signed: bool = True) -> Tensor:
    """List the values of the 256 codes of the dynamic data type, ascending, float32.

    The bits of a code are a sign, a run of zeros, a one, and a fraction. Each zero more
    divides by ten and leaves one bit less for the fraction, so that a decade has half
    as many values as the one above: the middles of equal cells. Unsigned, the bit of
    the sign goes to the fraction. Two codes are left for 0 and 1; there is no -1.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for zeros in range(7):
        cells = 2 ** (6 - zeros + (not signed))
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**-zeros
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


# Numbers, since a tensor would be useless to fake tensors, and theirs to all others.
_MAPS = {"exp_avg": create_dynamic_map().tolist()}
_MAPS["exp_avg_sq"] = create_dynamic_map(signed=False).tolist()


def quantize_blockwise(
    x: Tensor,
    code: Tensor | None = None,
    block_size: int = 256,
    *,
    lookup: str = "nearest",
) -> tuple[Tensor, Tensor]:
    """Divide each block of ``x`` by its largest magnitude and find the nearest codes.

    A block is ``block_size`` neighbors in logical order, whatever the strides; the last
    may have fewer. The middle between two values of ``code`` gets the lower one. A NaN
    or Inf makes the ``absmax`` of its block NaN, and so all that comes back of it.

    Args:
        x: float32, bfloat16 or float16, any shape.
        code: 2 to 256 ascending values between -1 and 1, float32; the signed dynamic
            map if None.
        block_size: >= 1; at least ``x.numel()`` makes a single block.
        lookup: ``"nearest"`` is exact. ``"table"`` is bit for bit what bitsandbytes
            0.50.2 does on a CPU: a value is rounded to one of 65,536 from -1 to 1
            first, of which none is 0, and a block of zeros has code 0.

    Returns:
        ``codes``, uint8 in the shape of ``x``, and ``absmax``, float32, one a block.

    Raises:
        ValueError: An argument is not allowed; another dtype is a TypeError.

    Example:
        >>> codes, absmax = quantize_blockwise(torch.tensor([0.0, -1.5, 3.0]))
        >>> codes.tolist(), absmax.tolist()
        ([127, 35, 255], [3.0])
        >>> dequantize_blockwise(codes, absmax)
        tensor([ 0.0000, -1.5023,  3.0000])
    """
    _check_dtype("x", x.dtype, *_FLOATS)
    if lookup not in _LOOKUPS:
        close = get_close_matches(str(lookup), _LOOKUPS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"lookup must be one of {_LOOKUPS}, got {lookup!r}{hint}")
    code = _check_code(code, x.device)
    _check_count("block_size", block_size, 1)
    return _quantize(x.detach(), code, block_size, lookup == "table")


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor | None = None,
    block_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Look up each code, multiply by the ``absmax`` of its block, and round to dtype.

    ``code`` and ``block_size`` are those given to `quantize_blockwise`.

    Raises:
        ValueError: ``absmax`` is not one value a block, or what is refused there.
    """
    _check_dtype("codes", codes.dtype, torch.uint8)
    _check_dtype("absmax", absmax.dtype, torch.float32)
    _check_dtype("dtype", dtype, *_FLOATS)
    code = _check_code(code, codes.device)
    _check_count("block_size", block_size, 1)
    if absmax.shape != (count := -(-codes.numel() // block_size),):
        got = tuple(absmax.shape)
        raise ValueError(f"{count} blocks need absmax of shape ({count},), got {got}")
    return _dequantize(codes.detach(), absmax, code, block_size).to(dtype)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with both moments in 8 bits: 2.03 bytes a parameter of state.

    Each step makes the moments float32, for 2**20 values at a time, updates them and
    the weight, and quantizes them again: the first moment with the signed dynamic map,
    the second with the unsigned one. The arithmetic is that of bitsandbytes, but a
    second moment that is not 0 is not stored as 0: the next step divides by its root.

    A parameter of fewer than ``min_8bit_size`` values, or in a group with
    ``"optim_bits": 32``, has float32 moments: with a float32 weight the steps are those
    of `torch.optim.AdamW`, bit for bit. A bfloat16 or float16 weight is rounded to
    nearest, and loses small updates as it does with any optimizer. A NaN or Inf
    gradient makes its weight NaN, as in torch, and the next step all of its block.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer.
        lr: As in `torch.optim.AdamW`, a float or a tensor; finite, >= 0.
        betas: As there, each in [0, 1).
        eps: As there, finite, >= 0.
        weight_decay: As there, finite, >= 0.
        block_size: How many values share a scale, >= 1; for states begun from then on.
        min_8bit_size: Of how many values a parameter has a state in 8 bits, >= 0.
        optim_bits: 8, or 32 for float32 moments; groups may differ.

    Raises:
        ValueError: A setting is out of range, or there are no parameters.
        TypeError: A parameter is not float32, bfloat16 or float16, or is a DTensor.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = AdamW8bit([weight], lr=0.1, weight_decay=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.detach().unique(), optimizer.state[weight]["exp_avg"].dtype
        (tensor([0.9000]), torch.uint8)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        optim_bits: int = 8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"block_size": block_size, "min_8bit_size": min_8bit_size}
        super().__init__(params, defaults | {"optim_bits": optim_bits})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or raise what the constructor raises and add nothing."""  # noqa: DOC501
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        _check_settings(self.defaults | param_group)
        for item in given:
            p = item[1] if isinstance(item, tuple) else item
            _check_dtype("parameters", getattr(p, "dtype", _FLOATS[0]), *_FLOATS)
            if hasattr(p, "to_local"):
                raise TypeError("blocks are not sharded: no DTensor (FSDP2) parameters")
        super().add_param_group({**param_group, "params": given})

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch writes two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take one step, after ``closure`` if there is one, and return its loss.

        Parameters without a gradient stay as they are.

        Raises:
            RuntimeError: A gradient is sparse; no parameter has been changed.
            TypeError: A parameter has another dtype by now; the same.
        """  # noqa: DOC502
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        pairs = [(p, group) for p, group in pairs if p.grad is not None]
        if any(p.grad.is_sparse for p, _ in pairs):
            raise RuntimeError("AdamW8bit does not support sparse gradients")
        for p, _ in pairs:  # of a model made .double() since
            _check_dtype("parameters", p.dtype, *_FLOATS)
        devices = {p.device for p, _ in pairs}
        maps = {device: [_map(k, device) for k in _MOMENTS] for device in devices}
        for p, group in pairs:
            self._update(p, group, maps[p.device])
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], maps: list[Tensor]) -> None:
        state = self.state[p]
        if not state:
            state.update(_new_state(p, group))
        state["step"] += 1
        # Views of what is contiguous, copies of what is not.
        flat = [t.reshape(-1) for t in (p.detach(), p.grad) if t is not None]
        stored = [state[name].view(-1) for name in _MOMENTS]
        if "absmax" not in state:
            _adamw([*flat, *stored], state, group)
        else:
            size, absmax = state["block_size"], list(state["absmax"].values())
            count = max(_PIECE // size, 1)  # blocks at a time
            for first in range(0, len(absmax[0]), count):
                few = slice(first, first + count)
                part = slice(first * size, (first + count) * size)
                old = [(stored[i][part], absmax[i][few]) for i in (0, 1)]
                moments = [_dequantize(*old[i], maps[i], size) for i in (0, 1)]
                _adamw([*(t[part] for t in flat), *moments], state, group)
                for i in (0, 1):
                    _copy(_quantize(moments[i], maps[i], size, floor=i == 1), old[i])
        if not p.is_contiguous():
            p.copy_(flat[0].view(p.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it is, where torch would cast it to the parameter's dtype.

        That of a `torch.optim.AdamW` is taken over, its moments quantized. A state with
        ``amsgrad`` or ``maximize``, of an optimizer of another kind, or for parameters
        of another number or shape is a ValueError, and nothing has been changed.
        """
        final: dict[Tensor, dict[str, Any]] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            groups = [{**self.defaults, **group} for group in given["param_groups"]]
            for own, saved in zip(self.param_groups, groups, strict=False):
                _check_settings(saved)
                for key, p in zip(saved["params"], own["params"], strict=False):
                    if given["state"].get(key):
                        final[p] = _check_saved(key, given["state"][key], p, saved)
            return {**given, "param_groups": groups}

        hook = self.register_load_state_dict_pre_hook(check)  # runs after all others
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self.state.update(final)


def _quantize(
    x: Tensor, code: Tensor, size: int, by_table: bool = False, floor: bool = False
) -> tuple[Tensor, Tensor]:
    size = min(size, max(x.numel(), 1))
    blocks = F.pad(x.reshape(-1).float(), (0, -x.numel() % size)).view(-1, size)
    absmax = blocks.abs().amax(1)  # [blocks]
    absmax.masked_fill_(absmax.isinf(), math.nan)
    up = torch.where(absmax < _TINY, 1 / _TINY, 1.0)  # a power of two costs no bit
    inverse = torch.where(absmax == 0, 0.0, 1 / (absmax * up))
    scaled = blocks * up[:, None] * inverse[:, None]  # [blocks, size]
    middles = (code[:-1] + code[1:]) / 2
    if by_table:
        steps = torch.arange(_TABLE_STEPS + 1, dtype=torch.float32, device=x.device)
        table = torch.bucketize(2 * steps / _TABLE_STEPS - 1, middles)
        place = (scaled.clamp(-1, 1) + 1).double() * (_TABLE_STEPS / 2) + 0.5
        codes = table[place.float().nan_to_num().int()] * (absmax != 0)[:, None]
    else:
        codes = torch.bucketize(scaled, middles, out_int32=True)
    if floor:  # a divisor: what is not 0 shall not become 0
        codes = codes.maximum((scaled > 0).to(codes.dtype))
    codes = codes.to(torch.uint8).view(-1)[: x.numel()]
    return codes.view(x.shape), absmax


def _dequantize(codes: Tensor, absmax: Tensor, code: Tensor, size: int) -> Tensor:
    size = min(size, max(codes.numel(), 1))
    padded = F.pad(codes.reshape(-1), (0, -codes.numel() % size)).view(-1, size)
    values = code.take(padded.long()) * absmax[:, None]  # [blocks, size]
    return values.view(-1)[: codes.numel()].view(codes.shape)


def _adamw(tensors: list[Tensor], state: dict[str, Any], group: dict[str, Any]) -> None:
    weight, grad, exp_avg, exp_avg_sq = tensors
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    grad, wide = grad.float(), weight.float()
    wide.mul_(1 - lr * group["weight_decay"])
    if "absmax" in state:  # the last bit is bitsandbytes'
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    else:  # or torch's
        exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction = math.sqrt(1 - beta2 ** state["step"])
    root = exp_avg_sq.sqrt().div_(correction).add_(group["eps"])
    wide.addcdiv_(exp_avg, root, value=-lr / (1 - beta1 ** state["step"]))
    weight.copy_(wide)  # nothing, where it is that tensor


def _copy(given: Iterable[Tensor], own: Iterable[Tensor]) -> None:
    for source, target in zip(given, own, strict=True):
        target.copy_(source)


def _map(moment: str, device: torch.device) -> Tensor:
    return torch.tensor(_MAPS[moment], dtype=torch.float32, device=device)


def _new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    narrow = group["optim_bits"] == 8 and p.numel() >= group["min_8bit_size"]
    dtype, size = torch.uint8 if narrow else torch.float32, group["block_size"]
    state = {name: p.new_zeros(p.shape, dtype=dtype) for name in _MOMENTS}
    if not narrow:
        return {"step": 0, **state}
    # In a dict as in bitsandbytes: FSDP1 and others expect tensors in the shape of p.
    one = p.new_zeros(-(-p.numel() // size), dtype=torch.float32)
    absmax = {name: one.clone() for name in _MOMENTS}
    return {"step": 0, **state, "absmax": absmax, "block_size": size}


def _stored(state: dict[str, Any], name: str) -> list[Tensor]:
    return [state[name], *(state["absmax"][name] for _ in state.keys() & {"absmax"})]


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _check_dtype(name: str, dtype: torch.dtype, *allowed: torch.dtype) -> None:
    if dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"{name} must be {names}, got {dtype}")


def _check_code(code: Tensor | None, device: torch.device) -> Tensor:
    if code is None:
        return _map("exp_avg", device)
    _check_dtype("code", code.dtype, torch.float32)
    if code.ndim != 1 or not 2 <= len(code) <= 256:
        raise ValueError(f"code must be 2 to 256 values, got {tuple(code.shape)}")
    if not (-1 <= code[0] <= code[-1] <= 1 and (code.diff() >= 0).all()):
        raise ValueError("code must ascend, and lie between -1 and 1")
    return code.to(device)


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:  # also refuses NaN
            raise ValueError(f"{name} must be finite and >= 0, got {group[name]}")
    if len(group["betas"]) != 2 or not all(0 <= b < 1 for b in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    _check_count("block_size", group["block_size"], 1)
    _check_count("min_8bit_size", group["min_8bit_size"], 0)
    if group["optim_bits"] not in (8, 32):
        raise ValueError(f"optim_bits must be 8 or 32, got {group['optim_bits']!r}")
    for name, wanted in _PLAIN.items():
        if group.get(name, wanted) != wanted:
            raise ValueError(f"a state with {name}={not wanted} cannot be continued")


def _check_saved(
    key: int, saved: dict[str, Any], p: Tensor, group: dict[str, Any]
) -> dict[str, Any]:
    needed = {"step", *_MOMENTS}
    if saved.keys() not in (needed, needed | {"absmax", "block_size"}):
        msg = f"parameter {key} needs state {sorted(needed)}, got {sorted(saved)}"
        raise ValueError(msg)
    if not saved["step"] >= 0:  # also refuses NaN
        raise ValueError(f"step of parameter {key} must be >= 0, got {saved['step']}")
    narrow = "absmax" in saved
    if narrow:
        _check_count(f"block_size of parameter {key}", saved["block_size"], 1)
        if saved["absmax"].keys() != set(_MOMENTS):
            names = sorted(saved["absmax"])
            msg = f"absmax of parameter {key} must be of {_MOMENTS}, got {names}"
            raise ValueError(msg)
        group = group | {"optim_bits": 8, "min_8bit_size": 0}
        group["block_size"] = saved["block_size"]
    state = _new_state(p, group) | {"step": int(saved["step"])}
    for name in _MOMENTS:
        old, new = _stored(saved, name), _stored(state, name)
        if len(old) < len(new) and old[0].shape == p.shape:
            args = old[0].to(p.device), _map(name, p.device), state["block_size"]
            old = [*_quantize(*args, floor=name == "exp_avg_sq")]
        for source, target in zip(old, new, strict=False):
            cast = narrow and source.dtype != target.dtype
            if cast or source.shape != target.shape:
                got, want = (f"{t.dtype} {tuple(t.shape)}" for t in (source, target))
                raise ValueError(f"{name} of parameter {key} is {got}, not {want}")
        _copy(old, new)
    return state
