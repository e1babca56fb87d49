"""Scaling: how many devices should serve in each interval, given the demand, what each size can serve and what changing costs.

    bill = rent + misses,   of interval n with size j after size i:
    rent    price * (max(devices i, j) * change_s[i, j] + devices j * (interval_s - change_s[i, j]))
    misses  miss_price * max(0, demand * interval_s - served),
    served  capacity i * (change_s - blocked_s)[i, j] + capacity j * (interval_s - change_s[i, j])

Requests beyond what an interval can serve miss their objective and are not carried over. That makes intervals meet only in
the size between them, so that dynamic programming is exact. Suffixes: N intervals, C sizes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, SolverError
from moesim.files import digest
from moesim.optimize.problem import Capability, Outcome, Progress, Status
from moesim.optimize.registry import load_solver
from moesim.plan import Resizing, ScalingPlan
from moesim.serving.sizes import Sizes

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalingProblem:
    """Choose one of C sizes for each of N intervals.

    demand_N      requests per second that arrive in each interval of `interval_s` seconds
    devices_C     devices of each size, rising
    capacity_C    requests per second each size serves within its service objectives
    change_s_CC   seconds from the order to change from one size to another until the new one serves; at most one interval
    blocked_s_CC  of these, seconds that serve nothing (intake paused, or down)
    moved_B_CC    bytes such a change moves or loads
    price         of one device for an hour; miss_price: of one request that misses its objectives
    start         index of the size in use before the first interval (None: none, the first size costs no change)
    history_N     demand of the intervals before the first: what may be learnt from

    Raises InputError naming the first number that is impossible.
    """

    demand_N: Floats
    interval_s: float
    devices_C: NDArray[np.int64]
    capacity_C: Floats
    change_s_CC: Floats
    blocked_s_CC: Floats
    moved_B_CC: Floats
    price: float
    miss_price: float
    start: int | None = None
    history_N: Floats = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        sizes = len(np.atleast_1d(self.devices_C))
        shapes = {"demand_N": None, "history_N": None, "devices_C": (sizes,), "capacity_C": (sizes,)}
        shapes |= dict.fromkeys(("change_s_CC", "blocked_s_CC", "moved_B_CC"), (sizes, sizes))  # type: ignore[arg-type]
        for name, shape in shapes.items():
            array = np.ascontiguousarray(getattr(self, name), np.int64 if name == "devices_C" else np.float64)
            if array.ndim < 1 or (shape is not None and array.shape != shape) or not np.isfinite(array).all() or (array < 0).any():
                raise InputError(f"{name} {array.shape}: expected finite numbers >= 0{'' if shape is None else f' of shape {shape}'}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if not len(self.demand_N) or not sizes or (np.diff(self.devices_C) <= 0).any() or self.devices_C[0] < 1:
            raise InputError(f"{len(self.demand_N)} intervals, sizes {self.devices_C.tolist()}: give one interval at least, and rising sizes >= 1")
        for name in ("interval_s", "price", "miss_price"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0) or (name == "interval_s" and value == 0):
                raise InputError(f"{name}={value!r} must be finite and {'> 0' if name == 'interval_s' else '>= 0'}")
        if np.diagonal(self.change_s_CC).any():
            raise InputError(f"change_s_CC: staying takes {np.diagonal(self.change_s_CC).tolist()} s; expected 0 on the diagonal")
        if (self.change_s_CC > self.interval_s).any() or (self.blocked_s_CC > self.change_s_CC).any():
            worst = float(self.change_s_CC.max())
            raise InputError(
                f"changes take up to {worst:g} s in intervals of {self.interval_s:g} s, blocked up to {self.blocked_s_CC.max():g} s; "
                "take intervals no shorter than a change, which is blocked no longer than it takes"
            )
        if self.start is not None and not 0 <= self.start < sizes:
            raise InputError(f"start={self.start!r} is no index of {sizes} sizes")

    @classmethod
    def of(
        cls, demand_N: ArrayLike, interval_s: float, sizes: Sizes, capacity_C: ArrayLike, *, price: float, miss_price: float, **more: Any
    ) -> ScalingProblem:
        """Problem of the sizes of a deployment; changes cost what their transitions take."""
        count = len(sizes.devices)
        tables: dict[str, Any] = {name: np.zeros((count, count)) for name in ("change_s_CC", "blocked_s_CC", "moved_B_CC")}
        index = {devices: c for c, devices in enumerate(sizes.devices)}
        for (a, b), each in sizes.transitions.items():
            pair = index[a], index[b]
            tables["change_s_CC"][pair], tables["blocked_s_CC"][pair] = each.seconds, each.pause_s or each.down_s
            tables["moved_B_CC"][pair] = each.moved_B + each.loaded_B
        return cls(
            demand_N=np.asarray(demand_N, np.float64),
            interval_s=interval_s,
            devices_C=np.asarray(sizes.devices, np.int64),
            capacity_C=np.asarray(capacity_C, np.float64),
            price=price,
            miss_price=miss_price,
            **tables,
            **more,
        )

    def infeasible(self) -> str | None:
        """Why no plan can serve anything, or None."""
        if not self.capacity_C.any() and self.demand_N.any():
            return f"no size of {self.devices_C.tolist()} devices serves a request within its objectives; give larger sizes or looser objectives"
        return None

    @cached_property
    def digest(self) -> str:
        """Names what the bill depends on."""
        arrays = (self.demand_N, self.devices_C, self.capacity_C, self.change_s_CC, self.blocked_s_CC)
        return digest(*(array.tobytes() for array in arrays), repr((self.interval_s, self.price, self.miss_price, self.start)))

    @property
    def season(self) -> int:
        """Intervals of a day, 0 where a day is no whole number of them."""
        season = round(DAY_S / self.interval_s)
        return season if season > 1 and abs(season * self.interval_s - DAY_S) < 1e-6 * DAY_S else 0

    @cached_property
    def rent_CC(self) -> Floats:
        """Rent of an interval in which the size changes from one to another."""
        most_CC = np.maximum(self.devices_C[:, None], self.devices_C[None])
        return np.asarray((most_CC * self.change_s_CC + self.devices_C[None] * (self.interval_s - self.change_s_CC)) * (self.price / 3600))

    @cached_property
    def served_CC(self) -> Floats:
        """Requests such an interval can serve."""
        open_CC = self.change_s_CC - self.blocked_s_CC
        return np.asarray(self.capacity_C[:, None] * open_CC + self.capacity_C[None] * (self.interval_s - self.change_s_CC))

    def missed(self, demand: ArrayLike) -> Floats:
        """[…, C, C] requests that miss in an interval of this demand (requests per second)."""
        return np.maximum(np.asarray(demand, np.float64)[..., None, None] * self.interval_s - self.served_CC, 0.0)

    def stage(self, demand: ArrayLike) -> Floats:
        """[…, C, C] bill of an interval of this demand, from size i to size j."""
        return self.rent_CC + self.miss_price * self.missed(demand)

    def before(self, size_N: Indices) -> Indices:
        """Size before each interval; that of the first is itself where none was in use."""
        return np.concatenate([[size_N[0] if self.start is None else self.start], size_N[:-1]]).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """What a plan costs: the objective everything is scored by."""

    rent: float
    missed: float  # requests
    miss_cost: float
    requests: float
    device_hours: float
    changes: int
    moved_B: float

    @property
    def total(self) -> float:
        """Rent and misses."""
        return self.rent + self.miss_cost

    @property
    def attainment(self) -> float:
        """Share of requests within their objectives."""
        return 1.0 - self.missed / self.requests if self.requests else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("total", "rent", "miss_cost", "missed", "requests", "attainment", "device_hours", "changes", "moved_B")
        return {name: getattr(self, name) for name in names}


def bill(problem: ScalingProblem, size_N: ArrayLike) -> Bill:
    """Bill of a size for each interval. Raises SolverError when it is no size of the problem for each of its intervals."""
    size = np.asarray(size_N)
    if size.shape != problem.demand_N.shape or size.dtype.kind not in "iu" or (size < 0).any() or (size >= len(problem.devices_C)).any():
        raise SolverError(f"sizes {size.dtype} {size.shape}: expected {len(problem.demand_N)} indices of {len(problem.devices_C)} sizes")
    size = size.astype(np.int64)
    before = problem.before(size)
    missed = float(problem.missed(problem.demand_N)[np.arange(len(size)), before, size].sum())
    rent = float(problem.rent_CC[before, size].sum())
    most = np.maximum(problem.devices_C[before], problem.devices_C[size])
    change_s = problem.change_s_CC[before, size]
    hours = float((most * change_s + problem.devices_C[size] * (problem.interval_s - change_s)).sum() / 3600)
    return Bill(
        rent=rent,
        missed=missed,
        miss_cost=missed * problem.miss_price,
        requests=float(problem.demand_N.sum() * problem.interval_s),
        device_hours=hours,
        changes=int((before != size).sum()),
        moved_B=float(np.where(before != size, problem.moved_B_CC[before, size], 0.0).sum()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalingSolution(Outcome):
    """A scaling solver's answer: the index of a size for each interval; infeasible ones have none."""

    size_N: Indices | None


