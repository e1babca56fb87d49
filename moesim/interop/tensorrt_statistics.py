"""TensorRT-LLM expert statistics: the folder `$EXPERT_STATISTIC_PATH`, recorded with EXPERT_STATISTIC_ITER_RANGE.

meta_info.json names experts and top-k; rank<r>.safetensors holds counts `"<iteration>_<layer>" -> int [E]`;
rank<r>_raw.safetensors, where written, holds the tokens' choices `[tokens, K]` under the same keys.
Source: tensorrt_llm expert_statistic.py of NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.files import read_json
from moesim.interop.loads import Loads, OnlyCounts, loads_of
from moesim.interop.opening import integer, safetensors
from moesim.interop.routing import Chunk, DoesNotFit, Routing
from moesim.model import ModelSpec

_FILE = re.compile(r"rank(\d+)(_raw)?\.safetensors")
_KEY = re.compile(r"(\d+)_(\d+)")


def read_tokens(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """Tokens of the raw files; TraceError when only counts were written."""
    experts, width = _meta(source)
    ranks = _ranks(source, raw=True)
    if not ranks:
        raise OnlyCounts(source, "record with a version that writes rank<r>_raw.safetensors")
    notes: list[str] = []
    layers = tuple(sorted({layer for file in ranks.values() for _, layer in _keys(file)}))

    def chunks() -> Iterator[Chunk]:
        for rank, file in ranks.items():
            by_step: dict[int, dict[int, NDArray[np.integer]]] = defaultdict(dict)
            for (step, layer), tensor in _keys(file).items():
                if tensor.ndim != 2 or tensor.shape[1] != width or tensor.dtype.kind not in "iu":
                    raise TraceError(f"{file}: {step}_{layer} must be whole numbers [tokens, {width}], got {tensor.dtype} {list(tensor.shape)}")
                by_step[step][layer] = tensor
            for step, found in sorted(by_step.items()):
                if set(found) != set(layers):
                    notes.append(f"{file.name}: iteration {step} lacks layers {sorted(set(layers) - set(found))}: dropped")
                elif len({len(ids) for ids in found.values()}) > 1:
                    raise TraceError(f"{file}: iteration {step} has different numbers of tokens in different layers; the file is damaged")
                else:
                    ids = np.stack([found[layer] for layer in layers], axis=1)
                    yield Chunk(experts_TRK=ids, rank=rank, columns={"step": step})

    return Routing(source=source, chunks=chunks, rows=layers, width=width, experts=experts, notes=notes)


def read_loads(source: Path, model: ModelSpec | None) -> Loads:
    """Counts summed over ranks and iterations."""
    experts, _ = _meta(source)
    total: dict[int, NDArray[np.int64]] = defaultdict(lambda: np.zeros(experts, np.int64))
    ranks = _ranks(source, raw=False)
    if not ranks:
        raise TraceError(f"{source}: holds no rank<r>.safetensors; give the folder named by EXPERT_STATISTIC_PATH")
    for file in ranks.values():
        for (step, layer), tensor in _keys(file).items():
            if tensor.shape != (experts,) or tensor.dtype.kind not in "iu" or (tensor.astype(np.int64) < 0).any():
                raise TraceError(f"{file}: {step}_{layer} must be {experts} counts >= 0, got {tensor.dtype} {list(tensor.shape)}")
            total[layer] += tensor.astype(np.int64)
    layers = tuple(sorted(total))
    load = np.stack([total[layer] for layer in layers]) if layers else np.zeros((0, experts), np.int64)
    if not load.any():
        raise DoesNotFit(f"{source}: counted nothing; record again while requests run")
    notes = (f"summed over {len(ranks)} ranks",)
    return loads_of(load, layers, place=str(source), source=f"TensorRT-LLM statistics, {source.name}", model=model, notes=notes)


def _meta(source: Path) -> tuple[int, int]:
    if not source.is_dir():
        raise TraceError(f"{source}: not a folder; give the one named by EXPERT_STATISTIC_PATH")
    file = source / "meta_info.json"
    meta = read_json(file, TraceError)
    if not isinstance(meta, dict) or not {"num_experts", "num_experts_per_token"} <= set(meta):
        raise TraceError(f"{file}: lacks num_experts or num_experts_per_token; rank 0 writes it when recording ends")
    experts, width = (integer(meta[key], str(file), key) for key in ("num_experts", "num_experts_per_token"))
    if not 1 <= width <= experts <= 65535:
        raise TraceError(f"{file}: {experts} experts with {width} per token is no model; the file is damaged")
    return experts, width


def _ranks(source: Path, *, raw: bool) -> dict[int, Path]:
    found = ((match, file) for file in source.iterdir() if (match := _FILE.fullmatch(file.name)))
    return dict(sorted((int(match[1]), file) for match, file in found if bool(match[2]) == raw))


def _keys(file: Path) -> dict[tuple[int, int], NDArray[np.integer]]:
    keyed = {}
    for name, tensor in safetensors(file).items():
        match = _KEY.fullmatch(name)
        if not match:
            raise TraceError(f"{file}: tensor {name!r}; expected keys <iteration>_<layer>")
        keyed[int(match[1]), int(match[2])] = tensor
    return keyed
