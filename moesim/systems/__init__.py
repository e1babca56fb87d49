"""Published systems, each a composition of mechanisms. `SYSTEMS` has them by name."""

from __future__ import annotations

from moesim.systems import (
    bigmac,
    d2moe,
    deepspeed,
    edge_moe,
    exflow,
    expertflow,
    fiddler,
    fsmoe,
    hecate,
    lsh,
    m2r2,
    m3vit,
    moe_infinity,
    moepp,
    plain,
    pregated,
    readme,
    semoe,
    sn40l,
    ted,
    tutel,
    two_batch,
)
from moesim.systems.batching import OneRoute, Regrouped
from moesim.systems.mechanisms import Exchange, Ring, Schedule, System
from moesim.systems.residency import Planes, Residency
from moesim.systems.routing import Coherent, Materialised, Plain, ZeroCost
from moesim.systems.slicing import Sliced

_ALL = (
    plain.SYSTEM,
    deepspeed.SYSTEM,
    ted.SYSTEM,
    tutel.SYSTEM,
    two_batch.SYSTEM,
    fsmoe.SYSTEM,
    exflow.SYSTEM,
    hecate.SYSTEM,
    bigmac.SYSTEM,
    lsh.SYSTEM,
    moepp.SYSTEM,
    semoe.SYSTEM,
    pregated.SYSTEM,
    expertflow.SYSTEM,
    readme.SYSTEM,
    moe_infinity.SYSTEM,
    d2moe.SYSTEM,
    m2r2.SYSTEM,
    edge_moe.SYSTEM,
    m3vit.SYSTEM,
    sn40l.SYSTEM,
    fiddler.SYSTEM,
)
SYSTEMS = {system.name: system for system in _ALL}

__all__ = [
    "SYSTEMS",
    "Coherent",
    "Exchange",
    "Materialised",
    "OneRoute",
    "Plain",
    "Planes",
    "Regrouped",
    "Residency",
    "Ring",
    "Schedule",
    "Sliced",
    "System",
    "ZeroCost",
]
