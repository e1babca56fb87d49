"""local-search: the default solver, annealing on the tokens themselves."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Problem, Progress, Solution, Status
from moesim.optimize.migration import Option, chosen, layer_s_L, moves_L
from moesim_solvers.placement.limits import limits_of, overfull

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesim_solvers.placement.limits import Limits
    from moesim_solvers.placement.search import Found

    Search = Callable[[Limits, float, int], Found]  # limits, share of the time left, rounds

TRAVEL, TRAVEL_REPLICAS = 0.25, 0.01  # price of a device per token inside a node, where a unit of busiest/mean costs 1
PEAK = 0.5  # of travel's price is paid for the busiest port, which sets the time, the rest for the mean, which a sample knows better
LOOKS = 8  # descents that find the price of a move at which the budget is spent


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What `search_slots` is to minimise."""

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
        """Best placement found; the objective is what `search_slots` minimised."""
        from moesim_solvers.placement.search import ROUNDS, compile_kernels, search_slots

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

        def search(limits: Limits, share: float = 1.0, rounds: int = ROUNDS) -> Found:
            return search_slots(
                problem.experts_TLK,
                problem.load_LE,
                problem.slots_G,
                problem.cluster.node_G,
                **asdict(terms),
                limits=limits,
                rounds=rounds,
                seed=seed,
                time_limit_s=max(stop_s - time.monotonic(), 0.0) * share,
                progress=lambda done, cost: progress(done, ""),
            )

        if binding.live_LGE is None:
            found = search(binding)
            slots_LP = found.slots_LP
        else:
            found, slots_LP = self._from_live(problem, binding, search)
        return Solution(
            status=Status.FEASIBLE if found.finished else Status.TIME_LIMIT,
            placement=problem.placement(slots_LP),
            objective=float(np.mean(found.cost_L)),
            seed=seed,
            notes={"objective_of_greedy_balance": float(np.mean(found.start_cost_L)), "mode": mode},
        )

    @staticmethod
    def _from_live(problem: Problem, limits: Limits, search: Search) -> tuple[Found, NDArray[np.int64]]:
        """Slots [L, P] that gain most for their moves.

        Descents from the live slots bracket the price of a move at which the budget is spent, annealing starts from there; of all
        that was found and the live slots each layer takes what pays best within the budget.
        """
        from moesim_solvers.placement.search import ROUNDS

        rules, live, load_s = problem.constraints, problem.constraints.current, problem.weights.load_s
        assert live is not None
        stays = limits.start_LP is live.slots_LP
        options: list[list[Option]] = [[] for _ in live.layers]
        if stays:
            for row, slots_P, cost in zip(options, live.slots_LP, layer_s_L(problem, live), strict=True):
                row.append(Option(slots_P=slots_P, cost=float(cost), moves=0))

        def look(price: float, share: float, rounds: int) -> tuple[Found, int]:
            found = search(replace(limits, move=price), share, rounds)
            placement = problem.placement(found.slots_LP)
            moved_L = moves_L(live, placement)
            for row, slots_P, cost, moves in zip(options, found.slots_LP, layer_s_L(problem, placement), moved_L, strict=True):
                row.append(Option(slots_P=slots_P, cost=float(cost), moves=int(moves)))
            return found, int(moved_L.sum())

        price, low, high = limits.move, max(limits.move, load_s / 2**14), load_s
        if rules.most_moves is not None and look(price, 1 / LOOKS, 0)[1] > rules.most_moves:
            for left in range(LOOKS, 0, -1):
                price = (low * high) ** 0.5
                if look(price, 0.3 / left, 0)[1] > rules.most_moves:
                    low = price
                else:
                    high = price
            for price in (low / 2, high * 2, high, low):  # annealing finds more at the same price than a descent
                look(price, 0.2, ROUNDS)
        found, _ = look(price, 1.0, ROUNDS)
        picks = chosen(options, most_moves=rules.most_moves if stays else None, move_cost=limits.move)
        return found, np.array([pick.slots_P for pick in picks], np.int64)
