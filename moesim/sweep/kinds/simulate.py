"""Kind "simulate": place experts by one part of a trace, or take a plan, and judge on another part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import model_validator

from moesim.sweep import shelf
from moesim.sweep.fields import ClusterName, Count, Fields, PlanPath, Range, Seconds, SolverName, SystemName, Times, TracePath, Whole
from moesim.sweep.kinds.base import Figure, Found, Kind


class SimulateFields(Fields):
    """`learn` and `judge` are ranges of the tokens of `domain` and `judge_domain` (default: the same); a `system` means the event engine.

    bandwidth multiplies that of every link between devices and nodes.
    """

    trace: TracePath
    cluster: ClusterName
    solver: SolverName | None = None
    plan: PlanPath | None = None
    domain: str | None = None
    judge_domain: str | None = None
    phase: Literal["train", "prefill", "decode"] | None = None
    learn: Range = "0%:50%"
    judge: Range = "50%:"
    replicas: Whole = 0
    dispatch: str = "even"
    tokens_per_device: Count = 4096
    transport: str | None = None
    bandwidth: Times = 1.0
    system: SystemName | None = None
    mode: Literal["prefill", "decode", "training"] = "prefill"
    context: Count = 4096
    contention: bool = False
    time_limit: Seconds = 30.0
    seed: int = 0

    @model_validator(mode="after")
    def _one_plan(self) -> SimulateFields:
        if (self.solver is None) == (self.plan is None):
            raise ValueError("give a solver, or a plan, and not both")
        if self.plan is not None and self.replicas:
            raise ValueError(f"a plan has its own slots; replicas = {self.replicas} goes with a solver")
        return self


def simulate_case(fields: SimulateFields) -> Found:
    """Summary of a simulation, with what the solver said."""
    from moesim.optimize import score
    from moesim.sim.event import simulate_event

    where = shelf.cluster(fields.cluster, fields.bandwidth)
    cost = shelf.costs(fields.cluster, fields.bandwidth, fields.trace, fields.transport)
    figures: dict[str, Any] = {}
    if fields.plan is not None:
        plan = shelf.plan_at(fields.plan)
    else:
        slots = shelf.whole(fields.trace).model.experts + fields.replicas
        part = (fields.trace, fields.domain, fields.phase, fields.learn)
        asked = (*part, fields.cluster, fields.bandwidth, fields.transport, slots, fields.dispatch, fields.tokens_per_device)
        made, solution = shelf.placed(fields.solver or "", fields.seed, fields.time_limit, *asked)
        if made is None:
            return Found(figures={}, infeasible=str(solution.notes.get("reason", "the solver found no placement")))
        plan, figures = made, {"solver_status": str(solution.status), "gap": solution.gap}
    judged = shelf.selected(fields.trace, fields.judge_domain or fields.domain, fields.phase, fields.judge)
    if fields.system is None:
        result = score(judged, [plan], where, tokens_per_device=fields.tokens_per_device, cost=cost)[0]
    else:
        event = simulate_event(
            judged, plan, where, tokens_per_device=fields.tokens_per_device, cost=cost, system=fields.system, mode=fields.mode,
            context=fields.context, contention=fields.contention,
        )  # fmt: skip
        figures["whole_step_s"] = float(event.step_s_S.mean())
        result = replace(event, name=plan.name)
    summary = {name: value for name, value in result.summary().items() if name not in ("name", "engine")}
    return Found(figures={**summary, **figures}, notes=result.notes)


KIND = Kind(
    name="simulate",
    says="place by one part of a trace, judge on another; any cluster, solver, system and step size",
    fields=SimulateFields,
    run=simulate_case,
    choices=("solver", "plan", "replicas", "dispatch", "system", "transport", "cluster"),
    figures=(
        Figure(name="layer_time_s", label="layer time", unit="s"),
        Figure(name="max_load_ratio", label="busiest/mean"),
        Figure(name="fanout_devices", label="devices/token"),
        Figure(name="fanout_nodes", label="nodes/token"),
        Figure(name="a2a_bytes", label="all-to-all/layer", unit="B"),
        Figure(name="tokens_per_s", label="tokens/s", less=False),
    ),
)
