"""Policies of general caches made of several lists: CLOCK, SIEVE, S3-FIFO, ARC, W-TinyLFU; and layer-distance.

Every rule passes over what may not be evicted now. Shares of the cache are at least the size of one expert, so all are
defined for a single slot. `list_X` says which list an id is in (-1: none), `room_H` the sizes a list holds together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined, specialised
from moesim.replay.kernels.lists import Lists, new_lists, oldest, push_front, unlink
from moesim.replay.kernels.loop import replay_cache

OUT = -1


class Queues(NamedTuple):
    """H lists of ids with what the rules note down: `mark_X` uses or a visited bit, `value` a few numbers (see each rule)."""

    lists: Lists
    list_X: NDArray[np.int8]
    room_H: NDArray[np.int64]
    mark_X: NDArray[np.int64]
    size_X: NDArray[np.int64]
    value: NDArray[np.float64]


def new_queues(size_X: NDArray[np.int64], lists: int, *value: float) -> Queues:
    """Empty lists."""
    ids = len(size_X)
    return Queues(
        lists=new_lists(ids, lists),
        list_X=np.full(ids, OUT, np.int8),
        room_H=np.zeros(lists, np.int64),
        mark_X=np.zeros(ids, np.int64),
        size_X=size_X,
        value=np.asarray([*value, 0.0]),
    )


@inlined
def _head(state: Queues, h: int) -> int:
    return len(state.list_X) + h


@inlined
def _enter(state: Queues, e: int, h: int) -> None:
    push_front(state.lists.next_XH, state.lists.prev_XH, _head(state, h), e)
    state.list_X[e] = h
    state.room_H[h] += state.size_X[e]


@inlined
def _leave(state: Queues, e: int) -> None:
    unlink(state.lists.next_XH, state.lists.prev_XH, e)
    state.room_H[state.list_X[e]] -= state.size_X[e]
    state.list_X[e] = OUT


@inlined
def _move(state: Queues, e: int, h: int) -> None:
    _leave(state, e)
    _enter(state, e, h)


@inlined
def _last(state: Queues, stamp_X: NDArray[np.int64], floor: int, h: int) -> int:
    """The oldest of list h that may be evicted, or -1."""
    e = oldest(state.lists.prev_XH, stamp_X, floor, _head(state, h))
    return -1 if e == _head(state, h) else e


@inlined
def _trim(state: Queues, h: int, most: float) -> None:
    """Forget the oldest of ghost list h until it holds no more than `most`."""
    while state.room_H[h] > most:
        _leave(state, state.lists.prev_XH[_head(state, h)])


# CLOCK with one bit (Corbato 1968): the oldest is given up unless used since; then it becomes the newest.


@inlined
def _visit(state: Queues, e: int, a: int, hit: bool) -> None:
    if hit:
        state.mark_X[e] = 1


@inlined
def _arrive(state: Queues, e: int, a: int) -> None:
    state.mark_X[e] = 0
    _enter(state, e, 0)


@inlined
def _clock_victim(state: Queues, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    while True:
        v = _last(state, stamp_X, floor, 0)
        if v < 0 or state.mark_X[v] == 0:
            break
        state.mark_X[v] = 0
        _move(state, v, 0)
    if v >= 0:
        _leave(state, v)
    return v


# SIEVE (Zhang et al., NSDI 2024): a hand goes from the oldest to the newest and clears bits; nothing moves. value: hand.


@inlined
def _sieve_victim(state: Queues, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    head, prev_XH = _head(state, 0), state.lists.prev_XH
    if _last(state, stamp_X, floor, 0) < 0:
        return -1
    v = int(state.value[0])
    if v < 0:
        v = head
    while v == head or stamp_X[v] >= floor or state.mark_X[v]:
        if v != head and stamp_X[v] < floor:
            state.mark_X[v] = 0
        v = prev_XH[v]
    before = prev_XH[v]
    state.value[0] = -1 if before == head else before
    _leave(state, v)
    return v


# S3-FIFO (Yang et al., SOSP 2023): lists 0 small, 1 main, 2 ghost; value: most in main and in ghost.
SMALL, MAIN, GHOST, RETURNED = 0, 1, 2, 3


@inlined
def _count(state: Queues, e: int, a: int, hit: bool) -> None:
    if hit:
        state.mark_X[e] = min(state.mark_X[e] + 1, 3)
    elif state.list_X[e] == GHOST:
        _leave(state, e)
        state.mark_X[e] = -RETURNED
    else:
        state.mark_X[e] = 0


@inlined
def _s3_insert(state: Queues, e: int, a: int) -> None:
    known = state.mark_X[e] == -RETURNED
    if state.list_X[e] == GHOST:  # by prefetch
        _leave(state, e)
        known = True
    state.mark_X[e] = 0
    _enter(state, e, MAIN if known else SMALL)


@inlined
def _s3_victim(state: Queues, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    while True:
        main = state.room_H[MAIN] > state.value[0]
        v = _last(state, stamp_X, floor, MAIN if main else SMALL)
        if v < 0:  # the other list, then
            main = not main
            v = _last(state, stamp_X, floor, MAIN if main else SMALL)
            if v < 0:
                return -1
        if not main and state.mark_X[v] < 2:
            _move(state, v, GHOST)
            _trim(state, GHOST, state.value[1])
            return v
        if main and state.mark_X[v] == 0:
            _leave(state, v)
            return v
        state.mark_X[v] -= main
        _move(state, v, MAIN)


# ARC (Megiddo and Modha, FAST 2003): lists 0 once, 1 often, 2 and 3 their ghosts; value: capacity, target of list 0.
# mark: which ghost an id was found in.


@inlined
def _arc_use(state: Queues, e: int, a: int, hit: bool) -> None:
    where = state.list_X[e]
    state.mark_X[e] = OUT
    if hit:
        _move(state, e, 1)
    elif where >= 2:
        other = 5 - where
        step = state.size_X[e] * max(1.0, state.room_H[other] / state.room_H[where])
        if where == 2:
            state.value[1] = min(state.value[0], state.value[1] + step)
        else:
            state.value[1] = max(0.0, state.value[1] - step)
        _leave(state, e)
        state.mark_X[e] = where


@inlined
def _arc_insert(state: Queues, e: int, a: int) -> None:
    known = state.mark_X[e] >= 2
    if state.list_X[e] >= 2:  # by prefetch
        _leave(state, e)
        known = True
    state.mark_X[e] = OUT
    _enter(state, e, 1 if known else 0)
    _trim(state, 2, max(0.0, state.value[0] - state.room_H[0]))
    _trim(state, 3, max(0.0, 2 * state.value[0] - state.room_H[0] - state.room_H[1] - state.room_H[2]))


@inlined
def _arc_victim(state: Queues, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    once, often = _last(state, stamp_X, floor, 0), _last(state, stamp_X, floor, 1)
    full = state.room_H[0] > state.value[1] or (state.mark_X[e] == 3 and state.room_H[0] == state.value[1])
    v = once if once >= 0 and (full or often < 0) else often
    if v >= 0:
        _move(state, v, 2 if v == once else 3)
    return v


# W-TinyLFU (Einziger et al., ACM ToS 2017) with exact counts, as ids are few: lists 0 window, 1 probation, 2 protected;
# value: most in window and in protected, uses until counts are halved, uses so far.


@inlined
def _tiny_use(state: Queues, e: int, a: int, hit: bool) -> None:
    state.mark_X[e] += 1
    state.value[3] += 1
    if state.value[3] >= state.value[2]:
        state.value[3] = 0
        for x in range(len(state.mark_X)):
            state.mark_X[x] >>= 1
    if hit:
        _move(state, e, 0 if state.list_X[e] == 0 else 2)
        while state.room_H[2] > state.value[1]:
            _move(state, state.lists.prev_XH[_head(state, 2)], 1)


@inlined
def _tiny_insert(state: Queues, e: int, a: int) -> None:
    _enter(state, e, 0)
    while state.room_H[0] > state.value[0]:
        _move(state, state.lists.prev_XH[_head(state, 0)], 1)


@inlined
def _tiny_victim(state: Queues, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    candidate = _last(state, stamp_X, floor, 0)
    v = _last(state, stamp_X, floor, 1)
    if v < 0:
        v = _last(state, stamp_X, floor, 2)
    leaving = candidate >= 0 and state.room_H[0] + state.size_X[e] > state.value[0]
    if v < 0 or (leaving and state.mark_X[candidate] <= state.mark_X[v]):
        v = candidate
    if v >= 0:
        _leave(state, v)
    return v


# Layer-distance: one list per layer, least recently used at the back; an expert of the layer just executed is needed last.
# value: experts per layer, row of the layer now executed.


@inlined
def _turn(state: Queues, n: int, id_A: NDArray[np.int32], lo: int, hi: int) -> None:
    if hi > lo:
        state.value[1] = id_A[lo] // int(state.value[0])


@inlined
def _layer_settle(state: Queues, e: int) -> None:
    _move(state, e, state.list_X[e])


@inlined
def _layer_insert(state: Queues, e: int, a: int) -> None:
    _enter(state, e, e // int(state.value[0]))


@inlined
def _layer_victim(state: Queues, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    layers, now = len(state.room_H), int(state.value[1])
    for back in range(layers):
        v = _last(state, stamp_X, floor, (now - back) % layers)
        if v >= 0:
            _leave(state, v)
            return v
    return -1


clock = specialised(replay_cache, "clock", {"use": _visit, "insert": _arrive, "victim": _clock_victim})
sieve = specialised(replay_cache, "sieve", {"use": _visit, "insert": _arrive, "victim": _sieve_victim})
s3_fifo = specialised(replay_cache, "s3_fifo", {"use": _count, "insert": _s3_insert, "victim": _s3_victim})
arc = specialised(replay_cache, "arc", {"use": _arc_use, "insert": _arc_insert, "victim": _arc_victim})
w_tinylfu = specialised(replay_cache, "w_tinylfu", {"use": _tiny_use, "insert": _tiny_insert, "victim": _tiny_victim})
layer_distance = specialised(
    replay_cache,
    "layer_distance",
    {
        "begin": _turn,
        "insert": _layer_insert,
        "settle": _layer_settle,
        "victim": _layer_victim,
        "SETTLES": True,
    },
)
