"""Policies of one list: LRU, FIFO and LIFO; and static, which never evicts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined, specialised
from moesim.replay.kernels.lists import Lists, oldest, push_front, unlink
from moesim.replay.kernels.loop import replay_cache


@inlined
def _settle(state: Lists, e: int) -> None:
    unlink(state.next_XH, state.prev_XH, e)
    push_front(state.next_XH, state.prev_XH, len(state.next_XH) - 1, e)


@inlined
def _insert(state: Lists, e: int, a: int) -> None:
    push_front(state.next_XH, state.prev_XH, len(state.next_XH) - 1, e)


@inlined
def _oldest(state: Lists, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    head = len(state.next_XH) - 1
    v = oldest(state.prev_XH, stamp_X, floor, head)
    if v == head:
        return -1
    unlink(state.next_XH, state.prev_XH, v)
    return v


@inlined
def _newest(state: Lists, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    head = len(state.next_XH) - 1
    v: int = state.next_XH[head]
    while v != head and stamp_X[v] >= floor:
        v = state.next_XH[v]
    if v == head:
        return -1
    unlink(state.next_XH, state.prev_XH, v)
    return v


lru = specialised(replay_cache, "lru", {"insert": _insert, "settle": _settle, "victim": _oldest, "SETTLES": True})
fifo = specialised(replay_cache, "fifo", {"insert": _insert, "victim": _oldest})
lifo = specialised(replay_cache, "lifo", {"insert": _insert, "victim": _newest})
static = specialised(replay_cache, "static", {})
