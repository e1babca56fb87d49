"""linear: experts in order of their ids, what engines do without a plan."""

from __future__ import annotations

import numpy as np

from moesim.optimize import Capability, Problem, Progress, Solution, Status


class Linear:
    """Experts in order of their ids; replicas of expert 0, 1, 2 … fill the rest (vLLM's initial map)."""

    name = "linear"
    solves = "placement"
    capabilities = frozenset({Capability.REPLICATION, Capability.HETEROGENEOUS, Capability.LOADS})
    requires: tuple[str, ...] = ()

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """The identity map; looks at nothing but the counts."""
        slots = np.arange(problem.slots) % problem.model.experts
        placement = problem.placement(np.tile(slots, (len(problem.model.moe_layers), 1)))
        return Solution(status=Status.FEASIBLE, placement=placement, seed=seed)
