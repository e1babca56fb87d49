"""Another number of devices for a placement, with as few experts moved as possible.

Devices are numbered as in the cluster that holds those before and those after; one that is not in use owns no slots.
Suffixes: L MoE layers, P slots, G devices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import PlanError
from moesim.plan.placement import Placement

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

Counts = NDArray[np.int64]
NODES = 100  # of the integer program of a layer: a count, so that the same input gives the same answer


def on_devices(placement: Placement, devices: Sequence[int], total: int) -> Placement:
    """The placement on the devices of that number, rising, out of `total`; the others own no slots.

    Raises PlanError when the numbers are not one per device, rising and below `total`.
    """
    numbers = np.asarray(devices, np.int64)
    if len(numbers) != placement.devices or (np.diff(numbers) <= 0).any() or (len(numbers) and not 0 <= numbers[0] <= numbers[-1] < total):
        raise PlanError(f"devices {list(devices)} for a placement on {placement.devices}: give one rising number below {total} for each")
    slots_G = np.zeros(total, np.int32)
    slots_G[numbers] = placement.slots_G
    return Placement(slots_LP=placement.slots_LP, slots_G=slots_G, experts=placement.experts, layers=placement.layers, dispatch=placement.dispatch)


def even_slots(slots: int, devices: Sequence[int], total: int) -> NDArray[np.int32]:
    """`slots` over some of `total` devices, as evenly as they divide."""
    if not len(devices):
        raise PlanError(f"{slots} slots over no device; name at least one")
    slots_G = np.zeros(total, np.int32)
    slots_G[np.asarray(devices)] = np.diff(np.arange(len(devices) + 1) * slots // len(devices))
    return slots_G


def resized(placement: Placement, slots_G: ArrayLike, *, load_LE: ArrayLike | None = None, limit: float | None = None) -> Placement:
    """Placement with other slots on the same devices that copies the fewest experts to a device that lacks them.

    Each layer is a transport problem: x[e, g] = 1 where device g gets expert e,

        min sum x[e, g] * (g lacks e)   so that   sum_g x[e, g] = replicas of e,   sum_e x[e, g] = slots of g

    Its polytope has whole corners, so HiGHS finds the optimum at the first node. With `limit`, no device may be given more than
    `limit` times its slots' share of `load_LE` (replicas share their expert's load evenly). Where the optimum breaks that limit, an
    integer program keeps it; its search ends after `NODES` nodes, and then the moves are the fewest found, not proved the fewest.
    Replicas stay as they are where the slots allow; more go to the heaviest load per replica, fewer come from the lightest.
    Raises PlanError when no such placement exists.
    """
    wanted_G = np.asarray(slots_G, np.int64)
    if wanted_G.shape != (placement.devices,) or (wanted_G < 0).any():
        raise PlanError(f"slots {wanted_G.tolist()} for {placement.devices} devices; give one number >= 0 for each")
    if (wanted_G > placement.experts).any():
        g = int(wanted_G.argmax())
        raise PlanError(f"device {g} would have {wanted_G[g]} slots for {placement.experts} experts; a device holds an expert once")
    layers = len(placement.layers)
    load = np.ones((layers, placement.experts)) if load_LE is None else np.asarray(load_LE, np.float64)
    if load.shape != (layers, placement.experts) or not np.isfinite(load).all() or (load < 0).any():
        raise PlanError(f"load {load.shape}: expected finite numbers >= 0 of {layers} layers x {placement.experts} experts")
    used = np.flatnonzero(wanted_G)
    rows = []
    for row in range(layers):
        count_E = replicas(placement.replicas_LE[row], load[row], int(wanted_G.sum()), len(used))
        home_EG = _homes(placement.holds_LGE[row][used].T, count_E, wanted_G[used])
        if home_EG is not None and limit is not None:
            share_E, most_G = load[row] / count_E, limit * load[row].sum() * wanted_G[used] / wanted_G.sum()
            if (share_E @ home_EG > most_G * (1 + 1e-12)).any():
                home_EG = _limited(placement.holds_LGE[row][used].T, count_E, wanted_G[used], share_E, most_G)
        if home_EG is None:
            bound = "" if limit is None else f" within {limit:g} times the even load; raise the limit"
            raise PlanError(f"layer {placement.layers[row]}: no placement on {len(used)} devices with {wanted_G[used].tolist()} slots{bound}")
        rows.append(np.nonzero(home_EG.T)[1])
    return Placement(
        slots_LP=np.asarray(rows, np.int32),
        slots_G=wanted_G.astype(np.int32),
        experts=placement.experts,
        layers=placement.layers,
        dispatch=placement.dispatch,
    )


def replicas(count_E: NDArray[np.integer], load_E: NDArray[np.float64], slots: int, devices: int) -> Counts:
    """Replicas of each expert that fill `slots`, at least one and at most one per device, changed as little as possible."""
    if slots < len(count_E) or slots > len(count_E) * devices:
        raise PlanError(f"{slots} slots on {devices} devices cannot hold {len(count_E)} experts, each once or on several devices")
    count = np.minimum(count_E, devices).astype(np.int64)
    while (missing := slots - int(count.sum())) != 0:
        share = load_E / count
        if missing > 0:
            count[int(np.argmax(np.where(count < devices, share, -1.0)))] += 1
        else:
            count[int(np.argmin(np.where(count > 1, share, np.inf)))] -= 1
    return np.asarray(count)


def _homes(held_EG: NDArray[np.bool_], count_E: Counts, slots_G: Counts) -> NDArray[np.bool_] | None:
    return _solved(held_EG, _rules(count_E, slots_G), np.zeros(held_EG.size, np.int8))


def _limited(
    held_EG: NDArray[np.bool_], count_E: Counts, slots_G: Counts, share_E: NDArray[np.float64], most_G: NDArray[np.float64]
) -> NDArray[np.bool_] | None:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array, eye_array, kron

    lightest = np.concatenate([[0.0], np.cumsum(np.sort(share_E))])
    if share_E.max() + lightest[np.maximum(slots_G - 1, 0)].min() > most_G.max():
        return None  # the heaviest expert alone, with the lightest for company, is too much anywhere
    of_device = kron(share_E[None], eye_array(len(slots_G)), format="csr")
    rules = [*_rules(count_E, slots_G), LinearConstraint(csr_array(of_device), -np.inf, most_G)]
    return _solved(held_EG, rules, np.ones(held_EG.size, np.int8))


def _rules(count_E: Counts, slots_G: Counts) -> list[LinearConstraint]:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import eye_array, kron

    of_expert = kron(eye_array(len(count_E)), np.ones((1, len(slots_G))), format="csr")
    of_device = kron(np.ones((1, len(count_E))), eye_array(len(slots_G)), format="csr")
    return [LinearConstraint(of_expert, count_E, count_E), LinearConstraint(of_device, slots_G, slots_G)]


def _solved(held_EG: NDArray[np.bool_], rules: list[LinearConstraint], whole: NDArray[np.int8]) -> NDArray[np.bool_] | None:
    from scipy.optimize import Bounds, milp

    found = milp((~held_EG).ravel().astype(np.float64), constraints=rules, integrality=whole, bounds=Bounds(0, 1), options={"node_limit": NODES})
    return None if found.x is None else np.asarray(found.x.reshape(held_EG.shape) > 0.5)
