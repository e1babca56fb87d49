"""Two-batch overlap: the closed form of two chains on two streams, and the bounds of any schedule."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.plan import Placement, Plan, slots_per_device
from moesim.sim.dense import DenseTimes
from moesim.sim.event import EventResult, simulate_event
from moesim.sim.layers import Crossing, Pass
from moesim.systems import SYSTEMS, Exchange, Residency, Schedule, System
from moesim.trace import Trace, TraceWriter, load_trace

LAYERS, DEVICES, STEPS = 4, 8, 2
MODEL = tiny_model(layers=LAYERS, experts=32, top_k=4, hidden=2048, intermediate=1024, shared_intermediate=1024)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("t") / "trace"
    with TraceWriter(path, MODEL, weights=False) as writer:
        writer.append(clustered_routing(MODEL, 512 * STEPS, clusters=8, seed=0))
    return load_trace(path)


def plan_for(devices: int) -> Plan:
    rows = np.tile(np.arange(MODEL.experts), (LAYERS, 1))
    placement = Placement(slots_LP=rows, slots_G=slots_per_device(MODEL.experts, devices), experts=MODEL.experts, layers=MODEL.moe_layers)
    return Plan(name="p", model=MODEL.name, model_digest=MODEL.digest, placement=placement)


def with_times(
    patch: pytest.MonkeyPatch, trace: Trace, system: System, attention: float, dispatch: float, experts: Any, combine: float
) -> EventResult:
    """A run whose stages take these seconds for one part, whatever it holds: no cost of halving, no gain from it."""

    def dense(*_: object, **__: object) -> DenseTimes:
        zero = np.zeros(DEVICES)
        return DenseTimes(attention_LG=np.full((LAYERS, DEVICES), attention), gate_G=zero, shared_G=zero, parameters_L=np.zeros(LAYERS))

    def fixed(_: object, routed: Any, *__: object, **___: object) -> Pass:
        shape = routed.gathered_SL.shape
        there, back = (np.full(shape, x) for x in (dispatch, combine))
        return Pass(
            degree_SL=np.full(shape, system.schedule.batches),
            transport_SL=np.zeros(shape, np.int64),
            port_SL=np.zeros(shape, np.int64),
            there=Crossing(whole_SL=there, link_SL=there, nic_SL=there),
            back=Crossing(whole_SL=back, link_SL=back, nic_SL=back),
            compute_SLG=np.broadcast_to(np.asarray(experts, np.float64), (*shape, DEVICES)),
            moe_SL=there,
            outside=0,
        )

    patch.setattr("moesim.sim.event.dense_times", dense)
    patch.setattr("moesim.sim.event.passes", fixed)
    return simulate_event(trace, plan_for(DEVICES), load_cluster("h100x8"), system=system, tokens_per_device=64)


def test_equal_stages_fill_both_streams_but_for_one_stage(trace: Trace) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = with_times(patch, trace, SYSTEMS["two-batch"], 1.0, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(found.step_s_S, 4 * LAYERS + 1, rtol=1e-12)  # both halves compute 2 stages a layer; the last combine is alone
    assert found.stream_use["exchange"] == pytest.approx(4 * LAYERS / (4 * LAYERS + 1))


@given(stages=st.lists(st.integers(0, 9), min_size=4, max_size=4), slower=st.integers(0, 9))
def test_time_lies_between_the_busiest_stream_and_one_after_the_other(trace: Trace, stages: list[int], slower: int) -> None:
    attention, dispatch, experts, combine = map(float, stages)
    experts_G = np.full(DEVICES, experts)
    experts_G[3] += slower
    with pytest.MonkeyPatch.context() as patch:
        found = with_times(patch, trace, SYSTEMS["two-batch"], attention, dispatch, experts_G, combine)
    step_s = found.step_s_S
    np.testing.assert_allclose(step_s, step_s[0], rtol=1e-9)  # steps begin together, so they do not fill each other
    chain = LAYERS * (attention + dispatch + experts_G.max() + combine)
    compute, exchange = LAYERS * (attention + experts_G.max()), LAYERS * (dispatch + combine)
    assert step_s[0] >= max(2 * compute, 2 * exchange, chain) - 1e-9
    assert step_s[0] <= 2 * chain + 1e-9, "halves one after the other are one batch of all"


@given(attention=st.integers(0, 9), experts=st.integers(0, 9))
def test_a_free_exchange_leaves_the_computation_of_both_halves(trace: Trace, attention: int, experts: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = with_times(patch, trace, SYSTEMS["two-batch"], float(attention), 0.0, float(experts), 0.0)
    np.testing.assert_allclose(found.step_s_S, 2 * LAYERS * (attention + experts), rtol=1e-12)


def test_it_hides_all_to_alls_of_large_batches_and_costs_weights_read_twice_in_small_ones(trace: Trace) -> None:
    cluster, plan = load_cluster("h100-4x8"), plan_for(32)

    def step_s(system: str, tokens: int, mode: Any) -> float:
        return float(simulate_event(trace, plan, cluster, system=system, tokens_per_device=tokens, mode=mode, context=128).step_s_S.mean())

    assert step_s("two-batch", 8192, "prefill") < step_s("plain", 8192, "prefill")
    assert step_s("two-batch", 1, "decode") > step_s("plain", 1, "decode")


def test_bytes_tokens_and_copies_are_those_of_one_batch(trace: Trace) -> None:
    for contention in (False, True):
        one, two = (
            simulate_event(trace, plan_for(32), load_cluster("h100-4x8"), system=name, tokens_per_device=256, contention=contention)
            for name in ("plain", "two-batch")
        )
        np.testing.assert_allclose(two.traffic_B_LGG, one.traffic_B_LGG, rtol=1e-12)
        np.testing.assert_array_equal(two.tokens_SLG, one.tokens_SLG)
        assert two.exchanges == 2 * one.exchanges
        for link, share in one.link_use.items():
            assert two.link_use[link] * two.step_s_S.sum() == pytest.approx(share * one.step_s_S.sum(), rel=1e-9)


def test_communication_that_takes_compute_costs_more_than_free_communication(trace: Trace) -> None:
    def step_s(share: float) -> float:
        system = replace(SYSTEMS["two-batch"], exchange=Exchange(sm_share=share))
        return float(simulate_event(trace, plan_for(8), load_cluster("h100x8"), system=system, tokens_per_device=4096).step_s_S.mean())

    times = [step_s(share) for share in (0.0, 0.15, 0.5)]
    assert all(b > a for a, b in itertools.pairwise(times))


def test_what_two_batches_do_not_go_with_is_refused(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="inference only"):
        simulate_event(trace, plan_for(8), load_cluster("h100x8"), system="two-batch", mode="training")
    with pytest.raises(InputError, match="batches=3"):
        Schedule(batches=3)
    with pytest.raises(InputError, match="a half is a part already"):
        Schedule(batches=2, forward=(2,))
    with pytest.raises(InputError, match="by whole layers"):
        replace(SYSTEMS["two-batch"], residency=Residency())
