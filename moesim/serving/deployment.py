"""Deployment: the instances that serve: devices, layout, where the experts live, and the limits of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from moesim.cost import CostModel
from moesim.cost.attention import attention_shape, kv_token_B
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Placement
from moesim.serving.layout import even_placement
from moesim.serving.profiles import MoeProfile
from moesim.serving.routing import Routing
from moesim.serving.steps import StepLaw

HOST_S = 2.8e-3  # assumed; in the one run at hand it hides behind the devices
MOST_SEQS = 1 << 16  # requests a rank runs at a time
BALANCES = ("least-loaded", "shared")
EXCHANGES = ("all-to-all", "all-gather")


@dataclass(frozen=True, kw_only=True, eq=False)
class Deployment:
    """`replicas` equal instances, each on a cluster of its own: data-parallel ranks of `tp` devices, experts over all of them.

    placement      experts of an instance (None: in order, as evenly as they divide)
    max_seqs       requests a rank runs at a time; max_batch_tokens: tokens of its step (vLLM: max_num_seqs, max_num_batched_tokens)
    memory_share   share of device memory the engine may use (vLLM: gpu_memory_utilization); what weights leave is cache
    cache_tokens   tokens of key-value cache of a rank (None: from memory)
    split          every expert is cut over all devices instead of living on one (vLLM without expert parallelism); no placement then
    exchange       how tokens reach experts: all-to-all (the cost model's transport), or all-gather and reduce-scatter
    ahead          a step is scheduled while the one before it runs (vLLM: async scheduling): of the host's work only what takes longer than
                   the devices' shows, and a request waits one step more
    prefix_cache   prompts that begin alike share cached blocks, and find those of earlier ones (vLLM: enable_prefix_caching)
    balance        least-loaded: a request goes to a rank as it arrives; shared: it waits in one queue for the first free place
    prefill        instances that only compute prompts and hand them over (disaggregated serving); None: prompts are computed here
    hand_over_Bps  bandwidth out of a prefill rank (None: the NIC, else the link, of its device)
    host_s         seconds of a step on the host: scheduling, input preparation
    price_per_hour of one device (None: the profile's rent; none there: no cost is given)
    expert_profile measured time of one MoE layer with the experts as a device holds them; None: the cost model's expert kernel
    law            seconds of a step (None: from the cost model and a routing; see `StepLaw.of`)

    Raises InputError for sizes below 1 or a placement that does not fit.
    """

    model: ModelSpec
    cluster: Cluster
    name: str = "deployment"
    replicas: int = 1
    tp: int = 1
    placement: Placement | None = None
    max_seqs: int = 256
    max_batch_tokens: int = 8192
    block_tokens: int = 16
    memory_share: float = 0.9
    cache_tokens: int | None = None
    split: bool = False
    exchange: Literal["all-to-all", "all-gather"] = "all-to-all"
    balance: Literal["least-loaded", "shared"] = "least-loaded"
    ahead: bool = False
    prefix_cache: bool = False
    prefill: Deployment | None = None
    hand_over_Bps: float | None = None
    host_s: float = HOST_S
    price_per_hour: float | None = None
    cost: CostModel | None = None
    expert_profile: MoeProfile | None = None
    law: StepLaw | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("replicas", "tp", "max_seqs", "max_batch_tokens", "block_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"deployment {self.name!r}: {name}={value!r} must be a whole number >= 1")
        if self.max_seqs > MOST_SEQS:
            raise InputError(f"deployment {self.name!r}: max_seqs={self.max_seqs} exceeds {MOST_SEQS:,}; lower it")
        if self.cluster.size % self.tp:
            raise InputError(f"deployment {self.name!r}: {self.cluster.size} devices do not divide into ranks of tp={self.tp}")
        if not 0 < self.memory_share <= 1:
            raise InputError(f"deployment {self.name!r}: memory_share={self.memory_share!r} must be above 0 and at most 1")
        if not (math.isfinite(self.host_s) and self.host_s >= 0):
            raise InputError(f"deployment {self.name!r}: host_s={self.host_s!r} must be finite seconds >= 0")
        if self.exchange not in EXCHANGES or self.balance not in BALANCES:
            known = f"{' or '.join(EXCHANGES)}, {' or '.join(BALANCES)}"
            raise InputError(f"deployment {self.name!r}: exchange={self.exchange!r}, balance={self.balance!r}; use {known}")
        if not self.model.moe_layers and (self.cluster.size > self.tp or self.split or self.expert_profile):
            raise InputError(
                f"deployment {self.name!r}: {self.model.name} has no experts to spread, cut or measure; lay it out as tp{self.cluster.size}, "
                "with replicas for more"
            )
        if self.split and (self.placement is not None or self.model.intermediate % self.cluster.size):
            raise InputError(
                f"deployment {self.name!r}: experts of width {self.model.intermediate} cut over {self.cluster.size} devices take no placement, and a "
                "number of devices that divides the width"
            )
        if self.prefill is not None and (self.prefill.prefill is not None or self.prefill.model.digest != self.model.digest):
            raise InputError(f"deployment {self.name!r}: prefill must be a deployment of the same model without a prefill of its own")
        if self.placement is not None and (self.placement.devices, self.placement.experts, self.placement.layers) != (
            self.cluster.size,
            self.model.experts,
            self.model.moe_layers,
        ):
            raise InputError(
                f"deployment {self.name!r}: a placement of {self.placement.experts} experts on {self.placement.devices} devices, for a model with "
                f"{self.model.experts} on {self.cluster.size}; plan for this cluster"
            )

    @property
    def width(self) -> int:
        """Data-parallel ranks of one instance; they step together."""
        return self.cluster.size // self.tp

    @property
    def ranks(self) -> int:
        """Data-parallel ranks of all instances."""
        return self.replicas * self.width

    @property
    def devices(self) -> int:
        """Devices of all instances, those that only compute prompts included."""
        return self.replicas * self.cluster.size + (self.prefill.devices if self.prefill else 0)

    @cached_property
    def costs(self) -> CostModel:
        """The cost model of an instance."""
        return self.cost or CostModel.of(self.cluster, self.model)

    @cached_property
    def experts(self) -> Placement:
        """Where the experts of an instance are."""
        return self.placement or even_placement(self.model, self.cluster.size)

    @cached_property
    def cache_tokens_per_rank(self) -> int:
        """Tokens whose keys and values a rank can hold: what weights, activations and buffers leave of `memory_share`.

        Raises InputError when they leave less than one block.
        """
        if self.cache_tokens is not None:
            return self.cache_tokens
        use = self.costs.memory(self.experts, tokens_per_device=self.max_batch_tokens // self.tp or 1)
        outside = use.capacity_B_G * (1 - self.memory_share)  # holds the reserved bytes first
        held = use.experts_B_G + use.dense_B_G / self.tp + use.activations_B_G + use.buffers_B_G + np.maximum(use.reserved_B_G - outside, 0.0)
        shape = attention_shape(self.model)
        shards = 1 if shape.kv_rank else min(self.tp, shape.kv_heads)  # a latent cache is not split over heads
        free_B = float((use.capacity_B_G * self.memory_share - held).min())
        tokens = int(free_B * shards // (kv_token_B(self.model) * self.model.layers))
        if tokens < self.block_tokens:
            raise InputError(
                f"deployment {self.name!r}: {self.model.name} leaves {free_B / 1e9:.3g} GB for a key-value cache on a device of {self.cluster.name} "
                f"({self.cluster.size} devices); take more devices, larger ones, or fewer bits per weight"
            )
        return tokens

    def prepared(self, routing: Routing | None = None, *, seed: int = 0) -> Deployment:
        """The same with its step law made, here and in `prefill`: what to do before many runs."""
        ahead = self.prefill.prepared(routing, seed=seed) if self.prefill else None
        return replace(self, law=self.law or StepLaw.of(self, routing, seed=seed), prefill=ahead)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        own = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in ("model", "cluster", "placement", "cost", "law", "prefill", "cache_tokens", "expert_profile")
        }
        return {
            **own,
            "model": self.model.name,
            "cluster": self.cluster.name,
            "devices": self.devices,
            "ranks": self.ranks,
            "cache_tokens": self.cache_tokens_per_rank,
            "expert_profile": self.expert_profile.digest if self.expert_profile else None,
            "prefill": self.prefill.to_dict() if self.prefill else None,
        }
