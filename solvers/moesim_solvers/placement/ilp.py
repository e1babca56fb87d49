"""ilp: load, co-activation, replicas and slots in one integer program, with a proved gap.

Objective of a layer, with s_ed the share of expert e's tokens served at device (or node) d, evenly split over replicas:

    busy · max_g load_g / mean + Σ over devices, then nodes, of price · Σ_d r_d / T
    r_d = max over m = 1 .. K - 1 of 2 / (m + 1) · Σ_e n_e s_ed - 2 / (m (m + 1)) · Σ_{e<f} n_ef min(s_ed, s_fd), at least 0

n_e tokens chose e, n_ef both e and f. r_d is at most the number of tokens sent to d (Dawson and Sankoff 1967: line m touches
"at least one" where m or m + 1 of a token's K experts are at d), and equal to it for K = 2 without replicas. So what is
proved for this objective also bounds the true price from below. E experts, P slots, G devices, D destinations, C columns.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.optimize import Apart, Capability, Pin, Problem, Progress, Solution, Status
from moesim.optimize.constraints import tables
from moesim_solvers.placement.bounds import load_floor_L, load_ratio_L, price_floor, price_L
from moesim_solvers.placement.greedy import greedy_slots
from moesim_solvers.placement.limits import limits_of, overfull

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE = 1e-6  # relative: closer than this is optimal
MOST_COLUMNS = 20_000  # sets of experts that fit a device, if all are listed
FEW_COLUMNS = 250  # HiGHS closes this many at once
MOST_COMMON = 100_000  # variables min(s_ed, s_fd); more do not get through the first linear program in minutes
LEAST_S = 0.05  # a program with less time than this does not start


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer's program: tokens choose `width` experts; `together_EE` has a zero diagonal; prices are relative to each other."""

    load_E: Floats
    together_EE: Floats
    tokens: int
    width: int
    slots_G: Ints
    node_G: Ints
    busy: float
    fanout: float
    node_fanout: float
    rules: tuple[Pin | Apart, ...] = ()

    @property
    def groups(self) -> list[tuple[float, Ints, Ints]]:
        """(price, destination of each device, slots of each destination) of the priced kinds of destination."""
        kinds = [(self.fanout, np.arange(len(self.slots_G))), (self.node_fanout, self.node_G)]
        return [(price, at_G, np.bincount(at_G, self.slots_G).astype(np.int64)) for price, at_G in kinds if price > 0]

    @property
    def lines(self) -> list[tuple[float, float]]:
        """Factors of single and joint counts in the bounds on tokens served, m = 1 .. K - 1."""
        return [(2 / (m + 1), 2 / (m * (m + 1))) for m in range(1, max(self.width, 2))]

    def reach(self, single: Floats, joint: Floats) -> Floats:
        """Share of tokens that destinations with these counts serve, at least."""
        best = np.max([one * single - two * joint for one, two in self.lines], axis=0)
        return np.asarray(np.maximum(best, 0.0) / max(self.tokens, 1))

    def price(self, slots_P: Ints) -> float:
        """The objective of these slots."""
        count_E = np.bincount(slots_P, minlength=len(self.load_E))
        total = self.busy * float(load_ratio_L(self.load_E[None], slots_P[None], self.slots_G)[0])
        for price, at_G, slots_D in self.groups:
            share_ED = np.zeros((len(self.load_E), len(slots_D)))
            np.add.at(share_ED, (slots_P, np.repeat(at_G, self.slots_G)), 1 / count_E[slots_P])
            joint_D = np.array([(self.together_EE * np.minimum.outer(share_E, share_E)).sum() / 2 for share_E in share_ED.T])
            total += price * float(self.reach(self.load_E @ share_ED, joint_D).sum())
        return total

    def floor(self) -> float:
        """A bound without any program: the load floor, and for every expert its best company (Σ_d s_ed = 1, Σ max >= max Σ)."""
        best_EE = np.cumsum(-np.sort(-self.together_EE, axis=1), axis=1)
        total = self.busy * float(load_floor_L(self.load_E[None], self.slots_G)[0])
        for price, _, slots_D in self.groups:
            company = min(int(slots_D.max()), len(self.load_E)) - 1
            joint = float(best_EE[:, company - 1].sum()) / 2 if company else 0.0
            total += price * float(self.reach(self.load_E.sum(keepdims=True), np.array([joint])).sum())
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """Best slots known, their price, and what no slots get below."""

    slots_P: Ints
    price: float
    bound: float

    @property
    def optimal(self) -> bool:
        """Whether bound and price meet."""
        return self.price - self.bound <= 2 * TOLERANCE * max(1.0, abs(self.price))


