"""A closer look at one deployment of a capacity sweep: one step, placements against each other, its size over time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import MoesimError
from moesim.sweep import shelf
from moesim.sweep.kinds.capacity import CapacityFields, deployment_of, requests_of, routing_of

if TYPE_CHECKING:
    from moesim.serving import Arrivals

TOKENS_PER_DEVICE = 4096  # of the step in which load and traffic are shown, and placements are judged
RIVALS = ("linear", "eplb")  # placements that every deployment's own is compared with
MOST_REQUESTS = 50_000  # of an instance whose size is planned: beyond, planning takes longer than many a sweep
MOST_INTERVALS, FEWEST_INTERVALS = 48, 4
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400)
CHANCE = 1e-3  # that traffic of one rate is taken for varying


def one_step(fields: CapacityFields) -> list[dict[str, Any]]:
    """`Result.to_dict()` of one simulated step of the deployment's placement, where a trace says what its tokens choose."""
    from moesim.plan import Plan
    from moesim.sim import simulate

    if fields.trace is None:
        return []
    where = deployment_of(fields)
    trace = shelf.selected(fields.trace, fields.domain, fields.phase, ":")
    plan = Plan(name=where.name, model=where.model.name, model_digest=where.model.digest, placement=where.experts)
    return [simulate(trace, plan, where.cluster, tokens_per_device=TOKENS_PER_DEVICE, cost=where.costs).to_dict()]


def placements(fields: CapacityFields) -> tuple[dict[str, Any] | None, list[str]]:
    """The deployment's way of placing experts against others, learnt from one half of the trace and judged on the other; with remarks.

    None without a trace, or where it could not be done, which a remark says.
    """
    from moesim.optimize import compare

    if fields.trace is None:
        return None, []
    where = deployment_of(fields)
    own = [shelf.plan_at(fields.plan)] if fields.plan else []
    solvers = list(dict.fromkeys([*([fields.solver] if fields.solver else []), *RIVALS]))
    try:
        _, found = compare(
            shelf.selected(fields.trace, fields.domain, fields.phase, ":"),
            where.cluster,
            solvers,
            plans=own,
            slots=where.model.experts + fields.extra_slots,
            dispatch=fields.dispatch,
            tokens_per_device=TOKENS_PER_DEVICE,
            cost=where.costs,
            seed=fields.seed,
            time_limit_s=fields.time_limit,
        )
    except MoesimError as problem:
        return None, [f"placements were not compared: {problem}"]
    remarks = [f"plan {plan.name!r} was given: whether it learnt from the tokens it is judged on is not known" for plan in own]
    return found, remarks


def scaled(fields: CapacityFields) -> tuple[dict[str, Any] | None, str]:
    """Size of one instance over time, as `Scaling.to_dict()`; else None, and why there is none."""
    from moesim.optimize.scale import scale
    from moesim.serving import Slo
    from moesim.serving.sizes import Sizes, halves
    from moesim.trace import TraceStats

    requests = dealt(requests_of(fields), fields.replicas)
    if fields.prefill:
        return None, "prompts are computed by instances of their own, and sizes are planned for instances that compute both"
    if len(requests) > MOST_REQUESTS:
        return None, f"{len(requests):,} requests of an instance are more than the {MOST_REQUESTS:,} planned for here; run `moesim scale`"
    try:
        largest = replace(deployment_of(fields), replicas=1)
        load_LE = TraceStats.of(shelf.selected(fields.trace, fields.domain, fields.phase, ":")).load_LE if fields.trace else None
        sizes = Sizes.of(largest, halves(largest.cluster.size, largest.tp), load_LE=load_LE, drop=True)
        if len(sizes.devices) < 2:
            return None, f"the model fits on no fewer than {sizes.devices[0]} devices"
        longest = max(each.seconds for each in sizes.transitions.values())
        interval_s = interval_of(requests.span_s, longest)
        if requests.span_s < FEWEST_INTERVALS * interval_s:
            return None, f"a change of size takes up to {longest:.3g} s, too long for arrivals that last {requests.span_s:.3g} s"
        if not varies(requests, interval_s):
            return None, f"arrivals vary no more than chance over intervals of {interval_s:g} s, so one size serves throughout"
        names = {"deployment": largest.name, "instances": fields.replicas}
        found, solution = scale(
            requests,
            sizes,
            Slo.parse(fields.slo),
            routing=routing_of(fields),
            interval_s=interval_s,
            price=largest.price_per_hour,
            load_LE=load_LE,
            made_from=names,
            seed=fields.seed,
            time_limit_s=fields.time_limit,
        )
    except MoesimError as problem:
        return None, str(problem)
    if found is None:
        return None, str(solution.notes.get("reason", "no size keeps the objective at any rate"))
    return {**found.to_dict(), "instances": fields.replicas}, ""


def dealt(requests: Arrivals, instances: int) -> Arrivals:
    """What one of several instances serves: every so-many-th request."""
    if instances == 1:
        return requests
    return requests.take(np.arange(0, len(requests), instances), f"one of {instances} instances: every {instances}th request")


def interval_of(span_s: float, longest_s: float) -> float:
    """A round number of seconds that holds the longest change of size, and of which the arrivals hold few enough."""
    least = max(span_s / MOST_INTERVALS, longest_s)
    return float(next((step for step in STEPS_S if step >= least), least))


def varies(requests: Arrivals, interval_s: float) -> bool:
    """Whether requests per interval spread more than those of a Poisson process of one rate would, but for one chance in a thousand.

    The test of dispersion: sum (n - mean)² / mean follows chi-square with one degree of freedom less than intervals.
    """
    from scipy.stats import chi2

    whole = requests.per_second(interval_s)[: int(requests.span_s // interval_s)] * interval_s  # the last interval is cut short
    if len(whole) < 2:
        return False
    return bool(((whole - whole.mean()) ** 2).sum() / whole.mean() > chi2.isf(CHANCE, len(whole) - 1))
