"""Fit expert-compute kernels to measured tables, score them on shapes left out, write them as profile fragments.

The time of a row is the mean of `cost.experts.layer_time` over draws of its tokens per expert. Parameters minimise
a robust loss of log(predicted/measured) with a weak pull towards the template: what a table cannot tell stays
at typical values. Suffixes: R rows of a table, N cases (row x draw), P free parameters. Errors are fractions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moesim.calibrate.kernel_tables import DRAWS, SHAPE, row_counts, shapes, with_known_counts
from moesim.calibrate.tables import shipped_device
from moesim.cost.experts import (
    PARAMETERS,
    TILING,
    VALID_KEYS,
    ComputePeak,
    ExpertKernel,
    ExpertShape,
    Floats,
    Style,
    TileLoad,
    layer_time,
    tile_load,
)
from moesim.errors import InputError

TOKEN_RANGES = ((1, 16), (17, 128), (129, 1024), (1025, 16384), (16385, math.inf))
_SCATTER = 0.05  # relative error where the robust loss turns from squares to absolute values
_PIECE = 4096  # rows predicted at once
_PULL = 0.1  # residuals (in _SCATTER per row, rms) that one scale away from the template costs
# name: least, most, scale of the pull
_BOUNDS = {
    "launch_s": (1e-7, 60e-6, 15e-6),
    "token_s": (0.0, 200e-9, 30e-9),
    "memory_efficiency": (0.3, 1.0, 0.2),
    "activation_efficiency": (0.05, 5.0, 1.0),
    "flops_efficiency": (0.02, 1.6, 0.5),
    "tile_overhead": (0.0, 300.0, 80.0),
    "overlap": (1.0, 12.0, 2.0),
    "wave_tail": (0.0, 4.0, 1.5),
    "partial_tile": (0.0, 4.0, 1.0),
    "load_stall": (0.0, 2.0, 0.5),
    "reread": (0.0, 1.0, 0.3),
    "reread_cache": (0.05, 30.0, 1.0),
    "repack": (0.0, 4.0, 1.0),
}
# A single unit is a processor's core: it launches its own work, from an interpreter, and libraries set up every product.
_CORE_BOUNDS = _BOUNDS | {"launch_s": (1e-7, 2e-3, 1e-4), "token_s": (0.0, 2e-6, 300e-9), "memory_efficiency": (0.05, 1.0, 0.5)}


FAMILIES = ("cutlass", "trtllm", "triton", "loop", "grouped")
TRITON = ("vllm-triton", "sglang-triton")  # whose default tiles are known
OLD_DEFAULTS = "sglang-triton"  # SGLang's default tiles are those of vLLM, too, until its pull request 34846
OLD_UNTIL = (0, 17)
# Shapes (experts, intermediate) of a whole layer on one device with tuned bf16 tiles, by engine and profile. Source: names of the
# files in vLLM's fused_moe/configs and SGLang's triton_utils/configs; one that an engine lacks or adds moves its shape's time.
TUNED = {
    ("vllm", "h100-sxm"): ((128, 704), (128, 1856), (256, 512), (512, 512)),
    ("vllm", "h200"): ((8, 14336), (128, 704), (128, 768), (512, 512)),
    ("sglang", "h200"): ((128, 704), (128, 1856), (256, 512)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFit:
    """A fitted kernel with its scores (`evaluate_kernel`) on the rows it was fitted to."""

    kernel: ExpertKernel
    residuals: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cases:
    rows: int
    row_N: NDArray[np.int64]
    load: TileLoad
    shape: ExpertShape
    cold: bool  # caches were written over before every call

    def time_s(self, peak: ComputePeak, kernel: ExpertKernel) -> tuple[Floats, NDArray[np.bool_]]:
        """Expected seconds and the out-of-range flag of each row."""
        found = layer_time(self.load, self.shape, peak, kernel, warm_cache=not self.cold)
        draws_R = np.bincount(self.row_N, minlength=self.rows)
        outside_R = np.bincount(self.row_N, weights=found.extrapolated_N, minlength=self.rows) > 0
        return np.bincount(self.row_N, weights=found.time_s_N, minlength=self.rows) / draws_R, outside_R


def template_for(table: pd.DataFrame) -> ExpertKernel:
    """The unfitted kernel of a table's rows: name, style and the tile rule of the engine's default configuration.

    InputError unless all rows are of one dtype and one kernel (`split_kernels` separates them).
    Source: default tile choices of vLLM 0.24 and SGLang 0.5.14 `fused_moe` (Triton) and the shapes for which they ship tuned
    ones, FlashInfer's CUTLASS grouped GEMM (128 token rows) and TensorRT-LLM generated kernels (smallest power of two
    that needs at most two tiles for the mean expert).
    """
    keys = sorted(set(_kernel_keys(table)))
    if len(keys) != 1:
        raise InputError(f"a kernel table mixes {keys}; fit each part of split_kernels(table) by itself")
    name, dtype = keys[0]
    style: Style = "loop" if "loop" in name else "grouped" if "grouped" in name else "fused"
    typical = ExpertKernel(name=name, style=style, dtype=dtype)
    if name == "vllm-triton" and dtype == "fp8_block":
        return replace(typical, tile_rows=(16, 64), by_tokens=(64,), tile_groups=(32,))
    if name == "vllm-triton":
        default = replace(typical, tile_rows=(16, 32, 64, 128), by_tokens=(32, 96, 512), tile_groups=(1, 16), groups_by_tokens_per_expert=(129,))
        return replace(default, tuned=_tuned("vllm", dtype, table))
    if name == "sglang-triton" and dtype == "fp8_block":
        return replace(typical, tile_rows=(64,), tile_groups=(32,))
    if name == OLD_DEFAULTS:
        return replace(
            typical,
            tile_rows=(16, 64),
            by_tokens_per_expert=(1,),
            tile_columns=64,
            tile_groups=(8,),
            load_stall=0.5,
            tuned=_tuned("sglang", dtype, table),
        )
    if name.endswith("-cutlass"):
        return replace(typical, tile_rows=(128,), tile_columns=1024, partial_tile=0.5, masked_rows=0.0, reread=0.0)
    if name.endswith("-trtllm"):
        rows = (8, 16, 32, 64)
        return replace(typical, tile_rows=rows, by_selections_per_expert=(16, 32, 64), reread=0.9)
    return typical


def split_kernels(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Rows by (kernel name, dtype): what one ExpertKernel can describe."""
    keys = _kernel_keys(table)
    return {key: table[[other == key for other in keys]].reset_index(drop=True) for key in sorted(set(keys))}


