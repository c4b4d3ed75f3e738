"""What only a GPU shows: graphs, streams, the same bits each time, what the memory checker sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import fastconv
from fastconv import backends
from fastconv.errors import BackendError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    backends.why_not("triton") is not None or backends.interpreted(), reason="needs a GPU"
)

# name -> input, weight, arguments of conv3d
CASES = {
    "depthwise": ((2, 20, 5, 9, 11), (20, 1, 3, 3, 3), dict(padding=1, groups=20)),
    "grouped": ((2, 24, 5, 9, 11), (24, 6, 3, 3, 3), dict(padding=1, groups=4)),
    "pointwise": ((2, 24, 5, 9, 11), (40, 24, 1, 1, 1), dict(stride=(1, 2, 2))),
    "dense": ((2, 17, 5, 9, 11), (19, 17, 3, 3, 3), dict(padding=1)),
    "winograd": ((2, 17, 5, 9, 11), (19, 17, 3, 3, 3), dict(padding=1, algorithm="winograd")),
}
DTYPES = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
each = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _no_tf32():
    """PyTorch allows it by default, and our kernels follow."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


def arrays(name, dtype="float32", last=True):
    x_shape, w_shape, options = CASES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    x, w = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)
        for shape in (x_shape, w_shape)
    )
    w /= w[0].numel() ** 0.5
    x, w = x.to(getattr(torch, dtype)), w.to(getattr(torch, dtype))
    return x.contiguous(memory_format=torch.channels_last_3d) if last else x, w, options


def ours(x, w, options):
    return fastconv.conv3d(x, w, backend="triton", **options)


def exact(x, w, options):
    plain = {k: v for k, v in options.items() if k != "algorithm"}
    return torch.nn.functional.conv3d(x.double(), w.double(), **plain)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_is_the_convolution(name, dtype, last):
    x, w, options = arrays(name, dtype, last)
    y, want = ours(x, w, options), exact(x, w, options)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d) == last
    assert (y - want).abs().max() <= DTYPES[dtype] * want.abs().max()


@each
def test_gives_the_same_bits_each_time(name):
    x, w, options = arrays(name)
    first = ours(x, w, options)
    assert all(torch.equal(ours(x, w, options), first) for _ in range(5))


@each
def test_odd_strides(name):
    x, w, options = arrays(name)
    gaps = torch.empty(*x.shape[:4], 2 * x.shape[4], device="cuda")[..., ::2].copy_(x)
    shifted = torch.empty(x.numel() + 1, device="cuda")[1:].view(x.shape).copy_(x)
    want = exact(x, w, options)
    for view in (gaps, shifted, x.flip(3).flip(3), x[:1].expand_as(x)):
        want = exact(view, w, options)
        assert (ours(view, w, options) - want).abs().max() <= 1e-5 * want.abs().max()


@each
def test_a_graph_replays_it(name):
    x, w, options = arrays(name)
    ours(x, w, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours(x, w, options)
    for seed in range(3):
        x.copy_(
            torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
        )
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, ours(x, w, options))


@each
def test_streams_do_not_disturb_each_other(name):
    x, w, options = arrays(name)
    inputs = [torch.roll(x, i, 3) for i in range(8)]
    want = [ours(i, w, options) for i in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = []
    for stream, i in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            got.append([ours(i, w, options) for _ in range(10)])
    torch.cuda.synchronize()
    assert all(torch.equal(y, good) for ys, good in zip(got, want, strict=True) for y in ys)


def test_weights_packed_on_one_stream_are_whole_on_another():
    x, w, options = arrays("winograd")
    want = ours(x, w, options)
    for _ in range(10):
        fresh = w.clone()
        torch.cuda.synchronize()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(first):
            ours(x, fresh, options)
        with torch.cuda.stream(second):
            y = ours(x, fresh, options)
        torch.cuda.synchronize()
        assert torch.equal(y, want)


def test_arrays_of_two_kinds_of_device_are_refused():
    x, w, options = arrays("dense")
    with pytest.raises(BackendError, match="computes on cuda, but the arrays are on device 'cpu'"):
        ours(x.cpu(), w.cpu(), options)
    with pytest.raises(BackendError, match="computes on cpu, but the arrays are on device 'cuda'"):
        fastconv.conv3d(x, w, backend="reference", **options)


SANITIZED = """
import torch, fastconv
from test_triton_gpu import CASES, arrays, ours
for name in CASES:
    for last in (True, False):
        ours(*arrays(name, last=last))
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
def test_the_memory_checker_finds_nothing():
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # or arrays would lie side by side
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable)
    done = subprocess.run(
        [*command, "-P", "-c", SANITIZED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
