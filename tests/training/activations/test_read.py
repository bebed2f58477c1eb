"""Activations of models that recipes do not run: encoders, vision, speech, encoders with decoders, any module."""

import json

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsary
from sparsary.training.activations.model import load_model, skeleton
from sparsary.training.activations.read import read_activations
from sparsary.training.recipe import ModelSection

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.randint(4, 90, (3, 7))
MASK = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32)}


def vit():
    return tf.ViTModel(tf.ViTConfig(**SMALL, image_size=32, patch_size=8))


def bert():
    return tf.BertModel(tf.BertConfig(**SMALL, vocab_size=96))


def clip():
    config = tf.CLIPConfig(
        text_config=SMALL | {"vocab_size": 96, "max_position_embeddings": 16},
        vision_config=SMALL | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return tf.CLIPModel(config)


def t5():
    return tf.T5Model(tf.T5Config(vocab_size=96, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8))


def whisper():
    sizes = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return tf.WhisperModel(
        tf.WhisperConfig(vocab_size=96, d_model=32, num_mel_bins=8, max_source_positions=20, **sizes, pad_token_id=0)
    )


def wav2vec():
    return tf.Wav2Vec2Model(
        tf.Wav2Vec2Config(
            **SMALL,
            conv_dim=(16, 16),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )


# The model, a hook, an input, how many rows it gives, and a module path whose hidden states are compared.
CASES = {
    "bert": (bert, "encoder.layer.0:out", TEXT, int(MASK.sum())),
    "bert without mask": (bert, "encoder.layer.0:out", {"input_ids": IDS}, 21),
    "bert pooled": (bert, "pooler:out", TEXT, 3),
    "vit": (vit, "layers.0:out", PIXELS, 2 * 17),
    "clip vision": (lambda: clip().vision_model, "encoder.layers.0:out", PIXELS, 2 * 17),
    "clip text": (clip, "text_model.encoder.layers.0:out", TEXT | PIXELS, int(MASK.sum())),
    "clip both": (clip, "vision_model.encoder.layers.1:out", {"input_ids": IDS, "attention_mask": MASK} | PIXELS, 2 * 17),
    "t5 encoder": (t5, "encoder.block.0:out", TEXT, int(MASK.sum())),
    "t5 decoder": (t5, "decoder.block.0:out", TEXT | {"decoder_input_ids": IDS[:, :5]}, 15),
    "whisper encoder": (whisper, "encoder.layers.0:out", {"input_features": torch.randn(2, 8, 40)}, 40),
    "whisper decoder": (
        whisper,
        "decoder.layers.0:out",
        {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": IDS[:2]},
        14,
    ),
    "wav2vec": (wav2vec, "encoder.layers.0:out", {"input_values": torch.randn(2, 400)}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_hidden_states_that_the_mask_leaves(name):
    build, hook, item, count = CASES[name]
    torch.manual_seed(0)
    model = build()
    (rows,) = read_activations(model, hook, [item])
    assert rows.dtype == torch.float32
    assert count is None or rows.shape == (count, 32)
    seen = []
    path, _, _ = hook.rpartition(":")
    handle = model.get_submodule(path).register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        extra = (
            {"decoder_input_ids": IDS[: len(next(iter(item.values())))]} if name in ("t5 encoder", "whisper encoder") else {}
        )
        model(**item, **extra)
    handle.remove()
    expected = seen[0][MASK.bool()] if count == int(MASK.sum()) else seen[0].flatten(0, -2)
    torch.testing.assert_close(rows, expected)


def test_lists_are_read_again_and_iterators_once():
    model = nn.Sequential(nn.Linear(4, 6))
    data = torch.randn(10, 3, 4)
    loader = DataLoader(TensorDataset(data), batch_size=5)
    rows = read_activations(model, "0:out", loader)
    for _ in range(2):
        torch.testing.assert_close(torch.cat(list(rows)), model(data).detach().flatten(0, 1))
    once = read_activations(model, "0:out", iter(loader))
    assert len(list(once)) == 2
    assert list(once) == []


def test_both_sides_for_a_transcoder():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    (item,) = read_activations(model, "1:in", [(torch.ones(2, 3, 4),)], target="2:out")
    torch.testing.assert_close(model[2](item["x"].relu()), item["target"])


def test_what_cannot_be_rows_is_told():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"hook 0:out: expected a tensor .* got \(2, 4, 6, 6\) of float32"):
        list(read_activations(model, "0:out", [torch.ones(2, 3, 8, 8)]))
    with pytest.raises(ValueError, match=r"'1:out' does not exist in Sequential"):
        read_activations(model, "1:out", [])
    with pytest.raises(ValueError, match=r"hook embeddings.patch_embeddings.projection:out: expected a tensor"):
        list(read_activations(vit(), "embeddings.patch_embeddings.projection:out", [PIXELS]))


def recipe(folder, model, hook):
    values = {
        "model": {"id": str(model)},
        "text": {"source": "files", "files": ["none.txt"], "context_length": 16},
        "harvest": {"store": None},
        "dictionary": {"hook": hook, "n_latents": 48, "encoder": {"name": "topk", "k": 4}},
        "tokens": 512,
        "batch_tokens": 64,
        "out_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("build", [vit, bert], ids=["vit", "bert"])
def test_a_recipe_trains_on_them(build, tmp_path):
    hook, item = ("layers.1:out", PIXELS) if build is vit else ("encoder.layer.1:out", TEXT)
    out = sparsary.train(recipe(tmp_path, "a name", hook), sparsary.read_activations(build(), hook, [item] * 4))
    assert sparsary.load(out).d_in == 32


OTHERS = {
    "vit": vit,
    "t5": lambda: tf.T5ForConditionalGeneration(t5().config),
    "bert masked": lambda: tf.BertForMaskedLM(bert().config),
    "bert": bert,
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=96,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=32,
        )
    ),
    "clip": clip,
    "whisper": lambda: tf.WhisperForConditionalGeneration(whisper().config),
    "roberta classifier": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SMALL, vocab_size=96)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_recipe_s_refusal_shows_how(name, tmp_path):
    model = OTHERS[name]()
    model.save_pretrained(tmp_path)
    for load in (skeleton, load_model):
        with pytest.raises(ValueError, match=r"model\.id: expected a causal language model") as caught:
            load(ModelSection(id=str(tmp_path)))
        assert type(model).__name__ in str(caught.value)
        assert "sparsary.read_activations(model, " in str(caught.value)


def test_causal_parts_of_such_architectures_are_run(tmp_path):
    model = tf.BertLMHeadModel(tf.BertConfig(**SMALL, vocab_size=96, is_decoder=True))
    model.save_pretrained(tmp_path)
    assert skeleton(ModelSection(id=str(tmp_path))).widths(("bert.encoder.layer.1:out",)) == {"bert.encoder.layer.1:out": 32}
