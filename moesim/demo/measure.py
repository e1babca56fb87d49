"""Everything that needs a GPU, in one go: `python -m moesim.demo.measure` (`make gpu`).

For each of two published models: train a small model with as many experts and choices, capture its routing in three domains,
place it in eight ways, calibrate the device on other expert shapes and other loads, then execute every rank of every placement
with experts of the published sizes, at decode and prefill batches. Cache plans, migrations and a model run under a plan follow.

One file per model and domain goes to `reports/measured/<hardware>-<date>-<model>-<domain>.json`. A run stops after `--minutes`;
the same command goes on from the steps kept in `<out>/.unfinished/`. `moesim report reports/measured/*.json` draws them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moesim.demo.corpus import load_corpus, split
from moesim.demo.train import SEQUENCE, build_model, train
from moesim.errors import InputError, MoesimError
from moesim.files import digest, write_json
from moesim.hardware import Cluster, load_cluster
from moesim.model import ModelSpec, load_model
from moesim.optimize import Problem, place
from moesim.plan import CachePlan, Placement, Plan, slots_per_device
from moesim.trace import Trace, load_trace

MODELS = ("qwen3-30b-a3b", "deepseek-v2-lite")
SCHEMA_VERSION = 1
SOLVERS = ("round-robin", "linear", "greedy", "eplb", "local-search", "partition", "random")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured. `per_rank` are tokens per rank of a batch; `shrink` divides the experts' sizes."""

    domains: int = 3
    placements: int = 8
    per_rank: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    cluster: str = "h200x8"
    experts: int | None = None  # None: the model's
    shrink: int = 1
    steps: int = 300
    loads: int = 40
    repeats: int = 21
    solver_s: float = 2.0
    cache_tokens: int = 256
    new_tokens: int = 32


FULL = Size()
SMALL = Size(
    domains=1, placements=3, per_rank=(4, 64), cluster="cpu", experts=16, shrink=32, steps=3, loads=6, repeats=5, solver_s=0.5,
    cache_tokens=24, new_tokens=4,
)  # fmt: skip


class OutOfTime(Exception):  # noqa: N818 - reads as what happened
    """The run's minutes are over; finished steps are kept."""


