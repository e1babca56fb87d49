"""Clusters: provenance of every link number, hosts, NICs of their own, extra edges."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.cost import CostModel
from moesim.cost.fitted import device_ports
from moesim.errors import ProfileError
from moesim.hardware import cluster_names, load_cluster, load_hosts, load_links
from moesim.model import load_model

FILE = """
name = "mine"
title = "Two kinds of node"

[[nodes]]
device = "h100-sxm"
devices = 2
link = "nvlink4"
host = "dgx-h100"

[[nodes]]
device = "h100-sxm"
devices = 2
link = "nvlink4"
nic = "slow"
host = "own"

[network]
link = "ib-ndr"

[links.slow]
title = "An old card"
bandwidth = "10 GB/s"
latency = { value = "20 us", source = "made up", confidence = "assumed" }
source = "made up, too"
confidence = "datasheet"

[hosts.own]
title = "Little memory"
link = "slow"

[[hosts.own.memories]]
name = "ddr"
capacity = "64 GB"
bandwidth = "50 GB/s"
source = "made up"
confidence = "unverified"

[[edges]]
between = ["g0", "g3"]
link = "pcie5-x16"
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    return path


def test_every_number_of_a_link_keeps_its_own_provenance() -> None:
    facts = {fact.path: (fact.value, fact.confidence) for fact in load_links()["pcie3-x16"].facts}
    assert facts == {"$.bandwidth": ("15.75 GB/s", "datasheet"), "$.latency": ("10 us", "assumed")}
    assert [fact.path for fact in load_links()["pcie3-x16"].weak_facts] == ["$.latency"]
    assert "link pcie3-x16: $.latency = 10 us (assumed)" in load_cluster("edge-u280").weak_facts


def test_shipped_hosts_feed_the_shipped_clusters() -> None:
    for name in cluster_names():
        cluster = load_cluster(name)
        assert cluster.host_G == () or len(cluster.host_G) == cluster.size
    host = load_cluster("h200-4x8").host(31)
    assert host is load_hosts()["dgx-h100"] or host == load_hosts()["dgx-h100"]
    assert host is not None
    assert host.memories[0].bandwidth_Bps == 2 * 8 * 8 * 4800e6
    assert load_cluster("edge-u280").host(0) is None
    assert not load_cluster("h100x8").weak_facts


def test_a_node_may_have_its_own_nic_and_host(mine: Path) -> None:
    cluster = load_cluster(mine)
    assert [nic.name for nic in cluster.nic_G] == ["ib-ndr", "ib-ndr", "slow", "slow"]
    assert [host.name for host in cluster.host_G if host] == ["dgx-h100", "dgx-h100", "own", "own"]
    graph = cluster.graph
    assert graph["g2"]["rail0"]["bandwidth_Bps"] == 10e9
    assert graph["rail0"]["spine"]["bandwidth_Bps"] == 60e9
    assert graph["g0"]["g3"]["link"] == graph["g3"]["g0"]["link"] == "pcie5-x16"
    assert "link slow: $.latency = 20 us (assumed)" in cluster.weak_facts
    assert "host own: $.memories[0].capacity = 64 GB (unverified)" in cluster.weak_facts
    ports, notes = device_ports(cluster, "nccl")
    assert ports.nic is not None
    assert ports.nic.bandwidth_Bps == 10e9
    assert any("slowest port, slow" in note for note in notes)
    assert CostModel.of(cluster, load_model("olmoe-1b-7b")).transport == "deepep-normal"
    assert cluster.digest != load_cluster("h100x8").digest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"dgx-h100"', '"dgx-h1"', r"\$\.nodes\[0\]\.host: host 'dgx-h1' is not known.*dgx-h100"),
        ('nic = "slow"', 'nic = "slower"', r"\$\.nodes\[1\]\.nic: link 'slower' is not known"),
        ('"g0", "g3"', '"g0", "g4"', r"\$\.edges: g4 is no place of the graph; places are g0"),
        ('[[edges]]\nbetween = ["g0", "g3"]\nlink = "pcie5', '[[edges]]\nbetween = ["g0", "g3"]\nlink = "pcie9', r"\$\.edges\[0\]\.link"),
        ('link = "slow"\n\n[[hosts', 'link = "none"\n\n[[hosts', "host 'own': link 'none' is not known"),
    ],
)
def test_mistakes_are_named_with_their_place(mine: Path, old: str, new: str, message: str) -> None:
    assert old in FILE
    mine.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ProfileError, match=message):
        load_cluster(mine)


def test_a_nic_needs_a_network(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "c"\ntitle = "t"\n[[nodes]]\ndevice = "cpu"\ndevices = 2\nlink = "shared-memory"\nnic = "ib-ndr"\n')
    with pytest.raises(ProfileError, match=r"no \[network\]"):
        load_cluster(path)


def test_every_number_of_a_host_says_where_it_comes_from() -> None:
    for host in load_hosts().values():
        assert host.facts
        for fact in host.facts:
            assert len(fact.source) >= 4, (host.name, fact.path)
            assert fact.confidence, (host.name, fact.path)
        assert host.memories[0].bandwidth_Bps > host.link.bandwidth_Bps
