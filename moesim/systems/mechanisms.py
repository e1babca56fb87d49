"""Mechanisms: the few ways published systems change how a MoE layer runs. A `System` composes them.

Routing   which tokens go where, and which experts are on a device for the step (moesim.systems.routing)
Exchange  what the all-to-alls carry and how they travel
Schedule  what runs beside what
Ring      experts of whole layers that take turns on the device
Residency experts that do not all stay on the device (moesim.systems.residency)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moesim.cost import TRANSPORTS
from moesim.errors import InputError
from moesim.systems.residency import Residency
from moesim.systems.routing import Plain, Routing, nested
from moesim.systems.slicing import Sliced


def _at_least(what: str, value: float, least: float) -> None:
    if not value >= least:
        raise InputError(f"{what}={value!r}: must be >= {least:g}; correct the system")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The two all-to-alls of a layer.

    transports   ways to travel to choose from in every step and layer (`moesim.cost.TRANSPORTS`); None: the cost model's
    bytes_scale  bytes of a token copy over those of its hidden state (projected or clustered tokens)
    project      width of a projection of every token before dispatch and back after combine, over the hidden size
    masks        capacity factor of the one-hot masks whose dense products put tokens into the experts' buffers and take them
                 out again (the einsum of GShard; fairseq and DeepSpeed before their kernels); 0: tokens are gathered by index
    sm_share     share of the compute the communication kernels take while they run
    """

    transports: tuple[str | None, ...] = (None,)
    bytes_scale: float = 1.0
    project: float = 0.0
    masks: float = 0.0
    sm_share: float = 0.0

    def __post_init__(self) -> None:
        _at_least("bytes_scale", self.bytes_scale, 0)
        _at_least("project", self.project, 0)
        _at_least("masks", self.masks, 0)
        if not self.transports or not set(self.transports) <= {None, *TRANSPORTS}:
            raise InputError(f"transports {self.transports}: give at least one of {', '.join(TRANSPORTS)}, or None for the cost model's")
        if not 0 <= self.sm_share < 1:
            raise InputError(f"sm_share={self.sm_share}: give a share in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What runs beside what.

    forward, backward    pipeline degrees to choose from in every step and layer: tokens in r parts, experts of one part
                         beside the all-to-all of the next
    tiers_apart          links inside nodes and NICs are separate stages, so that they too run beside each other
    shared_beside        shared experts run beside the dispatch, not before it
    gradients_in_gaps    gradient reduction runs in pieces beside the backward pass, giving way to all-to-alls
    batches              2: every step's tokens in two halves that go through all layers on their own, attention and experts of
                         one beside the all-to-alls of the other; inference only, steps still begin together
    """

    forward: tuple[int, ...] = (1,)
    backward: tuple[int, ...] = (1,)
    tiers_apart: bool = False
    shared_beside: bool = False
    gradients_in_gaps: bool = False
    batches: int = 1

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            degrees = getattr(self, name)
            if not degrees or any(not isinstance(r, int) or r < 1 for r in degrees):
                raise InputError(f"{name} pipeline degrees {degrees}: give whole numbers >= 1")
        if self.batches not in (1, 2):
            raise InputError(f"batches={self.batches!r}: give 1, or 2 halves that overlap")
        if self.batches > 1 and (self.forward, self.backward) != ((1,), (1,)):
            raise InputError(f"two batches with pipeline degrees {self.forward}, {self.backward}: a half is a part already; leave degrees at (1,)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """Experts of `layers` layers fit on the device; the next are copied from the host into the slot that becomes free.

    `link` names a packaged link profile to copy over; None takes the slot of the cluster's host.
    """

    layers: int
    link: str | None = None

    def __post_init__(self) -> None:
        _at_least("ring layers", self.layers, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """How a published system runs a MoE layer: a composition of mechanisms, with what to hold it to.

    paper names the publication, headline what it claims, check how this model of it is verified.
    """

    name: str
    title: str
    paper: str
    headline: str
    check: str
    routing: Routing = field(default_factory=Plain)
    exchange: Exchange = field(default_factory=Exchange)
    schedule: Schedule = field(default_factory=Schedule)
    ring: Ring | None = None
    residency: Residency | None = None

    def __post_init__(self) -> None:
        if self.ring and self.residency:
            raise InputError(f"system {self.name!r} has a ring and a residency; a layer's experts come one way: leave one out")
        if self.residency and (self.residency.order == "one-by-one" or self.residency.host) and self.schedule.forward != (1,):
            raise InputError(f"system {self.name!r}: experts one by one or on the host go with pipeline degree 1, not {self.schedule.forward}")
        if self.residency and any(isinstance(each, Sliced) for each in nested(self.routing)):
            raise InputError(f"system {self.name!r}: copies of whole experts are what a residency makes; leave out the residency or the slices")
        if self.residency and self.schedule.batches > 1:
            raise InputError(f"system {self.name!r}: copies are asked for by whole layers, not by halves; leave out the residency or the two batches")
