"""The trace format: one Parquet row per token.

    step, microbatch, rank, sequence, position, token_id, phase, domain, valid
    experts_<layer>: fixed_size_list<uint16>[K]      chosen experts, 65535 = no selection
    weights_<layer>: fixed_size_list<float16>[K]     gate weights (optional)
    logits_<layer>: fixed_size_list<float16>[E]      router logits of all experts (optional), nan = this layer did not run for the token

Schema metadata `moesim` is JSON: format version, model, what captured it and how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesim.errors import SpecError, TraceError
from moesim.model import ModelSpec

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
NO_EXPERT = 65535
PHASES = ("train", "prefill", "decode")
MANIFEST = "manifest.json"
PART = "part-*.parquet"
NUMBER_COLUMNS = {"step": "int32", "microbatch": "int32", "rank": "int32", "sequence": "int64", "position": "int32", "token_id": "int32"}
TOKEN_COLUMNS = (*NUMBER_COLUMNS, "phase", "domain", "valid")
METADATA_KEY = b"moesim"
MAX_METADATA_B = 4 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceInfo:
    """What every part of a trace says of itself."""

    model: ModelSpec
    top_k: int  # width of the selection columns; more than model.top_k where k varies
    weights: bool
    logits: bool = False
    captured_by: Mapping[str, Any]

    @property
    def widths(self) -> dict[str, int]:
        """The kinds of columns that every MoE layer has, by prefix, and the length of their lists."""
        kinds = {"experts": self.top_k, "weights": self.top_k, "logits": self.model.experts}
        return {kind: width for kind, width in kinds.items() if kind == "experts" or getattr(self, kind)}

    def to_json(self) -> str:
        """Text stored in the Parquet schema metadata."""
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "model": self.model.to_dict(),
                "top_k": self.top_k,
                "weights": self.weights,
                "logits": self.logits,
                "captured_by": dict(self.captured_by),
            }
        )


def arrow_schema(info: TraceInfo) -> pa.Schema:
    """Arrow schema of a trace of `info.model`; every field non-null (no definition levels to store)."""
    import pyarrow as pa

    name = pa.dictionary(pa.int32(), pa.string())
    kinds = {key: pa.type_for_alias(kind) for key, kind in NUMBER_COLUMNS.items()} | {"phase": name, "domain": name, "valid": pa.bool_()}
    columns = [pa.field(key, kind, nullable=False) for key, kind in kinds.items()]
    for prefix, width in info.widths.items():
        item = pa.field("element", pa.uint16() if prefix == "experts" else pa.float16(), nullable=False)
        columns += [pa.field(f"{prefix}_{layer}", pa.list_(item, width), nullable=False) for layer in info.model.moe_layers]
    return pa.schema(columns, metadata={METADATA_KEY: info.to_json().encode()})


def read_info(schema: pa.Schema, place: str) -> TraceInfo:
    """The metadata of a part, checked against its columns; raises TraceError naming what does not fit."""
    import pyarrow as pa

    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise TraceError(f"{place}: no 'moesim' metadata, so this Parquet file is not a routing trace; use `moesim import`")
    if len(raw) > MAX_METADATA_B:
        raise TraceError(f"{place}: metadata of {len(raw):,} bytes is absurd; the file is not a trace")
    try:
        data = json.loads(raw)
        version, width, weights = data["format_version"], data["top_k"], data["weights"]
        logits = data.get("logits", False)  # traces of earlier releases have none and do not say so
        model, captured_by = ModelSpec.from_dict(data["model"]), data["captured_by"]
    except (ValueError, KeyError, TypeError, RecursionError, SpecError) as problem:
        raise TraceError(f"{place}: damaged trace metadata: {problem}") from None
    if version != FORMAT_VERSION:
        raise TraceError(f"{place}: trace format {version!r}, this moesim reads {FORMAT_VERSION}; convert it with a matching release")
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= model.experts:
        raise TraceError(f"{place}: top_k(={width!r}) must be within 1..{model.experts}")
    if not isinstance(weights, bool) or not isinstance(logits, bool) or not isinstance(captured_by, dict):
        raise TraceError(f"{place}: damaged trace metadata: 'weights' and 'logits' must be true or false and 'captured_by' an object")
    info = TraceInfo(model=model, top_k=width, weights=weights, logits=logits, captured_by=captured_by)
    for wanted in arrow_schema(info):
        if wanted.name not in schema.names:
            raise TraceError(f"{place}: column {wanted.name!r} is missing; the file was cut or written by something else")
        found = schema.field(wanted.name).type
        same = found == wanted.type or (pa.types.is_string(found) and pa.types.is_dictionary(wanted.type))
        if not same and not _same_list(found, wanted.type):
            raise TraceError(f"{place}: column {wanted.name!r} holds {found}, expected {wanted.type}")
    return info


def _same_list(found: pa.DataType, wanted: pa.DataType) -> bool:
    import pyarrow as pa

    lists = pa.types.is_fixed_size_list(found) and pa.types.is_fixed_size_list(wanted)
    return bool(lists and found.list_size == wanted.list_size and found.value_type == wanted.value_type)
