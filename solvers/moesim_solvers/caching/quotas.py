"""Slots over layers: equal, by marginal gain, and by an integer program. Pure functions of cost curves.

cost_LC is what a layer costs with c = 0 .. C-1 slots, limit_L the most slots a layer can use, `slots` what all layers share.
Suffixes: L layers (of one device), C cache sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE = 1e-9  # relative gap at which an integer program is closed
SURE = 2.0  # standard errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """Slots of each layer, what they cost, and what no division of the slots gets below."""

    slots_L: Ints
    cost: float
    bound: float

    @property
    def optimal(self) -> bool:
        """Whether cost and bound meet."""
        return self.cost - self.bound <= 2 * TOLERANCE * max(abs(self.cost), 1e-300)


def cost_of(cost_LC: Floats, slots_L: Ints) -> float:
    """Sum of the layers' costs at their slots."""
    return float(cost_LC[np.arange(len(cost_LC)), slots_L].sum())


def equal(limit_L: Ints, slots: int) -> Ints:
    """Slots shared equally; what a layer cannot use goes to the others, an indivisible rest to the first layers."""
    slots_L = np.zeros(len(limit_L), np.int64)
    left = min(slots, int(limit_L.sum()))
    while left:
        open_ = np.flatnonzero(slots_L < limit_L)
        each = max(1, left // len(open_))
        given = np.minimum(limit_L[open_] - slots_L[open_], each)[: left if each == 1 else None]
        slots_L[open_[: len(given)]] += given
        left -= int(given.sum())
    return slots_L


def spread(quota: Quota, cost_LC: Floats, limit_L: Ints, slots: int) -> Quota:
    """Slots that save nothing on the learnt tokens shared equally, for others, unless they cost something there."""
    slots_L = quota.slots_L + equal(limit_L - quota.slots_L, slots - int(quota.slots_L.sum()))
    cost = cost_of(cost_LC, slots_L)
    return replace(quota, slots_L=slots_L, cost=cost) if cost <= quota.cost else quota


def marginal(cost_LC: Floats, limit_L: Ints, slots: int) -> Quota:
    """Steps of the lower convex hulls, steepest first; optimal where the curves are convex (every step is one slot then).

    The bound is the linear relaxation: the same steps, the first that does not fit taken in part (Sinha and Zoltners 1979).
    """
    steps: list[tuple[float, int, int, int]] = []  # slope, layer, from, to
    for layer, limit in enumerate(limit_L.tolist()):
        corners = _hull(cost_LC[layer, : limit + 1])
        for a, b in pairwise(corners):
            steps.append(((cost_LC[layer, b] - cost_LC[layer, a]) / (b - a), layer, a, b))
    slots_L, left = np.zeros(len(limit_L), np.int64), slots
    relaxed = float(cost_LC[:, 0].sum())
    room = float(slots)  # of the relaxation
    for slope, layer, a, b in sorted(steps):
        if slope >= 0:
            break
        relaxed += slope * min(room, b - a)
        room -= min(room, b - a)
        if slots_L[layer] == a and b - a <= left:
            slots_L[layer], left = b, left - (b - a)
    while left:  # what no whole step used: the best single layer to give some of it to
        best = (0.0, 0, 0)
        for layer, limit in enumerate(limit_L.tolist()):
            here = int(slots_L[layer])
            reach = cost_LC[layer, here + 1 : min(limit, here + left) + 1] - cost_LC[layer, here]
            if reach.size and reach.min() < best[0]:
                best = (float(reach.min()), layer, int(reach.argmin()) + 1)
        if not best[2]:
            break
        slots_L[best[1]] += best[2]
        left -= best[2]
    cost = cost_of(cost_LC, slots_L)
    return Quota(slots_L=slots_L, cost=cost, bound=min(relaxed, cost))


def _hull(cost_C: Floats) -> list[int]:
    """Corners of the lower convex hull of a curve, from its left end to its lowest point."""
    corners: list[int] = []
    for c in range(int(cost_C.argmin()) + 1):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (cost_C[b] - cost_C[a]) * (c - a) <= (cost_C[c] - cost_C[a]) * (b - a):
                break
            corners.pop()
        corners.append(c)
    return corners


def integer(cost_LC: Floats, limit_L: Ints, slots: int, *, time_limit_s: float) -> Quota:
    """The multiple-choice knapsack by PuLP and HiGHS, for curves of any shape:

        min Σ_lc cost_lc·x_lc,   Σ_c x_lc = 1 for every layer,   Σ_lc c·x_lc <= slots,   x binary

    Starts from `marginal` and is skipped where that is proved optimal; out of time, the better of the two stays. A size is
    left out when a smaller one costs no more.
    """
    import pulp

    start = marginal(cost_LC, limit_L, slots)
    if start.optimal or time_limit_s <= 0:
        return start
    model = pulp.LpProblem("quota", pulp.LpMinimize)
    unit = max(float(cost_LC[:, 0].sum()), 1e-300)  # solvers like numbers near one
    x = {
        (layer, c): model.add_variable(f"x_{layer}_{c}", cat="Binary")
        for layer, limit in enumerate(limit_L.tolist())
        for c in _undominated(cost_LC[layer, : min(limit, slots) + 1])
    }
    model += pulp.lpSum(float(cost_LC[key]) / unit * var for key, var in x.items())
    for layer in range(len(limit_L)):
        model += pulp.lpSum(var for key, var in x.items() if key[0] == layer) == 1
    model += pulp.lpSum(c * var for (_, c), var in x.items()) <= slots
    model.solve(pulp.getSolver("HiGHS", msg=False, timeLimit=time_limit_s, threads=1, gapRel=TOLERANCE, random_seed=0))
    found = start
    if model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        slots_L = np.zeros(len(limit_L), np.int64)
        for (layer, c), var in x.items():
            if var.value() > 0.5:
                slots_L[layer] = c
        cost = cost_of(cost_LC, slots_L)
        closed = model.sol_status == pulp.LpSolutionOptimal
        if cost < start.cost or closed:
            best_L = slots_L if cost < start.cost else start.slots_L
            cost = min(cost, start.cost)
            found = Quota(slots_L=best_L, cost=cost, bound=cost if closed else start.bound)
    return found


def certain(cost_BLC: Floats, limit_L: Ints, slots: int, *, sure: float = SURE) -> Ints:
    """Equal slots, moved one at a time from layer to layer as long as the gain is sure: in the mean over B parts of the steps
    more than `sure` standard errors above nothing. The surest move comes first; of one part nothing is sure."""
    slots_L = equal(limit_L, slots)
    parts, layers = cost_BLC.shape[:2]
    at = np.arange(layers)
    while parts > 1:
        more_BL = cost_BLC[:, at, slots_L] - cost_BLC[:, at, np.minimum(slots_L + 1, limit_L)]
        less_BL = cost_BLC[:, at, np.maximum(slots_L - 1, 0)] - cost_BLC[:, at, slots_L]
        least_LL = lower_bound(more_BL[:, :, None] - less_BL[:, None, :], sure)
        least_LL[slots_L >= limit_L] = least_LL[:, slots_L <= 0] = least_LL[at, at] = -np.inf
        to, giver = np.unravel_index(int(least_LL.argmax()), least_LL.shape)
        if least_LL[to, giver] <= 0:
            break
        slots_L[to] += 1
        slots_L[giver] -= 1
    return slots_L


def lower_bound(gain_B: Floats, sure: float) -> Floats:
    """Mean over parts (the first axis) less `sure` standard errors of it."""
    return np.asarray(gain_B.mean(axis=0) - sure * gain_B.std(axis=0, ddof=1) / np.sqrt(len(gain_B)))


def _undominated(cost_C: Floats) -> list[int]:
    lowest = np.minimum.accumulate(cost_C)
    return [0, *(c for c in range(1, len(cost_C)) if cost_C[c] < lowest[c - 1])]
