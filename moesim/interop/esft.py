"""ESFT expert logs: one text file per layer, `expert_weights_<layer>.txt`; one line per sequence,
`id⇥id⇥…⇥⇥weight⇥weight⇥…` with K ids and K weights for every token in turn. Source: deepseek-ai/ESFT @579a771.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.interop.opening import lines, sources
from moesim.interop.routing import Chunk, Routing
from moesim.model import ModelSpec

_LAYER = re.compile(r".*_(\d+)\.txt")


def read_esft(source: Path, model: ModelSpec | None, phase: str) -> Routing:
    """Tokens of a folder of layers, read line by line over all files at once.

    Needs the model: the lines do not say how many ids belong to one token. Raises TraceError naming file and line.
    """
    if model is None:
        raise TraceError(f"{source}: the lines do not say how many ids belong to one token; give --model")
    files = {int(match[1]): file for file in sources(source, "*_*.txt") if (match := _LAYER.fullmatch(file.name))}
    if not files:
        raise TraceError(f"{source}: not named expert_weights_<layer>.txt; give the folder that holds one file per layer")
    layers, width = tuple(sorted(files)), model.top_k

    def chunks() -> Iterator[Chunk]:
        readers = [_sequences(files[layer], width) for layer in layers]
        try:
            for sequence, parts in enumerate(zip(*readers, strict=True)):
                if len({len(ids) for ids, _ in parts}) > 1:
                    counts = {files[layer].name: len(part[0]) for layer, part in zip(layers, parts, strict=True)}
                    raise TraceError(f"{source}: line {sequence + 1} has different numbers of tokens in different layers: {counts}")
                ids, weights = (np.stack(arrays, axis=1) for arrays in zip(*parts, strict=True))
                yield Chunk(experts_TRK=ids, weights_TRK=weights, columns={"sequence": sequence, "position": np.arange(len(ids))})
        except ValueError as problem:
            if "zip()" not in str(problem):
                raise
            raise TraceError(f"{source}: layers have different numbers of lines; one of the files was cut short") from None

    return Routing(source=source, chunks=chunks, rows=layers, width=width, weights=True, notes=["selections are in file order, not sorted by weight"])


def _sequences(file: Path, width: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    for number, text in lines(file):
        left, _, right = text.partition("\t\t")
        try:
            ids, weights = np.asarray(left.split("\t"), np.int64), np.asarray(right.split("\t"), np.float64)
        except (ValueError, OverflowError) as problem:
            raise TraceError(f"{file}:{number}: expected ids, an empty column and weights, separated by tabs: {problem}") from None
        if len(ids) != len(weights) or len(ids) % width or not np.isfinite(weights).all():
            what = f"{len(ids)} ids and {len(weights)} weights are not {width} each per token"
            raise TraceError(f"{file}:{number}: {what}; the line was cut short, or is of another --model")
        yield ids.reshape(-1, width), weights.reshape(-1, width)
