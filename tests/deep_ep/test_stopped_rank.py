"""A rank that does not come: the others say for whom they waited, and can still end.

The device stays dead afterwards. So these are the last tests, and one of two is run: with two ranks
that of low latency, with more that of dispatch; `-k` may choose.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds.quantization import dequantize
from tests.deep_ep.ranks import Sizes, expert_ids, nodes

pytestmark = pytest.mark.multigpu

Array = jax.Array


def _choose(request: pytest.FixtureRequest, here: bool) -> None:
    if len(request.session.items) > 1 and not here:
        pytest.skip("the other operation's rank is stopped in this run")


def _mesh(ranks: int) -> jax.sharding.Mesh:
    if ranks == 1 or nodes() > 1:
        pytest.skip("needs one group with a peer")
    return jax.make_mesh((ranks,), ("ep",), axis_types=(AxisType.Auto,))


def _stop_the_last(
    ranks: int,
    operation: str,
    send: Callable[[int], Array],
    is_poison: Callable[[np.ndarray], np.ndarray],
) -> None:
    """All ranks come to `send(0)`, the last one no more: what the others get, and are told."""
    jax.block_until_ready(send(0))
    deep_ep.check()
    last = ranks - 1
    limit = float(os.environ["JAX_DS_TIMEOUT_S"])
    if jax.process_index() == last:
        time.sleep(limit + 4)
        return
    start = time.monotonic()
    result = jax.block_until_ready(send(1)).addressable_shards[0].data
    assert limit * 0.9 < time.monotonic() - start < limit + 3
    assert is_poison(np.asarray(result)).all()
    sentence = f"{operation}, rank {jax.process_index()}, round .*: waited in vain for rank {last}"
    with pytest.raises(RuntimeError, match=sentence):
        deep_ep.check()
    with pytest.raises(Exception, match=sentence):
        jax.block_until_ready(send(2))


def test_a_rank_stopped_in_dispatch(ranks: int, request: pytest.FixtureRequest) -> None:
    """The last rank does not come to the second round."""
    mesh = _mesh(ranks)
    _choose(request, ranks > 2)
    sizes = Sizes(tokens=16, hidden=512)
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("ep"))

    @jax.jit
    @functools.partial(on_mesh, in_specs=P())
    def make(key: Array) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index("ep"))
        ids = expert_ids(sizes, key, jnp.asarray(0))
        plan = sizes.plan(ids)
        x = jnp.ones((sizes.tokens, sizes.hidden), jnp.bfloat16)
        return jax.tree.map(lambda a: a[None], (x, plan))

    # Only a kernel communicates here: XLA's own collectives would wait without end.
    @jax.jit
    @functools.partial(on_mesh, in_specs=P("ep"))
    def send(x: Array, plan: Any) -> Array:
        x, plan = jax.tree.map(lambda a: a[0], (x, plan))
        return deep_ep.dispatch(x, plan, implementation="cuda", num_sms=2)[None]

    operands = jax.block_until_ready(make(jax.random.key(3)))
    _stop_the_last(
        ranks,
        "deep_ep.dispatch",
        lambda _: send(*operands),
        lambda rows: np.isnan(rows.astype(np.float32)),
    )


def test_a_rank_stopped_in_low_latency(ranks: int, request: pytest.FixtureRequest) -> None:
    """The last rank does not come to the second round, which is in two halves."""
    mesh = _mesh(ranks)
    _choose(request, ranks == 2)
    sizes = Sizes(tokens=16, hidden=512)

    # Only kernels communicate here: XLA's own collectives would wait without end.
    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P("ep"))
    def send(key: Array) -> Array:
        key = jax.random.fold_in(key, jax.lax.axis_index("ep"))
        ids = expert_ids(sizes, key, jnp.asarray(0))
        x = jnp.ones((sizes.tokens, sizes.hidden), jnp.bfloat16)
        sent = deep_ep.low_latency_dispatch_start(
            x,
            ids,
            num_experts=sizes.num_experts,
            max_tokens=sizes.tokens,
            axis_name="ep",
            implementation="cuda",
        )
        rows, counts, handle = deep_ep.low_latency_dispatch_finish(sent)
        out = dequantize(rows).astype(x.dtype)
        sent_back = deep_ep.low_latency_combine_start(
            out, handle, jnp.ones(ids.shape), implementation="cuda"
        )
        y = deep_ep.low_latency_combine_finish(sent_back)
        return jnp.where(jnp.isnan(y), counts[0], 0)

    _stop_the_last(
        ranks,
        "deep_ep.low_latency_dispatch",
        lambda turn: send(jax.random.key(turn)),
        # All results are NaN, and all rows of an expert count.
        lambda counts: counts == ranks * sizes.tokens,
    )
