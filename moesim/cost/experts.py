"""Time of one MoE layer's experts on one device, from the tokens of each resident expert.

An expert is two matrix products (gate+up: hidden -> intermediate, down: back). A kernel cuts an expert's tokens into
tiles of some rows; tiles walk over the expert's weights in groups. Per product of `cols` outputs and `depth` inputs:

    memory  = passes * cols*depth*weight_B * stall / (bandwidth * memory_efficiency)
    compute = work * 2*cols*depth / (flops * flops_efficiency) * waves
    product = (memory^overlap + compute^overlap)^(1/overlap)
    passes  = active + (walks - active) * reread * miss    first walk from memory, later ones where the cache missed
              + several * repack                           experts of several rows, whose weights the library copies first
    walks   = sum over experts of ceil(tiles/group)        tiles of a group share what they read
    miss    = 1/(1 + (reread_cache*cache_B/matrix_B)^4)    share of the matrix the cache dropped since the last walk
    stall   = 1 + load_stall, in the smallest default tiles and in tuned ones 1: short loads leave memory waiting
    work    = (padded - masked_rows*(padded - selections))*width + tiles*tile_overhead
              + partial_tile*hollow*(rows*width + tile_overhead)
    padded  = tiles*rows
    width   = (columns + 64) / (1.5*columns)               narrow tiles load every row more often; 1 at 128 columns
    hollow  = tiles * sqrt(1 - selections/padded)          tiles, weighted with their empty rows
    waves   = 1 + wave_tail * units/(blocks + units)       few blocks = tiles*cols/columns leave units idle

The layer adds activation traffic, routing per token and a launch cost; a loop sorts, gathers and combines as well, which
costs its host as much as launching some experts. A cache that still holds the weights of the last call (`warm_cache`)
serves the first walk too. Suffixes: N cases, E resident experts, X launches of a case (1, or E for style "loop").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.kernel import PARAMETERS, TILES, TILING, VALID_KEYS, WEIGHT_B, ComputePeak, ExpertKernel, Style
from moesim.errors import InputError

__all__ = [
    "PARAMETERS",
    "TILES",
    "TILING",
    "VALID_KEYS",
    "WEIGHT_B",
    "Bools",
    "ComputePeak",
    "ExpertKernel",
    "ExpertShape",
    "ExpertTime",
    "Floats",
    "Style",
    "TileLoad",
    "expert_time_s",
    "layer_time",
    "tile_load",
]

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

_LOOP_LAUNCHES = 4.0  # of a layer beside its experts'
_MISS_SHARPNESS = 4.0
_LOAD_COLUMNS = 64.0  # of a tile that reading its rows costs as much as multiplying them
# What tuners of Triton kernels choose (vLLM's and SGLang's files of H100 and H200 in bf16 agree): rows while selections per
# expert are <= the steps, columns of those tiles, and the group.
_TUNED_STEPS, _TUNED_ROWS, _TUNED_COLUMNS, _TUNED_GROUP = (11.0, 25.0, 50.0), (16.0, 32.0, 64.0, 128.0), (128.0, 128.0, 128.0, 256.0), 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTime:
    """Seconds of each case and the terms behind them. `weights` and `compute` overlap, so the terms add up to more than the time."""

    time_s_N: Floats
    extrapolated_N: Bools  # outside the kernel's valid range
    launch_s_N: Floats
    weights_s_N: Floats
    compute_s_N: Floats
    activations_s_N: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLoad:
    """What the time depends on: tokens per expert reduced to tiles of each kernel launch."""

    tokens_N: Floats
    experts_N: Floats
    rows_N1: Floats
    columns_N1: Floats
    stalls_N1: Bools  # tiles with short loads
    active_NX: Floats
    several_NX: Floats  # experts of more than one row
    selections_NX: Floats
    tiles_NX: Floats
    walks_NX: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Sizes of one expert, scalars or one per case: hidden and intermediate width, gate matrices (2 with up, 1 plain), top-k."""

    hidden: ArrayLike
    intermediate: ArrayLike
    gates: ArrayLike
    top_k: ArrayLike


