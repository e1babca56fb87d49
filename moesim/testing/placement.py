"""Conformance suite of placement solvers."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from moesim.model import ModelSpec
from moesim.optimize import Problem, Solution, Solver, Status, run_solver
from moesim.testing.routing import MODEL, clustered_routing, problem_of

_ELSEWHERE = """
import hashlib, pickle, sys
from moesim.testing import MODEL, clustered_routing, problem_of
from moesim.optimize import run_solver
for factory in pickle.loads(bytes.fromhex(sys.argv[1])):
    found = run_solver(factory(), problem_of(clustered_routing(MODEL, 600), MODEL), seed=7, time_limit_s=60)
    print(hashlib.sha256(found.placement.slots_LP.tobytes()).hexdigest())
"""


def plans_elsewhere(factories: Sequence[Callable[[], Solver]]) -> list[str]:
    """SHA-256 of the slots that each solver finds for the suite's problem, seed 7, in one new process."""
    made = pickle.dumps(list(factories)).hex()
    return subprocess.run([sys.executable, "-c", _ELSEWHERE, made], capture_output=True, text=True, check=True).stdout.split()


class PlacementSolverSuite:
    """What every placement solver must do; override `solver`, and `optimises` for one that does not try to be good."""

    solver: ClassVar[Callable[[], Solver]]
    optimises: ClassVar[bool] = True  # at least as good as linear in predicted layer time

    def solve(self, problem: Problem, *, seed: int = 0, time_limit_s: float = 10.0) -> Solution:
        """One run through the same door as everybody."""
        return run_solver(type(self).solver(), problem, seed=seed, time_limit_s=time_limit_s)

    def elsewhere(self) -> str:
        """Its digest by `plans_elsewhere`; a suite over many solvers may ask one process for all."""
        return plans_elsewhere([type(self).solver])[0]

    def test_it_says_what_it_is(self) -> None:
        """Name, kind, capabilities and requirements are there before anything is solved."""
        solver = type(self).solver()
        assert solver.name
        assert solver.solves == "placement"
        assert isinstance(solver.capabilities, frozenset)
        assert isinstance(solver.requires, tuple)

    def test_every_expert_gets_a_slot_on_every_shape(self) -> None:
        """Placements are valid (their constructor checks) and of the slots asked for, with replicas where the solver can."""
        extra = 8 if "replication" in type(self).solver().capabilities else 0
        for slots in {16, 16 + extra}:
            problem = problem_of(clustered_routing(MODEL, 300), MODEL, slots=slots)
            found = self.solve(problem, time_limit_s=1.0)
            assert found.placement is not None
            assert found.placement.slots_LP.shape == (3, slots)
            assert found.status != Status.INFEASIBLE

    def test_the_same_seed_gives_the_same_bytes_in_any_process(self) -> None:
        """Two runs here and one in a process of its own."""
        problem = problem_of(clustered_routing(MODEL, 600), MODEL)
        first, second = (self.solve(problem, seed=7, time_limit_s=60).placement for _ in range(2))
        assert first is not None
        assert first == second
        assert self.elsewhere() == hashlib.sha256(first.slots_LP.tobytes()).hexdigest()

    def test_it_keeps_the_time_limit(self) -> None:
        """A second is kept on a problem that could take much longer, with some grace for a busy machine."""
        model = ModelSpec(name="large", layers=8, moe_layers=tuple(range(8)), hidden=2048, intermediate=1408, experts=64, top_k=6)
        problem = problem_of(clustered_routing(model, 4000), model)
        self.solve(problem_of(clustered_routing(MODEL, 100), MODEL))  # compile
        begin = time.perf_counter()
        assert self.solve(problem, time_limit_s=1.0).placement is not None
        assert time.perf_counter() - begin < 1.0 + 5.0

    def test_it_is_no_worse_than_linear(self) -> None:
        """On tokens it learnt from, predicted layer time is at most that of experts in order of their ids."""
        if not type(self).optimises:
            return
        problem = problem_of(clustered_routing(MODEL, 2000), MODEL)
        mine, linear = (run_solver(solver, problem, time_limit_s=10.0) for solver in (type(self).solver(), "linear"))
        assert predicted_s(problem, mine) <= predicted_s(problem, linear) * (1 + 1e-9)

    def test_names_of_experts_do_not_matter(self) -> None:
        """Renaming experts changes the predicted time by at most a few per cent (ties and random numbers fall differently)."""
        if not type(self).optimises:
            return
        ids = clustered_routing(MODEL, 2000)
        renamed = np.random.default_rng(3).permutation(16)[ids].astype(np.uint16)
        times = [predicted_s(problem, self.solve(problem)) for problem in (problem_of(ids, MODEL), problem_of(renamed, MODEL))]
        assert abs(times[0] / times[1] - 1) < 0.05

    def test_the_impossible_is_a_status(self) -> None:
        """Too few slots end as `infeasible` with a reason, not as an exception."""
        found = self.solve(problem_of(clustered_routing(MODEL, 50), MODEL, slots=8))
        assert found.status == Status.INFEASIBLE
        assert found.placement is None
        assert "slots" in str(found.notes["reason"])

    def test_a_trace_without_tokens_is_survived(self) -> None:
        """No load anywhere: any valid placement, or a reasoned infeasible, but no crash."""
        found = self.solve(problem_of(np.zeros((0, 3, 4), np.uint16), MODEL))
        assert found.placement is not None or found.notes["reason"]

    def test_a_bound_is_a_bound(self) -> None:
        """Where a solver proves a bound, its objective is not below it."""
        found = self.solve(problem_of(clustered_routing(MODEL, 500), MODEL))
        if found.bound is not None and found.objective is not None:
            assert found.objective >= found.bound - 1e-6 * abs(found.bound)


def predicted_s(problem: Problem, solution: Solution) -> float:
    """Mean predicted layer time of a solution on the problem's own tokens."""
    from moesim.cost import route

    assert solution.placement is not None
    step = problem.tokens_per_device * problem.cluster.size
    traffic = route(problem.experts_TLK, solution.placement, problem.cluster.node_G, tokens_per_step=step)
    times = problem.cost.layer_times(traffic, solution.placement)
    return float((times.dispatch.time_s_N + times.compute_s_SLG.max(axis=2) + times.combine.time_s_N).mean())
