"""`moesim compare`: plans of several solvers, learnt on one part and judged on others; or systems, on one plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.options import AsJson, ClusterName, Contention, Context, Force, Mode, Phase, Seed, Tokens, TokensPerDevice, TracePath, TransportName
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.hardware import Cluster
    from moesim.plan import Plan
    from moesim.sim.event import EventResult
    from moesim.trace import Trace

NAME = "compare"
EPILOG = (
    "Examples: moesim compare traces/run1 --home code --cluster h100x8 · moesim compare traces/run1 mine.json --solver eplb -o comparison.json · "
    "moesim compare traces/run1 mine.json --system plain --system tutel --mode training"
)
ONLY_PLANS = ("solver", "learn", "replicas", "dispatch", "current", "time_limit", "seed")
ONLY_SYSTEMS = ("mode", "context", "contention")


def run(
    ctx: typer.Context,
    trace: TracePath,
    plans: Annotated[list[Path] | None, typer.Argument(help="Plans to compare with those of the solvers.", metavar="[PLAN…]")] = None,
    solver: Annotated[
        list[str] | None, typer.Option("--solver", help="Solver to run; may be repeated. Default: every available placement solver.")
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option("--system", help="Compare systems (see `moesim systems`) on one plan instead; repeat. Without a plan: experts in order."),
    ] = None,
    mode: Mode = None,
    context: Context = None,
    contention: Contention = None,
    cluster: ClusterName = "h100x8",
    home: Annotated[
        str | None, typer.Option("--home", help="Domain to learn from; the others are scored as cross-domain. Default: all tokens.")
    ] = None,
    learn: Annotated[str, typer.Option("--learn", help="Range of the home tokens to learn from.")] = "0%:50%",
    judge: Annotated[str, typer.Option("--judge", help="Range of the home tokens never seen by a solver.")] = "50%:100%",
    tokens: Tokens = None,
    replicas: Annotated[int, typer.Option("--replicas", min=0, help="Slots beyond one per expert.")] = 0,
    dispatch: Annotated[
        str, typer.Option("--dispatch", help="How the engine picks a replica: even, static-source, nearest, least-loaded or lp.")
    ] = "even",
    current: Annotated[Path | None, typer.Option("--current", help="The live plan: say how many experts each other one would move.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the comparison as JSON; `moesim report` reads it.")] = None,
    phase: Phase = None,
    tokens_per_device: TokensPerDevice = 4096,
    transport: TransportName = None,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds each solver may take.")] = 30.0,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Make plans with several solvers and score them where it counts: on tokens they never saw and on other domains.

    With --system, run published systems side by side on the --judge tokens under one plan, with the event engine.
    """
    from moesim.cli.screen import emit_json, open_trace, progress, result_rows, table
    from moesim.cost import CostModel
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.optimize import compare, solver_infos
    from moesim.plan import load_plan
    from moesim.units import human

    _refuse(ctx, ONLY_PLANS if system else ONLY_SYSTEMS, "goes with solvers, not with --system" if system else "needs --system")
    if output:
        check_output(output, force=force)
    where, loaded = load_cluster(cluster), [load_plan(path) for path in plans or ()]
    source = open_trace(trace, tokens=None, domain=None, phase=phase)
    live = load_plan(current) if current else None
    for path, plan in [*zip(plans or (), loaded, strict=True), *([(current, live)] if live else [])]:
        plan.check_fits(source.model, where.size, place=str(path))
    if system:
        if len(loaded) > 1:
            raise InputError(f"--system compares systems on one plan, {len(loaded)} are given: {', '.join(map(str, plans or ()))}; give one")
        base = source.select(domain=home) if home else source
        judged = (base.select(tokens=tokens) if tokens else base).select(tokens=judge)
        cost = CostModel.of(where, source.model, transport=transport)
        options = {
            "cost": cost,
            "mode": mode or "prefill",
            "context": context or 4096,
            "contention": bool(contention),
            "tokens_per_device": tokens_per_device,
        }
        document = _systems(judged, loaded[0] if loaded else _linear(judged, where), where, system, options)
        if output:
            write_json(output, document)
        if json:
            emit_json(document)
        else:
            show_systems(document)
        return
    names = solver if solver is not None else [] if loaded else [i.name for i in solver_infos() if i.available and i.solves == "placement"]
    with progress("comparing:") as report:
        _, section = compare(
            source, where, names, plans=loaded, home=home, tokens=tokens, learn=learn, judge=judge, slots=source.model.experts + replicas,
            dispatch=dispatch, tokens_per_device=tokens_per_device, current=live, seed=seed, time_limit_s=time_limit, progress=report,
            cost=CostModel.of(where, source.model, transport=transport),
        )  # fmt: skip
    document = {"schema_version": 1, "title": f"Placements of {source.model.name} on {where.name}", "comparison": section}
    if output:
        write_json(output, document)
    if json:
        emit_json({"comparison": section})
        return
    for part in section["scored_on"]:
        columns, rows = result_rows(part["plans"])
        table(f"{part['label']} ({part['kind']}, {part['tokens']:,} tokens)", columns, rows)
    unseen = section["scored_on"][1]["plans"]
    sizes = list(unseen[0]["batch_load_ratio"])
    columns = ["plan", *(f"batch {size}" for size in sizes), *(["moves", "moved"] if live else [])]
    rows = [
        [row["name"], *(f"{row['batch_load_ratio'][size]:.3f}" for size in sizes), *([str(row["moves"]), human(row["moved_B"], "B")] if live else [])]
        for row in unseen
    ]
    table("Busiest/mean load batch by batch, on the part never seen", columns, rows)
    rows = [
        [row["name"], row["status"], f"{row['seconds']:.2f} s", "" if row["gap"] is None else f"{row['gap']:.1%}", row["reason"]]
        for row in section["solutions"]
    ]
    if rows:
        table("Solvers", ["solver", "status", "time", "gap", "reason"], rows)


