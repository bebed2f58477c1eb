# %% [markdown]
# # Latents of a published dictionary
#
# Load a dictionary that was published in another library's format, check that it fits its model, look at what its
# latents fire on, and steer the model with one of them.
#
# So that everything runs offline, we publish one ourselves first: a small SAE, exported to the files that SAELens
# writes. With a network, a repository of the Hugging Face Hub takes its place, `sparsary.load("owner/repository",
# subfolder="...")`, and the rest stays the same.

# %%
import pandas as pd
import torch

import sparsary

model = sparsary.LanguageModel.from_pretrained("embedded")
recipe = {
    "harvest": {"tokens": 60_000, "dtype": "int8", "store": "activations"},
    "dictionary": {"hook": "transformer.h.2:out", "n_latents": 256, "encoder": {"name": "topk", "k": 16}},
    "tokens": 250_000,
    "batch_tokens": 1024,
    "dead_after_tokens": 100_000,
}
run = sparsary.train(recipe, model=model, out_dir="run")
exported = sparsary.convert(run, "published", to="saelens")
pd.Series(dict(exported.lines()), name="export").to_frame()

# %% [markdown]
# `convert` reads back what it wrote: the outputs are the same.
#
# ## Load and check
#
# The format is recognized, and the files say which model and hook the dictionary belongs to.

# %%
d = sparsary.load("published")
d

# %% [markdown]
# It is easy to use published files at a wrong hook, with a wrong scale, or without the normalization of their
# training. So run the model on some text first: an fvu far below 1 and a `norm_ratio` near 1 (outputs as long as the
# activations) mean that everything fits. SAELens's files do not say where the text is; we take the embedded corpus,
# and for a model of yours `text=("my-text.jsonl",)`.

# %%
options = sparsary.CheckpointOptions(settings={"text.source": "embedded"})
check = sparsary.info("published", options).sanity(tokens=3000)
pd.DataFrame([vars(figures) for figures in check.values()], index=list(check))

# %% [markdown]
# ## Look at latents
#
# `features` reads held-out text and describes every latent: contexts, tokens, neighbours, and the words it makes more
# likely. Shown here are latents at fixed quantiles of firing density, so that none is picked by hand.

# %%
features = sparsary.features("published", out="features", tokens=12_000, options=options)
features

# %% [markdown]
# The whole table has a row for each latent. `predicate` is the simplest property of tokens that tells where the
# latent fires, with its F1 on other documents; 1 is perfect.

# %%
table = features.to_pandas().set_index("latent")
shown = {"density": "density", "details.predicate_f1.predicate": "predicate", "scores.predicate_f1": "F1"}
table.rename(columns=shown)[list(shown.values())].nlargest(8, "F1")

# %% [markdown]
# ## Find a latent
#
# The model continues "David went home because" with "he", and "Maria went home because" with "she". Which latent
# differs most between such prompts, at the last token?

# %%
female = ["Alice", "Emily", "Jane", "Kate", "Maria", "Sarah", "Ruth", "Helen"]
male = ["Adam", "Carl", "David", "Jack", "Paul", "Peter", "Kevin", "Thomas"]


def last_codes(names):
    """Return the mean activation of every latent at the last token of the names' prompts."""
    last = torch.cat([model.activations(f"{name} went home because", d.hook)[-1:] for name in names])
    with torch.no_grad():
        return d.encode(last).to_dense(d.n_latents).mean(0)


def next_words(names, **edits):
    """Return the word that the model says next in each prompt."""
    return [model.generate(f"{name} went home because", max_new_tokens=1, **edits).split()[-1] for name in names]


difference = last_codes(female) - last_codes(male)
latent = int(difference.argmax())
features.records_of(latent)

# %% [markdown]
# ## Steer
#
# Steering adds the latent's direction to the model's activations, here to prompts about men. The amount is in the
# units of the latent's own activation: compare it with the mean over women's prompts.

# %%
usual = float(last_codes(female)[latent])
steered = {
    f"{share:g} x {usual:.1f}": pd.Series(next_words(male, steer=[(d, latent, share * usual)])).value_counts()
    for share in (0, 1, 2, 3)
}
pd.DataFrame(steered).fillna(0).astype(int)

# %% [markdown]
# A few times the usual amount turns "he" into "she". Much larger amounts move the model away from anything it was
# trained on, so increase them slowly. Ablation is the opposite test: take the latent away where it fires by itself.

# %%
text = "Maria went home because she lost a coin ."
pd.Series(
    {"the model": model.loss(text), f"without latent {latent}": model.loss(text, ablate=[(d, latent)])},
    name="loss, nats per token",
).to_frame().round(3)

# %% [markdown]
# The model does not need this one latent to say "she": in a dictionary of 256 latents, gender has several. Steering
# shows that a direction is sufficient, ablation whether it is necessary.
#
# ## Next
#
# - [Load a published dictionary](../how_to/published.md): options, and the same from the command line.
# - [Steer and ablate](../how_to/steer.md), [File formats](../formats.md).
