"""Section: predictions against executions on real hardware."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from moesim.report.blocks import Block, Cell, Drawing, Facts, Gallery, Group, Points, Section, Table, cells, change, column
from moesim.report.measured_parts import Case, Errors, Ranking, Validation
from moesim.report.plots import Dots, cloud, draw_cloud, draw_dots
from moesim.report.schema import Document
from moesim.report.text import named, percent, quantity, sentence


def validation(document: Document) -> Section | None:
    """Scatter of predicted against measured, errors of each model, ranking of plans, checks, and what was only modelled."""
    part = document.validation
    if part is None:
        return None
    blocks: list[Block] = [Facts(pairs=_facts(part)), Gallery(drawings=[_scatter(part), *_times(part.ranking)]), _errors(part), _by_plan(part.cases)]
    for caption, first, groups in (("Errors by layer", "layer", part.by_layer), ("Errors by batch", "tokens", part.by_batch)):
        if len(groups) > 1:
            blocks.append(_error_table(caption, first, [Group(rows=_unmarked(groups))]))
    if part.ranking:
        blocks.append(_ranking(part.ranking, part.ranking_tokens_only))
    if len(part.rankings) > 1:
        blocks.append(_rankings(part.rankings))
    if any(case.gather_s is not None for case in part.cases):
        blocks.append(_shares(part))
    if part.executions:
        blocks.append(_executions(part))
    if part.checks:
        blocks.append(_checks(part))
    blocks.append(Points(heading="Measured", lines=[_measured(part)]))
    blocks.append(Points(heading="Only modelled, not measured", lines=part.modelled or ["not stated"]))
    remarks = [*part.notes, *(note for each in part.executions for note in each.notes)]
    if remarks:
        blocks.append(Points(heading="Remarks on the measurement", lines=remarks))
    return Section(key="validation", title="Prediction against measurement", lead=worst_case(part.cases), blocks=blocks)


def together(documents: Sequence[Document]) -> Section | None:
    """Validations of several documents side by side; None with fewer than two."""
    parts = [(document.title or "", document.validation) for document in documents if document.validation]
    if len(parts) < 2:
        return None
    columns = [column([getattr(part.summary, name) for _, part in parts], percent) for name in ("median_ape", "p90_ape")]
    rows = []
    for (title, part), *errors in zip(parts, *columns, strict=True):
        ranked = [one for one in part.rankings or ([part.ranking] if part.ranking else []) if one.spearman is not None and _told_apart(one)]
        regrets = [one.top1_regret for one in ranked if one.top1_regret is not None]
        spearman = f"{np.mean([one.spearman for one in ranked]):.2f}" if ranked else "-"
        texts = (f"{part.summary.n:,}", percent(part.summary.bias, signed=True), spearman, percent(max(regrets)) if regrets else "-")
        rows.append([Cell(text=title or part.where), Cell(text=part.where), *errors, *(Cell(text=text) for text in texts)])
    table = Table(
        caption="Measurements side by side",
        columns=["measurement", "hardware", "median error", "90th percentile", "cases", "bias", "Spearman", "worst regret"],
        align="llrrrrrr",
        groups=[Group(rows=rows)],
        note="Spearman: mean over the batches whose plans differ by more than twice the noise; regret: of choosing the plan predicted fastest.",
    )
    return Section(key="together", title="Measurements side by side", blocks=[table])


def _told_apart(ranking: Ranking) -> bool:
    return ranking.spread is None or ranking.noise_floor is None or ranking.spread > 2 * ranking.noise_floor


def worst_case(cases: Sequence[Case]) -> str:
    """The case with the largest relative error, in words."""
    case = max(cases, key=lambda c: abs(change(c.predicted_s, c.measured_s)))
    error = percent(change(case.predicted_s, case.measured_s), signed=True)
    batch = f"batch of {case.batch:,}, " if case.batch else ""
    return (
        f"Worst of {len(cases):,} cases: {case.plan}, {batch}layer {case.layer}, rank {case.rank}, {case.tokens:,.0f} tokens: "
        f"predicted {quantity(case.predicted_s, 's')}, measured {quantity(case.measured_s, 's')} ({error})."
    )


def errors_by_plan(cases: Sequence[Case]) -> dict[str, Errors]:
    """Errors of each plan's cases, in the order of first appearance."""
    by_plan: dict[str, list[float]] = {}
    for case in cases:
        by_plan.setdefault(case.plan, []).append(change(case.predicted_s, case.measured_s))
    return {
        plan: Errors(
            n=len(errors),
            median_ape=float(np.median(np.abs(errors))),
            p90_ape=float(np.quantile(np.abs(errors), 0.9)),
            mape=float(np.mean(np.abs(errors))),
            bias=float(np.mean(errors)),
            p99_ape=float(np.quantile(np.abs(errors), 0.99)),
        )
        for plan, errors in by_plan.items()
    }


