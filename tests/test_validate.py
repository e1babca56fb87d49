"""The real layer: correct, invariant under placement, and its times predicted in the right order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, ValidationError
from moesim.plan import DISPATCH_RULES, Placement, Plan, slots_per_device
from moesim.trace import NO_EXPERT, Trace
from moesim.validate.agreement import errors, ranking
from moesim.validate.calibrate import calibrate, check_device
from moesim.validate.layer import ExpertWeights, moe_layer
from moesim.validate.ranks import run, same_output, shares
from moesim.validate.validate import validate

MODEL = tiny_model(layers=2, experts=16, top_k=2, hidden=32, intermediate=24)


def reference(hidden: torch.Tensor, ids: np.ndarray, gates: np.ndarray, weights: ExpertWeights) -> torch.Tensor:
    """Token by token in float64."""
    x, up, down = hidden.double(), weights.up.double(), weights.down.double()
    out = torch.zeros_like(x)
    for token in range(len(ids)):
        for expert, gate in zip(ids[token], gates[token], strict=True):
            if expert == NO_EXPERT:
                continue
            wide = up[expert] @ x[token]
            if weights.gated:
                a, b = wide.chunk(2)
                wide = torch.nn.functional.silu(a) * b
            else:
                wide = torch.relu(wide) ** 2
            out[token] += float(gate) * (down[expert] @ wide)
    return out


def selections(ids: np.ndarray, gates: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = np.nonzero(ids != NO_EXPERT)
    return torch.as_tensor(ids[rows, columns].astype(np.int64)), torch.as_tensor(rows), torch.as_tensor(gates[rows, columns])


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", ["random", "one hot expert", "empty experts", "no selection"])
def test_the_layer_equals_float64(backend: str, gated: bool, case: str) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40, 8)), axis=1)[:, :2].astype(np.uint16)
    if case == "one hot expert":
        ids[:, 0], ids[:, 1] = 3, NO_EXPERT
    elif case == "empty experts":
        ids = ids % 2
        ids[:, 1] = 1 - ids[:, 0]
    elif case == "no selection":
        ids[:] = NO_EXPERT
    gates = rng.random(ids.shape).astype(np.float32)
    weights = ExpertWeights.random(experts=8, hidden=32, intermediate=16, gated=gated)
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    out = moe_layer(hidden, *selections(ids, gates), weights, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), reference(hidden, ids, gates, weights), rtol=1e-4, atol=1e-5)


def random_placement(rng: np.random.Generator, devices: int = 4, dispatch: str = "even") -> Placement:
    extra = int(rng.integers(0, 3)) * devices
    rows = np.stack([rng.permutation(np.concatenate([np.arange(16), rng.integers(0, 16, extra)])) for _ in range(2)])
    return Placement(slots_LP=rows, slots_G=slots_per_device(16 + extra, devices), experts=16, layers=MODEL.moe_layers, dispatch=dispatch)


@given(seed=st.integers(0, 2**31), dispatch=st.sampled_from(DISPATCH_RULES), backend=st.sampled_from(["loop", "grouped"]))
def test_no_placement_or_replication_changes_an_output(seed: int, dispatch: str, backend: str) -> None:
    rng = np.random.default_rng(seed)
    placement = random_placement(rng, dispatch=dispatch)
    ids = clustered_routing(MODEL, 30, seed=seed % 1000)
    gates = rng.random(ids.shape).astype(np.float32)
    hidden = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    weights = ExpertWeights.random(experts=16, hidden=32, intermediate=24)
    parts = shares(placement, ids, gates, node_G=np.array([0, 0, 1, 1]))
    assert sum(len(part.slots_N) for part in parts) == ids.size
    for layer in range(2):
        whole = moe_layer(hidden, *selections(ids[:, layer], gates[:, layer]), weights)
        mine = [part for part in parts if part.layer == layer]
        outputs = [(part, run(part, hidden[part.received_R], weights.take(list(part.experts)), backend)) for part in mine]  # type: ignore[arg-type]
        same_output(outputs, whole)
        broken = [(part, run(part, hidden[part.received_R], weights.take([(e + 1) % 16 for e in part.experts]), "loop")) for part in mine]
        with pytest.raises(ValidationError, match="moved tokens to wrong experts"):
            same_output(broken, whole)


def plan_named(name: str, slots: np.ndarray) -> Plan:
    p = Placement(slots_LP=slots, slots_G=slots_per_device(16, 4), experts=16, layers=MODEL.moe_layers)
    return Plan(name=name, model="tiny", model_digest=MODEL.digest, placement=p)


def test_placements_are_ranked_as_measured(make_trace: Callable[..., Trace]) -> None:
    """Skewed routing, experts sorted by load: the plan that puts the hot ones together must be found slowest."""
    model = tiny_model(layers=2, experts=16, top_k=2, hidden=128, intermediate=128)
    rng = np.random.default_rng(0)
    weight = np.arange(1, 17) ** 2.0
    ids = np.stack([np.stack([rng.choice(16, 2, replace=False, p=weight / weight.sum()) for _ in range(2)]) for _ in range(800)])
    trace = make_trace(model, ids)
    together = np.tile(np.arange(16), (2, 1))
    spread = np.tile(np.array([0, 7, 8, 15, 1, 6, 9, 14, 2, 5, 10, 13, 3, 4, 11, 12]), (2, 1))
    middle = np.tile(np.array([0, 15, 14, 1, 2, 13, 3, 4, 5, 6, 12, 7, 8, 9, 10, 11]), (2, 1))
    plans = [
        Plan(name=name, model="tiny", model_digest=model.digest,
             placement=Placement(slots_LP=slots, slots_G=slots_per_device(16, 4), experts=16, layers=model.moe_layers))
        for name, slots in {"together": together, "spread": spread, "middle": middle}.items()
    ]  # fmt: skip
    found = validate(trace, plans, tokens=800, repeats=9)
    measured = {plan["name"]: plan["measured_s"] for plan in found["ranking"]["plans"]}
    assert measured["spread"] < measured["together"]
    assert found["ranking"]["plans"][0]["predicted_s"] == max(plan["predicted_s"] for plan in found["ranking"]["plans"])
    cases = found["cases"]
    apart = [(a, b) for a in cases for b in cases if a["measured_s"] > 1.4 * b["measured_s"]]  # beyond what a busy machine blurs
    assert len(apart) > 50
    assert np.mean([a["predicted_s"] > b["predicted_s"] for a, b in apart]) > 0.95
    assert found["summary"]["median_ape"] < 0.5
    assert found["checks"][0]["ok"]
    assert all(case["predicted_s"] > 0 for case in found["cases"])


def test_calibration_recovers_what_it_measured() -> None:
    found = calibrate("cpu", [(64, 64), (128, 64)], experts=4, top_k=2, most_tokens=512, loads=14, repeats=5)
    assert found.fit.residuals["median_ape"] < 0.4
    assert found.peak.flops > 1e9
    assert set(found.table["distribution"]) == {"counts"}
    assert found.to_dict()["measured_on"] == "28 random loads over 2 expert shapes"


def test_errors_and_ranking_are_what_they_say() -> None:
    found = errors([1.1, 0.9, 1.0, 2.0], [1, 1, 1, 1])
    assert found["median_ape"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx(0.25)
    assert found["worst"] == pytest.approx(1.0)
    good = ranking(["a", "b", "c"], [1, 2, 3], [10, 20, 30], noise=0.01)
    assert (good["spearman"], good["top1_regret"]) == (1.0, 0.0)
    bad = ranking(["a", "b", "c"], [3, 2, 1], [10, 20, 30], noise=0.01)
    assert bad["top1_regret"] == pytest.approx(2.0)
    assert "200.0% slower than the best" in bad["verdict"]
    assert "no ranking can be right or wrong" in ranking(["a", "b"], [1, 2], [1.0, 1.001], noise=0.01)["verdict"]
    assert "nothing to rank" in ranking(["a"], [1], [1], noise=0.0)["verdict"]


def test_a_device_that_is_not_there_is_said() -> None:
    with pytest.raises(InputError, match="use cpu or cuda"):
        check_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValidationError, match="torch sees no GPU"):
            check_device("cuda")
