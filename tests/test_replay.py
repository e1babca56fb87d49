"""Replay of expert caches: published vectors, exact optima, curves, prefetch, sizes, and what is refused."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, TraceError
from moesim.replay import LOAD, Caches, Events, Oracle, miss_curves, policies, replay
from moesim.replay.policy import LfuAged, NextUse, PinnedLru, S3Fifo, Static, WTinyLfu
from moesim.testing import MODEL, clustered_routing
from moesim.testing.policies import random_events


def events_of(sets, *, layers=1, experts=4):
    """Events from sets of experts, layer after layer."""
    flat = [e for members in sets for e in sorted(members)]
    return Events(
        experts_A=np.asarray(flat, np.int32),
        starts_N=np.cumsum([0, *map(len, sets)]),
        layer_N=np.arange(len(sets)) % layers,
        step_N=np.arange(len(sets)) // layers,
        layers=layers,
        experts=experts,
    )


@st.composite
def small_events(draw, layers=1, experts=5, most=12):
    sets = draw(st.lists(st.sets(st.integers(0, experts - 1), max_size=experts), max_size=most))
    return events_of(sets[: len(sets) // layers * layers], layers=layers, experts=experts)


# moe-cache-eval@b8c702f (Apache-2.0), toy trace: each of three layers sees these five sets.
TOY = events_of([members for members in ({0, 1}, {0, 2}, {0, 1}, {0, 3}, {0, 1}) for _ in range(3)], layers=3)
A = [{0, 1}, {1, 2}] * 3
B = [{0, 1, 2}, {1, 2, 3}, {0, 1, 3}, {0, 2, 3}, {1, 2, 3}, {0, 1, 2}]


def test_the_toy_trace_gives_its_published_figures():
    found = replay(TOY, "lru", 2)
    assert found.misses_N.tolist() == [2, 2, 2] + [1] * 12
    published = {
        "accesses": 30, "hits": 12, "misses": 18, "hit_ratio": 0.4, "miss_ratio": 0.6, "compulsory_misses": 12, "capacity_misses": 6,
        "collision_misses": 0, "evictions": 12, "insertions": 18, "churn": 30, "churn_per_1000_steps": 6000.0, "initial_loads": 0,
        "transferred": 18, "blocks_per_model_token": 3.6, "event_miss_p50": 1, "event_miss_p95": 2, "event_miss_p99": 2,
        "step_miss_p50": 3, "step_miss_p95": 6, "step_miss_p99": 6, "step_miss_max": 6,
    }  # fmt: skip
    summary = found.summary(belady=replay(TOY, "belady", 2))
    assert {name: summary[name] for name in published} == published
    assert summary["belady_ratio"] == 12 / replay(TOY, "belady", 2).hits


@pytest.mark.parametrize(
    ("sets", "slots", "lru", "sequential_lru", "belady", "sequential_belady"),
    [(A, 2, 5, 3, 5, 6), (A, 3, 9, 9, 9, 9), (B, 3, 10, 7, 10, 12), (B, 4, 14, 14, 14, 14)],
)
def test_vectors_that_tell_the_two_replays_apart(sets, slots, lru, sequential_lru, belady, sequential_belady):
    """Hits, measured from the rules of event-atomic replay; cold start."""
    events = events_of(sets)
    for policy, atomic, sequential in (("lru", lru, sequential_lru), ("belady", belady, sequential_belady)):
        assert replay(events, policy, slots).hits == atomic
        assert replay(events.sequential(), policy, slots).hits == sequential


def best_hits(events, slots, *, forced):
    """Most hits of any decisions, by trying all: what is kept after an event holds the event (or slots of it), unless not `forced`."""
    best = {frozenset(): 0}
    for n in range(len(events)):
        members = frozenset(events.experts_A[events.starts_N[n] : events.starts_N[n + 1]].tolist())
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            found = hits + len(held & members)
            whole = held | members
            for kept in map(frozenset, combinations(sorted(whole), min(slots, len(whole)))):
                if not forced or (kept >= members if len(members) <= slots else kept <= members):
                    after[kept] = max(after.get(kept, 0), found)
        best = after
    return max(best.values())


@given(small_events(), st.integers(1, 4))
def test_belady_and_optimal_are_exact_optima(events, slots):
    assert replay(events, "belady", slots).hits == best_hits(events, slots, forced=True)
    assert replay(events, "optimal", slots).hits == best_hits(events, slots, forced=False)


@given(
    small_events(layers=2, experts=6, most=24),
    st.sampled_from(["lru", "lfu", "belady", "optimal", "static"]),
    st.sampled_from(["layer", "model"]),
    st.booleans(),
)
def test_curves_are_replays_of_every_size_and_never_rise(events, policy, scope, warm):
    curves = miss_curves(events, policy, scope=scope, warm=warm)
    ids = 6 if scope == "layer" else 12
    each = np.stack([replay(events, policy, slots, scope=scope, warm=warm).misses_L for slots in range(ids + 1)], axis=1)
    if policy == "belady" and scope == "model":  # equal next uses may be shared out differently between layers
        assert curves.sum(axis=0).tolist() == each.sum(axis=0).tolist()
    else:
        assert curves.tolist() == each.tolist()
    assert (np.diff(curves.sum(axis=0)) <= 0).all()
    assert miss_curves(events, policy, slots_C=[2, 0, 99], scope=scope, warm=warm).tolist() == curves[:, [2, 0, ids]].tolist()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 16, 64]), st.sampled_from(["layer", "model"]))
@settings(max_examples=40)
def test_lru_curves_of_any_step_width_are_replays(seed, width, scope):
    """Events that vary in size: tokens in steps of about `width`, now and then a wide step as of prefill, skewed or even."""
    rng = np.random.default_rng(seed)
    experts, tokens = int(rng.integers(1, 150)), int(rng.integers(1, 20 * width))
    heat_LE = rng.random() * 4 * rng.normal(size=(2, experts))
    ids_TLK = np.argsort(-(heat_LE + rng.gumbel(size=(tokens, 2, experts))), axis=2)[:, :, : int(rng.integers(1, 9))].astype(np.uint16)
    long_S = np.where(rng.random(tokens) < 0.1, 16 * width, rng.integers(1, width + 1, tokens))
    events = Events.from_experts(ids_TLK, experts=experts, step_T=np.repeat(np.arange(tokens), long_S)[:tokens])
    sizes = np.unique(rng.integers(0, experts * (2 if scope == "model" else 1) + 1, 10))
    each = [replay(events, "lru", int(slots), scope=scope).misses_L for slots in sizes]
    assert miss_curves(events, "lru", slots_C=sizes, scope=scope).tolist() == np.stack(each, axis=1).tolist()


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady", "optimal"])
def test_curves_of_wide_events(policy):
    """Long events of many experts, where sizes below and above the event differ most."""
    events = random_events(1, steps=150, experts=40, tokens_per_step=8, top_k=3)
    curves = miss_curves(events, policy)
    assert curves.tolist() == np.stack([replay(events, policy, slots).misses_L for slots in range(41)], axis=1).tolist()


@pytest.mark.parametrize("size", [1, 8, 64, 65])
def test_curves_of_events_of_one_size(size):
    """Up to a word of members and beyond; more uses than the bits of recency have room for; layers in turn, one now and then idle."""
    rng = np.random.default_rng(size)
    heat = 2 * rng.random(100)
    sets = [set() if n % 7 == 3 else set(np.argsort(heat + rng.random(100))[:size].tolist()) for n in range(4000 // size // 2 * 2)]
    events = events_of(sets, layers=2, experts=100)
    sizes = np.unique([0, 1, 2, size // 2, size - 1, size, size + 1, 80, 99, 100])
    for scope in ("layer", "model"):
        each = [replay(events, "lru", int(slots), scope=scope).misses_L for slots in sizes]
        assert miss_curves(events, "lru", slots_C=sizes, scope=scope).tolist() == np.stack(each, axis=1).tolist()


def test_curves_of_other_policies_are_replays():
    events = random_events(2)
    assert miss_curves(events, "sieve", slots_C=[3]).tolist() == [[n] for n in replay(events, "sieve", 3).misses_L]
    half = Static(load_LE=events.part(0, 20).load_LE)
    assert miss_curves(events, half, slots_C=[3]).tolist() == [[n] for n in replay(events, half, 3).misses_L]


@given(st.lists(st.integers(0, 5), max_size=60), st.permutations(range(6)), st.integers(1, 5))
def test_names_of_experts_do_not_matter(accesses, renamed, slots):
    """One expert at a time there are no ties."""
    one, two = (events_of([{e} for e in row], experts=6) for row in (accesses, [renamed[e] for e in accesses]))
    for policy in set(policies()) - {"static", "pinned-lru"}:
        assert replay(one, policy, slots).hit_A.tolist() == replay(two, policy, slots).hit_A.tolist(), policy


def test_the_order_inside_events_is_the_seeds():
    events = random_events(3)
    hits = {replay(events, "fifo", 3, seed=seed).hits for seed in range(6)}
    assert len(hits) > 1
    assert replay(events, "fifo", 3, seed=2).summary()["tie_seed"] == 2


@pytest.mark.parametrize("policy", ["next-use", "layer-distance"])
def test_a_seed_keeps_layers_apart(policy):
    """In a pool of all layers an id tells its layer, whatever the seed's order of experts."""
    events = events_of([{0}] * 60, layers=6, experts=4)
    assert {replay(events, policy, 4, scope="model", seed=seed).hits for seed in range(4)} == {replay(events, policy, 4, scope="model").hits}


