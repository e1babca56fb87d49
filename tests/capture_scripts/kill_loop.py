"""Starts capture in child processes, kills each with SIGKILL at a random moment, prints how far each had come."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet  # noqa: F401 - loaded once for all children
import torch
from capture_scripts.tiny import TinyMoE, adapt, tiny_spec, tokens

from moesim.capture import capture

PART_ROWS, BATCH, LENGTH, RING = 96, 2, 8, 3


def child(out: Path, pipe: int) -> None:
    model = TinyMoE()
    with torch.no_grad(), capture(model, out, model_spec=tiny_spec(), part_rows=PART_ROWS, ring_slots=RING) as recorder:
        for step in range(10**6):
            recorder.step(step)
            model(tokens(step, BATCH, LENGTH))
            os.write(pipe, b".")


def main(root: Path, times: int) -> None:
    torch.set_num_threads(1)
    adapt()
    chance = random.Random(0)
    done = []
    for n in range(times):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            child(root / f"run{n}", writing)
        os.close(writing)
        os.read(reading, 1)  # the first step is done
        while n >= 3 and not list((root / f"run{n}").glob("part-*")):  # the first three may die before any part is there
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        steps = 1
        while block := os.read(reading, 1 << 16):
            steps += len(block)
        os.close(reading)
        done.append(steps)
    print(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
