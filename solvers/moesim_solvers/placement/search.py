"""Placement search: which expert in which slot, so that devices are evenly loaded and tokens travel little.

Every layer on its own, in threads: greedy balance, then rounds of annealing (each four times longer than the one
before, the best kept), each ended by a descent. Stopping early keeps the best found so far.
T tokens, L layers, K selections, E experts, P slots (sum of `slots_G`), G devices.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError
from moesim_solvers.placement.annealing import anneal, descend, typical_step
from moesim_solvers.placement.balance import balanced_slots
from moesim_solvers.placement.bits import packed
from moesim_solvers.placement.limits import Limits
from moesim_solvers.placement.state import Layer, State, cost, evaluate

NO_SELECTION = 65535
MOST_TOKENS = 8192  # more do not improve held-out fan-out, and time grows in proportion
BLOCKS = 32  # consecutive parts of the sample whose differing loads show what to expect of other tokens
SOFTNESS = 2.0  # times the softness that is best for devices of equal, independent noise
STEEPEST = 250.0  # most a load may be above the mean in units of softness, so that its exponential stays finite
MOVES = 150_000  # of the last round, times the cube root of the number of slots; across nodes twice as many
MOST_WORK = 3e9  # moves times words of a token set, over all layers: larger problems get shorter rounds, to end in half a minute
CHUNK = 20_000  # moves between two looks at the clock, about 10 ms
ROUNDS = 3
HOT, WARM, COLD = 0.5, 0.2, 0.03  # temperatures in typical changes of cost by a random move; the last round inside a node starts warm

Progress = Callable[[float, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Slots with the objective of each layer; `finished` tells whether time allowed every round."""

    slots_LP: NDArray[np.int64]
    cost_L: NDArray[np.float64]
    start_cost_L: NDArray[np.float64]
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One layer, its best slots so far."""

    given: Layer
    best_P: NDArray[np.int64]
    best_1: NDArray[np.float64]
    start_P: NDArray[np.int64]


def search_slots(
    experts_TLK: NDArray[np.integer],
    load_LE: ArrayLike,
    slots_G: ArrayLike,
    node_G: ArrayLike,
    *,
    busy: float = 1.0,
    fanout: float = 1.0,
    node_fanout: float = 0.0,
    peak: float = 0.0,
    noise: bool = True,
    limits: Limits | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
    time_limit_s: float = math.inf,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Found:
    """Minimise, in each layer, what its tokens pay:

        busy · busiest / mean device load + fanout · devices per token + node_fanout · nodes per token

    Loads are `load_LE`, split evenly over replicas; travel is counted on the token sets of `experts_TLK`,
    token t going to replica `t mod count` of an expert (rule `even`, replicas numbered by slot).
    With `noise`, loads are a sample's: the ratio becomes a bound of its expectation on as many other tokens, from how loads
    differ between consecutive parts of the sample (experts chosen together also surge together); without, they are exact.

    Parameters
    ----------
    experts_TLK : ids < E, 65535 = no selection. Beyond 8192 tokens an even subset is used.
    slots_G, node_G : slots (0: out of service) and node of each device; device g owns the g-th run of slots.
    peak : share of the price of travel that is paid for the busiest device (and node) instead of the mean one: the
        busiest port sets the time of an exchange.
    limits : pins, experts apart, the live plan, slots to begin with.
    rounds : fewer than three stop after the first, shorter ones; none is the descent alone.
    time_limit_s : soft limit, looked at every few milliseconds; a result that was not cut off depends on the
        seed only, not on time, threads or process.
    progress : called with the fraction done and the mean cost over layers, after each layer of each round.

    Raises
    ------
    InputError
        If ids, loads, slots or nodes contradict one another or prices are negative.
    """
    compile_kernels()
    stop_s = time.monotonic() + time_limit_s
    experts_TLK = np.asarray(experts_TLK)
    load_LE = np.asarray(load_LE, dtype=np.float64)
    slots_G, node_G = np.asarray(slots_G, dtype=np.int64), np.asarray(node_G, dtype=np.int64)
    _check(experts_TLK, load_LE, slots_G, node_G, (busy, fanout, node_fanout, peak, 1.0 - peak))
    limits = limits or Limits()
    node_G = np.unique(node_G, return_inverse=True)[1].astype(np.int64)
    if len(experts_TLK) > MOST_TOKENS:
        experts_TLK = experts_TLK[np.linspace(0, len(experts_TLK) - 1, MOST_TOKENS).astype(np.int64)]
    layers, experts = load_LE.shape
    first_G = np.concatenate([[0], np.cumsum(slots_G)])
    slots = int(first_G[-1])
    live = int(np.count_nonzero(slots_G))
    turn_RW = _turns(len(experts_TLK), min(live, slots - experts + 1))
    inside = len(np.unique(node_G[slots_G > 0])) == 1
    most_moves = min(MOVES * math.cbrt(slots) * (1 if inside else 2), MOST_WORK / (layers * turn_RW.shape[1] or 1))
    unit = max(busy, fanout, node_fanout) or 1.0  # the search knows prices of the order of one
    flat, nodes_live = 1.0 - peak, len(np.unique(node_G[slots_G > 0]))
    price_5 = np.array([busy, flat * fanout, flat * node_fanout, peak * fanout * live, peak * node_fanout * nodes_live]) / unit
    device_P = np.repeat(np.arange(len(slots_G)), slots_G)
    nothing, nothing_EE = np.zeros((0, 0), np.bool_), np.zeros((0, 0))

    def prepare(layer: int) -> _Task:
        start_P = balanced_slots(load_LE[layer], first_G) if limits.start_LP is None else limits.start_LP[layer].astype(np.int64)
        greedy_P = start_P if limits.start_LP is None else balanced_slots(load_LE[layer], first_G)
        given = Layer(
            member_EW=_members(experts_TLK[:, layer], experts),
            turn_RW=turn_RW,
            load_E=load_LE[layer],
            noise_EE=_noise(experts_TLK[:, layer], load_LE[layer]) if noise else nothing_EE,
            first_G=first_G,
            device_P=device_P,
            node_G=node_G,
            price_5=price_5,
            per_mean=live / max(float(load_LE[layer].sum()), 1e-300),
            soft=0.0,
            tokens=max(len(experts_TLK), 1),
            # copies: kernels would be compiled anew, inside the time limit, for arrays that are read-only
            pin_GE=nothing if limits.pinned_LGE is None else np.array(limits.pinned_LGE[layer]),
            apart_EE=nothing if limits.apart_LEE is None else np.array(limits.apart_LEE[layer]),
            live_GE=nothing if limits.live_LGE is None else np.array(limits.live_LGE[layer]),
            move=limits.move / unit,
        )
        given = given._replace(soft=_softness(given, _state(given, greedy_P, 0), live))
        return _Task(given=given, start_P=start_P, best_P=start_P.copy(), best_1=np.array([cost(given, _state(given, start_P, 0))]))

    def improve(layer: int, task: _Task, round_: int) -> bool:
        if time.monotonic() > stop_s:
            return False
        draw = np.random.SeedSequence([seed, layer, round_]).generate_state(1, np.uint64)[0]
        moves = int(most_moves) // 4 ** (ROUNDS - 1 - round_) if rounds else 0
        state = _state(task.given, task.start_P, draw)
        step = typical_step(task.given, state, 200) if moves else 0.0
        state = _state(task.given, task.start_P, draw)
        best_P, best_1 = task.start_P.copy(), np.array([cost(task.given, state)])
        hot = WARM if inside and round_ == ROUNDS - 1 else HOT
        done = 0
        while step > 0 and done < moves and time.monotonic() < stop_s:
            until = min(done + CHUNK, moves)
            anneal(task.given, state, best_P, best_1, done, until, moves, hot * step, COLD * step)
            done = until
        state = _state(task.given, best_P, draw)
        fresh_G = np.ones(len(node_G), np.bool_)
        while time.monotonic() < stop_s:
            whole = bool(fresh_G.all())
            if descend(task.given, state, fresh_G):
                continue
            if whole:
                break
            fresh_G[:] = True  # the end is an optimum only when a whole pass says so
        state = _state(task.given, state.slots_P, draw)
        if cost(task.given, state) < task.best_1[0]:
            task.best_P[:], task.best_1[0] = state.slots_P, cost(task.given, state)
        return done == moves or step == 0

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        tasks = list(pool.map(prepare, range(layers)))
        start_cost_L = np.array([task.best_1[0] for task in tasks])
        finished = True
        for round_ in range(max(rounds, 1)):
            jobs = [pool.submit(improve, layer, task, round_) for layer, task in enumerate(tasks)]
            for count, job in enumerate(as_completed(jobs), start=1):
                finished &= job.result()
                if progress is not None:
                    work = sum(4.0**r for r in range(round_)) + 4.0**round_ * count / layers
                    progress(work / sum(4.0**r for r in range(max(rounds, 1))), unit * float(np.mean([t.best_1[0] for t in tasks])))
    return Found(
        slots_LP=np.array([task.best_P for task in tasks]),
        cost_L=unit * np.array([task.best_1[0] for task in tasks]),
        start_cost_L=unit * start_cost_L,
        finished=finished,
    )


@cache
def compile_kernels() -> None:
    """Compile (or load) every kernel on a problem of two experts, so that no time limit is spent on it."""
    given = Layer(
        member_EW=np.ones((2, 1), np.uint64),
        turn_RW=np.ones((3, 1), np.uint64),
        load_E=np.ones(2),
        noise_EE=np.zeros((2, 2)),
        first_G=np.array([0, 1, 2]),
        device_P=np.array([0, 1]),
        node_G=np.array([0, 1]),
        price_5=np.ones(5),
        per_mean=1.0,
        soft=1.0,
        tokens=1,
        pin_GE=np.zeros((0, 0), np.bool_),
        apart_EE=np.zeros((0, 0), np.bool_),
        live_GE=np.zeros((0, 0), np.bool_),
        move=0.0,
    )
    balanced_slots(given.load_E, given.first_G)
    state = _state(given, np.array([0, 1]), 0)
    cost(given, state)
    typical_step(given, state, 1)
    anneal(given, state, np.array([0, 1]), np.zeros(1), 0, 1, 1, 1.0, 1.0)
    descend(given, state, np.ones(2, np.bool_))


def _state(given: Layer, slots_P: NDArray[np.int64], draw: np.uint64 | int) -> State:
    """A state evaluated at these slots."""
    experts, words = given.member_EW.shape
    slots, devices, nodes = len(slots_P), len(given.node_G), int(given.node_G.max()) + 1
    state = State(
        slots_P=slots_P.copy(),
        home_EX=np.zeros((experts, slots - experts + 2), np.int64),
        count_E=np.zeros(experts, np.int64),
        share_E=np.ones(experts),
        bits_PW=np.zeros((slots, words), np.uint64),
        size_P=np.zeros(slots, np.int64),
        any_GW=np.zeros((devices, words), np.uint64),
        many_GW=np.zeros((devices, words), np.uint64),
        any_NW=np.zeros((nodes, words), np.uint64),
        many_NW=np.zeros((nodes, words), np.uint64),
        reach_G=np.zeros(devices, np.int64),
        reach_N=np.zeros(nodes, np.int64),
        load_G=np.zeros(devices),
        sway_GE=np.zeros((devices, experts)),
        noise_G=np.zeros(devices),
        tail_G=np.zeros(devices),
        busy_2=np.zeros(2),
        dirty_G=np.zeros(devices, np.bool_),
        dirty_N=np.zeros(nodes, np.bool_),
        alone_PG=np.zeros((slots, devices), np.int64),
        alone_PN=np.zeros((slots, nodes), np.int64),
        when_PG=np.zeros((slots, devices), np.int64),
        when_PN=np.zeros((slots, nodes), np.int64),
        born_P=np.zeros(slots, np.int64),
        turned_G=np.zeros(devices, np.int64),
        turned_N=np.zeros(nodes, np.int64),
        clock_1=np.zeros(1, np.int64),
        draw_1=np.array([draw], np.uint64),
    )
    evaluate(given, state)
    return state


def _members(experts_TK: NDArray[np.integer], experts: int) -> NDArray[np.uint64]:
    """Bit sets [E, W] of the tokens that chose each expert."""
    chosen_ET = np.zeros((experts + 1, len(experts_TK)), np.bool_)
    ids_TK = np.where(experts_TK == NO_SELECTION, experts, experts_TK)
    chosen_ET[ids_TK, np.arange(len(experts_TK))[:, None]] = True
    return packed(chosen_ET[:experts])


def _turns(tokens: int, most: int) -> NDArray[np.uint64]:
    """Bit sets [R, W]; row n(n-1)/2 + r holds the tokens that use replica r of n."""
    return np.vstack([packed(np.arange(tokens) % n == np.arange(n)[:, None]) for n in range(1, most + 1)])


def _noise(experts_TK: NDArray[np.integer], load_E: NDArray[np.float64]) -> NDArray[np.float64]:
    """Covariance [E, E] of what the experts' loads differ by on as many other tokens, from how they differ between consecutive
    parts of the sample: twice that of their mean, as those tokens are a sample, too. Empty where there is nothing to compare."""
    if len(experts_TK) < 2:
        return np.zeros((0, 0))
    parts = np.array_split(experts_TK, min(BLOCKS, len(experts_TK)))
    count_BE = np.array([np.bincount(part[part != NO_SELECTION], minlength=len(load_E)) for part in parts])
    share_BE = count_BE / np.maximum(count_BE.sum(1, keepdims=True), 1)
    deviation_BE = (share_BE - share_BE.mean(0)) * load_E.sum()
    return np.asarray(np.einsum("be,bf->ef", deviation_BE, deviation_BE) * (2.0 / (len(parts) * (len(parts) - 1))))


def _softness(given: Layer, state: State, live: int) -> float:
    """Softness of the busiest load: in proportion to the noisiest device's standard deviation σ, in mean loads; σ / √(2 ln G) makes
    the bound tightest for G devices of equal, independent noise. 0 without noise."""
    noise = math.sqrt(max(float(state.noise_G.max()), 0.0)) * given.per_mean
    steep = (float(state.load_G.max()) * given.per_mean - 1.0) / STEEPEST
    return max(SOFTNESS * noise / math.sqrt(2.0 * math.log(max(live, 2))), steep) if noise > 0.0 else 0.0


def _check(
    experts_TLK: NDArray[np.integer],
    load_LE: NDArray[np.float64],
    slots_G: NDArray[np.int64],
    node_G: NDArray[np.int64],
    prices: tuple[float, ...],
) -> None:
    if load_LE.ndim != 2 or experts_TLK.ndim != 3 or experts_TLK.shape[1] != len(load_LE) or not load_LE.size:
        raise InputError(f"experts_TLK {experts_TLK.shape} and load_LE {load_LE.shape} disagree; pass [T, L, K] and [L, E]")
    experts = load_LE.shape[1]
    strange_TLK = (experts_TLK >= experts) & (experts_TLK != NO_SELECTION)
    if strange_TLK.any() or experts_TLK.min(initial=0) < 0:
        token, layer, k = np.argwhere(strange_TLK | (experts_TLK < 0))[0]
        raise InputError(
            f"expert id {experts_TLK[token, layer, k]} at token {token}, layer {layer}; ids are 0..{experts - 1}, or {NO_SELECTION} for no selection"
        )
    if not (np.isfinite(load_LE) & (load_LE >= 0)).all():
        layer, expert = np.argwhere(~(np.isfinite(load_LE) & (load_LE >= 0)))[0]
        raise InputError(f"load {load_LE[layer, expert]} at layer {layer}, expert {expert}; loads are finite, >= 0")
    if slots_G.ndim != 1 or slots_G.shape != node_G.shape or not slots_G.size or slots_G.min() < 0:
        raise InputError(f"slots_G {slots_G.tolist()} and node_G {node_G.tolist()}: one count >= 0 and one node per device")
    if slots_G.sum() < experts or slots_G.max() > experts:
        raise InputError(f"slots_G {slots_G.tolist()} for {experts} experts; give {experts} slots or more in all and no device more than {experts}")
    if not all(math.isfinite(price) and price >= 0 for price in prices):
        raise InputError(f"prices {prices} must be finite and >= 0, peak at most 1")