def _kernel_keys(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(kernel name, dtype) of each row: framework and family, by which the engine calls it or what an old vLLM had alone."""
    blank = [""] * len(table)
    frameworks, versions = (table.get(column, blank) for column in ("framework", "version"))
    keys = []
    for framework, version, source, dtype in zip(frameworks, versions, table["kernel_source"], table["dtype"], strict=True):
        old = framework == "vllm" and _before(str(version), OLD_UNTIL)
        plain = "triton" if "fused_moe" in str(source) or (old and not source) else str(source)
        family = next((word for word in FAMILIES if word in str(source)), plain)
        name = "-".join(part for part in (str(framework), family) if part)
        keys.append((OLD_DEFAULTS if old and family == "triton" else name, str(dtype)))
    return keys


def _before(version: str, first: tuple[int, int]) -> bool:
    """Whether a version like "0.14.0" is below (0, 17); no if it cannot be read."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < first


def fit_kernel(table: pd.DataFrame, peak: ComputePeak, *, template: ExpertKernel | None = None, draws: int = DRAWS) -> KernelFit:
    """Kernel with the least robust log error on a table (`read_table`) of one kernel and dtype.

    `template` (default `template_for(table)`) fixes style and tile rule and is where the fit starts; its
    partial_tile, load_stall, reread or repack of 0 stay 0. Rows with unknown counts are not used. InputError when fewer rows are left
    than there are parameters.
    """
    from scipy.optimize import least_squares

    table = with_known_counts(table)
    kernel = template or template_for(table)
    free = _free(kernel)
    if len(table) <= len(free):
        raise InputError(f"{len(table)} rows with known counts cannot fix {len(free)} parameters of {kernel.name!r}; measure more")
    cases = _cases(table, kernel, draws)
    measured_R = np.log(table["latency_ms"].to_numpy(np.float64) * 1e-3)
    bounds = _CORE_BOUNDS if peak.units == 1 else _BOUNDS
    least_P, most_P, scale_P = np.array([bounds[name] for name in free]).T
    start_P = np.array([getattr(kernel, name) for name in free])
    pull_P = _PULL * _SCATTER * math.sqrt(len(table)) / scale_P

    def candidate(x_P: Floats) -> ExpertKernel:
        return replace(kernel, **dict(zip(free, x_P.tolist(), strict=True)))

    def residuals(x_P: Floats) -> Floats:
        predicted_R, _ = cases.time_s(peak, candidate(x_P))
        return np.concatenate([np.log(predicted_R) - measured_R, pull_P * (x_P - start_P)])

    found = least_squares(
        residuals,
        np.clip(start_P, least_P + 1e-3 * scale_P, most_P - 1e-3 * scale_P),
        bounds=(least_P, most_P),
        x_scale=scale_P,
        diff_step=[1e-6] * len(free),
        loss="soft_l1",
        f_scale=_SCATTER,
        max_nfev=200,
    )
    # the solver never quite reaches a bound; 1e-18 s per token is none
    at_least_P = found.x - least_P < 1e-6 * scale_P
    best = replace(candidate(np.where(at_least_P, least_P, found.x)), valid=_valid(table))
    scores = evaluate_kernel(table, peak, best, draws=draws)
    return KernelFit(kernel=best, residuals={name: scores[name] for name in SCORES})


def _free(kernel: ExpertKernel) -> list[str]:
    """The at most twelve parameters a fit moves: a share of 0 in the template means that the kernel does no such thing."""
    absent = {name for name in ("partial_tile", "load_stall", "reread", "repack") if getattr(kernel, name) == 0}
    if "reread" in absent:
        absent.add("reread_cache")
    return [name for name in PARAMETERS if name not in absent]


def _valid(table: pd.DataFrame) -> dict[str, tuple[float, float]]:
    columns = ("num_tokens", *(SHAPE[i] for i in (0, 1, 3, 2)))
    ranges = ((float(table[column].min()), float(table[column].max())) for column in columns)
    return dict(zip(VALID_KEYS, ranges, strict=True))


def _cases(table: pd.DataFrame, kernel: ExpertKernel, draws: int) -> _Cases:
    size_R = table["num_experts"].to_numpy()
    launches = int(size_R.max()) if kernel.style == "loop" else 1
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in TileLoad.__dataclass_fields__}
    drawn = []
    for row in table.to_dict("records"):
        counts_DE = row_counts({str(key): value for key, value in row.items()}, draws=draws)
        load = tile_load(counts_DE.astype(np.float64), kernel, top_k=row["topk"], intermediate=row["inter_size"])
        drawn.append(len(counts_DE))
        for name, values in parts.items():
            part = getattr(load, name)
            short = launches - part.shape[1] if name.endswith("_NX") else 0
            values.append(np.pad(part, ((0, 0), (0, short))) if short else part)
    row_N = np.repeat(np.arange(len(table)), drawn)
    shape = ExpertShape(
        hidden=table["hidden_size"].to_numpy()[row_N],
        intermediate=table["inter_size"].to_numpy()[row_N],
        gates=np.where(table["gated"], 2, 1)[row_N],
        top_k=table["topk"].to_numpy()[row_N],
    )
    load = TileLoad(**{name: np.concatenate(values) for name, values in parts.items()})
    cold = bool("cold" in table and table["cold"].all())
    return _Cases(rows=len(table), row_N=row_N, load=load, shape=shape, cold=cold)


