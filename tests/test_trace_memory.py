"""Traces larger than memory: what is read, and what is held while reading. Parts are hard links, so that writing takes no time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny_model

from moesim.trace import Trace, TraceWriter, load_trace

TOKEN_B = 37  # of the token columns in memory
GROWTH = """
import resource, sys
from moesim.trace import load_trace
from moesim.trace.inspect import inspect
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
inspect(load_trace(sys.argv[1]))  # libraries, compiled code, a few batches
before = peak()
print(inspect(load_trace(sys.argv[2])).stats.tokens, peak() - before)
"""


@pytest.fixture
def make_long(tmp_path: Path) -> Callable[..., Trace]:
    """A trace of equal parts of random routing, two tokens to a step, as in decoding."""

    def make(name: str, *, layers: int, top_k: int, rows: int, parts: int) -> Trace:
        path, token = tmp_path / name, np.arange(rows)
        with TraceWriter(path, tiny_model(layers=layers, top_k=top_k), weights=False, part_rows=rows) as writer:
            ids = np.random.default_rng(0).integers(0, 16, (rows, len(writer.info.model.moe_layers), top_k), dtype=np.uint16)
            writer.append(ids, step=token // 2, sequence=token // 128, position=token % 128)
        (first,) = path.glob("part-*")
        for number in range(1, parts):
            os.link(first, path / f"part-00000-{number:06d}.parquet")
        return load_trace(path)

    return make


def bytes_read() -> int:
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of the bytes a process read")
def test_one_layer_of_ten_million_tokens_is_read_without_the_others(make_long: Callable[..., Trace]) -> None:
    trace = make_long("t", layers=9, top_k=4, rows=1 << 17, parts=77)
    metadata = pq.ParquetFile(trace.parts[0]).metadata
    chunks = [metadata.row_group(group).column(column) for group in range(metadata.num_row_groups) for column in range(metadata.num_columns)]
    wanted_B = len(trace.parts) * sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.startswith("experts_3."))
    footers_B = 2 * len(trace.parts) * (1 << 16)  # read to count the tokens, and again for the layer, 64 KiB at a time
    before = bytes_read()
    tokens = sum(len(batch) for batch in trace.batches(layers=[3]))
    read_B = bytes_read() - before
    assert tokens == 77 << 17 > 10_000_000
    assert wanted_B <= read_B < 1.05 * wanted_B + footers_B  # the mark of padding is read too
    assert read_B < sum(part.stat().st_size for part in trace.parts) / 4


def test_a_trace_ten_times_larger_than_memory_is_inspected(make_long: Callable[..., Trace]) -> None:
    """In a process whose memory grows by less than a tenth of the trace."""
    few, many = (make_long(name, layers=4, top_k=4, rows=1 << 16, parts=parts) for name, parts in (("few", 1), ("many", 20)))
    command = [sys.executable, "-c", GROWTH, str(few.path), str(many.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, growth_B = map(int, done.stdout.split())
    assert tokens == many.tokens == 20 << 16
    assert growth_B < many.tokens * (TOKEN_B + 2 * len(many.model.moe_layers) * many.info.top_k) / 10
