# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Was the prediction right?
#
# *For whoever has to trust the numbers.* A plan was chosen because a cost model predicts that it is fast. Here the real layer is executed,
# rank by rank, with the tokens
# each rank would get, and compared with what was predicted before. On a machine with a GPU set `DEVICE = "cuda"`; here it is one core of this CPU.
#
# What is executed: the experts' computation of every rank. What is not: the exchange between devices. The report says so, too.

# %%
import matplotlib.pyplot as plt
import pandas as pd

import moesim
from moesim.optimize import Problem, place
from moesim.report.plots import cloud, draw_cloud
from moesim.validate import calibrate_for, validate

DEVICE, TOKENS = "cpu", 1024
trace = moesim.load_trace("../traces/qwen3-moe-8x64/held-out").select(phase="prefill", domain="python")
cluster = moesim.load_cluster("h100x8")
problem = Problem.of(trace.select(tokens="0%:50%"), cluster)
plans = [place(problem, solver=name)[0] for name in ("linear", "round-robin", "random", "eplb")]

# %% [markdown]
# ## Calibrate on other shapes, predict, then measure
#
# The kernel's parameters are fitted to measurements of *neighbouring* expert shapes, so that the error below is one of prediction, not of a
# fit. On a CPU, times are seconds of one thread:
# other programs on the machine do not inflate them.

# %%
unseen = trace.select(tokens="50%:")
calibration = calibrate_for(trace.model, device=DEVICE, resident=trace.model.experts // cluster.size, most_selections=TOKENS * trace.model.top_k)
found = validate(unseen, plans, device=DEVICE, layers=trace.model.moe_layers[:3], calibration=calibration, tokens=TOKENS, repeats=7)
errors = pd.DataFrame(found["models"]).T[["n", "median_ape", "p90_ape", "bias"]]
errors.style.format({"n": "{:.0f}", "median_ape": "{:.1%}", "p90_ape": "{:.1%}", "bias": "{:+.1%}"})

# %%
cases = [(case["plan"], case["predicted_s"], case["measured_s"]) for case in found["cases"]]
figure = plt.figure(figsize=(5, 5.4), layout="constrained")
draw_cloud(figure.add_subplot(), cloud=cloud(cases))
plt.show()

# %% [markdown]
# One dot per rank and layer; the line is equality, the band 10 % around it. `tokens-only` in the table is what counting tokens alone would predict:
# it knows nothing of how many different experts a rank holds tokens for.
#
# ## Does it order plans correctly?

# %%
ranking = found["ranking"]
print(ranking["verdict"])
pd.DataFrame(ranking["plans"]).set_index("name").mul(1e3).round(3).rename(columns={"predicted_s": "predicted, ms", "measured_s": "measured, ms"})

# %% [markdown]
# If plans differ by less than repeats of one measurement do, no order can be judged, and the verdict says that instead.
#
# ## Re-placing experts must not change results
#
# Every rank's outputs were added up and compared with the layer that was never cut apart:

# %%
pd.DataFrame(found["checks"])

# %%
print("Only modelled here:")
for line in found["modelled"]:
    print(f"  - {line}")

# %% [markdown]
# On a command line: `moesim validate TRACE plan.json --device cuda -o validation.json`, then `moesim report validation.json`.
