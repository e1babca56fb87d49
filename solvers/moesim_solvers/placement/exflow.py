"""exflow: experts that follow one another sit together (ExFlow, Yao et al. 2024, arXiv 2401.08383).

L layers, E experts, G devices; a layer's placement is one-hot `at_LEG`.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moesim.hardware import Cluster
from moesim.optimize import Capability, Problem, Progress, Solution, Status

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STARTS = 8


def link_cost_GG(cluster: Cluster) -> Floats:
    """Cost of a token's way from device to device, 1 for the dearest: 0 on the spot, else seconds per byte of the slower
    port (inside a node) or NIC (between nodes, times oversubscription)."""
    port_G = np.array([link.bandwidth_Bps for link in cluster.intra_G])
    cost_GG = 1 / np.minimum.outer(port_G, port_G)
    if cluster.nic_G:
        nic_G = np.array([link.bandwidth_Bps for link in cluster.nic_G])
        far_GG = cluster.node_G[:, None] != cluster.node_G
        cost_GG = np.where(far_GG, cluster.oversubscription / np.minimum.outer(nic_G, nic_G), cost_GG)
    np.fill_diagonal(cost_GG, 0.0)
    return np.asarray(cost_GG / max(float(cost_GG.max()), 1e-300))


def way_cost(follow_LEE: Floats, link_GG: Floats, device_LE: Ints) -> float:
    """Σ over consecutive layers and expert pairs of transitions times link cost."""
    return float(sum((pairs * link_GG[np.ix_(here, there)]).sum() for pairs, here, there in zip(follow_LEE, device_LE, device_LE[1:], strict=False)))


def grown(follow_LEE: Floats, link_GG: Floats, slots_G: Ints, first_E: Ints) -> Ints:
    """Devices [L, E]: the first layer as given, each next one solved exactly for the layer before it."""
    rows = [first_E]
    for pairs_EE in follow_LEE:
        rows.append(_assigned(pairs_EE.T @ link_GG[rows[-1]], slots_G))
    return np.array(rows)


def _assigned(cost_EG: Floats, slots_G: Ints) -> Ints:
    """Device of each expert, `slots_G` on each, at least cost: integral corners, so no integer program is needed."""
    from scipy.optimize import linear_sum_assignment

    device_P = np.repeat(np.arange(len(slots_G)), slots_G)
    return np.asarray(device_P[linear_sum_assignment(cost_EG[:, device_P])[1]])


def improve(follow_LEE: Floats, link_GG: Floats, slots_G: Ints, device_LE: Ints, *, stop_s: float = np.inf) -> tuple[Ints, bool]:
    """Devices [L, E] of a local optimum, and whether the clock allowed to reach it.

    One layer given its neighbours is a transport problem: cost [E, G] = transitionsᵀ·at·link from before + transitions·at·linkᵀ
    to after, `slots_G` experts per device, solved exactly. Sweeps forth and back until no layer improves.
    `follow_LEE` is [L - 1, E, E].
    """
    device_LE, layers = device_LE.copy(), len(device_LE)
    better, order = True, list(range(layers))
    while better:
        better = False
        for layer in order:
            if time.monotonic() > stop_s:
                return device_LE, False
            cost_EG = np.zeros((device_LE.shape[1], len(slots_G)))
            if layer > 0:
                cost_EG += follow_LEE[layer - 1].T @ link_GG[device_LE[layer - 1]]
            if layer + 1 < layers:
                cost_EG += follow_LEE[layer] @ link_GG.T[device_LE[layer + 1]]
            best_E = _assigned(cost_EG, slots_G)
            now, new = (float(np.take_along_axis(cost_EG, at_E[:, None], 1).sum()) for at_E in (device_LE[layer], best_E))
            if new < now - 1e-9 * max(1.0, abs(now)):
                device_LE[layer], better = best_E, True
        order.reverse()
    return device_LE, True


class ExFlow:
    """Inter-layer affinity: tokens find their next layer's experts where they are, equal experts per device.

    Minimises Σ transitions(layer, e, e')·link(device of e, device of e') from the transitions of all tokens. ExFlow states
    this per token and top-1 and solves it by recursive bipartition with an ILP, 5,000 tokens at a time; that form grows with
    tokens. Here transitions are aggregated (every pair of choices of consecutive layers counts), and layers are solved one
    by one, each exactly, from eight first layers: a local optimum, no bound. Good where tokens stay on the device of their last
    expert (one all-to-all per layer) or links differ; under the usual two all-to-alls only what falls together with
    co-activation pays, and load is balanced in number of experts alone.
    """

    name = "exflow"
    solves = "placement"
    capabilities = frozenset({Capability.HETEROGENEOUS, Capability.NODES, Capability.ANYTIME})
    requires: tuple[str, ...] = ()

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Best of eight first layers (experts by id, then shuffled), grown and improved; the objective is mean link cost per transition."""
        stop_s = time.monotonic() + time_limit_s
        follow_LEE, link_GG = problem.stats.transitions_LEE.astype(np.float64), link_cost_GG(problem.cluster)
        slots_G, layers = problem.slots_G.astype(np.int64), len(problem.model.moe_layers)
        in_order_LE = np.tile(np.repeat(np.arange(len(slots_G)), slots_G), (layers, 1))
        best_LE, best, finished = in_order_LE, way_cost(follow_LEE, link_GG, in_order_LE), True
        for start in range(STARTS):
            rng = np.random.default_rng([seed, start])
            first_E = rng.permutation(in_order_LE[0]) if start else in_order_LE[0]
            device_LE = grown(follow_LEE, link_GG, slots_G, first_E)
            device_LE, ended = improve(follow_LEE, link_GG, slots_G, device_LE, stop_s=stop_s)
            finished &= ended
            cost = way_cost(follow_LEE, link_GG, device_LE)
            if cost < best:
                best_LE, best = device_LE, cost
            progress((start + 1) / STARTS, "")
        return Solution(
            status=Status.FEASIBLE if finished else Status.TIME_LIMIT,
            placement=problem.placement(np.argsort(best_LE, axis=1, kind="stable")),
            objective=best / max(float(follow_LEE.sum()), 1.0),
            seed=seed,
        )
