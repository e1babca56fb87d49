"""Finds solvers through the entry-point group `moesim.solvers`; first-party ones come through the same door."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

from moesim.errors import InputError, PluginError
from moesim.optimize.problem import Problem, Solver

GROUP = "moesim.solvers"
_NEEDED = ("name", "solves", "capabilities", "requires", "solve")


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverInfo:
    """One registered solver, as `moesim solvers` lists it."""

    name: str
    solves: str
    capabilities: tuple[str, ...]
    missing: tuple[str, ...]  # modules it requires that are not installed
    package: str
    summary: str

    @property
    def available(self) -> bool:
        """True when everything it requires is installed."""
        return not self.missing


def _points() -> dict[str, EntryPoint]:
    points = list(entry_points(group=GROUP))
    twice = [name for name, times in Counter(point.name for point in points).items() if times > 1]
    if twice:
        values = [point.value for point in points if point.name == twice[0]]
        raise PluginError(f"{GROUP}: {twice[0]!r} is registered by {' and '.join(values)}; uninstall one of them")
    if not points:
        raise PluginError(f"{GROUP}: no solver is registered; entry points exist after installation: run `pip install -e .`")
    return {point.name: point for point in sorted(points, key=lambda point: point.name)}


def solver_names() -> list[str]:
    """Names of the registered solvers, sorted."""
    return list(_points())


def solver_infos() -> list[SolverInfo]:
    """Every registered solver with its capabilities and what it lacks."""
    infos = []
    for name, point in _points().items():
        solver = _load(name, point)
        missing = tuple(module for module in solver.requires if find_spec(module) is None)
        summary = (type(solver).__doc__ or "").strip().splitlines() or [""]
        infos.append(
            SolverInfo(
                name=name,
                solves=solver.solves,
                capabilities=tuple(sorted(solver.capabilities)),
                missing=missing,
                package=point.dist.name if point.dist else "?",
                summary=summary[0],
            )
        )
    return infos


def load_solver(name: str, solves: str = "placement") -> Solver:
    """The solver called `name`, of a kind; InputError lists those installed, PluginError names what is broken or missing."""
    points = _points()
    if name not in points:
        raise InputError(f"solver {name!r} is not installed; installed: {', '.join(points)}")
    solver = _load(name, points[name])
    if solver.solves != solves:
        kin = ", ".join(info.name for info in solver_infos() if info.solves == solves) or "none"
        raise InputError(f"solver {name!r} solves {solver.solves} problems, not {solves}; solvers of {solves}: {kin}")
    if missing := [module for module in solver.requires if find_spec(module) is None]:
        raise PluginError(f"solver {name!r} needs {', '.join(missing)}; install with pip")
    return solver


def _load(name: str, point: EntryPoint) -> Solver:
    try:
        solver = point.load()()
    except Exception as problem:
        raise PluginError(f"solver {name!r} ({point.value}) does not load: {problem}") from problem
    if lacking := [attribute for attribute in _NEEDED if not hasattr(solver, attribute)]:
        raise PluginError(f"solver {name!r} ({point.value}) lacks {', '.join(lacking)}; see the Solver protocol")
    loaded: Solver = solver
    return loaded


def unmet(solver: Solver, problem: Problem) -> str | None:
    """What the problem asks for that the solver cannot do, or None."""
    if problem.slots > problem.model.experts and "replication" not in solver.capabilities:
        return f"{problem.slots - problem.model.experts} replicas per layer asked for; {solver.name!r} places every expert once"
    if len(set(problem.slots_G.tolist())) > 1 and "heterogeneous" not in solver.capabilities:
        return f"devices offer unequal slots {problem.slots_G.tolist()}; {solver.name!r} needs equal ones"
    if problem.constraints.rules and "rules" not in solver.capabilities:
        return f"{problem.constraints.rules[0]}: {solver.name!r} keeps no such rules; use one of {', '.join(_able('rules'))}"
    if problem.scenarios and "scenarios" not in solver.capabilities:
        return f"{len(problem.scenarios)} scenarios asked for; {solver.name!r} looks at all tokens as one; use one of {', '.join(_able('scenarios'))}"
    if not len(problem.experts_TLK) and problem.stats.load_LE.any() and "loads" not in solver.capabilities:
        return f"only loads are known, and {solver.name!r} needs the tokens themselves; use one of {', '.join(_able('loads'))}"
    return None


def _able(capability: str) -> list[str]:
    """Placement solvers with a capability."""
    return [info.name for info in solver_infos() if info.solves == "placement" and capability in info.capabilities]
