"""Drawing functions for several lines: data and an Axes in, the Axes out. See plots.py for colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesim.report.plots import CYCLE, FAINT, LINE, MARKERS, human_axis, label, log_ticks, opened
from moesim.units import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """y[c][i] of curve c at x[i]; None where a curve has no value. `limit` is a line not to be crossed;
    `marks` are x where something happened."""

    x: Sequence[float]
    y: Sequence[Sequence[float | None]]
    names: Sequence[str]
    xlabel: str
    unit: str = ""
    log_x: bool = False
    limit: float | None = None
    marks: Sequence[float] = ()


def draw_curves(ax: Axes, *, curves: Curves) -> Axes:
    """One line per name, marks where there are few points; the y axis begins at zero."""
    few = len(curves.x) <= 40
    for index, (name, values) in enumerate(zip(curves.names, curves.y, strict=True)):
        known = [(x, y) for x, y in zip(curves.x, values, strict=True) if y is not None]
        if known:
            style: dict[str, Any] = {"color": CYCLE[index % len(CYCLE)], "linewidth": 1.6, "markersize": 4.5}
            ax.plot(*zip(*known, strict=True), marker=MARKERS[index % len(MARKERS)] if few else "", label=label(name, 40), **style)
    for mark in curves.marks:
        ax.axvline(mark, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
    if curves.limit is not None:
        ax.axhline(curves.limit, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    if curves.log_x:
        ax.set_xscale("log")
        ticks = sorted(curves.x) if len(curves.x) <= 8 else log_ticks(min(curves.x), max(curves.x))
        ax.set_xticks(ticks, [f"{tick:g}" if tick < 1e5 else human(tick) for tick in ticks])
        ax.minorticks_off()
    ax.set_ylim(bottom=0)
    human_axis(ax.yaxis, curves.unit)
    ax.set_xlabel(curves.xlabel)
    ax.grid(axis="y", color=LINE, linewidth=0.6)
    if len(curves.names) > 1:
        ax.figure.legend(
            loc="outside upper left", ncols=1 if max(map(len, curves.names)) > 18 else 2, handlelength=1.6, borderpad=0, columnspacing=1.2
        )
    return opened(ax)


def spans(values: Sequence[float]) -> bool:
    """Whether positive values are better read on a logarithmic axis: they spread over more than a factor of four."""
    return min(values) > 0 and math.log2(max(values) / min(values)) > 2
