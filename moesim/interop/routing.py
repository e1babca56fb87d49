"""From any tool's tokens to a trace: hold them against the model, write them, count everything that was left out.

Shapes: T tokens, R layer rows of the file, L MoE layers, K selections, E experts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import OutputExists, TraceError
from moesim.model import ModelSpec
from moesim.trace import NO_EXPERT, TraceWriter
from moesim.trace.writer import Column

CHUNK = 1 << 15
MAX_RANK = 1 << 14


class DoesNotFit(TraceError):  # noqa: N818 - reads as what happened
    """The file can be read, but what it says contradicts the model or itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """T tokens of one rank. experts_TRK whole numbers, -1 = none; `columns` as TraceWriter.append takes them."""

    experts_TRK: NDArray[Any]
    weights_TRK: NDArray[Any] | None = None
    rank: int = 0
    columns: Mapping[str, Column] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The tokens of a foreign file.

    chunks    called for a fresh pass over the tokens
    rows      absolute layer index of each row where the file names them, else how many rows there are
    experts   experts per layer where the file says so
    notes     what the reader left out or assumed; grows while chunks are read
    """

    source: Path
    chunks: Callable[[], Iterator[Chunk]]
    rows: tuple[int, ...] | int
    width: int
    experts: int | None = None
    weights: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Tally:
    """What went through an import: the figures of its conservation laws and of `check`."""

    tokens: int = 0
    selections: int = 0
    empty: int = 0  # selections that are -1
    pad_tokens: int = 0  # tokens without any selection: dropped
    repeated: int = 0  # tokens whose selections equal the token before in every layer
    doubled: int = 0  # (token, layer) that name one expert twice
    dropped_selections: int = 0  # in rows that are no MoE layer of the model
    ranks: set[int] = field(default_factory=set)
    top_L: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # largest id of each layer

    @property
    def repeated_share(self) -> float:
        """Share of tokens routed exactly like the one before: dummy batches and padding do that."""
        return self.repeated / max(self.tokens, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an import wrote, and what the reader must know of it."""

    model: ModelSpec
    tokens: int
    notes: tuple[str, ...]
    tally: Tally


