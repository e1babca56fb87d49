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


@bench
def local_search_large() -> Measured:
    """Seconds of local-search at the size of DeepSeek-V3 on eight nodes, with 64 replicas; the promise is half a minute."""
    from moesim.model import load_model
    from moesim.optimize import run_solver
    from moesim.testing import clustered_routing, problem_of

    model = load_model("deepseek-v3")
    problem = problem_of(clustered_routing(model, 8192, clusters=16), model, "b200-8x8", slots=320)
    return Measured(value=best_of(lambda: run_solver("local-search", problem, time_limit_s=300.0), repeats=1), unit="s")


@bench
def batch_split() -> Measured:
    """Seconds of the optimal split of 1,000 batches over 16 replicas on 8 devices, against HiGHS on as many of them as it does in a second."""
    import time

    from scipy.optimize import linprog

    from moesim.cost.split import split_SLP
    from moesim.plan import Placement

    rng = np.random.default_rng(0)
    slots_P = np.concatenate([rng.permutation(64), rng.integers(0, 64, 16)])
    placement = Placement(slots_LP=slots_P[None], slots_G=np.full(8, 10), experts=64, layers=(0,), dispatch="lp")
    count_SLE = rng.multinomial(384, np.full(64, 1 / 64), (1000, 1))
    sums = np.hstack([slots_P == np.arange(64)[:, None], np.zeros((64, 1))])
    devices = np.hstack([placement.device_P == np.arange(8)[:, None], -np.ones((8, 1))])
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < 1.0:
        linprog(np.append(np.zeros(80), 1.0), A_ub=devices, b_ub=np.zeros(8), A_eq=sums, b_eq=count_SLE[done % 1000, 0])
        done += 1
    peer = (time.perf_counter() - begin) / done * 1000
    return Measured(value=best_of(lambda: split_SLP(count_SLE, placement)), unit="s", peer="HiGHS by scipy.linprog", peer_value=peer)
