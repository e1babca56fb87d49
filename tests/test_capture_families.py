"""Every router family of transformers: what is captured is what the experts were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_scripts.families import FAMILIES, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typer.testing import CliRunner

from moesim import ModelSpec, load_trace
from moesim.capture import capture
from moesim.capture.routers import adapter_for
from moesim.cli import app
from moesim.errors import CaptureError, TraceError
from moesim.trace import NO_EXPERT

pytest.importorskip("transformers")
Decision = tuple[Tensor, Tensor]
TOKENS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def dense_top(logits: Tensor, k: int) -> Decision:
    weights, ids = logits.topk(k, dim=-1)
    return ids, weights


def from_llama4(module: Any, output: Any) -> Decision:
    ids, logits = dense_top(output[1], module.top_k)
    return ids, logits.sigmoid()


def from_jetmoe(module: Any, output: Any) -> Decision:
    ids, logits = dense_top(output[4], module.top_k)
    return ids, logits.softmax(-1)


def from_switch(module: Any, output: Any) -> Decision:
    probabilities = output[2].softmax(-1)
    weights, ids = probabilities.max(-1)
    taken = torch.cumsum(F.one_hot(ids, probabilities.shape[-1]), 1).gather(-1, ids[..., None])
    return ids[..., None].where(taken <= module.expert_capacity, NO_EXPERT), weights[..., None]


def from_nllb(module: Any, output: Any) -> Decision:
    ids, weights = dense_top(output[2].softmax(-1), 2)
    return ids, weights / weights.sum(-1, keepdim=True)


SPECIAL: dict[str, tuple[str, Callable[[Any, Any], Decision]]] = {
    "llama4_text": ("Llama4Router", from_llama4),
    "jetmoe": ("JetMoeTopKGating", from_jetmoe),
    "switch_transformers": ("SwitchTransformersTop1Router", from_switch),
    "nllb-moe": ("NllbMoeTop2Router", from_nllb),
}


def reference(model: nn.Module, kind: str, run: Callable[[], Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decisions per layer in a second pass, read elsewhere than capture reads: at the experts' inputs, or from the logits."""
    found: list[Decision] = []
    handles = []
    for name, module in model.named_modules():
        if kind in SPECIAL and type(module).__name__ == SPECIAL[kind][0]:
            handles.append(module.register_forward_hook(lambda m, _, output: found.append(SPECIAL[kind][1](m, output))))
        elif kind not in SPECIAL and name.endswith(".experts"):
            handles.append(module.register_forward_pre_hook(lambda _, inputs: found.append((inputs[1], inputs[2]))))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return [(ids.flatten(0, -2).numpy(), weights.flatten(0, -2).float().numpy()) for ids, weights in found]


def aligned(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids, axis=-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)


def family(kind: str) -> tuple[nn.Module, dict[str, Tensor], ModelSpec | None]:
    """A tiny model, what it is called with, and its description where its config has none."""
    model = tiny_model(kind)
    inputs: dict[str, Tensor] = {"input_ids": TOKENS}
    spec = None
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS[:, :4]
    if kind == "nllb-moe":
        spec = ModelSpec(name=kind, layers=4, moe_layers=(1, 3), hidden=32, intermediate=32, experts=4, top_k=2)
    return model, inputs, spec


