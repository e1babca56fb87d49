"""Routing mechanisms: from the experts tokens chose to copies between devices and tokens per slot.

Suffixes as in moesim.cost.traffic: S steps, L MoE layers, T tokens, K selections, E experts, P slots, G devices, N nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel, Traffic, route
from moesim.errors import InputError, PlanError
from moesim.plan import Placement
from moesim.trace import NO_EXPERT

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Token copies of an exchange, from device to device and from device to node, in the direction of the dispatch."""

    pairs_SLGG: Floats
    nodes_SLGN: Floats


def member_copies(pairs: Floats, slices: int) -> Floats:
    """[..., G, G] copies that members of groups of `slices` devices send each other once `pairs` [..., G, G] have come: each
    passes on what came to all the others."""
    devices = pairs.shape[-1]
    others = np.kron(np.eye(devices // slices), np.ones((slices, slices))) - np.eye(devices)
    return np.asarray(pairs.sum(axis=-2)[..., None] * others)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """Traffic of some steps with the placement whose slots it counts.

    returning      copies whose results come back, if not those of the dispatch
    gathered_SL    experts every device receives before the layer
    context_tokens tokens whose hidden states every device receives before each step
    slices         devices that experts are cut over: groups of as many consecutive ones; copies are counted in whole hidden
                   states, of which each member gets an equal part and passes it on to the others (`member_copies`)
    """

    traffic: Traffic
    placement: Placement
    gathered_SL: NDArray[np.int64]
    returning: Copies | None = None
    context_tokens: float = 0.0
    slices: int = 1

    def copies(self, cost: CostModel, *, back: bool) -> Copies:
        """What an exchange sends by the cost model's transport: the dispatch, or the combine."""
        if back and self.returning:
            return self.returning
        return Copies(pairs_SLGG=cost.copies_SLGG(self.traffic), nodes_SLGN=self.traffic.node_copies_SLGN)


Router = Callable[[NDArray[np.uint16], NDArray[np.integer], float], Routed]


class Routing(Protocol):
    """Makes a router for one run: called in order with (experts_TLK, ends_S, tokens_per_step) of some steps."""

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """Router of one run; `gatherable` experts can be copied to every device while attention runs, `selections` are
        counted for transports that send one copy per chosen expert.
        """
        ...


def nested(routing: Routing) -> Iterator[Routing]:
    """A routing and those inside it, the outer one first."""
    inside: Routing | None = routing
    while inside is not None:
        yield inside
        inside = getattr(inside, "inner", None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """Every token goes to the devices of its experts and back."""

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`."""

        def run(experts_TLK: NDArray[np.uint16], ends_S: NDArray[np.integer], tokens_per_step: float) -> Routed:
            traffic = route(experts_TLK, placement, node_G, ends_S=ends_S, tokens_per_step=tokens_per_step, selections=selections)
            return Routed(traffic=traffic, placement=placement, gathered_SL=np.zeros((len(ends_S), len(placement.layers)), np.int64))

        return run


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroCost:
    """Some experts cost nothing: zero, copy and constant experts are on every device, hold no weights worth reading and
    send nothing."""

    experts: tuple[int, ...]

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`."""
        if outside := [e for e in self.experts if not -placement.experts <= e < placement.experts]:
            raise InputError(f"zero-cost expert {outside[0]} is outside {-placement.experts}..{placement.experts - 1}; name experts of the model")
        plain = Plain().router(placement, node_G, gatherable=gatherable, selections=selections)
        free = np.zeros(NO_EXPERT + 1, bool)
        free[[e % placement.experts for e in self.experts]] = True
        return lambda experts, ends, tokens: plain(np.where(free[experts], np.uint16(NO_EXPERT), experts), ends, tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Materialised:
    """Hot experts are gathered on every device before the layer, as many as the time of attention and the memory allow.

    An expert is hot when its mean load over the last `window` steps is above `hot` times the mean expert's.
    `slots` is the memory each device has for gathered experts of one layer.
    """

    slots: int
    window: int = 5
    hot: float = 1.2

    def __post_init__(self) -> None:
        if self.slots < 0 or self.window < 1 or self.hot < 1:
            raise InputError(f"slots={self.slots}, window={self.window}, hot={self.hot}: give slots >= 0, window >= 1, hot >= 1")

    def chosen(self, load_LE: Floats, *, gatherable: int) -> list[NDArray[np.int64]]:
        """Experts to gather in each layer, hottest first: at most min(slots, gatherable)."""
        most = min(self.slots, gatherable)
        order_LE = np.argsort(-load_LE, axis=1, kind="stable")
        count_L = np.minimum((load_LE > self.hot * load_LE.mean(axis=1, keepdims=True)).sum(axis=1), most)
        return [order[:count] for order, count in zip(order_LE, count_L.tolist(), strict=True)]

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`. A gathered expert is routed as an alias that only the token's own device holds."""
        most, devices, experts = min(self.slots, gatherable), placement.devices, placement.experts
        if experts + devices * most > NO_EXPERT:
            raise InputError(f"slots={self.slots}: {devices} devices x {most} gathered experts exceed the id range {NO_EXPERT}; use fewer slots")
        own = np.split(placement.slots_LP, np.cumsum(placement.slots_G)[:-1], axis=1)
        alias = experts + np.arange(devices * most).reshape(devices, most)
        rows = [np.hstack([held, np.tile(alias[g], (len(held), 1))]) for g, held in enumerate(own)]
        wider = Placement(
            slots_LP=np.hstack(rows).astype(np.int32),
            slots_G=placement.slots_G + np.int32(most),
            experts=experts + devices * most,
            layers=placement.layers,
            dispatch=placement.dispatch,
        )
        past: deque[Floats] = deque(maxlen=self.window)
        layers = len(placement.layers)

        def run(experts_TLK: NDArray[np.uint16], ends_S: NDArray[np.integer], tokens_per_step: float) -> Routed:
            renamed = experts_TLK.copy()
            gathered = np.zeros((len(ends_S), layers), np.int64)
            begin = 0
            for step, end in enumerate(np.asarray(ends_S).tolist()):
                part = renamed[begin:end]
                load_LE = np.stack([np.bincount(part[:, i].ravel(), minlength=NO_EXPERT + 1)[:experts] for i in range(layers)]).astype(np.float64)
                source_T = np.arange(end - begin) * devices // max(1, end - begin)
                for layer, hot in enumerate(self.chosen(np.mean(past, axis=0), gatherable=gatherable) if past else []):
                    gathered[step, layer] = len(hot)
                    for rank, expert in enumerate(hot.tolist()):
                        token, choice = np.nonzero(part[:, layer] == expert)
                        part[token, layer, choice] = alias[source_T[token], rank]
                past.append(load_LE)
                begin = end
            traffic = route(renamed, wider, node_G, ends_S=ends_S, tokens_per_step=tokens_per_step, selections=selections)
            return Routed(traffic=traffic, placement=wider, gathered_SL=gathered)

        return run


@dataclass(frozen=True, kw_only=True, slots=True)
class Coherent:
    """Every device holds the context, so a token stays where its first expert was: it goes straight to its next experts.

    Results of a token's other experts go to that device; with one expert per token there is nothing to send back. New
    tokens are gathered on all devices before every step. Attention is taken as evenly spread, wherever tokens stay.
    Needs a placement without replicas (PlanError).
    """

    def router(self, placement: Placement, node_G: NDArray[np.integer], *, gatherable: int, selections: bool = False) -> Router:
        """See `Routing`."""
        if (placement.replicas_LE > 1).any():
            raise PlanError("coherent routing needs one slot per expert; this placement has replicas: plan without them")
        slot_LE = np.argsort(placement.slots_LP, axis=1, kind="stable")
        layers, devices, slots, nodes = len(placement.layers), placement.devices, placement.slots_LP.shape[1], int(np.max(node_G)) + 1
        node_of = np.zeros((devices, nodes), bool)
        node_of[np.arange(devices), node_G] = True

        def run(experts_TLK: NDArray[np.uint16], ends_S: NDArray[np.integer], tokens_per_step: float) -> Routed:
            steps, tokens = len(ends_S), len(experts_TLK)
            length_S = np.diff(ends_S, prepend=0)
            step_T = np.repeat(np.arange(steps), length_S)
            home_T = (np.arange(tokens) - (ends_S - length_S)[step_T]) * devices // length_S[step_T]
            scale_S = tokens_per_step / length_S
            lives = np.bincount(step_T * devices + home_T, minlength=steps * devices).reshape(steps, devices) * scale_S[:, None]
            filled = np.zeros((steps, layers, slots))
            there, back = np.zeros((2, steps, layers, devices, devices))
            there_N, back_N = np.zeros((2, steps, layers, devices, nodes))
            for layer in range(layers):
                ids_TK = experts_TLK[:, layer]
                token, choice = np.nonzero(ids_TK != NO_EXPERT)
                slot = slot_LE[layer, ids_TK[token, choice]]
                filled[:, layer] = np.bincount(step_T[token] * slots + slot, minlength=steps * slots).reshape(steps, slots)
                visits_TG = np.zeros((tokens, devices), bool)
                visits_TG[token, placement.device_P[slot]] = True
                stay_T = home_T.copy()
                first = np.unique(token, return_index=True)[1]
                stay_T[token[first]] = placement.device_P[slot[first]]
                nodes_TN = visits_TG @ node_of
                for home, pairs, pairs_N in ((home_T, there, there_N), (stay_T, back, back_N)):
                    for visits, matrix in ((visits_TG, pairs), (nodes_TN, pairs_N)):
                        t, to = np.nonzero(visits)
                        width = visits.shape[1]
                        counts = np.bincount((step_T[t] * devices + home[t]) * width + to, minlength=steps * devices * width)
                        matrix[:, layer] = counts.reshape(steps, devices, width)
                home_T = stay_T
            scale = scale_S[:, None, None, None]
            traffic = Traffic(slot_tokens_SLP=filled * scale[..., 0], copies_SLGG=there * scale, node_copies_SLGN=there_N * scale, tokens_SG=lives)
            return Routed(
                traffic=traffic,
                placement=placement,
                gathered_SL=np.zeros((steps, layers), np.int64),
                returning=Copies(pairs_SLGG=back * scale, nodes_SLGN=back_N * scale),
                context_tokens=tokens_per_step,
            )

        return run
