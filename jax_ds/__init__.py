"""FlashMLA, DeepGEMM and DeepEP for JAX: hand-written Hopper kernels under a jax.lax-like API.

Public modules: `flash_mla`, `deep_gemm`, `deep_ep`, and around them `quantization`, `moe` and
`models`. Import them by name, for instance `from jax_ds import deep_gemm`.
"""
