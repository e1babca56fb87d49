"""SGLang's expert distribution recorder: `--expert-distribution-recorder-mode stat | stat_approx | per_pass | per_token`.

`per_token` dumps become traces; the other modes hold counts, which become loads. Dumps of the last two modes hold
*physical* ids; they are mapped through `last_physical_to_logical_map`, the only map a dump stores.
Source: python/sglang/srt/eplb/expert_distribution.py of sgl-project/sglang.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.interop.loads import Loads, OnlyCounts, counts, loads_of
from moesim.interop.opening import integer, sources
from moesim.interop.routing import Chunk, DoesNotFit, Routing
from moesim.interop.torch_files import load_torch
from moesim.model import ModelSpec

WIDTH = 8  # hard-coded upstream, whatever the model's top-k
PHASES = {1: "prefill", 2: "decode", 3: "prefill"}  # ForwardMode EXTEND, DECODE, MIXED
IDLE = 4
PATTERN = "expert_distribution_recorder_*.pt"


def read_tokens(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """Tokens of `per_token` dumps: one file, or a folder with one file per rank.

    Raises TraceError for other modes, for top-k above 8 (the recorder's fixed width) and for damaged dumps.
    """
    if model is not None and model.top_k > WIDTH:
        raise TraceError(
            f"{source}: the recorder keeps {WIDTH} selections per token, {model.name!r} makes {model.top_k}: the rest is lost; "
            "return routed experts per request instead (--enable-return-routed-experts)"
        )
    dumps = [(file, _dump(file)) for file in sources(source, PATTERN)]
    notes: list[str] = []
    for file, dump in dumps:
        if "records" not in dump or not all("topk_ids_of_layer" in record for record in dump["records"]):
            raise OnlyCounts(file, "record with --expert-distribution-recorder-mode per_token")
    maps = {file: _map(dump, str(file)) for file, dump in dumps}
    notes += _map_notes(list(maps.values()), sum(len(dump["records"]) for _, dump in dumps))
    notes += [f"{key} = {dump[key]}: the recorder says it dropped that many" for _, dump in dumps for key in dump if "drop" in str(key)]
    width = max((_used_width(record, str(file)) for file, dump in dumps for record in dump["records"]), default=0)
    if width == 0:
        raise DoesNotFit(f"{source}: holds no token with a selection; start recording while requests run")
    if width < WIDTH:
        notes.append(f"{WIDTH - width} of {WIDTH} selection columns are unused and were cut off")
    notes.append("sequence numbers name runs of one pass; the recorder does not say which request they belong to")
    if model is None and width == WIDTH:
        notes.append(f"all {WIDTH} selection columns are used: if the model chooses more than {WIDTH}, the rest is lost; give --model to be sure")

    def chunks() -> Iterator[Chunk]:
        sequence = 0
        for file, dump in dumps:
            for index, record in enumerate(dump["records"]):
                chunk, sequence = _chunk(record, maps[file], width, sequence, phase, notes, f"{file}: records[{index}]")
                if chunk is not None:
                    yield chunk

    layers, experts = next(iter(maps.values())).shape[0], int(max(m.max() for m in maps.values())) + 1
    return Routing(source=source, chunks=chunks, rows=layers, width=width, experts=experts, notes=notes)


def read_loads(source: Path, model: ModelSpec | None) -> Loads:
    """Counts of `stat`, `per_pass` (and `per_token`) dumps, summed over ranks and passes, as logical loads."""
    files = sources(source, PATTERN)
    total: NDArray[np.int64] | None = None
    notes: list[str] = []
    for file in files:
        dump = _dump(file)
        if "logical_count" in dump:
            load = counts(dump["logical_count"], str(file), dimensions=3)
            empty = int((load.sum(axis=(1, 2)) == 0).sum())
            if empty:
                notes.append(f"{file.name}: {empty} of {len(load)} buffered steps are empty (the ring was not full)")
            load = load.sum(axis=0)
        else:
            where = _map(dump, str(file))
            load = np.zeros((len(where), int(where.max()) + 1), np.int64)
            for index, record in enumerate(dump["records"]):
                physical = counts(record.get("global_physical_count"), f"{file}: records[{index}].global_physical_count")
                if physical.shape != where.shape:
                    raise TraceError(f"{file}: records[{index}] counts {list(physical.shape)}, the map is {list(where.shape)}; the dump is damaged")
                np.add.at(load, (np.arange(len(where))[:, None], where), physical)
            notes += _map_notes([where], len(dump["records"]))
        if total is not None and total.shape != load.shape:
            raise TraceError(f"{file}: counts {list(load.shape)}, the files before it {list(total.shape)}; keep runs apart")
        total = load if total is None else total + load
    assert total is not None
    return loads_of(total, len(total), place=str(source), source=f"SGLang recorder, {source.name}", model=model, notes=tuple(dict.fromkeys(notes)))


def _dump(file: Path) -> dict[str, Any]:
    dump = load_torch(file)
    if not isinstance(dump, dict) or not ("logical_count" in dump or "records" in dump):
        found = sorted(map(str, dump)) if isinstance(dump, dict) else type(dump).__name__
        raise TraceError(f"{file}: no recorder dump: it holds {found}, expected 'logical_count' or 'records'")
    records = dump.get("records", [])
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise TraceError(f"{file}: 'records' must be a list of dictionaries; the dump is damaged")
    return dump


def _map(dump: dict[str, Any], place: str) -> NDArray[np.int64]:
    if "last_physical_to_logical_map" not in dump:
        raise TraceError(f"{place}: no 'last_physical_to_logical_map', so the physical ids cannot be mapped; record with a version that writes it")
    where = counts(dump["last_physical_to_logical_map"], f"{place}: last_physical_to_logical_map")
    if where.max() >= where.shape[1]:
        raise TraceError(f"{place}: the map names expert {where.max()} in {where.shape[1]} slots; every expert has a slot, so the dump is damaged")
    return where


def _map_notes(maps: list[NDArray[np.int64]], passes: int) -> list[str]:
    plain = all((m == np.arange(m.shape[1]) % (m.max() + 1)).all() for m in maps)
    same = all(np.array_equal(m, maps[0]) for m in maps)
    said = [f"physical ids of {passes} passes were mapped through the last map of the dump"]
    if not plain:
        said.append("the map is not the trivial one: if the engine rebalanced while recording, passes before the last rebalance are mapped wrongly")
    if not same:
        said.append("ranks hold different maps: the engine rebalanced between their dumps; record again with rebalancing off")
    return said


def _used_width(record: dict[str, Any], place: str) -> int:
    ids = record["topk_ids_of_layer"]
    if not isinstance(ids, np.ndarray) or ids.ndim != 3 or ids.dtype.kind not in "iu" or ids.shape[2] > WIDTH:
        shape = list(ids.shape) if isinstance(ids, np.ndarray) else type(ids).__name__
        raise TraceError(f"{place}: topk_ids_of_layer must be whole numbers [layers, tokens, {WIDTH}], got {shape}")
    return int(np.flatnonzero((ids >= 0).any(axis=(0, 1))).max(initial=-1)) + 1


def _chunk(
    record: dict[str, Any], where: NDArray[np.int64], width: int, sequence: int, phase: str, notes: list[str], place: str
) -> tuple[Chunk | None, int]:
    physical = record["topk_ids_of_layer"][:, :, :width].astype(np.int64)
    layers, tokens, _ = physical.shape
    if layers != len(where):
        raise TraceError(f"{place}: {layers} layers, the map has {len(where)}; the dump is damaged")
    if (physical >= where.shape[1]).any():
        raise DoesNotFit(f"{place}: physical id {physical.max()} with {where.shape[1]} slots in the map; the map is not the one that was live")
    mode = record.get("forward_mode")
    if mode == IDLE:
        if tokens:
            notes.append("tokens of idle passes (data-parallel padding) were dropped")
        return None, sequence
    if mode not in PHASES:
        notes.append(f"forward_mode {mode!r} is neither prefill nor decode: labelled {phase!r}")
    if mode == 3:
        notes.append("mixed passes (chunked prefill with decode) were labelled prefill")
    logical = np.where(physical < 0, -1, where[np.arange(layers)[:, None, None], np.maximum(physical, 0)])
    number, place_in = _sequences(record.get("extend_seq_lens"), tokens, decode=mode == 2)
    columns: dict[str, Any] = {
        "step": integer(record.get("forward_pass_id"), place, "forward_pass_id"),
        "sequence": sequence + number,
        "position": _column(record, "positions", tokens, place_in, place),
        "token_id": _column(record, "input_ids", tokens, np.full(tokens, -1), place),
        "phase": PHASES.get(mode, phase) if isinstance(mode, int) else phase,
    }
    rank = integer(record.get("rank"), place, "rank")
    return Chunk(experts_TRK=logical.transpose(1, 0, 2), rank=rank, columns=columns), sequence + int(number.max(initial=-1)) + 1


def _sequences(lengths: Any, tokens: int, *, decode: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sequence number and place in it of every token; decode passes hold one token per sequence."""
    spans = np.asarray(lengths if isinstance(lengths, list | np.ndarray) else [], np.int64).reshape(-1) if not decode else np.ones(tokens, np.int64)
    if spans.sum() != tokens or (spans < 0).any():
        spans = np.asarray([tokens])
    number = np.repeat(np.arange(len(spans)), spans)
    return number, np.arange(tokens) - np.repeat(np.cumsum(spans) - spans, spans)


def _column(record: dict[str, Any], key: str, tokens: int, default: NDArray[np.int64], place: str) -> NDArray[np.int64]:
    values = np.asarray(record.get(key, default))
    if values.ndim != 1 or len(values) < tokens or values.dtype.kind not in "iu":
        raise TraceError(f"{place}: {key} must be {tokens} whole numbers, got {values.dtype} {list(values.shape)}")
    return values[:tokens].astype(np.int64)
