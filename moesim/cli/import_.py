"""`moesim import`: other people's routing files become traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson

NAME = "import"
EPILOG = "Example: moesim import npz routing.npz -o traces/run1 --model deepseek-v2-lite --domain law"


def run(
    format: Annotated[str, typer.Argument(help="npz: arrays ids [T, L, K], optional weights [T, L, K] and seqlens [S].")],
    source: Annotated[Path, typer.Argument(help="The file to read.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace directory to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="A preset (see `moesim models`) or a config.json; default: a bare shape read off the ids.")
    ] = None,
    domain: Annotated[str, typer.Option("--domain", help="Domain label of these tokens.")] = "",
    phase: Annotated[str, typer.Option("--phase", help="train, prefill or decode.")] = "prefill",
    json: AsJson = False,
) -> None:
    """Turn routing recorded by something else into a trace. Nothing in a file is ever executed."""
    from moesim.cli.screen import emit_json, note, progress
    from moesim.interop import import_trace
    from moesim.model import load_model

    spec = load_model(model) if model else None
    with progress(f"importing {source.name}"):
        imported = import_trace(format, source, output, model=spec, domain=domain, phase=phase)
    if json:
        emit_json({"trace": str(output), "tokens": imported.tokens, "model": imported.model.to_dict(), "notes": list(imported.notes)})
        return
    note(*(f"note: {line}" for line in imported.notes))
    print(
        f"wrote {output}: {imported.tokens:,} tokens, {len(imported.model.moe_layers)} MoE layers x {imported.model.experts} experts; "
        f"next: moesim inspect {output}"
    )
