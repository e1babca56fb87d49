"""Capacity: the most a deployment serves within its objectives, on traffic freed of its tide."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.serving import Arrivals, Deployment, Slo, StepLaw, first_devices, generate
from moesim.serving.capacity import capacity, steady

MODEL = load_model("deepseek-v2-lite")
H100 = load_cluster("h100x8")


def test_capacity_is_that_of_the_queue() -> None:
    """One place, one step of 10 ms a request: M/D/1. The share of waits below w at rate r is exact (Crommelin 1932)."""
    one = Deployment(model=MODEL, cluster=first_devices(H100, 1), cache_tokens=100_000, max_seqs=1, law=StepLaw.plain(step_s=0.01, tokens=8192))
    requests = generate("poisson", requests_per_s=5.0, span_s=4000.0, prompt=8, output=1, seed=0)
    slo = Slo(ttft_s=0.05, share=0.95)
    found = capacity(requests, one, slo)

    def within(rate: float, wait_s: float) -> float:
        load, whole = rate * 0.01, int(wait_s / 0.01)
        terms = (math.exp(load * (wait_s / 0.01 - k)) * (-load * (wait_s / 0.01 - k)) ** k / math.factorial(k) for k in range(whole + 1))
        return (1 - load) * sum(terms)

    exact = max(rate for rate in np.linspace(1, 99, 981) if within(rate, 0.04) >= 0.95)
    assert found.requests_per_s == pytest.approx(exact, rel=0.08)
    assert found.requests_per_s < found.too_many_per_s <= found.requests_per_s * 1.051
    assert capacity(requests, one, Slo(ttft_s=1e-3)).requests_per_s == 0
    with pytest.raises(InputError, match="needs an SLO"):
        capacity(requests, one, Slo())


def test_steady_traffic_keeps_bursts_and_loses_the_tide() -> None:
    tide = generate("diurnal", requests_per_s=4.0, span_s=2000.0, prompt=8, output=1, swing=0.9, period_s=2000.0, seed=0)
    flat = steady(tide, 100.0, most=10_000)
    np.testing.assert_array_equal(flat.prompt_R, tide.prompt_R)
    assert flat.span_s == pytest.approx(len(tide), abs=2)
    by_hundred = flat.per_second(100.0)
    assert by_hundred[:-1].std() < 0.15 < tide.per_second(100.0).std() / 4
    burst = Arrivals(arrival_s_R=np.repeat(np.arange(0.0, 1000.0, 10.0), 20), prompt_R=np.ones(2000), output_R=np.ones(2000))
    np.testing.assert_allclose(np.diff(np.unique(steady(burst, 100.0).arrival_s_R)), 20.0)
    assert len(steady(tide, 100.0, most=1000)) < len(tide) / 3
