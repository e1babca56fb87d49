"""Caching solvers: the conformance kit, closed forms and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, PlanError, SolverError
from moesim.optimize import Status, load_solver, registry
from moesim.optimize.cache_problem import CacheProblem
from moesim.optimize.cache_score import run_cache, score_cache
from moesim.optimize.caching import CacheSolution, plan_cache
from moesim.optimize.tiers import memory_B_G, noise
from moesim.replay import Events, replay
from moesim.testing import MODEL, CachingSolverSuite
from moesim.testing.caching import cache_problem_of, fingerprints_elsewhere, first_device, sample_problem
from moesim_solvers.caching.quotas import certain, cost_of, equal, integer, lower_bound, marginal


def registered_solvers() -> list[str]:
    return [info.name for info in registry.solver_infos() if info.solves == "caching" and info.available]


@cache
def found_elsewhere() -> dict[str, str]:
    """One process for all solvers: starting it costs more than most of them."""
    names = registered_solvers()
    return dict(zip(names, fingerprints_elsewhere(*(type(registry.load_solver(name, "caching")) for name in names)), strict=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "registered" in metafunc.fixturenames:
        metafunc.parametrize("registered", registered_solvers())


class TestRegistered(CachingSolverSuite):
    """The suite, once per registered solver."""

    @pytest.fixture(autouse=True)
    def _choose(self, registered: str) -> None:
        solver = registry.load_solver(registered, "caching")
        type(self).solver = type(solver)  # type: ignore[assignment]
        type(self).moves = registered != "bits-ilp"
        self.name = registered

    def elsewhere(self) -> str:
        return found_elsewhere()[self.name]


# -- sharing slots -----------------------------------------------------------------------------------------------------


def brute_force(cost_LC: np.ndarray, limit_L: np.ndarray, slots: int) -> float:
    divisions = itertools.product(*(range(limit + 1) for limit in limit_L))
    return min(cost_of(cost_LC, np.array(division)) for division in divisions if sum(division) <= slots)


@st.composite
def curves(draw: st.DrawFn, *, convex: bool) -> tuple[np.ndarray, np.ndarray, int]:
    layers, sizes = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    steps = np.array(draw(st.lists(st.lists(st.integers(0, 9), min_size=sizes, max_size=sizes), min_size=layers, max_size=layers)), float)
    cost = np.hstack([np.full((layers, 1), 60.0), 60 - np.cumsum(-np.sort(-steps, axis=1) if convex else steps, axis=1)])
    limit = np.array(draw(st.lists(st.integers(0, sizes), min_size=layers, max_size=layers)))
    return cost, limit, draw(st.integers(0, layers * sizes + 2))


@given(curves(convex=True))
def test_marginal_gains_are_optimal_on_convex_curves(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    found = marginal(*case)
    assert found.cost == pytest.approx(brute_force(*case), abs=1e-9)
    assert found.optimal


@given(curves(convex=False))
def test_the_integer_program_is_optimal_on_any_curves_and_marginal_brackets_it(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    best, found, greedy = brute_force(*case), integer(*case, time_limit_s=20), marginal(*case)
    assert found.cost == pytest.approx(best, abs=1e-9)
    assert found.optimal
    assert greedy.bound - 1e-9 <= best <= greedy.cost + 1e-9
    for answer in (found, greedy):
        assert answer.slots_L.sum() <= case[2]
        assert (answer.slots_L <= case[1]).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 60))
def test_equal_slots_differ_by_one_where_no_limit_binds(limits: list[int], slots: int) -> None:
    limit_L = np.array(limits)
    slots_L = equal(limit_L, slots)
    assert slots_L.sum() == min(slots, limit_L.sum())
    open_ = slots_L[slots_L < limit_L]
    assert (slots_L <= limit_L).all()
    if open_.size:
        assert slots_L.max() - open_.min() <= 1


@given(curves(convex=True), st.integers(2, 6))
def test_sure_moves_keep_the_slots_and_find_the_optimum_when_parts_agree(case: tuple[np.ndarray, np.ndarray, int], parts: int) -> None:
    cost, limit, slots = case
    slots_L = certain(np.stack([cost] * parts), limit, slots)
    assert slots_L.sum() == min(slots, limit.sum())
    assert cost_of(cost, slots_L) == pytest.approx(brute_force(*case), abs=1e-9)


def test_nothing_is_sure_of_one_part_or_of_noise() -> None:
    rng = np.random.default_rng(0)
    noisy = np.cumsum(-rng.random((8, 6, 9)), axis=2)
    limit, flat = np.full(6, 8), np.zeros((8, 6, 9))
    assert certain(noisy[:1], limit, 25).tolist() == equal(limit, 25).tolist()
    assert certain(flat, limit, 25).tolist() == equal(limit, 25).tolist()
    assert np.abs(certain(noisy, limit, 25) - equal(limit, 25)).sum() <= 2
    assert lower_bound(np.array([1.0, 1.0, 1.0]), 2.0) == 1


def zipf(names_LE: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens that ask each layer for one expert, the first of `names_LE` most often."""
    share_E = 1 / np.arange(1, names_LE.shape[1] + 1) ** 1.5
    drawn = rng.choice(len(share_E), size=(tokens, len(names_LE)), p=share_E / share_E.sum())
    return np.stack([names[drawn[:, layer]] for layer, names in enumerate(names_LE)], axis=1)[:, :, None].astype(np.uint16)


