"""EPLB, the balancer of DeepSeek (deepseek-ai/EPLB@d52c72d), as pure functions on arrays.

Same answers as upstream, bit for bit: float32 arithmetic, stable descending sorts, first maximum, first minimum.
Shapes: L layers, E logical experts, P physical slots, X most replicas of one expert. Rows are independent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError
from moesim.jit import compiled
from moesim.optimize import Capability, Problem, Progress, Solution, Status

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def rebalance_experts(weight_LE: ArrayLike, replicas: int, groups: int, nodes: int, devices: int) -> tuple[Ints, Ints, Ints]:
    """Place `replicas` physical experts so that no device gets much more than its share.

    Hierarchical when `groups % nodes == 0`: pack expert groups into nodes, replicate inside each node,
    pack replicas into the devices of the node. Otherwise one node and one group do the same globally.

    Returns
    -------
    phy2log_LP : logical expert of each slot; device g owns slots `g*P/G .. (g+1)*P/G - 1`.
    log2phy_LEX : slots of each expert in order of replication, padded with -1.
    logcnt_LE : replicas of each expert.

    Raises
    ------
    InputError
        If the weights are not a finite, non-negative matrix or the counts do not divide.
    """
    weight_LE = np.asarray(weight_LE, dtype=np.float32)
    _check(weight_LE, replicas, groups, nodes, devices)
    if groups % nodes:
        groups = nodes = 1
    phy2log_LP, rank_LP, logcnt_LE = _hierarchical(weight_LE, replicas, groups, nodes, devices)
    layers, experts = weight_LE.shape
    log2phy_LEX = np.full((layers, experts, int(logcnt_LE.max())), -1, dtype=np.int64)
    log2phy_LEX[np.arange(layers)[:, None], phy2log_LP, rank_LP] = np.arange(replicas)
    return phy2log_LP, log2phy_LEX, logcnt_LE


def pack(weight_RI: Floats, packs: int) -> tuple[Ints, Ints]:
    """Give each of I items one of `packs` bins of equal size: heaviest first, into the lightest open bin.

    Returns the bin of each item and its position there, both [R, I]. With one item per bin the order is kept.
    """
    rows, items = weight_RI.shape
    if items == packs:
        return np.broadcast_to(np.arange(items), (rows, items)).copy(), np.zeros((rows, items), dtype=np.int64)
    order_RI = np.argsort(-weight_RI, axis=1, kind="stable")
    return _pack(weight_RI, order_RI, packs)


@compiled
def _pack(weight_RI: Floats, order_RI: Ints, packs: int) -> tuple[Ints, Ints]:
    rows, items = weight_RI.shape
    pack_RI = np.empty((rows, items), np.int64)
    rank_RI = np.empty((rows, items), np.int64)
    for row in range(rows):
        load_B = np.zeros(packs, np.float32)
        count_B = np.zeros(packs, np.int64)
        for item in order_RI[row]:
            best = -1
            for b in range(packs):
                if count_B[b] < items // packs and (best < 0 or load_B[b] < load_B[best]):
                    best = b
            pack_RI[row, item] = best
            rank_RI[row, item] = count_B[best]
            load_B[best] += weight_RI[row, item]
            count_B[best] += 1
    return pack_RI, rank_RI


@compiled
def replicate(weight_RI: Floats, copies: int) -> tuple[Ints, Ints, Ints]:
    """Grow I items to `copies`, each time doubling up the item whose copies carry most.

    Returns the item of each copy [R, copies], which copy of it that is [R, copies], copies per item [R, I].
    """
    rows, items = weight_RI.shape
    item_RC = np.empty((rows, copies), np.int64)
    rank_RC = np.zeros((rows, copies), np.int64)
    count_RI = np.ones((rows, items), np.int64)
    for row in range(rows):
        item_RC[row, :items] = np.arange(items)
        share_I = weight_RI[row].copy()
        for copy in range(items, copies):
            item = np.argmax(share_I)
            item_RC[row, copy] = item
            rank_RC[row, copy] = count_RI[row, item]
            count_RI[row, item] += 1
            share_I[item] = weight_RI[row, item] / np.float32(count_RI[row, item])
    return item_RC, rank_RC, count_RI


def _hierarchical(weight_LE: Floats, replicas: int, groups: int, nodes: int, devices: int) -> tuple[Ints, Ints, Ints]:
    """Groups to nodes, replicas inside nodes, replicas to devices (N nodes, M experts and Q slots per node)."""
    layers, experts = weight_LE.shape
    size = experts // groups
    node_LU, place_LU = pack(weight_LE.reshape(layers, groups, size).sum(-1), nodes)
    start_LU = (node_LU * (groups // nodes) + place_LU) * size
    log2mid_LE = (start_LU[:, :, None] + np.arange(size)).reshape(layers, experts)
    mid2log_LE = np.argsort(log2mid_LE, axis=1)

    weight_NM = np.take_along_axis(weight_LE, mid2log_LE, 1).reshape(layers * nodes, -1)
    mid_NQ, rank_NQ, count_NM = replicate(weight_NM, replicas // nodes)

    share_NM = np.asarray(weight_NM / count_NM, dtype=np.float32)
    device_NQ, place_NQ = pack(np.take_along_axis(share_NM, mid_NQ, 1), devices // nodes)
    slot2copy_NQ = np.argsort(device_NQ * (replicas // devices) + place_NQ, axis=1)
    mid_LP = np.take_along_axis(mid_NQ, slot2copy_NQ, 1).reshape(layers, nodes, -1)
    mid_LP = (mid_LP + np.arange(nodes)[:, None] * (experts // nodes)).reshape(layers, replicas)

    rank_LP = np.take_along_axis(rank_NQ, slot2copy_NQ, 1).reshape(layers, replicas)
    logcnt_LE = np.take_along_axis(count_NM.reshape(layers, experts), log2mid_LE, 1)
    return np.take_along_axis(mid2log_LE, mid_LP, 1), rank_LP, logcnt_LE


def _check(weight_LE: Floats, replicas: int, groups: int, nodes: int, devices: int) -> None:
    if weight_LE.ndim != 2 or weight_LE.size == 0:
        raise InputError(f"weight has shape {weight_LE.shape}; pass one row of expert loads per MoE layer")
    if not np.isfinite(weight_LE).all() or weight_LE.min() < 0:
        layer, expert = np.argwhere(~(np.isfinite(weight_LE) & (weight_LE >= 0)))[0]
        value = weight_LE[layer, expert]
        raise InputError(f"weight {value} at layer {layer}, expert {expert}; loads are finite and >= 0")
    experts = weight_LE.shape[1]
    if min(groups, nodes, devices) < 1 or replicas < experts:
        raise InputError(
            f"replicas={replicas}, groups={groups}, nodes={nodes}, devices={devices} for {experts} experts; "
            f"pass replicas >= {experts} and positive counts"
        )
    divides = [("replicas", replicas, "devices", devices), ("devices", devices, "nodes", nodes)]
    if groups % nodes == 0:
        divides.append(("experts", experts, "groups", groups))
    for what, total, by, parts in divides:
        if total % parts:
            raise InputError(f"{what}={total} is not a multiple of {by}={parts}; choose counts that divide")


class Eplb:
    """DeepSeek's EPLB, bit for bit: balances loads, packs expert groups into nodes where they divide."""

    name = "eplb"
    solves = "placement"
    capabilities = frozenset({Capability.REPLICATION, Capability.NODES, Capability.LOADS})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """One deterministic pass; seed and time limit do not matter."""
        slots_LP, _, _ = rebalance_experts(problem.load_LE, problem.slots, problem.model.expert_groups, problem.cluster.nodes, problem.cluster.size)
        return Solution(status=Status.FEASIBLE, placement=problem.placement(slots_LP), seed=seed)
