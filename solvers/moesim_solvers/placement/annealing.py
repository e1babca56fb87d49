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
    barred,
    busy_ratio,
    cost,
    newcomer,
    pinned,
    refresh,
    serve,
    spread,
    tail,
    weigh,
)

SWAP, CROSS, REPLACE = 0, 1, 2  # kinds of move
RARE = 0.1  # share of moves of the two dear kinds, where there are replicas


@inlined
def alone(
    any_DW: Words, many_DW: Words, bits_PW: Words, alone_PD: Ints, when_PD: Ints, since: np.int64, now: np.int64, slot: int, d: int, here: bool
) -> np.int64:
    """Tokens that destination d serves (`here`: the slot is there) or would serve through this slot alone; kept in `alone_PD`."""
    if when_PD[slot, d] < since:
        total = np.int64(0)
        if here:
            for w in range(bits_PW.shape[1]):
                total += ones(bits_PW[slot, w] & ~many_DW[d, w])
        else:
            for w in range(bits_PW.shape[1]):
                total += ones(bits_PW[slot, w] & ~any_DW[d, w])
        alone_PD[slot, d], when_PD[slot, d] = total, now
    return np.int64(alone_PD[slot, d])


@inlined
def shared(many_DW: Words, a: int, b: int, bits_PW: Words, i: int, j: int) -> tuple[np.int64, np.int64]:
    """Tokens of both slots that destination a, and b, serves through no third one."""
    at_a = at_b = np.int64(0)
    for w in range(bits_PW.shape[1]):
        both = bits_PW[i, w] & bits_PW[j, w]
        at_a += ones(both & ~many_DW[a, w])
        at_b += ones(both & ~many_DW[b, w])
    return at_a, at_b


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
def busy_after(layer: Layer, state: State, g: int, h: int, x: int, y: int) -> float:
    """Busy ratio once a replica of x went from g to h and one of y from h to g."""
    share_x, share_y = state.share_E[x], state.share_E[y]
    shift = share_y * layer.load_E[y] - share_x * layer.load_E[x]
    load_g, load_h = state.load_G[g] + shift, state.load_G[h] - shift
    if layer.soft > 0.0:
        sway_GE, noise_EE = state.sway_GE, layer.noise_EE
        own = share_x * share_x * noise_EE[x, x] + share_y * share_y * noise_EE[y, y] - 2.0 * share_x * share_y * noise_EE[x, y]
        noise_g = state.noise_G[g] + own + 2.0 * (share_y * sway_GE[g, y] - share_x * sway_GE[g, x])
        noise_h = state.noise_G[h] + own + 2.0 * (share_x * sway_GE[h, x] - share_y * sway_GE[h, y])
        rest = state.busy_2[0] - state.tail_G[g] - state.tail_G[h]
        return busy_ratio(layer, rest + tail(layer, load_g, noise_g) + tail(layer, load_h, noise_h))
    busiest = max(load_g, load_h)
    for d in range(len(state.load_G)):
        if d != g and d != h:
            busiest = max(busiest, state.load_G[d])
    return float(busiest * layer.per_mean)


