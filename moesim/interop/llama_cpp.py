"""Expert counts of the llama.cpp family: CSV `layer,expert,count` (optional line `# total,<T>`), or `layer_id,expert_ids`
with space-separated ids, counted one by one.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from moesim.errors import TraceError
from moesim.interop.loads import Loads, loads_of
from moesim.interop.opening import lines
from moesim.model import ModelSpec

HEADERS = {"layer,expert,count": 3, "layer_id,expert_ids": 2}
MAX_LAYER, MAX_ID = 1023, 65534


def read_counts(source: Path, model: ModelSpec | None) -> Loads:
    """Loads of the file; TraceError names the line that is not of the format. Counts hold no co-activation."""
    counted: Counter[tuple[int, int]] = Counter()
    columns, tokens, last = 0, None, 0
    for number, text in lines(source):
        place, cells = f"{source}:{number}", [cell.strip() for cell in text.split(",")]
        if cells[0].startswith("#"):
            if cells[0].lstrip("# ") == "total" and len(cells) == 2:
                tokens = _whole(cells[1], place, 2**62)
            continue
        if not columns:
            columns = HEADERS.get(",".join(cells), 0)
            if not columns:
                raise TraceError(f"{place}: header {text[:60]!r}; expected {' or '.join(HEADERS)}")
            continue
        if len(cells) != columns:
            raise TraceError(f"{place}: {len(cells)} columns, expected {columns}; the file was cut short or is something else")
        layer = _whole(cells[0], place, MAX_LAYER)
        if columns == 3:
            counted[layer, _whole(cells[1], place, MAX_ID)] += _whole(cells[2], place, 2**62)
        else:
            counted.update((layer, _whole(cell, place, MAX_ID)) for cell in cells[1].split())
        last = number
    if not last:
        raise TraceError(f"{source}: holds no counts; check the path")
    layers = tuple(sorted({layer for layer, _ in counted}))
    experts = max(max(expert for _, expert in counted) + 1, model.experts if model else 0)
    load = np.zeros((len(layers), experts), np.int64)
    for (layer, expert), count in counted.items():
        load[layers.index(layer), expert] += count
    return loads_of(load, layers, place=str(source), source=f"expert counts, {source.name}", model=model, tokens=tokens)


def _whole(text: str, place: str, most: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text[:20]) > most:
        raise TraceError(f"{place}: {text[:30]!r} is no whole number within 0..{most}")
    return int(text)
