"""Scores from statistics: exact loads, bounded fan-out, agreement with routing every token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost import CostModel, route
from moesim.cost.statistics import _chance, score_statistics
from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.plan import Placement, slots_per_device
from moesim.trace import TraceStats

MODEL = tiny_model(layers=2, experts=32, top_k=4, hidden=2048, intermediate=1024)
TWO_NODES = replace(load_cluster("mixed-a100-h100"), devices=load_cluster("h100x8").devices * 2)
COST = CostModel.of(TWO_NODES, MODEL)


def case(seed: int, replicas: int = 0, tokens: int = 2000, model=MODEL) -> tuple[np.ndarray, TraceStats, Placement]:
    rng = np.random.default_rng(seed)
    slots = np.stack([rng.permutation(np.concatenate([np.arange(32), rng.integers(0, 32, replicas)])) for _ in range(2)])
    ids = clustered_routing(model, tokens, clusters=8, seed=seed)
    placement = Placement(slots_LP=slots, slots_G=slots_per_device(32 + replicas, 16), experts=32, layers=model.moe_layers)
    return ids, TraceStats.from_experts(ids, model), placement


@given(seed=st.integers(0, 10**6))
def test_without_replicas_loads_are_exact_and_fan_out_is_in_its_bounds(seed: int) -> None:
    ids, stats, placement = case(seed)
    found = score_statistics(stats, placement, COST)
    truth = route(ids, placement, TWO_NODES.node_G)
    load = truth.device_tokens_SLG(placement)[0]
    np.testing.assert_allclose(found.load_ratio_L, load.max(axis=1) / load.mean(axis=1))
    assert found.fanout_from == "pairs"
    assert (found.fanout_bounds_L2[:, 0] <= truth.fanout_devices_L + 1e-9).all()
    assert (truth.fanout_devices_L <= found.fanout_bounds_L2[:, 1] + 1e-9).all()
    assert (found.fanout_bounds_L2[:, 0] <= found.fanout_L + 1e-9).all()
    assert (found.fanout_L <= found.fanout_bounds_L2[:, 1] + 1e-9).all()
    np.testing.assert_allclose(found.fanout_L, truth.fanout_devices_L)  # two slots a device: pairs say everything
    np.testing.assert_allclose(found.fanout_nodes_L, truth.fanout_nodes_L, rtol=0.12)
    assert (found.fanout_nodes_bounds_L2[:, 0] <= truth.fanout_nodes_L + 1e-9).all()
    assert (truth.fanout_nodes_L <= found.fanout_nodes_bounds_L2[:, 1] + 1e-9).all()


@given(seed=st.integers(0, 10**6), replicas=st.sampled_from([0, 16, 32]))
def test_times_agree_with_routing_every_token(seed: int, replicas: int) -> None:
    ids, stats, placement = case(seed, replicas)
    found = score_statistics(stats, placement, COST)
    times = COST.layer_times(route(ids, placement, TWO_NODES.node_G, tokens_per_step=16 * 4096.0), placement)
    exact = (times.dispatch.time_s_N + times.compute_s_SLG.max(axis=2) + times.combine.time_s_N)[0]
    np.testing.assert_allclose(found.layer_s_L, exact, rtol=0.12)
    np.testing.assert_allclose(found.fanout_L, route(ids, placement, TWO_NODES.node_G).fanout_devices_L, rtol=0.06)


def test_top_two_is_exact_from_pairs() -> None:
    """Of two selections, pairs say everything: P(X >= 1) = S1 - S2."""
    model = tiny_model(layers=2, experts=32, top_k=2)
    ids, stats, placement = case(7, model=model)
    found = score_statistics(stats, placement, CostModel.of(TWO_NODES, model))
    np.testing.assert_allclose(found.fanout_L, route(ids, placement, TWO_NODES.node_G).fanout_devices_L)
    np.testing.assert_allclose(found.fanout_bounds_L2[:, 0], found.fanout_bounds_L2[:, 1])


def test_a_sample_makes_the_fan_out_exact() -> None:
    ids, stats, placement = case(3, replicas=16)
    found = score_statistics(stats, placement, COST, sample_TLK=ids)
    truth = route(ids, placement, TWO_NODES.node_G)
    assert found.fanout_from == "tokens"
    np.testing.assert_allclose(found.fanout_L, truth.fanout_devices_L)
    np.testing.assert_allclose(found.fanout_nodes_L, truth.fanout_nodes_L)
    few = score_statistics(stats, placement, COST, sample_TLK=ids[:500])
    assert (few.fanout_bounds_L2[:, 0] <= truth.fanout_devices_L).all()
    assert (truth.fanout_devices_L <= few.fanout_bounds_L2[:, 1]).all()
    nearest = replace(placement, dispatch="nearest")
    with pytest.raises(InputError, match="pass sample_TLK="):
        score_statistics(stats, nearest, COST)
    near = score_statistics(stats, nearest, COST, sample_TLK=ids)
    np.testing.assert_allclose(near.fanout_nodes_L, route(ids, nearest, TWO_NODES.node_G).fanout_nodes_L)


def test_low_latency_is_scored_too() -> None:
    _, stats, placement = case(4)
    cost = CostModel.of(TWO_NODES, MODEL, transport="deepep-low-latency")
    assert (score_statistics(stats, placement, cost).layer_s_L > 0).all()


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_known_distributions_come_out(n: int, p: float) -> None:
    mean, pairs = n * p, n * (n - 1) / 2 * p * p
    estimate, least, most = (x.item() for x in _chance(np.array([mean]), np.array([pairs]), n))
    assert estimate == pytest.approx(1 - (1 - p) ** n)
    assert least - 1e-12 <= estimate <= most + 1e-12
    assert _chance(np.zeros(1), np.zeros(1), 4)[0][0] == 0


def test_statistics_of_something_else_are_refused() -> None:
    _, stats, placement = case(1)
    with pytest.raises(InputError, match="cluster of 8"):
        score_statistics(stats, placement, CostModel.of(load_cluster("h100x8"), MODEL))
    with pytest.raises(InputError, match="0 tokens"):
        score_statistics(TraceStats.empty(MODEL), placement, COST)
