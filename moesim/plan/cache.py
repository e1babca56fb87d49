"""CachePlan: what of a model is in fast memory when not all of it fits, as one JSON file.

Suffixes: L MoE layers, E experts, G devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import PlanError
from moesim.files import check_output, digest, read_json, validated, write_json
from moesim.model import ModelSpec
from moesim.plan.plan import Plan

SCHEMA_VERSION = 1
TIERS = ("hbm", "host", "nvme")
HBM, HOST, NVME = range(3)


@dataclass(frozen=True, kw_only=True, eq=False)
class CachePlan:
    """Slots of a cache of experts on every device, and where experts are when they are not in it.

    slots_LG    int32, experts of each layer a device holds at a time, the pinned ones among them; 0 streams every expert
    tier_LE     uint8 index into `TIERS`: hbm never leaves the device that computes it (pinned), host and nvme are copied on demand
    bits_LE     bits per weight of each expert, wherever it is
    policy      which expert gives way, by the name of a policy of `moesim.replay`
    prefetcher  what is copied ahead, by name; `distance` layers ahead (0: when the step begins), with the `recall`
                that was assumed of it
    placement   digest of the `Plan` that says which device computes which expert; empty: any

    Raises PlanError naming layer, device and remedy when sizes disagree or a number is out of range.
    """

    name: str
    model: str
    model_digest: str
    layers: tuple[int, ...]
    slots_LG: NDArray[np.int32]
    tier_LE: NDArray[np.uint8]
    bits_LE: NDArray[np.float64]
    policy: str
    prefetcher: str = "none"
    distance: int = 1
    recall: float = 1.0
    placement: str = ""
    made_from: Mapping[str, Any] = field(default_factory=dict)
    solution: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots, tiers, bits = np.asarray(self.slots_LG), np.asarray(self.tier_LE), np.asarray(self.bits_LE)
        rows = len(self.layers)
        shapes = {"slots": slots.shape, "tiers": tiers.shape, "bits": bits.shape}
        if not rows or any(len(shape) != 2 or shape[0] != rows or not shape[1] for shape in shapes.values()) or tiers.shape != bits.shape:
            raise PlanError(f"{shapes} for {rows} MoE layers: slots are [layers, devices], tiers and bits [layers, experts]; give one row per layer")
        if slots.dtype.kind not in "iu" or tiers.dtype.kind not in "iu" or bits.dtype.kind not in "iuf":
            raise PlanError(f"slots {slots.dtype}, tiers {tiers.dtype}, bits {bits.dtype}: slots and tiers are whole numbers, bits numbers")
        experts = tiers.shape[1]
        if ((slots < 0) | (slots > experts)).any():
            layer, device = np.argwhere((slots < 0) | (slots > experts))[0]
            raise PlanError(
                f"layer {self.layers[layer]}, device {device}: {slots[layer, device]} slots are outside 0..{experts}; there are {experts} experts"
            )
        if (tiers >= len(TIERS)).any() or (tiers < 0).any():
            raise PlanError(f"tiers {sorted(set(tiers.ravel().tolist()))}: expected indices of {', '.join(TIERS)}")
        if not (np.isfinite(bits) & (bits > 0) & (bits <= 64)).all():
            layer, expert = np.argwhere(~(np.isfinite(bits) & (bits > 0) & (bits <= 64)))[0]
            raise PlanError(f"layer {self.layers[layer]}, expert {expert}: {bits[layer, expert]} bits per weight; expected more than 0, at most 64")
        pinned = (tiers == HBM).sum(axis=1)
        if (over := np.flatnonzero(pinned > slots.sum(axis=1, dtype=np.int64))).size:
            layer = over[0]
            raise PlanError(
                f"layer {self.layers[layer]}: {pinned[layer]} experts are pinned in {slots[layer].sum()} slots; give more slots or pin fewer"
            )
        if not self.policy or not self.prefetcher:
            raise PlanError(f"policy {self.policy!r}, prefetcher {self.prefetcher!r}: name both; a prefetcher that does nothing is called none")
        if self.distance < 0 or not 0 <= self.recall <= 1:
            raise PlanError(f"distance {self.distance}, recall {self.recall}: expected 0 or more layers, and a share in 0..1")
        for name, array, kind in (("slots_LG", slots, np.int32), ("tier_LE", tiers, np.uint8), ("bits_LE", bits, np.float64)):
            object.__setattr__(self, name, _frozen(array, kind))

    @property
    def devices(self) -> int:
        """Number of devices, G."""
        return int(self.slots_LG.shape[1])

    @property
    def experts(self) -> int:
        """Experts of a layer, E."""
        return int(self.tier_LE.shape[1])

    @cached_property
    def pinned_LE(self) -> NDArray[np.bool_]:
        """Experts that never leave their device."""
        return np.asarray(self.tier_LE == HBM)

    @property
    def digest(self) -> str:
        """Names the decision, whatever it was made from."""
        arrays = (self.slots_LG.tobytes(), self.tier_LE.tobytes(), self.bits_LE.tobytes())
        return digest(self.model_digest, self.placement, *arrays, self.policy, self.prefetcher, str(self.distance), repr(self.recall))

    def hbm_B_G(self, expert_parameters: int, holds_LGE: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Bytes of the cache on each device: pinned experts at their own bits; every other slot has room for the largest
        expert of its layer and device that is not pinned (slots of one size, so that any of them fits)."""
        size_LGE = np.where(holds_LGE, self.bits_LE[:, None], 0.0) * (expert_parameters / 8)
        pinned_LGE = holds_LGE & self.pinned_LE[:, None]
        free_LG = np.maximum(self.slots_LG - pinned_LGE.sum(axis=2), 0)
        slot_LG = np.where(pinned_LGE, 0.0, size_LGE).max(axis=2)
        return np.asarray(((size_LGE * pinned_LGE).sum(axis=2) + free_LG * slot_LG).sum(axis=0))

    def check_fits(self, model: ModelSpec, plan: Plan, *, place: str = "cache plan") -> None:
        """Raise PlanError unless this is for this model's shape and this placement, and no device pins more than its slots."""
        if self.model_digest != model.digest:
            raise PlanError(
                f"{place}: made for {self.model!r} ({len(self.layers)} MoE layers x {self.experts} experts), not for {model.name!r} "
                f"({len(model.moe_layers)} x {model.experts}); make a cache plan from this model's trace"
            )
        placement = plan.placement
        if self.devices != placement.devices:
            raise PlanError(f"{place}: made for {self.devices} devices, plan {plan.name!r} has {placement.devices}; plan the cache again")
        if self.placement and self.placement != plan.digest:
            raise PlanError(
                f"{place}: made for placement {self.placement}, not {plan.name!r} ({plan.digest}); give its plan, or plan the cache again"
            )
        pinned_LG = (placement.holds_LGE & self.pinned_LE[:, None]).sum(axis=2)
        if (over := np.argwhere(pinned_LG > self.slots_LG)).size:
            layer, device = over[0]
            raise PlanError(
                f"{place}: layer {self.layers[layer]}, device {device}: {pinned_LG[layer, device]} experts are pinned in "
                f"{self.slots_LG[layer, device]} slots; give more slots or pin fewer"
            )

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the plan as JSON; OutputExists unless `force`."""
        target = check_output(Path(path), force=force)
        write_json(target, self.to_dict())
        return target

    def to_dict(self) -> dict[str, Any]:
        """The file's content, JSON-ready."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "cache",
            "name": self.name,
            "model": {"name": self.model, "digest": self.model_digest, "experts": self.experts, "moe_layers": list(self.layers)},
            "placement": self.placement,
            "policy": self.policy,
            "prefetch": {"name": self.prefetcher, "distance": self.distance, "recall": self.recall},
            "slots": self.slots_LG.tolist(),
            "tiers": [[TIERS[tier] for tier in row] for row in self.tier_LE.tolist()],
            "bits": self.bits_LE.tolist(),
            "made_from": dict(self.made_from),
            "solution": dict(self.solution),
        }


def load_cache_plan(path: str | Path) -> CachePlan:
    """Read a cache plan; PlanError lists every mistake with its path in the file."""
    from moesim.plan.schema import CachePlanFile

    file = Path(path)
    parsed = validated(CachePlanFile, read_json(file, PlanError), place=str(file), error=PlanError)
    try:
        return CachePlan(
            name=parsed.name,
            model=parsed.model.name,
            model_digest=parsed.model.digest,
            layers=tuple(parsed.model.moe_layers),
            slots_LG=np.asarray(parsed.slots, np.int64),
            tier_LE=np.asarray([[TIERS.index(tier) for tier in row] for row in parsed.tiers], np.int64),
            bits_LE=np.asarray(parsed.bits, np.float64),
            policy=parsed.policy,
            prefetcher=parsed.prefetch.name,
            distance=parsed.prefetch.distance,
            recall=parsed.prefetch.recall,
            placement=parsed.placement,
            made_from=parsed.made_from,
            solution=parsed.solution,
        )
    except PlanError as problem:
        raise PlanError(f"{file}: {problem}") from None


def _frozen(array: ArrayLike, kind: type[np.generic]) -> NDArray[Any]:
    frozen = np.array(array, kind)
    frozen.setflags(write=False)
    return frozen
