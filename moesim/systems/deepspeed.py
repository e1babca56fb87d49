"""DeepSpeed-MoE: hierarchical all-to-all, and the shared (residual) expert beside the dispatch.

Its pyramid (fewer experts in some layers) is `ModelSpec.pyramid`: the trace refuses ids a layer lacks, and slots placed for them
take neither memory nor time. Its expert slicing,
for more devices than experts, is `routing=Sliced(slices=…)` with a placement that leaves the other members of a group empty.
"""

from __future__ import annotations

from moesim.systems.mechanisms import Exchange, Schedule, System

SYSTEM = System(
    name="deepspeed-moe",
    title="DeepSpeed-MoE inference",
    paper="DeepSpeed-MoE, arXiv 2201.05596",
    headline="7.3x better latency than prior MoE inference, model size /3.7",
    check="gains from fewer messages and hidden shared experts only; the all-to-all gain is 1 on one node",
    exchange=Exchange(transports=("hierarchical",)),
    schedule=Schedule(shared_beside=True),
)
