"""optimal: the cheapest plan in hindsight, by dynamic programming."""

from __future__ import annotations

import numpy as np

from moesim.optimize import Capability, Progress, Status
from moesim.optimize.scaling import ScalingProblem, ScalingSolution


class Optimal:
    """The cheapest plan in hindsight, by dynamic programming.

    Lot-sizing, O(intervals * sizes^2): v[n, j] = min_i v[n-1, i] + bill of interval n from size i to size j (Wagner and Whitin
    1958). Nothing can do better on this demand, so its bill is the bound for every other policy; no running system can follow it.
    """

    name = "optimal"
    solves = "scaling"
    capabilities = frozenset({Capability.EXACT})
    requires: tuple[str, ...] = ()

    def solve(self, problem: ScalingProblem, *, seed: int, time_limit_s: float, progress: Progress) -> ScalingSolution:
        """One pass forward and one back; ties go to the smaller size."""
        intervals, sizes = len(problem.demand_N), len(problem.devices_C)
        first_CC = problem.stage(problem.demand_N[0])
        value_C = first_CC[problem.start] if problem.start is not None else np.diagonal(first_CC)
        came_NC = np.zeros((intervals, sizes), np.int64)
        for n in range(1, intervals):
            total_CC = value_C[:, None] + problem.stage(problem.demand_N[n])
            came_NC[n] = total_CC.argmin(axis=0)
            value_C = total_CC.min(axis=0)
        size_N = np.zeros(intervals, np.int64)
        size_N[-1] = int(value_C.argmin())
        for n in range(intervals - 1, 0, -1):
            size_N[n - 1] = came_NC[n, size_N[n]]
        least = float(value_C.min())
        return ScalingSolution(status=Status.OPTIMAL, size_N=size_N, objective=least, bound=least, seed=seed)
