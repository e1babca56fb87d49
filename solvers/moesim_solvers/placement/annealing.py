"""Simulated annealing of one layer's slots against the token sets themselves, and the descent that ends it.

Token sets are bit sets: which tokens a slot serves is one row of W words, so a swap of two slots is priced
exactly in 4·W word operations, without looking at a token. E experts, P slots, G devices, N nodes, R row of
`turn_RW`, X most replicas of one expert, W = ceil(tokens / 64) words.

An expert's replicas are numbered by slot; token t uses replica `t mod count` (dispatch rule `even`).
Cost, lower is better, with `excess` how far load exceeds its limits (0: load itself is the cost):

    busy · excess + fanout · devices per token + node_fanout · nodes per token
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim_solvers.placement.bits import Words, ones, random_unit, row_ones
from moesim_solvers.placement.jit import borrowed, compiled, inlined

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SWAP, CROSS, REPLACE = 0, 1, 2  # kinds of move
RARE = 0.1  # share of moves of the two dear kinds, where there are replicas


class Layer(NamedTuple):
    """What is given: one layer's routing and loads, its devices, the price of each term."""

    member_EW: Words
    turn_RW: Words
    load_E: Floats
    drift_EB: Floats
    first_G: Ints
    device_P: Ints
    node_G: Ints
    price_3: Floats
    mean: float
    load_limit: float
    peak_limit: float
    tokens: int


class State(NamedTuple):
    """What moves: the slots and all that follows from them (`any`: >= 1 slot serves the token, `many`: >= 2)."""

    slots_P: Ints
    home_EX: Ints
    count_E: Ints
    bits_PW: Words
    any_GW: Words
    many_GW: Words
    any_NW: Words
    many_NW: Words
    reach_G: Ints
    reach_N: Ints
    load_G: Floats
    drift_GB: Floats
    peak_G: Floats
    dirty_G: NDArray[np.bool_]
    stale_N: NDArray[np.bool_]
    draw_1: Words


@inlined
def reach_after(any_DW: Words, many_DW: Words, d: int, bits_PW: Words, leave: int, enter: int) -> np.int64:
    """Tokens that device (or node) d serves once slot `leave` left it and `enter` came."""
    total = np.int64(0)
    for w in range(any_DW.shape[1]):
        total += ones(many_DW[d, w] | (any_DW[d, w] & ~bits_PW[leave, w]) | bits_PW[enter, w])
    return total


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
            state.stale_N[layer.node_G[g]] = layer.price_3[2] != 0.0
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
            for w in range(state.bits_PW.shape[1]):
                state.bits_PW[slot, w] = layer.member_EW[expert, w] & layer.turn_RW[turn, w]
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
    """Priced distinct devices and nodes per token."""
    devices = nodes = 0.0
    for reach in state.reach_G:
        devices += reach
    for reach in state.reach_N:
        nodes += reach
    return float(layer.price_3[1] * devices + layer.price_3[2] * nodes) / layer.tokens


@compiled
def moved(home_X: Ints, count: int, leave: int, enter: int, new_X: Ints) -> int:
    """Sorted slots without `leave` and with `enter` (-1: none), written to `new_X`; returns how many."""
    new = 0
    for r in range(count):
        slot = home_X[r]
        if slot == leave:
            continue
        if enter >= 0 and enter < slot:
            new_X[new] = enter
            new += 1
            enter = -1
        new_X[new] = slot
        new += 1
    if enter >= 0:
        new_X[new] = enter
        new += 1
    return new


@inlined
def holds(layer: Layer, state: State, expert: int, device: int) -> bool:
    """Whether the device has a replica of the expert."""
    for r in range(state.count_E[expert]):  # noqa: SIM110 - numba has no generator expressions
        if layer.device_P[state.home_EX[expert, r]] == device:
            return True
    return False


@inlined
def rank_after(state: State, expert: int, leave: int, enter: int) -> int:
    """Rank of the replica at `leave` if moving it to `enter` keeps the order of replicas, else -1."""
    home_X = state.home_EX[expert]
    count = state.count_E[expert]
    for r in range(count):
        if home_X[r] == leave:
            below = r == 0 or home_X[r - 1] < enter
            above = r == count - 1 or home_X[r + 1] > enter
            return r if below and above else -1
    return -1


