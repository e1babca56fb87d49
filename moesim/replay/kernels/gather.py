"""From tokens to events: the distinct experts of every step and layer, ascending."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.jit import compiled

FEW = 24  # so many distinct experts are sorted by insertion; more are found by walking through all experts


def gather(ids_TLK: NDArray[np.uint16], bounds_S: NDArray[np.int64], experts: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(experts_A, starts_N) of the steps `bounds_S[s]:bounds_S[s+1]`, step-major. 65535 is no selection."""
    room = int((np.diff(bounds_S) * ids_TLK.shape[2]).clip(max=experts).sum()) * ids_TLK.shape[1]
    flat_A = np.empty(room, np.int32)
    starts_N = np.zeros((len(bounds_S) - 1) * ids_TLK.shape[1] + 1, np.int64)
    used = _gather(ids_TLK, bounds_S, experts, flat_A, starts_N)
    return flat_A[:used].copy(), starts_N


@compiled
def _gather(ids_TLK: NDArray[np.uint16], bounds_S: NDArray[np.int64], experts: int, flat_A: NDArray[np.int32], starts_N: NDArray[np.int64]) -> int:
    layers, width = ids_TLK.shape[1], ids_TLK.shape[2]
    seen_E = np.full(experts, -1, np.int64)
    used, event = 0, 0
    for s in range(len(bounds_S) - 1):
        for layer in range(layers):
            begin = used
            for t in range(bounds_S[s], bounds_S[s + 1]):
                for k in range(width):
                    expert = ids_TLK[t, layer, k]
                    if expert < experts and seen_E[expert] != event:
                        seen_E[expert] = event
                        flat_A[used] = expert
                        used += 1
            if used - begin > FEW:
                used = begin
                for expert in range(experts):
                    if seen_E[expert] == event:
                        flat_A[used] = expert
                        used += 1
            else:
                for i in range(begin + 1, used):
                    expert, at = flat_A[i], i
                    while at > begin and flat_A[at - 1] > expert:
                        flat_A[at] = flat_A[at - 1]
                        at -= 1
                    flat_A[at] = expert
            event += 1
            starts_N[event] = used
    return used
