"""ExpertFlow: a predictor names the experts of all layers before the step, and two batches are regrouped by route."""

from __future__ import annotations

from moesim.replay import Path
from moesim.systems.batching import Regrouped
from moesim.systems.mechanisms import System
from moesim.systems.residency import Residency


def make(*, share: float = 0.5, recall: float = 0.8, false: float = 0.05, window: int = 2) -> System:
    """ExpertFlow with slots for `share` of the experts; its predictor names `recall` of what is needed, a share `false` of what it names is not.

    With 0.8 the share in place or foretold at batch 4 is the published one (`moesim.studies.caching`).
    """
    return System(
        name="expertflow",
        title="ExpertFlow, predicted routes and regrouped batches",
        paper="ExpertFlow, arXiv 2410.17954",
        headline="A40-48: memory -93.72 %, 2-10x speed; Switch-32, 16 slots: 91.90 / 85.91 % in place at batch 4 / 16, LRU 76.61 / 58.37 %",
        check="experts in place fall with the batch by about 18 points for LRU and 6 for the plan; regrouping gains more with more experts",
        routing=Regrouped(window=window, by="route"),
        residency=Residency(share=share, prefetch=Path(recall=recall, false=false)),
    )


SYSTEM = make()
