"""Measured fused-MoE kernel tables and the token counts behind their rows.

A table names shapes, tokens and a distribution, not the tokens of each expert: those were drawn, timed and dropped,
and a row is the mean over a few draws. The draws are repeated here so that a model can be compared with their
expectation. Suffixes: E experts, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moesim.errors import InputError

Counts = NDArray[np.int64]

DRAWS = 16
COUNTED = "counts"  # distribution of a row whose column `counts` holds the tokens of each expert
SIZES = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts")
SHAPE = ["hidden_size", "inter_size", "topk", "num_experts"]
LABELS = ("kernel_source", "moe_dtype", "distribution")
TEXTS = ("device", "framework", "version", *LABELS)
# Spellings of dtypes other than moesim's own.
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8", "int4_wo": "int4", "nvfp4": "fp4"}
MOST_TOKENS, MOST_EXPERTS = 10**9, 65535  # a batch beyond any; ids of experts are 16 bits wide
MOST_ALPHA = 100.0  # a power law beyond any
# Plain squared-ReLU experts (Nemotron-H) in a table that does not say which rows are gated.
PLAIN_SHAPES = frozenset(
    {
        (2688, 1856, 6, 128),
        (1024, 2688, 22, 512),
        (2048, 5120, 22, 512),
        (8192, 5120, 22, 512),
        (4096, 2688, 22, 512),
    }
)
# Group-limited routing replaced part of the drawn selections when these were measured, by which is unknown.
UNKNOWN_COUNTS = frozenset({(7168, 2048, 8, 256)})


def read_table(path: str | Path) -> pd.DataFrame:
    """Kernel table from a .csv or .parquet file with AIConfigurator's column names.

    Columns kernel_source, moe_dtype, num_tokens, hidden_size, inter_size, topk, num_experts, distribution, latency_ms
    and optionally device, framework and version (text, empty where unknown), gated, and cold (caches were written over
    before every call). Adds `gated` where missing (known plain shapes are not) and `dtype` in moesim's spelling. Raises
    InputError naming file, column and row of the first fault.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: kernel tables are .csv or .parquet files, not {path.suffix!r}; convert it")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; pass a readable kernel table") from error
    return check_table(table, place=str(path))


def check_table(table: pd.DataFrame, *, place: str = "kernel table") -> pd.DataFrame:
    """Validated copy of a table in memory; see `read_table`."""
    missing = [name for name in (*SIZES, *LABELS, "latency_ms") if name not in table]
    if missing:
        raise InputError(f"{place}: column(s) {', '.join(missing)} missing; rename the table's columns to these")
    if not len(table):
        raise InputError(f"{place}: no rows; measure again")
    table = table.reset_index(drop=True)
    for name in TEXTS:
        if name in table:
            table[name] = table[name].astype(object).where(table[name].notna(), "").astype(str).str.strip()
    for name in (*SIZES, "latency_ms"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        good = np.isfinite(numbers) & (numbers > 0)
        most = {"num_tokens": MOST_TOKENS, "num_experts": MOST_EXPERTS, "latency_ms": np.inf}.get(name, 2**31)
        if name != "latency_ms":
            good &= (numbers == numbers.round()) & (numbers <= most)
        _refuse(place, table, name, ~good, "a positive time" if name == "latency_ms" else f"a whole number from 1 to {most}")
        table[name] = numbers if name == "latency_ms" else numbers.astype(np.int64)
    _refuse(place, table, "topk", table["topk"] > table["num_experts"], "at most num_experts")
    counted = table["distribution"] == COUNTED
    known = table["distribution"].map(lambda name: drawable(str(name)))
    _refuse(place, table, "distribution", ~known, f"balanced, {COUNTED}, or power_law_<alpha>, alpha from 0 to {MOST_ALPHA:g} and not 1")
    if counted.any():
        bad = counted & pd.Series([not _counts_fit(row) for row in table.to_dict("records")])
        _refuse(place, table, "counts" if "counts" in table else "distribution", bad, "num_tokens*topk selections as num_experts whole numbers")
    spelt = table["moe_dtype"].str.lower().str.removeprefix("torch.")
    table["dtype"] = spelt.map(lambda name: DTYPES.get(name, name))
    if "gated" not in table:
        table["gated"] = [shape not in PLAIN_SHAPES for shape in shapes(table)]
    _refuse(place, table, "gated", ~table["gated"].isin([True, False]), "true or false")
    table["gated"] = table["gated"].astype(bool)
    return table


def _refuse(place: str, table: pd.DataFrame, column: str, bad: pd.Series[bool], wanted: str) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad.to_numpy())[0])
        told = repr(str(table[column].iloc[row])[:60])
        raise InputError(f"{place}: column {column!r}, row {row + 1}: {told} is not {wanted}; correct the row")


