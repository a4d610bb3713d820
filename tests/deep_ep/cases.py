"""Named cases of `deep_ep`: where tokens go, and over which mesh.

Every routing is for 8 ranks; a mesh with a data axis uses them as two groups of 4, one of a single
device as eight groups, one after the other. A `Setup` is one compiled program, which then runs
every routing. The kernels run on the single device here, over several in `test_multirank.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

RANKS, TOKENS, TOP_K, HIDDEN = 8, 6, 3, 8


@dataclasses.dataclass(frozen=True)
class Setup:
    """A mesh and the static arguments of `plan_dispatch`."""

    name: str
    mesh: tuple[int, ...] = (8,)
    axes: tuple[str, ...] = ("ep",)
    expert_axes: tuple[str, ...] = ("ep",)
    num_experts: int = 16
    capacity: int | None = None
    node_capacity: int | None = None
    expert_alignment: int = 1
    dtype: str = "float32"
    check_vma: bool = True
    explicit: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def num_ranks(self) -> int:
        """Ranks of one expert-parallel group."""
        sizes = dict(zip(self.axes, self.mesh, strict=True))
        return int(np.prod([sizes[a] for a in self.expert_axes]))

    @property
    def num_groups(self) -> int:
        return RANKS // self.num_ranks

    @property
    def num_nodes(self) -> int:
        return self.mesh[0] if len(self.expert_axes) == 2 else 1

    @property
    def columns(self) -> int:
        return min(TOP_K, self.num_experts // self.num_ranks)

    @property
    def rows(self) -> int:
        """C."""
        if self.capacity is not None:
            return self.capacity
        pairs = self.num_ranks * TOKENS * self.columns
        filling = min(self.num_experts // self.num_ranks, pairs) * (self.expert_alignment - 1)
        return (pairs + filling) // self.expert_alignment * self.expert_alignment

    @property
    def axis_name(self) -> str | tuple[str, ...]:
        return self.expert_axes if len(self.expert_axes) == 2 else self.expert_axes[0]


_NODES = {"mesh": (2, 4), "axes": ("node", "gpu"), "expert_axes": ("node", "gpu")}

SETUPS = (
    Setup("flat"),
    Setup("unchecked", check_vma=False, explicit=True, num_experts=40),
    Setup("explicit", explicit=True, capacity=7, num_experts=32),
    Setup("aligned_drops", expert_alignment=4, capacity=10, num_experts=32),
    Setup("bfloat16", dtype="bfloat16", expert_alignment=8, num_experts=8),
    Setup("nodes", **_NODES, num_experts=32),
    Setup("nodes_drops", **_NODES, capacity=5, node_capacity=2),
    Setup("four_nodes", **{**_NODES, "mesh": (4, 2)}, node_capacity=3, check_vma=False),
    Setup("one_node", **{**_NODES, "mesh": (1, 8)}, capacity=20, explicit=True),
    Setup("one_gpu_each", **{**_NODES, "mesh": (8, 1)}, num_experts=8, dtype="bfloat16"),
    Setup("data", mesh=(2, 4), axes=("data", "ep"), capacity=9),
    Setup("one_device", mesh=(1,), dtype="bfloat16", expert_alignment=4),
    Setup("one_device_drops", mesh=(1,), capacity=5),
    Setup("one_device_two_axes", **{**_NODES, "mesh": (1, 1)}, dtype="bfloat16", capacity=5),
)


def with_implementations(*setups: Setup) -> Any:
    """Parametrises a test: every setup portable, those of one device with the kernels too."""
    return pytest.mark.parametrize(
        ("setup", "implementation"),
        [pytest.param(setup, "xla", id=f"{setup}-xla") for setup in setups]
        + [
            pytest.param(setup, "cuda", id=f"{setup}-cuda", marks=pytest.mark.gpu)
            for setup in setups
            if set(setup.mesh) == {1}
        ],
    )


def _uniform(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    scores = rng.random((RANKS, TOKENS, num_experts))
    return np.argsort(scores, axis=-1)[..., :TOP_K]


def _skewed(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    draws = rng.random((RANKS, TOKENS, TOP_K)) ** 4
    return np.minimum(draws * num_experts, num_experts - 1)


def _one_expert(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    ids = np.full((RANKS, TOKENS, TOP_K), -1)
    ids[..., 1] = num_experts // 2
    return ids


def _one_rank(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    return num_experts - 1 - rng.integers(0, num_experts // RANKS, (RANKS, TOKENS, TOP_K))


def _none(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    return np.full((RANKS, TOKENS, TOP_K), -1)


def _duplicates(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    ids = rng.integers(0, num_experts, (RANKS, TOKENS, 1))
    return np.concatenate([ids, (ids + rng.integers(0, 2, ids.shape)) % num_experts, ids], axis=2)


def _not_experts(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    ids = rng.integers(-3, num_experts + 3, (RANKS, TOKENS, TOP_K))
    ids[0, 0] = [np.iinfo(np.int32).max, np.iinfo(np.int32).min, num_experts]
    return ids


def _ragged(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    ids = _uniform(rng, num_experts)
    for rank in range(RANKS):
        ids[rank, rank % (TOKENS + 1) :] = -1
    return ids


ROUTINGS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": _uniform,
    "skewed": _skewed,
    "one_expert": _one_expert,
    "one_rank": _one_rank,
    "none": _none,
    "duplicates": _duplicates,
    "not_experts": _not_experts,
    "ragged": _ragged,
}


def expert_ids(routing: str, num_experts: int) -> np.ndarray:
    """int32 `[RANKS, TOKENS, TOP_K]`."""
    rng = np.random.default_rng(sorted(ROUTINGS).index(routing))
    return ROUTINGS[routing](rng, num_experts).astype(np.int32)
