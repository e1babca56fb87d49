"""Serving DeepSeek-V2-Lite on 8 devices, data-parallel attention, experts spread over all, routed from a trace."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.serving import Arrivals, Deployment, Routing, generate, lognormal, serve
from moesim.trace import TraceWriter, load_trace
from tests.bench.registry import Measured, bench
from tests.bench.traces import routing


@cache
def deployment() -> Deployment:
    """Ready to serve; experts are chosen as in the benchmarks' trace."""
    model = load_model("deepseek-v2-lite")
    ids = routing(1 << 14)
    with tempfile.TemporaryDirectory() as folder:
        with TraceWriter(Path(folder) / "trace", model, top_k=ids.shape[2], weights=False) as writer:
            writer.append(ids, sequence=np.arange(len(ids)) // 256)
        source = Routing.of(load_trace(Path(folder) / "trace"))
    return Deployment(model=model, cluster=load_cluster("h100x8")).prepared(source)


def day(requests: int) -> Arrivals:
    """A day of 200,000 requests of 200 output tokens on average, or so much of its start."""
    whole = generate("diurnal", requests_per_s=200_000 / 86_400, span_s=86_400, prompt=lognormal(1000), output=lognormal(200, most=4000), seed=0)
    return whole.first(requests)


def seconds(requests: Arrivals) -> tuple[float, float]:
    """Processor seconds and output tokens of a run, compiled before."""
    serve(requests.first(10), deployment())
    begin = time.process_time()
    found = serve(requests, deployment())
    return time.process_time() - begin, float(found.output_R.sum())


@bench
def serving_tokens() -> Measured:
    """Simulated output tokens per second of processor time, one rank full of requests."""
    busy = day(20_000)
    spent, tokens = seconds(replace(busy, arrival_s_R=busy.arrival_s_R / 50))
    return Measured(value=tokens / spent, unit="output tokens/s")


@bench
def serving_day() -> Measured:
    """Processor seconds of a whole day."""
    return Measured(value=seconds(day(1 << 20))[0], unit="s")


@bench
def serving_preparation() -> Measured:
    """Processor seconds until a deployment is ready: batches routed and timed."""
    ready = replace(deployment(), law=None)
    source = Routing.typical(ready.model)
    ready.prepared(source)
    begin = time.process_time()
    ready.prepared(source)
    return Measured(value=time.process_time() - begin, unit="s")
