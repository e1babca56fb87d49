"""Capture: what recording costs a training step."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.bench.registry import Measured, bench


@bench
def capture_share_of_training() -> Measured:
    """Share of a training step spent in hooks and the writer thread (Qwen3-MoE, 4 layers x 32 experts, 2,048 tokens), quickest of three runs."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moesim.capture import capture

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        moe_intermediate_size=128, intermediate_size=256, num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(0, 256, (8, 256))
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(3):
            with capture(model, Path(folder) / f"t{attempt}") as recorder:
                for step in range(9):
                    if step == 1:  # the first step loads code
                        hooks_s, writer_s, began = recorder.overhead_s, recorder.writer_s, time.perf_counter()
                    model(input_ids=batch, labels=batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                spent = time.perf_counter() - began
            shares.append((recorder.overhead_s - hooks_s + recorder.writer_s - writer_s) / spent)
    return Measured(value=min(shares), unit="of a training step", peer="the 1 % we allow", peer_value=0.01)
