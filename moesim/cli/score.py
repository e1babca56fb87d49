"""`moesim score`: what plans do to a trace."""

from __future__ import annotations

from moesim.cli.options import AsJson, ClusterName, Domain, Phase, PlanPaths, Tokens, TokensPerDevice, TracePath, TransportName

NAME = "score"
EPILOG = "Example: moesim score traces/run1 eplb.json mine.json --cluster h100x8 --tokens 50%: --json"


def run(
    trace: TracePath,
    plans: PlanPaths,
    cluster: ClusterName = "h100x8",
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    tokens_per_device: TokensPerDevice = 4096,
    transport: TransportName = None,
    json: AsJson = False,
) -> None:
    """Predict load, traffic and time of plans on the selected tokens, with one cost model.

    busiest/mean is the load of the busiest device over the mean device, devices/token the distinct devices a token is sent to.
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress, result_rows, table
    from moesim.cost import CostModel
    from moesim.hardware import load_cluster
    from moesim.optimize import score
    from moesim.plan import load_plan

    where, loaded = load_cluster(cluster), [load_plan(path) for path in plans]
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    for path, plan in zip(plans, loaded, strict=True):
        plan.check_fits(source.model, where.size, place=str(path))
    cost = CostModel.of(where, source.model, transport=transport)
    with progress("scoring"):
        results = score(source, loaded, where, tokens_per_device=tokens_per_device, cost=cost)
    if json:
        shown = [{**result.summary(), "file": str(path)} for path, result in zip(plans, results, strict=True)]
        emit_json(
            {
                "trace": str(trace),
                "selection": source.selection,
                "tokens": source.tokens,
                "cluster": where.name,
                "plans": shown,
                "notes": list(results[0].notes),
            }
        )
        return
    columns, rows = result_rows([result.summary() for result in results])
    table(
        f"{source.model.name} on {where.name}: {source.tokens:,} tokens ({source.selection}), {tokens_per_device} per device and step", columns, rows
    )
    note(*(f"note: {line}" for line in results[0].notes))