def test_quotas_are_learnt_where_routing_is_steady_alone() -> None:
    """Experts that were hot give way to others, early or late: what was learnt would lose, so slots stay equal, and the answer says why."""
    rng = np.random.default_rng(0)
    old, new = (np.stack([rng.permutation(16) for _ in range(3)]) for _ in range(2))
    steady = plan_cache(cache_problem_of(zipf(new, 1600, rng), MODEL), solver="pin-set")
    later = cache_problem_of(zipf(new, 800, rng), MODEL)
    equal_slots = plan_cache(later, solver="equal-slots").plan
    assert steady.plan is not None
    assert equal_slots is not None
    assert "remark" not in steady.notes
    assert score_cache(later, steady.plan).miss_ratio < score_cache(later, equal_slots).miss_ratio
    for before in (200, 800, 1400):
        ids = np.concatenate([zipf(old, before, rng), zipf(new, 1600 - before, rng)])
        changed = plan_cache(cache_problem_of(ids, MODEL), solver="pin-set")
        assert changed.plan is not None
        assert ("tell little of later ones" if before == 800 else "slots are equal") in str(changed.notes.get("remark", "slots are equal"))
        assert score_cache(later, changed.plan).miss_ratio <= score_cache(later, equal_slots).miss_ratio


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 40])
def test_few_steps_teach_nothing(tokens: int) -> None:
    found = plan_cache(cache_problem_of(clustered_routing(MODEL, 40)[:tokens], MODEL), solver="pin-set")
    assert found.notes["pinned"] == found.notes["moved"] == 0
    assert "slots are equal" in str(found.notes["remark"])


@pytest.mark.parametrize("solver", registered_solvers())
@pytest.mark.parametrize(("tokens", "memory"), [(1, "50%"), (1, 1e30), (200, 1e30), (200, "500%")])
def test_one_token_and_more_memory_than_experts_are_answered(solver: str, tokens: int, memory: float | str) -> None:
    problem = cache_problem_of(clustered_routing(MODEL, 200)[:tokens], MODEL, memory=memory)
    found = plan_cache(problem, solver=solver)
    assert found.plan is not None
    assert (found.plan.slots_LG <= problem.held_LG).all()
    if memory != "50%":
        assert (found.plan.slots_LG == problem.held_LG).all()


