"""M2R2: an accelerated residual stream knows routes some layers early, so that loads run beside those layers."""

from __future__ import annotations

from moesim.replay import Residual
from moesim.systems.mechanisms import System
from moesim.systems.residency import Residency


def make(*, share: float | None = 0.5, distance: int = 2, recall: float = 0.9, false: float = 0.1) -> System:
    """M2R2 that names `recall` of the experts `distance` layers early; a share `false` of what it names is not needed.

    The first `distance` layers but one are named when a step begins (assumed: the stream passes their gates first).
    """
    return System(
        name="m2r2",
        title="M2R2, routes known early from an accelerated residual stream",
        paper="M2R2, arXiv 2502.02040",
        headline="2.9x MoE decode, 2.8x self-speculative decode",
        check="gain rises with the distance until copies are hidden, then stays; what is not named becomes misses",
        residency=Residency(share=share, prefetch=Residual(distance=distance, recall=recall, false=false)),
    )


SYSTEM = make()
