"""Work beside the computation: a stream of its own on CUDA, one thread on a CPU. First in, first out, as a copy engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from moesim.errors import ValidationError

PATIENCE_S = 120.0  # a copy that takes longer never ends


@dataclass(kw_only=True, slots=True)
class Ticket:
    """Work handed in; `seconds` and `stall_s` can be read after `Side.close`."""

    future: Future[float] | None = None
    start: Any = None
    end: Any = None
    waits: list[Any] = field(default_factory=list)  # pairs of events, or seconds

    @property
    def seconds(self) -> float:
        """How long the work took."""
        if self.future is not None:
            return self.future.result(PATIENCE_S)
        return float(self.start.elapsed_time(self.end)) / 1e3

    @property
    def stall_s(self) -> float:
        """How long the computation stood still for it, over all waits."""
        return sum(w if isinstance(w, float) else float(w[0].elapsed_time(w[1])) / 1e3 for w in self.waits)


class Side:
    """A place beside the computation where work is done in the order it comes.

    Work starts after everything the computation was given before it (a slot's last use is over), and the computation
    waits for a ticket before it uses what was made. Use as a context: leaving it waits for all work.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.stream: Any = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]
        self.thread = None if self.cuda else ThreadPoolExecutor(1)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, work: Callable[[], object]) -> Ticket:
        """Hand work in. On CUDA it must not wait for the host (copies from pinned memory, non_blocking)."""
        if self.thread is not None:
            return Ticket(future=self.thread.submit(_timed, work))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            start.record()
            work()
            end.record()
        return Ticket(start=start, end=end)

    def wait(self, ticket: Ticket) -> None:
        """Let the computation go on when the work is done; the time it stands still is booked on the ticket."""
        if ticket.future is not None:
            begin = time.perf_counter()
            try:
                ticket.future.result(PATIENCE_S)
            except TimeoutError:
                raise ValidationError(f"a copy did not end within {PATIENCE_S:.0f} s; check the machine's memory") from None
            ticket.waits.append(time.perf_counter() - begin)
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        torch.cuda.current_stream().wait_event(ticket.end)
        after.record()
        ticket.waits.append((before, after))

    def close(self) -> None:
        """Wait for all work."""
        if self.thread is not None:
            self.thread.shutdown(wait=True)
        else:
            torch.cuda.synchronize()


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    with torch.inference_mode():
        work()
    return time.perf_counter() - begin
