"""Loads: how often each expert was chosen, and nothing else.

Counts cannot become a trace: which experts a token chose *together*, and in what order, is gone, and moesim invents no
tokens. They are kept as loads, which is all that `eplb` (`rebalance_experts(load_LE, …)`), a check of a placement's
balance, and an engine that balances by itself need; co-activation, traffic and caching cannot be computed from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.files import check_output, read_json, write_json
from moesim.interop.routing import DoesNotFit, pick_rows
from moesim.model import ModelSpec

SCHEMA_VERSION = 1


class OnlyCounts(DoesNotFit):
    """The file holds counts where tokens are needed."""

    def __init__(self, place: Path, remedy: str) -> None:
        super().__init__(
            f"{place}: holds counts per expert and no tokens, so it cannot become a trace: which experts a token chose together is gone. "
            "Add --as-loads to keep the counts as a loads file (enough for eplb, a check of a placement's balance and engines that balance by "
            f"themselves; not for traffic, co-activation or caching), or {remedy}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Loads:
    """load_LE int64, selections of each expert; `layers` absolute indices of the MoE layers; tokens where known."""

    load_LE: NDArray[np.int64]
    layers: tuple[int, ...]
    tokens: int | None
    source: str
    notes: tuple[str, ...] = ()

    @property
    def experts(self) -> int:
        """Experts per layer, E."""
        return int(self.load_LE.shape[1])

    def save(self, path: Path, *, force: bool = False) -> Path:
        """Write as JSON; OutputExists unless `force`."""
        write_json(
            check_output(path, force=force),
            {
                "schema_version": SCHEMA_VERSION,
                "kind": "loads",
                "experts": self.experts,
                "moe_layers": list(self.layers),
                "tokens": self.tokens,
                "source": self.source,
                "notes": list(self.notes),
                "load": self.load_LE.tolist(),
            },
        )
        return path


def load_loads(path: str | Path) -> Loads:
    """Read a loads file; TraceError names what is wrong in it."""
    file = Path(path)
    data = read_json(file, TraceError)
    if not isinstance(data, dict) or data.get("kind") != "loads" or data.get("schema_version") != SCHEMA_VERSION:
        raise TraceError(f"{file}: not a loads file of version {SCHEMA_VERSION}; write one with `moesim import FORMAT SRC --as-loads`")
    try:
        load = counts(data["load"], str(file))
        layers = tuple(int(layer) for layer in data["moe_layers"])
        tokens, notes = data["tokens"], tuple(str(note) for note in data["notes"])
        source = str(data["source"])
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise TraceError(f"{file}: damaged loads file: {problem}") from None
    if load.shape != (len(layers), data.get("experts")):
        raise TraceError(f"{file}: load is {list(load.shape)}, but the file states {len(layers)} layers x {data.get('experts')} experts")
    return Loads(load_LE=load, layers=layers, tokens=tokens, source=source, notes=notes)


def counts(values: Any, place: str, *, dimensions: int = 2) -> NDArray[np.int64]:
    """`values` as whole counts >= 0 (floats that are whole are accepted); TraceError names the shape or the value."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        array = np.zeros((), object)
    if array.ndim != dimensions or array.dtype.kind not in "iuf" or 0 in array.shape:
        raise TraceError(f"{place}: expected counts of rank {dimensions} with one row per layer, got {array.dtype} {list(array.shape)}")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.floor(array)) & (np.abs(array) < 2**53)).all():
        raise TraceError(f"{place}: counts must be whole numbers, found NaN, infinity or fractions; give the raw counts")
    if (array < 0).any() or array.max() > 2**62:
        raise TraceError(f"{place}: count {array.min()}..{array.max()} is out of range; counts are >= 0")
    return np.ascontiguousarray(array.astype(np.int64))


def loads_of(
    load_RE: NDArray[np.int64],
    rows: tuple[int, ...] | int,
    *,
    place: str,
    source: str,
    model: ModelSpec | None,
    tokens: int | None = None,
    notes: tuple[str, ...] = (),
) -> Loads:
    """Loads of the model's MoE layers, or of every row with a count when no model is given.

    Raises DoesNotFit when experts or layers contradict the model, or a MoE layer counted nothing.
    """
    if model is None:
        names = tuple(range(rows)) if isinstance(rows, int) else rows
        keep = [index for index, total in enumerate(load_RE.sum(axis=1).tolist()) if total]
        if not keep:
            raise DoesNotFit(f"{place}: every count is 0; record again while requests run")
        layers = tuple(names[index] for index in keep)
        remarks = [f"no --model: took the {len(keep)} layers with counts as the MoE layers"]
    else:
        if load_RE.shape[1] != model.experts:
            raise DoesNotFit(
                f"{place}: counts of {load_RE.shape[1]} experts, {model.name!r} has {model.experts}; give the right --model, "
                "or the counts are of physical slots: they need the map that was live when they were taken"
            )
        keep, remarks = pick_rows(rows, model, place)
        layers = model.moe_layers
        if silent := [layer for layer, index in zip(layers, keep, strict=True) if not load_RE[index].any()]:
            raise DoesNotFit(f"{place}: MoE layers {silent} of {model.name!r} counted nothing; record again, or give the right --model")
    dropped = int(load_RE.sum()) - int(load_RE[keep].sum())
    if dropped:
        remarks.append(f"{dropped:,} counts of rows that are no MoE layer of the model were dropped")
    return Loads(load_LE=load_RE[keep], layers=layers, tokens=tokens, source=source, notes=(*notes, *remarks))
