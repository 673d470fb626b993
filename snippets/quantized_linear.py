"""Store linear layers in 4 or 8 bits as bitsandbytes does, bit for bit, in plain torch.

Copy this file into your project; it needs only ``torch`` (2.6 or newer).

`quantize_model` replaces the ``nn.Linear`` layers of a model by `QuantizedLinear`;
`quantize_4bit`, `quantize_int8` and their inverses do it to tensors.

    Guide:   guide/quantized_layers
    Tests:   tests/test_quantized_linear.py
    Sources: Dettmers et al. 2023, arXiv:2305.14314, section 3 (NF4, QLoRA);
             Dettmers et al. 2022, arXiv:2208.07339, sections 2 and 3 (LLM.int8());
             Dettmers et al. 2022, arXiv:2110.02861, section 1.3 (the 8-bit codebook);
             bitsandbytes 0.50.2, backends/default/ops.py and csrc/cpu_ops.cpp.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx

__all__ = ["CODEBOOKS", "MODES", "DoubleQuantized", "QuantizedLinear"]
__all__ += ["dequantize_4bit", "dequantize_int8", "quantize_4bit", "quantize_int8"]
__all__ += ["quantize_model"]

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
_FP4 = [sign * v for sign in (1, -1) for v in (0, 1 / 16, 8, 12, 4, 6, 2, 3)]
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # no set default's
CODEBOOKS = {
    "nf4": torch.tensor(_NF4, **_PLAIN),  # by code
    "fp4": torch.tensor(_FP4, **_PLAIN).div(12),
}
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 2**20  # values at a time: what is between the steps stays in the cache
_ROUNDS = 1.5 * 2.0**23  # plus this, a small float32 is rounded, halves to even
_Module = TypeVar("_Module", bound=nn.Module)


def _need(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


def _choose(name: str, value: object, allowed: Collection[object]) -> None:
    if any(type(a) is type(value) and a == value for a in allowed):
        return
    names = [a for a in allowed if isinstance(a, str)]
    near = get_close_matches(str(value), names, 1, 0)  # the nearest, however far
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}{hint}")


def _check_values(x: Tensor) -> None:
    known = x.dtype in _FLOATS
    _need(known, f"needs float32, float16 or bfloat16, got {x.dtype}", TypeError)
    _need(not x.is_meta, "the meta device holds no values to quantize")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 fails where it is empty


def _check_threshold(threshold: float) -> None:
    good = 0 <= threshold < math.inf
    _need(good, f"threshold must be 0 or more, and finite, got {threshold}")


class DoubleQuantized(NamedTuple):
    """The absmax of 4-bit blocks, itself in 8 bits, and a number for 256 of them."""

    codes: Tensor  # uint8
    absmax: Tensor  # float32, the largest magnitude of 256 without the offset
    offset: Tensor  # float32, the mean; it has no dimension

    def dequantize(self) -> Tensor:
        """Return the absmax of each 4-bit block, in float32."""
        values = _DYNAMIC.to(self.codes.device)[self.codes.int()]
        scales = self.absmax.repeat_interleave(256)[: len(values)]
        return values.mul_(scales).add_(self.offset)


@torch.no_grad()
def quantize_4bit(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
) -> tuple[Tensor, Tensor | DoubleQuantized]:
    """Quantize to 4 bits, in blocks that run through the flattened weight.

    A value is divided by the largest magnitude of its block and becomes the nearest
    value of the codebook, halfway between two the lower one. The last block may be
    shorter. A block of zeros decodes to zeros, -0 to 0; Inf and NaN are refused, a
    weight without elements is not.

    Args:
        weight: float32, float16 or bfloat16, of any shape.
        quant_type: "nf4", or "fp4", which is bitsandbytes' own and not E2M1.
        block_size: How many values share an absmax, a power of two from 32 to 4096.
        double_quant: Quantize the absmax as well.

    Returns:
        The codes, uint8 ``[(numel + 1) // 2, 1]``, two in a byte, the first in the high
        four bits; and the absmax, float32 ``[blocks]``, or its `DoubleQuantized` form.
    """
    _choose("quant_type", quant_type, CODEBOOKS)
    _choose("block_size", block_size, _BLOCK_SIZES)
    _check_values(weight)
    flat = weight.detach().reshape(-1)
    numel, full = len(flat), len(flat) - len(flat) % block_size
    codes = flat.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = flat.new_empty(-(-numel // block_size), dtype=torch.float32)
    work = flat.new_empty(min(full, _CHUNK), dtype=torch.float32)
    for start in range(0, full, _CHUNK):
        part = flat[start : min(start + _CHUNK, full)].view(-1, block_size)
        scaled = work[: part.numel()].view_as(part)
        top = absmax[start // block_size :][: len(part)]
        torch.amax(scaled.copy_(part).abs_(), 1, out=top)
        torch.mul(part, (1.0 / top.clamp(min=1e-38))[:, None], out=scaled)
        _encode(scaled.view(-1), quant_type, codes[start // 2 :][: part.numel() // 2])
    if full < numel:  # here bitsandbytes divides, and keeps what it divides by
        rest = flat[full:].float()
        absmax[-1] = rest.abs().amax().clamp(min=1e-38)
        rest = F.pad(rest / absmax[-1], (0, numel % 2))
        _encode(rest, quant_type, codes[full // 2 :])
    _need(bool(absmax.isfinite().all()), "the weight holds Inf or NaN")
    return codes[:, None], _quantize_absmax(absmax) if double_quant else absmax


def _encode(scaled: Tensor, quant_type: str, out: Tensor) -> None:
    """Count the midpoints below each value: its place in the sorted codebook."""
    values, order = CODEBOOKS[quant_type].sort(stable=True)
    hit = torch.empty_like(scaled, dtype=torch.bool)
    place = torch.zeros_like(scaled, dtype=torch.uint8)
    for midpoint in ((values[:-1] + values[1:]) / 2).tolist():
        place += torch.gt(scaled, midpoint, out=hit).view(torch.uint8)
    torch.add(place[1::2], place[::2], alpha=16, out=out)
    if quant_type == "fp4":  # its codes are not in the order of its values
        pairs = (order[:, None] * 16 + order).view(-1).to(out)
        out.copy_(pairs[out.int()])


@torch.no_grad()
def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor | DoubleQuantized,
    shape: Sequence[int] | None = None,
    quant_type: str = "nf4",
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Look up the codes, multiply by absmax in float32, and round to ``dtype``.

    ``codes``, ``absmax``, ``quant_type`` and ``block_size`` are those of
    `quantize_4bit`. Without ``shape`` the result is flat, two values for each byte.
    """
    _choose("quant_type", quant_type, CODEBOOKS)
    _choose("block_size", block_size, _BLOCK_SIZES)
    good = codes.dtype == torch.uint8 and dtype.is_floating_point
    _need(good, f"needs uint8 codes, a float dtype: {codes.dtype}, {dtype}", TypeError)
    scales = absmax.dequantize() if isinstance(absmax, DoubleQuantized) else absmax
    flat, scales = codes.reshape(-1), scales.reshape(-1)
    shape = [2 * len(flat)] if shape is None else shape
    numel, has = math.prod(shape), [len(flat), scales.numel()]
    wants = [(numel + 1) // 2, -(-numel // block_size)]
    _need(has == wants, f"{[*shape]} takes {wants} codes and absmax, got {has}")
    book = CODEBOOKS[quant_type].to(flat.device)
    pairs = torch.stack([book.repeat_interleave(16), book.repeat(16)], 1)
    table = pairs.view(torch.float64).view(-1)  # a byte's two values are found at once
    # All threads write zeros first: getting the memory takes longer than all the rest.
    out = torch.zeros(2 * len(flat), dtype=dtype, device=flat.device)
    sizes = {flat: _CHUNK // 2, out: _CHUNK, scales: _CHUNK // block_size}
    parts = [torch.split(tensor, size) for tensor, size in sizes.items()]
    for byte, part, top in zip(*parts, strict=True):
        values = part if dtype == torch.float32 else torch.empty_like(part).float()
        found = values.view(torch.float64)
        if torch.get_num_threads() <= 2:  # faster, but it runs on one
            torch.index_select(table, 0, byte.int(), out=found)
        else:
            torch.take(table, byte.long(), out=found)
        full = len(part) - len(part) % block_size
        values[:full].view(-1, block_size).mul_(top[: full // block_size, None])
        if full < len(part):
            values[full:].mul_(top[-1])
        if values is not part:
            part.copy_(values)
    return out[:numel].view([*shape])


def _dynamic_codebook() -> Tensor:
    """Return 0, 1, and ± the middles of 2**i equal parts of the decade i - 6."""
    edges = [torch.linspace(0.1, 1, 2**i + 1, **_PLAIN) for i in range(7)]
    middles = [10 ** (i - 6) * ((e[:-1] + e[1:]) / 2) for i, e in enumerate(edges)]
    found = torch.cat(middles)
    return torch.cat([-found, found, torch.tensor([0.0, 1.0], **_PLAIN)]).sort().values


_DYNAMIC = _dynamic_codebook()


def _quantize_absmax(absmax: Tensor) -> DoubleQuantized:
    """Find nearly the nearest in a table of 65,536 steps, as bitsandbytes' CPU does."""
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    blocks = F.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
    top = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / top)[:, None]).clamp_(-1, 1).add_(1).mul_(0.5)
    index = scaled.mul_(65535).add_(0.5).nan_to_num_(0).int()  # NaN: 256 zeros
    steps = torch.arange(65536, **_PLAIN) * 2 / 65535 - 1
    middles = (_DYNAMIC[:-1] + _DYNAMIC[1:]) * 0.5
    table = torch.bucketize(steps, middles).to(torch.uint8)
    codes = table.to(absmax.device)[index]
    return DoubleQuantized(codes.view(-1)[: len(absmax)], top, offset)


@torch.no_grad()
def quantize_int8(
    x: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row to signed integers, its largest magnitude to 127.

    Halves round to even. A row of zeros, or so small that 127 / absmax overflows,
    becomes zeros. A row with Inf or NaN has that as absmax, and so decodes to NaN.

    Args:
        x: float32, float16 or bfloat16; the last dimension is a row.
        threshold: Above 0, a column with a magnitude of this or more is an outlier
            column: it becomes zeros, and those magnitudes count in no absmax.

    Returns:
        The codes, int8, shaped as ``x``; absmax, float32 ``[rows]``; and the outlier
        columns, int64, or None where ``threshold`` is 0.
    """
    _check_values(x)
    _need(x.ndim > 0, "a number without dimensions has no rows")
    _check_threshold(threshold)
    rows = _rows(x.detach())
    columns = None
    if threshold > 0:
        outliers = rows.abs() >= threshold
        columns = outliers.any(0).nonzero().view(-1)
        rows = rows.masked_fill(outliers, 0) if len(columns) else rows
    codes = torch.zeros_like(rows, dtype=torch.int8)
    absmax = rows.new_zeros(len(rows), dtype=torch.float32)
    step = max(1, _CHUNK // max(1, x.shape[-1]))
    work = torch.empty_like(rows[:step], dtype=torch.float32)
    for start in range(0, len(rows) if x.numel() else 0, step):
        part, top = rows[start : start + step], absmax[start : start + step]
        scaled = work[: len(part)]
        torch.amax(scaled.copy_(part).abs_(), 1, out=top)
        scale = (127.0 / top).nan_to_num_(0, posinf=0)
        torch.mul(part, scale[:, None], out=scaled).nan_to_num_(0)
        scaled.add_(_ROUNDS).sub_(_ROUNDS)
        codes[start : start + step] = scaled
    if columns is not None:
        codes[:, columns] = 0
    return codes.view(x.shape), absmax, columns


@torch.no_grad()
def dequantize_int8(
    codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return codes * absmax / 127 of each row, computed in float32, in ``dtype``.

    What float32 cannot hold times 127, and no float16 weight has, becomes Inf.
    """
    good = codes.dtype == torch.int8 and dtype.is_floating_point
    _need(good, f"needs int8 codes, a float dtype: {codes.dtype}, {dtype}", TypeError)
    has, wants = absmax.numel(), math.prod(codes.shape[:-1])
    _need(has == wants, f"{[*codes.shape]} takes {wants} absmax, got {has}")
    _need(codes.ndim > 0, "a number without dimensions has no rows")
    rows, absmax = _rows(codes), absmax.reshape(-1)
    out = torch.empty_like(rows, dtype=dtype)
    step = max(1, _CHUNK // max(1, rows.shape[-1]))
    for start in range(0, wants, step):
        values = rows[start : start + step] * absmax[start : start + step, None]
        torch.mul(values, 1 / 127, out=out[start : start + step])
    return out.view(codes.shape)


class _Product(Function):
    """Multiply by a stored weight; backward decodes it again, so that none is kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        layer: "QuantizedLinear",
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *stored: Tensor,
    ) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        ctx.save_for_backward(*stored, *([] if weight is None else [x]))
        return layer._multiply(x, bias, stored)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, saved = ctx.layer, ctx.saved_tensors  # type: ignore[attr-defined]
        _, of_x, of_weight, of_bias, *stored = ctx.needs_input_grad  # type: ignore[attr-defined]
        rows = _rows(grad)
        return (
            None,
            grad @ layer._decode(saved, grad.dtype) if of_x else None,
            rows.t() @ _rows(saved[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
            *[None] * len(stored),
        )


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is 4-bit or 8-bit codes.

    The 4-bit modes, "nf4", "fp4" and doubly quantized "nf4-dq", "fp4-dq", multiply by
    the decoded weight in the dtype of the input, or of autocast. "int8" is LLM.int8():
    rows of the weight and of the input go through float16 to int8, products are summed
    in int32, and the outlier columns of the input are multiplied in float32. In these
    the weight is frozen; gradients reach the input, by the decoded weight, and the
    bias. "int8-training" has the weight as a parameter, quantizes it in each forward,
    and gives it the gradient of the product without rounding.

    ``weight`` is decoded when it is read. ``.to`` a dtype changes that of the decoded
    weight and the bias, never codes or absmax. `load_state_dict` takes what this mode
    saved, or a float weight, which it quantizes.

    Args:
        linear: An ``nn.Linear`` itself, not of a subclass, without hooks, with a weight
            that is finite (for int8 in float16, too). Its bias is shared, not copied.
        mode: One of ``MODES``.
        block_size: As for `quantize_4bit`; no matter to int8.
        threshold: As for `quantize_int8` of the input; no matter to 4 bits.

    Example:
        >>> layer = QuantizedLinear.from_linear(nn.Linear(64, 64), mode="nf4")
        >>> layer(torch.ones(2, 64)).shape, layer.codes.nbytes, layer.absmax.nbytes
        (torch.Size([2, 64]), 2048, 256)
    """

    codes: Tensor
    absmax: Tensor
    bias: nn.Parameter | None
    _like: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        mode: str = "nf4",
        block_size: int = 64,
        threshold: float = 6.0,
    ) -> None:
        super().__init__()
        _choose("mode", mode, MODES)
        _choose("block_size", block_size, _BLOCK_SIZES)
        _check_threshold(threshold)
        plain = type(linear) is nn.Linear and "weight" in linear._parameters
        name = f"{type(linear).__module__}.{type(linear).__name__}"
        _need(plain, f"needs an nn.Linear, not parametrized, got {name}", TypeError)
        hooks = [k[1:] for k, v in vars(linear).items() if k.endswith("_hooks") and v]
        _need(not hooks, f"the layer has {', '.join(hooks)}, which would be lost")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.mode, self.block_size, self.threshold = mode, block_size, threshold
        self.training = linear.training
        like = linear.weight.detach()[:0].clone()
        self.register_buffer("_like", like, persistent=False)  # its dtype is weight's
        stored = self._quantize(linear.weight)
        if mode == "int8-training":
            self._parameters["weight"] = linear._parameters["weight"]
        else:
            for name, tensor in stored.items():
                self.register_buffer(name, tensor)
        self.register_parameter("bias", linear.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mode: str = "nf4", **settings: Any) -> Self:  # noqa: ANN401
        """Return the layer that replaces ``linear``; its arguments are the class's."""
        return cls(linear, mode, **settings)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, or in the mode "int8-training" the parameter."""
        trained = self._parameters.get("weight")
        if trained is not None:
            return trained
        return self._decode(self._stored(), self._like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, in the dtype of x, or of autocast."""
        good = x.is_floating_point() and x.shape[-1:] == (self.in_features,)
        got = f"{x.dtype} {[*x.shape]}"
        _need(good, f"needs floats of shape [..., {self.in_features}], got {got}")
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self._parameters.get("weight")
        parts = (self, x.to(dtype), weight, bias, *self._stored())
        return cast(Tensor, _Product.apply(*parts))  # type: ignore[no-untyped-call]

    def _stored(self) -> list[Tensor]:
        if self.mode == "int8-training":
            return [*quantize_int8(self.weight.to(torch.float16))[:2]]
        return [b for b in self.buffers() if b is not self._like]

    def _quantize(self, weight: Tensor) -> dict[str, Tensor]:
        _check_values(weight)
        if self.mode.startswith("int8"):
            few = self.in_features * 127**2 < 2**31
            _need(few, f"int32 cannot sum {self.in_features} products")
            codes, absmax, _ = quantize_int8(weight.to(torch.float16))
            finite = bool(absmax.isfinite().all())
            _need(finite, "the weight holds Inf or NaN, or exceeds float16")
            return {"codes": codes, "absmax": absmax}
        quant_type, _, double = self.mode.partition("-")
        codes, scales = quantize_4bit(weight, quant_type, self.block_size, bool(double))
        if isinstance(scales, Tensor):
            return {"codes": codes, "absmax": scales}
        names = ("absmax", "nested_absmax", "nested_offset")  # those of bitsandbytes
        return {"codes": codes} | dict(zip(names, scales, strict=True))

    def _decode(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes, absmax, *nested = stored
        if codes.dtype == torch.int8:
            return dequantize_int8(codes, absmax, dtype)
        scales = DoubleQuantized(absmax, *nested) if nested else absmax
        shape, kind = (self.out_features, self.in_features), self.mode[:3]
        return dequantize_4bit(codes, scales, shape, kind, self.block_size, dtype)

    def _multiply(
        self, x: Tensor, bias: Tensor | None, stored: Sequence[Tensor]
    ) -> Tensor:
        if not self.mode.startswith("int8"):
            return F.linear(x, self._decode(stored, x.dtype), bias)
        codes, absmax = stored
        rows = _rows(x)
        x8, tops, columns = quantize_int8(rows.to(torch.float16), self.threshold)
        if x.device.type == "cpu":
            sums = torch._int_mm(x8, codes.t())
        else:  # where that wants certain sizes; float64 is as exact
            sums = x8.double() @ codes.double().t()
        y = sums * (tops[:, None] * absmax) / 127**2
        if columns is not None and len(columns):
            outer = dequantize_int8(codes[:, columns], absmax)
            y += rows[:, columns].float() @ outer.t()
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: b for name, b in self.named_buffers() if b is not self._like}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():  # .to a dtype would round absmax
            new = self.get_buffer(name)
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Say what ``print`` shows in the brackets."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, mode={self.mode!r}"

    def get_extra_state(self) -> Tensor:
        """Return the mode and block size as bytes, for the state dict."""
        size = "" if self.mode.startswith("int8") else f", blocks of {self.block_size}"
        return torch.tensor(
            [*f"{self.mode}{size}".encode()], dtype=torch.uint8, device="cpu"
        )

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: it was compared before anything was loaded."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *args: Any,  # noqa: ANN401
    ) -> None:
        own, key = self.get_extra_state(), f"{prefix}_extra_state"
        saved, weight = state_dict.get(key), state_dict.get(f"{prefix}weight")
        if saved is not None and saved.tolist() != own.tolist():
            has, needs = (bytes(t.tolist()).decode() for t in (saved, own))
            args[-1].append(f"{prefix}codes are of {has}, but the layer is {needs}")
            return
        if saved is None and weight is not None:  # that of an nn.Linear
            state_dict = {**state_dict, key: own}
            if self.mode != "int8-training":
                weight = state_dict.pop(f"{prefix}weight")
                want, got = [self.out_features, self.in_features], [*weight.shape]
                try:
                    _need(got == want, f"size mismatch: {got}, in the layer {want}")
                    found = self._quantize(weight)
                except (TypeError, ValueError) as error:
                    args[-1].append(f"{prefix}weight: {error}")
                    return
                state_dict |= {prefix + name: tensor for name, tensor in found.items()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantize_model(
    model: _Module,
    mode: str = "nf4",
    ignore_modules: Collection[str] = (),
    block_size: int = 64,
    threshold: float = 6.0,
) -> _Module:
    """Replace, in place, each ``nn.Linear`` of a model by a `QuantizedLinear`.

    All else stays: other modules, subclasses of ``nn.Linear``, biases, the training
    flag. Linear layers that share a weight share its codes. After an error the model is
    as it was.

    Args:
        model: Has an ``nn.Linear`` to quantize, and no layer that is quantized already.
        mode: One of ``MODES``.
        ignore_modules: Full names of linear layers to leave alone, or patterns of
            `fnmatch`, as in "head" or "decoder.*"; each must match a layer.
        block_size: As for `quantize_4bit`.
        threshold: As for `quantize_int8`.

    Returns:
        The model. Refused is a weight that is shared with a module that stays, such as
        an embedding: ignore that layer. In the mode "int8-training" it stays shared.

    Raises:
        TypeError: ``ignore_modules`` is a string, or a layer's weight in no fit dtype.
        ValueError: Any other reason not to quantize, which the message names.
    """
    several = not isinstance(ignore_modules, str)
    _need(several, f"ignore_modules is one name, {ignore_modules!r}", TypeError)
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {name: m for name, m in modules.items() if type(m) is nn.Linear}
    for name, module in modules.items():
        again = isinstance(module, QuantizedLinear)
        _need(not again, f"{name or 'the model'} is quantized already")
    _need("" not in linears, "the model is one layer: use QuantizedLinear.from_linear")
    _need(bool(linears), f"{type(model).__name__} has no nn.Linear to quantize")
    ignored = set()
    for pattern in ignore_modules:
        found = [name for name in linears if fnmatchcase(name, pattern)]
        inside = [name for name in linears if name.startswith(f"{pattern}.")]
        near = [f"{pattern}.*"] if inside else get_close_matches(pattern, linears, 1, 0)
        text = f"{pattern!r} of ignore_modules is the name of no nn.Linear"
        _need(bool(found), f"{text}; did you mean {near[0]!r}?")
        ignored |= {id(linears[name]) for name in found}
    chosen = {name: m for name, m in linears.items() if id(m) not in ignored}
    _need(bool(chosen), "ignore_modules matches every nn.Linear")
    owners = {id(m.weight): name for name, m in chosen.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        stays = id(parameter) in owners and (owner not in chosen or leaf != "weight")
        layer = owners.get(id(parameter))
        text = f"{layer}.weight is {name}, which stays: add {layer!r} to ignore_modules"
        _need(not stays or mode == "int8-training", text)
    made: dict[int, QuantizedLinear] = {}
    for name, linear in chosen.items():
        try:
            new = QuantizedLinear(linear, mode, block_size, threshold)
        except (TypeError, ValueError) as error:
            error.add_note(f"in the layer {name!r}")
            raise
        first = made.setdefault(id(linear.weight), new)
        new._buffers.update(first._buffers)
        made.setdefault(id(linear), new)
    for name, linear in chosen.items():
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, made[id(linear)])
    return model
