"""The batch loop as a plain server, against queueing theory: waiting times within 2 % of the closed forms."""

from __future__ import annotations

import math
from heapq import heappop, heappush

import numpy as np
import pytest

from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.serving import Arrivals, Deployment, ServingResult, StepLaw, first_devices, serve

TOKENS = 20_000  # of a mean service: whole tokens of 50 us stand for a second
MODEL = load_model("qwen3-30b-a3b")
ONE = first_devices(load_cluster("h100x8"), 1)


def server(servers: int) -> Deployment:
    """Servers that take one request at a time from one queue; a request lasts as long as its prompt."""
    law = StepLaw.plain(token_s=1 / TOKENS, tokens=TOKENS * 64)
    return Deployment(
        model=MODEL, cluster=ONE, replicas=servers, max_seqs=1, max_batch_tokens=TOKENS * 64, cache_tokens=TOKENS * 65, balance="shared", law=law
    )


def queue(load: float, servers: int, services: str, requests: int = 1_000_000, seed: int = 1) -> ServingResult:
    """Poisson arrivals at `load` requests per second and server, services of mean 1 s."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / (load * servers), requests))
    service = {
        "exponential": lambda: rng.exponential(1, requests),
        "constant": lambda: np.ones(requests),
        "lognormal": lambda: rng.lognormal(-0.5 * math.log(1.5), math.sqrt(math.log(1.5)), requests),  # variation^2 0.5
    }[services]()
    tokens = np.maximum(1, np.rint(service * TOKENS)).astype(np.int64)
    return serve(Arrivals(arrival_s_R=arrival, prompt_R=tokens, output_R=np.ones(requests, np.int64)), server(servers))


def erlang_c(load: float, servers: int) -> float:
    """Chance of having to wait in M/M/k."""
    offered = load * servers
    terms = [offered**n / math.factorial(n) for n in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - load)
    return last / (sum(terms) + last)


@pytest.mark.parametrize(("load", "services", "squared_variation"), [(0.5, "exponential", 1.0), (0.5, "constant", 0.0), (0.5, "lognormal", 0.5)])
def test_one_server_waits_as_pollaczek_and_khinchine_say(load: float, services: str, squared_variation: float) -> None:
    found = queue(load, 1, services)
    assert found.queue_s_R.mean() == pytest.approx(load / (1 - load) * (1 + squared_variation) / 2, rel=0.02)
    assert found.busy_s / found.span_s == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize(("load", "servers"), [(0.6, 2), (0.7, 5)])
def test_several_servers_wait_as_erlang_says(load: float, servers: int) -> None:
    found = queue(load, servers, "exponential")
    assert found.queue_s_R.mean() == pytest.approx(erlang_c(load, servers) / (servers * (1 - load)), rel=0.02)
    assert (found.queue_s_R > 1e-12).mean() == pytest.approx(erlang_c(load, servers), rel=0.02)


@pytest.mark.parametrize(("load", "servers", "services"), [(0.9, 1, "lognormal"), (0.95, 3, "exponential"), (0.9, 4, "constant")])
def test_every_wait_is_that_of_kiefer_and_wolfowitz(load: float, servers: int, services: str) -> None:
    """The first free server takes the first request that waits: request by request, without sampling error."""
    found = queue(load, servers, services, requests=20_000)
    free = [0.0] * servers
    waits = []
    for arrival, tokens in zip(found.arrival_s_R.tolist(), found.prompt_R.tolist(), strict=True):
        start = max(arrival, heappop(free))
        waits.append(start - arrival)
        heappush(free, start + tokens / TOKENS)
    assert found.queue_s_R == pytest.approx(waits, abs=1e-6)


@pytest.mark.parametrize("services", ["exponential", "constant", "lognormal"])
def test_with_enough_servers_only_the_mean_service_counts(services: str) -> None:
    """M/G/infinity: nobody waits, and the number in service is Poisson whatever the law of service."""
    found = queue(0.25, 16, services, requests=60_000)
    assert found.queue_s_R.max() < 0.5 and (found.queue_s_R > 1e-12).mean() < 1e-3
    assert found.latency_s_R.mean() == pytest.approx(1.0, rel=0.02)
    edge = found.arrival_s_R[-1] * 0.05
    when = np.sort(np.random.default_rng(0).uniform(edge, found.arrival_s_R[-1] - edge, 20_000))
    inside = np.searchsorted(found.arrival_s_R, when) - np.searchsorted(np.sort(found.end_s_R), when)
    assert inside.mean() == pytest.approx(4.0, rel=0.02)
    assert inside.var() == pytest.approx(inside.mean(), rel=0.05)


def test_waiting_grows_without_bound_when_overloaded() -> None:
    found = queue(1.25, 1, "constant", requests=20_000)
    late, early = found.queue_s_R[-2000:].mean(), found.queue_s_R[8000:10_000].mean()
    assert late / early == pytest.approx(19_000 / 9_000, rel=0.1)
    assert found.end_s == pytest.approx(20_000, rel=1e-3)  # the server never idles
    assert found.busy_s == pytest.approx(found.end_s, rel=0.01)
