"""Solvers that share a device's slots over its layers, with one policy for all.

L MoE layers, G devices, C cache sizes, B parts of the steps, P numbers of pinned experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Progress, Status
from moesim.optimize.cache_score import score_cache
from moesim.optimize.caching import CacheProblem, CacheSolution
from moesim.optimize.misses import exact
from moesim.replay import replay
from moesim.trace.stats import drift_bits
from moesim_solvers.caching.quotas import SURE, Quota, certain, cost_of, equal, integer, lower_bound, marginal, spread

PINNED = 8  # numbers of pinned experts that are tried, beside none
LEARNT = (0.25, 0.5, 0.75)  # shares of the steps that teach what the rest judges
DRIFT = 0.1  # bits; halves of a domain of the shipped `train-part` and `held-out` differ by at most 0.031, early training by 0.16 to 0.42


def share_out(
    name: str, problem: CacheProblem, divide: Callable[[NDArray[np.float64], NDArray[np.int64], int], Quota], *, seed: int
) -> CacheSolution:
    """Solution of dividing every device's slots by its curves of seconds waited."""
    if refusal := problem.infeasible(problem.bits[0]):
        return CacheSolution(status=Status.INFEASIBLE, plan=None, seed=seed, notes={"reason": refusal})
    cost_LGC = problem.stall_s(problem.misses(problem.policy))
    devices = [(cost_LGC[:, g], problem.held_LG[:, g], int(slots)) for g, slots in enumerate(problem.slots_G)]
    quotas = [spread(divide(*device), *device) for device in devices]
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
    standard error in the mean over the parts, each part judging pins learnt from the others. Parts of one kind cannot tell that
    the routing changes, so what the first quarter, half and three quarters of the steps teach is tried on the steps that follow
    each: none may lose to equal slots, and the last must gain. Otherwise, or where the loads of both halves differ much, equal
    slots stay, and a remark says so. They stay, too, where predicted steps become no shorter: fewer misses help little where
    dispatch hides them.
    """

    name = "pin-set"
    solves = "caching"
    capabilities = frozenset({Capability.HETEROGENEOUS})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: CacheProblem, *, seed: int, time_limit_s: float, progress: Progress) -> CacheSolution:
        """Feasible, without a bound; the objective is that of the whole learnt part. Notes tell what was moved, or why nothing."""
        if refusal := problem.infeasible(problem.bits[0]):
            return CacheSolution(status=Status.INFEASIBLE, plan=None, seed=seed, notes={"reason": refusal})
        stop_s = time.monotonic() + time_limit_s
        none = Division(slots_LG=equal_slots(problem), pinned_LE=np.zeros(problem.asked_LE.shape, bool))
        best, why = none, "too few steps to tell"
        if problem.steps > len(LEARNT) and (changed := drift(problem)) > DRIFT:
            why = f"loads of the first and second half of the steps differ by {changed:.2f} bits, more than {DRIFT:g}: they tell little of later ones"
        elif problem.steps > len(LEARNT):
            gains_s = []
            for share in LEARNT:
                gains_s.append(later_gain_s(problem, none, round(problem.steps * share), stop_s))
                progress(share, f"learnt from {share:.0%} of the steps")
            why = "what earlier steps taught was no better on later ones"
            if min(gains_s) >= 0 and gains_s[-1] > 0:
                best, why = surely_better(problem, stop_s), "predicted steps became no shorter"
                if stall_s(problem, best) > stall_s(problem, none):
                    best = none
        plan = problem.answer(self.name, best.slots_LG, pinned_LE=best.pinned_LE)
        notes: dict[str, object] = {
            "parts": problem.parts,
            "pinned": int(best.pinned_LE.sum()),
            "moved": int(np.abs(best.slots_LG - none.slots_LG).sum() // 2),
        }
        if best is none:
            notes["remark"] = f"{self.name}: {why}, so slots are equal and nothing is pinned"
        return CacheSolution(
            status=Status.FEASIBLE if time.monotonic() < stop_s else Status.TIME_LIMIT,
            plan=plan,
            objective=score_cache(problem, plan).stall_s,
            seed=seed,
            notes=notes,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Division:
    """Slots of every layer and device, and what is pinned in some of them."""

    slots_LG: NDArray[np.int64]
    pinned_LE: NDArray[np.bool_]


def equal_slots(problem: CacheProblem) -> NDArray[np.int64]:
    """slots_LG of as many slots for every layer."""
    return np.stack([equal(held_L, int(slots)) for held_L, slots in zip(problem.held_LG.T, problem.slots_G, strict=True)], axis=1)


def surely_better(problem: CacheProblem, stop_s: float) -> Division:
    """Equal slots with every pin and move that the parts of the steps are sure of; numbers of pins are tried until `stop_s`."""
    held_LG, slots_LG = problem.held_LG, equal_slots(problem)
    if problem.parts < 2:
        return Division(slots_LG=slots_LG, pinned_LE=np.zeros(problem.asked_LE.shape, bool))
    tried_P = sorted({round(int(held_LG.max()) * i / PINNED) for i in range(PINNED + 1)})
    cost: list[NDArray[np.float64]] = []
    for pinned in tried_P:
        if cost and time.monotonic() > stop_s:
            break
        cost.append(problem.stall_s(problem.misses_by_part(problem.policy, pinned)))
    cost_PBLGC = np.stack(cost)
    pick_LGC = np.stack([lower_bound(cost_PBLGC[0] - cost_BLGC, SURE) for cost_BLGC in cost_PBLGC]).argmax(axis=0)
    cost_BLGC = np.take_along_axis(cost_PBLGC, pick_LGC[None, None], axis=0)[0]
    slots_LG = np.stack([certain(cost_BLGC[:, :, g], held_LG[:, g], int(slots)) for g, slots in enumerate(problem.slots_G)], axis=1)
    pinned_LG = np.asarray(tried_P)[np.take_along_axis(pick_LGC, slots_LG[:, :, None], axis=2)[:, :, 0]]
    return Division(slots_LG=slots_LG, pinned_LE=problem.pins_LE(np.minimum(pinned_LG, slots_LG)))


def drift(problem: CacheProblem) -> float:
    """Jensen-Shannon divergence of the loads of both halves of the steps, bits, mean over layers."""
    half = problem.steps // 2
    halves = (problem.between(0, half), problem.between(half, problem.steps))
    return float(drift_bits(*(part.weight_LE * len(part.weight_LE) for part in halves)).mean())


def later_gain_s(problem: CacheProblem, none: Division, start: int, stop_s: float) -> float:
    """Seconds of copies on demand that what the first `start` steps teach saves over `none` in those that follow."""
    taught = surely_better(problem.between(0, start), stop_s)
    return copying_s(problem, start, none) - copying_s(problem, start, taught)


def copying_s(problem: CacheProblem, start: int, division: Division) -> float:
    """Seconds of copies on demand in the steps from `start` on, after those before."""
    total_s = 0.0
    for g, events in enumerate(problem.events_G):
        pinned_LE = division.pinned_LE & problem.plan.placement.holds_LGE[:, g]
        found = replay(events, problem.policy, division.slots_LG[:, g], resident=pinned_LE)
        late_N = np.where(events.step_N >= start, found.misses_N, 0)
        total_s += float(np.bincount(events.layer_N, late_N, minlength=events.layers) @ problem.copy_s_LG[:, g])
    return total_s


def stall_s(problem: CacheProblem, division: Division) -> float:
    """Seconds a predicted step waits."""
    return score_cache(problem, problem.answer("division", division.slots_LG, pinned_LE=division.pinned_LE)).stall_s
