"""What a replay found, and its figures.

A accesses, N events, L MoE layers, S steps, M moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.replay.events import Events

#: Values of `Moves.action_M`: out of the cache; in by demand; in by prefetch; loaded and used without being kept.
EVICT, LOAD, PREFETCH, STREAM = range(4)


@dataclass(frozen=True, kw_only=True, eq=False)
class Moves:
    """Every change of the caches in the order it happened: expert (layer, expert) is moved for event `event_M`."""

    event_M: NDArray[np.int64]
    layer_M: NDArray[np.int32]
    expert_M: NDArray[np.int32]
    action_M: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.event_M)


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """What a replay found.

    hit_A            bool, resident when the event began (warm: or a first touch while there was unused room)
    prefetched_A     bool, resident because a prefetch brought it since it was last used; `lead_N` events ahead of event n
    insertions, evictions    experts put into and out of the caches after the start
    streamed         missing experts used without being kept
    pinned           experts resident from the start and for good
    fetched          prefetches made; `dropped` found no room; `wasted` were evicted, `unused` still unused at the end
    collisions       misses of an expert evicted earlier in the same step (none when events are atomic)
    loaded_B, fetched_B, wasted_B    bytes by demand, by prefetch, of wasted prefetches; None where sizes were not given
    moves            every change of the caches, when it was asked for
    """

    events: Events
    policy: str
    prefetcher: str
    scope: str
    warm: bool
    seed: int
    hit_A: NDArray[np.bool_]
    prefetched_A: NDArray[np.bool_]
    lead_N: NDArray[np.int32]
    insertions: int
    evictions: int
    streamed: int
    pinned: int
    fetched: int
    dropped: int
    wasted: int
    unused: int
    collisions: int
    loaded_B: float | None
    fetched_B: float | None
    wasted_B: float | None
    moves: Moves | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def hits(self) -> int:
        """Accesses found."""
        return int(np.count_nonzero(self.hit_A))

    @property
    def misses(self) -> int:
        """Accesses not found."""
        return self.events.accesses - self.hits

    @property
    def hit_ratio(self) -> float:
        """Hits per access; NaN without accesses."""
        return _ratio(self.hits, self.events.accesses)

    @property
    def miss_ratio(self) -> float:
        """Misses per access; NaN without accesses."""
        return _ratio(self.misses, self.events.accesses)

    @cached_property
    def hits_L(self) -> NDArray[np.int64]:
        """Hits of every layer."""
        return np.bincount(self.events.layer_A[self.hit_A], minlength=self.events.layers)

    @cached_property
    def misses_L(self) -> NDArray[np.int64]:
        """Misses of every layer."""
        return np.bincount(self.events.layer_A[~self.hit_A], minlength=self.events.layers)

    @cached_property
    def misses_N(self) -> NDArray[np.int64]:
        """Misses of every event."""
        before = np.concatenate([[0], np.cumsum(~self.hit_A)])
        return np.diff(before[self.events.starts_N])

    @cached_property
    def misses_S(self) -> NDArray[np.int64]:
        """Misses of every step that has an event."""
        steps = np.cumsum(np.diff(self.events.step_N, prepend=self.events.step_N[:1]) != 0)
        return np.bincount(steps, weights=self.misses_N, minlength=self.events.steps).astype(np.int64)

    @cached_property
    def compulsory_misses(self) -> int:
        """Misses that were the first access to their expert in these events."""
        events = self.events
        _, first_A = np.unique(events.layer_A * np.int64(events.experts) + events.experts_A, return_index=True)
        return int(np.count_nonzero(~self.hit_A[first_A]))

    @property
    def loads(self) -> int:
        """Experts copied by demand: kept or streamed (warm: more than the misses)."""
        return self.insertions - self.fetched + self.streamed

    @property
    def transferred(self) -> int:
        """Experts copied in all: pinned at the start, by demand, by prefetch."""
        return self.pinned + self.loads + self.fetched

    def recall(self, lead: int = 0) -> float:
        """Share of accesses found because of a prefetch decided at least `lead` events ahead; NaN without accesses."""
        timely_A = self.prefetched_A & np.repeat(self.lead_N >= lead, np.diff(self.events.starts_N))
        return _ratio(int(np.count_nonzero(timely_A)), self.events.accesses)

    def summary(self, belady: Replay | None = None) -> dict[str, Any]:
        """JSON-ready figures (null where one is not defined); with a replay of `belady` on the same events, hits over its hits.

        Percentiles are values that occur, the higher of two. Raises InputError when `belady` counted by another convention.
        """
        events = self.events
        if belady is not None and (belady.warm, belady.scope, belady.events.accesses) != (self.warm, self.scope, events.accesses):
            raise InputError("a Belady ratio needs the same events, scope and counting of first touches in both replays")
        tokens = events.steps if events.tokens is None else events.tokens
        found: dict[str, Any] = {
            "policy": self.policy,
            "prefetcher": self.prefetcher,
            "scope": self.scope,
            "convention": "warm-fill" if self.warm else "cold",
            "tie_seed": self.seed,
            "events": len(events),
            "steps": events.steps,
            "accesses": events.accesses,
            "hits": self.hits,
            "misses": self.misses,
            "hit_ratio": self.hit_ratio,
            "miss_ratio": self.miss_ratio,
            "compulsory_misses": self.compulsory_misses,
            "capacity_misses": self.misses - self.compulsory_misses,
            "collision_misses": self.collisions,
            "insertions": self.insertions,
            "evictions": self.evictions,
            "churn": self.insertions + self.evictions,
            "churn_per_1000_steps": _ratio(1000 * (self.insertions + self.evictions), events.steps),
            "streamed": self.streamed,
            "initial_loads": self.pinned,
            "transferred": self.transferred,
            "blocks_per_model_token": _ratio(self.transferred, tokens),
            **_percentiles("event_miss", self.misses_N),
            **_percentiles("step_miss", self.misses_S),
            "belady_ratio": None if belady is None else _ratio(self.hits, belady.hits),
            "recall": self.recall(),
            "fetched": self.fetched,
            "dropped": self.dropped,
            "wasted": self.wasted,
            "unused": self.unused,
            "loaded_B": self.loaded_B,
            "fetched_B": self.fetched_B,
            "wasted_B": self.wasted_B,
            "notes": list(self.notes),
        }
        return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in found.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _percentiles(name: str, values: NDArray[np.int64]) -> dict[str, Any]:
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {f"{name}_{label}": int(np.quantile(values, share, method="higher")) if len(values) else None for label, share in shares.items()}
