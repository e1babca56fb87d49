"""`moesim simulate`: one plan, in detail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, ClusterName, Domain, Force, Phase, Tokens, TokensPerDevice, TracePath

NAME = "simulate"
EPILOG = "Example: moesim simulate traces/run1 plan.json --cluster h100-4x8 -o result.json"


def run(
    trace: TracePath,
    plan: Annotated[Path, typer.Argument(help="A plan written by `moesim place`.", metavar="PLAN")],
    cluster: ClusterName = "h100x8",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the whole result as JSON; `moesim report` reads it.")] = None,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    tokens_per_device: TokensPerDevice = 4096,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Run a trace under a plan on a simulated cluster: times per layer and device, traffic, bottlenecks."""
    from moesim.cli.screen import emit_json, note, open_trace, progress, table
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.plan import load_plan
    from moesim.sim import simulate
    from moesim.units import human

    if output:
        check_output(output, force=force)
    where, loaded = load_cluster(cluster), load_plan(plan)
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    loaded.check_fits(source.model, where.size, place=str(plan))
    with progress("simulating"):
        result = simulate(source, loaded, where, tokens_per_device=tokens_per_device)
    data = result.to_dict()
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
    print(f"MoE time per step {human(data['summary']['step_time_s'], 's')}; dispatch waits for: {dict(result.bottlenecks)}")
    note(*(f"note: {line}" for line in result.notes))
