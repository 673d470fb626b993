"""Transformer Engine's FP8 modules, contexts and recipes, emulated on any device.

Copy this folder into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8.py
    Sources: NVIDIA, Transformer Engine 2.20.2, 2026 (Apache-2.0): names, signatures,
             semantics.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

from .gemm import scaled_matmul
from .install import install, installed, uninstall
from .linear import Linear
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
    DelayedScalingRequest,
    DType,
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    IdentityQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    Quantizer,
    QuantizerRole,
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
from .state import (
    FP8GlobalStateManager,
    accumulator,
    autocast,
    emulated_device,
    fp8_autocast,
    fp8_model_init,
    get_default_recipe,
    is_fp8_available,
    is_fp8_block_scaling_available,
    is_mxfp8_available,
    is_nvfp4_available,
    quantized_model_init,
)
from .tensor import QuantizedTensor

__all__ = [
    "CustomRecipe",
    "DType",
    "DelayedScaling",
    "DelayedScalingRequest",
    "FP8GlobalStateManager",
    "Float8BlockQuantizer",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "Float8CurrentScalingQuantizer",
    "Float8Quantizer",
    "Format",
    "IdentityQuantizer",
    "Linear",
    "MMParams",
    "MXFP8BlockScaling",
    "MXFP8Quantizer",
    "NVFP4BlockScaling",
    "NVFP4Quantizer",
    "QParams",
    "QuantizedTensor",
    "Quantizer",
    "QuantizerRole",
    "Recipe",
    "accumulator",
    "autocast",
    "compute_current_scale",
    "compute_scale",
    "dequantize",
    "emulated_device",
    "fp8_autocast",
    "fp8_model_init",
    "get_default_recipe",
    "install",
    "installed",
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
