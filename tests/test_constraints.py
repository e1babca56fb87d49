"""Rules of a placement: kept by the solvers that say so, refused by the others, contradictions named; the live plan and its moves."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import PlanError, SolverError
from moesim.hardware import load_cluster
from moesim.optimize import Apart, Capability, Constraints, Pin, Solution, Status, load_rules, run_solver, solver_infos
from moesim.optimize.constraints import conflict, filled
from moesim.optimize.migration import Option, chosen, copies_s, layer_s_L, moves_L, relabelled
from moesim.plan import Placement
from moesim.testing import MODEL, clustered_routing, problem_of

KEEPERS = [info.name for info in solver_infos() if info.solves == "placement" and Capability.RULES in info.capabilities]
IDS = clustered_routing(MODEL, 500)


def constrained(problem=None, **values):
    return replace(problem or problem_of(IDS, MODEL), constraints=Constraints(**values))


def ways(rules, slots_G, experts):
    """Whether any filling keeps the rules, by trying all."""
    pins = [(rule.device, e) for rule in rules if isinstance(rule, Pin) for e in rule.experts]
    apart = [set(pair) for rule in rules if isinstance(rule, Apart) for pair in combinations(rule.experts, 2)]

    def fill(devices, held):
        if not devices:
            return set().union(*held) == set(range(experts)) if held else experts == 0
        for here in combinations(range(experts), devices[0]):
            g = len(held)
            if all(e in here for d, e in pins if d == g) and not any(pair <= set(here) for pair in apart) and fill(devices[1:], [*held, here]):
                return True
        return False

    return fill(list(slots_G), [])


rule = st.one_of(
    st.builds(Pin, experts=st.lists(st.integers(0, 4), min_size=1, max_size=2, unique=True).map(tuple), device=st.integers(0, 2)),
    st.builds(Apart, experts=st.lists(st.integers(0, 4), min_size=2, max_size=4, unique=True).map(tuple)),
)


@given(rules=st.lists(rule, max_size=4), slots_G=st.lists(st.integers(1, 3), min_size=3, max_size=3).filter(lambda s: sum(s) >= 5))
@settings(max_examples=60)
def test_a_conflict_is_said_exactly_where_no_filling_exists(rules, slots_G):
    found = filled(rules, np.array(slots_G), np.arange(5.0))
    assert (conflict(rules, np.array(slots_G), 5) is None) == ways(rules, slots_G, 5) == (found is not None)
    if found is not None:
        placement = Placement(slots_LP=found[None], slots_G=np.array(slots_G), experts=5, layers=(0,))
        assert Constraints(rules=tuple(rules)).broken(placement) is None
        assert all(len(set(here)) == len(here) for here in np.split(found.tolist(), np.cumsum(slots_G)[:-1]))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((Pin(experts=(0, 1, 2), device=3),), r"3 experts are pinned to device 3, which offers 2 slots: \[0, 1, 2\]"),
        ((Apart(experts=tuple(range(9))),), "9 experts on 8 devices"),
        ((Pin(experts=(4, 5), device=1), Apart(experts=(4, 5))), r"experts \[4, 5\] are pinned to device 1 and are to be kept apart"),
        ((Pin(experts=(4,), device=1), Pin(experts=(4,), device=2)), "pins ask for 17 slots, 16 are offered"),
        (
            # 7 devices are full with pairs of 0..13, so 14 and 15 meet; the rule about 0 and 9 has nothing to do with it
            (*(Pin(experts=(2 * g, 2 * g + 1), device=g) for g in range(7)), Apart(experts=(0, 9)), Apart(experts=(14, 15))),
            r"contradict each other on slots \[2, 2, 2, 2, 2, 2, 2, 2\]: experts \[0, 1\] pinned",
        ),
    ],
)
def test_contradictions_are_named(rules, words):
    found = run_solver("greedy", constrained(rules=rules))
    assert found.status == Status.INFEASIBLE
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found.notes["reason"])
    if "contradict" in words:
        assert "[0, 9]" not in found.notes["reason"]


def test_a_rule_of_one_layer_binds_there_alone():
    rules = (Pin(experts=(0, 1, 2), device=3, layers=(1,)),)
    assert run_solver("greedy", constrained(rules=rules)).notes["reason"].startswith("layer 1: 3 experts")


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("slots", [16, 24])
def test_who_says_so_keeps_rules(name, slots):
    """run_solver raises when a rule is broken, so an answer is the proof; without the rules they are broken."""
    rules = (Pin(experts=(3, 7), device=5), Pin(experts=(1,), device=0, layers=(0, 2)), Apart(experts=(0, 4, 8, 12)))
    problem = problem_of(IDS, MODEL, slots=slots)
    found = run_solver(name, constrained(problem, rules=rules), time_limit_s=1.0)
    assert found.placement is not None
    assert Constraints(rules=rules).broken(found.placement) is None
    free = run_solver(name, problem, time_limit_s=1.0).placement
    assert free is not None
    assert Constraints(rules=rules).broken(free)


def test_the_others_say_that_they_cannot():
    found = run_solver("eplb", constrained(rules=(Pin(experts=(3,), device=5),)))
    assert found.status == Status.INFEASIBLE
    assert "'eplb' keeps no such rules; use one of greedy" in found.notes["reason"]


def test_a_solver_that_breaks_its_word_is_caught():
    class Liar:
        name, solves, requires = "liar", "placement", ()
        capabilities = frozenset({Capability.RULES})

        def solve(self, problem, **_):
            return Solution(status=Status.FEASIBLE, placement=problem.placement(np.tile(np.arange(16), (3, 1))))

    with pytest.raises(SolverError, match="layer 0: expert 0 is pinned to device 7"):
        run_solver(Liar(), constrained(rules=(Pin(experts=(0,), device=7),)))


def test_memory_is_a_limit_of_its_own():
    each_B = MODEL.expert_B * 3
    assert run_solver("greedy", constrained(memory_B_G=np.full(8, 2.0 * each_B))).placement is not None
    reason = run_solver("greedy", constrained(memory_B_G=np.array([2.0] * 5 + [1.5] + [2.0] * 2) * each_B)).notes["reason"]
    assert "device 5: 2 slots in each of 3 layers" in reason
    assert "at most 1 fit" in reason


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rules": (Pin(experts=(16,), device=0),)}, "expert 16 is outside 0..15"),
        ({"rules": (Pin(experts=(1,), device=8),)}, "device 8 is outside 0..7"),
        ({"rules": (Apart(experts=(1, 1)),)}, "named twice"),
        ({"rules": (Apart(experts=(1, 2), layers=(9,)),)}, "layer 9 is no MoE layer"),
        ({"memory_B_G": np.ones(3)}, "memory of 3 devices"),
        ({"most_moves": 3}, "give current"),
    ],
)
def test_wrong_rules_are_refused(values, words):
    with pytest.raises(PlanError, match=words):
        constrained(**values)


def test_rules_come_from_a_file(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text('{"pinned": [{"experts": [3], "device": 0}], "apart": [{"experts": [1, 2], "layers": [4]}]}')
    assert load_rules(path) == (Pin(experts=(3,), device=0), Apart(experts=(1, 2), layers=(4,)))
    path.write_text('{"pinned": [{"experts": [-3], "device": 0}], "appart": []}')
    with pytest.raises(PlanError, match="appart") as wrong:
        load_rules(path)
    assert "pinned" in str(wrong.value)


# ---- the live plan


def test_renaming_devices_is_not_a_move():
    """A plan with whole nodes and the devices in them exchanged is the live plan again."""
    cluster = load_cluster("h100-4x8")
    rng = np.random.default_rng(0)
    live = Placement(slots_LP=np.array([rng.permutation(64) for _ in range(3)]), slots_G=np.full(32, 2), experts=64, layers=(0, 1, 2))
    order = np.concatenate([8 * node + rng.permutation(8) for node in rng.permutation(4)])
    other = replace(live, slots_LP=live.slots_LP.reshape(3, 32, 2)[:, order].reshape(3, 64))
    assert moves_L(live, other).sum() > 0
    assert moves_L(live, relabelled(live, other, cluster)).sum() == 0


@given(seed=st.integers(0, 2**16))
@settings(max_examples=15)
def test_no_renaming_inside_a_node_moves_less(seed):
    """Against all 24 names of four devices; the plan's parts stay whole, so its predicted time stays, too."""
    cluster = load_cluster("h100x8")
    rng = np.random.default_rng(seed)
    model = replace(MODEL, experts=12, layers=1, moe_layers=(0,))
    live, new = (Placement(slots_LP=rng.permutation(12)[None], slots_G=np.array([3] * 4 + [0] * 4), experts=12, layers=(0,)) for _ in range(2))
    least = min(
        int(moves_L(live, replace(new, slots_LP=new.slots_LP.reshape(4, 3)[list(order)].reshape(1, 12))).sum()) for order in permutations(range(4))
    )
    named = relabelled(live, new, cluster)
    assert moves_L(live, named).sum() == least
    assert {frozenset(part) for part in named.slots_LP.reshape(4, 3).tolist()} == {frozenset(part) for part in new.slots_LP.reshape(4, 3).tolist()}
    assert model.experts == 12


