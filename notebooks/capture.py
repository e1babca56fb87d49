# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Capture routing from a training job
#
# *For whoever trains the model.* A Mixture-of-Experts layer sends each token to a few of its experts. Which ones is decided by a router that
# changes while the model learns, and differs between kinds of text. Everything moesim says later is computed from that routing, so it is recorded
# from the real run: one line around the training loop, or none at all:
#
# ```sh
# moesim capture -o traces/run1 -- train.py --your --arguments
# ```
#
# Here a small model is trained for a minute on the CPU, and its routing is watched as it settles.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesim
from moesim.report.plots import draw_heat, heat_limit, relative
from moesim.trace.inspect import inspect

torch.manual_seed(0)
torch.set_num_threads(1)
workplace = tempfile.TemporaryDirectory()
traces = Path(workplace.name)

# %% [markdown]
# ## A model and two kinds of text
#
# Bytes are the tokens, so that no tokenizer is needed. The two kinds of text are the standard library's Python code and the prose of its
# help topics: they
# are on every machine that has Python.

# %%
import argparse
import inspect as source
import textwrap
from pydoc_data.topics import topics

texts = {
    "code": (source.getsource(argparse) + source.getsource(textwrap) + source.getsource(tempfile)).encode(),
    "prose": "".join(topics.values()).encode(),
}
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.2,
        output_router_logits=True,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters; " + ", ".join(f"{name}: {len(text):,} bytes" for name, text in texts.items()))

# %% [markdown]
# ## Train, and record
#
# `moesim.capture` finds the routers by itself (Hugging Face, Megatron, DeepSpeed and others; `moesim.capture.register_router` adds one it
# does not know).
# `recorder.step` names the step and the kind of text; both are optional. Nothing is computed twice, and the trace is written by a thread of its own.

# %%
STEPS, SEQUENCES, LENGTH = 120, 4, 64
rng = np.random.default_rng(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []

with moesim.capture(model, traces / "training") as recorder:
    for step in range(STEPS):
        total = 0.0
        for microbatch, (domain, text) in enumerate(texts.items()):
            recorder.step(step, microbatch=microbatch, domain=domain)
            starts = rng.integers(0, len(text) - LENGTH, SEQUENCES)
            tokens = torch.tensor([list(text[start : start + LENGTH]) for start in starts])
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            total += loss.item() / len(texts)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)

trace = moesim.load_trace(traces / "training")
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} with the balance term; {trace.tokens:,} tokens recorded: {trace.tokens_by_domain}")

# %% [markdown]
# ## What the routing looks like
#
# A trace is a folder of Parquet files: any tool reads it. `inspect` reads it in one pass. Drift is the Jensen-Shannon
# divergence of the experts' loads, in bits: 0 where loads are equal, 1 where nothing is shared.

# %%
early, late = trace.select(steps=(0, 10)), trace.select(steps=(STEPS - 20, STEPS))
before, after = inspect(early), inspect(late)
loads = [relative(found.stats.load_LE) for found in (before, after)]
limit = heat_limit(loads)

figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
for ax, load, title in zip(axes, loads, ("steps 0 to 9", f"steps {STEPS - 20} to {STEPS - 1}"), strict=True):
    draw_heat(ax, ratio_RC=load, rows=trace.model.moe_layers, xlabel="expert", limit=limit)
    ax.set_title(f"{title}: load over the mean")
plt.show()

# %%
whole = inspect(trace)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.plot(losses, color="#0072b2")
left.set(title="Loss, with the balance term", xlabel="step")
right.plot(whole.step_edges[1:], whole.drift_over_steps.mean(axis=1), marker="o", markersize=3, color="#d55e00")
right.set(title="Drift of the routing, each stretch against the one before", xlabel="step", ylabel="bits", ylim=(0, None))
plt.show()
print(f"code against prose: {after.drift_DD[0, 1]:.3f} bits late in training, {before.drift_DD[0, 1]:.3f} at its start")

# %% [markdown]
# The routing keeps moving long after the loss has fallen most: every stretch of steps still differs from the one before. Two things follow.
#
# * **Capture late, or again.** A plan made from the first steps is a plan for another model.
# * **Capture what you will serve.** Experts that are busy on code are not quite those that are busy on prose. Here the model is small and
#   young, and the
#   difference is, too; the [search notebook](search.ipynb) shows on a model that was trained longer what it does to a placement.

# %%
workplace.cleanup()
