"""Lockstep engine: the laws any cost of a placement must obey."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost import CostModel
from moesim.errors import PlanError
from moesim.hardware import Cluster, load_cluster
from moesim.model import ModelSpec, load_model
from moesim.plan import Placement, Plan, slots_per_device
from moesim.sim import simulate
from moesim.trace import Trace, TraceWriter, load_trace

MODEL = tiny_model(layers=2, experts=32, top_k=4, hidden=2048, intermediate=1024)


def plan_of(model: ModelSpec, devices: int, slots: np.ndarray | None = None) -> Plan:
    rows = np.tile(np.arange(model.experts), (len(model.moe_layers), 1)) if slots is None else slots
    p = Placement(slots_LP=rows, slots_G=slots_per_device(rows.shape[1], devices), experts=model.experts, layers=model.moe_layers)
    return Plan(name="p", model=model.name, model_digest=model.digest, placement=p)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("t") / "trace"
    with TraceWriter(path, MODEL, weights=False) as writer:
        writer.append(clustered_routing(MODEL, 1500, clusters=8))
    return load_trace(path)


def faster(cluster: Cluster, factor: float) -> Cluster:
    """The same cluster with every link `factor` times as fast."""
    links = tuple(replace(link, bandwidth_Bps=link.bandwidth_Bps * factor) for link in cluster.intra_G)
    network = cluster.network and replace(cluster.network, bandwidth_Bps=cluster.network.bandwidth_Bps * factor)
    return replace(cluster, intra_G=links, network=network)


def bare(cluster: Cluster) -> Cluster:
    """Without fitted curves, so that link bandwidths count."""
    unknown = tuple(replace(link, name="unmeasured") for link in cluster.intra_G)
    return replace(cluster, devices=tuple(replace(device, collectives=()) for device in cluster.devices), intra_G=unknown)


@pytest.mark.parametrize("name", ["h100x8", "h100-4x8"])
@pytest.mark.parametrize("tokens", [8, 4096])
def test_more_bandwidth_is_never_slower(routed: Trace, name: str, tokens: int) -> None:
    cluster = bare(load_cluster(name))
    plan = plan_of(MODEL, cluster.size)
    times = [simulate(routed, plan, faster(cluster, factor), tokens_per_device=tokens).layer_s_SL for factor in (0.5, 1, 2)]
    assert (times[0] >= times[1]).all()
    assert (times[1] >= times[2]).all()
    assert times[0].sum() > times[2].sum(), "the input must show"


def test_more_tokens_are_never_faster(routed: Trace) -> None:
    cluster = load_cluster("h100x8")
    plan = plan_of(MODEL, 8)
    times = [float(simulate(routed, plan, cluster, tokens_per_device=n).layer_s_SL.mean()) for n in (64, 512, 4096, 32768)]
    assert times == sorted(times)


@given(seed=st.integers(0, 10_000))
def test_relabelling_experts_changes_no_time(routed: Trace, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng = np.random.default_rng(seed)
    cluster = load_cluster("h100x8")
    slots = np.stack([rng.permutation(32) for _ in range(2)])
    renamed = np.stack([rng.permutation(32) for _ in range(2)])
    ids = routed.experts()
    path = tmp_path_factory.mktemp("t") / "renamed"
    with TraceWriter(path, MODEL, weights=False) as writer:
        writer.append(np.stack([renamed[layer][ids[:, layer]] for layer in range(2)], axis=1))
    a = simulate(routed, plan_of(MODEL, 8, slots), cluster)
    b = simulate(load_trace(path), plan_of(MODEL, 8, np.stack([renamed[layer][slots[layer]] for layer in range(2)])), cluster)
    np.testing.assert_allclose(a.layer_s_SL, b.layer_s_SL, rtol=1e-12)
    np.testing.assert_allclose(a.traffic_B_LGG, b.traffic_B_LGG)


def test_the_answer_does_not_depend_on_the_chunk(routed: Trace) -> None:
    cluster, plan = load_cluster("h100x8"), plan_of(MODEL, 8)
    whole = simulate(routed, plan, cluster, tokens_per_device=16)
    pieces = simulate(routed, plan, cluster, tokens_per_device=16, chunk_tokens=300)
    np.testing.assert_array_equal(whole.layer_s_SL, pieces.layer_s_SL)
    np.testing.assert_allclose(whole.fanout_devices_L, pieces.fanout_devices_L, rtol=1e-12)
    np.testing.assert_array_equal(whole.load_ratio_L, pieces.load_ratio_L)


def test_bytes_out_equal_bytes_in_and_follow_the_fan_out(routed: Trace) -> None:
    result = simulate(routed, plan_of(MODEL, 8), load_cluster("h100x8"), tokens_per_device=64)
    home = routed.tokens / routed.tokens  # every token lives on one device
    copies = result.traffic_B_LGG.sum((1, 2)) / (2 * MODEL.hidden * 2) / result.tokens_per_step
    assert (copies <= result.fanout_devices_L).all()
    assert (copies >= result.fanout_devices_L - home).all()
    np.testing.assert_array_equal(np.einsum("lgg->lg", result.traffic_B_LGG), 0)


def test_a_plan_for_something_else_is_refused(routed: Trace) -> None:
    with pytest.raises(PlanError, match="made for 4 devices"):
        simulate(routed, plan_of(MODEL, 4), load_cluster("h100x8"))
    with pytest.raises(PlanError, match="not for 'tiny'"):
        simulate(routed, plan_of(tiny_model(), 8), load_cluster("h100x8"))


def test_what_is_not_calibrated_is_said(routed: Trace) -> None:
    result = simulate(routed, plan_of(MODEL, 4), load_cluster("cpu"))
    assert any("not calibrated" in line for line in result.notes)
    assert any("unverified input" in line for line in result.notes)
    assert any("every token stands for" in line for line in result.notes)


def test_weights_are_slopes_of_the_layer_time() -> None:
    cost = CostModel.of(load_cluster("h100-4x8"), load_model("deepseek-v2-lite"))
    weights = cost.weights(tokens_per_device=4096)
    assert weights.load_s > 0
    assert weights.nodes_s > 0
    assert weights.devices_s >= 0


@pytest.mark.parametrize("tokens", [16, 1024])
def test_time_is_dispatch_plus_slowest_device_plus_combine(routed: Trace, tokens: int, make_trace: Callable[..., Trace]) -> None:
    result = simulate(routed, plan_of(MODEL, 8), load_cluster("h100x8"), tokens_per_device=tokens)
    np.testing.assert_allclose(result.layer_s_SL, result.dispatch_s_SL + result.compute_s_SLG.max(2) + result.combine_s_SL)
    assert result.summary()["max_load_ratio"] >= 1
