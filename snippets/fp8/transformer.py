"""Transformer Engine's ``TransformerLayer``, on any device.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/transformer.py`` (Apache-2.0):
    signature, defaults, names of the parts, where residuals are taken.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import InitMethod, TransformerEngineBaseModule
from .layernorm_mlp import LayerNormMLP
from .masks import Masks, Window
from .multi_head_attention import MultiheadAttention
from .norms import LayerNorm, RMSNorm
from .parallel import OneContextRank, refuse, refuse_parallel

__all__ = ["TransformerLayer"]


class TransformerLayer(OneContextRank, nn.Module):
    """Attention and :class:`LayerNormMLP`, each with dropout and a residual connection.

    Args:
        hidden_size: features of input and output.
        ffn_hidden_size: features inside the MLP.
        num_attention_heads: heads of the queries.
        num_gqa_groups: heads of keys and values, default those of the queries.
        layernorm_epsilon: of every norm.
        hidden_dropout: probability that an element is dropped before a residual is
            added, in training.
        attention_dropout: the same for attention weights.
        init_method: fills the first projections in place; default N(0, 0.023).
        output_layer_init_method: fills the last projection of each part.
        layer_number: changes no number.
        kv_channels: features of a head, default ``hidden_size / num_attention_heads``.
        self_attn_mask_type: see :class:`DotProductAttention`.
        window_size: of self-attention, like the next.
        bottom_right_diagonal: where a window's diagonal ends.
        enc_dec_attn_mask_type: of cross attention, like the next two.
        enc_dec_bottom_right_diagonal: where a window's diagonal ends.
        enc_dec_window_size: its window.
        params_dtype: dtype of the parameters.
        fuse_wgrad_accumulation: add weight gradients to ``main_grad``; needs
            ``fuse_qkv_params``.
        seq_length, micro_batch_size: for a warm-up that a CPU does not need.
        apply_residual_connection_post_layernorm: take residuals after the norm.
        output_layernorm: normalize the output, not the input.
        parallel_attention_mlp: attention and MLP from the same input, added.
        layer_type: ``"encoder"``, or ``"decoder"``: with cross attention.
        drop_path_rate: probability that a whole sample is dropped from a branch.
        set_parallel_mode: with one rank it changes only where biases are added.
        fuse_qkv_params: one parameter for queries, keys and values.
        rotary_pos_interleaved: see :class:`MultiheadAttention`.
        zero_centered_gamma: of every norm.
        qkv_weight_interleaved: see :class:`MultiheadAttention`.
        bias: add biases.
        activation: of the MLP.
        activation_params: of that function.
        normalization: ``"LayerNorm"`` or ``"RMSNorm"``.
        device: where parameters live; ``"cuda"`` is the CPU where there is no GPU.
        attn_input_format: ``"sbhd"`` or ``"bshd"``.
        name: of the module, given to a ``CustomRecipe``.
        qk_norm_type: see :class:`MultiheadAttention`, like the next two.
        qk_norm_eps: of that norm.
        qk_norm_before_rope: where it is.
        tp_group, tp_size: only one rank is emulated.
        sequence_parallel, ub_*: with one rank they change nothing, as in Transformer
            Engine.
        softcap, get_rng_state_tracker, softmax_type: only their defaults are emulated.

    Raises:
        NotImplementedError: an option that is not emulated.
        ValueError: options that exclude each other.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_gqa_groups: int | None = None,
        layernorm_epsilon: float = 1e-5,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        init_method: InitMethod | None = None,
        output_layer_init_method: InitMethod | None = None,
        layer_number: int | None = None,
        kv_channels: int | None = None,
        self_attn_mask_type: str = "causal",
        window_size: Window | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        enc_dec_attn_mask_type: str = "no_mask",
        enc_dec_bottom_right_diagonal: bool | None = None,
        enc_dec_window_size: Window | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        fuse_wgrad_accumulation: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        sequence_parallel: bool = False,
        apply_residual_connection_post_layernorm: bool = False,
        output_layernorm: bool = False,
        parallel_attention_mlp: bool = False,
        layer_type: str = "encoder",
        drop_path_rate: float = 0.0,
        set_parallel_mode: bool = False,
        fuse_qkv_params: bool = False,
        rotary_pos_interleaved: bool = False,
        zero_centered_gamma: bool = False,
        qkv_weight_interleaved: bool = True,
        ub_tp_comm_overlap: bool = False,
        ub_overlap_ag: bool = True,
        ub_overlap_rs: bool = True,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = True,
        ub_bulk_wgrad: bool = True,
        bias: bool = True,
        activation: str = "gelu",
        activation_params: dict[str, Any] | None = None,
        normalization: str = "LayerNorm",
        device: torch.device | str = "cuda",
        attn_input_format: str = "sbhd",
        name: str | None = None,
        qk_norm_type: str | None = None,
        qk_norm_eps: float = 1e-6,
        qk_norm_before_rope: bool = False,
        softmax_type: str = "vanilla",
    ) -> None:
        """Make the parts.

        Raises:
            ValueError: options that exclude each other.
        """
        refuse_parallel("TransformerLayer", tp_size, tp_group)
        refuse(
            "TransformerLayer",
            softcap=(softcap, 0.0),
            get_rng_state_tracker=(get_rng_state_tracker, None),
            softmax_type=(softmax_type, "vanilla"),
        )
        if layer_type not in {"encoder", "decoder"}:
            raise ValueError(
                f"layer_type {layer_type!r} is not supported. Supported types are: "
                "'encoder', 'decoder'"
            )
        if parallel_attention_mlp:
            if layer_type != "encoder":
                raise ValueError(
                    "parallel_attention requires layer_type='encoder', "
                    f"but got layer_type={layer_type!r}"
                )
            for given, option in (
                (
                    apply_residual_connection_post_layernorm,
                    "apply_residual_connection_post_layernorm",
                ),
                (output_layernorm, "output_layernorm"),
            ):
                if given:
                    raise ValueError(
                        f"parallel_attention and {option} are not supported "
                        "simultaneously."
                    )
        if fuse_wgrad_accumulation and not fuse_qkv_params:
            raise ValueError(
                "Gradient accumulation fusion (fuse_wgrad_accumulation=True) requires "
                "fuse_qkv_params=True, but fuse_qkv_params is False."
            )
        super().__init__()
        self.name = name
        self.self_attn_mask_type = self_attn_mask_type
        self.window_size = window_size
        self.bottom_right_diagonal = bottom_right_diagonal
        self.enc_dec_attn_mask_type = enc_dec_attn_mask_type
        self.enc_dec_window_size = enc_dec_window_size
        self.enc_dec_bottom_right_diagonal = enc_dec_bottom_right_diagonal
        self.layer_number = layer_number
        self.layer_type = layer_type
        self.output_layernorm = output_layernorm
        self.apply_residual_connection_post_layernorm = (
            apply_residual_connection_post_layernorm
        )
        self.parallel_attention_mlp = parallel_attention_mlp
        self.hidden_dropout = hidden_dropout
        self.drop_path_rate = drop_path_rate
        common: dict[str, Any] = {
            "init_method": init_method,
            "output_layer_init_method": output_layer_init_method,
            "fuse_wgrad_accumulation": fuse_wgrad_accumulation,
            "params_dtype": params_dtype,
            "return_layernorm_output": apply_residual_connection_post_layernorm,
            "set_parallel_mode": set_parallel_mode,
            "zero_centered_gamma": zero_centered_gamma,
            "bias": bias,
            "normalization": normalization,
            "device": device,
        }
        attention: dict[str, Any] = {
            **common,
            "hidden_size": hidden_size,
            "num_attention_heads": num_attention_heads,
            "kv_channels": kv_channels,
            "attention_dropout": attention_dropout,
            "layernorm_epsilon": layernorm_epsilon,
            "layer_number": layer_number,
            "num_gqa_groups": num_gqa_groups,
            "fuse_qkv_params": fuse_qkv_params,
            "qkv_weight_interleaved": qkv_weight_interleaved,
            "rotary_pos_interleaved": rotary_pos_interleaved,
            "qkv_format": attn_input_format,
            "qk_norm_type": qk_norm_type,
            "qk_norm_eps": qk_norm_eps,
            "qk_norm_before_rope": qk_norm_before_rope,
        }
        self.self_attention = MultiheadAttention(
            **attention,
            input_layernorm=not output_layernorm,
            attention_type="self",
            return_bias=not parallel_attention_mlp,
            name=self._named("self_attention"),
        )
        if layer_type == "decoder":
            self.inter_attention = MultiheadAttention(
                **attention,
                attn_mask_type=enc_dec_attn_mask_type,
                input_layernorm=True,
                attention_type="cross",
                return_bias=True,
                name=self._named("inter_attention"),
            )
        self.layernorm_mlp = LayerNormMLP(
            hidden_size,
            ffn_hidden_size,
            eps=layernorm_epsilon,
            return_bias=not parallel_attention_mlp,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            activation=activation,
            activation_params=activation_params,
            name=self._named("layernorm_mlp"),
            **common,
        )
        if output_layernorm:
            norm = LayerNorm if normalization == "LayerNorm" else RMSNorm
            self.layernorm = norm(
                hidden_size,
                eps=layernorm_epsilon,
                sequence_parallel=False,
                params_dtype=params_dtype,
                zero_centered_gamma=zero_centered_gamma,
                device=device,
            )

    def _named(self, part: str) -> str | None:
        return None if self.name is None else f"{self.name}.{part}"

    def forward(  # noqa: D417 - the last entry of Args has many names
        self,
        hidden_states: Tensor,
        attention_mask: Masks = None,
        self_attn_mask_type: str | None = None,
        window_size: Window | None = None,
        bottom_right_diagonal: bool | None = None,
        encoder_output: Tensor | None = None,
        enc_dec_attn_mask: Masks = None,
        enc_dec_attn_mask_type: str | None = None,
        enc_dec_window_size: Window | None = None,
        enc_dec_bottom_right_diagonal: bool | None = None,
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
    ) -> Tensor:
        """Apply the layer.

        Args:
            hidden_states: [sequence, batch, hidden_size] for ``"sbhd"``.
            attention_mask: True where masked (see :class:`DotProductAttention`).
            self_attn_mask_type: instead of the constructor's, like the next two.
            window_size: which window.
            bottom_right_diagonal: where it ends.
            encoder_output: [keys, batch, hidden_size], for a decoder.
            enc_dec_attn_mask: the mask of cross attention.
            enc_dec_attn_mask_type: its type, like the next two.
            enc_dec_window_size: its window.
            enc_dec_bottom_right_diagonal: where that ends.
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
            The shape of ``hidden_states``.
        """
        common: dict[str, Any] = {
            "is_first_microbatch": is_first_microbatch,
            "checkpoint_core_attention": checkpoint_core_attention,
            "inference_params": inference_params,
            "rotary_pos_emb": rotary_pos_emb,
            "core_attention_bias_type": core_attention_bias_type,
            "core_attention_bias": core_attention_bias,
            "alibi_slopes": alibi_slopes,
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_kv": cu_seqlens_kv,
            "cu_seqlens_q_padded": cu_seqlens_q_padded,
            "cu_seqlens_kv_padded": cu_seqlens_kv_padded,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_kv": max_seqlen_kv,
            "fast_zero_fill": fast_zero_fill,
            "pad_between_seqs": pad_between_seqs,
            "thd_attention_policies": thd_attention_policies,
            "thd_attention_policy_dispatch": thd_attention_policy_dispatch,
            "softcap": softcap,
        }
        hidden = hidden_states.contiguous()
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        attended: Any = self.self_attention(
            hidden,
            attention_mask=attention_mask,
            attn_mask_type=self_attn_mask_type or self.self_attn_mask_type,
            window_size=self.window_size if window_size is None else window_size,
            bottom_right_diagonal=(
                self.bottom_right_diagonal
                if bottom_right_diagonal is None
                else bottom_right_diagonal
            ),
            **common,
        )
        if self.parallel_attention_mlp:
            out = self.layernorm_mlp(hidden, is_first_microbatch=is_first_microbatch)
            return self._add(attended, out, hidden, drop_path=True)
        after_norm = self.apply_residual_connection_post_layernorm
        # Without a norm at its input attention returns none to take a residual from.
        hidden = self._join(attended, hidden, after_norm and not self.output_layernorm)
        if self.layer_type == "decoder":
            attended = self.inter_attention(
                hidden,
                attention_mask=enc_dec_attn_mask,
                attn_mask_type=enc_dec_attn_mask_type or self.enc_dec_attn_mask_type,
                window_size=(
                    self.enc_dec_window_size
                    if enc_dec_window_size is None
                    else enc_dec_window_size
                ),
                bottom_right_diagonal=(
                    self.enc_dec_bottom_right_diagonal
                    if enc_dec_bottom_right_diagonal is None
                    else enc_dec_bottom_right_diagonal
                ),
                encoder_output=encoder_output,
                **common,
            )
            hidden = self._join(attended, hidden, after_norm, drop_path=False)
        out = self.layernorm_mlp(hidden, is_first_microbatch=is_first_microbatch)
        output = self._join(out, hidden, after_norm)
        if self.output_layernorm:
            output = self.layernorm(output)
        return output

    def _join(
        self,
        results: tuple[Tensor, ...],
        residual: Tensor,
        after_norm: bool,
        drop_path: bool = True,
    ) -> Tensor:
        """Add what a part returned (value, bias, perhaps the norm's result)."""
        if after_norm:
            residual = results[2]
        return self._add(results[0], results[1], residual, drop_path)

    def _add(
        self, value: Tensor, bias: Tensor | None, residual: Tensor, drop_path: bool
    ) -> Tensor:
        """Return ``dropout(value + bias) + residual``."""
        if bias is not None:
            value = value + bias
        value = F.dropout(value, self.hidden_dropout, self.training)
        if drop_path and self.drop_path_rate > 0.0 and self.training:
            keep = 1.0 - self.drop_path_rate
            shape = (value.shape[0],) + (1,) * (value.dim() - 1)
            chance = torch.rand(shape, dtype=value.dtype, device=value.device)
            value = value.div(keep) * (keep + chance).floor_()
        return residual + value

    def reset_fp8_meta_tensors(self) -> None:
        """Set all scales to one and all histories to zero."""
        for child in self.modules():
            if isinstance(child, TransformerEngineBaseModule):
                child.reset_fp8_meta_tensors()
