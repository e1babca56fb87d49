"""Drawing functions of capacity reports: data and an Axes in, the Axes out. See plots.py for colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesim.report.plots import BLUE, FAINT, GREEN, INK, LINE, VERMILLION, human_axis, opened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True, slots=True)
class Offers:
    """What each offer costs, the share of requests that keep the objective, whether that is enough; index of the chosen one."""

    paid: Sequence[float]
    kept: Sequence[float]
    good: Sequence[bool]
    chosen: int | None
    share: float
    xlabel: str

    def frontier(self) -> list[int]:
        """Offers that no other one beats: cheaper ones keep less. By what they cost."""
        best, found = -1.0, []
        for i in sorted(range(len(self.paid)), key=lambda i: (self.paid[i], -self.kept[i])):
            if self.kept[i] > best:
                best = self.kept[i]
                found.append(i)
        return found


def draw_offers(ax: Axes, *, offers: Offers) -> Axes:
    """A numbered mark per offer, hollow where the objective is missed, a ring around the chosen one; steps join the frontier."""
    front = offers.frontier()
    low = max(0.0, 1 - 1.3 * (1 - min(offers.share, *offers.kept)))  # high shares are read where they differ
    x, y = [offers.paid[i] for i in front], [offers.kept[i] for i in front]
    ax.step([*x, max(offers.paid) * 1.08], [*y, y[-1]], where="post", color=LINE, linewidth=1.4, zorder=1)
    ax.axhline(offers.share, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for i, (paid, kept, good) in enumerate(zip(offers.paid, offers.kept, offers.good, strict=True)):
        colour = GREEN if good else VERMILLION
        ax.plot(paid, kept, "o" if good else "X", color=colour, markerfacecolor=colour if good else "none", markersize=7, zorder=3)
        if i == offers.chosen:
            ax.plot(paid, kept, "o", markersize=15, markerfacecolor="none", color=BLUE, markeredgewidth=1.6, zorder=4)
        ax.annotate(
            str(i + 1), (paid, kept), xytext=(0, -17 if kept > (1 + low) / 2 else 9), textcoords="offset points", ha="center", fontsize=9, color=INK
        )
    ax.set_xlim(0, max(offers.paid) * 1.08 or 1)
    room = 0.06 * (1 - low) or 0.01
    ax.set_ylim(low - room, 1 + room)
    human_axis(ax.yaxis, "%")
    ax.set_xlabel(offers.xlabel)
    ax.set_ylabel("keep the objective")
    ax.grid(axis="y", color=LINE, linewidth=0.6)
    return opened(ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Demand and what the size in use can serve, in intervals that start at start_s; `turns` are (second, words) of changes."""

    start_s: Sequence[float]
    interval_s: float
    demand: Sequence[float]
    served: Sequence[float]
    turns: Sequence[tuple[float, str]]


def draw_load(ax: Axes, *, load: Load) -> Axes:
    """Demand as an area, what can be served as steps above it, and changes of size as marks on the steps."""
    edges = [*load.start_s, load.start_s[-1] + load.interval_s]
    ax.stairs(load.demand, edges, fill=True, color=BLUE, alpha=0.25, label="demand", linewidth=0)
    ax.stairs(load.served, edges, color=GREEN, linewidth=1.8, label="can be served", baseline=None)
    for at, words in load.turns:
        ax.axvline(at, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
        ax.annotate(words, (at, 1), xycoords=("data", "axes fraction"), xytext=(2, -8), textcoords="offset points", fontsize=8, color=INK)
    ax.set_ylim(0, 1.15 * max(*load.demand, *load.served, 1e-9))
    human_axis(ax.xaxis, "s")
    ax.set_ylabel("requests/s")
    ax.grid(axis="y", color=LINE, linewidth=0.6)
    ax.figure.legend(loc="outside upper left", ncols=2, handlelength=1.4, borderpad=0)
    return opened(ax)
