"""Fine-grained FP8 quantization (DeepSeek-V3): values in e4m3fn, one float32 scale per block."""

from jax_ds._core.groups import padded_tokens
from jax_ds.quantization.api import (
    dequantize,
    quantize_1x128,
    quantize_1x128_both,
    quantize_128x128,
    quantize_128x128_both,
    swiglu_quantize_1x128,
    swiglu_quantize_1x128_both,
)
from jax_ds.quantization.types import Quantized
from jax_ds.quantization.xla import ScaleDtype

__all__ = [
    "Quantized",
    "ScaleDtype",
    "dequantize",
    "padded_tokens",
    "quantize_1x128",
    "quantize_1x128_both",
    "quantize_128x128",
    "quantize_128x128_both",
    "swiglu_quantize_1x128",
    "swiglu_quantize_1x128_both",
]
