"""moetuner: balanced clusters of experts, then clusters onto devices, two ILPs (MoETuner, Go and Mahajan 2025, arXiv 2502.06643).

L layers, E experts, G devices and as many clusters.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Problem, Progress, Solution, Status
from moesim_solvers.placement.exflow import grown, improve, link_cost_GG, way_cost
from moesim_solvers.placement.greedy import greedy_slots

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE = 0.005  # mean deviation, in mean loads, at which a layer counts as solved: the paper's gap of 0.5 %
LEAST_S = 0.05  # an ILP with less time than this does not start


def deviation(load_E: Floats, cluster_E: Ints, clusters: int) -> float:
    """Σ over clusters of |load - mean| / mean."""
    load_C = np.bincount(cluster_E, load_E, clusters)
    return float(np.abs(load_C / max(load_C.mean(), 1e-300) - 1).sum()) if load_C.any() else 0.0


def balanced_clusters(load_E: Floats, clusters: int, *, time_limit_s: float) -> tuple[Ints | None, bool]:
    """Cluster of each expert by the first ILP, if HiGHS found one in time, and whether it is proved within `TOLERANCE` per cluster:

        min Σ_c d_c,   -d_c <= Σ_e load_e·x_ec / mean - 1 <= d_c,   Σ_c x_ec = 1,   Σ_e x_ec = E / C,   x binary

    Clusters are interchangeable: the i-th hottest expert sits in one of the first i.
    """
    import pulp

    experts = len(load_E)
    share_E = load_E * clusters / load_E.sum()
    hottest = np.argsort(-load_E, kind="stable").tolist()
    model = pulp.LpProblem("clusters", pulp.LpMinimize)
    free = [(e, c) for rank, e in enumerate(hottest) for c in range(min(rank + 1, clusters))]
    x = {(e, c): model.add_variable(f"x_{e}_{c}", cat="Binary") for e, c in free}
    d = [model.add_variable(f"d_{c}", lowBound=0) for c in range(clusters)]
    model += pulp.lpSum(d)
    for e in range(experts):
        model += pulp.lpSum(x[e, c] for c in range(clusters) if (e, c) in x) == 1
    for c in range(clusters):
        inside = [(e, x[e, c]) for e in range(experts) if (e, c) in x]
        model += pulp.lpSum(var for _, var in inside) == experts // clusters
        over = pulp.lpSum(float(share_E[e]) * var for e, var in inside) - 1
        model += over <= d[c]
        model += over >= -d[c]
    solver = pulp.getSolver("HiGHS", msg=False, timeLimit=time_limit_s, threads=1, gapAbs=TOLERANCE * clusters, gapRel=0.0, random_seed=0)
    model.solve(solver)
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, False
    cluster_E = np.zeros(experts, np.int64)
    for (e, c), var in x.items():
        if var.value() > 0.5:
            cluster_E[e] = c
    return cluster_E, model.sol_status == pulp.LpSolutionOptimal


class MoETuner:
    """Two ILPs: equal-sized clusters with the least deviation of load, then clusters onto devices by layer-to-layer traffic.

    First, per layer, min Σ_c |load_c - mean| by PuLP and HiGHS, the time divided over the layers; where the clock ends it, the
    better of its incumbent and the greedy balance stays. The equal size is not in the paper's text, but engines need
    it. Second, min Σ traffic(c, c')·link(device of c, device of c') over consecutive layers: a quadratic assignment, solved
    one layer given its neighbours (exact: those ILPs are integral), until none improves, which is a local optimum.
    Good at load (the worst layers of greedy balance); deviation is not the maximum, and where a hot expert sets the
    maximum it spends its effort on the rest. Blind to which experts a token chooses together; the second ILP is idle under
    equal links and two all-to-alls. No replicas, equal slots.
    """

    name = "moetuner"
    solves = "placement"
    capabilities = frozenset({Capability.NODES, Capability.ANYTIME})
    requires: tuple[str, ...] = ("pulp", "highspy", "numba")

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Feasible when every layer's first ILP is proved, else time-limit; notes count the proved. The objective is the
        first ILP's, mean over layers. Depends on nothing but the problem where all are proved."""
        stop_s = time.monotonic() + time_limit_s
        devices, load_LE = problem.cluster.size, problem.load_LE
        cluster_LE = np.argsort(greedy_slots(problem), axis=1, kind="stable") // (problem.slots // devices)
        proved, spent_L = 0, np.zeros(len(load_LE))
        for layer, load_E in enumerate(load_LE):
            spent_L[layer] = deviation(load_E, cluster_LE[layer], devices)
            share_s = (stop_s - time.monotonic()) / (len(load_LE) - layer + 1)  # one share is left for the second ILP
            if spent_L[layer] <= TOLERANCE * devices:
                proved += 1
            elif share_s >= LEAST_S:
                found_E, closed = balanced_clusters(load_E, devices, time_limit_s=share_s)
                proved += closed
                if found_E is not None and deviation(load_E, found_E, devices) < spent_L[layer]:
                    cluster_LE[layer], spent_L[layer] = found_E, deviation(load_E, found_E, devices)
            progress((layer + 1) / (len(load_LE) + 1), "")
        member_LEC = np.eye(devices)[cluster_LE]
        traffic_LCC = np.einsum("lec,lef,lfd->lcd", member_LEC[:-1], problem.stats.transitions_LEE.astype(np.float64), member_LEC[1:], optimize=True)
        link_GG, each_G = link_cost_GG(problem.cluster), np.ones(devices, np.int64)
        identity_LC = np.tile(np.arange(devices), (len(load_LE), 1))
        starts = (identity_LC, grown(traffic_LCC, link_GG, each_G, identity_LC[0]))
        ends = [improve(traffic_LCC, link_GG, each_G, start_LC, stop_s=stop_s) for start_LC in starts]
        device_LC, mapped = min(ends, key=lambda end: way_cost(traffic_LCC, link_GG, end[0]))
        device_LE = np.take_along_axis(device_LC, cluster_LE, axis=1)
        return Solution(
            status=Status.FEASIBLE if proved == len(load_LE) and mapped else Status.TIME_LIMIT,
            placement=problem.placement(np.argsort(device_LE, axis=1, kind="stable")),
            objective=float(spent_L.mean()),
            seed=seed,
            notes={
                "layers": len(load_LE),
                "layers_proved": proved,
                "link_cost_before": way_cost(traffic_LCC, link_GG, identity_LC),
                "link_cost_after": way_cost(traffic_LCC, link_GG, device_LC),
            },
        )
