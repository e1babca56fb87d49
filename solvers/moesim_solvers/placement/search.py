"""Placement search: which expert in which slot, so that devices are evenly loaded and tokens travel little.

Every layer on its own, in threads: greedy balance, then rounds of annealing (each four times longer than the one
before, the best kept), each ended by a descent. Stopping early keeps the best found so far. From slots that are good already, a
short and cool annealing alone.
T tokens, L layers, K selections, E experts, P slots (sum of `slots_G`), G devices.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
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
TOUCH = 12  # the last round is so many times longer than a touch
# first and last temperature, in typical changes of cost by a random move
WARM = (0.5, 0.03)
MILD = (0.2, 0.03)  # the last round inside a node
HOT = (2.0, 0.1)  # across nodes, where nodes can share out whole copies of all experts and time allows `SLOW` moves per slot
COOL = (0.05, 0.01)  # a touch
SLOW = 4000

Progress = Callable[[float, float], None]
Slots = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Slots with the objective of each layer; `finished` tells whether time allowed every round."""

    slots_LP: Slots
    cost_L: NDArray[np.float64]
    start_cost_L: NDArray[np.float64]
    finished: bool


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
    seed: int = 0,
    time_limit_s: float = math.inf,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Found:
    """Least cost found by all rounds of annealing; what is minimised, and from what, is told at `Search`.

    time_limit_s : soft limit, looked at every few milliseconds; a result that was not cut off depends on the
        seed only, not on time, threads or process.
    progress : called with the fraction done and the mean cost over layers, after each layer of each round.
    """
    compile_kernels()
    stop_s = time.monotonic() + time_limit_s
    terms = {"busy": busy, "fanout": fanout, "node_fanout": node_fanout, "peak": peak}
    search = Search(experts_TLK, load_LE, slots_G, node_G, **terms, noise=noise, limits=limits, threads=threads)
    return search.annealed(seed=seed, stop_s=stop_s, progress=progress)


