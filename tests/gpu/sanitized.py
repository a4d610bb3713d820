"""Small calls of one room's kernels, for compute-sanitizer: `sanitize.py` starts them.

    python tests/gpu/sanitized.py ROOM [PART OF A NAME]

Every configuration of the products, the named cases of attention, every quantizer, a round of
either kind of exchange. Values are other tests' business. Operands are made on the host, so that
XLA has little to compile.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from jax_ds import deep_ep, flash_mla, quantization
from jax_ds.deep_gemm import ffi, tuned
from jax_ds.quantization import Quantized
from tests.flash_mla import cases
from tests.flash_mla.cases import DecodeCase, PrefillCase
from tests.gpu import multirank

Array = Any
Case = tuple[str, Callable[..., Any], tuple[Any, ...]]

_RNG = np.random.default_rng(0)


def _normal(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> Array:
    return _RNG.standard_normal(shape, np.float32).astype(dtype)


def _ints(*values: int) -> Array:
    return np.asarray(values, np.int32)


# ---- products: more blocks of the contracted dimension than a ring has slots


def _quantized(*shape: int, rows: int) -> Quantized:
    """Values with scales of 128 columns and all, or all blocks of 128, of the rows."""
    scales = np.full((*shape[:-2], rows, -(-shape[-1] // 128)), 0.1, np.float32)
    return Quantized(_normal(*shape, dtype=ml_dtypes.float8_e4m3fn), scales)


def _product(
    mode: str, output: str, m: int, n: int, k: int, sizes: Array, added: bool = False
) -> Iterator[Case]:
    """A case for each configuration that can run the product."""
    groups = 1 if sizes is None else len(sizes)
    problem = tuned.Problem(mode, output, added, m, n, k, groups)
    many = (groups,) if mode in ("grouped", "masked") else ()
    lhs = _quantized(*((groups,) if mode == "masked" else ()), m, k, rows=m)
    rhs = _quantized(*many, n, k, rows=n if mode == "wgrad" else -(-n // 128))
    shape = (m, n) if mode in ("dense", "grouped") or groups == 1 else (groups, m, n)
    operands = (lhs, rhs, sizes, np.zeros(shape, np.float32) if added else None)
    for name, _ in tuned.candidates(problem):

        def run(*operands: Any, name: str = name) -> Any:
            return ffi.launch(problem, name, *operands, shape)

        yield f"{problem}: {name}", run, operands


def dense() -> Iterator[Case]:
    for output in ("bfloat16", "float32"):
        yield from _product("dense", output, 200, 264, 2640, None)


def grouped() -> Iterator[Case]:
    sizes = _ints(70, 0, 129, 1)
    for output in ("bfloat16", "float32"):
        yield from _product("grouped", output, 300, 264, 1296, sizes)
        yield from _product("masked", output, 150, 264, 1296, sizes)


def wgrad() -> Iterator[Case]:
    for sizes in (None, _ints(700, 0, 129, 1)):
        yield from _product("wgrad", "bfloat16", 200, 264, 1280, sizes)
        yield from _product("wgrad", "float32", 200, 264, 1280, sizes)
        yield from _product("wgrad", "float32", 200, 264, 1280, sizes, added=True)


# ---- attention


_DECODE_CASES = (
    *(case for case in cases.DECODE_CASES if case.width == 576),
    *(DecodeCase(f"{heads} heads", (70, 0, 200), heads=heads) for heads in (16, 24, 64, 128)),
    DecodeCase("64 heads in float16", (70, 0, 200), heads=64, dtype="float16"),
    DecodeCase("many parts", (3000,), heads=128),
    DecodeCase("many rows", (130, 1, 70, 129, 300), tokens=2, heads=128),
)


def decode() -> Iterator[Case]:
    for case in _DECODE_CASES:
        run = functools.partial(flash_mla.decode, **case.static, implementation="cuda")
        yield f"decode, {case}", run, cases.decode_inputs(case)
    pages, table = _normal(8, 64, 576), np.arange(6, dtype=np.int32).reshape(2, 3)
    append = functools.partial(flash_mla.append, implementation="cuda")
    yield "append", append, (pages, _normal(2, 3, 576), table, _ints(66, 2))


def _prefill(case: PrefillCase, offsets: tuple[Array, ...], *heads: Array) -> Any:
    """With its gradient."""

    def attend(q: Array, k: Array, v: Array, k_rope: Any = None) -> Any:
        static = {"causal": case.causal, "implementation": "cuda"}
        return flash_mla.prefill(q, k, v, k_rope, *offsets, **static)

    out, pullback = jax.vjp(attend, *heads)
    return out, pullback(out)


def prefill() -> Iterator[Case]:
    fits = [case for case in cases.PREFILL_CASES if np.dtype(case.dtype) == ml_dtypes.bfloat16]
    square = dataclasses.replace(fits[0], name="128/128", width=128)
    for case in (*fits, square):
        *heads, queries, keys = cases.prefill_inputs(case)
        run = functools.partial(_prefill, case, (queries, keys))
        yield f"prefill, {case}", run, tuple(x for x in heads if x is not None)


# ---- quantizers


def quantize() -> Iterator[Case]:
    cuda = functools.partial(functools.partial, implementation="cuda")
    for dtype in (ml_dtypes.bfloat16, np.float32):
        x, sizes = _normal(150, 400, dtype=dtype), _ints(70, 0, 60)
        for function, operands in (
            (quantization.quantize_1x128, (x,)),
            (quantization.quantize_128x128, (x,)),
            (quantization.quantize_128x128_both, (x,)),
            (quantization.quantize_1x128_both, (x, sizes)),
            (quantization.swiglu_quantize_1x128, (x, np.int32(77))),
            (quantization.swiglu_quantize_1x128_both, (x, sizes)),
        ):
            yield f"{function.__name__}, {np.dtype(dtype).name}", cuda(function), operands


# ---- exchange, of all ranks there are


def _exchange(x: Array, ids: Array, weights: Array) -> Any:
    plan = deep_ep.plan_dispatch(ids, num_experts=8, axis_name="ep", implementation="cuda")
    rows = deep_ep.dispatch(x, plan, implementation="cuda")
    return rows, deep_ep.combine(rows, plan, weights, implementation="cuda")


def _low_latency(x: Array, ids: Array, weights: Array) -> Any:
    static: Any = {"num_experts": 8, "max_tokens": 40, "axis_name": "ep"}
    rows, sizes, handle = deep_ep.low_latency_dispatch(x, ids, **static, implementation="cuda")
    out = rows.values.astype(x.dtype)
    return sizes, deep_ep.low_latency_combine(out, handle, weights, implementation="cuda")


def exchange() -> Iterator[Case]:
    mesh = jax.make_mesh((jax.device_count(),), ("ep",), axis_types=(AxisType.Auto,))
    over = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
    )
    ids, weights = _RNG.integers(-1, 8, (33, 4), np.int32), np.full((33, 4), 0.5, np.float32)
    sharding = jax.sharding.NamedSharding(mesh, P("ep"))
    operands = tuple(
        jax.make_array_from_process_local_data(sharding, part)
        for part in (_normal(33, 1024), ids, weights)
    )
    yield "dispatch, combine", over(_exchange), operands
    yield "low latency", over(_low_latency), operands


ROOMS = {
    "deep_ep": exchange,
    "dense": dense,
    "grouped": grouped,
    "wgrad": wgrad,
    "decode": decode,
    "prefill": prefill,
    "quantization": quantize,
}


def main(room: str, part: str = "") -> None:
    if multirank.started_here():
        multirank.join()
    for name, function, operands in ROOMS[room]():
        if part in name:
            print(f"starts    {name}", flush=True)  # the last line where it hangs
            start = time.monotonic()
            jax.block_until_ready(jax.jit(function)(*operands))
            print(f"{time.monotonic() - start:6.1f} s  {name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
