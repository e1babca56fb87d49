"""Fluid network: groups of flows share links max-min fairly.

A group is one flow, or many that start together and keep the proportions of their bytes (the pairs of one exchange).
It puts `load_K` bytes on every link k and moves at a rate counted on its busiest link, so that it claims a fair share
there like one flow, and x/load of it elsewhere. Alone it takes max(load_K / capacity_K), the time of its busiest link.
Exact for single flows; grouped flows of one exchange finish together. Suffixes: F groups, K links.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.errors import SimulationError
from moesim.hardware import Cluster

Floats = NDArray[np.float64]
_FULL = 1e-12  # share of a link's capacity below which it counts as full


def max_min_rates(use_FK: Floats, capacity_K: Floats, cap_F: Floats) -> Floats:
    """Max-min fair rate of every group, by progressive filling.

        raise all rates equally; stop a group where a link it uses fills up or its own cap is reached

    use_FK is the bytes a group puts on a link for each byte of its rate (0: not used), capacity_K in bytes/s, cap_F the
    groups' own limits in bytes/s (inf: none). Returns rate_F in bytes/s. A group without links and without a cap is a
    SimulationError. Source: Bertsekas and Gallager, Data Networks, section 6.5. O(F·K) per filled link or cap.
    """
    rate_F = np.zeros(len(use_FK))
    if not (np.isfinite(cap_F) | (use_FK > 0).any(axis=1)).all():
        raise SimulationError("a flow group uses no link and has no rate cap, so it would be infinitely fast; give it a path")
    rising_F = np.ones(len(use_FK), bool)
    slack_K = capacity_K.astype(np.float64)
    while rising_F.any():
        demand_K = use_FK[rising_F].sum(axis=0)
        room_K = np.divide(slack_K, demand_K, out=np.full(len(slack_K), np.inf), where=demand_K > 0)
        room_F = np.where(rising_F, cap_F - rate_F, np.inf)
        rise = max(0.0, min(room_K.min(initial=np.inf), room_F.min(initial=np.inf)))
        rate_F[rising_F] += rise
        slack_K = slack_K - rise * demand_K
        full_K = (demand_K > 0) & (slack_K <= _FULL * capacity_K)
        rising_F &= (room_F > rise) & ~(use_FK[:, full_K] > 0).any(axis=1)
    return rate_F


@dataclass(frozen=True, kw_only=True, eq=False)
class Wiring:
    """Links of a cluster's graph and the links between every two devices.

    names_K "g0→node0", capacity_K bytes/s, path_GGH link indices on the way from g to h (-1: no further link).
    """

    names_K: tuple[str, ...]
    capacity_K: Floats
    path_GGH: NDArray[np.int32]

    @classmethod
    def of(cls, cluster: Cluster) -> Wiring:
        """Wiring of `cluster.graph`: shortest ways over switches; devices do not forward."""
        edges = list(cluster.graph.edges)
        index = {edge: k for k, edge in enumerate(edges)}
        onward: dict[str, list[str]] = {}
        for a, b in edges:
            onward.setdefault(a, []).append(b)
        devices = {f"g{g}": g for g in range(cluster.size)}
        ways: list[tuple[int, int, list[int]]] = []
        for name, g in devices.items():
            reached: dict[str, list[int]] = {name: []}
            front = [name]
            while front:
                following = []
                for here in front:
                    for there in () if here in devices and here != name else onward.get(here, ()):
                        if there not in reached:
                            reached[there] = [*reached[here], index[here, there]]
                            following.append(there)
                front = following
            ways += [(g, h, reached[other]) for other, h in devices.items() if other in reached]
        path = np.full((cluster.size, cluster.size, max(1, *(len(way) for *_, way in ways))), -1, np.int32)
        for g, h, way in ways:
            path[g, h, : len(way)] = way
        return cls(
            names_K=tuple(f"{a}→{b}" for a, b in edges),
            capacity_K=np.asarray([cluster.graph.edges[edge]["bandwidth_Bps"] for edge in edges], np.float64),
            path_GGH=path,
        )

    @cached_property
    def _crossed(self) -> Any:
        """Sparse [G*G, K]: 1 where the way of a pair of devices crosses a link."""
        from scipy.sparse import csr_array

        pair_N, hop_N = np.nonzero(self.path_GGH.reshape(-1, self.path_GGH.shape[2]) >= 0)
        link_N = self.path_GGH.reshape(-1, self.path_GGH.shape[2])[pair_N, hop_N]
        return csr_array((np.ones(len(pair_N)), (pair_N, link_N)), shape=(self.path_GGH.shape[0] ** 2, len(self.capacity_K)))

    @cached_property
    def _apart(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of different devices that no links join."""
        g, h = np.nonzero((self.path_GGH[:, :, 0] < 0) & ~np.eye(len(self.path_GGH), dtype=bool))
        return g, h

    def loads(self, bytes_NGG: Floats) -> Floats:
        """load_NK bytes on every link of traffic matrices with any leading axes; their diagonal stays at home.

        Raises SimulationError when bytes go between devices that no links join.
        """
        *lead, devices, _ = bytes_NGG.shape
        for g, h in zip(*self._apart, strict=True):
            if (bytes_NGG[..., g, h] > 0).any():
                size_B = bytes_NGG[..., g, h].max()
                raise SimulationError(f"{size_B:g} B from device {g} to device {h}: no path in the cluster's graph; join them by a network")
        return np.ascontiguousarray(bytes_NGG.reshape(-1, devices**2) @ self._crossed).reshape(*lead, -1)


