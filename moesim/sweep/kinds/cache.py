"""Kind "cache": a cache of experts per layer, replayed on a trace."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from moesim.errors import InputError
from moesim.sweep import shelf
from moesim.sweep.fields import Count, Fields, PolicyName, Range, Share, TracePath, Whole
from moesim.sweep.kinds.base import Figure, Found, Kind

if TYPE_CHECKING:
    from moesim.replay import Events

_HELD_TOKENS = 1 << 21


class CacheFields(Fields):
    """The size is `slots` per layer (of the whole model with scope "model"), or the `share` of all experts, in whole slots.

    One step is `tokens_per_step` consecutive tokens; warm: first touches fill free slots without counting as misses.
    """

    trace: TracePath
    policy: PolicyName
    slots: Whole | None = None
    share: Share | None = None
    domain: str | None = None
    phase: Literal["train", "prefill", "decode"] | None = None
    tokens: Range = ":"
    tokens_per_step: Count = 1
    scope: Literal["layer", "model"] = "layer"
    warm: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _one_size(self) -> CacheFields:
        if (self.slots is None) == (self.share is None):
            raise ValueError("give slots, or the share of experts that are held, and not both")
        return self


def replay_case(fields: CacheFields) -> Found:
    """Misses and movements of one cache."""
    from moesim.replay import replay

    events = _events(fields.trace, fields.domain, fields.phase, fields.tokens, fields.tokens_per_step)
    experts = events.experts * (events.layers if fields.scope == "model" else 1)
    slots = fields.slots if fields.slots is not None else round((fields.share or 0.0) * experts)
    summary = replay(events, fields.policy, slots, scope=fields.scope, warm=fields.warm, seed=fields.seed).summary()
    notes = summary.pop("notes")
    figures: dict[str, Any] = {name: value for name, value in summary.items() if name not in ("policy", "prefetcher", "scope", "tie_seed")}
    return Found(figures={"slots_used": slots, **figures}, notes=notes)


@lru_cache(4)
def _events(trace: str, domain: str | None, phase: str | None, tokens: str, tokens_per_step: int) -> Events:
    from moesim.replay import Events

    part = shelf.selected(trace, domain, phase, tokens)
    if part.tokens > _HELD_TOKENS:
        raise InputError(f"{part.tokens:,} tokens are more than the {_HELD_TOKENS:,} a case replays at once; give a range of tokens")
    return Events.of(part, tokens_per_step=tokens_per_step)


KIND = Kind(
    name="cache",
    says="caches of experts replayed on a trace: policies and sizes",
    fields=CacheFields,
    run=replay_case,
    choices=("policy",),
    figures=(
        Figure(name="miss_ratio", label="misses", unit="%"),
        Figure(name="blocks_per_model_token", label="experts fetched/token"),
        Figure(name="step_miss_p99", label="misses of a step, P99"),
        Figure(name="churn_per_1000_steps", label="moves per 1,000 steps"),
    ),
)
