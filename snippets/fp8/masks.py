"""Which keys a query sees, by Transformer Engine's types of masks and windows.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: NVIDIA, Transformer Engine 2.20.2,
    ``pytorch/attention/dot_product_attention/utils.py`` (Apache-2.0): meaning of the
    types, what a window aligns to.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

import warnings

import torch
from torch import Tensor

__all__ = ["MASK_TYPES", "Masks", "Window", "bottom_right", "check_window", "full_mask"]

MASK_TYPES = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)
Masks = Tensor | tuple[Tensor, Tensor] | None
Window = tuple[int, int]


def check_window(mask_type: str, window: Window | None) -> Window:
    """Return the window that goes with a mask type.

    Args:
        mask_type: one of ``MASK_TYPES``.
        window: keys to the left and right of a query's own, -1 for all; or None.

    Raises:
        ValueError: another mask type, or a window that it cannot have.
    """
    if mask_type not in MASK_TYPES:
        raise ValueError(
            f"attn_mask_type {mask_type!r} is not supported. Supported types are: "
            + ", ".join(repr(t) for t in MASK_TYPES)
        )
    causal = "causal" in mask_type
    free, given = (-1, 0 if causal else -1), window
    if window is None:
        return free
    allowed = "(-1, 0) or (>=0, 0)" if causal else "(-1, -1) or (>=0, >=0)"
    words = f"window_size should be {allowed} for attn_mask_type={mask_type}"
    if causal and (window == (-1, -1) or (window[0] >= 0 and window[1] != 0)):
        warnings.warn(words, stacklevel=3)
        return (window[0], 0)
    if not causal and window == (-1, 0):
        warnings.warn(words, stacklevel=3)
        return free
    if given != free and (
        window[0] < 0 or (window[1] != 0 if causal else window[1] < 0)
    ):
        raise ValueError(f"{words}, it is {window}")
    return window


def bottom_right(mask_type: str, chosen: bool | None) -> bool:
    """Say whether the diagonal of a mask or window ends at the bottom right corner."""
    if mask_type in {"causal", "padding_causal"}:
        return False
    return chosen is None or chosen or mask_type.endswith("bottom_right")


def full_mask(
    queries: int,
    keys: int,
    mask_type: str,
    mask: Masks,
    window: Window,
    bottom: bool,
    device: torch.device,
) -> Tensor | None:
    """Return which keys a query does not see, or None if it sees all.

    Args:
        queries: length of the query sequence.
        keys: length of the key sequence.
        mask_type: one of ``MASK_TYPES``.
        mask: bool, True where masked: [batch, 1, 1, keys] for padding, a pair of them
            (queries, keys) for cross attention, broadcastable to
            [batch, heads, queries, keys] if ``"arbitrary"``.
        window: see :func:`check_window`.
        bottom: align the diagonal to the bottom right corner.
        device: of the result.

    Returns:
        bool, broadcastable to [batch, heads, queries, keys].

    Raises:
        ValueError: padding or arbitrary without a mask.
        TypeError: a mask that is not bool.
    """
    masked: Tensor | None = None
    shift: Tensor | int = keys - queries if bottom else 0
    if "padding" in mask_type or mask_type == "arbitrary":
        if mask is None:
            raise ValueError(f"attn_mask_type={mask_type!r} needs an attention_mask")
        parts = mask if isinstance(mask, tuple) else (mask,)
        for part in parts:
            if part.dtype != torch.bool:
                raise TypeError(
                    f"Attention mask must be in boolean type! It is {part.dtype}."
                )
        masked = parts[0]
        if "padding" in mask_type:
            of_queries, of_keys = parts[0], parts[-1]
            masked = of_queries.squeeze(1).unsqueeze(3) | of_keys
            if bottom:
                seen = ~masked
                lengths = seen[:, 0, 0, :].sum(1) - seen[:, 0, :, 0].sum(1)
                shift = lengths.view(-1, 1, 1, 1)
    if window != (-1, -1):
        left = keys if window[0] == -1 else window[0]
        right = queries if window[1] == -1 else window[1]
        row = torch.arange(queries, device=device).view(1, 1, -1, 1) + shift
        distance = row - torch.arange(keys, device=device)
        outside = (distance > left) | (distance < -right)
        masked = outside if masked is None else masked | outside
    return masked
