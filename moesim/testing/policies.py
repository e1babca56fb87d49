"""Conformance suite of cache policies.

    class TestMine(PolicySuite):
        policy = MyPolicy()              # or the name of a registered one

T tokens, L MoE layers, K selections, E experts.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import numpy as np
import pytest

from moesim.replay import EVICT, LOAD, PREFETCH, STREAM, Caches, Compiled, Events, Oracle, Policy, Replay, load_policy, replay
from moesim.replay.caches import Scope

SIZES = (1, 2, 3, 4, 8, 16)


def random_events(seed: int, *, steps: int = 60, layers: int = 2, experts: int = 12, tokens_per_step: int = 2, top_k: int = 2) -> Events:
    """Events with a hot set that drifts, repeats, and steps that ask a layer for nothing."""
    rng = np.random.default_rng(seed)
    tokens = steps * tokens_per_step
    heat_TLE = (
        rng.gumbel(size=(tokens, layers, experts)) + rng.normal(size=(layers, experts)) + np.cumsum(rng.normal(size=(tokens, 1, experts)) / 5, axis=0)
    )
    ids_TLK = np.argsort(-heat_TLE, axis=2)[:, :, :top_k].astype(np.uint16)
    ids_TLK[rng.random(ids_TLK.shape) < 0.1] = 65535
    return Events.from_experts(ids_TLK, experts=experts, tokens_per_step=tokens_per_step)


class PolicySuite:
    """What every cache policy must do; `keeps_all` is False for one that may use an expert without keeping it."""

    policy: ClassVar[str | Policy | Compiled]
    keeps_all: ClassVar[bool] = True

    def run(self, events: Events, slots: int, **options: object) -> Replay:
        """One replay with the log of all moves."""
        return replay(events, type(self).policy, slots, log=True, **options)  # type: ignore[arg-type]

    @cached_property
    def pins(self) -> bool:
        """True for a policy with experts that are there from the start."""
        return bool(getattr(self._loaded(), "pinned", 0))

    def _loaded(self) -> Policy | Compiled:
        named = type(self).policy
        return load_policy(named) if isinstance(named, str) else named

    def test_it_says_what_it_is(self) -> None:
        """A name, and the hooks or a compiled cache."""
        policy = self._loaded()
        assert policy.name
        assert isinstance(policy, (Policy, Compiled))

    @pytest.mark.parametrize("scope", ["layer", "model"])
    @pytest.mark.parametrize("slots", SIZES)
    def test_the_log_explains_every_hit(self, slots: int, scope: str) -> None:
        """Played back, the moves keep the capacity, give up nothing the event needs, and hold exactly what was found."""
        events = random_events(slots)
        found = self.run(events, slots, scope=scope)
        assert found.moves is not None
        moves = found.moves
        pools = 1 if scope == "model" else events.layers
        first_N = np.searchsorted(moves.event_M, np.arange(len(events) + 1))
        inside: set[tuple[int, int]] = set()
        if self.pins:
            counted = {(int(e_layer), int(e)) for e_layer, e in zip(events.layer_A[found.hit_A], events.experts_A[found.hit_A], strict=True)}
            brought = set(zip(moves.layer_M.tolist(), moves.expert_M.tolist(), strict=True))
            inside = counted - brought  # found without having been loaded: pinned
        pinned = frozenset(inside)
        for n in range(len(events)):
            layer = int(events.layer_N[n])
            lo, hi = events.starts_N[n], events.starts_N[n + 1]
            members = [(layer, int(e)) for e in events.experts_A[lo:hi]]
            assert found.hit_A[lo:hi].tolist() == [member in inside for member in members]
            for row in range(first_N[n], first_N[n + 1]):
                who, action = (int(moves.layer_M[row]), int(moves.expert_M[row])), int(moves.action_M[row])
                if action == EVICT:
                    assert who in inside - pinned
                    assert who not in members or not type(self).keeps_all or len(members) > slots
                    inside.remove(who)
                elif action in (LOAD, PREFETCH):
                    assert who not in inside
                    inside.add(who)
                else:
                    assert action == STREAM
                    assert who not in inside
            for pool in range(pools):
                assert sum(scope == "model" or who[0] == pool for who in inside) <= slots  # pinned ones included
            if type(self).keeps_all and not self.pins and len(members) <= slots:
                assert inside.issuperset(members)

    @pytest.mark.parametrize("slots", SIZES)
    def test_figures_add_up(self, slots: int) -> None:
        """Every miss is loaded, what came in and did not go out is inside."""
        found = self.run(random_events(7), slots)
        assert found.hits + found.misses == found.events.accesses
        assert found.loads == found.misses
        assert 0 <= found.insertions - found.evictions <= slots * found.events.layers - found.pinned
        assert int(found.misses_N.sum()) == int(found.misses_L.sum()) == int(found.misses_S.sum()) == found.misses

    def test_room_for_all_leaves_first_touches(self) -> None:
        """With as many slots as experts, or more, only the first access to an expert can miss, and nothing is given up."""
        events = random_events(3)
        for slots in (events.experts, events.experts + 5):
            found = self.run(events, slots)
            assert found.misses == found.compulsory_misses
            assert found.evictions == 0

    def test_no_room_finds_nothing(self) -> None:
        """Zero slots: all is streamed."""
        found = self.run(random_events(4), 0)
        assert (found.hits, found.insertions, found.streamed) == (0, 0, found.events.accesses)

    def test_no_events_are_survived(self) -> None:
        """A trace without tokens, and one whose tokens choose nothing."""
        for ids in (np.zeros((0, 2, 1), np.uint16), np.full((3, 2, 1), 65535, np.uint16)):
            found = self.run(Events.from_experts(ids, experts=4), 2)
            assert (found.hits, found.misses) == (0, 0)
            assert np.isnan(found.miss_ratio)

    @pytest.mark.parametrize("slots", SIZES)
    def test_nobody_loads_less_than_the_optimum(self, slots: int) -> None:
        """`optimal` copies the fewest experts, start included; `belady` misses the fewest of those that keep all they load."""
        scopes: tuple[Scope, ...] = ("layer", "model")
        for scope in scopes:
            events = random_events(11 + slots)
            found = self.run(events, slots, scope=scope)
            assert found.transferred >= replay(events, "optimal", slots, scope=scope).transferred
            if type(self).keeps_all and not self.pins:
                assert found.misses >= replay(events, "belady", slots, scope=scope).misses

    def test_one_layer_is_a_model(self) -> None:
        """A pool of one layer is that layer's cache."""
        events = random_events(5, layers=1)
        one, pool = self.run(events, 4), self.run(events, 4, scope="model")
        assert one.hit_A.tolist() == pool.hit_A.tolist()

    def test_bytes_of_equal_experts_are_slots(self) -> None:
        """1,000 B each in 4,000 B are 4 slots, to the hit; an expert larger than the cache is streamed."""
        events = random_events(6)
        sizes = np.full((2, 12), 1000.0)
        slots, sized = self.run(events, 4), replay(events, type(self).policy, capacity_B=4000, size_LE=sizes)
        assert slots.hit_A.tolist() == sized.hit_A.tolist()
        assert sized.loaded_B == 1000 * slots.loads
        assert replay(events, type(self).policy, capacity_B=999, size_LE=sizes).hits == 0

    def test_mixed_sizes_keep_the_capacity(self) -> None:
        """Bytes of what is inside never exceed the capacity."""
        events, rng = random_events(8), np.random.default_rng(8)
        sizes = rng.integers(1, 9, (2, 12))
        found = replay(events, type(self).policy, capacity_B=20, size_LE=sizes, log=True)
        assert found.moves is not None
        held = np.zeros(2)
        for layer, expert, action in zip(found.moves.layer_M, found.moves.expert_M, found.moves.action_M, strict=True):
            held[layer] += sizes[layer, expert] * ((action == LOAD) - int(action == EVICT))
            assert held[layer] <= 20

    def test_parts_are_the_whole(self) -> None:
        """A trace replayed in two calls is the trace replayed in one, unless the policy must know all of it."""
        if self.pins or getattr(self._loaded(), "foresight", False):
            return
        whole = random_events(9)
        cut = len(whole) // 2
        caches = Caches(type(self).policy, 4, layers=2, experts=12)
        parts = whole.part(0, cut), whole.part(cut, len(whole))
        hits = np.concatenate([caches.replay(part).hit_A for part in parts])
        assert hits.tolist() == self.run(whole, 4).hit_A.tolist()

    def test_an_oracle_leaves_no_miss(self) -> None:
        """Perfect prefetch of events that fit finds everything but a step's first layer; recall 0 is no prefetch."""
        if getattr(self._loaded(), "pinned", 0) == 1:
            return
        events = random_events(10)
        found = self.run(events, 8, prefetcher=Oracle())
        if type(self).keeps_all and not self.pins:
            assert found.misses_L[1] == 0
        assert found.fetched == int((found.moves.action_M == PREFETCH).sum() if found.moves else -1)
        assert found.recall() > 0
        assert self.run(events, 8, prefetcher=Oracle(recall=0)).hit_A.tolist() == self.run(events, 8).hit_A.tolist()

    def test_the_same_seed_gives_the_same_hits(self) -> None:
        """Twice the same, with and without a permuted tie rule."""
        events = random_events(12)
        for seed in (0, 5):
            first, second = (self.run(events, 3, seed=seed) for _ in range(2))
            assert first.hit_A.tobytes() == second.hit_A.tobytes()
