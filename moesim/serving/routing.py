"""Routing: which experts the tokens of a batch choose, drawn from a real trace by sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.files import digest
from moesim.model import ModelSpec
from moesim.trace import Trace

MOST_TOKENS = 1 << 17  # kept of a trace: its sequences are thinned above this
# Spread of expert popularity with which independent tokens touch as many distinct experts as real ones of one domain:
# DeepSeek-V2-Lite on two domains of deepseek-ai/ESFT (MIT): 0.8 and 0.6.
SPREAD = 0.75
_RUN = 512  # consecutive tokens of one sequence in a batch of prompts, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """T tokens of a trace in order, with their sequences, phases and domains, and the mix of domains over time.

    experts_TLK uint16; sequence_T rises where a new sequence begins; decode_T marks tokens made one by one;
    domain_T indexes `domains`. mix_HD: weight of each domain from window_H[h] seconds on (one window: as the trace has them).
    """

    model: ModelSpec
    experts_TLK: NDArray[np.uint16]
    sequence_T: NDArray[np.int64]
    decode_T: NDArray[np.bool_]
    domain_T: NDArray[np.int64]
    domains: tuple[str, ...]
    window_H: NDArray[np.float64]
    mix_HD: NDArray[np.float64]
    digest: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, trace: Trace, *, mix: Sequence[tuple[float, Mapping[str, float]]] = ()) -> Routing:
        """Routing of a trace's selected tokens; `mix` lists (from second, {domain: weight}), rising from 0.

        Raises InputError for a mix that names an unknown domain, does not begin at 0 or does not rise.
        """
        parts: list[tuple[NDArray[Any], ...]] = []
        kept, seen, offset, last = 0, 0, 0, None
        every = -(-trace.tokens // MOST_TOKENS)  # of the sequences, one in so many
        for batch in trace.batches(columns=("sequence", "phase", "domain", "step", "rank")):
            keys = np.stack([np.asarray(batch.columns[name], np.int64) for name in ("step", "rank", "sequence")])
            new = np.any(np.diff(keys, axis=1, prepend=keys[:, :1] if last is None else last[:, None]) != 0, axis=0)
            new[0] |= last is None
            last = keys[:, -1]
            number = offset + np.cumsum(new)
            offset = int(number[-1])
            seen += len(batch)
            take = (number % every == 0) if every > 1 else np.ones(len(batch), bool)
            parts.append((batch.experts_TLK[take], number[take], batch.columns["phase"][take] == "decode", batch.columns["domain"][take]))
            kept += int(take.sum())
        if not kept:  # one endless sequence
            raise InputError(f"{trace.path}: no whole sequence could be kept; select fewer tokens")
        experts, sequence, decode, names = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        domains, domain = np.unique(names.astype(str), return_inverse=True)
        window_H, mix_HD = _mix(mix, tuple(domains.tolist()), np.bincount(domain))
        return cls(
            model=trace.model,
            experts_TLK=experts,
            sequence_T=sequence,
            decode_T=decode,
            domain_T=domain,
            domains=tuple(domains.tolist()),
            window_H=window_H,
            mix_HD=mix_HD,
            digest=digest(trace.digest, window_H.tobytes(), mix_HD.tobytes()),
            notes=(f"routing: {kept:,} of {seen:,} tokens of the trace, every {every}-th sequence",) if every > 1 else (),
        )

    @classmethod
    def typical(cls, model: ModelSpec, *, spread: float = SPREAD, tokens: int = 1 << 12, seed: int = 0) -> Routing:
        """Made-up routing, to be used, and said, without a trace of the model: tokens choose independently, experts are not equal.

        A token takes the top-k of popularity + Gumbel noise; popularity of an expert in a layer is normal with deviation
        `spread` (0: all equal).
        """
        rng = np.random.default_rng(seed)
        layers = len(model.moe_layers)
        chosen = np.empty((tokens, layers, model.top_k), np.uint16)
        for layer in range(layers):
            noise = -np.log(np.maximum(rng.standard_exponential((tokens, model.experts), np.float32), 1e-30))
            score = rng.normal(0.0, spread, model.experts).astype(np.float32) + noise
            chosen[:, layer] = score.argpartition(-model.top_k, axis=1)[:, -model.top_k :]
        return cls(
            model=model,
            experts_TLK=chosen,
            sequence_T=np.arange(tokens) // _RUN,
            decode_T=np.zeros(tokens, bool),
            domain_T=np.zeros(tokens, np.int64),
            domains=("",),
            window_H=np.zeros(1),
            mix_HD=np.ones((1, 1)),
            digest=digest("typical", model.digest, str(spread), str(tokens), str(seed)),
            notes=(f"routing: no trace was given; tokens choose independently, experts differ by a typical spread of {spread:g}",) if layers else (),
        )

    def draw(self, rng: np.random.Generator, tokens: int, *, prompts: bool, window: int) -> NDArray[np.int64]:
        """Indices of `tokens` tokens of a batch: consecutive tokens of sequences (`prompts`), or single tokens.

        Single tokens come from the decode phase where the trace has one. The first n indices are a batch of n tokens.
        """
        weight_T = self.mix_HD[window][self.domain_T]
        if not prompts:
            single_T = weight_T * self.decode_T if (weight_T * self.decode_T).any() else weight_T
            cumulated = np.cumsum(single_T)
            return np.asarray(np.searchsorted(cumulated, rng.random(tokens) * cumulated[-1], side="right"))
        cumulated = np.cumsum(np.where(self.decode_T, 0.0, weight_T) if not self.decode_T.all() else weight_T)
        ends = np.append(np.flatnonzero(np.diff(self.sequence_T)) + 1, len(self.sequence_T))
        runs, count = [], 0
        while count < tokens:
            start = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
            stop = min(int(ends[np.searchsorted(ends, start, side="right")]), start + _RUN, start + tokens - count)
            runs.append(np.arange(start, stop))
            count += stop - start
        return np.concatenate(runs)


def _mix(
    mix: Sequence[tuple[float, Mapping[str, float]]], domains: tuple[str, ...], counts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """window_H and mix_HD: chance of a token of each domain is its weight spread over the domain's tokens."""
    if not mix:
        return np.zeros(1), np.ones((1, len(domains)))
    starts = np.asarray([start for start, _ in mix], np.float64)
    if starts[0] != 0 or not (np.diff(starts) > 0).all() or not np.isfinite(starts).all():
        raise InputError(f"mix begins at {starts.tolist()}; the first window begins at 0 s and they rise")
    weights = np.zeros((len(mix), len(domains)))
    for h, (_, shares) in enumerate(mix):
        for name, share in shares.items():
            if name not in domains:
                raise InputError(f"mix window {h}: no tokens of domain {name!r}; domains here: {', '.join(domains)}")
            if not (np.isfinite(share) and share >= 0):
                raise InputError(f"mix window {h}: weight of {name!r} is {share!r}; write a number >= 0")
            weights[h, domains.index(name)] = share
        if not weights[h].any():
            raise InputError(f"mix window {h}: all weights are 0; give at least one domain")
    return starts, weights / weights.sum(axis=1, keepdims=True) / counts
