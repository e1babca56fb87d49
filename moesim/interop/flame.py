"""FLAME-MoE traces: one Parquet file per layer, `layer_NN.parquet`, columns `indices: list<int16>[K]`, `scores: list<float16>[K]`.

Rows are aligned across layers by position only; rank, microbatch and sequence are not recorded.
Source: CMU-FLAME/FLAME-MoE-Traces, Apache-2.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.interop.opening import sources
from moesim.interop.routing import CHUNK, Chunk, Routing
from moesim.model import ModelSpec

_NAME = re.compile(r"layer_(\d+)\.parquet")
UNALIGNED = "tokens are aligned across layers by row number alone; rank, sequence and position are unknown"


def read_flame(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """Tokens of a folder of layers; TraceError when layers differ in rows or selections, or a file is damaged."""
    files = {int(match[1]): file for file in sources(source, "layer_*.parquet") if (match := _NAME.fullmatch(file.name))}
    if not files:
        raise TraceError(f"{source}: not named layer_NN.parquet; give the folder that holds one file per layer")
    layers = tuple(sorted(files))
    sizes, widths, scored = zip(*(_shape(files[layer]) for layer in layers), strict=True)
    if len(set(sizes)) > 1 or len(set(widths)) > 1:
        found = {files[layer].name: f"{rows} x {width}" for layer, rows, width in zip(layers, sizes, widths, strict=True)}
        raise TraceError(f"{source}: layers differ in rows or selections per row {found}; rows are aligned by number, so all must agree")

    def chunks() -> Iterator[Chunk]:
        for parts in zip_longest(*(_batches(files[layer], widths[0], all(scored)) for layer in layers), fillvalue=()):
            if len({len(part[0]) if part else 0 for part in parts}) > 1:
                raise TraceError(f"{source}: a layer holds fewer rows than it states; a file is damaged")
            ids = np.stack([part[0] for part in parts], axis=1)
            yield Chunk(experts_TRK=ids, weights_TRK=np.stack([part[1] for part in parts], axis=1) if all(scored) else None)

    return Routing(source=source, chunks=chunks, rows=layers, width=widths[0], weights=all(scored), notes=[UNALIGNED])


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, thrift_string_size_limit=64 * 2**20, thrift_container_size_limit=10**6)
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise TraceError(f"{file}: not a complete Parquet file: {problem}; it was cut short or is something else") from None


def _shape(file: Path) -> tuple[int, int, bool]:
    """Rows, selections per row (those of the first row) and whether there are scores."""
    with _open(file) as parquet:
        names = parquet.schema_arrow.names
        if "indices" not in names:
            raise TraceError(f"{file}: no column 'indices'; found {names}")
        rows = parquet.metadata.num_rows
    if rows == 0:
        raise TraceError(f"{file}: holds no rows; record again")
    first = next(_batches(file, None, False), None)
    if first is None:
        raise TraceError(f"{file}: states {rows:,} rows and holds none; the file is damaged")
    return rows, first[0].shape[1], "scores" in names


def _batches(file: Path, width: int | None, scores: bool) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    import pyarrow as pa

    names = ["indices", "scores"] if scores else ["indices"]
    with _open(file) as parquet:
        try:
            for batch in parquet.iter_batches(batch_size=CHUNK if width else 1, columns=names):
                arrays = [_matrix(batch.column(name), width, f"{file}: {name}") for name in names]
                if arrays[0].dtype.kind not in "iu" or arrays[-1].dtype.kind not in ("iuf" if scores else "iu"):
                    raise TraceError(f"{file}: indices must be whole numbers and scores numbers, got {[str(array.dtype) for array in arrays]}")
                yield arrays[0], arrays[-1]
        except (pa.ArrowException, OSError) as problem:
            raise TraceError(f"{file}: damaged Parquet data: {problem}") from None


def _matrix(column: Any, width: int | None, place: str) -> NDArray[Any]:
    import pyarrow as pa

    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        raise TraceError(f"{place} holds {column.type}, expected a list of numbers per row")
    if column.null_count or column.flatten().null_count:
        raise TraceError(f"{place} holds nulls; every row needs its selections")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    size = len(flat) // len(column)
    lengths = np.asarray(column.value_lengths()) if not pa.types.is_fixed_size_list(column.type) else np.full(len(column), size)
    if (lengths != (width or size)).any() or size == 0:
        raise TraceError(f"{place}: rows have {sorted(set(lengths.tolist()))} selections, expected {width or 'at least 1'} in every row")
    return np.asarray(flat).reshape(len(column), size)
