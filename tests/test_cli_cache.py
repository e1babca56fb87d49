"""`moesim cache` and its figures: what a user types, what they get, and what bad input does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model

from moesim.errors import InputError
from moesim.plan import load_cache_plan
from moesim.replay.curves import ONE_PASS
from moesim.report import read_document, render
from moesim.report.blocks import Gallery, Table
from moesim.report.sections.caching import BOUNDS, caching
from moesim.trace import Trace

Run = Callable[..., tuple[int, str, str]]
CLUSTER = "rtx-4090x8-pcie"


@pytest.fixture
def cached(moesim: Run, trace: Trace, tmp_path: Path) -> dict[str, Any]:
    """Files of one run and what it printed as JSON."""
    plan, result, plot = (tmp_path / name for name in ("cache.json", "result.json", "curves.svg"))
    code, out, err = moesim(
        "cache", trace.path, "--cluster", CLUSTER, "--memory", "50%", "-o", plan, "--result", result, "--plot", plot, "--json",
        "--tokens-per-device", 4, "--event-steps", 8,
    )  # fmt: skip
    assert code == 0, err
    return {"plan": plan, "result": result, "plot": plot, "json": json.loads(out)}


def test_the_whole_way(moesim: Run, trace: Trace, tmp_path: Path, cached: dict[str, Any]) -> None:
    plan = load_cache_plan(cached["plan"])
    section = cached["json"]["caching"]
    assert plan.slots_LG.tolist() == section["slots"]
    assert plan.made_from["trace"].endswith("(tokens 0%:50%)")
    assert [part["kind"] for part in section["scored"]] == ["in-sample", "held-out"]
    assert [part["tokens"] for part in section["scored"]] == [1000, 1000]
    for part in section["scored"]:
        for row in (part["plan"], part["equal"]):
            assert row["hit_ratio"] == pytest.approx(1 - row["miss_ratio"])
            assert row["stall_s"] == pytest.approx(row["step_s"] - row["base_s"])
    assert (np.array(section["held_B"]) <= section["budget_B"]).all()
    assert abs(section["event"]["error"]) < 0.1
    placed = tmp_path / "plan.json"
    assert moesim("place", trace.path, "--solver", "linear", "--cluster", CLUSTER, "-o", placed)[0] == 0
    simulate = ("simulate", trace.path, placed, "--cluster", CLUSTER, "--mode", "decode", "--tokens", "50%:", "--tokens-per-device", 4)
    code, out, err = moesim(*simulate, "--cache-plan", cached["plan"], "--json")
    assert code == 0, err
    with_copies = json.loads(out)["event"]
    in_place = json.loads(moesim(*simulate, "--json")[1])["event"]
    judged = section["scored"][1]["plan"]
    assert with_copies["copies"]["hit_ratio"] == pytest.approx(judged["hit_ratio"])
    assert with_copies["step_s"] - in_place["step_s"] == pytest.approx(judged["stall_s"], rel=1e-6, abs=1e-12)
    code, _, err = moesim(*simulate, "--cache-plan", cached["plan"], "--engine", "lockstep")
    assert code == 2
    assert "--cache-plan" in err


def test_curves_fall_from_one_and_no_policy_beats_the_bound(cached: dict[str, Any]) -> None:
    curves = cached["json"]["caching"]["curves"]
    assert curves["slots"] == [0, 1, 2]  # 16 experts on 8 devices
    for name, row in curves["miss_ratio"].items():
        assert row[0] == 1
        assert sorted(row, reverse=True) == row or name not in ONE_PASS  # more slots help wherever caches nest
        if name not in BOUNDS:  # static holds experts before the first one is asked for
            assert all(a >= b for a, b in zip(row, curves["miss_ratio"]["optimal"], strict=True))
    assert {"lru", "lfu", "static", "belady", "optimal"} <= set(curves["miss_ratio"])


def test_people_read_tables_and_programs_one_object(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    code, out, err = moesim("cache", trace.path, "--cluster", CLUSTER, "--memory", "1 GB", "-o", tmp_path / "c.json", "--event-steps", 0)
    assert code == 0, err
    for words in ("hit ratio", "stall/step", "held-out", "all resident", "--cache-plan"):
        assert words in out
    assert "not calibrated" in err


def test_infeasible_is_said_and_nothing_written(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    for arguments, words in (
        (("--memory", "10 B"), "holds no expert"),
        (("--memory", "50%", "--tier", "host=1kB", "--tier", "nvme=1kB"), "do not fit"),
    ):
        code, out, err = moesim("cache", trace.path, "--cluster", CLUSTER, *arguments, "-o", tmp_path / "c.json", "--json")
        assert code == 1
        assert words in err
        assert json.loads(out)["plan"] is None
        assert not (tmp_path / "c.json").exists()


def test_bad_input_is_named_with_exit_code_2(
    moesim: Run, trace: Trace, tmp_path: Path, make_trace: Callable[..., Trace], cached: dict[str, Any]
) -> None:
    other = tiny_model(layers=2, experts=8)
    foreign = make_trace(other, clustered_routing(other, 50))
    before = cached["plan"].read_bytes()
    new = ("-o", tmp_path / "new.json")
    cases: dict[str, tuple[Any, ...]] = {
        "--force": ("cache", trace.path, "--memory", "50%", "-o", cached["plan"]),
        "solves placement problems, not caching": ("cache", trace.path, "--memory", "50%", "--solver", "linear", *new),
        "solves caching problems, not placement": ("place", trace.path, "--solver", "pin-set", *new),
        "knows what will be asked for": ("cache", trace.path, "--memory", "50%", "--policy", "belady", *new),
        "policy 'magic' is not installed": ("cache", trace.path, "--memory", "50%", "--policy", "magic", *new),
        "prefetcher 'magic'": ("cache", trace.path, "--memory", "50%", "--prefetch", "magic", *new),
        "or a share of all experts": ("cache", trace.path, "--memory", "a lot", *new),
        "draws .svg or .png": ("cache", trace.path, "--memory", "50%", "--plot", tmp_path / "c.pdf", *new),
        "give every output a file of its own": ("cache", trace.path, "--memory", "50%", "--result", tmp_path / "new.json", *new),
        "leaves nothing to judge": ("cache", trace.path, "--memory", "50%", "--tokens", ":", *new),
        "write for example host=64GB": ("cache", trace.path, "--memory", "50%", "--tier", "host", *new),
        "tier 'tape'": ("cache", trace.path, "--memory", "50%", "--tier", "tape=1GB", *new),
        "judge a trace of the same model": ("cache", trace.path, "--memory", "50%", "--judge", foreign.path, *new),
        "has no host": ("cache", trace.path, "--memory", "50%", "--cluster", "mi300x-8", *new),
    }
    for message, arguments in cases.items():
        code, out, err = moesim(*arguments)
        assert code == 2, (arguments, out, err)
        assert message in err, (message, err)
    assert cached["plan"].read_bytes() == before
    assert not (tmp_path / "new.json").exists()


def test_the_report_draws_it(moesim: Run, tmp_path: Path, cached: dict[str, Any]) -> None:
    document = read_document(cached["result"])
    section = caching(document)
    assert section is not None
    gallery = next(block for block in section.blocks if isinstance(block, Gallery))
    assert len(gallery.drawings) == 2
    tables = [block for block in section.blocks if isinstance(block, Table)]
    policies = {row[0].text for group in tables[-1].groups for row in group.rows}
    assert policies == set(cached["json"]["caching"]["curves"]["miss_ratio"])
    page = render([document])
    assert "Expert cache" in page
    assert page.count("<svg") == 2
    assert cached["plot"].read_text().lstrip().startswith("<?xml")
    assert moesim("report", cached["result"], "-o", tmp_path / "report.html")[0] == 0


def test_a_damaged_result_is_named(tmp_path: Path, cached: dict[str, Any]) -> None:
    data = json.loads(cached["result"].read_text())
    data["caching"]["slots"] = data["caching"]["slots"][:1]
    del data["caching"]["scored"][0]["plan"]["stall_s"]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"\$.caching.scored\[0\].plan.stall_s: missing"):
        read_document(tmp_path / "bad.json")
