"""Policies of a worth per expert: LFU, LFU whose counts fade, LFRU, and next use foretold from which experts follow which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined, specialised
from moesim.replay.kernels.loop import replay_cache
from moesim.replay.kernels.slots import EMPTY, Slots, least_free, new_slots, put, renew, revalue, take

SLOWEST = 0.02  # rate of learning once an expert was seen often
RECENT = 32  # low bits of a worth: the number of the use, so that of equal counts the least recently used goes first


class Counts(NamedTuple):
    """`count_X` uses of each id, kept after eviction; `turn_X` the number of its last use among all, `last_X` the event of it.

    `value`: uses, events, period of halving.
    """

    slots: Slots
    count_X: NDArray[np.int64]
    turn_X: NDArray[np.int64]
    last_X: NDArray[np.int64]
    value: NDArray[np.int64]


def new_counts(ids: int, capacity: int, period: int = 0) -> Counts:
    """Nothing counted; counts are halved every `period` events (0: never)."""
    return Counts(
        slots=new_slots(ids, capacity),
        count_X=np.zeros(ids, np.int64),
        turn_X=np.zeros(ids, np.int64),
        last_X=np.zeros(ids, np.int64),
        value=np.asarray([0, 0, period]),
    )


@inlined
def _worth(state: Counts, e: int) -> int:
    worth: int = (state.count_X[e] << RECENT) | state.turn_X[e]
    return worth


@inlined
def _tick(state: Counts, n: int, id_A: NDArray[np.int32], lo: int, hi: int) -> None:
    state.value[1] += 1
    if state.value[2] and state.value[1] % state.value[2] == 0:
        for e in range(len(state.count_X)):
            state.count_X[e] >>= 1
        slots = state.slots
        recent = (1 << RECENT) - 1
        for at in range(len(slots.worth_C)):
            if slots.worth_C[at] != EMPTY:
                slots.worth_C[at] = (slots.worth_C[at] >> (RECENT + 1) << RECENT) | (slots.worth_C[at] & recent)
        for block in range(len(slots.least_B)):
            renew(slots, block)


@inlined
def _use(state: Counts, e: int, a: int, hit: bool) -> None:
    state.count_X[e] += 1
    state.last_X[e] = state.value[1]
    state.value[0] += 1
    state.turn_X[e] = state.value[0]
    if hit:
        revalue(state.slots, e, _worth(state, e))


@inlined
def _insert(state: Counts, e: int, a: int) -> None:
    put(state.slots, e, _worth(state, e))


@inlined
def _least_used(state: Counts, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    at = least_free(state.slots, stamp_X, floor)
    return take(state.slots, at) if at >= 0 else -1


@inlined
def _least_per_age(state: Counts, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    """Smallest count over age in events, as in moe-cache-eval's LFRU; of equals the least recently used."""
    slots, found = state.slots, -1
    best = np.inf
    for at in range(len(slots.worth_C)):
        if slots.worth_C[at] != EMPTY and stamp_X[slots.id_C[at]] < floor:
            x = slots.id_C[at]
            score = state.count_X[x] / (state.value[1] - state.last_X[x] + 1)
            if score < best or (score == best and slots.worth_C[at] < slots.worth_C[found]):
                found, best = at, score
    return take(slots, found) if found >= 0 else -1


class Chain(NamedTuple):
    """How soon each expert of a layer tends to come after each other, learnt as the replay goes (successor representation, Dayan 1993).

    `soon_XE` uses of the column expert after the row's, each event further ahead counting `fade` times as much; `count_X` events
    of each id; `likely_X` the same after the layer's last event, whose experts are `before_LE[:length_L]`;
    `value`: experts per layer, row of the layer now executed, uses.
    """

    slots: Slots
    soon_XE: NDArray[np.float32]
    count_X: NDArray[np.int64]
    likely_X: NDArray[np.float32]
    before_LE: NDArray[np.int32]
    length_L: NDArray[np.int64]
    value: NDArray[np.int64]
    fade: NDArray[np.float32]


def new_chain(ids: int, capacity: int, experts: int, fade: float) -> Chain:
    """Nothing learnt."""
    layers = ids // experts
    return Chain(
        slots=new_slots(ids, capacity),
        soon_XE=np.zeros((ids, experts), np.float32),
        count_X=np.zeros(ids, np.int64),
        likely_X=np.zeros(ids, np.float32),
        before_LE=np.zeros((layers, experts), np.int32),
        length_L=np.zeros(layers, np.int64),
        value=np.asarray([experts, 0, 0]),
        fade=np.asarray([fade], np.float32),
    )


@inlined
def _learn(state: Chain, n: int, id_A: NDArray[np.int32], lo: int, hi: int) -> None:
    if lo == hi:
        return
    experts, fade = state.value[0], state.fade[0]
    layer = id_A[lo] // experts
    base = layer * experts
    state.value[1] = layer
    share = np.float32(1.0 / (hi - lo))
    for j in range(experts):
        state.likely_X[base + j] = 0
    for a in range(lo, hi):
        for j in range(experts):
            state.likely_X[base + j] += share * state.soon_XE[id_A[a], j]
    for i in range(state.length_L[layer]):  # what came is now known, and what it promises
        row = state.before_LE[layer, i]
        rate = np.float32(max(1.0 / state.count_X[row], SLOWEST))
        for j in range(experts):
            state.soon_XE[row, j] += rate * (fade * state.likely_X[base + j] - state.soon_XE[row, j])
        for a in range(lo, hi):
            state.soon_XE[row, id_A[a] - base] += rate
    for a in range(lo, hi):
        state.before_LE[layer, a - lo] = id_A[a]
        state.count_X[id_A[a]] += 1
    state.length_L[layer] = hi - lo


@inlined
def _heard(state: Chain, e: int, a: int, hit: bool) -> None:
    state.value[2] += 1
    if hit:
        revalue(state.slots, e, state.value[2])


@inlined
def _chain_insert(state: Chain, e: int, a: int) -> None:
    put(state.slots, e, state.value[2])


@inlined
def _last_foretold(state: Chain, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    """The expert expected back last; the layers until its layer's turn count as parts of an event."""
    slots, found, best = state.slots, -1, np.inf
    experts, layers, now = state.value[0], len(state.length_L), state.value[1]
    for at in range(len(slots.worth_C)):
        if slots.worth_C[at] != EMPTY and stamp_X[slots.id_C[at]] < floor:
            x = slots.id_C[at]
            soon = state.likely_X[x]
            if layers > 1:
                soon *= state.fade[0] ** (((x // experts - now - 1) % layers + 1) / layers)
            if soon < best or (soon == best and slots.worth_C[at] < slots.worth_C[found]):
                found, best = at, soon
    return take(slots, found) if found >= 0 else -1


_HOOKS = {"begin": _tick, "use": _use, "insert": _insert, "victim": _least_used}
lfu = specialised(replay_cache, "lfu", _HOOKS)
lfru = specialised(replay_cache, "lfru", {**_HOOKS, "victim": _least_per_age})
next_use = specialised(replay_cache, "next_use", {"begin": _learn, "use": _heard, "insert": _chain_insert, "victim": _last_foretold})
