"""Transformer Engine's FP8 modules, contexts and recipes, emulated on any device.

Copy this folder into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8.py
    Sources: NVIDIA, Transformer Engine 2.20.2, 2026 (Apache-2.0): names, signatures,
             semantics.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import difflib
from typing import Never

from .attention import DotProductAttention
from .checkpoint import checkpoint
from .gemm import scaled_matmul
from .install import install, installed, uninstall
from .kinds import (
    Float8BlockwiseQTensor,
    Float8Tensor,
    IdentityTensor,
    MXFP8Tensor,
    NVFP4Tensor,
)
from .layernorm_linear import LayerNormLinear
from .layernorm_mlp import LayerNormMLP
from .linear import Linear
from .multi_head_attention import MultiheadAttention
from .norms import LayerNorm, RMSNorm
from .numerics import (
    compute_current_scale,
    compute_scale,
    dequantize,
    quantize_block,
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_tensor,
    update_amax_history,
    update_delayed_scaling,
)
from .quantizers import (
    DType,
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    IdentityQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    Quantizer,
)
from .recipe import (
    CustomRecipe,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MMParams,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    QParams,
    Recipe,
)
from .rotary import RotaryPositionEmbedding, apply_rotary_pos_emb
from .slots import DelayedScalingRequest, QuantizerRequest, QuantizerRole
from .state import (
    FP8GlobalStateManager,
    accumulator,
    autocast,
    emulated_device,
    fp8_autocast,
    fp8_model_init,
    get_default_recipe,
    get_device_compute_capability,
    is_bf16_available,
    is_fp8_available,
    is_fp8_block_scaling_available,
    is_mxfp8_available,
    is_nvfp4_available,
    quantized_model_init,
)
from .tensor import QuantizedTensor
from .transformer import TransformerLayer

__all__ = [
    "CustomRecipe",
    "DType",
    "DelayedScaling",
    "DelayedScalingRequest",
    "DotProductAttention",
    "FP8GlobalStateManager",
    "Float8BlockQuantizer",
    "Float8BlockScaling",
    "Float8BlockwiseQTensor",
    "Float8CurrentScaling",
    "Float8CurrentScalingQuantizer",
    "Float8Quantizer",
    "Float8Tensor",
    "Format",
    "IdentityQuantizer",
    "IdentityTensor",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "MMParams",
    "MXFP8BlockScaling",
    "MXFP8Quantizer",
    "MXFP8Tensor",
    "MultiheadAttention",
    "NVFP4BlockScaling",
    "NVFP4Quantizer",
    "NVFP4Tensor",
    "QParams",
    "QuantizedTensor",
    "Quantizer",
    "QuantizerRequest",
    "QuantizerRole",
    "RMSNorm",
    "Recipe",
    "RotaryPositionEmbedding",
    "TransformerLayer",
    "accumulator",
    "apply_rotary_pos_emb",
    "autocast",
    "checkpoint",
    "compute_current_scale",
    "compute_scale",
    "dequantize",
    "emulated_device",
    "fp8_autocast",
    "fp8_model_init",
    "get_default_recipe",
    "get_device_compute_capability",
    "install",
    "installed",
    "is_bf16_available",
    "is_fp8_available",
    "is_fp8_block_scaling_available",
    "is_mxfp8_available",
    "is_nvfp4_available",
    "quantize_block",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "quantize_tensor",
    "quantized_model_init",
    "scaled_matmul",
    "uninstall",
    "update_amax_history",
    "update_delayed_scaling",
]


def __getattr__(name: str) -> Never:
    """Say that the emulator lacks a name, rather than that nothing has it.

    Raises:
        AttributeError: always.
    """
    near = difflib.get_close_matches(name, __all__, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(
        f"{__name__} has no {name!r}: if Transformer Engine has it, it is not emulated."
        f"{hint}"
    )
