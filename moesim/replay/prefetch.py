"""Prefetchers: which experts are fetched ahead for every event, and how many events ahead that is decided.

L MoE layers, E experts, N events, A accesses, F predicted experts. A prediction depends on the routing alone; the replay
leaves out what is already there. Whether a fetch is in time is for an engine to say; here it is `lead_N` events early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.replay.events import Events

CHUNK = 1 << 14  # events whose E scores are looked at together


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefetches:
    """For event n, `experts_F[starts_N[n]:starts_N[n+1]]` (distinct, the likeliest first), decided `lead_N[n]` events before it."""

    experts_F: NDArray[np.int32]
    starts_N: NDArray[np.int64]
    lead_N: NDArray[np.int32]


@runtime_checkable
class Prefetcher(Protocol):
    """Foretells what events will ask for."""

    @property
    def name(self) -> str:
        """As reports call it."""

    def predict(self, events: Events, *, seed: int) -> Prefetches:
        """Predictions for every event; the same seed gives the same ones."""


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Knows each expert an event asks for with probability `recall`; a share `false` of what it foretells is wrong.

    `distance` layers ahead, within the step: the first `distance` layers of a step are not foretold. 0 = the whole step is
    foretold when it begins, so layer l has a lead of l events and layer 0 none. Recall 1 is the bound, recall 0 is no prefetch.
    Raises InputError for shares outside 0..1 (`false` below 1) or a negative distance.
    """

    name: ClassVar[str] = "oracle"
    recall: float = 1.0
    false: float = 0.0
    distance: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.recall <= 1 and 0 <= self.false < 1):
            raise InputError(f"prefetcher {self.name!r}: recall(={self.recall}) must be within 0..1 and false(={self.false}) within 0..1, below 1")
        if self.distance < 0:
            raise InputError(f"prefetcher {self.name!r}: distance(={self.distance}) must be >= 0")

    def _lead(self, layer_N: NDArray[np.int32]) -> NDArray[np.int32]:
        """Layers by which each event is foretold; 0: not at all."""
        return layer_N if self.distance == 0 else np.where(layer_N >= self.distance, self.distance, 0).astype(np.int32)

    def predict(self, events: Events, *, seed: int = 0) -> Prefetches:
        """Draws afresh for every access."""
        rng = np.random.default_rng(seed)
        ahead_N = self._lead(events.layer_N)
        event_A = np.repeat(np.arange(len(events)), np.diff(events.starts_N))
        keep_A = (rng.random(events.accesses) < self.recall) & (ahead_N[event_A] > 0)
        right_N = np.bincount(event_A[keep_A], minlength=len(events))
        wanted_N = right_N * self.false / (1 - self.false)
        wrong_N = np.floor(wanted_N + rng.random(len(events))).astype(np.int64)
        wrong_N = np.minimum(wrong_N, events.experts - np.diff(events.starts_N))
        event_F, expert_F = [event_A[keep_A]], [events.experts_A[keep_A]]
        for first in range(0, len(events) if wrong_N.any() else 0, CHUNK):
            last = min(first + CHUNK, len(events))
            score = rng.random((last - first, events.experts))
            lo, hi = events.starts_N[first], events.starts_N[last]
            score[event_A[lo:hi] - first, events.experts_A[lo:hi]] = 2  # an expert that is asked for is no mistake
            rank = np.argsort(score, axis=1)
            row, column = np.nonzero(np.arange(events.experts) < wrong_N[first:last, None])
            event_F.append(row + first)
            expert_F.append(rank[row, column].astype(np.int32))
        return _sorted(np.concatenate(event_F), np.concatenate(expert_F), ahead_N)


@dataclass(frozen=True, kw_only=True)
class PreGated(Oracle):
    """The gate of the next block is computed one block early (Pre-gated MoE, Hwang et al., ISCA 2024): exact, but for the first layer."""

    name: ClassVar[str] = "pre-gated"


@dataclass(frozen=True, kw_only=True)
class Path(Oracle):
    """A predictor foretells the whole path of a step when it begins (ExpertFlow, arXiv 2410.17954); its recall and mistakes are inputs."""

    name: ClassVar[str] = "path"
    recall: float = 0.9
    false: float = 0.1
    distance: int = 0


