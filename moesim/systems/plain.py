"""Plain expert parallelism: dispatch, experts, combine, one after the other."""

from __future__ import annotations

from moesim.systems.mechanisms import System

SYSTEM = System(
    name="plain",
    title="Plain expert parallelism",
    paper="GShard, arXiv 2006.16668",
    headline="the baseline of all others",
    check="equals the lockstep engine to 1e-9 without contention",
)
