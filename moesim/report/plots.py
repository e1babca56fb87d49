"""Drawing functions: data and an Axes in, the Axes out. Pure preparation of the data is beside each.

Colours are those of Okabe and Ito (2008), told apart by readers with any colour vision; marks and labels repeat what
colour says. matplotlib is imported where it is used, so that the sections can be built without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.units import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, LINE = "#4c5560", "#8b949e", "#c9cfd6"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d2329"
COLOURS = {INK: "muted", FAINT: "faint", LINE: "line", BLUE: "blue", VERMILLION: "vermillion", GREEN: "green", PURPLE: "purple",
           ORANGE: "orange", SKY: "sky", BLACK: "ink"}  # fmt: skip
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
LIMITS = (1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
ROUND_S = (60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 604800, 2592000)  # between ticks of long times
MANY_MARKS = 3000  # beyond, marks are drawn as one picture


def label(text: str, width: int = 22) -> str:
    """A name fit for a figure: printable, one line, at most `width` characters."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def relative(load_RC: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Each row over its mean: 1 is an even share. A row without load is even."""
    load = np.asarray(load_RC, np.float64)
    mean = load.mean(axis=1, keepdims=True)
    return np.asarray(np.divide(load, mean, out=np.ones_like(load), where=mean > 0))


def heat_limit(ratios: Sequence[NDArray[np.float64]]) -> float:
    """The narrowest scale 1/limit … limit that shows the highest ratio; 8 at most. Beyond it, colours saturate.

    Only overload sets it: one idle expert would otherwise make every hot one pale.
    """
    worst = max(float(r.max()) for r in ratios)
    return next((limit for limit in LIMITS if worst <= limit), LIMITS[-1])


def log_ticks(low: float, high: float) -> list[float]:
    """At least two round ticks inside low … high of a logarithmic axis: decades, else 1-2-5, else equal steps."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 2, 5)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 6)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= max(m for m in (1, 2, 5) if m * step <= (high - low) / 2)
    return [float(k * step) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots:
    """values[s][p] of part s and plan p; None where a part lacks the plan. `hollow` parts are drawn as outlines."""

    plans: Sequence[str]
    parts: Sequence[str]
    hollow: Sequence[bool]
    values: Sequence[Sequence[float | None]]
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cloud:
    """Predicted and measured seconds of the cases of each plan."""

    points: dict[str, tuple[list[float], list[float]]]
    low: float
    high: float


def cloud(cases: Sequence[tuple[str, float, float]]) -> Cloud:
    """Cloud of (plan, predicted, measured); limits enclose both, with a tenth of room."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for plan, predicted, measured in cases:
        xs, ys = points.setdefault(plan, ([], []))
        xs.append(measured)
        ys.append(predicted)
    seconds = [value for _, predicted, measured in cases for value in (predicted, measured)]
    return Cloud(points=points, low=min(seconds) / 1.1, high=max(seconds) * 1.1)


def draw_heat(ax: Axes, *, ratio_RC: NDArray[np.float64], rows: Sequence[int], xlabel: str, limit: float) -> Axes:
    """Ratios to the mean on a logarithmic scale: the page shows through at 1, blue is less, vermillion more."""
    top = math.log2(limit)
    image = ax.imshow(np.log2(np.clip(ratio_RC, 1 / limit, limit)), cmap=_two_sided(), vmin=-top, vmax=top, aspect="auto", interpolation="none")
    middle = (0.5, 2.0) if limit > 2 else ()
    ticks = sorted({1 / limit, *middle, 1.0, limit})
    texts = [f"{t:.3g}×" for t in ticks]
    if ratio_RC.min() < ticks[0]:
        texts[0] = f"≤ {texts[0]}"
    if ratio_RC.max() > ticks[-1]:
        texts[-1] = f"≥ {texts[-1]}"
    _scale(ax, image, [math.log2(t) for t in ticks], texts)
    _row_ticks(ax, rows)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("MoE layer")
    return _framed(ax)


