"""lp-dispatch: LPLB, a placement for engines that split every batch's tokens over replicas by linear program."""

from __future__ import annotations

from dataclasses import replace

from moesim.optimize import Problem, Progress, Solution, Status
from moesim.optimize.migration import layer_s_L
from moesim_solvers.placement.eplb import Eplb
from moesim_solvers.placement.local_search import LocalSearch


class LpDispatch:
    """EPLB's placement under the dispatch rule `lp`, which the plan then names (deepseek-ai/LPLB, SGLang `lp`).

    Each batch's split is optimal (`moesim.cost.split`), so the busiest device of small batches comes close to the mean, which no
    placement reaches under an even split. What the placement must do is give the split room: replicas of what is hot, on devices that
    differ. Where EPLB cannot be asked (unequal slots, rules, a live plan) it is `local-search`'s, which packs what is chosen together
    and so leaves less room; `local-search --dispatch lp` gives that on purpose. Without replicas there is nothing to split.
    """

    name = "lp-dispatch"
    solves = "placement"
    capabilities = LocalSearch.capabilities
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """The objective is predicted seconds per layer under `lp`, mean over layers; notes name whose placement it is."""
        plain = len(set(problem.slots_G.tolist())) == 1 and not problem.constraints.rules and problem.constraints.current is None
        placer = Eplb() if plain else LocalSearch()
        found = placer.solve(replace(problem, dispatch="even"), seed=seed, time_limit_s=time_limit_s, progress=progress)
        if found.placement is None:
            return found
        placement = replace(found.placement, dispatch="lp")
        return Solution(
            status=Status.TIME_LIMIT if found.status == Status.TIME_LIMIT else Status.FEASIBLE,
            placement=placement,
            objective=float(layer_s_L(problem, placement).mean()),
            seed=seed,
            notes={"placement_of": placer.name, "replicas": problem.slots - problem.model.experts},
        )
