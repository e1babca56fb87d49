"""check: each trap has a file that falls into it, a finding that names the figures and a remedy; a good file has none."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_interop_placements import ENGINES, MODEL, a_plan

from moesim.cost.traffic import dispatch_table
from moesim.hardware import load_cluster
from moesim.interop import Finding, Wanted, check, engine, export_plan
from moesim.interop.balance import imbalance_L
from moesim.interop.check import lost_kv_tokens, nearest
from moesim.model import Attention, ModelSpec, load_model
from moesim.plan import Placement


def failed(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: str(finding) for finding in findings if finding.level == "fail"}


def warned(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: str(finding) for finding in findings if finding.level == "warn"}


@given(seed=st.integers(0, 999), rule=st.sampled_from(["even", "static-source"]), shape=st.sampled_from([(2, 6), (4, 3), (8, 2), (4, 4)]))
def test_balance_is_that_of_the_dispatch_table(seed: int, rule: str, shape: tuple[int, int]) -> None:
    """Tokens that start evenly on all devices, each expert's split over the candidate slots that the cost model uses."""
    placement = a_plan(seed, devices=shape[0], per=shape[1], dispatch=rule).placement
    load = np.random.default_rng(seed).integers(0, 50, (3, 8))
    table = dispatch_table(placement, np.zeros(shape[0], np.int32))
    device_LG = np.zeros((3, shape[0]))
    for layer in range(3):
        for source in range(shape[0]):
            for expert in range(8):
                at = min(source, table.start_LGE.shape[1] - 1)
                start, count = table.start_LGE[layer, at, expert], table.count_LGE[layer, at, expert]
                for slot in table.slots[start : start + count]:
                    device_LG[layer, placement.device_P[slot]] += load[layer, expert] / shape[0] / count
    mean = device_LG.mean(axis=1)
    assert np.allclose(imbalance_L(placement, load), np.where(mean > 0, device_LG.max(axis=1) / np.where(mean > 0, mean, 1), 1))


def test_redundant_experts_cost_the_kv_cache_what_was_published() -> None:
    """Qwen3-235B-A22B on 8 GPUs with 16 redundant experts: 7.1 GB more per GPU, KV pool 297K -> 149K tokens (sjqsjq/EPLB@b4c9ffa)."""
    model = ModelSpec(
        name="qwen3-235b", layers=94, moe_layers=tuple(range(94)), hidden=4096, intermediate=1536, experts=128, top_k=8,
        attention=Attention(heads=64, kv_heads=4, head_dim=128),
    )  # fmt: skip
    extra_B = 16 / 8 * 94 * model.expert_B
    assert extra_B == pytest.approx(7.1e9, rel=0.01)
    assert lost_kv_tokens(model, extra_B, 8) == pytest.approx(297e3 - 149e3, rel=0.02)


@pytest.mark.parametrize("name", ENGINES)
def test_what_we_export_passes(tmp_path: Path, name: str) -> None:
    plan = a_plan(3, devices=8, per=2, dispatch=engine(name, "exported").default or "even")
    export_plan(name, plan, tmp_path / "p.json", model=MODEL)
    found = check(name, tmp_path / "p.json", Wanted(model=MODEL, cluster=load_cluster("h100x8"), redundant=8))
    assert failed(found) == {}
    assert {"coverage", "divide", "layers", "origin", "redundant", "memory"} <= {f.check for f in found if f.level == "ok"}
    assert all(f.remedy for f in found if f.level in ("warn", "fail"))


def sglang_file(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps({"physical_to_logical_map": np.asarray(rows).tolist()}))
    return path


