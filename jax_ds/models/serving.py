"""Continuous batching: requests join and leave a fixed-size batch between decode steps."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ds._core.checks import check, check_integer, check_number
from jax_ds.models.checks import check_mesh
from jax_ds.models.config import PAGE_SIZE, ModelConfig
from jax_ds.models.decoding import (
    decode_step,
    empty_pages,
    prefill_step,
    prepare_for_decoding,
)
from jax_ds.models.params import ModelParams, param_specs


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of at least one token, to be continued by `max_new_tokens`."""

    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclasses.dataclass
class Completion:
    """What the engine made of one request."""

    request: Request
    tokens: list[int]  # the new ones


class PagePool:
    """A free list of the pages of one device, handed out in the order in which they came free."""

    def __init__(self, pages: int) -> None:
        self._free = collections.deque(range(pages))

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.popleft()

    def give(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)


@dataclasses.dataclass
class _Slot:
    """One row of the batch while it serves a request."""

    number: int  # the request's place in the submission order
    completion: Completion
    pages: list[int] = dataclasses.field(default_factory=list)
    fed: int = 0  # tokens of prompt + new ones that are in the cache

    @property
    def text(self) -> list[int]:
        return [*self.completion.request.prompt, *self.completion.tokens]

    @property
    def done(self) -> bool:
        return len(self.completion.tokens) >= self.completion.request.max_new_tokens


