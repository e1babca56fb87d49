"""Every registered solver passes the conformance kit; strangers' solvers come through the same door."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from conftest import tiny_model

from moesim.errors import InputError, PluginError, SolverError
from moesim.optimize import Capability, Problem, Progress, Solution, Status, registry, run_solver, solver_names
from moesim.testing import MODEL, PlacementSolverSuite, clustered_routing, problem_of
from moesim.testing.placement import plans_elsewhere

SIMPLE = {"linear", "round-robin", "random"}  # do not try to be good


class Reversed:
    """A stranger's solver: experts in reverse order."""

    name = "reversed"
    solves = "placement"
    capabilities: frozenset[Capability] = frozenset()
    requires: tuple[str, ...] = ()

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        return Solution(status=Status.FEASIBLE, placement=problem.placement(np.tile(np.arange(problem.slots)[::-1], (3, 1))), seed=seed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "registered" in metafunc.fixturenames:
        names = [info.name for info in registry.solver_infos() if info.solves == "placement" and info.available]
        metafunc.parametrize("registered", names)


@cache
def registered_elsewhere() -> dict[str, str]:
    """Digests of all registered placement solvers, from one process."""
    names = [info.name for info in registry.solver_infos() if info.solves == "placement" and info.available]
    return dict(zip(names, plans_elsewhere([type(registry.load_solver(name)) for name in names]), strict=True))


class TestRegistered(PlacementSolverSuite):
    """The suite, once per registered solver."""

    def elsewhere(self) -> str:
        return registered_elsewhere()[type(self).solver.name]  # type: ignore[attr-defined]

    @pytest.fixture(autouse=True)
    def _choose(self, registered: str) -> None:
        solver = registry.load_solver(registered)
        type(self).solver = type(solver)  # type: ignore[assignment]
        type(self).optimises = registered not in SIMPLE


def test_the_three_first_solvers_are_there() -> None:
    assert {"linear", "eplb", "local-search"} <= set(solver_names())


def with_points(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    monkeypatch.setattr("moesim.plugins.entry_points", lambda group: list(points))


def test_a_strangers_solver_comes_through_the_same_door(monkeypatch: pytest.MonkeyPatch) -> None:
    with_points(monkeypatch, EntryPoint("reversed", "test_solvers:Reversed", registry.GROUP))
    found = run_solver("reversed", problem_of(clustered_routing(MODEL, 50), MODEL))
    assert found.placement is not None
    assert found.placement.slots_LP[0].tolist() == list(range(15, -1, -1))
    asked = run_solver("reversed", problem_of(clustered_routing(MODEL, 50), MODEL, slots=24))
    assert asked.status == Status.INFEASIBLE
    assert "'reversed' places every expert once" in asked.notes["reason"]


def test_broken_plug_ins_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("reversed", "test_solvers:Reversed", registry.GROUP)
    with_points(monkeypatch, point, point)
    with pytest.raises(PluginError, match="registered by test_solvers:Reversed and test_solvers:Reversed"):
        solver_names()
    with_points(monkeypatch, EntryPoint("gone", "no_such_module:Thing", registry.GROUP))
    with pytest.raises(PluginError, match="no_such_module"):
        registry.load_solver("gone")
    with_points(monkeypatch, EntryPoint("wrong", "builtins:dict", registry.GROUP))
    with pytest.raises(PluginError, match="lacks name, solves"):
        registry.load_solver("wrong")
    with_points(monkeypatch)
    with pytest.raises(PluginError, match="pip install -e"):
        solver_names()


def test_an_unknown_solver_lists_the_installed() -> None:
    with pytest.raises(InputError, match="eplb, .*linear, local-search"):
        registry.load_solver("magic")


def test_an_answer_to_another_problem_is_refused() -> None:
    other = problem_of(clustered_routing(tiny_model(top_k=4), 50), tiny_model(top_k=4))

    class Confused(Reversed):
        def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
            return super().solve(other, seed=seed, time_limit_s=time_limit_s, progress=progress)

    with pytest.raises(SolverError, match="answered another problem"):
        run_solver(Confused(), problem_of(clustered_routing(MODEL, 50), MODEL))