def test_a_model_of_one_expert_and_a_trace_of_nothing() -> None:
    one = tiny_model(experts=1, top_k=1)
    for solver in registered_solvers():
        found = plan_cache(cache_problem_of(np.zeros((20, 3, 1), np.uint16), one, memory="100%"), solver=solver).plan
        assert found is not None
        assert found.slots_LG.tolist() == [[1], [1], [1]]
        empty = plan_cache(cache_problem_of(np.zeros((0, 3, 1), np.uint16), one, memory="100%"), solver=solver)
        assert (empty.plan, empty.status) == (None, Status.INFEASIBLE)
        assert "no tokens to learn from" in str(empty.notes["reason"])


# -- the problem ------------------------------------------------------------------------------------------------------


def test_curves_are_those_of_the_replay() -> None:
    problem = sample_problem(300)
    events = problem.events_G[0]
    for pinned in (0, 3):
        pins = problem.pins_LE(np.full((3, 1), pinned))
        for slots in (pinned, 7, 16):
            run = replay(events, "lru", slots, resident=pins)
            assert problem.misses("lru", pinned)[:, 0, slots].tolist() == run.misses_L.tolist()
    whole, parts = problem.misses("lru")[:, 0], problem.misses_by_part("lru")[:, :, 0]
    assert (parts[:, :, 0].sum(axis=0) == whole[:, 0]).all()  # no slots: every access misses
    assert (parts.sum(axis=0) <= whole).all()  # a part goes on from the one before, it does not begin cold
    assert (parts[:, :, -1] == 0).all()


def test_a_device_asks_for_its_own_experts_alone() -> None:
    problem = sample_problem(300, cluster="rtx-4090x8-pcie")
    holds = problem.plan.placement.holds_LGE
    for g, events in enumerate(problem.events_G):
        assert not events.load_LE[~holds[:, g]].any()
    together = Events.from_experts(problem.experts_TLK, experts=16, step_T=np.repeat(np.arange(problem.steps), np.diff(problem.ends_S, prepend=0)))
    assert (problem.asked_LE == together.load_LE).all()


@pytest.mark.parametrize("cluster", [None, "rtx-4090x8-pcie", "h100-4x8"])
@pytest.mark.parametrize("prefetcher", ["none", "oracle"])
def test_the_closed_form_is_the_event_engine(cluster: str | None, prefetcher: str, make_trace) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model(experts=32, hidden=512, intermediate=512)
    problem = cache_problem_of(clustered_routing(model, 320), model, cluster, prefetcher=prefetcher, tokens_per_device=2)
    trace = make_trace(model, problem.experts_TLK)
    plan = plan_cache(problem, solver="marginal").plan
    assert plan is not None
    closed = score_cache(problem, plan)
    engine, in_place = run_cache(trace, problem, plan), run_cache(trace, problem, None)
    assert engine.copies is not None
    assert engine.copies.hits == closed.hits_LG.sum()
    assert closed.base_s == pytest.approx(in_place.step_s_S.mean(), rel=1e-9)
    assert closed.stall_s == pytest.approx(engine.step_s_S.mean() - in_place.step_s_S.mean(), rel=1e-6, abs=1e-15)
    assert closed.stall_s > 0 or cluster == "h100-4x8"  # there the dispatch between nodes hides the copies


def test_zero_slots_stream_everything_and_all_slots_only_first_touches() -> None:
    problem = sample_problem(300)
    nothing, everything = (problem.answer("mine", np.full((3, 1), slots)) for slots in (0, 16))
    asked = problem.asked_LE
    assert score_cache(problem, nothing).demand_B * problem.steps == pytest.approx(asked.sum() * MODEL.expert_B)
    assert score_cache(problem, everything).demand_B * problem.steps == pytest.approx((asked > 0).sum() * MODEL.expert_B)
    with pytest.raises(PlanError, match=r"layer 0, device 0: 17 slots are outside 0..16"):
        problem.answer("mine", np.full((3, 1), 17))


