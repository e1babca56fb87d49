"""Fluid fabric: the laws of max-min sharing, against a linear-programming solver and textbook times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.cost.collectives import Algorithm, port_loads
from moesim.errors import SimulationError
from moesim.hardware import load_cluster
from moesim.sim.fabric import Fabric, Wiring, link_use, max_min_rates
from moesim.sim.hops import hops, spread

FREE = np.inf


def by_linear_programs(use_FK: NDArray[np.float64], capacity_K: NDArray[np.float64], cap_F: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lexicographic max-min by its definition: raise the lowest rate as far as it goes, fix those that cannot go further, again."""
    from scipy.optimize import linprog

    flows = len(use_FK)
    fixed: dict[int, float] = {}

    def best(goal: NDArray[np.float64], floor: float) -> float:
        free = [f for f in range(flows) if f not in fixed]
        rows, right = [np.append(column, 0.0) for column in use_FK.T], list(capacity_K)
        for f in free:  # t <= rate of every free flow
            rows.append(np.append(-np.eye(flows)[f], 1.0))
            right.append(0.0)
        bounds = [(fixed[f], fixed[f]) if f in fixed else (floor, cap_F[f] if np.isfinite(cap_F[f]) else None) for f in range(flows)]
        found = linprog(-goal, A_ub=np.stack(rows), b_ub=right, bounds=[*bounds, (0, None)], method="highs")
        assert found.status == 0, found.message
        return float(-found.fun)

    unit = np.eye(flows + 1)
    while len(fixed) < flows:
        level = best(unit[-1], 0.0)
        stuck = [f for f in range(flows) if f not in fixed and best(unit[f], level * (1 - 1e-9)) <= level * (1 + 1e-6) + 1e-9]
        assert stuck
        fixed |= dict.fromkeys(stuck, level)
    return np.asarray([fixed[f] for f in range(flows)])


@given(seed=st.integers(0, 10**6), flows=st.integers(1, 6), links=st.integers(1, 5), capped=st.booleans(), grouped=st.booleans())
def test_rates_equal_the_linear_programs(seed: int, flows: int, links: int, capped: bool, grouped: bool) -> None:
    rng = np.random.default_rng(seed)
    use = (rng.random((flows, links)) < 0.5).astype(float)
    use[np.arange(flows), rng.integers(0, links, flows)] = 1.0
    if grouped:
        use *= rng.uniform(0.1, 1.0, use.shape)
    capacity = rng.uniform(1, 10, links)
    cap = rng.uniform(0.2, 5, flows) if capped else np.full(flows, FREE)
    np.testing.assert_allclose(max_min_rates(use, capacity, cap), by_linear_programs(use, capacity, cap), rtol=1e-5)


@given(seed=st.integers(0, 10**6), flows=st.integers(1, 40), links=st.integers(1, 20))
def test_no_link_above_capacity_and_every_flow_has_a_full_link(seed: int, flows: int, links: int) -> None:
    rng = np.random.default_rng(seed)
    use = (rng.random((flows, links)) < 0.3).astype(float)
    use[np.arange(flows), rng.integers(0, links, flows)] = 1.0
    capacity = rng.uniform(1e9, 1e11, links)
    rate = max_min_rates(use, capacity, np.full(flows, FREE))
    used = rate @ use
    assert (used <= capacity * (1 + 1e-9)).all()
    full = used >= capacity * (1 - 1e-9)
    highest = np.where(use > 0, rate[:, None], 0.0).max(axis=0)
    # work conserving and fair: on some full link of its way nobody is faster than this flow
    assert (((use > 0) & full & (rate[:, None] >= highest * (1 - 1e-9))).any(axis=1)).all()


def arrivals(capacity: Sequence[float], flows: Sequence[tuple[float, Sequence[float]]], **options: float) -> list[float]:
    """Arrival time of flows (start, bytes per link)."""
    env = simpy.Environment()
    fabric = Fabric(env, np.asarray(capacity, float))
    end = [np.nan] * len(flows)

    def starter(index: int, at: float, load: Sequence[float]):
        yield env.timeout(at)
        fabric.send(np.asarray(load, float), lambda: end.__setitem__(index, env.now), **options)
        assert (fabric.used_K <= fabric.capacity_K * (1 + 1e-9)).all()

    for index, (at, load) in enumerate(flows):
        env.process(starter(index, at, load))
    env.run()
    np.testing.assert_allclose(fabric.carried_K, np.sum([load for _, load in flows], axis=0))
    return end


def test_textbook_completion_times() -> None:
    assert arrivals([10], [(0, [100])]) == pytest.approx([10])
    assert arrivals([10], [(0, [100]), (0, [50])]) == pytest.approx([15, 10])  # both at 5, then 50 left at 10
    assert arrivals([10], [(0, [100]), (5, [50])]) == pytest.approx([15, 15])
    assert arrivals([10], [(0, [30]), (0, [30]), (0, [30])]) == pytest.approx([9, 9, 9])
    # A crosses both links, B the first (10), C the second (4): A and C get 2, B gets 8
    assert arrivals([10, 4], [(0, [8, 8]), (0, [16, 0]), (0, [0, 8])]) == pytest.approx([4, 2, 4])
    assert arrivals([10], [(0, [100])], least_s=25.0) == pytest.approx([25])
    assert arrivals([10], [(0, [100]), (0, [100])], least_s=15.0) == pytest.approx([20, 20])


