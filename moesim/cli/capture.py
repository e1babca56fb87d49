"""`moesim capture`: record the routing of any script, unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "capture"
EPILOG = (
    "Examples: moesim capture -o traces/run1 -- train.py --steps 100 · moesim capture -o traces/run1 -- -m package.module · "
    "moesim capture -o traces/run1 -- torchrun --nproc-per-node 2 train.py"
)


def run(
    command: Annotated[list[str], typer.Argument(help="The script and its arguments, after `--`; `-m module` works too.", metavar="SCRIPT ARGS…")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace directory to write.")],
    domain: Annotated[str, typer.Option("--domain", help="Label of the text the script processes.")] = "",
    every: Annotated[int, typer.Option("--every", min=1, help="Record every n-th step.")] = 1,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Stop recording after about this many tokens.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Shape of the model, a preset or a config.json; default: its own Hugging Face config.")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Store gate weights beside expert ids.")] = True,
    logits: Annotated[bool, typer.Option("--logits", help="Store the routers' logits of all experts too.")] = False,
) -> None:
    """Run a training or inference script and record which experts every token chooses."""
    from moesim.capture.run import run_script
    from moesim.cli.screen import note
    from moesim.model import load_model
    from moesim.trace import load_trace

    spec = load_model(model) if model else None
    status = run_script(command, output, domain=domain, every=every, max_tokens=max_tokens, weights=weights, logits=logits, model_spec=spec)
    if status == 0:  # on stderr: stdout is the script's
        trace = load_trace(output)
        shape = f"{len(trace.model.moe_layers)} MoE layers x {trace.model.experts} experts"
        note(f"wrote {output}: {trace.tokens:,} tokens, {shape}; next: moesim inspect {output}")
    raise typer.Exit(status)
