"""Placement: which expert sits in which slot of which device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import PlanError

FIXED_RULES = ("even", "static-source", "nearest")  # a token's replica follows from its place in the batch alone
DISPATCH_RULES = (*FIXED_RULES, "least-loaded", "lp")


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Slots of every MoE layer, filled with logical experts.

    slots_LP   int32, slot → logical expert; device g owns the next slots_G[g] slots, in order
    slots_G    int32, slots of each device (counts may differ between devices)
    layers     absolute indices of the L MoE layers
    dispatch   how a token picks one of several replicas:
               `even` takes them in turn (what engines book-keep; vLLM, TensorRT-LLM),
               `static-source` gives each source device one replica, its own or the lowest slot (SGLang `static`),
               `nearest` takes replicas on the source device, else in its node, else all, in turn,
               `least-loaded` sends each token, in order, to the replica whose device has got the fewest of the batch so far,
               `lp` splits the batch's tokens so that the busiest device gets as few as possible (LPLB, SGLang `lp`): it knows
               all counts of the batch beforehand, so it is a bound on what a dispatcher can do.

    Raises PlanError naming layer, device and remedy when a slot holds no expert of the model or an expert has no slot.
    """

    slots_LP: NDArray[np.int32]
    slots_G: NDArray[np.int32]
    experts: int
    layers: tuple[int, ...]
    dispatch: str = "even"

    def __post_init__(self) -> None:
        slots, counts = _whole(self.slots_LP, "slots"), _whole(self.slots_G, "slots per device")
        if slots.ndim != 2 or counts.ndim != 1:
            raise PlanError(f"slots must be [layers, slots] and slots per device [devices], got {slots.shape} and {counts.shape}")
        if slots.shape[0] != len(self.layers):
            raise PlanError(f"slots have {slots.shape[0]} rows for {len(self.layers)} MoE layers {list(self.layers)}; give one row per layer")
        if (counts < 0).any() or counts.sum() != slots.shape[1]:
            raise PlanError(f"devices own {counts.tolist()} slots, in all {counts.sum()}, but every layer lists {slots.shape[1]}")
        if self.dispatch not in DISPATCH_RULES:
            raise PlanError(f"dispatch rule {self.dispatch!r} is unknown; use one of {', '.join(DISPATCH_RULES)}")
        object.__setattr__(self, "slots_LP", _frozen(slots))
        object.__setattr__(self, "slots_G", _frozen(counts))
        bad = (slots < 0) | (slots >= self.experts)
        if bad.any():
            layer, slot = np.argwhere(bad)[0]
            raise PlanError(
                f"layer {self.layers[layer]}, slot {slot} (device {self.device_P[slot]}): expert {slots[layer, slot]} is outside "
                f"0..{self.experts - 1}; every slot holds one logical expert"
            )
        if (self.replicas_LE == 0).any():
            layer, expert = np.argwhere(self.replicas_LE == 0)[0]
            raise PlanError(f"layer {self.layers[layer]}: expert {expert} has no slot on any device; give it at least one")

    @property
    def devices(self) -> int:
        """Number of devices, G."""
        return len(self.slots_G)

    @cached_property
    def device_P(self) -> NDArray[np.int32]:
        """Device of each slot."""
        return _frozen(np.repeat(np.arange(len(self.slots_G)), self.slots_G))

    @cached_property
    def replicas_LE(self) -> NDArray[np.int32]:
        """Number of slots of each expert."""
        layers = np.arange(len(self.layers))[:, None]
        counts = np.zeros((len(self.layers), self.experts), np.int32)
        np.add.at(counts, (layers, self.slots_LP), 1)
        return _frozen(counts)

    @cached_property
    def holds_LGE(self) -> NDArray[np.bool_]:
        """True where a device holds an expert."""
        held = np.zeros((len(self.layers), self.devices, self.experts), bool)
        held[np.arange(len(self.layers))[:, None], self.device_P[None, :], self.slots_LP] = True
        held.setflags(write=False)
        return held

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Placement)
            and (self.experts, self.layers, self.dispatch) == (other.experts, other.layers, other.dispatch)
            and np.array_equal(self.slots_G, other.slots_G)
            and np.array_equal(self.slots_LP, other.slots_LP)
        )

    __hash__ = None  # type: ignore[assignment]

    def diff(self, new: Placement, *, node_G: ArrayLike | None = None) -> Migration:
        """Cheapest moves that turn this placement into `new`: an expert already on a device is not moved, whatever its
        slot; a missing one is copied from a device of the same node if one holds it, taking sources in turn.

        `node_G` is the node of each device (default: all in one). Raises PlanError when shapes differ.
        """
        if (self.layers, self.experts, self.devices) != (new.layers, new.experts, new.devices):
            raise PlanError(
                f"cannot migrate {len(self.layers)} layers x {self.experts} experts on {self.devices} devices to "
                f"{len(new.layers)} x {new.experts} on {new.devices}; both plans must be for one model and device count"
            )
        nodes = np.zeros(self.devices, int) if node_G is None else np.asarray(node_G)
        sent = np.zeros(self.devices, int)
        moves = []
        for layer, target, expert in np.argwhere(new.holds_LGE & ~self.holds_LGE):
            sources = np.flatnonzero(self.holds_LGE[layer, :, expert])
            near = sources[nodes[sources] == nodes[target]]
            choices = near if len(near) else sources
            source = choices[np.argmin(sent[choices])]
            sent[source] += 1
            moves.append((layer, expert, source, target))
        return Migration(moves_M4=np.asarray(moves, np.int32).reshape(-1, 4), devices=self.devices)


@dataclass(frozen=True, kw_only=True, eq=False)
class Migration:
    """Expert copies between devices. moves_M4 int32: layer row, expert, source device, target device."""

    moves_M4: NDArray[np.int32]
    devices: int

    def __len__(self) -> int:
        return len(self.moves_M4)

    def bytes_GG(self, expert_B: float) -> NDArray[np.float64]:
        """Bytes from each device to each other one, for experts of `expert_B` bytes."""
        matrix = np.zeros((self.devices, self.devices))
        np.add.at(matrix, (self.moves_M4[:, 2], self.moves_M4[:, 3]), expert_B)
        return matrix


def slots_per_device(slots: int, devices: int) -> NDArray[np.int32]:
    """`slots` over `devices` equally; PlanError with the nearest counts that work when they do not divide."""
    if slots % devices:
        low = slots - slots % devices
        raise PlanError(f"{slots} slots do not divide over {devices} devices; use {low} or {low + devices} slots")
    return np.full(devices, slots // devices, np.int32)


def _whole(values: ArrayLike, what: str) -> NDArray[np.int32]:
    array = np.asarray(values)
    if array.dtype == object or array.dtype.kind not in "iu":
        raise PlanError(f"{what}: expected whole numbers in rows of equal length, got {array.dtype} {array.shape}")
    return array.astype(np.int32)


def _frozen(array: NDArray[np.integer]) -> NDArray[np.int32]:
    frozen = np.ascontiguousarray(array, np.int32)
    frozen.setflags(write=False)
    return frozen
