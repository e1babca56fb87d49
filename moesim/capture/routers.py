"""How the decision of a router is read: one `Adapter` per family.

An adapter names a module class and has a `read(module, inputs, output) -> (ids_TK, weights_TK | None)`. It reads what
the forward pass decided and never decides again: ids cannot be rebuilt from logits where a bias or a group mask takes part.
No selection (a dropped token, a shorter choice) is -1. Where the router gives its logits too (before softmax or sigmoid, bias
and masks), `logits(module, inputs, output) -> logits_TE` reads them.

Contracts read in transformers 5.23.0, torchtitan 0.3.0, Megatron-Core 0.16, DeepSpeed 0.19, MegaBlocks 0.10.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moesim.errors import CaptureError

if TYPE_CHECKING:
    from torch import Tensor, nn

Reading = tuple["Tensor", "Tensor | None"]
Read = Callable[[Any, tuple[Any, ...], Any], Reading]
ReadLogits = Callable[[Any, tuple[Any, ...], Any], "Tensor"]
Layout = Literal["batch-first", "sequence-first"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """How to read one family of routers; `logits` is None where it gives none, `layout` the order of the rows of a batch of sequences."""

    name: str
    read: Read
    logits: ReadLogits | None = None
    layout: Layout = "batch-first"


_REGISTERED: dict[str, Adapter] = {}
_HF_ROUTER = re.compile(r"(Router|MoEV1Gate)$")


def register_router(router: type[nn.Module] | str, read: Read, *, logits: ReadLogits | None = None, layout: Layout = "batch-first") -> None:
    """Teach capture a router class, by class or class name; a later registration replaces an earlier one.

    `read(module, inputs, output)` returns the ids (whole numbers, last axis K, -1 = none) and the gate weights of the
    same shape, or None; `logits`, called the same way, the router's logits of all E experts. They run in the model's
    forward pass: pick tensors out, do not copy or synchronise.

        >>> register_router("MyGate", lambda module, inputs, output: (output.chosen, output.gates))
    """
    name = router if isinstance(router, str) else router.__name__
    _REGISTERED[name] = Adapter(name=f"registered {name}", read=read, logits=logits, layout=layout)


def adapter_for(module: nn.Module, parent: nn.Module | None) -> Adapter | None:
    """The adapter of `module`, or None when it is no router that is known."""
    for kind in type(module).__mro__:
        if adapter := _REGISTERED.get(kind.__name__):
            return adapter
        place = (kind.__module__.split(".")[0], kind.__name__)
        if place in _BUILT_IN:
            return _BUILT_IN[place]
    kind = type(module)
    if kind.__module__.startswith("transformers.models.") and _HF_ROUTER.search(kind.__name__) and hasattr(parent, "experts"):
        return _HF
    return None


def router_like(module: nn.Module) -> bool:
    """Whether the class name suggests a router: for naming candidates in errors, never for capturing."""
    return bool(re.search(r"(router|gate|gating|topk)", type(module).__name__, re.IGNORECASE))


def read_hf(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Hugging Face contract: output (logits, weights [.., K], ids [.., K], ...)."""
    if not isinstance(output, tuple) or len(output) < 3:
        raise CaptureError(_mismatch(module, output, "(logits, weights [T, K], ids [T, K])"))
    return output[2], output[1]


