"""Which token a row of a router belongs to: sequences, positions, padding, packing, decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_scripts.tiny import tiny_spec
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moesim import load_trace
from moesim.capture.discover import Router
from moesim.capture.gather import gather, stacked
from moesim.capture.routers import Adapter
from moesim.capture.rows import Pass, RowBuffer
from moesim.capture.tokens import Forward, Sequences, token_columns
from moesim.trace import NO_EXPERT, TraceWriter


def forward(batch: int, length: int, **facts: Any) -> Forward:
    values = {"stream": 0, "step": 3, "microbatch": 1, "domain": "d", "training": True, "past": 0, "prompt": 0}
    return Forward(batch=batch, length=length, **(values | facts))


documents = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4)


@given(documents, st.integers(0, 3), st.booleans())
def test_packed_documents_get_their_own_sequence_and_position_behind_any_padding(rows: list[list[int]], pad: int, left: bool) -> None:
    length = max(sum(row) for row in rows) + pad
    mask, position = np.zeros((len(rows), length), int), np.ones((len(rows), length), int)
    expected = []
    for b, row in enumerate(rows):
        start = length - sum(row) if left else 0
        for doc, size in enumerate(row):
            mask[b, start : start + size] = 1
            position[b, start : start + size] = np.arange(size)
            expected += [((b, doc), p) for p in range(size)]
            start += size
    columns, matched = token_columns(forward(len(rows), length), {"mask": mask, "position": position}, len(rows) * length, Sequences())
    valid = columns["valid"]
    assert matched
    assert int(valid.sum()) == len(expected)
    names = {key: n for n, key in enumerate(dict.fromkeys(key for key, _ in expected))}
    assert columns["sequence"][valid].tolist() == [names[key] for key, _ in expected]
    assert columns["position"][valid].tolist() == [p for _, p in expected]
    assert (columns["sequence"][~valid] == -1).all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_cumulative_lengths_say_the_same_as_position_ids(sizes: list[int]) -> None:
    total = sum(sizes)
    position = np.concatenate([np.arange(size) for size in sizes])[None]
    by_position, _ = token_columns(forward(1, total), {"position": position}, total, Sequences())
    by_bounds, _ = token_columns(forward(1, total), {"bounds": np.cumsum([0, *sizes])}, total, Sequences())
    for name in ("sequence", "position", "valid"):
        np.testing.assert_array_equal(by_position[name], by_bounds[name])


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4))
def test_decode_steps_continue_the_sequences_of_their_prompt(batch: int, prompt: int, steps: int, pads: int) -> None:
    sequences, rng = Sequences(), np.random.default_rng(batch)
    length = prompt + pads
    mask = np.ones((batch, length), int)
    for b in range(batch):
        mask[b, : rng.integers(0, pads + 1)] = 0
    seen: list[tuple[int, int]] = []
    for call in range(2):  # a second prompt must not continue the first
        columns, _ = token_columns(forward(batch, length, training=False, prompt=call), {"mask": mask}, batch * length, sequences)
        assert columns["phase"] == "prefill"
        first = columns["sequence"].reshape(batch, length)[:, -1]
        seen += zip(columns["sequence"][columns["valid"]].tolist(), columns["position"][columns["valid"]].tolist(), strict=True)
        for step in range(steps):
            grown = np.concatenate([mask, np.ones((batch, step + 1), int)], axis=1)
            now = forward(batch, 1, training=False, past=length + step, prompt=call)
            columns, _ = token_columns(now, {"mask": grown}, batch, sequences)
            assert columns["phase"] == "decode"
            assert columns["valid"].all()
            np.testing.assert_array_equal(columns["sequence"], first)
            seen += zip(columns["sequence"].tolist(), columns["position"].tolist(), strict=True)
    assert len(set(seen)) == len(seen)


def test_rows_of_a_sequence_first_layout_are_named_transposed() -> None:
    token = np.arange(6).reshape(2, 3)
    columns, _ = token_columns(forward(2, 3, sequence_first=True), {"token_id": token}, 6, Sequences())
    assert columns["token_id"].tolist() == [0, 3, 1, 4, 2, 5]
    assert columns["sequence"].tolist() == [0, 1, 0, 1, 0, 1]


def test_rows_without_padding_are_matched_to_the_tokens_that_are_left() -> None:
    mask = np.array([[0, 1, 1], [1, 1, 0]])
    columns, matched = token_columns(forward(2, 3), {"mask": mask, "token_id": np.arange(6).reshape(2, 3)}, 4, Sequences())
    assert matched
    assert columns["token_id"].tolist() == [1, 2, 3, 4]
    assert columns["valid"].all()


def test_rows_that_fit_no_token_are_kept_and_said_to_be_unmatched() -> None:
    columns, matched = token_columns(forward(2, 3), {}, 5, Sequences())
    assert not matched
    assert columns["sequence"] == -1
    assert columns["position"].tolist() == [0, 1, 2, 3, 4]


def test_one_domain_for_each_sequence() -> None:
    columns, _ = token_columns(forward(2, 2, domain=("a", "b")), {}, 4, Sequences())
    assert columns["domain"].tolist() == ["a", "a", "b", "b"]


def test_a_length_on_the_device_decides_position_and_phase() -> None:
    columns, _ = token_columns(forward(2, 1, training=False, past=1), {"past": np.array(7)}, 2, Sequences())
    assert columns["phase"] == "decode"
    assert columns["position"].tolist() == [7, 7]


@pytest.mark.parametrize("on_device", [False, True])
def test_joined_passes_are_the_passes_one_by_one(on_device: bool, tmp_path: Path) -> None:
    """Whole passes, chunked ones, a silent router and -1 (no selection), in order and in their own dtypes; stacked as on a device, or not."""
    generator, passes = torch.Generator().manual_seed(0), []
    group = [
        Router(name=f"r{layer}", module=nn.Identity(), adapter=Adapter(name="x", read=lambda *_: _), layer=layer, owner="") for layer in range(3)
    ]
    for kind in (torch.int64, torch.int32, torch.uint16, torch.int64):
        ids, logits = torch.randint(0, 4, (3, 6, 2), generator=generator).to(kind), torch.randn(3, 6, 8, generator=generator)
        passes.append([(layer, ids[layer], None, logits[layer]) for layer in range(3)])
    passes[1][1][1][0] = -1
    passes[1][1][3][0] = torch.finfo(torch.float32).min  # how a router masks
    del passes[3][2]
    expected = [np.stack([ids.numpy().astype(np.uint16) for _, ids, *_ in kept], axis=1) for kept in passes[:3]]
    last = np.stack([ids.numpy() for _, ids, *_ in passes[3]], axis=1)
    expected.append(np.concatenate([last, np.full((6, 1, 2), NO_EXPERT)], axis=1).astype(np.uint16))
    scores = [np.stack([values.half().numpy() for *_, values in kept], axis=1) for kept in passes]
    scores[3] = np.concatenate([scores[3], np.full((6, 1, 8), np.nan)], axis=1)
    passes[0] = [(layer, ids[rows], None, values[rows]) for rows in (slice(4), slice(4, 6)) for layer, ids, _, values in passes[0]]
    with TraceWriter(tmp_path / "t", tiny_spec(), weights=False, logits=True) as writer:
        rows = RowBuffer(writer, [group])
        for number, kept in enumerate(passes):
            label = forward(2, 3, prompt=number, domain=("a", "b") if number == 2 else "c")
            arrays = {"mask": np.ones((2, 3))}
            if on_device:
                arrays |= {name: tensor.numpy() for name, tensor in stacked(gather(group, kept, writer.info.widths)).items()}
            rows.add(Pass(label, 6, 96, () if on_device else kept), arrays)
        rows.flush()
    trace = load_trace(tmp_path / "t")
    np.testing.assert_array_equal(trace.experts(), np.concatenate(expected))
    (batch,) = trace.batches(columns=("sequence", "position", "domain"), logits=True)
    np.testing.assert_array_equal(batch.logits_TLE, np.concatenate(scores))
    assert batch.columns["sequence"].tolist() == np.repeat(np.arange(8), 3).tolist()
    assert batch.columns["position"].tolist() == [0, 1, 2] * 8
    assert batch.columns["domain"].tolist() == ["c"] * 12 + ["a"] * 3 + ["b"] * 3 + ["c"] * 6
