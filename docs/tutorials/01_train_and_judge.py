# %% [markdown]
# # Train and judge an SAE
#
# A sparse autoencoder (SAE) rewrites a model's activations as sums of a few learned directions, its latents. This
# tutorial trains TopK SAEs on the small language model that comes with the package, reads their report, and asks two
# questions that the training loss does not answer: what does the reconstruction cost the model, and do single latents
# stand for anything?
#
# Nothing is downloaded. For your own model, change one line: `LanguageModel.from_pretrained("owner/model")`.

# %%
import json

import matplotlib.pyplot as plt
import pandas as pd

import sparsary

model = sparsary.LanguageModel.from_pretrained("embedded")
pd.DataFrame(model.hooks()).query("layer == 2")

# %% [markdown]
# Those are the places of block 2 whose activations can be read. We take the residual stream after the block,
# `transformer.h.2:out`. The model's text is generated, which will be useful: it is known what every word is there
# for.

# %%
model.generate("When Mary and John got a ring at the store , John", max_new_tokens=24)

# %% [markdown]
# ## Train
#
# A recipe says everything about a run. It is a mapping here and may be a YAML file as well; keys that do not exist
# are errors. `grid` trains several dictionaries over one pass of activations: here, 4, 8 or 16 active latents per
# token.

# %%
recipe = {
    "harvest": {"tokens": 60_000, "dtype": "int8", "store": "activations"},
    "dictionary": {"hook": "transformer.h.2:out", "n_latents": 512, "encoder": {"name": "topk", "k": 16}},
    "grid": {"dictionary.encoder.k": [8, 16]},
    "tokens": 200_000,
    "batch_tokens": 1024,
    "dead_after_tokens": 100_000,
    "eval_tokens": 6_000,
    "log_every": 10,
}
folder = sparsary.train(recipe, model=model, out_dir="runs")
runs = {k: folder / f"k={k}" for k in (8, 16)}

# %% [markdown]
# The fraction of variance unexplained (fvu) on training batches. At first the sparser dictionary is ahead; after a
# quarter of the run more active latents explain more. Both curves still fall: a run that counts is longer.

# %%
fig, ax = plt.subplots(figsize=(6, 3))
for k, run in runs.items():
    log = pd.DataFrame(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    _ = ax.plot(log["tokens"], log["fvu"], label=f"k = {k}")
_ = ax.set(xlabel="training tokens", ylabel="fvu", yscale="log")
_ = ax.legend()

# %% [markdown]
# ## Judge: reconstruction and cost
#
# `evaluate` measures on documents that training never saw. The result is a mapping with every entry of the report; a
# notebook shows its key figures.

# %%
report = sparsary.evaluate(runs[16])
report

# %% [markdown]
# Read `ce increase` first: the model's loss, in nats per token, rises by this much if it has to work with the
# reconstruction. An fvu is hard to judge alone, because large directions count in it whether the model uses them or
# not.
#
# `compare` puts runs side by side, on the same tokens. Sparser is not worse or better: it buys fewer latents per
# token with a larger error.

# %%
comparison = sparsary.compare(list(runs.values()), out="runs/comparison")
comparison

# %% [markdown]
# ## Judge: do latents stand for anything?
#
# In the embedded corpus every token comes with the factors that produced it: word class, gender of a name, number of
# a subject, century of a year, ... `probe` finds for each factor the single latent that detects it best, on half of
# the documents, and scores it on the other half. The same is done with single neurons and dimensions, which need no
# dictionary, and with a linear probe, which may use all dimensions.

# %%
probing = sparsary.probe(runs[16], tasks=["factors"], tokens=10_000)
probing

# %% [markdown]
# On average latents are above neurons and dimensions, which is what the dictionary is for, and below probes: many
# factors have no latent of their own in so small a dictionary. The best of them:

# %%
factors = pd.read_json(probing.path.with_name("factors.jsonl"), lines=True)
columns = ["factor", "positives", "latent", "latent_f1", "neuron_f1", "probe_f1"]
factors.nlargest(10, "latent_f1")[columns].round(3)

# %% [markdown]
# ## Next
#
# - [Read a report](../how_to/read_report.md): every figure, and which ones are suspicious.
# - [Choose the settings](../how_to/settings.md) for a run that counts: this one took seconds.
# - [Latents of a published dictionary](02_published_dictionary.py): contexts, and steering.
