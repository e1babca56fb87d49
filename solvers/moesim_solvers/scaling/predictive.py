"""predictive: a forecast with its own errors, and the cheapest plan for it, again in every interval.

Suffixes: N intervals, C sizes, H intervals ahead, Q scenarios.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Progress, Status
from moesim.optimize.scaling import ScalingProblem, ScalingSolution
from moesim_solvers.scaling.reactive import enough

Floats = NDArray[np.float64]

AHEAD = 8  # intervals planned ahead
SCENARIOS = 33
MEMORY = 192  # errors remembered
DAYS, RECENT = 5, 12  # days averaged; intervals the level is taken from
LEVEL, FADE = 0.25, 0.95  # weight of the newest of them; how fast a departure from the usual fades
SMOOTH, DAMP = 0.4, 0.8  # Holt's method: weights of the newest value; damping of the trend


def forecast(seen: Floats, season: int, ahead: int) -> Floats:
    """[H] demand of the next intervals: the mean of the last days, times how the last intervals compare with theirs.

    A seasonal mean with a multiplicative level that fades; before a day is over, Holt's linear method with a damped trend
    (Gardner and McKenzie 1985).
    """
    steps = np.arange(1, ahead + 1)
    if season and len(seen) >= season:
        usual = _usual(seen, season, len(seen) + np.arange(ahead))
        back = np.arange(max(season, len(seen) - RECENT), len(seen))
        before = _usual(seen, season, back)
        weight = (1 - LEVEL) ** np.arange(len(back))[::-1]
        ratio = float((weight * seen[back]).sum() / (weight * before).sum()) if (weight * before).sum() > 0 else 1.0
        return np.asarray(usual * (1 + (min(ratio, 4.0) - 1) * FADE ** (steps - 1)))
    if not len(seen):
        return np.zeros(ahead)
    level, trend = float(seen[0]), 0.0
    for value in seen[-MEMORY:]:
        before_level = level
        level = SMOOTH * float(value) + (1 - SMOOTH) * (level + DAMP * trend)
        trend = SMOOTH * (level - before_level) + (1 - SMOOTH) * DAMP * trend
    return np.asarray(np.maximum(level + trend * np.cumsum(DAMP**steps), 0.0))


def _usual(seen: Floats, season: int, at_H: NDArray[np.int64]) -> Floats:
    """Mean of the same intervals of up to `DAYS` days before, of those that were seen."""
    earlier_DH = at_H[None] - season * np.arange(1, DAYS + 1)[:, None]
    # more than a season ahead, the day before is not seen yet
    good_DH = (earlier_DH >= 0) & (earlier_DH < len(seen))
    values_DH = np.where(good_DH, seen[np.clip(earlier_DH, 0, len(seen) - 1)], 0.0)
    return np.asarray(values_DH.sum(axis=0) / np.maximum(good_DH.sum(axis=0), 1))


class Predictive:
    """Forecasts from the days before, plans for the errors it made.

    Takes the first step of the plan that is cheapest on average over those errors; before a day is over it follows level and trend.

    Learns online, so the first day is no better than guessing; where tomorrow is not like today it can lose to `reactive`.
    """

    name = "predictive"
    solves = "scaling"
    capabilities = frozenset({Capability.CAUSAL})
    requires: tuple[str, ...] = ()

    def solve(self, problem: ScalingProblem, *, seed: int, time_limit_s: float, progress: Progress) -> ScalingSolution:
        """One pass; the size of interval n depends on demand before n alone. Out of time it keeps its last size."""
        stop_s = time.monotonic() + time_limit_s
        seen, known = np.concatenate([problem.history_N, problem.demand_N]), len(problem.history_N)
        intervals, status = len(problem.demand_N), Status.FEASIBLE
        size_N = np.zeros(intervals, np.int64)
        size = problem.start
        errors: list[float] = []
        for back in range(min(MEMORY, known - 1), 0, -1):
            errors.append(_error(seen[: known - back], problem.season, seen[known - back]))
        for n in range(intervals):
            if time.monotonic() > stop_s:
                size_N[n:], status = size if size is not None else int(problem.capacity_C.argmax()), Status.TIME_LIMIT
                break
            past = seen[: known + n]
            if not len(past):
                size = size if size is not None else int(problem.capacity_C.argmax())
            elif not errors:
                size = enough(problem, float(past[-1]))
            else:
                size = _first_step(problem, forecast(past, problem.season, min(AHEAD, intervals - n)), np.asarray(errors[-MEMORY:]), size)
            size_N[n] = size
            if len(past):
                errors.append(_error(past, problem.season, seen[known + n]))
            if n % 64 == 0:
                progress(n / intervals, "")
        return ScalingSolution(status=status, size_N=size_N, seed=seed)


def _error(past: Floats, season: int, came: float) -> float:
    """Logarithm of what came over what was forecast."""
    expected = float(forecast(past, season, 1)[0])
    return float(np.log((came + 1e-9) / (expected + 1e-9))) if max(came, expected) > 0 else 0.0


def _first_step(problem: ScalingProblem, demand_H: Floats, errors: Floats, size: int | None) -> int:
    factor_Q = np.exp(np.clip(np.quantile(errors, (np.arange(SCENARIOS) + 0.5) / SCENARIOS), -3, 3))
    stage_HCC = problem.stage(demand_H[:, None] * factor_Q[None]).mean(axis=1)
    later_C = np.zeros(len(problem.devices_C))
    for stage_CC in stage_HCC[:0:-1]:
        later_C = (stage_CC + later_C[None]).min(axis=1)
    now_C = (np.diagonal(stage_HCC[0]) if size is None else stage_HCC[0][size]) + later_C
    return int(now_C.argmin())
