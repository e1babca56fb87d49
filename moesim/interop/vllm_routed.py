"""vLLM's returned routing: `routed_experts` [S, L, K] per request, logical ids (`--enable-return-routed-experts`).

Accepted per request: an .npz with `routed_experts` of the whole sequence, or `prompt_routed_experts` and
`routed_experts` of prompt and generation; optional `prompt_token_ids`, `output_token_ids`; or one .npy array.
Source: vLLM documentation v0.21.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.interop.opening import array_names, numpy_array, numpy_arrays, sources
from moesim.interop.routing import Chunk, Routing
from moesim.model import ModelSpec

NAMES = ("prompt_routed_experts", "routed_experts", "prompt_token_ids", "output_token_ids")


def read_vllm(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """Tokens of one request's file, or of a folder of them; requests are sequences in the order of their file names."""
    files = sources(source, "*.np[yz]")
    first, *_ = _request(files[0], phase)
    notes = ["positions beyond the recorded token ids have no token id"] if any(file.suffix == ".npy" for file in files) else []

    def chunks() -> Iterator[Chunk]:
        for sequence, file in enumerate(files):
            ids, token_id, phases = _request(file, phase)
            if ids.shape[1:] != first.shape[1:]:
                raise TraceError(f"{file}: routing {list(ids.shape)} does not fit {files[0].name} {list(first.shape)}; keep models apart")
            columns: dict[str, Any] = {"sequence": sequence, "position": np.arange(len(ids)), "token_id": token_id, "phase": phases}
            yield Chunk(experts_TRK=ids, columns=columns)

    return Routing(source=source, chunks=chunks, rows=first.shape[1], width=first.shape[2], notes=notes)


def _request(file: Path, phase: str) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[Any]]:
    """ids_TLK, token_id_T (-1 unknown) and phase_T of one request."""
    arrays = {"routed_experts": numpy_array(file)} if file.suffix == ".npy" else numpy_arrays(file, NAMES)
    if "routed_experts" not in arrays:
        raise TraceError(f"{file}: no array 'routed_experts' [tokens, layers, selections]; found {array_names(file)}")
    parts = [arrays[name] for name in NAMES[:2] if name in arrays]
    for part in parts:
        if part.ndim != 3 or part.dtype.kind not in "iu" or part.shape[1:] != parts[0].shape[1:] or 0 in part.shape[1:]:
            raise TraceError(f"{file}: routing must be whole numbers [tokens, layers, selections], got {part.dtype} {list(part.shape)}")
    ids = np.concatenate(parts)
    prompt, output = (_token_ids(arrays, name, file) for name in NAMES[2:])
    known = np.concatenate([prompt, output])
    if len(parts) == 2:
        prefill = len(parts[0])
        if len(prompt) and len(prompt) != prefill:
            raise TraceError(f"{file}: routing of {prefill} prompt tokens, but {len(prompt)} prompt_token_ids; record again")
    else:
        prefill = min(len(prompt), len(ids))
    if len(known) and not len(known) - 1 <= len(ids) <= len(known):
        raise TraceError(f"{file}: routing of {len(ids)} tokens, but {len(known)} token ids; the last generated one may lack routing, no other")
    token_id = np.full(len(ids), -1, np.int64)
    token_id[: len(known)] = known[: len(ids)]
    phases = np.where(np.arange(len(ids)) < prefill, "prefill", "decode") if prefill else np.full(len(ids), phase)
    return ids, token_id, phases


def _token_ids(arrays: dict[str, NDArray[Any]], name: str, file: Path) -> NDArray[np.int64]:
    values = arrays.get(name, np.zeros(0, np.int64))
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TraceError(f"{file}: {name} must be whole numbers [tokens], got {values.dtype} {list(values.shape)}")
    return values.astype(np.int64)
