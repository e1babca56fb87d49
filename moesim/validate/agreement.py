"""How well predictions agree with measurements: errors, and whether placements are ranked right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def errors(predicted: ArrayLike, measured: ArrayLike) -> dict[str, Any]:
    """n, median_ape, p90_ape, p99_ape, mape, bias (mean signed) and worst, as fractions of the measurement."""
    p, m = np.asarray(predicted, np.float64).ravel(), np.asarray(measured, np.float64).ravel()
    signed = p / m - 1
    size = np.abs(signed)
    return {
        "n": len(size),
        "median_ape": float(np.median(size)),
        "p90_ape": float(np.quantile(size, 0.9)),
        "p99_ape": float(np.quantile(size, 0.99)),
        "mape": float(size.mean()),
        "bias": float(signed.mean()),
        "worst": float(signed[size.argmax()]),
    }


def ranking(names: list[str], predicted_s: ArrayLike, measured_s: ArrayLike, noise: float) -> dict[str, Any]:
    """Whether the plan predicted fastest is, with Spearman's and Kendall's correlation and the regret of choosing it.

    `noise` is the relative standard error of a plan's measured time; a spread between plans below twice that cannot be
    ranked by anybody, and the verdict says so. Times are [plans], seconds.
    """
    from scipy.stats import kendalltau, spearmanr

    p, m = np.asarray(predicted_s, np.float64), np.asarray(measured_s, np.float64)
    spread = float(m.max() / m.min() - 1)
    distinct = len(m) > 1 and len(set(p.tolist())) > 1 and len(set(m.tolist())) > 1
    spearman = float(spearmanr(p, m).statistic) if distinct else None
    regret = float(m[p.argmin()] / m.min() - 1)
    if not distinct:
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
        "kendall": float(kendalltau(p, m).statistic) if distinct else None,
        "top1_regret": regret,
        "spread": spread,
        "noise_floor": noise,
        "verdict": verdict,
    }
