"""Tensor-sliced experts: the matrices of every expert are cut over the devices of a group, and what that does to the dispatch.

    drop → all-to-all → all-gather → experts/slices → reduce-scatter → all-to-all

A token goes to the *group* of its expert. The source sends each member an equal part of the hidden state, so that one copy
crosses the network whatever the number of slices; members exchange their parts over the links of the node, compute with
their columns and rows of the matrices, add up their partial results the way the parts came, and send their part back.
Source: deepspeedai/DeepSpeed#5626 ("drop -> alltoall -> allgather -> exe MOE -> drop -> alltoall"); Megatron-LM's expert tensor
parallelism moves the same bytes. Suffixes as in moesim.cost.traffic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel, Traffic, route
from moesim.errors import InputError, PlanError
from moesim.plan import Placement
from moesim.systems.routing import Plain, Routed, Router

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sliced:
    """Experts are cut over groups of `slices` consecutive devices of a node; each member holds its part of all experts of the group.

    With fewer experts than devices, members may own no slot of the plan. Replicas are chosen by the rules even, least-loaded and
    lp: whether one is near is a question about devices, and slices of all are on all members (PlanError otherwise).
    """

    slices: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.slices, int) or self.slices < 1:
            raise InputError(f"slices={self.slices!r}: give the whole number of devices an expert is cut over, >= 1")

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`."""
        plain = Plain().router(placement, node_G, gatherable=gatherable, selections=selections)
        if self.slices == 1:
            return plain
        group_G = groups(node_G, self.slices)
        if (placement.replicas_LE > 1).any() and placement.dispatch in ("nearest", "static-source"):
            raise PlanError(f"sliced experts with replicas chosen by {placement.dispatch!r}: plan without replicas, or with dispatch even")
        wider, slot_P = _wider(placement, self.slices)

        def run(experts_TLK: NDArray[np.uint16], ends_S: NDArray[np.integer], tokens_per_step: float) -> Routed:
            routed = plain(experts_TLK, ends_S, tokens_per_step)
            traffic = routed.traffic
            to_group = route(experts_TLK, placement, group_G, ends_S=ends_S, tokens_per_step=tokens_per_step).node_copies_SLGN
            chosen = traffic.selections_SLGG
            sliced = Traffic(
                slot_tokens_SLP=traffic.slot_tokens_SLP[..., slot_P],
                copies_SLGG=to_group[..., group_G] / self.slices,
                node_copies_SLGN=traffic.node_copies_SLGN,
                tokens_SG=traffic.tokens_SG,
                selections_SLGG=None if chosen is None else _summed(chosen, self.slices)[..., group_G] / self.slices,
            )
            return replace(routed, traffic=sliced, placement=wider, slices=self.slices)

        return run


def groups(node_G: NDArray[np.integer], slices: int) -> NDArray[np.int32]:
    """Group of each device: runs of `slices` devices. InputError where one would span nodes or be short."""
    node_G = np.asarray(node_G)
    if len(node_G) % slices or (node_G.reshape(-1, slices) != node_G[::slices, None]).any():
        sizes = np.unique(node_G, return_counts=True)[1].tolist()
        raise InputError(f"slices={slices}: nodes have {sizes} devices, and a group must lie inside one; take a divisor of all")
    return (np.arange(len(node_G)) // slices).astype(np.int32)


def held_G(placement: Placement, node_G: NDArray[np.integer], slices: int) -> Floats:
    """Whole experts' worth of slots of each layer that each device holds: members of a group hold as much each."""
    group_G = groups(node_G, slices)
    return np.asarray(np.bincount(group_G, weights=placement.slots_G)[group_G] / slices)


def cut(cost: CostModel, slices: int) -> CostModel:
    """The cost model of a device that computes 1/slices of every expert's width."""
    width = cost.model.intermediate
    if width % slices:
        raise InputError(f"slices={slices}: the experts of {cost.model.name!r} are {width} wide; take a divisor of it")
    return replace(cost, model=replace(cost.model, intermediate=width // slices)) if slices > 1 else cost


def _summed(values: Floats, slices: int) -> Floats:
    """Sums over the devices of each group, the last axis."""
    return np.asarray(values.reshape(*values.shape[:-1], -1, slices).sum(axis=-1))


def _wider(placement: Placement, slices: int) -> tuple[Placement, NDArray[np.int64]]:
    """The placement in which every member of a group has the slots of all, and the slot each stands for."""
    ends = np.cumsum(placement.slots_G).reshape(-1, slices)[:, -1]
    of_group = np.split(np.arange(placement.slots_LP.shape[1]), ends[:-1])
    slot_P = np.concatenate([slots for slots in of_group for _ in range(slices)])
    sizes = np.repeat([len(slots) for slots in of_group], slices).astype(np.int32)
    return replace(placement, slots_LP=placement.slots_LP[:, slot_P], slots_G=sizes), slot_P
