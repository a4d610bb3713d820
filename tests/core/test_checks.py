"""Argument checks and settings: every message, word for word."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds._core import checks, settings


def _message(kind: type[Exception], function: Any, *args: Any) -> str:
    with pytest.raises(kind) as caught:
        function(*args)
    return str(caught.value)


def test_check() -> None:
    checks.check(True, "kv_pages", "page size must be 64", 16)
    said = _message(ValueError, checks.check, False, "kv_pages", "page size must be 64", 16)
    assert said == "kv_pages: page size must be 64, got 16"


def test_rank() -> None:
    checks.check_rank("x", np.ones((2, 3)), 2)
    checks.check_rank("x", 1.0, 0)
    said = _message(ValueError, checks.check_rank, "x", np.ones((2, 3)), 3)
    assert said == "x: must have 3 dimensions, got shape [2, 3]"


def test_dtype() -> None:
    checks.check_dtype("x", jnp.ones(2, jnp.bfloat16), jnp.float32, jnp.bfloat16)
    checks.check_dtype("x", np.ones(2, np.int32), jnp.int32)
    said = _message(TypeError, checks.check_dtype, "x", np.ones(2), jnp.float32, jnp.bfloat16)
    assert said == "x: dtype must be float32 or bfloat16, got float64"
    said = _message(TypeError, checks.check_dtype, "x", [1.0], jnp.float32)
    assert said == "x: must be an array, got list"


def test_shape() -> None:
    checks.check_shape("q", np.ones((4, 1, 576)), (None, 1, 576), "B S 576")
    said = _message(ValueError, checks.check_shape, "q", np.ones((4, 512)), (None, 576), "B 576")
    assert said == "q: must have shape [B 576] = [*, 576], got [4, 512]"
    said = _message(ValueError, checks.check_shape, "q", np.ones(576), (None, 576), "B 576")
    assert said == "q: must have shape [B 576] = [*, 576], got [576]"


def test_choice() -> None:
    checks.check_choice("mode", None, (None, "a"))
    said = _message(ValueError, checks.check_choice, "mode", "b", (None, "a"))
    assert said == "mode: must be one of None, 'a', got 'b'"


def test_checks_work_on_tracers() -> None:
    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        checks.check_rank("x", x, 2)
        checks.check_dtype("x", x, jnp.float32)
        checks.check_shape("x", x, (2, None), "2 N")
        return x

    assert run(jnp.ones((2, 3))).shape == (2, 3)
    assert _message(ValueError, run, jnp.ones(3)) == "x: must have 2 dimensions, got shape [3]"


def test_axis() -> None:
    mesh = jax.make_mesh((2, 4), ("node", "gpu"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sizes: list[int] = []

    def per_device(x: jax.Array) -> jax.Array:
        sizes.append(checks.check_axis("axis_name", "gpu"))
        sizes.append(checks.check_axis("axis_name", ("node", "gpu")))
        said = _message(ValueError, checks.check_axis, "axis_name", "rank")
        assert said == "axis_name: must name axes of the enclosing jax.shard_map, got 'rank'"
        return x

    spec = jax.P(("node", "gpu"))
    jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(8))
    assert sizes == [4, 8]
    said = _message(ValueError, checks.check_axis, "axis_name", ("node", "gpu"))
    expected = "axis_name: must name axes of the enclosing jax.shard_map, got ('node', 'gpu')"
    assert said == expected
    said = _message(ValueError, checks.check_axis, "axis_name", None)
    assert said == "axis_name: must name axes of the enclosing jax.shard_map, got None"


def test_integer() -> None:
    for three in (3, np.int32(3)):
        assert type(checks.check_integer("k", three)) is int
        assert checks.check_integer("k", three) == 3
    for value in (3.0, "3", True, None):
        said = _message(TypeError, checks.check_integer, "k", value)
        assert said == f"k: must be a static integer, got {value!r}"
    assert checks.check_integer("k", 0, 0) == 0
    said = _message(ValueError, checks.check_integer, "k", -1, 0)
    assert said == "k: must be at least 0, got -1"


def test_number() -> None:
    for half in (0.5, np.float32(0.5)):
        assert type(checks.check_number("f", half)) is float
    assert checks.check_number("f", 0) == 0.0
    for value in ("1", True, None, jnp.float32(1)):
        said = _message(TypeError, checks.check_number, "f", value)
        assert said == f"f: must be a static number, got {value!r}"
    for value in (-1, float("nan"), float("inf")):
        said = _message(ValueError, checks.check_number, "f", value)
        assert said == f"f: must be finite and not negative, got {value}"
    with pytest.raises(ValueError, match="f: must be positive and finite, got 0"):
        checks.check_number("f", 0, positive=True)


def test_a_keyword_of_arrays_is_no_choice() -> None:
    assert checks.check_dtype_choice("d", "float32", jnp.bfloat16, jnp.float32) == jnp.float32
    for name in (None, "fp8", jnp.int32):
        with pytest.raises(ValueError, match="d: must be one of 'bfloat16', got"):
            checks.check_dtype_choice("d", name, jnp.bfloat16)
    for value in (np.array([True, False]), jnp.array(True)):
        with pytest.raises(ValueError, match="c: must be one of True, False, got"):
            checks.check_choice("c", value, (True, False))
    with pytest.raises(ValueError, match=r"c: must be one of True, False, got .*bool\[\]"):
        jax.jit(lambda c: checks.check_choice("c", c, (True, False)))(True)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "/home/ada"}, "/home/ada/.cache/jax_ds"),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": "/var/cache"}, "/var/cache/jax_ds"),
        ({"HOME": "/home/ada", "JAX_DS_CACHE_DIR": "/fast"}, "/fast"),
        ({"HOME": "/home/ada", "JAX_DS_CACHE_DIR": ""}, "/home/ada/.cache/jax_ds"),
    ],
)
def test_cache_folder(environment: dict[str, str], folder: str) -> None:
    assert settings.read(environment).cache_dir == pathlib.Path(folder)


def test_timeout() -> None:
    assert settings.read({"HOME": "/"}).timeout_s == 60.0
    assert settings.read({"HOME": "/", "JAX_DS_TIMEOUT_S": "2.5"}).timeout_s == 2.5


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "inf", "nan"])
def test_malformed_timeout(text: str) -> None:
    said = _message(ValueError, settings.read, {"HOME": "/", "JAX_DS_TIMEOUT_S": text})
    assert said == f"JAX_DS_TIMEOUT_S: must be a positive number of seconds, got {text!r}"
