"""Solvers against what can be proved: brute force, Graham's bound, lower bounds, planted structure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.cost import route
from moesim.hardware import load_cluster
from moesim.model import ModelSpec
from moesim.optimize import Problem, Status, run_solver, solver_names
from moesim.plan import DISPATCH_RULES, Placement
from moesim.testing import MODEL, clustered_routing, problem_of
from moesim.trace import TraceStats
from moesim_solvers.placement.balance import balanced_slots
from moesim_solvers.placement.bounds import fanout_floor_L, load_floor_L, load_ratio_L, price_floor, price_L
from moesim_solvers.placement.exflow import improve, link_cost_GG, way_cost
from moesim_solvers.placement.ilp import Layer, prove, solve_columns, solve_compact
from moesim_solvers.placement.moetuner import TOLERANCE, balanced_clusters, deviation
from moesim_solvers.placement.partition import refine, split
from moesim_solvers.placement.robust import reweighted, tail_mean
from moesim_solvers.placement.round_robin import deal
from moesim_solvers.placement.search import search_slots

Ints = NDArray[np.int64]


def routing(seed: int, tokens: int, layers: int, experts: int, width: int) -> NDArray[np.uint16]:
    """Tokens with skew and pairs that like each other."""
    rng = np.random.default_rng(seed)
    taste_LE = rng.gamma(1.0, size=(layers, experts))
    bond_LTE = rng.normal(size=(layers, 4, experts))[:, rng.integers(0, 4, tokens)]
    score = np.log(taste_LE)[:, None] + bond_LTE + rng.gumbel(size=(layers, tokens, experts))
    return np.argsort(-score, axis=2)[:, :, :width].transpose(1, 0, 2).astype(np.uint16)


def spec(layers: int, experts: int, width: int) -> ModelSpec:
    return ModelSpec(name="exact", layers=layers, moe_layers=tuple(range(layers)), hidden=2048, intermediate=1408, experts=experts, top_k=width)


def layer_of(ids_TLK: NDArray[np.uint16], experts: int, slots_G: list[int], node_G: list[int], prices: tuple[float, float, float]) -> Layer:
    stats = TraceStats.from_experts(ids_TLK, spec(1, experts, ids_TLK.shape[2]))
    together_EE = stats.coactivation_LEE[0].astype(np.float64)
    np.fill_diagonal(together_EE, 0.0)
    busy, fanout, node_fanout = prices
    return Layer(
        load_E=stats.load_LE[0].astype(np.float64),
        together_EE=together_EE,
        tokens=len(ids_TLK),
        width=ids_TLK.shape[2],
        slots_G=np.array(slots_G),
        node_G=np.array(node_G),
        busy=busy,
        fanout=fanout,
        node_fanout=node_fanout,
    )


def every_placement(experts: int, slots_G: list[int]) -> Iterator[Ints]:
    """Every set of experts on every device such that all have a slot; equal first devices come in one order only."""
    for sets in itertools.product(*(itertools.combinations(range(experts), slots) for slots in slots_G)):
        if len(set().union(*sets)) == experts:
            yield np.array([expert for members in sets for expert in members])


def every_partition(experts: int, slots_G: list[int]) -> Iterator[Ints]:
    """The same without replicas, without wasting time on overlaps."""

    def fill(left: tuple[int, ...], sizes: list[int]) -> Iterator[list[int]]:
        if not sizes:
            yield []
            return
        for members in itertools.combinations(left, sizes[0]):
            for rest in fill(tuple(sorted(set(left) - set(members))), sizes[1:]):
                yield [*members, *rest]

    for slots in fill(tuple(range(experts)), slots_G):
        yield np.array(slots)


PRICES = st.sampled_from([(1.0, 0.15, 0.0), (1.0, 1.0, 0.0), (0.2, 1.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])


@settings(max_examples=12)
@given(
    st.integers(0, 10**6), st.sampled_from([[3, 3], [4, 2], [3, 3, 2], [3, 3, 3], [4, 4], [5, 3, 0], [4, 3, 3], [5, 5]]), st.integers(2, 4), PRICES
)
def test_both_programs_find_what_brute_force_finds(seed: int, slots_G: list[int], width: int, prices: tuple[float, float, float]) -> None:
    experts = sum(slots_G)
    layer = layer_of(routing(seed, 120, 1, experts, min(width, experts)), experts, slots_G, [0] * len(slots_G), prices)
    best = min(layer.price(slots_P) for slots_P in every_partition(experts, slots_G))
    start_P = np.arange(experts)
    for proof in (solve_columns(layer, start_P, stop_s=math.inf), solve_compact(layer, start_P, time_limit_s=60)):
        assert proof.optimal
        assert proof.price == pytest.approx(best, rel=2e-6, abs=2e-6)
        assert proof.price == pytest.approx(layer.price(proof.slots_P))
    assert layer.floor() <= best + 1e-9


@settings(max_examples=8)
@given(
    st.integers(0, 10**6),
    st.sampled_from([([3, 2], 4), ([3, 3], 4), ([3, 3, 2], 6), ([2, 2, 2], 4), ([3, 3], 5)]),
    st.sampled_from([(1.0, 0.3, 0.0), (0.3, 1.0, 0.0), (1.0, 0.2, 0.5)]),
)
def test_replicas_and_nodes_too(seed: int, shape: tuple[list[int], int], prices: tuple[float, float, float]) -> None:
    slots_G, experts = shape
    layer = layer_of(routing(seed, 120, 1, experts, 2), experts, slots_G, [0, 0, 1][-len(slots_G) :], prices)
    choices = list(every_placement(experts, slots_G))
    best = min(layer.price(slots_P) for slots_P in choices)
    proof, way = prove(layer, choices[0], time_limit_s=60)
    assert way == "compact"
    assert proof.optimal
    assert proof.price == pytest.approx(best, rel=2e-6, abs=2e-6)
    assert layer.floor() <= best + 1e-9


def test_its_objective_is_at_most_the_true_price_and_equal_for_two_choices() -> None:
    for width, slots in itertools.product((2, 4), (16, 24)):
        problem = problem_of(routing(width, 400, 1, 16, width), spec(1, 16, width), slots=slots)
        price = problem.weights
        layer = layer_of(problem.experts_TLK, 16, problem.slots_G.tolist(), [0] * 8, (price.load_s, price.devices_s, 0.0))
        slots_P = run_solver("random", problem).placement.slots_LP[0]  # type: ignore[union-attr]
        mine, true = layer.price(slots_P), float(price_L(problem, slots_P[None])[0])
        assert mine <= true + 1e-12
        if (width, slots) == (2, 16):
            assert mine == pytest.approx(true)


def test_local_search_is_within_one_per_cent_of_the_optimum() -> None:
    """Twenty layers of 16 experts on 4 devices, tokens choosing two, where the program's objective is the true price."""
    layers, experts, slots_G = 20, 16, [4] * 4
    ids_TLK = routing(5, 200, layers, experts, 2)
    load_LE = TraceStats.from_experts(ids_TLK, spec(layers, experts, 2)).load_LE
    busy, fanout = 1.0, 0.5
    found = search_slots(ids_TLK, load_LE, slots_G, [0] * 4, busy=busy, fanout=fanout, noise=False, seed=1, threads=1)
    excess = []
    for row in range(layers):
        layer = layer_of(ids_TLK[:, row : row + 1], experts, slots_G, [0] * 4, (busy, fanout, 0.0))
        proof, way = prove(layer, found.slots_LP[row], time_limit_s=60)
        assert (way, proof.optimal) == ("columns", True)
        excess.append(layer.price(found.slots_LP[row]) / proof.price - 1)
    assert max(excess) <= 0.01
    assert min(excess) >= -1e-9


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=8), st.integers(2, 3))
def test_longest_first_keeps_grahams_bound(loads: list[int], devices: int) -> None:
    """At most 4/3 - 1/(3m) of the best where slots do not bind: experts without load fill the rest (Graham 1969)."""
    slots = len(loads)
    load_E = np.zeros(slots * devices)
    load_E[: len(loads)] = loads
    slots_P = balanced_slots(load_E, np.arange(devices + 1) * slots)
    busiest = load_E[slots_P].reshape(devices, slots).sum(axis=1).max()
    best = min(np.bincount(at, loads, devices).max() for at in itertools.product(range(devices), repeat=len(loads)))
    assert busiest <= best * (4 / 3 - 1 / (3 * devices)) + 1e-9


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([([3, 3], 6), ([4, 2], 6), ([2, 2, 2], 6), ([3, 2], 4), ([3, 3, 2], 6), ([3, 3], 4)]))
def test_floors_are_below_every_placement(seed: int, shape: tuple[list[int], int]) -> None:
    slots_G, experts = shape
    ids_TLK = routing(seed, 60, 1, experts, 3)
    stats = TraceStats.from_experts(ids_TLK, spec(1, experts, 3))
    load_floor = load_floor_L(stats.load_LE.astype(float), slots_G)[0]
    fanout_floor = fanout_floor_L(ids_TLK, stats.coactivation_LEE, slots_G)[0]
    for index, slots_P in enumerate(itertools.islice(every_placement(experts, slots_G), 0, None, 3)):
        assert load_ratio_L(stats.load_LE.astype(float), slots_P[None], slots_G)[0] >= load_floor - 1e-9
        if index % 23 == 0:
            placement = Placement(
                slots_LP=slots_P[None].astype(np.int32),
                slots_G=np.array(slots_G, np.int32),
                experts=experts,
                layers=(0,),
                dispatch=DISPATCH_RULES[index % len(DISPATCH_RULES)],
            )
            assert route(ids_TLK, placement, np.zeros(len(slots_G), np.int32)).fanout_devices_L[0] >= fanout_floor - 1e-9


