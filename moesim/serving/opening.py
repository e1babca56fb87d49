"""Arrivals and mixes of domains by texts, as people write them: a file, or a process with its numbers; domains from a time on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.serving.arrivals import Arrivals
from moesim.serving.formats import load_arrivals
from moesim.serving.generate import PROCESSES, generate, lognormal
from moesim.units import parse


def open_arrivals(text: str, *, seed: int) -> Arrivals:
    """Arrivals of a file, or of a process written as in poisson:rate=20,span=10min,prompt=800,output=250.

    `prompt` and `output` are tokens: a number (log-normal with that mean), or =number for exactly that many. Raises InputError.
    """
    process, colon, rest = text.partition(":")
    if not colon or process not in PROCESSES:
        return load_arrivals(Path(text))
    given: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name.strip() in given:
            raise InputError(f"arrivals {text!r}: {part!r} is not understood; write for example {process}:rate=20,span=10min,prompt=800,output=250")
        given[name.strip()] = value.strip()
    if missing := [name for name in ("rate", "span", "prompt", "output") if name not in given]:
        raise InputError(f"arrivals {text!r}: {missing[0]} is missing; write for example {process}:rate=20,span=10min,prompt=800,output=250")

    def tokens(value: str) -> Any:
        return int(value[1:]) if value.startswith("=") else lognormal(float(value))

    try:
        return generate(
            process,
            requests_per_s=float(given.pop("rate")),
            span_s=seconds(given.pop("span")),
            prompt=tokens(given.pop("prompt")),
            output=tokens(given.pop("output")),
            seed=seed,
            **{name: seconds(value) if name.endswith("_s") else float(value) for name, value in given.items()},
        )
    except ValueError as problem:
        raise InputError(f"arrivals {text!r}: {problem}") from None


def parse_mix(texts: Sequence[str]) -> list[tuple[float, Mapping[str, float]]]:
    """(from second, {domain: weight}) of texts such as "9h:code=3,prose=1", as `Routing.of` takes them. Raises InputError."""
    found: list[tuple[float, Mapping[str, float]]] = []
    for text in texts:
        start, colon, rest = text.partition(":")
        try:
            if not colon:
                raise ValueError("no colon")
            pairs = [part.rpartition("=") for part in rest.split(",")]
            found.append((seconds(start.strip()), {name.strip(): float(weight) for name, _, weight in pairs}))
        except ValueError as problem:
            raise InputError(f"mix {text!r}: {problem}; write the time and weights of domains, such as 9h:code=3,prose=1") from None
    return found


def seconds(text: str) -> float:
    """Seconds of "90", "90s", "10min" or "24h"; ValueError for anything else."""
    if text.replace(".", "", 1).isdigit():
        return float(text)
    for unit, factor in (("min", 60.0), ("h", 3600.0)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return parse(text, "s")
