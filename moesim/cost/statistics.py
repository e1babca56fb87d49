"""Score of a placement from statistics of a trace, without its tokens: for searches that score many placements.

Loads are exact (replicas share an expert's load evenly). Which devices a token reaches is not in the loads: it comes
exactly from a sample of tokens, or from how often two experts were chosen together. Of the X experts of one device (or
node) that a token chose, the pairs give the mean and the variance; the chance of X >= 1 is that of the Panjer-class
distribution (binomial, Poisson, negative binomial) with the same two moments, held inside bounds that no distribution
with these moments can leave:

    S1 = E[X], S2 = E[X(X-1)]/2,   m = 1 + floor(2*S2/S1)
    2*S1/(m+1) - 2*S2/(m*(m+1))  <=  P(X >= 1)  <=  min(1, S1 - 2*S2/n),   n = min(K, slots): two slots leave no doubt

Sources: Dawson and Sankoff 1967 (lower), Kounias 1968 and Galambos 1977 (upper, at most n events). Sources of tokens are
taken as even over the devices. Suffixes: L layers, E experts, P slots, G devices, M nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.model import CostModel, LayerTimes
from moesim.cost.traffic import Traffic, route
from moesim.errors import InputError
from moesim.plan import Placement
from moesim.trace import TraceStats

Floats = NDArray[np.float64]
_Chance: TypeAlias = tuple[Floats, Floats, Floats]  # estimate, least, most


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticsScore:
    """What a placement costs on average, per layer.

    load_ratio_L     busiest device over the mean device (exact)
    fanout_L         mean distinct devices a token reaches, its own included; fanout_nodes_L likewise
    fanout_bounds_L2 least and most that the pairs allow, or two standard errors around a sample's mean; fanout_nodes_bounds_L2
                     likewise. With replicas the pairs of different turns are an estimate, too, and so are the bounds
    fanout_from      "tokens" or "pairs"
    times            of one step of `tokens_per_device` tokens (S = 1)
    """

    load_ratio_L: Floats
    fanout_L: Floats
    fanout_nodes_L: Floats
    fanout_bounds_L2: Floats
    fanout_nodes_bounds_L2: Floats
    fanout_from: Literal["tokens", "pairs"]
    times: LayerTimes

    @property
    def layer_s_L(self) -> Floats:
        """Dispatch, slowest device, combine."""
        return np.asarray(self.times.dispatch.time_s_N[0] + self.times.compute_s_SLG[0].max(axis=1) + self.times.combine.time_s_N[0])


def score_statistics(
    stats: TraceStats, placement: Placement, cost: CostModel, *, tokens_per_device: int = 4096, sample_TLK: NDArray[np.integer] | None = None
) -> StatisticsScore:
    """Score of a placement under a trace's statistics; a sample of its tokens makes the fan-out exact for that sample.

    Without a sample the dispatch rule must be `even`, since others depend on where a token lives. Raises InputError when
    statistics, placement and cluster do not fit. Cost: O(L*P) and the pairs of experts that share a node.
    """
    layers, experts = stats.load_LE.shape
    cluster = cost.cluster
    if (layers, experts) != (len(placement.layers), placement.experts) or placement.devices != cluster.size or not stats.tokens:
        raise InputError(
            f"statistics of {stats.tokens} tokens, {layers} layers x {experts} experts; placement of {len(placement.layers)} x {placement.experts} "
            f"on {placement.devices} devices; cluster of {cluster.size}: pass those of one model and cluster"
        )
    total = float(tokens_per_device * cluster.size)
    rows = np.arange(layers)[:, None]
    rate_LP = (stats.load_LE / (placement.replicas_LE * stats.tokens))[rows, placement.slots_LP]  # selections per token
    if sample_TLK is not None:
        traffic = route(np.asarray(sample_TLK, np.uint16), placement, cluster.node_G, tokens_per_step=total, selections=cost.way.per_selection)
        fan_L, node_fan_L = traffic.fanout_devices_L, traffic.fanout_nodes_L
        bounds, node_bounds = (
            _two_errors(mean_L, min(most, stats.model.top_k), len(sample_TLK))
            for mean_L, most in ((fan_L, cluster.size), (node_fan_L, cluster.nodes))
        )
        chosen: Literal["tokens", "pairs"] = "tokens"
    else:
        if placement.dispatch != "even":
            raise InputError(f"dispatch {placement.dispatch!r} depends on where tokens live, which statistics do not hold; pass sample_TLK=")
        chosen = "pairs"
        reach, node_reach = _reach(stats, placement, rate_LP, np.asarray(cluster.node_G))
        fan_L, node_fan_L = reach[0].sum(axis=1), node_reach[0].sum(axis=1)
        bounds, node_bounds = (np.stack([each[1].sum(axis=1), each[2].sum(axis=1)], axis=1) for each in (reach, node_reach))
        traffic = _even_traffic(rate_LP, placement, reach[0], node_reach[0], total)
    traffic = Traffic(
        slot_tokens_SLP=(rate_LP * total)[None],
        copies_SLGG=traffic.copies_SLGG,
        node_copies_SLGN=traffic.node_copies_SLGN,
        tokens_SG=traffic.tokens_SG,
        selections_SLGG=traffic.selections_SLGG,
    )
    load_LG = traffic.device_tokens_SLG(placement)[0]
    return StatisticsScore(
        load_ratio_L=load_LG.max(axis=1) / load_LG.mean(axis=1),
        fanout_L=fan_L,
        fanout_nodes_L=node_fan_L,
        fanout_bounds_L2=bounds,
        fanout_nodes_bounds_L2=node_bounds,
        fanout_from=chosen,
        times=cost.layer_times(traffic, placement),
    )


def _two_errors(mean_L: Floats, most: int, tokens: int) -> Floats:
    """[L, 2] two standard errors around the mean of counts in 1..most: their deviation is at most sqrt((most-mean)(mean-1))."""
    error_L = 2 * np.sqrt(np.maximum((most - mean_L) * (mean_L - 1), 0.0) / tokens)  # Bhatia and Davis 2000
    return np.stack([mean_L - error_L, mean_L + error_L], axis=1)


def _reach(stats: TraceStats, placement: Placement, rate_LP: Floats, node_G: NDArray[np.integer]) -> tuple[_Chance, _Chance]:
    """Chances that a token reaches each device, [L, G], and each node, [L, M]."""
    layers, devices, nodes = len(rate_LP), placement.devices, int(node_G.max()) + 1
    device_P = placement.device_P
    mean_LG, pairs_LG, mean_LM, pairs_LM = (np.zeros((layers, size)) for size in (devices, devices, nodes, nodes))
    np.add.at(mean_LG.T, device_P, rate_LP.T)
    np.add.at(mean_LM.T, node_G, mean_LG.T)
    order_P = np.lexsort((device_P, node_G[device_P]))
    home_P, node_P = device_P[order_P], node_G[device_P[order_P]]
    keys = (node_P * devices + home_P, node_P)  # rising
    ends_P2 = np.stack([np.searchsorted(key_P, key_P, "right") for key_P in keys], axis=1)
    rows, slots_LP = np.arange(layers)[:, None], placement.slots_LP[:, order_P]
    _pairs_kernel()(
        stats.coactivation_LEE, slots_LP, placement.replicas_LE[rows, slots_LP], _turns(placement)[:, order_P],
        home_P, node_P, ends_P2, pairs_LG, pairs_LM,
    )  # fmt: skip
    most_G, most_M = (np.minimum(np.bincount(at_P, minlength=n), stats.model.top_k) for at_P, n in ((home_P, devices), (node_P, nodes)))
    return _chance(mean_LG, pairs_LG / stats.tokens, most_G), _chance(mean_LM, pairs_LM / stats.tokens, most_M)


def _turns(placement: Placement) -> NDArray[np.int32]:
    """[L, P] which of its expert's replicas a slot is, counted from the lowest slot."""
    layers, slots = placement.slots_LP.shape
    order_LP = np.argsort(placement.slots_LP, axis=1, kind="stable")
    first_LE = np.cumsum(placement.replicas_LE, axis=1) - placement.replicas_LE
    rows = np.arange(layers)[:, None]
    turns_LP = np.empty((layers, slots), np.int32)
    turns_LP[rows, order_LP] = np.arange(slots) - first_LE[rows, placement.slots_LP[rows, order_LP]]
    return turns_LP


