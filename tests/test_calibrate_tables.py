"""`moesim calibrate --from`: tables are recognised, fitted into profiles, and shipped parameters judged by them."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from moesim.calibrate.evaluate import evaluate, pick_kernel
from moesim.calibrate.fit import fit_tables, profile_text
from moesim.calibrate.kernel_tables import sample_counts
from moesim.calibrate.networks import read_deepep
from moesim.calibrate.tables import load, nccl_points, shipped_device
from moesim.cli import app
from moesim.cost.collectives import CollectiveCurve, collective, pick_curve
from moesim.cost.experts import ExpertKernel, expert_time_s
from moesim.cost.fitted import deepep_ports, device_peak, kernels_for, scaled_kernel
from moesim.errors import InputError, ProfileError
from moesim.hardware import load_device

SHAPES = ((2048, 768, 8, 128), (4096, 2048, 4, 64))


def kernel_rows(profile: str, device: str, *, gated: bool = True, slower: float = 1.0, source: str = "vllm_x_triton_y") -> pd.DataFrame:
    """What the parameters of `profile` give on the peaks of `device`, as a table."""
    kernel = ExpertKernel.from_profile(next(fit for fit in load_device(profile).kernels if fit.attributes["dtype"] == "bf16"))
    named = {"h100-sxm": "h100_sxm", "h200": "h200_sxm", "a100-80": "a100_sxm", "gb200": "gb200"}
    home, peak = (device_peak(load_device(name), "bf16")[0] for name in (profile, device))
    kernel = scaled_kernel(kernel, home, peak)
    rows = []
    for hidden, width, top_k, experts in SHAPES:
        for tokens in (1, 4, 16, 64, 256, 1024, 8192):
            for distribution in ("balanced", "power_law_1.2"):
                counts = sample_counts(experts=experts, top_k=top_k, tokens=tokens, distribution=distribution)
                shape = {"hidden": hidden, "intermediate": width, "gated": gated, "top_k": top_k}
                found = expert_time_s(counts, **shape, peak=peak, kernel=kernel, warm_cache=True)
                rows.append({
                    "device": named[device], "framework": "vllm", "version": "9.9", "kernel_source": source, "moe_dtype": "bfloat16",
                    "num_tokens": tokens, "hidden_size": hidden, "inter_size": width, "topk": top_k, "num_experts": experts,
                    "distribution": distribution, "latency_ms": float(found.time_s_N.mean()) * 1e3 * slower,
                })  # fmt: skip
    return pd.DataFrame(rows)


def nccl_rows(profile: str = "h200", device: str = "h200_sxm", version: str = "2.29.2") -> pd.DataFrame:
    curves = [curve for fit in load_device(profile).collectives if isinstance(curve := collective(fit), CollectiveCurve)]
    rows = []
    for op in ("all_to_all", "all_reduce"):
        for ranks in (2, 4, 8):
            curve = pick_curve(curves, op=op, ranks=ranks)
            for size in 2.0 ** np.arange(11, 29):
                seconds = float(curve.time_s(size, ranks=ranks)[0])
                rows += [
                    {"device": device, "nccl_version": version, "op": op, "dtype": "half", "num_gpus": ranks, "repeat": i,
                     "message_elements": size / 2, "bytes": size, "latency_ms": seconds * 1e3 * factor}
                    for i, factor in enumerate((0.99, 1.0, 1.3))
                ]  # fmt: skip
    return pd.DataFrame(rows)


def deepep_rows() -> pd.DataFrame:
    """Exchanges in DeepEP's columns, times to be filled in."""
    ways = (("dispatch", "fp8"), ("combine", "bf16"))
    base = {"gpu": "H800", "mode": "low_latency", "gpus_per_node": 8, "tokens_per_rank": 128, "hidden": 7168, "topk": 8, "topk_groups": ""}
    rows = [base | {"ep_size": n, "op": op, "dtype": d, "bandwidth_GBps": 1, "latency_us": 1} for n in (8, 16, 32) for op, d in ways]
    return pd.DataFrame(rows)