@inlined
def excess_after(layer: Layer, state: State, g: int, h: int, x: int, y: int) -> float:
    """Excess once a replica of x went from g to h and one of y from h to g."""
    share_x, share_y = 1.0 / state.count_E[x], 1.0 / state.count_E[y]
    shift = share_y * layer.load_E[y] - share_x * layer.load_E[x]
    square_g = square_h = 0.0
    for b in range(layer.drift_EB.shape[1]):
        turn = share_y * layer.drift_EB[y, b] - share_x * layer.drift_EB[x, b]
        at_g, at_h = state.drift_GB[g, b] + turn, state.drift_GB[h, b] - turn
        square_g += at_g * at_g
        square_h += at_h * at_h
    load_g, load_h = state.load_G[g] + shift, state.load_G[h] - shift
    busiest = max(load_g, load_h)
    highest = max(load_g + math.sqrt(square_g), load_h + math.sqrt(square_h))
    for d in range(len(state.peak_G)):
        if d != g and d != h:
            busiest = max(busiest, state.load_G[d])
            highest = max(highest, state.peak_G[d])
    return above(layer, busiest, highest)


@inlined
def attempt(layer: Layer, state: State, i: int, j: int, kind: int, price: float, allow: float, work_4X: Ints) -> bool:
    """Swap slots i and j if possible and if priced spread + price · excess grows by less than `allow`.

    Kind SWAP leaves the numbering of replicas alone (cheap), CROSS may renumber them, REPLACE turns slot i into a
    further replica of slot j's expert instead.
    """
    x, y = state.slots_P[i], state.slots_P[j]
    g, h = layer.device_P[i], layer.device_P[j]
    if x == y or g == h or holds(layer, state, y, g):
        return False
    if kind == REPLACE:
        if state.count_E[x] == 1:
            return False
        return reassign(layer, state, i, -1, x, y, price, allow, work_4X)
    if holds(layer, state, x, h):
        return False
    rank_x, rank_y = rank_after(state, x, i, j), rank_after(state, y, j, i)
    if rank_x < 0 or rank_y < 0:
        return kind == CROSS and reassign(layer, state, i, j, x, y, price, allow, work_4X)

    delta = price * (excess_after(layer, state, g, h, x, y) - excess(layer, state))
    if layer.price_3[1] != 0.0:
        after = reach_after(state.any_GW, state.many_GW, g, state.bits_PW, i, j)
        after += reach_after(state.any_GW, state.many_GW, h, state.bits_PW, j, i)
        delta += layer.price_3[1] * (after - state.reach_G[g] - state.reach_G[h]) / layer.tokens
    m, n = layer.node_G[g], layer.node_G[h]
    if layer.price_3[2] != 0.0 and m != n:
        after = reach_after(state.any_NW, state.many_NW, m, state.bits_PW, i, j)
        after += reach_after(state.any_NW, state.many_NW, n, state.bits_PW, j, i)
        delta += layer.price_3[2] * (after - state.reach_N[m] - state.reach_N[n]) / layer.tokens
    if not delta < allow:
        return False
    swap(layer, state, i, j, rank_x, rank_y)
    return True


@inlined
def swap(layer: Layer, state: State, i: int, j: int, rank_x: int, rank_y: int) -> None:
    """Exchange the replicas in slots i and j, which keep their ranks."""
    x, y = state.slots_P[i], state.slots_P[j]
    g, h = layer.device_P[i], layer.device_P[j]
    share_x, share_y = 1.0 / state.count_E[x], 1.0 / state.count_E[y]
    weigh(layer, state, g, x, -share_x)
    weigh(layer, state, h, y, -share_y)
    weigh(layer, state, g, y, share_y)
    weigh(layer, state, h, x, share_x)
    for w in range(state.bits_PW.shape[1]):
        state.bits_PW[i, w], state.bits_PW[j, w] = state.bits_PW[j, w], state.bits_PW[i, w]
    state.slots_P[i], state.slots_P[j] = y, x
    state.home_EX[x, rank_x], state.home_EX[y, rank_y] = j, i
    state.dirty_G[g] = state.dirty_G[h] = True
    refresh(layer, state)


