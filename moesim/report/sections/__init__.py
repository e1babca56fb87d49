"""Sections of a report: each a pure function of a document, None when the document lacks it."""

from __future__ import annotations

from moesim.report.blocks import Section
from moesim.report.schema import Document
from moesim.report.sections.answer import answer
from moesim.report.sections.comparison import comparison
from moesim.report.sections.inspection import inspection
from moesim.report.sections.provenance import provenance
from moesim.report.sections.results import results
from moesim.report.sections.training import training
from moesim.report.sections.validation import validation

__all__ = ["answer", "sections"]


def sections(document: Document) -> list[Section]:
    """What the document holds, in the order a reader needs it: the answer's evidence first, provenance last."""
    found = (build(document) for build in (comparison, validation, results, inspection, training, provenance))
    return [section for section in found if section is not None]
