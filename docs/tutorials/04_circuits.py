# %% [markdown]
# # Circuits of indirect objects
#
# "When Mary and John got a ring at the store, John gave a coin to ..." takes the name that is *not* repeated:
# indirect object identification (IOI; Wang et al. 2022). Which latents does the model use for it, how few of them do
# the task alone, and is that better than what neurons, heads or random directions give?

# %%
import matplotlib.pyplot as plt
import pandas as pd

import sparsary

model = sparsary.LanguageModel.from_pretrained("embedded")
model.generate("When Mary and John got a ring at the store , John gave a coin to", max_new_tokens=1)

# %% [markdown]
# ## Train an SAE
#
# For circuits through several layers, train a grid over `dictionary.layer` and give its directory. Here one layer has
# to do: the residual stream after block 1, where the repeated name is known but not yet moved to the end of the
# sentence.

# %%
recipe = {
    "harvest": {"tokens": 60_000, "dtype": "int8", "store": "activations", "exclude_leading": 0},
    "dictionary": {"layer": 1, "site": "resid_post", "n_latents": 256, "encoder": {"name": "topk", "k": 16}},
    "tokens": 250_000,
    "batch_tokens": 1024,
    "dead_after_tokens": 100_000,
}
run = sparsary.train(recipe, model=model, out_dir="sae")

# %% [markdown]
# ## Find circuits
#
# `circuits` makes pairs of prompts that differ in the repeated name. On half of the pairs a method ranks all units by
# how much they matter to the difference between the two names' logits; on the other half the highest ones are kept,
# and everything else takes its value from the corrupted prompt. *Faithfulness* is the share of the logit difference
# that is left: 1 is the whole model.

# %%
settings = sparsary.CircuitSettings(tasks=("ioi",), methods=("attribution",), pairs=20)
found = sparsary.circuits(run, settings, out="circuits")
found

# %% [markdown]
# Read the rows with *errors ablated* against each other: they ask whether latents alone do the task, and there random
# directions fall behind. With errors kept, random directions look as good, because their large errors carry what they
# miss. `nodes 80%` counts the units that reach four fifths of the whole model's logit difference; heads and MLPs are
# few and coarse, MLP neurons many.
#
# CPR is the area under these curves:

# %%
kinds = {
    "sae: errors ablated": "latents, errors ablated",
    "sae: random, errors ablated": "random directions, errors ablated",
    "neurons": "coordinates of the stream",
    "MLP neurons": "MLP neurons",
}
fig, ax = plt.subplots(figsize=(6, 3.4))
for curve in found["curves"]:
    if curve["family"] in kinds:
        _ = ax.plot(curve["sizes"], curve["faithfulness"], label=kinds[curve["family"]])
_ = ax.set(xscale="symlog", xlabel="units kept", ylabel="faithfulness")
_ = ax.axhline(0.8, color="gray", linestyle=":")
_ = ax.legend()

# %% [markdown]
# The units of the drawn circuit, by their score: the part of the difference between the names that goes through them.

# %%
units = pd.DataFrame(found["circuits"][0]["units"])
units.nlargest(10, "score")[["name", "score"]].round(3)

# %% [markdown]
# `error` is what the dictionary misses. If it is among the largest, train longer or take more latents before you
# interpret the rest.

# %% [markdown]
# ## Next
#
# - [Circuits](../circuits.md): other methods, edges, and models whose circuit is known.
# - [Transcoders and an attribution graph](03_attribution_graph.py): one prompt instead of a task.
