"""FP8 matrix products with fine-grained scales (after DeepGEMM)."""

from jax_ds.deep_gemm.api import (
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_grouped_wgrad,
    fp8_masked_gemm,
    fp8_wgrad,
)
from jax_ds.deep_gemm.explain import explain
from jax_ds.deep_gemm.linear import (
    bf16_grouped_gemm,
    bf16_masked_gemm,
    fp8_grouped_linear,
    fp8_linear,
)
from jax_ds.deep_gemm.tune import tune

__all__ = [
    "bf16_grouped_gemm",
    "bf16_masked_gemm",
    "explain",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "fp8_grouped_linear",
    "fp8_grouped_wgrad",
    "fp8_linear",
    "fp8_masked_gemm",
    "fp8_wgrad",
    "tune",
]
