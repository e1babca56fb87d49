"""Simulated annealing of one layer's slots against the token sets themselves, and the descent that ends it.

Moves swap two slots or turn one into a further replica; pins and experts kept apart are never broken by a move that is
made from slots that keep them. Suffixes and cost: `moesim_solvers.placement.state`.
"""

from __future__ import annotations

import math

import numpy as np

from moesim.jit import borrowed, compiled, inlined, ones
from moesim_solvers.placement.bits import Words, random_unit
from moesim_solvers.placement.state import (
    Bools,
    Floats,
    Ints,
    Layer,
    State,
    above,
    barred,
    cost,
    excess,
    newcomer,
    pinned,
    refresh,
    serve,
    spread,
    weigh,
)

SWAP, CROSS, REPLACE = 0, 1, 2  # kinds of move
RARE = 0.1  # share of moves of the two dear kinds, where there are replicas


@inlined
def reach_after(any_DW: Words, many_DW: Words, d: int, bits_PW: Words, leave: int, enter: int) -> np.int64:
    """Tokens that device (or node) d serves once slot `leave` left it and `enter` came."""
    total = np.int64(0)
    for w in range(any_DW.shape[1]):
        total += ones(many_DW[d, w] | (any_DW[d, w] & ~bits_PW[leave, w]) | bits_PW[enter, w])
    return total


@inlined
def spread_after(price: float, peak_price: float, reach_D: Ints, a: int, b: int, after_a: np.int64, after_b: np.int64) -> float:
    """Change of priced destinations, times tokens, once destinations a and b serve so many tokens."""
    change = price * float(after_a + after_b - reach_D[a] - reach_D[b])
    if peak_price != 0.0:
        most, most_after = max(reach_D[a], reach_D[b]), max(after_a, after_b)
        for d in range(len(reach_D)):
            if d != a and d != b:
                most, most_after = max(most, reach_D[d]), max(most_after, reach_D[d])
        change += peak_price * float(most_after - most)
    return change


@inlined
def lead(reach_D: Ints, a: int, b: int) -> float:
    """Tokens by which the busier of destinations a and b is ahead of all others."""
    most = np.int64(0)
    for d in range(len(reach_D)):
        if d != a and d != b:
            most = max(most, reach_D[d])
    return float(max(reach_D[a], reach_D[b], most) - most)


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
            over = r == count - 1 or home_X[r + 1] > enter
            return r if below and over else -1
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
    """Swap slots i and j if possible and if priced spread, moves and price · excess grow by less than `allow`.

    Kind SWAP leaves the numbering of replicas alone (cheap), CROSS may renumber them, REPLACE turns slot i into a
    further replica of slot j's expert instead.
    """
    x, y = state.slots_P[i], state.slots_P[j]
    g, h = layer.device_P[i], layer.device_P[j]
    if x == y or g == h or pinned(layer, g, x) or holds(layer, state, y, g) or barred(layer, state, y, g, i):
        return False
    allow -= newcomer(layer, g, y) - newcomer(layer, g, x)
    if kind == REPLACE:
        if state.count_E[x] == 1:
            return False
        return reassign(layer, state, i, -1, x, y, price, allow, work_4X)
    if pinned(layer, h, y) or holds(layer, state, x, h) or barred(layer, state, x, h, j):
        return False
    allow -= newcomer(layer, h, x) - newcomer(layer, h, y)
    rank_x, rank_y = rank_after(state, x, i, j), rank_after(state, y, j, i)
    if rank_x < 0 or rank_y < 0:
        return kind == CROSS and reassign(layer, state, i, j, x, y, price, allow, work_4X)

    allow -= price * (excess_after(layer, state, g, h, x, y) - excess(layer, state))
    allow *= layer.tokens
    m, n = layer.node_G[g], layer.node_G[h]
    _, fanout, node_fanout, peak, node_peak = layer.price_5
    if m == n:
        node_fanout = node_peak = 0.0
    # a slot that leaves frees its destination of at most its own tokens: most swaps are refused before any token is counted
    gain = (fanout + node_fanout) * float(state.size_P[i] + state.size_P[j])
    gain += peak * lead(state.reach_G, g, h) + node_peak * (lead(state.reach_N, m, n) if m != n else 0.0)
    if not -gain < allow:
        return False
    if fanout + peak != 0.0:
        after_g = reach_after(state.any_GW, state.many_GW, g, state.bits_PW, i, j)
        after_h = reach_after(state.any_GW, state.many_GW, h, state.bits_PW, j, i)
        allow -= spread_after(fanout, peak, state.reach_G, g, h, after_g, after_h)
    if node_fanout + node_peak != 0.0:
        after_m = reach_after(state.any_NW, state.many_NW, m, state.bits_PW, i, j)
        after_n = reach_after(state.any_NW, state.many_NW, n, state.bits_PW, j, i)
        allow -= spread_after(node_fanout, node_peak, state.reach_N, m, n, after_m, after_n)
    if not allow > 0.0:
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
    state.size_P[i], state.size_P[j] = state.size_P[j], state.size_P[i]
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
def typical_step(layer: Layer, state: State, price: float, tries: int) -> float:
    """Mean change of cost over a random walk (which leaves the state there): the unit of temperature."""
    layer, state = borrowed(layer), borrowed(state)
    work_4X = np.empty((4, state.home_EX.shape[1]), np.int64)
    slots = len(state.slots_P)
    total, made = 0.0, 0
    before = spread(layer, state) + price * excess(layer, state)
    for _ in range(tries):
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
            now = cost(layer, state)
            if now < best_1[0] - 1e-12:
                best_1[0] = now
                for slot in range(slots):
                    best_P[slot] = state.slots_P[slot]


@compiled
def descend(layer: Layer, state: State, fresh_G: Bools) -> bool:
    """Try every swap of two slots once, taking each that helps; returns whether one did.

    Pairs of devices that are not fresh, and have not become so by a swap of this pass, are passed over: their last try failed and
    little else has changed. `fresh_G` returns the devices this pass changed.
    """
    layer, state = borrowed(layer), borrowed(state)
    work_4X = np.empty((4, state.home_EX.shape[1]), np.int64)
    slots = len(state.slots_P)
    changed_G = np.zeros(len(fresh_G), np.bool_)
    better = False
    for i in range(slots):
        g = layer.device_P[i]
        for j in range(i + 1, slots):
            h = layer.device_P[j]
            if not (fresh_G[g] or fresh_G[h] or changed_G[g] or changed_G[h]):
                continue
            if attempt(layer, state, i, j, SWAP, layer.price_5[0], -1e-9, work_4X):
                changed_G[g] = changed_G[h] = better = True
    fresh_G[:] = changed_G
    return better
