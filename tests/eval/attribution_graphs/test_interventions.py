"""What edges predict happens: exactly in the local replacement model, nearly in a model that is close to it."""

import pytest
import torch

from sparsary.eval.attribution_graphs.graph import graph_of
from sparsary.eval.attribution_graphs.interventions import EFFECTS, compare_replacement, intervene, most_influential, predict
from sparsary.eval.attribution_graphs.local_replacement_model import LocalReplacement
from sparsary.eval.attribution_graphs.replacement_model import Replacement
from sparsary.eval.circuits.known import KNOWN
from sparsary.sae import ENCODERS
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.model import LanguageModel
from sparsary.transcoders import CrossLayerTranscoder
from sparsary.transcoders.transcoder import Transcoder


def prompt(length=6):
    return torch.randint(3, 41, (length,), generator=torch.Generator().manual_seed(9))


def rectified(anatomy, size):
    """The model's MLPs made rectified linear ones that write ``size`` as much, and transcoders that are these MLPs."""
    found = {}
    for layer, block in enumerate(anatomy.model.module.transformer.h):
        block.mlp.act = torch.nn.ReLU()
        built = Transcoder(anatomy.d_model, anatomy.d_model, block.mlp.c_fc.nf, ENCODERS["relu"]()).double()
        with torch.no_grad():
            block.mlp.c_proj.weight.mul_(size)
            built.W_enc.copy_(block.mlp.c_fc.weight.T)
            built.b_enc.copy_(block.mlp.c_fc.bias)
            built.W_dec.copy_(block.mlp.c_proj.weight)
            built.b_dec.copy_(block.mlp.c_proj.bias)
        found[layer] = built.requires_grad_(False).eval()
    return found


def crossing(width):
    torch.manual_seed(3)
    built = CrossLayerTranscoder(3, 3 * width, 3 * width, 51, ENCODERS["topk"](k=4)).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
        built.out_scale.fill_(0.01)
    return built.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gpt2", "stack"),
        ("llama", "cross_layer"),
        ("gpt_neox", "cross_layer"),
        ("gemma2", "stack"),
    ],
)
def test_predictions_are_what_the_local_replacement_does(family, kind, tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model(family), post_norms=True)
    dictionaries = random_transcoders(anatomy.d_model) if kind == "stack" else crossing(anatomy.d_model)
    local = LocalReplacement(Replacement(anatomy, dictionaries), prompt(), 1)
    for graph in (graph_of(local), graph_of(local, max_latents=30)):
        found = intervene(local, graph, most_influential(graph, 9), factor=0.3)
        for effect in EFFECTS:
            predicted, measured = found.predicted[effect], found.measured["local"][effect]
            assert torch.allclose(predicted, measured, rtol=1e-6, atol=1e-9 * float(predicted.abs().max()))
            assert found.agreement(effect, "local").spearman == pytest.approx(1.0, abs=1e-3)
        # Paths of more than one edge matter.
        assert not torch.allclose(found.predicted["direct"], found.predicted["total"], rtol=1e-2)


def test_one_edge_is_the_negative_of_what_taking_its_source_out_does(tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model("gpt2"))
    local = LocalReplacement(Replacement(anatomy, random_transcoders(12)), prompt(), 1)
    graph = graph_of(local)
    sources = torch.tensor([0, 5, 11])
    assert torch.allclose(predict(graph, sources)["direct"], -graph.adjacency[:, sources].T, atol=1e-12)


@pytest.fixture(scope="module")
def wide_model():
    """Of 64 dimensions: of what is added to a narrow stream, norms take too much away again."""
    import transformers

    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=41, n_layer=3, n_embd=64, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    module = transformers.AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LanguageModel(module, None, "gpt2", None)


@pytest.mark.parametrize("place", ["patterns", "model"])
def test_in_a_model_that_its_transcoders_are_edges_rank_effects(place, wide_model):
    """Small writes leave attention and gates nearly as they were, which is what the graph supposes."""
    anatomy = Architecture(wide_model)
    local = LocalReplacement(Replacement(anatomy, rectified(anatomy, 0.3)), prompt(), 1)
    graph = graph_of(local)
    found = intervene(local, graph, most_influential(graph, 20))
    for effect in EFFECTS:
        for logits_only in (False, True):
            agreement = found.agreement(effect, place, logits_only)
            assert agreement.pairs >= 200
            assert agreement.spearman >= 0.95
            assert agreement.pearson >= 0.95


def mlps_as_transcoders(known):
    """Transcoders that are a hand-built model's MLPs."""
    found = {}
    for layer in range(known.config.n_layers):
        mlp = known.module.mlp(layer)
        built = Transcoder(known.config.d_model, known.config.d_model, known.config.d_mlp, ENCODERS["relu"]()).double()
        with torch.no_grad():
            for own, theirs in (
                (built.W_enc, mlp.up_proj.weight),
                (built.b_enc, mlp.up_proj.bias),
                (built.W_dec, mlp.down_proj.weight.T),
                (built.b_dec, mlp.down_proj.bias),
            ):
                own.copy_(theirs)
        found[layer] = built.requires_grad_(False).eval()
    return found


