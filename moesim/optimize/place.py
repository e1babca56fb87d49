"""place: run a solver on a problem and keep its answer as a Plan, re-checked and re-scored by us."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version

from moesim.errors import SolverError
from moesim.optimize.migration import settled
from moesim.optimize.problem import Problem, Progress, Solution, Solver, Status
from moesim.optimize.registry import load_solver, unmet
from moesim.plan import Plan


def run_solver(
    solver: str | Solver, problem: Problem, *, seed: int = 0, time_limit_s: float = 30.0, progress: Progress = lambda share, what: None
) -> Solution:
    """Solution of `problem`; infeasible problems come back as a status with the reason in `notes["reason"]`.

    With a live plan in the problem's constraints the answer is taken over as far as it pays (`optimize.migration`), and
    `notes["migration"]` says what was decided and what it costs.
    Raises SolverError when a solver returns a placement of another problem.
    """
    chosen = load_solver(solver) if isinstance(solver, str) else solver
    reason = problem.infeasible() or unmet(chosen, problem)
    if reason:
        return Solution(status=Status.INFEASIBLE, placement=None, seed=seed, notes={"reason": reason})
    start = time.perf_counter()
    solution = chosen.solve(problem, seed=seed, time_limit_s=time_limit_s, progress=progress)
    if solution.placement is None:
        if solution.status != Status.INFEASIBLE:
            raise SolverError(f"solver {chosen.name!r} returned status {solution.status!r} without a placement")
        return solution
    p = solution.placement
    if p.layers != problem.model.moe_layers or p.experts != problem.model.experts or p.slots_G.tolist() != problem.slots_G.tolist():
        raise SolverError(f"solver {chosen.name!r} answered another problem: {len(p.layers)} layers, slots {p.slots_G.tolist()}")
    if broken := problem.constraints.broken(p):
        raise SolverError(f"solver {chosen.name!r} broke a rule: {broken}")
    return replace(settled(problem, solution), seconds=time.perf_counter() - start, seed=seed)


def place(
    problem: Problem,
    *,
    solver: str = "local-search",
    seed: int = 0,
    time_limit_s: float = 30.0,
    progress: Progress = lambda share, what: None,
    name: str | None = None,
    learnt_from: str = "",
) -> tuple[Plan | None, Solution]:
    """Plan of `problem` by the named solver, and the Solution it came from; no plan when the problem is infeasible.

    `learnt_from` names the tokens (a trace digest); it goes into the plan with the cluster's digest, seed and versions.
    """
    solution = run_solver(solver, problem, seed=seed, time_limit_s=time_limit_s, progress=progress)
    if solution.placement is None:
        return None, solution
    plan = Plan(
        name=name or solver,
        model=problem.model.name,
        model_digest=problem.model.digest,
        placement=solution.placement,
        made_from={
            "trace": learnt_from,
            "tokens": problem.stats.tokens,
            "cluster": problem.cluster.name,
            "cluster_digest": problem.cluster.digest,
            "solver": solver,
            "seed": seed,
            "time_limit_s": time_limit_s,
            "tokens_per_device": problem.tokens_per_device,
            "moesim": version("moesim"),
        },
        solution=solution.record(),
    )
    return plan, solution
