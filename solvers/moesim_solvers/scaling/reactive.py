"""reactive: thresholds on what was just seen, as autoscalers do."""

from __future__ import annotations

import numpy as np

from moesim.optimize import Capability, Progress, Status
from moesim.optimize.scaling import ScalingProblem, ScalingSolution

FULL = 0.8  # utilisation aimed at
CALM = 2  # intervals a smaller size must have sufficed before it is taken


def enough(problem: ScalingProblem, demand: float, full: float = FULL) -> int:
    """Smallest size whose capacity at utilisation `full` covers the demand; the largest capacity where none does."""
    able = np.flatnonzero(problem.capacity_C * full >= demand)
    return int(able[0]) if len(able) else int(problem.capacity_C.argmax())


class Reactive:
    """Follows the last intervals' demand by thresholds.

    Up as soon as the last interval's demand exceeded 80 % of capacity, down after two intervals in which less sufficed:
    the rule of horizontal autoscalers (Kubernetes: target utilisation and a stabilisation window), always one interval late.
    Before anything was seen it runs the largest size.
    """

    name = "reactive"
    solves = "scaling"
    capabilities = frozenset({Capability.CAUSAL})
    requires: tuple[str, ...] = ()

    def solve(self, problem: ScalingProblem, *, seed: int, time_limit_s: float, progress: Progress) -> ScalingSolution:
        """One pass; the size of interval n depends on demand before n alone."""
        seen = np.concatenate([problem.history_N, problem.demand_N])
        known = len(problem.history_N)
        size_N = np.zeros(len(problem.demand_N), np.int64)
        size = problem.start if problem.start is not None else int(problem.capacity_C.argmax())
        for n in range(len(size_N)):
            last = [enough(problem, float(demand)) for demand in seen[max(0, known + n - CALM) : known + n]]
            if last and last[-1] > size:
                size = last[-1]
            elif len(last) == CALM:
                size = min(size, max(last))
            size_N[n] = size
        return ScalingSolution(status=Status.FEASIBLE, size_N=size_N, seed=seed)
