"""Locality metrics equal their definitions, however the trace is cut into batches, and published conformance numbers."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from moesim.cli import app
from moesim.model import ModelSpec
from moesim.trace import NO_EXPERT, Trace, TraceStats, TraceWriter, load_trace
from moesim.trace import locality as room
from moesim.trace.inspect import inspect, top_pairs
from moesim.trace.locality import Locality, LocalityMeter, best_f1, count_windows, distinct, segment_cache_hits
from moesim.trace.trace import TraceBatch

MakeTrace = Callable[..., Trace]
Tokens = Sequence[Sequence[int]]  # experts of each token, one layer


def routing(rng: np.random.Generator, tokens: int, layers: int, experts: int, width: int) -> NDArray[np.int32]:
    """Skewed selections without repeats, some of them missing."""
    ids = np.argsort(rng.gumbel(size=(tokens, layers, experts)) + rng.normal(size=(layers, experts)), axis=2)[:, :, :width].astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    return ids


# --- SRP and CLS --------------------------------------------------------------------------------------------------


def counts_by_hand(sequences: Sequence[Tokens], experts: int, m: int) -> list[int]:
    """f of every window position and expert of one layer."""
    return [
        sum(expert in token for token in tokens[p : p + m]) for tokens in sequences for p in range(len(tokens) - m + 1) for expert in range(experts)
    ]


def srp_by_hand(counts: Sequence[int], m: int) -> float:
    """Best F1 over all thresholds, written as precision and recall."""
    scores = []
    for alpha in range(1, m + 1):
        on = [f for f in counts if f >= alpha]
        if on:
            precision, recall = sum(on) / (m * len(on)), sum(on) / sum(counts)
            scores.append(2 * precision * recall / (precision + recall))
    return max(scores, default=float("nan"))


@given(seed=st.integers(0, 10**6), tokens=st.integers(0, 30), m=st.integers(1, 9), begin=st.integers(0, 30))
def test_window_counts_equal_counting_by_hand(seed: int, tokens: int, m: int, begin: int) -> None:
    ids = routing(np.random.default_rng(seed), tokens, layers=2, experts=5, width=2)
    found = count_windows(ids, 5, m, begin)
    for layer in range(2):
        late = [ids[max(0, begin - m + 1) :, layer].tolist()]
        np.testing.assert_array_equal(found[layer], np.bincount(counts_by_hand(late, 5, m), minlength=m + 1))


def batches(
    ids_TLK: NDArray[np.int32], sequence: NDArray[np.integer], position: NDArray[np.integer], rank: NDArray[np.integer], cuts: Sequence[int]
) -> list[TraceBatch]:
    edges = [0, *sorted(cut % (len(ids_TLK) + 1) for cut in cuts), len(ids_TLK)]
    experts = np.where(ids_TLK < 0, NO_EXPERT, ids_TLK).astype(np.uint16)
    columns = {"sequence": sequence, "position": position, "rank": rank}
    return [
        TraceBatch(experts_TLK=experts[a:b], weights_TLK=None, columns={name: values[a:b] for name, values in columns.items()})
        for a, b in pairwise(edges)
    ]


def metered(model: ModelSpec, parts: Sequence[TraceBatch]) -> Locality:
    meter = LocalityMeter(model, top_k=model.top_k, tokens=sum(len(part) for part in parts))
    for part in parts:
        meter.add(part)
    return meter.result()


def share(hits: int, ids: NDArray[np.int32]) -> float:
    chosen = int((ids >= 0).sum())
    return hits / chosen if chosen else float("nan")


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), cuts=st.lists(st.integers(0, 200), max_size=4))
def test_streamed_interleaved_sequences_equal_the_definition(seed: int, lengths: list[int], cuts: list[int]) -> None:
    """Sequences whose tokens come in any interleaving, batches of any size, blocks smaller than windows."""
    rng = np.random.default_rng(seed)
    model = tiny_model(layers=2, experts=6, top_k=2)
    owner = rng.permutation(np.repeat(np.arange(len(lengths)), lengths))
    position = np.asarray([(owner[:i] == s).sum() for i, s in enumerate(owner)])
    ids = routing(rng, len(owner), 2, 6, 2)
    with patch.multiple(room, WINDOWS=(2, 3, 7), SEGMENTS=(3,), RHOS=(1, 2), BLOCK=5):
        found = metered(model, batches(ids, owner // 2, position, owner % 2, cuts))
    sequences = [ids[owner == s] for s in range(len(lengths))]
    for w, m in enumerate((2, 3, 7)):
        counts = [counts_by_hand([s[:, layer].tolist() for s in sequences], 6, m) for layer in range(2)]
        np.testing.assert_allclose(found.srp_W[w], srp_by_hand(list(chain(*counts)), m), rtol=1e-12)
        np.testing.assert_allclose(found.srp_WL[w], [srp_by_hand(c, m) for c in counts], rtol=1e-12)
        np.testing.assert_allclose(found.cls_WL[w], [c.count(0) / len(c) if c else np.nan for c in counts], rtol=1e-12)
    for r, rho in enumerate((1, 2)):
        blocks = [s[i : i + 5] for s in sequences for i in range(0, len(s), 5)]
        for layer in range(2):
            hits = sum(hits_by_hand(b[:, layer].tolist(), 2 * rho, 3) for b in blocks)
            np.testing.assert_allclose(found.sch_MRL[0, r, layer], share(hits, ids[:, layer]))
        pooled = [[[e + 6 * layer for layer in range(2) for e in token[layer] if e >= 0] for token in b] for b in blocks]
        hits = sum(hits_by_hand(tokens, 4 * rho, 3) for tokens in pooled)
        np.testing.assert_allclose(found.sch_MR[0, r], share(hits, ids))
    assert (found.sequences, found.tokens, found.midway) == (len(lengths), len(owner), 0)


def test_the_best_threshold_is_a_threshold_on_half_the_score() -> None:
    """Optimality of F1 (Lipton et al. 2014): the best router switches on exactly the windows with f ≥ m·SRP/2."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        hist = rng.integers(0, 50, 9)
        score, rho = best_f1(hist)
        f = np.arange(9)
        on = f >= 4 * score
        assert rho == pytest.approx(8 * hist[on].sum() / (f * hist).sum())


