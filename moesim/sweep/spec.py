"""Spec: the TOML file of a sweep, and the cases it stands for.

    kind = "simulate"            what a case does: one of `moesim.sweep.kinds.KINDS`
    title = "…"                  optional
    [grid]                       every combination of these values; one value or a list of them
    trace = "traces/run1"
    solver = ["eplb", "local-search"]
    [[cases]]                    each of these with every combination of the grid; optional
    cluster = "h100x8"

Paths are relative to the folder of the spec.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic import ValidationError as Mistakes

from moesim.errors import InputError
from moesim.files import digest, read_toml, validated
from moesim.sweep.fields import Fields, sources
from moesim.sweep.kinds import KINDS, Kind

MOST_CASES = 1_000_000
MOST_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to do: `fields` say what, `content` is the same with files named by what they hold; `id` names that content."""

    kind: str
    fields: Mapping[str, Any]
    content: Mapping[str, Any]

    @cached_property
    def id(self) -> str:
        """16 hex digits: same inputs, same version of moesim, same id."""
        return digest(json.dumps([self.kind, self.content, version("moesim")], sort_keys=True))


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A sweep: its cases in order, each once, and the fields in which they differ."""

    kind: str
    title: str
    cases: tuple[Case, ...]

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Names of the fields that have more than one value."""
        first = self.cases[0].fields
        return tuple(name for name in first if any(case.fields[name] != first[name] for case in self.cases))


class _Head(BaseModel):
    """Enough of a file to know what the rest may be."""

    model_config = ConfigDict(strict=True)
    kind: Literal[tuple(KINDS)]  # type: ignore[valid-type]


def load_spec(path: str | Path) -> Spec:
    """The sweep in a TOML file; InputError lists every mistake with its path in the file."""
    file = Path(path)
    return as_spec(read_toml(file, InputError), root=file.resolve().parent, place=str(file))


def as_spec(data: Mapping[str, Any], *, root: Path, place: str = "spec") -> Spec:
    """The sweep that `data` describes; relative paths start at `root`. Raises InputError, listing every mistake."""
    kind = KINDS[validated(_Head, data, place=place, error=InputError).kind]
    parsed: Any = validated(_file_of(kind), data, place=place, error=InputError)
    grid: dict[str, list[Any]] = parsed.grid.model_dump(exclude_unset=True)
    listed: list[dict[str, Any]] = [case.model_dump(exclude_unset=True) for case in parsed.cases] or [{}]
    problems = [f"$.cases[{i}].{name}: is in the grid, too; give it once" for i, case in enumerate(listed) for name in case if name in grid]
    count = len(listed)
    for choices in grid.values():
        count *= len(choices)
    if count > MOST_CASES:
        problems.append(f"$.grid: {count:,} cases are more than {MOST_CASES:,}; give fewer values")
    if problems:
        raise InputError(f"{place}: {'; '.join(problems)}")
    cases: dict[str, Case] = {}
    names: dict[tuple[str, str], str] = {}
    for values in _combinations(grid, listed):
        case = _case(kind, values, root, names, problems)
        if case is not None:
            cases.setdefault(case.id, case)
    if problems:
        shown = list(dict.fromkeys(problems))
        more = f"; and {len(shown) - MOST_SHOWN} more" if len(shown) > MOST_SHOWN else ""
        raise InputError(f"{place}: {'; '.join(shown[:MOST_SHOWN])}{more}")
    return Spec(kind=kind.name, title=parsed.title, cases=tuple(cases.values()))


def _combinations(grid: Mapping[str, Sequence[Any]], listed: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for case in listed:
        for values in product(*grid.values()):
            yield {**dict(zip(grid, values, strict=True)), **case}


def _case(kind: Kind, values: dict[str, Any], root: Path, names: dict[tuple[str, str], str], problems: list[str]) -> Case | None:
    """One case; None when it has mistakes, which go to `problems`. `names` keeps the content of values that were seen before."""
    try:
        fields = kind.fields.model_validate(values).model_dump()
    except Mistakes as mistakes:
        for item in mistakes.errors(include_url=False):
            where = f"$.grid.{item['loc'][0]}" if item["loc"] else "$"
            problems.append(f"{where}: {'missing' if item['type'] == 'missing' else item['msg'].removeprefix('Value error, ')}")
        return None
    content, sound = dict(fields), True
    for name, source in sources(kind.fields):
        if (value := fields[name]) is None:
            continue
        fields[name] = source.resolve(value, root)
        if (name, value) not in names:
            try:
                names[name, value] = source.content(fields[name])
            except InputError as problem:
                names[name, value] = ""
                problems.append(f"$.{name} = {value!r}: {problem}")
        content[name] = names[name, value]
        sound &= bool(content[name])
    return Case(kind=kind.name, fields=fields, content=content) if sound else None


def _file_of(kind: Kind) -> type[BaseModel]:
    """Schema of a spec of one kind: its fields, optional in both tables, lists of values in the grid."""

    several: dict[str, Any] = {}
    single: dict[str, Any] = {}
    for name, info in kind.fields.model_fields.items():
        one: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        several[name] = (Annotated[list[one], Field(min_length=1), BeforeValidator(_listed)], [])
        single[name] = (one, None)
    grid: Any = create_model(f"{kind.name}Grid", __base__=Fields, **several)
    case: Any = create_model(f"{kind.name}Case", __base__=Fields, **single)
    return create_model(f"{kind.name}Spec", __base__=Fields, kind=(str, ...), title=(str, ""), grid=(grid, grid()), cases=(list[case], []))


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]
