"""`moesim inspect`: what the routing looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, Domain, Force, Phase, Tokens, TracePath

NAME = "inspect"
EPILOG = "Example: moesim inspect traces/run1 --phase prefill"


def run(
    trace: TracePath,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write everything as JSON, the load matrix included.")] = None,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Show skew of the experts' load, affinity between layers, and drift between domains and over training.

    skew is the hottest expert over the mean; affinity the mutual information of the experts of consecutive layers;
    drift the Jensen-Shannon divergence of loads (0 equal, 1 disjoint).
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress, table
    from moesim.files import check_output, write_json
    from moesim.trace.inspect import inspect

    if output:
        check_output(output, force=force)
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    with progress("reading"):
        found = inspect(source)
    data = {"trace": str(trace), "selection": source.selection, "digest": source.digest, **found.to_dict()}
    if output:
        write_json(output, {"schema_version": 1, **data})
    if json:
        emit_json(data)
        return
    stats, model = found.stats, source.model
    affinity = [f"{bits:.2f}" for bits in stats.affinity_bits]
    rows = [
        [
            str(layer),
            f"{stats.skew_L[i]:.2f}",
            str(int(stats.load_LE[i].argmax())),
            str(int((stats.load_LE[i] == 0).sum())),
            affinity[i] if i < len(affinity) else "",
        ]
        for i, layer in enumerate(model.moe_layers)
    ]
    title = f"{model.name}: {stats.tokens:,} tokens ({source.selection}), {model.experts} experts, top-{model.top_k}"
    table(title, ["MoE layer", "skew", "hottest expert", "unused experts", "affinity to next, bits"], rows)
    names = list(found.load_by_domain)
    if len(names) > 1:
        cells = [[a or "(none)", *(f"{found.drift_DD[i, j]:.3f}" for j in range(len(names)))] for i, a in enumerate(names)]
        table("Drift between domains, bits", ["domain", *(name or "(none)" for name in names)], cells)
    if len(found.drift_over_steps):
        cells = [
            [f"{a} → {b}", f"{row.mean():.4f}"] for a, b, row in zip(found.step_edges, found.step_edges[1:], found.drift_over_steps, strict=False)
        ]
        table("Drift over steps, bits (mean over layers)", ["from step → to step", "drift"], cells)
    if found.repeated_share > 0.05:
        note(f"note: {found.repeated_share:.0%} of tokens choose exactly what the token before chose in every layer; padding or dummy batches?")
