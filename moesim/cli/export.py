"""`moesim export`: a plan becomes the file an engine loads, with the flags that belong to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, Force

NAME = "export"
EPILOG = "Example: moesim export sglang plan.json -o placement.json --model deepseek-v3"


def run(
    format: Annotated[
        str, typer.Argument(help="sglang, tensorrt-llm, vllm-ascend, eplb or vllm-experimental (an unmerged pull request); loads: sglang or eplb.")
    ],
    plan: Annotated[Path, typer.Argument(help="A plan written by `moesim place`, or loads written by `moesim import … --as-loads`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The engine's file to write; FILE.moesim.json goes beside it.")],
    model: Annotated[str | None, typer.Option("--model", help="The plan's model, for its number of decoder layers.")] = None,
    draft_layers: Annotated[
        int, typer.Option("--draft-layers", min=0, max=8, help="Rows with the default map for multi-token prediction layers behind the last.")
    ] = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Write a plan in an engine's own format and print what to launch it with.

    Refused where the file would mean something else than the plan: unequal slots per device, or replicas under a
    dispatch rule the engine does not run.
    """
    from moesim.cli.screen import emit_json, note
    from moesim.errors import PlanError
    from moesim.files import read_json
    from moesim.interop import export_loads, export_plan, load_loads
    from moesim.model import load_model
    from moesim.plan import load_plan

    spec = load_model(model) if model else None
    data = read_json(plan, PlanError)
    if isinstance(data, dict) and data.get("kind") == "loads":
        exported = export_loads(format, load_loads(plan), output, model=spec, force=force)
    else:
        exported = export_plan(format, load_plan(plan), output, model=spec, draft_layers=draft_layers, force=force)
    if json:
        emit_json({"files": [str(file) for file in exported.files], "launch": list(exported.launch), "notes": list(exported.notes)})
        return
    note(*(f"note: {line}" for line in exported.notes))
    for line in exported.launch:
        print(f"launch: {line}")
    print(f"wrote {' and '.join(str(file) for file in exported.files)}; next: moesim check {format} {output}")