def write_trace(routing: Routing, output: Path, *, model: ModelSpec | None, domain: str, phase: str, captured_by: str) -> Imported:
    """Write the tokens as a trace at `output`: the whole of it, or nothing.

    The MoE layers are those of `model`, else a bare shape read off the ids. Tokens without any selection and rows that
    are no MoE layer are dropped and counted. Raises DoesNotFit when ids or layers contradict the model, OutputExists.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputExists(f"{output}: exists and is not empty; give another path, or remove it first")
    notes: list[str] = []
    if model is None:
        model = _bare_model(routing)
        notes.append(
            f"no --model: took {len(model.moe_layers)} layers x {model.experts} experts from the ids, with hidden and expert width 1; "
            "predicted times mean nothing until a model is given"
        )
    keep, remarks = pick_rows(routing.rows, model, str(routing.source))
    notes += remarks
    if routing.width > model.experts:
        raise DoesNotFit(
            f"{routing.source}: ids have {routing.width} selections per token, {model.name!r} has {model.experts} experts; give the right --model"
        )
    if routing.width != model.top_k:
        notes.append(f"ids have {routing.width} selections per token, {model.name!r} routes to {model.top_k}")
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.parent / f".{output.name}.importing-{os.getpid()}"
    try:
        tally = _write(routing, draft, model, keep, domain=domain, phase=phase, captured_by=captured_by)
        _refuse_silence(routing, tally, model)
        for marker in draft.glob(".run-*"):
            marker.unlink()
        if output.exists():
            output.rmdir()
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Imported(model=model, tokens=tally.tokens, notes=(*notes, *dict.fromkeys(routing.notes), *_remarks(tally)), tally=tally)


def _write(routing: Routing, path: Path, model: ModelSpec, keep: list[int], *, domain: str, phase: str, captured_by: str) -> Tally:
    tally = Tally(top_L=np.full(len(keep), -1, np.int64))
    last: dict[int, NDArray[Any]] = {}
    writers: dict[int, TraceWriter] = {}
    about = {"by": captured_by, "file": routing.source.name}
    with ExitStack() as stack:

        def writer(rank: int) -> TraceWriter:
            if rank not in writers:
                if not 0 <= rank < MAX_RANK:
                    raise DoesNotFit(f"{routing.source}: rank {rank} is outside 0..{MAX_RANK - 1}; the file is damaged")
                opened = TraceWriter(path, model, top_k=routing.width, weights=routing.weights, captured_by=about, rank=rank, run="import")
                writers[rank] = stack.enter_context(opened)
            return writers[rank]

        writer(0)  # rank 0 writes the closing manifest
        for chunk in routing.chunks():
            for start in range(0, len(chunk.experts_TRK), CHUNK):
                rows = slice(start, start + CHUNK)
                every = chunk.experts_TRK[rows]
                ids = _clean(every if keep == list(range(every.shape[1])) else every[:, keep], model, routing.source, tally)
                if len(keep) < every.shape[1]:
                    tally.dropped_selections += int(((every != -1) & (every != NO_EXPERT)).sum()) - int((ids >= 0).sum())
                real = np.asarray((ids >= 0).any(axis=(1, 2)))
                tally.pad_tokens += int((~real).sum())
                ids = ids if real.all() else ids[real]
                if not len(ids):
                    continue
                _count(tally, ids, last.get(chunk.rank))
                last[chunk.rank] = ids[-1:]
                tally.ranks.add(chunk.rank)
                weights = None if chunk.weights_TRK is None else chunk.weights_TRK[rows][:, keep][real]
                if weights is not None and not np.isfinite(weights).all():
                    raise DoesNotFit(f"{routing.source}: weights hold NaN or infinity; record them again or leave them out")
                columns = {name: _part(value, rows, real) for name, value in chunk.columns.items()}
                writer(chunk.rank).append(ids, weights=weights, logits=None, **({"domain": domain, "phase": phase} | columns))
    return tally


def _part(value: Column, rows: slice, real: NDArray[np.bool_]) -> Column:
    array = np.asarray(value)
    return value if array.ndim == 0 else array[rows][real]


def _clean(ids_TLK: NDArray[Any], model: ModelSpec, source: Path, tally: Tally) -> NDArray[np.int32]:
    """Ids with -1 for no selection; DoesNotFit names the first that is outside the model."""
    none = (ids_TLK == -1) | (ids_TLK == NO_EXPERT)
    bad = ~none & ((ids_TLK < 0) | (ids_TLK >= model.experts))
    if bad.any():
        token, layer, choice = np.argwhere(bad)[0]
        before = tally.tokens + tally.pad_tokens
        raise DoesNotFit(
            f"{source}: expert id {ids_TLK[token, layer, choice]} out of range 0..{model.experts - 1} at ids[{before + token}, {layer}, {choice}] "
            f"(layer {model.moe_layers[layer]}); give the right --model. Ids beyond the experts are often physical slots of an engine "
            "that balances with redundant experts: record logical ids, or import the dump that holds the map"
        )
    ids = ids_TLK.astype(np.int32)
    ids[none] = -1
    return ids


def _count(tally: Tally, ids_TLK: NDArray[np.int32], before: NDArray[Any] | None) -> None:
    tally.tokens += len(ids_TLK)
    empty = int((ids_TLK < 0).sum())
    tally.empty += empty
    tally.selections += ids_TLK.size - empty
    tally.top_L = np.maximum(tally.top_L, ids_TLK.max(axis=(0, 2)))
    tally.repeated += int((ids_TLK[1:] == ids_TLK[:-1]).all(axis=(1, 2)).sum()) + (before is not None and np.array_equal(before, ids_TLK[:1]))
    order = np.sort(ids_TLK, axis=2)
    tally.doubled += int(((order[:, :, 1:] == order[:, :, :-1]) & (order[:, :, 1:] >= 0)).any(axis=2).sum())


def _refuse_silence(routing: Routing, tally: Tally, model: ModelSpec) -> None:
    """A layer whose ids are all 0 (K > 1) or all empty was not recorded; expert 0 is real, so it must not pass for one."""
    if tally.tokens == 0:
        raise DoesNotFit(f"{routing.source}: holds no token with a selection; record again with tokens running")
    silent = [layer for layer, top in zip(model.moe_layers, tally.top_L.tolist(), strict=True) if top < 0 or (top == 0 and model.experts > 1)]
    if silent and (routing.width > 1 or len(silent) == len(model.moe_layers)):
        raise DoesNotFit(
            f"{routing.source}: layers {silent} hold nothing but expert 0 or no selection: nothing was recorded there (a dense layer filled with "
            "zeros, or a fused kernel that does not report routing); give --model with the right MoE layers, or record with another kernel"
        )


def _remarks(tally: Tally) -> list[str]:
    said = [
        (tally.pad_tokens, f"{tally.pad_tokens:,} tokens without any selection (padding) were dropped"),
        (tally.dropped_selections, f"{tally.dropped_selections:,} selections of rows that are no MoE layer of the model were dropped"),
        (tally.empty, f"{tally.empty:,} selections are empty (-1 or 65535)"),
        (tally.doubled, f"{tally.doubled:,} times a token names one expert twice in a layer: padding, or physical ids mapped to logical ones"),
        (
            tally.tokens > 1 and tally.repeated_share > 0.1,
            f"{tally.repeated_share:.0%} of tokens are routed exactly like the one before: dummy batches or padding; `moesim check` says what to do",
        ),
    ]
    return [text for count, text in said if count]


def pick_rows(rows: tuple[int, ...] | int, model: ModelSpec, place: str) -> tuple[list[int], list[str]]:
    """Indices of the file's rows that are the model's MoE layers, in their order, and remarks on the rest.

    Named rows are found by name, or taken in order when only their number fits (files that count from 1). Unnamed rows
    are one per MoE layer, or one per decoder layer with the dense ones among them. Raises DoesNotFit naming both lists.
    """
    layers = model.moe_layers
    if isinstance(rows, int):
        if rows == len(layers):
            return list(range(rows)), []
        if rows == model.layers:
            return list(layers), [f"{rows} rows are all decoder layers; kept the {len(layers)} MoE layers of {model.name!r}"]
        raise DoesNotFit(f"{place}: ids have {rows} layers, {model.name!r} has {len(layers)} MoE layers; give the right --model")
    missing = [layer for layer in layers if layer not in rows]
    if not missing:
        extra = [row for row in rows if row not in layers]
        return [rows.index(layer) for layer in layers], [f"layers {extra} of the file are no MoE layers of {model.name!r}: dropped"] if extra else []
    if len(rows) == len(layers):
        return list(range(len(rows))), [f"layers {_span(rows)} of the file were taken in order for MoE layers {_span(layers)} of {model.name!r}"]
    raise DoesNotFit(
        f"{place}: holds layers {_span(rows)}, {model.name!r} has MoE layers {_span(layers)}; missing {missing}; give the right --model or record all"
    )


def _span(layers: tuple[int, ...]) -> str:
    whole = len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}..{layers[-1]}" if whole else str(list(layers))


def _bare_model(routing: Routing) -> ModelSpec:
    """Shape read off the ids in one pass: rows that hold a selection are the MoE layers."""
    names = tuple(range(routing.rows)) if isinstance(routing.rows, int) else routing.rows
    top_R = np.full(len(names), -1, np.int64)
    for chunk in routing.chunks():
        if len(chunk.experts_TRK):
            ids = chunk.experts_TRK.astype(np.int64)
            top_R = np.maximum(top_R, np.where(ids == NO_EXPERT, -1, ids).max(axis=(0, 2)))
    layers = tuple(name for name, top in zip(names, top_R.tolist(), strict=True) if top >= 0)
    if not layers:
        raise DoesNotFit(f"{routing.source}: holds no token with a selection; record again with tokens running")
    return bare_model(routing.source.stem, layers, routing.experts or int(top_R.max()) + 1, routing.width, routing.source.name)


def bare_model(name: str, moe_layers: tuple[int, ...], experts: int, top_k: int, source: str) -> ModelSpec:
    """A model of which only the routing shape is known."""
    if experts > NO_EXPERT:
        raise DoesNotFit(f"{source}: expert id {experts - 1} is beyond {NO_EXPERT - 1}, the largest a trace can hold; the ids are damaged")
    return ModelSpec(
        name=name,
        layers=max(moe_layers) + 1,
        moe_layers=moe_layers,
        hidden=1,
        intermediate=1,
        experts=max(experts, top_k),
        top_k=top_k,
        source=source,
    )
