"""moe-balance JSON lines: one record per (layer, batch) with `origin_rows` [T], `topk_experts` [T][K], optional `topk_weights`.

`origin_rows` is the device each token comes from; it becomes the rank. Source: moe-balance @700358b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.interop.opening import integer, json_lines, table
from moesim.interop.routing import Chunk, Routing
from moesim.model import ModelSpec

NEEDED = ("layer", "batch_id", "origin_rows", "topk_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    origin_T: NDArray[Any]
    ids_TK: NDArray[Any]
    weights_TK: NDArray[Any] | None


def read_moe_balance(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """Tokens of the file, gathered by batch (held in memory: lines may come layer by layer or batch by batch).

    Batches that lack a layer are dropped and counted. Raises TraceError when a batch's layers disagree.
    """
    batches: dict[int, dict[int, _Part]] = {}
    width, weighted = 0, True
    for place, record in json_lines(source, NEEDED):
        layer, batch = integer(record["layer"], place, "layer"), integer(record["batch_id"], place, "batch_id")
        ids = table(record["topk_experts"], place, "topk_experts", columns=width or None)
        if not len(ids):
            continue
        width = ids.shape[1]
        origin = np.asarray(record["origin_rows"])
        if origin.shape != (len(ids),) or origin.dtype.kind not in "iu":
            raise TraceError(f"{place}: origin_rows must be {len(ids)} device numbers, got {origin.dtype} {list(origin.shape)}")
        weights = table(record["topk_weights"], place, "topk_weights", columns=width, kind="iuf") if record.get("topk_weights") else None
        weighted &= weights is not None
        found = batches.setdefault(batch, {})
        if layer in found:
            raise TraceError(f"{place}: layer {layer} of batch {batch} is there twice; one record per layer and batch")
        before = next(iter(found.values()), None)
        if before is not None and not np.array_equal(before.origin_T, origin):
            raise TraceError(f"{place}: origin_rows differ from those of another layer of batch {batch}; the tokens do not correspond")
        if weights is not None and len(weights) != len(ids):
            raise TraceError(f"{place}: {len(weights)} rows of weights for {len(ids)} tokens; the record is damaged")
        found[layer] = _Part(origin_T=origin, ids_TK=ids, weights_TK=weights)
    if not width:
        raise TraceError(f"{source}: holds no record with tokens; check the path")
    layers = tuple(sorted({layer for found in batches.values() for layer in found}))
    whole = {batch: found for batch, found in batches.items() if len(found) == len(layers)}
    notes = ["origin_rows became ranks; upstream may have made them up (round-robin)"]
    if len(whole) < len(batches):
        notes.append(f"{len(batches) - len(whole)} of {len(batches)} batches lack layers and were dropped")

    def chunks() -> Iterator[Chunk]:
        for batch, found in whole.items():
            parts = [found[layer] for layer in layers]
            ids = np.stack([part.ids_TK for part in parts], axis=1)
            weights = np.stack([part.weights_TK for part in parts if part.weights_TK is not None], axis=1) if weighted else None
            for rank in np.unique(parts[0].origin_T).tolist():
                mine = np.flatnonzero(parts[0].origin_T == rank)
                columns: dict[str, Any] = {"step": batch, "sequence": batch, "position": mine}
                yield Chunk(experts_TRK=ids[mine], weights_TRK=None if weights is None else weights[mine], rank=rank, columns=columns)

    return Routing(source=source, chunks=chunks, rows=layers, width=width, weights=weighted, notes=notes)
