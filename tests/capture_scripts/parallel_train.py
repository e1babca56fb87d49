"""Trains a small MoE with DDP, knowing nothing of capture, then one with FSDP2 that it captures itself; run by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from capture_scripts.tiny import TinyMoE, adapt, tiny_spec, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moesim.capture import capture

STEPS = 3


def train(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        model(tokens(100 * dist.get_rank() + step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    adapt()
    torch.manual_seed(0)
    train(DistributedDataParallel(TinyMoE()))
    torch.manual_seed(0)
    model = TinyMoE()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with capture(model, out, model_spec=tiny_spec()):
        train(model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