class Search:
    """Layers ready to be searched for slots that minimise what their tokens pay:

        busy · busiest / mean device load + fanout · devices per token + node_fanout · nodes per token + move · moves

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

    Raises
    ------
    InputError
        If ids, loads, slots or nodes contradict one another or prices are negative.
    """

    def __init__(
        self,
        experts_TLK: NDArray[np.integer],
        load_LE: ArrayLike,
        slots_G: ArrayLike,
        node_G: ArrayLike,
        *,
        busy: float,
        fanout: float,
        node_fanout: float,
        peak: float,
        noise: bool = True,
        limits: Limits | None = None,
        threads: int | None = None,
    ) -> None:
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
        slots, live = int(first_G[-1]), int(np.count_nonzero(slots_G))
        turn_RW = _turns(len(experts_TLK), min(live, slots - experts + 1))
        nodes_live = len(np.unique(node_G[slots_G > 0]))
        most_moves = min(MOVES * math.cbrt(slots) * (1 if nodes_live == 1 else 2), MOST_WORK / (layers * turn_RW.shape[1] or 1))
        copies = nodes_live > 1 and slots >= 2 * experts and most_moves >= SLOW * slots
        self._most_moves, self._last = int(most_moves), MILD if nodes_live == 1 else HOT if copies else WARM
        self._unit = unit = max(busy, fanout, node_fanout) or 1.0  # the search knows prices of the order of one
        self._threads = threads or os.cpu_count()
        flat, nothing, nothing_EE = 1.0 - peak, np.zeros((0, 0), np.bool_), np.zeros((0, 0))
        price_5 = np.array([busy, flat * fanout, flat * node_fanout, peak * fanout * live, peak * node_fanout * nodes_live]) / unit
        device_P = np.repeat(np.arange(len(slots_G)), slots_G)

        def prepare(layer: int) -> tuple[Layer, Slots]:
            greedy_P = balanced_slots(load_LE[layer], first_G)
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
            start_P = greedy_P if limits.start_LP is None else limits.start_LP[layer].astype(np.int64)
            return given._replace(soft=_softness(given, _state(given, greedy_P, 0), live)), start_P

        with ThreadPoolExecutor(self._threads) as pool:
            prepared = list(pool.map(prepare, range(layers)))
        self._layers = [given for given, _ in prepared]
        self.start_LP = np.array([start_P for _, start_P in prepared])

    def annealed(self, *, seed: int, stop_s: float = math.inf, progress: Progress | None = None) -> Found:
        """Best of all rounds from `start_LP`; `stop_s` is a time of the monotonic clock."""
        starts = zip(self._layers, self.start_LP, strict=True)
        best = [_Best(slots_P=start_P, cost=float(cost(given, _state(given, start_P, 0))), finished=True) for given, start_P in starts]
        start_cost_L = np.array([one.cost for one in best])
        finished = True
        with ThreadPoolExecutor(self._threads) as pool:
            for round_ in range(ROUNDS):
                last = round_ == ROUNDS - 1
                moves, heat = self._most_moves // 4 ** (ROUNDS - 1 - round_), self._last if last else WARM
                jobs = {
                    pool.submit(_anneal, given, start_P, moves, heat, (seed, layer, round_), stop_s): layer
                    for layer, (given, start_P) in enumerate(zip(self._layers, self.start_LP, strict=True))
                }
                for count, job in enumerate(as_completed(jobs), start=1):
                    found, layer = job.result(), jobs[job]
                    finished &= found.finished
                    best[layer] = min(best[layer], found, key=lambda one: one.cost)
                    if progress is not None:
                        work = sum(4.0**r for r in range(round_)) + 4.0**round_ * count / len(jobs)
                        progress(work / sum(4.0**r for r in range(ROUNDS)), self._unit * float(np.mean([one.cost for one in best])))
        return Found(
            slots_LP=np.array([one.slots_P for one in best]),
            cost_L=self._unit * np.array([one.cost for one in best]),
            start_cost_L=self._unit * start_cost_L,
            finished=finished,
        )

    def touched(self, slots_LP: Slots, *, move: float, seed: Sequence[int], effort: float = 1.0, stop_s: float = math.inf) -> tuple[Slots, bool]:
        """Slots no worse than these at this price of a move, by one cool annealing of `effort` times the usual length; and whether time
        allowed it."""
        moves = int(self._most_moves * effort) // TOUCH

        def one(layer: int) -> _Best:
            given = self._layers[layer]._replace(move=move / self._unit)
            return _anneal(given, slots_LP[layer], moves, COOL, (*seed, layer), stop_s)

        with ThreadPoolExecutor(self._threads) as pool:
            found = list(pool.map(one, range(len(slots_LP))))
        return np.array([each.slots_P for each in found]), all(each.finished for each in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    """What annealing left of one layer; `finished`: not cut by the clock."""

    slots_P: Slots
    cost: float
    finished: bool


def _anneal(given: Layer, start_P: Slots, moves: int, heat: tuple[float, float], seed: Sequence[int], stop_s: float) -> _Best:
    """Best of so many moves of annealing from these slots, ended by a descent."""
    draw = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    hot, cold = heat
    state = _state(given, start_P, draw)
    best_P, best_1 = start_P.copy(), np.array([cost(given, state)])
    if time.monotonic() > stop_s:
        return _Best(slots_P=best_P, cost=float(best_1[0]), finished=False)
    step = typical_step(given, state, 200)
    state = _state(given, start_P, draw)
    done = 0
    while step > 0 and done < moves and time.monotonic() < stop_s:
        until = min(done + CHUNK, moves)
        anneal(given, state, best_P, best_1, done, until, moves, hot * step, cold * step)
        done = until
    state = _state(given, best_P, draw)
    fresh_G = np.ones(len(given.node_G), np.bool_)
    while time.monotonic() < stop_s:
        whole = bool(fresh_G.all())
        if descend(given, state, fresh_G):
            continue
        if whole:
            break
        fresh_G[:] = True  # the end is an optimum only when a whole pass says so
    state = _state(given, state.slots_P, draw)
    return _Best(slots_P=state.slots_P, cost=float(cost(given, state)), finished=done == moves or step == 0)


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
