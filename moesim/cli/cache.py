"""`moesim cache`: decide which experts stay in fast memory when not all of them fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.options import AsJson, ClusterName, Domain, Force, Phase, Seed, TracePath
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.trace import Trace

NAME = "cache"
EPILOG = (
    "Examples: moesim cache traces/run1 --cluster rtx-4090x8-pcie --memory 50% -o cache.json · "
    'moesim cache traces/run1 --memory "24 GB" --solver choose --result cache-result.json · '
    "moesim simulate traces/run1 plan.json --cache-plan cache.json"
)


def run(
    trace: TracePath,
    memory: Annotated[
        str, typer.Option("--memory", help='For experts on each device: bytes ("24 GB") or a share of those it computes ("50%").', metavar="SIZE")
    ],
    cluster: ClusterName = "h100x8",
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Which device computes which expert: a plan of `moesim place`. Default: experts in order.")
    ] = None,
    solver: Annotated[str, typer.Option("--solver", help="One of the caching solvers of `moesim solvers`.")] = "pin-set",
    policy: Annotated[str, typer.Option("--policy", help="Which expert gives way. Solver choose picks one itself.")] = "lru",
    prefetch: Annotated[
        str, typer.Option("--prefetch", help="What is copied ahead: none, all, or a predictor by its name: oracle, pre-gated, path, residual.")
    ] = "none",
    distance: Annotated[
        int, typer.Option("--distance", min=0, help="Layers ahead that the predictor knows the routes; 0: all of a step when it begins.")
    ] = 1,
    recall: Annotated[float, typer.Option("--recall", min=0, max=1, help="Share of the experts that the predictor names: your assumption.")] = 1.0,
    bits: Annotated[
        list[float] | None, typer.Option("--bits", help="Fewer bits per weight that bits-ilp may choose for an expert; may be repeated.")
    ] = None,
    max_loss: Annotated[float | None, typer.Option("--max-loss", min=0, help="Most rounding noise bits-ilp may add, as its proxy says.")] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option("--tier", help='Room and price outside the devices: host="64 GB", or nvme="2 TB@0.0001" in $/h for a GB. May be repeated.'),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The cache plan to write.")] = Path("cache.json"),
    result: Annotated[Path | None, typer.Option("--result", help="Write all figures as JSON; `moesim report` draws them.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the miss-ratio curves of every policy: .svg or .png.")] = None,
    tokens: Annotated[
        str, typer.Option("--tokens", help="Range of tokens to learn from; what follows it is judged, else what precedes it.")
    ] = "0%:50%",
    judge: Annotated[
        Path | None, typer.Option("--judge", help="Another trace to judge, as its domain and phase are selected; learn on --tokens of TRACE.")
    ] = None,
    domain: Domain = None,
    phase: Phase = None,
    tokens_per_device: Annotated[int, typer.Option("--tokens-per-device", min=1, help="Tokens each device holds in one step.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Length of a sequence in tokens, for attention.")] = 4096,
    event_steps: Annotated[
        int, typer.Option("--event-steps", min=0, help="Judged steps that the event engine runs as well, to check the closed form.")
    ] = 256,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds the solver may take.")] = 30.0,
    seed: Seed = 0,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Decide slots, pinned experts, precision and tier of every layer's experts, and say what that costs in time.

    A cache is asked for the experts of every step and layer; missing ones are copied from the host while the layer waits.
    Hit rates and stalls are given on the tokens learnt from and on the others. Exit code 1 and no file when nothing fits.
    """
    from moesim.cli.screen import emit_json, note, open_trace, progress
    from moesim.files import check_output, write_json
    from moesim.hardware import load_cluster
    from moesim.optimize import load_solver
    from moesim.optimize.cache_problem import CacheProblem
    from moesim.optimize.cache_study import study_cache
    from moesim.optimize.caching import plan_cache
    from moesim.plan import load_plan

    outputs = [path for path in (output, result, plot) if path]
    if plot and plot.suffix not in (".svg", ".png"):
        raise InputError(f"--plot {plot}: draws .svg or .png; give one of these")
    for path in outputs:
        check_output(path, force=force)
    load_solver(solver, "caching")
    where, loaded = load_cluster(cluster), load_plan(plan) if plan else None
    whole = open_trace(trace, tokens=None, domain=domain, phase=phase)
    learn = whole.select(tokens=tokens)
    judged, label = _rest(whole, tokens) if judge is None else (open_trace(judge, tokens=None, domain=domain, phase=phase), str(judge))
    if judged.model.digest != learn.model.digest:
        raise InputError(f"{judge}: routing of {judged.model.name!r}, {trace} has {learn.model.name!r}; judge a trace of the same model")
    with progress("reading"):
        problem = CacheProblem.of(
            learn, where, memory, plan=loaded, tokens_per_device=tokens_per_device, context=context, bits=bits or (), room=_tiers(tier or []),
            most_loss=float("inf") if max_loss is None else max_loss, policy=policy, prefetcher=prefetch, distance=distance, recall=recall,
        )  # fmt: skip
    with progress(f"{solver}:") as report:
        found = plan_cache(
            problem, solver=solver, seed=seed, time_limit_s=time_limit, progress=report, learnt_from=f"{learn.digest} ({learn.selection})"
        )
    if found.plan is None:
        if json:
            emit_json({"status": str(found.status), "reason": found.notes.get("reason", ""), "plan": None})
        note(f"infeasible: {found.notes.get('reason', 'the solver found no cache plan')}")
        raise typer.Exit(1)
    parts = [(learn.selection, "in-sample", problem), (label, "held-out", CacheProblem.like(problem, judged))]
    with progress("judging:") as report:
        section = study_cache(found, parts, trace=judged, event_steps=event_steps, progress=report)
    found.plan.save(output, force=force)
    notes = section.pop("notes")
    document = {"schema_version": 1, "title": f"Expert cache of {learn.model.name} on {where.name}", "caching": section, "notes": notes}
    if result:
        write_json(result, document)
    if plot:
        from moesim.report.picture import save_drawing
        from moesim.report.sections.caching import curves_drawing

        save_drawing(curves_drawing(section["curves"], section["policy"]), plot)
    if json:
        emit_json({"plan": str(output), "solution": dict(found.plan.solution), **document})
        return
    show(section)
    note(*(f"note: {line}" for line in notes))
    options = f"--cluster {cluster} --mode decode --tokens-per-device {tokens_per_device} --cache-plan {output}"
    print(f"wrote {output}; run it: moesim simulate {trace} {plan or 'PLAN'} {options}")
    if plan is None:
        print(f"with PLAN from: moesim place {trace} --solver linear --cluster {cluster} -o PLAN")


