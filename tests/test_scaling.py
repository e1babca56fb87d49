"""Scaling: the bill, the bound, and what policies are worth."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, PlanError, SolverError
from moesim.optimize import Status, load_solver, solver_infos
from moesim.optimize.scaling import ScalingProblem, ScalingSolution, bill, plan_scaling, solve_scaling
from moesim.plan import Resizing, ScalingPlan, load_scaling_plan
from moesim.testing import ScalingSolverSuite
from moesim.testing.scaling import diurnal, scaling_problem
from moesim_solvers.scaling.optimal import Optimal
from moesim_solvers.scaling.predictive import Predictive, forecast
from moesim_solvers.scaling.reactive import Reactive
from moesim_solvers.scaling.static_minimum import StaticMinimum

POLICIES = ("static-minimum", "reactive", "predictive")


class TestOptimal(ScalingSolverSuite):
    solver = staticmethod(Optimal)


class TestStaticMinimum(ScalingSolverSuite):
    solver = staticmethod(StaticMinimum)


class TestReactive(ScalingSolverSuite):
    solver = staticmethod(Reactive)


class TestPredictive(ScalingSolverSuite):
    solver = staticmethod(Predictive)


@st.composite
def problems(draw: st.DrawFn, intervals: int = 5, sizes: int = 3) -> ScalingProblem:
    """Any problem of a few intervals and sizes: capacities that do not rise, changes that take all of an interval."""
    n, c = draw(st.integers(1, intervals)), draw(st.integers(1, sizes))

    def numbers(count: int, most: float) -> np.ndarray[Any, Any]:
        return np.asarray(draw(st.lists(st.floats(0, most), min_size=count, max_size=count)))

    change = np.where(np.eye(c, dtype=bool), 0.0, numbers(c * c, 60.0).reshape(c, c))
    return ScalingProblem(
        demand_N=numbers(n, 20.0),
        interval_s=60.0,
        devices_C=np.cumsum(draw(st.lists(st.integers(1, 9), min_size=c, max_size=c))),
        capacity_C=numbers(c, 15.0) + 0.1,
        change_s_CC=change,
        blocked_s_CC=change * draw(st.floats(0, 1)),
        moved_B_CC=change,
        price=draw(st.floats(0, 100)),
        miss_price=draw(st.floats(0, 1)),
        start=draw(st.one_of(st.none(), st.integers(0, c - 1))),
    )


@given(problems())
def test_the_optimum_is_that_of_all_sequences(problem: ScalingProblem) -> None:
    found, cost = solve_scaling(Optimal(), problem)
    every = itertools.product(range(len(problem.devices_C)), repeat=len(problem.demand_N))
    least = min(bill(problem, np.asarray(sizes)).total for sizes in every)
    assert cost is not None
    assert cost.total == pytest.approx(least, rel=1e-9, abs=1e-9)
    assert found.bound == pytest.approx(least, rel=1e-9, abs=1e-9)


@given(problems(intervals=12))
def test_no_policy_beats_the_optimum(problem: ScalingProblem) -> None:
    least = solve_scaling("optimal", problem)[0].objective
    assert least is not None
    for name in POLICIES:
        objective = solve_scaling(name, problem)[0].objective
        assert objective is not None
        assert objective >= least - 1e-9 * max(1.0, least)


@given(problems())
def test_static_minimum_is_the_best_constant(problem: ScalingProblem) -> None:
    constants = [bill(problem, np.full(len(problem.demand_N), size)).total for size in range(len(problem.devices_C))]
    assert solve_scaling(StaticMinimum(), problem)[0].objective == min(constants)


@given(problems(), st.floats(1.0, 3.0))
def test_more_capacity_never_costs_more(problem: ScalingProblem, factor: float) -> None:
    larger = replace(problem, capacity_C=problem.capacity_C * factor)
    costs = [solve_scaling(Optimal(), each)[0].objective for each in (problem, larger)]
    assert costs[1] <= costs[0] * (1 + 1e-9) + 1e-9  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("noise", "change_s"), [(0.02, 30.0), (0.1, 120.0), (0.1, 5.0)])
def test_predicting_beats_reacting_day_after_day(noise: float, change_s: float, seed: int) -> None:
    problem = scaling_problem(diurnal(4, 96, noise=noise, seed=seed), change_s=change_s)
    best, ahead, behind, still = (solve_scaling(name, problem)[0].objective for name in ("optimal", "predictive", "reactive", "static-minimum"))
    assert best <= ahead < behind  # type: ignore[operator]
    assert ahead < still  # type: ignore[operator]


def test_a_static_size_wins_where_demand_is_flat() -> None:
    problem = scaling_problem(np.full(200, 3.9))
    objective = {name: solve_scaling(name, problem)[0].objective for name in ("optimal", *POLICIES)}
    assert objective["optimal"] == objective["static-minimum"]


def test_the_bill_adds_up_by_hand() -> None:
    """Two intervals of 900 s, 8 then 16 devices; the change takes 30 s, 15 of them without service."""
    problem = scaling_problem(np.asarray([5.0, 7.99]))
    cost = bill(problem, np.asarray([0, 1]))
    assert cost.missed == pytest.approx((5 - 4) * 900 + max(0, 7.99 * 900 - (4 * 15 + 8 * 870)))
    assert cost.device_hours == pytest.approx((8 * 900 + 16 * 900) / 3600)
    assert cost.rent == pytest.approx(2 * cost.device_hours)
    assert cost.total == pytest.approx(cost.rent + 0.02 * cost.missed)
    down = bill(problem, np.asarray([1, 0]))
    assert down.device_hours == pytest.approx((16 * 900 + 16 * 30 + 8 * 870) / 3600)  # devices that leave are paid until they may
    assert (down.changes, down.moved_B) == (1, 30e9)


def test_forecast_repeats_the_season_and_follows_the_level() -> None:
    day = diurnal(1, 24, noise=0.0)
    np.testing.assert_allclose(forecast(np.tile(day, 2), 24, 5), day[:5])
    doubled = forecast(np.concatenate([day, day, 2 * day[:12]]), 24, 2)  # the level rose today, and fades
    assert 1.5 * day[12] < doubled[0] <= 2 * day[12]
    rising = forecast(np.arange(1.0, 30.0), 0, 2)
    assert 29 < rising[0] < rising[1] < 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"demand_N": np.asarray([1.0, -1.0])}, "demand_N"),
        ({"demand_N": np.asarray([])}, "interval"),
        ({"demand_N": np.asarray([np.nan])}, "demand_N"),
        ({"devices_C": np.asarray([8, 8, 16, 24])}, "rising"),
        ({"change_s_CC": np.full((4, 4), 3.0)}, "diagonal"),
        ({"blocked_s_CC": np.full((4, 4), 1e4)}, "intervals no shorter"),
        ({"miss_price": -1.0}, "miss_price"),
        ({"start": 4}, "start=4"),
    ],
)
def test_impossible_problems_say_what_is_wrong(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(scaling_problem(np.ones(3)), **change)


def test_changes_longer_than_an_interval_are_refused() -> None:
    with pytest.raises(InputError, match="take intervals no shorter"):
        scaling_problem(np.ones(3), change_s=901.0)


def test_a_solver_cannot_claim_what_is_not_so() -> None:
    class Liar(Optimal):
        def solve(self, problem: ScalingProblem, **more: Any) -> ScalingSolution:
            return ScalingSolution(status=Status.OPTIMAL, size_N=np.zeros(len(problem.demand_N), np.int64), objective=0.0, bound=self.claim)

    lying = Liar()
    lying.claim = 1e9  # type: ignore[attr-defined]
    with pytest.raises(SolverError, match="bound"):
        solve_scaling(lying, scaling_problem(np.ones(3)))
    lying.claim = None  # type: ignore[attr-defined]
    found, cost = solve_scaling(lying, scaling_problem(np.ones(3)))
    assert cost is not None
    assert found.objective == cost.total > 0
    with pytest.raises(SolverError, match="indices of 4 sizes"):
        bill(scaling_problem(np.ones(3)), np.asarray([0, 1, 4]))


def test_solvers_are_listed_by_kind_and_refused_for_another() -> None:
    assert {info.name for info in solver_infos() if info.solves == "scaling"} >= {"optimal", *POLICIES}
    with pytest.raises(InputError, match="solves scaling problems, not placement"):
        load_solver("optimal")
    with pytest.raises(InputError, match="solves placement problems, not scaling"):
        solve_scaling("greedy", scaling_problem(np.ones(3)))


def changes() -> dict[tuple[int, int], Resizing]:
    sizes = (8, 16, 24, 32)
    return {(a, b): Resizing(at_s=0.0, before=a, after=b, method="elastic", seconds=30.0, pause_s=15.0) for a in sizes for b in sizes if a != b}


def test_plans_survive_the_file(tmp_path: Any) -> None:
    problem = scaling_problem(diurnal(1, 96))
    plan, solution = plan_scaling(problem, changes(), model="m", model_digest="d", made_from={"arrivals": "x"})
    assert plan is not None
    assert plan.solution["bill"]["total"] == solution.objective
    again = load_scaling_plan(plan.save(tmp_path / "scale.json"))
    assert again.to_dict() == plan.to_dict()
    assert (again.digest, again.span_s) == (plan.digest, 86400.0)
    assert [change.at_s for change in again.changes] == ((np.flatnonzero(np.diff(plan.devices_N)) + 1) * 900.0).tolist()


def test_broken_plans_list_every_mistake(tmp_path: Any) -> None:
    import json

    plan = plan_scaling(scaling_problem(diurnal(1, 96)), changes(), model="m", model_digest="d")[0]
    assert plan is not None
    data = plan.to_dict()
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**data, "interval_s": -1, "devices": [], "kind": "placement", "extra": 1}))
    with pytest.raises(PlanError) as caught:
        load_scaling_plan(path)
    for part in ("$.interval_s", "$.devices", "$.kind", "$.extra"):
        assert part in str(caught.value)
    path.write_text(json.dumps({**data, "changes": data["changes"][1:]}))
    with pytest.raises(PlanError, match="list one for each"):
        load_scaling_plan(path)
    with pytest.raises(PlanError, match="whole numbers"):
        ScalingPlan(name="x", model="m", model_digest="d", interval_s=1.0, devices_N=np.asarray([0]))
