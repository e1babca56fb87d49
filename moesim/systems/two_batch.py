"""Two-batch overlap: a step's tokens in two halves, attention and experts of one beside the all-to-alls of the other."""

from __future__ import annotations

from moesim.systems.mechanisms import Schedule, System

SYSTEM = System(
    name="two-batch",
    title="Two micro-batches whose computation and all-to-alls overlap",
    paper="DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.4.1 (prefill; for decode it explores this)",
    headline="none: the report says that it does this, not what it gains",
    check="equal stages take the closed form of two chains; never below the busiest stream",
    schedule=Schedule(batches=2),
)
