"""Kind: fields that say what a case needs, and a function from them to what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.sweep.fields import Fields
from moesim.units import human


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a case found: flat `figures` (numbers, texts, None), remarks, and why there are no figures, if it cannot be done."""

    figures: Mapping[str, Any]
    notes: Sequence[str] = ()
    infeasible: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure people compare: its name among a case's figures, words for it, its unit, and whether less of it is better."""

    name: str
    label: str
    unit: str = ""  # "%": a share, shown as percent
    less: bool = True

    def text(self, value: float | None) -> str:
        """A value as people read it."""
        if value is None:
            return "-"
        if self.unit == "%":
            return f"{value:.2%}"
        return f"$ {value:,.2f}" if self.unit == "$" else human(value, self.unit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """`run` takes `fields` and may raise anything: the case is then recorded as failed.

    choices are the fields one decides on: cases that differ only in them compete, by the first of `figures`. The other fields
    are conditions.
    """

    name: str
    says: str
    fields: type[Fields]
    run: Callable[[Any], Found]
    choices: Sequence[str]
    figures: Sequence[Figure]
