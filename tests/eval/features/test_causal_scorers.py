"""Intervention and surprisal scores with a judge and a model whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsary import SAE, Explainer
from sparsary.eval.features.autointerp import ActivatingWindow, Evidence, require_scorers, score_explanations
from sparsary.eval.features.collect import Collected, Examples
from sparsary.eval.features.intervention import INTERVENE, NEW_TOKENS, PROMPT_TOKENS, PROMPTS, Continuations, top_means
from sparsary.eval.features.llm_client import Chat, LlmUsage, LocalChat
from sparsary.sae.encoders.topk import TopK

# Tokens of the embedded model that latents 0, 1, ... write.
WORDS = ["war", "year", "Aaron", "the", "from", "to"]


class Judge(Chat):
    """Explains latents by ``text``; says that a continuation fits if it says the word of the explanation more than before."""

    def __init__(self, text):
        self.name, self.usage, self.text, self.asked = "judge", LlmUsage(), text, []

    def answer(self, system, prompt):
        if "EXPLANATION:" in system:
            return f"EXPLANATION: {self.text}"
        assert system == INTERVENE
        description, *excerpts = prompt.split("Excerpt ")
        word = description.split(":")[1].split()[-1]
        said = []
        for excerpt in excerpts:
            before, after = excerpt.split("Continued: ")[1].split("Continued with the neuron more active: ")
            said.append(int(after.split().count(word) > before.split().count(word) + 2))
        self.asked.append(len(excerpts))
        return str(said)

    def loss(self, prompt, text):
        """Three nats, and one less for every word of the text that the prompt has too."""
        known = prompt.replace(":", " ").split()
        return 3.0 - sum(word in known for word in text.split())

    def require_ready(self):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def collected(embedded_model):
    """As from a pass: six latents with peaks of 40 and 20, and windows of text to continue."""
    draw = np.random.default_rng(0)
    windows = draw.integers(10, 500, (2 * PROMPTS + 4, PROMPT_TOKENS + 3)).astype(np.int32)
    values = np.zeros((len(WORDS), 3, 4), np.float32)
    values[:, 0, 1], values[:, 1, 2] = 40.0, 20.0
    keys = np.array([[2.0, 1.0, -np.inf]] * len(WORDS), np.float32)
    top = Examples(np.zeros((len(WORDS), 3, 4), np.int32), values, np.zeros((len(WORDS), 3), np.int32), keys)
    found = object.__new__(Collected)
    background = SimpleNamespace(tokens=windows, documents=np.arange(len(windows)))
    for name, value in (("top", top), ("background", background), ("firings", np.ones(len(WORDS)))):
        object.__setattr__(found, name, value)
    return found


@pytest.fixture(scope="module")
def continuations(embedded_model, collected):
    """Latents that write single words: their directions are the unembedding's rows."""
    ids = [embedded_model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]
    head = embedded_model.module.get_output_embeddings().weight[ids].float()
    dictionary = SAE(128, len(WORDS), TopK(k=1))
    with torch.no_grad():
        rows = torch.nn.functional.normalize(head - head.mean(0), dim=-1)
        dictionary.W_dec.copy_(rows)
    dictionary.provenance = {"hook": "transformer.h.3:out"}
    return Continuations(embedded_model, dictionary.eval(), collected)


@pytest.fixture
def shown():
    def dog(i):
        return ActivatingWindow(("the", "dog", f"runs{i}"), (0.0, 2.0, 0.0))

    def cat(i):
        return ActivatingWindow(("the", "cat", f"sits{i}"), (0.0, 0.0, 0.0))

    return Evidence([dog(i) for i in range(7)], [dog(i) for i in range(10, 20)], [cat(i) for i in range(13)], 2.0)


def test_the_strength_of_a_latent_is_the_mean_of_its_peaks(collected):
    assert top_means(collected).tolist() == [30.0] * len(WORDS)


def test_an_explanation_of_what_a_latent_writes_is_told_from_another_s(shown, continuations):
    scored = {}
    for text in ("the word year", "the word Aaron"):
        judge = Judge(text)
        result = score_explanations(
            shown, judge, judge, scorers=("intervention",), latent=WORDS.index("year"), continuations=continuations
        )
        assert result.detection is None
        assert set(result.entries()) == {"text", "intervention", "details", "malformed", "questions", "reasons"}
        # Ten prompts with the latent and ten with others, by fives.
        assert judge.asked == [5] * 4
        scored[text] = result.intervention
    assert scored["the word year"] >= 0.9
    assert scored["the word Aaron"] <= 0.5


def test_continuations_are_made_once_and_end_where_they_should(embedded_model, continuations):
    plain = continuations.of(None)
    assert continuations.of(None) is plain
    assert len(plain) == PROMPTS
    ids = embedded_model.module.generate(
        input_ids=continuations.prompts, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False, pad_token_id=0
    )
    assert plain == continuations.texts(ids[:, continuations.prompts.shape[1] :])
    items = continuations.items(0)
    assert [true for _, true in items] == [True] * PROMPTS + [False] * PROMPTS
    assert all(f"Continued: {before}\n" in text for (text, _), before in zip(items, plain * 2, strict=True))


def test_surprisal_is_of_contexts_that_the_explanation_makes_likelier(shown):
    scored = {}
    for text in ("a dog", "a horse", "a cat"):
        judge = Judge(text)
        result = score_explanations(shown, judge, judge, scorers=("surprisal",))
        scored[text], gain = result.surprisal, result.details["surprisal"]
        assert (gain["positives"], gain["negatives"]) == (10, 13)
    assert scored == {"a dog": 1.0, "a horse": 0.5, "a cat": 0.0}


def test_without_losses_or_continuations_a_score_has_a_reason(shown, monkeypatch):
    monkeypatch.setattr(Judge, "loss", Chat.loss)
    judge = Judge("a dog")
    result = score_explanations(shown, judge, judge, scorers=("surprisal", "intervention"))
    assert (result.surprisal, result.intervention) == (None, None)
    assert "local --explainer" in result.reasons["surprisal"]
    assert result.reasons["intervention"] == "there is no model to continue text"


def test_a_scorer_that_does_not_exist_is_told():
    assert require_scorers(("surprisal", "detection")) == ("detection", "surprisal")
    with pytest.raises(ValueError, match=r"--scorer: expected .*detection.*got 'surprise'"):
        Explainer("m", scorers=("surprise",))
    with pytest.raises(ValueError, match=r"--scorer: expected one or more"):
        Explainer("m", scorers=())


def test_a_local_model_s_loss_is_of_the_text_behind_the_prompt(embedded_model):
    chat = LocalChat(embedded_model)
    text = "the war lasted from the year"
    ids = embedded_model.token_ids(text)
    own = torch.nn.functional.cross_entropy(embedded_model.logits(ids)[0, :-1], ids[0, 1:])
    assert chat.loss("", text) == pytest.approx(float(own), abs=1e-5)
    assert chat.loss("the war lasted from the year", text) != chat.loss("", text)
    # A prompt too long loses its beginning, and the text is whole.
    assert chat.loss("the war " * 300, text) == pytest.approx(chat.loss("the war " * 200, text), abs=1e-4)
    assert chat.loss("the war", "") is None
