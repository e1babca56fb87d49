"""RowBuffer: joins many small forward passes into few large appends.

A pass waits as it came over (references on the CPU, private copies from a GPU); nothing is looked at before many passes
can be converted in a row, while the code is warm. Shapes: R rows of one pass, T rows of all that wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from moesim.capture.discover import Router
from moesim.capture.gather import Kept, Layers, gather
from moesim.capture.tokens import Forward, Sequences, token_columns
from moesim.trace import NO_EXPERT, Coded, TraceWriter
from moesim.trace.schema import NUMBER_COLUMNS
from moesim.trace.writer import GROUP_ROWS

_KINDS = {"experts": (np.uint16, NO_EXPERT), "weights": (np.float16, 0), "logits": (np.float16, np.nan)}
MOST_ROWS, MOST_B = GROUP_ROWS, 1 << 24
PIECE = 1 << 14  # values; torch works on 32,768 and more with several threads


class Pass(NamedTuple):
    """One forward pass: R rows, the bytes that waiting for it holds, and what its routers decided where that is still on the CPU."""

    forward: Forward
    rows: int
    size_B: int
    kept: Sequence[Kept] = ()


class RowBuffer:
    """Passes on their way to `writer`, at most a quarter of a part (in rows or seconds), a row group or 16 MiB of them.

    `groups` are the routers of each stack of layers; a stack that lacks layers of the trace writes no selection there.
    `unmatched` counts passes whose rows could not be matched to tokens.
    """

    def __init__(self, writer: TraceWriter, groups: Sequence[Sequence[Router]]) -> None:
        self.unmatched = 0
        self._writer, self._groups, self._widths = writer, groups, writer.info.widths
        self._most_rows, self._most_s = min(MOST_ROWS, max(1, writer.part_rows // 4)), writer.part_seconds / 4
        self._sequences = Sequences()
        self._passes: list[tuple[Pass, dict[str, NDArray[Any]]]] = []
        self._rows, self._size_B, self._since = 0, 0, 0.0

    def add(self, one: Pass, arrays: dict[str, NDArray[Any]]) -> None:
        """Take one pass; `arrays` are as `token_columns` takes them, with what `gather.stacked` gives if nothing was kept."""
        if not self._passes:
            self._since = time.monotonic()
        self._passes.append((one, arrays))
        self._rows += one.rows
        self._size_B += one.size_B
        if self._rows >= self._most_rows or self._size_B >= MOST_B or time.monotonic() - self._since > self._most_s:
            self.flush()

    def flush(self) -> None:
        """Append what has gathered to the writer. Raises CaptureError where a router's decision does not fit the trace."""
        passes, self._passes = self._passes, []
        total, self._rows, self._size_B = self._rows, 0, 0
        if not passes:
            return
        decided: list[tuple[Pass, Any]] = [(one, self._decided(one) if one.kept else arrays) for one, arrays in passes]
        columns = []
        for one, arrays in passes:
            found, matched = token_columns(one.forward, arrays, one.rows, self._sequences)
            self.unmatched += not matched
            columns.append(found)
        sizes = [one.rows for one, _ in passes]
        joined = {name: _joined([found[name] for found in columns], sizes, NUMBER_COLUMNS.get(name, "bool")) for name in columns[0]}
        with np.errstate(over="ignore"):  # a logit that masks an expert may be the least float32: -inf in a trace
            filled = {what: self._filled(what, decided, total) for what in self._widths}
        self._writer.append(filled["experts"], weights=filled.get("weights"), logits=filled.get("logits"), **joined)

    def _decided(self, one: Pass) -> Layers:
        return gather(self._groups[one.forward.stream], one.kept, self._widths)

    def _filled(self, what: str, decided: Sequence[tuple[Pass, Any]], total: int) -> dict[int, NDArray[Any]]:
        """By layer [T, K] or [T, E]: the passes of a layer converted straight into its rows."""
        kind, filler = _KINDS[what]
        layers, width = self._writer.info.model.moe_layers, self._widths[what]
        parts: dict[int, list[NDArray[Any]]] = {layer: [] for layer in layers}
        for one, layered in decided:
            group = self._groups[one.forward.stream]
            heard = {router.layer: _numpy(values) for router, values in zip(group, layered[what], strict=True) if values is not None}
            for layer, found in parts.items():  # a layer without: its router was silent, or is of another stack
                found.append(heard[layer] if layer in heard else np.full((one.rows, width), filler, kind))
        room = _room((len(layers), total, width), kind)
        for found, room_TK in zip(parts.values(), room, strict=True):
            if kind is np.float16 and found[0].dtype == np.float32:
                _halved(np.concatenate(found), room_TK)
            else:
                np.concatenate(found, out=room_TK, casting="unsafe")  # as C does: -1 becomes 65535
        return dict(zip(layers, room, strict=True))


def _room(shape: tuple[int, ...], kind: DTypeLike) -> NDArray[Any]:
    """An empty array in memory of Arrow's pool, which keeps it for the next: malloc gives every array of this size back to the system."""
    import pyarrow as pa

    return np.frombuffer(pa.allocate_buffer(math.prod(shape) * np.dtype(kind).itemsize), kind).reshape(shape)


def _halved(values: NDArray[Any], out: NDArray[np.float16]) -> None:
    """Rounded to float16 with the processor's instruction, which numpy does not use: in pieces for which torch starts no threads."""
    source, target = torch.from_numpy(values.reshape(-1)), torch.from_numpy(out.reshape(-1))
    for begin in range(0, len(source), PIECE):
        target[begin : begin + PIECE].copy_(source[begin : begin + PIECE])


def _numpy(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    if not isinstance(values, Tensor):
        return values
    array: NDArray[Any] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
    return array


def _joined(values: Sequence[Any], sizes: Sequence[int], kind: str) -> Any:
    """One column of all passes. Words become codes here, word by word, so that nobody has to look at every row's text."""
    first = values[0]
    if not isinstance(first, np.ndarray) and all(type(value) is type(first) and value == first for value in values):
        return first
    codes: dict[str, int] = {}
    words = isinstance(first, str) or (isinstance(first, np.ndarray) and first.dtype.kind == "O")
    room, begin = np.empty(sum(sizes), np.int32 if words else kind), 0
    for value, rows in zip(values, sizes, strict=True):
        if not words:
            room[begin : begin + rows] = value
        elif isinstance(value, str):
            room[begin : begin + rows] = codes.setdefault(value, len(codes))
        else:
            room[begin : begin + rows] = np.fromiter((codes.setdefault(word, len(codes)) for word in value), np.int32, rows)
        begin += rows
    return Coded(tuple(codes), room) if words else room