@pytest.mark.parametrize("kind", FAMILIES)
def test_captured_choice_and_weights_are_those_the_experts_got(kind: str, tmp_path: Path) -> None:
    model, inputs, spec = family(kind)
    expected = reference(model, kind, lambda: model(**inputs))
    with capture(model, tmp_path / "t", model_spec=spec) as recorder, torch.no_grad():
        model(**inputs)
    trace = load_trace(tmp_path / "t")
    layers = FAMILIES[kind][1]
    assert trace.model.moe_layers == layers
    assert len(expected) == len(layers)
    assert recorder.tokens == sum(x.numel() for x in inputs.values())
    batches = list(trace.batches(weights=True, columns=["token_id"]))
    experts_TLK, weights_TLK = (np.concatenate([getattr(b, name) for b in batches]) for name in ("experts_TLK", "weights_TLK"))
    begin = 0
    for index, (ids, weights) in enumerate(expected):
        rows = slice(0, len(ids)) if len(inputs) == 1 else slice(begin, begin + len(ids))
        begin += len(ids)
        got = aligned(experts_TLK[rows, index], weights_TLK[rows, index].astype(np.float32))
        want = aligned(ids.astype(np.uint16), weights)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(got[1][got[0] != NO_EXPERT], want[1][want[0] != NO_EXPERT], rtol=2e-3, atol=1e-4)
        other = np.setdiff1d(np.arange(len(experts_TLK)), np.arange(len(experts_TLK))[rows])
        assert (experts_TLK[other, index] == NO_EXPERT).all()  # the other stack's tokens did not pass here
    assert np.concatenate([b.columns["token_id"] for b in batches]).tolist() == torch.cat([x.flatten() for x in inputs.values()]).tolist()


