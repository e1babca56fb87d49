"""Tasks on streams: order, priorities, interruption, shared compute, and the two ways a graph can be wrong."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.sim.fabric import Fabric
from moesim.sim.ledger import charge
from moesim.sim.streams import Runner
from moesim.sim.tasks import Block, Task


def execute(*blocks: list[Task], capacity: tuple[float, ...] = (1.0,)) -> Runner:
    program = (Block(label=(i, 0), tasks=tasks, span=((), tasks)) for i, tasks in enumerate(blocks))
    runner = Runner(Fabric(simpy.Environment(), np.asarray(capacity)), program)
    runner.run()
    return runner


def times(*tasks: Task) -> list[tuple[float, float]]:
    return [(task.start, task.end) for task in tasks]


def test_a_stream_runs_one_task_at_a_time_in_order_of_readiness() -> None:
    a, b = Task("a", "compute", 2.0, device=0), Task("b", "compute", 3.0, device=0)
    c = Task("c", "compute", 1.0, (a,), device=1)
    d = Task("d", "compute", 1.0, (c, b), device=0)
    runner = execute([a, b, c, d])
    assert times(a, b, c, d) == [(0, 2), (2, 5), (2, 3), (5, 6)]
    assert runner.streams["compute", 0].busy_s == 6
    assert d.cause is b
    path: dict[str, float] = defaultdict(float)
    charge(path, d, None, 0.0, 6.0)
    assert path == {"d": 1.0, "b": 3.0, "a": 2.0}


def test_the_more_urgent_task_goes_first_even_when_both_are_ready_at_once() -> None:
    a = Task("a", "compute", 1.0, device=0)
    low, high = Task("low", "h2d", 1.0, (a,), device=0, priority=1), Task("high", "h2d", 1.0, (a,), device=0)
    blocked = Task("blocked", "h2d", 2.0, device=0)
    execute([a, low, high, blocked])
    assert times(blocked, high, low) == [(0, 2), (2, 3), (3, 4)]


def test_a_copy_in_chunks_gives_way_at_the_next_chunk() -> None:
    bulk = Task("bulk", "h2d", 10.0, device=0, chunk_s=2.0, priority=1)
    wake = Task("wake", "compute", 3.0, device=0)
    miss = Task("miss", "h2d", 1.5, (wake,), device=0)
    runner = execute([bulk, wake, miss])
    assert times(miss, bulk) == [(4, 5.5), (0, 11.5)]
    assert runner.streams["h2d", 0].busy_s == pytest.approx(11.5)
    whole = Task("whole", "h2d", 10.0, device=0, priority=1)
    wake, late = Task("wake", "compute", 3.0, device=0), None
    late = Task("late", "h2d", 1.5, (wake,), device=0)
    execute([whole, wake, late])
    assert times(late) == [(10, 11.5)], "without chunks it waits for the whole copy"


def test_what_gave_way_goes_on_before_others_of_its_priority() -> None:
    first, second = Task("first", "h2d", 6.0, device=0, chunk_s=2.0, priority=1), Task("second", "h2d", 1.0, device=0, priority=1)
    wake = Task("wake", "compute", 1.0, device=0)
    miss = Task("miss", "h2d", 1.0, (wake,), device=0)
    later = Task("later", "h2d", 1.0, (miss,), device=0)
    runner = execute([first, second, wake, miss, later])
    assert times(miss, later, first, second) == [(2, 3), (3, 4), (0, 8), (8, 9)]
    assert runner.events == 5 + 2, "the end that was set first, and the end of the chunk"
    with pytest.raises(SimulationError, match="compute is not interrupted"):
        Task("experts", "compute", 1.0, device=0, chunk_s=0.5)


def test_a_task_ends_once_when_its_time_changes_and_changes_back() -> None:
    compute = Task("experts", "compute", 10.0, device=0)
    first = Task("dispatch", "exchange", 4.0, sm_share=0.5)
    second = Task("combine", "exchange", 2.0, (first,), sm_share=0.5)
    after = Task("after", "compute", 1.0, (compute,), device=0)
    runner = execute([compute, first, second, after])
    assert times(first, second, compute, after) == [(0, 4), (4, 6), (0, 13), (13, 14)]
    assert runner.tasks == 4
    assert runner.events == 4 + 4, "compute has a new time whenever a collective begins or ends"


def test_a_collective_of_the_next_block_slows_what_lets_it_in() -> None:
    head, beside = Task("experts", "compute", 4.0, device=0), Task("gather", "weights", 2.0, sm_share=0.5)
    execute([head], [beside])
    assert times(head, beside) == [(0, 5), (0, 2)]


def test_communication_slows_running_compute_by_its_share() -> None:
    compute = Task("experts", "compute", 10.0, device=0)
    first = Task("wake", "h2d", 2.0, device=0)
    comm = Task("dispatch", "exchange", 4.0, (first,), sm_share=0.25)
    execute([compute, first, comm])
    # 2 s at full speed, 4 s at 3/4, 5 s left
    assert times(comm, compute) == [(2, 6), (0, 11)]


def test_two_collectives_share_a_link_and_take_turns_on_one_stream() -> None:
    load = np.asarray([10.0])
    a, b = (Task("dispatch", stream, 0.0, load_K=load) for stream in ("exchange", "weights"))
    execute([a, b], capacity=(5.0,))
    assert times(a, b) == [(0, 4), (0, 4)]
    c, d = (Task("dispatch", "exchange", 0.0, load_K=load) for _ in range(2))
    execute([c, d], capacity=(5.0,))
    assert times(c, d) == [(0, 2), (2, 4)]


def test_a_cycle_is_named() -> None:
    a = Task("gate", "compute", 1.0, device=0, label=(0, 7))
    b = Task("dispatch", "exchange", 1.0, (a,), label=(0, 7))
    c = Task("experts", "compute", 1.0, (b,), device=0, label=(0, 7))
    a.after = (c,)
    with pytest.raises(
        SimulationError, match=r"gate of step 0, layer 7 on device 0.*waits for experts.*waits for dispatch.*waits for gate.*remove one"
    ):
        execute([a, b, c])


def test_a_task_whose_cause_never_comes_is_named() -> None:
    lost = Task("fetch", "h2d", 1.0, device=3, label=(2, 5))
    a, b = Task("gate", "compute", 1.0, device=3), Task("experts", "compute", 1.0, (lost,), device=3, label=(2, 5))
    with pytest.raises(SimulationError, match=r"nothing can progress at 1 s: experts of step 2, layer 5 on device 3 .* waits for fetch of step 2"):
        execute([a, b])


def test_impossible_costs_are_refused() -> None:
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SimulationError, match="finite and >= 0"):
            Task("experts", "compute", bad, device=0)
    half = [Task("dispatch", stream, 1.0, sm_share=0.5) for stream in ("exchange", "weights")]
    with pytest.raises(SimulationError, match="take all compute"):
        execute(half)


@given(seed=st.integers(0, 10**6), tasks=st.integers(1, 40))
def test_schedules_obey_dependencies_streams_and_are_never_idle_without_reason(seed: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    made: list[Task] = []
    waits_for: list[list[Task]] = []
    for _ in range(tasks):
        after = [made[i] for i in rng.choice(len(made), min(len(made), rng.integers(0, 4)), replace=False)] if made else []
        made.append(Task("t", "compute", float(rng.integers(0, 5)), after, device=int(rng.integers(0, 3)), priority=int(rng.integers(0, 3))))
        waits_for.append(after)
    execute([made[i] for i in rng.permutation(tasks)])
    for task, after in zip(made, waits_for, strict=True):
        ready = max((other.end for other in after), default=0.0)
        assert task.start >= ready
        assert task.end == pytest.approx(task.start + task.work_s)
        before = [other for other in made if other.device == task.device and other is not task and other.work_s > 0]
        assert all(other.end <= task.start + 1e-9 or other.start >= task.end - 1e-9 for other in before if task.work_s > 0)
        if task.start > ready:  # then its stream was busy all the time from ready to start
            busy = sum(min(o.end, task.start) - max(o.start, ready) for o in before if o.end > ready and o.start < task.start)
            assert busy == pytest.approx(task.start - ready)
