"""Conformance suite of scaling solvers, and problems to run it on."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Status
from moesim.optimize.scaling import DAY_S, Bill, ScalingProblem, ScalingSolution, ScalingSolver, bill, solve_scaling

_ELSEWHERE = """
import hashlib, pickle, sys
from moesim.optimize.scaling import solve_scaling
from moesim.testing.scaling import diurnal, scaling_problem
solver = pickle.loads(bytes.fromhex(sys.argv[1]))()
found, _ = solve_scaling(solver, scaling_problem(diurnal(2, 96)), seed=7, time_limit_s=60)
print(hashlib.sha256(found.size_N.tobytes()).hexdigest())
"""


def diurnal(days: int, per_day: int, *, mean: float = 8.0, swing: float = 0.75, noise: float = 0.05, seed: int = 0) -> NDArray[np.float64]:
    """Requests per second of every interval of some days: a sine over each day, with lognormal noise."""
    hour = np.arange(days * per_day) * (2 * np.pi / per_day)
    return np.asarray(mean * (1 - swing * np.cos(hour)) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(hour))))


def scaling_problem(demand_N: NDArray[np.float64], *, per_day: int = 96, sizes: int = 4, change_s: float = 30.0, **more: Any) -> ScalingProblem:
    """Sizes of 8, 16, … devices that serve 0.5 request/s per device; changes take `change_s`, half of it without service."""
    devices_C = 8 * np.arange(1, sizes + 1)
    change_CC = np.where(np.eye(sizes, dtype=bool), 0.0, change_s)
    given = {
        "interval_s": DAY_S / per_day,
        "capacity_C": devices_C * 0.5,
        "change_s_CC": change_CC,
        "blocked_s_CC": change_CC / 2,
        "moved_B_CC": change_CC * 1e9,
        "price": 2.0,
        "miss_price": 0.02,
    }
    return ScalingProblem(demand_N=demand_N, devices_C=devices_C, **{**given, **more})


class ScalingSolverSuite:
    """Inherit it, set `solver` to a function that makes one, and run pytest."""

    solver: ClassVar[Callable[[], ScalingSolver]]

    def solve(self, problem: ScalingProblem, *, seed: int = 0, time_limit_s: float = 60.0) -> tuple[ScalingSolution, Bill | None]:
        """The solver's answer, checked and billed by `solve_scaling`."""
        return solve_scaling(type(self).solver(), problem, seed=seed, time_limit_s=time_limit_s)

    def test_sizes_are_those_of_the_problem(self) -> None:
        """One index per interval, billed by us; with and without a size to start from, and with a history."""
        for more in ({}, {"start": 1}, {"history_N": diurnal(1, 96, seed=3)}):
            problem = scaling_problem(diurnal(1, 96), **more)
            found, cost = self.solve(problem)
            assert found.size_N is not None
            assert cost is not None
            assert found.objective == bill(problem, found.size_N).total == cost.total

    def test_nothing_beats_the_optimum(self) -> None:
        """The offline optimum is a bound for every policy."""
        problem = scaling_problem(diurnal(2, 96))
        least, _ = solve_scaling("optimal", problem)
        found, _ = self.solve(problem)
        assert least.objective is not None
        assert found.objective is not None
        assert found.objective >= least.objective * (1 - 1e-9)

    def test_a_causal_policy_does_not_see_the_future(self) -> None:
        """Where a solver says it is causal, what comes later changes nothing before."""
        if Capability.CAUSAL not in type(self).solver().capabilities:
            return
        demand_N = diurnal(2, 96)
        problem = scaling_problem(demand_N)
        first, _ = self.solve(problem)
        assert first.size_N is not None
        for known in (1, 40, 96, 150):
            other = demand_N.copy()
            other[known:] *= np.random.default_rng(known).lognormal(0.0, 1.0, len(other) - known)
            again, _ = self.solve(replace(problem, demand_N=other))
            assert again.size_N is not None
            np.testing.assert_array_equal(first.size_N[: known + 1], again.size_N[: known + 1])

    def test_same_seed_same_sizes_in_another_process(self) -> None:
        """Determinism across processes."""
        found, _ = self.solve(scaling_problem(diurnal(2, 96)), seed=7)
        assert found.size_N is not None
        made = pickle.dumps(type(self).solver).hex()
        elsewhere = subprocess.run([sys.executable, "-c", _ELSEWHERE, made], capture_output=True, text=True, check=True, timeout=120)
        import hashlib

        assert elsewhere.stdout.strip() == hashlib.sha256(found.size_N.tobytes()).hexdigest()

    def test_the_time_limit_is_kept(self) -> None:
        """A year of hours in a second, or an early end with an answer."""
        start = time.monotonic()
        found, _ = self.solve(scaling_problem(diurnal(365, 24), per_day=24), time_limit_s=1.0)
        assert found.size_N is not None
        assert time.monotonic() - start < 10

    def test_extremes_are_survived(self) -> None:
        """No demand, one interval, one size, demand no size can serve, free misses."""
        none = np.zeros(5)
        for problem in (
            scaling_problem(none),
            scaling_problem(np.ones(1)),
            scaling_problem(diurnal(1, 24), per_day=24, sizes=1),
            scaling_problem(np.full(5, 1e6)),
            scaling_problem(np.full(5, 10.0), miss_price=0.0),
        ):
            found, cost = self.solve(problem)
            assert found.size_N is not None
            assert cost is not None
            assert np.isfinite(cost.total)

    def test_the_impossible_is_a_status(self) -> None:
        """Sizes that serve nothing end as `infeasible` with a reason, not as an exception."""
        found, cost = self.solve(scaling_problem(np.ones(4), capacity_C=np.zeros(4)))
        assert (found.status, found.size_N, cost) == (Status.INFEASIBLE, None, None)
        assert "objectives" in str(found.notes["reason"])
