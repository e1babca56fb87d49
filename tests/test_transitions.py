"""Changes of size: bytes moved, steps, pauses, failures; ElasticMoE's table from its scale-up column."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moesim.cost.attention import dense_parameters
from moesim.errors import InputError, PlanError, ProfileError
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.plan import Placement, Resizing
from moesim.plan.resize import even_slots, on_devices, replicas, resized
from moesim.serving import Deployment, StepLaw, even_placement, generate, serve
from moesim.serving.failures import damage, recovery
from moesim.serving.sizes import Sizes, change_of, packed
from moesim.serving.transitions import (
    ASCEND,
    COLD_RESTART,
    CONCURRENT,
    ELASTIC,
    METHODS,
    Step,
    ends,
    links_s,
    served_s,
    transition,
    without,
    work_of,
)
from tests.conftest import tiny_model

MODEL = load_model("deepseek-v2-lite")
H100 = load_cluster("h100x8")


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Few experts on few devices, unequal slots, replicas; a device holds an expert once."""
    devices, experts = draw(st.integers(2, 3)), draw(st.integers(2, 4))
    rows = draw(
        st.lists(st.lists(st.sets(st.integers(0, experts - 1), max_size=experts), min_size=devices, max_size=devices), min_size=1, max_size=2)
    )
    sizes = [len(held) for held in rows[0]]
    assume(sum(sizes) >= experts and all([len(held) for held in row] == sizes for row in rows))
    assume(all(set().union(*row) == set(range(experts)) for row in rows))
    slots = [[expert for held in row for expert in sorted(held)] for row in rows]
    return Placement(slots_LP=np.asarray(slots), slots_G=np.asarray(sizes), experts=experts, layers=tuple(range(len(rows))))


def fewest(old: Placement, slots_G: np.ndarray[Any, Any], count_E: np.ndarray[Any, Any], layer: int) -> int | None:
    """Fewest experts moved in a layer, over every assignment of experts to devices."""
    choices = [list(itertools.combinations(range(old.experts), int(slots))) for slots in slots_G]
    found = [
        sum(int(~old.holds_LGE[layer, g, e]) for g, held in enumerate(way) for e in held)
        for way in itertools.product(*choices)
        if np.array_equal(np.bincount([e for held in way for e in held], minlength=old.experts), count_E)
    ]
    return min(found, default=None)


@given(placements(), st.data())
def test_resizing_moves_no_more_than_any_assignment(old: Placement, data: st.DataObject) -> None:
    slots_G = np.asarray(data.draw(st.lists(st.integers(0, old.experts), min_size=old.devices, max_size=old.devices)))
    used = int((slots_G > 0).sum())
    assume(used and old.experts <= slots_G.sum())
    counts = [replicas(old.replicas_LE[row], np.ones(old.experts), int(slots_G.sum()), used) for row in range(len(old.layers))]
    least = [fewest(old, slots_G, count, row) for row, count in enumerate(counts)]
    if None in least:
        with pytest.raises(PlanError, match="no placement"):
            resized(old, slots_G)
        return
    new = resized(old, slots_G)
    moved = np.bincount(old.diff(new).moves_M4[:, 0], minlength=len(old.layers))
    np.testing.assert_array_equal(moved, least)
    np.testing.assert_array_equal(new.replicas_LE, counts)
    np.testing.assert_array_equal(new.slots_G, slots_G)


@pytest.mark.parametrize("seed", range(3))
def test_resizing_moves_no_more_than_any_permutation_of_devices(seed: int) -> None:
    """Moved bytes against what a new placement costs under every renaming of its devices."""
    rng = np.random.default_rng(seed)
    old = Placement(slots_LP=np.stack([rng.permutation(12) for _ in range(3)]), slots_G=even_slots(12, range(3), 4), experts=12, layers=(0, 1, 2))
    new = resized(old, even_slots(12, range(4), 4))
    moved = old.diff(new).bytes_GG(1.0).sum()
    for order in itertools.permutations(range(4)):
        other = np.concatenate([new.slots_LP[:, 3 * g : 3 * g + 3] for g in order], axis=1)
        assert moved <= old.diff(replace(new, slots_LP=other)).bytes_GG(1.0).sum()


