"""Tasks: what runs on a stream, and what it waits for. A task is its own SimPy event."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import SimulationError

ALL = -1  # device of a collective, which occupies the same stream of every device

_INFINITE = float("inf")


class Task:
    """A piece of work on one stream. `after` are the tasks it waits for; times are set by the run.

    kind       attention, gate, encode, dispatch, experts, combine, decode, sync, read, fetch, prefetch, send, host experts,
               return, gather, reduce, optimizer
    device     that runs it, or ALL
    stream     compute, h2d, d2h, nvme, memory, host, or of a collective: exchange, intra, inter, weights, gradients
    work_s     seconds it takes undisturbed
    load_K     bytes on the links, for tasks that share the fabric; it then takes at least work_s
    sm_share   share of every device's compute it takes while it runs
    chunk_s    > 0: may be interrupted by more urgent tasks at multiples of chunk_s; not on a compute stream
    priority   lower is more urgent; equal ones in the order they became ready
    about      what it does, in words, where the kind does not say it
    """

    __slots__ = (
        "about", "after", "callbacks", "cause", "chunk", "chunk_s", "device", "due", "end", "kind", "label", "left_s", "load_K", "next", "on",
        "priority", "run", "sm_share", "start", "stream", "waiting", "work_s",
    )  # fmt: skip
    _ok = True  # as SimPy asks of its events
    callbacks: Any  # of SimPy, while its time is set
    waiting: int  # unfinished tasks it waits for, and
    cause: Task | None  # what it waited for last, and
    on: Any  # its stream, once it is admitted
    due: float  # when it will end or give way, inf: not known; once it has started
    left_s: float  # what is left of it, once it has given way

    def __init__(
        self,
        kind: str,
        stream: str,
        work_s: float,
        after: Sequence[Task] = (),
        device: int = ALL,
        label: tuple[int, int] = (0, 0),
        chunk: int = 0,
        priority: int = 0,
        load_K: NDArray[np.float64] | None = None,
        sm_share: float = 0.0,
        chunk_s: float = 0.0,
        about: str = "",
    ) -> None:  # by position where many are made: keywords take twice as long as the rest
        if not 0 <= work_s < _INFINITE:
            raise SimulationError(f"task {kind} of device {device}: takes {work_s} s; a cost must be finite and >= 0")
        if chunk_s and stream == "compute":
            raise SimulationError(f"task {kind} of device {device}: chunk_s={chunk_s}: compute is not interrupted; give it to copies and collectives")
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
        self.about = about
        self.start = -1.0  # -1: not yet
        self.end = -1.0
        self.next: list[Task] = []  # tasks that wait for it
        self.run: Any = None  # of the block it was admitted with

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
    own = set(tasks)
    done: set[Task] = set()
    for first in tasks:
        way: list[tuple[Task, Iterator[Task]]] = [] if first in done else [(first, iter(first.after))]
        on_way = [first]
        while way:
            task, rest = way[-1]
            for other in rest:
                if other in on_way:
                    ring = [*on_way[on_way.index(other) :], other]
                    raise SimulationError(f"tasks wait for each other: {' waits for '.join(map(repr, ring))}; remove one of these dependencies")
                if other in own and other not in done:
                    way.append((other, iter(other.after)))
                    on_way.append(other)
                    break
            else:
                done.add(task)
                way.pop()
                on_way.pop()
