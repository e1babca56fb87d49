"""`moesim calibrate`: fit the cost model to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moesim.cli.options import AsJson, Force, Seed

NAME = "calibrate"
EPILOG = "Example: moesim calibrate --device cpu --model qwen3-30b-a3b -o my-cpu.toml"


def run(
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    model: Annotated[str, typer.Option("--model", help="Expert shapes are measured around this model's; a preset or a config.json.")] = "olmoe-1b-7b",
    backend: Annotated[Literal["loop", "grouped"], typer.Option("--backend", help="How experts are computed.")] = "loop",
    experts: Annotated[int, typer.Option("--experts", min=1, help="Resident experts in the measured layers.")] = 8,
    most_tokens: Annotated[int, typer.Option("--most-tokens", min=16, help="Largest number of selections in a measured layer.")] = 2048,
    output: Annotated[Path, typer.Option("-o", "--output", help="The device profile to write.")] = Path("profile.toml"),
    seed: Seed = 1,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Measure this device's ceilings and expert GEMMs over shapes and loads, and write a profile with fit and residuals."""
    from moesim.calibrate.kernels import profile_fragment
    from moesim.cli.screen import emit_json, progress
    from moesim.files import check_output, write_text
    from moesim.model import load_model
    from moesim.units import human
    from moesim.validate import calibrate
    from moesim.validate.calibrate import profile_text

    check_output(output, force=force)
    spec = load_model(model)
    hidden, width = spec.hidden, spec.intermediate
    shapes = [(hidden // 2, width // 2), (hidden // 2, width), (hidden, width // 2), (hidden, width)]
    dtype = "bf16" if device.startswith("cuda") else "fp32"
    with progress("calibrating") as report:
        found = calibrate(
            device,
            shapes,
            experts=experts,
            top_k=min(spec.top_k, experts),
            most_tokens=most_tokens,
            backend=backend,
            dtype=dtype,
            gated=spec.gated,
            seed=seed,
            progress=report,
        )
    source = f"moesim calibrate on {found.hardware.get('gpu') or found.hardware['cpu']}, torch {found.hardware['torch']}"
    write_text(
        output,
        profile_text(found, name=output.stem, source=source)
        + "\n"
        + profile_fragment(found.fit, framework="torch", version=found.hardware["torch"], source=source, date=found.date),
    )
    if json:
        emit_json({"profile": str(output), **found.to_dict()})
        return
    errors = found.fit.residuals
    name = found.hardware.get("gpu") or found.hardware["cpu"]
    print(f"{name}: {human(found.peak.flops, 'FLOP/s')} {dtype} GEMM, {human(found.peak.memory_Bps, 'B/s')} copy")
    print(
        f"expert layers: {errors['n']:.0f} loads fitted with median error {errors['median_ape']:.1%}, P90 {errors['p90_ape']:.1%}; "
        f"wrote {output} in {found.seconds:.0f} s"
    )
