"""inspect: what a trace's routing looks like, in one pass over its tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.trace.locality import COLUMNS, Locality, LocalityMeter
from moesim.trace.schema import NO_EXPERT
from moesim.trace.stats import TraceStats, drift_bits
from moesim.trace.trace import Trace

BATCH = 1 << 14
TOP_PAIRS = 5  # of each layer
STEPS = 1 << 10  # intervals of steps counted apart: one step each where there are no more


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two experts of one layer and the tokens that chose both; `lift` is how many times as often as if they were independent.

    lift = n_ab·T / (n_a·n_b) over T tokens (Brin et al. 1997). Uniform choice of K of E experts has E·(K-1) / (K·(E-1)), a little
    below 1: a token cannot choose an expert twice.
    """

    layer: int
    experts: tuple[int, int]
    tokens: int
    lift: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Statistics of a trace's selected tokens.

    load_by_domain     int64 [L, E] per domain
    drift_DD           mean Jensen-Shannon divergence of two domains' loads over layers, bits
    drift_L            mean over pairs of domains in each layer; zeros for one domain
    drift_over_steps   [S-1, L] the same between consecutive tenths of the training steps (to 1 in 512 of many); empty for one step
    locality           how much a token's experts tell about those of the tokens around it
    """

    stats: TraceStats
    load_by_domain: dict[str, NDArray[np.int64]]
    drift_DD: NDArray[np.float64]
    drift_L: NDArray[np.float64]
    step_edges: list[int]
    drift_over_steps: NDArray[np.float64]
    empty_selections: int
    repeated_share: float  # of tokens whose selections equal the token before in every layer: padding or dummy batches
    locality: Locality

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        stats = self.stats
        return {
            "model": stats.model.name,
            "tokens": stats.tokens,
            "layers": list(stats.model.moe_layers),
            "experts": stats.model.experts,
            "top_k": stats.model.top_k,
            "skew": stats.skew_L.tolist(),
            "unused_experts": (stats.load_LE == 0).sum(axis=1).tolist(),
            "affinity_bits": stats.affinity_bits.tolist(),
            "domains": list(self.load_by_domain),
            "domain_drift_bits": self.drift_DD.tolist(),
            "domain_drift_by_layer": self.drift_L.tolist(),
            "step_edges": self.step_edges,
            "step_drift_bits": self.drift_over_steps.tolist(),
            "empty_selections": self.empty_selections,
            "repeated_share": self.repeated_share,
            "load": stats.load_LE.tolist(),
            "coactivation": [asdict(pair) for pair in top_pairs(stats)],
            "locality": self.locality.to_dict(),
        }


def inspect(trace: Trace) -> Inspection:
    """Inspection of the selected tokens. Streams; memory is O(L·E²) and a bounded window, whatever the number of tokens and steps."""
    model = trace.model
    locality = LocalityMeter(model, top_k=trace.info.top_k, tokens=trace.tokens)
    total = TraceStats.empty(model)
    loads: dict[str, NDArray[np.int64]] = {}
    by_step: dict[int, NDArray[np.int64]] = {}  # by interval of `width` steps
    width = 1
    empty, repeated, last = 0, 0, None
    for batch in trace.batches(rows=BATCH, columns=("domain", "step", *COLUMNS)):
        ids = batch.experts_TLK
        locality.add(batch)
        total = total + TraceStats.from_experts(ids, model)
        empty += int((ids == NO_EXPERT).sum())
        before = ids[:1] if last is None else last
        chain = np.concatenate([before, ids])
        repeated += int((chain[1:] == chain[:-1]).all(axis=(1, 2)).sum()) - (last is None)
        last = ids[-1:]
        for domain in np.unique(batch.columns["domain"]):
            here = _load(ids[batch.columns["domain"] == domain], model.experts)
            loads[str(domain)] = loads.get(str(domain), 0) + here
        width, by_step = _widened(by_step, batch.columns["step"], width)
        interval_T = batch.columns["step"] // width
        for interval in np.unique(interval_T):
            here = _load(ids[interval_T == interval], model.experts)
            by_step[int(interval)] = by_step.get(int(interval), 0) + here
    names = sorted(loads)
    drift_DDL = np.asarray([[drift_bits(loads[a], loads[b]) for b in names] for a in names])
    edges, tenths = _tenths({interval * width: load for interval, load in by_step.items()})
    return Inspection(
        stats=total,
        load_by_domain={name: loads[name] for name in names},
        drift_DD=drift_DDL.mean(axis=2),
        drift_L=drift_DDL.sum(axis=(0, 1)) / max(len(names) * (len(names) - 1), 1),
        step_edges=edges,
        drift_over_steps=np.asarray([drift_bits(a, b) for a, b in pairwise(tenths)]),
        empty_selections=empty,
        repeated_share=repeated / max(total.tokens, 1),
        locality=locality.result(),
    )


def top_pairs(stats: TraceStats) -> list[Pair]:
    """The five pairs of each layer that most tokens choose together beyond what independence explains, most first.

    Ranked by n_ab - n_a·n_b / T, which, unlike lift, does not prefer experts that are hardly used.
    """
    pairs = []
    for layer, together_EE, load_E in zip(stats.model.moe_layers, stats.coactivation_LEE, stats.load_LE.astype(np.float64), strict=True):
        expected_EE = np.outer(load_E, load_E) / max(stats.tokens, 1)
        excess_EE = np.triu(together_EE - expected_EE, k=1)
        for index in np.argsort(-excess_EE, axis=None, kind="stable")[:TOP_PAIRS].tolist():
            a, b = divmod(index, len(load_E))
            if excess_EE[a, b] > 0:
                lift = float(together_EE[a, b] / expected_EE[a, b])
                pairs.append(Pair(layer=layer, experts=(a, b), tokens=int(together_EE[a, b]), lift=lift))
    return pairs


def _load(ids_TLK: NDArray[np.uint16], experts: int) -> NDArray[np.int64]:
    ids = np.where(ids_TLK == NO_EXPERT, experts, ids_TLK).astype(np.int64)
    layers = ids.shape[1]
    flat = (ids + np.arange(layers)[:, None] * (experts + 1)).ravel()
    return np.bincount(flat, minlength=layers * (experts + 1)).reshape(layers, -1)[:, :experts]


def _widened(by_step: dict[int, NDArray[np.int64]], step_T: NDArray[Any], width: int) -> tuple[int, dict[int, NDArray[np.int64]]]:
    """Width of the intervals, and what they hold, doubled until there is room for the steps to come: decoding has a step for every few tokens."""
    while len(by_step.keys() | set(np.unique(step_T // width).tolist())) > STEPS:
        width, halves, by_step = 2 * width, by_step, {}
        for interval, load in halves.items():
            by_step[interval // 2] = by_step.get(interval // 2, 0) + load
    return width, by_step


def _tenths(by_step: dict[int, NDArray[np.int64]]) -> tuple[list[int], list[NDArray[np.int64]]]:
    steps = sorted(by_step)
    if len(steps) < 2:
        return steps, [by_step[step] for step in steps]
    groups = [group for group in np.array_split(np.asarray(steps), min(10, len(steps))) if len(group)]
    return [int(group[0]) for group in groups], [np.sum([by_step[int(step)] for step in group], axis=0) for group in groups]
