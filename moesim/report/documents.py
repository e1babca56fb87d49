"""From JSON to a Document: files written by moesim, or mappings of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.files import read_json, validated
from moesim.report.schema import SECTIONS, Document

REMEDY = "give JSON written by `moesim demo`, `validate`, `simulate -o` or `inspect -o`, or the folder of a `demo` or `sweep`"


def read_document(path: Path) -> Document:
    """Document in a file, or in the `result.json` of a folder. Raises InputError naming the file and every mistake in it."""
    path = path / "result.json" if path.is_dir() else path
    return as_document(read_json(path, InputError), place=str(path))


def as_document(data: Any, *, place: str) -> Document:
    """Document of parsed JSON; a bare result or inspection becomes a document of one section.

    Raises InputError when it is none of ours (naming the keys found) or breaks the schema (naming each path).
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{place}: expected a JSON object, found {type(data).__name__}; {REMEDY}")
    whole = _wrapped(data)
    known = [name for name in SECTIONS if whole.get(name) not in (None, [])]
    if "schema_version" not in whole or not known:
        lacks = "no schema_version" if "schema_version" not in whole else f"none of the sections {', '.join(SECTIONS)}"
        found = ", ".join(sorted(map(str, data))[:12]) or "nothing"
        raise InputError(f"{place}: {lacks}, found keys: {found}; {REMEDY}")
    return validated(Document, whole, place=place, error=InputError)


def _wrapped(data: Mapping[str, Any]) -> dict[str, Any]:
    version = {"schema_version": data["schema_version"]} if "schema_version" in data else {}
    if "summary" in data and "layer_s" in data:
        return {**version, "results": [data]}
    if data.get("kind") == "serving" and "series" in data:
        return {**version, "serving": [data]}
    if data.get("kind") == "scaling-result":
        return {**version, "scaling": data}
    if "skew" in data and "load" in data:
        return {**version, "inspection": data}
    return dict(data)
