"""Shipped hardware profiles: they load, say where each number comes from, and agree with physics."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import ProfileError
from moesim.files import packaged, validated
from moesim.hardware import Device, cluster_names, device_names, load_cluster, load_device, load_links
from moesim.hardware.profile import collect_facts
from moesim.hardware.schema import DeviceFile

ROOT = packaged("hw_profiles")
CONFIDENCES = {"datasheet", "paper", "measured", "fitted", "empirical", "unverified", "assumed"}
NOT_NUMBERS = ("source", "confidence", "title", "name", "date", "version", "framework", "link", "device")
DEVICES = [
    "v100",
    "a100-40",
    "a100-80",
    "a40",
    "rtx-a5000",
    "rtx-3060",
    "rtx-4090",
    "h100-sxm",
    "h100-pcie",
    "h200",
    "b200",
    "gb200",
    "mi300x",
    "ascend-910b",
    "ascend-910c",
    "sn40l",
    "zcu104",
    "vcu1525",
    "u280",
    "cpu",
]
CLUSTER_SHAPE = {  # name -> (devices, nodes, spine oversubscription)
    "cpu": (4, 1, 1),
    "a100x8": (8, 1, 1),
    "h100x8": (8, 1, 1),
    "h200x8": (8, 1, 1),
    "b200x8": (8, 1, 1),
    "mi300x-8": (8, 1, 1),
    "rtx-4090x8-pcie": (8, 1, 1),
    "gb200-nvl72": (72, 1, 1),
    "cloudmatrix384": (384, 1, 1),
    "h100-4x8": (32, 4, 1),
    "h200-4x8": (32, 4, 1),
    "h200-4x8-o2": (32, 4, 2),
    "h100-64x8": (512, 64, 1),
    "h100-64x8-o4": (512, 64, 4),
    "b200-8x8": (64, 8, 1),
    "b200-8x8-o2": (64, 8, 2),
    "mixed-a100-h100": (16, 2, 1),
    "edge-u280": (2, 2, 1),
}
# Dense 16-bit multiply-adds of one unit and cycle, fp32 accumulation, from the vendors' architecture papers.
MATRIX_FMA = {
    "v100": 512,
    "a100-40": 1024,
    "a100-80": 1024,
    "a40": 512,
    "rtx-a5000": 512,
    "rtx-3060": 256,
    "rtx-4090": 256,
    "h100-sxm": 2048,
    "h100-pcie": 2048,
    "h200": 2048,
    "b200": 4096,
    "gb200": 4096,
    "mi300x": 1024,
    "ascend-910b": 4096,
    "ascend-910c": 4096,
}


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def numbers(data: Any, path: str = "$", provenance: tuple[Any, Any] = (None, None)) -> Iterator[tuple[str, Any, Any]]:
    """(path, source, confidence) of every number or quantity text; written apart from the loader's."""
    if isinstance(data, dict):
        provenance = (data.get("source", provenance[0]), data.get("confidence", provenance[1]))
        for key, value in data.items():
            if key not in NOT_NUMBERS:
                yield from numbers(value, path if key == "value" else f"{path}.{key}", provenance)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from numbers(value, f"{path}[{index}]", provenance)
    elif not isinstance(data, bool) and (isinstance(data, (int, float)) or re.match(r"[-+.]?\d", str(data))):
        yield path, *provenance


