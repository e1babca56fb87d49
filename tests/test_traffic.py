"""Traffic of a placement: conservation, equality with counting token by token, invariance under relabelling."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost import route
from moesim.cost.split import split_SLP
from moesim.plan import DISPATCH_RULES, Placement, slots_per_device
from moesim.trace import NO_EXPERT

DEVICES, NODE_G = 4, np.array([0, 0, 1, 1])
MODEL = tiny_model(top_k=3)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, Placement]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = clustered_routing(MODEL, draw(st.integers(8, 120)), seed=int(rng.integers(1 << 30)))
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.2]))] = NO_EXPERT
    extra = draw(st.integers(0, 3)) * DEVICES
    rows = np.stack([rng.permutation(np.concatenate([np.arange(16), rng.integers(0, 16, extra)])) for _ in range(3)])
    per_device = slots_per_device(16 + extra, DEVICES).copy()
    if draw(st.booleans()):
        per_device += np.array([1, -1, 2, -2])
    return ids, Placement(slots_LP=rows, slots_G=per_device, experts=16, layers=MODEL.moe_layers, dispatch=draw(st.sampled_from(DISPATCH_RULES)))


@given(case=cases(), steps=st.integers(1, 4))
def test_tokens_are_conserved(case: tuple[np.ndarray, Placement], steps: int) -> None:
    ids, placement = case
    ends = np.arange(1, steps + 1) * len(ids) // steps
    traffic = route(ids, placement, NODE_G, ends_S=ends)
    np.testing.assert_array_equal(traffic.slot_tokens_SLP.sum((0, 2)), (ids != NO_EXPERT).sum((0, 2)))
    load_LE = np.zeros((3, 16))
    for layer in range(3):
        np.add.at(load_LE[layer], placement.slots_LP[layer], traffic.slot_tokens_SLP.sum(0)[layer])
        np.testing.assert_array_equal(load_LE[layer], np.bincount(ids[:, layer][ids[:, layer] != NO_EXPERT], minlength=16))
    assert traffic.tokens_SG.sum() == len(ids)
    assert (traffic.fanout_nodes_L <= traffic.fanout_devices_L).all()
    assert (traffic.copies_SLGG.sum(3) <= traffic.tokens_SG[:, None] * min(DEVICES, 3)).all()
    np.testing.assert_allclose(traffic.device_tokens_SLG(placement).sum(2), traffic.slot_tokens_SLP.sum(2))


@given(case=cases())
def test_it_equals_counting_token_by_token(case: tuple[np.ndarray, Placement]) -> None:
    ids, placement = case
    traffic = route(ids, placement, NODE_G)
    slots = np.zeros_like(traffic.slot_tokens_SLP[0])
    copies = np.zeros_like(traffic.copies_SLGG[0])
    nodes = np.zeros_like(traffic.node_copies_SLGN[0])
    on_device = np.zeros((3, DEVICES))
    count_SLE = np.stack([np.bincount(ids[:, layer][ids[:, layer] != NO_EXPERT], minlength=16) for layer in range(3)])[None]
    quota_SLP = split_SLP(count_SLE, placement)
    for token in range(len(ids)):
        source = token * DEVICES // len(ids)
        for layer in range(3):
            reached = set()
            for expert in ids[token, layer][ids[token, layer] != NO_EXPERT]:
                mine = np.flatnonzero(placement.slots_LP[layer] == expert)
                homes = placement.device_P[mine]
                if placement.dispatch == "static-source":
                    mine = mine[homes == source][:1] if (homes == source).any() else mine[:1] if len(mine) > 1 else mine
                elif placement.dispatch == "nearest":
                    near = [s for s in mine if placement.device_P[s] == source] or [
                        s for s in mine if NODE_G[placement.device_P[s]] == NODE_G[source]
                    ]
                    mine = near or mine
                if placement.dispatch == "static-source" and len(mine) > 1:
                    mine = mine[:1]
                slot = mine[token % len(mine)]
                if placement.dispatch == "least-loaded" and len(mine) > 1:
                    slot = min(mine, key=lambda s: (on_device[layer, placement.device_P[s]], s))
                if placement.dispatch == "lp" and len(mine) > 1:
                    quota_P = quota_SLP[0, layer]
                    slot = min((s for s in mine if quota_P[s]), key=lambda s: (slots[layer, s] / quota_P[s], s))
                on_device[layer, placement.device_P[slot]] += 1
                slots[layer, slot] += 1
                reached.add(placement.device_P[slot])
            for device in reached:
                copies[layer, source, device] += 1
            for node in {NODE_G[device] for device in reached}:
                nodes[layer, source, node] += 1
    np.testing.assert_array_equal(traffic.slot_tokens_SLP[0], slots)
    np.testing.assert_array_equal(traffic.copies_SLGG[0], copies)
    np.testing.assert_array_equal(traffic.node_copies_SLGN[0], nodes)


@given(case=cases(), seed=st.integers(0, 1000))
def test_relabelling_experts_changes_nothing(case: tuple[np.ndarray, Placement], seed: int) -> None:
    ids, placement = case
    renamed = np.stack([np.random.default_rng(seed + layer).permutation(16) for layer in range(3)])
    new_ids = np.where(ids == NO_EXPERT, NO_EXPERT, np.stack([renamed[layer][np.minimum(ids[:, layer], 15)] for layer in range(3)], 1))
    slots = np.stack([renamed[layer][placement.slots_LP[layer]] for layer in range(3)])
    other = Placement(slots_LP=slots, slots_G=placement.slots_G, experts=16, layers=placement.layers, dispatch=placement.dispatch)
    a, b = route(ids, placement, NODE_G), route(new_ids.astype(np.uint16), other, NODE_G)
    np.testing.assert_array_equal(a.slot_tokens_SLP, b.slot_tokens_SLP)
    np.testing.assert_array_equal(a.copies_SLGG, b.copies_SLGG)


def test_one_device_keeps_everything_at_home() -> None:
    ids = clustered_routing(MODEL, 40)
    p = Placement(slots_LP=np.tile(np.arange(16), (3, 1)), slots_G=np.array([16]), experts=16, layers=MODEL.moe_layers)
    traffic = route(ids, p, np.zeros(1, int))
    np.testing.assert_array_equal(traffic.copies_SLGG[0, :, 0, 0], 40)


def test_uniform_choice_reaches_the_expected_number_of_devices() -> None:
    """8·(1 - C(56,6)/C(64,6)) = 4.536 distinct devices for 6 of 64 experts, 8 per device."""
    model = tiny_model(layers=1, experts=64, top_k=6)
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((20_000, 1, 64)), axis=2)[:, :, :6].astype(np.uint16)
    p = Placement(slots_LP=np.arange(64)[None], slots_G=slots_per_device(64, 8), experts=64, layers=model.moe_layers)
    assert route(ids, p, np.zeros(8, int)).fanout_devices_L[0] == pytest.approx(4.536, abs=0.02)


def test_scaling_to_a_step_size_keeps_proportions() -> None:
    ids = clustered_routing(MODEL, 30)
    p = Placement(slots_LP=np.tile(np.arange(16), (3, 1)), slots_G=slots_per_device(16, 4), experts=16, layers=MODEL.moe_layers)
    one, big = route(ids, p, NODE_G), route(ids, p, NODE_G, tokens_per_step=300)
    np.testing.assert_allclose(big.slot_tokens_SLP, 10 * one.slot_tokens_SLP)
    np.testing.assert_allclose(big.fanout_devices_L, one.fanout_devices_L)
