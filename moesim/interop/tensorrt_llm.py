"""TensorRT-LLM `moe_load_balancer.yaml`, written and read in its fixed form only; no YAML library, nothing is constructed.

    initial_global_assignments:
      3: [138, 81, 60, 69]
    num_slots: 4
    layer_updates_per_iter: 0

Source: MoeLoadBalancerConfig of NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError
from moesim.files import read_text, write_text
from moesim.interop.layout import MAX_SLOTS, Engine, Finding, Layout

_TOP = re.compile(r"(\w+):(?:\s+(\S.*))?")
_LAYER = re.compile(r"(\s+)(\S+?):(?:\s+(.*))?")
_ITEM = re.compile(r"\s*-\s+(\S+)")
SCALARS = ("num_slots", "layer_updates_per_iter")
TABLE = "initial_global_assignments"


def read(path: Path) -> Layout:
    """Rows by absolute layer; PlanError names the line that is not of the fixed form (lists may be in flow or block style)."""
    scalars: dict[str, int] = {}
    layers: dict[int, list[int]] = {}
    row: list[int] | None = None
    flow, inside = "", False
    for number, raw in enumerate(read_text(path, PlanError).splitlines(), 1):
        line, place = raw.split("#")[0].rstrip(), f"{path}:{number}"
        if not line.strip() or line == "---":
            continue
        if flow:
            flow += " " + line.strip()
        elif inside and row is not None and (item := _ITEM.fullmatch(line)):
            row.append(_whole(item[1], place))
            continue
        elif inside and (entry := _LAYER.fullmatch(line)):
            row, flow = layers.setdefault(_layer(entry[2], layers, place), []), entry[3] or ""
        elif top := _TOP.fullmatch(line):
            inside = top[1] == TABLE
            if not inside and top[1] not in SCALARS:
                raise PlanError(f"{place}: unknown key {top[1]!r}; known: {TABLE}, {', '.join(SCALARS)}")
            if not inside:
                scalars[top[1]] = _whole(top[2] or "", place)
            elif top[2] not in (None, "{}"):
                raise PlanError(f"{place}: {TABLE} must be one line per layer, got {top[2][:40]!r}")
            continue
        else:
            raise PlanError(f"{place}: {line.strip()[:60]!r} is not of the form `<layer>: [expert, …]` or `key: number`")
        if flow.endswith("]") and row is not None:
            if not flow.startswith("["):
                raise PlanError(f"{place}: expected a list in brackets, got {flow[:40]!r}")
            row += [_whole(cell.strip(), place) for cell in flow[1:-1].split(",")]
            flow = ""
        elif flow and (not flow.startswith("[") or len(flow) > 16 * MAX_SLOTS):
            raise PlanError(f"{place}: expected a list in brackets, got {flow[:40]!r}")
    if flow or not layers or "num_slots" not in scalars or not all(layers.values()):
        raise PlanError(f"{path}: incomplete: needs {TABLE} with a closed, non-empty list per layer, and num_slots; the file was cut short")
    names = tuple(sorted(layers))
    wrong = [name for name in names if len(layers[name]) != scalars["num_slots"]]
    findings = [
        Finding(
            level="fail",
            check="slots",
            message=f"layer {wrong[0]} lists {len(layers[wrong[0]])} slots, num_slots is {scalars['num_slots']}",
            remedy="make them equal in every layer",
        )
    ] if wrong else []  # fmt: skip
    if scalars.get("layer_updates_per_iter", 0):
        findings.append(
            Finding(
                level="warn",
                check="static",
                message=f"layer_updates_per_iter is {scalars['layer_updates_per_iter']}: the engine replaces this placement while it runs",
                remedy="set it to 0 to keep it",
            )
        )
    return Layout(names=names, rows=tuple(tuple(layers[name]) for name in names), findings=tuple(findings))


def _whole(text: str, place: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise PlanError(f"{place}: expected a whole number, got {text[:40]!r}")
    return int(text)


def _layer(text: str, known: dict[int, list[int]], place: str) -> int:
    if not text.isdigit():
        raise PlanError(f"{place}: layer {text[:40]!r} must be a plain integer, not a string: TensorRT-LLM looks layers up by number")
    if (layer := _whole(text, place)) in known:
        raise PlanError(f"{place}: layer {layer} is there twice; keep one")
    return layer


def write(path: Path, names: tuple[int, ...], slots_RP: NDArray[np.int32], experts: int, devices: int) -> None:
    """One line per layer, absolute indices."""
    rows = "".join(f"  {name}: {row}\n" for name, row in zip(names, slots_RP.tolist(), strict=True))
    write_text(path, f"{TABLE}:\n{rows}num_slots: {slots_RP.shape[1]}\nlayer_updates_per_iter: 0\n")


def launch(path: Path, redundant: int, devices: int, rule: str) -> tuple[str, ...]:
    """What the LLM API options file must say."""
    return (
        f"in the extra LLM API options: enable_attention_dp: true, moe_expert_parallel_size: {devices}, moe_config: {{load_balancer: {path}}}",
        "the file is ignored without a word unless the architecture supports it, expert parallelism is above 1 and attention DP is on",
    )


ENGINE = Engine(
    name="tensorrt-llm",
    title="TensorRT-LLM moe_load_balancer YAML",
    keys="absolute",
    draft=True,
    rules={"even": ""},
    default="even",
    read=read,
    write=write,
    launch=launch,
    preconditions=(
        "TensorRT-LLM ignores the file silently unless the architecture is on its list, EP > 1 and enable_attention_dp is on "
        "(#12607, #13386, #18626)",
        "TensorRT-LLM looks up the multi-token-prediction layer behind the last decoder layer and raises KeyError without it (#13974): "
        "export with --draft-layers 1 if it runs",
    ),
)
