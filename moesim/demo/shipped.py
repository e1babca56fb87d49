"""Makes the traces in `traces/`: trains a byte-level Qwen3-MoE on eight domains and captures its routing.

    python -m moesim.demo.shipped --out traces/qwen3-moe-8x64

Three traces come of it, all captured from the running model by `moesim.capture`:

training   the routing of real training steps, in pairs of consecutive steps from the first to the last
train-part the trained model on the documents training drew from: prefill of whole windows, then generation, byte by byte
held-out   the same on documents training never drew from

A checkpoint every hundred steps lets a killed run go on; the text of every step depends on the seed and the step alone.
Debian's man pages are the text of the natural languages: no tokenizer, no download, the same on every machine.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.demo.manpages import installed_version, page_files, page_text
from moesim.errors import InputError
from moesim.trace import TraceWriter, load_trace

SEQUENCE = 256  # bytes of a training window
SNAPSHOTS = (0, 5, 10, 20, 40, 80, 150, 300, 500, 750, 1000, 1350)  # first of two captured steps; so are the last two
CHECKPOINT_EVERY = 100
ENOUGH_B = 1_600_000  # of training text per domain: more would not be drawn
WINDOWS, PROMPTS = 16, 8  # of each domain: whole windows of prefill, and prompts that generation goes on from
PROMPT, GENERATED = 64, 192  # bytes
PEAK_LR, WARM_STEPS, BALANCE = 3e-3, 60, 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One kind of text: where its documents come from and how one is read."""

    documents: Callable[[], list[Path]]
    read: Callable[[Path], str]
    source: Callable[[], str]


def _pages(*packages: str) -> Domain:
    return Domain(
        documents=lambda: [path for package in packages for path in page_files(package)],
        read=page_text,
        source=lambda: ", ".join(f"{package} {installed_version(package)}" for package in packages),
    )


def _code(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def _torch_headers() -> list[Path]:
    spec = find_spec("torch")
    roots = spec.submodule_search_locations if spec else None
    if not roots:
        raise InputError("torch is not installed, and its C++ headers are one of the domains; pip install torch")
    include = Path(roots[0]) / "include"
    return [path for part in ("c10", "torch", "caffe2") for path in (include / part).rglob("*.h")]


DOMAINS: dict[str, Domain] = {
    "python": Domain(
        documents=lambda: [path for path in Path(os.__file__).parent.rglob("*.py") if "site-packages" not in path.parts],
        read=_code,
        source=lambda: f"the standard library of Python {platform.python_version()}",
    ),
    "cpp": Domain(documents=_torch_headers, read=_code, source=lambda: f"the headers of torch {version('torch')}"),
    "english": _pages("manpages", "manpages-dev"),
    "german": _pages("manpages-de", "manpages-de-dev"),
    "french": _pages("manpages-fr", "manpages-fr-dev"),
    "russian": _pages("manpages-ru"),
    "japanese": _pages("manpages-ja", "manpages-ja-dev"),
    "chinese": _pages("manpages-zh"),
}


def split_documents(domain: Domain) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Training and held-out bytes: every fifth document, in the order of the hash of its name, is never trained on."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    limits = (ENOUGH_B, ENOUGH_B // 5)
    files = sorted(domain.documents(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    for index, path in enumerate(files):
        held_out = index % 5 == 4
        if sum(map(len, parts[held_out])) < limits[held_out]:
            parts[held_out].append(domain.read(path).encode())
    train, held = (np.frombuffer(b"\n".join(part), np.uint8) for part in parts)
    return train, held


def build_model(seed: int) -> Any:
    """An untrained Qwen3-MoE over bytes: 8 MoE layers of 64 experts, top-4, 16 million parameters."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=160,
        intermediate_size=640,
        moe_intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        num_experts=64,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,  # see balance_loss
        output_router_logits=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    return Qwen3MoeForCausalLM(config)


def windows(text: NDArray[np.uint8], starts: Sequence[int] | NDArray[np.integer], length: int) -> NDArray[np.int64]:
    """[starts, length] windows of a text."""
    return np.stack([text[start : start + length] for start in starts]).astype(np.int64)


def step_batch(texts: Mapping[str, NDArray[np.uint8]], *, seed: int, step: int) -> NDArray[np.int64]:
    """[domains, SEQUENCE] bytes a training step sees: one random window of every domain."""
    rng = np.random.default_rng([seed, step])
    return np.concatenate([windows(text, rng.integers(0, len(text) - SEQUENCE, 1), SEQUENCE) for text in texts.values()])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to a twentieth of the peak."""
    if step < WARM_STEPS:
        return PEAK_LR * (step + 1) / WARM_STEPS
    done = (step - WARM_STEPS) / max(1, steps - WARM_STEPS)
    return float(PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * done))))


