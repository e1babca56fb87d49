"""What a report is made of: sections of tables, drawings, facts and folds. Text only; the template escapes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell of a table; `best` marks the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rows under a common heading (none: an empty title)."""

    rows: Sequence[Sequence[Cell]]
    title: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """`align` has one letter per column: l text, r number."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    align: str
    groups: Sequence[Group]
    note: str = ""

    @property
    def marked(self) -> bool:
        """Whether any cell is marked as the best."""
        return any(cell.best for group in self.groups for row in group.rows for cell in row)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A figure: `draw` fills an Axes and returns it. `alt` says in words what it shows. Sizes are CSS pixels at 1:1."""

    caption: str
    alt: str
    draw: Callable[[Axes], Axes]
    width: int = 345
    height: int = 240


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Drawings side by side where there is room, under a heading where they belong together."""

    kind: ClassVar[str] = "gallery"
    drawings: Sequence[Drawing]
    heading: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """A list under a small heading; `folded` lists open on demand."""

    kind: ClassVar[str] = "points"
    heading: str
    lines: Sequence[str]
    folded: bool = False


Block = Table | Gallery | Facts | Points


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading, a sentence or two on what is seen, and blocks."""

    key: str
    title: str
    lead: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One figure of the answer. `tone` is good, bad or plain; the words in `detail` say the same."""

    label: str
    value: str
    detail: str = ""
    tone: str = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What was run, what came out, and what to be careful about."""

    ran: str
    sentences: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    cautions: Sequence[str] = field(default_factory=tuple)


def cells(*texts: Any) -> list[Cell]:
    """A row without marks."""
    return [Cell(text=str(text)) for text in texts]


def column(values: Sequence[float], show: Callable[[float], str], *, mark: bool = True) -> list[Cell]:
    """Cells of one column, the smallest marked. Values that read the same are equal; a column of equals has no best."""
    texts = [show(value) for value in values]
    best = texts[min(range(len(values)), key=values.__getitem__)] if values else ""
    mark = mark and len(set(texts)) > 1
    return [Cell(text=text, best=mark and text == best) for text in texts]


def change(value: float, base: float) -> float:
    """value / base - 1."""
    return value / base - 1 if base else math.nan
