"""inspect: what a trace's routing looks like, in one pass over its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.trace.schema import NO_EXPERT
from moesim.trace.stats import TraceStats, drift_bits
from moesim.trace.trace import Trace

BATCH = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Statistics of a trace's selected tokens.

    load_by_domain     int64 [L, E] per domain
    drift_DD           mean Jensen-Shannon divergence of two domains' loads over layers, bits
    drift_over_steps   [S-1, L] the same between consecutive tenths of the training steps; empty for one step
    """

    stats: TraceStats
    load_by_domain: dict[str, NDArray[np.int64]]
    drift_DD: NDArray[np.float64]
    step_edges: list[int]
    drift_over_steps: NDArray[np.float64]
    empty_selections: int
    repeated_share: float  # of tokens whose selections equal the token before in every layer: padding or dummy batches

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
            "step_edges": self.step_edges,
            "step_drift_bits": self.drift_over_steps.tolist(),
            "empty_selections": self.empty_selections,
            "repeated_share": self.repeated_share,
            "load": stats.load_LE.tolist(),
        }


def inspect(trace: Trace) -> Inspection:
    """Inspection of the selected tokens. Streams; memory is O(L·E²), whatever the number of tokens."""
    model = trace.model
    total = TraceStats.empty(model)
    loads: dict[str, NDArray[np.int64]] = {}
    by_step: dict[int, NDArray[np.int64]] = {}
    empty, repeated, last = 0, 0, None
    for batch in trace.batches(rows=BATCH, columns=("domain", "step")):
        ids = batch.experts_TLK
        total = total + TraceStats.from_experts(ids, model)
        empty += int((ids == NO_EXPERT).sum())
        before = ids[:1] if last is None else last
        chain = np.concatenate([before, ids])
        repeated += int((chain[1:] == chain[:-1]).all(axis=(1, 2)).sum()) - (last is None)
        last = ids[-1:]
        for domain in np.unique(batch.columns["domain"]):
            here = _load(ids[batch.columns["domain"] == domain], model.experts)
            loads[str(domain)] = loads.get(str(domain), 0) + here
        for step in np.unique(batch.columns["step"]):
            here = _load(ids[batch.columns["step"] == step], model.experts)
            by_step[int(step)] = by_step.get(int(step), 0) + here
    names = sorted(loads)
    drift = np.asarray([[drift_bits(loads[a], loads[b]).mean() for b in names] for a in names])
    edges, tenths = _tenths(by_step)
    return Inspection(
        stats=total,
        load_by_domain={name: loads[name] for name in names},
        drift_DD=drift,
        step_edges=edges,
        drift_over_steps=np.asarray([drift_bits(a, b) for a, b in pairwise(tenths)]),
        empty_selections=empty,
        repeated_share=repeated / max(total.tokens, 1),
    )


def _load(ids_TLK: NDArray[np.uint16], experts: int) -> NDArray[np.int64]:
    ids = np.where(ids_TLK == NO_EXPERT, experts, ids_TLK).astype(np.int64)
    layers = ids.shape[1]
    flat = (ids + np.arange(layers)[:, None] * (experts + 1)).ravel()
    return np.bincount(flat, minlength=layers * (experts + 1)).reshape(layers, -1)[:, :experts]


def _tenths(by_step: dict[int, NDArray[np.int64]]) -> tuple[list[int], list[NDArray[np.int64]]]:
    steps = sorted(by_step)
    if len(steps) < 2:
        return steps, [by_step[step] for step in steps]
    groups = [group for group in np.array_split(np.asarray(steps), min(10, len(steps))) if len(group)]
    return [int(group[0]) for group in groups], [np.sum([by_step[int(step)] for step in group], axis=0) for group in groups]
