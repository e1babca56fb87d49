"""bits-ilp: where each expert lives and with how many bits, in one integer program.

    x_ej = 1 if expert e takes choice j, a tier and a number of bits;   Σ_j x_ej = 1
    Σ bytes of a device's experts in hbm <= its budget,   Σ bytes in a tier <= its room,   Σ noise·weight <= most_loss
    first   min Σ ((asked_e + ½) / steps · copy_j + rent_j)·x_ej  seconds a step waits, and what the memories cost, in seconds of the cluster
    then    min Σ noise_j·weight_e·x_ej                          among the answers that are as good

J choices, N experts of all layers.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Capability, Progress, Status
from moesim.optimize.caching import CacheProblem, CacheSolution
from moesim.optimize.tiers import noise
from moesim.plan import TIERS
from moesim.plan.cache import HBM

Floats = NDArray[np.float64]

TOLERANCE = 1e-6  # relative
LEAST_S = 0.05  # a program with less time than this does not start


class BitsIlp:
    """Tier and bits of every expert by an integer program: nothing moves, what is hot or matters is kept near and exact.

    Pinned experts alone, no slots for others: good where few experts take most of the load, or where memory holds all of them
    with fewer bits. Quality is a proxy (`CacheProblem.loss`): limit it with `most_loss`.
    """

    name = "bits-ilp"
    solves = "caching"
    capabilities = frozenset({Capability.HETEROGENEOUS, Capability.EXACT})
    requires: tuple[str, ...] = ("numba", "highspy")

    def solve(self, problem: CacheProblem, *, seed: int, time_limit_s: float, progress: Progress) -> CacheSolution:
        """Optimal when both programs are closed. The objective is that of the first; notes give the loss."""
        stop_s = time.monotonic() + time_limit_s
        choices = [(tier, bits) for tier in (HBM, *(TIERS.index(tier.name) for tier in problem.tiers)) for bits in problem.bits]
        wait_NJ, loss_NJ = costs(problem, choices)
        rows, limits = limits_of(problem, choices, loss_NJ)
        best = _solve(wait_NJ, rows, limits, stop_s - time.monotonic())
        if best is None:
            return CacheSolution(
                status=Status.INFEASIBLE, plan=None, seed=seed, notes={"reason": f"no tiers and bits found within {problem.most_loss:.3g} of loss"}
            )
        pick_N, objective, bound, closed = best
        progress(0.5, "")
        unit = max(objective, float(wait_NJ.mean()), 1e-300)  # solvers like numbers near one
        second = _solve(
            loss_NJ, np.vstack([rows, wait_NJ.ravel() / unit]), np.append(limits, objective / unit + TOLERANCE), stop_s - time.monotonic()
        )
        if second is not None:
            pick_N, closed = second[0], closed and second[3]
        tier_N, bits_N = (np.asarray(column)[pick_N] for column in zip(*choices, strict=True))
        tier_LE, bits_LE = tier_N.reshape(problem.asked_LE.shape), bits_N.reshape(problem.asked_LE.shape).astype(np.float64)
        pinned_LG = ((tier_LE == HBM)[:, None] & problem.plan.placement.holds_LGE).sum(axis=2)
        return CacheSolution(
            status=Status.OPTIMAL if closed else Status.TIME_LIMIT,
            plan=problem.answer(self.name, pinned_LG, tier_LE=tier_LE.astype(np.uint8), bits_LE=bits_LE),
            objective=float(wait_NJ[np.arange(len(pick_N)), pick_N].sum()),
            bound=bound,
            seed=seed,
            notes={"loss": problem.loss(bits_LE), "pinned": int(pinned_LG.sum())},
        )


def costs(problem: CacheProblem, choices: list[tuple[int, float]]) -> tuple[Floats, Floats]:
    """wait_NJ and loss_NJ of every expert and choice."""
    device_LE = problem.plan.placement.holds_LGE.argmax(axis=1)
    asked_N = (problem.asked_LE.ravel() + 0.5) / max(problem.steps, 1)  # what was never asked for may be yet (Jeffreys' prior)
    wait, loss = [], []
    for tier, bits in choices:
        size_B = problem.model.expert_parameters * bits / 8
        copy_G = np.array([problem.copy_s(tier, g, size_B) for g in range(problem.cluster.size)])
        wait.append(asked_N * copy_G[device_LE.ravel()] + problem.rent_s(tier, size_B))
        loss.append(problem.weight_LE.ravel() * noise(np.asarray(bits), problem.bits[0]))
    return np.stack(wait, axis=1), np.stack(loss, axis=1)


def limits_of(problem: CacheProblem, choices: list[tuple[int, float]], loss_NJ: Floats) -> tuple[Floats, Floats]:
    """Rows over all N·J variables and their upper limits: bytes of every device and tier, loss. A limit is at most 1 after scaling."""
    size_J = np.array([problem.model.expert_parameters * bits / 8 for _, bits in choices])
    tier_J = np.array([tier for tier, _ in choices])
    device_N = problem.plan.placement.holds_LGE.argmax(axis=1).ravel()
    rows, limits = [], []
    for g, budget_B in enumerate(problem.budget_B_G):
        rows.append(((device_N == g)[:, None] * (size_J * (tier_J == HBM))) / size_J.max())
        limits.append(budget_B / size_J.max())
    for tier in problem.tiers:
        rows.append(np.broadcast_to(size_J * (tier_J == TIERS.index(tier.name)), loss_NJ.shape) / size_J.max())
        limits.append(tier.capacity_B / size_J.max())
    if np.isfinite(problem.most_loss):
        scale = max(float(loss_NJ.max()), 1e-300)
        rows.append(loss_NJ / scale)
        limits.append(problem.most_loss / scale)
    return np.stack([row.ravel() for row in rows]), np.asarray(limits)


def _solve(cost_NJ: Floats, rows: Floats, limits: Floats, time_limit_s: float) -> tuple[NDArray[np.int64], float, float, bool] | None:
    """Choice of each expert, its cost, a bound and whether they meet; None without an answer in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    if time_limit_s < LEAST_S:
        return None
    experts, choices = cost_NJ.shape
    unit = max(float(cost_NJ.sum()), 1e-300)
    one = csr_array(kron(eye_array(experts), np.ones((1, choices))))
    found = milp(
        cost_NJ.ravel() / unit * experts,
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(csr_array(rows), -np.inf, limits)],
        integrality=np.ones(cost_NJ.size, np.int8),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": TOLERANCE, "time_limit": time_limit_s},
    )
    if found.x is None:
        return None
    pick_N = found.x.reshape(experts, choices).argmax(axis=1)
    cost = float(cost_NJ[np.arange(experts), pick_N].sum())
    bound = float(found.mip_dual_bound) * unit / experts if found.mip_dual_bound is not None else -np.inf
    return pick_N, cost, min(bound, cost), found.status == 0
