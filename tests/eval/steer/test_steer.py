"""`sparsary steer` on a model with two languages along one direction, built by hand: what it finds is known."""

import numpy as np
import pytest
import torch
import transformers
import typer
from safetensors import safe_open

import sparsary
from sparsary.eval.checkpoint import open_checkpoint, with_model
from sparsary.eval.commands.steer import app
from sparsary.eval.steer.edits import FIRST as FIRST_POSITION
from sparsary.eval.steer.edits import NO_EDIT, Edit, SteeredModel
from sparsary.eval.steer.run import LATENT_EDIT, MEAN, RAISED, steer
from sparsary.eval.steer.summary import steer_summary, steer_table
from sparsary.eval.steer.task import steer_task, steered_subject
from sparsary.sae.files import read_json
from sparsary.training.embedded.train import build_tokenizer
from sparsary.transcoders.load import NO_OPTIONS

HOOK = "transformer.h.0:out"
WIDTH = 16
STEMS = "ab ce di fo gu ha je ki lo mu na pe".split()
FIRST, SECOND, NUMBERS = STEMS, [stem + "u" for stem in STEMS], [f"{number:02d}" for number in range(10)]
WORDS = ["<unk>", "<bos>", "<pad>", *FIRST, *SECOND, *NUMBERS]
# Latents of +axis, then of -axis. The language is axis 0, the second one positive; numbers are axis 1.
SECOND_LATENT, FIRST_LATENT = 0, WIDTH


@pytest.fixture(scope="module")
def language_model():
    """A bigram model: the next token is of the language of the last one, whichever word it is."""
    sizes = {"vocab_size": len(WORDS), "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special, tie_word_embeddings=False))
    rows, weights = np.zeros((len(WORDS), WIDTH)), np.zeros((len(WORDS), WIDTH))
    for number, (word, row, weight) in enumerate(zip(WORDS, rows, weights, strict=True)):
        # Words of one meaning are alike but for the language.
        meaning = STEMS.index(word.removesuffix("u")) if word.removesuffix("u") in STEMS else 100 + number
        row[2:] = np.random.default_rng(meaning).normal(size=WIDTH - 2) / 2
        if word in NUMBERS:
            row[1], weight[1] = 4, 8
        elif word in (*FIRST, *SECOND):
            row[0] = 1 if word in SECOND else -1
            weight[:2] = 8 * row[0], -1
        else:
            weight[:2] = 0, -8
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for part in module.modules():
            if isinstance(part, torch.nn.LayerNorm):
                part.weight.fill_(1)
        module.transformer.wte.weight.copy_(torch.from_numpy(rows))
        module.lm_head.weight.copy_(torch.from_numpy(weights))
    return sparsary.LanguageModel.from_pretrained(module, build_tokenizer(WORDS))


@pytest.fixture(scope="module")
def sae():
    """A latent for either direction of every axis, which reconstructs exactly."""
    axes = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    found = sparsary.SAE(WIDTH, 2 * WIDTH, sparsary.ENCODERS["topk"](k=WIDTH))
    with torch.no_grad():
        found.W_enc.copy_(axes)
        found.W_dec.copy_(axes)
    about = {"hook": HOOK, "hooks_in": [HOOK], "hooks_out": [HOOK], "text": {"context_length": 64}}
    found.provenance = about | {"harvest": {"dtype": "float32", "heldout": 0.1}}
    return found.eval()


def written(words, seed, count=60, length=24):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, length)) for _ in range(count)]


