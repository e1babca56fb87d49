"""Capture under real conditions: checkpointing, accumulation, compile, packing, mode switches, sampling, failures."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from capture_scripts.families import tiny_model
from capture_scripts.tiny import TinyMoE, adapt, tiny_spec, tokens
from torch import nn

import moesim.capture
from moesim import load_trace
from moesim.capture import capture, routers
from moesim.errors import CaptureError, OutputExists


@pytest.fixture(autouse=True)
def strange_gate_is_known() -> Any:
    adapt()
    yield
    routers._REGISTERED.clear()


def columns(path: Path, *names: str) -> list[tuple[Any, ...]]:
    """Rows of a trace, padding and all, as written."""
    tables = [pq.read_table(part, columns=list(names)) for part in sorted(path.glob("part-*.parquet"))]
    return [row for table in tables for row in zip(*(table[name].to_pylist() for name in names), strict=True)]


def routing(model: TinyMoE, batch: torch.Tensor) -> np.ndarray:
    """[T, L, K] by hand, without hooks."""
    with torch.no_grad():
        hidden, chosen = model.embed(batch), []
        for layer in model.layers:
            chosen.append(layer.gate(hidden)["chosen"].flatten(0, 1))
            hidden = layer(hidden)
    return torch.stack(chosen, 1).numpy()


@pytest.fixture
def dynamo() -> Any:
    """No compiled code before, none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- counting right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputed_layers_count_once(reentrant: bool | None, tmp_path: Path) -> None:
    model = TinyMoE(reentrant=reentrant)
    model.embed.weight.requires_grad_()
    expected = routing(model, tokens(0))
    with capture(model, tmp_path / "t", model_spec=tiny_spec()) as recorder:
        model(tokens(0)).sum().backward()
    np.testing.assert_array_equal(load_trace(tmp_path / "t").experts(), expected)
    assert recorder.recomputed == (0 if reentrant is None else 3)


