"""Traces: what is written is read, selections are exact, damage is named."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moesim.errors import OutputExists, TraceError
from moesim.model import ModelSpec
from moesim.trace import NO_EXPERT, Trace, TraceStats, TraceWriter, drift_bits, load_trace
from moesim.trace.inspect import inspect
from moesim.trace.writer import GROUP_ROWS

MakeTrace = Callable[..., Trace]
IDS = arrays(np.int64, st.tuples(st.integers(1, 40), st.just(3), st.just(2)), elements=st.integers(-1, 15))


@given(ids=IDS, part_rows=st.integers(1, 50))
def test_ids_survive_the_disk_whatever_the_part_size(tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray, part_rows: int) -> None:
    path = tmp_path_factory.mktemp("t") / "trace"
    with TraceWriter(path, tiny_model(), weights=False, part_rows=part_rows) as writer:
        for start in range(0, len(ids), 7):
            writer.append(ids[start : start + 7])
    np.testing.assert_array_equal(load_trace(path).experts(), np.where(ids < 0, NO_EXPERT, ids))


def test_token_columns_and_weights_survive(model: ModelSpec, make_trace: MakeTrace) -> None:
    ids = clustered_routing(model, 50)
    weights = np.linspace(0, 1, ids.size).reshape(ids.shape).astype(np.float16)
    trace = make_trace(model, ids, weights=weights, step=np.arange(50) // 10, sequence=7, token_id=np.arange(50), phase="decode", domain="law")
    batch = next(trace.batches(weights=True, columns=("step", "sequence", "token_id", "phase", "domain")))
    np.testing.assert_array_equal(batch.weights_TLK, weights)
    assert batch.columns["step"].tolist() == (np.arange(50) // 10).tolist()
    assert set(batch.columns["sequence"]) == {7}
    assert set(batch.columns["phase"]) == {"decode"}
    assert set(batch.columns["domain"]) == {"law"}
    assert trace.model == model


def test_padding_is_left_out(model: ModelSpec, make_trace: MakeTrace) -> None:
    ids = clustered_routing(model, 30)
    valid = np.arange(30) % 3 != 0
    assert make_trace(model, ids, valid=valid).tokens == 20


@given(low=st.integers(0, 100), high=st.integers(0, 100), rows=st.integers(1, 700))
def test_a_range_and_its_complement_are_the_trace(trace_of_1000: Trace, low: int, high: int, rows: int) -> None:
    low, high = sorted((low, high))
    pieces = []
    for text in (f":{low}%", f"{low}%:{high}%", f"{high}%:"):
        try:
            pieces.append(np.concatenate([b.experts_TLK for b in trace_of_1000.select(tokens=text).batches(rows=rows)]))
        except TraceError as problem:
            assert "no tokens" in str(problem)
    np.testing.assert_array_equal(np.concatenate(pieces), trace_of_1000.experts())


@pytest.fixture(scope="module")
def trace_of_1000(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("t") / "trace"
    model = tiny_model()
    with TraceWriter(path, model, weights=False, part_rows=170) as writer:
        ids = clustered_routing(model, 1000)
        for start in range(0, 1000, 90):
            writer.append(ids[start : start + 90])
    return load_trace(path)


def test_domains_are_selected_before_the_range(trace: Trace) -> None:
    prose = trace.select(domain="prose")
    assert prose.tokens == trace.tokens_by_domain["prose"]
    half = prose.select(tokens="50%:")
    np.testing.assert_array_equal(half.experts(), prose.experts()[round(prose.tokens / 2) :])
    with pytest.raises(TraceError, match="domains here: code, prose"):
        trace.select(domain="poetry")
    with pytest.raises(TraceError, match="already selected"):
        half.select(domain="prose")


@given(a=st.integers(0, 100), b=st.integers(0, 100), c=st.integers(0, 100), d=st.integers(0, 100))
def test_a_range_of_a_range_is_what_slicing_gives(trace_of_1000: Trace, a: int, b: int, c: int, d: int) -> None:
    (a, b), (c, d) = sorted((a, b)), sorted((c, d))
    outer = trace_of_1000.experts()[10 * a : 10 * b]
    inner = outer[round(len(outer) * c / 100) : round(len(outer) * d / 100)]
    try:
        found = trace_of_1000.select(tokens=f"{a}%:{b}%").select(tokens=f"{c}%:{d}%").experts()
    except TraceError as problem:
        assert "no tokens" in str(problem)
        found = inner[:0]
        assert not len(inner)
    np.testing.assert_array_equal(found, inner)


@pytest.mark.parametrize("text", ["50", "a:b", "0%:101%", "9:5", "-1:5", "1:2:3"])
def test_a_malformed_range_is_refused(trace: Trace, text: str) -> None:
    with pytest.raises(TraceError, match="range|no tokens"):
        trace.select(tokens=text)


def test_reading_one_layer_gives_that_layer(trace: Trace) -> None:
    np.testing.assert_array_equal(trace.experts(layers=[2])[:, 0], trace.experts()[:, 1])
    with pytest.raises(TraceError, match="no MoE layer"):
        trace.experts(layers=[0])


def test_statistics_of_parts_add_up(trace: Trace) -> None:
    ids, model = trace.experts(), trace.model
    whole = TraceStats.from_experts(ids, model)
    parts = TraceStats.from_experts(ids[:700], model) + TraceStats.from_experts(ids[700:], model)
    streamed = TraceStats.of(trace, rows=333)
    for other in (parts, streamed):
        np.testing.assert_array_equal(whole.load_LE, other.load_LE)
        np.testing.assert_array_equal(whole.coactivation_LEE, other.coactivation_LEE)
        np.testing.assert_array_equal(whole.transitions_LEE, other.transitions_LEE)


@given(ids=IDS)
def test_statistics_equal_counting_by_hand(ids: np.ndarray) -> None:
    model = tiny_model()
    stats = TraceStats.from_experts(np.where(ids < 0, NO_EXPERT, ids), model)
    load = np.zeros((3, 16), int)
    together = np.zeros((3, 16, 16), int)
    following = np.zeros((2, 16, 16), int)
    for token in ids:
        for layer in range(3):
            for a in token[layer][token[layer] >= 0]:
                load[layer, a] += 1
                for b in token[layer][token[layer] >= 0]:
                    together[layer, a, b] += 1
                for b in token[layer + 1][token[layer + 1] >= 0] if layer < 2 else ():
                    following[layer, a, b] += 1
    np.testing.assert_array_equal(stats.load_LE, load)
    np.testing.assert_array_equal(stats.coactivation_LEE, together)
    np.testing.assert_array_equal(stats.transitions_LEE, following)


def test_drift_is_zero_for_equal_loads_and_one_for_disjoint_ones() -> None:
    a = np.array([[4, 0], [1, 1]])
    np.testing.assert_allclose(drift_bits(a, 3 * a), 0)
    np.testing.assert_allclose(drift_bits(np.array([[1, 0]]), np.array([[0, 5]])), 1)


def test_affinity_finds_planted_paths_and_nothing_in_noise(model: ModelSpec) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 16, (20_000, 3, 1)).astype(np.uint16)
    path = np.repeat(rng.integers(0, 16, (20_000, 1, 1)), 3, axis=1).astype(np.uint16)
    assert TraceStats.from_experts(noise, model).affinity_bits.max() < 0.01
    np.testing.assert_allclose(TraceStats.from_experts(path, model).affinity_bits, 4.0, atol=0.02)


def test_inspection_counts_repeated_tokens_and_domains(model: ModelSpec, make_trace: MakeTrace) -> None:
    ids = clustered_routing(model, 100)
    ids[50:] = ids[50]
    found = inspect(make_trace(model, ids, domain=["a"] * 50 + ["b"] * 50, step=np.arange(100) // 25))
    assert found.repeated_share == pytest.approx(0.49, abs=0.02)
    assert found.drift_DD[0, 1] > 0.1
    assert found.drift_over_steps.shape == (3, 3)
    assert sum(load.sum() for load in found.load_by_domain.values()) == ids.size
    json.dumps(found.to_dict())


@pytest.mark.parametrize("rows", [100, 1 << 14])
def test_drift_over_more_steps_than_are_counted_apart(rows: int, model: ModelSpec, make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are merged as steps come in; a change half way through is still one bit between the fifth and the sixth tenth."""
    monkeypatch.setattr("moesim.trace.inspect.STEPS", 40)
    monkeypatch.setattr("moesim.trace.inspect.BATCH", rows)
    ids = np.random.default_rng(0).integers(0, 8, (3200, 3, 2)) + 8 * (np.arange(3200) >= 1600)[:, None, None]
    found = inspect(make_trace(model, ids, step=np.arange(3200) // 5))
    assert found.step_edges == list(range(0, 640, 64))
    np.testing.assert_allclose(found.drift_over_steps[4], 1)
    assert np.delete(found.drift_over_steps, 4, axis=0).max() < 0.05


def test_two_runs_are_never_mixed(model: ModelSpec, trace: Trace) -> None:
    with pytest.raises(OutputExists, match="not empty"):
        TraceWriter(trace.path, model)


def test_an_unclosed_run_opens_with_a_warning(model: ModelSpec, tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", model, weights=False, part_rows=10)
    writer.append(clustered_routing(model, 25))
    with pytest.warns(UserWarning, match="killed or is still running"):
        assert load_trace(tmp_path / "t").tokens == 25


@pytest.mark.parametrize("keep", [0, 3, 100, -9])
def test_a_truncated_part_is_named(trace: Trace, keep: int) -> None:
    part = trace.parts[0]
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(TraceError, match=rf"{part.name}: not a complete Parquet"):
        load_trace(trace.path)


def test_flipped_bytes_are_an_error_not_a_crash(trace: Trace) -> None:
    part = trace.parts[0]
    data = bytearray(part.read_bytes())
    rng = np.random.default_rng(0)
    caught = 0
    for _ in range(30):
        broken = data.copy()
        for at in rng.integers(4, len(data), 20):
            broken[at] ^= 0xFF
        part.write_bytes(broken)
        try:
            load_trace(trace.path).experts()
        except TraceError as problem:
            assert part.name in str(problem)
            caught += 1
    assert caught > 20


def rewrite(trace: Trace, table: pa.Table) -> None:
    pq.write_table(table, trace.parts[0])


def test_hostile_parquet_is_refused_with_its_place(trace: Trace) -> None:
    table = pq.read_table(trace.parts[0])
    schema, meta = table.schema, json.loads(table.schema.metadata[b"moesim"])

    def with_meta(**change: object) -> pa.Table:
        return table.replace_schema_metadata({b"moesim": json.dumps(meta | change).encode()})

    cases = {
        "no 'moesim' metadata": table.replace_schema_metadata({}),
        "damaged trace metadata": table.replace_schema_metadata({b"moesim": b"{"}),
        "trace format 99": with_meta(format_version=99),
        "top_k": with_meta(top_k=10**9),
        "'weights' and 'logits' must be": with_meta(logits=1),
        "'logits_1' is missing": with_meta(logits=True),
        "absurd": table.replace_schema_metadata({b"moesim": b" " * (5 << 20)}),
        "'experts_2' is missing": table.drop_columns(["experts_2"]),
        "'step' holds": table.set_column(schema.get_field_index("step"), "step", table["step"].cast(pa.float64())),
    }
    for message, broken in cases.items():
        rewrite(trace, broken)
        with pytest.raises(TraceError, match=message):
            load_trace(trace.path)


def varint(number: int) -> bytes:
    """Thrift's compact whole number, zigzag."""
    left, out = 2 * number, bytearray()
    while left > 127:
        out.append(left & 127 | 128)
        left >>= 7
    return bytes([*out, left])


def declare_rows(part: Path, claim: int) -> None:
    """Let the footer say `claim` rows wherever it says how many there are."""
    data, rows = part.read_bytes(), pq.ParquetFile(part).metadata.num_rows
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8].replace(varint(rows), varint(claim))
    part.write_bytes(data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def declare_page(part: Path, claim: int) -> None:
    """Let the last column's page say that it holds `claim` bytes when decompressed."""
    data, metadata = part.read_bytes(), pq.ParquetFile(part).metadata
    at = metadata.row_group(metadata.num_row_groups - 1).column(metadata.num_columns - 1).data_page_offset + 3
    end = next(i for i in range(at, len(data)) if data[i] < 128) + 1
    part.write_bytes(data[:at] + varint(claim) + data[end:])


@pytest.mark.parametrize(("declare", "claim"), [(declare_rows, 10**12), (declare_rows, 2**62), (declare_page, 2**31 - 1)])
def test_a_huge_declared_size_is_refused_in_bounded_memory(
    declare: Callable[[Path, int], None], claim: int, model: ModelSpec, make_trace: MakeTrace
) -> None:
    trace = make_trace(model, clustered_routing(model, 1237))
    declare(trace.parts[0], claim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TraceError, match=r"part-.*(damaged Parquet|and holds 1,237)"):
        load_trace(trace.path).experts()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_reading_one_layer_does_not_touch_the_others(tmp_path: Path) -> None:
    model = tiny_model()
    ids = clustered_routing(model, 3000)
    with TraceWriter(tmp_path / "t", model, weights=False) as writer:
        writer.append(ids)
    (part,) = (tmp_path / "t").glob("part-*")
    data, group = bytearray(part.read_bytes()), pq.ParquetFile(part).metadata.row_group(0)
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema.startswith(("experts_1", "experts_3")):
            begin = column.data_page_offset
            data[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
    part.write_bytes(data)
    np.testing.assert_array_equal(load_trace(tmp_path / "t").experts(layers=[2])[:, 0], ids[:, 1])
    with pytest.raises(TraceError, match="damaged Parquet"):
        load_trace(tmp_path / "t").experts()


def test_a_million_ids_a_second_are_written(tmp_path: Path) -> None:
    model = tiny_model(layers=8, experts=64, top_k=6)
    ids = clustered_routing(model, 20_000).astype(np.uint16)
    with TraceWriter(tmp_path / "t", model, weights=False) as writer:
        began = time.process_time()
        writer.append(ids)
        writer.flush()
        assert ids.size / (time.process_time() - began) > 1e6


def test_a_part_is_on_disk_before_it_is_whole(tmp_path: Path) -> None:
    """Memory holds a row group, not a part; rows of an unfinished part are not yet tokens of the trace."""
    model = tiny_model()
    ids = clustered_routing(model, GROUP_ROWS)
    with TraceWriter(tmp_path / "t", model, weights=False, part_rows=1 << 20) as writer:
        writer.append(ids)
        assert not list((tmp_path / "t").glob("part-*"))
        assert next((tmp_path / "t").glob(".part-*.tmp")).stat().st_size > GROUP_ROWS / 2
        assert writer.rows_written == 0
        writer.append(ids[:5])
    trace = load_trace(tmp_path / "t")
    assert (len(trace.parts), pq.ParquetFile(trace.parts[0]).num_row_groups) == (1, 2)
    np.testing.assert_array_equal(trace.experts(), np.concatenate([ids, ids[:5]]))


def test_a_writer_that_failed_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    writer = TraceWriter(tmp_path / "t", model, weights=False, part_rows=10)
    writer.append(clustered_routing(model, 10))
    writer.append(clustered_routing(model, 5))
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    monkeypatch.undo()
    writer.close()
    assert not list((tmp_path / "t").glob(".part-*"))
    with pytest.raises(TraceError, match="closed, or writing to it has failed"):
        writer.append(clustered_routing(model, 1))
    with pytest.warns(UserWarning, match="no manifest"):
        assert load_trace(tmp_path / "t").tokens == writer.rows_written == 10


def test_ids_beyond_the_model_are_named(model: ModelSpec, make_trace: MakeTrace) -> None:
    ids = clustered_routing(model, 20)
    ids[7, 1, 0] = 99
    with pytest.raises(TraceError, match=r"expert id 99 out of range 0\.\.15 at layer 2, token 7"):
        make_trace(model, ids)
    trace = make_trace(tiny_model(experts=100), ids)
    table = pq.read_table(trace.parts[0])
    meta = json.loads(table.schema.metadata[b"moesim"])
    meta["model"]["experts"] = 16
    rewrite(trace, table.replace_schema_metadata({b"moesim": json.dumps(meta).encode()}))
    with pytest.raises(TraceError, match=r"part-.*expert id 99 out of range 0\.\.15 at layer 2"):
        load_trace(trace.path).experts()


def test_a_trace_is_small(tmp_path: Path) -> None:
    model = tiny_model(layers=8, experts=64, top_k=6)
    ids = np.random.default_rng(0).integers(0, 64, (20_000, 8, 6))
    with TraceWriter(tmp_path / "t", model, weights=False) as writer:
        writer.append(ids)
    size = sum(path.stat().st_size for path in (tmp_path / "t").glob("part-*"))
    assert size <= 1.1 * ids.size  # one byte per id is what 64 experts need in memory


def test_weights_and_logits_are_stored_in_an_encoding_that_duckdb_reads(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", tiny_model(top_k=2), weights=True, logits=True) as writer:
        layers, experts = len(writer.info.model.moe_layers), writer.info.model.experts
        writer.append(np.zeros((5, layers, 2), np.uint16), weights=np.ones((5, layers, 2)), logits=np.ones((5, layers, experts)))
    group = pq.ParquetFile(next((tmp_path / "t").glob("part-*"))).metadata.row_group(0)
    for column in map(group.column, range(group.num_columns)):  # DuckDB 2.0 splits bytes of 32 and 64 bits only
        assert "BYTE_STREAM_SPLIT" not in column.encodings or column.physical_type in ("INT32", "INT64")


def test_digest_names_content_and_selection(trace: Trace, model: ModelSpec, make_trace: MakeTrace) -> None:
    assert load_trace(trace.path).digest == trace.digest
    assert trace.select(tokens="0%:50%").digest != trace.digest
    assert make_trace(model, clustered_routing(model, 2000, seed=5)).digest != trace.digest
