"""All cache sizes in one pass: stack algorithms (Mattson et al. 1970) on events.

The stack lists ids so that a cache of c slots holds its first c. That works for rules whose worth of an id does not depend on c.
For an event R, a cache of c >= |R| keeps R and the worthiest of the others it held. Walking down the stack, the ids that gave
way to R so far are the pool: at each depth the worthiest of the pool and the id found there stays. A cache of c < |R| keeps its
hits and fills up with others of R in their order, or with foresight keeps the worthiest c of R. E experts, X ids, D depth, P pool.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined, specialised

NEVER = 1 << 62
OTHER, MEMBER, PLACED = 0, 1, 2

# Each copy of `walk_stack` (`moesim.jit.specialised`) has its own of these.
FORESIGHT = False  # of members that exceed a cache the worthiest stay
BYPASS = False  # members need not be kept


@inlined
def appraise(worth_X: NDArray[np.int64], count_X: NDArray[np.int64], next_A: NDArray[np.int64], e: int, a: int, turn: int) -> None:
    """Set the worth of a member: that of LRU."""
    worth_X[e] = turn


@inlined
def _join(pool_P: NDArray[np.int32], worth_X: NDArray[np.int64], first: int, last: int, e: int) -> None:
    """Put `e` into the pool [first, last), which is in order of falling worth; the place at `last` is free."""
    at = last
    while at > first and worth_X[pool_P[at - 1]] < worth_X[e]:
        pool_P[at] = pool_P[at - 1]
        at -= 1
    pool_P[at] = e


def walk_stack(
    id_A: NDArray[np.int32],
    starts_N: NDArray[np.int64],
    event_M: NDArray[np.int64],
    next_A: NDArray[np.int64],
    ids: int,
    most: int,
    found_LD: NDArray[np.int64],
    row_N: NDArray[np.int32],
) -> None:
    """Add to `found_LD[row_N[n], d]` the accesses of event n at depth d = 1 (top) … `most`: every cache of d slots or more finds them.

    A stack cut off at `most` is right down to there. Cost: O(depth of the deepest member) per event.
    """
    stack_D = np.empty(ids + 1, np.int32)
    worth_X, count_X, role_X = np.zeros(ids, np.int64), np.zeros(ids, np.int64), np.zeros(ids, np.uint8)
    pool_P, member_P = np.empty(2 * ids + 2, np.int32), np.empty(ids + 1, np.int32)
    depth, turn = 0, 0
    for m in range(len(event_M)):
        n = event_M[m]
        lo, hi = starts_N[n], starts_N[n + 1]
        size, row = hi - lo, row_N[n]
        for a in range(lo, hi):
            e = id_A[a]
            role_X[e] = MEMBER
            turn += 1
            appraise(worth_X, count_X, next_A, e, a, turn)
            if FORESIGHT or BYPASS:
                _join(member_P, worth_X, 0, a - lo, e)
            else:
                member_P[a - lo] = e
        first, last, filler, d = 0, 0, 0, 0
        missing = size  # members not yet met on the way down
        if BYPASS:
            for i in range(size):
                pool_P[i] = member_P[i]
            last = size
        else:
            while d < size:  # the top holds the members: the d-th is its hit or the next filler
                e = stack_D[d] if d < depth else -1
                if e >= 0 and role_X[e] == OTHER:
                    _join(pool_P, worth_X, 0, last, e)
                    last += 1
                elif e >= 0:
                    missing -= 1
                    found_LD[row, d + 1] += 1
                if FORESIGHT:
                    e = member_P[d]
                elif e < 0 or role_X[e] != MEMBER:
                    while role_X[member_P[filler]] == PLACED:
                        filler += 1
                    e = member_P[filler]
                role_X[e] = PLACED
                stack_D[d] = e
                d += 1
        tail = worth_X[pool_P[last - 1]] if last > 0 else NEVER
        while missing > 0 and d < depth:
            e = stack_D[d]
            if role_X[e] == OTHER:
                if worth_X[e] <= tail:
                    pool_P[last] = e
                    tail = worth_X[e]
                else:
                    _join(pool_P, worth_X, first, last, e)
                last += 1
            else:
                missing -= 1
                found_LD[row, d + 1] += 1
            stack_D[d] = pool_P[first]
            first += 1
            d += 1
            if last > 2 * ids:
                for i in range(first, last):
                    pool_P[i - first] = pool_P[i]
                first, last = 0, last - first
        depth = min(most, depth + missing)  # they were never seen or lie below; what is left of the pool sinks under all
        while missing > 0 and d < depth:
            stack_D[d] = pool_P[first]
            first += 1
            d += 1
        for a in range(lo, hi):
            role_X[id_A[a]] = OTHER


@inlined
def _frequent(worth_X: NDArray[np.int64], count_X: NDArray[np.int64], next_A: NDArray[np.int64], e: int, a: int, turn: int) -> None:
    count_X[e] += 1
    worth_X[e] = (count_X[e] << 32) | turn


@inlined
def _soon(worth_X: NDArray[np.int64], count_X: NDArray[np.int64], next_A: NDArray[np.int64], e: int, a: int, turn: int) -> None:
    worth_X[e] = -next_A[a]


lfu = specialised(walk_stack, "lfu", {"appraise": _frequent})
belady = specialised(walk_stack, "belady", {"appraise": _soon, "FORESIGHT": True})
optimal = specialised(walk_stack, "optimal", {"appraise": _soon, "BYPASS": True})
