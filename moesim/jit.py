"""Numba compilation with its type kept: what compiled kernels are decorated with; and `ones`, an instruction numba has no name for.

Import this module only from modules that are themselves loaded lazily: numba costs a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from moesim.files import digest

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R", bound=tuple[Any, ...])


def _named(function: F) -> F:
    """The function, with a digest of its code and of all it calls in the name that numba keeps it by.

    numba compiles anew when a function's own file has changed, but not when another has that it calls something of.
    """
    named: Any = function
    named.__qualname__ = f"{function.__qualname__}_{digest(*_code(function, set()))}"
    return function


def _code(function: Any, seen: set[Any]) -> Iterator[str]:
    """Code of a function, numbers it finds among its globals, and the same of the compiled functions it calls."""
    if function in seen:
        return
    seen.add(function)
    names: set[str] = set()
    parts = [function.__code__]
    for code in parts:  # those of comprehensions join on the way
        names.update(code.co_names)
        parts += [const for const in code.co_consts if isinstance(const, CodeType)]
        yield repr((code.co_code, code.co_names, code.co_varnames))
        yield from (repr(sorted(const) if isinstance(const, frozenset) else const) for const in code.co_consts if not isinstance(const, CodeType))
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        called = getattr(value, "py_func", None)
        if isinstance(called, FunctionType):
            yield name
            yield from _code(called, seen)
        elif isinstance(value, (bool, int, float, str, tuple, np.generic)):
            yield f"{name} = {value!r}"


def compiled(function: F) -> F:
    """Compile for machine speed, cache on disk, release the GIL (so that layers run in threads).

    Kernels keep IEEE arithmetic (no fast-math): the same seed gives the same bytes in any process.
    """
    kernel: F = numba.njit(cache=True, nogil=True, error_model="numpy")(_named(function))
    return kernel


def inlined(function: F) -> F:
    """Like `compiled`, for small functions called in hot loops: a call would copy whole tuples of arrays."""
    kernel: F = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)(_named(function))
    return kernel


@inlined
def ones(word: np.uint64) -> np.int64:
    """Bits set (the compiler turns this into one instruction)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


def specialised(loop: F, name: str, hooks: dict[str, Any]) -> F:
    """A compiled copy of the plain function `loop` that finds `hooks` where the original has globals of those names.

    numba keeps compiled code by qualified name, so every copy has its own file in its cache, and one of other hooks another;
    functions passed as arguments or closed over would be compiled anew in each process.
    """
    assert isinstance(loop, FunctionType)
    copy: Any = FunctionType(loop.__code__, {**loop.__globals__, **hooks}, name)
    copy.__module__, copy.__qualname__ = loop.__module__, f"{loop.__name__}_{name}"
    kernel: F = compiled(copy)
    return kernel


def _lend(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value=value)
        array.meminfo = array.meminfo.type(None)
        return array._getvalue()
    for index, part in enumerate(getattr(kind, "types", ())):  # of a tuple
        value = builder.insert_value(value, _lend(context, builder, part, builder.extract_value(value, index)), index)
    return value


def _borrowed(typing_context: Any, record: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _lend(context, builder, record, args[0])

    return record(record), generate


#: The same named tuple of arrays (and of such tuples) without their reference counts, which otherwise cost more than the
#: work of a small kernel at every call. The caller keeps the original alive.
borrowed: Callable[[R], R] = intrinsic(_borrowed)
