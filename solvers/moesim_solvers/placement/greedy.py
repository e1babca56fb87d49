"""greedy: longest processing time first, for equal or unequal devices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Problem, Progress, Solution, Status
from moesim_solvers.placement.bounds import load_floor_L, load_ratio_L
from moesim_solvers.placement.limits import overfull, ruled_slots


def greedy_slots(problem: Problem) -> NDArray[np.int64]:
    """Slots [L, P] of the greedy balance of each layer; where there are rules, of a greedy filling that keeps them."""
    from moesim_solvers.placement.balance import balanced_slots

    if problem.constraints.rules:
        return ruled_slots(problem)
    first_G = np.concatenate([[0], np.cumsum(problem.slots_G, dtype=np.int64)])
    return np.array([balanced_slots(load_E, first_G) for load_E in problem.load_LE])


class Greedy:
    """Heaviest expert first to the lightest device with room; replicas one by one to the largest load per replica.

    Minimises the busiest device (Graham 1969: within 4/3 - 1/(3G) of the best where slots do not bind). Unlike `eplb`
    it knows unequal devices and never puts an expert twice on one, and unlike `eplb` it has no expert groups.
    Good at load in no time, with a proved bound; blind to traffic.
    """

    name = "greedy"
    solves = "placement"
    capabilities = frozenset({Capability.REPLICATION, Capability.HETEROGENEOUS, Capability.RULES, Capability.LOADS})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """One deterministic pass; the objective is busiest over mean load, mean over layers."""
        if reason := overfull(problem):
            return Solution(status=Status.INFEASIBLE, placement=None, seed=seed, notes={"reason": reason})
        slots_LP = greedy_slots(problem)
        ratio_L, floor_L = load_ratio_L(problem.load_LE, slots_LP, problem.slots_G), load_floor_L(problem.load_LE, problem.slots_G)
        return Solution(
            status=Status.OPTIMAL if (ratio_L <= floor_L * (1 + 1e-9)).all() else Status.FEASIBLE,
            placement=problem.placement(slots_LP),
            objective=float(ratio_L.mean()),
            bound=float(floor_L.mean()),
            seed=seed,
        )
