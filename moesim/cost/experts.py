"""Time of one MoE layer's experts on one device, from the tokens of each resident expert.

An expert is two matrix products (gate+up: hidden -> intermediate, down: back). A kernel cuts an expert's
tokens into tiles of some rows; every tile walks over the expert's weights. Per product of `cols` outputs and
`depth` inputs:

    memory  = passes * cols*depth*weight_B * walk / (bandwidth * memory_efficiency)
    compute = walks * (rows + tile_overhead) * 2*cols*depth / (flops * flops_efficiency) * waves
    product = (memory^overlap + compute^overlap)^(1/overlap)
    passes  = active + (tiles - active) * reread * miss    first walk from memory, later ones where the cache missed
    miss    = 1/(1 + (reread_cache*cache_B/matrix_B)^4)    share of the matrix the cache dropped since the last walk
    walk    = 1 + prologue/depth                           a tile's pipeline fills once
    walks   = tiles*walk + partial_tile*hollow
    hollow  = tiles * sqrt(1 - selections/(tiles*rows))    tiles, weighted with their empty rows
    waves   = 1 + wave_tail * units/(blocks + units)       few blocks = tiles*cols/tile_columns leave units idle

The layer adds activation traffic, routing per token and a launch cost; a loop sorts, gathers and combines as well, which
costs its host as much as launching some experts. A cache that still holds the weights of the
last call (`warm_cache`) serves the first walk too. Suffixes: N cases, E resident experts, X launches of a case
(1, or E for style "loop").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import InputError, ProfileError
from moesim.hardware.profile import Fitted

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Style = Literal["loop", "grouped", "fused"]

STYLES = ("loop", "grouped", "fused")
# fp8_block carries one fp32 scale per 128x128 weights, int4 one fp16 scale per 128 weights.
WEIGHT_B = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1 + 4 / 128**2,
    "int8": 1.0,
    "int4": 0.5 + 2 / 128,
    "fp4": 0.5 + 1 / 16,
}
VALID_KEYS = ("tokens", "hidden", "intermediate", "experts", "top_k")
_MISS_SHARPNESS = 4.0
_LOOP_LAUNCHES = 4.0  # of a layer beside its experts'
_MAY_BE_ZERO = frozenset({"launch_s", "token_s", "prologue", "tile_overhead", "wave_tail", "partial_tile", "reread"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputePeak:
    """Datasheet facts of a device at the arithmetic of one dtype: dense FLOP/s, memory, last-level cache, units (SMs, cores)."""

    flops: float
    memory_Bps: float
    cache_B: float
    units: int

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not (math.isfinite(value) and value > 0):
                raise ProfileError(f"ComputePeak.{item.name}={value!r}: must be finite and > 0; correct the device profile")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernel:
    """How one kernel turns peaks into time; the defaults are a typical fused GPU kernel, before any fit.

    Twelve fitted numbers (module docstring; `memory_efficiency`, `activation_efficiency` and `flops_efficiency` are
    shares of the peak, `prologue` is in elements of depth, `tile_overhead` in rows) and three facts of the
    implementation: `tile_rows` with the steps of the rule that picks it, `tile_columns`, and `style`:

    - fused: one launch, rows gathered inside the kernel (vLLM, SGLang, TensorRT-LLM).
    - grouped: one launch per product over all experts, rows permuted in memory before and after (torch grouped_mm).
    - loop: one launch per active expert, nothing shared between experts (CPU, naive loops); permuting and combining
      cost a layer with any token as much as four more.

    `tile_rows[i]` is used while the rule's quantity is <= its i-th step, the last beyond; one rule of: `by_tokens`
    (tokens of the layer), `by_tokens_per_expert` (tokens / experts), `by_selections_per_expert` (tokens*top_k / experts).
    `valid` maps tokens, hidden, intermediate, experts and top_k to the fitted (least, most).
    """

    name: str
    style: Style
    dtype: str
    launch_s: float = 15e-6
    token_s: float = 10e-9
    memory_efficiency: float = 0.9
    activation_efficiency: float = 0.6
    flops_efficiency: float = 0.8
    prologue: float = 60.0
    tile_overhead: float = 80.0
    overlap: float = 3.0
    wave_tail: float = 1.0
    partial_tile: float = 0.0
    reread: float = 0.5
    reread_cache: float = 0.7
    tile_rows: tuple[float, ...] = (64,)
    by_tokens: tuple[float, ...] = ()
    by_tokens_per_expert: tuple[float, ...] = ()
    by_selections_per_expert: tuple[float, ...] = ()
    tile_columns: int = 128
    valid: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"kernel {self.name!r}"
        if self.style not in STYLES or self.dtype not in WEIGHT_B:
            raise ProfileError(f"{where}: style {self.style!r}, dtype {self.dtype!r}; styles are {', '.join(STYLES)}, dtypes {', '.join(WEIGHT_B)}")
        for name in PARAMETERS:
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name in _MAY_BE_ZERO))):
                raise ProfileError(f"{where}: {name}={value!r} must be finite and {'>= 0' if name in _MAY_BE_ZERO else '> 0'}; fit the kernel again")
        if self.overlap < 1 or self.reread > 1:
            raise ProfileError(f"{where}: overlap={self.overlap!r} must be >= 1 and reread={self.reread!r} <= 1; fit the kernel again")
        rules = [steps for steps in (self.by_tokens, self.by_tokens_per_expert, self.by_selections_per_expert) if steps]
        steps = rules[0] if rules else ()
        if (
            len(rules) > 1
            or len(self.tile_rows) != len(steps) + 1
            or list(steps) != sorted(set(steps))
            or min(self.tile_rows) < 1
            or self.tile_columns < 1
        ):
            raise ProfileError(f"{where}: tile_rows={self.tile_rows} with steps {rules}: give at most one rule, rising, one step fewer than rows")
        if unknown := set(self.valid) - set(VALID_KEYS):
            raise ProfileError(f"{where}: valid names {sorted(unknown)}; known are {', '.join(VALID_KEYS)}")

    @classmethod
    def from_profile(cls, fitted: Fitted) -> ExpertKernel:
        """Kernel of a device profile's `[[kernels]]` table; ProfileError names a parameter that is unknown or impossible."""
        known = {*PARAMETERS, *TILING}
        if unknown := sorted(set(fitted.parameters) - known):
            raise ProfileError(f"kernel {fitted.name!r}: unknown parameters {unknown}; known are {', '.join(sorted(known))}")
        if missing := sorted(set(PARAMETERS) - set(fitted.parameters)):
            raise ProfileError(f"kernel {fitted.name!r}: parameters {missing} are missing; fit the kernel again")
        given: dict[str, Any] = {name: float(fitted.parameters[name]) for name in PARAMETERS}
        for name in TILING:
            if name in fitted.parameters:
                value = fitted.parameters[name]
                given[name] = int(value) if name == "tile_columns" else tuple(value)
        return cls(
            name=fitted.name,
            style=fitted.attributes["style"],
            dtype=fitted.attributes["dtype"],
            valid={name: (float(least), float(most)) for name, (least, most) in fitted.valid.items()},
            **given,
        )


