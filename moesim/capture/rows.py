"""RowBuffer: joins many small forward passes (decoding) into few large appends."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.trace import TraceWriter

Lists = dict[int, NDArray[Any]]  # by layer, [R, K]


class RowBuffer:
    """Rows on their way to `writer`, at most a quarter of a part, 16,384 rows or two seconds of them.

    Passes are joined while `phase` and `domain` stay the same word.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._most = min(1 << 14, max(1, writer.part_rows // 4))
        self._passes: list[tuple[int, Lists, Lists | None, dict[str, Any]]] = []
        self._rows, self._since, self._key = 0, 0.0, ("", "")

    def add(self, experts: Lists, weights: Lists | None, columns: dict[str, Any]) -> None:
        """Take the R rows of one pass: lists by layer [R, K], columns as one value or [R]."""
        words = columns.pop("phase"), columns.pop("domain")
        joinable = isinstance(words[1], str)
        if not joinable or words != self._key:
            self.flush()
        rows = len(next(iter(experts.values())))
        if not joinable:
            self._writer.append(experts, weights=weights, phase=words[0], domain=words[1], **columns)
            return
        if not self._passes:
            self._key, self._since = words, time.monotonic()
        self._passes.append((rows, experts, weights, columns))
        self._rows += rows
        if self._rows >= self._most or time.monotonic() - self._since > 2:
            self.flush()

    def flush(self) -> None:
        """Append what has gathered to the writer."""
        passes, (phase, domain) = self._passes, self._key
        self._passes, self._rows = [], 0
        if len(passes) == 1:
            _, experts, weights, columns = passes[0]
            self._writer.append(experts, weights=weights, phase=phase, domain=domain, **columns)
        elif passes:
            joined = {name: np.concatenate([np.broadcast_to(p[3][name], p[0]) for p in passes]) for name in passes[0][3]}
            layers = passes[0][1]
            experts = {layer: np.concatenate([p[1][layer] for p in passes]) for layer in layers}
            weights = {layer: np.concatenate([p[2][layer] for p in passes if p[2]]) for layer in layers} if passes[0][2] else None
            self._writer.append(experts, weights=weights, phase=phase, domain=domain, **joined)
