"""Sections: which deployment to buy, what if, and what the model does not cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from moesim.report.blocks import Block, Cell, Drawing, Gallery, Group, Points, Section, Table, cells
from moesim.report.curves import Curves, draw_curves, spans
from moesim.report.offers import Offers, draw_offers
from moesim.report.parts import CapacityPart, CasePart, FigurePart, SweepPart
from moesim.report.schema import Document
from moesim.report.sections.sweep import conditions, done, shown, value_text, words
from moesim.report.text import quantity

MOST_CURVES = 6
UNCOVERED = (
    "Networks beyond ports, rails and one spine: packet loss, routing, other tenants.",
    "Failures that were not asked for; start-up, updates and the people who run it.",
    "Requests that depend on each other: sessions, shared prefixes, speculative decoding, schedulers other than the one simulated.",
    "Prices are those given; power, cooling, floor space and software are not in them.",
    "Traffic other than the arrivals given: the sensitivity shows how far they may change.",
)


@dataclass(frozen=True, kw_only=True)
class Offering:
    """Deployments under conditions as they are: those that keep the SLO first, cheapest first; `chosen` is the first of them."""

    cases: tuple[CasePart, ...]
    chosen: CasePart | None
    share: float
    by: str  # the figure that is paid: price_per_hour, else devices

    def keeps(self, case: CasePart) -> bool:
        """Whether enough requests keep the objectives."""
        return (case.figures.get("attainment") or 0.0) >= self.share

    def paid(self, case: CasePart) -> float:
        """Price for an hour, or devices."""
        return case.figures.get(self.by) or 0.0


def offering(capacity: CapacityPart, sweep: SweepPart) -> Offering:
    """The deployments of a sweep under its baseline conditions."""
    by = "price_per_hour" if capacity.priced else "devices"
    there = [case for case in done(sweep) if all(case.values.get(name) == value for name, value in capacity.baseline.items())]
    chosen = next((case for case in there if case.case == capacity.chosen), None)

    def order(case: CasePart) -> tuple[bool, bool, float, float]:
        kept = case.figures.get("attainment") or 0.0
        return kept < capacity.share, case is not chosen, case.figures.get(by) or 0.0, -kept

    return Offering(cases=tuple(sorted(there, key=order)), chosen=chosen, share=capacity.share, by=by)


def capacity(document: Document) -> Section | None:
    """Price against attainment, and every deployment's figures."""
    part, sweep = document.capacity, document.sweep
    if part is None or sweep is None:
        return None
    offers = offering(part, sweep)
    rate = f"{part.requests / part.span_s:,.3g} requests/s" if part.span_s else f"{part.requests:,} requests"
    lead = (
        f"{part.requests:,} requests in {quantity(part.span_s, 's')} ({rate}), on average {part.prompt_tokens:,.0f} tokens in "
        f"and {part.output_tokens:,.0f} out. "
        f"Objective: {part.slo}. {len(offers.cases)} deployments, {sum(map(offers.keeps, offers.cases))} of them keep it."
    )
    return Section(
        key="capacity",
        title="What to buy",
        lead=lead,
        blocks=[Gallery(drawings=[_pareto(part, offers), _arrivals(part)]), _offers(sweep, offers)],
    )


def what_if(document: Document) -> Section | None:
    """How the deployments keep the objective when traffic, links or skew change."""
    part, sweep = document.capacity, document.sweep
    if part is None or sweep is None:
        return None
    offers = offering(part, sweep)
    axes = [name for name in conditions(sweep) if any(isinstance(case.values[name], (int, float)) for case in sweep.cases)]
    points = {name: _along(sweep, part, name) for name in axes}
    points = {name: found for name, found in points.items() if len({case.values[name] for case in found}) > 1}
    if not points:
        return None
    subject = offers.chosen or offers.cases[0]
    blocks: list[Block] = [Gallery(drawings=[_sensitivity(part, sweep, offers, name, found) for name, found in points.items()])]
    rows, figures = [], [f for f in sweep.figures if f.name in ("attainment", "ttft_p99", "tpot_p99", "output_tokens_per_s", "utilisation")]
    for name, found in points.items():
        for case in sorted(found, key=lambda c: _number(c.values[name])):
            if _same(case, subject, sweep.choices):
                now = case is subject
                values = [value_text(f, case.figures.get(f.name)) for f in figures]
                verdict = "as it is" if now else "✓\N{NO-BREAK SPACE}kept" if offers.keeps(case) else "✗\N{NO-BREAK SPACE}missed"
                rows.append(cells(f"{name.replace('_', ' ')} {_factor(name, case.values[name])}", verdict, *values))
    named = words(sweep.choices, subject.values) or "the deployment"
    blocks.append(
        Table(
            caption=f"{named} under other conditions",
            columns=["condition", "objective", *(figure.label for figure in figures)],
            align="ll" + "r" * len(figures),
            groups=[Group(rows=rows)],
            note="One condition at a time; the others as they are.",
        )
    )
    return Section(key="what-if", title="What if", lead="Each condition is changed alone; the dashed line is the objective.", blocks=blocks)


def limits(document: Document) -> Section | None:
    """What a capacity answer leaves out."""
    if document.capacity is None:
        return None
    return Section(key="limits", title="What the model does not cover", blocks=[Points(heading="Not in these figures", lines=UNCOVERED)])


