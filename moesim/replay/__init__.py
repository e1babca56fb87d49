"""Replay of expert caches: one layer of one step is one event."""

from moesim.replay.caches import Caches, replay
from moesim.replay.curves import miss_curves
from moesim.replay.events import Events
from moesim.replay.outcome import EVICT, LOAD, PREFETCH, STREAM, Moves, Replay
from moesim.replay.policy import CacheState, Compiled, Event, Policy, load_policy, policies
from moesim.replay.prefetch import Affinity, All, Oracle, Path, Prefetcher, Prefetches, PreGated, Residual

__all__ = [
    "EVICT",
    "LOAD",
    "PREFETCH",
    "STREAM",
    "Affinity",
    "All",
    "CacheState",
    "Caches",
    "Compiled",
    "Event",
    "Events",
    "Moves",
    "Oracle",
    "Path",
    "Policy",
    "PreGated",
    "Prefetcher",
    "Prefetches",
    "Replay",
    "Residual",
    "load_policy",
    "miss_curves",
    "policies",
    "replay",
]