def test_growing_fills_new_devices_alone_and_shrinking_empties_leaving_ones() -> None:
    six = on_devices(even_placement(MODEL, 6), range(6), 8)
    eight = resized(six, even_slots(64, range(8), 8))
    assert len(six.diff(eight)) == 26 * 16  # what the two new devices hold
    assert len(eight.diff(resized(eight, even_slots(64, range(6), 8)))) == 26 * 16
    assert resized(eight, eight.slots_G).holds_LGE.tolist() == eight.holds_LGE.tolist()


def test_a_load_limit_is_kept_and_costs_moves() -> None:
    model = tiny_model(layers=2, experts=16)
    load = np.tile(1 / np.arange(1, 17), (2, 1))
    old = on_devices(even_placement(model, 2), range(2), 4)
    slots = even_slots(16, range(4), 4)
    free, kept = resized(old, slots), resized(old, slots, load_LE=load, limit=1.5)
    share = (kept.holds_LGE * load[:, None]).sum(axis=2) / (load.sum(axis=1) / 4)[:, None]
    assert share.max() <= 1.5 + 1e-9
    assert len(old.diff(kept)) >= len(old.diff(free))
    with pytest.raises(PlanError, match="raise the limit"):
        resized(old, slots, load_LE=load, limit=1.0)


