"""The largest magnitudes of FP8 tensors: what goes in, and Transformer Engine's own."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .tensors import floats, or_none

# What Transformer Engine's amax history holds for each matrix product.
_KINDS = {
    "scaling_fwd": ("input", "weight", "output"),
    "scaling_bwd": ("grad_output", "grad_input"),
}


class Amax:
    """Of a step: by module and kind of tensor, ``0.input``."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def see(self, name: str, things: object) -> None:
        """Take the amax of the first float tensor; of several calls, the largest."""
        tensor = next(iter(floats(things)), None)
        if tensor is not None:
            amax, before = tensor.detach().abs().amax(), self.seen.get(name)
            self.seen[name] = amax if before is None else torch.maximum(before, amax)

    def read(self, model: nn.Module) -> dict[str, float | None]:
        """Return what was seen, and what the modules' histories say of more."""
        seen = {name: amax.item() for name, amax in self.seen.items()}
        return {n: or_none(amax) for n, amax in (seen | dict(_history(model))).items()}


def _history(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the newest amax of Transformer Engine's FP8 tensors, delayed scaling's."""
    for name, module in model.named_modules():
        for key, kinds in _KINDS.items():
            meta = getattr(module, "fp8_meta", {})
            history = getattr(meta.get(key), "amax_history", None)
            if history is None:
                continue
            # Row 0 is being filled; once the scale is updated, the last row is newest.
            newest = torch.where(history[0] > 0, history[0], history[-1]).tolist()
            for i, amax in enumerate(newest):
                part = f"gemm{i // len(kinds)}." if len(newest) > len(kinds) else ""
                if amax:
                    yield f"{name}.{part}{kinds[i % len(kinds)]}", amax
