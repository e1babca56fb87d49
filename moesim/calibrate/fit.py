"""Fits tables of measurements and writes a device profile: facts of a known device, parameters of the tables."""

from __future__ import annotations

import datetime
import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from moesim.calibrate import kernel_tables, networks
from moesim.calibrate.kernels import cross_validate, fit_kernel, profile_fragment, split_kernels
from moesim.calibrate.tables import load, nccl_points, shipped_device
from moesim.cost.experts import PARAMETERS
from moesim.cost.fitted import device_peak
from moesim.errors import InputError
from moesim.files import read_toml
from moesim.hardware import Device, device_names, load_device
from moesim.hardware.profile import find

Progress = Callable[[float, str], None]
Tables = dict[str, list[dict[str, Any]]]


def fit_tables(
    paths: Sequence[Path],
    *,
    name: str,
    device_profile: str | None = None,
    gated: bool | None = None,
    date: datetime.date | None = None,
    progress: Progress = lambda share, what: None,
) -> tuple[str, dict[str, Any]]:
    """Profile (TOML) called `name` with everything the tables tell, and a JSON-ready summary of the fits.

    Facts (peaks, memories, power) are those of `device_profile`, by default the shipped device that all tables' columns
    `device` name. Fits of the same kernel and dtype, or collective and op, replace that profile's; its others stay.
    Residuals hold scores on the fitted rows and `held_out_` ones: shapes left out (kernels), every second size (NCCL), one
    exchange (DeepEP). Raises InputError for unreadable tables or an unknown device.
    """
    loaded = [(path, *load(path)) for path in paths]
    device, facts = _base(device_profile, [table for *_, table in loaded])
    today = date or datetime.date.today()
    found: Tables = {"kernels": [], "collectives": []}
    left_out: dict[str, int] = {}
    for index, (path, kind, table) in enumerate(loaded):
        progress(index / len(loaded), path.name)
        if kind == "kernels":
            found["kernels"] += _fit_kernels(path, table, device, gated, today, left_out, partial(progress, index / len(loaded)))
            continue
        if kind == "nccl":
            points, version, skipped = nccl_points(table, place=str(path))
            left_out |= skipped
            found["collectives"] += networks.nccl_tables(points, source=f"{path.name}: nccl-tests, NCCL {version or 'unknown'}", date=today)
        else:
            more = networks.deepep_tables(path, source=f"{path.name}: DeepEP tables", date=today)
            gpus = {shipped_device(gpu) for gpu in table["gpu"]} if "gpu" in table else {None}
            link = next(iter(gpus)).link if len(gpus) == 1 and None not in gpus else "nvlink4-h800"  # type: ignore[union-attr]
            found["collectives"] += [{**each, "link": link} for each in more]
    keys = {"kernels": ("name", "dtype"), "collectives": ("name", "op")}
    for group, parts in keys.items():
        fresh = {tuple(table[part] for part in parts) for table in found[group]}
        kept = [table for table in facts.get(group, []) if tuple(table[part] for part in parts) not in fresh]
        facts[group] = [*kept, *found[group]]
    text = profile_text({**facts, "name": name})
    summary = {
        "facts_of": device.name,
        "fits": [
            {key: table[key] for key in ("name", "dtype", "op") if key in table}
            | {"residuals": dict(table["residuals"]), "valid": dict(table["valid"])}
            for group in found.values()
            for table in group
        ],
        "left_out": left_out,
    }
    return text, summary


def _base(name: str | None, tables: Sequence[pd.DataFrame]) -> tuple[Device, dict[str, Any]]:
    if name is None:
        named = {str(value) for table in tables for column in ("device", "gpu") if column in table for value in table[column].unique()}
        shipped = {device.name for value in named if (device := shipped_device(value))}
        if len(shipped) != 1 or any(shipped_device(value) is None for value in named):
            told = ", ".join(sorted(named)) or "none"
            raise InputError(f"tables name devices {told}, which is not one shipped device; say --device-profile, one of {', '.join(device_names())}")
        name = shipped.pop()
    return load_device(name), read_toml(find("devices", name, device_names()), InputError)


def _fit_kernels(
    path: Path, raw: pd.DataFrame, device: Device, gated: bool | None, date: datetime.date, left_out: dict[str, int], tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    if "gated" not in raw and gated is not None:
        raw = raw.assign(gated=gated)
    table = kernel_tables.check_table(raw, place=str(path))
    known = kernel_tables.with_known_counts(table)
    if len(known) < len(table):
        left_out["token counts unknown (group-limited routing)"] = len(table) - len(known)
    found = []
    for (name, dtype), rows in split_kernels(known).items():
        tell(f"{name} {dtype}")
        peak, _ = device_peak(device, dtype)
        shapes = Counter(kernel_tables.shapes(rows))
        enough = len(rows) - max(shapes.values()) > len(PARAMETERS)  # rows without the shape left out
        held_out = cross_validate(rows, peak)["overall"] if enough else None
        version = str(rows["version"].iloc[0]) if "version" in rows else ""
        framework = str(rows["framework"].iloc[0]) if "framework" in rows else ""
        source = f"{path.name}: {' '.join(part for part in (framework, version) if part) or 'kernel table'}, {len(shapes)} shapes"
        source += "" if held_out else "; too few shapes to leave one out, so not cross-validated"
        text = profile_fragment(
            fit_kernel(rows, peak), framework=framework, version=version, source=source.replace('"', "'"), date=date.isoformat(), held_out=held_out
        )
        found += tomllib.loads(text)["kernels"]
    return found


def profile_text(data: Mapping[str, Any]) -> str:
    """TOML of a profile: plain values first, then tables, then lists of tables."""
    return "\n".join(_lines(data, "")) + "\n"


def _lines(data: Mapping[str, Any], path: str) -> list[str]:
    tables = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    lists = {key: value for key, value in data.items() if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value)}
    lines = [f"{key} = {_value(value)}" for key, value in data.items() if key not in tables and key not in lists and value != []]
    for key, value in tables.items():
        lines += ["", f"[{path}{key}]", *_lines(value, f"{path}{key}.")]
    for key, each in lists.items():
        for value in each:
            lines += ["", f"[[{path}{key}]]", *_lines(value, f"{path}{key}.")]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(each) for each in value)}]"
    if isinstance(value, float):
        return repr(float(f"{value:.6g}"))
    return json.dumps(value, ensure_ascii=False)
