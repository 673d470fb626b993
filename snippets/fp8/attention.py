"""Transformer Engine's ``DotProductAttention``, on any device.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/attention/dot_product_attention``
    (Apache-2.0): signature, defaults, checks, where biases are added.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import TransformerEngineBaseModule
from .checkpoint import checkpoint
from .masks import Masks, Window, bottom_right, check_window, full_mask
from .parallel import OneContextRank, refuse, refuse_parallel
from .slots import QuantizerRole

__all__ = ["DotProductAttention"]

_BIAS_TYPES = ("pre_scale_bias", "post_scale_bias", "no_bias", "alibi")


class DotProductAttention(OneContextRank, TransformerEngineBaseModule):
    """``softmax(q @ k.T * softmax_scale) @ v`` by torch, in the dtype of activations.

    It runs in high precision under every recipe, as it does in Transformer Engine
    unless a recipe says ``fp8_dpa``, which is not emulated.

    Args:
        num_attention_heads: heads of the queries.
        kv_channels: features of a head, or a pair for keys and values.
        num_gqa_groups: heads of keys and values, default those of the queries.
        attention_dropout: probability that an attention weight is dropped in training.
        qkv_format: ``"sbhd"`` or ``"bshd"``.
        attn_mask_type: one of ``"no_mask"``, ``"padding"``, ``"causal"``,
            ``"padding_causal"``, ``"causal_bottom_right"``,
            ``"padding_causal_bottom_right"`` and ``"arbitrary"``.
        window_size: keys that a query sees to its left and right, -1 for all.
        bottom_right_diagonal: where the diagonal of a window ends.
        layer_number: changes no number.
        attention_type: ``"self"`` or ``"cross"``.
        softmax_scale: default ``1 / sqrt(kv_channels)``.
        name: of the module.
        tp_group, tp_size: only one rank is emulated.
        sequence_parallel: with one rank it changes nothing, as in Transformer Engine.
        softcap, get_rng_state_tracker, cp_*, softmax_type, return_max_logit: only their
            defaults are emulated.

    Raises:
        NotImplementedError: an option that is not emulated.
        ValueError: heads that do not divide into the groups, an unknown mask type.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Window | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        """Check the options.

        Raises:
            NotImplementedError: ``qkv_format="thd"``.
            ValueError: heads, groups or an attention type that cannot be.
        """
        refuse_parallel("DotProductAttention", tp_size, tp_group)
        refuse(
            "DotProductAttention",
            softcap=(softcap, 0.0),
            get_rng_state_tracker=(get_rng_state_tracker, None),
            cp_group=(cp_group, None),
            cp_global_ranks=(cp_global_ranks, None),
            cp_stream=(cp_stream, None),
            cp_comm_type=(cp_comm_type, "p2p"),
            softmax_type=(softmax_type, "vanilla"),
            return_max_logit=(bool(return_max_logit), False),
        )
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        if num_attention_heads % groups:
            raise ValueError(
                "The number of attention heads must be divisible by the number of GQA "
                f"groups! They are {num_attention_heads} and {groups}."
            )
        if attention_type not in {"self", "cross"}:
            raise ValueError(f"attention_type {attention_type} not supported")
        super().__init__(name)
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = groups
        self.attention_dropout = attention_dropout
        self.qkv_format = _format(qkv_format)
        self.attn_mask_type = _mask_type(attn_mask_type)
        self.window_size = check_window(self.attn_mask_type, window_size)
        self.bottom_right_diagonal = bottom_right_diagonal
        self.layer_number = 1 if layer_number is None else layer_number
        self.attention_type = attention_type
        pair = (kv_channels,) * 2 if isinstance(kv_channels, int) else kv_channels
        self.hidden_size_per_attention_head_k = pair[0]
        self.hidden_size_per_attention_head_v = pair[1]
        self.softmax_scale = (
            1.0 / math.sqrt(pair[0]) if softmax_scale is None else softmax_scale
        )

    def get_quantizer_roles(
        self, *, fwd: bool, num_quantizers: int
    ) -> list[QuantizerRole | None]:
        """Return what each slot is for; attention in high precision uses none.

        Args:
            fwd: slots of queries, keys and values, of the output, of the softmax; else
                of their gradients.
            num_quantizers: of slots, three or two a tensor.
        """
        name = self.name or ""
        dot = f"{name}." if name else ""
        roles: list[QuantizerRole | None] = (
            [
                QuantizerRole("dpa", "qkv", name),
                self.output_quantizer_role or QuantizerRole(name=f"{dot}dpa_output"),
                QuantizerRole("dpa", "s", name),
            ]
            if fwd
            else [
                self.grad_input_quantizer_role
                or QuantizerRole(name=f"{dot}dpa_grad_input"),
                QuantizerRole("dpa", "do", name),
                QuantizerRole("dpa", "dp", name),
            ]
        )
        each = 3 if fwd else 2
        return [roles[i // each] for i in range(num_quantizers)]

    def forward(  # noqa: D417 - the last entry of Args has many names
        self,
        query_layer: Tensor | None = None,
        key_layer: Tensor | None = None,
        value_layer: Tensor | None = None,
        attention_mask: Masks = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: Window | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        bf16_backward: bool | None = False,
        num_splits: int | None = 1,
        score_mod: Callable[..., Any] | None = None,
        score_mod_bprop: Callable[..., Any] | None = None,
        score_mod_tensors: dict[str, Tensor] | None = None,
        score_mod_bprop_tensors: dict[str, Tensor] | None = None,
        qkv_layer: Tensor | None = None,
        kv_layer: Tensor | None = None,
        qkv_interleave_dim: int = -3,
        thd_attention_policies: list[dict[str, Any]] | None = None,
        thd_attention_policy_dispatch: str = "auto",
    ) -> Tensor:
        """Attend.

        Args:
            query_layer: [queries, batch, heads, channels] for ``"sbhd"``.
            key_layer: [keys, batch, groups, channels].
            value_layer: [keys, batch, groups, channels].
            attention_mask: True where masked, see :func:`full_mask`.
            qkv_format: instead of the constructor's, like the next three.
            attn_mask_type: which mask.
            window_size: which window.
            bottom_right_diagonal: where it ends.
            checkpoint_core_attention: compute it again in the backward pass.
            core_attention_bias_type: ``"no_bias"``, ``"pre_scale_bias"`` (added before
                ``softmax_scale``) or ``"post_scale_bias"``.
            core_attention_bias: [1, heads, queries, keys].
            fast_zero_fill: changes no number, like ``num_splits``.
            num_splits: of a kernel.
            max_seqlen_q: of ``"thd"``, like ``max_seqlen_kv``.
            max_seqlen_kv: ignored, as by Transformer Engine for other formats.
            softcap, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded,
                cu_seqlens_kv_padded, alibi_slopes, inference_params, pad_between_seqs,
                fp8_output, bf16_backward, score_mod, score_mod_bprop,
                score_mod_tensors, score_mod_bprop_tensors, qkv_layer, kv_layer,
                qkv_interleave_dim, thd_attention_policies,
                thd_attention_policy_dispatch: only their defaults are emulated.

        Returns:
            [queries, batch, heads * channels] for ``"sbhd"``.

        Raises:
            ValueError: shapes that do not fit, a mask that is missing.
            TypeError: dtypes that differ, or a mask that is not bool.
            NotImplementedError: an option that is not emulated.
        """
        refuse(
            "DotProductAttention.forward",
            softcap=(softcap or 0.0, 0.0),
            cu_seqlens_q=(_given(cu_seqlens_q), None),
            cu_seqlens_kv=(_given(cu_seqlens_kv), None),
            cu_seqlens_q_padded=(_given(cu_seqlens_q_padded), None),
            cu_seqlens_kv_padded=(_given(cu_seqlens_kv_padded), None),
            alibi_slopes=(_given(alibi_slopes), None),
            inference_params=(inference_params, None),
            pad_between_seqs=(bool(pad_between_seqs), False),
            fp8_output=(bool(fp8_output), False),
            bf16_backward=(bool(bf16_backward), False),
            score_mod=(score_mod, None),
            score_mod_bprop=(score_mod_bprop, None),
            score_mod_tensors=(score_mod_tensors, None),
            score_mod_bprop_tensors=(score_mod_bprop_tensors, None),
            qkv_layer=(_given(qkv_layer), None),
            kv_layer=(_given(kv_layer), None),
            qkv_interleave_dim=(qkv_interleave_dim, -3),
            thd_attention_policies=(thd_attention_policies, None),
            thd_attention_policy_dispatch=(thd_attention_policy_dispatch, "auto"),
        )
        if query_layer is None or key_layer is None or value_layer is None:
            raise ValueError("query_layer, key_layer and value_layer must be given")
        layout = self.qkv_format if qkv_format is None else _format(qkv_format)
        kind = self.attn_mask_type
        kind = kind if attn_mask_type is None else _mask_type(attn_mask_type)
        if window_size is None and (attn_mask_type is None or self.window_size[0] >= 0):
            window_size = self.window_size
        window = check_window(kind, window_size)
        chosen = bottom_right_diagonal
        chosen = self.bottom_right_diagonal if chosen is None else chosen
        self._check(query_layer, key_layer, value_layer)
        q, k, v = (
            x.permute(1, 2, 0, 3) if layout == "sbhd" else x.permute(0, 2, 1, 3)
            for x in (query_layer, key_layer, value_layer)
        )
        bias = _bias(
            core_attention_bias_type, core_attention_bias, self.softmax_scale, q.dtype
        )
        queries, keys = q.shape[2], k.shape[2]
        diagonal = bottom_right(kind, chosen)
        plain_causal = window == (-1, 0) and (not diagonal or queries == keys)
        plain_causal = plain_causal and kind.startswith("causal") and bias is None
        masked = (
            None
            if plain_causal
            else full_mask(
                queries, keys, kind, attention_mask, window, diagonal, q.device
            )
        )
        self.prepare_forward(query_layer, num_gemms=3)
        try:
            arguments = (q, k, v, masked, bias, plain_causal)
            if checkpoint_core_attention:
                context = checkpoint(self._attend, *arguments)
            else:
                context = self._attend(*arguments)
        finally:
            self.end_forward()
        order = (2, 0, 1, 3) if layout == "sbhd" else (0, 2, 1, 3)
        result: Tensor = context.permute(order)
        return result.reshape(*result.shape[:2], -1)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for x in (query, key, value):
            if x.dim() != 4:
                raise ValueError(
                    "Queries, keys and values must be 4D tensors, got shape "
                    f"{tuple(x.shape)}"
                )
        if not query.dtype == key.dtype == value.dtype:
            raise TypeError(
                "Queries, keys and values must have the same data type! They have "
                f"{query.dtype}, {key.dtype} and {value.dtype}."
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                "Keys and values must have the same batch size, sequence length and "
                f"number of heads! They have {tuple(key.shape)}, {tuple(value.shape)}."
            )
        found = (*query.shape[2:], *key.shape[2:], value.shape[3])
        channels = self.hidden_size_per_attention_head_k
        heads = self.num_attention_heads
        groups = self.num_gqa_groups
        wanted = (heads, channels, groups, channels)
        values = self.hidden_size_per_attention_head_v
        if found != (*wanted, values):
            raise ValueError(
                f"Heads and channels must be {wanted[:2]} of queries, {wanted[2:4]} of "
                f"keys and {values} channels of values, got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
            )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masked: Tensor | None,
        bias: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """Return softmax(q @ k.T) @ v: [batch, heads, queries, channels]."""
        seen: Tensor | None = None
        empty: Tensor | None = None
        if masked is not None:
            empty = masked.all(-1, keepdim=True)
            seen = ~masked | empty  # a row that sees nothing would be NaN
        if bias is not None:
            lowest = torch.finfo(bias.dtype).min
            seen = bias if seen is None else bias.masked_fill(~seen, lowest)
        with torch.autocast(q.device.type, enabled=False):
            context = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=seen,
                dropout_p=self.attention_dropout if self.training else 0.0,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return context if empty is None else context.masked_fill(empty, 0.0)


def _given(x: Tensor | None) -> str | None:
    return None if x is None else "a tensor"


def _format(qkv_format: str) -> str:
    if qkv_format == "thd":
        raise NotImplementedError(
            "qkv_format='thd' is not emulated; use 'sbhd' or 'bshd' with a padding "
            "mask."
        )
    if qkv_format not in {"sbhd", "bshd"}:
        raise ValueError(
            "DotProductAttention only supports qkv_format = {'sbhd', 'bshd', 'thd'}, "
            f"got {qkv_format!r}"
        )
    return qkv_format


def _mask_type(name: str) -> str:
    name = name.replace(",", "_")
    return "padding_causal" if name == "causal_padding" else name


def _bias(
    kind: str, bias: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor | None:
    if kind not in _BIAS_TYPES:
        raise ValueError(f"core_attention_bias_type {kind} is not supported!")
    if kind == "alibi":
        raise NotImplementedError("core_attention_bias_type='alibi' is not emulated.")
    if kind == "no_bias":
        if bias is not None:
            raise ValueError("core_attention_bias must be None for 'no_bias'")
        return None
    if bias is None:
        raise ValueError("core_attention_bias should not be None!")
    return (bias * scale if kind == "pre_scale_bias" else bias).to(dtype)
