"""Slots with a worth each: the least worthy is found by the minima of blocks, without a tree.

Finding it costs a scan of the C/16 minima and of one block, both of which the processor does several at a time; a change of
worth costs next to nothing unless it was its block's minimum. On caches of a few hundred slots that beats a heap fourfold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined

BLOCK = 16
EMPTY = np.iinfo(np.int64).max  # worth of a slot without expert
U = np.uint64  # an index of this type is not looked at for counting from the end, so loops handle several slots at once


class Slots(NamedTuple):
    """`worth_C`, `id_C` per slot, `least_B` per block of slots, `slot_X` where an id is; `free_C[:free[0]]` are empty."""

    worth_C: NDArray[np.int64]
    id_C: NDArray[np.int32]
    least_B: NDArray[np.int64]
    slot_X: NDArray[np.int32]
    free_C: NDArray[np.int32]
    free: NDArray[np.int64]


def new_slots(ids: int, capacity: int) -> Slots:
    """All empty; there are as many as `capacity` units can hold of `ids`."""
    slots = min(ids, capacity)
    blocks = max(1, -(-slots // BLOCK))
    return Slots(
        worth_C=np.full(blocks * BLOCK, EMPTY),
        id_C=np.full(blocks * BLOCK, -1, np.int32),
        least_B=np.full(blocks, EMPTY),
        slot_X=np.full(ids, -1, np.int32),
        free_C=np.arange(slots, dtype=np.int32)[::-1].copy(),
        free=np.full(1, slots),
    )


@inlined
def renew(slots: Slots, block: int) -> None:
    """Find a block's minimum again."""
    least = EMPTY
    for i in range(U(block * BLOCK), U(block * BLOCK + BLOCK)):
        least = min(least, slots.worth_C[i])
    slots.least_B[U(block)] = least


@inlined
def revalue(slots: Slots, e: int, worth: int) -> None:
    """Give `e`, which is in a slot, another worth."""
    at = U(slots.slot_X[e])
    block: Any = at // U(BLOCK)
    before = slots.worth_C[at]
    slots.worth_C[at] = worth
    if worth <= slots.least_B[block]:
        slots.least_B[block] = worth
    elif before == slots.least_B[block]:
        renew(slots, block)


@inlined
def put(slots: Slots, e: int, worth: int) -> None:
    """Put `e` into an empty slot."""
    slots.free[0] -= 1
    at = slots.free_C[slots.free[0]]
    slots.slot_X[e] = at
    slots.id_C[at] = e
    slots.worth_C[at] = worth
    slots.least_B[at // BLOCK] = min(slots.least_B[at // BLOCK], worth)


@inlined
def take(slots: Slots, at: int) -> int:
    """Empty a slot; the id that was there."""
    slots.free_C[slots.free[0]] = at
    slots.free[0] += 1
    slots.worth_C[at] = EMPTY
    renew(slots, at // BLOCK)
    e: int = slots.id_C[at]
    return e


@inlined
def least(slots: Slots) -> int:
    """The slot of least worth; -1 when all are empty."""
    block = 0
    for b in range(1, len(slots.least_B)):
        if slots.least_B[b] < slots.least_B[block]:
            block = b
    worth = slots.least_B[block]
    if worth == EMPTY:
        return -1
    at = block * BLOCK
    while slots.worth_C[U(at)] != worth:
        at += 1
    return at


@inlined
def least_free(slots: Slots, stamp_X: NDArray[np.int64], floor: int) -> int:
    """The slot of least worth among those whose expert may be evicted; -1 when there is none."""
    found = least(slots)
    if found < 0 or stamp_X[slots.id_C[found]] < floor:
        return found
    found, worth = -1, EMPTY
    for b in range(len(slots.least_B)):
        if slots.least_B[b] < worth:
            for at in range(b * BLOCK, b * BLOCK + BLOCK):
                if slots.worth_C[U(at)] < worth and stamp_X[U(slots.id_C[U(at)])] < floor:
                    found, worth = at, slots.worth_C[at]
    return found