SCORES = ("n", "median_ape", "p90_ape", "mape", "bias")


def predict_kernel(table: pd.DataFrame, peak: ComputePeak, kernel: ExpertKernel, *, draws: int = DRAWS) -> tuple[Floats, NDArray[np.bool_]]:
    """Seconds of every row of a table under a kernel, the mean over draws of its counts, and where that extrapolates."""
    pieces = (table.iloc[at : at + _PIECE] for at in range(0, len(table), _PIECE))  # bounds memory
    time_s, outside = zip(*(_cases(piece, kernel, draws).time_s(peak, kernel) for piece in pieces), strict=True)
    return np.concatenate(time_s), np.concatenate(outside)


def evaluate_kernel(table: pd.DataFrame, peak: ComputePeak, kernel: ExpertKernel, *, draws: int = DRAWS) -> dict[str, Any]:
    """Errors of a kernel on a table: n, median_ape, p90_ape, mape, bias, worst rows, share extrapolated.

    ape = |predicted/measured - 1|, bias = mean(predicted/measured - 1). Rows with unknown counts are left out
    (`unknown`). InputError when no row is left or a row has another dtype than the kernel.
    """
    known = with_known_counts(table)
    if not len(known) or set(known["dtype"]) != {kernel.dtype}:
        raise InputError(
            f"kernel {kernel.name!r} of dtype {kernel.dtype!r} cannot be scored on dtypes {sorted(set(table['dtype']))}"
            f" with {len(known)} rows of known counts; filter the table"
        )
    predicted_R, outside_R = _cases(known, kernel, draws).time_s(peak, kernel)
    return {
        **_scores(known, predicted_R),
        "worst": _worst(known, predicted_R),
        "extrapolated": float(outside_R.mean()),
        "unknown": len(table) - len(known),
    }


