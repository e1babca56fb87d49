"""What no placement can beat, and what a placement is worth: proved lower bounds and the price they bound.

Prices are `Problem.weights`: seconds per layer for busiest-over-mean load, devices per token and nodes per token.
L layers, E experts, P slots, G devices, T tokens, K selections; D destinations (devices, or nodes).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.optimize import Problem
from moesim.trace import NO_EXPERT, TraceStats

Floats = NDArray[np.float64]


def load_ratio_L(load_LE: Floats, slots_LP: NDArray[np.integer], slots_G: ArrayLike) -> Floats:
    """Busiest over mean device load of each layer, every expert's load split evenly over its slots; 1 without load."""
    counts_G = np.asarray(slots_G)
    device_P = np.repeat(np.arange(len(counts_G)), counts_G)
    ratio_L = np.ones(len(load_LE))
    for layer, (load_E, slots_P) in enumerate(zip(load_LE, slots_LP, strict=True)):
        share_E = load_E / np.bincount(slots_P, minlength=len(load_E))
        if load_E.sum() > 0:
            ratio_L[layer] = np.bincount(device_P, share_E[slots_P]).max() * np.count_nonzero(counts_G) / load_E.sum()
    return ratio_L


def load_floor_L(load_LE: Floats, slots_G: ArrayLike) -> Floats:
    """Least possible busiest-over-mean load of each layer, loads split evenly over replicas.

    The largest of
    - area: 1, some device carries at least the mean;
    - hottest: the least largest share `load / count` that P slots allow, counts at most one per device (giving each
      further slot to the largest share attains it: an exchange argument);
    - without replicas, company: the hottest expert shares its device with the lightest ones that fill it;
    - without replicas, pigeonhole: of the n·D + 1 hottest experts n + 1 share a device.

    Needs slots for every expert and no device with more slots than experts.
    """
    from moesim_solvers.placement.balance import replica_counts

    open_D = np.asarray(slots_G)[np.asarray(slots_G) > 0]
    devices, slots, experts = len(open_D), int(open_D.sum()), load_LE.shape[1]
    floor_L = np.ones(len(load_LE))
    for layer, load_E in enumerate(np.asarray(load_LE, np.float64)):
        if load_E.sum() <= 0:
            continue
        least = float((load_E / replica_counts(load_E, slots, devices)).max())
        if slots == experts:
            hot_E = np.sort(load_E)[::-1]
            alone = experts - (int(open_D.min()) - 1)
            least = max(least, float(hot_E[0] + hot_E[alone:].sum()))
            for n in range(1, (experts - 1) // devices + 1):
                least = max(least, float(hot_E[n * devices - n : n * devices + 1].sum()))
        floor_L[layer] = max(1.0, least * devices / float(load_E.sum()))
    return floor_L


def fanout_floor_L(experts_TLK: NDArray[np.integer], together_LEE: NDArray[np.integer], slots_D: ArrayLike) -> Floats:
    """Least possible mean number of distinct destinations per token, in each layer, whatever the dispatch rule.

    Counting: a token with k experts needs the fewest destinations whose slots add up to k.
    Companions: a token's destinations are Σ over its experts of 1 / (1 + x), x = its other experts served at the same
    place. 1 / (1 + x) is convex, so the n tokens of an expert pay at least n · h(mean x), h linear between whole x
    (Jensen). Among s slots and m replicas an expert has at most m·(s - 1) companions, so mean x is at most the m·(s - 1)
    largest co-activations over n, and at most s - 1. Replicas are granted where they help most (gains fall with m).
    `together_LEE` are the co-activations of the same tokens, the loads on its diagonal.
    """
    open_D = np.sort(np.asarray(slots_D)[np.asarray(slots_D) > 0])[::-1]
    tokens, layers, width = experts_TLK.shape
    experts = together_LEE.shape[1]
    widest, spare = min(int(open_D[0]), experts), int(open_D.sum()) - experts
    most = min(len(open_D), spare + 1)
    needed_K = np.searchsorted(np.cumsum(open_D), np.arange(width + 1))  # destinations before the k-th expert fits
    needed_K = np.where(np.arange(width + 1) > 0, needed_K + 1, 0)
    floor_L = np.zeros(layers)
    for layer in range(layers if tokens else 0):
        counting = needed_K[(experts_TLK[:, layer] != NO_EXPERT).sum(axis=1)].mean()
        load_E = np.diagonal(together_LEE[layer]).astype(np.float64)
        others_EE = together_LEE[layer] - np.diag(np.diagonal(together_LEE[layer]))
        best_EE = np.cumsum(-np.sort(-others_EE, axis=1), axis=1)
        paid_ME = np.zeros((most, experts))
        for m in range(1, most + 1):
            company = min(m * (widest - 1), experts - 1)
            met_E = best_EE[:, company - 1] if company else np.zeros(experts)
            mean_E = np.minimum(np.divide(met_E, load_E, out=np.zeros(experts), where=load_E > 0), widest - 1)
            whole_E = np.floor(mean_E)
            step_E = 1 / (1 + whole_E) - 1 / (2 + whole_E)
            paid_ME[m - 1] = load_E * (1 / (1 + whole_E) - (mean_E - whole_E) * step_E)
        gains = -np.sort(np.diff(paid_ME, axis=0).ravel())[:spare]
        floor_L[layer] = max(counting, (paid_ME[0].sum() - gains.sum()) / tokens)
    return floor_L


def price_floor(problem: Problem) -> float:
    """Seconds per layer that no placement gets below: each term's floor at its price, mean over layers."""
    price, ids = problem.weights, problem.experts_TLK
    stats = problem.stats if problem.stats.tokens == len(ids) else TraceStats.from_experts(ids, problem.model)
    slots_N = np.bincount(problem.cluster.node_G, problem.slots_G).astype(np.int64)
    floor_L = price.load_s * load_floor_L(problem.load_LE, problem.slots_G)
    floor_L += price.devices_s * fanout_floor_L(ids, stats.coactivation_LEE, problem.slots_G)
    floor_L += price.nodes_s * fanout_floor_L(ids, stats.coactivation_LEE, slots_N)
    return float(floor_L.mean())


def price_L(problem: Problem, slots_LP: NDArray[np.integer]) -> Floats:
    """Seconds per layer of these slots: load of all tokens, evenly split; devices and nodes per token of the sample."""
    from moesim.cost import route

    price = problem.weights
    cost_L = price.load_s * load_ratio_L(problem.load_LE, slots_LP, problem.slots_G)
    if len(problem.experts_TLK):
        traffic = route(problem.experts_TLK, problem.placement(slots_LP), problem.cluster.node_G)
        cost_L += price.devices_s * traffic.fanout_devices_L + price.nodes_s * traffic.fanout_nodes_L
    return cost_L
