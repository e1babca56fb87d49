"""score: what plans do to a trace, in the figures people compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesim.cost import CostModel
from moesim.hardware import Cluster
from moesim.plan import Plan
from moesim.result import Result
from moesim.sim import simulate
from moesim.trace import Trace


def score(trace: Trace, plans: Sequence[Plan], cluster: Cluster, *, tokens_per_device: int = 4096, cost: CostModel | None = None) -> list[Result]:
    """Result of every plan on the trace's selected tokens, with one cost model.

    `Result.summary()` gives `max_load_ratio` (busiest device over mean device, mean over layers), `fanout_devices` and
    `fanout_nodes` (distinct devices and nodes a token is sent to, its own included, mean over tokens and layers),
    `a2a_bytes` (bytes between devices per layer and step, dispatch and combine) and `layer_time_s`.
    Raises PlanError when a plan is for another model or device count, before anything is computed.
    """
    for plan in plans:
        plan.check_fits(trace.model, cluster.size, place=f"plan {plan.name!r}")
    costs = cost or CostModel.of(cluster, trace.model)
    return [simulate(trace, plan, cluster, tokens_per_device=tokens_per_device, cost=costs) for plan in plans]


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Summaries, for a table or JSON."""
    return [result.summary() for result in results]