def shapes(table: pd.DataFrame) -> list[tuple[int, ...]]:
    """(hidden, intermediate, top_k, experts) of every row."""
    return [tuple(int(size) for size in row) for row in table[SHAPE].to_numpy()]


def with_known_counts(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose tokens per expert can be drawn again."""
    return table[[shape not in UNKNOWN_COUNTS for shape in shapes(table)]].reset_index(drop=True)


def drawable(distribution: str) -> bool:
    """Whether tokens per expert of this distribution are in the table or can be drawn."""
    return distribution == COUNTED or _alpha(distribution) is not None


def _alpha(distribution: str) -> float | None:
    """Exponent of a power law, 0 for balanced, None for a name that is neither."""
    if distribution == "balanced":
        return 0.0
    prefix, _, number = distribution.rpartition("_")
    try:
        alpha = float(number)
    except ValueError:
        return None
    return alpha if prefix == "power_law" and 0 < alpha <= MOST_ALPHA and alpha != 1 else None


@lru_cache(maxsize=1024)
def sample_counts(*, experts: int, top_k: int, tokens: int, distribution: str, draws: int = DRAWS, seed: int = 0) -> Counts:
    """Tokens per expert, [D, E] (read-only); each row sums to tokens*top_k, no expert exceeds `tokens`.

    `balanced` is deterministic (one row); `power_law_<alpha>` is drawn `draws` times. Same arguments, same counts.
    Source: sampling of the AIConfigurator 0.12.0 collectors (Apache-2.0), implemented from its description.
    """
    alpha = _alpha(distribution)
    if alpha is None or not 1 <= top_k <= experts or tokens < 1 or draws < 1:
        raise InputError(
            f"cannot draw distribution={distribution!r}, experts={experts}, top_k={top_k}, tokens={tokens}, draws={draws}; "
            "use balanced or power_law_<alpha> with 1 <= top_k <= experts"
        )
    if alpha == 0:
        counts_DE = _balanced(experts, top_k, tokens)[None]
    else:
        rng = np.random.default_rng([seed, experts, top_k, tokens, round(alpha * 1e6)])
        counts_DE = np.stack([_power_law(experts, top_k, tokens, alpha, rng) for _ in range(draws)])
    counts_DE.setflags(write=False)
    return counts_DE


def _balanced(experts: int, top_k: int, tokens: int) -> Counts:
    stride = -(-experts // top_k)
    whole, rest = divmod(tokens, experts) if tokens >= stride else (0, tokens)  # whole rounds meet every expert top_k times
    step = 1.0 if tokens >= stride else stride / tokens
    chosen_TK = np.floor((np.arange(rest)[:, None] * step + np.arange(top_k) * stride) % experts).astype(np.int64)
    return whole * top_k + np.bincount(chosen_TK.ravel(), minlength=experts)


def _power_law(experts: int, top_k: int, tokens: int, alpha: float, rng: np.random.Generator) -> Counts:
    total = tokens * top_k
    least, most = (1.0, 0.8 * tokens) if total > experts else (0.01, 2.0)
    low, high = least ** (1 - alpha), most ** (1 - alpha)
    weight_E = ((high - low) * rng.random(experts) + low) ** (1 / (1 - alpha))
    counts_E = np.minimum(np.rint(weight_E * (total / weight_E.sum())).astype(np.int64), tokens)
    missing = total - int(counts_E.sum())
    return _raise_lowest(counts_E, missing) if missing >= 0 else -_raise_lowest(-counts_E, -missing)


def _raise_lowest(counts_E: Counts, units: int) -> Counts:
    """Add units one at a time, each to the expert that then has the fewest (sorts: experts have no names)."""
    counts_E = np.sort(counts_E)
    to_level_E = np.arange(1, len(counts_E) + 1) * counts_E - np.cumsum(counts_E)
    raised = int(np.searchsorted(to_level_E, units, side="right"))
    level, rest = divmod(int(counts_E[:raised].sum()) + units, raised)
    counts_E[:raised] = level
    counts_E[:rest] += 1
    return counts_E


def _counts_fit(row: Mapping[object, object]) -> bool:
    words = str(row.get("counts", "")).split()
    selections = int(str(row["num_tokens"])) * int(str(row["topk"]))
    return len(words) == row["num_experts"] and all(word.isdecimal() for word in words) and sum(map(int, words)) == selections


def row_counts(row: Mapping[str, object], *, draws: int = DRAWS) -> Counts:
    """Tokens of each expert [D, E] of one table row: as measured where it says so, else `sample_counts`."""
    if row["distribution"] == COUNTED:
        return np.asarray([[int(word) for word in str(row["counts"]).split()]], np.int64)
    return sample_counts(
        experts=int(str(row["num_experts"])),
        top_k=int(str(row["topk"])),
        tokens=int(str(row["num_tokens"])),
        distribution=str(row["distribution"]),
        draws=draws,
    )