def test_each_trap_of_a_placement(tmp_path: Path) -> None:
    one = tiny_model(layers=2, experts=8)
    identity = np.tile(np.arange(8), (3, 1))
    cases: list[tuple[Any, dict[str, Any], str, str]] = [
        (identity, {"devices": 3}, "divide", r"8 slots \(8 experts \+ R = 0\) do not divide over 3 ranks; use R = 1"),
        (np.where(identity == 5, 4, identity), {}, "coverage", r"layer 1: experts \[5\] have no slot \(2 of 2 layers"),
        (np.where(identity == 5, 9, identity), {}, "ids", r"layer 1, slot 5: expert 9 is outside 0..7"),
        (np.tile(np.random.default_rng(0).permutation(12), (3, 1)), {}, "ids", "these are physical slots, not logical experts.*apply it once"),
        (identity[:2], {}, "layers", r"holds rows \[0, 1\], expected one row per decoder layer, dense ones included: 0..2; missing \[2\]"),
        (identity, {"redundant": 4}, "redundant", r"flags say R = 4, so 12 slots; the file holds 8, so R = 0; launch with R = 0"),
        (identity, {"load_LE": np.ones((2, 9), int)}, "traffic", r"\[2, 9\] layers and experts, the file \[2, 8\]"),
    ]
    for rows, wanted, what, message in cases:
        found = failed(check("sglang", sglang_file(tmp_path / "x.json", rows), Wanted(model=one, **({"devices": 4} | wanted))))
        assert what in found, (what, found)
        assert re.search(message, found[what]), found[what]
    ragged = {"physical_to_logical_map": [[0, 1, 2], [0, 1, 2], [0, 1, 2, 2]]}
    (tmp_path / "r.json").write_text(json.dumps(ragged))
    assert "layer 2 does not have 3 slots" in failed(check("sglang", tmp_path / "r.json", Wanted(devices=1)))["slots"]
    twice = np.concatenate([identity, identity[:, :1], identity[:, 3:4], identity[:, :1], identity[:, 3:4]], axis=1)
    found = check("sglang", sglang_file(tmp_path / "d.json", twice), Wanted(model=one, devices=2))
    assert failed(found) == {}
    assert "rank 1 holds expert 0 more than once" in warned(found)["doubles"]
    assert any("no sidecar" in f.message for f in found if f.check == "origin")
    assert any("no row for a draft layer 3" in f.message for f in found)


@given(slots=st.integers(1, 600), ranks=st.integers(1, 64), experts=st.integers(1, 512))
def test_the_nearest_counts_that_work_do_work(slots: int, ranks: int, experts: int) -> None:
    for number in nearest(slots, ranks, experts):
        assert number % ranks == 0
        assert number >= experts
        assert abs(number - slots) <= ranks


def test_what_hierarchical_eplb_asserts(tmp_path: Path) -> None:
    cluster, model = load_cluster("h100-4x8"), replace(tiny_model(layers=1, experts=60), expert_groups=6)
    file = sglang_file(tmp_path / "h.json", np.tile(np.arange(64) % 60, (2, 1)))
    found = [f.message for f in check("sglang", file, Wanted(model=model, cluster=cluster)) if f.check == "divide" and f.level == "warn"]
    assert found == ["6 expert groups do not divide over 4 nodes: hierarchical EPLB refuses"]


def test_a_foreign_or_changed_plan(tmp_path: Path) -> None:
    export_plan("tensorrt-llm", a_plan(), tmp_path / "p.yaml", model=MODEL)
    other = tiny_model(layers=3, experts=8)
    found = failed(check("tensorrt-llm", tmp_path / "p.yaml", Wanted(model=other, cluster=load_cluster("h100x8"))))
    assert "made for 4 devices, to be run on 8" in found["origin"]
    assert "missing [2]" in found["layers"]
    found = failed(check("tensorrt-llm", tmp_path / "p.yaml", Wanted(model=other)))
    assert "made for 'gappy' (3 MoE layers x 8 experts" in found["origin"]
    text = (tmp_path / "p.yaml").read_text()
    (tmp_path / "p.yaml").write_text(text.replace("layer_updates_per_iter: 0", "layer_updates_per_iter: 2"))
    found_all = check("tensorrt-llm", tmp_path / "p.yaml", Wanted(model=MODEL))
    assert "was changed after it was exported" in failed(found_all)["sidecar"]
    assert "the engine replaces this placement" in warned(found_all)["static"]
    assert any("silently" in f.message for f in found_all if f.level == "remark")


def test_the_rule_the_engine_runs(tmp_path: Path) -> None:
    export_plan("sglang", a_plan(), tmp_path / "p.json", model=MODEL)
    found = warned(check("sglang", tmp_path / "p.json", Wanted(model=MODEL)))
    assert "scored under 'even', sglang runs 'static-source' unless told otherwise" in found["dispatch"]
    assert "--ep-dispatch-algorithm dynamic" in found["dispatch"]
    assert "dispatch" not in warned(check("sglang", tmp_path / "p.json", Wanted(model=MODEL, dispatch="even")))
    assert "dispatch" in failed(check("sglang", tmp_path / "p.json", Wanted(model=MODEL, dispatch="static-source")))
    assert "has no rule 'nearest'" in failed(check("sglang", tmp_path / "p.json", Wanted(model=MODEL, dispatch="nearest")))["dispatch"]


