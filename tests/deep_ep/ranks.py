"""What the tests with one process for each rank share; `make gpu-test-multirank` starts them.

Every rank makes its own operands from a key; what differs between the implementations is counted
on the devices and summed over all ranks. The mesh is ("node", "ep"), one node unless NODES says
otherwise.

Nearly all the time goes into compiling. So a test says by `@compiles(programs_of)` which programs
it runs, and from the start on they are compiled several at a time, in the order of the tests, by
the first rank, which hands them to the others.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds._runtime.varying import to_varying
from jax_ds.quantization import quantize_1x128
from tests.gpu import multirank

Array = jax.Array

AXES = ("node", "ep")


# Programs that are compiled at a time.
THREADS = max(2, min(12, (os.cpu_count() or 2) // 2))


def nodes() -> int:
    return int(os.environ.get("JAX_DS_TEST_NODES", "1"))


def group_size() -> int:
    """Ranks along "ep"."""
    return jax.device_count() // nodes()


def compiles(programs_of: Callable[..., Any]) -> pytest.MarkDecorator:
    """Marks a test that runs the Program, or several, that `programs_of` makes.

    It takes those of the test's parameters that it names, and skips where the test does.
    """
    return pytest.mark.compiles.with_args(programs_of)


def join(tests: Iterable[pytest.Item]) -> int:
    """Joins the other ranks and starts to compile what the tests run; ranks along "ep"."""
    if not multirank.started_here():
        pytest.skip("run by make gpu-test-multirank")
    multirank.join()
    # One thread traces, in order: several would all be done at the end.
    tracer = ThreadPoolExecutor(1)
    compiler = ThreadPoolExecutor(THREADS)
    for test in tests:
        for marker in test.iter_markers("compiles"):
            programs_of = marker.args[0]
            given = test.callspec.params if hasattr(test, "callspec") else {}
            try:  # by position, as tests do, or a cached function would make another program
                made = programs_of(*(given[name] for name in signature(programs_of).parameters))
            except pytest.skip.Exception:
                continue
            for program in [made] if isinstance(made, Program) else made:
                program.compile_in(tracer, compiler)
    return group_size()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of one program; experts are per rank, which number along `axes`."""

    tokens: int = 96
    hidden: int = 1024
    top_k: int = 4
    experts: int = 2
    capacity: int | None = None
    alignment: int = 1
    dtype: str = "bfloat16"
    num_sms: int | None = None
    axes: tuple[str, ...] = ("ep",)
    node_capacity: int | None = None

    @property
    def axis_name(self) -> str | tuple[str, ...]:
        return self.axes if len(self.axes) > 1 else self.axes[0]

    @property
    def num_experts(self) -> int:
        return self.experts * jax.lax.axis_size(self.axes)

    def plan(self, expert_ids: Array) -> deep_ep.DispatchPlan:
        return deep_ep.plan_dispatch(
            expert_ids,
            num_experts=self.num_experts,
            axis_name=self.axis_name,
            capacity=self.capacity,
            node_capacity=self.node_capacity,
            expert_alignment=self.alignment,
        )


ROUTINGS = ("uniform", "one_expert", "one_rank", "none", "ragged", "repeated", "not_experts")


