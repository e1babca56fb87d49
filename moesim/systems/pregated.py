"""Pre-gated MoE: the gate of a layer chooses the experts of the next, which are copied while the layer runs.

Its authors' raw measurements are public (kaleid-liner/FasterTransformer@c0bbdfc, performance_data, Apache-2.0), and what
copies cost on their machine is fitted to those of batch 1 and of forced distinct experts, once for all tables; see `WAY`. Bytes
count two per weight, as that data is described; the script beside it runs in fp32, and then bytes and rates are both twice.

Their larger batches were left out of the fit. Copies of all experts take what the fit says up to batch 16 (28 blocks: -10 .. +3 %, half
of them within 1 %); at batch 32 the same bytes took up to 40 % longer than at any other (-29 .. -5 %), which nothing in the run
explains. Pre-gated blocks depend on how many experts are distinct, which was not recorded: with as many as the on-demand block
of that batch implies, 28 blocks up to batch 16 come out at -22 .. +28 % (half within 9 %, mean sign none), large-128 at batch 32 at
-21 %. The two runs do not choose the same experts, since a pre-gated layer takes the choice of the one before.
"""

from __future__ import annotations

from moesim.cost.offload import Fetching
from moesim.replay import PreGated
from moesim.systems.mechanisms import System
from moesim.systems.residency import Residency

# How copies ran on one A100-SXM4-80GB under an EPYC 7V12, in SwitchTransformer on FasterTransformer: four numbers fitted to
# its 15 cached and 5 uncached on-demand blocks, 5 pre-gated ones by distinct experts, 6 copied whole; SSD to 6 of that tier.
WAY = Fetching(
    alone_Bps=12.6e9,
    beside_Bps=12.0e9,
    migrate_s=105e-6,
    sync_s=170e-6,
    notes=("copies as measured on one A100-80 under an EPYC 7V12 (kaleid-liner/FasterTransformer@c0bbdfc)",),
)
STORAGE_BPS = 3.6e9
# A block of switch-large-128 with all experts in place does not fit that GPU, so it was never measured: fitted with the above,
# like what runs between two MoE blocks (tokens/s allow at most 0.23 ms in base and 0.28 ms in large models at 80 % cached).
LARGE_BLOCK_S = 1.123e-3
BASE_BETWEEN_S, LARGE_BETWEEN_S = 0.05e-3, 0.31e-3


def make(*, share: float | None = None, policy: str = "lru", way: Fetching | None = None) -> System:
    """Pre-gated MoE with a cache for `share` of the experts (None: none) and copies as in `way` (None: the cluster's profile)."""
    return System(
        name="pre-gated",
        title="Pre-gated MoE, the next layer's experts chosen one layer early",
        paper="Pre-gated MoE, ISCA 2024, arXiv 2308.12066",
        headline="A100-80, Switch base-128: a block takes 1.13 ms with experts in host memory, 0.95 ms all resident, 1.79 ms on demand",
        check="blocks on demand within 2.5 % (cached) and pre-gated ones by distinct experts within 10 % of the published measurements",
        residency=Residency(share=share, policy=policy, prefetch=PreGated(), way=way),
    )


SYSTEM = make()
