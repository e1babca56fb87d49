"""The real MoE layer: choose experts, permute tokens to them, two GEMMs per expert, weighted combine. Runs on CPU and CUDA.

How the GEMMs are executed is a back-end of `moesim.validate.backends`. T tokens, N selections, E experts (or slots of a
rank), H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesim.errors import InputError
from moesim.validate.backends import Backend, expert_rows
from moesim.validate.weights import ExpertWeights


def choose(hidden_TH: Tensor, router_EH: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Router: experts_TK int64 with the largest logits, and their gates_TK, softmax over the chosen (they sum to 1).

    Raises InputError when top_k is not within 1..experts.
    """
    experts = len(router_EH)
    if not 1 <= top_k <= experts:
        raise InputError(f"top_k(={top_k}) of {experts} experts: a token chooses between 1 and {experts} distinct experts")
    logits_TE = hidden_TH.float() @ router_EH.float().T
    values_TK, experts_TK = torch.topk(logits_TE, top_k, dim=1)
    return experts_TK, torch.softmax(values_TK, dim=1)


def moe_layer(hidden_TH: Tensor, slots_N: Tensor, tokens_N: Tensor, gates_N: Tensor, weights: ExpertWeights, *, backend: Backend = "loop") -> Tensor:
    """Sum over N selections of gate x expert(token): [T, H], zero for tokens nobody selected.

    slots_N int64   index of the chosen expert in `weights`, tokens_N int64 row of hidden_TH, gates_N its weight.
    A device that holds some of the experts is given the selections of those only; the sum of all devices' outputs is the
    layer's. Half-precision outputs are summed in fp32. Raises ValidationError for a back-end that cannot run here.
    """
    order = torch.argsort(slots_N, stable=True)
    rows = tokens_N[order]
    found = expert_rows(hidden_TH, rows, _counts(slots_N, len(weights.up)), weights, backend)
    out = torch.zeros(hidden_TH.shape, dtype=torch.promote_types(hidden_TH.dtype, torch.float32), device=hidden_TH.device)
    return out.index_add_(0, rows, found.to(out.dtype) * gates_N[order, None].to(out.dtype)).to(hidden_TH.dtype)


def selected_outputs(hidden_TH: Tensor, slots_N: Tensor, tokens_N: Tensor, weights: ExpertWeights, *, backend: Backend = "loop") -> Tensor:
    """Output of each of N selections' expert, [N, H] in the order given, not weighted: what a combine sums in its own order."""
    order = torch.argsort(slots_N, stable=True)
    found = expert_rows(hidden_TH, tokens_N[order], _counts(slots_N, len(weights.up)), weights, backend)
    return torch.empty_like(found).index_copy_(0, order, found)


def slots_layer(hidden_TH: Tensor, slots_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, backend: Backend = "loop") -> Tensor:
    """Output [T, H] summed in the order of the choice k, whichever slots the experts sit in; slots_TK < 0 choose nothing.

    With one slot per expert, moving experts between slots changes no bit of it (loop back-end).
    """
    chosen_N = torch.nonzero(slots_TK.reshape(-1) >= 0).squeeze(1)
    rows = selected_outputs(hidden_TH, slots_TK.reshape(-1)[chosen_N], chosen_N // slots_TK.shape[1], weights, backend=backend)
    return weighted_sum(rows, chosen_N, gates_TK, hidden_TH)


def weighted_sum(rows_NH: Tensor, place_N: Tensor, gates_TK: Tensor, like_TH: Tensor) -> Tensor:
    """[T, H]: rows put at their places (token x K + k), weighted and summed over k in order, in fp32 at least."""
    found = rows_NH.new_zeros(gates_TK.numel(), like_TH.shape[1]).index_copy_(0, place_N, rows_NH)
    wide = torch.promote_types(found.dtype, torch.float32)
    return (found.view(*gates_TK.shape, -1).to(wide) * gates_TK[:, :, None].to(wide)).sum(dim=1).to(like_TH.dtype)


def routed_layer(hidden_TH: Tensor, router_EH: Tensor, top_k: int, weights: ExpertWeights, *, backend: Backend = "loop") -> Tensor:
    """The whole layer: router, top-k, permute, expert GEMMs, combine in the order of the choice. [T, H]."""
    experts_TK, gates_TK = choose(hidden_TH, router_EH, top_k)
    return slots_layer(hidden_TH, experts_TK, gates_TK, weights, backend=backend)


def _counts(slots_N: Tensor, slots: int) -> Tensor:
    """Selections of each slot; bincount would wait for the host."""
    return torch.zeros(slots, dtype=torch.int64, device=slots_N.device).index_add_(0, slots_N, torch.ones_like(slots_N))
