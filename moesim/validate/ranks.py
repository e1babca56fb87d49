"""Executes a placement rank by rank on one device: each rank's resident experts and the tokens it really receives.

Computation is executed and measured; the network between ranks is not, and is never summed under the word "measured".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesim.cost import dispatch_table
from moesim.errors import ValidationError
from moesim.plan import Placement
from moesim.trace import NO_EXPERT
from moesim.validate.layer import Backend, ExpertWeights, moe_layer


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """One rank's part of one layer and batch: the distinct tokens it receives and which of its slots serve them.

    received_R are rows of the batch; slots_N, tokens_N (rows of received_R) and gates_N are its N selections.
    """

    plan: int
    layer: int
    rank: int
    experts: tuple[int, ...]  # logical expert of each resident slot
    received_R: Tensor
    slots_N: Tensor
    tokens_N: Tensor
    gates_N: Tensor

    @property
    def counts_P(self) -> NDArray[np.int64]:
        """Tokens of each resident slot: the cost model's input."""
        return np.bincount(self.slots_N.cpu().numpy(), minlength=len(self.experts))


def shares(
    placement: Placement,
    experts_TLK: NDArray[np.uint16],
    gates_TLK: NDArray[np.floating],
    *,
    node_G: NDArray[np.integer],
    plan: int = 0,
    device: str = "cpu",
) -> list[Share]:
    """The shares of all ranks and layers for a batch, by the placement's own dispatch rule."""
    tokens, layers, _ = experts_TLK.shape
    table = dispatch_table(placement, node_G)
    source = np.arange(tokens) * placement.devices // tokens
    row = np.minimum(source, table.start_LGE.shape[1] - 1)[:, None]
    turn = np.arange(tokens)[:, None]
    found = []
    for layer in range(layers):
        ids = experts_TLK[:, layer].astype(np.int64)
        chosen = ids != NO_EXPERT
        safe = np.where(chosen, ids, 0)
        slot = table.slots[table.start_LGE[layer, row, safe] + turn % table.count_LGE[layer, row, safe]]
        home = placement.device_P[slot]
        token = np.broadcast_to(turn, ids.shape)
        first = np.cumsum(placement.slots_G) - placement.slots_G
        for rank in range(placement.devices):
            mine = chosen & (home == rank)
            received, row_in_received = np.unique(token[mine], return_inverse=True)
            found.append(
                Share(
                    plan=plan,
                    layer=layer,
                    rank=rank,
                    experts=tuple(placement.slots_LP[layer, first[rank] : first[rank] + placement.slots_G[rank]].tolist()),
                    slots_N=torch.as_tensor(slot[mine] - first[rank], dtype=torch.int64, device=device),
                    received_R=torch.as_tensor(received, device=device),
                    tokens_N=torch.as_tensor(row_in_received, device=device),
                    gates_N=torch.as_tensor(gates_TLK[:, layer][mine].astype(np.float32), device=device),
                )
            )
    return found


def run(share: Share, hidden_RH: Tensor, weights: ExpertWeights, backend: Backend) -> Tensor:
    """Output of one rank for the tokens it received: [R, H], to be added up over ranks by `same_output`."""
    return moe_layer(hidden_RH, share.slots_N, share.tokens_N, share.gates_N, weights, backend=backend)


def same_output(parts: Sequence[tuple[Share, Tensor]], whole: Tensor, *, tolerance: float = 1e-4) -> float:
    """Largest relative deviation of the ranks' outputs, combined, from the unplaced layer; ValidationError above `tolerance`.

    A wrong map from logical to physical experts corrupts outputs silently in production; here it cannot pass.
    """
    combined = torch.zeros_like(whole)
    for share, part in parts:
        combined.index_add_(0, share.received_R, part)
    deviation = float((combined - whole).abs().max() / whole.abs().max().clamp_min(1e-20))
    if not deviation <= tolerance:
        raise ValidationError(
            f"outputs differ from the unplaced layer by {deviation:.2e} (limit {tolerance:.0e}); the placement moved tokens to wrong experts"
        )
    return deviation


def measure(
    calls: Sequence[Callable[[], object]],
    *,
    repeats: int,
    seed: int = 0,
    device: str = "cpu",
    flush_B: int = 0,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> NDArray[np.float64]:
    """Seconds of each call, [calls, repeats].

    Calls are interleaved in random order, so that drift of clocks or load hits all alike, and warmed up once each.
    `flush_B` bytes are written between calls so that caches hold nobody's weights. On CUDA the time between two events;
    on CPU one thread's processor time, which other programs on the machine do not inflate.
    """
    rng = np.random.default_rng(seed)
    timed = _cuda_seconds if device.startswith("cuda") else _thread_seconds
    scratch = torch.empty(max(flush_B, 8) // 4, dtype=torch.float32, device=device)
    times = np.zeros((len(calls), repeats))
    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        for call in calls:
            call()
        for repeat in range(repeats):
            for index in rng.permutation(len(calls)):
                if flush_B:
                    scratch.add_(1.0)
                times[index, repeat] = timed(calls[index])
            progress((repeat + 1) / repeats, "")
    finally:
        torch.set_num_threads(threads)
    return times


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _thread_seconds(call: Callable[[], object]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin
