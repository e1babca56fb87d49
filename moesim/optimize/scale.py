"""scale: from arrivals and objectives to a scaling plan, served to see whether it keeps them, and what happens if."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError
from moesim.optimize.problem import Progress
from moesim.optimize.registry import solver_infos
from moesim.optimize.scaling import Bill, ScalingProblem, ScalingSolution, bill, plan_scaling, solve_scaling
from moesim.plan import ScalingPlan
from moesim.serving.arrivals import Arrivals
from moesim.serving.capacity import Capacity, capacity, steady
from moesim.serving.changes import Change
from moesim.serving.deployment import Deployment
from moesim.serving.failures import Recovery, recovery
from moesim.serving.result import ServingResult
from moesim.serving.routing import Routing
from moesim.serving.serve import serve
from moesim.serving.sizes import Sizes
from moesim.serving.slo import Slo
from moesim.units import human

SCHEMA_VERSION = 1
HEADROOM = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # shares of capacity left free, tried in turn until the plan, served, keeps the objectives
EVENT_BINS, BEFORE, AFTER = 120, 4, 8  # of a change looked at closely; before and after it, in times its length
MISS = 10.0  # price of a missed request, in rents of serving one on the size that does it cheapest


@dataclass(frozen=True, kw_only=True, eq=False)
class Outlook:
    """One way things may go: the plan as made, or traffic that doubles, or a device that dies."""

    case: str
    cost: Bill
    served: ServingResult
    plan: ScalingPlan
    recoveries: tuple[Recovery, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        summary = self.served.summary()
        keys = ("requests", "served", "attainment", "meets_slo", "ttft_s", "tpot_s", "latency_s", "device_hours")
        return {
            "case": self.case,
            "bill": self.cost.to_dict(),
            "served": {key: summary[key] for key in keys},
            "failures": [{**each.damage.to_dict(), "recovery": each.transition.to_dict()} for each in self.recoveries],
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaling:
    """A scaling plan with its evidence.

    capacities   of each size, whole; headroom: share of them the plan leaves free; bills: of every solver of scaling on the same problem, by name
    outlooks     the plan served as it is, then what if
    """

    plan: ScalingPlan
    solution: ScalingSolution
    problem: ScalingProblem
    sizes: Sizes
    slo: Slo
    capacities: tuple[Capacity, ...]
    bills: Mapping[str, Bill]
    outlooks: tuple[Outlook, ...]
    currency: str
    headroom: float
    notes: tuple[str, ...]

    @property
    def served(self) -> ServingResult:
        """The plan, served."""
        return self.outlooks[0].served

    def timeline(self) -> list[dict[str, Any]]:
        """Every interval: demand, devices, what they can serve, and the share of its requests that kept the objectives."""
        by_devices = dict(zip(self.problem.devices_C.tolist(), self.problem.capacity_C.tolist(), strict=True))
        step = self.plan.interval_s
        return [
            {
                "start_s": n * step,
                "demand_per_s": float(self.problem.demand_N[n]),
                "devices": int(devices),
                "capacity_per_s": by_devices[int(devices)],
                "attainment": self.served.attainment_between(n * step, (n + 1) * step),
            }
            for n, devices in enumerate(self.plan.devices_N)
        ]

    def event(self) -> dict[str, Any] | None:
        """The largest growth of the plan (without one, the first change) as it was served: requests waiting and running, slowest first token.

        `slowest_first_s` is of the requests that arrive in an interval of `bin_s`; None where none does, or one is not served.
        """
        if not self.plan.changes:
            return None
        change = max(self.plan.changes, key=lambda change: (change.after - change.before, -change.at_s))
        long_s = max(change.seconds, change.down_s, 1.0)
        start_s = max(0.0, change.at_s - BEFORE * long_s)
        bin_s = (change.at_s + AFTER * long_s - start_s) / EVENT_BINS
        middle_s_N, run = start_s + bin_s * (np.arange(EVENT_BINS) + 0.5), self.served

        def until(times: NDArray[np.float64]) -> NDArray[np.int64]:
            """[bins] how many of these happened by the middle of each bin."""
            return np.searchsorted(np.sort(times[np.isfinite(times)]), middle_s_N, side="right")

        came, began, done = until(run.arrival_s_R[np.isfinite(run.start_s_R)]), until(run.start_s_R), until(run.end_s_R)
        place_R = np.floor((run.arrival_s_R - start_s) / bin_s)
        slowest = [run.ttft_s_R[place_R == n] for n in range(EVENT_BINS)]
        return {
            **asdict(change),
            "start_s": start_s,
            "bin_s": bin_s,
            "waiting": (came - began).tolist(),
            "running": (began - done).tolist(),
            "slowest_first_s": [float(times.max()) if len(times) and np.isfinite(times).all() else None for times in slowest],
            "limit_s": self.slo.ttft_s,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "scaling-result",
            "plan": self.plan.to_dict(),
            "slo": self.slo.to_dict(),
            "currency": self.currency,
            "price_per_device_hour": self.problem.price,
            "price_per_miss": self.problem.miss_price,
            "sizes": [{"devices": devices, **each.to_dict()} for devices, each in zip(self.problem.devices_C.tolist(), self.capacities, strict=True)],
            "transitions": [each.to_dict() for each in self.sizes.transitions.values()],
            "solvers": {name: cost.to_dict() for name, cost in self.bills.items()},
            "timeline": self.timeline(),
            "event": self.event(),
            "outlooks": [each.to_dict() for each in self.outlooks],
            "headroom": self.headroom,
            "notes": list(self.notes),
        }


def scale(
    arrivals: Arrivals,
    sizes: Sizes,
    slo: Slo,
    *,
    routing: Routing | None = None,
    interval_s: float = 300.0,
    solver: str = "optimal",
    price: float | None = None,
    miss_price: float | None = None,
    failures: Sequence[tuple[float, int]] = (),
    load_LE: ArrayLike | None = None,
    made_from: Mapping[str, Any] | None = None,
    seed: int = 0,
    time_limit_s: float = 30.0,
    progress: Progress = lambda share, what: None,
) -> tuple[Scaling | None, ScalingSolution]:
    """Plan for these arrivals, and the solution it came from; no plan when no size keeps the objectives at any rate.

    `price` of a device for an hour defaults to the deployment's, then the profile's; without one, device-hours are counted.
    `miss_price` of a request defaults to ten rents of serving it where that is cheapest. `failures` are (seconds, device).
    Raises InputError where a change takes longer than an interval, or a failure names no device in use.
    """
    demand_N = arrivals.per_second(interval_s)
    ScalingProblem.of(demand_N, interval_s, sizes, np.ones(len(sizes.devices)), price=0.0, miss_price=0.0)  # refuses what cannot be, before long work
    for at_s, device in failures:
        if not (0 <= at_s < len(demand_N) * interval_s and 0 <= device < sizes.devices[-1]):
            there = f"there are {sizes.devices[-1]} devices, planned for {len(demand_N) * interval_s:g} s"
            raise InputError(f"device {device} dies after {human(at_s, 's')}: {there}; name one of them then")
    progress(0.0, "step times")
    ready = sizes.prepared(routing, seed=seed)
    found, alike = [], steady(arrivals, interval_s)
    for c, deployment in enumerate(ready.deployments):
        progress((c + 1) / (len(ready.deployments) + 4), f"capacity of {deployment.cluster.size} devices")
        found.append(capacity(alike, deployment, slo, seed=seed))
    capacity_C = np.asarray([each.requests_per_s for each in found])
    largest = ready.deployments[-1]
    rent = next((each for each in (price, largest.price_per_hour, largest.cluster.devices[0].rent_per_hour) if each is not None), None)
    paid = 1.0 if rent is None else rent
    least = np.divide(np.asarray(sizes.devices) * paid / 3600, capacity_C, out=np.full(len(capacity_C), np.inf), where=capacity_C > 0).min()
    miss = miss_price if miss_price is not None else MISS * float(least) if np.isfinite(least) else MISS * paid
    names = {
        "arrivals": arrivals.digest,
        "cluster": largest.cluster.name,
        "cluster_digest": largest.cluster.digest,
        "slo": slo.to_dict(),
        "method": ready.method.name,
        **(made_from or {}),
    }
    common: dict[str, Any] = {"seed": seed, "time_limit_s": time_limit_s}

    def planned(demand_N: NDArray[np.float64], requests: Arrivals, case: str) -> tuple[Outlook | None, ScalingSolution, ScalingProblem, float]:
        """The plan with the least headroom that keeps the objectives when served; where none does, the one that comes nearest."""
        best: tuple[Outlook | None, ScalingSolution, ScalingProblem, float] | None = None
        for headroom in HEADROOM:
            problem = ScalingProblem.of(demand_N, interval_s, ready, capacity_C * (1 - headroom), price=paid, miss_price=miss)
            plan, solution = plan_scaling(
                problem,
                ready.resizings,
                solver=solver,
                model=largest.model.name,
                model_digest=largest.model.digest,
                made_from={**names, "headroom": headroom},
                **common,
            )
            if plan is None or solution.size_N is None:
                return best or (None, solution, problem, headroom)
            if best is not None and best[0] is not None and np.array_equal(plan.devices_N, best[0].plan.devices_N):
                continue
            served = run(plan, ready, requests, slo, seed=seed)
            if best is None or best[0] is None or served.attainment > best[0].served.attainment:
                best = Outlook(case=case, cost=bill(problem, solution.size_N), served=served, plan=plan), solution, problem, headroom
            if served.meets_slo:
                break
        assert best is not None
        return best

    progress(0.6, f"{solver}, and serving its plan")
    first, solution, problem, headroom = planned(demand_N, arrivals, "the plan")
    if first is None or solution.size_N is None:
        return None, solution
    plan, bills = first.plan, {solver: first.cost}
    for name in (info.name for info in solver_infos() if info.solves == "scaling" and info.available and info.name != solver):
        other = solve_scaling(name, problem, **common)[1]
        if other is not None:
            bills[name] = other
    progress(0.75, "what if traffic doubles")
    twice = doubled(arrivals, seed=seed)
    more_N = twice.per_second(interval_s)
    cost = bill(replace(problem, demand_N=more_N), solution.size_N)
    outlooks = [first, Outlook(case="traffic doubles, same plan", cost=cost, served=run(plan, ready, twice, slo, seed=seed), plan=plan)]
    if (again := planned(more_N, twice, "traffic doubles, planned for")[0]) is not None:
        outlooks.append(again)
    notes = [
        "requests beyond an interval's capacity are counted as missed and not carried over; the plan served shows what queues do",
        "capacity is measured on these requests, sped up or slowed down: bursts inside an interval grow with the rate",
        *(note for each in ready.transitions.values() for note in each.notes),
        *ready.notes,
        *outlooks[0].served.notes,
    ]
    for at_s, device in failures:
        serving = in_use(plan, at_s)
        if device >= serving or serving <= largest.tp:
            unused = f"nobody notices: the first {serving} devices serve then"
            what = unused if device >= serving else "nothing serves from then on: no rank is left"
            notes.insert(0, f"device {device} dies after {human(at_s, 's')}, and {what}")
            continue
        progress(0.9, f"what if device {device} dies")
        changes, recovered = with_failure(plan, ready, at_s, device, routing=routing, load_LE=load_LE, seed=seed)
        served = serve(arrivals, ready.deployment(int(plan.devices_N[0])), slo=slo, seed=seed, changes=changes)
        case = f"device {device} dies after {human(at_s, 's')}"
        outlooks.append(Outlook(case=case, cost=first.cost, served=served, plan=plan, recoveries=(recovered,)))
    if headroom:
        notes.insert(0, f"planned with {headroom:.0%} of every size's capacity left free: with less the plan, served, kept the objectives less often")
    if not first.served.meets_slo:
        notes.insert(0, f"no headroom up to {HEADROOM[-1]:.0%} keeps the objectives: {first.served.attainment:.2%} of requests; give larger sizes")
    if rent is None:
        notes.insert(0, "no price is known for these devices: rent is counted in device-hours; give one")
    scaling = Scaling(
        plan=plan,
        solution=solution,
        problem=problem,
        sizes=ready,
        slo=slo,
        capacities=tuple(found),
        bills=bills,
        outlooks=tuple(outlooks),
        headroom=headroom,
        currency="$" if rent is not None else "device-hours",
        notes=tuple(dict.fromkeys(notes)),
    )
    return scaling, solution


def run(plan: ScalingPlan, sizes: Sizes, arrivals: Arrivals, slo: Slo, *, seed: int = 0) -> ServingResult:
    """The arrivals, served as the plan says; the sizes must be prepared."""
    return serve(arrivals, sizes.deployment(int(plan.devices_N[0])), slo=slo, seed=seed, changes=sizes.changes(plan))


def doubled(arrivals: Arrivals, *, seed: int = 0) -> Arrivals:
    """Every request twice at about its time: the second one comes later by a random gap of the mean length."""
    gap_s = arrivals.span_s / max(len(arrivals) - 1, 1)
    late_R = arrivals.arrival_s_R + np.random.default_rng(seed).exponential(gap_s, len(arrivals))
    return arrivals.copied(np.concatenate([arrivals.arrival_s_R, np.minimum(late_R, arrivals.span_s)]), f"{arrivals.name}, doubled")


def in_use(plan: ScalingPlan, at_s: float) -> int:
    """Devices that serve at a time: those of the last change that was done by then."""
    done = next((each for each in reversed(plan.changes) if each.at_s + each.seconds <= at_s), None)
    return done.after if done else int(plan.devices_N[0])


def with_failure(
    plan: ScalingPlan,
    sizes: Sizes,
    at_s: float,
    device: int,
    *,
    routing: Routing | None = None,
    load_LE: ArrayLike | None = None,
    seed: int = 0,
) -> tuple[tuple[Change, ...], Recovery]:
    """The plan's changes with a device that dies, and its recovery. It stays dead: sizes that need it are served by the survivors.

    Raises InputError when the device is not in use at that time.
    """
    devices = in_use(plan, at_s)
    if not 0 <= device < devices:
        raise InputError(f"device {device} is not in use after {at_s:g} s, when {devices} devices serve; name one of those")
    using = sizes.deployment(devices)
    found = recovery(using, device, load_LE=load_LE, rates=sizes.rates)
    found = replace(found, deployment=found.deployment.prepared(routing, seed=seed))
    alive, changes = sizes.cluster.size - using.tp, [found.change(at_s, device // using.tp)]
    without: dict[int, Deployment] = {devices: found.deployment}
    for change in sizes.changes(plan):
        if change.at_s >= at_s and change.to is not None and (size := change.to.cluster.size) > alive:
            if size not in without:
                left = recovery(sizes.deployment(size), device, load_LE=load_LE, rates=sizes.rates).deployment
                without[size] = left.prepared(routing, seed=seed)
            change = replace(change, to=without[size])
        changes.append(change)
    return tuple(sorted(changes, key=lambda change: change.at_s)), found
