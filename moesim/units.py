"""Human units at the edge, SI base units inside.

>>> parse("3.35 TB/s", "B/s")
3350000000000.0
>>> parse("80 GiB", "B")
85899345920.0
>>> parse(5e-6, "s")
5e-06
>>> human(0.0000423, "s"), human(3.35e12, "B/s"), human(5400, "s")
('42.3 us', '3.35 TB/s', '90 min')
"""

from __future__ import annotations

import math
import re

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9, "p": 1e-12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
# Spellings of each base unit, with the factor to it. A bit is an eighth of a byte; "b" alone would be a trap.
_SPELLINGS = {
    "B": {"B": 1.0},
    "B/s": {"B/s": 1.0, "bit/s": 0.125, "bps": 0.125},
    "FLOP/s": {"FLOP/s": 1.0, "FLOPS": 1.0, "OP/s": 1.0, "OPS": 1.0},
    "s": {"s": 1.0},
    "W": {"W": 1.0},
    "Hz": {"Hz": 1.0},
    "J": {"J": 1.0},
    "B/J": {"B/J": 1.0},
    "$/h": {"$/h": 1.0},
    "1": {"": 1.0, "%": 0.01},
}
_NUMBER = re.compile(r"\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S*)\s*")
_STEPS = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n")]


def parse(value: float | int | str, unit: str) -> float:
    """Number in base `unit` (one of B, B/s, FLOP/s, s, W, Hz, J, $/h, 1) from a number or a text such as "80 GiB".

    Raises ValueError with the accepted spellings when the text has another unit.
    """
    if isinstance(value, bool):
        raise ValueError(f"expected a quantity in {unit}, got {value!r}")
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ValueError(f"expected a finite quantity in {unit}, got {value!r}")
        return float(value)
    match = _NUMBER.fullmatch(value)
    if match:
        number, suffix = float(match[1].replace("_", "")), match[2]
        for spelling, factor in _SPELLINGS[unit].items():
            if not suffix.endswith(spelling):
                continue
            prefix = suffix[: len(suffix) - len(spelling)]
            if prefix in _PREFIX and (unit != "1" or not prefix):
                return number * factor * _PREFIX[prefix]
            if prefix in _BINARY and unit in ("B", "B/s"):
                return number * factor * _BINARY[prefix]
    example = {"B": "80 GiB", "B/s": "3.35 TB/s", "FLOP/s": "989 TFLOP/s", "s": "5 us"}.get(unit, f"1.5 {unit}")
    raise ValueError(f"expected a quantity in {unit}, got {value!r}; write a plain number or for example {example!r}")


def human(value: float, unit: str = "", digits: int = 3) -> str:
    """Text with an SI prefix and `digits` significant figures; seconds from two minutes on in minutes, from two hours on in hours."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".rstrip()
    size = abs(value)
    if unit == "s" and size >= 120:
        name, seconds = ("h", 3600.0) if size >= 7200 else ("min", 60.0)
        return f"{value / seconds:,.0f} {name}" if size >= 1000 * seconds else f"{value / seconds:.{digits}g} {name}"
    step, prefix = next(((step, prefix) for step, prefix in _STEPS if size >= step * (1 - 0.5 * 10**-digits)), _STEPS[-1])
    scaled = value / step
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(scaled)) + 1e-12))
    return f"{scaled:.{decimals}f} {prefix}{unit}".rstrip()