def expert_ids(sizes: Sizes, key: Array, routing: Array) -> Array:
    """Expert ids `[T, K]` of this rank; `routing` indexes ROUTINGS."""
    shape, num_experts = (sizes.tokens, sizes.top_k), sizes.num_experts
    rank = jax.lax.axis_index(sizes.axes)
    draws = jax.random.randint(key, shape, 0, num_experts)
    one = jnp.where(jnp.arange(sizes.top_k)[None] == sizes.top_k // 2, num_experts // 2, -1)
    kinds = [
        draws,
        jnp.broadcast_to(one, shape),
        num_experts - 1 - draws % sizes.experts,
        jnp.full(shape, -1),
        jnp.where(jnp.arange(sizes.tokens)[:, None] % 5 <= rank % 4, draws, -1),
        jnp.broadcast_to(draws[:, :1], shape),
        jnp.where(jnp.arange(sizes.tokens)[:, None] > 0, draws * 2 - num_experts // 2, draws),
    ]
    return jnp.stack(kinds)[routing].astype(jnp.int32)


class Program:
    """`function` of replicated arguments on every rank; results are summed over ranks.

    Args:
      function: of per-device arrays.
      like: the arguments' shapes and dtypes; else a key.
      compiler_options: of XLA.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *like: Any,
        compiler_options: dict[str, Any] | None = None,
    ) -> None:
        self._like = like or (jax.random.key(0),)
        self._traced: Future[Future[Any]] | None = None
        shape = (nodes(), jax.device_count() // nodes())
        mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)

        def per_rank(*args: Any) -> Any:
            args = jax.tree.map(lambda a: jax.lax.pcast(a, AXES, to="varying"), args)
            results = to_varying(function(*args), AXES)  # without tokens they may be constants
            return jax.tree.map(lambda a: jax.lax.psum(a, AXES), results)

        self._jitted = jax.jit(
            jax.shard_map(per_rank, mesh=mesh, in_specs=P(), out_specs=P()),
            compiler_options=compiler_options,
        )

    def compile_in(self, tracer: Executor, compiler: Executor) -> None:
        """Ahead of the first call, unless it is under way already."""
        if self._traced is None:
            self._traced = tracer.submit(
                lambda: compiler.submit(self._jitted.lower(*self._like).compile)
            )

    def __call__(self, *args: Any) -> Any:
        assert self._traced or not multirank.started_here(), "not named by @compiles"
        run = self._jitted if self._traced is None else self._traced.result().result()
        return jax.tree.map(np.asarray, run(*args))


def mine(key: Array) -> Array:
    """A key that no other rank has."""
    return jax.random.fold_in(key, jax.lax.axis_index(AXES))


def _operands(sizes: Sizes, key: Array, routing: Array) -> dict[str, Any]:
    """A plan, and random operands and cotangents; NaN in rows that hold no token."""
    keys = jax.random.split(mine(key), 4)
    ids = expert_ids(sizes, keys[0], routing)
    plan = sizes.plan(ids)
    dtype = jnp.dtype(sizes.dtype)
    x, g = jax.random.normal(keys[1], (2, sizes.tokens, sizes.hidden)).astype(dtype)
    capacity = plan.row_source.shape[0]
    rows, d_rows = jax.random.normal(keys[2], (2, capacity, sizes.hidden)).astype(dtype)
    return {
        "plan": plan,
        "x": x,
        "g": g,
        "rows": jnp.where(plan.row_source[:, None] >= 0, rows, jnp.nan),
        "d_rows": d_rows,
        "weights": jax.random.normal(keys[3], ids.shape),
    }


def _everything(sizes: Sizes, given: dict[str, Any], implementation: str) -> dict[str, Array]:
    """Values and gradients of both functions on one rank."""
    plan = given["plan"]
    options = {"implementation": implementation, "num_sms": sizes.num_sms}
    dispatched, pull = jax.vjp(lambda x: deep_ep.dispatch(x, plan, **options), given["x"])
    y, pull_combine = jax.vjp(
        lambda r, w: deep_ep.combine(r, plan, w, **options), given["rows"], given["weights"]
    )
    quantized = deep_ep.dispatch(quantize_1x128(given["x"]), plan, **options)
    d_combine_rows, d_combine_weights = pull_combine(given["g"])
    return {
        "rows": dispatched,
        "values": quantized.values,
        "scales": quantized.scales,
        "y": y,
        "d_x": pull(given["d_rows"])[0],
        "d_combine_rows": d_combine_rows,
        "d_combine_weights": d_combine_weights,
    }


def bits_of(a: Array) -> Array:
    return jax.lax.bitcast_convert_type(
        a, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    )


def different(a: Array, b: Array) -> Array:
    """Elements with other bits."""
    return jnp.sum(bits_of(a) != bits_of(b), dtype=jnp.int32)


def far(a: Array, b: Array, tolerance: float) -> Array:
    """Elements further apart than the tolerance, or NaN."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sum(~(jnp.abs(a - b) <= tolerance * (1 + jnp.abs(b))), dtype=jnp.int32)


def digest(a: Array) -> Array:
    """A number that changes with any bit of `a`, and with the place of elements."""
    bits = bits_of(a).astype(jnp.uint32).reshape(-1)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    return jnp.sum((bits + place) * (2 * place + 1), dtype=jnp.uint32)


def key_and_routing(seed: int = 0, routing: str = ROUTINGS[0]) -> tuple[Array, Array]:
    """Arguments of the programs that compare."""
    return jax.random.key(seed), jnp.asarray(ROUTINGS.index(routing), jnp.int32)


@functools.cache
def compare(sizes: Sizes) -> Program:
    """A program: how many elements of each result differ, and digests of what the kernels made."""
    tolerance = 1e-5 if sizes.dtype == "float32" else 2e-2

    def run(key: Array, routing: Array) -> dict[str, Any]:
        given = _operands(sizes, key, routing)
        got, want = (_everything(sizes, given, i) for i in ("cuda", "xla"))
        exact = ("rows", "values", "scales", "d_combine_rows")
        wrong = {name: different(got[name], want[name]) for name in exact}
        for name in ("y", "d_x", "d_combine_weights"):
            wrong[name] = far(got[name], want[name], tolerance)
        live = jnp.sum(jnp.any(want["values"].astype(jnp.float32) != 0, axis=1))
        return {"wrong": wrong, "digests": jax.tree.map(digest, got), "live": live}

    return Program(run, *key_and_routing())


def check(sizes: Sizes, seed: int, routing: str) -> None:
    """The kernels equal the portable implementation, and themselves in a second run."""
    given = key_and_routing(seed, routing)
    result, again = compare(sizes)(*given), compare(sizes)(*given)
    assert not any(result["wrong"].values()), (routing, result["wrong"])
    assert result["digests"] == again["digests"], routing
    assert (result["live"] > 0) == (routing != "none" and sizes.tokens > 0)
