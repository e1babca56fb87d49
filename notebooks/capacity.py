# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How much hardware?
#
# *For whoever pays for it.* Requests come, each with a prompt and an answer; a share of them must see their first token and every following
# one in time. Which
# cluster keeps that promise at which price, and what happens when traffic grows? Here a whole deployment is simulated: batches, cache,
# attention, and experts
# whose tokens are routed from a real trace, layer by layer.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import moesim
from moesim.errors import InputError
from moesim.files import read_json
from moesim.report import write_report
from moesim.serving import Deployment, Routing, Slo, generate, lognormal, serve
from moesim.sweep import LocalCrew, load_spec, results, sweep

TRACE = Path("../traces/qwen3-moe-8x64/held-out").resolve()
workplace = tempfile.TemporaryDirectory()
folder = Path(workplace.name)

# %% [markdown]
# ## One deployment
#
# A minute of requests that come in bursts. The model is the small one of the trace, so rates are far beyond what a large model serves; the
# steps to an answer are the
# same.

# %%
trace = moesim.load_trace(TRACE)
requests = generate("markov", requests_per_s=250, span_s=20, prompt=lognormal(600), output=lognormal(80), burst=3, quiet_s=6, burst_s=2, seed=0)
slo = Slo(ttft_s=0.1, tpot_s=0.005)
deployment = Deployment(model=trace.model, cluster=moesim.load_cluster("h100x8"))
run = serve(requests, deployment, routing=Routing.of(trace), slo=slo)
print(f"{len(requests):,} requests; the objective, {slo}, is kept by {run.attainment:.1%}")
pd.DataFrame({name: run.summary()[name] for name in ("ttft_s", "tpot_s", "latency_s")}).mul(1e3).round(2).rename(
    columns=lambda name: f"{name[:-2]}, ms"
).T

# %%
series = run.series
figure, axes = plt.subplots(1, 3, figsize=(12, 2.8), layout="constrained")
axes[0].plot(requests.per_second(0.5), color="#0072b2")
axes[0].set(title="Requests per second", xlabel="half seconds")
axes[1].plot(series.time_s_N, series.running_N, color="#009e73", label="running")
axes[1].plot(series.time_s_N, series.waiting_N, color="#d55e00", label="waiting")
axes[1].set(title="Requests in the deployment", xlabel="seconds")
axes[1].legend(frameon=False)
spent = pd.Series(run.step_parts_s)
axes[2].barh(spent.index, spent / spent.sum(), color="#56b4e9")
axes[2].set(title="Where the time of a step goes", xlim=(0, 1))
plt.show()

# %% [markdown]
# ## Many deployments, and what if
#
# A sweep of kind `capacity`: the grid holds the deployments one may choose, and each of the `[[cases]]` changes one condition, the first
# one none. Prices are yours to
# give: moesim knows none.

# %%
spec = folder / "capacity.toml"
spec.write_text(f"""
kind = "capacity"
title = "Serving the small model: what to buy"
[grid]
trace = "{TRACE}"
arrivals = "markov:rate=250,span=8s,prompt=600,output=80,burst=3,quiet_s=6,burst_s=2"
slo = "ttft=100ms,tpot=4.5ms,share=95%"
cluster = ["h100x8", "rtx-4090x8-pcie"]
replicas = [1, 2]
solver = "eplb"
prices = {{h100-sxm = 2.5, rtx-4090 = 0.5}}
[[cases]]
[[cases]]
traffic = 0.5
[[cases]]
traffic = 2.0
[[cases]]
traffic = 4.0
[[cases]]
bandwidth = 0.5
[[cases]]
skew = 0.8
skew_domain = "chinese"
""")
outcome = sweep(load_spec(spec), folder / "capacity", LocalCrew(2))
table = results(folder / "capacity")
alike = table["bandwidth"].eq(1) & table["skew"].isna()
base = table[alike & table["traffic"].eq(1)]
base[["cluster", "replicas", "price_per_hour", "attainment", "ttft_p99", "tpot_p99", "utilisation"]].sort_values("price_per_hour").round(4)

# %%
figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for (cluster, replicas), rows in table[alike].groupby(["cluster", "replicas"]):
    rows = rows.sort_values("traffic")
    ax.plot(rows.traffic, rows.attainment, marker="o", label=f"{replicas} × {cluster}")
ax.axhline(0.95, color="grey", linestyle="--", linewidth=1)
ax.set(title="Share of requests in time, over traffic", xlabel="times the requests per second", xscale="log", ylim=(0, 1.05))
ax.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
ax.minorticks_off()
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The report
#
# The same as one page to hand on: what to buy, where experts go and, where traffic varies by more than chance and long enough, when to
# change the size. It is self-contained, readable on paper and on a phone; measurements named beside the study join the page. On a command line:
#
# ```sh
# moesim sweep capacity.toml -o capacity
# moesim report capacity validation.json -o capacity.html
# ```

# %%
document = read_json(folder / "capacity" / "result.json", InputError)
page = write_report([document], folder / "capacity.html")
chosen = table.set_index("case").loc[document["capacity"]["chosen"]]
print(f"{page.name}, {page.stat().st_size / 1e3:.0f} kB. It recommends {chosen.replicas} × {chosen.cluster} at ${chosen.price_per_hour:.2f} an hour.")

# %%
workplace.cleanup()
