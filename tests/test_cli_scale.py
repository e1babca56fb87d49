"""`moesim scale`: a plan, its evidence, and clear words for what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.plan import load_scaling_plan
from moesim.serving import generate
from moesim.trace import Trace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Three minutes: quiet, a busy one, quiet."""
    path = tmp_path / "requests.csv"
    parts = [
        start + generate("poisson", requests_per_s=rate, span_s=60.0, prompt=64, output=40, seed=seed).arrival_s_R
        for seed, (start, rate) in enumerate([(0.0, 0.5), (60.0, 15.0), (120.0, 0.5)])
    ]
    rows = [f"{at:.6f},64,40" for at in np.concatenate(parts)]
    path.write_text("\n".join(["arrival_s,input_toks,output_toks", *rows]) + "\n")
    return path


def common(requests: Path, trace: Trace, *more: Any) -> list[Any]:
    """A rank runs one request at a time, so that the busy minute needs two."""
    limits = ["--slo", "ttft=2s,share=95%", "--sizes", "1,2", "--max-seqs", 1, "--max-batch-tokens", 64, "--interval", "30s"]
    return ["scale", requests, "--trace", trace.path, *limits, *more]


def test_a_plan_follows_the_traffic_and_keeps_the_objectives(moesim: Run, requests: Path, trace: Trace, tmp_path: Path) -> None:
    plan, whole = tmp_path / "scale.json", tmp_path / "result.json"
    code, out, err = moesim(
        *common(requests, trace, "-o", plan, "--result", whole, "--fail", "80s:1", "--fail", "10s:1", "--fail", "10s:0", "--json")
    )
    assert code == 0, err
    data = json.loads(out)
    written = json.loads(whole.read_text())
    assert {key: data[key] for key in written} == written
    loaded = load_scaling_plan(plan)
    assert loaded.to_dict() == data["plan"]
    devices = loaded.devices_N.tolist()
    assert devices[0] < max(devices[2:4]) > devices[-1]
    assert data["outlooks"][0]["served"]["meets_slo"]
    bills = {name: cost["total"] for name, cost in data["solvers"].items()}
    assert bills["optimal"] == min(bills.values())
    assert bills["optimal"] < bills["static-minimum"]
    assert data["plan"]["solution"]["bill"]["total"] == bills["optimal"]
    cases = [each["case"] for each in data["outlooks"]]
    assert cases == ["the plan", "traffic doubles, same plan", "traffic doubles, planned for", "device 1 dies after 80.0 s"]
    assert data["outlooks"][3]["failures"][0]["experts_lost"] > 0
    assert all(each["served"]["attainment"] <= data["outlooks"][0]["served"]["attainment"] + 1e-9 for each in data["outlooks"][1:2])
    assert [row["devices"] for row in data["timeline"]] == devices
    assert any("device 1 dies after 10.0 s, and nobody notices" in note for note in data["notes"])
    assert any("device 0 dies after 10.0 s, and nothing serves" in note for note in data["notes"])
    event = data["event"]  # the growth, closely: requests pile up before it and are gone after it
    assert (event["before"], event["after"]) == (1, 2) and event["start_s"] < event["at_s"] < event["start_s"] + 120 * event["bin_s"]
    assert max(event["running"]) >= 2 and min(event["waiting"]) >= 0 and len(event["slowest_first_s"]) == 120
    assert any("ElasticMoE" in note for note in data["notes"])
    _, out, _ = moesim(*common(requests, trace, "--solver", "reactive", "--method", "cold-restart"))
    for words in ("reactive (this plan)", "cold-restart", "what if", "takes no requests for"):
        assert words in " ".join(out.split())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--slo", "ttft=never"], "SLO"),
        (["--sizes", "3,16"], "sizes"),
        (["--sizes", "two"], "--sizes"),
        (["--interval", "0.1s"], "intervals no shorter"),
        (["--interval", "soon"], "--interval"),
        (["--solver", "greedy"], "solves placement problems, not scaling"),
        (["--solver", "nobody"], "not installed"),
        (["--fail", "3"], "20min:3"),
        (["--fail", "10s:7"], "name one of them then"),
        (["--fail", "3h:0"], "planned for"),
        (["--model", "qwen3-30b-a3b"], "one of them"),
    ],
)
def test_what_cannot_be_is_said(moesim: Run, requests: Path, trace: Trace, more: list[str], words: str) -> None:
    code, _, err = moesim(*common(requests, trace, *more))
    assert (code, words in err) == (2, True), err


def test_no_size_that_serves_is_infeasible_and_writes_nothing(moesim: Run, requests: Path, trace: Trace, tmp_path: Path) -> None:
    code, out, err = moesim(*common(requests, trace, "--slo", "ttft=1us", "-o", tmp_path / "p.json", "--json"))
    assert (code, json.loads(out)["status"]) == (1, "infeasible")
    assert "objectives" in err
    assert not (tmp_path / "p.json").exists()
    (tmp_path / "p.json").write_text("mine")
    code, _, err = moesim(*common(requests, trace, "-o", tmp_path / "p.json"))
    assert (code, "--force" in err, (tmp_path / "p.json").read_text()) == (2, True, "mine")
