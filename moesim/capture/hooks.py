"""Places the hooks of a Recorder: plain Python in eager mode, opaque operators inside torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from moesim.capture import compiled
from moesim.capture.discover import Router
from moesim.capture.inputs import forward_inputs, parameter_names


def place_hooks(model: nn.Module, routers: Sequence[Router], listener: compiled.Listener, number: int, *, logits: bool) -> list[Any]:
    """Hook every router, every module that runs layers, and the root; returns the removable handles. `logits`: read in compiled code too."""
    token = torch.zeros(1)
    owners = list(dict.fromkeys(router.owner for router in routers))
    handles = []
    for slot, router in enumerate(routers):
        hook = _router_hook(router, slot, listener, token, torch.tensor([number, slot]), logits)
        handles.append(router.module.register_forward_hook(hook))
    for stream, path in enumerate(owners):
        owner = model.get_submodule(path)
        sequence_first = any(r.adapter.layout == "sequence-first" for r in routers if r.owner == path)
        before, after = _owner_hooks(owner, stream, listener, token, torch.tensor([number, stream]), sequence_first)
        handles.append(owner.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(owner.register_forward_hook(after))
    if "" not in owners:
        handles.append(model.register_forward_pre_hook(_root_hook(model, listener), with_kwargs=True))
    return handles


def _router_hook(
    router: Router, slot: int, listener: compiled.Listener, token: torch.Tensor, tag: torch.Tensor, logits: bool
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    read, see = router.adapter.read, listener.see
    read_logits = router.adapter.logits if logits else None

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if is_compiling():
            ids, weights = read(module, inputs, output)
            scores = None if read_logits is None else read_logits(module, inputs, output).detach()
            compiled.see(token, tag, ids, None if weights is None else weights.detach(), scores)
        else:
            see(slot, module, inputs, output)

    return hook


def _owner_hooks(
    owner: nn.Module, stream: int, listener: compiled.Listener, token: torch.Tensor, tag: torch.Tensor, sequence_first: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    names = parameter_names(owner)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_compiling():
            batch, length, past, tensors = forward_inputs(names, args, kwargs, sequence_first=sequence_first)
            found = [compiled.INPUTS.index(name) for name in tensors]
            compiled.begin(token, tag, batch, length, past, module.training, found, list(tensors.values()))
        else:
            listener.begin(stream, module.training, lambda: forward_inputs(names, args, kwargs, sequence_first=sequence_first))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_compiling():
            compiled.end(token, tag)
        else:
            listener.end(stream)

    return before, after


def _root_hook(model: nn.Module, listener: compiled.Listener) -> Callable[..., None]:
    names = parameter_names(model)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_compiling():
            listener.note_tokens(lambda: forward_inputs(names, args, kwargs, sequence_first=False)[3].get("token_id"))

    return before
