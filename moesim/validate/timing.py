"""How long calls take on a device: interleaved in random order, warmed up, caches flushed, every sample kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
    "cpu": "processor time of one thread",
    "cuda": "CUDA events around a CUDA graph of the call, around the call itself where it cannot be captured",
}


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
    timed = _cuda_seconds if device.startswith("cuda") else _thread_seconds
    scratch = torch.empty(max(flush_B, 8) // 4, dtype=torch.float32, device=device)
    times = np.zeros((len(calls), repeats))
    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        ready = []
        for index, call in enumerate(calls):
            if before:
                before[index]()
            call()
            ready.append(_graphed(call, graphs or Graphs()) if device.startswith("cuda") else call)
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
    finally:
        torch.set_num_threads(threads)
    return times


def flush_size(device: str) -> int:
    """Bytes to write so that a cache forgets: twice its size, at most 512 MiB."""
    return int(min(2 * cache_B(device), 2**29))


def _cuda_seconds(call: Call) -> float:
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


def _graphed(call: Call, count: Graphs) -> Call:
    """The call as a CUDA graph, as engines run it, so that the host's launches are not timed; itself if it waits for the host."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, pool=_pool()):
            call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        count.eager += 1
        return call
    count.captured += 1
    return graph.replay


_shared: list[Any] = []


def _pool() -> Any:
    """One memory pool for all graphs: they never run at the same time and nobody reads what they leave."""
    if not _shared:
        _shared.append(torch.cuda.graph_pool_handle())
    return _shared[0]
