"""Public functions of `jax_ds.flash_mla`: they validate, choose an implementation and document.

Sizes, the same in every docstring: B sequences, S new tokens of each, H query heads, D width of a
cached row (512 latent + 64 rope in DeepSeek-V3), V width of a value, P pages of L tokens, N pages
of the longest sequence.
"""

import functools
from typing import Any

from jaxtyping import Array, Float, Float32, Int32

from jax_ds._core.checks import (
    check,
    check_choice,
    check_dtype,
    check_integer,
    check_rank,
    check_shape,
)
from jax_ds._runtime.choose import Implementation, check_implementation, choose
from jax_ds.flash_mla import ffi, vjp, xla
from jax_ds.flash_mla.checks import (
    FLOATS,
    check_cache,
    check_heads,
    check_packing,
    check_same_dtype,
    resolve_scale,
)
from jax_ds.flash_mla.config import (
    DecodeConfig,
    PrefillConfig,
    PrefillOperands,
    PrefillResiduals,
)


def decode(
    q: Float[Array, "B S H D"],
    kv_pages: Float[Array, "P L D"],
    page_table: Int32[Array, "B N"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float | None = None,
    causal: bool = True,
    value_dim: int = 512,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B S H V"] | tuple[Float[Array, "B S H V"], Float32[Array, "B S H"]]:
    """Attention of S new tokens per sequence over a paged latent cache.

    All heads share one cached row per token. With `c[b, j]` the row of token j of sequence b,
    `kv_pages[page_table[b, j // L], j % L]`, and `T = seq_lens[b]`:

        score[b, s, h, j] = scale * q[b, s, h] . c[b, j]        j < T, and j <= T - S + s if causal
        lse[b, s, h]      = log(sum_j exp(score[b, s, h, j]))
        out[b, s, h]      = sum_j exp(score[b, s, h, j] - lse[b, s, h]) * c[b, j, :value_dim]

    Products accumulate in float32; probabilities are rounded to the dtype of q before they meet
    the values. A row without any key (length 0, or a causal row with `T - S + s < 0`) gives out 0,
    lse -inf and zero gradients, whatever q holds there. Memory does not depend on the lengths;
    only pages of existing tokens are read, and work stops at the longest sequence.

    Differentiable (reverse mode) with respect to q and kv_pages, through out and lse: the
    portable backward recomputes block by block from the saved lse, its memory is linear. Tokens
    of a page that several sequences share receive the sum of their gradients; on a GPU the order
    of that sum is not fixed. Inside `jax.shard_map` every operand is this device's part.

    Args:
      q: bfloat16, float16 or float32 queries, already multiplied into the latent space.
      kv_pages: the cache, dtype of q; page size L is 16, 32, 64 or 128. Slots that hold no token
        of a sequence may contain anything, NaN included.
      page_table: int32 page indices. Entries past a sequence's last page may be anything; the
        others must lie in [0, P).
      seq_lens: int32 lengths, counting the S tokens of q too (their rows are in the cache
        already, see `append`). Zero and lengths below S are allowed; tokens past the N * L of the
        table do not exist.
      scale: factor of the scores; None is D**-0.5 (DeepSeek models pass 192**-0.5).
      causal: hide later tokens from earlier queries, aligned at the last token. If False, every
        query sees all T tokens.
      value_dim: V, how many leading columns of a row are its value.
      return_lse: also return lse, natural logarithm, float32.
      implementation: "cuda" (this library's kernels), "xla" (portable), None (ours on Hopper).

    Returns:
      out [B, S, H, V] in the dtype of q, or `(out, lse)`.

    Raises:
      ValueError, TypeError: an argument of wrong shape, dtype or value; a page table that names
        more than 2^30 tokens a request.
      NotImplementedError: `implementation="cuda"` where the kernel cannot run.

    Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1), FlashMLA; the online softmax is that of
    FlashAttention (arXiv 2205.14135).
    """
    check_rank("q", q, 4)
    check_dtype("q", q, *FLOATS)
    batch, _, _, width = q.shape
    check_cache(kv_pages, page_table, seq_lens, batch)
    check_shape("kv_pages", kv_pages, (None, None, width), "P L D")
    check_same_dtype("kv_pages", kv_pages, "q", q)
    value_dim = _check_value_dim(value_dim, width)
    check_choice("causal", causal, (True, False))
    check_choice("return_lse", return_lse, (True, False))
    config = DecodeConfig(
        scale=resolve_scale(scale, width),
        causal=bool(causal),
        value_dim=value_dim,
        implementation=implementation,
    )
    out, lse = vjp.decode(_DECODE, config, q, kv_pages, page_table, seq_lens)
    return (out, lse) if return_lse else out


def explain(
    q: Any, kv_pages: Any, *, value_dim: int = 512, implementation: Implementation = None
) -> str:
    """Says in a sentence how `decode` would run for operands of these shapes and dtypes.

    The choice is analytic, by the number of query rows R = S * H. For R <= 32 the work is bound
    by the cache's bytes (the roofline crosses at about R = 92): the cache's tokens fill the tensor
    cores' rows and the query rows are padded to a multiple of 8 only. Above, CTAs take 64 query
    rows each.

    Args:
      q: the queries [B, S, H, D], or anything with a shape and a dtype.
      kv_pages: likewise [P, L, D].
      value_dim: as in `decode`.
      implementation: as in `decode`.

    Returns:
      A sentence for people; its wording may change.

    Raises:
      ValueError, TypeError: q or kv_pages of wrong rank, a keyword as in `decode`.
    """
    check_rank("q", q, 4)
    check_rank("kv_pages", kv_pages, 3)
    _check_value_dim(value_dim, kv_pages.shape[2])
    check_implementation(implementation)
    reason = ffi.decode_unsupported(kv_pages, value_dim)
    if implementation == "xla" or reason is not None:
        return f"portable implementation: {reason or 'asked for'}"
    batch, tokens, heads, _ = q.shape
    kernel, rows = ffi.decode_tile(tokens * heads)
    tiles = -(-tokens * heads // rows)
    return (
        f"{kernel} kernel on Hopper (portable elsewhere): {batch} requests x {tokens * heads} "
        f"query rows as {tiles} tile{'s' if tiles > 1 else ''} of {rows}, "
        "blocks of 64 tokens shared out evenly over all multiprocessors on the device"
    )


def append(
    kv_pages: Float[Array, "P L D"],
    kv: Float[Array, "B S D"],
    page_table: Int32[Array, "B N"],
    seq_lens: Int32[Array, " B"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "P L D"]:
    """Writes S new rows per sequence into their pages and returns the cache.

        j = seq_lens[b] - S + s
        kv_pages[page_table[b, j // L], j % L] = kv[b, s]        for every b, s with j >= 0

    The update happens in place where XLA may reuse `kv_pages`: when it is donated to the
    enclosing `jax.jit`, or carried by `jax.lax.scan`. Rows at a negative position are dropped, so
    a sequence of length 0 (an empty slot of a batch) writes nothing, and one of length n < S keeps
    the last n rows of `kv`. Slots written in one call must differ from each other: which of two
    rows for the same slot stays is not defined.

    Differentiable (reverse mode) with respect to kv_pages and kv.

    Args:
      kv_pages: the cache, bfloat16, float16 or float32; page size L is 16, 32, 64 or 128.
      kv: the new rows, dtype of kv_pages.
      page_table: int32 page indices, as in `decode`. Entries past a sequence's last page may be
        anything; rows whose entry lies outside [0, P) are dropped.
      seq_lens: int32 lengths after the append, the same values that `decode` takes next.
      implementation: as in `decode`.

    Returns:
      The cache after the writes, shape and dtype of kv_pages.

    Raises:
      ValueError, TypeError: an argument of wrong shape, dtype or value; a page table that names
        more than 2^30 tokens a request.
      NotImplementedError: `implementation="cuda"` where the kernel cannot run.

    Source: the paged cache of vLLM (arXiv 2309.06180) in the layout of FlashMLA.
    """
    check_rank("kv", kv, 3)
    check_dtype("kv", kv, *FLOATS)
    check_cache(kv_pages, page_table, seq_lens, kv.shape[0])
    check_shape("kv_pages", kv_pages, (None, None, kv.shape[2]), "P L D")
    check_same_dtype("kv_pages", kv_pages, "kv", kv)
    return vjp.append(_APPEND, implementation, kv_pages, kv, page_table, seq_lens)


def prefill(
    q: Float[Array, "B Sq H Dk"],
    k: Float[Array, "B Sk Hk Dk"],
    v: Float[Array, "B Sk Hk V"],
    k_rope: Float[Array, "B Sk 1 Dr"] | None = None,
    cu_seqlens_q: Int32[Array, " N+1"] | None = None,
    cu_seqlens_k: Int32[Array, " N+1"] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B Sq H V"] | tuple[Float[Array, "B Sq H V"], Float32[Array, "B Sq H"]]:
    """Attention of Sq queries over Sk keys, for prefill and training.

        score[b, i, h, j] = scale * q[b, i, h] . key[b, j, h]    all j; j <= i + Sk - Sq if causal
        lse[b, i, h]      = log(sum_j exp(score[b, i, h, j]))
        out[b, i, h]      = sum_j exp(score[b, i, h, j] - lse[b, i, h]) * v[b, j, h // (H / Hk)]

    where `key[b, j, h]` is `k[b, j, h // (H / Hk)]`, followed by `k_rope[b, j, 0]` if given. The
    causal mask is aligned at the last query and the last key (chunked prefill: k holds the past
    too). Products accumulate in float32; probabilities are rounded to the dtype of v before they
    meet the values. A row without any key gives out 0, lse -inf and zero gradients, whatever q
    holds there.

    Differentiable (reverse mode) with respect to q, k, v and k_rope, through out and lse. Nothing
    of size Sq * Sk is stored, forward or backward; blocks that the mask hides are skipped, so
    causal attention costs half. Deterministic: the same operands give the same bits, gradients
    included.

    The kernels take bfloat16 and heads of 192/128 (with or without a shared k_rope of 64), 128/128
    and 64/64; anything else takes the portable path, or is an error with `implementation="cuda"`.

    Packed batches: with `cu_seqlens_q` (and `cu_seqlens_k`, the same if None) B is 1, and
    sequence n consists of queries `cu_seqlens_q[n]` to `cu_seqlens_q[n + 1]` and of the keys that
    `cu_seqlens_k` says; each attends within itself, with its own causal alignment. The offsets may
    change from call to call without compiling anew; lengths of 0 are allowed. Tokens outside the
    offsets are padding: their values, NaN included, touch nothing, and they get out 0, lse -inf and
    zero gradients. A NaN in a token that does
    belong to a sequence may show in any query, as in every blockwise attention.

    Args:
      q: bfloat16, float16 or float32 queries, B Sq H Dk (192 in DeepSeek-V3: 128 + 64 rotary).
      k: keys, dtype of q, Hk heads where Hk divides H; width Dk, or Dk - Dr with `k_rope`.
      v: values of any width, dtype of q.
      k_rope: the rotary part of the keys, shared by all heads and never copied per head.
      cu_seqlens_q: int32 offsets, non-decreasing, all from 0 to Sq.
      cu_seqlens_k: int32 offsets, non-decreasing, all from 0 to Sk.
      causal: whether a query sees only the keys up to its own position.
      scale: factor of the scores; None is Dk**-0.5.
      return_lse: also return lse, natural logarithm, float32.
      implementation: "cuda" (this library's kernels), "xla" (portable), None (ours on Hopper).

    Returns:
      out [B, Sq, H, V] in the dtype of q, or `(out, lse)`.

    Raises:
      ValueError, TypeError: an argument of wrong shape, dtype or value; offsets known while
        tracing that decrease or leave the array.
      NotImplementedError: `implementation="cuda"` where the kernel cannot run.

    Source: FlashAttention-2 (arXiv 2307.08691); heads as in DeepSeek-V2 (arXiv 2405.04434).
    """
    check_heads(q, k, v, k_rope)
    cu_seqlens_k = check_packing(q, k, cu_seqlens_q, cu_seqlens_k)
    check_choice("causal", causal, (True, False))
    check_choice("return_lse", return_lse, (True, False))
    config = PrefillConfig(
        scale=resolve_scale(scale, q.shape[3]), causal=bool(causal), implementation=implementation
    )
    operands = PrefillOperands(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k)
    out, lse = vjp.prefill(_PREFILL, config, operands)
    return (out, lse) if return_lse else out


def _check_value_dim(value_dim: int, width: int) -> int:
    value_dim = check_integer("value_dim", value_dim)
    rule = f"must be an integer from 1 to D = {width}"
    check(1 <= value_dim <= width, "value_dim", rule, value_dim)
    return value_dim


def _decode_forward(config: DecodeConfig, *operands: Any) -> Any:
    kv_pages = operands[1]
    return choose(
        "flash_mla.decode",
        config.implementation,
        operands,
        xla=functools.partial(xla.decode, config),
        cuda=functools.partial(ffi.decode, config),
        unsupported=ffi.decode_unsupported(kv_pages, config.value_dim),
    )


def _append_forward(implementation: Implementation, *operands: Any) -> Any:
    return choose(
        "flash_mla.append",
        implementation,
        operands,
        xla=xla.append,
        cuda=ffi.append,
        unsupported=ffi.append_unsupported(operands[0]),
    )


def _prefill_forward(config: PrefillConfig, operands: PrefillOperands) -> Any:
    return choose(
        "flash_mla.prefill",
        config.implementation,
        (operands,),
        xla=functools.partial(xla.prefill, config),
        cuda=functools.partial(ffi.prefill, config),
        unsupported=ffi.prefill_unsupported(operands),
    )


def _prefill_backward(config: PrefillConfig, residuals: PrefillResiduals, *cotangents: Any) -> Any:
    return choose(
        "flash_mla.prefill's gradient",
        config.implementation,
        (residuals, *cotangents),
        xla=functools.partial(xla.prefill_backward, config),
        cuda=functools.partial(ffi.prefill_backward, config),
        unsupported=ffi.prefill_unsupported(residuals.operands),
    )


_DECODE = vjp.Rule(_decode_forward, xla.decode_backward)
_APPEND = vjp.Rule(_append_forward, xla.append_backward)
_PREFILL = vjp.Rule(_prefill_forward, _prefill_backward)
