"""Locality: how much the experts of a token tell about those of the tokens around it. SRP, CLS and SCH, streamed.

T tokens of one sequence, L MoE layers, K selections, E experts, m window in tokens, f tokens of a window that activate an expert.

A sequence ends where its id (with its rank) changes or its position falls back; windows never cross that. Metrics are of
Liu et al. 2025 (arXiv 2505.16056: SRP, SCH) and BlockFFN (Song et al. 2025: CLS). This module loads numba: import it lazily.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from moesim.model import ModelSpec
from moesim.trace.schema import NO_EXPERT
from moesim.trace.trace import TraceBatch

WINDOWS = (4, 8, 16, 64, 256)  # of SRP and CLS, tokens
SEGMENTS = (16, 64)  # of SCH, tokens
RHOS = (1, 2, 3, 4)  # cache sizes of SCH, in experts a token activates
BLOCK = 512  # SCH starts anew every so many tokens of a sequence, as in its source
CACHED_TOKENS = 1 << 14  # SCH looks at about so many tokens, in whole blocks spread over the trace
GROUPS = 64  # of sequences, resampled for the interval of SRP
BUFFER_B = 1 << 27  # of sequences that are still open
COLUMNS = ("rank", "sequence", "position")


@dataclass(frozen=True, kw_only=True)
class Locality:
    """Locality of a trace; W windows `WINDOWS`, M segments `SEGMENTS`, R cache sizes `RHOS`. NaN where no sequence is long enough.

    srp_W, srp_WL        best F1 score of switching each expert wholly on or off per window, model and layer
    srp_interval_W2      95 % interval of srp_W: percentile bootstrap over groups of sequences
    rho_W                experts that best router keeps on, over experts chosen
    cls_WL               share of experts no token of a window chooses; 1 - cls is the union a window must load
    sch_MR, sch_MRL      share of selections found in a cache of rho·K slots per layer that looks one segment ahead;
                         sch_MR has one pool of rho·K·L slots. First touches while slots are free count as found (warm fill)
    sequences, tokens    what was counted; `cached_tokens` of them in SCH
    midway               sequences whose beginning is not in the selection, or was let go to bound memory
    without_sequence     tokens left out, as no sequence is known for them
    """

    srp_W: NDArray[np.float64]
    srp_interval_W2: NDArray[np.float64]
    rho_W: NDArray[np.float64]
    srp_WL: NDArray[np.float64]
    cls_WL: NDArray[np.float64]
    sch_MR: NDArray[np.float64]
    sch_MRL: NDArray[np.float64]
    sequences: int
    tokens: int
    cached_tokens: int
    midway: int
    without_sequence: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; null where a figure is not defined."""
        figures = {
            "srp": self.srp_W,
            "srp_interval": self.srp_interval_W2,
            "srp_rho": self.rho_W,
            "srp_by_layer": self.srp_WL,
            "cls_by_layer": self.cls_WL,
            "sch": self.sch_MR,
            "sch_by_layer": self.sch_MRL,
        }
        counts = ("sequences", "tokens", "cached_tokens", "midway", "without_sequence")
        return {
            "windows": list(WINDOWS),
            "segments": list(SEGMENTS),
            "rhos": list(RHOS),
            **{name: _nulls(values.tolist()) for name, values in figures.items()},
            **{name: getattr(self, name) for name in counts},
        }


@dataclass(kw_only=True, slots=True)
class _Open:
    """A sequence under way: tokens not counted yet, and those before them that windows reach back to."""

    group: int
    position: int
    before: NDArray[np.int32]
    fresh: list[NDArray[np.int32]] = field(default_factory=list)
    length: int = 0