def sourced_tables(data: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(data, dict):
        if "source" in data and "value" not in data:
            yield path, data
        for key, value in data.items():
            yield from sourced_tables(value, f"{path}.{key}")
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from sourced_tables(value, f"{path}[{index}]")


def bandwidth(name: str) -> float:
    return load_device(name).memories[0].bandwidth_Bps


def matrix_flops(device: Device) -> float:
    return device.flops.get("bf16", device.flops.get("fp16", 0.0))


# provenance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("devices/*.toml")), ROOT / "links.toml"], ids=str)
def test_every_number_has_source_and_confidence(path: Path) -> None:
    found = list(numbers(read(path)))
    assert found
    for where, source, confidence in found:
        assert isinstance(source, str) and len(source) >= 4, where
        assert confidence in CONFIDENCES, where


@pytest.mark.parametrize("name", cluster_names())
def test_clusters_hold_no_facts_of_their_own_but_links(name: str) -> None:
    data = read(ROOT / "clusters" / f"{name}.toml")
    links = data.pop("links", {})
    assert all(source and confidence in CONFIDENCES for _, source, confidence in numbers(links))
    counts = {re.sub(r"\[\d+\]", "", where) for where, _, _ in numbers(data)}
    assert counts <= {"$.nodes.devices", "$.nodes.repeat", "$.network.oversubscription"}


@pytest.mark.parametrize("name", device_names())
def test_loaded_facts_are_the_numbers_of_the_file(name: str) -> None:
    data = read(ROOT / "devices" / f"{name}.toml")
    facts = {(fact.path, fact.source, fact.confidence) for fact in load_device(name).facts}
    assert facts == set(numbers(data))


@pytest.mark.parametrize("name", device_names())
def test_a_doubtful_source_is_never_called_a_datasheet(name: str) -> None:
    doubt = re.compile(r"secondary|not checked|no primary|no published|derived|ratio of|about")
    for fact in load_device(name).facts:
        assert not (fact.confidence == "datasheet" and doubt.search(fact.source)), fact


# physics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MATRIX_FMA))
def test_matrix_peak_is_dense_at_a_possible_clock(name: str) -> None:
    """peak = units x 2 FMA x clock; a 2:4 sparse or fp16-accumulation figure would need over 2.7 GHz."""
    device = load_device(name)
    assert device.units
    assert 1.3e9 < matrix_flops(device) / (device.units * 2 * MATRIX_FMA[name]) < 2.6e9


@pytest.mark.parametrize("name", device_names())
def test_narrower_types_keep_the_hardware_ratio(name: str) -> None:
    flops = load_device(name).flops
    if {"bf16", "fp16"} <= flops.keys():
        assert flops["bf16"] == flops["fp16"]
    if {"bf16", "fp8"} <= flops.keys():
        assert flops["fp8"] == pytest.approx(2 * flops["bf16"], rel=2e-3)
    if {"fp8", "fp4"} <= flops.keys():
        assert flops["fp4"] == pytest.approx(2 * flops["fp8"], rel=2e-3)
    if {"bf16", "fp32"} <= flops.keys():
        assert flops["fp32"] <= flops["bf16"]
    if {"bf16", "int8"} <= flops.keys() and load_device(name).kind != "fpga":
        ratio = 4 if name in ("rtx-3060", "rtx-4090") else 2  # GeForce halves fp32 accumulation
        assert flops["int8"] == pytest.approx(ratio * flops["bf16"], rel=2e-3)


@pytest.mark.parametrize("name", device_names())
def test_memories_run_from_fast_and_small_to_slow_and_large(name: str) -> None:
    memories = load_device(name).memories
    speeds, sizes = [m.bandwidth_Bps for m in memories], [m.capacity_B for m in memories]
    assert speeds == sorted(speeds, reverse=True)
    assert sizes == sorted(sizes)
    assert len({m.name for m in memories}) == len(memories)


@pytest.mark.parametrize("name", [n for n in DEVICES if n not in ("cpu", "zcu104", "vcu1525", "u280")])
def test_accelerators_need_reuse_to_reach_their_peak(name: str) -> None:
    """FLOP per byte of main memory at the roofline's ridge; a slip of a prefix is a factor of a thousand."""
    device = load_device(name)
    main = next(m for m in device.memories if m.name in ("hbm", "gddr"))
    assert 50 < matrix_flops(device) / main.bandwidth_Bps < 500
    assert device.power_W is None or 100 <= device.power_W <= 1500


def test_generations_only_get_faster() -> None:
    for older, newer in pairwise(("v100", "a100-40", "a100-80", "h100-sxm", "h200", "b200", "gb200")):
        assert bandwidth(older) < bandwidth(newer)
        assert matrix_flops(load_device(older)) <= matrix_flops(load_device(newer))
    assert load_device("h200").flops == load_device("h100-sxm").flops
    assert load_device("a100-40").flops == load_device("a100-80").flops
    assert bandwidth("h100-pcie") < bandwidth("h100-sxm")


def test_figures_people_get_wrong() -> None:
    assert load_device("h200").memories[0].capacity_B == 141e9
    assert load_device("h100-sxm").flops["bf16"] == 989e12
    assert [m.name for m in load_device("sn40l").memories] == ["sram", "hbm", "ddr"]
    hbm = load_device("u280").memories[0]
    assert hbm.channels == 32
    assert hbm.bandwidth_Bps == pytest.approx(32 * 14.375e9, rel=1e-3)
    assert "bf16" not in load_device("v100").flops


@pytest.mark.parametrize(("generation", "gigatransfers"), [(3, 8), (4, 16), (5, 32)])
def test_pcie_is_what_its_coding_leaves(generation: int, gigatransfers: int) -> None:
    expected = 16 * gigatransfers * 1e9 * 128 / 130 / 8
    assert load_links()[f"pcie{generation}-x16"].bandwidth_Bps == pytest.approx(expected, rel=1e-3)


def test_links_are_one_direction_of_one_port() -> None:
    links = load_links()
    for rate in (10, 25, 100, 400):
        assert links[f"ethernet-{rate}"].bandwidth_Bps == rate * 1e9 / 8
    rates = {"nvlink3": 300, "nvlink4": 450, "nvlink5": 900, "ib-hdr": 25, "ib-ndr": 50, "roce-400": 50}
    for name, gigabytes in rates.items():
        assert links[name].bandwidth_Bps == gigabytes * 1e9
    assert {"ascend-ub", "infinity-fabric", "shared-memory"} <= links.keys()
    assert all(1e-7 <= link.latency_s <= 1e-3 for link in links.values())


# files ---------------------------------------------------------------------------------------------


def test_all_promised_profiles_are_shipped() -> None:
    assert set(DEVICES) <= set(device_names())
    assert set(CLUSTER_SHAPE) <= set(cluster_names())


@pytest.mark.parametrize("name", device_names())
def test_device_is_named_after_its_file(name: str) -> None:
    assert load_device(name).name == name


@pytest.mark.parametrize("name", cluster_names())
def test_cluster_loads_and_is_connected(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    if name in CLUSTER_SHAPE:
        assert (cluster.size, cluster.nodes, cluster.oversubscription) == CLUSTER_SHAPE[name]
    assert np.all(np.diff(cluster.node_G) >= 0)
    seen, queue = {"g0"}, ["g0"]
    while queue:
        fresh = set(cluster.graph.successors(queue.pop())) - seen
        seen |= fresh
        queue += fresh
    assert {f"g{g}" for g in range(cluster.size)} <= seen
    if cluster.network and len({d.kind for d in cluster.devices}) == 1:
        assert all(port.bandwidth_Bps > cluster.network.bandwidth_Bps for port in cluster.intra_G)


def test_oversubscription_divides_the_spine_and_nothing_else() -> None:
    for name, factor in (("h200-4x8", 2), ("h100-64x8", 4), ("b200-8x8", 2)):
        full, thin = load_cluster(name), load_cluster(f"{name}-o{factor}")
        assert full.devices == thin.devices and full.intra_G == thin.intra_G and full.network == thin.network
        spine = [c.graph["rail0"]["spine"]["bandwidth_Bps"] for c in (full, thin)]
        assert spine[0] == factor * spine[1]
        assert full.digest != thin.digest


def test_clusters_name_their_unverified_numbers() -> None:
    weak = load_cluster("edge-u280").weak_facts
    assert "u280: $.memories[1].bandwidth = 38.5 GB/s (unverified)" in weak
    assert not any(fact.startswith("u280: $.memories[0]") for fact in weak)
    assert any(fact.startswith("link shared-memory") for fact in weak)
    assert not load_cluster("h100x8").weak_facts


# mistakes ------------------------------------------------------------------------------------------

BAD_DEVICE = """
name = "bad"
title = "Three mistakes"
kind = "gpu"

[compute]
source = "a datasheet"
confidence = "datasheet"
flops = { bf16 = "1 TFLOP/s" }
sparsity = 2

[[memories]]
name = "hbm"
capacity = "80 GiB"
bandwidth = "-3 TB/s"
confidence = "datasheet"
"""


def test_a_bad_file_reports_every_mistake_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(BAD_DEVICE)
    with pytest.raises(ProfileError) as caught:
        load_device(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "$.compute.sparsity: unknown key" in message
    assert "$.memories[0].bandwidth: must not be negative" in message
    assert "$.memories[0].source: missing" in message


@pytest.mark.parametrize(
    ("load", "names", "kind"),
    [(load_device, device_names, "device"), (load_cluster, cluster_names, "cluster")],
)
def test_an_unknown_name_lists_the_shipped_ones(load: Any, names: Any, kind: str) -> None:
    with pytest.raises(ProfileError, match=f"{kind} 'h1000' is not known") as caught:
        load("h1000")
    assert all(name in str(caught.value) for name in names())


def test_an_unknown_link_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "c"\ntitle = "t"\n[[nodes]]\ndevice = "cpu"\ndevices = 2\nlink = "nvlink9"\n')
    with pytest.raises(ProfileError, match=r"\$\.nodes\[0\]\.link: link 'nvlink9' is not known") as caught:
        load_cluster(path)
    assert all(name in str(caught.value) for name in load_links())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DEVICES), st.sampled_from(["source", "confidence"]), st.data())
def test_no_table_may_lose_its_provenance(name: str, key: str, data: st.DataObject) -> None:
    broken = copy.deepcopy(read(ROOT / "devices" / f"{name}.toml"))
    path, table = data.draw(st.sampled_from(list(sourced_tables(broken))))
    del table[key]
    with pytest.raises(ProfileError, match=re.escape(f"{path}.{key}: missing")):
        validated(DeviceFile, broken, place=name, error=ProfileError)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DEVICES),
    st.sampled_from(["capacity", "bandwidth"]),
    st.sampled_from(["-1 {}", "1 furlong", "0 {}", True]),
)
def test_a_quantity_must_be_positive_and_in_its_unit(name: str, key: str, wrong: Any) -> None:
    broken = copy.deepcopy(read(ROOT / "devices" / f"{name}.toml"))
    unit = "GB" if key == "capacity" else "GB/s"
    broken["memories"][-1][key] = wrong.format(unit) if isinstance(wrong, str) else wrong
    place = f"$.memories[{len(broken['memories']) - 1}].{key}"
    with pytest.raises(ProfileError, match=re.escape(place)):
        validated(DeviceFile, broken, place=name, error=ProfileError)


def test_collected_facts_take_the_nearest_provenance() -> None:
    inner = {"value": "1 GB", "source": "inner", "confidence": "assumed"}
    facts = collect_facts({"source": "outer", "confidence": "paper", "a": inner, "b": 2})
    found = [(fact.path, fact.source, fact.confidence) for fact in facts]
    assert found == [("$.a", "inner", "assumed"), ("$.b", "outer", "paper")]
