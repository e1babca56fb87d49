"""How well shipped parameters predict a table they were not fitted to. Nothing is fitted here.

Facts (peaks, links) are those of the device a row was measured on, where a profile of it ships; parameters are those of
the named profile. Suffixes: N rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moesim.calibrate import kernel_tables, networks
from moesim.calibrate.kernels import FAMILIES, TRITON, predict_kernel, split_kernels, template_for
from moesim.calibrate.tables import load, nccl_points, shipped_device
from moesim.cost.collectives import CollectiveCurve, pick_curve
from moesim.cost.experts import TILES, WEIGHT_B, ComputePeak, ExpertKernel
from moesim.cost.fitted import curves_of, deepep_ports, device_peak, kernels_for, scaled_curve, scaled_kernel
from moesim.errors import InputError, ProfileError
from moesim.hardware import Device, load_device, load_links

Floats = NDArray[np.float64]
WORST = 5
_Row: TypeAlias = tuple[float, float, bool, str, dict[str, Any]]  # predicted, measured, extrapolated, group, what it is


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predicted and measured seconds of N rows, what each row is, its group, and what was left out (reason: rows)."""

    predicted_N: Floats
    measured_N: Floats
    extrapolated_N: NDArray[np.bool_]
    groups: list[str]
    rows: list[dict[str, Any]]
    used: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def evaluate(paths: Sequence[Path], profile: str | Path, *, gated: bool | None = None) -> dict[str, Any]:
    """Scores of a profile's parameters on tables, JSON-ready.

    e = predicted/measured - 1: n, median_ape, p90_ape, mape of |e|, bias = mean e, worst rows, extrapolated (rows outside
    the fitted range), "groups" with the same per dtype/kernel, op/ranks or mode/op/ranks, "used" (which parameters served
    how many rows, and whether by name), "left_out" and "notes". `gated` says how many matrices experts have where a table
    has no column `gated`. Raises InputError for unreadable tables, ProfileError when the profile serves no row.
    """
    device = load_device(profile)
    parts = []
    for path in paths:
        kind, table = load(path)
        if kind == "kernels":
            parts.append(_kernels(table, device, gated, str(path)))
        else:
            parts.append(_nccl(table, device, str(path)) if kind == "nccl" else _deepep(path, device))
    groups = [name for part in parts for name in part.groups]
    rows = [row for part in parts for row in part.rows]
    predicted_N, measured_N, outside_N = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("predicted_N", "measured_N", "extrapolated_N")
    )
    label_N = np.asarray(groups)
    return {
        "profile": device.name,
        "files": [str(path) for path in paths],
        **scores(predicted_N, measured_N, outside_N, rows),
        "groups": {name: scores(predicted_N[at], measured_N[at], outside_N[at]) for name in dict.fromkeys(groups) for at in [label_N == name]},
        "used": [entry for part in parts for entry in part.used],
        "left_out": dict(sum((part.left_out for part in parts), Counter())),
        "notes": list(dict.fromkeys(line for part in parts for line in part.notes)),
    }