@pytest.mark.parametrize(
    ("tokens", "experts", "m", "srp", "rho"),
    [
        ([[0], [0], [1], [0], [0], [0]], 2, 2, 5 / 6, 1.4),
        ([[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]], 4, 1, 1.0, 1.0),
        ([[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]], 4, 2, 0.8, 1.5),
        ([[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]], 4, 4, 0.75, 1.0),
    ],
)
def test_srp_of_cases_worked_out_on_paper(tokens: list[list[int]], experts: int, m: int, srp: float, rho: float) -> None:
    hist = count_windows(np.asarray(tokens, np.int32)[:, None], experts, m, 0)[0]
    assert best_f1(hist) == (pytest.approx(srp), pytest.approx(rho))


def test_routing_that_never_changes_is_wholly_local_and_noise_is_not() -> None:
    model = tiny_model(layers=2, experts=16, top_k=2)
    rng = np.random.default_rng(0)
    position = np.arange(600)
    zero = np.zeros(600, int)
    still = metered(model, batches(np.tile(np.asarray([[[3, 7], [0, 9]]], np.int32), (600, 1, 1)), zero, position, zero, []))
    np.testing.assert_array_equal(still.srp_W, 1)
    np.testing.assert_array_equal(still.sch_MR, 1)
    np.testing.assert_allclose(still.cls_WL, 14 / 16)
    noise = metered(model, batches(np.argsort(rng.random((600, 2, 16)), axis=2)[:, :, :2].astype(np.int32), zero, position, zero, []))
    assert noise.srp_W[-1] < 0.3  # all experts on is the best left: 2·K/(K+E)
    np.testing.assert_allclose(noise.srp_W[-1], 2 * 2 / (2 + 16), atol=0.04)
    np.testing.assert_allclose(noise.cls_WL[1], (14 / 16) ** 8, atol=0.03)


