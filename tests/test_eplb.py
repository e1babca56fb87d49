"""EPLB: upstream's golden vectors bit for bit, then what must hold for any weights."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim_solvers.placement.eplb import rebalance_experts

# deepseek-ai/EPLB@d52c72d, MIT: README example, and further answers of the same code for the same weights
WEIGHT = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
GOLDEN = {
    (16, 4, 2, 8): (
        [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]],
        [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]],
        [1.2081, 1.2422],
    ),
    (16, 1, 1, 8): (
        [[10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1], [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7]],
        [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1]],
        [1.0726, 1.1903],
    ),
    (12, 4, 2, 4): (
        [[5, 3, 7, 4, 8, 6, 10, 11, 2, 1, 0, 9], [6, 9, 11, 8, 7, 10, 5, 3, 4, 1, 2, 0]],
        [[1] * 12] * 2,
        [1.1965, 1.1938],
    ),
    (12, 1, 1, 12): ([list(range(12))] * 2, [[1] * 12] * 2, None),
}
LOG2PHY = [
    [[12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2], [1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]],
    [[13, -1], [15, 11], [8, -1], [14, -1], [9, -1], [10, 12], [2, 4], [0, -1], [6, 3], [7, -1], [1, -1], [5, -1]],
]


def load_ratio(weight_E: np.ndarray, slots_P: np.ndarray, devices: int) -> float:
    share_E = weight_E / np.bincount(slots_P, minlength=len(weight_E))
    load_G = share_E[slots_P].reshape(devices, -1).sum(1)
    return float(load_G.max() / load_G.mean())


@pytest.mark.parametrize("sizes", GOLDEN)
def test_golden_vectors(sizes):
    slots_LP, count_LE, ratios = GOLDEN[sizes]
    phy2log, _, logcnt = rebalance_experts(WEIGHT, *sizes)
    assert phy2log.tolist() == slots_LP
    assert logcnt.tolist() == count_LE
    if ratios:
        assert [load_ratio(w, p, sizes[3]) for w, p in zip(WEIGHT, phy2log, strict=True)] == pytest.approx(ratios, abs=5e-5)


def test_golden_log2phy():
    assert rebalance_experts(WEIGHT, 16, 4, 2, 8)[1].tolist() == LOG2PHY


def test_groups_that_do_not_divide_over_nodes_fall_back_to_the_global_rule():
    for got, want in zip(rebalance_experts(WEIGHT, 16, 3, 2, 8), rebalance_experts(WEIGHT, 16, 1, 1, 8), strict=True):
        assert (got == want).all()


def test_ties_take_the_lowest_expert_and_the_first_device():
    slots, _, count = rebalance_experts(np.ones((1, 4)), 6, 1, 1, 2)
    assert count.tolist() == [[2, 2, 1, 1]]
    assert slots.tolist() == [[2, 0, 0, 3, 1, 1]]  # whole shares 2 and 3 first, then halves in order of replication: 0, 1, 0, 1


@given(data=st.data(), nodes=st.sampled_from([1, 2]), devices=st.sampled_from([2, 4]), extra=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_maps_are_inverse_and_every_expert_has_a_slot(data, nodes, devices, extra):
    experts, slots = 8, 8 + extra * devices
    weight = np.array(data.draw(st.lists(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts), min_size=1, max_size=3)))
    phy2log, log2phy, logcnt = rebalance_experts(weight, slots, 2, nodes, devices)
    for p, inverse, count, w in zip(phy2log, log2phy, logcnt, weight, strict=True):
        assert (np.bincount(p, minlength=experts) == count).all()
        assert count.min() >= 1
        assert ((inverse >= 0).sum(1) == count).all()
        assert all(p[slot] == e for e in range(experts) for slot in inverse[e] if slot >= 0)
        assert np.isclose((w / count)[p].sum(), w.sum())


def plain_rebalance(weight: list[list[float]], slots: int, devices: int) -> list[list[int]]:
    """The global rule in plain Python."""
    answer = []
    for row in weight:
        count, copies = [1] * len(row), list(range(len(row)))
        for _ in range(slots - len(row)):
            best = max(range(len(row)), key=lambda e: row[e] / count[e])
            copies.append(best)
            count[best] += 1
        share = [np.float32(row[e]) / np.float32(count[e]) for e in copies]
        load, held = [np.float32(0)] * devices, [[] for _ in range(devices)]
        for item in sorted(range(slots), key=lambda i: -share[i]):
            best = min((g for g in range(devices) if len(held[g]) < slots // devices), key=load.__getitem__)
            held[best].append(copies[item])
            load[best] += share[item]
        answer.append([e for device in held for e in device])
    return answer


def test_equals_plain_python_and_is_five_times_faster():
    weight = np.random.default_rng(0).zipf(1.5, (58, 256)).clip(max=5000).astype(float)
    rebalance_experts(weight[:1], 320, 1, 1, 64)  # compile
    start = time.process_time()
    fast = rebalance_experts(weight, 320, 1, 1, 64)[0]
    fast_s = time.process_time() - start
    start = time.process_time()
    plain = plain_rebalance(weight.tolist(), 320, 64)
    plain_s = time.process_time() - start
    assert fast.tolist() == plain
    assert plain_s > 5 * fast_s, f"{plain_s:.3f} s against {fast_s:.3f} s"


@pytest.mark.parametrize(
    ("weight", "sizes", "words"),
    [
        (WEIGHT, (15, 4, 2, 3), "devices=3 is not a multiple of nodes=2"),
        (WEIGHT, (13, 1, 1, 8), "replicas=13 is not a multiple of devices=8"),
        (WEIGHT, (16, 8, 2, 8), "experts=12 is not a multiple of groups=8"),
        (WEIGHT, (8, 1, 1, 8), "pass replicas >= 12"),
        (-WEIGHT, (16, 1, 1, 8), "weight -90.0 at layer 0, expert 0"),
        (WEIGHT[0], (16, 1, 1, 8), "shape"),
    ],
)
def test_wrong_input_is_named(weight, sizes, words):
    with pytest.raises(InputError, match=words):
        rebalance_experts(weight, *sizes)