def show(section: dict[str, Any]) -> None:
    """Tables of a study: the plan, how it scores, what the event engine says."""
    from moesim.cli.screen import table
    from moesim.units import human

    held, whole = sum(section["held_B"]), sum(section["all_B"])
    ahead = section["prefetch"]
    print(
        f"{section['solver']} on {section['cluster']}: {section['status']} in {section['seconds']:.2f} s; policy {section['policy']}, "
        + ("no prefetching" if ahead["name"] == "none" else f"prefetching by {ahead['name']} at recall {ahead['recall']:g}")
    )
    print(f"experts in fast memory {human(held, 'B')} of {human(whole, 'B')}, {human(whole - held, 'B')} less than all resident")
    tiers = ", ".join(f"{count:,} {name}" for name, count in section["tiers"].items())
    bits = ", ".join(f"{count:,} at {name}" for name, count in section["bits"].items())
    print(f"home of experts: {tiers}; bits: {bits}" + (f"; rounding noise {section['loss']:.2e} (a proxy)" if section["loss"] else ""))
    rows = [
        [str(layer), _range(slots), _range(pinned)]
        for layer, slots, pinned in zip(section["layers"], section["slots"], section["pinned"], strict=True)
    ]
    table(f"Slots of each device, of {section['experts']} experts a layer", ["MoE layer", "slots", "pinned"], rows)
    rows = []
    for part in section["scored"]:
        for name, row in ((section["solver"], part["plan"]), ("equal-slots", part.get("equal"))):
            if row:
                figures = [
                    f"{row['hit_ratio']:.4f}",
                    human(row["stall_s"], "s"),
                    human(row["step_s"], "s"),
                    human(row["demand_B"] + row["ahead_B"], "B"),
                ]
                rows.append([f"{part['label']} ({part['kind']})", name, f"{part['tokens']:,}", *figures])
    table("Scores", ["on", "plan", "tokens", "hit ratio", "stall/step", "step", "copied/step"], rows)
    if event := section.get("event"):
        print(
            f"event engine, {event['steps']:,} steps: stall {human(event['stall_s'], 's')} per step; "
            f"closed form {human(event['closed_stall_s'], 's')} ({event['error']:+.1%})"
        )


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}…{max(values)}"


def _rest(whole: Trace, tokens: str) -> tuple[Trace, str]:
    """What of a trace lies behind the learnt range, else before it."""
    first, _, last = tokens.partition(":")
    after, before = f"{last}:" if last.strip() not in ("", "100%") else None, f":{first}" if first.strip() not in ("", "0", "0%") else None
    rest = after or before
    if rest is None:
        raise InputError(f"--tokens {tokens} leaves nothing to judge; learn from a part, such as 0%:50%, or give another trace with --judge")
    chosen = whole.select(tokens=rest)
    return chosen, chosen.selection


def _tiers(texts: list[str]) -> dict[str, tuple[float, float]]:
    """Room and price of each tier from `host=64 GB@0.004`."""
    from moesim.units import parse

    found = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        size, at, price = rest.partition("@")
        try:
            room_B, rent = parse(size.strip(), "B"), float(price) / 1e9 if at else 0.0
        except ValueError as problem:
            raise InputError(f"--tier {text!r}: {problem}; write for example host=64GB or nvme=2TB@0.0001 ($/h for a GB)") from None
        if not equals or not room_B >= 0 or not 0 <= rent < float("inf"):
            raise InputError(f"--tier {text!r}: write for example host=64GB or nvme=2TB@0.0001 ($/h for a GB)")
        found[name.strip()] = (room_B, rent)
    return found
