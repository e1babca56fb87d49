"""random: experts shuffled, then dealt to devices; the null hypothesis of every comparison."""

from __future__ import annotations

import numpy as np

from moesim.optimize import Capability, Problem, Progress, Solution, Status
from moesim_solvers.placement.round_robin import deal


class Shuffled:
    """Every placement equally likely (replicas: of experts drawn without repetition), a draw of its own per layer.

    Shows what a solver's gain is over luck. Layer l depends on the seed and l alone.
    """

    name = "random"
    solves = "placement"
    capabilities = frozenset({Capability.REPLICATION, Capability.HETEROGENEOUS, Capability.LOADS})
    requires: tuple[str, ...] = ()

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """One draw."""
        experts, slots = problem.model.experts, problem.slots
        rows = []
        for layer in range(len(problem.model.moe_layers)):
            rng = np.random.default_rng([seed, layer])
            cards = np.concatenate([rng.permutation(experts) for _ in range(-(-slots // experts))])[:slots]
            rows.append(deal(cards.tolist(), problem.slots_G))
        return Solution(status=Status.FEASIBLE, placement=problem.placement(np.array(rows)), seed=seed)