@given(
    costs=st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), max_size=3), min_size=1, max_size=3),
    budget=st.integers(0, 12),
    price=st.integers(0, 3),
)
def test_layers_share_a_budget_of_moves_as_well_as_possible(costs, budget, price):
    """Never over budget and equal to the best of all mixtures."""
    options = [
        [Option(slots_P=np.zeros(0, int), cost=20.0, moves=0), *(Option(slots_P=np.zeros(0, int), cost=c, moves=m) for c, m in row)] for row in costs
    ]
    picks = chosen(options, most_moves=budget, move_cost=price)
    total = sum(pick.cost + price * pick.moves for pick in picks)
    assert sum(pick.moves for pick in picks) <= budget
    best = 20.0 * len(options)
    for way in np.ndindex(*(len(row) for row in options)):
        mix = [row[i] for row, i in zip(options, way, strict=True)]
        if sum(one.moves for one in mix) <= budget:
            best = min(best, sum(one.cost + price * one.moves for one in mix))
    assert total == best


def drifted():
    """A live plan made for one kind of traffic, and the problem of another: experts are renamed, so everything is elsewhere."""
    name = np.random.default_rng(1).permutation(16).astype(np.uint16)
    live = run_solver("local-search", problem_of(clustered_routing(MODEL, 2000), MODEL)).placement
    return live, problem_of(name[clustered_routing(MODEL, 2000, seed=5)], MODEL)