def _errors(table: pd.DataFrame, predicted_R: Floats) -> Floats:
    return predicted_R / (table["latency_ms"].to_numpy(np.float64) * 1e-3) - 1


def _scores(table: pd.DataFrame, predicted_R: Floats) -> dict[str, float]:
    error_R = _errors(table, predicted_R)
    ape_R = np.abs(error_R)
    values = (len(table), np.median(ape_R), np.quantile(ape_R, 0.9), ape_R.mean(), error_R.mean())
    return {name: float(value) for name, value in zip(SCORES, values, strict=True)}


def _worst(table: pd.DataFrame, predicted_R: Floats, count: int = 5) -> list[dict[str, Any]]:
    error_R = _errors(table, predicted_R)
    order = np.argsort(-np.abs(error_R), kind="stable")[:count]
    columns = ["num_tokens", *SHAPE, "distribution", "latency_ms"]
    rows = table[columns].iloc[order].to_dict("records")
    return [{**{str(key): value for key, value in row.items()}, "error": float(error_R[i])} for row, i in zip(rows, order, strict=True)]


def cross_validate(table: pd.DataFrame, peak: ComputePeak, *, template: ExpertKernel | None = None, draws: int = DRAWS) -> dict[str, Any]:
    """Leave-one-shape-out errors: every shape is predicted by a kernel fitted to the others.

    Returns {"overall", "tokens": by range, "distribution", "shape": scores of each, "worst", "alone"}; a table of
    several kernels is fitted kernel by kernel, and the rows of a kernel with a single shape, which cannot be held
    out, are counted in `alone`. InputError when nothing can be held out.
    """
    parts, predictions = [], []
    alone = 0
    for part in split_kernels(with_known_counts(table)).values():
        names = shapes(part)
        if len(set(names)) < 2:
            alone += len(part)
            continue
        predicted_R = np.zeros(len(part))
        for left_out in sorted(set(names)):
            out_R = np.array([name == left_out for name in names])
            kernel = fit_kernel(part[~out_R], peak, template=template, draws=draws).kernel
            held_out = part[out_R].reset_index(drop=True)
            predicted_R[out_R] = _cases(held_out, kernel, draws).time_s(peak, kernel)[0]
        parts.append(part)
        predictions.append(predicted_R)
    if not parts:
        raise InputError("cross-validation needs a kernel measured on two shapes; measure another shape")
    whole = pd.concat(parts, ignore_index=True)
    predicted_R = np.concatenate(predictions)
    tokens_R = whole["num_tokens"].to_numpy()
    groups: dict[str, list[str]] = {
        "tokens": [next(_range_name(r) for r in TOKEN_RANGES if r[0] <= t <= r[1]) for t in tokens_R],
        "distribution": [str(name) for name in whole["distribution"]],
        "shape": ["x".join(map(str, shape)) for shape in shapes(whole)],
    }
    return {
        "overall": _scores(whole, predicted_R),
        **{kind: _grouped(whole, predicted_R, labels) for kind, labels in groups.items()},
        "worst": _worst(whole, predicted_R),
        "alone": alone,
    }