def headroom(part: CapacityPart, sweep: SweepPart, offers: Offering) -> tuple[float | None, float | None]:
    """The most traffic at which the chosen deployment was seen to keep the objective, and the least at which it was not."""
    if offers.chosen is None or "traffic" not in sweep.axes:
        return None, None
    same = [case for case in _along(sweep, part, "traffic") if _same(case, offers.chosen, sweep.choices)]
    kept = [_number(case.values["traffic"]) for case in same if offers.keeps(case)]
    missed = [_number(case.values["traffic"]) for case in same if not offers.keeps(case)]
    broken = min(missed, default=None)
    return max((k for k in kept if broken is None or k < broken), default=None), broken


def broken_by(part: CapacityPart, sweep: SweepPart, offers: Offering) -> list[str]:
    """Other conditions than traffic under which the chosen deployment misses the objective, in words."""
    found = []
    for name in conditions(sweep):
        if offers.chosen is None or name == "traffic" or not any(isinstance(case.values[name], (int, float)) for case in sweep.cases):
            continue
        same = [case for case in _along(sweep, part, name) if _same(case, offers.chosen, sweep.choices)]
        found += [f"{name.replace('_', ' ')} {_factor(name, case.values[name])}" for case in same if not offers.keeps(case)]
    return found


def _along(sweep: SweepPart, part: CapacityPart, axis: str) -> list[CasePart]:
    """Cases that differ from the baseline in one condition at most, and in what belongs to it: `skew_domain` to `skew`."""
    return [case for case in done(sweep) if all(case.values.get(name) == value for name, value in part.baseline.items() if not name.startswith(axis))]


def _same(case: CasePart, other: CasePart, names: Sequence[str]) -> bool:
    return all(case.values[name] == other.values[name] for name in names)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _factor(name: str, value: Any) -> str:
    return "as in the trace" if value is None else f"× {value:g}" if name in ("traffic", "bandwidth") else shown(value)


def _figure(sweep: SweepPart, name: str) -> FigurePart:
    return next((figure for figure in sweep.figures if figure.name == name), FigurePart(name=name, label=name))


def _pareto(part: CapacityPart, offers: Offering) -> Drawing:
    data = Offers(
        paid=[offers.paid(case) for case in offers.cases],
        kept=[case.figures.get("attainment") or 0.0 for case in offers.cases],
        good=[offers.keeps(case) for case in offers.cases],
        chosen=0 if offers.chosen else None,
        share=part.share,
        xlabel="price for an hour, $" if part.priced else "devices",
    )
    return Drawing(
        caption=f"{'Price' if part.priced else 'Devices'} against the share of requests that keep the objective; numbers as in the table",
        alt=f"Scatter of {len(data.paid)} deployments; {sum(data.good)} keep the objective. Numbers and figures are those of the table below.",
        draw=partial(draw_offers, offers=data),
        width=460,
        height=330,
    )


def _arrivals(part: CapacityPart) -> Drawing:
    unit, size = next((unit, size) for unit, size in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if part.span_s > 2 * size or size == 1)
    times = [(i + 0.5) * part.rate_bin_s / size for i in range(len(part.rate_per_s))]
    curves = Curves(x=times, y=[part.rate_per_s], names=["requests/s"], xlabel=unit)
    top = max(part.rate_per_s, default=0.0)
    return Drawing(
        caption="Traffic: requests per second",
        alt=f"Line of requests per second, up to {top:.3g}.",
        draw=partial(draw_curves, curves=curves),
        height=270,
    )


def _offers(sweep: SweepPart, offers: Offering) -> Table:
    figures = [figure for figure in sweep.figures if any(case.figures.get(figure.name) is not None for case in offers.cases)]
    rows: dict[bool, list[list[Cell]]] = {True: [], False: []}
    for number, case in enumerate(offers.cases, 1):
        name = words(sweep.choices, case.values, bare=True) or "the deployment"
        row = [Cell(text=f"{number}. {name}{' ←' if case is offers.chosen else ''}")]
        row += [Cell(text=value_text(figure, case.figures.get(figure.name)), best=False) for figure in figures]
        rows[offers.keeps(case)].append(row)
    groups = [Group(title=title, rows=rows[kept]) for kept, title in ((True, "keeps the objective"), (False, "misses it")) if rows[kept]]
    return Table(
        caption="Deployments, cheapest first",
        columns=[", ".join(name.replace("_", " ") for name in sweep.choices) or "deployment", *(figure.label for figure in figures)],
        align="l" + "r" * len(figures),
        groups=groups,
        note="← the recommendation. TTFT: to the first token; TPOT: per token after it; energy is an estimate from board power.",
    )


def _sensitivity(part: CapacityPart, sweep: SweepPart, offers: Offering, axis: str, found: Sequence[CasePart]) -> Drawing:
    x = sorted({_number(case.values[axis]) for case in found})
    lines: dict[str, list[float | None]] = {}
    for offer in offers.cases[:MOST_CURVES]:
        known = {_number(case.values[axis]): case.figures.get("attainment") for case in found if _same(case, offer, sweep.choices)}
        lines[words(sweep.choices, offer.values, bare=True) or "the deployment"] = [known.get(value) for value in x]
    label = {
        "traffic": "times the requests per second",
        "bandwidth": "times the bandwidth of links",
        "skew": "share of requests that become those of one domain",
    }
    curves = Curves(
        x=x, y=list(lines.values()), names=list(lines), xlabel=label.get(axis, axis.replace("_", " ")), unit="%", log_x=spans(x), limit=part.share,
    )  # fmt: skip
    return Drawing(
        caption=f"Share that keeps the objective, over {axis.replace('_', ' ')}",
        alt=f"Lines over {curves.xlabel} from {x[0]:g} to {x[-1]:g} of {', '.join(lines)}; the table has the figures of the recommendation.",
        draw=partial(draw_curves, curves=curves),
        height=270 + 12 * len(lines),
    )
