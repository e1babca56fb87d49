"""`moesim place`: decide where experts live; once, from the live plan, or again and again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.options import AsJson, ClusterName, Domain, Force, Phase, Seed, Tokens, TokensPerDevice, TransportName
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.optimize import Problem
    from moesim.plan import Placement

NAME = "place"
EPILOG = (
    "Examples: moesim place traces/run1 --tokens 0%:50% --cluster h100x8 -o plan.json · "
    "moesim place traces/today --current plan.json --most-moves 200 --horizon-steps 5000 -o next.json · "
    "moesim place traces/run1 --online 4096"
)


def run(
    trace: Annotated[
        Path,
        typer.Argument(
            help="A trace, or a loads file (.json) of `moesim import --as-loads` for solvers that need loads alone (with --model).", metavar="TRACE"
        ),
    ],
    cluster: ClusterName = "h100x8",
    solver: Annotated[str, typer.Option("--solver", help="One of `moesim solvers`.")] = "local-search",
    slots: Annotated[int | None, typer.Option("--slots", help="Physical slots per layer over all devices; more than experts means replicas.")] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=0, help="Slots beyond one per expert; another way to give --slots.")] = 0,
    dispatch: Annotated[
        str, typer.Option("--dispatch", help="How the engine picks a replica: even, static-source, nearest, least-loaded or lp.")
    ] = "even",
    rules: Annotated[Path | None, typer.Option("--rules", help="JSON file of experts pinned to devices and experts kept apart.")] = None,
    current: Annotated[Path | None, typer.Option("--current", help="The live plan: start from it, and stay with it if moving does not pay.")] = None,
    most_moves: Annotated[int | None, typer.Option("--most-moves", min=0, help="Most experts to copy, over all layers; with --current.")] = None,
    horizon_steps: Annotated[
        float | None, typer.Option("--horizon-steps", min=1e-9, help="Steps over which the copies must pay off; with --current.")
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            "--scenario", help="A domain or phase to guard against, as NAME or NAME=WEIGHT; repeat. For solvers that know scenarios.", metavar="NAME"
        ),
    ] = None,
    tail: Annotated[
        float, typer.Option("--tail", help="Share of the scenarios' weight, the dearest first, whose mean counts: 1 all, near 0 the worst.")
    ] = 0.25,
    online: Annotated[
        int | None,
        typer.Option(
            "--online", min=1, help="Replay the trace in windows of this many tokens and plan again after each where it pays; -o gets the report."
        ),
    ] = None,
    window_steps: Annotated[
        float, typer.Option("--window-steps", min=1e-9, help="Steps that a window stands for: what a plan has to pay off in; with --online.")
    ] = 1000.0,
    eplb_every: Annotated[int, typer.Option("--eplb-every", min=1, help="Windows between two plans of the EPLB compared with; with --online.")] = 1,
    model: Annotated[str | None, typer.Option("--model", help="The model of a loads file: a preset or a config.json.")] = None,
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
    from moesim.optimize import Constraints, Problem, load_rules, load_solver, place, score
    from moesim.plan import load_plan

    check_output(output, force=force)
    load_solver(solver)
    where = load_cluster(cluster)
    live = load_plan(current) if current else None
    if live is None and (most_moves is not None or horizon_steps is not None):
        raise InputError(f"--{'most-moves' if most_moves is not None else 'horizon-steps'} counts from the live plan; give --current, too")
    counts = trace.suffix == ".json"
    if (model is not None) != counts:
        raise InputError(
            f"{trace}: a loads file needs --model" if counts else "--model goes with a loads file (.json); a trace knows its model; leave it out"
        )
    source = None if counts else open_trace(trace, tokens=tokens, domain=domain, phase=phase)
    known = _model(model) if model else source.model if source else None
    assert known is not None
    if live is not None:
        live.check_fits(known, where.size, place=str(current))
    total = slots if slots is not None else known.experts + replicas if replicas else live.placement.slots_G.tolist() if live else None
    cost = CostModel.of(where, known, transport=transport)
    if online is not None:
        if source is None:
            raise InputError(f"{trace}: --online replays tokens, and a loads file holds none; give a trace")
        if rules or scenario or horizon_steps is not None:
            raise InputError("--rules, --scenario and --horizon-steps do not go with --online (--window-steps is its horizon); leave them out")
        if isinstance(total, list):
            total = None  # the live plan's own
        _online(
            source, where, output=output, first=live.placement if live else None, json=json, window=online, solver=solver, slots=total,
            dispatch=dispatch, tokens_per_device=tokens_per_device, steps_per_window=window_steps, every=eplb_every, most_moves=most_moves,
            cost=cost, seed=seed, time_limit_s=time_limit,
        )  # fmt: skip
        return
    constraints = Constraints(
        rules=load_rules(rules) if rules else (), current=live.placement if live else None, most_moves=most_moves, horizon_steps=horizon_steps
    )
    options: dict[str, Any] = {"slots": total, "dispatch": dispatch, "tokens_per_device": tokens_per_device, "cost": cost, "constraints": constraints}
    with progress("reading the trace"):
        if source is None:
            from moesim.interop import load_loads

            problem = Problem.of_loads(load_loads(trace), known, where, **options)
        else:
            problem = Problem.of(source, where, scenarios=_weights(scenario or []), tail=tail, **options)
    learnt = f"{source.digest} ({source.selection})" if source else f"loads {trace.name}"
    with progress(f"{solver}:") as report:
        plan, solution = place(problem, solver=solver, seed=seed, time_limit_s=time_limit, progress=report, name=name, learnt_from=learnt)
    if plan is None:
        if json:
            emit_json({"status": str(solution.status), "reason": solution.notes.get("reason", ""), "plan": None})
        note(f"infeasible: {solution.notes.get('reason', 'the solver found no placement')}")
        raise typer.Exit(1)
    plan.save(output, force=force)
    document: dict[str, Any] = {"status": str(solution.status), "plan": str(output), "solution": dict(plan.solution)}
    if source is None:
        load = _load_ratio(problem, plan.placement)
        remarks = ["only loads are known: nothing is said about which devices a token reaches, nor about traffic"]
        if json:
            emit_json({**document, "load_ratio": load, "notes": remarks})
            return
        print(f"{solver} on {where.name}: busiest/mean load {load:.3f}, mean over {len(known.moe_layers)} layers; {solution.status}")
        note(*(f"note: {line}" for line in [*remarks, *_words(solution.notes)]))
        print(f"wrote {output}")
        return
    result = score(source, [plan], where, tokens_per_device=tokens_per_device, cost=cost)[0]
    summary = {**result.summary(), "on": f"the tokens it learnt from ({source.selection})"}
    if json:
        emit_json({**document, "in_sample": summary, "notes": list(result.notes)})
        return
    columns, rows = result_rows([summary])
    table(f"{solver} on {where.name}, in-sample ({source.selection}); {solution.status} in {solution.seconds:.2f} s", columns, rows)
    for line in _words(solution.notes):
        print(line)
    note(*(f"note: {line}" for line in result.notes))
    print(f"wrote {output}; score it on tokens it has not seen: {_unseen(trace, output, cluster, tokens, domain, phase)}")


def _unseen(trace: Path, plan: Path, cluster: str, tokens: str | None, domain: list[str] | None, phase: str | None) -> str:
    """The command that scores a plan on the rest of what it learnt from, or on another trace where it learnt from all."""
    first = tokens and re.fullmatch(r"0?%?:(.+)", tokens.replace(" ", ""))
    words = ["moesim score", shlex.quote(str(trace)) if first else "OTHER-TRACE", shlex.quote(str(plan)), "--cluster", shlex.quote(cluster)]
    if first:
        words += [f"--domain {shlex.quote(name)}" for name in domain or []] + ([f"--phase {phase}"] if phase else []) + [f"--tokens {first[1]}:"]
    return " ".join(words)


def _model(name: str) -> Any:
    from moesim.model import load_model

    return load_model(name)


def _weights(scenarios: list[str]) -> dict[str, float]:
    """Weights by name, from NAME or NAME=WEIGHT."""
    found: dict[str, float] = {}
    for text in scenarios:
        name, _, weight = text.partition("=")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            raise InputError(f"--scenario {text!r}: weight {weight!r} is no number; write NAME=2.5") from None
        if name in found:
            raise InputError(f"--scenario {name!r} is given twice; once is enough")
        found[name] = value
    return found


def _load_ratio(problem: Problem, placement: Placement) -> float:
    from moesim.interop.balance import imbalance_L

    return float(imbalance_L(placement, problem.stats.load_LE).mean())


def _words(notes: Any) -> list[str]:
    """What was decided about the live plan, in words."""
    from moesim.units import human

    if not (found := notes.get("migration")):
        return []
    pays, lines = found["pays_off_after_steps"], [f"decision: {found['decision']}"]
    if found["moves"]:
        lines.append(
            f"{found['moves']} experts, {human(found['moved_B'], 'B')}, {human(found['copies_s'], 's')} of copies; a step of all MoE layers gains "
            f"{human(found['gain_s_per_step'], 's')}" + (f"; pays off after {pays:,.3g} steps" if pays else "")
        )
    if found["net_s"] is not None:
        lines.append(f"net over {found['horizon_steps']:,g} steps: {human(found['net_s'], 's')}, predicted on the tokens learnt from")
    return lines


def _online(trace: Any, cluster: Any, *, output: Path, json: bool, **options: Any) -> None:
    """Run, print and write the replay."""
    from moesim.cli.screen import emit_json, note, progress, table
    from moesim.files import write_json
    from moesim.optimize import online
    from moesim.units import human

    with progress("replaying:") as report:
        section = online(trace, cluster, progress=report, **options)
    document = {"schema_version": 1, "title": f"Planning {trace.model.name} on {cluster.name} while it serves", "online": section}
    write_json(output, document)
    if json:
        emit_json({"online": section})
        return
    rows = [
        [row["name"], human(row["total_s"], "s"), human(row["stalled_s"], "s"), str(row["plans"]), str(row["moves"]), f"{row['gain_of_ours']:+.2%}"]
        for row in section["habits"]
    ]
    served = f"{section['windows_served']} windows of {section['window_tokens']:,} tokens"
    table(
        f"{served}, each for {section['steps_per_window']:,g} steps, on {cluster.name}",
        ["habit", "MoE layers", "of it copies", "plans", "moves", "gain of ours"],
        rows,
    )
    note(*(f"note: {line}" for line in section["notes"]))
    print(f"wrote {output}")
