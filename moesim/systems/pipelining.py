"""Pipelining: time of a layer whose tokens go through its stages in r equal parts.

Stages run in a fixed order on their streams (all parts of a stage before any part of a later stage on the same stream):

    start[stage, i] = max(end[stage - 1, i], free[stream]);  a layer ends with its last part's last stage

which is what the event engine executes. Suffixes: N cases, R parts, G devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError

Floats = NDArray[np.float64]
MOST_PARTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """`time_s` of one part: [..., G] per device on stream "compute", [...] otherwise."""

    stream: str
    time_s: ArrayLike


def pipeline_span(stages: Sequence[Stage], parts: int) -> Floats:
    """Seconds from the first stage's start to the last stage's end, for every case [...]."""
    free: dict[str, Floats | float] = {}
    ready: list[Floats | float] = [0.0] * parts
    for stage in stages:
        time = np.asarray(stage.time_s, np.float64)
        for i in range(parts):
            per_device = stage.stream == "compute"
            gate = np.asarray(ready[i])[..., None] if per_device else ready[i]
            end = np.maximum(gate, free.get(stage.stream, 0.0)) + time
            free[stage.stream] = end
            ready[i] = end.max(axis=-1) if per_device else end
    return np.asarray(ready[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearStage:
    """A stage that takes `alpha_s + beta_s/r` for one of r parts."""

    stream: str
    alpha_s: float
    beta_s: float

    def at(self, parts: int) -> Stage:
        """Time of one part."""
        time = self.alpha_s + self.beta_s / parts
        return Stage(stream=self.stream, time_s=[time] if self.stream == "compute" else time)


def linear_span(stages: Sequence[LinearStage], parts: int) -> float:
    """`pipeline_span` of linear stages."""
    return float(pipeline_span([stage.at(parts) for stage in stages], parts))


def best_degree(stages: Sequence[LinearStage], *, most: int = MOST_PARTS) -> int:
    """Degree with the least span, the lowest of equals.

    A span is the longest of its chains of parts; each chain takes (p + q·r)·(alpha + beta/r) summed over its streams, which
    is convex in r, so the span is convex and a search by thirds finds its least in O(log most) spans.
    """
    if not stages or most < 1:
        raise InputError(f"best_degree of {len(stages)} stages up to {most}: give at least one stage and one degree")
    span: Callable[[int], float] = lambda r: linear_span(stages, r)  # noqa: E731
    low, high = 1, most
    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        if span(left) <= span(right):
            high = right
        else:
            low = left
    return min(range(low, high + 1), key=lambda r: (span(r), r))
