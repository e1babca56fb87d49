"""How well predictions agree with measurements: errors, and whether placements are ranked right."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DRAWS = 1000


def errors(predicted: ArrayLike, measured: ArrayLike) -> dict[str, Any]:
    """n, median_ape, p90_ape, p99_ape, mape, bias (mean signed) and worst, as fractions of the measurement.

    interval: 95 % bootstrap interval of the median over cases (not repeats).
    """
    p, m = np.asarray(predicted, np.float64).ravel(), np.asarray(measured, np.float64).ravel()
    signed = p / m - 1
    size = np.abs(signed)
    drawn = np.median(size[np.random.default_rng(0).integers(0, len(size), (_DRAWS, len(size)))], axis=1) if len(size) <= 4096 else None
    return {
        "n": len(size),
        "median_ape": float(np.median(size)),
        "p90_ape": float(np.quantile(size, 0.9)),
        "p99_ape": float(np.quantile(size, 0.99)),
        "mape": float(size.mean()),
        "bias": float(signed.mean()),
        "worst": float(signed[size.argmax()]),
        "interval": None if drawn is None else [float(x) for x in np.quantile(drawn, [0.025, 0.975])],
    }


def errors_by(keys: Sequence[Hashable], predicted: ArrayLike, measured: ArrayLike) -> dict[str, dict[str, Any]]:
    """`errors` of the cases of each key, in the order of first appearance."""
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    found = {}
    for key in dict.fromkeys(keys):
        chosen = np.array([other == key for other in keys])
        found[str(key)] = errors(p[chosen], m[chosen])
    return found


def correlation(predicted: ArrayLike, measured: ArrayLike) -> tuple[float | None, float | None]:
    """Spearman's and Kendall's rank correlation; None where one side is constant."""
    from scipy.stats import kendalltau, spearmanr

    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if len(m) < 2 or len(set(p.tolist())) < 2 or len(set(m.tolist())) < 2:
        return None, None
    return float(spearmanr(p, m).statistic), float(kendalltau(p, m).statistic)


def ranking(names: list[str], predicted_s: ArrayLike, measured_s: ArrayLike, noise: float) -> dict[str, Any]:
    """Whether the plan predicted fastest is, with Spearman's and Kendall's correlation and the regret of choosing it.

    `noise` is the relative standard error of a plan's measured time; a spread between plans below twice that cannot be
    ranked by anybody, and the verdict says so. Times are [plans], seconds.
    """
    p, m = np.asarray(predicted_s, np.float64), np.asarray(measured_s, np.float64)
    spread = float(m.max() / m.min() - 1)
    spearman, kendall = correlation(p, m)
    regret = float(m[p.argmin()] / m.min() - 1)
    if spearman is None:
        verdict = "one plan, or equal times: nothing to rank"
    elif spread <= 2 * noise:
        verdict = f"the plans differ by {spread:.1%}, within twice the noise of {noise:.1%}: no ranking can be right or wrong"
    elif regret <= noise:
        verdict = f"the plan predicted fastest is fastest to within the noise of {noise:.1%}; rank correlation {spearman:.2f}"
    else:
        verdict = f"the plan predicted fastest is {regret:.1%} slower than the best; rank correlation {spearman:.2f}"
    return {
        "plans": [{"name": name, "predicted_s": float(a), "measured_s": float(b)} for name, a, b in zip(names, p, m, strict=True)],
        "spearman": spearman,
        "kendall": kendall,
        "top1_regret": regret,
        "spread": spread,
        "noise_floor": noise,
        "verdict": verdict,
    }


def rank_order(predicted_s: NDArray[np.float64], measured_s: NDArray[np.float64], halves_s: ArrayLike) -> dict[str, Any]:
    """Rank correlation over single ranks' times, and whether their spread (P90 over P10) is beyond twice their noise.

    halves_s [ranks, 2]: times by each half of the repeats. noise_floor is how far these are apart (median over ranks),
    reliability their rank correlation: how well the measurement ranks itself.
    """
    halves = np.asarray(halves_s, np.float64).reshape(-1, 2).T
    noise, reliability = float(np.median(np.abs(halves[0] / halves[1] - 1))), correlation(*halves)[0]
    spearman, kendall = correlation(predicted_s, measured_s)
    low, high = np.quantile(measured_s, [0.1, 0.9])
    spread = float(high / low - 1)
    if spearman is None or reliability is None:
        verdict = "one rank, or equal times: nothing to rank"
    elif spread <= 2 * noise:
        verdict = f"ranks' times differ by {spread:.1%}, within twice their noise of {noise:.1%}: their order says nothing"
    else:
        verdict = (
            f"ranks' times differ by {spread:.1%}, beyond their noise of {noise:.1%}; rank correlation {spearman:.2f}, "
            f"two halves of the repeats among themselves {reliability:.2f}"
        )
    return {"spearman": spearman, "kendall": kendall, "spread": spread, "noise_floor": noise, "reliability": reliability, "verdict": verdict}
