"""Trace: reads routing from disk in batches, so that a trace larger than memory works."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.files import digest, read_json
from moesim.model import ModelSpec
from moesim.trace.schema import MANIFEST, NO_EXPERT, PART, PHASES, TOKEN_COLUMNS, TraceInfo, read_info

if TYPE_CHECKING:
    import pyarrow.parquet as pq

UNCLOSED = "{path}: no manifest, so the run that wrote it was killed or is still running; reading the {parts} parts that are complete"
BATCH_LOGITS_B = 1 << 28  # logits in one batch: with hundreds of experts in every layer they would fill the memory
_RANGE = re.compile(r"(\d+(?:\.\d+)?)?(%?):(\d+(?:\.\d+)?)?(%?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceBatch:
    """T consecutive tokens: `experts_TLK` uint16 (65535 = none), `weights_TLK` and `logits_TLE` float16 or None, `columns` by name [T]."""

    experts_TLK: NDArray[np.uint16]
    weights_TLK: NDArray[np.float16] | None
    logits_TLE: NDArray[np.float16] | None = None
    columns: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.experts_TLK)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A routing trace, or a selection of its tokens. Holds no tokens itself: `batches` streams them.

    `domains`, `phases` and `steps` (half-open range of step numbers) narrow the tokens; `tokens` then takes a range
    of what is left, in order: "0%:50%", "1000:2000", ":4096". Padding (`valid` false) is left out always.
    """

    path: Path
    parts: tuple[Path, ...]
    info: TraceInfo
    domains: tuple[str, ...] | None = None
    phases: tuple[str, ...] | None = None
    steps: tuple[int, int] | None = None
    tokens_range: str = ":"

    @property
    def model(self) -> ModelSpec:
        """The model whose routing this is."""
        return self.info.model

    def select(
        self,
        *,
        tokens: str | None = None,
        domain: str | Sequence[str] | None = None,
        phase: str | Sequence[str] | None = None,
        steps: tuple[int, int] | None = None,
    ) -> Trace:
        """A narrower view; a range of tokens is of those selected so far.

        Raises TraceError for a malformed range, an unknown domain or phase, or when nothing is left.
        """
        if self.tokens_range != ":" and (domain or phase or steps):
            raise TraceError(f"{self.path}: tokens {self.tokens_range} are already selected; select domain, phase and steps before tokens")
        chosen = (domain,) if isinstance(domain, str) else tuple(domain) if domain else self.domains
        phases = (phase,) if isinstance(phase, str) else tuple(phase) if phase else self.phases
        if unknown := sorted(set(phases or ()) - set(PHASES)):
            raise TraceError(f"phase {unknown[0]!r} is unknown; use one of {', '.join(PHASES)}")
        if chosen and (unknown := sorted(set(chosen) - set(self.tokens_by_domain))):
            known = ", ".join(sorted(self.tokens_by_domain)) or "none"
            raise TraceError(f"{self.path}: no tokens of domain {unknown[0]!r}; domains here: {known}")
        if tokens is not None:
            _parse_range(tokens, 0)
            if self.tokens_range != ":":
                start, stop = self._bounds
                low, high = _parse_range(tokens, stop - start)
                tokens = f"{start + low}:{start + high}"
        view = replace(self, domains=chosen, phases=phases, steps=steps or self.steps, tokens_range=tokens or self.tokens_range)
        if view.tokens == 0:
            raise TraceError(f"{self.path}: the selection {view.selection} holds no tokens; widen it")
        return view

    @property
    def selection(self) -> str:
        """Words for what is selected, "all tokens" when everything is."""
        words = [f"domain {', '.join(self.domains)}"] if self.domains else []
        words += [f"phase {', '.join(self.phases)}"] if self.phases else []
        words += [f"steps {self.steps[0]}:{self.steps[1]}"] if self.steps else []
        words += [f"tokens {self.tokens_range}"] if self.tokens_range != ":" else []
        return ", ".join(words) or "all tokens"

    @cached_property
    def tokens(self) -> int:
        """Number of selected tokens (reads only the columns the selection needs)."""
        start, stop = self._bounds
        return stop - start

    @cached_property
    def tokens_by_domain(self) -> dict[str, int]:
        """Valid tokens of every domain of the whole trace."""
        counts: dict[str, int] = {}
        for columns in self._column_batches(("domain", "valid")):
            names, times = np.unique(columns["domain"][columns["valid"]], return_counts=True)
            for name, n in zip(names.tolist(), times.tolist(), strict=True):
                counts[name] = counts.get(name, 0) + n
        return counts

    @cached_property
    def digest(self) -> str:
        """16 hex digits naming the selected content: part checksums (from the manifest or the files) and the selection."""
        known: dict[str, str] = {}
        for manifest in sorted(self.path.glob("manifest*.json")) if self.path.is_dir() else []:
            parts = read_json(manifest, TraceError)
            known.update(parts.get("parts", {}) if isinstance(parts, dict) else {})
        sums = [known.get(part.name) or _sha256(part) for part in self.parts]
        return digest(*sums, self.selection)

    @cached_property
    def _matching(self) -> int:
        names = self._filter_columns()
        return sum(int(self._mask(columns).sum()) for columns in self._column_batches(names))

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        return _parse_range(self.tokens_range, self._matching)

    def _filter_columns(self) -> tuple[str, ...]:
        wanted = {"domain": self.domains, "phase": self.phases, "step": self.steps}
        return ("valid", *(name for name, value in wanted.items() if value))

    def _mask(self, columns: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
        keep: NDArray[np.bool_] = columns["valid"].copy()
        if self.domains:
            keep &= np.isin(columns["domain"], self.domains)
        if self.phases:
            keep &= np.isin(columns["phase"], self.phases)
        if self.steps:
            keep &= (columns["step"] >= self.steps[0]) & (columns["step"] < self.steps[1])
        return keep

    def batches(
        self,
        *,
        rows: int = 1 << 16,
        layers: Sequence[int] | None = None,
        weights: bool = False,
        logits: bool = False,
        columns: Sequence[str] = (),
    ) -> Iterator[TraceBatch]:
        """Selected tokens in order, at most `rows` at a time, and at most 256 MiB of logits.

        `layers` (absolute indices) reads only those MoE layers; `weights` adds gate weights, `logits` router logits;
        `columns` adds token columns. Raises TraceError when a part is damaged or holds an id outside the model.
        """
        chosen = tuple(layers) if layers is not None else self.model.moe_layers
        if unknown := sorted(set(chosen) - set(self.model.moe_layers)):
            raise TraceError(f"{self.path}: layer {unknown[0]} is no MoE layer; MoE layers: {list(self.model.moe_layers)}")
        if weights and not self.info.weights:
            raise TraceError(f"{self.path}: gate weights were not captured; capture with weights, or ask without")
        if logits and not self.info.logits:
            raise TraceError(f"{self.path}: router logits were not captured; capture with logits=True, or ask without")
        if logits:
            rows = max(1, min(rows, BATCH_LOGITS_B // (2 * self.model.experts * max(1, len(chosen)))))
        names = dict.fromkeys((*self._filter_columns(), *columns))
        kinds = ["experts", *(["weights"] if weights else []), *(["logits"] if logits else [])]
        lists = [f"{kind}_{layer}" for kind in kinds for layer in chosen]
        (start, stop), seen = self._bounds, 0
        for part, table in self._tables((*names, *lists), rows):
            found = {name: _numpy(table.column(name)) for name in names}
            keep = self._mask(found)
            rank = seen + np.cumsum(keep)  # 1-based position among matching tokens
            seen += int(keep.sum())
            keep &= (rank > start) & (rank <= stop)
            if keep.any():
                layered = np.stack([_list(table.column(f"experts_{layer}"), self.info.top_k) for layer in chosen])
                experts = layered.transpose(1, 0, 2)  # layer-major in memory: quicker to stack, and to walk layer by layer
                self._check_ids(experts, chosen, part)
                whole = bool(keep.all())
                floats = {
                    kind: np.stack([_list(table.column(f"{kind}_{layer}"), self.info.widths[kind]) for layer in chosen], axis=1) for kind in kinds[1:]
                }
                if not whole:
                    floats = {kind: values[keep] for kind, values in floats.items()}
                yield TraceBatch(
                    experts_TLK=experts if whole else experts[keep],
                    weights_TLK=floats.get("weights"),
                    logits_TLE=floats.get("logits"),
                    columns={name: found[name][keep] for name in columns},
                )
            if seen >= stop:
                return

    def experts(self, *, limit: int | None = None, layers: Sequence[int] | None = None) -> NDArray[np.uint16]:
        """Selected tokens as one array experts_TLK. More than `limit` tokens are thinned to every n-th one."""
        every = 1 if limit is None else -(-self.tokens // limit)
        gathered, seen = [], 0
        for batch in self.batches(layers=layers):
            gathered.append(batch.experts_TLK[(-seen) % every :: every])
            seen += len(batch)
        return np.concatenate(gathered)

    def _check_ids(self, experts_TLK: NDArray[np.uint16], layers: Sequence[int], part: Path) -> None:
        experts = [self.model.experts_L[self.model.moe_layers.index(layer)] for layer in layers]
        signed = experts_TLK.view(np.int16)  # 65535, no selection, reads as -1: no copy to look for the largest id
        if signed.max(initial=-1) < min(experts) and signed.min(initial=-1) >= -1:
            return
        bad = (experts_TLK >= np.asarray(experts, np.uint16)[:, None]) & (experts_TLK != NO_EXPERT)
        if bad.any():
            token, layer, choice = np.argwhere(bad)[0]
            raise TraceError(
                f"{part}: expert id {experts_TLK[token, layer, choice]} out of range 0..{experts[layer] - 1} at layer {layers[layer]}; "
                f"the file is damaged or was written for another model than {self.model.name!r}"
            )

    def _column_batches(self, names: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
        for _, table in self._tables(names, 1 << 18):
            yield {name: _numpy(table.column(name)) for name in names}

    def _tables(self, names: Sequence[str], rows: int) -> Iterator[tuple[Path, Any]]:
        import pyarrow as pa

        for part in self.parts:
            found = 0
            with _open(part) as file:
                try:
                    for batch in file.iter_batches(batch_size=rows, columns=list(names)):
                        found += len(batch)
                        yield part, batch
                except (pa.ArrowException, OSError, ValueError) as problem:
                    raise TraceError(f"{part}: damaged Parquet data: {problem}; capture again or delete this part") from None
                if found != file.metadata.num_rows:
                    raise TraceError(f"{part}: says it holds {file.metadata.num_rows:,} tokens, and holds {found:,}; delete this part")


def load_trace(path: str | Path) -> Trace:
    """Open a trace: a directory of parts or a single Parquet file. Reads metadata only.

    Raises TraceError naming the file when it is missing, truncated, not a trace, or its parts disagree.
    Warns when the run that wrote it did not close it.
    """
    root = Path(path)
    if not root.exists():
        raise TraceError(f"{root}: no such file or directory; give a trace written by `moesim capture` or `moesim import`")
    parts = tuple(sorted(root.glob(PART))) if root.is_dir() else (root,)
    if not parts:
        raise TraceError(f"{root}: holds no {PART} files, so it is not a trace; use `moesim import` for other formats")
    infos = []
    for part in parts:
        with _open(part) as file:
            infos.append(read_info(file.schema_arrow, str(part)))
    for part, info in zip(parts, infos, strict=True):
        if (info.model.digest, info.widths) != (infos[0].model.digest, infos[0].widths):
            raise TraceError(f"{part}: routing of {info.model.name!r} does not fit {parts[0].name} of {infos[0].model.name!r}; keep runs apart")
    if root.is_dir() and not (root / MANIFEST).exists():
        warnings.warn(UNCLOSED.format(path=root, parts=len(parts)), stacklevel=2)
    return Trace(path=root, parts=parts, info=infos[0])


def _open(part: Path) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(part, thrift_string_size_limit=64 * 2**20, thrift_container_size_limit=10**6)
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise TraceError(f"{part}: not a complete Parquet file: {problem}; it was cut short or is something else") from None


def _numpy(column: Any) -> NDArray[Any]:
    """Values of a column, without a copy where they are numbers: `to_numpy` alone would import pandas, a tenth of a second and more."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        names = np.asarray(column.dictionary.to_pylist() or [""], dtype=object)
        texts: NDArray[Any] = names[_numpy(column.indices)].astype(str)
        return texts
    if column.null_count or not pa.types.is_primitive(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    values, end = column.buffers()[1], column.offset + len(column)
    if not len(column):
        return np.zeros(0, column.type.to_pandas_dtype())
    if pa.types.is_boolean(column.type):
        return np.unpackbits(np.frombuffer(values, np.uint8), count=end, bitorder="little")[column.offset :].view(np.bool_)
    return np.frombuffer(values, column.type.to_pandas_dtype(), count=end)[column.offset :]


def _list(column: Any, width: int) -> NDArray[Any]:
    return _numpy(column.flatten()).reshape(-1, width)


def _parse_range(text: str, tokens: int) -> tuple[int, int]:
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if not match:
        raise TraceError(f"token range {text!r} is not understood; write for example 0%:50%, 50%:, or 1000:2000")
    low, high = (
        default if number is None else round(float(number) / 100 * tokens) if percent else int(float(number))
        for number, percent, default in ((match[1], match[2], 0), (match[3], match[4], tokens))
    )
    if any(n is not None and p and float(n) > 100 for n, p in ((match[1], match[2]), (match[3], match[4]))):
        raise TraceError(f"token range {text!r}: a share cannot exceed 100%")
    if tokens and low > high:
        raise TraceError(f"token range {text!r} runs backwards ({low} to {high} of {tokens})")
    return min(low, tokens), min(high, tokens)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


__all__ = ["TOKEN_COLUMNS", "Trace", "TraceBatch", "load_trace"]
