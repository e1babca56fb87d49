"""The event loop in plain Python, for policies with two hooks. It means the same as `replay.kernels.loop`, slower.

X ids of a cache; sizes are slots or bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PluginError
from moesim.replay.outcome import EVICT, LOAD, PREFETCH, STREAM
from moesim.replay.policy import CacheState, Event, Made, Policy, View


class Hooked(NamedTuple):
    """State of a plain policy's cache."""

    policy: Policy
    view: View
    resident: set[int]


def hooked_cache(policy: Policy, view: View) -> Made:
    """(kernel, state) of a policy with hooks, as `Compiled.cache` gives them."""
    return replay_hooked, Hooked(policy, view, set())


def replay_hooked(
    feed: Any, cache: Any, state: Hooked, capacity: int, warm: bool, hit_A: NDArray[np.bool_], early_A: NDArray[np.bool_], log_M3: NDArray[np.int64]
) -> None:
    """Replay events; see `replay_cache`. Raises PluginError when the policy names a victim it may not."""
    from moesim.replay.kernels import loop

    tally, size_X, resident = cache.tally, cache.size_X, state.resident

    def note(n: int, e: int, action: int) -> None:
        if len(log_M3):
            log_M3[tally[loop.LOGGED]] = n, e, action
            tally[loop.LOGGED] += 1

    def seen() -> CacheState:
        return CacheState(resident, int(tally[loop.USED]), capacity, state.view.layers, state.view.experts)

    def load(n: int, e: int, protected: set[int], demand: bool) -> None:
        held = sum(size_X[x] for x in protected & resident)
        fits = size_X[e] <= capacity - held
        while fits and tally[loop.USED] + size_X[e] > capacity:
            victim = state.policy.victim(seen(), frozenset(protected))
            fits = victim is not None
            if victim is not None:
                if victim not in resident or victim in protected:
                    what = "needed now" if victim in protected else "not resident"
                    raise PluginError(f"policy {state.policy.name!r} gave up expert {victim}, which is {what}; choose from resident - protected")
                resident.remove(victim)
                cache.resident_X[victim] = loop.ABSENT
                cache.gone_X[victim] = feed.step_N[n]
                tally[loop.USED] -= size_X[victim]
                tally[loop.EVICTED] += 1
                if cache.unused_X[victim]:
                    cache.unused_X[victim] = False
                    tally[loop.WASTED] += 1
                    tally[loop.WASTED_B] += size_X[victim]
                note(n, victim, EVICT)
        if fits:
            resident.add(e)
            cache.resident_X[e] = loop.CACHED
            tally[loop.USED] += size_X[e]
            tally[loop.INSERTED] += 1
        if demand:
            tally[loop.STREAMED] += not fits
        else:
            tally[loop.FETCHED] += fits
            tally[loop.FETCHED_B] += size_X[e] * fits
            tally[loop.DROPPED] += not fits
            cache.unused_X[e] = fits
        if fits or demand:
            note(n, e, (LOAD if demand else PREFETCH) if fits else STREAM)

    for n in feed.event_M.tolist():
        tally[loop.CLOCK] += 1
        lo, hi = int(feed.starts_N[n]), int(feed.starts_N[n + 1])
        members = feed.id_A[lo:hi].tolist()
        if len(feed.fetch_F):
            foretold = feed.fetch_F[feed.fetch_N[n] : feed.fetch_N[n + 1]].tolist()
            for e in [e for e in foretold if cache.resident_X[e] == loop.ABSENT]:
                load(n, e, {*members, *foretold}, demand=False)
        hits = []
        missing = []
        for a, e in zip(range(lo, hi), members, strict=True):
            if cache.resident_X[e] != loop.ABSENT:
                hits.append(e)
                hit_A[a] = True
                early_A[a] = cache.unused_X[e]
                cache.unused_X[e] = False
            else:
                missing.append(e)
                hit_A[a] = warm and not cache.seen_X[e] and tally[loop.KNOWN] + size_X[e] <= capacity
                tally[loop.LOADED_B] += size_X[e]
                tally[loop.COLLIDED] += cache.gone_X[e] == feed.step_N[n]
            tally[loop.KNOWN] += size_X[e] * (not cache.seen_X[e])
            cache.seen_X[e] = True
        event = Event(int(tally[loop.CLOCK]), int(feed.layer_N[n]), int(feed.step_N[n]), tuple(members), frozenset(hits))
        state.policy.admit(event, seen())
        for e in missing:
            load(n, e, set(members), demand=True)
