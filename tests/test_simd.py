"""Vector code through Numba: building blocks, matrix products, transposes, the disk, threads."""

from __future__ import annotations

import os
import platform
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from processes import run_python

pytest.importorskip("numba")

from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.numba_kernels import gemm, layout, simd
from fastconv.numba_kernels.simd import Code, Int, address, block, kernel, parallel_for, peek
from fastconv.reference import direct

DTYPES = ("float32", "float64")


@block
def scale_tile(
    code: Code, dtype: str, factor: str, source: Int, target: Int, count: Int
) -> None:  # fmt: skip
    def body(i, _):
        mask = code.first(count - i)
        code.store(code.load(source, i, mask) * Fraction(factor), target, i, mask)

    code.loop(count, body, step=code.lanes)


def scale_kernel(DTYPE, FACTOR):
    def kernel(params, item, thread):
        scale_tile(DTYPE, FACTOR, peek(params, 0), peek(params, 1), peek(params, 2))

    return kernel


@block
def add_item(code: Code, dtype: str, target: Int, index: Int, value: Int) -> None:
    """target[index] += value, in float64 lanes of a register's first element."""
    mask = code.first(code.int(1))
    number = code.builder.sitofp(value.value, code.element)
    spread = code.splat(0).like(code._spread(number, code.element))
    code.store(code.load(target, index, mask) + spread, target, index, mask)


def count_kernel():
    """target[item] += thread + 1."""

    def kernel(params, item, thread):
        add_item("float64", peek(params, 0), item, thread + 1)

    return kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 40])
def test_masked_memory_is_not_touched(dtype, count):
    x, y = cases.random((count,), 0, dtype), cases.Fenced((count,), dtype)
    parallel_for(kernel(scale_kernel, dtype, "2/3"), (address(x), address(y.array), count), 1)
    y.check()
    assert np.array_equal(y.array, x * np.dtype(dtype).type(2 / 3))  # rounded once


def test_constants_of_kernels_are_ints_and_strings():
    with pytest.raises(TypeError, match="scale_kernel: constants must be ints or strings"):
        kernel(scale_kernel, "float32", Fraction(2, 3))


def product_kernel(DTYPE, ROWS, VECTORS, EPILOGUE):
    WIDTH, ITEM = VECTORS * simd.vector_width(DTYPE), simd.ITEM_BYTES[DTYPE]

    def kernel(params, panel, thread):
        a, b, c = peek(params, 0), peek(params, 1), peek(params, 2)
        bias, residual = peek(params, 3), peek(params, 4)
        rows, depth, columns, stride = (
            peek(params, 5), peek(params, 6), peek(params, 7), peek(params, 8),
        )  # fmt: skip
        first = ITEM * panel * WIDTH
        gemm.gemm_rows(
            DTYPE, ROWS, VECTORS, EPILOGUE, rows, a, stride, b + first * depth, depth,
            c + first, columns, columns - panel * WIDTH, bias + first, residual + first, columns,
        )  # fmt: skip

    return kernel


def multiply(a, b, epilogue, bias, residual, vectors):
    """activation(a @ b + bias + residual) by panels, in fences; a may have strided rows."""
    dtype, columns = str(a.dtype), b.shape[1]
    panels = gemm.pack_panels(b, vectors)
    padded = np.zeros(panels.shape[0] * panels.shape[2], dtype)
    padded[:columns] = bias
    c = cases.Fenced((a.shape[0], columns), dtype)
    compiled = kernel(
        product_kernel, dtype, gemm.block_rows(vectors), vectors, gemm.epilogue_words(epilogue)
    )
    params = (
        address(a), address(panels), address(c.array), address(padded), address(residual),
        a.shape[0], a.shape[1], columns, a.strides[0] // a.itemsize,
    )  # fmt: skip
    parallel_for(compiled, params, panels.shape[0])
    c.check()
    return c.array


