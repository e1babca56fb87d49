"""Greedy balance for devices with unequal numbers of slots: where every search starts.

The rules are EPLB's (double up the expert whose replicas carry most; heaviest replica to the lightest device),
with two additions: devices may own different numbers of slots, and no device holds an expert twice.
E experts, P slots, G devices; device g owns slots `first_G[g] .. first_G[g + 1] - 1`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.jit import compiled

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@compiled
def replica_counts(load_E: Floats, slots: int, most: int) -> Ints:
    """Replicas per expert: one each, then again and again one for the heaviest share, at most `most`. Returns [E]."""
    count_E = np.ones(len(load_E), np.int64)
    share_E = load_E.copy()
    for _ in range(slots - len(load_E)):
        expert = np.argmax(share_E)
        count_E[expert] += 1
        share_E[expert] = load_E[expert] / count_E[expert] if count_E[expert] < most else -1.0
    return count_E


@compiled
def balanced_slots(load_E: Floats, first_G: Ints) -> Ints:
    """Slots [P] of one layer: longest processing time first, never an expert twice on a device.

    Without capacity binding the busiest device carries at most 4/3 - 1/(3G) of the least possible
    (Graham 1969). Needs E <= P and no device with more than E slots. Where only devices that hold an expert
    already are open, its last replica gives way to the heaviest expert that fits there.
    """
    devices, slots = len(first_G) - 1, first_G[-1]
    count_E = replica_counts(load_E, slots, int(np.count_nonzero(np.diff(first_G))))
    share_E = load_E / count_E
    here_GE = np.zeros((devices, len(load_E)), np.bool_)
    used_G = np.zeros(devices, np.int64)
    load_G = np.zeros(devices)
    slots_P = np.empty(slots, np.int64)
    for item in np.argsort(-share_E, kind="mergesort"):
        for _ in range(count_E[item]):
            expert = item
            best = _lightest(load_G, used_G, first_G, here_GE[:, expert])
            if best < 0:
                best = _lightest(load_G, used_G, first_G, np.zeros(devices, np.bool_))
                expert = np.argmax(np.where(here_GE[best], -1.0, share_E))
            slots_P[first_G[best] + used_G[best]] = expert
            here_GE[best, expert] = True
            used_G[best] += 1
            load_G[best] += share_E[expert]
    return slots_P


@compiled
def _lightest(load_G: Floats, used_G: Ints, first_G: Ints, barred_G: NDArray[np.bool_]) -> int:
    best = -1
    for g in range(len(load_G)):
        if used_G[g] < first_G[g + 1] - first_G[g] and not barred_G[g] and (best < 0 or load_G[g] < load_G[best]):
            best = g
    return best
