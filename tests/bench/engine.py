"""The event engine: DeepSeek-V3 decoding on 64 devices in 8 nodes that share their links.

A task is work of one device or collective on one stream. An event is what SimPy calls back for: the end of a task, a time that
has changed since it was set, or the next arrival on the links. Both rates are of all seconds of processor time: reading, routing,
costs, building tasks and running them. "Distinct" runs on devices whose memories differ, so that no two tasks end together.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import simpy

from moesim.hardware import Cluster, load_cluster
from moesim.model import load_model
from moesim.plan import Placement, Plan, slots_per_device
from moesim.sim.event import EventResult, simulate_event
from moesim.trace import TraceWriter, load_trace
from tests.bench.registry import Measured, bench

STEPS, TOKENS = 20, 8  # of each device in a step


def uneven(cluster: Cluster) -> Cluster:
    """The cluster with memories of 90 to 100 % of their speed, another for each device."""
    rng = np.random.default_rng(0)
    devices = []
    for g, device in enumerate(cluster.devices):
        share = float(rng.uniform(0.9, 1.0))
        memories = tuple(replace(memory, bandwidth_Bps=memory.bandwidth_Bps * share) for memory in device.memories)
        devices.append(replace(device, name=f"{device.name}-{g}", memories=memories))
    return replace(cluster, devices=tuple(devices))


def decoding(*, distinct: bool = False) -> tuple[int, int, float]:
    """Tasks that ended, events it took, and seconds of processor time of the quickest of five runs."""
    model, cluster = load_model("deepseek-v3"), load_cluster("b200-8x8")
    cluster = uneven(cluster) if distinct else cluster
    layers, tokens = len(model.moe_layers), STEPS * TOKENS * cluster.size
    rng = np.random.default_rng(0)
    share = model.experts // model.top_k
    ids = rng.integers(0, share, (tokens, layers, model.top_k), dtype=np.uint16) + np.arange(model.top_k, dtype=np.uint16) * share
    rows = np.tile(np.arange(model.experts), (layers, 1))
    placement = Placement(slots_LP=rows, slots_G=slots_per_device(model.experts, cluster.size), experts=model.experts, layers=model.moe_layers)
    plan = Plan(name="in order", model=model.name, model_digest=model.digest, placement=placement)
    with tempfile.TemporaryDirectory() as folder:
        with TraceWriter(Path(folder) / "trace", model, weights=False) as writer:
            writer.append(ids)
        trace = load_trace(Path(folder) / "trace")

        def run() -> EventResult:
            return simulate_event(trace, plan, cluster, mode="decode", tokens_per_device=TOKENS, contention=True)

        found = run()  # compiles and loads
        spent = []
        for _ in range(5):
            begin = time.process_time()
            found = run()
            spent.append(time.process_time() - begin)
    return found.tasks, found.events, min(spent)


def tasks_ended(*, distinct: bool) -> Measured:
    """Tasks that end per second, beside bare SimPy timeouts."""
    tasks, _, spent_s = decoding(distinct=distinct)
    return Measured(value=tasks / spent_s, unit="tasks ended/s", peer="bare SimPy timeouts", peer_value=timeouts(tasks))


def events_passed(*, distinct: bool) -> Measured:
    """SimPy events per second of the same run, beside the same."""
    _, events, spent_s = decoding(distinct=distinct)
    return Measured(value=events / spent_s, unit="SimPy events/s", peer="bare SimPy timeouts", peer_value=timeouts(events))


@bench
def event_engine() -> Measured:
    """Equal devices: most tasks end together with others."""
    return tasks_ended(distinct=False)


@bench
def event_engine_events() -> Measured:
    """The same run."""
    return events_passed(distinct=False)


@bench
def engine_tasks_distinct() -> Measured:
    """Every device at its own pace."""
    return tasks_ended(distinct=True)


@bench
def engine_events_distinct() -> Measured:
    """The same run."""
    return events_passed(distinct=True)


def timeouts(count: int) -> float:
    """SimPy timeouts per second of processor time, one after the other in one process."""

    def wait(env: simpy.Environment) -> object:
        for _ in range(count):
            yield env.timeout(1.0)

    env = simpy.Environment()
    env.process(wait(env))  # type: ignore[arg-type]
    begin = time.process_time()
    env.run()
    return count / (time.process_time() - begin)