def draw_matrix(ax: Axes, *, value_RC: NDArray[np.float64], names: Sequence[str], unit: str, top: float, xlabel: str = "", ylabel: str = "") -> Axes:
    """Values from 0 (the page shows through) to `top` (blue); short lists of names are written on both axes."""
    image = ax.imshow(value_RC, cmap=_one_sided(), vmin=0, vmax=top or 1, aspect="equal", interpolation="none")
    ticks = [0, (top or 1) / 2, top or 1]
    _scale(ax, image, ticks, [human(t, unit) if unit else f"{t:.3g}" for t in ticks])
    if names:
        ax.set_xticks(range(len(names)), [label(name, 12) for name in names], rotation=90 if len(names) > 4 else 0)
        ax.set_yticks(range(len(names)), [label(name, 12) for name in names])
    else:
        ax.xaxis.set_major_locator(_whole())
        ax.yaxis.set_major_locator(_whole())
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return _framed(ax)


def draw_line(
    ax: Axes,
    *,
    x: Sequence[float],
    y: Sequence[float],
    xlabel: str,
    ylabel: str,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    floor: float | None = 0,
) -> Axes:
    """A line, with dots where there are few; `band` is a lower and an upper edge, `floor` the least the axis starts at."""
    if band:
        ax.fill_between(x, *band, color=BLUE, alpha=0.18, linewidth=0)
    ax.plot(x, y, color=BLUE, linewidth=1.6, marker="o" if len(y) <= 40 else "", markersize=3.5)
    if floor is not None:
        ax.set_ylim(bottom=floor)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(_whole())
    ax.grid(axis="y", color=LINE, linewidth=0.6)
    return opened(ax)


def draw_dots(ax: Axes, *, dots: Dots) -> Axes:
    """One row per plan, one mark per part."""
    rows = range(len(dots.plans))
    for row in rows:
        seen = [value for values in dots.values if (value := values[row]) is not None]
        ax.plot([min(seen), max(seen)], [row, row], color=LINE, linewidth=2, zorder=1)
    for index, (part, hollow, values) in enumerate(zip(dots.parts, dots.hollow, dots.values, strict=True)):
        colour = CYCLE[index % len(CYCLE)]
        known = [(value, row) for row, value in zip(rows, values, strict=True) if value is not None]
        face = "none" if hollow else colour
        x, y = zip(*known, strict=True)
        style: dict[str, Any] = {"color": colour, "markerfacecolor": face, "markeredgewidth": 1.4, "markersize": 6.5, "zorder": 4 if hollow else 3}
        ax.plot(x, y, MARKERS[index % len(MARKERS)], label=label(part, 44), **style)
    ax.set_yticks(rows, [label(plan) for plan in dots.plans])
    ax.set_ylim(len(dots.plans) - 0.5, -0.5)
    human_axis(ax.xaxis, dots.unit)
    ax.grid(axis="x", color=LINE, linewidth=0.6)
    ax.figure.legend(loc="outside upper left", ncols=1, handletextpad=0.4, borderpad=0)
    ax.tick_params(axis="y", length=0)
    return opened(ax, left=False)


