"""Migrations executed: no expert is ever without a slot, no output changes, and a wrong move cannot pass."""

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
from moesim.errors import PlanError, ValidationError
from moesim.plan import Placement, Plan, slots_per_device
from moesim.trace import NO_EXPERT, Trace
from moesim.validate import migrate
from moesim.validate.execute import execute
from moesim.validate.migrate import SPARE, LiveLayer, execute_migration, safe_order
from moesim.validate.weights import ExpertWeights

EXPERTS = 16
WEIGHTS = ExpertWeights.random(experts=EXPERTS, hidden=32, intermediate=16)


def placement(rng: np.random.Generator, devices: int, extra: int = 0) -> Placement:
    rows = np.stack([rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, extra * devices)])) for _ in range(2)])
    return Placement(slots_LP=rows, slots_G=slots_per_device(EXPERTS + extra * devices, devices), experts=EXPERTS, layers=(1, 2))


def batch(seed: int = 0, tokens: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :3].astype(np.uint16)
    ids[rng.random(ids.shape) < 0.1] = NO_EXPERT
    return ids, rng.random(ids.shape)


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8, 16]), st.integers(0, 2), st.integers(0, 2))
def test_the_order_is_safe_and_always_exists(seed: int, devices: int, before: int, after: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = placement(rng, devices, before), placement(rng, devices, after)
    held = old.holds_LGE[0].copy()
    room = np.maximum(old.slots_G, new.slots_G) + SPARE
    order = safe_order(old, new, 0)
    assert len(order) == int((new.holds_LGE[0] & ~held).sum())  # nothing is copied twice
    for move in order:
        assert held[move.source, move.expert]
        held[move.target, move.expert] = True
        assert held[move.target].sum() <= room[move.target]
        for rank, expert in move.frees:
            assert held[rank, expert]
            held[rank, expert] = False
        assert held.any(axis=0).all()
    assert not (new.holds_LGE[0] & ~held).any()


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(0, 1), st.integers(0, 1))
def test_outputs_are_the_same_before_during_and_after(seed: int, before: int, after: int) -> None:
    rng = np.random.default_rng(seed)
    ids, gates = batch(seed % 100)
    found = execute_migration(placement(rng, 4, before), placement(rng, 4, after), 0, WEIGHTS, ids, gates, repeats=2)
    assert found["deviation"] < 1e-5
    if not before and not after:
        assert found["exact"]  # without replicas not a bit changes
    assert found["bytes"] == found["moves"] * WEIGHTS.expert_B
    assert found["copy_s"] > 0
    assert found["serve_s"] > 0


def test_nothing_to_move_is_no_migration() -> None:
    same = placement(np.random.default_rng(0), 4)
    ids, gates = batch()
    found = execute_migration(same, same, 1, WEIGHTS, ids, gates, repeats=2)
    assert (found["moves"], found["slowdown"], found["copy_s"]) == (0, None, 0)


def test_replicas_given_up_need_no_copy() -> None:
    rng = np.random.default_rng(0)
    twice = Placement(slots_LP=np.stack([np.tile(np.arange(EXPERTS), 2)] * 2), slots_G=slots_per_device(32, 2), experts=EXPERTS, layers=(1, 2))
    once = placement(rng, 2)
    assert safe_order(twice, once, 0) == []
    ids, gates = batch()
    assert execute_migration(twice, once, 0, WEIGHTS, ids, gates, repeats=2)["moves"] == 0


@pytest.mark.parametrize("fault", ["the copy goes to another slot", "the copy does not happen", "the map is switched too early"])
def test_a_wrong_move_cannot_pass(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    rng = np.random.default_rng(0)
    copy_in = LiveLayer.copy_in

    def broken(self: LiveLayer, move: Any, slot: int) -> None:
        if fault == "the copy goes to another slot":
            copy_in(self, move, (slot + 1) % self.slots_G[move.target])
        elif fault == "the map is switched too early":
            self.pools[move.target].up[slot].fill_(0)

    monkeypatch.setattr(LiveLayer, "copy_in", broken)
    like = ExpertWeights.like
    monkeypatch.setattr(ExpertWeights, "like", lambda self, n, **options: _zeroed(like(self, n, **options)))
    ids, gates = batch()
    with pytest.raises(ValidationError, match=r"map from logical to physical experts is wrong|NaN"):
        execute_migration(placement(rng, 4), placement(rng, 4), 0, WEIGHTS, ids, gates, repeats=2)


def _zeroed(weights: ExpertWeights) -> ExpertWeights:
    for part in weights.parts:
        part.zero_()
    return weights


def test_an_expert_without_a_slot_is_refused() -> None:
    live = LiveLayer(placement(np.random.default_rng(0), 4), 0, WEIGHTS, slots_G=np.full(4, 5))
    expert = next(iter(live.slot_of[0]))
    with pytest.raises(ValidationError, match="would be left without a slot"):
        live.switch(migrate.Move(expert=next(iter(live.slot_of[1])), source=1, target=2, frees=((0, expert),)), 4)
    live.free_slot(3)
    full = LiveLayer(placement(np.random.default_rng(0), 4), 0, WEIGHTS, slots_G=np.full(4, 4))
    with pytest.raises(ValidationError, match="rank 3 has no free slot of 4"):
        full.free_slot(3)
    with pytest.raises(ValidationError, match="does not hold expert"):
        full.retire(np.ones((4, EXPERTS), bool))


def test_migrations_of_plans_are_reported_with_a_prediction(make_trace: Callable[..., Trace]) -> None:
    model = tiny_model(layers=2, experts=EXPERTS, top_k=3, hidden=32, intermediate=16)
    ids, _ = batch()
    trace = make_trace(model, np.stack([ids, ids], axis=1))
    rng = np.random.default_rng(0)
    plans = [
        Plan(name=name, model="tiny", model_digest=model.digest, placement=placement(rng, 4))
        for name in ("a", "b", "c")
    ]  # fmt: skip
    found = execute(trace, plans, [], {"backend": "loop", "dtype": "fp32"}, tokens=40, migrate=True)
    assert [one["name"] for one in found] == ["a to b", "b to c"]
    assert all(one["kind"] == "migration" and one["predicted_s"] > 0 and one["measured_s"] > 0 for one in found)
    assert "outputs equal to" in found[0]["detail"]


def test_plans_for_other_ranks_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(PlanError, match="cannot migrate"):
        safe_order(placement(rng, 4), placement(rng, 2), 0)


def test_the_prediction_is_one_copy_after_the_other() -> None:
    rng = np.random.default_rng(0)
    ids, gates = batch()
    path = CopyPath(latency_s=1e-3, bandwidth_Bps=1e6, bottleneck="test")
    found = execute_migration(placement(rng, 4), placement(rng, 4), 0, WEIGHTS, ids, gates, path=path, repeats=2)
    assert found["predicted_copy_s"] == pytest.approx(found["moves"] * (1e-3 + WEIGHTS.expert_B / 1e6))
    assert torch.is_inference_mode_enabled() is False
