"""A small MoE in plain torch with a router nobody knows, and its adapter: starts quicker than transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesim import ModelSpec
from moesim.capture.routers import register_router

EXPERTS, TOP_K, HIDDEN, VOCABULARY = 8, 2, 16, 64


class StrangeGate(nn.Module):
    """Returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        scores = self.score(hidden)
        gates, chosen = scores.softmax(-1).topk(TOP_K, dim=-1)
        return {"chosen": chosen, "gates": gates, "scores": scores}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = StrangeGate()
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        decided = self.gate(hidden)
        mixed = torch.einsum("bsh,ehf->bsef", hidden, self.experts)
        index = decided["chosen"].unsqueeze(-1).expand(*decided["chosen"].shape, HIDDEN)
        return hidden + (mixed.gather(2, index) * decided["gates"].unsqueeze(-1)).sum(2)


class TinyMoE(nn.Module):
    def __init__(self, layers: int = 3, *, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.reentrant = reentrant

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **extra: Any) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden) if self.reentrant is None else checkpoint(layer, hidden, use_reentrant=self.reentrant)
        return hidden


def tiny_spec(layers: int = 3) -> ModelSpec:
    return ModelSpec(name="tiny", layers=layers, moe_layers=tuple(range(layers)), hidden=HIDDEN, intermediate=HIDDEN, experts=EXPERTS, top_k=TOP_K)


def read_strange(module: nn.Module, inputs: tuple[Any, ...], output: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return output["chosen"], output["gates"]


def adapt() -> None:
    register_router(StrangeGate, read_strange, logits=lambda module, inputs, output: output["scores"])


def tokens(seed: int, batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