@given(seed=st.integers(0, 10**6), flows=st.integers(1, 8))
def test_a_single_link_is_never_idle_while_bytes_wait(seed: int, flows: int) -> None:
    rng = np.random.default_rng(seed)
    start, size = rng.uniform(0, 5, flows), rng.uniform(1, 50, flows)
    end = arrivals([10.0], [(at, [b]) for at, b in zip(start, size, strict=True)])
    clock = 0.0  # work conservation: the last byte leaves when a FIFO link of the same speed would be empty
    for at, b in sorted(zip(start, size, strict=True)):
        clock = max(clock, at) + b / 10
    assert max(end) == pytest.approx(clock)


@given(seed=st.integers(0, 10**6))
def test_a_group_alone_takes_the_time_of_its_busiest_link_and_pairs_take_no_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wiring = Wiring.of(load_cluster("mixed-a100-h100"))
    traffic = rng.integers(0, 4, (16, 16)) * 1e6 * (rng.random((16, 16)) < 0.5)
    traffic[0, 1] = 1e6
    load = wiring.loads(traffic)
    bound = (load / wiring.capacity_K).max()
    [together] = arrivals(wiring.capacity_K, [(0, load)])
    assert together == pytest.approx(bound, rel=1e-9)
    pairs = [(0, wiring.loads(np.where(np.arange(256).reshape(16, 16) == p, traffic, 0))) for p in np.flatnonzero(traffic * (1 - np.eye(16)))]
    apart = max(arrivals(wiring.capacity_K, pairs))
    assert together <= apart * (1 + 1e-9)
    assert apart <= 1.5 * together, "what grouping hides stays bounded on port-limited networks"


def test_paths_follow_the_graph() -> None:
    cluster = replace(load_cluster("h200-4x8-o2"), oversubscription=4.0)
    wiring = Wiring.of(cluster)

    def way(g: int, h: int) -> list[str]:
        return [wiring.names_K[k] for k in wiring.path_GGH[g, h] if k >= 0]

    assert way(0, 1) == ["g0→node0", "node0→g1"]
    assert way(0, 8) == ["g0→rail0", "rail0→g8"]
    assert way(0, 9) == ["g0→rail0", "rail0→spine", "spine→rail1", "rail1→g9"]
    assert way(3, 3) == []
    matrix = np.zeros((32, 32))
    matrix[0, 9] = matrix[8, 17] = matrix[16, 25] = 50e9
    spine = wiring.names_K.index("rail0→spine")
    assert wiring.loads(matrix)[spine] == 150e9
    assert wiring.capacity_K[spine] == pytest.approx(4 * 50e9 / 4)
    # three NICs at line rate want 150 GB/s of a 50 GB/s spine
    assert arrivals(wiring.capacity_K, [(0, wiring.loads(matrix))]) == pytest.approx([3.0])


@given(seed=st.integers(0, 10**6), algorithm=st.sampled_from(["flat", "hierarchical", "forwarded"]))
def test_hops_load_the_ports_as_the_cost_model_says(seed: int, algorithm: Algorithm) -> None:
    rng = np.random.default_rng(seed)
    nodes, local = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    node_G = np.repeat(np.arange(nodes), local)
    chosen_TG = rng.random((60, nodes * local)) < 0.3  # tokens and the devices they go to
    source_T = rng.integers(0, nodes * local, 60)
    chosen_TN = chosen_TG.reshape(60, nodes, local).any(axis=2)
    pairs, per_node = (np.stack([visits[source_T == g].sum(axis=0) for g in range(nodes * local)]).astype(float) for visits in (chosen_TG, chosen_TN))
    link, nic = hops(pairs, per_node, node_G, algorithm)
    loads = port_loads(pairs, node_G, algorithm=algorithm, node_traffic_NGM=per_node if algorithm == "forwarded" else None)
    off = ~np.eye(nodes * local, dtype=bool)
    for tier, matrix in ((0, link * off), (2, nic)):
        np.testing.assert_allclose(matrix.sum(axis=1), loads.bytes_PNG[tier])
        np.testing.assert_allclose(matrix.sum(axis=0), loads.bytes_PNG[tier + 1])
    same = node_G[:, None] == node_G[None, :]
    assert not link[~same].any()
    assert not nic[same].any()
    if algorithm != "flat":  # between nodes only equal indices talk
        index = np.arange(nodes * local) % local
        assert not nic[index[:, None] != index[None, :]].any()


@given(seed=st.integers(0, 10**6))
def test_a_gather_brings_every_device_what_it_lacks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes, local = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    node_G = np.repeat(np.arange(nodes), local)
    link, nic = spread(1200.0, node_G)
    received = link.sum(axis=0) + nic.sum(axis=0)
    np.testing.assert_allclose(received, 1200.0 * (1 - 1 / (nodes * local)))
    unequal_link, unequal_nic = spread(1200.0, np.asarray([0, 0, 0, 1]))
    np.testing.assert_allclose((unequal_link + unequal_nic).sum(axis=0), 900.0)


def test_a_flow_without_a_path_is_named() -> None:
    two = replace(load_cluster("mixed-a100-h100"), network=None)
    matrix = np.zeros((16, 16))
    matrix[1, 12] = 5e6
    with pytest.raises(SimulationError, match="device 1 to device 12: no path"):
        Wiring.of(two).loads(matrix)
    with pytest.raises(SimulationError, match="uses no link"):
        max_min_rates(np.zeros((1, 2)), np.ones(2), np.asarray([FREE]))
    with pytest.raises(SimulationError, match="send only what is > 0"):
        Fabric(simpy.Environment(), np.ones(2)).send(np.zeros(2), lambda: None)


def test_link_use_is_bytes_over_capacity_and_time() -> None:
    assert link_use(("a", "b"), np.asarray([10.0, 0.0]), np.asarray([5.0, 1.0]), 4.0) == {"a": 0.5, "b": 0.0}
