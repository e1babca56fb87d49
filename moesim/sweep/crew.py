"""Crews: who does the work of a sweep. Local processes by default, a Dask cluster on request; both survive the death of workers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any, Protocol, TypeVar

from moesim.errors import InputError, MoesimError

Item = TypeVar("Item")
Value = TypeVar("Value")
ATTEMPTS = 3  # workers an item may cost before it is called deadly
IN_FLIGHT = 512  # items given to a Dask cluster at a time
PATIENCE_S = 30.0  # for a scheduler to answer and a first worker to come


@dataclass(frozen=True, slots=True)
class Died:
    """In place of a value: every one of `tries` workers that had this item died (killed, out of memory, a crash in native code)."""

    tries: int


class CrewLost(MoesimError):  # noqa: N818 - reads as what happened
    """A cluster went away in the middle of its work."""


class Crew(Protocol):
    """Runs a function of a module on many items, anywhere. The function must not raise: an exception ends the run."""

    def run(self, function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[tuple[Item, Value | Died]]:
        """(item, value) of every item, as they finish."""
        ...


class LocalCrew:
    """Processes of this machine, one item each at a time, so that a worker that dies is blamed on the item it had.

    They are spawned, not forked, and end with this process, however it ends.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise InputError(f"{workers} workers cannot work; give 1 or more")
        self.workers = workers

    def run(self, function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[tuple[Item, Value | Died]]:
        """(item, value) of every item, as they finish."""
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        waiting, seats = iter(items), [_Seat(threads) for _ in range(self.workers)]
        running: dict[Future[Value], tuple[_Seat, Item, int]] = {}
        try:
            for seat, item in zip(seats, waiting, strict=False):
                running[seat.submit(function, item)] = (seat, item, 1)
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    seat, item, tries = running.pop(future)
                    try:
                        value: Value | Died = future.result()
                    except BrokenProcessPool:
                        if tries < ATTEMPTS:
                            running[seat.submit(function, item)] = (seat, item, tries + 1)
                            continue
                        value = Died(tries)
                    for following in islice(waiting, 1):
                        running[seat.submit(function, following)] = (seat, following, 1)
                    yield item, value
        finally:
            for seat in seats:
                seat.close()


class _Seat:
    """A worker process that may use so many threads, replaced when it died."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ProcessPoolExecutor | None = None
        self._pid: Future[int]

    def submit(self, function: Callable[[Item], Value], item: Item) -> Future[Value]:
        if self._pool is not None:
            with suppress(BrokenProcessPool):
                return self._pool.submit(function, item)
            self._pool.shutdown()
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(self._threads,))
        self._pid = self._pool.submit(os.getpid)
        return self._pool.submit(function, item)

    def close(self) -> None:
        """End the process now, in the middle of an item if it has one."""
        if self._pool is None:
            return
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._pid.done() and not self._pid.cancelled() and self._pid.exception() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid.result(), signal.SIGTERM)


def _begin(threads: int) -> None:
    """In a new worker: its share of the cores. An interrupt is the parent's business; without a parent it ends (its queue would never tell).

    Without shares two workers ran 0.6 times as many small cases as one, on two cores: threads of one waited for those of the other.
    """
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class DaskCrew:
    """Workers of a running Dask scheduler. They need this version of moesim, and see the same files under the same paths.

    Start them with NUMBA_NUM_THREADS=1 where a machine has several.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def run(self, function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[tuple[Item, Value | Died]]:
        """(item, value) of every item, as they finish. Items of a worker that dies go to another one.

        Raises InputError when no scheduler and worker answer, or they have another moesim; CrewLost when the scheduler goes away.
        """
        from distributed import as_completed
        from distributed.scheduler import KilledWorker

        waiting = iter(items)
        given: dict[Any, Item] = {}
        with closing(self._client()) as client:

            def give(item: Item) -> Any:
                future = client.submit(function, item, pure=False)
                given[future] = item
                return future

            running = as_completed([give(item) for item in islice(waiting, IN_FLIGHT)], loop=client.loop)
            for future in running:
                item = given.pop(future)
                try:
                    value: Value | Died = future.result()
                except KilledWorker as problem:
                    value = Died(problem.allowed_failures + 1)
                except (OSError, CancelledError, asyncio.CancelledError):
                    raise CrewLost(f"scheduler {self.address!r} went away; what is done is kept: start it again and run the same command") from None
                for following in islice(waiting, 1):
                    running.add(give(following))
                yield item, value

    def _client(self) -> Any:
        try:
            from distributed import Client
        except ImportError:
            raise InputError("a Dask cluster needs dask and distributed; install `moesim[cluster]`, or leave --scheduler out") from None
        try:
            client = Client(self.address, timeout=PATIENCE_S, set_as_default=False)
        except (OSError, ValueError) as problem:
            raise InputError(f"scheduler {self.address!r} does not answer: {problem}; start `dask scheduler`, give the address it prints") from None
        try:
            client.wait_for_workers(1, timeout=PATIENCE_S)
            there = set(client.run(version, "moesim").values())
        except Exception as problem:
            client.close()
            raise InputError(f"scheduler {self.address!r} has no worker with moesim: {problem}; start `dask worker {self.address}`") from None
        if there != {version("moesim")}:
            client.close()
            raise InputError(f"scheduler {self.address!r}: workers have moesim {', '.join(sorted(there))}, here is {version('moesim')}")
        return client
