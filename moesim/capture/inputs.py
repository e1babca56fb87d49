"""What the module that runs the layers is called with: batch, length, cache and masks, by parameter name."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = ("input_ids", "tokens", "decoder_input_ids")
_HIDDEN = ("inputs_embeds", "hidden_states", "decoder_inputs_embeds")
_BOUNDS = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q")


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the forward parameters, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def forward_inputs(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], *, sequence_first: bool
) -> tuple[int, int, int, dict[str, Tensor]]:
    """(B, S, past, tensors) of one call; `tensors` has those of token_id, mask, position, bounds and past that are known.

    A cache that counts on the device gives `past` as a tensor, to be read later without a synchronisation; the number
    is then 1 for a single token and 0 otherwise. Raises nothing: a call without any tensor is (0, 0, 0, {}).
    """
    given = dict(zip(names, args, strict=False)) | kwargs if args else kwargs
    cache = given.get("past_key_values")
    named = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    tokens = _first(named, _TOKENS)
    if tokens is not None and len(named) == 1 and cache is None and tokens.ndim == 2:  # most training
        return tokens.shape[0], tokens.shape[1], 0, {"token_id": tokens}
    hidden = _first(named, _HIDDEN)
    if tokens is None and hidden is None:
        lead = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if lead is None:
            return 0, 0, 0, {}
        tokens, hidden = (None, lead) if lead.is_floating_point() else (lead, None)
    tensors: dict[str, Tensor] = {}
    if tokens is not None:
        batch, length = (1, tokens.shape[0]) if tokens.ndim == 1 else (tokens.shape[0], tokens.shape[1])
        tensors["token_id"] = tokens
    else:
        assert hidden is not None
        batch, length = (1, hidden.shape[0]) if hidden.ndim == 2 else (hidden.shape[0], hidden.shape[1])
        if sequence_first and hidden.ndim == 3:
            batch, length = length, batch
    if not sequence_first and (mask := _mask(named.get("attention_mask"))) is not None:
        tensors["mask"] = mask
    if (position := _first(named, ("position_ids", "positions"))) is not None and position.shape[-1] == length:
        tensors["position"] = position
    if (bounds := _first(named, _BOUNDS)) is not None:
        tensors["bounds"] = bounds
    past: Any = 0
    if cache is not None and hasattr(cache, "get_seq_length"):
        try:
            past = cache.get_seq_length()
        except ValueError:  # a cache of recurrent states does not count
            past = int(length == 1)
        if isinstance(past, Tensor):
            tensors["past"], past = past, int(length == 1)
    return batch, length, past, tensors


def _first(named: dict[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    for name in names:
        if name in named:
            return named[name]
    return None


def _mask(mask: Tensor | None) -> Tensor | None:
    """Non-zero where a token counts, [B, ≥S]. Of a 4-D mask (true, or 0 added to the logits): tokens that anyone attends to."""
    if mask is None:
        return None
    if mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > -1
        return seen.any(dim=1).any(dim=1)
    return mask if mask.ndim == 2 else None
