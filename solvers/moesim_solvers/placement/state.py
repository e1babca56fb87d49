"""One layer's slots and all that follows from them: loads, token bit sets, distinct destinations, moves from a live plan.

Which tokens a slot serves is one row of W words, so that a swap of two slots is priced exactly in 4·W word operations,
without looking at a token. E experts, P slots, G devices, N nodes, B parts of the sample, R row of `turn_RW`,
X most replicas of one expert, W = ceil(tokens / 64) words.

An expert's replicas are numbered by slot; token t uses replica `t mod count` (dispatch rule `even`).
Cost, lower is better:

    busy · busiest/mean load (softened by what loads may differ by on other tokens) + fanout · devices per token + node_fanout · nodes per token
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
    noise_EE  covariance of what the experts' loads may differ by in other tokens of such traffic; empty: loads are exact
    per_mean  1 / mean load of a device
    soft      softness of the busiest load, see `busy_ratio`; 0: the busiest load itself
    pin_GE    True where a device must keep an expert; empty when there are no pins
    apart_EE  True for two experts that no device may hold both; empty when there are none
    live_GE   True where a device holds an expert now; empty when moves are free
    """

    member_EW: Words
    turn_RW: Words
    load_E: Floats
    noise_EE: Floats
    first_G: Ints
    device_P: Ints
    node_G: Ints
    price_5: Floats
    per_mean: float
    soft: float
    tokens: int
    pin_GE: Bools
    apart_EE: Bools
    live_GE: Bools
    move: float


class State(NamedTuple):
    """What moves: the slots and all that follows from them (`any`: >= 1 slot serves the token, `many`: >= 2).

    sway_GE, noise_G  covariance of a device's load with each expert's, and its variance
    tail_G, busy_2    terms of the soft maximum of loads; their sum, and the busy ratio
    alone_PG          tokens that a device serves, or would serve, through this slot alone; alone_PN the same of nodes. Entries are
                      kept until what they were counted from changes: up to date if noted in `when_P*` not before slot and
                      destination last changed (`born_P`, `turned_G`, `turned_N`; times are of `clock_1`)
    """

    slots_P: Ints
    home_EX: Ints
    count_E: Ints
    share_E: Floats
    bits_PW: Words
    size_P: Ints
    any_GW: Words
    many_GW: Words
    any_NW: Words
    many_NW: Words
    reach_G: Ints
    reach_N: Ints
    load_G: Floats
    sway_GE: Floats
    noise_G: Floats
    tail_G: Floats
    busy_2: Floats
    dirty_G: Bools
    dirty_N: Bools
    alone_PG: Ints
    alone_PN: Ints
    when_PG: Ints
    when_PN: Ints
    born_P: Ints
    turned_G: Ints
    turned_N: Ints
    clock_1: Ints
    draw_1: Words


@inlined
def tail(layer: Layer, load: float, noise: float) -> float:
    """A device's term of the soft maximum: the expected exponential of its load, normal with variance `noise`; linear beyond e^300."""
    unit = layer.per_mean / layer.soft
    power = load * unit - 1.0 / layer.soft + 0.5 * noise * unit * unit
    return math.exp(min(power, 300.0)) * (1.0 + max(power - 300.0, 0.0))


@inlined
def busy_ratio(layer: Layer, sum_of_tails: float) -> float:
    """Bound of the expected busiest/mean load on other tokens: E max x <= soft · log Σ E e^(x / soft) (Jensen)."""
    return 1.0 + layer.soft * math.log(max(sum_of_tails, 1.0))


@compiled
def refresh(layer: Layer, state: State) -> None:
    """Recount the devices and nodes marked dirty from the slots' bit sets; and who is busiest."""
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
            if layer.soft > 0.0 and layer.first_G[g] < layer.first_G[g + 1]:
                state.tail_G[g] = tail(layer, state.load_G[g], state.noise_G[g])
            state.dirty_G[g] = False
    if layer.price_5[2] + layer.price_5[4] != 0.0:
        for n in range(len(any_NW)):
            if state.dirty_N[n]:
                for w in range(words):
                    any_NW[n, w] = many_NW[n, w] = np.uint64(0)
                for g in range(len(any_GW)):
                    if layer.node_G[g] == n:
                        for w in range(words):
                            many_NW[n, w] |= many_GW[g, w] | (any_NW[n, w] & any_GW[g, w])
                            any_NW[n, w] |= any_GW[g, w]
                state.reach_N[n] = row_ones(any_NW, n)
                state.dirty_N[n] = False
    if layer.soft > 0.0:
        state.busy_2[0] = 0.0
        for g in range(len(any_GW)):
            state.busy_2[0] += state.tail_G[g]
        state.busy_2[1] = busy_ratio(layer, state.busy_2[0])
    else:
        state.busy_2[1] = state.load_G.max() * layer.per_mean


@inlined
def weigh(layer: Layer, state: State, device: int, expert: int, share: float) -> None:
    """Add a share of an expert's load, and of its noise, to a device."""
    state.load_G[device] += share * layer.load_E[expert]
    if layer.noise_EE.size:
        state.noise_G[device] += share * (2.0 * state.sway_GE[device, expert] + share * layer.noise_EE[expert, expert])
        for e in range(len(layer.load_E)):
            state.sway_GE[device, e] += share * layer.noise_EE[expert, e]


@compiled
def serve(layer: Layer, state: State, expert: int, new_X: Ints, new: int) -> None:
    """Give an expert the (sorted) slots `new_X[:new]`: its loads and bit sets move, devices touched turn dirty."""
    old = state.count_E[expert]
    home_X = state.home_EX[expert]
    for r in range(old):
        g = layer.device_P[home_X[r]]
        weigh(layer, state, g, expert, -1.0 / old)
        if old != new or home_X[r] != new_X[r]:
            state.dirty_G[g] = state.dirty_N[layer.node_G[g]] = True
    for r in range(new):
        slot = new_X[r]
        g = layer.device_P[slot]
        weigh(layer, state, g, expert, 1.0 / new)
        if old != new or home_X[r] != slot:
            state.dirty_G[g] = state.dirty_N[layer.node_G[g]] = True
            turn = new * (new - 1) // 2 + r
            size = np.int64(0)
            for w in range(state.bits_PW.shape[1]):
                state.bits_PW[slot, w] = layer.member_EW[expert, w] & layer.turn_RW[turn, w]
                size += ones(state.bits_PW[slot, w])
            state.size_P[slot] = size
            home_X[r] = slot
    state.count_E[expert] = new
    state.share_E[expert] = 1.0 / new


@compiled
def evaluate(layer: Layer, state: State) -> None:
    """Fill the state from its slots."""
    state.load_G[:] = 0.0
    state.noise_G[:] = 0.0
    state.sway_GE[:] = 0.0
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
    state.dirty_N[:] = True
    refresh(layer, state)
    state.clock_1[0] += 1
    state.born_P[:] = state.clock_1[0]
    state.turned_G[:] = state.clock_1[0]
    state.turned_N[:] = state.clock_1[0]


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
    return float(spread(layer, state) + layer.price_5[0] * state.busy_2[1] + moves(layer, state))


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
