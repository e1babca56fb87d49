"""Synthetic arrivals with seeds: when requests come (four processes) and how long they are (a number, a log-normal law, or drawn from a log).

poisson   independent requests at one rate
gamma     renewal process with gaps of variation `cv` (1: Poisson, above: bursts)
markov    two-state modulated Poisson process: `burst` times the quiet rate in bursts; states last `quiet_s` and `burst_s` on average
diurnal   Poisson whose rate is rate*(1 + swing*cos(2*pi*(t - peak_s)/period_s))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.serving.arrivals import MOST_TOKENS, Arrivals

Floats = NDArray[np.float64]
MOST_REQUESTS = 20_000_000


def generate(
    process: str,
    *,
    requests_per_s: float,
    span_s: float,
    prompt: Lengths | Arrivals | int,
    output: Lengths | Arrivals | int,
    seed: int = 0,
    **shape: float,
) -> Arrivals:
    """Arrivals of `span_s` seconds at a mean rate. `prompt` and `output` are a number of tokens, a `lengths(…)`, or an Arrivals
    whose requests are drawn (prompt and output of one request together, when both are the same Arrivals).

    Extra numbers by process: gamma cv; markov burst, quiet_s, burst_s; diurnal swing, period_s, peak_s.
    Raises InputError for an unknown process or number, values out of range, above 20 million requests, or none.
    """
    if process not in PROCESSES:
        raise InputError(f"arrival process {process!r} is unknown; use one of {', '.join(PROCESSES)}")
    draw, known = PROCESSES[process]
    if unknown := sorted(set(shape) - set(known)):
        raise InputError(f"arrival process {process}: {unknown[0]!r} is no number of it; known: {', '.join(known) or 'none'}")
    for name, value in {"requests_per_s": requests_per_s, "span_s": span_s}.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"arrival process {process}: {name}={value!r} must be finite and > 0")
    if requests_per_s * span_s > MOST_REQUESTS:
        raise InputError(f"{requests_per_s * span_s:,.0f} requests are more than {MOST_REQUESTS:,}; shorten the span")
    if seed < 0:
        raise InputError(f"seed={seed} must be 0 or above")
    values = known | shape
    if wrong := next((name for name, value in values.items() if not (math.isfinite(value) and value >= 0)), None):
        raise InputError(f"arrival process {process}: {wrong}={values[wrong]!r} must be finite and >= 0")
    rng = np.random.default_rng(seed)
    arrival_s = draw(rng, requests_per_s, span_s, **values)
    if not len(arrival_s):
        raise InputError(f"{requests_per_s:g} requests/s over {span_s:g} s gave no request with seed {seed}; lengthen the span")
    count = len(arrival_s)
    if isinstance(prompt, Arrivals) and prompt is output:
        row = rng.integers(len(prompt), size=count)
        lengths_of = (prompt.prompt_R[row], prompt.output_R[row])
    else:
        lengths_of = (_drawn(prompt, rng, count, "prompt_R"), _drawn(output, rng, count, "output_R"))
    return Arrivals(
        arrival_s_R=arrival_s,
        prompt_R=lengths_of[0],
        output_R=lengths_of[1],
        name=process,
        made_from={"process": process, "requests_per_s": requests_per_s, "span_s": span_s, "seed": seed, **values},
    )


class Lengths:
    """A law of request lengths: draws whole tokens of at least 1."""

    def __init__(self, draw: Callable[[np.random.Generator, int], Floats]) -> None:
        self.draw = draw


def lognormal(mean: float, *, cv: float = 1.0, most: int = MOST_TOKENS) -> Lengths:
    """Lengths of a log-normal law with this mean and variation, cut off at `most` tokens."""
    if not (1 <= mean <= most and cv > 0 and math.isfinite(cv)):
        raise InputError(f"log-normal lengths: mean={mean!r} must be 1 to most={most!r}, cv={cv!r} finite and > 0")
    variance = math.log1p(cv * cv)
    return Lengths(lambda rng, n: np.minimum(rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), n), most))


def _drawn(law: Any, rng: np.random.Generator, count: int, which: str) -> NDArray[np.int64]:
    if isinstance(law, Arrivals):
        return np.asarray(getattr(law, which)[rng.integers(len(law), size=count)])
    if isinstance(law, Lengths):
        return np.maximum(1, np.rint(law.draw(rng, count))).astype(np.int64)
    if isinstance(law, int) and law >= 1:
        return np.full(count, law, np.int64)
    raise InputError(f"lengths {law!r}: give a whole number of tokens >= 1, lognormal(…), or Arrivals to draw from")


def _poisson(rng: np.random.Generator, rate: float, span_s: float) -> Floats:
    return np.sort(rng.uniform(0.0, span_s, rng.poisson(rate * span_s)))


def _gamma(rng: np.random.Generator, rate: float, span_s: float, cv: float) -> Floats:
    if cv <= 0:
        raise InputError(f"gamma arrivals: cv={cv!r} must be > 0")
    shape = 1 / cv**2
    times, start = [], 0.0
    while start < span_s:
        gaps = rng.gamma(shape, 1 / (rate * shape), int(rate * span_s * 0.2) + 64)
        times.append(start + np.cumsum(gaps))
        start = float(times[-1][-1])
    merged = np.concatenate(times)
    return merged[merged < span_s]


def _markov(rng: np.random.Generator, rate: float, span_s: float, burst: float, quiet_s: float, burst_s: float) -> Floats:
    if min(burst, quiet_s, burst_s) <= 0:
        raise InputError("markov arrivals: burst, quiet_s and burst_s must be > 0")
    quiet = rate * (quiet_s + burst_s) / (quiet_s + burst * burst_s)  # so that the mean is `rate`
    pairs = int(2 * span_s / (quiet_s + burst_s)) + 64
    lengths = np.stack([rng.exponential(quiet_s, pairs), rng.exponential(burst_s, pairs)], axis=1).ravel()
    first = int(rng.random() < burst_s / (quiet_s + burst_s))  # begins as it would be found at a random time
    edges = np.concatenate([[0.0], np.cumsum(lengths[first:])])
    while edges[-1] < span_s:
        more = np.stack([rng.exponential(quiet_s, pairs), rng.exponential(burst_s, pairs)], axis=1).ravel()[(len(edges) - 1 + first) % 2 :]
        edges = np.concatenate([edges, edges[-1] + np.cumsum(more)])
    edges = np.append(edges[edges < span_s], span_s)
    rates = quiet * np.where((np.arange(len(edges) - 1) + first) % 2 == 1, burst, 1.0)
    counts = rng.poisson(rates * np.diff(edges))
    return np.sort(np.repeat(edges[:-1], counts) + rng.random(int(counts.sum())) * np.repeat(np.diff(edges), counts))


def _diurnal(rng: np.random.Generator, rate: float, span_s: float, swing: float, period_s: float, peak_s: float) -> Floats:
    if not 0 <= swing <= 1 or period_s <= 0:
        raise InputError(f"diurnal arrivals: swing={swing!r} must be 0 to 1 and period_s={period_s!r} > 0")
    times = np.sort(rng.uniform(0.0, span_s, rng.poisson(rate * (1 + swing) * span_s)))
    keep = rng.random(len(times)) * (1 + swing) < 1 + swing * np.cos(2 * np.pi * (times - peak_s) / period_s)
    return times[keep]


PROCESSES: dict[str, tuple[Callable[..., Floats], dict[str, float]]] = {
    "poisson": (_poisson, {}),
    "gamma": (_gamma, {"cv": 2.0}),
    "markov": (_markov, {"burst": 5.0, "quiet_s": 60.0, "burst_s": 10.0}),
    "diurnal": (_diurnal, {"swing": 0.6, "period_s": 86400.0, "peak_s": 54000.0}),
}
