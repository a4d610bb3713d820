"""Every CPU test sees eight devices; see the README for running the GPU tests."""

import os

# XLA sizes its CPU thread pool by this variable; eight virtual devices need more threads than
# a small machine has cores, or collectives can deadlock.
os.environ.setdefault("NPROC", "32")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
