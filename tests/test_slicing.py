"""Experts cut over groups of devices: one copy crosses the network, members share it, computation is conserved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost import CostModel
from moesim.errors import InputError, PlanError
from moesim.plan import Placement
from moesim.sim import simulate
from moesim.sim.event import simulate_event
from moesim.sim.fabric import Wiring
from moesim.studies.cases import Bench, Writer, cluster_of, even_ids, plan_of, proportional, zipf_ids
from moesim.systems import SYSTEMS, Residency, Sliced, ted
from moesim.systems.routing import member_copies
from moesim.systems.slicing import cut, groups, held_G
from moesim.systems.transforms import Capacity
from moesim.trace import NO_EXPERT

MODEL = tiny_model(layers=2, experts=32, top_k=1, hidden=1024, intermediate=2048, gated=False)
NODE_G = np.asarray([0, 0, 0, 0, 1, 1, 1, 1])


@pytest.fixture(scope="module")
def write() -> Iterator[Writer]:
    with Bench() as bench:
        yield bench.trace


@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 4), slices=st.sampled_from([2, 4]), missing=st.booleans())
def test_copies_equal_a_walk_of_every_token(seed: int, top_k: int, slices: int, missing: bool) -> None:
    rng = np.random.default_rng(seed)
    ids = np.stack([np.stack([rng.permutation(16)[:top_k] for _ in range(2)]) for _ in range(40)]).astype(np.uint16)
    if missing:
        ids[rng.random(ids.shape) < 0.3] = NO_EXPERT
    placement = Placement(slots_LP=np.stack([rng.permutation(16) for _ in range(2)]), slots_G=np.full(8, 2), experts=16, layers=(0, 1))
    routed = Sliced(slices=slices).router(placement, NODE_G, gatherable=0, selections=True)(ids, np.asarray([24, 40]), 24.0)
    shape = (2, 2, 8, 8)
    pairs, selected, inside = (np.zeros(shape) for _ in range(3))
    for step, (begin, end) in enumerate(((0, 24), (24, 40))):
        for token in range(begin, end):
            source, scale = (token - begin) * 8 // (end - begin), 24.0 / (end - begin)
            for layer in range(2):
                homes = [int(np.flatnonzero(placement.slots_LP[layer] == e)[0]) // 2 // slices for e in ids[token, layer] if e != NO_EXPERT]
                for group in set(homes):
                    members = range(group * slices, (group + 1) * slices)
                    for member in members:
                        pairs[step, layer, source, member] += scale / slices
                        selected[step, layer, source, member] += homes.count(group) * scale / slices
                        for other in members:
                            inside[step, layer, member, other] += scale / slices * (member != other)
    traffic = routed.traffic
    np.testing.assert_allclose(traffic.copies_SLGG, pairs)
    np.testing.assert_allclose(traffic.selections_SLGG, selected)
    np.testing.assert_allclose(member_copies(traffic.copies_SLGG, slices), inside)
    chosen = (ids != NO_EXPERT).sum(axis=2)
    work = traffic.slot_tokens_SLP.sum(axis=2) / slices  # in whole experts
    np.testing.assert_allclose(work, [chosen[:24].sum(axis=0), chosen[24:].sum(axis=0) * 24 / 16])
    tokens_SLG = traffic.device_tokens_SLG(routed.placement)
    np.testing.assert_array_equal(tokens_SLG, np.repeat(tokens_SLG[..., ::slices], slices, axis=2))  # members share their work equally


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_even_traffic_takes_its_closed_form_on_every_tier(write: Writer, slices: int) -> None:
    nodes, local, tokens = 2, 4, 256
    cluster = cluster_of("a100-80", nodes, local, fitted=False)
    trace = write(MODEL, even_ids(nodes * local * tokens // 32, MODEL))
    run: dict[str, Any] = {"tokens_per_device": tokens, "cost": CostModel.of(cluster, MODEL, transport="nccl")}
    event = simulate_event(trace, plan_of(MODEL, cluster.size), cluster, system=ted.make(slices=slices), **run)
    wires = dict(zip((wiring := Wiring.of(cluster)).names_K, wiring.capacity_K.tolist(), strict=True))
    same = np.equal.outer(cluster.node_G, cluster.node_G)
    each_B = 2 * tokens * cluster.size * MODEL.hidden * 2.0  # of all tokens, there and back, in bf16
    own = slices / local  # chance that a token of the node goes to the group of its own device
    inside = (own * (slices - 1) / slices + (1 - own)) / nodes + (slices - 1)
    for moved_GG in event.traffic_B_LGG:
        assert moved_GG[~same].sum() == pytest.approx(each_B * (nodes - 1) / nodes, rel=1e-12), "one copy crosses, whatever the slices"
        assert moved_GG[same].sum() == pytest.approx(each_B * inside, rel=1e-12)
    nic_s = cluster.network.latency_s + tokens * MODEL.hidden * 2.0 * (nodes - 1) / nodes / cluster.network.bandwidth_Bps  # type: ignore[union-attr]
    wire = cluster.intra_G[0]
    link_s = wire.latency_s + tokens * MODEL.hidden * 2.0 * (slices - 1) / wire.bandwidth_Bps if slices > 1 else 0.0
    np.testing.assert_allclose(event.dispatch_s_SL, nic_s + link_s, rtol=1e-9)
    np.testing.assert_allclose(event.combine_s_SL, event.dispatch_s_SL, rtol=1e-12)
    shared = simulate_event(trace, plan_of(MODEL, cluster.size), cluster, system=ted.make(slices=slices), contention=True, **run)
    one_B = each_B / cluster.size * len(MODEL.moe_layers)
    crossing_B, staying_B = one_B * (nodes - 1) / nodes, one_B * inside
    seconds = float(shared.step_s_S.sum())
    for g in range(cluster.size):  # every device's ports carry as much, out and in
        node, rail = f"node{cluster.node_G[g]}", f"rail{g % local}"
        for link, carried_B in ((f"g{g}→{node}", staying_B), (f"{node}→g{g}", staying_B), (f"g{g}→{rail}", crossing_B), (f"{rail}→g{g}", crossing_B)):
            assert shared.link_use[link] * seconds * wires[link] == pytest.approx(carried_B, rel=1e-9)


@pytest.mark.parametrize("mode", ["prefill", "training"])
@pytest.mark.parametrize("contention", [False, True])
def test_one_slice_is_plain_to_the_bit(write: Writer, mode: Any, contention: bool) -> None:
    cluster = cluster_of("a100-80", 2, 4)
    trace = write(MODEL, zipf_ids(2048, MODEL, 0.7))
    plain, one = (
        simulate_event(trace, plan_of(MODEL, 8), cluster, tokens_per_device=128, mode=mode, contention=contention, system=system).to_dict()
        for system in (SYSTEMS["plain"], replace(ted.make(slices=1), name="plain"))
    )
    assert one == plain
    assert simulate(trace, plan_of(MODEL, 8), cluster, slices=1).to_dict() == simulate(trace, plan_of(MODEL, 8), cluster).to_dict()


@given(seed=st.integers(0, 10**6), slices=st.sampled_from([2, 4]), transport=st.sampled_from(["nccl", "hierarchical", "deepep-normal"]))
def test_both_engines_agree(write: Writer, seed: int, slices: int, transport: str) -> None:
    model = replace(MODEL, top_k=3)
    trace = write(model, clustered_routing(model, 600, clusters=4, seed=seed))
    cluster, slots = cluster_of("h100-sxm", 2, 4), np.stack([np.random.default_rng(seed).permutation(32) for _ in range(2)])
    plan = plan_of(model, Placement(slots_LP=slots, slots_G=np.full(8, 4), experts=32, layers=model.moe_layers))
    run: dict[str, Any] = {"tokens_per_device": 64, "cost": CostModel.of(cluster, model, transport=transport)}
    lockstep = simulate(trace, plan, cluster, slices=slices, **run)
    event = simulate_event(trace, plan, cluster, system=ted.make(slices=slices), **run)
    np.testing.assert_allclose(event.layer_s_SL, lockstep.layer_s_SL, rtol=1e-9)
    np.testing.assert_allclose(event.traffic_B_LGG, lockstep.traffic_B_LGG, rtol=1e-12)
    np.testing.assert_array_equal(event.tokens_SLG, lockstep.tokens_SLG)
    assert lockstep.tokens_SLG.sum() == pytest.approx(lockstep.tokens_per_step * 3 * 2 * len(lockstep.tokens_SLG))


def test_computation_is_conserved_and_even_inside_a_group(write: Writer) -> None:
    cluster = cluster_of("a100-80", 2, 4)
    trace = write(MODEL, zipf_ids(4096, MODEL, 1.0))
    run: dict[str, Any] = {"tokens_per_device": 512, "cost": proportional(CostModel.of(cluster, MODEL, transport="nccl"))}
    whole = simulate(trace, plan_of(MODEL, 8), cluster, **run).compute_s_SLG
    for slices in (2, 4):
        sliced = simulate(trace, plan_of(MODEL, 8), cluster, slices=slices, **run).compute_s_SLG
        means = whole.reshape(*whole.shape[:2], -1, slices).mean(axis=3)
        np.testing.assert_allclose(sliced, np.repeat(means, slices, axis=2), rtol=1e-6)
        assert (sliced.max(axis=2) <= whole.max(axis=2) * (1 + 1e-9)).all()


def test_fewer_experts_than_devices_are_cut_over_those_without_one(write: Writer) -> None:
    few = replace(MODEL, experts=4)
    cluster, trace = cluster_of("a100-80", 2, 4), write(few, zipf_ids(2048, few, 0.5))
    half = Placement(slots_LP=np.tile(np.arange(4), (2, 1)), slots_G=np.tile([1, 0], 4), experts=4, layers=few.moe_layers)
    run: dict[str, Any] = {"tokens_per_device": 256, "cost": replace(proportional(CostModel.of(cluster, MODEL, transport="nccl")), model=few)}
    alone, sliced = (
        simulate_event(trace, plan_of(few, half), cluster, system=system, mode="training", **run) for system in ("plain", ted.make(slices=2))
    )
    np.testing.assert_allclose(sliced.compute_s_SLG[..., ::2], alone.compute_s_SLG[..., ::2] / 2, rtol=1e-6)
    np.testing.assert_array_equal(sliced.compute_s_SLG[..., ::2], sliced.compute_s_SLG[..., 1::2])
    np.testing.assert_array_equal(held_G(half, NODE_G, 2), np.full(8, 0.5))


def test_slices_compose_with_what_drops_choices(write: Writer) -> None:
    cluster = cluster_of("a100-80", 2, 4)
    trace = write(MODEL, zipf_ids(2048, MODEL, 1.0))
    tight = replace(SYSTEMS["plain"], routing=Capacity(factor=1.0, inner=Sliced(slices=2)))
    found = simulate_event(trace, plan_of(MODEL, 8), cluster, tokens_per_device=256, system=tight)
    loose = simulate_event(trace, plan_of(MODEL, 8), cluster, tokens_per_device=256, system=replace(tight, routing=Capacity(factor=1.0)))
    np.testing.assert_allclose(found.tokens_SLG.sum(axis=2), loose.tokens_SLG.sum(axis=2))


def test_what_cannot_be_cut_is_said(write: Writer) -> None:
    trace, cluster = write(MODEL, zipf_ids(64, MODEL, 0.0)), cluster_of("a100-80", 2, 4)
    with pytest.raises(InputError, match="slices=0"):
        Sliced(slices=0)
    with pytest.raises(InputError, match=r"slices=8: nodes have \[4, 4\] devices"):
        groups(NODE_G, 8)
    with pytest.raises(InputError, match=r"slices=3: nodes have \[4, 4\] devices"):
        simulate(trace, plan_of(MODEL, 8), cluster, slices=3)
    with pytest.raises(InputError, match=r"slices=8: nodes have \[4, 4\] devices"):
        simulate_event(trace, plan_of(MODEL, 8), cluster, system=ted.make(slices=8))
    with pytest.raises(InputError, match=r"slices=4: the experts of 'tiny' are 2050 wide"):
        cut(CostModel.of(cluster, replace(MODEL, intermediate=2050)), 4)
    slots = np.tile(np.arange(40) % 32, (2, 1))
    near = Placement(slots_LP=slots, slots_G=np.full(8, 5), experts=32, layers=MODEL.moe_layers, dispatch="nearest")
    with pytest.raises(PlanError, match="replicas chosen by 'nearest'"):
        simulate(trace, plan_of(MODEL, near), cluster, slices=2)
    with pytest.raises(InputError, match="whole experts"):
        replace(ted.SYSTEM, residency=Residency())
