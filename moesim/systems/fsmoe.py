"""FSMoE: inter-node all-to-all, intra-node exchange and experts as pipeline stages, with degrees of their own forward and
backward, and gradient reduction in the gaps.

`moesim.systems.pipelining.best_degree` is its optimiser on linear stage models `alpha + beta/r`; the engine takes the best
of the degrees below from the full cost model.
"""

from __future__ import annotations

from moesim.systems.mechanisms import Exchange, Schedule, System

DEGREES = (1, 2, 3, 4, 6, 8)

SYSTEM = System(
    name="fsmoe",
    title="FSMoE, three-stage pipeline with gradient partitioning",
    paper="FSMoE, arXiv 2501.10714",
    headline="1.18-1.22x over DeepSpeed-MoE and Tutel on 1,458 layers; 912 of them want different degrees backward",
    check="the optimiser's degree is the best of an exhaustive search; degrees differ between passes; no gain without a second tier",
    exchange=Exchange(transports=("hierarchical",)),
    schedule=Schedule(forward=DEGREES, backward=DEGREES, tiers_apart=True, gradients_in_gaps=True),
)
