"""The kernels divide by a reciprocal in two parts: it must round as IEEE division does.

The arithmetic of `Reciprocal` in ffi/quantization/kernels/block.cuh, step by step on the CPU, for
every pair of a bfloat16 number and the largest magnitude of its block.
"""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest


def _round(exact: Fraction) -> np.float32:
    """The float32 nearest to `exact`, ties to even; for normal positive numbers."""
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= exact < Fraction(2) ** exponent
    units, rest = divmod(exact / Fraction(2) ** (exponent - 23), 1)
    units += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and units % 2)
    return np.float32(np.ldexp(float(units), exponent - 23))


def _exact(x: np.float32) -> Fraction:
    return Fraction(float(x))


def _reciprocal(divisor: np.float32, error: int) -> tuple[np.float32, np.float32]:
    """high and low, where the hardware's approximation errs by `error` units in the last place."""
    inverse = 1 / _exact(divisor)
    approximate = _round(inverse)
    if error:
        approximate = np.nextafter(approximate, np.float32(error * np.inf))
    high = _round(_exact(approximate) * (1 - Fraction(1, 2**21)))
    rest = _exact(_round(1 - _exact(divisor) * _exact(high)))
    low = _round(_exact(_round(rest * rest + rest)) * _exact(high))
    assert 0 < _exact(high) < inverse and low >= 0
    return high, low


def _times(x: np.ndarray, high: np.float32, low: np.float32) -> np.ndarray:
    """fma(x, high, x * low): a product of 8 and 24 bits and a sum that 64 bits hold."""
    small = (x * low).astype(np.float32).astype(np.longdouble)
    return (x.astype(np.longdouble) * np.longdouble(high) + small).astype(np.float32)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs 64 bits to emulate fma")
@pytest.mark.parametrize("error", [-1, 0, 1])
def test_every_pair_of_bfloat16(error: int) -> None:
    mantissas = (1 + np.arange(128) / 128).astype(np.float32)
    # Smaller quotients than these round to zero.
    x = (mantissas * 2.0 ** np.arange(-20, 1)[:, None]).astype(np.float32).ravel()
    for amax in mantissas:
        scale = amax * np.float32(1 / 448)
        members = x[x <= amax]
        quotients = members / scale
        ours = _times(members, *_reciprocal(scale, error))
        np.testing.assert_array_equal(ours, quotients)
        codes = [q.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for q in (ours, quotients)]
        np.testing.assert_array_equal(*codes)