def test_a_quarter_of_the_moves_buys_nearly_all_when_load_drifts():
    """At least 90 % of what a fresh plan gains, with at most a quarter of the moves it makes. Drift: a sixth of the experts change
    roles, as when some topics come and go."""
    rng = np.random.default_rng(2)
    model = replace(MODEL, experts=64, top_k=6)
    name = np.arange(64, dtype=np.uint16)
    some = rng.choice(64, 10, replace=False)
    name[some] = np.roll(some, 1)
    before, after = clustered_routing(model, 3000, clusters=8), name[clustered_routing(model, 3000, clusters=8, seed=5)]
    live = run_solver("local-search", problem_of(before, model)).placement
    problem = problem_of(after, model)
    fresh = run_solver("local-search", problem).placement
    all_moves = int(moves_L(live, fresh).sum())
    found = run_solver("local-search", constrained(problem, current=live, most_moves=all_moves // 4)).placement
    live_s, fresh_s, found_s = (float(layer_s_L(problem, placement).sum()) for placement in (live, fresh, found))
    assert moves_L(live, found).sum() <= all_moves // 4
    assert live_s - found_s >= 0.9 * (live_s - fresh_s) > 0


@pytest.mark.parametrize("name", ["eplb", "greedy", "local-search"])
def test_any_solver_keeps_a_budget_of_moves_and_never_loses(name):
    live, problem = drifted()
    live_s = float(layer_s_L(problem, live).sum())
    last = live_s
    for most in (0, 6, 20, 48):
        found = run_solver(name, constrained(problem, current=live, most_moves=most))
        assert moves_L(live, found.placement).sum() == found.notes["migration"]["moves"] <= most
        now = float(layer_s_L(problem, found.placement).sum())
        assert now <= live_s * (1 + 1e-12)
        assert found.notes["migration"]["gain_s_per_step"] == pytest.approx(live_s - now, abs=1e-15)
        if name != "local-search":  # a mixture of two plans by layers: more moves, more gain
            assert now <= last * (1 + 1e-12)
        last = now


def test_doing_nothing_wins_when_the_horizon_is_short():
    live, problem = drifted()
    nothing = run_solver("local-search", constrained(problem, current=live, horizon_steps=1e-3))
    assert nothing.placement == live
    assert nothing.notes["migration"]["decision"].startswith("do nothing")
    worth = run_solver("local-search", constrained(problem, current=live, horizon_steps=1e6))
    note = worth.notes["migration"]
    assert note["moves"] > 0
    assert note["net_s"] == pytest.approx(1e6 * note["gain_s_per_step"] - note["copies_s"])


def test_copies_take_as_long_as_the_busiest_port():
    problem = problem_of(IDS, MODEL)
    live = problem.placement(np.tile(np.arange(16), (3, 1)))
    assert copies_s(problem.cost, live.diff(live)) == 0.0
    one, all_ = (replace(live, slots_LP=np.roll(live.slots_LP, shift, axis=1)) for shift in (1, 2))
    assert 0 < copies_s(problem.cost, live.diff(one)) < copies_s(problem.cost, live.diff(all_))


def test_a_live_plan_of_another_shape_is_refused():
    other = Placement(slots_LP=np.arange(16)[None], slots_G=np.full(8, 2), experts=16, layers=(0,))
    with pytest.raises(PlanError, match="1 layers x 16 experts"):
        constrained(current=other)


def test_slots_that_grow_need_moves_and_say_how_many():
    problem = problem_of(IDS, MODEL, slots=24)
    live = problem_of(IDS, MODEL).placement(np.tile(np.arange(16), (3, 1)))
    assert run_solver("local-search", constrained(problem, current=live)).placement.slots_LP.shape == (3, 24)
    reason = run_solver("local-search", constrained(problem, current=live, most_moves=3)).notes["reason"]
    assert "more than 3; allow more moves" in reason
