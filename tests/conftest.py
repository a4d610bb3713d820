"""Every CPU test sees eight devices; see the README for running the GPU tests."""

import os

# XLA sizes its CPU thread pool by this variable; eight virtual devices need more threads than
# a small machine has cores, or collectives can deadlock.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> int:
    """Ranks along "ep", for tests with one process for each rank; skips elsewhere."""
    from tests.deep_ep import ranks

    return ranks.join(request.session.items)
