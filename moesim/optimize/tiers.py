"""Memories that hold experts: a device's budget, and the tiers outside it.

Suffixes: G devices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.offload import Fetching, fetching, own_memory
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.plan import TIERS
from moesim.plan.cache import HOST, NVME
from moesim.units import parse

Floats = NDArray[np.float64]
_PLAIN = re.compile(r"-?\d[\d.]*(e[+-]?\d+)?")  # bytes without a unit
_MEMORY = {TIERS[HOST]: "ddr", TIERS[NVME]: "nvme"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """A memory outside the devices that holds experts: its room on all nodes together, the way to each device, and what a
    byte costs for an hour ($/h)."""

    name: str
    capacity_B: float
    way_G: tuple[Fetching, ...]
    rent_per_B_h: float = 0.0

    def copy_s(self, device: int, size_B: float) -> float:
        """Seconds a computation waits for a copy of `size_B` bytes to a device."""
        return float(self.way_G[device].demand_s(size_B, stored=self.name == TIERS[NVME]))


def tiers_of(cluster: Cluster, room: Mapping[str, tuple[float, float]]) -> tuple[Tier, ...]:
    """`host` and, where every device has one, `nvme`; `room` has, by tier, the most bytes of experts and $/h for a byte.

    Raises ProfileError where a device has neither such a memory nor a host, InputError for a tier the cluster lacks.
    """
    found = [
        Tier(
            name=tier,
            capacity_B=min(_capacity_B(cluster, memory), room.get(tier, (np.inf, 0.0))[0]),
            way_G=tuple(fetching(cluster, g, memory) for g in range(cluster.size)),
            rent_per_B_h=room.get(tier, (np.inf, 0.0))[1],
        )
        for tier, memory in _MEMORY.items()
        if tier == TIERS[HOST] or all(_has(cluster, g, memory) for g in range(cluster.size))
    ]
    if strange := sorted(set(room) - {tier.name for tier in found}):
        raise InputError(f"tier {strange[0]!r}: {cluster.name!r} has {', '.join(tier.name for tier in found)}")
    return tuple(found)


def _has(cluster: Cluster, device: int, memory: str) -> bool:
    host = cluster.host(device)
    return own_memory(cluster.devices[device], memory) is not None or (host is not None and any(m.name == memory for m in host.memories))


def _capacity_B(cluster: Cluster, memory: str) -> float:
    """Capacity over all nodes: each device's own memory of that name, else once for every node's host."""
    room_B, seen = 0.0, set()
    for g, node in enumerate(cluster.node_G.tolist()):
        host, own = cluster.host(g), own_memory(cluster.devices[g], memory)
        if own is not None:
            room_B += own.capacity_B
        elif host is not None and node not in seen:
            seen.add(node)
            room_B += sum(m.capacity_B for m in host.memories if m.name == memory)
    return room_B


def memory_B_G(memory: float | str, held_B_G: Floats) -> Floats:
    """Bytes of each device from a size ("24 GB", or a number of bytes) or a share of the experts it computes ("50%"). Raises InputError."""
    text, remedy = str(memory).strip(), "give bytes >= 0, such as '24 GB', or a share of all experts, such as '50%'"
    try:
        if text.endswith("%"):
            found_G = held_B_G * parse(text, "1")
        else:
            found_G = np.full(len(held_B_G), parse(text if _PLAIN.fullmatch(text) is None else float(text), "B"))
    except ValueError:
        raise InputError(f"memory {text!r}: {remedy}") from None
    if not (found_G >= 0).all():
        raise InputError(f"memory {text!r}: {remedy}")
    return found_G + 0.0  # -0 is 0


def noise(bits: NDArray[np.floating], served: float) -> Floats:
    """Rounding noise over signal of weights with fewer bits than they are served in, 4^-bits (6.02 dB a bit, Bennett 1948), else 0."""
    return np.where(bits < served, 4.0 ** -np.asarray(bits, np.float64), 0.0)
