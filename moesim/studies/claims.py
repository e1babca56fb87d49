"""Claims of published systems and how they compare with what is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

VERDICTS = {
    "S": ("holds", "DOES NOT HOLD"),
    "Q": ("agrees", "does not agree"),
    "B": ("consistent", "NOT REACHED"),
    "H": ("reached", "not reached"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One check of a system. kind S: holds exactly; Q: public ground truth; B: sign and reachable size; H: beyond the checks."""

    kind: Literal["S", "Q", "B", "H"]
    what: str
    published: str
    simulated: str
    ok: bool

    @property
    def verdict(self) -> str:
        """In words: a band is never more than "consistent with"."""
        return VERDICTS[self.kind][not self.ok]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A system's part of the study."""

    name: str
    published: str  # set-up of the headline, as far as it is public
    modelled: str
    claims: Sequence[Claim]
    conditions: str  # what the headline needs
    differs: str
    about: str = ""  # title, paper and claim of what changes no layer and so is none of `moesim systems`


def structure(what: str, ok: bool, simulated: str, published: str = "by construction") -> Claim:
    """A check of kind S."""
    return Claim(kind="S", what=what, published=published, simulated=simulated, ok=bool(ok))


def band(what: str, published: str, simulated: str, ok: bool) -> Claim:
    """A check of kind B."""
    return Claim(kind="B", what=what, published=published, simulated=simulated, ok=bool(ok))


def agrees(what: str, published: str, simulated: str, ok: bool) -> Claim:
    """A check of kind Q."""
    return Claim(kind="Q", what=what, published=published, simulated=simulated, ok=bool(ok))


def headline(what: str, published: str, simulated: str, ok: bool) -> Claim:
    """A comparison of kind H: a headline, or more than the checks ask."""
    return Claim(kind="H", what=what, published=published, simulated=simulated, ok=bool(ok))


def times(*figures: float) -> str:
    """Ratios, as 1.23x."""
    return " / ".join(f"{figure:.2f}x" for figure in figures)
