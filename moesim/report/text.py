"""Values as text. Numbers keep their unit on the same line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moesim.units import human

SPACE = "\N{NO-BREAK SPACE}"


def quantity(value: float, unit: str = "") -> str:
    """`units.human` with a space that does not break."""
    return human(value, unit).replace(" ", SPACE)


def percent(share: float, *, signed: bool = False) -> str:
    """A share as percent with one decimal, none from 100 % on, and a real minus sign."""
    if not math.isfinite(share):
        return "–"
    decimals = 1 if abs(share) < 0.9995 else 0
    text = f"{100 * share:{'+' if signed else ''}.{decimals}f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "−") + SPACE + "%"


def sentence(text: str) -> str:
    """Text with a capital first and one full stop last."""
    return text[:1].upper() + text[1:].rstrip(". ") + "."


def plain(value: Any) -> str:
    """A JSON value as one line: numbers with six figures, lists and objects spelt out."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def named(name: str, value: Any) -> tuple[str, str]:
    """Name and value for a reader: `memory_B` 1.5e11 becomes memory, 150 GB."""
    stem, _, unit = name.rpartition("_")
    base = {"Bps": "B/s"}.get(unit, unit)
    if stem and base in ("B", "B/s", "s", "W", "Hz") and isinstance(value, (int, float)) and not isinstance(value, bool):
        return stem.replace("_", " "), quantity(value, base)
    return name.replace("_", " "), plain(value)
