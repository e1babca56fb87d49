"""Answers of capacity and scaling documents: what to buy, place and scale, why, and how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.report.blocks import Tile, change
from moesim.report.parts import BillPart, CapacityPart, CasePart, ScalingPart, ServingPart, SweepPart
from moesim.report.schema import Comparison, Document
from moesim.report.sections.capacity import Offering, broken_by, headroom, offering
from moesim.report.sections.comparison import BASELINE, strongest
from moesim.report.sections.provenance import notes
from moesim.report.sections.sweep import shown, words
from moesim.report.text import percent, quantity

STATIC, HINDSIGHT = "static-minimum", "optimal"


def buy(
    document: Document, capacity: CapacityPart, sweep: SweepPart, sentences: list[str], tiles: list[Tile], cautions: list[str], *, backed: bool
) -> None:
    """The deployment to buy, why not a cheaper one, where experts go, how much more traffic it takes; `backed` by measurements on the page."""
    offers = offering(capacity, sweep)
    best = offers.chosen
    if best is None:
        nearest = offers.cases[0]
        sentences.append(f"None of {len(offers.cases)} deployments keeps the objective, {capacity.slo}.")
        sentences.append(
            f"The nearest is {name_of(sweep, nearest)}: {_kept(nearest)} of requests keep it. Give more devices, or an easier objective."
        )
        tiles.append(Tile(label="best deployment keeps it for", value=_kept(nearest), detail=f"{percent(capacity.share)} must", tone="bad"))
    else:
        kept = sum(map(offers.keeps, offers.cases))
        cheapest = f"the cheapest of {kept} that keep the objective" if kept > 1 else "the only one that keeps the objective"
        sentences.append(f"Buy {name_of(sweep, best)} ({_price(offers, best)}): {cheapest}, for {_kept(best)} of requests.")
        sentences += _rivals(sweep, offers, best)
        sentences.append(_placing(capacity, sweep, best, document.comparison))
        if document.scaling is None and capacity.unscaled:
            sentences.append(f"No scaling was planned: {capacity.unscaled.rstrip('.')}.")
        most, broken = headroom(capacity, sweep, offers)
        if most is not None:
            until = f" and misses it at ×\N{NO-BREAK SPACE}{broken:g}" if broken is not None else ", the most that was tried"
            sentences.append(f"It keeps the objective up to ×\N{NO-BREAK SPACE}{most:g} of this traffic{until}.")
            tiles.append(Tile(label="traffic it keeps up with", value=f"× {most:g}", detail=f"missed at × {broken:g}" if broken else "the most tried",
                              tone="bad" if most <= 1 and broken else "good"))  # fmt: skip
        if others := broken_by(capacity, sweep, offers):
            cautions.append(f"It misses the objective under: {', '.join(others)}.")
        price = _price(offers, best).removesuffix(" an hour")
        tiles[:0] = [
            Tile(label="price for an hour" if capacity.priced else "devices", value=price, detail=name_of(sweep, best)),
            Tile(label="keep the objective", value=_kept(best), detail=f"{percent(capacity.share)} must", tone="good"),
            *_latency(best),
        ]  # fmt: skip
    cautions += _confidence(document, backed=backed)


def name_of(sweep: SweepPart, case: CasePart) -> str:
    """A deployment in words: `2 × h100x8, tp2`."""
    values = {**sweep.common, **case.values}
    replicas = values.get("replicas", 1)
    parts = [f"{replicas} × {shown(values['cluster'])}" if "cluster" in values else words(sweep.choices, case.values)]
    parts += [str(values[name]) for name in ("layout", "solver") if values.get(name) and name in sweep.choices]
    parts += [
        f"{name.replace('_', ' ')} {shown(case.values[name])}" for name in sweep.choices if name not in ("cluster", "replicas", "layout", "solver")
    ]
    return ", ".join(parts)


def scale(scaling: ScalingPart, sentences: list[str], tiles: list[Tile], cautions: list[str]) -> None:
    """How the size follows the demand, what that saves, and what breaks it."""
    bought = bool(tiles)
    name = str(scaling.plan.made_from.get("solver", scaling.plan.name))
    bill, static = scaling.solvers.get(name), scaling.solvers.get(STATIC)
    sizes = sorted({interval.devices for interval in scaling.timeline})
    how = f"Scale between {sizes[0]} and {sizes[-1]} devices" if len(sizes) > 1 else f"Stay at {sizes[0]} devices"
    if scaling.instances > 1:
        how += f" in each of {scaling.instances} instances"
    if bill:
        saves = _saving(bill, static) if static and static is not bill else ""
        each = " each" if scaling.instances > 1 else ""
        sentences.append(f"{how}: {_money(scaling, bill)}{each} for {quantity(len(scaling.timeline) * scaling.plan.interval_s, 's')}{saves}.")
        tone = "good" if static and bill.total < static.total else "plain"
        detail = f"{_money(scaling, static)} at one size" if static else ""
        tiles.append(Tile(label="scaling costs" if bought else "the plan costs", value=_money(scaling, bill), detail=detail, tone=tone))
    known = {policy: found for policy, found in scaling.solvers.items() if policy not in (HINDSIGHT, STATIC)}
    if name == HINDSIGHT and known:
        policy, found = min(known.items(), key=lambda item: item[1].total)
        cautions.append(
            f"The scaling plan knows all arrivals beforehand. A policy that knows only the past, {policy}, costs {_money(scaling, found)}."
        )
    if scaling.outlooks:
        plan, *others = scaling.outlooks
        kept = percent(plan.served.attainment)
        if bought:
            sentences.append(f"Served as it scales, {kept} of requests keep the objective.")
        else:
            tiles.append(Tile(label="keep the objective", value=kept, detail="the plan, served", tone="good" if plan.served.meets_slo else "bad"))
        broken = [f"{outlook.case} ({percent(outlook.served.attainment)})" for outlook in others if not outlook.served.meets_slo]
        if broken:
            cautions.append(f"The objective is missed when: {'; '.join(broken)}.")


def served(runs: list[ServingPart], sentences: list[str], tiles: list[Tile]) -> None:
    """One run, or several."""
    for run in runs:
        summary = run.summary
        sentences.append(f"{summary.name}: {percent(summary.attainment)} of {summary.requests:,} requests keep the objective.")
    if len(runs) == 1:
        tone = "good" if runs[0].summary.meets_slo else "bad"
        tiles.append(Tile(label="keep the objective", value=percent(runs[0].summary.attainment), tone=tone))


def _latency(best: CasePart) -> list[Tile]:
    first, after = (best.figures.get(name) for name in ("ttft_p99", "tpot_p99"))
    detail = f"then {quantity(after, 's')} a token" if after is not None else ""
    return [] if first is None else [Tile(label="first token, P99", value=quantity(first, "s"), detail=detail)]


def _rivals(sweep: SweepPart, offers: Offering, best: CasePart) -> list[str]:
    """Why not the next cheaper, and what the next dearer would cost."""
    cheaper = [case for case in offers.cases if not offers.keeps(case) and offers.paid(case) < offers.paid(best)]
    dearer = [case for case in offers.cases if offers.keeps(case) and case is not best]
    said = []
    if cheaper:
        near = max(cheaper, key=lambda case: case.figures.get("attainment") or 0.0)
        said.append(f"{name_of(sweep, near)} is cheaper ({_price(offers, near)}), but only {_kept(near)} of requests keep the objective there.")
    if dearer:
        following = min(dearer, key=offers.paid)
        more = change(offers.paid(following), offers.paid(best))
        said.append(f"The next that keeps it, {name_of(sweep, following)}, costs {_price(offers, following)} ({percent(more, signed=True)}).")
    return said


def elsewhere(capacity: CapacityPart, evidence: Sequence[Document]) -> list[str]:
    """A caution where measurements are known to come from other devices than the recommended ones."""
    measured = {part.hardware.get("gpu") or part.hardware.get("cpu") or part.device: part.where for e in evidence if (part := e.validation)}
    others = [where for name, where in measured.items() if not any(known.split("-")[0] in str(name).lower().split() for known in capacity.devices)]
    return [f"Measured on {', '.join(others)}, not on the recommended {', '.join(capacity.devices)}."] if others and capacity.devices else []


def _placing(capacity: CapacityPart, sweep: SweepPart, best: CasePart, comparison: Comparison | None) -> str:
    values = {**sweep.common, **best.values}
    how = (
        f"by {values['solver']}"
        if values.get("solver")
        else f"as {shown(values['plan'])} says"
        if values.get("plan")
        else "in the order of their ids"
    )
    more = f", with {values['extra_slots']} more slots for copies of hot ones" if values.get("extra_slots") else ""
    return f"Place experts {how}{more}{_gains(capacity.placed_by, comparison, known=not values.get('plan'))}."


def _gains(name: str | None, comparison: Comparison | None, *, known: bool) -> str:
    """What a way of placing gains over the others on held-out tokens; `known` that it has not seen them (a given plan may have)."""
    plans = {plan.name: plan.layer_time_s for plan in strongest(comparison).plans} if comparison else {}
    if name is None or name not in plans:
        return ""
    said = [
        f"{percent(abs(gain))} {'less' if gain <= 0 else 'more'} than {'in order' if other == BASELINE else f'by {other}'}"
        for other, layer_s in plans.items()
        if other != name and (gain := change(plans[name], layer_s)) == gain
    ]
    tokens = "tokens it has not seen" if known else "one half of the trace"
    return f": an MoE layer takes {quantity(plans[name], 's')} on {tokens}{', ' + ' and '.join(said) if said else ''}"


def _confidence(document: Document, *, backed: bool) -> list[str]:
    remarks, unverified = notes(document)
    rough = sum("not calibrated" in note for note in remarks)
    said = []
    if rough or unverified:
        parts = [f"{rough} parts of the model are not calibrated" if rough else "", f"{len(unverified)} inputs are unverified" if unverified else ""]
        said.append(f"{' and '.join(filter(None, parts))}; see Provenance.")
    if document.validation is None and not backed:
        said.append("No measurement backs this page: every figure is predicted, and nothing in it was measured on the hardware it names.")
    return said


def _kept(case: CasePart) -> str:
    return percent(case.figures.get("attainment") or 0.0)


def _price(offers: Offering, case: CasePart) -> str:
    paid = offers.paid(case)
    return f"${paid:,.2f} an hour" if offers.by == "price_per_hour" else f"{paid:,.0f} devices"


def _money(scaling: ScalingPart, bill: BillPart | None) -> str:
    if bill is None:
        return "–"
    return f"${bill.total:,.2f}" if scaling.currency == "$" else f"{bill.total:,.4g} {scaling.currency}"


def _saving(bill: BillPart, static: BillPart) -> str:
    gain = change(bill.total, static.total)
    return f", {percent(abs(gain))} {'less' if gain <= 0 else 'more'} than one size throughout"
