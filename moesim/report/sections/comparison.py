"""Section: plans against each other, on the tokens they learnt from and on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from moesim.report.blocks import Cell, Drawing, Gallery, Group, Section, Table, cells, change, column
from moesim.report.plots import Dots, draw_dots
from moesim.report.schema import KINDS, Comparison, Document, ScoredPart, SolutionPart, Summary
from moesim.report.text import percent, quantity

BASELINE = "linear"
FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("busiest/mean", "max_load_ratio", lambda value: f"{value:.3f}"),
    ("devices/token", "fanout_devices", lambda value: f"{value:.2f}"),
    ("nodes/token", "fanout_nodes", lambda value: f"{value:.2f}"),
    ("all-to-all/layer", "a2a_bytes", lambda value: quantity(value, "B")),
    ("dispatch", "dispatch_s", lambda value: quantity(value, "s")),
    ("compute", "compute_s", lambda value: quantity(value, "s")),
    ("combine", "combine_s", lambda value: quantity(value, "s")),
    ("layer time", "layer_time_s", lambda value: quantity(value, "s")),
)


def comparison(document: Document) -> Section | None:
    """Table of plans by part, dot plots of what matters, and what the solvers said."""
    part = document.comparison
    if part is None:
        return None
    lead = (
        f"Learnt from {part.learnt_from}; {part.tokens_per_device:,} tokens per device and step on {part.cluster_title or part.cluster}. "
        "In-sample figures flatter a plan: judge it by held-out and cross-domain tokens."
    )
    groups = [Group(title=f"{scored.label} ({scored.kind}, {scored.tokens:,} tokens)", rows=plan_rows(scored.plans)) for scored in part.scored_on]
    table = plan_table("Plans by the tokens they were scored on", groups)
    blocks: list[Table | Gallery] = [Gallery(drawings=_drawings(part)), table]
    if part.solutions:
        blocks.append(_solutions(part.solutions))
    return Section(key="comparison", title="Plans compared", lead=lead, blocks=blocks)


def plan_table(caption: str, groups: Sequence[Group]) -> Table:
    """Table of groups of `plan_rows`."""
    return Table(
        caption=caption,
        columns=["plan", *(title for title, _, _ in FIGURES), f"vs {BASELINE}"],
        align="l" + "r" * (len(FIGURES) + 1),
        groups=groups,
        note="busiest/mean: load of the busiest device over the mean device. devices/token: distinct devices a token is sent to. "
        "Less is better in every column.",
    )


def plan_rows(plans: Sequence[Summary]) -> list[list[Cell]]:
    """One row per plan with the best of each figure marked, and the layer time against the baseline."""
    columns = [column([getattr(plan, field) for plan in plans], show) for _, field, show in FIGURES]
    base = baseline(plans)
    gains = [percent(change(plan.layer_time_s, base.layer_time_s), signed=True) if base and plan is not base else "–" for plan in plans]
    return [[Cell(text=plan.name), *figures, Cell(text=gain)] for plan, *figures, gain in zip(plans, *columns, gains, strict=True)]


def baseline(plans: Sequence[Summary]) -> Summary | None:
    """The plan everything is measured against: experts in their given order."""
    return next((plan for plan in plans if plan.name == BASELINE), None)


def strongest(comparison: Comparison) -> ScoredPart:
    """The part that says most about new tokens: held-out before cross-domain before in-sample; the first of equals."""
    return min(comparison.scored_on, key=lambda part: KINDS.index(part.kind))


def dots(comparison: Comparison, field: str, unit: str) -> Dots:
    """One figure of all plans on all parts; plans ordered by layer time on the strongest part, best first."""
    order = [plan.name for plan in sorted(strongest(comparison).plans, key=lambda plan: plan.layer_time_s)]
    others = [plan.name for part in comparison.scored_on for plan in part.plans]
    names = list(dict.fromkeys([*order, *others]))
    found = [{plan.name: float(getattr(plan, field)) for plan in part.plans} for part in comparison.scored_on]
    return Dots(
        plans=names,
        parts=[part.label if part.kind in part.label else f"{part.label} ({part.kind})" for part in comparison.scored_on],
        hollow=[part.kind == "in-sample" for part in comparison.scored_on],
        values=[[values.get(name) for name in names] for values in found],
        unit=unit,
    )


def _drawings(part: Comparison) -> list[Drawing]:
    drawings = []
    for caption, field, unit in (
        ("Layer time", "layer_time_s", "s"),
        ("Load of the busiest device over the mean", "max_load_ratio", ""),
        ("Distinct devices per token", "fanout_devices", ""),
    ):
        data = dots(part, field, unit)
        drawings.append(
            Drawing(
                caption=caption,
                alt=f"Dot plot of {caption.lower()} for {', '.join(data.plans)} on {', '.join(data.parts)}; the figures are in the table below.",
                draw=partial(draw_dots, dots=data),
                height=70 + 17 * len(data.parts) + 27 * len(data.plans),
            )
        )
    return drawings


def _solutions(solutions: Sequence[SolutionPart]) -> Table:
    rows = [
        cells(
            s.name,
            s.status,
            "–" if s.seconds is None else quantity(s.seconds, "s"),
            *("–" if value is None else f"{value:.4g}" for value in (s.objective, s.bound)),
            "–" if s.gap is None else percent(s.gap),
        )
        for s in solutions
    ]
    return Table(
        caption="What the solvers said of their answers",
        columns=["solver", "status", "time", "objective", "lower bound", "gap"],
        align="llrrrr",
        groups=[Group(rows=rows)],
        note="A bound is proved or absent. The figures above come from one cost model for all, not from the solvers.",
    )
