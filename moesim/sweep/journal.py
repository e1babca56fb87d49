"""Journal: rows on disk that survive the death of the process that writes them.

Every line is JSON, `{"check":"<digest of the row's text>","row":{…}}`. A run appends to a part of its own, and a line is
on the disk before the next one is begun, so a killed run leaves whole lines and at most one torn one, at the end. One run at a time
may write in a folder: a lock that dies with its process sees to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from moesim.errors import InputError
from moesim.files import digest

LOCK, PARTS = "lock", "rows-*.jsonl"
_HEAD, _MIDDLE = '{"check":"', '","row":'
_START = len(_HEAD) + 16 + len(_MIDDLE)


def line_of(row: Mapping[str, Any]) -> str:
    """One line of a journal; NaN and Infinity are refused with ValueError."""
    text = json.dumps(row, allow_nan=False, separators=(",", ":"))
    return f"{_HEAD}{digest(text)}{_MIDDLE}{text}}}\n"


def row_of(line: str) -> dict[str, Any] | None:
    """The row of a line, None when the line is torn or altered."""
    text = line[_START:-2]
    if line != f"{_HEAD}{digest(text)}{_MIDDLE}{text}}}\n":
        return None
    row: dict[str, Any] = json.loads(text)
    return row


def read_rows(folder: Path, damaged: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every whole row of a folder, oldest first. Lines that are torn or altered are left out; `damaged` gets their places."""
    for part in sorted(folder.glob(PARTS)):
        with part.open(encoding="utf-8", errors="replace", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                row = row_of(line)
                if row is not None:
                    yield row
                elif damaged is not None and line.endswith("\n"):  # without its end it was being written when its process died
                    damaged.append(f"{part}:{number}")


class Journal:
    """Appends rows to a folder, made if absent. A context manager; holds the folder's lock meanwhile.

    Raises InputError when the folder holds something else, or another process writes in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: TextIO | None = None
        self._stream: TextIO | None = None

    def __enter__(self) -> Journal:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder}: is a file, not a folder; give another one with -o")
        if self.folder.exists() and not (self.folder / LOCK).exists() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder}: holds files that no sweep wrote; give another folder with -o")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK).open("a", encoding="utf-8")
        try:
            _lock(self._lock)
        except OSError:
            self._lock.close()
            raise InputError(f"{self.folder}: another sweep is writing here; wait for it, or give another folder with -o") from None
        numbers = [int(part.stem.rpartition("-")[2]) for part in self.folder.glob(PARTS)]
        part = self.folder / f"rows-{max(numbers, default=0) + 1:04}.jsonl"
        self._stream = part.open("x", encoding="utf-8", newline="\n")
        _sync_folder(self.folder)
        return self

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows; when this returns they are on the disk."""
        if self._stream is None:
            raise RuntimeError("journal is not open")
        self._stream.write("".join(map(line_of, rows)))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream is not None:
            empty = self._stream.tell() == 0
            self._stream.close()
            if empty:
                Path(self._stream.name).unlink()
        if self._lock is not None:
            self._lock.close()  # releases it


def _lock(stream: TextIO) -> None:
    """An exclusive lock on an open file, held until it is closed or its process dies; OSError when another has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable, where folders can be synchronised."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
