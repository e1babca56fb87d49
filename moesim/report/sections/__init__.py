"""Sections of a report: each a pure function of a document, None when the document lacks it."""

from __future__ import annotations

from moesim.report.blocks import Section
from moesim.report.schema import Document
from moesim.report.sections.answer import answer
from moesim.report.sections.caching import caching
from moesim.report.sections.capacity import capacity, limits, what_if
from moesim.report.sections.comparison import comparison
from moesim.report.sections.inspection import inspection
from moesim.report.sections.provenance import provenance
from moesim.report.sections.results import results
from moesim.report.sections.serving import scaling, serving
from moesim.report.sections.sweep import sweep
from moesim.report.sections.training import training
from moesim.report.sections.validation import together, validation

__all__ = ["answer", "sections", "together"]


def sections(document: Document) -> list[Section]:
    """What the document holds, in the order a reader needs it: the answer's evidence first, provenance last."""
    builders = (
        capacity, what_if, scaling, serving, comparison, caching, validation, results, sweep, inspection, training, limits, provenance,
    )  # fmt: skip
    found = (build(document) for build in builders)
    return [section for section in found if section is not None]
