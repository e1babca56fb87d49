"""Models without experts, parts of clusters, and mixes of domains from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cost.attention import kv_token_B
from moesim.errors import InputError, SpecError
from moesim.hardware import load_cluster
from moesim.model import ModelSpec, load_model
from moesim.serving import Arrivals, Deployment, StepLaw, first_devices, serve
from moesim.serving.opening import parse_mix
from moesim.trace import Trace

Run = Callable[..., tuple[int, str, str]]
H100 = load_cluster("h100x8")
# meta-llama/Llama-3.1-8B config.json
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
PROCESS = "poisson:rate=5,span=5s,prompt=100,output==20"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "llama" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA))
    return path


def dense() -> ModelSpec:
    return ModelSpec.from_hf(LLAMA, name="llama", dense=True)


def test_a_model_without_experts_is_read_only_where_it_is_asked_for(config: Path) -> None:
    spec = load_model(config, dense=True)
    assert not spec.moe_layers and spec.experts == spec.top_k == 0 and spec.dense_intermediate == 14336 and spec.gated
    with pytest.raises(SpecError, match="not a MoE model"):
        load_model(config)
    assert load_model("olmoe-1b-7b", dense=True) == load_model("olmoe-1b-7b")
    with pytest.raises(SpecError, match="has no MLP width: not a decoder"):
        ModelSpec.from_hf({key: value for key, value in LLAMA.items() if key != "intermediate_size"}, dense=True)
    assert not ModelSpec.from_hf(LLAMA | {"model_type": "opt"}, dense=True).gated


def test_a_decode_step_reads_every_weight_and_the_cache_once() -> None:
    """Alone, a token's step is bound by memory: weights (one vocabulary is looked up, not read) at 80 % of bandwidth, and launches."""
    model = dense()
    deployment = Deployment(model=model, cluster=first_devices(H100, 1), host_s=0.0)
    law = StepLaw.of(deployment)
    weights_B = 2 * (32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 4096 * 128256)
    step_s = float(law.dense_s_B[0] + law.head_s_B[0])
    assert 1 <= step_s / (weights_B / (0.8 * 3.35e12)) < 1.4
    assert law.context_s == pytest.approx(32 * kv_token_B(model) / (0.8 * 3.35e12), rel=0.1)
    assert not law.compute_s_HMBD.any() and not law.exchange_s_HMBD.any()
    assert not any("expert" in note or "routing" in note for note in law.notes) and any("not calibrated" in note for note in law.notes)
    cache_B = deployment.cache_tokens_per_rank * 32 * kv_token_B(model)
    assert cache_B == pytest.approx(0.9 * 85.9e9 - weights_B - 2 * 4096 * 128256, rel=0.03)


def test_cutting_it_over_devices_divides_work_and_adds_two_sums_a_layer() -> None:
    laws = {n: StepLaw.of(Deployment(model=dense(), cluster=first_devices(H100, n), tp=n, host_s=0.0)) for n in (1, 2, 4)}
    big = int(np.searchsorted(laws[1].grid_B, 8192))
    assert laws[1].dense_s_B[big] > laws[2].dense_s_B[big] > laws[4].dense_s_B[big] > laws[1].dense_s_B[big] / 4
    assert laws[1].pair_s / 4 == pytest.approx(laws[4].pair_s)
    # The first layer has no experts: its MLP's sum is with the dense parts.
    sparse = replace(load_model("deepseek-v2-lite"), layers=2, moe_layers=(1,))
    plain = replace(sparse, dense_intermediate=0)
    two = first_devices(H100, 2)
    with_mlp, without = (StepLaw.of(Deployment(model=each, cluster=two, tp=2, max_batch_tokens=64)) for each in (sparse, plain))
    assert (with_mlp.dense_s_B > without.dense_s_B).all()


@pytest.mark.parametrize("values", [{}, {"tp": 4}, {"tp": 8, "split": True}])
def test_what_needs_experts_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no experts to spread"):
        Deployment(model=dense(), cluster=H100, **values)


def test_more_load_less_bandwidth_and_fewer_devices_take_longer() -> None:
    rng = np.random.default_rng(0)
    rows = Arrivals.of(np.sort(rng.uniform(0, 20, 200)), rng.integers(50, 900, 200), rng.integers(20, 200, 200))

    def mean_s(times: float = 1.0, devices: int = 1, name: str = "h100x8", **values: Any) -> float:
        cluster = first_devices(load_cluster(name), devices)
        found = serve(rows.times(times), Deployment(model=dense(), cluster=cluster, tp=devices, **values))
        return float(found.latency_s_R.mean())

    assert mean_s() < mean_s(2.0) < mean_s(8.0)
    assert mean_s(devices=4) < mean_s(devices=2) < mean_s() < mean_s(name="rtx-pro-6000x2")
    assert mean_s(name="h200x8") < mean_s() < mean_s(name="a100x8") and mean_s(host_s=0.0) < mean_s()
    assert mean_s(8.0, cache_tokens=4096) > mean_s(8.0)


def test_one_device_of_a_cluster_serves_it_from_the_command_line(moesim: Run, config: Path) -> None:
    arguments = ("serve", PROCESS, "--model", config.parent, "--cluster", "rtx-pro-6000x2", "--json")
    code, printed, _ = moesim(*arguments, "--devices", 1, "--cache-tokens", 1000)
    deployment = json.loads(printed)["inputs"]["deployment"]
    assert code == 0 and deployment["devices"] == 1 and deployment["cache_tokens"] == 1000
    code, printed, _ = moesim(*arguments)
    assert code == 0 and json.loads(printed)["inputs"]["deployment"]["tp"] == 2  # ranks of one model share nothing
    code, _, remarks = moesim(*arguments, "--devices", 3)
    assert code == 2 and "has 2 devices, not 3" in remarks


def test_the_mix_of_domains_follows_the_clock_from_the_command_line(moesim: Run, make_trace: Callable[..., Trace]) -> None:
    """Prose takes the first expert always, code the last: who serves them changes with the clock, and so do results."""
    model = replace(load_model("olmoe-1b-7b"), layers=1, moe_layers=(0,))
    ids = np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(64), (400, 1)), axis=1)[:, None, :8], axis=2)
    ids[200:] = np.arange(8)
    trace = make_trace(model, ids, domain=np.where(np.arange(400) < 200, "prose", "code"), sequence=np.arange(400) // 50)
    base = ("serve", PROCESS, "--trace", trace.path, "--devices", 2, "--max-batch-tokens", 64, "--json")
    times = []
    for mix in ((), ("--mix", "0h:prose=1"), ("--mix", "0h:code=1"), ("--mix", "0s:prose=1", "--mix", "2s:code=1")):
        code, printed, _ = moesim(*base, *mix)
        assert code == 0
        times.append(json.loads(printed)["step_parts_s"]["experts"])
    assert len(set(times)) == 4 and min(times[1:3]) < times[3] < max(times[1:3])
    for mix, message in (
        ("9h:code=1", "begins at 0"),
        ("0h:law=1", "no tokens of domain"),
        ("code=1", "no colon"),
        ("0h:code=x", "could not convert"),
    ):
        code, _, remarks = moesim(*base, "--mix", mix)
        assert code == 2 and message in remarks
    assert moesim("serve", PROCESS, "--model", "olmoe-1b-7b", "--mix", "0h:code=1")[0] == 2
    assert parse_mix(["0h:a=b=2,c=1", "90min:c=1"]) == [(0.0, {"a=b": 2.0, "c": 1.0}), (5400.0, {"c": 1.0})]
