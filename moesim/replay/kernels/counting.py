"""Policies of counts: LFU, and LFU whose counts fade."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined, specialised
from moesim.replay.kernels.loop import replay_cache
from moesim.replay.kernels.slots import EMPTY, Slots, least_free, new_slots, put, renew, revalue, take

RECENT = 32  # low bits of a worth: the number of the use, so that of equal counts the least recently used goes first


class Counts(NamedTuple):
    """`count_X` uses of each id, kept after eviction; `turn_X` the number of its last use among all.

    `value`: uses, events, period of halving.
    """

    slots: Slots
    count_X: NDArray[np.int64]
    turn_X: NDArray[np.int64]
    value: NDArray[np.int64]


def new_counts(ids: int, capacity: int, period: int = 0) -> Counts:
    """Nothing counted; counts are halved every `period` events (0: never)."""
    return Counts(
        slots=new_slots(ids, capacity),
        count_X=np.zeros(ids, np.int64),
        turn_X=np.zeros(ids, np.int64),
        value=np.asarray([0, 0, period]),
    )


@inlined
def _worth(state: Counts, e: int) -> int:
    worth: int = (state.count_X[e] << RECENT) | state.turn_X[e]
    return worth


@inlined
def _tick(state: Counts, n: int, id_A: NDArray[np.int32], lo: int, hi: int) -> None:
    state.value[1] += 1
    if state.value[2] and state.value[1] % state.value[2] == 0:
        for e in range(len(state.count_X)):
            state.count_X[e] >>= 1
        slots = state.slots
        recent = (1 << RECENT) - 1
        for at in range(len(slots.worth_C)):
            if slots.worth_C[at] != EMPTY:
                slots.worth_C[at] = (slots.worth_C[at] >> (RECENT + 1) << RECENT) | (slots.worth_C[at] & recent)
        for block in range(len(slots.least_B)):
            renew(slots, block)


@inlined
def _use(state: Counts, e: int, a: int, hit: bool) -> None:
    state.count_X[e] += 1
    state.value[0] += 1
    state.turn_X[e] = state.value[0]
    if hit:
        revalue(state.slots, e, _worth(state, e))


@inlined
def _insert(state: Counts, e: int, a: int) -> None:
    put(state.slots, e, _worth(state, e))


@inlined
def _least_used(state: Counts, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    at = least_free(state.slots, stamp_X, floor)
    return take(state.slots, at) if at >= 0 else -1


lfu = specialised(replay_cache, "lfu", {"begin": _tick, "use": _use, "insert": _insert, "victim": _least_used})
