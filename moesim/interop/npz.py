"""Plain NumPy archives: `ids` [T, L, K], optional `weights` [T, L, K] and `seqlens` [S]."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.model import ModelSpec
from moesim.trace import NO_EXPERT, TraceWriter

CHUNK = 1 << 17


def import_npz(source: Path, output: Path, *, model: ModelSpec | None, domain: str, phase: str) -> tuple[ModelSpec, int, tuple[str, ...]]:
    """Write the archive's routing as a trace; the MoE layers are those of `model`, else 0..L-1 of a bare shape.

    Returns the model, the number of tokens and remarks. Raises TraceError naming the array and the remedy. Pickled
    arrays are refused.
    """
    arrays = _load(source)
    ids = arrays["ids"]
    tokens, layers, width = ids.shape
    notes = []
    none = (ids < 0) | (ids == NO_EXPERT)
    if model is None:
        experts = int(ids[~none].max(initial=0)) + 1
        model = ModelSpec(
            name=source.stem,
            layers=layers,
            moe_layers=tuple(range(layers)),
            hidden=1,
            intermediate=1,
            experts=experts,
            top_k=width,
            source=str(source.name),
        )
        notes.append(
            f"no --model: took {layers} layers x {experts} experts from the ids, with hidden and expert width 1; "
            "predicted times mean nothing until a model is given"
        )
    if layers != len(model.moe_layers):
        raise TraceError(f"{source}: ids have {layers} layers, {model.name!r} has {len(model.moe_layers)} MoE layers; give the right --model")
    if width > model.experts:
        raise TraceError(f"{source}: ids have {width} selections per token, {model.name!r} has {model.experts} experts; give the right --model")
    if width != model.top_k:
        notes.append(f"ids have {width} selections per token, {model.name!r} routes to {model.top_k}")
    bad = ~none & (ids >= model.experts)
    if bad.any():
        token, layer, choice = np.argwhere(bad)[0]
        raise TraceError(
            f"{source}: expert id {ids[token, layer, choice]} out of range 0..{model.experts - 1} at ids[{token}, {layer}, {choice}] "
            f"(layer {model.moe_layers[layer]}); give the right --model"
        )
    if none.any():
        notes.append(f"{int(none.sum())} selections are empty (-1 or 65535)")
    lengths = arrays.get("seqlens", np.asarray([tokens]))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    weights = arrays.get("weights")
    captured = {"by": "moesim import npz", "file": source.name}
    with TraceWriter(output, model, top_k=width, weights=weights is not None, captured_by=captured) as writer:
        for start in range(0, tokens, CHUNK):
            rows = slice(start, start + CHUNK)
            writer.append(
                np.where(none[rows], -1, ids[rows].astype(np.int32)),
                weights=None if weights is None else weights[rows],
                sequence=sequence[rows],
                position=position[rows],
                phase=phase,
                domain=domain,
            )
    return model, tokens, tuple(notes)


def _load(source: Path) -> dict[str, NDArray[Any]]:
    if not source.exists():
        raise TraceError(f"{source}: no such file; check the path")
    try:
        with np.load(source, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise TraceError(f"{source}: a single array, not an .npz archive; save it with numpy.savez(file, ids=…)")
            if "ids" not in archive.files:
                raise TraceError(f"{source}: no array 'ids' [tokens, layers, selections]; found {archive.files}")
            arrays = {name: archive[name] for name in ("ids", "weights", "seqlens") if name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, MemoryError) as problem:
        raise TraceError(f"{source}: not a readable .npz archive: {problem}") from None
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