def test_replay_one_by_one_misses_more():
    """Direction of moe-cache-eval's table (Qwen3-30B-A3B, batch 8): counting accesses one by one inflates the misses of LRU."""
    events = Events.from_experts(clustered_routing(MODEL, 500), experts=16)
    assert replay(events.sequential(), "lru", 6).misses > 1.15 * replay(events, "lru", 6).misses


def test_events_of_a_trace(trace):
    ids = trace.experts()
    events = Events.of(trace, tokens_per_step=3, limit=1000)
    assert (len(events), events.steps, events.tokens) == (334 * 3, 334, 1000)
    for n in (0, 5, 1001):
        step, layer = divmod(n, 3)
        chosen = np.unique(ids[:1000][3 * step : 3 * step + 3, layer])
        assert events.experts_A[events.starts_N[n] : events.starts_N[n + 1]].tolist() == chosen.tolist()


def test_steps_may_be_numbered_and_unsorted():
    ids = np.asarray([[[1]], [[2]], [[0]]], np.uint16)
    events = Events.from_experts(ids, experts=3, step_T=np.asarray([7, 9, 7]))
    assert events.experts_A.tolist() == [0, 1, 2]
    assert events.step_N.tolist() == [7, 9]


def test_devices_share_the_accesses():
    events = random_events(5)
    owner_LE = np.tile(np.arange(12) % 3, (2, 1))
    parts = events.split(owner_LE, 3)
    assert sum(part.accesses for part in parts) == events.accesses
    assert all(len(part) == len(events) for part in parts)
    assert sum(part.load_LE for part in parts).tolist() == events.load_LE.tolist()
    with pytest.raises(TraceError, match="owners 0..2 outside 0..1"):
        events.split(owner_LE, 2)


