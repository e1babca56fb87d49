"""`moesim demo`: the whole story on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, ClusterName, Force, Seed

NAME = "demo"
EPILOG = "Example: moesim demo -o demo-out"


def run(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report, the traces and the plans.")] = Path("demo-out"),
    steps: Annotated[int, typer.Option("--steps", min=5, help="Training steps.")] = 120,
    cluster: ClusterName = "cpu",
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: a GPU if there is one.")] = None,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Train a small real MoE model, capture its routing, place its experts, simulate, execute the real layer, and report.

    Needs no GPU and no network; about two minutes on two cores.
    """
    import shutil

    from moesim.cli import screen
    from moesim.demo.story import tell
    from moesim.errors import InputError, OutputExists
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.report import write_report

    if output.exists() and force:
        if not (output / "result.json").exists() and any(output.iterdir()):
            raise InputError(f"{output}: was not written by the demo, so --force will not remove it; give another folder")
        shutil.rmtree(output)
    elif output.exists():
        raise OutputExists(f"{output}: exists; give another path, or --force to replace it")
    check_output(output, force=False)
    where = load_cluster(cluster)
    output.mkdir(parents=True)
    write_json(output / "result.json", {"schema_version": 1, "title": "unfinished"})
    with screen.chapters() as progress:
        told = tell(output, cluster=where, steps=steps, seed=seed, device=device, progress=progress, say=screen.note)
    for plan in told.plans:
        plan.save(output / f"plan-{plan.name}.json")
    write_json(output / "result.json", told.document)
    page = write_report([told.document], output / "report.html")
    if json:
        screen.emit_json(
            {
                "report": str(page),
                "result": str(output / "result.json"),
                "comparison": told.document["comparison"],
                "validation": told.document["validation"]["summary"],
                "ranking": told.document["validation"]["ranking"],
            }
        )
        return
    for part in told.document["comparison"]["scored_on"][:2]:
        columns, rows = screen.result_rows(part["plans"])
        screen.table(f"{part['label']} ({part['kind']}, {part['tokens']:,} tokens) on {where.name}", columns, rows)
    crossed = [part for part in told.document["comparison"]["scored_on"] if part["kind"] == "cross-domain"]
    names = [plan.name for plan in told.plans]
    rows = [
        [name, *(f"{part['plans'][i]['max_load_ratio']:.2f} / {part['plans'][i]['fanout_devices']:.2f}" for part in crossed)]
        for i, name in enumerate(names)
    ]
    screen.table("Other domains: busiest/mean load and devices per token", ["plan", *(part["label"] for part in crossed)], rows)
    from moesim.cli.validate import show

    show(told.document["validation"])
    screen.note(*(f"note: {line}" for line in told.document["notes"]))
    print(f"\nOpen {page} in a browser. Data: {output / 'result.json'}. Took {told.document['seconds']:.0f} s.")
