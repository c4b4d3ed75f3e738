"""Two processes: DistributedDataParallel, and DTensors sharded by batch, outputs and groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="PyTorch was built without gloo",
)
ROOT = Path(__file__).parent.parent
PROCESSES = 2

START = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=os.environ["MEETING"], rank=rank, world_size=2)
import fastconv
from torch import nn
from torch.nn.functional import conv3d
torch.manual_seed(0)
"""


def together(code: str, tmp_path: Path) -> None:
    """Run the code in every process; each must succeed."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", START + code + "\ndist.destroy_process_group()"],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "RANK": str(rank),
                "MEETING": f"file://{tmp_path}/meeting",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    errors = [p.communicate(timeout=300)[1] for p in started]
    for process, error in zip(started, errors, strict=True):
        assert process.returncode == 0, error


DATA_PARALLEL = """
from torch.nn.parallel import DistributedDataParallel

def build(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(4, 8, 3, padding=1), nn.ReLU(), kind(8, 8, 3, padding=1, groups=8))

x = torch.randn(4, 4, 3, 6, 6)
ours, theirs = DistributedDataParallel(build(fastconv.nn.Conv3d)), build(nn.Conv3d)
for model, batch in ((ours, x[2 * rank:2 * rank + 2]), (theirs, x)):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(batch).square().mean().backward()
        optimiser.step()
for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(a, b)
"""


def test_distributed_data_parallel(tmp_path):
    together(DATA_PARALLEL, tmp_path)


SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
mesh = init_device_mesh("cpu", (2,))

def spread(tensor, placement):
    return distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_()

def check(groups, placements, result, gradients, options, channels=8):
    x, w = torch.randn(4, channels, 3, 6, 6), torch.randn(12, channels // groups, 3, 3, 3)
    b, r = torch.randn(12), torch.randn(4, 12, 3, 6, 6)
    plain = [t.requires_grad_() for t in (x, w, b, r)]
    shards = [spread(t, p) for t, p in zip(plain, placements, strict=True)]
    y = fastconv.conv3d(*shards[:3], 1, 1, 1, groups, residual=shards[3], **options)
    assert list(y.placements) == [result], y.placements
    want = fastconv.conv3d(*plain[:3], 1, 1, 1, groups, residual=plain[3], **options)
    torch.testing.assert_close(y.full_tensor(), want, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    want.square().sum().backward()
    for shard, tensor, placement in zip(shards, plain, gradients, strict=True):
        torch.testing.assert_close(shard.grad.full_tensor(), tensor.grad, rtol=1e-3, atol=1e-3)
        assert placement in (None, *shard.grad.placements), (shard.grad.placements, placement)

R, S0, S1 = Replicate(), Shard(0), Shard(1)
# Groups, placements of input, weight, bias and residual, of the result, of their gradients.
check(1, (S0, R, R, S0), S0, (S0, None, None, S0), {})  # the batch
check(4, (S0, R, R, S0), S0, (S0, None, None, S0), {})  # the batch, of a grouped convolution
check(1, (R, S0, S0, S1), S1, (None, S0, None, S1), {})  # output channels
check(4, (S1, S0, S0, S1), S1, (S1, S0, None, S1), {})  # groups
check(3, (R, R, R, R), R, (None,) * 4, {}, 9)  # groups that do not divide stay together
"""
BLOCK = """
x, w = spread(torch.randn(4, 8, 3, 6, 6), S0), spread(torch.randn(12, 8, 1, 1, 1), R)
with torch.no_grad():
    assert list(fastconv.conv3d(x, w, activation="relu").placements) == [S0]
    # Calls that differ in numbers alone.
    assert fastconv.conv3d(x, w).shape == (4, 12, 3, 6, 6)
    assert fastconv.conv3d(x, w, stride=2).shape == (4, 12, 2, 3, 3)
    assert fastconv.conv3d(x, w, padding=1).shape == (4, 12, 5, 8, 8)
weights = [torch.randn(s) for s in ((6, 4, 3, 1, 1), (6, 1, 1, 3, 3), (8, 6, 1, 1, 1))]
x = torch.randn(2, 4, 4, 5, 5)
with torch.no_grad():
    want = fastconv.separable_block(x, *weights)
    for at, last, result in ((S0, R, S0), (R, S0, S1)):
        placements = (R, R, last)
        ws = [spread(w, p) for w, p in zip(weights, placements, strict=True)]
        y = fastconv.separable_block(spread(x, at), *ws)
        assert list(y.placements) == [result], y.placements
        torch.testing.assert_close(y.full_tensor(), want, rtol=1e-4, atol=1e-4)
"""


def test_sharded(tmp_path):
    together(SHARDED + BLOCK, tmp_path)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        (["train", "--size", "32", "--batch", "1", "--steps", "2"], "same everywhere: True"),
        (["streams", "--streams", "5", "--size", "16"], "streams, 2 processes: 5 streams"),
    ],
)
def test_the_example_runs(what, wanted):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / "examples" / "distributed.py"), *what],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
