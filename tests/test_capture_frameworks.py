# ruff: noqa: E501
"""Routers of other frameworks: the real ones where they are installed, their contract otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moesim import ModelSpec, load_trace
from moesim.capture import capture
from moesim.trace import NO_EXPERT

EXPERTS, HIDDEN = 8, 16


class Stack(nn.Module):
    """Two layers, each only a router; hands token embeddings on in the order the framework uses."""

    def __init__(self, router: Callable[[], nn.Module], *, sequence_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, HIDDEN)
        self.layers = nn.ModuleList(nn.ModuleDict({"gate": router()}) for _ in range(2))
        self.sequence_first = sequence_first
        self.outputs: list[Any] = []

    def forward(self, tokens: Tensor) -> None:
        hidden = self.embed(tokens)
        hidden = hidden.transpose(0, 1).contiguous() if self.sequence_first else hidden
        self.outputs = [layer["gate"](hidden) for layer in self.layers]


def captured(model: nn.Module, tokens: Tensor, out: Path, top_k: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    spec = ModelSpec(name="stack", layers=2, moe_layers=(0, 1), hidden=HIDDEN, intermediate=16, experts=EXPERTS, top_k=top_k)
    with capture(model, out, model_spec=spec), torch.no_grad():
        model(tokens)
    (batch,) = load_trace(out).batches(weights=True, columns=["token_id", "sequence", "position"])
    assert batch.weights_TLK is not None
    return batch.experts_TLK, batch.weights_TLK.astype(np.float32), batch.columns


def dense(experts_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """Weights as [T, E], so that the order of the choices does not matter."""
    out = np.zeros((len(experts_TK), EXPERTS + 1), np.float32)
    slots = np.where(experts_TK == NO_EXPERT, EXPERTS, experts_TK)
    np.put_along_axis(out, slots, weights_TK, axis=1)
    return out[:, :EXPERTS]


TOKENS = torch.randint(0, 64, (3, 5), generator=torch.Generator().manual_seed(3))


class Linear(nn.Module):
    def __init__(self, top_k: int = 2) -> None:
        super().__init__()
        self.score = nn.Linear(HIDDEN, EXPERTS)
        self.topk = self.k = top_k

    def choice(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = self.score(hidden).softmax(-1)
        weights, ids = probabilities.topk(self.topk, dim=-1)
        return probabilities, weights, ids


def stand_in(module: str, name: str, forward: Callable[[Any, Tensor], Any]) -> type[nn.Module]:
    """A class with the place, the name and the output of a framework's router."""
    return type(name, (Linear,), {"__module__": module, "forward": forward})


def megatron_map(self: Any, hidden: Tensor) -> Any:
    probabilities, _, ids = self.choice(hidden.flatten(0, -2))
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, ids, True)
    chosen[0] = False  # a token dropped by its capacity
    return probabilities * chosen, chosen


def deepspeed_masks(self: Any, hidden: Tensor) -> Any:
    probabilities, weights, ids = self.choice(hidden.flatten(0, -2))
    combine = torch.zeros(*probabilities.shape, 4).scatter(1, ids[..., None].expand(-1, -1, 4), weights[..., None].expand(-1, -1, 4) / 4)
    combine[0] = 0
    return None, combine, combine.bool(), None


def dense_of_choice(self: Any, hidden: Tensor) -> np.ndarray:
    probabilities, weights, ids = (x.flatten(0, -2) for x in self.choice(hidden))
    return torch.zeros_like(probabilities).scatter(1, ids, weights).detach().numpy()


