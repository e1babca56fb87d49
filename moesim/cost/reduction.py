"""Time of reducing gradients (all-reduce) over the devices of a cluster.

Inside a node NCCL's fitted curve, where there is one (a ring up to 4 ranks, inside the switch (NVLS) from 8), else a ring
over the link. Between nodes the D devices of a node each reduce a share of 1/D around a ring of NICs:

    t = reduce_scatter(bytes) + ring(bytes/D over M nodes) + all_gather(bytes)
    ring(x over n) = 2*(n-1)*latency + 2*x*(n-1)/n / bandwidth

Source: Thakur, Rabenseifner, Gropp 2005, Optimization of collective communication operations in MPICH; NCCL 2.29.
Suffixes: N cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.fitted import intra_curve
from moesim.errors import InputError
from moesim.hardware import Cluster, Link

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReductionTime:
    """Seconds of an all-reduce: inside nodes, between them, together; which algorithm; what is not measured."""

    inside_s_N: Floats
    between_s_N: Floats
    algorithm: str
    extrapolated_N: NDArray[np.bool_]
    notes: tuple[str, ...]

    @property
    def time_s_N(self) -> Floats:
        """Both phases, one after the other."""
        return self.inside_s_N + self.between_s_N


def ring_s(bytes_N: ArrayLike, ranks: int, link: Link, *, rounds: int = 2, share: float = 1.0) -> Floats:
    """Ring of `ranks` ports: `rounds*((n-1)*latency + bytes*(n-1)/n/bandwidth)`; 2 rounds all-reduce, 1 gather or scatter.

    `share` is the part of the bandwidth each port gets. No bytes or one rank cost nothing.
    """
    size_N = np.asarray(bytes_N, np.float64)
    time_N = rounds * (ranks - 1) * (link.latency_s + size_N / ranks / (link.bandwidth_Bps * share))
    return np.where(size_N > 0, time_N, 0.0)


def reduction_time(bytes_N: ArrayLike, cluster: Cluster) -> ReductionTime:
    """Time until every device of the cluster holds the sum of all devices' `bytes_N` bytes.

    The slowest link and NIC pace all rings. Raises InputError for negative bytes or nodes of unequal size.
    """
    size_N = np.asarray(bytes_N, np.float64)
    if (size_N < 0).any():
        raise InputError(f"bytes={bytes_N!r}: pass bytes >= 0")
    sizes = np.unique(cluster.node_G, return_counts=True)[1]
    if len(set(sizes.tolist())) > 1:
        raise InputError(f"{cluster.name!r} has nodes of {sizes.tolist()} devices; gradients are reduced over equal nodes")
    local, nodes = int(sizes[0]), len(sizes)
    link = min(cluster.intra_G, key=lambda each: each.bandwidth_Bps)
    notes: list[str] = []
    outside_N = np.zeros(size_N.shape, bool)
    inside_N = np.zeros(size_N.shape)
    for op, rounds in (("all_reduce", 2),) if nodes == 1 else (("reduce_scatter", 1), ("all_gather", 1)):
        curve, remarks = intra_curve(cluster, op) if local > 1 else (None, [])
        if curve is not None:
            time_N, beyond_N = curve.time_s(size_N, ranks=local)
            outside_N |= beyond_N
        else:
            time_N = ring_s(size_N, local, link, rounds=rounds)
            remarks = [f"not calibrated: {op} over {link.name} is a ring at latency and bandwidth of its profile"] if local > 1 else []
        inside_N = inside_N + time_N
        notes += remarks
    between_N = np.zeros(size_N.shape)
    algorithm = "NCCL curve" if local > 1 and link.name.startswith("nvlink") else "ring"
    if nodes > 1:
        nic = min(cluster.nic_G, key=lambda each: each.bandwidth_Bps)
        between_N = ring_s(size_N / local, nodes, nic, share=1 / cluster.oversubscription)
        notes.append(f"not calibrated: rings of {nodes} nodes over {nic.name} at latency and bandwidth of its profile")
        algorithm = f"{algorithm} inside nodes, rings between them"
    return ReductionTime(inside_s_N=inside_N, between_s_N=between_N, algorithm=algorithm, extrapolated_N=outside_N, notes=tuple(dict.fromkeys(notes)))