def _facts(part: Validation) -> list[tuple[str, str]]:
    return [
        ("device", part.where),
        ("backend", part.backend),
        *((name, str(value)) for name in ("dtype", "timing", "repeats", "date") if (value := getattr(part, name)) is not None),
        *(named(name, value) for name, value in part.hardware.items()),
    ]


def _scatter(part: Validation) -> Drawing:
    data = cloud([(c.plan, c.predicted_s, c.measured_s) for c in part.cases])
    legend_rows = (len(data.points) + 1) // 2
    return Drawing(
        caption="Expert computation, predicted over measured. Line: equal; band: 10\N{NO-BREAK SPACE}% around it",
        alt=f"Scatter of {len(part.cases):,} cases of {len(data.points)} plans on logarithmic axes; median error {percent(part.summary.median_ape)}.",
        draw=partial(draw_cloud, cloud=data),
        width=420,
        height=360 + 17 * legend_rows,
    )


def _times(ranking: Ranking | None) -> list[Drawing]:
    if ranking is None:
        return []
    plans = sorted(ranking.plans, key=lambda plan: plan.measured_s)
    seconds = [[plan.predicted_s for plan in plans], [plan.measured_s for plan in plans]]
    data = Dots(plans=[p.name for p in plans], parts=["predicted", "measured"], hollow=[True, False], values=seconds, unit="s")
    return [
        Drawing(
            caption="Time of each plan, fastest measured first",
            alt=f"Dot plot of predicted and measured time of {', '.join(data.plans)}; the figures are in the ranking table.",
            draw=partial(draw_dots, dots=data),
            width=420,
            height=104 + 27 * len(plans),
        )
    ]


def _error_rows(errors_of: dict[str, Errors]) -> list[list[Cell]]:
    errors = list(errors_of.values())
    columns = [column([getattr(e, field) for e in errors], percent) for field in ("median_ape", "p90_ape", "mape")]
    columns.insert(2, [Cell(text="-" if e.p99_ape is None else percent(e.p99_ape)) for e in errors])
    biases = column([abs(e.bias) for e in errors], percent)
    signed = [Cell(text=percent(e.bias, signed=True), best=cell.best) for e, cell in zip(errors, biases, strict=True)]
    return [[Cell(text=name), Cell(text=f"{e.n:,}"), *rest] for (name, e), *rest in zip(errors_of.items(), *columns, signed, strict=True)]


def _errors(part: Validation) -> Table:
    groups = [Group(title="validation cases", rows=_error_rows(part.models or {"moesim": part.summary}))]
    if part.layer_summary:
        goal = ", ".join(f"{name.split('_')[0]} {percent(value)}" for name, value in part.target.items())
        title = "slowest rank of each layer" + (f" (target: {goal})" if goal else "")
        groups.append(Group(title=title, rows=_error_rows({"moesim": part.layer_summary})))
    if part.calibration:
        on = f", {part.calibration.measured_on}" if part.calibration.measured_on else ""
        groups.append(Group(title=f"calibration cases (what the kernel was fitted on{on})", rows=_error_rows({"kernel fit": part.calibration})))
    return _error_table("Errors of predicted time", "model", groups)


def _by_plan(cases: Sequence[Case]) -> Table:
    return _error_table("Errors by plan", "plan", [Group(rows=_unmarked(errors_by_plan(cases)))])


def _unmarked(errors_of: dict[str, Errors]) -> list[list[Cell]]:
    return [[Cell(text=cell.text) for cell in row] for row in _error_rows(errors_of)]


def _error_table(caption: str, first: str, groups: Sequence[Group]) -> Table:
    return Table(
        caption=caption,
        columns=[first, "cases", "median error", "90th percentile", "99th percentile", "mean error", "bias"],
        align="lrrrrrr",
        groups=groups,
        note="error = |predicted / measured − 1|; bias keeps the sign: above zero, predictions are too long.",
    )


