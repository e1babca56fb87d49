"""Which kind of measurements a table holds, recognised by its columns, and what device it was taken on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from moesim.calibrate.networks import REDUCING, Points
from moesim.cost.collectives import OPS
from moesim.errors import InputError
from moesim.hardware import Device, device_names, load_device

Kind = Literal["kernels", "nccl", "deepep"]
# Columns that only one kind has; spellings of AIConfigurator are renamed on reading.
MARKS: dict[Kind, tuple[str, ...]] = {
    "kernels": ("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts"),
    "deepep": ("mode", "ep_size", "op", "tokens_per_rank", "hidden"),
    "nccl": ("op", "num_gpus", "dtype"),
}
RENAMED = {"op_name": "op", "nccl_dtype": "dtype", "message_size": "message_elements"}
NCCL_VERSION = "2.29.2"  # the one parameters are fitted to; taken where a table holds it
ELEMENT_B = {"half": 2, "int8": 1, "bfloat16": 2, "float": 4, "uint8": 1, "fp8": 1}
# Systems of AIConfigurator whose name is not that of a profile with "-" for "_".
SYSTEMS = {"rtx-pro-6000-server": "rtx-pro-6000", "a100-sxm": "a100-80", "h200-sxm": "h200", "b200-sxm": "b200", "gb200-sxm": "gb200"}


def load(path: Path) -> tuple[Kind, pd.DataFrame]:
    """Kind and rows of a .csv or .parquet table, as text and numbers as they stand in the file.

    A column `latency` is taken as `latency_ms` (AIConfigurator writes milliseconds), `message_size` counts elements.
    Raises InputError when the file cannot be read or its columns are those of no kind.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: tables are .csv or .parquet files, not {path.suffix!r}; convert it")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; pass a readable table") from error
    table = table.rename(columns=lambda name: str(name).strip())
    table = table.rename(columns={old: new for old, new in RENAMED.items() if new not in table})
    if "latency" in table and "latency_ms" not in table:
        table = table.rename(columns={"latency": "latency_ms"})
    for kind, marks in MARKS.items():
        if set(marks) <= set(table.columns):
            return kind, table
    wanted = "; ".join(f"{kind}: {', '.join(marks)}" for kind, marks in MARKS.items())
    found = ", ".join(str(column)[:40] for column in table.columns[:20])
    raise InputError(f"{path}: columns {found} are those of no known table; known are {wanted}")


def shipped_device(name: object) -> Device | None:
    """The shipped profile a table's `device` column means, or None: "h100_sxm" is h100-sxm, "h200_sxm" is h200."""
    plain = str(name).strip().lower().replace("_", "-")
    known = device_names()
    found = next((each for each in (plain, SYSTEMS.get(plain, "")) if each in known), None)
    return load_device(found) if found else None


def nccl_points(table: pd.DataFrame, *, place: str) -> tuple[list[Points], str, Counter[str]]:
    """Points of each op (medians over repeats and element types), the NCCL version taken, and rows left out by reason.

    Columns op, dtype, num_gpus, latency_ms and `bytes` or `message_elements`; optionally nccl_version, of which
    `NCCL_VERSION` is taken, else the one with most rows. Reductions keep one element type, since reducing depends on it.
    Raises InputError naming column and row of a bad number, or when no row is left.
    """
    left_out: Counter[str] = Counter()
    table = table.assign(nccl_version=table["nccl_version"].fillna("").astype(str) if "nccl_version" in table else "")

    def keep(table: pd.DataFrame, good: pd.Series[bool], reason: str) -> pd.DataFrame:
        left_out[reason] += int((~good).sum())
        return table[good]

    table = keep(table, table["op"].isin(OPS), f"op not of {', '.join(OPS)}")
    if "bytes" not in table:
        if "message_elements" not in table:
            raise InputError(f"{place}: neither bytes nor message_elements (elements) among its columns; add one")
        table = keep(table, table["dtype"].isin(ELEMENT_B), "size of dtype unknown")
        table = table.assign(bytes=table["message_elements"] * table["dtype"].map(ELEMENT_B))
    if "latency_ms" not in table:
        raise InputError(f"{place}: column latency_ms missing; rename the column of milliseconds")
    for name, least, kind in (("num_gpus", 2, "a whole number"), ("bytes", 1, "a number"), ("latency_ms", 0, "a number")):
        numbers = pd.to_numeric(table[name], errors="coerce")
        bad = ~(np.isfinite(numbers) & (numbers >= least) & (numbers > 0))
        bad |= (numbers != numbers.round()) & (kind == "a whole number")
        if bad.any():
            row = table.index[int(np.flatnonzero(bad.to_numpy())[0])]
            told = repr(str(table[name].loc[row])[:60])
            raise InputError(f"{place}: column {name!r}, row {int(row) + 1}: {told} is not {kind} > 0 and >= {least}; correct the row")
        table = table.assign(**{name: numbers})
    if not len(table):
        raise InputError(f"{place}: no row of a known collective is left ({dict(left_out)}); pass another table")
    versions = table["nccl_version"].value_counts()
    version = NCCL_VERSION if NCCL_VERSION in versions else str(versions.index[0])
    table = keep(table, table["nccl_version"] == version, f"NCCL version not {version or 'empty'}")
    found = []
    for op, rows in table.groupby("op"):
        if op in REDUCING:
            dtype = "half" if (rows["dtype"] == "half").any() else rows["dtype"].iloc[0]
            rows = keep(rows, rows["dtype"] == dtype, f"reductions in another dtype than {dtype}")
        times = rows.groupby(["num_gpus", "bytes"])["latency_ms"].agg(["median", "max", "min"]).reset_index()
        found.append(
            Points(
                op=str(op),
                ranks_N=times["num_gpus"].to_numpy(np.int64),
                bytes_N=times["bytes"].to_numpy(np.float64),
                time_s_N=times["median"].to_numpy(np.float64) * 1e-3,
                spread_N=(times["max"] / times["min"] - 1).to_numpy(np.float64),
            )
        )
    return found, version, +left_out
