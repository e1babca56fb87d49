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


class Runner:
    """Pulls blocks from a program as time reaches them, runs their tasks, and reports tasks and blocks as they end."""

    def __init__(self, fabric: Fabric, program: Iterator[Block], *, on_task: Callable[[Task], None], on_block: Callable[[Block], None]) -> None:
        self.env: simpy.Environment = fabric.env
        self.fabric = fabric
        self.streams: dict[tuple[str, int], Stream] = {}
        self.tasks = 0
        self.events = 0
        self._program = program
        self._on_task, self._on_block = on_task, on_block
        self._turn = 0
        self._speed = 1.0  # of compute, beside collectives
        self._open: dict[int, Block] = {}  # by admission, until all their tasks have ended
        self._left: dict[int, int] = {}  # tasks of open blocks that have not ended
        self._admitted = 0
        self._head: Task | None = None
        self._latest: Timeout | None = None  # the event made last, and when it fires
        self._latest_at = 0.0

    def run(self) -> None:
        """Run the program to its end; SimulationError names a task that can never start."""
        collecting = gc.isenabled()
        gc.disable()  # ended tasks hold no cycles; scanning the many that live would take half of the time
        try:
            self._admit()
            self.env.run()
        finally:
            if collecting:
                gc.enable()
        for block in self._open.values():
            stuck = next(task for task in block.tasks if task.end < 0)
            missing = [repr(task) for task in stuck.after if task.end < 0]
            reason = f"waits for {missing[0]}, which never ends; admit it or remove the dependency" if missing else "never ends"
            raise SimulationError(f"nothing can progress at {self.env.now:g} s: {stuck} {reason}")

    def _admit(self) -> None:
        block = next(self._program, None)
        if block is None:
            return
        tasks = block.tasks
        number = self._admitted
        self._admitted += 1
        self._open[number], self._left[number] = block, len(tasks)
        self._head = tasks[0]
        free, late = [], False
        for task in tasks:
            task.block = number
            waiting, latest = 0, None
            for other in task.after:
                if other.end < 0:
                    other.next.append(task)
                    waiting += 1
                    late = late or other.block < 0
                elif latest is None or other.end > latest.end:
                    latest = other
            task.waiting = waiting
            task.cause = latest
            if not waiting:
                free.append(task)
        if late:  # a task waits for one that comes after it, or is in no block
            check_acyclic(tasks)
        for task in free:
            self._ready(task)

    def _ready(self, task: Task) -> None:
        key = (task.stream, task.device)
        stream = self.streams.get(key)
        if stream is None:
            stream = self.streams[key] = Stream(task.stream)
        task.on = stream
        self._turn += 1
        task.turn = self._turn
        running = stream.task
        if running is None:
            self._start(stream, task)
        else:
            heappush(stream.queue, (task.priority, task.turn, task))
            if running.chunk_s > 0 and running.end < 0 and task.priority < running.priority and not stream.pausing and running.load_K is None:
                self._pause(stream, running)

    def _start(self, stream: Stream, task: Task) -> None:
        env = self.env
        now = env.now
        stream.task = task
        if task.start < 0:
            last = stream.last
            if last is not None and (task.cause is None or last.end > task.cause.end):
                task.cause = last
            task.start = now
            task.idle_since = stream.free_at
            if task is self._head:
                self._admit()
        task.since = now
        if task.sm_share:
            self._slow(-task.sm_share)
        if task.load_K is not None and task.load_K.max(initial=0.0) > 0:
            self.fabric.send(task.load_K, lambda: self._arrived(stream, task), least_s=task.work_s)
            return
        self._alarm(task, task.left_s / self._speed if stream.computes else task.left_s)

    def _alarm(self, task: Task, delay_s: float) -> None:
        """Wake up for a task; tasks that end at the same time, as those of equal devices do, share one event."""
        at = self.env.now + delay_s
        event = self._latest
        if event is None or at != self._latest_at or event.callbacks is None:
            self._latest_at = at
            self._latest = event = Timeout(self.env, delay_s, [])
            event.callbacks.append(self._fire)
        event._value.append(task)
        task.event = event

    def _fire(self, event: simpy.Event) -> None:
        self.events += 1
        for task in event._value:
            if task.event is event:  # else its time has changed since
                stream = task.on
                if stream.pausing:
                    self._yield(stream, task)
                else:
                    self._end(stream, task)

    def _arrived(self, stream: Stream, task: Task) -> None:
        self.events += 1
        self._end(stream, task)

    def _end(self, stream: Stream, task: Task) -> None:
        now = self.env.now
        task.end = now
        task.event = None
        task.after = ()
        stream.busy_s += now - task.since
        stream.free_at = now
        stream.last = task
        self.tasks += 1
        if task.sm_share:
            self._slow(task.sm_share)
        for follower in task.next:
            waiting = follower.waiting = follower.waiting - 1
            if not waiting:
                follower.cause = task
                self._ready(follower)
        task.next.clear()
        stream.task = None  # only now, so that the most urgent of all that are ready goes next
        if stream.queue:
            self._start(stream, heappop(stream.queue)[2])
        self._on_task(task)
        left = self._left[task.block] = self._left[task.block] - 1
        if not left:
            del self._left[task.block]
            self._on_block(self._open.pop(task.block))

    def _pause(self, stream: Stream, task: Task) -> None:
        """Let a task end its current chunk, if one follows it."""
        done = self.env.now - task.since
        boundary = max(1, math.ceil(done / task.chunk_s - 1e-9)) * task.chunk_s
        if boundary < task.left_s * (1 - 1e-9):
            stream.pausing = True
            self._alarm(task, max(0.0, boundary - done))

    def _yield(self, stream: Stream, task: Task) -> None:
        now = self.env.now
        stream.pausing = False
        stream.busy_s += now - task.since
        stream.free_at = now
        task.left_s -= now - task.since
        task.event = None
        if task.sm_share:
            self._slow(task.sm_share)
        heappush(stream.queue, (task.priority, task.turn, task))
        stream.task = None
        self._start(stream, heappop(stream.queue)[2])

    def _slow(self, change: float) -> None:
        """Compute speeds up or slows down; running tasks keep what they have done."""
        before, now = self._speed, self.env.now
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
                self._alarm(task, task.left_s / self._speed)
