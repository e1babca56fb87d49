"""`moesim place`: decide where experts live."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.options import AsJson, ClusterName, Domain, Force, Phase, Seed, Tokens, TokensPerDevice, TracePath, TransportName

NAME = "place"
EPILOG = "Example: moesim place traces/run1 --tokens 0%:50% --cluster h100x8 --solver local-search -o plan.json"


def run(
    trace: TracePath,
    cluster: ClusterName = "h100x8",
    solver: Annotated[str, typer.Option("--solver", help="One of `moesim solvers`.")] = "local-search",
    slots: Annotated[int | None, typer.Option("--slots", help="Physical slots per layer over all devices; more than experts means replicas.")] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=0, help="Slots beyond one per expert; another way to give --slots.")] = 0,
    dispatch: Annotated[str, typer.Option("--dispatch", help="How the engine picks a replica: even, static-source or nearest.")] = "even",
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan file to write.")] = Path("plan.json"),
    name: Annotated[str | None, typer.Option("--name", help="Name of the plan in tables; default: the solver.")] = None,
    tokens: Tokens = None,
    domain: Domain = None,
    phase: Phase = None,
    tokens_per_device: TokensPerDevice = 4096,
    transport: TransportName = None,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds the solver may take.")] = 30.0,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Decide on which device each expert lives, learning from the selected tokens of a trace.

    Exit code 1 and no file when no placement can exist.
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress, result_rows, table
    from moesim.cost import CostModel
    from moesim.files import check_output
    from moesim.hardware import load_cluster
    from moesim.optimize import Problem, load_solver, place, score

    check_output(output, force=force)
    load_solver(solver)
    where = load_cluster(cluster)
    source = open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    total = slots if slots is not None else source.model.experts + replicas if replicas else None
    cost = CostModel.of(where, source.model, transport=transport)
    with progress("reading the trace"):
        problem = Problem.of(source, where, slots=total, dispatch=dispatch, tokens_per_device=tokens_per_device, cost=cost)
    with progress(f"{solver}:") as report:
        plan, solution = place(
            problem,
            solver=solver,
            seed=seed,
            time_limit_s=time_limit,
            progress=report,
            name=name,
            learnt_from=f"{source.digest} ({source.selection})",
        )
    if plan is None:
        if json:
            emit_json({"status": str(solution.status), "reason": solution.notes.get("reason", ""), "plan": None})
        note(f"infeasible: {solution.notes.get('reason', 'the solver found no placement')}")
        raise typer.Exit(1)
    plan.save(output, force=force)
    result = score(source, [plan], where, tokens_per_device=tokens_per_device, cost=cost)[0]
    summary = {**result.summary(), "on": f"the tokens it learnt from ({source.selection})"}
    if json:
        emit_json(
            {"status": str(solution.status), "plan": str(output), "solution": dict(plan.solution), "in_sample": summary, "notes": list(result.notes)}
        )
        return
    columns, rows = result_rows([summary])
    table(f"{solver} on {where.name}, in-sample ({source.selection}); {solution.status} in {solution.seconds:.2f} s", columns, rows)
    note(*(f"note: {line}" for line in result.notes))
    print(f"wrote {output}; score it on other tokens: moesim score {trace} {output} --cluster {cluster} --tokens 50%:")