@pytest.fixture(scope="module")
def texts():
    return {"towards": written(SECOND, 1), "away_from": written(FIRST, 2), "neutral": written(NUMBERS, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("steer")


@pytest.fixture(scope="module")
def found(sae, language_model, texts, folder):
    options = {"latents": 2, "strengths": (1, 0.5), "prompts": ["ab ce di"], "export": folder / "vector.safetensors"}
    return steer(sae, **texts, out=folder, model=language_model, **options)


@pytest.fixture(scope="module")
def edits(found):
    return {row["name"]: row for row in found["edits"]}


@pytest.fixture(scope="module")
def steered(subject):
    return SteeredModel(subject)


def test_the_latents_of_the_language_are_chosen_and_steer_it(found, edits):
    roles = {row["latent"]: row["role"] for row in found["latents"]}
    assert roles[SECOND_LATENT] == "raised"
    assert roles[FIRST_LATENT] == "zeroed"
    assert found["most_selective"][0] == {"latent": SECOND_LATENT, "auroc_choosing": 1.0, "auroc": 1.0}
    assert found["classifier_accuracy"] == 1
    assert (found["clean"]["share"], found["clean"]["towards_share"]) == (0, 1)
    for name in (LATENT_EDIT, MEAN):
        assert edits[name]["chosen"]["share"] > 0.9
        assert edits[name]["chosen"]["kl"] <= 0.05
    randoms = [row["chosen"] or found["clean"] for name, row in edits.items() if name.startswith("random")]
    assert max(point["share"] for point in randoms) < 0.1
    assert edits["prefix"]["chosen"]["share"] == 0


def test_target_tokens_are_those_of_the_text_towards(found):
    assert found["target_tokens"]["count"] == found["contrast_tokens"]["count"] == len(STEMS)
    assert set(found["target_tokens"]["most_frequent"]) == set(SECOND)
    assert set(found["contrast_tokens"]["most_frequent"]) == set(FIRST)


def test_the_difference_is_one_direction_that_latents_and_means_share(found):
    directions = found["directions"]
    assert directions["shares"][0] > 0.95
    assert directions["effective_rank"] < 1.6
    assert directions["directions"] == 1
    assert directions["cosines"]["first_mean"] > 0.99
    assert directions["cosines"]["raised_mean"] > 0.9


def test_a_strength_is_chosen_on_the_other_half(found, edits):
    for row in edits.values():
        free = row["name"] == "prefix"
        fits = [point for point in row["points"] if point["choosing_kl"] <= found["most_kl"] or free]
        assert row["chosen"] == max(fits, key=lambda point: point["choosing_mass"], default=None)
    assert [point["strength"] for point in edits[LATENT_EDIT]["points"]] == [0.5, 1]


def test_samples_of_a_prompt_are_in_the_other_language(found):
    sample = found["samples"][0]
    assert sample["prompt"] == "ab ce di"
    assert set(sample["texts"]["none"].split()) <= set(FIRST)
    assert sum(word in SECOND for word in sample["texts"][LATENT_EDIT].split()) > 15


def test_edits_are_those_of_the_splice_and_spare_the_first_token(steered, sae, language_model):
    ids = torch.tensor([[1, *range(3, 13)], [1, *range(8, 18)]])
    plain = language_model.logits(ids)
    edit = Edit("both", (SECOND_LATENT, 5), (1.5, 0.25), (FIRST_LATENT,))
    found = steered.logits(ids, edit, 2.0)
    torch.testing.assert_close(found[:, :FIRST_POSITION], plain[:, :FIRST_POSITION])
    x = language_model.activations(ids, (HOOK,))[HOOK]
    x[:, 1:, 0] += 3.0
    x[:, 1:, 5] += 0.5
    # The latent of -axis 0 is set to zero where it fires.
    fires = language_model.activations(ids, (HOOK,))[HOOK][:, 1:, 0].clamp(max=0)
    x[:, 1:, 0] -= fires
    with language_model.replacing(HOOK, lambda _: x):
        torch.testing.assert_close(found, language_model.logits(ids))
    # Raised to an amount where it is below, and left alone where it is above.
    floor = Edit("floor", (SECOND_LATENT,), (0.5,), floor=True)
    x = language_model.activations(ids, (HOOK,))[HOOK]
    x[:, 1:, 0] += (1.0 - x[:, 1:, 0].clamp(min=0)).clamp(min=0)
    found = steered.logits(ids, floor, 2.0)
    with language_model.replacing(HOOK, lambda _: x):
        torch.testing.assert_close(found, language_model.logits(ids))
    torch.testing.assert_close(steered.logits(ids, edit, 0.0), plain)
    torch.testing.assert_close(steered.logits(ids, NO_EDIT, 0.0), plain)
    raised = Edit("raised", edit.latents, edit.amounts)
    vector = Edit("vector", vector=raised.direction(steered.subject))
    torch.testing.assert_close(steered.logits(ids, raised, 2.0), steered.logits(ids, vector, 2.0))


def test_a_prefix_stands_behind_bos_and_is_left_out_of_the_logits(steered, language_model):
    ids = torch.tensor([[1, 3, 4, 5]])
    found = steered.logits(ids, Edit("prefix", prefix=(16, 17)), 1.0)
    torch.testing.assert_close(found, language_model.logits(torch.tensor([[1, 16, 17, 3, 4, 5]]))[:, 2:])


def test_the_exported_vector_steers_as_the_raised_latents_do(found, folder, steered, language_model):
    with safe_open(folder / "vector.safetensors", "pt") as file:
        metadata, vector = file.metadata(), file.get_tensor("activations")
    assert vector.shape == (1, WIDTH)
    assert metadata["format"] == "vllm-lens"
    assert (metadata["layer_indices"], metadata["norm_match"], metadata["hook"]) == ("[0]", "false", HOOK)
    assert float(metadata["norm"]) == pytest.approx(float(vector.norm()), rel=1e-4)
    rows = [row for row in found["latents"] if row["role"] == "raised"]
    raised = Edit(RAISED, tuple(row["latent"] for row in rows), tuple(row["difference"] for row in rows))
    scale, ids = float(metadata["scale"]), torch.tensor([[1, 3, 4, 5]])
    expected = steered.logits(ids, raised, scale)

    def added(x):
        return torch.cat([x[:, :1], x[:, 1:] + scale * vector[0]], dim=1)

    with language_model.replacing(HOOK, added):
        torch.testing.assert_close(language_model.logits(ids), expected, atol=1e-3, rtol=1e-3)


def test_the_result_is_written_and_rendered_again(found, folder):
    path = folder / "steer.json"
    assert {key: value for key, value in found.items() if key not in ("page_path", "path")} == read_json(path)
    page = path.with_suffix(".html")
    before = page.read_bytes()
    page.unlink()
    assert sparsary.render(path) == page
    assert page.read_bytes() == before
    assert len(found.to_pandas()) == len(found["latents"])
    html = page.read_text()
    assert "random latents" in html
    assert html.count("<svg") == html.count("</svg>") == 4
    lines, (head, rows) = dict(steer_summary(found)), steer_table(found)
    assert lines["most selective"].startswith("2 latents")
    assert head[0] == "edit"
    assert [row[0] for row in rows][:3] == ["latents", "latents, raised only", "random latents"]


@pytest.fixture(scope="module")
def subject(sae, language_model):
    return steered_subject(open_checkpoint(sae, with_model(NO_OPTIONS, language_model)))


def test_given_tokens_are_the_target(subject, texts):
    task = steer_task(subject, texts["towards"], texts["away_from"], None, SECOND[:3], 400, 0)
    assert [WORDS[token] for token in np.flatnonzero(task.sets.target)] == SECOND[:3]
    assert set(np.flatnonzero(task.sets.contrast)) == {WORDS.index(word) for word in FIRST}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"towards": "gone.txt"}, r"--towards: text\.files: gone\.txt does not exist"),
        ({"towards": ["abu ceu", "diu fou"]}, r"--towards: expected at least 20 different documents .*, got 2 in the texts"),
        ({"neutral": ["01 02 03"] * 30}, r"--neutral: expected at least 20 different documents .*, got 1 in"),
        ({"tokens": ["abu", "cex"]}, r"--tokens: expected single tokens of the model, got 'cex'"),
        ({"tokens": []}, r"--tokens: expected at least one token, got none"),
        ({"strengths": (1, -2)}, r"--strengths: expected numbers above 0, got 1, -2"),
        ({"pooling": "sum"}, r"--pooling: expected one of max, mean, got 'sum'"),
        ({"piece": 0}, r"--piece: expected at least 1, got 0"),
        ({"latents": 0}, r"--latents: expected at least 1, got 0"),
        ({"most_kl": 0.0}, r"--most-kl: expected a number above 0"),
        ({"export": "vector.gguf"}, r"--export: expected a file ending in \.safetensors, got vector\.gguf"),
        ({"prompts": ["ab " * 60]}, r"--prompt: expected 2 to \d+ tokens, BOS included, got 61"),
    ],
)
def test_a_wrong_option_is_named(change, message, sae, language_model, texts, tmp_path):
    with pytest.raises(ValueError, match=message):
        steer(sae, **{**texts, "out": tmp_path, "model": language_model, "strengths": (1,), **change})