@inlined
def attempt(layer: Layer, state: State, i: int, j: int, kind: int, allow: float, work_4X: Ints) -> bool:
    """Swap slots i and j if possible and if the cost grows by less than `allow`.

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
        return reassign(layer, state, i, -1, x, y, allow, work_4X)
    if pinned(layer, h, y) or holds(layer, state, x, h) or barred(layer, state, x, h, j):
        return False
    allow -= newcomer(layer, h, x) - newcomer(layer, h, y)
    rank_x, rank_y = rank_after(state, x, i, j), rank_after(state, y, j, i)
    if rank_x < 0 or rank_y < 0:
        return kind == CROSS and reassign(layer, state, i, j, x, y, allow, work_4X)

    allow -= layer.price_5[0] * (busy_after(layer, state, g, h, x, y) - state.busy_2[1])
    allow *= layer.tokens
    m, n = layer.node_G[g], layer.node_G[h]
    _, fanout, node_fanout, peak, node_peak = layer.price_5
    near, far = fanout + peak != 0.0, m != n and node_fanout + node_peak != 0.0
    # a slot that leaves frees its destination of at most its own tokens
    most = (fanout + peak + (node_fanout + node_peak if m != n else 0.0)) * float(state.size_P[i] + state.size_P[j])
    if not -most < allow:
        return False
    now, bits_PW = state.clock_1[0], state.bits_PW
    born_i, born_j = state.born_P[i], state.born_P[j]
    after_g = after_h = after_m = after_n = np.int64(0)
    # what the slots serve alone bounds the change from below: most swaps are refused before any token is counted
    least = 0.0
    if near:
        any_GW, many_GW, alone_PG, when_PG = state.any_GW, state.many_GW, state.alone_PG, state.when_PG
        since_g, since_h = state.turned_G[g], state.turned_G[h]
        after_g = state.reach_G[g] - alone(any_GW, many_GW, bits_PW, alone_PG, when_PG, max(born_i, since_g), now, i, g, True)
        after_h = state.reach_G[h] - alone(any_GW, many_GW, bits_PW, alone_PG, when_PG, max(born_j, since_h), now, j, h, True)
        after_g += alone(any_GW, many_GW, bits_PW, alone_PG, when_PG, max(born_j, since_g), now, j, g, False)
        after_h += alone(any_GW, many_GW, bits_PW, alone_PG, when_PG, max(born_i, since_h), now, i, h, False)
        least += spread_after(fanout, peak, state.reach_G, g, h, after_g, after_h)
    if far:
        any_NW, many_NW, alone_PN, when_PN = state.any_NW, state.many_NW, state.alone_PN, state.when_PN
        since_m, since_n = state.turned_N[m], state.turned_N[n]
        after_m = state.reach_N[m] - alone(any_NW, many_NW, bits_PW, alone_PN, when_PN, max(born_i, since_m), now, i, m, True)
        after_n = state.reach_N[n] - alone(any_NW, many_NW, bits_PW, alone_PN, when_PN, max(born_j, since_n), now, j, n, True)
        after_m += alone(any_NW, many_NW, bits_PW, alone_PN, when_PN, max(born_j, since_m), now, j, m, False)
        after_n += alone(any_NW, many_NW, bits_PW, alone_PN, when_PN, max(born_i, since_n), now, i, n, False)
        least += spread_after(node_fanout, node_peak, state.reach_N, m, n, after_m, after_n)
    if not least < allow:
        return False
    change = 0.0
    if near:
        both_g, both_h = shared(state.many_GW, g, h, bits_PW, i, j)
        change += spread_after(fanout, peak, state.reach_G, g, h, after_g + both_g, after_h + both_h)
    if far:
        both_m, both_n = shared(state.many_NW, m, n, bits_PW, i, j)
        change += spread_after(node_fanout, node_peak, state.reach_N, m, n, after_m + both_m, after_n + both_n)
    if not change < allow:
        return False
    swap(layer, state, i, j, rank_x, rank_y)
    return True


@inlined
def swap(layer: Layer, state: State, i: int, j: int, rank_x: int, rank_y: int) -> None:
    """Exchange the replicas in slots i and j, which keep their ranks."""
    x, y = state.slots_P[i], state.slots_P[j]
    g, h = layer.device_P[i], layer.device_P[j]
    m, n = layer.node_G[g], layer.node_G[h]
    share_x, share_y = state.share_E[x], state.share_E[y]
    weigh(layer, state, g, x, -share_x)
    weigh(layer, state, h, y, -share_y)
    weigh(layer, state, g, y, share_y)
    weigh(layer, state, h, x, share_x)
    for w in range(state.bits_PW.shape[1]):
        state.bits_PW[i, w], state.bits_PW[j, w] = state.bits_PW[j, w], state.bits_PW[i, w]
    for d in range(len(state.reach_G)):
        state.alone_PG[i, d], state.alone_PG[j, d] = state.alone_PG[j, d], state.alone_PG[i, d]
        state.when_PG[i, d], state.when_PG[j, d] = state.when_PG[j, d], state.when_PG[i, d]
    for d in range(len(state.reach_N)):
        state.alone_PN[i, d], state.alone_PN[j, d] = state.alone_PN[j, d], state.alone_PN[i, d]
        state.when_PN[i, d], state.when_PN[j, d] = state.when_PN[j, d], state.when_PN[i, d]
    state.born_P[i], state.born_P[j] = state.born_P[j], state.born_P[i]
    state.size_P[i], state.size_P[j] = state.size_P[j], state.size_P[i]
    state.slots_P[i], state.slots_P[j] = y, x
    state.home_EX[x, rank_x], state.home_EX[y, rank_y] = j, i
    state.dirty_G[g] = state.dirty_G[h] = True
    state.clock_1[0] += 1
    state.turned_G[g] = state.turned_G[h] = state.clock_1[0]
    if m != n:  # a node's tokens do not change by a swap inside it
        state.dirty_N[m] = state.dirty_N[n] = True
        state.turned_N[m] = state.turned_N[n] = state.clock_1[0]
    refresh(layer, state)


@inlined
def noted(layer: Layer, state: State, slots_X: Ints, count: int) -> None:
    """Note that these slots and their destinations have just changed."""
    for r in range(count):
        g = layer.device_P[slots_X[r]]
        state.born_P[slots_X[r]] = state.turned_G[g] = state.turned_N[layer.node_G[g]] = state.clock_1[0]


@compiled
def reassign(layer: Layer, state: State, i: int, j: int, x: int, y: int, allow: float, work_4X: Ints) -> bool:
    """Move in which replicas change number or count: do it, look, take it back if too dear. j = -1: drop x at i."""
    old_x, old_y, new_x, new_y = work_4X[0], work_4X[1], work_4X[2], work_4X[3]
    nx, ny = state.count_E[x], state.count_E[y]
    for r in range(nx):
        old_x[r] = state.home_EX[x, r]
    for r in range(ny):
        old_y[r] = state.home_EX[y, r]
    before = spread(layer, state) + layer.price_5[0] * state.busy_2[1]
    mx = moved(old_x, nx, i, j, new_x)
    my = moved(old_y, ny, j, i, new_y)
    serve(layer, state, x, new_x, mx)
    serve(layer, state, y, new_y, my)
    refresh(layer, state)
    if spread(layer, state) + layer.price_5[0] * state.busy_2[1] - before < allow:
        state.slots_P[i] = y
        if j >= 0:
            state.slots_P[j] = x
        state.clock_1[0] += 1
        noted(layer, state, old_x, nx)
        noted(layer, state, old_y, ny)
        noted(layer, state, new_x, mx)
        noted(layer, state, new_y, my)
        return True
    serve(layer, state, y, old_y, ny)
    serve(layer, state, x, old_x, nx)
    refresh(layer, state)
    return False


@compiled
def typical_step(layer: Layer, state: State, tries: int) -> float:
    """Mean change of cost over a random walk (which leaves the state there): the unit of temperature."""
    layer, state = borrowed(layer), borrowed(state)
    work_4X = np.empty((4, state.home_EX.shape[1]), np.int64)
    slots = len(state.slots_P)
    total, made = 0.0, 0
    before = cost(layer, state)
    for _ in range(tries):
        i, j = int(random_unit(state.draw_1) * slots), int(random_unit(state.draw_1) * slots)
        if attempt(layer, state, i, j, SWAP, math.inf, work_4X):
            after = cost(layer, state)
            total += abs(after - before)
            made += 1
            before = after
    return total / max(made, 1)


@compiled
def anneal(layer: Layer, state: State, best_P: Ints, best_1: Floats, begin: int, end: int, moves: int, hot: float, cold: float) -> None:
    """Steps begin..end of `moves` Metropolis steps, cooling geometrically from `hot` to `cold`; the best slots seen go to `best_P`."""
    layer, state = borrowed(layer), borrowed(state)
    slots = len(state.slots_P)
    spare = slots > len(layer.load_E)
    work_4X = np.empty((4, state.home_EX.shape[1]), np.int64)
    heat = 0.0
    for step in range(begin, end):
        if step % 64 == 0 or step == begin:
            heat = hot * (cold / hot) ** (step / moves)
        i = int(random_unit(state.draw_1) * slots)
        j = int(random_unit(state.draw_1) * slots)
        kind = SWAP
        if spare and random_unit(state.draw_1) < RARE:
            kind = CROSS if random_unit(state.draw_1) < 0.5 else REPLACE
        allow = -heat * math.log(1.0 - random_unit(state.draw_1))
        if attempt(layer, state, i, j, kind, allow, work_4X):
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
            if attempt(layer, state, i, j, SWAP, -1e-9, work_4X):
                changed_G[g] = changed_G[h] = better = True
    fresh_G[:] = changed_G
    return better
