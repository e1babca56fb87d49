"""Policies whose worths all change with every event: LFRU, and next use foretold from which experts follow which.

Worths are told anew at most once an event, when first something must give way; members of the event are set aside as they turn up.
X ids, L layers of the cache, E experts of a layer, C slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined, specialised
from moesim.replay.kernels.loop import replay_cache
from moesim.replay.kernels.slots import BLOCK, EMPTY, Slots, U, new_slots, put, renew, take

SLOWEST = 0.02  # rate of learning once an expert was seen often
KEPT = EMPTY - 1  # worth of what the event needs


class Turns(NamedTuple):
    """`turn_X` the number of the last use of each id among all, by which equals give way; `value`: uses, event of the worths."""

    slots: Slots
    turn_X: NDArray[np.int64]
    value: NDArray[np.int64]


def new_turns(ids: int, capacity: int) -> Turns:
    """Nothing used."""
    return Turns(slots=new_slots(ids, capacity), turn_X=np.zeros(ids, np.int64), value=np.zeros(2, np.int64))


@inlined
def _take_turn(turns: Turns, e: int) -> None:
    turns.value[0] += 1
    turns.turn_X[e] = turns.value[0]


@inlined
def _keep(turns: Turns, e: int) -> None:
    put(turns.slots, e, KEPT)


@inlined
def _bits(score: float) -> np.int64:
    """A number in the order of scores >= 0."""
    return np.float64(score).view(np.int64)


@inlined
def _least(turns: Turns, stamp_X: NDArray[np.int64], floor: int) -> int:
    """Take out the id of least worth that may be evicted, of equals the least recently used; -1 when there is none."""
    slots, turn_X = turns.slots, turns.turn_X
    while True:
        worth = KEPT
        for block in range(len(slots.least_B)):
            worth = min(worth, slots.least_B[block])
        if worth == KEPT:
            return -1
        found = -1
        for block in range(len(slots.least_B)):
            if slots.least_B[block] == worth:
                for at in range(block * BLOCK, block * BLOCK + BLOCK):
                    if slots.worth_C[U(at)] == worth and (found < 0 or turn_X[U(slots.id_C[U(at)])] < turn_X[U(slots.id_C[U(found)])]):
                        found = at
        if stamp_X[slots.id_C[found]] < floor:
            return take(slots, found)
        slots.worth_C[found] = KEPT
        renew(slots, found // BLOCK)


class Rates(NamedTuple):
    """Of each id `count_X` uses, kept after eviction, and `last_X` the event of the last one; the same by slot; `value`: events."""

    turns: Turns
    count_X: NDArray[np.float64]
    last_X: NDArray[np.float64]
    count_C: NDArray[np.float64]
    last_C: NDArray[np.float64]
    value: NDArray[np.int64]


def new_rates(ids: int, capacity: int) -> Rates:
    """Nothing counted."""
    turns = new_turns(ids, capacity)
    count_X, last_X = np.zeros((2, ids))
    count_C, last_C = np.zeros((2, len(turns.slots.worth_C)))
    return Rates(turns=turns, count_X=count_X, last_X=last_X, count_C=count_C, last_C=last_C, value=np.zeros(1, np.int64))


@inlined
def _tick(state: Rates, n: int, id_A: NDArray[np.int32], lo: int, hi: int) -> None:
    state.value[0] += 1


@inlined
def _count(state: Rates, e: int, a: int, hit: bool) -> None:
    _take_turn(state.turns, e)
    state.count_X[e] += 1
    state.last_X[e] = state.value[0]
    if hit:
        at = state.turns.slots.slot_X[e]
        state.count_C[at], state.last_C[at] = state.count_X[e], state.last_X[e]


@inlined
def _insert(state: Rates, e: int, a: int) -> None:
    _keep(state.turns, e)
    at = state.turns.slots.slot_X[e]
    state.count_C[at], state.last_C[at] = state.count_X[e], state.last_X[e]


@inlined
def _least_per_age(state: Rates, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    """Smallest count over age in events, as in moe-cache-eval's LFRU."""
    turns = state.turns
    if turns.value[1] != floor:
        turns.value[1] = floor
        slots, count_C, last_C, now = turns.slots, state.count_C, state.last_C, state.value[0] + 1
        worth_C = slots.worth_C
        for at in range(len(worth_C)):
            worth_C[at] = _bits(count_C[at] / (now - last_C[at])) if worth_C[at] != EMPTY else EMPTY
        for block in range(len(slots.least_B)):
            renew(slots, block)
    return _least(turns, stamp_X, floor)