def test_first_touches_count_as_hits_when_warm():
    """Convention of moe-lrc (arXiv 2505.16056): with room for all nothing misses."""
    events = random_events(6)
    assert replay(events, "lru", 12, warm=True).misses == 0
    cold, warm = (replay(events, "lru", 5, warm=warm) for warm in (False, True))
    assert warm.hits - cold.hits == 2 * 5
    assert warm.loads == cold.loads
    assert warm.summary()["convention"] == "warm-fill"


def test_pinned_experts_stay():
    events = random_events(7)
    resident = np.zeros((2, 12), bool)
    resident[:, :3] = True
    found = replay(events, "lru", 4, resident=resident, log=True)
    assert found.hit_A[events.experts_A < 3].all()
    assert not np.isin(found.moves.expert_M, [0, 1, 2]).any()
    assert found.pinned == 6
    with pytest.raises(InputError, match="pinned experts of layer 0 need 3 slots, there are 2; pin fewer"):
        replay(events, "lru", 2, resident=resident)


def test_static_says_what_it_learnt_from():
    events = random_events(8)
    assert "learning part" in replay(events, "static", 3).notes[0]
    learnt = Static(load_LE=events.part(0, 40).load_LE)
    found = replay(events.part(40, len(events)), learnt, 3)
    assert (found.notes, found.pinned) == ((), 6)
    assert replay(events, PinnedLru(pinned=0.0, load_LE=events.load_LE), 3).hits == replay(events, "lru", 3).hits


