"""Files of other tools, in and out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import InputError
from moesim.interop.npz import import_npz
from moesim.model import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an import wrote, and what the reader must know of it."""

    model: ModelSpec
    tokens: int
    notes: tuple[str, ...]


IMPORTERS: dict[str, Callable[..., tuple[ModelSpec, int, tuple[str, ...]]]] = {"npz": import_npz}


def import_trace(format: str, source: Path, output: Path, *, model: ModelSpec | None = None, domain: str = "", phase: str = "prefill") -> Imported:
    """Write the routing of `source` as a trace at `output`.

    Raises InputError for an unknown format, TraceError for a file that is not what it should be, OutputExists.
    """
    if format not in IMPORTERS:
        raise InputError(f"format {format!r} cannot be imported; formats: {', '.join(IMPORTERS)}")
    spec, tokens, notes = IMPORTERS[format](source, output, model=model, domain=domain, phase=phase)
    return Imported(model=spec, tokens=tokens, notes=notes)


__all__ = ["IMPORTERS", "Imported", "import_npz", "import_trace"]
