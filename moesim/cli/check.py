"""`moesim check`: find before launch what goes wrong after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, Domain, Phase, Tokens

NAME = "check"
EPILOG = (
    "Examples: moesim check sglang placement.json --model deepseek-v3 --cluster h100x8 --redundant 16 --trace traces/today · "
    "moesim check sglang-recorder dumps/ --model deepseek-v3"
)


def run(
    format: Annotated[str, typer.Argument(help="A placement format of `moesim export`, or a capture format of `moesim import`.")],
    file: Annotated[Path, typer.Argument(help="The engine's file, or the folder of a capture.")],
    model: Annotated[str | None, typer.Option("--model", help="The model that will run: a preset or a config.json.")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="The cluster it will run on (see `moesim profiles`).")] = None,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="Expert-parallel ranks; default: all devices of --cluster.")] = None,
    redundant: Annotated[int | None, typer.Option("--redundant", min=0, help="R of the launch flags.")] = None,
    dispatch: Annotated[str | None, typer.Option("--dispatch", help="The rule the engine will be told to run; default: its own.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Traffic to expect: a trace, or a loads file (.json). Finds a stale or foreign placement.")
    ] = None,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    json: AsJson = False,
) -> None:
    """Hold a placement file or a capture against the model, cluster, flags and traffic it is meant for.

    Exit code 0: nothing failed; 1: a check failed; 2: the file cannot be read.
    """
    from moesim.cli.screen import emit_json, open_trace
    from moesim.hardware import load_cluster
    from moesim.interop import Wanted, load_loads
    from moesim.interop import check as find
    from moesim.model import load_model
    from moesim.trace import TraceStats

    load = None
    if trace is not None:
        if trace.suffix == ".json":
            load = load_loads(trace).load_LE
        else:
            load = TraceStats.of(open_trace(trace, tokens=tokens, domain=domain, phase=phase)).load_LE
    wanted = Wanted(
        model=load_model(model) if model else None,
        cluster=load_cluster(cluster) if cluster else None,
        devices=devices,
        redundant=redundant,
        dispatch=dispatch,
        load_LE=load,
    )
    findings = find(format, file, wanted)
    failed = sum(finding.level == "fail" for finding in findings)
    if json:
        rows = [{"level": f.level, "check": f.check, "message": f.message, "remedy": f.remedy} for f in findings]
        emit_json({"file": str(file), "format": format, "failed": failed, "findings": rows})
    else:
        for finding in findings:
            print(f"{finding.level:6} {finding.check:9} {finding}")
        print(f"{file}: {failed} of {len(findings)} findings failed" if failed else f"{file}: nothing failed")
    if failed:
        raise typer.Exit(1)
