"""Finds solvers through the entry-point group `moesim.solvers`; first-party ones come through the same door."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from importlib.util import find_spec

from moesim.errors import InputError, PluginError
from moesim.optimize.problem import Problem, Solver
from moesim.plugins import made, registered

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


def solver_names() -> list[str]:
    """Names of the registered solvers, sorted."""
    return list(registered(GROUP, "solver"))


def solver_infos() -> list[SolverInfo]:
    """Every registered solver with its capabilities and what it lacks."""
    infos = []
    for name, point in registered(GROUP, "solver").items():
        solver = _load(point)
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
    points = registered(GROUP, "solver")
    if name not in points:
        raise InputError(f"solver {name!r} is not installed; installed: {', '.join(points)}")
    solver = _load(points[name])
    if solver.solves != solves:
        kin = ", ".join(info.name for info in solver_infos() if info.solves == solves) or "none"
        raise InputError(f"solver {name!r} solves {solver.solves} problems, not {solves}; solvers of {solves}: {kin}")
    if missing := [module for module in solver.requires if find_spec(module) is None]:
        raise PluginError(f"solver {name!r} needs {', '.join(missing)}; install with pip")
    return solver


def _load(point: EntryPoint) -> Solver:
    solver: Solver = made(point, "solver")
    if lacking := [attribute for attribute in _NEEDED if not hasattr(solver, attribute)]:
        raise PluginError(f"solver {point.name!r} ({point.value}) lacks {', '.join(lacking)}; see the Solver protocol")
    return solver


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
