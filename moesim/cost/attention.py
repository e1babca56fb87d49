"""Time of what surrounds the experts on one device: attention blocks, dense and shared MLPs, gates, the vocabulary.

Every part is one roofline at typical efficiency (nothing here is calibrated; `NOTE` says so in results):

    time = launch + max(flops / (peak * FLOPS_SHARE), bytes / (memory * MEMORY_SHARE)),   0 for no work

Suffixes: N cases; `tokens` and `context` broadcast. A training step is forward and backward: a product of T tokens costs
twice its forward again; attention itself, recomputed in the backward pass, 2.5 times (FlashAttention-2,
arXiv:2307.08691, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.experts import ComputePeak
from moesim.errors import InputError
from moesim.model import Attention, ModelSpec

Floats = NDArray[np.float64]
Mode = Literal["prefill", "decode", "training"]
MODES = ("prefill", "decode", "training")
# Share of the peak that large dense products reach (assumed); of memory bandwidth (AIConfigurator 0.12.0, observed);
# launch of one fused block of kernels (assumed).
FLOPS_SHARE, MEMORY_SHARE, LAUNCH_S = 0.6, 0.8, 15e-6
NOTE = "not calibrated: attention, gate and dense parts are rooflines at 60 % of peak FLOP/s and 80 % of memory bandwidth"
_PRODUCT_PASSES = {"prefill": 1.0, "decode": 1.0, "training": 3.0}
_SCORE_PASSES = {"prefill": 1.0, "decode": 1.0, "training": 3.5}


def roofline_s(flops_N: ArrayLike, moved_B_N: ArrayLike, peak: ComputePeak) -> Floats:
    """Seconds of one fused block of kernels; formula in the module docstring."""
    flops, moved = np.asarray(flops_N, np.float64), np.asarray(moved_B_N, np.float64)
    busy = np.maximum(flops / (peak.flops * FLOPS_SHARE), moved / (peak.memory_Bps * MEMORY_SHARE))
    return np.where((flops > 0) | (moved > 0), LAUNCH_S + busy, 0.0)


def attention_shape(model: ModelSpec) -> Attention:
    """The model's attention, or heads of 128 where its description has none."""
    heads = max(1, model.hidden // 128)
    return model.attention or Attention(heads=heads, kv_heads=heads, head_dim=model.hidden // heads)


def attention_parameters(model: ModelSpec) -> float:
    """Weights of one attention block: query, key, value and output projections, MLA through its ranks.

        MHA, GQA  hidden*d*(heads + 2*kv_heads) + heads*v*hidden
        MLA       query + hidden*(kv_rank + rope) + kv_rank*heads*(d - rope + v) + heads*v*hidden,
                  query = q_rank*(hidden + heads*d), or hidden*heads*d without a rank;  d holds the rope part

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1. DeepSeek-V3: 187.1 M.
    """
    a, hidden = attention_shape(model), model.hidden
    value = a.value_dim or a.head_dim
    if not a.kv_rank:
        return float(hidden * a.head_dim * (a.heads + a.kv_heads) + hidden * value * (a.heads + a.kv_heads))
    query = a.q_rank * (hidden + a.heads * a.head_dim) if a.q_rank else hidden * a.heads * a.head_dim
    up = a.kv_rank * a.heads * (a.head_dim - a.rope_dim + value)
    return float(query + hidden * (a.kv_rank + a.rope_dim) + up + a.heads * value * hidden)


def kv_token_B(model: ModelSpec) -> float:
    """Bytes of key-value cache of one token in one layer: 2*kv_heads*d elements, MLA kv_rank + rope."""
    a = attention_shape(model)
    elements = a.kv_rank + a.rope_dim if a.kv_rank else a.kv_heads * (a.head_dim + (a.value_dim or a.head_dim))
    return elements * model.activation_bits / 8


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTime:
    """Seconds of one attention block: its projections and the attention itself (scores and values)."""

    projections_s_N: Floats
    scores_s_N: Floats

    @property
    def time_s_N(self) -> Floats:
        """Both, one after the other."""
        return self.projections_s_N + self.scores_s_N


def attention_time(model: ModelSpec, *, tokens: ArrayLike, context: ArrayLike, mode: Mode, peak: ComputePeak) -> AttentionTime:
    """Time of one attention block for `tokens` tokens on one device.

    prefill, training: the tokens are whole sequences of `context` tokens, each attends to half of its own (causal).
    decode: every token is the next of a sequence of `context` tokens, whose cache is read; MLA with its up-projections
    absorbed (each head works on the latent: kv_rank + rope for scores, kv_rank for values).

        scores  2 * T * seen * heads * (d + v) FLOP, cache read (decode) or written
        decode bytes  T * context * kv_token

    Shapes: tokens, context broadcast -> N. Raises InputError for negative sizes or an unknown mode.
    Source: DeepSeek-V2 (arXiv:2405.04434); FlashAttention-2 (arXiv:2307.08691).
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    tokens_N, context_N = np.broadcast_arrays(np.asarray(tokens, np.float64), np.asarray(context, np.float64))
    if not ((tokens_N >= 0).all() and (context_N >= 0).all()):
        raise InputError(f"tokens={tokens!r}, context={context!r}: both must be >= 0")
    a = attention_shape(model)
    element_B, parameters = model.activation_bits / 8, attention_parameters(model)
    absorbed = bool(a.kv_rank) and mode == "decode"
    width = 2 * a.kv_rank + a.rope_dim if absorbed else a.head_dim + (a.value_dim or a.head_dim)
    seen_N = context_N if mode == "decode" else context_N / 2
    working_N = tokens_N > 0
    flops_N = 2 * tokens_N * parameters * _PRODUCT_PASSES[mode]
    moved_N = (parameters * model.weight_bits / 8 + 2 * tokens_N * model.hidden * element_B) * _PRODUCT_PASSES[mode]
    score_flops_N = 2 * tokens_N * seen_N * a.heads * width * _SCORE_PASSES[mode]
    rows_N = tokens_N * context_N if mode == "decode" else tokens_N  # cache entries that pass memory
    score_B_N = (rows_N * kv_token_B(model) + tokens_N * a.heads * width * element_B) * _SCORE_PASSES[mode]
    return AttentionTime(
        projections_s_N=roofline_s(flops_N, np.where(working_N, moved_N, 0.0), peak),
        scores_s_N=roofline_s(score_flops_N, np.where(working_N, score_B_N, 0.0), peak),
    )


def product_s(tokens: ArrayLike, parameters: float, *, weight_B: float, mode: Mode, peak: ComputePeak) -> Floats:
    """Seconds of dense products with `parameters` weights of `weight_B` bytes on T tokens: 2*T*parameters FLOP."""
    tokens_N = np.asarray(tokens, np.float64)
    moved_N = np.where(tokens_N > 0, parameters * weight_B, 0.0)
    return roofline_s(2 * tokens_N * parameters * _PRODUCT_PASSES[mode], moved_N * _PRODUCT_PASSES[mode], peak)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseParameters:
    """Weights outside the routed experts: of one layer each, and of the whole model (both vocabularies)."""

    attention: float
    dense_mlp: float
    shared_experts: float
    gate: float
    vocabulary: float

    def whole(self, model: ModelSpec) -> float:
        """All of them: attention in every layer, an MLP in dense ones, gate and shared experts in MoE ones."""
        sparse = len(model.moe_layers)
        return model.layers * self.attention + (model.layers - sparse) * self.dense_mlp + sparse * (self.shared_experts + self.gate) + self.vocabulary


def dense_parameters(model: ModelSpec) -> DenseParameters:
    """What every data-parallel replica holds beside routed experts; norms and biases are left out (below 0.1 %)."""
    matrices = 3 if model.gated else 2
    return DenseParameters(
        attention=attention_parameters(model),
        dense_mlp=float(matrices * model.hidden * model.dense_intermediate),
        shared_experts=float(matrices * model.hidden * model.shared_intermediate),
        gate=float(model.hidden * model.experts),
        vocabulary=2.0 * model.hidden * model.vocabulary,
    )
