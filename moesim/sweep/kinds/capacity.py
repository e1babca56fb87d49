"""Kind "capacity": one deployment under one traffic, for the question which deployment to buy.

The deployments are the choices; traffic, bandwidth and skew are conditions, given in [[cases]] one by one for a sensitivity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from moesim.errors import InputError
from moesim.sweep import shelf
from moesim.sweep.fields import (
    ArrivalsText,
    ClusterName,
    Count,
    Fields,
    ModelName,
    PlanPath,
    Range,
    Seconds,
    SloText,
    SolverName,
    Times,
    TracePath,
    Whole,
)
from moesim.sweep.kinds.base import Figure, Found, Kind

if TYPE_CHECKING:
    from moesim.serving import Arrivals, Deployment, Routing, ServingResult

Unit = Annotated[float, Field(ge=0, le=1)]
_RUN = {"arrivals": "", "slo": "latency=1s", "traffic": 1.0, "first": None, "replicas": 1, "prefill": 0}  # what an instance does not depend on


class CapacityFields(Fields):
    """`prices` are those of a device for an hour, by the device's name (default: the profile's rent).

    traffic multiplies the requests per second, bandwidth that of every link, skew is the share of requests that become
    those of `skew_domain`, the others staying as in the trace. extra_slots are slots beyond one per expert.
    """

    arrivals: ArrivalsText
    slo: SloText
    cluster: ClusterName
    trace: TracePath | None = None
    model: ModelName | None = None
    domain: str | None = None
    phase: Literal["train", "prefill", "decode"] | None = None
    learn: Range = ":"
    solver: SolverName | None = None
    plan: PlanPath | None = None
    extra_slots: Whole = 0
    dispatch: str = "even"
    layout: str | None = None
    replicas: Count = 1
    prefill: Whole = 0
    max_seqs: Count = 256
    max_batch_tokens: Count = 8192
    prefix_cache: bool = False
    exchange: Literal["all-to-all", "all-gather"] = "all-to-all"
    transport: str | None = None
    prices: dict[str, float] = Field(default_factory=dict)
    traffic: Times = 1.0
    bandwidth: Times = 1.0
    skew: Unit | None = None
    skew_domain: str | None = None
    first: Count | None = None
    time_limit: Seconds = 30.0
    seed: int = 0

    @model_validator(mode="after")
    def _sources(self) -> CapacityFields:
        if (self.trace is None) == (self.model is None):
            raise ValueError("give a trace (routing of the model served), or a model (a typical routing is made up), and not both")
        if self.trace is None and (self.solver or self.skew is not None or self.domain or self.phase):
            raise ValueError("solver, skew, domain and phase need a trace")
        if self.solver is not None and self.plan is not None:
            raise ValueError("give a solver or a plan, not both; without either, experts live in order")
        if (self.skew is None) != (self.skew_domain is None):
            raise ValueError("skew and skew_domain go together: the share of requests that become those of the domain")
        return self


def serve_case(fields: CapacityFields) -> Found:
    """Latencies, attainment of the SLO, use and price of one deployment under one traffic."""
    result = served(fields)
    deployment = deployment_of(fields)
    summary = result.summary()
    price = deployment.price_per_hour
    figures: dict[str, Any] = {
        "attainment": summary["attainment"],
        "meets_slo": bool(summary["meets_slo"]),
        "price_per_hour": None if price is None else price * deployment.devices,
        "devices": deployment.devices,
        **{f"{name}_{p}": summary[f"{name}_s"][p] for name in ("ttft", "tpot", "latency") for p in ("mean", "p50", "p99")},
        **{name: summary[name] for name in ("requests", "served", "refused", "requests_per_s", "output_tokens_per_s", "goodput_per_s", "sent_back",
                                            "utilisation", "output_token_J", "cost", "cost_per_million_output_tokens")},
        **{f"step_{name}_s": seconds / max(1, result.steps) for name, seconds in result.step_parts_s.items()},
    }  # fmt: skip
    notes = list(result.notes)
    if price is None and fields.prices:
        there = ", ".join(sorted({device.name for device in deployment.cluster.devices}))
        notes.insert(
            0, f"{deployment.cluster.name}: its devices are {there}, prices are given for {', '.join(sorted(fields.prices))}; it has no price"
        )
    return Found(figures=figures, notes=notes)


def served(fields: CapacityFields) -> ServingResult:
    """The whole result behind a case's figures."""
    from moesim.serving import Slo, serve

    return serve(requests_of(fields), deployment_of(fields), seed=fields.seed, slo=Slo.parse(fields.slo))