# --- SCH ----------------------------------------------------------------------------------------------------------


def hits_by_hand(tokens: Tokens, size: int, m: int) -> int:
    """One cache, every count taken afresh from the tokens themselves."""
    resident: set[int] = set()
    used: dict[int, int] = {}
    hits = clock = 0
    for t, token in enumerate(tokens):
        demanded = [expert for expert in token if expert >= 0]
        known = len(used)
        for expert in demanded:
            if expert in used:
                hits += expert in resident
            else:
                hits += known < size
                known += 1
        for i, expert in enumerate(demanded):
            if expert not in resident and len(resident) == size:
                done = set(demanded[:i])
                coming = {e: sum(e in later for later in tokens[t : t + m]) - (e in done) for e in resident}
                resident.remove(min(resident, key=lambda e: (coming[e], used[e])))
            resident.add(expert)
            clock += 1
            used[expert] = clock
    return hits


@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 40), experts=st.integers(2, 9), m=st.integers(1, 12))
def test_segment_cache_equals_replaying_each_size_by_hand(seed: int, tokens: int, experts: int, m: int) -> None:
    ids = routing(np.random.default_rng(seed), tokens, 1, experts, min(3, experts))[:, 0]
    sizes = range(1, experts + 2)
    assert segment_cache_hits(ids, experts, list(sizes), m).tolist() == [hits_by_hand(ids.tolist(), size, m) for size in sizes]


