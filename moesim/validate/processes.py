"""Expert parallelism between processes: every rank its tokens and experts, `all_to_all_single` with uneven splits.

One process per rank, NCCL between GPUs, gloo on a CPU. A token goes once to each distinct rank that holds one of its
experts, its selections with it; a rank returns one partial sum for each token it received. Counts go first.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from moesim.cost import route
from moesim.errors import InputError, ValidationError
from moesim.plan import Placement
from moesim.validate.backends import Backend
from moesim.validate.layer import moe_layer
from moesim.validate.ranks import Share, check_equal, shares
from moesim.validate.weights import ACTIVATIONS, DTYPES, ROUNDING, ExpertWeights

PATIENCE_S = 300.0
PARTS = ("dispatch_s", "compute_s", "combine_s")


def execute_processes(
    placement: Placement,
    layer: int,
    ids_TLK: NDArray[np.uint16],
    gates_TLK: NDArray[np.floating],
    *,
    hidden: int,
    intermediate: int,
    gated: bool = True,
    dtype: str = "fp32",
    device: str = "cpu",
    backend: Backend = "loop",
    repeats: int = 5,
    seed: int = 0,
    patience_s: float = PATIENCE_S,
) -> dict[str, Any]:
    """Run one layer (row `layer`) on as many processes as the placement has devices, one GPU each or all on this CPU.

    Every process draws the same random experts and tokens and keeps its own. The combined output must equal the
    unplaced layer's, and the token copies between ranks the simulator's, exactly; ValidationError otherwise, and when a
    process fails or does not end within `patience_s`. Returns, JSON-ready: seconds of dispatch, computation and combine
    of every rank (medians), copies and bytes between ranks, deviation.
    """
    world = placement.devices
    if device.startswith("cuda") and torch.cuda.device_count() < world:
        raise InputError(f"{world} ranks need as many GPUs, torch sees {torch.cuda.device_count()}; use --device cpu, or execute ranks one by one")
    job = {
        "placement": placement, "layer": layer, "ids": ids_TLK, "gates": np.asarray(gates_TLK, np.float32), "hidden": hidden, "seed": seed,
        "intermediate": intermediate, "gated": gated, "dtype": dtype, "device": device, "backend": backend, "repeats": repeats,
        "patience_s": patience_s,
    }  # fmt: skip
    found = _spawn(world, job, patience_s)
    expected = route(ids_TLK, placement, np.zeros(world, np.int64)).copies_SLGG[0, layer]
    copies = np.array([found[rank]["copies"] for rank in range(world)], np.float64)
    if not (copies == expected).all():
        source, target = np.argwhere(copies != expected)[0]
        raise ValidationError(
            f"rank {source} sent {copies[source, target]:.0f} token copies to rank {target}, the simulator says {expected[source, target]:.0f}"
        )
    element_B = torch.empty(0, dtype=ACTIVATIONS[dtype]).element_size()
    return {
        "layer": placement.layers[layer],
        "ranks": world,
        "transport": "nccl" if device.startswith("cuda") else "gloo",
        "copies": copies.astype(int).tolist(),
        "copies_equal_simulated": True,
        "bytes": (copies * hidden * element_B * (1 - np.eye(world))).tolist(),
        "deviation": max(found[rank]["deviation"] for rank in range(world)),
        "per_rank": [{name: found[rank][name] for name in PARTS} for rank in range(world)],
    }


def _spawn(world: int, job: Mapping[str, Any], patience_s: float) -> dict[int, dict[str, Any]]:
    """Answers of all ranks; every process is gone when this returns."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meet = Path(folder) / "meet"
        workers = [context.Process(target=_work, args=(rank, world, str(meet), dict(job), answers), daemon=True) for rank in range(world)]
        for worker in workers:
            worker.start()
        found: dict[int, dict[str, Any]] = {}
        end = time.monotonic() + patience_s
        try:
            while len(found) < world:
                try:
                    rank, answer = answers.get(timeout=0.5)
                except queue.Empty:
                    dead = [i for i, worker in enumerate(workers) if worker.exitcode not in (None, 0) and i not in found]
                    if dead:
                        raise ValidationError(f"rank {dead[0]} ended with exit code {workers[dead[0]].exitcode}; see its message above") from None
                    if time.monotonic() > end:
                        late = sorted(set(range(world)) - set(found))
                        raise ValidationError(f"ranks {late} did not answer within {patience_s:.0f} s; a collective hangs") from None
                    continue
                if "error" in answer:
                    raise ValidationError(f"rank {rank} failed: {answer['error']}")
                found[rank] = answer
        finally:
            for worker in workers:
                worker.join(5 if len(found) == world else 0.1)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
            answers.close()
    return found


def _work(rank: int, world: int, meet: str, job: dict[str, Any], answers: Any) -> None:
    """One process: join, run, answer, leave."""
    try:
        torch.set_num_threads(1)
        cuda = job["device"].startswith("cuda")
        if cuda:
            torch.cuda.set_device(rank)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "nccl" if cuda else "gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=timedelta(seconds=job["patience_s"])
        )
        try:
            with torch.inference_mode():
                answers.put((rank, _rank(rank, world, job)))
        finally:
            distributed.destroy_process_group()
    except Exception as problem:
        answers.put((rank, {"error": f"{type(problem).__name__}: {problem}"}))


