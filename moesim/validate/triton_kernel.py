"""An own grouped GEMM in Triton: out[i] = A[rows[i]] @ W[expert(i)].T, tiles of every expert in one persistent launch.

A program takes work items in turn; an item is one tile of an expert's rows times one block of columns, columns of a tile
after each other so that the tile's rows stay in cache. The table of tiles is made on the device: nothing waits for the
host. Importing this module needs triton; `tile_schedule` is plain torch in `moesim.validate.tiles`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesim.validate.tiles import tile_rows, tile_schedule

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CHOICES = [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 4, 4), (256, 64, 8, 3)]  # columns, depth, warps, stages


def _configs() -> list[Any]:
    choices = [(16, 16, 4, 1)] if _INTERPRETED else _CHOICES  # the interpreter cannot time anything
    return [triton.Config({"COLUMNS": c, "DEPTH": d}, num_warps=w, num_stages=s) for c, d, w, s in choices]


@triton.autotune(configs=_configs(), key=["n", "k", "ROWS"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    a, w, out, rows, tile_expert, tile_start, tile_end, tiles, n, k, stride_a, programs,
    GATHER: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, COLUMNS)
    used = tl.load(tiles)
    for item in range(tl.program_id(0), used * blocks, programs):
        tile = item // blocks
        columns = (item % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        expert = tl.load(tile_expert + tile).to(tl.int64)
        start = tl.load(tile_start + tile)
        end = tl.load(tile_end + tile)
        mine = start + tl.arange(0, ROWS)
        inside = mine < end
        source = tl.load(rows + mine, mask=inside, other=0) if GATHER else mine.to(tl.int64)
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, k, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            left = tl.load(a + source[:, None] * stride_a + depth[None, :], mask=inside[:, None] & (depth[None, :] < k), other=0.0)
            right = tl.load(
                w + expert * n * k + columns[None, :].to(tl.int64) * k + depth[:, None],
                mask=(columns[None, :] < n) & (depth[:, None] < k), other=0.0,
            )  # fmt: skip
            sums = tl.dot(left, right, sums, input_precision="ieee" if EXACT else "tf32")
        target = out + mine[:, None].to(tl.int64) * n + columns[None, :]
        tl.store(target, sums.to(out.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < n))


def grouped_gemm(a_TK: Tensor, w_ENK: Tensor, counts_E: Tensor, rows_M: Tensor | None = None) -> Tensor:
    """[M, N]: row i is a_TK[rows_M[i]] (default: row i itself) times the transposed weights of its expert.

    Rows are sorted by expert, counts_E of each. Sums are in fp32.
    """
    count = len(a_TK) if rows_M is None else len(rows_M)
    experts, n, k = w_ENK.shape
    a, w = a_TK.contiguous(), w_ENK.contiguous()
    out = torch.empty(count, n, dtype=a.dtype, device=a.device)
    height = tile_rows(count, experts)
    schedule = tile_schedule(counts_E, height, total=count)
    units = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 2
    rows = schedule.start_M if rows_M is None else rows_M.to(torch.int64)
    _kernel[(2 * units,)](
        a, w, out, rows, schedule.expert_M, schedule.start_M, schedule.end_M, schedule.tiles, n, k, a.stride(0), 2 * units,
        GATHER=rows_M is not None, EXACT=a.dtype == torch.float32, ROWS=height,
    )  # fmt: skip
    return out
