"""What the event engine costs and what it never does: time and memory of long runs, SimPy events, links over capacity."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import simpy
from test_event import MODEL, plan_of, trace_at

from moesim.hardware import load_cluster, load_device, load_hosts
from moesim.sim import simulate
from moesim.sim.dense import Mode
from moesim.sim.event import EventResult, simulate_event
from moesim.sim.fabric import Fabric
from moesim.sim.streams import Runner
from moesim.sim.tasks import Task
from moesim.systems import SYSTEMS
from moesim.trace import Trace


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return trace_at(tmp_path_factory.mktemp("t") / "trace", MODEL, 1200)


def test_the_time_is_linear_in_steps_and_no_task_outlives_two_of_them(tmp_path: Path) -> None:
    def live(steps: int) -> tuple[int, int]:
        trace = trace_at(tmp_path / f"t{steps}", MODEL, 64 * steps)
        most = [0]
        original = Task.__init__

        def counted(self: Task, *args: object, **keys: object) -> None:
            original(self, *args, **keys)  # type: ignore[arg-type]
            made[0] += 1
            if made[0] % 1000 == 0:
                most[0] = max(most[0], sum(type(o) is Task for o in gc.get_objects()))

        made = [0]
        gc.collect()  # what earlier tests left
        Task.__init__ = counted  # type: ignore[method-assign]
        try:
            event = simulate_event(trace, plan_of(MODEL, 8), load_cluster("h100x8"), tokens_per_device=8, mode="training")
        finally:
            Task.__init__ = original  # type: ignore[method-assign]
        assert event.tasks == made[0]
        assert event.tasks <= event.events < 1.1 * event.tasks
        return event.tasks, most[0]

    (few, held), (many, held_longer) = live(10), live(40)
    assert many == 4 * few
    assert max(held, held_longer) <= 3 * few / 10, "the step that runs, the one before, and what is being built"


@pytest.mark.parametrize("name", ["fsmoe", "tutel", "hecate", "pre-gated"])
def test_no_link_is_over_capacity_at_any_time_and_events_are_what_simpy_calls_back(routed: Trace, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = replace(load_cluster("h100-4x8"), oversubscription=4.0, host_G=(load_hosts()["workstation"],) * 32)
    system = replace(SYSTEMS[name], exchange=replace(SYSTEMS[name].exchange, sm_share=0.1))
    share, step = Fabric._share, simpy.Environment.step
    seen: Counter[str] = Counter()

    def checked(self: Fabric) -> None:
        share(self)
        seen["rates"] += 1
        assert (self.used_K <= self.capacity_K * (1 + 1e-9)).all()

    def counted(self: simpy.Environment) -> None:
        step(self)
        seen["events"] += 1

    monkeypatch.setattr(Fabric, "_share", checked)
    monkeypatch.setattr(simpy.Environment, "step", counted)
    mode = "decode" if system.residency else "training"
    event = simulate_event(routed, plan_of(MODEL, 32), cluster, tokens_per_device=8, system=system, mode=mode, contention=True)  # type: ignore[arg-type]
    assert seen["rates"] > 0
    assert event.events == seen["events"]


def test_memory_is_flat_in_steps_beside_the_arrays_of_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.sim.event.CHUNK_TOKENS", 1280)  # 20 steps are read at a time

    def working_B(steps: int) -> int:
        trace, found = trace_at(tmp_path / f"t{steps}", MODEL, 64 * steps), [0]
        original = Runner.run

        def traced(self: Runner) -> None:
            tracemalloc.start()
            original(self)
            kept_B, peak_B = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            found[0] = peak_B - kept_B

        with monkeypatch.context() as patch:
            patch.setattr(Runner, "run", traced)
            simulate_event(trace, plan_of(MODEL, 8), load_cluster("h100x8"), tokens_per_device=8, mode="decode", contention=True)
        return found[0]

    working_B(20)  # compiles and loads
    assert working_B(160) < 1.25 * working_B(40)


@pytest.mark.parametrize("mode", ["decode", "training"])
def test_tasks_and_events_are_linear_in_layers(mode: Mode, tmp_path: Path) -> None:
    def run(layers: int) -> EventResult:
        model = replace(MODEL, layers=layers, moe_layers=tuple(range(layers)))
        trace = trace_at(tmp_path / f"{layers}", model, 256)
        return simulate_event(trace, plan_of(model, 8), load_cluster("h100x8"), tokens_per_device=8, mode=mode, contention=True)

    first, second, third = (run(layers) for layers in (4, 8, 12))
    assert third.tasks - second.tasks == second.tasks - first.tasks > 0
    assert third.events - second.events == second.events - first.events > 0


def test_experts_that_fit_no_memory_are_named_by_both_engines(routed: Trace) -> None:
    device = load_device("h100-sxm")
    small = replace(device, memories=tuple(replace(memory, capacity_B=50e6) for memory in device.memories))
    cluster = replace(load_cluster("h100x8"), devices=(small,) * 8)
    for run in (simulate, simulate_event):
        notes = run(routed, plan_of(MODEL, 8), cluster, tokens_per_device=8).notes  # type: ignore[operator]
        assert any(note.startswith("does not fit: device 0") for note in notes)
