"""M3ViT: the task chooses the gate, and ping-pong buffers hide an expert's load behind the expert before it."""

from __future__ import annotations

from moesim.systems.mechanisms import System
from moesim.systems.residency import Residency

SYSTEM = System(
    name="m3vit",
    title="M3ViT, task gates and ping-pong buffers on an FPGA",
    paper="M3ViT, arXiv 2210.14793",
    headline="ZCU104: memory /2.4, up to 9.23x energy efficiency over a comparable FPGA design, -88 % FLOPs",
    check="a layer is load_1 + sum max(compute, next load); a task's switch adds nothing; buffers do not grow with the experts",
    residency=Residency(order="one-by-one", buffers=2),
)