@compiled
def reassign(layer: Layer, state: State, i: int, j: int, x: int, y: int, price: float, allow: float, work_4X: Ints) -> bool:
    """Move in which replicas change number or count: do it, look, take it back if too dear. j = -1: drop x at i."""
    old_x, old_y, new_x, new_y = work_4X[0], work_4X[1], work_4X[2], work_4X[3]
    nx, ny = state.count_E[x], state.count_E[y]
    for r in range(nx):
        old_x[r] = state.home_EX[x, r]
    for r in range(ny):
        old_y[r] = state.home_EX[y, r]
    before = spread(layer, state) + price * excess(layer, state)
    mx = moved(old_x, nx, i, j, new_x)
    my = moved(old_y, ny, j, i, new_y)
    serve(layer, state, x, new_x, mx)
    serve(layer, state, y, new_y, my)
    refresh(layer, state)
    if spread(layer, state) + price * excess(layer, state) - before < allow:
        state.slots_P[i] = y
        if j >= 0:
            state.slots_P[j] = x
        return True
    serve(layer, state, y, old_y, ny)
    serve(layer, state, x, old_x, nx)
    refresh(layer, state)
    return False


@compiled
def typical_step(layer: Layer, state: State, price: float, moves: int) -> float:
    """Mean change of cost over a random walk (which leaves the state there): the unit of temperature."""
    layer, state = borrowed(layer), borrowed(state)
    work_4X = np.empty((4, state.home_EX.shape[1]), np.int64)
    slots = len(state.slots_P)
    total, made = 0.0, 0
    before = spread(layer, state) + price * excess(layer, state)
    for _ in range(moves):
        i, j = int(random_unit(state.draw_1) * slots), int(random_unit(state.draw_1) * slots)
        if attempt(layer, state, i, j, SWAP, price, math.inf, work_4X):
            after = spread(layer, state) + price * excess(layer, state)
            total += abs(after - before)
            made += 1
            before = after
    return total / max(made, 1)


@compiled
def anneal(
    layer: Layer,
    state: State,
    best_P: Ints,
    best_1: Floats,
    begin: int,
    end: int,
    moves: int,
    hot: float,
    cold: float,
    soft: float,
    firm: float,
) -> None:
    """Steps begin..end of `moves` Metropolis steps, cooling from `hot` to `cold` while load's price goes from
    `soft` to `firm`, both geometrically; the best slots seen (at the full price) go to `best_P`."""
    layer, state = borrowed(layer), borrowed(state)
    slots = len(state.slots_P)
    spare = slots > len(layer.load_E)
    work_4X = np.empty((4, state.home_EX.shape[1]), np.int64)
    heat = price = 0.0
    for step in range(begin, end):
        if step % 64 == 0 or step == begin:
            heat = hot * (cold / hot) ** (step / moves)
            price = soft * (firm / max(soft, 1e-300)) ** (step / moves)
        i = int(random_unit(state.draw_1) * slots)
        j = int(random_unit(state.draw_1) * slots)
        kind = SWAP
        if spare and random_unit(state.draw_1) < RARE:
            kind = CROSS if random_unit(state.draw_1) < 0.5 else REPLACE
        allow = -heat * math.log(1.0 - random_unit(state.draw_1))
        if attempt(layer, state, i, j, kind, price, allow, work_4X):
            now = spread(layer, state) + layer.price_3[0] * excess(layer, state)
            if now < best_1[0] - 1e-12:
                best_1[0] = now
                for slot in range(slots):
                    best_P[slot] = state.slots_P[slot]


@compiled
def descend(layer: Layer, state: State) -> bool:
    """Try every swap of two slots once, taking each that helps; returns whether one did."""
    layer, state = borrowed(layer), borrowed(state)
    work_4X = np.empty((4, state.home_EX.shape[1]), np.int64)
    slots = len(state.slots_P)
    better = False
    for i in range(slots):
        for j in range(i + 1, slots):
            better |= attempt(layer, state, i, j, SWAP, layer.price_3[0], -1e-9, work_4X)
    return better