class Chain(NamedTuple):
    """How soon each expert of a layer tends to come after each other, learnt as the replay goes (successor representation, Dayan 1993).

    `soon_XE` uses of the column expert after the row's, each event further ahead counting `fade` times as much; `count_X` events
    of each id; `likely_X` the same after the layer's last event, whose experts are `before_LE[:length_L]`; `known_E` scratch;
    `fade_L` of the 1st, 2nd, … layer from now, counted as parts of an event, by which `due_L` weighs each; `value`: layer now executed.
    """

    turns: Turns
    soon_XE: NDArray[np.float32]
    count_X: NDArray[np.int64]
    likely_X: NDArray[np.float32]
    layer_X: NDArray[np.int32]
    known_E: NDArray[np.float32]
    before_LE: NDArray[np.int32]
    length_L: NDArray[np.int64]
    fade_L: NDArray[np.float32]
    due_L: NDArray[np.float32]
    value: NDArray[np.int64]


def new_chain(ids: int, capacity: int, experts: int, fade: float) -> Chain:
    """Nothing learnt."""
    layers = ids // experts
    return Chain(
        turns=new_turns(ids, capacity),
        soon_XE=np.zeros((ids, experts), np.float32),
        count_X=np.zeros(ids, np.int64),
        likely_X=np.zeros(ids, np.float32),
        layer_X=np.repeat(np.arange(layers, dtype=np.int32), experts),
        known_E=np.zeros(experts, np.float32),
        before_LE=np.zeros((layers, experts), np.int32),
        length_L=np.zeros(layers, np.int64),
        fade_L=(fade ** (np.arange(1, layers + 1) / layers)).astype(np.float32),
        due_L=np.zeros(layers, np.float32),
        value=np.zeros(1, np.int64),
    )


@inlined
def _learn(state: Chain, n: int, id_A: NDArray[np.int32], lo: int, hi: int) -> None:
    if lo == hi:
        return
    known_E, fade = state.known_E, state.fade_L[-1]
    experts = len(known_E)
    layer = state.layer_X[id_A[lo]]
    base = layer * experts
    state.value[0] = layer
    likely_E = state.likely_X[base : base + experts]
    likely_E[:] = 0
    share = np.float32(1.0 / (hi - lo))
    for a in range(lo, hi - 3, 4):  # several rows at a time: memory is what this waits for
        one_E, two_E, three_E, four_E = state.soon_XE[id_A[a]], state.soon_XE[id_A[a + 1]], state.soon_XE[id_A[a + 2]], state.soon_XE[id_A[a + 3]]
        for j in range(experts):
            likely_E[j] += (one_E[j] + two_E[j]) + (three_E[j] + four_E[j])
    for a in range(hi - (hi - lo) % 4, hi):
        soon_E = state.soon_XE[id_A[a]]
        for j in range(experts):
            likely_E[j] += soon_E[j]
    for j in range(experts):
        likely_E[j] *= share
        known_E[j] = fade * likely_E[j]
    for a in range(lo, hi):
        known_E[id_A[a] - base] += np.float32(1)
    for i in range(state.length_L[layer]):  # what came is now known, and what it promises
        row = state.before_LE[layer, i]
        rate = np.float32(max(1.0 / state.count_X[row], SLOWEST))
        soon_E = state.soon_XE[row]
        for j in range(experts):
            soon_E[j] += rate * (known_E[j] - soon_E[j])
    for a in range(lo, hi):
        state.before_LE[layer, a - lo] = id_A[a]
        state.count_X[id_A[a]] += 1
    state.length_L[layer] = hi - lo


@inlined
def _heard(state: Chain, e: int, a: int, hit: bool) -> None:
    _take_turn(state.turns, e)


@inlined
def _chain_insert(state: Chain, e: int, a: int) -> None:
    _keep(state.turns, e)


@inlined
def _last_foretold(state: Chain, stamp_X: NDArray[np.int64], floor: int, e: int) -> int:
    """The expert expected back last; the layers until its layer's turn count as parts of an event."""
    turns = state.turns
    if turns.value[1] != floor:
        turns.value[1] = floor
        slots, likely_X, layer_X, due_L = turns.slots, state.likely_X, state.layer_X, state.due_L
        worth_C, layers = slots.worth_C, len(due_L)
        for ahead in range(layers):
            due_L[(state.value[0] + 1 + ahead) % layers] = state.fade_L[ahead]
        for at in range(len(worth_C)):
            if worth_C[at] != EMPTY:
                x = U(slots.id_C[at])
                worth_C[at] = _bits(likely_X[x] * due_L[layer_X[x]])
        for block in range(len(slots.least_B)):
            renew(slots, block)
    return _least(turns, stamp_X, floor)


lfru = specialised(replay_cache, "lfru", {"begin": _tick, "use": _count, "insert": _insert, "victim": _least_per_age})
next_use = specialised(replay_cache, "next_use", {"begin": _learn, "use": _heard, "insert": _chain_insert, "victim": _last_foretold})