@pytest.mark.parametrize("name", ["fraction", "reverse", "clock"])
def test_in_models_built_by_hand_edges_rank_what_interventions_do(name):
    known = KNOWN[name]()
    known.module.double()
    local = LocalReplacement(Replacement(Architecture(known.model), mlps_as_transcoders(known)), known.pairs.clean[0], 0)
    graph = graph_of(local)
    found = intervene(local, graph, most_influential(graph, 30))
    for effect in EFFECTS:
        agreement = found.agreement(effect, "model")
        assert agreement.pairs >= 8
        assert agreement.spearman >= 0.95
        assert agreement.pearson >= 0.99


FAMILY_KINDS = [
    ("gpt2", "stack"),
    ("gpt2", "cross_layer"),
    ("gpt_neox", "cross_layer"),
    ("llama", "stack"),
    ("gemma2", "stack"),
    ("gemma3", "cross_layer"),
]


@pytest.mark.parametrize(("family", "kind"), FAMILY_KINDS)
def test_with_norms_and_patterns_held_the_model_itself_does_what_edges_say(family, kind, tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model(family), post_norms=True)
    dictionaries = random_transcoders(anatomy.d_model) if kind == "stack" else crossing(anatomy.d_model)
    local = LocalReplacement(Replacement(anatomy, dictionaries), prompt(), 1)
    graph = graph_of(local)
    found = intervene(local, graph, most_influential(graph, 9), factor=0.3)
    predicted = found.predicted["direct"]
    assert torch.allclose(found.measured["norms"]["direct"], predicted, atol=1e-8 * float(predicted.abs().max()))
    # Norms that respond make a difference, attention patterns another.
    for place, other in (("norms", "patterns"), ("patterns", "model")):
        assert not torch.allclose(found.measured[place]["direct"], found.measured[other]["direct"], rtol=1e-3)


def test_with_norms_and_patterns_held_total_effects_are_predicted_until_a_gate_closes(tiny_model):
    anatomy = Architecture(tiny_model("gpt2"))
    local = LocalReplacement(Replacement(anatomy, rectified(anatomy, 1.0)), prompt(), 1)
    graph = graph_of(local)
    found = intervene(local, graph, most_influential(graph, 9), factor=1 - 1e-5)
    predicted = found.predicted["total"]
    assert torch.allclose(found.measured["norms"]["total"], predicted, rtol=1e-4, atol=1e-7 * float(predicted.abs().max()))


def test_mlps_without_a_transcoder_are_held_for_direct_effects(tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model("gpt2"))
    whole = rectified(anatomy, 1.0)
    local = LocalReplacement(Replacement(anatomy, {0: whole[0], 2: whole[2]}), prompt(), 1)
    graph = graph_of(local)
    lower = torch.nonzero(graph.active.layers == 0)[:5, 0]
    direct = intervene(local, graph, lower).measured["model"]["direct"]
    everything = LocalReplacement(Replacement(anatomy, whole), prompt(), 1)
    other = graph_of(everything)
    # Layer 1 is held either way, by its own output or by its transcoder's, which are the same.
    again = intervene(everything, other, lower).measured["model"]["direct"]
    upper, same = graph.active.layers == 2, other.active.layers == 2
    assert torch.allclose(direct[:, : len(graph.active)][:, upper], again[:, : len(other.active)][:, same], atol=1e-9)
    assert float(direct.abs().max()) > 1e-3


def test_what_latents_alone_make_of_the_prompt(tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model("gpt2"))
    perfect = compare_replacement(LocalReplacement(Replacement(anatomy, rectified(anatomy, 1.0)), prompt(), 1))
    assert perfect.kl_mean == pytest.approx(0.0, abs=1e-6)
    assert (perfect.top1_last, perfect.top1_share) == (True, 1.0)
    poor = compare_replacement(LocalReplacement(Replacement(anatomy, random_transcoders(12)), prompt(), 1))
    assert poor.kl_last > 1e-2
    assert poor.kl_mean > 1e-2


def test_what_is_no_latent_of_the_graph_is_refused(tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model("gpt2"))
    local = LocalReplacement(Replacement(anatomy, random_transcoders(12)), prompt(3), 1)
    graph = graph_of(local)
    with pytest.raises(ValueError, match=r"sources: expected latents of the graph, 0 to \d+, got \[500\]"):
        intervene(local, graph, torch.tensor([500]))
    with pytest.raises(ValueError, match=r"targets: expected latents of the graph"):
        intervene(local, graph, torch.tensor([0]), torch.tensor([500]))
    single = graph_of(local, answer=3)
    with pytest.raises(ValueError, match=r"expected at least 3 pairs that an edge joins, got 1. Give more sources"):
        intervene(local, single, torch.tensor([0]), torch.tensor([], dtype=torch.long)).agreement("total")