def draw_split(ax: Axes, *, names: Sequence[str], seconds: Mapping[str, Sequence[float]]) -> Axes:
    """Stacked bars: one per plan, one piece per kind of time."""
    start = np.zeros(len(names))
    for (kind, values), colour in zip(seconds.items(), (BLUE, ORANGE, SKY, GREEN), strict=False):
        ax.barh(range(len(names)), values, left=start, height=0.55, color=colour, label=kind)
        start = start + np.asarray(values)
    ax.set_yticks(range(len(names)), [label(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    human_axis(ax.xaxis, "s")
    ax.figure.legend(loc="outside upper left", ncols=3, handlelength=1, handletextpad=0.5, columnspacing=1.4, borderpad=0)
    ax.tick_params(axis="y", length=0)
    return opened(ax, left=False)


def draw_cloud(ax: Axes, *, cloud: Cloud) -> Axes:
    """Predicted over measured time, both logarithmic; the line is equality, the band 10 % around it."""
    ends = np.asarray([cloud.low, cloud.high])
    ax.fill_between(ends, ends * 0.9, ends * 1.1, color=FAINT, alpha=0.2, linewidth=0)
    ax.plot(ends, ends, color=FAINT, linewidth=1)
    total = sum(len(x) for x, _ in cloud.points.values())
    style: dict[str, Any] = {"markersize": 4, "alpha": 0.65, "markeredgewidth": 0, "rasterized": total > MANY_MARKS}
    for index, (plan, (x, y)) in enumerate(cloud.points.items()):
        ax.plot(x, y, MARKERS[index % len(MARKERS)], color=CYCLE[index % len(CYCLE)], label=label(plan), **style)
    ticks = log_ticks(cloud.low, cloud.high)
    for axis, scale, limits in ((ax.xaxis, ax.set_xscale, ax.set_xlim), (ax.yaxis, ax.set_yscale, ax.set_ylim)):
        scale("log")
        limits(cloud.low, cloud.high)
        axis.set_minor_locator(_ticker().NullLocator())
        axis.set_ticks(ticks, [human(tick, "s") for tick in ticks])
    ax.set_aspect("equal")
    ax.set_xlabel("measured")
    ax.set_ylabel("predicted")
    ax.grid(color=LINE, linewidth=0.6)
    ax.figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.2, borderpad=0, markerscale=1.4)
    return opened(ax)


def _two_sided() -> Any:
    from matplotlib.colors import ListedColormap, to_rgb

    share = np.linspace(-1, 1, 255)[:, None]
    return ListedColormap(np.hstack([np.where(share < 0, to_rgb(BLUE), to_rgb(VERMILLION)), np.abs(share) ** 0.75]))


def _one_sided() -> Any:
    from matplotlib.colors import ListedColormap, to_rgb

    share = np.linspace(0, 1, 256)[:, None]
    return ListedColormap(np.hstack([np.repeat([to_rgb(BLUE)], 256, axis=0), share]))


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _whole() -> Any:
    return _ticker().MaxNLocator(7, integer=True)


def _scale(ax: Axes, image: Any, ticks: Sequence[float], texts: Sequence[str]) -> None:
    bar = ax.figure.colorbar(image, ax=ax, ticks=ticks, aspect=28, pad=0.02)
    bar.ax.set_yticklabels(texts)
    bar.ax.tick_params(length=0)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # as shapes, neighbours would show seams
    bar.outline.set_linewidth(0.6)


def _row_ticks(ax: Axes, rows: Sequence[int]) -> None:
    at = range(0, len(rows), math.ceil(len(rows) / 9))
    ax.set_yticks(list(at), [str(rows[i]) for i in at])
    ax.xaxis.set_major_locator(_whole())


def human_axis(axis: Any, unit: str) -> None:
    """Few ticks, written with SI prefixes; unit "%" is a share, long times are ticked at round minutes or hours."""

    def text(value: float, _: object) -> str:
        if unit == "%":
            return f"{100 * value:.3g}%"
        return human(value, unit) if unit or abs(value) >= 1e4 else f"{value:.4g}"

    low, high = axis.get_view_interval()
    long = unit == "s" and high >= 120
    step = next((step for step in ROUND_S if step * 5 >= high - low), ROUND_S[-1])
    axis.set_major_locator(_ticker().MultipleLocator(step) if long else _ticker().MaxNLocator(4))
    axis.set_major_formatter(_ticker().FuncFormatter(text))


def _framed(ax: Axes) -> Axes:
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_linewidth(0.6)
    return ax


def opened(ax: Axes, *, left: bool = True) -> Axes:
    """Axes without the frame a reader does not need."""
    ax.spines[["top", "right"] if left else ["top", "right", "left"]].set_visible(False)
    ax.set_axisbelow(True)
    return ax
