"""A run that was measured, request by request, against its simulation: signed errors of what people compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.serving.formats import measured_columns
from moesim.serving.result import ServingResult, spread

Floats = NDArray[np.float64]
QUANTITIES = ("ttft", "tpot", "latency")
NOTE = "measured times count from when the engine queued the request (the end of the step under way as it came); so do the simulated ones here"


def load_measured(path: str | Path) -> dict[str, Floats]:
    """Seconds by quantity of every request of a table with columns arrival_s, ttft_ms, tpot_ms, latency_ms (as vLLM's engine
    reports them: from when the request was queued in the scheduler), in order of arrival.

    An empty cell is a time nobody took. Raises InputError when a column is missing or a time is negative or infinite.
    """
    columns = measured_columns(path, ("arrival_s", *(f"{name}_ms" for name in QUANTITIES)))
    for name, values in columns.items():
        good = (values >= 0) & (values < np.inf) | (np.isnan(values) & (name != "arrival_s"))
        if not good.all():
            row = int(np.argmin(good))
            raise InputError(f"{path}: row {row + 1}: {name} is {values[row]}; expected a time >= 0")
    order = np.argsort(columns["arrival_s"], kind="stable")
    return {name: columns[f"{name}_ms"][order] * 1e-3 for name in QUANTITIES}


def compare_measured(result: ServingResult, measured: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """Mean and percentiles of each quantity: simulated, measured, and the signed error as a share of the measured.

    Raises InputError when the numbers of requests differ.
    """
    simulated = {
        "ttft": result.first_s_R - result.seen_s_R,
        "tpot": result.tpot_s_R,
        "latency": result.end_s_R - result.seen_s_R,
    }
    rows = []
    for name in QUANTITIES:
        ours, theirs = simulated[name], measured[name]
        if len(ours) != len(theirs):
            raise InputError(f"{len(ours)} requests were simulated, {len(theirs)} measured; give the same requests")
        both = np.isfinite(ours) & np.isfinite(theirs)
        if not both.any():
            raise InputError(f"no request has a measured and a simulated {name}; check the table")
        here, there = spread(ours[both]), spread(theirs[both])
        for what, known in there.items():
            value = here[what]
            if known and value is not None:
                rows.append({"quantity": name, "statistic": what, "simulated_s": value, "measured_s": known, "error": value / known - 1})
    return rows
