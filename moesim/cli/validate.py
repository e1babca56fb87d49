"""`moesim validate`: execute the real layer under plans and compare with the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, BackendName, Domain, Force, Phase, PlanPaths, Seed, Tokens, TracePath, WeightType

NAME = "validate"
EPILOG = (
    "Examples: moesim validate traces/run1 linear.json mine.json --tokens 50%: --device cpu -o validation.json · "
    "moesim validate traces/run1 old.json new.json cache.json --migrate --processes --batch 256"
)


def run(
    trace: TracePath,
    plans: PlanPaths,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    backend: BackendName = None,
    dtype: WeightType = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the validation as JSON; `moesim report` reads it.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Tokens of the trace in an executed batch; may be repeated. Default: 2048.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Times every rank is executed, in random order.")] = 15,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Execute experts of this model's sizes, not the trace's own; a preset or a config.json.")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option("--layer", help="Execute this MoE layer only; may be repeated. Default: all.")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="Where the exchanges, which are not executed, are modelled.")] = None,
    flush: Annotated[
        bool | None, typer.Option("--flush/--warm", help="Write over the caches before every run, or not. Default: flush on cuda, warm on cpu.")
    ] = None,
    migrate: Annotated[bool, typer.Option("--migrate", help="Also move the experts from each plan to the next while the layer serves.")] = False,
    processes: Annotated[
        bool, typer.Option("--processes", help="Also run each plan with one process per device (gloo on cpu, NCCL on cuda).")
    ] = False,
    step_tokens: Annotated[int, typer.Option("--step-tokens", min=1, help="Tokens decoded together in a step of a cache plan.")] = 1,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Execute every rank of every plan on this machine's device, with random weights of the model's shape.

    The device is calibrated first, on other expert shapes and other loads, and times are predicted before they are measured.
    Cache plans are executed with the experts in host memory and a pool of slots on the device. With -o, finished batches are
    kept beside the output, and the same command goes on after an interruption.
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.model import load_model
    from moesim.validate import validate
    from moesim.validate.execute import execute, load_plans, placement_of

    if output:
        check_output(output, force=force)
    placements, caches = load_plans(plans)
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    for plan in placements:
        plan.check_fits(source.model, plan.placement.devices, place=f"plan {plan.name!r}")
    for cache in caches:  # before the ranks run for minutes
        placement_of(cache, placements, source.model)
    sizes = load_model(shape) if shape else None
    part = output.with_name(output.name + ".part.json") if output else None
    with progress("validating:") as report:
        found = validate(
            source, placements, device=device, shape=sizes, layers=layer or None, cluster=load_cluster(cluster) if cluster else None,
            backend=backend, dtype=dtype, tokens=batch or [2048], repeats=repeats, flush=flush, seed=seed, keep=part, progress=report,
        )  # fmt: skip
        found["executions"] = execute(
            source, placements, caches, found, sizes=sizes, device=device, tokens=max(batch or [2048]), layers=layer or None, migrate=migrate,
            step_tokens=step_tokens, processes=processes, seed=seed, progress=report,
        )  # fmt: skip
    document = {"schema_version": 1, "title": f"Validation on {device}", "validation": found}
    if output and part:
        write_json(output, document)
        for path in (part, part.with_name(part.name + ".calibration")):
            path.unlink(missing_ok=True)
    if json:
        emit_json({"validation": found})
    else:
        show(found)
        note(*(f"note: {line}" for line in found["notes"]))


def show(found: dict) -> None:  # type: ignore[type-arg]
    """Tables of a validation."""
    from moesim.cli.screen import table
    from moesim.units import human

    rows = [
        [name, str(e["n"]), *(f"{e[key]:.1%}" for key in ("median_ape", "p90_ape", "p99_ape", "mape")), f"{e['bias']:+.1%}"]
        for name, e in found["models"].items()
    ]
    table(
        f"Predicted against measured, per rank and layer ({found['device']}, {found['backend']}, {found['timing']})",
        ["model", "ranks", "median", "P90", "P99", "MAPE", "bias"],
        rows,
    )
    ranking = found["ranking"]
    rows = [
        [p["name"], human(p["predicted_s"], "s"), human(p["measured_s"], "s"), f"{p['predicted_s'] / p['measured_s'] - 1:+.1%}"]
        for p in ranking["plans"]
    ]
    table(f"Slowest rank, summed over layers, batch of {ranking['batch']}", ["plan", "predicted", "measured", "error"], rows)
    for one in found["rankings"]:
        print(f"Ranking, batch of {one['batch']}: {one['verdict']}.")
    print(f"Ranks: {found['per_rank']['verdict']}. Outputs: {found['checks'][0]['detail']}.")
    for each in found.get("executions", []):
        print(f"{each['kind']}, {each['name']}: {each['detail']}.")
