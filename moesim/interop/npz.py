"""Plain NumPy archives: `ids` [T, L, K], optional `weights` [T, L, K] and `seqlens` [S]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.interop.opening import array_names, numpy_arrays
from moesim.interop.routing import CHUNK, Chunk, Routing
from moesim.model import ModelSpec


def read_npz(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """The archive's routing; TraceError names the array and the remedy. Pickled arrays are refused."""
    arrays = _load(source)
    ids, weights = arrays["ids"], arrays.get("weights")
    tokens = len(ids)
    lengths = arrays.get("seqlens", np.asarray([tokens]))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)

    def chunks() -> Iterator[Chunk]:
        for start in range(0, tokens, CHUNK):
            rows = slice(start, start + CHUNK)
            yield Chunk(
                experts_TRK=ids[rows],
                weights_TRK=None if weights is None else weights[rows],
                columns={"sequence": sequence[rows], "position": position[rows]},
            )

    return Routing(source=source, chunks=chunks, rows=ids.shape[1], width=ids.shape[2], weights=weights is not None)


def _load(source: Path) -> dict[str, NDArray[Any]]:
    arrays = numpy_arrays(source, ("ids", "weights", "seqlens"))
    if "ids" not in arrays:
        raise TraceError(f"{source}: no array 'ids' [tokens, layers, selections]; found {array_names(source)}: save it as numpy.savez(path, ids=…)")
    ids = arrays["ids"]
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        raise TraceError(f"{source}: ids must be whole numbers [tokens, layers, selections], got {ids.dtype} {list(ids.shape)}")
    if "weights" in arrays and (arrays["weights"].shape != ids.shape or not np.issubdtype(arrays["weights"].dtype, np.floating)):
        raise TraceError(f"{source}: weights must be numbers of the shape of ids {list(ids.shape)}, got {list(arrays['weights'].shape)}")
    if "weights" in arrays and not np.isfinite(arrays["weights"]).all():
        raise TraceError(f"{source}: weights hold NaN or infinity; record them again or leave them out")
    lengths = arrays.get("seqlens")
    if lengths is not None and (
        lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or (lengths < 1).any() or lengths.sum() != len(ids)
    ):
        raise TraceError(f"{source}: seqlens must be whole numbers >= 1 that add up to {len(ids)} tokens")
    return arrays
