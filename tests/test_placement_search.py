"""Placement search against brute force, a MILP and theory; then its promises: valid, limited, repeatable, anytime."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from moesim.errors import InputError
from moesim_solvers.placement import search
from moesim_solvers.placement.annealing import anneal
from moesim_solvers.placement.balance import balanced_slots
from moesim_solvers.placement.limits import Limits
from moesim_solvers.placement.search import search_slots

NONE = 65535


def measure(experts_TK, load_E, slots_P, slots_G, node_G):
    """(busiest / mean load, devices per token, nodes per token), token by token, straight from the rule."""
    device_P = np.repeat(np.arange(len(slots_G)), slots_G)
    homes = [device_P[slots_P == e] for e in range(len(load_E))]
    load_G = np.zeros(len(slots_G))
    for e, home in enumerate(homes):
        for g in home:
            load_G[g] += load_E[e] / len(home)
    sent = [{homes[e][t % len(homes[e])] for e in row if e != NONE} for t, row in enumerate(experts_TK)]
    live = np.asarray(slots_G) > 0
    return (
        load_G.max() / max(load_G[live].mean(), 1e-300),
        np.mean([len(s) for s in sent]),
        np.mean([len({node_G[g] for g in s}) for s in sent]),
    )


def routing(seed, tokens, layers, width, experts, groups=0):
    """Token sets; with groups, most choices of a token come from one planted group of experts."""
    rng = np.random.default_rng(seed)
    favour = rng.normal(size=(1, layers, experts))
    if groups:
        favour = favour + 3.0 * (np.arange(experts) % groups == rng.integers(groups, size=(tokens, layers, 1)))
    key = favour + rng.gumbel(size=(tokens, layers, experts))
    return np.argsort(-key, axis=2)[:, :, :width].astype(np.uint16)


def loads(experts_TLK, experts):
    return np.array([np.bincount(row[row != NONE], minlength=experts) for row in experts_TLK.swapaxes(0, 1)], float)


def check(found, experts_TLK, load_LE, slots_G, node_G, prices):
    """Each layer valid, its cost what the rule says and no worse than the greedy balance's."""
    device_P = np.repeat(np.arange(len(slots_G)), slots_G)
    for layer, slots_P in enumerate(found.slots_LP):
        assert set(slots_P.tolist()) == set(range(load_LE.shape[1]))
        for g in range(len(slots_G)):
            here = slots_P[device_P == g]
            assert len(set(here.tolist())) == len(here), "an expert twice on a device"
        cost = np.dot(prices, measure(experts_TLK[:, layer], load_LE[layer], slots_P, slots_G, node_G))
        assert found.cost_L[layer] == pytest.approx(cost, abs=1e-9)
    assert (found.cost_L <= found.start_cost_L + 1e-12).all()


def every_placement(experts, slots_G):
    """All ways to fill devices with distinct experts, every expert placed."""
    for chosen in itertools.product(*(itertools.combinations(range(experts), n) for n in slots_G)):
        slots = [e for device in chosen for e in device]
        if len(set(slots)) == experts:
            yield np.array(slots)


@pytest.mark.parametrize(
    ("experts", "slots_G", "node_G", "prices"),
    [
        (8, [4, 4], [0, 1], (1.0, 1.0, 0.0)),
        (9, [3, 3, 3], [0, 0, 1], (3.0, 1.0, 2.0)),
        (8, [4, 3, 1], [0, 1, 1], (1.0, 0.3, 0.0)),
        (6, [3, 3, 2], [0, 1, 1], (1.0, 1.0, 1.0)),
        (4, [2, 2, 2], [0, 0, 1], (2.0, 1.0, 0.0)),
        (10, [4, 3, 3], [0, 1, 2], (0.0, 1.0, 0.0)),
        (7, [4, 0, 3], [0, 1, 2], (1.0, 0.0, 0.0)),
    ],
)
def test_small_instances_equal_brute_force(experts, slots_G, node_G, prices):
    experts_TLK = routing(experts, 40, 3, 3, experts, groups=3)
    load_LE = loads(experts_TLK, experts)
    found = search_slots(experts_TLK, load_LE, slots_G, node_G, busy=prices[0], fanout=prices[1], node_fanout=prices[2], noise=False)
    check(found, experts_TLK, load_LE, slots_G, node_G, prices)
    ways = list(every_placement(experts, slots_G))
    for layer in range(3):
        best = min(np.dot(prices, measure(experts_TLK[:, layer], load_LE[layer], way, slots_G, node_G)) for way in ways)
        assert found.cost_L[layer] == pytest.approx(best, abs=1e-9)