def test_equal_texts_and_empty_files_are_refused(sae, language_model, texts, tmp_path):
    same = {**texts, "away_from": texts["towards"]}
    with pytest.raises(ValueError, match=r"--towards and --from: expected two different texts, .* 60 of 60 documents"):
        steer(sae, **same, out=tmp_path, model=language_model)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"--from: expected at least 20 different documents .*, got 0 in .*empty\.txt"):
        steer(sae, **{**texts, "away_from": empty}, out=tmp_path, model=language_model)


def test_dictionaries_that_write_elsewhere_and_unknown_models_are_refused(sae, language_model, texts, tmp_path):
    transcoder = sparsary.Transcoder(WIDTH, WIDTH, 8, sparsary.ENCODERS["topk"](k=2))
    hooks = {"hooks_in": ["transformer.h.0.mlp:in"], "hooks_out": ["transformer.h.0.mlp:out"]}
    transcoder.provenance = sae.provenance | hooks
    with pytest.raises(ValueError, match=r"expected an SAE, which writes to the hook that it reads, got kind transcoder"):
        steer(transcoder, **texts, out=tmp_path, model=language_model)
    with pytest.raises(ValueError, match=r"expected a language model, .* --model ID"):
        steer(sae, **texts, out=tmp_path)


def test_halves_share_no_document(subject, texts):
    task = steer_task(subject, texts["towards"] + texts["towards"][:5], texts["away_from"], None, None, 400, 0)
    choosing, reporting = (set(map(tuple, half)) for half in task.towards)
    assert len(choosing) + len(reporting) == len(choosing | reporting) == 60
    assert task.neutral is task.towards


def test_the_command_wants_both_texts(tmp_path):
    command = typer.main.get_command(app)
    with pytest.raises(ValueError, match=r"--from: expected a file, got none\. Give both texts: --towards FILE --from FILE"):
        command(["runs/none", "--towards", "a.txt"], standalone_mode=False)
    with pytest.raises(ValueError, match="--strengths: expected numbers separated by commas, got '1,x'"):
        command(["runs/none", "--towards", "a.txt", "--from", "b.txt", "--strengths", "1,x"], standalone_mode=False)
