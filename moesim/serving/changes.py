"""Change: what happens to a deployment while it serves: it grows, shrinks, loses devices, pauses its intake."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change at `at_s` seconds of the run. Steps under way are finished first (a restart's are lost); waiting requests are dealt
    out anew.

    to          the deployment from now on (None: the same). Ranks are counted from 0; those beyond the new count stop and
                hand their requests to the rest
    pause_s     no waiting request is taken into a batch for this long; running ones go on
    down_s      no step begins for this long
    slow        steps that begin within the next `slow_s` seconds take `slow` times as long
    lost        ranks whose key-value cache is lost: their requests are computed again
    keep_cache  requests of ranks that stop take their key-value cache along (else it is computed again)
    restart     the process that serves ends and another begins: requests under way begin again, prompt and output
    kind        a word for people: "scale-up", "scale-down", "failure", "recovery"
    """

    at_s: float
    to: Deployment | None = None
    pause_s: float = 0.0
    down_s: float = 0.0
    slow: float = 1.0
    slow_s: float = 0.0
    lost: tuple[int, ...] = ()
    keep_cache: bool = True
    restart: bool = False
    kind: str = ""

    def __post_init__(self) -> None:
        for name in ("at_s", "pause_s", "down_s", "slow_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"change {self.kind or 'without a kind'!r}: {name}={value!r} must be finite seconds >= 0")
        if not (math.isfinite(self.slow) and self.slow > 0):
            raise InputError(f"change at {self.at_s:g} s: slow={self.slow!r} must be finite and > 0")
        if any(rank < 0 for rank in self.lost):
            raise InputError(f"change at {self.at_s:g} s: lost={self.lost} names a rank below 0")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "at_s": self.at_s,
            "kind": self.kind,
            "to": self.to.name if self.to else None,
            "pause_s": self.pause_s,
            "down_s": self.down_s,
            "slow": self.slow,
            "slow_s": self.slow_s,
            "lost": list(self.lost),
            "keep_cache": self.keep_cache,
            "restart": self.restart,
        }