def test_ageing_forgets():
    """What was hot long ago gives way; without ageing it stays."""
    events = events_of([{0}] * 50 + [{1}, {2}] * 40)
    assert replay(events, LfuAged(period=8), 2).hits > replay(events, "lfu", 2).hits


def test_layer_distance_knows_the_order_of_layers():
    """A pool smaller than one round: LRU gives up just what comes next, layer-distance what was just used."""
    events = events_of([{0}] * 60, layers=6, experts=1)
    assert replay(events, "lru", 4, scope="model").hits == 0
    found = replay(events, "layer-distance", 4, scope="model")
    assert found.hits == replay(events, "belady", 4, scope="model").hits > 0


def test_next_use_learns_what_follows_what():
    """A cycle longer than the cache: nothing for LRU, much for who learns it."""
    events = events_of([{n % 6} for n in range(300)], experts=6)
    assert replay(events, "lru", 4).hits == 0
    assert replay(events, "next-use", 4).hits > 150


@pytest.mark.parametrize("policy", policies())
def test_the_edges_of_room_and_of_traces(policy):
    """No slots, more than experts, an expert larger than the cache, one expert alone, no tokens: defined for every policy."""
    one = events_of([{0}] * 5, experts=1)
    first = 0 if policy in ("static", "pinned-lru") else 1  # else pinned before the first access
    assert (replay(one, policy, 0).hits, replay(one, policy, 0).streamed) == (0, 5)
    assert replay(one, policy, 99).misses == first
    assert replay(one, policy, capacity_B=9, size_LE=np.full((1, 1), 10)).hits == 0
    assert miss_curves(one, policy, slots_C=[0, 99]).tolist() == [[5, first]]
    nothing = Events.from_experts(np.zeros((0, 1, 1), np.uint16), experts=1)
    assert miss_curves(nothing, policy, slots_C=[0, 1]).tolist() == [[0, 0]]


