"""Open other tools' files without ever running what is in them: text lines, JSON lines, NumPy, safetensors.

Sizes that a header states are held against the file's own size before anything is allocated.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, TraceError

MAX_LINE_B = 256 * 2**20
MAX_ARRAY_B = 64 * 2**30  # unpacked; a larger one is a zip bomb or a mistake
MAX_PACKING, MAX_PACKED_B = 200, 2**30  # bytes from one byte of an archive, for arrays beyond this size: real ids pack about 8 times
MAX_HEADER_B = 100 * 2**20  # safetensors' own limit
_SAFE_DTYPES = {
    "BOOL": np.dtype(bool), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"), "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
}  # fmt: skip


def sources(path: Path, pattern: str) -> list[Path]:
    """`path` itself, or the files below the folder `path` that match; TraceError when there are none."""
    if not path.exists():
        raise TraceError(f"{path}: no such file or folder; check the path")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob(pattern) if file.is_file())
    if not found:
        raise TraceError(f"{path}: holds no file named {pattern}; give the folder the files were recorded in")
    return found


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text without its end) of a UTF-8 file, blank lines left out; one line at a time in memory."""
    try:
        with path.open("rb") as stream:
            number = 0
            while raw := stream.readline(MAX_LINE_B + 1):
                number += 1
                if len(raw) > MAX_LINE_B:
                    raise TraceError(f"{path}:{number}: a line longer than {MAX_LINE_B >> 20} MiB is not of this format; check the path")
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise TraceError(f"{path}: cannot be read as text: {problem}") from None


def json_lines(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line; TraceError names file and line of one that is cut, no object or lacks a key."""
    for number, text in lines(path):
        place = f"{path}:{number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise TraceError(f"{place}: not valid JSON: {problem}; the file was cut short or is something else") from None
        if not isinstance(record, dict) or (missing := [key for key in needed if key not in record]):
            what = f"lacks {', '.join(missing)}" if isinstance(record, dict) else "is no JSON object"
            raise TraceError(f"{place}: the record {what}; a record has {', '.join(needed)}")
        yield place, record


def table(values: ArrayLike, place: str, what: str, *, columns: int | None = None, kind: str = "iu") -> NDArray[Any]:
    """`values` as a matrix of whole numbers (or numbers, `kind` "iuf"); TraceError when rows differ in length."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        raise TraceError(f"{place}: {what} has rows of different length; every token has the same number of selections") from None
    if array.size == 0 and array.ndim <= 2:
        return np.zeros((0, columns or 0), np.int64)
    if array.ndim != 2 or array.dtype.kind not in kind or (columns is not None and array.shape[1] != columns):
        shape = f"[tokens, {columns if columns is not None else 'selections'}]"
        raise TraceError(f"{place}: {what} must be numbers {shape}, got {array.dtype} {list(array.shape)}")
    return array


def numpy_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz archive that are among `names`, never unpickled; TraceError when it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
            for name in names:
                if item := members.get(name):
                    if item.file_size > max(MAX_PACKED_B, MAX_PACKING * item.compress_size):
                        raise ValueError(f"array {name!r} unpacks {item.compress_size:,} bytes to {item.file_size:,}: a zip bomb or a mistake")
                    with archive.open(item) as stream:
                        _check_header(path, name, stream, item.file_size)
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in names if name in members}
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; check the path") from None
    except Exception as problem:  # damaged bytes make zip, zlib and header parsers raise whatever they spell
        raise TraceError(f"{path}: not a readable .npz archive: {problem}") from None


def array_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz archive; empty for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile, ValueError):
        return []


def numpy_array(path: Path) -> NDArray[Any]:
    """A single .npy array, mapped and not read; TraceError when it cannot be, or would need pickle."""
    try:
        with path.open("rb") as stream:
            _check_header(path, path.name, stream, path.stat().st_size)
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; check the path") from None
    except Exception as problem:  # as above
        raise TraceError(f"{path}: not a readable .npy array: {problem}") from None


def _check_header(path: Path, name: str, stream: IO[bytes], size_B: int) -> None:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"array {name!r} has format version {version}")
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds Python objects, which only running code could restore; save plain numbers")
    stated_B = math.prod(shape) * dtype.itemsize
    if stated_B > min(MAX_ARRAY_B, size_B):
        raise ValueError(f"array {name!r} states {list(shape)} {dtype}, {stated_B:,} bytes, but the file holds {size_B:,}")


def safetensors(path: Path) -> Mapping[str, NDArray[Any]]:
    """Tensors of a .safetensors file by name, mapped and not read. Format: 8-byte header length, JSON header, raw bytes.

    Raises TraceError when the header is damaged or a tensor lies outside the file.
    """
    try:
        size_B = path.stat().st_size
        with path.open("rb") as stream:
            header_B = int.from_bytes(stream.read(8), "little")
            if size_B < 8 or header_B > min(MAX_HEADER_B, size_B - 8):
                raise ValueError(f"it states a header of {header_B:,} bytes in a file of {size_B:,}")
            header = json.loads(stream.read(header_B))
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
        start = 8 + header_B
        raw: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r", offset=start) if size_B > start else np.zeros(0, np.uint8)
        return {name: _tensor(name, entry, raw) for name, entry in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as problem:
        raise TraceError(f"{path}: not a readable .safetensors file: {problem}") from None


def _tensor(name: str, entry: dict[str, Any], raw: NDArray[np.uint8]) -> NDArray[Any]:
    dtype, shape, (low, high) = _SAFE_DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}, expected whole numbers")
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in [*shape, low, high])
    if not whole or not low <= high <= len(raw) or high - low != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} states shape {shape} at bytes {low}..{high} of {len(raw):,}")
    return raw[low:high].view(dtype).reshape(shape)


def integer(value: Any, place: str, what: str, error: type[InputError] = TraceError) -> int:
    """`value` if it is a whole number >= 0 that fits 31 bits; `error` naming `place` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise error(f"{place}: {what} must be a whole number >= 0, got {value!r}")
    return value
