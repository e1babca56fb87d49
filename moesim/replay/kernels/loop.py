"""The event loop of one cache, with the hooks of one policy in it.

X ids a cache can hold, A accesses, N events, M events of this cache, F prefetches. What a policy knows is its `state`.

One event: prefetched experts enter; every member is looked up; the policy hears of all; what is missing is loaded, each
over a victim that is no member. Sizes are whole numbers: 1 each when capacity counts slots, bytes otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import borrowed, inlined
from moesim.replay.outcome import EVICT, LOAD, PREFETCH, STREAM

#: Fields of `Cache.tally`.
CLOCK, USED, KNOWN, INSERTED, EVICTED, STREAMED, FETCHED, DROPPED, WASTED, COLLIDED, LOADED_B, FETCHED_B, WASTED_B, LOGGED = range(14)
TALLIES = 14
#: Values of `Cache.resident_X`.
ABSENT, CACHED, PINNED = range(3)


class Feed(NamedTuple):
    """What a cache is asked for: `event_M` are those of the N events that concern it; event n prefetches `fetch_F[fetch_N[n]:fetch_N[n+1]]`."""

    id_A: NDArray[np.int32]
    starts_N: NDArray[np.int64]
    layer_N: NDArray[np.int32]
    step_N: NDArray[np.int32]
    event_M: NDArray[np.int64]
    fetch_F: NDArray[np.int32]
    fetch_N: NDArray[np.int64]


class Cache(NamedTuple):
    """State that every policy has.

    `stamp_X` >= floor names the experts that may not be evicted now; `unused_X` was prefetched and not used since;
    `gone_X` the step of the last eviction; `todo_X` is scratch.
    """

    resident_X: NDArray[np.uint8]
    stamp_X: NDArray[np.int64]
    size_X: NDArray[np.int64]
    seen_X: NDArray[np.bool_]
    unused_X: NDArray[np.bool_]
    gone_X: NDArray[np.int64]
    todo_X: NDArray[np.int64]
    tally: NDArray[np.int64]


def new_cache(size_X: NDArray[np.int64], pinned_X: NDArray[np.bool_]) -> Cache:
    """An empty cache but for the pinned experts, which count neither as used space nor as capacity."""
    return Cache(
        resident_X=np.where(pinned_X, PINNED, ABSENT).astype(np.uint8),
        stamp_X=np.full(len(size_X), -1, np.int64),
        size_X=size_X,
        seen_X=np.zeros(len(size_X), np.bool_),
        unused_X=np.zeros(len(size_X), np.bool_),
        gone_X=np.full(len(size_X), np.iinfo(np.int64).min),
        todo_X=np.zeros(len(size_X), np.int64),
        tally=np.zeros(TALLIES, np.int64),
    )


# Hooks of a policy: each copy of the loop (`moesim.jit.specialised`) has its own in place of these.
FORESIGHT = False  # knows the future: `rank` orders what exceeds the cache
SETTLES = False  # hears of members when all are loaded, so that they are ordered by id, hit or not
PROTECTS = True  # never drops a member of the event; for a prefetch nobody does


@inlined
def begin(state: Any, n: int, id_A: NDArray[np.int32], lo: int, hi: int) -> None:
    """An event begins."""


@inlined
def use(state: Any, e: int, a: int, hit: bool) -> None:
    """A member was looked up; missing ones and those streamed later are heard of too."""


@inlined
def insert(state: Any, e: int, a: int) -> None:
    """`e` is now cached; a = -1 when by prefetch."""


@inlined
def victim(state: Any, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    """Take an expert with stamp < floor out of the state to make room for `e`; -1: rather not keep `e`."""
    return -1


@inlined
def settle(state: Any, e: int) -> None:
    """SETTLES only: each cached member of an event in order, when all is loaded (not one that came alone)."""


@inlined
def rank(state: Any, e: int) -> int:
    """FORESIGHT only: the smaller, the more worth keeping."""
    return 0


@inlined
def note(log_M3: NDArray[np.int64], row: int, n: int, e: int, action: int) -> None:
    """Write one row of the log."""
    log_M3[row, 0], log_M3[row, 1], log_M3[row, 2] = n, e, action


def replay_cache(
    feed: Feed, cache: Cache, state: Any, capacity: int, warm: bool, hit_A: NDArray[np.bool_], early_A: NDArray[np.bool_], log_M3: NDArray[np.int64]
) -> None:
    """Replay the cache's events. Writes `hit_A` (also true for a warm first touch) and `early_A` (hit because prefetched).

    `log_M3` (event, id, action) is filled when it has rows; its caller gives it enough.
    """
    state = borrowed(state)
    id_A, starts_N, _, step_N, event_M, fetch_F, fetch_N = feed
    resident_X, stamp_X, size_X, seen_X, unused_X, gone_X, todo_X, tally = cache
    clock, used, known, logged = tally[CLOCK], tally[USED], tally[KNOWN], tally[LOGGED]
    prefetching, logging = len(fetch_F) > 0, len(log_M3) > 0
    for m in range(len(event_M)):
        n = event_M[m]
        lo, hi = starts_N[n], starts_N[n + 1]
        clock += 1
        floor = 2 * clock + 1  # stamp of members; what is only predicted has one less
        begin(state, n, id_A, lo, hi)
        for a in range(lo, hi):
            stamp_X[id_A[a]] = floor
        for demand in range(0 if prefetching else 1, 2):
            held, wanted, todo = 0, 0, 0  # sizes of what must stay and of what must come; ids to load
            if demand:
                for a in range(lo, hi):
                    e = id_A[a]
                    there = resident_X[e]
                    use(state, e, a, there == CACHED)
                    if there != ABSENT:
                        hit_A[a] = True
                        if there == CACHED:
                            held += size_X[e]
                        if unused_X[e]:
                            unused_X[e] = False
                            early_A[a] = True
                    else:
                        if warm and not seen_X[e] and known + size_X[e] <= capacity:
                            hit_A[a] = True
                        if gone_X[e] == step_N[n]:
                            tally[COLLIDED] += 1
                        wanted += size_X[e]
                        todo_X[todo] = a
                        todo += 1
                    if not seen_X[e]:
                        seen_X[e] = True
                        known += size_X[e]
                tally[LOADED_B] += wanted
            else:
                for a in range(lo, hi):
                    if resident_X[id_A[a]] == CACHED:
                        held += size_X[id_A[a]]
                for f in range(fetch_N[n], fetch_N[n + 1]):
                    e = fetch_F[f]
                    if stamp_X[e] < floor - 1:
                        stamp_X[e] = floor - 1
                        if resident_X[e] == CACHED:
                            held += size_X[e]
                    if resident_X[e] == ABSENT:
                        todo_X[todo] = f
                        todo += 1
            if FORESIGHT and demand and held + wanted > capacity:
                for i in range(1, todo):
                    a, at = todo_X[i], i
                    while at > 0 and rank(state, id_A[todo_X[at - 1]]) > rank(state, id_A[a]):
                        todo_X[at] = todo_X[at - 1]
                        at -= 1
                    todo_X[at] = a
            for i in range(todo):
                a = todo_X[i] if demand else -1
                e = id_A[a] if demand else fetch_F[todo_X[i]]
                size = size_X[e]
                fits = size <= capacity - held or (not PROTECTS and demand == 1)
                while fits and used + size > capacity:
                    v = victim(state, stamp_X, floor - 1 + demand, e)
                    fits = v >= 0
                    if fits:
                        used -= size_X[v]
                        resident_X[v] = ABSENT
                        gone_X[v] = step_N[n]
                        tally[EVICTED] += 1
                        if unused_X[v]:
                            unused_X[v] = False
                            tally[WASTED] += 1
                            tally[WASTED_B] += size_X[v]
                        if logging:
                            note(log_M3, logged, n, v, EVICT)
                            logged += 1
                if fits:
                    insert(state, e, a)
                    used += size
                    held += size
                    resident_X[e] = CACHED
                    tally[INSERTED] += 1
                if not demand:
                    tally[FETCHED] += fits
                    tally[FETCHED_B] += size * fits
                    tally[DROPPED] += not fits
                    unused_X[e] = fits
                else:
                    tally[STREAMED] += not fits
                if logging and (fits or demand):
                    note(log_M3, logged, n, e, (LOAD if demand else PREFETCH) if fits else STREAM)
                    logged += 1
            if SETTLES and demand and (todo == 0 or hi > lo + 1):
                for a in range(lo, hi):
                    if resident_X[id_A[a]] == CACHED:
                        settle(state, id_A[a])
    tally[CLOCK], tally[USED], tally[KNOWN], tally[LOGGED] = clock, used, known, logged
