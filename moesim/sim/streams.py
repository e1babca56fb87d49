"""Runs tasks on streams: per device compute and copy engines, and the streams of collectives that all devices share.

A collective keeps the communication streams of all devices in step, so one stream stands for theirs. A stream runs one
task at a time, the most urgent first. Collectives may take part of the devices' compute (`sm_share`) and may share
links (`Fabric`). SimPy keeps the clock, and a task is its own SimPy event: cost grows with tasks, never with tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from heapq import heappop, heappush, heappushpop
from typing import Any

import simpy
from simpy.events import NORMAL

from moesim.errors import SimulationError
from moesim.sim.fabric import Fabric
from moesim.sim.tasks import Block, Task, check_acyclic

_NEVER = math.inf


class Stream:
    """One queue: `task` runs since `since`, `queue` waits as (priority, turn, task), `last` ended last."""

    __slots__ = ("busy_s", "computes", "last", "pausing", "queue", "since", "task")

    def __init__(self, name: str) -> None:
        self.computes = name == "compute"
        self.task: Task | None = None
        self.queue: list[tuple[int, int, Task]] = []
        self.busy_s = 0.0
        self.since = 0.0
        self.last: Task | None = None
        self.pausing = False


class _Run:
    """How many tasks of a block have not ended."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class Runner:
    """Pulls blocks from a program as time reaches them, runs their tasks, and tells

    on_task   each task as it ends
    on_wait   each compute task as it starts on a stream that has been idle, and since when
    on_block  each block as its last task ends

    An event is what SimPy calls back for: the end of a task, or a time that has changed since it was set (a copy that gives
    way, compute beside a collective), or the next arrival on the links. `tasks` counts tasks that ended, `events` all of these.
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
        self._program = program
        self._on_wait, self._on_block, self._on_task = on_wait, on_block, on_task
        self._alarms = 0
        self._turn = 0
        self._speed = 1.0  # of compute, beside collectives
        self._open: dict[_Run, Block] = {}
        self._head: Task | None = None
        self._callbacks = [self._end]
        self._schedule: Callable[[Any, Any, float], None] = self.env.schedule

    @property
    def events(self) -> int:
        """SimPy events so far."""
        return self._alarms + self.fabric.events

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
        for block in self._open.values():
            stuck = next(task for task in block.tasks if task.end < 0)
            missing = [repr(task) for task in stuck.after if task.end < 0]
            reason = f"waits for {missing[0]}, which never ends; admit it or remove the dependency" if missing else "never ends"
            raise SimulationError(f"nothing can progress at {self.env.now:g} s: {stuck} {reason}")

    def _admit(self, now: float) -> None:
        block = next(self._program, None)
        if block is None:
            return
        tasks, streams = block.tasks, self.streams
        run = _Run(len(tasks))
        self._open[run] = block
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
            task.cause = latest
            task.waiting = waiting
            if not waiting:
                free.append(task)
        if late:  # a task waits for one that comes after it, or is in no block
            check_acyclic(tasks)
        for task in free:
            self._ready(task, now)

    def _ready(self, task: Task, now: float) -> None:
        """Start a task, or queue it behind what runs on its stream, which may give way."""
        stream = task.on
        running = stream.task
        if running is None:
            self._start(stream, task, now)
            return
        self._turn += 1
        heappush(stream.queue, (task.priority, self._turn, task))
        if running.chunk_s and task.priority < running.priority and running.due < _NEVER and not stream.pausing:
            self._pause(running, now)

    def _start(self, stream: Stream, task: Task, now: float) -> None:
        """Run a task on a free stream, from its begin or from where it gave way."""
        stream.task = task
        stream.since = now
        if task.start < 0:
            delay_s = task.work_s
            task.start = now
            last = stream.last
            if last is not None and (task.cause is None or last.end > task.cause.end):
                task.cause = last
            if stream.computes and self._on_wait:
                free_at = 0.0 if last is None else last.end
                if now > free_at:
                    self._on_wait(task, free_at)
        else:
            delay_s = task.left_s
        if task.sm_share:
            self._slow(-task.sm_share, now)
        if task.load_K is None or not task.load_K.any():
            self._alarm(task, now, delay_s / self._speed if stream.computes else delay_s)
        else:
            task.due = _NEVER
            self.fabric.send(task.load_K, partial(self._arrived, task), least_s=task.work_s)
        if task is self._head:
            self._admit(now)

    def _alarm(self, task: Task, now: float, delay_s: float) -> None:
        """Have SimPy call back at a task's time; of several alarms of a task the last counts."""
        self._alarms += 1
        task.due = now + delay_s
        task.callbacks = self._callbacks
        self._schedule(task, NORMAL, delay_s)

    def _arrived(self, task: Task) -> None:
        task.due = self.env.now
        self._end(task)

    def _end(self, task: Task) -> None:
        """SimPy calls back: the task ends or gives way, unless its time has changed since."""
        task.callbacks = self._callbacks  # SimPy took them, and another alarm may be on its way
        now = self.env.now
        if task.due != now:
            return
        task.due = _NEVER
        stream, run = task.on, task.run
        if stream.pausing:
            self._yield(task, now)
            return
        task.end = now
        stream.busy_s += now - stream.since
        stream.last = task
        if task.sm_share:
            self._slow(task.sm_share, now)
        for follower in task.next:
            follower.waiting -= 1
            if not follower.waiting:
                follower.cause = task
                self._ready(follower, now)
        task.after = ()  # what has ended holds no other task but its cause, so that it goes away with its block
        task.next.clear()
        stream.task = None  # only now, so that the most urgent of all that are ready goes next
        if stream.queue:
            self._start(stream, heappop(stream.queue)[2], now)
        if self._on_task:
            self._on_task(task)
        run.left -= 1
        if not run.left:
            self._close(run)

    def _close(self, run: _Run) -> None:
        block = self._open.pop(run)
        self.tasks += len(block.tasks)
        if self._on_block:
            self._on_block(block)

    def _pause(self, task: Task, now: float) -> None:
        """Let a task end its current chunk, if one follows it."""
        stream = task.on
        done_s, whole_s = now - stream.since, task.due - stream.since
        boundary_s = max(1, math.ceil(done_s / task.chunk_s - 1e-9)) * task.chunk_s
        if boundary_s < whole_s * (1 - 1e-9):
            stream.pausing = True
            task.left_s = whole_s - boundary_s
            self._alarm(task, now, max(0.0, boundary_s - done_s))

    def _yield(self, task: Task, now: float) -> None:
        """A chunk has ended: what is most urgent goes on, this task before others of its priority."""
        stream = task.on
        stream.pausing = False
        stream.busy_s += now - stream.since
        if task.sm_share:
            self._slow(task.sm_share, now)
        self._start(stream, heappushpop(stream.queue, (task.priority, 0, task))[2], now)

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
            if stream.computes and task is not None and task.due < _NEVER:
                self._alarm(task, now, max(0.0, task.due - now) * before / self._speed)
