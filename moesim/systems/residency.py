"""Residency: experts that are not all on the device. Where they live, which stay, what is copied ahead, in which form.

Suffixes: L MoE layers, E experts, G devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.cost.offload import Fetching, HostCompute
from moesim.errors import InputError
from moesim.plan.cache import HBM, NVME, CachePlan
from moesim.replay import All, Oracle, Path, Prefetcher, PreGated, Residual

Order = Literal["grouped", "one-by-one"]
HOLDS_STILL = ("static",)  # policies whose cache never changes
FORESEEING = (Oracle, PreGated, Path, Residual)  # prefetchers that need no more than numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """Weights in bit planes, the lowest first. Tokens of an expert want different numbers of them.

    bits     of each plane; the first is usable alone
    hot      share of a layer's experts, by tokens of the step, that want every plane; the coldest want the first alone, those
             between a number in proportion
    unpack_B bytes that the device's memory moves for every weight of a plane before it can be multiplied; 0: the kernel unpacks
    nested   planes add up; otherwise every precision is a copy of its own
    hottest_first  experts with most tokens are loaded first; otherwise in order of their ids
    progressive    tokens are computed as soon as the planes that they want have come; otherwise when all of the expert's have
    """

    bits: tuple[float, ...]
    hot: float = 0.25
    unpack_B: float = 0.0
    nested: bool = True
    hottest_first: bool = True
    progressive: bool = True

    def __post_init__(self) -> None:
        if not self.bits or not all(bit > 0 for bit in self.bits) or not 0 <= self.hot <= 1 or not self.unpack_B >= 0:
            raise InputError(f"{self}: give planes of more than 0 bits, hot in [0, 1] and unpack_B >= 0")

    def wanted(self, tokens: NDArray[np.float64]) -> NDArray[np.int64]:
        """Planes that each of some experts with tokens wants, 1 to all of them; ties go to the lower id."""
        rank = np.empty(len(tokens), np.int64)
        rank[np.argsort(-tokens, kind="stable")] = np.arange(len(tokens))
        cold = (rank + 1 - self.hot * len(tokens)) / max(1.0, (1 - self.hot) * len(tokens))  # above 0 beyond the hot ones
        return np.asarray(np.clip(np.ceil(len(self.bits) * (1 - np.maximum(cold, 0.0))), 1, len(self.bits)), np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Residency:
    """Experts of a device that do not all stay on it, for inference.

    share        of a device's experts of every layer that have a slot, to whole slots and at least one; None with no
                 `slots_LG`: none stay, every expert passes through a buffer
    slots_LG     slots of every layer on every device, instead of a share
    policy       which expert gives way, a policy of `moesim.replay`
    warm         first touches fill free slots without a copy (results in steady state); otherwise every run starts empty
    tier         memory where experts without a slot live: a memory of the device itself, or of its host ("nvme": through
                 the host's memory). Where it is the device's main memory, the slots and buffers are on the chip
    stored_LE    experts that live on the host's SSD although `tier` is its memory
    pinned_LE    experts that never leave
    bits_LE      bits per weight of each expert, as copied and computed; `bits` for all, None: the model's
    prefetch     what is copied ahead, a prefetcher of `moesim.replay`: into slots, and where there is no room into buffers until used
    bulk         the experts of a layer lie together, and are copied ahead as one
    order        grouped: a layer's copies together, then its experts; one-by-one: each expert when it has come, through `buffers`
    planes       bit planes, one by one only
    host         a host that computes missing experts where that is sooner than their copy, or beside the copies of others
    way          how copies run, where it was measured; None: from the profiles of the cluster
    """

    share: float | None = None
    slots_LG: NDArray[np.integer] | None = None
    policy: str = "lru"
    warm: bool = False
    tier: str = "ddr"
    stored_LE: NDArray[np.bool_] | None = None
    pinned_LE: NDArray[np.bool_] | None = None
    bits: float | None = None
    bits_LE: NDArray[np.float64] | None = None
    prefetch: Prefetcher | None = None
    bulk: bool = False
    order: Order = "grouped"
    buffers: int | None = 2
    planes: Planes | None = None
    host: HostCompute | None = None
    way: Fetching | None = None
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        if self.share is not None and self.slots_LG is not None:
            raise InputError("residency has a share and slots_LG: give one of them")
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"share={self.share!r} of the experts stay: give a share in (0, 1], or leave it out to keep none")
        if self.bits is not None and self.bits_LE is not None:
            raise InputError("residency has bits and bits_LE: give one of them")
        if (self.bits is not None and not self.bits > 0) or (self.bits_LE is not None and not (np.asarray(self.bits_LE) > 0).all()):
            raise InputError("bits of an expert's weights must be > 0")
        if self.order not in ("grouped", "one-by-one"):
            raise InputError(f"order {self.order!r} is unknown; use grouped or one-by-one")
        if self.buffers is not None and self.buffers < 1:
            raise InputError(f"buffers={self.buffers}: an expert needs one to be computed from; give >= 1, or None for room for all")
        if self.planes and self.order != "one-by-one":
            raise InputError("planes come one by one; set order to one-by-one")
        if self.host and (self.prefetch or self.order != "grouped" or self.policy not in HOLDS_STILL):
            raise InputError(
                f"a host that computes experts goes with grouped copies on demand and a policy that moves none ({', '.join(HOLDS_STILL)}); "
                f"got order {self.order!r}, policy {self.policy!r}, prefetch {self.prefetch.name if self.prefetch else 'none'!r}"
            )
        if self.order == "one-by-one" and self.prefetch:
            raise InputError("experts one by one load each behind the one before; leave prefetch out")

    @classmethod
    def of(cls, plan: CachePlan, **changes: Any) -> Residency:
        """What a cache plan decides: slots, policy, tiers, bits, pinned experts and prefetcher; `changes` are other fields.

        Raises InputError for a prefetcher that needs more than a distance and a recall; give it in `changes`.
        """
        prefetch = changes["prefetch"] if "prefetch" in changes else foreseeing(plan.prefetcher, plan.distance, plan.recall)
        stored_LE = plan.tier_LE == NVME
        given: dict[str, Any] = {
            "slots_LG": plan.slots_LG,
            "policy": plan.policy,
            "stored_LE": stored_LE if stored_LE.any() else None,
            "pinned_LE": plan.tier_LE == HBM,
            "bits_LE": plan.bits_LE,
            "prefetch": prefetch,
        }
        return cls(**given | changes)

    def words(self) -> list[str]:
        """What it sets, one line each."""
        if self.slots_LG is not None:
            stays = f"slots of a plan stay, by {self.policy}"
        else:
            stays = "no expert stays" if self.share is None else f"{self.share:.0%} of the experts stay, by {self.policy}"
        found = [f"residency: {stays}; the others come from {self.tier}"]
        if self.prefetch:
            facts = [f"{name} {getattr(self.prefetch, name):g}" for name in ("distance", "recall", "false") if hasattr(self.prefetch, name)]
            found.append(f"prefetch by {self.prefetch.name}{': ' if facts else ''}{', '.join(facts)}")
        if self.order == "one-by-one":
            found.append(f"experts one by one through {self.buffers or 'as many buffers as it takes'}{' buffers' if self.buffers else ''}")
        if self.planes:
            found.append(
                f"weights in {'nested' if self.planes.nested else 'separate'} planes of {', '.join(f'{b:g}' for b in self.planes.bits)} bits"
            )
        if self.host:
            found.append(
                f"the host computes missing experts {'beside the copies of others' if self.host.beside else 'where that is sooner than a copy'}"
            )
        return found

    def slots(self, held_LG: NDArray[np.integer]) -> NDArray[np.int64]:
        """slots_LG of a cache for devices that hold `held_LG` experts; 0 where none stay.

        Raises InputError for slots of another shape or below 0.
        """
        held = np.asarray(held_LG, np.int64)
        if self.slots_LG is not None:
            slots = np.asarray(self.slots_LG)
            if slots.shape != held.shape:
                raise InputError(f"slots for {slots.shape} layers and devices, the placement has {held.shape}; plan the cache for this placement")
            if slots.dtype.kind not in "iu" or (slots < 0).any():
                raise InputError(f"slots of {slots.min()}: a cache has whole slots >= 0")
            return np.asarray(np.minimum(slots, held), np.int64)
        if self.share is None:
            return np.zeros(held.shape, np.int64)
        whole = np.floor(self.share * held + 1e-9).astype(np.int64)
        return np.asarray(np.minimum(np.maximum(whole, 1), held), np.int64)


def foreseeing(name: str, distance: int, recall: float) -> Prefetcher | None:
    """The prefetcher of a plan; None for "none". Raises InputError for one that needs more than these numbers."""
    if name in ("none", All.name):
        return All() if name == All.name else None
    kinds = {kind.name: kind for kind in FORESEEING}
    if name not in kinds:
        raise InputError(f"prefetcher {name!r} is not made from a distance and a recall; known: none, {All.name}, {', '.join(kinds)}")
    return kinds[name](distance=distance, recall=recall)


__all__ = ["HOLDS_STILL", "Planes", "Residency", "foreseeing"]