def lower_bound(experts_TK, load_E, devices, busy, fanout, known):
    """What HiGHS proves no placement can beat, 0.3 % below the optimum at most: busy · busiest/mean + fanout · devices.

    Every token chooses two experts, so the devices of a token are two less the pairs that share one: linear in pairs.
    Columns are the possible devices (sets of equal size); choose disjoint ones that cover all experts. Columns that
    no placement as cheap as the `known` one can contain are left out: they alone cost more.
    """
    experts, size = len(load_E), len(load_E) // devices
    together_EE = np.zeros((experts, experts))
    np.add.at(together_EE, (experts_TK[:, 0], experts_TK[:, 1]), 1)
    columns = np.array(list(itertools.combinations(range(experts), size)))
    saved_C = together_EE[columns[:, :, None], columns[:, None, :]].sum((1, 2)) / len(experts_TK)
    load_C = load_E[columns].sum(1) / (load_E.sum() / devices)
    share_EC = np.zeros((experts, len(columns)))
    share_EC[columns.ravel(), np.repeat(np.arange(len(columns)), size)] = np.repeat(saved_C, size) / size
    most_E = share_EC.max(1)
    keep_C = busy * load_C + fanout * (2 - saved_C - (most_E.sum() - most_E[columns].sum(1))) <= known + 1e-6
    columns, saved_C, load_C = columns[keep_C], saved_C[keep_C], load_C[keep_C]
    cover_EC = np.zeros((experts, len(columns) + 1))
    cover_EC[columns.ravel(), np.repeat(np.arange(len(columns)), size)] = 1
    # the busiest device: sum over columns that hold expert e of their load, for every e (tighter than one row per column)
    busiest_EC = cover_EC * np.append(load_C, 0)
    busiest_EC[:, -1] = -1
    answer = milp(
        np.append(-fanout * saved_C, busy),
        integrality=np.append(np.ones(len(columns)), 0),
        bounds=Bounds(0, np.append(np.ones(len(columns)), np.inf)),
        constraints=[LinearConstraint(cover_EC, 1, 1), LinearConstraint(busiest_EC, -np.inf, 0)],
        options={"mip_rel_gap": 0.01},
    )
    assert answer.status == 0, answer.message
    return answer.mip_dual_bound + 2 * fanout


def test_within_one_percent_of_the_milp_optimum_on_50_instances():
    experts_TLK = routing(0, 400, 50, 2, 16, groups=4)
    load_LE = loads(experts_TLK, 16)
    found = search_slots(experts_TLK, load_LE, [4] * 4, [0] * 4, busy=0.5, fanout=1.0, noise=False)
    best_L = np.array([lower_bound(experts_TLK[:, layer], load_LE[layer], 4, 0.5, 1.0, found.cost_L[layer]) for layer in range(50)])
    assert (found.cost_L >= best_L - 1e-6).all(), "better than the bound: the objectives differ"
    assert (found.cost_L <= 1.01 * best_L).all(), (found.cost_L / best_L).max()


