"""`moesim inspect`: what the routing looks like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli.options import AsJson, Domain, Force, Phase, Tokens, TracePath

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moesim.trace import Trace, TraceStats

NAME = "inspect"
EPILOG = "Example: moesim inspect traces/run1 --phase prefill"


def run(
    trace: TracePath,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", help="Workers of this Dask scheduler count a large trace part by part: skew, co-activation, affinity."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write everything as JSON, the load matrix included.")] = None,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Show skew of the experts' load, co-activation, affinity between layers, drift between domains and over training, locality.

    skew is the hottest expert over the mean; lift how many times as often two experts serve one token as if independent;
    affinity the mutual information of the experts of consecutive layers; drift the Jensen-Shannon divergence of loads
    (0 equal, 1 disjoint). SRP is the best F1 score of switching experts on and off for whole windows of tokens; CLS the share
    of experts a window does not choose; SCH the hit rate of a cache of rho·K slots per layer that looks one segment ahead.
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress, table
    from moesim.files import check_output, write_json
    from moesim.trace.inspect import inspect
    from moesim.trace.locality import RHOS, SEGMENTS, WINDOWS

    if output:
        check_output(output, force=force)
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    if scheduler:
        counted(source, scheduler, output, json=json)
        return
    with progress("reading"):
        found = inspect(source)
    data = {"trace": str(trace), "selection": source.selection, "digest": source.digest, **found.to_dict()}
    if output:
        write_json(output, {"schema_version": 1, **data})
    if json:
        emit_json(data)
        return
    show_layers(found.stats, source.selection, found.drift_L if len(found.load_by_domain) > 1 else None)
    names = list(found.load_by_domain)
    if len(names) > 1:
        cells = [[a or "(none)", *(f"{found.drift_DD[i, j]:.3f}" for j in range(len(names)))] for i, a in enumerate(names)]
        table("Drift between domains, bits", ["domain", *(name or "(none)" for name in names)], cells)
    if len(found.drift_over_steps):
        cells = [
            [f"{a} → {b}", f"{row.mean():.4f}"] for a, b, row in zip(found.step_edges, found.step_edges[1:], found.drift_over_steps, strict=False)
        ]
        table("Drift over steps, bits (mean over layers)", ["from step → to step", "drift"], cells)
    near = found.locality
    cells = [
        [f"{m} tokens", shown(srp), f"{low:.3f}…{high:.3f}" if low == low else "–", shown(rho, 2), shown(cls.mean())]
        for m, srp, (low, high), rho, cls in zip(WINDOWS, near.srp_W, near.srp_interval_W2, near.rho_W, near.cls_WL, strict=True)
    ]
    title = f"Locality of {near.sequences:,} sequences (–: too few, or none long enough)"
    table(title, ["window", "SRP", "95 % interval", "experts on / chosen", "CLS: share not chosen"], cells)
    cells = [[f"{m} tokens", *(shown(hit) for hit in row)] for m, row in zip(SEGMENTS, near.sch_MR, strict=True)]
    table(f"SCH: hits with one pool for the model, warm fill, {near.cached_tokens:,} tokens", ["segment", *(f"rho = {rho}" for rho in RHOS)], cells)
    if near.midway:
        note(f"note: {near.midway:,} sequences begin midway (a selection, or too many open at once); windows over their beginnings are not counted")
    if near.without_sequence:
        note(f"note: {near.without_sequence:,} tokens belong to no known sequence and are left out of locality")
    if found.repeated_share > 0.05:
        note(f"note: {found.repeated_share:.0%} of tokens choose exactly what the token before chose in every layer; padding or dummy batches?")


def shown(value: float, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return f"{value:.{digits}f}" if value == value else "–"


def counted(source: Trace, scheduler: str, output: Path | None, *, json: bool) -> None:
    """What can be counted part by part and added up, by workers of a Dask cluster. Locality and drift need tokens in order: not there."""
    from dataclasses import asdict

    from moesim.cli.screen import emit_json, note
    from moesim.files import write_json
    from moesim.sweep import DaskCrew, stats_of
    from moesim.trace.inspect import top_pairs

    stats = stats_of(source, DaskCrew(scheduler))
    data = {
        "trace": str(source.path), "selection": source.selection, "digest": source.digest, "model": stats.model.name, "tokens": stats.tokens,
        "layers": list(stats.model.moe_layers), "skew": stats.skew_L.tolist(), "affinity_bits": stats.affinity_bits.tolist(),
        "load": stats.load_LE.tolist(), "coactivation": [asdict(pair) for pair in top_pairs(stats)],
    }  # fmt: skip
    if output:
        write_json(output, {"schema_version": 1, **data})
    if json:
        emit_json(data)
        return
    show_layers(stats, source.selection, None)
    note("note: counted part by part; drift and locality need the tokens in order: leave --scheduler out for them")


def show_layers(stats: TraceStats, selection: str, drift_L: NDArray[np.float64] | None) -> None:
    """One row per MoE layer; the last column where there is a drift."""
    from moesim.cli.screen import table
    from moesim.trace.inspect import top_pairs

    model, affinity = stats.model, [f"{bits:.2f}" for bits in stats.affinity_bits]
    strongest = {pair.layer: f"{pair.experts[0]} + {pair.experts[1]} (lift {pair.lift:.2f})" for pair in reversed(top_pairs(stats))}
    rows = [
        [
            str(layer),
            f"{stats.skew_L[i]:.2f}",
            str(int(stats.load_LE[i].argmax())),
            str(int((stats.load_LE[i] == 0).sum())),
            strongest.get(layer, ""),
            affinity[i] if i < len(affinity) else "",
            *([] if drift_L is None else [f"{drift_L[i]:.3f}"]),
        ]
        for i, layer in enumerate(model.moe_layers)
    ]
    title = f"{model.name}: {stats.tokens:,} tokens ({selection}), {model.experts} experts, top-{model.top_k}"
    columns = ["MoE layer", "skew", "hottest expert", "unused experts", "chosen together most", "affinity to next, bits"]
    table(title, [*columns, *([] if drift_L is None else ["drift between domains, bits"])], rows)
