"""Varying manual axes: what `jax.shard_map(check_vma=True)` tracks for every value.

A custom call and its portable twin must produce values of the same type, whichever operands
vary over which mesh axes. The rule here is the simplest sound one: outputs vary over every axis
that any operand varies over.
"""

from collections.abc import Sequence
from typing import Any

import jax


def varying_axes(*trees: Any) -> tuple[str, ...]:
    """The mesh axes over which any leaf of `trees` varies, in the mesh's order."""
    axes: set[str] = set()
    for leaf in jax.tree.leaves(trees):
        axes |= set(jax.typeof(leaf).manual_axis_type.varying)
    if not axes:
        return ()
    return tuple(a for a in jax.sharding.get_abstract_mesh().axis_names if a in axes)


def to_varying(tree: Any, axes: Sequence[str]) -> Any:
    """`tree` with every leaf varying over `axes` (and over what it varied over before)."""

    def cast(leaf: Any) -> Any:
        have = jax.typeof(leaf).manual_axis_type.varying
        missing = tuple(a for a in axes if a not in have)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def match_primal(cotangent: Any, primal: Any) -> Any:
    """A backward rule's `cotangent` with the type its `primal` asks for.

    A value that is the same on every device of an axis receives the sum of the cotangents that
    the devices computed. `primal` is a value or its `jax.typeof`.
    """

    def fit(ct: Any, p: Any) -> Any:
        want = (p if hasattr(p, "manual_axis_type") else jax.typeof(p)).manual_axis_type.varying
        have = jax.typeof(ct).manual_axis_type.varying
        extra = tuple(sorted(have - want))
        return to_varying(jax.lax.psum(ct, extra) if extra else ct, tuple(sorted(want)))

    return jax.tree.map(fit, cotangent, primal)
