"""One layer's slots and all that follows from them: loads, token bit sets, distinct destinations, moves from a live plan.

Which tokens a slot serves is one row of W words, so that a swap of two slots is priced exactly in 4·W word operations,
without looking at a token. E experts, P slots, G devices, N nodes, B parts of the sample, R row of `turn_RW`,
X most replicas of one expert, W = ceil(tokens / 64) words.

An expert's replicas are numbered by slot; token t uses replica `t mod count` (dispatch rule `even`).
Cost, lower is better, with `excess` how far load exceeds its limits (0: load itself is the cost):

    busy · excess + fanout · devices per token + node_fanout · nodes per token
    + peak_fanout · share of the tokens that the busiest device serves + peak_node_fanout · share of the busiest node
    + move · experts on a device that does not hold them now
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.jit import compiled, inlined, ones
from moesim_solvers.placement.bits import Words, row_ones

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Layer(NamedTuple):
    """What is given: one layer's routing and loads, its devices, the price of each term, what binds.

    price_5   busy, fanout, node_fanout, peak_fanout, peak_node_fanout
    pin_GE    True where a device must keep an expert; empty when there are no pins
    apart_EE  True for two experts that no device may hold both; empty when there are none
    live_GE   True where a device holds an expert now; empty when moves are free
    """

    member_EW: Words
    turn_RW: Words
    load_E: Floats
    drift_EB: Floats
    first_G: Ints
    device_P: Ints
    node_G: Ints
    price_5: Floats
    mean: float
    load_limit: float
    peak_limit: float
    tokens: int
    pin_GE: Bools
    apart_EE: Bools
    live_GE: Bools
    move: float


class State(NamedTuple):
    """What moves: the slots and all that follows from them (`any`: >= 1 slot serves the token, `many`: >= 2)."""

    slots_P: Ints
    home_EX: Ints
    count_E: Ints
    bits_PW: Words
    size_P: Ints
    any_GW: Words
    many_GW: Words
    any_NW: Words
    many_NW: Words
    reach_G: Ints
    reach_N: Ints
    load_G: Floats
    drift_GB: Floats
    peak_G: Floats
    dirty_G: Bools
    stale_N: Bools
    draw_1: Words


@compiled
def refresh(layer: Layer, state: State) -> None:
    """Recount the devices marked dirty, and their nodes, from the slots' bit sets."""
    any_GW, many_GW, any_NW, many_NW = state.any_GW, state.many_GW, state.any_NW, state.many_NW
    bits_PW, words = state.bits_PW, state.bits_PW.shape[1]
    for g in range(len(any_GW)):
        if state.dirty_G[g]:
            for w in range(words):
                any_GW[g, w] = many_GW[g, w] = np.uint64(0)
            for slot in range(layer.first_G[g], layer.first_G[g + 1]):
                for w in range(words):
                    many_GW[g, w] |= any_GW[g, w] & bits_PW[slot, w]
                    any_GW[g, w] |= bits_PW[slot, w]
            state.reach_G[g] = row_ones(any_GW, g)
            state.stale_N[layer.node_G[g]] = layer.price_5[2] + layer.price_5[4] != 0.0
            state.dirty_G[g] = False
    for n in range(len(any_NW)):
        if state.stale_N[n]:
            for w in range(words):
                any_NW[n, w] = many_NW[n, w] = np.uint64(0)
            for g in range(len(any_GW)):
                if layer.node_G[g] == n:
                    for w in range(words):
                        many_NW[n, w] |= many_GW[g, w] | (any_NW[n, w] & any_GW[g, w])
                        any_NW[n, w] |= any_GW[g, w]
            state.reach_N[n] = row_ones(any_NW, n)
            state.stale_N[n] = False


@inlined
def weigh(layer: Layer, state: State, device: int, expert: int, share: float) -> None:
    """Add a share of an expert's load (and of how it drifts from block to block) to a device."""
    state.load_G[device] += share * layer.load_E[expert]
    square = 0.0
    for b in range(layer.drift_EB.shape[1]):
        state.drift_GB[device, b] += share * layer.drift_EB[expert, b]
        square += state.drift_GB[device, b] * state.drift_GB[device, b]
    state.peak_G[device] = state.load_G[device] + math.sqrt(square)


