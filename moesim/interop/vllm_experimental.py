"""vLLM's placement JSON lines of open pull request #41141: unmerged, may change. Exported under `vllm-experimental` only.

`eplb_initial_mapping` records hold a placement by MoE-local layer, `eplb_load_stats` records physical loads with their map.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError, TraceError
from moesim.files import write_text
from moesim.interop.layout import Engine, Finding, Layout, expert_row, only_keys
from moesim.interop.loads import Loads, OnlyCounts, counts, loads_of
from moesim.interop.opening import integer, json_lines
from moesim.model import ModelSpec

PULL_REQUEST = "https://github.com/vllm-project/vllm/pull/41141"
MAPPING, STATS = "eplb_initial_mapping", "eplb_load_stats"
_KEYS = ("record_type", "version", "num_redundant_experts", "num_slots", "initial_global_assignments")


def _records(path: Path, wanted: str) -> tuple[list[tuple[str, dict[str, Any]]], set[str]]:
    found, kinds = [], set()
    for place, record in json_lines(path, ("record_type", "version")):
        kinds.add(str(record["record_type"]))
        if record["version"] != 1:
            raise TraceError(f"{place}: version {record['version']!r}; this moesim reads version 1 of {PULL_REQUEST}")
        if record["record_type"] == wanted:
            found.append((place, record))
    return found, kinds


def read(path: Path) -> Layout:
    """Rows of the file's mapping; PlanError unless there is exactly one."""
    try:
        found, kinds = _records(path, MAPPING)
    except TraceError as problem:
        raise PlanError(str(problem)) from None
    if not found and STATS in kinds:
        raise OnlyCounts(path, f"give a file with an {MAPPING} record")
    if len(found) != 1:
        raise PlanError(f"{path}: holds {len(found)} records {MAPPING}, expected one; record types here: {sorted(kinds)}")
    place, record = found[0]
    data = only_keys(record, _KEYS, place)
    table = data["initial_global_assignments"]
    if not isinstance(table, dict) or set(table) != {str(layer) for layer in range(len(table))} or not table:
        keys = sorted(table)[:8] if isinstance(table, dict) else type(table).__name__
        raise PlanError(f'{place}: initial_global_assignments must have keys "0", "1", … for the MoE layers in order, got {keys}')
    rows = tuple(expert_row(table[str(layer)], f"{place}: initial_global_assignments.{layer}") for layer in range(len(table)))
    slots, redundant = (integer(data[key], place, key, PlanError) for key in ("num_slots", "num_redundant_experts"))
    wrong = [layer for layer, row in enumerate(rows) if len(row) != slots]
    message = f"layer {wrong[0]} lists {len(rows[wrong[0]])} slots, num_slots is {slots}" if wrong else ""
    findings = (Finding(level="fail", check="slots", message=message, remedy="make them equal in every layer"),) if wrong else ()
    return Layout(names=tuple(range(len(rows))), rows=rows, redundant=redundant, findings=findings)


def write(path: Path, names: tuple[int, ...], slots_RP: NDArray[np.int32], experts: int, devices: int) -> None:
    """One record."""
    slots = slots_RP.shape[1]
    assignments = {str(name): row for name, row in zip(names, slots_RP.tolist(), strict=True)}
    write_text(path, json.dumps(dict(zip(_KEYS, (MAPPING, 1, slots - experts, slots, assignments), strict=True))) + "\n")


def launch(path: Path, redundant: int, devices: int, rule: str) -> tuple[str, ...]:
    """Flags of the pull request's branch."""
    config = json.dumps({"num_redundant_experts": redundant, "initial_mapping_path": str(path), "disable_online_rebalancing": True})
    return (f"--enable-expert-parallel --enable-eplb --eplb-config '{config}' with {devices} expert-parallel ranks",)


def read_loads(path: Path, model: ModelSpec | None) -> Loads:
    """`expert_load` [L, P] of every record, mapped to logical experts by the record's own `p2l_map`, summed."""
    found, kinds = _records(path, STATS)
    if not found:
        raise TraceError(f"{path}: holds no {STATS} record; record types here: {sorted(kinds)}")
    total: NDArray[np.int64] | None = None
    for place, record in found:
        if "expert_load" not in record or "p2l_map" not in record:
            raise TraceError(f"{place}: the record lacks expert_load or p2l_map; physical loads mean nothing without their map")
        physical, where = counts(record["expert_load"], f"{place}: expert_load"), counts(record["p2l_map"], f"{place}: p2l_map")
        if physical.shape != where.shape or where.max() >= where.shape[1]:
            raise TraceError(f"{place}: expert_load {list(physical.shape)} and p2l_map {list(where.shape)} (ids up to {where.max()}) do not fit")
        load = np.zeros((len(where), int(where.max()) + 1), np.int64)
        np.add.at(load, (np.arange(len(where))[:, None], where), physical)
        if total is not None and total.shape != load.shape:
            raise TraceError(f"{place}: {list(load.shape)} layers and experts, records before it {list(total.shape)}; keep runs apart")
        total = load if total is None else total + load
    assert total is not None
    return loads_of(
        total, len(total), place=str(path), source=f"vLLM load statistics, {path.name}", model=model, notes=(f"summed over {len(found)} records",)
    )


ENGINE = Engine(
    name="vllm-experimental",
    title="vLLM initial mapping of pull request #41141 (experimental, unmerged)",
    keys="moe",
    draft=False,
    rules={"even": ""},
    default="even",
    read=read,
    write=write,
    launch=launch,
    preconditions=(
        f"vLLM: the file is read by the unmerged {PULL_REQUEST} only; released versions have no static import",
        "vLLM: without disable_online_rebalancing the engine replaces the mapping after step_interval steps",
        "vLLM: use_async works with policy default only, and not with the torch_nccl and pynccl communicators",
    ),
)