PARAMETERS = (
    "launch_s",
    "token_s",
    "memory_efficiency",
    "activation_efficiency",
    "flops_efficiency",
    "prologue",
    "tile_overhead",
    "overlap",
    "wave_tail",
    "partial_tile",
    "reread",
    "reread_cache",
)
TILING = ("tile_rows", "by_tokens", "by_tokens_per_expert", "by_selections_per_expert", "tile_columns")


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
    active_NX: Floats
    selections_NX: Floats
    tiles_NX: Floats


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
    load = tile_load(counts_NE, kernel, top_k=top_k, tokens_N=tokens_N)
    return layer_time(load, shape, peak, kernel, warm_cache=warm_cache)


def tile_load(counts_NE: Floats, kernel: ExpertKernel, *, top_k: ArrayLike, tokens_N: ArrayLike | None = None) -> TileLoad:
    """Reduce tokens per expert to tiles: everything of the time that does not depend on fitted parameters."""
    selections_N = counts_NE.sum(axis=1)
    layer_N = selections_N / np.asarray(top_k) if tokens_N is None else np.broadcast_to(np.asarray(tokens_N, np.float64), selections_N.shape)
    experts_N = np.full(len(counts_NE), float(counts_NE.shape[1]))
    rows_N1 = _tile_rows(kernel, layer_N, selections_N, experts_N)[:, None]
    tiles_NE = np.ceil(counts_NE / rows_N1)
    active_NE = (counts_NE > 0).astype(np.float64)

    def per_launch(values_NE: Floats) -> Floats:
        return values_NE if kernel.style == "loop" else values_NE.sum(axis=1, keepdims=True)

    return TileLoad(
        tokens_N=layer_N,
        experts_N=experts_N,
        rows_N1=rows_N1,
        active_NX=per_launch(active_NE),
        selections_NX=per_launch(counts_NE),
        tiles_NX=per_launch(tiles_NE),
    )


