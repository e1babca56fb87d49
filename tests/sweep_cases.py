"""Work for crews, in a module that a spawned process imports quickly."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class Here:
    """A crew of this process."""

    def run(self, function: Callable[[Any], Any], items: Any) -> Any:
        """(item, value) of every item, in turn."""
        yield from ((item, function(item)) for item in items)


def square_or_die(number: int) -> int:
    """The square; seven kills the process that asks."""
    if number == 7:
        os._exit(9)
    return number * number
