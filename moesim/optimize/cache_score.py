"""score_cache: what a cache plan does to the tokens of a problem, in the figures people compare.

Suffixes: S steps, L MoE layers, E experts, G devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.model import ModelSpec
from moesim.optimize.cache_problem import CacheProblem
from moesim.optimize.stalls import routed_steps
from moesim.plan import CachePlan
from moesim.sim.event import EventResult, simulate_event
from moesim.sim.residency import settle
from moesim.systems import SYSTEMS, Residency, System
from moesim.trace import Trace

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheScore:
    """A cache plan on some tokens. Bytes and seconds are of a mean step; copies from an empty cache on, as a run begins.

    asked_LG, hits_LG   experts that steps asked of each layer and device, and those in place
    step_s, base_s      a step in closed form, and the same with all experts in place
    demand_B, ahead_B, wrong_B   copied while a layer waited, ahead of need, and of that in vain
    """

    name: str
    tokens: int
    steps: int
    asked_LG: Floats
    hits_LG: Floats
    step_s: float
    base_s: float
    demand_B: float
    ahead_B: float
    wrong_B: float
    notes: tuple[str, ...] = ()

    @property
    def hit_ratio(self) -> float:
        """Hits per expert asked for; 1 when nothing was asked."""
        asked = float(self.asked_LG.sum())
        return float(self.hits_LG.sum()) / asked if asked else 1.0

    @property
    def miss_ratio(self) -> float:
        """1 - hit ratio."""
        return 1 - self.hit_ratio

    @property
    def stall_s(self) -> float:
        """Seconds a mean step is longer than with all experts in place."""
        return self.step_s - self.base_s

    def summary(self) -> dict[str, Any]:
        """The figures people compare, JSON-ready."""
        names = ("name", "tokens", "steps", "hit_ratio", "miss_ratio", "step_s", "base_s", "stall_s", "demand_B", "ahead_B", "wrong_B")
        return {name: getattr(self, name) for name in names}


def score_cache(problem: CacheProblem, plan: CachePlan) -> CacheScore:
    """Score of a cache plan on a problem's tokens, in closed form, whatever solver it is from and whatever it learnt from.

    Raises PlanError when the plan is for another model or placement, InputError where there are no tokens.
    """
    plan.check_fits(problem.model, problem.plan, place=f"cache plan {plan.name!r}")
    if not len(problem.experts_TLK):
        raise InputError(f"there are no tokens to judge cache plan {plan.name!r} on; select some")
    ends_S = problem.ends_S
    residency = residency_of(plan, problem.model)
    width = float(problem.tokens_per_device * problem.cluster.size)
    stay = settle(residency, problem.cost, routed_steps(problem.cost, problem.plan.placement, problem.experts_TLK, ends_S, width))
    step_S, settled = problem.times.with_copies(stay)
    piled = () if settled else ("copies ahead pile up from step to step: steps take longer than the closed form says; see the event engine",)
    steps, copies = len(step_S), stay.copies
    return CacheScore(
        name=plan.name,
        tokens=len(problem.experts_TLK),
        steps=steps,
        asked_LG=copies.asked_SLG.sum(axis=0),
        hits_LG=copies.hits_SLG.sum(axis=0),
        step_s=float(step_S.mean()),
        base_s=float(problem.times.step_s_S.mean()),
        demand_B=float(copies.demand_B_SLG.sum()) / steps,
        ahead_B=float((copies.known_B_SLG + copies.vain_B_SLG).sum()) / steps,
        wrong_B=float(copies.vain_B_SLG.sum()) / steps,
        notes=tuple(dict.fromkeys([*problem.notes, *problem.times.notes, *problem.cost.notes, *stay.notes, *piled])),
    )


def residency_of(plan: CachePlan, model: ModelSpec) -> Residency:
    """What the engine makes of a cache plan; bits only where they are not those the model is served in."""
    return Residency.of(plan, **({"bits_LE": None} if (plan.bits_LE == model.weight_bits).all() else {}))


def with_cache(plan: CachePlan, model: ModelSpec, system: System | str = "plain") -> System:
    """A system whose experts are where a cache plan says. Raises InputError for an unknown system."""
    if isinstance(system, str) and system not in SYSTEMS:
        raise InputError(f"system {system!r} is unknown; use one of {', '.join(sorted(SYSTEMS))}")
    return replace(SYSTEMS[system] if isinstance(system, str) else system, residency=residency_of(plan, model))


def run_cache(trace: Trace, problem: CacheProblem, plan: CachePlan | None) -> EventResult:
    """The same by the event engine: the tokens of a trace in the steps of a problem made of it."""
    return simulate_event(
        trace,
        problem.plan,
        problem.cluster,
        system="plain" if plan is None else with_cache(plan, problem.model),
        mode=problem.mode,
        tokens_per_device=problem.tokens_per_device,
        context=problem.context,
        cost=problem.cost,
    )