def read_llama4(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Output (scores [T, E], logits [T, E]) with sigmoid scores; the choice is the top-k of the logits."""
    scores, logits = output
    ids = logits.topk(module.top_k, dim=-1).indices
    return ids, scores.gather(-1, ids)


def read_jetmoe(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Output (order [T·K], batch index, gates [T·K] in that order, tokens per expert, logits): undo the sort by expert."""
    import torch

    order, _, gates, sizes, _ = output
    by_expert = torch.repeat_interleave(torch.tensor(sizes)).to(order.device)
    ids, weights = torch.empty_like(order), torch.empty_like(gates)
    ids[order], weights[order] = by_expert, gates.detach()
    return ids.view(-1, module.top_k), weights.view(-1, module.top_k)


def read_experts_inputs(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """The experts module is called as (hidden, ids [T, K], weights [T, K]); used where the router gives logits only."""
    return inputs[1], inputs[2]


def read_switch(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Output (one-hot after capacity [B, S, E], probability [B, S, 1], logits); an all-zero row is a dropped token."""
    dispatched, probability, _ = output
    ids = dispatched.argmax(-1, keepdim=True)
    return ids.where(dispatched.any(-1, keepdim=True), -1), probability


def read_nllb(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Output (first choice mask [T, E], combine weights [T, E], logits); weight 0 is a choice that was dropped."""
    return _from_dense(output[1], 2)


def read_torchtitan(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Output (scores [T, K], ids [T, K], tokens per expert [E])."""
    return output[1], output[0]


def read_megatron(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Output (probabilities [T, E], routing map bool [T, E]), or (probabilities [T, K], ids [T, K])."""
    probabilities, routing = output
    if not routing.dtype.is_floating_point and str(routing.dtype) != "torch.bool":
        return routing, probabilities
    ids = routing.to(probabilities.dtype).topk(module.topk, dim=-1, sorted=False).indices
    return ids.where(routing.gather(-1, ids), -1), probabilities.gather(-1, ids)


def read_deepspeed(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Output (loss, combine weights [T, E, C], dispatch mask [T, E, C], counts); an empty mask row is a dropped token."""
    if len(output) != 4 or getattr(output[1], "ndim", 0) != 3:
        raise CaptureError(_mismatch(module, output, "(loss, combine weights [T, E, C], dispatch mask, counts); use it without tutel"))
    return _from_dense(output[1].detach().sum(-1), module.k)


def read_megablocks(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Output (scores, weights, ids), squeezed to [T] when K = 1."""
    weights, ids = output[1], output[2]
    return (ids.unsqueeze(-1), weights.unsqueeze(-1)) if ids.ndim == 1 else (ids, weights)


def read_deepseek_gate(module: Any, inputs: tuple[Any, ...], output: Any) -> Reading:
    """Model code published with DeepSeek-V2/V3 checkpoints: output (ids [T, K], weights [T, K], ...)."""
    return output[0], output[1]


def _from_dense(weights_TE: Tensor, width: int) -> Reading:
    weights, ids = weights_TE.detach().topk(width, dim=-1)
    return ids.where(weights > 0, -1), weights


def _mismatch(module: nn.Module, output: Any, wanted: str) -> str:
    kinds = [f"{type(o).__name__}{list(getattr(o, 'shape', []))}" for o in (output if isinstance(output, tuple) else (output,))]
    return f"router {type(module).__name__} returned {', '.join(kinds)}, expected {wanted}; adapt it with moesim.capture.register_router"


def _item(index: int) -> ReadLogits:
    return lambda module, inputs, output: output[index]


_HF = Adapter(name="hugging face", read=read_hf, logits=_item(0))

# how ids and weights are read, and which item of the output is the logits
_READS: dict[tuple[str, str], tuple[Read | None, int | None]] = {
    ("transformers", "Llama4Router"): (read_llama4, 1),
    ("transformers", "JetMoeTopKGating"): (read_jetmoe, 4),
    ("transformers", "DbrxRouter"): (None, None),  # logits only
    ("transformers", "DbrxExperts"): (read_experts_inputs, None),
    ("transformers", "SwitchTransformersTop1Router"): (read_switch, 2),
    ("transformers", "NllbMoeTop2Router"): (read_nllb, 2),
    ("transformers", "Gemma4TextRouter"): (read_hf, None),  # the first item is probabilities
    ("transformers", "DiffusionGemmaTextRouter"): (read_hf, None),
    ("transformers_modules", "MoEGate"): (read_deepseek_gate, None),
    ("torchtitan", "TokenChoiceTopKRouter"): (read_torchtitan, None),
    ("megatron", "TopKRouter"): (read_megatron, None),
    ("deepspeed", "TopKGate"): (read_deepspeed, None),
    ("megablocks", "LearnedRouter"): (read_megablocks, None),
}
_BUILT_IN: dict[tuple[str, str], Adapter | None] = {
    place: read
    and Adapter(
        name=".".join(place),
        read=read,
        logits=None if at is None else _item(at),
        layout="sequence-first" if place[0] == "megatron" else "batch-first",
    )
    for place, (read, at) in _READS.items()
}