def main(arguments: Sequence[str] | None = None, *, size: Size | None = None) -> int:
    """Run what is missing; 0 also where there is no GPU or time is over, 1 when a measurement failed (what succeeded is kept)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/measured"))
    parser.add_argument("--device", default="cuda", help="cpu runs the same measurements, smaller, to try the path")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this long; the same command goes on")
    options = parser.parse_args(arguments)
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"no GPU here (torch {torch.__version__} sees none): nothing was measured, {options.out} is unchanged")
        return 0
    run = _Run(options.out, options.device, size or (SMALL if options.device == "cpu" else FULL), options.minutes)
    failed = 0
    for name in MODELS:
        for index in range(run.size.domains):
            try:
                print(run.measure(name, index), flush=True)
            except OutOfTime:
                print(f"{options.minutes:g} minutes are over; finished steps are kept in {run.work}: run the same command again")
                return int(failed + run.failed > 0)
            except (MoesimError, RuntimeError, OSError) as problem:  # torch reports a vanished GPU as RuntimeError
                print(f"{name}, domain {index + 1}: failed: {problem}")
                failed += 1
    failed += run.failed
    if not failed:
        shutil.rmtree(run.work.parent, ignore_errors=True)
        print(f"all measured; draw it: moesim report {options.out}/*.json")
    return int(failed > 0)


class _Run:
    """One run: what is measured, where, until when."""

    def __init__(self, out: Path, device: str, size: Size, minutes: float) -> None:
        from moesim.validate.machine import hardware

        self.out, self.device, self.size = out, device, size
        self.end = time.monotonic() + 60 * minutes
        machine = hardware(device)
        self.machine = _hardware_name(machine)
        self.work = out / ".unfinished" / f"{self.machine}-{digest(repr(size), device, repr(machine))}"  # another host begins afresh
        self.failed = 0

    def check_time(self, share: float = 0.0, what: str = "") -> None:
        """A progress function that ends the run when its time is over."""
        if time.monotonic() > self.end:
            raise OutOfTime

    def measure(self, name: str, index: int) -> str:
        """Measure one model in one domain, unless it is there; a line that says so."""
        from moesim.validate import calibrate_for, validate
        from moesim.validate.kept import Kept

        size, device = self.size, self.device
        done = self.work / f"{name}-{index}.done"
        if done.exists():
            return f"{done.read_text()}: kept"
        self.check_time()
        shape, traces, model = self.routing(name)
        cluster = load_cluster(size.cluster)
        source = traces[index]
        domain = source.path.name
        learn, unseen = source.select(tokens="0%:50%"), source.select(tokens="50%:")
        plans = self.placements(learn, cluster)
        self.check_time()
        used: Any = "grouped" if device.startswith("cuda") else "loop"
        calibration = calibrate_for(
            shape, device=device, resident=max(int(plan.placement.slots_G.max()) for plan in plans), backend=used,
            most_selections=2 * max(size.per_rank) * shape.top_k, loads=size.loads, seed=1, keep=self.work / f"{name}.calibration.json",
            progress=self.check_time,
        )  # fmt: skip
        found = validate(
            unseen, plans, device=device, shape=shape, cluster=cluster, calibration=calibration, backend=used,
            tokens=[tokens * cluster.size for tokens in size.per_rank], repeats=size.repeats, keep=self.work / f"{name}-{domain}.json",
            progress=self.check_time,
        )  # fmt: skip
        path = self.out / f"{self.machine}-{found['date']}-{name}-{domain}.json"
        title = f"{name} experts, {domain} routing, on {found['hardware'].get('gpu') or found['hardware']['cpu']}"
        document = {"schema_version": SCHEMA_VERSION, "title": title, "what": f"{name}-{domain}", "validation": found}
        found["executions"] = []
        write_json(path, document)  # what comes now may fail, and takes nothing with it
        kept = Kept(
            self.work / f"{name}-{domain}.executions.json", {"what": "executions", "trace": unseen.digest, "plans": [p.digest for p in plans]}
        )
        failed = []
        for what, carry_out in self.executions(unseen, plans, shape, found, model).items():
            self.check_time()
            try:
                found["executions"] += kept.step(what, carry_out)
            except (MoesimError, RuntimeError) as problem:
                failed.append(f"{what} failed: {problem}")
                found["notes"].append(failed[-1])
            write_json(path, document)
        if failed:
            self.failed += 1
            return f"{name}, {domain}: wrote {path}, but {'; '.join(failed)}"
        done.write_text(path.name)
        return f"{name}, {domain}: wrote {path}"

    def executions(
        self, unseen: Trace, plans: Sequence[Plan], shape: ModelSpec, found: dict[str, Any], model: Any
    ) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        """A cache plan, a migration and a model under the first plan; one process per rank where there are devices for them."""
        import torch

        from moesim.validate.execute import execute

        size, device = self.size, self.device
        run = partial(execute, unseen, found=found, sizes=shape, device=device, tokens=size.cache_tokens)
        pieces: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "cache": partial(run, plans[:1], [lru_cache(plans[0], shape, unseen.model)], progress=self.check_time),
            "migration": partial(run, plans[:2], [], migrate=True, progress=self.check_time),
        }
        if device == "cpu" or torch.cuda.device_count() >= plans[0].placement.devices:
            pieces["processes"] = partial(run, plans[:1], [], processes=True)
        return pieces | {"in a model": lambda: [self.in_model(model, plans[0], found["backend"])]}

    def routing(self, name: str) -> tuple[ModelSpec, list[Trace], Any]:
        """Sizes to execute, traces of a small trained model with as many experts and choices, one per domain, and that model."""
        import torch

        size, spec = self.size, load_model(name)
        experts = size.experts or spec.experts
        hidden, width = spec.hidden // size.shrink, spec.intermediate // size.shrink
        shape = replace(spec, experts=experts, top_k=min(spec.top_k, experts // 2), hidden=hidden, intermediate=width)
        parts = {domain: split(text) for domain, text in list(load_corpus().items())[: max(3, size.domains)]}
        model = build_model(experts=shape.experts, top_k=shape.top_k, layers=2, hidden=64, intermediate=32)
        folder, weights = self.work / f"{name}-traces", self.work / f"{name}.pt"
        if weights.exists():
            model.load_state_dict(torch.load(weights, weights_only=True))
            model.to(self.device)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            train(model, {domain: text for domain, (text, _) in parts.items()}, steps=size.steps, device=self.device,
                  progress=lambda step, loss: self.check_time())  # fmt: skip
            for domain, (_, text) in list(parts.items())[: size.domains]:
                self.capture(model, text, folder / domain)
            torch.save(model.state_dict(), weights)
        model.eval()
        return shape, [load_trace(folder / domain) for domain in list(parts)[: size.domains]], model

    def capture(self, model: Any, text: Any, path: Path) -> None:
        """Routing of enough held-out windows for the largest batch, learnt and unseen halves."""
        import torch

        from moesim.capture import capture

        wanted = 2 * max(self.size.per_rank) * load_cluster(self.size.cluster).size
        starts = np.linspace(0, len(text) - SEQUENCE, -(-wanted // SEQUENCE)).astype(int)
        windows = torch.from_numpy(np.stack([text[start : start + SEQUENCE] for start in starts]).astype(np.int64))
        model.eval()
        with torch.inference_mode(), capture(model, path) as recorder:
            for step, some in enumerate(torch.split(windows, 64)):
                recorder.step(step, domain=path.name)
                model(input_ids=some.to(self.device))

    def placements(self, learn: Trace, cluster: Cluster) -> list[Plan]:
        """Different placements: solvers', one with replicas, and hot experts together, which must be slowest."""
        size = self.size
        plans = [_together(learn, cluster)]
        kinds = [(solver, seed, 0) for solver, seed in [(name, 0) for name in SOLVERS] + [("random", seed) for seed in range(1, size.placements)]]
        kinds.insert(1, ("eplb", 0, cluster.size))
        for solver, seed, replicas in kinds:
            problem = Problem.of(learn, cluster, slots=learn.model.experts + replicas, tokens_per_device=max(size.per_rank))
            name = f"{solver}{f'+{replicas}' if replicas else ''}{f'-{seed}' if seed else ''}"
            plan, _ = place(problem, solver=solver, seed=seed, time_limit_s=size.solver_s, name=name, learnt_from=learn.digest)
            if plan and plan.digest not in {other.digest for other in plans}:
                plans.append(plan)
            if len(plans) == size.placements:
                return plans
        raise InputError(f"only {len(plans)} different placements of {size.placements}; raise the number of random ones")

    def in_model(self, model: Any, plan: Plan, backend: Any) -> dict[str, Any]:
        """The small model generates under a plan: the same tokens, or an error."""
        import torch

        from moesim.validate.backends import pick_backend
        from moesim.validate.experts_hf import execute_in_model

        prompt = torch.arange(2 * 32, device=self.device).reshape(2, 32) % 256
        used, notes = pick_backend(backend, device=self.device, dtype=model.dtype)  # the small model's weights are fp32
        one = execute_in_model(model, plan.placement, prompt, new_tokens=self.size.new_tokens, backend=used)
        detail = f"{one['tokens']} tokens generated under the plan, identical to the model's own; logits within {one['largest_logit_deviation']:.0e}"
        return {
            "kind": "in a model",
            "name": plan.name,
            "detail": detail,
            "measured_s": None,
            "predicted_s": None,
            "notes": list(notes),
            "figures": one,
        }


