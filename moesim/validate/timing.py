"""How long calls take on a device: interleaved in random order, warmed up, caches flushed, every sample kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from moesim.validate.machine import cache_B

Call = Callable[[], object]
Progress = Callable[[float, str], None]


@dataclass(kw_only=True, slots=True)
class Graphs:
    """How many timed calls were captured in CUDA graphs, and how many waited for the host and ran by themselves (`eager`)."""

    captured: int = 0
    eager: int = 0

    def note(self, what: str) -> tuple[str, ...]:
        """A remark where some calls could not be captured: their times hold the host's launches."""
        calls = self.captured + self.eager
        return (
            (f"{what}: {self.eager} of {calls} calls could not be captured in a CUDA graph; the host's launches are in their times",)
            if self.eager
            else ()
        )


HOW = {
    "cpu": "processor time of one thread, lower quartile of the repeats",
    "cuda": "CUDA events around a CUDA graph of the call, around the call itself where it cannot be captured; median of the repeats",
}


def typical(samples_s: ArrayLike, device: str) -> NDArray[np.float64]:
    """The time that repeats [..., repeats] stand for, [...]: their median; on a CPU the lower quartile, since others only slow a core down."""
    return np.asarray(np.quantile(np.asarray(samples_s, np.float64), 0.25 if device == "cpu" else 0.5, axis=-1))


def measure(
    calls: Sequence[Call],
    *,
    repeats: int,
    seed: int = 0,
    device: str = "cpu",
    flush_B: int = 0,
    before: Sequence[Call] | None = None,
    awake: Call | None = None,
    graphs: Graphs | None = None,
    progress: Progress = lambda share, what: None,
) -> NDArray[np.float64]:
    """Seconds of each call, [calls, repeats].

    Calls are interleaved in random order, so that drift of clocks or load hits all alike, and warmed up once each.
    `before[i]` runs untimed before every run of call i; `flush_B` bytes are written after it, so that caches hold nobody's
    weights; then `awake` runs untimed, so that a processor's caches hold the code again, as between layers of a model.
    On CUDA the time between two events; on CPU one thread's processor time, which other programs on the machine do not
    inflate. `graphs` counts calls that a CUDA graph captured, and those it could not.
    """
    rng = np.random.default_rng(seed)
    timed = cuda_seconds if device.startswith("cuda") else _thread_seconds
    scratch = torch.empty(max(flush_B, 8) // 4, dtype=torch.float32, device=device)
    times = np.zeros((len(calls), repeats))
    with one_thread(device):
        ready = []
        capture = _Capture(device, graphs or Graphs()) if device.startswith("cuda") else None
        for index, call in enumerate(calls):
            if before:
                before[index]()
            call()
            ready.append(capture(call) if capture else call)
        for repeat in range(repeats):
            for index in rng.permutation(len(calls)):
                if before:
                    before[index]()
                if flush_B:
                    scratch.add_(1.0)
                    if awake:
                        awake()
                times[index, repeat] = timed(ready[index])
            progress((repeat + 1) / repeats, "")
    return times


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """On a CPU torch computes with one thread of the caller, and one of every thread beside it: processor time then is all there is."""
    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def flush_size(device: str) -> int:
    """Bytes to write so that a cache forgets: twice its size, at most 512 MiB."""
    return int(min(2 * cache_B(device), 2**29))


def cuda_seconds(call: Call) -> float:
    """Seconds between two CUDA events around a call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _thread_seconds(call: Call) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


class _Capture:
    """Calls as CUDA graphs, as engines run them, so that the host's launches are not timed; those that wait for the host as they are.

    The graphs share a memory pool: they never run at the same time and nobody reads what they leave. `torch.cuda.graph` is not
    used: it empties the allocator before every capture, and leaves its stream current after one that fails. After a failure
    nothing more is captured, since the allocator may keep the memory of a capture that did not end.
    """

    def __init__(self, device: str, count: Graphs) -> None:
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self.count, self.possible = count, True

    def __call__(self, call: Call) -> Call:
        if self.possible:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            try:
                with torch.cuda.stream(self.stream):
                    self._record(graph, call)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                torch.cuda.synchronize()
                self.possible = False
            else:
                self.count.captured += 1
                return graph.replay
        self.count.eager += 1
        return call

    def _record(self, graph: Any, call: Call) -> None:
        graph.capture_begin(pool=self.pool)
        try:
            call()
        except BaseException:
            with suppress(RuntimeError):  # that it was broken is known
                graph.capture_end()
            raise
        graph.capture_end()
