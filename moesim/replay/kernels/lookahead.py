"""A policy that knows the next events and no more: Belady's rule inside a window, LRU beyond it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined, specialised
from moesim.replay.kernels.foresight import NEVER, next_uses
from moesim.replay.kernels.loop import Feed, replay_cache
from moesim.replay.kernels.slots import EMPTY, Slots, least, least_free, new_slots, put, revalue, take

FAR = NEVER >> 1  # an expert without use in the window is worth its last use minus this: less than any with one


class Ahead(NamedTuple):
    """Slots by worth, `worth_X` that of every id; `at` = (this event, events seen so far, window) of this cache.

    `next_A` as `foresight.Future`; `id_A`, `starts_N`, `event_M` as `Feed`.
    """

    slots: Slots
    worth_X: NDArray[np.int64]
    next_A: NDArray[np.int64]
    id_A: NDArray[np.int32]
    starts_N: NDArray[np.int64]
    event_M: NDArray[np.int64]
    at: NDArray[np.int64]


def new_ahead(feed: Feed, ids: int, capacity: int, window: int) -> Ahead:
    """Sees `window` events of `feed` beyond the current one."""
    next_A = np.empty(len(feed.id_A), np.int64)
    next_uses(feed.id_A, feed.starts_N, feed.event_M, np.full(ids, NEVER), next_A)
    return Ahead(
        slots=new_slots(ids, capacity),
        worth_X=np.full(ids, -NEVER),
        next_A=next_A,
        id_A=feed.id_A,
        starts_N=feed.starts_N,
        event_M=feed.event_M,
        at=np.asarray([-1, 0, window]),
    )


@inlined
def _see(state: Ahead, n: int, id_A: NDArray[np.int32], lo: int, hi: int) -> None:
    state.at[0] += 1
    last = min(state.at[0] + state.at[2], len(state.event_M) - 1)
    while state.at[1] <= last:  # each event comes into sight once
        seen = state.event_M[state.at[1]]
        for a in range(state.starts_N[seen], state.starts_N[seen + 1]):
            e = state.id_A[a]
            if state.worth_X[e] < -FAR >> 1:  # else an earlier use is in sight
                state.worth_X[e] = -seen
                at = state.slots.slot_X[e]
                if at >= 0 and state.slots.id_C[at] == e and state.slots.worth_C[at] != EMPTY:
                    revalue(state.slots, e, -seen)
        state.at[1] += 1


@inlined
def _use(state: Ahead, e: int, a: int, hit: bool) -> None:
    upcoming = state.next_A[a]
    in_sight = upcoming <= state.event_M[state.at[1] - 1]
    state.worth_X[e] = -upcoming if in_sight else state.at[0] - FAR
    if hit:
        revalue(state.slots, e, state.worth_X[e])


@inlined
def _insert(state: Ahead, e: int, a: int) -> None:
    put(state.slots, e, state.worth_X[e])


@inlined
def _least_worth(state: Ahead, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    at = least_free(state.slots, stamp_X, floor)
    if at < 0:  # the event exceeds the cache: after use, the members worth most stay
        at = least(state.slots)
        if at < 0 or state.slots.worth_C[at] >= state.worth_X[e]:
            return -1
    return take(state.slots, at)


@inlined
def _rank(state: Ahead, e: int) -> int:
    rank: int = -state.worth_X[e]
    return rank


lookahead = specialised(
    replay_cache,
    "lookahead",
    {"begin": _see, "use": _use, "insert": _insert, "rank": _rank, "victim": _least_worth, "FORESIGHT": True, "PROTECTS": False},
)
