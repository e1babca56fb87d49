"""Documents to one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.files import write_text
from moesim.report.blocks import Drawing
from moesim.report.documents import as_document
from moesim.report.schema import Document
from moesim.report.sections import answer, articles, sections, together
from moesim.report.svg import inline_svg

# Characters that no HTML or UTF-8 file may hold: controls, and halves of surrogate pairs.
_FORBIDDEN = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127, *range(0xD800, 0xE000)], "\N{REPLACEMENT CHARACTER}")


def write_report(documents: Sequence[Mapping[str, Any]], output: Path, *, title: str | None = None) -> Path:
    """Write the report of `documents`, in their order, and return its path. An existing file is replaced.

    Raises InputError, before anything is written, when a document is not one of moesim's or breaks its schema.
    """
    known = [as_document(data, place=f"documents[{i}]") for i, data in enumerate(documents)]
    write_text(output, render(known, title=title))
    return output


def render(documents: Sequence[Document], *, title: str | None = None) -> str:
    """HTML of the documents: styles and figures inline, no script, nothing fetched, every text escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    if not documents:
        raise InputError("no documents to report; give at least one")
    room = files("moesim.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((room / "template.html").read_text("utf-8"))
    numbers = count(1)

    def svg(drawing: Drawing) -> Markup:
        return Markup(inline_svg(drawing, key=f"figure{next(numbers)}"))  # made by our own serialiser: texts are escaped there

    parts = articles(documents)
    headings = [heading(part.document) for part in parts]
    shared = [section for section in (together(documents),) if section is not None]
    page = template.render(
        title=title or (headings[0] if len(headings) == 1 else "moesim report"),
        style=Markup((room / "style.css").read_text("utf-8")),
        documents=[
            {
                "key": f"d{i}",
                "heading": name,
                "answer": answer(part.document, part.evidence),
                "sections": [
                    *(shared if i == 1 and not part.evidence else []),
                    *sections(part.document, part.evidence),
                    *(shared if part.evidence else []),
                ],
            }
            for i, (name, part) in enumerate(zip(headings, parts, strict=True), 1)
        ],
        svg=svg,
    )
    return page.translate(_FORBIDDEN)


def heading(document: Document) -> str:
    """The document's title, else one made of what it holds."""
    if document.title:
        return document.title
    if document.scaling:
        return f"Scaling plan: {document.scaling.plan.name}"
    if document.serving and not document.sweep:
        return f"Serving: {document.serving[0].summary.name}"
    if document.sweep:
        return f"A sweep of {len(document.sweep.cases):,} cases"
    if document.comparison:
        return f"Placements on {document.comparison.cluster_title or document.comparison.cluster}"
    if document.validation:
        return f"Validation on {document.validation.where}"
    if document.results:
        names = list(dict.fromkeys(result.summary.name for result in document.results))
        return f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''} on {document.results[0].cluster}"
    if document.inspection:
        return f"Routing of {document.inspection.model}"
    return f"Training of {document.training.model}" if document.training else "Document"