def test_nothing_asked_for_is_no_miss_and_no_tokens_are_an_error() -> None:
    silent = cache_problem_of(np.full((20, 3, 1), 65535, np.uint16), MODEL)
    plan = plan_cache(silent, solver="pin-set").plan
    assert plan is not None
    assert score_cache(silent, plan).summary() | {"hit_ratio": 1.0, "stall_s": 0.0, "demand_B": 0.0} == score_cache(silent, plan).summary()
    with pytest.raises(InputError, match="no tokens to judge"):
        score_cache(cache_problem_of(np.zeros((0, 3, 1), np.uint16), MODEL), plan)


def test_memory_for_no_expert_is_infeasible_with_every_solver() -> None:
    """No bytes, and fewer than one expert has; nothing that weights may be changes what is asked for."""
    for memory in (0, "0%", MODEL.expert_B - 1):
        for solver in registered_solvers():
            found = plan_cache(cache_problem_of(clustered_routing(MODEL, 20), MODEL, memory=memory), solver=solver)
            assert (found.plan, found.status) == (None, Status.INFEASIBLE)
            assert "holds no expert" in str(found.notes["reason"])


def test_bad_problems_are_named() -> None:
    model = tiny_model(experts=16)
    ids = clustered_routing(model, 50)
    for message, fields in {
        "policy 'belady' knows what will be asked for": {"policy": "belady"},
        "policy 'magic' is not installed": {"policy": "magic"},
        "prefetcher 'magic'": {"prefetcher": "magic"},
        "recall": {"prefetcher": "oracle", "recall": 2.0},
        "bits": {"bits": (8.0, 16.0)},
        "most_loss": {"most_loss": float("nan")},
        "tokens_per_device": {"tokens_per_device": 0},
        "give bytes >= 0 for each of 1 devices": {"budget_B_G": np.array([np.nan])},
    }.items():
        with pytest.raises(InputError, match=message):
            cache_problem_of(ids, model, **fields)
    for memory in ("12 parsecs", "-5 GB", "nan%", "-5%", "", "1e400", "-1", None, True, float("nan"), -1.0, float("inf")):
        with pytest.raises(InputError, match="give bytes >= 0, such as '24 GB', or a share of all experts"):
            memory_B_G(memory, np.ones(2))  # type: ignore[arg-type]
    for memory in ("0", 0, "0 GB", "0%", "-0"):
        assert memory_B_G(memory, np.ones(2)).tolist() == [0, 0]
    assert memory_B_G("25%", np.array([8.0, 4.0])).tolist() == [2.0, 1.0]
    assert memory_B_G("2 GB", np.array([8.0, 4.0])).tolist() == [2e9, 2e9]


def test_an_answer_that_breaks_the_budget_is_refused() -> None:
    class Greedy:
        name, solves, capabilities, requires = "greedy", "caching", frozenset(), ()

        def solve(self, problem: CacheProblem, **_: object) -> CacheSolution:
            return CacheSolution(status=Status.FEASIBLE, plan=problem.answer("all", problem.held_LG))

    with pytest.raises(SolverError, match="device 0 would hold"):
        plan_cache(sample_problem(100), solver=Greedy())  # type: ignore[arg-type]


def test_solvers_of_another_kind_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="'marginal' solves caching problems, not placement; solvers of placement: .*linear"):
        load_solver("marginal")
    with pytest.raises(InputError, match="'linear' solves placement problems, not caching; solvers of caching: .*pin-set"):
        plan_cache(sample_problem(10), solver="linear")
    monkeypatch.setattr("moesim.plugins.entry_points", lambda group: [EntryPoint("linear", "moesim_solvers.placement.linear:Linear", registry.GROUP)])
    with pytest.raises(InputError, match="solvers of caching: none"):
        load_solver("linear", "caching")


