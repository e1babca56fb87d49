"""Systems on the command line: what is listed, what `simulate` says of a step, what `compare --system` puts side by side."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import clustered_routing, tiny_model

import moesim as package
from moesim.cli import main
from moesim.cli.systems import _WORDS, changes
from moesim.cost import CostModel
from moesim.hardware import load_cluster
from moesim.plan import load_plan
from moesim.systems import SYSTEMS, Exchange, Schedule
from moesim.trace import Trace, TraceWriter, load_trace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moesim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["moesim", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """3 MoE layers x 32 experts, top-2, with a shared expert, 2,000 tokens."""
    model = tiny_model(experts=32, hidden=2048, intermediate=1024, shared_intermediate=1024)
    path = tmp_path_factory.mktemp("routed") / "trace"
    with TraceWriter(path, model, top_k=2, weights=False) as writer:
        writer.append(clustered_routing(model, 2000))
    return load_trace(path)


@pytest.fixture
def plan(moesim: Run, routed: Trace, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    assert moesim("place", routed.path, "--cluster", "h100-4x8", "--solver", "linear", "-o", path)[0] == 0
    return path


def test_systems_are_listed_with_what_they_change(moesim: Run) -> None:
    code, out, _ = moesim("systems", "--json")
    assert code == 0
    listed = {row["name"]: row for row in json.loads(out)["systems"]}
    assert set(listed) == set(SYSTEMS)
    assert [name for name, row in listed.items() if not row["changes"]] == ["plain"]
    assert any("over its hidden state: 0.25" in line for line in listed["bigmac"]["changes"])
    _, out, _ = moesim("systems")
    for row in listed.values():
        assert all(row[key] in out for key in ("name", "title", "paper", "headline", "check"))


def test_every_mechanism_has_words() -> None:
    assert {f.name for kind in (Exchange, Schedule) for f in fields(kind)} == set(_WORDS)
    assert all(isinstance(line, str) and line for system in SYSTEMS.values() for line in changes(system))


def test_simulate_stays_lockstep_until_something_needs_events(moesim: Run, routed: Trace, plan: Path) -> None:
    base = ("simulate", routed.path, plan, "--cluster", "h100-4x8", "--tokens-per-device", "64", "--json")
    lockstep = json.loads(moesim(*base)[1])
    assert lockstep["summary"]["engine"] == "lockstep"
    assert json.loads(moesim(*base, "--engine", "lockstep")[1]) == lockstep
    for options in (("--engine", "event"), ("--system", "plain"), ("--mode", "prefill"), ("--context", "4096")):
        event = json.loads(moesim(*base, *options)[1])
        assert event["summary"]["engine"] == "event"
        assert event["layer_s"] == pytest.approx(lockstep["layer_s"], rel=1e-9)
    assert json.loads(moesim(*base, "--contention")[1])["inputs"]["contention"] is True


@pytest.mark.parametrize("mode", ["prefill", "decode", "training"])
def test_simulate_says_what_python_says(moesim: Run, routed: Trace, plan: Path, mode: str) -> None:
    arguments = ("simulate", routed.path, plan, "--cluster", "h100-4x8", "--tokens-per-device", "256", "--context", "1024", "--transport", "nccl")
    code, out, err = moesim(*arguments, "--system", "tutel", "--mode", mode, "--json")
    assert code == 0, err
    cluster = load_cluster("h100-4x8")
    cost = CostModel.of(cluster, routed.model, transport="nccl")
    run: dict[str, Any] = {"tokens_per_device": 256, "context": 1024, "mode": mode, "cost": cost}
    expected = package.simulate_event(routed, load_plan(plan), cluster, system="tutel", **run)
    printed = json.loads(out)
    assert {key: printed[key] for key in expected.to_dict()} == json.loads(json.dumps(expected.to_dict()))
    code, out, _ = moesim(*arguments, "--system", "tutel", "--mode", mode)
    assert code == 0
    for words in (f"tutel, {mode}: a step takes", "Critical path of a step", "Compute of a device waits", "Busiest streams", "Busiest links"):
        assert words in out


def test_the_timeline_opens_and_nothing_is_overwritten_unasked(moesim: Run, routed: Trace, plan: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps.json.gz"
    arguments = ("simulate", routed.path, plan, "--cluster", "h100-4x8", "--tokens-per-device", "64", "--timeline", path)
    assert moesim(*arguments)[0] == 0
    with gzip.open(path, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    assert {"attention", "dispatch", "experts", "combine"} <= {event["name"] for event in events if event["ph"] == "X"}
    before = path.read_bytes()
    code, _, err = moesim(*arguments, "--system", "tutel")
    assert (code, path.read_bytes()) == (2, before)
    assert "--force" in err
    assert moesim(*arguments, "--system", "tutel", "--force")[0] == 0
    assert path.read_bytes() != before


def test_systems_are_compared_and_reported(moesim: Run, routed: Trace, plan: Path, tmp_path: Path) -> None:
    names = ["plain", "lsh-moe", "tutel", "exflow"]
    arguments = ["compare", routed.path, plan, "--cluster", "h100-4x8", "--tokens-per-device", "2048", "--mode", "training"]
    for name in names:
        arguments += ["--system", name]
    written = tmp_path / "systems.json"
    code, out, err = moesim(*arguments, "-o", written)
    assert code == 0, err
    assert all(name in out for name in names)
    assert "tokens 50%:100%" in err
    document = json.loads(written.read_text())
    assert json.loads(moesim(*arguments, "--json")[1]) == document
    assert [row["system"] for row in document["systems"]] == [result["summary"]["name"] for result in document["results"]] == names
    rows = {row["system"]: row for row in document["systems"]}
    assert rows["plain"]["gain"] == 1
    assert 0 < rows["plain"]["exchange_share"] < 1
    bound = 1 / (1 - rows["plain"]["exchange_share"])
    assert all(row["gain"] <= bound * (1 + 1e-9) for name, row in rows.items() if name in ("lsh-moe", "tutel")), "they only touch exchanges"
    assert rows["lsh-moe"]["gain"] > 1
    for row, result in zip(document["systems"], document["results"], strict=True):
        assert row["step_s"] == pytest.approx(sum(result["event"]["critical_path_s"].values()) / result["steps"], rel=1e-9)
    code, out, err = moesim("report", written, "-o", tmp_path / "report.html")
    assert code == 0, err
    assert "exflow" in (tmp_path / "report.html").read_text()


def test_without_a_plan_experts_are_in_order(moesim: Run, routed: Trace, plan: Path) -> None:
    base = ["compare", routed.path, "--cluster", "h100-4x8", "--tokens-per-device", "64", "--system", "plain", "--judge", "0%:100%", "--json"]
    alone, given = json.loads(moesim(*base)[1]), json.loads(moesim(*base, plan)[1])
    assert alone["plan"] == "linear"
    assert alone["systems"] == given["systems"]


def test_what_would_change_nothing_is_refused(moesim: Run, routed: Trace, plan: Path, tmp_path: Path) -> None:
    simulate, compare = ("simulate", routed.path, plan, "--cluster", "h100-4x8"), ("compare", routed.path, plan, "--cluster", "h100-4x8")
    small = moesim("place", routed.path, "--cluster", "h100x8", "--solver", "linear", "-o", tmp_path / "small.json")
    assert small[0] == 0
    cases: dict[str, tuple[Any, ...]] = {
        "--engine lockstep knows no --mode, --timeline": (
            *simulate,
            "--engine",
            "lockstep",
            "--mode",
            "decode",
            "--timeline",
            tmp_path / "t.json.gz",
        ),
        "system 'magic' is unknown": (*simulate, "--system", "magic"),
        "give every output a file of its own": (*simulate, "--timeline", tmp_path / "one.json", "-o", tmp_path / "one.json"),
        "inference only": (*simulate, "--system", "se-moe", "--mode", "training"),
        "--mode needs --system": (*compare, "--mode", "decode"),
        "--solver goes with solvers, not with --system": (*compare, "--system", "plain", "--solver", "eplb"),
        "--learn goes with solvers": (*compare, "--system", "plain", "--learn", "0%:10%"),
        "on one plan, 2 are given": (*compare, plan, "--system", "plain"),
        "the cluster has 32": ("compare", routed.path, tmp_path / "small.json", "--cluster", "h100-4x8", "--system", "plain"),
        "unknown; use some of bigmac": (*compare, "--system", "plain", "--system", "magic"),
    }
    for words, arguments in cases.items():
        code, out, err = moesim(*arguments)
        assert code == 2, (words, out, err)
        assert words in err
    assert not (tmp_path / "t.json.gz").exists()
