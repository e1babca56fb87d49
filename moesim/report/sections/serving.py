"""Sections: a deployment while it serves, and a plan for its size over time."""

from __future__ import annotations

from functools import partial

from moesim.report.blocks import Block, Drawing, Facts, Gallery, Group, Section, Table, cells, column
from moesim.report.curves import Curves, draw_curves
from moesim.report.offers import Load, draw_load
from moesim.report.parts import EventPart, ScalingPart, ServedPart, ServingPart
from moesim.report.schema import Document
from moesim.report.text import percent, quantity


def serving(document: Document) -> Section | None:
    """Latencies, and queue, cache and throughput over time, of every run."""
    found = document.serving
    if not found:
        return None
    blocks: list[Block] = []
    for run in found:
        blocks.append(Gallery(drawings=_timeline(run), heading=run.summary.name if len(found) > 1 else ""))
        if spent := sum(run.step_parts_s.values()):
            shares = [(name, percent(value / spent)) for name, value in run.step_parts_s.items() if value > 0]
            blocks.append(Facts(pairs=[("time of steps", ", ".join(f"{name} {share}" for name, share in shares)), *_use(run.summary)]))
    blocks.append(latencies("Latencies", [(run.summary.name, run.summary) for run in found]))
    first = found[0].summary
    lead = f"{first.served:,} of {first.requests:,} requests served; {percent(first.attainment)} keep the objective."
    return Section(key="serving", title="Serving over time", lead=lead, blocks=blocks)


def latencies(caption: str, runs: list[tuple[str, ServedPart]]) -> Table:
    """Mean and percentiles of the three times of each run."""
    rows = []
    for name, summary in runs:
        times = [value for spread in (summary.ttft_s, summary.tpot_s, summary.latency_s) for value in (spread.p50, spread.p99)]
        kept = f"{'✓' if summary.meets_slo else '✗'}\N{NO-BREAK SPACE}{percent(summary.attainment)}"
        rows.append(cells(name, kept, *("–" if value is None else quantity(value, "s") for value in times)))
    return Table(
        caption=caption,
        columns=["run", "keep the objective", "first token P50", "P99", "token after it P50", "P99", "last token P50", "P99"],
        align="lrrrrrrr",
        groups=[Group(rows=rows)],
    )


def scaling(document: Document) -> Section | None:
    """Demand and size over time, the changes, what other policies cost, and what if."""
    part = document.scaling
    if part is None:
        return None
    plan = part.plan
    sizes = sorted({interval.devices for interval in part.timeline})
    lead = (
        f"Plan {plan.name}: {sizes[0]} to {sizes[-1]} devices in intervals of {quantity(plan.interval_s, 's')}, {len(plan.changes)} changes."
        if len(sizes) > 1
        else f"Plan {plan.name}: {sizes[0]} devices throughout."
    )
    if part.instances > 1:
        lead += f" It is the plan of each of {part.instances} instances, for its share of the requests."
    blocks: list[Block] = [Gallery(drawings=[_size(part)])]
    if part.event:
        blocks.append(_event(part.event))
    if plan.changes:
        rows = [
            cells(quantity(c.at_s, 's'), f"{c.before} → {c.after}", c.method, quantity(c.seconds, "s"), quantity(c.pause_s + c.down_s, "s"),
                  quantity(c.moved_B, "B"), quantity(c.loaded_B, "B"))
            for c in plan.changes
        ]  # fmt: skip
        names = ["ordered at", "devices", "method", "takes", "takes no requests for", "between devices", "loaded"]
        blocks.append(Table(caption="Changes of size", columns=names, align="rllrrrr", groups=[Group(rows=rows)]))
    blocks.append(_bills(part))
    if part.outlooks:
        blocks.append(latencies("The plan served as it is, and what if", [(outlook.case, outlook.served) for outlook in part.outlooks]))
    return Section(key="scaling", title="When to scale", lead=lead, blocks=blocks)


