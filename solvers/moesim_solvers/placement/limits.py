"""What binds a solver: a problem's constraints as the search wants them, and slots that keep them to begin with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Problem
from moesim.optimize.constraints import filled, tables
from moesim.optimize.migration import copies_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What binds a search, beside slots.

    pinned_LGE   True where a device must hold an expert
    apart_LEE    True for two experts that no device may hold both
    start_LP     slots to begin with, which keep the limits (default: the greedy balance, which knows none)
    live_LGE     what devices hold now; each expert on a device that lacks it costs `move`
    """

    pinned_LGE: NDArray[np.bool_] | None = None
    apart_LEE: NDArray[np.bool_] | None = None
    start_LP: NDArray[np.integer] | None = None
    live_LGE: NDArray[np.bool_] | None = None
    move: float = 0.0


def overfull(problem: Problem) -> str | None:
    """Why slots contradict the experts (a device offering more slots than there are experts), or None."""
    most, experts = int(problem.slots_G.max()), problem.model.experts
    if most > experts:
        return f"device {int(problem.slots_G.argmax())} offers {most} slots for {experts} experts; offer at most {experts} slots per device"
    return None


def ruled_slots(problem: Problem) -> NDArray[np.int64]:
    """Slots [L, P] that keep the rules, filled greedily; the problem was found feasible."""
    rules, layers = problem.constraints, problem.model.moe_layers
    rows = [filled(rules.at(layer), problem.slots_G, load_E) for layer, load_E in zip(layers, problem.load_LE, strict=True)]
    return np.array(rows, np.int64)


def limits_of(problem: Problem) -> Limits:
    """The problem's constraints as the search wants them; `move` is the time of an expert's copy, shared out over the horizon."""
    rules, model, devices = problem.constraints, problem.model, problem.cluster.size
    pinned_LGE = apart_LEE = live_LGE = None
    start_LP: NDArray[np.integer] | None = None
    move = 0.0
    if rules.rules:
        of_layers = [tables(rules.at(layer), model.experts, devices) for layer in model.moe_layers]
        pinned_LGE, apart_LEE = (np.array([pair[side] for pair in of_layers]) for side in (0, 1))
        start_LP = ruled_slots(problem)
    if (live := rules.current) is not None:
        live_LGE = live.holds_LGE
        if live.slots_G.tolist() == problem.slots_G.tolist() and not rules.broken(live):
            start_LP = live.slots_LP
        if rules.horizon_steps:
            whole = replace(live, slots_LP=np.roll(live.slots_LP, int(live.slots_G.max()), axis=1))  # everything moves one device on
            migration = live.diff(whole, node_G=problem.cluster.node_G)
            move = copies_s(problem.cost, migration) / max(len(migration), 1) / rules.horizon_steps
    return Limits(pinned_LGE=pinned_LGE, apart_LEE=apart_LEE, start_LP=start_LP, live_LGE=live_LGE, move=move)