@cache
def _pairs_kernel() -> Any:
    import numba

    @numba.njit(parallel=True, cache=True, nogil=True)
    def count(together_LEE, slots_LP, replicas_LP, turns_LP, device_P, node_P, ends_P2, pairs_LG, pairs_LM):  # type: ignore[no-untyped-def]
        """Tokens that reach two slots of a device, and of a node: replica i of m and j of n serve a token together in 1 of
        lcm(m, n) turns if i = j modulo gcd(m, n), else never. Slots come in the order of nodes, then devices."""
        for layer in numba.prange(slots_LP.shape[0]):
            expert_P, replicas_P, turn_P = slots_LP[layer], replicas_LP[layer], turns_LP[layer]
            share_P = 1.0 / replicas_P
            single = replicas_P.max() == 1
            for i in range(len(expert_P)):
                row_E, mine = together_LEE[layer, expert_P[i]], replicas_P[i]
                begin, near, far = i + 1, 0.0, 0.0
                for tier in range(2):
                    total = 0.0
                    if single:
                        for j in range(begin, ends_P2[i, tier]):
                            total += row_E[expert_P[j]]
                    else:
                        for j in range(begin, ends_P2[i, tier]):
                            if mine == 1 or replicas_P[j] == 1:
                                total += row_E[expert_P[j]] * share_P[j]
                            elif expert_P[i] != expert_P[j]:
                                shared = math.gcd(mine, replicas_P[j])
                                if (turn_P[i] - turn_P[j]) % shared == 0:
                                    total += row_E[expert_P[j]] * share_P[j] * shared
                    total *= share_P[i]
                    begin = ends_P2[i, 0]
                    near, far = (total, far) if tier == 0 else (near, total)
                pairs_LG[layer, device_P[i]] += near
                pairs_LM[layer, node_P[i]] += near + far

    return count


