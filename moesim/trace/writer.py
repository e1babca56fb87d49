"""TraceWriter: appends tokens to a trace directory, one durable Parquet part at a time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moesim.errors import OutputExists, TraceError
from moesim.files import write_json
from moesim.model import ModelSpec
from moesim.trace.schema import FORMAT_VERSION, MANIFEST, NO_EXPERT, PHASES, TraceInfo, arrow_schema


@dataclass(frozen=True, slots=True)
class Coded:
    """A column of few words: token t says `words[codes_T[t]]`. Saves looking at every token's text."""

    words: tuple[str, ...]
    codes_T: NDArray[np.int32]


Column = NDArray[Any] | Sequence[Any] | Coded | int | str | bool


class TraceWriter:
    """Writes one run's routing below `path`; use as a context manager.

    A part is written under a temporary name, synced and renamed when `part_rows` tokens or `part_seconds` have
    gathered; a crash loses at most the part in memory. Closing writes the manifest. Several processes (ranks) may
    write to one directory at the same time, each with its own `rank`.

    Raises OutputExists when `path` already holds a trace: two runs are never mixed.
    """

    def __init__(
        self,
        path: str | Path,
        model: ModelSpec,
        *,
        top_k: int | None = None,
        weights: bool = True,
        captured_by: Mapping[str, Any] | None = None,
        rank: int = 0,
        part_rows: int = 1 << 17,
        part_seconds: float = 30.0,
        run: str = "",
    ) -> None:
        self.path = Path(path)
        self.info = TraceInfo(model=model, top_k=top_k or model.top_k, weights=weights, captured_by=dict(captured_by or {}))
        self.rank, self.part_rows, self.part_seconds = rank, part_rows, part_seconds
        self.rows_written = 0
        self._schema = arrow_schema(self.info)
        self._pending: list[Any] = []
        self._pending_rows, self._parts = 0, 0
        self._digests: dict[str, str] = {}
        self._last_flush = time.monotonic()
        self._closed = False
        self._claim(run)

    def _claim(self, run: str) -> None:
        """Own the directory: made fresh, or made by another rank of the same `run` (a shared, non-empty id)."""
        marker = self.path / f".run-{run}" if run else None
        occupied = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if occupied and not (marker and marker.exists()):
            raise OutputExists(f"{self.path}: exists and is not empty; give another path, or remove it first")
        self.path.mkdir(parents=True, exist_ok=True)
        if marker:
            marker.touch()
            try:  # an earlier run may have had the same id: its ranks left their claims
                (self.path / f".run-{run}-rank-{self.rank:05d}").touch(exist_ok=False)
            except FileExistsError:
                raise OutputExists(f"{self.path}: rank {self.rank} of an earlier run wrote here; give another path, or remove it first") from None

    def append(
        self,
        experts: Mapping[int, NDArray[Any]] | NDArray[Any],
        *,
        weights: Mapping[int, NDArray[Any]] | NDArray[Any] | None = None,
        step: Column = 0,
        microbatch: Column = 0,
        sequence: Column = 0,
        position: Column = 0,
        token_id: Column = -1,
        phase: Column = "prefill",
        domain: Column = "",
        valid: Column = True,
    ) -> None:
        """Add T tokens. `experts` is [T, L, K], or one [T, K] array per MoE layer; -1 and 65535 mean no selection.

        Other columns are one value for all tokens or one per token. Raises TraceError for ids outside
        0..experts-1, unknown phases and wrong shapes, before anything is written.
        """
        import pyarrow as pa

        layers = self.info.model.moe_layers
        chosen = self._per_layer(experts, "experts")
        rows = len(chosen[0])
        if rows == 0:
            return
        scalars = {
            "step": step, "microbatch": microbatch, "rank": self.rank, "sequence": sequence, "position": position, "token_id": token_id,
            "phase": phase, "domain": domain, "valid": valid,
        }  # fmt: skip
        columns = [self._column(self._schema.field(name), value, rows) for name, value in scalars.items()]
        columns += [self._list(_clean_ids(ids, self.info.model, layer), rows) for ids, layer in zip(chosen, layers, strict=True)]
        if self.info.weights:
            if weights is None:
                raise TraceError("this trace stores gate weights; pass weights=, or open the writer with weights=False")
            columns += [self._list(np.asarray(w, np.float16), rows) for w in self._per_layer(weights, "weights")]
        self._pending.append(pa.record_batch(columns, schema=self._schema))
        self._pending_rows += rows
        if self._pending_rows >= self.part_rows or time.monotonic() - self._last_flush >= self.part_seconds:
            self.flush()

    def _per_layer(self, values: Mapping[int, NDArray[Any]] | NDArray[Any], what: str) -> list[NDArray[Any]]:
        layers, width = self.info.model.moe_layers, self.info.top_k
        if isinstance(values, Mapping):
            if absent := [layer for layer in layers if layer not in values]:
                raise TraceError(f"{what}: no selections for MoE layers {absent}")
            arrays = [np.asarray(values[layer]) for layer in layers]
        else:
            stacked = np.asarray(values)
            if stacked.ndim != 3 or stacked.shape[1] != len(layers):
                raise TraceError(f"{what}: expected shape [T, {len(layers)}, {width}], got {list(stacked.shape)}")
            arrays = [stacked[:, index] for index in range(len(layers))]
        for layer, array in zip(layers, arrays, strict=True):
            if array.ndim != 2 or array.shape[1] != width or len(array) != len(arrays[0]):
                raise TraceError(f"{what} of layer {layer}: expected shape [{len(arrays[0])}, {width}], got {list(array.shape)}")
        return arrays

    def _column(self, field: Any, value: Column, rows: int) -> Any:
        import pyarrow as pa

        if pa.types.is_dictionary(field.type):
            coded = _coded(value, rows)
            if field.name == "phase" and (unknown := sorted(set(coded.words) - set(PHASES))):
                raise TraceError(f"phase {unknown[0]!r} is unknown; use one of {', '.join(PHASES)}")
            return pa.DictionaryArray.from_arrays(pa.array(coded.codes_T), pa.array(coded.words, pa.string()))
        array = np.asarray(value)
        if array.ndim and array.shape != (rows,):
            raise TraceError(f"column {field.name!r}: expected one value or {rows}, got shape {list(array.shape)}")
        kind = field.type.to_pandas_dtype()
        return pa.array(np.ascontiguousarray(np.broadcast_to(array.astype(kind), rows)), field.type)

    def _list(self, values_TK: NDArray[Any], rows: int) -> Any:
        import pyarrow as pa

        item = pa.field("element", pa.from_numpy_dtype(values_TK.dtype), nullable=False)
        flat = pa.array(np.ascontiguousarray(values_TK).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(item, self.info.top_k))

    def flush(self) -> None:
        """Make what has gathered durable, as one part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._last_flush = time.monotonic()
        if not self._pending:
            return
        name = f"part-{self.rank:05d}-{self._parts:06d}.parquet"
        table = pa.Table.from_batches(self._pending).unify_dictionaries()
        leaves = [f"{name}.list.element" if name.startswith(("experts_", "weights_")) else name for name in self._schema.names]
        ids = [leaf for leaf in leaves if leaf.startswith("experts_")]
        temporary = self.path / f".{name}.tmp"
        try:
            with temporary.open("wb") as raw:
                stream = _Hashing(raw)
                pq.write_table(
                    table,
                    stream,
                    compression="zstd",
                    # ids: bytes split by significance, which zstd's entropy coder takes below a dictionary's ceil(log2 E) bits;
                    # weights stay plain, for DuckDB cannot read split bytes of 16-bit floats
                    use_dictionary=[leaf for leaf in leaves if not leaf.endswith(".list.element")],
                    column_encoding=dict.fromkeys(ids, "BYTE_STREAM_SPLIT"),
                    write_statistics=False,
                    row_group_size=1 << 17,
                )
                raw.flush()
                os.fsync(raw.fileno())
            temporary.rename(self.path / name)
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk: leave no half part to fill it
            raise
        self._digests[name] = stream.hexdigest()
        self._parts += 1
        self.rows_written += table.num_rows
        self._pending, self._pending_rows = [], 0

    def close(self, **notes: Any) -> None:
        """Flush and write the manifest; `notes` (for example counts of dropped steps) go into it."""
        if self._closed:
            return
        self.flush()
        if not self._digests:  # an empty run is a trace of no tokens, not an unreadable folder
            import pyarrow as pa

            self._pending = [pa.record_batch([pa.array([], field.type) for field in self._schema], schema=self._schema)]
            self.flush()
        name = MANIFEST if self.rank == 0 else f"manifest-{self.rank:05d}.json"
        write_json(
            self.path / name, {"format_version": FORMAT_VERSION, "rank": self.rank, "rows": self.rows_written, "parts": self._digests, **notes}
        )
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close(**({"interrupted": kind.__name__} if kind else {}))


class _Hashing:
    """A write-only stream that names what went through it."""

    def __init__(self, raw: Any) -> None:
        self._raw, self._sum, self.closed = raw, hashlib.sha256(), False

    def write(self, data: Any) -> int:
        self._sum.update(data)
        return int(self._raw.write(data))

    def tell(self) -> int:
        return int(self._raw.tell())

    def flush(self) -> None:
        self._raw.flush()

    def close(self) -> None: ...

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def hexdigest(self) -> str:
        return self._sum.hexdigest()


def _coded(value: Column, rows: int) -> Coded:
    """Words of a column given as one word, as codes, or as one word per token."""
    if isinstance(value, Coded):
        return value
    if isinstance(value, str):
        return Coded((value,), np.zeros(rows, np.int32))
    names, codes = np.unique(np.asarray([str(text) for text in np.asarray(value).tolist()], dtype=object), return_inverse=True)
    return Coded(tuple(names.tolist()), np.broadcast_to(codes, rows).astype(np.int32) if len(codes) == 1 else codes.astype(np.int32))


def _clean_ids(ids_TK: NDArray[Any], model: ModelSpec, layer: int) -> NDArray[np.uint16]:
    """[T, K] uint16 with 65535 for no selection; raises TraceError naming the first id out of range."""
    if not np.issubdtype(ids_TK.dtype, np.integer):
        raise TraceError(f"experts of layer {layer}: expected whole numbers, got {ids_TK.dtype}")
    if ids_TK.dtype == np.uint16:
        signed = ids_TK.view(np.int16)  # 65535, no selection, reads as -1: no copy to look for the largest id
        if signed.max(initial=-1) < model.experts and signed.min(initial=-1) >= -1:
            return ids_TK
    none = ids_TK == NO_EXPERT if ids_TK.dtype.kind == "u" else (ids_TK == -1) | (ids_TK == NO_EXPERT)
    bad = ~none & ((ids_TK < 0) | (ids_TK >= model.experts))
    if bad.any():
        token, choice = np.argwhere(bad)[0]
        raise TraceError(
            f"expert id {ids_TK[token, choice]} out of range 0..{model.experts - 1} at layer {layer}, token {token}; "
            f"is {model.name!r} the right model?"
        )
    return np.where(none, NO_EXPERT, ids_TK).astype(np.uint16)
