"""Expert parallelism for mixtures of experts: dispatch and combine under `jax.shard_map`."""

from jax_ds.deep_ep.api import combine, dispatch, plan_dispatch
from jax_ds.deep_ep.buffers import buffer_bytes, check
from jax_ds.deep_ep.in_flight import CombineInFlight, DispatchInFlight
from jax_ds.deep_ep.low_latency import (
    low_latency_combine,
    low_latency_combine_finish,
    low_latency_combine_start,
    low_latency_dispatch,
    low_latency_dispatch_finish,
    low_latency_dispatch_start,
)
from jax_ds.deep_ep.plan import DispatchPlan

__all__ = [
    "CombineInFlight",
    "DispatchInFlight",
    "DispatchPlan",
    "buffer_bytes",
    "check",
    "combine",
    "dispatch",
    "low_latency_combine",
    "low_latency_combine_finish",
    "low_latency_combine_start",
    "low_latency_dispatch",
    "low_latency_dispatch_finish",
    "low_latency_dispatch_start",
    "plan_dispatch",
]
