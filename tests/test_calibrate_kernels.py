from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.kernel_tables import check_table, read_table, row_counts, sample_counts
from moesim.calibrate.kernels import cross_validate, evaluate_kernel, fit_kernel, profile_fragment, split_kernels, template_for
from moesim.cost.experts import ComputePeak, ExpertKernel, expert_time_s
from moesim.errors import InputError
from moesim.hardware.schema import KernelTable

PEAK = ComputePeak(flops=989e12, memory_Bps=4.8e12, cache_B=50e6, units=132)
TRUTH = ExpertKernel(
    name="vllm-triton",
    style="fused",
    dtype="bf16",
    launch_s=22e-6,
    memory_efficiency=0.8,
    flops_efficiency=0.95,
    tile_overhead=60.0,
    overlap=2.5,
    reread=0.3,
    tile_rows=(16, 32, 64, 128),
    by_tokens=(32, 96, 512),
)
SHAPES = ((2048, 768, 8, 128), (4096, 2048, 4, 64), (4096, 14336, 2, 8))
DRAWS = 4


def measured(kernel: ExpertKernel = TRUTH, noise: float = 0.0, source: str = "triton") -> pd.DataFrame:
    """A table that the kernel itself would have produced."""
    rng = np.random.default_rng(0)
    rows = []
    for hidden, intermediate, top_k, experts in SHAPES:
        for tokens in (1, 4, 16, 64, 256, 1024, 4096, 16384):
            for distribution in ("balanced", "power_law_1.2"):
                counts_DE = sample_counts(experts=experts, top_k=top_k, tokens=tokens, distribution=distribution, draws=DRAWS)
                found = expert_time_s(
                    counts_DE, hidden=hidden, intermediate=intermediate, gated=True, top_k=top_k, peak=PEAK, kernel=kernel, warm_cache=True
                )
                rows.append(
                    {
                        "framework": "vllm",
                        "kernel_source": source,
                        "moe_dtype": "bfloat16",
                        "num_tokens": tokens,
                        "hidden_size": hidden,
                        "inter_size": intermediate,
                        "topk": top_k,
                        "num_experts": experts,
                        "distribution": distribution,
                        "latency_ms": found.time_s_N.mean() * 1e3 * np.exp(rng.normal(0, noise)),
                    }
                )
    return check_table(pd.DataFrame(rows))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(1, 500),
    st.sampled_from(["balanced", "power_law_1.01", "power_law_1.2", "power_law_0.5"]),
)
def test_drawn_counts_are_possible_selections(experts: int, top_k: int, tokens: int, distribution: str) -> None:
    top_k = min(top_k, experts)
    counts_DE = sample_counts(experts=experts, top_k=top_k, tokens=tokens, distribution=distribution, draws=3)
    assert (counts_DE.sum(axis=1) == tokens * top_k).all()
    assert counts_DE.min() >= 0
    assert counts_DE.max() <= tokens


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([8, 16, 64, 128]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 600))
def test_balanced_counts_are_as_even_as_integers_allow(experts: int, top_k: int, tokens: int) -> None:
    counts_E = sample_counts(experts=experts, top_k=top_k, tokens=tokens, distribution="balanced")[0]
    assert counts_E.max() - counts_E.min() <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 1000))
def test_balanced_counts_are_those_of_the_collectors_rule(experts: int, top_k: int, tokens: int) -> None:
    top_k = min(top_k, experts)
    stride = -(-experts // top_k)
    step = 1 if tokens >= stride else stride / tokens
    chosen = [int(token * step + choice * stride) % experts for token in range(tokens) for choice in range(top_k)]
    counts_E = sample_counts(experts=experts, top_k=top_k, tokens=tokens, distribution="balanced")[0]
    assert (counts_E == np.bincount(chosen, minlength=experts)).all()


# Active experts and hottest-over-mean that the collector's own sampling gives (means of 100 draws).
@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "alpha", "active", "peak"),
    [
        (128, 8, 16, 1.01, 64.8, 5.27),
        (128, 8, 16, 1.2, 58.9, 7.37),
        (128, 8, 128, 1.2, 126.3, 5.58),
        (128, 8, 8192, 1.2, 128.0, 14.97),
        (384, 8, 1024, 1.01, 332.2, 6.70),
        (512, 10, 1024, 1.2, 445.3, 10.92),
        (8, 2, 1024, 1.01, 8.0, 3.48),
    ],
)
def test_power_laws_have_the_collectors_moments(experts: int, top_k: int, tokens: int, alpha: float, active: float, peak: float) -> None:
    counts_DE = sample_counts(experts=experts, top_k=top_k, tokens=tokens, distribution=f"power_law_{alpha}", draws=200)
    assert (counts_DE > 0).sum(axis=1).mean() == pytest.approx(active, rel=0.03)
    assert counts_DE.max(axis=1).mean() / (tokens * top_k / experts) == pytest.approx(peak, rel=0.08)


