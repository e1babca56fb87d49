"""Where each row of a router's output came from: the token columns of one forward pass, from the model's own inputs.

Shapes: B sequences of S tokens this forward, R router rows (= B·S unless the model drops padding before its layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Forward(NamedTuple):
    """Facts of one forward pass known on the host when it begins. `prompt` numbers passes that start new sequences.

    A tuple, for one is made in every forward pass of the user's model: a frozen dataclass takes ten times as long.
    """

    stream: int
    step: int
    microbatch: int
    domain: str | tuple[str, ...]
    training: bool
    batch: int
    length: int
    past: int  # tokens already in the KV cache
    prompt: int
    sequence_first: bool = False


class Sequences:
    """Numbers the sequences of one stack of layers; decode steps continue those of their prompt."""

    def __init__(self) -> None:
        self._next = 0
        self._current: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def begin(self, forward: Forward) -> NDArray[np.int64]:
        """Ids [B] of fresh sequences, one a row."""
        ids_B = self._next + np.arange(forward.batch)
        self._next += forward.batch
        self._current[forward.stream] = (forward.prompt, ids_B)
        return ids_B

    def number(self, forward: Forward, start_BS: NDArray[np.bool_], valid_BS: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Sequence id [B, S]; -1 where padding. `start_BS` marks first tokens of sequences packed behind others."""
        prompt, last_B = self._current.get(forward.stream, (-1, np.empty(0, np.int64)))
        continues = forward.past > 0 and prompt == forward.prompt and len(last_B) == forward.batch
        first_BS = start_BS & valid_BS
        if not continues:
            leading = valid_BS & (np.cumsum(valid_BS, axis=1) == 1)
            first_BS = first_BS | leading
        fresh = self._next - 1 + np.cumsum(first_BS).reshape(first_BS.shape)
        before_B1 = last_B[:, None] if continues else np.full((forward.batch, 1), -1)
        began_BS = np.cumsum(first_BS, axis=1) > 0
        ids_BS = np.where(began_BS, fresh, before_B1)
        self._next += int(first_BS.sum())
        self._current[forward.stream] = (forward.prompt, ids_BS[:, -1] if ids_BS.shape[1] else last_B)
        return np.where(valid_BS, ids_BS, -1)


def token_columns(forward: Forward, inputs: dict[str, NDArray[Any]], rows: int, sequences: Sequences) -> tuple[dict[str, Any], bool]:
    """Columns of the R rows of one forward pass, and whether rows could be matched to tokens.

    `inputs` may hold `token_id` [B, S], `mask` [B, ≥S] (0 = padding), `position` [.., B, S] or [S], `bounds`
    (cumulative lengths of packed sequences) and `past` (a scalar only known on the device).
    Rows are matched when R = B·S, or when R is the number of unpadded tokens; otherwise position is the row
    and sequence and token_id are -1.
    """
    batch, length = forward.batch, forward.length
    if _plain(forward, inputs, rows):
        return _plain_columns(forward, inputs, sequences), True
    past = int(inputs["past"]) if "past" in inputs else forward.past
    valid_BS = _valid(inputs.get("mask"), batch, length, past)
    position_BS, start_BS = _positions(inputs, batch, length, past, valid_BS)
    sequence_BS = sequences.number(forward, start_BS, valid_BS)
    token_BS = inputs["token_id"].reshape(batch, length) if "token_id" in inputs else np.full((batch, length), -1)
    phase = "train" if forward.training else "decode" if length == 1 and past > 0 else "prefill"
    columns: dict[str, Any] = {"step": forward.step, "microbatch": forward.microbatch, "phase": phase}
    domain = forward.domain
    if rows not in (batch * length, int(valid_BS.sum())):
        lost = {"sequence": -1, "position": np.arange(rows), "token_id": -1, "valid": True}
        return columns | lost | {"domain": domain if isinstance(domain, str) else ""}, False
    grids = {"sequence": sequence_BS, "position": position_BS, "token_id": token_BS, "valid": valid_BS}
    if not isinstance(domain, str):
        grids["domain"] = np.broadcast_to(np.asarray(_per_sequence(domain, batch), dtype=object)[:, None], (batch, length))
    flat = {name: (grid.T if forward.sequence_first else grid).reshape(-1) for name, grid in grids.items()}
    if rows != batch * length:  # padding was dropped before the layers
        keep = flat["valid"]
        flat = {name: column[keep] for name, column in flat.items()}
    return {"domain": domain} | columns | flat, True


