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
        cause, start = task.cause, task.start
        if cause is not None and cause.device == ALL and cause.start <= since:  # the usual case: one collective
            self.stall_s[cause.kind] += start - since
            return
        for kind, seconds in waits(cause, task.device, since, start):
            self.stall_s[kind] += seconds

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
        for kind, seconds in waits(end, None, self._before, end.end):
            self.path_s[kind] += seconds
        self._before = end.end
        for old in self._old:
            for task in old.tasks:
                task.cause = None  # chains of causes would keep every task alive
        self._old, self._held = self._held, []


def waits(cause: Task | None, device: int | None, begin: float, end: float) -> list[tuple[str, float]]:
    """(kind, seconds) of the chain of tasks that covers begin..end backwards; compute of another device is a "slower device"."""
    found = []
    while end > begin and cause is not None:
        start = max(cause.start, begin)
        if start < end:
            foreign = device is not None and cause.stream == "compute" and cause.device not in (device, ALL)
            found.append(("slower device" if foreign else cause.kind, end - start))
            end = start
        cause = cause.cause
    if end > begin:
        found.append(("nothing to do", end - begin))
    return found
