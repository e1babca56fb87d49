"""TraceWriter: appends tokens to a trace directory, one durable Parquet part at a time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moesim.errors import OutputExists, TraceError
from moesim.files import write_json
from moesim.model import ModelSpec
from moesim.trace.schema import FORMAT_VERSION, MANIFEST, NO_EXPERT, NUMBER_COLUMNS, PHASES, TOKEN_COLUMNS, TraceInfo, arrow_schema

if TYPE_CHECKING:
    import pyarrow.parquet as pq

GROUP_ROWS = 1 << 15  # tokens encoded at once: few enough to hold in memory, many enough to compress and to skip layers
GROUP_LOGITS_B = 1 << 26  # logits encoded at once, which are many times larger than ids


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
        logits: bool = False,
        captured_by: Mapping[str, Any] | None = None,
        rank: int = 0,
        part_rows: int = 1 << 17,
        part_seconds: float = 30.0,
        run: str = "",
    ) -> None:
        self.path = Path(path)
        self.info = TraceInfo(model=model, top_k=top_k or model.top_k, weights=weights, logits=logits, captured_by=dict(captured_by or {}))
        self.rank, self.part_rows, self.part_seconds = rank, part_rows, part_seconds
        self.rows_written = 0
        self._schema = arrow_schema(self.info)
        logits_B = 2 * self.info.widths.get("logits", 0) * len(model.moe_layers)  # of one token
        self._group_rows = max(1, min(GROUP_ROWS, GROUP_LOGITS_B // logits_B)) if logits_B else GROUP_ROWS
        self._pending: list[Any] = []  # record batches on their way into the open part
        self._pending_rows = 0
        self._part: _Part | None = None
        self._digests: dict[str, str] = {}  # of the parts that are done, by name
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

    def rehearse(self) -> None:
        """Encode one token to nowhere: Arrow loads and binds most of its code when it is first used, milliseconds a run need not wait for."""
        import pyarrow as pa

        token = [self._column(self._schema.field(name), "" if name == "domain" else "train" if name == "phase" else 0, 1) for name in TOKEN_COLUMNS]
        fields = [self._schema.field(index) for index in range(len(token), len(self._schema))]
        lists = [self._list(np.zeros((1, field.type.list_size), field.type.value_type.to_pandas_dtype())) for field in fields]
        with _parquet(pa.BufferOutputStream(), self._schema) as file:
            file.write_batch(pa.record_batch([*token, *lists], schema=self._schema))

    def append(
        self,
        experts: Mapping[int, NDArray[Any]] | NDArray[Any],
        *,
        weights: Mapping[int, NDArray[Any]] | NDArray[Any] | None = None,
        logits: Mapping[int, NDArray[Any]] | NDArray[Any] | None = None,
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

        `weights` come in the same shape, `logits` with E in place of K (beyond ±65504 they are stored as ±inf).
        Other columns are one value for all tokens or one per token. Raises TraceError for ids outside
        0..experts-1, unknown phases and wrong shapes, before anything is written.
        """
        import pyarrow as pa

        if self._closed:
            raise TraceError(f"{self.path}: this trace is closed, or writing to it has failed; write to another path")
        chosen = self._per_layer(experts, "experts")
        rows = len(chosen[0])
        if rows == 0:
            return
        scalars = {
            "step": step, "microbatch": microbatch, "rank": self.rank, "sequence": sequence, "position": position, "token_id": token_id,
            "phase": phase, "domain": domain, "valid": valid,
        }  # fmt: skip
        columns = [self._column(self._schema.field(name), value, rows) for name, value in scalars.items()]
        columns += [self._list(_clean_ids(ids, self.info.model, row)) for row, ids in enumerate(chosen)]
        if self.info.weights:
            if weights is None:
                raise TraceError("this trace stores gate weights; pass weights=, or open the writer with weights=False")
            columns += [self._list(np.asarray(w, np.float16)) for w in self._per_layer(weights, "weights")]
        if self.info.logits:
            if logits is None:
                raise TraceError("this trace stores router logits; pass logits=, or open the writer without")
            with np.errstate(over="ignore"):
                columns += [self._list(np.asarray(x, np.float16)) for x in self._per_layer(logits, "logits")]
        self._pending.append(pa.record_batch(columns, schema=self._schema))
        self._pending_rows += rows
        held = self._pending_rows + (self._part.rows if self._part else 0)
        if held >= self.part_rows or time.monotonic() - self._last_flush >= self.part_seconds:
            self.flush()
        elif self._pending_rows >= self._group_rows:
            self._write_group()

    def _per_layer(self, values: Mapping[int, NDArray[Any]] | NDArray[Any], what: str) -> list[NDArray[Any]]:
        layers, width = self.info.model.moe_layers, self.info.widths[what]
        if isinstance(values, Mapping):
            if absent := [layer for layer in layers if layer not in values]:
                raise TraceError(f"{what}: nothing for MoE layers {absent}")
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
        array = array.astype(field.type.to_pandas_dtype())  # a copy: the caller may use its array again
        return pa.array(np.ascontiguousarray(array) if array.ndim else np.full(rows, array), field.type)

    def _list(self, values: NDArray[Any]) -> Any:
        import pyarrow as pa

        item = pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=False)
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(item, values.shape[1]))

    def flush(self) -> None:
        """Make what has gathered durable, as one part."""
        self._last_flush = time.monotonic()
        self._write_group()
        if self._part is None:
            return
        name = f"part-{self.rank:05d}-{len(self._digests):06d}.parquet"
        with self._or_abandon():
            self._digests[name] = self._part.finish(self.path / name)
        self.rows_written += self._part.rows
        self._part = None

    def _write_group(self) -> None:
        """Move what is pending into the open part: a part is held by the disk, not by memory."""
        if not self._pending:
            return
        batches, self._pending, self._pending_rows = self._pending, [], 0
        with self._or_abandon():
            if self._part is None:
                self._part = _Part(self.path / f".part-{self.rank:05d}-{len(self._digests):06d}.parquet.tmp", self._schema)
            self._part.write(batches, self._group_rows)

    @contextmanager
    def _or_abandon(self) -> Iterator[None]:
        """After a failure (a full disk) nothing more is written: no half part fills the disk, no manifest claims that all is here."""
        try:
            yield
        except BaseException:
            self._closed = True
            if self._part is not None:
                self._part.abandon()
            raise

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