# |error| of a dot product of n terms <= n u |a| |b|, plus 8 u of the sum for the epilogue
# (Higham 2002, section 3.1); no activation has a slope above 1.5.
def assert_product(got, a, b, epilogue, bias, residual):
    a64, b64 = a.astype("float64"), b.astype("float64")
    bias64 = bias.astype("float64") if epilogue.bias else np.zeros(b.shape[1])
    residual64 = residual.astype("float64") if epilogue.residual else 0 * residual
    want = direct.activate(a64 @ b64 + bias64 + residual64, epilogue.activation)
    u = np.finfo(a.dtype).eps
    size = abs(a64) @ abs(b64) + abs(bias64) + abs(residual64)
    assert (abs(got - want) <= 1.5 * u * (a.shape[1] + 8) * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@settings(max_examples=30)
@given(rows=st.integers(1, 45), depth=st.integers(1, 30), columns=st.integers(1, 70))
def test_products_of_any_size(dtype, vectors, rows, depth, columns):
    epilogue = Epilogue(True, "relu", True)
    a = cases.random((rows, depth + 3), 0, dtype)[:, :depth]
    b, bias = cases.random((depth, columns), 1, dtype), cases.random((columns,), 2, dtype)
    residual = cases.random((rows, columns), 3, dtype)
    got = multiply(a, b, epilogue, bias, residual, vectors)
    assert_product(got, a, b, epilogue, bias, residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_with_every_epilogue(activation):
    epilogue = Epilogue(activation == "relu", activation, activation != "relu")
    a, b = cases.random((29, 24), 0), cases.random((24, 45), 1)
    bias, residual = cases.random((45,), 2), cases.random((29, 45), 3)
    got = multiply(a, b, epilogue, bias, residual, 2)
    assert_product(got, a, b, epilogue, bias, residual)


def test_panels_hold_every_column_once():
    lanes = simd.vector_width("float32")
    b = np.arange(2 * 3 * 5 * lanes, dtype="float32").reshape(2, 3, 5 * lanes)
    panels = gemm.pack_panels(b, 2)
    assert panels.shape == (2, 3, 3, 2 * lanes)  # (outer, panels, depth, columns)
    assert np.array_equal(panels[1, 1, 2], b[1, 2, 2 * lanes : 4 * lanes])
    assert np.array_equal(panels[0, 2, 0], [*b[0, 0, 4 * lanes :], *[0] * lanes])
    assert gemm.panel_vectors(2 * lanes, "float32") == 2
    assert gemm.panel_vectors(9 * lanes, "float32") == 3


@given(
    st.sampled_from(DTYPES), st.integers(0, 3), st.integers(1, 40), st.integers(1, 150)
)  # fmt: skip
def test_transposes_go_there_and_back(dtype, batch, channels, points):
    x = cases.random((batch, channels, points), 0, dtype)
    last, back = cases.Fenced((batch, points, channels), dtype), cases.Fenced(x.shape, dtype)
    layout.to_channels_last(x, last.array)
    layout.to_contiguous(last.array, back.array)
    last.check()
    back.check()
    assert np.array_equal(last.array, np.moveaxis(x, 1, -1))
    assert np.array_equal(back.array, x)


def test_pieces_start_at_cache_lines():
    sizes = (5, 0, 64, 17)
    workspace = np.empty(layout.pieces_size(sizes, "float32") + 3, "float32")
    for start in range(4):
        *cut, rest = layout.pieces(workspace[start:], sizes)
        assert [piece.size for piece in cut] == list(sizes)
        assert all(address(piece) % 64 == 0 for piece in (*cut, rest) if piece.size)


def test_every_item_runs_once_with_a_thread_of_its_own():
    counts = np.zeros(1000)
    parallel_for(kernel(count_kernel), (address(counts),), 1000)
    assert ((counts >= 1) & (counts <= simd.threads())).all()
    parallel_for(kernel(count_kernel), (address(counts),), 0)


def test_several_python_threads_may_call_at_once():
    results = [np.zeros(500) for _ in range(4)]
    compiled = kernel(count_kernel)

    def work(counts):
        for _ in range(20):
            parallel_for(compiled, (address(counts),), counts.size)

    workers = [threading.Thread(target=work, args=(counts,)) for counts in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # A new Python thread starts with all of Numba's threads, whatever this one was set to.
    most = simd.numba.config.NUMBA_NUM_THREADS
    assert all(((c >= 20) & (c <= 20 * most)).all() for c in results)


LAYER = """
import cases, tolerance
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry
from fastconv.numba_kernels import simd
from fastconv.plan import Plan
from fastconv.transforms import transform
F = transform(4, 3)
for dtype in DTYPES:
    geometry = Geometry.of((1, 19, 9, 11), (37, 19, 3, 3), 1, 1)
    plan = Plan("winograd", "numba", geometry, dtype, Epilogue(True, "silu", True), "contiguous",
                transforms=(F, F))
    arrays = cases.arrays_for(plan)
    y = cases.execute(plan, *arrays)
    tolerance.assert_conv_close(y, plan, *arrays)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    code = LAYER.replace("DTYPES", "['float32']") + (
        "drivers = sum(simd._driver(p).stats.cache_misses.total() for p in (False, True))\n"
        "print(len(simd.compiled()), sum(k.from_cache for k in simd.compiled()), drivers)"
    )
    first = run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).split()
    second = run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).split()
    assert first[1] == "0"
    assert second == [first[0], first[0], "0"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 CPUs")
@pytest.mark.parametrize(
    ("cpu", "features", "registers"),
    [("haswell", "+avx,+avx2,+fma", "8 4 16"), ("generic", "", "4 2 16")],
)
def test_other_instruction_sets(cpu, features, registers):
    """Kernels for a CPU with narrower registers than this one's, where it has that subset."""
    from fastconv.backends import instruction_sets

    if "avx2" in features and "avx2" not in instruction_sets():
        pytest.skip("this CPU has no AVX2")
    code = LAYER.replace("DTYPES", "['float32', 'float64']") + (
        "print(*map(simd.vector_width, ('float32', 'float64')), simd.register_count())"
    )
    assert run_python(code, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features) == registers


@pytest.mark.parametrize("threading_layer", ["omp", "workqueue"])
def test_a_forked_child_can_go_on(threading_layer):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    code = (
        LAYER.replace("DTYPES", "['float32']")
        + """
import numpy, os
child = os.fork()
if not child:
    os._exit(0 if numpy.array_equal(cases.execute(plan, *arrays), y) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    try:
        out = run_python(code, NUMBA_THREADING_LAYER=threading_layer)
    except AssertionError as error:
        if "threading layer" in str(error):
            pytest.skip(f"no threading layer {threading_layer} here")
        raise
    assert out == "0"


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("no locator available")])
def test_a_cache_that_cannot_be_written_breaks_nothing(monkeypatch, error):
    real = simd.numba.cfunc

    def refuse(signature, cache=False, **options):
        if cache:
            raise error
        return real(signature, **options)

    monkeypatch.setattr(simd.numba, "cfunc", refuse)
    x = np.ones(4, "float32")
    factor = "7/3" if isinstance(error, OSError) else "5/3"  # not compiled before
    parallel_for(kernel(scale_kernel, "float32", factor), (address(x), address(x), 4), 1)
    assert np.array_equal(x, np.full(4, float(Fraction(factor)), "float32"))


def test_starting_numbas_threads_leaves_pytorchs_number_alone():
    """Where both have OpenMP's threads, the first kernel would set PyTorch back to all of them."""
    pytest.importorskip("torch")
    code = """
import torch
torch.set_num_threads(1)
import fastconv
x = torch.zeros(1, 8, 8, 8, 8)
fastconv.conv3d(x, torch.zeros(8, 8, 3, 3, 3), backend="numba")
state = fastconv.continual_state(x[:, :, 0], torch.zeros(8, 8, 3, 3, 3))
fastconv.continual_step(x[:, :, 0], state, torch.zeros(8, 8, 3, 3, 3), backend="numba")
import numba
print(torch.get_num_threads(), numba.get_num_threads())
"""
    assert run_python(code) == "1 1"
