"""`moesim calibrate`: fit the cost model to this machine or to tables of measurements, or judge shipped parameters by them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli.options import AsJson, BackendName, Force, Seed, WeightType

NAME = "calibrate"
EPILOG = (
    "Examples: moesim calibrate --device cpu --model qwen3-30b-a3b -o my-cpu.toml · "
    "moesim calibrate --from kernels.csv --from nccl.csv -o mine.toml · moesim calibrate --from kernels.csv --profile h100-sxm --evaluate --json"
)


def run(
    tables: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", help="A table to fit (.csv, .parquet): fused-MoE kernels, nccl-tests or DeepEP, told by its columns; may be repeated."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Measure this device instead: cpu (default) or cuda.")] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Fit nothing: print how well the parameters of --profile predict the tables.")] = False,
    profile: Annotated[str | None, typer.Option("--profile", help="With --evaluate: the device (name or .toml) whose parameters are judged.")] = None,
    device_profile: Annotated[
        str | None, typer.Option("--device-profile", help="With --from: the device whose peaks and memories hold; default: as the tables say.")
    ] = None,
    gated: Annotated[
        bool | None, typer.Option("--gated/--plain", help="Experts have three matrices or two, where a table has no column `gated`.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Expert shapes are measured around this model's; a preset or a config.json.")] = "olmoe-1b-7b",
    backend: BackendName = None,
    dtype: WeightType = None,
    experts: Annotated[int, typer.Option("--experts", min=1, help="Resident experts in the measured layers.")] = 8,
    most_tokens: Annotated[int, typer.Option("--most-tokens", min=16, help="Largest number of selections in a measured layer.")] = 2048,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The device profile to write (default profile.toml); with --evaluate, the scores as JSON.")
    ] = None,
    seed: Seed = 1,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Fit this device or tables of measurements into a profile with residuals, or evaluate a shipped profile on tables.

    An evaluation takes peaks and links from the device each row names, where it ships, and parameters from --profile.
    """
    from moesim.errors import InputError

    if evaluate:
        if not tables or profile is None or device or device_profile:
            raise InputError("--evaluate needs --from FILE and --profile NAME, and neither --device nor --device-profile; see moesim calibrate -h")
        _evaluate(tables, profile, gated, output, json=json, force=force)
    elif tables:
        if device or profile:
            raise InputError(f"--from fits tables; drop {'--device' if device else '--profile, or add --evaluate'}")
        _fit(tables, device_profile, gated, output or Path("profile.toml"), json=json, force=force)
    elif profile or device_profile or gated is not None:
        raise InputError("--profile, --device-profile and --gated/--plain go with --from FILE")
    else:
        _measure(device or "cpu", model, backend, dtype, experts, most_tokens, output or Path("profile.toml"), seed, json=json, force=force)


def _evaluate(tables: list[Path], profile: str, gated: bool | None, output: Path | None, *, json: bool, force: bool) -> None:
    from moesim.calibrate.evaluate import evaluate
    from moesim.cli.screen import emit_json, note, table
    from moesim.files import check_output, write_json
    from moesim.units import human

    if output:
        check_output(output, force=force)
    found = evaluate(tables, profile, gated=gated)
    if output:
        write_json(output, {"schema_version": 1, **found})
    if json:
        emit_json(found)
        return

    def cells(name: str, e: dict[str, Any]) -> list[str]:
        return [name, str(e["n"]), *(f"{e[key]:.1%}" for key in ("median_ape", "p90_ape", "mape")), f"{e['bias']:+.1%}", str(e["extrapolated"])]

    rows = [cells("all", found), *(cells(name, each) for name, each in found["groups"].items())]
    columns = ["rows", "n", "median", "P90", "MAPE", "bias", "extrapolated"]
    table(f"Parameters of {found['profile']} on {', '.join(path.name for path in tables)}; nothing was fitted", columns, rows)
    for row in found["worst"]:
        what = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("predicted_s", "measured_s", "error"))
        print(f"worst: {row['error']:+.0%}, {human(row['predicted_s'], 's')} for {human(row['measured_s'], 's')}: {what}")
    for entry in found["used"]:
        note(f"{entry['rows']} rows of {entry['table']} predicted with {entry['parameters']}" + (f" ({entry['how']})" if "how" in entry else ""))
    note(*(f"left out: {count} rows: {reason}" for reason, count in found["left_out"].items()))
    note(*(f"note: {line}" for line in found["notes"]))


