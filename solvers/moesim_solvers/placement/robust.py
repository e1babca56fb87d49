"""robust: a placement for the worst kinds of traffic rather than for their mean."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Problem, Progress, Solution, Status
from moesim.trace import TraceStats
from moesim_solvers.placement.greedy import greedy_slots
from moesim_solvers.placement.limits import limits_of, overfull

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCKS = 8
ROUNDS = 3
STEP = 1.0  # of the multiplicative weights, on prices scaled to 0..1


def tail_mean(price_S: Floats, tail: float, weight_S: Floats | None = None) -> float:
    """Mean of the dearest share `tail` of scenarios of these weights, equal by default (CVaR at 1 - tail; Rockafellar and Uryasev
    2000). 1 is the mean; a share no larger than the dearest scenario's is that scenario."""
    weight_S = np.full(len(price_S), 1.0) if weight_S is None else weight_S
    order = np.argsort(-price_S, kind="stable")
    share_S = weight_S[order] / weight_S.sum()
    before_S = np.cumsum(share_S) - share_S
    counted_S = np.clip(tail - before_S, 0.0, share_S)
    return float((price_S[order] * counted_S).sum() / counted_S.sum())


def scenario_price_S(problem: Problem, ids_TLK: NDArray[np.integer], slots_LP: NDArray[np.integer], ends_S: Ints) -> Floats:
    """Seconds per layer of each consecutive part of the tokens (those before `ends_S`), mean over layers."""
    from moesim.cost import route

    price, placement = problem.weights, problem.placement(slots_LP)
    traffic = route(np.asarray(ids_TLK, np.uint16), placement, problem.cluster.node_G, ends_S=ends_S)
    load_SLG = traffic.device_tokens_SLG(placement)
    mean_SL = load_SLG.sum(axis=2) / np.count_nonzero(problem.slots_G)
    ratio_SL = np.divide(load_SLG.max(axis=2), mean_SL, out=np.ones_like(mean_SL), where=mean_SL > 0)
    tokens_S1 = traffic.tokens_SG.sum(axis=1, keepdims=True)
    devices_SL, nodes_SL = (copies.sum(axis=(2, 3)) / tokens_S1 for copies in (traffic.copies_SLGG, traffic.node_copies_SLGN))
    return np.asarray((price.load_s * ratio_SL + price.devices_s * devices_SL + price.nodes_s * nodes_SL).mean(axis=1))


def reweighted(ends_S: Ints, weight_S: Floats) -> Ints:
    """Indices of a sample in which scenario s has the share `weight_S[s]`: evenly spaced inside each, repeated as needed."""
    starts_S = np.concatenate([[0], ends_S[:-1]])
    share_S = np.rint(weight_S / weight_S.sum() * ends_S[-1]).astype(np.int64)
    picks = [start + np.arange(n) * (end - start) // max(n, 1) for start, end, n in zip(starts_S, ends_S, share_S, strict=True)]
    return np.concatenate(picks)


class Robust:
    """Least CVaR of layer time over kinds of traffic: searches in seconds, weighting up the kinds that come out dear.

    The scenarios are the problem's (domains, phases, with weights); without any, eight consecutive blocks of its token sample, which
    within one domain differ by chance and topic. The objective is the mean price (load, devices and nodes per token) of the dearest
    scenarios that make up the share `Problem.tail` of all weight; a share near 0 is the worst scenario alone. Multiplicative
    weights (Freund and Schapire 1999) over three searches; the first has the weights given, so the answer is never worse than that on
    these scenarios. A heuristic: searches are not exact, so no bound; and it cannot guard against traffic that is in no scenario.
    """

    name = "robust"
    solves = "placement"
    capabilities = frozenset(
        {
            Capability.REPLICATION,
            Capability.HETEROGENEOUS,
            Capability.FANOUT,
            Capability.NODES,
            Capability.ANYTIME,
            Capability.RULES,
            Capability.SCENARIOS,
        }
    )
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Best of three searches; notes give mean, tail and every scenario of the first (weights as given) and the chosen one."""
        from moesim_solvers.placement.search import search_slots

        if reason := overfull(problem):
            return Solution(status=Status.INFEASIBLE, placement=None, seed=seed, notes={"reason": reason})
        stop_s = time.monotonic() + time_limit_s
        ids, ends_S, given_S, names = _scenarios(problem)
        if not len(ids):
            notes = {"scenarios": "none: no tokens, greedy balance"}
            return Solution(status=Status.FEASIBLE, placement=problem.placement(greedy_slots(problem)), seed=seed, notes=notes)
        price, weight_S, finished, binding = problem.weights, given_S, True, replace(limits_of(problem), live_LGE=None)
        tried: list[tuple[float, Floats, NDArray[np.int64]]] = []
        for turn in range(ROUNDS):
            sample_TLK = ids[reweighted(ends_S, weight_S)] if turn or problem.scenarios else ids
            load_LE = TraceStats.from_experts(sample_TLK, problem.model).load_LE
            found = search_slots(
                sample_TLK,
                load_LE,
                problem.slots_G,
                problem.cluster.node_G,
                busy=price.load_s,
                fanout=price.devices_s,
                node_fanout=price.nodes_s,
                limits=binding,
                seed=seed,
                time_limit_s=max(stop_s - time.monotonic(), 0.0) / (ROUNDS - turn),
                progress=lambda share, cost, turn=turn: progress((turn + share) / ROUNDS, ""),  # type: ignore[misc]
            )
            finished &= found.finished
            price_S = scenario_price_S(problem, ids, found.slots_LP, ends_S)
            tried.append((tail_mean(price_S, problem.tail, given_S), price_S, found.slots_LP))
            scaled_S = (price_S - price_S.min()) / max(float(np.ptp(price_S)), 1e-300)
            weight_S = weight_S * np.exp(STEP * scaled_S)
            weight_S /= weight_S.sum()
        chosen = min(range(ROUNDS), key=lambda turn: tried[turn][0])
        tail, _, slots_LP = tried[chosen]
        return Solution(
            status=Status.FEASIBLE if finished else Status.TIME_LIMIT,
            placement=problem.placement(slots_LP),
            objective=tail,
            seed=seed,
            notes={"scenarios": names, "tail": problem.tail, "chosen_round": chosen + 1}
            | {
                f"{what}_s": {
                    "mean": float(given_S @ price_S),
                    "tail": tail_s,
                    "worst": float(price_S.max()),
                    "each": [float(each) for each in price_S],
                }
                for what, (tail_s, price_S, _) in (("given_weights", tried[0]), ("chosen", tried[chosen]))
            },
        )


def _scenarios(problem: Problem) -> tuple[NDArray[np.uint16], Ints, Floats, list[str]]:
    """Tokens of all scenarios in a row, where each ends, their weights (sum 1) and names."""
    if problem.scenarios:
        parts = [scenario.experts_TLK for scenario in problem.scenarios]
        weight_S = np.array([scenario.weight for scenario in problem.scenarios])
        return np.concatenate(parts), np.cumsum([len(part) for part in parts]), weight_S / weight_S.sum(), [s.name for s in problem.scenarios]
    ids = problem.experts_TLK
    blocks = min(BLOCKS, len(ids))
    ends_S = (np.arange(1, blocks + 1) * len(ids)) // max(blocks, 1)
    return ids, ends_S, np.full(blocks, 1 / max(blocks, 1)), [f"block {block + 1} of {blocks} of the sample" for block in range(blocks)]
