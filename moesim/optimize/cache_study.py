"""study_cache: a cache plan beside equal slots, on tokens it learnt from and on others, as the caching section of a report.

Suffixes: L MoE layers, E experts, G devices, C cache sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.optimize.cache_problem import CacheProblem
from moesim.optimize.cache_score import run_cache, score_cache
from moesim.optimize.caching import CacheSolution, plan_cache
from moesim.optimize.problem import Progress
from moesim.plan import TIERS, CachePlan
from moesim.replay import policies
from moesim.trace import Trace

CURVE_TOKENS = 8192  # of the judged ones, for the curves of all policies


def study_cache(
    solution: CacheSolution,
    parts: Sequence[tuple[str, str, CacheProblem]],
    *,
    trace: Trace | None = None,
    event_steps: int = 0,
    progress: Progress = lambda share, what: None,
) -> dict[str, Any]:
    """Section of a solved plan. `parts` are (label, "in-sample" or "held-out", problem of its tokens); the last one is judged in
    detail: curves of every policy, and `event_steps` of its steps, which `trace` holds, by the event engine as well."""
    plan = solution.plan
    assert plan is not None
    learn, judge = parts[0][2], parts[-1][2]
    scored, notes = [], [*learn.notes, *([str(solution.notes["remark"])] if "remark" in solution.notes else [])]
    base = plan_cache(learn, solver="equal-slots").plan
    for index, (label, kind, problem) in enumerate(parts):
        progress(index / (len(parts) + 2), f"scoring {label}")
        found = score_cache(problem, plan)
        row = {"label": label, "kind": kind, "tokens": found.tokens, "steps": found.steps, "plan": found.summary()}
        if base is not None:
            row["equal"] = score_cache(problem, base).summary()
        scored.append(row)
        notes += found.notes
    progress(len(parts) / (len(parts) + 2), "curves")
    section: dict[str, Any] = {
        "model": judge.model.name,
        "cluster": judge.cluster.name,
        "solver": plan.made_from.get("solver", plan.name),
        "status": str(solution.status),
        "seconds": round(solution.seconds, 3),
        "tokens_per_device": judge.tokens_per_device,
        "mode": judge.mode,
        "policy": plan.policy,
        "prefetch": {"name": plan.prefetcher, "distance": plan.distance, "recall": plan.recall},
        **_memory(learn, plan),
        "layers": list(plan.layers),
        "experts": plan.experts,
        "slots": plan.slots_LG.tolist(),
        "pinned": (plan.pinned_LE[:, None] & judge.plan.placement.holds_LGE).sum(axis=2).tolist(),
        "loss": learn.loss(plan.bits_LE),
        "scored": scored,
        "curves": _curves(judge, plan),
    }
    if trace is not None and event_steps:
        progress((len(parts) + 1) / (len(parts) + 2), "event engine")
        section["event"] = _by_events(trace, judge, plan, event_steps)
    section["notes"] = list(dict.fromkeys(notes))
    return section


def _memory(problem: CacheProblem, plan: CachePlan) -> dict[str, Any]:
    held_LGE, parameters = problem.plan.placement.holds_LGE, problem.model.expert_parameters
    tiers, bits = (np.unique(array, return_counts=True) for array in (plan.tier_LE, plan.bits_LE))
    return {
        "expert_B": problem.model.expert_B,
        "budget_B": problem.budget_B_G.tolist(),
        "held_B": plan.hbm_B_G(parameters, held_LGE).tolist(),
        "all_B": (held_LGE.sum(axis=(0, 2)) * problem.model.expert_B).tolist(),
        "tiers": {TIERS[tier]: int(count) for tier, count in zip(*tiers, strict=True)},
        "bits": {f"{bit:g}": int(count) for bit, count in zip(*bits, strict=True)},
    }


def _curves(problem: CacheProblem, plan: CachePlan) -> dict[str, Any]:
    """Miss ratios from an empty cache with c slots in every layer of every device; nothing pinned, nothing copied ahead."""
    few = int(np.searchsorted(problem.ends_S, CURVE_TOKENS, side="right"))
    part = problem.between(0, max(1, min(few, problem.steps)))
    most = int(part.held_LG.max())
    asked_L = np.sum([events.load_LE.sum(axis=1) for events in part.events_G], axis=0)
    by_policy = {name: part.misses(name)[:, :, : most + 1].sum(axis=1) for name in policies()}
    return {
        "tokens": len(part.experts_TLK),
        "slots": list(range(most + 1)),
        "miss_ratio": {name: (miss_LC.sum(axis=0) / max(int(asked_L.sum()), 1)).tolist() for name, miss_LC in by_policy.items()},
        "by_layer": (by_policy[plan.policy] / np.maximum(asked_L, 1)[:, None]).tolist(),
    }


def _by_events(trace: Trace, judge: CacheProblem, plan: CachePlan, steps: int) -> dict[str, Any]:
    """Stall of the first steps, in closed form and by the event engine, whose steps are the same ones."""
    tokens = int(judge.ends_S[min(steps, judge.steps) - 1])
    some = trace.select(tokens=f"0:{tokens}")
    part = CacheProblem.like(judge, some)
    closed = score_cache(part, plan)
    with_copies, in_place = run_cache(some, part, plan), run_cache(some, part, None)
    stall_s = float(with_copies.step_s_S.mean() - in_place.step_s_S.mean())
    return {
        "steps": part.steps,
        "closed_stall_s": closed.stall_s,
        "stall_s": stall_s,
        "error": closed.stall_s / stall_s - 1 if stall_s else 0.0,
        "step_s": float(with_copies.step_s_S.mean()),
        "copies": with_copies.copies.to_dict() if with_copies.copies else {},
    }
