"""What a case can do, by name: one file per kind."""

from __future__ import annotations

from moesim.sweep.kinds import cache, capacity, simulate
from moesim.sweep.kinds.base import Figure, Found, Kind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (simulate.KIND, cache.KIND, capacity.KIND)}

__all__ = ["KINDS", "Figure", "Found", "Kind"]
