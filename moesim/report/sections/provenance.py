"""Section: what the figures were made from."""

from __future__ import annotations

from moesim.report.blocks import Block, Facts, Group, Points, Section, Table, cells
from moesim.report.schema import Document, Machine
from moesim.report.text import plain, quantity

UNVERIFIED = "unverified input: "


def provenance(document: Document) -> Section:
    """Command, versions, machine, digests of inputs and notes; unverified inputs are folded away, their number is not."""
    blocks: list[Block] = []
    pairs = _facts(document)
    if pairs:
        blocks.append(Facts(pairs=pairs))
    names = list(dict.fromkeys(name for result in document.results for name in result.inputs))
    if names:
        rows = [cells(r.summary.name, *(plain(r.inputs.get(name)) for name in names)) for r in document.results]
        titles = [name.replace("_", " ") for name in names]
        align = "l" * (len(names) + 1)
        blocks.append(Table(caption="Inputs of the simulations", columns=["plan", *titles], align=align, groups=[Group(rows=rows)]))
    plain_notes, unverified = notes(document)
    if plain_notes:
        blocks.append(Points(heading="Notes", lines=plain_notes))
    if unverified:
        blocks.append(Points(heading=f"Unverified inputs ({len(unverified)})", lines=unverified, folded=True))
    return Section(key="provenance", title="Provenance", lead="" if blocks else "The document says nothing of where it comes from.", blocks=blocks)


def notes(document: Document) -> tuple[list[str], list[str]]:
    """Notes of the document and its results, each once: the remarks, and the unverified inputs without their prefix."""
    scaled = document.scaling.notes if document.scaling else []
    parts = [document.notes, *(part.notes for part in document.results), *(part.notes for part in document.serving), scaled]
    every = dict.fromkeys(note for part in parts for note in part)
    remarks = [note for note in every if not note.startswith(UNVERIFIED)]
    return remarks, [note.removeprefix(UNVERIFIED) for note in every if note.startswith(UNVERIFIED)]


def _facts(document: Document) -> list[tuple[str, str]]:
    command = " ".join(document.command) if isinstance(document.command, list) else document.command
    known = [
        ("created", document.created),
        ("command", command),
        ("versions", ", ".join(f"{name} {version}" for name, version in document.versions.items())),
        ("machine", _machine(document.machine) if document.machine else None),
    ]
    return [(name, value) for name, value in known if value]


def _machine(machine: Machine) -> str:
    parts = [
        machine.cpu,
        f"{machine.cores} cores" if machine.cores else None,
        f"{quantity(machine.memory_B, 'B')} memory" if machine.memory_B else None,
        machine.gpu or ("no GPU" if "gpu" in machine.model_fields_set else None),
        machine.system,
    ]
    return ", ".join(part for part in parts if part)
