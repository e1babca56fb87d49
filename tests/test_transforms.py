"""Routing transforms: what is dropped, and what stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.plan import Placement, Plan, slots_per_device
from moesim.sim.event import EventResult, simulate_event
from moesim.systems import SYSTEMS, Plain, Regrouped
from moesim.systems.routing import Routing
from moesim.systems.transforms import Capacity, TopP, top_p, within_capacity
from moesim.testing import clustered_routing
from moesim.trace import NO_EXPERT, Trace, TraceWriter, load_trace


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.1, 3), st.integers(0, 9))
def test_no_expert_takes_more_than_its_capacity_and_none_is_dropped_while_there_is_room(one: int, two: int, factor: float, seed: int) -> None:
    model = tiny_model(layers=2, experts=8, top_k=2)
    ids = clustered_routing(model, one + two, seed=seed)
    kept = within_capacity(ids, np.array([one, one + two]), 8, factor)
    for begin, end in ((0, one), (one, one + two)):
        room = int(np.ceil(factor * (end - begin) * 2 / 8))
        for layer in range(2):
            asked = np.bincount(ids[begin:end, layer].ravel(), minlength=8)
            taken = np.bincount(kept[begin:end, layer].ravel(), minlength=NO_EXPERT + 1)[:8]
            np.testing.assert_array_equal(taken, np.minimum(asked, room))
    assert ((kept == ids) | (kept == NO_EXPERT)).all()


def test_late_tokens_and_second_choices_are_dropped_first() -> None:
    ids = np.zeros((8, 1, 2), np.uint16)
    ids[:, 0, 1] = 1
    ids[4:, 0] = ids[4:, 0, ::-1]  # the later half wants expert 1 first
    kept = within_capacity(ids, np.array([8]), 4, 1.0)  # room for four each
    assert (kept[:, 0, 0] != NO_EXPERT).all()
    assert (kept[:, 0, 1] == NO_EXPERT).all()
    rates = np.mean(within_capacity(np.zeros((100, 1, 1), np.uint16), np.array([100]), 2, 1.0)[:, 0, 0].reshape(4, 25) == NO_EXPERT, axis=1)
    assert rates.tolist() == [0, 0, 1, 1]


def test_capacity_for_everybody_drops_nothing() -> None:
    ids = clustered_routing(tiny_model(layers=2, experts=8, top_k=2), 50)
    np.testing.assert_array_equal(within_capacity(ids, np.array([20, 50]), 8, 8.0), ids)


@given(st.integers(1, 6), st.floats(0.05, 1), st.integers(0, 99))
def test_top_p_uses_the_fewest_choices_that_reach_the_share(width: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(width), size=(5, 2))
    ids = np.broadcast_to(np.arange(width, dtype=np.uint16), weights.shape)
    used = top_p(ids, weights, share) != NO_EXPERT
    reached = np.where(used, weights, 0).sum(axis=2)
    assert (reached >= share - 1e-6).all()
    lightest = np.where(used, weights, np.inf).min(axis=2)
    assert ((reached - lightest < share) | (used.sum(axis=2) == 1)).all()
    assert (np.where(used, np.inf, weights).min(axis=2) >= 0).all()
    assert (np.where(used, 0, weights).max(axis=2) <= lightest + 1e-12).all()


def test_a_smaller_share_never_uses_more() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(8), size=(200, 3))
    ids = np.broadcast_to(np.arange(8, dtype=np.uint16), weights.shape)
    sizes = [(top_p(ids, weights, share) != NO_EXPERT).sum() for share in (0.2, 0.5, 0.9, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == ids.size


def test_impossible_settings_and_weights_are_refused() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="capacity factor"):
            Capacity(factor=wrong)
        with pytest.raises(InputError, match="top-p share"):
            TopP(share=wrong)
    with pytest.raises(InputError, match="weights >= 0"):
        top_p(np.zeros((1, 1, 2), np.uint16), np.array([[[0.5, -0.1]]]), 0.5)


def weighed(folder: Path, tokens: int, *, weights: bool = True) -> Trace:
    """A trace whose tokens weigh their four choices 0.5, 0.3, 0.15 and 0.05."""
    model = tiny_model(layers=2, experts=16, top_k=4)
    gates = np.broadcast_to(np.asarray([0.5, 0.3, 0.15, 0.05]), (tokens, 2, 4))
    with TraceWriter(folder / f"trace-{weights}", model, weights=weights) as writer:
        writer.append(clustered_routing(model, tokens), weights=gates if weights else None)
    return load_trace(folder / f"trace-{weights}")


def run(trace: Trace, routing: Routing) -> EventResult:
    model = trace.model
    rows = np.tile(np.arange(model.experts), (2, 1))
    placement = Placement(slots_LP=rows, slots_G=slots_per_device(model.experts, 8), experts=model.experts, layers=model.moe_layers)
    plan = Plan(name="p", model=model.name, model_digest=model.digest, placement=placement)
    return simulate_event(trace, plan, load_cluster("h100x8"), system=replace(SYSTEMS["plain"], routing=routing), tokens_per_device=64)


def test_the_engine_counts_only_the_choices_that_are_used(tmp_path: Path) -> None:
    trace = weighed(tmp_path, 2048)
    by_share = [run(trace, TopP(share=share)).tokens_SLG.sum() for share in (0.4, 0.75, 0.9, 1.0)]
    whole = run(trace, Plain())
    np.testing.assert_allclose(np.asarray(by_share) / whole.tokens_SLG.sum(), [0.25, 0.5, 0.75, 1.0], rtol=1e-12)
    used = run(trace, TopP(share=0.75))
    assert used.traffic_B_LGG.sum() < whole.traffic_B_LGG.sum()
    assert (used.layer_s_SL < whole.layer_s_SL).all()
    first_two = within_two(trace, tmp_path)
    np.testing.assert_array_equal(used.layer_s_SL, run(first_two, Plain()).layer_s_SL)  # cost depends on what is used only


def within_two(trace: Trace, folder: Path) -> Trace:
    """The same routing with the two lightest choices never made."""
    with TraceWriter(folder / "two", trace.model, weights=False) as writer:
        for batch in trace.batches():
            ids = batch.experts_TLK.copy()
            ids[:, :, 2:] = NO_EXPERT
            writer.append(ids)
    return load_trace(folder / "two")


def test_edits_inside_other_routings_are_found_and_capacity_counts_what_they_leave(tmp_path: Path) -> None:
    trace = weighed(tmp_path, 2048)
    np.testing.assert_array_equal(run(trace, Regrouped(inner=TopP(share=0.75))).tokens_SLG.sum(), run(trace, TopP(share=0.75)).tokens_SLG.sum())
    tight = Capacity(factor=0.5)
    both = [run(trace, routing).tokens_SLG.sum() for routing in (TopP(share=0.75, inner=tight), replace(tight, inner=TopP(share=0.75)))]
    assert both[0] == both[1] < run(trace, TopP(share=0.75)).tokens_SLG.sum()
    assert both[0] <= 0.5 * run(trace, Plain()).tokens_SLG.sum() * (1 + 16 / 1024)


def test_a_trace_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gate weights were not captured"):
        run(weighed(tmp_path, 64, weights=False), TopP(share=0.75))