def _event(event: EventPart) -> Gallery:
    """One change of size closely: who runs and waits, and how long the slowest first token took. Time counts from the order."""
    x = [event.start_s + (i + 0.5) * event.bin_s - event.at_s for i in range(len(event.waiting))]
    ready = f"ordered at 0, {event.after} devices serve from {quantity(event.seconds, 's')} on (dashed)"
    slowest = max((value for value in event.slowest_first_s if value is not None), default=0.0)
    lines = Curves(x=x, y=[event.running, event.waiting], names=["running", "waiting"], xlabel="seconds from the order", marks=[0.0, event.seconds])
    first = Curves(
        x=x, y=[event.slowest_first_s], names=["first token"], xlabel="seconds from the order", unit="s", limit=event.limit_s,
        marks=[0.0, event.seconds],
    )  # fmt: skip
    return Gallery(
        heading=f"The change from {event.before} to {event.after} devices at {quantity(event.at_s, 's')}, closely",
        drawings=[
            Drawing(
                caption=f"Requests; {ready}",
                alt=f"Lines over {x[-1] - x[0]:.3g} seconds: running up to {max(event.running):,.0f}, waiting up to {max(event.waiting):,.0f}.",
                draw=partial(draw_curves, curves=lines),
                width=470,
            ),
            Drawing(
                caption="Slowest first token, by when requests arrive" + ("; the line is the limit" if event.limit_s else ""),
                alt=f"Line over {x[-1] - x[0]:.3g} seconds, up to {slowest:.3g} s.",
                draw=partial(draw_curves, curves=first),
                width=470,
            ),
        ],
    )


def _bills(part: ScalingPart) -> Table:
    bills = sorted(part.solvers.items(), key=lambda item: item[1].total)
    totals = column([bill.total for _, bill in bills], lambda value: f"{value:,.4g}")
    rows = [
        [*cells(f"→ {name}" if name == part.plan.made_from.get("solver") else name), total,
         *cells(f"{bill.rent:,.4g}", percent(bill.attainment), f"{bill.device_hours:,.4g}", bill.changes)]
        for (name, bill), total in zip(bills, totals, strict=True)
    ]  # fmt: skip
    return Table(
        caption=f"What each policy costs, {part.currency}",
        columns=["policy", "total", "rent", "in time", "device-hours", "changes"],
        align="lrrrrr",
        groups=[Group(rows=rows)],
        note="→ this plan. optimal knows the whole future, so it is a bound; reactive and predictive know only the past.",
    )


def _size(part: ScalingPart) -> Drawing:
    turns = [(change.at_s, f"{change.before}→{change.after}") for change in part.plan.changes]
    load = Load(
        start_s=[interval.start_s for interval in part.timeline],
        interval_s=part.plan.interval_s,
        demand=[interval.demand_per_s for interval in part.timeline],
        served=[interval.capacity_per_s for interval in part.timeline],
        turns=turns if len(turns) <= 16 else [],
    )
    return Drawing(
        caption="Demand, and what the devices in use can serve",
        alt=f"Area of demand up to {max(load.demand):.3g} requests per second under steps of capacity, {len(part.plan.changes)} changes of size.",
        draw=partial(draw_load, load=load),
        width=600,
        height=270,
    )


def _timeline(run: ServingPart) -> list[Drawing]:
    series, turns = run.series, [change.at_s for change in run.changes]
    x = [(i + 0.5) * series.bin_s for i in range(len(series.waiting))]
    drawings = []
    for caption, unit, lines in (
        ("Requests running and waiting", "", {"running": series.running, "waiting": series.waiting}),
        ("Output tokens per second", "", {"output tokens/s": series.output_tokens_per_s}),
        ("Key-value cache in use", "%", {"cache": series.cache}),
    ):
        curves = Curves(
            x=coarse(x), y=[coarse(values) for values in lines.values()], names=list(lines), xlabel="seconds", unit=unit, marks=turns,
        )  # fmt: skip
        top = {name: max(values, default=0.0) for name, values in lines.items()}
        peak = ", ".join(f"{name} up to {percent(value) if unit == '%' else f'{value:,.4g}'}" for name, value in top.items())
        drawings.append(
            Drawing(caption=caption, alt=f"Lines over {x[-1] if x else 0:,.0f} seconds: {peak}.", draw=partial(draw_curves, curves=curves))
        )
    return drawings


def coarse(values: list[float], most: int = 240) -> list[float]:
    """At most `most` means of neighbours, so that lines stay readable."""
    step = -(-len(values) // most) or 1
    return [sum(part) / len(part) for i in range(0, len(values), step) for part in [values[i : i + step]]]


def _use(summary: ServedPart) -> list[tuple[str, str]]:
    known = [
        ("throughput", None if summary.output_tokens_per_s is None else f"{quantity(summary.output_tokens_per_s)} output tokens/s"),
        ("devices busy", None if summary.utilisation is None else percent(summary.utilisation)),
        ("device-hours", None if summary.device_hours is None else f"{summary.device_hours:,.4g}"),
        ("sent back for lack of cache", f"{summary.sent_back:,}" if summary.sent_back else None),
    ]
    return [(name, value) for name, value in known if value]
