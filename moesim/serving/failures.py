"""A device dies: which experts are lost, who serves them meanwhile, and what bringing them back takes.

A data-parallel rank dies with any of its devices. Where every expert has a replica elsewhere, service goes on as soon as the
survivors have formed a new group; else it waits until what is lost is read again from disk. Suffixes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError
from moesim.plan import Placement
from moesim.plan.resize import even_slots, on_devices, resized
from moesim.serving.changes import Change
from moesim.serving.deployment import Deployment
from moesim.serving.layout import first_devices
from moesim.serving.sizes import packed
from moesim.serving.transitions import ASCEND, ELASTIC, Rates, Transition, transition


@dataclass(frozen=True, kw_only=True, eq=False)
class Damage:
    """What dies with some devices.

    lost_LE         experts no surviving device holds
    lost_share      share of selections that chose one of them
    busiest         load of the busiest survivor over that of the busiest device before, what is lost left out
    """

    dead: tuple[int, ...]
    lost_LE: NDArray[np.bool_]
    lost_share: float
    busiest: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "dead_devices": list(self.dead),
            "experts_lost": int(self.lost_LE.sum()),
            "share_of_selections_lost": self.lost_share,
            "busiest_survivor_load": self.busiest,
        }


def damage(placement: Placement, dead: Sequence[int], load_LE: ArrayLike | None = None) -> Damage:
    """Experts and load that die with these devices; load counts replicas of an expert evenly (None: all experts alike).

    Raises InputError when a number is no device of the placement or none survives.
    """
    numbers = sorted(set(dead))
    if not numbers or numbers[0] < 0 or numbers[-1] >= placement.devices or len(numbers) >= placement.devices:
        raise InputError(f"dead devices {list(dead)}: name some of the {placement.devices}, and leave one alive")
    load = np.ones(placement.replicas_LE.shape) if load_LE is None else np.asarray(load_LE, np.float64)
    alive_G = ~np.isin(np.arange(placement.devices), numbers)
    left_LE = placement.holds_LGE[:, alive_G].sum(axis=1)
    before_LG = (placement.holds_LGE * (load / placement.holds_LGE.sum(axis=1))[:, None]).sum(axis=2)
    after_LG = (placement.holds_LGE[:, alive_G] * np.divide(load, left_LE, out=np.zeros_like(load), where=left_LE > 0)[:, None]).sum(axis=2)
    lost_LE = left_LE == 0
    busy = float(before_LG.max(axis=1).sum())
    return Damage(
        dead=tuple(numbers),
        lost_LE=lost_LE,
        lost_share=float(load[lost_LE].sum() / load.sum()) if load.sum() else 0.0,
        busiest=float(after_LG.max(axis=1).sum()) / busy if busy else 1.0,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Recovery:
    """After a failure: the damage, the work until service goes on, and the deployment that goes on."""

    damage: Damage
    transition: Transition
    deployment: Deployment

    def change(self, at_s: float, rank: int) -> Change:
        """What `serve` must do when that rank of the deployment before dies at that time."""
        return Change(at_s=at_s, to=self.deployment, down_s=self.transition.seconds, lost=(rank,), kind="failure")


def recovery(deployment: Deployment, device: int, *, load_LE: ArrayLike | None = None, rates: Rates = ASCEND) -> Recovery:
    """What happens when a device of a deployment with one instance dies, its whole rank with it.

    Survivors keep what they hold. Experts nobody holds are read from disk into slots the survivors add, as evenly as they
    divide. The survivors are taken as the cluster's first devices. Raises InputError when no rank survives.
    """
    cluster, tp = deployment.cluster, deployment.tp
    if deployment.replicas != 1 or not 0 <= device < cluster.size or cluster.size <= tp:
        raise InputError(
            f"device {device} of deployment {deployment.name!r} ({deployment.replicas} x {cluster.size} devices, ranks of {tp}): "
            "name a device of a single instance with another rank"
        )
    before, rank = deployment.experts, device // tp
    dead = range(rank * tp, rank * tp + tp)
    alive = [g for g in range(cluster.size) if g not in dead]
    found = damage(before, dead, load_LE)
    if found.lost_LE.any():
        after = resized(before, even_slots(max(before.experts, int(before.slots_G[alive].sum())), alive, cluster.size), load_LE=load_LE)
    else:
        own_P = np.isin(before.device_P, alive)
        survivors = replace(before, slots_LP=before.slots_LP[:, own_P], slots_G=before.slots_G[alive])
        after = on_devices(survivors, alive, cluster.size)
    work = transition(deployment.model, before, after, cluster, method=ELASTIC, tp=tp, dead=dead, rates=rates)
    left = replace(
        deployment,
        name=f"{deployment.name} without rank {rank}",
        cluster=first_devices(cluster, len(alive)),
        placement=packed(after),
        cost=None,
        law=None,
    )
    return Recovery(damage=found, transition=work, deployment=left)
