"""Replay of expert caches over events.

A accesses, N events, L MoE layers, E experts, U caches (one per layer, or one for all), X ids of one cache (E, or L·E), M moves.
One event is atomic: its hits are decided when it begins, nothing it needs is given up for it, and what exceeds the cache is
loaded, used and not kept. Members of one event are heard of and loaded in the order of their ids, or of the seed's permutation
of the ids: that is the rule that breaks ties.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.replay.events import Events
from moesim.replay.outcome import Moves, Replay
from moesim.replay.policy import Compiled, Policy, View, load_policy
from moesim.replay.prefetch import Prefetcher

Scope = Literal["layer", "model"]
_SAME = "{policy}: pins the hottest experts of the replayed events themselves, which no running system knows; give load_LE of a learning part"


class Caches:
    """The expert caches of one model and what they hold: `replay` goes on where the last call ended.

    `slots` is the room of each cache in experts, one number or one per layer (scope "model": of the one pool of all layers).
    With `size_LE`, the bytes of every expert, `capacity_B` is the room instead. `resident` [L, E] is pinned for good and takes
    room. `warm` counts a first touch as a hit while unused room remains. Memory: O(U·X), besides the events given at a time.
    Raises InputError for room below zero, of another length, or too little for the pinned experts; for sizes that are no
    positive numbers; and for an unknown policy.
    """

    def __init__(
        self,
        policy: str | Policy | Compiled = "lru",
        slots: int | NDArray[np.integer] | None = None,
        *,
        layers: int,
        experts: int,
        scope: Scope = "layer",
        capacity_B: float | NDArray[np.number] | None = None,
        size_LE: NDArray[np.number] | None = None,
        resident: NDArray[np.bool_] | None = None,
        warm: bool = False,
        seed: int = 0,
    ) -> None:
        check_scope(scope)
        if (slots is None) == (capacity_B is None) or (size_LE is None) != (capacity_B is None):
            raise InputError("give either slots, or capacity_B together with size_LE")
        if not (isinstance(seed, (int, np.integer)) and seed >= 0):
            raise InputError(f"seed(={seed!r}) must be a whole number >= 0")
        self.policy = load_policy(policy) if isinstance(policy, str) else policy
        self.layers, self.experts, self.scope, self.warm, self.seed = layers, experts, scope, warm, seed
        caches = 1 if scope == "model" else layers
        self._size_UX = _sizes(size_LE, layers, experts).reshape(caches, -1)
        self._sized = size_LE is not None
        self._room_U = _rooms("capacity_B" if self._sized else "slots", cast(Any, capacity_B if self._sized else slots), caches)
        pinned_LE = np.zeros((layers, experts), np.bool_) if resident is None else np.asarray(resident, np.bool_)
        if pinned_LE.shape != (layers, experts):
            raise InputError(f"resident has shape {pinned_LE.shape}, the model {layers} layers x {experts} experts")
        self._pinned_UX = pinned_LE.reshape(caches, -1).copy()
        self._order_UX = None
        if seed != 0:  # inside layers: an id still tells its layer
            order_LE = np.stack([np.random.default_rng((seed, layer)).permutation(experts) for layer in range(layers)])
            base_L1 = np.arange(layers)[:, None] * (experts if scope == "model" else 0)
            self._order_UX = (order_LE + base_L1).reshape(caches, -1)
        self._made: list[tuple[Any, Any, Any, int]] = []  # (kernel, state, cache, capacity) of each cache, once there are events
        self._notes: tuple[str, ...] = ()

    def replay(self, events: Events, *, prefetcher: Prefetcher | None = None, log: bool = False) -> Replay:
        """Replay further events. `log` keeps every load, prefetch and eviction in order.

        Raises InputError when events are of another model, or follow others though the policy had to know all of them.
        """
        from moesim.replay.kernels import loop

        if (events.layers, events.experts) != (self.layers, self.experts):
            raise InputError(f"events of {events.layers} layers x {events.experts} experts; the caches are for {self.layers} x {self.experts}")
        if self._made and getattr(self.policy, "foresight", False):
            raise InputError(f"policy {self.policy.name!r} knows the future: it needs all events in one call")
        foretold = None if prefetcher is None else prefetcher.predict(events, seed=self.seed)
        cache_N = np.zeros(len(events), np.int32) if self.scope == "model" else events.layer_N
        id_A = events.experts_A
        fetch_F = np.zeros(0, np.int32) if foretold is None else foretold.experts_F
        if self.scope == "model":
            base_N = events.layer_N * np.int32(self.experts)
            id_A = id_A + np.repeat(base_N, np.diff(events.starts_N))
            fetch_F = fetch_F if foretold is None else fetch_F + np.repeat(base_N, np.diff(foretold.starts_N))
        back_A = None
        if self._order_UX is not None:
            id_A, back_A = _relabelled(self._order_UX, cache_N, id_A, events.starts_N)
            if foretold is not None:
                fetch_F = self._order_UX[np.repeat(cache_N, np.diff(foretold.starts_N)), fetch_F].astype(np.int32)
        fetch_N = np.zeros(1, np.int64) if foretold is None else foretold.starts_N
        hit_A, early_A = np.zeros((2, events.accesses), np.bool_)
        tally, moves = np.zeros(loop.TALLIES, np.int64), []
        order = np.argsort(cache_N, kind="stable") if len(self._room_U) > 1 else np.arange(len(events))
        event_UM = np.split(order, np.cumsum(np.bincount(cache_N, minlength=len(self._room_U)))[:-1])
        feeds = [loop.Feed(id_A, events.starts_N, events.layer_N, events.step_N, event_M, fetch_F, fetch_N) for event_M in event_UM]
        if not self._made:
            self._begin(events, feeds)
        for u, (kernel, state, cache, capacity) in enumerate(self._made):
            cache.tally[loop.INSERTED :] = 0
            rows = 2 * (int(np.diff(events.starts_N)[event_UM[u]].sum()) + len(fetch_F) + self._size_UX.shape[1]) if log else 0
            log_M3 = np.zeros((rows, 3), np.int64)
            kernel(feeds[u], cache, state, capacity, self.warm, hit_A, early_A, log_M3)
            tally += cache.tally
            if log:
                rows_M3 = log_M3[: cache.tally[loop.LOGGED]]
                if self._order_UX is not None:
                    rows_M3[:, 1] = np.argsort(self._order_UX[u])[rows_M3[:, 1]]
                moves.append(rows_M3)
        if back_A is not None:
            hit_A, early_A = hit_A[back_A], early_A[back_A]
        lead_N = np.zeros(len(events), np.int32) if foretold is None else foretold.lead_N
        pinned = int(self._pinned_UX.sum())
        return Replay(
            events=events,
            policy=self.policy.name,
            prefetcher="none" if prefetcher is None else prefetcher.name,
            scope=self.scope,
            warm=self.warm,
            seed=self.seed,
            hit_A=hit_A,
            prefetched_A=early_A,
            lead_N=lead_N,
            insertions=int(tally[loop.INSERTED]),
            evictions=int(tally[loop.EVICTED]),
            streamed=int(tally[loop.STREAMED]),
            fetched=int(tally[loop.FETCHED]),
            dropped=int(tally[loop.DROPPED]),
            wasted=int(tally[loop.WASTED]),
            unused=int(sum(cache.unused_X.sum() for _, _, cache, _ in self._made)),
            collisions=int(tally[loop.COLLIDED]),
            pinned=pinned,
            loaded_B=float(tally[loop.LOADED_B]) if self._sized else None,
            fetched_B=float(tally[loop.FETCHED_B]) if self._sized else None,
            wasted_B=float(tally[loop.WASTED_B]) if self._sized else None,
            moves=_moves(moves, events, self.scope) if log else None,
            notes=self._notes,
        )

    def _begin(self, events: Events, feeds: list[Any]) -> None:
        from moesim.replay.hooked import hooked_cache
        from moesim.replay.kernels import loop

        load_UX = events.load_LE.reshape(len(feeds), -1)
        share = getattr(self.policy, "pinned", 0.0)
        if share:
            given = getattr(self.policy, "load_LE", None)
            if given is None:
                self._notes = (_SAME.format(policy=self.policy.name),)
            else:
                check_load(self.policy.name, given, self.layers, self.experts)
            heat_UX = load_UX if given is None else np.asarray(given).reshape(len(feeds), -1)
            for u, feed_pins in enumerate(self._pinned_UX):
                pin_hottest(feed_pins, heat_UX[u], self._size_UX[u], int(share * self._room_U[u]))
        for u, feed in enumerate(feeds):
            size_X, pinned_X, load_X = self._size_UX[u], self._pinned_UX[u], load_UX[u]
            if self._order_UX is not None:
                back = np.argsort(self._order_UX[u])
                size_X, pinned_X, load_X = size_X[back], pinned_X[back], load_X[back]
            taken = int(size_X[pinned_X].sum())
            capacity = int(self._room_U[u]) - taken
            if capacity < 0:
                where = "the pool" if self.scope == "model" else f"layer {u}"
                unit = " B" if self._sized else " slots"
                raise InputError(f"pinned experts of {where} need {taken}{unit}, there are {int(self._room_U[u])}; pin fewer")
            view = View(feed=feed, size_X=size_X, load_X=load_X, capacity=capacity, layers=self.layers, experts=self.experts, seed=self.seed)
            made = self.policy.cache(view) if isinstance(self.policy, Compiled) else hooked_cache(copy.deepcopy(self.policy), view)
            self._made.append((*made, loop.new_cache(size_X, pinned_X), capacity))


def replay(
    events: Events,
    policy: str | Policy | Compiled = "lru",
    slots: int | NDArray[np.integer] | None = None,
    *,
    scope: Scope = "layer",
    capacity_B: float | NDArray[np.number] | None = None,
    size_LE: NDArray[np.number] | None = None,
    resident: NDArray[np.bool_] | None = None,
    prefetcher: Prefetcher | None = None,
    warm: bool = False,
    seed: int = 0,
    log: bool = False,
) -> Replay:
    """Replay all `events` from the start; see `Caches`, which replays a long trace part by part."""
    caches = Caches(
        policy,
        slots,
        layers=events.layers,
        experts=events.experts,
        scope=scope,
        capacity_B=capacity_B,
        size_LE=size_LE,
        resident=resident,
        warm=warm,
        seed=seed,
    )
    return caches.replay(events, prefetcher=prefetcher, log=log)


def check_scope(scope: str) -> None:
    """Raise InputError when caches cannot be shared like that."""
    if scope not in ("layer", "model"):
        raise InputError(f"scope {scope!r} is unknown; use layer (a cache for each) or model (one pool)")


def check_load(policy: str, load_LE: NDArray[np.number], layers: int, experts: int) -> None:
    """Raise InputError when loads that a policy pins by are of another model, or no loads."""
    if load_LE.shape != (layers, experts):
        raise InputError(f"policy {policy!r}: load_LE has shape {load_LE.shape}, the model {layers} layers x {experts} experts")
    if not (np.isfinite(load_LE).all() and (load_LE >= 0).all()):
        raise InputError(f"policy {policy!r}: load_LE holds negative or non-finite loads")


def pin_hottest(pinned_X: NDArray[np.bool_], heat_X: NDArray[np.number], size_X: NDArray[np.int64], room: int) -> None:
    """Pin further experts while they fit into `room` with those pinned: most accesses per size first, of equals the lower id."""
    left = room - int(size_X[pinned_X].sum())
    for e in np.argsort(-heat_X / size_X, kind="stable"):
        if not pinned_X[e] and size_X[e] <= left:
            pinned_X[e] = True
            left -= size_X[e]


def _rooms(name: str, room: float | NDArray[np.number], caches: int) -> NDArray[np.int64]:
    values = np.atleast_1d(np.asarray(room))
    if values.dtype.kind not in ("iuf" if name == "capacity_B" else "iu") or values.ndim != 1 or len(values) not in (1, caches):
        raise InputError(f"{name} must be one {'' if name == 'capacity_B' else 'whole '}number or {caches} of them, got {room!r}")
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1 << 60:
        raise InputError(f"{name}(={room!r}) must be finite, >= 0 and at most 2^60")
    return np.broadcast_to(np.floor(values).astype(np.int64), caches)


def _sizes(size_LE: NDArray[np.number] | None, layers: int, experts: int) -> NDArray[np.int64]:
    if size_LE is None:
        return np.ones((layers, experts), np.int64)
    values = np.asarray(size_LE)
    if values.shape != (layers, experts):
        raise InputError(f"size_LE has shape {values.shape}, the model {layers} layers x {experts} experts")
    if not np.isfinite(values).all() or values.min() <= 0 or values.max() > 1 << 50:
        raise InputError(f"size_LE holds {values.min()}..{values.max()} B; every expert needs a finite size above 0")
    return np.ceil(values).astype(np.int64)


def _relabelled(
    order_UX: NDArray[np.int64], cache_N: NDArray[np.int32], id_A: NDArray[np.int32], starts_N: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(ids in the seed's order, ascending inside events; where each access went)."""
    event_A = np.repeat(np.arange(len(cache_N)), np.diff(starts_N))
    renamed_A = order_UX[cache_N[event_A], id_A]
    order = np.lexsort((renamed_A, event_A))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return renamed_A[order].astype(np.int32), back


def _moves(parts: list[NDArray[np.int64]], events: Events, scope: Scope) -> Moves:
    rows_M3 = np.concatenate(parts)
    event_M, id_M, action_M = rows_M3[np.argsort(rows_M3[:, 0], kind="stable")].T  # an event's rows are all of one cache
    return Moves(
        event_M=event_M,
        layer_M=events.layer_N[event_M] if scope == "layer" else (id_M // events.experts).astype(np.int32),
        expert_M=(id_M % events.experts).astype(np.int32),
        action_M=action_M.astype(np.int8),
    )
