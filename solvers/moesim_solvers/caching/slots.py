"""Solvers that share a device's slots over its layers, with one policy for all.

L MoE layers, G devices, C cache sizes, B parts of the steps, P numbers of pinned experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Progress, Status
from moesim.optimize.cache_score import score_cache
from moesim.optimize.caching import CacheProblem, CacheSolution
from moesim.optimize.misses import exact
from moesim_solvers.caching.quotas import SURE, Quota, certain, cost_of, equal, integer, lower_bound, marginal

PINNED = 8  # numbers of pinned experts that are tried, beside none


def share_out(
    name: str, problem: CacheProblem, divide: Callable[[NDArray[np.float64], NDArray[np.int64], int], Quota], *, seed: int
) -> CacheSolution:
    """Solution of dividing every device's slots by its curves of seconds waited."""
    if refusal := problem.infeasible(problem.bits[0]):
        return CacheSolution(status=Status.INFEASIBLE, plan=None, seed=seed, notes={"reason": refusal})
    cost_LGC = problem.stall_s(problem.misses(problem.policy))
    quotas = [divide(cost_LGC[:, g], problem.held_LG[:, g], int(problem.slots_G[g])) for g in range(cost_LGC.shape[1])]
    sure = exact(problem.policy, int(problem.held_LG.max()))  # else curves are straight between some sizes: nothing is proved
    return CacheSolution(
        status=Status.OPTIMAL if sure and all(quota.optimal for quota in quotas) else Status.FEASIBLE,
        plan=problem.answer(name, np.stack([quota.slots_L for quota in quotas], axis=1)),
        objective=sum(quota.cost for quota in quotas),
        bound=sum(quota.bound for quota in quotas) if sure else None,
        seed=seed,
    )


class EqualSlots:
    """As many slots for every layer: what engines do without a plan."""

    name = "equal-slots"
    solves = "caching"
    capabilities: frozenset[Capability] = frozenset()
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: CacheProblem, *, seed: int, time_limit_s: float, progress: Progress) -> CacheSolution:
        """Looks at nothing but the counts; the bound is that of the linear relaxation."""

        def divide(cost_LC: NDArray[np.float64], limit_L: NDArray[np.int64], slots: int) -> Quota:
            slots_L = equal(limit_L, slots)
            return Quota(slots_L=slots_L, cost=cost_of(cost_LC, slots_L), bound=marginal(cost_LC, limit_L, slots).bound)

        return share_out(self.name, problem, divide, seed=seed)


class Marginal:
    """Slots go where the next one saves most; optimal on the learnt tokens where curves are convex."""

    name = "marginal"
    solves = "caching"
    capabilities = frozenset({Capability.HETEROGENEOUS})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: CacheProblem, *, seed: int, time_limit_s: float, progress: Progress) -> CacheSolution:
        """Steps of the curves' convex hulls, steepest first; optimal when the bound is met."""
        return share_out(self.name, problem, marginal, seed=seed)


class QuotaIlp:
    """Slots by an integer program, for curves of any shape; optimal on the learnt tokens."""

    name = "quota-ilp"
    solves = "caching"
    capabilities = frozenset({Capability.HETEROGENEOUS, Capability.EXACT})
    requires: tuple[str, ...] = ("numba", "pulp", "highspy")

    def solve(self, problem: CacheProblem, *, seed: int, time_limit_s: float, progress: Progress) -> CacheSolution:
        """Optimal unless the clock stops it; the devices share the time."""
        stop_s, left = time.monotonic() + time_limit_s, [problem.cluster.size]

        def divide(cost_LC: NDArray[np.float64], limit_L: NDArray[np.int64], slots: int) -> Quota:
            found = integer(cost_LC, limit_L, slots, time_limit_s=(stop_s - time.monotonic()) / left[0])
            left[0] -= 1
            progress(1 - left[0] / problem.cluster.size, "")
            return found

        found = share_out(self.name, problem, divide, seed=seed)
        late = found.status == Status.FEASIBLE and time.monotonic() >= stop_s
        return replace(found, status=Status.TIME_LIMIT) if late else found


class PinSet:
    """Slots and pinned experts moved away from equal slots only where the gain is sure; the rest of the slots follow the policy.

    The steps are cut into parts. An expert is pinned, or a slot moved to another layer, where that saves more than twice its
    standard error in the mean over the parts, each part judging pins learnt from the others. So it gives up some of the gain
    on the learnt tokens for not losing on others. Where that makes predicted steps no shorter, equal slots stay: fewer misses
    help little where dispatch hides them.
    """

    name = "pin-set"
    solves = "caching"
    capabilities = frozenset({Capability.HETEROGENEOUS})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: CacheProblem, *, seed: int, time_limit_s: float, progress: Progress) -> CacheSolution:
        """Feasible, without a bound; the objective is that of the whole learnt part."""
        if refusal := problem.infeasible(problem.bits[0]):
            return CacheSolution(status=Status.INFEASIBLE, plan=None, seed=seed, notes={"reason": refusal})
        held_LG, slots_G = problem.held_LG, problem.slots_G
        equal_LG = np.stack([equal(held_LG[:, g], int(slots_G[g])) for g in range(len(slots_G))], axis=1)
        tried_P = sorted({round(int(held_LG.max()) * i / PINNED) for i in range(PINNED + 1)})
        cost: list[NDArray[np.float64]] = []
        stop_s = time.monotonic() + time_limit_s
        for pinned in tried_P:
            if cost and time.monotonic() > stop_s:
                break
            cost.append(problem.stall_s(problem.misses_by_part(problem.policy, pinned)))
            progress(len(cost) / len(tried_P), f"{pinned} pinned")
        slots_LG, pinned_LG = equal_LG, np.zeros_like(equal_LG)
        if problem.parts > 1:
            cost_PBLGC = np.stack(cost)
            pick_LGC = np.stack([lower_bound(cost_PBLGC[0] - cost_BLGC, SURE) for cost_BLGC in cost_PBLGC]).argmax(axis=0)
            cost_BLGC = np.take_along_axis(cost_PBLGC, pick_LGC[None, None], axis=0)[0]
            slots_LG = np.stack([certain(cost_BLGC[:, :, g], held_LG[:, g], int(slots_G[g])) for g in range(len(slots_G))], axis=1)
            tried_LG = np.asarray(tried_P)[np.take_along_axis(pick_LGC, slots_LG[:, :, None], axis=2)[:, :, 0]]
            pinned_LG = np.minimum(tried_LG, slots_LG)
        plan = problem.answer(self.name, slots_LG, pinned_LE=problem.pins_LE(pinned_LG))
        moved = int(np.abs(slots_LG - equal_LG).sum() // 2)
        found, base = score_cache(problem, plan), score_cache(problem, problem.answer(self.name, equal_LG))
        if found.stall_s > base.stall_s:
            plan, found, moved = problem.answer(self.name, equal_LG), base, 0
        return CacheSolution(
            status=Status.FEASIBLE if len(cost) == len(tried_P) else Status.TIME_LIMIT,
            plan=plan,
            objective=found.stall_s,
            seed=seed,
            notes={"parts": problem.parts, "pinned": int(plan.pinned_LE.sum()), "moved": moved},
        )