# -- bits and tiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [8.0, 4.0])
def test_bits_by_expert_dominate_uniform_bits_of_the_same_bytes(uniform: float) -> None:
    """QuantMoE-Bench: no uniform allocation has less weighted noise in as many bytes; skewed loads make it strictly better."""
    rank_E = np.arange(1, 17) ** -2.0
    ids = np.random.default_rng(0).choice(16, size=(500, 3, 1), p=rank_E / rank_E.sum()).astype(np.uint16)
    choices = (16.0, uniform + 1, uniform, uniform - 1)
    problem = cache_problem_of(ids, MODEL, memory=f"{uniform / 16:%}", bits=choices)
    found = plan_cache(problem, solver="bits-ilp")
    assert found.status == Status.OPTIMAL
    assert found.plan is not None
    assert found.plan.pinned_LE.all()  # nothing waits
    flat = problem.loss(np.full(problem.asked_LE.shape, uniform))
    assert problem.loss(found.plan.bits_LE) < flat
    assert found.plan.hbm_B_G(MODEL.expert_parameters, problem.plan.placement.holds_LGE)[0] <= problem.budget_B_G[0] * (1 + 1e-9)


def test_bits_and_tiers_are_those_of_brute_force() -> None:
    model = tiny_model(layers=1, experts=4)
    ids = np.random.default_rng(0).choice(4, size=(200, 1, 1), p=[0.5, 0.3, 0.15, 0.05]).astype(np.uint16)
    bits = (16.0, 8.0)
    for most_loss in (np.inf, 1e-6, 0.0):
        problem = cache_problem_of(ids, model, memory=1.6 * model.expert_B, bits=bits, most_loss=most_loss)
        found = plan_cache(problem, solver="bits-ilp")
        best = np.inf
        for tiers in itertools.product(range(3), repeat=4):
            for chosen in itertools.product(bits, repeat=4):
                held = sum(b / 16 for t, b in zip(tiers, chosen, strict=True) if t == 0)
                lost = float((problem.weight_LE * noise(np.array([chosen]), 16.0)).sum())
                if held <= 1.6 and lost <= most_loss * (1 + 1e-9):
                    waits = [
                        (problem.asked_LE[0, e] + 0.5) / problem.steps * problem.copy_s(t, 0, model.expert_parameters * b / 8)
                        for e, (t, b) in enumerate(zip(tiers, chosen, strict=True))
                    ]
                    best = min(best, sum(waits))
        assert found.plan is not None
        assert found.objective == pytest.approx(best, rel=1e-5)
        assert problem.loss(found.plan.bits_LE) <= most_loss * (1 + 1e-9)


def test_what_the_host_cannot_hold_goes_to_the_ssd_and_a_price_moves_it_there() -> None:
    ids = clustered_routing(MODEL, 300)
    roomy = cache_problem_of(ids, MODEL, memory="25%")
    assert (roomy.tier_LE == 1).all()
    host, nvme = roomy.tiers
    half = cache_problem_of(ids, MODEL, memory="25%", tiers=(replace(host, capacity_B=24 * MODEL.expert_B), nvme))
    assert (half.tier_LE == 1).sum() == 24
    assert half.asked_LE[half.tier_LE == 1].min() >= half.asked_LE[half.tier_LE == 2].max()
    assert half.copy_s(2, 0, 1e9) > half.copy_s(1, 0, 1e9) > half.copy_s(0, 0, 1e9) == 0
    dear = (replace(host, rent_per_B_h=1e3), nvme)
    with pytest.raises(InputError, match="has a price, but a device"):
        plan_cache(cache_problem_of(ids, MODEL, memory="25%", tiers=dear), solver="bits-ilp")
    alone = first_device()
    rented = replace(alone, devices=(replace(alone.devices[0], rent_per_hour=2.0),))
    plan = plan_cache(cache_problem_of(ids, MODEL, rented, memory="25%", tiers=dear), solver="bits-ilp").plan
    assert plan is not None
    assert not (plan.tier_LE == 1).any()
