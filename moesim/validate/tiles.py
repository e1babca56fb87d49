"""Which tile of rows belongs to which expert: the work table of the Triton kernel, made on the device without a host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Schedule:
    """Tiles of up to `rows` rows: expert_M, start_M, end_M int32 (rows start..end-1), the first `tiles` [1] of them used.

    M is the most there can be, known without reading the counts; unused entries are empty (start = end).
    """

    expert_M: Tensor
    start_M: Tensor
    end_M: Tensor
    tiles: Tensor


def tile_rows(rows: int, experts: int) -> int:
    """Height of a tile: the mean expert's rows rounded up to a power of two, within 16 (the least of a tensor core) and 128."""
    mean = -(-rows // max(1, experts))
    return min(128, max(16, 1 << (mean - 1).bit_length()))


def tile_schedule(counts_E: Tensor, rows: int, *, total: int) -> Schedule:
    """Tiles of `rows` rows for `total` rows sorted by expert, counts_E int64 of each; an expert without rows has none.

    An expert's last tile may be hollow; a tile never spans two experts.
    """
    most = -(-total // rows) + len(counts_E)
    tiles_E = (counts_E + rows - 1) // rows
    last_E = tiles_E.cumsum(0)
    index_M = torch.arange(most, device=counts_E.device)
    expert_M = torch.searchsorted(last_E, index_M, right=True).clamp_max(len(counts_E) - 1)
    within_M = index_M - (last_E - tiles_E)[expert_M]
    end_E = counts_E.cumsum(0)
    start_M = (end_E - counts_E)[expert_M] + within_M * rows
    used_M = index_M < last_E[-1]
    end_M = torch.minimum(start_M + rows, end_E[expert_M])
    return Schedule(
        expert_M=expert_M.to(torch.int32),
        start_M=torch.where(used_M, start_M, 0).to(torch.int32),
        end_M=torch.where(used_M, end_M, 0).to(torch.int32),
        tiles=last_E[-1:].to(torch.int32),
    )
