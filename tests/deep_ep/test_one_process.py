"""The communication kernels with one process for all GPUs of a host.

    python -m pytest -m multigpu tests/deep_ep/test_one_process.py

skips where JAX sees fewer than two GPUs.
"""

import jax
import jax.numpy as jnp
import pytest

from jax_ds import deep_ep
from tests.deep_ep.ranks import ROUTINGS, Program, Sizes, check, different, expert_ids, mine
from tests.gpu import multirank

pytestmark = pytest.mark.multigpu

Array = jax.Array

SIZES = {
    "default": Sizes(),
    "drops": Sizes(tokens=200, hidden=512, top_k=8, experts=32, capacity=384, alignment=128),
    "two_axes": Sizes(axes=("node", "ep"), tokens=33, hidden=640),
}


@pytest.fixture(scope="module", autouse=True)
def gpus() -> int:
    if multirank.started_here() or jax.default_backend() != "gpu" or jax.local_device_count() < 2:
        pytest.skip("needs one process with several GPUs")
    return jax.local_device_count()


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_portable_implementation(name: str) -> None:
    for seed, routing in enumerate(ROUTINGS):
        check(SIZES[name], seed, routing)


def test_windows_of_several_programs_and_channels() -> None:
    """Every device's thread registers its windows; later programs find them or make others."""

    def program(channel: int, tokens: int) -> Program:
        sizes = Sizes(tokens=tokens)

        def run(key: Array) -> dict[str, Array]:
            key = mine(key)
            ids = expert_ids(sizes, key, jnp.asarray(0))
            x = jax.random.normal(key, (tokens, sizes.hidden)).astype(jnp.bfloat16)
            plan = deep_ep.plan_dispatch(
                ids, num_experts=sizes.num_experts, axis_name="ep", channel=channel
            )
            rows = [deep_ep.dispatch(x, plan, implementation=i) for i in ("cuda", "xla")]
            return {"wrong": different(*rows)}

        return Program(run)

    programs = [program(channel, tokens) for channel in (0, 1) for tokens in (64, 4096)]
    for seed in range(6):
        for run in programs:
            assert run(jax.random.key(seed))["wrong"] == 0


def test_nothing_was_reported() -> None:
    deep_ep.check()
