"""FlashMLA, DeepGEMM and DeepEP for JAX: hand-written Hopper kernels under a jax.lax-like API.

Public modules: `flash_mla`, `deep_gemm`, `deep_ep`, and around them `quantization`, `moe` and
`models`. Each is loaded when first used.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_MODULES = ("deep_ep", "deep_gemm", "flash_mla", "models", "moe", "quantization")

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> ModuleType:
    # `models` needs more packages than the rest, and no program needs every system.
    if name in _MODULES:
        return importlib.import_module(f"jax_ds.{name}")
    raise AttributeError(f"module 'jax_ds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