class ScalingSolver(Protocol):
    """What the entry-point group `moesim.solvers` holds for scaling: a class made without arguments, `solves = "scaling"`."""

    name: str
    solves: str
    capabilities: frozenset[Capability]
    requires: tuple[str, ...]

    def solve(self, problem: ScalingProblem, *, seed: int, time_limit_s: float, progress: Progress) -> ScalingSolution:
        """Solve within the time limit. A causal solver's size of interval n depends on demand before n alone."""
        ...


def solve_scaling(
    solver: str | ScalingSolver,
    problem: ScalingProblem,
    *,
    seed: int = 0,
    time_limit_s: float = 30.0,
    progress: Progress = lambda share, what: None,
) -> tuple[ScalingSolution, Bill | None]:
    """Solution of `problem` and its bill, which is ours whatever the solver claims; the objective is the bill's total.

    Raises SolverError when a solver answers another problem, or claims a bound above its own bill.
    """
    chosen: Any = load_solver(solver, "scaling") if isinstance(solver, str) else solver
    if reason := problem.infeasible():
        return ScalingSolution(status=Status.INFEASIBLE, size_N=None, seed=seed, notes={"reason": reason}), None
    start = time.perf_counter()
    found: ScalingSolution = chosen.solve(problem, seed=seed, time_limit_s=time_limit_s, progress=progress)
    seconds = time.perf_counter() - start
    if found.size_N is None:
        if found.status != Status.INFEASIBLE:
            raise SolverError(f"solver {chosen.name!r} returned status {found.status!r} without sizes")
        return found, None
    cost = bill(problem, found.size_N)
    if found.bound is not None and found.bound > cost.total * (1 + 1e-9) + 1e-9:
        raise SolverError(f"solver {chosen.name!r} claims a bound of {found.bound:g} above its own bill {cost.total:g}")
    sizes = np.asarray(found.size_N, np.int64)
    return (
        ScalingSolution(status=found.status, size_N=sizes, objective=cost.total, bound=found.bound, seconds=seconds, seed=seed, notes=found.notes),
        cost,
    )


