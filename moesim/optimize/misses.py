"""Misses of every cache size, for caches that pin some experts: pure functions of events.

Suffixes: L MoE layers, E experts, G devices, C cache sizes (0 .. E slots).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.replay import Compiled, Events, Policy, miss_curves
from moesim.replay.curves import ONE_PASS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
SIZES = 17  # of caches that are replayed, where one replay does not give all


def hottest(load_LGE: Ints) -> Ints:
    """Experts of each layer and device in the order of their load, most first; of equals the lower id."""
    return np.argsort(-load_LGE, axis=2, kind="stable")


def first(order_LGE: Ints, count_LG: Ints) -> NDArray[np.bool_]:
    """True for the first `count_LG` experts of an order."""
    first_LGE = np.zeros(order_LGE.shape, bool)
    np.put_along_axis(first_LGE, order_LGE, np.arange(order_LGE.shape[2]) < count_LG[:, :, None], axis=2)
    return first_LGE


def exact(policy: str, most: int) -> bool:
    """True where `misses` has every size of its own, not between two others."""
    return policy in ONE_PASS or most < SIZES


def misses(events_G: Sequence[Events], hottest_LGE: Ints, policy: Policy | Compiled, pinned: int, *, most: int, warm: bool = False) -> Floats:
    """miss_LGC with the first `pinned` slots for the first of `hottest_LGE`; warm: first touches fill free slots without a miss.

    Beyond `most` slots nothing changes: no device computes more experts of a layer. Policies that need a replay for each size
    are replayed at `SIZES` of them, with straight lines between.
    """
    experts = hottest_LGE.shape[2]
    sizes = np.arange(most + 1) if exact(policy.name, most) else np.unique(np.linspace(0, most, SIZES).round().astype(np.int64))
    pins_LGE = first(hottest_LGE, np.full(hottest_LGE.shape[:2], pinned))
    found = []
    for g, events in enumerate(events_G):
        rest = events.where(~pins_LGE[events.layer_A, g, events.experts_A]) if pinned else events
        some_LC = miss_curves(rest, policy, slots_C=sizes, warm=warm)
        curve_LC = np.stack([np.interp(np.arange(experts + 1), sizes, some_C) for some_C in some_LC])
        hot_LE = np.take_along_axis(events.load_LE, hottest_LGE[:, g], axis=1)[:, :pinned].cumsum(axis=1)
        few_LC = events.load_LE.sum(axis=1, keepdims=True) - np.pad(hot_LE, ((0, 0), (1, 0)))[:, :pinned]  # slots for some of the pinned
        found.append(np.concatenate([few_LC, curve_LC[:, : experts + 1 - pinned]], axis=1))
    return np.stack(found, axis=1)


def between(events: Events, start: int, stop: int) -> Events:
    """Events of steps start .. stop - 1."""
    a, b = np.searchsorted(events.step_N, (start, stop))
    low, high = events.starts_N[a], events.starts_N[b]
    return Events(
        experts_A=events.experts_A[low:high],
        starts_N=events.starts_N[a : b + 1] - low,
        layer_N=events.layer_N[a:b],
        step_N=events.step_N[a:b],
        layers=events.layers,
        experts=events.experts,
    )
