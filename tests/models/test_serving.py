"""Continuous batching: what a request gets does not depend on its company."""

from typing import Any

import jax
import numpy as np
import pytest

from jax_ds import models
from tests.models import tiny

# Prompt and new tokens of each request; a page holds 64.
REQUESTS = ((3, 9), (70, 5), (1, 1), (62, 8), (10, 20), (20, 2), (5, 13))


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    mesh, axis = tiny.mesh(2)
    config = tiny.config(axis_name=axis)
    state = models.init_state(config, models.TrainConfig(steps=1), mesh, seed=3)
    return {"config": config, "params": state.params, "mesh": mesh}


def _requests() -> list[models.Request]:
    rng = np.random.default_rng(0)
    return [
        models.Request(tuple(int(t) for t in rng.integers(0, 64, prompt)), new)
        for prompt, new in REQUESTS
    ]


def _serve(engine: models.Engine) -> list[list[int]]:
    completions = [engine.submit(request) for request in _requests()]
    while engine.busy:
        engine.step()
    return [c.tokens for c in completions]


def _greedy(model: dict[str, Any]) -> list[list[int]]:
    """By the full forward pass, all requests side by side."""
    mesh, config = model["mesh"], model["config"]
    specs = models.param_specs(config, model["params"])
    run = jax.jit(
        jax.shard_map(
            lambda p, t: models.forward(config, p, t)[0],
            mesh=mesh,
            in_specs=(specs, jax.P("ep")),
            out_specs=jax.P("ep"),
        )
    )
    texts = [list(request.prompt) for request in _requests()]
    for _ in range(max(new for _, new in REQUESTS)):
        padded = np.zeros((8, 80), np.int32)
        for row, text in zip(padded, texts, strict=False):
            row[: len(text)] = text
        logits = np.asarray(run(model["params"], tiny.put(padded, mesh)))
        for row, text, (prompt, new) in zip(logits, texts, REQUESTS, strict=False):
            if len(text) < prompt + new:
                text.append(int(row[len(text) - 1].argmax()))
    return [text[prompt:] for text, (prompt, _) in zip(texts, REQUESTS, strict=True)]


def test_greedy_serving_equals_the_full_forward_pass(model: dict[str, Any]) -> None:
    """Two rows and three pages a device for seven requests: they wait, join, leave, reuse."""
    engine = models.Engine(**model, slots=2, pages=3, max_len=80, chunk=16)
    served = _serve(engine)
    assert [len(tokens) for tokens in served] == [new for _, new in REQUESTS]
    expected = _greedy(model)
    # A greedy choice between two nearly equal logits may fall either way, and what follows with
    # it: what comes before a difference must be equal, and differences rare.
    same = sum(a == b for a, b in zip(served, expected, strict=True))
    assert same >= len(REQUESTS) - 1
    # A second round finds all rows and pages free again.
    assert _serve(engine) == served


def test_sampling_depends_on_seed_request_and_position_alone(model: dict[str, Any]) -> None:
    wide = models.Engine(**model, slots=4, pages=16, max_len=80, temperature=1.0, seed=5)
    narrow = models.Engine(**model, slots=1, pages=2, max_len=80, temperature=1.0, seed=5)
    first, second = _serve(wide), _serve(narrow)
    agreeing = np.mean(
        [x == y for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)]
    )
    assert agreeing > 0.9
    other = models.Engine(**model, slots=4, pages=16, max_len=80, temperature=1.0, seed=6)
    assert _serve(other) != first


def test_errors(model: dict[str, Any]) -> None:
    engine = models.Engine(**model, slots=1, pages=1, max_len=80)
    for request, message in [
        (models.Request((), 3), "request.prompt: must not be empty, got no tokens"),
        (models.Request((1,) * 70, 11), "request: must fit max_len = 80, got 81"),
        (models.Request((1,) * 60, 6), "request: must fit the 1 pages, got 2"),
        (models.Request((1,), 0), "request.max_new_tokens: must be at least 1, got 0"),
        (models.Request((1, 64), 3), "request.prompt: tokens must lie in [0, 64), got 64"),
    ]:
        with pytest.raises(ValueError) as error:
            engine.submit(request)
        assert str(error.value) == message
    assert not engine.busy
    assert engine.step() == 0
    for keywords, message in [
        ({"slots": 0}, "slots: must be at least 1, got 0"),
        ({"chunk": 0}, "chunk: must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature: must be finite and not negative, got -0.5"),
    ]:
        with pytest.raises(ValueError) as error:
            models.Engine(**model, **keywords)
        assert str(error.value) == message


def test_page_pool() -> None:
    pool = models.PagePool(3)
    assert [pool.take(), pool.take()] == [0, 1]
    pool.give([1, 0])
    assert len(pool) == 3
    assert sorted(pool.take() for _ in range(3)) == [0, 1, 2]
    with pytest.raises(IndexError):
        pool.take()
