# %% [markdown]
# # What the error holds
#
# An SAE leaves an error. Part of it is a linear function of the activation: a better or wider dictionary should find
# it. The rest, the nonlinear error, hardly shrinks as dictionaries grow, which Engels, Riggs and Tegmark (2024) call
# *dark matter*. We train SAEs of four widths, split their errors, and see what each part costs the model.

# %%
import matplotlib.pyplot as plt
import pandas as pd

import sparsary
from sparsary.eval.metrics.dark_matter.widths import fit_width_law

widths = [64, 128, 256, 512]
recipe = {
    "harvest": {"tokens": 60_000, "dtype": "int8", "store": "activations"},
    "dictionary": {"hook": "transformer.h.2:out", "n_latents": 64, "encoder": {"name": "topk", "k": 16}},
    "grid": {"dictionary.n_latents": widths},
    "tokens": 130_000,
    "batch_tokens": 1024,
    "dead_after_tokens": 100_000,
    "eval_tokens": 4_000,
}
folder = sparsary.train(recipe, out_dir="widths")

# %% [markdown]
# ## Split the error
#
# Every report has the split: a linear map from the activation to the error, fitted on one half of the held-out
# documents and scored on the other. `fvu_nonlinear` is what remains of the error when the linear part is added to the
# reconstruction.

# %%
reports = sparsary.evaluate_all([folder])
table = pd.concat([report.to_pandas() for report in reports]).set_index("n_latents").sort_index()
table[["fvu_total", "fvu_nonlinear", "linear_error_share", "ce_increase"]].round(4)

# %% [markdown]
# Eight times the latents take away most of the error, but almost nothing of its nonlinear part:

# %%
fig, ax = plt.subplots(figsize=(6, 3.2))
places = [str(width) for width in table.index]
_ = ax.bar(places, table["fvu_nonlinear"], label="nonlinear error")
_ = ax.bar(places, table["fvu_total"] - table["fvu_nonlinear"], bottom=table["fvu_nonlinear"], label="linear error")
_ = ax.set(xlabel="latents", ylabel="fraction of variance")
_ = ax.legend()

# %% [markdown]
# ## What would no width take away?
#
# The scaling law of the paper, `fvu = c + a W^m`, fits the total. Its constant `c` is what remains at any width `W`.

# %%
law = fit_width_law(list(table.index), list(table["fvu_total"]))
pd.Series({"c": law.c, "a": law.a, "m": law.m, "fvu predicted at 4096 latents": law(4096)}, name="width law").to_frame().round(
    4
)

# %% [markdown]
# Four widths and one seed give a rough constant. And part of it is short training, not dark matter: on this model,
# training longer takes away more of the nonlinear error than wider dictionaries do ([Dark matter](../dark_matter.md)
# has the figures).
#
# ## What does each part cost the model?
#
# Add the linear or the nonlinear part of the error back to the reconstruction and let the model run on it. Each
# figure is the share of the loss increase that this undoes; 1 is all of it.

# %%
shown = {
    "ce_recovered_by_linear_error": "linear error added back",
    "ce_recovered_by_nonlinear_error": "nonlinear error added back",
}
table.rename(columns=shown)[list(shown.values())].round(2)

# %% [markdown]
# As the dictionary grows, what is left of its error is nonlinear, and so is what it costs. A low `fvu_nonlinear`
# alone is no merit, though: a dictionary that reconstructs nothing has an error that is all linear.
#
# ## Next
#
# - [Dark matter](../dark_matter.md): the paper's statements, tested on two models with three seeds.
# - [Definitions of the metrics](../concepts/metrics.md).
