"""Sweeps: what keeping a case costs, and what a second worker gains."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moesim.model import ModelSpec
from moesim.sweep import LocalCrew, sweep
from moesim.sweep.journal import read_rows
from moesim.sweep.spec import Spec, as_spec
from moesim.trace import TraceWriter
from tests.bench.registry import Measured, bench

MODEL = ModelSpec(name="tiny", layers=4, moe_layers=(0, 1, 2, 3), hidden=64, intermediate=32, experts=16, top_k=2)


def small_cases(folder: str, count: int) -> Spec:
    """Cases of some milliseconds each, no two alike."""
    ids = np.argsort(np.random.default_rng(0).random((2000, 4, 16)), axis=2)[:, :, :2].astype(np.uint16)
    with TraceWriter(Path(folder) / "trace", MODEL, top_k=2, weights=False) as writer:
        writer.append(ids)
    grid: dict[str, Any] = {"trace": "trace", "cluster": "h100x8", "solver": "linear", "tokens_per_device": list(range(1, count + 1))}
    return as_spec({"kind": "simulate", "grid": grid}, root=Path(folder))


@bench
def sweep_overhead() -> Measured:
    """Seconds per case that a sweep adds to the case itself, one worker, start-up included in neither."""
    with tempfile.TemporaryDirectory() as folder:
        spec = small_cases(folder, 300)
        begin = time.perf_counter()
        sweep(Spec(kind=spec.kind, title="", cases=spec.cases[:50]), Path(folder) / "out", LocalCrew(1))
        start_up = time.perf_counter() - begin
        begin = time.perf_counter()
        sweep(spec, Path(folder) / "out", LocalCrew(1))
        seconds = time.perf_counter() - begin
        rows = list(read_rows(Path(folder) / "out"))
    inside = sum(row["seconds"] for row in rows[50:])
    started = start_up - sum(row["seconds"] for row in rows[:50])
    return Measured(value=max(0.0, seconds - inside - started) / 250, unit="s/case", peer="the case itself", peer_value=inside / 250)


@bench
def sweep_two_workers() -> Measured:
    """Cases per second of 1,000 small cases on two workers, against one."""
    with tempfile.TemporaryDirectory() as folder:
        spec = small_cases(folder, 1000)
        rates = []
        for workers in (1, 2):
            begin = time.perf_counter()
            sweep(spec, Path(folder) / f"out{workers}", LocalCrew(workers))
            rates.append(1000 / (time.perf_counter() - begin))
    return Measured(value=rates[1], unit="cases/s", peer="one worker", peer_value=rates[0])
