"""Printing: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moesim.units import human

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesim.trace import Trace

SCHEMA_VERSION = 1


def emit_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout, with its schema version."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=1, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; all columns but the first are right-aligned. Narrow terminals fold cells, never cut them."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(shown)


def note(*lines: str) -> None:
    """Remarks on stderr."""
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def chapters() -> Iterator[Callable[[str], Callable[[float, str], None]]]:
    """Bars on stderr, one per chapter; a chapter's function takes the share done (0..1) and what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def chapter(what: str) -> Callable[[float, str], None]:
            task = bar.add_task(what, total=1.0)

            def update(share: float, text: str = "") -> None:
                bar.update(task, completed=share, description=f"{what} {text}".rstrip())

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