@compiled
def serve(layer: Layer, state: State, expert: int, new_X: Ints, new: int) -> None:
    """Give an expert the (sorted) slots `new_X[:new]`: its loads and bit sets move, devices touched turn dirty."""
    old = state.count_E[expert]
    home_X = state.home_EX[expert]
    for r in range(old):
        g = layer.device_P[home_X[r]]
        weigh(layer, state, g, expert, -1.0 / old)
        if old != new or home_X[r] != new_X[r]:
            state.dirty_G[g] = True
    for r in range(new):
        slot = new_X[r]
        g = layer.device_P[slot]
        weigh(layer, state, g, expert, 1.0 / new)
        if old != new or home_X[r] != slot:
            state.dirty_G[g] = True
            turn = new * (new - 1) // 2 + r
            size = np.int64(0)
            for w in range(state.bits_PW.shape[1]):
                state.bits_PW[slot, w] = layer.member_EW[expert, w] & layer.turn_RW[turn, w]
                size += ones(state.bits_PW[slot, w])
            state.size_P[slot] = size
            home_X[r] = slot
    state.count_E[expert] = new


@compiled
def evaluate(layer: Layer, state: State) -> None:
    """Fill the state from its slots."""
    state.load_G[:] = 0.0
    state.drift_GB[:] = 0.0
    state.count_E[:] = 0
    home_EX = np.zeros_like(state.home_EX)
    count_E = np.zeros_like(state.count_E)
    for slot in range(len(state.slots_P)):
        expert = state.slots_P[slot]
        home_EX[expert, count_E[expert]] = slot
        count_E[expert] += 1
    for expert in range(len(count_E)):
        serve(layer, state, expert, home_EX[expert], count_E[expert])
    state.dirty_G[:] = True
    refresh(layer, state)


@inlined
def above(layer: Layer, busiest: float, highest: float) -> float:
    """How far the highest load and the highest peak (load with drift), over the mean load, exceed their limits."""
    return max(0.0, busiest / layer.mean - layer.load_limit, highest / layer.mean - layer.peak_limit)


@inlined
def excess(layer: Layer, state: State) -> float:
    """`above` of the devices as they are."""
    busiest = highest = 0.0
    for g in range(len(state.load_G)):
        busiest = max(busiest, state.load_G[g])
        highest = max(highest, state.peak_G[g])
    return above(layer, busiest, highest)


@inlined
def spread(layer: Layer, state: State) -> float:
    """Priced distinct devices and nodes per token, in sum and at the busiest."""
    devices = nodes = 0.0
    most_devices = most_nodes = np.int64(0)
    for reach in state.reach_G:
        devices += reach
        most_devices = max(most_devices, reach)
    for reach in state.reach_N:
        nodes += reach
        most_nodes = max(most_nodes, reach)
    price_5 = layer.price_5
    peaks = price_5[3] * most_devices + price_5[4] * most_nodes
    return float(price_5[1] * devices + price_5[2] * nodes + peaks) / layer.tokens


@inlined
def newcomer(layer: Layer, device: int, expert: int) -> float:
    """Price of having the expert on the device: of a move, unless it is there now."""
    return layer.move if layer.live_GE.size and not layer.live_GE[device, expert] else 0.0


@inlined
def moves(layer: Layer, state: State) -> float:
    """Priced moves from the live plan."""
    total = 0.0
    if layer.live_GE.size:
        for slot in range(len(state.slots_P)):
            total += newcomer(layer, layer.device_P[slot], state.slots_P[slot])
    return total


@inlined
def cost(layer: Layer, state: State) -> float:
    """What the search minimises."""
    return float(spread(layer, state) + layer.price_5[0] * excess(layer, state) + moves(layer, state))


@inlined
def pinned(layer: Layer, device: int, expert: int) -> bool:
    """Whether the device must keep the expert."""
    return bool(layer.pin_GE.size) and layer.pin_GE[device, expert]


@inlined
def barred(layer: Layer, state: State, expert: int, device: int, leaving: int) -> bool:
    """Whether what the device holds, but for slot `leaving`, must be kept apart from the expert."""
    if layer.apart_EE.size:
        for slot in range(layer.first_G[device], layer.first_G[device + 1]):
            if slot != leaving and layer.apart_EE[expert, state.slots_P[slot]]:
                return True
    return False
