"""plan_cache: run a caching solver, check its answer, keep it as a CachePlan.

problem = CacheProblem.of(trace.select(tokens="0%:50%"), cluster, "50%")
solution = plan_cache(problem, solver="pin-set")
score_cache(problem_of_other_tokens, solution.plan)
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Protocol, cast

from moesim.errors import PlanError, SolverError
from moesim.optimize.cache_problem import CacheProblem
from moesim.optimize.problem import Capability, Outcome, Progress, Status
from moesim.optimize.registry import load_solver
from moesim.plan import CachePlan


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheSolution(Outcome):
    """A caching solver's answer; infeasible ones have no plan. Objectives are seconds a step waits for copies,
    summed over layers and devices, or what a solver says they are."""

    plan: CachePlan | None


class CacheSolver(Protocol):
    """What the entry-point group `moesim.solvers` holds for `solves = "caching"`: a class made without arguments."""

    name: str
    solves: str
    capabilities: frozenset[Capability]
    requires: tuple[str, ...]

    def solve(self, problem: CacheProblem, *, seed: int, time_limit_s: float, progress: Progress) -> CacheSolution:
        """Solve within the time limit; infeasible and out of time are statuses, never exceptions."""
        ...


def plan_cache(
    problem: CacheProblem,
    *,
    solver: str | CacheSolver = "marginal",
    seed: int = 0,
    time_limit_s: float = 30.0,
    progress: Progress = lambda share, what: None,
    learnt_from: str = "",
) -> CacheSolution:
    """Answer of a solver, checked against the problem; its plan says what it was made from.

    Infeasible problems come back as a status with the reason in `notes["reason"]`. Raises SolverError when an answer breaks
    a limit of the problem.
    """
    chosen = cast(CacheSolver, load_solver(solver, "caching")) if isinstance(solver, str) else solver
    if reason := problem.infeasible():
        return CacheSolution(status=Status.INFEASIBLE, plan=None, seed=seed, notes={"reason": reason})
    start = time.perf_counter()
    found = chosen.solve(problem, seed=seed, time_limit_s=time_limit_s, progress=progress)
    if found.plan is None:
        if found.status != Status.INFEASIBLE:
            raise SolverError(f"solver {chosen.name!r} returned status {found.status!r} without a plan")
        return found
    try:
        found.plan.check_fits(problem.model, problem.plan)
    except PlanError as wrong:
        raise SolverError(f"solver {chosen.name!r} answered another problem: {wrong}") from None
    if wrong_limit := problem.broken(found.plan):
        raise SolverError(f"solver {chosen.name!r} broke the problem: {wrong_limit}")
    timed = replace(found, seconds=time.perf_counter() - start)
    made_from = {
        "trace": learnt_from,
        "tokens": len(problem.experts_TLK),
        "steps": problem.steps,
        "cluster": problem.cluster.name,
        "cluster_digest": problem.cluster.digest,
        "plan": problem.plan.name,
        "memory_B": problem.budget_B_G.tolist(),
        "solver": chosen.name,
        "seed": seed,
        "time_limit_s": time_limit_s,
        "moesim": version("moesim"),
    }
    return replace(timed, plan=replace(found.plan, made_from=made_from, solution=timed.record()))


__all__ = ["CacheProblem", "CacheSolution", "CacheSolver", "plan_cache"]
