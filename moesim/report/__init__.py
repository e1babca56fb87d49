"""Reports: JSON documents written by moesim become one self-contained HTML page."""

from __future__ import annotations

from moesim.report.documents import as_document, read_document
from moesim.report.html import render, write_report

__all__ = ["as_document", "read_document", "render", "write_report"]