def test_draws_repeat_and_cannot_be_changed() -> None:
    wanted = {"experts": 32, "top_k": 2, "tokens": 100, "distribution": "power_law_1.2", "draws": 3}
    first = sample_counts(**wanted)
    sample_counts.cache_clear()
    assert (sample_counts(**wanted) == first).all()
    assert not (sample_counts(**wanted, seed=1) == first).all()
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1


def test_impossible_draws_are_refused() -> None:
    for change in ({"distribution": "zipf"}, {"top_k": 9}, {"tokens": 0}, {"distribution": "power_law_1"}):
        with pytest.raises(InputError, match="cannot draw"):
            sample_counts(**({"experts": 8, "top_k": 2, "tokens": 4, "distribution": "balanced"} | change))


def test_tables_round_trip_through_files(tmp_path: Path) -> None:
    table = measured()
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        again = read_table(tmp_path / name)
        assert (again["dtype"] == "bf16").all()
        np.testing.assert_allclose(again["latency_ms"], table["latency_ms"])


def test_plain_shapes_are_known_unless_the_table_says_otherwise() -> None:
    table = measured().drop(columns="gated").assign(hidden_size=4096, inter_size=2688, topk=22, num_experts=512)
    assert not check_table(table)["gated"].any()
    assert check_table(table.assign(gated=True))["gated"].all()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("latency_ms", -1.0, "positive time"),
        ("latency_ms", np.nan, "positive time"),
        ("num_tokens", 1.5, "whole number"),
        ("topk", 4096, "at most num_experts"),
        ("distribution", "zipf", "power_law"),
    ],
)
def test_a_bad_cell_is_named_with_file_column_and_row(tmp_path: Path, column: str, value: object, message: str) -> None:
    table = measured().astype({"num_tokens": float})
    table.loc[3, column] = value
    table.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(InputError, match=rf"bad\.csv: column '{column}', row 4: .*{message}"):
        read_table(tmp_path / "bad.csv")


def test_unreadable_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.xls").touch()
    (tmp_path / "empty.csv").touch()
    for name, message in (("t.xls", "convert"), ("none.csv", "none.csv"), ("empty.csv", "readable")):
        with pytest.raises(InputError, match=message):
            read_table(tmp_path / name)
    with pytest.raises(InputError, match="latency_ms missing"):
        check_table(measured().drop(columns="latency_ms"))
    with pytest.raises(InputError, match="no rows"):
        check_table(measured().iloc[:0])


def test_the_true_kernel_has_no_error() -> None:
    scores = evaluate_kernel(measured(), PEAK, TRUTH, draws=DRAWS)
    assert scores["n"] == 48
    assert scores["p90_ape"] == pytest.approx(0, abs=1e-12)
    assert len(scores["worst"]) == 5


def test_evaluation_measures_bias_and_extrapolation() -> None:
    table = measured()
    table["latency_ms"] /= 1.25
    kernel = replace(TRUTH, valid={"tokens": (1, 1024)})
    scores = evaluate_kernel(table, PEAK, kernel, draws=DRAWS)
    assert scores["bias"] == pytest.approx(0.25)
    assert scores["median_ape"] == pytest.approx(0.25)
    assert scores["extrapolated"] == pytest.approx(0.25)


def test_a_fit_finds_a_kernel_as_good_as_the_true_one() -> None:
    fit = fit_kernel(measured(noise=0.02), PEAK, draws=DRAWS)
    assert fit.residuals["median_ape"] < 0.02
    assert evaluate_kernel(measured(), PEAK, fit.kernel, draws=DRAWS)["p90_ape"] < 0.03
    assert fit.kernel.valid == {"tokens": (1, 16384), "hidden": (2048, 4096), "intermediate": (768, 14336), "experts": (8, 128), "top_k": (2, 8)}
    assert fit_kernel(measured(noise=0.02), PEAK, draws=DRAWS) == fit


def test_a_fit_survives_wrong_rows() -> None:
    table = measured()
    table.loc[::12, "latency_ms"] *= 3
    assert evaluate_kernel(measured(), PEAK, fit_kernel(table, PEAK, draws=DRAWS).kernel, draws=DRAWS)["median_ape"] < 0.02


def test_a_processor_is_calibrated_as_a_loop() -> None:
    cpu = ComputePeak(flops=2e11, memory_Bps=2e10, cache_B=3e7, units=2)
    truth = ExpertKernel(name="vllm-loop", style="loop", dtype="bf16", launch_s=4e-5, flops_efficiency=0.5, memory_efficiency=0.6)
    table = measured(source="torch_loop")
    times = []
    for row in table.to_dict("records"):
        counts_DE = sample_counts(
            experts=row["num_experts"], top_k=row["topk"], tokens=row["num_tokens"], distribution=row["distribution"], draws=DRAWS
        )
        shape = {"hidden": row["hidden_size"], "intermediate": row["inter_size"], "gated": True, "top_k": row["topk"]}
        times.append(expert_time_s(counts_DE, peak=cpu, kernel=truth, warm_cache=True, **shape).time_s_N.mean() * 1e3)
    table["latency_ms"] = times
    fit = fit_kernel(table, cpu, draws=DRAWS)
    assert fit.kernel.style == "loop"
    assert fit.residuals["p90_ape"] < 0.05


