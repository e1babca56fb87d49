"""Doubly linked lists over ids 0..X-1, several in one pair of arrays; an id is in one of them at most.

List h has its sentinel at X + h; its front is the newest end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined


class Lists(NamedTuple):
    """`next_XH`, `prev_XH` int32 [X + H] towards the back and the front."""

    next_XH: NDArray[np.int32]
    prev_XH: NDArray[np.int32]


def new_lists(ids: int, lists: int) -> Lists:
    """`lists` empty ones."""
    own = np.arange(ids + lists, dtype=np.int32)
    return Lists(next_XH=own.copy(), prev_XH=own.copy())


@inlined
def push_front(next_XH: NDArray[np.int32], prev_XH: NDArray[np.int32], head: int, e: int) -> None:
    """Put `e`, in no list now, in front of the list with sentinel `head`."""
    after = next_XH[head]
    next_XH[e] = after
    prev_XH[e] = head
    prev_XH[after] = e
    next_XH[head] = e


@inlined
def unlink(next_XH: NDArray[np.int32], prev_XH: NDArray[np.int32], e: int) -> None:
    """Take `e` out of its list."""
    before, after = prev_XH[e], next_XH[e]
    next_XH[before] = after
    prev_XH[after] = before


@inlined
def oldest(prev_XH: NDArray[np.int32], stamp_X: NDArray[np.int64], floor: int, head: int) -> int:
    """The id nearest to the back that may be evicted; `head` when there is none."""
    e: int = prev_XH[head]
    while e != head and stamp_X[e] >= floor:
        e = prev_XH[e]
    return e