def test_a_stale_map_shows_on_the_traffic_it_will_meet(tmp_path: Path) -> None:
    """A plan that spreads yesterday's hot experts is worse than no plan when today's hot experts are others."""
    model = tiny_model(layers=2, experts=8)
    hot, cold = np.asarray([90, 90, 1, 1, 1, 1, 1, 1]), np.asarray([90, 1, 90, 1, 1, 1, 1, 1])
    row = np.asarray([0, 2, 4, 6, 1, 3, 5, 7])  # experts 0 and 1 apart, 0 and 2 together
    placement = Placement(slots_LP=np.tile(row, (2, 1)).astype(np.int32), slots_G=np.asarray([2, 2, 2, 2]), experts=8, layers=model.moe_layers)
    file = sglang_file(tmp_path / "p.json", np.concatenate([np.arange(8)[None], placement.slots_LP]))
    today, stale = (check("sglang", file, Wanted(model=model, devices=4, load_LE=np.stack([load] * 2))) for load in (hot, cold))
    assert "traffic" not in failed(today)
    assert "made from other traffic" in failed(stale)["traffic"]
    start = check(
        "sglang", sglang_file(tmp_path / "i.json", np.tile(np.arange(8), (3, 1))), Wanted(model=model, devices=4, load_LE=np.stack([hot] * 2))
    )
    assert failed(start) == {}


def test_memory_of_the_real_model(tmp_path: Path) -> None:
    """The routed experts of DeepSeek-V3 are 653 GB in 8 bits: tight on 8 x 80 GiB, impossible there in 16 bits."""
    model, h100 = load_model("deepseek-v3"), load_cluster("h100x8")
    assert 256 * len(model.moe_layers) * 3 * 7168 * 2048 == pytest.approx(653e9, rel=0.002)
    eight, sixteen = replace(model, weight_bits=8), replace(model, weight_bits=16)
    file = sglang_file(tmp_path / "v3.json", np.tile(np.arange(256), (model.layers, 1)))
    assert "experts take 76.1 of 80.0 GiB per device" in warned(check("sglang", file, Wanted(model=eight, cluster=h100)))["memory"]
    assert "experts take 152.2 of 80.0 GiB per device" in failed(check("sglang", file, Wanted(model=sixteen, cluster=h100)))["memory"]
    assert failed(check("sglang", file, Wanted(model=sixteen, cluster=load_cluster("h100-4x8")))) == {}
    broad = sglang_file(tmp_path / "r.json", np.tile(np.arange(288) % 256, (model.layers, 1)))
    text = " ".join(str(f) for f in check("sglang", broad, Wanted(model=eight, cluster=load_cluster("h100-4x8"))))
    assert "32 redundant slots take 2.38 GiB per device" in text
    assert "KV tokens fewer" in text


def test_eplb_tensors_that_are_not_inverse(tmp_path: Path) -> None:
    export_plan("eplb", a_plan(), tmp_path / "e.npz", model=MODEL)
    with np.load(tmp_path / "e.npz") as arrays:
        tensors = {key: arrays[key] for key in arrays.files}
    (tmp_path / "e.npz.moesim.json").unlink()
    np.savez(tmp_path / "e.npz", **{**tensors, "log2phy": tensors["log2phy"][:, ::-1]})
    assert "log2phy is not the inverse of phy2log" in failed(check("eplb", tmp_path / "e.npz", Wanted(model=MODEL, devices=4)))["mapping"]


def test_captures(tmp_path: Path) -> None:
    model = tiny_model()
    ids = clustered_routing(model, 300).astype(np.int16)
    good = check("vllm-routed-experts", _saved(tmp_path / "g.npy", ids), Wanted(model=model))
    assert failed(good) == warned(good) == {}
    dummy = np.concatenate([ids[:50], np.repeat(ids[:1], 200, axis=0)])
    assert (
        "80% of tokens are routed exactly like"
        in failed(check("vllm-routed-experts", _saved(tmp_path / "d.npy", dummy), Wanted(model=model)))["padding"]
    )
    padded = np.concatenate([ids[:50], np.full((200, 3, 2), -1, np.int16)])
    assert "80% of rows are empty" in failed(check("vllm-routed-experts", _saved(tmp_path / "p.npy", padded), Wanted(model=model)))["padding"]
    physical = check("vllm-routed-experts", _saved(tmp_path / "x.npy", ids + 4), Wanted(model=model))
    assert "often physical slots" in failed(physical)["fits"]
    doubled = np.concatenate([ids[:, :, :1]] * 2, axis=2)
    assert "names one expert twice" in warned(check("vllm-routed-experts", _saved(tmp_path / "2.npy", doubled), Wanted(model=model)))["ids"]
    (tmp_path / "c.csv").write_text("layer,expert,count\n1,0,3\n2,0,3\n3,15,3\n")
    counted = check("llama-cpp", tmp_path / "c.csv", Wanted(model=model))
    assert failed(counted) == {}
    assert "9 counts over 3 MoE layers x 16 experts, no tokens" in warned(counted)["mode"]
    (tmp_path / "c.csv").write_text("layer,expert,count\n1,0,3\n2,0,3\n")
    assert "missing [3]" in failed(check("llama-cpp", tmp_path / "c.csv", Wanted(model=model)))["fits"]


def _saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path