CONTRACTS: dict[str, tuple[type[nn.Module], bool, bool]] = {  # class, sequence first, drops the first row
    "torchtitan": (stand_in("torchtitan.models.common.moe", "TokenChoiceTopKRouter", lambda self, h: (self.choice(h)[1], self.choice(h)[2], None)), False, False),
    "megatron": (stand_in("megatron.core.transformer.moe.router", "TopKRouter", megatron_map), True, True),
    "megatron indices": (stand_in("megatron.core.transformer.moe.router", "TopKRouter", lambda self, h: tuple(x.flatten(0, 1) for x in self.choice(h)[1:])), True, False),
    "deepspeed": (stand_in("deepspeed.moe.sharded_moe", "TopKGate", deepspeed_masks), False, True),
    "megablocks": (stand_in("megablocks.layers.router", "LearnedRouter", lambda self, h: tuple(x.flatten(0, 1) for x in self.choice(h))), False, False),
    "deepseek": (stand_in("transformers_modules.deepseek.modeling", "MoEGate", lambda self, h: (self.choice(h)[2].flatten(0, 1), self.choice(h)[1].flatten(0, 1), None)), False, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_contract_of_a_framework_is_read(name: str, tmp_path: Path) -> None:
    kind, sequence_first, drops = CONTRACTS[name]
    model = Stack(kind, sequence_first=sequence_first)
    experts, weights, columns = captured(model, TOKENS, tmp_path / "t", 2)
    ordered = TOKENS.T if sequence_first else TOKENS
    assert columns["token_id"].tolist() == ordered.flatten().tolist()
    for index, layer in enumerate(model.layers):
        hidden = model.embed(ordered)
        expected = dense_of_choice(layer["gate"], hidden)
        expected[0] *= not drops
        np.testing.assert_allclose(dense(experts[:, index], weights[:, index]), expected, rtol=2e-3, atol=1e-4)
        assert (experts[0, index] == NO_EXPERT).all() == drops


def test_one_choice_squeezed_by_megablocks_is_one_column(tmp_path: Path) -> None:
    kind = stand_in("megablocks.layers.router", "LearnedRouter", lambda self, h: tuple(x.flatten(0, 1).squeeze(-1) for x in self.choice(h)))
    experts, _, _ = captured(Stack(lambda: kind(1)), TOKENS, tmp_path / "t", 1)
    assert experts.shape == (15, 2, 1)


# --- the real thing --------------------------------------------------------------------------------------------------


def real(module: str) -> Any:
    """The module, or a skip with the reason it cannot be used here."""
    pytest.importorskip(module.split(".")[0], reason=f"{module.split('.')[0]} is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        pytest.skip(f"{module} does not import here: {problem}")


@pytest.mark.filterwarnings("ignore")
def test_the_real_router_of_torchtitan(tmp_path: Path) -> None:
    moe, linear = real("torchtitan.models.common.moe"), real("torchtitan.models.common.linear")
    gate = linear.Linear.Config(in_features=HIDDEN, out_features=EXPERTS, bias=False)
    model = Stack(lambda: moe.TokenChoiceTopKRouter.Config(num_experts=EXPERTS, gate=gate, top_k=3, route_norm=True).build())
    with torch.no_grad():
        for layer in model.layers:
            nn.init.normal_(layer["gate"].gate.weight)
    experts, weights, _ = captured(model, TOKENS, tmp_path / "t", 3)
    for index, layer in enumerate(model.layers):
        scores = layer["gate"].gate(model.embed(TOKENS)).sigmoid().flatten(0, 1)
        best, ids = scores.topk(3, dim=-1)
        expected = torch.zeros_like(scores).scatter(1, ids, best / best.sum(-1, keepdim=True)).detach().numpy()
        np.testing.assert_allclose(dense(experts[:, index], weights[:, index]), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_real_gate_of_deepspeed(tmp_path: Path) -> None:
    gate = real("deepspeed.moe.sharded_moe").TopKGate

    class Flat(gate):  # type: ignore[misc,valid-type]
        """DeepSpeed's MOELayer flattens before its gate."""

        def forward(self, hidden: Tensor) -> Any:
            return super().forward(hidden.flatten(0, 1))

    model = Stack(lambda: Flat(HIDDEN, EXPERTS, k=2, eval_capacity_factor=8.0, min_capacity=32, top2_2nd_expert_sampling=False)).eval()
    experts, weights, _ = captured(model, TOKENS, tmp_path / "t", 2)
    for index, layer in enumerate(model.layers):
        scores = layer["gate"].wg(model.embed(TOKENS)).softmax(-1).flatten(0, 1)
        np.testing.assert_array_equal(np.sort(experts[:, index]), np.sort(scores.topk(2, dim=-1).indices.numpy()))
        np.testing.assert_allclose(weights[:, index].sum(-1), 1, rtol=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_the_real_router_of_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router, config = real("megatron.core.transformer.moe.router"), real("megatron.core.transformer.transformer_config")
    groups = real("megatron.core.process_groups_config")
    import torch.distributed as dist

    if not torch.cuda.is_available():  # Megatron moves a weight on the CPU to "the current device"
        monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    # 0.16 looks this name up without defining it where Transformer Engine is not installed
    monkeypatch.setattr(real("megatron.core.transformer.moe.moe_utils"), "te_general_gemm", None, raising=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = dist.group.WORLD
        pg = groups.ProcessGroupCollection(tp=world, cp=world, tp_cp=world, tp_dp_cp=world, ep=world, expt_tp=world)
        values = config.TransformerConfig(
            num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, moe_router_topk=2,
            moe_router_load_balancing_type="none", use_cpu_initialization=True, moe_ffn_hidden_size=16,
        )  # fmt: skip
        model = Stack(lambda: router.TopKRouter(values, pg), sequence_first=True).eval()
        experts, weights, columns = captured(model, TOKENS, tmp_path / "t", 2)
    finally:
        dist.destroy_process_group()
    assert columns["token_id"].tolist() == TOKENS.T.flatten().tolist()
    for index, layer in enumerate(model.layers):
        logits = nn.functional.linear(model.embed(TOKENS.T), layer["gate"].weight, layer["gate"].bias).flatten(0, 1)
        best, ids = logits.topk(2, dim=-1)
        expected = torch.zeros_like(logits).scatter(1, ids, best.softmax(-1)).detach().numpy()
        np.testing.assert_allclose(dense(experts[:, index], weights[:, index]), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_real_trainer_of_lightning(tmp_path: Path) -> None:
    lightning = real("lightning.pytorch")
    from capture_scripts.tiny import TinyMoE, adapt, tiny_spec, tokens

    from moesim.capture import lightning_callback, routers

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = TinyMoE()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    adapt()
    data = torch.utils.data.DataLoader([tokens(i, 1, 4)[0] for i in range(6)], batch_size=1)  # type: ignore[arg-type]
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[lightning_callback(tmp_path / "t", model_spec=tiny_spec())],
    )  # fmt: skip
    trainer.fit(Module(), data)
    routers._REGISTERED.clear()
    steps = [
        pair
        for part in load_trace(tmp_path / "t").batches(columns=["step", "microbatch"])
        for pair in zip(part.columns["step"].tolist(), part.columns["microbatch"].tolist(), strict=True)
    ]
    assert steps == [(s, m) for s in range(3) for m in range(2) for _ in range(4)]
