"""Planning while serving: a trace replayed in windows, planned again where the gain pays for the move; against two plain habits.

    static      keeps the first plan
    periodic    EPLB from scratch every so many windows, whatever it moves (what engines with a balancer do)
    ours        after each window plans from the live plan, with the last window's tokens and with the last few windows'; such a plan
                is taken over if on the next window, which it has not seen, its gain over the horizon exceeds the time of its copies

What a plan gains on the tokens it was made from is mostly their noise; one window of proof costs one window of delay.
No habit is judged on tokens its plan was made from. Times are of MoE layers
alone, all layers of a step; serving stands still while experts are copied. Suffixes: W windows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.optimize.constraints import Constraints
from moesim.optimize.migration import copies_s, layer_s_L
from moesim.optimize.place import run_solver
from moesim.optimize.problem import Problem, Progress
from moesim.plan import Placement, slots_per_device
from moesim.trace import Trace, TraceStats

MEMORY = 4  # windows that the second of the two candidates is made from


@dataclass(kw_only=True)
class Habit:
    """One way to plan, as it goes along: its live plan, and per window the seconds served, stalled, and the experts moved."""

    name: str
    live: Placement
    served_s_W: list[float] = field(default_factory=list)
    stall_s_W: list[float] = field(default_factory=list)
    moves_W: list[int] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        """Serving and standing still."""
        return sum(self.served_s_W) + sum(self.stall_s_W)

    def serve(self, problem: Problem, steps: float) -> None:
        """One window of `steps` steps under the live plan."""
        self.served_s_W.append(float(layer_s_L(problem, self.live).sum()) * steps)

    def move(self, new: Placement, cost: CostModel) -> None:
        """Take a plan over before the next window."""
        migration = self.live.diff(new, node_G=cost.cluster.node_G)
        self.stall_s_W.append(copies_s(cost, migration))
        self.moves_W.append(len(migration))
        self.live = new


def online(
    trace: Trace,
    cluster: Cluster,
    *,
    window: int,
    solver: str = "local-search",
    slots: int | None = None,
    dispatch: str = "even",
    tokens_per_device: int = 4096,
    steps_per_window: float = 1000.0,
    every: int = 1,
    most_moves: int | None = None,
    first: Placement | None = None,
    cost: CostModel | None = None,
    seed: int = 0,
    time_limit_s: float = 30.0,
    progress: Progress = lambda share, what: None,
) -> dict[str, Any]:
    """Section of a report: what each habit spends over a trace's selected tokens, in windows of `window` tokens.

    A window stands for `steps_per_window` steps of traffic like it; that is also the horizon of a move, at most
    `most_moves` at a time. EPLB plans again `every` so many windows. `first` is the plan all start with; without it the
    solver makes one from the first window, which then serves nobody. Raises InputError when the trace holds fewer than two windows.
    """
    windows = trace.tokens // window if window >= 1 else 0
    if windows < 2 + (first is None):
        raise InputError(
            f"{trace.tokens:,} tokens are {windows} windows of {window:,}; give at least {2 + (first is None)}: a smaller window or a longer trace"
        )
    costs = cost or CostModel.of(cluster, trace.model)
    slots_G = slots_per_device(trace.model.experts if slots is None else slots, cluster.size) if first is None else first.slots_G

    def problem(experts_TLK: NDArray[np.uint16]) -> Problem:
        return Problem(
            model=trace.model, cluster=cluster, cost=costs, stats=TraceStats.from_experts(experts_TLK, trace.model), experts_TLK=experts_TLK,
            slots_G=slots_G, dispatch=dispatch, tokens_per_device=tokens_per_device,
        )  # fmt: skip

    habits: dict[str, Habit] = {}
    planning_s, decisions = 0.0, []
    seen: deque[NDArray[np.uint16]] = deque(maxlen=MEMORY)
    candidates: list[Placement] = []
    for index, experts_TLK in enumerate(_windows(trace, window, windows)):
        progress(index / windows, f"window {index + 1} of {windows}")
        here = problem(experts_TLK)
        seen.append(experts_TLK)
        if not habits:
            start = _placed(solver, here, seed, time_limit_s) if first is None else first
            habits = {name: Habit(name=name, live=start) for name in ("static", f"eplb every {every}", "ours")}
            if first is None:
                continue
        static, periodic, ours = habits.values()
        for habit in habits.values():
            habit.serve(here, steps_per_window)
        if index == windows - 1:
            break
        static.move(static.live, costs)
        due = len(ours.served_s_W) % every == 0
        periodic.move(_placed("eplb", here, seed, time_limit_s) if due else periodic.live, costs)
        judged = [_worth(here, ours.live, candidate, steps_per_window) for candidate in candidates]
        best = max(range(len(judged)), key=lambda i: judged[i]["net_s"], default=None)
        taken = best is not None and judged[best]["net_s"] > 0
        decisions.append({"after_window": index, "taken": taken, "judged": judged})
        ours.move(candidates[best] if taken and best is not None else ours.live, costs)
        begin = time.perf_counter()
        limits = Constraints(current=ours.live, most_moves=most_moves, horizon_steps=steps_per_window)
        pools = [experts_TLK] if len(seen) == 1 else [experts_TLK, np.concatenate(seen)]
        made = [_placed(solver, replace(problem(pool), constraints=limits), seed, time_limit_s) for pool in pools]
        candidates = [candidate for candidate in made if candidate != ours.live]
        planning_s += time.perf_counter() - begin
    progress(1.0, "")
    ours_s = habits["ours"].total_s
    return {
        "cluster": cluster.name,
        "solver": solver,
        "window_tokens": window,
        "windows_served": len(habits["ours"].served_s_W),
        "steps_per_window": steps_per_window,
        "eplb_every": every,
        "planning_s": planning_s,
        "habits": [
            {
                "name": habit.name,
                "total_s": habit.total_s,
                "stalled_s": sum(habit.stall_s_W),
                "moves": sum(habit.moves_W),
                "plans": sum(1 for moves in habit.moves_W if moves),
                "served_s_W": habit.served_s_W,
                "stall_s_W": habit.stall_s_W,
                "gain_of_ours": 1 - ours_s / habit.total_s,
            }
            for habit in habits.values()
        ],
        "decisions": decisions,
        "notes": [
            "times are of MoE layers alone; serving stands still while experts are copied, the worst case",
            "seconds of planning are not in the totals: planning runs beside serving",
            *costs.notes,
        ],
    }


def _worth(here: Problem, live: Placement, candidate: Placement, steps: float) -> dict[str, float]:
    """What a candidate gains over the live plan on one window's tokens, less its copies."""
    migration = live.diff(candidate, node_G=here.cluster.node_G)
    gain_s, stall_s = (float(layer_s_L(here, live).sum()) - float(layer_s_L(here, candidate).sum())) * steps, copies_s(here.cost, migration)
    return {"moves": len(migration), "gain_s": gain_s, "copies_s": stall_s, "net_s": gain_s - stall_s}


def _placed(solver: str, problem: Problem, seed: int, time_limit_s: float) -> Placement:
    found = run_solver(solver, problem, seed=seed, time_limit_s=time_limit_s)
    if found.placement is None:
        raise InputError(f"solver {solver!r} finds no plan: {found.notes.get('reason', 'no reason given')}")
    return found.placement


def _windows(trace: Trace, window: int, windows: int) -> Iterator[NDArray[np.uint16]]:
    """experts_TLK of each of the first `windows` windows; tokens behind the last whole window are left out."""
    waiting: list[NDArray[np.uint16]] = []
    held = given = 0
    for batch in trace.batches():
        waiting.append(batch.experts_TLK)
        held += len(batch)
        while held >= window and given < windows:
            merged = np.concatenate(waiting)
            yield merged[:window]
            given += 1
            waiting, held = [merged[window:]], held - window
