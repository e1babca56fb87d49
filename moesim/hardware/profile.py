"""Device and link profiles: what a datasheet, a paper or a measurement says, each number with its source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import ProfileError
from moesim.files import packaged, read_toml, validated

if TYPE_CHECKING:
    from moesim.hardware.schema import FittedTable, HostTable, LinkTable, MemoryTable

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
WEAK = ("unverified", "assumed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One number of a profile: `path` in the file, the value as written, where it comes from."""

    path: str
    value: str
    source: str
    confidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """One memory tier of a device."""

    name: str
    capacity_B: float
    bandwidth_Bps: float
    channels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Parameters of a cost function fitted to measurements. `kind` is "kernel" or "collective"."""

    kind: str
    name: str
    attributes: Mapping[str, Any]  # kernel: style, dtype, framework, version; collective: op, form, ranks
    parameters: Mapping[str, Any]
    residuals: Mapping[str, float]
    valid: Mapping[str, list[Any]]
    source: str
    date: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator or host. `flops` are dense peaks by dtype; `memories` fastest first."""

    name: str
    title: str
    kind: str
    flops: Mapping[str, float]
    units: int | None
    cache_B: float | None
    memories: tuple[Memory, ...]
    power_W: float | None
    rent_per_hour: float | None
    kernels: tuple[Fitted, ...]
    collectives: tuple[Fitted, ...]
    facts: tuple[Fact, ...] = field(repr=False)
    link: str = ""  # scale-up port by name, as its collectives were measured with

    @property
    def weak_facts(self) -> tuple[Fact, ...]:
        """Numbers nobody has verified; results that use the device show them."""
        return tuple(fact for fact in self.facts if fact.confidence in WEAK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One port: bandwidth per direction, latency per message."""

    name: str
    title: str
    bandwidth_Bps: float
    latency_s: float
    facts: tuple[Fact, ...] = field(repr=False)

    @property
    def weak_facts(self) -> tuple[Fact, ...]:
        """Numbers nobody has verified."""
        return tuple(fact for fact in self.facts if fact.confidence in WEAK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What feeds the devices of a node: memories, fastest first; each device has one slot (`link`) to them."""

    name: str
    title: str
    memories: tuple[Memory, ...]
    link: Link
    facts: tuple[Fact, ...] = field(repr=False)

    @property
    def weak_facts(self) -> tuple[Fact, ...]:
        """Numbers nobody has verified, those of its slot aside."""
        return tuple(fact for fact in self.facts if fact.confidence in WEAK)


def device_names() -> list[str]:
    """Names of the packaged device profiles."""
    return _names("devices")


def cluster_names() -> list[str]:
    """Names of the packaged clusters."""
    return _names("clusters")


def _names(kind: str) -> list[str]:
    return sorted(path.stem for path in (packaged("hw_profiles") / kind).glob("*.toml"))


def find(kind: str, name: str | Path, known: list[str]) -> Path:
    """File of a packaged profile by name, or of a user's by path (anything with a separator or a .toml suffix)."""
    text = str(name)
    if text.endswith(".toml") or "/" in text or "\\" in text:
        return Path(text)
    if text not in known or not _NAME.fullmatch(text):
        raise ProfileError(f"{kind.removesuffix('s')} {text!r} is not known; shipped: {', '.join(known)}; or give the path of a .toml file")
    return packaged("hw_profiles") / kind / f"{text}.toml"


def load_device(name: str | Path) -> Device:
    """A device by packaged name or by path; ProfileError lists every mistake in the file."""
    path = find("devices", name, device_names())
    from moesim.hardware.schema import DeviceFile

    data = read_toml(path, ProfileError)
    parsed = validated(DeviceFile, data, place=str(path), error=ProfileError)
    return Device(
        name=parsed.name,
        title=parsed.title,
        kind=parsed.kind,
        flops={str(dtype): rate for dtype, rate in parsed.compute.flops.items()},
        units=parsed.compute.units,
        cache_B=parsed.compute.cache,
        memories=_memories(parsed.memories),
        power_W=parsed.power.board if parsed.power else None,
        rent_per_hour=parsed.price.rent if parsed.price else None,
        kernels=tuple(_fitted("kernel", table) for table in parsed.kernels),
        collectives=tuple(_fitted("collective", table) for table in parsed.collectives),
        facts=tuple(collect_facts(data)),
        link=parsed.link,
    )


def _memories(tables: Iterable[MemoryTable]) -> tuple[Memory, ...]:
    return tuple(Memory(name=m.name, capacity_B=m.capacity, bandwidth_Bps=m.bandwidth, channels=m.channels) for m in tables)


def _fitted(kind: str, table: FittedTable) -> Fitted:
    common = {"name", "date", "parameters", "residuals", "valid", "source", "confidence"}
    return Fitted(
        kind=kind,
        name=table.name,
        attributes=table.model_dump(exclude=common),
        parameters=table.parameters,
        residuals=table.residuals,
        valid=table.valid,
        source=table.source,
        date=table.date,
    )


@cache
def load_links() -> dict[str, Link]:
    """Every packaged link by name (`hw_profiles/links.toml`)."""
    from moesim.hardware.schema import LinkTable

    tables, data = _named_tables("links", LinkTable)
    return {name: make_link(name, table, data[name]) for name, table in tables.items()}


@cache
def load_hosts() -> dict[str, Host]:
    """Every packaged host by name (`hw_profiles/hosts.toml`)."""
    from moesim.hardware.schema import HostTable

    tables, data = _named_tables("hosts", HostTable)
    return {name: make_host(name, table, data[name], load_links()) for name, table in tables.items()}


def _named_tables(kind: str, schema: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    from pydantic import RootModel

    path = packaged("hw_profiles") / f"{kind}.toml"
    data = read_toml(path, ProfileError)
    return validated(RootModel[dict[str, schema]], data, place=str(path), error=ProfileError).root, data


def make_link(name: str, table: LinkTable, data: Mapping[str, Any]) -> Link:
    """Link of a validated table; `data` is the table as written, for the provenance of each number."""
    return Link(name=name, title=table.title, bandwidth_Bps=table.bandwidth, latency_s=table.latency, facts=tuple(collect_facts(data)))


def make_host(name: str, table: HostTable, data: Mapping[str, Any], links: Mapping[str, Link]) -> Host:
    """Host of a validated table; ProfileError when its slot is no known link."""
    if table.link not in links:
        raise ProfileError(f"host {name!r}: link {table.link!r} is not known; known: {', '.join(sorted(links))}")
    return Host(name=name, title=table.title, memories=_memories(table.memories), link=links[table.link], facts=tuple(collect_facts(data)))


def collect_facts(data: Any, path: str = "$", source: str = "", confidence: str = "") -> Iterator[Fact]:
    """Every number of a parsed profile with the nearest enclosing source and confidence."""
    if isinstance(data, Mapping):
        source, confidence = str(data.get("source", source)), str(data.get("confidence", confidence))
        if "value" in data:
            yield Fact(path=path, value=str(data["value"]), source=source, confidence=confidence)
            return
        for key, value in data.items():
            if key not in ("source", "confidence", "date", "version", "title", "name", "link"):
                yield from collect_facts(value, f"{path}.{key}", source, confidence)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from collect_facts(value, f"{path}[{index}]", source, confidence)
    elif not isinstance(data, bool) and (isinstance(data, (int, float)) or (isinstance(data, str) and data[:1].isdigit())):
        yield Fact(path=path, value=str(data), source=source, confidence=confidence)
