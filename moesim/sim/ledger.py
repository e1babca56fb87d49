"""What a run is asked afterwards: time of every layer and step, why compute waited, what the critical path is made of."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from moesim.sim.tasks import ALL, Block, Task


class Ledger:
    """Collects waits and ended blocks; keeps the tasks of two steps at most.

    layer_s_SL   time of each MoE layer, from the end of its gate to the end of its combine, forward and backward
    end_S        when each step ended
    stall_s      seconds that compute streams waited, all devices together, by what they waited for
    path_s       seconds of the critical path by kind of task
    """

    def __init__(self, steps: int, layers: int) -> None:
        self.layer_s_SL: NDArray[np.float64] = np.zeros((steps, layers))
        self.end_S: NDArray[np.float64] = np.zeros(steps)
        self.stall_s: dict[str, float] = defaultdict(float)
        self.path_s: dict[str, float] = defaultdict(float)
        self._held: list[Block] = []
        self._old: list[Block] = []
        self._before = 0.0

    def waited(self, task: Task, since: float) -> None:
        """Attribute the idle time before a compute task to what it waited for, back along the chain of causes."""
        charge(self.stall_s, task.cause, task.device, since, task.start)

    def block_ended(self, block: Block) -> None:
        """Book the block's span; at the end of a step, its critical path. Lets go of the step before."""
        step, layer = block.label
        self._held.append(block)
        before, after = block.span
        if layer >= 0:
            self.layer_s_SL[step, layer] += max(t.end for t in after) - max((t.end for t in before), default=0.0)
        if not block.last:
            return
        end = max(after, key=lambda t: t.end)
        self.end_S[step] = end.end
        charge(self.path_s, end, None, self._before, end.end)
        self._before = end.end
        for old in self._old:
            for task in old.tasks:
                task.cause = None  # chains of causes would keep every task alive
        self._old, self._held = self._held, []


def charge(to_s: dict[str, float], cause: Task | None, device: int | None, begin: float, end: float) -> None:
    """Add begin..end to kinds of tasks, backwards along the chain of causes; compute of another device is a "slower device"."""
    while cause is not None:
        start = cause.start
        if start < end:
            foreign = cause.stream == "compute" and cause.device != device and device is not None and cause.device != ALL
            kind = "slower device" if foreign else cause.kind
            if start <= begin:
                to_s[kind] += end - begin
                return
            to_s[kind] += end - start
            end = start
        cause = cause.cause
    if end > begin:
        to_s["nothing to do"] += end - begin
