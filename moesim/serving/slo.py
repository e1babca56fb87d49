"""Slo: what a request may take, and the share of requests that must keep to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.units import human, parse

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """Most seconds to the first token, per output token after it, and to the last; None: no limit. `share` must keep all."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None
    share: float = 0.99

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "latency_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"SLO {name}={value!r} must be finite seconds > 0")
        if not 0 < self.share <= 1:
            raise InputError(f"SLO share={self.share!r} must be above 0 and at most 1")

    @classmethod
    def parse(cls, text: str) -> Slo:
        """An SLO of a text such as "ttft=2s,tpot=50ms,share=95%"; InputError says what is not understood."""
        given: dict[str, float] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name not in ("ttft", "tpot", "latency", "share") or name in given:
                raise InputError(f"SLO {text!r}: {part!r} is not understood; write for example ttft=2s,tpot=50ms,share=95%")
            try:
                given[name] = parse(value, "1" if name == "share" else "s")
            except ValueError as problem:
                raise InputError(f"SLO {text!r}: {name}: {problem}") from None
        if not set(given) - {"share"}:
            raise InputError(f"SLO {text!r} sets no limit; write for example ttft=2s,tpot=50ms")
        return cls(**{name if name == "share" else f"{name}_s": value for name, value in given.items()})

    def met(self, ttft_s_R: Floats, tpot_s_R: Floats, latency_s_R: Floats) -> NDArray[np.bool_]:
        """[R] whether each request kept every limit; a request that was not served (NaN) did not. One output token has no TPOT."""
        good = np.isfinite(latency_s_R)
        for limit, values in ((self.ttft_s, ttft_s_R), (self.latency_s, latency_s_R)):
            if limit is not None:
                good = good & (values <= limit)
        if self.tpot_s is not None:
            good = good & ((tpot_s_R <= self.tpot_s) | (np.isnan(tpot_s_R) & np.isfinite(latency_s_R)))
        return np.asarray(good)

    def __str__(self) -> str:
        limits = [f"{name} <= {human(value, 's')}" for name in ("ttft", "tpot", "latency") if (value := getattr(self, f"{name}_s")) is not None]
        return f"{', '.join(limits) or 'no limit'} for {self.share:.4g} of requests"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {item.name: getattr(self, item.name) for item in fields(self)}
