"""Tutel (Flex): pipeline degree and all-to-all chosen anew in every step and layer, at no cost of switching."""

from __future__ import annotations

from itertools import product

from moesim.errors import InputError
from moesim.systems.mechanisms import Exchange, Schedule, System

DEGREES = (1, 2, 4, 8)
TRANSPORTS: tuple[str | None, ...] = (None, "hierarchical")

SYSTEM = System(
    name="tutel",
    title="Tutel, adaptive parallelism and pipelining",
    paper="Tutel, arXiv 2206.03382",
    headline="4.96x for one layer on 16 A100, 5.75x on 2,048; SwinV2-MoE 1.55x training, 2.11x inference",
    check="never slower than any fixed choice in any step; equal to the best one when the load is constant",
    exchange=Exchange(transports=TRANSPORTS),
    schedule=Schedule(forward=DEGREES, backward=DEGREES),
)

FAIRSEQ = System(
    name="fairseq",
    title="Expert parallelism as in fairseq, tokens dispatched by dense masks",
    paper="GShard, arXiv 2006.16668, algorithm 2; facebookresearch/fairseq@26d62ae, moe_layer.py",
    headline="the baseline of Tutel's headline",
    check="plain, and two dense products with [tokens, rows] masks around the exchange",
    exchange=Exchange(masks=1.0),
)


def fixed(transport: str | None, degree: int) -> System:
    """Tutel held to one choice."""
    if (transport, degree) not in product(TRANSPORTS, DEGREES):
        raise InputError(f"({transport!r}, {degree}) is not among Tutel's choices; take a transport of {TRANSPORTS} and a degree of {DEGREES}")
    return System(
        name=f"tutel-{transport or 'default'}-{degree}",
        title=f"Tutel fixed to {transport or 'the default transport'}, degree {degree}",
        paper=SYSTEM.paper,
        headline="a static choice",
        check=SYSTEM.check,
        exchange=Exchange(transports=(transport,)),
        schedule=Schedule(forward=(degree,), backward=(degree,)),
    )