def test_cross_validation_predicts_shapes_it_has_not_seen() -> None:
    found = cross_validate(measured(noise=0.01), PEAK, draws=DRAWS)
    assert found["overall"]["n"] == 48
    assert found["overall"]["median_ape"] < 0.05
    assert set(found["shape"]) == {"2048x768x8x128", "4096x2048x4x64", "4096x14336x2x8"}
    assert sum(part["n"] for part in found["tokens"].values()) == 48
    assert set(found["distribution"]) == {"balanced", "power_law_1.2"}


def test_kernels_with_one_shape_are_counted_not_scored() -> None:
    table = measured()
    other = measured(source="flashinfer_cutlass")[lambda rows: rows["num_experts"] == 8]
    mixed = pd.concat([table, other], ignore_index=True)
    assert cross_validate(mixed, PEAK, draws=DRAWS)["alone"] == len(other)
    assert set(split_kernels(mixed)) == {("vllm-triton", "bf16"), ("vllm-cutlass", "bf16")}
    with pytest.raises(InputError, match="mixes"):
        fit_kernel(mixed, PEAK)
    with pytest.raises(InputError, match="two shapes"):
        cross_validate(check_table(other), PEAK)


def test_rows_whose_counts_are_unknown_are_not_used() -> None:
    table = measured()
    table.loc[table["num_experts"] == 8, ["hidden_size", "inter_size", "topk", "num_experts"]] = [7168, 2048, 8, 256]
    assert evaluate_kernel(table, PEAK, TRUTH, draws=DRAWS)["unknown"] == 16
    with pytest.raises(InputError, match="known counts"):
        evaluate_kernel(table[table["num_experts"] == 256], PEAK, TRUTH)
    with pytest.raises(InputError, match="measure more"):
        fit_kernel(table[:5], PEAK)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match="dtype"):
        evaluate_kernel(measured(), PEAK, replace(TRUTH, dtype="fp8"))


@pytest.mark.parametrize(
    ("framework", "source", "dtype", "rows"),
    [
        ("vllm", "vllm_fp8moe_triton_tritonexperts", "fp8_block", (16, 64)),
        ("vllm", "modelopt_flashinfer_cutlass", "fp8", (128,)),
        ("vllm", "flashinfer_trtllm_fp8", "fp8", (8, 16, 32, 64)),
        ("sglang", "sglang_fused_moe_triton", "bfloat16", (16, 64)),
        ("sglang", "sglang_fused_moe_triton", "fp8_block", (64,)),
        ("own", "torch_grouped_mm", "bfloat16", (64,)),
    ],
)
def test_templates_follow_the_engines_tile_rules(framework: str, source: str, dtype: str, rows: tuple[int, ...]) -> None:
    table = check_table(measured().assign(framework=framework, kernel_source=source, moe_dtype=dtype))
    assert template_for(table).tile_rows == rows
    assert template_for(table).style == ("grouped" if "grouped" in source else "fused")


def test_a_fragment_is_a_profile_table() -> None:
    table = measured()
    fit = fit_kernel(table, PEAK, draws=DRAWS)
    held_out = cross_validate(table, PEAK, draws=DRAWS)["overall"]
    text = profile_fragment(fit, framework="vllm", version="0.24.0", source="synthetic rows", date="2026-11-22", held_out=held_out)
    (parsed,) = (KernelTable(**entry) for entry in tomllib.loads(text)["kernels"])
    assert parsed.parameters["tile_rows"] == [16, 32, 64, 128]
    assert parsed.parameters["overlap"] == pytest.approx(fit.kernel.overlap, rel=1e-3)
    assert parsed.residuals["held_out_n"] == 48
    assert tuple(parsed.valid["hidden"]) == (2048, 4096)


def test_rows_with_measured_counts_are_not_drawn() -> None:
    row = measured().iloc[[0]].assign(distribution="counts", num_tokens=4, topk=2, num_experts=3, counts="5 0 3")
    table = check_table(row)
    assert row_counts(table.to_dict("records")[0]).tolist() == [[5, 0, 3]]
    for wrong in ("5 0 2", "5 3", "5 0 x"):
        with pytest.raises(InputError, match="'counts', row 1"):
            check_table(row.assign(counts=wrong))


def test_kernels_that_never_read_weights_again_are_fitted_without_it() -> None:
    truth = ExpertKernel(name="vllm-cutlass", style="fused", dtype="bf16", tile_rows=(128,), tile_columns=1024, partial_tile=0.9, reread=0.0)
    table = measured(truth, source="flashinfer_cutlass")
    fit = fit_kernel(table, PEAK, draws=DRAWS)
    assert fit.kernel.reread == 0
    assert fit.kernel.partial_tile == pytest.approx(0.9, rel=0.3)
    assert fit.residuals["p90_ape"] < 0.03
