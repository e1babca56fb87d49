"""Router logits in a trace: what is stored is read, in bounded memory, and only when asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.trace import Trace, TraceWriter, load_trace


@given(tokens=st.integers(1, 60), part_rows=st.integers(1, 50), group_rows=st.integers(1, 9), batch_rows=st.integers(1, 9))
def test_logits_survive_whatever_the_sizes(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, part_rows: int, group_rows: int, batch_rows: int
) -> None:
    """Logits are cut into smaller row groups and batches than ids are; one layer of a selection is read alone."""
    path, model = tmp_path_factory.mktemp("t") / "trace", tiny_model()
    layers, token_B = len(model.moe_layers), 2 * model.experts * len(model.moe_layers)
    logits = np.random.default_rng(tokens).normal(size=(tokens, layers, model.experts)) * 100
    logits[0, 0, :3] = -1e9, np.inf, np.nan  # beyond float16
    ids = np.zeros((tokens, layers, 2), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.trace.writer.GROUP_LOGITS_B", group_rows * token_B)
        patch.setattr("moesim.trace.trace.BATCH_LOGITS_B", batch_rows * token_B)
        with TraceWriter(path, model, weights=False, logits=True, part_rows=part_rows) as writer:
            for start in range(0, tokens, 7):
                rows = slice(start, start + 7)
                writer.append(ids[rows], logits=logits[rows], step=np.arange(tokens)[rows])
        trace = load_trace(path)
        batches = list(trace.batches(logits=True))
    groups = [pq.ParquetFile(part).metadata for part in trace.parts]
    assert max(meta.row_group(i).num_rows for meta in groups for i in range(meta.num_row_groups)) <= group_rows
    assert max(map(len, batches)) <= batch_rows
    with np.errstate(over="ignore"):
        stored = logits.astype(np.float16)
    np.testing.assert_array_equal(np.concatenate([batch.logits_TLE for batch in batches]), stored)
    one = trace.select(steps=(tokens // 2, tokens)).batches(logits=True, layers=model.moe_layers[1:2])
    np.testing.assert_array_equal(np.concatenate([batch.logits_TLE for batch in one]), stored[tokens // 2 :, 1:2])
    assert next(trace.batches()).logits_TLE is None


def test_logits_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    ids = np.zeros((4, len(model.moe_layers), 2), np.int64)
    with TraceWriter(tmp_path / "t", model, weights=False, logits=True) as writer:
        with pytest.raises(TraceError, match="stores router logits; pass logits="):
            writer.append(ids)
        with pytest.raises(TraceError, match=rf"logits: expected shape \[T, 3, {model.experts}\]|logits of layer"):
            writer.append(ids, logits=np.zeros((4, len(model.moe_layers), model.experts - 1)))
        writer.append(ids, logits=np.zeros((4, len(model.moe_layers), model.experts)))
    assert load_trace(tmp_path / "t").tokens == 4


def test_a_trace_of_before_there_were_logits_opens(trace: Trace) -> None:
    (part,) = trace.parts
    table = pq.read_table(part)
    meta = json.loads(table.schema.metadata[b"moesim"])
    assert meta.pop("logits") is False
    pq.write_table(table.replace_schema_metadata({b"moesim": json.dumps(meta).encode()}), part)
    with pytest.raises(TraceError, match="router logits were not captured"):
        next(load_trace(trace.path).batches(logits=True))
