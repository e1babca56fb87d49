"""choose: policy, slots and prefetching by trying them on steps they were not learnt from."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from moesim.optimize import Capability, Progress, Status
from moesim.optimize.cache_score import score_cache
from moesim.optimize.caching import CacheProblem, CacheSolution, CacheSolver
from moesim_solvers.caching.slots import EqualSlots, Marginal, PinSet


class Choose:
    """Policy, way of sharing slots and distance of the prefetcher, by predicted stall on steps not learnt from.

    The first half of the steps is learnt from, the second judges: first every policy at equal slots, then no prefetching and
    the problem's prefetcher at each distance up to its own, then the ways to share slots. The winner learns from all steps
    again. Prefetching is chosen at the recall the problem assumes of it.
    """

    name = "choose"
    solves = "caching"
    capabilities = frozenset({Capability.HETEROGENEOUS, Capability.ANYTIME})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: CacheProblem, *, seed: int, time_limit_s: float, progress: Progress) -> CacheSolution:
        """Time-limit when not everything could be tried; notes list what was, by seconds of stall."""
        if refusal := problem.infeasible(problem.bits[0]):
            return CacheSolution(status=Status.INFEASIBLE, plan=None, seed=seed, notes={"reason": refusal})
        stop_s = time.monotonic() + time_limit_s
        half = problem.steps // 2
        learn, judge = (problem.between(0, half), problem.between(half, problem.steps)) if half else (problem, problem)
        tried: dict[str, float] = {}
        late = False

        def stall_s(asked: CacheProblem, solver: CacheSolver, label: str) -> float:
            nonlocal late
            if tried and time.monotonic() > stop_s:
                late = True
                return np.inf
            found = solver.solve(asked, seed=seed, time_limit_s=max(0.0, stop_s - time.monotonic()), progress=lambda share, what: None)
            assert found.plan is not None  # no refusal above
            tried[label] = score_cache(judge, found.plan).stall_s
            progress(min(1.0, len(tried) / (len(problem.policies) + 3 + problem.distance)), label)
            return tried[label]

        quiet = replace(learn, prefetcher="none")
        policies = dict.fromkeys((problem.policy, *problem.policies))
        policy = min(policies, key=lambda name: stall_s(replace(quiet, policy=name), EqualSlots(), name))
        ahead = [replace(quiet, policy=policy)]
        if problem.prefetcher != "none":
            ahead += [replace(learn, policy=policy, distance=distance) for distance in range(1, problem.distance + 1)]
            asked = min(ahead, key=lambda each: stall_s(each, EqualSlots(), f"{policy}, {_words(each)}"))
        else:
            asked = ahead[0]
        ways: tuple[CacheSolver, ...] = (EqualSlots(), Marginal(), PinSet())
        way = min(ways, key=lambda solver: stall_s(asked, solver, f"{policy}, {_words(asked)}, {solver.name}"))
        chosen = replace(problem, policy=policy, prefetcher=asked.prefetcher, distance=asked.distance)
        found = way.solve(chosen, seed=seed, time_limit_s=max(0.0, stop_s - time.monotonic()), progress=lambda share, what: None)
        assert found.plan is not None
        return CacheSolution(
            status=Status.TIME_LIMIT if late else Status.FEASIBLE,
            plan=replace(found.plan, name=self.name),
            objective=score_cache(problem, found.plan).stall_s,
            seed=seed,
            notes={"policy": policy, "slots_by": way.name, "prefetcher": chosen.prefetcher, "tried_stall_s": tried},
        )


def _words(problem: CacheProblem) -> str:
    return "no prefetching" if problem.prefetcher == "none" else f"{problem.prefetcher} {problem.distance} ahead"
