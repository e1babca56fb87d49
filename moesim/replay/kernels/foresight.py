"""Policies that know the future: Belady's rule on events, and the same when an expert may be used without being kept."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import compiled, inlined, specialised
from moesim.replay.kernels.loop import Feed, replay_cache
from moesim.replay.kernels.slots import Slots, least, least_free, new_slots, put, revalue, take

NEVER = np.iinfo(np.int64).max >> 1


class Future(NamedTuple):
    """Slots by minus the next event; `next_X` the next event of every id, `next_A` the one after each access."""

    slots: Slots
    next_X: NDArray[np.int64]
    next_A: NDArray[np.int64]


def new_future(feed: Feed, ids: int, capacity: int) -> Future:
    """Knows all events of `feed`."""
    future = Future(slots=new_slots(ids, capacity), next_X=np.full(ids, NEVER), next_A=np.empty(len(feed.id_A), np.int64))
    next_uses(feed.id_A, feed.starts_N, feed.event_M, future.next_X, future.next_A)
    return future


@compiled
def next_uses(
    id_A: NDArray[np.int32], starts_N: NDArray[np.int64], event_M: NDArray[np.int64], next_X: NDArray[np.int64], next_A: NDArray[np.int64]
) -> None:
    """Fill `next_A` with the next event of each access's id, going backward from `next_X`, which ends as the first."""
    for m in range(len(event_M) - 1, -1, -1):
        n = event_M[m]
        for a in range(starts_N[n], starts_N[n + 1]):
            e = id_A[a]
            next_A[a] = next_X[e]
            next_X[e] = n


@inlined
def _look_ahead(state: Future, e: int, a: int, hit: bool) -> None:
    state.next_X[e] = state.next_A[a]
    if hit:
        revalue(state.slots, e, -state.next_A[a])


@inlined
def _insert(state: Future, e: int, a: int) -> None:
    put(state.slots, e, -state.next_X[e])


@inlined
def _farthest_of_all(state: Future, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    at = least(state.slots)
    if at < 0 or state.slots.worth_C[at] >= -state.next_X[e]:
        return -1
    return take(state.slots, at)


@inlined
def _farthest(state: Future, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    at = least_free(state.slots, stamp_X, floor)
    if at < 0:  # the event exceeds the cache: after use, the members needed soonest stay
        return _farthest_of_all(state, stamp_X, floor, e)
    return take(state.slots, at)


@inlined
def _distance(state: Future, e: int) -> int:
    distance: int = state.next_X[e]
    return distance


_HOOKS = {"use": _look_ahead, "insert": _insert, "rank": _distance, "FORESIGHT": True, "PROTECTS": False}
belady = specialised(replay_cache, "belady", {**_HOOKS, "victim": _farthest})
optimal = specialised(replay_cache, "optimal", {**_HOOKS, "victim": _farthest_of_all})
