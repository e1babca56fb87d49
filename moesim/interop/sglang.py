"""SGLang `--init-expert-location file.json` (or .pt): `{"physical_to_logical_map": [[…]]}`, one row per decoder layer, dense too.

Source: python/sglang/srt/eplb/expert_location.py and server_args.py of sgl-project/sglang.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError
from moesim.files import read_json, write_text
from moesim.interop.layout import Engine, Layout, expert_row, only_keys
from moesim.interop.loads import Loads, OnlyCounts, counts, loads_of
from moesim.interop.torch_files import load_torch
from moesim.model import ModelSpec

KEY = "physical_to_logical_map"


def read(path: Path) -> Layout:
    """Rows of the map; PlanError for any other key, since SGLang takes keys as arguments."""
    data = _content(path)
    if isinstance(data, dict) and "logical_count" in data and KEY not in data:
        raise OnlyCounts(path, "let SGLang balance by these counts itself")
    rows = only_keys(data, (KEY,), str(path))[KEY]
    if not isinstance(rows, list) or not rows:
        raise PlanError(f"{path}: $.{KEY}: expected one row per decoder layer, got {type(rows).__name__}")
    return Layout(names=tuple(range(len(rows))), rows=tuple(expert_row(row, f"{path}: $.{KEY}[{index}]") for index, row in enumerate(rows)))


def _content(path: Path) -> Any:
    """The JSON document, or the dictionary of tensors of a .pt file, as plain lists."""
    if path.suffix != ".pt":
        return read_json(path, PlanError)
    data = load_torch(path)
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in data.items()} if isinstance(data, dict) else data


def write(path: Path, names: tuple[int, ...], slots_RP: NDArray[np.int32], experts: int, devices: int) -> None:
    """One line per decoder layer."""
    rows = ",\n".join(json.dumps(row) for row in slots_RP.tolist())
    write_text(path, f'{{"{KEY}": [\n{rows}\n]}}\n')


def launch(path: Path, redundant: int, devices: int, rule: str) -> tuple[str, ...]:
    """Flags that belong to the file."""
    return (
        f"--init-expert-location {path} --ep-size {devices} --ep-num-redundant-experts {redundant} {ENGINE.rules[rule]}",
        "without --ep-dispatch-algorithm SGLang takes static; with --enable-eplb it replaces this map while it runs",
    )


def read_loads(path: Path, model: ModelSpec | None) -> Loads:
    """The alternative `{"logical_count": [[…]]}` ([L, E] or [steps, L, E]), by which SGLang balances itself."""
    values = only_keys(_content(path), ("logical_count",), str(path))["logical_count"]
    deep = isinstance(values, list) and bool(values) and isinstance(values[0], list) and bool(values[0]) and isinstance(values[0][0], list)
    load = counts(values, str(path), dimensions=3 if deep else 2)
    load = load.sum(axis=0) if deep else load
    return loads_of(load, len(load), place=str(path), source=f"SGLang logical_count, {path.name}", model=model)


def write_loads(path: Path, loads: Loads, layers: int) -> None:
    """`logical_count` with one row per decoder layer, zeros for dense ones."""
    rows = np.zeros((layers, loads.experts), np.int64)
    rows[list(loads.layers)] = loads.load_LE
    write_text(path, '{"logical_count": [\n' + ",\n".join(json.dumps(row) for row in rows.tolist()) + "\n]}\n")


ENGINE = Engine(
    name="sglang",
    title="SGLang --init-expert-location JSON",
    keys="decoder",
    draft=True,
    rules={"static-source": "--ep-dispatch-algorithm static", "even": "--ep-dispatch-algorithm dynamic"},
    default="static-source",
    read=read,
    write=write,
    launch=launch,
    preconditions=(
        "SGLang: P of the map must equal experts + --ep-num-redundant-experts, and P must divide over --ep-size",
        "SGLang: --ep-dispatch-algorithm lp is limited to the DeepSeek-V2 family",
        "SGLang: after a rebalance, ids of the recorder are physical; releases mapped them twice in weights or routing (#18213, #25882)",
    ),
)