def column_count(layer: Layer) -> int | None:
    """Sets of experts that fit a device, if devices of equal slots are interchangeable and experts have no replicas."""
    if layer.slots_G.sum() != len(layer.load_E) or layer.node_fanout > 0 or layer.rules:
        return None
    return sum(math.comb(len(layer.load_E), int(size)) for size in np.unique(layer.slots_G) if size)


def solve_columns(layer: Layer, start_P: Ints, *, stop_s: float) -> Proof:
    """Set partitioning: λ_c = 1 if the experts of column c share a device; symmetry is gone and the relaxation tight.

        min Σ_c price_c λ_c + busy·M,   Σ_{c∋e} λ_c = 1,   Σ_{c∋e} load_c λ_c <= M for every e,   devices of each size used

    M is bisected where the relaxation is loose: between lo and hi only columns with load up to hi remain, and of those only
    the ones whose reduced cost leaves room below the best placement known; HiGHS closes the few that are left.
    """
    from scipy.optimize import Bounds, LinearConstraint, linprog, milp

    experts, mean = len(layer.load_E), max(float(layer.load_E.sum()), 1e-300) / np.count_nonzero(layer.slots_G)
    members: list[tuple[int, ...]] = []
    sizes = Counter(int(size) for size in layer.slots_G if size)
    for size in sizes:
        members += itertools.combinations(range(experts), size)
    size_C = np.array([len(column) for column in members])
    inside_EC = np.zeros((experts, len(members)))
    inside_EC[list(itertools.chain(*members)), np.repeat(np.arange(len(members)), size_C)] = 1.0
    load_C = layer.load_E @ inside_EC / mean
    joint_C = (inside_EC * (layer.together_EE @ inside_EC)).sum(axis=0) / 2
    price_C = layer.fanout * layer.reach(layer.load_E @ inside_EC, joint_C)
    cover_RC = np.vstack([inside_EC, *(size_C == size for size in sizes)])
    wanted_R = np.concatenate([np.ones(experts), list(sizes.values())])

    best, best_P, bound = layer.price(start_P), start_P, math.inf
    low = float(load_floor_L(layer.load_E[None], layer.slots_G)[0])
    room = (best - layer.floor()) / layer.busy if layer.busy > 0 else math.inf
    open_ = [(low, max(low, min(low + room, float(load_C.max()))) * (1 + 1e-9), layer.floor())]
    while open_:
        lo, hi, known = open_.pop()
        left_s = stop_s - time.monotonic()
        if known > best - TOLERANCE * max(1.0, best):
            continue
        if left_s < LEAST_S:
            bound = min(bound, known)
            continue
        kept = np.flatnonzero(load_C <= hi)
        columns = np.hstack([cover_RC[:, kept], np.zeros((len(wanted_R), 1))])
        weighed = np.hstack([(inside_EC * load_C)[:, kept], -np.ones((experts, 1))])
        cost = np.append(price_C[kept], layer.busy)
        limits = [(0.0, math.inf)] * len(kept) + [(lo, hi)]
        relaxed = linprog(cost, A_ub=weighed, b_ub=np.zeros(experts), A_eq=columns, b_eq=wanted_R, bounds=limits, options={"time_limit": left_s})
        if relaxed.status == 2:  # no partition of such columns
            continue
        if relaxed.status != 0:
            bound = min(bound, known)
            continue
        value = float(cost @ relaxed.x)
        known = max(known, value)
        reduced = cost - columns.T @ relaxed.eqlin.marginals - weighed.T @ relaxed.ineqlin.marginals
        few = np.append(np.flatnonzero(value + reduced[:-1] < best), len(kept))
        if known > best - TOLERANCE * max(1.0, best):
            continue
        if len(few) > FEW_COLUMNS and hi - lo > 1e-4 and layer.busy > 0:
            open_ += [((lo + hi) / 2, hi, known), (lo, (lo + hi) / 2, known)]
            continue
        closed = milp(
            cost[few],
            constraints=[LinearConstraint(columns[:, few], wanted_R, wanted_R), LinearConstraint(weighed[:, few], -np.inf, 0)],
            integrality=np.append(np.ones(len(few) - 1), 0),
            bounds=Bounds(np.append(np.zeros(len(few) - 1), lo), np.append(np.ones(len(few) - 1), hi)),
            options={"mip_rel_gap": TOLERANCE, "time_limit": max(stop_s - time.monotonic(), LEAST_S)},
        )
        if closed.x is not None:
            found_P = _slots([members[kept[c]] for c in few[:-1][closed.x[:-1] > 0.5]], layer.slots_G)
            if (price := layer.price(found_P)) < best:
                best, best_P = price, found_P
        if closed.status == 0:
            bound = min(bound, max(known, float(closed.mip_dual_bound)))
        elif closed.status != 2:
            bound = min(bound, max(known, float(closed.mip_dual_bound or known)))
    return Proof(slots_P=best_P, price=best, bound=min(best, bound))


