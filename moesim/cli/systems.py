"""`moesim systems`: published systems that can be simulated."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moesim.cli.options import AsJson

if TYPE_CHECKING:
    from moesim.systems import System

NAME = "systems"
_WORDS = {
    "bytes_scale": "bytes of a token copy, over its hidden state",
    "project": "projection before and after the exchange, over the hidden size",
    "masks": "tokens dispatched by dense products with one-hot masks, capacity factor",
    "transports": "transports to choose from",
    "forward": "pipeline degrees to choose from, forward",
    "backward": "pipeline degrees to choose from, backward",
    "tiers_apart": "links inside nodes and NICs are stages of their own",
    "shared_beside": "shared experts run beside the dispatch",
    "gradients_in_gaps": "gradients are reduced in the gaps of the backward pass",
    "batches": "halves of a step that overlap",
    "sm_share": "share of compute that communication takes",
}
EPILOG = "Then: moesim simulate TRACE PLAN --system tutel · moesim compare TRACE PLAN --system plain --system tutel"


def run(json: AsJson = False) -> None:
    """List the published systems, what each changes against plain expert parallelism, what it claims and how that is checked."""
    from moesim.cli.screen import emit_json
    from moesim.systems import SYSTEMS

    if json:
        about = ("name", "title", "paper", "headline", "check")
        emit_json({"systems": [{**{key: getattr(s, key) for key in about}, "changes": changes(s)} for s in SYSTEMS.values()]})
        return
    for s in SYSTEMS.values():
        print(f"{s.name}: {s.title} ({s.paper})")
        for label, text in (("changes", "; ".join(changes(s)) or "nothing"), ("claims", s.headline), ("checked", s.check)):
            print(f"  {label:8} {text}")


def changes(system: System) -> list[str]:
    """What a system's composition sets otherwise than plain expert parallelism."""
    import inspect

    from moesim.systems import Exchange, Plain, Schedule

    found = []
    routing: Any = system.routing
    while not isinstance(routing, Plain):
        first = (inspect.getdoc(type(routing)) or type(routing).__name__).split("\n\n")[0]
        found.append(" ".join(first.split()).rstrip("."))
        routing = getattr(routing, "inner", Plain())
    for part, plain in ((system.exchange, Exchange()), (system.schedule, Schedule())):
        set_otherwise = [f.name for f in fields(part) if getattr(part, f.name) != getattr(plain, f.name)]
        found += [_said(name, getattr(part, name)) for name in set_otherwise]
    if system.ring:
        found.append(f"ring: experts of {system.ring.layers} layers on the device, copied from {system.ring.link or 'the host'}")
    if system.residency:
        found += system.residency.words()
    return found


def _said(name: str, value: Any) -> str:
    words = _WORDS[name]
    if value is True:
        return words
    if isinstance(value, tuple):
        return f"{words}: {', '.join('default' if item is None else str(item) for item in value)}"
    return f"{words}: {value:g}"
