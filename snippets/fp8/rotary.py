"""Transformer Engine's rotary position embedding, on any device.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: Su et al. 2021, arXiv:2104.09864, section 3.4;
    NVIDIA, Transformer Engine 2.20.2, ``pytorch/attention/rope.py`` (Apache-2.0):
    signature, which channels pair.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

from typing import Any

import torch
from torch import Tensor, nn

from .base import resolve_device

__all__ = ["RotaryPositionEmbedding", "apply_rotary_pos_emb"]


class RotaryPositionEmbedding(nn.Module):
    """Angles by which pairs of channels are turned: position over ``base**(2i / dim)``.

    Args:
        dim: channels of a head.
        rotary_percent: part of them that is turned.
        seq_len_interpolation_factor: divide positions by it.
        pretrained_max_position_embeddings: with the factor: the length trained for.
        rotary_base: the base.
        interleaved: pair neighbors, not the two halves.

    Example:
        >>> RotaryPositionEmbedding(4)(max_seq_len=8).shape
        torch.Size([8, 1, 1, 4])
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        rotary_percent: float = 1.0,
        seq_len_interpolation_factor: int | None = None,
        pretrained_max_position_embeddings: int | None = None,
        rotary_base: float = 10000.0,
        interleaved: bool = False,
    ) -> None:
        """Compute the frequencies."""
        super().__init__()
        if rotary_percent < 1.0:
            dim = int(dim * rotary_percent)
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        self.pretrained_max_position_embeddings = pretrained_max_position_embeddings
        self.rotary_base = rotary_base
        self.interleaved = interleaved
        where = resolve_device("cuda")
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=where) / dim
        self.register_buffer("inv_freq", 1.0 / rotary_base**exponent)

    def forward(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Return the angles of ``max_seq_len`` positions from ``offset``.

        Returns:
            float32, [max_seq_len, 1, 1, dim].
        """
        with torch.autocast(self.inv_freq.device.type, enabled=False):
            kwargs: dict[str, Any] = {"device": self.inv_freq.device}
            position = torch.arange(max_seq_len, dtype=self.inv_freq.dtype, **kwargs)
            position = position + offset
            trained = self.pretrained_max_position_embeddings
            factor = self.seq_len_interpolation_factor
            if trained is not None and factor is not None:
                longer = max_seq_len > trained * factor
                position *= 1 / (max_seq_len / trained if longer else factor)
            angles = torch.outer(position, self.inv_freq)
        if self.interleaved:
            both = angles.repeat_interleave(2, dim=-1)
        else:
            both = torch.cat((angles, angles), dim=-1)
        return both[:, None, None, :]


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, tensor_format: str = "sbhd", interleaved: bool = False
) -> Tensor:
    """Turn pairs of channels by the angles of their position, in float32.

    Args:
        t: [s, b, h, d] or [b, s, h, d].
        freqs: float32, [s2, 1, 1, d2] with ``s2 >= s`` and ``d2 <= d``.
        tensor_format: ``"sbhd"`` or ``"bshd"``.
        interleaved: pair neighbors, not the two halves.

    Returns:
        The dtype and shape of ``t``.

    Raises:
        ValueError: fewer positions than ``t`` has.
    """
    length = t.shape[1 if tensor_format == "bshd" else 0]
    if freqs.shape[0] < length:
        raise ValueError(
            f"Rotary Embeddings only supported up to {freqs.shape[0]} sequence length!"
        )
    angles = freqs[:length].float()
    if tensor_format == "bshd":
        angles = angles.transpose(0, 1)
    with torch.autocast(t.device.type, enabled=False):
        turned, rest = t[..., : angles.shape[-1]].float(), t[..., angles.shape[-1] :]
        if interleaved:
            even, odd = turned[..., ::2], turned[..., 1::2]
            rotated = torch.stack((-odd, even), dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            rotated = torch.cat((-second, first), dim=-1)
        result = (turned * angles.cos() + rotated * angles.sin()).to(t.dtype)
    return torch.cat((result, rest), dim=-1)
