"""Conformance kit: any solver is tested by inheriting a suite and supplying one fixture.

    class TestMine(PlacementSolverSuite):
        solver = staticmethod(MySolver)          # anything that makes one when called without arguments

pytest collects the tests of the suite. For determinism across processes the solver must be importable by name.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.hardware import Cluster, load_cluster
from moesim.model import ModelSpec
from moesim.optimize import Problem, Solution, Solver, Status, run_solver
from moesim.plan import slots_per_device
from moesim.trace import TraceStats


def clustered_routing(model: ModelSpec, tokens: int, *, clusters: int = 4, loyalty: float = 0.8, seed: int = 0) -> NDArray[np.uint16]:
    """experts_TLK of tokens that mostly choose experts of one hidden cluster per layer: there is locality to find, and skew."""
    rng = np.random.default_rng(seed)
    layers, experts, width = len(model.moe_layers), model.experts, model.top_k
    structure = np.random.default_rng(1234)
    group_LE = np.stack([structure.permutation(np.arange(experts) % clusters) for _ in range(layers)])
    topic_T = rng.choice(clusters, tokens, p=np.arange(1, clusters + 1) / (clusters * (clusters + 1) / 2))
    chosen = np.empty((tokens, layers, width), np.uint16)
    for layer in range(layers):
        score = rng.random((tokens, experts)) - loyalty * (group_LE[layer][None] == topic_T[:, None])
        chosen[:, layer] = np.argsort(score, axis=1)[:, :width]
    return chosen


def problem_of(
    experts_TLK: NDArray[np.uint16], model: ModelSpec, cluster: Cluster | str = "h100x8", *, slots: int | None = None, tokens_per_device: int = 4096
) -> Problem:
    """A placement problem from tokens in memory."""
    where = load_cluster(cluster) if isinstance(cluster, str) else cluster
    return Problem(
        model=model,
        cluster=where,
        cost=CostModel.of(where, model),
        stats=TraceStats.from_experts(experts_TLK, model),
        experts_TLK=experts_TLK,
        slots_G=slots_per_device(model.experts if slots is None else slots, where.size),
        tokens_per_device=tokens_per_device,
    )


MODEL = ModelSpec(name="conformance", layers=3, moe_layers=(0, 1, 2), hidden=2048, intermediate=1408, experts=16, top_k=4)

_ELSEWHERE = """
import hashlib, pickle, sys
from moesim.testing import MODEL, clustered_routing, problem_of
from moesim.optimize import run_solver
solver = pickle.loads(bytes.fromhex(sys.argv[1]))()
found = run_solver(solver, problem_of(clustered_routing(MODEL, 600), MODEL), seed=7, time_limit_s=60)
print(hashlib.sha256(found.placement.slots_LP.tobytes()).hexdigest())
"""


class PlacementSolverSuite:
    """What every placement solver must do; override `solver`, and `optimises` for one that does not try to be good."""

    solver: ClassVar[Callable[[], Solver]]
    optimises: ClassVar[bool] = True  # at least as good as linear in predicted layer time

    def solve(self, problem: Problem, *, seed: int = 0, time_limit_s: float = 10.0) -> Solution:
        """One run through the same door as everybody."""
        return run_solver(type(self).solver(), problem, seed=seed, time_limit_s=time_limit_s)

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
            found = self.solve(problem)
            assert found.placement is not None
            assert found.placement.slots_LP.shape == (3, slots)
            assert found.status != Status.INFEASIBLE

    def test_the_same_seed_gives_the_same_bytes_in_any_process(self) -> None:
        """Two runs here and one in a process of its own."""
        problem = problem_of(clustered_routing(MODEL, 600), MODEL)
        first, second = (self.solve(problem, seed=7, time_limit_s=60).placement for _ in range(2))
        assert first is not None
        assert first == second
        import hashlib

        made = pickle.dumps(type(self).solver).hex()
        done = subprocess.run([sys.executable, "-c", _ELSEWHERE, made], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == hashlib.sha256(first.slots_LP.tobytes()).hexdigest()

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