def requests_of(fields: CapacityFields) -> Arrivals:
    """The requests of a case."""
    requests = shelf.arrivals(fields.arrivals, fields.seed)
    requests = requests.first(fields.first) if fields.first else requests
    return requests.times(fields.traffic) if fields.traffic != 1.0 else requests


def deployment_of(fields: CapacityFields) -> Deployment:
    """The deployment of a case, ready to serve."""
    one = _instance(fields.model_copy(update=_RUN).model_dump_json())
    ahead = replace(one, name="prefill", replicas=fields.prefill) if fields.prefill else None
    return replace(one, name=f"{fields.replicas} × {one.name}", replicas=fields.replicas, prefill=ahead)


@lru_cache(32)
def _instance(key: str) -> Deployment:
    """One instance of a deployment, its step law made: once per process, whatever the traffic and however many there are."""
    from moesim.cost import CostModel
    from moesim.serving import Deployment, parse_layout

    fields = CapacityFields.model_validate_json(key)
    where = shelf.cluster(fields.cluster, fields.bandwidth)
    model = shelf.whole(fields.trace).model if fields.trace else shelf.model(fields.model or "")
    names = {device.name for device in where.devices}
    if len(priced := {fields.prices[name] for name in names if name in fields.prices}) > 1:
        raise InputError(f"{where.name}: devices {', '.join(sorted(names))} have different prices; a deployment has one")
    plan = shelf.plan_at(fields.plan) if fields.plan else _placed(fields)
    if plan is not None:
        plan.check_fits(model, where.size, place=f"plan {plan.name!r}")
    return Deployment(
        name=f"{where.name}, experts {'by ' + plan.name if plan else 'in order'}",
        model=model,
        cluster=where,
        cost=CostModel.of(where, model, transport=fields.transport),
        placement=plan.placement if plan else None,
        tp=parse_layout(fields.layout, where.size) if fields.layout else 1,
        max_seqs=fields.max_seqs,
        max_batch_tokens=fields.max_batch_tokens,
        prefix_cache=fields.prefix_cache,
        exchange=fields.exchange,
        price_per_hour=next(iter(priced), None),
    ).prepared(routing_of(fields), seed=fields.seed)


def _placed(fields: CapacityFields) -> Any:
    if fields.solver is None or fields.trace is None:
        return None
    slots = shelf.whole(fields.trace).model.experts + fields.extra_slots
    part = (fields.trace, fields.domain, fields.phase, fields.learn)
    plan, solution = shelf.placed(
        fields.solver, fields.seed, fields.time_limit, *part, fields.cluster, fields.bandwidth, fields.transport, slots, fields.dispatch, 4096
    )
    if plan is None:
        raise InputError(f"solver {fields.solver!r}: {solution.notes.get('reason', 'no placement')}")
    return plan


def routing_of(fields: CapacityFields) -> Routing | None:
    """Which experts the tokens of a case choose; None without a trace."""
    from moesim.serving import Routing

    if fields.trace is None:
        return None
    trace = shelf.whole(fields.trace).select(domain=fields.domain, phase=fields.phase)
    mix: list[tuple[float, Mapping[str, float]]] = []
    if fields.skew is not None and fields.skew_domain is not None:
        tokens = trace.tokens_by_domain
        if fields.skew_domain not in tokens:
            raise InputError(f"skew_domain {fields.skew_domain!r}: no tokens of it; domains: {', '.join(sorted(tokens))}")
        rest = {name: count / sum(tokens.values()) * (1 - fields.skew) for name, count in tokens.items()}
        mix = [(0.0, {**rest, fields.skew_domain: rest[fields.skew_domain] + fields.skew})]
    return Routing.of(trace, mix=mix)


KIND = Kind(
    name="capacity",
    says="deployments under traffic: which keep the service objective, and at which price",
    fields=CapacityFields,
    run=serve_case,
    choices=("cluster", "replicas", "prefill", "layout", "solver", "plan", "extra_slots", "dispatch", "max_seqs", "max_batch_tokens",
             "prefix_cache", "exchange", "transport"),
    figures=(
        Figure(name="attainment", label="SLO kept by", unit="%", less=False),
        Figure(name="price_per_hour", label="price/h", unit="$"),
        Figure(name="devices", label="devices"),
        Figure(name="ttft_p99", label="TTFT P99", unit="s"),
        Figure(name="tpot_p99", label="TPOT P99", unit="s"),
        Figure(name="output_tokens_per_s", label="output tokens/s", less=False),
        Figure(name="utilisation", label="devices busy", unit="%", less=False),
        Figure(name="output_token_J", label="energy/token", unit="J"),
        Figure(name="cost_per_million_output_tokens", label="price/M tokens", unit="$"),
    ),
)  # fmt: skip
