"""The file edge: read and validate TOML and JSON, write atomically, refuse to overwrite, find packaged data."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moesim.errors import InputError, OutputExists

if TYPE_CHECKING:
    from pydantic import BaseModel

    Schema = TypeVar("Schema", bound=BaseModel)

MOST_MISTAKES = 20  # named in one message
MAX_TEXT_B = 256 * 2**20  # a larger plan or profile is not one of ours


def read_text(path: Path, error: type[InputError]) -> str:
    """Content of a text file, at most 256 MiB; errors name the file."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_TEXT_B + 1)  # a device or a pipe states no size
        if len(content) > MAX_TEXT_B:
            raise error(f"{path}: more than {MAX_TEXT_B >> 20} MiB is too large for this kind of file; check the path")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read as text: {problem}") from None


def read_toml(path: Path, error: type[InputError]) -> dict[str, Any]:
    """Parsed TOML; a syntax error is reported with its line."""
    try:
        return tomllib.loads(read_text(path, error))
    except (ValueError, RecursionError) as problem:  # syntax, numbers of thousands of digits, deep nesting
        raise error(f"{path}: not valid TOML: {problem}") from None


def read_json(path: Path, error: type[InputError]) -> Any:
    """Parsed JSON; a syntax error is reported with its line. Refused: NaN, Infinity, 1e999 and a key that occurs twice in an object."""

    def refuse(constant: str) -> Any:
        raise error(f"{path}: holds the non-number {_short(constant, str)}; write null or a number")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{path}: the key {_short(twice)} occurs twice in one object; keep one of them")
        return table

    try:
        return json.loads(read_text(path, error), parse_constant=refuse, parse_float=number, object_pairs_hook=once)
    except (ValueError, RecursionError) as problem:  # as above
        raise error(f"{path}: not valid JSON: {problem}") from None


def validated(schema: type[Schema], data: Any, *, place: str, error: type[InputError]) -> Schema:
    """`data` as a `schema` object; raises `error` listing every mistake with its path in the file."""
    from pydantic import ValidationError

    try:
        return schema.model_validate(data)
    except ValidationError as problem:
        found = list(islice(_mistakes(problem), MOST_MISTAKES))
        more = problem.error_count() - len(found)
        raise error(f"{place}: " + "; ".join([*found, *([f"and {more:,} more"] if more else [])])) from None


def _mistakes(problem: Any) -> Iterable[str]:
    for item in problem.errors(include_url=False):
        path = "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{_short(part, str)}" for part in item["loc"])
        if item["type"] == "extra_forbidden":
            yield f"{path}: unknown key; remove it or check its spelling"
        elif item["type"] == "missing":
            yield f"{path}: missing"
        else:
            message = item["msg"].removeprefix("Value error, ")
            yield f"{path}: {message[0].lower()}{message[1:]} (got {_short(item['input'])})"


def _short(value: Any, words: Callable[[Any], str] = repr) -> str:
    text = words(value)
    return text if len(text) <= 60 else text[:57] + "…"


def check_output(path: Path, *, force: bool) -> Path:
    """`path`, if it may be written: it does not exist yet, or is a file and `force` is given. Call before long work.

    Raises OutputExists, InputError where nothing can be written at all.
    """
    if path.exists() and not (path.is_file() and force):
        remedy = "exists; give another path, or --force to replace it" if path.is_file() else "is no file that could be replaced; give another path"
        raise OutputExists(f"{path}: {remedy}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"{path}: its folder cannot be made: {problem.strerror}; give another path") from None
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: nothing may be written in {path.parent}; give another path, or change its permissions")
    return path


def write_text(path: Path, text: str) -> None:
    """Write through a temporary name and rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Strict JSON (no NaN), keys in the order given, through a temporary name."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def digest(*parts: bytes | str) -> str:
    """First 16 hex digits of the SHA-256 over length-prefixed parts: names an input in a plan or a result."""
    hashing = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashing.update(len(data).to_bytes(8, "little"))
        hashing.update(data)
    return hashing.hexdigest()[:16]


def packaged(kind: str) -> Path:
    """Folder of data shipped with moesim (`hw_profiles` or `traces`): inside the wheel, else beside the checkout."""
    root = Path(str(files("moesim")))
    inside = root / "_data" / kind
    return inside if inside.is_dir() else root.parent / kind
