"""How a batch's tokens are split over replicas when all counts of the batch are known: the optimum, exactly.

LPLB (deepseek-ai/LPLB) states a linear program per batch: shares of each expert's replicas sum to its tokens, and the most
loaded device gets as few as possible. With whole tokens it is a semi-matching of experts to devices, which is optimal when
no path of reassignments leads from a device to one with at least two tokens less (Harvey, Ladner, Lovász, Tamir 2006); so it needs
no linear program, and its busiest device is within one token of the fractional optimum. E experts, P slots, G devices, S steps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.plan import Placement


def split_SLP(count_SLE: NDArray[np.integer], placement: Placement) -> NDArray[np.int64]:
    """Tokens [S, L, P] of each slot, so that the busiest device of every step and layer has as few as possible.

    `count_SLE` tokens that chose each expert. Among the best splits also the second busiest device has as few as possible, and
    so on (the semi-matching is optimal for every convex cost at once). Deterministic.
    """
    order_LP = np.argsort(placement.slots_LP, axis=1, kind="stable").astype(np.int64)
    ends_LE = np.cumsum(placement.replicas_LE, axis=1, dtype=np.int64)
    first_LE = np.concatenate([np.zeros((len(ends_LE), 1), np.int64), ends_LE], axis=1)
    counts_SLE = np.ascontiguousarray(count_SLE, np.int64)
    split = np.zeros((*counts_SLE.shape[:2], placement.slots_LP.shape[1]), np.int64)
    _kernel()(counts_SLE, placement.slots_LP, first_LE, order_LP, placement.device_P, np.concatenate([[0], np.cumsum(placement.slots_G)]), split)
    return split


@cache
def _kernel() -> Any:
    import numba

    @numba.njit(parallel=True, cache=True, nogil=True)
    def balance(count_SLE, expert_LP, first_LE, order_LP, device_P, start_G, split_SLP):  # type: ignore[no-untyped-def]
        steps, layers, experts = count_SLE.shape
        slots, devices = expert_LP.shape[1], len(start_G) - 1
        for case in numba.prange(steps * layers):
            step, layer = case // layers, case % layers
            load_G = np.zeros(devices, np.int64)
            given_P = split_SLP[step, layer]
            for e in range(experts):
                begin, end = first_LE[layer, e], first_LE[layer, e + 1]
                for r in range(begin, end):  # the even split to begin with
                    slot = order_LP[layer, r]
                    given_P[slot] = count_SLE[step, layer, e] // (end - begin) + (r - begin < count_SLE[step, layer, e] % (end - begin))
                    load_G[device_P[slot]] += given_P[slot]
            if slots == experts:
                continue
            from_G, by_G, queue_G = np.empty(devices, np.int64), np.empty(devices, np.int64), np.empty(devices, np.int64)
            done_G = np.zeros(devices, np.bool_)
            while True:
                source = -1
                for g in range(devices):
                    if not done_G[g] and (source < 0 or load_G[g] > load_G[source]):
                        source = g
                if source < 0:
                    break
                from_G[:] = -1
                from_G[source] = queue_G[0] = source
                head, tail = 0, 1
                while head < tail:  # devices that tokens of the source can be handed on to, in steps
                    g = queue_G[head]
                    head += 1
                    for slot in range(start_G[g], start_G[g + 1]):
                        if given_P[slot] > 0:
                            e = expert_LP[layer, slot]
                            for r in range(first_LE[layer, e], first_LE[layer, e + 1]):
                                h = device_P[order_LP[layer, r]]
                                if from_G[h] < 0:
                                    from_G[h], by_G[h], queue_G[tail] = g, e, h
                                    tail += 1
                target = source
                for g in range(devices):
                    if from_G[g] >= 0 and load_G[g] < load_G[target]:
                        target = g
                if load_G[source] - load_G[target] < 2:
                    for k in range(tail):  # what can be reached from there cannot improve either
                        done_G[queue_G[k]] = True
                    continue
                amount = (load_G[source] - load_G[target]) // 2
                h = target
                while h != source:
                    here = 0
                    for slot in range(start_G[from_G[h]], start_G[from_G[h] + 1]):
                        if expert_LP[layer, slot] == by_G[h]:
                            here += given_P[slot]
                    amount = min(amount, here)
                    h = from_G[h]
                h = target
                while h != source:
                    g, left = from_G[h], amount
                    for r in range(first_LE[layer, by_G[h]], first_LE[layer, by_G[h] + 1]):
                        slot = order_LP[layer, r]
                        if device_P[slot] == g:
                            part = min(left, given_P[slot])
                            given_P[slot] -= part
                            left -= part
                    for r in range(first_LE[layer, by_G[h]], first_LE[layer, by_G[h] + 1]):
                        slot = order_LP[layer, r]
                        if device_P[slot] == h:
                            given_P[slot] += amount
                            break
                    h = g
                load_G[source] -= amount
                load_G[target] += amount

    return balance