@given(st.integers(0, 10_000), st.floats(1.0, 1.6))
def test_with_a_load_limit_the_fewest_moves_are_those_of_brute_force(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    slots_G, load = np.asarray([2, 2, 2]), rng.lognormal(0.0, 0.4, (1, 6))
    old = Placement(slots_LP=rng.permutation(6)[None], slots_G=np.asarray([3, 3, 0]), experts=6, layers=(0,))
    ways = (np.asarray(order).reshape(3, 2) for order in itertools.permutations(range(6)))
    moves = [
        sum(int(~old.holds_LGE[0, g, e]) for g in range(3) for e in way[g])
        for way in ways
        if (load[0][way].sum(axis=1) <= limit * load.sum() * slots_G / 6 * (1 + 1e-9)).all()
    ]
    if not moves:
        with pytest.raises(PlanError, match="raise the limit"):
            resized(old, slots_G, load_LE=load, limit=limit)
        return
    assert len(old.diff(resized(old, slots_G, load_LE=load, limit=limit))) == min(moves)


def test_replicas_are_kept_where_slots_allow() -> None:
    load = np.asarray([8.0, 1.0, 1.0, 5.0])
    np.testing.assert_array_equal(replicas(np.asarray([2, 1, 1, 1]), load, 6, 4), [2, 1, 1, 2])
    np.testing.assert_array_equal(replicas(np.asarray([2, 2, 1, 1]), load, 5, 4), [2, 1, 1, 1])
    with pytest.raises(PlanError, match="cannot hold"):
        replicas(np.ones(4, int), load, 3, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: resized(p, [20, 0]), "once"),
        (lambda p: resized(p, [4, 4, 4]), "2 devices"),
        (lambda p: resized(p, [8, 8], load_LE=np.ones((1, 3))), "load"),
        (lambda p: on_devices(p, [1, 0], 4), "rising"),
        (lambda p: on_devices(p, [0, 4], 4), "below 4"),
        (lambda p: even_slots(4, [], 2), "no device"),
    ],
)
def test_impossible_resizings_say_why(call: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        call(even_placement(tiny_model(), 2))


def grown(few: int = 4, many: int = 8, **options: Any) -> Any:
    """A change between two sizes of DeepSeek-V2-Lite on one H100 node."""
    return transition(MODEL, *pair(few, many), H100, **options)


@cache
def pair(before: int, after: int) -> tuple[Placement, Placement]:
    old = on_devices(even_placement(MODEL, before), range(before), 8)
    return old, resized(old, even_slots(64, range(after), 8))


def test_bytes_are_conserved() -> None:
    dense_B = dense_parameters(MODEL).whole(MODEL) * 2
    for before, after in ((4, 8), (8, 4), (6, 8), (8, 8)):
        work = work_of(MODEL, *pair(before, after), H100, tp=2)
        assert work.before_B_G.sum() == pytest.approx(64 * 26 * MODEL.expert_B + before / 2 * dense_B)
        assert work.after_B_G.sum() == pytest.approx(64 * 26 * MODEL.expert_B + after / 2 * dense_B)
        joining = max(0, after - before)
        moved = len(pair(before, after)[0].diff(pair(before, after)[1])) * MODEL.expert_B
        assert work.peers_B_GG.sum() == pytest.approx(moved + joining / 2 * dense_B) == pytest.approx(work.arriving_B_G.sum())
        assert not np.diagonal(work.peers_B_GG).any()
        np.testing.assert_allclose(work.arriving_B_G[work.joins_G], work.after_B_G[work.joins_G])
        assert not work.lost_B_G.any()


def test_steps_take_the_longest_way_through_their_graph() -> None:
    steps = (
        Step(name="a", seconds=3),
        Step(name="b", seconds=1),
        Step(name="c", seconds=2, after=("b",)),
        Step(name="d", seconds=1, after=("a", "c")),
    )
    assert ends(steps) == {"a": 3, "b": 1, "c": 3, "d": 4}
    with pytest.raises(InputError, match="'d' waits for c"):
        ends((steps[0], steps[3]))


def test_copies_take_the_busiest_link_when_software_is_free() -> None:
    fast = replace(ASCEND, land_Bps=1e15, channel_s=0.0)
    change = grown(rates=fast)
    work = work_of(MODEL, *pair(4, 8), H100)
    port_B = max(work.peers_B_GG.sum(axis=0).max(), work.peers_B_GG.sum(axis=1).max())
    assert change.seconds == pytest.approx(port_B / 450e9 + 9.3e-6, rel=1e-6)
    assert links_s(H100, np.zeros((8, 8))) == 0
    slower = replace(H100, intra_G=tuple(replace(link, bandwidth_Bps=link.bandwidth_Bps / 10) for link in H100.intra_G))
    assert transition(MODEL, *pair(4, 8), slower, rates=fast).seconds == pytest.approx(10 * change.seconds, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_what_users_feel(name: str) -> None:
    change = grown(method=METHODS[name])
    assert change.seconds > 0
    if name == "elastic":
        assert (change.pause_s, change.down_s, change.keeps_cache) == (change.seconds, 0.0, True)
    elif name == "cold-restart":
        assert (change.pause_s, change.down_s, change.keeps_cache) == (0.0, change.seconds, False)
        assert change.moved_B == 0
    else:
        assert change.down_s == change.seconds and not change.keeps_cache  # on the same devices the old instance stands still, then ends
        assert change.peak_B_G.sum() > grown(method=COLD_RESTART).peak_B_G.sum() + grown().peak_B_G.sum() / 3
    assert sum(step["seconds"] > 0 for step in change.to_dict()["steps"]) >= 2


def test_a_second_instance_on_its_own_devices_stops_nobody() -> None:
    few = even_placement(MODEL, 4)
    old, new = on_devices(few, range(4), 8), on_devices(few, range(4, 8), 8)
    change = transition(MODEL, old, new, H100, method=CONCURRENT)
    assert (change.pause_s, change.down_s, change.keeps_cache) == (0.0, 0.0, True)
    assert served_s(change, residence_s=10.0, until_s=change.seconds + 5) == (change.seconds, 5.0)


@pytest.mark.parametrize("before_after", [(4, 8), (8, 4), (6, 8), (8, 6)])
def test_every_mechanism_helps_and_elastic_is_fastest(before_after: tuple[int, int]) -> None:
    old, new = pair(*before_after)
    taken = [{}, {"shared": False}, {"source": "disk"}, {"standby": False}, {"reuse": False}]
    so_far: dict[str, Any] = {}
    seconds, peak = [], []
    for more in taken:
        so_far |= more
        change = transition(MODEL, old, new, H100, method=without(ELASTIC, **so_far))
        seconds.append(change.seconds)
        peak.append(change.peak_B_G.sum())
    assert all(b >= a for a, b in itertools.pairwise(seconds))
    assert peak[1] > peak[0]


def test_weights_may_come_from_the_host() -> None:
    change = grown(method=without(ELASTIC, source="host"))
    work = work_of(MODEL, *pair(4, 8), H100)
    assert change.loaded_B == pytest.approx(work.arriving_B_G.sum())
    slot_Bps = 0.81 * 63e9
    expected = max(float(work.arriving_B_G.max()) / min(slot_Bps, 614.4e9 / 4), float(work.arriving_B_G.max()) / ASCEND.land_Bps)
    assert next(step.seconds for step in change.steps if "host" in step.name) == pytest.approx(expected, rel=1e-3)
    bare = replace(H100, host_G=())
    with pytest.raises(ProfileError, match="no host"):
        transition(MODEL, *pair(4, 8), bare, method=without(ELASTIC, source="host"))


def test_caches_of_leaving_devices_are_handed_over() -> None:
    held = np.full(8, 10e9)
    change, empty = grown(8, 4, cache_B_G=held), grown(8, 4)
    assert change.moved_B == pytest.approx(empty.moved_B + 40e9)
    assert change.seconds == pytest.approx(empty.seconds + 10e9 / 450e9, rel=1e-3)  # four ports in, 10 GB each
    assert grown(4, 8, cache_B_G=held).moved_B == grown(4, 8).moved_B


def test_served_seconds_of_an_elastic_change_by_hand() -> None:
    change = grown()
    assert served_s(change, residence_s=10.0, until_s=30.0) == pytest.approx((5.0, 20.0))
    assert served_s(change, residence_s=10.0, until_s=5.0) == pytest.approx((3.75, 0.0))
    cold = grown(method=COLD_RESTART)
    assert served_s(cold, residence_s=10.0, until_s=cold.seconds + 7) == pytest.approx((0.0, 7.0))


def test_elasticmoe_scale_down_follows_from_scale_up() -> None:
    from moesim.studies.scaling import ABLATION, elastic_case, solve_rates

    case = elastic_case()
    solved = {name: value for name, value in asdict(solve_rates(case)).items() if name != "source"}
    assert solved == pytest.approx({name: value for name, value in asdict(ASCEND).items() if name != "source"}, rel=2e-4)
    for _, method, up_s, down_s in ABLATION:
        assert case.run(method, up=True).seconds == pytest.approx(up_s, rel=1e-3)
        assert case.run(method, up=False).seconds == pytest.approx(down_s, rel=0.15)


def test_elasticmoe_windows() -> None:
    from moesim.studies.scaling import WINDOWS, elastic_case, elasticmoe_study, window_rates

    rates = window_rates(elastic_case())
    assert rates["elastic"] == pytest.approx(WINDOWS["elastic"][1], rel=0.15)
    assert rates["cold-restart"] == pytest.approx(WINDOWS["cold-restart"][1], rel=0.15)
    assert rates["concurrent"] == pytest.approx(WINDOWS["concurrent"][1], rel=0.25)  # 20 % off, and said so
    section = elasticmoe_study(None)  # type: ignore[arg-type]
    missed = [claim.what for claim in section.claims if not claim.ok]
    assert missed == ["during the change, concurrent", "peak memory without shared allocation"]


def test_a_lost_expert_stops_service_and_a_replica_does_not() -> None:
    plain = Deployment(model=MODEL, cluster=H100)
    once = recovery(plain, 3)
    assert once.damage.lost_LE.sum() == 26 * 8
    assert once.damage.lost_share == pytest.approx(1 / 8)
    assert once.transition.loaded_B == pytest.approx(26 * 8 * MODEL.expert_B)
    slots = np.concatenate([np.r_[8 * g : 8 * g + 8, (8 * g + 8) % 64 : (8 * g + 8) % 64 + 8] for g in range(8)])
    doubled = Placement(slots_LP=np.tile(slots, (26, 1)), slots_G=np.full(8, 16), experts=64, layers=MODEL.moe_layers)
    twice = recovery(replace(plain, placement=doubled), 3)
    assert not twice.damage.lost_LE.any()
    assert twice.damage.busiest == pytest.approx(1.5)  # its neighbours take over halves: 8 + 4 + 4 halves of 8 + 8
    assert twice.transition.loaded_B == twice.transition.moved_B == 0
    assert twice.transition.seconds < once.transition.seconds
    assert twice.deployment.experts.devices == once.deployment.experts.devices == 7


def test_a_rank_dies_with_any_of_its_devices() -> None:
    found = recovery(Deployment(model=MODEL, cluster=H100, tp=2), 3)
    assert (found.damage.dead, found.deployment.cluster.size) == ((2, 3), 6)
    for device, tp in ((8, 1), (-1, 1), (0, 8)):
        with pytest.raises(InputError, match="name a device"):
            recovery(Deployment(model=MODEL, cluster=H100, tp=tp), device)
    with pytest.raises(InputError, match="leave one alive"):
        damage(even_placement(MODEL, 2), [0, 1])


def server(cluster: Any = H100, **more: Any) -> Deployment:
    """A deployment with a plain law: 10 ms a step."""
    return Deployment(model=MODEL, cluster=cluster, cache_tokens=100_000, max_seqs=8, law=StepLaw.plain(step_s=0.01, tokens=8192), **more)


def test_pairs_of_nested_sizes_move_only_what_joining_or_leaving_devices_hold() -> None:
    sizes = Sizes.of(server(), [2, 4, 8])
    held = dict(zip(sizes.devices, sizes.placements, strict=True))
    for (a, b), change in sizes.transitions.items():
        few, many = held[min(a, b)], held[max(a, b)]
        there = slice(min(a, b), max(a, b))
        assert len(held[a].diff(held[b])) == 26 * many.slots_G[there].sum()
        assert (change.before, change.after, packed(few).devices) == (a, b, min(a, b))
    huge = replace(server(), model=load_model("deepseek-v3"), cache_tokens=None)
    with pytest.raises(InputError, match="for a key-value cache"):
        Sizes.of(huge, [8], drop=True)
    h200 = replace(huge, cluster=load_cluster("b200x8"))
    assert Sizes.of(h200, [4, 8], drop=True).devices == (8,)
    for wrong in ([4, 2], [3, 8], [8, 16], []):
        with pytest.raises(InputError, match="sizes"):
            Sizes.of(server(tp=2), wrong)


@pytest.mark.parametrize("method", METHODS)
def test_a_change_is_served_as_it_is_described(method: str) -> None:
    """Requests keep coming through a change; intake stops for as long as the transition says, and nobody is lost."""
    sizes = Sizes.of(server(), [4, 8], method=METHODS[method])
    small, large = (replace(each, law=StepLaw.plain(step_s=0.01, tokens=8192)) for each in sizes.deployments)
    resizing = replace(sizes.resizings[4, 8], at_s=20.0)
    requests = generate("poisson", requests_per_s=20.0, span_s=200.0, prompt=64, output=20, seed=1)
    found = serve(requests, small, changes=change_of(resizing, large), seed=1)
    assert np.isfinite(found.end_s_R).all()
    starts = np.sort(found.start_s_R)
    blocked = resizing.pause_s or resizing.down_s
    gap = np.diff(starts[(starts > 15) & (starts < 20 + blocked + 5)]).max()
    assert gap == pytest.approx(blocked, abs=0.6)
    assert (found.ttft_s_R[found.end_s_R < 20] < 1).all()
    under_way = (found.arrival_s_R < 19.5) & (found.end_s_R > 20)
    assert (found.again_R[under_way] == (0 if sizes.transitions[4, 8].keeps_cache else 1)).all()


def test_changes_follow_the_plan() -> None:
    resizing = Resizing(at_s=60.0, before=8, after=4, method="elastic", seconds=2.0, pause_s=2.0)
    ordered, over = change_of(resizing, server())
    assert (ordered.at_s, ordered.pause_s, ordered.to, over.at_s, over.kind) == (60.0, 2.0, None, 62.0, "scale-down")
