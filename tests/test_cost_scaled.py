"""Expert kernels on devices and shapes they were not fitted to, against published times."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.calibrate.kernel_tables import check_table
from moesim.calibrate.kernels import predict_kernel
from moesim.cost.experts import ComputePeak, ExpertKernel, expert_time_s
from moesim.cost.fitted import device_kernel, device_peak, fitted_kernels, kernels_for, scaled_kernel
from moesim.errors import ProfileError
from moesim.hardware import load_device

FITTED = [
    (name, kernel)
    for name in ("h100-sxm", "h200", "b200")
    for dtype in ("bf16", "fp8", "fp8_block")
    for kernel in fitted_kernels(load_device(name), dtype)
]

# Measured in milliseconds by AIConfigurator with vLLM 0.24 on an H200 in bf16: tokens, balanced, power_law_1.2 (two shapes that no fit saw).
H200 = {
    (2048, 768, 8, 128): """1 .040 .039 | 4 .094 .088 | 16 .305 .164 | 32 .305 .267 | 128 .316 .318 | 256 .339 .360 | 512 .350 .363
        | 2048 .462 .583 | 8192 1.271 1.443 | 16384 2.463 2.631""",
    (4096, 14336, 2, 8): """1 .212 .189 | 4 .668 .389 | 16 .664 .661 | 32 .689 .701 | 128 .688 .832 | 256 .753 .964 | 512 .798 .963
        | 2048 2.101 2.395 | 8192 8.627 9.003 | 16384 17.373 17.672""",
}
# Microseconds printed by vLLM's benchmark_moe.py on A100s under random routing in bf16 (pull requests 19049, 40542, 55511):
# memory bytes/s, kernel with these default tiles, (hidden, intermediate, top-k, experts), tokens and times.
A100 = (
    (1.555e12, "sglang-triton", (2048, 768, 8, 128), "16 611.19 | 24 730.19 | 32 808.53 | 48 885.97 | 64 917.45 | 96 943.14"),
    (2.039e12, "vllm-triton", (2048, 1408, 6, 64), "16 542.6 | 64 698.1 | 256 769.5 | 1024 1022.5 | 4096 2919.0"),
    (1.935e12, "vllm-triton", (3072, 512, 8, 256), "16 606.49 | 64 1270.5"),
)


def cells(text: str) -> list[list[float]]:
    return [[float(cell) for cell in row.split()] for row in text.split("|")]


def peak_of(name: str, dtype: str = "bf16") -> ComputePeak:
    return device_peak(load_device(name), dtype)[0]


def reference_table() -> pd.DataFrame:
    rows = []
    for (hidden, width, top_k, experts), text in H200.items():
        for tokens, *times in cells(text):
            for distribution, latency in zip(("balanced", "power_law_1.2"), times, strict=True):
                rows.append({
                    "kernel_source": "triton", "moe_dtype": "bfloat16", "num_tokens": int(tokens), "hidden_size": hidden, "inter_size": width,
                    "topk": top_k, "num_experts": experts, "distribution": distribution, "latency_ms": latency,
                })  # fmt: skip
    return check_table(pd.DataFrame(rows))


def test_shapes_that_no_fit_saw_are_predicted_tuned_tiles_included() -> None:
    table = reference_table()
    kernel, notes = device_kernel(load_device("h200"), "bf16")
    assert not notes
    measured_s = table["latency_ms"].to_numpy() * 1e-3
    error = predict_kernel(table, peak_of("h200"), kernel)[0] / measured_s - 1
    assert np.median(np.abs(error)) < 0.05
    assert np.quantile(np.abs(error), 0.9) < 0.17
    untuned = predict_kernel(table, peak_of("h200"), replace(kernel, tuned=()))[0] / measured_s - 1
    assert np.abs(untuned).max() > 0.5 > 0.3 > np.abs(error).max()


def test_the_sign_of_skew_is_that_of_the_measurements() -> None:
    table = reference_table()
    predicted = predict_kernel(table, peak_of("h200"), device_kernel(load_device("h200"), "bf16")[0])[0]
    measured = table["latency_ms"].to_numpy() * 1e-3
    ratio, wanted = predicted[1::2] / predicted[::2], measured[1::2] / measured[::2]
    clear = np.abs(wanted - 1) > 0.08
    assert (np.sign(ratio - 1)[clear] == np.sign(wanted - 1)[clear]).all()


def test_an_a100_is_predicted_with_kernels_of_an_h200() -> None:
    kernels, notes = kernels_for(load_device("a100-80"), "bf16")
    by_name = {kernel.name: kernel for kernel in kernels}
    assert notes[0].startswith("not calibrated: a100-80 has no fitted bf16 expert kernel; those of h200 are scaled")
    errors = []
    for memory_Bps, name, (hidden, width, top_k, experts), text in A100:
        peak = replace(peak_of("a100-80"), memory_Bps=memory_Bps)
        for tokens, time_us in cells(text):
            rng = np.random.default_rng(0)
            chosen = [np.argsort(rng.random((int(tokens), experts)), axis=1)[:, :top_k].ravel() for _ in range(8)]
            counts = np.stack([np.bincount(each, minlength=experts) for each in chosen])
            shape = {"hidden": hidden, "intermediate": width, "gated": True, "top_k": top_k}
            found = expert_time_s(counts, **shape, peak=peak, kernel=by_name[name], warm_cache=True).time_s_N.mean()
            errors.append(found * 1e6 / time_us - 1)
    assert len(errors) == 13
    assert np.abs(errors).max() < 0.08
    assert abs(np.mean(errors)) < 0.05


@pytest.mark.parametrize(("name", "kernel"), FITTED, ids=[f"{name}-{kernel.name}-{kernel.dtype}" for name, kernel in FITTED])
def test_a_kernel_scaled_to_its_own_device_is_itself(name: str, kernel: ExpertKernel) -> None:
    peak = peak_of(name, kernel.dtype)
    same = scaled_kernel(kernel, peak, peak)
    assert same.flops_efficiency == pytest.approx(kernel.flops_efficiency)
    assert replace(same, flops_efficiency=kernel.flops_efficiency, load_stall=kernel.load_stall) == kernel


@given(
    st.sampled_from([kernel for _, kernel in FITTED]),
    st.floats(0.2, 5),
    st.floats(0.2, 5),
    st.floats(1, 1.15),
    st.sampled_from(["flops", "memory_Bps"]),
)
def test_a_better_target_of_a_generation_is_never_slower(kernel: ExpertKernel, flops: float, memory: float, gain: float, what: str) -> None:
    home = peak_of("h200", "bf16")
    near = replace(home, flops=home.flops * flops, memory_Bps=home.memory_Bps * memory)
    far = replace(near, **{what: getattr(near, what) * gain})
    across = [max(r, 1 / r) > 1.2 for r in (flops, flops * (gain if what == "flops" else 1))]
    if across[0] != across[1]:
        return
    counts = [[1, 0, 0, 0], [40, 3, 2, 0], [900, 800, 700, 600]]
    shape = {"hidden": 4096, "intermediate": 1536, "gated": True, "top_k": 1}
    slow, fast = (expert_time_s(counts, **shape, peak=to, kernel=scaled_kernel(kernel, home, to)).time_s_N for to in (near, far))
    assert np.isfinite(fast).all()
    assert (fast <= slow * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", ["a100-40", "a40", "gb200", "h100-pcie", "mi300x", "rtx-3060", "rtx-4090", "rtx-a5000", "rtx-pro-6000"])
def test_every_gpu_without_a_fit_borrows_from_a_similar_one_and_says_so(name: str) -> None:
    kernel, notes = device_kernel(load_device(name), "bf16")
    assert kernel.name != "typical"
    assert kernel.tuned == ()
    assert f"those of {'b200' if name == 'gb200' else 'h200'} are scaled" in notes[0]
    peak = peak_of(name)
    tokens = np.unique(np.geomspace(1, 1 << 20, 60).astype(int))
    counts = np.repeat(tokens[:, None] * 8 / 64, 64, axis=1)
    time_s = expert_time_s(counts, hidden=4096, intermediate=1536, gated=True, top_k=8, peak=peak, kernel=kernel).time_s_N
    assert np.isfinite(time_s).all()
    assert (time_s >= counts.sum(axis=1) * 6 * 4096 * 1536 / peak.flops).all()  # never beyond the peak
    assert time_s[-1] / time_s[-2] == pytest.approx(tokens[-1] / tokens[-2], rel=0.02)  # linear at the end


def test_weights_that_are_widened_and_other_processors_get_a_typical_kernel() -> None:
    for name, dtype in (("a100-80", "fp8"), ("a100-80", "int4"), ("v100", "bf16"), ("ascend-910c", "bf16"), ("cpu", "bf16")):
        kernel, notes = device_kernel(load_device(name), dtype)
        assert kernel.name == "typical"
        assert any(note.startswith("not calibrated") for note in notes)
    with pytest.raises(ProfileError, match="no kernel 'magic' for bf16; it has: vllm-triton, sglang-triton"):
        device_kernel(load_device("a100-80"), "bf16", "magic")


def test_more_tokens_cost_more_within_a_tile_size_but_for_a_little_that_grouping_saves() -> None:
    for name, kernel in FITTED:
        peak = peak_of(name, kernel.dtype)
        rule = (
            kernel.by_tokens
            or tuple(128 * step for step in kernel.by_tokens_per_expert)
            or tuple(16 * step for step in kernel.by_selections_per_expert)
        )
        edges = [1.0, *rule, max([8192.0, *rule]) * 2]
        for least, most in itertools.pairwise(edges):
            tokens = np.unique(np.linspace(math.floor(least) + 1, most, 40).astype(int))
            counts = np.repeat(tokens[:, None] * 8 / 128, 128, axis=1)
            time_s = expert_time_s(
                counts, hidden=2048, intermediate=1024, gated=True, top_k=8, peak=peak, kernel=replace(kernel, partial_tile=0)
            ).time_s_N
            drop = np.diff(time_s) / time_s[:-1]
            assert drop.min() > -0.03, (name, kernel.name, kernel.dtype, tokens[drop.argmin()])