def balance_loss(router_logits: Sequence[Any], top_k: int) -> Any:
    """Mean over layers of E·Σ_e f_e·p_e, at least 1 where shares f of selections and mean probabilities p agree (Fedus et al. 2021).

    Layer by layer, over the tokens of all domains together: an even load on the whole leaves experts free to specialise
    (Qiu et al. 2025). The loss in transformers 5 averages over layers first, so that it cannot see a layer whose experts idle.
    """
    import torch

    terms = []
    for logits in router_logits:
        experts = logits.shape[-1]
        chosen = logits.topk(top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=experts) / chosen.numel()
        terms.append(experts * (share_E * logits.softmax(dim=-1).mean(dim=0)).sum())
    return torch.stack(terms).mean()


def train(texts: Mapping[str, NDArray[np.uint8]], work: Path, *, steps: int, seed: int) -> tuple[Any, list[float], float]:
    """Train from the last checkpoint below `work` on; returns model, loss of each step (nats per byte) and seconds.

    Leaves the routing of step pairs in `work/steps-<first>`.
    """
    import torch

    from moesim.capture import capture

    model = build_model(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    before_s, saved = 0.0, work / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        if (state["steps"], state["seed"]) != (steps, seed):
            raise InputError(f"{saved}: belongs to a run of {state['steps']} steps with seed {state['seed']}; remove it or give another --work")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, before_s = state["losses"], state["seconds"]
    began, captured = time.monotonic(), snapshot_steps(steps)
    with ExitStack() as open_capture:
        recorder = None
        for step in range(len(losses), steps):
            if step in captured:
                path = work / f"steps-{step:06d}"
                shutil.rmtree(path, ignore_errors=True)
                recorder = open_capture.enter_context(capture(model, path))
            if recorder:
                recorder.step(step, domain=list(texts))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            tokens = torch.from_numpy(step_batch(texts, seed=seed, step=step))
            out = model(input_ids=tokens, labels=tokens)
            (out.loss + BALANCE * balance_loss(out.router_logits, model.config.num_experts_per_tok)).backward()
            losses.append(out.loss.item())
            if recorder and step - 1 in captured:
                open_capture.close()
                recorder = None
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 10 == 0:
                _say(f"step {step + 1}/{steps} loss {np.mean(losses[-10:]):.3f} {before_s + time.monotonic() - began:.0f} s")
            if recorder is None and ((step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses, "steps": steps, "seed": seed}
                torch.save(state | {"seconds": before_s + time.monotonic() - began}, work / "checkpoint.tmp")
                (work / "checkpoint.tmp").rename(saved)
    return model, losses, before_s + time.monotonic() - began


def snapshot_steps(steps: int) -> list[int]:
    """First steps of the captured pairs."""
    return [*(step for step in SNAPSHOTS if step < steps - 3), steps - 2]


def join_snapshots(work: Path, out: Path, steps: int) -> None:
    """One trace of all captured step pairs, in order; sequences are numbered on."""
    parts = [load_trace(work / f"steps-{step:06d}") for step in snapshot_steps(steps)]
    info, numbered = parts[0].info, 0
    columns = ("step", "microbatch", "sequence", "position", "token_id", "phase", "domain", "valid")
    with TraceWriter(out, info.model, weights=True, captured_by=info.captured_by) as writer:
        for part in parts:
            last = numbered
            for batch in part.batches(weights=True, columns=columns):
                found = dict(batch.columns)
                found["sequence"] = found["sequence"] + numbered
                last = max(last, int(found["sequence"].max()) + 1)
                writer.append(batch.experts_TLK, weights=batch.weights_TLK, **found)
            numbered = last


def capture_trained(model: Any, texts: Mapping[str, NDArray[np.uint8]], path: Path, *, seed: int) -> dict[str, float]:
    """Capture prefill and generation of mixed batches, as a server runs them; returns the loss of each domain, nats per byte.

    Every forward pass is a step: `WINDOWS` passes over one window of each domain, one over all prompts, then one for every
    byte that all prompts are continued by, sampled from the model's distribution and read through its KV cache.
    """
    import torch

    from moesim.capture import capture

    model.eval()
    torch.manual_seed(seed)
    starts = {domain: np.linspace(0, len(text) - SEQUENCE, WINDOWS + PROMPTS).astype(int) for domain, text in texts.items()}
    losses = []
    with torch.inference_mode(), capture(model, path, part_seconds=3600) as recorder:
        for step in range(WINDOWS):
            tokens = torch.from_numpy(np.concatenate([windows(text, starts[domain][step : step + 1], SEQUENCE) for domain, text in texts.items()]))
            recorder.step(step, domain=list(texts))
            logits = model(input_ids=tokens).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1))
        tokens = torch.from_numpy(np.concatenate([windows(text, starts[domain][WINDOWS:], PROMPT) for domain, text in texts.items()]))
        cache = None
        for step in range(GENERATED + 1):
            recorder.step(WINDOWS + step, domain=[domain for domain in texts for _ in range(PROMPTS)])
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens = torch.multinomial(out.logits[:, -1].softmax(dim=-1), 1)
    return dict(zip(texts, torch.stack(losses).mean(dim=0).tolist(), strict=True))


