"""What `moesim place` can be told: a live plan, rules, scenarios, counts instead of tokens; `compare` a transport."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model

from moesim.errors import PlanError
from moesim.hardware import load_cluster
from moesim.interop import Loads
from moesim.optimize import Capability, Problem, Status, run_solver, solver_infos
from moesim.plan import load_plan

MODEL = tiny_model(top_k=4, hidden=2048, intermediate=1408)
CLUSTER = load_cluster("h100x8")
IDS = clustered_routing(MODEL, 1500)
LOADS = Loads(
    load_LE=np.stack([np.bincount(IDS[:, layer].ravel(), minlength=16) for layer in range(3)]), layers=MODEL.moe_layers, tokens=1500, source="dump"
)


@pytest.fixture
def path(make_trace):
    return make_trace(MODEL, IDS, domain=np.where(np.arange(1500) % 3 == 0, "prose", "code")).path


@pytest.mark.parametrize("name", [info.name for info in solver_infos() if info.solves == "placement"])
def test_from_loads_alone_a_solver_gives_the_same_plan_or_says_that_it_needs_tokens(name, make_trace):
    problem = Problem.of_loads(LOADS, MODEL, CLUSTER, slots=16)
    found = run_solver(name, problem)
    if Capability.LOADS in next(info.capabilities for info in solver_infos() if info.name == name):
        assert found.placement == run_solver(name, Problem.of(make_trace(MODEL, IDS), CLUSTER)).placement
    else:
        assert found.status == Status.INFEASIBLE
        assert "only loads are known" in found.notes["reason"]
        assert "use one of eplb, greedy, linear" in found.notes["reason"]


def test_loads_of_another_model_are_refused():
    with pytest.raises(PlanError, match="3 layers x 16 experts, 'tiny' has 3 x 32"):
        Problem.of_loads(LOADS, tiny_model(experts=32), CLUSTER)


def test_loads_on_the_command_line(moesim, tmp_path):
    model = tmp_path / "config.json"
    model.write_text(json.dumps({
        "model_type": "qwen3_moe", "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
        "num_experts": 16, "num_experts_per_tok": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "head_dim": 16,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }))  # fmt: skip
    loads = Loads(load_LE=LOADS.load_LE, layers=(0, 1, 2), tokens=1500, source="dump").save(tmp_path / "loads.json")
    out = tmp_path / "plan.json"
    code, text, notes = moesim("place", loads, "--model", model, "--solver", "eplb", "-o", out)
    assert code == 0, notes
    assert "busiest/mean load" in text
    assert "only loads are known" in notes
    assert load_plan(out).placement.experts == 16
    code, _, notes = moesim("place", loads, "--model", model, "--solver", "local-search", "-o", tmp_path / "none.json")
    assert code == 1
    assert "needs the tokens themselves; use one of eplb" in notes
    assert moesim("place", loads, "--solver", "eplb", "-o", tmp_path / "none.json")[0] == 2
    assert not (tmp_path / "none.json").exists()


def test_the_live_plan_on_the_command_line(path, moesim, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert moesim("place", path, "--solver", "linear", "-o", first)[0] == 0
    code, text, _ = moesim("place", path, "--solver", "greedy", "--current", first, "--most-moves", 20, "--horizon-steps", 1e6, "-o", second)
    assert code == 0
    assert "decision: move" in text
    assert "pays off after" in text
    assert len(load_plan(first).placement.diff(load_plan(second).placement)) <= 20
    code, text, _ = moesim("place", path, "--solver", "greedy", "--current", first, "--horizon-steps", 1e-6, "-o", second, "--force")
    assert "do nothing" in text
    assert load_plan(second).placement == load_plan(first).placement
    assert moesim("place", path, "--most-moves", 3, "-o", tmp_path / "none.json")[0] == 2


def test_rules_on_the_command_line(path, moesim, tmp_path):
    rules, out = tmp_path / "rules.json", tmp_path / "plan.json"
    rules.write_text(json.dumps({"pinned": [{"experts": [3], "device": 6}], "apart": [{"experts": [0, 1, 2]}]}))
    assert moesim("place", path, "--solver", "greedy", "--rules", rules, "-o", out)[0] == 0
    assert load_plan(out).placement.holds_LGE[:, 6, 3].all()
    rules.write_text(json.dumps({"pinned": [{"experts": [3, 4, 5], "device": 6}]}))
    code, _, notes = moesim("place", path, "--solver", "greedy", "--rules", rules, "-o", tmp_path / "none.json")
    assert code == 1
    assert "every layer: 3 experts are pinned to device 6, which offers 2 slots" in notes
    assert not (tmp_path / "none.json").exists()


def test_robust_guards_the_dearest_scenarios(make_trace):
    """Two domains that like different experts: weight moves the plan towards one, a small tail towards the worse one."""
    name = np.random.default_rng(0).permutation(16).astype(np.uint16)
    ids = np.concatenate([IDS, name[clustered_routing(MODEL, 1500, seed=4)]])
    trace = make_trace(MODEL, ids, domain=np.repeat(["one", "two"], 1500))

    def notes(tail, **weights):
        return run_solver("robust", Problem.of(trace, CLUSTER, scenarios=weights, tail=tail)).notes

    even = notes(0.01, one=1.0, two=1.0)
    assert even["scenarios"] == ["one", "two"]
    assert even["chosen_s"]["tail"] == pytest.approx(even["chosen_s"]["worst"])
    assert even["chosen_s"]["tail"] <= even["given_weights_s"]["tail"]
    mean = notes(1.0, one=1.0, two=1.0)
    assert mean["chosen_s"]["tail"] == pytest.approx(mean["chosen_s"]["mean"])
    mostly = notes(1.0, one=50.0, two=1.0)["chosen_s"]
    assert mostly["each"][0] < even["chosen_s"]["each"][0]
    assert mostly["each"][1] > even["chosen_s"]["each"][1]


@pytest.mark.parametrize(
    ("values", "words"), [({"tail": 0.0}, "above 0"), ({"scenarios": {"prose": -1.0}}, "weight -1.0"), ({"tail": 1.5}, "at most 1")]
)
def test_wrong_scenarios_are_refused(make_trace, values, words):
    trace = make_trace(MODEL, IDS, domain=np.repeat("prose", 1500))
    with pytest.raises(PlanError, match=words):
        Problem.of(trace, CLUSTER, **values)


def test_scenarios_on_the_command_line(path, moesim, tmp_path):
    out = tmp_path / "plan.json"
    assert moesim("place", path, "--solver", "robust", "--scenario", "prose=2", "--scenario", "code", "--tail", 0.5, "-o", out)[0] == 0
    assert load_plan(out).solution["notes"]["scenarios"] == ["prose", "code"]
    code, _, notes = moesim("place", path, "--solver", "greedy", "--scenario", "prose", "-o", tmp_path / "none.json")
    assert code == 1
    assert "looks at all tokens as one; use one of robust" in notes
    assert moesim("place", path, "--solver", "robust", "--scenario", "prose=much", "-o", tmp_path / "none.json")[0] == 2


def test_compare_takes_a_transport(path, moesim):
    shown = [
        json.loads(moesim("compare", path, "--solver", "linear", "--transport", name, "--json")[1])["comparison"]
        for name in ("nccl", "deepep-low-latency")
    ]
    assert [section["transport"] for section in shown] == ["nccl", "deepep-low-latency"]
    times = [section["scored_on"][1]["plans"][0]["dispatch_s"] for section in shown]
    assert times[0] != times[1]