def test_a_checkpoint_around_the_whole_model_counts_once(tmp_path: Path) -> None:
    model = TinyMoE()
    with capture(model, tmp_path / "t", model_spec=tiny_spec()) as recorder:
        torch.utils.checkpoint.checkpoint(model, tokens(0), use_reentrant=False).sum().backward()
    assert recorder.tokens == tokens(0).numel() == load_trace(tmp_path / "t").tokens


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_transformers_counts_once(reentrant: bool, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with capture(model, tmp_path / "t") as recorder:
        model(input_ids=tokens(0), labels=tokens(0), use_cache=False).loss.backward()
    assert recorder.recomputed == 2
    assert load_trace(tmp_path / "t").tokens == tokens(0).numel()


def test_forward_passes_between_optimizer_steps_are_microbatches(tmp_path: Path) -> None:
    model = TinyMoE()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with capture(model, tmp_path / "t", model_spec=tiny_spec()):
        for _ in range(2):
            for _ in range(3):
                model(tokens(0, 1, 2)).sum().backward()
            optimizer.step()
    assert columns(tmp_path / "t", "step", "microbatch") == [(s, m) for s in range(2) for m in range(3) for _ in range(2)]


def test_a_loop_that_says_its_steps_is_believed(tmp_path: Path) -> None:
    model = TinyMoE()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with capture(model, tmp_path / "t", model_spec=tiny_spec()) as recorder:
        for i in (100, 107):
            for j, domain in enumerate(("code", ("prose", "law"))):
                recorder.step(i, microbatch=j, domain=domain)
                model(tokens(0, 2, 1)).sum().backward()
            optimizer.step()
    assert columns(tmp_path / "t", "step", "microbatch", "domain") == [
        (i, j, domain) for i in (100, 107) for j, pair in enumerate((("code", "code"), ("prose", "law"))) for domain in pair
    ]


def test_modes_become_phases_and_generation_continues_its_prompt(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    with capture(model, tmp_path / "t"):
        model.train()
        model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
        model.eval()
        text = model.generate(tokens(1), attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    trace = load_trace(tmp_path / "t")
    assert {p: trace.select(phase=p).tokens for p in ("train", "prefill", "decode")} == {"train": 16, "prefill": 13, "decode": 6}
    # routing of a generated text is that of one pass over the whole text
    names = ["sequence", "position", "token_id"]
    parts = list(trace.select(phase=("prefill", "decode")).batches(columns=names))
    order = np.lexsort([np.concatenate([p.columns[n] for p in parts]) for n in ("position", "sequence")])
    experts = np.concatenate([p.experts_TLK for p in parts])[order]
    whole = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        position = (whole.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=text[:, :-1], attention_mask=whole, position_ids=position, output_router_logits=True).router_logits
    expected = torch.stack([x.softmax(-1).topk(3, dim=-1).indices for x in logits], 1)[whole.flatten().bool()]
    np.testing.assert_array_equal(np.sort(experts), np.sort(expected.numpy()))
    assert np.concatenate([p.columns["token_id"] for p in parts])[order].tolist() == text[:, :-1][whole.bool()].tolist()


def test_a_static_cache_counts_positions_too(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    with capture(model, tmp_path / "t"):
        model.generate(tokens(1), max_new_tokens=3, min_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True)
    rows = columns(tmp_path / "t", "phase", "sequence", "position")
    assert rows[:16] == [("prefill", s, p) for s in range(2) for p in range(8)]
    assert rows[16:] == [("decode", s, p) for p in (8, 9) for s in range(2)]


def test_packed_sequences_of_transformers_are_told_apart(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe").train()
    position = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    with capture(model, tmp_path / "t"):
        model(input_ids=tokens(0, 1), position_ids=position)
    assert columns(tmp_path / "t", "sequence", "position") == list(zip([0, 0, 0, 1, 1, 2, 2, 2], position[0].tolist(), strict=True))


@pytest.mark.parametrize("mask", [torch.tensor([[0, 1, 1, 1]]), torch.tensor([[[[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]]]).bool()])
def test_padding_is_written_and_marked(mask: torch.Tensor, tmp_path: Path) -> None:
    model = TinyMoE()
    with capture(model, tmp_path / "t", model_spec=tiny_spec()):
        model(tokens(0, 1, 4), attention_mask=mask)
    assert columns(tmp_path / "t", "valid") == [(False,), (True,), (True,), (True,)]
    assert load_trace(tmp_path / "t").tokens == 3


def test_sampling_takes_whole_steps_and_stops_at_the_budget(tmp_path: Path) -> None:
    model = TinyMoE()
    for path, options in (("n", {"every": 3}), ("t", {"max_tokens": 20})):
        with capture(model, tmp_path / path, model_spec=tiny_spec(), **options) as recorder:
            for i in range(7):
                recorder.step(i)
                model(tokens(i, 1, 8))
    assert [step for (step,) in columns(tmp_path / "n", "step")] == [0] * 8 + [3] * 8 + [6] * 8
    assert [step for (step,) in columns(tmp_path / "t", "step")] == [0] * 8 + [1] * 8 + [2] * 8


# --- compile ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch.compile itself warns of deprecations
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("how", "reentrant"), [("wrapped", None), ("wrapped", False), ("in place", None), ("layers", None)])
def test_hooks_placed_before_compilation_record_every_layer(how: str, reentrant: bool | None, tmp_path: Path) -> None:
    model: Any = TinyMoE(2, reentrant=reentrant)
    inputs = [tokens(i, 2, length) for i, length in enumerate((8, 5 if how == "layers" else 8))]
    expected = np.concatenate([routing(model, x) for x in inputs])
    with capture(model, tmp_path / "t", model_spec=tiny_spec(2)) as recorder:
        if how == "wrapped":
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        else:
            run = model
            for module in [model] if how == "in place" else model.layers:
                module.compile(backend="aot_eager", fullgraph=True)
        for i, x in enumerate(inputs):
            recorder.step(i)
            run(x).sum().backward()
    np.testing.assert_array_equal(load_trace(tmp_path / "t").experts(), expected)
    assert [step for (step,) in columns(tmp_path / "t", "step")] == [step for step, x in enumerate(inputs) for _ in range(x.numel())]
    run(inputs[0])  # the compiled code outlives the recorder and must not mind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_transformers_model_is_captured(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_hidden_layers=2)
    with capture(model, tmp_path / "t", logits=True), torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens(0))
    with torch.no_grad():
        logits = torch.stack(model(input_ids=tokens(0), output_router_logits=True).router_logits, 1)
    (batch,) = load_trace(tmp_path / "t").batches(logits=True)
    np.testing.assert_array_equal(batch.experts_TLK, logits.softmax(-1).topk(2, dim=-1).indices.numpy())
    np.testing.assert_allclose(batch.logits_TLE, logits.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_late_start_on_compiled_code_is_an_error(in_place: bool, tmp_path: Path) -> None:
    model: Any = TinyMoE()
    if in_place:
        model.compile(backend="eager")
        model(tokens(0))
    else:
        torch.compile(model, backend="eager")(tokens(0))
    with pytest.raises(CaptureError, match=r"compiled and called before capture started.*_dynamo.reset"):
        capture(model, tmp_path / "t", model_spec=tiny_spec())
    torch._dynamo.reset()
    with capture(model, tmp_path / "t", model_spec=tiny_spec()) as recorder:
        model(tokens(0))
    assert recorder.tokens == 16


# --- saying no -------------------------------------------------------------------------------------------------------


def test_a_layer_that_goes_round_its_router_is_named(tmp_path: Path) -> None:
    model = TinyMoE()
    model.layers[2].forward = lambda hidden: hidden  # type: ignore[method-assign]
    with (
        pytest.raises(CaptureError, match=r"layer 2 never fired \(layers.2.gate, StrangeGate\)"),
        capture(model, tmp_path / "t", model_spec=tiny_spec()),
    ):
        model(tokens(0))


def test_an_unknown_router_is_named_with_the_call_that_adapts_it(tmp_path: Path) -> None:
    routers._REGISTERED.clear()
    with pytest.raises(CaptureError, match=r"TinyMoE is known; modules that look like one: StrangeGate \(3×\).*register_router\('ClassName'"):
        capture(TinyMoE(), tmp_path / "t", model_spec=tiny_spec())
    assert not (tmp_path / "t").exists()


def test_what_an_adapter_cannot_read_is_said_with_the_routers_name(tmp_path: Path) -> None:
    for read, message in (
        (lambda module, inputs, output: (output["gates"], None), "ids are torch.float32"),
        (lambda module, inputs, output: output[1], "layers.0.gate"),
        (lambda module, inputs, output: (output["chosen"], None), "gives no gate weights"),
        (lambda module, inputs, output: (output["chosen"].tolist(), output["gates"]), "what StrangeGate gave cannot be read"),
        (lambda module, inputs, output: (output["chosen"].repeat(1, 1, 2), output["gates"]), "chose 4 experts.* at most 2"),
    ):
        moesim.capture.register_router("StrangeGate", read)
        model = TinyMoE()
        with pytest.raises(CaptureError, match=message), capture(model, tmp_path / message[:8], model_spec=tiny_spec()):
            model(tokens(0))


def test_a_model_without_config_needs_a_spec_that_fits(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="pass model_spec="):
        capture(TinyMoE(), tmp_path / "t")
    with pytest.raises(CaptureError, match=r"MoE layers \[3\]"):
        capture(TinyMoE(), tmp_path / "t", model_spec=tiny_spec(4))


def test_running_another_model_is_noticed(tmp_path: Path) -> None:
    steps, other = [], TinyMoE()
    with (  # noqa: PT012
        pytest.raises(CaptureError, match="no forward pass was seen"),
        capture(TinyMoE(), tmp_path / "t", model_spec=tiny_spec()) as recorder,
    ):
        for step in range(5):
            recorder.step(step)
            other(tokens(0))
            steps.append(step)
    assert steps == [0, 1]


def test_nothing_run_at_all_is_an_error_at_close(tmp_path: Path) -> None:
    model = TinyMoE()
    with (  # noqa: PT012
        pytest.raises(CaptureError, match=r"Routers were called 3 times outside"),
        capture(model, tmp_path / "t", model_spec=tiny_spec()),
    ):
        hidden = model.embed(tokens(0))
        for layer in model.layers:
            hidden = layer(hidden)


def test_two_runs_are_never_mixed(tmp_path: Path) -> None:
    model = TinyMoE()
    with capture(model, tmp_path / "t", model_spec=tiny_spec()):
        model(tokens(0))
    with pytest.raises(OutputExists, match="not empty"):
        capture(model, tmp_path / "t", model_spec=tiny_spec())


def test_data_parallel_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="DistributedDataParallel"):
        capture(nn.DataParallel(TinyMoE()), tmp_path / "t", model_spec=tiny_spec())


# --- leaving no trace ------------------------------------------------------------------------------------------------


def test_outputs_are_bit_identical_and_nothing_is_held_afterwards(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        before = model(input_ids=tokens(0)).logits
    with capture(model, tmp_path / "t") as recorder, torch.no_grad():
        during = model(input_ids=tokens(0)).logits
    assert torch.equal(before, during)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    alive = weakref.ref(recorder)
    del recorder
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("logits", [False, True])
def test_nothing_of_the_autograd_graph_is_kept(logits: bool, tmp_path: Path) -> None:
    model = TinyMoE()
    with capture(model, tmp_path / "t", model_spec=tiny_spec(), logits=logits) as recorder:
        hidden = model(tokens(0))
        kept = [weakref.ref(hidden)]
        model.layers[1].register_forward_hook(lambda _, inputs, output: kept.append(weakref.ref(output)))
        hidden = model(tokens(0))
        del hidden
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        assert recorder.tokens == 32
