"""Miss-ratio curves: the misses of caches of many sizes at once.

L MoE layers, E experts, C cache sizes, D depth in a stack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.replay.caches import Caches, Scope, check_load, check_scope
from moesim.replay.events import Events
from moesim.replay.policy import Compiled, Policy, load_policy

#: Policies whose caches of c slots hold part of what caches of c + 1 hold: one pass gives all sizes.
ONE_PASS = ("lru", "lfu", "belady", "optimal", "static")


def miss_curves(
    events: Events,
    policy: str | Policy | Compiled = "lru",
    *,
    slots_C: Sequence[int] | NDArray[np.integer] | None = None,
    scope: Scope = "layer",
    warm: bool = False,
) -> NDArray[np.int64]:
    """miss_LC: misses of each layer when every cache (scope "model": the one pool) has `slots_C` slots; 0, 1, …, all by default.

    Equal to a replay for each size. Policies in `ONE_PASS` walk the events once, others once per size.
    Raises InputError for sizes that are not whole numbers >= 0 and for an unknown scope.
    """
    check_scope(scope)
    ids = events.experts if scope == "layer" else events.layers * events.experts
    sizes = np.arange(ids + 1) if slots_C is None else np.atleast_1d(np.asarray(slots_C))
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (len(sizes) and sizes.min() < 0):
        raise InputError(f"slots_C must be whole numbers >= 0, got {slots_C!r}")
    rule = load_policy(policy) if isinstance(policy, str) else policy
    if rule.name == "static" and not warm:
        return _static(events, rule, sizes, scope)
    if rule.name not in ONE_PASS or rule.name == "static":
        found = [
            Caches(rule, int(slots), layers=events.layers, experts=events.experts, scope=scope, warm=warm).replay(events).misses_L for slots in sizes
        ]
        return np.stack(found, axis=1) if found else np.zeros((events.layers, 0), np.int64)
    from moesim.replay.kernels import ranks, stack
    from moesim.replay.kernels.foresight import NEVER, next_uses

    found_LD = np.zeros((events.layers, ids + 1), np.int64)
    next_A = np.zeros(events.accesses if rule.name in ("belady", "optimal") else 0, np.int64)
    id_A = events.experts_A if scope == "layer" else events.layer_A * np.int32(events.experts) + events.experts_A
    layers = [np.flatnonzero(events.layer_N == layer) for layer in range(events.layers)]
    for event_M in layers if scope == "layer" else [np.arange(len(events))]:
        if rule.name == "lru":
            ranks.lru_depths(id_A, events.starts_N, event_M, ids, found_LD, events.layer_N)
            continue
        if len(next_A):
            next_uses(id_A, events.starts_N, event_M, np.full(ids, NEVER), next_A)
        getattr(stack, rule.name)(id_A, events.starts_N, event_M, next_A, ids, ids, found_LD, events.layer_N)
    found_LD[:, 0] = 0
    if warm:
        _, first_A = np.unique(events.layer_A * np.int64(events.experts) + events.experts_A, return_index=True)
        for group in (
            [np.sort(first_A)] if scope == "model" else [np.sort(first_A[events.layer_A[first_A] == layer]) for layer in range(events.layers)]
        ):
            found_LD[events.layer_A[group], np.arange(1, len(group) + 1)] += 1  # each needs room for all known by then
    hits_LD = np.cumsum(found_LD, axis=1)
    return np.asarray(events.load_LE.sum(axis=1, keepdims=True) - hits_LD[:, np.minimum(sizes, ids)])


def _static(events: Events, rule: Policy | Compiled, sizes: NDArray[np.integer], scope: Scope) -> NDArray[np.int64]:
    given = getattr(rule, "load_LE", None)
    load_LE = events.load_LE
    if given is not None:
        check_load(rule.name, given, events.layers, events.experts)
    heat = (load_LE if given is None else np.asarray(given)).reshape(1 if scope == "model" else events.layers, -1)
    rank = np.argsort(np.argsort(-heat, axis=1, kind="stable"), axis=1, kind="stable").reshape(load_LE.shape)
    found_LD = np.zeros((events.layers, heat.shape[1] + 1), np.int64)
    np.add.at(found_LD, (np.arange(events.layers)[:, None], rank + 1), load_LE)
    hits_LD = np.cumsum(found_LD, axis=1)
    return np.asarray(load_LE.sum(axis=1, keepdims=True) - hits_LD[:, np.minimum(sizes, heat.shape[1])])
