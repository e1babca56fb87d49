"""A benchmark is a function that returns what it measured; ratios are against a peer or a baseline of the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`value` in `unit`; `peer_value` is the same of `peer`, in the same process."""

    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None


BENCHES: dict[str, Callable[[], Measured]] = {}


def bench(function: Callable[[], Measured]) -> Callable[[], Measured]:
    """Register a benchmark under its name."""
    BENCHES[function.__name__.replace("_", "-")] = function
    return function


def best_of(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the quickest of several calls, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
