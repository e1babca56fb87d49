"""Section: what was measured that backs a page; and how documents of measurements join the capacity report they back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moesim.report.blocks import Block, Cell, Group, Section, Table, cells
from moesim.report.parts import AgainstPart
from moesim.report.schema import Document
from moesim.report.sections.provenance import provenance
from moesim.report.sections.validation import validation
from moesim.report.text import percent, quantity

NAMES = {"ttft": "first token", "tpot": "token after it", "latency": "last token"}


@dataclass(frozen=True)
class Article:
    """A document, and the documents of measurements that back it."""

    document: Document
    evidence: tuple[Document, ...] = ()


def articles(documents: Sequence[Document]) -> list[Article]:
    """Documents in their order; those that only tell of measurements join the first one that says what to buy, where there is one."""
    subject = next((document for document in documents if document.capacity), None)
    backing = tuple(document for document in documents if subject is not None and _measures(document))
    return [Article(document, backing if document is subject else ()) for document in documents if document not in backing]


def evidence(document: Document, number: int) -> list[Section]:
    """Sections of a document of measurements on the page of another one: the measurement, and its provenance."""
    name = f": {document.title}" if document.title else ""
    found = [section for section in (validation(document), measured(document)) if section is not None]
    return [
        replace(section, key=f"{section.key}-{number}", title=f"{section.title}{name}") for section in (*found, provenance(document))
    ]  # fmt: skip


def measured(document: Document) -> Section | None:
    """Runs of a real engine against their simulation, quantity by quantity."""
    runs = [run for run in document.serving if run.measured]
    if not runs:
        return None
    blocks: list[Block] = [
        Table(
            caption=f"{run.summary.name}: {run.summary.requests:,} requests, measured and simulated",
            columns=["time to", "statistic", "measured", "simulated", "error"],
            align="llrrr",
            groups=[Group(rows=[_against(row) for row in run.measured])],
            note="error = simulated / measured − 1; times count from when the engine queued a request.",
        )
        for run in runs
    ]
    return Section(key="measured", title="A measured run against its simulation", lead=" ".join(map(worst, runs_of(document))), blocks=blocks)


def runs_of(document: Document) -> list[tuple[str, list[AgainstPart]]]:
    """Name and figures of each run of a real engine."""
    return [(run.summary.name, run.measured) for run in document.serving if run.measured]


def worst(run: tuple[str, list[AgainstPart]]) -> str:
    """Errors of medians, and the largest of all, in words."""
    name, rows = run
    medians = [f"{NAMES.get(row.quantity, row.quantity)} {percent(row.error, signed=True)}" for row in rows if row.statistic == "p50"]
    largest = max(rows, key=lambda row: abs(row.error))
    most = f"{NAMES.get(largest.quantity, largest.quantity)} {largest.statistic}, {percent(largest.error, signed=True)}"
    halves = ", ".join(f"median {text}" for text in medians) or "no medians"
    return f"A run of a real engine, {name}, against its simulation: {halves}; the largest error is that of {most}."


def _against(row: AgainstPart) -> list[Cell]:
    return cells(NAMES.get(row.quantity, row.quantity), row.statistic, quantity(row.measured_s, "s"), quantity(row.simulated_s, "s"),
                 percent(row.error, signed=True))  # fmt: skip


def _measures(document: Document) -> bool:
    decides = document.capacity or document.sweep or document.scaling or document.comparison or document.caching
    return not decides and (document.validation is not None or bool(runs_of(document)))
