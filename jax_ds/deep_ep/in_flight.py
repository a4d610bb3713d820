"""What the first half of a low-latency call hands to the second, and how many can be under way."""

import dataclasses
import threading
import weakref
from typing import Any, ClassVar

import jax
from jax._src.core import get_opaque_trace_state
from jaxtyping import Array, Bool, Float, UInt8

from jax_ds._core.checks import fail
from jax_ds._runtime.choose import Implementation
from jax_ds.deep_ep.plan import PlanSizes
from jax_ds.deep_ep.route import FlatRoute

# Slots of a window: calls of one operation that can be under way on a channel.
SLOTS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DispatchInFlight:
    """What `low_latency_dispatch_start` hands to `_finish`: a pytree with private content."""

    messages: UInt8[Array, "B bytes"]
    route: FlatRoute
    sizes: PlanSizes = dataclasses.field(metadata={"static": True})
    parts: tuple[tuple[int, Any], ...] = dataclasses.field(metadata={"static": True})
    implementation: Implementation = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CombineInFlight:
    """What `low_latency_combine_start` hands to `_finish`: a pytree with private content."""

    parts: Float[Array, "R T H"]
    needed: Bool[Array, "R T"]
    sizes: PlanSizes = dataclasses.field(metadata={"static": True})
    implementation: Implementation = dataclasses.field(metadata={"static": True})


class UnderWay:
    """The calls of one operation and channel that are started and not finished, while tracing.

    Kernels keep what is in flight in the slots of a window. That a program starts no more calls
    than there are slots can only be seen where it is written down, so this looks at the in-flight
    objects that live in the current trace; it holds none of them.
    """

    # (where, operation, axes, channel) of what was started, and where objects were finished: the
    # branches of a conditional may each finish the same one.
    _all: ClassVar[weakref.WeakKeyDictionary[Any, tuple[Any, ...]]] = weakref.WeakKeyDictionary()
    _finished: ClassVar[weakref.WeakKeyDictionary[Any, list[Any]]] = weakref.WeakKeyDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()  # programs may be traced in several threads

    def __init__(self, operation: str, sizes: PlanSizes) -> None:
        self.key = (operation, sizes.axis_name, sizes.channel)

    def check(self) -> None:
        """Raises a ValueError unless a slot is free."""
        here = (get_opaque_trace_state(), *self.key)
        with self._lock:
            count = sum(other == here for other in self._all.values())
        if count < SLOTS:
            return
        operation, _, channel = self.key
        raise ValueError(
            f"channel: {SLOTS} calls of {operation} can be under way, and as many are on channel "
            f"{channel}; finish one before the next _start, or use another channel"
        )

    def add(self, in_flight: Any) -> None:
        with self._lock:
            self._all[in_flight] = (get_opaque_trace_state(), *self.key)

    def remove(self, in_flight: Any) -> None:
        """Raises a ValueError if it has been finished here: its slot may be another call's now."""
        here = get_opaque_trace_state()
        with self._lock:
            finished = self._finished.setdefault(in_flight, [])
            if here in finished:
                fail("in_flight", "can be finished once", "one that has been")
            finished.append(here)
            self._all.pop(in_flight, None)
