"""`moesim compare`: learn on one part, judge on others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, ClusterName, Force, Phase, Seed, TokensPerDevice, TracePath

NAME = "compare"
EPILOG = "Examples: moesim compare traces/run1 --home code --cluster h100x8 · moesim compare traces/run1 mine.json --solver eplb -o comparison.json"


def run(
    trace: TracePath,
    plans: Annotated[list[Path] | None, typer.Argument(help="Plans to compare with those of the solvers.", metavar="[PLAN…]")] = None,
    solver: Annotated[
        list[str] | None, typer.Option("--solver", help="Solver to run; may be repeated. Default: every available placement solver.")
    ] = None,
    cluster: ClusterName = "h100x8",
    home: Annotated[
        str | None, typer.Option("--home", help="Domain to learn from; the others are scored as cross-domain. Default: all tokens.")
    ] = None,
    learn: Annotated[str, typer.Option("--learn", help="Range of the home tokens to learn from.")] = "0%:50%",
    judge: Annotated[str, typer.Option("--judge", help="Range of the home tokens never seen by a solver.")] = "50%:100%",
    replicas: Annotated[int, typer.Option("--replicas", min=0, help="Slots beyond one per expert.")] = 0,
    dispatch: Annotated[str, typer.Option("--dispatch", help="How the engine picks a replica: even, static-source or nearest.")] = "even",
    current: Annotated[Path | None, typer.Option("--current", help="The live plan: say how many experts each other one would move.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the comparison as JSON; `moesim report` reads it.")] = None,
    phase: Phase = None,
    tokens_per_device: TokensPerDevice = 4096,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds each solver may take.")] = 30.0,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Make plans with several solvers and score them where it counts: on tokens they never saw and on other domains."""
    from moesim.cli.screen import emit_json, open_trace, progress, result_rows, table
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.optimize import compare, solver_infos
    from moesim.plan import load_plan
    from moesim.units import human

    if output:
        check_output(output, force=force)
    where, loaded = load_cluster(cluster), [load_plan(path) for path in plans or ()]
    source = open_trace(trace, tokens=None, domain=None, phase=phase)
    live = load_plan(current) if current else None
    for path, plan in [*zip(plans or (), loaded, strict=True), *([(current, live)] if live else [])]:
        plan.check_fits(source.model, where.size, place=str(path))
    names = solver if solver is not None else [] if loaded else [i.name for i in solver_infos() if i.available and i.solves == "placement"]
    with progress("comparing:") as report:
        _, section = compare(
            source, where, names, plans=loaded, home=home, learn=learn, judge=judge, slots=source.model.experts + replicas, dispatch=dispatch,
            tokens_per_device=tokens_per_device, current=live, seed=seed, time_limit_s=time_limit, progress=report,
        )  # fmt: skip
    document = {"schema_version": 1, "title": f"Placements of {source.model.name} on {where.name}", "comparison": section}
    if output:
        write_json(output, document)
    if json:
        emit_json({"comparison": section})
        return
    for part in section["scored_on"]:
        columns, rows = result_rows(part["plans"])
        table(f"{part['label']} ({part['kind']}, {part['tokens']:,} tokens)", columns, rows)
    unseen = section["scored_on"][1]["plans"]
    sizes = list(unseen[0]["batch_load_ratio"])
    columns = ["plan", *(f"batch {size}" for size in sizes), *(["moves", "moved"] if live else [])]
    rows = [
        [row["name"], *(f"{row['batch_load_ratio'][size]:.3f}" for size in sizes), *([str(row["moves"]), human(row["moved_B"], "B")] if live else [])]
        for row in unseen
    ]
    table("Busiest/mean load batch by batch, on the part never seen", columns, rows)
    rows = [
        [row["name"], row["status"], f"{row['seconds']:.2f} s", "" if row["gap"] is None else f"{row['gap']:.1%}", row["reason"]]
        for row in section["solutions"]
    ]
    if rows:
        table("Solvers", ["solver", "status", "time", "gap", "reason"], rows)