# the choice is the top k of the logits alone: no bias, no groups, no capacity
TOP_OF_LOGITS = {
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "gpt_oss", "granitemoe", "jamba", "hunyuan_v1_moe",
    "llama4_text", "jetmoe",
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "dbrx"])
def test_captured_logits_are_the_routers_input_times_its_matrix(kind: str, tmp_path: Path) -> None:
    model, inputs, spec = family(kind)
    expected: list[np.ndarray] = []

    def multiply(module: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
        matrix = next(parameter for parameter in module.parameters() if parameter.ndim == 2)
        bias = getattr(module, "bias", None)
        expected.append(F.linear(args[0].flatten(0, -2), matrix, bias if isinstance(bias, Tensor) else None).numpy())

    with capture(model, tmp_path / "t", model_spec=spec, logits=True) as recorder, torch.no_grad():
        handles = [router.module.register_forward_hook(multiply) for router in recorder.routers]
        model(**inputs)
    assert handles
    trace = load_trace(tmp_path / "t")
    batches = list(trace.batches(logits=True))
    experts_TLK, logits_TLE = (np.concatenate([getattr(b, name) for b in batches]) for name in ("experts_TLK", "logits_TLE"))
    assert logits_TLE.dtype == np.float16
    assert len(expected) == logits_TLE.shape[1]
    assert logits_TLE.shape[2] == trace.model.experts
    begin = 0
    for index, values in enumerate(expected):
        rows = slice(0, len(values)) if len(inputs) == 1 else slice(begin, begin + len(values))
        begin += len(values)
        np.testing.assert_allclose(logits_TLE[rows, index], values, rtol=1e-3, atol=1e-5)  # half a unit of float16 is 4.9e-4
        assert np.isnan(np.delete(logits_TLE[:, index], rows, axis=0)).all()  # the other stack's tokens did not pass here
        if kind in TOP_OF_LOGITS:
            best = np.argsort(-logits_TLE[rows, index].astype(np.float32))[:, : trace.info.top_k]
            np.testing.assert_array_equal(np.sort(best), np.sort(experts_TLK[rows, index]))


def test_a_router_that_gives_no_logits_is_said_at_the_start(tmp_path: Path) -> None:
    model = tiny_model("dbrx")
    with pytest.raises(CaptureError, match=r"DbrxExperts\) gives no router logits, like 3 of 3 routers; capture with logits=False"):
        capture(model, tmp_path / "t", logits=True)
    assert not (tmp_path / "t").exists()
    with pytest.warns(RuntimeWarning, match="Capturing without logits"):
        recorder = capture(model, tmp_path / "t", logits=True, on_error="warn")
    with recorder, torch.no_grad():
        model(input_ids=TOKENS)
    trace = load_trace(tmp_path / "t")
    assert trace.tokens == TOKENS.numel()
    with pytest.raises(TraceError, match="router logits were not captured"):
        next(trace.batches(logits=True))


def test_probabilities_are_not_taken_for_logits() -> None:
    router = pytest.importorskip("transformers.models.gemma4.modeling_gemma4").Gemma4TextRouter
    adapter = adapter_for(router.__new__(router), None)
    assert adapter is not None
    assert adapter.logits is None


def test_logits_of_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    spec = replace(ModelSpec.from_hf(model.config), experts=9)
    recorder = capture(model, tmp_path / "t", model_spec=spec, logits=True)
    with torch.no_grad():
        model(input_ids=TOKENS)
    with pytest.raises(CaptureError, match="gave logits of 8 experts, the model's description says 9"):
        recorder.close()


def test_the_command_line_stores_logits(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom capture_scripts.families import tiny_model\ntiny_model('mixtral')(input_ids=torch.ones(2, 5, dtype=torch.long))\n"
    )
    done = CliRunner().invoke(app, ["capture", "-o", str(tmp_path / "t"), "--logits", "--", str(script)])
    assert done.exit_code == 0, done.output
    assert "10 tokens, 3 MoE layers x 8 experts; next: moesim inspect" in done.stderr
    (batch,) = load_trace(tmp_path / "t").batches(logits=True)
    assert batch.logits_TLE is not None
    assert batch.logits_TLE.shape == (10, 3, 8)


def test_ids_are_those_recomputed_from_the_logits_in_a_second_pass(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", norm_topk_prob=True)
    with capture(model, tmp_path / "t"), torch.no_grad():
        model(input_ids=TOKENS)
    with torch.no_grad():
        logits = model(input_ids=TOKENS, output_router_logits=True).router_logits
    (batch,) = load_trace(tmp_path / "t").batches(weights=True)
    assert batch.weights_TLK is not None
    for index, layer_logits in enumerate(logits):
        weights, ids = layer_logits.float().softmax(-1).topk(3, dim=-1)
        np.testing.assert_array_equal(batch.experts_TLK[:, index], ids.numpy())
        expected = (weights / weights.sum(-1, keepdim=True)).half().numpy()
        np.testing.assert_allclose(batch.weights_TLK[:, index], expected, rtol=2e-3)


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_the_experts_backend_changes_nothing(backend: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation(backend)
    with capture(model, tmp_path / "t"), torch.no_grad():
        model(input_ids=TOKENS)
    expected = np.stack([ids for ids, _ in reference(model, "qwen3_moe", lambda: model(input_ids=TOKENS))], axis=1)
    np.testing.assert_array_equal(load_trace(tmp_path / "t").experts(), expected)


def test_experts_without_computation_have_ids_behind_the_real_ones(tmp_path: Path) -> None:
    model = tiny_model("longcat_flash")
    with capture(model, tmp_path / "t"), torch.no_grad():
        model(input_ids=TOKENS)
    trace = load_trace(tmp_path / "t")
    assert trace.info.captured_by["zero_experts"] == 3
    assert trace.model.experts == 6 + 3
    assert trace.experts().max() >= 6


def test_a_token_over_capacity_has_no_expert(tmp_path: Path) -> None:
    model = tiny_model("switch_transformers", expert_capacity=1)
    with capture(model, tmp_path / "t"), torch.no_grad():
        model(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :4])
    encoder = load_trace(tmp_path / "t").experts(layers=[1])[: TOKENS.numel(), 0, 0].reshape(TOKENS.shape)
    for row in encoder:
        counts = np.bincount(row[row != NO_EXPERT], minlength=4)
        assert counts.max() == 1
        assert (row == NO_EXPERT).sum() == len(row) - counts.sum() > 0


def test_a_shorter_choice_is_padded_with_none(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    spec = replace(ModelSpec.from_hf(model.config), top_k=5)
    with capture(model, tmp_path / "t", model_spec=spec), torch.no_grad():
        model(input_ids=TOKENS)
    experts = load_trace(tmp_path / "t").experts()
    assert experts.shape[2] == 5
    assert (experts[..., 3:] == NO_EXPERT).all()
    assert (experts[..., :3] < 8).all()
