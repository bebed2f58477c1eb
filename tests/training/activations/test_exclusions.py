"""Tokens that are left out of harvests, streams and evaluations: by role, id, place and norm; and documents kept apart."""

import itertools
import json

import numpy as np
import pytest
import torch

from sparsary.eval.heldout import EvalData
from sparsary.training.activations import contexts
from sparsary.training.activations.context_stream import ContextStream
from sparsary.training.activations.contexts import context_batches
from sparsary.training.activations.harvest import harvest_activations, recipe_identity
from sparsary.training.activations.live import Buffers, LiveStream
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.sites import block_paths
from sparsary.training.chats import ROLES
from sparsary.training.recipe import HarvestSection, ModelSection, TextSection
from sparsary.training.text import Cursor

HOOK = "model.layers.1:out"


@pytest.fixture(scope="module")
def chats(load_beside):
    return load_beside("tiny_chats")


@pytest.fixture(scope="module")
def chat_model(chats):
    return LanguageModel(chats.chat_module(), chats.chat_tokenizer(), "tiny", None)


@pytest.fixture
def text(chats, tmp_path):
    """Return a text of 40 chats, whose assistant says nothing but capital letters."""
    rows = [{"messages": [*chats.CHAT[:2], {"role": "assistant", "content": "ABCDEF"[: 2 + n % 5] * 2}]} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSection(source="files", files=(str(tmp_path / "chats.jsonl"),), column="messages", context_length=64)


def harvest(**options):
    return HarvestSection.model_validate({"hooks": [HOOK], "exclude_leading": 0, "heldout": 0.2} | options)


def assistants(text):
    return text.model_copy(update={"chat": text.chat.model_copy(update={"roles": ("assistant",)})})


def words_kept(model, text, section):
    return [model.tokenizer.decode(batch.token_ids[batch.kept].tolist()) for batch in context_batches(model, text, section, 8)]


def test_only_what_the_assistant_said_is_kept(chat_model, text):
    kept = "".join(words_kept(chat_model, assistants(text), harvest()))
    assert set(kept) == set("ABCDEF")
    whole = "".join(words_kept(chat_model, text, harvest(exclude_special=False)))
    # "B" begins the system's words, too.
    assert all(kept.count(letter) == whole.count(letter) > 0 for letter in "ACDEF")
    by_exclusion = harvest(exclude={"roles": ["system", "user", "template"]})
    assert "".join(words_kept(chat_model, text, by_exclusion)) == kept


def test_tokens_and_positions_are_left_out(chat_model, text):
    section = harvest(exclude={"tokens": ["A", chat_model.tokenizer("B")["input_ids"][0], "<|turn|>"], "positions": [0, 5, -1]})
    for batch in context_batches(chat_model, text, section.model_copy(update={"exclude_special": False}), 8):
        words = np.array(chat_model.tokenizer.convert_ids_to_tokens(batch.token_ids.ravel().tolist())).reshape(batch.kept.shape)
        expected = ~np.isin(words, ["A", "B", "<|turn|>"])
        expected[:, [0, 5, -1]] = False
        assert (batch.kept == expected).all()


@pytest.mark.parametrize("token", ["AB", "", 99_999])
def test_a_token_to_exclude_must_be_one(chat_model, text, token):
    with pytest.raises(ValueError, match=r"harvest.exclude.tokens: expected (one token|ids below 261)"):
        next(context_batches(chat_model, text, harvest(exclude={"tokens": [token]}), 8))


@pytest.fixture
def loud_model(chats):
    """Return a model in which "e" has fifty times the norm of other tokens where the first block reads."""
    model = LanguageModel(chats.chat_module(), chats.chat_tokenizer(), "loud", None)
    with torch.no_grad():
        model.module.model.embed_tokens.weight[model.tokenizer("e")["input_ids"][0]] *= 50
    return model


def test_passes_of_fewer_contexts_give_the_same_rows(chat_model, text, monkeypatch):
    batch = next(context_batches(chat_model, text, harvest(), 7))
    whole = batch.kept_activations(chat_model, (HOOK,))[HOOK]
    passes, own = [], LanguageModel.activations

    def counted(self, ids, hooks):
        passes.append(len(ids))
        return own(self, ids, hooks)

    monkeypatch.setattr(contexts, "CPU_PASS_TOKENS", 3 * batch.token_ids.shape[1])
    monkeypatch.setattr(LanguageModel, "activations", counted)
    torch.testing.assert_close(batch.kept_activations(chat_model, (HOOK,))[HOOK], whole)
    assert passes == [3, 3, 1]


LOUD = {"hooks": ["model.layers.0:in"], "exclude": {"norm_above": 10}}


def test_tokens_of_outlying_norm_are_left_out_whatever_the_batches_are(loud_model, text):
    section = harvest(**LOUD)
    kept = words_kept(loud_model, text, section)
    everything = "".join(words_kept(loud_model, text, harvest()))
    assert "e" in everything
    assert "".join(kept) == everything.replace("e", "")
    one = [b.kept for b in context_batches(loud_model, text, section.model_copy(update={"batch_contexts": 1}), 3)]
    assert np.concatenate(one).sum() == len(everything.replace("e", ""))
    quiet = harvest(hooks=LOUD["hooks"], exclude={"norm_above": 100})
    assert "".join(words_kept(loud_model, text, quiet)) == everything


def test_stores_streams_and_evaluations_leave_out_the_same_tokens(loud_model, text, tmp_path):
    text = assistants(text).model_copy(update={"chat": text.chat.model_copy(update={"roles": ("assistant", "user")})})
    section = harvest(**LOUD, store=str(tmp_path / "store"), tokens=10_000, live_buffer_tokens=300, shard_tokens=500)
    allowed = set("ABCDEF user or assistant?") - {"e"}
    store = harvest_activations(loud_model, text, section)
    manifest = store.manifest
    largest = manifest["exclude"]["largest_norms"]["model.layers.0:in"]
    assert manifest["exclude"] == {
        "special": True,
        "leading": 0,
        "norm_above": 10,
        "largest_norms": {"model.layers.0:in": largest},
    }
    assert manifest["text"]["chat"]["roles"] == ["assistant", "user"]
    batches = list(context_batches(loud_model, text, section, 8))
    total = sum(int(batch.kept.sum()) for batch in batches)
    assert store.tokens("train") + store.tokens("heldout") == total
    held = EvalData(loud_model, text, harvest(**LOUD))
    read = "".join(loud_model.tokenizer.decode(b.token_ids[b.kept].tolist()) for b in held.pieces(Cursor(0, 0), 10_000))
    assert set(read) == allowed
    live = LiveStream(Buffers(loud_model, text, section, section.hooks), section.hooks, 50, 0)
    norms = live.sample(10_000).x.norm(dim=-1)
    assert norms.max() <= largest
    assert len(norms) == store.tokens("train")
    stream = ContextStream(live)
    batch = next(stream.produce(0))
    assert set(loud_model.tokenizer.decode(batch.origin.token_ids[batch.origin.kept].tolist())) <= allowed
    # The same store is found again, and a recipe with other exclusions does not take it.
    assert harvest_activations(loud_model, text, section).tokens("train") == store.tokens("train")
    for other in (harvest(**LOUD | {"exclude": {"norm_above": 11}}), harvest(**LOUD | {"exclude": {"tokens": ["A"]}})):
        with pytest.raises(ValueError, match=r"exclude\.(norm_above|tokens)"):
            harvest_activations(loud_model, text, other.model_copy(update={"store": section.store, "tokens": 10_000}))


def test_stores_of_earlier_versions_are_taken_by_recipes_without_the_new_keys(text):
    plain = TextSection(source="files", files=text.files)
    identity = recipe_identity(ModelSection(), plain, harvest())
    from sparsary.training.activations.harvest import _nested

    new = {"mix", "chat", "tokenizer_sha256"}
    old = {
        "text": {key: value for key, value in plain.model_dump(mode="json").items() if key not in new},
        "exclude": {"special": True, "leading": 0},
    }
    for path, value in identity.entries.items():
        if path[0] in old:
            assert _nested(old, path) == value, path


def states(model, contexts, hooks):
    return [x.double() for x in model.activations(contexts, hooks).values()]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_documents_are_as_if_each_were_alone(chats, text, kind):
    model = LanguageModel(chats.chat_module(kind), chats.chat_tokenizer(), kind, None)
    masked = text.model_copy(update={"packing": "pack_masked", "context_length": 96})
    hooks = tuple(f"{path}:out" for path in block_paths(model.module))
    apart = []
    for batch in itertools.islice(context_batches(model, masked, harvest(hooks=hooks), 3), 2):
        ids = torch.from_numpy(batch.token_ids).long()
        seen, logits = states(model, ids, hooks), model.logits(ids)
        _, gradients = model.activations_and_gradients(ids, hooks[:1], torch.from_numpy(batch.document_ids))
        model.mask_documents(None)
        loose = states(model, ids, hooks)
        for row, owners in enumerate(batch.document_ids):
            for document in np.unique(owners):
                here = torch.from_numpy(np.flatnonzero(owners == document))
                alone = states(model, ids[row : row + 1, here], hooks)
                for x, y, z in zip(alone, seen, loose, strict=True):
                    torch.testing.assert_close(y[row, here], x[0], rtol=1e-4, atol=1e-4)
                    apart.append(float((z[row, here] - x[0]).abs().max()))
                torch.testing.assert_close(logits[row, here], model.logits(ids[row : row + 1, here])[0], rtol=1e-4, atol=1e-4)
                own = model.activations_and_gradients(ids[row : row + 1, here], hooks[:1])[1]
                torch.testing.assert_close(gradients[hooks[0]][row, here], own[hooks[0]][0], rtol=1e-3, atol=1e-4)
        model.mask_documents(model.tokenizer.bos_token_id)
    assert len(apart) > len(hooks) * 6
    # Without the mask, those behind others differ in every block: the comparison can fail.
    assert np.sum(np.array(apart) > 0.01) >= len(apart) - len(hooks) * 6


def test_a_model_that_takes_no_masks_is_told_to_pack_separately(chats, text):
    model = LanguageModel(chats.chat_module("mamba"), chats.chat_tokenizer(), "tiny mamba", None)
    masked = text.model_copy(update={"packing": "pack_masked"})
    batch = next(context_batches(model, masked, harvest(hooks=("backbone.layers.1:out",)), 2))
    with pytest.raises(ValueError, match=r"text.packing: .* but tiny mamba \(MambaForCausalLM\) .*text.packing: separate"):
        model.activations(torch.from_numpy(batch.token_ids).long(), ("backbone.layers.1:out",))


def test_roles_are_numbered_in_the_order_of_the_recipe():
    assert ROLES == ("system", "developer", "user", "assistant", "tool", "template")