def plan_scaling(
    problem: ScalingProblem,
    changes: Mapping[tuple[int, int], Resizing],
    *,
    solver: str = "optimal",
    model: str,
    model_digest: str,
    seed: int = 0,
    time_limit_s: float = 30.0,
    progress: Progress = lambda share, what: None,
    name: str | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> tuple[ScalingPlan | None, ScalingSolution]:
    """Plan of `problem` by the named solver, and the solution it came from; no plan when the problem is infeasible.

    `changes` gives, for (devices before, devices after), what that change costs; its `at_s` is set.
    """
    from dataclasses import replace

    solution, cost = solve_scaling(solver, problem, seed=seed, time_limit_s=time_limit_s, progress=progress)
    if solution.size_N is None or cost is None:
        return None, solution
    devices_N = problem.devices_C[solution.size_N]
    turns = (np.flatnonzero(np.diff(devices_N)) + 1).tolist()
    plan = ScalingPlan(
        name=name or solver,
        model=model,
        model_digest=model_digest,
        interval_s=problem.interval_s,
        devices_N=devices_N.astype(np.int32),
        changes=tuple(replace(changes[int(devices_N[n - 1]), int(devices_N[n])], at_s=float(n * problem.interval_s)) for n in turns),
        made_from={**(made_from or {}), "problem": problem.digest, "solver": solver, "seed": seed, "moesim": version("moesim")},
        solution={**solution.record(), "bill": cost.to_dict()},
    )
    return plan, solution