class Engine:
    """Serves requests: prompts in chunks with `prefill_step`, then `decode_step`, each jitted once.

    Every device has `slots` rows of the batch and `pages` pages per layer of its own. A request
    is admitted when a slot is empty and its device has enough unpromised pages for all of the
    request, so that it never has to be stopped half-way; pages are taken one by one as it grows
    and return to the free list when it leaves. The schedule is made on the host from the sampled
    tokens, which every process sees, so all processes make the same one.

    Args:
      config, params, mesh: the model; params as in training (float32) and placed on `mesh`.
      slots, pages: per device.
      max_len: longest prompt plus continuation.
      chunk: how many tokens of a prompt are fed at once.
      temperature: 0 takes the likeliest token. Sampling depends on the seed, the request and the
        position, not on what else is in the batch.
      seed: of the sampling.

    Raises:
      ValueError, TypeError: a number or a mesh against these rules; `submit`, for a request that
        can never be served.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: ModelParams,
        mesh: Mesh,
        *,
        slots: int = 2,
        pages: int = 16,
        max_len: int = 512,
        chunk: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_mesh(config, mesh)
        sizes = {"slots": slots, "pages": pages, "max_len": max_len, "chunk": chunk}
        for name, size in sizes.items():
            check_integer(name, size, 1)
        check_number("temperature", temperature)
        self._mesh = mesh
        self._vocab = config.vocab
        self._slots: list[_Slot | None] = [None] * (slots * mesh.size)
        self._per_device = slots
        self._pools = [PagePool(pages) for _ in range(mesh.size)]
        self._promised = [0] * mesh.size
        self._pages = pages
        self._max_len = max_len
        self._chunk = chunk
        self._table = np.zeros((len(self._slots), -(-max_len // PAGE_SIZE)), np.int32)
        self._waiting: collections.deque[_Slot] = collections.deque()
        self._submitted = 0
        self._batch = NamedSharding(mesh, PartitionSpec(config.axis_name))
        prepare = functools.partial(prepare_for_decoding, config)
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        self._params = jax.jit(
            jax.shard_map(
                prepare,
                mesh=mesh,
                in_specs=(param_specs(config, params),),
                out_specs=param_specs(config, jax.eval_shape(prepare, shapes)),
            )
        )(params)
        self._cache = jax.jit(
            jax.shard_map(
                lambda: empty_pages(config, pages),
                mesh=mesh,
                in_specs=(),
                out_specs=PartitionSpec(config.axis_name),
            )
        )()
        self._step = _jit_step(config, mesh, self._params, temperature, seed)

    def submit(self, request: Request) -> Completion:
        """Queues a request; its completion fills up while `step` is called."""
        check(len(request.prompt) >= 1, "request.prompt", "must not be empty", "no tokens")
        for token in request.prompt:
            known = 0 <= check_integer("request.prompt", token) < self._vocab
            check(known, "request.prompt", f"tokens must lie in [0, {self._vocab})", token)
        check_integer("request.max_new_tokens", request.max_new_tokens, 1)
        length = len(request.prompt) + request.max_new_tokens
        check(length <= self._max_len, "request", f"must fit max_len = {self._max_len}", length)
        completion = Completion(request, [])
        slot = _Slot(self._submitted, completion)
        pages = _pages_of(slot)
        check(pages <= self._pages, "request", f"must fit the {self._pages} pages", pages)
        self._submitted += 1
        self._waiting.append(slot)
        return completion

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._slots)

    def step(self) -> int:
        """Admits what fits, feeds one chunk to every request in flight, retires what is done.

        Returns the number of new tokens sampled.
        """
        self._admit()
        longest = max((len(s.text) - s.fed for s in self._slots if s), default=0)
        if not longest:
            return 0
        width = 1 if longest == 1 else self._chunk
        tokens = np.zeros((len(self._slots), width), np.int32)
        lens = np.zeros(len(self._slots), np.int32)
        numbers = np.zeros(len(self._slots), np.int32)
        for row, slot in enumerate(self._slots):
            if slot is None:
                continue
            slot.fed = min(slot.fed + width, len(slot.text))
            # A row with fewer new tokens than the chunk feeds earlier ones again: they write
            # what is there already.
            window = slot.text[max(0, slot.fed - width) : slot.fed]
            tokens[row, width - len(window) :] = window
            lens[row], numbers[row] = slot.fed, slot.number
            self._grow(row, slot)
        sampled = self._run(tokens, lens, numbers)
        return self._advance(sampled)

    def _run(self, tokens: Any, lens: Any, numbers: Any) -> np.ndarray[Any, Any]:
        rows = [self._put(a) for a in (tokens, self._table, lens, numbers)]
        sampled, self._cache = self._step(self._params, self._cache, *rows)
        return np.asarray(sampled.addressable_data(0))

    def _put(self, value: np.ndarray[Any, Any]) -> jax.Array:
        return jax.make_array_from_callback(value.shape, self._batch, lambda i: value[i])

    def _admit(self) -> None:
        for row, slot in enumerate(self._slots):
            if slot is not None or not self._waiting:
                continue
            device = row // self._per_device
            pages = _pages_of(self._waiting[0])
            if pages <= len(self._pools[device]) - self._promised[device]:
                self._slots[row] = self._waiting.popleft()
                self._promised[device] += pages

    def _grow(self, row: int, slot: _Slot) -> None:
        device = row // self._per_device
        while len(slot.pages) * PAGE_SIZE < slot.fed:
            self._table[row, len(slot.pages)] = page = self._pools[device].take()
            slot.pages.append(page)
            self._promised[device] -= 1

    def _advance(self, sampled: np.ndarray[Any, Any]) -> int:
        new = 0
        for row, slot in enumerate(self._slots):
            if slot is None or slot.fed < len(slot.text):
                continue
            slot.completion.tokens.append(int(sampled[row]))
            new += 1
            if slot.done:
                device = row // self._per_device
                self._pools[device].give(slot.pages)
                self._promised[device] -= _pages_of(slot) - len(slot.pages)
                self._slots[row] = None
        return new


def _pages_of(slot: _Slot) -> int:
    """Pages of a request when it is finished; the last token is never fed."""
    request = slot.completion.request
    return -(-(len(request.prompt) + request.max_new_tokens - 1) // PAGE_SIZE)


def _jit_step(
    config: ModelConfig, mesh: Mesh, params: ModelParams, temperature: float, seed: int
) -> Any:
    def step(
        params: ModelParams, cache: Any, tokens: Any, table: Any, lens: Any, numbers: Any
    ) -> tuple[Any, Any]:
        feed = decode_step if tokens.shape[1] == 1 else prefill_step
        logits, cache = feed(config, params, cache, tokens, table, lens)
        sampled = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if temperature > 0:
            draw = functools.partial(_draw, seed, temperature)
            sampled = jax.vmap(draw)(logits, numbers, lens)
        return _share(sampled, mesh), cache

    batch, whole = PartitionSpec(config.axis_name), PartitionSpec()
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(param_specs(config, params), batch, batch, batch, batch, batch),
        out_specs=(whole, batch),
    )
    return jax.jit(sharded, donate_argnums=1)


def _share(sampled: Any, mesh: Mesh) -> Any:
    """Every device's tokens on every device: a few integers, by which all processes schedule.

    A sum of disjoint slices, because its result is known to be equal everywhere.
    """
    batch = sampled.shape[0]
    everyone = jnp.zeros((mesh.size * batch,), sampled.dtype)
    start = jax.lax.axis_index(mesh.axis_names) * batch
    return jax.lax.psum(jax.lax.dynamic_update_slice(everyone, sampled, (start,)), mesh.axis_names)


def _draw(seed: int, temperature: float, logits: Any, number: Any, position: Any) -> Any:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), position)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
