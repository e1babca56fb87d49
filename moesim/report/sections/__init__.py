"""Sections of a report: each a pure function of a document, None when the document lacks it."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.report.blocks import Section
from moesim.report.schema import Document
from moesim.report.sections.answer import answer
from moesim.report.sections.caching import caching
from moesim.report.sections.capacity import capacity, limits, what_if
from moesim.report.sections.comparison import comparison
from moesim.report.sections.evidence import Article, articles, evidence, measured
from moesim.report.sections.inspection import inspection
from moesim.report.sections.provenance import provenance
from moesim.report.sections.results import results
from moesim.report.sections.serving import scaling, serving
from moesim.report.sections.sweep import sweep
from moesim.report.sections.training import training
from moesim.report.sections.validation import together, validation

__all__ = ["Article", "answer", "articles", "evidence", "sections", "together"]


def sections(document: Document, backing: Sequence[Document] = ()) -> list[Section]:
    """What the document holds, in the order a reader needs it: the answer's grounds first, what was measured (`backing` documents), provenance."""
    grounds = (capacity, what_if, scaling, comparison, serving, measured, caching, validation)
    rest = (results, sweep, inspection, training, limits, provenance)
    told = [section for number, other in enumerate(backing, 1) for section in evidence(other, number)]
    own, after = ([found for build in builders if (found := build(document)) is not None] for builders in (grounds, rest))
    return [*own, *told, *after]
