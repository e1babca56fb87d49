"""Replay of expert caches: 10 million requests one at a time, real events, and all cache sizes in one pass."""

from __future__ import annotations

import time
from collections import OrderedDict
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.replay import Events, miss_curves, policies, replay
from tests.bench.registry import Measured, bench, best_of

REQUESTS = 10**7


@cache
def requests() -> Events:
    """Zipf 0.8 over 64 experts of one layer, one at a time, as libCacheSim is measured with."""
    share = 1 / np.arange(1, 65) ** 0.8
    ids = np.random.default_rng(0).choice(64, REQUESTS, p=share / share.sum()).astype(np.int32)
    every = np.arange(REQUESTS)
    return Events(experts_A=ids, starts_N=np.arange(REQUESTS + 1), layer_N=0 * every, step_N=every, layers=1, experts=64)


def tokens(experts: int, top_k: int, layers: int, count: int, tokens_per_step: int = 1, step_T: NDArray[np.integer] | None = None) -> Events:
    """Skewed choices."""
    rng = np.random.default_rng(0)
    liking = rng.random((layers, experts))
    ids = np.argsort(-(liking + rng.random((count, layers, experts))), axis=2)[:, :, :top_k].astype(np.uint16)
    return Events.from_experts(ids, experts=experts, tokens_per_step=tokens_per_step, step_T=step_T)


def plain_lru(ids: list[int], slots: int) -> int:
    """Hits of LRU with an ordered dictionary, as one would write it first."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for e in ids:
        if e in held:
            hits += 1
            held.move_to_end(e)
        else:
            if len(held) == slots:
                held.popitem(last=False)
            held[e] = None
    return hits


def per_second(policy: str) -> Measured:
    """Requests per second with 16 slots, against LRU in plain Python."""
    events = requests()
    sample = events.experts_A[:500_000].tolist()
    begin = time.perf_counter()
    hits = plain_lru(sample, 16)
    peer = len(sample) / (time.perf_counter() - begin)
    assert hits == replay(events.part(0, len(sample)), "lru", 16).hits
    seconds = best_of(lambda: replay(events, policy, 16), repeats=3)
    return Measured(value=REQUESTS / seconds, unit="requests/s", peer="LRU in plain Python", peer_value=peer)


@bench
def replay_lru() -> Measured:
    """LRU, one request at a time."""
    return per_second("lru")


@bench
def replay_s3_fifo() -> Measured:
    """S3-FIFO, one request at a time."""
    return per_second("s3-fifo")


@bench
def replay_arc() -> Measured:
    """ARC, one request at a time."""
    return per_second("arc")


@bench
def replay_belady() -> Measured:
    """Belady, the pass backward for next uses included."""
    return per_second("belady")


@bench
def replay_events_lru() -> Measured:
    """Accesses per second of LRU on events, top-6 of 64 in 8 layers; against the same accesses one at a time."""
    events = tokens(64, 6, 8, 50_000)
    single = events.sequential()
    seconds, peer = best_of(lambda: replay(events, "lru", 16)), best_of(lambda: replay(single, "lru", 16))
    return Measured(value=events.accesses / seconds, unit="accesses/s", peer="one at a time", peer_value=events.accesses / peer)


@bench
def replay_events_slowest() -> Measured:
    """Accesses per second of the slowest policy on events, top-8 of 256 in 2 layers, a quarter of them in slots; against LRU."""
    events = tokens(256, 8, 2, 20_000)
    seconds = {policy: best_of(lambda policy=policy: replay(events, policy, 64), repeats=3) for policy in policies()}
    slowest = max(seconds, key=lambda policy: seconds[policy])
    return Measured(value=events.accesses / seconds[slowest], unit=f"accesses/s ({slowest})", peer="LRU", peer_value=events.accesses / seconds["lru"])


@bench
def replay_events_next_use() -> Measured:
    """Accesses per second of `next-use`, which learns a row of the table for every access, top-10 of 512; against LRU."""
    events = tokens(512, 10, 1, 20_000)
    seconds, peer = (best_of(lambda policy=policy: replay(events, policy, 128), repeats=3) for policy in ("next-use", "lru"))
    return Measured(value=events.accesses / seconds, unit="accesses/s", peer="LRU", peer_value=events.accesses / peer)


def curves(tokens_per_step: int = 1, step_T: NDArray[np.integer] | None = None) -> Measured:
    """Seconds of LRU for all sizes 0..256, top-8 of 256 in one layer, against the quickest of three sizes."""
    events = tokens(256, 8, 1, 40_000, tokens_per_step, step_T)
    seconds = best_of(lambda: miss_curves(events, "lru"))
    one = min(best_of(lambda slots=slots: replay(events, "lru", slots)) for slots in (32, 64, 128))
    return Measured(value=seconds, unit="s", peer="one size", peer_value=one)


@bench
def lru_curves_1() -> Measured:
    """Every token a step."""
    return curves(1)


@bench
def lru_curves_4() -> Measured:
    """Events of about 30 experts, no two of one size."""
    return curves(4)


@bench
def lru_curves_16() -> Measured:
    """Events of about 100 experts: many sizes are smaller than an event."""
    return curves(16)


@bench
def lru_curves_64() -> Measured:
    """Events of most experts."""
    return curves(64)


def mixed(narrow: int, wide: int, share: float) -> NDArray[np.integer]:
    """Step of each of 40,000 tokens: steps of up to `narrow` tokens, and a `share` of them with `wide`."""
    rng = np.random.default_rng(1)
    long_S = np.where(rng.random(40_000) < share, wide, rng.integers(1, narrow + 1, 40_000))
    return np.repeat(np.arange(40_000), long_S)[:40_000]


@bench
def lru_curves_prefill() -> Measured:
    """One token a step, and every hundredth step a prefill of 256 that asks for nearly all experts."""
    return curves(step_T=mixed(1, 256, 0.01))


@bench
def lru_curves_mixed() -> Measured:
    """One to four tokens a step, and every tenth step 64: hardly two steps in a row of one width."""
    return curves(step_T=mixed(4, 64, 0.1))


@bench
def replay_gather() -> Measured:
    """Selections per second from routing to events."""
    ids = np.random.default_rng(0).integers(0, 64, (50_000, 8, 6)).astype(np.uint16)
    return Measured(value=ids.size / best_of(lambda: Events.from_experts(ids, experts=64)), unit="selections/s")
