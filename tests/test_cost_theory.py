"""All-to-all of whole cost models against closed forms and laws, for every transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost import TRANSPORTS, CostModel, route
from moesim.cost.collectives import CollectiveCurve, collective, port_loads
from moesim.cost.fitted import deepep_ports, device_ports, scaled_curve
from moesim.errors import InputError, ProfileError
from moesim.hardware import Cluster, Link, load_cluster, load_device, load_links
from moesim.plan import Placement, Plan, slots_per_device
from moesim.sim import simulate
from moesim.sim.lockstep import step_chunks
from moesim.trace import Trace, TraceWriter, load_trace

MODEL = tiny_model(layers=2, experts=32, top_k=4, hidden=2048, intermediate=1024)
TOKEN_B = MODEL.hidden * 2


def unmeasured(name: str, **changes: object) -> Cluster:
    """A shipped cluster whose links are known by latency and bandwidth alone."""
    cluster = load_cluster(name)
    links = tuple(replace(link, name="plain") for link in cluster.intra_G)
    network = cluster.network and replace(cluster.network, name="plain network")
    return replace(cluster, intra_G=links, network=network, **changes)


def even(cluster: Cluster, copies: float, nodes: float) -> tuple[np.ndarray, np.ndarray]:
    """Each device sends `copies` over all devices and `nodes` over all nodes, evenly: [1, 1, G, G] and [1, 1, G, M]."""
    shape = (1, 1, cluster.size)
    return np.full((*shape, cluster.size), copies / cluster.size), np.full((*shape, cluster.nodes), nodes / cluster.nodes)


# closed forms --------------------------------------------------------------------------------------


def test_uniform_traffic_on_one_switch() -> None:
    """t = latency + x (G-1)/G / bandwidth, x bytes leaving each device or staying."""
    cluster = unmeasured("h100x8")
    cost = CostModel.of(cluster, MODEL, transport="nccl")
    link = cluster.intra_G[0]
    found = cost.exchange(*even(cluster, 8000, 8000), TOKEN_B)
    assert float(found.time_s_N[0, 0]) == pytest.approx(link.latency_s + 8000 * TOKEN_B * 7 / 8 / link.bandwidth_Bps)
    assert found.bottleneck(0, 0).startswith("link out of device")


@pytest.mark.parametrize("over", [1.0, 2.0, 8.0])
def test_uniform_traffic_on_a_fat_tree_at_over_subscription(over: float) -> None:
    """Direct: t = latency + r x (M-1)/M / NIC bandwidth. Forwarded: one copy per node instead of one per device."""
    cluster = unmeasured("h100-4x8", oversubscription=over)
    nic = cluster.network
    assert nic is not None
    for name, sent in (("nccl", 16_000), ("deepep-normal", 4_000)):
        found = CostModel.of(cluster, MODEL, transport=name).exchange(*even(cluster, 16_000, 4_000), TOKEN_B)
        expected = nic.latency_s + over * sent * TOKEN_B * 3 / 4 / nic.bandwidth_Bps
        assert float(found.nic_s_N[0, 0]) == pytest.approx(expected), name
        assert "nic" in found.bottleneck(0, 0)


def test_hierarchical_pays_both_tiers_one_after_the_other() -> None:
    cluster = unmeasured("h100-4x8")
    assert cluster.network
    link, nic = cluster.intra_G[0], cluster.network
    found = CostModel.of(cluster, MODEL, transport="hierarchical").exchange(*even(cluster, 16_000, 4_000), TOKEN_B)
    x = 16_000 * TOKEN_B
    expected = link.latency_s + x * 7 / 8 / link.bandwidth_Bps + nic.latency_s + x * 3 / 4 / nic.bandwidth_Bps
    assert float(found.time_s_N[0, 0]) == pytest.approx(expected)


def test_a_ring_of_neighbours_is_paced_by_one_message() -> None:
    """Every device sends x bytes to the next one: t = latency + x/bandwidth; across nodes one device of each uses its NIC."""
    cluster = unmeasured("h100-4x8")
    assert cluster.network
    x = 1000.0
    ring = np.roll(np.eye(32), 1, axis=1)[None, None] * x
    found = CostModel.of(cluster, MODEL, transport="nccl").exchange(ring, np.zeros((1, 1, 32, 4)), TOKEN_B)
    assert float(found.link_s_N[0, 0]) == pytest.approx(cluster.intra_G[0].latency_s + x * TOKEN_B / cluster.intra_G[0].bandwidth_Bps)
    assert float(found.nic_s_N[0, 0]) == pytest.approx(cluster.network.latency_s + x * TOKEN_B / cluster.network.bandwidth_Bps)
    loads = port_loads(ring * TOKEN_B, cluster.node_G)
    np.testing.assert_array_equal((loads.bytes_PNG[2] > 0).sum(axis=-1), 4)


# transports ----------------------------------------------------------------------------------------


def routed(cluster: Cluster, seed: int, tokens: int = 300) -> tuple[Placement, np.ndarray]:
    rng = np.random.default_rng(seed)
    slots = np.stack([rng.permutation(32) for _ in range(2)])
    per_device = slots_per_device(32, cluster.size)
    return Placement(slots_LP=slots, slots_G=per_device, experts=32, layers=MODEL.moe_layers), clustered_routing(MODEL, tokens, clusters=8, seed=seed)


@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(TRANSPORTS)), cluster=st.sampled_from(["h100x8", "h100-4x8", "mixed-a100-h100"]))
def test_every_transport_conserves_bytes_and_grows_with_tokens(seed: int, name: str, cluster: str) -> None:
    where = load_cluster(cluster)
    cost = CostModel.of(where, MODEL, transport=name)
    placement, ids = routed(where, seed)
    small, large = (route(ids, placement, where.node_G, tokens_per_step=n, selections=True) for n in (32.0 * where.size, 4096.0 * where.size))
    copies = cost.copies_SLGG(large)
    nodes = large.node_copies_SLGN if cost.algorithm == "forwarded" else None
    loads = port_loads(copies, where.node_G, algorithm=cost.algorithm, node_traffic_NGM=nodes)
    np.testing.assert_allclose(loads.bytes_PNG[0].sum(-1), loads.bytes_PNG[1].sum(-1))
    np.testing.assert_allclose(loads.bytes_PNG[2].sum(-1), loads.bytes_PNG[3].sum(-1))
    least, most = (cost.layer_times(traffic, placement) for traffic in (small, large))
    assert (least.dispatch.time_s_N <= most.dispatch.time_s_N).all()
    assert (least.dispatch.time_s_N > 0).all()
    np.testing.assert_array_equal(most.dispatch.time_s_N, most.combine.time_s_N)


@given(seed=st.integers(0, 10**6))
def test_selections_are_counted_like_tokens_in_slots(seed: int) -> None:
    where = load_cluster("h100-4x8")
    placement, ids = routed(where, seed)
    traffic = route(ids, placement, where.node_G, selections=True)
    assert traffic.selections_SLGG is not None
    np.testing.assert_array_equal(traffic.selections_SLGG.sum(axis=2), traffic.device_tokens_SLG(placement))
    assert (traffic.selections_SLGG >= traffic.copies_SLGG).all()
    np.testing.assert_array_equal(traffic.selections_SLGG > 0, traffic.copies_SLGG > 0)
    without = route(ids, placement, where.node_G)
    np.testing.assert_array_equal(without.copies_SLGG, traffic.copies_SLGG)
    with pytest.raises(InputError, match="selections=True"):
        CostModel.of(where, MODEL, transport="deepep-low-latency").layer_times(without, placement)


@pytest.mark.parametrize("name", sorted(TRANSPORTS))
def test_more_bandwidth_is_never_slower(name: str) -> None:
    def faster(link: Link, factor: float) -> Link:
        return replace(link, bandwidth_Bps=link.bandwidth_Bps * factor)

    base = load_cluster("h100-4x8")
    assert base.network
    placement, ids = routed(base, 3)
    traffic = route(ids, placement, base.node_G, tokens_per_step=32 * 4096.0, selections=True)
    times = []
    for factor in (0.5, 1.0, 2.0):
        links = tuple(faster(link, factor) for link in base.intra_G)
        cost = CostModel.of(replace(base, intra_G=links, network=faster(base.network, factor)), MODEL, transport=name)
        times.append(cost.layer_times(traffic, placement).dispatch.time_s_N)
    assert (times[0] > times[1]).all()
    assert (times[1] > times[2]).all()


@pytest.mark.parametrize("name", sorted(TRANSPORTS))
def test_nothing_sent_costs_nothing_and_one_token_costs_the_start(name: str) -> None:
    where = load_cluster("h100-4x8")
    cost = CostModel.of(where, MODEL, transport=name)
    nothing = cost.exchange(*even(where, 0, 0), TOKEN_B)
    assert float(nothing.time_s_N[0, 0]) == 0
    assert nothing.bottleneck(0, 0) == "nothing sent"
    one, node = (np.zeros(matrix.shape) for matrix in even(where, 0, 0))
    one[..., 0, 9], node[..., 0, 1] = 1, 1  # to another node and index
    assert cost.ports.nic is not None
    found = cost.exchange(one, node, TOKEN_B)
    assert float(found.nic_s_N[0, 0]) == pytest.approx(cost.ports.nic.latency_s, rel=0.01)


def test_de_duplication_saves_the_network() -> None:
    """Copies per device exceed copies per node, selections exceed both (two experts a device): so do the NIC times."""
    where = load_cluster("mixed-a100-h100")
    placement, ids = routed(where, 1)
    traffic = route(ids, placement, where.node_G, tokens_per_step=16 * 4096.0, selections=True)
    ports = CostModel.of(where, MODEL, transport="deepep-normal").ports
    times = {}
    for name in ("deepep-normal", "nccl", "deepep-low-latency"):
        cost = replace(CostModel.of(where, MODEL, transport=name), ports=ports)
        times[name] = float(cost.layer_times(traffic, placement).dispatch.nic_s_N.mean())
    assert times["deepep-normal"] < times["nccl"] < times["deepep-low-latency"]


def test_transports_are_picked_by_cluster_and_checked() -> None:
    assert CostModel.of(load_cluster("h100x8"), MODEL).transport == "nccl"
    assert CostModel.of(load_cluster("h100-4x8"), MODEL).transport == "deepep-normal"
    unequal = replace(load_cluster("h100x8"), node_G=np.array([0, 0, 0, 1, 1, 1, 1, 1]), network=load_links()["ib-ndr"])
    assert CostModel.of(unequal, MODEL).transport == "nccl"
    with pytest.raises(InputError, match="use nccl, deepep-low-latency"):
        CostModel.of(unequal, MODEL, transport="deepep-normal")
    with pytest.raises(InputError, match="transport 'carrier-pigeon' is unknown; use one of nccl, deepep-normal"):
        CostModel.of(unequal, MODEL, transport="carrier-pigeon")


# parameters on other hardware ----------------------------------------------------------------------


def test_deepep_follows_the_link_and_the_nic_and_says_so() -> None:
    device, links = load_device("h100-sxm"), load_links()
    measured, none = deepep_ports(device, "deepep-normal")
    assert not none
    scaled, notes = deepep_ports(device, "deepep-normal", wire=links["nvlink4"], network=links["ib-hdr"])
    assert scaled.link.bandwidth_Bps == pytest.approx(measured.link.bandwidth_Bps * 450 / 200)  # type: ignore[union-attr]
    assert scaled.nic
    assert measured.nic
    assert scaled.nic.bandwidth_Bps == pytest.approx(measured.nic.bandwidth_Bps / 2)
    assert "nvlink4-h800" in notes[0]
    assert "x 2.25" in notes[0]
    borrowed, told = deepep_ports(load_device("b200"), "deepep-normal")
    assert borrowed == deepep_ports(load_device("h200"), "deepep-normal")[0]
    assert told == ["not calibrated: b200 was not measured with deepep-normal; ports are those of h200"]
    with pytest.raises(ProfileError, match="has no ports of deepep-turbo; it has: nccl"):
        deepep_ports(load_device("b200"), "deepep-turbo")


def test_a_curve_measured_elsewhere_scales_with_latency_link_and_units() -> None:
    home, links = load_device("h200"), load_links()
    curve = next(c for fit in home.collectives if isinstance(c := collective(fit), CollectiveCurve) and c.op == "all_to_all")
    assert scaled_curve(curve, of=home, device=home, wire=links["nvlink4"]) == (curve, [])
    scaled, (note,) = scaled_curve(curve, of=home, device=load_device("b200"), wire=links["nvlink5"])
    assert scaled.port.port_bandwidth_Bps == pytest.approx(2 * curve.port.port_bandwidth_Bps)
    assert scaled.port.copy_bandwidth_Bps == pytest.approx(148 / 132 * curve.port.copy_bandwidth_Bps)
    assert scaled.port.long_latency_s == pytest.approx(13 / 9.3 * curve.port.long_latency_s)
    assert note.startswith("not calibrated: nccl all_to_all over nvlink5 is that of h200")
    twice = replace(links["nvlink4"], bandwidth_Bps=900e9)
    assert scaled_curve(curve, of=home, device=home, wire=twice)[0].port.port_bandwidth_Bps == 2 * curve.port.port_bandwidth_Bps


def test_a_mixed_cluster_runs_at_its_slower_half_and_says_so() -> None:
    mixed = load_cluster("mixed-a100-h100")
    ports, notes = device_ports(mixed, "nccl")
    slow, _ = device_ports(load_cluster("a100x8"), "nccl")
    assert ports.link == slow.link
    assert any("slowest port, nvlink3" in note for note in notes)
    cost = CostModel.of(mixed, MODEL)
    placement, ids = routed(mixed, 5)
    times = cost.layer_times(route(ids, placement, mixed.node_G, tokens_per_step=16 * 4096.0), placement)
    tokens = np.full((1, 1, 32), 16 * 4096 * 4 / 32)
    even_s = cost.expert_times(tokens, np.full((1, 1, 16), 4096.0), placement.slots_G)[0][0, 0]
    assert (even_s[:8] > even_s[8:]).all()  # A100 before H100
    assert times.compute_s_SLG.shape == (1, 2, 16)
    mixed_nics = replace(mixed, own_nics={g: load_links()["ib-ndr"] for g in range(8, 16)})
    assert any("between nodes is computed with the slowest port, ib-hdr" in note for note in device_ports(mixed_nics, "nccl")[1])


# the lockstep engine's use of them ------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("theory") / "trace"
    with TraceWriter(path, MODEL, weights=False) as writer:
        writer.append(clustered_routing(MODEL, 1000))
    return load_trace(path)


@given(steps=st.integers(1, 40), chunk=st.integers(1, 400), most=st.one_of(st.none(), st.integers(1, 7)))
def test_runs_come_in_order_and_never_too_many_at_a_time(stored: Trace, steps: int, chunk: int, most: int | None) -> None:
    """Counts of a chunk's runs stay in memory at once, so their number is bounded whatever the length of a step."""
    seen, runs = [], []
    for experts, ends_S in step_chunks(stored, steps, chunk, most):
        assert most is None or len(ends_S) <= most
        assert ends_S[-1] == len(experts)
        seen.append(experts)
        runs += np.diff(ends_S, prepend=0).tolist()
    np.testing.assert_array_equal(np.concatenate(seen), stored.experts())
    assert runs == np.diff(np.arange(1, steps + 1) * stored.tokens // steps, prepend=0).tolist()


def test_a_plan_that_does_not_fit_is_said_and_still_scored(make_trace: Callable[..., Trace]) -> None:
    model = tiny_model(layers=2, experts=32, top_k=4, hidden=8192, intermediate=65536)  # 3.2 GB an expert
    trace = make_trace(model, clustered_routing(model, 200))
    slots = np.tile(np.arange(32), (2, 1))
    placement = Placement(slots_LP=slots, slots_G=np.array([18, *[2] * 7]), experts=32, layers=model.moe_layers)
    plan = Plan(name="p", model=model.name, model_digest=model.digest, placement=placement)
    result = simulate(trace, plan, load_cluster("h100x8"), tokens_per_device=16)
    (line,) = [note for note in result.notes if note.startswith("does not fit")]
    assert "device 0" in line
    assert "device 1 " not in line
    assert f"{18 * 2 * 3 * 8192 * 65536 * 2 / 1e9:.0f} GB experts" in line
    assert result.layer_s_SL.min() > 0
