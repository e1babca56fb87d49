"""`moesim sweep`: many cases from one spec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli.options import AsJson

if TYPE_CHECKING:
    from moesim.sweep import Outcome, Spec

NAME = "sweep"
EPILOG = "Example: moesim sweep study.toml -o study --workers 8, then moesim report study"

MOST_ROWS, MOST_FAILURES = 30, 10  # shown on the screen


def run(
    spec: Annotated[Path | None, typer.Argument(help="A TOML file. Without it, kinds and their fields are listed.", metavar="SPEC.toml")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results; a killed sweep goes on from it.")] = Path("sweep-out"),
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes of this machine. Default: one per core.")] = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help="A Dask scheduler, such as tcp://10.0.0.1:8786, instead of processes.")] = None,
    json: AsJson = False,
) -> None:
    r"""Run every combination of a grid, and keep each case as soon as it is done.

    SPEC names what a case does (kind) and gives values for its fields; every combination of the lists in \[grid] is a case:

    kind = "simulate"

    \[grid]

    trace = "traces/run1"

    cluster = \["h100x8", "h200x8"]

    solver = \["eplb", "local-search"]

    The same command again does only what is missing or failed. Exit code 1 when cases failed.
    """
    import os
    from collections import Counter

    from moesim.cli.screen import emit_json, note, progress
    from moesim.errors import InputError
    from moesim.sweep import DaskCrew, LocalCrew, load_spec, sweep
    from moesim.sweep.table import RESULTS

    if spec is None:
        show_kinds(json=json)
        return
    if scheduler and workers:
        raise InputError("--workers are processes of this machine, a --scheduler has its own; give one of the two")
    asked = load_spec(spec)
    crew = DaskCrew(scheduler) if scheduler else LocalCrew(workers or os.cpu_count() or 1)
    with progress("sweeping") as report:
        outcome = sweep(asked, output, crew, progress=report)
    counts = {status: outcome.count(status) for status in ("ok", "infeasible", "failed")}
    bad = [row for row in outcome.rows if row["status"] == "failed"]
    if json:
        emit_json({"results": str(output / RESULTS), "cases": len(outcome.rows), "kept": outcome.kept, **counts,
                   "failures": [{"case": row["case"], "fields": row["fields"], "error": row["error"]} for row in bad]})  # fmt: skip
    else:
        show(asked, outcome)
        print(f"{len(outcome.rows):,} cases, {outcome.kept:,} done before: {', '.join(f'{n:,} {name}' for name, n in counts.items() if n)}")
        print(f"wrote {output / RESULTS}; draw it: moesim report {output}")
    note(*(f"warning: {place}: altered since it was written; the case was done again" for place in outcome.damaged))
    if bad:
        for error, count in Counter(row["error"] for row in bad).most_common(MOST_FAILURES):
            first = next(row["fields"] for row in bad if row["error"] == error)
            note(f"failed: {error} ({count:,} cases, such as {', '.join(f'{name} = {first[name]}' for name in asked.axes) or 'the only one'})")
        raise typer.Exit(1)


def show_kinds(*, json: bool) -> None:
    """What a case can do, and the fields it has: those without a default must be given."""
    from pydantic_core import PydanticUndefined

    from moesim.cli.screen import emit_json, table
    from moesim.sweep.kinds import KINDS

    listed = {
        kind.name: {name: None if info.default is PydanticUndefined else info.default for name, info in kind.fields.model_fields.items()}
        for kind in KINDS.values()
    }
    if json:
        emit_json({"kinds": {name: {"says": KINDS[name].says, "fields": fields} for name, fields in listed.items()}})
        return
    for name, kind in KINDS.items():
        required = [field for field, info in kind.fields.model_fields.items() if info.is_required()]
        rows = [[field, "must be given" if field in required else "" if value is None else str(value)] for field, value in listed[name].items()]
        print(f"\n{name}: {kind.says}")
        table("", ["field", "default"], rows)


def show(spec: Spec, outcome: Outcome) -> None:
    """The best cases under each set of conditions, by the first figure of their kind."""
    from moesim.cli.screen import note, table
    from moesim.sweep.kinds import KINDS
    from moesim.sweep.table import contests

    kind = KINDS[spec.kind]
    groups = contests(spec, outcome.rows)
    axes = sorted(spec.axes, key=lambda name: name in kind.choices)
    each = max(1, MOST_ROWS // max(1, len(groups)))
    rows = [
        [*(Path(text).name if "/" in (text := str(row["fields"][name])) else text for name in axes)]
        + [figure.text(row["figures"].get(figure.name)) for figure in kind.figures]
        for group in groups
        for row in group[:each]
    ]
    if rows:
        title = f"{spec.title or spec.kind}: by {kind.figures[0].label}, best first"
        table(title, [*(name.replace("_", " ") for name in axes), *(figure.label for figure in kind.figures)], rows[:MOST_ROWS])
    if len(rows) < sum(map(len, groups)) or len(rows) > MOST_ROWS:
        note(f"the table shows {min(len(rows), MOST_ROWS)} of {sum(map(len, groups)):,} cases")
