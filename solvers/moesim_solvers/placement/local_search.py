"""local-search: the default solver, annealing on the tokens themselves."""

from __future__ import annotations

import numpy as np

from moesim.optimize import Capability, Problem, Progress, Solution, Status

LOAD_SLACK = 0.0075  # busiest/mean that may be given away for less travel inside a node
STANDARD_ERRORS = 2.0  # of a device's load over consecutive parts of the sample: what a sample cannot promise of other tokens


class LocalSearch:
    """Simulated annealing on the true token sets: load, devices and nodes per token.

    Across nodes, load and travel are priced in seconds by the cost model. Inside one node, where a unit of load costs about
    ten times a unit of travel, pricing load would spend travel on the sample's noise: there load is a limit, the greedy
    balance's own plus 0.0075, and travel is minimised below it.
    """

    name = "local-search"
    solves = "placement"
    capabilities = frozenset({Capability.REPLICATION, Capability.HETEROGENEOUS, Capability.FANOUT, Capability.NODES, Capability.ANYTIME})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Best placement found; the objective is what `search_slots` minimised."""
        from moesim_solvers.placement.search import search_slots

        price = problem.weights
        limited = problem.cluster.nodes == 1
        found = search_slots(
            problem.experts_TLK,
            problem.load_LE,
            problem.slots_G,
            problem.cluster.node_G,
            busy=price.load_s,
            fanout=1.0 if limited else price.devices_s,
            node_fanout=0.0 if limited else price.nodes_s,
            load_slack=LOAD_SLACK if limited else None,
            drift=STANDARD_ERRORS,
            seed=seed,
            time_limit_s=time_limit_s,
            progress=lambda share, cost: progress(share, ""),
        )
        return Solution(
            status=Status.FEASIBLE if found.finished else Status.TIME_LIMIT,
            placement=problem.placement(found.slots_LP),
            objective=float(np.mean(found.cost_L)),
            seed=seed,
            notes={"objective_of_greedy_balance": float(np.mean(found.start_cost_L)), "mode": "load limited" if limited else "priced in seconds"},
        )