def _tile_rows(kernel: ExpertKernel, tokens_N: Floats, selections_N: Floats, experts_N: Floats) -> Floats:
    rules = (
        (kernel.by_tokens, tokens_N),
        (kernel.by_tokens_per_expert, tokens_N / experts_N),
        (kernel.by_selections_per_expert, selections_N / experts_N),
    )
    steps, quantity_N = next(((steps, quantity) for steps, quantity in rules if steps), ((), tokens_N))
    return np.asarray(kernel.tile_rows, np.float64)[np.searchsorted(np.asarray(steps, np.float64), quantity_N)]


def layer_time(load: TileLoad, shape: ExpertShape, peak: ComputePeak, kernel: ExpertKernel, *, warm_cache: bool) -> ExpertTime:
    """Time of reduced loads (`tile_load`); formula in the module docstring. Sizes of `shape` broadcast over the cases."""
    weight_B = WEIGHT_B[kernel.dtype]
    hidden_N1, intermediate_N1, gates_N1 = (np.asarray(size, np.float64).reshape(-1, 1) for size in (shape.hidden, shape.intermediate, shape.gates))
    cached_B = kernel.reread_cache * peak.cache_B
    first_N1: Floats | float = 1.0
    if warm_cache:
        expert_B_N1 = (gates_N1 + 1) * hidden_N1 * intermediate_N1 * weight_B
        first_N1 = _miss(load.active_NX.sum(axis=1, keepdims=True) * expert_B_N1, peak.cache_B)
    rows_NX = load.tiles_NX * load.rows_N1
    hollow_NX = np.sqrt(load.tiles_NX * np.maximum(rows_NX - load.selections_NX, 0) / load.rows_N1)
    launches_NX = np.minimum(load.active_NX, 1.0)
    weights_NX = np.zeros(load.tiles_NX.shape)
    compute_NX = np.zeros(load.tiles_NX.shape)
    products_NX = np.zeros(load.tiles_NX.shape)
    for cols_N1, depth_N1 in ((gates_N1 * intermediate_N1, hidden_N1), (hidden_N1, intermediate_N1)):
        matrix_B_N1 = cols_N1 * depth_N1 * weight_B
        walk_N1 = 1 + kernel.prologue / depth_N1
        again_N1 = kernel.reread * _miss(matrix_B_N1, cached_B)
        passes_NX = load.active_NX * first_N1 + (load.tiles_NX - load.active_NX) * again_N1
        memory_NX = passes_NX * matrix_B_N1 * walk_N1 / (peak.memory_Bps * kernel.memory_efficiency)
        row_NX = (load.tiles_NX * walk_N1 + kernel.partial_tile * hollow_NX) * (load.rows_N1 + kernel.tile_overhead)
        idle_NX = peak.units / (load.tiles_NX * cols_N1 / kernel.tile_columns + peak.units)
        flops_NX = 2 * row_NX * cols_N1 * depth_N1 / (peak.flops * kernel.flops_efficiency) * (1 + kernel.wave_tail * idle_NX)
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
