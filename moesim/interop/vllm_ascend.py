"""vllm-ascend `expert_map.json` (static map of Model Runner V1; removal is announced for v0.25.1).

Its loader indexes `layer_list` by position (MoE-local, from 0) and does not read `layer_id`.
Source: vllm_ascend/eplb of vllm-project/vllm-ascend @182b75e.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError
from moesim.files import read_json, write_text
from moesim.interop.layout import Engine, Finding, Layout, expert_row, only_keys


def read(path: Path) -> Layout:
    """Rows by position; PlanError names the path in the file of what is malformed."""
    top = only_keys(read_json(path, PlanError), ("moe_layer_count", "layer_list"), str(path))
    listed = _objects(top["layer_list"], f"{path}: $.layer_list")
    rows, counts, findings = [], set(), []
    for index, layer in enumerate(listed):
        place = f"{path}: $.layer_list[{index}]"
        entry = only_keys(layer, ("layer_id", "device_count", "device_list"), place)
        devices = [
            only_keys(d, ("device_id", "device_expert"), f"{place}.device_list[{g}]") for g, d in enumerate(_objects(entry["device_list"], place))
        ]
        held = [expert_row(d["device_expert"], f"{place}.device_list[{g}].device_expert") for g, d in enumerate(devices)]
        rows.append(tuple(expert for device in held for expert in device))
        counts.add((len(held), entry["device_count"]))
        if entry["layer_id"] != index or [d["device_id"] for d in devices] != list(range(len(devices))):
            message = f"layer_list[{index}] has layer_id {entry['layer_id']!r} or devices out of order; both are read by position"
            findings.append(_fail("order", message))
        if len(sizes := {len(device) for device in held}) > 1:
            findings.append(_fail("slots", f"layer {index}: devices hold {sorted(sizes)} slots; the loader needs the same number on each"))
    if len(counts) > 1 or any(found != stated for found, stated in counts):
        findings.append(_fail("devices", f"(devices listed, device_count) are {sorted(counts)}; every layer needs the same, and both equal"))
    if top["moe_layer_count"] != len(listed):
        findings.append(_fail("layers", f"moe_layer_count is {top['moe_layer_count']}, layer_list holds {len(listed)}"))
    return Layout(names=tuple(range(len(rows))), rows=tuple(rows), devices=next(iter(counts))[0], findings=tuple(findings))


def _fail(check: str, message: str) -> Finding:
    return Finding(level="fail", check=check, message=message, remedy="write the file again, for example with `moesim export vllm-ascend`")


def _objects(values: Any, place: str) -> list[Any]:
    if not isinstance(values, list) or not values or len(values) > 1 << 16:
        raise PlanError(f"{place}: expected a non-empty list, got {type(values).__name__}")
    return values


def write(path: Path, names: tuple[int, ...], slots_RP: NDArray[np.int32], experts: int, devices: int) -> None:
    """Layers and devices by position."""
    layers = [
        {
            "layer_id": name,
            "device_count": devices,
            "device_list": [{"device_id": g, "device_expert": part} for g, part in enumerate(row.reshape(devices, -1).tolist())],
        }
        for name, row in zip(names, slots_RP, strict=True)
    ]
    write_text(path, json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n")


def launch(path: Path, redundant: int, devices: int, rule: str) -> tuple[str, ...]:
    """Configuration that belongs to the file."""
    config = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
    flags = f"--enable-expert-parallel --additional-config '{config}' with {devices} expert-parallel ranks"
    return (f"{flags}; the engine reads R = {redundant} off the file",)


ENGINE = Engine(
    name="vllm-ascend",
    title="vllm-ascend expert_map.json (deprecated upstream)",
    keys="moe",
    draft=False,
    rules={"static-source": ""},
    default="static-source",
    read=read,
    write=write,
    launch=launch,
    preconditions=(
        "vllm-ascend: static maps work in Model Runner V1 only (V2 rejects them); removal is announced for v0.25.1",
        "vllm-ascend: the path must end in .json, and expert parallelism of 1 asserts; no environment variable is needed for a static map, "
        "while recording needs EXPERT_MAP_RECORD=true and dynamic balancing DYNAMIC_EPLB=true",
        "vllm-ascend: a draft layer gets the default map whatever the file says; outputs were wrong after a rebalance in #5529",
    ),
)