def _range_name(tokens: tuple[float, float]) -> str:
    return f"{tokens[0]:.0f}-{tokens[1]:.0f}" if math.isfinite(tokens[1]) else f"{tokens[0]:.0f}-"


def _grouped(table: pd.DataFrame, predicted_R: Floats, labels: list[str]) -> dict[str, dict[str, float]]:
    label_R = np.array(labels)
    chosen = {label: label_R == label for label in dict.fromkeys(labels)}
    return {label: _scores(table[where_R], predicted_R[where_R]) for label, where_R in chosen.items()}


def profile_fragment(
    fit: KernelFit,
    *,
    framework: str,
    version: str,
    source: str,
    date: str,
    held_out: Mapping[str, float] | None = None,
) -> str:
    """`[[kernels]]` table of a device profile (TOML); `held_out` are the scores of `cross_validate(...)["overall"]`."""
    kernel = fit.kernel
    residuals = dict(fit.residuals)
    residuals |= {f"held_out_{name}": value for name, value in (held_out or {}).items()}
    blank = ExpertKernel(name="", style="fused", dtype="bf16")
    tiling = {name: getattr(kernel, name) for name in TILING if getattr(kernel, name) != getattr(blank, name)}
    lines = ["[[kernels]]"]
    heads = {"name": kernel.name, "style": kernel.style, "dtype": kernel.dtype, "framework": framework}
    heads |= {"version": version, "source": source, "confidence": "fitted", "date": date}
    lines += [f'{name} = "{value}"' for name, value in heads.items()]
    lines += ["", "[kernels.parameters]"]
    lines += [f"{name} = {_number(getattr(kernel, name))}" for name in PARAMETERS if name not in ("load_stall", "repack") or getattr(kernel, name)]
    lines += [f"{name} = {list(v) if isinstance(v, tuple) else v}" for name, v in tiling.items()]
    lines += ["", "[kernels.residuals]"]
    lines += [f"{name} = {_number(value)}" for name, value in residuals.items()]
    lines += ["", "[kernels.valid]"]
    lines += [f"{name} = [{_number(least)}, {_number(most)}]" for name, (least, most) in kernel.valid.items()]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """Four significant digits in TOML's spelling of a float or integer."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _tuned(engine: str, dtype: str, table: pd.DataFrame) -> tuple[float, ...]:
    """Pairs for `ExpertKernel.tuned`: shapes with tuned tiles on the device a table names."""
    devices = {shipped.name for name in table.get("device", pd.Series(dtype=str)).unique() if (shipped := shipped_device(name))}
    pairs = TUNED.get((engine, devices.pop()), ()) if len(devices) == 1 and dtype == "bf16" else ()
    return tuple(float(size) for pair in pairs for size in pair)