def expert_time_s(
    tokens_NE: ArrayLike,
    *,
    hidden: int,
    intermediate: int,
    gated: bool,
    top_k: int,
    peak: ComputePeak,
    kernel: ExpertKernel,
    tokens_N: ArrayLike | None = None,
    warm_cache: bool = False,
) -> ExpertTime:
    """Time of one MoE layer's experts on one device for every case.

    Parameters
    ----------
    tokens_NE : tokens (selections) of each resident expert, [cases, experts] or [experts].
    hidden, intermediate, gated, top_k : shape of the model's experts; gated experts have a third matrix.
    tokens_N : distinct tokens that enter the layer on this device; default sum of selections / top_k.
    warm_cache : the same layer ran just before, as in a benchmark's replay, so that weights may still be in the cache.

    Raises InputError on negative or non-finite counts and impossible sizes. Source: fitted against AIConfigurator
    0.12.0 kernel tables (Apache-2.0), see the profiles. Cost O(N*E).
    """
    counts_NE = np.atleast_2d(np.asarray(tokens_NE, np.float64))
    if counts_NE.ndim != 2 or counts_NE.shape[1] == 0 or not np.isfinite(counts_NE).all() or (counts_NE < 0).any():
        raise InputError(f"tokens_NE of shape {np.shape(tokens_NE)} must be [cases, experts] with finite counts >= 0; check the trace's loads")
    if min(hidden, intermediate, top_k) < 1:
        raise InputError(f"hidden={hidden}, intermediate={intermediate}, top_k={top_k} must be >= 1; check the model spec")
    shape = ExpertShape(hidden=hidden, intermediate=intermediate, gates=2 if gated else 1, top_k=top_k)
    load = tile_load(counts_NE, kernel, top_k=top_k, intermediate=intermediate, tokens_N=tokens_N)
    return layer_time(load, shape, peak, kernel, warm_cache=warm_cache)


def tile_load(counts_NE: Floats, kernel: ExpertKernel, *, top_k: ArrayLike, intermediate: ArrayLike, tokens_N: ArrayLike | None = None) -> TileLoad:
    """Reduce tokens per expert [N, E] to tiles: everything of the time that does not depend on fitted parameters."""
    selections_N = counts_NE.sum(axis=1)
    layer_N = selections_N / np.asarray(top_k) if tokens_N is None else np.broadcast_to(np.asarray(tokens_N, np.float64), selections_N.shape)
    experts_N = np.full(len(counts_NE), float(counts_NE.shape[1]))
    rows_N, columns_N, group_N, stalls_N = _tiles(kernel, np.asarray(intermediate), layer_N, selections_N, experts_N)
    rows_N1 = rows_N[:, None]
    tiles_NE = np.ceil(counts_NE / rows_N1)
    walks_NE = np.ceil(tiles_NE / group_N[:, None]) if (group_N > 1).any() else tiles_NE
    active_NE = (counts_NE > 0).astype(np.float64)

    def per_launch(values_NE: Floats) -> Floats:
        return values_NE if kernel.style == "loop" else values_NE.sum(axis=1, keepdims=True)

    return TileLoad(
        tokens_N=layer_N,
        experts_N=experts_N,
        rows_N1=rows_N1,
        columns_N1=columns_N[:, None],
        stalls_N1=stalls_N[:, None],
        active_NX=per_launch(active_NE),
        several_NX=per_launch((counts_NE > 1).astype(np.float64)) if kernel.repack else np.zeros((len(tiles_NE), 1)),
        selections_NX=per_launch(counts_NE),
        tiles_NX=per_launch(tiles_NE),
        walks_NX=per_launch(walks_NE),
    )


def _tiles(
    kernel: ExpertKernel, intermediate: NDArray[Any], tokens_N: Floats, selections_N: Floats, experts_N: Floats
) -> tuple[Floats, Floats, Floats, Bools]:
    """Rows and columns of each case's tiles, tiles that walk together, and whether their loads are short."""
    rules = (
        (kernel.by_tokens, tokens_N),
        (kernel.by_tokens_per_expert, tokens_N / experts_N),
        (kernel.by_selections_per_expert, selections_N / experts_N),
    )
    steps, quantity_N = next(((steps, quantity) for steps, quantity in rules if steps), ((), tokens_N))
    at_N = np.searchsorted(np.asarray(steps, np.float64), quantity_N)
    rows_N = np.asarray(kernel.tile_rows, np.float64)[at_N]
    group_N = np.asarray(kernel.tile_groups, np.float64)[np.searchsorted(kernel.groups_by_tokens_per_expert, tokens_N / experts_N)]
    columns_N = np.full(rows_N.shape, float(kernel.tile_columns))
    stalls_N = at_N > 0
    tuned_N = np.zeros(rows_N.shape, bool)
    for experts, width in zip(kernel.tuned[::2], kernel.tuned[1::2], strict=True):
        tuned_N |= (experts_N == experts) & (intermediate == width)
    if tuned_N.any():
        tuned_at_N = np.searchsorted(_TUNED_STEPS, selections_N / experts_N)
        rows_N = np.where(tuned_N, np.asarray(_TUNED_ROWS)[tuned_at_N], rows_N)
        columns_N = np.where(tuned_N, np.asarray(_TUNED_COLUMNS)[tuned_at_N], columns_N)
        group_N, stalls_N = np.where(tuned_N, _TUNED_GROUP, group_N), stalls_N & ~tuned_N
    return rows_N, columns_N, group_N, stalls_N