class LocalityMeter:
    """Adds up batches of a trace in order; memory is O(L) per window and at most `BUFFER_B` for sequences that may go on."""

    def __init__(self, model: ModelSpec, *, top_k: int, tokens: int) -> None:
        self._model = model
        layers = len(model.moe_layers)
        self._layer_hists = [np.zeros((layers, m + 1), np.int64) for m in WINDOWS]
        self._group_hists = [np.zeros((GROUPS, m + 1), np.int64) for m in WINDOWS]
        self._hits_MRL = np.zeros((len(SEGMENTS), len(RHOS), layers + 1), np.int64)  # the last "layer" is the whole model
        self._accesses_L = np.zeros(layers + 1, np.int64)
        self._every, self._blocks = max(1, -(-tokens // CACHED_TOKENS)), 0
        self._most = max(2 * BLOCK, BUFFER_B // (4 * layers * top_k))
        self._open: dict[tuple[int, int], _Open] = {}
        self._sequences, self._tokens, self._cached, self._midway, self._without, self._held = 0, 0, 0, 0, 0, 0

    def add(self, batch: TraceBatch) -> None:
        """Count T more tokens; `batch.columns` holds `COLUMNS`."""
        rank_T, sequence_T, position_T = (batch.columns[name] for name in COLUMNS)
        known = np.flatnonzero(sequence_T >= 0)
        self._without += len(sequence_T) - len(known)
        order = known[np.lexsort((sequence_T[known], rank_T[known]))]  # stable: tokens of a sequence stay in order
        if not len(order):
            return
        rank_T, sequence_T, position_T = rank_T[order], sequence_T[order], position_T[order]
        changes = (np.diff(rank_T) != 0) | (np.diff(sequence_T) != 0) | (np.diff(position_T) < 0)
        starts = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(order)]])
        ids_TLK = distinct(batch.experts_TLK[order])
        for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            key = int(rank_T[first]), int(sequence_T[first])
            self._extend(key, ids_TLK[first:last], int(position_T[first]), int(position_T[last - 1]))
        while self._held > self._most:
            self._finish(next(iter(self._open)))

    def _extend(self, key: tuple[int, int], ids_TLK: NDArray[np.int32], first: int, last: int) -> None:
        if key in self._open and self._open[key].position > first:
            self._finish(key)
        if key in self._open:
            sequence = self._open[key] = self._open.pop(key)  # the last to be let go
        else:
            sequence = self._open[key] = _Open(group=self._sequences % GROUPS, position=first, before=ids_TLK[:0])
            self._sequences += 1
            self._midway += first > 0
        sequence.position = last
        sequence.fresh.append(ids_TLK.copy())  # a view would keep the whole batch
        sequence.length += len(ids_TLK)
        self._held += len(ids_TLK)
        if sequence.length >= BLOCK:
            self._count(sequence, sequence.length // BLOCK * BLOCK)

    def _finish(self, key: tuple[int, int]) -> None:
        sequence = self._open.pop(key)
        self._count(sequence, sequence.length)
        self._held -= len(sequence.before)

    def _count(self, sequence: _Open, tokens: int) -> None:
        """Count the first `tokens` fresh tokens of a sequence and keep what later windows need of them."""
        experts = self._model.experts
        fresh = np.concatenate(sequence.fresh) if sequence.fresh else sequence.before[:0]
        ids_TLK, rest = fresh[:tokens], fresh[tokens:]
        chain = np.concatenate([sequence.before, ids_TLK])
        for m, by_layer, by_group in zip(WINDOWS, self._layer_hists, self._group_hists, strict=True):
            hist = count_windows(chain, experts, m, len(sequence.before))
            by_layer += hist
            by_group[sequence.group] += hist.sum(axis=0)
        for start in range(0, tokens, BLOCK):
            if self._blocks % self._every == 0:
                self._cache(ids_TLK[start : start + BLOCK])
            self._blocks += 1
        self._tokens += tokens
        self._held -= tokens + len(sequence.before)
        sequence.before = chain[max(0, len(chain) - max(WINDOWS) + 1) :].copy()
        sequence.fresh, sequence.length = [rest] if len(rest) else [], len(rest)
        self._held += len(sequence.before)

    def _cache(self, ids_TLK: NDArray[np.int32]) -> None:
        tokens, layers, width = ids_TLK.shape
        experts, top_k = self._model.experts, self._model.top_k
        offset_L1 = np.arange(layers, dtype=np.int32)[:, None] * experts
        pooled = np.where(ids_TLK < 0, -1, ids_TLK + offset_L1).reshape(tokens, layers * width)
        sizes = np.asarray(RHOS) * top_k
        for i, m in enumerate(SEGMENTS):
            for layer in range(layers):
                self._hits_MRL[i, :, layer] += segment_cache_hits(ids_TLK[:, layer], experts, sizes, m)
            self._hits_MRL[i, :, layers] += segment_cache_hits(pooled, layers * experts, sizes * layers, m)
        chosen_L = (ids_TLK >= 0).sum(axis=(0, 2))
        self._accesses_L += np.append(chosen_L, chosen_L.sum())
        self._cached += tokens

    def result(self) -> Locality:
        """Finish every sequence and say what was found."""
        for key in list(self._open):
            self._finish(key)
        model = [best_f1(hist.sum(axis=0)) for hist in self._layer_hists]
        with np.errstate(invalid="ignore", divide="ignore"):
            cls = np.stack([hist[:, 0] / hist.sum(axis=1) for hist in self._layer_hists])
            hit = self._hits_MRL / self._accesses_L.astype(np.float64)
        return Locality(
            srp_W=np.asarray([score for score, _ in model]),
            srp_interval_W2=np.stack([_interval(hists) for hists in self._group_hists]),
            rho_W=np.asarray([rho for _, rho in model]),
            srp_WL=np.asarray([[best_f1(row)[0] for row in hist] for hist in self._layer_hists]),
            cls_WL=cls,
            sch_MR=hit[:, :, -1],
            sch_MRL=hit[:, :, :-1],
            sequences=self._sequences,
            tokens=self._tokens,
            cached_tokens=self._cached,
            midway=self._midway,
            without_sequence=self._without,
        )


def distinct(ids_TLK: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Ids with -1 for no selection and for an expert a token has named before."""
    ids = np.where(ids_TLK == NO_EXPERT, -1, ids_TLK.astype(np.int32)).astype(np.int32)
    for k in range(1, ids.shape[2]):
        again = (ids[:, :, :k] == ids[:, :, k : k + 1]).any(axis=2)
        ids[:, :, k][again] = -1
    return ids


def _nulls(values: Any) -> Any:
    if isinstance(values, list):
        return [_nulls(value) for value in values]
    return None if math.isnan(values) else values


def best_f1(hist_f: NDArray[np.integer]) -> tuple[float, float]:
    """SRP and rho of a histogram of f in 0..m: `max_a 2·Σ_{f≥a} f / (m·#{f≥a} + Σ f)` and `m·#{f≥a*} / Σ f`; NaN when empty."""
    m = len(hist_f) - 1
    weight = np.arange(m + 1) * hist_f
    total = int(weight.sum())
    if total == 0:
        return float("nan"), float("nan")
    kept, windows = (np.cumsum(values[:0:-1]) for values in (weight, hist_f))  # thresholds m, m-1, …, 1
    scores = 2 * kept / (m * windows + total)
    best = int(scores.argmax())
    return float(scores[best]), float(m * windows[best] / total)


def _interval(hist_Gf: NDArray[np.int64]) -> NDArray[np.float64]:
    rows = hist_Gf[hist_Gf.any(axis=1)]
    if len(rows) < 2:
        return np.full(2, np.nan)
    draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=1000)
    return np.asarray(np.percentile([best_f1(hist)[0] for hist in draws @ rows], (2.5, 97.5)))


def count_windows(ids_TLK: NDArray[np.int32], experts: int, m: int, begin: int) -> NDArray[np.int64]:
    """[L, m+1] windows of m tokens, ending at token `begin` or later, by how many of their tokens activate an expert.

    One entry for every expert and window. `ids_TLK` names an expert once per token; -1 is none. Cost: O(T·L·K).
    """
    hist = np.zeros((ids_TLK.shape[1], m + 1), np.int64)
    _count_windows(ids_TLK, experts, m, begin, hist)
    return hist


def segment_cache_hits(ids_TA: NDArray[np.int32], experts: int, sizes: Sequence[int] | NDArray[np.integer], m: int) -> NDArray[np.int64]:
    """[R] selections found in caches of R sizes that start empty and see the next m tokens, the present one included.

    A token's hits are decided when it begins; then its experts are loaded in order, each over the resident expert with the
    fewest selections still to come in those m tokens, the least recently used of equals. A first touch is a hit while there
    are free slots (warm fill). Semantics of the reference program of arXiv 2505.16056. Cost: O(T·A·R·log size).
    """
    hits = np.zeros(len(sizes), np.int64)
    _segment_cache(ids_TA, experts, np.asarray(sizes, np.int64), m, hits)
    return hits


def _loop_windows(ids_TLK, experts, m, begin, hist_Lf):  # type: ignore[no-untyped-def]
    tokens, layers, width = ids_TLK.shape
    first = max(0, begin - m + 1)  # no earlier token is in a window that ends at `begin`
    counted = max(begin, m - 1)
    if tokens <= counted:
        return
    for layer in range(layers):
        count_E = np.zeros(experts, np.int64)
        since_E = np.full(experts, counted, np.int64)  # windows ending from here on have this count, so far
        for t in range(first, tokens):
            for change in (-1, 1):
                row = t - m if change < 0 else t
                if row < first:
                    continue
                for k in range(width):
                    expert = ids_TLK[row, layer, k]
                    if expert < 0:
                        continue
                    if t > since_E[expert]:
                        hist_Lf[layer, count_E[expert]] += t - since_E[expert]
                        since_E[expert] = t
                    count_E[expert] += change
        for expert in range(experts):
            hist_Lf[layer, count_E[expert]] += tokens - since_E[expert]


def _sift(heap_C, slot_E, key_E, size, at):  # type: ignore[no-untyped-def]
    """Move the expert at `at`, the only one out of place, to where its key belongs in a heap with the smallest on top."""
    expert = heap_C[at]
    while at > 0 and key_E[heap_C[(at - 1) // 2]] > key_E[expert]:
        heap_C[at] = heap_C[(at - 1) // 2]
        slot_E[heap_C[at]] = at
        at = (at - 1) // 2
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and key_E[heap_C[child + 1]] < key_E[heap_C[child]]:
            child += 1
        if key_E[heap_C[child]] > key_E[expert]:
            break
        heap_C[at] = heap_C[child]
        slot_E[heap_C[at]] = at
        at = child
    heap_C[at] = expert
    slot_E[expert] = at


def _loop_cache(ids_TA, experts, sizes_R, m, hits_R):  # type: ignore[no-untyped-def]
    tokens, width = ids_TA.shape
    key_E = np.zeros(experts, np.int64)  # selections to come << 32 | time of last use: the smallest is the victim
    slot_RE = np.full((len(sizes_R), experts), -1, np.int64)
    heap_RC = np.empty((len(sizes_R), sizes_R.max()), np.int64)  # resident experts, the victim first
    used_R = np.zeros(len(sizes_R), np.int64)
    clock, known = 0, 0
    for t in range(-m, tokens):
        for a in range(width * (t >= 0)):
            expert = ids_TA[t, a]
            if expert < 0:
                continue
            touched = key_E[expert] & 0xFFFFFFFF
            for r in range(len(sizes_R)):
                hits_R[r] += slot_RE[r, expert] >= 0 if touched else known < sizes_R[r]
            known += touched == 0
        for a in range(width * (t >= 0)):
            expert = ids_TA[t, a]
            if expert < 0:
                continue
            clock += 1
            key = ((key_E[expert] >> 32) - 1) << 32 | clock
            for r in range(len(sizes_R)):
                if slot_RE[r, expert] < 0:
                    at = used_R[r] if used_R[r] < sizes_R[r] else 0
                    if used_R[r] < sizes_R[r]:
                        used_R[r] += 1
                    else:
                        slot_RE[r, heap_RC[r, 0]] = -1
                    heap_RC[r, at] = expert
                    slot_RE[r, expert] = at
            key_E[expert] = key
            for r in range(len(sizes_R)):
                _move(heap_RC[r], slot_RE[r], key_E, used_R[r], slot_RE[r, expert])
        for a in range(width * (t + m < tokens)):
            expert = ids_TA[t + m, a]
            if expert < 0:
                continue
            key_E[expert] += 1 << 32
            for r in range(len(sizes_R)):
                if slot_RE[r, expert] >= 0:
                    _move(heap_RC[r], slot_RE[r], key_E, used_R[r], slot_RE[r, expert])


_move: Any = numba.njit(cache=True, nogil=True)(_sift)
_count_windows: Any = numba.njit(cache=True, nogil=True)(_loop_windows)
_segment_cache: Any = numba.njit(cache=True, nogil=True)(_loop_cache)
