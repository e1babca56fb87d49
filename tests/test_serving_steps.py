"""The law of a step: drawn batches against batches of their own, layouts, measured layers, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.model import ModelSpec, load_model
from moesim.plan import Placement
from moesim.serving import Arrivals, Deployment, Routing, StepLaw, even_placement, first_devices, parse_layout, serve
from moesim.serving.profiles import MoeProfile
from moesim.serving.steps import batch_times, token_grid
from moesim.testing import clustered_routing
from moesim.trace import Trace

H100 = load_cluster("h100x8")
FOUR = first_devices(H100, 4)


def thin(name: str = "olmoe-1b-7b", layers: int = 2) -> ModelSpec:
    """A real model with fewer MoE layers."""
    return replace(load_model(name), layers=layers, moe_layers=tuple(range(layers)))


@pytest.fixture
def skewed(make_trace: Callable[..., Trace]) -> Trace:
    """4,000 tokens of two domains and twenty sequences of a real shape."""
    model = thin()
    ids = clustered_routing(model, 4000)
    where = np.arange(4000)
    return make_trace(model, ids, domain=np.where(where < 2000, "prose", "code"), position=where % 200, sequence=where // 200)


# batches -------------------------------------------------------------------------------------------


def test_tables_predict_batches_that_were_not_drawn(skewed: Trace) -> None:
    """Mean step of fresh batches of 48 decode tokens (between two grid points), and of 700 prompt tokens."""
    routing = Routing.of(skewed)
    deployment = Deployment(model=skewed.model, cluster=FOUR, max_batch_tokens=512)
    law = StepLaw.of(deployment, routing)
    rng = np.random.default_rng(99)
    for tokens, prompts in ((40, False), (700, True)):
        index = np.concatenate([routing.draw(rng, tokens, prompts=prompts, window=0) for _ in range(200)])
        (experts, mean, exchange), _ = batch_times(deployment, routing.experts_TLK[index], 200)
        tables = [
            np.interp(tokens, law.grid_B, table[0, int(prompts)].mean(axis=1)) for table in (law.compute_s_HMBD, law.busy_s_HMBD, law.exchange_s_HMBD)
        ]
        assert tables == pytest.approx([experts.mean(), mean.mean(), exchange.mean()], rel=0.03)
        assert experts.mean() > mean.mean()
    mixed = [np.concatenate([routing.draw(rng, 60, prompts=False, window=0), routing.draw(rng, 260, prompts=True, window=0)]) for _ in range(200)]
    (experts, _, _), _ = batch_times(deployment, routing.experts_TLK[np.concatenate(mixed)], 200)
    by_mode = [np.interp(320, law.grid_B, law.compute_s_HMBD[0, mode].mean(axis=1)) for mode in (0, 1)]
    assert (60 * by_mode[0] + 260 * by_mode[1]) / 320 == pytest.approx(experts.mean(), rel=0.03)


def test_a_steps_times_come_from_the_placement_of_its_experts(skewed: Trace) -> None:
    """Hot experts together on one device make every step longer; the mean device does not change as much."""
    model = skewed.model
    order = np.argsort(-np.bincount(skewed.experts()[:, 0].ravel(), minlength=model.experts))
    hot = Placement(slots_LP=np.tile(order, (2, 1)), slots_G=np.full(4, 16), experts=64, layers=model.moe_layers)
    spread = Placement(slots_LP=np.tile(order.reshape(16, 4).T.ravel(), (2, 1)), slots_G=np.full(4, 16), experts=64, layers=model.moe_layers)
    rows = Arrivals.of(np.zeros(64), np.full(64, 300), np.full(64, 20))
    together, apart = (serve(rows, Deployment(model=model, cluster=FOUR, placement=placement), routing=skewed) for placement in (hot, spread))
    assert together.step_parts_s["experts"] > 1.05 * apart.step_parts_s["experts"]
    assert together.end_s > apart.end_s


def test_draws_are_nested_so_that_more_tokens_take_no_less(skewed: Trace) -> None:
    law = StepLaw.of(Deployment(model=skewed.model, cluster=FOUR, max_batch_tokens=256), Routing.of(skewed))
    small = law.grid_B <= 256
    assert (np.diff(law.compute_s_HMBD[0, 0][small], axis=0) >= -1e-9).mean() > 0.99
    assert (np.diff(law.step_s(law.grid_B)) > -1e-9).all()


def test_the_mix_of_domains_follows_the_clock(skewed: Trace) -> None:
    mix = [(0.0, {"prose": 1.0}), (1.0, {"code": 1.0}), (2.0, {"code": 1.0, "prose": 3.0})]
    routing = Routing.of(skewed, mix=mix)
    rng = np.random.default_rng(0)
    names = [np.asarray(routing.domains)[routing.domain_T[routing.draw(rng, 4000, prompts=False, window=h)]] for h in range(3)]
    assert set(names[0]) == {"prose"} and set(names[1]) == {"code"}
    assert (names[2] == "prose").mean() == pytest.approx(0.75, abs=0.03)
    deployment = Deployment(model=skewed.model, cluster=FOUR, max_batch_tokens=64)
    law = StepLaw.of(deployment, routing)
    assert law.window_H.tolist() == [0, 1, 2] and not np.array_equal(law.compute_s_HMBD[0], law.compute_s_HMBD[1])
    assert serve(Arrivals.of([0.0, 2.5], [10, 10], [5, 5]), deployment, routing=routing).steps == 10
    for bad in ([(1.0, {"code": 1.0})], [(0.0, {"law": 1.0})], [(0.0, {"code": 0.0})], [(0.0, {"code": -1.0})]):
        with pytest.raises(InputError, match="mix"):
            Routing.of(skewed, mix=bad)


@given(tokens=st.integers(1, 900), prompts=st.booleans(), seed=st.integers(0, 99))
def test_batches_are_whole_runs_of_sequences(tokens: int, prompts: bool, seed: int) -> None:
    routing = Routing.typical(thin(), tokens=2048)
    index = routing.draw(np.random.default_rng(seed), tokens, prompts=prompts, window=0)
    assert len(index) == tokens and index.min() >= 0 and index.max() < 2048
    if prompts:
        runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
        assert all(len(set(routing.sequence_T[run].tolist())) == 1 or len(runs) < 3 for run in runs)


def test_made_up_routing_is_said_and_its_spread_skews(skewed: Trace) -> None:
    even, typical = (Routing.typical(skewed.model, spread=spread) for spread in (0.0, 1.0))
    assert any("no trace was given" in note for note in typical.notes)
    loads = [np.bincount(routing.experts_TLK[:, 0].ravel(), minlength=64) for routing in (even, typical)]
    assert loads[0].max() / loads[0].mean() < 1.3 < 2 < loads[1].max() / loads[1].mean()
    for routing in (even, typical):
        assert (np.diff(np.sort(routing.experts_TLK, axis=2), axis=2) > 0).all()  # no expert twice
    found = serve(Arrivals.of([0.0], [10], [2]), Deployment(model=skewed.model, cluster=FOUR, max_batch_tokens=64))
    assert any("no trace was given" in note for note in found.notes)
    with pytest.raises(InputError, match="routing is of"):
        StepLaw.of(Deployment(model=thin("deepseek-v2-lite"), cluster=FOUR), Routing.of(skewed))


def test_steps_too_large_to_tabulate_are_refused_and_large_ones_scaled() -> None:
    model = thin()
    with pytest.raises(InputError, match="more than 4,194,304 tokens"):
        StepLaw.of(Deployment(model=model, cluster=FOUR, max_batch_tokens=1 << 30))
    ids = Routing.typical(model, tokens=2048).experts_TLK
    deployment = Deployment(model=model, cluster=FOUR)
    (once, _, there), (thrice, _, far) = (batch_times(deployment, ids, 1, tokens=n * 2048)[0][:, 0] for n in (1, 300))
    assert thrice == pytest.approx(300 * once, rel=0.7) and far == pytest.approx(300 * there, rel=0.7) and far > 100 * there


def test_the_grid_holds_every_count() -> None:
    for most in (1, 2, 3, 100, 8192):
        grid = token_grid(most)
        assert grid[0] == 1 and grid[-1] >= most and (np.diff(grid) > 0).all() and (grid[1:] <= 2 * grid[:-1]).all()


# layouts -------------------------------------------------------------------------------------------


def test_tensor_parallelism_divides_dense_work_and_adds_sums() -> None:
    model = thin()
    one, four = (StepLaw.of(Deployment(model=model, cluster=FOUR, tp=tp, max_batch_tokens=4096)) for tp in (1, 4))
    big = int(np.searchsorted(one.grid_B, 4096))
    assert four.context_s == pytest.approx(one.context_s / 4) and four.pair_s == pytest.approx(one.pair_s / 4)
    assert one.dense_s_B[big] / 4 < four.dense_s_B[big] < one.dense_s_B[big]
    assert four.grid_B[-1] < one.grid_B[-1]  # one rank instead of four


def test_decode_tokens_fill_tiles_beside_prompts_where_the_attention_kernel_does_not_pack_them() -> None:
    """FlashAttention 2: 64 queries for each of 32 heads of 128 + 128, in 2 layers, at 60 % of the peak; elsewhere memory binds always."""
    model = thin("qwen3-30b-a3b")
    laws = {name: StepLaw.of(Deployment(model=model, cluster=load_cluster(name), max_batch_tokens=64)) for name in ("rtx-pro-6000x2", "h100x8")}
    tiled, packed = laws.values()
    assert tiled.mixed_s == pytest.approx(2 * 64 * 32 * 256 * 2 / (0.6 * 467.8e12)) and tiled.mixed_s > 2 * tiled.context_s
    assert packed.mixed_s == packed.context_s
    assert any("as FlashAttention 2 on rtx-pro-6000" in note for note in tiled.notes) and not any("FlashAttention" in note for note in packed.notes)
    latent = StepLaw.of(Deployment(model=thin("deepseek-v2-lite"), cluster=load_cluster("rtx-pro-6000x2"), max_batch_tokens=64))
    assert latent.mixed_s == latent.context_s


def test_experts_cut_over_all_devices_are_even_and_read_every_slice(skewed: Trace) -> None:
    """Cut experts load all devices alike; whole ones make the busiest device late, but read fewer bytes each when few tokens come."""
    base = Deployment(model=skewed.model, cluster=FOUR, max_batch_tokens=2048)
    routing = Routing.of(skewed)
    ids = routing.experts_TLK[:2000]
    (whole, whole_mean, _), _ = batch_times(base, ids, 1)
    (cut, cut_mean, exchange), _ = batch_times(replace(base, split=True), ids, 1)
    assert cut == cut_mean and whole > whole_mean
    (gathered,) = batch_times(replace(base, exchange="all-gather"), ids, 1)[0][2]
    assert exchange == pytest.approx(gathered)
    one = replace(base, cluster=first_devices(H100, 1))
    alone, cut_alone = (batch_times(replace(one, split=split), ids, 1)[0][0] for split in (False, True))
    assert alone == pytest.approx(cut_alone)


def test_layouts_fill_the_cluster() -> None:
    assert [parse_layout(text, 8) for text in ("dp8", "tp8", "dp4tp2", "dp2-tp4", "DP8", "tp2")] == [1, 8, 2, 4, 1, 2]
    for text in ("dp3", "ep8", "", "dp4tp4", "dp0", "tp0", "dp8tp0"):
        with pytest.raises(InputError, match="layout"):
            parse_layout(text, 8)


def test_what_weights_leave_is_cache() -> None:
    model = load_model("deepseek-v2-lite")
    small, large = (Deployment(model=model, cluster=first_devices(H100, n)) for n in (2, 8))
    assert large.cache_tokens_per_rank > small.cache_tokens_per_rank > 0
    freed_B = (large.cache_tokens_per_rank - small.cache_tokens_per_rank) * model.layers * (512 + 64) * 2
    assert freed_B == pytest.approx(64 * model.expert_B * 26 * (1 / 2 - 1 / 8), rel=0.01)
    with pytest.raises(InputError, match="for a key-value cache"):
        _ = Deployment(model=load_model("deepseek-v3"), cluster=first_devices(H100, 4)).cache_tokens_per_rank


def test_first_devices_keep_nodes_and_networks() -> None:
    four_nodes = load_cluster("h100-4x8")
    assert first_devices(four_nodes, 16).nodes == 2 and first_devices(four_nodes, 16).network is not None
    assert first_devices(four_nodes, 8).network is None and first_devices(four_nodes, 32) is four_nodes
    for count in (0, 33):
        with pytest.raises(InputError, match="devices"):
            first_devices(four_nodes, count)
    assert even_placement(thin(), 5).slots_G.sum() == 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 3}, "do not divide"),
        ({"replicas": 0}, "replicas=0"),
        ({"max_seqs": 10**9}, "max_seqs=1000000000"),
        ({"memory_share": 1.5}, "memory_share"),
        ({"host_s": -1.0}, "host_s"),
        ({"split": True, "placement": even_placement(thin(), 4)}, "take no placement"),
        ({"exchange": "smoke signals"}, "exchange"),
        ({"placement": even_placement(thin(), 8)}, "plan for this cluster"),
    ],
)
def test_impossible_deployments_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Deployment(**({"model": thin(), "cluster": FOUR} | values))


# measured layers -----------------------------------------------------------------------------------

# Some rows of one MoE layer of Qwen3-30B-A3B on an RTX PRO 6000, bf16, vLLM 0.19.0: LLMServingSim @5daddb2 (MIT, 2024 CASYS Lab at KAIST).
LAYER = """tokens,activated_experts,time_us
1,8,50.2297
4,32,234.315
32,32,233.014
256,32,271.189
2048,32,602.975
16,64,424.116
128,64,456.737
256,64,472.085
512,64,499.914
1024,64,550.528
2048,64,681.888
128,128,849.291
2048,128,1066.6
"""


def measured_layer(path: Path, cache_B: float | None = 128e6) -> MoeProfile:
    path.write_text(LAYER)
    return MoeProfile.load(path, expert_B=9.44e6, cache_B=cache_B)


def test_measured_layers_are_met_and_joined_by_lines(tmp_path: Path) -> None:
    profile = measured_layer(tmp_path / "moe.csv")
    time_s, outside = profile.time_s([16, 64, 64, 1, 4096, 0, 100], [64, 32, 48, 64, 64, 0, 0])
    assert not outside[[0, 1, 2, 3, 5]].any() and outside[4]
    middle = 233.014 + (271.189 - 233.014) * (64 - 32) / (256 - 32)
    upper = 424.116 + (456.737 - 424.116) * (64 - 16) / (128 - 16)
    assert time_s[:4] * 1e6 == pytest.approx([424.116, middle, (middle + upper) / 2, 424.116])
    assert time_s[4] * 1e6 == pytest.approx(681.888 + (681.888 - 550.528) * 2) and not time_s[5:].any()


def test_layers_timed_on_cached_weights_are_replaced(tmp_path: Path) -> None:
    """8 experts of 9.4 MB fit a cache of 128 MB: the line through 32 and 64 says 90 us where 50 were timed."""
    cold, warm = (measured_layer(tmp_path / f"{cache}.csv", cache_B=cache) for cache in (128e6, None))
    assert warm.time_s(1, 8)[0] * 1e6 == pytest.approx(50.2297)
    assert cold.time_s(1, 8)[0] * 1e6 == pytest.approx(234.315 - (424.116 - 234.315) * 24 / 32)
    assert any("fit the cache" in note for note in cold.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens,time_us\n1,2\n", "activated_experts"),
        (LAYER + "4,32,1\n", "occurs twice"),
        (LAYER + "4,16,-1\n", "row 14: time_us"),
        ("tokens,activated_experts,time_us\n1,8,5\n", "at least two"),
        ("", "not a table"),
    ],
)
def test_broken_layer_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "moe.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        MoeProfile.load(path, expert_B=9.44e6, cache_B=128e6)


def test_a_real_vllm_run_is_met(tmp_path: Path) -> None:
    """300 requests of about 10 a second on two RTX PRO 6000, Qwen3-30B-A3B, data-parallel 2: published means TPOT 47.3 ms and
    latency 32.3 s (LLMServingSim @5daddb2). Requests here have its rates and spreads of lengths, not its lengths."""
    cluster = load_cluster("rtx-pro-6000x2")
    rng = np.random.default_rng(0)
    prompt = np.clip(rng.lognormal(np.log(862) - 0.18, 0.6, 300), 257, 4570).round()
    output = np.clip(rng.normal(665, 116, 300), 512, 1224).round()
    rows = Arrivals.of(np.sort(rng.uniform(0, 29.1, 300)), prompt, output)
    deployment = Deployment(
        model=load_model("qwen3-30b-a3b"),
        cluster=cluster,
        max_seqs=128,
        max_batch_tokens=2048,
        exchange="all-gather",
        ahead=True,
        expert_profile=measured_layer(tmp_path / "moe.csv"),
    )
    found = serve(rows, deployment)
    assert np.nanmean(found.tpot_s_R) == pytest.approx(47.3e-3, rel=0.05)
    assert found.latency_s_R.mean() == pytest.approx(32.345, rel=0.05)
    assert found.ttft_s_R.mean() == pytest.approx(1.086, rel=0.35)  # few late requests wait for the first to end