def make(out: Path, work: Path, *, steps: int, seed: int) -> None:
    """Train, capture and write the three traces and `run.json` below `out`."""
    import torch

    torch.set_num_threads(1)
    if out.exists():
        raise InputError(f"{out}: exists; remove it first, or give another --out")
    parts = {name: split_documents(domain) for name, domain in DOMAINS.items()}
    for name, (train_part, held_out) in parts.items():
        _say(f"{name}: {len(train_part):,} bytes to train on, {len(held_out):,} held out")
    work.mkdir(parents=True, exist_ok=True)
    model, losses, seconds = train({name: part[0] for name, part in parts.items()}, work, steps=steps, seed=seed)
    fresh = out.with_name(f".{out.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    join_snapshots(work, fresh / "training", steps)
    loss = {
        name: capture_trained(model, {domain: part[index] for domain, part in parts.items()}, fresh / name, seed=seed)
        for index, name in enumerate(("train-part", "held-out"))
    }
    run = {
        "model": model.config.to_diff_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "seed": seed,
        "bytes_per_step": len(parts) * SEQUENCE,
        "loss_nats_per_byte": [round(loss, 4) for loss in losses],
        "trained_model_loss_nats_per_byte": loss,
        "training_s": round(seconds),
        "corpus": {name: {"source": DOMAINS[name].source(), "train_B": len(t), "held_out_B": len(h)} for name, (t, h) in parts.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")} | {"python": platform.python_version()},
        "machine": {"system": platform.platform(), "processor": _processor(), "threads": 1},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    (fresh / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    draw_loss(losses, fresh / "loss.svg")
    fresh.rename(out)


def draw_loss(losses: Sequence[float], path: Path) -> None:
    """Means of twenty steps, nats per byte, with the captured steps marked."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    means = [float(np.mean(losses[i : i + 20])) for i in range(0, len(losses), 20)]
    ax.plot(np.arange(len(means)) * 20 + 10, means, color="#4269d0")
    ax.plot(snapshot_steps(len(losses)), [losses[step] for step in snapshot_steps(len(losses))], "o", color="#ff725c", markersize=4)
    ax.set(xlabel="step (dots: captured)", ylabel="loss, nats per byte", ylim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": "moesim"}):
        figure.savefig(path, metadata={"Date": None})


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Command line of `python -m moesim.demo.shipped`."""
    parser = argparse.ArgumentParser(prog="python -m moesim.demo.shipped", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    parser.add_argument("--work", type=Path, default=Path("build/shipped"), help="checkpoints and step traces; a killed run goes on from here")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(given.out, given.work, steps=given.steps, seed=given.seed)


if __name__ == "__main__":
    main()
