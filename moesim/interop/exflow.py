"""ExFlow arrays: one .npy, whole numbers [tokens, L], top-1 expert of every MoE layer. Source: ExFlow @2696131."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moesim.errors import TraceError
from moesim.interop.opening import numpy_array
from moesim.interop.routing import CHUNK, Chunk, Routing
from moesim.model import ModelSpec


def read_exflow(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """Tokens of the array, mapped and read in pieces; TraceError for another shape."""
    ids = numpy_array(source)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise TraceError(f"{source}: expected whole numbers [tokens, layers], one expert each, got {ids.dtype} {list(ids.shape)}")

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(ids), CHUNK):
            yield Chunk(experts_TRK=ids[start : start + CHUNK, :, None])

    return Routing(source=source, chunks=chunks, rows=ids.shape[1], width=1, notes=["top-1 routing; rank, sequence and position are unknown"])