def _slots(columns: list[tuple[int, ...]], slots_G: Ints) -> Ints:
    """Slots [P] of one column per device, each on the first free device of its size."""
    waiting = sorted(columns)
    taken: list[int] = []
    for size in slots_G:
        if size:
            column = next(c for c in waiting if len(c) == size)
            waiting.remove(column)
            taken += column
    return np.array(taken, np.int64)


def common_count(layer: Layer) -> int:
    """Variables min(s_ed, s_fd) of the compact program."""
    return sum(len(slots_D) for _, _, slots_D in layer.groups) * int(np.count_nonzero(np.triu(layer.together_EE)))


def solve_compact(layer: Layer, start_P: Ints, *, time_limit_s: float) -> Proof:
    """The program for replicas, nodes and many experts: z_egn = 1 if one of n replicas of e is on g, so s_eg = Σ_n z_egn / n.

        Σ_n y_en = 1,   Σ_g z_egn = n·y_en,   z_egn <= y_en,   Σ_en z_egn = slots_g,   Σ_e load_e s_eg <= M · mean
        r_d >= line m of Σ_e n_e s_ed and Σ n_ef w_efd,   w_efd <= s_ed,   w_efd <= s_fd
        Σ_f w_efd <= (slots_d - 1)·s_ed   (only tightens the relaxation)

    Where devices are interchangeable and experts have no replicas, the i-th hottest sits on one of the first i devices.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    experts, devices = len(layer.load_E), len(layer.slots_G)
    live, spare = int(np.count_nonzero(layer.slots_G)), int(layer.slots_G.sum()) - experts
    most = min(live, spare + 1)
    mean = max(float(layer.load_E.sum()), 1e-300) / live
    z = np.arange(experts * devices * most).reshape(experts, devices, most)
    y = z.size + np.arange(experts * most).reshape(experts, most)
    top = z.size + y.size  # the column of M
    width = top + 1
    replicas_M = np.arange(1, most + 1)
    cost, integral = [np.zeros(top), np.array([layer.busy])], [np.ones(top), np.zeros(1)]
    rows: list[tuple[Ints, Ints, Floats]] = []
    low: list[Floats] = []
    high: list[Floats] = []

    def add(columns_RV: Ints, values_RV: Floats, lower: float | Floats, upper: float | Floats) -> None:
        count = len(columns_RV)
        first = sum(len(part) for part in low)
        row_RV = np.broadcast_to(first + np.arange(count)[:, None], columns_RV.shape)
        rows.append((row_RV.ravel(), columns_RV.ravel(), np.broadcast_to(values_RV, columns_RV.shape).ravel()))
        low.append(np.broadcast_to(np.asarray(lower, np.float64), count))
        high.append(np.broadcast_to(np.asarray(upper, np.float64), count))

    add(y, np.ones(1), 1.0, 1.0)
    counted = np.concatenate([z.transpose(0, 2, 1), y[:, :, None]], axis=2)
    values = np.concatenate([np.ones((experts, most, devices)), -np.tile(replicas_M[:, None], (experts, 1, 1))], axis=2)
    add(counted.reshape(-1, devices + 1), values.reshape(-1, devices + 1), 0.0, 0.0)
    if most > 1:
        both = np.stack([z, np.broadcast_to(y[:, None], z.shape)], axis=-1).reshape(-1, 2)
        add(both, np.array([1.0, -1.0]), -np.inf, 0.0)
    add(z.transpose(1, 0, 2).reshape(devices, -1), np.ones(1), layer.slots_G.astype(float), layer.slots_G.astype(float))
    borne = np.tile(np.append((layer.load_E[:, None] / mean / replicas_M).ravel(), -1.0), (devices, 1))
    add(np.hstack([z.transpose(1, 0, 2).reshape(devices, -1), np.full((devices, 1), top)]), borne, -np.inf, 0.0)

    pinned_GE, apart_EE = tables(layer.rules, experts, devices)
    for g, e in np.argwhere(pinned_GE):
        add(z[e, g][None], np.ones(1), 1.0, 1.0)
    for e, f in np.argwhere(np.triu(apart_EE)):
        add(np.concatenate([z[e], z[f]], axis=1), np.ones(1), 0.0, 1.0)
    e_R, f_R = np.nonzero(np.triu(layer.together_EE))
    for price, at_G, slots_D in layer.groups:
        for d, slots in enumerate(slots_D):
            here = z[:, at_G == d].reshape(experts, -1)  # the variables that make up s_ed
            parts = np.tile(1 / replicas_M, int((at_G == d).sum()))
            w_R = width + np.arange(len(e_R))
            width += len(e_R)
            cost.append(np.append(np.zeros(len(e_R)), price))
            integral.append(np.zeros(len(e_R) + 1))
            for one, two in layer.lines:
                single = (one * layer.load_E[:, None] * parts / max(layer.tokens, 1)).ravel()
                joint = -two * layer.together_EE[e_R, f_R] / max(layer.tokens, 1)
                add(np.concatenate([here.ravel(), w_R, [width]])[None], np.concatenate([single, joint, [-1.0]]), -np.inf, 0.0)
            width += 1  # r_d follows its w_efd
            for member_R in (e_R, f_R):
                add(np.hstack([w_R[:, None], here[member_R]]), np.append(1.0, -parts), -np.inf, 0.0)
            for e in range(experts):
                mates = w_R[(e_R == e) | (f_R == e)]
                if len(mates):
                    value = np.concatenate([np.ones(len(mates)), -(slots - 1.0) * parts])
                    add(np.concatenate([mates, here[e]])[None], value, -np.inf, 0.0)
    upper = np.ones(width)
    upper[top] = live
    if most == 1 and len(set(layer.slots_G.tolist())) == 1 and layer.node_fanout == 0 and not layer.rules:
        for rank, e in enumerate(np.argsort(-layer.load_E, kind="stable")):
            upper[z[e, rank + 1 :]] = 0.0
    matrix = csr_array(
        (np.concatenate([v for *_, v in rows]), (np.concatenate([r for r, *_ in rows]), np.concatenate([c for _, c, _ in rows]))),
        shape=(sum(len(part) for part in low), width),
    )
    lower = np.zeros(width)
    lower[top] = float(load_floor_L(layer.load_E[None], layer.slots_G)[0])
    found = milp(
        np.concatenate(cost),
        constraints=LinearConstraint(matrix, np.concatenate(low), np.concatenate(high)),
        integrality=np.concatenate(integral),
        bounds=Bounds(lower, upper),
        options={"mip_rel_gap": TOLERANCE, "time_limit": time_limit_s},
    )
    best_P, best, bound = start_P, layer.price(start_P), layer.floor()
    if found.x is not None:
        held_EG = found.x[z].sum(axis=2) > 0.5
        found_P = np.nonzero(held_EG.T)[1]
        if (price := layer.price(found_P)) < best:
            best_P, best = found_P, price
    if found.mip_dual_bound is not None and math.isfinite(found.mip_dual_bound):
        bound = max(bound, float(found.mip_dual_bound))
    return Proof(slots_P=best_P, price=best, bound=min(bound, best))


def prove(layer: Layer, start_P: Ints, *, time_limit_s: float) -> tuple[Proof, str]:
    """Best slots of a layer not dearer than `start_P`, their proof, and the way it was found: columns, compact or floor."""
    count = column_count(layer)
    if time_limit_s >= LEAST_S and count is not None and count <= MOST_COLUMNS:
        return solve_columns(layer, start_P, stop_s=time.monotonic() + time_limit_s), "columns"
    if time_limit_s >= LEAST_S and common_count(layer) <= MOST_COMMON:
        return solve_compact(layer, start_P, time_limit_s=time_limit_s), "compact"
    best = layer.price(start_P)
    return Proof(slots_P=start_P, price=best, bound=min(best, layer.floor())), "floor"


class Ilp:
    """Integer program for load, pairs chosen together, replicas and slots; closes small problems, bounds the rest.

    Starts from the better of greedy balance and the search on the tokens (half the time), then HiGHS, layer by layer:
    set partitioning where every set of experts that fits a device can be listed (up to 20,000, no replicas, no priced nodes),
    a compact program else, and only the closed bound where that is too large. Good for small problems, which it closes, and
    for knowing how far others are from the best. With 64 experts on 8 devices, 30 s improved none of 26 layers over the start:
    the answer is the search's then, and `layers_improved` says so.
    Pairs do not tell whether three experts meet in the same tokens, so with top-k above two the search on tokens can be better.
    """

    name = "ilp"
    solves = "placement"
    capabilities = frozenset(set(Capability) - {Capability.MOVES, Capability.SCENARIOS, Capability.LOADS})
    requires: tuple[str, ...] = ("numba",)

    def solve(self, problem: Problem, *, seed: int, time_limit_s: float, progress: Progress) -> Solution:
        """Optimal when every layer is closed. Objective and bound are seconds per layer, mean over layers; notes give the true
        price of the answer and a floor of it, tighter than the bound where tokens choose many experts. A result that the
        clock did not cut depends on problem and seed only."""
        from moesim_solvers.placement.search import search_slots

        if reason := overfull(problem):
            return Solution(status=Status.INFEASIBLE, placement=None, seed=seed, notes={"reason": reason})
        stop_s = time.monotonic() + time_limit_s
        price = problem.weights
        unit = max(price.load_s, price.devices_s, price.nodes_s) or 1.0
        busy, fanout, node_fanout = price.load_s / unit, price.devices_s / unit, price.nodes_s / unit
        starts = [
            greedy_slots(problem),
            search_slots(
                problem.experts_TLK,
                problem.load_LE,
                problem.slots_G,
                problem.cluster.node_G,
                busy=busy,
                fanout=fanout,
                node_fanout=node_fanout,
                noise=False,
                limits=replace(limits_of(problem), live_LGE=None),
                seed=seed,
                time_limit_s=time_limit_s / 2,
                progress=lambda share, cost: progress(share / 2, ""),
            ).slots_LP,
        ]
        proofs, ways, improved = [], Counter[str](), 0
        for index, load_E in enumerate(problem.load_LE):
            together_EE = problem.stats.coactivation_LEE[index].astype(np.float64)
            np.fill_diagonal(together_EE, 0.0)
            layer = Layer(
                load_E=load_E,
                together_EE=together_EE,
                tokens=problem.stats.tokens,
                width=problem.model.top_k,
                slots_G=problem.slots_G.astype(np.int64),
                node_G=problem.cluster.node_G.astype(np.int64),
                busy=busy,
                fanout=fanout,
                node_fanout=node_fanout,
                rules=problem.constraints.at(problem.model.moe_layers[index]),
            )
            start_P = min((start_LP[index] for start_LP in starts), key=layer.price)
            share_s = (stop_s - time.monotonic()) / (len(problem.load_LE) - index)
            proof, way = prove(layer, start_P, time_limit_s=share_s)
            proofs.append(proof)
            ways[way] += 1
            improved += proof.price < layer.price(start_P)
            progress(0.5 + (index + 1) / len(problem.load_LE) / 2, "")
        closed = sum(proof.optimal for proof in proofs)
        slots_LP = np.array([proof.slots_P for proof in proofs])
        return Solution(
            status=Status.OPTIMAL if closed == len(proofs) else Status.TIME_LIMIT,
            placement=problem.placement(slots_LP),
            objective=unit * float(np.mean([proof.price for proof in proofs])),
            bound=unit * float(np.mean([proof.bound for proof in proofs])),
            seed=seed,
            notes={
                "layers": len(proofs),
                "layers_closed": closed,
                "layers_improved": improved,  # over the start
                "layers_by": dict(ways),
                "price_s": float(price_L(problem, slots_LP).mean()),
                "price_floor_s": price_floor(problem),
            },
        )
