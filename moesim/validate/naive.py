"""The naive peer: a rank's time is a + b x selections, whatever the experts. What a token-count model can explain."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray


def tokens_only(table: pd.DataFrame, selections: ArrayLike) -> NDArray[np.float64]:
    """Seconds for each number of selections, fitted to a calibration table (least relative squares, a and b >= 0)."""
    from scipy.optimize import nnls

    n = (table["num_tokens"] * table["topk"]).to_numpy(float)
    seconds = table["latency_ms"].to_numpy(float) / 1e3
    (a, b), _ = nnls(np.stack([np.ones_like(n), n], axis=1) / seconds[:, None], np.ones(len(n)))
    return np.asarray(a + b * np.asarray(selections, np.float64))