def _rank(rank: int, world: int, job: Mapping[str, Any]) -> dict[str, Any]:
    device = f"cuda:{rank}" if job["device"].startswith("cuda") else "cpu"
    placement, layer, ids, gates = job["placement"], job["layer"], job["ids"], job["gates"]
    experts = ExpertWeights.random(
        experts=placement.experts, hidden=job["hidden"], intermediate=job["intermediate"], gated=job["gated"], dtype=DTYPES[job["dtype"]],
        seed=job["seed"],
    )  # fmt: skip
    hidden = torch.randn(len(ids), job["hidden"], generator=torch.Generator().manual_seed(job["seed"])).to(experts.activations)
    parts = [share for share in shares(placement, ids, gates, node_G=np.zeros(world, int)) if share.layer == layer]
    source_T = np.arange(len(ids)) * world // len(ids)
    first = int((source_T < rank).sum())
    here = hidden[source_T == rank].to(device)
    plan = _Exchange(parts, source_T, rank, device)
    resident = experts.like(len(parts[rank].experts), device=device)
    for slot, expert in enumerate(parts[rank].experts):
        resident.put(slot, experts, expert)
    arrived = torch.zeros(0)
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(job["repeats"] + 1):
        arrived = _timed(times["dispatch_s"], device, partial(plan.dispatch, here))
        partial_sums = _timed(times["compute_s"], device, partial(plan.compute, arrived, resident, job["backend"]), alone=True)
        out = _timed(times["combine_s"], device, partial(plan.combine, partial_sums, here))
    whole = _whole(parts, hidden, experts, placement, job["backend"])[first : first + len(here)]
    deviation = check_equal(out.cpu(), whole, tolerance=ROUNDING[hidden.dtype], why="tokens went to wrong ranks or came back in the wrong order")
    return {"copies": plan.send, "deviation": deviation, **{name: float(np.median(values[1:])) for name, values in times.items()}}


def _whole(parts: list[Share], hidden: Tensor, experts: ExpertWeights, placement: Placement, backend: Backend) -> Tensor:
    """The layer that holds all experts, for all tokens."""
    slots, tokens, gates = [], [], []
    for share in parts:
        slots.append(torch.as_tensor(share.experts, dtype=torch.int64)[share.slots_N])
        tokens.append(share.received_R[share.tokens_N])
        gates.append(share.gates_N)
    return moe_layer(hidden, torch.cat(slots), torch.cat(tokens), torch.cat(gates), experts, backend=backend)


class _Exchange:
    """What one rank sends and receives: tokens by destination, in order of the token; selections go with them."""

    def __init__(self, parts: list[Share], source_T: NDArray[np.int64], rank: int, device: str) -> None:
        world = len(parts)
        first = int((source_T < rank).sum())
        sent = [share.received_R[torch.as_tensor(source_T == rank)[share.received_R]] - first for share in parts]
        self.send = [len(rows) for rows in sent]
        self.rows = torch.cat(sent).to(device)
        counts = torch.tensor(self.send, device=device)
        self.receive_counts = torch.zeros(world, dtype=torch.int64, device=device)
        distributed.all_to_all_single(self.receive_counts, counts)
        self.receive: list[int] = self.receive_counts.tolist()
        share = parts[rank]
        if sum(self.receive) != len(share.received_R):
            raise ValidationError(f"rank {rank} is sent {sum(self.receive)} tokens and expects {len(share.received_R)}; placements differ")
        self.slots, self.tokens, self.gates = share.slots_N.to(device), share.tokens_N.to(device), share.gates_N.to(device)

    def dispatch(self, here_TH: Tensor) -> Tensor:
        """Gather own tokens by destination and exchange them: tokens received, by source."""
        out = here_TH.new_empty(sum(self.receive), here_TH.shape[1])
        distributed.all_to_all_single(out, here_TH[self.rows], self.receive, self.send)
        return out

    def compute(self, arrived_RH: Tensor, weights: ExpertWeights, backend: Backend) -> Tensor:
        """Partial sums of the received tokens over this rank's experts."""
        return moe_layer(arrived_RH, self.slots, self.tokens, self.gates, weights, backend=backend)

    def combine(self, sums_RH: Tensor, here_TH: Tensor) -> Tensor:
        """Send partial sums back and add them up, rank after rank."""
        back = sums_RH.new_empty(len(self.rows), sums_RH.shape[1])
        distributed.all_to_all_single(back, sums_RH, self.send, self.receive)
        return torch.zeros_like(here_TH).index_add_(0, self.rows, back)


def _timed(times: list[float], device: str, call: Any, *, alone: bool = False) -> Tensor:
    """Append the seconds of a call that all ranks begin together; its result. Wall clock; a CPU's work `alone`: processor time."""
    cuda = device.startswith("cuda")
    clock = time.thread_time if alone and not cuda else time.perf_counter
    distributed.barrier()
    begin = clock()
    out: Tensor = call()
    if cuda:
        torch.cuda.synchronize()
    times.append(clock() - begin)
    return out
