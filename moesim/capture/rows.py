"""RowBuffer: joins many small forward passes into few large appends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.trace import Coded, TraceWriter

Lists = dict[int, NDArray[Any]]  # by layer, [R, K]


class RowBuffer:
    """Rows on their way to `writer`, at most a quarter of a part, 16,384 rows or two seconds of them."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._most = min(1 << 14, max(1, writer.part_rows // 4))
        self._passes: list[tuple[int, Lists, Lists | None, dict[str, Any]]] = []
        self._rows, self._since = 0, 0.0

    def add(self, experts: Lists, weights: Lists | None, columns: dict[str, Any]) -> None:
        """Take the R rows of one pass: lists by layer [R, K], columns as one value or [R]."""
        if not self._passes:
            self._since = time.monotonic()
        rows = len(next(iter(experts.values())))
        self._passes.append((rows, experts, weights, columns))
        self._rows += rows
        if self._rows >= self._most or time.monotonic() - self._since > 2:
            self.flush()

    def flush(self) -> None:
        """Append what has gathered to the writer."""
        passes, self._passes, self._rows = self._passes, [], 0
        if not passes:
            return
        sizes = [rows for rows, *_ in passes]
        columns = {name: _joined([columns[name] for *_, columns in passes], sizes) for name in passes[0][3]}
        experts = _layers([experts for _, experts, _, _ in passes])
        weights = _layers([weights for _, _, weights, _ in passes if weights is not None]) if passes[0][2] is not None else None
        self._writer.append(experts, weights=weights, **columns)


def _layers(lists: Sequence[Lists]) -> Lists:
    return lists[0] if len(lists) == 1 else {layer: np.concatenate([by_layer[layer] for by_layer in lists]) for layer in lists[0]}


def _joined(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """One column of all passes. Words become codes here, word by word, so that nobody has to look at every row's text."""
    first = values[0]
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
