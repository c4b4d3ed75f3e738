"""Vector activations against extended precision, over the whole range of their argument."""

from __future__ import annotations

import numpy as np
import pytest

from fastconv.epilogue import ACTIVATIONS
from fastconv.reference import direct

pytest.importorskip("numba")

from fastconv.numba_kernels.activations import activate
from fastconv.numba_kernels.simd import Code, Int, address, block, kernel, parallel_for, peek

DTYPES = ("float32", "float64")
# Errors in ulp of the result. hardswish rounds three times (sum, product, quotient), half an ulp
# each that a following quotient may double; sigmoid: exp 1.5, then two operations; silu: a third.
ULP = {"none": 0.0, "relu": 0.0, "hardswish": 2.0, "sigmoid": 2.5, "silu": 3.0}


@block
def apply(code: Code, dtype: str, name: str, source: Int, target: Int, count: Int) -> None:
    def body(i: Int, _):
        mask = code.first(count - i)
        code.store(activate(code.load(source, i, mask), name), target, i, mask)

    code.loop(count, body, step=code.lanes)


def apply_kernel(DTYPE, NAME):
    def apply_all(params, item, thread):
        apply(DTYPE, NAME, peek(params, 0), peek(params, 1), peek(params, 2))

    return apply_all


def run(z: np.ndarray, name: str) -> np.ndarray:
    z, y = np.ascontiguousarray(z), np.empty_like(z)
    parallel_for(kernel(apply_kernel, str(z.dtype), name), (address(z), address(y), z.size), 1)
    return y


def arguments(dtype: str) -> np.ndarray:
    """Every magnitude from the smallest subnormal to max / 8, and a dense grid where sigmoid bends.

    (Above max / 6 hardswish overflows before its division, in PyTorch as here.)
    """
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max / 8
    magnitudes = np.concatenate(
        [[0.0, tiny, huge], np.geomspace(float(tiny), 1e4, 20_001), np.linspace(0, 800, 60_001)]
    )
    return np.concatenate([magnitudes, -magnitudes]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_error_in_ulp_over_the_whole_range(name, dtype):
    z = arguments(dtype)
    with np.errstate(under="ignore", over="ignore"):
        want = direct.activate(z.astype(np.longdouble), name)
        ulp = np.spacing(np.abs(want).astype(dtype)).astype(np.longdouble)
        error = np.abs(run(z, name).astype(np.longdouble) - want)
    if name == "silu":  # its sigmoid is a multiple of the smallest subnormal
        error -= np.abs(z) * np.finfo(dtype).smallest_subnormal / 2
    error /= ulp
    assert error.max() <= ULP[name], f"{error.max():.3f} ulp at {z[error.argmax()]!r}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_and_infinity(name, dtype):
    z = np.array([np.nan, np.inf, -np.inf, 1.0, -np.nan], dtype)
    limits = {
        "none": (np.inf, -np.inf),
        "relu": (np.inf, 0),
        "silu": (np.inf, np.nan),  # Inf * 0, as in PyTorch
        "hardswish": (np.inf, np.nan),
        "sigmoid": (1, 0),
    }
    got = run(z, name)
    assert np.isnan(got[[0, 4]]).all()
    assert np.array_equal(got[1:3], np.array(limits[name], dtype), equal_nan=True)
    assert np.isfinite(got[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "relu", "hardswish"])
def test_small_integers_are_rounded_like_float64(name, dtype):
    z = np.arange(-2000, 2000, dtype=dtype)
    assert np.array_equal(run(z, name), direct.activate(z.astype(np.float64), name).astype(dtype))


def test_infinities_agree_with_pytorch():
    torch = pytest.importorskip("torch")
    functions = torch.nn.functional
    z = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 3.0, -3.0], np.float32)
    for name in ACTIVATIONS[1:]:
        want = getattr(functions, name)(torch.from_numpy(z)).numpy()
        np.testing.assert_array_equal(np.isnan(run(z, name)), np.isnan(want), err_msg=name)
        inf = np.isinf(want)
        np.testing.assert_array_equal(run(z, name)[inf], want[inf], err_msg=name)