def _refuse(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    """InputError for options on the command line that would change nothing."""
    given = [name for name in names if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} {why}; leave it out")


def _linear(trace: Trace, cluster: Cluster) -> Plan:
    """Experts in the order of their ids, as many on every device."""
    from moesim.optimize import Problem, place

    plan, solution = place(Problem.of(trace, cluster), solver="linear")
    if plan is None:
        raise InputError(f"no linear plan for {cluster.name!r}: {solution.notes['reason']}; give a plan")
    return plan


def _systems(trace: Trace, plan: Plan, cluster: Cluster, names: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Document of all systems' results, and of their steps against the first system's.

    exchange_share is the share s of the critical path in all-to-alls: nothing that only makes those faster gains more than 1/(1-s).
    """
    from dataclasses import replace

    from moesim.cli.screen import progress
    from moesim.sim.event import simulate_event
    from moesim.systems import SYSTEMS

    if unknown := [name for name in names if name not in SYSTEMS]:
        raise InputError(f"system {unknown[0]!r} is unknown; use some of {', '.join(sorted(SYSTEMS))}")
    results: list[EventResult] = []
    rows: list[dict[str, Any]] = []
    with progress("simulating") as report:
        for index, name in enumerate(dict.fromkeys(names)):
            report(index / len(names), name)
            found = simulate_event(trace, plan, cluster, system=name, **options)
            results.append(replace(found, name=name))
            share = sum(found.critical_path_s.get(kind, 0.0) for kind in ("dispatch", "combine")) / float(found.step_s_S.sum())
            rows.append({"system": name, "step_s": float(found.step_s_S.mean()), "exchange_share": share})
    first_s = rows[0]["step_s"]
    return {
        "schema_version": 1,
        "title": f"Systems for {trace.model.name} on {cluster.name}, plan {plan.name}",
        "plan": plan.name,
        "selection": trace.selection,
        "systems": [{**row, "gain": first_s / row["step_s"]} for row in rows],
        "results": [result.to_dict() for result in results],
        "notes": [f"judged on {trace.tokens:,} tokens ({trace.selection}); gain is the step time of {rows[0]['system']} over each system's"],
    }


def show_systems(document: dict[str, Any]) -> None:
    """The table of `compare --system`, and every remark once."""
    from moesim.cli.screen import note, table
    from moesim.units import human

    rows = []
    for row, result in zip(document["systems"], document["results"], strict=True):
        summary, share = result["summary"], row["exchange_share"]
        times = [human(summary[key], "s") for key in ("layer_time_s", "dispatch_s", "compute_s", "combine_s")]
        limit = f"{1 / (1 - share):.2f}"
        rows.append([row["system"], human(row["step_s"], "s"), f"{row['gain']:.3f}", *times, human(summary["a2a_bytes"], "B"), f"{share:.1%}", limit])
    columns = ["system", "step", "gain", "MoE layer", "dispatch", "compute", "combine", "all-to-all/layer", "share of path", "at most"]
    table(f"{document['title']}, {document['results'][0]['inputs']['mode']}", columns, rows)
    print("share of path: all-to-alls on the critical path of a step; at most: what hiding or removing them all could still gain, 1/(1-share)")
    remarks = dict.fromkeys(line for result in document["results"] for line in result["notes"])
    note(*(f"note: {line}" for line in [*document["notes"], *remarks]))
