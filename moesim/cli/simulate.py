"""`moesim simulate`: one plan, in detail."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moesim.cli.options import (
    AsJson,
    ClusterName,
    Contention,
    Context,
    Domain,
    Force,
    Mode,
    Phase,
    Tokens,
    TokensPerDevice,
    TracePath,
    TransportName,
)
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.sim.event import EventResult

NAME = "simulate"
EPILOG = (
    "Examples: moesim simulate traces/run1 plan.json --cluster h100-4x8 -o result.json · "
    "moesim simulate traces/run1 plan.json --system tutel --mode training --timeline steps.json.gz"
)

BUSIEST = 8  # streams and links shown


def run(
    trace: TracePath,
    plan: Annotated[Path, typer.Argument(help="A plan written by `moesim place`.", metavar="PLAN")],
    cluster: ClusterName = "h100x8",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the whole result as JSON; `moesim report` reads it.")] = None,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    tokens_per_device: TokensPerDevice = 4096,
    transport: TransportName = None,
    engine: Annotated[
        Literal["lockstep", "event"] | None,
        typer.Option("--engine", help="lockstep (default), or event: streams that overlap. The options below imply event."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A published system (see `moesim systems`). Default: plain.")] = None,
    cache_plan: Annotated[
        Path | None, typer.Option("--cache-plan", help="Which experts stay on the devices, as `moesim cache` decided; the others are copied.")
    ] = None,
    mode: Mode = None,
    context: Context = None,
    contention: Contention = None,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", help="Write every task as a gzipped Chrome trace (.json.gz); Perfetto opens it.")
    ] = None,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Run a trace under a plan on a simulated cluster: times per layer and device, traffic, bottlenecks.

    The event engine adds what surrounds the experts, what overlaps, and what every stream waited for.
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress, table
    from moesim.cost import CostModel
    from moesim.cost.energy import ASSUMPTION, energy_of
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.plan import load_cache_plan, load_plan
    from moesim.sim import simulate
    from moesim.units import human

    options = {
        "--system": system,
        "--cache-plan": cache_plan,
        "--mode": mode,
        "--context": context,
        "--contention": contention,
        "--timeline": timeline,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if given and engine == "lockstep":
        raise InputError(f"--engine lockstep knows no {', '.join(given)}; leave {'it' if len(given) == 1 else 'them'} out, or take --engine event")
    for path in (output, timeline):
        if path:
            check_output(path, force=force)
    where, loaded = load_cluster(cluster), load_plan(plan)
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    loaded.check_fits(source.model, where.size, place=str(plan))
    cached = load_cache_plan(cache_plan) if cache_plan else None
    if cached:
        cached.check_fits(source.model, loaded, place=str(cache_plan))
    cost = CostModel.of(where, source.model, transport=transport)
    with progress("simulating"):
        if given or engine == "event":
            from moesim.sim.event import simulate_event

            values: dict[str, Any] = {name.removeprefix("--"): value for name, value in given.items() if name != "--cache-plan"}
            if cached:
                from moesim.optimize.cache_score import with_cache

                values["system"] = with_cache(cached, source.model, system or "plain")
            event = simulate_event(source, loaded, where, tokens_per_device=tokens_per_device, cost=cost, **values)
        else:
            event = None
        result = event or simulate(source, loaded, where, tokens_per_device=tokens_per_device, cost=cost)
    data = result.to_dict()
    energy = None
    if all(device.power_W for device in where.devices):
        moving_S, step_S = (result.dispatch_s_SL + result.combine_s_SL).sum(axis=1), result.layer_s_SL.sum(axis=1)
        busy_SG = (moving_S[:, None] + result.compute_s_SLG.sum(axis=1)).clip(max=step_S[:, None])  # what overlaps is busy once
        energy = energy_of(busy_SG, step_S, result.tokens_per_step, where)
        data["energy"] = energy.to_dict()
    if output:
        write_json(output, data)
    if json:
        emit_json(data)
        return
    busiest = result.compute_s_SLG.max(axis=2).mean(axis=0)
    rows = [
        [str(layer), f"{result.load_ratio_L[i]:.3f}", f"{result.fanout_devices_L[i]:.2f}"]
        + [human(x, "s") for x in (result.dispatch_s_SL[:, i].mean(), busiest[i], result.combine_s_SL[:, i].mean(), result.layer_s_SL[:, i].mean())]
        for i, layer in enumerate(result.layers)
    ]
    columns = ["layer", "busiest/mean", "devices/token", "dispatch", "compute", "combine", "layer time"]
    table(f"{loaded.name} on {where.name}: {len(result.layer_s_SL)} steps of {result.tokens_per_step:,.0f} tokens", columns, rows)
    if event:
        show_event(event)
    print(f"MoE time per step {human(data['summary']['step_time_s'], 's')}; dispatch waits for: {dict(result.bottlenecks)}")
    if energy:
        print(f"MoE energy per token {human(energy.token_J, 'J')}, at most {human(energy.most_token_J, 'J')} ({energy.confidence}: {ASSUMPTION})")
    note(*(f"note: {line}" for line in result.notes))


def show_event(event: EventResult) -> None:
    """What the event engine adds: the step, its critical path, why compute waited, the busiest streams and links."""
    from moesim.cli.screen import table
    from moesim.units import human

    steps, devices = len(event.step_s_S), event.tokens_SLG.shape[2]
    step_s = float(event.step_s_S.mean())

    def shares(seconds: dict[str, float], of_s: float) -> list[list[str]]:
        return [[kind, human(s, "s"), f"{s / of_s:.1%}"] for kind, s in sorted(seconds.items(), key=lambda item: -item[1]) if s > 0]

    path = shares({kind: s / steps for kind, s in event.critical_path_s.items()}, step_s)
    print(f"{event.system}, {event.inputs['mode']}: a step takes {human(step_s, 's')}")
    table("Critical path of a step", ["task", "time", "share"], path)
    stalls = shares({kind: s / steps / devices for kind, s in event.stall_s.items()}, step_s)
    if stalls:
        table("Compute of a device waits", ["for", "time", "share"], stalls)
    for title, use in (("Busiest streams", event.stream_use), ("Busiest links", event.link_use)):
        busiest = sorted(use.items(), key=lambda item: (-item[1], item[0]))[:BUSIEST]
        if busiest:
            table(title, ["name", "busy"], [[name, f"{share:.1%}"] for name, share in busiest])
    if event.copies:
        c = event.copies
        print(
            f"experts in place {c.hit_ratio:.1%} of {c.asked}, copied ahead {c.recall:.1%} of the missing ({c.timely_recall:.1%} in time); a step "
            f"copies {human(c.demand_B / steps, 'B')} on demand, {human(c.ahead_B / steps, 'B')} ahead ({human(c.wrong_B / steps, 'B')} in vain)"
        )
    for way, counts in event.degrees.items():
        if set(counts) != {1}:
            print(f"pipeline degrees {way}: {', '.join(f'{r} in {n}' for r, n in counts.items())} of {sum(counts.values())} layers")
