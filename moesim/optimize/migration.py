"""Migration: what it costs to get from the live plan to another, and whether to go there, part of the way, or not at all.

Layers are independent: a plan may be taken over in some of them and left alone in others. Suffixes: L layers, E experts,
G devices, P slots, O options of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel, route
from moesim.cost.collectives import all_to_all_time
from moesim.hardware import Cluster
from moesim.optimize.problem import Problem, Solution
from moesim.plan import Migration, Placement
from moesim.sim.lockstep import CHUNK_COUNTS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def copies_s(cost: CostModel, migration: Migration) -> float:
    """Seconds in which the moved experts' weights travel between devices, all at once and with nothing else on the links.

    The busiest port sets the time, as in any all-to-all of this transport's library. Serving stands still meanwhile, which
    is the worst case: an engine that copies in the background loses less.
    """
    if not len(migration):
        return 0.0
    return float(all_to_all_time(migration.bytes_GG(cost.model.expert_B), cost.cluster.node_G, cost.ports).time_s_N)


def layer_s_L(problem: Problem, placement: Placement) -> Floats:
    """[L] predicted seconds of each MoE layer on the problem's own tokens, mean over steps of the problem's size.

    Tokens are cut into whole steps nearest to that size, each scaled to it, as in `sim.simulate`. Where only loads are known, seconds
    of computation alone.
    """
    if not len(problem.experts_TLK):
        rows = np.arange(len(placement.layers))[:, None]
        share_LP = (problem.load_LE / placement.replicas_LE)[rows, placement.slots_LP]
        scale = problem.tokens_per_device * problem.cluster.size / max(problem.stats.tokens, 1)
        arriving_LG = np.zeros((len(share_LP), placement.devices))
        np.add.at(arriving_LG, (rows, placement.device_P[None]), share_LP * scale)
        compute, _ = problem.cost.expert_times((share_LP * scale)[None], arriving_LG[None], placement.slots_G)
        return np.asarray(compute[0].max(axis=1))
    full, tokens = problem.tokens_per_device * problem.cluster.size, len(problem.experts_TLK)
    steps = max(1, round(tokens / full))
    ends_S = np.concatenate([[0], np.arange(1, steps + 1) * tokens // steps])
    most = max(1, CHUNK_COUNTS // (len(placement.layers) * problem.cluster.size**2))
    total_L = np.zeros(len(placement.layers))
    for begin in range(0, steps, most):
        cut_S = ends_S[begin : begin + most + 1]
        traffic = route(
            problem.experts_TLK[cut_S[0] : cut_S[-1]],
            placement,
            problem.cluster.node_G,
            ends_S=cut_S[1:] - cut_S[0],
            tokens_per_step=float(full),
            selections=problem.cost.way.per_selection,
        )
        times = problem.cost.layer_times(traffic, placement)
        total_L += (times.dispatch.time_s_N + times.compute_s_SLG.max(axis=2) + times.combine.time_s_N).sum(axis=0)
    return np.asarray(total_L / steps)


def moves_L(live: Placement, new: Placement) -> Ints:
    """[L] experts on devices that do not hold them now."""
    return np.asarray((new.holds_LGE & ~live.holds_LGE).sum(axis=(1, 2)))


def relabelled(live: Placement, new: Placement, cluster: Cluster) -> Placement:
    """`new` with devices renamed in every layer so that the fewest experts move.

    A name may go to a device of the same kind, slots and, together with its whole node, another node made up alike; so load
    and, for tokens that live evenly everywhere, travel stay. With replicas the turn of a token follows the order of slots,
    which a new name changes: the caller compares what comes out.
    """
    from scipy.optimize import linear_sum_assignment

    node_G = np.asarray(cluster.node_G)
    members = [np.flatnonzero(node_G == node) for node in range(cluster.nodes)]
    kinds = [[(cluster.devices[g].name, cluster.intra_G[g].name, int(new.slots_G[g])) for g in here] for here in members]
    first_G = np.concatenate([[0], np.cumsum(new.slots_G)])
    slots_LP = new.slots_LP.copy()
    for layer in range(len(new.layers)):
        kept_GG = new.holds_LGE[layer].astype(np.int32) @ live.holds_LGE[layer].T.astype(np.int32)  # stay put if a becomes b
        gain_NN = np.full((len(members), len(members)), -1.0)
        inside: dict[tuple[int, int], Ints] = {}
        for m, from_G in enumerate(members):
            for n, to_G in enumerate(members):
                if sorted(kinds[m]) != sorted(kinds[n]):
                    continue
                alike = np.array([[a == b for b in kinds[n]] for a in kinds[m]])
                block = np.where(alike, kept_GG[np.ix_(from_G, to_G)], -1e6)
                rows, columns = linear_sum_assignment(-block)
                inside[m, n] = to_G[columns]
                gain_NN[m, n] = block[rows, columns].sum()
        for pair in zip(*(side.tolist() for side in linear_sum_assignment(-np.where(gain_NN < 0, -1e6, gain_NN))), strict=True):
            for a, b in zip(members[pair[0]], inside[pair], strict=True):
                slots_LP[layer, first_G[b] : first_G[b + 1]] = new.slots_LP[layer, first_G[a] : first_G[a + 1]]
    return replace(new, slots_LP=slots_LP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """Slots one layer may have, what they cost per step, and how many experts they move."""

    slots_P: NDArray[np.integer]
    cost: float
    moves: int


def chosen(options: Sequence[Sequence[Option]], *, most_moves: int | None, move_cost: float = 0.0) -> list[Option]:
    """One option per layer: least Σ cost + move_cost · moves with at most `most_moves` moves over all layers; exact.

    A knapsack with one choice per layer, by dynamic programming over the moves spent. Equal prices go to fewer moves. A budget
    below what every layer needs at least counts as just that.
    """
    rows = [sorted(row, key=lambda option: (option.cost + move_cost * option.moves, option.moves)) for row in options]
    if most_moves is None or sum(row[0].moves for row in rows) <= most_moves:
        return [row[0] for row in rows]
    budget = max(most_moves, sum(min(option.moves for option in row) for row in rows))
    least_B = np.zeros(budget + 1)  # price of the layers so far with at most so many moves
    pick_LB = np.zeros((len(rows), budget + 1), np.int64)
    for row, pick_B in zip(rows, pick_LB, strict=True):
        price_OB = np.full((len(row), budget + 1), np.inf)
        for price_B, option in zip(price_OB, row, strict=True):
            if option.moves <= budget:
                price_B[option.moves :] = least_B[: budget + 1 - option.moves] + option.cost + move_cost * option.moves
        pick_B[:] = price_OB.argmin(axis=0)
        least_B = price_OB.min(axis=0)
    picks, left = [], budget
    for row, pick_B in zip(reversed(rows), reversed(pick_LB), strict=True):
        picks.append(row[pick_B[left]])
        left -= picks[-1].moves
    return picks[::-1]


def settled(problem: Problem, found: Solution) -> Solution:
    """What to do with a solver's answer when there is a live plan: take it over, in part, or stay.

    Candidates are the answer, the answer with devices renamed, every mixture of it with the live plan by layers that keeps
    `most_moves`, and the live plan. With a horizon the one with the greatest gain over the horizon less the time of its copies is taken;
    without, the quickest that keeps the budget. Times are predicted on the tokens the problem knows: what a plan gains there
    it need not gain on others.
    """
    rules, live, new = problem.constraints, problem.constraints.current, found.placement
    if live is None or new is None:
        return found
    live = replace(live, dispatch=new.dispatch)
    stays = live.slots_G.tolist() == problem.slots_G.tolist() and rules.broken(live) is None
    live_L = layer_s_L(problem, live)
    answers = [new, relabelled(live, new, problem.cluster)]
    candidates = [answer for answer in answers if rules.broken(answer) is None]
    times = {id(answer): layer_s_L(problem, answer) for answer in candidates}
    if stays:
        migrations = [live.diff(answer, node_G=problem.cluster.node_G) for answer in candidates]
        per_move_s = max(copies_s(problem.cost, migration) / max(len(migration), 1) for migration in migrations)
        price_s = per_move_s / rules.horizon_steps if rules.horizon_steps else 0.0
        options = [[Option(slots_P=slots_P, cost=float(s), moves=0)] for slots_P, s in zip(live.slots_LP, live_L, strict=True)]
        for answer in candidates:
            for row, slots_P, s, moves in zip(options, answer.slots_LP, times[id(answer)], moves_L(live, answer), strict=True):
                row.append(Option(slots_P=slots_P, cost=float(s), moves=int(moves)))
        for price in (0.0, price_s) if price_s else (0.0,):
            picks = chosen(options, most_moves=rules.most_moves, move_cost=price)
            candidates.append(replace(live, slots_LP=np.array([pick.slots_P for pick in picks])))
        candidates.append(live)
    judged = [_judged(problem, live, float(live_L.sum()), candidate) for candidate in candidates]
    allowed = [row for row in judged if rules.most_moves is None or row["moves"] <= rules.most_moves]
    if not allowed:
        least = min(row["moves"] for row in judged)
        reason = (
            f"the live plan offers other slots or breaks a rule, and the nearest plan found moves {least} experts: "
            f"more than {rules.most_moves}; allow more moves"
        )
        return replace(found, status=type(found.status).INFEASIBLE, placement=None, notes={**found.notes, "reason": reason})
    best = max(allowed, key=lambda row: (row["net_s"] if rules.horizon_steps else row["gain_s_per_step"], -row["moves"]))
    fresh = judged[len(times) - 1]  # with its devices renamed, unless that broke a rule
    note = {key: value for key, value in best.items() if key != "placement"} | {
        "moves_of_the_solver": judged[0]["moves"],
        "least_moves_of_it": fresh["moves"],
    }
    if best["placement"] is live or not best["moves"]:
        note["decision"] = "do nothing: no plan found is worth its moves"
    else:
        note["decision"] = f"move {best['moves']} experts"
    return replace(found, placement=best["placement"], notes={**found.notes, "migration": note})


def _judged(problem: Problem, live: Placement, live_s: float, new: Placement) -> dict[str, Any]:
    """A candidate with its moves, bytes, seconds of copies, gain per step (all layers), break-even and net gain over the horizon."""
    moves = live.diff(new, node_G=problem.cluster.node_G)
    stall_s, gain_s = copies_s(problem.cost, moves), live_s - float(layer_s_L(problem, new).sum())
    horizon = problem.constraints.horizon_steps
    return {
        "placement": new,
        "moves": len(moves),
        "moved_B": float(len(moves) * problem.model.expert_B),
        "copies_s": stall_s,
        "gain_s_per_step": gain_s,
        "pays_off_after_steps": stall_s / gain_s if gain_s > 0 else None,
        "horizon_steps": horizon,
        "net_s": gain_s * horizon - stall_s if horizon else None,
    }