def _plain(forward: Forward, inputs: dict[str, NDArray[Any]], rows: int) -> bool:
    """Whole sequences from their start without padding: most training, and nothing to look up per token."""
    if forward.past or forward.sequence_first or rows != forward.batch * forward.length or not forward.length or "past" in inputs:
        return False
    return "position" not in inputs and "bounds" not in inputs and isinstance(forward.domain, str) and bool(inputs.get("mask", np.True_).all())


def _plain_columns(forward: Forward, inputs: dict[str, NDArray[Any]], sequences: Sequences) -> dict[str, Any]:
    row_T, position_T, valid_T = _grid(forward.batch, forward.length)
    return {
        "domain": forward.domain,
        "step": forward.step,
        "microbatch": forward.microbatch,
        "phase": "train" if forward.training else "prefill",
        "sequence": row_T + sequences.begin(forward)[0],
        "position": position_T,
        "token_id": inputs["token_id"].reshape(-1) if "token_id" in inputs else -1,
        "valid": valid_T,
    }


@lru_cache(maxsize=4)  # training repeats one shape
def _grid(batch: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """Row, position and validity of every token of whole sequences, [B·S] each, read-only."""
    row_T, position_T, valid_T = np.repeat(np.arange(batch), length), np.tile(np.arange(length, dtype=np.int32), batch), np.ones(batch * length, bool)
    row_T.flags.writeable = position_T.flags.writeable = valid_T.flags.writeable = False
    return row_T, position_T, valid_T


def _per_sequence(domain: Sequence[str], batch: int) -> Sequence[str]:
    if len(domain) != batch:
        raise ValueError(f"{len(domain)} domains for a batch of {batch} sequences; give one for each, or one word for all")
    return domain


def _valid(mask: NDArray[Any] | None, batch: int, length: int, past: int) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones((batch, length), bool)
    rows: NDArray[np.bool_] = np.broadcast_to(mask.reshape(-1, mask.shape[-1]), (batch, mask.shape[-1])) != 0
    begin = past if mask.shape[-1] >= past + length else mask.shape[-1] - length
    return rows[:, begin : begin + length]


def _positions(
    inputs: dict[str, NDArray[Any]], batch: int, length: int, past: int, valid_BS: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Position of every token in its sequence and where packed sequences start."""
    start_BS = np.zeros((batch, length), bool)
    given = inputs.get("position")
    position_BS = np.broadcast_to(past + np.arange(length), (batch, length)).astype(np.int64)
    if given is not None:
        text_only = given.ndim < 3 or len(given) != 3  # three rows are time, height, width: no order to read
        plane = given if given.ndim < 3 else given[0]
        position_BS = np.broadcast_to(plane.reshape(-1, length), (batch, length)).astype(np.int64)
        if text_only:
            start_BS = _restarts(position_BS, valid_BS)
    if "bounds" in inputs:
        start = np.zeros(batch * length + 1, bool)
        start[np.minimum(inputs["bounds"], batch * length)] = True
        start_BS = start[:-1].reshape(batch, length)
        if given is None:
            index = np.arange(batch * length)
            position_BS = (index - np.maximum.accumulate(np.where(start[:-1], index, 0))).reshape(batch, length)
    return position_BS, start_BS


def _restarts(position_BS: NDArray[np.int64], valid_BS: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True where a token's position does not exceed that of the token before it in its row, padding left out."""
    where = np.flatnonzero(valid_BS)
    position, row = position_BS.reshape(-1)[where], where // max(1, valid_BS.shape[1])
    restart = np.zeros(valid_BS.size, bool)
    restart[where[1:]] = (position[1:] <= position[:-1]) & (row[1:] == row[:-1])
    return restart.reshape(valid_BS.shape)