def test_an_event_larger_than_the_cache_streams_the_rest():
    found = replay(events_of([{0, 1, 2, 3}, {0, 1, 2, 3}]), "lru", 3, log=True)
    assert (found.hits, found.streamed, found.evictions) == (3, 2, 0)
    assert found.moves.expert_M[found.moves.action_M == LOAD].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either slots, or capacity_B"),
        ({"slots": -1}, "must be finite, >= 0"),
        ({"slots": 1.5}, "must be one whole number or 2 of them"),
        ({"slots": [1, 2, 3]}, "must be one whole number or 2 of them"),
        ({"slots": 1, "scope": "node"}, "scope 'node' is unknown"),
        ({"capacity_B": 5}, "give either slots"),
        ({"capacity_B": float("nan"), "size_LE": np.ones((2, 12))}, "must be finite"),
        ({"capacity_B": 5, "size_LE": np.full((2, 12), np.nan)}, "finite size above 0"),
        ({"capacity_B": 5, "size_LE": np.zeros((2, 12))}, "finite size above 0"),
        ({"capacity_B": 5, "size_LE": np.ones((1, 12))}, r"size_LE has shape \(1, 12\)"),
        ({"slots": 1, "resident": np.ones((2, 11), bool)}, r"resident has shape \(2, 11\)"),
        ({"slots": 1, "policy": Static(load_LE=np.ones((1, 12)))}, r"load_LE has shape \(1, 12\)"),
        ({"slots": 1, "policy": Static(load_LE=np.full((2, 12), np.nan))}, "negative or non-finite loads"),
        ({"slots": 1, "seed": -1}, r"seed\(=-1\) must be a whole number >= 0"),
        ({"slots": 2**62}, "at most 2\\^60"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        replay(random_events(0), **options)


@pytest.mark.parametrize(
    ("policy", "field"),
    [(S3Fifo, "small"), (WTinyLfu, "window"), (WTinyLfu, "protected"), (NextUse, "fade"), (PinnedLru, "pinned"), (LfuAged, "period")],
)
@pytest.mark.parametrize("value", [-1.0, 7.5, float("nan")])
def test_policies_refuse_settings_that_mean_nothing(policy, field, value):
    with pytest.raises(InputError, match=rf"policy '{policy.name}': {field}\(="):
        policy(**{field: value})


def test_curves_refuse_nonsense():
    for options, message in (({"slots_C": [-1]}, "whole numbers >= 0"), ({"slots_C": [1.5]}, "whole numbers"), ({"scope": "node"}, "scope 'node'")):
        with pytest.raises(InputError, match=message):
            miss_curves(random_events(0), "lru", **options)
    with pytest.raises(InputError, match="non-finite loads"):
        miss_curves(random_events(0), Static(load_LE=np.full((2, 12), np.nan)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_A": [0, 2**33]}, "more than int32 has room for"),
        ({"experts_A": [1, 0]}, "distinct and ascending"),
        ({"experts_A": [0, 9]}, "outside 0..3"),
        ({"experts_A": [0.0, 1.0]}, "whole numbers"),
        ({"starts_N": [0, 1]}, "rise from 0 to 2"),
        ({"starts_N": [0, 1, 2]}, "starts must be one more"),
        ({"layer_N": [1]}, "outside 0..0"),
        ({"experts": 0}, "must be >= 1"),
    ],
)
def test_events_that_contradict_themselves_are_refused(changes, message):
    right = {"experts_A": [0, 1], "starts_N": [0, 2], "layer_N": [0], "step_N": [0], "layers": 1, "experts": 4}
    Events(**right)
    with pytest.raises(TraceError, match=message):
        Events(**(right | changes))
    with pytest.raises(TraceError, match="outside 0..2"):
        Events.from_experts(np.full((1, 1, 1), 3, np.uint16), experts=3)
    for ids in (None, [[1]], np.zeros((2, 3)), np.full((1, 1, 1), np.nan)):
        with pytest.raises(TraceError, match="routing must be whole numbers"):
            Events.from_experts(ids, experts=3)
    with pytest.raises(TraceError, match="step numbers are float64"):
        Events.from_experts(np.zeros((2, 1, 1), np.uint16), experts=3, step_T=np.asarray([np.nan, 1]))
    with pytest.raises(TraceError, match="give 0 <= first"):
        random_events(0).part(0, 10**6)
    with pytest.raises(InputError, match="recall"):
        Oracle(recall=1.2)


def test_foresight_needs_all_events_at_once():
    events = random_events(14)
    caches = Caches("belady", 3, layers=2, experts=12)
    caches.replay(events.part(0, 10))
    with pytest.raises(InputError, match="needs all events in one call"):
        caches.replay(events.part(10, 20))
    with pytest.raises(InputError, match="events of 1 layers"):
        Caches("lru", 3, layers=2, experts=12).replay(events_of(A))
