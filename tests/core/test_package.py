"""The package itself: its modules come when asked for, and it knows its version."""

import importlib.metadata
import subprocess
import sys

import pytest

import jax_ds


def test_modules_load_when_first_used() -> None:
    code = (
        "import sys, jax_ds; assert 'jax_ds.flash_mla' not in sys.modules;"
        "assert callable(jax_ds.flash_mla.decode)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in jax_ds.__all__:
        assert getattr(jax_ds, name) is not None and name in dir(jax_ds)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'jax_ds' has no attribute 'flash_attention'"):
        _ = jax_ds.flash_attention


def test_one_version() -> None:
    try:
        installed = importlib.metadata.version("jax_ds")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the sources")
    assert installed == jax_ds.__version__