@pytest.mark.parametrize(
    ("experts", "width", "m", "hits"),
    [
        (8, 2, 4, [12, 40, 68, 84, 95, 104, 112, 120]),
        (6, 3, 16, [35, 72, 102, 136, 160, 180]),
        (12, 4, 7, [19, 53, 83, 107, 130, 153, 173, 191, 203, 214, 232, 240]),
    ],
)
def test_segment_cache_equals_the_reference_program(experts: int, width: int, m: int, hits: list[int]) -> None:
    """Hits of caches of 1..E experts on made-up routing, computed with `calc_fsf` of ljcleo/moe-lrc at 7b3ca46 (MIT)."""
    t = np.arange(60)[:, None]
    ids = ((t * t // 5 + t // 3) % experts + np.arange(width) * (1 + t % 2)) % experts
    assert segment_cache_hits(ids.astype(np.int32), experts, range(1, experts + 1), m).tolist() == hits


@given(seed=st.integers(0, 10**6), m=st.integers(1, 20))
def test_more_cache_never_hurts_and_names_do_not_matter(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    ids = routing(rng, 50, 1, 8, 2)[:, 0]
    hits = segment_cache_hits(ids, 8, range(1, 9), m)
    assert (np.diff(hits) >= 0).all()
    assert hits[-1] == (ids >= 0).sum()
    other = np.append(rng.permutation(8), -1).astype(np.int32)
    np.testing.assert_array_equal(segment_cache_hits(other[ids], 8, range(1, 9), m), hits)


# --- streaming ----------------------------------------------------------------------------------------------------


def test_a_sequence_ends_where_its_id_changes_or_its_position_falls_back(model: ModelSpec) -> None:
    ids = np.zeros((12, 3, 2), np.int32)
    zero = np.zeros(12, int)
    position = np.asarray([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7])
    assert metered(model, batches(ids, zero, position, zero, [2, 6])).sequences == 2
    assert metered(model, batches(ids, zero, zero, zero, [5])).sequences == 1  # positions not recorded
    found = metered(model, batches(ids, np.where(position > 3, -1, 0), position + 1, zero, []))
    assert (found.sequences, found.midway, found.without_sequence, found.tokens) == (2, 2, 4, 8)
    assert np.isnan(found.srp_W[1:]).all()  # windows of 8 tokens need sequences of 8
    json.dumps(found.to_dict(), allow_nan=False)


def test_sequences_let_go_are_counted_and_no_token_is_lost() -> None:
    model = tiny_model(layers=2, experts=8, top_k=2)
    rng = np.random.default_rng(1)
    owner = np.tile(np.arange(200), 30)  # two hundred sequences at once, one token each in turn
    position = np.repeat(np.arange(30), 200)
    parts = batches(routing(rng, 6000, 2, 8, 2), owner, position, 0 * owner, list(range(0, 6000, 500)))
    whole = metered(model, parts)
    with patch.object(room, "BUFFER_B", 1):
        small = metered(model, parts)
    assert (whole.sequences, whole.midway, whole.tokens) == (200, 0, 6000)
    assert small.tokens == 6000
    assert small.midway > 0
    np.testing.assert_allclose(small.srp_W[0], whole.srp_W[0], atol=0.05)


def test_memory_does_not_grow_with_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BUFFER_B", 1 << 20)  # 16,000 tokens here
    model = tiny_model(layers=4, experts=32, top_k=4)

    def peak_B(tokens: int) -> int:
        path = tmp_path / str(tokens)
        with TraceWriter(path, model, weights=False) as writer:
            for start in range(0, tokens, 20_000):
                ids = clustered_routing(model, 20_000, seed=start)
                writer.append(ids, sequence=np.arange(start, start + 20_000) // 300, position=np.arange(start, start + 20_000) % 300)
        trace = load_trace(path)
        tracemalloc.start()
        inspect(trace)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_B(20_000)  # imports and compilation
    assert peak_B(400_000) < 1.2 * peak_B(40_000)


# --- co-activation and the command --------------------------------------------------------------------------------


def test_planted_pairs_are_found_with_their_lift() -> None:
    model = tiny_model(layers=1, experts=16, top_k=2)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8, (8000, 1, 2)) * np.asarray([1, 1]) + np.asarray([0, 8])  # independent halves
    ids[:2000, 0] = (3, 12)
    stats = TraceStats.from_experts(ids.astype(np.uint16), model)
    first = top_pairs(stats)[0]
    assert (first.layer, first.experts) == (1, (3, 12))
    load = np.bincount(ids.ravel())
    together = int(((ids[:, 0, 0] == 3) & (ids[:, 0, 1] == 12)).sum())
    assert first.tokens == together
    assert first.lift == pytest.approx(together * 8000 / (load[3] * load[12]))
    every_pair = np.stack(np.divmod(np.arange(6400) % 64, 8), axis=1)[:, None] + np.asarray([0, 8])
    assert top_pairs(TraceStats.from_experts(every_pair.astype(np.uint16), model)) == []  # independent to the token


def test_repeated_experts_of_a_token_count_once() -> None:
    ids = np.asarray([[[3, 3, NO_EXPERT], [1, 2, 1]]], np.uint16)
    assert sorted(distinct(ids)[0, 0].tolist()) == [-1, -1, 3]
    assert sorted(distinct(ids)[0, 1].tolist()) == [-1, 1, 2]


def test_inspect_says_it_all(model: ModelSpec, make_trace: MakeTrace) -> None:
    ids = clustered_routing(model, 600)
    trace = make_trace(model, ids, sequence=np.arange(600) // 100, position=np.arange(600) % 100, domain=["a"] * 300 + ["b"] * 300)
    done = CliRunner().invoke(app, ["inspect", str(trace.path), "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    near = data["locality"]
    assert near["srp"][-1] is None
    assert 0 < near["srp_interval"][0][0] <= near["srp"][0] <= near["srp_interval"][0][1] < 1
    assert len(near["sch"]) == len(near["segments"])
    assert {pair["layer"] for pair in data["coactivation"]} == {1, 2, 3}
    assert np.mean(data["domain_drift_by_layer"]) == pytest.approx(data["domain_drift_bits"][0][1])
    shown = CliRunner().invoke(app, ["inspect", str(trace.path)])
    assert shown.exit_code == 0
    for word in ("SRP", "CLS", "SCH", "lift", "Drift between domains"):
        assert word in shown.stdout
