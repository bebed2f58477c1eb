"""Sites of every causal architecture that transformers can build, checked by interventions: perturb a part, see what moves."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.sites import TWO_SIDED, find_block, n_layers

# Models whose blocks pass on something else than (contexts, positions, width), or do not run on tokens alone.
ELSEWHERE = {
    "blt": "its blocks lie in models of patches and bytes",
    "cpmant": "puts a prompt of its own before the tokens",
    "deepseek_v4": "blocks pass on several streams",
    "dots3_note": "its nested configuration cannot be shrunk",
    "gemma3n": "blocks pass on several streams",
    "gemma3n_text": "blocks pass on several streams",
    "hrm_text": "its blocks lie in two stacks that take turns",
    "hy_v4": "blocks pass on several streams",
    "prophetnet": "blocks pass on several positions for each token",
    "reformer": "runs on one length of contexts",
}
# Where the MLP reads what attention wrote, and yet no tensor holds both that and the stream that goes on.
NO_STREAM_BETWEEN = {"inkling2_text"}


def moved_by(model, ids, hooks, at, clean):
    """The hooks at which something else is seen once the tensor at one of them is another."""
    generator = torch.Generator().manual_seed(0)
    with model.replacing(at, lambda x: x + 5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)):
        seen = model.activations(ids, hooks)
    return {hook for hook in hooks if not torch.allclose(seen[hook], clean[hook], atol=1e-4, equal_nan=True)}


def kinds_of_blocks(module):
    """One layer of every kind."""
    found = {}
    for layer in range(n_layers(module)):
        block = module.get_submodule(find_block(module, layer).path)
        found.setdefault(str([(name, type(part).__name__) for name, part in block.named_modules()]), layer)
    return list(found.values())


# Of each kind of block some: parallel and sequential, encoders' and decoders', experts, hybrids, state spaces, layers that read
# pictures. The others are a sweep of their own.
SAMPLE = set(
    "bart bert bloom deepseek_v3 falcon falcon_h1 gemma2 gpt2 gpt_neox gpt_oss inkling2_text jamba llama mamba mixtral mllama "
    "olmo2 phi qwen3_5 rwkv".split()
)


@pytest.mark.parametrize("kind", sorted(SAMPLE & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}))
def test_sites_are_where_interventions_say(load_beside, kind):
    sites_are_where_interventions_say(load_beside, kind)


@pytest.mark.parametrize("kind", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - SAMPLE))
def test_sites_of_every_other_architecture(load_beside, kind):
    sites_are_where_interventions_say(load_beside, kind)


def sites_are_where_interventions_say(load_beside, kind):
    tiny = load_beside("tiny_models")
    why = tiny.IMPOSSIBLE.get(kind) or ELSEWHERE.get(kind)
    if why is not None:
        pytest.skip(why)
    model = LanguageModel(tiny.tiny_model(kind), None, kind, None)
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    for layer in kinds_of_blocks(model.module):
        block = find_block(model.module, layer)
        at = {site: pair[0] for site, pair in block.sites().items() if site not in TWO_SIDED}
        hooks = tuple(dict.fromkeys(at.values()))
        try:
            clean = model.activations(ids, hooks)
        except ValueError:
            # Some layers read pictures, and do not run without.
            assert set(at) == {"resid_pre", "resid_post"}, layer
            continue
        by = {site: moved_by(model, ids, hooks, at[site], clean) for site in ("attn_out", "mlp_in", "mlp_out") if site in at}
        for site, moved in by.items():
            assert at["resid_post"] in moved, (layer, site)
            assert at["resid_pre"] not in moved or at["resid_pre"] == at[site], (layer, site)
        if "mlp_out" in at:
            assert at["mlp_out"] in by["mlp_in"], layer
            assert at["mlp_in"] not in by["mlp_out"], layer
        if "resid_mid" in at:
            assert at["resid_mid"] not in by["mlp_out"], layer
            if "attn_out" in by:
                assert {at["resid_mid"], at["mlp_in"]} <= by["attn_out"], layer
            assert not block.parallel
        elif {"attn_out", "mlp_in"} <= set(at) and kind not in NO_STREAM_BETWEEN:
            # Nothing lies between them: they read the same stream.
            assert block.parallel, layer
            assert at["mlp_in"] not in by["attn_out"], layer
