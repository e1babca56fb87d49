"""A small capacity sweep and a scaling result, as their commands write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.files import read_json
from moesim.sweep import sweep
from moesim.sweep.spec import as_spec
from moesim.trace import Trace
from tests.sweep_cases import Here

CASES: tuple[dict[str, Any], ...] = ({}, {"traffic": 300.0}, {"traffic": 0.5}, {"skew": 0.5, "skew_domain": "prose"})


def capacity_document(trace: Trace, folder: Path, *, cases: Sequence[dict[str, Any]] = CASES, **grid: Any) -> dict[str, Any]:
    """What `moesim sweep` writes for one deployment or two under four conditions. 1 keeps the objective, as does 2; twice the traffic may not."""
    common = {
        "trace": str(trace.path),
        "arrivals": "poisson:rate=40,span=3s,prompt=200,output=20",
        "slo": "ttft=50ms,tpot=10ms,share=90%",
        "cluster": "h100x8",
        "replicas": [1, 2],
        "max_batch_tokens": 1024,
        "max_seqs": 1,
        "prices": {"h100-sxm": 2.5},
    }
    spec = as_spec({"kind": "capacity", "title": "What to buy", "grid": common | grid, "cases": list(cases)}, root=folder)
    outcome = sweep(spec, folder, Here())
    assert outcome.count("ok") == len(outcome.rows), [row["error"] for row in outcome.rows]
    document: dict[str, Any] = read_json(folder / "result.json", InputError)
    return document


def validation() -> dict[str, Any]:
    """What `moesim validate` writes, in short: one prediction, 10 % too long, on a device that nobody recommends."""
    errors = {"n": 1, "median_ape": 0.1, "p90_ape": 0.1, "mape": 0.1, "bias": 0.1}
    case = {"plan": "linear", "layer": 0, "rank": 0, "tokens": 8, "predicted_s": 1.1e-3, "measured_s": 1e-3}
    part = {"device": "cuda", "backend": "torch", "hardware": {"gpu": "NVIDIA H200"}, "cases": [case], "summary": errors}
    return {"schema_version": 1, "title": "On an H200", "validation": part}


def measured_run(document: dict[str, Any]) -> dict[str, Any]:
    """What `moesim serve --measured -o` writes: the serving run of a capacity document, 20 % faster than a real engine."""
    rows = [
        {"quantity": q, "statistic": s, "simulated_s": 0.08, "measured_s": 0.1, "error": -0.2} for q in ("ttft", "latency") for s in ("mean", "p50")
    ]
    return {**document["serving"][0], "schema_version": 1, "kind": "serving", "measured": rows}


def served(name: str, attainment: float) -> dict[str, Any]:
    """The part of a serving result that a scaling result keeps."""
    spread = {"mean": 0.1, "p50": 0.1, "p90": 0.2, "p95": 0.2, "p99": 0.3}
    return {"name": name, "requests": 100, "served": 100, "attainment": attainment, "meets_slo": attainment >= 0.99, "device_hours": 1.0,
            "ttft_s": spread, "tpot_s": spread, "latency_s": spread}  # fmt: skip


def scaling_result() -> dict[str, Any]:
    """What `moesim scale --result` writes, in short."""

    def bill(total: float) -> dict[str, Any]:
        return {"total": total, "rent": total, "missed": 0.0, "attainment": 1.0, "device_hours": total / 2, "changes": 1}

    change = {
        "at_s": 600.0,
        "before": 4,
        "after": 8,
        "method": "elastic",
        "seconds": 3.5,
        "pause_s": 1.0,
        "down_s": 0.0,
        "moved_B": 4e10,
        "loaded_B": 0.0,
    }
    return {
        "schema_version": 1,
        "kind": "scaling-result",
        "plan": {"name": "predictive", "interval_s": 600.0, "devices": [4, 8], "changes": [change], "made_from": {"solver": "predictive"}},
        "currency": "$",
        "solvers": {"optimal": bill(2.0), "predictive": bill(3.0), "static-minimum": bill(4.0)},
        "timeline": [
            {"start_s": 0.0, "demand_per_s": 3.0, "devices": 4, "capacity_per_s": 5.0, "attainment": 1.0},
            {"start_s": 600.0, "demand_per_s": 7.0, "devices": 8, "capacity_per_s": 9.0, "attainment": None},
        ],
        "outlooks": [
            {"case": "the plan", "bill": bill(3.0), "served": served("a", 0.995), "failures": []},
            {"case": "traffic doubles, same plan", "bill": bill(3.0), "served": served("a", 0.4), "failures": []},
        ],
        "notes": ["software costs are those of a paper"],
    }
