"""Bytes each device must hold, and by how much they do not fit.

    experts      slots of the device in every MoE layer * expert bytes (replicas count like any slot); in a layer of a pyramid
                 that has fewer experts, slots of the others hold nothing
    dense        everything outside the routed experts, once per device (data-parallel attention)
    cache        sequences * context * layers * kv_token bytes
    activations  two layers' inputs and outputs, rows of the experts' products, logits of one token per sequence
    buffers      tokens received in dispatch and sent back in combine, at the worst case of one device getting its share
    reserved     CUDA context, libraries, NCCL (AIConfigurator 0.12.0: 3.5 GB and 0.41 GB, observed; GPUs alone)

Suffixes: G devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.attention import dense_parameters, kv_token_B
from moesim.cost.fitted import main_memory
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Placement
from moesim.units import human

Floats = NDArray[np.float64]
RESERVED_B = 3.5e9 + 0.41e9
_LISTED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """Bytes of each device's main memory, by what holds them, and its capacity."""

    experts_B_G: Floats
    dense_B_G: Floats
    cache_B_G: Floats
    activations_B_G: Floats
    buffers_B_G: Floats
    reserved_B_G: Floats
    capacity_B_G: Floats
    names_G: tuple[str, ...]

    @property
    def total_B_G(self) -> Floats:
        """All of it."""
        return self.experts_B_G + self.dense_B_G + self.cache_B_G + self.activations_B_G + self.buffers_B_G + self.reserved_B_G

    @property
    def over_B_G(self) -> Floats:
        """Bytes that do not fit, 0 where all do."""
        return np.maximum(self.total_B_G - self.capacity_B_G, 0.0)

    @property
    def fits(self) -> bool:
        """True when every device holds what it must."""
        return not self.over_B_G.any()

    def notes(self) -> tuple[str, ...]:
        """What does not fit, in one line: every device's bytes over (the first few), and what the worst one holds."""
        if self.fits:
            return ()
        over = np.flatnonzero(self.over_B_G)
        worst = int(self.over_B_G.argmax())
        listed = ", ".join(f"device {g} {human(float(self.over_B_G[g]), 'B')} over" for g in over[:_LISTED])
        more = f" and {len(over) - _LISTED} more" if len(over) > _LISTED else ""
        held = {
            "experts": self.experts_B_G,
            "dense weights": self.dense_B_G,
            "key-value cache": self.cache_B_G,
            "activations": self.activations_B_G,
            "buffers": self.buffers_B_G,
            "reserved": self.reserved_B_G,
        }
        parts = ", ".join(f"{human(float(part[worst]), 'B')} {name}" for name, part in held.items() if part[worst] > 0)
        return (
            f"does not fit: {listed}{more}; device {worst} ({self.names_G[worst]}, {human(float(self.capacity_B_G[worst]), 'B')}) would hold {parts}",
        )


def memory_use(model: ModelSpec, placement: Placement, cluster: Cluster, *, tokens_per_device: int, context: int = 0) -> MemoryUse:
    """What a placement needs on each device while `tokens_per_device` tokens pass a layer.

    `context` tokens are cached for each of them (0: no cache, as in prefill without serving). Weights have the bits the
    checkpoint serves in. Raises InputError when the placement is for another number of devices or a size is negative.
    """
    if placement.devices != cluster.size or min(tokens_per_device, context) < 0:
        raise InputError(
            f"placement for {placement.devices} devices, cluster of {cluster.size}, tokens_per_device={tokens_per_device}, context={context}: "
            "pass one placement per cluster and sizes >= 0"
        )
    weight_B, element_B = model.weight_bits / 8, model.activation_bits / 8
    each, devices = dict(zip(model.moe_layers, model.experts_L, strict=True)), cluster.size
    filled_LP = placement.slots_LP < np.asarray([each.get(layer, model.experts) for layer in placement.layers])[:, None]
    filled_G = np.bincount(placement.device_P, filled_LP.sum(axis=0), devices).astype(np.float64)
    width = model.hidden + (2 if model.gated else 1) * model.intermediate
    received = tokens_per_device * model.top_k  # selections of a device's share, were loads even
    activations = tokens_per_device * 4 * model.hidden + received * width + min(tokens_per_device, 256) * model.vocabulary
    return MemoryUse(
        experts_B_G=filled_G * (model.expert_parameters * weight_B),
        dense_B_G=np.full(devices, dense_parameters(model).whole(model) * weight_B),
        cache_B_G=np.full(devices, tokens_per_device * context * model.layers * kv_token_B(model)),
        activations_B_G=np.full(devices, activations * element_B),
        buffers_B_G=np.full(devices, (2.0 if devices > 1 else 0.0) * received * model.hidden * element_B),
        reserved_B_G=np.asarray([RESERVED_B if device.kind == "gpu" else 0.0 for device in cluster.devices]),
        capacity_B_G=np.asarray([main_memory(device).capacity_B for device in cluster.devices]),
        names_G=tuple(device.name for device in cluster.devices),
    )
