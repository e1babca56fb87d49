"""Executes a placement rank by rank on one device: each rank's resident experts and the tokens it really receives.

Computation is executed and measured; the network between ranks is not, and is never summed under the word "measured".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesim.cost import dispatch_table
from moesim.errors import ValidationError
from moesim.plan import Placement
from moesim.trace import NO_EXPERT
from moesim.validate.backends import Backend
from moesim.validate.layer import moe_layer, selected_outputs, weighted_sum
from moesim.validate.weights import ExpertWeights


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """One rank's part of one layer and batch: the distinct tokens it receives and which of its slots serve them.

    received_R are rows of the batch; slots_N, tokens_N (rows of received_R) and gates_N are its N selections,
    place_N their places among the batch's (token x K + k).
    """

    plan: int
    layer: int
    rank: int
    experts: tuple[int, ...]  # logical expert of each resident slot
    received_R: Tensor
    slots_N: Tensor
    tokens_N: Tensor
    gates_N: Tensor
    place_N: Tensor

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
                    place_N=torch.as_tensor(np.flatnonzero(mine), device=device),
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
    return check_equal(combined, whole, tolerance=tolerance)


def check_equal(found: Tensor, whole: Tensor, *, tolerance: float, why: str = "the placement moved tokens to wrong experts") -> float:
    """Largest deviation relative to the largest output; ValidationError above `tolerance`, and for outputs that are not numbers."""
    if not bool(torch.isfinite(found).all()):
        raise ValidationError(f"{int((~torch.isfinite(found)).sum())} of {found.numel()} outputs are NaN or infinite; check weights and dtype")
    deviation = float((found.double() - whole.double()).abs().max() / whole.double().abs().max().clamp_min(1e-20)) if found.numel() else 0.0
    if not deviation <= tolerance:
        raise ValidationError(f"outputs differ from the unplaced layer by {deviation:.2e} (limit {tolerance:.0e}); {why}")
    return deviation


def in_order(parts: Sequence[Share], resident: Sequence[ExpertWeights], hidden_TH: Tensor, gates_TK: Tensor, *, backend: Backend = "loop") -> Tensor:
    """One layer's output [T, H] from ranks that each compute their selections, summed at the source in the order of the choice.

    `resident` are the weights of each of `parts`. The sum's order does not depend on the placement, so without replicas
    neither does a single bit of the output (loop back-end).
    """
    busy = [(share, weights) for share, weights in zip(parts, resident, strict=True) if len(share.slots_N)]
    if not busy:
        return torch.zeros_like(hidden_TH)
    rows = [selected_outputs(hidden_TH[share.received_R], share.slots_N, share.tokens_N, weights, backend=backend) for share, weights in busy]
    return weighted_sum(torch.cat(rows), torch.cat([share.place_N for share, _ in busy]), gates_TK, hidden_TH)
