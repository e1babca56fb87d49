"""ServingResult: what each request waited for, how full the deployment was, what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.serving.slo import Slo

SCHEMA_VERSION = 1
Floats = NDArray[np.float64]
PERCENTILES = (50, 90, 95, 99)
PARTS = ("host", "dense", "experts", "exchange", "slow")


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """Means over intervals of `bin_s` seconds from 0: requests waiting and running, share of the cache used, tokens per second."""

    bin_s: float
    waiting_N: Floats
    running_N: Floats
    cache_N: Floats
    output_tokens_per_s_N: Floats
    prompt_tokens_per_s_N: Floats

    @property
    def time_s_N(self) -> Floats:
        """Start of each interval."""
        return np.asarray(np.arange(len(self.waiting_N)) * self.bin_s, np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingResult:
    """Outcome of a run. Times are seconds from its start; NaN where a request was refused.

    seen_s_R when the engine first looked at it (the end of the step under way as it came; of a disaggregated run, at decoding);
    start_s_R first taken into a batch, first_s_R first token out, end_s_R last; again_R times a request was sent back and computed again
    reused_R        prompt tokens found in the prefix cache
    step_parts_s    seconds of all instances' steps by what they were spent on
    lost_output_tokens  made, and made again after a restart
    device_s        devices times seconds they were there (over the run, changes included); busy_s: computing or exchanging
    """

    name: str
    arrival_s_R: Floats
    prompt_R: NDArray[np.int64]
    output_R: NDArray[np.int64]
    seen_s_R: Floats
    start_s_R: Floats
    first_s_R: Floats
    end_s_R: Floats
    again_R: NDArray[np.int64]
    reused_R: NDArray[np.int64]
    refused: int
    slo: Slo | None
    series: Series
    steps: int
    step_parts_s: Mapping[str, float]
    device_s: float
    busy_s: float
    energy_J: float | None
    most_energy_J: float | None
    cost: float | None
    computed_prompt_tokens: int
    lost_output_tokens: int
    seed: int
    changes: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ttft_s_R(self) -> Floats:
        """Seconds from arrival to the first token."""
        return np.asarray(self.first_s_R - self.arrival_s_R)

    @property
    def latency_s_R(self) -> Floats:
        """Seconds from arrival to the last token."""
        return np.asarray(self.end_s_R - self.arrival_s_R)

    @property
    def tpot_s_R(self) -> Floats:
        """Mean seconds per output token after the first; NaN for one token."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(self.output_R > 1, (self.end_s_R - self.first_s_R) / (self.output_R - 1), np.nan))

    @property
    def queue_s_R(self) -> Floats:
        """Seconds from arrival until the request was first taken into a batch."""
        return np.asarray(self.start_s_R - self.arrival_s_R)

    @cached_property
    def met_R(self) -> NDArray[np.bool_]:
        """Requests that kept the SLO (served, without one)."""
        return (self.slo or Slo()).met(self.ttft_s_R, self.tpot_s_R, self.latency_s_R)

    @property
    def end_s(self) -> float:
        """When the last request was done."""
        return float(np.nanmax(self.end_s_R, initial=0.0))

    @property
    def span_s(self) -> float:
        """Length of the run: until the last request arrived and was done."""
        return max(self.end_s, float(self.arrival_s_R[-1]))

    @property
    def attainment(self) -> float:
        """Share of all requests that kept the SLO."""
        return float(self.met_R.mean())

    @property
    def meets_slo(self) -> bool:
        """True when the SLO's share of requests kept it; without an SLO when all were served."""
        return self.attainment >= (self.slo.share if self.slo else 1.0)

    def attainment_between(self, start_s: float, end_s: float) -> float | None:
        """Share of the requests arriving in start_s <= t < end_s that kept the SLO; None without requests."""
        there = (self.arrival_s_R >= start_s) & (self.arrival_s_R < end_s)
        return float(self.met_R[there].mean()) if there.any() else None

    def done_per_s(self, start_s: float, end_s: float) -> float:
        """Requests finished per second in start_s <= t < end_s."""
        return float(((self.end_s_R >= start_s) & (self.end_s_R < end_s)).sum() / (end_s - start_s))

    def summary(self) -> dict[str, Any]:
        """The figures people compare, JSON-ready."""
        served = np.isfinite(self.end_s_R)
        span = self.span_s
        output = float(self.output_R[served].sum())
        return {
            "name": self.name,
            "requests": len(self.arrival_s_R),
            "served": int(served.sum()),
            "refused": self.refused,
            "span_s": span,
            "requests_per_s": float(served.sum() / span) if span else None,
            "output_tokens_per_s": output / span if span else None,
            "prompt_tokens_per_s": float(self.prompt_R[served].sum() / span) if span else None,
            "goodput_per_s": float(self.met_R.sum() / span) if span else None,
            "attainment": self.attainment,
            "meets_slo": self.meets_slo,
            "ttft_s": spread(self.ttft_s_R),
            "tpot_s": spread(self.tpot_s_R),
            "latency_s": spread(self.latency_s_R),
            "queue_s": spread(self.queue_s_R),
            "sent_back": int(self.again_R.sum()),
            "reused_prompt_tokens": int(self.reused_R.sum()),
            "lost_output_tokens": self.lost_output_tokens,
            "steps": self.steps,
            "utilisation": self.busy_s / self.device_s if self.device_s else None,
            "device_hours": self.device_s / 3600,
            "energy_J": self.energy_J,
            "most_energy_J": self.most_energy_J,
            "output_token_J": self.energy_J / output if self.energy_J is not None and output else None,
            "cost": self.cost,
            "cost_per_million_output_tokens": self.cost / output * 1e6 if self.cost is not None and output else None,
        }

    def to_dict(self, *, requests: bool = True) -> dict[str, Any]:
        """The whole result, JSON-ready; without the rows of single requests when `requests` is False."""
        series = self.series
        rows = {
            "arrival_s": self.arrival_s_R.tolist(),
            "prompt": self.prompt_R.tolist(),
            "output": self.output_R.tolist(),
            "seen_s": _numbers(self.seen_s_R),
            "start_s": _numbers(self.start_s_R),
            "first_token_s": _numbers(self.first_s_R),
            "end_s": _numbers(self.end_s_R),
            "sent_back": self.again_R.tolist(),
            "reused": self.reused_R.tolist(),
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "serving",
            "summary": self.summary(),
            "slo": self.slo.to_dict() if self.slo else None,
            "step_parts_s": dict(self.step_parts_s),
            "series": {
                "bin_s": series.bin_s,
                "waiting": series.waiting_N.tolist(),
                "running": series.running_N.tolist(),
                "cache": series.cache_N.tolist(),
                "output_tokens_per_s": series.output_tokens_per_s_N.tolist(),
                "prompt_tokens_per_s": series.prompt_tokens_per_s_N.tolist(),
            },
            "requests": rows if requests else None,
            "changes": [dict(change) for change in self.changes],
            "seed": self.seed,
            "notes": list(self.notes),
            "inputs": dict(self.inputs),
        }


def spread(values: Floats) -> dict[str, float | None]:
    """Mean and percentiles of the finite values; None without any."""
    known = values[np.isfinite(values)]
    if not len(known):
        return {"mean": None, **dict.fromkeys(f"p{p}" for p in PERCENTILES)}
    return {"mean": float(known.mean()), **{f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(known, PERCENTILES), strict=True)}}


def _numbers(values: Floats) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
