"""RowBuffer: joins many small forward passes into few large appends.

A pass waits as it came over (references on the CPU, private copies from a GPU); nothing is converted before many passes
can be converted in a row, while the code is warm. Shapes: R rows of one pass, T rows of all that wait.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.capture.tokens import Forward, Sequences, token_columns
from moesim.trace import NO_EXPERT, Coded, TraceWriter

_KINDS = {"experts": (np.uint16, NO_EXPERT), "weights": (np.float16, 0)}
MOST_ROWS, MOST_B, MOST_S = 1 << 14, 1 << 24, 2.0


class RowBuffer:
    """Passes on their way to `writer`, at most a quarter of a part, 16,384 rows, 16 MiB or two seconds of them.

    `layers` gives the MoE layers of each stack of layers; a stack that lacks layers of the trace writes no selection there.
    `unmatched` counts passes whose rows could not be matched to tokens.
    """

    def __init__(self, writer: TraceWriter, layers: Sequence[Sequence[int]]) -> None:
        self.unmatched = 0
        self._writer, self._layers = writer, layers
        self._most = min(MOST_ROWS, max(1, writer.part_rows // 4))
        self._sequences = Sequences()
        self._passes: list[tuple[Forward, int, dict[str, Any]]] = []
        self._rows, self._size_B, self._since = 0, 0, 0.0

    def add(self, forward: Forward, arrays: dict[str, Any]) -> None:
        """Take one pass: `experts` and perhaps `weights`, L arrays [R, K] or None where a router was silent; the rest as `token_columns` takes it."""
        if not self._passes:
            self._since = time.monotonic()
        heard = [array for what in _KINDS for array in arrays.get(what, ()) if array is not None]
        self._passes.append((forward, len(heard[0]), arrays))
        self._rows += len(heard[0])
        self._size_B += sum(_held_B(array) for array in heard)
        if self._rows >= self._most or self._size_B >= MOST_B or time.monotonic() - self._since > MOST_S:
            self.flush()

    def flush(self) -> None:
        """Append what has gathered to the writer."""
        passes, self._passes = self._passes, []
        total, self._rows, self._size_B = self._rows, 0, 0
        if not passes:
            return
        sizes = [rows for _, rows, _ in passes]
        lists = {what: self._filled(what, passes, total) for what in _KINDS if what in passes[0][2]}
        columns = []
        for forward, rows, arrays in passes:
            found, matched = token_columns(forward, arrays, rows, self._sequences)
            self.unmatched += not matched
            columns.append(found)
        joined = {name: _joined([found[name] for found in columns], sizes) for name in columns[0]}
        self._writer.append(lists["experts"], weights=lists.get("weights"), **joined)

    def _filled(self, what: str, passes: Sequence[tuple[Forward, int, dict[str, Any]]], total: int) -> dict[int, NDArray[Any]]:
        """By layer [T, K]: every pass converted straight into its rows."""
        kind, filler = _KINDS[what]
        layers = self._writer.info.model.moe_layers
        room = np.empty((len(layers), total, self._writer.info.top_k), kind)
        by_layer = dict(zip(layers, room, strict=True))
        begin = 0
        for forward, rows, arrays in passes:
            own = self._layers[forward.stream]
            if len(own) < len(layers):  # the others are of other stacks
                room[:, begin : begin + rows] = filler
            for layer, values in zip(own, arrays[what], strict=True):
                by_layer[layer][begin : begin + rows] = filler if values is None else values  # cast as C does: -1 becomes 65535
            begin += rows
        return by_layer


def _held_B(array: NDArray[Any]) -> int:
    """Bytes that waiting for `array` holds; a view of something larger holds all of it."""
    return max(array.nbytes, abs(array.strides[0]) * len(array)) if array.ndim else array.nbytes


def _joined(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """One column of all passes. Words become codes here, word by word, so that nobody has to look at every row's text."""
    first = values[0]
    if not isinstance(first, np.ndarray) and all(type(value) is type(first) and value == first for value in values):
        return first
    if isinstance(first, str) or (isinstance(first, np.ndarray) and first.dtype.kind == "O"):
        codes: dict[str, int] = {}
        parts = []
        for value, rows in zip(values, sizes, strict=True):
            if isinstance(value, str):
                parts.append(np.full(rows, codes.setdefault(value, len(codes)), np.int32))
            else:
                parts.append(np.fromiter((codes.setdefault(word, len(codes)) for word in value), np.int32, rows))
        return Coded(tuple(codes), np.concatenate(parts))
    if len(values) == 1:
        return first
    return (
        np.repeat(np.asarray(values), sizes)
        if all(np.ndim(v) == 0 for v in values)
        else np.concatenate([np.broadcast_to(value, rows) for value, rows in zip(values, sizes, strict=True)])
    )
