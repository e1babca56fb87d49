"""Runs tasks on streams: per device compute and copy engines, and the streams of collectives that all devices share.

A collective keeps the communication streams of all devices in step, so one stream stands for theirs. A stream runs one
task at a time, the most urgent first. Collectives may take part of the devices' compute (`sm_share`) and may share
links (`Fabric`). One SimPy event ends all tasks that end together; cost grows with tasks, never with tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from heapq import heappop, heappush

import simpy
from simpy.events import Timeout

from moesim.errors import SimulationError
from moesim.sim.fabric import Fabric
from moesim.sim.tasks import Block, Task, check_acyclic


class Stream:
    """One queue: `task` runs, `queue` waits as (priority, turn, task)."""

    __slots__ = ("busy_s", "computes", "free_at", "last", "pausing", "queue", "task")

    def __init__(self, name: str) -> None:
        self.computes = name == "compute"
        self.task: Task | None = None
        self.queue: list[tuple[int, int, Task]] = []
        self.busy_s = 0.0
        self.free_at = 0.0
        self.last: Task | None = None
        self.pausing = False


class _Run:
    """A block from its admission until all its tasks have ended."""

    __slots__ = ("block", "left", "number")

    def __init__(self, number: int, block: Block) -> None:
        self.number = number
        self.block = block
        self.left = len(block.tasks)


class Runner:
    """Pulls blocks from a program as time reaches them, runs their tasks, and tells

    on_task   each task as it ends
    on_wait   each compute task as it starts on a stream that has been idle, and since when
    on_block  each block as its last task ends

    `tasks` counts tasks that ended, `events` SimPy events it took.
    """

    def __init__(
        self,
        fabric: Fabric,
        program: Iterator[Block],
        *,
        on_wait: Callable[[Task, float], None] | None = None,
        on_block: Callable[[Block], None] | None = None,
        on_task: Callable[[Task], None] | None = None,
    ) -> None:
        self.env: simpy.Environment = fabric.env
        self.fabric = fabric
        self.streams: dict[tuple[str, int], Stream] = {}
        self.tasks = 0
        self.events = 0
        self._program = program
        self._on_wait, self._on_block, self._on_task = on_wait, on_block, on_task
        self._turn = 0
        self._speed = 1.0  # of compute, beside collectives
        self._open: dict[int, _Run] = {}
        self._admitted = 0
        self._head: Task | None = None
        self._latest: Timeout | None = None  # the event made last, and when it fires
        self._latest_at = 0.0

    def run(self) -> None:
        """Run the program to its end; SimulationError names a task that can never start."""
        collecting = gc.isenabled()
        gc.disable()  # scanning the many that live would take half of the time
        try:
            self._admit(self.env.now)
            self.env.run()
        finally:
            if collecting:
                gc.enable()
        for run in self._open.values():
            stuck = next(task for task in run.block.tasks if task.end < 0)
            missing = [repr(task) for task in stuck.after if task.end < 0]
            reason = f"waits for {missing[0]}, which never ends; admit it or remove the dependency" if missing else "never ends"
            raise SimulationError(f"nothing can progress at {self.env.now:g} s: {stuck} {reason}")

    def _admit(self, now: float) -> None:
        block = next(self._program, None)
        if block is None:
            return
        tasks, streams = block.tasks, self.streams
        run = self._open[self._admitted] = _Run(self._admitted, block)
        self._admitted += 1
        self._head = tasks[0]
        free, late = [], False
        for task in tasks:
            task.run = run
            key = (task.stream, task.device)
            task.on = streams.get(key) or streams.setdefault(key, Stream(task.stream))
            waiting, latest = 0, None
            for other in task.after:
                if other.end < 0:
                    other.next.append(task)
                    waiting += 1
                    if other.run is None:
                        late = True
                elif latest is None or other.end > latest.end:
                    latest = other
            task.waiting = waiting
            task.cause = latest
            if not waiting:
                free.append(task)
        if late:  # a task waits for one that comes after it, or is in no block
            check_acyclic(tasks)
        for task in free:
            self._ready(task, now)

    def _ready(self, task: Task, now: float) -> None:
        self._turn += 1
        task.turn = self._turn
        stream = task.on
        running = stream.task
        if running is None:
            self._start(stream, task, now)
            return
        heappush(stream.queue, (task.priority, task.turn, task))
        if running.chunk_s > 0 and running.end < 0 and task.priority < running.priority and not stream.pausing and running.load_K is None:
            self._pause(stream, running, now)

    def _start(self, stream: Stream, task: Task, now: float) -> None:
        stream.task = task
        if task.start < 0:
            last = stream.last
            if last is not None and (task.cause is None or last.end > task.cause.end):
                task.cause = last
            task.start = now
            task.left_s = task.work_s
            if stream.computes and now > stream.free_at and self._on_wait:
                self._on_wait(task, stream.free_at)
            if task is self._head:
                self._admit(now)
        task.since = now
        if task.sm_share:
            self._slow(-task.sm_share, now)
        if task.load_K is not None and task.load_K.max(initial=0.0) > 0:
            self.fabric.send(task.load_K, lambda: self._arrived(task), least_s=task.work_s)
            return
        self._alarm(task, now, task.left_s / self._speed if stream.computes else task.left_s)

    def _alarm(self, task: Task, now: float, delay_s: float) -> None:
        """Wake up for a task; tasks that end at the same time, as those of equal devices do, share one event."""
        at = now + delay_s
        event = self._latest
        if event is None or at != self._latest_at or event.callbacks is None:
            self._latest_at = at
            self._latest = event = Timeout(self.env, delay_s, [])
            event.callbacks.append(self._fire)
        event._value.append(task)
        task.event = event

    def _fire(self, event: simpy.Event) -> None:
        self.events += 1
        now = self.env.now
        for task in event._value:
            if task.event is event:  # else its time has changed since
                if task.on.pausing:
                    self._yield(task.on, task, now)
                else:
                    self._end(task, now)

    def _arrived(self, task: Task) -> None:
        self.events += 1
        self._end(task, self.env.now)

    def _end(self, task: Task, now: float) -> None:
        stream, run = task.on, task.run
        task.end = now
        task.event = None
        task.after, task.run = (), None  # no cycles, so that it goes away with its block
        stream.busy_s += now - task.since
        stream.free_at = now
        stream.last = task
        self.tasks += 1
        if task.sm_share:
            self._slow(task.sm_share, now)
        for follower in task.next:
            follower.waiting -= 1
            if not follower.waiting:
                follower.cause = task
                self._ready(follower, now)
        task.next.clear()
        stream.task = None  # only now, so that the most urgent of all that are ready goes next
        if stream.queue:
            self._start(stream, heappop(stream.queue)[2], now)
        if self._on_task:
            self._on_task(task)
        run.left -= 1
        if not run.left:
            del self._open[run.number]
            if self._on_block:
                self._on_block(run.block)

    def _pause(self, stream: Stream, task: Task, now: float) -> None:
        """Let a task end its current chunk, if one follows it."""
        done = now - task.since
        boundary = max(1, math.ceil(done / task.chunk_s - 1e-9)) * task.chunk_s
        if boundary < task.left_s * (1 - 1e-9):
            stream.pausing = True
            self._alarm(task, now, max(0.0, boundary - done))

    def _yield(self, stream: Stream, task: Task, now: float) -> None:
        stream.pausing = False
        stream.busy_s += now - task.since
        stream.free_at = now
        task.left_s -= now - task.since
        task.event = None
        if task.sm_share:
            self._slow(task.sm_share, now)
        heappush(stream.queue, (task.priority, task.turn, task))
        stream.task = None
        self._start(stream, heappop(stream.queue)[2], now)

    def _slow(self, change: float, now: float) -> None:
        """Compute speeds up or slows down; running tasks keep what they have done."""
        before = self._speed
        self._speed = before + change
        if self._speed <= 1e-9:
            raise SimulationError(f"collectives running at {now:g} s take all compute of the devices; give them a smaller sm_share")
        if abs(self._speed - 1) < 1e-12:
            self._speed = 1.0
        for stream in self.streams.values():
            task = stream.task
            if task is not None and stream.computes and task.event is not None:
                task.left_s = max(0.0, task.left_s - (now - task.since) * before)
                stream.busy_s += now - task.since
                task.since = now
                self._alarm(task, now, task.left_s / self._speed)
