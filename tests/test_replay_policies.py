"""Every registered policy keeps the contract; so does one in plain Python."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Set
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.replay.policy as module
from moesim.errors import InputError, PluginError
from moesim.replay import CacheState, Event, Events, Oracle, Policy, Prefetches, load_policy, policies, replay
from moesim.testing.policies import PolicySuite, random_events


class PlainLru:
    """Least recently used in two hooks, as a stranger would write it."""

    name = "plain-lru"

    def __init__(self) -> None:
        self.last: dict[int, tuple[int, int]] = {}

    def admit(self, event: Event, state: CacheState) -> None:
        for e in event.experts:
            self.last[e] = (event.number, e)

    def victim(self, state: CacheState, protected: Set[int]) -> int | None:
        return min(state.resident - protected, key=lambda e: self.last[e])


class PlainLfu:
    name = "plain-lfu"

    def __init__(self) -> None:
        self.count: Counter[int] = Counter()
        self.last: dict[int, tuple[int, int]] = {}

    def admit(self, event: Event, state: CacheState) -> None:
        self.count.update(event.experts)
        for e in event.experts:
            self.last[e] = (event.number, e)

    def victim(self, state: CacheState, protected: Set[int]) -> int | None:
        return min(state.resident - protected, key=lambda e: (self.count[e], self.last[e]))


class Reluctant(PlainLru):
    """Keeps what it has."""

    name = "reluctant"

    def victim(self, state: CacheState, protected: Set[int]) -> int | None:
        return None


class TestPlain(PolicySuite):
    policy = PlainLru()

    def test_an_oracle_leaves_no_miss(self) -> None:
        """The example knows nothing of experts that only a prefetch brought."""


class TestReluctant(PolicySuite):
    policy = Reluctant()
    keeps_all = False


def _suite(name: str) -> type[PolicySuite]:
    return type(f"Test_{name}", (PolicySuite,), {"policy": name, "keeps_all": name not in ("optimal", "static", "pinned-lru")})


for _name in policies():
    globals()[f"Test_{_name.replace('-', '_')}"] = _suite(_name)


@pytest.mark.parametrize(("plain", "compiled"), [(PlainLru(), "lru"), (PlainLfu(), "lfu")])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_plain_python_means_the_same(plain, compiled, slots, scope):
    for seed in range(5):
        events = random_events(seed)
        one, two = (replay(events, policy, slots, scope=scope, warm=seed % 2 == 1, log=True) for policy in (plain, compiled))
        assert one.hit_A.tolist() == two.hit_A.tolist()
        assert one.summary() == {**two.summary(), "policy": plain.name}
        assert one.moves.action_M.tolist() == two.moves.action_M.tolist()
        assert one.moves.expert_M.tolist() == two.moves.expert_M.tolist()


class PlainBelady:
    """Knows when its cache's events come to ask for each expert."""

    name = "plain-belady"

    def __init__(self, events: Events) -> None:
        self.uses: dict[tuple[int, int], list[int]] = defaultdict(list)
        seen = Counter[int]()
        for n, layer in enumerate(events.layer_N.tolist()):
            seen[layer] += 1
            for e in events.experts_A[events.starts_N[n] : events.starts_N[n + 1]].tolist():
                self.uses[layer, e].append(seen[layer])
        self.now = self.layer = 0

    def admit(self, event: Event, state: CacheState) -> None:
        self.now, self.layer = event.number, event.layer

    def victim(self, state: CacheState, protected: Set[int]) -> int | None:
        return max(state.resident - protected, key=lambda e: next((use for use in self.uses[self.layer, e] if use > self.now), 1000))


class Guesses:
    """Foretells up to four experts of every event, right or wrong."""

    name = "guesses"

    def predict(self, events: Events, *, seed: int) -> Prefetches:
        rng = np.random.default_rng(seed)
        some_N = [rng.permutation(events.experts)[: rng.integers(0, 5)] for _ in range(len(events))]
        return Prefetches(
            experts_F=np.concatenate(some_N).astype(np.int32),
            starts_N=np.concatenate([[0], np.cumsum([len(some) for some in some_N])]),
            lead_N=np.ones(len(events), np.int32),
        )


@given(st.lists(st.integers(0, 9), max_size=80), st.integers(1, 9))
@settings(max_examples=40)
def test_belady_gives_up_nothing_foretold_for_the_same_event(accesses, slots):
    """One expert at a time, and every expert once more at the end: no two are needed next at the same time."""
    ids = np.asarray([*accesses, *range(10)], np.uint16)
    events = Events.from_experts(np.stack([ids, ids], axis=1)[:, :, None], experts=10)
    plain, compiled = (replay(events, policy, slots, prefetcher=Guesses()) for policy in (PlainBelady(events), "belady"))
    assert plain.hit_A[: 2 * len(accesses)].tolist() == compiled.hit_A[: 2 * len(accesses)].tolist()


def test_a_forbidden_victim_is_the_policys_fault():
    class Wrong(PlainLru):
        name = "wrong"

        def victim(self, state, protected):
            return next(iter(protected))

    with pytest.raises(PluginError, match="'wrong' gave up expert .* needed now"):
        replay(random_events(0), Wrong(), 2)


@pytest.fixture
def registered(monkeypatch):
    """Replaces the registered policies for one test."""

    def register(*points):
        module._points.cache_clear()
        monkeypatch.setattr("moesim.plugins.entry_points", lambda group: list(points))

    yield register
    module._points.cache_clear()


def test_strangers_come_through_the_same_door(registered):
    mine = EntryPoint(name="plain-lru", value="tests.test_replay_policies:PlainLru", group=module.GROUP)
    broken = EntryPoint(name="broken", value="tests.test_replay_policies:Counter", group=module.GROUP)
    registered(mine, broken)
    assert policies() == ["broken", "plain-lru"]
    assert isinstance(load_policy("plain-lru"), Policy)
    with pytest.raises(PluginError, match="neither the hooks"):
        load_policy("broken")
    registered(mine, mine)
    with pytest.raises(PluginError, match="registered by .* and"):
        policies()
    registered()
    with pytest.raises(PluginError, match="no policy is registered"):
        policies()


def test_an_unknown_policy_names_those_there_are():
    with pytest.raises(InputError, match="'nonesuch' is not installed; installed: arc, belady"):
        replay(random_events(0), "nonesuch", 2)


_ELSEWHERE = """
import hashlib
from moesim.replay import Oracle, policies, replay
from moesim.testing.policies import random_events
events, names = random_events(1), policies()
bits = [replay(events, name, 3, seed=4, prefetcher=Oracle(recall=.5, false=.3)).hit_A.tobytes() for name in names]
print(hashlib.sha256(b"".join(bits)).hexdigest())
"""


def test_the_same_seed_gives_the_same_bytes_in_any_process():
    events = random_events(1)
    bits = [replay(events, name, 3, seed=4, prefetcher=Oracle(recall=0.5, false=0.3)).hit_A.tobytes() for name in policies()]
    done = subprocess.run([sys.executable, "-c", _ELSEWHERE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(b"".join(bits)).hexdigest()
