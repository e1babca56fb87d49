"""Capacity: the most requests per second a deployment serves within its objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.serving.arrivals import Arrivals
from moesim.serving.deployment import Deployment
from moesim.serving.serve import serve
from moesim.serving.slo import Slo

SPAN_S = 60.0  # shortest run: an overload must have time to show
MOST = 50_000  # requests of a run
ENOUGH = 5_000  # requests traffic is told by
ALONE_S, ALONE = 1e4, 100  # requests served one by one, so far apart
HIGHEST = 1e6  # requests per second beyond which nobody looks


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Highest rate found to keep the objectives, the lowest found not to, and how often it was tried."""

    requests_per_s: float
    too_many_per_s: float
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"requests_per_s": self.requests_per_s, "too_many_per_s": self.too_many_per_s, "runs": self.runs}


def steady(arrivals: Arrivals, interval_s: float, *, most: int = ENOUGH) -> Arrivals:
    """One request per second on average in every interval: slow changes of traffic are gone, bursts inside an interval stay.

    Each interval's clock is stretched by its own rate, and intervals without requests are left out; beyond `most` requests,
    intervals are taken evenly from the whole. Length and order of requests stay.
    """
    place_R = (arrivals.arrival_s_R // interval_s).astype(np.int64)
    known, count = np.unique(place_R, return_counts=True)
    keep = np.arange(len(known))
    if len(arrivals) > most:
        keep = np.unique(np.linspace(0, len(known) - 1, max(1, int(len(known) * most / len(arrivals)))).astype(np.int64))
    rows = np.flatnonzero(np.isin(place_R, known[keep]))[:MOST]
    start = np.concatenate([[0], np.cumsum(count[keep])])
    index_R = np.searchsorted(known[keep], place_R[rows])
    times = start[index_R] + (arrivals.arrival_s_R[rows] / interval_s - place_R[rows]) * count[keep][index_R]
    return replace(arrivals.take(rows, f"{len(rows)} requests, slow changes of traffic removed"), arrival_s_R=times, name=f"{arrivals.name}, steady")


def capacity(arrivals: Arrivals, deployment: Deployment, slo: Slo, *, seed: int = 0, within: float = 0.05) -> Capacity:
    """Capacity for traffic that comes as these requests do, faster or slower, by bisection to a share `within`.

    A rate is kept when the SLO's share of all requests keeps every limit. Runs last a minute, or twenty times the longest limit,
    repeating the requests where they are too few, up to 50,000; copies share nothing in a prefix cache. Where requests miss even
    when served one by one, it is 0.
    The deployment must be prepared (or have a plain law). Raises InputError for an SLO without limits.
    """
    limits = [limit for limit in (slo.ttft_s, slo.tpot_s, slo.latency_s) if limit is not None]
    if not limits:
        raise InputError("capacity needs an SLO with a limit, such as ttft=2s; without one every rate is served some day")
    span_s, count, runs = max(SPAN_S, 20 * max(slo.ttft_s or 0.0, slo.latency_s or 0.0)), len(arrivals), 0
    period_s = arrivals.span_s * (1 + 1 / count) or 1.0

    def kept(rate: float) -> bool:
        copies = max(1, math.ceil(span_s * rate / count))
        times = (arrivals.arrival_s_R[None] + period_s * np.arange(copies)[:, None]).ravel()[: max(MOST, count)] * (count / period_s / rate)
        return served(arrivals.copied(times, arrivals.name))

    def served(requests: Arrivals) -> bool:
        nonlocal runs
        runs += 1
        return serve(requests, deployment, slo=slo, seed=seed).meets_slo

    some = np.unique(np.linspace(0, count - 1, min(count, ALONE)).astype(np.int64))
    if not served(replace(arrivals.take(some, "one by one"), arrival_s_R=np.arange(0.0, len(some)) * ALONE_S)):
        return Capacity(requests_per_s=0.0, too_many_per_s=1 / ALONE_S, runs=runs)
    rate = 1.0
    if kept(rate):
        while kept(2 * rate) and rate < HIGHEST:
            rate *= 2
        low, high = rate, 2 * rate
    else:
        while not kept(rate / 2):
            rate /= 2
            if rate < 1 / ALONE_S:
                return Capacity(requests_per_s=0.0, too_many_per_s=rate, runs=runs)
        low, high = rate / 2, rate
    while high / low > 1 + within:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kept(middle) else (low, middle)
    return Capacity(requests_per_s=low, too_many_per_s=high, runs=runs)
