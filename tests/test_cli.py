"""The command line: what a user types, what they get, and what bad input does (message, exit code 2, nothing overwritten)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model

from moesim.trace import Trace


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """DeepSeek-V2-Lite shaped routing: 26 layers x top-6 of 64."""
    rng = np.random.default_rng(0)
    score = rng.random((300, 26, 64)) + 0.4 * (rng.random((26, 64)) > 0.7)
    ids = np.argsort(-score, axis=2)[:, :, :6].astype(np.uint8)
    np.savez(tmp_path / "routing.npz", ids=ids, weights=rng.random(ids.shape).astype(np.float16), seqlens=np.array([100, 200], np.int32))
    return tmp_path / "routing.npz"


Run = Callable[..., tuple[int, str, str]]


def test_the_main_job_by_hand(moesim: Run, npz: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    assert moesim("import", "npz", npz, "-o", trace, "--model", "deepseek-v2-lite", "--domain", "law")[0] == 0
    code, out, _ = moesim("inspect", trace, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 300
    plans = []
    for solver in ("linear", "eplb", "local-search"):
        plan = tmp_path / f"{solver}.json"
        code, out, err = moesim(
            "place", trace, "--tokens", "0%:50%", "--cluster", "h100x8", "--solver", solver, "-o", plan, "--json", "--time-limit", "2"
        )
        assert code == 0, err
        assert json.loads(out)["plan"] == str(plan)
        plans.append(plan)
    code, out, _ = moesim("score", trace, *plans, "--cluster", "h100x8", "--tokens", "50%:", "--json")
    scored = json.loads(out)
    assert code == 0
    assert [row["name"] for row in scored["plans"]] == ["linear", "eplb", "local-search"]
    for row in scored["plans"]:
        assert {"max_load_ratio", "fanout_devices", "fanout_nodes", "a2a_bytes", "layer_time_s"} <= set(row)
        assert row["max_load_ratio"] >= 1
        assert 1 <= row["fanout_devices"] <= 6
    assert scored["tokens"] == 150
    code, out, _ = moesim("simulate", trace, plans[0], "--cluster", "h100x8", "-o", tmp_path / "result.json")
    assert code == 0
    assert "busiest/mean" in out
    code, out, _ = moesim("report", tmp_path / "result.json", "-o", tmp_path / "report.html")
    assert code == 0
    assert (tmp_path / "report.html").read_text().lower().startswith("<!doctype html>")
    code, out, _ = moesim("score", trace, *plans, "--cluster", "h100x8")
    assert "local-search" in out


@pytest.mark.parametrize("verb", ["solvers", "profiles", "models"])
def test_lists_are_read_by_people_and_programs(moesim: Run, verb: str) -> None:
    code, out, _ = moesim(verb)
    assert code == 0
    assert out
    code, out, _ = moesim(verb, "--json")
    assert json.loads(out)["schema_version"] == 1


@pytest.mark.parametrize("name", ["h100-sxm", "h100-4x8"])
def test_a_profile_shows_its_sources(moesim: Run, name: str) -> None:
    code, out, _ = moesim("profiles", name)
    assert code == 0
    assert "datasheet" in out
    assert json.loads(moesim("profiles", name, "--json")[1])


def test_infeasible_is_said_and_nothing_written(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    code, _, err = moesim("place", trace.path, "--cluster", "h100x8", "--slots", "8", "--solver", "linear", "-o", tmp_path / "p.json")
    assert code == 1
    assert "8 slots cannot hold 16 experts" in err
    assert not (tmp_path / "p.json").exists()


def plan_of(moesim: Run, trace: Trace, path: Path, cluster: str = "h100x8") -> Path:
    assert moesim("place", trace.path, "--cluster", cluster, "--solver", "linear", "-o", path)[0] == 0
    return path


def test_bad_input_is_named_with_exit_code_2(moesim: Run, trace: Trace, tmp_path: Path, make_trace: Callable[..., Trace], npz: Path) -> None:
    plan = plan_of(moesim, trace, tmp_path / "plan.json")
    before = plan.read_bytes()
    other = tiny_model(layers=2, experts=8)
    foreign = make_trace(other, clustered_routing(other, 50))
    truncated = make_trace(tiny_model(), clustered_routing(tiny_model(), 50))
    truncated.parts[0].write_bytes(truncated.parts[0].read_bytes()[:-40])
    bad_profile = tmp_path / "bad.toml"
    bad_profile.write_text('name = "x"\ntitle = "y"\nwheels = 4\n[[nodes]]\ndevice = "h100-sxm"\ndevices = -8\nlink = "nvlink4"\n')
    bad_device = tmp_path / "device.toml"
    bad_device.write_text(
        'name = "d"\ntitle = "d"\nkind = "gpu"\ncolour = "red"\n'
        '[compute]\nsource = "nowhere"\nconfidence = "assumed"\nflops = { bf16 = "1 TFLOP/s" }\n'
        '[[memories]]\nname = "hbm"\ncapacity = "80 GiB"\nbandwidth = "-3 TB/s"\nsource = "nowhere"\nconfidence = "assumed"\n'
    )
    score = ("score", trace.path, plan, "--cluster")
    cases: dict[str, tuple[Any, ...]] = {
        "not a complete Parquet file": ("inspect", truncated.path),
        "no such file": ("inspect", tmp_path / "nothing"),
        "--force": ("place", trace.path, "--solver", "linear", "-o", plan),
        "installed: ": ("place", trace.path, "--solver", "magic", "-o", tmp_path / "new.json"),
        "do not divide over 8 devices; use 16 or 24": ("place", trace.path, "--slots", "20", "--solver", "linear", "-o", tmp_path / "new.json"),
        "3 MoE layers x 16 experts), not for 'tiny' (2 x 8)": ("score", foreign.path, plan, "--cluster", "h100x8"),
        "made for 8 devices, the cluster has 32": (*score, "h100-4x8"),
        "shipped: ": (*score, "h100x9"),
        "$.nodes[0].devices": (*score, bad_profile),
        "$.wheels: unknown key": (*score, bad_profile),
        "$.memories[0].bandwidth: must not be negative": ("profiles", bad_device),
        "$.colour: unknown key": ("profiles", bad_device),
        "runs backwards": ("inspect", trace.path, "--tokens", "90%:10%"),
        "out of range 0..7 at ids": ("import", "npz", npz, "-o", tmp_path / "t1", "--model", write_config(tmp_path, layers=26, experts=8)),
        "26 layers, 'mixtral-8x7b' has 32": ("import", "npz", npz, "-o", tmp_path / "t2", "--model", "mixtral-8x7b"),
        "formats: npz": ("import", "excel", npz, "-o", tmp_path / "t3"),
        "not a readable .npz": ("import", "npz", plan, "-o", tmp_path / "t4"),
        "exists and is not empty": ("import", "npz", npz, "-o", trace.path, "--model", "deepseek-v2-lite"),
        "presets: ": ("import", "npz", npz, "-o", tmp_path / "t5", "--model", "gpt-2"),
    }
    for message, arguments in cases.items():
        code, out, err = moesim(*arguments)
        assert code == 2, (arguments, out, err)
        assert message in err, (message, err)
        assert "Traceback" not in err
    assert plan.read_bytes() == before
    assert not (tmp_path / "new.json").exists()
    assert trace.experts().shape == (2000, 3, 2)


def write_config(folder: Path, *, layers: int, experts: int) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 64,
                                "num_local_experts": experts, "num_experts_per_tok": 6, "num_attention_heads": 4}))  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "no array 'ids'"),
        ({"ids": np.zeros((3, 2))}, "ids must be whole numbers"),
        ({"ids": np.zeros((3, 2, 1), int), "weights": np.zeros((3, 2, 2))}, "weights must be numbers of the shape of ids"),
        ({"ids": np.zeros((3, 2, 1), int), "weights": np.full((3, 2, 1), np.nan)}, "NaN"),
        ({"ids": np.zeros((3, 2, 1), int), "seqlens": np.array([1, 1])}, "add up to 3"),
        ({"ids": np.array([[[object()]]], dtype=object)}, "not a readable"),
    ],
)
def test_a_bad_archive_is_refused(moesim: Run, tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    code, _, err = moesim("import", "npz", tmp_path / "bad.npz", "-o", tmp_path / "t")
    assert code == 2
    assert message in err
    assert not (tmp_path / "t").exists()


def test_an_import_without_a_model_says_what_that_costs(moesim: Run, npz: Path, tmp_path: Path) -> None:
    code, _, err = moesim("import", "npz", npz, "-o", tmp_path / "t")
    assert code == 0
    assert "predicted times mean nothing" in err


def test_validate_and_calibrate_on_this_cpu(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    plan = plan_of(moesim, trace, tmp_path / "plan.json", cluster="cpu")
    code, out, err = moesim("validate", trace.path, plan, "--device", "cpu", "--batch", "64", "--repeats", "2", "-o", tmp_path / "v.json")
    assert code == 0, err
    assert "Ranking" in out
    assert json.loads((tmp_path / "v.json").read_text())["validation"]["cases"]
    config = write_config(tmp_path, layers=2, experts=8)
    code, out, err = moesim("calibrate", "--device", "cpu", "--model", config, "--experts", "2", "--most-tokens", "64", "-o", tmp_path / "cpu.toml")
    assert code == 0, err
    code, out, _ = moesim("profiles", tmp_path / "cpu.toml")
    assert "measured" in out
    code, _, err = moesim("validate", trace.path, plan, "--device", "tpu")
    assert code == 2
    assert "use cpu or cuda" in err


def test_plans_are_compared_on_parts_nobody_learnt_from(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    live = plan_of(moesim, trace, tmp_path / "live.json")
    code, out, err = moesim(
        "compare", trace.path, "--solver", "eplb", "--solver", "local-search", "--home", "code", "--tokens", "0%:80%", "--current", live, "--json"
    )
    assert code == 0, err
    parts = json.loads(out)["comparison"]["scored_on"]
    assert [part["kind"] for part in parts] == ["in-sample", "held-out", "cross-domain"]
    home, other = (trace.tokens_by_domain[name] for name in ("code", "prose"))
    assert [part["tokens"] for part in parts] == pytest.approx([0.4 * home, 0.4 * home, 0.8 * other], abs=2)
    for row in parts[1]["plans"]:
        assert set(row["batch_load_ratio"]) == {"64", "512"}
        assert row["batch_load_ratio"]["64"] >= row["batch_load_ratio"]["512"] >= 1
        assert row["moved_B"] == row["moves"] * trace.model.expert_B
    code, out, _ = moesim("compare", trace.path, live, "--solver", "greedy", "-o", tmp_path / "comparison.json")
    assert code == 0
    assert moesim("report", tmp_path / "comparison.json", "-o", tmp_path / "comparison.html")[0] == 0


def test_outputs_that_cannot_be_written_are_refused_before_the_work(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    """A folder, a device and a place below a file are no outputs, with --force neither."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    place = ("place", trace.path, "--cluster", "h100x8", "--solver", "linear", "-o")
    for output, force, message in (
        (tmp_path / "folder", ["--force"], "no file that could be replaced"),
        (Path("/dev/null"), ["--force"], "no file that could be replaced"),
        (tmp_path / "file" / "plan.json", [], "its folder cannot be made"),
        (tmp_path / "file", [], "--force to replace it"),
    ):
        code, out, err = moesim(*place, output, *force)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {output}: ")
        assert message in err
    assert (tmp_path / "file").read_text() == "mine"
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_numbers_and_nesting_beyond_all_bounds_are_refused(moesim: Run, trace: Trace, tmp_path: Path, suffix: str) -> None:
    for name, text in (("digits", "a = " + "9" * 5000), ("deep", "a = " + "[" * 100_000)):
        path = tmp_path / f"{name}.{suffix}"
        path.write_text(text if suffix == "toml" else text.removeprefix("a = "))
        verb = ("sweep", path, "-o", tmp_path / "s") if suffix == "toml" else ("score", trace.path, path)
        code, _, err = moesim(*verb)
        assert code == 2
        assert err.startswith(f"error: {path}: not valid {suffix.upper()}")
        assert len(err) < 400


