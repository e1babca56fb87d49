"""A real transformers model under a placement: the same tokens, and everything put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesim.demo.train import build_model
from moesim.errors import PlanError, ValidationError
from moesim.plan import Placement, slots_per_device
from moesim.validate import experts_hf
from moesim.validate.experts_hf import NAME, execute_in_model, find_experts, under_plan

PROMPT = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_model(experts=8, top_k=2, layers=2, hidden=32, intermediate=16).eval()


def placement(extra: int = 0, seed: int = 0, layers: tuple[int, ...] = (0, 1), experts: int = 8) -> Placement:
    rng = np.random.default_rng(seed)
    slots = np.stack([rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, extra)])) for _ in layers])
    return Placement(slots_LP=slots, slots_G=slots_per_device(experts + extra, 4), experts=experts, layers=layers)


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_a_model_generates_the_same_tokens_under_any_plan(model: torch.nn.Module, extra: int, backend: str) -> None:
    before = model.config._experts_implementation
    found = execute_in_model(model, placement(extra), PROMPT, new_tokens=3, backend=backend)  # type: ignore[arg-type]
    assert found["identical"]
    assert found["tokens"] == 2 * 3
    assert found["largest_logit_deviation"] < 1e-5
    assert found["deviation"] < 1e-5
    once = 2 * 12 * 2  # tokens x top-k of the prompt, in each layer
    assert (np.array(found["selections"]).sum(axis=1) == once + 2 * 2 * (12 + 2)).all()
    assert model.config._experts_implementation == before


def test_wrong_experts_cannot_pass(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts_hf._residents

    def wrong(module: object, plan: Placement, layer: int) -> list[object]:
        found = right(module, plan, layer)
        return [found[1], found[0], *found[2:]]

    monkeypatch.setattr(experts_hf, "_residents", wrong)
    with pytest.raises(ValidationError, match="the placement moved tokens to wrong experts"):
        execute_in_model(model, placement(), PROMPT, new_tokens=2)


def test_other_tokens_cannot_pass(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_hf, "in_order", lambda parts, resident, hidden, gates, backend: hidden.roll(7, -1) * 1e3)
    monkeypatch.setattr(experts_hf, "check_equal", lambda *_, **__: 0.0)
    with pytest.raises(ValidationError, match="generated other tokens, first at place"):
        execute_in_model(model, placement(), PROMPT, new_tokens=4)


def test_a_plan_of_another_model_is_refused_and_all_is_put_back(model: torch.nn.Module) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = model.config._experts_implementation
    for plan, message in (
        (placement(layers=(0,)), "experts in layer 1, the placement is for"),
        (placement(layers=(0, 1, 2)), "for 3 MoE layers, the model has experts in 2"),
        (placement(experts=16), "8 experts, the placement has 16"),
    ):
        with pytest.raises(PlanError, match=message), under_plan(model, plan):
            pass
    with pytest.raises(ZeroDivisionError), under_plan(model, placement()):
        raise ZeroDivisionError
    with under_plan(model, placement()), pytest.raises(ValidationError, match="already served"), under_plan(model, placement()):
        pass
    assert NAME not in ALL_EXPERTS_FUNCTIONS
    assert model.config._experts_implementation == before


def test_models_without_such_experts_are_said(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="Linear has no experts that others may execute"):
        find_experts(torch.nn.Linear(2, 2))
    experts = find_experts(model)[0]
    monkeypatch.setattr(experts, "has_bias", True)
    with pytest.raises(ValidationError, match="has_bias"), under_plan(model, placement()):
        pass
