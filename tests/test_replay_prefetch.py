"""Prefetchers in the replay: what they foretell, and what becomes of what is fetched."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.replay import EVICT, Affinity, All, Events, Oracle, Path, PreGated, Residual, replay
from moesim.testing import clustered_routing
from moesim.testing.policies import random_events
from moesim.trace import TraceStats


def test_prefetches_are_used_wasted_or_still_there():
    events = random_events(9)
    for prefetcher in (Oracle(recall=0.7, false=0.4), Path(), Residual(distance=1), All()):
        found = replay(events, "lru", 5, prefetcher=prefetcher)
        assert found.fetched == int(found.prefetched_A.sum()) + found.wasted + found.unused
        assert found.transferred == found.loads + found.fetched
        assert found.summary()["recall"] == found.prefetched_A.mean()


def test_the_gate_before_the_block_leaves_the_first_layer():
    events = random_events(10)
    found = replay(events, "lru", 6, prefetcher=PreGated())
    assert found.misses_L[1] == 0 < found.misses_L[0]
    assert found.wasted == 0
    assert found.recall(lead=1) == found.recall() > 0 == found.recall(lead=2)


def test_a_paths_lead_is_its_layer():
    events = random_events(11, layers=4)
    found = replay(events, "lru", 6, prefetcher=Path(recall=1.0, false=0.0))
    lead_A = found.lead_N[np.repeat(np.arange(len(events)), np.diff(events.starts_N))]
    assert (lead_A == events.layer_A).all()
    assert found.recall(lead=3) == (found.prefetched_A & (events.layer_A == 3)).mean()


def test_shares_of_an_oracle_are_kept():
    events = random_events(12, steps=2000)
    foretold = Oracle(recall=0.6, false=0.25).predict(events, seed=3)
    event_F = np.repeat(np.arange(len(events)), np.diff(foretold.starts_N))
    asked = np.zeros((len(events), events.experts), bool)
    asked[np.repeat(np.arange(len(events)), np.diff(events.starts_N)), events.experts_A] = True
    right = asked[event_F, foretold.experts_F]
    assert abs((~right).mean() - 0.25) < 0.03
    assert abs(right.sum() / (events.layer_A > 0).sum() - 0.6) < 0.03
    assert len(np.unique(event_F * events.experts + foretold.experts_F)) == len(event_F)


def test_affinity_foretells_a_chain(model):
    """Every expert is followed by the next one: transitions know it all; where nothing was seen nothing is fetched."""
    ids = (np.arange(200)[:, None, None] * 5 % 16 + np.arange(3)[None, :, None]).astype(np.uint16) % 16
    stats = TraceStats.from_experts(ids, model)
    events = Events.from_experts(ids, experts=16)
    for distance in (1, 2):
        found = replay(events, "lru", 2, prefetcher=Affinity(transitions_LEE=stats.transitions_LEE, distance=distance))
        assert found.misses_L[distance:].sum() == 0 < found.misses_L[0]
    nothing = Affinity(transitions_LEE=np.zeros((2, 16, 16)))
    assert replay(events, "lru", 2, prefetcher=nothing).fetched == 0
    with pytest.raises(InputError, match=r"transitions have shape \(2, 16, 16\), the events 2 layers"):
        replay(random_events(0), "lru", 2, prefetcher=nothing)


def test_affinity_beats_chance_on_planted_structure(model):
    ids = clustered_routing(model, 1000)
    stats = TraceStats.from_experts(ids[:500], model)
    events = Events.from_experts(ids[500:], experts=16)
    found = replay(events, "lru", 4, prefetcher=Affinity(transitions_LEE=stats.transitions_LEE))
    assert found.misses < replay(events, "lru", 4).misses


def test_prefetch_goes_over_nothing_the_event_needs():
    events = random_events(13)
    found = replay(events, "lru", 4, prefetcher=All(), log=True)
    evicted = found.moves.action_M == EVICT
    members = [set(events.experts_A[a:b].tolist()) for a, b in zip(events.starts_N[:-1], events.starts_N[1:], strict=True)]
    for n, expert in zip(found.moves.event_M[evicted], found.moves.expert_M[evicted], strict=True):
        assert expert not in members[n] or len(members[n]) > 4
    assert found.dropped > 0
