"""Sizes: one deployment at several numbers of devices, and what going from each to each takes.

A size uses the cluster's first devices. Placements are nested: the largest is given, and each smaller one leaves every expert
where it was and moves those of the devices that leave, so that growing and shrinking move the fewest experts for every pair
(where a limit on load does not ask for more).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost import CostModel
from moesim.errors import InputError, PlanError
from moesim.hardware import Cluster
from moesim.plan import Placement, Resizing, ScalingPlan
from moesim.plan.resize import even_slots, resized
from moesim.serving.changes import Change
from moesim.serving.deployment import Deployment
from moesim.serving.layout import first_devices
from moesim.serving.routing import Routing
from moesim.serving.transitions import ASCEND, ELASTIC, Method, Rates, Transition, transition

BALANCE = 1.1  # load of a device over its share that re-placing experts may leave


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizes:
    """Deployments of C sizes, smallest first; each one's placement is numbered on the devices of the largest."""

    cluster: Cluster
    deployments: tuple[Deployment, ...]
    placements: tuple[Placement, ...]
    method: Method
    rates: Rates
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        largest: Deployment,
        devices: Sequence[int],
        *,
        load_LE: ArrayLike | None = None,
        method: Method = ELASTIC,
        rates: Rates = ASCEND,
        drop: bool = False,
    ) -> Sizes:
        """Sizes of a deployment with one instance; `load_LE` keeps devices within 1.1 times their share of load where possible.

        With `drop`, sizes whose devices cannot hold the model are left out, with a note. Raises InputError for sizes that are not
        rising multiples of `tp` up to the deployment's devices.
        """
        total, counts = largest.cluster.size, [int(count) for count in devices]
        if not counts or sorted(set(counts)) != counts or counts[0] < 1 or counts[-1] > total or any(count % largest.tp for count in counts):
            raise InputError(f"sizes {counts}: give rising numbers of devices, multiples of tp={largest.tp}, at most the {total} of the cluster")
        if largest.replicas != 1 or largest.prefill is not None:
            raise InputError(f"deployment {largest.name!r}: sizes need one instance that computes its own prompts")
        now, notes = largest.experts, []
        placements: list[Placement] = []
        for count in reversed(counts):
            slots_G = even_slots(int(now.slots_G.sum()), range(count), total)
            if not np.array_equal(slots_G > 0, now.slots_G > 0):
                now, note = _fitted(now, slots_G, load_LE)
                notes += [note] if note else []
            placements.append(now)
        placements.reverse()
        kept: list[tuple[Deployment, Placement]] = []
        for count, placement in zip(counts, placements, strict=True):
            cluster = first_devices(largest.cluster, count)
            cost = CostModel.of(cluster, largest.model, transport=largest.cost.transport) if largest.cost else None
            own = placement if count == total else packed(placement)
            deployment = replace(largest, name=f"{largest.name} on {count}", cluster=cluster, placement=own, cost=cost, law=None)
            try:
                _ = deployment.cache_tokens_per_rank
            except InputError:
                if not drop or count == counts[-1]:
                    raise
                notes.append(f"{count} devices cannot hold {largest.model.name}; that size was left out")
                continue
            kept.append((deployment, placement))
        return cls(
            cluster=largest.cluster,
            deployments=tuple(deployment for deployment, _ in kept),
            placements=tuple(placement for _, placement in kept),
            method=method,
            rates=rates,
            notes=tuple(dict.fromkeys(notes)),
        )

    @property
    def devices(self) -> tuple[int, ...]:
        """Devices of each size."""
        return tuple(deployment.cluster.size for deployment in self.deployments)

    def prepared(self, routing: Routing | None, *, seed: int = 0) -> Sizes:
        """The same with every step law made."""
        return replace(self, deployments=tuple(deployment.prepared(routing, seed=seed) for deployment in self.deployments))

    @cached_property
    def transitions(self) -> dict[tuple[int, int], Transition]:
        """What it takes from (devices before) to (devices after)."""
        return {
            (a, b): transition(
                self.deployments[0].model, before, after, self.cluster, method=self.method, tp=self.deployments[0].tp, rates=self.rates
            )
            for a, before in zip(self.devices, self.placements, strict=True)
            for b, after in zip(self.devices, self.placements, strict=True)
            if a != b
        }

    @property
    def resizings(self) -> dict[tuple[int, int], Resizing]:
        """The transitions as a plan keeps them."""
        return {
            pair: Resizing(
                at_s=0.0,
                before=pair[0],
                after=pair[1],
                method=self.method.name,
                seconds=each.seconds,
                pause_s=each.pause_s,
                down_s=each.down_s,
                moved_B=each.moved_B,
                loaded_B=each.loaded_B,
                keeps_cache=each.keeps_cache,
            )
            for pair, each in self.transitions.items()
        }

    def deployment(self, devices: int) -> Deployment:
        """The deployment of a size; InputError when it is none."""
        found = next((each for each in self.deployments if each.cluster.size == devices), None)
        if found is None:
            raise InputError(f"{devices} devices are none of the sizes {list(self.devices)}")
        return found

    def changes(self, plan: ScalingPlan) -> tuple[Change, ...]:
        """The plan's changes as `serve` takes them; a plan starts with the deployment of its first size."""
        return tuple(change for resizing in plan.changes for change in change_of(resizing, self.deployment(resizing.after)))


def halves(devices: int, tp: int) -> list[int]:
    """The cluster's devices, halved as long as whole ranks remain: at most four sizes."""
    found = [devices]
    while len(found) < 4 and found[-1] % 2 == 0 and found[-1] // 2 % tp == 0:
        found.append(found[-1] // 2)
    return found[::-1]


def change_of(resizing: Resizing, to: Deployment) -> tuple[Change, ...]:
    """What `serve` must do for one resizing: hold back intake until the new size takes over, or go down at once, or just go over."""
    kind = "scale-up" if resizing.after > resizing.before else "scale-down"
    ready_s = resizing.at_s + resizing.seconds
    if resizing.down_s:
        return (Change(at_s=resizing.at_s, to=to, down_s=resizing.down_s, restart=not resizing.keeps_cache, kind=kind),)
    over = Change(at_s=ready_s, to=to, keep_cache=resizing.keeps_cache, kind=kind)
    if resizing.pause_s:
        return (Change(at_s=resizing.at_s, pause_s=resizing.pause_s, kind=f"{kind} ordered"), over)
    return (over,)


def packed(placement: Placement) -> Placement:
    """The same without the devices that own no slots."""
    return replace(placement, slots_G=placement.slots_G[placement.slots_G > 0])


def _fitted(now: Placement, slots_G: NDArray[np.int32], load_LE: ArrayLike | None) -> tuple[Placement, str | None]:
    if load_LE is None:
        return resized(now, slots_G), None
    try:
        return resized(now, slots_G, load_LE=load_LE, limit=BALANCE), None
    except PlanError:
        used = int((slots_G > 0).sum())
        return resized(now, slots_G, load_LE=load_LE), f"on {used} devices no placement keeps every device within {BALANCE:g} times its share of load"
