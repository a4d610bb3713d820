"""The one reader of the environment.

| variable | meaning | default |
| --- | --- | --- |
| `JAX_DS_CACHE_DIR` | folder of compiled kernels | `jax_ds` in the user's cache folder |
| `JAX_DS_GEMM_TUNING` | file that `deep_gemm.tune` wrote; the same on every process | none |
| `JAX_DS_TIMEOUT_S` | longest wait of a communication kernel for a peer, seconds | 60 |
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from jax_ds._core.checks import fail


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of this process, read once and passed explicitly."""

    cache_dir: pathlib.Path
    timeout_s: float
    gemm_tuning: pathlib.Path | None = None


def read(environment: Mapping[str, str] = os.environ) -> Settings:
    """Reads the settings from `environment`; a malformed value is a ValueError."""
    cache_home = environment.get("XDG_CACHE_HOME") or os.path.join(
        environment.get("HOME") or os.path.expanduser("~"), ".cache"
    )
    cache_dir = environment.get("JAX_DS_CACHE_DIR") or os.path.join(cache_home, "jax_ds")
    text = environment.get("JAX_DS_TIMEOUT_S", "60")
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = -1.0
    if not 0.0 < timeout_s < float("inf"):
        fail("JAX_DS_TIMEOUT_S", "must be a positive number of seconds", repr(text))
    tuning = environment.get("JAX_DS_GEMM_TUNING")
    return Settings(
        cache_dir=pathlib.Path(cache_dir),
        timeout_s=timeout_s,
        gemm_tuning=pathlib.Path(tuning) if tuning else None,
    )
