"""All sizes of LRU caches in one pass, without walking a stack: ranks of recency by counting bits, and events of one size.

LRU lists ids by their last use, those of one event by id, so a cache that holds any whole event finds what it holds by rank.
Smaller caches hold a part of the last event alone. E experts, X ids, D depth, T uses, W = T / 64 words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.jit import compiled, inlined, ones

WIDEST = 64  # most members of an event that one word can name


@inlined
def _bits(first: int, last: int) -> np.uint64:
    """A word with the bits first ≤ i < last; 0 ≤ first < last ≤ 64."""
    return (~np.uint64(0) >> np.uint64(64 - last)) & (~np.uint64(0) << np.uint64(first))


@compiled
def recency_ranks(
    id_A: NDArray[np.int32],
    starts_N: NDArray[np.int64],
    event_M: NDArray[np.int64],
    ids: int,
    found_LD: NDArray[np.int64],
    row_N: NDArray[np.int32],
) -> None:
    """Add to `found_LD[row_N[n], d]` the accesses of event n whose expert is the d-th most recently used before it.

    That is the depth for LRU caches that hold any whole event. A bit per use in order of time, only the last of each id set:
    the rank of an id is the number of bits from its own on, in its word and in later ones.
    """
    words = 3 * (ids // 64 + 1) + 1
    word_W, later_W = np.zeros(words, np.uint64), np.zeros(words, np.int64)
    id_T, time_X = np.empty(words * 64, np.int32), np.full(ids, -1, np.int64)
    now, one = 0, np.uint64(1)
    for m in range(len(event_M)):
        n = event_M[m]
        lo, hi = starts_N[n], starts_N[n + 1]
        if lo == hi:
            continue
        row = row_N[n]
        if now + hi - lo > len(id_T):  # out of time: move the set bits to the front
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
            later_W[w] = later
            later += ones(word_W[w])
        for a in range(lo, hi):
            t = time_X[id_A[a]]
            if t >= 0:
                found_LD[row, later_W[t >> 6] + ones(word_W[t >> 6] >> np.uint64(t & 63))] += 1
        for a in range(lo, hi):
            e = id_A[a]
            t = time_X[e]
            if t >= 0:
                word_W[t >> 6] &= ~(one << np.uint64(t & 63))
            time_X[e] = now + a - lo
            id_T[now + a - lo] = e
        end = now + hi - lo
        for w in range(now >> 6, (end + 63) >> 6):
            word_W[w] |= _bits(max(now - 64 * w, 0), min(end - 64 * w, 64))
        now = end


@compiled
def overflow_depths(
    id_A: NDArray[np.int32],
    starts_N: NDArray[np.int64],
    event_M: NDArray[np.int64],
    ids: int,
    size: int,
    found_LD: NDArray[np.int64],
    row_N: NDArray[np.int32],
) -> None:
    """Add to `found_LD[row_N[n], d]` the accesses found at depth d ≤ `size` when every event has `size` ≤ `WIDEST` members, or none.

    A cache of c < size slots keeps its hits and fills up with the lowest other members: by depth, the d-th stays if it is a
    member not yet placed, else gives way to the lowest not yet placed. Without a branch: members are bits of a word.
    """
    stack_D = np.full(size, ids, np.int32)
    place_X = np.zeros(ids + 1, np.int64)  # 64 · event + place in it
    for m in range(len(event_M)):
        n = event_M[m]
        lo = starts_N[n]
        if lo == starts_N[n + 1]:
            continue
        row = row_N[n]
        for i in range(size):
            place_X[id_A[lo + i]] = (m + 1) * 64 + i
        left = _bits(0, size)
        for d in range(size):
            place = place_X[stack_D[d]]
            member = place >> 6 == m + 1
            found_LD[row, d + 1] += member
            own = (np.uint64(member) << np.uint64(place & 63)) & left
            lowest = left & (~left + np.uint64(1))
            bit = own if own != np.uint64(0) else lowest
            left ^= bit
            stack_D[d] = id_A[lo + ones(bit - np.uint64(1))]
