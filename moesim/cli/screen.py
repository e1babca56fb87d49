"""Printing: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.units import human

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesim.trace import Trace

SCHEMA_VERSION = 1
MOST_LINE = 4000


OUTPUTS = ("output", "result", "timeline", "plot")  # parameters of verbs that name a file to write


def guarded(run: Callable[..., None]) -> Callable[..., None]:
    """`run`, refusing to write over what it reads, even with --force, and to write two things to one file. Raises InputError."""
    from moesim.errors import InputError

    @wraps(run)
    def checked(**given: Any) -> None:
        seen: dict[Path, str] = {}
        for name, value in sorted(given.items(), key=lambda item: item[0] in OUTPUTS):  # outputs last
            for each in value if isinstance(value, list) else [value]:
                if not isinstance(each, Path | str) or (name not in OUTPUTS and not _is_file(each)):
                    continue
                path = Path(os.path.realpath(each))
                if name in OUTPUTS and path in seen:
                    raise InputError(f"{each}: is also {seen[path]}; give every output a file of its own")
                seen[path] = f"where --{name} goes" if name in OUTPUTS else "what is read"
        run(**given)

    return checked


def _is_file(name: Path | str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a text of another kind: too long for a name, or with a NUL
        return False


def emit_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout, with its schema version."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=1, allow_nan=False))


def plain(text: str) -> str:
    """`text` with everything that could steer a terminal spelled out: names come from files, and a file may hold escape codes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def line(text: str) -> str:
    """`text` as one line of bounded length, for errors and remarks."""
    whole = plain(" ".join(text.split("\n")))
    return whole if len(whole) <= MOST_LINE else f"{whole[:MOST_LINE]}… ({len(whole):,} characters)"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; all columns but the first are right-aligned. Narrow terminals fold cells, never cut them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(text: str) -> Text:  # not markup: a name may hold brackets
        return Text(plain(text))

    shown = Table(title=cell(title), title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(cell(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(cell, row))
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(shown)


def note(*lines: str) -> None:
    """Remarks on stderr."""
    for text in lines:
        print(line(text), file=sys.stderr)


@contextmanager
def chapters() -> Iterator[Callable[[str], Callable[[float, str], None]]]:
    """Bars on stderr, one per chapter; a chapter's function takes the share done (0..1) and what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def chapter(what: str) -> Callable[[float, str], None]:
            task = bar.add_task(what, total=1.0)

            def update(share: float, text: str = "") -> None:
                bar.update(task, completed=share, description=plain(f"{what} {text}").rstrip())

            return update

        yield chapter


@contextmanager
def progress(what: str) -> Iterator[Callable[[float, str], None]]:
    """One bar on stderr."""
    with chapters() as chapter:
        yield chapter(what)


def open_trace(path: Any, *, tokens: str | None, domain: Sequence[str] | None, phase: str | None) -> Trace:
    """The trace at `path`, narrowed as the shared options say."""
    from moesim.trace import load_trace

    trace = load_trace(path)
    if domain or phase:
        trace = trace.select(domain=domain, phase=phase)
    return trace if tokens is None else trace.select(tokens=tokens)


def result_rows(summaries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of `score` and `compare`."""
    columns = ["plan", "busiest/mean", "devices/token", "nodes/token", "all-to-all/layer", "dispatch", "compute", "combine", "layer time"]
    rows = [
        [
            str(row["name"]),
            f"{row['max_load_ratio']:.3f}",
            f"{row['fanout_devices']:.2f}",
            f"{row['fanout_nodes']:.2f}",
            human(row["a2a_bytes"], "B"),
            human(row["dispatch_s"], "s"),
            human(row["compute_s"], "s"),
            human(row["combine_s"], "s"),
            human(row["layer_time_s"], "s"),
        ]
        for row in summaries
    ]
    return columns, rows