def _chance(mean: Floats, pairs: Floats, highest: ArrayLike) -> _Chance:
    """P(X >= 1) of the Panjer-class distribution with E[X] and E[X(X-1)]/2 given, X <= highest; the least and most possible."""
    with np.errstate(divide="ignore", invalid="ignore"):
        m = 1 + np.floor(np.where(mean > 0, 2 * pairs / mean, 0.0))
        least = np.clip(2 * mean / (m + 1) - 2 * pairs / (m * (m + 1)), 0.0, 1.0)
        most = np.clip(mean - 2 * pairs / np.maximum(highest, 1), least, 1.0)
        excess = 2 * pairs - mean**2  # variance - mean
        ratio = np.where(mean > 0, excess / np.where(mean > 0, mean, 1.0), 0.0)  # < 0 binomial, > 0 negative binomial
        none = np.where(np.abs(ratio) < 1e-9, np.exp(-mean), np.maximum(1 + ratio, 0.0) ** (-mean / np.where(ratio == 0, 1.0, ratio)))
    return np.clip(1 - none, least, most), least, most


def _even_traffic(rate_LP: Floats, placement: Placement, reach_LG: Floats, reach_LM: Floats, total: float) -> Traffic:
    """Traffic of one step whose tokens live evenly on the devices and reach each device with the same chance."""
    layers, devices = reach_LG.shape
    each = total / devices
    selected_LG = np.zeros((layers, devices))
    np.add.at(selected_LG.T, placement.device_P, rate_LP.T)

    def spread(per_target: Floats) -> Floats:
        return np.repeat(each * per_target[None, :, None, :], devices, axis=2)

    return Traffic(
        slot_tokens_SLP=np.zeros((1, 1, 1)),
        copies_SLGG=spread(reach_LG),
        node_copies_SLGN=spread(reach_LM),
        tokens_SG=np.full((1, devices), each),
        selections_SLGG=spread(selected_LG),
    )