def lru_cache(plan: Plan, shape: ModelSpec, model: ModelSpec) -> CachePlan:
    """Half of every device's experts kept, least recently used out, the next layer's fetched ahead."""
    p = plan.placement
    half_LG = np.maximum(p.holds_LGE.sum(axis=2) // 2, 1).astype(np.int32)
    bits = np.full((len(p.layers), p.experts), 16.0)
    tiers = np.full((len(p.layers), p.experts), 1, np.uint8)
    return CachePlan(
        name=f"lru half of {plan.name}", model=model.name, model_digest=model.digest, layers=p.layers, slots_LG=half_LG, tier_LE=tiers, bits_LE=bits,
        policy="lru", prefetcher="pre-gated", placement=plan.digest, made_from={"executed with experts of": shape.name},
    )  # fmt: skip


def _together(learn: Trace, cluster: Cluster) -> Plan:
    """Hot experts on the first devices: the worst there is."""
    model = learn.model
    load_LE = Problem.of(learn, cluster).stats.load_LE
    slots = np.argsort(-load_LE, axis=1, kind="stable").astype(np.int32)
    counts = slots_per_device(model.experts, cluster.size)
    placement = Placement(slots_LP=slots, slots_G=counts, experts=model.experts, layers=model.moe_layers)
    return Plan(name="hot together", model=model.name, model_digest=model.digest, placement=placement, made_from={"trace": learn.digest})


def _hardware_name(hardware: dict[str, Any]) -> str:
    """File-name form of the device, such as `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", str(hardware.get("gpu") or hardware["cpu"]).lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main())
