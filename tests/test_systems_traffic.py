"""Systems that change what travels: ExFlow, Hecate, BigMac, LSH-MoE, MoE++ against their structural checks and published bands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost import CostModel
from moesim.errors import InputError, PlanError
from moesim.hardware import Cluster
from moesim.plan import Placement
from moesim.sim.event import EventResult, simulate_event
from moesim.studies.cases import Bench, Writer, chain_ids, cluster_of, even_ids, plan_of, proportional, zipf_ids
from moesim.systems import SYSTEMS, Coherent, Materialised, System, bigmac, exflow, hecate, lsh, moepp
from moesim.trace import NO_EXPERT, Trace, TraceStats

MODEL = tiny_model(layers=2, experts=32, top_k=1, hidden=2048, intermediate=1024, gated=False)


@pytest.fixture(scope="module")
def write() -> Iterator[Writer]:
    with Bench() as bench:
        yield bench.trace


def share_of_exchanges(event: EventResult) -> float:
    return float((event.dispatch_s_SL + event.combine_s_SL).sum() / event.step_s_S.sum())


def network_for_share(trace: Trace, wanted: float, *, nodes: int = 2, local: int = 4, tokens: int = 4096) -> Cluster:
    """A cluster whose network makes plain training spend the share `wanted` of its steps in all-to-alls."""
    low, high = 1e8, 1e12
    for _ in range(40):
        middle = float(np.sqrt(low * high))
        cluster = cluster_of("a100-80", nodes, local, nic_Bps=middle, fitted=False)
        share = share_of_exchanges(simulate_event(trace, plan_of(MODEL, nodes * local), cluster, tokens_per_device=tokens, mode="training"))
        low, high = (middle, high) if share > wanted else (low, middle)
    assert share == pytest.approx(wanted, abs=1e-3)
    return cluster


def gain(trace: Trace, cluster: Cluster, system: System, *, tokens: int = 4096, mode: str = "training") -> tuple[float, float]:
    """Step time of plain over that of the system, and the share of all-to-alls in plain."""
    run = {"tokens_per_device": tokens, "mode": mode}
    plain = simulate_event(trace, plan_of(MODEL, cluster.size), cluster, **run)  # type: ignore[arg-type]
    other = simulate_event(trace, plan_of(MODEL, cluster.size), cluster, system=system, **run)  # type: ignore[arg-type]
    return float(plain.step_s_S.sum() / other.step_s_S.sum()), share_of_exchanges(plain)


# ExFlow


def moved_share_L(event: EventResult, model_hidden: int) -> np.ndarray:  # type: ignore[type-arg]
    """Share of tokens that change device before each layer (one expert per token: all its bytes are dispatch)."""
    return np.asarray(event.traffic_B_LGG.sum(axis=(1, 2)) / (2 * model_hidden * event.tokens_per_step))


@pytest.mark.parametrize("loyalty", [1.0, 0.67, 0.0])
def test_affinity_cuts_the_planted_share_of_what_moves_and_nothing_without_affinity(write: Writer, loyalty: float) -> None:
    model = replace(MODEL, layers=7, moe_layers=tuple(range(1, 7)))
    cluster = cluster_of("a100-80", 2, 4, fitted=False)
    learnt = write(model, chain_ids(20_000, model, loyalty))
    held_out = write(model, chain_ids(20_000, model, loyalty, seed=1))
    affine = exflow.affinity_placement(TraceStats.of(learnt), 8)

    def moved(trace: Trace, placement: Placement | int) -> np.ndarray:  # type: ignore[type-arg]
        return moved_share_L(simulate_event(trace, plan_of(model, placement), cluster, tokens_per_device=2500, system="exflow"), model.hidden)[1:]

    assert (moved(learnt, affine) <= moved(learnt, 8)).all(), "on every pair of layers it was learnt on"
    cut = 1 - moved(held_out, affine).sum() / moved(held_out, 8).sum()
    assert cut == pytest.approx(loyalty, abs=0.015)


def test_coherence_halves_the_exchanges_of_single_expert_routing_and_computes_the_same(write: Writer) -> None:
    cluster = cluster_of("a100-80", 2, 4, fitted=False)
    trace = write(MODEL, zipf_ids(4096, MODEL, 0.5))
    plain, coherent = (simulate_event(trace, plan_of(MODEL, 8), cluster, tokens_per_device=256, system=name) for name in ("plain", "exflow"))
    assert coherent.exchanges * 2 == plain.exchanges == 4
    np.testing.assert_array_equal(plain.tokens_SLG, coherent.tokens_SLG)
    np.testing.assert_array_equal(plain.compute_s_SLG, coherent.compute_s_SLG)
    assert not coherent.combine_s_SL.any()
    np.testing.assert_allclose(plain.dispatch_s_SL[:, 0], coherent.dispatch_s_SL[:, 0], rtol=1e-12)  # the first layer starts at home


@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 3), missing=st.booleans())
def test_coherent_traffic_equals_a_walk_of_every_token(seed: int, top_k: int, missing: bool) -> None:
    rng = np.random.default_rng(seed)
    ids = np.stack([np.stack([rng.permutation(8)[:top_k] for _ in range(3)]) for _ in range(40)]).astype(np.uint16)
    if missing:
        ids[rng.random(ids.shape) < 0.3] = NO_EXPERT
    slots = np.stack([rng.permutation(8) for _ in range(3)])
    placement = Placement(slots_LP=slots, slots_G=np.full(4, 2), experts=8, layers=(0, 1, 2))
    node_G = np.asarray([0, 0, 1, 1])
    routed = Coherent().router(placement, node_G, gatherable=0)(ids, np.asarray([24, 40]), 24.0)
    there, back, nodes = np.zeros((2, 3, 4, 4)), np.zeros((2, 3, 4, 4)), np.zeros((2, 3, 4, 2))
    for step, (begin, end) in enumerate(((0, 24), (24, 40))):
        for token in range(begin, end):
            home, scale = (token - begin) * 4 // (end - begin), 24.0 / (end - begin)
            for layer in range(3):
                at = [int(np.flatnonzero(slots[layer] == e)[0]) // 2 for e in ids[token, layer] if e != NO_EXPERT]
                following = at[0] if at else home
                for device in set(at):
                    there[step, layer, home, device] += scale
                    back[step, layer, following, device] += scale
                for node in {int(node_G[device]) for device in at}:
                    nodes[step, layer, home, node] += scale
                home = following
    np.testing.assert_allclose(routed.traffic.copies_SLGG, there)
    np.testing.assert_allclose(routed.traffic.node_copies_SLGN, nodes)
    assert routed.returning is not None
    np.testing.assert_allclose(routed.returning.pairs_SLGG, back)


def test_coherence_refuses_replicas() -> None:
    doubled = Placement(slots_LP=np.asarray([[0, 1, 1, 0]]), slots_G=np.asarray([2, 2]), experts=2, layers=(0,))
    with pytest.raises(PlanError, match="replicas"):
        Coherent().router(doubled, np.zeros(2, int), gatherable=0)


# Hecate


def test_gathered_experts_respect_time_and_memory(write: Writer) -> None:
    load = np.asarray([[1.0, 9.0, 2.0, 8.0, 1.0, 1.0], [1.0] * 6])
    rule = Materialised(slots=4, hot=1.2)
    assert [list(hot) for hot in rule.chosen(load, gatherable=9)] == [[1, 3], []]
    assert [list(hot) for hot in rule.chosen(load, gatherable=1)] == [[1], []]
    assert [list(hot) for hot in replace(rule, slots=0).chosen(load, gatherable=9)] == [[], []]
    trace = write(MODEL, zipf_ids(8 * 512 * 6, MODEL, 1.0))
    for nic in (1e9, 4e9, 12.5e9, 50e9):
        cluster = cluster_of("a100-80", 2, 4, nic_Bps=nic, fitted=False)
        event = simulate_event(trace, plan_of(MODEL, 8), cluster, tokens_per_device=512, context=16384, system=hecate.make(slots=5))
        assert event.gathered <= 5 * 5 / 6  # the first of six steps has no past to learn from
        assert "gather" not in event.critical_path_s, "it is hidden behind attention"
    assert event.gathered > 4


def test_hecate_gains_nothing_from_even_load_and_more_on_the_slower_machine(write: Writer) -> None:
    model = replace(MODEL, hidden=1024)
    even = write(model, even_ids(512, MODEL))
    skewed, hot = (write(model, zipf_ids(8 * 4096 * 5, MODEL, skew)) for skew in (1.0, 2.0))

    def step_gain(trace: Trace, device: str, nic_Bps: float, tokens: int) -> float:
        cluster = cluster_of(device, 2, 4, nic_Bps=nic_Bps, fitted=False)
        run = {"tokens_per_device": tokens, "context": 2048, "mode": "training"}
        plain, other = (simulate_event(trace, plan_of(model, 8), cluster, system=s, **run) for s in ("plain", hecate.make(slots=6)))  # type: ignore[arg-type]
        return float(plain.step_s_S[1:].sum() / other.step_s_S[1:].sum())

    assert step_gain(even, "v100", 12.5e9, 512) == pytest.approx(1.0, rel=1e-12)
    slow, fast = step_gain(skewed, "v100", 12.5e9, 4096), step_gain(skewed, "a100-80", 50e9, 4096)
    assert slow > fast > 1.26
    assert step_gain(hot, "v100", 12.5e9, 4096) > 2.05, "the published mean is reachable"
    for device in ("v100", "a100-80"):
        gains = [step_gain(skewed, device, nic_Bps, 4096) for nic_Bps in (12.5e9, 25e9, 50e9)]
        assert gains == sorted(gains, reverse=True), "the same machines, a faster link: less to gain"


def test_gathered_experts_are_computed_at_home_and_nothing_is_lost(write: Writer) -> None:
    trace = write(MODEL, clustered_routing(replace(MODEL, top_k=3), 4096, clusters=4))
    router = Materialised(slots=3, window=2).router(plan_of(MODEL, 8).placement, np.repeat([0, 1], 4), gatherable=3)
    ids = trace.experts()
    routed = router(ids, np.asarray([1024, 2048, 4096]), 1024.0)
    np.testing.assert_allclose(routed.traffic.slot_tokens_SLP.sum(axis=2), 1024.0 * 3)
    assert routed.gathered_SL[0].sum() == 0
    assert routed.gathered_SL[1:].sum() > 0
    before = Materialised(slots=0).router(plan_of(MODEL, 8).placement, np.repeat([0, 1], 4), gatherable=0)(
        ids, np.asarray([1024, 2048, 4096]), 1024.0
    )
    off = ~np.eye(8, dtype=bool)
    assert ((routed.traffic.copies_SLGG * off).sum(axis=(2, 3)) <= (before.traffic.copies_SLGG * off).sum(axis=(2, 3))).all()
    with pytest.raises(InputError, match="exceed the id range"):
        Materialised(slots=9000).router(plan_of(MODEL, 8).placement, np.repeat([0, 1], 4), gatherable=9000)


# BigMac and LSH-MoE: fewer bytes


@pytest.mark.parametrize("width", [0.125, 0.25, 0.5])
def test_bigmac_bytes_scale_exactly_with_the_width(write: Writer, width: float) -> None:
    trace = write(MODEL, zipf_ids(4096, MODEL, 0.5))
    cluster = cluster_of("a100-80", 2, 4, fitted=False)
    plain, low = (simulate_event(trace, plan_of(MODEL, 8), cluster, system=system) for system in ("plain", bigmac.make(width=width)))
    np.testing.assert_array_equal(low.traffic_B_LGG, plain.traffic_B_LGG * width)


@given(nic=st.floats(3e8, 2e11), width=st.sampled_from([0.1, 0.25, 0.51]), tokens=st.sampled_from([256, 4096]))
def test_fewer_bytes_never_beat_amdahl(write: Writer, nic: float, width: float, tokens: int) -> None:
    trace = write(MODEL, zipf_ids(8 * 256, MODEL, 0.5))
    cluster = cluster_of("a100-80", 2, 4, nic_Bps=nic, fitted=False)
    for system in (bigmac.make(width=width), lsh.make(ratio=width)):
        found, share = gain(trace, cluster, system, tokens=tokens)
        assert found <= 1 / (1 - share + share * width) * (1 + 1e-9)


def test_bigmac_reaches_its_headline_only_with_two_thirds_of_the_time_in_exchanges(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(8 * 512, MODEL, 0.3))
    slow = network_for_share(trace, 0.80, tokens=16384)
    reached, share = gain(trace, slow, bigmac.make(width=0.125), tokens=16384)
    assert reached > 3.09
    assert share >= 0.676
    less, share = gain(trace, network_for_share(trace, 0.60, tokens=16384), bigmac.make(width=0.125), tokens=16384)
    assert less < 3.09
    island, share = gain(trace, cluster_of("a100-80", 1, 8, fitted=False), bigmac.make(width=0.25), tokens=4096)
    assert share < 0.2
    assert island < 1.05


def test_lsh_reaches_its_lower_band_at_45_percent_and_never_its_upper(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(8 * 512, MODEL, 0.3))
    cluster = network_for_share(trace, 0.45, tokens=16384)
    half, _ = gain(trace, cluster, lsh.make(ratio=0.51), tokens=16384)
    assert half == pytest.approx(1.28, abs=0.03)
    most, _ = gain(trace, cluster, lsh.make(ratio=0.0), tokens=16384)
    assert 1.6 < most <= 1 / (1 - 0.45) + 0.01
    beyond, _ = gain(trace, network_for_share(trace, 0.60, tokens=16384), lsh.make(ratio=0.0), tokens=16384)
    assert beyond > 2.2, "needs a share of at least 0.545"


# MoE++


@pytest.mark.parametrize("zeros", [0, 8, 16, 24])
def test_a_share_of_free_experts_leaves_the_rest_of_the_work(write: Writer, zeros: int) -> None:
    cluster = cluster_of("a100-80", 2, 4, fitted=False)
    trace = write(MODEL, even_ids(256, MODEL))
    spread = np.arange(32).reshape(4, 8).T.reshape(1, 32).repeat(2, axis=0)  # every device has as many free experts
    plan = plan_of(MODEL, Placement(slots_LP=spread, slots_G=np.full(8, 4), experts=32, layers=MODEL.moe_layers))
    run = {"tokens_per_device": 512, "cost": proportional(CostModel.of(cluster, MODEL))}
    plain = simulate_event(trace, plan, cluster, **run)  # type: ignore[arg-type]
    free = simulate_event(trace, plan, cluster, system=moepp.make(experts=tuple(range(-zeros, 0))), **run)  # type: ignore[arg-type]
    left = 1 - zeros / 32
    np.testing.assert_array_equal(free.tokens_SLG, plain.tokens_SLG * left)
    np.testing.assert_allclose(plain.compute_s_SLG.max(axis=2) / free.compute_s_SLG.max(axis=2), 1 / left, rtol=1e-9)
    np.testing.assert_allclose(free.traffic_B_LGG.sum(), plain.traffic_B_LGG.sum() * left)


def test_moepp_reaches_its_headline_at_52_percent(write: Writer) -> None:
    cluster = cluster_of("a100-80", 2, 4, fitted=False)
    ids = even_ids(512, MODEL, experts=25)  # 25 experts, 13 of them free
    model = replace(MODEL, experts=32)
    trace = write(model, ids)
    plan = plan_of(
        model,
        Placement(slots_LP=np.tile(np.arange(32).reshape(4, 8).T.reshape(1, 32), (2, 1)), slots_G=np.full(8, 4), experts=32, layers=model.moe_layers),
    )
    cost = proportional(CostModel.of(cluster, MODEL))
    plain = simulate_event(trace, plan, cluster, tokens_per_device=1600, cost=cost)
    free = simulate_event(trace, plan, cluster, tokens_per_device=1600, cost=cost, system=moepp.make(experts=tuple(range(12, 25))))
    assert plain.compute_s_SLG.sum() / free.compute_s_SLG.sum() == pytest.approx(1 / 0.48, rel=1e-9)


def test_free_experts_outside_the_model_are_refused(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(256, MODEL, 0.0))
    with pytest.raises(InputError, match="zero-cost expert 32 is outside"):
        simulate_event(trace, plan_of(MODEL, 8), cluster_of("a100-80", 2, 4, fitted=False), system=moepp.make(experts=(32,)))


def test_systems_compose(write: Writer) -> None:
    """Mechanisms of different papers in one system: LSH's bytes over Tutel's pipeline."""
    trace = write(MODEL, zipf_ids(8 * 512, MODEL, 0.3))
    cluster = cluster_of("a100-80", 2, 4, nic_Bps=3e9, fitted=False)
    both = replace(SYSTEMS["tutel"], name="both", exchange=replace(SYSTEMS["tutel"].exchange, bytes_scale=0.5))
    times = [gain(trace, cluster, s)[0] for s in (SYSTEMS["tutel"], lsh.make(ratio=0.5), both)]
    assert times[2] > max(times[:2])
