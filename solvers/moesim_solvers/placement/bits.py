"""Sets of tokens as rows of 64-bit words, and random numbers that mean the same in every process.

R rows, T tokens, W = ceil(T / 64) words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.jit import inlined, ones

Words = NDArray[np.uint64]


def packed(flags_RT: NDArray[np.bool_]) -> Words:
    """Bit sets [R, W] of the true tokens of each row."""
    rows, tokens = flags_RT.shape
    bytes_RB = np.zeros((rows, 8 * -(-tokens // 64)), np.uint8)
    bytes_RB[:, : -(-tokens // 8)] = np.packbits(flags_RT, axis=1, bitorder="little")
    return bytes_RB.view(np.uint64)


@inlined
def row_ones(set_RW: Words, row: int) -> np.int64:
    """Members of one set."""
    total = np.int64(0)
    for w in range(set_RW.shape[1]):
        total += ones(set_RW[row, w])
    return total


@inlined
def random_unit(draw_1: Words) -> float:
    """Uniform in [0, 1) by splitmix64 (Steele, Lea, Flood 2014); advances `draw_1`."""
    draw_1[0] += np.uint64(0x9E3779B97F4A7C15)
    z = draw_1[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) * (1.0 / 9007199254740992.0)
