"""Arrivals: when requests come and how long they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError
from moesim.files import digest

MOST_S = 1e9  # 30 years; beyond, a double no longer tells microseconds apart
MOST_TOKENS = 2**30  # of one request: above this a file is damaged


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefixes:
    """Which prompts begin alike: ids_A names the blocks of `tokens` tokens of all prompts, one after the other, starts_R (R+1) where
    each prompt's begin. Equal ids: the same tokens after the same tokens. Raises InputError for shapes that do not fit."""

    ids_A: NDArray[np.int64]
    starts_R: NDArray[np.int64]
    tokens: int

    def __post_init__(self) -> None:
        starts = self.starts_R
        if self.tokens < 1 or not len(starts) or starts[0] != 0 or starts[-1] != len(self.ids_A) or (np.diff(starts) < 0).any():
            raise InputError(f"prefix blocks of {self.tokens} tokens: starts must rise from 0 to the {len(self.ids_A)} ids")

    def take(self, rows: NDArray[np.integer]) -> Prefixes:
        """Those of some requests, in this order."""
        count_R = np.diff(self.starts_R)[rows]
        starts = np.concatenate([[0], np.cumsum(count_R)])
        place_A = np.repeat(self.starts_R[rows] - starts[:-1], count_R) + np.arange(starts[-1])
        return Prefixes(ids_A=self.ids_A[place_A], starts_R=starts, tokens=self.tokens)

    def copied(self, requests: int) -> Prefixes:
        """Those of the requests over and over, `requests` in all; a copy's prompts begin like others of it, not like those of other copies."""
        once = len(self.starts_R) - 1
        whole = self.take(np.arange(requests) % once)
        copy_A = np.repeat(np.arange(requests) // once, np.diff(whole.starts_R))
        names, number_A = np.unique(whole.ids_A, return_inverse=True)
        return replace(whole, ids_A=number_A + copy_A * len(names))


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrivals:
    """R requests in the order they arrive.

    arrival_s_R         seconds from the start of the run, >= 0, rising
    prompt_R, output_R  tokens, int64, >= 1
    prefixes            which prompts begin alike, where the log says it
    made_from           file and format, or generator with its parameters and seed
    notes               what was left out or repaired while reading

    Raises InputError naming the first request that is impossible.
    """

    arrival_s_R: NDArray[np.float64]
    prompt_R: NDArray[np.int64]
    output_R: NDArray[np.int64]
    prefixes: Prefixes | None = None
    name: str = "arrivals"
    made_from: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        arrival = np.ascontiguousarray(self.arrival_s_R, np.float64)
        if arrival.ndim != 1 or not len(arrival):
            raise InputError(f"{self.name}: holds no requests; give at least one")
        good = (arrival >= 0) & (arrival <= MOST_S)
        if not good.all():
            r = int(np.argmin(good))
            raise InputError(f"{self.name}: request {r} arrives at {arrival[r]} s; expected seconds of 0 to {MOST_S:g}")
        if (np.diff(arrival) < 0).any():
            r = int(np.argmax(np.diff(arrival) < 0)) + 1
            raise InputError(f"{self.name}: request {r} arrives before request {r - 1}; sort them, or use Arrivals.of")
        object.__setattr__(self, "arrival_s_R", arrival)
        for what in ("prompt_R", "output_R"):
            object.__setattr__(self, what, _tokens(getattr(self, what), len(arrival), f"{self.name}: {what}"))
        if self.prefixes is not None and len(self.prefixes.starts_R) != len(arrival) + 1:
            raise InputError(f"{self.name}: prefix blocks of {len(self.prefixes.starts_R) - 1} prompts for {len(arrival)} requests")

    @classmethod
    def of(
        cls,
        arrival_s: ArrayLike,
        prompt: ArrayLike,
        output: ArrayLike,
        *,
        prefixes: Prefixes | None = None,
        notes: tuple[str, ...] = (),
        **more: Any,
    ) -> Arrivals:
        """Arrivals in any order; they are sorted, and a note says how many came out of order."""
        times = np.asarray(arrival_s, np.float64)
        late = int((np.diff(times) < 0).sum()) if times.ndim == 1 else 0
        if not late:
            return cls(arrival_s_R=times, prompt_R=np.asarray(prompt), output_R=np.asarray(output), prefixes=prefixes, notes=notes, **more)
        order = np.argsort(times, kind="stable")
        notes = (*notes, f"{late} requests came before the one above them; they were sorted by arrival")
        return cls(
            arrival_s_R=times[order],
            prompt_R=np.asarray(prompt)[order],
            output_R=np.asarray(output)[order],
            prefixes=prefixes.take(order) if prefixes else None,
            notes=notes,
            **more,
        )

    def __len__(self) -> int:
        return len(self.arrival_s_R)

    @property
    def span_s(self) -> float:
        """Seconds from 0 to the last arrival."""
        return float(self.arrival_s_R[-1])

    @cached_property
    def digest(self) -> str:
        """Names the requests, wherever they came from."""
        alike = [self.prefixes.ids_A.tobytes(), self.prefixes.starts_R.tobytes()] if self.prefixes else []
        return digest(self.arrival_s_R.tobytes(), self.prompt_R.tobytes(), self.output_R.tobytes(), *alike)

    def between(self, start_s: float, end_s: float) -> Arrivals:
        """Requests that arrive in start_s <= t < end_s, counted from start_s."""
        low, high = np.searchsorted(self.arrival_s_R, [start_s, end_s])
        what = f"between {start_s:g} and {end_s:g} s"
        if low == high:
            raise InputError(f"{self.name}: no request arrives {what}; the last arrives at {self.span_s:g} s")
        part = self.take(np.arange(low, high), f"only requests {what}")
        return replace(part, arrival_s_R=part.arrival_s_R - start_s)

    def first(self, requests: int) -> Arrivals:
        """The first requests."""
        return self if requests >= len(self) else self.take(np.arange(requests), f"only the first {requests} requests")

    def take(self, rows: NDArray[np.integer], note: str) -> Arrivals:
        """Some requests by number, rising, at their times; the note says which."""
        return replace(
            self,
            arrival_s_R=self.arrival_s_R[rows],
            prompt_R=self.prompt_R[rows],
            output_R=self.output_R[rows],
            prefixes=self.prefixes.take(rows) if self.prefixes else None,
            notes=(*self.notes, note),
        )

    def copied(self, times_s: ArrayLike, name: str) -> Arrivals:
        """The requests over and over, one for each of these times, which need not rise; copies share nothing of their prompts."""
        times = np.asarray(times_s, np.float64)
        index, order = np.arange(len(times)) % len(self), np.argsort(times, kind="stable")
        return replace(
            self,
            arrival_s_R=times[order],
            prompt_R=self.prompt_R[index][order],
            output_R=self.output_R[index][order],
            prefixes=self.prefixes.copied(len(times)).take(order) if self.prefixes else None,
            name=name,
        )

    def times(self, factor: float) -> Arrivals:
        """The same requests, `factor` times as many in a second."""
        if not (np.isfinite(factor) and factor > 0):
            raise InputError(f"{self.name}: traffic factor {factor!r} must be finite and > 0")
        return replace(
            self, arrival_s_R=self.arrival_s_R / factor, notes=(*self.notes, f"traffic x {factor:g}: the same requests, their gaps divided by it")
        )

    def per_second(self, bin_s: float) -> NDArray[np.float64]:
        """[bins] requests per second of each interval of `bin_s` seconds from 0 to the last arrival."""
        bins = int(self.span_s // bin_s) + 1
        return np.asarray(np.bincount((self.arrival_s_R // bin_s).astype(np.int64), minlength=bins) / bin_s)

    def summary(self) -> dict[str, Any]:
        """What people ask first, JSON-ready."""
        gaps = np.diff(self.arrival_s_R)
        return {
            "requests": len(self),
            "span_s": self.span_s,
            "requests_per_s": len(self) / self.span_s if self.span_s > 0 else None,
            "gap_variation": float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else None,
            "prompt_tokens": _spread(self.prompt_R),
            "output_tokens": _spread(self.output_R),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the requests, JSON-ready."""
        return {"name": self.name, "digest": self.digest, **self.summary(), "made_from": dict(self.made_from), "notes": list(self.notes)}


def _spread(tokens_R: NDArray[np.int64]) -> dict[str, float]:
    p50, p99 = np.percentile(tokens_R, (50, 99))
    return {"mean": float(tokens_R.mean()), "p50": float(p50), "p99": float(p99), "sum": float(tokens_R.sum())}


def _tokens(values: ArrayLike, requests: int, what: str) -> NDArray[np.int64]:
    raw = np.asarray(values)
    if raw.shape != (requests,):
        raise InputError(f"{what} has shape {raw.shape} for {requests} requests; give one number each")
    good = np.isfinite(raw) & (raw >= 1) & (raw <= MOST_TOKENS) & (raw == np.floor(raw))
    if not good.all():
        r = int(np.argmin(good))
        raise InputError(f"{what}: request {r} has {raw[r]} tokens; expected a whole number of 1 to {MOST_TOKENS}")
    return np.ascontiguousarray(raw, np.int64)
