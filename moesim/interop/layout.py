"""What a placement file says, before it is held against a model; and how each engine reads and writes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError

MAX_SLOTS = 1 << 20  # of one layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing `check` looked at. level: ok, remark, warn or fail."""

    level: str
    check: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Rows of a placement file as they stand there: they may be ragged, name experts that do not exist, or lack some.

    names      layer of each row, counted as `Engine.keys` says
    rows       logical expert of each slot
    devices    where the file names them
    redundant  slots beyond one per expert where the file states them
    findings   what the format's own reader found to contradict itself
    """

    names: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    devices: int | None = None
    redundant: int | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A placement format and the engine that reads it.

    keys     `decoder` (row i is decoder layer i, dense ones included), `moe` (row i is the i-th MoE layer) or
             `absolute` (rows carry the layer's index)
    draft    whether rows for draft layers behind the last decoder layer may be written
    rules    dispatch rules the engine can run, with the words that choose each
    default  the rule it runs unless told otherwise; None where no engine loads the file
    launch   what to pass to the engine: (file, redundant, devices, rule) -> lines
    """

    name: str
    title: str
    keys: str
    draft: bool
    rules: Mapping[str, str]
    default: str | None
    read: Callable[[Path], Layout]
    write: Callable[[Path, tuple[int, ...], NDArray[np.int32], int, int], None]  # path, names, slots_RP, experts, devices
    launch: Callable[[Path, int, int, str], tuple[str, ...]]
    preconditions: tuple[str, ...]


def expert_row(values: Any, place: str) -> tuple[int, ...]:
    """One row of whole numbers; PlanError names the entry that is none."""
    if not isinstance(values, list) or not values or len(values) > MAX_SLOTS:
        size = len(values) if isinstance(values, list) else type(values).__name__
        raise PlanError(f"{place}: expected a list of 1 to {MAX_SLOTS:,} expert ids, got {size}")
    for index, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
            raise PlanError(f"{place}[{index}]: expected an expert id, got {str(value)[:30]!r}")
    return tuple(values)


def default_row(experts: int, slots: int) -> NDArray[np.int32]:
    """The map engines start with: slot i holds expert i modulo experts."""
    return (np.arange(slots) % experts).astype(np.int32)


def only_keys(data: Any, keys: tuple[str, ...], place: str) -> dict[str, Any]:
    """`data` as an object with exactly `keys`; PlanError names what is missing or unknown."""
    if not isinstance(data, dict):
        raise PlanError(f"{place}: expected a JSON object, got {type(data).__name__}")
    if missing := [key for key in keys if key not in data]:
        raise PlanError(f"{place}: lacks {', '.join(missing)}; found {sorted(data)}")
    if unknown := sorted(set(data) - set(keys)):
        raise PlanError(f"{place}: unknown keys {unknown}; the engine passes them on and fails: remove them")
    return data
