"""Transformer Engine's ``MultiheadAttention``, on any device.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: NVIDIA, Transformer Engine 2.20.2,
    ``pytorch/attention/multi_head_attention.py`` (Apache-2.0): signature, defaults,
    names of the parts, how a fused projection is split.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import DotProductAttention
from .base import InitMethod
from .layernorm_linear import LayerNormLinear
from .linear import Linear
from .masks import Masks, Window, check_window
from .norms import LayerNorm, RMSNorm
from .parallel import OneContextRank, refuse, refuse_parallel
from .rotary import apply_rotary_pos_emb

__all__ = ["MultiheadAttention"]


class _L2Normalization(nn.Module):
    """Divide by the Euclidean norm of the last dimension; there is no parameter."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        squares = values.square().sum(-1, keepdim=True)
        return (values * torch.rsqrt(squares + self.eps)).to(x.dtype)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take nothing."""


class MultiheadAttention(OneContextRank, nn.Module):
    """Projections to queries, keys and values, attention, a projection of its result.

    Args:
        hidden_size: features of input and output.
        num_attention_heads: heads of the queries.
        kv_channels: features of a head, default ``hidden_size / num_attention_heads``.
        attention_dropout: see :class:`DotProductAttention`.
        layernorm_epsilon: of the input norm.
        init_method: fills the first projection in place; default N(0, 0.023).
        output_layer_init_method: fills the last; default N(0, 0.023).
        layer_number: changes no number.
        attn_mask_type: see :class:`DotProductAttention`, like the next two.
        window_size: keys to the left and right.
        bottom_right_diagonal: where a window's diagonal ends.
        num_gqa_groups: heads of keys and values.
        fuse_wgrad_accumulation: add weight gradients to ``main_grad``.
        params_dtype: dtype of the parameters.
        return_bias: return the last bias and leave adding it to the caller.
        return_layernorm_output: return the norm's result, too.
        input_layernorm: normalize the input.
        attention_type: ``"self"``, or ``"cross"``: keys and values come from
            ``encoder_output``.
        set_parallel_mode: with one rank it changes only where the last bias is added.
        fuse_qkv_params: one parameter for queries, keys and values, not three.
        zero_centered_gamma: of the input norm.
        qkv_weight_interleaved: the fused weight goes by head, not by kind.
        rotary_pos_interleaved: pair neighbors in the rotary embedding.
        bias: add biases.
        normalization: ``"LayerNorm"`` or ``"RMSNorm"``.
        device: where parameters live; ``"cuda"`` is the CPU where there is no GPU.
        qkv_format: ``"sbhd"`` or ``"bshd"``.
        name: of the module, given to a ``CustomRecipe``.
        qk_norm_type: ``None``, ``"L2Normalization"``, ``"RMSNorm"`` or ``"LayerNorm"``.
        qk_norm_eps: of that norm.
        qk_norm_before_rope: whether it comes before the rotary embedding.
        seq_length, micro_batch_size: for a warm-up that a CPU does not need.
        tp_group, tp_size: only one rank is emulated.
        sequence_parallel, ub_*: with one rank they change nothing, as in Transformer
            Engine.
        softcap, get_rng_state_tracker, softmax_type: only their defaults are emulated.

    Raises:
        NotImplementedError: an option that is not emulated.
        ValueError: heads, types or sizes that cannot be.
    """

    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        kv_channels: int | None = None,
        attention_dropout: float = 0.1,
        layernorm_epsilon: float = 1e-5,
        init_method: InitMethod | None = None,
        output_layer_init_method: InitMethod | None = None,
        layer_number: int | None = None,
        attn_mask_type: str = "causal",
        window_size: Window | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        tp_group: Any = None,
        tp_size: int = 1,
        num_gqa_groups: int | None = None,
        fuse_wgrad_accumulation: bool = False,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = False,
        return_layernorm_output: bool = False,
        input_layernorm: bool = False,
        attention_type: str = "self",
        set_parallel_mode: bool = False,
        fuse_qkv_params: bool = False,
        zero_centered_gamma: bool = False,
        qkv_weight_interleaved: bool = True,
        rotary_pos_interleaved: bool = False,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        bias: bool = True,
        normalization: str = "LayerNorm",
        device: torch.device | str = "cuda",
        qkv_format: str = "sbhd",
        name: str | None = None,
        qk_norm_type: str | None = None,
        qk_norm_eps: float = 1e-6,
        qk_norm_before_rope: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        softmax_type: str = "vanilla",
    ) -> None:
        """Make the parts.

        Raises:
            ValueError: heads, types or sizes that cannot be.
        """
        refuse_parallel("MultiheadAttention", tp_size, tp_group)
        refuse(
            "MultiheadAttention",
            softcap=(softcap, 0.0),
            get_rng_state_tracker=(get_rng_state_tracker, None),
            softmax_type=(softmax_type, "vanilla"),
        )
        if attention_type not in {"self", "cross"}:
            raise ValueError(f"attention_type {attention_type} not supported")
        if layer_number is not None and layer_number < 1:
            raise ValueError("layer_number must be a positive integer")
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        if num_attention_heads % groups:
            raise ValueError(
                "The number of attention heads must be divisible by the number of GQA "
                f"groups! They are {num_attention_heads} and {groups}."
            )
        super().__init__()
        self.qkv_format = qkv_format
        self.attn_mask_type = attn_mask_type
        self.window_size = window_size
        self.bottom_right_diagonal = bottom_right_diagonal
        self.layer_number = 1 if layer_number is None else layer_number
        self.input_layernorm = input_layernorm
        self.attention_type = attention_type
        self.return_layernorm_output = return_layernorm_output
        self.return_bias = return_bias
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = groups
        self.qkv_weight_interleaved = fuse_qkv_params and qkv_weight_interleaved
        self.rotary_pos_interleaved = rotary_pos_interleaved
        self.qk_norm_before_rope = qk_norm_before_rope
        self.name = name
        channels = kv_channels or hidden_size // num_attention_heads
        self.hidden_size_per_attention_head = channels
        self.hidden_size_q = channels * num_attention_heads
        self.hidden_size_kv = channels * groups
        common: dict[str, Any] = {
            "fuse_wgrad_accumulation": fuse_wgrad_accumulation,
            "params_dtype": params_dtype,
            "device": device,
            "bias": bias,
        }
        first: dict[str, Any] = {
            **common,
            "init_method": init_method,
            "parallel_mode": "column" if set_parallel_mode else None,
        }
        norm: dict[str, Any] = {
            "eps": layernorm_epsilon,
            "return_layernorm_output": return_layernorm_output,
            "zero_centered_gamma": zero_centered_gamma,
            "normalization": normalization,
        }
        self._make_qk_norms(qk_norm_type, qk_norm_eps, device, params_dtype)
        split: Any = None
        if attention_type == "self":
            if not fuse_qkv_params:
                split = {
                    "query": self.hidden_size_q,
                    "key": self.hidden_size_kv,
                    "value": self.hidden_size_kv,
                }
            first["in_features"] = hidden_size
            first["out_features"] = self.hidden_size_q + 2 * self.hidden_size_kv
            first["parameters_split"] = split
            if input_layernorm:
                part = self._named("layernorm_linear_qkv")
                self.layernorm_qkv = LayerNormLinear(name=part, **norm, **first)
            else:
                self.qkv = Linear(name=self._named("linear_qkv"), **first)
        else:
            first["in_features"] = hidden_size
            if input_layernorm:
                self.layernorm_query = LayerNormLinear(
                    out_features=self.hidden_size_q,
                    name=self._named("layernorm_linear_q"),
                    parameters_split=None if fuse_qkv_params else ("query",),
                    **norm,
                    **first,
                )
            else:
                self.query_layer = Linear(out_features=self.hidden_size_q, **first)
            self.key_value = Linear(
                out_features=2 * self.hidden_size_kv,
                name=self._named("linear_kv"),
                parameters_split=None if fuse_qkv_params else ("key", "value"),
                **first,
            )
        self.core_attention = DotProductAttention(
            num_attention_heads,
            channels,
            num_gqa_groups=groups,
            attention_dropout=attention_dropout,
            qkv_format=qkv_format,
            layer_number=self.layer_number,
            attention_type=attention_type,
            name=self._named("core_attention"),
        )
        self.proj = Linear(
            self.hidden_size_q,
            hidden_size,
            init_method=output_layer_init_method,
            return_bias=return_bias,
            parallel_mode="row" if set_parallel_mode else None,
            name=self._named("proj"),
            **common,
        )

    def _named(self, part: str) -> str | None:
        return None if self.name is None else f"{self.name}.{part}"

    def _make_qk_norms(
        self,
        kind: str | None,
        eps: float,
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> None:
        if kind is None:
            self.q_norm = self.k_norm = None
        elif kind == "L2Normalization":
            self.q_norm = self.k_norm = _L2Normalization(eps)
        elif kind in {"RMSNorm", "LayerNorm"}:
            norm = RMSNorm if kind == "RMSNorm" else LayerNorm
            size = self.hidden_size_per_attention_head
            self.q_norm = norm(size, eps=eps, device=device, params_dtype=dtype)
            self.k_norm = norm(size, eps=eps, device=device, params_dtype=dtype)
        else:
            raise ValueError(
                f"Unsupported QK norm type: {kind}. Supported types: "
                "['L2Normalization', 'RMSNorm', 'LayerNorm']"
            )

    def forward(  # noqa: D417 - the last entry of Args has many names
        self,
        hidden_states: Tensor,
        attention_mask: Masks = None,
        encoder_output: Tensor | None = None,
        attn_mask_type: str | None = None,
        window_size: Window | None = None,
        bottom_right_diagonal: bool | None = None,
        is_first_microbatch: bool | None = None,
        checkpoint_core_attention: bool = False,
        inference_params: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        fast_zero_fill: bool = True,
        pad_between_seqs: bool | None = None,
        thd_attention_policies: list[dict[str, Any]] | None = None,
        thd_attention_policy_dispatch: str = "auto",
        softcap: float | None = None,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Attend to ``hidden_states``, or to ``encoder_output``.

        Args:
            hidden_states: [queries, batch, hidden_size] for ``"sbhd"``.
            attention_mask: True where masked (see :class:`DotProductAttention`).
            encoder_output: [keys, batch, hidden_size], for cross attention.
            attn_mask_type: instead of the constructor's, like the next two.
            window_size: which window.
            bottom_right_diagonal: where it ends.
            is_first_microbatch: see :class:`Linear`.
            checkpoint_core_attention: compute attention again in the backward pass.
            rotary_pos_emb: angles for queries and keys, or a pair of such.
            core_attention_bias_type: see :class:`DotProductAttention`.
            core_attention_bias: see there, like all that follow.
            fast_zero_fill: changes no number.
            max_seqlen_q: of another format.
            max_seqlen_kv: of another format.
            inference_params, alibi_slopes, cu_seqlens_q, cu_seqlens_kv,
                cu_seqlens_q_padded, cu_seqlens_kv_padded, pad_between_seqs, softcap,
                thd_attention_policies, thd_attention_policy_dispatch: only their
                defaults are emulated.

        Returns:
            [queries, batch, hidden_size]; with ``return_bias`` then the bias, with
            ``return_layernorm_output`` then the norm's result.

        Raises:
            ValueError: no ``encoder_output`` for cross attention; see the parts.
        """
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        window = check_window(
            kind, self.window_size if window_size is None else window_size
        )
        if bottom_right_diagonal is None:
            bottom_right_diagonal = self.bottom_right_diagonal
        layernorm_output: Tensor | None = None
        if self.attention_type == "self":
            project = self.layernorm_qkv if self.input_layernorm else self.qkv
            mixed: Any = project(hidden_states, is_first_microbatch=is_first_microbatch)
            if self.input_layernorm and self.return_layernorm_output:
                mixed, layernorm_output = mixed
            query, key, value = self._split(
                mixed, self.num_attention_heads // self.num_gqa_groups
            )
        else:
            if encoder_output is None:
                raise ValueError("attention_type='cross' needs an encoder_output")
            mixed = self.key_value(
                encoder_output, is_first_microbatch=is_first_microbatch
            )
            _, key, value = self._split(mixed, 0)
            project = self.layernorm_query if self.input_layernorm else self.query_layer
            mixed = project(hidden_states, is_first_microbatch=is_first_microbatch)
            if self.input_layernorm and self.return_layernorm_output:
                mixed, layernorm_output = mixed
            channels = self.hidden_size_per_attention_head
            query = mixed.unflatten(-1, (self.num_attention_heads, channels))
        query, key = self._position(query, key, rotary_pos_emb)
        context = self.core_attention(
            query,
            key,
            value,
            qkv_format=self.qkv_format,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            cu_seqlens_q_padded=cu_seqlens_q_padded,
            cu_seqlens_kv_padded=cu_seqlens_kv_padded,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
            attention_mask=attention_mask,
            attn_mask_type=kind,
            window_size=window,
            softcap=softcap,
            bottom_right_diagonal=bottom_right_diagonal,
            thd_attention_policies=thd_attention_policies,
            thd_attention_policy_dispatch=thd_attention_policy_dispatch,
            checkpoint_core_attention=checkpoint_core_attention,
            core_attention_bias_type=core_attention_bias_type,
            core_attention_bias=core_attention_bias,
            alibi_slopes=alibi_slopes,
            fast_zero_fill=fast_zero_fill,
            inference_params=inference_params,
            pad_between_seqs=pad_between_seqs,
        )
        projected: Any = self.proj(context, is_first_microbatch=is_first_microbatch)
        results = projected if self.return_bias else (projected,)
        if self.input_layernorm and self.return_layernorm_output:
            results = (*results, layernorm_output)
        return results if len(results) > 1 else results[0]

    def _split(self, mixed: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cut a fused projection into queries (so many a group), key and value."""
        groups, channels = self.num_gqa_groups, self.hidden_size_per_attention_head
        sizes = [queries, 1, 1]
        if self.qkv_weight_interleaved:
            shape, dim = (groups, queries + 2, channels), -2
        else:
            shape, dim = (queries + 2, groups, channels), -3
        parts = torch.split(mixed.reshape(*mixed.shape[:-1], *shape), sizes, dim)
        query, key, value = (part.flatten(-3, -2) for part in parts)
        return query, key, value

    def _position(
        self,
        query: Tensor,
        key: Tensor,
        angles: Tensor | tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        def normalized(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            if self.q_norm is None or self.k_norm is None:
                return query, key
            return self.q_norm(query), self.k_norm(key)

        if self.qk_norm_before_rope:
            query, key = normalized(query, key)
        if angles is not None:
            pair = angles if isinstance(angles, tuple) else (angles, angles)
            query, key = (
                apply_rotary_pos_emb(
                    x, of, self.qkv_format, interleaved=self.rotary_pos_interleaved
                )
                for x, of in zip((query, key), pair, strict=True)
            )
        if not self.qk_norm_before_rope:
            query, key = normalized(query, key)
        return query, key
