"""Text that every installation has, in clearly different domains. Bytes are the tokens, so no tokenizer is needed.

python    source code of the standard library
english   prose of the Python documentation topics and docstrings
cpp       C++ headers that ship with torch
unicode   names of characters, script by script
metrics   font metric tables that ship with matplotlib
"""

from __future__ import annotations

import ast
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError

ENOUGH_B = 1_500_000  # per domain; more would not be read


def _library() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _package(name: str, pattern: str) -> list[Path]:
    spec = find_spec(name)
    roots = spec.submodule_search_locations if spec else None
    return sorted(path for root in roots or () for path in Path(root).rglob(pattern))


def _files(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="ignore")


def _python() -> Iterator[str]:
    yield from _files(_library())


def _english() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    for text in _files(_library()):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (words := ast.get_docstring(node)):
                yield words + "\n\n"


def _unicode() -> Iterator[str]:
    for code in range(0x20, 0x1FBFF):
        if name := unicodedata.name(chr(code), ""):
            yield f"{name}\n"


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "python": _python,
    "english": _english,
    "cpp": lambda: _files(_package("torch", "include/ATen/*.h")),
    "unicode": _unicode,
    "metrics": lambda: _files(_package("matplotlib", "mpl-data/fonts/afm/*.afm")),
}


def load_corpus() -> dict[str, NDArray[np.uint8]]:
    """Bytes of every domain, at most 1.5 MB each; InputError when fewer than three domains are found."""
    corpus = {}
    for name, texts in DOMAINS.items():
        pieces, size = [], 0
        for text in texts():
            pieces.append(text.encode())
            size += len(pieces[-1])
            if size >= ENOUGH_B:
                break
        if size >= 100_000:
            corpus[name] = np.frombuffer(b"".join(pieces)[:ENOUGH_B], np.uint8)
    if len(corpus) < 3:
        raise InputError(f"only {sorted(corpus)} have text on this installation; the demo needs three domains: reinstall torch and matplotlib")
    return corpus


def split(text: NDArray[np.uint8], held_out: float = 0.2) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Training part and held-out end of a domain's text."""
    cut = int(len(text) * (1 - held_out))
    return text[:cut], text[cut:]
