"""Megatron-Core router traces (`--moe-routing-trace-path`): JSON lines, one file per rank, one record per step and layer.

Sidecar `.bin` files (logits, hidden states) are not read. Source: megatron/core router tracer of NVIDIA/Megatron-LM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.interop.opening import integer, json_lines, sources, table
from moesim.interop.routing import Chunk, Routing
from moesim.model import ModelSpec

NEEDED = ("step", "stage", "block", "layer", "rank", "num_tokens", "topk", "top_indices")
Record = tuple[int, int, int, NDArray[Any]]  # step, layer, rank, ids_TK


def read_megatron(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """Tokens of one rank's file, or of a folder of them.

    A layer that comes back within one step starts the next microbatch. Records of multi-token-prediction layers and of
    further stages of one router call, microbatches that activation recomputation ran twice, and microbatches cut short by
    the end of the recording, are dropped and counted.
    Raises TraceError when ranks hold different layers: nothing in the files says which pipeline stages saw one token.
    """
    files = sources(source, "*.jsonl")
    layers, width = _shape(files)
    notes: list[str] = []

    def chunks() -> Iterator[Chunk]:
        for file in files:
            skipped: dict[str, int] = defaultdict(int)
            for step, group in groupby(_records(file, width, skipped), key=lambda record: record[0]):
                for microbatch, rank, found in _microbatches(list(group), file, skipped):
                    if set(found) != set(layers):
                        skipped["records of microbatches that lack layers (the recording was cut)"] += len(found)
                        continue
                    ids = np.stack([found[layer] for layer in layers], axis=1)
                    yield Chunk(experts_TRK=ids, rank=rank, columns={"step": step, "microbatch": microbatch, "position": np.arange(len(ids))})
            notes.extend(f"{file.name}: dropped {count:,} {what}" for what, count in skipped.items())

    return Routing(source=source, chunks=chunks, rows=layers, width=width, notes=notes)


def _shape(files: list[Path]) -> tuple[tuple[int, ...], int]:
    """MoE layers and selections per token, the same in every file."""
    shapes = {}
    for file in files:
        layers: set[int] = set()
        width = 0
        for _, layer, _, ids in _records(file, None, defaultdict(int)):
            layers.add(layer)
            width = ids.shape[1]
        if layers:
            shapes[file] = (tuple(sorted(layers)), width)
    if not shapes:
        raise TraceError(f"{files[0]}: no record of a decoder layer; was the tracer on? It skips CUDA graphs: record with --cuda-graph-impl none")
    first, shape = next(iter(shapes.items()))
    for file, other in shapes.items():
        if other != shape:
            raise TraceError(
                f"{file}: layers {list(other[0])} top-{other[1]}, but {first.name} has {list(shape[0])} top-{shape[1]}: these are pipeline "
                "stages, and the files do not say which ranks saw the same tokens; record without pipeline parallelism, or capture with moesim"
            )
    return shape


def _records(file: Path, width: int | None, skipped: dict[str, int]) -> Iterator[Record]:
    stage: Any = None
    for place, record in json_lines(file, NEEDED):
        if record["block"] == "mtp" or record.get("mtp_idx") is not None:
            skipped["records of multi-token-prediction layers"] += 1
            continue
        stage = record["stage"] if stage is None else stage
        if record["stage"] != stage:
            skipped[f"records of stages other than {stage!r}"] += 1
            continue
        step, layer, rank, tokens, k = (integer(record[key], place, key) for key in ("step", "layer", "rank", "num_tokens", "topk"))
        ids = table(record["top_indices"], place, "top_indices", columns=k)
        if len(ids) != tokens:
            raise TraceError(f"{place}: num_tokens is {tokens}, top_indices has {len(ids)} rows; the record is damaged")
        if width is not None and k != width:
            raise TraceError(f"{place}: topk is {k}, other records have {width}; one trace is of one model")
        yield step, layer, rank, ids


def _microbatches(records: list[Record], file: Path, skipped: dict[str, int]) -> Iterator[tuple[int, int, dict[int, NDArray[Any]]]]:
    seen: dict[tuple[int, int], int] = defaultdict(int)
    found: dict[tuple[int, int], dict[int, NDArray[Any]]] = defaultdict(dict)
    for _, layer, rank, ids in records:
        microbatch = seen[rank, layer]
        seen[rank, layer] += 1
        found[microbatch, rank][layer] = ids
    routed: set[tuple[int, bytes]] = set()
    for (microbatch, rank), layers in sorted(found.items(), key=lambda item: item[0]):
        content = (rank, b"".join(layers[layer].tobytes() for layer in sorted(layers)))
        if content in routed and len(content[1]):
            skipped["records of microbatches routed exactly like an earlier one of their step (activation recomputation)"] += len(layers)
            continue
        routed.add(content)
        if len({len(ids) for ids in layers.values()}) > 1:
            counts = {layer: len(ids) for layer, ids in sorted(layers.items())}
            raise TraceError(f"{file}: step {records[0][0]}, microbatch {microbatch}: layers have different numbers of tokens {counts}; damaged")
        yield microbatch, rank, layers
