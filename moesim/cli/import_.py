"""`moesim import`: other tools' routing becomes a trace, their counts loads, their placements plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson

NAME = "import"
EPILOG = (
    "Examples: moesim import sglang-recorder dumps/ -o traces/run1 --model deepseek-v3 · "
    "moesim import llama-cpp counts.csv --as-loads -o loads.json · moesim import tensorrt-llm eplb.yaml -o plan.json --model deepseek-v3 --devices 8"
)
FORMATS = (
    "Tokens: npz, sglang-recorder, vllm-routed-experts, megatron, flame, exflow, moe-balance, esft, tensorrt-llm-statistics. "
    "Counts: llama-cpp, and most of the others (--as-loads). "
    "Placements: sglang, tensorrt-llm, vllm-ascend, eplb, vllm-experimental."
)


def run(
    format: Annotated[str, typer.Argument(help=FORMATS)],
    source: Annotated[Path, typer.Argument(help="The file to read, or the folder where a format has one file per rank or layer.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace directory to write; a .json file for loads and plans.")],
    model: Annotated[
        str | None, typer.Option("--model", help="A preset (see `moesim models`) or a config.json; default: a bare shape read off the ids.")
    ] = None,
    domain: Annotated[str, typer.Option("--domain", help="Domain label of these tokens.")] = "",
    phase: Annotated[str | None, typer.Option("--phase", help="train, prefill or decode, where the file does not say; default: by format.")] = None,
    as_loads: Annotated[bool, typer.Option("--as-loads", help="Keep counts as a loads file: no tokens, so no traffic and no co-activation.")] = False,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="Placements: devices, where the file does not say.")] = None,
    dispatch: Annotated[str | None, typer.Option("--dispatch", help="Placements: dispatch rule; default: the engine's own.")] = None,
    json: AsJson = False,
) -> None:
    """Turn what something else recorded or decided into a trace, loads or a plan. Nothing in a file is ever executed.

    Everything dropped on the way (padding, dense layers, draft layers, unused columns) is counted and printed.
    """
    from moesim.cli.screen import emit_json, note, progress
    from moesim.errors import InputError
    from moesim.files import check_output
    from moesim.interop import FORMATS as KNOWN
    from moesim.interop import import_loads, import_plan, import_trace
    from moesim.model import load_model

    if format not in KNOWN:
        raise InputError(f"format {format!r} cannot be imported; formats: {', '.join(KNOWN)}")
    spec = load_model(model) if model else None
    shown: dict[str, object]
    if as_loads:
        check_output(output, force=False)
        loads = import_loads(format, source, model=spec)
        loads.save(output)
        notes, total = loads.notes, int(loads.load_LE.sum())
        shown = {"loads": str(output), "counts": total, "moe_layers": list(loads.layers), "experts": loads.experts, "tokens": loads.tokens}
        done = f"wrote {output}: {total:,} counts, {len(loads.layers)} MoE layers x {loads.experts} experts"
    elif KNOWN[format].engine:
        check_output(output, force=False)
        plan, notes = import_plan(format, source, model=spec, devices=devices, dispatch=dispatch)
        plan.save(output)
        p = plan.placement
        slots = int(p.slots_LP.shape[1])
        shown = {"plan": str(output), "name": plan.name, "model": plan.model, "devices": p.devices, "slots": slots, "dispatch": p.dispatch}
        done = (
            f"wrote {output}: {len(p.layers)} MoE layers x {p.experts} experts in {slots} slots on {p.devices} devices, "
            f"dispatch {p.dispatch}; next: moesim score TRACE {output} --cluster C"
        )
    else:
        with progress(f"importing {source.name}"):
            imported = import_trace(format, source, output, model=spec, domain=domain, phase=phase)
        notes = imported.notes
        shown = {"trace": str(output), "tokens": imported.tokens, "selections": imported.tally.selections, "model": imported.model.to_dict()}
        done = (
            f"wrote {output}: {imported.tokens:,} tokens, {len(imported.model.moe_layers)} MoE layers x {imported.model.experts} experts; "
            f"next: moesim inspect {output}"
        )
    if json:
        emit_json({**shown, "notes": list(notes)})
        return
    note(*(f"note: {line}" for line in notes))
    print(done)
