"""Plans out to engines' files and back: `import(export(plan)) == plan`, and refusals where a file would mean something else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import OutputExists, PlanError
from moesim.interop import FORMATS, engine, export_loads, export_plan, import_loads, import_plan
from moesim.interop.loads import Loads
from moesim.model import ModelSpec
from moesim.plan import Placement, Plan

ENGINES = [name for name, form in FORMATS.items() if form.engine]
MODEL = ModelSpec(name="gappy", layers=7, moe_layers=(1, 3, 4), hidden=8, intermediate=8, experts=8, top_k=2)


def a_plan(seed: int = 0, *, devices: int = 4, per: int = 3, dispatch: str = "even", model: ModelSpec = MODEL) -> Plan:
    rng = np.random.default_rng(seed)
    slots = devices * per
    rows = [
        rng.permutation(np.concatenate([np.arange(model.experts), rng.integers(0, model.experts, slots - model.experts)])) for _ in model.moe_layers
    ]
    placement = Placement(
        slots_LP=np.stack(rows).astype(np.int32),
        slots_G=np.full(devices, per, np.int32),
        experts=model.experts,
        layers=model.moe_layers,
        dispatch=dispatch,
    )
    origin = {"trace": "0123456789abcdef (all tokens)", "seed": seed, "nested": {"a": [1, 2.5, None]}}
    return Plan(name=f"plan {seed}", model=model.name, model_digest=model.digest, placement=placement, made_from=origin, solution={"gap": None})


def same(left: Plan, right: Plan) -> bool:
    names = ("name", "model", "model_digest", "made_from", "solution", "placement", "digest")
    return all(getattr(left, name) == getattr(right, name) for name in names)


@settings(max_examples=150)
@given(
    name=st.sampled_from(ENGINES),
    seed=st.integers(0, 999),
    shape=st.sampled_from([(1, 8), (2, 4), (2, 6), (4, 3), (8, 1), (8, 2), (12, 1)]),
    rule=st.sampled_from(["even", "static-source", "nearest"]),
    draft=st.integers(0, 2),
    with_model=st.booleans(),
)
def test_round_trip(name: str, seed: int, shape: tuple[int, int], rule: str, draft: int, with_model: bool) -> None:
    plan = a_plan(seed, devices=shape[0], per=shape[1], dispatch=rule)
    replicas = bool((plan.placement.replicas_LE > 1).any())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "placement.json"
        if replicas and rule not in engine(name, "exported").rules:
            with pytest.raises(PlanError, match=f"taken by rule '{rule}'.*plan again with --dispatch"):
                export_plan(name, plan, file, model=MODEL)
            assert not list(Path(folder).iterdir())
            return
        export_plan(name, plan, file, model=MODEL if with_model else None, draft_layers=draft)
        again, _ = import_plan(name, file)
        assert same(again, plan)
        export_plan(name, again, Path(folder) / "second.json", model=MODEL if with_model else None, draft_layers=draft)
        if name != "eplb":  # an archive carries the time it was packed
            assert (Path(folder) / "second.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ENGINES)
def test_a_file_without_its_sidecar_needs_to_be_told(tmp_path: Path, name: str) -> None:
    file, rule = tmp_path / "p.json", engine(name, "exported").default or "even"
    plan = a_plan(dispatch=rule)
    export_plan(name, plan, file, model=MODEL, draft_layers=1)
    (tmp_path / "p.json.moesim.json").unlink()
    with pytest.raises(PlanError, match="give --model"):
        import_plan(name, file, devices=4)
    if name != "vllm-ascend":
        with pytest.raises(PlanError, match="give --devices"):
            import_plan(name, file, model=MODEL)
    again, notes = import_plan(name, file, model=MODEL, devices=4)
    assert again.placement == plan.placement
    assert any("draft layers" in note for note in notes) == engine(name, "exported").draft


def test_documented_files(tmp_path: Path) -> None:
    two = tiny_model(layers=2, experts=8)
    files: dict[str, tuple[str, int, list[list[int]]]] = {
        "sglang": ('{"physical_to_logical_map": [[0,1,2,3,4,5,6,7], [5, 6, 1, 7, 0, 2, 3, 4], [7, 2, 4, 0, 6, 1, 3, 5]]}', 2,
                   [[5, 6, 1, 7, 0, 2, 3, 4], [7, 2, 4, 0, 6, 1, 3, 5]]),
        "tensorrt-llm": ("initial_global_assignments:\n  1: [5, 6, 1, 7,\n    0, 2, 3, 4]\n  2:\n  - 7\n  - 2\n  - 4\n"
                         "  - 0\n  - 6\n  - 1\n  - 3\n  - 5\n"
                         "num_slots: 8  # one each\nlayer_updates_per_iter: 0\n", 2, [[5, 6, 1, 7, 0, 2, 3, 4], [7, 2, 4, 0, 6, 1, 3, 5]]),
        "vllm-experimental": ('{"record_type":"eplb_initial_mapping","version":1,"num_redundant_experts":0,"num_slots":8,'
                              '"initial_global_assignments":{"0":[5,6,1,7,0,2,3,4],"1":[7,2,4,0,6,1,3,5]}}\n', 2,
                              [[5, 6, 1, 7, 0, 2, 3, 4], [7, 2, 4, 0, 6, 1, 3, 5]]),
    }  # fmt: skip
    for name, (text, devices, rows) in files.items():
        (tmp_path / name).write_text(text)
        plan, _ = import_plan(name, tmp_path / name, model=two, devices=devices)
        assert plan.placement.slots_LP.tolist() == rows
        assert plan.placement.layers == (1, 2)
    import torch

    torch.save({"physical_to_logical_map": torch.tensor([list(range(8)), *rows])}, tmp_path / "s.pt")
    assert import_plan("sglang", tmp_path / "s.pt", model=two, devices=2)[0].placement.slots_LP.tolist() == rows
    one = tiny_model(layers=1, experts=8)
    (tmp_path / "ascend.json").write_text(
        '{"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": ['
        '{"device_id": 0, "device_expert": [7, 2, 0, 3, 5]},{"device_id": 1, "device_expert": [6, 1, 4, 7, 2]}]}]}'
    )
    plan, _ = import_plan("vllm-ascend", tmp_path / "ascend.json", model=one)
    assert plan.placement.slots_LP.tolist() == [[7, 2, 0, 3, 5, 6, 1, 4, 7, 2]]
    assert plan.placement.slots_G.tolist() == [5, 5]
    assert plan.placement.dispatch == "static-source"


def test_what_engines_are_told(tmp_path: Path) -> None:
    """Dense rows hold the default map, R and the dispatch flag agree with the file, experimental says so."""
    plan = a_plan(dispatch="static-source")
    done = export_plan("sglang", plan, tmp_path / "s.json", model=MODEL, draft_layers=1)
    rows = json.loads((tmp_path / "s.json").read_text())
    assert list(rows) == ["physical_to_logical_map"]
    rows = rows["physical_to_logical_map"]
    assert len(rows) == MODEL.layers + 1
    assert rows[0] == rows[2] == rows[7] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert rows[3] == plan.placement.slots_LP[1].tolist()
    assert f"--init-expert-location {tmp_path / 's.json'} --ep-size 4 --ep-num-redundant-experts 4 --ep-dispatch-algorithm static" in done.launch[0]
    even = a_plan()
    assert "--ep-dispatch-algorithm dynamic" in export_plan("sglang", even, tmp_path / "d.json", model=MODEL).launch[0]
    done = export_plan("vllm-experimental", even, tmp_path / "v.jsonl")
    assert "41141" in " ".join(done.notes)
    assert '"num_redundant_experts": 4' in done.launch[0]
    export_plan("tensorrt-llm", even, tmp_path / "t.yaml")
    text = (tmp_path / "t.yaml").read_text()
    assert text.startswith(f"initial_global_assignments:\n  1: {even.placement.slots_LP[0].tolist()}\n  3: ")
    assert text.endswith("num_slots: 12\nlayer_updates_per_iter: 0\n")
    export_plan("eplb", even, tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as arrays:
        slots, back, count = (arrays[key] for key in ("phy2log", "log2phy", "logcnt"))
    for layer in range(3):
        for expert in range(8):
            assert back[layer, expert, : count[layer, expert]].tolist() == np.flatnonzero(slots[layer] == expert).tolist()
            assert (back[layer, expert, count[layer, expert] :] == -1).all()


def test_refusals(tmp_path: Path) -> None:
    uneven = Placement(slots_LP=np.tile(np.arange(8), (3, 1)).astype(np.int32), slots_G=np.asarray([5, 3]), experts=8, layers=MODEL.moe_layers)
    plan = Plan(name="uneven", model=MODEL.name, model_digest=MODEL.digest, placement=uneven)
    for name in ENGINES:
        with pytest.raises(PlanError, match=r"devices own \[5, 3\] slots"):
            export_plan(name, plan, tmp_path / "u.json")
    good = a_plan()
    file = tmp_path / "p.json"
    export_plan("sglang", good, file, model=MODEL)
    with pytest.raises(OutputExists):
        export_plan("sglang", good, file, model=MODEL)
    with pytest.raises(PlanError, match="ends in .json"):
        export_plan("sglang", good, tmp_path / "p.yaml", model=MODEL)
    with pytest.raises(PlanError, match="made for 'gappy'"):
        export_plan("sglang", good, tmp_path / "q.json", model=tiny_model())
    with pytest.raises(PlanError, match="made for 'gappy', not for 'tiny'"):
        import_plan("sglang", file, model=tiny_model())
    with pytest.raises(PlanError, match="under dispatch rule 'even', not 'static-source'"):
        import_plan("sglang", file, dispatch="static-source")
    with pytest.raises(PlanError, match=r"devices are said to be \[3, 4\]"):
        import_plan("sglang", file, devices=3)
    export_plan("vllm-experimental", good, tmp_path / "other.json")
    (tmp_path / "other.json.moesim.json").write_text((tmp_path / "p.json.moesim.json").read_text())
    with pytest.raises(PlanError, match="describes a file of format 'sglang'"):
        import_plan("vllm-experimental", tmp_path / "other.json")
    file.write_text(file.read_text().replace("[", "[ ", 1))
    with pytest.raises(PlanError, match="was changed after it was exported"):
        import_plan("sglang", file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sglang", '{"physical_to_logical_map": [[0, 1]], "extra": 1}', "unknown keys"),
        ("sglang", '{"physical_to_logical_map": [[0, 1.5]]}', "expected an expert id, got '1.5'"),
        ("sglang", '{"physical_to_logical_map": [[]]}', "expected a list of 1 to"),
        ("tensorrt-llm", 'initial_global_assignments:\n  "3": [0]\nnum_slots: 1\n', "plain integer, not a string"),
        ("tensorrt-llm", "initial_global_assignments:\n  3: [0]\n  3: [0]\nnum_slots: 1\n", "there twice"),
        ("tensorrt-llm", "initial_global_assignments:\n  3: [0, 1\nnum_slots: 2\n", "expected a whole number|cut short|expected a list"),
        ("tensorrt-llm", "initial_global_assignments: !!python/object/apply:os.system ['true']\nnum_slots: 1\n", "one line per layer"),
        ("tensorrt-llm", "initial_global_assignments:\n  3: !!python/object/apply:os.system ['true']\nnum_slots: 1\n", "expected a list in brackets"),
        ("tensorrt-llm", "initial_global_assignments:\n  3: [0, 1]\nnum_slots: 3\n", "layer 3 lists 2 slots, num_slots is 3"),
        ("tensorrt-llm", "initial_global_assignments:\n  3: [0]\nnum_slots: 1\nsurprise: 2\n", "unknown key 'surprise'"),
        ("vllm-experimental", '{"record_type":"eplb_initial_mapping","version":2}', "version 2"),
        ("vllm-experimental", '{"record_type":"other","version":1}', "holds 0 records"),
        ("vllm-ascend", '{"moe_layer_count": 1, "layer_list": []}', "non-empty list"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        import_plan(name, tmp_path / "f.json", model=MODEL, devices=1)


@pytest.mark.parametrize("name", ["sglang", "eplb"])
def test_loads_out_and_in(tmp_path: Path, name: str) -> None:
    load: Any = np.random.default_rng(0).integers(1, 99, (3, 8))
    loads = Loads(load_LE=load, layers=MODEL.moe_layers, tokens=None, source="test")
    export_loads(name, loads, tmp_path / "l.json", model=MODEL)
    again = import_loads(name, tmp_path / "l.json", model=MODEL)
    assert np.array_equal(again.load_LE, load)
    assert again.layers == MODEL.moe_layers
    if name == "sglang":
        assert len(json.loads((tmp_path / "l.json").read_text())["logical_count"]) == MODEL.layers
