"""check for captures: does the file hold what a trace needs, and real tokens?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from moesim.interop.layout import Finding
from moesim.interop.loads import Loads, OnlyCounts
from moesim.interop.routing import DoesNotFit, Imported

MANY, MOST = 0.1, 0.5  # shares of repeated tokens that are remarked on, and that make a capture useless


def check_capture(read: Callable[[Path], Imported] | None, count: Callable[[], Loads] | None) -> list[Finding]:
    """Findings on a capture. `read` imports its tokens to a given path, `count` gives its loads; None where a format has none.

    Raises TraceError when the file cannot be read at all.
    """
    try:
        if read:
            with tempfile.TemporaryDirectory() as folder:
                return _tokens(read(Path(folder) / "trace"))
        return _counts(count)
    except OnlyCounts as problem:
        return _counts(count) if count else [Finding(level="fail", check="mode", message=str(problem))]
    except DoesNotFit as problem:
        return [Finding(level="fail", check="fits", message=str(problem))]


def _counts(count: Callable[[], Loads] | None) -> list[Finding]:
    assert count is not None
    try:
        loads = count()
    except DoesNotFit as problem:
        return [Finding(level="fail", check="fits", message=str(problem))]
    message = f"{int(loads.load_LE.sum()):,} counts over {len(loads.layers)} MoE layers x {loads.experts} experts, no tokens"
    remedy = "enough for eplb (import with --as-loads); for traffic, co-activation and caching record tokens"
    return [
        Finding(level="warn", check="mode", message=message, remedy=remedy),
        *(Finding(level="remark", check="import", message=note) for note in loads.notes),
    ]


def _tokens(imported: Imported) -> list[Finding]:
    tally, model = imported.tally, imported.model
    size = f"{tally.tokens:,} tokens, {tally.selections:,} selections, {len(model.moe_layers)} MoE layers x {model.experts} experts"
    found = [Finding(level="ok", check="tokens", message=f"{size}, {len(tally.ranks)} ranks")]
    repeated, empty = tally.repeated_share, tally.pad_tokens / (tally.tokens + tally.pad_tokens)
    message = f"{repeated:.0%} of tokens are routed exactly like the one before, {empty:.0%} of rows are empty"
    remedy = "dummy batches of warm-up, graph capture or idle data-parallel ranks: start recording after warm-up, under real requests"
    level = "fail" if max(repeated, empty) > MOST else "warn" if repeated > MANY else "ok"
    found.append(Finding(level=level, check="padding", message=message, remedy="" if level == "ok" else remedy))
    if tally.doubled:
        message = f"{tally.doubled:,} times a token names one expert twice in a layer"
        remedy = "ids are physical or padded: record logical ids, or import the dump that holds the map"
        found.append(Finding(level="warn", check="ids", message=message, remedy=remedy))
    return found + [Finding(level="remark", check="import", message=note) for note in imported.notes]
