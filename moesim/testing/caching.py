"""Conformance suite of caching solvers."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.hardware import Cluster, load_cluster
from moesim.model import ModelSpec
from moesim.optimize.cache_problem import CacheProblem, linear_plan
from moesim.optimize.cache_score import score_cache
from moesim.optimize.caching import CacheSolution, CacheSolver, plan_cache
from moesim.optimize.problem import Status
from moesim.optimize.tiers import memory_B_G, tiers_of
from moesim.testing.routing import MODEL, clustered_routing

_ELSEWHERE = """
import pickle, sys
from moesim.optimize.caching import plan_cache
from moesim.testing.caching import fingerprint, sample_problem
for made in sys.argv[1:]:
    print(fingerprint(plan_cache(sample_problem(300), solver=pickle.loads(bytes.fromhex(made))(), seed=7, time_limit_s=60)))
"""


def first_device(cluster: Cluster | str = "rtx-4090x8-pcie") -> Cluster:
    """A cluster of the first device alone, with its host."""
    whole = load_cluster(cluster) if isinstance(cluster, str) else cluster
    host_G, nics = whole.host_G[:1], {g: nic for g, nic in whole.own_nics.items() if g == 0}
    return replace(
        whole,
        name=f"{whole.name}-first",
        devices=whole.devices[:1],
        node_G=whole.node_G[:1],
        intra_G=whole.intra_G[:1],
        host_G=host_G,
        own_nics=nics,
        network=None,
        edges=(),
    )


def cache_problem_of(
    experts_TLK: NDArray[np.uint16], model: ModelSpec, cluster: Cluster | str | None = None, memory: float | str = "50%", **fields: Any
) -> CacheProblem:
    """A caching problem from tokens in memory, one token of each device a step, on one device unless a cluster is given."""
    where = first_device() if cluster is None else load_cluster(cluster) if isinstance(cluster, str) else cluster
    plan = linear_plan(model, where)
    held_B_G = plan.placement.holds_LGE.sum(axis=(0, 2)) * model.expert_B
    width = int(fields.get("tokens_per_device", 1)) * where.size
    steps = max(1, round(len(experts_TLK) / max(1, width)))
    given: dict[str, Any] = {
        "model": model,
        "plan": plan,
        "cost": CostModel.of(where, model),
        "experts_TLK": experts_TLK,
        "ends_S": np.arange(1, steps + 1) * len(experts_TLK) // steps,
        "budget_B_G": memory_B_G(memory, held_B_G),
        "tiers": tiers_of(where, {}),
        "bits": (model.weight_bits,),
    }
    return CacheProblem(**given | fields)


def sample_problem(tokens: int, **fields: Any) -> CacheProblem:
    """The suite's problem: routing with planted clusters that follow one another, half of the experts fit."""
    ids = clustered_routing(MODEL, tokens)
    order = np.argsort(np.arange(tokens) // 50 % 4 + (ids[:, 0, 0] % 4) / 8, kind="stable")  # runs of tokens that are alike
    return cache_problem_of(ids[order], MODEL, **fields)


def fingerprint(solution: CacheSolution) -> str:
    """Names the decision of a solution."""
    assert solution.plan is not None
    return hashlib.sha256(solution.plan.digest.encode()).hexdigest()


def fingerprints_elsewhere(*solvers: Callable[[], CacheSolver]) -> list[str]:
    """What a process of its own finds with each solver for the suite's problem, seed 7."""
    made = [pickle.dumps(solver).hex() for solver in solvers]
    done = subprocess.run([sys.executable, "-c", _ELSEWHERE, *made], capture_output=True, text=True, check=True)
    return done.stdout.split()


class CachingSolverSuite:
    """What every caching solver must do; override `solver`, and `moves` for one whose experts never move."""

    solver: ClassVar[Callable[[], CacheSolver]]
    moves: ClassVar[bool] = True  # copies no more than equal slots on the tokens it learnt from

    def solve(self, problem: CacheProblem, *, seed: int = 0, time_limit_s: float = 30.0) -> CacheSolution:
        """One run through the same door as everybody: checks that the budget is kept, and every other limit."""
        return plan_cache(problem, solver=type(self).solver(), seed=seed, time_limit_s=time_limit_s)

    def elsewhere(self) -> str:
        """What the solver finds in another process; override to start one process for many solvers."""
        return fingerprints_elsewhere(type(self).solver)[0]

    def test_it_says_what_it_is(self) -> None:
        """Name, kind, capabilities and requirements are there before anything is solved."""
        solver = type(self).solver()
        assert solver.name
        assert solver.solves == "caching"
        assert isinstance(solver.capabilities, frozenset)
        assert isinstance(solver.requires, tuple)

    def test_plans_are_valid_and_keep_the_budget(self) -> None:
        """On one device and on several, from a little memory to all of it; what is not said is not changed."""
        for cluster, memory in ((None, "10%"), (None, "50%"), (None, "100%"), ("rtx-4090x8-pcie", "50%")):
            problem = sample_problem(200, cluster=cluster, memory=memory)
            found = self.solve(problem)
            assert found.plan is not None
            assert (found.plan.slots_LG <= problem.held_LG).all()
            assert problem.broken(found.plan) is None
            found.plan.check_fits(problem.model, problem.plan)
            assert set(np.unique(found.plan.bits_LE)) == {16}

    def test_the_same_seed_gives_the_same_plan_in_any_process(self) -> None:
        """Two runs here and one in a process of its own."""
        first, second = (fingerprint(self.solve(sample_problem(300), seed=7, time_limit_s=60)) for _ in range(2))
        assert first == second
        assert self.elsewhere() == first

    def test_it_is_no_worse_than_equal_slots(self) -> None:
        """On the tokens it learnt from, a step waits no longer, on one device and in steps of many tokens."""
        if not type(self).moves:
            return
        for width in (1, 8):
            problem = sample_problem(800, tokens_per_device=width)
            mine, equal = (plan_cache(problem, solver=solver).plan for solver in (type(self).solver(), "equal-slots"))
            assert mine is not None
            assert equal is not None
            assert score_cache(problem, mine).stall_s <= score_cache(problem, equal).stall_s * (1 + 1e-9)

    def test_all_that_fits_is_never_copied_twice(self) -> None:
        """With room for every expert, at most its first use is a copy."""
        problem = sample_problem(200, memory="100%")
        plan = self.solve(problem).plan
        assert plan is not None
        score = score_cache(problem, plan)
        assert score.demand_B * score.steps <= problem.model.expert_B * problem.asked_LE.size

    def test_the_impossible_is_a_status(self) -> None:
        """Memory that holds no expert, and hosts that do not hold all: `infeasible` with a reason, no exception."""
        small = sample_problem(50, memory=1000.0)
        poor = replace(sample_problem(50), tiers=tuple(replace(tier, capacity_B=0.0) for tier in small.tiers))
        for problem, word in ((small, "holds no expert"), (poor, "do not fit")):
            found = self.solve(problem)
            assert found.status == Status.INFEASIBLE
            assert found.plan is None
            assert word in str(found.notes["reason"])

    def test_a_trace_without_tokens_is_survived(self) -> None:
        """Nothing is asked for: any valid plan, or a reasoned infeasible, but no crash."""
        found = self.solve(cache_problem_of(np.zeros((0, 3, 4), np.uint16), MODEL))
        assert found.plan is not None or found.notes["reason"]

    def test_a_bound_is_a_bound(self) -> None:
        """Where a solver proves a bound, its objective is not below it."""
        found = self.solve(sample_problem(500))
        if found.bound is not None and found.objective is not None:
            assert found.objective >= found.bound - 1e-9 * abs(found.bound)