def write(path: Path, table: pd.DataFrame) -> Path:
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["calibrate", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        return 2, done.stdout, str(done.exception)
    return done.exit_code, done.stdout, done.stderr


# evaluation ----------------------------------------------------------------------------------------


def test_a_table_of_the_parameters_themselves_has_no_error(tmp_path: Path) -> None:
    found = evaluate([write(tmp_path / "t.csv", kernel_rows("h100-sxm", "h100-sxm"))], "h100-sxm")
    assert found["n"] == 28
    assert found["median_ape"] < 1e-9
    assert found["groups"].keys() == {"bf16/vllm-triton"}
    assert found["used"] == [{"table": "vllm-triton", "dtype": "bf16", "parameters": "vllm-triton", "how": "by name", "rows": 28}]
    slower = evaluate([write(tmp_path / "s.parquet", kernel_rows("h100-sxm", "h100-sxm", slower=2.0))], "h100-sxm")
    assert slower["bias"] == pytest.approx(-0.5)
    assert slower["worst"][0]["error"] == pytest.approx(-0.5)


def test_a_sibling_lends_its_parameters_and_the_tables_device_its_peaks(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", kernel_rows("h100-sxm", "a100-80"))
    found = evaluate([path], "h100-sxm")
    assert found["mape"] < 1e-9
    assert "rows of vllm 9.9 are predicted with vllm-triton as fitted to vllm 0.24.0" in found["notes"]
    assert "device 'a100_sxm': peaks and links of a100-80, parameters of h100-sxm" in found["notes"]
    unknown = write(tmp_path / "u.csv", pd.read_csv(path).assign(device="tpu_v9"))
    strange = evaluate([unknown], "h100-sxm")
    assert strange["mape"] > 0.1
    assert any("'tpu_v9' ships no profile" in note for note in strange["notes"])


def test_unknown_kernels_are_served_by_the_nearest_and_counted(tmp_path: Path) -> None:
    table = kernel_rows("h100-sxm", "h100-sxm", source="brand_new").drop(columns=["framework", "version", "device"])
    found = evaluate([write(tmp_path / "t.csv", table.assign(extra=1))], "h100-sxm")
    assert found["used"][0]["how"] == "first: no such kernel"
    assert found["mape"] < 1e-9
    assert "no column framework: the first kernel taken" in found["notes"]
    renamed = table.rename(columns={"latency_ms": "latency"}).drop(columns=["distribution", "kernel_source"])
    assert "no column distribution: balanced loads taken" in evaluate([write(tmp_path / "r.csv", renamed)], "h100-sxm")["notes"]


def named(name: str, **facts: object) -> ExpertKernel:
    return ExpertKernel(name=name, style="fused", dtype="bf16", **facts)  # type: ignore[arg-type]


def test_a_kernel_is_picked_by_name_then_by_code_and_keeps_its_parameters_under_other_tiles() -> None:
    kernels, _ = kernels_for(load_device("h200"), "bf16")
    by_name = {kernel.name: kernel for kernel in kernels}
    assert pick_kernel(kernels, named("vllm-cutlass")) == (by_name["sglang-cutlass"], "same code in another framework")
    kernel, how = pick_kernel(kernels, named("sglang-triton", tile_rows=(32,), tuned=(8, 512)))
    assert (kernel, how) == (
        replace(by_name["sglang-triton"], tile_rows=(32,), by_tokens_per_expert=(), tile_columns=128, tile_groups=(1,), tuned=(8, 512)),
        "by name",
    )
    assert pick_kernel(kernels, named("vllm-trtllm"))[1] == "typical: no such kernel, not calibrated"
    assert pick_kernel(kernels, named("vllm-marlin")) == (kernels[0], "first: no such kernel")


def test_tiles_follow_the_version_of_the_engine(tmp_path: Path) -> None:
    table = kernel_rows("h100-sxm", "a100-80")
    used = {}
    for version, source in (("0.14.0", "vllm_fused_moe"), ("0.14", ""), ("0.24.0", "vllm_fused_moe"), ("nightly", "x_triton_y")):
        found = evaluate([write(tmp_path / f"{version}.csv", table.assign(version=version, kernel_source=source))], "a100-80")
        used[version] = found["used"][0]["parameters"]
        assert any(note.startswith("not calibrated: a100-80 has no fitted bf16 expert kernel; those of h200 are scaled") for note in found["notes"])
    assert used == {"0.14.0": "sglang-triton", "0.14": "sglang-triton", "0.24.0": "vllm-triton", "nightly": "vllm-triton"}


def test_rows_that_cannot_be_judged_are_counted(tmp_path: Path) -> None:
    good = kernel_rows("h100-sxm", "h100-sxm")
    odd = [good.assign(moe_dtype="nvfp5"), good.assign(distribution="zipf"), good.assign(hidden_size=7168, inter_size=2048, topk=8, num_experts=256)]
    table = pd.concat([good.assign(moe_tp_size=1), *(each.assign(moe_tp_size=1) for each in odd), good.assign(moe_tp_size=4)])
    found = evaluate([write(tmp_path / "t.csv", table)], "h100-sxm")
    assert found["n"] == 28
    assert found["left_out"] == {
        "dtype nvfp5 unknown": 28, "distribution unknown": 28, "token counts unknown (group-limited routing)": 28, "moe_tp_size not 1": 28,
    }  # fmt: skip


def test_plain_experts_are_told_where_columns_do_not(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", kernel_rows("h100-sxm", "h100-sxm", gated=False))
    assert evaluate([path], "h100-sxm", gated=False)["mape"] < 1e-9
    assert evaluate([path], "h100-sxm")["mape"] > 0.1


def test_a_profile_without_parameters_lists_what_it_has(tmp_path: Path) -> None:
    kernels = write(tmp_path / "k.csv", kernel_rows("h100-sxm", "h100-sxm").assign(moe_dtype="int4"))
    with pytest.raises(ProfileError, match=r"serves no row \(28 rows: no int4 kernel in h100-sxm\); it has kernels: vllm-triton\[bf16\]"):
        evaluate([kernels], "h100-sxm")


def test_collectives_are_judged_on_medians_and_scaled_to_the_tables_device(tmp_path: Path) -> None:
    found = evaluate([write(tmp_path / "n.csv", nccl_rows())], "h200")
    assert found["n"] == 2 * 3 * 18
    assert found["mape"] < 1e-9
    assert "all_reduce/8 ranks" in found["groups"]
    other = evaluate([write(tmp_path / "b.csv", nccl_rows(device="b200_sxm").drop(columns="bytes"))], "h200")
    assert other["mape"] > 0.05
    assert any("port x 2" in note for note in other["notes"])
    assert evaluate([tmp_path / "b.csv"], "b200")["mape"] == pytest.approx(other["mape"])  # b200 was not measured
    mixed = pd.concat([nccl_rows(), nccl_rows(version="2.23"), nccl_rows().assign(op="gossip")])
    assert evaluate([write(tmp_path / "m.parquet", mixed)], "h200")["left_out"] == {
        "op not of all_to_all, all_gather, reduce_scatter, all_reduce": 324, "NCCL version not 2.29.2": 324,
    }  # fmt: skip
    old = evaluate([write(tmp_path / "o.csv", nccl_rows(version="2.23"))], "h200")
    assert old["n"] == 108
    assert any("NCCL 2.23" in note for note in old["notes"])


def test_deepep_tables_are_judged_by_mode(tmp_path: Path) -> None:
    table = deepep_rows()
    exchanges = read_deepep(write(tmp_path / "d.csv", table))
    ports, _ = deepep_ports(load_device("h100-sxm"), "deepep-low-latency")
    table["latency_us"] = [float(each.predict(ports).time_s_N) * 1e6 for each in exchanges]
    found = evaluate([write(tmp_path / "d.csv", table)], "h100-sxm")
    assert found["mape"] < 1e-6
    assert "low_latency/dispatch/16 ranks" in found["groups"]
    both = evaluate([tmp_path / "d.csv", write(tmp_path / "n.csv", nccl_rows())], "h200")
    assert both["n"] == 6 + 108


def test_bad_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are those of no known table; known are kernels: moe_dtype"):
        load(write(tmp_path / "x.csv", pd.DataFrame({"a": [1]})))
    with pytest.raises(InputError, match="not '.json'"):
        load(tmp_path / "x.json")
    with pytest.raises(InputError, match="readable"):
        load(tmp_path / "absent.csv")
    for change, message in (({"latency_ms": -1.0}, "'latency_ms', row 1"), ({"num_gpus": 1}, "'num_gpus', row 1.*>= 2")):
        with pytest.raises(InputError, match=message):
            nccl_points(nccl_rows().assign(**change), place="t")
    assert shipped_device("h100_sxm") == load_device("h100-sxm")
    assert shipped_device("abacus") is None


SPELLINGS = {
    "columns in another order": lambda t: t[t.columns[::-1]],
    "spaces around names": lambda t: t.rename(columns=lambda name: f" {name} "),
    "torch's name of the dtype": lambda t: t.assign(moe_dtype="torch.bfloat16"),
    "capitals": lambda t: t.assign(moe_dtype="BF16", device="H100_SXM"),
    "gated as 0 and 1": lambda t: t.assign(gated=1),
    "no parallel sizes": lambda t: t.assign(moe_tp_size=np.nan, moe_ep_size=1.0),
    "unnamed version and framework": lambda t: t.assign(framework=np.nan, version=np.nan),
    "rows that are no token counts": lambda t: pd.concat([t, t.head(1).assign(distribution=np.nan)]),
}


@pytest.mark.parametrize("what", SPELLINGS)
def test_odd_spellings_mean_the_same(tmp_path: Path, what: str) -> None:
    found = evaluate([write(tmp_path / "t.csv", SPELLINGS[what](kernel_rows("h100-sxm", "h100-sxm")))], "h100-sxm")
    assert found["n"] == 28
    assert found["mape"] < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 10**15}, "'num_tokens', row 1: '1000000000000000' is not a whole number from 1 to 1000000000"),
        ({"num_experts": 10**8}, "'num_experts', row 1.*from 1 to 65535"),
        ({"num_tokens": np.nan}, "'num_tokens', row 1: 'nan'"),
        ({"latency_ms": np.inf}, "'latency_ms', row 1: 'inf' is not a positive time"),
        ({"gated": "yes"}, "'gated', row 1: 'yes' is not true or false"),
        ({"distribution": "power_law_1e308"}, "none of 28 rows can be judged.*distribution unknown"),
        ({"moe_tp_size": "four"}, "none of 28 rows can be judged.*moe_tp_size not 1"),
        ({"moe_dtype": np.nan}, "serves no row .28 rows: dtype not named unknown"),
    ],
)
def test_hostile_tables_are_named_and_cost_no_memory(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises((InputError, ProfileError), match=message):
        evaluate([write(tmp_path / "t.csv", kernel_rows("h100-sxm", "h100-sxm").assign(**change))], "h100-sxm")


def test_a_batch_of_a_billion_tokens_is_judged_without_drawing_them(tmp_path: Path) -> None:
    found = evaluate([write(tmp_path / "t.csv", kernel_rows("h100-sxm", "h100-sxm").assign(num_tokens=10**9))], "h100-sxm")
    assert found["extrapolated"] == 28
    assert np.isfinite(found["mape"])


# fits ----------------------------------------------------------------------------------------------


def test_a_fit_writes_a_profile_that_evaluates_well(tmp_path: Path) -> None:
    reductions = nccl_rows().query("op == 'all_reduce' and num_gpus == 8")
    tables = [write(tmp_path / "k.csv", kernel_rows("h200", "h200", slower=1.5)), write(tmp_path / "n.csv", reductions)]
    out = tmp_path / "mine.toml"
    code, text, _ = run("--from", tables[0], "--from", tables[1], "-o", out)
    assert code == 0, text
    device = load_device(out)
    assert (device.name, device.flops, device.memories) == ("mine", load_device("h200").flops, load_device("h200").memories)
    fit = next(fit for fit in device.kernels if fit.name == "vllm-triton" and fit.attributes["dtype"] == "bf16")
    assert fit.residuals["n"] == 28
    assert "held_out_median_ape" in fit.residuals
    assert fit.valid["hidden"] == [2048, 4096]
    assert len([each for each in device.collectives if each.attributes["op"] == "all_reduce"]) == 1  # the two it had are replaced
    assert {each.name for each in device.collectives} >= {"nccl", "deepep-normal"}
    assert evaluate(tables[:1], out)["median_ape"] < 0.05
    assert evaluate(tables[:1], "h200")["median_ape"] > 0.2
    assert evaluate(tables[1:], out)["median_ape"] < 0.05
    assert run("--from", tables[0], "-o", out)[0] != 0  # exists


def test_a_table_that_names_no_device_needs_one(tmp_path: Path) -> None:
    path = write(tmp_path / "k.csv", kernel_rows("h100-sxm", "h100-sxm").drop(columns="device"))
    with pytest.raises(InputError, match="say --device-profile"):
        fit_tables([path], name="x")
    text, summary = fit_tables([path], name="x", device_profile="h100-sxm", gated=True)
    assert summary["facts_of"] == "h100-sxm"
    assert tomllib.loads(text)["name"] == "x"


def test_profiles_survive_being_written_again() -> None:
    for name in ("b200", "cpu", "sn40l"):
        path = Path(__file__).parents[1] / "hw_profiles" / "devices" / f"{name}.toml"
        data = tomllib.loads(path.read_text())
        assert tomllib.loads(profile_text(data)) == data


# command line --------------------------------------------------------------------------------------


def test_evaluation_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "k.csv", kernel_rows("h100-sxm", "h100-sxm", gated=False, slower=1.1))
    out = tmp_path / "scores.json"
    code, text, _ = run("--from", path, "--profile", "h100-sxm", "--evaluate", "--plain", "--json", "-o", out)
    assert code == 0
    found = json.loads(text)
    assert found["median_ape"] == pytest.approx(1 - 1 / 1.1)
    assert {"n", "median_ape", "p90_ape", "mape", "bias", "worst", "extrapolated", "groups"} <= set(found)
    assert json.loads(out.read_text())["n"] == found["n"]
    code, text, err = run("--from", path, "--profile", "h100-sxm", "--evaluate", "--plain")
    assert code == 0
    assert "nothing was fitted" in text
    assert "predicted with vllm-triton" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate"], "--evaluate needs --from FILE and --profile"),
        (["--from", "x.csv", "--device", "cpu"], "drop --device"),
        (["--from", "x.csv", "--profile", "h200"], "add --evaluate"),
        (["--profile", "h200"], "go with --from"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], message: str) -> None:
    code, _, err = run(*arguments)
    assert code != 0
    assert message in err
