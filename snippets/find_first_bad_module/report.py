"""What is said of the first NaN or Inf: the report, its ranges and its words."""

import math
from dataclasses import dataclass

import torch

from .calls import Call


@dataclass(frozen=True)
class TensorRange:
    """What a tensor held: its finite range, and how many values are not finite."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    low: float = math.nan  # smallest finite value; NaN where there is none
    high: float = math.nan
    nan: int = 0
    posinf: int = 0
    neginf: int = 0

    def __str__(self) -> str:
        counts = {"NaN": self.nan, "+Inf": self.posinf, "-Inf": self.neginf}
        parts = [f"{n} {name}" for name, n in counts.items() if n]
        if not math.isnan(self.low):
            parts.insert(0, f"{self.low:.4g} to {self.high:.4g}")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {list(self.shape)} {', '.join(parts)}"


@dataclass(frozen=True)
class BadModule:
    """Where the first NaN or Inf that did harm came from.

    Attributes:
        module: Path of the module, "" for the model, "(outside)" for none. In backward
            it is the module whose forward operation is differentiated.
        module_type: Its class, as ``Linear``; "" where none ran.
        operation: As ``aten.addmm``; or what held the value before the block.
        phase: "forward", "backward" or "step" (the optimizer's); "input" or "parameter"
            (buffers, older gradients) where the value was there before the block.
        inputs: Ranges of the operation's floating-point tensors before it ran.
        output: Range of its first result that is not finite.
        backward_of: In backward, the forward operation that is differentiated.
        line: Where your program called the (forward) operation.
        in_wider_dtype: Largest magnitude of that result if computed in float32 (float64
            for a float32 one) from the same inputs; None where that cannot be told.
        message: All this in words.
    """

    module: str
    module_type: str
    operation: str
    phase: str
    inputs: tuple[TensorRange, ...]
    output: TensorRange
    backward_of: str = ""
    line: str = ""
    in_wider_dtype: float | None = None
    message: str = ""

    def __str__(self) -> str:
        return self.message


def made_by(
    call: Call, inputs: tuple[TensorRange, ...], output: TensorRange
) -> BadModule:
    """Report that an operation made values that are not finite."""
    module, kind = call.module
    counts = {"NaN": output.nan, "Inf": output.posinf + output.neginf}
    made = " and ".join(f"{n} {value}" for value, n in counts.items() if n)
    of = f" (backward of {call.backward_of})" if call.backward_of else ""
    where = f"{module!r}, {kind}" if kind else repr(module)
    given = "; ".join(map(str, inputs)) or "no floating-point tensor"
    message = f"{call.phase}: {call.name}{of} in {where}: made {made} of {given}"
    return BadModule(
        module, kind, call.name, call.phase, inputs, output, call.backward_of,
        call.line, None, message,
    )  # fmt: skip


def why(wider: float | None, dtype: torch.dtype, phase: str) -> str:
    """Say whether the range of the dtype is the cause."""
    name, ends = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    other = "float32" if dtype.itemsize < 4 else "float64"
    if wider is None or dtype == torch.float64:
        return ""
    if not math.isfinite(wider):
        scale = "; no loss scale cures it" if phase == "backward" else ""
        return f"; in {other} it is not finite either{scale}"
    if wider <= ends:  # a divisor that is 0 in the narrow dtype, say
        return f"; in {other} it is finite, at most {wider:.4g}"
    scale = ""
    if phase == "backward" and dtype == torch.float16:  # it is linear in the scale
        times = 2 ** math.ceil(math.log2(wider / ends))
        scale = f"; a loss scale {times} times lower cures it"
    return f"; {name} ends at {ends:.5g}, in {other} the largest is {wider:.4g}{scale}"
