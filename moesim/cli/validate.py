"""`moesim validate`: execute the real layer under plans and compare with the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moesim.cli.options import AsJson, Domain, Force, Phase, PlanPaths, Seed, Tokens, TracePath

NAME = "validate"
EPILOG = "Example: moesim validate traces/run1 linear.json mine.json --tokens 50%: --device cpu -o validation.json"


def run(
    trace: TracePath,
    plans: PlanPaths,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        Literal["loop", "grouped"], typer.Option("--backend", help="How experts are computed: one GEMM pair each, or grouped_mm.")
    ] = "loop",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the validation as JSON; `moesim report` reads it.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=16, help="Tokens of the trace in the executed batch.")] = 2048,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Times every rank is executed, in random order.")] = 15,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Execute every rank of every plan on this machine's device, with random weights of the model's shape.

    The device is calibrated first, on other expert shapes and other loads, and times are predicted before they are measured.
    """
    from moesim.cli.screen import emit_json, open_trace, progress
    from moesim.files import check_output, write_json
    from moesim.plan import load_plan
    from moesim.validate import validate

    if output:
        check_output(output, force=force)
    loaded = [load_plan(path) for path in plans]
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    for path, plan in zip(plans, loaded, strict=True):
        plan.check_fits(source.model, plan.placement.devices, place=str(path))
    with progress("validating:") as report:
        found = validate(source, loaded, device=device, backend=backend, tokens=batch, repeats=repeats, seed=seed, progress=report)
    document = {"schema_version": 1, "title": f"Validation on {device}", "validation": found}
    if output:
        write_json(output, document)
    if json:
        emit_json({"validation": found})
    else:
        show(found)


def show(found: dict) -> None:  # type: ignore[type-arg]
    """Tables of a validation."""
    from moesim.cli.screen import table
    from moesim.units import human

    rows = [
        [name, str(e["n"]), f"{e['median_ape']:.1%}", f"{e['p90_ape']:.1%}", f"{e['mape']:.1%}", f"{e['bias']:+.1%}"]
        for name, e in found["models"].items()
    ]
    table(
        f"Predicted against measured, per rank and layer ({found['device']}, {found['backend']}, {found['timing']})",
        ["model", "ranks", "median", "P90", "MAPE", "bias"],
        rows,
    )
    ranking = found["ranking"]
    rows = [
        [p["name"], human(p["predicted_s"], "s"), human(p["measured_s"], "s"), f"{p['predicted_s'] / p['measured_s'] - 1:+.1%}"]
        for p in ranking["plans"]
    ]
    table("Slowest rank, summed over layers", ["plan", "predicted", "measured", "error"], rows)
    print(f"Ranking: {ranking['verdict']}. Outputs: {found['checks'][0]['detail']}.")
