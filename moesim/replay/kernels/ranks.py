"""LRU caches of all sizes in one pass, by counting bits; no stack is kept.

Of the stack of Mattson et al. (1970), whose first c ids are in a cache of c slots, only the places of an event's members right after
it are noted: a cache smaller than the event keeps its hits and fills up with the lowest others, so the d-th stays if it is a member,
else gives way to the lowest not placed yet. A cache gives up an id for each used later that it lacks, those of one event by id; so
an id last used in an event of s members is in caches of c slots from the least c on with

    c ≥ its place   and   c > ids used since + members of its event in the first c places, of higher id and not used since

which from c = s on is its rank by recency. X ids, T uses, W words of 64 bits, D depth, V events whose places matter, P places.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.jit import compiled, inlined, ones

ONE, ALL = np.uint64(1), np.uint64((1 << 64) - 1)
AGAIN = -1  # in the place of a member that was used again
NEVER = 1 << 62
U = np.uint64  # an index of this type is not looked at for counting from the end, which takes a third of the time


@inlined
def _bits(first: int, last: int) -> np.uint64:
    """A word with the bits first ≤ i < last; 0 ≤ first < last ≤ 64."""
    return (ALL >> np.uint64(64 - last)) & (ALL << np.uint64(first))


@inlined
def _from(word_W: NDArray[np.uint64], later_W: NDArray[np.int64], t: int) -> int:
    """Bits set from the t-th on."""
    w = U(t) >> U(6)
    count: int = later_W[w] + ones(word_W[w] >> (U(t) & U(63)))
    return count


@inlined
def _above(member_P: NDArray[np.int32], start: int, stop: int, number: np.int32) -> np.int32:
    """Places with a member of a higher number that was not used again."""
    found = np.int32(0)
    for p in range(U(start), U(stop)):
        found += member_P[p] > number
    return found


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

    Ranks: a bit per use in order of time, only the last of each id set; the rank of an id is the number of bits from its own on.
    Places matter while fewer ids were used since than the event has members: such events are ever smaller, so they form a stack.
    """
    sizes_D = np.zeros(ids + 1, np.bool_)
    for m in range(len(event_M)):
        sizes_D[starts_N[event_M[m] + 1] - starts_N[event_M[m]]] = True
    words, stacked = 3 * (ids // 64 + 1) + 1, np.flatnonzero(sizes_D)
    word_W, later_W = np.zeros(words + 1, np.uint64), np.zeros(words + 1, np.int64)
    id_T, time_X = np.empty(words * 64, np.uint32), np.full(ids, -1)
    level_X, number_X, place_X = np.zeros((3, ids), np.uint32)
    begin_V, end_V, since_V, size_V, base_V = np.full((5, len(stacked) + 1), NEVER)
    member_P = np.empty(stacked.sum() + 1, np.int32)
    left_W, at_D = np.zeros(ids // 64 + 2, np.uint64), np.full(ids + 1, -1, np.int32)  # members not placed yet; those found, by depth
    id_U = id_A.view(np.uint32)
    now, levels = 0, 0
    for m in range(len(event_M)):
        n = event_M[m]
        lo, hi = starts_N[n], starts_N[n + 1]
        size, row = hi - lo, row_N[n]
        if size == 0:
            continue
        later = np.int64(0)
        for w in range(now >> 6, -1, -1):
            later_W[U(w)] = later
            later += ones(word_W[U(w)])
        for v in range(levels):
            since_V[v] = _from(word_W, later_W, end_V[v])
            if since_V[v] >= size_V[v]:
                begin_V[v] = NEVER
        if now + size > len(id_T):  # out of time: move the set bits to the front
            for v in range(levels):
                if begin_V[v] != NEVER:
                    begin_V[v] = later - _from(word_W, later_W, begin_V[v])
                end_V[v] = later - since_V[v]
            kept = 0
            for t in range(now):
                e = id_T[U(t)]
                last = time_X[e] == t
                id_T[U(kept)] = e
                time_X[e] = kept if last else time_X[e]
                kept += last
            now = kept
            for w in range(words):
                word_W[w] = _bits(0, min(64, now - 64 * w)) if now > 64 * w else np.uint64(0)
            for w in range(now >> 6, -1, -1):
                later_W[w] = max(0, now - 64 * (w + 1))
        latest = begin_V[levels - 1] if levels > 0 else 0
        for a in range(lo, hi):
            e = id_U[U(a)]
            t, v = time_X[e], level_X[e]
            depth: Any = 0
            if t >= 0:
                place = np.int64(place_X[e])
                depth = place if t >= latest else _from(word_W, later_W, t)
                if begin_V[v] <= t < latest:
                    rank, depth = depth, max(place, since_V[v] + 1)
                    if place < rank:
                        first, number = base_V[v], np.int32(number_X[e])
                        most = since_V[v] + _above(member_P, first, first + depth, number)
                        while depth <= most and depth < size_V[v]:
                            most += member_P[U(first + depth)] > number
                            depth += 1
                        depth = rank if depth <= most else depth
            found_LD[row, U(depth)] += 1
            at_D[U(depth - 1 if 0 < depth <= size else ids)] = a - lo
        while levels > 0 and max(since_V[levels - 1], size) >= size_V[levels - 1]:
            levels -= 1
            begin_V[levels] = NEVER
        base = base_V[levels - 1] + size_V[levels - 1] if levels > 0 else 1  # the first place is nobody's
        for a in range(lo, hi):
            e = id_U[U(a)]
            t, v = time_X[e], level_X[e]
            if t >= 0:
                word_W[U(t) >> U(6)] &= ~(ONE << (U(t) & U(63)))
                member_P[U(base_V[v] + place_X[e] - 1 if begin_V[v] <= t else 0)] = AGAIN
            time_X[e], level_X[e], number_X[e] = now + a - lo, levels, a - lo
            id_T[U(now + a - lo)] = e
        begin_V[levels], end_V[levels], size_V[levels], base_V[levels] = now, now + size, size, base
        levels += 1
        for w in range((size + 63) >> 6):
            left_W[w] = _bits(0, min(64, size - 64 * w))
        lowest = 0
        for d in range(size):  # the d-th stays if it is a member not placed yet, else gives way to the lowest such
            i = at_D[U(d)]
            at_D[U(d)] = -1
            if i < 0 or (left_W[U(i) >> U(6)] >> (U(i) & U(63))) & ONE == U(0):
                while left_W[U(lowest)] == U(0):
                    lowest += 1
                left = left_W[U(lowest)]
                i = 64 * lowest + ones(~left & (left - ONE))
            left_W[U(i) >> U(6)] ^= ONE << (U(i) & U(63))
            member_P[U(base + d)] = i
            place_X[id_U[U(lo + i)]] = d + 1
        until = now + size
        for w in range(now >> 6, (until + 63) >> 6):
            word_W[w] |= _bits(max(now - 64 * w, 0), min(until - 64 * w, 64))
        now = until
