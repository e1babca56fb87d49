"""robust: a placement for the worst part of the sample rather than for its mean."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Problem, Progress, Solution, Status
from moesim.trace import TraceStats
from moesim_solvers.placement.greedy import greedy_slots, overfull

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCKS = 8
TAIL = 0.25  # of the scenarios: CVaR at 0.75
ROUNDS = 3
STEP = 1.0  # of the multiplicative weights, on prices scaled to 0..1


def tail_mean(price_S: Floats, tail: float) -> float:
    """Mean of the dearest share `tail` of equally likely scenarios (CVaR at 1 - tail; Rockafellar and Uryasev 2000)."""
    worth = len(price_S) * tail
    weight_S = np.clip(worth - np.arange(len(price_S)), 0.0, 1.0)
    return float((-np.sort(-price_S) * weight_S).sum() / worth)


def scenario_price_S(problem: Problem, slots_LP: NDArray[np.integer], ends_S: Ints) -> Floats:
    """Seconds per layer of each consecutive part of the sample (tokens before `ends_S`), mean over layers."""
    from moesim.cost import route

    price, placement = problem.weights, problem.placement(slots_LP)
    traffic = route(problem.experts_TLK, placement, problem.cluster.node_G, ends_S=ends_S)
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
    """Least CVaR(0.75) of layer time over parts of the sample: searches in seconds, weighting up the parts that come out dear.

    A problem carries no domains, so the scenarios are eight consecutive blocks of its token sample: where a trace lists its
    domains one after the other they are much like domains, within one domain they differ by chance and topic. The objective is
    the mean price (load, devices and nodes per token) of the two dearest blocks. Multiplicative weights (Freund and Schapire
    1999) over three searches; the first has equal weights, so the answer is never worse than that on these blocks.
    A heuristic: searches are not exact, so no bound; and it cannot guard against traffic that is in no block.
    """

    name = "robust"
    solves = "placement"
    capabilities = frozenset({Capability.REPLICATION, Capability.HETEROGENEOUS, Capability.FANOUT, Capability.NODES, Capability.ANYTIME})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Best of three searches; notes give mean, tail and worst block of the first (equal weights) and the chosen one."""
        from moesim_solvers.placement.search import search_slots

        if reason := overfull(problem):
            return Solution(status=Status.INFEASIBLE, placement=None, seed=seed, notes={"reason": reason})
        ids, stop_s = problem.experts_TLK, time.monotonic() + time_limit_s
        blocks = min(BLOCKS, len(ids))
        if not blocks:
            notes = {"scenarios": "none: no tokens, greedy balance"}
            return Solution(status=Status.FEASIBLE, placement=problem.placement(greedy_slots(problem)), seed=seed, notes=notes)
        ends_S = (np.arange(1, blocks + 1) * len(ids)) // blocks
        price, weight_S, finished = problem.weights, np.full(blocks, 1 / blocks), True
        tried: list[tuple[float, Floats, NDArray[np.int64]]] = []
        for turn in range(ROUNDS):
            sample_TLK = ids[reweighted(ends_S, weight_S)] if turn else ids
            load_LE = TraceStats.from_experts(sample_TLK, problem.model).load_LE
            found = search_slots(
                sample_TLK,
                load_LE,
                problem.slots_G,
                problem.cluster.node_G,
                busy=price.load_s,
                fanout=price.devices_s,
                node_fanout=price.nodes_s,
                seed=seed,
                time_limit_s=max(stop_s - time.monotonic(), 0.0) / (ROUNDS - turn),
                progress=lambda share, cost, turn=turn: progress((turn + share) / ROUNDS, ""),  # type: ignore[misc]
            )
            finished &= found.finished
            price_S = scenario_price_S(problem, found.slots_LP, ends_S)
            tried.append((tail_mean(price_S, TAIL), price_S, found.slots_LP))
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
            notes={"scenarios": f"{blocks} consecutive blocks of {len(ids)} tokens", "chosen_round": chosen + 1}
            | {
                f"{what}_s": {"mean": float(price_S.mean()), "tail": tail_s, "worst": float(price_S.max())}
                for what, (tail_s, price_S, _) in (("equal_weights", tried[0]), ("chosen", tried[chosen]))
            },
        )