def scores(predicted_N: Floats, measured_N: Floats, outside_N: NDArray[np.bool_], rows: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """n, median_ape, p90_ape, mape, bias, extrapolated (rows); with `rows` also the worst of them."""
    found: dict[str, Any] = networks.evaluate(predicted_N, measured_N, outside_N)
    error_N = predicted_N / measured_N - 1
    if rows is None:
        return found
    order = np.argsort(-np.abs(error_N), kind="stable")[:WORST]
    return found | {
        "worst": [{**rows[i], "predicted_s": float(predicted_N[i]), "measured_s": float(measured_N[i]), "error": float(error_N[i])} for i in order]
    }


def _facts(table: pd.DataFrame, profile: Device) -> dict[str, tuple[Device, list[str]]]:
    """Device whose peaks and links hold for the rows of each value of the column `device`, with a remark."""
    found = {}
    for name in dict.fromkeys(table["device"].astype(str)):
        shipped = shipped_device(name)
        if shipped is None or shipped.name == profile.name:
            remark = [] if shipped else [f"device {name!r} ships no profile: peaks and links are those of {profile.name}"]
            found[name] = (profile, remark)
        else:
            found[name] = (shipped, [f"device {name!r}: peaks and links of {shipped.name}, parameters of {profile.name}"])
    return found


def pick_kernel(kernels: Sequence[ExpertKernel], wanted: ExpertKernel) -> tuple[ExpertKernel, str]:
    """The kernel whose parameters serve rows of `wanted` (a template: name and tiles), and how it was found.

    One of that name, else of the same family (last part of the name), which is the same code in another framework. For a
    family that is known but not here a typical one, since parameters of other families were further off, for an unknown name
    the first. Kernels of vLLM and SGLang in Triton differ by their tiles alone, so a kernel of that family gets those of the rows.
    """
    family = wanted.name.rpartition("-")[2]
    by_name = [kernel for kernel in kernels if kernel.name == wanted.name]
    same_code = [kernel for kernel in kernels if kernel.name.rpartition("-")[2] == family]
    if not (by_name or same_code):
        if family in FAMILIES:
            return ExpertKernel(name="typical", style=wanted.style, dtype=wanted.dtype), "typical: no such kernel, not calibrated"
        return kernels[0], "first: no such kernel"
    best = (by_name or same_code)[0]
    if wanted.name in TRITON:
        best = replace(best, **{name: getattr(wanted, name) for name in TILES})
    return best, "by name" if by_name else "same code in another framework"


def _kernels(raw: pd.DataFrame, profile: Device, gated: bool | None, place: str) -> Predictions:
    raw = raw.assign(device=raw.get("device", profile.name))
    if "gated" not in raw and gated is not None:
        raw = raw.assign(gated=gated)
    defaults = {"kernel_source": "", "framework": "", "distribution": "balanced"}
    absent = [name for name in defaults if name not in raw]
    local = raw.assign(**{name: defaults[name] for name in absent})
    left_out: Counter[str] = Counter()
    drawable = local["distribution"].map(lambda name: kernel_tables.drawable(str(name)))
    left_out["distribution unknown"] += int((~drawable).sum())
    local = local[drawable]
    for column in ("moe_tp_size", "moe_ep_size"):  # parallel layers time one rank of several: another measurement
        if column in local:
            whole = local[column].isna() | (pd.to_numeric(local[column], errors="coerce") == 1)
            left_out[f"{column} not 1"] += int((~whole).sum())
            local = local[whole]
    if not len(local):
        raise InputError(f"{place}: none of {len(raw)} rows can be judged ({dict(+left_out)}); pass another table")
    table = kernel_tables.check_table(local, place=place)
    facts = _facts(table, profile)
    parts: list[tuple[Floats, NDArray[np.bool_], pd.DataFrame, str]] = []
    used: Counter[tuple[str, str, str, str]] = Counter()
    notes = [line for _, remarks in facts.values() for line in remarks]
    notes += [f"no column {name}: {f'{defaults[name]} loads' if defaults[name] else 'the first kernel'} taken" for name in absent]
    for (name, dtype), rows in split_kernels(table).items():
        if dtype not in WEIGHT_B:
            left_out[f"dtype {dtype or 'not named'} unknown"] += len(rows)
            continue
        known = kernel_tables.with_known_counts(rows)
        left_out["token counts unknown (group-limited routing)"] += len(rows) - len(known)
        for system, some in known.groupby("device", sort=False):
            some = some.reset_index(drop=True)
            device, _ = facts[str(system)]
            found = _parameters(profile, device, dtype)
            if found is None:
                left_out[f"no {dtype} kernel in {profile.name}"] += len(some)
                continue
            kernels, peak, remarks = found
            kernel, how = pick_kernel(kernels, template_for(some))
            notes += remarks
            if how.startswith("typical"):
                notes.append(f"not calibrated: {profile.name} has no {dtype} kernel like {name}; a typical one was taken")
            parts.append((*predict_kernel(some, peak, kernel), some, f"{dtype}/{kernel.name}"))
            used[name, dtype, kernel.name, how] += len(some)
            notes += _other_version(some, profile, kernel)
    if not parts:
        has = ", ".join(f"{fit.name}[{fit.attributes['dtype']}]" for fit in profile.kernels) or "none"
        told = "; ".join(f"{count} rows: {reason}" for reason, count in (+left_out).items())
        raise ProfileError(f"{place}: {profile.name!r} serves no row ({told}); it has kernels: {has}; name another profile or correct the table")
    columns = ["device", "framework", "kernel_source", "dtype", "num_tokens", *kernel_tables.SHAPE, "distribution", "gated"]
    return Predictions(
        predicted_N=np.concatenate([part[0] for part in parts]),
        extrapolated_N=np.concatenate([part[1] for part in parts]),
        measured_N=np.concatenate([part[2]["latency_ms"].to_numpy(np.float64) * 1e-3 for part in parts]),
        groups=[part[3] for part in parts for _ in range(len(part[2]))],
        rows=[_plain(row) for part in parts for row in part[2][columns].to_dict("records")],
        used=[dict(zip(("table", "dtype", "parameters", "how", "rows"), (*key, n), strict=True)) for key, n in used.items()],
        left_out=+left_out,
        notes=notes,
    )


def _parameters(profile: Device, device: Device, dtype: str) -> tuple[list[ExpertKernel], ComputePeak, list[str]] | None:
    """Kernels of a profile as they would be on the device rows were measured on, its peak, remarks; None without any."""
    try:
        peak, remarks = device_peak(device, dtype)
        home, _ = device_peak(profile, dtype)
    except ProfileError:
        return None
    kernels, scaled = kernels_for(profile, dtype)
    if not kernels:
        return None
    return [scaled_kernel(kernel, home, peak) for kernel in kernels], peak, [*remarks, *scaled]


def _other_version(rows: pd.DataFrame, profile: Device, kernel: ExpertKernel) -> list[str]:
    """A remark where rows come from another framework or version than a kernel was fitted to."""
    fit = next((each for each in profile.kernels if (each.name, each.attributes["dtype"]) == (kernel.name, kernel.dtype)), None)
    theirs = f"{rows['framework'].iloc[0]} {rows['version'].iloc[0] if 'version' in rows else ''}".strip()
    ours = f"{fit.attributes['framework']} {fit.attributes['version']}".strip() if fit else "another device"
    return [f"rows of {theirs} are predicted with {kernel.name} as fitted to {ours}"] if theirs and theirs != ours else []


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    """A row whose values JSON knows."""
    return {str(key): value.item() if isinstance(value, np.generic) else value for key, value in row.items()}


def _nccl(table: pd.DataFrame, profile: Device, place: str) -> Predictions:
    table = table.assign(device=table.get("device", profile.name))
    of, curves = curves_of(profile)
    facts = _facts(table, profile)
    notes = [line for _, remarks in facts.values() for line in remarks]
    notes += [f"not calibrated: {profile.name} has no curves of collectives; those of {of.name} are scaled"] if of.name != profile.name else []
    left_out: Counter[str] = Counter()
    found: list[_Row] = []
    used: Counter[tuple[str, str]] = Counter()
    for system, rows in table.groupby("device", sort=False):
        points_of_ops, version, skipped = nccl_points(rows, place=place)
        left_out += skipped
        notes.append(f"{system}: NCCL {version or 'of unknown version'}, medians of repeats; reductions in one dtype")
        for points in points_of_ops:
            for ranks in sorted(set(points.ranks_N.tolist())):
                some = points.at(points.ranks_N == ranks)
                if points.op not in {curve.op for curve in curves}:
                    left_out[f"no {points.op} curve in {of.name}"] += len(some.time_s_N)
                    continue
                curve, remarks = _on_device(pick_curve(curves, op=points.op, ranks=ranks), of, facts[str(system)][0])
                notes += remarks
                time_N, outside_N = curve.time_s(some.bytes_N, ranks=some.ranks_N)
                used[points.op, f"{curve.name} of {curve.ranks[0]}-{curve.ranks[1]} ranks"] += len(time_N)
                for time_s, measured_s, outside, bytes_ in zip(time_N, some.time_s_N, outside_N, some.bytes_N, strict=True):
                    row = {"device": str(system), "op": points.op, "ranks": ranks, "bytes": float(bytes_)}
                    found.append((time_s, measured_s, outside, f"{points.op}/{ranks} ranks", row))
    if not found:
        raise ProfileError(f"{place}: {profile.name!r} has curves of {', '.join(sorted({c.op for c in curves}))} alone; it serves no row")
    return _collected(found, [{"table": op, "parameters": name, "rows": n} for (op, name), n in used.items()], +left_out, notes)


def _on_device(curve: CollectiveCurve, profile: Device, device: Device) -> tuple[CollectiveCurve, list[str]]:
    """The profile's curve, scaled to the link of the device a table was measured on."""
    wire = load_links().get(device.link)
    return scaled_curve(curve, of=profile, device=device, wire=wire) if wire else (curve, [])


def _collected(found: Sequence[_Row], used: list[dict[str, Any]], left_out: Counter[str], notes: list[str]) -> Predictions:
    predicted, measured, outside, groups, rows = zip(*found, strict=True)
    return Predictions(
        predicted_N=np.asarray(predicted, np.float64),
        measured_N=np.asarray(measured, np.float64),
        extrapolated_N=np.asarray(outside, bool),
        groups=list(groups),
        rows=list(rows),
        used=used,
        left_out=left_out,
        notes=notes,
    )


def _deepep(path: Path, profile: Device) -> Predictions:
    found: list[_Row] = []
    used: Counter[str] = Counter()
    notes: list[str] = []
    exchanges = networks.read_deepep(path)
    _, table = load(path)
    for each, gpu in zip(exchanges, table["gpu"] if "gpu" in table else [""] * len(exchanges), strict=True):
        name = f"deepep-{each.mode.replace('_', '-')}"
        device = shipped_device(gpu)
        ports, remarks = deepep_ports(profile, name, wire=load_links().get(device.link) if device else None)
        notes += remarks
        time = each.predict(ports)
        row = {"mode": each.mode, "op": each.op, "ranks": each.ranks}
        found.append((float(time.time_s_N), each.time_s, bool(time.extrapolated_N), f"{each.mode}/{each.op}/{each.ranks} ranks", row))
        used[name] += 1
    return _collected(found, [{"table": name, "parameters": name, "rows": n} for name, n in used.items()], Counter(), notes)


__all__ = ["Predictions", "evaluate", "pick_kernel", "scores"]
