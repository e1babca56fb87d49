# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Search for a placement
#
# *For whoever deploys the model.* Where the experts live decides how long a step takes: a hot expert makes one device late, and a token whose experts
# are spread over many devices makes traffic. Here several solvers place the experts of a small model that was trained on eight kinds of text, on the
# tokens of one kind, and are judged on tokens they have not seen.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import moesim
from moesim.optimize import Problem, place, score
from moesim.replay import Events, miss_curves
from moesim.report.plots import Dots, draw_dots, draw_heat, heat_limit, relative
from moesim.sweep import LocalCrew, load_spec, results, sweep

TRACE = Path("../traces/qwen3-moe-8x64/held-out").resolve()
trace = moesim.load_trace(TRACE).select(phase="prefill")
cluster = moesim.load_cluster("h100x8")
print(f"{trace.model.name}: {len(trace.model.moe_layers)} MoE layers of {trace.model.experts} experts, top-{trace.model.top_k}; {cluster.title}")
print(f"{trace.tokens:,} tokens: {', '.join(trace.tokens_by_domain)}")

# %% [markdown]
# ## Learn on one half, judge on the other
#
# A solver may look at the first half of the Python tokens. It is scored on the second half, and on Chinese text: that is what a deployment meets when
# its traffic changes.

# %%
home = trace.select(domain="python")
problem = Problem.of(home.select(tokens="0%:50%"), cluster)
plans = [place(problem, solver=name)[0] for name in ("linear", "round-robin", "eplb", "exflow", "local-search")]
parts = {
    "Python it learnt from": home.select(tokens="0%:50%"),
    "Python never seen": home.select(tokens="50%:"),
    "Chinese": trace.select(domain="chinese"),
}
found = {name: score(tokens, plans, cluster) for name, tokens in parts.items()}
pd.DataFrame(
    {
        (name, what): [round(row.summary()[key], 2) for row in rows]
        for name, rows in found.items()
        for what, key in (("busiest/mean", "max_load_ratio"), ("devices/token", "fanout_devices"))
    },
    index=[plan.name for plan in plans],
)

# %%
names = [plan.name for plan in plans]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for ax, key, title in zip(axes, ("max_load_ratio", "fanout_devices"), ("Busiest device over the mean", "Distinct devices per token"), strict=True):
    values = [[row.summary()[key] for row in rows] for rows in found.values()]
    draw_dots(ax, dots=Dots(plans=names, parts=list(found), hollow=[True, False, False], values=values, unit=""))
    ax.set_title(title)
for text in figure.legends[1:]:
    text.remove()
plt.show()

# %% [markdown]
# Hollow circles are the tokens a plan learnt from: there every plan looks good. On tokens of the same kind `eplb`, which looks at loads
# alone, balances best, and
# `local-search`, which also looks at which experts are chosen together, needs far fewer devices per token. On Chinese text nobody balances: **a
# plan is good on the traffic it was made for.**

# %%
linear, best = found["Python never seen"][0], found["Python never seen"][-1]
ratios = [relative(result.tokens_SLG.sum(axis=0)) for result in (linear, best)]
limit = heat_limit(ratios)
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for ax, result, ratio in zip(axes, (linear, best), ratios, strict=True):
    draw_heat(ax, ratio_RC=ratio, rows=result.layers, xlabel="device", limit=limit)
    ax.set_title(f"{result.name}: load over the mean of the layer")
plt.show()

# %% [markdown]
# ## When the experts do not fit
#
# Where memory is short, each device keeps some experts and fetches the others when a token asks for them. How often depends on how many
# slots there are and on who is
# thrown out; decoding, where a step needs few experts, is what is cached for. `optimal` knows the future: no policy misses less.

# %%
events = Events.of(moesim.load_trace(TRACE).select(phase="decode"))
figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for policy, colour in (("lru", "#d55e00"), ("lfu", "#009e73"), ("optimal", "#0072b2")):
    misses_C = miss_curves(events, policy).sum(axis=0)
    ax.plot(misses_C / len(events.experts_A), color=colour, label=policy)
ax.set(title="Share of expert accesses that miss, over slots per layer", xlabel="slots per layer, of 64 experts", ylim=(0, 1))
ax.grid(axis="y", linewidth=0.5)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# `moesim cache traces/run1 --cluster h100x8 --memory 50%` decides how many slots each layer gets, which policy and what to prefetch.
#
# ## Many cases at once
#
# Which plan is best depends on how many tokens a step has and on what the links carry. A sweep runs every combination, keeps each case as
# it finishes, and goes on
# where it was killed; with `--scheduler tcp://…` the same file runs on a Dask cluster.

# %%
workplace = tempfile.TemporaryDirectory()
spec = Path(workplace.name) / "study.toml"
spec.write_text(f"""
kind = "simulate"
title = "Step size and links"
[grid]
trace = "{TRACE}"
phase = "prefill"
domain = "python"
cluster = "h100x8"
solver = ["linear", "eplb", "exflow"]
tokens_per_device = [64, 256, 1024, 4096]
bandwidth = [0.25, 1.0]
""")
outcome = sweep(load_spec(spec), Path(workplace.name) / "study", LocalCrew(2))
table = results(Path(workplace.name) / "study")
print(f"{len(table)} cases, {outcome.count('ok')} ok")
table.pivot_table(index=["bandwidth", "tokens_per_device"], columns="solver", values="layer_time_s").mul(1e6).round(1)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharey=True)
for ax, (bandwidth, rows) in zip(axes, table.groupby("bandwidth"), strict=True):
    times = rows.pivot(index="tokens_per_device", columns="solver", values="layer_time_s")
    (times.div(times["linear"], axis=0) - 1).mul(100).plot(ax=ax, marker="o", logx=True, color=["#d55e00", "#009e73", "#0072b2"])
    ax.set(title=f"links × {bandwidth:g}", xlabel="tokens per device and step", ylabel="layer time against linear, %")
    ax.grid(axis="y", linewidth=0.5)
plt.show()

# %% [markdown]
# With few tokens a layer is all latency and the placement hardly matters; with many, balance is worth some percent. `exflow` looks at
# travel alone and pays
# for it in balance: less where links are slow and travel is dear, more where they are fast. On a command line:
#
# ```sh
# moesim sweep study.toml -o study && moesim report study
# moesim place traces/run1 --tokens 0%:50% --cluster h100x8 -o plan.json
# moesim export sglang plan.json -o placement.json
# ```
#
# Times here are predictions: the [validation notebook](validate.ipynb) checks some on the machine at hand.

# %%
workplace.cleanup()
