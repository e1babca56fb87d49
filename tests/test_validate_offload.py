"""Cache plans executed: hits as replayed, one by one; outputs as resident, bit for bit; stalls as a queue says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.offload import Fetching
from moesim.errors import PlanError, ValidationError
from moesim.plan import CachePlan, Placement, Plan, slots_per_device
from moesim.replay import Oracle, PreGated, policies
from moesim.trace import NO_EXPERT, Trace
from moesim.validate import offload
from moesim.validate.execute import execute, placement_of, prefetcher_of
from moesim.validate.offload import execute_cache
from moesim.validate.stalls import expected_stalls, measure_way, settle_one
from moesim.validate.weights import ExpertWeights

LAYERS, EXPERTS = 2, 8
WEIGHTS = [ExpertWeights.random(experts=EXPERTS, hidden=16, intermediate=8, seed=layer) for layer in range(LAYERS)]


def routing(seed: int, tokens: int = 24, top_k: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.gumbel(size=(tokens, LAYERS, EXPERTS)) + np.linspace(0, 2, EXPERTS), axis=2)[:, :, :top_k].astype(np.uint16)
    ids[rng.random(ids.shape) < 0.1] = NO_EXPERT
    return ids, rng.random(ids.shape).astype(np.float32)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(["lru", "fifo", "lifo", "lfu", "belady", "optimal", "static", "arc"]),
    slots=st.integers(0, EXPERTS),
    step=st.sampled_from([1, 3, 24]),
    prefetcher=st.sampled_from([None, PreGated(), Oracle(recall=0.6, false=0.3), Oracle(recall=0.9, distance=0)]),
)
def test_hits_bytes_and_outputs_are_exactly_the_simulated_ones(seed: int, policy: str, slots: int, step: int, prefetcher: Any) -> None:
    """`execute_cache` raises at the first difference."""
    ids, gates = routing(seed)
    found = execute_cache(ids, gates, WEIGHTS, policy=policy, slots=slots, tokens_per_step=step, prefetcher=prefetcher)
    assert found["hits_equal_simulated"]
    assert found["deviation"] == 0
    assert found["bytes"] == found["copies"] * WEIGHTS[0].expert_B
    if slots == 0:
        assert found["hits"] == 0
    assert found["accesses"] - found["hits"] <= found["copies"] or prefetcher is not None or policy == "static"


def test_every_installed_policy_runs() -> None:
    ids, gates = routing(1)
    hits = {name: execute_cache(ids, gates, WEIGHTS, policy=name, slots=4)["hits"] for name in policies()}
    assert hits["optimal"] >= max(hits[name] for name in ("belady", "lru", "lfu", "fifo"))  # those that begin empty


def test_pinned_experts_are_there_from_the_start() -> None:
    ids, gates = routing(2)
    pinned = np.zeros((LAYERS, EXPERTS), bool)
    pinned[:, -3:] = True
    found = execute_cache(ids, gates, WEIGHTS, policy="lru", slots=4, pinned_LE=pinned)
    asked = ids[ids != NO_EXPERT]
    assert found["hits"] >= int((asked >= EXPERTS - 3).sum())


def test_a_slot_with_the_wrong_expert_cannot_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, gates = routing(3)
    put = ExpertWeights.put

    def wrong(self: ExpertWeights, slot: int, source: ExpertWeights, expert: int, **options: Any) -> None:
        put(self, slot, source, (expert + 1) % EXPERTS, **options)

    monkeypatch.setattr(ExpertWeights, "put", wrong)
    with pytest.raises(ValidationError, match="outputs differ from the resident layer's"):
        execute_cache(ids, gates, WEIGHTS, policy="lru", slots=4)


def test_a_cache_that_forgets_cannot_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, gates = routing(4)
    load = offload.LayerCache.load

    def forgetful(self: offload.LayerCache, expert: int, side: Any) -> Any:
        ticket = load(self, expert, side)
        self.free.append(self.slot_of.pop(expert))
        return ticket

    pinned = np.ones((LAYERS, EXPERTS), bool)
    monkeypatch.setattr(offload.LayerCache, "load", forgetful)
    with pytest.raises(ValidationError, match="was a miss on the device and a hit in the replay"):
        execute_cache(ids, gates, WEIGHTS, policy="lru", slots=EXPERTS, pinned_LE=pinned)


def test_outputs_that_are_no_numbers_cannot_pass() -> None:
    ids, gates = routing(5)
    broken = [ExpertWeights(up=w.up * float("nan"), down=w.down, gated=True) for w in WEIGHTS]
    with pytest.raises(ValidationError, match="NaN or infinite"):
        execute_cache(ids, gates, broken, policy="lru", slots=2)


def stalls(ids: np.ndarray, compute_s: float, copy_s: float, *, slots: int = 0, prefetcher: Any = None, migrate_s: float = 0.0) -> np.ndarray:
    """What the engine expects when a copy takes `copy_s` alone, and `migrate_s` more beside computation."""
    speed = WEIGHTS[0].expert_B / copy_s
    way = Fetching(alone_Bps=speed, beside_Bps=speed, migrate_s=migrate_s)
    settled = settle_one(
        ids, WEIGHTS[0], way, policy="lru", slots_L=np.full(ids.shape[1], slots), tokens_per_step=1, prefetcher=prefetcher, pinned_LE=None, seed=0
    )
    return expected_stalls(*settled, np.full(ids.shape[0] * ids.shape[1], compute_s))


def test_stalls_of_a_queue_in_closed_form() -> None:
    none = NO_EXPERT
    on_demand = np.array([[[0, 1]], [[none, none]], [[2, none]], [[none, none]]], np.uint16)
    assert stalls(on_demand, 5.0, 3.0).tolist() == pytest.approx([6, 0, 3, 0])
    one, two = (np.array([[[none, none], [0, other]]], np.uint16) for other in (none, 1))
    assert stalls(one, 5.0, 3.0, prefetcher=PreGated()).tolist() == pytest.approx([0, 0])  # hides behind the layer before
    assert stalls(two, 5.0, 3.0, prefetcher=PreGated()).tolist() == pytest.approx([0, 1])  # sticks out by a second
    assert stalls(two, 5.0, 3.0, prefetcher=PreGated(), migrate_s=0.5).tolist() == pytest.approx([0, 2])
    behind = np.array([[[4, none], [0, 1]]], np.uint16)  # its own copy first, then those ahead
    assert stalls(behind, 5.0, 3.0, prefetcher=PreGated()).tolist() == pytest.approx([3, 1])


@given(st.integers(0, 10_000), st.integers(0, EXPERTS), st.sampled_from([None, PreGated(), Oracle(recall=0.6, false=0.3)]), st.floats(0.1, 5))
def test_stalls_are_bounded_by_all_copies(seed: int, slots: int, prefetcher: Any, copy_s: float) -> None:
    ids, _ = routing(seed, tokens=6)
    stall_N = stalls(ids, 1.0, copy_s, slots=slots, prefetcher=prefetcher)
    alone_N = stalls(ids, 1.0, copy_s, slots=slots)
    misses = execute_cache(ids, np.ones(ids.shape, np.float32), WEIGHTS, policy="lru", slots=slots)["copies"]
    assert (stall_N >= 0).all()
    assert alone_N.sum() == pytest.approx(misses * copy_s)  # on demand all of it is waited for
    if prefetcher is None or not prefetcher.false:  # right copies ahead never wait longer
        assert stall_N.sum() <= alone_N.sum() * (1 + 1e-9)


@pytest.mark.parametrize(("prefetcher", "step"), [(None, 1), (PreGated(), 1), (PreGated(), 4)])
def test_waits_for_copies_of_known_time_are_those_the_engine_expects(monkeypatch: pytest.MonkeyPatch, prefetcher: Any, step: int) -> None:
    """Copies that keep their thread busy for 2 ms: hits and copies equal exactly, the whole wait within 10 %."""
    each_s, put = 2e-3, ExpertWeights.put

    def slow(self: ExpertWeights, slot: int, source: ExpertWeights, expert: int, **options: Any) -> None:
        begin = time.thread_time()
        put(self, slot, source, expert, **options)
        while options and time.thread_time() - begin < each_s:
            pass

    monkeypatch.setattr(ExpertWeights, "put", slow)
    ids, gates = routing(7, tokens=48)
    speed = WEIGHTS[0].expert_B / each_s
    found = execute_cache(
        ids, gates, WEIGHTS, policy="lru", slots=3, tokens_per_step=step, prefetcher=prefetcher, way=Fetching(alone_Bps=speed, beside_Bps=speed)
    )
    assert found["stall_s"]["total"] > 20 * each_s
    assert found["predicted_stall_s"]["total"] == pytest.approx(found["stall_s"]["total"], rel=0.1)


def test_copies_are_timed_alone_and_beside_computation() -> None:
    way = measure_way(WEIGHTS[0], "cpu", total_B=1e5, repeats=3)
    assert way.alone_Bps > 0
    assert way.beside_Bps > 0
    assert way.migrate_s >= 0


def cache_plan(plan: Plan, **changes: Any) -> CachePlan:
    p = plan.placement
    values: dict[str, Any] = {
        "name": "half", "model": plan.model, "model_digest": plan.model_digest, "layers": p.layers, "slots_LG": np.full((LAYERS, 2), 2),
        "tier_LE": np.ones((LAYERS, EXPERTS), int), "bits_LE": np.full((LAYERS, EXPERTS), 32.0), "policy": "lru", "placement": plan.digest,
    }  # fmt: skip
    return CachePlan(**values | changes)


def test_a_cache_plan_is_executed_device_by_device(make_trace: Callable[..., Trace]) -> None:
    model = tiny_model(layers=LAYERS, experts=EXPERTS, top_k=2, hidden=16, intermediate=8)
    ids, _ = routing(6)
    trace = make_trace(model, ids)
    rng = np.random.default_rng(0)
    slots = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    placement = Placement(slots_LP=slots, slots_G=slots_per_device(EXPERTS, 2), experts=EXPERTS, layers=model.moe_layers)
    plan = Plan(name="p", model="tiny", model_digest=model.digest, placement=placement)
    found = {"backend": "loop", "dtype": "fp32"}
    (one,) = execute(trace, [plan], [cache_plan(plan, prefetcher="pre-gated")], found, tokens=24)
    assert (one["kind"], one["name"]) == ("cache", "half")
    assert sum(device["accesses"] for device in one["figures"]["per_device"]) == int((ids != NO_EXPERT).sum())
    assert one["predicted_s"] > 0
    assert not one["notes"]
    odd = cache_plan(plan, bits_LE=np.full((LAYERS, EXPERTS), 4.0), tier_LE=np.full((LAYERS, EXPERTS), 2), prefetcher="affinity")
    (two,) = execute(trace, [plan], [odd], found, tokens=24)
    assert [note.split(":")[0].split(" were")[0] for note in two["notes"]] == [
        "prefetcher 'affinity' needs more than this trace", "experts on NVMe", "weights"
    ]  # fmt: skip
    assert prefetcher_of(cache_plan(plan))[0] is None
    assert "one layer ahead, the plan says 3" in prefetcher_of(cache_plan(plan, prefetcher="pre-gated", distance=3))[1][0]
    with pytest.raises(PlanError, match="give its plan, or plan the cache again"):
        placement_of(cache_plan(plan, placement="0" * 16), [plan], model)


def test_a_hung_copy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesim.validate import streams

    monkeypatch.setattr(streams, "PATIENCE_S", 0.05)
    with streams.Side("cpu") as side:
        ticket = side.submit(lambda: time.sleep(0.4))
        with pytest.raises(ValidationError, match="did not end within"):
            side.wait(ticket)


def test_work_beside_is_done_in_order_and_before_it_is_waited_for() -> None:
    from moesim.validate.streams import Side

    done: list[int] = []
    with Side("cpu") as side:
        tickets = [side.submit(lambda i=i: done.append(i)) for i in range(20)]
        begin = side.mark()
        side.wait(tickets[9])
        assert done[:10] == list(range(10))
        assert side.seconds(begin, side.mark()) >= 0
    assert done == list(range(20))
    assert all(ticket.seconds >= 0 for ticket in tickets)
    assert torch.is_inference_mode_enabled() is False


def test_fp8_experts_are_served_with_wider_tokens() -> None:
    """fp8 is a format of weights: tokens are bf16, and a copy brings the scales too."""
    ids, gates = routing(8)
    fp8 = [weights.to(torch.float8_e4m3fn) for weights in WEIGHTS]
    found = execute_cache(ids, gates, fp8, policy="lru", slots=3, prefetcher=PreGated())
    assert found["deviation"] == 0
    assert found["bytes"] == found["copies"] * fp8[0].expert_B
