"""compare: learn plans on one part of a trace, judge them on parts nobody learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moesim.cost import CostModel, route
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.optimize.place import place
from moesim.optimize.problem import Problem, Progress, Solution
from moesim.optimize.score import score
from moesim.plan import Plan
from moesim.trace import Trace

BATCHES = (64, 512, 2048)


def compare(
    trace: Trace,
    cluster: Cluster,
    solvers: Sequence[str],
    *,
    plans: Sequence[Plan] = (),
    home: str | None = None,
    tokens: str | None = None,
    learn: str = "0%:50%",
    judge: str = "50%:100%",
    slots: int | None = None,
    dispatch: str = "even",
    tokens_per_device: int = 4096,
    current: Plan | None = None,
    cost: CostModel | None = None,
    seed: int = 0,
    time_limit_s: float = 30.0,
    progress: Progress = lambda share, what: None,
) -> tuple[list[Plan], dict[str, Any]]:
    """Plans of every solver (and the given ones), and the comparison section of a report.

    `tokens` is the range of every part that is looked at (default: all of it). Solvers learn from the `learn` range of the
    domain `home` (default: of all domains) and are scored on it, on its `judge` range, on every other domain, and batch by
    batch (64, 512, 2048 tokens) of the judged part. With `current` every row says how many experts move from that plan and
    how many bytes. Solvers that cannot do what is asked are listed with the reason instead of a plan.
    """
    if not solvers and not plans:
        raise InputError("nothing to compare: give plans or solvers")

    def part(domain: str | None) -> Trace:
        view = trace.select(domain=domain) if domain is not None else trace
        return view.select(tokens=tokens) if tokens else view

    base = part(home)
    source, unseen = base.select(tokens=learn), base.select(tokens=judge)
    others = [name for name in trace.tokens_by_domain if name != home] if home else []
    costs = cost or CostModel.of(cluster, trace.model)
    compared, solutions = list(plans), []
    if solvers:
        problem = Problem.of(source, cluster, slots=slots, dispatch=dispatch, tokens_per_device=tokens_per_device, cost=costs)
        for index, name in enumerate(solvers):
            progress(index / len(solvers), name)
            plan, solution = place(problem, solver=name, seed=seed, time_limit_s=time_limit_s, learnt_from=f"{source.digest} ({source.selection})")
            solutions.append(_solution(name, solution))
            if plan:
                compared.append(plan)
    if not compared:
        raise InputError(f"no solver could place this: {'; '.join(str(row['reason']) for row in solutions)}")
    label = f"{home}, " if home else ""
    parts = [(f"{label}the part learnt from", "in-sample", source), (f"{label}the part never seen", "held-out", unseen)]
    parts += [(name or "(no domain)", "cross-domain", part(name)) for name in others]
    scored: list[dict[str, Any]] = []
    for index, (words, kind, view) in enumerate(parts):
        progress(index / len(parts), f"scoring on {words}")
        results = score(view, compared, cluster, tokens_per_device=tokens_per_device, cost=costs)
        scored.append({"label": words, "kind": kind, "tokens": view.tokens, "plans": [result.summary() for result in results]})
    for row, plan in zip(scored[1]["plans"], compared, strict=True):
        row["batch_load_ratio"] = batch_load_ratio(unseen, plan, cluster)
        if current is not None:
            moves = current.placement.diff(plan.placement, node_G=cluster.node_G)
            row |= {"moves": len(moves), "moved_B": len(moves) * trace.model.expert_B}
    progress(1.0, "")
    return compared, {
        "cluster": cluster.name,
        "cluster_title": cluster.title,
        "learnt_from": source.selection,
        "tokens_per_device": tokens_per_device,
        "transport": costs.transport,
        "scored_on": scored,
        "solutions": solutions,
    }


def batch_load_ratio(trace: Trace, plan: Plan, cluster: Cluster, batches: Sequence[int] = BATCHES, *, limit: int = 1 << 15) -> dict[str, float]:
    """Busiest over mean device inside batches of some sizes, mean over batches and layers; sizes beyond the trace are left out.

    Small batches are never as balanced as the whole: this is what a decode step sees.
    """
    ids = trace.experts(limit=limit)
    found: Mapping[int, float] = {
        size: float(_ratio(route(ids[: len(ids) // size * size], plan.placement, cluster.node_G, ends_S=np.arange(size, len(ids) + 1, size)), plan))
        for size in batches
        if len(ids) >= size
    }
    return {str(size): ratio for size, ratio in found.items()}


def _ratio(traffic: Any, plan: Plan) -> float:
    load = traffic.device_tokens_SLG(plan.placement)
    mean = load.mean(axis=2)
    return float(np.divide(load.max(axis=2), mean, out=np.ones_like(mean), where=mean > 0).mean())


def _solution(name: str, solution: Solution) -> dict[str, Any]:
    return {
        "name": name,
        "status": str(solution.status),
        "seconds": solution.seconds,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "reason": solution.notes.get("reason", ""),
    }