class _Group:
    """State of one group in flight: `left` bytes on its busiest link, which passes at most `cap` bytes/s."""

    __slots__ = ("cap", "done", "left", "load_K", "rate")

    def __init__(self, load_K: Floats, left: float, cap: float, done: Callable[[], None]) -> None:
        self.load_K = load_K
        self.left = left
        self.cap = cap
        self.done = done
        self.rate = 0.0

    @property
    def use_K(self) -> Floats:
        """Bytes on every link for each byte on the busiest."""
        return np.asarray(self.load_K / self.load_K.max(), np.float64)


class Fabric:
    """Links shared by the groups in flight; rates change only when a group starts or ends."""

    def __init__(self, env: simpy.Environment, capacity_K: Floats) -> None:
        self.env = env
        self.capacity_K = capacity_K
        self.carried_K = np.zeros(len(capacity_K))
        self.events = 0  # of SimPy
        self._groups: list[_Group] = []
        self._since = 0.0
        self._alarm: simpy.Event | None = None

    def send(self, load_K: Floats, done: Callable[[], None], *, least_s: float = 0.0) -> None:
        """Put a group of `load_K` bytes on the links and call `done` when it has arrived, not before `least_s` from now.

        Raises SimulationError for a load that is empty, negative or not finite.
        """
        most_B = float(load_K.max(initial=0.0))
        if not (0 < most_B < np.inf and load_K.min() >= 0):
            raise SimulationError(f"a flow group of {most_B} bytes on its busiest link; send only what is > 0 and finite")
        self._advance()
        alone_s = float((load_K / self.capacity_K).max())
        self._groups.append(_Group(load_K, most_B, most_B / max(alone_s, least_s), done))
        self._share()

    @property
    def used_K(self) -> Floats:
        """Bytes/s on every link now."""
        return np.asarray(sum((group.rate * group.use_K for group in self._groups), np.zeros(len(self.capacity_K))))

    def _advance(self) -> None:
        elapsed = self.env.now - self._since
        self._since = self.env.now
        for group in self._groups:
            group.left -= group.rate * elapsed

    def _share(self) -> None:
        """New rates, and an alarm at the next arrival."""
        if not self._groups:
            self._alarm = None
            return
        if len(self._groups) == 1:
            self._groups[0].rate = self._groups[0].cap
        else:
            use_FK = np.stack([group.use_K for group in self._groups])
            cap_F = np.asarray([group.cap for group in self._groups])
            for group, rate in zip(self._groups, max_min_rates(use_FK, self.capacity_K, cap_F).tolist(), strict=True):
                group.rate = rate
        soonest = min(group.left / group.rate for group in self._groups)
        self._alarm = self.env.timeout(max(0.0, soonest))
        self._alarm.callbacks.append(self._arrive)

    def _arrive(self, event: simpy.Event) -> None:
        self.events += 1
        if event is not self._alarm:
            return  # rates changed since it was set
        soonest = min(group.left / group.rate for group in self._groups)
        self._advance()
        arrived = [group for group in self._groups if group.left <= group.rate * (1e-12 * soonest + 1e-15)]
        arrived = arrived or [min(self._groups, key=lambda group: group.left / group.rate)]
        self._groups = [group for group in self._groups if group not in arrived]
        for group in arrived:
            self.carried_K += group.load_K
        self._share()
        for group in arrived:
            group.done()


def link_use(names_K: tuple[str, ...], carried_K: Floats, capacity_K: Floats, seconds: float) -> Mapping[str, float]:
    """Share of each link's capacity that was used over `seconds`."""
    share_K = carried_K / (capacity_K * seconds) if seconds > 0 else np.zeros(len(carried_K))
    return dict(zip(names_K, share_K.tolist(), strict=True))
