"""Attention, copies, gradient reduction, memory and energy: closed forms, published sizes, laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost.attention import (
    FLOPS_SHARE,
    LAUNCH_S,
    MEMORY_SHARE,
    MODES,
    attention_parameters,
    attention_time,
    dense_parameters,
    kv_token_B,
    product_s,
)
from moesim.cost.copies import PINNED_SHARE, host_path, memory_path, ping_pong_s
from moesim.cost.energy import energy_of
from moesim.cost.experts import ComputePeak
from moesim.cost.memory import memory_use
from moesim.cost.reduction import reduction_time, ring_s
from moesim.errors import InputError, ProfileError
from moesim.hardware import load_cluster, load_links
from moesim.model import Attention, load_model
from moesim.plan import Placement, slots_per_device

PEAK = ComputePeak(flops=1e15, memory_Bps=3e12, cache_B=50e6, units=132)


# attention -----------------------------------------------------------------------------------------


def test_published_sizes_come_out() -> None:
    v3, qwen, mixtral = (load_model(name) for name in ("deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b"))
    assert attention_parameters(v3) == pytest.approx(187.1e6, rel=1e-3)
    assert kv_token_B(v3) * v3.layers == 70272  # 70 KB per token (DeepSeek-V3, arXiv:2412.19437)
    assert kv_token_B(mixtral) == 2 * 8 * 128 * 2
    for model, billions in ((v3, 671.0), (qwen, 30.5), (mixtral, 46.7)):
        total = dense_parameters(model).whole(model) + len(model.moe_layers) * model.experts * model.expert_parameters
        assert total / 1e9 == pytest.approx(billions, rel=5e-3), model.name


def test_long_prefill_is_bound_by_its_scores_and_decode_by_its_cache() -> None:
    model = load_model("qwen3-30b-a3b")
    tokens = 65536.0
    scores = 2 * tokens * tokens / 2 * 32 * 256 / (PEAK.flops * FLOPS_SHARE)
    assert float(attention_time(model, tokens=tokens, context=tokens, mode="prefill", peak=PEAK).scores_s_N) == pytest.approx(scores + LAUNCH_S)
    cache = 512 * 8192 * kv_token_B(model) / (PEAK.memory_Bps * MEMORY_SHARE)
    found = attention_time(model, tokens=512, context=8192, mode="decode", peak=PEAK)
    assert float(found.scores_s_N) == pytest.approx(cache + LAUNCH_S, rel=0.01)


def test_mla_reads_less_cache_than_heads_of_its_own() -> None:
    mla = load_model("deepseek-v3")
    assert mla.attention is not None
    mha = replace(mla, attention=Attention(heads=128, kv_heads=128, head_dim=192, value_dim=128))
    gqa = replace(mla, attention=Attention(heads=128, kv_heads=8, head_dim=192, value_dim=128))
    sizes = [kv_token_B(model) for model in (mla, gqa, mha)]
    assert sizes == sorted(sizes)
    times = [float(attention_time(m, tokens=64, context=32768, mode="decode", peak=PEAK).scores_s_N) for m in (mla, gqa, mha)]
    assert times == sorted(times)


def test_training_costs_three_products_and_three_and_a_half_attentions() -> None:
    model = load_model("qwen3-30b-a3b")
    forward, whole = (attention_time(model, tokens=65536, context=8192, mode=mode, peak=PEAK) for mode in ("prefill", "training"))
    assert (whole.projections_s_N - LAUNCH_S) / (forward.projections_s_N - LAUNCH_S) == pytest.approx(3)
    assert (whole.scores_s_N - LAUNCH_S) / (forward.scores_s_N - LAUNCH_S) == pytest.approx(3.5)


@given(
    tokens=st.integers(1, 10**5), context=st.integers(1, 10**5), more=st.integers(1, 1000), mode=st.sampled_from(MODES),
    name=st.sampled_from(["deepseek-v3", "mixtral-8x7b", "olmoe-1b-7b"]),
)  # fmt: skip
def test_more_tokens_or_context_or_a_slower_device_is_never_faster(tokens: int, context: int, more: int, mode: str, name: str) -> None:
    model = load_model(name)

    def seconds(tokens: int, context: int, peak: ComputePeak = PEAK) -> float:
        return float(attention_time(model, tokens=tokens, context=context, mode=mode, peak=peak).time_s_N)  # type: ignore[arg-type]

    base = seconds(tokens, context)
    assert base <= seconds(tokens + more, context) * (1 + 1e-12)
    assert base <= seconds(tokens, context + more) * (1 + 1e-12)
    assert base <= seconds(tokens, context, replace(PEAK, flops=PEAK.flops / 2))
    assert base <= seconds(tokens, context, replace(PEAK, memory_Bps=PEAK.memory_Bps / 2))


def test_nothing_to_do_costs_nothing_and_nonsense_is_refused() -> None:
    model = tiny_model()
    assert float(attention_time(model, tokens=0, context=99, mode="decode", peak=PEAK).time_s_N) == 0
    assert float(product_s(0, 1e9, weight_B=2, mode="prefill", peak=PEAK)) == 0
    with pytest.raises(InputError, match="mode 'chat'"):
        attention_time(model, tokens=1, context=1, mode="chat", peak=PEAK)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokens=-1"):
        attention_time(model, tokens=-1, context=1, mode="decode", peak=PEAK)


# copies --------------------------------------------------------------------------------------------


def test_a_host_copy_is_paced_by_its_narrowest_part() -> None:
    cluster = load_cluster("h100x8")
    path = host_path(cluster, 0)
    assert path.bottleneck == "pcie5-x16"
    expert_B = load_model("qwen3-30b-a3b").expert_B
    assert float(path.time_s(expert_B)) == pytest.approx(10e-6 + expert_B / (63e9 * PINNED_SHARE))  # 0.19 ms
    assert host_path(cluster, 0, sharing=100).bottleneck == "ddr of dgx-h100"
    edge = load_cluster("edge-u280")
    assert host_path(edge, 1, "nvme").bandwidth_Bps == 3.5e9
    assert memory_path(cluster.devices[0]).bandwidth_Bps < host_path(cluster, 0).bandwidth_Bps * 100
    with pytest.raises(ProfileError, match="device 0 has no host"):
        host_path(edge, 0)
    with pytest.raises(ProfileError, match="has no 'nvme'; it has ddr"):
        host_path(cluster, 0, "nvme")
    with pytest.raises(InputError, match=">= 0 bytes"):
        path.time_s(-1)


def test_two_buffers_hide_loads_behind_computation() -> None:
    assert ping_pong_s([1, 1, 1], [5, 5, 5]) == 16  # load, then computation alone
    assert ping_pong_s([5, 5, 5], [1, 1, 1]) == 16  # loads, then the last computation
    assert ping_pong_s([2], [3]) == 5
    with pytest.raises(InputError, match="one of each"):
        ping_pong_s([1, 2], [1])


# reduction -----------------------------------------------------------------------------------------


def test_a_ring_has_its_closed_form() -> None:
    link = load_links()["pcie4-x16"]
    assert float(ring_s(1e9, 8, link)) == pytest.approx(14 * link.latency_s + 2 * 1e9 * 7 / 8 / link.bandwidth_Bps)
    assert float(ring_s(1e9, 1, link)) == 0
    assert float(ring_s(0, 8, link)) == 0
    cluster = load_cluster("rtx-4090x8-pcie")
    found = reduction_time(1e9, cluster)
    assert float(found.time_s_N) == pytest.approx(float(ring_s(1e9, 8, link)))
    assert any("not calibrated" in note for note in found.notes)


def test_nodes_reduce_shares_over_their_nics() -> None:
    full, thin = load_cluster("h100-64x8"), load_cluster("h100-64x8-o4")
    nic = load_links()["ib-ndr"]
    found = reduction_time([0.0, 1e9], full)
    assert found.time_s_N[0] == 0
    assert found.between_s_N[1] == pytest.approx(float(ring_s(1e9 / 8, 64, nic)))
    slower = reduction_time([1e9], thin).between_s_N[0]
    assert slower - 126 * nic.latency_s == pytest.approx(4 * (found.between_s_N[1] - 126 * nic.latency_s))
    assert not found.extrapolated_N[0]
    inside = reduction_time(1e8, load_cluster("h200x8"))
    assert inside.algorithm == "NCCL curve"
    assert 2 * 1e8 / 900e9 < float(inside.time_s_N) < 2 * 1e8 / 200e9


@given(st.floats(1, 1e10), st.floats(1, 4), st.sampled_from(["h100x8", "h200-4x8", "mixed-a100-h100", "rtx-4090x8-pcie", "b200-8x8-o2", "cpu"]))
def test_more_gradients_never_take_less(size: float, factor: float, name: str) -> None:
    cluster = load_cluster(name)
    assert reduction_time(size, cluster).time_s_N <= reduction_time(size * factor, cluster).time_s_N * (1 + 1e-12)


# memory --------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_by_device_and_bytes() -> None:
    model, cluster = load_model("deepseek-v3"), load_cluster("h100x8")
    slots = np.tile(np.arange(256), (58, 1))
    placement = Placement(slots_LP=slots, slots_G=slots_per_device(256, 8), experts=256, layers=model.moe_layers)
    use = memory_use(model, placement, cluster, tokens_per_device=4096)
    assert use.experts_B_G[0] == 58 * 32 * 3 * 7168 * 2048
    assert not use.fits
    (line,) = use.notes()
    assert "device 0" in line
    assert "over" in line
    assert "81.7 GB experts" in line
    over = use.total_B_G[0] - 80 * 2**30
    assert use.over_B_G[0] == pytest.approx(over)
    roomy = replace(cluster, devices=load_cluster("b200x8").devices)
    assert memory_use(model, placement, roomy, tokens_per_device=4096).fits
    assert memory_use(model, placement, roomy, tokens_per_device=4096).notes() == ()


@given(extra=st.integers(0, 8), tokens=st.integers(1, 4096), context=st.integers(0, 4096))
def test_replicas_tokens_and_context_only_add(extra: int, tokens: int, context: int) -> None:
    model, cluster = load_model("olmoe-1b-7b"), load_cluster("h100x8")

    def total(extra: int, tokens: int, context: int) -> np.ndarray:
        slots = np.tile(np.concatenate([np.arange(64), np.arange(8 * extra) % 64]), (16, 1))
        placement = Placement(slots_LP=slots, slots_G=slots_per_device(64 + 8 * extra, 8), experts=64, layers=model.moe_layers)
        return memory_use(model, placement, cluster, tokens_per_device=tokens, context=context).total_B_G

    base = total(extra, tokens, context)
    np.testing.assert_allclose(total(extra + 1, tokens, context) - base, 16 * model.expert_B)
    assert (total(extra, tokens + 1, context) > base).all()
    np.testing.assert_allclose(total(extra, tokens, context + 1) - base, tokens * 16 * kv_token_B(model))


# energy --------------------------------------------------------------------------------------------


def test_energy_is_board_power_times_busy_time() -> None:
    cluster = load_cluster("h100x8")
    busy = np.full((3, 8), 0.25)
    found = energy_of(busy, np.full(3, 0.5), 1000, cluster)
    assert found.token_J == pytest.approx(700 * 8 * 0.25 / 1000)
    assert found.most_token_J == pytest.approx(2 * found.token_J)
    np.testing.assert_allclose(found.utilisation_G, 0.5)
    assert found.confidence == "assumed"
    assert "estimate" in found.notes[0]
    with pytest.raises(InputError, match="no board power in the profile of cpu"):
        energy_of(np.zeros((1, 4)), np.ones(1), 1, load_cluster("cpu"))
    with pytest.raises(InputError, match="longer than its step"):
        energy_of(np.full((1, 8), 2.0), np.ones(1), 1, cluster)
