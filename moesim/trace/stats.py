"""TraceStats: what solvers and costs need of a trace, as a commutative monoid (`a + b`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.model import ModelSpec
from moesim.trace.schema import NO_EXPERT
from moesim.trace.trace import Trace


@dataclass(frozen=True, kw_only=True)
class TraceStats:
    """Sums over tokens, so that statistics of parts add up to those of the whole.

    load_LE             int64, selections of each expert
    coactivation_LEE    int64, tokens that chose both experts in one layer; the diagonal is the load
    transitions_LEE     int64 [L-1, E, E], pairs (expert in MoE layer i, expert in layer i+1) of one token
    """

    model: ModelSpec
    tokens: int
    load_LE: NDArray[np.int64]
    coactivation_LEE: NDArray[np.int64]
    transitions_LEE: NDArray[np.int64]

    @classmethod
    def empty(cls, model: ModelSpec) -> TraceStats:
        """The neutral element of `+`."""
        layers, experts = len(model.moe_layers), model.experts
        return cls(
            model=model,
            tokens=0,
            load_LE=np.zeros((layers, experts), np.int64),
            coactivation_LEE=np.zeros((layers, experts, experts), np.int64),
            transitions_LEE=np.zeros((layers - 1, experts, experts), np.int64),
        )

    @classmethod
    def from_experts(cls, experts_TLK: NDArray[np.integer], model: ModelSpec) -> TraceStats:
        """Statistics of tokens in memory; 65535 is no selection."""
        tokens, layers, _ = experts_TLK.shape
        size = model.experts + 1  # one more row gathers "no selection" and is cut off
        ids = np.where(experts_TLK == NO_EXPERT, model.experts, experts_TLK).astype(np.int64)
        load = np.empty((layers, model.experts), np.int64)
        together = np.empty((layers, model.experts, model.experts), np.int64)
        following = np.empty((layers - 1, model.experts, model.experts), np.int64)
        for layer in range(layers):
            here = ids[:, layer, :, None]
            load[layer] = np.bincount(here.ravel(), minlength=size)[:-1]
            pairs = (here * size + ids[:, layer, None, :]).ravel()
            together[layer] = np.bincount(pairs, minlength=size * size).reshape(size, size)[:-1, :-1]
            if layer + 1 < layers:
                pairs = (here * size + ids[:, layer + 1, None, :]).ravel()
                following[layer] = np.bincount(pairs, minlength=size * size).reshape(size, size)[:-1, :-1]
        return cls(model=model, tokens=tokens, load_LE=load, coactivation_LEE=together, transitions_LEE=following)

    @classmethod
    def of(cls, trace: Trace, *, rows: int = 1 << 14) -> TraceStats:
        """Statistics of a trace's selected tokens, streamed."""
        return sum((cls.from_experts(batch.experts_TLK, trace.model) for batch in trace.batches(rows=rows)), cls.empty(trace.model))

    def __add__(self, other: TraceStats) -> TraceStats:
        if self.model.digest != other.model.digest:
            raise TraceError(f"cannot add statistics of {self.model.name!r} and {other.model.name!r}: different models")
        return TraceStats(
            model=self.model,
            tokens=self.tokens + other.tokens,
            load_LE=self.load_LE + other.load_LE,
            coactivation_LEE=self.coactivation_LEE + other.coactivation_LEE,
            transitions_LEE=self.transitions_LEE + other.transitions_LEE,
        )

    @cached_property
    def skew_L(self) -> NDArray[np.float64]:
        """Hottest expert over the mean expert, per layer; 1 is perfect balance."""
        mean = self.load_LE.mean(axis=1)
        return np.asarray(np.divide(self.load_LE.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0))

    @cached_property
    def affinity_bits(self) -> NDArray[np.float64]:
        """[L-1] mutual information of the experts of consecutive layers, in bits, Miller-Madow corrected for its bias.

        Source of the correction: Miller 1955; the plug-in estimate is biased up by (r-1)(c-1)/(2 n ln 2).
        """
        joint = self.transitions_LEE.astype(np.float64)
        total = joint.sum(axis=(1, 2), keepdims=True)
        p = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)
        outer = p.sum(2, keepdims=True) * p.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            plug_in = np.nansum(np.where(p > 0, p * np.log2(p / outer), 0.0), axis=(1, 2))
        rows, columns = (p.sum(2) > 0).sum(1), (p.sum(1) > 0).sum(1)
        bias = (rows - 1) * (columns - 1) / (2 * np.maximum(self.tokens, 1) * np.log(2))
        return np.asarray(np.maximum(plug_in - bias, 0.0))


def drift_bits(load_LE: NDArray[np.number], other_LE: NDArray[np.number]) -> NDArray[np.float64]:
    """[L] Jensen-Shannon divergence of two load distributions, in bits: 0 equal, 1 disjoint (Lin 1991)."""
    p, q = (np.asarray(x, np.float64) / np.maximum(np.sum(x, axis=1, keepdims=True), 1) for x in (load_LE, other_LE))
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(x > 0, x * np.log2(x / middle), 0.0).sum(axis=1) for x in (p, q)]
    return np.asarray(np.maximum((terms[0] + terms[1]) / 2, 0.0))
