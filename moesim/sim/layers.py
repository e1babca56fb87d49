"""Stage times of every step and layer under a system, and the pipeline degree and transport it chooses there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel, LayerTimes
from moesim.cost.attention import roofline_s
from moesim.cost.collectives import AllToAllTime, LinearPort, all_to_all_time
from moesim.cost.fitted import device_ports
from moesim.cost.transport import pick_transport
from moesim.errors import InputError
from moesim.systems.mechanisms import Exchange, Schedule
from moesim.systems.pipelining import Stage, pipeline_span
from moesim.systems.routing import Routed, member_copies
from moesim.systems.slicing import cut

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """An exchange of one of r parts: the whole, and its time inside nodes and between them (seconds)."""

    whole_SL: Floats
    link_SL: Floats
    nic_SL: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Forward or backward pass of the MoE layers: times of one of `degree_SL` equal parts, as the system chose.

    transport_SL indexes the transports of the exchange, port_SL is the busiest port of the first exchange (`PORTS`);
    moe_SL is the pipeline's span, without what surrounds it.
    """

    degree_SL: NDArray[np.int64]
    transport_SL: NDArray[np.int64]
    port_SL: NDArray[np.int64]
    there: Crossing
    back: Crossing
    compute_SLG: Floats
    moe_SL: Floats
    outside: int  # computations and exchanges outside the calibrated range


def variants(cost: CostModel, exchange: Exchange) -> list[CostModel]:
    """The cost model under each transport of an exchange, with the ports of that transport's library.

    Raises InputError where a transport does not fit the cluster.
    """
    found = []
    for name in exchange.transports:
        way = cost.way if name is None else pick_transport(name, cost.cluster)
        ports, notes = (cost.ports, []) if way.library == cost.way.library else device_ports(cost.cluster, way.library)
        found.append(replace(cost, transport=way.name, ports=ports, notes=(*cost.notes, *notes)))
    return found


def passes(costs: list[CostModel], routed: Routed, exchange: Exchange, schedule: Schedule, degrees: tuple[int, ...], *, backward: bool) -> Pass:
    """Stage times with the transport and degree of least span in every step and layer; ties go to the first.

    `costs` are the variants of the exchange. The backward pass computes twice the forward's and runs the exchanges the
    other way round.
    """
    found: list[Pass] = []
    computed = {r: _computed(costs[0], routed, parts=r) for r in degrees}
    for (index, cost), r in product(enumerate(costs), degrees):
        there, back = (_crossing(cost, routed, exchange.bytes_scale / r, back=way) for way in (backward, not backward))
        compute = computed[r][0] * (2 if backward else 1)
        outside = int(computed[r][1].any(axis=2).sum()) + int(there.extrapolated_N.sum())
        found.append(
            Pass(
                degree_SL=np.full(there.time_s_N.shape, r),
                transport_SL=np.full(there.time_s_N.shape, index),
                port_SL=there.port_N,
                there=Crossing(whole_SL=there.time_s_N, link_SL=there.link_s_N, nic_SL=there.nic_s_N),
                back=Crossing(whole_SL=back.time_s_N, link_SL=back.link_s_N, nic_SL=back.nic_s_N),
                compute_SLG=compute,
                moe_SL=pipeline_span(_stages(there, compute, back, tiers_apart=schedule.tiers_apart), r),
                outside=outside,
            )
        )
    return found[0] if len(found) == 1 else _fastest(found)


def _computed(cost: CostModel, routed: Routed, *, parts: int) -> tuple[Floats, NDArray[np.bool_]]:
    """compute_SLG and extrapolated_SLG of one of `parts` equal parts."""
    traffic = routed.traffic
    arriving_SLG = traffic.copies_SLGG.sum(axis=2) * (routed.slices / parts)
    return cut(cost, routed.slices).expert_times(traffic.slot_tokens_SLP / parts, arriving_SLG, routed.placement.slots_G)


def _crossing(cost: CostModel, routed: Routed, scale: float, *, back: bool) -> AllToAllTime:
    """Time of the dispatch or the combine with `scale` times its bytes; either direction loads the same ports."""
    copies, size_B = routed.copies(cost, back=back), (cost.combine_B if back else cost.dispatch_B) * scale
    between = cost.exchange(copies.pairs_SLGG, copies.nodes_SLGN, size_B)
    if routed.slices == 1:
        return between
    inside = all_to_all_time(member_copies(copies.pairs_SLGG, routed.slices) * size_B, cost.cluster.node_G, cost.ports)
    return replace(
        between,
        time_s_N=between.time_s_N + inside.time_s_N,
        link_s_N=between.link_s_N + inside.time_s_N,
        extrapolated_N=between.extrapolated_N | inside.extrapolated_N,
    )


