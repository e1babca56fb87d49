"""round-robin: experts dealt to devices like cards."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.optimize import Capability, Problem, Progress, Solution, Status


def deal(experts: Iterable[int], slots_G: ArrayLike) -> NDArray[np.int64]:
    """Slots [P] after dealing one expert per slot in turn to the next device that has room and not that expert yet.

    Where only devices that hold it already have room, the next of those takes it twice.
    """
    room_G = np.asarray(slots_G).tolist()
    hands: list[list[int]] = [[] for _ in room_G]
    turn = 0
    for expert in experts:
        waiting = [(turn + step) % len(hands) for step in range(len(hands))]
        takers = [g for g in waiting if len(hands[g]) < room_G[g]]
        taker = next((g for g in takers if expert not in hands[g]), takers[0])
        hands[taker].append(expert)
        turn = taker + 1
    return np.array([expert for hand in hands for expert in hand], np.int64)


class RoundRobin:
    """Expert e on device e mod G, replicas of 0, 1, 2 … dealt on: neighbours in id apart, nothing measured.

    Good as a control for `linear`: where they differ, ids carry meaning. Bad at everything that looks at load.
    """

    name = "round-robin"
    solves = "placement"
    capabilities = frozenset({Capability.REPLICATION, Capability.HETEROGENEOUS, Capability.LOADS})
    requires: tuple[str, ...] = ()

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """The same deal in every layer."""
        slots_P = deal((np.arange(problem.slots) % problem.model.experts).tolist(), problem.slots_G)
        placement = problem.placement(np.tile(slots_P, (len(problem.model.moe_layers), 1)))
        return Solution(status=Status.FEASIBLE, placement=placement, seed=seed)
