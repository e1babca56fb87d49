"""static-minimum: the one size that costs least."""

from __future__ import annotations

import numpy as np

from moesim.optimize import Capability, Progress, Status
from moesim.optimize.scaling import ScalingProblem, ScalingSolution, bill


class StaticMinimum:
    """The one size that costs least.

    What elasticity must beat. Knows the whole demand, as someone who buys for a peak does.
    """

    name = "static-minimum"
    solves = "scaling"
    capabilities: frozenset[Capability] = frozenset()
    requires: tuple[str, ...] = ()

    def solve(self, problem: ScalingProblem, *, seed: int, time_limit_s: float, progress: Progress) -> ScalingSolution:
        """Every size tried; ties go to the smaller one."""
        total_C = [bill(problem, np.full(len(problem.demand_N), size)).total for size in range(len(problem.devices_C))]
        best = int(np.argmin(total_C))
        return ScalingSolution(status=Status.FEASIBLE, size_N=np.full(len(problem.demand_N), best), objective=total_C[best], seed=seed)
