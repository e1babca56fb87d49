"""Batching: tokens regrouped over the steps of a window before they run, and one route for all layers.

A deployment that knows routes before it computes can choose which tokens run together. Suffixes: S steps, T tokens,
L MoE layers, K selections, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.plan import Placement
from moesim.systems.routing import Plain, Routed, Router, Routing
from moesim.trace import NO_EXPERT

Ids = NDArray[np.uint16]
Order = Callable[[Ids, list[int], int], NDArray[np.int64]]
ROUNDS = 4  # of k-means, as few tokens change sides later


@dataclass(frozen=True, kw_only=True, slots=True)
class OneRoute:
    """A router outside the model gives every token one route for all layers: that of its first.

    The trace's first layer stands for that router; what the model would lose or gain in quality is not asked here.
    """

    inner: Routing = field(default_factory=Plain)

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`."""
        plain = self.inner.router(placement, node_G, gatherable=gatherable, selections=selections)
        return lambda experts, ends, tokens: plain(np.repeat(experts[:, :1], experts.shape[1], axis=1), ends, tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Regrouped:
    """Tokens of `window` consecutive steps are regrouped among them, steps keep their sizes.

    by  route: tokens with similar routes together, by balanced two-means on their routes, halving the window (ExpertFlow);
        queue: one queue per expert of the first layer, the longest served first (Read-ME)

    A window keeps its own order unless fewer experts are needed after it, counted over its steps and layers.
    """

    window: int = 2
    by: Literal["route", "queue"] = "route"
    inner: Routing = field(default_factory=Plain)

    def __post_init__(self) -> None:
        if self.window < 1 or self.by not in ("route", "queue"):
            raise InputError(f"window={self.window}, by={self.by!r}: give steps >= 1, and route or queue")

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`. Windows do not reach over the steps of one call."""
        plain = self.inner.router(placement, node_G, gatherable=gatherable, selections=selections)
        order = by_route if self.by == "route" else by_queue

        def run(experts_TLK: Ids, ends_S: NDArray[np.integer], tokens_per_step: float) -> Routed:
            return plain(experts_TLK[regroup(experts_TLK, ends_S, placement.experts, window=self.window, order=order)], ends_S, tokens_per_step)

        return run


def regroup(experts_TLK: Ids, ends_S: NDArray[np.integer], experts: int, *, window: int, order: Order) -> NDArray[np.int64]:
    """Permutation of the tokens that regroups every window of steps; the identity where that needs no fewer experts."""
    ends = np.asarray(ends_S).tolist()
    moved = np.arange(len(experts_TLK))
    for first in range(0, len(ends), window):
        begin, cuts = ends[first - 1] if first else 0, ends[first : first + window]
        part = experts_TLK[begin : cuts[-1]]
        sizes = np.diff(cuts, prepend=begin).tolist()
        if len(sizes) > 1:
            found = order(part, sizes, experts)
            if needed(part[found], sizes, experts) < needed(part, sizes, experts):
                moved[begin : cuts[-1]] = begin + found
    return moved


def needed(experts_TLK: Ids, sizes: list[int], experts: int) -> int:
    """Distinct experts of every layer, summed over steps of these sizes."""
    layers = experts_TLK.shape[1]
    step_T = np.repeat(np.arange(len(sizes)), sizes)
    key = (step_T[:, None, None] * layers + np.arange(layers)[:, None]) * experts + experts_TLK
    return int(np.unique(key[experts_TLK != NO_EXPERT]).size)


def by_queue(experts_TLK: Ids, sizes: list[int], experts: int) -> NDArray[np.int64]:
    """Tokens queue at their first layer's first expert; the longest queue is served first, each in order of arrival."""
    expert_T = experts_TLK[:, 0, 0].astype(np.int64)
    waiting = np.bincount(expert_T, minlength=NO_EXPERT + 1)
    return np.lexsort((np.arange(len(expert_T)), expert_T, -waiting[expert_T]))


def by_route(experts_TLK: Ids, sizes: list[int], experts: int) -> NDArray[np.int64]:
    """Tokens with similar routes in the same step: two-means with both sides' sizes fixed, then each side again.

    O(window · T · L · K) for T tokens; centroids are [L·E].
    """
    if len(sizes) == 1:
        return np.arange(sizes[0])
    left = len(sizes) // 2
    room = sum(sizes[:left])
    columns_TX = (np.arange(experts_TLK.shape[1])[:, None] * experts + experts_TLK).reshape(len(experts_TLK), -1)
    columns_TX = np.where((experts_TLK != NO_EXPERT).reshape(len(experts_TLK), -1), columns_TX, experts_TLK.shape[1] * experts)
    width = experts_TLK.shape[1] * experts

    def heat_X(of_T: NDArray[np.integer] | NDArray[np.bool_]) -> NDArray[np.float64]:
        chosen = columns_TX[of_T]
        return np.bincount(chosen.ravel(), minlength=width + 1)[:width] / len(chosen)

    like_T = np.append(heat_X(np.asarray([0])), 0.0)[columns_TX].sum(axis=1)
    means = [heat_X(np.asarray([0])), heat_X(np.asarray([int(np.argmin(like_T))]))]  # begin with the first token and the one least like it
    ours_T = np.zeros(len(experts_TLK), bool)
    for _ in range(ROUNDS):
        pull_T = np.append(means[0] - means[1], 0.0)[columns_TX].sum(axis=1)
        best = np.zeros(len(ours_T), bool)
        best[np.argsort(-pull_T, kind="stable")[:room]] = True
        if (best == ours_T).all():
            break
        ours_T = best
        means = [heat_X(side) for side in (ours_T, ~ours_T)]
    halves = []
    for side, part in ((ours_T, sizes[:left]), (~ours_T, sizes[left:])):
        at = np.flatnonzero(side)
        halves.append(at[by_route(experts_TLK[at], part, experts)])
    return np.concatenate(halves)
