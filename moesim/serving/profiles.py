"""Measured MoE layers: time of one layer on one device from tokens and activated experts, as engines profile it.

A table (CSV: tokens, activated_experts, time_us) of a layer that gives every token top-k of the activated experts. Between
cells: by line in tokens at each measured number of experts, then by line in experts. A device of an expert-parallel layer does
the work of selections / top-k tokens on the distinct experts its tokens chose.

    fewer tokens than measured   the smallest measured count: weights set the time
    more tokens, more experts    the line through the last two cells goes on, and the case is called extrapolated
    weights that fit the cache   such rows (activated*expert bytes below the device's cache) were timed on weights already there,
                                 which never happens in a model of many layers: replaced by the line through larger numbers
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError
from moesim.files import digest

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeProfile:
    """Columns of one number of activated experts each, rising: measured tokens (rising) and seconds."""

    active_C: Floats
    tokens_C: tuple[Floats, ...]
    time_s_C: tuple[Floats, ...]
    name: str
    digest: str
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path, *, expert_B: float, cache_B: float | None) -> MoeProfile:
        """A table of a model whose experts have `expert_B` bytes, measured on a device with `cache_B` bytes of last-level cache.

        Raises InputError when columns are missing, a number is not positive, or too few experts counts are left for a line.
        """
        from moesim.serving.formats import measured_columns

        names = ("tokens", "activated_experts", "time_us")
        columns = measured_columns(path, names)
        for name in names:
            good = np.isfinite(columns[name]) & (columns[name] > 0)
            if not good.all():
                row = int(np.argmin(good))
                raise InputError(f"{path}: row {row + 1}: {name} is {columns[name][row]}; expected a number > 0")
        tokens, active, time_s = columns["tokens"], columns["activated_experts"], columns["time_us"] * 1e-6
        counts = np.unique(active)
        cold = counts * expert_B > (cache_B or 0.0)
        if cold.sum() < 2:
            raise InputError(f"{path}: {int(cold.sum())} numbers of activated experts exceed the device's cache; measure at least two")
        rows = [np.flatnonzero(active == count) for count in counts[cold]]
        rows = [row[np.argsort(tokens[row], kind="stable")] for row in rows]
        if any(len(np.unique(tokens[row])) < len(row) for row in rows):
            raise InputError(f"{path}: a pair of tokens and activated_experts occurs twice; keep one row each")
        warm = int((~cold).sum())
        notes: tuple[str, ...] = (f"expert times: measured layer {Path(path).name}",)
        if warm:
            listed = ", ".join(f"{count:g}" for count in counts[~cold])
            notes += (f"expert times: rows with {listed} activated experts fit the cache and were replaced by a line",)
        return cls(
            active_C=counts[cold],
            tokens_C=tuple(tokens[row] for row in rows),
            time_s_C=tuple(time_s[row] for row in rows),
            name=Path(path).name,
            digest=digest(*(array.tobytes() for array in (tokens, active, time_s))),
            notes=notes,
        )

    def time_s(self, tokens_N: ArrayLike, active_N: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
        """Seconds, and whether they are extrapolated, of layers with these tokens and activated experts; 0 for none."""
        tokens, active = np.broadcast_arrays(np.asarray(tokens_N, np.float64), np.asarray(active_N, np.float64))
        column_CN = np.stack([_line(tokens, *column) for column in zip(self.tokens_C, self.time_s_C, strict=True)])
        low = np.clip(np.searchsorted(self.active_C, active, side="right") - 1, 0, len(self.active_C) - 2)
        left, right = (np.take_along_axis(column_CN, (low + i)[None], axis=0)[0] for i in (0, 1))
        share = (active - self.active_C[low]) / (self.active_C[low + 1] - self.active_C[low])
        time = np.where((tokens > 0) & (active > 0), np.maximum(left + (right - left) * share, 0.0), 0.0)
        return time, (tokens > max(column[-1] for column in self.tokens_C)) | (active > self.active_C[-1])


def _line(x: Floats, points: Floats, values: Floats) -> Floats:
    """Piecewise linear; flat before the first point, the last slope beyond the last."""
    found = np.interp(x, points, values)
    if len(points) > 1:
        slope = max(0.0, (values[-1] - values[-2]) / (points[-1] - points[-2]))
        found = np.where(x > points[-1], values[-1] + slope * (x - points[-1]), found)
    return np.asarray(found)
