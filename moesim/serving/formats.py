"""Request logs in the forms they are published in: Azure, Mooncake, BurstGPT, and tables of measured requests.

    azure     CSV TIMESTAMP, ContextTokens, GeneratedTokens; wall-clock times (github.com/Azure/AzurePublicDataset)
    burstgpt  CSV Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type (github.com/HPMLL/BurstGPT)
    mooncake  JSON lines timestamp (ms), input_length, output_length, hash_ids (github.com/kvcache-ai/Mooncake)
    requests  CSV arrival_s, input_toks, output_toks, and measured columns that `measured.py` compares with

Files are read in blocks, gzipped or not: memory is that of the rows kept, at most `most`. Times count from the
earliest request. Rows with 0 tokens (failed requests) are left out and counted.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.serving.arrivals import MOST_TOKENS, Arrivals, Prefixes

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
MOST_REQUESTS = 5_000_000
UNIT_TOKENS = 512  # of one of Mooncake's hash_ids
YEARS = (1900, 2200)
_BLOCK_B = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Form:
    """Columns of time, prompt and output, and seconds of one unit of time (None: wall-clock times)."""

    time: str
    prompt: str
    output: str
    unit_s: float | None

    @property
    def columns(self) -> tuple[str, str, str]:
        """All three."""
        return (self.time, self.prompt, self.output)


FORMS = {
    "azure": Form(time="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens", unit_s=None),
    "burstgpt": Form(time="Timestamp", prompt="Request tokens", output="Response tokens", unit_s=1.0),
    "mooncake": Form(time="timestamp", prompt="input_length", output="output_length", unit_s=1e-3),
    "requests": Form(time="arrival_s", prompt="input_toks", output="output_toks", unit_s=1.0),
}


def load_arrivals(path: str | Path, *, form: str | None = None, most: int = MOST_REQUESTS) -> Arrivals:
    """Requests of a log; its form is recognised by its columns unless given (a name of `FORMS`).

    Requests out of order are sorted, rows with 0 tokens left out, rows beyond the first `most` not read: notes say so.
    Raises InputError naming file and line: unknown columns, a cell that is no number, negative or not finite times, an empty or
    damaged file, a line above 8 MiB.
    """
    file = Path(path)
    if form is not None and form not in FORMS:
        raise InputError(f"form {form!r} is unknown; use one of {', '.join(FORMS)}")
    rows = _Rows(file, most)
    for first_line, text in _blocks(file):
        rows.add(first_line, text, form)
        if rows.full:
            break
    return rows.arrivals()


def measured_columns(path: str | Path, names: Sequence[str]) -> dict[str, Floats]:
    """Columns of a `requests` table as numbers (NaN where a cell is empty), in the order of the file.

    Raises InputError when a column is missing or the file is above 256 MiB.
    """
    import pandas as pd

    from moesim.files import read_text

    file = Path(path)
    try:
        table = pd.read_csv(StringIO(read_text(file, InputError)), skipinitialspace=True)
        if missing := [name for name in names if name not in table.columns]:
            raise InputError(f"{file}: no column {missing[0]!r} among {', '.join(map(str, table.columns))}")
        return {name: table[name].to_numpy(np.float64, na_value=np.nan) for name in names}
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as problem:
        raise InputError(f"{file}: not a table of numbers: {problem}") from None


class _Rows:
    """Rows gathered so far, and what was left out."""

    def __init__(self, file: Path, most: int) -> None:
        self.file, self.most, self.form, self.kind = file, most, "", ""
        self.header: list[str] = []
        self.parts: list[tuple[Floats, Floats, Floats]] = []
        self.units: list[NDArray[np.int64]] = []  # hash_ids of each row kept
        self.rows = self.failed = 0
        self.full = False

    def add(self, first_line: int, text: str, form: str | None) -> None:
        """Parse one block of whole lines."""
        if not self.kind:
            text = text.removeprefix("\ufeff")
            self.kind = "json" if text.lstrip().startswith("{") else "csv"
            if self.kind == "csv":
                head, _, text = text.partition("\n")
                first_line += 1
                self.header = [cell.strip().strip('"') for cell in head.rstrip("\r").split(",")]
        table, lines = (self._json if self.kind == "json" else self._csv)(first_line, text)
        if table is None:
            return
        if not self.form:
            self.form = self._recognised(table.columns, form)
        self._take(table, lines)

    def _recognised(self, columns: Any, form: str | None) -> str:
        there = set(map(str, columns))
        for name in [form] if form else FORMS:
            if set(FORMS[name].columns) <= there:
                return name
        expected = "; ".join(f"{name}: {', '.join(FORMS[name].columns)}" for name in ([form] if form else FORMS))
        raise InputError(f"{self.file}: columns {', '.join(sorted(there))[:200]} are not those of a request log ({expected})")

    def _csv(self, first_line: int, text: str) -> tuple[pd.DataFrame | None, NDArray[np.int64] | None]:
        import csv

        import pandas as pd

        rows = [(number, line) for number, line in enumerate(text.split("\n"), start=first_line) if line.strip()]
        if not rows:
            return None, None
        for number, line in rows:
            if line.count(",") != len(self.header) - 1:
                raise InputError(f"{self.file}: line {number} has {line.count(',') + 1} cells, the header names {len(self.header)}")
        source = StringIO("\n".join(line for _, line in rows))
        try:
            table = pd.read_csv(source, names=self.header, header=None, dtype=str, quoting=csv.QUOTE_NONE, index_col=False, na_filter=False)
        except (pd.errors.ParserError, ValueError) as problem:  # a name that occurs twice
            raise InputError(f"{self.file}: in the block from line {first_line}: {problem}".rstrip()) from None
        return table, np.asarray([number for number, _ in rows], np.int64)

    def _json(self, first_line: int, text: str) -> tuple[pd.DataFrame | None, NDArray[np.int64] | None]:
        import pandas as pd

        records, lines = [], []
        wanted = {column for form in FORMS.values() for column in form.columns}
        for number, line in enumerate(text.split("\n"), start=first_line):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise InputError(f"{self.file}: line {number} is not JSON: {problem}") from None
            if not isinstance(record, Mapping):
                raise InputError(f"{self.file}: line {number} holds {type(record).__name__}, expected one JSON object per line")
            records.append({key: str(value) for key, value in record.items() if key in wanted} | {"hash_ids": self._ids(record, number)})
            lines.append(number)
        return (pd.DataFrame(records, dtype=object), np.asarray(lines, np.int64)) if records else (None, None)

    def _ids(self, record: Mapping[str, Any], line: int) -> NDArray[np.int64]:
        """Names of the blocks of its prompt, empty where the log gives none."""
        given = record.get("hash_ids", [])
        if not isinstance(given, list) or not all(type(name) is int and 0 <= name < 2**63 for name in given):
            raise InputError(f"{self.file}: line {line}: hash_ids is {str(given)[:60]!r}; expected a list of whole numbers >= 0")
        return np.asarray(given, np.int64)

    def _take(self, table: pd.DataFrame, lines: Any) -> None:
        import pandas as pd

        form = FORMS[self.form]
        if missing := [name for name in form.columns if name not in table.columns]:
            raise InputError(f"{self.file}: line {lines[0]}: no {missing[0]!r}; expected {', '.join(form.columns)}")
        kept = table.iloc[: max(0, self.most - self.rows)]
        kept = kept.assign(**{name: kept[name].str.strip('" ') for name in form.columns})
        self.full = len(kept) < len(table)
        if not len(kept):
            return
        if form.unit_s is None:
            stamps = pd.to_datetime(kept[form.time], errors="coerce", utc=True, format="ISO8601")
            known = stamps.dt.year.between(*YEARS).to_numpy()  # false for none; beyond, nanoseconds in 64 bits would wrap around
            self._check(lines, kept, form.time, known, "a time such as 2023-11-16 18:17:03.97")
            seconds = self._since(stamps.to_numpy("datetime64[ns]"))
        else:
            seconds = pd.to_numeric(kept[form.time], errors="coerce").to_numpy(np.float64) * form.unit_s
            self._check(lines, kept, form.time, np.isfinite(seconds) & (seconds >= 0), "a time >= 0")
        tokens = []
        for name in (form.prompt, form.output):
            count = pd.to_numeric(kept[name], errors="coerce").to_numpy(np.float64)
            good = np.isfinite(count) & (count >= 0) & (count <= MOST_TOKENS) & (count == np.floor(count))
            self._check(lines, kept, name, good, f"a whole number of tokens, at most {MOST_TOKENS}")
            tokens.append(count)
        served = (tokens[0] > 0) & (tokens[1] > 0)
        self.rows += len(kept)
        self.failed += int((~served).sum())
        self.parts.append((seconds[served], tokens[0][served], tokens[1][served]))
        if "hash_ids" in kept:
            self.units += kept["hash_ids"][served].tolist()

    def _since(self, stamps: NDArray[Any]) -> Floats:
        """Seconds since the first row's time, exact to the digits of the file."""
        if not self.parts:
            self.origin = stamps[0]
        return np.asarray((stamps - self.origin).astype(np.int64) / 1e9)

    def _check(self, lines: Any, table: pd.DataFrame, column: str, good: NDArray[np.bool_], expected: str) -> None:
        if not good.all():
            row = int(np.argmin(good))
            raise InputError(f"{self.file}: line {lines[row]}: {column} is {str(table[column].iloc[row])[:60]!r}; expected {expected}")

    def arrivals(self) -> Arrivals:
        """Everything read."""
        notes = []
        if self.failed:
            notes.append(f"{self.failed} of {self.rows} rows have 0 prompt or output tokens (failed requests) and were left out")
        if self.full:
            notes.append(f"only the first {self.most:,} requests of the file were read")
        if any(self.header) and not self.form:
            self._recognised(self.header, None)
        if self.rows == self.failed:
            raise InputError(f"{self.file}: holds no requests" + (f": all {self.rows} rows have 0 tokens" if self.rows else "; it is empty"))
        seconds, prompt, output = (np.concatenate(columns) for columns in zip(*self.parts, strict=True))
        prefixes = None
        if any(map(len, self.units)):
            starts = np.concatenate([[0], np.cumsum([len(names) for names in self.units])])
            prefixes = Prefixes(ids_A=np.concatenate(self.units), starts_R=starts, tokens=UNIT_TOKENS)
        return Arrivals.of(
            seconds - seconds.min(),
            prompt,
            output,
            prefixes=prefixes,
            name=self.file.name,
            made_from={"file": self.file.name, "form": self.form},
            notes=tuple(notes),
        )


def _blocks(file: Path) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of blocks of whole lines."""
    opener: Callable[[Path], Any] = gzip.open if file.suffix == ".gz" else lambda path: path.open("rb")
    line, rest = 1, b""
    try:
        with opener(file) as stream:
            while True:
                block = stream.read(_BLOCK_B)
                data = rest + block
                cut = data.rfind(b"\n") + 1 if block else len(data)
                if block and not cut and len(data) > _BLOCK_B:
                    raise InputError(f"{file}: line {line} is longer than 8 MiB; this is no request log")
                if cut:
                    text = data[:cut].decode("utf-8")
                    if "\0" in text:
                        raise InputError(f"{file}: holds NUL bytes after line {line}; this is no text file")
                    yield line, text
                    line += text.count("\n")
                rest = data[cut:]
                if not block:
                    return
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; check the path") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise InputError(f"{file}: cannot be read from line {line} on: {problem}") from None
