"""local-search: the default solver, annealing on the tokens themselves."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.optimize import Capability, Problem, Progress, Solution, Status
from moesim.optimize.migration import Option, chosen, layer_s_L, moves_L
from moesim.plan import Placement
from moesim_solvers.placement.limits import limits_of, overfull

if TYPE_CHECKING:
    from moesim_solvers.placement.limits import Limits
    from moesim_solvers.placement.search import Search

TRAVEL, TRAVEL_REPLICAS = 0.25, 0.01  # price of a device per token inside a node, where a unit of busiest/mean costs 1
PEAK = 0.5  # of travel's price is paid for the busiest port, which sets the time, the rest for the mean, which a sample knows better
SWINGS = 40  # touches of the slots while the price of a move swings about the one at which a budget of moves is spent
FIRST, LEAST = 0.5, 2.0**-14  # prices of a move, in loads: that no move is worth, and that all are
SWING, BAND = 1.5, 0.3  # the price changes by this factor, and turns where moves are so far above or below the budget


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What `Search` is to minimise."""

    busy: float = 1.0
    fanout: float = 1.0
    node_fanout: float = 0.0
    peak: float = 0.0


class LocalSearch:
    """Simulated annealing on the true token sets: load, devices and nodes per token.

    Across nodes, load and travel are priced in seconds by the cost model. Inside one node travel costs about a tenth of load in seconds;
    there it is priced higher, as less travel is what balance alone leaves to gain, and with replicas lower, as these can be spread
    until load is even. Load is what it is expected to be on other tokens, never the sample's own. From a live plan everything is
    priced in seconds, moves too: at the time of their copies over the horizon, and at whatever more it takes to keep a budget of moves.
    """

    name = "local-search"
    solves = "placement"
    capabilities = frozenset(set(Capability) - {Capability.EXACT, Capability.SCENARIOS, Capability.LOADS})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Best placement found; the objective is what `Search` minimised, from a live plan the predicted seconds per layer."""
        from moesim_solvers.placement.search import Search, compile_kernels

        if reason := overfull(problem):
            return Solution(status=Status.INFEASIBLE, placement=None, seed=seed, notes={"reason": reason})
        compile_kernels()
        stop_s = time.monotonic() + time_limit_s
        price, binding = problem.weights, limits_of(problem)
        if problem.cluster.nodes > 1 or problem.constraints.current is not None:
            mode, terms = "priced in seconds", Terms(busy=price.load_s, fanout=price.devices_s, node_fanout=price.nodes_s, peak=PEAK)
        elif problem.slots > problem.model.experts:
            mode, terms = "load first", Terms(fanout=TRAVEL_REPLICAS)
        else:
            mode, terms = "load before travel", Terms(fanout=TRAVEL)

        search = Search(problem.experts_TLK, problem.load_LE, problem.slots_G, problem.cluster.node_G, **asdict(terms), limits=binding)
        if problem.constraints.current is not None:
            picks, finished = _from_live(problem, binding, search, seed=seed, stop_s=stop_s, progress=progress)
            slots_LP, objective, notes = np.array([pick.slots_P for pick in picks], np.int64), float(np.mean([pick.cost for pick in picks])), {}
        else:
            found = search.annealed(seed=seed, stop_s=stop_s, progress=lambda done, cost: progress(done, ""))
            slots_LP, finished, objective = found.slots_LP, found.finished, float(np.mean(found.cost_L))
            notes = {"objective_of_greedy_balance": float(np.mean(found.start_cost_L))}
        return Solution(
            status=Status.FEASIBLE if finished else Status.TIME_LIMIT,
            placement=problem.placement(slots_LP),
            objective=objective,
            seed=seed,
            notes={**notes, "mode": mode},
        )


def _from_live(problem: Problem, limits: Limits, search: Search, *, seed: int, stop_s: float, progress: Progress) -> tuple[list[Option], bool]:
    """What gains most for its moves, one option per layer, and whether time allowed everything.

    Under a budget the price of a move falls until more is spent than there is, rises until less is, and so on (strategic oscillation,
    Glover 1977), each time with a short annealing from the last slots; of all slots seen, each layer takes what pays best within
    the budget. Where no budget binds, slots are annealed at the price the horizon sets.
    """
    rules, load_s = problem.constraints, problem.weights.load_s
    live, budget = rules.current, math.inf if rules.most_moves is None else rules.most_moves
    assert live is not None
    options: list[list[Option]] = [[] for _ in live.layers]

    def offer(placement: Placement) -> int:
        moved_L = moves_L(live, placement)
        for row, slots_P, cost, moves in zip(options, placement.slots_LP, layer_s_L(problem, placement), moved_L, strict=True):
            row.append(Option(slots_P=slots_P, cost=float(cost), moves=int(moves)))
        return int(moved_L.sum())

    slots_LP, price, falls, binds, finished, effort = search.start_LP, FIRST * load_s, True, False, True, 1.0
    offer(problem.placement(slots_LP))
    for swing in range(SWINGS if budget < math.inf else 0):
        until_s = stop_s - (stop_s - time.monotonic()) * (1 - 1 / (SWINGS - swing))
        slots_LP, whole = search.touched(slots_LP, move=price, seed=(seed, swing), effort=effort, stop_s=until_s)
        moves = offer(problem.placement(slots_LP))
        finished &= whole
        effort *= 1.0 if whole else 0.5  # short touches that cool down beat long ones that the clock cuts
        progress((swing + 1) / SWINGS, "")
        binds |= moves > budget
        if not binds and price <= max(limits.move, LEAST * load_s):
            break
        falls = moves < budget * (1 - BAND) if not falls else moves <= budget * (1 + BAND)
        price = max(price / SWING if falls else price * SWING, limits.move)
    if not binds:
        found = search.annealed(seed=seed, stop_s=stop_s, progress=lambda done, cost: progress(done, ""))
        offer(problem.placement(found.slots_LP))
        finished &= found.finished
    return chosen(options, most_moves=rules.most_moves, move_cost=limits.move), finished
