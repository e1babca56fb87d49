"""Recorder: turns what the hooks see into rows of a trace, and knows which step they belong to."""

from __future__ import annotations

import atexit
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from moesim.capture import compiled
from moesim.capture.discover import Router
from moesim.capture.gather import Kept, gather, stacked
from moesim.capture.hooks import place_hooks
from moesim.capture.ring import Ring, WhenFull
from moesim.capture.rows import Pass, RowBuffer
from moesim.capture.tokens import Forward
from moesim.errors import CaptureError
from moesim.trace import TraceWriter

UNMATCHED = (
    "{path}: in {passes} forward passes the routers saw another number of tokens than the model was given (tokens split over devices?); "
    "these rows have no sequence, position or token id"
)
OnError = Literal["raise", "warn"]
_numbers = itertools.count()
# Set while autograd runs: what fires then is recomputation by activation checkpointing. Private to torch; without it
# only a checkpoint around the whole model would count twice.
_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


class Recorder:
    """Records the routing of one model into one trace; made by `moesim.capture.capture`, closing removes every hook.

    Without calls of `step`, forward passes number themselves: in training every pass is a microbatch and the optimizer's
    step ends the step; otherwise every pass is a step.

    `tokens` and `forwards` count what was handed to the writer, `overhead_s` the time spent in hooks in the caller's
    thread, `writer_s` the CPU time of the writer thread.
    """

    def __init__(
        self,
        model: nn.Module,
        routers: Sequence[Router],
        writer: TraceWriter,
        *,
        domain: str,
        every: int,
        max_tokens: int | None,
        ring_slots: int,
        when_full: WhenFull,
        on_error: OnError,
    ) -> None:
        self.routers, self.writer = tuple(routers), writer
        self.forwards, self.tokens, self.recomputed, self.overhead_s = 0, 0, 0, 0.0
        self.error: CaptureError | None = None
        self._domain: str | tuple[str, ...] = domain
        self._every, self._max_tokens, self._on_error = every, max_tokens, on_error
        owners = list(dict.fromkeys(router.owner for router in routers))
        self._owners = [model.get_submodule(path) for path in owners]
        self._groups = [[router for router in routers if router.owner == path] for path in owners]
        self._plain = [list(range(len(group))) for group in self._groups]  # every router once, in order
        places = [owners.index(router.owner) for router in routers]
        info = writer.info
        # by router: its stack, its place there, how it is read
        self._slots = [
            (stream, self._groups[stream].index(r), r.adapter.read, r.adapter.logits if info.logits else None)
            for stream, r in zip(places, routers, strict=True)
        ]
        self._step, self._microbatch, self._by_hand, self._trained = 0, 0, False, False
        self._seen, self._steps_without = 0, 0
        self._held_B: dict[tuple[int, int], int] = {}  # by stack and rows: what a pass on the CPU holds while it waits
        self._ran: set[int] = set()
        self._open, self._prompt, self._stray, self._skipped = -1, 0, 0, 0
        self._forward: tuple[Forward, dict[str, Tensor]] | None = None
        self._kept: list[Kept] = []
        self._weights, self._widths = info.weights, info.widths
        self._root_tokens: Tensor | None = None
        self._root_needed = True
        self._closed, self._pid = False, os.getpid()
        self._rows = RowBuffer(writer, self._groups)
        self._ring = Ring(self._rows.add, self._flush, idle_s=writer.part_seconds, slots=ring_slots, when_full=when_full)
        number = next(_numbers)
        compiled.LISTENERS[number] = self
        self._handles = place_hooks(model, routers, self, number, logits=info.logits)
        self._handles.append(register_optimizer_step_post_hook(self._optimizer_stepped))
        atexit.register(self._at_exit)

    def step(self, step: int, *, microbatch: int = 0, domain: str | Sequence[str] | None = None) -> None:
        """Label the forward passes to come; `domain` is one word, or one for each sequence of the batch.

        Further passes under one label count the microbatch up. Raises CaptureError when capture has failed, or when two
        steps have gone by without one forward pass being seen.
        """
        self._check()
        self._steps_without += 1
        if self._steps_without > 2 and not self._seen:
            self._fail("no forward pass was seen in two steps: another model is run, or this one was compiled before capture started")
        self._step, self._microbatch, self._by_hand = step, microbatch, True
        if domain is not None:
            self._domain = domain if isinstance(domain, str) else tuple(domain)
        self._ran.clear()

    @property
    def writer_s(self) -> float:
        """CPU seconds of the writer thread."""
        return self._ring.writer_s

    @property
    def dropped(self) -> int:
        """Forward passes dropped because the ring was full."""
        return self._ring.dropped

    def _optimizer_stepped(self, *_: Any) -> None:
        if self._ran and self._trained and not self._by_hand:
            self._step, self._microbatch = self._step + 1, 0
            self._ran.clear()

    # Called by the hooks ---------------------------------------------------------------------------------------

    def note_tokens(self, tokens: Callable[[], Tensor | None]) -> None:
        """The root was called: remember its token ids for stacks of layers that only get embeddings."""
        if self._root_needed:
            began = perf_counter()
            self._root_tokens = tokens() if _graph_task() == -1 else None
            self.overhead_s += perf_counter() - began

    def begin(self, stream: int, training: bool, inputs: Callable[[], compiled.Inputs]) -> None:
        """A stack of layers starts."""
        began = perf_counter()
        if _graph_task() != -1:
            return
        self._check()
        batch, length, past, tensors = inputs()
        self._seen += 1
        if self._ran and max(self._ran) >= stream:  # this stack, or one behind it, ran: another forward pass
            self._ran.clear()
            if self._by_hand or training or self._trained:
                self._microbatch += 1
            else:
                self._step += 1
        self._ran.add(stream)
        self._trained |= training
        self._prompt += past == 0
        self._open, self._kept, self._forward = stream, [], None
        if self._step % self._every == 0 and (self._max_tokens is None or self.tokens < self._max_tokens):
            layout = self._groups[stream][0].adapter.layout
            label = Forward(  # by place: quicker, in every pass of the user's model
                stream, self._step, self._microbatch, self._domain, training, batch, length, past, self._prompt, layout == "sequence-first"
            )
            self._root_needed = "token_id" not in tensors
            if self._root_needed and (root := self._root_tokens) is not None and root.shape == (batch, length):
                tensors["token_id"] = root
            # the caller may write into its buffers before the copies are done
            self._forward = (label, {name: tensor.clone() for name, tensor in tensors.items()})
        self.overhead_s += perf_counter() - began

    def see(self, slot: int, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A router returned."""
        began = perf_counter()
        stream, index, read, read_logits = self._slots[slot]
        if self._open != stream:
            self._outside()
        elif self._forward is not None:
            try:
                ids, weights = read(module, inputs, output)
                logits = None if read_logits is None else read_logits(module, inputs, output)
            except (TypeError, ValueError, LookupError, AttributeError, CaptureError) as problem:
                self._forward = None
                self._fail(f"{self.routers[slot].name} cannot be read: {problem}")
            else:
                self._kept.append((index, ids, weights, logits))
        self.overhead_s += perf_counter() - began

    def keep(self, slot: int, ids: Tensor, weights: Tensor | None, logits: Tensor | None) -> None:
        """A router's decision, as read inside compiled code."""
        stream, index, *_ = self._slots[slot]
        if self._open != stream:
            self._outside()
        elif self._forward is not None:
            self._kept.append((index, ids, weights, logits))

    def _outside(self) -> None:
        """A router was called outside a forward pass of its owner."""
        recomputes = _graph_task() != -1
        self.recomputed += recomputes
        self._stray += not recomputes

    def end(self, stream: int) -> None:
        """A stack of layers is done: hand over what its routers decided."""
        began = perf_counter()
        if self._open != stream:
            return
        self._open, forward, kept = -1, self._forward, self._kept
        self._forward, self._kept, self._root_tokens = None, [], None
        if forward is not None:
            try:
                self._hand_over(*forward, kept)
            except CaptureError as problem:
                self._fail(str(problem))
            except (TypeError, LookupError, AttributeError, RuntimeError) as problem:
                kinds = ", ".join(dict.fromkeys(type(router.module).__name__ for router in self._groups[stream]))
                self._fail(f"what {kinds} gave cannot be read: {problem}; adapt it with moesim.capture.register_router")
        self.overhead_s += perf_counter() - began

    def _hand_over(self, forward: Forward, tensors: dict[str, Tensor], kept: list[Kept]) -> None:
        group, stream = self._groups[forward.stream], forward.stream
        plain = [one[0] for one in kept] == self._plain[stream]
        if not plain and (silent := set(self._plain[stream]) - {one[0] for one in kept}):
            self._refuse_silent([group[index] for index in sorted(silent)], forward)
        on_cpu, decided, wanted = True, [], self._weights
        for index, ids, weights, logits in kept:
            # the graph behind the weights must not live on; all of them here, where `detach` is cold only once
            gates = weights.detach() if wanted and weights is not None else None
            scores = logits.detach() if logits is not None else None
            decided.append((index, ids, gates, scores))
            on_cpu = on_cpu and ids.is_cpu and (gates is None or gates.is_cpu) and (scores is None or scores.is_cpu)
        shape = decided[0][1].shape
        rows = shape[0] if plain and len(shape) == 2 else sum(one[1].shape[:-1].numel() for one in decided if one[0] == decided[0][0])
        if on_cpu:
            size_B = self._held_B.get((stream, rows)) or self._measure(decided, stream, rows)
        else:
            tensors |= stacked(gather(group, decided, self._widths))
            decided, size_B = [], sum(tensor.nbytes for tensor in tensors.values())
        if self._ring.put(Pass(forward, rows, size_B, decided), tensors, size_B):
            self.forwards += 1
            self.tokens += rows

    def _measure(self, decided: Sequence[Kept], stream: int, rows: int) -> int:
        """Bytes that a pass of so many rows holds: of a sliced tensor, all of its storage."""
        if len(self._held_B) >= 1024:  # a server meets thousands of lengths
            self._held_B.clear()
        tensors = [tensor for one in decided for tensor in one[1:] if isinstance(tensor, Tensor)]
        size_B = self._held_B[stream, rows] = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return size_B

    def _refuse_silent(self, silent: list[Router], forward: Forward) -> None:
        """Every layer must have fired, unless the model drops whole layers in training."""
        drops = forward.training and getattr(self._owners[forward.stream], "layerdrop", 0) > 0
        if not drops or len(silent) == len(self._groups[forward.stream]):
            names = "; ".join(f"layer {router.layer} never fired ({router.name}, {type(router.module).__name__})" for router in silent)
            raise CaptureError(
                f"{names}: these layers run without calling their router (a fused kernel, a replaced forward); "
                "switch that off, or register the module that does decide"
            )
        self._skipped += len(silent)

    # Writer thread ---------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        self._rows.flush()
        self.writer.flush()

    # Failure and end -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._ring.failure is not None and self.error is None:
            problem = self._ring.failure
            self._fail(str(problem) if isinstance(problem, CaptureError) else f"{self.writer.path}: routing cannot be written: {problem}")

    def _fail(self, message: str) -> None:
        """Stop capturing; raise once, or warn once."""
        self._remove_hooks()
        self.error = CaptureError(f"{message.rstrip('.')}. Capture has stopped; {self.writer.rows_written:,} tokens are safe in {self.writer.path}")
        if self._on_error == "raise":
            raise self.error
        warnings.warn(str(self.error), RuntimeWarning, stacklevel=3)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._kept, self._forward, self._root_tokens, self._open = [], None, None, -1

    def close(self, **notes: Any) -> None:
        """Remove the hooks, write what is under way and the manifest; `notes` go into it. Safe to call again.

        Raises CaptureError when writing has failed and that was not said before, or when nothing was seen.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._remove_hooks()
        self._ring.close()
        if self._ring.failure is None and self.error is None:
            self._finish(notes)
        self._check()

    def _finish(self, notes: dict[str, Any]) -> None:
        self.writer.close(
            **notes, every=self._every, max_tokens=self._max_tokens, forwards_dropped=self.dropped, forwards_unmatched=self._rows.unmatched,
            layers_skipped=self._skipped, routers_recomputed=self.recomputed, ring_peak_B=self._ring.peak_B,
            hooks_s=self.overhead_s, writer_s=self.writer_s,
        )  # fmt: skip
        if self._rows.unmatched:
            warnings.warn(UNMATCHED.format(path=self.writer.path, passes=self._rows.unmatched), RuntimeWarning, stacklevel=4)
        if not self._seen:
            stray = f" Routers were called {self._stray} times outside their model's forward: call the model, not its layers." if self._stray else ""
            self._fail(f"no forward pass was seen: another model is run, or this one was compiled before capture started.{stray}")

    def _at_exit(self) -> None:
        self._on_error = "warn"
        self.close(interrupted="exit without close")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._on_error = "warn"
        self.close(**({"interrupted": kind.__name__} if kind else {}))
