"""The differentiation rules. They call whichever forward and backward functions they are given."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_ds._runtime.choose import Implementation
from jax_ds._runtime.varying import match_primal
from jax_ds.flash_mla.config import (
    DecodeConfig,
    PrefillConfig,
    PrefillOperands,
    PrefillResiduals,
)

Array = jax.Array


class Rule(NamedTuple):
    """A forward function and the one that maps its residuals and cotangents to gradients."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class DecodeResiduals(NamedTuple):
    q: Array
    kv_pages: Array
    page_table: Array
    seq_lens: Array
    out: Array
    lse: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def decode(
    rule: Rule, config: DecodeConfig, q: Array, kv_pages: Array, page_table: Array, seq_lens: Array
) -> tuple[Array, Array]:
    out, lse = rule.forward(config, q, kv_pages, page_table, seq_lens)
    return out, lse


def _decode_fwd(
    rule: Rule, config: DecodeConfig, q: Array, kv_pages: Array, page_table: Array, seq_lens: Array
) -> tuple[tuple[Array, Array], DecodeResiduals]:
    out, lse = rule.forward(config, q, kv_pages, page_table, seq_lens)
    return (out, lse), DecodeResiduals(q, kv_pages, page_table, seq_lens, out, lse)


def _decode_bwd(
    rule: Rule, config: DecodeConfig, residuals: DecodeResiduals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    dq, dkv_pages = rule.backward(config, *residuals, *cotangents)
    return match_primal(dq, residuals.q), match_primal(dkv_pages, residuals.kv_pages), None, None


decode.defvjp(_decode_fwd, _decode_bwd)


class AppendResiduals(NamedTuple):
    page_table: Array
    seq_lens: Array
    # Empty slices: only their types count, and no page is kept alive for them.
    kv_pages: Array
    kv: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def append(
    rule: Rule,
    implementation: Implementation,
    kv_pages: Array,
    kv: Array,
    page_table: Array,
    seq_lens: Array,
) -> Array:
    pages: Array = rule.forward(implementation, kv_pages, kv, page_table, seq_lens)
    return pages


def _append_fwd(
    rule: Rule,
    implementation: Implementation,
    kv_pages: Array,
    kv: Array,
    page_table: Array,
    seq_lens: Array,
) -> tuple[Array, AppendResiduals]:
    out = rule.forward(implementation, kv_pages, kv, page_table, seq_lens)
    return out, AppendResiduals(page_table, seq_lens, kv_pages[:0], kv[:, :, :0])


def _append_bwd(
    rule: Rule, implementation: Implementation, residuals: AppendResiduals, cotangent: Array
) -> tuple[Array, Array, None, None]:
    num_tokens = residuals.kv.shape[1]
    dkv_pages, dkv = rule.backward(
        implementation, cotangent, residuals.page_table, residuals.seq_lens, num_tokens
    )
    return (
        match_primal(dkv_pages, residuals.kv_pages),
        match_primal(dkv, residuals.kv),
        None,
        None,
    )


append.defvjp(_append_fwd, _append_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def prefill(rule: Rule, config: PrefillConfig, operands: PrefillOperands) -> tuple[Array, Array]:
    out, lse = rule.forward(config, operands)
    return out, lse


def _prefill_fwd(
    rule: Rule, config: PrefillConfig, operands: PrefillOperands
) -> tuple[tuple[Array, Array], PrefillResiduals]:
    out, lse = rule.forward(config, operands)
    return (out, lse), PrefillResiduals(operands, out, lse)


def _prefill_bwd(
    rule: Rule, config: PrefillConfig, residuals: PrefillResiduals, cotangents: tuple[Array, Array]
) -> tuple[PrefillOperands]:
    # Without k_rope its gradient is None, as the operand is; the offsets have none.
    gradients = rule.backward(config, residuals, *cotangents)
    return (PrefillOperands(*match_primal(tuple(gradients), tuple(residuals.operands[:4]))),)


prefill.defvjp(_prefill_fwd, _prefill_bwd)
