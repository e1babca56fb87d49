"""The batch loop: requests through ranks, step by step, compiled. Times only; what the numbers mean is decided outside.

A pool is a set of equal ranks; `width` consecutive ranks are a group, whose steps begin and end together. Pool 0 serves
requests (or decodes, where there is a pool 1), pool 1 only computes prompts. Each rank schedules as vLLM V1 does:
running requests first, in the order they came, then waiting ones, within a budget of tokens and of key-value blocks; who
finds no block sends the youngest running request back to the queue, to be computed again.

Import only from inside functions: numba costs a quarter of a second. numba notices no edit in a called function: delete
`__pycache__` after one. Suffixes: R requests, W ranks of both pools, Z stages, X laws (2*stage + pool), B token counts, U units of prompts,
D draws, M (0 decode, 1 prompt), H windows of the mix, C changes, N intervals of the time series.
"""

from moesim.serving.kernel.loop import run
from moesim.serving.kernel.state import BINS, NONE, Changes, Found, Laws, Ranks, Requests, Stages

__all__ = ["BINS", "NONE", "Changes", "Found", "Laws", "Ranks", "Requests", "Stages", "run"]