def test_what_the_system_refuses_is_one_line(moesim: Run, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesim import trace as room

    for problem, code, message in (
        (PermissionError(13, "Permission denied", "/there"), 2, "error: /there: Permission denied; check the path"),
        (MemoryError(), 1, "error: not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):

        def refused(_: object, problem: BaseException = problem) -> None:
            raise problem

        monkeypatch.setattr(room, "load_trace", refused)
        found, _, err = moesim("inspect", trace.path)
        assert found == code
        assert err.strip().startswith(message)
        assert len(err.strip().splitlines()) == 1


def test_a_profile_is_a_device_or_a_cluster_by_name_or_path(moesim: Run, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('name = "own"\ntitle = "own"\n[[nodes]]\ndevice = "cpu"\ndevices = 2\nlink = "shared-memory"\n')
    assert json.loads(moesim("profiles", own, "--json")[1])["cluster"] == "own"
    code, _, err = moesim("profiles", "h100x9")
    assert code == 2
    assert "h100x8" in err
    assert "h100-sxm" in err


def test_a_format_nobody_knows_is_answered_with_all_formats(moesim: Run, tmp_path: Path) -> None:
    code, _, err = moesim("import", "nope", tmp_path, "-o", tmp_path / "t")
    assert code == 2
    assert all(name in err for name in ("npz", "tensorrt-llm-statistics", "vllm-ascend"))


@pytest.mark.parametrize(
    ("learnt", "advice"),
    [
        (("--tokens", "0%:50%", "--domain", "law"), "--cluster h100x8 --domain law --tokens 50%:"),
        (("--tokens", ":100", "--phase", "prefill"), "--cluster h100x8 --phase prefill --tokens 100:"),
        ((), "moesim score OTHER-TRACE"),
    ],
)
def test_place_says_how_to_score_on_tokens_it_has_not_seen(
    moesim: Run, make_trace: Callable[..., Trace], tmp_path: Path, learnt: tuple[str, ...], advice: str
) -> None:
    model = tiny_model()
    trace = make_trace(model, clustered_routing(model, 200), domain="law", phase="prefill")
    code, out, err = moesim("place", trace.path, *learnt, "--solver", "linear", "-o", tmp_path / "plan.json")
    assert code == 0, err
    told = " ".join(out.split()).partition("not seen: ")[2]
    assert advice in told
    if learnt:
        assert moesim(*told.split()[1:])[0] == 0
