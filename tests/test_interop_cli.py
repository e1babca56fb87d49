"""`moesim import`, `export` and `check` as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from test_interop_tokens import random_ids, write_sglang, write_tensorrt

from moesim.cli import export, import_
from moesim.interop import FORMATS
from moesim.plan import Placement, Plan, load_plan

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """4 layers, the first dense, 16 experts, top-2."""
    path = tmp_path / "config.json"
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4}
    moe = {"n_routed_experts": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    path.write_text(json.dumps({"model_type": "deepseek_v2"} | sizes | moe))
    return path


def test_help_names_every_format(moesim: Run) -> None:
    for form in FORMATS.values():
        assert form.name in import_.FORMATS
        if form.engine:
            assert form.name in str(export.run.__annotations__["format"])
    for verb in ("import", "export", "check"):
        assert moesim(verb, "--help")[0] == 0


def test_from_an_engine_and_back(moesim: Run, tmp_path: Path, config: Path) -> None:
    (tmp_path / "dumps").mkdir()
    write_sglang(tmp_path / "dumps", random_ids(0, 40))
    code, out, err = moesim("import", "sglang-recorder", tmp_path / "dumps", "-o", tmp_path / "trace", "--model", config, "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert (shown["tokens"], shown["selections"]) == (40, 240)
    code, out, err = moesim("import", "sglang-recorder", tmp_path / "dumps", "-o", tmp_path / "loads.json", "--model", config, "--as-loads")
    assert code == 0, err
    assert "240 counts, 3 MoE layers x 16 experts" in out
    model = tiny_model()
    slots = np.stack([np.concatenate([np.random.default_rng(layer).permutation(16), [0, 1]]) for layer in range(3)])
    from moesim.model import load_model

    real = load_model(config)
    placement = Placement(slots_LP=slots.astype(np.int32), slots_G=np.asarray([9, 9]), experts=16, layers=model.moe_layers)
    plan = Plan(name="mine", model=real.name, model_digest=real.digest, placement=placement)
    plan.save(tmp_path / "plan.json")
    code, out, err = moesim("export", "sglang", tmp_path / "plan.json", "-o", tmp_path / "p.json", "--model", config)
    assert code == 0, err
    assert "--ep-size 2 --ep-num-redundant-experts 2 --ep-dispatch-algorithm dynamic" in out
    code, out, _ = moesim("check", "sglang", tmp_path / "p.json", "--model", config, "--redundant", "2", "--trace", tmp_path / "loads.json", "--json")
    assert json.loads(out)["failed"] == (code == 1)
    code, out, _ = moesim("check", "sglang", tmp_path / "p.json", "--model", config, "--redundant", "3")
    assert code == 1
    assert "launch with R = 2" in out
    code, out, err = moesim("import", "sglang", tmp_path / "p.json", "-o", tmp_path / "back.json")
    assert code == 0, err
    assert load_plan(tmp_path / "back.json").digest == plan.digest
    code, out, err = moesim("export", "sglang", tmp_path / "loads.json", "-o", tmp_path / "counts.json", "--model", config)
    assert code == 0, err
    assert len(json.loads((tmp_path / "counts.json").read_text())["logical_count"]) == 4
    code, out, err = moesim("check", "sglang", tmp_path / "counts.json", "--model", config)
    assert (code, "no tokens" in out) == (0, True)


def test_trace_against_placement(moesim: Run, tmp_path: Path, config: Path) -> None:
    (tmp_path / "stat").mkdir()
    write_tensorrt(tmp_path / "stat", random_ids(1, 60))
    assert moesim("import", "tensorrt-llm-statistics", tmp_path / "stat", "-o", tmp_path / "t", "--model", config)[0] == 0
    (tmp_path / "b.yaml").write_text(
        "initial_global_assignments:\n" + "".join(f"  {layer}: {list(range(15, -1, -1))}\n" for layer in (1, 2, 3)) + "num_slots: 16\n"
    )
    code, out, _ = moesim("check", "tensorrt-llm", tmp_path / "b.yaml", "--model", config, "--devices", "4", "--trace", tmp_path / "t", "--json")
    found = {finding["check"]: finding for finding in json.loads(out)["findings"]}
    assert "busiest over mean device" in found["traffic"]["message"]
    assert code == (found["traffic"]["level"] == "fail")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "llama-cpp", "c.csv", "-o", "t"), "Add --as-loads"),
        (("import", "npz", "c.csv", "-o", "l.json", "--as-loads"), "cannot be imported as loads; formats: sglang-recorder"),
        (("import", "sglang", "c.csv", "-o", "p.json"), "not valid JSON"),
        (("export", "npz", "plan.json", "-o", "p.json"), "cannot be exported; formats: sglang"),
        (("export", "sglang", "missing.json", "-o", "p.json"), "no such file"),
        (("check", "excel", "c.csv"), "formats: npz"),
        (("check", "tensorrt-llm", "c.csv"), "is not of the form"),
    ],
)
def test_bad_input_is_exit_code_2(moesim: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.csv").write_text("layer,expert,count\n0,1,2\n")
    model = tiny_model()
    placement = Placement(slots_LP=np.tile(np.arange(16), (3, 1)).astype(np.int32), slots_G=np.asarray([8, 8]), experts=16, layers=model.moe_layers)
    Plan(name="x", model=model.name, model_digest=model.digest, placement=placement).save(tmp_path / "plan.json")
    before = sorted(tmp_path.iterdir())
    code, out, err = moesim(*arguments)
    assert (code, message in err) == (2, True), (code, out, err)
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