def test_floors_are_attained_where_structure_is_perfect() -> None:
    """Tokens choose both experts of one of four pairs: one device each. A hot expert alone: its load over the mean."""
    ids_TLK = np.repeat(np.arange(8).reshape(4, 1, 2), 10, axis=0).astype(np.uint16)
    together = TraceStats.from_experts(ids_TLK, spec(1, 8, 2)).coactivation_LEE
    assert fanout_floor_L(ids_TLK, together, [2] * 4)[0] == 1.0
    assert fanout_floor_L(ids_TLK, together, [1] * 8)[0] == 2.0
    assert load_floor_L(np.array([[9.0, 1, 1, 1]]), [1] * 4)[0] == 3.0
    assert load_floor_L(np.array([[8.0, 2, 1, 1]]), [2, 2])[0] == 9 / 6  # the hottest and the lightest share a device
    assert load_floor_L(np.array([[5.0, 5, 5, 0]]), [2, 2])[0] == 10 / 7.5  # two of the three hottest share a device


@given(st.integers(1, 12), st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_dealing_fills_every_slot_once(experts: int, room: list[int], seed: int) -> None:
    cards = np.random.default_rng(seed).integers(0, experts, sum(room)).tolist()
    dealt = deal(cards, room)
    assert sorted(dealt.tolist()) == sorted(cards)
    assert deal(np.arange(16).tolist(), [2] * 8).reshape(8, 2).tolist() == [[g, g + 8] for g in range(8)]


def test_round_robin_and_random_spread_replicas() -> None:
    problem = problem_of(clustered_routing(MODEL, 50), MODEL, slots=24)
    for name in ("round-robin", "random"):
        placement = run_solver(name, problem).placement
        assert placement is not None
        assert set(placement.replicas_LE.ravel().tolist()) == {1, 2}
        assert (placement.holds_LGE.sum(axis=2) == 3).all()  # no device holds an expert twice
    first, other = (run_solver("random", problem, seed=seed).placement for seed in (0, 1))
    assert first is not None
    assert first != other
    assert (first.slots_LP[0] != first.slots_LP[1]).any()


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_moetuner_clusters_have_the_least_deviation(seed: int) -> None:
    load_E = np.random.default_rng(seed).gamma(1.0, size=8) * 100
    best = min(deviation(load_E, np.argsort(slots_P) // 4, 2) for slots_P in every_partition(8, [4, 4]))
    cluster_E, proved = balanced_clusters(load_E, 2, time_limit_s=30)
    assert cluster_E is not None
    assert proved
    assert np.bincount(cluster_E).tolist() == [4, 4]
    assert deviation(load_E, cluster_E, 2) <= best + 2 * TOLERANCE + 1e-9


def test_moetuner_keeps_its_greedy_start_when_there_is_no_time() -> None:
    problem = problem_of(clustered_routing(MODEL, 500), MODEL)
    found = run_solver("moetuner", problem, time_limit_s=0.0)
    assert found.status == Status.TIME_LIMIT
    assert found.notes["layers_proved"] < 3
    assert price_L(problem, found.placement.slots_LP) == pytest.approx(  # type: ignore[union-attr]
        price_L(problem, run_solver("greedy", problem).placement.slots_LP)  # type: ignore[union-attr]
    )


def test_exflow_follows_a_chain_and_finds_nothing_where_there_is_none() -> None:
    """Token t uses expert (7t + 5l) mod 16 in layer l: placed right, it never travels. Independent layers: it must."""
    layers, experts, tokens = 4, 16, 1600
    chain_TLK = ((7 * np.arange(tokens)[:, None] + 5 * np.arange(layers)) % experts)[:, :, None].astype(np.uint16)
    found = run_solver("exflow", problem_of(chain_TLK, spec(layers, experts, 1)))
    assert found.objective == 0.0
    loose_TLK = np.random.default_rng(0).integers(0, experts, (20_000, layers, 1)).astype(np.uint16)
    found = run_solver("exflow", problem_of(loose_TLK, spec(layers, experts, 1)))
    assert found.objective is not None
    assert found.objective > 0.95 * 7 / 8


@given(st.integers(0, 10**6))
def test_no_layer_of_exflow_gets_worse(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots_G = np.array([3, 2, 1])
    follow_LEE, link_GG = rng.random((2, 6, 6)), rng.random((3, 3)) * (1 - np.eye(3))
    start_LE = rng.permuted(np.tile(np.repeat(np.arange(3), slots_G), (3, 1)), axis=1)
    end_LE, finished = improve(follow_LEE, link_GG, slots_G, start_LE)
    assert finished
    assert way_cost(follow_LEE, link_GG, end_LE) <= way_cost(follow_LEE, link_GG, start_LE) + 1e-9
    assert all(np.bincount(row, minlength=3).tolist() == slots_G.tolist() for row in end_LE)


def test_links_between_nodes_are_dearer_for_exflow() -> None:
    link_GG = link_cost_GG(load_cluster("h100-4x8"))
    assert (np.diagonal(link_GG) == 0).all()
    assert link_GG[0, 8] == link_GG.max() == 1.0
    assert 0 < link_GG[0, 7] < 1


@given(st.integers(0, 10**6), st.floats(0.0, 0.5))
def test_refining_parts_gains_inside_the_limit(seed: int, slack: float) -> None:
    rng = np.random.default_rng(seed)
    together_EE = rng.integers(0, 50, (12, 12)).astype(float)
    together_EE = np.triu(together_EE, 1) + np.triu(together_EE, 1).T
    load_E, start_E = rng.random(12), rng.permutation(np.repeat(np.arange(3), 4))
    limit = (1 + slack) * np.bincount(start_E, load_E).max()
    end_E = refine(together_EE, load_E, start_E, 3, limit)
    inside = [sum(together_EE[np.ix_(part == d, part == d)].sum() for d in range(3)) for part in (start_E, end_E)]
    assert inside[1] >= inside[0]
    assert np.bincount(end_E).tolist() == [4, 4, 4]
    assert np.bincount(end_E, load_E).max() <= limit * (1 + 1e-6)


def test_partition_finds_planted_parts() -> None:
    """Three groups of four that are only chosen together, equally loaded and shuffled."""
    group_E = np.random.default_rng(1).permutation(np.repeat(np.arange(3), 4))
    together_EE = (group_E[:, None] == group_E) * 10.0
    np.fill_diagonal(together_EE, 0.0)
    part_E = split(together_EE, np.ones(12), np.array([4, 4, 4]), 0.1)
    assert len(set(zip(group_E.tolist(), part_E.tolist(), strict=True))) == 3


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_the_tail_lies_between_mean_and_worst(prices: list[float], tail: float) -> None:
    price_S = np.array(prices)
    assert price_S.mean() - 1e-9 <= tail_mean(price_S, tail) <= price_S.max() + 1e-9
    assert tail_mean(price_S, 1.0) == pytest.approx(price_S.mean())
    assert tail_mean(price_S, 1e-6) == pytest.approx(price_S.max())


def test_reweighting_draws_from_each_part_as_asked() -> None:
    ends_S = np.array([10, 30, 40])
    picks = reweighted(ends_S, np.array([0.5, 0.25, 0.25]))
    assert np.histogram(picks, [0, 10, 30, 40])[0].tolist() == [20, 10, 10]


def test_robust_is_no_worse_in_the_tail_than_equal_weights() -> None:
    """Two halves of a sample that like different experts: the answer is at least as good in the dearest quarter."""
    ids_TLK = clustered_routing(MODEL, 2000)
    ids_TLK[1500:] = (ids_TLK[1500:] * 5 + 3) % 16
    found = run_solver("robust", problem_of(ids_TLK, MODEL))
    assert found.objective == found.notes["chosen_s"]["tail"] <= found.notes["given_weights_s"]["tail"]


PLACERS = sorted(set(solver_names()) & {"round-robin", "random", "greedy", "partition", "moetuner", "exflow", "ilp", "robust"})


def unequal(slots_G: list[int]) -> Problem:
    problem = problem_of(clustered_routing(MODEL, 200), MODEL)
    return Problem(
        model=MODEL,
        cluster=problem.cluster,
        cost=problem.cost,
        stats=problem.stats,
        experts_TLK=problem.experts_TLK,
        slots_G=np.array(slots_G, np.int32),
    )


@pytest.mark.parametrize("name", PLACERS)
def test_contradictions_are_statuses(name: str) -> None:
    too_few = run_solver(name, unequal([1] * 8))
    assert (too_few.status, too_few.placement) == (Status.INFEASIBLE, None)
    for slots_G in ([4, 4, 2, 2, 2, 1, 1, 0], [3, 3, 3, 3, 3, 3, 3, 3], [17, 1, 1, 1, 1, 1, 1, 1]):
        found = run_solver(name, unequal(slots_G), time_limit_s=0.7)
        if found.placement is None:
            assert found.status == Status.INFEASIBLE
            assert "slots" in found.notes["reason"] or "replicas" in found.notes["reason"]
        else:
            assert found.placement.slots_G.tolist() == slots_G


@pytest.mark.parametrize("name", ["greedy", "partition", "ilp"])
def test_bounds_hold_for_everybody_on_their_objective(name: str) -> None:
    problem = problem_of(clustered_routing(MODEL, 500), MODEL, cluster="h100x8")
    found = run_solver(name, problem, time_limit_s=5.0)
    assert found.objective is not None
    assert found.bound is not None
    assert found.bound <= found.objective * (1 + 1e-6)
    if name == "ilp":
        assert found.status == Status.OPTIMAL
        assert price_floor(problem) <= price_L(problem, found.placement.slots_LP).mean()  # type: ignore[union-attr]
        for other in ("eplb", "local-search", "partition"):
            slots_LP = run_solver(other, problem, time_limit_s=5.0).placement.slots_LP  # type: ignore[union-attr]
            assert found.bound <= price_L(problem, slots_LP).mean() + 1e-12
