"""A network trained data-parallel, and many streams shared out over processes.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py train --network x3d_xs
    torchrun --standalone --nproc-per-node 2 examples/distributed.py streams --streams 16

Both run on CPUs (gloo) or, with --device cuda, on one GPU per process (nccl). All communication is
PyTorch's: DistributedDataParallel averages gradients; streams need none.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastconv


def converted(model: nn.Module) -> nn.Module:
    """The model with fastconv's modules in place of PyTorch's; parameters are shared."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv3d:
                setattr(module, name, fastconv.nn.Conv3d.convert(child))
    return model


def train(options: argparse.Namespace, device: torch.device) -> str:
    """Some steps on noise, every process with a batch of its own; the same weights everywhere."""
    torch.manual_seed(0)
    model = fastconv.zoo.build(options.network, num_classes=10)
    model = converted(model).to(device, memory_format=torch.channels_last_3d).train()
    parallel = DistributedDataParallel(model)
    optimiser = torch.optim.SGD(parallel.parameters(), lr=0.01)
    torch.manual_seed(1 + dist.get_rank())
    shape = (options.batch, 3, options.frames, options.size, options.size)
    start = time.perf_counter()
    for _ in range(options.steps):
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last_3d)
        labels = torch.randint(10, (options.batch,), device=device)
        optimiser.zero_grad()
        nn.functional.cross_entropy(parallel(x), labels).backward()
        optimiser.step()
    seconds = time.perf_counter() - start
    total = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
    everywhere = [torch.zeros_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, total)
    same = all(torch.equal(total, other) for other in everywhere)
    clips = options.steps * options.batch * dist.get_world_size()
    return f"{clips / seconds:.2f} clips a second; weights are the same everywhere: {same}"


def streams(options: argparse.Namespace, device: torch.device) -> str:
    """A layer that is fed frame by frame; every process holds the state of its share of streams."""
    torch.manual_seed(0)
    weight = torch.randn(32, 16, 3, 3, 3, device=device)  # the same everywhere
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine = range(rank, options.streams, processes)
    frame = torch.randn(len(mine), 16, options.size, options.size, device=device)
    frame = frame.contiguous(memory_format=torch.channels_last)
    state = fastconv.continual_state(frame, weight)
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(options.frames):
            fastconv.continual_step(frame, state, weight, padding=(0, 1, 1))
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    rate = options.streams * options.frames / seconds.item()
    return f"{options.streams} streams, {rate:.0f} frames a second"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "streams"))
    parser.add_argument("--network", default="x3d_xs", help="a name of fastconv.zoo")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2, help="clips per process")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device, int(os.environ.get("LOCAL_RANK", 0)))
    if options.device == "cpu":
        device = torch.device("cpu")
    else:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
    try:
        line = {"train": train, "streams": streams}[options.what](options, device)
        if dist.get_rank() == 0:
            print(f"{options.what}, {dist.get_world_size()} processes: {line}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
