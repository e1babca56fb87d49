"""StepLaw: seconds of one step of an instance, tabulated over the tokens in it.

    step = host + max over ranks (dense + cached tokens*context + pairs*pair + head) + experts + exchange

Scheduled ahead, the host's part runs beside the others: the longer of both counts. dense, head, context and pair are the
rooflines of `cost.attention`; head holds the sampling of a token, too. FlashAttention 2 packs the query heads of a group into
a tile only while every sequence has one token: with it, decode tokens fill a tile for each head in steps with prompts.

experts and exchange are those of the cost model for batches drawn from a real trace: for every count of tokens on a grid some
batches of decode tokens and of prompt tokens are routed, layer by layer, under the placement; each layer waits for its
slowest device. A step takes one of the drawn batches by a seeded number, between two grid points by line, between decode and
prompt tokens by their share.

Suffixes: B token counts, D draws, M (0 decode, 1 prompt), H windows of the domain mix, S steps, L layers, G devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost import CostModel, route
from moesim.cost.attention import FLOPS_SHARE, LAUNCH_S, NOTE, attention_shape, attention_time, dense_parameters, product_s
from moesim.cost.collectives import wire_bytes
from moesim.cost.experts import ComputePeak, expert_time_s
from moesim.cost.fitted import intra_curve
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Placement
from moesim.serving.layout import even_placement
from moesim.serving.profiles import MoeProfile
from moesim.serving.routing import Routing
from moesim.sim.dense import gather_s
from moesim.sim.lockstep import CHUNK_COUNTS
from moesim.units import human

Floats = NDArray[np.float64]
DRAWS = 32
_TOKENS_PER_COUNT = 1 << 16  # routed for one count: large batches need fewer draws, and larger ones are scaled from so many
MOST_TOKENS = 1 << 22  # of a step of an instance
APPROXIMATION = (
    "serving: a step takes expert and exchange times of one of {draws} batches per token count, routed layer by layer from the trace; "
    "between counts, and between decode and prompt tokens, by line"
)
# Sampling and bookkeeping of one request in a step; fitted to one vLLM 0.19 run: Qwen3-30B-A3B, data-parallel 2 on two RTX PRO 6000
# (LLMServingSim @5daddb2, MIT). Steps of few requests are too short there for a constant of every step.
SAMPLE_S = 13e-6
# Queries in a tile of FlashAttention 2 over a paged cache (kBlockM of its split-KV kernel), which packs the heads of a group only where
# max_seqlen_q == 1 (its flash_api.cpp: seqlenq_ngroups_swapped); and GPUs on which vLLM is taken to run it: compute capability 8 and 12. The run
# above agrees: with it, every part of the run asks for nearly the same SAMPLE_S, without it parts contradict each other.
TILE = 64
TILED = frozenset({"a100-40", "a100-80", "a40", "rtx-3060", "rtx-4090", "rtx-a5000", "rtx-pro-6000"})
HOST_NOTE = (
    f"host: {{time}} of every step is scheduling (assumed), hidden behind the devices where steps are scheduled ahead; {human(SAMPLE_S, 's')} for "
    "each token sampled were fitted to one vLLM 0.19 run"
)
TILE_NOTE = (
    f"attention: in steps with prompts a decode token fills a tile of {TILE} queries for each head, as FlashAttention 2 on {{devices}} (assumed)"
)


class Instance(Protocol):
    """What a step law needs to know of a `deployment.Deployment`."""

    @property
    def model(self) -> ModelSpec: ...  # noqa: D102
    @property
    def cluster(self) -> Cluster: ...  # noqa: D102
    @property
    def costs(self) -> CostModel: ...  # noqa: D102
    @property
    def experts(self) -> Placement: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def tp(self) -> int: ...  # noqa: D102
    @property
    def max_batch_tokens(self) -> int: ...  # noqa: D102
    @property
    def split(self) -> bool: ...  # noqa: D102
    @property
    def exchange(self) -> str: ...  # noqa: D102
    @property
    def host_s(self) -> float: ...  # noqa: D102
    @property
    def expert_profile(self) -> MoeProfile | None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLaw:
    """Tables of one deployment. grid_B: tokens, from 1, rising; beyond its end nothing is defined.

    dense_s_B, head_s_B    a rank's dense parts for its tokens; the vocabulary for the tokens it samples
    context_s, mixed_s     one cached token read by a decode token, in steps of decode tokens alone and in steps with prompts (all layers)
    pair_s                 one query-key pair of a prompt (all layers)
    compute_s_HMBD         experts: the slowest device of every layer, summed over layers; busy_s_HMBD the mean device
    exchange_s_HMBD        both ways of every layer, for tokens evenly over the ranks
    """

    grid_B: NDArray[np.int64]
    dense_s_B: Floats
    head_s_B: Floats
    fixed_s: float
    context_s: float
    mixed_s: float
    pair_s: float
    compute_s_HMBD: Floats
    busy_s_HMBD: Floats
    exchange_s_HMBD: Floats
    window_H: Floats
    notes: tuple[str, ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def plain(cls, *, step_s: float = 0.0, token_s: float = 0.0, tokens: int = 1 << 20) -> StepLaw:
        """A server whose step takes step_s + tokens*token_s: for queueing theory and for measured services."""
        grid = np.asarray([1, tokens], np.int64)
        none = np.zeros((1, 2, 2, 1))
        return cls(
            grid_B=grid,
            dense_s_B=np.asarray(grid * token_s, np.float64),
            head_s_B=np.zeros(2),
            fixed_s=step_s,
            context_s=0.0,
            mixed_s=0.0,
            pair_s=0.0,
            compute_s_HMBD=none,
            busy_s_HMBD=none,
            exchange_s_HMBD=none,
            window_H=np.zeros(1),
            notes=("plain service law: no hardware is modelled",),
        )

    @classmethod
    def of(cls, deployment: Instance, routing: Routing | None = None, *, seed: int = 0) -> StepLaw:
        """Tables of a deployment under a routing (None: a typical one, said in the notes).

        Raises InputError when the routing is of another model.
        """
        model, cost = deployment.model, deployment.costs
        chosen = routing or Routing.typical(model, seed=seed)
        if chosen.model.digest != model.digest:
            raise InputError(f"routing is of {chosen.model.name!r}, the deployment serves {model.name!r}; give a trace of this model")
        if deployment.width * deployment.max_batch_tokens > MOST_TOKENS:
            raise InputError(
                f"{deployment.width} ranks of max_batch_tokens={deployment.max_batch_tokens} make steps of more than {MOST_TOKENS:,} tokens; lower it"
            )
        grid = token_grid(deployment.width * deployment.max_batch_tokens)
        dense, head, context_s, mixed_s, pair_s = _dense(deployment, grid)
        windows = len(chosen.window_H) if model.moe_layers else 0
        tables = np.zeros((3, len(chosen.window_H), 2, len(grid), DRAWS))
        outside_B = np.zeros(len(grid), bool)
        for h in range(windows):
            for mode in (0, 1):
                tables[:, h, mode], outside = _drawn(deployment, chosen, grid, prompts=bool(mode), window=h, seed=seed)
                outside_B |= outside
        notes = [NOTE, HOST_NOTE.format(time=human(deployment.host_s, "s")), *chosen.notes]
        if mixed_s > context_s:
            tiled = dict.fromkeys(device.name for device in deployment.cluster.devices if device.name in TILED)
            notes.append(TILE_NOTE.format(devices=", ".join(tiled)))
        if model.moe_layers:
            notes.insert(0, APPROXIMATION.format(draws=DRAWS))
        own = deployment.expert_profile.notes if deployment.expert_profile else ()
        notes += [*own, *(note for note in cost.notes if not (own or not model.moe_layers) or "expert kernel" not in note)]
        notes += [*_collective(cost, "all_reduce", grid, deployment.tp)[1], *_uniform_exchange(deployment, grid)[1]]
        if outside_B.any():
            counts = grid[outside_B]
            notes.append(
                f"extrapolated: expert times or exchanges of steps of {counts[0]:,} tokens and more lie outside what was measured "
                f"({len(counts)} of {len(grid)} counts)"
            )
        return cls(
            grid_B=grid,
            dense_s_B=dense,
            head_s_B=head,
            fixed_s=deployment.host_s,
            context_s=context_s,
            mixed_s=mixed_s,
            pair_s=pair_s,
            compute_s_HMBD=tables[0],
            busy_s_HMBD=tables[1],
            exchange_s_HMBD=tables[2],
            window_H=chosen.window_H,
            notes=tuple(notes),
            inputs=(("routing", chosen.digest),),
        )

    def step_s(self, tokens: ArrayLike, *, share: float = 0.0, window: int = 0) -> Floats:
        """Mean seconds of a step of `tokens` tokens on one rank and none elsewhere cached: for looking at the law."""
        table = self.compute_s_HMBD + self.exchange_s_HMBD
        mean_B = ((1 - share) * table[window, 0] + share * table[window, 1]).mean(axis=1)
        return np.asarray(self.fixed_s + np.interp(np.asarray(tokens, np.float64), self.grid_B, self.dense_s_B + mean_B))


def token_grid(most: int) -> NDArray[np.int64]:
    """Counts of tokens from 1 to at least `most`: 1, 2, 3, 4, 6, 8, 12, 16, …"""
    grid = [1, 2]
    while grid[-1] < most:
        grid += [grid[-1] * 3 // 2, grid[-1] * 2]
    return np.asarray(grid, np.int64)


def _dense(deployment: Instance, grid: NDArray[np.int64]) -> tuple[Floats, Floats, float, float, float]:
    """dense_s_B, head_s_B, context_s, mixed_s and pair_s of the slowest device; tensor parallelism divides work, not launches."""
    model, tp = deployment.model, deployment.tp
    weights, shape, sparse = dense_parameters(model), attention_shape(model), len(model.moe_layers)
    found = []
    for name, peak in deployment.costs.peaks.items():

        def shared(time_s: Floats, launches: int = 1) -> Floats:
            return np.where(time_s > 0, launches * LAUNCH_S + (time_s - launches * LAUNCH_S) / tp, 0.0)

        def product(tokens: ArrayLike, parameters: float, peak: ComputePeak = peak) -> Floats:
            if not parameters:
                return np.zeros(np.shape(tokens))
            return shared(product_s(tokens, parameters, weight_B=model.weight_bits / 8, mode="decode", peak=peak))

        block = shared(attention_time(model, tokens=grid, context=0, mode="decode", peak=peak).projections_s_N) + LAUNCH_S
        dense = model.layers * block + (model.layers - sparse) * product(grid, weights.dense_mlp)
        dense += sparse * (product(grid, weights.gate) + product(grid, weights.shared_experts))
        many, long = 4096.0, 65536.0  # where scores are linear
        decode, prompt = (
            float(attention_time(model, tokens=many, context=long, mode=mode, peak=peak).scores_s_N) - LAUNCH_S for mode in ("decode", "prefill")
        )
        per_token = model.layers / tp
        head, context_s = product(grid, weights.vocabulary / 2) + SAMPLE_S * grid, decode / many / long * per_token
        tile_s = 2 * TILE * shape.heads * (shape.head_dim + (shape.value_dim or shape.head_dim)) / (peak.flops * FLOPS_SHARE) * per_token
        mixed_s = max(context_s, tile_s) if name in TILED and not shape.kv_rank else context_s
        found.append((dense, head, context_s, mixed_s, prompt / many / (long / 2) * per_token))
    dense_s, head_s, context_s, mixed_s, pair_s = (np.max(np.asarray(part), axis=0) for part in zip(*found, strict=True))
    sums = 2 * model.layers - sparse  # after attention, and after the MLP of a dense layer
    dense_s = dense_s + sums * _collective(deployment.costs, "all_reduce", grid * deployment.costs.combine_B, tp)[0]
    return dense_s, head_s, float(context_s), float(mixed_s), float(pair_s)


def _collective(cost: CostModel, op: str, size_B_N: ArrayLike, ranks: int) -> tuple[Floats, list[str]]:
    """Seconds of a collective of `ranks` devices, and remarks: NCCL's fitted curve inside a node of NVLink, else bytes through ports."""
    size_N = np.asarray(size_B_N, np.float64)
    if ranks == 1:
        return np.zeros(size_N.shape), []
    curve, notes = intra_curve(cost.cluster, op) if op == "all_reduce" or cost.cluster.nodes == 1 else (None, [])
    if curve is not None:
        return curve.time_s(size_N, ranks=ranks)[0], notes
    if op == "all_reduce":  # a ring inside a node
        moved_N = wire_bytes(op, size_N, ranks)
        return cost.ports.link.time_s(moved_N, messages_N=ranks - 1, largest_N=moved_N, ranks=ranks), []
    return np.vectorize(lambda size_B: gather_s(cost, size_B), otypes=[float])(size_N), []


