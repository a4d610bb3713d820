"""What the profiler tells without a GPU; tests/runtime/test_gpu.py has what it tells of one."""

import jax
import jax.numpy as jnp

from jax_ds._runtime import profile


def test_without_gpus_nothing_was_launched() -> None:
    ran = []
    assert profile.launches(lambda: ran.append(jax.block_until_ready(jnp.ones(3) + 1))) == []
    assert len(ran) == 1


def test_events_are_read_where_warnings_are_errors() -> None:
    """Those of the host, as there is no GPU."""
    found = profile.launches(lambda: jax.block_until_ready(jnp.ones(3) + 1), planes="/", lines="")
    assert found == sorted(found)
    assert all(launch.name and launch.duration_ns >= 0 for launch in found)
    assert found
