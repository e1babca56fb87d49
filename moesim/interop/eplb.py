"""EPLB's tensors as .npz (or .safetensors to read): `phy2log` [L, P], `log2phy` [L, E, X] padded with -1, `logcnt` [L, E].

`weight` [L, E] alone is its input: loads. Source: deepseek-ai/EPLB @d52c72d.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError, TraceError
from moesim.interop.layout import MAX_SLOTS, Engine, Finding, Layout
from moesim.interop.loads import Loads, OnlyCounts, counts, loads_of
from moesim.interop.opening import numpy_arrays, safetensors
from moesim.model import ModelSpec

NAMES = ("phy2log", "log2phy", "logcnt", "weight")


def read(path: Path) -> Layout:
    """Rows of `phy2log`; the other tensors, where given, must be its inverse and its counts."""
    arrays = _arrays(path, PlanError)
    if "phy2log" not in arrays:
        if "weight" in arrays:
            raise OnlyCounts(path, "run EPLB on the weights and save phy2log")
        raise PlanError(f"{path}: no array 'phy2log' [layers, slots]; found {sorted(arrays)}")
    slots = arrays["phy2log"]
    if slots.ndim != 2 or slots.dtype.kind not in "iu" or 0 in slots.shape or slots.shape[1] > MAX_SLOTS:
        raise PlanError(f"{path}: phy2log must be whole numbers [layers, slots], got {slots.dtype} {list(slots.shape)}")
    return Layout(names=tuple(range(len(slots))), rows=tuple(map(tuple, slots.tolist())), findings=_inverse(slots.astype(np.int64), arrays))


def _inverse(slots_LP: NDArray[np.int64], arrays: Mapping[str, NDArray[Any]]) -> tuple[Finding, ...]:
    """log2phy and logcnt against phy2log: a map that was applied twice, or the wrong way round, shows here."""
    experts = int(slots_LP.max()) + 1
    if slots_LP.min() < 0 or experts > slots_LP.shape[1]:
        return ()  # ids out of range: found by the common checks, with layer and slot
    wrong = []
    if (back := arrays.get("log2phy")) is not None and not _is_inverse(back, slots_LP, experts):
        wrong.append("log2phy")
    if (count := arrays.get("logcnt")) is not None:
        true = np.stack([np.bincount(row, minlength=experts) for row in slots_LP])
        if count.shape != true.shape or (count != true).any():
            wrong.append("logcnt")
    remedy = "save the three tensors of one call; a map applied twice, or the wrong way round, gives wrong outputs"
    return tuple(Finding(level="fail", check="mapping", message=f"{name} is not the inverse of phy2log", remedy=remedy) for name in wrong)


def _is_inverse(back_LEX: NDArray[Any], slots_LP: NDArray[np.int64], experts: int) -> bool:
    layers, slots = np.arange(len(slots_LP)), slots_LP.shape[1]
    if back_LEX.ndim != 3 or back_LEX.dtype.kind not in "iu" or back_LEX.shape[:2] != (len(layers), experts):
        return False
    if (back_LEX < -1).any() or (back_LEX >= slots).any() or back_LEX.shape[2] < 1:
        return False
    holds = slots_LP[layers[:, None, None], np.maximum(back_LEX, 0)] == np.arange(experts)[:, None]
    listed = np.sort(back_LEX.reshape(len(layers), -1), axis=1)[:, -slots:]
    return bool((holds | (back_LEX < 0)).all()) and np.array_equal(listed, np.broadcast_to(np.arange(slots), (len(layers), slots)))


def _arrays(path: Path, error: type[PlanError] | type[TraceError]) -> Mapping[str, NDArray[Any]]:
    try:
        return safetensors(path) if path.suffix == ".safetensors" else numpy_arrays(path, NAMES)
    except TraceError as problem:
        raise error(str(problem)) from None


def write(path: Path, names: tuple[int, ...], slots_RP: NDArray[np.int32], experts: int, devices: int) -> None:
    """The three tensors, slots of an expert in rising order."""
    layers = len(slots_RP)
    order = np.argsort(slots_RP, axis=1, kind="stable")
    count = np.stack([np.bincount(row, minlength=experts) for row in slots_RP])
    back = np.full((layers, experts, int(count.max())), -1, np.int64)
    for layer in range(layers):
        starts = np.cumsum(count[layer]) - count[layer]
        expert = slots_RP[layer, order[layer]]
        back[layer, expert, np.arange(len(expert)) - starts[expert]] = order[layer]
    _save(path, phy2log=slots_RP.astype(np.int64), log2phy=back, logcnt=count.astype(np.int64))


def _save(path: Path, **arrays: NDArray[Any]) -> None:
    temporary = path.parent / f".{path.name}.{os.getpid()}.npz"
    try:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_loads(path: Path, model: ModelSpec | None) -> Loads:
    """`weight` [L, E], EPLB's input, where it holds counts."""
    arrays = _arrays(path, TraceError)
    if "weight" not in arrays:
        raise TraceError(f"{path}: no array 'weight' [layers, experts]; found {sorted(arrays)}")
    load = counts(arrays["weight"], f"{path}: weight")
    return loads_of(load, len(load), place=str(path), source=f"EPLB weight, {path.name}", model=model)


def write_loads(path: Path, loads: Loads, layers: int) -> None:
    """`weight` [L, E] of the MoE layers."""
    _save(path, weight=loads.load_LE)


def launch(path: Path, redundant: int, devices: int, rule: str) -> tuple[str, ...]:
    """No engine loads the file by itself."""
    return (f"slot j lives on rank j // (P / {devices}); {redundant} slots are redundant",)


ENGINE = Engine(
    name="eplb",
    title="EPLB tensors phy2log, log2phy, logcnt (.npz)",
    keys="moe",
    draft=False,
    rules={"even": "", "static-source": "", "nearest": ""},
    default=None,
    read=read,
    write=write,
    launch=launch,
    preconditions=(),
)