@given(seed=st.integers(0, 2**20), price=st.sampled_from([0.0, 0.01, 0.1, 10.0]), spare=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_a_touch_never_loses_at_its_price_and_dear_moves_are_not_made(seed, price, spare):
    slots_G, node_G = [3, 3, 3, 3 + spare], [0, 0, 1, 1]
    experts_TLK = routing(seed, 128, 2, 3, 12, groups=3)
    name_LE = np.array([np.random.default_rng([seed, layer]).permutation(12) for layer in range(2)])
    live_LP, device_P = np.concatenate([name_LE, name_LE[:, :spare]], axis=1), np.repeat(np.arange(4), slots_G)
    live_LGE = np.zeros((2, 4, 12), np.bool_)
    live_LGE[np.arange(2)[:, None], device_P, live_LP] = True
    found = search.Search(
        experts_TLK, loads(experts_TLK, 12), slots_G, node_G, busy=1.0, fanout=0.5, node_fanout=0.5, peak=0.0, noise=False,
        limits=Limits(live_LGE=live_LGE, start_LP=live_LP),
    )  # fmt: skip
    slots_LP, finished = found.touched(live_LP, move=price, seed=(seed,))
    assert finished
    for layer in range(2):
        before, after = (
            np.dot((1.0, 0.5, 0.5), measure(experts_TLK[:, layer], loads(experts_TLK, 12)[layer], slots_P, slots_G, node_G))
            for slots_P in (live_LP[layer], slots_LP[layer])
        )
        moves = int((~live_LGE[layer, device_P, slots_LP[layer]]).sum())
        assert after + price * moves <= before + 1e-9
        assert price < 10.0 or not moves


@given(load=st.lists(st.integers(1, 50), min_size=1, max_size=8), devices=st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_greedy_balance_keeps_the_lpt_bound(load, devices):
    """Empty experts pad every device to its slots, so that capacity does not bind (Graham 1969)."""
    jobs = np.array(load, float)
    load_E = np.concatenate([jobs, np.zeros(len(jobs) * (devices - 1))])
    slots = balanced_slots(load_E, np.arange(devices + 1) * len(jobs))
    busiest = load_E[slots].reshape(devices, -1).sum(1).max()
    best = min(np.bincount(way, weights=jobs, minlength=devices).max() for way in itertools.product(range(devices), repeat=len(jobs)))
    assert busiest <= (4 / 3 - 1 / (3 * devices)) * best + 1e-9


@given(
    seed=st.integers(0, 2**20),
    experts=st.integers(3, 12),
    slots_G=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    width=st.integers(1, 3),
    tokens=st.integers(1, 150),
)
@settings(max_examples=40, deadline=None)
def test_any_cluster_gets_a_valid_plan_scored_by_the_rule(seed, experts, slots_G, width, tokens):
    slots_G = [min(n, experts) for n in slots_G]
    if sum(slots_G) < experts:
        slots_G.append(experts)
    node_G = [g // 2 for g in range(len(slots_G))]
    experts_TLK = routing(seed, tokens, 1, width, experts)
    experts_TLK[np.random.default_rng(seed).random(experts_TLK.shape) < 0.1] = NONE
    load_LE = loads(experts_TLK, experts)
    found = search_slots(experts_TLK, load_LE, slots_G, node_G, busy=1.0, fanout=0.5, node_fanout=0.25, noise=False, seed=seed, time_limit_s=0.05)
    check(found, experts_TLK, load_LE, slots_G, node_G, (1.0, 0.5, 0.25))


def test_relabelling_experts_leaves_the_objective():
    experts_TLK = routing(3, 60, 4, 3, 9, groups=3)
    name = np.random.default_rng(1).permutation(9).astype(np.uint16)
    costs = [search_slots(ids, loads(ids, 9), [3, 3, 3], [0, 0, 1], node_fanout=0.5).cost_L for ids in (experts_TLK, name[experts_TLK])]
    assert costs[0] == pytest.approx(costs[1], abs=1e-9)


def test_scaling_prices_scales_the_cost_and_keeps_the_plan():
    experts_TLK = routing(4, 200, 2, 4, 16, groups=4)
    one, tiny = (
        search_slots(experts_TLK, loads(experts_TLK, 16), [5] * 4, [0, 0, 1, 1], busy=2 * x, fanout=x, node_fanout=x) for x in (1.0, 2.0**-20)
    )
    assert (one.slots_LP == tiny.slots_LP).all()
    assert tiny.cost_L == pytest.approx(one.cost_L * 2.0**-20)


def test_planted_groups_come_home():
    """Disjoint groups, one per device: the search finds one device per token at perfect balance."""
    rng = np.random.default_rng(5)
    group_E = rng.permutation(np.arange(32) % 4)
    members = np.array([np.flatnonzero(group_E == g) for g in range(4)])
    experts_TLK = np.array([rng.permutation(members[t % 4])[:4] for t in range(2000)], np.uint16)[:, None]
    found = search_slots(experts_TLK, np.ones((1, 32)), [8] * 4, [0] * 4)
    load, devices, _ = measure(experts_TLK[:, 0], np.ones(32), found.slots_LP[0], [8] * 4, [0] * 4)
    assert (load, devices) == (1.0, 1.0)


@pytest.mark.parametrize("slots", [24, 32])
def test_travel_and_the_price_of_all_fall_on_tokens_not_seen(slots):
    experts_TLK = routing(6, 4000, 3, 4, 24, groups=5)
    seen, unseen = experts_TLK[:2000], experts_TLK[2000:]
    slots_G, node_G, load_LE = [slots // 4] * 4, [0, 0, 1, 1], loads(seen, 24)
    found = search_slots(seen, load_LE, slots_G, node_G, fanout=0.2)
    for layer, slots_P in enumerate(found.slots_LP):
        greedy = balanced_slots(load_LE[layer], np.concatenate([[0], np.cumsum(slots_G)]))
        even, far, _ = measure(unseen[:, layer], loads(unseen, 24)[layer], greedy, slots_G, node_G)
        load, near, _ = measure(unseen[:, layer], loads(unseen, 24)[layer], slots_P, slots_G, node_G)
        assert near < 0.9 * far
        assert load + 0.2 * near < even + 0.2 * far


def test_noise_keeps_apart_what_surges_together():
    """Experts 0 and 2 take turns with 1 and 3: equal in sum, but a device with both of a pair is idle half the time."""
    early, late = np.array([[0], [2]] * 50), np.array([[1], [3]] * 50)
    experts_TLK = np.concatenate([early, late])[:, None].astype(np.uint16)
    plans = [search_slots(experts_TLK, loads(experts_TLK, 4), [2, 2], [0, 0], fanout=0.0, noise=noise).slots_LP[0] for noise in (False, True)]
    careless, careful = [{frozenset(pair) for pair in plan.reshape(2, 2).tolist()} for plan in plans]
    assert frozenset({0, 2}) in careless
    assert frozenset({0, 2}) not in careful


def test_load_with_noise_bounds_the_expected_busiest_load():
    """Jensen: E max <= soft · log Σ E exp(x / soft); against draws of loads with the covariance that the parts of the sample show."""
    experts_TLK, slots_G = routing(2, 3000, 1, 3, 16, groups=3), [4] * 4
    load_LE = loads(experts_TLK, 16)
    found = search_slots(experts_TLK, load_LE, slots_G, [0] * 4, fanout=0.0)
    share_BE = np.array([loads(part, 16)[0] / part.size for part in np.array_split(experts_TLK, 32)])
    noise_EE = np.cov(share_BE.T) * 2 / 32
    drawn_NE = np.random.default_rng(0).multivariate_normal(load_LE[0] / load_LE.sum(), noise_EE, 4000)
    busiest_N = drawn_NE[:, found.slots_LP[0]].reshape(4000, 4, 4).sum(2).max(1) * 4
    assert busiest_N.mean() <= found.cost_L[0] <= busiest_N.mean() + 0.1


@pytest.mark.parametrize("slots", [12, 16])
def test_what_annealing_keeps_up_to_date_equals_a_fresh_count(slots, monkeypatch):
    """Sets, loads and noise of the state, its busy ratio, and every count it would still use."""
    seen = []
    monkeypatch.setattr(search, "anneal", lambda layer, state, *rest: (seen.append((layer, state)), anneal(layer, state, *rest)))
    experts_TLK = routing(1, 500, 1, 3, 12, groups=3)
    search_slots(experts_TLK, loads(experts_TLK, 12), [slots // 4] * 4, [0, 0, 1, 1], node_fanout=0.5, peak=0.3)
    for layer, state in seen:
        fresh = search._state(layer, state.slots_P, 0)
        for name in ("bits_PW", "any_GW", "many_GW", "any_NW", "many_NW", "reach_G", "reach_N", "count_E"):
            assert np.array_equal(getattr(state, name), getattr(fresh, name)), name
        for name in ("load_G", "noise_G", "sway_GE", "tail_G", "busy_2"):
            assert getattr(state, name) == pytest.approx(getattr(fresh, name), rel=1e-6, abs=1e-6), name
        for alone_PD, when_PD, turned_D, any_DW, many_DW, of_G in (
            (state.alone_PG, state.when_PG, state.turned_G, state.any_GW, state.many_GW, np.arange(4)),
            (state.alone_PN, state.when_PN, state.turned_N, state.any_NW, state.many_NW, layer.node_G),
        ):
            for slot, d in np.argwhere(when_PD >= np.maximum(state.born_P[:, None], turned_D)):
                others_W = many_DW[d] if of_G[layer.device_P[slot]] == d else any_DW[d]
                assert alone_PD[slot, d] == np.bitwise_count(state.bits_PW[slot] & ~others_W).sum()


def answer(threads):
    experts_TLK = routing(8, 300, 3, 4, 16, groups=4)
    found = search_slots(experts_TLK, loads(experts_TLK, 16), [5, 5, 5, 5], [0, 0, 1, 1], node_fanout=1.0, seed=7, threads=threads)
    return found.slots_LP.tolist()


def test_same_seed_same_plan_in_any_process_and_with_any_threads():
    script = "import sys; sys.path[:0] = sys.argv[1:]; from test_placement_search import answer; print(answer(1))"
    paths = [p for p in sys.path if p]
    here = str(__import__("pathlib").Path(__file__).parent)
    other = subprocess.run([sys.executable, "-c", script, here, *paths], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(answer(2))


def test_nothing_is_compiled_once_the_clock_runs():
    """Read-only arrays have a type of their own: handed on as they are, a live plan had every kernel compiled inside its time limit."""
    search.compile_kernels()
    kernels = (anneal, search.descend, search.typical_step, search.evaluate, search.cost)
    before = [list(kernel.signatures) for kernel in kernels]
    live_LGE = np.zeros((1, 2, 4), np.bool_)
    live_LGE[0, 0, :2] = live_LGE[0, 1, 2:] = True
    live_LGE.setflags(write=False)
    limits = Limits(live_LGE=live_LGE, pinned_LGE=live_LGE & False, apart_LEE=np.zeros((1, 4, 4), np.bool_), move=0.1)
    search_slots(np.array([[[0, 2]], [[1, 3]], [[0, 1]]]), np.ones((1, 4)), [2, 2], [0, 0], limits=limits)
    assert [list(kernel.signatures) for kernel in kernels] == before


def test_time_limit_returns_the_best_so_far_and_progress_rises():
    experts_TLK = routing(9, 4096, 8, 8, 128, groups=16)
    load_LE, told = loads(experts_TLK, 128), []
    search_slots(experts_TLK[:64], load_LE, [10] * 16, [0] * 16, time_limit_s=0.01)  # compile
    start = time.monotonic()
    found = search_slots(experts_TLK, load_LE, [10] * 16, [0] * 16, time_limit_s=0.3, progress=lambda *at: told.append(at))
    assert time.monotonic() - start < 3.0
    assert not found.finished
    assert found.cost_L.mean() < found.start_cost_L.mean()
    shares, costs = zip(*told, strict=True)
    assert list(shares) == sorted(shares)
    assert shares[-1] == 1.0
    assert list(costs) == sorted(costs, reverse=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts_TLK": np.full((4, 1, 2), 9, np.uint16)}, "expert id 9 at token 0, layer 0"),
        ({"load_LE": -np.ones((1, 8))}, "load -1.0 at layer 0, expert 0"),
        ({"load_LE": np.ones((2, 8))}, "disagree"),
        ({"slots_G": [3, 4]}, "for 8 experts"),
        ({"slots_G": [9, 4]}, "no device more than 8"),
        ({"node_G": [0]}, "one node per device"),
        ({"fanout": -1.0}, "finite and >= 0"),
    ],
)
def test_wrong_input_is_named(change, words):
    given = {"experts_TLK": routing(0, 4, 1, 2, 8), "load_LE": np.ones((1, 8)), "slots_G": [4, 4], "node_G": [0, 0]} | change
    with pytest.raises(InputError, match=words):
        search_slots(**given)
