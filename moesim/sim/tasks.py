"""Tasks: what runs on a stream, and what it waits for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import SimulationError

ALL = -1  # device of a collective, which occupies the same stream of every device


class Task:
    """A piece of work on one stream. `after` are the tasks it waits for; times are set by the run.

    kind       attention, gate, encode, dispatch, experts, combine, decode, fetch, gather, reduce, optimizer
    device     that runs it, or ALL
    stream     compute, h2d, d2h, or of a collective: exchange, intra, inter, weights, gradients
    work_s     seconds it takes undisturbed
    load_K     bytes on the links, for tasks that share the fabric; it then takes at least work_s
    sm_share   share of every device's compute it takes while it runs
    chunk_s    > 0: may be interrupted by more urgent tasks at multiples of chunk_s
    priority   lower is more urgent; equal ones in the order they became ready
    """

    __slots__ = (
        "after", "cause", "chunk", "chunk_s", "device", "end", "event", "idle_since", "kind", "label", "left_s", "load_K", "next", "priority", "since",
        "sm_share", "start", "stream", "turn", "waiting", "work_s",
    )  # fmt: skip

    def __init__(
        self,
        kind: str,
        stream: str,
        work_s: float,
        after: Sequence[Task] = (),
        *,
        device: int = ALL,
        label: tuple[int, int] = (0, 0),
        chunk: int = 0,
        load_K: NDArray[np.float64] | None = None,
        sm_share: float = 0.0,
        chunk_s: float = 0.0,
        priority: int = 0,
    ) -> None:
        if not 0 <= work_s < np.inf:
            raise SimulationError(f"task {kind} of device {device}: takes {work_s} s; a cost must be finite and >= 0")
        self.kind = kind
        self.stream = stream
        self.work_s = work_s
        self.after: Sequence[Task] = after
        self.device = device
        self.label = label  # (step, layer)
        self.chunk = chunk
        self.load_K = load_K
        self.sm_share = sm_share
        self.chunk_s = chunk_s
        self.priority = priority
        self.left_s = work_s
        self.start = -1.0  # -1: not yet
        self.end = -1.0
        self.since = 0.0
        self.idle_since = 0.0  # when its stream ended what ran before
        self.turn = 0
        self.waiting = -1  # unfinished tasks it waits for; -1: not admitted
        self.next: list[Task] = []
        self.cause: Task | None = None  # what it waited for last
        self.event: object = None

    def __repr__(self) -> str:
        step, layer = self.label
        where = "all devices" if self.device == ALL else f"device {self.device}"
        return f"{self.kind}{f' #{self.chunk}' if self.chunk else ''} of step {step}, layer {layer} on {where} ({self.stream})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Tasks of one MoE layer of one step; those of the next block wait, directly or not, for `tasks[0]`.

    span   the layer's time runs from the end of the last task of span[0] to the end of the last of span[1]
    last   ends a step
    """

    label: tuple[int, int]
    tasks: Sequence[Task]
    span: tuple[Sequence[Task], Sequence[Task]]
    last: bool = False


def check_acyclic(tasks: Sequence[Task]) -> None:
    """SimulationError naming the cycle when tasks wait for each other in a ring. O(tasks + edges)."""
    seen: set[int] = set()
    if _in_order(tasks, seen):
        return
    own = {id(task): task for task in tasks}
    state: dict[int, int] = {}  # 1 on the way, 2 done
    for first in tasks:
        way: list[tuple[Task, Iterable[Task]]] = [(first, iter(first.after))] if id(first) not in state else []
        while way:
            task, rest = way[-1]
            state[id(task)] = 1
            for other in rest:
                if state.get(id(other)) == 1:
                    ring = [t for t, _ in way]
                    ring = ring[ring.index(other) :]
                    names = " → ".join(repr(t) for t in [*reversed(ring), ring[-1]])
                    raise SimulationError(f"tasks wait for each other: {names}; remove one of these dependencies")
                if id(other) in own and id(other) not in state:
                    way.append((other, iter(other.after)))
                    break
            else:
                state[id(task)] = 2
                way.pop()


def _in_order(tasks: Sequence[Task], seen: set[int]) -> bool:
    """Every task comes after those of the block it waits for, so there is no ring."""
    own = {id(task) for task in tasks}
    for task in tasks:
        for other in task.after:
            if id(other) in own and id(other) not in seen:
                return False
        seen.add(id(task))
    return True
