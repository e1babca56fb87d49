"""CacheProblem: what a caching solver gets.

Suffixes: S steps, L MoE layers, E experts, G devices, C cache sizes (0 .. E slots), T tokens, K selections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.attention import Mode
from moesim.errors import InputError, PlanError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.optimize.misses import between, first, hottest, misses
from moesim.optimize.stalls import StepTimes
from moesim.optimize.tiers import Tier, memory_B_G, noise, tiers_of
from moesim.plan import TIERS, CachePlan, Placement, Plan, slots_per_device
from moesim.plan.cache import HBM
from moesim.replay import Events, load_policy, policies
from moesim.systems.residency import foreseeing
from moesim.trace import Trace
from moesim.units import human

FORESEEING = ("belady", "lookahead", "optimal", "pinned-lru", "static")  # policies that know the very tokens they are judged on
MOST_TOKENS = 1 << 18  # learnt from or judged on; more change a plan less than the choice of the tokens does
PARTS = 16
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheProblem:
    """Keep in fast memory what is asked for most, given how the steps of `experts_TLK` asked.

    plan        which device computes which expert; one slot per expert
    budget_B_G  bytes of each device for experts
    tiers       where the others are, fastest first (`host`, then `nvme` where there is one)
    bits        bits per weight to choose from, most first; the first is what the checkpoint serves in
    policy      which expert gives way, and prefetcher, distance, recall: what is copied ahead (a solver may choose others)
    most_loss   the largest `loss` an answer may have
    ends_S      tokens up to the end of each step
    tokens_per_device, mode, context   what a step is, as in the simulators
    """

    model: ModelSpec
    plan: Plan
    cost: CostModel
    experts_TLK: NDArray[np.uint16]
    ends_S: Ints
    budget_B_G: Floats
    tiers: tuple[Tier, ...]
    bits: tuple[float, ...]
    tokens_per_device: int = 1
    mode: Mode = "decode"
    context: int = 4096
    policy: str = "lru"
    prefetcher: str = "none"
    distance: int = 1
    recall: float = 1.0
    most_loss: float = np.inf
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        placement = self.plan.placement
        if (placement.replicas_LE > 1).any():
            raise PlanError(f"plan {self.plan.name!r} holds replicas; a cache plan needs one slot per expert, since what is cached is not replicated")
        if not self.bits or sorted(set(self.bits), reverse=True) != list(self.bits) or not all(0 < b <= 64 for b in self.bits):
            raise InputError(f"bits {self.bits}: give different numbers in 0..64, most first")
        if self.policy in FORESEEING:
            raise InputError(
                f"policy {self.policy!r} knows what will be asked for, so no plan can use it; take one of {', '.join(self.policies)} "
                "(solver pin-set pins what was asked for most)"
            )
        if not self.most_loss >= 0 or self.tokens_per_device < 1:
            raise InputError(f"most_loss(={self.most_loss}) must be >= 0 and tokens_per_device(={self.tokens_per_device}) >= 1")
        load_policy(self.policy)
        foreseeing(self.prefetcher, self.distance, self.recall)
        if not (np.isfinite(self.budget_B_G).all() and (self.budget_B_G >= 0).all()) or len(self.budget_B_G) != placement.devices:
            raise InputError(f"memory {self.budget_B_G}: give bytes >= 0 for each of {placement.devices} devices")

    @classmethod
    def of(
        cls,
        trace: Trace,
        cluster: Cluster,
        memory: float | str,
        *,
        plan: Plan | None = None,
        tokens_per_device: int = 1,
        mode: Mode = "decode",
        context: int = 4096,
        bits: Sequence[float] = (),
        room: Mapping[str, tuple[float, float]] | None = None,
        most_loss: float = np.inf,
        policy: str = "lru",
        prefetcher: str = "none",
        distance: int = 1,
        recall: float = 1.0,
        cost: CostModel | None = None,
    ) -> CacheProblem:
        """Problem of a trace's selected tokens, at most the first `MOST_TOKENS`, cut into steps as the simulators cut them.

        `memory` is bytes of each device ("24 GB") or a share of the experts it computes ("50%"). `plan` defaults to experts in
        order. `room` limits tiers by name: bytes on all nodes together, and $/h for a byte. Raises ProfileError where a device
        has no host, PlanError where experts do not divide over the devices.
        """
        model, where = trace.model, plan or linear_plan(trace.model, cluster)
        where.check_fits(model, cluster.size, place=f"plan {where.name!r}")
        held_B_G = where.placement.holds_LGE.sum(axis=(0, 2)) * model.expert_B
        empty = cls(
            model=model,
            plan=where,
            cost=cost or CostModel.of(cluster, model),
            experts_TLK=np.zeros((0, len(model.moe_layers), 1), np.uint16),
            ends_S=np.zeros(0, np.int64),
            tokens_per_device=tokens_per_device,
            mode=mode,
            context=context,
            budget_B_G=memory_B_G(memory, held_B_G),
            tiers=tiers_of(cluster, room or {}),
            bits=tuple(dict.fromkeys(sorted((model.weight_bits, *bits), reverse=True))),
            most_loss=most_loss,
            policy=policy,
            prefetcher=prefetcher,
            distance=distance,
            recall=recall,
        )
        return cls.like(empty, trace)

    @classmethod
    def like(cls, other: CacheProblem, trace: Trace) -> CacheProblem:
        """The problem `other` with the tokens of another trace, or of another part of its own."""
        ids, notes = _first_tokens(trace, MOST_TOKENS)
        steps = max(1, round(len(ids) / (other.tokens_per_device * other.cluster.size)))
        return replace(other, experts_TLK=ids, ends_S=np.arange(1, steps + 1) * len(ids) // steps, notes=notes)

    @cached_property
    def _curves(self) -> dict[tuple[str, str, int], Floats]:
        return {}

    def between(self, start: int, stop: int) -> CacheProblem:
        """The same problem with steps start .. stop - 1 alone."""
        first = int(self.ends_S[start - 1]) if start else 0
        return replace(self, experts_TLK=self.experts_TLK[first : self.ends_S[stop - 1]], ends_S=self.ends_S[start:stop] - first)

    @property
    def cluster(self) -> Cluster:
        """Where the experts are."""
        return self.cost.cluster

    @property
    def steps(self) -> int:
        """Number of steps, S."""
        return len(self.ends_S)

    @cached_property
    def events_G(self) -> tuple[Events, ...]:
        """What the cache of each device is asked for."""
        placement = self.plan.placement
        step_T = np.repeat(np.arange(self.steps), np.diff(self.ends_S, prepend=0))
        events = Events.from_experts(self.experts_TLK, experts=self.model.experts, step_T=step_T)
        return events.split(placement.holds_LGE.argmax(axis=1), placement.devices)

    @cached_property
    def times(self) -> StepTimes:
        """Seconds of every step with all experts in place."""
        return StepTimes.of(
            self.cost,
            self.plan.placement,
            self.experts_TLK,
            self.ends_S,
            tokens_per_device=self.tokens_per_device,
            mode=self.mode,
            context=self.context,
        )

    @cached_property
    def asked_LE(self) -> Ints:
        """Steps that asked for each expert."""
        return np.asarray(np.sum([events.load_LE for events in self.events_G], axis=0))

    @cached_property
    def weight_LE(self) -> Floats:
        """Share of its layer's selections that each expert serves, over the layers: the importance in `loss`."""
        load_LE = np.stack([np.bincount(ids.ravel(), minlength=1 << 16)[: self.model.experts] for ids in self.experts_TLK.transpose(1, 0, 2)])
        total_L1 = np.maximum(load_LE.sum(axis=1, keepdims=True), 1)
        return np.asarray(load_LE / total_L1 / len(load_LE))

    @property
    def held_LG(self) -> Ints:
        """Experts each device computes."""
        return np.asarray(self.plan.placement.holds_LGE.sum(axis=2), np.int64)

    @property
    def slots_G(self) -> Ints:
        """Experts as served that fit each device's budget, over all layers, no more than it computes."""
        fit_G = np.floor(self.budget_B_G / self.model.expert_B * (1 + 1e-12))
        return np.asarray(np.minimum(fit_G, self.held_LG.sum(axis=0)).astype(np.int64))

    @cached_property
    def tier_LE(self) -> NDArray[np.uint8]:
        """Tier of each expert as served when none is pinned: the fastest with room, those asked for most first."""
        order = np.argsort(-self.asked_LE, axis=None, kind="stable")
        tiers = np.full(order.size, len(TIERS) - 1, np.uint8)
        first = 0
        for tier in self.tiers:
            last = int(min(order.size, first + tier.capacity_B / self.model.expert_B * (1 + 1e-12)))
            tiers[order[first:last]] = TIERS.index(tier.name)
            first = last
        return tiers.reshape(self.asked_LE.shape)

    def copy_s(self, tier: int, device: int, size_B: float) -> float:
        """Seconds of copying one expert of `size_B` bytes from a tier (index into `TIERS`) to a device; none from hbm."""
        return 0.0 if tier == HBM else next(each for each in self.tiers if each.name == TIERS[tier]).copy_s(device, size_B)

    @cached_property
    def copy_s_LG(self) -> Floats:
        """Seconds of copying an expert that is missing, mean over what the steps asked for."""
        each_T = np.zeros((len(TIERS), self.plan.placement.devices))
        for tier in {int(tier) for tier in np.unique(self.tier_LE)}:
            each_T[tier] = [self.copy_s(tier, g, self.model.expert_B) for g in range(each_T.shape[1])]
        holds = self.plan.placement.holds_LGE
        asked_LGE = (self.asked_LE + 1e-9)[:, None] * holds  # a layer nobody asks weighs its experts equally
        spent_LGE = asked_LGE * each_T[self.tier_LE].transpose(0, 2, 1)
        return np.asarray(np.divide(spent_LGE.sum(axis=2), asked_LGE.sum(axis=2), out=np.zeros(holds.shape[:2]), where=holds.any(axis=2)))

    def misses(self, policy: str, pinned: int = 0) -> Floats:
        """miss_LGC: misses of every layer and device with c slots, the first `pinned` of them filled for good with the experts most
        asked for; what is pinned is there from the start, all else is missing when first asked for."""
        most = int(self.held_LG.max())
        return self._once(("whole", policy, pinned), lambda: misses(self.events_G, self.hottest_LGE, load_policy(policy), pinned, most=most))

    def misses_by_part(self, policy: str, pinned: int = 0) -> Floats:
        """miss_BLGC: misses in each of B consecutive parts of the steps, for judging how sure a gain is.

        Every part begins with free slots that its first experts fill without a copy, as if it went on from the part before,
        and pins what the other parts ask for most.
        """

        def parts() -> Floats:
            edges = np.linspace(0, self.steps, self.parts + 1).astype(np.int64)
            all_LGE = np.stack([events.load_LE for events in self.events_G], axis=1)
            rule, most = load_policy(policy), int(self.held_LG.max())
            found = []
            for start, stop in pairwise(edges):
                part_G = [between(events, start, stop) for events in self.events_G]
                others_LGE = all_LGE - np.stack([events.load_LE for events in part_G], axis=1)
                found.append(misses(part_G, hottest(others_LGE), rule, pinned, most=most, warm=True))
            return np.stack(found)

        return self._once(("parts", policy, pinned), parts)

    @property
    def policies(self) -> tuple[str, ...]:
        """Installed policies that a plan can use."""
        return tuple(name for name in policies() if name not in FORESEEING)

    def rent_s(self, tier: int, size_B: float) -> float:
        """What `size_B` bytes in a tier (index into `TIERS`) cost during a step, in seconds that all devices together can be
        rented for; 0 in hbm and in tiers without a price. Raises InputError where a tier has a price and a device none."""
        price = next((each.rent_per_B_h for each in self.tiers if each.name == TIERS[tier]), 0.0)
        if not price:
            return 0.0
        rents = [device.rent_per_hour for device in self.cluster.devices]
        if not all(rents):
            raise InputError(
                f"{TIERS[tier]} has a price, but a device of {self.cluster.name!r} has none; add [price] to its profile, or leave out the tier's"
            )
        return size_B * price / sum(rent for rent in rents if rent) * float(self.times.step_s_S.mean())

    @property
    def parts(self) -> int:
        """Parts the steps are cut into, B: at most `PARTS`, of two steps or more each."""
        return max(1, min(PARTS, self.steps // 2))

    @cached_property
    def hottest_LGE(self) -> Ints:
        """Experts of each layer and device in the order of how often they are asked for, most first; of equals the lower id."""
        return hottest(np.stack([events.load_LE for events in self.events_G], axis=1))

    def pins_LE(self, pinned_LG: Ints) -> NDArray[np.bool_]:
        """The `pinned_LG` hottest experts of every layer and device."""
        return np.asarray((first(self.hottest_LGE, pinned_LG) & self.plan.placement.holds_LGE).any(axis=1))

    def _once(self, key: tuple[str, str, int], make: Callable[[], Floats]) -> Floats:
        if key not in self._curves:
            self._curves[key] = make()
        return self._curves[key]

    def stall_s(self, miss_LGC: Floats) -> Floats:
        """Seconds a step waits when every missing expert is copied on demand, of every layer, device and number of slots."""
        return np.asarray(miss_LGC * self.copy_s_LG[:, :, None] / max(self.steps, 1))

    def loss(self, bits_LE: NDArray[np.floating]) -> float:
        """Proxy of what fewer bits cost: rounding noise over signal, 4^-bits (6.02 dB a bit, Bennett 1948), 0 as served, weighted
        by `weight_LE`. It orders allocations; it is no statement about a model's quality."""
        return float((self.weight_LE * noise(bits_LE, self.bits[0])).sum())

    def answer(
        self,
        name: str,
        slots_LG: NDArray[np.integer],
        *,
        pinned_LE: NDArray[np.bool_] | None = None,
        tier_LE: NDArray[np.uint8] | None = None,
        bits_LE: Floats | None = None,
    ) -> CachePlan:
        """Cache plan of this problem, with its policy and prefetcher, from a solver's arrays; raises PlanError when it is invalid."""
        tiers = self.tier_LE if tier_LE is None else tier_LE
        return CachePlan(
            name=name,
            model=self.model.name,
            model_digest=self.model.digest,
            layers=self.model.moe_layers,
            slots_LG=np.asarray(slots_LG, np.int32),
            tier_LE=tiers if pinned_LE is None else np.where(pinned_LE, np.uint8(HBM), tiers),
            bits_LE=np.full(self.asked_LE.shape, self.bits[0]) if bits_LE is None else bits_LE,
            policy=self.policy,
            prefetcher=self.prefetcher,
            distance=self.distance,
            recall=self.recall,
            placement=self.plan.digest,
        )

    def infeasible(self, bits: float | None = None) -> str | None:
        """Why no cache plan with experts of `bits` bits (default: the fewest to choose from) can exist, or None."""
        if not len(self.experts_TLK):
            return "there are no tokens to learn from; select some"
        size_B = self.model.expert_parameters * (bits or self.bits[-1]) / 8
        short = np.flatnonzero((self.budget_B_G * (1 + 1e-12) < size_B) & self.held_LG.any(axis=0))
        if short.size:
            g = int(short[0])
            return f"memory of {human(self.budget_B_G[g], 'B')} on device {g} holds no expert of {human(size_B, 'B')}; give at least that"
        room_B, all_B = sum(tier.capacity_B for tier in self.tiers), size_B * self.asked_LE.size
        if room_B < all_B:
            rooms = " and ".join(f"{human(tier.capacity_B, 'B')} of {tier.name}" for tier in self.tiers)
            return f"all experts together, {human(all_B, 'B')}, do not fit into {rooms}; take another host or more of it"
        return None

    def broken(self, plan: CachePlan) -> str | None:
        """What an answer does that this problem forbids, or None."""
        used_B_G = plan.hbm_B_G(self.model.expert_parameters, self.plan.placement.holds_LGE)
        if (used_B_G > self.budget_B_G * (1 + 1e-9)).any():
            g = int((used_B_G - self.budget_B_G).argmax())
            return f"device {g} would hold {human(used_B_G[g], 'B')} of experts in {human(self.budget_B_G[g], 'B')}"
        for tier in self.tiers:
            here_B = float((plan.bits_LE * (plan.tier_LE == TIERS.index(tier.name))).sum()) * self.model.expert_parameters / 8
            if here_B > tier.capacity_B * (1 + 1e-9):
                return f"{tier.name} would hold {human(here_B, 'B')} of experts in {human(tier.capacity_B, 'B')}"
        if unknown := sorted({TIERS[t] for t in np.unique(plan.tier_LE)} - {"hbm", *(tier.name for tier in self.tiers)}):
            return f"experts are put on {unknown[0]}, which {self.cluster.name!r} does not have"
        if not set(np.unique(plan.bits_LE).tolist()) <= set(self.bits):
            return f"experts have {sorted(set(np.unique(plan.bits_LE).tolist()) - set(self.bits))} bits; the choices are {self.bits}"
        loss = self.loss(plan.bits_LE)
        return f"loss {loss:.3g} exceeds {self.most_loss:.3g}" if loss > self.most_loss * (1 + 1e-9) else None


def linear_plan(model: ModelSpec, cluster: Cluster) -> Plan:
    """Experts in order of their ids, as many on every device: what engines do without a plan."""
    slots_G = slots_per_device(model.experts, cluster.size)
    slots_LP = np.tile(np.arange(model.experts, dtype=np.int32), (len(model.moe_layers), 1))
    placement = Placement(slots_LP=slots_LP, slots_G=slots_G, experts=model.experts, layers=model.moe_layers)
    return Plan(name="linear", model=model.name, model_digest=model.digest, placement=placement)


def _first_tokens(trace: Trace, most: int) -> tuple[NDArray[np.uint16], tuple[str, ...]]:
    """At most the first `most` tokens (a cache needs neighbours, so none are skipped), and a remark if there are more."""
    gathered, seen = [], 0
    for batch in trace.batches():
        gathered.append(batch.experts_TLK[: most - seen])
        seen += len(gathered[-1])
        if seen >= most:
            break
    return np.concatenate(gathered), (f"the first {seen:,} of {trace.tokens:,} tokens are looked at",) if trace.tokens > seen else ()
