# %% [markdown]
# # Transcoders and an attribution graph
#
# A transcoder reads what an MLP reads and writes what it writes, through a few active latents. With one in place of
# every MLP, each step from the tokens to a prediction is a sum of latents' contributions: an attribution graph. We
# train a small set of them, trace one prediction, and check by ablation that the graph says what the model does.

# %%
import pandas as pd
import torch

import sparsary

model = sparsary.LanguageModel.from_pretrained("embedded")
prompt = "The war lasted from the year 1743 to the year 17"
model.generate(prompt, max_new_tokens=2)

# %% [markdown]
# A war that began in 1743 ends later: the model continues with years above 43 (the task "greater than" of Hanna et
# al. 2023). How?
#
# ## Train a transcoder for every MLP
#
# `layer` and `site: mlp` name the MLP's input and output, `skip` adds a linear path beside the latents. The grid
# trains all four layers over one pass of the model; its directory is a stack, loaded and evaluated as one.

# %%
recipe = {
    "harvest": {"tokens": 60_000, "dtype": "int8", "store": "activations"},
    "dictionary": {
        "kind": "transcoder",
        "site": "mlp",
        "layer": 0,
        "skip": True,
        "n_latents": 256,
        "encoder": {"name": "topk", "k": 16},
    },
    "grid": {"dictionary.layer": [0, 1, 2, 3]},
    "tokens": 120_000,
    "lr_warmup_steps": 50,
    "batch_tokens": 1024,
    "dead_after_tokens": 100_000,
    "eval_tokens": 4_000,
}
stack = sparsary.train(recipe, model=model, out_dir="stack")
report = sparsary.evaluate(stack)
report

# %% [markdown]
# With all four MLPs replaced at once the model loses `ce increase` nats per token; without the MLPs it would lose
# several. These transcoders are small and trained for seconds: what they miss appears in the graph as error nodes.
#
# ## Trace one prediction
#
# The graph starts at a logit, or at the difference of two: here that of 60, a right answer, and 40, a wrong one. It
# goes back along everything that adds to it, to the tokens of the prompt. What carries little of it is left out.
# Point at a node to see what it is: for a latent, contexts it fires on and words it makes more likely.

# %%
graph = sparsary.attribution_graph(stack, prompt, out="graph", answer="60", foil="40", context_tokens=6_000)
graph

# %% [markdown]
# `replacement score` is the share of the influence that comes from tokens, not from errors. The same nodes as a
# table, here the latents with most influence:

# %%
latents = graph.to_pandas().query("kind == 'latent'").astype({"layer": int, "latent": int})
latents[["layer", "latent", "token", "influence", "value", "label"]].head(10)

# %% [markdown]
# ## Does the model agree?
#
# A graph is a claim about the model: without these latents it should lose what it knows about the year. So take away
# the ten most influential ones, in the model itself with its own MLPs, and add up the probability of the years after
# 43. As a control, ten latents of the same layers that also fire on this prompt.

# %%
transcoders = sparsary.load(stack)
chosen = latents.drop_duplicates(["layer", "latent"]).head(10)


def later(ablate=()):
    """Return the probability of the years after 43, among all years."""
    texts = [f"{prompt}{year:02d}" for year in range(100)]
    length = model.token_ids(texts[0]).shape[1] - 1
    logs = torch.tensor([-length * model.loss(text, ablate=ablate) for text in texts])
    return float(logs.softmax(0)[44:].sum())


def at(layer, side="out"):
    return f"transformer.h.{layer}.mlp:{side}"


ablated, control = [], []
for layer, latents_of_layer in chosen.groupby("layer")["latent"]:
    transcoder, taken = transcoders[at(layer)], latents_of_layer.tolist()
    firing = transcoder.encode(model.activations(prompt, at(layer, "in"))[1:]).latents.unique().tolist()
    others = [latent for latent in firing if latent not in taken]
    ablated.append((transcoder, taken))
    control.append((transcoder, others[: len(taken)]))
shares = {"the model": later(), "without the graph's ten latents": later(ablated), "without ten others": later(control)}
pd.Series(shares, name="probability of years after 43").to_frame().round(3)

# %% [markdown]
# `attribution_graph` itself tests the edges in the same way, one latent at a time. Spearman correlation of predicted
# and measured effects, with more and more of the model left free to respond:

# %%
places = {"norms": "patterns and norms held", "patterns": "patterns held", "model": "nothing held"}
pd.DataFrame(
    {words: {kind: graph[f"{kind}_spearman_{place}"] for kind in ("direct", "total")} for place, words in places.items()}
).round(2)

# %% [markdown]
# With attention patterns and norms held at their values, the model does what the edges say. Let free, they respond,
# and the agreement is lower: trust a graph as far as its interventions go.
#
# ## Next
#
# - [Transcoders](../transcoders.md): skip and cross-layer transcoders compared, and this task with trained ones.
# - [Attribution graphs](../attribution_graphs.md): heads on the way, levels, and whether interventions agree.
