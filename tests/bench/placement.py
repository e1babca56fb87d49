"""Solvers at the size of DeepSeek-V3: 58 layers x 256 experts, 320 slots, 64 devices."""

from __future__ import annotations

import numpy as np

from tests.bench.registry import Measured, bench, best_of


def plain_eplb(weight: np.ndarray, slots: int, devices: int) -> list[list[int]]:
    """EPLB's global mode for one layer with lists and loops, as one would write it first."""
    experts = len(weight)
    count = [1] * experts
    owner = list(range(experts))
    for _ in range(slots - experts):
        hottest = max(range(experts), key=lambda e: weight[e] / count[e])
        owner.append(hottest)
        count[hottest] += 1
    order = sorted(range(slots), key=lambda s: -weight[owner[s]] / count[owner[s]])
    load, held = [0.0] * devices, [[] for _ in range(devices)]
    for slot in order:
        device = min((d for d in range(devices) if len(held[d]) < slots // devices), key=lambda d: load[d])
        held[device].append(owner[slot])
        load[device] += weight[owner[slot]] / count[owner[slot]]
    return held


@bench
def eplb() -> Measured:
    """Seconds of EPLB, against the same in plain Python."""
    from moesim_solvers.placement.eplb import rebalance_experts

    weight = np.random.default_rng(0).pareto(1.5, (58, 256)) + 0.1
    seconds = best_of(lambda: rebalance_experts(weight, 320, 1, 1, 64))
    peer = best_of(lambda: [plain_eplb(row, 320, 64) for row in weight], repeats=1)
    return Measured(value=seconds, unit="s", peer="plain Python", peer_value=peer)


@bench
def local_search() -> Measured:
    """Seconds of local-search until it is done by itself, 26 layers x 64 experts on 8 devices."""
    from moesim_solvers.placement.search import search_slots
    from tests.bench.traces import routing

    ids = routing(4096)
    load = np.stack([np.bincount(ids[:, layer].ravel(), minlength=64) for layer in range(26)])
    return Measured(value=best_of(lambda: search_slots(ids, load, np.full(8, 8), np.zeros(8, int)), repeats=2), unit="s")
