"""partition: the co-activation graph cut into nodes, then into devices, with exact slot counts."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Problem, Progress, Solution, Status
from moesim_solvers.placement.bounds import price_floor, price_L

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SLACKS = (0.02, 0.1, 0.3)  # how far above the greedy balance a part may be loaded; the cheapest of the three is kept
PATIENCE = 12  # swaps of a pass without a new best before it ends


def refine(together_EE: Floats, load_E: Floats, part_E: Ints, parts: int, limit: float) -> Ints:
    """Parts [E] of the same sizes with more co-activation inside parts, none loaded above `limit`.

    Passes of Kernighan and Lin (1970) with the gains kept up to date as by Fiduccia and Mattheyses (1982): swap the best
    pair even if it loses, lock it, go back to the best prefix; until a pass gains nothing. `together_EE` is symmetric
    with a zero diagonal; the parts given must keep the limit.
    """
    best_E = part_E.copy()
    while True:
        part_E, gained, best_gain, since = best_E.copy(), 0.0, 1e-9, 0
        inside_ED = np.stack([together_EE[:, part_E == d].sum(axis=1) for d in range(parts)], axis=1)
        weight_D = np.bincount(part_E, load_E, parts)
        heavier_EE = load_E[None, :] - load_E[:, None]
        open_EE = ~np.eye(len(part_E), dtype=bool)
        improved = False
        while since < PATIENCE:
            gain_EE = inside_ED[:, part_E] - inside_ED[np.arange(len(part_E)), part_E][:, None]
            gain_EE = gain_EE + gain_EE.T - 2 * together_EE
            room_E = (limit - weight_D)[part_E] + 1e-9 * limit
            allowed_EE = open_EE & (part_E[:, None] != part_E) & (heavier_EE <= room_E[:, None]) & (-heavier_EE <= room_E)
            if not allowed_EE.any():
                break
            e, f = np.unravel_index(np.argmax(np.where(allowed_EE, gain_EE, -np.inf)), gain_EE.shape)
            a, b = part_E[e], part_E[f]
            gained += gain_EE[e, f]
            change_E = together_EE[f] - together_EE[e]
            inside_ED[:, a] += change_E
            inside_ED[:, b] -= change_E
            weight_D[a] += heavier_EE[e, f]
            weight_D[b] -= heavier_EE[e, f]
            part_E[e], part_E[f] = b, a
            open_EE[[e, f]] = open_EE[:, [e, f]] = False
            since += 1
            if gained > best_gain:
                best_E, best_gain, since, improved = part_E.copy(), gained, 0, True
        if not improved:
            return best_E


def split(together_EE: Floats, load_E: Floats, slots_D: Ints, slack: float) -> Ints:
    """Part of each expert, `slots_D` experts in each: greedy balance, then `refine` within (1 + slack) times its load."""
    from moesim_solvers.placement.balance import balanced_slots

    slots_P = balanced_slots(load_E, np.concatenate([[0], np.cumsum(slots_D)]))
    part_E = np.empty(len(load_E), np.int64)
    part_E[slots_P] = np.repeat(np.arange(len(slots_D)), slots_D)
    limit = (1 + slack) * float(np.bincount(part_E, load_E).max())
    return refine(together_EE, load_E, part_E, len(slots_D), limit)


def layer_slots(together_EE: Floats, load_E: Floats, slots_G: Ints, node_G: Ints, slack: float) -> Ints:
    """Slots [P] of one layer: nodes first, then the devices of each node."""
    device_E = np.empty(len(load_E), np.int64)
    node_E = split(together_EE, load_E, np.bincount(node_G, slots_G).astype(np.int64), slack)
    for node in np.unique(node_E):
        mine, devices = np.flatnonzero(node_E == node), np.flatnonzero(node_G == node)
        device_E[mine] = devices[split(together_EE[np.ix_(mine, mine)], load_E[mine], slots_G[devices], slack)]
    return np.argsort(device_E, kind="stable")


class Partition:
    """Cuts the co-activation graph hierarchically, nodes then devices, exact counts, load bounded.

    Maximises co-activation inside a node, then inside a device, by swaps (Kernighan and Lin 1970, Fiduccia and
    Mattheyses 1982) from the greedy balance, under three load limits; each layer keeps the cheapest in seconds. The usual
    graph partitioners only approximate part sizes, and slots are exact. Good at locality, most of all between nodes,
    without touching tokens; pairs are a proxy of distinct destinations that counts three experts together as three savings
    instead of two, so `local-search` on the tokens themselves does better where it has the time. Places experts once.
    """

    name = "partition"
    solves = "placement"
    capabilities = frozenset({Capability.HETEROGENEOUS, Capability.FANOUT, Capability.NODES})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Deterministic unless the clock ends it: layers not reached keep the greedy balance or the tighter limits."""
        from moesim_solvers.placement.greedy import greedy_slots

        stop_s = time.monotonic() + time_limit_s
        slots_G, node_G = problem.slots_G.astype(np.int64), problem.cluster.node_G.astype(np.int64)
        best_LP = greedy_slots(problem)
        best_L, finished = price_L(problem, best_LP), True
        for index, slack in enumerate(SLACKS):
            tried_LP = best_LP.copy()
            for layer, load_E in enumerate(problem.load_LE):
                if time.monotonic() > stop_s:
                    finished = False
                    break
                together_EE = problem.stats.coactivation_LEE[layer].astype(np.float64)
                np.fill_diagonal(together_EE, 0.0)
                tried_LP[layer] = layer_slots(together_EE, load_E, slots_G, node_G, slack)
                progress((index + (layer + 1) / len(best_LP)) / len(SLACKS), "")
            tried_L = price_L(problem, tried_LP)
            best_LP[tried_L < best_L] = tried_LP[tried_L < best_L]
            best_L = np.minimum(best_L, tried_L)
        return Solution(
            status=Status.FEASIBLE if finished else Status.TIME_LIMIT,
            placement=problem.placement(best_LP),
            objective=float(best_L.mean()),
            bound=price_floor(problem),
            seed=seed,
        )
