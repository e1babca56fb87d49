"""Published systems, each a composition of mechanisms. `SYSTEMS` has them by name."""

from __future__ import annotations

from moesim.systems import bigmac, deepspeed, exflow, fsmoe, hecate, lsh, moepp, plain, semoe, tutel
from moesim.systems.mechanisms import Exchange, Ring, Schedule, System
from moesim.systems.routing import Coherent, Materialised, Plain, ZeroCost

_ALL = (
    plain.SYSTEM,
    deepspeed.SYSTEM,
    tutel.SYSTEM,
    fsmoe.SYSTEM,
    exflow.SYSTEM,
    hecate.SYSTEM,
    bigmac.SYSTEM,
    lsh.SYSTEM,
    moepp.SYSTEM,
    semoe.SYSTEM,
)
SYSTEMS = {system.name: system for system in _ALL}

__all__ = ["SYSTEMS", "Coherent", "Exchange", "Materialised", "Plain", "Ring", "Schedule", "System", "ZeroCost"]
