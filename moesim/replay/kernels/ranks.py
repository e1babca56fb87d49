"""LRU caches of all sizes in one pass: ranks of recency by counting bits; the stack is walked only where it is not in order of recency.

LRU lists ids by their last use, those of one event by id. A cache with room for every event since an id's last use finds the id
by its rank. Smaller ones hold a part of an event that exceeded them, so the stack of Mattson et al. (1970), whose first c ids are
in a cache of c slots, is in another order down to the size of that event, until as many other ids were used.
X ids, D depth in the stack, T uses, W words of 64 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.jit import compiled, inlined, ones

ONE, LAST, ALL = np.uint64(1), np.uint64(1 << 63), np.uint64((1 << 64) - 1)
EVENT = 32  # a place is the number of an event above so many bits, and the member's number in it


@inlined
def _bits(first: int, last: int) -> np.uint64:
    """A word with the bits first ≤ i < last; 0 ≤ first < last ≤ 64."""
    return (ALL >> np.uint64(64 - last)) & (ALL << np.uint64(first))


@compiled
def lru_depths(
    id_A: NDArray[np.int32],
    starts_N: NDArray[np.int64],
    event_M: NDArray[np.int64],
    ids: int,
    found_LD: NDArray[np.int64],
    row_N: NDArray[np.int32],
) -> None:
    """Add to `found_LD[row_N[n], d]`, d > 0, the accesses of event n that caches of d slots or more find; column 0 is scratch.

    Ranks: a bit per use in order of time, only the last of each id set; the rank of an id is the number of bits from its own on,
    in its word and in later ones. Stack: down to `depth` it is written out, below it is in order of recency. A cache smaller than
    the event keeps its hits and fills up with the lowest other members; a larger one keeps the event and the latest others.
    """
    words = 3 * (ids // 64 + 1) + 1
    word_W, was_W, later_W = np.zeros(words, np.uint64), np.zeros(words, np.uint64), np.zeros(words, np.int64)
    id_T, time_X = np.empty(words * 64, np.int32), np.full(ids, -1, np.int32)
    stack_D, place_X = np.full(ids + 1, ids, np.int32), np.zeros(ids + 1, np.int64)  # the last of both is nobody's
    pool_W, other_D, left_W = np.zeros(words, np.uint64), np.empty(ids, np.int32), np.zeros(ids // 64 + 2, np.uint64)
    now, depth = 0, 0
    for m in range(len(event_M)):
        n = event_M[m]
        lo, hi = starts_N[n], starts_N[n + 1]
        size, row = hi - lo, row_N[n]
        if size == 0:
            continue
        if now + size > len(id_T):  # out of time: move the set bits to the front
            kept = 0
            for t in range(now):
                e = id_T[t]
                last = time_X[e] == t
                id_T[kept] = e
                time_X[e] = kept if last else time_X[e]
                kept += last
            now = kept
            for w in range(words):
                word_W[w] = _bits(0, min(64, now - 64 * w)) if now > 64 * w else np.uint64(0)
        later = np.int64(0)
        for w in range((now + 63) // 64 - 1, -1, -1):
            later_W[w], was_W[w] = later, word_W[w]
            later += ones(word_W[w])
        span = max(depth, size)  # found by rank below this depth
        for d in range(depth, size):
            stack_D[d] = ids
        for a in range(lo, hi):
            e = id_A[a]
            place_X[e] = ((m + 1) << EVENT) | (a - lo)
            t = time_X[e]
            rank = 0
            if t >= 0:
                rank = later_W[t >> 6] + ones(was_W[t >> 6] >> np.uint64(t & 63))
                word_W[t >> 6] &= ~(ONE << np.uint64(t & 63))
            found_LD[row, rank if rank > span else 0] += 1
            stack_D[rank - 1 if depth < rank <= span else ids] = e
            time_X[e] = now + a - lo
            id_T[now + a - lo] = e
        for w in range((size + 63) >> 6):
            left_W[w] = _bits(0, min(64, size - 64 * w))
        left_W[(size + 63) >> 6] = ALL  # ends the search for a filler
        filler, missing = 0, 0
        for d in range(size):  # the d-th stays if it is a member not placed yet, else gives way to the lowest such
            place = place_X[stack_D[d]]
            other_D[missing] = stack_D[d]
            member = place >> EVENT == m + 1
            i = place & ((1 << EVENT) - 1)
            found_LD[row, d + 1] += member
            missing += not member
            own = member and (left_W[i >> 6] >> np.uint64(i & 63)) & ONE != np.uint64(0)
            left = left_W[filler]
            i = i if own else 64 * filler + ones(~left & (left - ONE))
            left_W[i >> 6] ^= ONE << np.uint64(i & 63)
            stack_D[d] = id_A[lo + i]
            while left_W[filler] == np.uint64(0):
                filler += 1
        if depth > size:
            for i in range(missing):
                t = time_X[other_D[i]]
                pool_W[t >> 6] |= LAST >> np.uint64(t & 63)
        d, end, lowest, top = size, size, np.int64(now), (now - 1) >> 6
        while missing > 0 and d < depth:  # the latest of those that gave way and the d-th stays
            e = stack_D[d]
            if place_X[e] >> EVENT == m + 1:
                found_LD[row, d + 1] += 1
                missing -= 1
            else:
                t = time_X[e]
                pool_W[t >> 6] |= LAST >> np.uint64(t & 63)
                top = max(top, t >> 6)
            while pool_W[top] == np.uint64(0):
                top -= 1
            left = pool_W[top]
            pool_W[top] = left & (left - ONE)
            latest = 64 * top + 63 - ones(~left & (left - ONE))
            stack_D[d] = id_T[latest]
            if latest > lowest:
                end = d + 1
            lowest = min(lowest, latest)
            d += 1
        if d >= depth:
            depth = end
            pool_W[: top + 1] = 0  # they sink below what is written out
        until = now + size
        for w in range(now >> 6, (until + 63) >> 6):
            word_W[w] |= _bits(max(now - 64 * w, 0), min(until - 64 * w, 64))
        now = until
