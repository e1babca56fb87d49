"""Ring: carries routing from the training thread to the disk without making the training thread wait for either.

CPU tensors are handed over as they are (they are private copies). CUDA tensors are copied on a side stream into pinned
buffers that the ring reuses; a pageable copy would synchronise. At most `slots` forward passes are under way.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WhenFull = Literal["block", "drop"]
Arrays = dict[str, NDArray[Any]]
LOOK_S = 2.0


class Ring:
    """Bounded hand-over to one thread that calls `consume(label, arrays)`, and `flush()` after the first pass, when idle and at the end.

    The thread looks every two seconds (sooner if `idle_s` is less), and at once for the first pass and when the ring is
    half full: waking it for every pass would stop the producer as often, for both need the interpreter lock. `put`
    blocks or drops when `slots` passes wait. After the first failure (kept in `failure`) everything is discarded, so
    that the producer never hangs; the producer decides how to raise it.
    """

    def __init__(self, consume: Callable[[Any, Arrays], None], flush: Callable[[], None], *, idle_s: float, slots: int, when_full: WhenFull) -> None:
        self.failure: BaseException | None = None
        self.dropped = 0
        self.writer_s = 0.0  # CPU time of the writer thread
        self.peak_B = 0
        self._put_B, self._done_B = 0, 0  # each written by one thread only: no lock for the two to queue at
        self._consume, self._flush, self._idle_s, self._when_full = consume, flush, idle_s, when_full
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(slots):
            self._free.put(_Slot())
        self._full: deque[_Slot] = deque()
        self._half, self._enough = max(1, slots // 2), 1  # passes that wake the thread
        self._stop, self._wake = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="moesim-capture", daemon=True)
        self._thread.start()

    def put(self, label: Any, tensors: Mapping[str, Tensor], size_B: int) -> bool:
        """Hand over one pass that holds `size_B`; False when it was dropped because the ring is full or has failed."""
        try:
            slot = self._free.get(block=self._when_full == "block" and self.failure is None)
        except queue.Empty:
            self.dropped += 1
            return False
        slot.load(label, tensors, size_B)
        self._put_B += size_B
        if (waiting_B := self._put_B - self._done_B) > self.peak_B:
            self.peak_B = waiting_B
        self._full.append(slot)
        if len(self._full) >= self._enough:
            self._wake.set()
        return True

    def close(self) -> None:
        """Wait until everything handed over is written; does not close the writer."""
        self._stop = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        look_s, last = min(LOOK_S, max(self._idle_s, 0.05)), time.monotonic()
        first = True
        while not (self._stop and not self._full):
            self._wake.wait(look_s)
            self._wake.clear()
            began = time.thread_time()
            if self._full:
                while self._full:
                    slot = self._full.popleft()
                    self._guard(self._consume_slot, slot)
                    self._done_B += slot.size_B
                    slot.clear()
                    self._free.put(slot)
                if first:  # an early part: the trace opens from here on, and a full disk is found out now
                    self._guard(self._flush)
                    first, self._enough = False, self._half
                last = time.monotonic()
            elif time.monotonic() - last > self._idle_s:  # a run that stands still gets its tokens to disk too
                self._guard(self._flush)
                last = time.monotonic()
            self.writer_s += time.thread_time() - began
        began = time.thread_time()
        self._guard(self._flush)
        self.writer_s += time.thread_time() - began

    def _consume_slot(self, slot: _Slot) -> None:
        self._consume(slot.label, slot.arrays())

    def _guard(self, work: Callable[..., None], *arguments: Any) -> None:
        if self.failure is None:
            try:
                work(*arguments)
            except BaseException as problem:
                self.failure = problem


class _Slot:
    """Room for the tensors of one pass. Pinned buffers grow to the next power of two and stay."""

    def __init__(self) -> None:
        self.size_B = 0
        self.label: Any = None
        self._held: dict[str, Tensor] = {}
        self._pinned: dict[str, Tensor] = {}
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._done: list[torch.cuda.Event] = []

    def load(self, label: Any, tensors: Mapping[str, Tensor], size_B: int) -> None:
        self.label, self.size_B = label, size_B
        for name, tensor in tensors.items():
            self._held[name] = self._to_host(name, tensor) if tensor.is_cuda else tensor
        if self._sides:
            self._done = [side.record_event() for side in self._sides.values()]

    def _to_host(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device not in self._sides:
            self._sides[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        side = self._sides[tensor.device]
        room = self._pinned.get(name)
        if room is None or room.dtype != tensor.dtype or room.numel() < tensor.numel():
            room = torch.empty(1 << max(tensor.numel() - 1, 1).bit_length(), dtype=tensor.dtype, pin_memory=True)
            self._pinned[name] = room
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            host = room[: tensor.numel()].view(tensor.shape)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(side)
        return host

    def arrays(self) -> Arrays:
        """The tensors as arrays that stay valid after the slot is used again."""
        for event in self._done:
            event.synchronize()
        return {name: np.array(held.numpy(), copy=name in self._pinned) for name, held in self._held.items()}

    def clear(self) -> None:
        """Let go of everything but the pinned buffers."""
        self.label, self._held, self._done = None, {}, []