@dataclass(frozen=True, kw_only=True)
class Residual(Oracle):
    """Routes foretold from the residual stream `distance` layers early (M2R2), with the recall it has there.

    The stream runs from a step's begin on: layers nearer than `distance` are foretold then, all but the first.
    """

    name: ClassVar[str] = "residual"
    recall: float = 0.9
    distance: int = 2

    def _lead(self, layer_N: NDArray[np.int32]) -> NDArray[np.int32]:
        return layer_N if self.distance == 0 else np.minimum(layer_N, self.distance)


@dataclass(frozen=True)
class All:
    """Fetches every expert of the next layer (SE-MoE)."""

    name: ClassVar[str] = "all"

    def predict(self, events: Events, *, seed: int = 0) -> Prefetches:
        """All experts, in order of their ids, but for a step's first layer."""
        lead_N = (events.layer_N > 0).astype(np.int32)
        many_N = lead_N * np.int64(events.experts)
        return Prefetches(
            experts_F=np.tile(np.arange(events.experts, dtype=np.int32), int(lead_N.sum())),
            starts_N=np.concatenate([[0], np.cumsum(many_N)]),
            lead_N=lead_N,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Affinity:
    """The likeliest experts of the next layer after those of this one, from `TraceStats.transitions_LEE` of a learning part.

    Foretells as many experts as this layer asked for, or `width`. `distance` layers ahead by chaining the transitions.
    A step's first `distance` layers are not foretold. Raises InputError when the transitions do not fit the events.
    """

    name: ClassVar[str] = "affinity"
    transitions_LEE: NDArray[np.number]
    width: int | None = None
    distance: int = 1

    def __post_init__(self) -> None:
        shape = self.transitions_LEE.shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise InputError(f"transitions have shape {shape}; give TraceStats.transitions_LEE [layers-1, experts, experts]")
        if not np.isfinite(self.transitions_LEE).all() or (self.transitions_LEE < 0).any():
            raise InputError("transitions hold negative or non-finite counts")
        if self.distance < 1 or (self.width is not None and self.width < 0):
            raise InputError(f"prefetcher 'affinity': distance(={self.distance}) must be >= 1 and width(={self.width}) >= 0")

    def predict(self, events: Events, *, seed: int = 0) -> Prefetches:
        """No draws; of equals the lower id first."""
        layers, experts = events.layers, events.experts
        if self.transitions_LEE.shape != (layers - 1, experts, experts):
            raise InputError(f"transitions have shape {self.transitions_LEE.shape}, the events {layers} layers x {experts} experts")
        total_LE1 = self.transitions_LEE.sum(axis=2, keepdims=True)
        chance_LEE = self.transitions_LEE / np.maximum(total_LE1, 1)
        event_F, expert_F = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        lead_N = np.where(events.layer_N >= self.distance, self.distance, 0)
        for layer in range(layers - self.distance):
            chain = chance_LEE[layer]
            for further in range(layer + 1, layer + self.distance):
                chain = chain @ chance_LEE[further]
            source = np.flatnonzero(events.layer_N == layer)
            target = np.flatnonzero(events.layer_N == layer + self.distance)
            _, at, to = np.intersect1d(events.step_N[source], events.step_N[target], assume_unique=True, return_indices=True)
            for first in range(0, len(at), CHUNK):
                rows, ahead = source[at[first : first + CHUNK]], target[to[first : first + CHUNK]]
                many = np.diff(events.starts_N)[rows]
                asked = np.zeros((len(rows), experts))
                flat = np.repeat(events.starts_N[rows], many) + _within(many)
                asked[np.repeat(np.arange(len(rows)), many), events.experts_A[flat]] = 1
                score = asked @ chain
                rank = np.argsort(-score, axis=1, kind="stable")
                width = many if self.width is None else np.full(len(rows), self.width)
                row, column = np.nonzero((np.arange(experts) < width[:, None]) & (np.take_along_axis(score, rank, axis=1) > 0))
                event_F.append(ahead[row])
                expert_F.append(rank[row, column].astype(np.int32))
        return _sorted(np.concatenate(event_F), np.concatenate(expert_F), lead_N)


def _within(many: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, … inside each run of a length."""
    return np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)


def _sorted(event_F: NDArray[np.int64], expert_F: NDArray[np.int32], lead_N: NDArray[np.integer]) -> Prefetches:
    order = np.argsort(event_F, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(event_F, minlength=len(lead_N)))])
    return Prefetches(experts_F=expert_F[order], starts_N=starts, lead_N=lead_N.astype(np.int32))
