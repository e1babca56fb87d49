"""Routing transforms: choices that are dropped between the router and the experts. (Experts that cost nothing: `routing.ZeroCost`.)

Suffixes: S steps, T tokens, L MoE layers, K selections, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.plan import Placement
from moesim.systems.routing import Plain, Router, Routing, nested
from moesim.trace import NO_EXPERT

Ids = NDArray[np.uint16]
Edit = Callable[[Ids, NDArray[np.floating]], Ids]  # (experts_TLK, weights_TLK) → experts_TLK


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Experts take at most ceil(factor · T · K / E) tokens of a step of T; what comes later is dropped.

    First choices of all tokens come before second ones, each in the order of the tokens (GShard, arXiv 2006.16668; Switch
    Transformers, arXiv 2101.03961). The capacity is that of the whole step, not of each device's part of it.
    """

    factor: float = 1.25
    inner: Routing = field(default_factory=Plain)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise InputError(f"capacity factor {self.factor!r}: give a number > 0; 1 is room for exactly the mean load")

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`."""
        plain = self.inner.router(placement, node_G, gatherable=gatherable, selections=selections)
        return lambda experts, ends, tokens: plain(within_capacity(experts, ends, placement.experts, self.factor), ends, tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopP:
    """A token uses the fewest of its choices whose gate weights reach `share` of all its weight (arXiv 2403.07652).

    The trace must hold gate weights. A token's choices are all there is: more experts than were recorded cannot be had.
    """

    share: float = 0.8
    inner: Routing = field(default_factory=Plain)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"top-p share {self.share!r}: give a share in (0, 1]; 1 keeps every choice")

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`."""
        return self.inner.router(placement, node_G, gatherable=gatherable, selections=selections)

    def edit(self, experts_TLK: Ids, weights_TLK: NDArray[np.floating]) -> Ids:
        """Choices that are used, 65535 for the others; called on tokens as they are read."""
        return top_p(experts_TLK, weights_TLK, self.share)


def edit_of(routing: Routing) -> Edit | None:
    """What a routing, or one inside it, does to choices by their weights; outer before inner, and all before any router."""
    found: list[Edit] = [edit for each in nested(routing) if (edit := getattr(each, "edit", None))]
    if not found:
        return None

    def run(experts_TLK: Ids, weights_TLK: NDArray[np.floating]) -> Ids:
        for edit in found:
            experts_TLK = edit(experts_TLK, weights_TLK)
        return experts_TLK

    return run


def within_capacity(experts_TLK: Ids, ends_S: NDArray[np.integer], experts: int, factor: float) -> Ids:
    """Choices that find room, 65535 for the others. O(T · L · K log(T · K))."""
    kept = experts_TLK.copy()
    sizes = np.diff(np.asarray(ends_S), prepend=0)
    step_KT = np.tile(np.repeat(np.arange(len(sizes)), sizes), experts_TLK.shape[2])
    room_S = np.ceil(factor * sizes * experts_TLK.shape[2] / experts)
    for layer in range(experts_TLK.shape[1]):
        ids_KT = experts_TLK[:, layer].T.reshape(-1)  # first choices of all tokens, then second ones
        key = np.where(ids_KT == NO_EXPERT, -1, step_KT * np.int64(experts) + ids_KT)
        order = np.argsort(key, kind="stable")
        ranked = key[order]
        first = np.flatnonzero(np.diff(ranked, prepend=-2))
        rank = np.arange(len(ranked)) - np.repeat(first, np.diff(first, append=len(ranked)))
        dropped = np.zeros(len(key), bool)
        dropped[order] = rank >= room_S[step_KT[order]]
        kept[:, layer] = np.where(dropped, NO_EXPERT, ids_KT).reshape(experts_TLK.shape[2], -1).T
    return kept


def top_p(experts_TLK: Ids, weights_TLK: NDArray[np.floating], share: float) -> Ids:
    """Each token's heaviest choices up to the one that reaches `share` of its weight; 65535 for the others.

    InputError when a weight is negative or no number.
    """
    weights = np.where(experts_TLK == NO_EXPERT, 0.0, weights_TLK.astype(np.float64))
    if not (weights >= 0).all():
        raise InputError(f"gate weight {weights[~(weights >= 0)][0]!r}: top-p needs weights >= 0; capture with weights after the softmax")
    order = np.argsort(-weights, axis=2, kind="stable")
    sorted_TLK = np.take_along_axis(weights, order, axis=2)
    before = np.cumsum(sorted_TLK, axis=2) - sorted_TLK
    used = before < share * sorted_TLK.sum(axis=2, keepdims=True) * (1 - 1e-9)  # sums of float16 weights are not exact
    used[..., 0] = True
    keep = np.zeros(weights.shape, bool)
    np.put_along_axis(keep, order, used, axis=2)
    return np.where(keep, experts_TLK, np.uint16(NO_EXPERT))
