"""`moesim serve`: from arrivals to a result, and against measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesim.cli.serve import show
from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.serving import Arrivals, Deployment, first_devices, serve
from moesim.serving.measured import compare_measured, load_measured
from moesim.trace import Trace
from tests.conftest import tiny_model

Run = Callable[..., tuple[int, str, str]]
PROCESS = "poisson:rate=20,span=20s,prompt=50,output==10"


def test_a_stream_of_requests_is_served(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    code, printed, remarks = moesim(
        "serve", PROCESS, "--trace", trace.path, "--cluster", "h100x8", "--slo", "ttft=1s,tpot=50ms", "--price", "2", "-o", out
    )
    assert code == 0 and "to the first token" in printed and "kept by 100.00%" in printed and "price" in printed
    assert "routed layer by layer from the trace" in remarks
    data = json.loads(out.read_text())
    assert data["kind"] == "serving" and data["summary"]["served"] == data["summary"]["requests"] > 300
    assert data["inputs"]["routing"] and len(data["requests"]["end_s"]) == data["summary"]["requests"]
    code, _, remarks = moesim("serve", PROCESS, "--trace", trace.path, "-o", out)
    assert code == 2 and "--force" in remarks


def test_a_missed_slo_is_exit_code_1_and_json_is_one_object(moesim: Run, trace: Trace) -> None:
    code, printed, _ = moesim("serve", PROCESS, "--trace", trace.path, "--slo", "latency=1us", "--json", "--first", 5, "--traffic", 2)
    assert code == 1
    data = json.loads(printed)
    assert data["summary"]["requests"] == 5 and not data["summary"]["meets_slo"] and data["schema_version"] == 1


def test_prompts_may_be_computed_elsewhere_under_a_plan(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert moesim("place", trace.path, "--solver", "greedy", "-o", plan)[0] == 0
    code, printed, _ = moesim("serve", PROCESS, "--trace", trace.path, "--plan", plan, "--prefill", 1, "--layout", "dp4tp2", "--json")
    data = json.loads(printed)
    assert code == 0 and data["inputs"]["deployment"]["devices"] == 16 and data["summary"]["name"] == "greedy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.csv", "--model", "olmoe-1b-7b"), "no such file"),
        ((PROCESS,), "give --trace"),
        ((PROCESS, "--model", "olmoe-1b-7b", "--domain", "code"), "select from --trace"),
        ((PROCESS, "--model", "olmoe-1b-7b", "--slo", "ttft<2s"), "not understood"),
        ((PROCESS, "--model", "olmoe-1b-7b", "--slo", "share=90%"), "sets no limit"),
        ((PROCESS, "--model", "olmoe-1b-7b", "--layout", "dp3"), "layout"),
        ((PROCESS, "--model", "olmoe-1b-7b", "--host", "3 parsecs"), "--host"),
        ((PROCESS, "--model", "olmoe-1b-7b", "--seed", "-1"), "seed"),
        (("poisson:rate=1", "--model", "olmoe-1b-7b"), "missing"),
    ],
)
def test_mistakes_are_exit_code_2(moesim: Run, arguments: tuple[str, ...], message: str) -> None:
    code, _, remarks = moesim("serve", *arguments)
    assert code == 2 and message in remarks


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        "arrival_s,input_toks,output_toks\n-1,2,3\n",
        "arrival_s,input_toks,output_toks\n1e999,2,3\n",
        '{"timestamp": NaN, "input_length": 1, "output_length": 2}\n',
    ],
)
@pytest.mark.parametrize("verb", ["serve", "scale"])
def test_broken_logs_are_exit_code_2_and_nothing_is_written(moesim: Run, tmp_path: Path, verb: str, text: str) -> None:
    (tmp_path / "log").write_text(text)
    code, _, remarks = moesim(verb, tmp_path / "log", "--model", "olmoe-1b-7b", "--slo", "ttft=1s", "-o", tmp_path / "out.json")
    assert code == 2 and str(tmp_path / "log") in remarks and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("cell", ["-1", "inf", "1e999"])
def test_measured_times_that_cannot_be_are_named(tmp_path: Path, cell: str) -> None:
    (tmp_path / "measured.csv").write_text(f"arrival_s,ttft_ms,tpot_ms,latency_ms\n0,1,,3\n1,{cell},2,3\n")
    with pytest.raises(InputError, match="row 2: ttft_ms"):
        load_measured(tmp_path / "measured.csv")


def test_a_measured_run_is_compared_request_by_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A simulated run written down as if measured has no error; one twice as slow has minus a half."""
    rng = np.random.default_rng(0)
    rows = Arrivals.of(np.sort(rng.uniform(0, 2, 50)), rng.integers(1, 300, 50), rng.integers(2, 20, 50))
    found = serve(rows, Deployment(model=tiny_model(), cluster=first_devices(load_cluster("h100x8"), 2), max_batch_tokens=256))
    times_ms = [(found.first_s_R - found.seen_s_R) * 1e3, found.tpot_s_R * 1e3, (found.end_s_R - found.seen_s_R) * 1e3]
    path = tmp_path / "requests.csv"

    def write(factor: float) -> None:
        lines = [
            f"{at!r},{a * factor!r},{b * factor!r},{c * factor!r}"
            for at, a, b, c in zip(rows.arrival_s_R.tolist(), *(t.tolist() for t in times_ms), strict=True)
        ]
        path.write_text("arrival_s,ttft_ms,tpot_ms,latency_ms\n" + "\n".join(lines))

    write(1.0)
    errors = compare_measured(found, load_measured(path))
    assert {row["quantity"] for row in errors} == {"ttft", "tpot", "latency"} and {"mean", "p50", "p99"} <= {row["statistic"] for row in errors}
    assert [row["error"] for row in errors] == pytest.approx([0.0] * len(errors), abs=1e-9)
    write(2.0)
    errors = compare_measured(found, load_measured(path))
    assert [row["error"] for row in errors] == pytest.approx([-0.5] * len(errors))
    show(found, errors)
    assert "-50.0%" in capsys.readouterr().out
