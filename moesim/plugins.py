"""How solvers and cache policies are found: by entry points of their group, first-party ones like strangers'."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from moesim.errors import PluginError


def registered(group: str, noun: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name, sorted; PluginError where a name is taken twice or none is there."""
    points = list(entry_points(group=group))
    if twice := [name for name, times in Counter(point.name for point in points).items() if times > 1]:
        values = [point.value for point in points if point.name == twice[0]]
        raise PluginError(f"{group}: {twice[0]!r} is registered by {' and '.join(values)}; uninstall one of them")
    if not points:
        raise PluginError(f"{group}: no {noun} is registered; entry points exist after installation: run `pip install -e .`")
    return {point.name: point for point in sorted(points, key=lambda point: point.name)}


def made(point: EntryPoint, noun: str) -> Any:
    """What an entry point names, called without arguments; PluginError says why it does not load."""
    try:
        return point.load()()
    except Exception as problem:
        raise PluginError(f"{noun} {point.name!r} ({point.value}) does not load: {problem}") from problem