class _Part:
    """A Parquet file in the making, under a temporary name. No Python runs while it is encoded and written."""

    def __init__(self, temporary: Path, schema: Any) -> None:
        import pyarrow as pa

        self.rows = 0
        self._temporary = temporary
        self._sink = pa.OSFile(str(temporary), "wb")
        self._file = _parquet(self._sink, schema)

    def write(self, batches: Sequence[Any], group_rows: int) -> None:
        """Add record batches, as even row groups of at most `group_rows`."""
        import pyarrow as pa

        table = pa.Table.from_batches(batches)
        if len(batches) > 1:
            table = table.unify_dictionaries()
        groups = max(1, -(-table.num_rows // group_rows))
        self._file.write_table(table, row_group_size=max(1, -(-table.num_rows // groups)))
        self.rows += table.num_rows

    def finish(self, path: Path) -> str:
        """Close, sync and give it its name; returns its SHA-256."""
        self._file.close()
        self._sink.close()
        with self._temporary.open("rb") as written:
            os.fsync(written.fileno())
            checksum = hashlib.file_digest(written, "sha256").hexdigest()
        self._temporary.rename(path)
        return checksum

    def abandon(self) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._sink.close()
        self._temporary.unlink(missing_ok=True)


def _parquet(sink: Any, schema: Any) -> pq.ParquetWriter:
    """A Parquet file in `sink`, encoded as a part of a trace is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [f"{field.name}.list.element" for field in schema if field.name.startswith("experts_")]
    return pq.ParquetWriter(
        sink,
        schema,
        # snappy takes less than half of zstd's time where entropy coding finds little: weights grow by an eighth, other columns not
        compression={path: "zstd" if path in ids else "snappy" for path in _paths(schema)},
        # whole numbers: bytes split by significance, which zstd's entropy coder takes below a dictionary's ceil(log2 E) bits,
        # without looking every value up; weights and logits stay plain, for DuckDB cannot read split bytes of 16-bit floats
        use_dictionary=["phase", "domain"],
        column_encoding=dict.fromkeys([*ids, *NUMBER_COLUMNS], "BYTE_STREAM_SPLIT"),
        write_statistics=False,
        write_batch_size=GROUP_ROWS,
        memory_pool=pa.system_memory_pool(),  # malloc keeps the encoder's buffers for the next group; Arrow's pool gives pages back
    )


def _paths(schema: Any) -> list[str]:
    """Columns as Parquet names them."""
    return [f"{field.name}.list.element" if field.name not in TOKEN_COLUMNS else field.name for field in schema]


def _coded(value: Column, rows: int) -> Coded:
    """Words of a column given as one word, as codes, or as one word per token."""
    if isinstance(value, Coded):
        return value
    if isinstance(value, str):
        return Coded((value,), np.zeros(rows, np.int32))
    names, codes = np.unique(np.asarray([str(text) for text in np.asarray(value).tolist()], dtype=object), return_inverse=True)
    return Coded(tuple(names.tolist()), np.broadcast_to(codes, rows).astype(np.int32) if len(codes) == 1 else codes.astype(np.int32))


def _clean_ids(ids_TK: NDArray[Any], model: ModelSpec, row: int) -> NDArray[np.uint16]:
    """[T, K] uint16 of a MoE layer, by its row, with 65535 for no selection; raises TraceError naming the first id out of range."""
    layer, experts = model.moe_layers[row], model.experts_L[row]
    if not np.issubdtype(ids_TK.dtype, np.integer):
        raise TraceError(f"experts of layer {layer}: expected whole numbers, got {ids_TK.dtype}")
    if ids_TK.dtype == np.uint16:
        signed = ids_TK.view(np.int16)  # 65535, no selection, reads as -1: no copy to look for the largest id
        if signed.max(initial=-1) < experts and signed.min(initial=-1) >= -1:
            return ids_TK
    none = ids_TK == NO_EXPERT if ids_TK.dtype.kind == "u" else (ids_TK == -1) | (ids_TK == NO_EXPERT)
    bad = ~none & ((ids_TK < 0) | (ids_TK >= experts))
    if bad.any():
        token, choice = np.argwhere(bad)[0]
        raise TraceError(
            f"expert id {ids_TK[token, choice]} out of range 0..{experts - 1} at layer {layer}, token {token}; is {model.name!r} the right model?"
        )
    return np.where(none, NO_EXPERT, ids_TK).astype(np.uint16)
