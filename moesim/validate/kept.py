"""Finished steps of a long measurement in a JSON file, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.files import read_json, write_json

SCHEMA_VERSION = 1


class Kept:
    """Steps by name. `settings` say what they were made with: a file of other settings is refused, not mixed in.

    Without a path steps are kept for this object only.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self.steps: dict[str, Any] = {}
        if path is not None and path.exists():
            found = read_json(path, InputError)
            if not isinstance(found, dict) or found.get("settings") != self.settings or not isinstance(found.get("steps"), dict):
                raise InputError(f"{path}: holds steps of another measurement; remove it to begin again, or repeat the command that made it")
            self.steps = found["steps"]

    def step(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON-ready result of a step: the kept one, or what `make` returns, kept at once."""
        if name not in self.steps:
            self.steps[name] = make()
            if self.path is not None:
                write_json(self.path, {"schema_version": SCHEMA_VERSION, "settings": self.settings, "steps": self.steps})
        return self.steps[name]

    def forget(self) -> None:
        """Remove the file: the measurement is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
