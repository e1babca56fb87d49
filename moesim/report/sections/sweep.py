"""Section: the cases of a sweep, those under equal conditions against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from moesim.report.blocks import Block, Cell, Drawing, Facts, Gallery, Group, Points, Section, Table, column
from moesim.report.curves import Curves, draw_curves, spans
from moesim.report.parts import CasePart, FigurePart, SweepPart
from moesim.report.plots import Dots, draw_dots
from moesim.report.schema import Document
from moesim.report.text import named, percent, plain, quantity

MOST_ROWS = 240  # of the table
MOST_LINES, MOST_DOTS = 7, 16  # of one drawing: more cannot be told apart
DRAWN = 3  # figures with drawings of their own


def sweep(document: Document) -> Section | None:
    """Curves over what varies by number, dots over what varies by name, the table of cases, and what failed."""
    part = document.sweep
    if part is None:
        return None
    blocks: list[Block] = []
    if part.common:
        blocks.append(Facts(pairs=[named(name, value) for name, value in part.common.items()]))
    if drawings := _drawings(part):
        blocks.append(Gallery(drawings=drawings))
    if done(part):
        blocks.append(_table(part))
    for status, heading in (("infeasible", "Impossible"), ("failed", "Failed")):
        why = Counter(case.error or "not said" for case in part.cases if case.status == status)
        if why:
            lines = [f"{error} ({count:,} {'case' if count == 1 else 'cases'})" for error, count in why.most_common()]
            blocks.append(Points(heading=f"{heading}: {why.total():,} of {len(part.cases):,} cases", lines=lines))
    return Section(key="sweep", title="Cases compared", lead=_lead(part), blocks=blocks)


def done(part: SweepPart) -> list[CasePart]:
    """Cases that have the first figure."""
    return [case for case in part.cases if case.status == "ok" and case.figures.get(part.figures[0].name) is not None]


def conditions(part: SweepPart) -> list[str]:
    """Axes that are not decided on."""
    return [name for name in part.axes if name not in part.choices]


def words(names: Sequence[str], values: Mapping[str, Any], *, bare: bool = False) -> str:
    """Values of some axes in one line; `bare` without the axes' names."""
    return ", ".join(shown(values[name]) if bare else f"{name.replace('_', ' ')} {shown(values[name])}" for name in names if values[name] is not None)


def shown(value: Any) -> str:
    """A value as a reader wants it: of a path only the last part."""
    return PurePath(value).name if isinstance(value, str) and "/" in value else plain(value)


def groups(part: SweepPart) -> dict[str, list[CasePart]]:
    """Cases that have figures under each set of conditions, best first."""
    found: dict[str, list[CasePart]] = {}
    for case in done(part):
        found.setdefault(words(conditions(part), case.values), []).append(case)
    figure = part.figures[0]
    return {name: sorted(cases, key=lambda case: rank(case, figure)) for name, cases in found.items()}


def rank(case: CasePart, figure: FigurePart) -> float:
    """Sort key: the figure, negative where more is better; cases without it last."""
    value = case.figures.get(figure.name)
    return float("inf") if value is None else value if figure.less else -value


def value_text(figure: FigurePart, value: float | None) -> str:
    """A figure as text, with its unit."""
    if value is not None and figure.unit in ("%", "$"):
        return percent(value) if figure.unit == "%" else f"${value:,.2f}"
    return "–" if value is None else quantity(value, figure.unit) if figure.unit or abs(value) >= 1e4 else f"{value:.4g}"


def _lead(part: SweepPart) -> str:
    values = {name: len({plain(case.values[name]) for case in part.cases}) for name in part.axes}
    varied = ", ".join(f"{count} × {name.replace('_', ' ')}" for name, count in values.items())
    what = f"{part.says[:1].upper()}{part.says[1:]}. " if part.says else ""
    return f"{what}{len(part.cases):,} cases" + (f": {varied}." if varied else ".")


def _table(part: SweepPart) -> Table:
    shown_groups, left = [], MOST_ROWS
    for name, cases in groups(part).items():
        rows = [[Cell(text=words(part.choices, case.values, bare=True) or name or "the case")] for case in cases]
        for figure in part.figures:
            signed = [rank(case, figure) for case in cases]
            texts = {value: value_text(figure, case.figures.get(figure.name)) for value, case in zip(signed, cases, strict=True)}
            for row, cell in zip(rows, column(signed, lambda value, texts=texts: texts[value]), strict=True):  # type: ignore[misc]
                row.append(cell)
        if left > 0:
            shown_groups.append(Group(title=name if part.choices else "", rows=rows[:left]))
        left -= len(rows)
    return Table(
        caption="Cases, best first",
        columns=[", ".join(name.replace("_", " ") for name in part.choices) or "case", *(figure.label for figure in part.figures)],
        align="l" + "r" * len(part.figures),
        groups=shown_groups,
        note=f"{-left:,} more cases are in results.csv." if left < 0 else "",
    )


def _drawings(part: SweepPart) -> list[Drawing]:
    cases = done(part)
    numeric = [name for name in part.axes if all(isinstance(case.values[name], (int, float)) for case in cases)]
    numeric = [name for name in numeric if len({case.values[name] for case in cases}) > 2]
    if numeric:
        axis = max(numeric, key=lambda name: len({case.values[name] for case in cases}))
        return [drawing for figure in part.figures[:DRAWN] if (drawing := _curves(part, cases, axis, figure))]
    return [drawing for figure in part.figures[:DRAWN] if (drawing := _dots(part, figure))]


def _curves(part: SweepPart, cases: Sequence[CasePart], axis: str, figure: FigurePart) -> Drawing | None:
    others = [name for name in part.axes if name != axis]
    lines: dict[str, dict[float, float | None]] = {}
    for case in cases:
        lines.setdefault(words(others, case.values, bare=True), {})[float(str(case.values[axis]))] = case.figures.get(figure.name)
    if len(lines) > MOST_LINES or not lines:
        return None
    x = sorted({point for line in lines.values() for point in line})
    data = Curves(
        x=x,
        y=[[line.get(point) for point in x] for line in lines.values()],
        names=list(lines),
        xlabel=axis.replace("_", " "),
        unit=figure.unit,
        log_x=spans(x),
    )
    alt = (
        f"Lines of {figure.label} over {data.xlabel} from {x[0]:g} to {x[-1]:g}, of {', '.join(lines) or 'one choice'}; the figures are in the table."
    )
    return Drawing(caption=f"{figure.label} over {data.xlabel}", alt=alt, draw=partial(draw_curves, curves=data), height=250 + 9 * len(lines))


def _dots(part: SweepPart, figure: FigurePart) -> Drawing | None:
    by_condition = groups(part)
    names = list(dict.fromkeys(words(part.choices, case.values, bare=True) for cases in by_condition.values() for case in cases))
    if not 1 < len(names) <= MOST_DOTS or len(by_condition) > MOST_LINES:
        return None
    found = [{words(part.choices, case.values, bare=True): case.figures.get(figure.name) for case in cases} for cases in by_condition.values()]
    seen = [name for name in names if any(values.get(name) is not None for values in found)]
    if not seen:
        return None
    parts = [name or figure.label for name in by_condition]
    data = Dots(
        plans=seen, parts=parts, hollow=[False] * len(parts), values=[[values.get(name) for name in seen] for values in found], unit=figure.unit
    )
    alt = f"Dot plot of {figure.label} of {', '.join(seen)}; the figures are in the table."
    return Drawing(caption=figure.label, alt=alt, draw=partial(draw_dots, dots=data), height=70 + 17 * len(parts) + 27 * len(seen))
