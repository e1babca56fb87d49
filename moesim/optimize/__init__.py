"""Optimisation: problems, solvers found by entry point, scoring of their plans."""

from moesim.optimize.compare import compare
from moesim.optimize.constraints import Apart, Constraints, Pin, load_rules
from moesim.optimize.online import online
from moesim.optimize.place import place, run_solver
from moesim.optimize.problem import Capability, Problem, Progress, Scenario, Solution, Solver, Status
from moesim.optimize.registry import load_solver, solver_infos, solver_names
from moesim.optimize.score import rows, score

__all__ = [
    "Apart", "Capability", "Constraints", "Pin", "Problem", "Progress", "Scenario", "Solution", "Solver", "Status",
    "compare", "load_rules", "load_solver", "online", "place", "rows", "run_solver", "score", "solver_infos", "solver_names",
]  # fmt: skip
