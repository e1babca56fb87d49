"""Cache plans executed: hits as replayed, one by one; outputs as resident, bit for bit; stalls as a queue says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.copies import CopyPath
from moesim.errors import ValidationError
from moesim.plan import CachePlan, Placement, Plan, slots_per_device
from moesim.replay import Oracle, PreGated, policies
from moesim.trace import NO_EXPERT, Trace
from moesim.validate import offload
from moesim.validate.execute import execute, prefetcher_of
from moesim.validate.offload import execute_cache, fifo_stalls
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


PATH = CopyPath(latency_s=0.0, bandwidth_Bps=1.0, bottleneck="test")  # a copy of n bytes takes n seconds


def test_stalls_of_a_queue_in_closed_form() -> None:
    compute = np.full(4, 5.0)
    assert fifo_stalls(np.array([2, 0, 1, 0]), np.zeros(4, int), compute, PATH, 3.0).tolist() == [6, 0, 3, 0]
    # fetched ahead, one copy hides behind the computation before, two (6 s) stick out by one second
    assert fifo_stalls(np.zeros(4, int), np.array([1, 2, 0, 0]), compute, PATH, 3.0).tolist() == [0, 0, 1, 0]
    # a demand waits for the prefetch of the same engine before it
    assert fifo_stalls(np.array([0, 1, 0, 0]), np.array([2, 0, 0, 0]), compute, PATH, 3.0).tolist() == [0, 4, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(0, 10)), min_size=1, max_size=20), st.floats(0.1, 5))
def test_stalls_are_bounded_by_all_copies_and_grow_with_their_time(steps: list[tuple[int, int, float]], each: float) -> None:
    demand, ahead, compute = (np.array(x) for x in zip(*steps, strict=True))
    stalls = fifo_stalls(demand, ahead, compute, PATH, each)
    copies = demand.sum() + ahead[:-1].sum()
    assert (stalls >= 0).all()
    assert stalls.sum() <= copies * each * (1 + 1e-9)
    assert stalls.sum() >= max(0.0, (demand.sum() * each - ahead.sum() * each) if not ahead.any() else 0.0) * (1 - 1e-9)
    assert fifo_stalls(demand, ahead, compute, PATH, 2 * each).sum() >= stalls.sum() * (1 - 1e-9)


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


def test_a_hung_copy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

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
        side.wait(tickets[9])
        assert done[:10] == list(range(10))
    assert done == list(range(20))
    assert tickets[9].stall_s >= 0
    assert all(ticket.seconds >= 0 for ticket in tickets)
    assert torch.is_inference_mode_enabled() is False
