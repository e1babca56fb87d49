"""Work beside the computation: a stream of its own on CUDA, one thread on a CPU. First in, first out, as a copy engine.

Seconds on a CPU are processor time, which other programs do not inflate, of the computation and of the thread beside it on one
clock: work begins when it is handed in and what came before it is done, and who waits for it goes on when its own seconds are over.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from moesim.errors import ValidationError

PATIENCE_S = 120.0  # a copy that takes longer never ends

Mark: TypeAlias = Any  # a moment of the computation: a CUDA event, or seconds


@dataclass(kw_only=True, slots=True)
class Ticket:
    """Work handed in; `seconds` can be read after `Side.finish`."""

    future: Future[float] | None = None
    start: Mark = None
    end: Mark = None  # on a CPU known once somebody has waited for it, or for work handed in later

    @property
    def seconds(self) -> float:
        """How long the work took."""
        if self.future is not None:
            return self.future.result(PATIENCE_S)
        return float(self.start.elapsed_time(self.end)) / 1e3


class Side:
    """A place beside the computation where work is done in the order it comes.

    Work starts after everything the computation was given before it (a slot's last use is over), and the computation
    waits for a ticket before it uses what was made. Use as a context: leaving it waits for all work.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.stream: Any = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]
        self.thread = None if self.cuda else ThreadPoolExecutor(1)
        self._open: deque[Ticket] = deque()  # on a CPU: handed in, end unknown
        self._free_s = self._waited_s = 0.0

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def submit(self, work: Callable[[], object]) -> Ticket:
        """Hand work in. On CUDA it must not wait for the host (copies from pinned memory, non_blocking)."""
        if self.thread is not None:
            ticket = Ticket(future=self.thread.submit(_timed, work), start=self.mark())
            self._open.append(ticket)
            return ticket
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            start.record()
            work()
            end.record()
        return Ticket(start=start, end=end)

    def wait(self, ticket: Ticket) -> None:
        """Let the computation go on when the work is done."""
        if ticket.future is None:
            torch.cuda.current_stream().wait_event(ticket.end)
            return
        try:
            while ticket.end is None:
                first = self._open.popleft()
                assert first.future is not None
                first.end = self._free_s = max(self._free_s, first.start) + first.future.result(PATIENCE_S)
        except TimeoutError:
            raise ValidationError(f"a copy did not end within {PATIENCE_S:.0f} s; check the machine's memory") from None
        self._waited_s += max(0.0, ticket.end - self.mark())

    def mark(self) -> Mark:
        """This moment of the computation."""
        if not self.cuda:
            return time.thread_time() + self._waited_s
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Seconds between two moments; on CUDA after `finish`."""
        return float(begin.elapsed_time(end)) / 1e3 if self.cuda else float(end - begin)

    def finish(self) -> None:
        """Wait for all work."""
        if self.thread is not None:
            self.thread.shutdown(wait=True)
        else:
            torch.cuda.synchronize()


def _timed(work: Callable[[], object]) -> float:
    begin = time.thread_time()
    with torch.inference_mode():
        work()
    return time.thread_time() - begin