def _ranking(ranking: Ranking, naive: Ranking | None) -> Table:
    plans = sorted(ranking.plans, key=lambda plan: plan.measured_s)
    order = sorted(range(len(plans)), key=lambda i: plans[i].predicted_s)
    places = {i: place + 1 for place, i in enumerate(order)}
    measured = column([p.measured_s for p in plans], lambda s: quantity(s, "s"))
    predicted = column([p.predicted_s for p in plans], lambda s: quantity(s, "s"))
    errors = [percent(change(p.predicted_s, p.measured_s), signed=True) for p in plans]
    rows = [[Cell(text=p.name), measured[i], predicted[i], *cells(errors[i], i + 1, places[i])] for i, p in enumerate(plans)]
    known = [
        ("Spearman", None if ranking.spearman is None else f"{ranking.spearman:.2f}"),
        ("Kendall", None if ranking.kendall is None else f"{ranking.kendall:.2f}"),
        ("top-1 regret", None if ranking.top1_regret is None else percent(ranking.top1_regret)),
        ("spread of the plans", None if ranking.spread is None else percent(ranking.spread)),
        ("noise floor", None if ranking.noise_floor is None else percent(ranking.noise_floor)),
    ]
    if naive and naive.spearman is not None:
        known.append(("Spearman by token counts alone", f"{naive.spearman:.2f}"))
    note = "; ".join(f"{name} {value}" for name, value in known if value is not None)
    return Table(
        caption="Ranking of plans, fastest measured first",
        columns=["plan", "measured", "predicted", "error", "measured place", "predicted place"],
        align="lrrrrr",
        groups=[Group(rows=rows)],
        note=" ".join(sentence(text) for text in (note, ranking.verdict) if text),
    )


def _rankings(rankings: Sequence[Ranking]) -> Table:
    rows = []
    for one in rankings:
        numbers = ["-" if value is None else f"{value:.2f}" for value in (one.spearman, one.kendall)]
        shares = ["-" if value is None else percent(value) for value in (one.top1_regret, one.spread, one.noise_floor)]
        rows.append(cells("-" if one.batch is None else f"{one.batch:,}", *numbers, *shares, "" if _told_apart(one) else "within the noise"))
    columns = ["tokens", "Spearman", "Kendall", "top-1 regret", "spread of the plans", "noise floor", ""]
    return Table(caption="Ranking of plans by batch", columns=columns, align="rrrrrrl", groups=[Group(rows=rows)])


def _shares(part: Validation) -> Table:
    """What was measured and what was modelled of the largest batch, in columns of their own."""
    last = part.cases[-1].batch
    network = next((each.network_s for each in part.batches if each.batch == last), {})
    slowest: dict[str, dict[int, list[float]]] = {}
    for case in part.cases:
        if case.batch == last:
            layer = slowest.setdefault(case.plan, {}).setdefault(case.layer, [0.0, 0.0, 0.0])
            layer[:] = map(max, layer, (case.measured_s, case.gather_s or 0.0, case.combine_s or 0.0))
    rows = []
    for plan, layers in slowest.items():
        modelled = network.get(plan)
        seconds = [quantity(sum(layer[i] for layer in layers.values()), "s") for i in range(3)]
        rows.append(cells(plan, *seconds, "-" if modelled is None else quantity(sum(modelled), "s")))
    return Table(
        caption="Measured here and modelled elsewhere" + (f", batch of {last:,}" if last else ""),
        columns=["plan", "experts, measured", "local gather, measured", "local combine, measured", "exchanges, modelled"],
        align="lrrrr",
        groups=[Group(rows=rows)],
        note="slowest rank of each layer, summed over layers; no bytes left the device, so the last column is no measurement.",
    )


def _executions(part: Validation) -> Table:
    rows = []
    for each in part.executions:
        seconds = ["-" if value is None else quantity(value, "s") for value in (each.measured_s, each.predicted_s)]
        rows.append(cells(each.kind, each.name, each.detail, *seconds))
    return Table(
        caption="Plans carried out", columns=["what", "plan", "found", "measured", "predicted"], align="lllrr", groups=[Group(rows=rows)],
        note="cache: stall in all; migration: copies in all; processes: computation of the slowest rank.",
    )  # fmt: skip


def _checks(part: Validation) -> Table:
    rows = [cells("✓\N{NO-BREAK SPACE}holds" if check.ok else "✗\N{NO-BREAK SPACE}FAILED", check.name, check.detail) for check in part.checks]
    return Table(caption="Checks", columns=["", "check", "detail"], align="lll", groups=[Group(rows=rows)])


def _measured(part: Validation) -> str:
    plans, layers, ranks = ({getattr(c, field) for c in part.cases} for field in ("plan", "layer", "rank"))
    noise = [c.cv for c in part.cases if c.cv is not None]
    repeats = f"; repeats vary by {percent(float(np.median(noise)))} (median coefficient of variation)" if noise else ""
    counts = f"{len(part.cases):,} cases of {len(plans)} plans, {len(layers)} layers and {len(ranks)} ranks"
    order = f" {sentence(part.per_rank.verdict)}" if part.per_rank else ""
    return f"{counts}, executed on {part.where} with {part.backend}{repeats}.{order}"
