"""local-search: the default solver, annealing on the tokens themselves."""

from __future__ import annotations

import numpy as np

from moesim.optimize import Capability, Problem, Progress, Solution, Status


class LocalSearch:
    """Simulated annealing on the true token sets: load, devices and nodes per token at the prices of the cost model."""

    name = "local-search"
    solves = "placement"
    capabilities = frozenset({Capability.REPLICATION, Capability.HETEROGENEOUS, Capability.FANOUT, Capability.NODES, Capability.ANYTIME})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Best placement found; the objective is seconds per layer, as far as placement decides them."""
        from moesim_solvers.placement.search import search_slots

        price = problem.weights
        found = search_slots(
            problem.experts_TLK,
            problem.load_LE,
            problem.slots_G,
            problem.cluster.node_G,
            busy=price.load_s,
            fanout=price.devices_s,
            node_fanout=price.nodes_s,
            seed=seed,
            time_limit_s=time_limit_s,
            progress=lambda share, cost: progress(share, ""),
        )
        start, best = float(np.mean(found.start_cost_L)), float(np.mean(found.cost_L))
        return Solution(
            status=Status.FEASIBLE if found.finished else Status.TIME_LIMIT,
            placement=problem.placement(found.slots_LP),
            objective=best,
            seed=seed,
            notes={"objective_of_greedy_balance": start},
        )