def layer_time(load: TileLoad, shape: ExpertShape, peak: ComputePeak, kernel: ExpertKernel, *, warm_cache: bool) -> ExpertTime:
    """Time of reduced loads (`tile_load`); formula in the module docstring. Sizes of `shape` broadcast over the cases."""
    weight_B = WEIGHT_B[kernel.dtype]
    hidden_N1, intermediate_N1, gates_N1 = (np.asarray(size, np.float64).reshape(-1, 1) for size in (shape.hidden, shape.intermediate, shape.gates))
    cached_B = kernel.reread_cache * peak.cache_B
    first_N1: Floats | float = 1.0
    if warm_cache:
        expert_B_N1 = (gates_N1 + 1) * hidden_N1 * intermediate_N1 * weight_B
        first_N1 = _miss(load.active_NX.sum(axis=1, keepdims=True) * expert_B_N1, peak.cache_B)
    padded_NX = load.tiles_NX * load.rows_N1
    empty_NX = np.maximum(padded_NX - load.selections_NX, 0)
    width_N1 = (load.columns_N1 + _LOAD_COLUMNS) / (load.columns_N1 * (1 + _LOAD_COLUMNS / 128))
    work_NX = (padded_NX - kernel.masked_rows * empty_NX) * width_N1 + load.tiles_NX * kernel.tile_overhead
    if kernel.partial_tile:
        hollow_NX = np.sqrt(load.tiles_NX * empty_NX / load.rows_N1)
        work_NX += kernel.partial_tile * hollow_NX * (load.rows_N1 * width_N1 + kernel.tile_overhead)
    speed_Bps_N1 = peak.memory_Bps * kernel.memory_efficiency / (1 + kernel.load_stall * load.stalls_N1)
    launches_NX = np.minimum(load.active_NX, 1.0)
    weights_NX = np.zeros(load.tiles_NX.shape)
    compute_NX = np.zeros(load.tiles_NX.shape)
    products_NX = np.zeros(load.tiles_NX.shape)
    for cols_N1, depth_N1 in ((gates_N1 * intermediate_N1, hidden_N1), (hidden_N1, intermediate_N1)):
        matrix_B_N1 = cols_N1 * depth_N1 * weight_B
        again_N1 = kernel.reread * _miss(matrix_B_N1, cached_B)
        passes_NX = load.active_NX * first_N1 + (load.walks_NX - load.active_NX) * again_N1 + load.several_NX * kernel.repack
        memory_NX = passes_NX * matrix_B_N1 / speed_Bps_N1
        idle_NX = peak.units / (load.tiles_NX * cols_N1 / load.columns_N1 + peak.units)
        flops_NX = 2 * work_NX * cols_N1 * depth_N1 / (peak.flops * kernel.flops_efficiency) * (1 + kernel.wave_tail * idle_NX)
        weights_NX += memory_NX
        compute_NX += flops_NX
        products_NX += _soft_maximum(memory_NX, flops_NX, kernel.overlap)
    # bf16 rows in and out of both products; a permuted copy before and after costs each selection two more reads and writes
    moved_N1 = 2.0 * (2 * hidden_N1 + (gates_N1 + 1) * intermediate_N1 + (0 if kernel.style == "fused" else 4 * hidden_N1))
    activations_NX = load.selections_NX * moved_N1 / (peak.memory_Bps * kernel.activation_efficiency)
    launches_N = launches_NX.sum(axis=1)
    if kernel.style == "loop":
        launches_N = launches_N + _LOOP_LAUNCHES * (launches_N > 0)
    launch_N = kernel.launch_s * launches_N + kernel.token_s * load.tokens_N
    return ExpertTime(
        time_s_N=launch_N + (products_NX + activations_NX).sum(axis=1),
        extrapolated_N=_outside(load, shape, kernel.valid),
        launch_s_N=launch_N,
        weights_s_N=weights_NX.sum(axis=1),
        compute_s_N=compute_NX.sum(axis=1),
        activations_s_N=activations_NX.sum(axis=1),
    )


def _miss(reused_B: Floats, cached_B: float) -> Floats:
    """Share of `reused_B` bytes that a cache has dropped before they are walked over again."""
    return 1 / (1 + (cached_B / np.maximum(reused_B, 1.0)) ** _MISS_SHARPNESS)


def _soft_maximum(left: Floats, right: Floats, power: float) -> Floats:
    high = np.maximum(left, right)
    low = np.minimum(left, right)
    ratio = np.divide(low, high, out=np.zeros_like(high), where=high > 0)
    return np.asarray(high * (1 + ratio**power) ** (1 / power))


def _outside(load: TileLoad, shape: ExpertShape, valid: Mapping[str, tuple[float, float]]) -> Bools:
    values = {
        "tokens": load.tokens_N,
        "experts": load.experts_N,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "top_k": shape.top_k,
    }
    outside_N = np.zeros(load.tokens_N.shape, bool)
    for name, (least, most) in valid.items():
        outside_N |= (np.asarray(values[name]) < least) | (np.asarray(values[name]) > most)
    return outside_N & (load.tokens_N > 0)
