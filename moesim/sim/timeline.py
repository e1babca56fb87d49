"""Timeline: Chrome trace JSON, gzipped, that Perfetto and chrome://tracing open.

One process per device with a thread per stream; collectives are the process "network". Times are whole nanoseconds, written in
microseconds. Viewers take thread 0, and one whose id is its process', for the main thread, so ids are neither.
Format: "Trace Event Format", Google, 2016 (complete events "X", metadata "M").
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from moesim.hardware import Cluster
from moesim.sim.tasks import ALL, Task

_TRACKS = ("compute", "h2d", "d2h", "nvme", "memory", "host", "exchange", "intra", "inter", "weights", "gradients")
_TITLES = {
    "h2d": "copy host→device",
    "d2h": "copy device→host",
    "nvme": "read from SSD",
    "memory": "copy inside the device",
    "host": "experts on the host",
    "exchange": "all-to-all",
    "intra": "inside nodes",
    "inter": "between nodes",
    "weights": "expert weights",
}


class Timeline:
    """Writes tasks as they end; memory does not grow. The file appears, whole, when the context ends without an error."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        self._path = path
        self._cluster = cluster
        self._seen: set[tuple[int, str]] = set()

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        self._raw: BinaryIO = os.fdopen(handle, "wb")
        self._file = gzip.GzipFile(filename="", fileobj=self._raw, mode="wb", compresslevel=6, mtime=0)  # no clock in the bytes
        head = json.dumps({"cluster": self._cluster.name, "made by": "moesim"})
        self._file.write(f'{{"displayTimeUnit":"ms","otherData":{head},"traceEvents":[\n'.encode())
        self._comma = ""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.write(b"\n]}\n")
        self._file.close()
        self._raw.close()
        if kind is None:
            umask = os.umask(0)
            os.umask(umask)
            Path(self._temporary).chmod(0o666 & ~umask)
            Path(self._temporary).replace(self._path)
        else:
            Path(self._temporary).unlink(missing_ok=True)

    def add(self, task: Task) -> None:
        """One slice per task; a track is named when it is first used."""
        process = task.device + 2  # the network is 1
        thread = 100 * process + _TRACKS.index(task.stream)
        if (process, task.stream) not in self._seen:
            self._name(process, thread, task)
        step, layer = task.label
        start, end = round(task.start * 1e9), round(task.end * 1e9)  # rounded apart, neighbours would overlap, and one be dropped
        self._write(
            {
                "name": task.about or task.kind,
                "cat": task.stream,
                "ph": "X",
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
                "pid": process,
                "tid": thread,
                "args": {"step": step, "layer": layer, "chunk": task.chunk},
            }
        )

    def _name(self, process: int, thread: int, task: Task) -> None:
        if not any(known == process for known, _ in self._seen):
            g = task.device
            title = "network" if g == ALL else f"device {g} ({self._cluster.devices[g].name}, node {int(self._cluster.node_G[g])})"
            self._write({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
            self._write({"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}})
        self._seen.add((process, task.stream))
        self._write({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": _TITLES.get(task.stream, task.stream)}})

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._comma.encode() + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode())
        self._comma = ",\n"
