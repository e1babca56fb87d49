"""Numba compilation with its type kept: what the kernels of this folder are decorated with.

Import this module only from modules that are themselves loaded lazily: numba costs a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R", bound=tuple[Any, ...])


def compiled(function: F) -> F:
    """Compile for machine speed, cache on disk, release the GIL (so that layers run in threads).

    Kernels keep IEEE arithmetic (no fast-math): the same seed gives the same bytes in any process.
    """
    kernel: F = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return kernel


def inlined(function: F) -> F:
    """Like `compiled`, for small functions called in hot loops: a call would copy whole tuples of arrays."""
    kernel: F = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)(function)
    return kernel


def _borrowed(typing_context: Any, record: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[0]
        for index, kind in enumerate(record.types):
            if isinstance(kind, types.Array):
                array = context.make_array(kind)(context, builder, value=builder.extract_value(value, index))
                array.meminfo = array.meminfo.type(None)
                value = builder.insert_value(value, array._getvalue(), index)
        return value

    return record(record), generate


#: The same named tuple of arrays without their reference counts, which otherwise cost more than the work of
#: a small kernel at every call. The caller keeps the original alive.
borrowed: Callable[[R], R] = intrinsic(_borrowed)