def _fit(tables: list[Path], device_profile: str | None, gated: bool | None, output: Path, *, json: bool, force: bool) -> None:
    from moesim.calibrate.fit import fit_tables
    from moesim.cli.screen import emit_json, note, progress, table
    from moesim.files import check_output, write_text

    check_output(output, force=force)
    with progress("fitting") as report:
        text, summary = fit_tables(tables, name=output.stem, device_profile=device_profile, gated=gated, progress=report)
    write_text(output, text)
    if json:
        emit_json({"profile": str(output), **summary})
        return
    rows = []
    for fit in summary["fits"]:
        errors = fit["residuals"]
        held_out = [f"{errors[key]:.1%}" if key in errors else "-" for key in ("held_out_median_ape", "held_out_p90_ape")]
        name = f"{fit['name']} {fit.get('dtype') or fit['op']}"
        rows.append([name, f"{errors['n']:.0f}", f"{errors['median_ape']:.1%}", f"{errors['p90_ape']:.1%}", *held_out])
    table(f"Fitted, with facts of {summary['facts_of']}", ["parameters", "n", "median", "P90", "held-out median", "held-out P90"], rows)
    note(*(f"left out: {count} rows: {reason}" for reason, count in summary["left_out"].items()))
    print(f"wrote {output}")


def _measure(
    device: str, model: str, backend: Any, dtype: str | None, experts: int, most_tokens: int, output: Path, seed: int, *, json: bool, force: bool
) -> None:
    from moesim.cli.screen import emit_json, note, progress, table
    from moesim.files import check_output, write_text
    from moesim.model import load_model
    from moesim.units import human
    from moesim.validate import calibrate
    from moesim.validate.profile_file import cluster_text, profile_text

    cluster = output.with_name(f"{output.stem}-cluster.toml")
    for path in (output, cluster):
        check_output(path, force=force)
    spec = load_model(model)
    hidden, width = spec.hidden, spec.intermediate
    cuda = device.startswith("cuda")
    part = output.with_name(output.name + ".part.json")
    with progress("calibrating") as report:
        found = calibrate(
            device,
            [(hidden // 2, width // 2), (hidden // 2, width), (hidden, width // 2), (hidden, width)],
            experts=experts,
            top_k=min(spec.top_k, experts),
            most_tokens=most_tokens,
            backend=backend or ("grouped" if cuda else "loop"),
            dtype=dtype or ("bf16" if cuda else "fp32"),
            gated=spec.gated,
            links=True,
            seed=seed,
            keep=part,
            progress=report,
        )
    write_text(output, profile_text(found, name=output.stem))
    write_text(cluster, cluster_text(found, name=cluster.stem, device_file=output.name))
    part.unlink(missing_ok=True)
    if json:
        emit_json({"profile": str(output), "cluster": str(cluster), **found.to_dict()})
        return
    errors = found.fit.residuals
    name = found.hardware.get("gpu") or found.hardware["cpu"]
    rows = [
        [f"{found.dtype} GEMM", human(found.peak.flops, "FLOP/s"), "best of repeats"],
        ["memory copy", human(found.peak.memory_Bps, "B/s"), "read and write, best of repeats"],
        ["launch", human(found.launch_s, "s"), "host to host"],
        *([way, human(fit["bandwidth_Bps"], "B/s"), f"median error {fit['median_ape']:.1%}"] for way, fit in found.copy_fits.items()),
        ["copy hidden by a GEMM", f"{found.overlap['hidden']:.0%}", f"GEMM x {found.overlap['gemm_slowdown']:.2f} meanwhile"],
        [f"{found.backend} experts", f"{errors['median_ape']:.1%}", f"median error of {errors['n']:.0f} loads, P90 {errors['p90_ape']:.1%}"],
    ]
    table(f"{name}, {found.seconds:.0f} s", ["what", "figure", "how"], rows)
    note(*(f"note: {line}" for line in found.notes))
    print(f"wrote {output} and {cluster}")