def layer_times(cost: CostModel, routed: Routed) -> LayerTimes:
    """`CostModel.layer_times`, of experts that may be cut in slices."""
    if routed.slices == 1:
        return cost.layer_times(routed.traffic, routed.placement)
    compute, outside = _computed(cost, routed, parts=1)
    dispatch, combine = (_crossing(cost, routed, 1.0, back=back) for back in (False, True))
    return LayerTimes(dispatch=dispatch, combine=combine, compute_s_SLG=compute, extrapolated_SLG=outside)


def sent_LGG(pairs_SLGG: Floats, slices: int) -> Floats:
    """Copies that leave their device in all steps, those that members of a group pass on among them."""
    pairs_LGG = pairs_SLGG.sum(axis=0)
    leaving: Floats = pairs_LGG * ~np.eye(pairs_LGG.shape[2], dtype=bool)
    return leaving + member_copies(pairs_LGG, slices) if slices > 1 else leaving


def _stages(there: AllToAllTime, compute_SLG: Floats, back: AllToAllTime, *, tiers_apart: bool) -> list[Stage]:
    experts = Stage(stream="compute", time_s=compute_SLG)
    if not tiers_apart:
        return [Stage(stream="exchange", time_s=there.time_s_N), experts, Stage(stream="exchange", time_s=back.time_s_N)]
    return [
        Stage(stream="inter", time_s=there.nic_s_N),
        Stage(stream="intra", time_s=there.link_s_N),
        experts,
        Stage(stream="intra", time_s=back.link_s_N),
        Stage(stream="inter", time_s=back.nic_s_N),
    ]


def _fastest(found: list[Pass]) -> Pass:
    """The pass of least span in every step and layer; the first of equals."""
    best_SL = np.argmin(np.stack([each.moe_SL for each in found]), axis=0)

    def pick(arrays: list[NDArray[Any]]) -> NDArray[Any]:
        stacked = np.stack(arrays)
        return np.asarray(np.take_along_axis(stacked, best_SL.reshape(1, *best_SL.shape, *(1,) * (stacked.ndim - 3)), axis=0)[0])

    def cross(parts: list[Crossing]) -> Crossing:
        return Crossing(whole_SL=pick([c.whole_SL for c in parts]), link_SL=pick([c.link_SL for c in parts]), nic_SL=pick([c.nic_SL for c in parts]))

    return Pass(
        degree_SL=pick([p.degree_SL for p in found]),
        transport_SL=pick([p.transport_SL for p in found]),
        port_SL=pick([p.port_SL for p in found]),
        there=cross([p.there for p in found]),
        back=cross([p.back for p in found]),
        compute_SLG=pick([p.compute_SLG for p in found]),
        moe_SL=pick([p.moe_SL for p in found]),
        outside=min(p.outside for p in found),
    )


def without_oversubscription(cost: CostModel) -> CostModel:
    """The cost model with every NIC at its full speed, for engines that model the spine as links of its own."""
    nic, share = cost.ports.nic, cost.cluster.oversubscription
    if nic is None or share == 1:
        return cost
    if not isinstance(nic, LinearPort):
        raise InputError(
            f"contention on {cost.cluster.name!r}: its NIC is no linear port, so the spine's share cannot be taken out; run without contention"
        )
    return replace(cost, ports=replace(cost.ports, nic=replace(nic, bandwidth_Bps=nic.bandwidth_Bps * share)))


def encode_s(cost: CostModel, tokens: float, exchange: Exchange) -> list[float]:
    """Seconds a device spends on its tokens before an exchange, and again after it: projection and masks, per device; 0 without.

    Masks are [tokens, rows] with room for factor * top_k * tokens rows, whole ones for every expert; their product with the
    hidden states is dense. Source: GShard (arXiv 2006.16668), algorithm 2; facebookresearch/fairseq@26d62ae moe_layer.py.
    """
    hidden, experts = cost.model.hidden, cost.model.experts
    width = exchange.project * hidden
    rows = experts * math.ceil(exchange.masks * cost.model.top_k * tokens / experts)
    flops = 2 * tokens * hidden * (width + rows)
    moved_B = hidden * width * cost.model.weight_bits / 8 + (tokens + hidden) * rows * cost.model.activation_bits / 8
    return [float(roofline_s(flops, moved_B, cost.peaks[device.name])) for device in cost.cluster.devices]
