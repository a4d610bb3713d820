"""What programs become for CUDA, on a machine without a GPU: our custom calls, and nothing of ours
where the README's table says that an operation has no kernel."""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds import deep_ep, deep_gemm, flash_mla, quantization
from jax_ds.quantization import Quantized, padded_tokens

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"

M, N, K, G = 384, 256, 512, 4
P = padded_tokens(M, G)


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(*shape, dtype=jnp.int32)


def _rows(*shape: int) -> Any:
    return jax.eval_shape(quantization.quantize_1x128, _array(*shape))


def _weights(*shape: int) -> Any:
    return jax.eval_shape(quantization.quantize_128x128, _array(*shape))


def _columns(width: int, tokens: int) -> Quantized:
    scales = _array(width, tokens // 128, dtype=jnp.float32)
    return Quantized(_array(width, tokens, dtype=jnp.float8_e4m3fn), scales)


def _cotangents(function: Callable[..., Any], argnums: tuple[int, ...]) -> Callable[..., Any]:
    """The backward pass alone, after a forward pass that nothing else uses."""

    def backward(*operands: Any) -> Any:
        def loss(*differentiated: Any) -> jax.Array:
            values = list(operands)
            for i, value in zip(argnums, differentiated, strict=True):
                values[i] = value
            return jnp.sum(function(*values).astype(jnp.float32))

        return jax.grad(loss, argnums=tuple(range(len(argnums))))(*(operands[i] for i in argnums))

    return backward


def _exchange(*, low_latency: bool) -> Callable[..., Any]:
    """Dispatch and combine of 32 experts on eight devices."""

    def body(x: jax.Array, ids: jax.Array) -> jax.Array:
        weights = jnp.ones(ids.shape, jnp.float32)
        if low_latency:
            rows, _, handle = deep_ep.low_latency_dispatch(
                x, ids, num_experts=32, max_tokens=16, axis_name="ep", quantize=False
            )
            return deep_ep.low_latency_combine(rows, handle, weights)
        plan = deep_ep.plan_dispatch(ids, num_experts=32, axis_name="ep")
        return deep_ep.combine(deep_ep.dispatch(x, plan), plan, weights)

    def exchange(x: jax.Array, ids: jax.Array) -> jax.Array:
        # Made here, not while tests are collected: a machine with one GPU collects them too.
        mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
        return jax.shard_map(body, mesh=mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep"))(x, ids)

    return exchange


def _packed_prefill(q: jax.Array, k: jax.Array, v: jax.Array, offsets: jax.Array) -> Any:
    return flash_mla.prefill(q, k, v, None, offsets)


DECODE = (_array(2, 1, 128, 576), _array(8, 64, 576), _ints(2, 4), _ints(2))
PREFILL = (_array(1, 256, 16, 192), _array(1, 256, 16, 192), _array(1, 256, 16, 128))
EXCHANGE = (_array(128, 256), _ints(128, 4))

# By the name in the README's table.
OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "quantize_1x128": (quantization.quantize_1x128, (_array(M, K),)),
    "quantize_128x128": (quantization.quantize_128x128, (_array(N, K),)),
    "quantize_1x128_both": (quantization.quantize_1x128_both, (_array(M, K), _ints(G))),
    "quantize_128x128_both": (quantization.quantize_128x128_both, (_array(N, K),)),
    "swiglu_quantize_1x128": (quantization.swiglu_quantize_1x128, (_array(M, 2 * K),)),
    "swiglu_quantize_1x128_both": (
        quantization.swiglu_quantize_1x128_both,
        (_array(M, 2 * K), _ints(G)),
    ),
    "fp8_gemm": (deep_gemm.fp8_gemm, (_rows(M, K), _weights(N, K))),
    "fp8_grouped_gemm": (
        deep_gemm.fp8_grouped_gemm,
        (_rows(M, K), _weights(G, N, K), _ints(G)),
    ),
    "fp8_masked_gemm": (
        deep_gemm.fp8_masked_gemm,
        (_rows(G, M, K), _weights(G, N, K), _ints(G)),
    ),
    "fp8_wgrad": (deep_gemm.fp8_wgrad, (_columns(N, M), _columns(K, M))),
    "fp8_grouped_wgrad": (
        deep_gemm.fp8_grouped_wgrad,
        (_columns(N, P), _columns(K, P), _ints(G)),
    ),
    "decode": (flash_mla.decode, DECODE),
    "append": (flash_mla.append, (DECODE[1], _array(2, 1, 576), *DECODE[2:])),
    "prefill": (flash_mla.prefill, PREFILL),
    "prefill, packed batches": (_packed_prefill, (*PREFILL, _ints(4))),
    "gradient of decode": (_cotangents(flash_mla.decode, (0, 1)), DECODE),
    "gradient of prefill": (_cotangents(flash_mla.prefill, (0, 1, 2)), PREFILL),
    "gradient of prefill, packed batches": (
        _cotangents(_packed_prefill, (0, 1, 2)),
        (*PREFILL, _ints(4)),
    ),
    "dispatch, combine": (_exchange(low_latency=False), EXCHANGE),
    "low_latency_dispatch, low_latency_combine": (_exchange(low_latency=True), EXCHANGE),
}


def _lowered(name: str) -> str:
    function, operands = OPERATIONS[name]
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo" in text
    return text


def _targets(text: str) -> set[str]:
    return set(re.findall(r"custom_call @(jax_ds_\w+)", text))


def _readme() -> dict[str, str]:
    """The table's rows: operation -> what runs on Hopper."""
    section = README.read_text().split("## What runs where")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return {cells[0].replace("`", "").strip(): cells[-1].strip() for cells in rows[2:]}


def test_the_table_names_every_operation() -> None:
    assert list(_readme()) == list(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_table_tells_what_runs_on_hopper(name: str) -> None:
    said = _readme()[name]
    assert re.match(r"(kernel|XLA)\b", said), said
    backward = name.startswith("gradient of ")
    forward = _targets(_lowered(name.removeprefix("gradient of "))) if backward else set()
    # A backward pass may call the forward kernel again; what counts is a kernel of its own.
    assert bool(_targets(_lowered(name)) - forward) == said.startswith("kernel")


def test_scales_of_rows_leave_column_major() -> None:
    """Where the products read them by columns, no transpose may stand in between."""
    calls = re.findall(r"custom_call @jax_ds_quantize_rows.*", _lowered("quantize_1x128"))
    assert len(calls) == 1
    assert "result_layouts = [dense<[1, 0]>" in calls[0]
    assert "dense<[0, 1]> : tensor<2xindex>]" in calls[0]


def digests() -> dict[str, str]:
    """Of every operation's program."""
    return {name: hashlib.sha256(_lowered(name).encode()).hexdigest() for name in OPERATIONS}


def test_programs_are_the_same_in_every_process() -> None:
    """No pointer and nothing else of a process is in them: caches across processes hold, and ranks
    run the same program."""
    code = (
        "import json, tests.conftest; from tests import test_lowering; "
        "print(json.dumps(test_lowering.digests()))"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
    }
    other = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(other.stdout) == digests()


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_portable_choice_has_no_custom_call(name: str) -> None:
    function, operands = OPERATIONS[name]
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=("cpu",)).as_text()
    assert not _targets(text)


PRODUCT = {"accumulate": False, "config": "", "expected_rows": 0, "zero_tail": True}
HEADS = {"causal": True, "qk_dim": 192, "rope": 0, "v_dim": 128}
RANKS = {"channel": 0, "num_ranks": 8, "num_sms": 0, "num_tokens": 16}
LOW_LATENCY = RANKS | {
    "dtype": "bfloat16",
    "experts": 4,
    "half": "whole",
    "hidden": 256,
    "region": 128,
    "top_k": 4,
}
# What a handler is told, by operation and target; without `groups` of ranks and `scale`.
ATTRIBUTES: dict[tuple[str, str], dict[str, Any]] = {
    ("quantize_1x128_both", "jax_ds_quantize_tiles"): {
        "blocks": "lines",
        "input": "bfloat16",
        "k": K,
        "p": P,
        "swiglu": False,
        "ue8m0": False,
    },
    ("quantize_128x128_both", "jax_ds_quantize_tiles"): {
        "blocks": "square_transposed",
        "input": "bfloat16",
        "k": K,
        "p": N,
        "swiglu": False,
        "ue8m0": False,
    },
    ("swiglu_quantize_1x128", "jax_ds_quantize_rows"): {
        "input": "bfloat16",
        "k": K,
        "swiglu": True,
        "ue8m0": False,
    },
    ("fp8_gemm", "jax_ds_gemm"): PRODUCT
    | {"groups": 1, "m": M, "n": N, "k": K, "mode": "dense", "output": "bfloat16"},
    ("fp8_grouped_gemm", "jax_ds_gemm"): PRODUCT
    | {"groups": G, "m": M, "n": N, "k": K, "mode": "grouped", "output": "bfloat16"},
    ("fp8_masked_gemm", "jax_ds_gemm"): PRODUCT
    | {"groups": G, "m": M, "n": N, "k": K, "mode": "masked", "output": "bfloat16"},
    ("fp8_wgrad", "jax_ds_gemm"): PRODUCT
    | {"groups": 1, "m": N, "n": K, "k": M, "mode": "wgrad", "output": "float32"},
    ("fp8_grouped_wgrad", "jax_ds_gemm"): PRODUCT
    | {"groups": G, "m": N, "n": K, "k": P, "mode": "wgrad", "output": "float32"},
    ("decode", "jax_ds_flash_mla_decode"): {
        "causal": True,
        "half": False,
        "heads": 128,
        "tokens": 1,
    },
    ("prefill", "jax_ds_flash_mla_prefill"): HEADS | {"packed": False},
    ("gradient of prefill, packed batches", "jax_ds_flash_mla_prefill_backward"): HEADS
    | {"packed": True},
    ("dispatch, combine", "jax_ds_deep_ep_dispatch"): RANKS | {"num_scales": 0, "token_bytes": 512},
    ("dispatch, combine", "jax_ds_deep_ep_combine"): RANKS
    | {"dtype": "bfloat16", "token_bytes": 512, "top_k": 4},
    (
        "low_latency_dispatch, low_latency_combine",
        "jax_ds_deep_ep_low_latency_dispatch",
    ): LOW_LATENCY | {"quantize": False},
    (
        "low_latency_dispatch, low_latency_combine",
        "jax_ds_deep_ep_low_latency_combine",
    ): LOW_LATENCY,
}


@pytest.mark.parametrize(("name", "target"), ATTRIBUTES, ids=lambda part: part.split(",")[0])
def test_what_a_handler_is_told(name: str, target: str) -> None:
    call = re.search(rf"@{target}\(.*?mhlo.backend_config = \{{(.*?)\}}", _lowered(name))
    assert call is not None
    told: dict[str, Any] = {}
    for key, text in re.findall(r"(\w+) = (true|false|\"[^\"]*\"|\d+(?= : i64))", call[1]):
        told[key] = json.loads(text)
    assert told == ATTRIBUTES[name, target]


def test_sums_are_added_to_in_place() -> None:
    """The weight gradient's last operand is its result."""
    total = _array(G, N, K, dtype=jnp.float32)
    operands = (_columns(N, P), _columns(K, P), _ints(G), total)
    text = (
        jax.jit(deep_gemm.fp8_grouped_wgrad)
        .trace(*operands)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    (call,) = re.findall(r"custom_call @jax_ds_gemm\(.*", text)
    assert re.search(r"accumulate = true", call)
    assert re.search(r"output_operand_alias<.*operand_index = 5", call), call
