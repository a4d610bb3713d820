"""Every error a caller of `flash_mla` can see, to the word."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds import flash_mla


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(*shape, dtype=jnp.int32)


def _raises(
    kind: type[Exception], message: str, function: Any, operands: dict[str, Any], **static: Any
) -> None:
    with pytest.raises(kind) as caught:
        jax.eval_shape(lambda x: function(**x, **static), operands)
    assert str(caught.value) == message


DECODE = {
    "q": _array(2, 1, 4, 576),
    "kv_pages": _array(8, 64, 576),
    "page_table": _ints(2, 3),
    "seq_lens": _ints(2),
}
APPEND = {"kv_pages": DECODE["kv_pages"], "kv": _array(2, 1, 576)} | {
    name: DECODE[name] for name in ("page_table", "seq_lens")
}
PREFILL = {"q": _array(2, 8, 4, 192), "k": _array(2, 8, 4, 192), "v": _array(2, 8, 4, 128)}
PACKED = {
    "q": _array(1, 8, 4, 192),
    "k": _array(1, 9, 4, 192),
    "v": _array(1, 9, 4, 128),
    "cu_seqlens_q": _ints(3),
    "cu_seqlens_k": _ints(3),
}
FLOATS = "dtype must be bfloat16, float16 or float32"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    (
        ({"q": _array(2, 4, 576)}, ValueError, "q: must have 4 dimensions, got shape [2, 4, 576]"),
        ({"q": _array(2, 1, 4, 576, dtype=jnp.int8)}, TypeError, f"q: {FLOATS}, got int8"),
        (
            {"kv_pages": _array(8, 576)},
            ValueError,
            "kv_pages: must have 3 dimensions, got shape [8, 576]",
        ),
        (
            {"kv_pages": _array(8, 48, 576)},
            ValueError,
            "kv_pages: page size must be 16, 32, 64 or 128, got 48",
        ),
        (
            {"kv_pages": _array(8, 64, 512)},
            ValueError,
            "kv_pages: must have shape [P L D] = [*, *, 576], got [8, 64, 512]",
        ),
        (
            {"kv_pages": _array(8, 64, 576, dtype=jnp.float16)},
            TypeError,
            "kv_pages: dtype must be q's, bfloat16, got float16",
        ),
        (
            {"kv_pages": _array(8, 64, 576, dtype=jnp.float8_e4m3fn)},
            TypeError,
            f"kv_pages: {FLOATS}, got float8_e4m3fn",
        ),
        ({"page_table": _array(2, 3)}, TypeError, "page_table: dtype must be int32, got bfloat16"),
        (
            {"page_table": _ints(2, 2**24 + 1)},
            ValueError,
            "page_table: N times the page size must be at most 2^30, got 1073741888",
        ),
        (
            {"page_table": _ints(3, 3)},
            ValueError,
            "page_table: must have shape [B N] = [2, *], got [3, 3]",
        ),
        (
            {"seq_lens": _array(2, dtype=jnp.uint32)},
            TypeError,
            "seq_lens: dtype must be int32, got uint32",
        ),
        ({"seq_lens": _ints(3)}, ValueError, "seq_lens: must have shape [B] = [2], got [3]"),
    ),
)
def test_decode_operands(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    _raises(kind, message, flash_mla.decode, DECODE | change)


@pytest.mark.parametrize(
    ("static", "message"),
    (
        ({"value_dim": 577}, "value_dim: must be an integer from 1 to D = 576, got 577"),
        ({"value_dim": 0}, "value_dim: must be an integer from 1 to D = 576, got 0"),
        ({"scale": 0.0}, "scale: must be a positive finite number, got 0.0"),
        ({"scale": float("nan")}, "scale: must be a positive finite number, got nan"),
        (
            {"implementation": "gpu"},
            "implementation: must be one of None, 'xla', 'cuda', got 'gpu'",
        ),
    ),
)
def test_decode_static(static: dict[str, Any], message: str) -> None:
    _raises(ValueError, message, flash_mla.decode, DECODE, **static)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    (
        ({"kv": _array(2, 576)}, ValueError, "kv: must have 3 dimensions, got shape [2, 576]"),
        ({"kv": _ints(2, 1, 576)}, TypeError, f"kv: {FLOATS}, got int32"),
        (
            {"kv": _array(2, 1, 512)},
            ValueError,
            "kv_pages: must have shape [P L D] = [*, *, 512], got [8, 64, 576]",
        ),
        (
            {"kv": _array(2, 1, 576, dtype=jnp.float32)},
            TypeError,
            "kv_pages: dtype must be kv's, float32, got bfloat16",
        ),
        ({"seq_lens": _ints(1)}, ValueError, "seq_lens: must have shape [B] = [2], got [1]"),
    ),
)
def test_append(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    _raises(kind, message, flash_mla.append, APPEND | change)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    (
        ({"q": _array(8, 4, 192)}, ValueError, "q: must have 4 dimensions, got shape [8, 4, 192]"),
        ({"q": _ints(2, 8, 4, 192)}, TypeError, f"q: {FLOATS}, got int32"),
        (
            {"q": _array(2, 8, 4, 0), "k": _array(2, 8, 4, 0)},
            ValueError,
            "q: last dimension must be positive, got 0",
        ),
        (
            {"k": _array(2, 8, 4, 128)},
            ValueError,
            "k: must have shape [B Sk Hk Dk] = [2, *, *, 192], got [2, 8, 4, 128]",
        ),
        ({"k": _array(2, 8, 3, 192)}, ValueError, "k: number of heads must divide q's 4, got 3"),
        ({"k": _array(2, 8, 0, 192)}, ValueError, "k: number of heads must divide q's 4, got 0"),
        (
            {"v": _array(2, 7, 4, 128)},
            ValueError,
            "v: must have shape [B Sk Hk V] = [2, 8, 4, *], got [2, 7, 4, 128]",
        ),
        (
            {"k": _array(2, 8, 4, 192, dtype=jnp.float32)},
            TypeError,
            "k: dtype must be q's, bfloat16, got float32",
        ),
        (
            {"v": _array(2, 8, 4, 128, dtype=jnp.float32)},
            TypeError,
            "v: dtype must be q's, bfloat16, got float32",
        ),
        (
            {"k_rope": _array(2, 8, 1, 192)},
            ValueError,
            "k_rope: width must be positive and below q's 192, got 192",
        ),
        (
            {"k_rope": _array(2, 8, 4, 64), "k": _array(2, 8, 4, 128)},
            ValueError,
            "k_rope: must have shape [B Sk 1 Dr] = [2, 8, 1, *], got [2, 8, 4, 64]",
        ),
        (
            {"k_rope": _array(2, 8, 1, 64)},
            ValueError,
            "k: must have shape [B Sk Hk Dk-Dr] = [2, *, *, 128], got [2, 8, 4, 192]",
        ),
        (
            {"k_rope": _array(2, 8, 1, 64, dtype=jnp.float16), "k": _array(2, 8, 4, 128)},
            TypeError,
            "k_rope: dtype must be q's, bfloat16, got float16",
        ),
        ({"cu_seqlens_q": _ints(3)}, ValueError, "q: B must be 1 with cu_seqlens_q, got 2"),
        (
            {"cu_seqlens_k": _ints(3)},
            ValueError,
            "cu_seqlens_k: needs cu_seqlens_q too, got None for it",
        ),
    ),
)
def test_prefill(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    _raises(kind, message, flash_mla.prefill, PREFILL | change)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    (
        (
            {"cu_seqlens_q": _ints(3, 1)},
            ValueError,
            "cu_seqlens_q: must have 1 dimensions, got shape [3, 1]",
        ),
        (
            {"cu_seqlens_q": _array(3)},
            TypeError,
            "cu_seqlens_q: dtype must be int32, got bfloat16",
        ),
        (
            {"cu_seqlens_q": _ints(1)},
            ValueError,
            "cu_seqlens_q: must have at least 2 entries, got 1",
        ),
        (
            {"cu_seqlens_k": _ints(4)},
            ValueError,
            "cu_seqlens_k: must have shape [N+1] = [3], got [4]",
        ),
        (
            {"cu_seqlens_k": _array(3)},
            TypeError,
            "cu_seqlens_k: dtype must be int32, got bfloat16",
        ),
        (
            {"cu_seqlens_k": None},
            ValueError,
            "cu_seqlens_k: is needed where Sk differs from Sq, got None",
        ),
    ),
)
def test_packed_prefill(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    _raises(kind, message, flash_mla.prefill, PACKED | change)


def _packed(q: list[int], k: list[int] | None) -> None:
    """A packed call whose offsets are known while tracing."""
    offsets = [None if x is None else jnp.asarray(x, jnp.int32) for x in (q, k)]
    arrays = {name: PACKED[name] for name in ("q", "k", "v")}
    jax.eval_shape(
        lambda x: flash_mla.prefill(**x, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1]), arrays
    )


@pytest.mark.parametrize(
    ("q", "k", "message"),
    (
        ([0, 5, 3], [0, 5, 9], "cu_seqlens_q: must not decrease, got [0, 5, 3]"),
        ([0, 5, 9], [0, 5, 9], "cu_seqlens_q: must lie between 0 and Sq = 8, got [0, 5, 9]"),
        ([-1, 5, 8], [0, 5, 9], "cu_seqlens_q: must lie between 0 and Sq = 8, got [-1, 5, 8]"),
        ([0, 5, 8], [0, 5, 10], "cu_seqlens_k: must lie between 0 and Sk = 9, got [0, 5, 10]"),
        ([0, 5, 8], [4, 3, 9], "cu_seqlens_k: must not decrease, got [4, 3, 9]"),
    ),
)
def test_offsets_known_while_tracing(q: list[int], k: list[int], message: str) -> None:
    _packed([0, 0, 8], [2, 2, 9])
    with pytest.raises(ValueError) as caught:
        _packed(q, k)
    assert str(caught.value) == message


@pytest.mark.parametrize("keyword", ("causal", "return_lse"))
@pytest.mark.parametrize(("name", "operands"), (("decode", DECODE), ("prefill", PREFILL)))
def test_flags(name: str, operands: dict[str, Any], keyword: str) -> None:
    message = f"{keyword}: must be one of True, False, got 'no'"
    _raises(ValueError, message, getattr(flash_mla, name), operands, **{keyword: "no"})


@pytest.mark.parametrize(
    ("name", "operands"), (("decode", DECODE), ("append", APPEND), ("prefill", PREFILL))
)
def test_kernels_need_a_gpu(name: str, operands: dict[str, Any]) -> None:
    function = getattr(flash_mla, name)
    with pytest.raises(NotImplementedError) as caught:
        jax.eval_shape(lambda x: function(**x, implementation="cuda"), operands)
    message = str(caught.value)
    assert message.startswith(f"flash_mla.{name}: implementation='cuda' cannot run here, ")
    assert message.endswith("; use implementation=None or 'xla'")
