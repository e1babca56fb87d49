"""Hooks inside torch.compile: opaque operators that call back into Python when the compiled code runs.

A Python hook is traced once and its host-side effects are not part of the graph's run; an operator that claims to
mutate `token` is kept, ordered and called in every run, with `fullgraph=True` too. Python does not run when a CUDA graph is
replayed, so the operators are marked unsafe for CUDA graphs and the compiler splits the graph around them.
The clone is needed: the compiler may reuse an input's memory after its last use in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

Inputs = tuple[int, int, int, dict[str, Tensor]]  # B, S, past, tensors


class Listener(Protocol):
    """What hooks and operators call."""

    def begin(self, stream: int, training: bool, inputs: Callable[[], Inputs]) -> None:
        """A stack of layers starts."""

    def see(self, slot: int, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A router returned, in eager mode."""

    def keep(self, slot: int, ids: Tensor, weights: Tensor | None, logits: Tensor | None) -> None:
        """A router's decision, as read inside compiled code."""

    def end(self, stream: int) -> None:
        """A stack of layers is done."""

    def note_tokens(self, tokens: Callable[[], Tensor | None]) -> None:
        """The root of the model was called."""


LISTENERS: WeakValueDictionary[int, Listener] = WeakValueDictionary()
INPUTS = ("token_id", "mask", "position", "bounds", "past")
_TAGS = (torch._C.Tag.cudagraph_unsafe,)


@torch.library.custom_op("moesim::see", mutates_args={"token"}, tags=_TAGS)
def see(token: Tensor, tag: Tensor, ids: Tensor, weights: Tensor | None, logits: Tensor | None) -> None:
    """A router's decision; `tag` is (listener, router) on the CPU: data, so that layers share compiled code."""
    listener, slot = tag.tolist()
    if listener in LISTENERS:
        copies = [None if tensor is None else tensor.clone() for tensor in (weights, logits)]
        LISTENERS[listener].keep(slot, ids.clone(), *copies)


@torch.library.custom_op("moesim::begin", mutates_args={"token"}, tags=_TAGS)
def begin(token: Tensor, tag: Tensor, batch: int, length: int, past: int, training: bool, found: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """A stack of layers starts; `found` says which of INPUTS `tensors` are."""
    listener, stream = tag.tolist()
    if listener in LISTENERS:
        named = {INPUTS[i]: tensor.clone() for i, tensor in zip(found, tensors, strict=True)}
        LISTENERS[listener].begin(stream, training, lambda: (batch, length, past, named))


@torch.library.custom_op("moesim::end", mutates_args={"token"}, tags=_TAGS)
def end(token: Tensor, tag: Tensor) -> None:
    """A stack of layers is done."""
    listener, stream = tag.tolist()
    if listener in LISTENERS:
        LISTENERS[listener].end(stream)


for _operator in (see, begin, end):
    _operator.register_fake(lambda *_: None)