def _uniform_exchange(deployment: Instance, tokens_N: NDArray[np.int64]) -> tuple[Floats | None, list[str]]:
    """Seconds of the exchange of all layers where it does not depend on who chose what, else None; and remarks.

    One rank: every device has every token, and one sum after the experts remains. Else hidden states of all tokens are
    gathered everywhere, and results are summed back.
    """
    cost, layers = deployment.costs, len(deployment.model.moe_layers)
    if deployment.width == 1:
        time_N, notes = _collective(cost, "all_reduce", tokens_N * cost.combine_B, deployment.tp)
        return layers * time_N, notes
    if not (deployment.split or deployment.exchange == "all-gather"):
        return None, []
    there_N, notes = _collective(cost, "all_gather", tokens_N * cost.dispatch_B, deployment.cluster.size)
    back_N, more = _collective(cost, "reduce_scatter", tokens_N * cost.combine_B, deployment.cluster.size)
    return layers * (there_N + back_N), [*notes, *more]


def _drawn(
    deployment: Instance, routing: Routing, grid: NDArray[np.int64], *, prompts: bool, window: int, seed: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Seconds [3, B, D] of experts (slowest, mean device) and exchange of drawn batches, and which counts were extrapolated.

    Draw d of n tokens begins draw d of more, so that a step grows with its tokens.
    """
    rng = np.random.default_rng([seed, window, int(prompts)])
    streams = [routing.draw(rng, int(min(grid[-1], _TOKENS_PER_COUNT)), prompts=prompts, window=window) for _ in range(DRAWS)]
    found, outside_B = np.zeros((3, len(grid), DRAWS)), np.zeros(len(grid), bool)
    most = max(1, CHUNK_COUNTS // (len(deployment.model.moe_layers) * deployment.cluster.size**2))
    for b, tokens in enumerate(grid.tolist()):
        draws = max(1, min(DRAWS, _TOKENS_PER_COUNT // tokens))
        parts = []
        for begin in range(0, draws, most):
            batches = [stream[:tokens] for stream in streams[begin : min(draws, begin + most)]]
            times, outside = batch_times(deployment, routing.experts_TLK[np.concatenate(batches)], len(batches), tokens=tokens)
            parts.append(times)
            outside_B[b] |= outside
        found[:, b] = np.concatenate(parts, axis=1)[:, np.arange(DRAWS) % draws]
    return found, outside_B


def batch_times(deployment: Instance, experts_TLK: NDArray[np.uint16], batches: int, *, tokens: int | None = None) -> tuple[Floats, bool]:
    """Seconds [3, batches] of the MoE layers of equal batches, one after the other in T: experts (slowest and mean device of each
    layer, summed over layers) and exchange; and whether a time was extrapolated. With `tokens` a batch stands for so many."""
    model, cost, profile = deployment.model, deployment.costs, deployment.expert_profile
    routed = len(experts_TLK) // batches
    tokens = tokens or routed
    placement = even_placement(model, 1) if deployment.split else deployment.experts
    node_G = np.zeros(1, np.int32) if deployment.split else cost.cluster.node_G
    ends_S = routed * np.arange(1, batches + 1)
    traffic = route(experts_TLK, placement, node_G, ends_S=ends_S, tokens_per_step=tokens, selections=cost.way.per_selection)
    if profile is not None:
        parts = np.split(traffic.slot_tokens_SLP, np.cumsum(placement.slots_G)[:-1], axis=2)
        active_SLG = np.stack([(part > 0).sum(axis=2) for part in parts], axis=2)
        compute_SLG, far = profile.time_s(traffic.device_tokens_SLG(placement) / model.top_k, active_SLG)
    elif deployment.split:
        compute_SLG, far = _cut_times(deployment, traffic.slot_tokens_SLP)
    else:
        compute_SLG, far = cost.expert_times(traffic.slot_tokens_SLP, traffic.copies_SLGG.sum(axis=2), placement.slots_G)
    outside = bool(far.any())
    uniform, _ = _uniform_exchange(deployment, np.asarray([tokens]))
    if uniform is not None:
        exchange_S = np.full(batches, uniform[0])
    else:
        ways = [cost.exchange(cost.copies_SLGG(traffic), traffic.node_copies_SLGN, size_B) for size_B in (cost.dispatch_B, cost.combine_B)]
        exchange_S = np.sum([way.time_s_N.sum(axis=1) for way in ways], axis=0)
        outside |= any(bool(way.extrapolated_N.any()) for way in ways)
    return np.stack([compute_SLG.max(axis=2).sum(axis=1), compute_SLG.mean(axis=2).sum(axis=1), exchange_S]), outside


def _cut_times(deployment: Instance, tokens_SLE: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Seconds [S, L, 1], and whether extrapolated, of experts cut over all devices: each computes a slice of every expert."""
    model, cost = deployment.model, deployment.costs
    steps, layers, experts = tokens_SLE.shape
    found = [
        expert_time_s(
            tokens_SLE.reshape(-1, experts),
            hidden=model.hidden,
            intermediate=model.intermediate // deployment.cluster.size,
            gated=model.gated,
            top_k=model.top_k,
            peak=cost.peaks[name],
            kernel=kernel,
        )
        for name, kernel in cost.kernels.items()
    ]
    slowest = np.max([each.time_s_N for each in found], axis=0).reshape(steps, layers, 1)
    return slowest, np.any([each.extrapolated_N for each in found], axis=0).reshape(steps, layers, 1)
