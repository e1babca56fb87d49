"""`moesim scale`: how many devices should serve when."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moesim.cli.options import AsJson, ClusterName, Domain, Force, Phase, PrefixCache, Seed, Tokens, TransportName
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.optimize.scale import Scaling
    from moesim.serving.failures import Recovery

NAME = "scale"
EPILOG = (
    "Examples: moesim scale azure.csv --trace traces/run1 --cluster h100x8 --slo ttft=2s,tpot=50ms --sizes 2,4,8 -o scale.json · "
    "moesim scale diurnal:rate=3,span=24h,prompt=900,output=200 --model qwen3-30b-a3b --cluster h100x8 --slo ttft=1s --solver predictive "
    "--fail 2h:3"
)


def run(
    arrivals: Annotated[
        str, typer.Argument(help="A request log, or a process such as diurnal:rate=3,span=24h,…: as in `moesim serve`.", metavar="ARRIVALS")
    ],
    slo: Annotated[str, typer.Option("--slo", help="Limits that requests must keep, as in ttft=2s,tpot=50ms,share=95%.")],
    trace: Annotated[Path | None, typer.Option("--trace", help="Routing of the model served: which experts its tokens choose.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Without --trace: a preset or a config.json; a typical routing is made up.")] = None,
    cluster: ClusterName = "h100x8",
    sizes: Annotated[
        str | None,
        typer.Option(
            "--sizes", help="Numbers of devices to choose from, as in 2,4,8. Default: the cluster halved, and again, as long as the model fits."
        ),
    ] = None,
    solver: Annotated[str, typer.Option("--solver", help="A solver of scaling (see `moesim solvers`); the others are billed beside it.")] = "optimal",
    method: Annotated[
        Literal["elastic", "cold-restart", "concurrent"],
        typer.Option("--method", help="How a size changes: weights reused and copied, everything restarted, or a second instance started beside."),
    ] = "elastic",
    interval: Annotated[str, typer.Option("--interval", help="How often the size may change, such as 90s or 10min.")] = "5min",
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Where experts live on the whole cluster; smaller sizes move as few as they can.")
    ] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="Attention on the whole cluster: dp8, tp8 or dp4tp2; sizes keep tp.")] = None,
    max_seqs: Annotated[int, typer.Option("--max-seqs", min=1, help="Requests a data-parallel rank runs at a time.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option("--max-batch-tokens", min=1, help="Tokens in a step of a rank; longer prompts are cut.")] = 8192,
    prefix_cache: PrefixCache = False,
    transport: TransportName = None,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Price of one device for an hour; default: the profile's rent, else device-hours.")
    ] = None,
    miss_price: Annotated[
        float | None, typer.Option("--miss-price", min=0, help="Price of a request that misses; default: ten rents of serving one.")
    ] = None,
    fail: Annotated[
        list[str] | None, typer.Option("--fail", help="What if a device dies: TIME:DEVICE, such as 20min:3. May be repeated, each on its own.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The plan file to write.")] = None,
    result: Annotated[Path | None, typer.Option("--result", help="Write the whole result as JSON: plan, sizes, bills, timeline, what if.")] = None,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds the solver may take.")] = 30.0,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Plan how many devices serve in each interval: what it costs against a static size, and whether requests keep the SLO.

    Each size's capacity is measured by serving; changes of size take the time their copies and start-up take; the plan is then
    served, changes included. Also: traffic that doubles, a device that dies. Exit code 1 when no size keeps the SLO at any rate.
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress
    from moesim.cost import CostModel
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.model import load_model
    from moesim.optimize.registry import load_solver
    from moesim.optimize.scale import scale
    from moesim.plan import load_plan
    from moesim.serving import Deployment, Routing, Slo, parse_layout
    from moesim.serving.opening import open_arrivals, seconds
    from moesim.serving.sizes import Sizes, halves
    from moesim.serving.transitions import METHODS
    from moesim.trace import TraceStats

    for path in (output, result):
        if path:
            check_output(path, force=force)
    if (trace is None) == (model is None):
        raise InputError("give --trace (routing of the model served), or --model to make up a typical routing; one of them")
    if trace is None and (tokens or domain or phase):
        raise InputError("--tokens, --domain and --phase select from --trace; give one")
    load_solver(solver, "scaling")
    limits, where = Slo.parse(slo), load_cluster(cluster)
    failures = [_failure(text) for text in fail or ()]
    try:
        interval_s = seconds(interval)
        counts = [int(part) for part in sizes.split(",")] if sizes else halves(where.size, parse_layout(layout, where.size) if layout else 1)
    except ValueError as problem:
        raise InputError(f"--interval {interval!r}, --sizes {sizes!r}: {problem}; write for example 5min and 2,4,8") from None
    requests = open_arrivals(arrivals, seed=seed)
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase) if trace else None
    spec = source.model if source else load_model(str(model))
    loaded = load_plan(plan) if plan else None
    if loaded:
        loaded.check_fits(spec, where.size, place=str(plan))
    largest = Deployment(
        model=spec,
        cluster=where,
        name=loaded.name if loaded else "in order",
        tp=parse_layout(layout, where.size) if layout else 1,
        placement=loaded.placement if loaded else None,
        cost=CostModel.of(where, spec, transport=transport) if transport else None,
        max_seqs=max_seqs,
        max_batch_tokens=max_batch_tokens,
        prefix_cache=prefix_cache,
        price_per_hour=price,
    )
    load_LE = TraceStats.of(source).load_LE if source else None
    with progress("scaling:") as report:
        report(0.0, "placements")
        family = Sizes.of(largest, counts, load_LE=load_LE, method=METHODS[method], drop=sizes is None)
        found, solution = scale(
            requests,
            family,
            limits,
            routing=Routing.of(source) if source else None,
            interval_s=interval_s,
            solver=solver,
            price=price,
            miss_price=miss_price,
            failures=failures,
            load_LE=load_LE,
            made_from={
                "trace": f"{source.digest} ({source.selection})" if source else "none: typical routing",
                "plan": loaded.digest if loaded else None,
            },
            seed=seed,
            time_limit_s=time_limit,
            progress=report,
        )
    if found is None:
        reason = str(solution.notes.get("reason", "the solver found no plan"))
        if json:
            emit_json({"status": str(solution.status), "reason": reason, "plan": None})
        note(f"infeasible: {reason}")
        raise typer.Exit(1)
    data = found.to_dict()
    if output:
        found.plan.save(output, force=force)
    if result:
        write_json(result, data)
    if json:
        emit_json(data)
        return
    show(found)
    note(*(f"note: {line}" for line in found.notes))
    if output:
        print(f"wrote {output}")


def _failure(text: str) -> tuple[float, int]:
    from moesim.serving.opening import seconds

    at, colon, device = text.rpartition(":")
    try:
        if not colon:
            raise ValueError("no colon")
        return seconds(at), int(device)
    except ValueError as problem:
        raise InputError(f"--fail {text!r}: {problem}; write the time and the device, such as 20min:3") from None


def show(found: Scaling) -> None:
    """Tables of a scaling plan: sizes, the plan against other policies, the timeline, what if."""
    from moesim.cli.screen import table
    from moesim.units import human

    plan, money = found.plan, found.currency
    rows = [
        [
            str(devices),
            f"{each.requests_per_s:.4g}",
            f"{devices * found.problem.price / 3600 / each.requests_per_s:.3g}" if each.requests_per_s else "-",
        ]
        for devices, each in zip(found.problem.devices_C.tolist(), found.capacities, strict=True)
    ]
    table(f"Capacity within {found.slo}", ["devices", "requests/s", f"{money} per request"], rows)
    rows = [
        [f"{a} to {b}", human(each.seconds, "s"), human(each.pause_s or each.down_s, "s"), human(each.moved_B + each.loaded_B, "B")]
        for (a, b), each in found.sizes.transitions.items()
    ]
    table(f"Changes ({found.sizes.method.name})", ["devices", "takes", "takes no requests for", "moves"], rows)
    ranked = sorted(found.bills.items(), key=lambda item: item[1].total)
    still = found.bills.get("static-minimum")
    rows = [
        [
            f"{name} (this plan)" if name == plan.made_from["solver"] else name,
            f"{cost.total:.4g}",
            f"{cost.total / still.total - 1:+.1%}" if still and still.total else "-",
            f"{cost.rent:.4g}",
            f"{cost.attainment:.3%}",
            f"{cost.device_hours:.4g}",
            str(cost.changes),
        ]
        for name, cost in ranked
    ]
    table(f"Bills in {money}", ["policy", "total", "to static", "rent", "attained", "device-hours", "changes"], rows)
    listed = [f"{n * plan.interval_s / 60:g} min: {plan.devices_N[n]}" for n in _turns(plan.devices_N.tolist())]
    more = f", and {len(listed) - 12} more changes" if len(listed) > 12 else ""
    print(f"devices from {', '.join(listed[:12])}{more}")
    rows = [
        [
            each.case,
            f"{each.served.attainment:.3%}",
            "yes" if each.served.meets_slo else "no",
            human(summary["ttft_s"]["p99"] or 0.0, "s"),
            f"{each.cost.total:.4g}",
            "; ".join(_said(recovery) for recovery in each.recoveries),
        ]
        for each in found.outlooks
        for summary in [each.served.summary()]
    ]
    table("Served", ["what if", "attained", "SLO kept", "P99 first token", f"bill ({money})", "failure"], rows)


def _turns(devices: list[int]) -> list[int]:
    return [n for n, size in enumerate(devices) if n == 0 or size != devices[n - 1]]


def _said(found: Recovery) -> str:
    from moesim.units import human

    lost = int(found.damage.lost_LE.sum())
    what = f"{lost} experts lost, read again" if lost else "replicas serve"
    return f"{what}; back after {human(found.transition.seconds, 's')}"
