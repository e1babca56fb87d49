"""Trains a small, real Mixture-of-Experts language model on the corpus, quickly, on whatever this machine has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEQUENCE = 128


def build_model(*, experts: int = 32, top_k: int = 4, layers: int = 4, hidden: int = 128, intermediate: int = 96, seed: int = 0) -> Any:
    """An untrained Qwen3-MoE causal language model over bytes (transformers `Qwen3MoeForCausalLM`)."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.001,
        output_router_logits=True,
        max_position_embeddings=4 * SEQUENCE,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return Qwen3MoeForCausalLM(config)


def draw(text: NDArray[np.uint8], sequences: int, rng: np.random.Generator) -> Any:
    """[sequences, SEQUENCE] int64 tensor of random windows of a text."""
    import torch

    starts = rng.integers(0, len(text) - SEQUENCE, sequences)
    return torch.from_numpy(np.stack([text[start : start + SEQUENCE] for start in starts]).astype(np.int64))


def train(
    model: Any,
    corpus: Mapping[str, NDArray[np.uint8]],
    *,
    steps: int,
    sequences: int = 4,
    peak_lr: float = 4e-3,
    seed: int = 0,
    device: str = "cpu",
    before: Callable[[int, int, str], None] = lambda step, microbatch, domain: None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train in place; a step is one microbatch of `sequences` windows per domain. Returns the mean loss of each step.

    `before(step, microbatch, domain)` is called before each forward, `progress(step, loss)` after each step.
    """
    import torch

    model.to(device).train()
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm, 0.05 + 0.95 * (steps - step) / (steps - warm + 1)))
    losses = []
    for step in range(steps):
        total = 0.0
        for microbatch, (domain, text) in enumerate(corpus.items()):
            before(step, microbatch, domain)
            tokens = draw(text, sequences, rng).to(device)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / len(corpus)).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total / len(corpus))
        progress(step, losses[-1])
    return losses
