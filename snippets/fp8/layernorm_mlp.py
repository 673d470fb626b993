"""Transformer Engine's ``LayerNormMLP``, on any device.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

Guide: guide/fp8
Tests: tests/test_fp8_transformer.py
Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/layernorm_mlp.py``
    (Apache-2.0): signature, defaults, initialization, order of results, which kernels
    quantize what they compute.
Changed: 2026-11-22
SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS, FUSED_BACKWARD, activate, check_activation
from .base import InitMethod, TransformerEngineBaseModule, resolve_device
from .layernorm_linear import add_norm_parameters, reset_norm_parameters
from .linear import normal_init, warn_unquantized, zero_init
from .linear_function import linear
from .norms import feed, normalize
from .parallel import refuse, refuse_parallel
from .quantizers import Float8Quantizer
from .slots import QuantizerRole
from .state import FP8GlobalStateManager
from .tensor import QuantizedTensor

__all__ = ["LayerNormMLP"]


class LayerNormMLP(TransformerEngineBaseModule):
    """A norm, a linear layer, an activation function and a second linear layer.

    What is rounded before it is quantized is as in :class:`LayerNormLinear`, for the
    result of the activation function as for that of the norm; under delayed scaling the
    gradient of an activation function that is not gated is quantized in float32, too.
    In high precision Transformer Engine rounds the first product before it adds a bias
    for ``"gelu"``; here it is rounded once, after that.

    Args:
        hidden_size: features of input and output.
        ffn_hidden_size: features between the layers; a gated activation function has
            twice as many rows in ``fc1_weight``.
        eps: added to the variance, or mean square.
        bias: add biases.
        normalization: ``"LayerNorm"`` or ``"RMSNorm"``.
        activation: ``"gelu"``, ``"geglu"``, ``"glu"``, ``"qgelu"``, ``"qgeglu"``,
            ``"relu"``, ``"reglu"``, ``"srelu"``, ``"sreglu"``, ``"silu"``,
            ``"swiglu"`` or ``"clamped_swiglu"``.
        activation_params: ``limit``, ``alpha`` and ``glu_linear_offset`` of the last.
        init_method: fills ``fc1_weight`` in place; default N(0, 0.023).
        output_layer_init_method: fills ``fc2_weight``; default N(0, 0.023).
        return_bias: return the second bias and leave adding it to the caller.
        params_dtype: dtype of the parameters, default ``torch.get_default_dtype()``.
        return_layernorm_output: return the norm's result, too.
        return_layernorm_output_gathered: with one rank there is nothing to gather.
        seq_length, micro_batch_size: for a warm-up that a CPU does not need.
        set_parallel_mode: with one rank it changes only where the bias is added.
        zero_centered_gamma: start the norm's weight at zero and add one to it.
        fuse_wgrad_accumulation: add weight gradients to ``main_grad`` of the weights.
        device: where parameters live; ``"cuda"`` is the CPU where there is no GPU.
        name: of the module, given to a ``CustomRecipe``.
        tp_group, tp_size: only one rank is emulated.
        sequence_parallel, ub_*, symmetric_ar_type: with one rank they change nothing,
            as in Transformer Engine.
        get_rng_state_tracker, delay_wgrad_compute, checkpoint: only their defaults are
            emulated (:func:`checkpoint` recomputes a whole module).

    Raises:
        NotImplementedError: an option or activation function that is not emulated.
        ValueError: sizes below 1, or another normalization.
        TypeError: a parameter that the activation function does not have.
    """

    layer_norm_weight: Tensor
    layer_norm_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        return_bias: bool = False,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: InitMethod | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        activation_params: dict[str, Any] | None = None,
        output_layer_init_method: InitMethod | None = None,
        fuse_wgrad_accumulation: bool = False,
        params_dtype: torch.dtype | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        set_parallel_mode: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        name: str | None = None,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        checkpoint: bool = False,
    ) -> None:
        """Make and fill the parameters.

        Raises:
            ValueError: sizes below 1.
        """
        refuse_parallel("LayerNormMLP", tp_size, tp_group)
        refuse(
            "LayerNormMLP",
            get_rng_state_tracker=(get_rng_state_tracker, None),
            delay_wgrad_compute=(delay_wgrad_compute, False),
            checkpoint=(checkpoint, False),
        )
        if hidden_size < 1 or ffn_hidden_size < 1:
            raise ValueError(
                f"LayerNormMLP({hidden_size=}, {ffn_hidden_size=}): both must be at "
                "least 1."
            )
        check_activation(activation, activation_params)
        super().__init__(name)
        self.hidden_size = hidden_size
        self.eps = eps
        self.normalization = normalization
        self.zero_centered_gamma = zero_centered_gamma
        self.activation = activation
        self.activation_params = activation_params
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered
        self.set_parallel_mode = set_parallel_mode
        self.gemm_bias_unfused_add = set_parallel_mode and self.apply_bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.size_per_partition = ffn_hidden_size
        dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        where = resolve_device(device)
        add_norm_parameters(
            self,
            hidden_size,
            normalization=normalization,
            zero_centered_gamma=zero_centered_gamma,
            device=where,
            dtype=dtype,
        )
        self.weight_names = ["fc1_weight", "fc2_weight"]
        rows = ffn_hidden_size * (2 if ACTIVATIONS[activation][1] else 1)
        for layer, shape, init, index in (
            ("fc1", (rows, hidden_size), init_method, 1),
            ("fc2", (hidden_size, ffn_hidden_size), output_layer_init_method, 4),
        ):
            self.add_parameter(
                f"{layer}_weight",
                torch.empty(shape, device=where, dtype=dtype),
                init or normal_init,
                fp8_meta_index=index,
            )
            if bias:
                value = torch.empty(shape[0], device=where, dtype=dtype)
                self.add_parameter(f"{layer}_bias", value, zero_init)
            else:
                empty = torch.empty(0, device=where, dtype=dtype)
                setattr(self, f"{layer}_bias", empty)
        if self.primary_weights_in_fp8:
            self.init_fp8_metadata(num_gemms=2)
        self.reset_parameters(defer_init=where.type == "meta")

    def reset_layer_norm_parameters(self) -> None:
        """Fill the norm's parameters anew; deprecated, as in Transformer Engine."""
        reset_norm_parameters(self)

    def get_quantizer_roles(
        self, *, fwd: bool, num_quantizers: int
    ) -> list[QuantizerRole | None]:
        """Return what each slot is for; the two layers are ``fc1`` and ``fc2``.

        Args:
            fwd: slots of the forward pass, else of gradients.
            num_quantizers: of slots.
        """
        prefix = f"{self.name}." if self.name else ""

        def role(kind: str, layer: str) -> QuantizerRole:
            return QuantizerRole("linear", kind, prefix + layer)

        pattern = (
            [
                role("input", "fc1"),
                role("weight", "fc1"),
                role("input", "fc2"),  # who takes the first layer's output
                role("input", "fc2"),
                role("weight", "fc2"),
                self.output_quantizer_role,
            ]
            if fwd
            else [
                role("grad_output", "fc1"),
                self.grad_input_quantizer_role,
                role("grad_output", "fc2"),
                role("grad_output", "fc1"),  # who takes fc2's gradient of its input
            ]
        )
        return [pattern[i % len(pattern)] for i in range(num_quantizers)]

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Apply norm, layer, activation function and layer.

        Args:
            inp: [..., hidden_size].
            is_first_microbatch: with several micro-batches a step: True quantizes the
                weights and keeps the codes, False uses those, None does neither.

        Returns:
            [..., hidden_size]; with ``return_bias`` then the bias, with
            ``return_layernorm_output`` then the norm's result.

        Raises:
            ValueError: a shape that the layers or FP8 kernels cannot take.
            NotImplementedError: a recipe with ``backward_override``.
        """
        if inp.shape[-1] != self.hidden_size:
            raise ValueError(
                f"GEMM not possible: input of shape {list(inp.shape)}, "
                f"hidden_size {self.hidden_size}"
            )
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        enabled = FP8GlobalStateManager.is_fp8_enabled()
        if enabled and recipe.backward_override is not None:
            raise NotImplementedError(
                f"backward_override={recipe.backward_override!r} is not implemented in "
                "LayerNormMLP. Replace LayerNormMLP with LayerNormLinear + Linear to "
                "enable it."
            )
        inp = self.prepare_forward(inp, num_gemms=2)
        assert self.activation_dtype is not None
        dtype = self.activation_dtype
        try:
            out, normed = self._products(inp, is_first_microbatch, dtype)
        finally:
            self.end_forward()
        if self.gemm_bias_unfused_add:
            out = out + self.fc2_bias.to(dtype)
        results: list[Tensor | None] = [out]
        if self.return_bias:
            results.append(self.fc2_bias.to(dtype) if self.use_bias else None)
        if self.return_layernorm_output:
            results.append(normed)
        return out if len(results) == 1 else tuple(results)

    def _products(
        self, inp: Tensor, is_first_microbatch: bool | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if not self.fp8 and isinstance(self.fc1_weight, QuantizedTensor):
            warn_unquantized()
        norm = (self.layer_norm_weight, self.layer_norm_bias)
        fc1_bias = self.fc1_bias if self.use_bias else None
        fused_bias = self.apply_bias and not self.gemm_bias_unfused_add
        fc2_bias = self.fc2_bias if fused_bias else None
        first = (inp, *norm, self.fc1_weight, fc1_bias)
        fc1, fc2 = (
            self.make_call(
                gemm,
                is_first_microbatch=is_first_microbatch,
                workspace=name,
                weight=getattr(self, name),
                fuse_wgrad_accumulation=self.fuse_wgrad_accumulation,
                operands=operands,
            )
            for gemm, name, operands in (
                (0, "fc1_weight", first),
                (1, "fc2_weight", (self.fc2_weight, fc2_bias)),
            )
        )
        # The last of the backward is the first layer's, unless it has nothing to do.
        if fc1.updates_gradients:
            fc2.updates_gradients = False
        # A kernel that quantizes the gradient of the activation function takes it as it
        # is, in float32.
        if (
            isinstance(fc1.grad_output_quantizer, Float8Quantizer)
            and self.activation in FUSED_BACKWARD
        ):
            fc1.output_dtype = torch.float32
        values = normalize(
            inp,
            *norm,
            self.eps,
            kind=self.normalization,
            zero_centered_gamma=self.zero_centered_gamma,
            dtype=dtype,
        )
        normed = feed(values, fc1, dtype, not self.return_layernorm_output)
        hidden = linear(normed, self.fc1_weight, fc1_bias, fc1)
        with torch.autocast(inp.device.type, enabled=False):
            values = activate(hidden.float(), self.activation, self.activation_params)
            custom = FP8GlobalStateManager.get_fp8_recipe().custom()
            active = feed(values, fc2, dtype, not custom)
        out = linear(active, self.fc2_weight, fc2_bias, fc2)
        self.keep_workspace("fc1_weight", fc1, is_first_microbatch)
        self.keep_workspace("fc2_weight", fc2, is_first_microbatch)
        return out, normed
